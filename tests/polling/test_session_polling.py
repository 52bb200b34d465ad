"""Polling in a session: the final poll before a deadline, and schedules that belong to the user."""

import asyncio
from collections import deque
from pathlib import Path
from typing import Any

import anyio
import pytest
from support.scripted import ScriptedGateway, answer, completed, running, session_on
from support.virtual_time import VirtualJournal

from flux2max_async import (
    DeadlineExceededError,
    ExponentialSchedule,
    FixedSchedule,
    FluxSession,
    LearnedSchedule,
    PollPlan,
    TaskNotFoundError,
)
from flux2max_async._api.client import ApiClient
from flux2max_async._polling.schedules import ScaledPlan
from flux2max_async.emulator import Emulator
from flux2max_async.journal import EntryState, Holder, JournalEntry


async def test_the_final_poll_does_not_wait_for_the_poll_limit() -> None:
    """A hundred tasks that have ended are all found, though their deadline comes before the limit allows their polls."""
    async with Emulator(seconds=2.0, spread=0.0, seed=1, max_in_flight=100, pictures=False) as gateway:
        schedule = FixedSchedule(3.0)
        async with FluxSession(
            gateway.api_key,
            base_url=gateway.url,
            max_in_flight=100,
            schedule=schedule,
            task_timeout=4.0,
            max_polls_per_second=20.0,
        ) as session:
            outcomes = [outcome async for outcome in session.stream(f"cat {number}" for number in range(100))]

    assert [outcome.ok for outcome in outcomes] == [True] * 100


async def test_the_final_poll_is_one_poll(scripted: ScriptedGateway) -> None:
    """After the final poll, the poll limit holds again until the deadline."""
    scripted.polls = deque([answer(200, running())])
    schedule = FixedSchedule(0.05)
    async with FluxSession(
        scripted.api_key, base_url=scripted.url, schedule=schedule, task_timeout=20.0, max_polls_per_second=0.5
    ) as session:
        with pytest.raises(DeadlineExceededError):
            await session.generate("a cat")

    assert len(scripted.of("GET")) <= 12


async def test_a_schedule_belongs_to_the_user(gateway: Emulator) -> None:
    """Two sessions that share a schedule teach it, and change nothing else of it, however busy they are."""
    schedule = LearnedSchedule(poll_price=0.1)
    prices: set[float] = set()

    async def use(limit: float) -> None:
        async with FluxSession(
            gateway.api_key, base_url=gateway.url, schedule=schedule, max_polls_per_second=limit, max_in_flight=12
        ) as session:
            async for outcome in session.stream(f"cat {number}" for number in range(30)):
                prices.add(schedule.poll_price)
                assert outcome.ok

    await asyncio.gather(use(1.0), use(1000.0))

    assert prices == {0.1}
    assert repr(schedule) == "LearnedSchedule(poll_price=0.1)"
    assert schedule.percentile(50) is not None


class _CostAwareSchedule:
    """A user's schedule whose plans take the cost of a poll into account."""

    supports_cost_factor = True

    def __init__(self) -> None:
        self.factors: list[float] = []

    def begin(self, request: object) -> PollPlan:
        return self

    def next_delay(self, elapsed: float, progress: float | None, *, cost_factor: float = 1.0) -> float:
        self.factors.append(cost_factor)
        return 1.0

    def finish(self, not_before: float, by: float, *, completed: bool = True) -> None:
        pass


async def test_the_cost_factor_is_an_argument(scripted: ScriptedGateway) -> None:
    """A plan that supports it is given the cost factor, which rises after four 429s; others are not."""
    scripted.polls = deque([*[answer(429, {})] * 4, answer(200, running()), answer(200, completed())])
    schedule = _CostAwareSchedule()
    async with FluxSession(scripted.api_key, base_url=scripted.url, schedule=schedule) as session:
        await session.generate("a cat")

    assert schedule.factors[0] == 1.0
    assert max(schedule.factors) > 1.0


def test_a_plan_without_cost_factor_is_asked_once_per_poll() -> None:
    """A plan may count its calls: planning a poll anew doesn't ask it again, but scales its answer."""
    plan = ScaledPlan(ExponentialSchedule(1.0, factor=2.0, maximum=100.0), None)
    delays = [
        plan.next_delay(elapsed, None, cost_factor=factor)
        for elapsed, factor in ((0.0, 1.0), (0.0, 4.0), (1.0, 1.0), (1.0, 16.0))
    ]

    assert delays == [1.0, 2.0, 2.0, 8.0]


async def test_unknown_statuses_are_logged_once_per_kind(
    scripted: ScriptedGateway, caplog: pytest.LogCaptureFixture
) -> None:
    """A status with a counter in it is logged once; and whatever the service invents, memory is bounded."""
    words = [f"step {number} of 300" for number in range(300)] + [chr(0x4E00 + number) * 3 for number in range(300)]
    scripted.polls = deque([*(answer(200, {**running(), "status": word}) for word in words), answer(200, completed())])
    async with session_on(scripted, max_polls_per_second=None, task_timeout=None) as session:
        await session.generate("a cat")
        client = session._supervisor.client  # type: ignore[union-attr]

    assert isinstance(client, ApiClient)
    assert len([record for record in caplog.records if "unknown task status 'step" in record.message]) == 1
    assert len(client._unknown_statuses.kinds) == 100


class _Reporting(VirtualJournal):
    """A journal that reports what it is told to."""

    report: Any = None

    async def open(self, on_external_change: Any = lambda _: None, /, *, watch_changes: bool = False) -> None:
        self.report = on_external_change
        await super().open(on_external_change, watch_changes=watch_changes)


async def test_a_task_that_another_process_did_not_find_is_polled(scripted: ScriptedGateway, tmp_path: Path) -> None:
    """An entry whose error is TaskNotFoundError doesn't break the change listener: the task's own process polls it."""
    scripted.polls = deque([answer(200, completed())])
    journal = _Reporting(tmp_path / "run.db")
    schedule = FixedSchedule(1000.0)
    async with FluxSession(
        scripted.api_key, base_url=scripted.url, schedule=schedule, task_timeout=None, journal=journal
    ) as session:
        task = await session.submit("a cat", key="cat")
        started = anyio.current_time()
        error = {"kind": TaskNotFoundError.__name__, "message": "gone", "status": 404}
        entry = JournalEntry(
            key="cat", fingerprint="f", request={}, state=EntryState.FAILED, task_id=task.id, result={"error": error},
            holder=Holder.US,
        )  # fmt: skip
        journal.report([entry])
        done = await task
        took = anyio.current_time() - started
        journal.report([entry])  # when nobody follows it any more

    assert done.ok
    assert took < 2.0
