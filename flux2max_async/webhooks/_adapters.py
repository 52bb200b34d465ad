"""HTTP endpoints for deliveries: ASGI and aiohttp.

The response tells the sender only whether to send the delivery again: 200 means that it need not, 5xx that it should.
"""

from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import quote

from flux2max_async._exceptions import JournalError, ProtocolError, SessionClosedError, WebhookSignatureError
from flux2max_async._text import get_logger
from flux2max_async.webhooks._headers import HeadersLike, header_values
from flux2max_async.webhooks._payload import MAX_BODY

if TYPE_CHECKING:
    from aiohttp import web

log = get_logger("webhooks")

Message = MutableMapping[str, Any]

_RESPONSE_TEXTS = {
    200: "ok",
    400: "unreadable",
    401: "wrong signature",
    405: "POST only",
    413: "too large",
    500: "failed",
    503: "not now",
}


class Deliver(Protocol):
    """Processes one delivery."""

    async def __call__(self, body: bytes, headers: HeadersLike, *, url: str | None) -> None:
        """Process a delivery to a URL, or to a path with a query."""


class AsgiApp:
    """An ASGI application that accepts deliveries on any path."""

    def __init__(self, deliver: Deliver) -> None:
        self._deliver = deliver

    async def __call__(
        self,
        scope: Message,
        receive: Callable[[], Awaitable[Message]],
        send: Callable[[Message], Awaitable[None]],
    ) -> None:
        """Handle one ASGI connection."""
        match scope["type"]:
            case "http":
                headers, url = list(scope["headers"]), _asgi_url(scope)
                try:
                    status = await _process(self._deliver, scope["method"], url, headers, _asgi_body(receive))
                except ConnectionError:
                    return  # the sender has disconnected
                await send({"type": "http.response.start", "status": status, "headers": _asgi_headers(status)})
                await send({"type": "http.response.body", "body": _RESPONSE_TEXTS[status].encode()})
            case "lifespan":
                # Needed if the application is served on its own and the server requires lifespan support.
                for event in ("startup", "shutdown"):
                    await receive()
                    await send({"type": f"lifespan.{event}.complete"})
            case _:
                await receive()
                await send({"type": "websocket.close", "code": 1000})


async def aiohttp_response(deliver: Deliver, request: "web.Request") -> "web.Response":
    """Process the delivery in a request to an aiohttp server and return the response."""
    from aiohttp import web  # noqa: PLC0415 - other servers don't need aiohttp.web

    try:
        status = await _process(deliver, request.method, request.path_qs, request.headers, _aiohttp_body(request))
    except ConnectionError:
        status = 400  # sent only if the sender is still connected
    return web.Response(status=status, text=_RESPONSE_TEXTS[status], headers=_extra_headers(status))


async def _process(deliver: Deliver, method: str, url: str, headers: HeadersLike, body: AsyncIterator[bytes]) -> int:
    """Process a delivery and return the HTTP status of the response.

    Raises:
        ConnectionError: The body is incomplete.
    """
    if method != "POST":
        return 405
    if _content_length(headers) > MAX_BODY:
        return 413
    content = bytearray()
    async for chunk in body:
        content += chunk
        if len(content) > MAX_BODY:
            return 413
    try:
        await deliver(bytes(content), headers, url=url)
    except WebhookSignatureError as error:
        log.warning("webhook refused: %s", error)
        return 401
    except ProtocolError as error:
        log.warning("webhook unreadable: %s", error)
        return 400
    except (SessionClosedError, JournalError) as error:
        log.warning("webhook not processed; the service may send it again: %s", error)
        return 503
    except Exception:
        log.exception("webhook failed with an unexpected error")
        return 500
    return 200


def _content_length(headers: HeadersLike) -> int:
    """Return the declared length, or 0 if it is missing or not a number."""
    declared = next(iter(header_values(headers, "Content-Length")), "")
    # int() refuses texts of thousands of digits; the first 20 digits already exceed the limit.
    return int(declared[:20]) if declared.isascii() and declared.isdigit() else 0


async def _aiohttp_body(request: "web.Request") -> AsyncIterator[bytes]:
    try:
        if request.content.at_eof():
            yield await request.read()  # a middleware may have read the body already; the request caches it
        async for chunk in request.content.iter_any():
            yield chunk
    except Exception as error:
        # The sender has disconnected, or the body doesn't match its headers. The type of the error depends on which
        # parser aiohttp uses.
        raise ConnectionResetError from error


def _asgi_url(scope: Message) -> str:
    """Return the path and the query; ASGI decodes the former and leaves the latter as it came."""
    return f"{quote(scope.get('path', ''))}?{scope.get('query_string', b'').decode('latin-1')}"


async def _asgi_body(receive: Callable[[], Awaitable[Message]]) -> AsyncIterator[bytes]:
    more_body = True
    while more_body:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ConnectionResetError
        yield message.get("body", b"")
        more_body = message.get("more_body", False)


def _extra_headers(status: int) -> dict[str, str]:
    return {"Allow": "POST"} if status == 405 else {}


def _asgi_headers(status: int) -> list[tuple[bytes, bytes]]:
    headers = {"Content-Type": "text/plain; charset=utf-8", "Content-Length": str(len(_RESPONSE_TEXTS[status]))}
    return [(name.lower().encode(), value.encode()) for name, value in {**headers, **_extra_headers(status)}.items()]
