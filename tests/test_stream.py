"""The stream: lazy in, in order of completion out, and nothing paid for is lost."""

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
    SessionClosedError,
)
from flux2max_async.emulator import Emulator


def limited(gateway: Emulator, places: int) -> FluxSession:
    return FluxSession(gateway.api_key, base_url=gateway.url, max_in_flight=places, schedule=FixedSchedule(1.0))


async def from_async(prompts: list[str]) -> AsyncIterator[str]:
    for prompt in prompts:
        await asyncio.sleep(0.5)
        yield prompt


@pytest.mark.parametrize(
    "source",
    [
        pytest.param(lambda prompts: prompts, id="list"),
        pytest.param(iter, id="iterator"),
        pytest.param(lambda prompts: (GenerationRequest(prompt) for prompt in prompts), id="generator"),
        pytest.param(from_async, id="async generator"),
    ],
)
async def test_every_request_has_one_outcome(session: FluxSession, gateway: Emulator, source: Any) -> None:
    """From any kind of source, each request is submitted once and has exactly one outcome."""
    prompts = [f"cat {n}" for n in range(60)]
    async with session.stream(source(prompts)) as stream:
        outcomes = [outcome async for outcome in stream]

        assert stream.unfinished == ()
    assert sorted(outcome.request.prompt for outcome in outcomes if outcome.request) == sorted(prompts)
    assert all(isinstance(outcome, Completed) for outcome in outcomes)
    assert set(gateway.accepted.values()) == {1}


async def test_outcomes_come_in_order_of_completion(scripted: ScriptedGateway) -> None:
    """What ends first comes first, whenever it was submitted."""
    delays = {"t1": 9.0, "t2": 3.0, "t3": 6.0}
    scripted.submits = deque(answer(200, {"id": task_id}) for task_id in delays)
    seconds = iter(delays.values())
    scripted.polls = deque(answer(200, completed(), after=next(seconds)) for _ in range(3))
    async with FluxSession(scripted.api_key, base_url=scripted.url, schedule=FixedSchedule(0.001)) as session:
        ends = [(outcome.elapsed, anyio.current_time()) async for outcome in session.stream("abc"[n] for n in range(3))]

    assert [round(elapsed) for elapsed, _ in ends] == [3, 6, 9]
    assert [round(moment - ends[0][1]) for _, moment in ends] == [0, 3, 6]


async def test_nothing_pulled_means_nothing_submitted(session: FluxSession, gateway: Emulator) -> None:
    """A stream that nobody iterates over has submitted nothing."""
    stream = session.stream(["a cat"])
    await anyio.sleep(10)
    await stream.aclose()

    assert not gateway.calls
    with pytest.raises(StopAsyncIteration):
        await anext(stream)


async def test_a_slow_consumer_holds_the_producer_back(gateway: Emulator) -> None:
    """An endless source is pulled at most max_in_flight ahead of what the consumer has taken."""
    pulled = 0

    def endless() -> Iterator[str]:
        nonlocal pulled
        for n in itertools.count():
            pulled += 1
            yield f"cat {n}"

    async with limited(gateway, 4) as session, session.stream(endless()) as stream:
        taken = 0
        most_ahead = 0
        async for _ in stream:
            taken += 1
            await anyio.sleep(30)
            most_ahead = max(most_ahead, pulled - taken)
            if taken == 10:
                break

    assert most_ahead == 4
    assert gateway.calls["submit"] == 14


async def test_failures_are_values(session: FluxSession, gateway: Emulator) -> None:
    """One failure in a hundred is one Failed among ninety-nine Completed; a request that can't be built is one, too."""
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


async def test_what_dooms_the_rest_stops_submitting() -> None:
    """When the balance runs out, what is paid for is delivered, then the error is raised, and the rest isn't tried."""
    async with Emulator(seconds=8.0, spread=0.0, balance=Decimal("0.42"), pictures=False) as poor:
        outcomes = []
        async with limited(poor, 3) as session:
            with pytest.raises(InsufficientBalanceError):
                async for outcome in session.stream(f"cat {n}" for n in range(50)):
                    outcomes.append(outcome)

        assert poor.calls["submit"] <= 6 + 3
    assert sum(outcome.ok for outcome in outcomes) == 6
    assert all(outcome.ok or isinstance(outcome.error, InsufficientBalanceError) for outcome in outcomes)
    assert len(outcomes) <= 9


async def test_a_doom_withdraws_what_waits_to_be_sent(scripted: ScriptedGateway) -> None:
    """Requests that wait their turn when the key is refused are not sent; each is delivered with the same error."""
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


async def test_a_request_that_waits_for_a_place_is_not_lost_to_a_doom(scripted: ScriptedGateway) -> None:
    """A request that was pulled and still waited for a place of another task is delivered with the doom."""
    scripted.submits = deque([answer(200, {"id": "t1"}), answer(401, b"", after=5.0)])
    scripted.polls = deque([answer(200, completed(), after=100.0)])
    outcomes = []
    async with session_on(scripted, max_in_flight=2) as session:
        await session.submit("somebody else's")
        with pytest.raises(AuthenticationError):
            async for outcome in session.stream(["cat 1", "cat 2", "cat 3"]):
                outcomes.append(outcome)

    assert [outcome.request and outcome.request.prompt for outcome in outcomes] == ["cat 1", "cat 2"]
    assert len(scripted.of("POST")) == 2


@pytest.mark.parametrize("asynchronous", [False, True])
async def test_an_error_of_the_source_comes_last(session: FluxSession, asynchronous: bool) -> None:
    """When the source raises, what is submitted is delivered first, then the source's own error is raised."""

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


async def test_leaving_early_stops_and_names_the_unfinished(gateway: Emulator) -> None:
    """Leaving the stream stops new submissions; the tasks already submitted are named, followed, and can be awaited."""
    async with limited(gateway, 5) as session:
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


async def test_leaving_early_waits_for_ids(scripted: ScriptedGateway) -> None:
    """A submit that is on the wire when the stream is left is among the unfinished, with its id."""
    scripted.submits = deque([answer(200, {"id": "t1"}), answer(200, {"id": "t2"}, after=3.0), hang])
    async with session_on(scripted, max_in_flight=3) as session:
        async with session.stream(f"cat {n}" for n in itertools.count()) as stream:
            async for _ in stream:
                break

        assert [task.id for task in stream.unfinished] == ["t2"]


async def test_dropping_the_stream_stops_it(gateway: Emulator) -> None:
    """Breaking out of a loop over a stream that nobody holds stops new submissions, without closing it."""
    async with limited(gateway, 2) as session:
        async for _ in session.stream(f"cat {n}" for n in itertools.count()):
            break
        gc.collect()
        await anyio.lowlevel.checkpoint()
        submitted = gateway.calls["submit"]
        await anyio.sleep(100)

        assert session.stats.completed == submitted
    assert gateway.calls["submit"] == submitted == 2


def test_a_stream_may_be_dropped_after_its_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream that outlives its event loop is dropped without a murmur."""
    with Emulator(seconds=0.05, spread=0.0, pictures=False) as gateway:
        kept: list[Any] = []

        async def main() -> None:
            session = FluxSession(gateway.api_key, base_url=gateway.url, schedule=FixedSchedule(0.05))
            await session.__aenter__()
            stream = session.stream(f"cat {n}" for n in itertools.count())
            await anext(stream)
            kept.append(stream)
            await session._transport.close()

        asyncio.run(main())
        complaints: list[Any] = []
        monkeypatch.setattr(sys, "unraisablehook", complaints.append)
        kept.clear()
        gc.collect()

    assert complaints == []


async def test_a_cancelled_wait_loses_no_outcome(session: FluxSession) -> None:
    """A consumer that gives up waiting and comes back gets every outcome."""
    stream = session.stream(f"cat {n}" for n in range(30))
    outcomes = []
    while True:
        with anyio.move_on_after(0.3):
            try:
                outcomes.append(await anext(stream))
            except StopAsyncIteration:
                break

    assert len(outcomes) == 30


async def test_two_consumers_share_a_stream(session: FluxSession) -> None:
    """Several consumers of one stream get each outcome once between them, and all come to its end."""
    stream = session.stream(f"cat {n}" for n in range(40))
    taken: list[list[str | None]] = [[], []]

    async def consume(mine: list[str | None]) -> None:
        async for outcome in stream:
            mine.append(outcome.task_id)
            await anyio.sleep(0.1)

    async with anyio.create_task_group() as group:
        for mine in taken:
            group.start_soon(consume, mine)

    assert len(set(taken[0] + taken[1])) == len(taken[0]) + len(taken[1]) == 40


async def test_closing_the_session_ends_the_stream(gateway: Emulator) -> None:
    """A stream whose session is closed delivers what there is, then says that the rest was not submitted."""
    outcomes = []
    session = limited(gateway, 2)
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


@pytest.mark.parametrize("single", ["a cat", GenerationRequest("a cat")], ids=["prompt", "request"])
async def test_a_single_request_is_no_stream(session: FluxSession, single: Any) -> None:
    """A string is never taken apart into a prompt per letter."""
    with pytest.raises(InvalidRequestError, match="list"):
        session.stream(single)


async def test_a_limit_of_three_places_costs_few_submits() -> None:
    """With 3 places on the server and 24 here, every task is done, none fails, with fewer than 4 POSTs per task."""
    async with Emulator(seconds=8.0, spread=0.3, seed=1, max_in_flight=3, pictures=False) as narrow:
        async with FluxSession(narrow.api_key, base_url=narrow.url) as session:
            outcomes = [outcome async for outcome in session.stream(f"cat {n}" for n in range(60))]

        assert narrow.calls["submit"] < 4 * 60
        assert narrow.calls["submit"] < 2.5 * 60
    assert len(outcomes) == 60
    assert all(outcome.ok for outcome in outcomes)


@pytest.mark.parametrize("requests", [2, 4, 50])
async def test_a_doom_is_raised_however_short_the_source(scripted: ScriptedGateway, requests: int) -> None:
    """A source that is exhausted when its key is refused still stops submitting, delivers all, and raises."""
    scripted.submits = deque([answer(429, b"", [("Retry-After", "5")])] * min(requests, 24) + [answer(401, b"")])
    outcomes = []
    async with session_on(scripted) as session:
        with pytest.raises(AuthenticationError):
            async for outcome in session.stream(f"cat {n}" for n in range(requests)):
                outcomes.append(outcome)

    assert len(scripted.of("POST")) == min(requests, 24) + 1
    assert len(outcomes) == min(requests, 24)
    assert {type(outcome.error) for outcome in outcomes if not outcome.ok} == {AuthenticationError}


@pytest.mark.parametrize("how", ["closed", "dropped"])
async def test_leaving_withdraws_what_waits_to_be_sent(scripted: ScriptedGateway, how: str) -> None:
    """Requests of a short source that wait out a 429 when the stream is left are never sent."""
    refused = answer(429, b"", [("Retry-After", "50")])
    scripted.submits = deque([answer(200, completed("t1")), *[refused] * 3, answer(200, {"id": "t2"})])
    async with session_on(scripted) as session:
        stream = session.stream(["cat 1", "cat 2", "cat 3", "cat 4"])
        await anext(stream)
        if how == "closed":
            await stream.aclose()
        del stream
        gc.collect()
        await anyio.sleep(200)

    assert len(scripted.of("POST")) == 4


class Uncommon(BaseException):
    """What `except Exception` doesn't see."""


async def test_an_uncommon_error_of_the_source_hurts_nobody_else(session: FluxSession) -> None:
    """Whatever a source raises comes out of its own stream, and the session's other tasks go on."""

    def source() -> Iterator[str]:
        yield "cat 1"
        raise Uncommon("oh")

    other = await session.submit("a dog")
    outcomes = []
    with pytest.raises(Uncommon):
        async for outcome in session.stream(source()):
            outcomes.append(outcome)

    assert [outcome.ok for outcome in outcomes] == [True]
    assert (await other).ok


async def test_a_source_that_is_cancelled_by_itself_is_no_closed_session(session: FluxSession) -> None:
    """A source that awaits something that was cancelled fails with words that say so."""

    async def source() -> AsyncIterator[str]:
        yield "cat 1"
        raise asyncio.CancelledError

    outcomes = []
    with pytest.raises(RuntimeError, match="source of the requests was cancelled"):
        async for outcome in session.stream(source()):
            outcomes.append(outcome)

    assert [outcome.ok for outcome in outcomes] == [True]


async def test_a_source_that_ends_the_program_ends_the_program(session: FluxSession) -> None:
    """SystemExit in a source comes out where the stream is consumed, after what is paid for."""

    def source() -> Iterator[str]:
        yield "cat 1"
        raise SystemExit(3)

    outcomes = []
    with pytest.raises(SystemExit):
        async for outcome in session.stream(source()):
            outcomes.append(outcome)

    assert [outcome.ok for outcome in outcomes] == [True]


async def test_a_stream_may_be_collected_in_another_thread(gateway: Emulator) -> None:
    """The garbage collector may run anywhere; the stream stops all the same, and nothing hangs."""
    async with limited(gateway, 2) as session:
        stream = session.stream(f"cat {n}" for n in itertools.count())
        await anext(stream)
        holder = [stream]
        del stream
        thread = threading.Thread(target=holder.clear)
        thread.start()
        thread.join()
        await anyio.sleep(100)

        assert session.stats.completed == gateway.calls["submit"] == 2


@pytest.mark.skipif(sys.version_info < (3, 12), reason="eager tasks came with Python 3.12")
async def test_eager_tasks_change_nothing(gateway: Emulator) -> None:
    """Where asyncio starts tasks eagerly, streams deliver what ends before anybody could look."""
    loop = asyncio.get_running_loop()
    loop.set_task_factory(asyncio.eager_task_factory)  # type: ignore[attr-defined,unused-ignore]
    async with limited(gateway, 3) as session:
        await session._transport.close()
        with pytest.raises(SessionClosedError):
            outcomes = [outcome async for outcome in session.stream(["cat 1", "cat 2"])]
    async with limited(gateway, 3) as session:
        outcomes = [outcome async for outcome in session.stream(f"cat {n}" for n in range(10))]
    loop.set_task_factory(None)

    assert len(outcomes) == 10


class Unwilling:
    """What can be iterated over in theory."""

    def __iter__(self) -> Iterator[str]:
        raise LookupError("not today")


async def test_a_source_that_refuses_to_begin_says_why(session: FluxSession) -> None:
    """The error of a source that can't be iterated over is its own, at once."""
    with pytest.raises(LookupError, match="not today"):
        session.stream(Unwilling())

    assert session.stats.submitted == 0


async def test_the_first_doom_is_the_one_that_is_raised(scripted: ScriptedGateway) -> None:
    """A key that is refused after the source has failed doesn't hide the source's error."""

    def source() -> Iterator[str]:
        yield "cat 1"
        raise LookupError("no more cats")

    scripted.polls = deque([answer(401, b"")])
    outcomes = []
    async with session_on(scripted) as session:
        with pytest.raises(LookupError):
            async for outcome in session.stream(source()):
                outcomes.append(outcome)

    assert [outcome.ok for outcome in outcomes] == [False]
