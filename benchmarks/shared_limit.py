"""Worker processes on one account: slots of their own, or one limit that they share.

    python benchmarks/shared_limit.py --seconds 60

Four processes serve visitors who come back at once, 60 % of them at the first process, on an emulated account that
allows 24 tasks in flight. "kill" also ends a worker with SIGKILL in the middle, and starts another one; "restart"
replaces each worker by a new one, which starts before the old one has drained.
"""

import argparse
import asyncio
import itertools
import multiprocessing
import os
import signal
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import attrs

from flux2max_async import FluxError, FluxSession, SqliteInFlightLimit, SqliteJournal
from flux2max_async.emulator import Emulator

ACCOUNT = 24
SPAWN = multiprocessing.get_context("spawn")
LEASE = 4.0
DRAIN = 30.0


@attrs.frozen
class Setup:
    url: str
    key: str
    folder: str
    slots: int
    """Of each worker; 0 for the shared limit."""
    journal: bool


def run_gateway(pipe: Connection, options: dict[str, Any]) -> None:
    with Emulator(max_in_flight=ACCOUNT, pictures=False, seed=1, **options) as gateway:
        pipe.send((gateway.url, gateway.api_key))
        while pipe.recv() == "report":
            tasks = [(task.prompt, task.begins, task.ends) for task in list(gateway.tasks.values())]
            pipe.send((tasks, gateway.calls["submit"], time.monotonic()))


def run_worker(pipe: Connection, setup: Setup, name: str, visitors: int) -> None:
    asyncio.run(work(pipe, setup, name, visitors))


async def work(pipe: Connection, setup: Setup, name: str, visitors: int) -> None:
    folder, waits, errors = Path(setup.folder), list[float](), list[str]()
    limit = setup.slots or SqliteInFlightLimit(folder / "limit.db", ACCOUNT)
    journal = SqliteJournal(folder / "run.db", lease=LEASE) if setup.journal else None
    numbers = itertools.count()
    async with FluxSession(setup.key, base_url=setup.url, max_in_flight=limit, journal=journal) as session:

        async def visit() -> None:
            while True:
                start = time.monotonic()
                try:
                    await session.generate(f"{name} {next(numbers)}")
                except FluxError as error:
                    errors.append(type(error).__name__)
                    return
                waits.append(time.monotonic() - start)

        stopped = asyncio.Event()
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopped.set)
        visits = [asyncio.create_task(visit()) for _ in range(visitors)]
        pipe.send("ready")
        await stopped.wait()
        await session.aclose(drain=DRAIN)
        await asyncio.wait(visits)
    pipe.send((waits, errors))


@attrs.frozen
class Worker:
    name: str
    visitors: int
    process: BaseProcess
    pipe: Connection

    @classmethod
    def start(cls, setup: Setup, name: str, visitors: int) -> "Worker":
        pipe, theirs = SPAWN.Pipe()
        process = SPAWN.Process(target=run_worker, args=(theirs, setup, name, visitors), daemon=True)
        process.start()
        theirs.close()
        assert pipe.recv() == "ready"
        return cls(name, visitors, process, pipe)

    def terminate(self) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, signal.SIGTERM)

    def result(self) -> tuple[list[float], list[str]]:
        waits, errors = self.pipe.recv()
        self.process.join()
        return waits, errors


@contextmanager
def gateway(options: dict[str, Any]) -> Iterator[Connection]:
    pipe, theirs = SPAWN.Pipe()
    process = SPAWN.Process(target=run_gateway, args=(theirs, options), daemon=True)
    process.start()
    yield pipe
    pipe.send("stop")
    process.join()


def in_flight(tasks: list[tuple[str, float, float]], start: float, end: float) -> tuple[float, int]:
    """Return the mean and the maximum of the tasks in flight."""
    busy = sum(max(0.0, min(end, ends) - max(start, begins)) for _, begins, ends in tasks)
    changes = sorted(itertools.chain.from_iterable(((begins, 1), (ends, -1)) for _, begins, ends in tasks))
    return busy / (end - start), max(itertools.accumulate(change for _, change in changes))


def measure(name: str, arguments: argparse.Namespace, *, slots: int, journal: bool = False) -> None:
    total = arguments.visitors
    shares = [total - 3 * round(total * 0.4 / 3), *[round(total * 0.4 / 3)] * 3]
    options = {"seconds": 8.0, "time_scale": arguments.time_scale}
    with gateway(options) as account, tempfile.TemporaryDirectory() as folder:
        url, key = account.recv()
        setup = Setup(url, key, folder, slots, journal)
        workers = [Worker.start(setup, f"w{number}", visitors) for number, visitors in enumerate(shares)]
        time.sleep(4.0)
        begin = time.monotonic()
        gone: list[Worker] = []
        if name == "shared, kill":
            time.sleep(arguments.seconds / 2)
            victim = workers.pop(0)
            victim.process.kill()
            workers.append(Worker.start(setup, "new", victim.visitors))
            time.sleep(arguments.seconds / 2)
        elif name == "shared, restart":
            for number, old in enumerate(list(workers)):
                time.sleep(arguments.seconds / 5)
                old.terminate()
                gone.append(workers.pop(0))
                workers.append(Worker.start(setup, f"new{number}", old.visitors))
            time.sleep(arguments.seconds / 5)
        else:
            time.sleep(arguments.seconds)
        account.send("report")
        tasks, submits, end = account.recv()
        for worker in workers:
            worker.terminate()
        results = [worker.result() for worker in (*gone, *workers)]
        account.send("report")
        account.recv()
    mean, most = in_flight(tasks, begin, end)
    waits = [statistics.median(waits) if waits else float("nan") for waits, _ in results]
    served = [sum(prompt.startswith(f"{worker.name} ") for prompt, *_ in tasks) for worker in (*gone, *workers)]
    unexpected = sum(error != "SessionClosedError" for _, errors in results for error in errors)
    ended = [*gone, *workers]
    print(
        f"{name:16} {mean:5.1f} of {ACCOUNT} busy (at most {most}), {len(tasks)} tasks, "
        f"{submits - len(tasks):3} refused, {unexpected} errors; visitors {[worker.visitors for worker in ended]}, "
        f"tasks {served}, p50 {', '.join(f'{wait:.1f}' for wait in waits)} s"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0, help="how long each row is measured")
    parser.add_argument("--visitors", type=int, default=48)
    parser.add_argument("--time-scale", type=float, default=2.0, help="seconds of the service per real second")
    parser.add_argument("--only", help="measure this row alone")
    arguments = parser.parse_args()
    rows: dict[str, dict[str, Any]] = {
        "6 each": {"slots": ACCOUNT // 4},
        "24 each": {"slots": ACCOUNT},
        "shared": {"slots": 0},
        "shared, kill": {"slots": 0, "journal": True},
        "shared, restart": {"slots": 0, "journal": True},
    }
    for name, options in rows.items():
        if arguments.only in {None, name}:
            measure(name, arguments, **options)


if __name__ == "__main__":
    main()
