"""Borrowed aiohttp sessions: what of their own settings stays in force."""

import aiohttp


def has_own_connections(session: aiohttp.ClientSession) -> bool:
    """Return whether a session has a proxy or connector of its own: then the environment's proxies don't apply."""
    # There is no public way to read its proxy.
    return getattr(session, "_default_proxy", None) is not None or type(session.connector) is not aiohttp.TCPConnector


def own_middlewares(session: aiohttp.ClientSession) -> tuple[aiohttp.ClientMiddlewareType, ...]:
    """Return a session's middlewares, which those of a request replace."""
    return tuple(getattr(session, "_middlewares", ()))


def authorizing_middlewares(
    session: aiohttp.ClientSession, authorization: str
) -> tuple[aiohttp.ClientMiddlewareType, ...]:
    """Return the middlewares of an API call over a session with `trust_env`.

    With that, aiohttp looks for the host in `.netrc` before each call, and refuses a request that has the header
    already. So the header is set afterwards, instead of what `.netrc` says.
    """

    async def authorize(request: aiohttp.ClientRequest, handler: aiohttp.ClientHandlerType) -> aiohttp.ClientResponse:
        request.headers["Authorization"] = authorization
        return await handler(request)

    return (authorize, *own_middlewares(session))
