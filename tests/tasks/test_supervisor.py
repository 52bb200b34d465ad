"""Sessions that are closed while tasks run: what drains, what is left, and what is put off."""

import asyncio
from collections import deque
from pathlib import Path
from typing import Any

import anyio
import pytest
from support.scripted import ScriptedGateway, answer, completed, running
from support.virtual_time import VirtualJournal
from support.webhooks import SELDOM, InboxServer, deliver, session_on

from flux2max_async import (
    ConfigurationError,
    Failed,
    FixedSchedule,
    FluxSession,
    SessionClosedError,
)
from flux2max_async.emulator import Emulator


async def test_draining_lets_submitted_tasks_end(
    gateway: Emulator, at: InboxServer, caplog: pytest.LogCaptureFixture
) -> None:
    """Closing with drain submits nothing more and waits for what is submitted, and for its pictures to be saved."""
    session = session_on(gateway, at.inbox, schedule=FixedSchedule(1.0), drain=20.0)
    async with session:
        task = await session.submit("a cat")
        await anyio.sleep(1.0)
        at.open = False  # a server that shuts down stops listening first
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


async def test_a_submit_on_the_wire_is_drained_too(scripted: ScriptedGateway, at: InboxServer) -> None:
    """A submit that is answered while its session drains is polled as usual, however well webhooks have worked."""
    async with session_on(scripted, at.inbox, schedule=FixedSchedule(1.0)) as session:
        for number in range(10):
            scripted.submits = deque([answer(200, running(f"warm{number}"))])
            warm = await session.submit("a cat")
            await deliver(at.inbox, completed(f"warm{number}"))
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
async def test_who_shares_a_task_is_drained_with_it(
    scripted: ScriptedGateway, at: InboxServer, tmp_path: Path, after: float
) -> None:
    """Two who ask for the same, where that is one task, both get it, even if its submit isn't answered yet."""
    scripted.submits = deque([answer(200, running("t1"), after=after)])
    scripted.polls = deque([answer(200, running("t1"))] * 5 + [answer(200, completed("t1"))])
    journal = VirtualJournal(tmp_path / "run.db")
    async with session_on(scripted, at.inbox, journal=journal, schedule=FixedSchedule(1.0)) as session:
        both = [asyncio.ensure_future(session.generate("a cat")) for _ in range(2)]
        await anyio.sleep(2.0)
        await session.aclose(drain=20.0)
        done = [await one for one in both]

    assert done[0].task_id == done[1].task_id
    assert len(scripted.of("POST")) == 1


async def test_an_unknown_delivery_while_draining_is_put_off(gateway: Emulator, at: InboxServer) -> None:
    """What a session that closes can't use is for another process, at the sender's next attempt."""
    async with session_on(gateway, at.inbox, schedule=FixedSchedule(1.0), drain=20.0) as session:
        await session.submit("a cat")
        closing = asyncio.ensure_future(session.aclose())
        await anyio.sleep(1.0)
        with pytest.raises(SessionClosedError):
            await deliver(at.inbox, completed("nobody's"))
        started = anyio.current_time()
        await closing
        took = anyio.current_time() - started

    assert took < 9.0


async def test_a_second_close_shortens_the_first(gateway: Emulator) -> None:
    """Who can't wait any longer says so, and a longer wait than is granted already isn't."""
    async with FluxSession(gateway.api_key, base_url=gateway.url, schedule=FixedSchedule(1.0)) as session:
        task = await session.submit("a cat")
        started = anyio.current_time()
        closing = asyncio.ensure_future(session.aclose(drain=6.0))
        await anyio.sleep(1.0)
        longer = asyncio.ensure_future(session.aclose(drain=100.0))
        await anyio.sleep(1.0)
        await session.aclose(drain=1.0)
        took = anyio.current_time() - started
        await asyncio.gather(closing, longer)
        outcome = await task.outcome()

    assert took == pytest.approx(3.0, abs=0.1)
    assert not outcome.ok


async def test_a_short_drain_looks_too(gateway: Emulator, at: InboxServer) -> None:
    """However short it is, however it is shortened, and whenever a task was attached: its end is found if it is there."""
    task_id = ""
    found: list[bool] = []
    for first, second in ((0.5, None), (20.0, 5.0)):
        async with session_on(gateway, at.inbox) as session:
            at.open = False
            task_id = (await session.submit("a cat")).id
            await anyio.sleep(10.0)
            closing = asyncio.ensure_future(session.aclose(drain=first))
            await anyio.sleep(0.2)
            attached = session.attach(task_id)
            if second is not None:
                await session.aclose(drain=second)
            await closing
            found.append((await attached.outcome()).ok)
            found.append(session.stats.completed == 2)

    assert found == [True] * 4


async def test_draining_keeps_the_polls_that_are_booked(gateway: Emulator) -> None:
    """Tasks that wait for their turn in the budget of polls keep it when their session begins to drain."""
    async with FluxSession(gateway.api_key, base_url=gateway.url, max_polls_per_second=1.0) as session:
        ids = [(await session.submit("a cat")).id for _ in range(20)]
    await anyio.sleep(10.0)
    async with FluxSession(gateway.api_key, base_url=gateway.url, max_polls_per_second=1.0) as session:
        tasks = [session.attach(task_id) for task_id in ids]
        await anyio.sleep(5.0)
        started = anyio.current_time()
        await session.aclose(drain=60.0)
        took = anyio.current_time() - started
        ends = [(await task.outcome()).ok for task in tasks]

    assert ends == [True] * 20
    assert took < 16.0


async def test_a_cancelled_scope_doesnt_wait_for_draining(gateway: Emulator) -> None:
    """Whose patience with closing ends, by a scope of anyio, leaves within two seconds, and the ids are in the log."""
    async with FluxSession(gateway.api_key, base_url=gateway.url) as session:
        task = await session.submit("a cat")
        started = anyio.current_time()
        with anyio.move_on_after(1.0):
            await session.aclose(drain=60.0)
        took = anyio.current_time() - started
        outcome = await task.outcome()

    assert took < 3.1
    assert not outcome.ok


def test_an_event_loop_that_ends_leaves_the_ids(caplog: pytest.LogCaptureFixture) -> None:
    """Where a program ends without closing its session, or in the middle of it, paid tasks are named in the log."""

    async def main(session: FluxSession, drain: float | None) -> None:
        await session.__aenter__()
        await session.submit("a cat")
        if drain is not None:
            closing = asyncio.ensure_future(session.aclose(drain=drain))
            await asyncio.sleep(0.05)
            assert not closing.done()
        else:
            await session._transport.close()

    with Emulator(seconds=5.0, pictures=False) as gateway:
        for drain in (None, 20.0):
            session = FluxSession(gateway.api_key, base_url=gateway.url, schedule=SELDOM)
            asyncio.run(main(session, drain))
        ids = list(gateway.tasks)

    assert len(ids) == 2
    assert all(task_id in caplog.text for task_id in ids)


async def test_draining_ends_with_a_last_look(gateway: Emulator, at: InboxServer) -> None:
    """A task that would be looked at too late is looked at before its session closes."""
    async with session_on(gateway, at.inbox) as session:
        task = await session.submit("a cat")
        at.open = False
        await session.aclose(drain=20.0)
        outcome = await task.outcome()

    assert outcome.ok
    assert outcome.polls == 1
    assert outcome.elapsed == pytest.approx(19.0, abs=0.2)


async def test_draining_has_its_limit(gateway: Emulator, caplog: pytest.LogCaptureFixture) -> None:
    """What doesn't end within drain is left as it is without: its id in the outcome, and in one log line."""
    session = FluxSession(gateway.api_key, base_url=gateway.url, schedule=FixedSchedule(1.0), drain=100.0)
    async with session:
        task = await session.submit("a cat")
        started = anyio.current_time()
        await session.aclose(drain=3.0)
        took = anyio.current_time() - started
    outcome = await task.outcome()

    assert took == pytest.approx(3.0, abs=0.1)
    assert isinstance(outcome, Failed)
    assert isinstance(outcome.error, SessionClosedError)
    assert outcome.task_id == task.id
    assert f"session closed; unfinished tasks: {task.id}" in caplog.text


async def test_draining_delivers_a_stream(gateway: Emulator, tmp_path: Path) -> None:
    """A stream whose session drains yields all that is submitted, saved, and then says that it was closed."""
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


async def test_draining_waits_for_nothing_else(gateway: Emulator, at: InboxServer, tmp_path: Path) -> None:
    """A stream that nobody reads, and a delivery that nobody claims, don't hold up a shutdown."""
    journal = VirtualJournal(tmp_path / "run.db")
    async with session_on(gateway, at.inbox, drain=60.0, journal=journal, max_in_flight=1) as session:
        stream = session.stream([f"picture {number}" for number in range(9)])
        await anext(stream)
        await deliver(at.inbox, completed("nobody's"))
        started = anyio.current_time()
        await session.aclose()
        took = anyio.current_time() - started

    assert took < 10.0


@pytest.mark.parametrize("drain", [-1.0, float("nan"), float("inf"), "20", True])
async def test_drain_is_a_number_of_seconds(gateway: Emulator, drain: Any) -> None:
    """Anything else is named, in the constructor and in aclose()."""
    with pytest.raises(ConfigurationError, match="drain"):
        FluxSession(gateway.api_key, drain=drain)
    async with FluxSession(gateway.api_key, base_url=gateway.url) as session:
        with pytest.raises(ConfigurationError, match="drain"):
            await session.aclose(drain=drain)


async def test_draining_nothing_takes_no_time(gateway: Emulator) -> None:
    """A session in which nothing is in flight closes at once, however long it might drain."""
    async with FluxSession(gateway.api_key, base_url=gateway.url, drain=100.0) as session:
        await session.generate("a cat")
        started = anyio.current_time()
        await session.aclose()
        took = anyio.current_time() - started

    assert took < 1.0
