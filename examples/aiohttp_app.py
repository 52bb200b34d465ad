"""An aiohttp application that generates pictures: a visitor enters a prompt, follows its progress and sees the picture.

    pip install 'flux2max_async[emulator]'  # [emulator] only to try it
    python -m flux2max_async.emulator       # to try it; export the two variables that it prints
    export PUBLIC_URL=http://127.0.0.1:8000 WEBHOOK_SECRET=$(openssl rand -hex 32)
    python examples/aiohttp_app.py

PUBLIC_URL is where visitors and the service reach this server. In production, run it behind a reverse proxy with TLS
and time limits for slow clients, and require a login if not everybody may spend your budget. The budget and the limits
below count for one process, until it ends.

Tasks are kept in memory. To serve them from several workers, or after a restart, pass a `SqliteJournal` with the same
file to each session and `key=task_id` to each request; the budget then covers all runs. If an id is unknown below, the
entry is `journal.find(task_id)`, and `session.attach(entry.task_id)` follows its task.
"""

import asyncio
import json
import math
import os
import secrets
import signal
import time
from base64 import b64encode
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, suppress
from hashlib import sha256
from ipaddress import IPv6Address
from pathlib import Path
from typing import Any

from aiohttp import web
from aiohttp.typedefs import Handler
from yarl import URL

from flux2max_async import (
    BadRequestError,
    BudgetExceededError,
    ContentModeratedError,
    FluxError,
    FluxSession,
    GenerationRequest,
    InvalidRequestError,
    LearnedSchedule,
    PollPlan,
    QueuedGeneration,
    QueueFullError,
    SessionClosedError,
    WebhookInbox,
)
from flux2max_async.web import cancel_on_disconnect

PAGE = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
PICTURES = Path("pictures")  # they stay until you delete them; the budget limits how many there are
PUBLIC_URL = os.environ["PUBLIC_URL"]
ORIGIN = str(URL(PUBLIC_URL).origin())

BUDGET = os.environ.get("BUDGET", "10.00")  # US dollars
MAX_TASKS = 1_000
MAX_WAITING = int(os.environ.get("MAX_WAITING", "200"))  # requests that wait for their turn; one more is refused
GRACE = 10  # seconds in which a visitor whose connection was lost may come back
MAX_BODY = 16 * 1024  # bytes
MAX_SUBMITS = 10  # of one visitor, in a minute
MAX_REQUESTS = 10  # of one visitor, at once, event streams included
MAX_REQUESTS_OF_ALL = 500  # at once

inbox = WebhookInbox(secret=os.environ["WEBHOOK_SECRET"], public_url=f"{PUBLIC_URL}/hooks/flux")
flux = web.AppKey("flux", FluxSession)
tasks: dict[str, QueuedGeneration] = {}
followers = Counter[str]()  # visitors who wait for a picture, by its id
serving = Counter[str]()  # requests, by visitor
submits: dict[float, Counter[str]] = {}  # by minute (there is only one) and visitor
routes = web.RouteTableDef()


class ProgressPlan(PollPlan):
    """Polls a task every half second."""

    def __init__(self, learned: PollPlan) -> None:
        self.learned = learned

    def next_delay(self, elapsed: float, progress: float | None) -> float:  # noqa: ARG002 - it is always the same
        """Return the seconds until the next poll."""
        return 0.5

    def finish(self, not_before: float, by: float, *, completed: bool = True) -> None:
        """Learn how long the task has taken."""
        self.learned.finish(not_before, by, completed=completed)


class ProgressSchedule(LearnedSchedule):
    """Polls often, to show the progress, and learns how long pictures take, to know the expected wait."""

    def begin(self, request: GenerationRequest | None) -> Any:
        """Return the plan for a task."""
        return ProgressPlan(super().begin(request))


async def open_session(app: web.Application) -> AsyncIterator[None]:
    """Open one session for all visitors."""
    async with FluxSession(
        # Webhooks report the ends. Polls report the progress: often while a visitor follows a task, otherwise rarely.
        webhooks=inbox,
        schedule=ProgressSchedule(),
        budget=BUDGET,
        max_waiting=MAX_WAITING,
        # At once when the signal arrives, visitors who wait are told to come back, and running tasks have 20 seconds.
        drain_signals=[signal.SIGTERM, signal.SIGINT],
        drain=20,
    ) as app[flux]:
        yield


# ------------------------------------------------------------------ what a visitor may do


def get_visitor(request: web.Request) -> str:
    """Return the visitor's address; for IPv6 its /64 network, in which a visitor can choose addresses freely."""
    # It is the address of the connection. Behind a reverse proxy that would be the proxy's, and all visitors would be
    # one: then take the address that the proxy has appended to X-Forwarded-For, which is the last one, because
    # anybody can send this header (the package aiohttp-remotes does that).
    host = request.remote or ""
    with suppress(ValueError):
        return host if "." in host else IPv6Address(host).exploded[:19]
    return host


@web.middleware
async def limit_requests(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Serve each visitor only a few requests at once; an event stream counts until it ends."""
    if request.path.startswith("/hooks/"):  # these are the service's
        return await handler(request)
    visitor = get_visitor(request)
    if serving[visitor] >= MAX_REQUESTS or serving.total() >= MAX_REQUESTS_OF_ALL:
        text = "Too many requests at once. Try again later."
        raise web.HTTPTooManyRequests(text=text, headers={"Retry-After": "10"})
    serving[visitor] += 1
    try:
        return await handler(request)
    finally:
        serving[visitor] -= 1
        if not serving[visitor]:
            del serving[visitor]


def count_submit(visitor: str) -> None:
    """Check that a visitor submits only a few requests in each minute."""
    minute = time.monotonic() // 60
    if minute not in submits:
        submits.clear()
        submits[minute] = Counter()
    submits[minute][visitor] += 1
    if submits[minute][visitor] > MAX_SUBMITS:
        text = "Too many pictures. Try again in a minute."
        raise web.HTTPTooManyRequests(text=text, headers={"Retry-After": "60"})


async def read_submit(request: web.Request) -> dict[str, Any]:
    """Return the JSON object that this server's own page, or a program, has sent."""
    # Another site's page could make its visitors' browsers spend the budget. Browsers send both headers, and they send
    # no JSON to another site without asking (CORS), which is always refused.
    origin, site = request.headers.get("Origin", ORIGIN), request.headers.get("Sec-Fetch-Site", "same-origin")
    if (origin, site) != (ORIGIN, "same-origin"):
        raise web.HTTPForbidden(text=f"Open this page at {ORIGIN}.")
    if request.content_type != "application/json":
        raise web.HTTPUnsupportedMediaType(text="Send JSON.")
    count_submit(get_visitor(request))
    if (request.content_length or 0) > MAX_BODY:
        raise web.HTTPRequestEntityTooLarge(MAX_BODY)
    try:
        async with asyncio.timeout(10):
            body = json.loads(await request.read())
    except TimeoutError:
        raise web.HTTPRequestTimeout(text="The request took too long.") from None
    except (ValueError, RecursionError, web.RequestPayloadError):
        body = None
    if not isinstance(body, dict):
        raise web.HTTPBadRequest(text="Send a JSON object.")
    return body


# ------------------------------------------------------------------ who waits for a picture


@contextmanager
def following(task_id: str) -> Iterator[None]:
    """Count a visitor who waits for a picture."""
    followers[task_id] += 1
    try:
        yield
    finally:
        followers[task_id] -= 1
        if not followers[task_id]:
            del followers[task_id]
            withdraw_unless_followed(task_id)


def withdraw_unless_followed(task_id: str) -> None:
    """Withdraw a request for which nobody waits, after some seconds: browsers reconnect after a lost connection."""

    def withdraw() -> None:
        if not followers[task_id] and (task := tasks.get(task_id)):
            task.withdraw()  # has no effect if it is submitted: then it is paid for, and goes on

    asyncio.get_running_loop().call_later(GRACE, withdraw)


async def follow(task_id: str, task: QueuedGeneration) -> AsyncIterator[tuple[str, dict[str, Any]]]:
    """Yield what a visitor is told: each second the place in the queue, then the progress, and at last the end."""
    try:
        while (position := task.position) is not None:
            yield "waiting", {"position": position, "expected_wait": task.expected_wait}
            with suppress(TimeoutError):
                async with asyncio.timeout(1):
                    await task.submitted()
        async with asyncio.timeout(15):  # the session would repeat the submit until its task_timeout
            submitted = await task.submitted()
        async for snapshot in submitted.updates():
            yield "progress", {"status": snapshot.status, "progress": snapshot.progress}
        await task
        yield "done", {"picture": f"tasks/{task_id}/picture"}
    except (FluxError, TimeoutError) as error:
        task.withdraw()  # the visitor is told to try again
        yield "failed", {"reason": reason(error)}


# ------------------------------------------------------------------ the application


def hash_of(tag: str) -> str:
    """Return the hash of the page's script or style, as browsers compute it."""
    text = PAGE.partition(f"<{tag}")[2].partition(">")[2].partition(f"</{tag}>")[0]
    return b64encode(sha256(text.encode()).digest()).decode()


HEADERS = {
    "Content-Security-Policy": f"default-src 'none'; script-src 'sha256-{hash_of('script')}'; "
    f"style-src 'sha256-{hash_of('style')}'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
}


@routes.get("/")
async def get_page(_: web.Request) -> web.Response:
    """Return the page."""
    return web.Response(text=PAGE, content_type="text/html", headers=HEADERS)


@routes.post("/tasks")
async def create_task(request: web.Request) -> web.Response:
    """Take a request in, and return at once with its id and its place in the queue."""
    body = await read_submit(request)
    width, height = body.get("width"), body.get("height")
    picture = GenerationRequest(body.get("prompt", ""), width=width, height=height, output_format="jpeg")
    # Visitors take turns, so that one with many requests doesn't hold up the others.
    task = request.app[flux].enqueue(picture, group=get_visitor(request))
    # Not the service's id: this one nobody can guess, and it may stand in URLs and file names.
    task_id = secrets.token_urlsafe(16)
    tasks[task_id] = task
    if len(tasks) > MAX_TASKS:
        tasks.pop(next(iter(tasks))).withdraw()  # the oldest
    withdraw_unless_followed(task_id)
    answer = {"id": task_id, "position": task.position, "expected_wait": task.expected_wait}
    return web.json_response(answer, status=202)


def find_task(task_id: str) -> QueuedGeneration:
    """Return a task of this server; don't attach other ids, or anybody could have any task polled."""
    if task_id not in tasks:
        raise web.HTTPNotFound(text="There is no such picture.")
    return tasks[task_id]


@routes.get("/tasks/{task_id}/events")
async def stream_events(request: web.Request) -> web.StreamResponse:
    """Stream the progress and end of a task; a visitor who reconnects begins with the newest progress."""
    task_id = request.match_info["task_id"]
    task = find_task(task_id)
    headers = {"Content-Type": "text/event-stream", "Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    response = web.StreamResponse(headers=headers)
    with suppress(ConnectionResetError):  # something was written after the visitor had left
        await response.prepare(request)
        async with cancel_on_disconnect(request):
            with following(task_id):
                async for name, data in follow(task_id, task):
                    # JSON contains no line breaks, which would end the event early.
                    await response.write(f"event: {name}\ndata: {json.dumps(data)}\n\n".encode())
    return response


@routes.get("/tasks/{task_id}/picture")
async def get_picture(request: web.Request) -> web.StreamResponse:
    """Return the picture from this server: the service's URL expires after minutes."""
    task_id = request.match_info["task_id"]
    task = find_task(task_id)
    path = PICTURES / task_id
    if not path.exists():  # concurrent requests may both save it, which is harmless
        # aiohttp would let the request of a visitor who has left wait for its turn.
        async with cancel_on_disconnect(request) as visit:
            with following(task_id):
                await request.app[flux].save((await task).images[0], path)
        if visit.disconnected:
            return web.Response(status=499)
    return web.FileResponse(path, headers={**HEADERS, "Content-Type": media_type(path)})


def media_type(path: Path) -> str:
    """Return the type of a picture by its first bytes: the service may send another one than was requested."""
    with path.open("rb") as file:
        head = file.read(4)
    types = {b"\xff\xd8\xff": "image/jpeg", b"\x89PNG": "image/png", b"RIFF": "image/webp"}
    return next((types[magic] for magic in types if head.startswith(magic)), "application/octet-stream")


@routes.get("/ready")
async def get_status(request: web.Request) -> web.Response:
    """Respond with 200 if requests can be served, and with statistics: for load balancers."""
    health, stats = request.app[flux].health(), request.app[flux].stats
    status = health.to_dict() | {name: getattr(stats, name) for name in ("completed", "failed", "webhooks", "polls")}
    del status["last_error"]  # it may quote the service: that is for the log only
    return web.json_response(status, status=200 if health.ok else 503)


@web.middleware
async def handle_errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Respond to errors in JSON: with 422 if the request is at fault, with 503 for other errors of the session."""
    try:
        return await handler(request)
    except web.HTTPException as error:
        error.text = json.dumps({"detail": error.text})
        error.content_type = "application/json"
        raise
    except FluxError as error:
        status = 422 if isinstance(error, InvalidRequestError | ContentModeratedError | BadRequestError) else 503
        retry_after = math.ceil(getattr(error, "retry_after", None) or 10)
        headers = {"Retry-After": str(retry_after)} if status == 503 else None
        return web.json_response({"detail": reason(error)}, status=status, headers=headers)


def reason(error: Exception) -> str:
    """Return the reason of a failure, as shown to visitors: other messages are for the log only."""
    match error:
        case InvalidRequestError():
            return str(error)
        case ContentModeratedError():
            return "Moderation refused this prompt. Try another one."
        case BadRequestError():
            return "The service refused this prompt. Try another one."
        case BudgetExceededError():
            return "The budget for pictures is used up."
        case QueueFullError():
            return "Too many pictures are waiting. Try again later."
        case SessionClosedError():
            return "The service is shutting down. Try again in a minute."
        case _:
            return "The picture can't be generated now. Try again later."


app = web.Application(middlewares=[handle_errors, limit_requests], client_max_size=MAX_BODY)
app.cleanup_ctx.append(open_session)
app.router.add_post("/hooks/flux", inbox.aiohttp_handler)
app.add_routes(routes)

if __name__ == "__main__":
    port = int(os.environ.get("PORT", "8000"))
    web.run_app(app, host="127.0.0.1", port=port, shutdown_timeout=20)
