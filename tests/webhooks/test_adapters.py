"""HTTP endpoints for deliveries: how real servers of several kinds process them, whatever the sender does."""

import asyncio
import logging
import socket
import struct
from asyncio import StreamWriter
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from aiohttp import web
from support.endpoints import (
    ANY_SIGNATURE,
    ASGI,
    BODY,
    PATH,
    SECRET,
    RecordingInbox,
    connected,
    http_chunk,
    listening_socket,
    request_head,
    running_server,
    send_raw,
    signed_request,
)
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
from flux2max_async.webhooks._headers import header_values
from flux2max_async.webhooks._payload import MAX_BODY
from flux2max_async.webhooks._tokens import token_of


@pytest.fixture(params=["aiohttp", *ASGI])
def server(request: pytest.FixtureRequest) -> str:
    """Parametrize over each kind of server."""
    return str(request.param)


def logged_errors(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return all log records that are errors or have a traceback."""
    return [str(record) for record in caplog.records if record.levelno >= logging.ERROR or record.exc_info]


# ---------------------------------------------------------------------- responses


async def test_webhook_ends_its_task(server: str, gateway: Emulator) -> None:
    """On every server, a webhook ends its task at once, long before a poll would."""
    with listening_socket() as listener:
        inbox = WebhookInbox(secret=SECRET, public_url=f"http://127.0.0.1:{listener.getsockname()[1]}{PATH}")
        session = FluxSession(gateway.api_key, base_url=gateway.url, schedule=FixedSchedule(500.0), webhooks=inbox)
        async with running_server(server, inbox, listener=listener), session:
            outcome = await session.generate("a lighthouse at dawn")

    assert outcome.elapsed == pytest.approx(8.0, abs=0.5)
    assert outcome.polls == 0
    assert [delivery.status for delivery in gateway.deliveries] == [200]


async def test_body_and_headers_are_passed_on(server: str, caplog: pytest.LogCaptureFixture) -> None:
    """The body arrives unchanged, however it is split, and the headers arrive with it."""
    body = bytes(range(256)) * 2
    async with running_server(server, recorder := RecordingInbox()) as port:
        whole = await send_raw(port, request_head(len(body), "X-Signature: a") + body)
        pieces = await send_raw(port, request_head(len(body), "X-Signature: a"), body[:1], body[1:300], body[300:])
        chunks = await send_raw(
            port, request_head(None, "X-Signature: a"), http_chunk(body[:300]), http_chunk(body[300:]), http_chunk(b"")
        )
        await send_raw(port, request_head(0))
        await send_raw(port, request_head(MAX_BODY), b" " * MAX_BODY)

    assert [(response.status, response.text) for response in (whole, pieces, chunks)] == [(200, "ok")] * 3
    assert whole.headers["content-type"] == "text/plain; charset=utf-8"
    assert [received for received, _ in recorder.delivered] == [body, body, body, b"", b" " * MAX_BODY]
    assert all(header_values(received, "x-signature") == ["a"] for _, received in recorder.delivered[:3])
    assert not logged_errors(caplog)


async def test_repeated_headers_and_the_url_are_passed_on(server: str) -> None:
    """Both values of a repeated header arrive, and the query as it was sent."""
    query = "?a=%2F%20&flux2max_submit=to-k_en"
    head = request_head(0, "X-Signature: a", "x-signature: b", query=query)
    async with running_server(server, recorder := RecordingInbox()) as port:
        response = await send_raw(port, head)

    ((_, headers),) = recorder.delivered
    (url,) = recorder.urls
    assert response.status == 200
    assert header_values(headers, "X-Signature") == ["a", "b"]
    assert url is not None
    assert url.endswith(query)
    assert token_of(url) == "to-k_en"


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
async def test_response_to_each_error(
    server: str, error: Exception, status: int, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Each error has its status and a fixed text; its message, and unexpected errors, go to the log."""
    async with running_server(server, RecordingInbox(error)) as port:
        response = await send_raw(port, request_head(2) + b"{}")

    assert (response.status, response.text) == (status, text)
    assert SECRET not in str(response)
    (record,) = (record for record in caplog.records if record.name == "flux2max_async.webhooks")
    assert (record.exc_info is not None and record.exc_info[1] is error) == (status == 500)
    assert record.levelno == (logging.ERROR if status == 500 else logging.WARNING)


class FailingJournal(VirtualJournal):
    async def find_task(self, task_id: str, /) -> JournalEntry | None:
        raise JournalError("the disk is full")


async def test_inbox_responses(
    server: str, gateway: Emulator, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """An inbox accepts signed and readable deliveries while its session is open and its journal works."""
    inbox = WebhookInbox(secret=SECRET, public_url="http://127.0.0.1/hooks")
    async with running_server(server, inbox) as port:
        before = await send_raw(port, signed_request())
        async with FluxSession(gateway.api_key, base_url=gateway.url, webhooks=inbox):
            inside = [
                await send_raw(port, signed_request(*arguments))
                for arguments in ((), (), (BODY, "whist"), (b"{",), (b'{"id": "t1"}',))
            ]
        after = await send_raw(port, signed_request())
        journal = FailingJournal(tmp_path / "journal.db")
        async with FluxSession(gateway.api_key, base_url=gateway.url, webhooks=inbox, journal=journal):
            unrecorded = await send_raw(port, signed_request())

    assert [response.status for response in inside] == [200, 200, 401, 400, 400]
    assert [response.status for response in (before, after, unrecorded)] == [503] * 3
    assert not logged_errors(caplog)
    assert SECRET not in caplog.text


@pytest.mark.parametrize("method", ["GET", "PUT", "HEAD", "OPTIONS", "DELETE"])
async def test_only_post_is_allowed(server: str, method: str) -> None:
    """Any method but POST is a 405 that allows only POST, and nothing is delivered."""
    async with running_server(server, recorder := RecordingInbox()) as port:
        response = await send_raw(port, request_head(len(BODY), method=method) + BODY)

    assert (response.status, response.headers["allow"]) == (405, "POST")
    assert response.text == ("" if method == "HEAD" else "POST only")
    assert not recorder.delivered


async def test_too_large_body_is_refused_early(server: str, caplog: pytest.LogCaptureFixture) -> None:
    """A declared size over the limit is refused before the body, and a growing body once it exceeds the limit."""
    async with running_server(server, recorder := RecordingInbox()) as port:
        declared = await send_raw(port, request_head(MAX_BODY + 1))
        absurd = await send_raw(port, request_head(10**18))
        growing = await send_raw(port, request_head(), *[http_chunk(b" " * 100_000)] * 10, http_chunk(b" "))

    assert [(response.status, response.text) for response in (declared, absurd, growing)] == [(413, "too large")] * 3
    assert not recorder.delivered
    assert not logged_errors(caplog)


# ---------------------------------------------------------------------- senders that disconnect


def reset_connection(writer: StreamWriter) -> None:
    linger = struct.pack("ii", 1, 0)
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    writer.transport.abort()


@pytest.mark.parametrize("disconnect", [StreamWriter.close, StreamWriter.write_eof, reset_connection])
@pytest.mark.parametrize("length", [len(BODY) + 1, None])
async def test_sender_disconnects(
    server: str, length: int | None, disconnect: Callable[[StreamWriter], None], caplog: pytest.LogCaptureFixture
) -> None:
    """An incomplete delivery is dropped without an error in the log; the next one is accepted."""
    async with running_server(server, recorder := RecordingInbox()) as port:
        async with connected(port) as (_, writer):
            writer.write(request_head(length) + (BODY if length else http_chunk(BODY)))
            await asyncio.sleep(0.1)
            disconnect(writer)
            await asyncio.sleep(1)
        response = await send_raw(port, signed_request())

    assert response.status == 200
    assert [body for body, _ in recorder.delivered] == [BODY]
    assert not logged_errors(caplog)


async def test_body_with_wrong_encoding(caplog: pytest.LogCaptureFixture) -> None:
    """A body that aiohttp can't decompress is a 400, without a traceback."""
    async with running_server("aiohttp", recorder := RecordingInbox()) as port:
        response = await send_raw(port, request_head(len(BODY), "Content-Encoding: gzip") + BODY)

    assert (response.status, response.text) == (400, "unreadable")
    assert not recorder.delivered
    assert not any(record.name.startswith("flux2max_async") for record in caplog.records)


async def test_middleware_read_the_body() -> None:
    """A body that a middleware has already read is delivered all the same."""

    @web.middleware
    async def read_body(request: web.Request, handler: Callable[[web.Request], Awaitable[Any]]) -> Any:
        bodies_read.append(await request.read())
        return await handler(request)

    bodies_read: list[bytes] = []
    async with running_server("aiohttp", recorder := RecordingInbox(), middlewares=[read_body]) as port:
        response = await send_raw(port, signed_request())

    assert response.status == 200
    assert [body for body, _ in recorder.delivered] == bodies_read == [BODY]


# ---------------------------------------------------------------------- ASGI

SIGNED = [(b"x-bfl-signature", ANY_SIGNATURE.encode())]


def test_detected_as_asgi_3() -> None:
    """A server that guesses the ASGI version detects ASGI 3."""
    config = uvicorn.Config(RecordingInbox().asgi, log_config=None)
    config.load()

    assert config.interface == "asgi3"


async def run_asgi(
    scope: dict[str, Any], *events: dict[str, Any], recorder: RecordingInbox | None = None
) -> list[MutableMapping[str, Any]]:
    """Run the application on one connection with the given events, and return the messages it sends."""
    pending_events, messages = list(events), list[MutableMapping[str, Any]]()

    async def receive() -> dict[str, Any]:
        return pending_events.pop(0)

    async def send(message: MutableMapping[str, Any]) -> None:
        messages.append(message)

    await (recorder or RecordingInbox()).asgi(scope, receive, send)
    assert not pending_events
    return messages


async def test_path_that_looks_like_a_query() -> None:
    """A question mark or hash in the decoded path is no query; a scope without a path or query is accepted."""
    recorder = RecordingInbox()
    path = "/hooks?flux2max_submit=forged#"
    scope = {"type": "http", "method": "POST", "headers": SIGNED}
    await run_asgi(scope, {"type": "http.request"}, recorder=recorder)
    await run_asgi(scope | {"path": path, "query_string": b"x=1"}, {"type": "http.request"}, recorder=recorder)
    await run_asgi(scope | {"path": "/\udcff", "query_string": b"\xff"}, {"type": "http.request"}, recorder=recorder)

    assert recorder.urls == ["?", "/hooks%3Fflux2max_submit%3Dforged%23?x=1", "/%3F?\xff"]


async def test_lifespan() -> None:
    """Lifespan startup and shutdown complete at once."""
    messages = await run_asgi({"type": "lifespan"}, {"type": "lifespan.startup"}, {"type": "lifespan.shutdown"})

    assert [message["type"] for message in messages] == ["lifespan.startup.complete", "lifespan.shutdown.complete"]


async def test_websocket_is_refused() -> None:
    """A websocket is closed before it is accepted, which servers answer with an HTTP error."""
    messages = await run_asgi({"type": "websocket", "path": PATH}, {"type": "websocket.connect"})

    assert messages == [{"type": "websocket.close", "code": 1000}]


async def test_servers_refuse_a_websocket(server: str, caplog: pytest.LogCaptureFixture) -> None:
    """A websocket request gets an HTTP error, whether or not the server supports websockets."""
    upgrade = ("Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13")
    key = "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ=="
    async with running_server(server, recorder := RecordingInbox()) as port:
        response = await send_raw(port, request_head(0, *upgrade, key, method="GET"))

    assert response.status in {403, 405}
    assert not recorder.delivered
    assert not logged_errors(caplog)


@pytest.mark.parametrize(("declared", "status"), [(b"9" * 5_000, 413), (b"-1", 200), (b"\xb2", 200), (b"0", 200)])
async def test_invalid_content_length(declared: bytes, status: int) -> None:
    """A Content-Length that is not a number is ignored; a number of thousands of digits is too large."""
    scope = {"type": "http", "method": "POST", "headers": [(b"content-length", declared), *SIGNED]}
    events = [{"type": "http.request"}] if status == 200 else []
    start, body = await run_asgi(scope, *events)

    assert all(name.islower() for name, _ in start["headers"])
    assert (start["status"], body["body"]) == (status, b"ok" if status == 200 else b"too large")
