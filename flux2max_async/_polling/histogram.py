"""How long tasks take: a law of durations, learned from the intervals within which tasks were seen to end."""

import math
from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Self

import attrs
from attrs import validators

BINS = 480
"""The law is a histogram of the logarithm of the seconds, ..."""
BIN_WIDTH = 1 / 40
"""... whose cells are as wide as a 40th of an e-fold, 2.5 %, ..."""
SHORTEST = 0.02
"""... and begin here, in seconds. They end after 54 minutes."""
BIN_EDGES = tuple(SHORTEST * math.exp(BIN_WIDTH * k) for k in range(BINS + 1))
"""The cells' borders, in seconds."""

_BELIEF = 0.5
"""What is believed in the beginning counts for half an observation, ..."""
_DOUBT = 0.005
"""... and for so much of the law for ever: some tasks obey no law."""
_SPREAD = 0.3
"""The standard deviation of the logarithm that is expected of a service, worth one observation."""
_SMOOTHING = 1.0
"""An observation speaks for its neighbours as far as so many standard deviations, by the cube root of their number."""
_REDRAW = 3
"""The law is drawn anew when its observations have grown by a third."""


def bin_position(seconds: float) -> float:
    """Give the place of a duration among the cells: the cell's number, and the way within."""
    return min(math.log(seconds / SHORTEST) / BIN_WIDTH, BINS - 0.001) if seconds > SHORTEST else 0.0


def seconds_at(bin_position: float) -> float:
    """Give the duration at a place among the cells."""
    return SHORTEST * math.exp(BIN_WIDTH * bin_position)


def lognormal(median: float, deviation: float) -> list[float]:
    """Give the chance of each cell under a lognormal law."""
    ended = [math.erfc(math.log(median / edge) / deviation / math.sqrt(2)) / 2 for edge in BIN_EDGES]
    ended[0], ended[-1] = 0.0, 1.0
    cells = [max(later - earlier, 1e-9) for earlier, later in pairwise(ended)]
    total = sum(cells)
    return [cell / total for cell in cells]


def quantile(ended: Sequence[float], share: float) -> float:
    """Give the place by which a share of all has ended."""
    k = min(max(bisect_left(ended, share), 1), BINS)
    below, above = ended[k - 1], ended[k]
    return k - 1 + min((share - below) / (above - below), 1.0) if above > below else float(k)


_GUESS = lognormal(9.0, 1.25)
_NUMBER = (validators.ge(0.0), validators.le(1e9))


@attrs.frozen
class HistogramState:
    """What a law has learned, to be kept as JSON."""

    count: float = attrs.field(validator=_NUMBER)
    first: int = attrs.field(validator=(validators.ge(0), validators.lt(BINS)))
    """The number of the first cell that has a weight."""
    weights: list[float] = attrs.field(validator=validators.deep_iterable(validators.and_(*_NUMBER)))

    def __attrs_post_init__(self) -> None:
        if self.first + len(self.weights) > BINS or (self.count > 0) != (sum(self.weights) > 0):
            raise ValueError("a law's weights must fit into its cells, and be there where its count is")
        if 0 < self.count < 1:
            raise ValueError(f"a law's count must be 0 or at least 1, not {self.count!r}")


@attrs.define(eq=False)
class DurationHistogram:
    """What the durations seen so far tell of those to come.

    An interval is spread over what the law says inside it. The histogram is smoothed, the less the more was seen; and a
    broad guess never quite leaves.
    """

    memory: float = 200.0
    """An observation fades to a third while so many others follow."""
    guess: list[float] = attrs.field(default=_GUESS, repr=False)
    """What is believed before anything was seen: about 9 s, give or take a factor of three and a half."""
    count: float = attrs.field(default=0.0, init=False)
    """How many observations the weights are worth."""
    ended: list[float] = attrs.field(init=False, repr=False)
    """The chance of having ended by each edge."""
    version: int = attrs.field(default=0, init=False)
    """Grows whenever the law is drawn anew."""
    _weights: list[float] = attrs.field(factory=lambda: [0.0] * BINS, init=False, repr=False)
    _steps: list[float] = attrs.field(factory=lambda: [0.0] * BINS, init=False, repr=False)
    """By how much the whole cells gain on the cell before, in multiples of `_cells`, when the law is drawn."""
    _newest: float = attrs.field(default=1.0, init=False)
    """The weight of an observation made now: it grows, instead of all the earlier ones fading."""
    _unread: int = attrs.field(default=0, init=False)
    """Observations since the law was drawn."""
    _cells: list[float] = attrs.field(init=False, repr=False)
    """The chance of each cell before the last smoothing: to spread intervals by the law would blur it ever more."""
    _sums: list[float] = attrs.field(init=False, repr=False)
    """The chance of having ended by each edge under that."""

    def __attrs_post_init__(self) -> None:
        self._cells = self.guess
        self.ended = self._sums = [0.0, *accumulate(self.guess)]

    def chance(self, bin_position: float) -> float:
        """Give the chance of having ended by a place among the cells."""
        k = int(bin_position)
        return self.ended[k] + (bin_position - k) * (self.ended[k + 1] - self.ended[k])

    def mass(self, first: float, last: float) -> float:
        """Give the chance of ending between two places; one and the same place stands for its cell."""
        k = int(last)
        return self.chance(last) - self.chance(first) if last - first > 0.01 else self.ended[k + 1] - self.ended[k]

    def learn(self, first: float, last: float) -> None:
        """Take in that a task ended between two places."""
        fading = 1 - 1 / self.memory
        self._newest /= fading
        self.count = self.count * fading + 1
        i, j = int(first), int(last)
        if i == j:
            self._weights[j] += self._newest
        else:
            cells, sums = self._cells, self._sums
            left, right = cells[i] * (i + 1 - first), cells[j] * (last - j)
            density = self._newest / (left + sums[j] - sums[i + 1] + right)
            self._weights[i] += density * left
            self._weights[j] += density * right
            self._steps[i + 1] += density
            self._steps[j] -= density
        self._unread += 1
        if self._unread > self.count / _REDRAW:
            self._draw()

    def state(self) -> HistogramState:
        """Give what was learned."""
        weights = self._whole()
        kept = [k for k, weight in enumerate(weights) if weight > 1e-4] or [0]
        return HistogramState(
            self.count, kept[0], [float(f"{weight:.3g}") for weight in weights[kept[0] : kept[-1] + 1]]
        )

    @classmethod
    def from_state(cls, state: HistogramState, memory: float = 200.0, guess: list[float] = _GUESS) -> Self:
        """Go on from what was learned."""
        law = cls(memory, guess)
        law._weights[state.first : state.first + len(state.weights)] = state.weights
        law.count = state.count
        if state.count:
            law._draw()
        return law

    def _draw(self) -> None:
        self.version += 1
        self._unread = 0
        self._weights = weights = self._whole()
        self._steps = [0.0] * BINS
        self._newest = 1.0
        low = next(k for k, weight in enumerate(weights) if weight > 1e-4)
        high = next(k for k in range(BINS, 0, -1) if weights[k - 1] > 1e-4)
        seen = weights[low:high]
        mean = sum(k * weight for k, weight in enumerate(seen)) / self.count
        squares = sum((k - mean) ** 2 * weight for k, weight in enumerate(seen)) + (_SPREAD / BIN_WIDTH) ** 2
        reach = _SMOOTHING * math.sqrt(squares / (self.count + 1)) / self.count ** (1 / 3)
        half, whole = int(reach / 2 + 0.5), int(reach + 0.5)
        low, high = max(low - half - whole, 0), min(high + half + whole, BINS)
        once = _smooth(weights[low:high], half)
        self._cells, self._sums = self._with_guess(once, low)
        _, self.ended = self._with_guess(_smooth(once, whole), low)

    def _whole(self) -> list[float]:
        """Give the weights, what the whole cells have gained among them, so that they add up to the count."""
        gains = zip(self._weights, accumulate(self._steps), self._cells, strict=True)
        weights = [weight + max(density, 0.0) * cell for weight, density, cell in gains]
        scale = self.count / (sum(weights) or 1.0)
        return [weight * scale for weight in weights]

    def _with_guess(self, weights: list[float], low: int) -> tuple[list[float], list[float]]:
        doubt = max(_BELIEF / (self.count + _BELIEF), _DOUBT)
        share = (1 - doubt) / sum(weights)
        cells = [doubt * cell for cell in self.guess]
        high = low + len(weights)
        cells[low:high] = [cell + share * weight for cell, weight in zip(cells[low:high], weights, strict=True)]
        return cells, [0.0, *accumulate(cells)]


def _smooth(weights: list[float], reach: int) -> list[float]:
    """Spread each weight evenly over its neighbours."""
    if not reach:
        return weights
    beyond = [0.0] * reach
    sums = [0.0, *accumulate([*beyond, *weights, *beyond])]
    return [after - before for before, after in zip(sums, sums[2 * reach + 1 :], strict=False)]
