"""A server on a real socket whose responses are scripted byte by byte, for faults that no normal server produces."""

import asyncio
import json
import socket
import ssl
import struct
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from types import TracebackType
from typing import Any, Self

import anyio
import attrs

from flux2max_async import FixedSchedule, FluxSession

Behaviour = Callable[["Connection"], Awaitable[None]]
"""How the server responds to one request."""

_HANG_TIME = 100_000.0
"""Seconds; longer than any timeout in the tests."""


@attrs.frozen
class Received:
    """A request that the server received."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes
    at: float
    """When it was received, on the event loop's clock."""

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def params(self) -> dict[str, Any]:
        """The parameters of a submit."""
        params: dict[str, Any] = self.json["input"][0]["params"]
        return params


@attrs.define
class Connection:
    """One request, and the connection for the response to it."""

    call: Received
    writer: asyncio.StreamWriter

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    def reset(self) -> None:
        """Close the connection with a TCP reset."""
        connection = self.writer.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()


class ScriptedGateway:
    """A server that responds to submits, polls and downloads as three scripts say; the last step of each is repeated.

    Args:
        ssl_context: With it, the server speaks TLS.
    """

    api_key = "test-key-1234567890"

    def __init__(self, ssl_context: ssl.SSLContext | None = None) -> None:
        self._ssl_context = ssl_context
        self.submits: deque[Behaviour] = deque([answer(200, {"id": "t1", "status": "in_progress"})])
        self.polls: deque[Behaviour] = deque([answer(200, completed("t1"))])
        self.downloads: deque[Behaviour] = deque([answer(404, {})])
        self.received: list[Received] = []
        self.connections = 0
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def url(self) -> str:
        return f"{'https' if self._ssl_context else 'http'}://127.0.0.1:{self.port}"

    @property
    def port(self) -> int:
        return int(self._server.sockets[0].getsockname()[1])

    def of(self, method: str) -> list[Received]:
        """Return the received requests with a method."""
        return [request for request in self.received if request.method == method]

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=self._ssl_context)
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.connections += 1
        try:
            while not writer.is_closing() and (request := await _receive(reader)) is not None:
                self.received.append(request)
                script = self._script(request)
                behave = script.popleft() if len(script) > 1 else script[0]
                await behave(Connection(request, writer))
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            writer.close()
            self._tasks.discard(task)

    def _script(self, request: Received) -> deque[Behaviour]:
        if request.method == "POST":
            return self.submits
        return self.polls if "/task/" in request.path else self.downloads


async def _receive(reader: asyncio.StreamReader) -> Received | None:
    head = await reader.readuntil(b"\r\n\r\n")
    request_line, *header_lines = head.decode("latin-1").split("\r\n")
    method, path, _ = request_line.split(" ")
    headers = dict(line.split(": ", 1) for line in header_lines if line)
    body = await reader.readexactly(int(headers.get("Content-Length", "0")))
    return Received(method, path, headers, body, anyio.current_time())


# ---------------------------------------------------------------------- behaviours


def answer(status: int, body: object, headers: Iterable[tuple[str, str]] = (), *, after: float = 0.0) -> Behaviour:
    """Respond with JSON, or with bytes as they are, after a delay in seconds; the connection stays open."""

    async def behave(connection: Connection) -> None:
        await asyncio.sleep(after)
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        head = [f"HTTP/1.1 {status} Reason", f"Content-Length: {len(content)}"]
        head += [f"{name}: {value}" for name, value in headers]
        await connection.send("\r\n".join([*head, "", ""]).encode() + content)

    return behave


def raw(data: bytes, *, then: str = "close", after: float = 0.0) -> Behaviour:
    """Send bytes after a delay in seconds, and then "close" the connection, "reset" it, or "hang"."""

    async def behave(connection: Connection) -> None:
        await asyncio.sleep(after)
        await connection.send(data)
        match then:
            case "close":
                connection.writer.close()
            case "reset":
                connection.reset()
            case _:
                await asyncio.sleep(_HANG_TIME)

    return behave


hang = raw(b"", then="hang")
reset = raw(b"", then="reset")
disconnect = raw(b"", then="close")
half = raw(b'HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n{"id": "t1", "sta')
half_hang = raw(b'HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n{"id": "t1", "sta', then="hang")
no_http = raw(b"SSH-2.0-OpenSSH_9.2\r\n\r\n")
html = answer(200, b"<html><h1>Welcome to nginx!</h1></html>", [("Content-Type", "text/html")])


def running(task_id: str = "t1", **fields: object) -> dict[str, object]:
    """Return the task object of a running task."""
    return {"id": task_id, "status": "in_progress", "model": "flux_2_max", "created_at": 1763800000, **fields}


def completed(task_id: str = "t1", url: str = "https://pictures.example/0.jpeg", **fields: object) -> dict[str, object]:
    """Return the task object of a completed task with one image."""
    return {
        "id": task_id,
        "status": "completed",
        "model": "flux_2_max",
        "created_at": 1763800000,
        "progress": 1.0,
        "output": [{"content": [{"type": "image", "url": url, "jobId": "j1"}]}],
        "usage": {"cost": "0.07", "discount": 1},
        "metadata": {},
        **fields,
    }


# ---------------------------------------------------------------------- sessions


def session_on(scripted: ScriptedGateway, **options: object) -> FluxSession:
    return FluxSession(scripted.api_key, base_url=scripted.url, schedule=FixedSchedule(1.0), **options)  # type: ignore[arg-type]
