"""HTTP responses of the emulator, and what is left of them when a connection fails."""

import math
import secrets
import socket
import struct
import time
from collections.abc import Mapping
from email.utils import formatdate
from typing import Any

from aiohttp import web

from flux2max_async.emulator._answers import Answer, error, fill
from flux2max_async.emulator._validation import ServiceError


def build_response(answer: Answer, time_scale: float, values: Mapping[str, Any] | None = None) -> web.Response:
    """Return the response for an entry of the tables.

    Args:
        answer: The entry.
        time_scale: Seconds of the service per real second.
        values: What the placeholders stand for, besides those for the time to wait.
    """
    wait = answer.wait / time_scale
    # Whole seconds are all that a date can express.
    values = {"wait": wait, "date": formatdate(math.ceil(time.time() + wait), usegmt=True), **(values or {})}
    headers: dict[str, str] = fill(dict(answer.headers), values)
    match fill(answer.body, values):
        case dict() as body:
            headers["X-Request-Id"] = secrets.token_hex(8)
            return web.json_response(body, status=answer.status, headers=headers)
        case "":
            return web.Response(status=answer.status, headers=headers)
        case page:
            is_html = page.startswith("<html>")
            content_type = "text/html" if is_html else "text/plain"
            return web.Response(status=answer.status, text=page, content_type=content_type, headers=headers)


def error_response(failure: ServiceError) -> web.Response:
    """Return the response for an error of the service."""
    headers = {} if failure.retry_after is None else {"Retry-After": f"{failure.retry_after:g}"}
    values = {"code": failure.code, "message": failure.message}
    return build_response(Answer(failure.status, error("{code}", "{message}"), headers), 1.0, values)


def reset(request: web.Request) -> web.Response:
    """Reset the TCP connection, as a crashed proxy does."""
    if request.transport is not None:  # pragma: no branch - None if the client has just disconnected
        connection: socket.socket = request.transport.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        request.transport.abort()
    return web.Response()  # aiohttp needs one, but cannot send it


async def send_half(request: web.Request, response: web.StreamResponse) -> web.StreamResponse:
    """Send the headers and half of the body, then close the connection."""
    assert isinstance(response, web.Response)
    body = response.body or b""
    assert isinstance(body, bytes)
    partial = web.StreamResponse(status=response.status, headers=response.headers)
    partial.content_length = len(body)
    await partial.prepare(request)
    await partial.write(body[: len(body) // 2])
    if request.transport is not None:  # pragma: no branch - None if the client has just disconnected
        request.transport.close()
    return partial


def send_half_without_length(request: web.Request, body: bytes, content_type: str) -> web.Response:
    """Send half of a body whose end only the closed connection marks."""
    if request.transport is not None:  # pragma: no branch - None if the client has just disconnected
        # Not with aiohttp, which sends chunks if there is no length, and the last one would be missed.
        head = f"HTTP/1.1 200 OK\r\nContent-Type: {content_type}\r\nConnection: close\r\n\r\n"
        request.transport.write(head.encode() + body[: len(body) // 2])
        request.transport.close()
    return web.Response()  # aiohttp needs one, but cannot send it
