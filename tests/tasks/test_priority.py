"""Interactive requests beside a batch: priorities, and streams that leave slots free."""

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import anyio
import pytest
from support.responses import picture
from support.scripted import Connection, ScriptedGateway, answer, completed, running, session_on
from support.virtual_time import VirtualJournal

from flux2max_async import ConfigurationError, FixedSchedule, FluxSession, InvalidRequestError
from flux2max_async.emulator import Emulator


@pytest.fixture
async def full_size(gateway: Emulator) -> AsyncIterator[FluxSession]:
    """Provide a session with 24 slots whose tasks take 8 s, and are seen to end at once."""
    async with FluxSession(
        gateway.api_key, base_url=gateway.url, schedule=FixedSchedule(0.25), max_polls_per_second=None
    ) as session:
        yield session


def submitted(gateway: Emulator) -> list[str]:
    """Return the prompts that were submitted, in order."""
    return [task.prompt for task in gateway.tasks.values()]


async def consume(stream: AsyncIterator[Any], count: int) -> None:
    for _ in range(count):
        assert (await anext(stream)).ok


@contextlib.asynccontextmanager
async def batch_of_calls(session: FluxSession) -> AsyncIterator[None]:
    """Run 1,000 calls at once."""
    calls = [asyncio.ensure_future(session.generate(f"batch {number}")) for number in range(1_000)]
    yield
    for call in calls:
        call.cancel()
    await asyncio.gather(*calls, return_exceptions=True)


@contextlib.asynccontextmanager
async def batch_of_streams(session: FluxSession) -> AsyncIterator[None]:
    """Run three streams at once, 1,000 requests in all."""
    streams = [session.stream(f"batch {number}" for number in range(length)) for length in (334, 333, 333)]
    consumers = [asyncio.ensure_future(consume(stream, 300)) for stream in streams]
    yield
    for consumer in consumers:
        consumer.cancel()
    for stream in streams:
        await stream.aclose()


# ---------------------------------------------------------------------- the two promises


@pytest.mark.parametrize("batch", [batch_of_calls, batch_of_streams])
async def test_interactive_beside_a_full_batch(full_size: FluxSession, gateway: Emulator, batch: Any) -> None:
    """With a batch of 1,000 in 24 slots, an interactive request gets the next free slot; equals wait for their turn."""
    async with batch(full_size):
        await anyio.sleep(20)
        before, waiting = len(submitted(gateway)), full_size.stats.waiting
        ordinary = asyncio.ensure_future(full_size.submit("ordinary"))
        interactive = asyncio.ensure_future(full_size.submit("interactive", priority=1))
        await interactive
        after = submitted(gateway)[before:]
        is_early = ordinary.done()
        ordinary.cancel()

    assert waiting >= 24
    assert after[0] == "interactive"
    assert not is_early


async def test_interactive_beside_a_full_batch_of_an_account_with_fewer_tasks(scripted: ScriptedGateway) -> None:
    """If the service allows far fewer tasks than the session, an interactive request doesn't wait for all slots."""
    now, ends = asyncio.get_running_loop().time, dict[str, float]()

    async def submit(connection: Connection) -> None:
        if sum(end > now() for end in ends.values()) >= 6:
            await answer(429, {}, [("Retry-After", "1")])(connection)
            return
        ends[task_id := f"t{len(ends)}"] = now() + 8.0
        await answer(200, {"id": task_id})(connection)

    async def poll(connection: Connection) -> None:
        task_id = connection.call.path.rpartition("/")[2]
        await answer(200, completed(task_id) if ends[task_id] <= now() else running(task_id))(connection)

    scripted.submits, scripted.polls = deque([submit]), deque([poll])
    async with session_on(scripted, max_polls_per_second=None) as session, batch_of_calls(session):
        await anyio.sleep(40.0)
        before = len(ends)
        interactive = await session.submit("interactive", priority=1)

    assert int(interactive.id.removeprefix("t")) <= before + 6


async def test_batch_that_leaves_slots_free(full_size: FluxSession, gateway: Emulator) -> None:
    """A batch of 1,000 limited to 20 slots uses 20 all the time, and four other requests are submitted at once."""
    stream = full_size.stream((f"batch {number}" for number in range(1_000)), max_in_flight=20)
    consumer = asyncio.ensure_future(consume(stream, 200))
    in_flight = []
    for _ in range(40):
        await anyio.sleep(0.9)
        in_flight.append(full_size.stats.in_flight)
    began = anyio.current_time()
    tasks = await asyncio.gather(*[full_size.submit(f"interactive {number}") for number in range(4)])
    seconds = anyio.current_time() - began
    consumer.cancel()
    await stream.aclose()

    assert max(in_flight) == 20
    assert sorted(in_flight)[5] >= 19
    assert seconds < 0.5
    assert len({task.id for task in tasks}) == 4


# ---------------------------------------------------------------------- stream(max_in_flight=)


@pytest.mark.parametrize(
    ("max_in_flight", "expected"),
    [
        pytest.param(None, 4, id="all"),
        pytest.param(1, 1, id="one"),
        pytest.param(3, 3, id="some"),
        pytest.param(4, 4, id="as many as there are"),
        pytest.param(1_000, 4, id="more than there are"),
    ],
)
async def test_slots_of_a_stream(gateway: Emulator, max_in_flight: int | None, expected: int) -> None:
    """A stream has at most so many of the session's slots, and pulls no further ahead."""
    pulled = []

    def requests() -> Any:
        for number in range(12):
            pulled.append(number)
            yield f"cat {number}"

    async with FluxSession(gateway.api_key, base_url=gateway.url, max_in_flight=4) as session:
        stream = session.stream(requests(), max_in_flight=max_in_flight)
        first = asyncio.ensure_future(anext(stream))
        await anyio.sleep(4)
        counts = (len(gateway.tasks), len(pulled))
        await first
        assert len([outcome async for outcome in stream if outcome.ok]) == 11

    assert counts == (expected, expected)


async def test_replays_do_not_count_against_a_stream(gateway: Emulator, tmp_path: Path) -> None:
    """What the journal replays takes none of a stream's slots: the first new request is submitted at once."""
    options: dict[str, Any] = {"base_url": gateway.url, "schedule": FixedSchedule(1.0)}
    old = [f"cat {number}" for number in range(6)]
    async with FluxSession(gateway.api_key, journal=VirtualJournal(tmp_path / "run.db"), **options) as session:
        await consume(session.stream(old), 6)
        before = anyio.current_time()
        outcomes = [outcome async for outcome in session.stream([*old, "a dog", "a bird"], max_in_flight=2)]

    assert [outcome.replayed for outcome in outcomes] == [True] * 6 + [False] * 2
    assert anyio.current_time() - before < 12  # both at once


async def test_saving_does_not_count_against_a_stream(scripted: ScriptedGateway, tmp_path: Path) -> None:
    """While images are saved, a stream with one slot submits its next request, but not more than two further ones."""
    scripted.submits = deque(answer(200, {"id": f"t{number}"}) for number in range(6))
    scripted.polls = deque(
        answer(200, completed(f"t{number}", url=f"{scripted.url}/{number}.jpeg")) for number in range(6)
    )
    scripted.downloads = deque([answer(200, picture("JPEG")), answer(200, picture("JPEG"), after=20.0)])
    async with session_on(scripted, allow_private_downloads=True) as session:
        requests = [f"cat {number}" for number in range(6)]
        stream = session.stream(requests, save_to=tmp_path / "images", max_in_flight=1)
        await anext(stream)
        second = asyncio.ensure_future(anext(stream))
        await anyio.sleep(15)
        posts = len(scripted.of("POST"))
        await second
        await stream.aclose()

    assert posts == 4


@pytest.mark.parametrize("max_in_flight", [0, -1, 1.0, True, "2"])
async def test_invalid_number_of_slots(session: FluxSession, gateway: Emulator, max_in_flight: Any) -> None:
    """Anything but an integer of at least 1 is refused by name, before the stream begins."""
    with pytest.raises(ConfigurationError, match="max_in_flight"):
        session.stream(["a cat"], max_in_flight=max_in_flight)
    assert not gateway.calls


# ---------------------------------------------------------------------- priorities


@pytest.mark.parametrize("priority", [True, False, None, 1.0, "1"])
@pytest.mark.parametrize("method", ["generate", "submit", "stream"])
async def test_invalid_priority(session: FluxSession, gateway: Emulator, method: str, priority: Any) -> None:
    """Anything but an integer is refused by name, before anything is sent."""
    with pytest.raises(InvalidRequestError, match="priority") as caught:
        await getattr(session, method)(["a cat"] if method == "stream" else "a cat", priority=priority)

    assert caught.value.field == "priority"
    assert not gateway.calls


async def test_priority_of_a_stream(gateway: Emulator) -> None:
    """The requests of a stream wait with its priority."""
    async with FluxSession(gateway.api_key, base_url=gateway.url, max_in_flight=2) as session:
        low = asyncio.ensure_future(consume(session.stream(["low"] * 4), 4))
        await anyio.sleep(1)
        high = asyncio.ensure_future(consume(session.stream(["high"] * 2, priority=1), 2))
        await asyncio.gather(low, high)

    assert submitted(gateway) == ["low", "low", "high", "high", "low", "low"]


async def test_age_counts(gateway: Emulator) -> None:
    """A request that has waited for a minute goes before a new one that is one priority higher."""
    async with FluxSession(gateway.api_key, base_url=gateway.url, max_in_flight=1) as session:
        # Ten tasks of 8 s: the last one waits for more than a minute.
        calls = [asyncio.ensure_future(session.generate(f"old {number}")) for number in range(10)]
        await anyio.sleep(62)
        calls.append(asyncio.ensure_future(session.generate("new", priority=1)))
        await asyncio.gather(*calls)

    assert submitted(gateway) == [*[f"old {number}" for number in range(10)], "new"]


async def test_waiting_is_counted(gateway: Emulator) -> None:
    """stats.waiting counts the requests that wait for a slot, no more and no less."""
    async with FluxSession(gateway.api_key, base_url=gateway.url, max_in_flight=2) as session:
        calls = [asyncio.ensure_future(session.generate(f"cat {number}")) for number in range(5)]
        await anyio.sleep(1)
        counts = [session.stats.waiting]
        calls[-1].cancel()
        await anyio.sleep(1)
        counts.append(session.stats.waiting)
        await asyncio.gather(*calls, return_exceptions=True)
        counts.append(session.stats.waiting)
        leftover = asyncio.gather(*[session.submit("a dog") for _ in range(3)], return_exceptions=True)
        await anyio.sleep(1)
        counts.append(session.stats.waiting)
    await leftover

    assert counts == [3, 2, 0, 1]
    assert session.stats.waiting == 0


# ---------------------------------------------------------------------- requests that are shared


@pytest.mark.parametrize(
    ("joined", "left", "expected"),
    [
        pytest.param([], [], "ab", id="one caller each"),
        pytest.param([1], [], "ba", id="a higher one joins"),
        pytest.param([-1], [], "ab", id="a lower one joins"),
        pytest.param([1], [0], "ab", id="the higher one has left"),
        pytest.param([1, 1], [0], "ba", id="one of two higher ones has left"),
        pytest.param([2, 1], [0], "ba", id="the highest one has left"),
    ],
)
async def test_highest_priority_of_those_who_share_a_request(
    scripted: ScriptedGateway, tmp_path: Path, joined: list[int], left: list[int], expected: str
) -> None:
    """Equal requests are one: the highest priority of those who still wait for it counts."""
    scripted.submits = deque(answer(200, {"id": f"t{number}"}) for number in range(3))
    scripted.polls = deque([answer(200, running("t0"))] * 5 + [answer(200, completed(f"t{n}")) for n in range(3)])
    async with session_on(scripted, journal=VirtualJournal(tmp_path / "run.db"), max_in_flight=1) as session:
        first = asyncio.ensure_future(session.generate("first"))
        await anyio.sleep(1)
        calls = [asyncio.ensure_future(session.generate(prompt)) for prompt in "ab"]
        await anyio.sleep(1)
        sharing = [asyncio.ensure_future(session.generate("b", priority=priority)) for priority in joined]
        await anyio.sleep(1)
        for index in left:
            sharing[index].cancel()
        await asyncio.gather(first, *calls, *sharing, return_exceptions=True)

    assert [received.params["prompt"] for received in scripted.of("POST")] == ["first", *expected]
