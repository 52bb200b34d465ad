"""Addresses of downloads: images don't come from this machine or from private networks, unless base_url is there too.

The URL of an image is whatever the service sends. Without this check, a hostile answer could have this machine request
what only this machine can reach, and save the result.
"""

import asyncio
import contextlib
import socket
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address

Address = IPv4Address | IPv6Address

_MAX_SHOWN_LENGTH = 80
# https://www.iana.org/assignments/iana-ipv4-special-registry, and multicast. Python's own list differs by version.
_PRIVATE_IPV4 = tuple(
    map(
        IPv4Network,
        (
            *("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12"),
            *("192.0.0.0/24", "192.0.2.0/24", "192.168.0.0/16", "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24"),
            *("224.0.0.0/4", "240.0.0.0/4"),
        ),
    )
)
# https://www.iana.org/assignments/ipv6-address-space, and the special registry.
_GLOBAL_IPV6 = IPv6Network("2000::/3")
_PRIVATE_IPV6 = tuple(map(IPv6Network, ("2001::/23", "2001:db8::/32", "3fff::/20")))
_EMBEDDED_IPV4 = tuple(map(IPv6Network, ("::/96", "::ffff:0:0/96", "::ffff:0:0:0/96", "64:ff9b::/96")))
"""Compatible, mapped, translated and NAT64 addresses, whose last 32 bits are an IPv4 address."""


class PrivateAddressError(Exception):
    """A download would have connected to a private address."""


def is_private(address: Address) -> bool:
    """Return whether an address is not one of the public internet.

    These are loopback, link-local, private, shared (100.64.0.0/10), unspecified, multicast and reserved addresses, and
    IPv6 addresses that embed such an IPv4 address.
    """
    if isinstance(address, IPv6Address):
        embedded = _embedded_ipv4(address)
        if embedded is None:
            return address not in _GLOBAL_IPV6 or any(address in network for network in _PRIVATE_IPV6)
        address = embedded
    return any(address in network for network in _PRIVATE_IPV4)


def _embedded_ipv4(address: IPv6Address) -> IPv4Address | None:
    if any(address in network for network in _EMBEDDED_IPV4):
        return IPv4Address(int(address) & 0xFFFFFFFF)
    return address.sixtofour


def parse_address(host: str) -> Address | None:
    """Return the address that a URL's host stands for without DNS; None for a name.

    Resolvers and proxies also take `0x7f.1`, `017700000001` and `2130706433` for 127.0.0.1.

    Raises:
        ValueError: The host is an IPv6 address that is not valid.
    """
    host = host.lower().rstrip(".")
    if ":" in host:
        return ip_address(host)
    if host == "localhost" or host.endswith(".localhost"):
        return IPv4Address("127.0.0.1")
    with contextlib.suppress(OSError):
        return IPv4Address(socket.inet_aton(host))
    return None


class AddressGuard:
    """Refuses private addresses for downloads.

    Whether base_url is at a private address is found out when a download meets the first one, so that other sessions
    need no further DNS lookup. If base_url can't be resolved then, the address is refused.

    Args:
        base_host: The host of base_url: if one of its addresses is private, private addresses are allowed.
        allow_private: Whether they are allowed in any case.
    """

    def __init__(self, base_host: str, *, allow_private: bool) -> None:
        self._base_host = base_host
        self._allows_private = True if allow_private else None
        """None: not known yet."""

    async def check(self, host: str, address: str) -> None:
        """Check an address to which a download connects.

        Args:
            host: The host in the URL, for the error.
            address: The address.

        Raises:
            PrivateAddressError: It is private, and private addresses are not allowed.
        """
        if is_private(ip_address(address)) and not await self._are_private_allowed():
            raise PrivateAddressError(
                f"{host[:_MAX_SHOWN_LENGTH]} is at the private address {address}, and base_url is not at one "
                "(allow_private_downloads=True permits that)"
            )

    async def check_literal(self, host: str) -> None:
        """Check a host that is an address itself, before anything is connected.

        Raises:
            PrivateAddressError: As for `check()`.
            ValueError: As for `parse_address()`.
        """
        if address := parse_address(host):
            await self.check(host, str(address))

    async def _are_private_allowed(self) -> bool:
        if self._allows_private is None:
            try:
                addresses = await _resolve(self._base_host)
            except OSError:
                return False
            self._allows_private = any(map(is_private, addresses))
        return self._allows_private


async def _resolve(host: str) -> list[Address]:
    if address := parse_address(host):
        return [address]
    infos = await asyncio.get_running_loop().getaddrinfo(host, None, type=socket.SOCK_STREAM)
    return [ip_address(info[4][0]) for info in infos]
