"""Saving a picture: streamed beside its target, resumed when cut, whole or not at all."""

import asyncio
import contextlib
import math
import os
import random
import re
import secrets
from collections.abc import Awaitable, Callable, Generator, Mapping
from pathlib import Path
from typing import IO

import anyio
import anyio.to_thread
import attrs

from flux2max_async._api.retry import backoff
from flux2max_async._api.transport import DownloadResponse, Transport
from flux2max_async._exceptions import DownloadError, FluxError, ProtocolError, ResultExpiredError, TransportError
from flux2max_async._models.images import is_web_url
from flux2max_async._models.results import NO_URL, GeneratedImage, TaskSnapshot

MAX_BYTES = 100_000_000
_FAILURES_IN_A_ROW = 5
_BUFFER = 1_000_000


class Downloader:
    """Saves pictures of tasks.

    Args:
        transport: Makes the calls.
        seconds: How long a download may take.
        look: Looks at a task, for a fresh url where one has expired.
    """

    def __init__(self, transport: Transport, seconds: float, look: Callable[[str], Awaitable[TaskSnapshot]]) -> None:
        self._transport = transport
        self._seconds = seconds
        self._look = look

    async def save(self, image: GeneratedImage, target: Path) -> Path:
        """Download a picture; the target is replaced in the moment when the new one is whole."""
        with told_apart(target):
            part = target.with_name(f".{secrets.token_hex(8)}.part")
        await self.fetch(image, part, target)
        try:
            with told_apart(target):
                await anyio.to_thread.run_sync(part.replace, target)
        finally:
            part.unlink(missing_ok=True)
        return target

    async def fetch(self, image: GeneratedImage, part: Path, target: Path) -> None:
        """Download a picture into a file that is there in the end only if it is whole."""
        try:
            async with asyncio.timeout(None if self._seconds == math.inf else self._seconds):
                try:
                    await download(self._transport, image.url, part, target)
                except ResultExpiredError:
                    await download(self._transport, await self._fresh_url(image), part, target)
        except TimeoutError as error:
            raise DownloadError(f"the download has not ended within {self._seconds:g} s") from error
        except DownloadError as error:
            error.task_id = image.task_id
            raise

    async def _fresh_url(self, image: GeneratedImage) -> str:
        try:
            snapshot = await self._look(image.task_id)
            return snapshot.images[image.index].url
        except (FluxError, IndexError) as error:
            raise ResultExpiredError(
                f"the picture's url has expired, and task {image.task_id} gives no fresh one: {error}"
            ) from error


async def download(transport: Transport, url: str, part: Path, target: Path) -> None:
    """Fetch a url into a file, which is there in the end exactly if it is whole, and then on the disk, too.

    Args:
        transport: Makes the calls.
        url: What to fetch.
        part: The file, which must not be there yet; its folder is made.
        target: What it will be called; errors name it.

    Raises:
        ResultExpiredError: The url is not valid any more.
        DownloadError: The picture can't be fetched, is larger than 100 MB, or can't be written.
    """
    if url == NO_URL:
        raise ResultExpiredError("the picture's url was too long to be kept")
    if not is_web_url(url):
        raise DownloadError(f"can't download: the picture's url is no http(s) URL: {url[:80]!r}")
    with told_apart(target):
        # Not in a thread: it takes microseconds, and a cancelled wait would leave a file that nobody knows.
        part.parent.mkdir(parents=True, exist_ok=True)
        with part.open("xb") as file:
            try:
                await _fetch_whole(transport, url, file)
                await anyio.to_thread.run_sync(_flush, file)
            except BaseException:
                part.unlink(missing_ok=True)  # noqa: ASYNC240 - as above
                raise


@contextlib.contextmanager
def told_apart(target: Path) -> Generator[None]:
    """Say in our words why a file can't be written.

    Raises:
        DownloadError: It can't.
    """
    try:
        yield
    except (OSError, ValueError) as error:
        raise DownloadError(f"can't write {str(target)!r}: {getattr(error, 'strerror', None) or error}") from error


def _flush(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())


class _CutError(Exception):
    """This try failed; another one may not."""


@attrs.define
class _Progress:
    """How far the file is, and what must still be true of the url for the rest to belong to it."""

    received: int = 0
    total: int | None = None
    validator: str | None = None
    resumable: bool = False

    def restart(self, headers: Mapping[str, str]) -> None:
        """The whole picture comes, from its first byte."""
        self.received = 0
        encoded = "Content-Encoding" in headers  # then lengths and ranges are of something else than what we get
        length = headers.get("Content-Length", "")
        self.total = int(length) if length.isdecimal() and not encoded else None
        etag = headers.get("ETag", "")
        self.validator = etag if etag and not etag.startswith("W/") else headers.get("Last-Modified")
        self.resumable = headers.get("Accept-Ranges", "").lower() == "bytes" and not encoded

    def continues(self, headers: Mapping[str, str]) -> bool:
        """Tell whether a partial answer is the rest that was asked for, of the same picture."""
        found = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", headers.get("Content-Range", ""))
        same = headers.get("ETag") in {None, self.validator} or headers.get("ETag", "").startswith("W/")
        return found is not None and 0 < self.received == int(found[1]) and found[2] in {"*", str(self.total)} and same

    def headers(self) -> dict[str, str]:
        """Ask for the rest where that is possible."""
        if not (self.received and self.resumable):
            return {}
        ask = {"Range": f"bytes={self.received}-"}
        return ask | {"If-Range": self.validator} if self.validator else ask


async def _fetch_whole(transport: Transport, url: str, file: IO[bytes]) -> None:
    progress = _Progress()
    failures = 0
    while True:
        before = progress.received
        try:
            async with transport.download(url, progress.headers()) as answer:
                await _receive(answer, file, progress)
        except (TransportError, _CutError) as error:
            failures = 1 if progress.received > before else failures + 1
            if failures == _FAILURES_IN_A_ROW:
                raise DownloadError(f"the download failed {failures} times in a row: {error}") from error
            await anyio.sleep(backoff(failures, random.random()))
        except ProtocolError as error:
            raise DownloadError(f"can't download: {error}") from error
        else:
            return


async def _receive(answer: DownloadResponse, file: IO[bytes], progress: _Progress) -> None:
    """Write one answer's bytes to the file, after what is there already."""
    _begin(answer, progress)
    buffer = bytearray()
    try:
        while chunk := await answer.read():
            buffer += chunk
            if progress.received + len(buffer) > MAX_BYTES:
                raise _too_large()
            if len(buffer) >= _BUFFER:
                await _write(file, buffer, progress)
    except TransportError:
        await _write(file, buffer, progress)  # what has come is not asked for again
        raise
    await _write(file, buffer, progress)
    if progress.received == 0:
        raise _CutError("the picture is empty")
    if progress.total is not None and progress.received != progress.total:
        raise _CutError(f"{progress.received} of {progress.total} bytes came")


def _begin(answer: DownloadResponse, progress: _Progress) -> None:
    """Tell from the head of an answer whether its bytes are wanted."""
    match answer.status:
        case 200:
            progress.restart(answer.headers)
            if (progress.total or 0) > MAX_BYTES:
                raise _too_large()
        case 206 if progress.continues(answer.headers):
            pass
        case 206 | 416:
            progress.resumable = False
            raise _CutError("the rest that was asked for is not what came")
        case 403 | 404 | 410 as status:
            raise ResultExpiredError(f"the picture's url has expired (HTTP {status})")
        case status if status in {408, 429} or status >= 500:
            raise _CutError(f"HTTP {status}")
        case status:
            raise DownloadError(f"can't download: HTTP {status}")


async def _write(file: IO[bytes], buffer: bytearray, progress: _Progress) -> None:
    def write() -> None:
        file.seek(progress.received)
        file.truncate()
        file.write(buffer)

    await anyio.to_thread.run_sync(write)
    progress.received += len(buffer)
    buffer.clear()


def _too_large() -> DownloadError:
    return DownloadError("the picture is larger than 100 MB")
