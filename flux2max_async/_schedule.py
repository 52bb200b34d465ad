"""When to look at a task next: the schedules, pure, with neither clock nor chance of their own."""

import math
from typing import Protocol

import attrs

from flux2max_async._errors import ConfigurationError
from flux2max_async._request import GenerationRequest


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
        _positive("interval", self.interval)

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
        _positive("initial", self.initial)
        _positive("maximum", self.maximum)
        if not isinstance(self.factor, (int, float)) or not 1 <= self.factor < math.inf:
            raise ConfigurationError(f"factor must be at least 1, not {self.factor!r}")

    def begin(self, request: GenerationRequest | None) -> PollPlan:  # noqa: ARG002 - every request is alike
        """Plan the polling of one task."""
        return _ExponentialPlan(min(self.initial, self.maximum), self.factor, self.maximum)


@attrs.define
class LearnedSchedule:
    """Learns how long tasks take, and polls where the end is likely.

    The durations are taken to be lognormal; the law starts as a broad guess (10 s, give or take a factor of four) that
    the first tasks replace, and follows what the tasks then show, the newest ones most. A poll is due at the moment
    u when one more second of not looking costs as much as looking does: with the hazard h of the law and x such that
    e^x - 1 - x = poll_price * h(u), that is when the odds of the task having ended since the last look reach e^x - 1.
    For tasks that end at a constant rate this is exact (Barlow, Hunter and Proschan, "Optimum Checking Procedures",
    J. SIAM 11(4), 1963). Where progress moves, the end that it points to narrows the law.

    Args:
        poll_price: How many seconds of waiting one poll is worth: smaller polls more and notices sooner.
    """

    poll_price: float = attrs.field(default=0.1, kw_only=True)
    _mean: float = attrs.field(default=math.log(10.0), init=False)
    """Mean of the logarithm of the seconds that a task takes."""
    _square: float = attrs.field(default=math.log(10.0) ** 2 + 1.5**2, init=False)
    """Mean of its square."""
    _weight: float = attrs.field(default=0.25, init=False)
    """How many observations what is known is worth."""

    def __attrs_post_init__(self) -> None:
        _positive("poll_price", self.poll_price)

    def begin(self, request: GenerationRequest | None) -> PollPlan:  # noqa: ARG002 - all requests are one kind yet
        """Plan the polling of one task."""
        return _LearnedPlan(self)

    def law(self) -> tuple[float, float]:
        """Give the mean and the standard deviation of the logarithm of a task's seconds."""
        return self._mean, max(math.sqrt(max(self._square - self._mean**2, 0.0)), 0.05)

    def observe(self, seconds: float) -> None:
        """Learn that a task took so long."""
        x = math.log(seconds)
        # The newest observation always counts for at least a thirtieth, so that the law follows a service that changes.
        self._weight = min(self._weight + 1, 30.0)
        self._mean += (x - self._mean) / self._weight
        self._square += (x * x - self._square) / self._weight


_ENDLESS = 1e9
"""No guess at the end of a task, in seconds, is taken seriously from here on."""
_SHORTEST = 0.05
"""No schedule of ours polls one task more often than this, in seconds."""


@attrs.define
class _FixedPlan:
    _interval: float

    def next_delay(self, elapsed: float, progress: float | None) -> float:  # noqa: ARG002
        return self._interval

    def finish(self, not_before: float, by: float, *, completed: bool = True) -> None:
        pass


@attrs.define
class _ExponentialPlan:
    _delay: float
    _factor: float
    _maximum: float

    def next_delay(self, elapsed: float, progress: float | None) -> float:  # noqa: ARG002
        delay = self._delay
        self._delay = min(delay * self._factor, self._maximum)
        return delay

    def finish(self, not_before: float, by: float, *, completed: bool = True) -> None:
        pass


@attrs.define
class _LearnedPlan:
    _schedule: LearnedSchedule
    _first: tuple[float, float] | None = None
    """The first progress seen, and when."""
    _newest: float = 0.0
    """The newest progress seen."""
    _moves: int = 0
    """How often it has moved."""

    def next_delay(self, elapsed: float, progress: float | None) -> float:
        (mean, deviation), price = self._schedule.law(), self._schedule.poll_price
        delay = _next_look(elapsed, mean, deviation, price) - elapsed
        end = self._end_by_progress(elapsed, progress)
        if end is not None:
            # An extrapolation from a short way is worth less than one from a long way; and none is worth waiting much
            # longer than the law alone says.
            narrowed = max(0.05, deviation * (1 - elapsed / end))
            delay = min(_next_look(elapsed, math.log(end), narrowed, price) - elapsed, 2 * delay)
        return max(_SHORTEST, delay)

    def finish(self, not_before: float, by: float, *, completed: bool = True) -> None:
        if completed:
            self._schedule.observe(max((not_before + by) / 2, _SHORTEST))

    def _end_by_progress(self, elapsed: float, progress: float | None) -> float | None:
        """Guess how many seconds the whole task takes, from the way between two different values of its progress."""
        if progress is None or not 0 < progress < 1:
            return None
        if self._first is None:
            self._first, self._newest = (progress, elapsed), progress
            return None
        # Only what has just moved, and has moved before, tells more than the law: the rest may be stuck or coarse.
        moved, self._newest = progress > self._newest, progress
        self._moves += moved
        first, since = self._first
        if not moved or self._moves < 2 or elapsed <= since or progress <= first:
            return None
        end = elapsed + (1 - progress) * (elapsed - since) / (progress - first)
        return end if end < _ENDLESS else None


def _next_look(now: float, mean: float, deviation: float, price: float) -> float:
    """Find the moment of the next poll under a lognormal law, by bisection between now and far beyond the law."""

    def survival(t: float) -> float:
        return max(math.erfc((math.log(t) - mean) / deviation / math.sqrt(2)) / 2, 1e-300) if t > 0 else 1.0

    def too_early(u: float) -> bool:
        z = (math.log(u) - mean) / deviation
        hazard = math.exp(-z * z / 2) / math.sqrt(2 * math.pi) / deviation / u / survival(u)
        return survival(now) / survival(u) - 1 < math.expm1(_root(price * hazard))

    early, late = now, max(now * 1.5, math.exp(mean + deviation))
    if survival(now) < 1e-9:
        # Later than this law can tell: look again after a tenth of the time waited so far.
        return now * 1.1
    while too_early(late):
        early, late = late, late * 1.5
    for _ in range(30):
        middle = (early + late) / 2
        if late - early < 0.01:
            break
        early, late = (middle, late) if too_early(middle) else (early, middle)
    return late


def _root(y: float) -> float:
    """Solve e^x - 1 - x = y for x >= 0, by Newton's method from above."""
    x = min(math.sqrt(2 * y), math.log1p(y) + 1)
    for _ in range(4):
        x -= (math.expm1(x) - x - y) / max(math.expm1(x), 1e-12)
    return max(x, 0.0)


def _positive(name: str, value: float) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < math.inf:
        raise ConfigurationError(f"{name} must be more than 0 seconds, not {value!r}")
