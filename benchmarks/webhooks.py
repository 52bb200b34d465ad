"""Measure the benefit of webhooks: `python benchmarks/webhooks.py` compares delays, polls and CPU time with polling.

Each client (`webhook_client.py`) runs in its own process, with the server that receives its webhooks, against a gateway
in another process. A delivery contains the time at which its sender started it, on the clock that both processes share.
CPU time is that of the client's process as reported by the operating system, including its server and system calls.

The benchmark fails if a task is lost: if it has no outcome, an outcome before its end, or more than one submit.
"""

import argparse
import math
import shlex
import statistics
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from _results import RESULTS, about, blocks, table, write
from gateway import run_client
from webhook_client import SIGMA

CLIENT = str(Path(__file__).with_name("webhook_client.py"))


@dataclass
class Size:
    """The size of the benchmark."""

    tasks: int
    warmup: int
    """Tasks at the beginning that are left out, because the schedule is still learning."""
    slots: int
    seconds: float
    """The median duration of a task."""
    delay: float
    """Seconds from an end to its delivery, in the scenario "late"."""
    outage_tasks: int
    """Tasks in the measurement with an outage of webhooks."""
    reaction: float
    """Seconds after the start and end of the outage that are reported separately."""
    burst: int
    """Deliveries at once."""
    runs: int
    """How often each scenario and each burst is measured."""
    clients: int
    """Clients at the same time; they are mostly idle, and CPU time is measured per process."""
    poll_price: float = 0.1
    """Of the learned schedule, in seconds; 0.1 is its default."""


FULL = Size(
    tasks=1_100, warmup=500, slots=200, seconds=4.0, delay=1.0, outage_tasks=2_400, reaction=5.0, burst=1_000, runs=2,
    clients=3,
)  # fmt: skip
SHORT = Size(
    tasks=30, warmup=10, slots=10, seconds=0.3, delay=0.1, outage_tasks=40, reaction=0.2, burst=20, runs=1,
    clients=6, poll_price=0.002,
)  # fmt: skip

SCENARIOS = {
    "polling": "polling only, no inbox",
    "on time": "webhooks work",
    "half": "half of them are lost",
    "unreachable": "none arrives: no server listens at the address",
    "late": "each {delay:g} s late",
    "twice": "each is delivered twice",
}


@dataclass
class TaskResult:
    """One task as its caller saw it; times and durations are in seconds."""

    number: int
    ended: float
    returned: float
    sent: float | None
    """When its delivery was started; None if the end was noticed by a poll."""
    polls: int

    @property
    def delay(self) -> float:
        return self.returned - self.ended


@dataclass
class ClientRun:
    """The measurements of one client."""

    results: list[TaskResult]
    first: list[TaskResult]
    """Tasks that were submitted before the schedule had learned anything; not part of `results`."""
    problems: list[str]
    """Lost tasks."""
    cpu: float
    """Seconds per task."""
    started: float
    min_seconds: float
    """The least duration of the run: the sum of the tasks' durations divided by the slots."""
    gateway_load: float
    """The fraction of one processor that the gateway used."""


# ------------------------------------------------------------------ parts


def compare(size: Size) -> tuple[str, list[str]]:
    """Compare the scenarios."""
    runs: dict[str, list[ClientRun]] = {scenario: [] for scenario in SCENARIOS}
    with ThreadPoolExecutor(size.clients) as pool:
        scenarios = list(SCENARIOS) * size.runs
        all_runs = list(pool.map(lambda scenario: _run_client(scenario, size.tasks, size), scenarios))
    for scenario, run in zip(scenarios, all_runs, strict=True):
        runs[scenario].append(run)
    polling_cpu = _median_cpu(runs["polling"])
    results_on_time = chain.from_iterable(run.results for run in runs["on time"])
    sent = [result.sent - result.ended for result in results_on_time if result.sent is not None]
    text = blocks(
        f"{size.slots} tasks are in flight all the time: {size.tasks:,} tasks, lognormal, median {size.seconds:g} s, "
        f"sigma {SIGMA}. The first {size.warmup} are left out, because the schedule is still learning. Every client "
        f"runs the same tasks; {size.clients} clients run at the same time, and {size.runs} times per scenario. All "
        "their tasks count together; CPU time is the median of the runs. The schedule is the learned one, without a "
        "limit on polls (`max_polls_per_second=None`), which would hide the cost of polls. A delivery that fails is "
        "not repeated. Reaction is the time from the sender's start of a delivery, before it connects, to the return "
        "of the caller's `await session.generate(...)`, for tasks that ended by a webhook; the target for its median "
        "is 50 ms. Delay is the time from the true end of a task to that return, for all tasks. The targets are at "
        "most 1 poll per task while webhooks work, and no lost tasks.",
        table(
            [
                "", "lost", "ended by a webhook", "reaction, median ms", "95th percentile ms", "delay, mean ms",
                "95th percentile ms", "polls per task", "CPU time, ms per task", "relative to polling", "range of runs",
                f"the first {size.slots}: delay, mean ms",
            ],
            [_scenario_row(name.format(delay=size.delay), runs[key], polling_cpu) for key, name in SCENARIOS.items()],
        ),
        f"The gateway was not a bottleneck: its process used at most {max(run.gateway_load for run in all_runs):.0%} "
        f"of a processor, and while webhooks work, it started 95 % of them within {_ms(_p95(sent), 1)} ms of the ends.",
    )  # fmt: skip
    return text, [problem for run in all_runs for problem in run.problems]


def _scenario_row(name: str, runs: list[ClientRun], polling_cpu: float) -> list[str]:
    results = [result for run in runs for result in run.results]
    first_delays = [result.delay for run in runs for result in run.first]
    reactions = [result.returned - result.sent for result in results if result.sent is not None]
    delays = [result.delay for result in results]
    cpu = sorted(run.cpu * 1e3 for run in runs)
    median_cpu = _median_cpu(runs)
    return [
        name,
        str(sum(len(run.problems) for run in runs)),
        f"{len(reactions) / max(len(results), 1):.0%}",
        *([_ms(statistics.median(reactions), 1), _ms(_p95(reactions), 1)] if reactions else ["-", "-"]),
        _ms(statistics.mean(delays)),
        _ms(_p95(delays)),
        f"{statistics.mean(result.polls for result in results):.2f}",
        f"{median_cpu:.2f}",
        f"{median_cpu / polling_cpu:.2f}",
        f"{cpu[0]:.2f} to {cpu[-1]:.2f}",
        _ms(statistics.mean(first_delays)),
    ]


def measure_outage(size: Size) -> tuple[str, list[str]]:
    """Measure a period in which no webhook arrives."""
    run = _run_client("outage", size.outage_tasks, size)
    start, end = run.started + run.min_seconds / 3, run.started + run.min_seconds * 2 / 3
    periods = [
        ("webhooks work", -math.inf, start),
        ("**outage**", start, end),
        (f"its first {size.reaction:g} s", start, start + size.reaction),
        ("the rest of it", start + size.reaction, end),
        ("**webhooks work again**", end, math.inf),
        (f"the first {size.reaction:g} s", end, end + size.reaction),
        ("the rest", end + size.reaction, math.inf),
    ]
    rows = []
    for name, since, until in periods:
        results = [result for result in run.results if since <= result.ended < until]
        if not results:
            continue
        delays = [result.delay for result in results]
        by_webhook = sum(result.sent is not None for result in results) / len(results)
        rows.append([
            name, str(len(results)), f"{by_webhook:.0%}", _ms(statistics.mean(delays)), _ms(_p95(delays)),
            _ms(max(delays)), f"{statistics.mean(result.polls for result in results):.2f}",
        ])  # fmt: skip
    text = blocks(
        f"The same with {size.outage_tasks:,} tasks, whose webhooks work, then fail for {run.min_seconds / 3:.1f} s, "
        "and then work again; by the time at which the tasks ended:",
        table(
            ["", "tasks", "ended by a webhook", "delay, mean ms", "95th percentile ms", "max ms", "polls per task"],
            rows,
        ),
    )
    return text, run.problems


def measure_burst(size: Size) -> tuple[str, list[str]]:
    """Measure many deliveries at once."""
    receivers = {
        "by hand: aiohttp.web, `hmac`, `json.loads`, a future": "by hand",
        "`inbox.aiohttp_handler`": "handler",
        "`inbox.deliver()` alone, without a server": "deliver",
    }
    rows = []
    for name, receiver in receivers.items():
        runs, _ = run_client(CLIENT, "burst", receiver, str(size.burst), str(size.runs))
        cpu, seconds = (statistics.median(run[key] for run in runs) for key in ("cpu", "seconds"))
        rows.append([name, f"{cpu * 1e3:.2f}", f"{seconds:.2f}"])
    text = blocks(
        f"{size.burst:,} tasks end at once while callers wait for all of them. The deliveries arrive over up to 100 "
        "connections at a time, each over a new one; there are no polls. Measured until the last caller has its "
        f"outcome, median of {size.runs} runs:",
        table(["", "CPU time, ms per delivery", "all of them, s"], rows),
    )
    return text, []


# ------------------------------------------------------------------ clients


def _run_client(scenario: str, tasks: int, size: Size) -> ClientRun:
    load = (tasks, size.warmup, size.slots, size.seconds, size.delay, size.poll_price)
    client, gateway = run_client(CLIENT, "steady", scenario, *map(str, load), seconds=300)
    ends: dict[str, list[float]] = gateway["ends"]
    results = {
        number: TaskResult(int(number), ends[number][0], *outcome) for number, outcome in client["outcomes"].items()
    }
    return ClientRun(
        results=[result for result in results.values() if result.number >= size.warmup],
        first=[result for result in results.values() if result.number < size.slots],
        problems=[f"{scenario}: {problem}" for problem in _problems(tasks, ends, results, client["errors"])],
        cpu=client["cpu"],
        started=client["started"],
        min_seconds=client["min_seconds"],
        gateway_load=gateway["cpu"] / client["seconds"],
    )


def _problems(
    tasks: int, ends: dict[str, list[float]], results: dict[str, TaskResult], errors: dict[str, str]
) -> list[str]:
    """Return what went wrong.

    Args:
        tasks: The expected number of tasks.
        ends: The ends of all tasks that were submitted, by number.
        results: The callers' outcomes by number.
        errors: The callers' errors by number.
    """
    problems = [f"task {number}: {error}" for number, error in errors.items()]
    problems += [f"task {number}: no outcome" for number in ends.keys() - results.keys() - errors.keys()]
    problems += [f"task {number}: submitted {len(times)} times" for number, times in ends.items() if len(times) > 1]
    problems += [f"task {number}: outcome before its end" for number, result in results.items() if result.delay < 0]
    if len(ends) != tasks:
        problems.append(f"{tasks - len(ends)} of {tasks} tasks were not submitted")
    return problems


def _median_cpu(runs: list[ClientRun]) -> float:
    """Return the median CPU time per task, in milliseconds."""
    return statistics.median(run.cpu for run in runs) * 1e3


def _p95(values: list[float]) -> float:
    """Return the 95th percentile."""
    return sorted(values)[math.ceil(0.95 * len(values)) - 1] if values else math.nan


def _ms(seconds: float, digits: int = 0) -> str:
    return f"{seconds * 1e3:,.{digits}f}"


PARTS: dict[str, Callable[[Size], tuple[str, list[str]]]] = {
    "compare": compare,
    "outage": measure_outage,
    "burst": measure_burst,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--short", action="store_true", help="check that each part runs; the figures are meaningless")
    parser.add_argument("--only", default=",".join(PARTS), help="comma-separated parts (default: %(default)s)")
    parser.add_argument("--write", type=Path, nargs="?", const=RESULTS, help="also write the results to this file")
    arguments = parser.parse_args()
    size = SHORT if arguments.short else FULL
    command = shlex.join(["python", "benchmarks/webhooks.py", *sys.argv[1:]])
    print(about(command), flush=True)
    names = arguments.only.split(",")
    texts, problems = [], []
    # Parts run one after another, because they would disturb each other; a short run measures nothing.
    with ThreadPoolExecutor(len(names) if arguments.short else 1) as pool:
        for text, part_problems in pool.map(lambda name: PARTS[name](size), names):
            print(f"\n{text}", flush=True)
            texts.append(text)
            problems += part_problems
    if problems:
        sys.exit("\n".join(["", f"{len(problems)} problems:", *problems]))
    if arguments.write:
        write("Webhooks", blocks(*texts), command, arguments.write)


if __name__ == "__main__":
    main()
