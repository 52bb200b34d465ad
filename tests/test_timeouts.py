"""Time limits: on time if everything runs, and nothing that has come already is given up if nothing could run."""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import attrs
import pytest
from support.responses import jpeg
from support.scripted import (
    Behaviour,
    Connection,
    ScriptedGateway,
    answer,
    completed,
    reset,
    running,
    session_on,
)
from support.virtual_time import hold_up

from flux2max_async import DeadlineExceededError, FluxError, FluxSession, GeneratedImage
from flux2max_async._api.submit_payload import SubmitPayload
from flux2max_async._timeouts import GRACE_PERIOD, Timeout, Timer, wait

LATE = 40.0
"""Seconds; longer than the HTTP timeout, and than the window in which the pace of a download is measured."""
TASK, COMPLETED, RUNNING = answer(200, running()), answer(200, completed()), answer(200, running())
IMAGE = jpeg(bytes(40_000))


# ---------------------------------------------------------------------- the limits themselves


@pytest.mark.parametrize("grace", [0.0, 3.0])
@pytest.mark.parametrize("limit", ["timeout", "timer", "wait"])
async def test_a_limit_on_time(limit: str, grace: float) -> None:
    """If the event loop runs, a limit ends on time, with a grace period or without."""
    ended = await _limited(limit, 2.0, grace)

    assert ended == pytest.approx(2.0, abs=0.01)


@pytest.mark.parametrize("grace", [0.0, 3.0])
@pytest.mark.parametrize("limit", ["timeout", "timer", "wait"])
async def test_a_late_limit(limit: str, grace: float) -> None:
    """If its timer is late, a limit ends after the grace period, and not again after another one."""
    asyncio.get_running_loop().call_later(1.0, hold_up, 10.0)
    asyncio.get_running_loop().call_later(12.0, hold_up, 10.0)
    ended = await _limited(limit, 2.0, grace)

    assert ended == pytest.approx(22.0 if grace else 11.0, abs=0.01)


async def _limited(limit: str, seconds: float, grace: float) -> float:
    """Wait for what never comes; return after how many seconds the limit has ended."""
    started, never = anyio.current_time(), asyncio.get_running_loop().create_future()
    match limit:
        case "timeout":
            with pytest.raises(TimeoutError), Timeout(seconds, grace=grace):
                await never
        case "timer":
            Timer(seconds, lambda: never.set_result(None), grace=grace)
            await never
        case _:
            await wait([never], seconds, grace=grace)
    return anyio.current_time() - started


async def test_what_comes_in_the_last_moment() -> None:
    """What needs several iterations of the event loop when the time is over is not given up."""
    with Timeout(1.0):
        await anyio.sleep(1.0)
        for _ in range(10):
            await asyncio.sleep(0)


async def test_a_cancelled_timeout() -> None:
    """A cancellation by somebody else is not turned into a TimeoutError, also in the moment in which the time is over."""
    entered = asyncio.Event()

    async def work() -> None:
        with Timeout(1.0):
            entered.set()
            await asyncio.sleep(10.0)

    task = asyncio.create_task(work())
    await entered.wait()
    timeout = asyncio.get_running_loop().call_later(1.0, task.cancel)
    with pytest.raises(asyncio.CancelledError):
        await task

    assert timeout.when() <= anyio.current_time()


async def test_an_error_when_the_time_is_over() -> None:
    """What the block itself raises when it is cancelled for its time is not replaced, and nothing stays cancelled."""
    with pytest.raises(RuntimeError, match="of its own"), Timeout(1.0):
        try:
            await asyncio.sleep(10.0)
        finally:
            raise RuntimeError("of its own")
    task = asyncio.current_task()

    assert task is not None
    assert not task.cancelling()


async def test_a_cancelled_timer() -> None:
    """A timer that is cancelled calls nothing, also if that is in the moment in which its time has come."""
    calls: list[float] = []
    early, due = (Timer(1.0, lambda: calls.append(anyio.current_time())) for _ in range(2))
    await anyio.sleep(0.5)
    early.cancel()
    while not due.is_due:
        await asyncio.sleep(0)
        hold_up(0.01)
    due.cancel()
    await anyio.sleep(10.0)

    assert calls == []


# ---------------------------------------------------------------------- what they are used for


def held_up(behave: Behaviour, seconds: float = LATE) -> Behaviour:
    """Respond, and hold everything up before anything of it can be read."""

    async def behave_and_hold_up(connection: Connection) -> None:
        await behave(connection)
        hold_up(seconds)

    return behave_and_hold_up


@attrs.frozen
class Case:
    """What waits for an answer that comes while nothing runs; it must be read, with no call made again."""

    use: Callable[[FluxSession, ScriptedGateway], Awaitable[Any]]
    submits: list[Behaviour] = attrs.field(factory=lambda: [TASK])
    polls: list[Behaviour] = attrs.field(factory=lambda: [COMPLETED])
    downloads: list[Behaviour] = attrs.field(factory=list[Behaviour])
    options: dict[str, Any] = attrs.field(factory=dict[str, Any])
    requests: int = 1
    """How many requests are made."""


async def submit_many(session: FluxSession, _: ScriptedGateway) -> None:
    await asyncio.gather(*(session.submit(f"cat {number}") for number in range(12)))


async def block_before_writing(session: FluxSession, _: ScriptedGateway) -> None:
    submit = asyncio.create_task(session.submit("a cat"))
    for _step in range(4):  # it is connecting
        await asyncio.sleep(0)
    hold_up(LATE)
    await submit


async def read(session: FluxSession, scripted: ScriptedGateway) -> None:
    image = GeneratedImage(url=f"{scripted.url}/0.jpeg", type="image", task_id="t1")
    assert await session.read(image) == IMAGE


async def close_while_submitting(session: FluxSession, scripted: ScriptedGateway) -> None:
    submit = asyncio.create_task(session.submit("a cat"))
    while not scripted.received:  # noqa: ASYNC110 - the server has no event for it
        await asyncio.sleep(0)
    hold_up(LATE)
    await session.aclose(drain=0.0)
    assert (await submit).id == "t1"


def slow_image(seconds: float) -> Behaviour:
    """Send an image in two parts, with everything held up in between."""

    async def behave(connection: Connection) -> None:
        await connection.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(IMAGE) + IMAGE[:1000])
        await anyio.sleep(0.1)
        hold_up(seconds)
        await anyio.sleep(0.1)
        await connection.send(IMAGE[1000:])

    return behave


CASES = {
    "submits": Case(submit_many, submits=[*[TASK] * 11, held_up(TASK)], requests=12),
    "submit that isn't written yet": Case(block_before_writing),
    "submit with a time limit": Case(lambda session, _: session.submit("a cat", timeout=10.0), submits=[held_up(TASK)]),
    "submits that a closing session waits for": Case(
        close_while_submitting, submits=[answer(200, running(), after=1.0)]
    ),
    "fetch": Case(lambda session, _: session.fetch("t1"), polls=[held_up(COMPLETED)]),
    "poll": Case(lambda session, _: session.attach("t1").outcome(), polls=[held_up(COMPLETED)]),
    "poll that is usually quick": Case(
        lambda session, _: session.attach("t1").outcome(),
        polls=[RUNNING, held_up(COMPLETED)],
        requests=2,
    ),
    "last poll": Case(
        lambda session, _: session.attach("t1").outcome(),
        polls=[held_up(COMPLETED)],
        options={"task_timeout": 5.0},
    ),
    "download": Case(read, downloads=[held_up(answer(200, IMAGE))]),
    "download and its pace": Case(read, downloads=[slow_image(LATE)], options={"http_timeout": 1000.0}),
    "download as a whole": Case(
        read, downloads=[slow_image(200.0)], options={"task_timeout": 120.0, "http_timeout": 1000.0}
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
async def test_answers_that_come_while_nothing_runs(scripted: ScriptedGateway, case: Case) -> None:
    """Whatever is waited for, and though its time is over, an answer that has come is read, and nothing is repeated."""
    scripted.submits, scripted.polls = deque(case.submits), deque(case.polls)
    scripted.downloads = deque(case.downloads or scripted.downloads)
    async with session_on(scripted, **case.options) as session:
        await case.use(session, scripted)
        stats = session.stats

    assert (stats.retries, len(scripted.received)) == (0, case.requests)


@pytest.mark.parametrize("use", ["submit", "fetch"])
async def test_an_answer_that_has_not_come_yet(scripted: ScriptedGateway, use: str) -> None:
    """Where a call isn't repeated, the answer has five more seconds after a time in which nothing ran, and no more."""
    for after, comes in ((LATE + 4.0, True), (LATE + 6.0, False)):
        scripted.submits = scripted.polls = deque([answer(200, completed(), after=after)])
        async with session_on(scripted) as session:
            asyncio.get_running_loop().call_later(0.5, hold_up, LATE)
            call: Awaitable[Any] = session.submit("a cat") if use == "submit" else session.fetch("t1")
            started = anyio.current_time()
            if comes:
                await call
            else:
                with pytest.raises(FluxError):
                    await call
                assert anyio.current_time() - started == pytest.approx(0.5 + LATE + GRACE_PERIOD, abs=0.1)


async def test_a_submit_is_not_written_when_its_time_is_over() -> None:
    """A submit that could be written only in the moment in which its time is over certainly creates nothing."""
    limit = Timeout(1.0)
    payload = SubmitPayload(b"{}", limit=limit)
    with pytest.raises(ConnectionError, match="time"), limit:
        await anyio.sleep(1.0)
        while not limit.is_due:  # noqa: ASYNC110 - there is no event for it
            await asyncio.sleep(0)
        await payload.write(None)  # type: ignore[arg-type]

    assert not payload.is_written


async def test_a_call_whose_time_is_over_for_good(scripted: ScriptedGateway) -> None:
    """generate(timeout=) ends half a second after a time in which nothing ran, if there is no outcome by then."""
    scripted.polls = deque([RUNNING])
    async with session_on(scripted) as session:
        asyncio.get_running_loop().call_later(1.0, hold_up, LATE)
        started = anyio.current_time()
        with pytest.raises(DeadlineExceededError, match="t1"):
            await session.generate("a cat", timeout=10.0)

        assert anyio.current_time() - started == pytest.approx(1.0 + LATE + 0.5, abs=0.1)


async def test_a_key_that_comes_late(scripted: ScriptedGateway) -> None:
    """A function that returns the key is asked once, though its time is over when the event loop runs again."""
    asked: list[float] = []

    async def key() -> str:
        asked.append(anyio.current_time())
        await anyio.sleep(1.0)
        return scripted.api_key

    async with FluxSession(key, base_url=scripted.url) as session:
        asyncio.get_running_loop().call_later(0.5, hold_up, LATE)
        await session.fetch("t1")

    assert len(asked) == 1


async def test_no_outage_is_reported_for_a_time_in_which_nothing_ran(
    scripted: ScriptedGateway, caplog: pytest.LogCaptureFixture
) -> None:
    """That nothing was answered while nothing ran is no reason to report that the service can't be reached."""
    scripted.polls = deque([reset, reset, RUNNING, COMPLETED])
    async with session_on(scripted) as session:
        task = await session.submit("a cat")
        while len(scripted.of("GET")) < 2:  # noqa: ASYNC110 - the server has no event for it
            await anyio.sleep(0.1)
        await anyio.sleep(0.1)
        hold_up(LATE)
        await task

    assert not [record for record in caplog.records if "no answer from" in record.getMessage()]
