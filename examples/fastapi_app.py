"""A FastAPI application that generates pictures: a visitor enters a prompt, follows its progress and sees the picture.

    pip install 'flux2max_async[emulator]' 'fastapi>=0.165' uvicorn  # [emulator] only to try it
    python -m flux2max_async.emulator       # to try it; export the two variables that it prints
    export PUBLIC_URL=http://127.0.0.1:8000 WEBHOOK_SECRET=$(openssl rand -hex 32)
    uvicorn --app-dir examples --timeout-graceful-shutdown 20 fastapi_app:app

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
from contextlib import asynccontextmanager, contextmanager, suppress
from hashlib import sha256
from ipaddress import IPv6Address
from pathlib import Path
from typing import Annotated, Any

from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.responses import FileResponse, HTMLResponse, JSONResponse
from fastapi.sse import EventSourceResponse, ServerSentEvent
from starlette.requests import ClientDisconnect
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
tasks: dict[str, QueuedGeneration] = {}
followers = Counter[str]()  # visitors who wait for a picture, by its id
serving = Counter[str]()  # requests, by visitor
submits: dict[float, Counter[str]] = {}  # by minute (there is only one) and visitor


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


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
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
    ) as app.state.flux:
        yield


# ------------------------------------------------------------------ what a visitor may do


def get_visitor(request: Request) -> str:
    """Return the visitor's address; for IPv6 its /64 network, in which a visitor can choose addresses freely."""
    # It is the address of the connection. Behind a reverse proxy that would be the proxy's, and all visitors would be
    # one: uvicorn then takes the address from X-Forwarded-For, but only from proxies in --forwarded-allow-ips (by
    # default 127.0.0.1), because anybody can send this header.
    host = request.client.host if request.client else ""
    with suppress(ValueError):
        return host if "." in host else IPv6Address(host).exploded[:19]
    return host


async def limit_requests(request: Request) -> AsyncIterator[None]:
    """Serve each visitor only a few requests at once; an event stream counts until it ends."""
    visitor = get_visitor(request)
    if serving[visitor] >= MAX_REQUESTS or serving.total() >= MAX_REQUESTS_OF_ALL:
        raise HTTPException(429, "Too many requests at once. Try again later.", {"Retry-After": "10"})
    serving[visitor] += 1
    try:
        yield
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
        raise HTTPException(429, "Too many pictures. Try again in a minute.", {"Retry-After": "60"})


# A body that is a parameter of the endpoint would be read before all this is checked.
async def read_submit(request: Request) -> dict[str, Any]:
    """Return the JSON object that this server's own page, or a program, has sent."""
    # Another site's page could make its visitors' browsers spend the budget. Browsers send both headers, and they send
    # no JSON to another site without asking (CORS), which is always refused.
    origin, site = request.headers.get("Origin", ORIGIN), request.headers.get("Sec-Fetch-Site", "same-origin")
    if (origin, site) != (ORIGIN, "same-origin"):
        raise HTTPException(403, f"Open this page at {ORIGIN}.")
    if request.headers.get("Content-Type", "").partition(";")[0].strip().lower() != "application/json":
        raise HTTPException(415, "Send JSON.")
    count_submit(get_visitor(request))
    try:
        async with asyncio.timeout(10):
            body = json.loads(await request.body())
    except TimeoutError:
        raise HTTPException(408, "The request took too long.") from None
    except (ValueError, RecursionError, ClientDisconnect):
        body = None
    if not isinstance(body, dict):
        raise HTTPException(400, "Send a JSON object.")
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

# The documentation at /docs would need another policy than the page's: it loads scripts from other servers.
app = FastAPI(lifespan=lifespan, dependencies=[Depends(limit_requests)], openapi_url=None)
# Mounted above the inbox's path: with a mount at that path, deliveries would be redirected to "/hooks/flux/".
app.mount("/hooks", inbox.asgi)


def get_session(request: Request) -> FluxSession:
    """Return the session of all visitors."""
    flux: FluxSession = request.app.state.flux
    return flux


Session = Annotated[FluxSession, Depends(get_session)]


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


@app.get("/")
async def get_page() -> HTMLResponse:
    """Return the page."""
    return HTMLResponse(PAGE, headers=HEADERS)


@app.post("/tasks", status_code=202, max_body_size=MAX_BODY)
async def create_task(
    request: Request, body: Annotated[dict[str, Any], Depends(read_submit)], flux: Session
) -> dict[str, Any]:
    """Take a request in, and return at once with its id and its place in the queue."""
    width, height = body.get("width"), body.get("height")
    picture = GenerationRequest(body.get("prompt", ""), width=width, height=height, output_format="jpeg")
    # Visitors take turns, so that one with many requests doesn't hold up the others.
    task = flux.enqueue(picture, group=get_visitor(request))
    # Not the service's id: this one nobody can guess, and it may stand in URLs and file names.
    task_id = secrets.token_urlsafe(16)
    tasks[task_id] = task
    if len(tasks) > MAX_TASKS:
        tasks.pop(next(iter(tasks))).withdraw()  # the oldest
    withdraw_unless_followed(task_id)
    return {"id": task_id, "position": task.position, "expected_wait": task.expected_wait}


def find_task(task_id: str) -> QueuedGeneration:
    """Return a task of this server; don't attach other ids, or anybody could have any task polled."""
    if task_id not in tasks:
        raise HTTPException(404, "There is no such picture.")
    return tasks[task_id]


Task = Annotated[QueuedGeneration, Depends(find_task)]


@app.get("/tasks/{task_id}/events", response_class=EventSourceResponse)
async def stream_events(task_id: str, task: Task) -> AsyncIterator[ServerSentEvent]:
    """Stream the progress and end of a task; a visitor who reconnects begins with the newest progress."""
    with following(task_id):
        async for name, data in follow(task_id, task):
            yield ServerSentEvent(event=name, data=data)


@app.get("/tasks/{task_id}/picture")
async def get_picture(request: Request, task_id: str, task: Task, flux: Session) -> FileResponse:
    """Return the picture from this server: the service's URL expires after minutes."""
    path = PICTURES / task_id
    if not path.exists():  # concurrent requests may both save it, which is harmless
        # FastAPI would let the request of a visitor who has left wait for its turn.
        async with cancel_on_disconnect(request) as visit:
            with following(task_id):
                await flux.save((await task).images[0], path)
        if visit.disconnected:
            raise HTTPException(499, "The visitor has left.")
    return FileResponse(path, headers=HEADERS, media_type=media_type(path))


def media_type(path: Path) -> str:
    """Return the type of a picture by its first bytes: the service may send another one than was requested."""
    with path.open("rb") as file:
        head = file.read(4)
    types = {b"\xff\xd8\xff": "image/jpeg", b"\x89PNG": "image/png", b"RIFF": "image/webp"}
    return next((types[magic] for magic in types if head.startswith(magic)), "application/octet-stream")


@app.get("/ready")
async def get_status(flux: Session) -> JSONResponse:
    """Respond with 200 if requests can be served, and with statistics: for load balancers."""
    health, stats = flux.health(), flux.stats
    status = health.to_dict() | {name: getattr(stats, name) for name in ("completed", "failed", "webhooks", "polls")}
    del status["last_error"]  # it may quote the service: that is for the log only
    return JSONResponse(status, 200 if health.ok else 503)


@app.exception_handler(FluxError)
async def handle_flux_error(_: Request, error: FluxError) -> JSONResponse:
    """Respond with 422 if the request is at fault, otherwise with 503."""
    status = 422 if isinstance(error, InvalidRequestError | ContentModeratedError | BadRequestError) else 503
    retry_after = math.ceil(getattr(error, "retry_after", None) or 10)
    headers = {"Retry-After": str(retry_after)} if status == 503 else None
    return JSONResponse({"detail": reason(error)}, status, headers)


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
