"""A limit for all headers of a response together: aiohttp limits each of them, and their number."""

import asyncio
import functools
import math
from typing import Any

import aiohttp
from aiohttp.client_proto import ResponseHandler
from aiohttp.http import RawResponseMessage
from aiohttp.http_exceptions import HttpProcessingError

_MAX_HEADERS_BYTES = 1_000_000


class _LimitedHandler(ResponseHandler):
    """Closes a connection once it has received too much without the headers of a response being complete."""

    _received: float = 0
    """Bytes since the request; minus infinity once the headers are complete."""

    def set_response_params(self, **params: Any) -> None:
        self._received = 0
        super().set_response_params(**params)

    def feed_data(self, data: tuple[RawResponseMessage, aiohttp.StreamReader], size: int = 0) -> None:
        if data[0].code >= 200 or data[0].code == 101:  # others, like 103 Early Hints, come before the response
            self._received = -math.inf
        super().feed_data(data, size)

    def data_received(self, data: bytes) -> None:
        self._received += len(data)
        if self._received <= _MAX_HEADERS_BYTES:
            super().data_received(data)
            return
        self.set_exception(HttpProcessingError(code=400, message="the headers are too large"))
        self.abort()


def limit_headers(connector: aiohttp.TCPConnector) -> aiohttp.TCPConnector:
    """Return a connector whose connections have the limit; needs a running event loop."""
    handler: Any = functools.partial(_LimitedHandler, loop=asyncio.get_running_loop())
    connector._factory = handler  # noqa: SLF001 - there is no public way
    return connector
