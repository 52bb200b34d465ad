"""A gateway at a distance, in virtual time: what is sent arrives later, and connections are closed at bad moments.

Only opening a connection takes no time, because the kernel does it.
"""

import asyncio
import itertools
import json
import re
from types import TracebackType
from typing import Self

import anyio
import attrs

from support.scripted import completed, running

_CHECK_INTERVAL = 0.02


@attrs.frozen
class Submit:
    """A submit that has arrived."""

    prompt: str
    connection: int
    opened: float
    """When its connection was opened, on the event loop's clock."""


@attrs.define
class FarGateway:
    """A server that answers whatever reaches a connection before it closes it. Polls find all tasks running.

    Args:
        idle: Seconds after which it closes idle connections.
        unused: Seconds after which it closes connections that were never used; by default, `idle`.
        requests: Responses after which it closes a connection, unannounced.
        restart: Seconds between two restarts; each closes connections after their next response, or when they have been
            idle for `grace` seconds.
        complaint: What it sends when it closes an idle connection.
        linger: Seconds by which the end of a closed connection comes after what was sent last.
        round_trip: Seconds.
    """

    idle: float = float("inf")
    unused: float | None = None
    requests: int = 0
    restart: float = float("inf")
    grace: float = 1.5
    complaint: bytes = b""
    linger: float = 0.02
    round_trip: float = 0.1
    submits: list[Submit] = attrs.field(factory=list)
    opened: list[float] = attrs.field(factory=list)
    """When each connection was opened."""
    open: "set[_Connection]" = attrs.field(factory=set)
    _started: float = attrs.field(factory=anyio.current_time)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    _server: asyncio.Server = attrs.field(init=False)

    def restarts(self) -> int:
        """Return the number of restarts until now."""
        return int((anyio.current_time() - self._started) / self.restart)

    async def __aenter__(self) -> Self:
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: _Connection(self), "127.0.0.1", 0)
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._server.close()
        for connection in list(self.open):
            connection.transport.abort()
        await asyncio.sleep(0)


class _Connection(asyncio.Protocol):
    """One connection. Its times are those at the gateway, half a round trip after or before those at the client."""

    transport: asyncio.Transport
    _numbers = itertools.count(1)

    def __init__(self, gateway: FarGateway) -> None:
        self._gateway, self._loop = gateway, asyncio.get_running_loop()
        self._delay = gateway.round_trip / 2
        self._buffer, self._answers = b"", 0
        self._is_closed = False
        self._born = gateway.restarts()
        self._number = next(self._numbers)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self._opened = anyio.current_time()
        self._gateway.opened.append(self._opened)
        self._gateway.open.add(self)
        self._loop.call_later(self._delay, self._become_idle)

    def connection_lost(self, exc: Exception | None) -> None:
        self._is_closed = True
        self._gateway.open.discard(self)

    def data_received(self, data: bytes) -> None:
        self._loop.call_later(self._delay, self._arrive, data)

    def _become_idle(self) -> None:
        self._last = anyio.current_time()
        self._close_if_idle()

    def _close_if_idle(self) -> None:
        gateway = self._gateway
        quiet = anyio.current_time() - self._last
        unused = gateway.idle if gateway.unused is None else gateway.unused
        limit = gateway.idle if self._answers else unused
        if self._is_closed:
            return
        if not self._buffer and (quiet >= limit or (gateway.restarts() > self._born and quiet >= gateway.grace)):
            self._send(gateway.complaint, close=True)
        elif min(limit, gateway.restart) < float("inf"):
            self._loop.call_later(_CHECK_INTERVAL, self._close_if_idle)

    def _send(self, data: bytes, *, close: bool) -> None:
        self._is_closed = close
        self._loop.call_later(self._delay, self._deliver, data)
        if close:
            self._loop.call_later(self._delay + self._gateway.linger, self.transport.close)

    def _deliver(self, data: bytes) -> None:
        if not self.transport.is_closing():
            self.transport.write(data)

    def _arrive(self, data: bytes) -> None:
        if self._is_closed:
            return  # lost
        self._buffer += data
        self._last = anyio.current_time()
        if (end := self._buffer.find(b"\r\n\r\n")) < 0:
            return
        head = self._buffer[:end].decode("latin-1")
        length = re.search(r"Content-Length: (\d+)", head)
        size = end + 4 + (int(length[1]) if length else 0)
        if len(self._buffer) < size:
            return
        body, self._buffer = self._buffer[end + 4 : size], b""
        task_id = head.split(" ")[1].rpartition("/")[2]
        if head.startswith("POST"):
            prompt = json.loads(body)["input"][0]["params"]["prompt"]
            self._gateway.submits.append(Submit(prompt, self._number, self._opened))
            task_id = f"t{len(self._gateway.submits)}"
        content = json.dumps(running(task_id) if head.startswith("POST") else completed(task_id)).encode()
        header = f"HTTP/1.1 200 OK\r\nContent-Length: {len(content)}\r\n\r\n"
        self._answers += 1
        is_last = self._answers == self._gateway.requests or self._gateway.restarts() > self._born
        self._send(header.encode() + content, close=is_last)
