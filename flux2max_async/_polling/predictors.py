"""What distinguishes the durations of tasks: DurationRegression by their requests, ProgressModel by their progress."""

import math
from collections.abc import Iterable
from typing import Any, Self

import attrs
from attrs import validators

from flux2max_async._models.request import GenerationRequest
from flux2max_async._polling.histogram import MAX_COUNT, DurationHistogram, HistogramState, bin_position, lognormal

Features = tuple[float, float, float]
"""Of a task at its submit: log of the megapixels, number of input images, log(1 + number of tasks in flight)."""


def features_of(request: GenerationRequest | None, in_flight: int) -> Features:
    """Return the features of a task at its submit; a size chosen by the model counts as one megapixel."""
    log_in_flight = math.log1p(in_flight)
    if request is None:
        return 0.0, 0.0, log_in_flight
    log_size = math.log(request.width * request.height / 2**20) if request.width and request.height else 0.0
    return log_size, float(len(request.input_images)), log_in_flight


_REGRESSION_MEMORY = 300.0
_RIDGE = 2.0
"""The prior coefficients count as much as this many tasks."""
_PRIOR_COEFFICIENTS = (0.5, 0.12, 0.0)


def _validate_finite(_: object, field: "attrs.Attribute[Any]", value: Iterable[float]) -> None:
    if not all(abs(number) < 1e9 for number in value):
        raise ValueError(f"{field.name} must be finite numbers, not {value!r}")


@attrs.define(eq=False, on_setattr=attrs.setters.NO_OP)
class DurationRegression:
    """Ridge regression of the log-duration on a task's features, with decaying weights."""

    coefficients: Features = attrs.field(default=_PRIOR_COEFFICIENTS, validator=_validate_finite)
    means: Features = attrs.field(default=(0.0, 0.0, 0.0), validator=_validate_finite)
    """Of the features."""
    count: float = attrs.field(default=0.0, validator=(validators.ge(0.0), validators.le(MAX_COUNT)))
    cross_products: tuple[float, float, float, float, float, float, float, float, float] = attrs.field(
        default=(0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0), validator=_validate_finite
    )
    """Sums of the products of centred features: xx, xy, xz, yy, yz, zz; then of each with the log-duration."""

    def scale(self, features: Features) -> float:
        """Return the expected duration of a task, as a multiple of the duration at the mean features."""
        (a, b, c), (mean_x, mean_y, mean_z), (x, y, z) = self.coefficients, self.means, features
        return math.exp(min(max(a * (x - mean_x) + b * (y - mean_y) + c * (z - mean_z), -3.0), 3.0))

    def learn(self, features: Features, log_residual: float) -> None:
        """Add the observation that a task took e^log_residual times as long as expected."""
        self.count = min(self.count + 1, _REGRESSION_MEMORY)
        (a, b, c), (mean_x, mean_y, mean_z), (x, y, z) = self.coefficients, self.means, features
        x, y, z = x - mean_x, y - mean_y, z - mean_z
        self.means = mean_x + x / self.count, mean_y + y / self.count, mean_z + z / self.count
        t = min(max(log_residual, -1.5), 1.5) + a * x + b * y + c * z
        decay = 1 - 1 / _REGRESSION_MEMORY
        xx, xy, xz, yy, yz, zz, xt, yt, zt = self.cross_products
        xx, xy, xz = xx * decay + x * x, xy * decay + x * y, xz * decay + x * z
        yy, yz, zz = yy * decay + y * y, yz * decay + y * z, zz * decay + z * z
        xt, yt, zt = xt * decay + x * t, yt * decay + y * t, zt * decay + z * t
        self.cross_products = xx, xy, xz, yy, yz, zz, xt, yt, zt
        # One Gauss-Seidel iteration per task.
        prior_a, prior_b, prior_c = _PRIOR_COEFFICIENTS
        a = (_RIDGE * prior_a + xt - xy * b - xz * c) / (_RIDGE + xx)
        b = (_RIDGE * prior_b + yt - xy * a - yz * c) / (_RIDGE + yy)
        c = (_RIDGE * prior_c + zt - xz * a - yz * b) / (_RIDGE + zz)
        self.coefficients = a, b, c


ProgressReading = tuple[float, float]
"""Seconds from the submit to a poll, and the progress that it reported."""

_RATIO_PRIOR = lognormal(1.0, 0.7)
_RATIO_MEMORY = 100.0
_SEGMENTS = 5
"""The range of progress is divided into this many segments, because progress need not be linear."""
_TRUST_THRESHOLD = 6.0
"""Progress is used when it has explained the newest durations e^6 times as well as the histogram of all tasks."""
_MAX_LOG_RATIO = 2.0
"""Log-likelihood ratios of single tasks are clipped to this."""
_EPSILON = 0.001
"""Added to probabilities, so that their ratios are finite."""


def progress_segment(progress: float) -> int:
    """Return the segment of a progress below 1."""
    return int(progress * _SEGMENTS)


@attrs.define(eq=False)
class ProgressModel:
    """How well progress predicts the duration.

    The linear estimate of a reading is elapsed time / progress. For each segment of progress, a histogram holds the
    distribution of the actual duration as a multiple of this estimate.
    """

    ratios: list[DurationHistogram] = attrs.field(
        factory=lambda: [DurationHistogram(_RATIO_MEMORY, _RATIO_PRIOR) for _ in range(_SEGMENTS)]
    )
    """By segment."""
    scores: list[float] = attrs.field(factory=lambda: [0.0] * _SEGMENTS)
    """By segment: decaying sum of the log-likelihood ratios of this model to the histogram of all tasks."""

    @property
    def best_segment(self) -> int:
        """The segment in which progress predicts best."""
        return self.scores.index(max(self.scores))

    def trusts(self, segment: int) -> bool:
        """Check whether progress in a segment predicts better than the histogram of all tasks."""
        return self.scores[segment] > _TRUST_THRESHOLD

    def learn(
        self, reading: ProgressReading, not_before: float, by: float, baseline: DurationHistogram, scale: float
    ) -> None:
        """Add the observation of a task that had this reading and ended between `not_before` and `by` seconds.

        Args:
            reading: The task's reading in one of the segments.
            not_before: Seconds from the submit to the last poll that found the task running.
            by: Seconds from the submit to the poll that found it ended.
            baseline: The histogram of all tasks, to compare the prediction with.
            scale: The task's expected duration as a multiple of those in `baseline`.
        """
        elapsed, progress = reading
        segment, estimate, running_until = progress_segment(progress), elapsed / progress, max(not_before, elapsed)
        ratios = self.ratios[segment]
        start, end = bin_position(running_until / estimate), bin_position(by / estimate)
        # Both likelihoods are conditional on the task running at the time of the reading.
        likelihood = ratios.probability(start, end) / (1 - ratios.cdf_at(bin_position(progress)) + _EPSILON)
        baseline_likelihood = baseline.probability(bin_position(running_until / scale), bin_position(by / scale)) / (
            1 - baseline.cdf_at(bin_position(elapsed / scale)) + _EPSILON
        )
        log_ratio = math.log((likelihood + _EPSILON) / (baseline_likelihood + _EPSILON))
        log_ratio = min(max(log_ratio, -_MAX_LOG_RATIO), _MAX_LOG_RATIO)
        self.scores[segment] = self.scores[segment] * (1 - 1 / 20) + log_ratio
        ratios.learn(start, end)

    def state(self) -> "ProgressModelState":
        """Return what was learned."""
        return ProgressModelState([histogram.state() for histogram in self.ratios], self.scores)

    @classmethod
    def from_state(cls, state: "ProgressModelState") -> Self:
        """Return a model that continues from a state."""
        ratios = [DurationHistogram.from_state(histogram, _RATIO_MEMORY, _RATIO_PRIOR) for histogram in state.ratios]
        return cls(ratios, state.scores)


@attrs.frozen
class ProgressModelState:
    """The learned part of a ProgressModel, as stored in JSON."""

    ratios: list[HistogramState] = attrs.field(validator=(validators.min_len(_SEGMENTS), validators.max_len(_SEGMENTS)))
    scores: list[float] = attrs.field(
        validator=(validators.min_len(_SEGMENTS), validators.max_len(_SEGMENTS), _validate_finite)
    )
