"""The stream: lazy submission, outcomes in order of completion, and no paid task lost."""

import asyncio
import gc
import itertools
import sys
import threading
from collections import deque
from collections.abc import AsyncIterator, Iterator
from decimal import Decimal
from typing import Any

import anyio
import anyio.lowlevel
import pytest
from support.scripted import ScriptedGateway, answer, completed, hang, session_on

from flux2max_async import (
    AuthenticationError,
    Completed,
    Failed,
    FixedSchedule,
    FluxSession,
    GenerationRequest,
    InsufficientBalanceError,
    InvalidRequestError,
    OutcomeStream,
    SessionClosedError,
)
from flux2max_async._tasks.intake import CallOptions
from flux2max_async.emulator import Emulator
from flux2max_async.journal._lookup import ReusePolicy


def session_with_slots(gateway: Emulator, slots: int) -> FluxSession:
    return FluxSession(gateway.api_key, base_url=gateway.url, max_in_flight=slots, schedule=FixedSchedule(1.0))


async def async_prompts(prompts: list[str]) -> AsyncIterator[str]:
    for prompt in prompts:
        await asyncio.sleep(0.5)
        yield prompt


@pytest.mark.parametrize(
    "source",
    [
        pytest.param(lambda prompts: prompts, id="list"),
        pytest.param(iter, id="iterator"),
        pytest.param(lambda prompts: (GenerationRequest(prompt) for prompt in prompts), id="generator"),
        pytest.param(async_prompts, id="async generator"),
    ],
)
async def test_one_outcome_per_request(session: FluxSession, gateway: Emulator, source: Any) -> None:
    """From any kind of source, each request is submitted once and has exactly one outcome."""
    prompts = [f"cat {n}" for n in range(60)]
    async with session.stream(source(prompts)) as stream:
        outcomes = [outcome async for outcome in stream]

        assert stream.unfinished == ()
    assert sorted(outcome.request.prompt for outcome in outcomes if outcome.request) == sorted(prompts)
    assert all(isinstance(outcome, Completed) for outcome in outcomes)
    assert set(gateway.accepted.values()) == {1}


async def test_order_of_completion(scripted: ScriptedGateway) -> None:
    """Outcomes arrive in the order in which the tasks end."""
    delays = {"t1": 9.0, "t2": 3.0, "t3": 6.0}
    scripted.submits = deque(answer(200, {"id": task_id}) for task_id in delays)
    delay_iterator = iter(delays.values())
    scripted.polls = deque(answer(200, completed(), after=next(delay_iterator)) for _ in range(3))
    async with FluxSession(scripted.api_key, base_url=scripted.url, schedule=FixedSchedule(0.001)) as session:
        ends = [(outcome.elapsed, anyio.current_time()) async for outcome in session.stream("abc"[n] for n in range(3))]

    assert [round(elapsed) for elapsed, _ in ends] == [3, 6, 9]
    assert [round(time - ends[0][1]) for _, time in ends] == [0, 3, 6]


async def test_stream_that_is_not_iterated(session: FluxSession, gateway: Emulator) -> None:
    """A stream that is never iterated submits nothing."""
    stream = session.stream(["a cat"])
    await anyio.sleep(10)
    await stream.aclose()

    assert not gateway.calls
    with pytest.raises(StopAsyncIteration):
        await anext(stream)


async def test_slow_consumer(gateway: Emulator) -> None:
    """An endless source is read at most max_in_flight requests ahead of the consumer."""
    pulled = 0

    def endless_source() -> Iterator[str]:
        nonlocal pulled
        for n in itertools.count():
            pulled += 1
            yield f"cat {n}"

    async with session_with_slots(gateway, 4) as session, session.stream(endless_source()) as stream:
        received = 0
        max_ahead = 0
        async for _ in stream:
            received += 1
            await anyio.sleep(30)
            max_ahead = max(max_ahead, pulled - received)
            if received == 10:
                break

    assert max_ahead == 4
    assert gateway.calls["submit"] == 14


async def test_failures_are_outcomes(session: FluxSession, gateway: Emulator) -> None:
    """Failed tasks and invalid requests are Failed outcomes among the Completed ones."""
    requests: list[Any] = [f"cat {n}" for n in range(97)] + ["dog [fail]", "bird [moderate]", ""]
    outcomes = [outcome async for outcome in session.stream(requests)]
    failed = [outcome for outcome in outcomes if isinstance(outcome, Failed)]

    assert len(outcomes) == 100
    assert sorted(type(outcome.error).__name__ for outcome in failed) == [
        "ContentModeratedError",
        "InvalidRequestError",
        "TaskFailedError",
    ]
    assert sum(gateway.accepted.values()) == 99


async def test_insufficient_balance() -> None:
    """When the balance runs out, paid tasks are delivered, no more are submitted, and the error is raised."""
    async with Emulator(seconds=8.0, spread=0.0, balance=Decimal("0.42"), pictures=False) as gateway:
        outcomes = []
        async with session_with_slots(gateway, 3) as session:
            with pytest.raises(InsufficientBalanceError):
                async for outcome in session.stream(f"cat {n}" for n in range(50)):
                    outcomes.append(outcome)

        assert gateway.calls["submit"] <= 6 + 3
    assert sum(outcome.ok for outcome in outcomes) == 6
    assert all(outcome.ok or isinstance(outcome.error, InsufficientBalanceError) for outcome in outcomes)
    assert len(outcomes) <= 9


async def test_fatal_error_cancels_waiting_submits(scripted: ScriptedGateway) -> None:
    """After a fatal error, requests that wait to be sent are not sent, and fail with the same error."""
    scripted.submits = deque(
        [answer(429, b"", [("Retry-After", "5")])] * 4 + [answer(200, {"id": "t1"}), answer(401, {"message": "no"})]
    )
    scripted.polls = deque([answer(200, completed(), after=20.0)])
    outcomes = []
    async with session_on(scripted, max_in_flight=4) as session:
        with pytest.raises(AuthenticationError):
            async for outcome in session.stream(f"cat {n}" for n in range(50)):
                outcomes.append(outcome)

    assert len(scripted.of("POST")) == 6
    assert [outcome.ok for outcome in outcomes].count(True) == 1
    assert len(outcomes) in {4, 5}
    assert {type(outcome.error) for outcome in outcomes if not outcome.ok} == {AuthenticationError}


async def test_fatal_error_while_waiting_for_a_slot(scripted: ScriptedGateway) -> None:
    """A request that waits for a slot during a fatal error is delivered with that error."""
    scripted.submits = deque([answer(200, {"id": "t1"}), answer(401, {"message": "no"}, after=5.0)])
    scripted.polls = deque([answer(200, completed(), after=100.0)])
    outcomes = []
    async with session_on(scripted, max_in_flight=2) as session:
        await session.submit("another request")
        with pytest.raises(AuthenticationError):
            async for outcome in session.stream(["cat 1", "cat 2", "cat 3"]):
                outcomes.append(outcome)

    assert [outcome.request and outcome.request.prompt for outcome in outcomes] == ["cat 1", "cat 2"]
    assert len(scripted.of("POST")) == 2


@pytest.mark.parametrize("asynchronous", [False, True])
async def test_source_raises(session: FluxSession, asynchronous: bool) -> None:
    """If the source raises, submitted tasks are delivered first, then the source's error is raised."""

    def source() -> Iterator[str]:
        yield "cat 1"
        yield "cat 2"
        raise LookupError("no more cats")

    async def async_source() -> AsyncIterator[str]:
        for prompt in source():
            yield prompt

    outcomes = []
    with pytest.raises(LookupError, match="no more cats"):
        async for outcome in session.stream(async_source() if asynchronous else source()):
            outcomes.append(outcome)

    assert [outcome.ok for outcome in outcomes] == [True, True]


async def test_closing_early(gateway: Emulator) -> None:
    """Closing the stream stops new submits; submitted tasks are in `unfinished` and can be awaited."""
    async with session_with_slots(gateway, 5) as session:
        async with session.stream(f"cat {n}" for n in itertools.count()) as stream:
            async for _ in stream:
                break
        submitted = gateway.calls["submit"]
        unfinished = stream.unfinished
        outcomes = await asyncio.gather(*(task.outcome() for task in unfinished))
        with pytest.raises(StopAsyncIteration):
            await anext(stream)

        assert session.stats.completed == submitted
    assert len(unfinished) == submitted - 1
    assert all(outcome.ok for outcome in outcomes)
    assert gateway.calls["submit"] == submitted


async def test_closing_early_waits_for_submits(scripted: ScriptedGateway) -> None:
    """A submit in flight when the stream is closed is in `unfinished` with its id."""
    scripted.submits = deque([answer(200, {"id": "t1"}), answer(200, {"id": "t2"}, after=3.0), hang])
    async with session_on(scripted, max_in_flight=3) as session:
        async with session.stream(f"cat {n}" for n in itertools.count()) as stream:
            async for _ in stream:
                break

        assert [task.id for task in stream.unfinished] == ["t2"]


async def test_dropped_stream(gateway: Emulator) -> None:
    """A stream that is garbage-collected stops submitting."""
    async with session_with_slots(gateway, 2) as session:
        async for _ in session.stream(f"cat {n}" for n in itertools.count()):
            break
        gc.collect()
        await anyio.lowlevel.checkpoint()
        submitted = gateway.calls["submit"]
        await anyio.sleep(100)

        assert session.stats.completed == submitted
    assert gateway.calls["submit"] == submitted == 2


def test_stream_dropped_after_its_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream that outlives its event loop is garbage-collected without an error."""
    with Emulator(seconds=0.05, spread=0.0, pictures=False) as gateway:
        streams: list[Any] = []

        async def main() -> None:
            session = FluxSession(gateway.api_key, base_url=gateway.url, schedule=FixedSchedule(0.05))
            await session.__aenter__()
            stream = session.stream(f"cat {n}" for n in itertools.count())
            await anext(stream)
            streams.append(stream)
            await session._parts.transport.close()

        asyncio.run(main())
        unraisable: list[Any] = []
        monkeypatch.setattr(sys, "unraisablehook", unraisable.append)
        streams.clear()
        gc.collect()

    assert unraisable == []


async def test_cancelled_wait(session: FluxSession) -> None:
    """A consumer that cancels its waits gets every outcome."""
    stream = session.stream(f"cat {n}" for n in range(30))
    outcomes = []
    while True:
        with anyio.move_on_after(0.3):
            try:
                outcomes.append(await anext(stream))
            except StopAsyncIteration:
                break

    assert len(outcomes) == 30


async def test_two_consumers(session: FluxSession) -> None:
    """Several consumers of a stream get each outcome once between them, and all reach its end."""
    stream = session.stream(f"cat {n}" for n in range(40))
    received: list[list[str | None]] = [[], []]

    async def consume(own: list[str | None]) -> None:
        async for outcome in stream:
            own.append(outcome.task_id)
            await anyio.sleep(0.1)

    async with anyio.create_task_group() as group:
        for own in received:
            group.start_soon(consume, own)

    assert len(set(received[0] + received[1])) == len(received[0]) + len(received[1]) == 40


async def test_session_is_closed(gateway: Emulator) -> None:
    """A stream whose session is closed delivers the outcomes that exist and raises SessionClosedError."""
    outcomes = []
    session = session_with_slots(gateway, 2)
    await session.__aenter__()
    stream = session.stream(f"cat {n}" for n in itertools.count())

    async def consume() -> None:
        async for outcome in stream:
            outcomes.append(outcome)

    consumer = asyncio.ensure_future(consume())
    await anyio.sleep(12)
    await session.aclose()
    with pytest.raises(SessionClosedError):
        await consumer

    assert [outcome.ok for outcome in outcomes][:2] == [True, True]
    assert all(not outcome.ok for outcome in outcomes[2:])
    assert sum(outcome.task_id is not None for outcome in outcomes) == gateway.calls["submit"]


@pytest.mark.parametrize("request_", ["a cat", GenerationRequest("a cat")], ids=["prompt", "request"])
async def test_single_request_is_refused(session: FluxSession, request_: Any) -> None:
    """A string or a request is refused, rather than iterated over."""
    with pytest.raises(InvalidRequestError, match="list"):
        session.stream(request_)


async def test_server_limit_of_three() -> None:
    """With 3 slots on the server and 24 here, no task fails, with fewer than 4 POSTs per task."""
    async with Emulator(seconds=8.0, spread=0.3, seed=1, max_in_flight=3, pictures=False) as gateway:
        async with FluxSession(gateway.api_key, base_url=gateway.url) as session:
            outcomes = [outcome async for outcome in session.stream(f"cat {n}" for n in range(60))]

        assert gateway.calls["submit"] < 4 * 60
        assert gateway.calls["submit"] < 2.5 * 60
    assert len(outcomes) == 60
    assert all(outcome.ok for outcome in outcomes)


@pytest.mark.parametrize("requests", [2, 4, 50])
async def test_fatal_error_with_an_exhausted_source(scripted: ScriptedGateway, requests: int) -> None:
    """After a fatal error with the source exhausted, submitting stops, all is delivered, and the error is raised."""
    refusals = [answer(429, b"", [("Retry-After", "5")])] * min(requests, 24)
    scripted.submits = deque([*refusals, answer(401, {"message": "no"})])
    outcomes = []
    async with session_on(scripted) as session:
        with pytest.raises(AuthenticationError):
            async for outcome in session.stream(f"cat {n}" for n in range(requests)):
                outcomes.append(outcome)

    assert len(scripted.of("POST")) == min(requests, 24) + 1
    assert len(outcomes) == min(requests, 24)
    assert {type(outcome.error) for outcome in outcomes if not outcome.ok} == {AuthenticationError}


@pytest.mark.parametrize("end", ["closed", "dropped"])
async def test_closing_cancels_waiting_submits(scripted: ScriptedGateway, end: str) -> None:
    """Requests that wait out a 429 when the stream is closed are never sent."""
    refused = answer(429, b"", [("Retry-After", "50")])
    scripted.submits = deque([answer(200, completed("t1")), *[refused] * 3, answer(200, {"id": "t2"})])
    async with session_on(scripted) as session:
        stream = session.stream(["cat 1", "cat 2", "cat 3", "cat 4"])
        await anext(stream)
        if end == "closed":
            await stream.aclose()
        del stream
        gc.collect()
        await anyio.sleep(200)

    assert len(scripted.of("POST")) == 4


class CustomBaseException(BaseException):
    """An exception that `except Exception` doesn't catch."""


async def test_base_exception_of_the_source(session: FluxSession) -> None:
    """A BaseException of the source is raised by its stream, and other tasks continue."""

    def source() -> Iterator[str]:
        yield "cat 1"
        raise CustomBaseException("error")

    other = await session.submit("a dog")
    outcomes = []
    with pytest.raises(CustomBaseException):
        async for outcome in session.stream(source()):
            outcomes.append(outcome)

    assert [outcome.ok for outcome in outcomes] == [True]
    assert (await other).ok


async def test_source_raises_cancelled_error(session: FluxSession) -> None:
    """A source that raises CancelledError on its own is a RuntimeError that says so."""

    async def source() -> AsyncIterator[str]:
        yield "cat 1"
        raise asyncio.CancelledError

    outcomes = []
    with pytest.raises(RuntimeError, match="source of the requests was cancelled"):
        async for outcome in session.stream(source()):
            outcomes.append(outcome)

    assert [outcome.ok for outcome in outcomes] == [True]


async def test_source_raises_system_exit(session: FluxSession) -> None:
    """SystemExit of the source is raised to the consumer, after the paid tasks are delivered."""

    def source() -> Iterator[str]:
        yield "cat 1"
        raise SystemExit(3)

    outcomes = []
    with pytest.raises(SystemExit):
        async for outcome in session.stream(source()):
            outcomes.append(outcome)

    assert [outcome.ok for outcome in outcomes] == [True]


async def test_stream_collected_in_another_thread(gateway: Emulator) -> None:
    """A stream that is garbage-collected in another thread stops, and nothing hangs."""
    async with session_with_slots(gateway, 2) as session:
        stream = session.stream(f"cat {n}" for n in itertools.count())
        await anext(stream)
        holder = [stream]
        del stream
        thread = threading.Thread(target=holder.clear)
        thread.start()
        thread.join()
        await anyio.sleep(100)

        assert session.stats.completed == gateway.calls["submit"] == 2


@pytest.mark.skipif(sys.version_info < (3, 12), reason="eager tasks require Python 3.12")
async def test_eager_tasks(gateway: Emulator) -> None:
    """Streams work with eager asyncio tasks."""
    loop = asyncio.get_running_loop()
    loop.set_task_factory(asyncio.eager_task_factory)  # type: ignore[attr-defined,unused-ignore]
    async with session_with_slots(gateway, 3) as session:
        await session._parts.transport.close()
        with pytest.raises(SessionClosedError):
            outcomes = [outcome async for outcome in session.stream(["cat 1", "cat 2"])]
    async with session_with_slots(gateway, 3) as session:
        outcomes = [outcome async for outcome in session.stream(f"cat {n}" for n in range(10))]
    loop.set_task_factory(None)

    assert len(outcomes) == 10


class NotIterable:
    """An iterable whose iteration can't be started."""

    def __iter__(self) -> Iterator[str]:
        raise LookupError("not iterable")


async def test_source_that_cannot_be_iterated(session: FluxSession) -> None:
    """The error of a source that can't be iterated over is raised at once."""
    with pytest.raises(LookupError, match="not iterable"):
        session.stream(NotIterable())

    assert session.stats.submitted == 0


async def test_first_error_is_raised(scripted: ScriptedGateway) -> None:
    """A fatal error after an error of the source doesn't replace that error."""

    def source() -> Iterator[str]:
        yield "cat 1"
        raise LookupError("no more cats")

    scripted.polls = deque([answer(401, {"message": "no"})])
    outcomes = []
    async with session_on(scripted) as session:
        with pytest.raises(LookupError):
            async for outcome in session.stream(source()):
                outcomes.append(outcome)

    assert [type(outcome.error) for outcome in outcomes if isinstance(outcome, Failed)] == [AuthenticationError]
    assert len(outcomes) == 1


class BrokenSaver:
    """A saver with a defect."""

    async def prepare(self) -> None:
        pass

    async def save(self, outcome: Completed, record: object) -> Completed:
        raise ZeroDivisionError("a defect")


async def test_unexpected_error_while_saving_is_delivered(session: FluxSession) -> None:
    """A defect in saving becomes the outcome's save_error; the outcome isn't lost."""
    supervisor = session._supervisor
    assert supervisor is not None
    stream = OutcomeStream(
        ["a cat"],
        start=lambda request: supervisor.intake.start_item(request, CallOptions(0, ReusePolicy())),
        spawn=supervisor.spawn,
        look_ahead=1,
        priority=0,
        saver=BrokenSaver(),  # type: ignore[arg-type]
        check_caller=supervisor.check_caller,
        shutdown=supervisor.shutdown,
    )
    (outcome,) = [outcome async for outcome in stream]

    assert isinstance(outcome, Completed)
    assert "a defect" in str(outcome.save_error)
    assert isinstance(outcome.save_error and outcome.save_error.__cause__, ZeroDivisionError)
