"""URLs of images: sent byte for byte, in first requests and after redirects."""

import contextlib
from collections import deque
from collections.abc import AsyncGenerator, Callable
from pathlib import Path

import aiohttp
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.responses import jpeg
from support.scripted import ScriptedGateway, answer, completed, raw, session_on

from flux2max_async import DownloadError, FluxSession, GeneratedImage
from flux2max_async._downloads.urls import encode_url, resolve_redirect

IMAGE = jpeg()

EXACT = [
    pytest.param("/a%2Fb?Policy=eyJ%2FabC%40%3A&Signature=a+b%20c~_&Key-Pair-Id=K%2B", id="CloudFront"),
    pytest.param(
        "/b/0.jpeg?X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Credential=AK%2F20260101%2Fus-east-1%2Fs3%2Faws4_request"
        "&X-Amz-SignedHeaders=host&response-content-disposition=attachment%3B%20filename%3D%22a.jpeg%22"
        "&X-Amz-Signature=0f%2f",
        id="S3",
    ),
    pytest.param("/b/o%2F0.jpeg?GoogleAccessId=x%40y.iam&Expires=1&Signature=a%2Bb%2F%3D%3D&alt=media", id="GCS"),
    pytest.param("/c/0.jpeg?sv=2024-11-04&sp=r&st=2026-01-01T00%3A00%3A00Z&sig=a%2Fb%2Bc%3D", id="Azure"),
    pytest.param("/%2e%2E/%2e/a", id="encoded dots"),
    pytest.param("/a/../b/./c", id="dots"),
    pytest.param("//a///b//", id="several slashes"),
    pytest.param("/a;v=1;w?x;y", id="parameters"),
    pytest.param("/'()!*,$:@&=+~-._", id="delimiters"),
    pytest.param('/{}|^`<>"[]\\?{}|^`<>"[]\\', id="not valid"),
    pytest.param("/a?", id="empty query"),
    pytest.param("/a??", id="query of a question mark"),
    pytest.param("/a?&&b=&=c", id="empty parameters"),
    pytest.param("/a%2fb%c3%a9?%e2%9c%93=%3a", id="lowercase escapes"),
    pytest.param("/100%?%zz=%", id="no escapes"),
    pytest.param("/a+b%20c?a+b%20c", id="plus and space"),
]
ENCODED = [
    pytest.param("/a b?c d", "/a%20b?c%20d", id="spaces"),
    pytest.param(" \n/a\x1f ", "/a", id="surrounding whitespace"),
    pytest.param("/a\t/\r\nb?c\nd", "/a/b?cd", id="tab and line breaks"),
    pytest.param("/a\x01b\x7f", "/a%01b%7F", id="control characters"),
    pytest.param("/é%C3%A9?✓=😀", "/%C3%A9%C3%A9?%E2%9C%93=%F0%9F%98%80", id="not ASCII"),
    pytest.param("/a\ud800b\udce9", "/a%EF%BF%BDb%E9", id="surrogates"),
    pytest.param("/a?b#c?d", "/a?b", id="fragment"),
    pytest.param("/a#", "/a", id="empty fragment"),
    pytest.param("", "/", id="no path"),
    pytest.param("?a", "/?a", id="no path, but a query"),
    pytest.param("?", "/?", id="no path, but an empty query"),
]


@contextlib.asynccontextmanager
async def own_session(scripted: ScriptedGateway) -> AsyncGenerator[FluxSession]:
    async with session_on(scripted) as session:
        yield session


@contextlib.asynccontextmanager
async def borrowed_session(scripted: ScriptedGateway) -> AsyncGenerator[FluxSession]:
    async def middleware(request: aiohttp.ClientRequest, handler: aiohttp.ClientHandlerType) -> aiohttp.ClientResponse:
        request.headers["X-Middleware"] = "passed"
        return await handler(request)

    http = aiohttp.ClientSession(requote_redirect_url=True, middlewares=(middleware,), headers={"X-Own": "sent"})
    async with http, session_on(scripted, http_session=http) as session:
        yield session


OpenSession = Callable[[ScriptedGateway], contextlib.AbstractAsyncContextManager[FluxSession]]
SESSIONS = pytest.mark.parametrize("open_session", [own_session, borrowed_session])


async def targets(session: FluxSession, scripted: ScriptedGateway, url: str, folder: Path) -> list[str]:
    """Download an image and return the targets of the requests for it, as they came through the socket."""
    image = GeneratedImage(url=url, type="image", task_id="t1")
    path = await session.save(image, folder / "a.jpeg")

    assert path.read_bytes() == IMAGE
    return [request.path for request in scripted.received]


@SESSIONS
@pytest.mark.parametrize("target", EXACT)
async def test_target_is_sent_byte_for_byte(
    scripted: ScriptedGateway, tmp_path: Path, open_session: OpenSession, target: str
) -> None:
    """The target of the first request is spelled as in the image's URL."""
    scripted.downloads = deque([answer(200, IMAGE)])
    async with open_session(scripted) as session:
        assert await targets(session, scripted, scripted.url + target, tmp_path) == [target]


@pytest.mark.parametrize("target", EXACT)
async def test_target_is_sent_byte_for_byte_through_a_proxy(
    scripted: ScriptedGateway, tmp_path: Path, target: str
) -> None:
    """A proxy receives the whole URL as it is spelled."""
    scripted.downloads = deque([answer(200, IMAGE)])
    async with (
        aiohttp.ClientSession(proxy=scripted.url) as http,
        FluxSession("key", base_url="http://127.0.0.1", http_session=http) as session,
    ):
        url = f"http://pictures.example{target}"
        assert await targets(session, scripted, url, tmp_path) == [url]


@SESSIONS
@pytest.mark.parametrize("prefix", ["{url}", "//{host}", ""], ids=["absolute", "scheme-relative", "path-absolute"])
@pytest.mark.parametrize("target", [case for case in EXACT if case.id != "several slashes"])
async def test_redirect_is_sent_byte_for_byte(
    scripted: ScriptedGateway, tmp_path: Path, open_session: OpenSession, target: str, prefix: str
) -> None:
    """The target after a redirect is spelled as in the Location."""
    location = prefix.format(url=scripted.url, host=scripted.url.removeprefix("http://")) + target
    scripted.downloads = deque([answer(302, b"", [("Location", location)]), answer(200, IMAGE)])
    async with open_session(scripted) as session:
        assert await targets(session, scripted, f"{scripted.url}/first", tmp_path) == ["/first", target]


@pytest.mark.parametrize(("target", "sent"), ENCODED)
async def test_other_characters_are_encoded_as_browsers_do(
    scripted: ScriptedGateway, tmp_path: Path, target: str, sent: str
) -> None:
    """Only what can't be sent is encoded or removed."""
    scripted.downloads = deque([answer(200, IMAGE)])
    url = target.replace("/", f"{scripted.url}/", 1) if target.startswith(" ") else scripted.url + target
    async with session_on(scripted) as session:
        assert await targets(session, scripted, url, tmp_path) == [sent]


@pytest.mark.parametrize(
    ("location", "sent"),
    [
        pytest.param("/é✓".encode(), "/%C3%A9%E2%9C%93", id="UTF-8"),
        pytest.param("/é".encode("latin-1"), "/%E9", id="Latin-1"),
        pytest.param(b"/a b", "/a%20b", id="space"),
        pytest.param(b"b?c%2F", "/a/b?c%2F", id="path-relative"),
        pytest.param(b"../b", "/b", id="path-relative with dots"),
        pytest.param(b"?", "/a/0.jpeg?", id="empty query"),
        pytest.param(b"?sig=%3D", "/a/0.jpeg?sig=%3D", id="query only"),
        pytest.param(b"/.//b///c//", "/.//b///c//", id="several slashes"),
        pytest.param(b"http:b", "/a/b", id="scheme without a host"),
    ],
)
async def test_redirect_with_raw_bytes(scripted: ScriptedGateway, tmp_path: Path, location: bytes, sent: str) -> None:
    """A Location is resolved without another encoding, whatever its bytes are."""
    redirect = raw(b"HTTP/1.1 302 Found\r\nContent-Length: 0\r\nLocation: " + location + b"\r\n\r\n")
    scripted.downloads = deque([redirect, answer(200, IMAGE)])
    async with session_on(scripted) as session:
        assert await targets(session, scripted, f"{scripted.url}/a/0.jpeg?x", tmp_path) == ["/a/0.jpeg?x", sent]


async def test_fresh_url_is_sent_byte_for_byte(scripted: ScriptedGateway, tmp_path: Path) -> None:
    """The URL of a fresh poll is sent as it came."""
    scripted.downloads = deque([answer(200, IMAGE)])
    scripted.polls = deque([answer(200, completed(url=f"{scripted.url}/a%2Fb?sig=%3D%3a"))])
    async with session_on(scripted) as session:
        snapshot = await session.fetch("t1")
        assert (await targets(session, scripted, snapshot.images[0].url, tmp_path))[-1] == "/a%2Fb?sig=%3D%3a"


# ---------------------------------------------------------------------- redirects


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_redirects_are_followed(scripted: ScriptedGateway, tmp_path: Path, status: int) -> None:
    """Up to ten redirects are followed, with the same headers."""
    scripted.downloads = deque([answer(status, b"", [("Location", "/next")])] * 10 + [answer(200, IMAGE)])
    async with session_on(scripted) as session:
        assert await targets(session, scripted, f"{scripted.url}/a", tmp_path) == ["/a", *["/next"] * 10]

    assert {request.headers["Accept"] for request in scripted.received} == {"image/*"}


@pytest.mark.parametrize(
    ("headers", "message", "requests"),
    [
        pytest.param([("Location", "/next")], "more than 10 redirects", 11, id="endless"),
        pytest.param([], "HTTP 302 without a Location", 1, id="no Location"),
        pytest.param([("Location", "")], "HTTP 302 without a Location", 1, id="empty Location"),
        pytest.param([("Location", "ftp://x.example/a")], "redirects to what is not an http", 1, id="another scheme"),
        pytest.param([("Location", "data:image/png;base64,AAAA")], "not an http", 1, id="data: URI"),
        pytest.param([("Location", "https:/a")], "not an http", 1, id="another scheme without a host"),
        pytest.param([("Location", "//")], "not an http", 1, id="no host"),
        pytest.param([("Location", "http://[::1/a")], "not an http", 1, id="invalid host"),
    ],
)
async def test_redirects_that_are_not_followed(
    scripted: ScriptedGateway, tmp_path: Path, headers: list[tuple[str, str]], message: str, requests: int
) -> None:
    """Whatever is not a redirect to another http(s) URL is a DownloadError at once."""
    scripted.downloads = deque([answer(302, b"", headers)])
    with pytest.raises(DownloadError, match=message) as caught:
        async with session_on(scripted) as session:
            await session.save(GeneratedImage(url=f"{scripted.url}/a", type="image", task_id="t1"), tmp_path / "a")

    assert len(scripted.received) == requests
    assert caught.value.task_id == "t1"


# ---------------------------------------------------------------------- the functions


@pytest.mark.parametrize(
    ("text", "sent"),
    [
        ("HTTPS://Example.COM:443/A", "https://Example.COM:443/A"),
        ("http://bücher.example/ü", "http://xn--bcher-kva.example/%C3%BC"),
        ("http://bücher.example:8080", "http://xn--bcher-kva.example:8080/"),
        ("http://[::1]:80/a?", "http://[::1]:80/a?"),
        ("http://user:p%40ss@host/a", "http://user:p%40ss@host/a"),
    ],
)
def test_host(text: str, sent: str) -> None:
    """The host is encoded by IDNA if it is not ASCII, and otherwise stays as it is."""
    assert encode_url(text) == sent


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            "a",
            "/a",
            "//h/a",
            "http:",
            "http:/a",
            "http:///a",
            "http://:80/a",
            "http://a b/",
            "ftp://h/",
            "data:,a",
        ),
        *(
            "http://h\\x/",
            "http://[::1/",
            "http://h:x\u2100/",
            "http://é\u200bvil.example/",
            "http://user@/a",
            "1http://h/",
        ),
    ],
)
def test_not_a_web_url(text: str) -> None:
    """Whatever is not an http(s) URL with a valid host is an error that shows it."""
    with pytest.raises(ValueError, match="not an http"):
        encode_url(text)


def test_longest_url() -> None:
    """A URL may have 65,536 characters: no server takes more."""
    url = f"https://x.example/{'a' * 65_518}"

    assert encode_url(url) == url
    with pytest.raises(ValueError, match="longer than 65,536 characters"):
        encode_url(f"{url}a")


@given(st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E, exclude_characters="#?")), st.booleans())
def test_ascii_is_never_changed(text: str, is_query: bool) -> None:
    """Any printable ASCII in paths and queries stays as it is, also if it is encoded or resolved once more."""
    url = f"https://h.example/{'a?' if is_query else ''}{text}"

    assert encode_url(url) == url
    assert resolve_redirect(url, "http://other.example/") == url
    assert resolve_redirect(url.removeprefix("https:"), "https://other.example/") == url


@given(st.text())
def test_anything_is_encoded_once(text: str) -> None:
    """Any text becomes printable ASCII, and is not changed any more."""
    url = encode_url(f"https://h.example/{text}")

    assert url.isascii()
    assert url.isprintable()
    assert " " not in url
    assert encode_url(url) == url


# RFC 3986, section 5.4, without the examples of other schemes, and without "http:g", which browsers read as "g".
@pytest.mark.parametrize(
    ("reference", "expected"),
    [
        ("g", "/b/c/g"), ("./g", "/b/c/g"), ("g/", "/b/c/g/"), ("/g", "/g"), ("?y", "/b/c/d;p?y"), ("g?y", "/b/c/g?y"),
        ("g#s", "/b/c/g"), (";x", "/b/c/;x"), ("g;x", "/b/c/g;x"), ("", "/b/c/d;p?q"), ("#s", "/b/c/d;p?q"),
        (".", "/b/c/"), ("./", "/b/c/"), ("..", "/b/"), ("../", "/b/"), ("../g", "/b/g"), ("../..", "/"),
        ("../../", "/"), ("../../g", "/g"), ("../../../g", "/g"), ("g.", "/b/c/g."), (".g", "/b/c/.g"),
        ("..g", "/b/c/..g"), ("./../g", "/b/g"), ("./g/.", "/b/c/g/"), ("g/./h", "/b/c/g/h"), ("g/../h", "/b/c/h"),
        ("g;x=1/../y", "/b/c/y"), ("g?y/../x", "/b/c/g?y/../x"),
        # not in the RFC
        ("g//h", "/b/c/g//h"), ("%2e%2e/g", "/b/c/%2e%2e/g"), ("g?", "/b/c/g?"), ("/a/../g", "/a/../g"),
        ("http:g", "/b/c/g"), ("HTTP:/g", "/g"),
    ],
)  # fmt: skip
def test_resolve_redirect(reference: str, expected: str) -> None:
    """References are resolved as in RFC 3986, without another encoding."""
    assert resolve_redirect(reference, "http://a/b/c/d;p?q") == f"http://a{expected}"
