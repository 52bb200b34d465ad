"""The limit for the polls of a session: a token bucket, and a poll cost that rises before the bucket is empty.

The bucket delays polls beyond the limit, in the order in which they are reserved. Before it is empty, the cost of a
poll rises, so that schedules poll less often. A schedule polls at a rate that is inversely proportional to the square
root of the cost, so a rate that is f times too high needs f² times the cost.

All times are seconds on one clock, which the caller reads.
"""

import math

import attrs

_WINDOW = 1.0
"""Seconds over which the rate of polls is measured before the load is adjusted."""
_TARGET_UTILIZATION = 0.9
"""The rate that the load aims at, as a fraction of the limit; the rest of the bucket serves bursts."""
_MAX_RATE_RATIO = 2.0
"""Limits one adjustment of the load, as if the rate were off by at most this factor."""
_IDLE_RESET = 10.0
"""Seconds without a poll after which the load is reset."""
_MAX_BACKPRESSURE = 3.0
"""The cost is raised to at most 1 + this by refusals."""
_BACKPRESSURE_HALF_LIFE = 30.0
"""Seconds."""
_COST_STEP = 1.5
"""The cost factor is a power of this, because schedules compute their polls anew for each value of it."""


@attrs.define
class PollLimiter:
    """The poll limit of one session.

    Args:
        max_per_second: Maximum number of polls per second; infinite for no limit. The bucket holds those of one second.
    """

    max_per_second: float
    _next_token: float = attrs.field(default=-math.inf, init=False)
    """When the most recently reserved token becomes available."""
    _window_start: float = attrs.field(default=-math.inf, init=False)
    _window_polls: int = attrs.field(default=0, init=False)
    _load: float = attrs.field(default=1.0, init=False)
    """The cost factor that keeps the rate at its target; at least 1."""
    _backpressure: float = attrs.field(default=0.0, init=False)
    """The part of the cost factor that refusals add, as of `_backpressure_time`."""
    _backpressure_time: float = attrs.field(default=0.0, init=False)

    def reserve(self, now: float) -> float:
        """Reserve one poll; return the seconds until it may be sent."""
        window = now - self._window_start
        if window >= _WINDOW:
            rate_ratio = self._window_polls / window / (_TARGET_UTILIZATION * self.max_per_second)
            self._load = max(self._load * min(max(rate_ratio, 1 / _MAX_RATE_RATIO), _MAX_RATE_RATIO) ** 2, 1.0)
            if window > _IDLE_RESET:
                self._load = 1.0
            self._window_start, self._window_polls = now, 0
        self._window_polls += 1
        self._next_token = max(self._next_token, now - 1.0) + 1 / self.max_per_second
        return max(self._next_token - now, 0.0)

    def record_refusal(self, now: float) -> None:
        """Record that the service refused a submit or a poll with 429."""
        self._backpressure = min(self._backpressure_at(now) + 1, _MAX_BACKPRESSURE)
        self._backpressure_time = now

    def cost_factor(self, now: float) -> float:
        """Return how many times its normal cost a poll has now, rounded to a power of 1.5."""
        factor = self._load * (1 + self._backpressure_at(now))
        return math.pow(_COST_STEP, round(math.log(factor, _COST_STEP)))

    def _backpressure_at(self, now: float) -> float:
        return self._backpressure * math.exp2(-(now - self._backpressure_time) / _BACKPRESSURE_HALF_LIFE)
