"""PgQueuer with real workers, which are killed while their jobs run."""

from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from support.pictures import end_tasks
from support.postgres import PostgresServer
from support.queues import PROMPTS, Queue, create_database, kill

from flux2max_async import PostgresJournal
from flux2max_async.emulator import Emulator

pytest.importorskip("pgqueuer")

WORKER = ("-m", "pgqueuer_worker")


@pytest.fixture
def queue(postgres: PostgresServer, schema: str, tmp_path: Path) -> Iterator[Queue]:
    """Provide an installed queue, and a service whose tasks end when the test says so."""
    address = create_database(postgres, schema)
    with Emulator(seconds=3600.0, spread=0.0, seed=1) as gateway:
        queue = Queue(gateway, tmp_path, {"PGDSN": address, "HEARTBEAT_TIMEOUT": "2"})
        queue.run("-m", "pgqueuer", "install")
        yield queue


def test_killed_worker(queue: Queue) -> None:
    """The jobs of a killed worker are delivered to another one, which attaches to their tasks."""
    queue.run(*WORKER, *PROMPTS)
    with queue.worker("first", *WORKER) as first:
        queue.wait_until_submitted(PostgresJournal(queue.environment["PGDSN"]))
        with queue.worker("second", *WORKER):
            kill(first)
            queue.wait_until_polled()
            end_tasks(queue.gateway)
            queue.wait_for_pictures([str(number + 1) for number in range(len(PROMPTS))])
            queue.wait_until(lambda: count_jobs(queue.environment["PGDSN"]) == 0)


def count_jobs(address: str) -> int:
    """Return how many jobs have not ended successfully."""
    with psycopg.connect(address) as connection:
        row = connection.execute("SELECT count(*) FROM pgqueuer").fetchone()
        assert row is not None
        return int(row[0])
