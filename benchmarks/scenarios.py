"""Simulated services: stationary and changing durations, and the progress that polls report.

A scenario's name seeds its random numbers: renaming it changes its figures.
"""

import functools
import heapq
import math
from collections.abc import Callable

import numpy as np
from scipy import stats
from virtual_time import Mixture, ProgressFunction, Task, lognormal, mixture

from flux2max_async import GenerationRequest, InputImage

TaskSampler = Callable[[np.random.Generator, int], list[Task]]
"""Draws the given number of tasks of a session."""


def stationary(distribution: Mixture) -> TaskSampler:
    """Return a sampler of tasks with the same distribution."""

    def draw(rng: np.random.Generator, count: int) -> list[Task]:
        return [Task(distribution.draw(rng)[0], distribution) for _ in range(count)]

    return draw


def failing(distribution: Mixture) -> TaskSampler:
    """Return a sampler of tasks that fail if they are from the first component of the mixture."""

    def draw(rng: np.random.Generator, count: int) -> list[Task]:
        drawn = [distribution.draw(rng) for _ in range(count)]
        return [Task(duration, distribution, completed=component > 0) for duration, component in drawn]

    return draw


def image_sizes(rng: np.random.Generator, count: int) -> list[Task]:
    """Draw images of three sizes, with and without input images; the oracle knows the distribution of each kind."""
    return [
        Task(_REQUESTS[kind][1].draw(rng)[0], _REQUESTS[kind][1], _REQUESTS[kind][0])
        for kind in rng.integers(0, len(_REQUESTS), count)
    ]


_INPUT_IMAGE = InputImage("https://example.com/cat.png")
_REQUESTS = [
    (
        GenerationRequest("a cat", width=side, height=side, input_images=[_INPUT_IMAGE] * inputs),
        mixture(lognormal(8.0 * (side / 1024) ** 1.4 * (1 + 0.3 * inputs), 0.15)),
    )
    for side in (512, 1024, 2048)
    for inputs in (0, 2)
]


def changing(median: Callable[[int], float], sigma: float = 0.3) -> TaskSampler:
    """Return a sampler of tasks whose median duration depends on the task's number."""

    def draw(rng: np.random.Generator, count: int) -> list[Task]:
        distributions = [_lognormal_mixture(median(number), sigma) for number in range(count)]
        return [Task(distribution.draw(rng)[0], distribution) for distribution in distributions]

    return draw


@functools.cache
def _lognormal_mixture(median: float, sigma: float) -> Mixture:
    return mixture(lognormal(median, sigma))


def bursts(rng: np.random.Generator, count: int, workers: int = 6) -> list[Task]:
    """Draw bursts of 2 to 24 tasks that queue for a few workers."""
    free_at, now, tasks = [0.0] * workers, 0.0, list[Task]()
    while len(tasks) < count:
        for _ in range(int(rng.integers(2, 25))):
            end = max(heapq.heappop(free_at), now) + 7 * math.exp(0.25 * rng.standard_normal())
            heapq.heappush(free_at, end)
            tasks.append(Task(end - now, submit_at=now))
        now += 5 + rng.exponential(20)
    return tasks[:count]


STATIONARY: dict[str, TaskSampler] = {
    "lognormal, 12 s": stationary(mixture(lognormal(12, 0.3))),
    "lognormal, 20 s": stationary(mixture(lognormal(20, 0.5))),
    "gamma": stationary(mixture(stats.gamma(4, scale=2.5))),
    "shifted exponential": stationary(mixture(stats.expon(5, 5))),
    "heavy tail": stationary(mixture(stats.pareto(1.5, scale=4))),
    "two modes": stationary(mixture((0.6, lognormal(6, 0.15)), (0.4, lognormal(20, 0.15)))),
    "very narrow": stationary(mixture(lognormal(12, 0.03))),
    "early small mode": stationary(mixture((0.08, lognormal(2, 0.15)), (0.92, lognormal(15, 0.2)))),
    "picture sizes": image_sizes,
    "fast failures": failing(mixture((0.15, lognormal(0.8, 0.3)), (0.85, lognormal(12, 0.3)))),
}
MORE_STATIONARY: dict[str, TaskSampler] = {
    "exponential": stationary(mixture(stats.expon(scale=10))),
    "uniform": stationary(mixture(stats.uniform(5, 20))),
    "Weibull, 0.7": stationary(mixture(stats.weibull_min(0.7, scale=8))),
    "three modes": stationary(mixture((0.3, lognormal(3, 0.1)), (0.4, lognormal(9, 0.1)), (0.3, lognormal(30, 0.2)))),
    "a second or so": stationary(mixture(lognormal(1.0, 0.3))),
    "five minutes": stationary(mixture(lognormal(300, 0.4))),
}
SHIFTS = (350, 700)
"""The tasks with which the durations change."""
CHANGING: dict[str, TaskSampler] = {
    "8 to 25 s and back": changing(lambda number: 25.0 if SHIFTS[0] <= number < SHIFTS[1] else 8.0),
    "slow drift": changing(lambda number: 8 * (25 / 8) ** (number // 20 / 50)),
    "switch every 60": changing(lambda number: 8.0 if number // 60 % 2 else 20.0),
    "switch every 20": changing(lambda number: 8.0 if number // 20 % 2 else 20.0),
    "bursts and a queue": bursts,
}
LINEAR_PROGRESS: dict[str, ProgressFunction] = {
    "linear": lambda share, _: share,
    "linear, in hundredths": lambda share, _: math.floor(100 * share) / 100,
}
USELESS_PROGRESS: dict[str, ProgressFunction] = {
    "stuck at 0": lambda _, __: 0.0,
    "stuck at a half": lambda share, _: min(share, 0.5),
    "elapsed time": lambda _, elapsed: min(elapsed / 30, 0.99),
    "99 % after a third": lambda share, _: min(3 * share, 0.99),
    "backwards": lambda share, _: 1 - share,
    "noise": lambda _, elapsed: elapsed * 997.0 % 1,
}
