"""Celery tasks that generate pictures: each process of a worker has one session, in a thread of its own.

    pip install flux2max_async 'celery[redis]'
    export FLUX2MAX_API_KEY=... BROKER=redis://localhost/0
    python celery_worker.py "a heron in the fog" "a fox in the snow"      # adds two jobs
    celery -A celery_worker worker --concurrency 24                       # one process for each picture at a time

docs/queues.md explains what happens when a worker dies.
"""

import asyncio
import json
import os
import sys
import threading
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

from celery import Celery
from celery.signals import worker_process_init, worker_process_shutdown

from flux2max_async import (
    FluxSession,
    GenerationRequest,
    PostgresJournal,
    RateLimitedError,
    ServerError,
    SqliteJournal,
    TransportError,
)

JOURNAL = os.environ.get("JOURNAL", "jobs.db")  # a file of this machine; for several hosts, postgresql://...
PICTURES = Path("pictures")
T = TypeVar("T")

app = Celery("pictures", broker=os.environ.get("BROKER", "redis://localhost/0"))
app.conf.update(
    task_acks_late=True,  # acknowledge a job when its picture is saved,
    task_reject_on_worker_lost=True,  # deliver it again if its process is killed,
    broker_transport_options=json.loads(os.environ.get("BROKER_OPTIONS", '{"visibility_timeout": 300}')),  # or its host
    worker_prefetch_multiplier=1,  # and leave jobs for which there is no process yet to other workers
    worker_proc_alive_timeout=60,
    worker_lost_wait=1,
)


class SessionThread:
    """A session in an event loop of its own: sessions don't survive a fork, and tasks are no coroutines."""

    def open(self) -> None:
        """Start the thread, and open the session."""
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()
        self.session = self.run(self._open_session())

    async def _open_session(self) -> FluxSession:
        journal = PostgresJournal(JOURNAL) if "://" in JOURNAL else SqliteJournal(JOURNAL)
        return await FluxSession(journal=journal).start()

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Return the result of a coroutine that runs in the thread."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result()

    def close(self) -> None:
        """Close the session."""
        self.run(self.session.aclose())


flux = SessionThread()


@worker_process_init.connect
def open_session(**_: Any) -> None:
    """Open the session in each process, after the fork."""
    flux.open()


@worker_process_shutdown.connect
def close_session(**_: Any) -> None:
    """Close the session before the process ends."""
    flux.close()


@app.task(name="picture", bind=True, autoretry_for=(TransportError, ServerError, RateLimitedError), retry_backoff=True)
def generate(self: Any, prompt: str) -> None:
    """Generate a picture, and save it under the job's id."""
    # The key makes a job that is delivered again attach to its task, or replay its outcome.
    request = GenerationRequest(prompt, key=self.request.id)
    done = flux.run(flux.session.generate(request))
    flux.run(flux.session.save(done.images[0], PICTURES / f"{self.request.id}.jpeg"))


if __name__ == "__main__":
    for text in sys.argv[1:]:
        print(generate.delay(text).id)  # noqa: T201 - the name of its picture
