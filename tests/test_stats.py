"""SessionStats: a frozen copy of what a session has counted, and what it does at the moment; and what is unfinished."""

import asyncio
import contextlib
from collections import deque

import attrs
import pytest
from support.responses import jpeg
from support.scripted import Connection, ScriptedGateway, answer, completed, raw, running, session_on

from flux2max_async import FluxError, FluxSession, GeneratedImage, SessionClosedError, SessionStats
from flux2max_async._api.submit_limiter import SubmitLimiter
from flux2max_async._stats import RecentRate

IMAGE = jpeg(bytes(range(256)) * 400)


def image_at(scripted: ScriptedGateway) -> GeneratedImage:
    return GeneratedImage(url=f"{scripted.url}/0.jpeg", type="image", task_id="t1")


async def numbered(connection: Connection) -> None:
    """Accept a submit: the prompt is the task's id."""
    await answer(200, running(connection.call.params["prompt"]))(connection)


async def submit_or_fail(session: FluxSession, prompt: str) -> None:
    with contextlib.suppress(FluxError):
        await session.submit(prompt)


async def test_a_copy_of_the_moment(scripted: ScriptedGateway) -> None:
    """What was read stays as it was, and can't be changed."""
    async with session_on(scripted) as session:
        before = session.stats
        await session.generate("a cat")
        after = session.stats

    assert (before.completed, after.completed) == (0, 1)
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        after.completed = 2  # type: ignore[misc]


async def test_before_and_after() -> None:
    """A session that isn't open has a limit, and nothing in flight."""
    async with ScriptedGateway() as scripted:
        session = session_on(scripted, max_in_flight=7)
        before = session.stats
        async with session:
            await session.generate("a cat")
        after = session.stats

    assert before == SessionStats(in_flight_limit=7)
    assert (after.in_flight_limit, after.oldest_in_flight, after.paused_for, after.polls_per_second) == (7, None, 0, 0)


async def test_tasks_in_flight(scripted: ScriptedGateway) -> None:
    """The age is that of the oldest task; tasks that are left at the close stay in `unfinished`."""
    scripted.submits = deque([numbered])
    scripted.polls = deque([answer(200, running("old")), answer(200, running("new"))])
    session = session_on(scripted)
    async with session:
        await session.submit("old")
        await asyncio.sleep(5.5)
        await session.submit("new")
        await asyncio.sleep(2.5)
        stats, unfinished = session.stats, session.unfinished
    closed = session.unfinished

    assert stats.oldest_in_flight == pytest.approx(8, abs=0.5)
    assert stats.in_flight == 2
    assert stats.polls_per_second > 0
    assert {task.id for task in unfinished} == {task.id for task in closed} == {"old", "new"}
    for task in closed:
        with pytest.raises(SessionClosedError, match=task.id):
            await task


async def test_nothing_is_unfinished(scripted: ScriptedGateway) -> None:
    """Neither a task that has ended is, nor one before the session is opened anew."""
    session = session_on(scripted)
    scripted.polls = deque([answer(200, running("t1"))])
    async with session:
        await session.submit("a cat")
    left = session.unfinished
    scripted.polls = deque([answer(200, completed("t1"))])
    async with session:
        opened = session.unfinished
        await session.generate("a dog")
    closed = session.unfinished

    assert [task.id for task in left] == ["t1"]
    assert (opened, closed) == ((), ())


async def test_pauses(scripted: ScriptedGateway) -> None:
    """After several refusals, the limit is lower, and a pause has a length."""
    refusal = answer(429, {"error": {"message": "slow down"}}, [("Retry-After", "20")])
    scripted.submits = deque([refusal])
    async with session_on(scripted) as session:
        submits = [asyncio.ensure_future(submit_or_fail(session, f"cat {number}")) for number in range(6)]
        await asyncio.sleep(2)
        stats = session.stats
    await asyncio.gather(*submits)

    assert stats.rate_limited >= 4
    assert 0 < stats.paused_for <= 20
    assert 1 <= stats.in_flight_limit < 24


async def test_uncertain_submits(scripted: ScriptedGateway) -> None:
    """A submit whose answer was lost is counted twice: as failed, and as uncertain."""
    scripted.submits = deque([raw(b"", then="close"), answer(400, {"error": {"message": "no"}})])
    async with session_on(scripted) as session:
        for _ in range(2):
            await submit_or_fail(session, "a cat")
        stats = session.stats

    assert (stats.failed, stats.uncertain) == (2, 1)


async def test_downloads(scripted: ScriptedGateway) -> None:
    """Downloads that run, and the bytes that have come."""
    headers = [("Accept-Ranges", "bytes"), ("ETag", '"v1"')]
    scripted.downloads = deque([answer(200, IMAGE, headers, after=5.0)])
    async with session_on(scripted) as session:
        reads = [asyncio.ensure_future(session.read(image_at(scripted))) for _ in range(2)]
        await asyncio.sleep(2)
        during = session.stats
        await asyncio.gather(*reads)
        after = session.stats

    assert (during.downloading, during.downloaded_bytes) == (2, 0)
    assert (after.downloading, after.downloaded_bytes) == (0, 2 * len(IMAGE))


def test_a_limiter_without_refusals() -> None:
    """Without refusals, the limit is the session's own."""
    assert SubmitLimiter(24).limit == 24


def test_recent_rate() -> None:
    """A steady rate is measured as it is, and is forgotten when nothing happens any more."""
    rate = RecentRate()
    nothing = rate.value(0.0)
    for number in range(1000):
        rate.add(number / 5)

    assert nothing == 0
    assert rate.value(200.0) == pytest.approx(5, rel=0.05)
    assert rate.value(300.0) < 0.01
