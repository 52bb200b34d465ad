"""The example applications with a service that refuses, is down or is hostile, and with a budget that is used up."""

import json
import re
import socket
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

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
    task_id = json.loads(response.body)["id"]
    picture = app.request("GET", f"/tasks/{task_id}/picture")
    *_, last_event = app.events(task_id)

    assert response.status == 202
    assert (picture.status, picture.detail) == (status, detail)
    assert last_event == ("failed", {"reason": detail})
    app.check_log()


def test_budget(tmp_path: Path) -> None:
    """When the budget is used up, visitors are told so, and nothing is sent."""

    def spend(name: str) -> tuple[list[tuple[str, Any]], int]:
        folder = tmp_path / name
        folder.mkdir()
        with (
            Emulator(seconds=0.1, spread=0.0, seed=1, pictures=False) as gateway,
            running_app(name, gateway, folder, BUDGET="0.15") as app,
        ):
            ids = [app.submit(f"a cat {number}") for number in range(4)]
            ends = [list(app.events(task_id))[-1] for task_id in ids]
            assert app.request("GET", f"/tasks/{ids[-1]}/picture").status == 503
            return ends, gateway.accepted.total()

    with ThreadPoolExecutor(2) as pool:
        for ends, accepted in pool.map(spend, NAMES):
            assert [event for event, _ in ends] == ["done", "done", "failed", "failed"]
            assert [data for _, data in ends[2:]] == [{"reason": "The budget for pictures is used up."}] * 2
            assert accepted == 2


def test_wrong_key(gateway: Emulator, tmp_path: Path) -> None:
    """With a wrong key the server is not ready; one line in the log says what to check, and visitors don't see it."""

    def serve(name: str) -> tuple[list[Answer], Answer, App]:
        folder = tmp_path / name
        folder.mkdir()
        with running_app(name, gateway, folder, FLUX2MAX_API_KEY="wrong-key") as app:
            ids = [app.submit(f"a cat {number}") for number in range(3)]
            pictures = [app.request("GET", f"/tasks/{task_id}/picture") for task_id in ids]
            return pictures, app.request("GET", "/ready"), app

    with ThreadPoolExecutor(2) as pool:
        for pictures, ready, app in pool.map(serve, NAMES):
            status = json.loads(ready.body)
            log = app.log.read_text(encoding="utf-8")
            assert {picture.status for picture in pictures} == {503}
            assert (ready.status, status["ok"], status["state"]) == (503, False, "open")
            assert "last_error" not in status
            assert (log.count("check the API key"), log.count("wrong-key")) == (1, 0)
            assert log.count("FLUX2MAX_API_KEY") == 1  # the same line names the variable
            app.check_log()


def test_waits_end(tmp_path: Path) -> None:
    """If the service is down, or a body does not arrive, the visitor is told so after some seconds; other visitors are served."""

    def wait(name: str) -> tuple[Answer, bytes, Answer, Answer, App]:
        folder = tmp_path / name
        folder.mkdir()
        with Emulator() as gateway:
            pass  # now nothing listens at its address
        with running_app(name, gateway, folder) as app, ThreadPoolExecutor(2) as pool:
            down = pool.submit(app.request, "GET", f"/tasks/{app.submit('a cat')}/events")
            slow = pool.submit(send_slowly, app)
            other = app.request("GET", "/")
            return down.result(), slow.result(), other, app.request("GET", "/ready"), app

    with ThreadPoolExecutor(2) as pool:
        for down, slow, other, ready, app in pool.map(wait, NAMES):
            assert [line for line in down.body.splitlines() if line.startswith(b"event")] == [b"event: failed"]
            assert b"Try again later." in down.body
            assert ready.status == 503
            assert app.log.read_text(encoding="utf-8").count("no answer from http") == 1
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
