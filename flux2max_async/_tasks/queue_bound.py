"""How many requests may wait for a slot, and how long that takes by what was learned."""

import asyncio

import attrs

from flux2max_async._exceptions import QueueFullError
from flux2max_async._polling.context import PollingContext
from flux2max_async._polling.learned import LearnedSchedule
from flux2max_async._stats import SessionCounters
from flux2max_async._tasks.slots import SlotQueue

_PERCENTILES = range(10, 100, 10)
"""Their mean is about that of all durations, without rare ones."""
_MAX_AGE = 1.0
"""Seconds after which the mean duration is computed anew: thousands of visitors may ask."""


@attrs.define(eq=False)
class QueueBound:
    """The bound of the queue, and estimates of the time in it."""

    _slots: SlotQueue
    _max_waiting: int | None
    _polling: PollingContext
    stats: SessionCounters
    reserved: int = attrs.field(default=0, init=False)
    """Requests that have no place in the queue yet, and count as waiting."""
    _mean_duration: float | None = attrs.field(default=None, init=False)
    _computed_at: float | None = attrs.field(default=None, init=False)

    def check_room(self, group: str | None) -> None:
        """Check that one more request may wait, or need not wait.

        Raises:
            QueueFullError: As many as may wait are waiting.
        """
        slots = self._slots
        if self._max_waiting is None or slots.has_free(group):
            return
        if slots.counted + self.reserved < self._max_waiting + slots.soon_free:
            return
        raise QueueFullError(
            f"the queue is full: {slots.counted + self.reserved} requests wait for a slot",
            waiting=slots.waiting,
            retry_after=self.seconds_until_slot(slots.waiting + 1),
        )

    def seconds_until_slot(self, position: int) -> float | None:
        """Return how long a request at a position waits for its slot; None if no duration was learned yet."""
        duration, running = self.mean_duration(), self._slots.held
        if duration is None:
            return None
        if self._polling.client.submit_limiter.is_limited:
            # The service allows fewer tasks than there are slots: those that hold one and wait are before it, too.
            running = min(running, self.stats.in_flight + self.stats.submitting)
        return (position + self._slots.held - running) * duration / max(running, 1)

    def mean_duration(self) -> float | None:
        """Return the mean duration of tasks in seconds, as the schedule has learned it; None if it has not."""
        now = asyncio.get_running_loop().time()
        if self._computed_at is None or now >= self._computed_at + _MAX_AGE:
            self._computed_at = now
            schedule = self._polling.schedule
            if isinstance(schedule, LearnedSchedule):
                known = [schedule.percentile(percent) for percent in _PERCENTILES]
                self._mean_duration = None if None in known else sum(filter(None, known)) / len(known)
        return self._mean_duration
