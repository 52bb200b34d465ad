"""An aiohttp application that generates pictures: a visitor enters a prompt, follows its progress and sees the picture.

    python -m flux2max_async.emulator       # to try it; export the two variables that it prints
    export PUBLIC_URL=http://127.0.0.1:8000 WEBHOOK_SECRET=$(openssl rand -hex 32)
    python examples/aiohttp_app.py

PUBLIC_URL is where the service reaches this server. Tasks are kept in memory. To serve them from several workers, or
after a restart, pass a `SqliteJournal` with the same file to each session and a key to each request; if a task id is
unknown below, look it up with `journal.find_task(id)` and call `session.attach(id)`.
"""

import json
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from aiohttp import web
from aiohttp.typedefs import Handler

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
flux = web.AppKey("flux", FluxSession)
tasks: dict[str, GenerationTask] = {}
routes = web.RouteTableDef()


async def open_session(app: web.Application) -> AsyncIterator[None]:
    """Open one session for all visitors; at shutdown, running tasks have 20 seconds to end."""
    # Webhooks report the ends. Polls report the progress: often while a visitor follows a task, otherwise rarely.
    async with FluxSession(webhooks=inbox, schedule=FixedSchedule(0.5), drain=20) as app[flux]:
        yield


@web.middleware
async def handle_flux_error(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Respond with 422 if the request is at fault, otherwise with 503."""
    try:
        return await handler(request)
    except FluxError as error:
        status = 422 if isinstance(error, InvalidRequestError | ContentModeratedError) else 503
        return web.json_response({"detail": reason(error)}, status=status)


@routes.get("/")
async def get_page(_: web.Request) -> web.FileResponse:
    """Return the page."""
    return web.FileResponse(PAGE)


@routes.post("/tasks")
async def create_task(request: web.Request) -> web.Response:
    """Submit a request and return the task id at once."""
    try:
        body = await request.json()
    except ValueError:
        body = None
    if not isinstance(body, dict):
        raise web.HTTPBadRequest(text="Send a JSON object.")
    task = await request.app[flux].submit(body.get("prompt", ""), width=body.get("width"), height=body.get("height"))
    tasks[task.id] = task
    if len(tasks) > MAX_TASKS:
        del tasks[next(iter(tasks))]  # the oldest
    return web.json_response({"id": task.id}, status=201)


def find_task(request: web.Request) -> GenerationTask:
    """Return a task of this server; don't attach other ids, or anybody could have any task polled."""
    if (task := tasks.get(request.match_info["id"])) is None:
        raise web.HTTPNotFound(text="There is no such picture.")
    return task


@routes.get("/tasks/{id}/events")
async def stream_events(request: web.Request) -> web.StreamResponse:
    """Stream the progress and end of a task; a visitor who reconnects begins with the newest progress."""
    task = find_task(request)
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"})
    await response.prepare(request)
    async for snapshot in task.updates():
        await response.write(event("progress", status=snapshot.status, progress=snapshot.progress))
    outcome = await task.outcome()
    if outcome.ok:
        await response.write(event("done", picture=f"tasks/{task.id}/picture"))
    else:
        await response.write(event("failed", reason=reason(outcome.error)))
    return response


@routes.get("/tasks/{id}/picture")
async def get_picture(request: web.Request) -> web.FileResponse:
    """Return the picture from this server: the service's URL expires after minutes."""
    task = find_task(request)
    path = PICTURES / f"{task.id}.jpeg"
    if not path.exists():  # concurrent requests may both save it, which is harmless
        await request.app[flux].save((await task).images[0], path)
    return web.FileResponse(path)


@routes.get("/ready")
async def get_status(request: web.Request) -> web.Response:
    """Return statistics; responds only while the session is open."""
    stats = request.app[flux].stats
    names = ("in_flight", "completed", "failed", "webhooks", "polls")
    return web.json_response({name: getattr(stats, name) for name in names})


def event(name: str, **data: Any) -> bytes:
    """Format a server-sent event; JSON contains no line breaks, which would end the event early."""
    return f"event: {name}\ndata: {json.dumps(data)}\n\n".encode()


def reason(error: FluxError) -> str:
    """Return the reason of a failure, as shown to visitors."""
    match error:
        case InvalidRequestError():
            return str(error)
        case ContentModeratedError():
            return "Moderation refused this prompt. Try another one."
        case _:
            return "The picture can't be generated now. Try again later."


app = web.Application(middlewares=[handle_flux_error])
app.cleanup_ctx.append(open_session)
app.router.add_post("/hooks/flux", inbox.aiohttp_handler)
app.add_routes(routes)

if __name__ == "__main__":
    # handler_cancellation ends the event stream of a visitor who disconnects; shutdown_timeout lets the others finish.
    port = int(os.environ.get("PORT", "8000"))
    web.run_app(app, host="127.0.0.1", port=port, handler_cancellation=True, shutdown_timeout=20)
