"""The limit for submits after a 429: a pause, and an AIMD limit for the number of tasks in flight.

A 429 doesn't reveal whether the rate of requests or the number of tasks in flight is too high, so it has two effects:
all requests pause for as long as the service requests, and the current number of tasks in flight becomes a ceiling for
further submits, which are then sent one at a time, as probes. Each accepted submit raises the ceiling a little. So the
ceiling settles just below the limit of the service, with several accepted submits for each refused probe.

All times are seconds on one clock, which the caller reads.
"""

import math

import attrs

from flux2max_async._api.retry import DEFAULT_PAUSE, MAX_PAUSE

_BACKOFF_FACTOR = 1.5
_MAX_BACKOFF = 30.0
"""Seconds."""
_PROBE_INTERVAL = 30.0
"""Seconds after a refusal until a probe is sent although the ceiling is reached."""
_MAX_INCREASE, _MIN_INCREASE = 0.5, 1 / 16
"""How much one accepted submit raises the ceiling."""
_PROBES_AFTER_REFUSED_POLL = 3


# States of a SubmitLimiter, from the submits' point of view:
#
# - UNLIMITED: the ceiling is `max_in_flight` and no probes are left. Submits start concurrently.
# - LIMITED BY CEILING: the ceiling is below `max_in_flight`. One submit at a time, the probe. It starts if the ceiling
#   allows one more task in flight. Otherwise it starts 30 s after the last refusal, because tasks of other clients may
#   have reached the service's limit, and may have ended since.
# - LIMITED BY PROBES: a poll was refused, which doesn't indicate a limit for tasks in flight. Submits are probes,
#   without a ceiling, until 3 of them are accepted. Both limits may apply at the same time.
#
# In each state, `_paused_until` holds back all requests, and `_backoff_until` further submits.
#
# Transitions, all made by the ApiClient:
#
# - submit_refused (a 429): any state -> LIMITED BY CEILING. The ceiling becomes the number of tasks in flight, if that
#   is lower. If a probe is refused at about the same number as before, that number is the service's limit: the increase
#   is halved, so that the ceiling returns to it more slowly. From the second consecutive refusal on, a backoff applies
#   to submits, in addition to the pause. (A session with a single slot has no lower ceiling: it only pauses.)
# - poll_refused (a 429): any state -> LIMITED BY PROBES, in addition to a ceiling.
# - submit_accepted: raises the ceiling by the increase and uses up one probe; -> UNLIMITED once the ceiling is
#   `max_in_flight` and no probes are left.
# - submit_ended (any other result): only ends the probe.
#
# Invariants:
#
# - 1 <= ceiling <= max_in_flight.
# - In a limited state, at most one probe is on the wire. Only its own end allows the next one: a submit that started
#   before the refusal, when there were no probes, may end at any time and doesn't count.
# - Refusals of submits that were on the wire at the same time count as one.
# - A pause never exceeds 120 s, and is never shortened by a later response.
@attrs.define
class SubmitLimiter:
    """The limit that a session has learned from 429s.

    Args:
        max_in_flight: The session's own maximum number of tasks in flight.
    """

    _max_in_flight: int
    refused: bool = attrs.field(default=False, init=False)
    """Whether there ever was a 429; until then there is nothing to limit, and nothing to learn."""
    _paused_until: float = attrs.field(default=-math.inf, init=False)
    """When requests may be sent again, as the service requested."""
    _backoff_until: float = attrs.field(default=-math.inf, init=False)
    """When submits may be sent again, after consecutive refusals."""
    _ceiling: float = attrs.field(default=attrs.Factory(lambda self: self._max_in_flight, takes_self=True), init=False)
    """Maximum number of tasks in flight; fractional, because one accepted submit raises it by less than 1."""
    _increase: float = attrs.field(default=_MAX_INCREASE, init=False)
    _probes_left: int = attrs.field(default=0, init=False)
    """Submits that are still probes because a poll was refused."""
    _is_probing: bool = attrs.field(default=False, init=False)
    """Whether a probe is on the wire."""
    _consecutive_refusals: int = attrs.field(default=0, init=False)
    _last_refusal: float = attrs.field(default=-math.inf, init=False)
    _in_flight_at_refusal: int = attrs.field(default=-1, init=False)

    @property
    def is_limited(self) -> bool:
        """Whether submits are sent one at a time."""
        return self._ceiling < self._max_in_flight or self._probes_left > 0

    def pause_remaining(self, now: float) -> float:
        """Return the seconds until any request may be sent."""
        return max(0.0, self._paused_until - now)

    def submit_delay(self, now: float, in_flight: int) -> float:
        """Return the seconds until one more submit may start; infinite while a probe is on the wire.

        The end of a task or a submit may shorten the delay.

        Args:
            now: The current time.
            in_flight: The number of tasks that the service has accepted and that are not known to have ended.
        """
        if self._is_probing and self.is_limited:
            return math.inf
        delay = max(self.pause_remaining(now), self._backoff_until - now)
        if self._ceiling >= self._max_in_flight or in_flight + 1 <= self._ceiling:
            return delay
        return max(delay, self._last_refusal + _PROBE_INTERVAL - now)

    def submit_started(self) -> bool:
        """Record that a submit is sent; return whether it is a probe, which the call that records its end needs."""
        probe = self.is_limited
        self._is_probing = self._is_probing or probe
        return probe

    def submit_ended(self, *, probe: bool) -> None:
        """Record that a submit ended with neither a task nor a 429, so that nothing is learned from it."""
        if probe:
            self._is_probing = False

    def submit_accepted(self, in_flight: int, *, probe: bool) -> None:
        """Record that a submit created a task, which `in_flight` already includes."""
        self.submit_ended(probe=probe)
        self._consecutive_refusals = 0
        if in_flight > self._in_flight_at_refusal:
            self._increase = _MAX_INCREASE  # the limit has risen since the last refusal
        self._probes_left = max(self._probes_left - 1, 0)
        if self._ceiling < self._max_in_flight:
            self._ceiling = min(max(self._ceiling + self._increase, in_flight), self._max_in_flight)

    def submit_refused(self, now: float, in_flight: int, retry_after: float | None, *, probe: bool) -> None:
        """Record that a submit was refused with 429.

        Args:
            now: The current time.
            in_flight: The number of tasks in flight.
            retry_after: The seconds to wait that the service requests, if it does.
            probe: Whether the submit was a probe.
        """
        self.submit_ended(probe=probe)
        if probe or not self._consecutive_refusals:
            self._consecutive_refusals += 1
        is_same_limit = probe and abs(in_flight - self._in_flight_at_refusal) <= 1
        self._increase = max(self._increase / 2, _MIN_INCREASE) if is_same_limit else _MAX_INCREASE
        self._in_flight_at_refusal = in_flight
        self._ceiling = max(1.0, min(self._ceiling, in_flight, self._max_in_flight - 1))
        self._last_refusal = now
        if self._consecutive_refusals > 1:
            exponent = min(self._consecutive_refusals - 1, 20)  # a larger power could overflow
            self._backoff_until = now + min(_BACKOFF_FACTOR**exponent, _MAX_BACKOFF)
        self._extend_pause(now, retry_after)

    def poll_refused(self, now: float, retry_after: float | None) -> None:
        """Record that a poll was refused with 429.

        Args:
            now: The current time.
            retry_after: The seconds to wait that the service requests, if it does.
        """
        self._probes_left = _PROBES_AFTER_REFUSED_POLL
        self._extend_pause(now, retry_after)

    def _extend_pause(self, now: float, retry_after: float | None) -> None:
        self.refused = True
        seconds = DEFAULT_PAUSE if retry_after is None else retry_after
        self._paused_until = max(self._paused_until, now + min(seconds, MAX_PAUSE))
