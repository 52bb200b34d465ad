"""The bodies of deliveries: what is refused before and while they are read, on real servers."""

import asyncio
import contextlib
import threading
from asyncio import StreamReader, StreamWriter
from collections import deque
from typing import Any

import anyio
import pytest
from support.endpoints import (
    ANY_SIGNATURE,
    ASGI,
    BODY,
    SECRET,
    HttpResponse,
    RecordingInbox,
    connected,
    http_chunk,
    read_response,
    request_head,
    running_server,
    send_raw,
    signed_request,
)
from support.scripted import ScriptedGateway, answer, completed
from support.webhooks import RARE_POLLS, InboxServer, session_on

from flux2max_async import WebhookInbox
from flux2max_async.webhooks import MAX_BODY, WebhookStats
from flux2max_async.webhooks._bodies import MAX_BODIES, BodyReader

HALF_REQUEST = request_head(len(BODY)) + BODY[:5]


@pytest.fixture(params=["aiohttp", *ASGI])
def server(request: pytest.FixtureRequest) -> str:
    """Parametrize over each kind of server."""
    return str(request.param)


# ---------------------------------------------------------------------- before the body


@pytest.mark.parametrize("length", [len(BODY), MAX_BODY + 1, None])
@pytest.mark.parametrize("signature", [None, "", "00", f"{'0' * 64},{'1' * 64}", ", ".join([ANY_SIGNATURE] * 100)])
async def test_no_signature(server: str, signature: str | None, length: int | None) -> None:
    """A delivery without a signature is a 401 before a byte of its body has been sent, whatever its length."""
    async with running_server(server, inbox := RecordingInbox()) as port:
        response = await send_raw(port, request_head(length, signature=signature))

    assert (response.status, response.text) == (401, "wrong signature")
    assert not inbox.delivered
    assert inbox.monitor.stats == WebhookStats(forged=1)


TOO_LARGE = b" " * 5_000_000
REFUSED_WHILE_SENT = {
    "no signature": (request_head(len(TOO_LARGE), signature=None), TOO_LARGE, 401),
    "length over the limit": (request_head(len(TOO_LARGE)), TOO_LARGE, 413),
    "chunks over the limit": (request_head(), http_chunk(TOO_LARGE) + http_chunk(b""), 413),
    "not a POST": (request_head(len(TOO_LARGE), method="PUT"), TOO_LARGE, 405),
}


@pytest.mark.parametrize("refused", REFUSED_WHILE_SENT)
async def test_sender_reads_the_response(server: str, refused: str) -> None:
    """A sender that is still sending a refused body gets the response, and no part of that body is a request."""
    head, body, status = REFUSED_WHILE_SENT[refused]
    # Whoever took the body for requests would see these.
    body = body[:2_000_000] + signed_request() + body[2_000_000 + len(signed_request()) :]
    async with running_server(server, inbox := RecordingInbox()) as port, connected(port) as (reader, writer):
        writer.write(head + body + signed_request())
        first = await read_response(reader)
        await writer.drain()
        second = await read_response(reader)

    assert (first.status, second.status) == (status, 200)
    assert [delivered for delivered, _ in inbox.delivered] == [BODY]


# ---------------------------------------------------------------------- slow bodies


@pytest.mark.parametrize("length", [len(BODY), None])
async def test_slow_body(server: str, length: int | None) -> None:
    """A body that has not arrived after 10 s, however steadily it trickles, is a 408, and the connection is closed."""
    async with running_server(server, inbox := RecordingInbox()) as port, connected(port) as (reader, writer):
        start = anyio.current_time()
        writer.write(request_head(length))
        trickle = asyncio.ensure_future(_trickle(writer, BODY if length else http_chunk(BODY)))
        response = await read_response(reader)
        elapsed = anyio.current_time() - start
        trickle.cancel()
        with contextlib.suppress(ConnectionError):
            assert await reader.read() == b""
        after = await send_raw(port, signed_request())

    assert (response.status, response.text, response.headers["connection"]) == (408, "too slow", "close")
    assert elapsed == pytest.approx(10.0, abs=0.5)
    assert after.status == 200
    assert len(inbox.delivered) == 1
    assert inbox.monitor.stats == WebhookStats(too_slow=1)


async def _trickle(writer: StreamWriter, data: bytes) -> None:
    for byte in data:
        writer.write(bytes([byte]))
        await asyncio.sleep(1.0)


async def test_body_that_takes_its_time(server: str) -> None:
    """A body that takes 9 s is accepted."""
    async with running_server(server, inbox := RecordingInbox()) as port, connected(port) as (reader, writer):
        writer.write(HALF_REQUEST)
        await asyncio.sleep(9.0)
        writer.write(BODY[5:])
        response = await read_response(reader)

    assert response.status == 200
    assert [body for body, _ in inbox.delivered] == [BODY]


# ---------------------------------------------------------------------- many bodies


async def test_too_many_bodies(server: str) -> None:
    """While 64 bodies are being read, another delivery is a 503 with Retry-After, and nothing of these 64 is lost."""
    async with running_server(server, inbox := RecordingInbox()) as port, contextlib.AsyncExitStack() as stack:
        others = [await _half_sent(port, stack) for _ in range(MAX_BODIES)]
        refused = await send_raw(port, signed_request())
        responses = [await _complete(*other) for other in others]
        accepted = await send_raw(port, signed_request())

    assert (refused.status, refused.text, refused.headers["retry-after"]) == (503, "not now", "5")
    assert {response.status for response in (*responses, accepted)} == {200}
    assert [body for body, _ in inbox.delivered] == [BODY] * (MAX_BODIES + 1)
    assert inbox.monitor.stats == WebhookStats(too_many=1)


@pytest.mark.parametrize("rest", ["disconnect", "too large", "too slow", "failure"])
async def test_slots_are_released(server: str, rest: str) -> None:
    """Whatever ends the reading of a body, another can be read then."""
    inbox = RecordingInbox(ValueError() if rest == "failure" else None, bodies=BodyReader(slots=threading.Semaphore(2)))
    async with running_server(server, inbox) as port, contextlib.AsyncExitStack() as stack:
        for _ in range(2):
            reader, writer = await _half_sent(port, stack, request_head())
            match rest:
                case "disconnect":
                    writer.close()
                case "too large":
                    writer.write(http_chunk(TOO_LARGE))
                case "too slow":
                    await read_response(reader)
                case _:
                    writer.write(http_chunk(BODY) + http_chunk(b""))
            await asyncio.sleep(1.0)
        inbox.error = None
        statuses = [(await send_raw(port, signed_request())).status for _ in range(3)]

    assert statuses == [200] * 3


async def _half_sent(
    port: int, stack: contextlib.AsyncExitStack, data: bytes = HALF_REQUEST
) -> tuple[StreamReader, StreamWriter]:
    reader, writer = await stack.enter_async_context(connected(port))
    writer.write(data)
    await asyncio.sleep(0.01)
    return reader, writer


async def _complete(reader: StreamReader, writer: StreamWriter) -> HttpResponse:
    writer.write(BODY[5:])
    return await read_response(reader)


# ---------------------------------------------------------------------- what becomes of the result


async def test_refused_delivery_loses_nothing(scripted: ScriptedGateway, inbox_server: InboxServer) -> None:
    """A delivery with an inline image over the limit is refused, and the final poll still brings the image."""
    image = "iVBORw0KGgo" + "A" * 1_500_000
    task: dict[str, Any] = completed("t1", output=[{"content": [{"type": "image", "b64_json": image}]}])
    scripted.polls = deque([answer(200, task)])
    port = int(inbox_server.inbox.public_url.split(":")[2].split("/")[0])
    async with session_on(scripted, inbox_server.inbox, schedule=RARE_POLLS) as session:
        handle = await session.submit("a cat")
        refused = await send_raw(port, request_head(2_000_000).replace(b"/hooks/flux", b"/hooks"))
        done = await handle

    assert refused.status == 413
    assert done.images[0].url.endswith(image)
    assert inbox_server.inbox.stats == WebhookStats(too_large=1)


async def test_limits_are_those_of_one_inbox(server: str) -> None:
    """Bodies that trickle to one inbox keep no other inbox of the process from accepting deliveries."""
    inboxes = [WebhookInbox(secret=SECRET, public_url="http://127.0.0.1/hooks") for _ in range(2)]
    async with (
        running_server(server, inboxes[0]) as busy_port,
        running_server(server, inboxes[1]) as port,
        contextlib.AsyncExitStack() as stack,
    ):
        for _ in range(MAX_BODIES):
            await _half_sent(busy_port, stack)
        response = await send_raw(port, signed_request())

    assert response.status == 503  # no session is open
    assert [inbox.stats for inbox in inboxes] == [WebhookStats(), WebhookStats(not_processed=1)]


# ---------------------------------------------------------------------- HTTP/2


@pytest.mark.parametrize(("http_version", "closes"), [("1.1", True), ("1.0", True), ("2", False), ("3", False)])
async def test_http_2_has_no_connection_header(http_version: str, closes: bool) -> None:
    """The response to a slow body closes the connection in HTTP/1; later versions forbid that header."""
    messages: list[Any] = []

    async def receive() -> Any:
        await anyio.sleep_forever()

    async def send(message: Any) -> None:
        messages.append(message)

    headers = [(b"x-bfl-signature", ANY_SIGNATURE.encode())]
    scope = {"type": "http", "method": "POST", "headers": headers, "http_version": http_version}
    await RecordingInbox().asgi(scope, receive, send)

    assert messages[0]["status"] == 408
    assert ((b"connection", b"close") in messages[0]["headers"]) == closes
