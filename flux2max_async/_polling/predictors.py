"""What tells one task's duration from another's: what was asked for, how many tasks are under way, and progress."""

import math
from collections.abc import Iterable
from typing import Any, Self

import attrs
from attrs import validators

from flux2max_async._models.request import GenerationRequest
from flux2max_async._polling.histogram import DurationHistogram, HistogramState, bin_position, lognormal

Features = tuple[float, float, float]
"""Of a task at its submit: the logarithm of the megapixels, the number of input images, and the logarithm of one more
than the number of tasks under way."""


def features_of(request: GenerationRequest | None, in_flight: int) -> Features:
    """Tell what is known of a task at its submit; a size that the model chooses counts as a megapixel."""
    waiting = math.log1p(in_flight)
    if request is None:
        return 0.0, 0.0, waiting
    size = math.log(request.width * request.height / 2**20) if request.width and request.height else 0.0
    return size, float(len(request.input_images)), waiting


_MEMORY = 300.0
_TRUST = 2.0
"""What is expected of the traits is worth so many tasks."""
_EXPECTED = (0.5, 0.12, 0.0)


def _finite(_: object, field: "attrs.Attribute[Any]", value: Iterable[float]) -> None:
    if not all(abs(number) < 1e9 for number in value):
        raise ValueError(f"{field.name} must be finite numbers, not {value!r}")


@attrs.define(eq=False, on_setattr=attrs.setters.NO_OP)
class DurationRegression:
    """How many times as long as usual a task takes by its traits: a ridge regression that forgets."""

    slopes: Features = attrs.field(default=_EXPECTED, validator=_finite)
    """By how much each trait raises the logarithm of the duration."""
    usual: Features = attrs.field(default=(0.0, 0.0, 0.0), validator=_finite)
    """The mean of each trait."""
    count: float = attrs.field(default=0.0, validator=(validators.ge(0.0), validators.le(_MEMORY)))
    sums: tuple[float, float, float, float, float, float, float, float, float] = attrs.field(
        default=(0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0), validator=_finite
    )
    """Of the traits' products with each other, and then with the logarithm of the duration."""

    def scale(self, traits: Features) -> float:
        """Give how many times as long as usual such a task takes."""
        (a, b, c), (p, q, r), (x, y, z) = self.slopes, self.usual, traits
        return math.exp(min(max(a * (x - p) + b * (y - q) + c * (z - r), -3.0), 3.0))

    def learn(self, traits: Features, longer: float) -> None:
        """Take in that a task took e^longer times as long as its traits had foretold."""
        self.count = min(self.count + 1, _MEMORY)
        (a, b, c), (p, q, r), (x, y, z) = self.slopes, self.usual, traits
        x, y, z = x - p, y - q, z - r
        self.usual = p + x / self.count, q + y / self.count, r + z / self.count
        t = min(max(longer, -1.5), 1.5) + a * x + b * y + c * z
        fading = 1 - 1 / _MEMORY
        xx, xy, xz, yy, yz, zz, xt, yt, zt = self.sums
        xx, xy, xz = xx * fading + x * x, xy * fading + x * y, xz * fading + x * z
        yy, yz, zz = yy * fading + y * y, yz * fading + y * z, zz * fading + z * z
        xt, yt, zt = xt * fading + x * t, yt * fading + y * t, zt * fading + z * t
        self.sums = xx, xy, xz, yy, yz, zz, xt, yt, zt
        # One sweep of Gauss and Seidel for each task.
        a = (_TRUST * _EXPECTED[0] + xt - xy * b - xz * c) / (_TRUST + xx)
        b = (_TRUST * _EXPECTED[1] + yt - xy * a - yz * c) / (_TRUST + yy)
        c = (_TRUST * _EXPECTED[2] + zt - xz * a - yz * b) / (_TRUST + zz)
        self.slopes = a, b, c


ProgressReading = tuple[float, float]
"""A moment, in seconds from the submit, and the progress that a poll told then."""

_RATIO = lognormal(1.0, 0.7)
_RATIO_MEMORY = 100.0
_PARTS = 5
"""Progress that is not linear is something else in each part of its way."""
_PROVEN = 6.0
"""Progress is believed when it has foretold the newest ends e^6 times as well as the law of all tasks, ..."""
_MOST = 2.0
"""... where no single task counts for more than e^2."""
_TINY = 0.001


def part_of(progress: float) -> int:
    """Tell in which part of its way a progress of less than 1 is."""
    return int(progress * _PARTS)


@attrs.define(eq=False)
class ProgressModel:
    """How well progress foretells the end: by parts, the laws of the true duration as a multiple of what it says."""

    laws: list[DurationHistogram] = attrs.field(
        factory=lambda: [DurationHistogram(_RATIO_MEMORY, _RATIO) for _ in range(_PARTS)]
    )
    leads: list[float] = attrs.field(factory=lambda: [0.0] * _PARTS)
    """The logarithm of how much better progress has foretold the newest ends than the law of all tasks."""

    @property
    def best(self) -> int:
        """The part of its way in which progress is worth most."""
        return self.leads.index(max(self.leads))

    def proven(self, part: int) -> bool:
        """Whether progress is worth believing in a part of its way."""
        return self.leads[part] > _PROVEN

    def learn(
        self, said: ProgressReading, not_before: float, by: float, blind: DurationHistogram, scale: float
    ) -> None:
        """Take in when a task ended that had said so much, and that the law of all tasks, too, has foretold."""
        at, progress = said
        part, guess, since = part_of(progress), at / progress, max(not_before, at)
        law = self.laws[part]
        first, last = bin_position(since / guess), bin_position(by / guess)
        seeing = law.mass(first, last) / (1 - law.chance(bin_position(progress)) + _TINY)
        chance = blind.mass(bin_position(since / scale), bin_position(by / scale)) / (
            1 - blind.chance(bin_position(at / scale)) + _TINY
        )
        ahead = min(max(math.log((seeing + _TINY) / (chance + _TINY)), -_MOST), _MOST)
        self.leads[part] = self.leads[part] * (1 - 1 / 20) + ahead
        law.learn(first, last)

    def state(self) -> "ProgressModelState":
        """Give what was learned."""
        return ProgressModelState([law.state() for law in self.laws], self.leads)

    @classmethod
    def from_state(cls, state: "ProgressModelState") -> Self:
        """Go on from what was learned."""
        return cls([DurationHistogram.from_state(law, _RATIO_MEMORY, _RATIO) for law in state.laws], state.leads)


@attrs.frozen
class ProgressModelState:
    """What was learned of progress, to be kept as JSON."""

    laws: list[HistogramState] = attrs.field(validator=(validators.min_len(_PARTS), validators.max_len(_PARTS)))
    leads: list[float] = attrs.field(validator=(validators.min_len(_PARTS), validators.max_len(_PARTS), _finite))
