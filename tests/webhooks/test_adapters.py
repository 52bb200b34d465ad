"""Deliveries over HTTP: how real servers of several kinds read and answer them, whatever the sender does."""

import asyncio
import contextlib
import hashlib
import hmac
import logging
import socket
import struct
from asyncio import StreamReader, StreamWriter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, MutableMapping
from pathlib import Path
from typing import Any

import attrs
import pytest
import uvicorn
from aiohttp import web
from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.routing import Mount, Route
from support.virtual_time import VirtualJournal

from flux2max_async import (
    FixedSchedule,
    FluxSession,
    JournalEntry,
    JournalError,
    ProtocolError,
    SessionClosedError,
    WebhookInbox,
    WebhookSignatureError,
)
from flux2max_async.emulator import Emulator
from flux2max_async.webhooks._adapters import AsgiApp, aiohttp_answer
from flux2max_async.webhooks._payload import MAX_BODY

SECRET = "hush-7f3a9c"
PATH = "/hooks/flux"
BODY = b'{"id": "t1", "status": "Error"}'

# ---------------------------------------------------------------------- servers


@attrs.define
class Desk:
    """A door behind which deliveries are kept, or meet with an error."""

    error: Exception | None = None
    delivered: list[tuple[bytes, Mapping[str, str]]] = attrs.field(factory=list[tuple[bytes, Mapping[str, str]]])

    @property
    def asgi(self) -> AsgiApp:
        return AsgiApp(self.deliver)

    async def aiohttp_handler(self, request: web.Request) -> web.Response:
        return await aiohttp_answer(self.deliver, request)

    async def deliver(self, body: bytes, headers: Mapping[str, str]) -> None:
        self.delivered.append((body, headers))
        if self.error is not None:
            raise self.error


InboxServer = Desk | WebhookInbox
ASGI: dict[str, Callable[[InboxServer], Any]] = {
    "alone": lambda door: door.asgi,
    "mounted": lambda door: FastAPI(routes=[Mount("/hooks", door.asgi)]),
    "routed": lambda door: Starlette(routes=[Route(PATH, door.asgi)]),
}


@contextlib.asynccontextmanager
async def served(
    server: str, door: InboxServer, *, listener: socket.socket | None = None, middlewares: Iterable[Any] = ()
) -> AsyncIterator[int]:
    """Serve on a free port of this machine, by aiohttp or by uvicorn."""
    listener = listener or listening()
    if server == "aiohttp":
        app = web.Application(middlewares=middlewares)
        app.router.add_route("*", PATH, door.aiohttp_handler)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.SockSite(runner, listener).start()
        stop: Callable[[], Awaitable[None]] = runner.cleanup
    else:
        # With lifespan="on" it refuses to start where the application knows no lifespan.
        config = uvicorn.Config(ASGI[server](door), lifespan="on", log_config=None)
        config.load()
        uvicorn_server = uvicorn.Server(config)
        uvicorn_server.lifespan = config.lifespan_class(config)
        # Its main loop, which ticks ten times a second, would keep virtual time from standing still.
        await uvicorn_server.startup([listener])
        stop = uvicorn_server.shutdown
    try:
        yield listener.getsockname()[1]
    finally:
        await stop()
        listener.close()


def listening() -> socket.socket:
    return socket.create_server(("127.0.0.1", 0))


@pytest.fixture(params=["aiohttp", *ASGI])
def server(request: pytest.FixtureRequest) -> str:
    """Each kind of server, one after the other."""
    return str(request.param)


# ---------------------------------------------------------------------- senders


@attrs.frozen
class Answer:
    status: int
    headers: dict[str, str]
    """Their names in lower case."""
    text: str


def head(length: int | None = None, *more: str, method: str = "POST") -> bytes:
    """Write the head of a request, chunked where its length isn't told."""
    framing = "Transfer-Encoding: chunked" if length is None else f"Content-Length: {length}"
    return "\r\n".join([f"{method} {PATH} HTTP/1.1", "Host: app.example", framing, *more, "", ""]).encode()


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


def signed(body: bytes = BODY, secret: str = SECRET) -> bytes:
    """Write a whole request, signed as the service does."""
    signature = hmac.new(secret.encode(), body, hashlib.sha256).hexdigest()
    return head(len(body), f"X-BFL-Signature: sha256={signature}") + body


@contextlib.asynccontextmanager
async def connected(port: int) -> AsyncIterator[tuple[StreamReader, StreamWriter]]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        yield reader, writer
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


async def ask(port: int, *pieces: bytes) -> Answer:
    """Send bytes as they are, a moment after each other, and read the answer while the connection is open."""
    async with connected(port) as (reader, writer):
        for piece in pieces:
            writer.write(piece)
            await asyncio.sleep(0.1)
        status, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines if line)}
        length = 0 if pieces[0].startswith(b"HEAD") else int(headers["content-length"])
        return Answer(int(status.split()[1]), headers, (await reader.readexactly(length)).decode())


def faults(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What anybody has logged as an error, or with a traceback."""
    return [str(record) for record in caplog.records if record.levelno >= logging.ERROR or record.exc_info]


# ---------------------------------------------------------------------- what is answered


async def test_a_task_ends_by_its_webhook(server: str, gateway: Emulator) -> None:
    """Whichever server has received it, a webhook ends its task at once, long before a poll would."""
    with listening() as listener:
        inbox = WebhookInbox(secret=SECRET, public_url=f"http://127.0.0.1:{listener.getsockname()[1]}{PATH}")
        session = FluxSession(gateway.api_key, base_url=gateway.url, schedule=FixedSchedule(500.0), webhooks=inbox)
        async with served(server, inbox, listener=listener), session:
            outcome = await session.generate("a lighthouse at dawn")

    assert outcome.elapsed == pytest.approx(8.0, abs=0.5)
    assert outcome.polls == 0
    assert [delivery.status for delivery in gateway.deliveries] == [200]


async def test_a_delivery_arrives_as_it_was_sent(server: str, caplog: pytest.LogCaptureFixture) -> None:
    """A body arrives byte by byte, in however many pieces it comes, with its headers under names in any case."""
    body = bytes(range(256)) * 2
    async with served(server, desk := Desk()) as port:
        whole = await ask(port, head(len(body), "X-Signature: a") + body)
        pieces = await ask(port, head(len(body), "X-Signature: a"), body[:1], body[1:300], body[300:])
        chunks = await ask(port, head(None, "X-Signature: a"), chunk(body[:300]), chunk(body[300:]), chunk(b""))
        await ask(port, head(0))
        await ask(port, head(MAX_BODY), b" " * MAX_BODY)

    assert [(answer.status, answer.text) for answer in (whole, pieces, chunks)] == [(200, "ok")] * 3
    assert whole.headers["content-type"] == "text/plain; charset=utf-8"
    assert [found for found, _ in desk.delivered] == [body, body, body, b"", b" " * MAX_BODY]
    assert all(
        {name.lower(): value for name, value in found.items()}["x-signature"] == "a" for _, found in desk.delivered[:3]
    )
    assert not faults(caplog)


@pytest.mark.parametrize(
    ("error", "status", "text"),
    [
        (WebhookSignatureError(f"wrong, not {SECRET}"), 401, "wrong signature"),
        (ProtocolError(f"unreadable: {SECRET}"), 400, "unreadable"),
        (SessionClosedError(f"closed: {SECRET}"), 503, "not now"),
        (JournalError(f"full: {SECRET}"), 503, "not now"),
        (KeyError(SECRET), 500, "failed"),
        (RuntimeError(SECRET), 500, "failed"),
        (BrokenPipeError(SECRET), 500, "failed"),
        (TimeoutError(SECRET), 500, "failed"),
    ],
)
async def test_the_answer_says_what_the_sender_can_do(
    server: str, error: Exception, status: int, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Each error has its status and a few fixed words; what it says itself, and a fault of our own, goes to the log."""
    async with served(server, Desk(error)) as port:
        answer = await ask(port, head(2) + b"{}")

    assert (answer.status, answer.text) == (status, text)
    assert SECRET not in str(answer)
    (record,) = (record for record in caplog.records if record.name == "flux2max_async")
    assert (record.exc_info is not None and record.exc_info[1] is error) == (status == 500)
    assert record.levelno == (logging.ERROR if status == 500 else logging.WARNING)


class FullDisk(VirtualJournal):
    async def find_task(self, task_id: str, /) -> JournalEntry | None:
        raise JournalError("the disk is full")


async def test_an_inbox_answers(
    server: str, gateway: Emulator, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """An inbox takes what is signed and readable, once its session is open and its journal can be written."""
    inbox = WebhookInbox(secret=SECRET, public_url="http://127.0.0.1/hooks")
    async with served(server, inbox) as port:
        before = await ask(port, signed())
        async with FluxSession(gateway.api_key, base_url=gateway.url, webhooks=inbox):
            inside = [await ask(port, signed(*sent)) for sent in ((), (), (BODY, "whist"), (b"{",), (b'{"id": "t1"}',))]
        after = await ask(port, signed())
        journal = FullDisk(tmp_path / "journal.db")
        async with FluxSession(gateway.api_key, base_url=gateway.url, webhooks=inbox, journal=journal):
            unrecorded = await ask(port, signed())

    assert [answer.status for answer in inside] == [200, 200, 401, 400, 400]
    assert [answer.status for answer in (before, after, unrecorded)] == [503] * 3
    assert not faults(caplog)
    assert SECRET not in caplog.text


@pytest.mark.parametrize("method", ["GET", "PUT", "HEAD", "OPTIONS", "DELETE"])
async def test_deliveries_are_posted(server: str, method: str) -> None:
    """Any other method is told that only POST will do, and delivers nothing."""
    async with served(server, desk := Desk()) as port:
        answer = await ask(port, head(len(BODY), method=method) + BODY)

    assert (answer.status, answer.headers["allow"]) == (405, "POST")
    assert answer.text == ("" if method == "HEAD" else "POST only")
    assert not desk.delivered


async def test_what_is_too_large_is_refused_early(server: str, caplog: pytest.LogCaptureFixture) -> None:
    """Of a body that is declared too large not a byte is waited for, and of one that grows too large not the end."""
    async with served(server, desk := Desk()) as port:
        declared = await ask(port, head(MAX_BODY + 1))
        absurd = await ask(port, head(10**18))
        growing = await ask(port, head(), *[chunk(b" " * 100_000)] * 10, chunk(b" "))

    assert [(answer.status, answer.text) for answer in (declared, absurd, growing)] == [(413, "too large")] * 3
    assert not desk.delivered
    assert not faults(caplog)


# ---------------------------------------------------------------------- senders that break off


def reset(writer: StreamWriter) -> None:
    linger = struct.pack("ii", 1, 0)
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    writer.transport.abort()


@pytest.mark.parametrize("leave", [StreamWriter.close, StreamWriter.write_eof, reset])
@pytest.mark.parametrize("length", [len(BODY) + 1, None])
async def test_a_sender_that_leaves_does_no_harm(
    server: str, length: int | None, leave: Callable[[StreamWriter], None], caplog: pytest.LogCaptureFixture
) -> None:
    """A delivery whose sender leaves in the middle is none, and no fault of ours; the next one is taken."""
    async with served(server, desk := Desk()) as port:
        async with connected(port) as (_, writer):
            writer.write(head(length) + (BODY if length else chunk(BODY)))
            await asyncio.sleep(0.1)
            leave(writer)
            await asyncio.sleep(1)
        answer = await ask(port, signed())

    assert answer.status == 200
    assert [body for body, _ in desk.delivered] == [BODY]
    assert not faults(caplog)


async def test_a_body_that_is_not_what_it_says_is_unreadable(caplog: pytest.LogCaptureFixture) -> None:
    """What aiohttp can't unpack is the sender's fault: 400, and no traceback of ours."""
    async with served("aiohttp", desk := Desk()) as port:
        answer = await ask(port, head(len(BODY), "Content-Encoding: gzip") + BODY)

    assert (answer.status, answer.text) == (400, "unreadable")
    assert not desk.delivered
    assert "flux2max_async" not in {record.name for record in caplog.records}


async def test_a_middleware_may_have_read_the_body() -> None:
    """A body that the application has looked at before is delivered all the same."""

    @web.middleware
    async def looks(request: web.Request, handler: Callable[[web.Request], Awaitable[Any]]) -> Any:
        seen.append(await request.read())
        return await handler(request)

    seen: list[bytes] = []
    async with served("aiohttp", desk := Desk(), middlewares=[looks]) as port:
        answer = await ask(port, signed())

    assert answer.status == 200
    assert [body for body, _ in desk.delivered] == seen == [BODY]


# ---------------------------------------------------------------------- ASGI


def test_it_is_known_as_asgi_3() -> None:
    """A server that has to guess takes it for an application of today's ASGI."""
    config = uvicorn.Config(Desk().asgi, log_config=None)
    config.load()

    assert config.interface == "asgi3"


async def talk(scope: dict[str, Any], *events: dict[str, Any]) -> list[MutableMapping[str, Any]]:
    """Hold the conversation of one connection, as a server does, and give what the application says."""
    coming, said = list(events), list[MutableMapping[str, Any]]()

    async def receive() -> dict[str, Any]:
        return coming.pop(0)

    async def send(message: MutableMapping[str, Any]) -> None:
        said.append(message)

    await Desk().asgi(scope, receive, send)
    assert not coming
    return said


async def test_it_has_nothing_to_start_or_stop() -> None:
    """A server that asks everybody is told that all is ready, at its start and at its end."""
    said = await talk({"type": "lifespan"}, {"type": "lifespan.startup"}, {"type": "lifespan.shutdown"})

    assert [message["type"] for message in said] == ["lifespan.startup.complete", "lifespan.shutdown.complete"]


async def test_a_websocket_is_refused() -> None:
    """A websocket is closed before it is accepted, which servers answer with an HTTP error."""
    said = await talk({"type": "websocket", "path": PATH}, {"type": "websocket.connect"})

    assert said == [{"type": "websocket.close", "code": 1000}]


async def test_a_websocket_is_refused_by_servers(server: str, caplog: pytest.LogCaptureFixture) -> None:
    """Who asks for a websocket gets an HTTP error, whether or not the server knows websockets."""
    upgrade = ("Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13")
    key = "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ=="
    async with served(server, desk := Desk()) as port:
        answer = await ask(port, head(0, *upgrade, key, method="GET"))

    assert answer.status in {403, 405}
    assert not desk.delivered
    assert not faults(caplog)


@pytest.mark.parametrize(("declared", "status"), [(b"9" * 5_000, 413), (b"-1", 200), (b"\xb2", 200), (b"0", 200)])
async def test_a_length_that_no_server_should_let_through(declared: bytes, status: int) -> None:
    """A length that is no number counts for nothing, and one that is absurd for what it says."""
    scope = {"type": "http", "method": "POST", "headers": [(b"content-length", declared)]}
    events = [{"type": "http.request"}] if status == 200 else []
    start, body = await talk(scope, *events)

    assert all(name.islower() for name, _ in start["headers"])
    assert (start["status"], body["body"]) == (status, b"ok" if status == 200 else b"too large")
