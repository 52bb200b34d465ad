"""Draining a session before it is closed: nothing more is submitted, and what is submitted is followed."""

import asyncio
import os
import threading
from collections import deque
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import anyio
import pytest
from support.scripted import ScriptedGateway, answer, completed, hang, running, session_on
from support.virtual_time import VirtualJournal
from support.webhooks import InboxServer, deliver
from support.webhooks import session_on as session_with_inbox

from flux2max_async import Completed, Failed, FixedSchedule, FluxSession, GenerationRequest, SessionClosedError
from flux2max_async._models.results import Outcome
from flux2max_async._tasks.intake import CallOptions
from flux2max_async.emulator import Emulator
from flux2max_async.journal._lookup import ReusePolicy

MESSAGE = "the service is shutting down"


def opened(scripted: ScriptedGateway, folder: Path, **options: Any) -> FluxSession:
    return session_on(scripted, journal=VirtualJournal(folder / "run.db"), **options)


async def settle(condition: Callable[[], bool] = lambda: False) -> None:
    """Let what is ready run, without moving the clock far; stop when the condition holds."""
    for _ in range(200):
        if condition():
            return
        await anyio.sleep(0.0001)


async def error_of(work: Awaitable[object]) -> BaseException | None:
    """Return how something ends that ends at once."""
    started = anyio.current_time()
    (result,) = await asyncio.gather(work, return_exceptions=True)
    assert anyio.current_time() - started < 0.1
    return result if isinstance(result, BaseException) else None


# ---------------------------------------------------------------------- what ends, and what goes on


async def test_waiting_requests_end_and_submitted_ones_go_on(gateway: Emulator) -> None:
    """Requests without a slot end at once, new ones too; tasks are followed without a limit of time, until closing."""
    async with FluxSession(
        gateway.api_key, base_url=gateway.url, max_in_flight=2, schedule=FixedSchedule(1.0)
    ) as session:
        running = [asyncio.ensure_future(session.generate(f"running {number}")) for number in range(2)]
        await settle(lambda: gateway.accepted.total() == 2)
        queued: list[asyncio.Future[Any]] = []
        for number in range(3):
            queued += map(asyncio.ensure_future, (session.generate(f"queued {number}"), session.submit("queued")))
        await settle(lambda: session.stats.waiting == 6)
        session.begin_drain()
        session.begin_drain()
        errors = [await error_of(call) for call in queued]
        refused = [await error_of(work) for work in (session.generate("new"), session.submit("new"))]
        done = await asyncio.gather(*running)
        stats, health = session.stats, session.health()

    assert {(type(error), str(error)) for error in (*errors, *refused)} == {(SessionClosedError, MESSAGE)}
    assert len({id(error) for error in errors}) == 6
    assert [outcome.ok for outcome in done] == [True, True]
    assert gateway.accepted == {"running 0": 1, "running 1": 1}
    assert (stats.waiting, stats.in_flight, stats.completed) == (0, 0, 2)
    assert (health.state, health.ok) == ("draining", False)


async def test_closing_sets_the_limit(gateway: Emulator) -> None:
    """A drain has no end of its own; `aclose()` ends it as any other, in so many seconds from then."""
    async with FluxSession(gateway.api_key, base_url=gateway.url, schedule=FixedSchedule(100.0)) as session:
        slow = await session.submit("a cat")
        session.begin_drain()
        await anyio.sleep(1.0)
        started = anyio.current_time()
        await session.aclose(drain=3.0)
        elapsed = anyio.current_time() - started
        outcome = await slow.outcome()

    assert elapsed == pytest.approx(3.0, abs=0.1)
    assert isinstance(outcome, Failed)
    assert outcome.polls == 1
    assert "attach() it later" in str(outcome.error)


async def test_a_session_that_is_not_open(gateway: Emulator) -> None:
    """Before a session is entered and after it is closed there is nothing to drain; entered again, it is open."""
    session = FluxSession(gateway.api_key, base_url=gateway.url, schedule=FixedSchedule(1.0))
    session.begin_drain()
    async with session:
        session.begin_drain()
        refused = await error_of(session.generate("a cat"))
    session.begin_drain()
    async with session:
        done = await session.generate("a dog")

    assert str(refused) == MESSAGE
    assert done.ok


@pytest.mark.parametrize("seconds", [0.0, 20.0])
async def test_a_closed_session_is_closed(scripted: ScriptedGateway, seconds: float) -> None:
    """A session that was drained and then closed says that it is closed, with and without a journal."""
    async with session_on(scripted) as session:
        supervisor = session._supervisor
        assert supervisor is not None
        session.begin_drain()
        await session.aclose(drain=seconds)
        errors = [
            await error_of(session.generate("a cat")),
            await error_of(supervisor.intake.start_item(GenerationRequest("a cat"), CallOptions(0, ReusePolicy()))),
        ]

    assert [str(error).partition(":")[0] for error in errors] == ["the session is closed"] * 2


@pytest.mark.parametrize(
    ("submit", "accepted"),
    [
        pytest.param(answer(200, running(), after=2.0), True, id="on the wire, then accepted"),
        pytest.param(answer(429, {}, after=2.0), False, id="on the wire, then refused for now"),
        pytest.param(answer(503, {}), False, id="between two attempts"),
    ],
)
async def test_requests_at_their_submit(scripted: ScriptedGateway, submit: Any, accepted: bool) -> None:
    """A submit on the wire is finished, and its task followed; it is not sent again."""
    scripted.submits = deque([submit, answer(200, running("again"))])
    scripted.polls = deque([answer(200, running())] * 3 + [answer(200, completed())])
    async with session_on(scripted) as session:
        call = asyncio.ensure_future(session.generate("a cat"))
        await settle(lambda: bool(scripted.received))
        await anyio.sleep(0.1)
        session.begin_drain()
        (result,) = await asyncio.gather(call, return_exceptions=True)

    assert len(scripted.of("POST")) == 1
    assert isinstance(result, Completed) if accepted else str(result) == MESSAGE


async def test_a_slot_that_comes_in_the_same_moment(scripted: ScriptedGateway) -> None:
    """A request that gets its slot after the drain has begun, and before it is told, isn't submitted."""
    scripted.polls = deque([hang])
    async with session_on(scripted, max_in_flight=1) as session:
        await session.submit("a cat")
        queued = asyncio.ensure_future(session.generate("a dog"))
        await settle(lambda: session.stats.waiting == 1)
        supervisor = session._supervisor
        assert supervisor is not None
        supervisor.slots.release()
        session.begin_drain()
        error = await error_of(queued)

    assert str(error) == MESSAGE
    assert len(scripted.of("POST")) == 1


async def test_a_stream(gateway: Emulator) -> None:
    """A stream delivers what is submitted; what it has pulled ahead fails with the error, which it then raises."""
    outcomes: list[Outcome] = []

    async def consume(session: FluxSession) -> None:
        async for outcome in session.stream(f"picture {number}" for number in range(100)):
            outcomes.append(outcome)

    async with FluxSession(
        gateway.api_key, base_url=gateway.url, schedule=FixedSchedule(1.0), max_in_flight=3
    ) as session:
        others = [await session.submit("another") for _ in range(2)]
        consumer = asyncio.ensure_future(consume(session))
        await settle(lambda: gateway.accepted.total() == 3)
        session.begin_drain()
        with pytest.raises(SessionClosedError, match=MESSAGE):
            await consumer
        later = [outcome async for outcome in _until_error(session.stream(["new"]))]
        ends = [(await other.outcome()).ok for other in others]

    assert sorted(str(outcome.error) if isinstance(outcome, Failed) else "" for outcome in outcomes) == [
        "",
        MESSAGE,
        MESSAGE,
    ]
    assert [str(outcome.error) for outcome in later if isinstance(outcome, Failed)] == [MESSAGE]
    assert ends == [True, True]
    assert gateway.accepted == {"another": 2, "picture 0": 1}


async def _until_error(stream: Any) -> Any:
    with pytest.raises(SessionClosedError, match=MESSAGE):
        async for outcome in stream:
            yield outcome


async def test_tasks_are_attached_and_images_read(scripted: ScriptedGateway) -> None:
    """What costs nothing goes on: attaching to a task, polling it once, and reading an image."""
    scripted.downloads = deque([answer(200, b"\x89PNG\r\n\x1a\n" + bytes(64))])
    scripted.polls = deque([answer(200, completed(url=f"{scripted.url}/t1.png"))])
    async with session_on(scripted) as session:
        session.begin_drain()
        done = await session.attach("t1")
        snapshot = await session.fetch("t1")

    assert done.ok
    assert snapshot.images


# ---------------------------------------------------------------------- with a journal


async def test_a_request_whose_task_is_running_shares_it(scripted: ScriptedGateway, tmp_path: Path) -> None:
    """A request with the key of a running task gets that task's outcome, while it is submitted or polled."""
    scripted.submits = deque([answer(200, running("t1"), after=2.0)])
    scripted.polls = deque([answer(200, running("t1"))] * 3 + [answer(200, completed("t1"))])
    async with opened(scripted, tmp_path) as session:
        calls = [asyncio.ensure_future(session.generate("a cat", key="cat"))]
        await settle(lambda: bool(scripted.received))
        session.begin_drain()
        calls += [asyncio.ensure_future(session.generate("a cat", key="cat"))]
        await anyio.sleep(3.0)
        calls += [asyncio.ensure_future(session.generate("a cat", key="cat", resubmit_uncertain=True))]
        done = await asyncio.gather(*calls)

    assert [outcome.task_id for outcome in done] == ["t1"] * 3
    assert len(scripted.of("POST")) == 1


async def test_a_cancelled_submit_is_not_taken_back(scripted: ScriptedGateway, tmp_path: Path) -> None:
    """A request that shares a submit which nobody waited for any more doesn't have it sent again."""
    scripted.submits = deque([answer(429, {}, after=2.0), answer(200, running())])
    async with opened(scripted, tmp_path) as session:
        left = asyncio.ensure_future(session.generate("a cat", key="cat"))
        await settle(lambda: bool(scripted.received))
        left.cancel()
        await settle(left.done)
        session.begin_drain()
        (result,) = await asyncio.gather(session.generate("a cat", key="cat"), return_exceptions=True)

    assert isinstance(result, SessionClosedError)
    assert len(scripted.of("POST")) == 1


@pytest.mark.parametrize("begins", ["before", "meanwhile"])
async def test_what_the_journal_knows(scripted: ScriptedGateway, tmp_path: Path, begins: str) -> None:
    """Recorded outcomes are replayed and tasks without an owner resumed, whether they were asked for before or not."""
    async with opened(scripted, tmp_path) as session:
        await session.generate("a cat", key="cat")
        scripted.submits = deque([answer(200, running("t2"))])
        scripted.polls = deque([answer(200, running("t2"))])
        await session.submit("a dog", key="dog")
    scripted.polls = deque([answer(200, completed("t2"))])
    async with opened(scripted, tmp_path) as session:
        if begins == "before":
            session.begin_drain()
        calls = [asyncio.ensure_future(session.generate(f"a {key}", key=key)) for key in ("cat", "dog", "fox")]
        if begins == "meanwhile":
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            session.begin_drain()
        results = await asyncio.gather(*calls, return_exceptions=True)
        stats = session.stats

    assert [result.task_id if isinstance(result, Completed) else str(result) for result in results] == [
        "t1",
        "t2",
        MESSAGE,
    ]
    assert (stats.submitted, stats.replayed, stats.waiting) == (0, 1, 0)


@pytest.mark.parametrize("asked", ["before", "while draining"])
async def test_what_another_process_follows(scripted: ScriptedGateway, tmp_path: Path, asked: str) -> None:
    """A request waits for the task of another process, but not for that process to get a slot."""
    scripted.polls = deque([answer(200, running("t1"))] * 3 + [answer(200, completed("t1"))])
    async with opened(scripted, tmp_path) as other:
        task = await other.submit("a cat", key="cat")
        scripted.submits = deque([hang])
        submitting = asyncio.ensure_future(other.submit("a dog", key="dog"))
        await settle(lambda: len(scripted.of("POST")) == 2)
        async with opened(scripted, tmp_path) as session:
            if asked == "while draining":
                session.begin_drain()
            calls = [asyncio.ensure_future(session.generate(f"a {key}", key=key)) for key in ("cat", "dog")]
            await settle()
            if asked == "before":
                session.begin_drain()
            error = await error_of(calls[1])
            done = await calls[0]
        outcome = await task.outcome()
        submitting.cancel()

    assert str(error) == MESSAGE
    assert outcome.ok
    assert done.task_id == "t1"
    assert len(scripted.of("POST")) == 2


async def test_a_session_that_is_closed_while_a_key_is_computed(scripted: ScriptedGateway, tmp_path: Path) -> None:
    """A request whose session is closed before it is looked up in the journal says that the session is closed."""
    async with opened(scripted, tmp_path) as session:
        supervisor = session._supervisor
        assert supervisor is not None
        call = asyncio.ensure_future(session.generate("a cat"))
        await asyncio.sleep(0)
        supervisor.close_now()
        error = await error_of(call)

    assert str(error).startswith("the session is closed")


async def test_a_budget_without_a_journal(scripted: ScriptedGateway) -> None:
    """With a budget alone there is nothing to share: new requests are refused."""
    async with session_on(scripted, budget="1.00") as session:
        session.begin_drain()
        error = await error_of(session.generate("a cat", key="cat"))

    assert str(error) == MESSAGE


# ---------------------------------------------------------------------- webhooks


@pytest.mark.parametrize("drains", [True, False])
async def test_polls_while_no_webhooks_come(scripted: ScriptedGateway, inbox_server: InboxServer, drains: bool) -> None:
    """A task that expected a webhook is polled as one without, as soon as the drain begins."""
    async with session_with_inbox(scripted, inbox_server.inbox, schedule=FixedSchedule(1.0)) as session:
        for number in range(10):
            scripted.submits = deque([answer(200, running(f"warm{number}"))])
            warm = await session.submit("a cat")
            await deliver(inbox_server.inbox, completed(f"warm{number}"))
            await warm
        scripted.submits = deque([answer(200, running("t1"))])
        scripted.polls = deque([answer(200, running("t1"))])
        task = await session.submit("a dog")
        if drains:
            session.begin_drain()
        await anyio.sleep(4.5)
        count = len(scripted.of("GET"))
        await deliver(inbox_server.inbox, completed("t1"))  # one that comes all the same is welcome
        done = await task

    assert done.ok
    assert (count == 4) is drains


# ---------------------------------------------------------------------- from anywhere


async def test_from_another_thread(gateway: Emulator) -> None:
    """Another thread may begin the drain: a handler that the framework runs in one, for example."""
    async with FluxSession(
        gateway.api_key, base_url=gateway.url, max_in_flight=1, schedule=FixedSchedule(1.0)
    ) as session:
        task = await session.submit("a cat")
        queued = asyncio.ensure_future(session.generate("a dog"))
        await settle(lambda: session.stats.waiting == 1)
        thread = threading.Thread(target=session.begin_drain)
        thread.start()
        thread.join()
        error = await error_of(queued)
        done = await task

    assert str(error) == MESSAGE
    assert done.ok


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform can't fork")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
async def test_in_a_forked_process(gateway: Emulator) -> None:
    """A forked process, which inherits the handlers of signals, changes nothing, not even its own copy."""
    async with FluxSession(gateway.api_key, base_url=gateway.url) as session:
        supervisor = session._supervisor
        assert supervisor is not None
        if (pid := os.fork()) == 0:
            session.begin_drain()
            os._exit(int(supervisor.shutdown.draining))
        _, status = os.waitpid(pid, 0)  # noqa: ASYNC222 - it ends at once

    assert os.waitstatus_to_exitcode(status) == 0


def test_after_the_event_loop_has_ended(gateway_url: tuple[str, str]) -> None:
    """A session whose event loop has ended without closing it can be drained, without effect."""
    key, url = gateway_url
    session = FluxSession(key, base_url=url)

    async def main() -> None:
        await session.__aenter__()
        await session._parts.transport.close()

    asyncio.run(main())
    session.begin_drain()

    assert session._supervisor is not None
    assert session._supervisor.shutdown.draining


@pytest.fixture
def gateway_url() -> tuple[str, str]:
    """Return a key and an address at which nothing listens."""
    return "sk-test", "http://127.0.0.1:9"
