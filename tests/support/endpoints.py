"""Servers of several kinds with an inbox, and senders that write raw bytes."""

import asyncio
import contextlib
import hashlib
import hmac
import socket
from asyncio import StreamReader, StreamWriter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from typing import Any

import attrs
import uvicorn
from aiohttp import web
from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.routing import Mount, Route

from flux2max_async import JournalError, ProtocolError, SessionClosedError, WebhookInbox, WebhookSignatureError
from flux2max_async.webhooks import HeadersLike
from flux2max_async.webhooks._adapters import AsgiApp, Endpoint, aiohttp_response
from flux2max_async.webhooks._bodies import BodyReader
from flux2max_async.webhooks._monitor import DeliveryMonitor

SECRET = "hush-7f3a9c"
PATH = "/hooks/flux"
BODY = b'{"id": "t1", "status": "Error"}'
ANY_SIGNATURE = "0" * 64

# ---------------------------------------------------------------------- servers


@attrs.define
class RecordingInbox:
    """Records deliveries; raises `error` if there is one."""

    error: Exception | None = None
    delivered: list[tuple[bytes, HeadersLike]] = attrs.field(factory=list[tuple[bytes, HeadersLike]])
    urls: list[str | None] = attrs.field(factory=list[str | None])
    bodies: BodyReader = attrs.field(factory=BodyReader)
    monitor: DeliveryMonitor = attrs.field(factory=DeliveryMonitor)

    @property
    def endpoint(self) -> Endpoint:
        return Endpoint(self.deliver, self.bodies, self.monitor)

    @property
    def asgi(self) -> AsgiApp:
        return AsgiApp(self.endpoint)

    async def aiohttp_handler(self, request: web.Request) -> web.Response:
        return await aiohttp_response(self.endpoint, request)

    async def deliver(self, body: bytes, headers: HeadersLike, *, url: str | None) -> None:
        self.delivered.append((body, headers))
        self.urls.append(url)
        expected = (WebhookSignatureError, ProtocolError, SessionClosedError, JournalError)
        with self.monitor.recording("not_processed", *expected):
            if self.error is not None:
                raise self.error


Inbox = RecordingInbox | WebhookInbox
ASGI: dict[str, Callable[[Inbox], Any]] = {
    "standalone": lambda inbox: inbox.asgi,
    "mounted": lambda inbox: FastAPI(routes=[Mount("/hooks", inbox.asgi)]),
    "routed": lambda inbox: Starlette(routes=[Route(PATH, inbox.asgi)]),
}


@contextlib.asynccontextmanager
async def running_server(
    server: str, inbox: Inbox, *, listener: socket.socket | None = None, middlewares: Iterable[Any] = ()
) -> AsyncIterator[int]:
    """Run aiohttp or uvicorn on a free port of this machine."""
    listener = listener or listening_socket()
    if server == "aiohttp":
        app = web.Application(middlewares=middlewares)
        app.router.add_route("*", PATH, inbox.aiohttp_handler)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.SockSite(runner, listener).start()
        stop: Callable[[], Awaitable[None]] = runner.cleanup
    else:
        # With lifespan="on", uvicorn refuses to start if the application doesn't support lifespan events.
        config = uvicorn.Config(ASGI[server](inbox), lifespan="on", log_config=None)
        config.load()
        uvicorn_server = uvicorn.Server(config)
        uvicorn_server.lifespan = config.lifespan_class(config)
        # Uvicorn's main loop is not run: it wakes up ten times a second, which would move the virtual clock.
        await uvicorn_server.startup([listener])
        stop = uvicorn_server.shutdown
    try:
        yield listener.getsockname()[1]
    finally:
        await stop()
        listener.close()


def listening_socket() -> socket.socket:
    return socket.create_server(("127.0.0.1", 0))


# ---------------------------------------------------------------------- senders


@attrs.frozen
class HttpResponse:
    status: int
    headers: dict[str, str]
    """Names are in lower case."""
    text: str


def request_head(
    length: int | None = None,
    *more: str,
    method: str = "POST",
    query: str = "",
    signature: str | None = ANY_SIGNATURE,
) -> bytes:
    """Return the head of a request, with a chunked body if no length is given."""
    framing = "Transfer-Encoding: chunked" if length is None else f"Content-Length: {length}"
    headers = [f"{method} {PATH}{query} HTTP/1.1", "Host: app.example", framing, *more]
    if signature is not None:
        headers.append(f"X-BFL-Signature: sha256={signature}")
    return "\r\n".join([*headers, "", ""]).encode()


def http_chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


def signed_request(body: bytes = BODY, secret: str = SECRET) -> bytes:
    """Return a whole request, signed like the service's."""
    signature = hmac.new(secret.encode(), body, hashlib.sha256).hexdigest()
    return request_head(len(body), signature=signature) + body


@contextlib.asynccontextmanager
async def connected(port: int) -> AsyncIterator[tuple[StreamReader, StreamWriter]]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        yield reader, writer
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


async def send_raw(port: int, *pieces: bytes) -> HttpResponse:
    """Send raw pieces with pauses in between, and read the response while the connection is open."""
    async with connected(port) as (reader, writer):
        for piece in pieces:
            writer.write(piece)
            await asyncio.sleep(0.1)
        return await read_response(reader, body=not pieces[0].startswith(b"HEAD"))


async def read_response(reader: StreamReader, *, body: bool = True) -> HttpResponse:
    """Read one response, by default with its body."""
    status, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
    headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines if line)}
    length = int(headers["content-length"]) if body else 0
    return HttpResponse(int(status.split()[1]), headers, (await reader.readexactly(length)).decode())
