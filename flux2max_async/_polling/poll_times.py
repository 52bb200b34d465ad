"""The optimal times to poll a task whose duration has a known distribution.

Polling costs the delay from the end to the poll that finds it, plus a price per poll. After a poll at t that found the
task running, the next one is due at the first time u at which the odds that the task has ended since, S(t) / S(u) - 1,
reach e^x - 1. Here S is the survival function, h the hazard, and x solves e^x - 1 - x = price * h(u). For a constant
hazard this is exact (Barlow, Hunter and Proschan, "Optimum Checking Procedures", J. SIAM 11(4), 1963); for others it is
within a few per cent of the optimum.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from itertools import accumulate
from math import log1p, sqrt

from flux2max_async._polling.histogram import BIN_EDGES, bin_position

_DOUBLE_WIDTHS = tuple(end - start for start, end in zip(BIN_EDGES, BIN_EDGES[2:], strict=False))
"""Width of each two adjacent bins, in seconds."""
_MIN_CDF = 1e-4
"""No poll is due before the CDF exceeds this."""
_MIN_SURVIVAL = 1e-5
"""Beyond the edge with this survival, the distribution is not used any more."""


class PollTimes:
    """The time of the next poll after a poll at any time."""

    __slots__ = ("_cost", "_first", "_last_edge", "_max_thresholds", "_price", "_survival", "_thresholds")

    def __init__(self, cdf: Sequence[float], price: float) -> None:
        """Prepare the poll times for a distribution.

        Args:
            cdf: The probability that the task has ended by each of BIN_EDGES.
            price: Seconds of delay that one poll is worth.
        """
        self._price = price
        self._survival = survival = [1 - probability + 1e-12 for probability in cdf]
        # The CDF may be above 0 at the first edge already, if large images fail as fast as small ones.
        first, last = max(bisect_right(cdf, _MIN_CDF), 1), bisect_left(cdf, 1 - _MIN_SURVIVAL) - 1
        self._last_edge = last
        neighbours = survival[first - 1 : last], survival[first : last + 1], survival[first + 1 : last + 2]
        # The price times the hazard.
        ys = [
            price * (before - after) / (s * width)
            for before, s, after, width in zip(*neighbours, _DOUBLE_WIDTHS[first - 1 :], strict=False)
        ]
        # e^x = 1 + y + x, with one fixed-point step from the root for small y: within 3 % of x.
        due = [s * (1 + y + log1p(y + sqrt(2 * y))) for s, y in zip(survival[first:], ys, strict=False)]
        # For each edge u, the highest survival S(t) at the last poll for which a poll at u is due: S(u) e^x.
        self._thresholds = thresholds = [2.0] * first + due + [0.0]
        # For each edge, the maximum of its threshold and of all later ones.
        self._max_thresholds = list(accumulate(reversed(thresholds), max))[::-1]
        self._cost: float | None = None
        self._first = self._after(0.0)

    def after(self, elapsed: float) -> float:
        """Return the time of the poll that follows one at `elapsed`, both in seconds from the submit."""
        return self._after(elapsed) if elapsed else self._first

    def cost(self) -> float:
        """Return the approximate mean cost of polling a task, delay and price of the polls together, in seconds."""
        if self._cost is None:
            bins = zip(self._survival, self._survival[1:], BIN_EDGES, BIN_EDGES[1:], strict=False)
            # At a hazard h, the expected delay and the polls cost about sqrt(2 price / h) together.
            self._cost = self._price + sum(
                sqrt((s - after) * s * 2 * self._price * (end - start)) for s, after, start, end in bins
            )
        return self._cost

    def _after(self, elapsed: float) -> float:
        position = bin_position(elapsed)
        k = int(position)
        if k >= self._last_edge:
            # A task that has run for t, longer than any other, has about even odds to end within another t: a hazard
            # of about 1 / t.
            return elapsed + sqrt(2 * self._price * elapsed)
        survival, thresholds = self._survival, self._thresholds
        s = survival[k] + (position - k) * (survival[k + 1] - survival[k])
        k = self._first_due_edge(k + 1, s)
        while self._max_thresholds[k] > s:
            # The condition stops holding and holds again later, as between two modes. The poll at k is made only if
            # the delay that it saves is worth its price.
            later = k
            while thresholds[later] <= s:
                later += 1
            later = self._first_due_edge(later, s)
            if (BIN_EDGES[later] - BIN_EDGES[k]) * (s - survival[k]) > self._price * survival[k]:
                break
            k = later
        above, below = thresholds[k - 1] - s, s - thresholds[k]
        return BIN_EDGES[k] - (BIN_EDGES[k] - BIN_EDGES[k - 1]) * (below / (above + below) if above > 0 else 0.0)

    def _first_due_edge(self, k: int, survival: float) -> int:
        """Return the first edge, from the k-th on, at which a poll is due after one at the given survival."""
        thresholds = self._thresholds
        while thresholds[k] > survival:
            k += 1
        return k
