"""Addresses: which are private, in which spellings, and when base_url makes them acceptable."""

import contextlib
import socket
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flux2max_async._api.addresses import AddressGuard, PrivateAddressError, is_private, parse_address

PRIVATE_IPV4 = """
    0.0.0.0 0.1.2.3 0.255.255.255 10.0.0.0 10.255.255.255 100.64.0.0 100.100.100.200 100.127.255.255
    127.0.0.1 127.255.255.254 169.254.0.0 169.254.169.254 172.16.0.0 172.31.255.255 192.0.0.192 192.0.2.1
    192.168.0.0 192.168.255.255 198.18.0.1 198.19.255.255 198.51.100.7 203.0.113.7 224.0.0.1 239.255.255.250
    240.0.0.1 255.255.255.255
""".split()  # noqa: SIM905 - a table
PUBLIC_IPV4 = """
    1.1.1.1 8.8.8.8 9.255.255.255 11.0.0.0 100.63.255.255 100.128.0.0 126.255.255.255 128.0.0.0 169.253.255.255
    169.255.0.0 172.15.255.255 172.32.0.0 192.0.1.0 192.167.255.255 192.169.0.0 198.17.255.255 198.20.0.0
    223.255.255.255
""".split()  # noqa: SIM905 - a table
PRIVATE_IPV6 = """
    :: ::1 ::2 fe80::1 fe80::1%eth0 febf::1 fec0::1 fc00::1 fd00:ec2::254 fdff::1 ff02::1 ff0e::1 100::1 2001:db8::1
    2001::1 2001:1ff::1 3fff::1 64:ff9b:1::808:808 5f00::1 4000::1 1fff::1
""".split()  # noqa: SIM905 - a table
PUBLIC_IPV6 = ["2606:4700:4700::1111", "2a00:1450:4001::200e", "2001:4860:4860::8888", "2400:cb00::1", "3ffe::1"]
EMBEDDED = [
    *("::ffff:{}", "::{}", "::ffff:0:{}", "64:ff9b::{}"),
    "2002:{hex}::1",
]


@pytest.mark.parametrize("text", [*PRIVATE_IPV4, *PRIVATE_IPV6])
def test_private_addresses(text: str) -> None:
    """Whatever is not an address of the public internet is private."""
    assert is_private(ip_address(text))


@pytest.mark.parametrize("text", [*PUBLIC_IPV4, *PUBLIC_IPV6])
def test_public_addresses(text: str) -> None:
    """Addresses next to the private ones are public."""
    assert not is_private(ip_address(text))


@pytest.mark.parametrize("form", EMBEDDED)
@pytest.mark.parametrize(
    ("ipv4", "expected"), [*((text, True) for text in PRIVATE_IPV4), *((text, False) for text in PUBLIC_IPV4)]
)
def test_embedded_addresses(form: str, ipv4: str, expected: bool) -> None:
    """An IPv6 address that embeds an IPv4 address is what that one is."""
    digits = f"{int(IPv4Address(ipv4)):08x}"
    text = form.format(ipv4, hex=f"{digits[:4]}:{digits[4:]}")

    assert is_private(ip_address(text)) is expected


@given(st.ip_addresses())
def test_python_knows_no_more_private_addresses(address: IPv4Address | IPv6Address) -> None:
    """What Python calls loopback, link-local, private, reserved or multicast is private."""
    if isinstance(address, IPv4Address):
        special = (address.is_private, address.is_multicast, address.is_reserved, address.is_unspecified)
        if any(special) and not address.is_global:
            assert is_private(address)
    elif address.is_loopback or address.is_link_local or address.is_multicast or address.is_site_local:
        assert is_private(address)


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        *((host, "127.0.0.1") for host in ("127.0.0.1", "127.1", "127.0.1", "2130706433", "0x7f000001", "0X7F.1")),
        *((host, "127.0.0.1") for host in ("017700000001", "0177.0.0.01", "0x7f.0x0.0x0.0x1", "127.0.0.1.", "127.1..")),
        *((host, "127.0.0.1") for host in ("localhost", "LocalHost", "localhost.", "a.localhost", "a.b.LOCALHOST.")),
        *(("0", "0.0.0.0"), ("0x0", "0.0.0.0"), ("10.1", "10.0.0.1"), ("2852039166", "169.254.169.254")),
        *(("::1", "::1"), ("::FFFF:127.0.0.1", "::ffff:7f00:1"), ("fe80::1%25eth0", "fe80::1%25eth0")),
        *((host, None) for host in ("example.com", "localhost.example", "notlocalhost", "1.example", "", "256.1.1.1x")),
        *((host, None) for host in ("127.0.0.1.example", "0x7g.1", "1.2.3.4.5", "4294967296", "256.0.0.1", "-")),
    ],
)
def test_spellings(host: str, expected: str | None) -> None:
    """A host is an address in every spelling that a resolver takes for one, and otherwise a name."""
    assert parse_address(host) == (None if expected is None else ip_address(expected))


@pytest.mark.parametrize("host", ["::1%", ":", "1::2::3", "::127.0.0.256", "v1.a:b", "[::1]"])
def test_ipv6_addresses_that_are_not_valid(host: str) -> None:
    """A host with a colon can only be an IPv6 address."""
    with pytest.raises(ValueError, match="address"):
        parse_address(host)


@given(st.ip_addresses(v=4), st.sampled_from(["{:d}", "0x{:x}", "0{:o}", "{0}"]))
def test_any_ipv4_address_in_any_base(address: IPv4Address, form: str) -> None:
    """An address is recognized as one number, in any base."""
    assert parse_address(form.format(int(address))) == address
    assert parse_address(str(address)) == address


# ---------------------------------------------------------------------- the guard


class Resolver:
    """A replacement of socket.getaddrinfo() with names of its own, which counts the lookups."""

    def __init__(self, **hosts: list[str]) -> None:
        self.hosts = hosts
        self.lookups: list[str] = []

    def __call__(self, host: str, port: Any, *args: Any, **options: Any) -> list[Any]:
        self.lookups.append(host)
        if host not in self.hosts:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in self.hosts[host]]


@pytest.fixture
def resolver(monkeypatch: pytest.MonkeyPatch) -> Resolver:
    """Provide DNS with a few names."""
    resolver = Resolver(public=["1.1.1.1", "2606:4700::1"], private=["10.0.0.1"], mixed=["1.1.1.1", "fd00::1%eth0"])
    monkeypatch.setattr(socket, "getaddrinfo", resolver)
    return resolver


@pytest.mark.parametrize(
    ("base_host", "is_allowed", "lookups"),
    [
        ("1.1.1.1", False, 0),
        ("2606:4700::1", False, 0),
        ("127.0.0.1", True, 0),
        ("::1", True, 0),
        ("10.0.0.1", True, 0),
        ("localhost", True, 0),
        ("public", False, 1),
        ("private", True, 1),
        ("mixed", True, 1),
        ("unknown", False, 2),
    ],
)
async def test_guard(resolver: Resolver, base_host: str, is_allowed: bool, lookups: int) -> None:
    """Private addresses are refused unless base_url is at one, which is looked up once, if it can be."""
    guard = AddressGuard(base_host, allow_private=False)
    expectation = (
        contextlib.nullcontext()
        if is_allowed
        else pytest.raises(PrivateAddressError, match=r"private address 127.0.0.1.*allow_private_downloads=True")
    )
    await guard.check("a", "1.1.1.1")
    await guard.check_literal("1.1.1.1")
    await guard.check_literal("pictures.example")
    lookups_before = len(resolver.lookups)
    for check in (guard.check("pictures.example", "127.0.0.1"), guard.check_literal("0x7f.1")):
        with expectation:
            await check

    assert lookups_before == 0
    assert len(resolver.lookups) == lookups


async def test_guard_that_allows_everything(resolver: Resolver) -> None:
    """If private addresses are allowed, base_url is not looked up."""
    await AddressGuard("public", allow_private=True).check("pictures.example", "127.0.0.1")

    assert resolver.lookups == []


async def test_long_hosts_are_shortened() -> None:
    """The error shows only the beginning of a long host."""
    with pytest.raises(PrivateAddressError) as caught:
        await AddressGuard("1.1.1.1", allow_private=False).check_literal("0" * 10_000 + "177.0.0.1")

    assert len(str(caught.value)) < 250
