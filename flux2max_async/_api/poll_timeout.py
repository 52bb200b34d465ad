"""How long a poll may take: several times as long as polls usually do. No I/O."""

import math

import attrs

from flux2max_async._exceptions import TransportError

MIN_SECONDS = 2.0
"""The limit is never lower."""
_FACTOR = 4.0
"""A poll may take so many times as long as the slow ones."""
_RISE, _FALL = 1.25, 0.975
"""A slower poll raises the estimate by a quarter; nine faster ones lower it as much. So one in ten is slower."""
_CONFIRMATIONS = 2
"""So many polls in a row that took too long mean that the gateway is slow."""


class SlowPollError(TransportError):
    """A poll that was given up because polls usually take far less."""


@attrs.define(eq=False)
class PollTimeout:
    """The time limit for a poll, as a session has learned it.

    It is a multiple of the 90th percentile of what polls took, estimated from each answer. A poll that was given up
    counts as slower. So one that hangs now and then has little effect; but if most are slow, the estimate rises until
    they are answered. Because that may take many polls, each two in a row that are given up also double the limit,
    until a poll is answered within the usual time.

    Args:
        max_seconds: The HTTP timeout.
    """

    _max_seconds: float
    seconds: float = attrs.field(init=False)
    """The limit for a poll that is sent now."""
    _slow: float = attrs.field(default=math.nan, init=False)
    """What all but one in ten polls take at most; not a number until something was answered."""
    _given_up: int = attrs.field(default=0, init=False)
    """Polls in a row that took longer than the current limit."""

    def __attrs_post_init__(self) -> None:
        self.seconds = self._max_seconds

    def record_answer(self, took: float) -> None:
        """Record an answer to a poll.

        Args:
            took: Seconds from the beginning of the exchange to the answer.
        """
        if took > self._slow:
            self._slow *= _RISE
        elif took <= self._slow:
            self._slow *= _FALL
        else:
            self._slow = took
        self._given_up = 0
        usual = min(max(_FACTOR * self._slow, MIN_SECONDS), self._max_seconds)
        # An answer that took longer than usual came because the limit had been raised, which therefore stays.
        self.seconds = usual if took < usual or usual > self.seconds else self.seconds

    def record_given_up(self, seconds: float) -> None:
        """Record a poll that was given up.

        Args:
            seconds: Its limit.
        """
        self._slow *= _RISE
        if seconds >= self.seconds:  # otherwise the limit has been raised since
            self._given_up += 1
            if self._given_up >= _CONFIRMATIONS:
                self._given_up = 0
                self.seconds = min(self.seconds * 2, self._max_seconds)
