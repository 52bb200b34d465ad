"""The limit for submits after frequent 429s: a pause, and limits for the tasks in flight and the rate of submits.

A few 429s may be chance, and each holds back its own submit only. Four or more among the last 20 submits are a limit.
They don't reveal whether the rate of submits or the number of tasks in flight is too high, so they have two effects:
all submits pause for as long as the service requests, and the current number of tasks in flight becomes a ceiling for
further submits, which are then sent one at a time, as probes. Each accepted submit raises the ceiling, by less where
the same number was refused before. So the ceiling settles just below the limit of the service, with several accepted
submits for each refused probe, and is soon gone if there is no such limit.

Once more tasks are in flight than at the last refusal, their number was not the reason: the rate was too high. Then
submits are also spread evenly, at the rate at which they were accepted from one refusal to the next while any waited,
which is what a token bucket allows. Each accepted one raises that rate a little, and it is given up if twice the rate
is accepted.

All times are seconds on one clock, which the caller reads.
"""

import math

import attrs

from flux2max_async._api.recent_refusals import RecentRefusals, pause_after

_BACKOFF_FACTOR = 1.5
_MAX_BACKOFF = 30.0
"""Seconds."""
_PROBE_INTERVAL = 30.0
"""Seconds after a refusal that confirms the ceiling until a probe is sent although the ceiling is reached."""
_MIN_INCREASE = 1 / 16
"""How much one accepted submit raises the ceiling, at least."""
_MARGIN = 2
"""More tasks in flight than are suspected to be the limit, by more than this; some of them may have ended unnoticed."""
_RATE_GROWTH = 1.01
"""Each accepted submit multiplies the rate by this."""
_RATE_KEPT = 0.9
"""What a new measurement leaves of the rate at least: refusals by chance come at any rate."""
_RATE_DISPROOF = 2.0
"""So many times the measured rate disproves a limit for it."""
_DISPROOF, _DISPROOF_ABOVE = 60, 8
"""So many accepted submits since the last refusal, so many of them with more tasks in flight, disprove a limit."""
_MAX_INCREASE_SHARE = 1 / 8
"""How much it raises the ceiling at most, as a share of `max_in_flight`."""


# States of a SubmitLimiter, from the submits' point of view:
#
# - UNLIMITED: the ceiling is `max_in_flight`, and `_max_on_wire` is infinite. Submits start concurrently.
# - LIMITED: the ceiling is below `max_in_flight`. One submit at a time, the probe. It starts if the ceiling allows one
#   more task in flight. Otherwise it starts 30 s after the last refusal, because tasks of other clients may have
#   reached the service's limit, and may have ended since.
# - RECOVERING: the ceiling is `max_in_flight`, and fewer than `_max_on_wire` submits are on the wire when one starts.
#
# In each state, `_paused_until`, `_backoff_until` and `_next_at` hold back all submits. A submit that was refused is
# also held back on its own, by the ApiClient.
#
# Transitions, all made by the ApiClient:
#
# - submit_refused (a 429): in UNLIMITED and RECOVERING, if it is not the fourth or more in the window, it changes
#   nothing. Otherwise -> LIMITED. `_suspect` is the lowest number of tasks in flight at which the service is suspected
#   to refuse more, `_suspicion` the number of refusals that suggest it; one at a lower number begins a new suspicion.
#   The first leaves a ceiling that allows to try the same number once more, further ones make the current number the
#   ceiling. Each divides the increase by four, so that the ceiling returns to a limit that is real more slowly. If
#   a submit was accepted with more tasks in flight, the suspicion moves to the current number, the increase
#   stays, and submits get a maximum rate (see `_limit_rate`). From the second consecutive refusal on, a backoff
#   applies, in addition to the pause. (A session with a single slot has no lower ceiling: it only pauses.)
# - submit_accepted: raises the ceiling by the increase. Many accepted submits in a row, several of them beyond the
#   suspected number, disprove it: the increase has its maximum again. LIMITED -> RECOVERING once the ceiling is
#   `max_in_flight`; the window begins anew. In RECOVERING, each one raises `_max_on_wire` by one: it doubles with each
#   round trip, so that a limit that is still there is met by few submits. -> UNLIMITED once it is `max_in_flight`.
# - submit_ended (any other result): only ends the probe.
#
# Invariants:
#
# - 1 <= ceiling <= max_in_flight.
# - In LIMITED, at most one probe is on the wire. Only its own end allows the next one: a submit that started before the
#   refusal, when there were no probes, may end at any time and doesn't count.
# - Refusals of submits that were on the wire at the same time count as one, but in the window. Submits that were on the
#   wire with a refused one may still be accepted: the suspected number includes their tasks, and they prove nothing.
# - A pause never exceeds 120 s, and is never shortened by a later response. It is the longest that any refused submit
#   was asked to wait, those before the fourth included.
@attrs.define
class SubmitLimiter:
    """The limit that a session has learned from the 429s of its submits.

    Args:
        max_in_flight: The session's own maximum number of tasks in flight.
    """

    _max_in_flight: int
    refused: bool = attrs.field(default=False, init=False)
    """Whether there ever was a 429 to a submit; until then there is nothing to limit, and nothing to record."""
    _recent: RecentRefusals = attrs.field(factory=RecentRefusals, init=False)
    _asked_until: float = attrs.field(default=-math.inf, init=False)
    """The end of the longest wait that the service requested of a submit."""
    _paused_until: float = attrs.field(default=-math.inf, init=False)
    """When submits may be sent again, as the service requested."""
    _backoff_until: float = attrs.field(default=-math.inf, init=False)
    """When submits may be sent again, after consecutive refusals."""
    _ceiling: float = attrs.field(default=attrs.Factory(lambda self: self._max_in_flight, takes_self=True), init=False)
    """Maximum number of tasks in flight; fractional, because one accepted submit may raise it by less than 1."""
    _max_increase: float = attrs.field(
        default=attrs.Factory(lambda self: max(self._max_in_flight * _MAX_INCREASE_SHARE, 0.5), takes_self=True),
        init=False,
    )
    _increase: float = attrs.field(default=attrs.Factory(lambda self: self._max_increase, takes_self=True), init=False)
    _max_on_wire: float = attrs.field(default=math.inf, init=False)
    """Maximum number of submits on the wire while the limiter recovers."""
    _is_probing: bool = attrs.field(default=False, init=False)
    """Whether a probe is on the wire."""
    _consecutive_refusals: int = attrs.field(default=0, init=False)
    _last_refusal: float = attrs.field(default=-math.inf, init=False)
    _suspect: int = attrs.field(default=0, init=False)
    """The number of tasks in flight at which the service is suspected to refuse more."""
    _suspicion: int = attrs.field(default=0, init=False)
    """How many refusals suggest it."""
    _accepted: int = attrs.field(default=0, init=False)
    """Accepted submits since the last of them."""
    _accepted_above: int = attrs.field(default=0, init=False)
    """How many of these led to more tasks in flight."""
    _counted_at: float = attrs.field(default=-math.inf, init=False)
    """When the last of them was refused."""
    _rate: float = attrs.field(default=math.inf, init=False)
    """Maximum number of submits per second."""
    _measured_rate: float = attrs.field(default=math.inf, init=False)
    """What it was at the last refusal."""
    _idle: float = attrs.field(default=0.0, init=False)
    """Seconds since then in which no submit waited for the rate."""
    _next_at: float = attrs.field(default=-math.inf, init=False)
    """When the next submit may be sent at this rate."""

    @property
    def is_limited(self) -> bool:
        """Whether submits are sent one at a time."""
        return self._ceiling < self._max_in_flight

    @property
    def limit(self) -> int:
        """The number of tasks that may be in flight now."""
        return int(self._ceiling)

    def pause_remaining(self, now: float) -> float:
        """Return the seconds for which the service has asked all submits to wait."""
        return max(0.0, self._paused_until - now)

    def submit_delay(self, now: float, in_flight: int, on_wire: int) -> float:
        """Return the seconds until one more submit may start; infinite while the end of another one has to come first.

        The end of a task or a submit may shorten the delay.

        Args:
            now: The current time.
            in_flight: The number of tasks that the service has accepted and that are not known to have ended.
            on_wire: The number of submits that are on the wire.
        """
        delay = max(self.pause_remaining(now), self._backoff_until - now, self._next_at - now)
        if not self.is_limited:
            return math.inf if on_wire >= self._max_on_wire else delay
        if self._is_probing:
            return math.inf
        return delay if in_flight + 1 <= self._ceiling else max(delay, self._last_refusal + _PROBE_INTERVAL - now)

    def submit_started(self, now: float) -> bool:
        """Record that a submit is sent; return whether it is a probe, which the call that records its end needs."""
        if self._rate < math.inf:
            self._idle += max(now - max(self._next_at, self._paused_until, self._backoff_until), 0.0)
            self._next_at = now + min(1 / self._rate, _PROBE_INTERVAL)
        probe = self.is_limited
        self._is_probing = self._is_probing or probe
        return probe

    def submit_ended(self, *, probe: bool) -> None:
        """Record that a submit ended with neither a task nor a 429, so that nothing is learned about the limit."""
        self._recent.record_other()
        self._end_probe(probe=probe)

    def submit_accepted(self, in_flight: int, *, probe: bool) -> None:
        """Record that a submit created a task, which `in_flight` already includes."""
        self._recent.record_other()
        self._end_probe(probe=probe)
        if probe or not self.is_limited:
            self._consecutive_refusals = 0
            self._accepted += 1
            self._accepted_above += in_flight > self._suspect + _MARGIN
        else:  # it was on the wire with the refused one
            self._suspect = max(self._suspect, in_flight)
        self._rate *= _RATE_GROWTH
        if self._rate > _RATE_DISPROOF * self._measured_rate:
            self._rate = math.inf
        if self._accepted >= _DISPROOF and self._accepted_above >= _DISPROOF_ABOVE:
            self._suspicion = 0
            self._increase = self._max_increase
        if self.is_limited:
            self._ceiling = min(max(self._ceiling + self._increase, in_flight), self._max_in_flight)
            if self._ceiling == self._max_in_flight:
                self._max_on_wire = 2 if self._suspicion > 1 else max(2, self._max_increase)
                self._recent.clear()
        else:
            self._max_on_wire += 1
            if self._max_on_wire >= self._max_in_flight:
                self._max_on_wire = math.inf

    def submit_refused(self, now: float, in_flight: int, retry_after: float | None, *, probe: bool) -> None:
        """Record that a submit was refused with 429.

        Args:
            now: The current time.
            in_flight: The number of tasks in flight.
            retry_after: The seconds to wait that the service requests, if it does.
            probe: Whether the submit was a probe.
        """
        self.refused = True
        self._end_probe(probe=probe)
        self._asked_until = max(self._asked_until, now + pause_after(retry_after))
        if not self._recent.record_refusal() and not self.is_limited:
            return
        if probe or not self._consecutive_refusals:
            self._consecutive_refusals += 1
            self._suspect_limit(now, in_flight)
        self._last_refusal = now
        allowed = in_flight + (self._suspicion == 1)
        self._ceiling = max(1.0, min(self._ceiling, allowed, self._max_in_flight - 1))
        if self._consecutive_refusals > 1:
            exponent = min(self._consecutive_refusals - 1, 20)  # a larger power could overflow
            self._backoff_until = now + min(_BACKOFF_FACTOR**exponent, _MAX_BACKOFF)
        self._paused_until = self._asked_until

    def _suspect_limit(self, now: float, in_flight: int) -> None:
        is_rate = self._suspicion > 0 and self._accepted_above > 0
        if is_rate or self._rate < math.inf:
            self._limit_rate(now)
        if is_rate:
            self._suspect = in_flight
        elif self._suspicion and in_flight >= self._suspect:
            self._suspicion += 1
        else:
            self._suspicion, self._suspect = 1, in_flight
        self._increase = max(self._max_increase / 4 ** min(self._suspicion - 1, 10), _MIN_INCREASE)
        self._accepted = self._accepted_above = 0
        self._counted_at, self._idle = now, 0.0

    def _limit_rate(self, now: float) -> None:
        measured = self._accepted / max(now - self._counted_at - self._idle, 1.0)
        if self._rate < math.inf:
            measured = max(measured, self._measured_rate * _RATE_KEPT)
        self._rate = self._measured_rate = measured

    def _end_probe(self, *, probe: bool) -> None:
        if probe:
            self._is_probing = False
