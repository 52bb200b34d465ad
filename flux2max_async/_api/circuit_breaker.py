"""A circuit breaker for submits: stops paying when answers are lost, or when something else answers in the API's place.

Pure: it does no I/O and reads no clock.
"""

import attrs

_MAX_FOREIGN_ANSWERS = 3
"""So many submits in a row may be answered by a proxy or firewall before the rest is not sent."""


@attrs.define(eq=False)
class Attempt:
    """A submit that was sent."""

    row: int = 0
    """The row of uncertain submits in which it was sent; if it is uncertain, the one that it belongs to."""
    is_probe: bool = False


# States of a CircuitBreaker:
#
# - CLOSED: fewer than `max_uncertain` submits in a row were uncertain. Submits start concurrently.
# - HALF OPEN: at least so many were. One submit at a time, the probe. The next one starts when it is known what became
#   of the probe; if its answer was lost, a webhook may still tell.
#
# Transitions, all made by the ApiClient:
#
# - on_answer: the service itself has accepted or refused a submit, and the row ends; any state -> CLOSED.
# - on_uncertain: one more in the row; CLOSED -> HALF OPEN once there are `max_uncertain`. It is followed by one of:
#   - resolve: a webhook has reported what became of the submit, which doesn't count any more; -> CLOSED once fewer than
#     `max_uncertain` are left.
#   - is_failed_probe, and release: nobody will report that. If it is the probe, and the row has not ended meanwhile,
#     the service still loses answers: streams stop with its error, and then the next probe may start.
# - release: nothing was learned. The next probe may start.
#
# Submits that were on the wire when the breaker opened are not probes, nor is a probe whose row has ended.
@attrs.define(eq=False)
class CircuitBreaker:
    """Counts the submits in a row whose answers were lost, or were not the API's own.

    Args:
        max_uncertain: The number of uncertain submits in a row after which submits are probes; None for no limit.
    """

    _max_uncertain: int | None
    has_failures: bool = attrs.field(default=False, init=False)
    """Whether anything has failed since the last answer; until then there is nothing to record but failures."""
    _row: int = attrs.field(default=0, init=False)
    _uncertain: int = attrs.field(default=0, init=False)
    """Uncertain submits in the current row that are not resolved."""
    _foreign_answers: int = attrs.field(default=0, init=False)
    """Answers in a row that were not the API's own."""
    _probe: Attempt | None = attrs.field(default=None, init=False)
    """The probe of which nothing is known yet."""

    @property
    def is_closed(self) -> bool:
        """Whether submits may start concurrently."""
        return self._max_uncertain is None or self._uncertain < self._max_uncertain

    @property
    def blocks(self) -> bool:
        """Whether the next submit has to wait for the probe."""
        return self._probe is not None and not self.is_closed

    def start(self) -> Attempt:
        """Record that a submit is sent."""
        attempt = Attempt(self._row, is_probe=not self.is_closed)
        if attempt.is_probe:
            self._probe = attempt
        return attempt

    def on_answer(self) -> None:
        """Record that the service has accepted or refused a submit."""
        self._row += 1
        self.has_failures = False
        self._uncertain = self._foreign_answers = 0
        self._probe = None

    def on_foreign_answer(self, attempt: Attempt) -> bool:
        """Record the answer of a proxy or firewall; return whether it is one of too many in a row."""
        self.has_failures = True
        self._foreign_answers += 1
        self.release(attempt)
        return self._foreign_answers >= _MAX_FOREIGN_ANSWERS

    def on_uncertain(self, attempt: Attempt) -> None:
        """Record that the answer to a submit was lost."""
        self.has_failures = True
        attempt.is_probe = attempt.is_probe and attempt.row == self._row
        attempt.row = self._row
        self._uncertain += 1

    def resolve(self, attempt: Attempt) -> None:
        """Record that a webhook has reported what became of an uncertain submit."""
        if attempt.row == self._row:
            self._uncertain -= 1
        self.release(attempt)

    def is_failed_probe(self, attempt: Attempt) -> bool:
        """Return whether an uncertain submit shows that the service still loses answers, so that streams have to stop.

        The next probe must not start before they have.
        """
        return attempt.is_probe and attempt.row == self._row and not self.is_closed

    def release(self, attempt: Attempt) -> None:
        """Allow the next probe to start, if the attempt was the current one."""
        if self._probe is attempt:
            self._probe = None
