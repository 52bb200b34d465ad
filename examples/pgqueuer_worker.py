"""A PgQueuer worker: each job is a prompt, and ends with its picture in a folder.

    pip install 'flux2max_async[postgres]' 'pgqueuer[psycopg]'
    export FLUX2MAX_API_KEY=... PGDSN=postgresql://user@host/database
    pgq install
    python pgqueuer_worker.py "a heron in the fog" "a fox in the snow"      # adds two jobs
    python pgqueuer_worker.py                                               # a worker; start several

docs/queues.md explains what happens when a worker dies.
"""

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path

import pgqueuer
from pgqueuer import DatabaseRetryEntrypointExecutor, Job, PgQueuer, Queries
from psycopg import AsyncConnection

from flux2max_async import FluxSession, GenerationRequest, PostgresInFlightLimit, PostgresJournal

DATABASE = os.environ["PGDSN"]
PICTURES = Path("pictures")
HEARTBEAT_TIMEOUT = timedelta(seconds=float(os.environ.get("HEARTBEAT_TIMEOUT", "30")))


@asynccontextmanager
async def worker() -> AsyncIterator[PgQueuer]:
    """Open what a worker needs."""
    async with (
        await AsyncConnection.connect(DATABASE, autocommit=True) as connection,
        FluxSession(max_in_flight=PostgresInFlightLimit(DATABASE, 24), journal=PostgresJournal(DATABASE)) as session,
    ):
        queuer = PgQueuer.from_psycopg_connection(connection)

        # Errors are tried again, which never pays twice, and in the end the job is kept as failed.
        @queuer.entrypoint("picture", executor_factory=DatabaseRetryEntrypointExecutor, on_failure="hold")
        async def generate(job: Job) -> None:
            # The key makes a job that is delivered again attach to its task, or replay its outcome.
            request = GenerationRequest((job.payload or b"").decode(), key=f"picture {job.id}")
            done = await session.generate(request)
            await session.save(done.images[0], PICTURES / f"{job.id}.jpeg")

        yield queuer


async def add_jobs(prompts: list[str]) -> None:
    """Add a job for each prompt."""
    async with await AsyncConnection.connect(DATABASE, autocommit=True) as connection:
        payloads: list[bytes | None] = [prompt.encode() for prompt in prompts]
        queries = Queries.from_psycopg_connection(connection)
        await queries.enqueue(["picture"] * len(payloads), payloads, [0] * len(payloads))


async def run_worker() -> None:
    """Run jobs until SIGTERM or SIGINT, and then those that have begun."""
    await pgqueuer.run(
        worker,
        heartbeat_timeout=HEARTBEAT_TIMEOUT,
        dequeue_timeout=HEARTBEAT_TIMEOUT / 2,  # a worker without new jobs looks for those of dead workers so often
        max_concurrent_tasks=24,
    )


if __name__ == "__main__":
    asyncio.run(add_jobs(sys.argv[1:]) if sys.argv[1:] else run_worker())
