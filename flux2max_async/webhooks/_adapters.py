"""HTTP endpoints for deliveries: ASGI and aiohttp.

The response tells the sender only whether to send the delivery again: 200 means that it need not, 5xx that it should.
"""

from collections.abc import AsyncGenerator, Awaitable, Callable, MutableMapping
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import quote

import attrs

from flux2max_async._exceptions import JournalError, ProtocolError, SessionClosedError, WebhookSignatureError
from flux2max_async.webhooks._bodies import BodyReader, BodyRefusedError
from flux2max_async.webhooks._headers import HeadersLike
from flux2max_async.webhooks._monitor import DeliveryMonitor, Kind

if TYPE_CHECKING:
    from aiohttp import web

Message = MutableMapping[str, Any]

_RESPONSE_TEXTS = {
    200: "ok",
    400: "unreadable",
    401: "wrong signature",
    405: "POST only",
    408: "too slow",
    413: "too large",
    500: "failed",
    503: "not now",
}
_RETRY_AFTER = 5
"""Seconds."""
_REFUSED_BODIES: dict[int, Kind] = {408: "too_slow", 413: "too_large", 503: "too_many"}


class Deliver(Protocol):
    """Processes one delivery, and records it if it fails with an expected error."""

    async def __call__(self, body: bytes, headers: HeadersLike, *, url: str | None) -> None:
        """Process a delivery to a URL, or to a path with a query."""


@attrs.frozen(eq=False)
class Endpoint:
    """What the endpoints of an inbox have in common."""

    deliver: Deliver
    bodies: BodyReader
    monitor: DeliveryMonitor

    async def process(self, method: str, url: str, headers: HeadersLike, body: AsyncGenerator[bytes]) -> int:
        """Process a request and return the HTTP status of the response.

        Raises:
            ConnectionError: The body is incomplete.
        """
        if method != "POST":
            return 405
        try:
            with self.monitor.recording("forged", WebhookSignatureError):
                content = await self.bodies.read(headers, body)
        except WebhookSignatureError:
            return 401
        except BodyRefusedError as error:
            self.monitor.record(_REFUSED_BODIES[error.status], error)
            return error.status
        try:
            await self.deliver(content, headers, url=url)
        except WebhookSignatureError:
            return 401
        except ProtocolError:
            return 400
        except (SessionClosedError, JournalError):
            return 503
        except Exception as error:  # noqa: BLE001 - it is logged
            self.monitor.record("failed", type(error).__name__, error=error)
            return 500
        return 200


class AsgiApp:
    """An ASGI application that accepts deliveries on any path."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint

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
                    status = await self._endpoint.process(scope["method"], url, headers, _asgi_body(receive))
                except ConnectionError:
                    return  # the sender has disconnected
                await send({"type": "http.response.start", "status": status, "headers": _asgi_headers(status, scope)})
                await send({"type": "http.response.body", "body": _RESPONSE_TEXTS[status].encode()})
            case "lifespan":
                # Needed if the application is served on its own and the server requires lifespan support.
                for event in ("startup", "shutdown"):
                    await receive()
                    await send({"type": f"lifespan.{event}.complete"})
            case _:
                await receive()
                await send({"type": "websocket.close", "code": 1000})


async def aiohttp_response(endpoint: Endpoint, request: "web.Request") -> "web.Response":
    """Process the delivery in a request to an aiohttp server and return the response."""
    from aiohttp import web  # noqa: PLC0415 - other servers don't need aiohttp.web

    try:
        status = await endpoint.process(request.method, request.path_qs, request.headers, _aiohttp_body(request))
    except ConnectionError:
        status = 400  # sent only if the sender is still connected
    return web.Response(status=status, text=_RESPONSE_TEXTS[status], headers=_extra_headers(status))


async def _aiohttp_body(request: "web.Request") -> AsyncGenerator[bytes]:
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
    return f"{quote(scope.get('path', ''), errors='replace')}?{scope.get('query_string', b'').decode('latin-1')}"


async def _asgi_body(receive: Callable[[], Awaitable[Message]]) -> AsyncGenerator[bytes]:
    more_body = True
    while more_body:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ConnectionResetError
        yield message.get("body", b"")
        more_body = message.get("more_body", False)


def _extra_headers(status: int) -> dict[str, str]:
    match status:
        case 405:
            return {"Allow": "POST"}
        case 408:
            return {"Connection": "close"}  # or the rest of the body would keep it open
        case 503:
            return {"Retry-After": str(_RETRY_AFTER)}
        case _:
            return {}


def _asgi_headers(status: int, scope: Message) -> list[tuple[bytes, bytes]]:
    headers = {"Content-Type": "text/plain; charset=utf-8", "Content-Length": str(len(_RESPONSE_TEXTS[status]))}
    headers |= _extra_headers(status)
    if not scope.get("http_version", "1.1").startswith("1"):
        headers.pop("Connection", None)  # HTTP/2 forbids it
    return [(name.lower().encode(), value.encode()) for name, value in headers.items()]
