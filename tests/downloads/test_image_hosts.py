"""Hosts of images: private addresses are refused, and nothing of a borrowed session is sent to any of them."""

import asyncio
import contextlib
import socket
import tempfile
import warnings
from collections import deque
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import Any

import aiohttp
import anyio
import pytest
from aiohttp.abc import AbstractResolver, ResolveResult
from support.responses import jpeg
from support.scripted import ScriptedGateway, answer, completed, session_on

from flux2max_async import DownloadError, FluxSession, GeneratedImage

IMAGE = jpeg(b"image")
PUBLIC_URL = "https://1.1.1.1"
"""An address to which no test connects."""
REFUSED = "private address .*allow_private_downloads=True"


def image_at(url: str) -> GeneratedImage:
    return GeneratedImage(url=url, type="image", task_id="t1")


def port_of(scripted: ScriptedGateway) -> str:
    return scripted.url.rpartition(":")[2]


class StaticResolver(AbstractResolver):
    """A resolver of a borrowed session, for which every name is an address of this machine."""

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        return [{"hostname": host, "host": "127.0.0.1", "port": port, "family": family, "proto": 0, "flags": 0}]

    async def close(self) -> None:
        pass


@contextlib.asynccontextmanager
async def own(base_url: str, **options: Any) -> AsyncGenerator[FluxSession]:
    async with FluxSession("key", base_url=base_url, **options) as session:
        yield session


@contextlib.asynccontextmanager
async def borrowed(base_url: str, **options: Any) -> AsyncGenerator[FluxSession]:
    connector = aiohttp.TCPConnector(resolver=StaticResolver())
    async with (
        aiohttp.ClientSession(connector=connector) as http,
        own(base_url, http_session=http, **options) as session,
    ):
        yield session


OpenSession = Callable[..., contextlib.AbstractAsyncContextManager[FluxSession]]
SESSIONS = pytest.mark.parametrize("open_session", [own, borrowed])


@pytest.fixture
def dns(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """Provide the addresses of names for this machine's resolver."""
    names: dict[str, list[str]] = {}

    def getaddrinfo(host: str, port: int, *args: object, **options: object) -> list[Any]:
        if host not in names:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        families = [socket.AF_INET6 if ":" in address else socket.AF_INET for address in names[host]]
        rest = [(address, port, 0, 0) if ":" in address else (address, port) for address in names[host]]
        return [(family, socket.SOCK_STREAM, 6, "", end) for family, end in zip(families, rest, strict=True)]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    return names


# ---------------------------------------------------------------------- private addresses


LITERALS = [
    *("127.0.0.1", "127.1", "2130706433", "0x7f000001", "0x7f.1", "0177.0.0.1", "017700000001", "127.0.0.1.", "0"),
    *(
        "localhost",
        "LOCALHOST.",
        "a.localhost",
        "user@127.0.0.1",
        "\uff11\uff12\uff17.0.0.1",
        "127\u30020\u30020\u30021",
    ),
    *(
        "[::1]",
        "[::]",
        "[::ffff:127.0.0.1]",
        "[::ffff:7f00:1]",
        "[::127.0.0.1]",
        "[64:ff9b::7f00:1]",
        "[2002:7f00:1::]",
    ),
    *("169.254.169.254", "0xa9fea9fe", "[::ffff:169.254.169.254]", "[fe80::1]", "[fe80::1%25eth0]", "[fd00:ec2::254]"),
    *("10.0.0.1", "172.16.0.1", "192.168.0.1", "100.64.0.1", "100.100.100.200", "0.0.0.0", "224.0.0.1", "240.0.0.1"),
]


@SESSIONS
@pytest.mark.parametrize("host", LITERALS)
async def test_addresses_in_urls(scripted: ScriptedGateway, open_session: OpenSession, host: str) -> None:
    """A URL with a private address, however it is spelled, is refused at once, and nothing connects."""
    started = anyio.current_time()
    async with open_session(PUBLIC_URL) as session:
        with pytest.raises(DownloadError, match=REFUSED) as caught:
            await session.read(image_at(f"http://{host}:{port_of(scripted)}/a"))

    assert caught.value.task_id == "t1"
    assert anyio.current_time() == started
    assert scripted.connections == 0


@pytest.mark.parametrize(
    "addresses",
    [["127.0.0.1"], ["::1", "127.0.0.1"], ["1.1.1.1", "127.0.0.1"], ["::ffff:127.0.0.1"], ["0.0.0.0"]],
    ids=", ".join,
)
async def test_names_of_private_addresses(
    scripted: ScriptedGateway, dns: dict[str, list[str]], addresses: list[str]
) -> None:
    """A name is refused if one of its addresses is private, and nothing connects."""
    dns["pictures.example"] = addresses
    async with own(PUBLIC_URL) as session:
        with pytest.raises(DownloadError, match=f"pictures.example is at the {REFUSED}"):
            await session.read(image_at(f"http://pictures.example:{port_of(scripted)}/a"))

    assert scripted.connections == 0


async def test_many_downloads_from_the_same_name(scripted: ScriptedGateway, dns: dict[str, list[str]]) -> None:
    """Each of the images that wait for the same DNS lookup has an error of its own, which names its task."""
    dns["pictures.example"] = ["127.0.0.1"]
    url = f"http://pictures.example:{port_of(scripted)}/a"
    images = [GeneratedImage(url=url, type="image", task_id=f"t{number}") for number in range(5)]
    async with own(PUBLIC_URL) as session:
        errors = await asyncio.gather(*map(session.read, images), return_exceptions=True)

    assert [isinstance(error, DownloadError) and error.task_id for error in errors] == [f"t{n}" for n in range(5)]


async def test_names_in_a_borrowed_session(scripted: ScriptedGateway, dns: dict[str, list[str]]) -> None:
    """A borrowed session's connection to a private address is closed before a request is sent, whatever DNS says now."""
    dns["pictures.example"] = ["1.1.1.1"]
    async with borrowed(PUBLIC_URL) as session:
        with pytest.raises(DownloadError, match=f"pictures.example is at the {REFUSED}"):
            await session.read(image_at(f"http://pictures.example:{port_of(scripted)}/a"))

    assert scripted.connections == 1
    assert scripted.received == []


@SESSIONS
@pytest.mark.parametrize(
    ("base_url", "options"),
    [
        ("https://10.0.0.1", {}),
        ("http://127.0.0.1:1", {}),
        ("http://[::1]:1", {}),
        ("http://localhost:1", {}),
        ("https://gateway.example", {}),
        (PUBLIC_URL, {"allow_private_downloads": True}),
    ],
)
async def test_private_addresses_are_allowed(
    scripted: ScriptedGateway, dns: dict[str, list[str]], open_session: OpenSession, base_url: str, options: Any
) -> None:
    """If base_url is at a private address, or the option says so, images may come from one too."""
    dns |= {"gateway.example": ["1.1.1.1", "192.168.0.1"], "pictures.example": ["127.0.0.1"]}
    scripted.downloads = deque([answer(302, b"", [("Location", f"{scripted.url}/b")]), answer(200, IMAGE)])
    async with open_session(base_url, **options) as session:
        assert await session.read(image_at(f"http://pictures.example:{port_of(scripted)}/a")) == IMAGE

    assert [request.path for request in scripted.received] == ["/a", "/b"]


@SESSIONS
@pytest.mark.parametrize("base_url", ["https://gateway.example", "https://unknown.example"])
async def test_base_url_that_is_not_private(
    scripted: ScriptedGateway, dns: dict[str, list[str]], open_session: OpenSession, base_url: str
) -> None:
    """A base_url at a public address, or one that can't be resolved, allows nothing."""
    dns |= {"gateway.example": ["1.1.1.1", "2606:4700::1"]}
    async with open_session(base_url) as session:
        with pytest.raises(DownloadError, match=REFUSED):
            await session.read(image_at(f"{scripted.url}/a"))

    assert scripted.connections == 0


async def test_invalid_address(session: FluxSession) -> None:
    """A host that is no valid address is a DownloadError."""
    with pytest.raises(DownloadError, match="not valid HTTP"):
        await session.read(image_at("http://[::1%]/a"))


@pytest.mark.parametrize("location", ["http://127.0.0.1:{}/b", "//0x7f.1:{}/b", "http://[::ffff:127.0.0.1]:{}/b"])
async def test_redirects_to_private_addresses(scripted: ScriptedGateway, location: str) -> None:
    """A redirect to a private address is refused at once. A proxy is the only public host of this test."""
    scripted.downloads = deque([answer(302, b"", [("Location", location.format(port_of(scripted)))])])
    started = anyio.current_time()
    async with aiohttp.ClientSession(proxy=scripted.url) as http, own(PUBLIC_URL, http_session=http) as session:
        with pytest.raises(DownloadError, match=REFUSED):
            await session.read(image_at("http://pictures.example/a"))

    assert [request.path for request in scripted.received] == ["http://pictures.example/a"]
    assert anyio.current_time() - started < 1.0


async def test_proxy(scripted: ScriptedGateway) -> None:
    """A proxy may be at a private address, and resolves the names of images."""
    scripted.downloads = deque([answer(200, IMAGE)])
    async with aiohttp.ClientSession(proxy=scripted.url) as http, own(PUBLIC_URL, http_session=http) as session:
        assert await session.read(image_at("http://pictures.example/a")) == IMAGE


async def test_unix_socket(scripted: ScriptedGateway) -> None:
    """A borrowed session whose connections have no addresses can download."""
    scripted.downloads = deque([answer(200, IMAGE)])
    with tempfile.TemporaryDirectory() as folder:
        server = await asyncio.start_unix_server(scripted._serve, f"{folder}/s")
        connector = aiohttp.UnixConnector(f"{folder}/s")
        async with (
            server,
            aiohttp.ClientSession(connector=connector) as http,
            own(PUBLIC_URL, http_session=http) as session,
        ):
            assert await session.read(image_at("http://pictures.example/a")) == IMAGE


async def test_outcome_of_a_stream(scripted: ScriptedGateway, dns: dict[str, list[str]], tmp_path: Path) -> None:
    """The outcome of an image at a private address is completed, and its save_error says why there is no file."""
    async with ScriptedGateway() as other_host:
        image_url = f"http://pictures.example:{port_of(other_host)}/a"
        dns["pictures.example"] = ["127.0.0.1"]
        scripted.polls = deque([answer(200, completed(url=image_url))])
        async with session_on(scripted) as session:
            # base_url is at 127.0.0.1 in all tests, which would allow it.
            session._parts.transport._address_guard._allows_private = False
            (outcome,) = [outcome async for outcome in session.stream(["a cat"], save_to=tmp_path)]
        connections = other_host.connections

    assert outcome.ok is True
    assert [image.url for image in outcome.images] == [image_url]
    assert isinstance(outcome.save_error, DownloadError)
    assert "the private address 127.0.0.1" in str(outcome.save_error)
    assert (outcome.saved, list(tmp_path.iterdir()), connections) == ((), [], 0)


# ---------------------------------------------------------------------- headers of borrowed sessions


async def add_header(request: aiohttp.ClientRequest, handler: aiohttp.ClientHandlerType) -> aiohttp.ClientResponse:
    request.headers["X-Middleware"] = "passed"
    return await handler(request)


SECRET = "s3cret"
SECRET_HEADERS = ("Authorization", "X-Api-Key", "X-Key", "Cookie", "Proxy-Authorization", "X-Own", "Range", "Referer")


async def received_headers(scripted: ScriptedGateway, url: str, **options: Any) -> list[dict[str, str]]:
    """Return the headers of two requests to the first host, and of one to the host to which it redirects."""
    async with ScriptedGateway() as other_host:
        other_host.downloads = deque([answer(200, IMAGE)])
        redirects = [answer(302, b"", [("Location", location)]) for location in ("/here", f"{other_host.url}/there")]
        scripted.downloads = deque(redirects)
        http = aiohttp.ClientSession(**options)
        async with http, session_on(scripted, http_session=http) as session:
            assert await session.read(image_at(url)) == IMAGE
        return [request.headers for request in scripted.received + other_host.received]


@pytest.mark.parametrize(
    "options",
    [
        *({"headers": {name: SECRET}} for name in SECRET_HEADERS),
        {"headers": {name.lower(): SECRET for name in SECRET_HEADERS}},
        {"cookies": {"token": SECRET}, "cookie_jar": True},
        {"auth": ("user", SECRET)},
        {"trust_env": True},
    ],
    ids=str,
)
async def test_nothing_of_a_borrowed_session_is_sent(
    scripted: ScriptedGateway, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, options: dict[str, Any]
) -> None:
    """No host of an image, the first neither, gets the headers, cookies, credentials or .netrc of a borrowed session."""
    (tmp_path / "netrc").write_text(f"default login user password {SECRET}\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    if "cookie_jar" in options:
        options = {**options, "cookie_jar": aiohttp.CookieJar(unsafe=True)}
    with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
        if "auth" in options:
            options = {"auth": aiohttp.BasicAuth(*options["auth"])}
        received = await received_headers(scripted, f"{scripted.url}/a", **options, middlewares=(add_header,))

    assert len(received) == 3
    for headers in received:
        assert set(headers) == {"Host", "User-Agent", "Accept", "Accept-Encoding", "X-Middleware"}
        assert headers["User-Agent"].startswith("flux2max_async/")


@pytest.mark.parametrize("headers", [{}, {"X-Api-Key": SECRET}])
async def test_user_in_the_url(scripted: ScriptedGateway, headers: dict[str, str]) -> None:
    """The user and password in an image's URL are sent to its host, and not to where it redirects."""
    url = f"http://user:pass@127.0.0.1:{port_of(scripted)}/a"
    received = await received_headers(scripted, url, headers=headers)

    assert received[0]["Authorization"] == "Basic dXNlcjpwYXNz"
    assert "Authorization" not in received[2]
    assert SECRET not in str(received)
