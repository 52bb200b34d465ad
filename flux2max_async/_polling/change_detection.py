"""AdaptiveHistogram: a distribution of durations that may change, and change back, from one task to the next."""

import math
from collections import deque
from collections.abc import Sequence
from copy import deepcopy
from typing import Self

import attrs
from attrs import validators

from flux2max_async._polling.histogram import MAX_COUNT, DurationHistogram, HistogramState

_ALARM_THRESHOLD = 6.0
"""A change is assumed when it has become e^6 times as likely as no change."""
_MAX_DEVIATION = 3.0
"""Deviations of single durations are clipped to this many standard deviations."""
_RECALL_THRESHOLD = 3.0
"""A previous histogram replaces the current one when it has become e^3 times as likely."""
_MIN_COUNT = 4
"""Fewer observations than this are not a distribution that could change."""
_MAX_PREVIOUS = 3
_MAX_RECENT = 64
_LONG_TERM_MEMORY = 400.0
_EPSILON = 0.001
"""Added to probabilities, so that their ratios are finite."""


@attrs.frozen
class AdaptiveHistogramState:
    """The learned part of an AdaptiveHistogram, as stored in JSON."""

    current: HistogramState
    previous: list[HistogramState] = attrs.field(validator=validators.max_len(_MAX_PREVIOUS))
    long_term: HistogramState | None
    change_count: float = attrs.field(validator=(validators.ge(0.0), validators.le(MAX_COUNT)))


@attrs.define(eq=False)
class AdaptiveHistogram:
    """The current distribution of durations, the previous ones, and the long-term one.

    A two-sided CUSUM test detects that durations have become longer or shorter than expected, by about one standard
    deviation (Page, "Continuous Inspection Schemes", Biometrika 41, 1954). At an alarm the current histogram starts
    again, from the observations since the sum began to rise. If a previous histogram explains the newest observations
    better than the current one, the two are exchanged instead.

    The long-term histogram exists from the first change on and never starts again: it is the best guess for tasks that
    may be the first ones after another change. When no change has happened for a long time, it is dropped together with
    the previous ones.
    """

    current: DurationHistogram = attrs.field(factory=DurationHistogram)
    long_term: DurationHistogram | None = None
    previous: list[DurationHistogram] = attrs.field(factory=list)
    """Newest first."""
    change_count: float = 0.0
    """Number of changes within the long-term histogram's memory."""
    _current_score: float = attrs.field(default=0.0, init=False)
    """Decaying sum of the log-likelihood ratios of the current histogram to the long-term one."""
    _previous_scores: list[float] = attrs.field(init=False)
    """For each previous histogram, the CUSUM of its log-likelihood ratios to the current one."""
    _cusums: list[float] = attrs.field(init=False)
    """For longer and for shorter durations."""
    _cusum_lengths: list[int] = attrs.field(init=False)
    """Number of observations since each of `_cusums` was last 0."""
    _max_in_flight: int = attrs.field(default=0, init=False)
    """Since the current histogram started."""
    _recent: deque[tuple[float, float]] = attrs.field(factory=lambda: deque(maxlen=_MAX_RECENT), init=False, repr=False)
    _current_version: int = attrs.field(default=0, init=False)
    """Incremented whenever another histogram becomes the current one."""

    def __attrs_post_init__(self) -> None:
        self._reset_detectors()

    @property
    def version(self) -> tuple[int, int, int]:
        """A value that differs whenever `mixture_cdf()` may differ for the same `in_flight`."""
        return self._current_version, self.current.version, self.long_term.version if self.long_term else 0

    @property
    def settled(self) -> bool:
        """Whether the current histogram has enough observations to compare durations with."""
        return self.current.count >= _MIN_COUNT

    def mixture_cdf(self, in_flight: int) -> Sequence[float]:
        """Return the probability that the next task has ended by each of BIN_EDGES.

        The current and the long-term distribution are mixed: the more tasks are in flight, the more probable it is that
        a change has happened that no observation shows yet.
        """
        if self.long_term is None:
            return self.current.cdf
        changed = min(self.change_count / (self.long_term.count + 30) * in_flight, 0.5)
        weight = 1 / (1 + changed / (1 - changed) + math.exp(min(max(-self._current_score, -30.0), 30.0)))
        pairs = zip(self.current.cdf, self.long_term.cdf, strict=True)
        return [weight * current + (1 - weight) * long_term for current, long_term in pairs]

    def learn(self, start: float, end: float, in_flight: int) -> None:
        """Add the observation that a task ended between two bin positions, while `in_flight` others were running."""
        self._recent.append((start, end))
        observations = [(start, end)]
        # Both detectors need every observation.
        recalled, changed_since = self._find_better_previous(start, end), self._detect_change(start, end, in_flight)
        if recalled is not None:
            self.current, self.previous[recalled] = self.previous[recalled], self.current
            self._on_change()
        elif changed_since:
            observations = list(self._recent)[-changed_since:]
            self._start_again()
        for observation in observations:
            if self.long_term is not None:
                ratio = self.current.probability(*observation) + _EPSILON
                ratio /= self.long_term.probability(*observation) + _EPSILON
                self._current_score = self._current_score * (1 - 1 / 15) + math.log(ratio)
            self.current.learn(*observation)
        if self.long_term is not None:
            self.long_term.learn(start, end)
            self.change_count *= 1 - 1 / _LONG_TERM_MEMORY
            if self.change_count < 0.1:
                self.long_term, self.previous, self._previous_scores = None, [], []

    def state(self) -> AdaptiveHistogramState:
        """Return what was learned."""
        return AdaptiveHistogramState(
            self.current.state(),
            [histogram.state() for histogram in self.previous],
            self.long_term.state() if self.long_term else None,
            self.change_count,
        )

    @classmethod
    def from_state(cls, state: AdaptiveHistogramState) -> Self:
        """Return a histogram that continues from a state."""
        return cls(
            DurationHistogram.from_state(state.current),
            DurationHistogram.from_state(state.long_term, _LONG_TERM_MEMORY) if state.long_term else None,
            [DurationHistogram.from_state(histogram) for histogram in state.previous],
            state.change_count,
        )

    def _start_again(self) -> None:
        if self.current.count > 2 * _MIN_COUNT:
            self.previous = [self.current, *self.previous[: _MAX_PREVIOUS - 1]]
        if self.long_term is None:
            self.long_term = deepcopy(self.current)
            self.long_term.memory = _LONG_TERM_MEMORY
        self.current = DurationHistogram()
        self._on_change()

    def _on_change(self) -> None:
        self.change_count += 1
        self._current_score = 0.0
        self._current_version += 1
        self._reset_detectors()

    def _reset_detectors(self) -> None:
        self._previous_scores = [0.0] * len(self.previous)
        self._cusums, self._cusum_lengths = [0.0, 0.0], [0, 0]
        self._max_in_flight = 0

    def _find_better_previous(self, start: float, end: float) -> int | None:
        """Return the index of the previous histogram that explains the newest observations better, if there is one."""
        if not self.previous:
            return None
        current = self.current.probability(start, end) + _EPSILON
        for k, histogram in enumerate(self.previous):
            log_ratio = math.log((histogram.probability(start, end) + _EPSILON) / current)
            self._previous_scores[k] = max(self._previous_scores[k] + log_ratio, 0.0)
        best = max(self._previous_scores)
        return self._previous_scores.index(best) if best > _RECALL_THRESHOLD else None

    def _detect_change(self, start: float, end: float, in_flight: int) -> int:
        """Return how many observations ago the distribution changed; 0 if it has not."""
        # Of tasks that start together, the short ones end first. Until all of them have ended, longer durations are
        # no sign of a change.
        self._max_in_flight = max(self._max_in_flight, in_flight)
        if self.current.count < _MIN_COUNT + self._max_in_flight:
            return 0
        deviation = _normal_quantile((self.current.cdf_at(start) + self.current.cdf_at(end)) / 2)
        deviation = min(max(deviation, -_MAX_DEVIATION), _MAX_DEVIATION)
        for k, increase in enumerate((deviation, -deviation)):
            self._cusums[k] = max(self._cusums[k] + increase - 0.5, 0.0)
            self._cusum_lengths[k] = self._cusum_lengths[k] + 1 if self._cusums[k] else 0
        highest = max(self._cusums)
        return self._cusum_lengths[self._cusums.index(highest)] if highest > _ALARM_THRESHOLD else 0


def _normal_quantile(probability: float) -> float:
    # Abramowitz and Stegun, "Handbook of Mathematical Functions", 26.2.22: accurate to 0.003.
    t = math.sqrt(-2 * math.log(max(min(probability, 1 - probability), 1e-9)))
    z = t - (2.30753 + 0.27061 * t) / (1 + 0.99229 * t + 0.04481 * t * t)
    return z if probability > 0.5 else -z
