"""Replays have links that work, and a replay is never worse because its links can't be renewed."""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import anyio
import attrs
import pytest
from support.scripted import Behaviour, Connection, ScriptedGateway, answer, completed, hang, reset, running, session_on
from support.virtual_time import VirtualJournal

from flux2max_async import Completed, FluxSession, GenerationRequest
from flux2max_async.emulator import Emulator

OLD, FRESH = "https://pictures.example/old.jpeg", "https://pictures.example/fresh.jpeg"


def ended(url: str, images: int = 1) -> dict[str, object]:
    return completed(output=[{"content": [{"type": "image", "url": url, "jobId": "j1"}] * images}])


async def age(journal: VirtualJournal, by: timedelta) -> None:
    """Make everything in the journal older."""
    for entry in [entry async for entry in journal.entries()]:
        await journal.record(attrs.evolve(entry, ended_at=datetime.now(UTC) - by))


async def fill(scripted: ScriptedGateway, folder: Path, *, minutes: float = 30.0) -> None:
    """Fill a journal with one task that ended some time ago."""
    scripted.polls = deque([answer(200, ended(OLD))])
    journal = VirtualJournal(folder / "run.db")
    async with session_on(scripted, journal=journal) as session:
        await session.generate("a cat")
        await age(journal, timedelta(minutes=minutes))
    scripted.received.clear()


async def submit(session: FluxSession) -> Completed:
    return await (await session.submit("a cat"))


async def generate(session: FluxSession) -> Completed:
    return await session.generate("a cat")


@pytest.mark.parametrize("ask", [generate, submit])
async def test_old_links_are_renewed(
    scripted: ScriptedGateway, tmp_path: Path, ask: Callable[[FluxSession], Awaitable[Completed]]
) -> None:
    """A replay in another session gets fresh links with one poll, and the next one gets the same without any."""
    await fill(scripted, tmp_path)
    scripted.polls = deque([answer(200, ended(FRESH))])
    async with session_on(scripted, journal=VirtualJournal(tmp_path / "run.db")) as session:
        replays = [await ask(session) for _ in range(3)]

    assert [replay.images[0].url for replay in replays] == [FRESH] * 3
    assert all(replay.replayed for replay in replays)
    assert len(scripted.received) == len(scripted.of("GET")) == 1


async def test_young_links_are_given_out_as_they_are(scripted: ScriptedGateway, tmp_path: Path) -> None:
    """Nothing is sent for a replay whose links still live for some minutes."""
    await fill(scripted, tmp_path, minutes=7.0)
    async with session_on(scripted, journal=VirtualJournal(tmp_path / "run.db")) as session:
        replay = await session.generate("a cat")

    assert replay.images[0].url == OLD
    assert scripted.received == []


@pytest.mark.parametrize(
    "behaviour",
    [
        pytest.param(reset, id="reset"),
        pytest.param(hang, id="hung"),
        pytest.param(answer(404, {"error": {"code": "task_not_found", "message": "no such task"}}), id="unknown"),
        pytest.param(answer(500, b""), id="500"),
        pytest.param(answer(200, running()), id="running"),
        pytest.param(answer(200, ended(FRESH, images=2)), id="other images"),
        pytest.param(answer(200, ended("data:image/jpeg;base64,AAAA")), id="inline"),
    ],
)
async def test_links_that_cannot_be_renewed(scripted: ScriptedGateway, tmp_path: Path, behaviour: Behaviour) -> None:
    """The outcome is given out as it is in the journal, within seconds."""
    await fill(scripted, tmp_path)
    scripted.polls = deque([behaviour])
    async with session_on(scripted, journal=VirtualJournal(tmp_path / "run.db")) as session:
        started = anyio.current_time()
        replay = await session.generate("a cat")
        seconds = anyio.current_time() - started

    assert seconds <= 6.0
    assert replay.replayed
    assert replay.images[0].url == OLD


async def test_no_poll_while_the_service_asks_to_wait(scripted: ScriptedGateway, tmp_path: Path) -> None:
    """During a pause of all polls, a replay is given out at once as it is."""
    await fill(scripted, tmp_path)
    scripted.polls = deque([answer(429, b"", [("Retry-After", "100")])])
    async with session_on(scripted, journal=VirtualJournal(tmp_path / "run.db")) as session:
        for number in range(10):
            session.attach(f"u{number}")
        await anyio.sleep(5.0)
        before = len(scripted.received)
        started = anyio.current_time()
        replay = await session.generate("a cat")
        seconds = anyio.current_time() - started

    assert seconds < 1.0
    assert replay.images[0].url == OLD
    assert len(scripted.received) == before


async def test_a_list_is_replayed_without_polls(scripted: ScriptedGateway, tmp_path: Path) -> None:
    """A stream polls no task for its links."""
    await fill(scripted, tmp_path)
    async with session_on(scripted, journal=VirtualJournal(tmp_path / "run.db")) as session:
        outcomes = [outcome async for outcome in session.stream(["a cat"])]

    assert [outcome.ok for outcome in outcomes] == [True]
    assert scripted.received == []


async def test_only_so_many_are_remembered(scripted: ScriptedGateway, tmp_path: Path) -> None:
    """The oldest of more than a thousand renewed links are forgotten, and asked for again."""
    await fill(scripted, tmp_path)
    scripted.polls = deque([answer(200, ended(FRESH))])
    async with session_on(scripted, journal=VirtualJournal(tmp_path / "run.db")) as session:
        links = session._get_supervisor()._context._links
        first = await session.generate("a cat")
        for number in range(1_000):
            links._renewed[f"u{number}"] = first.images
        await session.generate("a cat")
        remembered = len(links._renewed)
        await session.generate("a cat")

    assert remembered == 1_000
    assert len(scripted.of("GET")) == 2


@pytest.mark.parametrize("streamed", [False, True])
async def test_pictures_of_another_process_are_renewed_when_used(tmp_path: Path, streamed: bool) -> None:
    """save() and read() renew the expired link of a replay whose task another session has submitted."""
    async with Emulator(seconds=1.0, seed=1, url_lifetime=600.0) as gateway:
        journal = VirtualJournal(tmp_path / "run.db")
        async with FluxSession(gateway.api_key, base_url=gateway.url, journal=journal) as session:
            first = await session.generate("a cat")
            await age(journal, timedelta(minutes=30))
            picture = await session.read(first.images[0])
        await anyio.sleep(3600.0)
        journal = VirtualJournal(tmp_path / "run.db")
        async with FluxSession(gateway.api_key, base_url=gateway.url, journal=journal) as session:
            if streamed:
                (replay,) = [outcome.unwrap() async for outcome in session.stream(["a cat"])]
            else:
                replay = await session.generate("a cat")
            saved = await session.save(replay.images[0], tmp_path / "a.jpeg")
            read = await session.read(replay.images[0])

    assert saved.read_bytes() == read == picture
    assert (replay.images[0].url == first.images[0].url) is streamed


# ---------------------------------------------------------------------- content_keys


async def test_without_content_keys_each_request_is_its_own(tmp_path: Path) -> None:
    """Equal requests are paid for each time, at once, later and in lists; a key still makes them one."""
    requests: list[str | GenerationRequest] = [
        "a cat",
        "a cat",
        GenerationRequest("a dog", key="k"),
        GenerationRequest("a dog", key="k"),
    ]
    ids: list[str] = []
    async with Emulator(seconds=1.0, seed=1, pictures=False) as gateway:
        for _ in range(2):
            journal = VirtualJournal(tmp_path / "run.db")
            async with FluxSession(
                gateway.api_key, base_url=gateway.url, journal=journal, content_keys=False
            ) as session:
                ids += [(await session.generate("a cat")).task_id, (await session.generate("a cat")).task_id]
                ids += [outcome.unwrap().task_id async for outcome in session.stream(requests)]

    assert len(ids) == 12
    assert len(set(ids)) == 2 * 4 + 1


async def test_closing_gives_out_a_replay_whose_links_are_being_renewed(
    scripted: ScriptedGateway, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A session that is closed meanwhile ends at once, and the replay is no unfinished task."""
    await fill(scripted, tmp_path)
    polled = anyio.Event()

    async def hang_later(connection: Connection) -> None:
        polled.set()
        await hang(connection)

    scripted.polls = deque([hang_later])
    async with session_on(scripted, journal=VirtualJournal(tmp_path / "run.db")) as session:
        waiting = asyncio.ensure_future(session.generate("a cat"))
        await polled.wait()
        started = anyio.current_time()
    replay = await waiting

    assert (replay.images[0].url, replay.replayed) == (OLD, True)
    assert anyio.current_time() - started < 1.0
    assert "unfinished" not in caplog.text
