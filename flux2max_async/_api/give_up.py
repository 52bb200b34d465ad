"""The time limit of a poll on the wire, which is given up if it takes far longer than polls usually do."""

import math

import attrs

from flux2max_async._api.poll_timeout import MIN_SECONDS, PollTimeout, SlowPollError
from flux2max_async._api.response_content import LARGE_RESPONSE_BYTES
from flux2max_async._timeouts import Timeout


@attrs.define(eq=False)
class PollLimit(Timeout):
    """The context of the exchange of a poll; raises SlowPollError if it is given up.

    That is if nothing comes for longer than polls usually take. The limit for that is the one at the time at which the
    poll is sent; if what polls take has been learned since, it is the lower one. It begins anew with each part of the
    answer, because an image in it may take long. A large answer has no such limit: it may have to wait until others
    have been read.

    Args:
        seconds: How long the poll may take in any case.
        learned: What polls usually take.
        gives_up: Whether it is given up at all.
    """

    _learned: PollTimeout
    _gives_up: bool
    _usual: float = attrs.field(init=False)
    """Seconds that polls usually take at most."""
    _started: float = attrs.field(init=False)
    _silent_since: float = attrs.field(init=False)
    """When something came last."""
    _first_data_after: float = attrs.field(default=math.nan, init=False)
    """Seconds until the answer began."""
    _problem: str = attrs.field(default="", init=False)
    """Why the poll was given up."""

    def give_up(self) -> None:
        """End the poll now: it is not needed any more."""
        if not self.is_over:
            self._problem = "given up"
            super()._end()

    def on_data(self, received: int) -> None:
        """Record that a part of the answer has come."""
        self._silent_since = self._loop.time()
        if not received:
            self._first_data_after = self._silent_since - self._started
        elif received > LARGE_RESPONSE_BYTES:
            self._gives_up = False

    def record_answer(self) -> None:
        """Learn from the answer what polls take."""
        self._learned.record_answer(self._first_data_after)

    def _begin(self) -> None:
        self._started = self._silent_since = self._loop.time()
        self._usual = self._learned.seconds
        self._start(self._started + min(self.seconds, self._usual, MIN_SECONDS))

    def _end(self) -> None:
        ends_at = self._started + self.seconds
        self._usual = min(self._usual, self._learned.seconds)
        given_up_at = self._silent_since + self._usual if self._gives_up else math.inf
        if self._loop.time() < min(ends_at, given_up_at):
            self._start(min(ends_at, given_up_at))
            return
        if given_up_at < ends_at:
            self._learned.record_given_up(self._usual)
            self._problem = f"no answer within {self._usual:.1f} s"
        super()._end()

    def _error(self) -> Exception:
        return SlowPollError(self._problem, maybe_sent=True) if self._problem else super()._error()
