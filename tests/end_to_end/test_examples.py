"""The example applications, under real servers and with signed webhooks: what visitors and operators see."""

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
    """A service whose tasks take 0.8 s, and for which somebody forges a delivery before each of its own."""
    with Emulator(seconds=0.8, spread=0.0, seed=1, webhooks=Webhooks(forged=1.0)) as emulator:
        yield emulator


@pytest.fixture(scope="module", params=NAMES)
def app(request: pytest.FixtureRequest, gateway: Emulator, tmp_path_factory: pytest.TempPathFactory) -> Iterator[App]:
    """Each of the examples."""
    with running_app(request.param, gateway, tmp_path_factory.mktemp(request.param)) as running:
        yield running


def test_a_visitor_sees_the_picture(app: App) -> None:
    """A prompt becomes an id, its progress, its end, and a picture of the size that was asked for."""
    prompt = f"{app.url} a heron"
    task_id = app.submit(prompt, width=320, height=256)
    *progress, (end, told) = app.events(task_id)
    picture = app.get(told["picture"])
    again = app.get(told["picture"])
    with Image.open(io.BytesIO(picture.content)) as image:
        image.load()

    assert {name for name, _ in progress} == {"progress"}
    assert any(0 < (data["progress"] or 0) < 1 for _, data in progress)
    assert (end, told) == ("done", {"picture": f"tasks/{task_id}/picture"})
    assert (image.format, image.size) == ("JPEG", (320, 256))
    assert picture.headers["content-type"] == "image/jpeg"
    assert again.content == picture.content
    assert app.gateway.accepted[prompt] == 1


def test_a_webhook_brings_the_end(app: App) -> None:
    """What nobody watches ends by its webhook; a forged one that comes before it is refused, and ends nothing."""
    webhooks = app.get("ready").json()["webhooks"]
    task_id = app.submit("a wren", width=64, height=64)
    picture = app.get(f"tasks/{task_id}/picture")
    until = time.monotonic() + 10
    answers: list[tuple[bool, int | None]] = []
    while len(answers) < 2 and time.monotonic() < until:
        time.sleep(0.02)
        answers = [(letter.forged, letter.status) for letter in app.gateway.deliveries if letter.task_id == task_id]

    assert picture.status_code == 200
    assert answers == [(True, 401), (False, 200)]
    assert app.get("ready").json()["webhooks"] == webhooks + 1


def test_several_visitors(app: App) -> None:
    """Visitors who come at once see their own pictures, and one that moderation refuses is told so."""
    prompts = [f"{app.url} a fox", f"{app.url} a hare", f"{app.url} [moderate]"]
    with ThreadPoolExecutor(3) as visitors:
        ids = list(visitors.map(lambda prompt: app.submit(prompt, width=64, height=64), prompts))
        ends = [events[-1] for events in visitors.map(lambda task_id: list(app.events(task_id)), ids)]

    assert [app.gateway.accepted[prompt] for prompt in prompts] == [1, 1, 1]
    assert ends[:2] == [("done", {"picture": f"tasks/{task_id}/picture"}) for task_id in ids[:2]]
    assert ends[2] == ("failed", {"reason": "Moderation refused this prompt. Try another one."})
    assert app.get(f"tasks/{ids[2]}/picture").status_code == 422


def test_a_visitor_who_leaves(app: App) -> None:
    """One who leaves in the middle ends nothing: who comes later sees the same task's end, which was paid for once."""
    prompt = f"{app.url} a swallow"
    task_id = app.submit(prompt, width=64, height=64)
    with contextlib.closing(app.events(task_id)) as leaving:
        first = next(leaving)
    *_, (end, _) = app.events(task_id)
    later = list(app.events(task_id))

    assert first[0] == "progress"
    assert end == "done"
    assert [name for name, _ in later] == ["progress", "done"]
    assert app.gateway.accepted[prompt] == 1
    assert "Traceback" not in app.log.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("wish", "why"),
    [({"prompt": "  "}, "prompt must not be blank"), ({"prompt": "a cat", "width": 7}, "width must be at least 64")],
)
def test_what_cannot_be_drawn(app: App, wish: dict[str, object], why: str) -> None:
    """A wish that is wrong is refused with what is wrong about it, and nothing is paid."""
    accepted = app.gateway.accepted.total()
    reply = app.post(wish)

    assert reply.status_code == 422
    assert why in reply.json()["detail"]
    assert app.gateway.accepted.total() == accepted


def test_what_is_unknown(app: App) -> None:
    """A task that isn't ours is a 404, and the service isn't asked for it."""
    polls = app.gateway.calls["poll"]
    replies = [app.get("tasks/0123456789abcdef/events"), app.get("tasks/0123456789abcdef/picture")]

    assert [reply.status_code for reply in replies] == [404, 404]
    assert app.gateway.calls["poll"] == polls


def test_the_page(app: App) -> None:
    """The page is a page."""
    page = app.get("")

    assert page.headers["content-type"].startswith("text/html")
    assert "EventSource" in page.text


def test_a_shutdown_while_tasks_run(gateway: Emulator, tmp_path: Path) -> None:
    """A server that is told to end tells its visitors the ends of their tasks, waits for the others, and ends well."""

    def end(name: str) -> tuple[int, str, str]:
        folder = tmp_path / name
        folder.mkdir()
        with running_app(name, gateway, folder) as app, ThreadPoolExecutor(1) as visitor:
            app.submit("nobody waits for this one", width=64, height=64)
            followed = app.events(app.submit("somebody waits for this one", width=64, height=64))
            next(followed)
            rest = visitor.submit(list, followed)
            code = app.stop()
            return code, rest.result(timeout=5)[-1][0], app.log.read_text(encoding="utf-8")

    with ThreadPoolExecutor(2) as both:
        (fastapi, fastapi_end, fastapi_log), (aiohttp, aiohttp_end, aiohttp_log) = both.map(end, NAMES)

    # Uvicorn, once all is done, ends by the signal that it was sent.
    assert (fastapi, aiohttp) == (-signal.SIGTERM, 0)
    assert (fastapi_end, aiohttp_end) == ("done", "done")
    assert "Application shutdown complete" in fastapi_log
    for log in (fastapi_log, aiohttp_log):
        assert "unfinished" not in log
        assert "Traceback" not in log
