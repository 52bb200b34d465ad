"""Proxies: which one a URL goes through, and calls and downloads through a real one."""

import asyncio
import re
from collections import deque
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import aiohttp
import anyio
import pytest
from support.certificates import Certificate
from support.proxy import ForwardProxy
from support.responses import jpeg
from support.scripted import ScriptedGateway, answer, completed, raw, running, session_on
from yarl import URL

from flux2max_async import (
    ConfigurationError,
    DownloadError,
    FixedSchedule,
    FluxSession,
    GeneratedImage,
    TransportError,
)
from flux2max_async._api.proxies import Proxies, Routes

IMAGE = jpeg()
USER = "tester:hush-7f3a9c"
VARIABLES = [f"{name}_PROXY" for name in ("HTTP", "HTTPS", "ALL", "NO")]


@pytest.fixture(autouse=True)
def _no_proxies_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [*VARIABLES, *map(str.lower, VARIABLES), "REQUEST_METHOD"]:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Certificate:
    """Provide a certificate for the hosts of these tests."""
    folder = tmp_path_factory.mktemp("certificates")
    return Certificate.create(folder, "gateway.example", "pictures.example", "localhost", "IP:127.0.0.1")


@pytest.fixture
async def tls_gateway(certificate: Certificate) -> AsyncIterator[ScriptedGateway]:
    """Provide a scripted gateway that speaks TLS."""
    async with ScriptedGateway(certificate.of_server) as gateway:
        yield gateway


def route(environment: Mapping[str, str], url: str, monkeypatch: pytest.MonkeyPatch) -> str | None:
    """Return the URL of the proxy for a URL in an environment."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    proxy = Routes(Proxies(None, trust_env=True)).find(URL(url)).proxy
    return None if proxy is None else str(proxy.url)


API, PLAIN = "https://cloud.vtrix.ai", "http://pictures.example/0.jpeg"
A, B = "http://a.example:3128", "http://b.example:3128"


@pytest.mark.parametrize(
    ("environment", "url", "expected"),
    [
        ({}, API, None),
        ({"HTTPS_PROXY": A}, API, A),
        ({"https_proxy": A}, API, A),
        ({"HTTPS_PROXY": B, "https_proxy": A}, API, A),
        ({"HTTPS_PROXY": A, "https_proxy": ""}, API, None),
        ({"HTTPS_PROXY": ""}, API, None),
        ({"HTTPS_PROXY": A}, PLAIN, None),
        ({"HTTP_PROXY": A}, API, None),
        ({"HTTP_PROXY": A}, PLAIN, A),
        ({"ALL_PROXY": A}, API, A),
        ({"all_proxy": A}, PLAIN, A),
        ({"ALL_PROXY": A, "HTTPS_PROXY": B}, API, B),
        # In a CGI script, a client's header "Proxy" is in HTTP_PROXY.
        ({"HTTP_PROXY": A, "REQUEST_METHOD": "GET"}, PLAIN, None),
        ({"http_proxy": A, "REQUEST_METHOD": "GET"}, PLAIN, A),
        # Spellings of the proxy.
        ({"HTTPS_PROXY": "a.example:3128"}, API, A),
        ({"HTTPS_PROXY": f" {A}/ "}, API, A),
        ({"HTTPS_PROXY": "http://a.example"}, API, "http://a.example"),
        ({"HTTPS_PROXY": "HTTPS://a.example"}, API, "https://a.example"),
        ({"HTTPS_PROXY": "http://[2001:db8::1]:3128"}, API, "http://[2001:db8::1]:3128"),
        ({"HTTPS_PROXY": "http://user:pass@a.example:3128"}, API, A),
        # NO_PROXY.
        ({"HTTPS_PROXY": A, "NO_PROXY": "cloud.vtrix.ai"}, API, None),
        ({"HTTPS_PROXY": A, "no_proxy": "VTRIX.AI"}, API, None),
        ({"HTTPS_PROXY": A, "NO_PROXY": ".vtrix.ai"}, API, None),
        ({"HTTPS_PROXY": A, "NO_PROXY": "*.vtrix.ai"}, API, None),
        ({"HTTPS_PROXY": A, "NO_PROXY": "x.example cloud.vtrix.ai"}, API, None),
        ({"HTTPS_PROXY": A, "NO_PROXY": "x.example,*"}, API, None),
        ({"HTTPS_PROXY": A, "NO_PROXY": "cloud.vtrix.ai:443"}, API, None),
        ({"HTTPS_PROXY": A, "NO_PROXY": "cloud.vtrix.ai:8443"}, API, A),
        ({"HTTPS_PROXY": A, "NO_PROXY": "trix.ai,vtrix.ai.example,,"}, API, A),
        ({"HTTPS_PROXY": A, "NO_PROXY": "cloud.vtrix.ai"}, "https://cloud.vtrix.ai.", None),
        ({"HTTPS_PROXY": A, "NO_PROXY": "10.0.0.0/8"}, "https://10.1.2.3", None),
        ({"HTTPS_PROXY": A, "NO_PROXY": "10.0.0.0/8"}, "https://11.1.2.3", A),
        ({"HTTPS_PROXY": A, "NO_PROXY": "10.1.2.3"}, "https://10.1.2.3:8443", None),
        ({"HTTPS_PROXY": A, "NO_PROXY": "2001:db8::/32"}, "https://[2001:db8::1]", None),
        ({"HTTPS_PROXY": A, "NO_PROXY": "[2001:db8::1]"}, "https://[2001:db8::1]", None),
        ({"HTTPS_PROXY": A, "NO_PROXY": "10.0.0.0/8"}, "https://[2001:db8::1]", A),
        # This machine.
        ({"ALL_PROXY": A}, "http://127.0.0.1:8765", None),
        ({"ALL_PROXY": A}, "http://localhost:8765", None),
        ({"ALL_PROXY": A}, "https://[::1]", None),
        ({"ALL_PROXY": "socks5://a.example"}, "http://localhost:8765", None),
    ],
    ids=str,
)
def test_proxy_of_the_environment(
    environment: Mapping[str, str], url: str, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The environment's proxy is found by the scheme of the URL, unless NO_PROXY names its host, or it is this machine."""
    assert route(environment, url, monkeypatch) == expected


def test_an_explicit_proxy_is_for_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    """With `proxy`, the environment's variables don't count; with `trust_env=False` neither."""
    monkeypatch.setenv("HTTPS_PROXY", B)
    monkeypatch.setenv("NO_PROXY", "*")
    only = Routes(Proxies(A, trust_env=True))

    for url in (API, PLAIN, "http://127.0.0.1"):
        found = only.find(URL(url)).proxy
        assert found is not None
        assert str(found.url) == A
    assert Routes(Proxies(None, trust_env=False)).find(URL(API)).proxy is None


def test_an_address_that_is_not_valid(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host that is no valid address is the proxy's matter, unless NO_PROXY names everything."""
    monkeypatch.setenv("HTTP_PROXY", A)
    monkeypatch.setenv("NO_PROXY", "10.0.0.0/8,::/0")
    proxy = Proxies(None, trust_env=True).find("http", "::1%", 80)

    assert proxy is not None
    assert str(proxy.url) == A


def test_routes_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Routes are looked up once for each origin, and not kept without limit."""
    monkeypatch.setenv("HTTP_PROXY", A)
    routes = Routes(Proxies(None, trust_env=True))
    first = routes.find(URL("http://h0.example/a"))
    assert routes.find(URL("http://h0.example/b")) is first
    for number in range(5000):
        assert routes.find(URL(f"http://h{number}.example")).proxy is not None

    assert len(routes._routes) <= 1000


@pytest.mark.parametrize(
    ("proxy", "reason"),
    [
        ("socks5://tester:hush-7f3a9c@a.example:1080", "SOCKS"),
        ("socks5h://a.example", "SOCKS"),
        ("SOCKS4://a.example", "SOCKS"),
        *((text, "must be an HTTP proxy") for text in ("", "http://", "ftp://hush-7f3a9c", "http://a.example:port")),
        *((text, "must be an HTTP proxy") for text in ("http://a b", "http://[::1", "http://a\\b", "hush-7f3a9c@")),
        *((value, "must be the URL of an HTTP proxy") for value in (7, b"http://a.example")),
    ],
    ids=str,
)
def test_a_proxy_that_is_not_supported(proxy: Any, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names what is supported, and the argument or variable, and doesn't show the URL."""
    with pytest.raises(ConfigurationError, match=f"^proxy .*{reason}.*http://host:port") as caught:
        FluxSession("key", proxy=proxy)
    assert "7f3a9c" not in f"{caught.value!r} {caught.value}"
    if isinstance(proxy, str) and proxy:
        monkeypatch.setenv("HTTPS_PROXY", proxy)
        with pytest.raises(ConfigurationError, match=f"^HTTPS_PROXY .*{reason}") as caught:
            FluxSession("key")
        assert "7f3a9c" not in f"{caught.value!r} {caught.value}"
        FluxSession("key", trust_env=False)


# ---------------------------------------------------------------------- a real proxy


@pytest.mark.parametrize("borrowed", [False, True], ids=["own", "borrowed"])
@pytest.mark.parametrize("user", [None, USER, "a%40b:hush%3A7f3a9c"], ids=["open", "user", "escaped"])
@pytest.mark.parametrize("tls", [False, True], ids=["plain proxy", "TLS proxy"])
@pytest.mark.parametrize("source", ["argument", "environment"])
async def test_connect(
    tls_gateway: ScriptedGateway,
    certificate: Certificate,
    monkeypatch: pytest.MonkeyPatch,
    *,
    borrowed: bool,
    user: str | None,
    tls: bool,
    source: str,
) -> None:
    """Calls and downloads over TLS go through tunnels of the proxy, which sees neither key nor image."""
    tls_gateway.polls = deque([answer(200, completed(url="https://pictures.example/0.jpeg"))])
    tls_gateway.downloads = deque([answer(200, IMAGE)])
    expected = user and user.replace("%40", "@").replace("%3A", ":")
    hosts = dict.fromkeys(("gateway.example", "pictures.example"), tls_gateway.port)
    async with (
        ForwardProxy(hosts, expected, ssl_context=certificate.of_server if tls else None) as proxy,
        aiohttp.ClientSession() as http,
    ):
        url = proxy.url if user is None else proxy.url.replace(f"{expected}@", f"{user}@")
        options: dict[str, Any] = {"proxy": url}
        if source == "environment":
            options = {}
            monkeypatch.setenv("HTTPS_PROXY", url)
        async with FluxSession(
            tls_gateway.api_key,
            base_url="https://gateway.example",
            ssl_context=certificate.of_client,
            schedule=FixedSchedule(1.0),
            http_session=http if borrowed else None,
            **options,
        ) as session:
            outcome = await session.generate("a cat")
            assert await session.read(outcome.images[0]) == IMAGE
            assert "hush" not in repr(vars(session._parts.transport))

    assert [request.method for request in tls_gateway.received] == ["POST", "GET", "GET"]
    assert {request.headers["Host"] for request in tls_gateway.received} == {"gateway.example", "pictures.example"}
    assert set(proxy.tunnels) == {"gateway.example:443", "pictures.example:443"}
    assert (proxy.forwarded, proxy.refused) == ([], 0)
    assert tls_gateway.api_key not in str(proxy.heads)
    assert not any("Proxy-Authorization" in request.headers for request in tls_gateway.received)


@pytest.mark.parametrize("borrowed", [False, True], ids=["own", "borrowed"])
@pytest.mark.parametrize("user", [None, USER], ids=["open", "user"])
async def test_plain_http(scripted: ScriptedGateway, *, borrowed: bool, user: str | None) -> None:
    """Over plain http, the proxy gets whole URLs; it authenticates each request, also on connections that are reused."""
    scripted.polls = deque([answer(200, running()), answer(200, completed(url="http://pictures.example/0.jpeg"))])
    scripted.downloads = deque([answer(200, IMAGE)])
    hosts = dict.fromkeys(("gateway.example", "pictures.example"), scripted.port)
    async with (
        ForwardProxy(hosts, user) as proxy,
        aiohttp.ClientSession() as http,
        FluxSession(
            scripted.api_key,
            base_url="http://gateway.example",
            proxy=proxy.url,
            allow_plain_http=True,
            schedule=FixedSchedule(1.0),
            http_session=http if borrowed else None,
        ) as session,
    ):
        outcome = await session.generate("a cat")
        for _ in range(2):
            assert await session.read(outcome.images[0]) == IMAGE

    assert [URL(url).host for url in proxy.forwarded] == ["gateway.example"] * 3 + ["pictures.example"] * 2
    assert (proxy.tunnels, proxy.refused) == ([], 0)


async def test_private_addresses_are_refused_through_a_proxy(
    tls_gateway: ScriptedGateway, certificate: Certificate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The proxy may be at a private address, even by name; literal private hosts and the proxy itself are refused."""
    hosts = dict.fromkeys(("gateway.example", "pictures.example"), tls_gateway.port)
    tls_gateway.downloads = deque([answer(200, IMAGE)])
    async with ForwardProxy(hosts) as proxy:
        url = f"http://localhost:{proxy.port}"
        options: dict[str, Any] = {"base_url": "https://gateway.example", "ssl_context": certificate.of_client}
        async with FluxSession("key", proxy=url, **options) as session:
            image = GeneratedImage(url="https://pictures.example/0", type="image", task_id="t1")
            assert await session.read(image) == IMAGE
            for host in ("127.0.0.1", "10.0.0.1", f"localhost:{tls_gateway.port}", "0x7f.1"):
                with pytest.raises(DownloadError, match="private address"):
                    await session.read(GeneratedImage(url=f"https://{host}/0", type="image", task_id="t1"))
            with pytest.raises(DownloadError, match="the image's URL is the proxy's"):
                await session.read(GeneratedImage(url=f"{url}/0", type="image", task_id="t1"))
    assert proxy.tunnels == ["pictures.example:443"]


async def test_a_proxy_for_images_that_is_not_supported(
    scripted: ScriptedGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A session can be used whose API needs no proxy; downloads that need an unsupported one fail at once."""
    monkeypatch.setenv("ALL_PROXY", "socks5://a.example")
    async with session_on(scripted) as session:
        await session.generate("a cat")
        started = anyio.current_time()
        with pytest.raises(DownloadError, match="ALL_PROXY is a SOCKS proxy"):
            await session.read(GeneratedImage(url="https://pictures.example/0", type="image", task_id="t1"))
        assert anyio.current_time() - started < 1.0


# ---------------------------------------------------------------------- borrowed sessions


@pytest.mark.parametrize("trust_env", [False, True])
@pytest.mark.parametrize("machine", ["127.0.0.1", "other.example"])
async def test_netrc_is_never_sent(
    scripted: ScriptedGateway, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *, trust_env: bool, machine: str
) -> None:
    """Whatever is in .netrc, calls over a borrowed session have the API key, and downloads no credentials."""
    (tmp_path / "netrc").write_text(f"machine {machine} login user password hush\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    scripted.polls = deque([answer(200, completed(url=f"{scripted.url}/0.jpeg"))])
    scripted.downloads = deque([answer(200, IMAGE)])
    seen: list[str] = []

    async def own(request: aiohttp.ClientRequest, handler: aiohttp.ClientHandlerType) -> aiohttp.ClientResponse:
        seen.append(request.headers.get("Authorization", ""))
        return await handler(request)

    http = aiohttp.ClientSession(trust_env=trust_env, middlewares=(own,))
    async with http, session_on(scripted, http_session=http) as session:
        outcome = await session.generate("a cat")
        assert await session.read(outcome.images[0]) == IMAGE

    bearer = f"Bearer {scripted.api_key}"
    assert [request.headers.get("Authorization", "") for request in scripted.received] == [bearer, bearer, ""]
    assert seen == [bearer, bearer, ""]


async def test_a_proxy_of_a_borrowed_session(scripted: ScriptedGateway, monkeypatch: pytest.MonkeyPatch) -> None:
    """A borrowed session's own proxy is used instead of the environment's, and `proxy` instead of either."""
    scripted.polls = deque([answer(200, completed())])
    hosts = {"gateway.example": scripted.port}
    async with ForwardProxy(hosts) as first, ForwardProxy(hosts) as second, ForwardProxy(hosts) as third:
        monkeypatch.setenv("HTTP_PROXY", first.url)
        options: dict[str, Any] = {"base_url": "http://gateway.example", "allow_plain_http": True}
        async with aiohttp.ClientSession(proxy=second.url) as http:
            async with FluxSession("key", http_session=http, **options) as session:
                await session.fetch("t1")
            assert list(map(len, (first.forwarded, second.forwarded))) == [0, 1]
            async with FluxSession("key", http_session=http, proxy=third.url, **options) as session:
                await session.fetch("t1")
        async with FluxSession("key", **options) as session:
            await session.fetch("t1")

    assert list(map(len, (first.forwarded, second.forwarded, third.forwarded))) == [1, 1, 1]


# ---------------------------------------------------------------------- refusals


@pytest.mark.parametrize("scheme", ["http", "https"])
@pytest.mark.parametrize("borrowed", [False, True], ids=["own", "borrowed"])
async def test_407(certificate: Certificate, caplog: pytest.LogCaptureFixture, *, scheme: str, borrowed: bool) -> None:
    """A proxy that wants another password is named at once, by submits, polls and downloads, without the password."""
    async with (
        ForwardProxy({"gateway.example": 1}, "tester:other") as proxy,
        aiohttp.ClientSession() as http,
        FluxSession(
            "key",
            base_url=f"{scheme}://gateway.example",
            proxy=proxy.url.replace("other", "hush-7f3a9c"),
            ssl_context=certificate.of_client,
            allow_plain_http=True,
            http_session=http if borrowed else None,
        ) as session,
    ):
        started = anyio.current_time()
        image = GeneratedImage(url=f"{scheme}://gateway.example/0", type="image", task_id="t1")
        errors: list[Exception] = []
        for call in (session.generate("a cat"), session.fetch("t1")):
            with pytest.raises(TransportError) as caught:
                await call
            errors.append(caught.value)
            assert (caught.value.fault, caught.value.maybe_sent) == ("proxy", False)
        with pytest.raises(DownloadError, match="can't download: no connection: the proxy") as refused:
            await session.read(image)
        assert anyio.current_time() - started < 1.0

    for error in (*errors, refused.value):
        assert re.search(
            r"the proxy requires a user and password, or refuses those in its URL \(HTTP 407\)", str(error)
        )
    assert "hush" not in f"{errors!r} {refused.value!r} {refused.value.__cause__!r} {caplog.text}"


async def test_a_wrong_password_is_not_tried_again_and_again(
    tls_gateway: ScriptedGateway, certificate: Certificate
) -> None:
    """No connection is kept ready while the proxy refuses: it may lock an account after several wrong passwords."""
    hosts = {"gateway.example": tls_gateway.port}
    async with (
        ForwardProxy(hosts, "tester:other") as proxy,
        FluxSession(
            tls_gateway.api_key,
            base_url="https://gateway.example",
            proxy=proxy.url.replace("other", "hush"),
            ssl_context=certificate.of_client,
            schedule=FixedSchedule(1.0),
        ) as session,
    ):
        with pytest.raises(TransportError):
            await session.generate("a cat")
        await asyncio.sleep(70.0)
        assert proxy.refused <= 2
        proxy.user = "tester:hush"
        await session.generate("a cat")
        assert not session._parts.transport.outage.lasts
        await asyncio.sleep(0.3)
        assert len(proxy.tunnels) >= 2


@pytest.mark.parametrize(
    ("status", "fault"), [(403, "proxy"), (405, "proxy"), (502, None), (503, None), (429, None), (404, None)]
)
async def test_refused_tunnels(certificate: Certificate, status: int, fault: str | None) -> None:
    """What a proxy answers to CONNECT came from it alone: nothing was sent; some statuses are final."""
    async with (
        ForwardProxy({}, refusal=status) as proxy,
        FluxSession("key", base_url="https://gateway.example", proxy=proxy.url, task_timeout=20.0) as session,
    ):
        with pytest.raises(TransportError, match=rf"the proxy doesn't connect to the host \(HTTP {status}\)") as caught:
            await session.generate("a cat")

    assert (caught.value.fault, caught.value.maybe_sent) == (fault, False)
    assert (proxy.refused == 1) is (fault is not None)


async def test_a_proxy_that_cannot_be_reached() -> None:
    """A proxy that refuses connections is tried again until the deadline; errors name it, and not its password."""
    async with ForwardProxy({}, USER) as proxy:
        url = proxy.url
    async with FluxSession("key", base_url="https://gateway.example", proxy=url, task_timeout=20.0) as session:
        started = anyio.current_time()
        with pytest.raises(TransportError, match=r"no connection: Cannot connect to host 127\.0\.0\.1") as caught:
            await session.generate("a cat")

    assert anyio.current_time() - started > 10.0
    assert "hush" not in f"{caught.value!r} {caught.value.__cause__!r}"


async def test_a_task_is_polled_on_behind_a_proxy_that_refuses(
    scripted: ScriptedGateway, caplog: pytest.LogCaptureFixture
) -> None:
    """A paid task survives a proxy that refuses for a while: it is polled on, with one warning."""
    scripted.polls = deque(
        [*[answer(407, b"")] * 8, answer(200, running()), answer(407, b""), answer(200, completed())]
    )
    async with session_on(scripted) as session:
        outcome = await session.generate("a cat")

    assert outcome.polls == 11
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert ["poll 1 failed" in warnings[0], "poll 10 failed" in warnings[1]] == [True, True]
    assert all(text.endswith("(HTTP 407)); it is polled until its deadline") for text in warnings)
    assert len(warnings) == 2


async def test_407_with_a_body_that_does_not_end(scripted: ScriptedGateway) -> None:
    """The content of a 407 is not waited for."""
    scripted.submits = deque([raw(b"HTTP/1.1 407 No\r\nContent-Length: 10\r\n\r\n", then="hang")])
    async with session_on(scripted) as session:
        started = anyio.current_time()
        with pytest.raises(TransportError, match="HTTP 407"):
            await session.generate("a cat")

        assert anyio.current_time() - started < 1.0
    assert len(scripted.of("POST")) == 1
