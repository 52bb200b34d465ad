"""Redirects of downloads, followed here because aiohttp may spell the new URL differently."""

from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager

from flux2max_async._api.download_response import DownloadResponse
from flux2max_async._api.transport import Transport
from flux2max_async._downloads.urls import encode_url, resolve_redirect
from flux2max_async._exceptions import DownloadError

_MAX_REDIRECTS = 10
_REDIRECT_STATUSES = frozenset((301, 302, 303, 307, 308))


@asynccontextmanager
async def open_download(transport: Transport, url: str, headers: Mapping[str, str]) -> AsyncGenerator[DownloadResponse]:
    """Open a download, following redirects.

    Raises:
        DownloadError: The URL, or one that it redirects to, is not an http(s) URL or leads to a private address, or
            there are too many redirects.
        TransportError: There was no response.
        ProtocolError: The response is not valid HTTP.
        SessionClosedError: The aiohttp session is closed.
    """
    try:
        url = encode_url(url)
    except ValueError as error:
        raise DownloadError(f"can't download: the image's URL is {error}") from error
    for _ in range(_MAX_REDIRECTS + 1):
        async with transport.download(url, headers) as response:
            if response.status not in _REDIRECT_STATUSES:
                yield response
                return
            url = _redirect_target(response, url)
    raise DownloadError(f"can't download: more than {_MAX_REDIRECTS} redirects")


def _redirect_target(response: DownloadResponse, url: str) -> str:
    location = response.headers.get("Location", "")
    if not location:
        raise DownloadError(f"can't download: HTTP {response.status} without a Location")
    try:
        return resolve_redirect(location, url)
    except ValueError as error:
        raise DownloadError(f"can't download: the image's URL redirects to what is {error}") from error
