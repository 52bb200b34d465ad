"""A limit for all headers of a response together: aiohttp limits each of them, and their number."""

import asyncio
from typing import Any, cast

import aiohttp
from aiohttp.client_proto import ResponseHandler
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.streams import EMPTY_PAYLOAD

from flux2max_async._timeouts import Timer

_MAX_HEADERS_BYTES = 1_000_000


class LimitedHandler(ResponseHandler):
    """Closes a connection once it has received too much without the headers of a response being complete."""

    _counted_parser: object = None
    """The parser of the response that is being received; each has its own."""
    _previous_payload: object = None
    _received = 0
    """Bytes of this response."""

    def data_received(self, data: bytes) -> None:
        if self._parser is not self._counted_parser:
            self._counted_parser, self._previous_payload, self._received = self._parser, self._payload, 0
        self._received += len(data)
        # The payload is known once the headers are complete; responses like 103 Early Hints have an empty one.
        if self._received <= _MAX_HEADERS_BYTES or self._payload not in (self._previous_payload, EMPTY_PAYLOAD):
            super().data_received(data)
            return
        self.set_exception(HttpProcessingError(code=400, message="the headers are too large"))
        self.abort()

    def _on_read_timeout(self) -> None:
        """End the wait for data, after what has come until now was read."""
        self._read_timeout_handle = cast("Any", Timer(0.0, super()._on_read_timeout))

    def connection_lost(self, exc: BaseException | None) -> None:
        """Release the parser, which refers to this handler, and with it what was received."""
        self._counted_parser = self._previous_payload = None
        super().connection_lost(exc)


def limit_headers(connector: aiohttp.TCPConnector) -> aiohttp.TCPConnector:
    """Return a connector whose connections have the limit."""

    def create_handler() -> LimitedHandler:
        return LimitedHandler(asyncio.get_running_loop())

    cast("Any", connector)._factory = create_handler  # noqa: SLF001 - there is no public way
    return connector
