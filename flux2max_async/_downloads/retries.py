"""When a failed download is tried again, and when its task is asked for a fresh URL. Pure functions of the time."""

import math
from datetime import datetime

import attrs

from flux2max_async._api.retry import backoff, is_lasting, min_delay
from flux2max_async._exceptions import FluxError

RETRY_WINDOW = 60.0
"""Seconds for which failures in a row are followed by another attempt."""
EXPIRY_GRACE = 10.0
"""Seconds for which a young URL may be refused before its task is asked for a fresh one: right after the end of a task
its URL may not work yet."""
YOUNG_AGE = 60.0
"""Seconds since a URL was received for which a refusal may mean that it doesn't work yet."""


@attrs.define
class Retries:
    """The failures of a download in a row.

    The row begins with the first failure. It is over when an attempt fails that began at least `RETRY_WINDOW` later:
    the last wait is cut so that there is always one.
    """

    failures: int = 0
    is_last: bool = False
    """Whether the next failure ends the row."""
    _end: float = 0.0
    _last: Exception | None = None

    def add(self, now: float, failure: Exception) -> bool:
        """Count a failure, and return whether the row is over.

        Args:
            now: The time in seconds, by any clock.
            failure: The failure. One that lasts ends the row.
        """
        is_hopeless, self._last = is_lasting(failure, self._last), failure
        if self.failures == 0:
            self._end = now + RETRY_WINDOW
        self.failures += 1
        return self.is_last or is_hopeless

    def next_delay(self, now: float, jitter: float, *, at_most: float = math.inf) -> float:
        """Return the delay before the next attempt in seconds.

        Args:
            now: As for `add()`.
            jitter: A new random number from 0.0 to 1.0.
            at_most: Seconds after which an attempt would be useful, if the server requested nothing.
        """
        asked = 0.0 if self._last is None else min_delay(self._last)
        delay = max(min(backoff(self.failures, jitter), at_most), asked)
        remaining = max(0.0, self._end - now)
        self.is_last = delay >= remaining
        return min(delay, remaining)


@attrs.define
class Link:
    """The URL of an image, and whether its task has been asked for a fresh one, which happens once."""

    url: str
    received_at: datetime | None
    """None if nobody knows: it counts as young."""
    is_fresh: bool = False
    """Whether the task has returned it when it was asked."""
    problem: FluxError | IndexError | None = None
    """Why the task has no fresh URL, if it was asked and has none."""
    _grace_end: float | None = None

    def is_young(self, time: datetime) -> bool:
        """Return whether a refusal may mean that the URL doesn't work yet."""
        return self.is_fresh or self.received_at is None or (time - self.received_at).total_seconds() < YOUNG_AGE

    def needs_renewal(self, now: float, time: datetime, *, is_over: bool) -> bool:
        """Return whether the task should be asked now, after the URL was refused.

        Args:
            now: The time in seconds, by any clock.
            time: The date and time.
            is_over: Whether there would be no further attempt.
        """
        self._grace_end = now + EXPIRY_GRACE if self._grace_end is None else self._grace_end
        if self.is_fresh or self.problem is not None:
            return False
        return is_over or not self.is_young(time) or now >= self._grace_end

    def until_renewal(self, now: float) -> float:
        """Return the seconds until the task is asked if the URL is still refused; infinite if it won't be asked."""
        if self.is_fresh or self._grace_end is None or now >= self._grace_end:
            return math.inf
        return self._grace_end - now
