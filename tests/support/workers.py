"""Worker processes that share an account, and the account in a process of its own."""

import asyncio
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import attrs

from flux2max_async import FixedSchedule, FluxSession, SqliteInFlightLimit, SqliteJournal
from flux2max_async.emulator import Emulator

_SPAWN = multiprocessing.get_context("spawn")
_LEASE = 2.0
_DRAIN = 60.0
_PATIENCE = 60.0
"""Seconds for what takes a few."""


# ------------------------------------------------------------------ the account


@attrs.frozen
class Report:
    """What an account has seen until now."""

    tasks: list[tuple[str, float, float]]
    """The prompt of each task, when it began, and when it ends, by the monotonic clock, in their order."""
    submits: int
    now: float

    @property
    def accepted(self) -> Counter[str]:
        """The number of tasks of each prompt."""
        return Counter(prompt for prompt, _, _ in self.tasks)

    def begun_by(self, worker: str) -> int:
        return sum(prompt.startswith(f"{worker} ") for prompt, _, _ in self.tasks)

    def in_flight_of(self, worker: str) -> int:
        return sum(prompt.startswith(f"{worker} ") and ends > self.now for prompt, _, ends in self.tasks)

    def most_in_flight(self) -> int:
        moments = [begins for _, begins, _ in self.tasks]
        return max(sum(begins <= moment < ends for _, begins, ends in self.tasks) for moment in moments)


def _serve(pipe: Connection, options: dict[str, Any]) -> None:
    with Emulator(**options) as gateway:
        pipe.send((gateway.url, gateway.api_key))
        while pipe.recv() == "report":
            tasks = [(task.prompt, task.begins, task.ends) for task in list(gateway.tasks.values())]
            pipe.send(Report(tasks, gateway.calls["submit"], time.monotonic()))


class Account:
    """An emulated account in another process."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe
        self.url, self.key = pipe.recv()

    def report(self) -> Report:
        self._pipe.send("report")
        report: Report = self._pipe.recv()
        return report

    def wait_until(self, condition: Callable[[Report], bool]) -> Report:
        deadline = time.monotonic() + _PATIENCE
        while not condition(report := self.report()):
            assert time.monotonic() < deadline, "what was expected has not happened"
            time.sleep(0.02)
        return report


@contextmanager
def running_account(**options: Any) -> Iterator[Account]:
    pipe, theirs = _SPAWN.Pipe()
    process = _SPAWN.Process(target=_serve, args=(theirs, options), daemon=True)
    process.start()
    try:
        yield Account(pipe)
        pipe.send("stop")
        process.join(_PATIENCE)
    finally:
        process.kill()
        process.join()


# ------------------------------------------------------------------ the workers


class Worker:
    """A process with one session, which gets all its visitors at once, after `begin()`.

    Args:
        account: Where it submits.
        folder: Where the workers share a limit and a journal.
        name: What its prompts begin with.
        visitors: How many requests it gets.
    """

    def __init__(self, account: Account, folder: Path, name: str, visitors: int) -> None:
        paths = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
        self.name = name
        self._process = subprocess.Popen(
            [
                *(sys.executable, "-c", "import support.workers; support.workers._main()"),
                *(account.url, account.key, str(folder), name, str(visitors)),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def begin(self) -> None:
        """Let the visitors in once the session is open."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "ready\n"
        self._process.stdin.write("begin\n")
        self._process.stdin.flush()

    def kill(self) -> None:
        self._process.kill()
        self._process.communicate()

    def terminate(self) -> None:
        """Let it drain: what is submitted is delivered, the rest isn't submitted any more."""
        self._process.send_signal(signal.SIGTERM)

    def ends(self) -> dict[str, str]:
        """Wait for its end; return how each request ended, by its prompt."""
        out, _ = self._process.communicate(timeout=_PATIENCE)
        assert self._process.returncode == 0
        ends: dict[str, str] = json.loads(out)
        return ends

    def close(self) -> None:
        if self._process.poll() is None:
            self.kill()


def _main() -> None:
    url, key, folder, name, visitors = sys.argv[1:]
    asyncio.run(_work(url, key, Path(folder), name, int(visitors)))


async def _work(url: str, key: str, folder: Path, name: str, visitors: int) -> None:
    limit = SqliteInFlightLimit(folder / "limit.db", 24)
    journal = SqliteJournal(folder / "run.db", lease=_LEASE)
    async with FluxSession(
        key, base_url=url, max_in_flight=limit, journal=journal, schedule=FixedSchedule(0.2)
    ) as session:
        stop = asyncio.Event()
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
        prompts = [f"{name} {number}" for number in range(visitors)]
        print("ready", flush=True)
        await asyncio.to_thread(sys.stdin.readline)
        visits = asyncio.gather(*map(session.generate, prompts), return_exceptions=True)
        visits.add_done_callback(lambda _: stop.set())
        await stop.wait()
        await session.aclose(drain=_DRAIN)
        ends = {prompt: type(result).__name__ for prompt, result in zip(prompts, await visits, strict=True)}
    print(json.dumps(ends))
