"""One call, one reply, no second try: the only room that knows aiohttp's client.

What decides whether a submit may be repeated is whether a byte of it was written, and aiohttp doesn't say: its errors
and timeouts look the same before and after. So the body of a submit notes when it is first asked for. And a submit
never shares a connection: on one that the server has just closed, an honest submit would fail exactly like a lost
answer.
"""

import asyncio
import math
from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime
from typing import cast
from urllib.parse import urlsplit

import aiohttp
from aiohttp.abc import AbstractStreamWriter
from aiohttp.client_proto import ResponseHandler
from aiohttp.http import StreamWriter
from yarl import URL

from flux2max_async._api.codec import HttpRequest
from flux2max_async._api.response import HttpResponse
from flux2max_async._exceptions import FluxError, ProtocolError, SessionClosedError, TransportError

_MAX_REPLY = 16_000_000
_CHUNK = 65_536
_CONNECTIONS = 100
_MAX_CONNECTIONS = 500


class Transport:
    """Makes calls to one gateway, with one key, over one aiohttp session.

    Args:
        api_key: Sent as the bearer token, to the gateway only.
        base_url: Where the gateway is, path prefix included.
        user_agent: How we introduce ourselves.
        timeout: Seconds for one exchange, from waiting for a connection to the last byte of the answer.
        http: A borrowed aiohttp session; it is never closed here.
        secrets: What the service might echo beside the key, and no error may repeat.
    """

    def __init__(
        self,
        api_key: str,
        base_url: str,
        *,
        user_agent: str,
        timeout: float,
        http: aiohttp.ClientSession | None,
        secrets: tuple[str, ...] = (),
    ) -> None:
        self._base_url = base_url
        self._host = urlsplit(base_url).hostname
        self._agent = {"User-Agent": user_agent}
        self._headers = {
            **self._agent,
            "Accept": "application/json",
            "Accept-Encoding": "identity",  # an answer is small, and some borrowed sessions don't unpack
            "Authorization": f"Bearer {api_key}",
        }
        self.secrets: tuple[str, ...] = (api_key, *secrets)
        self._timeout = timeout
        self._borrowed = http is not None
        self._calls = http
        self._downloads = http

    def open(self, places: int) -> None:
        """Make the connection pools; needs a running event loop.

        Args:
            places: How many calls may go on at once.
        """
        if not self._borrowed:
            # Downloads have a pool of their own: many slow ones must not keep polls from looking.
            self._calls = _pool(max(_CONNECTIONS, min(places, _MAX_CONNECTIONS)))
            self._downloads = _pool(_CONNECTIONS)

    async def close(self) -> None:
        """Close the connections that are ours."""
        if not self._borrowed:
            # Must not be cut short, or sockets leak; doesn't take long.
            with suppress(TimeoutError):
                async with asyncio.timeout(5):
                    for http in filter(None, (self._calls, self._downloads)):
                        await http.close()

    async def exchange(self, call: HttpRequest, *, within: float = math.inf) -> HttpResponse:
        """Make one call and read its reply whole.

        Args:
            call: What to ask.
            within: Seconds that the whole exchange may take, where that is less than the request timeout.

        Raises:
            TransportError: Nothing was answered; `maybe_sent` tells whether a byte of the call was written.
            ProtocolError: The answer was no HTTP, or endless.
            SessionClosedError: The aiohttp session is closed.
        """
        http = _usable(self._calls)
        body = None if call.body is None else _NotingPayload(call.body)
        url = URL(self._base_url + call.path, encoded=True)
        failure: FluxError
        try:
            async with asyncio.timeout(min(self._timeout, within)):
                if body is None:
                    exchange = http.get(
                        url, headers=self._headers, allow_redirects=False, timeout=_NO_TIMEOUT, raise_for_status=False
                    )
                else:
                    exchange = http.post(
                        url,
                        data=body,
                        headers={**self._headers, "Connection": "close"},
                        allow_redirects=False,
                        timeout=_NO_TIMEOUT,
                        raise_for_status=False,
                        # It is the host that would be verified anyway. Naming it gives submits a pool of their own.
                        server_hostname=self._host,
                    )
                async with exchange as response:
                    content = await _read(response)
            return HttpResponse(response.status, response.headers, content, datetime.now(UTC), self.secrets)
        except (aiohttp.ClientError, OSError, ValueError) as error:
            failure = _translated(error, maybe_sent=body is None or body.written)
        try:
            # Raised outside the handler: aiohttp's error knows the headers, the key among them, and goes no further.
            raise failure
        finally:
            del failure, body  # or the error, which holds this frame, would hold the pictures that were sent

    @asynccontextmanager
    async def download(self, url: str, headers: Mapping[str, str]) -> AsyncGenerator["DownloadResponse"]:
        """Open a download from anywhere, without the key, following redirects.

        Raises:
            TransportError: Nothing was answered.
            ProtocolError: The url or the answer is no HTTP.
            SessionClosedError: The aiohttp session is closed.
        """
        http = _usable(self._downloads)
        # A picture may take long on a slow line: what counts is that bytes keep coming.
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=self._timeout, sock_read=self._timeout)
        # Identity: the length and the ranges of what is stored are those of what is sent.
        all_headers = {**self._agent, "Accept": "image/*", "Accept-Encoding": "identity", **headers}
        try:
            response = await http.get(url, headers=all_headers, timeout=timeout, raise_for_status=False)
        except (aiohttp.ClientError, OSError, ValueError) as error:
            failure = _translated(error, maybe_sent=True)
            raise failure from failure.__cause__
        async with response:
            yield DownloadResponse(response)


def _pool(connections: int) -> aiohttp.ClientSession:
    return aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=connections), cookie_jar=aiohttp.DummyCookieJar())


def _usable(http: aiohttp.ClientSession | None) -> aiohttp.ClientSession:
    if http is None or http.closed:
        raise SessionClosedError("the HTTP session is closed")
    return http


_NO_TIMEOUT = aiohttp.ClientTimeout(total=None, sock_connect=None)


class DownloadResponse:
    """The answer to a download: its facts, then its bytes."""

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self.status = response.status
        self.headers: Mapping[str, str] = response.headers
        self._content = response.content

    async def read(self) -> bytes:
        """Read some more bytes; none at the end.

        Raises:
            TransportError: The answer was cut.
        """
        try:
            return await self._content.read(_CHUNK)
        except (aiohttp.ClientError, OSError) as error:
            failure = _translated(error, maybe_sent=True)
            raise failure from failure.__cause__


class _NotingPayload(aiohttp.Payload):
    """The body of a submit, which notes when it is first asked for, and keeps its connection for itself."""

    _autoclose = True

    def __init__(self, value: bytes) -> None:
        super().__init__(value, content_type="application/json")
        self._size = len(value)
        self.written = False

    async def write(self, writer: AbstractStreamWriter) -> None:
        await self.write_with_length(writer, None)

    async def write_with_length(self, writer: AbstractStreamWriter, content_length: int | None) -> None:
        if self.written:
            raise ConnectionError("a submit is never written twice")  # a middleware of a borrowed session may try
        self.written = True
        cast("ResponseHandler", cast("StreamWriter", writer).protocol).force_close()
        view = memoryview(self._value)[:content_length]
        # In pieces, so that a body of many megabytes leaves the event loop room to breathe.
        for start in range(0, len(view), _CHUNK):
            await writer.write(view[start : start + _CHUNK])

    def decode(self, encoding: str = "utf-8", errors: str = "strict") -> str:
        return bytes(self._value).decode(encoding, errors)


async def _read(response: aiohttp.ClientResponse) -> bytes:
    content = bytearray()
    while not response.content.at_eof():
        content += await response.content.readany()
        if len(content) > _MAX_REPLY:
            raise ProtocolError("the answer is larger than 16 MB")
    return bytes(content)


def _translated(error: Exception, *, maybe_sent: bool) -> FluxError:
    """Say in our words what went wrong, with a cause that holds no headers."""
    match error:
        case aiohttp.ClientConnectorError() | aiohttp.ConnectionTimeoutError():
            result: FluxError = TransportError(f"no connection: {error}", maybe_sent=maybe_sent)
        case aiohttp.ClientPayloadError() | aiohttp.ServerDisconnectedError():
            result = TransportError("the connection was closed before the whole answer had come", maybe_sent=maybe_sent)
        case TimeoutError():
            result = TransportError("no answer in time", maybe_sent=maybe_sent)
        case aiohttp.ClientResponseError() | aiohttp.NonHttpUrlClientError() | ValueError():
            # Its repr shows the call's headers: it is described and dropped.
            if not maybe_sent:
                return TransportError(f"no connection: {error.__class__.__name__}", maybe_sent=False)
            return ProtocolError(f"no HTTP that can be read: {error.__class__.__name__}")
        case _:
            result = TransportError(f"the connection broke: {error}", maybe_sent=maybe_sent)
    # Without its traceback, whose frames hold the headers too.
    result.__cause__ = error.with_traceback(None)
    return result
