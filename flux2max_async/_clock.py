"""How long the machine was suspended, which most clocks don't show."""

import sys
import time


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
