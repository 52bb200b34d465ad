"""The transfer of an image: one attempt after another, each of which may continue the one before."""

import asyncio
import re
from collections.abc import Mapping

import anyio
import attrs

from flux2max_async._api.download_response import DownloadResponse
from flux2max_async._api.response import parse_retry_after
from flux2max_async._api.transport import Transport
from flux2max_async._downloads.image_format import HEAD_BYTES, ImageStructure, detect_format
from flux2max_async._downloads.pace import Pace
from flux2max_async._downloads.redirects import open_download
from flux2max_async._downloads.sinks import OtherImageError, Sink
from flux2max_async._exceptions import DownloadError, TransportError
from flux2max_async._stats import SessionCounters

MAX_IMAGE_BYTES = 100_000_000
_MAX_SHOWN_BYTES = 40
_OTHER_IMAGE = "the response is another image than the one before"


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
    """The transfer of an image into a sink."""

    sink: Sink
    pace: Pace
    stats: SessionCounters
    received: int = 0
    """Bytes that the sink has, and those that are kept here until the format is known."""
    total: int | None = None
    """Bytes of the whole image, if known."""
    validator: str | None = None
    """The strong ETag or the Last-Modified date of the image, for If-Range."""
    is_resumable: bool = False
    has_progressed: bool = False
    """Whether the last attempt continued an earlier one, and received something."""
    image_format: str | None = None
    _head: bytes = b""
    """The first bytes, which determine the format."""
    _has_begun: bool = False
    """Whether the format was determined, and the first bytes were passed on."""
    _structure: ImageStructure | None = None
    """If the length is unknown, the image's own end shows that it is whole."""

    async def attempt(self, transport: Transport, url: str) -> str:
        """Request what is missing of the image, and return the image's format.

        Raises:
            AttemptError: The attempt failed, or the bytes are no image, or not all of it.
            ConsumerPausedError: Whoever takes the bytes has stopped taking them.
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
        if not self._has_begun:
            await self._begin(self._head)
            await self.sink.flush()
        if self.image_format is None:
            raise self._nothing_used(f"the response is not an image: it begins with {self._head[:_MAX_SHOWN_BYTES]!r}")
        if self._structure is not None and not self._structure.is_whole:
            raise self._nothing_used("the response ends before the image is complete")
        if self.received < self.sink.kept:
            raise self._nothing_used(_OTHER_IMAGE)
        return self.image_format

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
        total = int(length) if length.isdecimal() and not is_encoded else None
        if self.sink.kept and None not in {total, self.total} and total != self.total:
            raise AttemptError(_OTHER_IMAGE)
        self.total = total = self.total if total is None and self.sink.kept else total
        etag = headers.get("ETag", "")
        self.validator = etag if etag and not etag.startswith("W/") else headers.get("Last-Modified")
        self.is_resumable = headers.get("Accept-Ranges", "").lower() == "bytes" and not is_encoded
        self.sink.restart()
        self.image_format, self._head, self._has_begun = None, b"", False
        self._structure = ImageStructure() if total is None else None

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
        """Pass the content of a response on to the sink."""
        before = max(self.received, self.sink.kept)
        self.pace.start_receiving()
        try:
            while chunk := await response.read():
                self.pace.add(len(chunk))
                self.stats.downloaded_bytes += len(chunk)
                await self._add(chunk)
        except TransportError:
            await self._flush(before)  # so that it is not requested again
            raise
        except asyncio.CancelledError:
            # An attempt that is too slow is cancelled outside of writes. Any other cancellation is the end of the
            # download, and the last write may still be running in its thread.
            if self.pace.is_cut:
                with anyio.CancelScope(shield=True):
                    await self._flush(before)
            raise
        await self._flush(before)

    async def _flush(self, before: int) -> None:
        await self.sink.flush()
        self.has_progressed = 0 < before < self.received

    async def _add(self, chunk: bytes) -> None:
        if self.received + len(chunk) > MAX_IMAGE_BYTES:
            raise too_large()
        if self._has_begun:
            if self.image_format is not None or self.sink.can_restart:
                await self._write(chunk)
        elif len(head := self._head + chunk) < HEAD_BYTES:
            self._head = head
        else:
            await self._begin(head)
        self.received += len(chunk)

    async def _begin(self, head: bytes) -> None:
        """Pass the first bytes on; if they are no image's, not to those who can't give them back."""
        self.image_format = detect_format(head[:HEAD_BYTES])
        if self.image_format is not None:
            self.sink.begin(self.image_format, self.total)
        if self.image_format is not None or self.sink.can_restart:
            await self._write(head)
        self._head, self._has_begun = head[:HEAD_BYTES], True

    async def _write(self, data: bytes) -> None:
        self.pace.is_writing = True
        try:
            await self.sink.write(data, may_pause=self.is_resumable)
            self.pace.is_writing = False
        except OtherImageError:
            raise self._nothing_used(_OTHER_IMAGE) from None
        if self._structure is not None:
            self._structure.feed(data)

    def _nothing_used(self, message: str) -> AttemptError:
        """Return the error after which the next attempt requests the whole image."""
        self.received = 0
        return AttemptError(message)


def too_large() -> DownloadError:
    """Return the error about an image that is too large."""
    return DownloadError("the image is larger than 100 MB")
