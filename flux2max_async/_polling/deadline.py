"""When a task is given up: at its deadline, and never without a poll that could have found its end. No I/O.

The event loop may have been blocked, the process stopped or the machine suspended when the deadline came.
"""

import math
from collections.abc import Callable

import attrs

GRACE_PERIOD = 5.0
"""Seconds for one more poll if the deadline has passed while this process was held up."""
MAX_LATENESS = 0.5
"""Seconds by which a timer may be late. One that is later shows that the event loop was blocked, the process stopped,
or the machine suspended."""
_MIN_SUSPENSION = 1.0
"""Seconds; shorter suspensions of the machine have no effect."""
_FINAL_POLL_MARGIN = 1.0
"""Seconds before the deadline at which a task is polled for the last time."""
_MAX_LATE_POLLS = 3
"""A loop that is always late must not put the end off for ever."""
_CLOCK_TOLERANCE = 0.01
"""Seconds by which a timer may fire early."""


# States of a Deadline:
#
# - WAITING: the final poll has not been made. It is due `_margin` before the deadline.
# - POLLED: a poll that was sent since then was answered, or failed on time. The deadline ends the task.
#
# An extension puts the deadline off by the grace period, in which a final poll is due at once: -> WAITING. There is one
#
# - if the final poll is sent so late that it would have less than half of its time;
# - if the deadline has come, and the final poll has not been made, or long ago: the loop, the process or the machine
#   was held up in between.
#
# The answer to a poll ends an extension, and so does its end once a poll has failed. While the service has asked all
# calls to wait, an extension is followed by the next.
@attrs.define(eq=False)
class Deadline:
    """The deadline of one task."""

    at: float
    """When the task is given up."""
    _margin: float
    """Seconds before the deadline at which the final poll is due."""
    _final_poll_at: float
    _suspended: Callable[[], float]
    """`suspended_seconds()`."""
    was_held_up: bool = attrs.field(default=False, init=False)
    """Whether a timer was late since a poll has found the task running: a webhook may have waited to be read."""
    _polled_at: float = attrs.field(default=-math.inf, init=False)
    """When the newest poll was sent that could have found the task's end."""
    is_extended: bool = attrs.field(default=False, init=False)
    """Whether the poll that is sent now is the last chance of the task."""
    _late_polls: int = attrs.field(default=0, init=False)
    """How many polls failed whose time was over late."""
    _suspended_at_start: float = attrs.field(init=False)
    _suspended_at_poll: float = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self._suspended_at_start = self._suspended_at_poll = self._suspended()

    @classmethod
    def create(cls, at: float, task_timeout: float, suspended: Callable[[], float]) -> "Deadline":
        """Return the deadline of a task that may take `task_timeout` seconds.

        Args:
            at: When it is given up.
            task_timeout: How long it may take.
            suspended: Returns a number of seconds that grows by the duration of each suspension of the machine.
        """
        margin = min(_FINAL_POLL_MARGIN, task_timeout / 10)
        return cls(at, margin, at - margin, suspended)

    def until_final_poll(self, now: float, drain_poll_at: float) -> float:
        """Return the seconds until the final poll; infinity once it has been made.

        Args:
            now: The current time.
            drain_poll_at: When the session's drain asks for a final poll; infinite if there is none.
        """
        final_poll_at = min(self._final_poll_at, drain_poll_at)
        return math.inf if self._is_polled_since(final_poll_at) else max(0.0, final_poll_at - now)

    def begin_poll(self, now: float) -> float:
        """Return the seconds that the poll which is sent now may take."""
        if now > self.at - self._margin / 2 and not self._is_polled_since(self._final_poll_at):
            self.extend(now)
        suspended = self._suspended()
        was_suspended = suspended - self._suspended_at_poll >= _MIN_SUSPENSION
        self._suspended_at_poll = suspended
        # After a suspension, its connection may be dead, which nothing but a timeout would reveal.
        return min(self.at - now, GRACE_PERIOD) if was_suspended else self.at - now

    def end_poll(self, sent_at: float, now: float, *, is_answered: bool) -> None:
        """Record the end of a poll."""
        if is_answered:
            self.was_held_up = False
            # One that was slow, and is answered while the final poll is due, is as good as that.
            self._polled_at = now if now - sent_at <= GRACE_PERIOD else sent_at
            if self.is_extended:
                self.at = min(self.at, now)
        elif now <= self.at + MAX_LATENESS or self._late_polls >= _MAX_LATE_POLLS:
            # One that has hung until the deadline has waited for an answer all the time. But if its own timer was late,
            # the answer may be there, unread.
            self._polled_at = now if now >= self.at - _CLOCK_TOLERANCE else sent_at
        else:
            self._late_polls += 1

    def is_over(self, now: float, *, is_paused: bool) -> bool:
        """Return whether the deadline, which has come, ends the task; if not, it has to be extended.

        Args:
            now: The current time.
            is_paused: Whether the service has asked all calls to wait, so that there was no final poll.
        """
        if self._is_polled_since(self._final_poll_at):
            return now <= self.at + GRACE_PERIOD or self._late_polls >= _MAX_LATE_POLLS
        return is_paused and not self.is_extended and now <= self.at + MAX_LATENESS

    def extend(self, now: float) -> None:
        """Put the deadline off until one more poll can have been answered."""
        self.is_extended = True
        self._final_poll_at, self.at = now, now + GRACE_PERIOD

    def _is_polled_since(self, time: float) -> bool:
        return self._polled_at >= time - _CLOCK_TOLERANCE

    def was_suspended(self) -> bool:
        """Return whether the machine was suspended since the last poll was sent."""
        return self._suspended() - self._suspended_at_poll >= _MIN_SUSPENSION

    def suspended_in_all(self) -> float:
        """Return for how many seconds the machine was suspended since polling began."""
        suspended = self._suspended() - self._suspended_at_start
        return suspended if suspended >= _MIN_SUSPENSION else 0.0
