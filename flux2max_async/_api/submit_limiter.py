"""How many tasks may be in flight now, and how long the service asked us to wait.

A 429 says that something is too much, but not what: calls in a second, or tasks in flight. So it teaches two things.
Nothing is sent for as long as the service says. And the number of tasks in flight at that moment becomes a ceiling for
further submits, which then go one at a time, as probes. Every accepted submit lifts the ceiling a little, so that it
settles just under the service's own limit and one refused probe buys several accepted ones. A ceiling that no longer
binds is gone.

Moments and durations are seconds on one clock that the caller reads.
"""

import math

import attrs

MAX_PAUSE = 120.0
"""No answer makes us wait longer than this, in seconds."""

_MAX_OWN_PAUSE = 30.0
_LOOK_AGAIN = 30.0
_STEP, _MIN_STEP = 0.5, 1 / 16
_PROBES = 3


@attrs.define
class SubmitLimiter:
    """What the session has learned from 429s.

    Args:
        places: The most tasks that the session itself keeps in flight.
    """

    _places: int
    _paused_until: float = attrs.field(default=-math.inf, init=False)
    _ceiling: float = attrs.field(default=attrs.Factory(lambda self: self._places, takes_self=True), init=False)
    _step: float = attrs.field(default=_STEP, init=False)
    """How much one accepted submit lifts the ceiling."""
    _refusals: int = attrs.field(default=0, init=False)
    """Submits refused since the last accepted one, a burst counted once."""
    _last_refusal: float = attrs.field(default=-math.inf, init=False)
    _patient_until: float = attrs.field(default=-math.inf, init=False)
    """No submit goes out before this moment, whatever the service says: it keeps refusing them."""
    _refused_at: int = attrs.field(default=-1, init=False)
    """How many tasks were in flight at the last refusal."""
    _probes_left: int = attrs.field(default=0, init=False)
    """Submits that still go one at a time after a refused poll, which says nothing about tasks in flight."""
    _probing: bool = attrs.field(default=False, init=False)

    @property
    def limited(self) -> bool:
        """Whether submits go one at a time."""
        return self._ceiling < self._places or self._probes_left > 0

    def pause(self, now: float) -> float:
        """Seconds until anything may be sent."""
        return max(0.0, self._paused_until - now)

    def submit_delay(self, now: float, in_flight: int) -> float:
        """Seconds until one more submit may start; infinite while a probe is out. A task that ends may shorten it.

        Args:
            now: The moment.
            in_flight: Tasks that the service has accepted and not ended, as far as we know.
        """
        if self._probing and self.limited:
            return math.inf
        delay = max(self.pause(now), self._patient_until - now)
        if self._ceiling >= self._places or in_flight + 1 <= self._ceiling:
            return delay
        # What was in the way may have been somebody else's tasks: look again now and then.
        return max(delay, self._last_refusal + _LOOK_AGAIN - now)

    def submit_started(self) -> bool:
        """A submit goes out; tells whether it is a probe, which the end of the submit must repeat."""
        probe = self.limited
        self._probing = self._probing or probe
        return probe

    def submit_ended(self, *, probe: bool) -> None:
        """A submit ended in a way that teaches nothing: lost, or refused for a reason of its own."""
        if probe:
            self._probing = False

    def submit_accepted(self, in_flight: int, *, probe: bool) -> None:
        """A submit became a task, which `in_flight` already counts."""
        self.submit_ended(probe=probe)
        self._refusals = 0
        if in_flight > self._refused_at:
            self._step = _STEP  # more is possible than at the last refusal
        self._probes_left = max(self._probes_left - 1, 0)
        if self._ceiling < self._places:
            self._ceiling = min(max(self._ceiling + self._step, in_flight), self._places)

    def submit_refused(self, now: float, in_flight: int, retry_after: float | None, *, probe: bool) -> None:
        """A submit was answered with 429, which may say how many seconds to wait."""
        self.submit_ended(probe=probe)
        if probe or not self._refusals:
            self._refusals += 1
        # Refused at about the same number again: that is the service's limit, so come near it more slowly.
        self._step = max(self._step / 2, _MIN_STEP) if probe and abs(in_flight - self._refused_at) <= 1 else _STEP
        self._refused_at = in_flight
        self._ceiling = max(1.0, min(self._ceiling, in_flight, self._places - 1))
        self._last_refusal = now
        if self._refusals > 1:
            self._patient_until = now + min(1.5 ** min(self._refusals - 1, 20), _MAX_OWN_PAUSE)
        self._pause(now, 1.0 if retry_after is None else retry_after)

    def poll_refused(self, now: float, retry_after: float | None) -> None:
        """A poll was answered with 429, which may say how many seconds to wait."""
        self._probes_left = _PROBES
        self._pause(now, 1.0 if retry_after is None else retry_after)

    def _pause(self, now: float, seconds: float) -> None:
        self._paused_until = max(self._paused_until, now + min(seconds, MAX_PAUSE))
