"""DBOS with real workers, which are killed while their workflows run."""

from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from support.pictures import end_tasks
from support.postgres import PostgresServer
from support.queues import PROMPTS, Queue, create_database, kill

from flux2max_async import PostgresJournal
from flux2max_async.emulator import Emulator

pytest.importorskip("dbos")

WORKER = ("-m", "dbos_worker")


@pytest.fixture
def queue(postgres: PostgresServer, schema: str, tmp_path: Path) -> Iterator[Queue]:
    """Provide an empty database, and a service whose tasks end when the test says so."""
    address = create_database(postgres, schema)
    with Emulator(seconds=3600.0, spread=0.0, seed=1) as gateway:
        queue = Queue(gateway, tmp_path, {"DBOS_SYSTEM_DATABASE_URL": address})
        queue.run("-m", "dbos.cli.cli", "migrate", "--sys-db-url", address)
        yield queue


@pytest.mark.parametrize("successor", ["host-1", "host-2"])
def test_killed_worker(successor: str, queue: Queue) -> None:
    """The workflows of a killed worker go on in one with its id, or when they are resumed, in any other one."""
    ids = queue.run(*WORKER, *PROMPTS).split()
    with queue.worker("first", *WORKER, DBOS__VMID="host-1") as first:
        queue.wait_until_submitted(PostgresJournal(queue.environment["DBOS_SYSTEM_DATABASE_URL"]))
        kill(first)
    with queue.worker("second", *WORKER, DBOS__VMID=successor):
        if successor != "host-1":
            queue.run(*WORKER, "--resume", "host-1")
        queue.wait_until_polled()
        end_tasks(queue.gateway)
        queue.wait_for_pictures(ids)
        queue.wait_until(lambda: count_jobs(queue.environment["DBOS_SYSTEM_DATABASE_URL"]) == {"SUCCESS": len(ids)})


def count_jobs(address: str) -> dict[str, int]:
    """Return the number of workflows in each state."""
    with psycopg.connect(address) as connection:
        rows = connection.execute("SELECT status, count(*) FROM dbos.workflow_status GROUP BY status").fetchall()
        return {str(status): int(count) for status, count in rows}
