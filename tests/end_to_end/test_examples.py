"""The example applications, under real servers and with signed webhooks."""

import contextlib
import io
import signal
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from PIL import Image
from support.apps import NAMES, App, running_app

from flux2max_async.emulator import Emulator, Webhooks

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="ends servers with SIGTERM")


@pytest.fixture(scope="module")
def gateway() -> Iterator[Emulator]:
    """Provide a service whose tasks take 0.8 s, with a forged delivery before each of its own."""
    with Emulator(seconds=0.8, spread=0.0, seed=1, webhooks=Webhooks(forged=1.0)) as emulator:
        yield emulator


@pytest.fixture(scope="module", params=NAMES)
def app(request: pytest.FixtureRequest, gateway: Emulator, tmp_path_factory: pytest.TempPathFactory) -> Iterator[App]:
    """Run each of the examples."""
    with running_app(request.param, gateway, tmp_path_factory.mktemp(request.param)) as running:
        yield running


def test_prompt_to_picture(app: App) -> None:
    """A prompt becomes a task id, its progress, its end, and a picture of the requested size."""
    prompt = f"{app.url} a heron"
    task_id = app.submit(prompt, width=320, height=256)
    *progress, (last_event, last_data) = app.events(task_id)
    picture = app.get(last_data["picture"])
    second_response = app.get(last_data["picture"])
    with Image.open(io.BytesIO(picture.content)) as image:
        image.load()

    assert {name for name, _ in progress} == {"progress"}
    assert any(0 < (data["progress"] or 0) < 1 for _, data in progress)
    assert (last_event, last_data) == ("done", {"picture": f"tasks/{task_id}/picture"})
    assert (image.format, image.size) == ("JPEG", (320, 256))
    assert picture.headers["content-type"] == "image/jpeg"
    assert second_response.content == picture.content
    assert app.gateway.accepted[prompt] == 1


def test_webhook_ends_the_task(app: App) -> None:
    """A task that nobody follows ends by its webhook; a forged delivery is refused and ends nothing."""
    webhooks = app.get("ready").json()["webhooks"]
    prompt = f"{app.url} a wren"
    picture = app.get(f"tasks/{app.submit(prompt, width=64, height=64)}/picture")
    (task_id,) = [task.id for task in app.gateway.tasks.values() if task.prompt == prompt]
    deadline = time.monotonic() + 10
    statuses: list[tuple[bool, int | None]] = []
    while len(statuses) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
        statuses = [
            (delivery.forged, delivery.status) for delivery in app.gateway.deliveries if delivery.task_id == task_id
        ]

    assert picture.status_code == 200
    assert statuses == [(True, 401), (False, 200)]
    assert app.get("ready").json()["webhooks"] == webhooks + 1


def test_several_visitors(app: App) -> None:
    """Concurrent visitors see their own pictures, and the reason if moderation refuses a prompt."""
    prompts = [f"{app.url} a fox", f"{app.url} a hare", f"{app.url} [moderate]"]
    with ThreadPoolExecutor(3) as visitors:
        ids = list(visitors.map(lambda prompt: app.submit(prompt, width=64, height=64), prompts))
        last_events = [events[-1] for events in visitors.map(lambda task_id: list(app.events(task_id)), ids)]

    assert [app.gateway.accepted[prompt] for prompt in prompts] == [1, 1, 1]
    assert last_events[:2] == [("done", {"picture": f"tasks/{task_id}/picture"}) for task_id in ids[:2]]
    assert last_events[2] == ("failed", {"reason": "Moderation refused this prompt. Try another one."})
    assert app.get(f"tasks/{ids[2]}/picture").status_code == 422


def test_visitor_disconnects(app: App) -> None:
    """When a visitor disconnects, the task continues, and a later visitor sees its end; it is paid for once."""
    prompt = f"{app.url} a swallow"
    task_id = app.submit(prompt, width=64, height=64)
    with contextlib.closing(app.events(task_id)) as events:
        first_event = next(events)
    *_, (last_event, _) = app.events(task_id)
    later_events = list(app.events(task_id))

    assert first_event[0] == "progress"
    assert last_event == "done"
    assert [name for name, _ in later_events] == ["progress", "done"]
    assert app.gateway.accepted[prompt] == 1
    assert "Traceback" not in app.log.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("body", "detail"),
    [({"prompt": "  "}, "prompt must not be blank"), ({"prompt": "a cat", "width": 7}, "width must be at least 64")],
)
def test_invalid_request(app: App, body: dict[str, object], detail: str) -> None:
    """An invalid request is a 422 with the reason, and costs nothing."""
    accepted = app.gateway.accepted.total()
    response = app.post(body)

    assert response.status_code == 422
    assert detail in response.json()["detail"]
    assert app.gateway.accepted.total() == accepted


def test_unknown_task(app: App) -> None:
    """An unknown task is a 404, and is not polled."""
    polls = app.gateway.calls["poll"]
    responses = [app.get("tasks/0123456789abcdef/events"), app.get("tasks/0123456789abcdef/picture")]

    assert [response.status_code for response in responses] == [404, 404]
    assert app.gateway.calls["poll"] == polls


def test_page(app: App) -> None:
    """The page is served as HTML."""
    page = app.get("")

    assert page.headers["content-type"].startswith("text/html")
    assert "EventSource" in page.text


def test_shutdown_with_running_tasks(gateway: Emulator, tmp_path: Path) -> None:
    """On SIGTERM, the server waits for its tasks, sends their ends to visitors, and exits cleanly."""

    def run_and_stop(name: str) -> tuple[int, str, str]:
        folder = tmp_path / name
        folder.mkdir()
        with running_app(name, gateway, folder) as app, ThreadPoolExecutor(1) as visitor:
            app.submit("not followed", width=64, height=64)
            events = app.events(app.submit("followed", width=64, height=64))
            next(events)
            remaining_events = visitor.submit(list, events)
            code = app.stop()
            return code, remaining_events.result(timeout=5)[-1][0], app.log.read_text(encoding="utf-8")

    with ThreadPoolExecutor(2) as pool:
        (fastapi, fastapi_end, fastapi_log), (aiohttp, aiohttp_end, aiohttp_log) = pool.map(run_and_stop, NAMES)

    # After its shutdown, uvicorn raises the signal again, as it would without a handler.
    assert (fastapi, aiohttp) == (-signal.SIGTERM, 0)
    assert (fastapi_end, aiohttp_end) == ("done", "done")
    assert "Application shutdown complete" in fastapi_log
    for log in (fastapi_log, aiohttp_log):
        assert "unfinished" not in log
        assert "Traceback" not in log
