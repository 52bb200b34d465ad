"""What a journal costs: `python benchmarks/journal.py` measures CPU time, submits, fsyncs, and what is known already.

Each client runs in a process of its own, against a gateway in another one: with a journal and without one in turn,
several times. Ratios are those of the medians. CPU time is what the operating system says that the client's process
has used, all its threads and system calls included. The journals lie in a folder of their own in `--folder`, which
should be on a disk: where files are kept in memory, fsync costs nothing.
"""

import argparse
import asyncio
import json
import os
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _results import RESULTS, about, blocks, table, write
from gateway import durations, measured, prompt, running

from flux2max_async import FixedSchedule, FluxSession
from flux2max_async.journal import SqliteJournal

NONE = "-"
"""Stands for the path where there is no journal."""


@dataclass
class Size:
    """How much is measured."""

    runs: int
    steady: dict[int, int]
    """How many tasks, by how many are in flight."""
    seconds: float
    """The median of a task there."""
    known: int
    """Requests that are asked for twice."""
    fsyncs: int


FULL = Size(runs=3, steady={24: 192, 200: 1_000}, seconds=4.0, known=5_000, fsyncs=50)
SHORT = Size(runs=1, steady={5: 15}, seconds=0.3, known=100, fsyncs=5)


# ------------------------------------------------------------------ the client, in a process of its own


async def steady(path: str, tasks: int, places: int, median: float, url: str) -> dict[str, Any]:
    """Keep so many tasks in flight; the first ones are submitted at once, each further one when a place is free.

    Gives the CPU time per task, how long each further submit took its caller, and how often the disk was waited for.
    """
    await _warm_up(path)
    work = [prompt(number, lasting) for number, lasting in enumerate(durations(tasks, median, 0.2))]
    further = iter(work[places:])
    submits: list[float] = []
    burst = 0

    async def keep_going(text: str) -> None:
        nonlocal burst
        task = await session.submit(text)
        burst = _fsyncs(journal)
        (await task.outcome()).unwrap()
        for text_ in further:
            asked = time.perf_counter()
            task = await session.submit(text_)
            submits.append(time.perf_counter() - asked)
            (await task.outcome()).unwrap()

    journal = _journal(path)
    async with FluxSession(
        "key", base_url=url, max_in_flight=places, max_polls_per_second=None, journal=journal
    ) as session:
        began = time.process_time()
        await asyncio.gather(*map(keep_going, work[:places]))
        cpu, fsyncs = time.process_time() - began, _fsyncs(journal)
    return {"cpu": cpu / tasks, "submits": submits, "burst": burst, "later": (fsyncs - burst) / len(submits)}


async def known(path: str, requests: int, url: str) -> list[dict[str, float]]:
    """Stream requests for pictures that are done at once; then once more, when the journal knows them all."""
    await _warm_up(path)
    found: list[dict[str, float]] = []
    for _ in range(1 if path == NONE else 2):
        async with FluxSession(
            "key", base_url=url, schedule=FixedSchedule(0.005), max_polls_per_second=None, journal=_journal(path)
        ) as session:
            began, began_cpu = time.perf_counter(), time.process_time()
            async for outcome in session.stream(_at_once(requests)):
                outcome.unwrap()
            wall, cpu = time.perf_counter() - began, time.process_time() - began_cpu
        found.append({"wall": wall / requests, "cpu": cpu / requests})
    return found


async def _warm_up(path: str) -> None:
    """Draw a few pictures elsewhere first, so that what is loaded at first use is loaded."""
    journal = _journal(path if path == NONE else f"{path}.warm")
    with running() as url:
        async with FluxSession("key", base_url=url, schedule=FixedSchedule(0.01), journal=journal) as session:
            async for outcome in session.stream(_at_once(20)):
                outcome.unwrap()


def _at_once(requests: int) -> Iterable[str]:
    return (prompt(number, 0.0) for number in range(requests))


def _journal(path: str) -> SqliteJournal | None:
    return None if path == NONE else SqliteJournal(path)


def _fsyncs(journal: SqliteJournal | None) -> int:
    """Tell how many transactions have waited for the disk; only the journal's own thread knows."""
    scribe = journal and journal._scribe  # noqa: SLF001 - no caller needs it but this one
    return scribe.transactions if scribe else 0


# ------------------------------------------------------------------ the comparison


def beside(size: Size, folder: Path) -> str:
    """Measure a steady stream with a journal and without one."""
    costs, waits, books = [], [], []
    for places, tasks in size.steady.items():
        runs: dict[bool, list[dict[str, Any]]] = {False: [], True: []}
        calls: dict[bool, list[float]] = {False: [], True: []}
        for _ in range(size.runs):
            for kept, found in runs.items():
                one, told = _measured(folder if kept else None, "steady", tasks, places, size.seconds)
                found.append(one)
                calls[kept].append(told["calls"] / tasks)
        cpu = {kept: statistics.median(one["cpu"] for one in found) * 1e3 for kept, found in runs.items()}
        counts = [f"{statistics.median(calls[kept]):.2f}" for kept in cpu]
        spread = [f"{one['cpu'] * 1e3:.2f}" for one in sorted(runs[True], key=lambda one: float(one["cpu"]))]
        costs.append([
            str(places), str(tasks), " / ".join(counts), f"{cpu[False]:.2f}", f"{cpu[True]:.2f}",
            f"{cpu[True] / cpu[False]:.2f}", f"{spread[0]} to {spread[-1]}",
        ])  # fmt: skip
        for share, name in ((50, "median"), (90, "90th percentile")):
            took = {
                kept: statistics.median(_percentile(one["submits"], share) for one in found) * 1e3
                for kept, found in runs.items()
            }
            took_more = took[True] - took[False]
            waits.append([str(places), name, f"{took[False]:.1f}", f"{took[True]:.1f}", f"{took_more:+.1f}"])
        burst = statistics.median(one["burst"] for one in runs[True])
        later = statistics.median(one["later"] for one in runs[True])
        books.append([str(places), f"{burst:g} for {places} intents", f"{burst / places:.2f}", f"{later:.2f}"])
    return blocks(
        f"Tasks of {size.seconds:g} s (lognormal, sigma 0.2), the schedule that learns, no limit to its polls. The "
        "first ones are submitted at once, each further one as soon as a place is free. "
        f"Medians of {size.runs} runs. CPU time is to be at most 1.15 of that without a journal:",
        table(
            ["in flight", "tasks", "calls per task", "without, ms per task", "with, ms per task", "ratio", "runs with"],
            costs,
        ),
        "How long `await session.submit(...)` takes where a place is free, in ms. The median is to be at most 2 more:",
        table(["in flight", "", "without", "with", "more"], waits),
        "How many transactions wait for the disk: what comes while one does so shares the next one.",
        table(["in flight", "submits at once", "fsyncs per intent", "fsyncs per intent, later"], books),
    )


def again(size: Size, folder: Path) -> str:
    """Measure requests that the journal knows already."""
    found: dict[str, list[dict[str, float]]] = {}
    runs = min(size.runs, 3)
    for _ in range(runs):
        (without,), _ = _measured(None, "known", size.known)
        (first, second), books = _measured(folder, "known", size.known)
        assert books["calls"] == 2 * size.known, "nothing is to be asked for again"
        for name, one in (("without a journal", without), ("with one", first), ("known already", second)):
            found.setdefault(name, []).append(one)
    rows = []
    for name, times in found.items():
        cpu, wall = (statistics.median(one[clock] for one in times) for clock in ("cpu", "wall"))
        rows.append([name, f"{cpu * 1e3:.2f}", f"{wall * 1e3:.2f}", f"{1 / wall:,.0f}"])
    return blocks(
        f"A stream of {size.known:,} requests with 24 places, for pictures that are done at once; and the same stream "
        f"again, all of whose outcomes come from the journal. Medians of {runs}:",
        table(["", "CPU time per request, ms", "wall time, ms", "requests per second"], rows),
    )


def disk(size: Size, folder: Path) -> str:
    """Say where the journals lie, and measure what an fsync costs there."""
    took = []
    sync = getattr(os, "fdatasync", os.fsync)
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        for _ in range(size.fsyncs):
            began = time.perf_counter()
            file.write(bytes(4096))
            sync(file.fileno())
            took.append(time.perf_counter() - began)
    middle, late = statistics.median(took) * 1e3, _percentile(took, 90) * 1e3
    return (
        f"The journals lie on {_file_system(folder)}, where appending 4 KiB and waiting for the disk takes "
        f"{middle:.1f} ms (median of {size.fsyncs}; 90th percentile {late:.1f} ms)."
    )


def _measured(folder: Path | None, piece: str, *load: float) -> tuple[Any, Any]:
    """Run a client, with a new journal or without one."""
    path = NONE if folder is None else str(folder / f"{time.monotonic_ns()}.db")
    return measured(__file__, "--client", piece, path, *map(str, load))


def _percentile(values: list[float], share: int) -> float:
    return sorted(values)[len(values) * share // 100]


def _file_system(folder: Path) -> str:
    """Name the kind of file system, where the system says what it is."""
    device = folder.stat().st_dev
    try:
        mounts = Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return "a file system of unknown kind"
    number = f"{os.major(device)}:{os.minor(device)}"
    kinds = [mount.partition(" - ")[2].split()[0] for mount in mounts if mount.split()[2] == number]
    return kinds[-1] if kinds else "a file system of unknown kind"


PIECES: dict[str, Callable[..., Coroutine[Any, Any, Any]]] = {"steady": steady, "known": known}
PARTS: dict[str, Callable[[Size, Path], str]] = {"disk": disk, "beside": beside, "again": again}


def main() -> None:
    if sys.argv[1:2] == ["--client"]:
        piece, path, *load, url = sys.argv[2:]
        numbers = [json.loads(number) for number in load]
        print(json.dumps(asyncio.run(PIECES[piece](path, *numbers, url))))
        return
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--short", action="store_true", help="prove that each part runs; the figures are worth nothing")
    parser.add_argument("--only", default=",".join(PARTS), help="parts, with commas between them (%(default)s)")
    parser.add_argument(
        "--folder", type=Path, default=Path(), help="where the journals are to lie (the current folder)"
    )
    parser.add_argument("--write", type=Path, nargs="?", const=RESULTS, help="where to write the results, too")
    arguments = parser.parse_args()
    size = SHORT if arguments.short else FULL
    command = shlex.join(["python", "benchmarks/journal.py", *sys.argv[1:]])
    print(about(command), flush=True)
    texts = []
    with tempfile.TemporaryDirectory(dir=arguments.folder.absolute(), prefix=".journals-") as folder:
        for name in arguments.only.split(","):
            texts.append(PARTS[name](size, Path(folder)))
            print(f"\n{texts[-1]}", flush=True)
    if arguments.write:
        write("Journal", blocks(*texts), command, arguments.write)


if __name__ == "__main__":
    main()
