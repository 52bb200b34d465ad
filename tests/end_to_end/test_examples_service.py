"""The example applications with a service that refuses, is down or is hostile, and with a budget that is used up."""

import json
import re
import socket
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from anyio.from_thread import start_blocking_portal
from support.apps import NAMES, Answer, App, new_address, running_app
from support.responses import picture
from support.scripted import ScriptedGateway, answer, completed, running

from flux2max_async.emulator import Emulator

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="visitors have loopback addresses of their own")


@pytest.fixture(scope="module")
def gateway() -> Iterator[Emulator]:
    """Provide a service."""
    with Emulator(seconds=0.1, spread=0.0, seed=1, pictures=False) as emulator:
        yield emulator


@pytest.fixture(scope="module", params=NAMES)
def app(request: pytest.FixtureRequest, gateway: Emulator, tmp_path_factory: pytest.TempPathFactory) -> Iterator[App]:
    """Run each of the examples."""
    with running_app(request.param, gateway, tmp_path_factory.mktemp(request.param)) as running_example:
        yield running_example


@pytest.mark.parametrize(
    ("fault", "status", "detail"),
    [
        ("unauthorized", 503, "The picture can't be generated now. Try again later."),
        ("forbidden", 503, "The picture can't be generated now. Try again later."),
        ("insufficient_balance", 503, "The picture can't be generated now. Try again later."),
        ("firewall", 503, "The picture can't be generated now. Try again later."),
        ("not_found", 503, "The picture can't be generated now. Try again later."),
        ("bad_request", 422, "The service refused this prompt. Try another one."),
        ("unprocessable", 422, "The service refused this prompt. Try another one."),
        ("content_filter", 422, "Moderation refused this prompt. Try another one."),
    ],
)
def test_refusal_by_the_service(gateway: Emulator, app: App, fault: str, status: int, detail: str) -> None:
    """A refusal by the service is a clear error that shows neither the service's message nor a secret."""
    gateway.script("submit", fault)
    response = app.submit_as(new_address(), {"prompt": f"{app.url} {fault}"})

    assert (response.status, response.detail) == (status, detail)
    app.check_log()


def test_budget(tmp_path: Path) -> None:
    """When the budget is used up, further submits are refused with 503, and nothing is sent."""

    def spend(name: str) -> tuple[list[Answer], int]:
        folder = tmp_path / name
        folder.mkdir()
        with (
            Emulator(seconds=0.1, spread=0.0, seed=1, pictures=False) as gateway,
            running_app(name, gateway, folder, BUDGET="0.15") as app,
        ):
            answers = [app.submit_as(new_address(), {"prompt": f"a cat {number}"}) for number in range(4)]
            return answers, gateway.accepted.total()

    with ThreadPoolExecutor(2) as pool:
        for answers, accepted in pool.map(spend, NAMES):
            assert [response.status for response in answers] == [201, 201, 503, 503]
            assert {response.detail for response in answers[2:]} == {"The budget for pictures is used up."}
            assert accepted == 2


def test_waits_end(tmp_path: Path) -> None:
    """If the service is down, or a body does not arrive, the visitor is told so after some seconds; other visitors are served."""

    def wait(name: str) -> tuple[Answer, bytes, Answer, App]:
        folder = tmp_path / name
        folder.mkdir()
        with Emulator() as gateway:
            pass  # now nothing listens at its address
        with running_app(name, gateway, folder) as app, ThreadPoolExecutor(2) as pool:
            down = pool.submit(app.submit_as, new_address(), {"prompt": "a cat"})
            slow = pool.submit(send_slowly, app)
            other = app.request("GET", "/")
            return down.result(), slow.result(), other, app

    with ThreadPoolExecutor(2) as pool:
        for down, slow, other, app in pool.map(wait, NAMES):
            assert (down.status, "Try again later." in down.detail) == (503, True)
            assert slow.startswith(b"HTTP/1.1 408 ")
            assert other.status == 200
            app.check_log()


def send_slowly(app: App) -> bytes:
    """Declare a body, send half of it, and return the response."""
    port = int(app.url.rpartition(":")[2])
    head = b"POST /tasks HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 30\r\n\r\n"
    with socket.create_connection(("127.0.0.1", port), timeout=60, source_address=(new_address(), 0)) as connection:
        connection.sendall(head + b'{"prompt": "')
        return connection.recv(65_536)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("content", "media_type"),
    [
        (picture("PNG"), "image/png"),
        (picture("JPEG"), "image/jpeg"),
        (picture("WEBP"), "image/webp"),
        (picture("GIF"), "application/octet-stream"),
    ],
    ids=["png", "jpeg", "webp", "gif"],
)
def test_hostile_service(name: str, content: bytes, media_type: str, tmp_path: Path) -> None:
    """The service's id stands in no URL, header or file name, and a picture has the type of its bytes, not of its name."""
    hostile_id = "../../../evil\r\nSet-Cookie: a=b\r\n\r\ndata: x"
    with start_blocking_portal() as portal, portal.wrap_async_context_manager(ScriptedGateway()) as gateway:
        gateway.submits[0] = answer(200, running(hostile_id))
        gateway.polls[0] = answer(200, completed(hostile_id, f"{gateway.url}/x.html?<script>"))
        gateway.downloads[0] = answer(200, content, [("Content-Type", "text/html")])
        folder = tmp_path / "folder"
        folder.mkdir()
        with running_app(name, gateway, folder) as app:
            task_id = json.loads(app.submit_as(new_address(), {"prompt": "a cat"}).body)["id"]
            *_, (last_event, data) = app.events(task_id)
            response = app.request("GET", f"/{data['picture']}")
            files = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())

    assert re.fullmatch(r"[\w-]{22}", task_id)
    assert (last_event, data) == ("done", {"picture": f"tasks/{task_id}/picture"})
    assert (response.status, response.body) == (200, content)
    assert response.headers["content-type"] == media_type
    assert response.headers["x-content-type-options"] == "nosniff"
    assert "default-src 'none'" in response.headers["content-security-policy"]
    assert files == ["folder/log.txt", f"folder/pictures/{task_id}"]
