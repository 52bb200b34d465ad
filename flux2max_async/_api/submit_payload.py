"""The body of a submit, which knows whether any byte of it was written."""

from collections.abc import Callable
from typing import TYPE_CHECKING, cast

import aiohttp
from aiohttp.abc import AbstractStreamWriter
from aiohttp.client_proto import ResponseHandler

from flux2max_async._timeouts import Timeout

if TYPE_CHECKING:
    from aiohttp.http import StreamWriter

_CHUNK_BYTES = 65_536


class SubmitPayload(aiohttp.Payload):
    """The body of a submit: records when it is written, and refuses to be written twice.

    Args:
        value: The body.
        may_write: Returns whether it may be written to a connection. None, for a borrowed session: it may be written
            to each, and the connection is closed afterwards.
        limit: The time limit of the submit.
    """

    _autoclose = True

    def __init__(
        self,
        value: bytes,
        may_write: Callable[[ResponseHandler], bool] | None = None,
        limit: Timeout | None = None,
    ) -> None:
        super().__init__(value, content_type="application/json")
        self._size = len(value)
        self._may_write = may_write
        self._limit = limit
        self.is_written = False

    async def write(self, writer: AbstractStreamWriter) -> None:
        await self.write_with_length(writer, None)

    async def write_with_length(self, writer: AbstractStreamWriter, content_length: int | None) -> None:
        if self.is_written:
            raise ConnectionError("a submit is never written twice")  # a borrowed session's middleware may try to
        if self._limit is not None and self._limit.is_due:
            raise ConnectionError("the time for an answer is over")
        protocol = cast("ResponseHandler", cast("StreamWriter", writer).protocol)
        if self._may_write is None:
            protocol.force_close()
        elif not self._may_write(protocol):
            raise ConnectionError("the connection is closed, or has been idle for too long")
        self.is_written = True
        view = memoryview(self._value)[:content_length]
        # In chunks, so that a body of many megabytes doesn't block the event loop.
        for start in range(0, len(view), _CHUNK_BYTES):
            await writer.write(view[start : start + _CHUNK_BYTES])

    def decode(self, encoding: str = "utf-8", errors: str = "strict") -> str:
        return bytes(self._value).decode(encoding, errors)
