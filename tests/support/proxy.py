"""A forward proxy on a real socket: CONNECT, and requests with the whole URL."""

import asyncio
import base64
import contextlib
import ssl
from collections.abc import Mapping
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit

import attrs


@attrs.define(eq=False)
class ForwardProxy:
    """A proxy that knows the hosts of a test.

    Args:
        hosts: The port on 127.0.0.1 of each host; others are answered with a 502.
        user: The user and password that it requires, as "user:password".
        refusal: The status that it answers to everything.
        ssl_context: With it, the proxy itself speaks TLS.
    """

    hosts: Mapping[str, int]
    user: str | None = None
    refusal: int | None = None
    ssl_context: ssl.SSLContext | None = None
    tunnels: list[str] = attrs.field(factory=list)
    """The hosts and ports of CONNECTs that were accepted."""
    forwarded: list[str] = attrs.field(factory=list)
    """The URLs of requests that were passed on."""
    refused: int = 0
    heads: list[str] = attrs.field(factory=list)
    """The heads of all requests that it can read."""
    _tasks: "set[asyncio.Task[None]]" = attrs.field(factory=set)
    _server: asyncio.Server = attrs.field(init=False)

    @property
    def port(self) -> int:
        return int(self._server.sockets[0].getsockname()[1])

    @property
    def url(self) -> str:
        """Its URL, with the user and password."""
        user = "" if self.user is None else f"{self.user}@"
        return f"{'https' if self.ssl_context else 'http'}://{user}127.0.0.1:{self.port}"

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=self.ssl_context)
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
        try:
            while await self._answer(reader, writer):
                pass
        except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            writer.close()
            self._tasks.discard(task)

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Answer one request; return whether another one may follow."""
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        self.heads.append(head)
        method, target, _ = head.split("\r\n")[0].split(" ")
        status = self._refusal(head) or (None if self._port(method, target) else 502)
        if status is not None:
            self.refused += 1
            # A proxy reads what follows, so that the client sees its answer and no reset.
            if method != "CONNECT":
                await reader.readexactly(_content_length(head))
            challenge = 'Proxy-Authenticate: Basic realm="test"\r\n' if status == 407 else ""
            writer.write(f"HTTP/1.1 {status} No\r\n{challenge}Content-Length: 2\r\n\r\nNo".encode())
            await writer.drain()
            return method != "CONNECT"
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._port(method, target))
        try:
            if method == "CONNECT":
                self.tunnels.append(target)
                writer.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
                await asyncio.gather(_copy(reader, far_writer), _copy(far_reader, writer))
                return False
            self.forwarded.append(target)
            await self._forward(head, reader, writer, far_reader, far_writer)
            return True
        finally:
            far_writer.close()

    async def _forward(
        self,
        head: str,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        far_reader: asyncio.StreamReader,
        far_writer: asyncio.StreamWriter,
    ) -> None:
        first, *rest, _, _ = head.split("\r\n")
        method, target, version = first.split(" ")
        path = target.split("/", 3)[3]
        lines = [f"{method} /{path} {version}"]
        lines += [line for line in rest if not line.lower().startswith("proxy-")]
        body = await reader.readexactly(_content_length(head))
        far_writer.write("\r\n".join([*lines, "", ""]).encode("latin-1") + body)
        answer = await far_reader.readuntil(b"\r\n\r\n")
        writer.write(answer + await far_reader.readexactly(_content_length(answer.decode("latin-1"))))
        await writer.drain()

    def _refusal(self, head: str) -> int | None:
        if self.refusal is not None:
            return self.refusal
        if self.user is None:
            return None
        expected = f"proxy-authorization: basic {base64.b64encode(self.user.encode()).decode()}".lower()
        return None if expected in head.lower().split("\r\n") else 407

    def _port(self, method: str, target: str) -> int | None:
        host = target.rpartition(":")[0] if method == "CONNECT" else urlsplit(target).hostname
        return self.hosts.get(host or "")


def _content_length(head: str) -> int:
    lines = [line.lower() for line in head.split("\r\n")]
    return next((int(line.partition(":")[2]) for line in lines if line.startswith("content-length:")), 0)


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(65_536):
            writer.write(data)
            await writer.drain()
        writer.close()
