"""Where the bytes of a download go: into a file, into memory, or to a consumer who takes them as they come."""

import asyncio
import hashlib
import io
import os
from collections import deque
from typing import IO

import anyio.to_thread

_BUFFER_BYTES = 1_000_000
_MAX_WAIT = 10.0
"""Seconds for which an attempt waits for the consumer in all. A slow consumer must not hold a connection for hours."""


class ConsumerPausedError(Exception):
    """The consumer takes nothing: the attempt ends, and another one continues when the consumer has caught up."""


class OtherImageError(Exception):
    """The bytes differ from those that the consumer has already."""


class Sink:
    """Where the bytes of an image go, from the first to the last."""

    can_restart: bool = True
    """Whether bytes can be taken back. If not, a repetition of them is compared and left out."""

    @property
    def kept(self) -> int:
        """How many bytes can't be taken back."""
        return 0

    def begin(self, image_format: str, size: int | None) -> None:
        """Learn the image's format and its size in bytes, before the first byte."""

    def restart(self) -> None:
        """Take what follows for the image from its first byte on."""

    async def write(self, data: bytes, *, may_pause: bool = False) -> None:
        """Add bytes.

        Args:
            data: The bytes.
            may_pause: Whether the download can be interrupted and continued.
        """

    async def flush(self) -> None:
        """Write what is buffered, since the attempt ends."""

    async def wait_until_taken(self) -> None:
        """Wait until the consumer, if there is one, has taken everything."""


class FileSink(Sink):
    """Writes into a file, in worker threads.

    Args:
        file: The file.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._buffer = bytearray()
        self._position = 0

    def restart(self) -> None:
        self._buffer.clear()
        self._position = 0

    async def write(self, data: bytes, *, may_pause: bool = False) -> None:  # noqa: ARG002 - a file is always ready
        self._buffer += data
        if len(self._buffer) >= _BUFFER_BYTES:
            await self.flush()

    async def flush(self) -> None:
        def write() -> None:
            self._file.seek(self._position)
            self._file.truncate()
            self._file.write(self._buffer)

        if self._buffer:
            await anyio.to_thread.run_sync(write)
            self._position += len(self._buffer)
            self._buffer.clear()

    async def sync(self) -> None:
        """Write what the operating system has buffered to the disk."""

        def sync() -> None:
            self._file.flush()
            os.fsync(self._file.fileno())

        await anyio.to_thread.run_sync(sync)


class MemorySink(Sink):
    """Keeps the bytes in memory."""

    def __init__(self) -> None:
        self.content = io.BytesIO()

    def restart(self) -> None:
        self.content.seek(0)
        self.content.truncate()

    async def write(self, data: bytes, *, may_pause: bool = False) -> None:  # noqa: ARG002 - memory is always ready
        self.content.write(data)


class StreamSink(Sink):
    """Passes the bytes to a consumer, each of them once, with a bounded buffer between.

    The download writes, and at last calls `end()`. The consumer waits for `begun`, and calls `take()` until it returns
    nothing. If the download starts again at the first byte, what the consumer has already is compared by its hash, and
    left out.
    """

    can_restart = False

    def __init__(self) -> None:
        self.image_format: str | None = None
        self.size: int | None = None
        self._kept = 0
        self._digest = hashlib.sha256()
        self._repeated: int | None = None
        """How many of the kept bytes have come again; None unless they do."""
        self._repeated_digest = hashlib.sha256()
        self._waited = 0.0
        self._chunks: deque[bytes] = deque()
        self._buffered = 0
        self._has_ended = False
        self._error: BaseException | None = None
        self._changed = asyncio.Event()
        """Set whenever something changes, and replaced by whoever waits."""

    @property
    def kept(self) -> int:
        return self._kept

    def begin(self, image_format: str, size: int | None) -> None:
        if self.image_format is None:
            self.image_format, self.size = image_format, size
            self._changed.set()

    def restart(self) -> None:
        self._repeated = 0 if self._kept else None
        self._repeated_digest = hashlib.sha256()

    async def write(self, data: bytes, *, may_pause: bool = False) -> None:
        await self._wait_for_space(may_pause=may_pause)
        data = self._leave_out_repeated(data)
        if not data:
            return
        self._digest.update(data)
        self._kept += len(data)
        self._chunks.append(data)
        self._buffered += len(data)
        self._changed.set()

    async def flush(self) -> None:
        self._waited = 0.0

    def end(self, error: BaseException | None) -> None:
        """End the consumer's `take()`, or make it raise the error, once it has taken everything."""
        self._has_ended, self._error = True, error
        self._changed.set()

    # ------------------------------------------------------------------ the consumer

    async def wait_for_beginning(self) -> None:
        """Wait until the format is known, or the download has failed.

        Raises:
            FluxError: It has failed.
        """
        while self.image_format is None and not self._has_ended:
            await self._wait_for_change()
        if self.image_format is None and self._error is not None:
            raise self._error

    async def take(self) -> bytes:
        """Return the next bytes; nothing at the end.

        Raises:
            FluxError: The download has failed.
        """
        while not self._chunks:
            if self._has_ended:
                error, self._error = self._error, None
                if error is not None:
                    raise error
                return b""
            await self._wait_for_change()
        data = self._chunks.popleft()
        self._buffered -= len(data)
        self._changed.set()
        return data

    async def wait_until_taken(self) -> None:
        self._waited = 0.0
        while self._chunks:
            await self._wait_for_change()

    # ------------------------------------------------------------------ internals

    def _leave_out_repeated(self, data: bytes) -> bytes:
        if self._repeated is None:
            return data
        repeated, rest = data[: self._kept - self._repeated], data[self._kept - self._repeated :]
        self._repeated_digest.update(repeated)
        self._repeated += len(repeated)
        if self._repeated == self._kept:
            if self._repeated_digest.digest() != self._digest.digest():
                raise OtherImageError
            self._repeated = None
        return rest

    async def _wait_for_space(self, *, may_pause: bool) -> None:
        if self._buffered < _BUFFER_BYTES:
            return
        loop = asyncio.get_running_loop()
        started = loop.time()
        try:
            async with asyncio.timeout(max(0.0, _MAX_WAIT - self._waited) if may_pause else None):
                while self._buffered >= _BUFFER_BYTES:
                    await self._wait_for_change()
        except TimeoutError:
            raise ConsumerPausedError from None
        finally:
            self._waited += loop.time() - started

    async def _wait_for_change(self) -> None:
        self._changed.clear()
        await self._changed.wait()
