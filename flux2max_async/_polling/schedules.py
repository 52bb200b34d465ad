"""The protocols of poll schedules, and two simple schedules. Pure: no clock and no randomness."""

import math
from typing import Any, ClassVar, Protocol

import attrs

from flux2max_async._exceptions import ConfigurationError
from flux2max_async._models.request import GenerationRequest


class PollPlan(Protocol):
    """The polling of one task.

    A plan whose delays should grow when polls become more expensive can support `CostAwarePlan` as well.
    """

    def next_delay(self, elapsed: float, progress: float | None) -> float:
        """Return the seconds from the last poll to the next one.

        Args:
            elapsed: Seconds from the submit to the last poll; 0.0 before the first.
            progress: Progress reported by the last poll, 0.0 to 1.0; None if it reported none.
        """
        ...

    def finish(self, not_before: float, by: float, *, completed: bool = True) -> None:
        """Learn from a task that ended.

        Args:
            not_before: Seconds from the submit to the last poll that found the task running.
            by: Seconds from the submit to the poll that found it ended; equal to `not_before` if a webhook reported
                the end.
            completed: False if the task failed. Failed tasks have a distribution of durations of their own.
        """
        ...


class CostAwarePlan(PollPlan, Protocol):
    """A plan that takes the current cost of a poll into account.

    Any schedule's plans may support this, not only those of LearnedSchedule. A plan supports it if its class has the
    attribute `supports_cost_factor = True`; a class that derives from this one has it. The session then passes
    `cost_factor` to every call of `next_delay`, and may call it again with the same `elapsed` and another factor.
    """

    supports_cost_factor: ClassVar[bool] = True

    def next_delay(self, elapsed: float, progress: float | None, *, cost_factor: float = 1.0) -> float:
        """Return the seconds from the last poll to the next one.

        Args:
            elapsed: Seconds from the submit to the last poll; 0.0 before the first.
            progress: Progress reported by the last poll, 0.0 to 1.0; None if it reported none.
            cost_factor: How many times as expensive as usual a poll is now: more than 1.0 when the service or the
                session limits the rate of polls, or when a webhook will probably report the end.
        """
        ...


class PollSchedule(Protocol):
    """Decides when tasks are polled. Pure: it can be driven in virtual time."""

    def begin(self, request: GenerationRequest | None) -> PollPlan:
        """Return the plan for a task that is being submitted now; `request` is None if only the task's id is known."""
        ...


@attrs.frozen
class FixedSchedule:
    """Polls every `interval` seconds."""

    interval: float

    def __attrs_post_init__(self) -> None:
        validate_positive("interval", self.interval)

    def begin(self, request: GenerationRequest | None) -> PollPlan:  # noqa: ARG002 - all requests are treated alike
        """Return the plan for one task."""
        return _FixedPlan(self.interval)


@attrs.frozen
class ExponentialSchedule:
    """Polls after `initial` seconds; each further delay is `factor` times the one before, up to `maximum` seconds."""

    initial: float = 0.5
    factor: float = attrs.field(default=2.0, kw_only=True)
    maximum: float = attrs.field(default=10.0, kw_only=True)

    def __attrs_post_init__(self) -> None:
        validate_positive("initial", self.initial)
        validate_positive("maximum", self.maximum)
        if not isinstance(self.factor, (int, float)) or not 1 <= self.factor < math.inf:
            raise ConfigurationError(f"factor must be at least 1, not {self.factor!r}")

    def begin(self, request: GenerationRequest | None) -> PollPlan:  # noqa: ARG002 - all requests are treated alike
        """Return the plan for one task."""
        return _ExponentialPlan(min(self.initial, self.maximum), self.factor, self.maximum)


@attrs.define
class _FixedPlan:
    _interval: float

    def next_delay(self, elapsed: float, progress: float | None) -> float:  # noqa: ARG002 - the protocol's signature
        return self._interval

    def finish(self, not_before: float, by: float, *, completed: bool = True) -> None:
        pass


@attrs.define
class _ExponentialPlan:
    _delay: float
    _factor: float
    _maximum: float

    def next_delay(self, elapsed: float, progress: float | None) -> float:  # noqa: ARG002 - the protocol's signature
        delay = self._delay
        self._delay = min(delay * self._factor, self._maximum)
        return delay

    def finish(self, not_before: float, by: float, *, completed: bool = True) -> None:
        pass


class ScaledPlan:
    """A plan of any schedule, whose delays grow with the cost of a poll whether or not the schedule supports that."""

    def __init__(self, schedule: PollSchedule, request: GenerationRequest | None) -> None:
        self._plan: Any = schedule.begin(request)
        self.cost_aware: bool = getattr(self._plan, "supports_cost_factor", False)
        self._asked_at = math.nan
        self._delay = 0.0

    def next_delay(self, elapsed: float, progress: float | None, *, cost_factor: float) -> float:
        """Return the seconds from the last poll to the next one, as `CostAwarePlan` does."""
        if self.cost_aware:
            delay: float = self._plan.next_delay(elapsed, progress, cost_factor=cost_factor)
            return delay
        if elapsed != self._asked_at:  # ask once per poll, however often the poll is planned anew
            self._asked_at = elapsed
            self._delay = self._plan.next_delay(elapsed, progress)
        # At a constant rate of ending, the best interval grows with the square root of a poll's cost.
        return self._delay * math.sqrt(cost_factor)

    def finish(self, not_before: float, by: float, *, completed: bool) -> None:
        """Pass on when the task ended."""
        self._plan.finish(not_before, by, completed=completed)


def validate_positive(name: str, seconds: float) -> None:
    """Raise ConfigurationError unless `seconds` is a finite number above 0."""
    if not isinstance(seconds, (int, float)) or isinstance(seconds, bool) or not 0 < seconds < math.inf:
        raise ConfigurationError(f"{name} must be more than 0 seconds, not {seconds!r}")
