"""When to look at a task next: the schedules, pure, with neither clock nor chance of their own."""

import math
from typing import Protocol

import attrs

from flux2max_async._exceptions import ConfigurationError
from flux2max_async._models.request import GenerationRequest


class PollPlan(Protocol):
    """The polling of one task."""

    def next_delay(self, elapsed: float, progress: float | None) -> float:
        """Give the seconds from now to the next poll.

        Args:
            elapsed: Seconds since the submit.
            progress: What the newest poll said, 0.0 to 1.0, if it said anything.
        """
        ...

    def finish(self, not_before: float, by: float, *, completed: bool = True) -> None:
        """Learn from a task that ended.

        Args:
            not_before: Seconds from the submit to the last poll that saw the task running.
            by: Seconds from the submit to the poll that saw its end; equal to `not_before` where a webhook told.
            completed: False for a task that failed; failed tasks have durations of their own kind.
        """
        ...


class PollSchedule(Protocol):
    """Decides when tasks are polled. Pure: it can be driven in virtual time."""

    def begin(self, request: GenerationRequest | None) -> PollPlan:
        """Plan the polling of a task that is being submitted now; None for a task known by its id alone."""
        ...


@attrs.frozen
class FixedSchedule:
    """Polls every `interval` seconds."""

    interval: float

    def __attrs_post_init__(self) -> None:
        positive("interval", self.interval)

    def begin(self, request: GenerationRequest | None) -> PollPlan:  # noqa: ARG002 - every request is alike
        """Plan the polling of one task."""
        return _FixedPlan(self.interval)


@attrs.frozen
class ExponentialSchedule:
    """Polls after `initial` seconds, then waits `factor` times as long each time, up to `maximum` seconds."""

    initial: float = 0.5
    factor: float = attrs.field(default=2.0, kw_only=True)
    maximum: float = attrs.field(default=10.0, kw_only=True)

    def __attrs_post_init__(self) -> None:
        positive("initial", self.initial)
        positive("maximum", self.maximum)
        if not isinstance(self.factor, (int, float)) or not 1 <= self.factor < math.inf:
            raise ConfigurationError(f"factor must be at least 1, not {self.factor!r}")

    def begin(self, request: GenerationRequest | None) -> PollPlan:  # noqa: ARG002 - every request is alike
        """Plan the polling of one task."""
        return _ExponentialPlan(min(self.initial, self.maximum), self.factor, self.maximum)


@attrs.define
class _FixedPlan:
    _interval: float

    def next_delay(self, elapsed: float, progress: float | None) -> float:  # noqa: ARG002 - it looks at neither
        return self._interval

    def finish(self, not_before: float, by: float, *, completed: bool = True) -> None:
        pass


@attrs.define
class _ExponentialPlan:
    _delay: float
    _factor: float
    _maximum: float

    def next_delay(self, elapsed: float, progress: float | None) -> float:  # noqa: ARG002 - it looks at neither
        delay = self._delay
        self._delay = min(delay * self._factor, self._maximum)
        return delay

    def finish(self, not_before: float, by: float, *, completed: bool = True) -> None:
        pass


def positive(name: str, value: float) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < math.inf:
        raise ConfigurationError(f"{name} must be more than 0 seconds, not {value!r}")
