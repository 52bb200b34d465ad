"""The failed polls of one task: when the next one may be made, and when they end the task. No I/O."""

import math

import attrs

from flux2max_async._api.poll_timeout import SlowPollError
from flux2max_async._api.recent_refusals import pause_after, spread_pause
from flux2max_async._api.retry import MAX_PAUSE, backoff, is_lasting, is_unreadable, may_poll_again
from flux2max_async._exceptions import FluxError, ProtocolError, RateLimitedError, ResponseError, TaskNotFoundError

_MIN_UNREADABLE = 5
_MIN_REFUSALS = 3
_MIN_TIME = 10.0
"""Seconds."""


@attrs.define(eq=False)
class PollFailures:
    """The failures in a row of one task's polls.

    Most say nothing about the task, and the poll is repeated. Two kinds end the task, which is paid for, only if they
    come several times in a row over at least 10 s: the same refusal by the API three times, and an answer that can't be
    read five times.
    """

    count: int = 0
    is_known: bool = False
    """Whether the newest failure has the same lasting reason as the one before: one warning is enough."""
    _last: FluxError | None = None
    _kind: type[FluxError] | None = None
    """The kind of failure that is being confirmed."""
    _confirmations: int = 0
    _since: float = 0.0
    """When the first failure of this kind in the row came."""
    _retry_at: float = 0.0
    """Before this time the poll must not be repeated."""
    refused_until: float = -math.inf
    """Before this time no poll of the task may be made, not even a final one: the last one was refused with 429."""
    _is_refused: bool = False
    is_slow: bool = False
    """Whether the last poll was given up because it took far longer than usual."""

    def reset(self) -> None:
        """Record a poll that succeeded."""
        self.count = 0
        self._last = self._kind = None
        self.is_slow = False

    def record(self, error: FluxError, now: float, *, elapsed: float | None) -> FluxError | None:
        """Record a failed poll; return the error that ends the task, or None if the poll is to be repeated.

        Args:
            error: The error of the poll.
            now: The current time.
            elapsed: Seconds since the task's submit; None for a task that was submitted elsewhere.
        """
        repeats, unreadable = may_poll_again(error, elapsed=elapsed), is_unreadable(error)
        is_not_found = isinstance(error, TaskNotFoundError) and error.from_api
        if not repeats and (not isinstance(error, ResponseError) or (is_not_found and elapsed is None)):
            return error
        self.count += 1
        self.is_known = is_lasting(error, error) and getattr(self._last, "fault", None) == getattr(error, "fault", None)
        self._last = error
        self._retry_at = now + min(getattr(error, "retry_after", None) or 0.0, MAX_PAUSE)
        self.is_slow = isinstance(error, SlowPollError)
        self._is_refused = False
        if isinstance(error, RateLimitedError):
            self._retry_at = self.refused_until = now + pause_after(error.retry_after)
            self._is_refused = True
        if repeats and not unreadable and not is_not_found:
            self._kind = None
            return None
        self._confirm(ProtocolError if unreadable else type(error), now)
        missing = (_MIN_UNREADABLE if unreadable else _MIN_REFUSALS) - self._confirmations
        if repeats and not unreadable:  # a new task that is not visible yet
            return None
        if missing <= 0 and now >= self._since + _MIN_TIME:
            return ProtocolError(f"{self._confirmations} unreadable answers in a row: {error}") if unreadable else error
        if missing <= 1:
            self._retry_at = max(self._retry_at, self._since + _MIN_TIME)
        return None

    def _confirm(self, kind: type[FluxError], now: float) -> None:
        if kind is not self._kind:
            self._kind, self._confirmations, self._since = kind, 0, now
        self._confirmations += 1

    def retry_delay(self, last_poll_at: float, jitter: float) -> float:
        """Return the seconds from the last poll to the next attempt.

        Args:
            last_poll_at: When the failed poll was answered.
            jitter: A new random number from 0.0 to 1.0.
        """
        if self.is_slow and self.count == 1:
            return 0.0
        wait = max(self._retry_at - last_poll_at, 0.0)
        return max(backoff(self.count, jitter), spread_pause(wait, jitter) if self._is_refused else wait)
