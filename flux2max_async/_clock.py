"""How long the machine was suspended, which most clocks don't show."""

import sys
import time
from collections.abc import Callable

import attrs

_MIN_SUSPENSION = 1.0
"""Seconds; shorter ones have no effect."""


def continuous_clock(available: object, platform: str) -> int | None:
    """Return the clock that goes on while the machine is suspended; None if `time.monotonic()` does, or none is known.

    Args:
        available: Has the clocks of this platform, as the module `time` does.
        platform: The value of `sys.platform`.
    """
    # On Linux and macOS, `time.monotonic()`, and so the event loop's clock, stands still meanwhile. On Windows it goes
    # on. CLOCK_MONOTONIC of macOS is another clock than that of `time.monotonic()`, and the continuous one there.
    name = "CLOCK_MONOTONIC" if platform == "darwin" else "CLOCK_BOOTTIME"
    clock: int | None = getattr(available, name, None)
    return clock


_CLOCK = continuous_clock(time, sys.platform)


def suspended_seconds(clock: int | None = _CLOCK) -> float:
    """Return a number of seconds that grows by the duration of each suspension of the machine.

    Only differences mean anything. Without a continuous clock it is always 0.0.
    """
    return 0.0 if clock is None else time.clock_gettime(clock) - time.monotonic()


@attrs.define(eq=False)
class Interruptions:
    """The times in which a task could not be polled, because the machine was suspended or the event loop held up."""

    _suspended: Callable[[], float]
    """`suspended_seconds()`."""
    was_held_up: bool = attrs.field(default=False, init=False)
    """Whether a timer was late since a poll has found the task running: a webhook may have waited to be read."""
    _at_start: float = attrs.field(init=False)
    _at_poll: float = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self._at_start = self._at_poll = self._suspended()

    def begin_poll(self) -> None:
        """Record that a poll is sent now."""
        self._at_poll = self._suspended()

    def was_suspended(self) -> bool:
        """Return whether the machine was suspended since the last poll was sent."""
        return self._suspended() - self._at_poll >= _MIN_SUSPENSION

    def suspended_in_all(self) -> float:
        """Return for how many seconds the machine was suspended since polling began."""
        suspended = self._suspended() - self._at_start
        return suspended if suspended >= _MIN_SUSPENSION else 0.0
