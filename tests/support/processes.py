"""Batches and an emulated gateway in processes of their own, to be killed."""

import asyncio
import contextlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Self

from flux2max_async import Completed, FixedSchedule, FluxSession, GenerationRequest, Outcome, SqliteJournal
from flux2max_async.emulator import Emulator


def requests(count: int) -> list[GenerationRequest]:
    """Half of them have keys of their own; every tenth fails."""
    return [
        GenerationRequest(
            f"picture {number}{' [fail]' if number % 10 == 9 else ''}",
            width=128,
            height=128,
            key=f"no. {number}" if number % 2 else None,
        )
        for number in range(count)
    ]


async def stream(url: str, key: str, folder: Path, count: int, places: int) -> list[Outcome]:
    """Run the batch, or go on with it."""
    async with FluxSession(
        key,
        base_url=url,
        max_in_flight=places,
        schedule=FixedSchedule(0.05),
        journal=SqliteJournal(folder / "run.db"),
    ) as session:
        return [outcome async for outcome in session.stream(requests(count), save_to=folder / "pictures")]


def run(url: str, key: str, folder: Path, count: int, places: int, report: Path) -> None:
    """Run the batch to its end, if nobody kills it, and report its outcomes."""
    outcomes = asyncio.run(stream(url, key, folder, count, places))
    told = [told_of(outcome) for outcome in outcomes]
    report.write_text(json.dumps(told), encoding="utf-8")


def told_of(outcome: Outcome) -> dict[str, Any]:
    assert outcome.request is not None
    return {
        "prompt": outcome.request.prompt,
        "task_id": outcome.task_id,
        "end": "completed" if isinstance(outcome, Completed) else type(outcome.error).__name__,
        "saved": [str(path) for path in outcome.saved] if isinstance(outcome, Completed) else [],
        "trouble": repr(isinstance(outcome, Completed) and outcome.save_error),
        "replayed": outcome.replayed,
    }


# ------------------------------------------------------------------ processes


def _nurse() -> None:
    """Fork a process for each line of arguments: what is imported already begins its work within milliseconds."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them
    for line in sys.stdin:
        url, key, folder, count, places, report = json.loads(line)
        if (process := os.fork()) == 0:
            with contextlib.suppress(BaseException):
                run(url, key, Path(folder), count, places, Path(report))
            os._exit(0)
        print(process, flush=True)


class ProcessGroup:
    """Starts batches in processes of their own."""

    def __enter__(self) -> Self:
        paths = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
        command = [sys.executable, "-c", "import support.processes; support.processes._nurse()"]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        return self

    def __exit__(self, *_: object) -> None:
        with self._process:
            assert self._process.stdin is not None
            self._process.stdin.close()

    def start(self, *arguments: Any) -> int:
        """Start `run()` with these, and give its process."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([str(value) if isinstance(value, Path) else value for value in arguments]))
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())


def is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def kill(process: int) -> bool:
    """Kill a process with SIGKILL, wait until it is gone, and tell whether it was still there."""
    try:
        os.kill(process, signal.SIGKILL)
    except ProcessLookupError:
        return False
    wait_for(process, 10)
    return True


def wait_for(process: int, seconds: float) -> None:
    until = time.monotonic() + seconds
    while is_alive(process):
        assert time.monotonic() < until, f"process {process} has not ended within {seconds:g} s"
        time.sleep(0.002)


# ------------------------------------------------------------------ the gateway


_SPAWNED = multiprocessing.get_context("spawn")


def _serve(pipe: Connection, options: dict[str, Any]) -> None:
    with Emulator(**options) as gateway:
        pipe.send((gateway.url, gateway.api_key))
        while pipe.recv():
            pipe.send((dict(gateway.accepted), dict(gateway.calls)))


class Gateway:
    """An emulated gateway in another process."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe
        self.url, self.api_key = pipe.recv()

    def counts(self) -> tuple[Counter[str], Counter[str]]:
        """The tasks accepted for each prompt, and the calls by endpoint."""
        self._pipe.send(True)
        accepted, calls = self._pipe.recv()
        return Counter(accepted), Counter(calls)


@contextmanager
def running_gateway(**options: Any) -> Iterator[Gateway]:
    """Run an emulated gateway in another process."""
    ours, theirs = _SPAWNED.Pipe()
    process = _SPAWNED.Process(target=_serve, args=(theirs, options), daemon=True)
    process.start()
    try:
        yield Gateway(ours)
        ours.send(False)
        process.join(10)
    finally:
        process.kill()
        process.join()
