"""Reading the content of responses to API calls, within limits of size."""

import asyncio
import io
import string
from collections.abc import Callable

import aiohttp
import attrs

from flux2max_async._exceptions import ProtocolError

_MAX_RESPONSE_BYTES = 140_000_000
"""A task object with an image of 100 MB in base64."""
_SMALL_RESPONSE_BYTES = 65_536
LARGE_RESPONSE_BYTES, _MAX_LARGE_RESPONSES = 1_000_000, 4
"""Beyond this size only so many responses are read at once, so that hostile ones can't fill the memory."""
_HUGE_RESPONSE_BYTES = 8_000_000
"""Beyond this size only one is."""
_MAX_SUBMIT_RESPONSE_BYTES = 16_000_000
_MAX_OTHER_BYTES = 4_000_000
"""How much of a large response may be anything but base64: only an image makes one that large."""
_TOO_LARGE = (
    f"the response is larger than {_MAX_OTHER_BYTES // 10**6} MB, or with an image {_MAX_RESPONSE_BYTES // 10**6} MB"
)
OnData = Callable[[int], None]
"""Called when something has come, with the number of bytes of the content so far."""
_BASE64 = string.ascii_letters.encode() + string.digits.encode() + b"+/-_="


class ContentReader:
    """Reads the content of responses; of large ones, only a few at once."""

    def __init__(self) -> None:
        self._large_responses = asyncio.Semaphore(_MAX_LARGE_RESPONSES)
        self._huge_response = asyncio.Lock()

    async def read(self, stream: aiohttp.StreamReader, *, is_submit: bool, on_data: OnData | None = None) -> bytes:
        """Return the whole content, after the headers.

        Raises:
            ProtocolError: It is too large.
        """
        if on_data is not None:
            on_data(0)
        first = await stream.readany()
        if stream.at_eof() and len(first) <= _SMALL_RESPONSE_BYTES:  # nearly every response
            return first
        content = _Content(stream, on_data)
        content.add(first)
        del first  # it may be large, and reading the rest may take long
        if is_submit:  # nothing may hold its answer up: its time would be over, and nobody would know the task's id
            if await content.read_up_to(_MAX_SUBMIT_RESPONSE_BYTES):
                raise ProtocolError(_TOO_LARGE)
        elif await content.read_up_to(LARGE_RESPONSE_BYTES):
            async with self._large_responses:
                if await content.read_up_to(_HUGE_RESPONSE_BYTES):
                    async with self._huge_response:
                        if await content.read_up_to(_MAX_RESPONSE_BYTES):
                            raise ProtocolError(_TOO_LARGE)
        return content.received.getvalue()


@attrs.define(eq=False)
class _Content:
    """The content of a response to an API call, as far as it was read."""

    _stream: aiohttp.StreamReader
    _on_data: OnData | None
    received: io.BytesIO = attrs.field(factory=io.BytesIO, init=False)  # its value is no copy
    _others: int = attrs.field(default=0, init=False)
    """How many bytes can't be part of an image in base64."""

    async def read_up_to(self, limit: int) -> bool:
        """Read until the end; return True if there is more than `limit` bytes.

        Raises:
            ProtocolError: Too much of it is not an image.
        """
        while self.received.tell() <= limit:
            if self._stream.at_eof():
                return False
            self.add(await self._stream.readany())
        return True

    def add(self, chunk: bytes) -> None:
        """Append bytes that were read.

        Raises:
            ProtocolError: Too much of the content is not an image.
        """
        self.received.write(chunk)
        if self._on_data is not None:
            self._on_data(self.received.tell())
        self._others += len(chunk.translate(None, _BASE64))
        if self._others > _MAX_OTHER_BYTES:
            raise ProtocolError(_TOO_LARGE)
