"""Generated images as input images: sent with a URL that works."""

import asyncio
import base64
from collections import deque
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from support.responses import picture
from support.scripted import Behaviour, Connection, ScriptedGateway, answer, completed, hang, reset, running, session_on
from support.virtual_time import VirtualJournal

from flux2max_async import DeadlineExceededError, FluxSession, GeneratedImage, GenerationRequest, ResultExpiredError
from flux2max_async._models.results import NO_URL, inline_url

OLD, FRESH = "https://pictures.example/old.jpeg", "https://pictures.example/fresh.jpeg"
UNKNOWN = answer(404, {"error": {"code": "task_not_found", "message": "no such task"}})


def generated(url: str = OLD, *, minutes: float | None = 30.0, index: int = 0) -> GeneratedImage:
    """Return an image of a task, whose URL was received some time ago."""
    received_at = None if minutes is None else datetime.now(UTC) - timedelta(minutes=minutes)
    return GeneratedImage(url=url, type="image", task_id="t0", index=index, received_at=received_at)


async def edit(scripted: ScriptedGateway, *images: GeneratedImage) -> list[str]:
    """Generate with images as input, and return what was sent for them."""
    async with session_on(scripted) as session:
        await session.submit("an edit", input_images=images)
    (submit,) = scripted.of("POST")
    return [value for name, value in submit.params.items() if name.startswith("input_image")]


def polls_of_source(scripted: ScriptedGateway) -> int:
    return sum(request.path.endswith("/t0") for request in scripted.of("GET"))


@pytest.mark.parametrize("minutes", [0.0, 7.0])
async def test_a_young_url_is_sent_as_it_is(scripted: ScriptedGateway, minutes: float) -> None:
    """A URL that lives for some more minutes is sent without a poll."""
    assert await edit(scripted, generated(minutes=minutes)) == [OLD]
    assert polls_of_source(scripted) == 0


@pytest.mark.parametrize(
    "image",
    [
        pytest.param(generated(), id="expired"),
        pytest.param(generated(minutes=None), id="of unknown age"),
        pytest.param(generated(NO_URL, minutes=0.0), id="without a URL"),
    ],
)
async def test_an_old_url_is_renewed(scripted: ScriptedGateway, image: GeneratedImage) -> None:
    """The task of an image whose URL may have expired is polled once for a fresh one."""
    scripted.polls = deque([answer(200, completed("t0", FRESH))])

    assert await edit(scripted, image) == [FRESH]
    assert polls_of_source(scripted) == 1


async def test_other_images_of_the_request_stay(scripted: ScriptedGateway) -> None:
    """Only the URLs that have expired are renewed, each by its image's index."""
    output = [{"content": [{"type": "image", "url": url} for url in ("https://p.example/0", FRESH)]}]
    scripted.polls = deque([answer(200, completed("t0", output=output))])

    assert await edit(scripted, generated(minutes=1.0), generated(index=1)) == [OLD, FRESH]


async def test_inline_images_are_sent_as_base64(scripted: ScriptedGateway) -> None:
    """An image that is a data: URI never expires."""
    data = base64.b64encode(picture()).decode()

    assert await edit(scripted, generated(inline_url(data))) == [data]
    assert polls_of_source(scripted) == 0


@pytest.mark.parametrize("failures", [[reset], [answer(503, {})] * 4, [answer(200, b"?"), reset]])
async def test_failed_polls_are_repeated(scripted: ScriptedGateway, failures: list[Behaviour]) -> None:
    """A poll that fails for a reason that isn't the task's is made again."""
    scripted.polls = deque([*failures, answer(200, completed("t0", FRESH))])

    assert await edit(scripted, generated()) == [FRESH]


@pytest.mark.parametrize(
    ("behaviour", "reason"),
    [
        pytest.param(UNKNOWN, "no such task", id="unknown"),
        pytest.param(answer(200, running("t0")), "it has no such image", id="running"),
        pytest.param(answer(503, {"message": "down"}), "down", id="down"),
    ],
)
async def test_a_url_that_cannot_be_renewed(scripted: ScriptedGateway, behaviour: Behaviour, reason: str) -> None:
    """Nothing is submitted with a URL that has expired; one of unknown age may work, and is sent."""
    scripted.polls = deque([behaviour])
    async with session_on(scripted) as session:
        with pytest.raises(ResultExpiredError, match=rf"input_images\[1\]: .* task t0 has no fresh one: .*{reason}"):
            await session.generate("an edit", input_images=["https://a.example/", generated()])
    assert scripted.of("POST") == []

    assert await edit(scripted, generated(minutes=None)) == [OLD]


async def test_a_url_that_expires_while_submits_are_held_back(scripted: ScriptedGateway) -> None:
    """What expires between two attempts is renewed before the next one."""
    now = datetime.now(UTC)
    scripted.polls = deque([answer(200, completed("t0", FRESH))])
    async with session_on(scripted) as session:
        links = session._get_supervisor().client.input_links
        links.now = lambda: now

        async def refuse(connection: Connection) -> None:
            links.now = lambda: now + timedelta(minutes=9)
            await answer(429, {}, [("Retry-After", "60")])(connection)

        scripted.submits = deque([refuse, answer(200, {"id": "t1"})])
        await session.submit("an edit", input_images=[generated(minutes=0.0)])

    assert [request.params["input_image"] for request in scripted.of("POST")] == [OLD, FRESH]


async def test_a_cancelled_renewal_submits_nothing(scripted: ScriptedGateway) -> None:
    """A timeout that is over while a URL is renewed ends the call, and nothing is submitted."""
    scripted.polls = deque([hang])
    async with session_on(scripted) as session:
        with pytest.raises(DeadlineExceededError):
            await session.generate("an edit", timeout=5.0, input_images=[generated()])
        await asyncio.sleep(60.0)

    assert scripted.of("POST") == []


# ---------------------------------------------------------------------- keys


async def generate(session: FluxSession, image: GeneratedImage) -> str:
    return (await session.generate("an edit", input_images=[image])).task_id


async def submit(session: FluxSession, image: GeneratedImage) -> str:
    return (await session.submit("an edit", input_images=[image])).id


@pytest.mark.parametrize("ask", [generate, submit])
async def test_the_same_edit_is_paid_for_once(
    scripted: ScriptedGateway, tmp_path: Path, ask: Callable[[FluxSession, GeneratedImage], Awaitable[str]]
) -> None:
    """An edit of the same image is the same request, whatever its signed URL is today; one of another image is not."""
    scripted.submits = deque([answer(200, {"id": "t1"}), answer(200, {"id": "t2"})])
    scripted.polls = deque([answer(200, completed("t1"))])
    for _ in range(2):
        async with session_on(scripted, journal=VirtualJournal(tmp_path / "run.db")) as session:
            for url in (OLD, FRESH):
                assert await ask(session, generated(url, minutes=0.0)) == "t1"
    assert len(scripted.of("POST")) == 1

    async with session_on(scripted, journal=VirtualJournal(tmp_path / "run.db")) as session:
        assert await ask(session, generated(minutes=0.0, index=1)) == "t2"
        entries = [entry async for entry in session._parts.journal.entries()]  # type: ignore[union-attr]
    assert [entry.request["input_images"] for entry in entries] == [["task:t0/0"], ["task:t0/1"]]


def test_requests_with_a_generated_image_have_a_hash() -> None:
    """Such a request can be a key of a dict, as every other."""
    first, second = (GenerationRequest("an edit", input_images=[generated(minutes=1.0)]) for _ in range(2))

    assert {first: "found"}[second] == "found"
