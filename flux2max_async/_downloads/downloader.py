"""Downloads images: into a part file beside the target, resumed after failures, and published only when complete."""

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

MAX_IMAGE_BYTES = 100_000_000
_MAX_CONSECUTIVE_FAILURES = 5
_BUFFER_BYTES = 1_000_000


class Downloader:
    """Downloads the images of tasks.

    Args:
        transport: Opens the downloads.
        timeout: Maximum duration of one download in seconds; infinite for no limit.
        poll: Polls a task once, for a fresh URL if an image's URL has expired.
    """

    def __init__(self, transport: Transport, timeout: float, poll: Callable[[str], Awaitable[TaskSnapshot]]) -> None:
        self._transport = transport
        self._timeout = timeout
        self._poll = poll

    async def save(self, image: GeneratedImage, target: Path) -> Path:
        """Download an image to a path; an existing file is replaced once the download is complete."""
        with translate_write_errors(target):
            part = target.with_name(f".{secrets.token_hex(8)}.part")
        await self.fetch(image, part, target)
        try:
            with translate_write_errors(target):
                await anyio.to_thread.run_sync(part.replace, target)
        finally:
            part.unlink(missing_ok=True)
        return target

    async def fetch(self, image: GeneratedImage, part: Path, target: Path) -> None:
        """Download an image into a part file, which exists afterwards only if the image is complete.

        If the image's URL has expired, its task is polled once for a fresh one.

        Args:
            image: The image.
            part: The file to create, and its folder if that is missing.
            target: The path to which the caller will publish the file; named in errors.

        Raises:
            ResultExpiredError: The URL has expired, and there is no fresh one that works.
            DownloadError: The image can't be downloaded in time, is larger than 100 MB, or can't be written.
        """
        try:
            async with asyncio.timeout(None if self._timeout == math.inf else self._timeout):
                try:
                    await _download(self._transport, image.url, part, target)
                except ResultExpiredError:
                    await _download(self._transport, await self._fresh_url(image), part, target)
        except TimeoutError as error:
            raise DownloadError(f"the download has not ended within {self._timeout:g} s") from error
        except DownloadError as error:
            error.task_id = image.task_id
            raise

    async def _fresh_url(self, image: GeneratedImage) -> str:
        try:
            snapshot = await self._poll(image.task_id)
            return snapshot.images[image.index].url
        except (FluxError, IndexError) as error:
            raise ResultExpiredError(
                f"the image's URL has expired, and task {image.task_id} has no fresh one: {error}"
            ) from error


@contextlib.contextmanager
def translate_write_errors(target: Path) -> Generator[None]:
    """Return a context that turns errors of the file system into a DownloadError that names the target.

    Raises:
        DownloadError: The target can't be written.
    """
    try:
        yield
    except (OSError, ValueError) as error:
        raise DownloadError(f"can't write {str(target)!r}: {getattr(error, 'strerror', None) or error}") from error


async def _download(transport: Transport, url: str, part: Path, target: Path) -> None:
    """Download a URL into a part file and flush it to disk; remove the file if that fails or is cancelled."""
    if url == NO_URL:
        raise ResultExpiredError("the image's URL was too long to be kept in the journal")
    if not is_web_url(url):
        raise DownloadError(f"can't download: the image's URL is not an http(s) URL: {url[:80]!r}")
    with translate_write_errors(target):
        # Not in a worker thread: it takes microseconds, and if the wait for the thread were cancelled, the file would
        # be left behind.
        part.parent.mkdir(parents=True, exist_ok=True)
        with part.open("xb") as file:
            try:
                await _download_with_retries(transport, url, file)
                await anyio.to_thread.run_sync(_flush, file)
            except BaseException:
                part.unlink(missing_ok=True)  # noqa: ASYNC240 - as above
                raise


def _flush(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())


class _RetryableDownloadError(Exception):
    """An attempt failed, and another one may succeed."""


@attrs.define
class _DownloadState:
    """The progress of a download over several attempts."""

    received: int = 0
    """Bytes in the file."""
    total: int | None = None
    """Bytes of the whole image, if known."""
    validator: str | None = None
    """The strong ETag or the Last-Modified date of the image, for If-Range."""
    is_resumable: bool = False

    def restart(self, headers: Mapping[str, str]) -> None:
        """Begin at the first byte, with the headers of a response that contains the whole image."""
        self.received = 0
        is_encoded = "Content-Encoding" in headers  # then lengths and ranges refer to the encoded content
        length = headers.get("Content-Length", "")
        self.total = int(length) if length.isdecimal() and not is_encoded else None
        etag = headers.get("ETag", "")
        self.validator = etag if etag and not etag.startswith("W/") else headers.get("Last-Modified")
        self.is_resumable = headers.get("Accept-Ranges", "").lower() == "bytes" and not is_encoded

    def is_continued_by(self, headers: Mapping[str, str]) -> bool:
        """Return whether a partial response contains the requested rest of the same image."""
        content_range = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", headers.get("Content-Range", ""))
        is_same = headers.get("ETag") in {None, self.validator} or headers.get("ETag", "").startswith("W/")
        return (
            content_range is not None
            and 0 < self.received == int(content_range[1])
            and content_range[2] in {"*", str(self.total)}
            and is_same
        )

    def request_headers(self) -> dict[str, str]:
        """Return the headers that request the rest of the image, if that is possible."""
        if not (self.received and self.is_resumable):
            return {}
        headers = {"Range": f"bytes={self.received}-"}
        return headers | {"If-Range": self.validator} if self.validator else headers


async def _download_with_retries(transport: Transport, url: str, file: IO[bytes]) -> None:
    state = _DownloadState()
    failures = 0
    while True:
        received_before = state.received
        try:
            async with transport.download(url, state.request_headers()) as response:
                await _receive(response, file, state)
        except (TransportError, _RetryableDownloadError) as error:
            failures = 1 if state.received > received_before else failures + 1
            if failures == _MAX_CONSECUTIVE_FAILURES:
                raise DownloadError(f"the download failed {failures} times in a row: {error}") from error
            await anyio.sleep(backoff(failures, random.random()))
        except ProtocolError as error:
            raise DownloadError(f"can't download: {error}") from error
        else:
            return


async def _receive(response: DownloadResponse, file: IO[bytes], state: _DownloadState) -> None:
    """Append the content of a response to the file."""
    _check_response(response, state)
    buffer = bytearray()
    try:
        while chunk := await response.read():
            buffer += chunk
            if state.received + len(buffer) > MAX_IMAGE_BYTES:
                raise _too_large()
            if len(buffer) >= _BUFFER_BYTES:
                await _write(file, buffer, state)
    except TransportError:
        await _write(file, buffer, state)  # so that it is not requested again
        raise
    await _write(file, buffer, state)
    if state.received == 0:
        raise _RetryableDownloadError("the image is empty")
    if state.total is not None and state.received != state.total:
        raise _RetryableDownloadError(f"received {state.received} of {state.total} bytes")


def _check_response(response: DownloadResponse, state: _DownloadState) -> None:
    """Check the status and the headers of a response, and update the state if the whole image follows."""
    match response.status:
        case 200:
            state.restart(response.headers)
            if (state.total or 0) > MAX_IMAGE_BYTES:
                raise _too_large()
        case 206 if state.is_continued_by(response.headers):
            pass
        case 206 | 416:
            state.is_resumable = False
            raise _RetryableDownloadError("the response is not the requested range")
        case 403 | 404 | 410 as status:
            raise ResultExpiredError(f"the image's URL has expired (HTTP {status})")
        case status if status in {408, 429} or status >= 500:
            raise _RetryableDownloadError(f"HTTP {status}")
        case status:
            raise DownloadError(f"can't download: HTTP {status}")


async def _write(file: IO[bytes], buffer: bytearray, state: _DownloadState) -> None:
    """Write a buffer to the file after the bytes that are counted as received, and clear it."""

    def write() -> None:
        file.seek(state.received)
        file.truncate()
        file.write(buffer)

    await anyio.to_thread.run_sync(write)
    state.received += len(buffer)
    buffer.clear()


def _too_large() -> DownloadError:
    return DownloadError("the image is larger than 100 MB")
