"""The transfer of an image into a file: one attempt after another, each of which may continue the one before."""

import asyncio
import re
from collections.abc import Mapping
from typing import IO

import anyio
import anyio.to_thread
import attrs

from flux2max_async._api.download_response import DownloadResponse
from flux2max_async._api.response import parse_retry_after
from flux2max_async._api.transport import Transport
from flux2max_async._downloads.image_format import HEAD_BYTES, detect_format, is_whole
from flux2max_async._downloads.pace import Pace
from flux2max_async._downloads.redirects import open_download
from flux2max_async._exceptions import DownloadError, TransportError

MAX_IMAGE_BYTES = 100_000_000
_BUFFER_BYTES = 1_000_000
_MAX_SHOWN_BYTES = 40


class AttemptError(Exception):
    """An attempt failed, and another one may succeed.

    Args:
        message: The reason.
        retry_after: Seconds to wait before the next attempt, if the server requested it.
    """

    def __init__(self, message: str, *, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class LinkRefusedError(AttemptError):
    """The URL has expired, or doesn't work yet (403, 404, 410)."""


@attrs.define
class Transfer:
    """The transfer of an image into a file."""

    file: IO[bytes]
    pace: Pace
    received: int = 0
    """Bytes in the file."""
    total: int | None = None
    """Bytes of the whole image, if known."""
    validator: str | None = None
    """The strong ETag or the Last-Modified date of the image, for If-Range."""
    is_resumable: bool = False
    has_progressed: bool = False
    """Whether the last attempt continued an earlier one, and received something."""

    async def attempt(self, transport: Transport, url: str) -> str:
        """Request what is missing of the image, and return the image's format.

        Raises:
            AttemptError: The attempt failed, or the bytes are no image, or not all of it.
            TransportError: The connection failed.
            ProtocolError: The response is not valid HTTP.
            DownloadError: Another attempt would fail as well.
        """
        self.has_progressed = False
        async with open_download(transport, url, self._request_headers()) as response:
            self._check_response(response)
            await self._receive(response)
        if self.total not in {None, self.received}:
            raise AttemptError(f"received {self.received} of {self.total} bytes")
        try:
            return await anyio.to_thread.run_sync(_check_image, self.file, self.total)
        except AttemptError:
            self.received = 0  # nothing of it is used
            raise

    def _request_headers(self) -> dict[str, str]:
        """Return the headers that request the rest of the image, if that is possible."""
        if not (self.received and self.is_resumable):
            return {}
        headers = {"Range": f"bytes={self.received}-"}
        return headers | {"If-Range": self.validator} if self.validator else headers

    def _check_response(self, response: DownloadResponse) -> None:
        """Check the status and the headers of a response, and restart if the whole image follows."""
        retry_after = parse_retry_after(response.headers, response.received)
        match response.status:
            case 200 | 203:
                self._restart(response.headers)
                if (self.total or 0) > MAX_IMAGE_BYTES:
                    raise too_large()
            case 206 if self._is_continued_by(response.headers):
                pass
            case 206 | 416:
                self.is_resumable = False
                raise AttemptError("the response is not the requested range", retry_after=retry_after)
            case 403 | 404 | 410 as status:
                raise LinkRefusedError(f"HTTP {status}", retry_after=retry_after)
            case status if status < 300 or status in {408, 425, 429} or status >= 500:
                raise AttemptError(f"HTTP {status}", retry_after=retry_after)
            case status:
                raise DownloadError(f"can't download: HTTP {status}")

    def _restart(self, headers: Mapping[str, str]) -> None:
        """Begin at the first byte, with the headers of a response that contains the whole image."""
        self.received = 0
        is_encoded = "Content-Encoding" in headers  # then lengths and ranges refer to the encoded content
        length = headers.get("Content-Length", "")
        self.total = int(length) if length.isdecimal() and not is_encoded else None
        etag = headers.get("ETag", "")
        self.validator = etag if etag and not etag.startswith("W/") else headers.get("Last-Modified")
        self.is_resumable = headers.get("Accept-Ranges", "").lower() == "bytes" and not is_encoded

    def _is_continued_by(self, headers: Mapping[str, str]) -> bool:
        """Return whether a partial response contains the requested rest of the same image."""
        content_range = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", headers.get("Content-Range", ""))
        is_same = headers.get("ETag") in {None, self.validator} or headers.get("ETag", "").startswith("W/")
        return (
            content_range is not None
            and 0 < self.received == int(content_range[1])
            and content_range[2] in {"*", str(self.total)}
            and is_same
        )

    async def _receive(self, response: DownloadResponse) -> None:
        """Append the content of a response to the file."""
        start = self.received
        buffer = bytearray()
        self.pace.start_receiving()
        try:
            while chunk := await response.read():
                self.pace.add(len(chunk))
                buffer += chunk
                if self.received + len(buffer) > MAX_IMAGE_BYTES:
                    raise too_large()
                if len(buffer) >= _BUFFER_BYTES:
                    await self._write(buffer)
        except TransportError:
            await self._write_last(buffer, start)  # so that it is not requested again
            raise
        except asyncio.CancelledError:
            # An attempt that is too slow is cancelled outside of writes. Any other cancellation is the end of the
            # download, and the last write may still be running in its thread.
            if self.pace.is_cut:
                with anyio.CancelScope(shield=True):
                    await self._write_last(buffer, start)
            raise
        await self._write_last(buffer, start)

    async def _write_last(self, buffer: bytearray, start: int) -> None:
        await self._write(buffer)
        self.has_progressed = 0 < start < self.received

    async def _write(self, buffer: bytearray) -> None:
        """Write a buffer to the file after the bytes that are counted as received, and clear it."""

        def write() -> None:
            self.file.seek(self.received)
            self.file.truncate()
            self.file.write(buffer)

        await anyio.to_thread.run_sync(write)
        self.received += len(buffer)
        buffer.clear()


def _check_image(file: IO[bytes], total: int | None) -> str:
    """Return the format of the image in a file; if its length is unknown, its end must be there.

    Raises:
        AttemptError: There is no image, or not all of it.
    """
    file.seek(0)
    head = file.read(HEAD_BYTES)
    image_format = detect_format(head)
    if image_format is None:
        raise AttemptError(f"the response is not an image: it begins with {head[:_MAX_SHOWN_BYTES]!r}")
    file.seek(0)
    if total is None and not is_whole(file.read()):
        raise AttemptError("the response ends before the image is complete")
    return image_format


def too_large() -> DownloadError:
    """Return the error about an image that is too large."""
    return DownloadError("the image is larger than 100 MB")
