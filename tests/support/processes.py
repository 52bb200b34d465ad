"""Batches in processes that a test can kill, and an emulated gateway in another process."""

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
    """Return requests of which half have keys of their own, and every tenth fails."""
    return [
        GenerationRequest(
            f"image {number}{' [fail]' if number % 10 == 9 else ''}",
            width=128,
            height=128,
            key=f"no. {number}" if number % 2 else None,
        )
        for number in range(count)
    ]


async def stream(url: str, key: str, folder: Path, count: int, max_in_flight: int) -> list[Outcome]:
    """Run the batch, or resume it."""
    async with FluxSession(
        key,
        base_url=url,
        max_in_flight=max_in_flight,
        schedule=FixedSchedule(0.05),
        journal=SqliteJournal(folder / "run.db"),
    ) as session:
        return [outcome async for outcome in session.stream(requests(count), save_to=folder / "images")]


def run(url: str, key: str, folder: Path, count: int, max_in_flight: int, report: Path) -> None:
    """Run the batch to its end, and write its outcomes to the file `report`."""
    outcomes = asyncio.run(stream(url, key, folder, count, max_in_flight))
    report.write_text(json.dumps([outcome_to_json(outcome) for outcome in outcomes]), encoding="utf-8")


def outcome_to_json(outcome: Outcome) -> dict[str, Any]:
    assert outcome.request is not None
    return {
        "prompt": outcome.request.prompt,
        "task_id": outcome.task_id,
        "end": "completed" if isinstance(outcome, Completed) else type(outcome.error).__name__,
        "saved": [str(path) for path in outcome.saved] if isinstance(outcome, Completed) else [],
        "save_error": repr(outcome.save_error) if isinstance(outcome, Completed) and outcome.save_error else None,
        "replayed": outcome.replayed,
    }


# ------------------------------------------------------------------ processes


def _run_fork_server() -> None:
    """Fork a process for each line of arguments. It starts within milliseconds, as all modules are imported."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps the processes
    for line in sys.stdin:
        url, key, folder, count, max_in_flight, report = json.loads(line)
        if (pid := os.fork()) == 0:
            with contextlib.suppress(BaseException):
                run(url, key, Path(folder), count, max_in_flight, Path(report))
            os._exit(0)
        print(pid, flush=True)


class ProcessGroup:
    """Starts batches in processes, which it forks from one that has imported the library."""

    def __enter__(self) -> Self:
        paths = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
        command = [sys.executable, "-c", "import support.processes; support.processes._run_fork_server()"]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        return self

    def __exit__(self, *_: object) -> None:
        with self._process:
            assert self._process.stdin is not None
            self._process.stdin.close()

    def start(self, *arguments: Any) -> int:
        """Start `run()` with these arguments in a new process, and return its id."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([str(value) if isinstance(value, Path) else value for value in arguments]))
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def kill(pid: int) -> bool:
    """Kill a process with SIGKILL and wait until it has ended; return whether it was still running."""
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return False
    wait_for(pid, 10)
    return True


def wait_for(pid: int, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while is_alive(pid):
        assert time.monotonic() < deadline, f"process {pid} has not ended within {seconds:g} s"
        time.sleep(0.002)


# ------------------------------------------------------------------ the gateway


_SPAWN_CONTEXT = multiprocessing.get_context("spawn")


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
        """Return the number of tasks accepted for each prompt, and of calls of each endpoint."""
        self._pipe.send(True)
        accepted, calls = self._pipe.recv()
        return Counter(accepted), Counter(calls)


@contextmanager
def running_gateway(**options: Any) -> Iterator[Gateway]:
    """Run an emulated gateway in another process."""
    pipe, child_pipe = _SPAWN_CONTEXT.Pipe()
    process = _SPAWN_CONTEXT.Process(target=_serve, args=(child_pipe, options), daemon=True)
    process.start()
    try:
        yield Gateway(pipe)
        pipe.send(False)
        process.join(10)
    finally:
        process.kill()
        process.join()
