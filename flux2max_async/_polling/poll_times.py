"""When to look at something whose law is known: at the first moment at which one more second costs more than a look.

After a look at t in vain, the next one is due at the first moment u at which the odds of the end having come between
them, S(t) / S(u) - 1, reach e^x - 1, where S is the chance of still running, h(u) the rate of ending, and x solves
e^x - 1 - x = price * h(u). For a constant rate this is exact (Barlow, Hunter and Proschan, "Optimum Checking
Procedures", J. SIAM 11(4), 1963); for others it comes within a few per cent of the optimum.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from itertools import accumulate
from math import log1p, sqrt

from flux2max_async._polling.histogram import BIN_EDGES, bin_position

_SPANS = tuple(end - start for start, end in zip(BIN_EDGES, BIN_EDGES[2:], strict=False))
"""The seconds of each two neighbouring cells."""
_HARDLY = 1e-4
"""No look is due before so many have ended, ..."""
_BEYOND = 1e-5
"""... and the law tells nothing when no more than so many still run."""


class PollTimes:
    """The moments to look, whatever the moment of the look before."""

    __slots__ = ("_cost", "_end", "_first", "_goals", "_peaks", "_price", "_running")

    def __init__(self, ended: Sequence[float], price: float) -> None:
        """Prepare the looks for a law.

        Args:
            ended: For each edge of the cells the chance of having ended by then.
            price: How many seconds of waiting one look is worth.
        """
        self._price = price
        self._running = running = [1 - chance + 1e-12 for chance in ended]
        first, self._end = bisect_right(ended, _HARDLY), bisect_left(ended, 1 - _BEYOND) - 1
        goals = [2.0] * first
        known = slice(first - 1, self._end), slice(first, self._end + 1), slice(first + 1, self._end + 2)
        for before, s, after, span in zip(*(running[part] for part in known), _SPANS[first - 1 :], strict=False):
            y = price * (before - after) / (s * span)
            # e^x = 1 + y + x, put into itself once from a root that is right for small y: within 3 % of x.
            goals.append(s * (1 + y + log1p(y + sqrt(2 * y))))
        self._goals = goals = [*goals, 0.0]
        """For each edge u the chance S(t) of still running that is low enough for a look at u: S(u) e^x."""
        self._peaks = list(accumulate(reversed(goals), max))[::-1]
        """The highest of the goals from each edge on."""
        self._cost: float | None = None
        self._first = self._after(0.0)

    def after(self, elapsed: float) -> float:
        """Give the moment of the look that follows one at `elapsed`, both in seconds from the start."""
        return self._after(elapsed) if elapsed else self._first

    def cost(self) -> float:
        """Estimate what looking costs on average, delay and looks together, in seconds."""
        if self._cost is None:
            ways = zip(self._running, self._running[1:], BIN_EDGES, BIN_EDGES[1:], strict=False)
            # At a rate of h the delay to be expected and the looks cost sqrt(2 price / h) together, nearly.
            self._cost = self._price + sum(
                sqrt((s - after) * s * 2 * self._price * (end - start)) for s, after, start, end in ways
            )
        return self._cost

    def _after(self, elapsed: float) -> float:
        at = bin_position(elapsed)
        k = int(at)
        if k >= self._end:
            # What has lasted for t will end within as long again as likely as not: a rate of about 1 / t.
            return elapsed + sqrt(2 * self._price * elapsed)
        running, goals = self._running, self._goals
        s = running[k] + (at - k) * (running[k + 1] - running[k])
        k = self._due(k + 1, s)
        while self._peaks[k] > s:
            # Another moment comes later, as after the first of two modes. The earlier look is worth its price only if
            # it saves that much waiting.
            later = k
            while goals[later] <= s:
                later += 1
            later = self._due(later, s)
            if (BIN_EDGES[later] - BIN_EDGES[k]) * (s - running[k]) > self._price * running[k]:
                break
            k = later
        above, below = goals[k - 1] - s, s - goals[k]
        return BIN_EDGES[k] - (BIN_EDGES[k] - BIN_EDGES[k - 1]) * (below / (above + below) if above > 0 else 0.0)

    def _due(self, k: int, s: float) -> int:
        """Give the first edge from the k-th on at which a look is due."""
        goals = self._goals
        while goals[k] > s:
            k += 1
        return k
