"""Polling in virtual time: laws of durations, the best moments for a known law, and sessions of a schedule."""

import heapq
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import attrs
import numpy as np
from numpy.typing import NDArray
from scipy import stats

from flux2max_async import GenerationRequest, PollPlan, PollSchedule

Array = NDArray[np.float64]

# ---------------------------------------------------------------------- laws


@attrs.frozen(eq=False)
class Law:
    """A mixture of laws of the seconds that a task takes."""

    parts: tuple[tuple[float, Any], ...]
    """Shares, and frozen laws of scipy."""

    def draw(self, chance: np.random.Generator) -> tuple[float, int]:
        """Give a duration, and which part it is from."""
        part = int(chance.choice(len(self.parts), p=[share for share, _ in self.parts]))
        return float(self.parts[part][1].ppf(chance.random())), part

    def survival(self, t: Array) -> Array:
        chances: Array = np.sum([share * law.sf(t) for share, law in self.parts], axis=0)
        return chances

    def quantile(self, q: float) -> float:
        """Give a moment by which at least `q` have ended."""
        return max(float(law.ppf(q)) for _, law in self.parts)


def lognormal(median: float, sigma: float) -> Any:
    return stats.lognorm(sigma, scale=median)


def law(*parts: Any) -> Law:
    """Make a law of one of scipy's, or of several with their shares."""
    return Law(tuple(parts)) if len(parts) > 1 else Law(((1.0, parts[0]),))


# ---------------------------------------------------------------------- the oracle


def best_moments(known: Law, price: float, points: int = 5000) -> Array:
    """Find the moments of the polls that cost least for a known law, by dynamic programming backwards on a fine grid.

    Having looked at t in vain, to look next at u costs S(t) (u - t + price) and what comes after u.
    """
    body, end = known.quantile(0.999), known.quantile(1 - 1e-7)
    grid = np.concatenate([np.linspace(0, body, points), np.geomspace(body, end, points // 3)[1:]])
    survival = known.survival(grid)
    rest = np.zeros(len(grid))  # the cost from here on, times the chance to come here; nothing is left at the end
    following = np.zeros(len(grid), dtype=int)
    for i in range(len(grid) - 2, -1, -1):
        costs = survival[i] * (grid[i + 1 :] - grid[i] + price) + rest[i + 1 :]
        following[i] = i + 1 + int(np.argmin(costs))
        rest[i] = costs[following[i] - i - 1]
    moments, i = [], 0
    while i < len(grid) - 1:
        i = int(following[i])
        moments.append(grid[i])
    return np.concatenate([moments, end * 1.1 ** np.arange(1, 60)])


_oracles: dict[tuple[int, float], tuple[Law, Array]] = {}


def oracle(known: Law, price: float) -> Array:
    key = id(known), price
    if key not in _oracles:
        _oracles[key] = known, best_moments(known, price)
    return _oracles[key][1]


def check_oracle() -> None:
    """Compare the dynamic programming with the two laws whose best moments are known in closed form."""
    price = 0.1
    # Exponential: equal spacing x / rate with e^x - 1 - x = price * rate.
    rate = 0.2
    x = 0.2
    for _ in range(50):
        x -= (math.expm1(x) - x - price * rate) / math.expm1(x)
    gaps = np.diff(best_moments(law(stats.expon(scale=1 / rate)), price, 6000)[:12], prepend=0.0)
    assert np.allclose(gaps, x / rate, rtol=0.03), (gaps, x / rate)
    # Uniform on 0 to T: n polls, the gaps falling by `price` each, where n is the largest with n (n - 1) price < 2 T.
    length = 10.0
    n = math.floor(0.5 + math.sqrt(0.25 + 2 * length / price))
    first = length / n + (n - 1) * price / 2
    expected = np.cumsum(first - price * np.arange(n))
    found = best_moments(law(stats.uniform(0, length)), price, 6000)[:n]
    assert np.allclose(found, expected, atol=0.05), (found, expected)


def cost_of(moments: Array, durations: Array, price: float) -> Array:
    """Give the cost of each task when all are polled at the same moments."""
    seen = np.searchsorted(moments, durations, side="left")
    result: Array = moments[seen] - durations + price * (seen + 1)
    return result


def moments_of(schedule: PollSchedule, until: float) -> Array:
    """Give the moments at which a schedule that doesn't learn polls."""
    plan, moments = schedule.begin(None), [0.0]
    while moments[-1] < until:
        moments.append(moments[-1] + plan.next_delay(moments[-1], None))
    return np.array(moments[1:])


INTERVALS = np.geomspace(0.05, 60, 120)


def best_fixed(durations: Array, price: float) -> float:
    """Give the sum of costs at the fixed interval that turns out best."""
    polls = np.ceil(durations[:, None] / INTERVALS)
    costs = polls * INTERVALS - durations[:, None] + price * polls
    return float(costs.sum(axis=0).min())


# ---------------------------------------------------------------------- sessions

Progress = Callable[[float, float], float | None]
"""What a poll says, from the share of the time that is over and the seconds since the submit."""


@attrs.frozen
class Task:
    duration: float
    law: Law | None = None
    """What the oracle knows of it."""
    request: GenerationRequest | None = None
    completed: bool = True
    arrives: float | None = None
    """The moment of the submit; None: as soon as a place is free."""


@attrs.frozen(eq=False)
class Result:
    """What became of a session's tasks, in order of submission."""

    delays: Array
    polls: Array
    known: NDArray[np.int64]
    """How many tasks had been seen to end when each was submitted."""
    ended: list[int]
    """The tasks in the order in which their ends were seen."""
    decisions: int
    seconds: float
    """Spent in the schedule."""

    def costs(self, price: float) -> Array:
        return self.delays + price * self.polls


def run(schedule: PollSchedule, tasks: Sequence[Task], progress: Progress | None = None, places: int = 24) -> Result:
    """Drive one session in virtual time: a free place submits the next task at once."""
    delays, polls, known = np.zeros(len(tasks)), np.zeros(len(tasks)), np.zeros(len(tasks), dtype=np.int64)
    ended: list[int] = []
    # The moment and the task; its plan, if it is submitted, the moment of that, and the seconds to the look before.
    events: list[tuple[float, int, PollPlan | None, float, float]] = []
    if tasks[0].arrives is None:
        events = [(0.0, number, None, 0.0, 0.0) for number in range(min(places, len(tasks)))]
    else:
        events = [(task.arrives or 0.0, number, None, 0.0, 0.0) for number, task in enumerate(tasks)]
        places = len(tasks)
    decisions, seconds = 0, 0.0
    while events:
        now, number, plan, submitted, before = heapq.heappop(events)
        task = tasks[number]
        if plan is None:
            known[number], submitted, elapsed, said = len(ended), now, 0.0, None
        else:
            polls[number] += 1
            elapsed = now - submitted
            if elapsed >= task.duration:
                started = time.thread_time()
                plan.finish(before, elapsed, completed=task.completed)
                seconds += time.thread_time() - started
                delays[number] = elapsed - task.duration
                ended.append(number)
                following = len(ended) + places - 1
                if following < len(tasks):
                    heapq.heappush(events, (now, following, None, 0.0, 0.0))
                continue
            said = progress(elapsed / task.duration, elapsed) if progress else None
        started = time.thread_time()
        plan = plan or schedule.begin(task.request)
        delay = plan.next_delay(elapsed, said)
        seconds += time.thread_time() - started
        decisions += 1
        heapq.heappush(events, (now + delay, number, plan, submitted, elapsed))
    return Result(delays, polls, known, ended, decisions, seconds)
