"""Polls one task until it ends, and takes the webhook that may be faster."""

import logging
import random

import attrs

from flux2max_async._api.codec import HttpRequest, build_poll
from flux2max_async._api.give_up import PollLimit
from flux2max_async._api.retry import is_lasting
from flux2max_async._api.task_object import reported_status
from flux2max_async._exceptions import DeadlineExceededError, FluxError
from flux2max_async._models.results import TaskSnapshot
from flux2max_async._polling.context import PollingContext, PollStart
from flux2max_async._polling.deadline import MAX_LATENESS, Deadline
from flux2max_async._polling.failures import PollFailures
from flux2max_async._polling.schedules import ScaledPlan
from flux2max_async._polling.updates import SnapshotFeed, Wakeup
from flux2max_async._text import get_logger

log = get_logger("polling")

_JITTER, _MAX_JITTER = 0.1, 0.25
"""Delays vary by so much of themselves, and by so many seconds at most."""
_WATCH_INTERVAL = 10.0
"""A longer sleep is divided, to notice after so many seconds, or an eighth of it, that the machine was suspended."""
_MAX_STATUS_LENGTH = 80
"""Characters of an unknown status in a message."""


@attrs.define(eq=False, repr=False)
class TaskPoller:
    """Polls one task.

    The loop in `run()` repeats three steps until the feed has a final snapshot:

    - waiting: sleep until the next poll is due. The plan decides when, and after a failed poll the backoff does. A
      final poll comes just before the deadline and just before the session's drain ends. Pauses that the service asked
      for and the session's poll limit delay a poll; the limit never delays the final one. A `Deadline` that has passed
      while the process was held up allows one more poll, and the machine's suspension calls for one.
    - polling: one GET. A failed poll is not a failed task: it is repeated until `PollFailures` finds that the failures
      in a row end the task.
    - ended: `run()` returns the final snapshot, or raises the reason why the task is not followed any more.

    Any time, `on_webhook()` can publish a final snapshot: it cuts the sleep short or gives up the poll on the wire.
    """

    _context: PollingContext
    _start: PollStart
    _feed: SnapshotFeed
    polls: int = attrs.field(default=0, init=False)
    ended_by_webhook: bool = attrs.field(default=False, init=False)
    _wakeup: Wakeup = attrs.field(factory=Wakeup, init=False)
    _deadline: Deadline = attrs.field(init=False)
    _last_poll_at: float = attrs.field(default=0.0, init=False)
    """When the last poll was answered or given up; at first, when polling began."""
    _progress: float | None = attrs.field(default=None, init=False)
    """What the newest poll reported; progress in a webhook was measured at an unknown time."""
    _running_until: float = attrs.field(default=0.0, init=False)
    """Seconds from the submit to the newest poll that found the task running."""
    _webhook_cost_factor: float = attrs.field(default=1.0, init=False)
    """By which the newest poll was planned."""
    _failures: PollFailures = attrs.field(factory=PollFailures, init=False)
    """In a row."""
    _poll_now: bool = attrs.field(default=False, init=False)
    """Whether a webhook that can't be read calls for a poll."""
    _limit: PollLimit | None = attrs.field(default=None, init=False)
    """That of the poll that is on the wire."""

    def __attrs_post_init__(self) -> None:
        context = self._context
        self._deadline = Deadline.create(self._start.deadline, context.task_timeout, context.client.suspended)

    @property
    def elapsed(self) -> float:
        """Seconds since the submit, or the attach."""
        return self._context.client.now() - self._start.started

    def listen(self) -> None:
        """Take webhooks for the task from now on, and those that have arrived already."""
        self._feed.on_first_watcher = self._on_first_watcher
        if self._start.webhook is not None:
            self.on_webhook(self._start.webhook)
        if self._context.registry.in_use:
            early = self._context.registry.add(self._start.task_id, self)
            if early is not None:
                self.on_webhook(early)

    def on_webhook(self, snapshot: TaskSnapshot | None) -> None:
        """Process a verified webhook; None, if its content can't be read, is a reason to poll at once."""
        if self._feed.ended:
            return
        if snapshot is None:
            self._poll_now = True
            self._wakeup.wake()
        elif snapshot.status.ended:
            self._feed.publish(snapshot)
            self.ended_by_webhook = True
            if self._limit is not None:
                self._limit.give_up()
            self._wakeup.wake()
        elif (snapshot.progress or 0.0) > self._feed.progress:
            self._feed.publish(snapshot)

    async def wait_closed(self) -> None:
        """Wait until the end has been recorded, or the task is not followed any more."""
        await self._feed.wait_closed()

    def replan(self) -> None:
        """Plan the next poll anew: what it depends on has changed."""
        self._wakeup.wake()

    async def run(self) -> TaskSnapshot:
        """Poll until the task has ended; call `listen()` first.

        Raises:
            FluxError: Why the task is not followed to its end.
        """
        request = build_poll(self._start.task_id)
        plan = ScaledPlan(self._context.schedule, self._start.request)
        self._progress = self._feed.snapshot.progress if self._feed.snapshot else None
        self._last_poll_at = self._context.client.now()
        while not self._feed.ended:
            if await self._wait_until_due(plan):
                await self._poll(request)
        return self._ended(plan)

    def close(self) -> None:
        """Take no more webhooks: the end has been recorded, or the task is not followed any more."""
        self._context.registry.remove(self._start.task_id, self)

    def _ended(self, plan: ScaledPlan) -> TaskSnapshot:
        snapshot, start, registry = self._feed.snapshot, self._start, self._context.registry
        assert snapshot is not None
        if start.submitted_here:
            self._learn(plan, completed=snapshot.error is None)
        if start.expects_webhook and not registry.closed:
            if self.ended_by_webhook:
                registry.reliability.record_webhook()
            elif self.polls:
                interval = self._last_poll_at - start.started - self._running_until
                registry.reliability.record_poll(
                    start.task_id, self._last_poll_at, interval=interval, cost_factor=self._webhook_cost_factor
                )
        return snapshot

    def _learn(self, plan: ScaledPlan, *, completed: bool) -> None:
        """Report to the schedule when the task ended."""
        start, not_before, by = self._start, self._running_until, self.elapsed
        # While the machine was suspended, the task went on, and the event loop's clock did not.
        suspended = self._deadline.suspended_in_all()
        # The webhook of a lost submit may have come long before it was known that the answer is lost.
        if self.ended_by_webhook and start.webhook is None and not self._deadline.was_held_up:
            if self._context.registry.reliability.is_prompt:
                not_before = not_before if suspended else by
            else:
                # Learn what the next poll would have told: with less, ends would seem to come later than they do.
                by = max(by, self._last_poll_at - start.started + self._planned_delay(plan))
        plan.finish(not_before, by + suspended, completed=completed)

    # ------------------------------------------------------------------ when to poll

    async def _wait_until_due(self, plan: ScaledPlan) -> bool:
        """Sleep until the next poll may be made; return False if it has to be planned anew, or is not needed."""
        if not await self._sleep_until_due(self._delay(plan)):
            return False
        limiter = self._context.client.poll_limiter
        if (limiter.refused or self._failures.count) and not await self._wait_out_pause():
            return False
        if not await self._wait_for_reservation():
            return False
        # Others may have been refused in the meantime.
        return not limiter.refused or await self._wait_out_pause()

    async def _wait_for_reservation(self) -> bool:
        """Wait for the session's poll limit, but not beyond the final poll; return False if the task has ended."""
        client = self._context.client
        if (wait := client.reserve_poll()) > 0:
            reserved_for = client.now() + wait
            # Waking up doesn't lose the reservation.
            while not self._feed.ended and (wait := min(reserved_for - client.now(), self._until_final_poll())) > 0:
                await self._sleep(wait)
        return not self._feed.ended

    async def _wait_out_pause(self) -> bool:
        """Wait as long as the service asked this poll, or all polls, to wait; return False if woken."""
        while (pause := self._pause(random.random())) > 0:
            if not await self._sleep(pause):
                return False
        return True

    def _pause(self, chance: float = 0.0) -> float:
        client = self._context.client
        return max(client.pause(chance), self._failures.refused_until - client.now())

    def _delay(self, plan: ScaledPlan) -> float:
        """Return the seconds until the next poll is due."""
        if self._poll_now:
            return 0.0
        if self._failures.count:
            retry_delay = self._failures.retry_delay(self._last_poll_at, random.random())
            return min(self._remaining(retry_delay), self._until_final_poll())
        if self._feed.snapshot is None:
            return 0.0  # submitted elsewhere: it may have ended long ago
        delay = self._planned_delay(plan)
        delay = self._remaining(delay + min(_JITTER * delay, _MAX_JITTER) * random.uniform(-1, 1))
        return min(delay, self._until_final_poll())

    def _planned_delay(self, plan: ScaledPlan) -> float:
        """Return the plan's delay; it grows with the cost of a poll.

        Where a webhook will probably bring the end, a poll costs more. But webhooks report no progress: while somebody
        follows the updates, polls are as cheap as without webhooks.
        """
        elapsed = self._last_poll_at - self._start.started
        expected = self._start.expects_webhook and not self._feed.watchers
        self._webhook_cost_factor = webhook_factor = self._context.registry.cost_factor if expected else 1.0
        if plan.cost_aware:
            return plan.next_delay(
                elapsed, self._progress, cost_factor=self._context.client.poll_cost_factor() * webhook_factor
            )
        return plan.next_delay(elapsed, self._progress, cost_factor=webhook_factor)

    def _until_final_poll(self) -> float:
        """Return the seconds until the final poll; infinity once it has been made."""
        return self._deadline.until_final_poll(self._context.client.now(), self._context.shutdown.final_poll_at)

    def _remaining(self, delay: float) -> float:
        """Return what is left of a delay that began with the last poll: waking up doesn't restart it."""
        return max(0.0, self._last_poll_at + delay - self._context.client.now())

    async def _sleep_until_due(self, delay: float) -> bool:
        """Sleep like `_sleep()`, but only until the machine was suspended: the task has probably ended meanwhile."""
        if self._failures.count:  # the service may have asked to wait
            return await self._sleep(delay)
        now, step = self._context.client.now, max(_WATCH_INTERVAL, delay / 8)
        due_at = now() + delay
        while (left := max(due_at - now(), 0.0)) > step:
            if self._deadline.was_suspended():
                return await self._sleep(0.0)
            if not await self._sleep(step):
                return False
        return await self._sleep(left)

    async def _sleep(self, delay: float) -> bool:
        """Sleep, but not beyond the deadline; return False if woken, or if the task has ended."""
        now = self._context.client.now
        remaining = max(self._deadline.at - now(), 0.0)
        wakes_at = now() + min(delay, remaining)
        undisturbed = await self._wakeup.sleep(min(delay, remaining))
        if now() > wakes_at + MAX_LATENESS:
            self._deadline.was_held_up = True
        if self._feed.ended:
            return False
        if undisturbed and delay >= remaining:
            if self._deadline.is_over(now(), is_paused=self._pause() > 0):
                raise self._deadline_error()
            self._deadline.extend(now())
        return undisturbed

    def _deadline_error(self) -> DeadlineExceededError:
        status = self._feed.snapshot and reported_status(self._feed.snapshot)
        known = f"its last status was {status[:_MAX_STATUS_LENGTH]!r}" if status else "no poll has found its status"
        return DeadlineExceededError(
            f"task {self._start.task_id} has not ended within {self._context.task_timeout:g} s: {known}; "
            "attach() it later",
            task_id=self._start.task_id,
        )

    def _on_first_watcher(self) -> None:
        if self._start.expects_webhook:
            self._wakeup.wake()

    # ------------------------------------------------------------------ one poll

    async def _poll(self, request: HttpRequest) -> None:
        client, start = self._context.client, self._start
        sent_at, is_answered = client.now(), False
        within = self._deadline.begin_poll(sent_at)
        if self._deadline.at > start.deadline:
            log.info("task %s: its deadline passed while nothing could run: one more poll", start.task_id)
        self.polls += 1
        self._poll_now = False
        self._limit = limit = client.limit_poll(within, gives_up=not self._deadline.is_extended)
        try:
            snapshot = await client.poll(
                request,
                start.task_id,
                limit,
                request=start.request,
                within=within,
                fresh_connection=self._failures.is_slow,
            )
        except FluxError as error:
            if not self._feed.ended:  # otherwise a webhook was faster
                self._on_failed_poll(error)
        else:
            is_answered = True
            if self._failures.count:
                self._failures.reset()
            self._progress = snapshot.progress
            self._feed.publish(snapshot)
            if not self._feed.ended:
                self._running_until = sent_at - start.started
            log.debug(
                "task %s: poll %d: %s, progress %s", start.task_id, self.polls, snapshot.status, snapshot.progress
            )
        finally:
            self._limit = None
            self._last_poll_at = client.now()
            self._deadline.end_poll(sent_at, self._last_poll_at, is_answered=is_answered)

    def _on_failed_poll(self, error: FluxError) -> None:
        """Record a failed poll; raise if another one would be pointless."""
        age, task_id = self._start.age, self._start.task_id
        final = self._failures.record(
            error, self._context.client.now(), elapsed=None if age is None else age + self.elapsed
        )
        if final is error:
            raise error
        if final is not None:
            final.message = f"task {task_id}: {final.message}"
            raise final from error
        self._context.client.count_retry()
        level = logging.DEBUG if self._failures.is_known else logging.WARNING
        rest = "; it is polled until its deadline" if is_lasting(error, error) else ""
        log.log(level, "task %s: poll %d failed (%s)%s", task_id, self.polls, error, rest)
