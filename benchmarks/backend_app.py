"""The web service that `backends.py` measures: with this library, and as it is written in ten minutes without it.

Both have the same two endpoints. `POST /picture?prompt=...` responds with the picture, `POST /tasks?prompt=...` takes
the request in and responds with 202. `build_asgi()` makes a FastAPI application of a service, `build_aiohttp()` one of
aiohttp.web. `python benchmarks/backend_app.py PORT LOOP GRACE` serves the latter. The settings are in an environment
variable.
"""

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any, Protocol

import aiohttp
import attrs
from aiohttp import web

from flux2max_async import FluxError, FluxSession, QueueFullError, SqliteInFlightLimit, SqliteJournal, WebhookInbox
from flux2max_async.web import cancel_on_disconnect

ACCOUNT_LIMIT = 24
"""Tasks that the service lets an account have in flight."""
POLL_INTERVAL = 0.5
"""Seconds between two polls without the library."""
_SETTINGS = "BACKENDS_SETTINGS"
"""The environment variable."""


@attrs.frozen
class Settings:
    """What a service does, and where."""

    base_url: str
    api_key: str
    folder: str
    """Belongs to all workers of a server: each that is ready has a file there."""
    library: bool
    slots: int = ACCOUNT_LIMIT
    """Of this worker."""
    shared_limit: bool = False
    """The workers share the account's limit instead."""
    webhook_url: str | None = None
    max_waiting: int | None = None
    drain: float = 20.0

    @classmethod
    def from_environment(cls) -> "Settings":
        return cls(**json.loads(os.environ[_SETTINGS]))

    def to_environment(self) -> dict[str, str]:
        return {_SETTINGS: json.dumps(attrs.asdict(self))}


Answer = tuple[int, dict[str, Any], dict[str, str]]
"""Status, body and headers of a response."""


class Service(Protocol):
    """A service, whatever the framework."""

    inbox: WebhookInbox | None

    def run(self) -> AbstractAsyncContextManager[None]:
        """Run the service; for the framework's lifespan."""

    async def generate(self, request: Any, prompt: str) -> Answer:
        """Generate a picture."""

    def enqueue(self, prompt: str) -> Answer:
        """Take a request in."""


class LibraryService:
    """The service with this library."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        url = settings.webhook_url
        self.inbox: WebhookInbox | None = WebhookInbox(secret="0123456789abcdef" * 4, public_url=url) if url else None

    @asynccontextmanager
    async def run(self) -> AsyncIterator[None]:
        settings, folder = self._settings, Path(self._settings.folder)
        # With webhooks, workers also share a journal: a delivery may reach one that doesn't follow the task.
        shared, journal = settings.shared_limit, folder / "journal.db"
        async with FluxSession(
            settings.api_key,
            base_url=settings.base_url,
            max_in_flight=SqliteInFlightLimit(folder / "limit.db", ACCOUNT_LIMIT) if shared else settings.slots,
            max_waiting=settings.max_waiting,
            webhooks=self.inbox,
            journal=SqliteJournal(journal) if shared and self.inbox else None,
            content_keys=False,
            drain=settings.drain,
            drain_signals=(signal.SIGTERM,),
        ) as self._session:
            yield

    async def generate(self, request: Any, prompt: str) -> Answer:
        try:
            async with cancel_on_disconnect(request) as visit:
                done = await self._session.generate(prompt)
        except FluxError as error:
            return _refuse(error)
        if visit.disconnected:
            return 499, {}, {}
        return 200, {"url": done.images[0].url}, {}

    def enqueue(self, prompt: str) -> Answer:
        try:
            queued = self._session.enqueue(prompt)
        except FluxError as error:
            return _refuse(error)
        return 202, {"position": queued.position, "expected_wait": queued.expected_wait}, {}


def _refuse(error: FluxError) -> Answer:
    headers = {}
    if isinstance(error, QueueFullError):
        headers["Retry-After"] = f"{error.retry_after or 10:.0f}"
    return 503, {"detail": str(error)}, headers


class PlainService:
    """The service with aiohttp alone: submit, poll at a fixed interval, a semaphore for the account's limit."""

    inbox: WebhookInbox | None = None

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._slots = asyncio.Semaphore(settings.slots)
        self._tasks = set[asyncio.Task[str]]()

    @asynccontextmanager
    async def run(self) -> AsyncIterator[None]:
        headers = {"Authorization": f"Bearer {self._settings.api_key}"}
        async with aiohttp.ClientSession(self._settings.base_url, headers=headers) as self._http:
            yield

    async def generate(self, request: Any, prompt: str) -> Answer:  # noqa: ARG002 - nothing to do with the visitor
        return 200, {"url": await self._generate(prompt)}, {}

    def enqueue(self, prompt: str) -> Answer:
        task = asyncio.create_task(self._generate(prompt))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return 202, {}, {}

    async def _generate(self, prompt: str) -> str:
        async with self._slots:
            task_id = await self._submit(prompt)
            while True:
                await asyncio.sleep(POLL_INTERVAL)
                task = await self._poll(task_id)
                if task["status"] == "completed":
                    return str(task["output"][0]["content"][0]["url"])
                if task["status"] == "failed":
                    raise RuntimeError(task["error"])

    async def _submit(self, prompt: str) -> str:
        body = {"model": "flux_2_max", "input": [{"params": {"prompt": prompt}}]}
        while True:
            async with self._http.post("/model/v1/generation", json=body) as response:
                if response.status != 429:
                    response.raise_for_status()
                    return str((await response.json())["id"])
                wait = float(response.headers.get("Retry-After", "1"))
            await asyncio.sleep(wait)

    async def _poll(self, task_id: str) -> dict[str, Any]:
        async with self._http.get(f"/model/v1/generation/task/{task_id}") as response:
            response.raise_for_status()
            task: dict[str, Any] = await response.json()
            return task


@asynccontextmanager
async def _running(service: Service, folder: str) -> AsyncIterator[None]:
    """Run a service, and report that this worker is ready."""
    async with service.run():
        (Path(folder) / f"ready-{os.getpid()}").touch()
        yield


def build_asgi() -> Any:
    """Return the service as a FastAPI application."""
    from fastapi import FastAPI, Request
    from fastapi.responses import JSONResponse

    settings = Settings.from_environment()
    service: Service = LibraryService(settings) if settings.library else PlainService(settings)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with _running(service, settings.folder):
            yield

    app = FastAPI(lifespan=lifespan)

    @app.post("/picture")
    async def generate(request: Request, prompt: str) -> JSONResponse:
        status, body, headers = await service.generate(request, prompt)
        return JSONResponse(body, status, headers)

    @app.post("/tasks")
    async def enqueue(prompt: str) -> JSONResponse:
        status, body, headers = service.enqueue(prompt)
        return JSONResponse(body, status, headers)

    if service.inbox:
        app.mount("/hooks", service.inbox.asgi)
    return app


def build_aiohttp() -> web.Application:
    """Return the service as an application of aiohttp.web."""
    settings = Settings.from_environment()
    service: Service = LibraryService(settings) if settings.library else PlainService(settings)

    async def run(_: web.Application) -> AsyncIterator[None]:
        async with _running(service, settings.folder):
            yield

    def respond(status: int, body: Mapping[str, Any], headers: Mapping[str, str]) -> web.Response:
        return web.json_response(body, status=status, headers=headers)

    async def generate(request: web.Request) -> web.Response:
        return respond(*await service.generate(request, request.query["prompt"]))

    async def enqueue(request: web.Request) -> web.Response:
        return respond(*service.enqueue(request.query["prompt"]))

    app = web.Application()
    app.cleanup_ctx.append(run)
    app.router.add_post("/picture", generate)
    app.router.add_post("/tasks", enqueue)
    if service.inbox:
        app.router.add_post("/hooks/flux", service.inbox.aiohttp_handler)
    return app


def main() -> None:
    """Serve with aiohttp.web."""
    port, name, grace = sys.argv[1:]
    if name == "uvloop":
        import uvloop

        loop: asyncio.AbstractEventLoop = uvloop.new_event_loop()
    else:
        loop = asyncio.new_event_loop()
    app = build_aiohttp()
    web.run_app(
        app, host="127.0.0.1", port=int(port), backlog=4096, shutdown_timeout=float(grace), access_log=None, print=None,
        loop=loop,
    )  # fmt: skip


if __name__ == "__main__":
    main()
