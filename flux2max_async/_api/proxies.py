"""Proxies: those of the environment, or one for everything; and through which one a URL is requested.

aiohttp's own `trust_env` is not used, because it also sends what is in `.netrc`.
"""

import base64
import re
import ssl
from collections.abc import Mapping
from ipaddress import IPv4Network, IPv6Network, ip_network
from typing import Any
from urllib.parse import unquote, urlsplit
from urllib.request import getproxies_environment, proxy_bypass_environment  # type: ignore[attr-defined]

import attrs
from yarl import URL

from flux2max_async._api.addresses import parse_address
from flux2max_async._exceptions import ConfigurationError

_SUPPORTED = "an HTTP proxy, http://host:port or https://host:port, with user:password@ if it needs them"
_MAX_ROUTES = 1000
"""Origins that are remembered. Those of images are what the service sends."""


@attrs.frozen
class Proxy:
    """An HTTP proxy."""

    url: URL
    """Without user and password, so that no error shows them."""
    authorization: str | None = attrs.field(repr=False)
    """The header that authenticates there."""

    @property
    def address(self) -> tuple[str | None, int | None]:
        """Its host and port."""
        return self.url.host, self.url.port


@attrs.frozen
class Route:
    """How one origin is requested."""

    options: Mapping[str, Any] = attrs.field(repr=False)
    """Arguments of aiohttp's request methods."""
    headers: Mapping[str, str] = attrs.field(repr=False)
    """Further headers of each request."""
    proxy: Proxy | None


class Proxies:
    """The proxies of a session, as they are when it is created.

    The environment's are what HTTPS_PROXY, HTTP_PROXY, ALL_PROXY and NO_PROXY say, in upper or lower case, as
    `urllib.request` reads them. NO_PROXY may name networks, such as 10.0.0.0/8. This machine needs no proxy.

    Args:
        proxy: The proxy for everything; None for those of the environment.
        trust_env: Whether there are any of the environment.

    Raises:
        ConfigurationError: `proxy` is not the URL of an HTTP proxy.
    """

    def __init__(self, proxy: str | None, *, trust_env: bool) -> None:
        self._only = None if proxy is None else _usable("proxy", _parse(proxy))
        found = getproxies_environment() if trust_env and proxy is None else {}
        self._bypassed = _Bypassed.parse(found.pop("no", ""))
        self._found = {scheme: _parse(url) for scheme, url in found.items() if scheme in {"http", "https", "all"}}

    @property
    def addresses(self) -> frozenset[tuple[str | None, int | None]]:
        """The hosts and ports of all of them."""
        return frozenset(proxy.address for proxy in (self._only, *self._found.values()) if isinstance(proxy, Proxy))

    def find(self, scheme: str, host: str, port: int) -> Proxy | None:
        """Return the proxy for an origin.

        Raises:
            ConfigurationError: The environment's proxy can't be used.
        """
        if self._only is not None:
            return self._only
        name = scheme if scheme in self._found else "all"
        if name not in self._found or self._bypassed.includes(host, port):
            return None
        return _usable(f"{name.upper()}_PROXY", self._found[name])


class Routes:
    """How each origin is requested: through which proxy, and with which certificates.

    Args:
        proxies: The proxies.
        ssl_context: Verifies certificates; None for aiohttp's default.
    """

    def __init__(self, proxies: Proxies, ssl_context: ssl.SSLContext | None = None) -> None:
        self.proxies = proxies
        self._tls = {} if ssl_context is None else {"ssl": ssl_context}
        self._routes: dict[tuple[str, str, int], Route] = {}

    def find(self, url: URL) -> Route:
        """Return the route to a URL.

        Raises:
            ConfigurationError: The environment's proxy can't be used.
        """
        origin = (url.scheme, url.host or "", url.port or 0)
        route = self._routes.get(origin)
        if route is None:
            if len(self._routes) >= _MAX_ROUTES:
                self._routes.clear()
            route = self._routes[origin] = self._create(self.proxies.find(*origin), url.scheme)
        return route

    def _create(self, proxy: Proxy | None, scheme: str) -> Route:
        if proxy is None:
            return Route(self._tls, {}, None)
        options = {"proxy": proxy.url, **self._tls}
        headers = {} if proxy.authorization is None else {"Proxy-Authorization": proxy.authorization}
        if scheme == "http":  # the proxy reads the request itself; aiohttp would send them once for each connection
            return Route(options, headers, proxy)
        return Route({**options, "proxy_headers": headers}, {}, proxy)


@attrs.frozen
class _Bypassed:
    """What NO_PROXY names, and this machine."""

    networks: tuple[IPv4Network | IPv6Network, ...]
    names: str
    """Separated by commas."""

    @classmethod
    def parse(cls, text: str) -> "_Bypassed":
        networks: list[IPv4Network | IPv6Network] = []
        names: list[str] = []
        for entry in re.split(r"[\s,]+", text):
            try:
                networks.append(ip_network(entry.strip("[]"), strict=False))
            except ValueError:
                names.append(entry.removeprefix("*") or entry)
        return cls(tuple(networks), "*" if "*" in names else ",".join(names))

    def includes(self, host: str, port: int) -> bool:
        """Return whether a host is requested without a proxy."""
        try:
            address = parse_address(host)
        except ValueError:
            address = None
        if address is not None and (address.is_loopback or any(address in network for network in self.networks)):
            return True
        return bool(proxy_bypass_environment(f"{host.rstrip('.')}:{port}", {"no": self.names}))


def _usable(name: str, proxy: Proxy | str) -> Proxy:
    if isinstance(proxy, str):
        raise ConfigurationError(f"{name} {proxy}")
    return proxy


def _parse(text: Any) -> Proxy | str:
    """Return the proxy with a URL, or what is wrong with it, without the URL: it may hold a password.

    It is no exception because the frames of its traceback would hold the URL.
    """
    if not isinstance(text, str):
        return f"must be the URL of {_SUPPORTED}"
    scheme, separator, rest = text.strip().partition("://")
    if not separator:
        scheme, rest = "http", scheme
    scheme = scheme.lower()
    if scheme.startswith("socks"):
        return (
            f"is a SOCKS proxy, which is not supported: it must be {_SUPPORTED} (a borrowed http_session can have a "
            "connector for SOCKS)"
        )
    try:
        parts = urlsplit(f"{scheme}://{rest}")
        host, port = parts.hostname or "", parts.port
        url = URL.build(scheme=scheme, host=host, port=port or (443 if scheme == "https" else 80))
    except ValueError:
        return f"must be {_SUPPORTED}"
    if scheme not in {"http", "https"} or not host or not host.isprintable() or set(host) & set(" %\\"):
        return f"must be {_SUPPORTED}"
    if parts.username is None and parts.password is None:
        return Proxy(url, None)
    credentials = f"{unquote(parts.username or '')}:{unquote(parts.password or '')}"
    return Proxy(url, f"Basic {base64.b64encode(credentials.encode()).decode()}")
