"""DurationHistogram: the distribution of task durations, learned from the intervals within which tasks ended."""

import math
from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate, pairwise
from operator import mul
from typing import Self

import attrs
from attrs import validators

# The bins are equally wide in the logarithm of the duration: 2.5 % each, from 20 ms to 54 minutes.
BINS = 480
BIN_WIDTH = 1 / 40
"""Width of a bin, in natural logarithms of seconds."""
MIN_DURATION = 0.02
"""Lower edge of the first bin, in seconds."""
BIN_EDGES = tuple(MIN_DURATION * math.exp(BIN_WIDTH * k) for k in range(BINS + 1))
"""In seconds."""
_SQUARES = tuple(k * k for k in range(BINS))

_PRIOR_WEIGHT = 0.5
"""The prior counts as much as this many observations."""
_MIN_PRIOR_SHARE = 0.005
"""The prior keeps this share for ever, because a few tasks follow no distribution."""
_EXPECTED_DEVIATION = 0.3
"""Standard deviation of the log-durations of a typical service; it counts as one observation."""
_BANDWIDTH_FACTOR = 1.0
"""Bandwidth of the smoothing, in standard deviations divided by the cube root of the number of observations."""
_REBUILD_DIVISOR = 3
"""The CDF is rebuilt when more than one third of the observations are new."""
_MIN_WEIGHT = 1e-4
"""Outermost bins with a smaller weight are treated as empty."""
_MAX_ROUNDING = 0.1
"""Weights are stored with three digits, and empty bins not at all."""


def bin_position(seconds: float) -> float:
    """Return where a duration lies among the bins: the bin's number plus the fraction of its width."""
    return min(math.log(seconds / MIN_DURATION) / BIN_WIDTH, BINS - 0.001) if seconds > MIN_DURATION else 0.0


def seconds_at(position: float) -> float:
    """Return the duration at a bin position, in seconds."""
    return MIN_DURATION * math.exp(BIN_WIDTH * position)


def lognormal(median: float, deviation: float) -> list[float]:
    """Return the probability of each bin under a lognormal distribution."""
    cdf = [math.erfc(math.log(median / edge) / deviation / math.sqrt(2)) / 2 for edge in BIN_EDGES]
    cdf[0], cdf[-1] = 0.0, 1.0
    probabilities = [max(later - earlier, 1e-9) for earlier, later in pairwise(cdf)]
    total = sum(probabilities)
    return [probability / total for probability in probabilities]


def quantile(cdf: Sequence[float], probability: float) -> float:
    """Return the bin position at which the CDF reaches a probability."""
    k = min(max(bisect_left(cdf, probability), 1), BINS)
    below, above = cdf[k - 1], cdf[k]
    return k - 1 + min((probability - below) / (above - below), 1.0) if above > below else float(k)


_PRIOR = lognormal(9.0, 1.25)
MAX_COUNT = 1e9
"""Of observations: what several schedules have learned adds up to more than the memory of one."""
_COUNT_VALIDATORS = (validators.ge(0.0), validators.le(MAX_COUNT))


@attrs.frozen
class HistogramState:
    """The learned part of a DurationHistogram, as stored in JSON."""

    count: float = attrs.field(validator=_COUNT_VALIDATORS)
    first_bin: int = attrs.field(validator=(validators.ge(0), validators.lt(BINS)))
    """The bin of `weights[0]`."""
    weights: list[float] = attrs.field(validator=validators.deep_iterable(validators.and_(*_COUNT_VALIDATORS)))

    def __attrs_post_init__(self) -> None:
        if self.first_bin + len(self.weights) > BINS:
            raise ValueError(f"weights must end at bin {BINS} or before")
        if 0 < self.count < 1:
            raise ValueError(f"count must be 0 or at least 1, not {self.count!r}")
        if abs(sum(self.weights) - self.count) > _MAX_ROUNDING * self.count:
            raise ValueError(f"weights must add up to count, {self.count!r}")


@attrs.define(eq=False)
class DurationHistogram:
    """The distribution of durations.

    An observation is an interval between two bin positions. Its weight is spread within the interval in proportion to
    the current density. The weights are smoothed, with a bandwidth that shrinks as observations accumulate, and mixed
    with a broad prior.

    `learn()` only adds to the weights. The CDF changes in `_rebuild()`, when enough observations are new.
    """

    memory: float = 200.0
    """An observation's weight decays to 1 / e while this many others follow. A count above it, as the sum of several
    histograms has, becomes this many with the next observation."""
    prior: list[float] = attrs.field(default=_PRIOR, repr=False)
    """Probability of each bin before anything was observed. The default: 9 s, give or take a factor of 3.5."""
    count: float = attrs.field(default=0.0, init=False)
    """Sum of the weights, in observations."""
    cdf: list[float] = attrs.field(init=False, repr=False)
    """The probability that a task has ended by each of BIN_EDGES."""
    version: int = attrs.field(default=0, init=False)
    """Incremented whenever the CDF changes."""
    _weights: list[float] = attrs.field(factory=lambda: [0.0] * BINS, init=False, repr=False)
    """Of each bin, without those of `_density_steps`."""
    _density_steps: list[float] = attrs.field(factory=lambda: [0.0] * BINS, init=False, repr=False)
    """Weights of the bins that lie wholly within an observed interval, as a difference array over the bins: the running
    sum times `_probabilities` is a bin's weight."""
    _observation_weight: float = attrs.field(default=1.0, init=False)
    """Weight of an observation made now. It grows, instead of all earlier weights decaying."""
    _new_observations: int = attrs.field(default=0, init=False)
    """Observations since the last rebuild."""
    _probabilities: list[float] = attrs.field(init=False, repr=False)
    """Probability of each bin after the first smoothing only: spreading intervals by `cdf` would blur it ever more."""
    _probability_sums: list[float] = attrs.field(init=False, repr=False)
    """The CDF of `_probabilities`."""

    def __attrs_post_init__(self) -> None:
        self._probabilities = self.prior
        self.cdf = self._probability_sums = [0.0, *accumulate(self.prior)]

    def cdf_at(self, position: float) -> float:
        """Return the probability that a task has ended by a bin position."""
        k = int(position)
        return self.cdf[k] + (position - k) * (self.cdf[k + 1] - self.cdf[k])

    def probability(self, start: float, end: float) -> float:
        """Return the probability that a task ends between two bin positions, or within the bin if they are equal."""
        k = int(end)
        return self.cdf_at(end) - self.cdf_at(start) if end - start > 0.01 else self.cdf[k + 1] - self.cdf[k]

    def learn(self, start: float, end: float) -> None:
        """Add the observation that a task ended between two bin positions."""
        decay = 1 - 1 / self.memory
        if self.count > self.memory:
            self._observation_weight *= self.count / self.memory
            self.count = self.memory
        self._observation_weight /= decay
        self.count = self.count * decay + 1
        i, j = int(start), int(end)
        if i == j:
            self._weights[j] += self._observation_weight
        else:
            probabilities, sums = self._probabilities, self._probability_sums
            left, right = probabilities[i] * (i + 1 - start), probabilities[j] * (end - j)
            density = self._observation_weight / (left + sums[j] - sums[i + 1] + right)
            self._weights[i] += density * left
            self._weights[j] += density * right
            self._density_steps[i + 1] += density
            self._density_steps[j] -= density
        self._new_observations += 1
        if self._new_observations > self.count / _REBUILD_DIVISOR:
            self._rebuild()

    def state(self) -> HistogramState:
        """Return what was learned."""
        weights = [float(f"{weight:.3g}") for weight in self._all_weights()]
        used = [k for k, weight in enumerate(weights) if weight > _MIN_WEIGHT] or [0]
        return HistogramState(self.count, used[0], weights[used[0] : used[-1] + 1])

    @classmethod
    def from_state(cls, state: HistogramState, memory: float = 200.0, prior: list[float] = _PRIOR) -> Self:
        """Return a histogram that continues from a state."""
        histogram = cls(memory, prior)
        histogram._weights[state.first_bin : state.first_bin + len(state.weights)] = state.weights
        histogram.count = state.count
        if state.count:
            histogram._rebuild()
        return histogram

    def _rebuild(self) -> None:
        """Compute the CDF from the weights."""
        self.version += 1
        self._new_observations = 0
        self._weights = weights = self._all_weights()
        self._density_steps = [0.0] * BINS
        self._observation_weight = 1.0
        low = next(k for k, weight in enumerate(weights) if weight > _MIN_WEIGHT)
        high = next(k for k in range(BINS, 0, -1) if weights[k - 1] > _MIN_WEIGHT)
        used = weights[low:high]
        total = sum(used)
        mean = sum(map(mul, used, range(BINS))) / total
        squares = sum(map(mul, used, _SQUARES)) - mean * mean * total
        squares += (_EXPECTED_DEVIATION / BIN_WIDTH) ** 2
        bandwidth = _BANDWIDTH_FACTOR * math.sqrt(squares / (self.count + 1)) / self.count ** (1 / 3)
        half, whole = int(bandwidth / 2 + 0.5), int(bandwidth + 0.5)
        low, high = max(low - half - whole, 0), min(high + half + whole, BINS)
        smoothed = _moving_sum(weights[low:high], half)
        prior_share = max(_PRIOR_WEIGHT / (self.count + _PRIOR_WEIGHT), _MIN_PRIOR_SHARE)
        prior = [prior_share * probability for probability in self.prior]
        self._probabilities = _mix(prior, smoothed, low, 1 - prior_share)
        self._probability_sums = [0.0, *accumulate(self._probabilities)]
        self.cdf = [0.0, *accumulate(_mix(prior, _moving_sum(smoothed, whole), low, 1 - prior_share))]

    def _all_weights(self) -> list[float]:
        """Return the weight of each bin, those of `_density_steps` included, in observations."""
        parts = zip(self._weights, accumulate(self._density_steps), self._probabilities, strict=True)
        weights = [
            weight + density * probability if density > 0.0 else weight for weight, density, probability in parts
        ]
        return [weight / self._observation_weight for weight in weights]


def _mix(prior: list[float], weights: list[float], first_bin: int, share: float) -> list[float]:
    """Return the probability of each bin: the prior's, and `share` spread over the weights from `first_bin` on."""
    factor = share / sum(weights)
    bins = slice(first_bin, first_bin + len(weights))
    mixed = prior.copy()
    mixed[bins] = [probability + factor * weight for probability, weight in zip(prior[bins], weights, strict=True)]
    return mixed


def _moving_sum(weights: list[float], reach: int) -> list[float]:
    """Return, for each bin, the sum of the weights of the bins at most `reach` away."""
    if not reach:
        return weights
    padding = [0.0] * reach
    sums = [0.0, *accumulate([*padding, *weights, *padding])]
    return [after - before for before, after in zip(sums, sums[2 * reach + 1 :], strict=False)]
