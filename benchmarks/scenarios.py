"""What tasks do: laws that stay, services that change, and what progress says."""

import functools
import heapq
import math
from collections.abc import Callable

import numpy as np
from scipy import stats
from virtual_time import Law, Progress, Task, law, lognormal

from flux2max_async import GenerationRequest, InputImage

Sessions = Callable[[np.random.Generator, int], list[Task]]
"""Draws the tasks of a session."""


def always(known: Law) -> Sessions:
    """Make sessions whose tasks all obey one law."""

    def draw(chance: np.random.Generator, count: int) -> list[Task]:
        return [Task(known.draw(chance)[0], known) for _ in range(count)]

    return draw


def failing(known: Law) -> Sessions:
    """Make sessions in which the tasks of a law's first part fail."""

    def draw(chance: np.random.Generator, count: int) -> list[Task]:
        drawn = [known.draw(chance) for _ in range(count)]
        return [Task(duration, known, completed=part > 0) for duration, part in drawn]

    return draw


def sizes(chance: np.random.Generator, count: int) -> list[Task]:
    """Draw pictures of three sizes, with and without input images; the oracle knows the law of each."""
    return [
        Task(_SIZES[kind][1].draw(chance)[0], _SIZES[kind][1], _SIZES[kind][0])
        for kind in chance.integers(0, len(_SIZES), count)
    ]


_INPUT = InputImage("https://example.com/cat.png")
_SIZES = [
    (
        GenerationRequest("a cat", width=side, height=side, input_images=[_INPUT] * inputs),
        law(lognormal(8.0 * (side / 1024) ** 1.4 * (1 + 0.3 * inputs), 0.15)),
    )
    for side in (512, 1024, 2048)
    for inputs in (0, 2)
]


def changing(median: Callable[[int], float], sigma: float = 0.3) -> Sessions:
    """Make sessions whose law depends on the number of the task."""

    def draw(chance: np.random.Generator, count: int) -> list[Task]:
        laws = [_around(median(number), sigma) for number in range(count)]
        return [Task(known.draw(chance)[0], known) for known in laws]

    return draw


@functools.cache
def _around(median: float, sigma: float) -> Law:
    return law(lognormal(median, sigma))


def bursts(chance: np.random.Generator, count: int, workers: int = 6) -> list[Task]:
    """Draw bursts of 2 to 24 tasks that queue for a few workers."""
    free, now, tasks = [0.0] * workers, 0.0, list[Task]()
    while len(tasks) < count:
        for _ in range(int(chance.integers(2, 25))):
            end = max(heapq.heappop(free), now) + 7 * math.exp(0.25 * chance.standard_normal())
            heapq.heappush(free, end)
            tasks.append(Task(end - now, arrives=now))
        now += 5 + chance.exponential(20)
    return tasks[:count]


STATIONARY: dict[str, Sessions] = {
    "lognormal, 12 s": always(law(lognormal(12, 0.3))),
    "lognormal, 20 s": always(law(lognormal(20, 0.5))),
    "gamma": always(law(stats.gamma(4, scale=2.5))),
    "shifted exponential": always(law(stats.expon(5, 5))),
    "heavy tail": always(law(stats.pareto(1.5, scale=4))),
    "two modes": always(law((0.6, lognormal(6, 0.15)), (0.4, lognormal(20, 0.15)))),
    "very narrow": always(law(lognormal(12, 0.03))),
    "early small mode": always(law((0.08, lognormal(2, 0.15)), (0.92, lognormal(15, 0.2)))),
    "picture sizes": sizes,
    "fast failures": failing(law((0.15, lognormal(0.8, 0.3)), (0.85, lognormal(12, 0.3)))),
}
FURTHER: dict[str, Sessions] = {
    "exponential": always(law(stats.expon(scale=10))),
    "uniform": always(law(stats.uniform(5, 20))),
    "Weibull, 0.7": always(law(stats.weibull_min(0.7, scale=8))),
    "three modes": always(law((0.3, lognormal(3, 0.1)), (0.4, lognormal(9, 0.1)), (0.3, lognormal(30, 0.2)))),
    "a second or so": always(law(lognormal(1.0, 0.3))),
    "five minutes": always(law(lognormal(300, 0.4))),
}
SHIFTS = (350, 700)
CHANGING: dict[str, Sessions] = {
    "8 to 25 s and back": changing(lambda number: 25.0 if SHIFTS[0] <= number < SHIFTS[1] else 8.0),
    "slow drift": changing(lambda number: 8 * (25 / 8) ** (number // 20 / 50)),
    "switch every 60": changing(lambda number: 8.0 if number // 60 % 2 else 20.0),
    "switch every 20": changing(lambda number: 8.0 if number // 20 % 2 else 20.0),
    "bursts and a queue": bursts,
}
LINEAR: dict[str, Progress] = {
    "linear": lambda share, _: share,
    "linear, in hundredths": lambda share, _: math.floor(100 * share) / 100,
}
USELESS: dict[str, Progress] = {
    "stuck at 0": lambda _, __: 0.0,
    "stuck at a half": lambda share, _: min(share, 0.5),
    "by the clock": lambda _, elapsed: min(elapsed / 30, 0.99),
    "99 % after a third": lambda share, _: min(3 * share, 0.99),
    "backwards": lambda share, _: 1 - share,
    "noise": lambda _, elapsed: elapsed * 997.0 % 1,
}
