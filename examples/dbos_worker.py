"""A DBOS workflow with a step that generates a picture.

    pip install 'flux2max_async[postgres]' dbos
    export FLUX2MAX_API_KEY=... DBOS_SYSTEM_DATABASE_URL=postgresql://user@host/database
    dbos migrate --sys-db-url $DBOS_SYSTEM_DATABASE_URL
    DBOS__VMID=host-1 python dbos_worker.py                             # a worker; each needs an id of its own
    python dbos_worker.py "a heron in the fog" "a fox in the snow"      # adds two jobs
    python dbos_worker.py --resume host-1                               # lets others go on with the jobs of host-1

docs/queues.md explains what happens when a worker dies, and what DBOS doesn't do by itself then.
"""

import asyncio
import os
import signal
import sys
from pathlib import Path

from dbos import DBOS, DBOSClient, WorkflowHandle

from flux2max_async import FluxSession, GenerationRequest, PostgresInFlightLimit, PostgresJournal

DATABASE = os.environ["DBOS_SYSTEM_DATABASE_URL"]
QUEUE = "pictures"
PICTURES = Path("pictures")


class Worker:
    """What the steps of this process share."""

    session: FluxSession


# Errors are tried again, which never pays twice.
@DBOS.step(retries_allowed=True, max_attempts=5)
async def generate(prompt: str, name: str) -> str:
    """Generate a picture, save it under a name, and return its path."""
    # The key makes a step that runs again attach to its task, or replay its outcome.
    done = await Worker.session.generate(GenerationRequest(prompt, key=name))
    return str(await Worker.session.save(done.images[0], PICTURES / f"{name}.jpeg"))


@DBOS.workflow(name="picture")
async def picture(prompt: str) -> str:
    """Generate one picture, and return its path."""
    assert DBOS.workflow_id is not None
    return await generate(prompt, DBOS.workflow_id)


async def run_worker() -> None:
    """Run workflows until SIGTERM or SIGINT, and then those that have begun."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    # With a version of its own, workflows survive a change of their code; by default it is a hash of the code.
    DBOS(config={"name": "pictures", "system_database_url": DATABASE, "application_version": "1"})
    limit, journal = PostgresInFlightLimit(DATABASE, 24), PostgresJournal(DATABASE)
    async with FluxSession(max_in_flight=limit, journal=journal) as Worker.session:
        DBOS.launch()  # in the event loop of the session, which then runs the workflows, too
        await DBOS.register_queue_async(QUEUE, worker_concurrency=24)
        await stop.wait()
        await asyncio.to_thread(DBOS.destroy, workflow_completion_timeout_sec=30)


def add_jobs(client: DBOSClient, prompts: list[str]) -> None:
    """Add a job for each prompt, and print its id."""
    for prompt in prompts:
        handle: WorkflowHandle[str] = client.enqueue({"queue_name": QUEUE, "workflow_name": "picture"}, prompt)
        print(handle.workflow_id)  # noqa: T201 - the name of its picture


def resume_jobs(client: DBOSClient, worker: str) -> None:
    """Pass the jobs of a dead worker on to others."""
    for workflow in client.list_workflows(executor_id=worker, status="PENDING"):
        client.resume_workflow(workflow.workflow_id)


if __name__ == "__main__":
    match sys.argv[1:]:
        case []:
            asyncio.run(run_worker())
        case ["--resume", name]:
            resume_jobs(DBOSClient(system_database_url=DATABASE), name)
        case texts:
            add_jobs(DBOSClient(system_database_url=DATABASE), texts)
