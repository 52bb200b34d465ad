"""What polling costs: each schedule against the best that is possible, in virtual time.

    python benchmarks/polling.py [--short] [--write]

The cost of a task is the seconds from its end to the poll that sees it, plus `price` for each poll. The oracle knows
the law of each task and polls at the moments that dynamic programming finds for it. Schedules know nothing in the
beginning, are driven through their public interface, and learn of an end only when a poll has seen it.
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
from scenarios import CHANGING, FURTHER, LINEAR, SHIFTS, STATIONARY, USELESS
from virtual_time import (
    Array,
    Progress,
    Task,
    best_fixed,
    check_oracle,
    cost_of,
    moments_of,
    oracle,
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
PLACES = (1, 24)
"""Tasks in flight at once: a script that waits for each, and a session that is full."""
PEERS: dict[str, PollSchedule] = {
    **{f"{interval:g} s": FixedSchedule(interval) for interval in (0.1, 0.5, 2.0, 3.0, 5.0, 6.0)},
    "0.5 x2 to 10": ExponentialSchedule(0.5, factor=2.0, maximum=10.0),
    "1 x1.5 to 5": ExponentialSchedule(1.0, factor=1.5, maximum=5.0),
}

# ---------------------------------------------------------------------- the measures

Row = dict[str, float]


def durations(tasks: Sequence[Task]) -> Array:
    return np.array([task.duration for task in tasks])


def oracle_costs(tasks: Sequence[Task], price: float) -> Array:
    """Give what each task costs the oracle, which knows its law."""
    costs = np.zeros(len(tasks))
    for known in {id(task.law): task.law for task in tasks}.values():
        assert known is not None
        which = np.array([task.law is known for task in tasks])
        costs[which] = cost_of(oracle(known, price), durations(tasks)[which], price)
    return costs


@functools.cache
def session(name: str, seed: int, count: int = TASKS) -> list[Task]:
    draw = {**STATIONARY, **FURTHER, **CHANGING}[name]
    return draw(np.random.default_rng([seed, *name.encode()]), count)


def learned(price: float) -> PollSchedule:
    return LearnedSchedule(poll_price=price)


def measure_law(name: str, price: float, seeds: Sequence[int]) -> Row:
    """Measure a stationary law: warm in full sessions, and the first twenty tasks one after the other."""
    ours = fixed = best = cold = cold_best = seconds = 0.0
    decisions = 0
    peers = dict.fromkeys(PEERS, 0.0)
    for seed in seeds:
        tasks = session(name, seed)
        result = run(learned(price), tasks)
        decisions, seconds = decisions + result.decisions, seconds + result.seconds
        ours += result.costs(price)[200:].sum()
        best += oracle_costs(tasks, price)[200:].sum()
        fixed += best_fixed(durations(tasks)[200:], price)
        for peer, schedule in PEERS.items():
            moments = moments_of(schedule, durations(tasks).max())
            peers[peer] += cost_of(moments, durations(tasks)[200:], price).sum()
        for start in range(8):
            first = session(name, 1000 + 8 * seed + start, 20)
            cold += run(learned(price), first, places=1).costs(price).sum()
            cold_best += oracle_costs(first, price).sum()
    row = {"warm": ours / best, "first 20": cold / cold_best, "best fixed": ours / fixed}
    return row | {peer: cost / ours for peer, cost in peers.items()} | {"microseconds": 1e6 * seconds / decisions}


def measure_changes(name: str, price: float, seeds: Sequence[int]) -> Row:
    """Measure a service that changes: whole sessions against the best fixed interval in hindsight."""
    row: Row = {}
    peers = dict.fromkeys(PEERS, 0.0)
    for places in PLACES:
        ours = fixed = 0.0
        for seed in seeds:
            tasks = session(name, seed)
            ours += run(learned(price), tasks, places=places).costs(price).sum()
            fixed += best_fixed(durations(tasks), price)
            for peer, schedule in PEERS.items():
                peers[peer] += cost_of(moments_of(schedule, durations(tasks).max()), durations(tasks), price).sum()
        row[f"{places} at once"] = ours / fixed
    # Who queues does so together, however many places there are.
    if name == "bursts and a queue":
        del row["1 at once"]
    return row | {peer: cost / len(PLACES) / ours for peer, cost in peers.items()}


def measure_shifts(price: float, seeds: Sequence[int]) -> float:
    """Give the cost by the oracle's of the twenty tasks that begin when ten have ended since a shift."""
    ours = best = 0.0
    for seed in seeds:
        tasks = session("8 to 25 s and back", seed)
        best_costs = oracle_costs(tasks, price)
        for places in PLACES:
            result = run(learned(price), tasks, places=places)
            for shift in SHIFTS:
                tenth = [k for k, number in enumerate(result.ended) if number >= shift][9]
                begun = np.flatnonzero((np.arange(TASKS) >= shift) & (result.known > tenth))[:20]
                ours += result.costs(price)[begun].sum()
                best += best_costs[begun].sum()
    return ours / best


def measure_progress(progress: Progress, price: float, seeds: Sequence[int], *, against_oracle: bool) -> float:
    """Give the cost with progress, relative to the progress-blind oracle or to the same schedule without progress."""
    ours = other = 0.0
    for seed in seeds:
        tasks = session("lognormal, 12 s", seed)
        ours += run(learned(price), tasks, progress).costs(price)[200:].sum()
        blind = oracle_costs(tasks, price) if against_oracle else run(learned(price), tasks).costs(price)
        other += blind[200:].sum()
    return ours / other


def measure(price: float, seeds: Sequence[int]) -> dict[str, Row]:
    """Measure everything at one price."""
    rows = {name: measure_law(name, price, seeds) for name in [*STATIONARY, *FURTHER]}
    rows |= {name: measure_changes(name, price, seeds) for name in CHANGING}
    rows["after a shift"] = {"after ten": measure_shifts(price, seeds)}
    rows["of use"] = {name: measure_progress(said, price, seeds, against_oracle=True) for name, said in LINEAR.items()}
    rows["of no use"] = {
        name: measure_progress(said, price, seeds, against_oracle=False) for name, said in USELESS.items()
    }
    return rows


def bytes_per_task() -> float:
    """Give what one more task in flight takes in memory."""
    schedule = LearnedSchedule()
    tracemalloc.start()
    before, _ = tracemalloc.get_traced_memory()
    plans = [schedule.begin(None) for _ in range(10_000)]
    after, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return (after - before) / len(plans)


# ---------------------------------------------------------------------- what is shown


def mean(values: Sequence[float]) -> float:
    """Give the geometric mean."""
    return math.exp(sum(map(math.log, values)) / len(values))


def column(rows: dict[str, Row], names: Sequence[str], name: str) -> list[float]:
    return [rows[law][name] for law in names if name in rows[law]]


BAR: dict[str, tuple[Callable[[dict[str, Row]], float], float, float]] = {
    "stationary, warm: mean": (lambda rows: mean(column(rows, [*STATIONARY], "warm")), 1.06, 1.04),
    "stationary, warm: worst": (lambda rows: max(column(rows, [*STATIONARY], "warm")), 1.25, 1.15),
    "with further laws: mean": (lambda rows: mean(column(rows, [*STATIONARY, *FURTHER], "warm")), 1.06, 1.04),
    "with further laws: worst": (lambda rows: max(column(rows, [*STATIONARY, *FURTHER], "warm")), 1.25, 1.15),
    "first 20 tasks: mean": (lambda rows: mean(column(rows, [*STATIONARY], "first 20")), 1.3, 1.2),
    "first 20 tasks: worst": (lambda rows: max(column(rows, [*STATIONARY], "first 20")), 1.75, 1.5),
    "changing, one at once: worst": (lambda rows: max(column(rows, [*CHANGING], "1 at once")), 0.85, 0.8),
    "changing, 24 at once: worst": (lambda rows: max(column(rows, [*CHANGING], "24 at once")), 0.85, 0.8),
    "ten tasks after a shift": (lambda rows: rows["after a shift"]["after ten"], 1.6, 1.3),
    "linear progress, by the blind oracle": (lambda rows: max(rows["of use"].values()), 0.8, 0.5),
    "progress of no use: worst harm": (lambda rows: max(rows["of no use"].values()), 1.07, 1.03),
    "µs a decision, learning included": (
        lambda rows: mean(column(rows, [*STATIONARY, *FURTHER], "microseconds")), 25, 10,
    ),
}  # fmt: skip


_LEGEND = (
    "Warm and first 20: our cost by the oracle's. Best fixed, 1 and 24 at once: ours by the best fixed interval's "
    "in hindsight. The rest: a peer's cost by ours."
)


def report(found: dict[float, dict[str, Row]]) -> str:
    """Lay out what was found as Markdown."""
    bar = []
    for name, (figure, needed, hoped) in BAR.items():
        figures = [figure(rows) for rows in found.values()]
        marks = ["" if value <= hoped else " (needed)" if value <= needed else " (missed)" for value in figures]
        values = [f"{value:.3f}{mark}" for value, mark in zip(figures, marks, strict=True)]
        bar.append([name, f"{needed:g}", f"{hoped:g}", *values])
    texts = [
        "Cost by the oracle's, unless it says otherwise; bare figures are within what was hoped for.",
        table(["", "needed", "hoped for", *(f"price {price:g}" for price in found)], bar),
        f"A task in flight takes {bytes_per_task():.0f} bytes.",
    ]
    header = ["law", "warm", "first 20", "best fixed", "1 at once", "24 at once", *PEERS]
    for price, rows in found.items():
        lines = [
            [name, *(f"{rows[name][key]:.3f}" if key in rows[name] else "" for key in header[1:])]
            for name in [*STATIONARY, *FURTHER, *CHANGING]
        ]
        progress = "; ".join(f"{name} {ratio:.3f}" for name, ratio in (rows["of use"] | rows["of no use"]).items())
        texts += [
            f"### Price {price:g} s",
            _LEGEND,
            table(header, lines),
            f"Progress, ours by the blind oracle's and by ours without progress: {progress}.",
        ]
    return blocks(*texts)


def picture(path: Path) -> None:
    """Draw polls against delay: the frontier that the oracle can reach, ours, and the peers."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    tasks = session("lognormal, 12 s", 1)
    times = durations(tasks)[200:]

    def point(moments: Array) -> tuple[float, float]:
        seen = np.searchsorted(moments, times)
        return float(np.mean(seen + 1)), float(np.mean(moments[seen] - times))

    _, axes = plt.subplots(figsize=(8, 5))
    known = tasks[0].law
    assert known is not None
    frontier = [point(oracle(known, price)) for price in np.geomspace(0.01, 3, 15)]
    axes.plot(*zip(*frontier, strict=True), "k-", label="the best that is possible")
    results = [run(learned(price), tasks) for price in PRICES]
    ours = [(result.polls[200:].mean(), result.delays[200:].mean()) for result in results]
    axes.plot(*zip(*ours, strict=True), "o", label="LearnedSchedule, price 0.02 to 1")
    for name, schedule in PEERS.items():
        x, y = point(moments_of(schedule, times.max()))
        axes.plot(x, y, "x", color="tab:red")
        axes.annotate(name, (x, y), xytext=(4, 4), textcoords="offset points")
    axes.set(xscale="log", yscale="log", xlabel="polls a task", ylabel="seconds from the end to its notice")
    axes.set_title("Lognormal durations around 12 s, sigma 0.3: tasks 201 to 1000")
    axes.legend()
    plt.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description="What polling costs, against the best that is possible.")
    parser.add_argument("--sessions", type=int, default=3, help="of 1,000 tasks for each law and price (%(default)s)")
    parser.add_argument("--short", action="store_true", help="two laws at one price, to see that it runs")
    parser.add_argument("--write", action="store_true", help="into RESULTS.md, with the picture beside it")
    options = parser.parse_args()
    check_oracle()
    print("oracle: equal spacing for the exponential law and the closed form for the uniform law are met")
    if options.short:
        print(measure_law("lognormal, 12 s", 0.1, [0]), measure_changes("8 to 25 s and back", 0.1, [0]))
        return
    with ProcessPoolExecutor() as pool:
        rows = pool.map(measure, PRICES, [range(options.sessions)] * len(PRICES))
        found = dict(zip(PRICES, rows, strict=True))
    text = report(found)
    command = shlex.join(["python", "benchmarks/polling.py", *sys.argv[1:]])
    print(blocks(about(command), text))
    if options.write:
        picture(RESULTS.with_name("polling.png"))
        write("Polling", blocks(text, "![Polls against delay](polling.png)"), command)


if __name__ == "__main__":
    main()
