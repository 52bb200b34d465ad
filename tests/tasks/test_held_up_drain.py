"""A drain whose end passes while nothing runs: running tasks are polled once more before they are left unfinished."""

import asyncio
from collections import deque

import anyio
import pytest
from support.scripted import Behaviour, ScriptedGateway, answer, completed, hang, running
from support.virtual_time import hold_up

from flux2max_async import Failed, FixedSchedule, FluxSession, Outcome, SessionClosedError
from flux2max_async._polling.deadline import GRACE_PERIOD

COMPLETED, RUNNING = answer(200, completed()), answer(200, running())
COUNT = 10


async def close_held_up(
    scripted: ScriptedGateway,
    drain: float,
    afterwards: Behaviour,
    *,
    polls: Behaviour = RUNNING,
    interval: float = 1.0,
    gap: float = 3600.0,
    task_timeout: float = 100_000.0,
    close_again: bool = False,
) -> tuple[list[Outcome], float]:
    """Close a session, hold it up two seconds later; return the outcomes, and how long after the gap it was closed."""
    scripted.submits = deque(answer(200, running(f"t{number}")) for number in range(COUNT))
    scripted.polls = deque([polls])
    session = FluxSession(
        scripted.api_key, base_url=scripted.url, schedule=FixedSchedule(interval), task_timeout=task_timeout
    )
    async with session:
        tasks = [await session.submit("a cat") for _ in range(COUNT)]
        await anyio.sleep(0.5)
        closing = asyncio.ensure_future(session.aclose(drain=drain))
        await anyio.sleep(2.0)
        if close_again:
            again = asyncio.ensure_future(session.aclose(drain=0.0))
            await asyncio.sleep(0)
        scripted.polls = deque([afterwards])
        hold_up(gap)
        resumed_at = anyio.current_time()
        await closing
        if close_again:
            await again
        took = anyio.current_time() - resumed_at
        return [await task.outcome() for task in tasks], took


@pytest.mark.parametrize("interval", [1.0, 1000.0], ids=["often", "rarely"])
@pytest.mark.parametrize("polls", [RUNNING, hang], ids=["sleeping", "on the wire"])
@pytest.mark.parametrize("task_timeout", [60.0, 100_000.0], ids=["past both", "past the drain"])
async def test_tasks_that_ended_meanwhile(
    scripted: ScriptedGateway, interval: float, polls: Behaviour, task_timeout: float
) -> None:
    """Tasks that ended while a draining session was held up come out completed."""
    outcomes, took = await close_held_up(
        scripted, 20.0, COMPLETED, polls=polls, interval=interval, task_timeout=task_timeout
    )

    assert [outcome.ok for outcome in outcomes] == [True] * COUNT
    assert took < GRACE_PERIOD


async def test_tasks_that_still_run(scripted: ScriptedGateway) -> None:
    """Those that still run are left unfinished after five seconds, once they have been polled."""
    outcomes, took = await close_held_up(scripted, 20.0, RUNNING, interval=1000.0)

    assert {type(outcome.error) if isinstance(outcome, Failed) else None for outcome in outcomes} == {
        SessionClosedError
    }
    assert [outcome.polls for outcome in outcomes] == [1] * COUNT
    assert took == pytest.approx(GRACE_PERIOD, abs=0.1)


@pytest.mark.parametrize("gap", [0.0, 30.0])
async def test_a_drain_that_ends_on_time(scripted: ScriptedGateway, gap: float) -> None:
    """Without a gap at its end, a drain takes as long as it may."""
    outcomes, took = await close_held_up(scripted, 60.0, RUNNING, gap=gap)

    assert not any(outcome.ok for outcome in outcomes)
    assert took == pytest.approx(58.0 - gap, abs=0.1)


async def test_a_drain_that_was_ended_at_once(scripted: ScriptedGateway) -> None:
    """A second call that ends the drain at once promises no poll, however late it takes effect."""
    _, took = await close_held_up(scripted, 20.0, COMPLETED, interval=1000.0, close_again=True)

    assert took < 0.1


async def test_the_drain_is_extended_once(scripted: ScriptedGateway) -> None:
    """A process that is held up again and again ends its drain all the same."""
    scripted.polls = deque([RUNNING])
    async with FluxSession(
        scripted.api_key, base_url=scripted.url, schedule=FixedSchedule(1000.0), task_timeout=None
    ) as session:
        await session.submit("a cat")
        closing = asyncio.ensure_future(session.aclose(drain=20.0))
        await anyio.sleep(2.0)
        hold_up(3600.0)
        await anyio.sleep(1.0)
        hold_up(3600.0)
        resumed_at = anyio.current_time()
        await closing

    assert anyio.current_time() - resumed_at < 0.1
    assert len(scripted.of("GET")) == 1
