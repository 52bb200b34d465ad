"""Polling in virtual time: distributions of durations, optimal poll times for them, and simulated sessions."""

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

# ---------------------------------------------------------------------- distributions


@attrs.frozen(eq=False)
class Mixture:
    """A mixture of distributions of durations, in seconds."""

    components: tuple[tuple[float, Any], ...]
    """Weights and frozen scipy distributions."""

    def draw(self, rng: np.random.Generator) -> tuple[float, int]:
        """Return a random duration and the index of its component."""
        index = int(rng.choice(len(self.components), p=[weight for weight, _ in self.components]))
        return float(self.components[index][1].ppf(rng.random())), index

    def survival(self, t: Array) -> Array:
        probabilities: Array = np.sum([weight * component.sf(t) for weight, component in self.components], axis=0)
        return probabilities

    def upper_quantile(self, q: float) -> float:
        """Return a duration that at least a share `q` of the tasks doesn't exceed."""
        return max(float(component.ppf(q)) for _, component in self.components)


def lognormal(median: float, sigma: float) -> Any:
    return stats.lognorm(sigma, scale=median)


def mixture(*components: Any) -> Mixture:
    """Return a mixture of one scipy distribution, or of several (weight, distribution) pairs."""
    return Mixture(tuple(components)) if len(components) > 1 else Mixture(((1.0, components[0]),))


# ---------------------------------------------------------------------- the oracle


def optimal_poll_times(distribution: Mixture, price: float, points: int = 5000) -> Array:
    """Return the poll times of minimal cost for a distribution, by backward dynamic programming on a fine grid.

    After a poll at t that found the task running, a next poll at u costs S(t) (u - t + price), plus what follows u.
    """
    body, end = distribution.upper_quantile(0.999), distribution.upper_quantile(1 - 1e-7)
    grid = np.concatenate([np.linspace(0, body, points), np.geomspace(body, end, points // 3)[1:]])
    survival = distribution.survival(grid)
    # The cost from each grid point on, times the probability of getting there; 0 at the end.
    cost_to_go = np.zeros(len(grid))
    successors = np.zeros(len(grid), dtype=int)
    for i in range(len(grid) - 2, -1, -1):
        costs = survival[i] * (grid[i + 1 :] - grid[i] + price) + cost_to_go[i + 1 :]
        successors[i] = i + 1 + int(np.argmin(costs))
        cost_to_go[i] = costs[successors[i] - i - 1]
    times, i = [], 0
    while i < len(grid) - 1:
        i = int(successors[i])
        times.append(grid[i])
    return np.concatenate([times, end * 1.1 ** np.arange(1, 60)])


_oracles: dict[tuple[int, float], tuple[Mixture, Array]] = {}


def oracle(distribution: Mixture, price: float) -> Array:
    """Return the cached optimal poll times."""
    key = id(distribution), price
    if key not in _oracles:
        _oracles[key] = distribution, optimal_poll_times(distribution, price)
    return _oracles[key][1]


def check_oracle() -> None:
    """Compare the dynamic programming with the two distributions whose optimal poll times have a closed form."""
    price = 0.1
    # Exponential: equal spacing x / rate with e^x - 1 - x = price * rate.
    rate = 0.2
    x = 0.2
    for _ in range(50):
        x -= (math.expm1(x) - x - price * rate) / math.expm1(x)
    gaps = np.diff(optimal_poll_times(mixture(stats.expon(scale=1 / rate)), price, 6000)[:12], prepend=0.0)
    assert np.allclose(gaps, x / rate, rtol=0.03), (gaps, x / rate)
    # Uniform on 0 to T: n polls whose gaps decrease by `price` each; n is the largest for which n (n - 1) price < 2 T.
    length = 10.0
    n = math.floor(0.5 + math.sqrt(0.25 + 2 * length / price))
    first = length / n + (n - 1) * price / 2
    expected = np.cumsum(first - price * np.arange(n))
    found = optimal_poll_times(mixture(stats.uniform(0, length)), price, 6000)[:n]
    assert np.allclose(found, expected, atol=0.05), (found, expected)


def costs_at(poll_times: Array, durations: Array, price: float) -> Array:
    """Return the cost of each task if all are polled at the same times."""
    index = np.searchsorted(poll_times, durations, side="left")
    costs: Array = poll_times[index] - durations + price * (index + 1)
    return costs


def poll_times_of(schedule: PollSchedule, until: float) -> Array:
    """Return the poll times of a schedule that doesn't learn."""
    plan, times = schedule.begin(None), [0.0]
    while times[-1] < until:
        times.append(times[-1] + plan.next_delay(times[-1], None))
    return np.array(times[1:])


INTERVALS = np.geomspace(0.05, 60, 120)


def best_fixed(durations: Array, price: float) -> float:
    """Return the total cost at the fixed interval that is best in hindsight."""
    polls = np.ceil(durations[:, None] / INTERVALS)
    costs = polls * INTERVALS - durations[:, None] + price * polls
    return float(costs.sum(axis=0).min())


# ---------------------------------------------------------------------- sessions

ProgressFunction = Callable[[float, float], float | None]
"""Returns the progress that a poll reports: (elapsed share of the duration, elapsed seconds) -> progress."""


@attrs.frozen
class Task:
    duration: float
    distribution: Mixture | None = None
    """What the oracle knows of the duration."""
    request: GenerationRequest | None = None
    completed: bool = True
    submit_at: float | None = None
    """None: as soon as a slot is free."""


@attrs.frozen(eq=False)
class Result:
    """The results of a session's tasks, in order of submission."""

    delays: Array
    polls: Array
    ends_seen: NDArray[np.int64]
    """How many ends had been seen when each task was submitted."""
    ended: list[int]
    """The tasks in the order in which their ends were seen."""
    decisions: int
    cpu_seconds: float
    """Spent in the schedule."""

    def costs(self, price: float) -> Array:
        return self.delays + price * self.polls


def run(
    schedule: PollSchedule, tasks: Sequence[Task], progress_at: ProgressFunction | None = None, slots: int = 24
) -> Result:
    """Run one session in virtual time: as soon as a slot is free, the next task is submitted."""
    delays, polls = np.zeros(len(tasks)), np.zeros(len(tasks))
    ends_seen = np.zeros(len(tasks), dtype=np.int64)
    ended: list[int] = []
    # Time of the event, number of the task, its plan if it has been submitted, time of the submit, and seconds from the
    # submit to the last poll.
    events: list[tuple[float, int, PollPlan | None, float, float]] = []
    if tasks[0].submit_at is None:
        events = [(0.0, number, None, 0.0, 0.0) for number in range(min(slots, len(tasks)))]
    else:
        events = [(task.submit_at or 0.0, number, None, 0.0, 0.0) for number, task in enumerate(tasks)]
        slots = len(tasks)
    decisions, cpu_seconds = 0, 0.0
    while events:
        now, number, plan, submitted, last_poll = heapq.heappop(events)
        task = tasks[number]
        progress: float | None = None
        if plan is None:
            ends_seen[number], submitted, elapsed = len(ended), now, 0.0
        else:
            polls[number] += 1
            elapsed = now - submitted
            if elapsed >= task.duration:
                started = time.thread_time()
                plan.finish(last_poll, elapsed, completed=task.completed)
                cpu_seconds += time.thread_time() - started
                delays[number] = elapsed - task.duration
                ended.append(number)
                next_number = len(ended) + slots - 1
                if next_number < len(tasks):
                    heapq.heappush(events, (now, next_number, None, 0.0, 0.0))
                continue
            progress = progress_at(elapsed / task.duration, elapsed) if progress_at else None
        started = time.thread_time()
        plan = plan or schedule.begin(task.request)
        delay = plan.next_delay(elapsed, progress)
        cpu_seconds += time.thread_time() - started
        decisions += 1
        heapq.heappush(events, (now + delay, number, plan, submitted, elapsed))
    return Result(delays, polls, ends_seen, ended, decisions, cpu_seconds)
