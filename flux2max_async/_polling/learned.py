"""The schedule that learns: polls where the end is likely, at a price for each."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Self
from weakref import WeakSet

import attrs
import cattrs
from attrs import validators
from cattrs.v import format_exception

from flux2max_async._exceptions import ConfigurationError
from flux2max_async._models.request import GenerationRequest
from flux2max_async._polling.change_detection import AdaptiveHistogram, AdaptiveHistogramState
from flux2max_async._polling.histogram import (
    BIN_WIDTH,
    BINS,
    DurationHistogram,
    HistogramState,
    bin_position,
    quantile,
    seconds_at,
)
from flux2max_async._polling.poll_times import PollTimes
from flux2max_async._polling.predictors import (
    DurationRegression,
    Features,
    ProgressModel,
    ProgressModelState,
    ProgressReading,
    features_of,
    part_of,
)
from flux2max_async._polling.schedules import PollPlan, positive

_EARLY = 25
"""One task in so many is looked at once more, early, lest ends that come early are never seen as such."""
_GOLDEN = 0.618034
_SOON = 0.05
"""Where progress is worth asking for, the first look comes when so many tasks have ended; ..."""
_GAIN = 1.1
"""... and it is where looking by its word, and once more, costs so much less than looking by the law."""
_MINIMUM = 0.05
"""One task is not polled more often than this, in seconds."""
_STEPS = 2
"""Tasks whose scales differ by less than half an e-fold share their looks: only the price is rounded by that."""
_FAILURES = 200.0


@attrs.frozen
class _State:
    """What a schedule has learned, to be kept as JSON."""

    law: AdaptiveHistogramState
    failures: HistogramState
    failing: float = attrs.field(validator=(validators.ge(0.0), validators.le(1.0)))
    ended: float = attrs.field(validator=(validators.ge(0.0), validators.le(_FAILURES)))
    effort: DurationRegression
    progress: ProgressModelState
    version: Literal[1] = 1


_converter = cattrs.Converter(forbid_extra_keys=True)


@attrs.define(eq=False, repr=False)
class LearnedSchedule:
    """Learns how long tasks take, and polls where the end is likely.

    The law is a histogram of the logarithm of the seconds, learned from the intervals between the last two polls; it
    starts as a broad guess, fades slowly, and starts again when the tasks no longer agree with it. Failures have a law
    of their own. The size asked for, the input images and the tasks in flight stretch the law as far as they proved to
    matter; progress replaces it once it has foretold the ends better. A poll comes when the delay to be expected
    outweighs its price (Barlow, Hunter and Proschan, "Optimum Checking Procedures", J. SIAM 11(4), 1963).

    Args:
        poll_price: How many seconds of waiting one poll is worth: smaller polls more and notices sooner.

    Raises:
        ConfigurationError: The price is not a number of more than 0 seconds.
    """

    _price: float = attrs.field(
        default=0.1, kw_only=True, alias="poll_price", validator=lambda _, __, price: positive("poll_price", price)
    )
    cost_factor: float = attrs.field(default=1.0, init=False)
    """How many times as dear as usual a poll is for now: a session raises it where the service has too much to do."""
    _law: AdaptiveHistogram = attrs.field(factory=AdaptiveHistogram, init=False)
    """Of the tasks that completed, in seconds of a usual task."""
    _failures: DurationHistogram = attrs.field(factory=lambda: DurationHistogram(_FAILURES), init=False)
    _failing: float = attrs.field(default=0.0, init=False)
    """The share of the newest tasks that failed."""
    _ended: float = attrs.field(default=0.0, init=False)
    """How many tasks that share is of."""
    _effort: DurationRegression = attrs.field(factory=DurationRegression, init=False)
    _foresight: ProgressModel = attrs.field(factory=ProgressModel, init=False)
    _plans: "WeakSet[_LearnedPlan]" = attrs.field(factory=WeakSet, init=False)
    """The tasks in flight; those that are given up fall out by themselves."""
    _begun: int = attrs.field(default=0, init=False)
    _looks: dict[tuple[tuple[int, int] | None, int], PollTimes] = attrs.field(factory=dict, init=False)
    """Under the laws and the price of `_drawn`: by the law of progress, if it is one, and by the scale's logarithm."""
    _drawn: object = attrs.field(default=None, init=False)

    @property
    def poll_price(self) -> float:
        """How many seconds of waiting one poll is worth now; setting it sets what it is worth usually."""
        return self._price * self.cost_factor

    @poll_price.setter
    def poll_price(self, price: float) -> None:
        self._price = price

    def __repr__(self) -> str:
        return f"LearnedSchedule(poll_price={self._price!r})"

    def begin(self, request: GenerationRequest | None) -> PollPlan:
        """Plan the polling of a task that is being submitted now; None for a task known by its id alone."""
        traits = features_of(request, len(self._plans))
        self._begun += 1
        early = 1.0
        if self._begun % _EARLY == 0 and self._law.settled:
            # Spread evenly, in the logarithm, over a tenth to all of the way to the first look.
            early = 0.1 ** (self._begun / _EARLY * _GOLDEN % 1)
        plan = _LearnedPlan(self, traits, self._effort.scale(traits), early)
        self._plans.add(plan)
        return plan

    def percentile(self, percent: float) -> float | None:
        """Give the seconds within which so many of a hundred tasks complete; None before any has."""
        if not self._law.present.count:
            return None
        return seconds_at(quantile(self._law.present.ended, min(max(percent / 100, 0.0), 1.0)))

    def state(self) -> dict[str, Any]:
        """Give what was learned as a small JSON value, for `from_state`."""
        state = _State(
            self._law.state(), self._failures.state(), self._failing, self._ended, self._effort, self._foresight.state()
        )
        value: dict[str, Any] = _converter.unstructure(state)
        return value

    @classmethod
    def from_state(cls, state: Mapping[str, Any], *, poll_price: float = 0.1) -> Self:
        """Go on from what an earlier schedule had learned.

        Args:
            state: What `state` gave, perhaps through JSON.
            poll_price: How many seconds of waiting one poll is worth.

        Raises:
            ConfigurationError: The state is of another version, or no such state at all; or the price is senseless.
        """
        schedule = cls(poll_price=poll_price)
        try:
            learned = _converter.structure(state, _State)
        except Exception as error:
            reasons = "; ".join(cattrs.transform_error(error, path="state", format_exception=_reason))
            raise ConfigurationError(f"state must be what LearnedSchedule.state() gave: {reasons}") from error
        schedule._law = AdaptiveHistogram.from_state(learned.law)
        schedule._failures = DurationHistogram.from_state(learned.failures, _FAILURES)
        schedule._failing, schedule._ended = learned.failing, learned.ended
        schedule._effort = learned.effort
        schedule._foresight = ProgressModel.from_state(learned.progress)
        return schedule

    def next_look(self, plan: "_LearnedPlan", elapsed: float, *, first: bool) -> float:
        """Give the moment of the next poll of a task, in seconds from its submit."""
        drawn = self._law.version, self._failures.version, self.poll_price
        if drawn != self._drawn:
            self._drawn = drawn
            self._looks.clear()
        scale, foresight = plan.scale, self._foresight
        if plan.said is not None and foresight.proven(part_of(plan.said[1])):
            at, progress = plan.said
            return self._looks_at(at / progress, part_of(progress)).after(elapsed * progress / at) * at / progress
        looks = self._looks_at(scale)
        if first and foresight.proven(foresight.best):
            ended = self._law.present.ended
            usual = seconds_at(quantile(ended, 0.5)) * scale
            asking = self.poll_price + self._looks_at(usual, foresight.best).cost() * usual
            if _GAIN * asking < looks.cost() * scale:
                return seconds_at(quantile(ended, _SOON)) * scale
        return looks.after(elapsed / scale) * scale

    def learn(self, plan: "_LearnedPlan", not_before: float, by: float, *, completed: bool) -> None:
        """Take in when a task ended, in seconds from its submit."""
        self._plans.discard(plan)
        self._ended = min(self._ended + 1, _FAILURES)
        self._failing += ((not completed) - self._failing) / self._ended
        if not completed:
            self._failures.learn(bin_position(not_before), bin_position(by))
            return
        law = self._law.present
        first, last = bin_position(not_before / plan.scale), bin_position(by / plan.scale)
        for said in plan.told.values():
            self._foresight.learn(said, not_before, by, law, plan.scale)
        if self._law.settled:
            middle = quantile(law.ended, (law.chance(first) + law.chance(last)) / 2)
            self._effort.learn(plan.traits, (middle - quantile(law.ended, 0.5)) * BIN_WIDTH)
        self._law.learn(first, last, len(self._plans))

    def _looks_at(self, scale: float, part: int | None = None) -> PollTimes:
        """Give the looks for tasks of such a scale, or for those that take so long by what progress told in a part."""
        step = round(_STEPS * math.log(scale))
        told = None if part is None else (part, self._foresight.laws[part].version)
        looks = self._looks.get((told, step))
        if looks is None:
            ended = self._all_ended(step) if part is None else self._foresight.laws[part].ended
            looks = self._looks[told, step] = PollTimes(ended, self.poll_price / math.exp(step / _STEPS))
        return looks

    def _all_ended(self, step: int) -> Sequence[float]:
        """Give the chance of having ended by each edge, completed or failed, for tasks of about such a scale."""
        ended = self._law.ended(len(self._plans))
        if not self._failing:
            return ended
        shift = round(step / _STEPS / BIN_WIDTH)
        failed = [self._failures.ended[min(max(k + shift, 0), BINS)] for k in range(BINS + 1)]
        return [one + self._failing * (other - one) for one, other in zip(ended, failed, strict=True)]


def _reason(error: BaseException, type: type | None) -> str:
    return str(error) if isinstance(error, ValueError) else format_exception(error, type)


@attrs.define(eq=False)
class _LearnedPlan:
    _schedule: LearnedSchedule
    traits: Features
    scale: float
    """How many times as long as usual the task should take."""
    _early: float
    """The first look comes after this part of its time."""
    said: ProgressReading | None = None
    """The highest progress, and when it was told."""
    told: dict[int, ProgressReading] = attrs.field(factory=dict)
    """The same for each part of its way."""
    _first: bool = True
    _finished: bool = False

    def next_delay(self, elapsed: float, progress: float | None) -> float:
        if progress is not None and elapsed > 0 and 0.02 <= progress < 1 and (not self.said or progress > self.said[1]):
            self.said = self.told[part_of(progress)] = elapsed, progress
        look = self._schedule.next_look(self, elapsed, first=self._first)
        if self._first:
            self._first = False
            look *= self._early
        return max(_MINIMUM, look - elapsed)

    def finish(self, not_before: float, by: float, *, completed: bool = True) -> None:
        if not self._finished:
            self._finished = True
            self._schedule.learn(self, min(not_before, by), by, completed=completed)
