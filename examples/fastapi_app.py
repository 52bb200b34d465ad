"""A FastAPI application that draws: a visitor types a prompt, watches it being drawn, and sees the picture.

    python -m flux2max_async.emulator       # for a try; it prints FLUX2MAX_BASE_URL and FLUX2MAX_API_KEY: export them
    export PUBLIC_URL=http://127.0.0.1:8000 WEBHOOK_SECRET=$(openssl rand -hex 32)
    uvicorn --app-dir examples --timeout-graceful-shutdown 20 fastapi_app:app

PUBLIC_URL is where the service reaches this server. Tasks are kept in memory: with several workers, or to know them
after a restart, give each session a `SqliteJournal` of the same file, and each request a key of its own; where an id is
missing below, ask `journal.find_task(id)`, then `session.attach(id)`.
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
KEPT = 1_000

inbox = WebhookInbox(secret=os.environ["WEBHOOK_SECRET"], public_url=f"{os.environ['PUBLIC_URL']}/hooks/flux")
tasks: dict[str, GenerationTask] = {}


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Open the one session of all visitors; what runs at the shutdown gets 20 seconds to end."""
    # Webhooks tell of the ends. Polls are for the progress: often while somebody watches, rarely while nobody does.
    async with FluxSession(webhooks=inbox, schedule=FixedSchedule(0.5), drain=20) as app.state.flux:
        yield


app = FastAPI(lifespan=lifespan)
# Above the inbox's path, not at it: from there, deliveries would be redirected to "/hooks/flux/".
app.mount("/hooks", inbox.asgi)


def session(request: Request) -> FluxSession:
    """Give the one session."""
    flux: FluxSession = request.app.state.flux
    return flux


Session = Annotated[FluxSession, Depends(session)]


@app.exception_handler(FluxError)
async def refuse(_: Request, error: FluxError) -> JSONResponse:
    """Answer where there is no task, or its picture can't be fetched."""
    status = 422 if isinstance(error, InvalidRequestError | ContentModeratedError) else 503
    return JSONResponse({"detail": reason(error)}, status)


@app.get("/")
async def page() -> FileResponse:
    """Show the page."""
    return FileResponse(PAGE)


class Wish(BaseModel):
    """What a visitor may ask for."""

    prompt: str
    width: int | None = None
    height: int | None = None


@app.post("/tasks", status_code=201)
async def create(wish: Wish, flux: Session) -> dict[str, str]:
    """Submit, and answer as soon as there is an id."""
    task = await flux.submit(wish.prompt, width=wish.width, height=wish.height)
    tasks[task.id] = task
    if len(tasks) > KEPT:
        del tasks[next(iter(tasks))]  # the oldest
    return {"id": task.id}


def known(task_id: str) -> GenerationTask:
    """Find a task of ours. Others aren't asked for: strangers could have any task polled."""
    if task_id not in tasks:
        raise HTTPException(404, "There is no such picture.")
    return tasks[task_id]


Known = Annotated[GenerationTask, Depends(known)]


@app.get("/tasks/{task_id}/events")
async def events(task: Known) -> StreamingResponse:
    """Tell a visitor how a task goes; one who comes back begins with the newest, and one who leaves ends only this."""
    return StreamingResponse(tell(task), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})


async def tell(task: GenerationTask) -> AsyncIterator[str]:
    """Tell of each progress, then of the end."""
    async for snapshot in task.updates():
        yield event("progress", status=snapshot.status, progress=snapshot.progress)
    outcome = await task.outcome()
    if outcome.ok:
        yield event("done", picture=f"tasks/{task.id}/picture")
    else:
        yield event("failed", reason=reason(outcome.error))


@app.get("/tasks/{task_id}/picture")
async def picture(task: Known, flux: Session) -> FileResponse:
    """Serve the picture from here: the service's url lives for minutes."""
    path = PICTURES / f"{task.id}.jpeg"
    if not path.exists():  # two who ask at once both save it, which does no harm
        await flux.save((await task).images[0], path)
    return FileResponse(path)


@app.get("/ready")
async def ready(flux: Session) -> dict[str, int]:
    """Say that the session is open, and what it has done."""
    stats = flux.stats
    return {name: getattr(stats, name) for name in ("in_flight", "completed", "failed", "webhooks", "polls")}


def event(name: str, **data: Any) -> str:
    """Write a server-sent event: JSON has no line breaks, which would end it early."""
    return f"event: {name}\ndata: {json.dumps(data)}\n\n"


def reason(error: FluxError) -> str:
    """Say why there is no picture, as far as it concerns a visitor."""
    match error:
        case InvalidRequestError():
            return str(error)
        case ContentModeratedError():
            return "Moderation refused this prompt. Try another one."
        case _:
            return "This can't be drawn just now. Try again later."
