"""Measures the cost of the client: `python benchmarks/client.py` measures requests, memory, scale, peers and imports.

Each client runs in its own process, with a gateway in another one. CPU time is that of the client's process as the
operating system reports it, system calls included, from its first submit to the end of its last task. Clients that are
compared run in turns, several times, and ratios are those of the medians. All traffic stays on 127.0.0.1.
"""

import argparse
import shlex
import statistics
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import peers
from _results import RESULTS, about, blocks, table, write
from gateway import run_client

WORKLOADS = str(Path(__file__).parent / "workloads.py")


@dataclass
class Size:
    """The size of the measurements."""

    runs: int
    loops: tuple[str, ...]
    calls: tuple[int, ...]
    """Numbers of concurrent tasks for which the CPU time of a request is measured."""
    seconds: float
    """Median duration of these tasks."""
    memory: tuple[int, ...]
    """Numbers of waiting tasks for which the memory is measured."""
    interval: float
    """Seconds from the submit of a waiting task to its first poll."""
    many: int
    """Concurrent tasks, compared with ten times `few` tasks in `few` slots."""
    few: int
    stream: int
    """Tasks of one stream."""
    peers: tuple[str, ...]
    peer_tasks: int
    peer_seconds: float
    starts: int


FULL = Size(
    runs=5, loops=("asyncio", "uvloop"), calls=(50, 1_000), seconds=4.0, memory=(1_000, 10_000), interval=45.0,
    many=10_000, few=100, stream=100_000, peers=tuple(peers.CLIENTS), peer_tasks=200, peer_seconds=8.0, starts=21,
)  # fmt: skip
SHORT = Size(
    runs=1, loops=("asyncio",), calls=(20,), seconds=0.4, memory=(100,), interval=4.0,
    many=200, few=20, stream=1_000, peers=("flux2max_async", "seaart-sdk"), peer_tasks=12, peer_seconds=0.3, starts=1,
)  # fmt: skip


def calls(size: Size) -> str:
    """Measure the CPU time of a request, compared with a hand-written baseline."""
    interval = size.seconds / 4
    rows = []
    for loop in size.loops:
        if find_spec(loop) is None:
            rows.append([loop, "not installed", *[""] * 5])
            continue
        for tasks in size.calls:
            costs: dict[str, list[float]] = {"baseline": [], "baseline, separate submits": [], "stream": []}
            requests_per_task: dict[str, float] = {}
            for _ in range(size.runs):
                for client, measurements in costs.items():
                    load = (str(tasks), str(tasks), str(size.seconds), "0.2", str(interval))
                    cpu, counters = run_client(WORKLOADS, loop, "cpu", client, *load)
                    measurements.append(cpu / counters["calls"])
                    requests_per_task[client] = counters["calls"] / tasks
            baseline, separate, session = (statistics.median(measurements) for measurements in costs.values())
            counts = " / ".join(f"{count:.1f}" for count in requests_per_task.values())
            figures = (f"{cost * 1e6:.0f}" for cost in (baseline, separate, session))
            ratios = (f"{session / reference:.2f}" for reference in (baseline, separate))
            rows.append([loop, f"{tasks:,}", counts, *figures, *ratios])
    header = [
        "loop", "concurrent tasks", "requests per task", "baseline, µs per request",
        "baseline with separate submits, µs per request", "FluxSession, µs per request", "ratio to the baseline",
        "ratio to the baseline with separate submits",
    ]  # fmt: skip
    return blocks(
        "Compared with a hand-written baseline: one aiohttp session, `json.loads`, a loop per task. A FluxSession "
        "opens a new connection for each submit, for safety; so does the baseline with separate submits. "
        f"Tasks of {size.seconds:g} s (lognormal, sigma 0.2), polled every {interval:g} s ± 10 %; "
        "submits count as requests. Imports and other first-use costs are excluded. "
        f"Medians of {size.runs}. Target for the first ratio: at most 1.25, ideally 1.1.",
        table(header, rows),
    )


def memory(size: Size) -> str:
    """Measure the resident memory of a waiting task."""

    def row(load: tuple[int, str]) -> list[str]:
        tasks, client = load
        result, _ = run_client(WORKLOADS, "asyncio", "memory", client, str(tasks), str(size.interval))
        name = {"baseline": "baseline", "stream": "one `stream()`", "generate": "one `generate()` per task"}[client]
        resident, sockets, polls = result["bytes"] / 1024, result["sockets"], result["polls"]
        return [f"{tasks:,}", name, f"{resident:.1f}", f"{sockets:+d}", f"{polls:.2f}"]

    # Other processes don't affect the memory, so several run at the same time.
    with ThreadPoolExecutor(3) as pool:
        loads = [(tasks, client) for tasks in size.memory for client in ("baseline", "stream", "generate")]
        rows = list(pool.map(row, loads))
    header = ["waiting tasks", "client", "KiB resident per task", "additional sockets", "polls per task"]
    return blocks(
        "The increase of the resident memory since before the first submit, per task, after a garbage collection: each "
        "task was submitted and polled once, and waits for its next poll. All connections are closed, so they don't "
        "count. Target: at most 8 KiB, ideally 4.",
        table(header, rows),
    )


def scale(size: Size) -> str:
    """Measure many concurrent tasks compared with few, and a long stream."""
    interval = size.many / 1250  # about a thousand requests per second, whatever the size
    loads = {
        # Tasks of three and a half intervals: four polls for each of them.
        size.many: (size.many, size.many, 3.5 * interval, 0.0, interval),
        size.few: (size.few * 10, size.few, 3.5 * interval / 8, 0.0, interval / 8),
    }
    runs = min(size.runs, 3)
    costs: dict[tuple[str, int], list[float]] = {}
    counts: dict[tuple[str, int], float] = {}
    for _ in range(runs):
        for slots, load in loads.items():
            for client in ("baseline", "stream"):
                cpu, counters = run_client(WORKLOADS, "asyncio", "cpu", client, *map(str, load))
                costs.setdefault((client, slots), []).append(cpu / load[0])
                counts[client, slots] = counters["calls"] / load[0]
    rows = []
    for client, name in (("baseline", "baseline"), ("stream", "FluxSession")):
        few, many = (statistics.median(costs[client, slots]) * 1e3 for slots in (size.few, size.many))
        requests = f"{counts[client, size.few]:.2f} / {counts[client, size.many]:.2f}"
        rows.append([name, requests, f"{few:.2f}", f"{many:.2f}", f"{many / few:.2f}"])
    cost_columns = [f"ms per task, {slots:,} concurrent" for slots in (size.few, size.many)]
    step = size.stream // 10
    result, _ = run_client(WORKLOADS, "asyncio", "stream", str(size.stream), "24", str(step), seconds=1800)
    resident = [number_of_bytes / 2**20 for number_of_bytes in result["resident"]]
    return blocks(
        f"{size.many:,} concurrent tasks, and {size.few * 10:,} in {size.few} slots, with the same number of polls per "
        f"task. Medians of {runs}. Target for the ratio: at most 1.2.",
        table(["client", "requests per task", *cost_columns, "ratio"], rows),
        f"A stream of {size.stream:,} requests with 24 slots, whose tasks end immediately: resident memory in MiB "
        f"after each {step:,} outcomes: {', '.join(f'{mebibytes:.1f}' for mebibytes in resident)}. Difference between "
        f"the first and the last of these: {resident[-1] - resident[0]:+.1f} MiB. CPU time of a task, with its two "
        f"requests: {result['cpu'] * 1e3:.2f} ms.",
    )


def compare_peers(size: Size) -> str:
    """Measure other clients of asynchronous image services."""
    return peers.compare(size.peer_tasks, size.peer_seconds, list(size.peers))


def start(size: Size) -> str:
    """Measure the duration of the import, compared with that of the four dependencies."""
    imports = {
        "aiohttp, attrs, cattrs, anyio": "import aiohttp, attr, attrs, cattrs, anyio",
        "flux2max_async": "from flux2max_async import *; FluxSession",
    }
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in imports}
    for number in range(size.starts + 1):
        for name, statement in imports.items():
            clocks = "time.process_time(), time.perf_counter()"
            code = f"import time; a = {clocks}\n{statement}\nb = {clocks}; print(b[0] - a[0], b[1] - a[1])"
            run = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
            cpu, wall = map(float, run.stdout.split())
            if number:  # the first run may compile modules
                times[name].append((cpu, wall))
    medians = {name: [statistics.median(clock) for clock in zip(*pairs, strict=True)] for name, pairs in times.items()}
    rows = [[name, *(f"{seconds * 1e3:.0f}" for seconds in clocks)] for name, clocks in medians.items()]
    (cpu, wall), (our_cpu, our_wall) = medians.values()
    rows.append(["ratio", f"{our_cpu / cpu:.2f}", f"{our_wall / wall:.2f}"])
    return blocks(
        "Importing all public names of the package (`import flux2max_async` alone is lazy), compared with importing "
        f"its dependencies. Medians of {size.starts} processes each, in turns. Target for the ratio: at most 1.1.",
        table(["import", "CPU time, ms", "wall time, ms"], rows),
    )


PARTS: dict[str, Callable[[Size], str]] = {
    "calls": calls,
    "memory": memory,
    "scale": scale,
    "peers": compare_peers,
    "start": start,
}


TITLES = {
    "calls": "CPU time of a call",
    "memory": "Memory of a waiting task",
    "scale": "Scale",
    "peers": "Peers",
    "start": "Start",
}
"""The headings of the sections in the results."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--short", action="store_true", help="only check that all parts run; the results are meaningless"
    )
    parser.add_argument("--only", default=",".join(PARTS), help="parts, separated by commas (%(default)s)")
    parser.add_argument("--write", type=Path, nargs="?", const=RESULTS, help="also write the results to this file")
    arguments = parser.parse_args()
    size = SHORT if arguments.short else FULL
    command = shlex.join(["python", "benchmarks/client.py", *sys.argv[1:]])
    names = arguments.only.split(",")
    print(about(command), flush=True)
    # Sequentially, because parts would affect each other's measurements; in parallel if nothing is measured.
    with ThreadPoolExecutor(len(names) if arguments.short else 1) as pool:
        for name, text in zip(names, pool.map(lambda name: PARTS[name](size), names), strict=True):
            print(f"\n## {TITLES[name]}\n\n{text}", flush=True)
            if arguments.write:
                write(TITLES[name], text, command, arguments.write)


if __name__ == "__main__":
    main()
