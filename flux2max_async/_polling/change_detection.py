"""A law that may change from one task to the next, and change back: a service that slows down, or is repaired."""

import math
from collections import deque
from collections.abc import Sequence
from copy import deepcopy
from typing import Self

import attrs
from attrs import validators

from flux2max_async._polling.histogram import DurationHistogram, HistogramState

_ALARM = 6.0
"""A change is believed when it has become e^6 times as likely as none."""
_SURPRISE = 3.0
"""No single task counts for more than one that is so many deviations off."""
_RECALL = 3.0
"""A former law is taken up again when it has become e^3 times as likely as the present one."""
_FEW = 4
"""Before so many tasks have ended there is nothing that could change."""
_FORMER = 3
_REMEMBERED = 64
_STEADY = 400.0
_TINY = 0.001


@attrs.frozen
class AdaptiveHistogramState:
    """What a changing law has learned, to be kept as JSON."""

    present: HistogramState
    former: list[HistogramState] = attrs.field(validator=validators.max_len(_FORMER))
    steady: HistogramState | None
    changes: float = attrs.field(validator=(validators.ge(0.0), validators.le(1e9)))


@attrs.define(eq=False)
class AdaptiveHistogram:
    """The present law, those before it, and a steady one of all tasks alike.

    Two sums of likelihood ratios watch whether durations have become longer or shorter than foretold, by about their
    own spread (Page, "Continuous Inspection Schemes", Biometrika 41, 1954). At an alarm the present law starts again
    from the tasks since the sum began to rise, unless a former one has foretold these better. The steady law never
    starts again: it is what to believe of tasks that may be the first under a law that nobody has seen yet.
    """

    present: DurationHistogram = attrs.field(factory=DurationHistogram)
    steady: DurationHistogram | None = None
    """There is none as long as nothing has changed."""
    former: list[DurationHistogram] = attrs.field(factory=list)
    changes: float = 0.0
    """How many changes were noticed within the steady law's memory."""
    _lead: float = attrs.field(default=0.0, init=False)
    """The logarithm of how much better the present law has foretold the newest tasks than the steady one."""
    _better: list[float] = attrs.field(init=False)
    """For each former law the logarithm of how much better it has foretold the newest tasks than the present one."""
    _rises: list[float] = attrs.field(init=False)
    """The two sums: for longer, and for shorter."""
    _since: list[int] = attrs.field(init=False)
    """How many tasks ago each began to rise."""
    _crowd: int = attrs.field(default=0, init=False)
    """The most tasks that were in flight under the present law."""
    _newest: deque[tuple[float, float]] = attrs.field(factory=lambda: deque(maxlen=_REMEMBERED), init=False, repr=False)
    _starts: int = attrs.field(default=0, init=False)

    def __attrs_post_init__(self) -> None:
        self._begin()

    @property
    def version(self) -> tuple[int, int, int]:
        """What tells one state of the law from another."""
        return self._starts, self.present.version, self.steady.version if self.steady else 0

    @property
    def settled(self) -> bool:
        """Whether enough is known to speak of a law."""
        return self.present.count >= _FEW

    def ended(self, unseen: int) -> Sequence[float]:
        """Give the chance of having ended by each edge, while the ends of `unseen` tasks have not been seen yet."""
        if self.steady is None:
            return self.present.ended
        changed = min(self.changes / (self.steady.count + 30) * unseen, 0.5)
        trust = 1 / (1 + changed / (1 - changed) + math.exp(min(max(-self._lead, -30.0), 30.0)))
        both = zip(self.present.ended, self.steady.ended, strict=True)
        return [trust * present + (1 - trust) * steady for present, steady in both]

    def learn(self, first: float, last: float, unseen: int) -> None:
        """Take in that a task ended between two places, and change the law when that makes a change likely.

        Args:
            first: The place by which it had not ended.
            last: The place by which it had.
            unseen: How many others are in flight.
        """
        self._newest.append((first, last))
        unread = [(first, last)]
        recalled, since = self._recalled(first, last), self._changed_since(first, last, unseen)
        if recalled is not None:
            self.present, self.former[recalled] = self.former[recalled], self.present
            self._change()
        elif since:
            if self.present.count > 2 * _FEW:
                self.former = [self.present, *self.former[: _FORMER - 1]]
            if self.steady is None:
                self.steady = deepcopy(self.present)
                self.steady.memory = _STEADY
            unread = list(self._newest)[-since:]
            self.present = DurationHistogram()
            self._change()
        for one in unread:
            if self.steady is not None:
                ahead = (self.present.mass(*one) + _TINY) / (self.steady.mass(*one) + _TINY)
                self._lead = self._lead * (1 - 1 / 15) + math.log(ahead)
            self.present.learn(*one)
        if self.steady is not None:
            self.steady.learn(first, last)
            self.changes *= 1 - 1 / _STEADY
            if self.changes < 0.1:
                self.steady, self.former, self._better = None, [], []

    def state(self) -> AdaptiveHistogramState:
        """Give what was learned."""
        steady = self.steady.state() if self.steady else None
        return AdaptiveHistogramState(self.present.state(), [law.state() for law in self.former], steady, self.changes)

    @classmethod
    def from_state(cls, state: AdaptiveHistogramState) -> Self:
        """Go on from what was learned."""
        steady = DurationHistogram.from_state(state.steady, _STEADY) if state.steady else None
        return cls(
            DurationHistogram.from_state(state.present),
            steady,
            [DurationHistogram.from_state(law) for law in state.former],
            state.changes,
        )

    def _change(self) -> None:
        self.changes += 1
        self._lead = 0.0
        self._starts += 1
        self._begin()

    def _begin(self) -> None:
        self._better = [0.0] * len(self.former)
        self._rises, self._since = [0.0, 0.0], [0, 0]
        self._crowd = 0

    def _recalled(self, first: float, last: float) -> int | None:
        """Tell which former law to take up again, if any."""
        if not self.former:
            return None
        present = self.present.mass(first, last) + _TINY
        for k, law in enumerate(self.former):
            ahead = math.log((law.mass(first, last) + _TINY) / present)
            self._better[k] = max(self._better[k] + ahead, 0.0)
        best = max(self._better)
        return self._better.index(best) if best > _RECALL else None

    def _changed_since(self, first: float, last: float, unseen: int) -> int:
        """Tell how many tasks ago the law changed, or 0 where it didn't."""
        # Of a crowd that began together the shortest end first: until all are seen, longer ones are no news.
        self._crowd = max(self._crowd, unseen)
        if self.present.count < _FEW + self._crowd:
            return 0
        deviation = _normal_quantile((self.present.chance(first) + self.present.chance(last)) / 2)
        deviation = min(max(deviation, -_SURPRISE), _SURPRISE)
        for k, further in enumerate((deviation, -deviation)):
            self._rises[k] = max(self._rises[k] + further - 0.5, 0.0)
            self._since[k] = self._since[k] + 1 if self._rises[k] else 0
        highest = max(self._rises)
        return self._since[self._rises.index(highest)] if highest > _ALARM else 0


def _normal_quantile(chance: float) -> float:
    # Abramowitz and Stegun, "Handbook of Mathematical Functions", 26.2.22: to 0.003.
    t = math.sqrt(-2 * math.log(max(min(chance, 1 - chance), 1e-9)))
    z = t - (2.30753 + 0.27061 * t) / (1 + 0.99229 * t + 0.04481 * t * t)
    return z if chance > 0.5 else -z
