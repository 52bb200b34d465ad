"""An aiohttp application that draws: a visitor types a prompt, watches it being drawn, and sees the picture.

    python -m flux2max_async.emulator       # for a try; it prints FLUX2MAX_BASE_URL and FLUX2MAX_API_KEY: export them
    export PUBLIC_URL=http://127.0.0.1:8000 WEBHOOK_SECRET=$(openssl rand -hex 32)
    python examples/aiohttp_app.py

PUBLIC_URL is where the service reaches this server. Tasks are kept in memory: with several workers, or to know them
after a restart, give each session a `SqliteJournal` of the same file, and each request a key of its own; where an id is
missing below, ask `journal.find_task(id)`, then `session.attach(id)`.
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
KEPT = 1_000

inbox = WebhookInbox(secret=os.environ["WEBHOOK_SECRET"], public_url=f"{os.environ['PUBLIC_URL']}/hooks/flux")
flux = web.AppKey("flux", FluxSession)
tasks: dict[str, GenerationTask] = {}
routes = web.RouteTableDef()


async def opened(app: web.Application) -> AsyncIterator[None]:
    """Open the one session of all visitors; what runs at the shutdown gets 20 seconds to end."""
    # Webhooks tell of the ends. Polls are for the progress: often while somebody watches, rarely while nobody does.
    async with FluxSession(webhooks=inbox, schedule=FixedSchedule(0.5), drain=20) as app[flux]:
        yield


@web.middleware
async def refuse(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Answer where there is no task, or its picture can't be fetched."""
    try:
        return await handler(request)
    except FluxError as error:
        status = 422 if isinstance(error, InvalidRequestError | ContentModeratedError) else 503
        return web.json_response({"detail": reason(error)}, status=status)


@routes.get("/")
async def page(_: web.Request) -> web.FileResponse:
    """Show the page."""
    return web.FileResponse(PAGE)


@routes.post("/tasks")
async def create(request: web.Request) -> web.Response:
    """Submit, and answer as soon as there is an id."""
    try:
        wish = await request.json()
    except ValueError:
        wish = None
    if not isinstance(wish, dict):
        raise web.HTTPBadRequest(text="Send a JSON object.")
    task = await request.app[flux].submit(wish.get("prompt", ""), width=wish.get("width"), height=wish.get("height"))
    tasks[task.id] = task
    if len(tasks) > KEPT:
        del tasks[next(iter(tasks))]  # the oldest
    return web.json_response({"id": task.id}, status=201)


def known(request: web.Request) -> GenerationTask:
    """Find a task of ours. Others aren't asked for: strangers could have any task polled."""
    if (task := tasks.get(request.match_info["id"])) is None:
        raise web.HTTPNotFound(text="There is no such picture.")
    return task


@routes.get("/tasks/{id}/events")
async def events(request: web.Request) -> web.StreamResponse:
    """Tell a visitor how a task goes; one who comes back begins with the newest, and one who leaves ends only this."""
    task = known(request)
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
async def picture(request: web.Request) -> web.FileResponse:
    """Serve the picture from here: the service's url lives for minutes."""
    task = known(request)
    path = PICTURES / f"{task.id}.jpeg"
    if not path.exists():  # two who ask at once both save it, which does no harm
        await request.app[flux].save((await task).images[0], path)
    return web.FileResponse(path)


@routes.get("/ready")
async def ready(request: web.Request) -> web.Response:
    """Say that the session is open, and what it has done."""
    stats = request.app[flux].stats
    names = ("in_flight", "completed", "failed", "webhooks", "polls")
    return web.json_response({name: getattr(stats, name) for name in names})


def event(name: str, **data: Any) -> bytes:
    """Write a server-sent event: JSON has no line breaks, which would end it early."""
    return f"event: {name}\ndata: {json.dumps(data)}\n\n".encode()


def reason(error: FluxError) -> str:
    """Say why there is no picture, as far as it concerns a visitor."""
    match error:
        case InvalidRequestError():
            return str(error)
        case ContentModeratedError():
            return "Moderation refused this prompt. Try another one."
        case _:
            return "This can't be drawn just now. Try again later."


app = web.Application(middlewares=[refuse])
app.cleanup_ctx.append(opened)
app.router.add_post("/hooks/flux", inbox.aiohttp_handler)
app.add_routes(routes)

if __name__ == "__main__":
    # A visitor who leaves ends the handler that tells him of the progress; those who stay hear the end at a shutdown.
    port = int(os.environ.get("PORT", "8000"))
    web.run_app(app, host="127.0.0.1", port=port, handler_cancellation=True, shutdown_timeout=20)
