"""What happens before the request of a download is sent: addresses are checked, and foreign headers are dropped."""

import socket
from collections.abc import Collection, Mapping

import aiohttp
from aiohttp.abc import ResolveResult
from aiohttp.connector import Connection
from yarl import URL

from flux2max_async._api.addresses import AddressGuard
from flux2max_async._api.borrowed_session import own_middlewares

DOWNLOAD_POOL_SIZE = 100


class GuardedResolver(aiohttp.ThreadedResolver):
    """The resolver of our own downloads, which refuses private addresses before anything connects to them.

    aiohttp doesn't ask it about hosts that are addresses: `AddressGuard.check_literal()` does.

    Args:
        guard: Checks the addresses.
        proxies: The hosts and ports of the proxies, which may be anywhere.
    """

    def __init__(self, guard: AddressGuard, proxies: Collection[tuple[str | None, int | None]]) -> None:
        super().__init__()
        self._guard = guard
        self._proxies = proxies

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        results = await super().resolve(host, port, family)
        for result in results if (host, port) not in self._proxies else ():
            await self._guard.check(host, result["host"])
        return results


def borrowed_middlewares(
    session: aiohttp.ClientSession, url: URL, headers: Mapping[str, str], guard: AddressGuard
) -> tuple[aiohttp.ClientMiddlewareType, ...]:
    """Return the middlewares of a download over a borrowed session: its own, between two of ours.

    Args:
        session: The borrowed session.
        url: The URL of the download.
        headers: The headers of the download, the only ones that are sent.
        guard: Checks the address of each connection.
    """
    kept = {"host", *map(str.lower, headers), *(("authorization",) if url.raw_user else ())}

    async def drop_other_headers(
        request: aiohttp.ClientRequest, handler: aiohttp.ClientHandlerType
    ) -> aiohttp.ClientResponse:
        """Drop the session's headers, cookies and credentials; a user and password in the URL are the image's own."""
        for name in {name for name in request.headers if name.lower() not in kept}:
            request.headers.popall(name)
        return await handler(request)

    async def check_peer(request: aiohttp.ClientRequest, handler: aiohttp.ClientHandlerType) -> aiohttp.ClientResponse:
        """Check the address after connecting, because the connector is not ours, and before sending."""
        send = request.send

        async def check_and_send(conn: Connection) -> aiohttp.ClientResponse:
            peer = conn.transport and conn.transport.get_extra_info("peername")
            # A Unix socket has no address, and that of a proxy says nothing about the host.
            if isinstance(peer, tuple) and request.proxy is None:
                await guard.check(request.host, peer[0])
            return await send(conn)

        # No hook is called between connecting and sending.
        request.send = check_and_send  # type: ignore[method-assign]
        return await handler(request)

    return (drop_other_headers, *own_middlewares(session), check_peer)


def max_downloads(http: aiohttp.ClientSession | None) -> int:
    """Return how many downloads from one host may run at the same time."""
    limits = [DOWNLOAD_POOL_SIZE]
    if http is not None and http.connector is not None:
        limits += [http.connector.limit, http.connector.limit_per_host]
    return min(limit for limit in limits if limit)  # 0: no limit
