"""What polling costs: each schedule compared with the optimum, in virtual time.

    python benchmarks/polling.py [--short] [--write]

The cost of a task is the seconds from its end to the poll that sees it, plus `price` for each poll. The oracle knows
the distribution of each task's duration and polls at the times that dynamic programming finds for it. Schedules know
nothing at first, are used through their public interface, and learn of an end only when a poll has seen it.
"""

import argparse
import functools
import math
import shlex
import sys
import tracemalloc
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from _results import RESULTS, about, blocks, table, write
from scenarios import CHANGING, LINEAR_PROGRESS, MORE_STATIONARY, SHIFTS, STATIONARY, USELESS_PROGRESS
from virtual_time import (
    Array,
    ProgressFunction,
    Task,
    best_fixed,
    check_oracle,
    costs_at,
    oracle,
    poll_times_of,
    run,
)

from flux2max_async import (
    ExponentialSchedule,
    FixedSchedule,
    LearnedSchedule,
    PollSchedule,
)

PRICES = [0.02, 0.05, 0.1, 0.3, 1.0]
TASKS = 1000
WARM_UP = 200
"""Tasks at the beginning of a session that are not counted as warm."""
SLOTS = (1, 24)
"""Tasks in flight at once: a script that waits for each, and a session whose slots are all taken."""
PEERS: dict[str, PollSchedule] = {
    **{f"{interval:g} s": FixedSchedule(interval) for interval in (0.1, 0.5, 2.0, 3.0, 5.0, 6.0)},
    "0.5 x2 to 10": ExponentialSchedule(0.5, factor=2.0, maximum=10.0),
    "1 x1.5 to 5": ExponentialSchedule(1.0, factor=1.5, maximum=5.0),
}

# ---------------------------------------------------------------------- measurements

Row = dict[str, float]


def durations(tasks: Sequence[Task]) -> Array:
    return np.array([task.duration for task in tasks])


def oracle_costs(tasks: Sequence[Task], price: float) -> Array:
    """Return the cost of each task for the oracle."""
    costs = np.zeros(len(tasks))
    for distribution in {id(task.distribution): task.distribution for task in tasks}.values():
        assert distribution is not None
        mask = np.array([task.distribution is distribution for task in tasks])
        costs[mask] = costs_at(oracle(distribution, price), durations(tasks)[mask], price)
    return costs


@functools.cache
def session(name: str, seed: int, count: int = TASKS) -> list[Task]:
    """Return the tasks of a session in a scenario."""
    draw = {**STATIONARY, **MORE_STATIONARY, **CHANGING}[name]
    return draw(np.random.default_rng([seed, *name.encode()]), count)


def new_schedule(price: float) -> PollSchedule:
    return LearnedSchedule(poll_price=price)


def measure_stationary(name: str, price: float, seeds: Sequence[int]) -> Row:
    """Measure a stationary scenario: warm with all slots taken, and the first twenty tasks one after the other."""
    ours = fixed = best = cold = cold_best = cpu_seconds = 0.0
    decisions = 0
    peers = dict.fromkeys(PEERS, 0.0)
    for seed in seeds:
        tasks = session(name, seed)
        warm_durations = durations(tasks)[WARM_UP:]
        result = run(new_schedule(price), tasks)
        decisions, cpu_seconds = decisions + result.decisions, cpu_seconds + result.cpu_seconds
        ours += result.costs(price)[WARM_UP:].sum()
        best += oracle_costs(tasks, price)[WARM_UP:].sum()
        fixed += best_fixed(warm_durations, price)
        for peer, schedule in PEERS.items():
            poll_times = poll_times_of(schedule, durations(tasks).max())
            peers[peer] += costs_at(poll_times, warm_durations, price).sum()
        for start in range(8):
            first = session(name, 1000 + 8 * seed + start, 20)
            cold += run(new_schedule(price), first, slots=1).costs(price).sum()
            cold_best += oracle_costs(first, price).sum()
    row = {"warm": ours / best, "first 20": cold / cold_best, "best fixed": ours / fixed}
    return row | {peer: cost / ours for peer, cost in peers.items()} | {"microseconds": 1e6 * cpu_seconds / decisions}


def measure_changing(name: str, price: float, seeds: Sequence[int]) -> Row:
    """Measure a changing scenario: whole sessions compared with the fixed interval that is best in hindsight."""
    row: Row = {}
    peers = dict.fromkeys(PEERS, 0.0)
    for slots in SLOTS:
        ours = fixed = 0.0
        for seed in seeds:
            tasks = session(name, seed)
            ours += run(new_schedule(price), tasks, slots=slots).costs(price).sum()
            fixed += best_fixed(durations(tasks), price)
            for peer, schedule in PEERS.items():
                poll_times = poll_times_of(schedule, durations(tasks).max())
                peers[peer] += costs_at(poll_times, durations(tasks), price).sum()
        row[f"{slots} at once"] = ours / fixed
    # These tasks have submit times of their own, however many slots there are.
    if name == "bursts and a queue":
        del row["1 at once"]
    return row | {peer: cost / len(SLOTS) / ours for peer, cost in peers.items()}


def measure_shifts(price: float, seeds: Sequence[int]) -> float:
    """Return our cost relative to the oracle's for the twenty tasks submitted after ten have ended since a shift."""
    ours = best = 0.0
    for seed in seeds:
        tasks = session("8 to 25 s and back", seed)
        best_costs = oracle_costs(tasks, price)
        for slots in SLOTS:
            result = run(new_schedule(price), tasks, slots=slots)
            for shift in SHIFTS:
                tenth = [k for k, number in enumerate(result.ended) if number >= shift][9]
                submitted = np.flatnonzero((np.arange(TASKS) >= shift) & (result.ends_seen > tenth))[:20]
                ours += result.costs(price)[submitted].sum()
                best += best_costs[submitted].sum()
    return ours / best


def measure_progress(
    progress_at: ProgressFunction, price: float, seeds: Sequence[int], *, against_oracle: bool
) -> float:
    """Return the cost with progress relative to that of the oracle, or of our schedule, both without progress."""
    ours = other = 0.0
    for seed in seeds:
        tasks = session("lognormal, 12 s", seed)
        ours += run(new_schedule(price), tasks, progress_at).costs(price)[WARM_UP:].sum()
        blind = oracle_costs(tasks, price) if against_oracle else run(new_schedule(price), tasks).costs(price)
        other += blind[WARM_UP:].sum()
    return ours / other


def measure(price: float, seeds: Sequence[int]) -> dict[str, Row]:
    """Measure everything at one price."""
    rows = {name: measure_stationary(name, price, seeds) for name in [*STATIONARY, *MORE_STATIONARY]}
    rows |= {name: measure_changing(name, price, seeds) for name in CHANGING}
    rows["after a shift"] = {"after ten": measure_shifts(price, seeds)}
    for group, functions in (("linear progress", LINEAR_PROGRESS), ("useless progress", USELESS_PROGRESS)):
        against_oracle = functions is LINEAR_PROGRESS
        rows[group] = {
            name: measure_progress(function, price, seeds, against_oracle=against_oracle)
            for name, function in functions.items()
        }
    return rows


def bytes_per_task() -> float:
    """Return the memory of one more task in flight."""
    schedule = LearnedSchedule()
    tracemalloc.start()
    before, _ = tracemalloc.get_traced_memory()
    plans = [schedule.begin(None) for _ in range(10_000)]
    after, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return (after - before) / len(plans)


# ---------------------------------------------------------------------- report


def geometric_mean(values: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def column(rows: dict[str, Row], names: Sequence[str], key: str) -> list[float]:
    return [rows[name][key] for name in names if key in rows[name]]


ALL_STATIONARY = [*STATIONARY, *MORE_STATIONARY]
TARGETS: dict[str, tuple[Callable[[dict[str, Row]], float], float, float]] = {
    "stationary, warm: mean": (lambda rows: geometric_mean(column(rows, [*STATIONARY], "warm")), 1.06, 1.04),
    "stationary, warm: worst": (lambda rows: max(column(rows, [*STATIONARY], "warm")), 1.25, 1.15),
    "all stationary, warm: mean": (lambda rows: geometric_mean(column(rows, ALL_STATIONARY, "warm")), 1.06, 1.04),
    "all stationary, warm: worst": (lambda rows: max(column(rows, ALL_STATIONARY, "warm")), 1.25, 1.15),
    "first 20 tasks: mean": (lambda rows: geometric_mean(column(rows, [*STATIONARY], "first 20")), 1.3, 1.2),
    "first 20 tasks: worst": (lambda rows: max(column(rows, [*STATIONARY], "first 20")), 1.75, 1.5),
    "changing, one at once: worst": (lambda rows: max(column(rows, [*CHANGING], "1 at once")), 0.85, 0.8),
    "changing, 24 at once: worst": (lambda rows: max(column(rows, [*CHANGING], "24 at once")), 0.85, 0.8),
    "ten tasks after a shift": (lambda rows: rows["after a shift"]["after ten"], 1.6, 1.3),
    "linear progress: worst": (lambda rows: max(rows["linear progress"].values()), 0.8, 0.5),
    "useless progress: worst": (lambda rows: max(rows["useless progress"].values()), 1.07, 1.03),
    "CPU per decision with learning, µs": (
        lambda rows: geometric_mean(column(rows, ALL_STATIONARY, "microseconds")), 25, 10,
    ),
}  # fmt: skip
"""By name: the figure, the highest value that is acceptable, and the goal."""

_TARGETS_LEGEND = (
    "Costs are relative to the oracle's, except: those of changing scenarios to the best fixed interval's, those with "
    "linear progress to the oracle's without progress, and those with useless progress to ours without progress. "
    "Figures without a mark reach the goal."
)
_LEGEND = (
    '"Warm" and "first 20": our cost relative to the oracle\'s. "Best fixed", "1 at once" and "24 at once": our cost '
    "relative to that of the fixed interval that is best in hindsight. The other columns: the schedule's cost relative "
    "to ours."
)


def report(found: dict[float, dict[str, Row]]) -> str:
    """Return the results as Markdown."""
    targets = []
    for name, (figure, acceptable, goal) in TARGETS.items():
        figures = [figure(rows) for rows in found.values()]
        marks = ["" if value <= goal else " (acceptable)" if value <= acceptable else " (missed)" for value in figures]
        values = [f"{value:.3f}{mark}" for value, mark in zip(figures, marks, strict=True)]
        targets.append([name, f"{acceptable:g}", f"{goal:g}", *values])
    texts = [
        _TARGETS_LEGEND,
        table(["", "acceptable", "goal", *(f"price {price:g}" for price in found)], targets),
        f"A task in flight takes {bytes_per_task():.0f} bytes.",
    ]
    header = ["scenario", "warm", "first 20", "best fixed", "1 at once", "24 at once", *PEERS]
    for price, rows in found.items():
        lines = [
            [name, *(f"{rows[name][key]:.3f}" if key in rows[name] else "" for key in header[1:])]
            for name in [*ALL_STATIONARY, *CHANGING]
        ]
        linear, useless = (
            "; ".join(f"{name} {ratio:.3f}" for name, ratio in rows[group].items())
            for group in ("linear progress", "useless progress")
        )
        texts += [
            f"### Price {price:g} s",
            _LEGEND,
            table(header, lines),
            f"Linear progress, our cost relative to the oracle's without progress: {linear}.",
            f"Useless progress, our cost relative to ours without progress: {useless}.",
        ]
    return blocks(*texts)


def plot(path: Path) -> None:
    """Draw polls against delay: the optimal frontier, LearnedSchedule, and the other schedules."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    tasks = session("lognormal, 12 s", 1)
    warm_durations = durations(tasks)[WARM_UP:]

    def point(poll_times: Array) -> tuple[float, float]:
        index = np.searchsorted(poll_times, warm_durations)
        return float(np.mean(index + 1)), float(np.mean(poll_times[index] - warm_durations))

    _, axes = plt.subplots(figsize=(8, 5))
    distribution = tasks[0].distribution
    assert distribution is not None
    frontier = [point(oracle(distribution, price)) for price in np.geomspace(0.01, 3, 15)]
    axes.plot(*zip(*frontier, strict=True), "k-", label="optimum")
    results = [run(new_schedule(price), tasks) for price in PRICES]
    ours = [(result.polls[WARM_UP:].mean(), result.delays[WARM_UP:].mean()) for result in results]
    axes.plot(*zip(*ours, strict=True), "o", label="LearnedSchedule, price 0.02 to 1")
    for name, schedule in PEERS.items():
        x, y = point(poll_times_of(schedule, warm_durations.max()))
        axes.plot(x, y, "x", color="tab:red")
        axes.annotate(name, (x, y), xytext=(4, 4), textcoords="offset points")
    axes.set(
        xscale="log", yscale="log", xlabel="polls per task", ylabel="delay from the end to the poll that sees it, s"
    )
    axes.set_title("Lognormal durations around 12 s, sigma 0.3: tasks 201 to 1000")
    axes.legend()
    plt.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what polling costs, compared with the optimum.")
    parser.add_argument(
        "--sessions", type=int, default=3, help="sessions of 1,000 tasks per scenario and price (default: %(default)s)"
    )
    parser.add_argument("--short", action="store_true", help="two scenarios at one price, to check that it runs")
    parser.add_argument("--write", action="store_true", help="write RESULTS.md, and the plot beside it")
    options = parser.parse_args()
    check_oracle()
    print("oracle: matches the closed forms for the exponential and the uniform distribution")
    if options.short:
        print(
            measure_stationary("lognormal, 12 s", 0.1, [0]),
            measure_changing("8 to 25 s and back", 0.1, [0]),
        )
        return
    with ProcessPoolExecutor() as pool:
        rows = pool.map(measure, PRICES, [range(options.sessions)] * len(PRICES))
        found = dict(zip(PRICES, rows, strict=True))
    text = report(found)
    command = shlex.join(["python", "benchmarks/polling.py", *sys.argv[1:]])
    print(blocks(about(command), text))
    if options.write:
        plot(RESULTS.with_name("polling.png"))
        write("Polling", blocks(text, "![Polls against delay](polling.png)"), command)


if __name__ == "__main__":
    main()
