"""How many polls all tasks together may make, and how much dearer that makes each of them.

Two things keep the polls of a session within its budget. A token bucket holds back what is too much, first come,
first served; nobody is passed over. And before the bucket runs dry, polls become dearer: at its best moments a task is
polled in inverse proportion to the root of the price, so polls that come f times too often want f² times the price.

Moments and durations are seconds on one clock that the caller reads.
"""

import math

import attrs

_WINDOW = 1.0
"""Polls are counted for so long before the price is looked at again."""
_FULL = 0.9
"""The price aims at so much of the budget: the bucket is for bursts."""
_STEP = 2.0
"""However many come, the price follows as if they were at most so many times too many, or too few."""
_FORGET = 10.0
"""After so long without a poll there is no crowd any more."""
_STRAIN = 3.0
"""Refused polls and submits make polls at most so many times dearer than they are, ..."""
_RELIEF = 30.0
"""... which halves in so many seconds."""


@attrs.define
class PollLimiter:
    """One budget for all pollers.

    Args:
        per_second: The most polls that all tasks together make; infinite for no limit. Those of a
            second may come at once.
    """

    per_second: float
    _next: float = attrs.field(default=-math.inf, init=False)
    """The moment of the next token, had nobody ever waited."""
    _since: float = attrs.field(default=-math.inf, init=False)
    _count: int = attrs.field(default=0, init=False)
    """Polls booked since then."""
    _crowding: float = attrs.field(default=1.0, init=False)
    _strain: float = attrs.field(default=0.0, init=False)
    _strained_at: float = attrs.field(default=0.0, init=False)

    def book(self, now: float) -> float:
        """Book one poll; gives the seconds until it may be made."""
        if now - self._since >= _WINDOW:
            much = self._count / (now - self._since) / (_FULL * self.per_second)
            self._crowding = max(self._crowding * min(max(much, 1 / _STEP), _STEP) ** 2, 1.0)
            if now - self._since > _FORGET:
                self._crowding = 1.0
            self._since, self._count = now, 0
        self._count += 1
        self._next = max(self._next, now - 1.0) + 1 / self.per_second
        return max(self._next - now, 0.0)

    def refused(self, now: float) -> None:
        """The service said that something was too much."""
        self._strain = min(self._strain_at(now) + 1, _STRAIN)
        self._strained_at = now

    def cost_factor(self, now: float) -> float:
        """Tell how many times as dear as usual a poll is, in steps: for each the schedule finds its looks anew."""
        return math.pow(1.5, round(math.log(self._crowding * (1 + self._strain_at(now)), 1.5)))

    def _strain_at(self, now: float) -> float:
        return self._strain * math.exp2(-(now - self._strained_at) / _RELIEF)
