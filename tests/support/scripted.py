"""A gateway on a real socket that does as it is told, down to the byte: what no well-behaved server would do."""

import asyncio
import json
import socket
import struct
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from types import TracebackType
from typing import Any, Self

import anyio
import attrs

from flux2max_async import FixedSchedule, FluxSession

Behaviour = Callable[["Connection"], Awaitable[None]]


@attrs.frozen
class Received:
    """A call as it came in."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes
    at: float
    """The moment on the loop's clock."""

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
    """One call and the connection on which its answer goes."""

    call: Received
    writer: asyncio.StreamWriter

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    def reset(self) -> None:
        """Break the connection with a reset."""
        connection = self.writer.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()


class ScriptedGateway:
    """Answers submits, polls and downloads from three scripts; the last line of a script is repeated."""

    api_key = "test-key-1234567890"

    def __init__(self) -> None:
        self.submits: deque[Behaviour] = deque([answer(200, {"id": "t1", "status": "in_progress"})])
        self.polls: deque[Behaviour] = deque([answer(200, completed("t1"))])
        self.downloads: deque[Behaviour] = deque([answer(404, {})])
        self.received: list[Received] = []
        self.connections = 0
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    def of(self, method: str) -> list[Received]:
        """The calls with a method."""
        return [call for call in self.received if call.method == method]

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
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
            while not writer.is_closing() and (call := await _receive(reader)) is not None:
                self.received.append(call)
                script = self._script(call)
                behave = script.popleft() if len(script) > 1 else script[0]
                await behave(Connection(call, writer))
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            writer.close()
            self._tasks.discard(task)

    def _script(self, call: Received) -> deque[Behaviour]:
        if call.method == "POST":
            return self.submits
        return self.polls if "/task/" in call.path else self.downloads


async def _receive(reader: asyncio.StreamReader) -> Received | None:
    head = await reader.readuntil(b"\r\n\r\n")
    line, *lines = head.decode("latin-1").split("\r\n")
    method, path, _ = line.split(" ")
    headers = dict(header.split(": ", 1) for header in lines if header)
    body = await reader.readexactly(int(headers.get("Content-Length", "0")))
    return Received(method, path, headers, body, anyio.current_time())


# ---------------------------------------------------------------------- behaviours


def answer(status: int, body: object, headers: Iterable[tuple[str, str]] = (), *, after: float = 0.0) -> Behaviour:
    """Answer with JSON (or bytes as they are), `after` seconds, on a connection that stays open."""

    async def behave(connection: Connection) -> None:
        await asyncio.sleep(after)
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        head = [f"HTTP/1.1 {status} Whatever", f"Content-Length: {len(content)}"]
        head += [f"{name}: {value}" for name, value in headers]
        await connection.send("\r\n".join([*head, "", ""]).encode() + content)

    return behave


def raw(data: bytes, *, then: str = "close", after: float = 0.0) -> Behaviour:
    """Send these bytes, then "close" the connection, "reset" it, or "hang"."""

    async def behave(connection: Connection) -> None:
        await asyncio.sleep(after)
        await connection.send(data)
        match then:
            case "close":
                connection.writer.close()
            case "reset":
                connection.reset()
            case _:
                await asyncio.sleep(100_000)

    return behave


hang = raw(b"", then="hang")
reset = raw(b"", then="reset")
disconnect = raw(b"", then="close")
half = raw(b'HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n{"id": "t1", "sta')
half_hang = raw(b'HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n{"id": "t1", "sta', then="hang")
no_http = raw(b"SSH-2.0-OpenSSH_9.2\r\n\r\n")
html = answer(200, b"<html><h1>Welcome to nginx!</h1></html>", [("Content-Type", "text/html")])


def running(task_id: str = "t1", **more: object) -> dict[str, object]:
    """A task object that is still running."""
    return {"id": task_id, "status": "in_progress", "model": "flux_2_max", "created_at": 1763800000, **more}


def completed(task_id: str = "t1", url: str = "https://pictures.example/0.jpeg", **more: object) -> dict[str, object]:
    """A task object that is completed with one picture."""
    return {
        "id": task_id,
        "status": "completed",
        "model": "flux_2_max",
        "created_at": 1763800000,
        "progress": 1.0,
        "output": [{"content": [{"type": "image", "url": url, "jobId": "j1"}]}],
        "usage": {"cost": "0.07", "discount": 1},
        "metadata": {},
        **more,
    }


# ---------------------------------------------------------------------- sessions


def session_on(scripted: ScriptedGateway, **options: object) -> FluxSession:
    return FluxSession(scripted.api_key, base_url=scripted.url, schedule=FixedSchedule(1.0), **options)  # type: ignore[arg-type]
