"""HTTP exchanges over aiohttp, without retries.

Whether a submit may be repeated depends on whether any byte of it was written. aiohttp doesn't report that: the same
errors and timeouts occur before and after. So the body of a submit (`SubmitPayload`) records when it is written.

If the server has just closed a kept-alive connection, a submit on it fails exactly like one whose response was lost.
`SubmitConnector` provides connections on which that doesn't happen. Over a borrowed session, no submit reuses one.
"""

import math
import platform
import ssl
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any, cast
from urllib.parse import urlsplit

import aiohttp
from aiohttp.client_proto import ResponseHandler
from yarl import URL

from flux2max_async._api.addresses import AddressGuard, PrivateAddressError
from flux2max_async._api.aiohttp_errors import refused_by_proxy, translate_error
from flux2max_async._api.borrowed_session import authorizing_middlewares, has_own_connections
from flux2max_async._api.codec import HttpRequest
from flux2max_async._api.connections import ConnectionUse, SpareOpened, SubmitConnector, connection_use
from flux2max_async._api.credentials import create_credentials
from flux2max_async._api.download_guards import DOWNLOAD_POOL_SIZE, GuardedResolver, borrowed_middlewares, max_downloads
from flux2max_async._api.download_response import DownloadResponse
from flux2max_async._api.give_up import PollLimit
from flux2max_async._api.header_limit import limit_headers
from flux2max_async._api.outage import Outage
from flux2max_async._api.poll_timeout import SlowPollError
from flux2max_async._api.proxies import Proxies, Route, Routes
from flux2max_async._api.response import HttpResponse
from flux2max_async._api.response_content import ContentReader
from flux2max_async._api.submit_payload import SubmitPayload
from flux2max_async._config import ApiKey
from flux2max_async._exceptions import ConfigurationError, DownloadError, FluxError, SessionClosedError, TransportError
from flux2max_async._timeouts import GRACE_PERIOD, Timeout
from flux2max_async._version import __version__

_MIN_POOL_SIZE = 100
_MAX_POOL_SIZE = 500
_MAX_URLS = 1024  # so many are kept for further polls, with what aiohttp computes from each
_CLOSE_TIMEOUT = 5.0
"""Seconds."""
_MAX_HEADER_BYTES = 65_536
"""Maximum size of one response header; aiohttp's own limit is 8,190 bytes."""
_REQUEST_OPTIONS: dict[str, Any] = {
    "allow_redirects": False,
    "raise_for_status": False,
    "max_line_size": _MAX_HEADER_BYTES,
    "max_field_size": _MAX_HEADER_BYTES,
    "max_headers": 1000,
}
"""For each request, because a borrowed session has options of its own."""
_USER_AGENT = f"flux2max_async/{__version__} aiohttp/{aiohttp.__version__} Python/{platform.python_version()}"


class Transport:
    """Exchanges HTTP messages with one base URL, and opens downloads from any host.

    Args:
        api_key: The bearer token, or the function that returns it; sent to the base URL only.
        base_url: The URL of the API, including any path prefix.
        timeout: Maximum duration of one exchange in seconds, from waiting for a connection to the last byte received.
        http: A borrowed aiohttp session, which is never closed here. None: sessions of our own.
        headers: Further headers of calls to the API.
        proxy: The URL of a proxy for everything.
        trust_env: Whether there are proxies of the environment.
        ssl_context: Verifies certificates.
        secrets: Texts besides the key that no error may show, even if the service echoes them.
        allow_private_downloads: Whether downloads may come from private addresses if base_url isn't at one.

    Raises:
        ConfigurationError: The proxy can't be used.
    """

    def __init__(
        self,
        api_key: ApiKey,
        base_url: str,
        *,
        timeout: float,
        http: aiohttp.ClientSession | None,
        headers: Mapping[str, str] | None = None,
        proxy: str | None = None,
        trust_env: bool = False,
        ssl_context: ssl.SSLContext | None = None,
        secrets: Sequence[str] = (),
        allow_private_downloads: bool = False,
    ) -> None:
        self.base_url = base_url
        self._host = urlsplit(base_url).hostname or ""
        self._credentials = credentials = create_credentials(api_key, secrets, timeout=timeout)
        self.secrets: Sequence[str] = credentials.secrets
        trust_env = trust_env and not (http is not None and has_own_connections(http))
        self._routes = Routes(Proxies(proxy, trust_env=trust_env), ssl_context)
        route = self._routes.find(URL(base_url, encoded=True))
        self._address_guard = AddressGuard(self._host, allow_private=allow_private_downloads)
        self._url = lru_cache(_MAX_URLS)(lambda path: URL(base_url + path, encoded=True))
        self._user_agent = {"User-Agent": _USER_AGENT}
        self._api_headers = {
            **self._user_agent,
            "Accept": "application/json",
            "Accept-Encoding": "identity",  # responses are small, and some borrowed sessions don't decompress
            "Authorization": credentials.header,
            **route.headers,
        }
        if headers:  # names are the same in upper and lower case
            names = {name.lower() for name in headers}
            ours = {name: value for name, value in self._api_headers.items() if name.lower() not in names}
            self._api_headers = {**ours, **headers}
        no_timeout = aiohttp.ClientTimeout(total=None, sock_connect=None)
        self._api_options: dict[str, Any] = {**_REQUEST_OPTIONS, "timeout": no_timeout, **route.options}
        self.outage: Outage = Outage(base_url)
        self._timeout = timeout
        self._is_borrowed = http is not None
        self.max_downloads: int = max_downloads(http)
        self._api_session = http
        self._connector: SubmitConnector | None = None
        self._may_write: Callable[[ResponseHandler], bool] | None = None
        self._download_session = http
        self._content_reader = ContentReader()

    def open(self, max_in_flight: int) -> None:
        """Create the connection pools. Needs a running event loop.

        Args:
            max_in_flight: Maximum number of tasks in flight, which determines the size of the pool.
        """
        if not self._is_borrowed:
            pool_size = max(_MIN_POOL_SIZE, min(max_in_flight, _MAX_POOL_SIZE))
            self._connector = SubmitConnector(limit=pool_size, open_spare=self._open_spare)
            self._may_write = self._connector.may_write
            self._api_session = _create_session(self._connector)
            # Downloads have their own pool, so that many slow ones can't delay polls.
            resolver = GuardedResolver(self._address_guard, self._routes.proxies.addresses)
            self._download_session = _create_session(
                limit_headers(aiohttp.TCPConnector(limit=DOWNLOAD_POOL_SIZE, resolver=resolver))
            )

    def expect_submit(self) -> None:
        """Open a connection for a submit that will be made soon, unless there is one."""
        if self._connector is not None:
            self._connector.expect_submit()

    async def close(self) -> None:
        """Close our own connections; a borrowed session stays open."""
        self.outage.end()
        self._credentials.close()
        if not self._is_borrowed:
            # Sockets would leak if this were interrupted early. It normally takes milliseconds.
            with suppress(TimeoutError), Timeout(_CLOSE_TIMEOUT):
                for session in filter(None, (self._api_session, self._download_session)):
                    await session.close()

    async def exchange(
        self,
        request: HttpRequest,
        limit: PollLimit | None = None,
        *,
        within: float = math.inf,
        fresh_connection: bool = False,
    ) -> HttpResponse:
        """Send a request and read the whole response.

        Args:
            request: The request.
            limit: The time limit of a poll that is repeated if it fails; None for that of other requests.
            within: Seconds for which the request is repeated if it fails; infinite for one that isn't, or for ever.
            fresh_connection: Whether to open a new connection for it.

        Raises:
            TransportError: There was no complete response; `maybe_sent` is True if the request may have been written.
            ProtocolError: The response is not valid HTTP, or is too large.
            NoKeyError: There is no API key.
            SessionClosedError: The aiohttp session is closed.
        """
        credentials = self._credentials
        time_limit = limit or Timeout(min(self._timeout, within), grace=GRACE_PERIOD)
        payload = self._create_payload(request, time_limit)
        failure: FluxError
        try:
            with time_limit:
                if not credentials.is_fixed:
                    await credentials.refresh()
                version = credentials.version
                response = await self._call(request, payload, limit, fresh_connection=fresh_connection)
                if response.status == 401 and await credentials.has_changed(version):
                    payload = self._create_payload(request, time_limit)
                    response = await self._call(request, payload, limit, fresh_connection=fresh_connection)
        except SlowPollError:
            raise  # this says nothing about the service
        except TransportError as error:
            failure = error
        except (aiohttp.ClientError, OSError, ValueError) as error:
            failure = translate_error(error, maybe_sent=payload is None or payload.is_written)
        else:
            if self.outage.is_on:
                self.outage.end()
            return response
        self.outage.on_failure(failure, within, is_poll=payload is None)
        try:
            # Raised outside the except block, so that aiohttp's error, which holds the headers and so the key, does not
            # become its context.
            raise failure
        finally:
            # The error's traceback refers to this frame, which would keep the input images in memory.
            del failure, payload

    def _create_payload(self, request: HttpRequest, limit: Timeout) -> SubmitPayload | None:
        return None if request.body is None else SubmitPayload(request.body, self._may_write, limit)

    async def _call(
        self, request: HttpRequest, payload: SubmitPayload | None, limit: PollLimit | None, *, fresh_connection: bool
    ) -> HttpResponse:
        async with self._send(request, payload, fresh_connection=fresh_connection) as response:
            if response.status == 407:
                raise refused_by_proxy()
            on_data = None if limit is None else limit.on_data
            content = await self._content_reader.read(response.content, is_submit=payload is not None, on_data=on_data)
        return HttpResponse(response.status, response.headers, content, datetime.now(UTC), self.secrets)

    def _send(
        self, request: HttpRequest, payload: SubmitPayload | None, *, fresh_connection: bool
    ) -> "aiohttp.client._RequestContextManager":
        session, headers = _require_open(self._api_session), self._api_headers
        options: dict[str, Any] = self._api_options
        if not self._credentials.is_fixed:
            headers = {**headers, "Authorization": self._credentials.header}
        if not self._is_borrowed:
            use = ConnectionUse.WARM if payload is not None else ConnectionUse.ANY
            connection_use.set(ConnectionUse.NEW if fresh_connection else use)
        elif payload is not None or fresh_connection:
            # aiohttp pools connections by the host name that is verified, so these get their own. The payload closes
            # it afterwards, even if the server doesn't.
            headers = {**headers, "Connection": "close"}
            options = {**options, "server_hostname": self._host}
            payload = payload or SubmitPayload(b"")
        if session.trust_env:
            options = {**options, "middlewares": authorizing_middlewares(session, headers["Authorization"])}
            headers = {name: value for name, value in headers.items() if name != "Authorization"}
        return session.request(request.method, self._url(request.path), data=payload, headers=headers, **options)

    async def _open_spare(self) -> bool:
        """Open a connection for the connector, in the same way as a submit would; return whether that has worked."""
        session, connector = cast("aiohttp.ClientSession", self._api_session), cast("SubmitConnector", self._connector)
        url = URL(self.base_url, encoded=True)
        if self.outage.lasts:  # a proxy may lock an account after several wrong passwords
            return False
        try:
            await session.get(url, **self._api_options, middlewares=(connector.open_only,))
        except SpareOpened:
            return True
        except (aiohttp.ClientError, OSError, ValueError) as error:
            # The next submit will meet the same error, and report it.
            self.outage.on_failure(translate_error(error, maybe_sent=False), math.inf, is_poll=False)
        return False

    @asynccontextmanager
    async def download(self, url: str, headers: Mapping[str, str]) -> AsyncGenerator[DownloadResponse]:
        """Open a download, without the key and whatever else a borrowed session sends, and without following redirects.

        A private address is refused. Our own sessions check what they connect to, borrowed ones what they have
        connected to, before the request is sent. Which address a proxy connects to is not known here: then only hosts
        that are addresses themselves are refused.

        Args:
            url: The URL, which is sent byte for byte.
            headers: Further headers.

        Raises:
            DownloadError: The host is at a private address.
            TransportError: There was no response.
            ProtocolError: The URL or the response is not valid HTTP.
            SessionClosedError: The aiohttp session is closed.
        """
        session, guard = _require_open(self._download_session), self._address_guard
        # An image may take long on a slow connection: only a stall is a timeout.
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=self._timeout, sock_read=self._timeout)
        # With any other encoding, lengths and ranges would refer to the encoded content.
        all_headers = {**self._user_agent, "Accept": "image/*", "Accept-Encoding": "identity", **headers}
        try:
            exact_url = _exact_url(url)
            route = self._route_to_image(exact_url)
            all_headers |= route.headers
            await guard.check_literal(exact_url.raw_host or "")
            response = await session.get(
                exact_url,
                headers=all_headers,
                timeout=timeout,
                **_REQUEST_OPTIONS,
                **route.options,
                middlewares=borrowed_middlewares(session, exact_url, all_headers, guard) if self._is_borrowed else None,
            )
        except PrivateAddressError as error:
            # A new error for each download: aiohttp raises the same one for all that wait for the same DNS lookup.
            raise DownloadError(f"can't download: {error}") from None
        except (aiohttp.ClientError, OSError, ValueError) as error:
            failure = translate_error(error, maybe_sent=True)
            raise failure from failure.__cause__
        async with response:
            if response.status == 407:
                raise refused_by_proxy()
            yield DownloadResponse(response)

    def _route_to_image(self, url: URL) -> Route:
        try:
            route = self._routes.find(url)
        except ConfigurationError as error:
            raise DownloadError(f"can't download: {error}") from error
        # Its addresses are not checked.
        if (url.host, url.port) in self._routes.proxies.addresses:
            raise DownloadError("can't download: the image's URL is the proxy's")
        return route


def _create_session(connector: aiohttp.TCPConnector) -> aiohttp.ClientSession:
    return aiohttp.ClientSession(connector=connector, cookie_jar=aiohttp.DummyCookieJar())


def _exact_url(text: str) -> URL:
    """Return a URL that aiohttp sends as it is spelled."""
    url = URL(text, encoded=True)
    if not text.endswith("?") or url.raw_query_string:
        return url
    # yarl drops an empty query, but a question mark in the path is sent.
    return URL.build(scheme=url.scheme, authority=url.raw_authority, path=f"{url.raw_path}?", encoded=True)


def _require_open(session: aiohttp.ClientSession | None) -> aiohttp.ClientSession:
    if session is None or session.closed:
        raise SessionClosedError("the HTTP session is closed")
    return session
