"""LearnedSchedule: learns how long tasks take, and polls when they are likely to have ended."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Self
from weakref import WeakSet

import attrs

from flux2max_async._exceptions import ConfigurationError
from flux2max_async._models.request import GenerationRequest
from flux2max_async._polling.change_detection import AdaptiveHistogram
from flux2max_async._polling.histogram import (
    BIN_WIDTH,
    BINS,
    DurationHistogram,
    bin_position,
    quantile,
    seconds_at,
)
from flux2max_async._polling.learned_state import LearnedState, decode, encode, merge
from flux2max_async._polling.poll_times import PollTimes
from flux2max_async._polling.predictors import (
    DurationRegression,
    Features,
    ProgressModel,
    ProgressReading,
    features_of,
    progress_segment,
)
from flux2max_async._polling.schedules import CostAwarePlan, validate_positive

_MIN_DELAY = 0.05
"""In seconds."""
_MIN_PROGRESS = 0.02
"""Lower progress predicts nothing."""
_TASKS_PER_EARLY_POLL = 25
"""One task in this many gets an early first poll. Otherwise the schedule would never learn that tasks have begun to end
before its usual first poll."""
_GOLDEN_RATIO = 0.618034
_FIRST_READING_QUANTILE = 0.05
"""If progress is worth reading, the first poll comes when this share of the tasks has ended."""
_MIN_READING_GAIN = 1.1
"""Progress is worth reading if polling without it costs this many times as much."""
_SCALE_STEPS = 2
"""PollTimes are computed for scales rounded to 1 / 2 of an e-fold; only the price is affected by the rounding."""
_MAX_CACHED_POLL_TIMES = 128
"""About 40 kB each."""
_FAILURE_MEMORY = 200.0
"""The failure rate is that of about this many tasks."""


class EndedTask(NamedTuple):
    """What there is to learn from a task."""

    features: Features
    readings: tuple[ProgressReading, ...]
    not_before: float
    by: float
    completed: bool
    in_flight: int
    """Number of tasks that were running when it ended."""


@attrs.define(eq=False, repr=False, on_setattr=attrs.setters.NO_OP)
class LearnedSchedule:
    """Learns how long tasks take, and polls when they are likely to have ended.

    Durations are learned as a histogram of their logarithms, from the interval between the last two polls of each task.
    It begins as a broad prior, forgets slowly, and starts again when the durations change. Failures have a histogram of
    their own. A regression scales the durations by the size of the image, the number of input images and the number of
    tasks in flight, as far as these prove to matter; reported progress replaces the histogram once it predicts better.
    A poll is made when the expected delay outweighs its price (Barlow, Hunter and Proschan, "Optimum Checking
    Procedures", J. SIAM 11(4), 1963).

    Several sessions can share a schedule, even if polls cost them differently: see `CostAwarePlan`.

    Args:
        poll_price: How many seconds of delay one poll is worth: a lower price makes more polls, which see ends sooner.

    Raises:
        ConfigurationError: `poll_price` is not a finite number above 0.
    """

    _poll_price: float = attrs.field(
        default=0.1,
        kw_only=True,
        alias="poll_price",
        validator=lambda _, __, price: validate_positive("poll_price", price),
    )
    _durations: AdaptiveHistogram = attrs.field(factory=AdaptiveHistogram, init=False)
    """Durations of completed tasks, divided by the tasks' scales."""
    _failure_durations: DurationHistogram = attrs.field(factory=lambda: DurationHistogram(_FAILURE_MEMORY), init=False)
    _failure_rate: float = attrs.field(default=0.0, init=False)
    """Share of the newest tasks that failed."""
    _finished: float = attrs.field(default=0.0, init=False)
    """Number of tasks that the failure rate is computed from."""
    _regression: DurationRegression = attrs.field(factory=DurationRegression, init=False)
    _progress: ProgressModel = attrs.field(factory=ProgressModel, init=False)
    _in_flight: "WeakSet[_LearnedPlan]" = attrs.field(factory=WeakSet, init=False)
    """Weak, because plans of tasks that nobody follows any more are dropped without `finish()`."""
    _begun: int = attrs.field(default=0, init=False)
    _poll_times: dict[tuple[float, int, tuple[int, int] | None], PollTimes] = attrs.field(factory=dict, init=False)
    """Cache, by price, rounded log-scale, and segment and version of the progress model's histogram if that is used."""
    _poll_times_version: object = attrs.field(default=None, init=False)
    """Versions of the histograms that `_poll_times` was computed from."""
    _on_end: Callable[[EndedTask], None] | None = attrs.field(default=None, init=False)

    @property
    def poll_price(self) -> float:
        """How many seconds of delay one poll is worth."""
        return self._poll_price

    def __repr__(self) -> str:
        return f"LearnedSchedule(poll_price={self._poll_price!r})"

    def begin(self, request: GenerationRequest | None) -> CostAwarePlan:
        """Return the plan for a task that is being submitted now; `request` is None if only the task's id is known."""
        features = features_of(request, len(self._in_flight))
        self._begun += 1
        first_poll_factor = 1.0
        if self._begun % _TASKS_PER_EARLY_POLL == 0 and self._durations.settled:
            # Log-uniform between a tenth and all of the time to the first poll.
            first_poll_factor = 0.1 ** (self._begun / _TASKS_PER_EARLY_POLL * _GOLDEN_RATIO % 1)
        plan = _LearnedPlan(self, features, self._regression.scale(features), first_poll_factor)
        self._in_flight.add(plan)
        return plan

    def percentile(self, percent: float) -> float | None:
        """Return the seconds within which `percent` % of the tasks complete; None before the first has completed."""
        durations = self._durations.current
        if not durations.count:
            return None
        return seconds_at(quantile(durations.cdf, min(max(percent / 100, 0.0), 1.0)))

    def state(self) -> dict[str, Any]:
        """Return what was learned as a small JSON value for `from_state`."""
        return encode(self._learned())

    @classmethod
    def from_state(cls, state: Mapping[str, Any], *, poll_price: float = 0.1) -> Self:
        """Return a schedule that continues from what an earlier one has learned.

        Args:
            state: What `state()` returned, possibly stored as JSON in between.
            poll_price: How many seconds of delay one poll is worth.

        Raises:
            ConfigurationError: The state is of another version or invalid, or `poll_price` is invalid.
        """
        schedule = cls(poll_price=poll_price)
        schedule.restore(state)
        return schedule

    @classmethod
    def merge(cls, *states: Mapping[str, Any], poll_price: float = 0.1) -> Self:
        """Return a schedule that continues from what several have learned, for example those of several hosts.

        It knows what one schedule would know that had seen the tasks of all, and the order of the states doesn't
        matter. A schedule that was itself made from a state has that in its own: merging both counts it twice.

        Args:
            states: What `state()` returned. Without any, nothing is learned yet.
            poll_price: How many seconds of delay one poll is worth.

        Raises:
            ConfigurationError: A state is of another version or invalid, or `poll_price` is invalid.
        """
        schedule = cls(poll_price=poll_price)
        learned = [decode(state, f"states[{number}]") for number, state in enumerate(states)]
        try:
            schedule._restore(merge(learned or [schedule._learned()]))
        except ValueError as error:
            raise ConfigurationError(f"the states can't be merged: {error}") from error
        return schedule

    def next_poll_at(self, plan: "_LearnedPlan", elapsed: float, *, cost_factor: float, is_first: bool) -> float:
        """Return when to poll a task next, in seconds from its submit."""
        price = self._poll_price * cost_factor
        version = self._durations.version, self._failure_durations.version
        if version != self._poll_times_version:
            self._poll_times_version = version
            self._poll_times.clear()
        scale, model = plan.scale, self._progress
        if plan.reading is not None and model.trusts(segment := progress_segment(plan.reading[1])):
            at, progress = plan.reading
            poll_times = self._poll_times_for(at / progress, price, segment)
            return poll_times.after(elapsed * progress / at) * at / progress
        poll_times = self._poll_times_for(scale, price)
        if is_first and model.trusts(model.best_segment):
            cdf = self._durations.current.cdf
            median = seconds_at(quantile(cdf, 0.5)) * scale
            cost_with_progress = price + self._poll_times_for(median, price, model.best_segment).cost() * median
            if _MIN_READING_GAIN * cost_with_progress < poll_times.cost() * scale:
                return seconds_at(quantile(cdf, _FIRST_READING_QUANTILE)) * scale
        return poll_times.after(elapsed / scale) * scale

    def learn(self, plan: "_LearnedPlan", not_before: float, by: float, *, completed: bool) -> None:
        """Add the observation of a task that ended between `not_before` and `by` seconds after its submit."""
        self._in_flight.discard(plan)
        readings = tuple(plan.readings.values())
        task = EndedTask(plan.features, readings, not_before, by, completed, len(self._in_flight))
        self._learn(task, plan.scale)
        if self._on_end is not None:
            self._on_end(task)

    def replay(self, task: EndedTask) -> None:
        """Add the observation of a task that another schedule has begun and seen end."""
        self._learn(task, self._regression.scale(task.features))

    def on_end(self, callback: Callable[[EndedTask], None]) -> None:
        """Call a function with each task that ends from now on, once it is learned."""
        self._on_end = callback

    def restore(self, state: Mapping[str, Any]) -> None:
        """Replace what was learned with what an earlier schedule has learned.

        Raises:
            ConfigurationError: The state is of another version or invalid.
        """
        self._restore(decode(state))

    def _learn(self, task: EndedTask, scale: float) -> None:
        not_before, by = task.not_before, task.by
        self._finished = min(self._finished, _FAILURE_MEMORY - 1) + 1
        self._failure_rate += ((not task.completed) - self._failure_rate) / self._finished
        if not task.completed:
            self._failure_durations.learn(bin_position(not_before), bin_position(by))
            return
        durations = self._durations.current
        start, end = bin_position(not_before / scale), bin_position(by / scale)
        for reading in task.readings:
            self._progress.learn(reading, not_before, by, durations, scale)
        if self._durations.settled:
            middle = quantile(durations.cdf, (durations.cdf_at(start) + durations.cdf_at(end)) / 2)
            self._regression.learn(task.features, (middle - quantile(durations.cdf, 0.5)) * BIN_WIDTH)
        self._durations.learn(start, end, task.in_flight)

    def _learned(self) -> LearnedState:
        return LearnedState(
            self._durations.state(),
            self._failure_durations.state(),
            self._failure_rate,
            self._finished,
            self._regression,
            self._progress.state(),
        )

    def _restore(self, learned: LearnedState) -> None:
        self._durations = AdaptiveHistogram.from_state(learned.durations)
        self._failure_durations = DurationHistogram.from_state(learned.failure_durations, _FAILURE_MEMORY)
        self._failure_rate, self._finished = learned.failure_rate, learned.finished
        self._regression = learned.regression
        self._progress = ProgressModel.from_state(learned.progress)
        self._poll_times.clear()

    def _poll_times_for(self, scale: float, price: float, segment: int | None = None) -> PollTimes:
        """Return the poll times for durations in multiples of `scale`.

        Args:
            scale: The task's scale; with `segment`, the linear estimate of its duration.
            price: Seconds of delay that one poll is worth.
            segment: The segment of the task's progress if that is to be used.
        """
        log_scale = round(_SCALE_STEPS * math.log(scale))
        source = None if segment is None else (segment, self._progress.ratios[segment].version)
        key = price, log_scale, source
        poll_times = self._poll_times.get(key)
        if poll_times is None:
            cdf = self._cdf(log_scale) if segment is None else self._progress.ratios[segment].cdf
            if len(self._poll_times) >= _MAX_CACHED_POLL_TIMES:
                del self._poll_times[next(iter(self._poll_times))]
            poll_times = self._poll_times[key] = PollTimes(cdf, price / math.exp(log_scale / _SCALE_STEPS))
        return poll_times

    def _cdf(self, log_scale: int) -> Sequence[float]:
        """Return the probability that a task has ended, completed or failed, by each of BIN_EDGES times its scale."""
        completed = self._durations.mixture_cdf(len(self._in_flight))
        if not self._failure_rate:
            return completed
        shift = round(log_scale / _SCALE_STEPS / BIN_WIDTH)
        failed = [self._failure_durations.cdf[min(max(k + shift, 0), BINS)] for k in range(BINS + 1)]
        return [a + self._failure_rate * (b - a) for a, b in zip(completed, failed, strict=True)]


@attrs.define(eq=False)
class _LearnedPlan:
    # Not derived from CostAwarePlan, which has no __slots__: a session may have very many plans.
    supports_cost_factor: ClassVar[bool] = True

    _schedule: LearnedSchedule
    features: Features
    scale: float
    """Expected duration as a multiple of those in the schedule's histogram."""
    _first_poll_factor: float
    """The first poll comes after this fraction of the usual time."""
    reading: ProgressReading | None = None
    """Of the highest progress."""
    readings: dict[int, ProgressReading] = attrs.field(factory=dict)
    """Of the highest progress in each segment."""
    _is_first: bool = True
    _finished: bool = False

    def next_delay(self, elapsed: float, progress: float | None, *, cost_factor: float = 1.0) -> float:
        if progress is not None and elapsed > 0:
            self._record_reading(elapsed, progress)
        poll_at = self._schedule.next_poll_at(self, elapsed, cost_factor=cost_factor, is_first=self._is_first)
        if self._is_first:
            self._is_first = False
            poll_at *= self._first_poll_factor
        return max(_MIN_DELAY, poll_at - elapsed)

    def finish(self, not_before: float, by: float, *, completed: bool = True) -> None:
        if not self._finished:
            self._finished = True
            self._schedule.learn(self, min(not_before, by), by, completed=completed)

    def _record_reading(self, elapsed: float, progress: float) -> None:
        if _MIN_PROGRESS <= progress < 1 and (self.reading is None or progress > self.reading[1]):
            self.reading = self.readings[progress_segment(progress)] = elapsed, progress
