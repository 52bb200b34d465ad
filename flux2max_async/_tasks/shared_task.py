"""A request as its callers see it: several may share it, wait for it, and leave."""

import asyncio
from typing import TypeVar

import attrs

from flux2max_async._exceptions import FluxError, SessionClosedError, SubmissionUncertainError
from flux2max_async._models.request import GenerationRequest
from flux2max_async._models.results import Failed, Outcome
from flux2max_async._polling.updates import SnapshotFeed
from flux2max_async._tasks.cancellation import SubmitCancellation
from flux2max_async._tasks.context import RunnerContext
from flux2max_async._tasks.shared_result import SharedResult
from flux2max_async._tasks.time_limit import TimeLimit
from flux2max_async._text import get_logger
from flux2max_async.journal._budget_record import NullRecord
from flux2max_async.journal._lookup import ReusePolicy

log = get_logger("tasks")

T = TypeVar("T")


@attrs.define(eq=False, repr=False)
class SharedTask:
    """One request, and who waits for it.

    Each caller joins, and leaves if it goes before the end. When the last one has left, what is not submitted yet is
    not submitted; a task that exists is followed to its end, and its id is logged, so that paid work can be found.
    """

    request: GenerationRequest | None
    """What is generated; None for a task known by its id alone."""
    record: NullRecord
    _context: RunnerContext
    task_id: str | None = None
    feed: SnapshotFeed = attrs.field(factory=SnapshotFeed, init=False)
    answered: SharedResult[None] = attrs.field(factory=SharedResult, init=False)
    """Set once there is a task id, or never will be one."""
    ended: SharedResult[Outcome] = attrs.field(factory=SharedResult, init=False)
    callers: tuple[int, ...] = attrs.field(default=(), init=False)
    """The priorities of those who have joined and not left."""
    _waits: int = attrs.field(default=0, init=False)
    """How many wait for the answer or the end. Whoever got the id from submit() has not left, but waits no longer."""
    _is_id_logged: bool = attrs.field(default=False, init=False)
    _logs_answer: bool = attrs.field(default=False, init=False)
    """Whether the id is logged once it is known, if nobody waits any more."""
    _withdrawal: FluxError | None = attrs.field(default=None, init=False)
    """Why the last caller has left, if that cancelled the submit."""
    _cancellation: SubmitCancellation = attrs.field(factory=SubmitCancellation, init=False)
    _waiting_elsewhere: bool = attrs.field(default=False, init=False)
    """Whether another process follows the request."""

    # ------------------------------------------------------------------ joining and leaving

    def join(self, policy: ReusePolicy, priority: int) -> None:
        """Count a caller; what it allows to be submitted again is allowed from now on."""
        self.callers += (priority,)
        self._waits += 1
        if policy is not self.record.policy:
            self.record.policy = self.record.policy.merge(policy)

    def leave(self, priority: int, reason: FluxError) -> None:
        """Count a caller out that has joined with this priority; the last one to leave cancels the submit."""
        index = self.callers.index(priority)
        self.callers = self.callers[:index] + self.callers[index + 1 :]
        self._waits -= 1
        if not self.callers:
            if self._cancellation.reason is None:
                self._withdrawal = reason
            self.cancel_submit(reason)

    def rejoin(self) -> bool:
        """Take back a cancelled submit for a new caller; return False if it is too late.

        While the session drains, it stays cancelled; the caller shares what becomes of the call on the wire, if any.
        """
        if self._context.polling.shutdown.draining:
            return not self.ended.done()
        if self.ended.done() or not self._cancellation.revoke():
            return False
        self._withdrawal = None
        return True

    def is_withdrawn(self, outcome: Outcome) -> bool:
        """Check whether an outcome is that nobody wanted the request any more before it was submitted."""
        return isinstance(outcome, Failed) and outcome.error is self._withdrawal

    def cancel_submit(self, reason: FluxError) -> None:
        """Submit nothing more. A call on the wire is finished, and the task it creates is polled."""
        self._cancellation.cancel(reason)

    # ------------------------------------------------------------------ waiting

    async def wait_as_caller(self, shared: SharedResult[T], priority: int, time_limit: TimeLimit | None = None) -> T:
        """Wait for `answered` or `ended`; a caller that is cancelled leaves.

        Args:
            shared: One of the two.
            priority: That with which the caller has joined.
            time_limit: When it leaves by itself.

        Raises:
            DeadlineExceededError: The time limit was over first.
        """
        try:
            if time_limit is None:
                future = shared.future()  # one frame less than wait(): thousands may wait here
                try:
                    await future
                except asyncio.CancelledError:
                    shared.discard(future)
                    raise
            elif not await time_limit.wait(shared):
                self.leave(priority, SessionClosedError("the timeout was over before the request was submitted"))
                if self.task_id is None:  # otherwise the error names it
                    self._log_if_abandoned()
                raise time_limit.exceeded(self.task_id)
        except asyncio.CancelledError:
            self.leave(priority, SessionClosedError("the caller was cancelled before the request was submitted"))
            self._log_if_abandoned()
            raise
        self._waits -= 1
        return shared.result()

    async def wait(self) -> Outcome:
        """Wait for the outcome; cancelling the wait cancels nothing else."""
        self.check_caller()
        self._waits += 1
        try:
            outcome = await self.ended.wait()
        except asyncio.CancelledError:
            self._waits -= 1
            self._log_if_abandoned()
            raise
        self._waits -= 1
        return outcome

    def check_caller(self) -> None:
        """Check that whoever waits for the end does so in the session's event loop; once it has ended, any will do."""
        if not self.ended.done():
            self._context.check_caller()

    def _log_if_abandoned(self) -> None:
        """Log the id, once, if nobody waits for the task: now, or when the submit that is on the wire is answered."""
        if self._cancellation.has_taken_effect:
            return
        if not self.answered.done():
            if not self._logs_answer:
                self._logs_answer = True
                self.answered.future().add_done_callback(self._on_answered)
        elif not self.ended.done() and self._is_abandoned():
            self._is_id_logged = True
            log.warning("task %s goes on, although nobody waits for it any more; attach() it later", self.task_id)

    def _on_answered(self, _: object) -> None:
        if not self.ended.done():
            self._log_if_abandoned()
            return
        outcome = self.ended.result()
        if isinstance(outcome, Failed) and isinstance(outcome.error, SubmissionUncertainError) and self._is_abandoned():
            self._is_id_logged = True
            log.warning("nobody waits any more for a request that failed: %s", outcome.error)

    def _is_abandoned(self) -> bool:
        return not (self._waits or self.feed.watchers or self._waiting_elsewhere or self._is_id_logged)
