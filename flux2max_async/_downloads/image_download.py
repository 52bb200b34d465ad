"""Downloads that a caller iterates over."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine, Generator
from functools import partial
from types import TracebackType
from typing import Any, Self

from flux2max_async._downloads.sinks import Sink, StreamSink
from flux2max_async._exceptions import DownloadError, SessionClosedError

Download = Callable[[Sink], Coroutine[Any, Any, str]]
Spawn = Callable[[Coroutine[Any, Any, str]], "asyncio.Task[str]"]


class ImageDownload(AsyncIterator[bytes]):
    """One download of an image, which yields its bytes as they come.

    `async with session.download(image) as download:` begins it, and so does `download = await session.download(image)`,
    for a web handler, which must know the type before its response begins:
    `return StreamingResponse(download, media_type=download.content_type)`.

    It is resumed where it was cut; no byte is yielded twice. It closes itself at its end, at an error, when its
    iteration is cancelled, and when it is dropped. While nobody takes its bytes, it holds 1 MB of them, and after 10 s,
    if the server can continue it later, no connection.
    """

    # States: new, begun (by `_begin()`), ended. The work is a task of the session, which refers to the sink and not to
    # this object, so that dropping this is noticed; cancelling the task ends its connection.

    def __init__(self, download: Download, spawn: Spawn) -> None:
        self._download = download
        self._spawn = spawn
        self._sink: StreamSink | None = None
        self._work: asyncio.Task[str] | None = None
        self._is_closed = False

    @property
    def content_type(self) -> str:
        """The media type, which the bytes show, whatever the server says: "image/jpeg", for example."""
        return f"image/{self._get_sink().image_format}"

    @property
    def size(self) -> int | None:
        """The size in bytes; None if the server doesn't report it."""
        return self._get_sink().size

    def __await__(self) -> Generator[Any, None, Self]:
        return self._begin().__await__()

    async def __aenter__(self) -> Self:
        return await self._begin()

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None, /
    ) -> None:
        await self.aclose()

    async def __anext__(self) -> bytes:
        if self._is_closed:
            raise StopAsyncIteration
        await self._begin()
        try:
            data = await self._get_sink().take()
        except BaseException:
            self._cancel()
            raise
        if not data:
            self._is_closed = True
            raise StopAsyncIteration
        return data

    async def aclose(self) -> None:
        """End the download, and wait until its connection is free again."""
        self._cancel()
        if self._work is not None and not self._work.done():
            await asyncio.wait([self._work])

    def __del__(self) -> None:
        # This may be another thread, or after the event loop's end.
        work: asyncio.Task[str] | None = getattr(self, "_work", None)
        if work is not None and not work.done():
            with contextlib.suppress(RuntimeError):
                work.get_loop().call_soon_threadsafe(work.cancel)

    async def _begin(self) -> Self:
        if self._is_closed:
            return self
        if self._sink is None:
            self._sink = sink = StreamSink()
            self._work = self._spawn(self._download(sink))
            self._work.add_done_callback(partial(_on_done, sink))
        try:
            await self._sink.wait_for_beginning()
        except BaseException:
            self._cancel()
            raise
        return self

    def _cancel(self) -> None:
        self._is_closed = True
        if self._work is not None:
            self._work.cancel()

    def _get_sink(self) -> StreamSink:
        if self._sink is None or self._sink.image_format is None:
            raise DownloadError("the download has not begun: await it, or enter it with `async with`")
        return self._sink


def _on_done(sink: StreamSink, work: "asyncio.Task[str]") -> None:
    if work.cancelled():
        sink.end(SessionClosedError("the session was closed before the download had ended"))
    else:
        sink.end(work.exception())
