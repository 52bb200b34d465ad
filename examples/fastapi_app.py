"""A FastAPI application that generates pictures: a visitor enters a prompt, follows its progress and sees the picture.

    python -m flux2max_async.emulator       # to try it; export the two variables that it prints
    export PUBLIC_URL=http://127.0.0.1:8000 WEBHOOK_SECRET=$(openssl rand -hex 32)
    uvicorn --app-dir examples --timeout-graceful-shutdown 20 fastapi_app:app

PUBLIC_URL is where the service reaches this server. Tasks are kept in memory. To serve them from several workers, or
after a restart, pass a `SqliteJournal` with the same file to each session and a key to each request; if a task id is
unknown below, look it up with `journal.find_task(id)` and call `session.attach(id)`.
"""

import json
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any

from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.responses import FileResponse, JSONResponse, StreamingResponse
from pydantic import BaseModel

from flux2max_async import (
    ContentModeratedError,
    FixedSchedule,
    FluxError,
    FluxSession,
    GenerationTask,
    InvalidRequestError,
    WebhookInbox,
)

PAGE = Path(__file__).with_name("page.html")
PICTURES = Path("pictures")
MAX_TASKS = 1_000

inbox = WebhookInbox(secret=os.environ["WEBHOOK_SECRET"], public_url=f"{os.environ['PUBLIC_URL']}/hooks/flux")
tasks: dict[str, GenerationTask] = {}


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Open one session for all visitors; at shutdown, running tasks have 20 seconds to end."""
    # Webhooks report the ends. Polls report the progress: often while a visitor follows a task, otherwise rarely.
    async with FluxSession(webhooks=inbox, schedule=FixedSchedule(0.5), drain=20) as app.state.flux:
        yield


app = FastAPI(lifespan=lifespan)
# Mounted above the inbox's path: with a mount at that path, deliveries would be redirected to "/hooks/flux/".
app.mount("/hooks", inbox.asgi)


def get_session(request: Request) -> FluxSession:
    """Return the session of all visitors."""
    flux: FluxSession = request.app.state.flux
    return flux


Session = Annotated[FluxSession, Depends(get_session)]


@app.exception_handler(FluxError)
async def handle_flux_error(_: Request, error: FluxError) -> JSONResponse:
    """Respond with 422 if the request is at fault, otherwise with 503."""
    status = 422 if isinstance(error, InvalidRequestError | ContentModeratedError) else 503
    return JSONResponse({"detail": reason(error)}, status)


@app.get("/")
async def get_page() -> FileResponse:
    """Return the page."""
    return FileResponse(PAGE)


class PictureRequest(BaseModel):
    """The parameters that a visitor may set."""

    prompt: str
    width: int | None = None
    height: int | None = None


@app.post("/tasks", status_code=201)
async def create_task(body: PictureRequest, flux: Session) -> dict[str, str]:
    """Submit a request and return the task id at once."""
    task = await flux.submit(body.prompt, width=body.width, height=body.height)
    tasks[task.id] = task
    if len(tasks) > MAX_TASKS:
        del tasks[next(iter(tasks))]  # the oldest
    return {"id": task.id}


def find_task(task_id: str) -> GenerationTask:
    """Return a task of this server; don't attach other ids, or anybody could have any task polled."""
    if task_id not in tasks:
        raise HTTPException(404, "There is no such picture.")
    return tasks[task_id]


Task = Annotated[GenerationTask, Depends(find_task)]


@app.get("/tasks/{task_id}/events")
async def stream_events(task: Task) -> StreamingResponse:
    """Stream the progress and end of a task; a visitor who reconnects begins with the newest progress."""
    return StreamingResponse(task_events(task), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})


async def task_events(task: GenerationTask) -> AsyncIterator[str]:
    """Yield an event for each progress, then for the end."""
    async for snapshot in task.updates():
        yield event("progress", status=snapshot.status, progress=snapshot.progress)
    outcome = await task.outcome()
    if outcome.ok:
        yield event("done", picture=f"tasks/{task.id}/picture")
    else:
        yield event("failed", reason=reason(outcome.error))


@app.get("/tasks/{task_id}/picture")
async def get_picture(task: Task, flux: Session) -> FileResponse:
    """Return the picture from this server: the service's URL expires after minutes."""
    path = PICTURES / f"{task.id}.jpeg"
    if not path.exists():  # concurrent requests may both save it, which is harmless
        await flux.save((await task).images[0], path)
    return FileResponse(path)


@app.get("/ready")
async def get_status(flux: Session) -> dict[str, int]:
    """Return statistics; responds only while the session is open."""
    stats = flux.stats
    return {name: getattr(stats, name) for name in ("in_flight", "completed", "failed", "webhooks", "polls")}


def event(name: str, **data: Any) -> str:
    """Format a server-sent event; JSON contains no line breaks, which would end the event early."""
    return f"event: {name}\ndata: {json.dumps(data)}\n\n"


def reason(error: FluxError) -> str:
    """Return the reason of a failure, as shown to visitors."""
    match error:
        case InvalidRequestError():
            return str(error)
        case ContentModeratedError():
            return "Moderation refused this prompt. Try another one."
        case _:
            return "The picture can't be generated now. Try again later."
