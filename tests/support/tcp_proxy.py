"""A TCP proxy that a test can interrupt, between a client and a server that stays up."""

import asyncio
import contextlib
from types import TracebackType
from typing import Self

from anyio.from_thread import start_blocking_portal


class TcpProxy:
    """Forwards connections to a port of 127.0.0.1, in a thread of its own.

    `hold()` is a network that loses every packet: connections stay open, and nothing passes until `resume()`.
    `cut()` ends all connections, and refuses new ones by ending them, until `resume()`.

    Args:
        target: The port.
        delay: Seconds by which each piece of data is held back, in both directions.
    """

    def __init__(self, target: int, *, delay: float = 0.0) -> None:
        self._target = target
        self._delay = delay
        self._passing = asyncio.Event()
        self._is_cut = False
        self._writers: set[asyncio.StreamWriter] = set()
        self._stack = contextlib.ExitStack()
        self.port = 0

    def __enter__(self) -> Self:
        self._portal = self._stack.enter_context(start_blocking_portal())
        self._server = self._portal.call(self._start)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._portal.call(self._stop)
        self._stack.close()

    def hold(self) -> None:
        self._portal.call(self._passing.clear)

    def cut(self) -> None:
        self._portal.call(self._cut)

    def resume(self) -> None:
        self._portal.call(self._resume)

    # ------------------------------------------------------------------ in the thread

    async def _start(self) -> asyncio.Server:
        self._passing.set()
        return await asyncio.start_server(self._accept, "127.0.0.1", 0)

    async def _stop(self) -> None:
        self._server.close()
        self._cut()
        self._passing.set()
        await asyncio.sleep(0)

    def _cut(self) -> None:
        self._is_cut = True
        for writer in self._writers:
            writer.transport.abort()

    def _resume(self) -> None:
        self._is_cut = False
        self._passing.set()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        target: asyncio.StreamWriter | None = None
        try:
            await self._passing.wait()
            if self._is_cut:
                return
            target_reader, target = await asyncio.open_connection("127.0.0.1", self._target)
            self._writers.add(target)
            pumps = [
                asyncio.create_task(self._pump(reader, target)),
                asyncio.create_task(self._pump(target_reader, writer)),
            ]
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)
        except OSError:
            pass  # the server is down: the client's connection ends
        finally:
            for end in filter(None, (writer, target)):
                self._writers.discard(end)
                end.transport.abort()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65_536):
                await asyncio.sleep(self._delay)
                await self._passing.wait()
                writer.write(data)
                await writer.drain()
