"""Workers of job queues in processes that a test can kill, and what must hold when their jobs are delivered again."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import attrs
import psycopg
from psycopg import sql

from flux2max_async import JournalError
from flux2max_async.emulator import Emulator
from flux2max_async.journal import EntryState, Journal
from support.apps import EXAMPLES
from support.pictures import read_pictures
from support.postgres import PostgresServer

PROMPTS = [f"picture {number} of a herbarium" for number in range(12)]
PATIENCE = 180.0
"""Seconds for what takes a few."""


@attrs.frozen
class Queue:
    """The folder in which the workers of a queue run, and their environment."""

    gateway: Emulator
    folder: Path
    environment: Mapping[str, str]

    def run(self, *command: str, ends: Sequence[int] = (0,)) -> str:
        """Run a command until it ends with one of these exit codes, and return its output."""
        done = subprocess.run(
            [sys.executable, *command], env=self._environment(), cwd=self.folder, capture_output=True, text=True,
            check=False, timeout=PATIENCE,
        )  # fmt: skip
        assert done.returncode in ends, f"{done.returncode}: {done.stdout}{done.stderr}"
        return done.stdout

    @contextmanager
    def worker(self, name: str, *command: str, **variables: str) -> "Iterator[subprocess.Popen[bytes]]":
        """Run a worker, in a process group of its own, until the block ends."""
        with (
            (self.folder / f"{name}.log").open("wb") as output,
            subprocess.Popen(
                [sys.executable, *command], env={**self._environment(), **variables}, cwd=self.folder, stdout=output,
                stderr=subprocess.STDOUT, start_new_session=True,
            ) as process,
        ):  # fmt: skip
            try:
                yield process
            finally:
                kill(process)

    def wait_until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < deadline, f"what was expected has not happened\n{self.logs()}"
            time.sleep(0.05)

    def logs(self) -> str:
        return "\n".join(f"--- {path.name}\n{path.read_text()}" for path in sorted(self.folder.glob("*.log")))

    def wait_until_submitted(self, journal: Journal, count: int = len(PROMPTS)) -> None:
        """Wait until the journal knows the ids of so many tasks, none of which has ended."""
        self.wait_until(lambda: count_submitted(journal) == count)

    def wait_until_polled(self) -> None:
        """Wait until each task has been polled after now."""
        before = {task.id: task.polls for task in tuple(self.gateway.tasks.values())}
        self.wait_until(lambda: all(self.gateway.tasks[task_id].polls > polls for task_id, polls in before.items()))

    def wait_for_pictures(self, names: Sequence[str]) -> None:
        """Wait until there is a picture for each prompt, under its name, and check that each was paid for once."""
        paths = [self.folder / "pictures" / f"{name}.jpeg" for name in names]
        self.wait_until(lambda: all(path.exists() for path in paths))
        served = asyncio.run(read_pictures(self.gateway))
        assert [path.read_bytes() for path in paths] == [served[prompt] for prompt in PROMPTS]
        assert self.gateway.accepted == dict.fromkeys(PROMPTS, 1)

    def _environment(self) -> dict[str, str]:
        paths = [str(EXAMPLES), os.environ.get("PYTHONPATH", "")]
        return {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "FLUX2MAX_API_KEY": self.gateway.api_key,
            "FLUX2MAX_BASE_URL": self.gateway.url,
            **self.environment,
        }


def create_database(server: PostgresServer, name: str) -> str:
    """Create an empty database, and return its address."""
    with psycopg.connect(server.conninfo(), autocommit=True) as connection:
        connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
    return f"{server.conninfo().rpartition('/')[0]}/{name}"


def kill(process: "subprocess.Popen[bytes]") -> None:
    """Kill a worker and all its processes with SIGKILL."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def count_submitted(journal: Journal) -> int:
    async def count() -> int:
        try:
            return sum([entry.state is EntryState.SUBMITTED async for entry in journal.entries()])
        except JournalError:  # no worker has created it yet
            return 0

    return asyncio.run(count())
