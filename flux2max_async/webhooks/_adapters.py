"""A delivery over HTTP: how it is read and answered, whichever framework has received it.

The answer says what the sender can do about it and nothing else: 200 means that the delivery needn't come again, 5xx
that it had better.
"""

import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, MutableMapping
from typing import TYPE_CHECKING, Any

from flux2max_async._exceptions import JournalError, ProtocolError, SessionClosedError, WebhookSignatureError
from flux2max_async.webhooks._payload import MAX_BODY

if TYPE_CHECKING:
    from aiohttp import web

log = logging.getLogger("flux2max_async")

Deliver = Callable[[bytes, Mapping[str, str]], Awaitable[None]]
"""Takes in one delivery: its body and its headers."""
Message = MutableMapping[str, Any]

_WORDS = {
    200: "ok",
    400: "unreadable",
    401: "wrong signature",
    405: "POST only",
    413: "too large",
    500: "failed",
    503: "not now",
}


class AsgiApp:
    """An ASGI application that takes deliveries on whatever path it is mounted."""

    def __init__(self, deliver: Deliver) -> None:
        self._deliver = deliver

    async def __call__(
        self,
        scope: Message,
        receive: Callable[[], Awaitable[Message]],
        send: Callable[[Message], Awaitable[None]],
    ) -> None:
        """Answer one request."""
        match scope["type"]:
            case "http":
                headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
                try:
                    status = await _answer(self._deliver, scope["method"], headers, _asgi_body(receive))
                except ConnectionError:
                    return  # the sender has gone in the middle of it
                await send({"type": "http.response.start", "status": status, "headers": _asgi_headers(status)})
                await send({"type": "http.response.body", "body": _WORDS[status].encode()})
            case "lifespan":
                # Served alone, by a server that asks everybody.
                for event in ("startup", "shutdown"):
                    await receive()
                    await send({"type": f"lifespan.{event}.complete"})
            case _:
                await receive()
                await send({"type": "websocket.close", "code": 1000})


async def aiohttp_answer(deliver: Deliver, request: "web.Request") -> "web.Response":
    """Answer one request to an aiohttp server."""
    from aiohttp import web  # noqa: PLC0415 - servers of other kinds do without it

    try:
        status = await _answer(deliver, request.method, request.headers, _aiohttp_body(request))
    except ConnectionError:
        status = 400  # if anybody is there to read it
    return web.Response(status=status, text=_WORDS[status], headers=_headers(status))


async def _answer(deliver: Deliver, method: str, headers: Mapping[str, str], body: AsyncIterator[bytes]) -> int:
    """Take in a delivery, and give the status to answer with.

    Raises:
        ConnectionError: The body breaks off.
    """
    if method != "POST":
        return 405
    if _length(headers) > MAX_BODY:
        return 413
    content = bytearray()
    async for piece in body:
        content += piece
        if len(content) > MAX_BODY:
            return 413
    try:
        await deliver(bytes(content), headers)
    except WebhookSignatureError as error:
        log.warning("webhook refused: %s", error)
        return 401
    except ProtocolError as error:
        log.warning("webhook unreadable: %s", error)
        return 400
    except (SessionClosedError, JournalError) as error:
        log.warning("webhook put off: %s", error)
        return 503
    except Exception:
        log.exception("webhook")
        return 500
    return 200


def _length(headers: Mapping[str, str]) -> int:
    declared = next((value for name, value in headers.items() if name.lower() == "content-length"), "")
    # A number may be too long for int(), and be refused nevertheless.
    return int(declared[:20]) if declared.isascii() and declared.isdigit() else 0


async def _aiohttp_body(request: "web.Request") -> AsyncIterator[bytes]:
    try:
        if request.content.at_eof():
            yield await request.read()  # a middleware may have read it, and the request has kept it
        async for piece in request.content.iter_any():
            yield piece
    except Exception as error:
        # The sender has gone in the middle of it, or it isn't what its headers announce: of what kind the error is
        # depends on aiohttp's parser.
        raise ConnectionResetError from error


async def _asgi_body(receive: Callable[[], Awaitable[Message]]) -> AsyncIterator[bytes]:
    more = True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ConnectionResetError
        yield message.get("body", b"")
        more = message.get("more_body", False)


def _headers(status: int) -> dict[str, str]:
    return {"Allow": "POST"} if status == 405 else {}


def _asgi_headers(status: int) -> list[tuple[bytes, bytes]]:
    headers = {"Content-Type": "text/plain; charset=utf-8", "Content-Length": str(len(_WORDS[status]))}
    return [(name.lower().encode(), value.encode()) for name, value in {**headers, **_headers(status)}.items()]
