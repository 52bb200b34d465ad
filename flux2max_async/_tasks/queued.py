"""The handle of a request that was taken in, and may wait for its slot."""

import asyncio
from collections.abc import Awaitable, Coroutine, Generator
from typing import Any

import attrs

from flux2max_async._exceptions import FluxError, SessionClosedError
from flux2max_async._models.request import GenerationRequest
from flux2max_async._models.results import Completed, Failed, Outcome
from flux2max_async._shutdown import closed_error
from flux2max_async._tasks.context import RunnerContext
from flux2max_async._tasks.handle import GenerationTask
from flux2max_async._tasks.runner import TaskRunner
from flux2max_async._tasks.shared_result import SharedResult
from flux2max_async._tasks.time_limit import TimeLimit


class QueuedGeneration(Awaitable[Completed]):
    """A request that `session.enqueue()` has taken in. It belongs to the session, which runs it, waited for or not.

    Awaiting it returns `Completed`, or raises. Many can await it; cancelling a wait cancels only that wait.
    """

    __slots__ = (
        "_context",
        "_has_left",
        "_is_withdrawn",
        "_limit",
        "_priority",
        "_request",
        "_started",
        "_starting",
        "_timer",
    )

    def __init__(
        self, context: RunnerContext, request: GenerationRequest, priority: int, limit: TimeLimit | None
    ) -> None:
        self._context = context
        self._request = request
        self._priority = priority
        self._limit = limit
        self._started: SharedResult[TaskRunner | Failed] = SharedResult()
        """The runner, or why there is none."""
        self._starting: asyncio.Task[None] | None = None
        self._has_left = False
        """Whether it no longer counts as one of the runner's callers."""
        self._is_withdrawn = False
        """Whether it has left by `withdraw()` in time. Its runner may still go on: for a later, equal request."""
        self._timer: asyncio.TimerHandle | None = None

    # ------------------------------------------------------------------ for callers

    @property
    def position(self) -> int | None:
        """Its place among the requests that wait for a slot, 1 for the next one; None if it waits no longer.

        It is exact among equal priorities as long as nobody arrives or leaves, and costs some microseconds.
        """
        runner = self._runner
        if runner is not None:
            return None if self._is_withdrawn else runner.position
        return None if self._started.done() else self._context.slots.waiting + 1

    @property
    def expected_wait(self) -> float | None:
        """Seconds until its image, by the durations that the schedule has learned and the requests before it.

        None until a task has completed, or if the schedule doesn't learn. It includes no pause that the service may
        ask for. 0.0 at the end, and if it takes longer than usual.
        """
        bound, runner, position = self._context.bound, self._runner, self.position
        duration = bound.mean_duration()
        if duration is None:
            return None
        if self._started.done() and (runner is None or runner.ended.done()):
            return 0.0
        if position is not None:
            return duration + (bound.seconds_until_slot(position) or 0.0)
        return duration if runner is None or runner.poller is None else max(0.0, duration - runner.poller.elapsed)

    async def submitted(self) -> GenerationTask:
        """Wait until the service has given the task an id, and return the task.

        Raises:
            FluxError: There is no task, or nobody knows whether there is one (SubmissionUncertainError).
        """
        started = await self._start()
        if isinstance(started, Failed):
            raise started.error.with_traceback(None)
        if not await self._wait(started, started.answered):
            raise self._exceeded(None)
        if self._is_withdrawn:
            raise SessionClosedError("withdrawn")
        if started.task_id is None:
            started.ended.result().unwrap()
        return GenerationTask(started)

    async def outcome(self) -> Outcome:
        """Wait for the end; a request that failed is a `Failed`, not an exception.

        Raises:
            ConfigurationError: It is awaited in another event loop than its session's, before its end.
        """
        started = await self._start()
        if isinstance(started, Failed):
            return started
        if not await self._wait(started, started.ended):
            error = self._exceeded(started.task_id)
            return Failed(task_id=started.task_id, request=self._request, error=error, elapsed=started.elapsed)
        if self._is_withdrawn:
            return Failed(request=self._request, error=SessionClosedError("withdrawn"))
        outcome = started.ended.result()
        return outcome if outcome.request is self._request else attrs.evolve(outcome, request=self._request)

    def __await__(self) -> Generator[Any, None, Completed]:
        return self._completed().__await__()

    async def _completed(self) -> Completed:
        return (await self.outcome()).unwrap()

    def withdraw(self) -> bool:
        """Submit it no more, if it still waits and nobody else has asked for the same.

        Returns:
            True if nothing was or will be sent; then awaiting it raises SessionClosedError. False if it is too late, or
            others have asked for the same request: it goes on.
        """
        runner, reason = self._runner, SessionClosedError("withdrawn")
        if runner is None:
            self._end_early(reason)
            return isinstance(self._started.result(), Failed) and self._has_left
        if runner.is_waiting and not self._has_left:
            self._leave(runner, reason)
            self._is_withdrawn = runner.was_withdrawn
        return self._is_withdrawn or (self._has_left and runner.was_withdrawn)

    def __repr__(self) -> str:
        runner = self._runner
        if runner is None or runner.task_id is None:
            return f"<QueuedGeneration, position {self.position}>"
        return f"<QueuedGeneration, task {runner.task_id!r}>"

    # ------------------------------------------------------------------ for the intake, and for the runner

    def start_later(self, work: Coroutine[Any, Any, None]) -> None:
        """Run a coroutine that calls `follow()`; until then the request counts as waiting."""
        self._set_timer()
        self._context.bound.reserved += 1
        self._starting = self._context.spawn(work)
        self._starting.add_done_callback(self._on_started)

    def follow(self, runner: TaskRunner) -> None:
        """Follow a runner, which this request has joined."""
        self._set_timer()
        self._set_started(runner)
        runner.add_observer(self)

    def on_waiting_elsewhere(self, *, waiting: bool) -> None:
        """Do nothing: the position is None then."""

    def on_ended(self, runner: TaskRunner, outcome: Outcome) -> None:  # noqa: ARG002 - the protocol's signature
        """Forget the timeout."""
        self._cancel_timer()

    # ------------------------------------------------------------------ internals

    @property
    def _runner(self) -> TaskRunner | None:
        started = self._started.result() if self._started.done() else None
        return started if isinstance(started, TaskRunner) else None

    async def _start(self) -> TaskRunner | Failed:
        if not self._started.done():
            self._context.check_caller()
        return await self._started.wait()

    async def _wait(self, runner: TaskRunner, shared: SharedResult[Any]) -> bool:
        """Wait for a result of the runner; return False if the timeout was over first."""
        runner.check_caller()
        if self._limit is not None:
            return await self._limit.wait(shared)
        await shared.wait()
        return True

    def _exceeded(self, task_id: str | None) -> FluxError:
        assert self._limit is not None
        return self._limit.exceeded(task_id)

    def _set_timer(self) -> None:
        if self._limit is not None and self._timer is None:
            self._timer = asyncio.get_running_loop().call_at(self._limit.ends_at, self._on_timeout)

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _on_timeout(self) -> None:
        runner, reason = self._runner, self._exceeded(None)
        if runner is None:
            self._end_early(reason)
        else:
            self._leave(runner, reason)

    def _leave(self, runner: TaskRunner, reason: FluxError) -> None:
        self._has_left = True
        self._cancel_timer()
        runner.leave(self._priority, reason)

    def _end_early(self, reason: FluxError) -> None:
        """End before there is a runner."""
        if not self._started.done() and self._starting is not None:
            self._has_left = True
            self._context.bound.stats.withdrawn += 1
            self._fail(reason)
            self._starting.cancel()

    def _on_started(self, starting: "asyncio.Task[None]") -> None:
        if starting.cancelled():
            self._fail(closed_error())
        elif (error := starting.exception()) is not None:
            self._fail(error if isinstance(error, FluxError) else FluxError(f"unexpected error: {error!r}"))

    def _fail(self, error: FluxError) -> None:
        self._set_started(Failed(request=self._request, error=error))
        self._cancel_timer()

    def _set_started(self, started: TaskRunner | Failed) -> None:
        if self._starting is not None and not self._started.done():
            self._context.bound.reserved -= 1
        self._started.set_result(started)
