"""What a LearnedSchedule has learned, as stored in JSON, and the sum of what several have learned. Pure."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final, Literal, TypeVar

import attrs
import cattrs
from attrs import validators
from cattrs.v import format_exception

from flux2max_async._exceptions import ConfigurationError
from flux2max_async._polling.change_detection import AdaptiveHistogramState
from flux2max_async._polling.histogram import MAX_COUNT, HistogramState
from flux2max_async._polling.predictors import DurationRegression, ProgressModelState

T = TypeVar("T")

VERSION: Final = 2


@attrs.frozen
class LearnedState:
    """The learned part of a LearnedSchedule."""

    durations: AdaptiveHistogramState
    failure_durations: HistogramState
    failure_rate: float = attrs.field(validator=(validators.ge(0.0), validators.le(1.0)))
    finished: float = attrs.field(validator=(validators.ge(0.0), validators.le(MAX_COUNT)))
    """Number of tasks that the failure rate is computed from."""
    regression: DurationRegression
    progress: ProgressModelState
    version: Literal[2] = VERSION


_converter = cattrs.Converter(forbid_extra_keys=True)


def encode(state: LearnedState) -> dict[str, Any]:
    """Return a state as JSON's types."""
    value: dict[str, Any] = _converter.unstructure(state)
    return value


def decode(value: object, name: str = "state") -> LearnedState:
    """Return the state that `encode()` was called with.

    Args:
        value: What `encode()` returned, possibly stored as JSON in between.
        name: What the error calls it.

    Raises:
        ConfigurationError: It is of another version, or invalid.
    """
    try:
        return _converter.structure(value, LearnedState)
    except Exception as error:
        reasons = "; ".join(cattrs.transform_error(error, path=name, format_exception=_reason))
        raise ConfigurationError(f"{name} must be what LearnedSchedule.state() returned: {reasons}") from error


def is_newer(value: Mapping[str, Any]) -> bool:
    """Check whether a newer version of this library has encoded a state."""
    version = value.get("version")
    return isinstance(version, int) and version > VERSION


def _reason(error: BaseException, type: type | None) -> str:
    return str(error) if isinstance(error, ValueError) else format_exception(error, type)


# ------------------------------------------------------------------ sums
#
# Counts, weights and products are added; means are weighted by counts. All sums are rounded once, so that neither the
# order of the states matters, nor, but for the rounding in the last digits, which of them are added first.


def merge(states: Sequence[LearnedState]) -> LearnedState:
    """Return what one schedule would know if it had learned from the tasks of all; the sum of one state is itself."""
    if len(states) == 1:
        return states[0]
    counts = [state.finished for state in states]
    return LearnedState(
        _merge_adaptive([state.durations for state in states]),
        _merge_histograms([state.failure_durations for state in states]),
        min(_mean([state.failure_rate for state in states], counts), 1.0),
        math.fsum(counts),
        _merge_regressions([state.regression for state in states]),
        ProgressModelState(
            _merge_each([state.progress.ratios for state in states], _merge_histograms),
            _merge_each([state.progress.scores for state in states], math.fsum),
        ),
    )


def _merge_adaptive(states: Sequence[AdaptiveHistogramState]) -> AdaptiveHistogramState:
    # Where nothing has changed, the current histogram is the long-term one as well.
    is_stable = all(state.long_term is None for state in states)
    return AdaptiveHistogramState(
        _merge_histograms([state.current for state in states]),
        _merge_each([state.previous for state in states], _merge_histograms),
        None if is_stable else _merge_histograms([state.long_term or state.current for state in states]),
        math.fsum(state.change_count for state in states),
    )


def _merge_histograms(states: Sequence[HistogramState]) -> HistogramState:
    used = [state for state in states if state.count]
    if len(used) < 2:
        return used[0] if used else states[0]
    first = min(state.first_bin for state in used)
    padded = [[0.0] * (state.first_bin - first) + state.weights for state in used]
    return HistogramState(math.fsum(state.count for state in used), first, _merge_each(padded, math.fsum))


def _merge_regressions(states: Sequence[DurationRegression]) -> DurationRegression:
    counts = [state.count for state in states]
    coefficients, means = (
        tuple(_mean(values, counts) for values in zip(*vectors, strict=True))
        for vectors in ([state.coefficients for state in states], [state.means for state in states])
    )
    products = tuple(map(math.fsum, zip(*[state.cross_products for state in states], strict=True)))
    return DurationRegression(coefficients, means, math.fsum(counts), products)  # type: ignore[arg-type] # their lengths stay


def _merge_each(lists: Iterable[Sequence[T]], merge_one: Callable[[list[T]], T]) -> list[T]:
    """Merge the first items of all lists, then the second ones, and so on; shorter lists have no more items."""
    length = max(map(len, lists))
    return [merge_one([items[k] for items in lists if k < len(items)]) for k in range(length)]


def _mean(values: Sequence[float], counts: Sequence[float]) -> float:
    """Return the mean of values, weighted by counts; any of them if all counts are 0."""
    total = math.fsum(counts)
    products = math.fsum(value * count for value, count in zip(values, counts, strict=True))
    return products / total if total else max(values)
