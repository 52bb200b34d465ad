"""The limit for the polls of a session: a token bucket, and a poll cost that rises under load.

A few 429s may be chance, and each holds back its own poll only. Four or more among the last 20 polls hold back all
polls for as long as the service requests. Four among the last ten are hardly chance: they raise the cost, too.

The bucket delays polls beyond the limit, in the order in which they are reserved. If the rate stays near the limit, or
polls wait for more than a second, the cost of a poll rises, so that schedules poll less often. A schedule polls at a
rate that is inversely proportional to the square root of the cost, so a rate that is f times too high needs f² times
the cost.

All times are seconds on one clock, which the caller reads.
"""

import math

import attrs

from flux2max_async._api.recent_refusals import RecentRefusals, pause_after

_WINDOW = 1.5
"""Seconds over which the rate of polls is measured before the load is adjusted."""
_TARGET_UTILIZATION = 0.9
"""The rate that the load aims at, as a fraction of the limit; the rest of the bucket serves bursts."""
_BURST_WINDOWS, _BURST_BACKLOG = 2, 1.0
"""A rate above the target is a burst, and doesn't raise the load, in so many windows, and with so many seconds of polls
that wait: tasks that began together are polled together before it is known how long they take."""
_MAX_RATE_RATIO = 2.5
"""Limits one adjustment of the load, as if the rate were off by at most this factor."""
_IDLE_RESET = 10.0
"""Seconds without a poll after which the load is reset."""
_MAX_BACKPRESSURE = 6.0
"""The cost is raised to at most 1 + this by refusals."""
_MIN_BACKPRESSURE, _BACKPRESSURE_FACTOR = 0.8, 4
"""The first dense refusals raise the cost by this; further ones multiply what is left of it first."""
_BACKPRESSURE_HALF_LIFE = 30.0
"""Seconds."""
_RELIEF = 0.978
"""What a poll that is not refused leaves of the backpressure."""
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
    _high_windows: int = attrs.field(default=0, init=False)
    """In how many windows in a row the rate was above its target."""
    _load: float = attrs.field(default=1.0, init=False)
    """The cost factor that keeps the rate at its target; at least 1."""
    refused: bool = attrs.field(default=False, init=False)
    """Whether there ever was a 429 to a poll; until then there is nothing to record, and no pause."""
    _recent: RecentRefusals = attrs.field(factory=RecentRefusals, init=False)
    _asked_until: float = attrs.field(default=-math.inf, init=False)
    """The end of the longest wait that the service requested of a poll."""
    _paused_until: float = attrs.field(default=-math.inf, init=False)
    """When polls may be sent again, after frequent refusals."""
    _backpressure: float = attrs.field(default=0.0, init=False)
    """The part of the cost factor that refusals add, as of `_backpressure_time`."""
    _backpressure_time: float = attrs.field(default=0.0, init=False)

    def reserve(self, now: float) -> float:
        """Reserve one poll; return the seconds until it may be sent."""
        window = now - self._window_start
        if window >= _WINDOW:
            rate_ratio = self._window_polls / window / (_TARGET_UTILIZATION * self.max_per_second)
            self._high_windows = self._high_windows + 1 if rate_ratio > 1 else 0
            is_burst = 0 < self._high_windows <= _BURST_WINDOWS and self._next_token <= now + _BURST_BACKLOG
            if not is_burst:
                rate_ratio = min(max(rate_ratio, 1 / _MAX_RATE_RATIO), _MAX_RATE_RATIO)
                self._load = max(self._load * rate_ratio**2, 1.0)
            if window > _IDLE_RESET:
                self._load = 1.0
            self._window_start, self._window_polls = now, 0
        self._window_polls += 1
        self._next_token = max(self._next_token, now - 1.0) + 1 / self.max_per_second
        return max(self._next_token - now, 0.0)

    def record_other(self) -> None:
        """Record that a poll ended in another way than with a 429."""
        self._recent.record_other()
        self._backpressure *= _RELIEF

    def record_refusal(self, now: float, retry_after: float | None) -> None:
        """Record that a poll was refused with 429.

        Dense refusals raise the cost once for each pause: the polls that are on the wire when it begins may all be
        refused. After that, the window begins anew, so that refusals by chance don't hold back all polls for long.

        Args:
            now: The current time.
            retry_after: The seconds to wait that the service requests, if it does.
        """
        self.refused = True
        self._asked_until = max(self._asked_until, now + pause_after(retry_after))
        if now < self._paused_until:
            self._paused_until = self._asked_until
        elif self._recent.record_refusal():
            self._paused_until = self._asked_until
            if self._recent.are_dense:
                raised = _BACKPRESSURE_FACTOR * self._backpressure_at(now) + _MIN_BACKPRESSURE
                self._backpressure, self._backpressure_time = min(raised, _MAX_BACKPRESSURE), now
            self._recent.clear()

    def pause_remaining(self, now: float) -> float:
        """Return the seconds for which all polls are held back."""
        return max(self._paused_until - now, 0.0)

    def cost_factor(self, now: float) -> float:
        """Return how many times its normal cost a poll has now, rounded to a power of 1.5."""
        factor = self._load * (1 + self._backpressure_at(now))
        return math.pow(_COST_STEP, round(math.log(factor, _COST_STEP)))

    def _backpressure_at(self, now: float) -> float:
        return self._backpressure * math.exp2(-(now - self._backpressure_time) / _BACKPRESSURE_HALF_LIFE)
