"""Starts and owns what runs in the background of a session, from its opening to its close."""

import asyncio
import contextlib
import math
import os
from collections.abc import Callable, Coroutine
from typing import Any

import anyio

from flux2max_async._exceptions import QueueFullError, SubmissionUncertainError
from flux2max_async._models.results import Completed, Outcome, Usage
from flux2max_async._polling.context import PollingContext
from flux2max_async._polling.deadline import GRACE_PERIOD, MAX_LATENESS
from flux2max_async._shutdown import ANSWER_TIMEOUT, SETTLE_TIME, closed_error
from flux2max_async._stats import SessionCounters
from flux2max_async._tasks.background import BackgroundTasks
from flux2max_async._tasks.context import RunnerContext
from flux2max_async._tasks.external_changes import ExternalChanges
from flux2max_async._tasks.intake import Intake
from flux2max_async._tasks.queue_bound import QueueBound
from flux2max_async._tasks.runner import TaskRunner
from flux2max_async._tasks.single_flight import SingleFlight
from flux2max_async._tasks.slots import SlotQueue
from flux2max_async._tasks.submission import AddWebhook
from flux2max_async._text import get_logger
from flux2max_async._timeouts import wait
from flux2max_async.journal._record_factory import RecordFactory

log = get_logger("tasks")


class Supervisor(BackgroundTasks):
    """Owns the background tasks of a session.

    Its `intake` starts runners. One runner serves all callers that ask for the same key or the same task (see
    `SingleFlight`).

    The shutdown goes OPEN -> DRAINING -> CLOSED:

    - OPEN: the intake starts runners, `spawn()` other work.
    - DRAINING (`begin_drain()`, `drain()`): submits that are not on the wire and the producers of streams are
      cancelled; everything else goes on until it ends, or until the deadline, which only `shut_down()` sets. A request
      whose task exists already, here or in the journal, is still answered with that task.
    - CLOSED (`close()`): submits on the wire get two seconds for their answers, then every runner is ended by
      `close_now()` and every asyncio task is cancelled and awaited.

    Invariant: whatever was started ends with a result on every path, also if it is cancelled before its first step.
    Runners are ended explicitly; for other work, use `add_done_callback()` on what `spawn()` returns.
    """

    def __init__(
        self,
        polling: PollingContext,
        stats: SessionCounters,
        records: RecordFactory,
        *,
        slots: SlotQueue,
        max_waiting: int | None,
        add_webhook: AddWebhook | None,
    ) -> None:
        super().__init__(polling.shutdown)
        self.client = polling.client
        self.slots = slots
        self._runners: set[TaskRunner] = set()
        self.single_flight = SingleFlight()
        self._context = RunnerContext(
            polling,
            slots=slots,
            bound=QueueBound(slots, max_waiting, polling, stats),
            add_webhook=add_webhook,
            single_flight=self.single_flight,
            spawn=self.spawn,
            check_caller=self.check_caller,
            begin_drain=self.begin_drain,
        )
        self.intake = Intake(self._context, records, self._runners, self)
        self.on_external_change = ExternalChanges(polling, records, self.single_flight, self.intake.start_runner)
        self._closing: asyncio.Task[None] | None = None
        """Closes the session, once that has begun."""
        self._stats = stats
        self._left_unfinished: tuple[TaskRunner, ...] = ()
        """What `close_now()` has ended."""
        self._draining: asyncio.Timeout | None = None

    # ------------------------------------------------------------------ shutdown

    def begin_drain(self) -> None:
        """Submit nothing more. It may be called in a signal handler, between any two steps of the event loop.

        What waits for its submit ends in the next iteration of the event loop.
        """
        if self.shutdown.draining or os.getpid() != self._process_id:
            return
        self.shutdown.draining = True
        with contextlib.suppress(RuntimeError):  # the event loop has ended
            self._loop.call_soon_threadsafe(self._end_waiting)

    def _end_waiting(self) -> None:
        """End what waits for its submit, and poll tasks as if no webhooks came: the server stops listening."""
        for runner in list(self._runners):
            runner.submit_nothing(self.shutdown.error())
        for task in list(self._producers):
            task.cancel()
        self._replan_polls()

    async def shut_down(self, seconds: float, close: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Run `close()` in a task of its own, once, and wait for it; cancelling the wait doesn't cut it short.

        Args:
            seconds: How long the drain may take; a second call may shorten it.
            close: Drains and closes the session.
        """
        self.set_deadline(seconds)
        self._closing = self._closing or self._loop.create_task(close())
        try:
            await asyncio.shield(self._closing)
        except asyncio.CancelledError:
            if anyio.current_effective_deadline() > -math.inf:
                raise
            # In a cancelled scope of anyio nothing else could be awaited; this takes two seconds at most.
            self.set_deadline(0.0)
            with anyio.CancelScope(shield=True):
                await asyncio.shield(self._closing)
            raise

    def set_deadline(self, seconds: float) -> None:
        """Submit nothing more, and end the drain in `seconds` at the latest."""
        self.shutdown.set_deadline(self._loop.time(), seconds)
        self._replan_polls()
        if self._draining is not None and not self._draining.expired():
            self._draining.reschedule(self.shutdown.deadline)

    async def drain(self) -> None:
        """Wait for submitted tasks to end, and for their images to be saved, until the deadline."""
        if self.shutdown.deadline <= self._loop.time():
            return
        self._end_waiting()
        if await self._drain_until_deadline():
            return
        if self.shutdown.extend(self._loop.time(), GRACE_PERIOD, lateness=MAX_LATENESS):
            self._replan_polls()
            await self._drain_until_deadline()

    async def _drain_until_deadline(self) -> bool:
        """Wait for everything to end; return False if the deadline came first."""
        try:
            async with asyncio.timeout_at(self.shutdown.deadline) as self._draining:
                await asyncio.sleep(SETTLE_TIME)
                while tasks := self._tasks - self._producers:
                    await asyncio.wait(tasks)
                    await asyncio.sleep(SETTLE_TIME)
                return True
        except TimeoutError:
            return False  # what has not ended by now is left unfinished
        finally:
            self._draining = None

    def _replan_polls(self) -> None:
        for poller in filter(None, [runner.poller for runner in self._runners]):
            poller.replan()

    async def close(self) -> None:
        """End everything: calls on the wire within two seconds, the rest at once with SessionClosedError."""
        self.shutdown.finish()
        for runner in list(self._runners):
            runner.cancel_submit(closed_error())
        if unanswered := [runner.submit_done.future() for runner in self._runners if not runner.submit_done.done()]:
            await wait(unanswered, ANSWER_TIMEOUT, grace=ANSWER_TIMEOUT)
        self.close_now()
        if tasks := list(self._tasks):
            await asyncio.wait(tasks)

    def close_now(self) -> None:
        """End everything at once, and log the ids of what is unfinished."""
        self.shutdown.finish()
        for runner in list(self._runners):
            runner.cancel_submit(closed_error())  # what waits for a slot ends, before others give theirs back
        runners = list(self._runners)
        submitted = [runner for runner in runners if runner.may_be_submitted]
        for task in self._tasks:
            task.cancel()
        for runner in runners:
            runner.close_now()
        if unfinished := [runner for runner in submitted if not runner.ended.result().replayed]:
            self._left_unfinished = tuple(runner for runner in unfinished if runner.task_id is not None)
            ids = [runner.task_id or "(a submit without an answer)" for runner in unfinished]
            log.warning("session closed; unfinished tasks: %s", ids)

    @property
    def unfinished(self) -> tuple[TaskRunner, ...]:
        """The runners whose tasks were submitted, and whose ends were not seen."""
        running = (runner for runner in self._runners if runner.poller is not None and not runner.ended.done())
        return (*self._left_unfinished, *running)

    # ------------------------------------------------------------------ observing runners

    def on_waiting_elsewhere(self, *, waiting: bool) -> None:
        """Do nothing: a runner that waits for another process takes nothing from this one."""

    def on_ended(self, runner: TaskRunner, outcome: Outcome) -> None:
        """Count the outcome."""
        self._runners.discard(runner)
        if isinstance(outcome, Completed):
            self._stats.completed += 1
        elif runner.is_withdrawn(outcome):
            self._stats.withdrawn += 1
        elif not isinstance(outcome.error, QueueFullError):
            self._stats.failed += 1
            self._stats.uncertain += isinstance(outcome.error, SubmissionUncertainError)
        self._stats.replayed += outcome.replayed
        if runner.poller is not None:
            self._stats.webhooks += runner.poller.ended_by_webhook
            snapshot = runner.feed.snapshot
            if snapshot and snapshot.usage:
                self._count_cost(snapshot.task_id, snapshot.usage)

    def _count_cost(self, task_id: str, usage: Usage) -> None:
        if usage.cost is not None:
            self._stats.spent += usage.cost
        elif (reported := usage.extra.get("cost")) is not None:
            message = "task %s: its cost is unknown: %s is not an amount from 0 to 1,000 dollars"
            log.warning(message, task_id, str(reported))
