"""Sessions that are closed while tasks run: draining, unfinished tasks and deliveries."""

import asyncio
import math
from collections import deque
from pathlib import Path
from typing import Any

import anyio
import pytest
from support.scripted import ScriptedGateway, answer, completed, running
from support.virtual_time import VirtualJournal
from support.webhooks import RARE_POLLS, InboxServer, deliver, session_on

from flux2max_async import (
    ConfigurationError,
    Failed,
    FixedSchedule,
    FluxSession,
    SessionClosedError,
)
from flux2max_async.emulator import Emulator
from flux2max_async.journal import EntryState, JournalEntry


async def test_draining_finishes_submitted_tasks(
    gateway: Emulator, inbox_server: InboxServer, caplog: pytest.LogCaptureFixture
) -> None:
    """Draining refuses new submits, and waits until submitted tasks have ended and their images are saved."""
    session = session_on(gateway, inbox_server.inbox, schedule=FixedSchedule(1.0), drain=20.0)
    async with session:
        task = await session.submit("a cat")
        await anyio.sleep(1.0)
        inbox_server.open = False  # a server that shuts down stops listening before its session closes
        closing = asyncio.ensure_future(session.aclose())
        await anyio.sleep(0.1)
        with pytest.raises(SessionClosedError):
            await session.submit("a dog")
        done = await task
        refreshed = await session.fetch(done.task_id)
        await closing

    assert gateway.accepted == {"a cat": 1}
    assert refreshed.images
    assert done.elapsed < 9.5
    assert "unfinished" not in caplog.text


async def test_submit_in_flight_is_drained(scripted: ScriptedGateway, inbox_server: InboxServer) -> None:
    """A submit that is answered during the drain is polled as usual, however reliable webhooks were."""
    async with session_on(scripted, inbox_server.inbox, schedule=FixedSchedule(1.0)) as session:
        for number in range(10):
            scripted.submits = deque([answer(200, running(f"warm{number}"))])
            warm = await session.submit("a cat")
            await deliver(inbox_server.inbox, completed(f"warm{number}"))
            await warm
        scripted.submits = deque([answer(200, running("t1"), after=2.0)])
        scripted.polls = deque([answer(200, running("t1"))] * 3 + [answer(200, completed("t1"))])
        waiting = asyncio.ensure_future(session.generate("a dog"))
        await anyio.sleep(1.0)
        await session.aclose(drain=20.0)
        done = await waiting

    assert done.elapsed < 7.0
    assert done.polls == 4


@pytest.mark.parametrize("after", [0.0, 3.0])
async def test_shared_task_is_drained(
    scripted: ScriptedGateway, inbox_server: InboxServer, tmp_path: Path, after: float
) -> None:
    """Two calls that share a task both get its outcome, even if its submit is still in flight."""
    scripted.submits = deque([answer(200, running("t1"), after=after)])
    scripted.polls = deque([answer(200, running("t1"))] * 5 + [answer(200, completed("t1"))])
    journal = VirtualJournal(tmp_path / "run.db")
    async with session_on(scripted, inbox_server.inbox, journal=journal, schedule=FixedSchedule(1.0)) as session:
        calls = [asyncio.ensure_future(session.generate("a cat")) for _ in range(2)]
        await anyio.sleep(2.0)
        await session.aclose(drain=20.0)
        done = [await call for call in calls]

    assert done[0].task_id == done[1].task_id
    assert len(scripted.of("POST")) == 1


async def test_unknown_delivery_while_draining(gateway: Emulator, inbox_server: InboxServer) -> None:
    """A delivery for an unknown task is refused during the drain, for the sender to repeat."""
    async with session_on(gateway, inbox_server.inbox, schedule=FixedSchedule(1.0), drain=20.0) as session:
        await session.submit("a cat")
        closing = asyncio.ensure_future(session.aclose())
        await anyio.sleep(1.0)
        with pytest.raises(SessionClosedError):
            await deliver(inbox_server.inbox, completed("unknown"))
        started = anyio.current_time()
        await closing
        elapsed = anyio.current_time() - started

    assert elapsed < 9.0


async def test_second_close_shortens_the_drain(gateway: Emulator) -> None:
    """A second aclose() can shorten the drain, but not prolong it."""
    async with FluxSession(gateway.api_key, base_url=gateway.url, schedule=FixedSchedule(1.0)) as session:
        task = await session.submit("a cat")
        started = anyio.current_time()
        closing = asyncio.ensure_future(session.aclose(drain=6.0))
        await anyio.sleep(1.0)
        longer = asyncio.ensure_future(session.aclose(drain=100.0))
        await anyio.sleep(1.0)
        await session.aclose(drain=1.0)
        elapsed = anyio.current_time() - started
        await asyncio.gather(closing, longer)
        outcome = await task.outcome()

    assert elapsed == pytest.approx(3.0, abs=0.1)
    assert not outcome.ok


async def test_short_drain_polls_once_more(gateway: Emulator, inbox_server: InboxServer) -> None:
    """However short or shortened the drain, an end that is there is found, for attached tasks as well."""
    task_id = ""
    results: list[bool] = []
    for first, second in ((0.5, None), (20.0, 5.0)):
        async with session_on(gateway, inbox_server.inbox) as session:
            inbox_server.open = False
            task_id = (await session.submit("a cat")).id
            await anyio.sleep(10.0)
            closing = asyncio.ensure_future(session.aclose(drain=first))
            await anyio.sleep(0.2)
            attached = session.attach(task_id)
            if second is not None:
                await session.aclose(drain=second)
            await closing
            results.append((await attached.outcome()).ok)
            results.append(session.stats.completed == 1)  # one task is one runner, attached or not

    assert results == [True] * 4


async def test_draining_keeps_reserved_polls(gateway: Emulator) -> None:
    """Tasks that wait for the poll limiter keep their order when the session begins to drain."""
    async with FluxSession(gateway.api_key, base_url=gateway.url, max_polls_per_second=1.0) as session:
        ids = [(await session.submit("a cat")).id for _ in range(20)]
    await anyio.sleep(10.0)
    async with FluxSession(gateway.api_key, base_url=gateway.url, max_polls_per_second=1.0) as session:
        tasks = [session.attach(task_id) for task_id in ids]
        await anyio.sleep(5.0)
        started = anyio.current_time()
        await session.aclose(drain=60.0)
        elapsed = anyio.current_time() - started
        succeeded = [(await task.outcome()).ok for task in tasks]

    assert succeeded == [True] * 20
    assert elapsed < 16.0


async def test_cancelled_scope_ends_the_drain(gateway: Emulator) -> None:
    """If an anyio scope cancels aclose(), it returns within two seconds and the task ids are logged."""
    async with FluxSession(gateway.api_key, base_url=gateway.url) as session:
        task = await session.submit("a cat")
        started = anyio.current_time()
        with anyio.move_on_after(1.0):
            await session.aclose(drain=60.0)
        elapsed = anyio.current_time() - started
        outcome = await task.outcome()

    assert elapsed < 3.1
    assert not outcome.ok


def test_loop_ends_without_closing(caplog: pytest.LogCaptureFixture) -> None:
    """If the event loop ends before the session is closed, the ids of paid tasks are logged."""

    async def main(session: FluxSession, drain: float | None) -> None:
        await session.__aenter__()
        await session.submit("a cat")
        if drain is not None:
            closing = asyncio.ensure_future(session.aclose(drain=drain))
            await asyncio.sleep(0.05)
            assert not closing.done()
        else:
            await session._parts.transport.close()

    with Emulator(seconds=5.0, pictures=False) as gateway:
        for drain in (None, 20.0):
            session = FluxSession(gateway.api_key, base_url=gateway.url, schedule=RARE_POLLS)
            asyncio.run(main(session, drain))
        ids = list(gateway.tasks)

    assert len(ids) == 2
    assert all(task_id in caplog.text for task_id in ids)


@pytest.mark.parametrize("journal", [False, True])
async def test_loop_ends_while_requests_wait(gateway: Emulator, tmp_path: Path, journal: bool) -> None:
    """If the event loop ends before the session is closed, the slots of its tasks go to nobody: nothing is submitted."""
    options: dict[str, Any] = {"journal": VirtualJournal(tmp_path / "run.db")} if journal else {}
    async with FluxSession(gateway.api_key, base_url=gateway.url, max_in_flight=2, **options) as session:
        assert session._supervisor is not None
        for number in range(2):
            await session.submit(f"{number}")
        queued = [session.enqueue(f"{number}", group=f"{number % 3}") for number in range(2, 9)]
        await anyio.sleep(1)
        for task in list(session._supervisor._tasks):  # what asyncio.run() does
            task.cancel()
        outcomes = [await task.outcome() for task in queued]

    errors = {str(outcome.error) for outcome in outcomes if isinstance(outcome, Failed)}
    assert errors == {"the service is shutting down"}
    assert list(gateway.accepted) == ["0", "1"]


async def test_loop_ends_while_an_end_is_recorded(
    gateway: Emulator, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A task that has completed isn't unfinished if the event loop ends while its end is written to the journal."""

    class HangingJournal(VirtualJournal):
        reached = asyncio.Event()

        async def record(self, entry: JournalEntry, /) -> None:
            if entry.state is EntryState.COMPLETED:
                self.reached.set()
                await anyio.sleep(math.inf)
            await super().record(entry)

    journal = HangingJournal(tmp_path / "run.db")
    async with FluxSession(gateway.api_key, base_url=gateway.url, journal=journal) as session:
        assert session._supervisor is not None
        wait = asyncio.ensure_future(session.generate("a cat"))
        await journal.reached.wait()
        for task in list(session._supervisor._tasks):  # what asyncio.run() does
            task.cancel()
        done = await wait

    assert done.ok
    assert "unfinished task" not in caplog.text


async def test_drain_ends_with_a_final_poll(gateway: Emulator, inbox_server: InboxServer) -> None:
    """A task whose next poll would come after the drain is polled before the session closes."""
    async with session_on(gateway, inbox_server.inbox) as session:
        task = await session.submit("a cat")
        inbox_server.open = False
        await session.aclose(drain=20.0)
        outcome = await task.outcome()

    assert outcome.ok
    assert outcome.polls == 1
    assert outcome.elapsed == pytest.approx(19.0, abs=0.2)


async def test_drain_limit(gateway: Emulator, caplog: pytest.LogCaptureFixture) -> None:
    """A task that doesn't end within the drain is Failed with its id, and logged in one line."""
    session = FluxSession(gateway.api_key, base_url=gateway.url, schedule=FixedSchedule(1.0), drain=100.0)
    async with session:
        task = await session.submit("a cat")
        started = anyio.current_time()
        await session.aclose(drain=3.0)
        elapsed = anyio.current_time() - started
    outcome = await task.outcome()

    assert elapsed == pytest.approx(3.0, abs=0.1)
    assert isinstance(outcome, Failed)
    assert isinstance(outcome.error, SessionClosedError)
    assert outcome.task_id == task.id
    assert f"session closed; unfinished tasks: {task.id}" in caplog.text


async def test_draining_a_stream(gateway: Emulator, tmp_path: Path) -> None:
    """A stream yields all submitted tasks, saved, and then raises SessionClosedError."""
    session = FluxSession(
        gateway.api_key, base_url=gateway.url, schedule=FixedSchedule(1.0), drain=20.0, max_in_flight=3
    )
    outcomes: list[Any] = []

    async def consume() -> None:
        async for outcome in session.stream([f"picture {number}" for number in range(9)], save_to=tmp_path / "out"):
            outcomes.append(outcome)

    async with session:
        consumer = asyncio.ensure_future(consume())
        await anyio.sleep(2.0)
    with pytest.raises(SessionClosedError):
        await consumer

    assert gateway.calls["submit"] == 3
    assert sum(outcome.ok for outcome in outcomes) == 3
    assert len(list((tmp_path / "out").iterdir())) == 3


async def test_drain_waits_for_tasks_only(gateway: Emulator, inbox_server: InboxServer, tmp_path: Path) -> None:
    """A stream that is not consumed and a delivery for an unknown task don't prolong the drain."""
    journal = VirtualJournal(tmp_path / "run.db")
    async with session_on(gateway, inbox_server.inbox, drain=60.0, journal=journal, max_in_flight=1) as session:
        stream = session.stream([f"picture {number}" for number in range(9)])
        await anext(stream)
        await deliver(inbox_server.inbox, completed("unknown"))
        started = anyio.current_time()
        await session.aclose()
        elapsed = anyio.current_time() - started

    assert elapsed < 10.0


@pytest.mark.parametrize("drain", [-1.0, float("nan"), float("inf"), "20", True])
async def test_invalid_drain(gateway: Emulator, drain: Any) -> None:
    """An invalid drain is a ConfigurationError, in the constructor and in aclose()."""
    with pytest.raises(ConfigurationError, match="drain"):
        FluxSession(gateway.api_key, drain=drain)
    async with FluxSession(gateway.api_key, base_url=gateway.url) as session:
        with pytest.raises(ConfigurationError, match="drain"):
            await session.aclose(drain=drain)


async def test_drain_without_tasks(gateway: Emulator) -> None:
    """A session without tasks in flight closes at once."""
    async with FluxSession(gateway.api_key, base_url=gateway.url, drain=100.0) as session:
        await session.generate("a cat")
        started = anyio.current_time()
        await session.aclose()
        elapsed = anyio.current_time() - started

    assert elapsed < 1.0
