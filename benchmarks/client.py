"""What the client costs: `python benchmarks/client.py` measures calls, memory, scale, peers and the start.

Each client runs in a process of its own, against a gateway in another one. CPU time is what the operating system says
that the client's process has used, system calls included, from its first submit to its last end. What is compared
runs in turn, several times, and the ratios are those of the medians. Everything stays on 127.0.0.1.
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
from gateway import measured

WORK = str(Path(__file__).parent / "workloads.py")


@dataclass
class Size:
    """How much is measured."""

    runs: int
    loops: tuple[str, ...]
    calls: tuple[int, ...]
    """Tasks at once."""
    seconds: float
    """The median of a task, where calls are counted."""
    memory: tuple[int, ...]
    """Tasks waiting."""
    interval: float
    """Seconds to the first poll of a task that waits."""
    many: int
    """Tasks at once, compared with ten times `few` tasks in `few` places."""
    few: int
    stream: int
    """Tasks in one stream."""
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
    """Measure the CPU time of a call, beside a hand-written minimum."""
    interval = size.seconds / 4
    rows = []
    for loop in size.loops:
        if find_spec(loop) is None:
            rows.append([loop, "not installed", *[""] * 5])
            continue
        for tasks in size.calls:
            costs: dict[str, list[float]] = {"by hand": [], "by hand, apart": [], "stream": []}
            per_task: dict[str, float] = {}
            for _ in range(size.runs):
                for client, found in costs.items():
                    load = (str(tasks), str(tasks), str(size.seconds), "0.2", str(interval))
                    cpu, books = measured(WORK, loop, "cpu", client, *load)
                    found.append(cpu / books["calls"])
                    per_task[client] = books["calls"] / tasks
            by_hand, apart, session = (statistics.median(found) for found in costs.values())
            counts = " / ".join(f"{count:.1f}" for count in per_task.values())
            figures = (f"{cost * 1e6:.0f}" for cost in (by_hand, apart, session))
            rows.append([loop, f"{tasks:,}", counts, *figures, f"{session / by_hand:.2f}", f"{session / apart:.2f}"])
    header = [
        "loop", "tasks at once", "calls per task", "by hand, µs per call", "by hand, submits apart, µs per call",
        "FluxSession, µs per call", "ratio to by hand", "ratio to submits apart",
    ]  # fmt: skip
    return blocks(
        "Beside a hand-written minimum: one aiohttp session, `json.loads`, a loop per task. A FluxSession gives each "
        "submit a connection of its own, for safety; what that costs shows beside the minimum with submits apart. "
        f"Tasks of {size.seconds:g} s (lognormal, sigma 0.2), polled every {interval:g} s, give or take a tenth; "
        "submits count as calls. What is loaded at first use is loaded before. "
        f"Medians of {size.runs}. The first ratio is to be at most 1.25, hoped for 1.1.",
        table(header, rows),
    )


def memory(size: Size) -> str:
    """Measure what a waiting task keeps resident."""

    def row(load: tuple[int, str]) -> list[str]:
        tasks, client = load
        found, _ = measured(WORK, "asyncio", "memory", client, str(tasks), str(size.interval))
        name = {"by hand": "by hand", "stream": "one `stream()`", "generate": "a `generate()` each"}[client]
        kept, sockets, polls = found["bytes"] / 1024, found["sockets"], found["polls"]
        return [f"{tasks:,}", name, f"{kept:.1f}", f"{sockets:+d}", f"{polls:.2f}"]

    # Memory doesn't mind who else is running.
    with ThreadPoolExecutor(3) as pool:
        loads = [(tasks, client) for tasks in size.memory for client in ("by hand", "stream", "generate")]
        rows = list(pool.map(row, loads))
    header = ["tasks waiting", "waited for by", "KiB resident per task", "sockets more", "polls per task"]
    return blocks(
        "What the process keeps resident more than before the first submit, divided by the tasks, after a garbage "
        "collection: each task has been submitted and polled once, and now waits for its next poll. The gateway has "
        "closed all connections, so that they count on neither side. To be at most 8 KiB, hoped for 4.",
        table(header, rows),
    )


def scale(size: Size) -> str:
    """Measure many tasks at once beside few, and a long stream."""
    interval = size.many / 1250  # about a thousand calls in a second, whatever the size
    loads = {
        # Three looks and a half: four polls on both sides.
        size.many: (size.many, size.many, 3.5 * interval, 0.0, interval),
        size.few: (size.few * 10, size.few, 3.5 * interval / 8, 0.0, interval / 8),
    }
    runs = min(size.runs, 3)
    costs: dict[tuple[str, int], list[float]] = {}
    counts: dict[tuple[str, int], float] = {}
    for _ in range(runs):
        for places, load in loads.items():
            for client in ("by hand", "stream"):
                cpu, books = measured(WORK, "asyncio", "cpu", client, *map(str, load))
                costs.setdefault((client, places), []).append(cpu / load[0])
                counts[client, places] = books["calls"] / load[0]
    rows = []
    for client, name in (("by hand", "by hand"), ("stream", "FluxSession")):
        few, many = (statistics.median(costs[client, places]) * 1e3 for places in (size.few, size.many))
        calls = f"{counts[client, size.few]:.2f} / {counts[client, size.many]:.2f}"
        rows.append([name, calls, f"{few:.2f}", f"{many:.2f}", f"{many / few:.2f}"])
    at_once = [f"ms per task, {places:,} at once" for places in (size.few, size.many)]
    every = size.stream // 10
    streamed, _ = measured(WORK, "asyncio", "stream", str(size.stream), "24", str(every), seconds=1800)
    resident = [kept / 2**20 for kept in streamed["resident"]]
    return blocks(
        f"{size.many:,} tasks at once, and {size.few * 10:,} in {size.few} places, with as many polls for each task. "
        f"Medians of {runs}. To be at most 1.2.",
        table(["client", "calls per task", *at_once, "ratio"], rows),
        f"A stream of {size.stream:,} requests with 24 places, of tasks that end at once: resident memory, MiB, after "
        f"each {every:,} outcomes: {', '.join(f'{kept:.1f}' for kept in resident)}. From the first to the last of "
        f"these: {resident[-1] - resident[0]:+.1f} MiB. CPU time of a task, with its two calls: "
        f"{streamed['cpu'] * 1e3:.2f} ms.",
    )


def beside_peers(size: Size) -> str:
    """Measure other clients of asynchronous image services."""
    return peers.compared(size.peer_tasks, size.peer_seconds, list(size.peers))


def start(size: Size) -> str:
    """Measure how long the import takes, beside that of the four dependencies."""
    imports = {
        "aiohttp, attrs, cattrs, anyio": "import aiohttp, attr, attrs, cattrs, anyio",
        "flux2max_async": "from flux2max_async import *; FluxSession",
    }
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in imports}
    for turn in range(size.starts + 1):
        for name, statement in imports.items():
            clocks = "time.process_time(), time.perf_counter()"
            code = f"import time; a = {clocks}\n{statement}\nb = {clocks}; print(b[0] - a[0], b[1] - a[1])"
            run = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
            cpu, wall = map(float, run.stdout.split())
            if turn:  # the first one may have to compile
                found[name].append((cpu, wall))
    medians = {name: [statistics.median(clock) for clock in zip(*times, strict=True)] for name, times in found.items()}
    rows = [[name, *(f"{seconds * 1e3:.0f}" for seconds in clocks)] for name, clocks in medians.items()]
    (cpu, wall), (our_cpu, our_wall) = medians.values()
    rows.append(["ratio", f"{our_cpu / cpu:.2f}", f"{our_wall / wall:.2f}"])
    return blocks(
        "Importing the whole face of the package (by itself, `import flux2max_async` loads nothing yet), beside "
        f"importing what it stands on. Medians of {size.starts} fresh processes, in turn. To be at most 1.1.",
        table(["import", "CPU time, ms", "wall time, ms"], rows),
    )


PARTS: dict[str, Callable[[Size], str]] = {
    "calls": calls,
    "memory": memory,
    "scale": scale,
    "peers": beside_peers,
    "start": start,
}


TITLES = {
    "calls": "CPU time of a call",
    "memory": "Memory of a waiting task",
    "scale": "Scale",
    "peers": "Peers",
    "start": "Start",
}
"""The sections of the results."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--short", action="store_true", help="prove that each part runs; the figures are worth nothing")
    parser.add_argument("--only", default=",".join(PARTS), help="parts, with commas between them (%(default)s)")
    parser.add_argument("--write", type=Path, nargs="?", const=RESULTS, help="where to write the results, too")
    arguments = parser.parse_args()
    size = SHORT if arguments.short else FULL
    command = shlex.join(["python", "benchmarks/client.py", *sys.argv[1:]])
    names = arguments.only.split(",")
    print(about(command), flush=True)
    # One part after another, or they would disturb each other; where only running counts, all at once.
    with ThreadPoolExecutor(len(names) if arguments.short else 1) as pool:
        for name, text in zip(names, pool.map(lambda name: PARTS[name](size), names), strict=True):
            print(f"\n## {TITLES[name]}\n\n{text}", flush=True)
            if arguments.write:
                write(TITLES[name], text, command, arguments.write)


if __name__ == "__main__":
    main()
