"""The example applications against hostile pages and visitors: both defend themselves in the same way."""

import base64
import contextlib
import gzip
import hashlib
import json
import re
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import attrs
import pytest
from support.apps import NAMES, App, new_address, running_app

from flux2max_async.emulator import Emulator

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="visitors have loopback addresses of their own")

JSON = {"Content-Type": "application/json"}
BLANK = b'{"prompt": " "}'


@pytest.fixture(scope="module")
def gateway() -> Iterator[Emulator]:
    """Provide a service whose tasks do not end while the tests run."""
    with Emulator(seconds=3600.0, spread=0.0, seed=1, pictures=False) as emulator:
        yield emulator


@pytest.fixture(scope="module", params=NAMES)
def app(request: pytest.FixtureRequest, gateway: Emulator, tmp_path_factory: pytest.TempPathFactory) -> Iterator[App]:
    """Run each of the examples."""
    with running_app(request.param, gateway, tmp_path_factory.mktemp(request.param)) as running_example:
        yield running_example


@attrs.frozen
class Case:
    """A request, and the response to it."""

    name: str
    status: int
    headers: dict[str, str] = JSON
    body: bytes | tuple[bytes, ...] = BLANK
    """A tuple is sent in chunks, without a length."""
    method: str = "POST"
    target: str = "/tasks"
    detail: str = ""
    """What the reason contains."""


def chunks(body: bytes | tuple[bytes, ...]) -> bytes | Iterable[bytes]:
    return body if isinstance(body, bytes) else iter(body)


def json_case(name: str, status: int, detail: str, **body: Any) -> Case:
    return Case(name, status, body=json.dumps(body).encode(), detail=detail)


FROM_PAGE = {"Sec-Fetch-Site": "same-origin", **JSON}
SUBMITS = [
    # Other sites' pages: forms can send three types, scripts need permission for JSON, and browsers name the origin.
    Case("form", 415, {"Content-Type": "application/x-www-form-urlencoded"}, b"prompt=a+cat"),
    Case("multipart", 415, {"Content-Type": "multipart/form-data; boundary=x"}, b"--x--"),
    Case("text", 415, {"Content-Type": "text/plain"}, b'{"prompt": "a cat"}'),
    Case("text that contains JSON's name", 415, {"Content-Type": "text/plain; x=application/json"}),
    Case("no type", 415, {}, b'{"prompt": "a cat"}'),
    Case("other type", 415, {"Content-Type": "application/jsonp"}),
    Case("other origin", 403, {"Origin": "https://evil.example", **JSON}),
    Case("opaque origin", 403, {"Origin": "null", **JSON}),
    Case("other port", 403, {"Origin": "http://127.0.0.1:1", **JSON}),
    Case("rebound name", 403, {"Origin": "http://evil.example", "Host": "evil.example", **FROM_PAGE}),
    Case("other site", 403, {"Sec-Fetch-Site": "cross-site", **JSON}),
    Case("other subdomain", 403, {"Sec-Fetch-Site": "same-site", **JSON}),
    Case("form of another site", 403, {"Sec-Fetch-Site": "cross-site", "Content-Type": "text/plain"}),
    Case("preflight", 405, {"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"}, b"", "OPTIONS"),
    Case("GET", 405, {}, b"", "GET"),
    Case("GET with parameters", 405, {}, b"", "GET", "/tasks?prompt=a+cat"),
    Case("PUT", 405, method="PUT"),
    # The page itself, and programs
    Case("from the page", 422, FROM_PAGE, detail="prompt must not be blank"),
    Case("with a charset", 422, {"Content-Type": "Application/JSON; charset=nonsense"}, detail="prompt must not"),
    # Bodies
    Case("huge", 413, JSON, b'{"prompt": "' + b"x" * 1_000_000 + b'"}'),
    Case("one byte too long", 413, JSON, b'{"prompt": " "'.ljust(16 * 1024) + b"}"),
    Case("long enough", 422, JSON, b'{"prompt": " "'.ljust(16 * 1024 - 1) + b"}", detail="blank"),
    Case("huge, in chunks", 413, JSON, (b'{"prompt": "', *[b"x" * 10_000] * 100)),
    Case("declared as huge", 413, {"Content-Length": "9999999999", **JSON}, BLANK),
    Case("no JSON", 400, body=b"prompt=a+cat", detail="Send a JSON object."),
    Case("empty", 400, body=b""),
    Case("list", 400, body=b'["a cat"]'),
    Case("null", 400, body=b"null"),
    Case("deep", 400, body=b"[" * 16_000),
    Case("deep objects", 400, body=b'{"a":' * 3_000),
    Case("no text", 400, body=b'{"prompt": "\xff\xfe\xff"}'),
    Case("long number", 400, body=b'{"prompt": "a cat", "width": ' + b"1" * 10_000 + b"}"),
    # Parameters
    json_case("no prompt", 422, "prompt must not be blank", width=64),
    json_case("null prompt", 422, "prompt must be text", prompt=None),
    json_case("prompt of another type", 422, "prompt must be text", prompt={"$ne": ""}),
    json_case("number as text", 422, "width must be an integer", prompt="a cat", width="64"),
    json_case("flag", 422, "width must be an integer", prompt="a cat", width=True),
    json_case("NaN", 422, "width must be an integer", prompt="a cat", width=float("nan")),
    json_case("large number", 422, "width must be an integer of at most 64 bits", prompt="a cat", width=2**70),
    json_case("negative number", 422, "height must be at least 64", prompt="a cat", height=-5),
]


@pytest.mark.parametrize("case", SUBMITS, ids=lambda case: case.name)
def test_submit_that_is_refused(app: App, case: Case) -> None:
    """A request that is not the page's, or not valid, is refused in JSON, with no permission for other sites; nothing is bought."""
    accepted = app.gateway.accepted.total()
    response = app.request(case.method, case.target, headers=case.headers, body=chunks(case.body))

    assert response.status == case.status, response
    assert case.status == 413 or case.detail in response.detail  # Starlette's 413 has no JSON
    assert [name for name in response.headers if name.startswith("access-control")] == []
    assert app.gateway.accepted.total() == accepted


def test_compressed_body(app: App) -> None:
    """A compressed body is no way around the size limit."""
    headers = {"Content-Encoding": "gzip", **JSON}
    response = app.request("POST", "/tasks", headers=headers, body=gzip.compress(b" " * 10_000_000))

    assert response.status in {400, 413}  # aiohttp decompresses bodies, Starlette doesn't


@pytest.mark.parametrize(
    "task_id",
    [
        "..", "../..", "../log.txt", "..%2Flog.txt", "%2e%2e%2f%2e%2e%2fetc%2fpasswd", "..%5Clog.txt", "%2Fetc%2Fpasswd",
        "x" * 5_000, "%00", "%0d%0aX-Injected:%201", "%ff", "*", "%25", "a.jpeg", "-1", "🦊".encode().hex("%"), "__class__",
    ],
)  # fmt: skip
def test_absurd_id(app: App, task_id: str) -> None:
    """An id that the application has not handed out is a 404: no file is opened, and nothing is polled."""
    polls = app.gateway.calls["poll"]
    responses = [app.request("GET", f"/tasks/{task_id}/{what}") for what in ("picture", "events")]

    assert [response.status for response in responses] == [404, 404]
    assert all("x-injected" not in response.headers for response in responses)
    assert app.gateway.calls["poll"] == polls
    assert not (app.log.parent / "pictures").exists()


def test_too_many_submits(app: App) -> None:
    """A visitor who submits too often is refused until the next minute, other visitors are not."""
    flooder, visitor = new_address(), new_address()
    with ThreadPoolExecutor(4) as pool:
        flood = list(pool.map(lambda _: app.submit_as(flooder, {"prompt": " "}), range(100)))
        served = app.submit_as(visitor, {"prompt": f"{app.url} an owl", "width": 64, "height": 64})
    refused = [response for response in flood if response.status == 429]

    assert {response.status for response in flood} == {422, 429}
    assert len(refused) >= 50  # at most 10 a minute are served
    assert {response.headers["retry-after"] for response in refused} <= {"60", "10"}
    assert {response.detail for response in refused} <= {
        "Too many pictures. Try again in a minute.",
        "Too many requests at once. Try again later.",
    }
    assert served.status == 202


def test_submits_of_other_sites_do_not_count(app: App) -> None:
    """What another site's page makes a visitor's browser send does not use up the visitor's limit."""
    visitor = new_address()
    forged = [app.submit_as(visitor, {"prompt": "x"}, {"Origin": "https://evil.example"}) for _ in range(30)]

    assert {response.status for response in forged} == {403}
    assert app.submit_as(visitor, {"prompt": " "}).status == 422


def test_forged_address(app: App) -> None:
    """A visitor whose connection is not a proxy's cannot pretend to be others."""
    visitor = new_address()
    responses = [app.submit_as(visitor, {"prompt": " "}, {"X-Forwarded-For": f"192.0.2.{n}"}) for n in range(30)]

    assert {response.status for response in responses} == {422, 429}


def test_visitors_behind_a_proxy(gateway: Emulator, tmp_path: Path) -> None:
    """With uvicorn, a proxy on this machine names the visitors; in IPv6, the limit is that of a visitor's network."""
    with running_app("fastapi", gateway, tmp_path) as app:

        def submit(address: str) -> int:
            return app.submit_as("127.0.0.1", {"prompt": " "}, {"X-Forwarded-For": address}).status

        assert {submit(f"2001:db8::{n}") for n in range(30)} == {422, 429}
        assert submit("2001:db8:0:1::1") == 422
        assert {submit(f"::ffff:192.0.2.{n}") for n in range(30)} == {422}
        assert {submit("unknown"), submit("a:b"), submit("[::")} == {422}


def test_too_many_event_streams(app: App) -> None:
    """A visitor has at most ten requests at once; event streams that are closed, or never read, are no loss for others."""
    flooder, visitor = new_address(), new_address()
    task_id = json.loads(app.submit_as(visitor, {"prompt": f"{app.url} a kestrel"}).body)["id"]
    target = f"/tasks/{task_id}/events"
    with contextlib.ExitStack() as streams:
        statuses = [streams.enter_context(app.open("GET", target, visitor=flooder)).status for _ in range(10)]
        refused = [app.request("GET", path, visitor=flooder) for path in (target, "/", "/ready")]
        with app.open("GET", target, visitor=visitor) as response:
            first_line = response.readline()
    deadline = time.monotonic() + 60
    while (later := app.request("GET", "/", visitor=flooder)).status == 429:
        assert time.monotonic() < deadline
        time.sleep(0.05)

    assert statuses == [200] * 10
    assert [response.status for response in refused] == [429] * 3
    assert refused[0].headers["retry-after"] == "10"
    assert first_line == b"event: progress\n"
    assert later.status == 200


def test_page_headers(app: App) -> None:
    """The page may run its own script and style only, load from its own server only, and be framed by nobody."""
    page = app.request("GET", "/")
    policy = dict(directive.split(" ", 1) for directive in page.headers["content-security-policy"].split("; "))

    for tag in ("script", "style"):
        (text,) = re.findall(f"<{tag}[^>]*>(.*?)</{tag}>", page.body.decode(), re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert policy[f"{tag}-src"] == f"'sha256-{digest}'"
    assert {policy[name] for name in ("default-src", "base-uri", "form-action", "frame-ancestors")} == {"'none'"}
    assert (policy["connect-src"], policy["img-src"]) == ("'self'", "'self' data:")
    assert page.headers["x-content-type-options"] == "nosniff"
    assert page.headers["content-type"] == "text/html; charset=utf-8"


@pytest.mark.parametrize(
    "target", ["/docs", "/redoc", "/openapi.json", "/.env", "/page.html", "/log.txt", "//etc/passwd"]
)
def test_nothing_else_is_served(app: App, target: str) -> None:
    """Only the page, tasks and statistics are served: no documentation, no files."""
    assert app.request("GET", target).status == 404


def test_log(app: App) -> None:
    """Nothing of the above has left a secret or a traceback in the log, and the application still serves."""
    app.check_log()
    assert app.request("GET", "/ready").status == 200
