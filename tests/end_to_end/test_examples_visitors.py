"""The example applications with more visitors than slots: who waits, who leaves, and what a shutdown does."""

import contextlib
import json
import re
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from http.client import HTTPResponse
from pathlib import Path
from typing import Any

import pytest
from support.apps import NAMES, App, new_address, running_app

from flux2max_async.emulator import Emulator

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="visitors have loopback addresses of their own")

SLOTS = 24
REQUESTS = 10
"""How many requests of one visitor the examples serve at once, and how many submits in a minute."""


@pytest.fixture
def gateway() -> Iterator[Emulator]:
    """Provide a service whose tasks end when the test says so."""
    with Emulator(seconds=3600.0, spread=0.0, seed=1, pictures=False) as emulator:
        yield emulator


@pytest.mark.parametrize("name", NAMES)
def test_visitors_who_leave(name: str, gateway: Emulator, tmp_path: Path) -> None:
    """Requests of a visitor who has left while they waited for a slot are never submitted; the others are."""
    with running_app(name, gateway, tmp_path) as app, ExitStack() as stack:
        in_flight = fill_slots(app)
        leaver, stayer = new_address(), new_address()
        with ExitStack() as leaving:
            for number in range(REQUESTS):
                answer = submit(app, leaver, f"leaving {number}")
                read_event(leaving.enter_context(follow(app, leaver, answer["id"])))
            staying = submit(app, stayer, "staying")
            # It has the first turn but one, behind one of the ten that came before it.
            place = staying["position"]
            events = stack.enter_context(follow(app, stayer, staying["id"]))
            first_event = read_event(events)
            waiting_before = get_status(app)["waiting"]
        wait_until(lambda: get_status(app)["waiting"] == 1)
        wait_until(lambda: count_open(app, leaver, f"/tasks/{in_flight}/events") == REQUESTS)
        accepted = gateway.accepted.total()
        wait_until(lambda: read_event(events) == ("waiting", {"position": 1, "expected_wait": None}))
        end_tasks(gateway)
        wait_until(lambda: gateway.accepted["staying"] == 1)
        wait_until(lambda: get_status(app)["completed"] == SLOTS)
        # Now it is known how long a picture takes.
        wait_until(lambda: bool(submit(app, new_address(), "later")["expected_wait"]))

        assert place <= 2
        assert first_event == ("waiting", {"position": place, "expected_wait": None})
        assert waiting_before == REQUESTS + 1
        assert accepted == SLOTS
        assert [prompt for prompt in gateway.accepted if "leaving" in prompt] == []
        app.check_log()


@pytest.mark.parametrize("name", NAMES)
def test_full_queue(name: str, gateway: Emulator, tmp_path: Path) -> None:
    """When as many wait as may wait, a visitor is told when to try again; a picture that nobody waits for makes room."""
    with running_app(name, gateway, tmp_path, MAX_WAITING="1") as app:
        fill_slots(app)
        waiting = submit(app, new_address(), "waiting")
        refused = app.submit_as(new_address(), {"prompt": "refused"})
        ready = app.request("GET", "/ready")
        wait_until(lambda: get_status(app)["waiting"] == 0)
        later = app.submit_as(new_address(), {"prompt": "later"})
        gone = app.request("GET", f"/tasks/{waiting['id']}/picture")

        assert (waiting["position"], waiting["expected_wait"]) == (1, None)
        assert (refused.status, refused.headers["retry-after"]) == (503, "10")
        assert refused.detail == "Too many pictures are waiting. Try again later."
        assert (ready.status, later.status, gone.status) == (200, 202, 503)
        assert gateway.accepted.total() == SLOTS
        app.check_log()


@pytest.mark.parametrize("name", NAMES)
def test_shutdown(name: str, gateway: Emulator, tmp_path: Path) -> None:
    """On SIGTERM, visitors who wait are told so at once, nothing more is paid for, and those in flight see their ends."""
    reason = "The service is shutting down. Try again in a minute."
    with running_app(name, gateway, tmp_path) as app, ExitStack() as stack:
        task_id = fill_slots(app)
        in_flight = stack.enter_context(follow(app, new_address(), task_id))
        waiting = [
            stack.enter_context(follow(app, visitor, submit(app, visitor, "waiting")["id"]))
            for visitor in [new_address() for _ in range(6)]
        ]
        # aiohttp reads nothing more after SIGTERM.
        late = stack.enter_context(start_submit(app, new_address())) if name == "fastapi" else None
        wait_until(lambda: get_status(app)["waiting"] == 6)
        app.process.send_signal(signal.SIGTERM)
        ends = [read_events(response)[-1] for response in waiting]
        if late is not None:
            late.sendall(b'"too late"}')
            with HTTPResponse(late) as refused:
                refused.begin()
                assert (refused.status, refused.headers["Retry-After"]) == (503, "10")
                assert json.loads(refused.read()) == {"detail": reason}
        end_tasks(gateway)
        last_event = read_events(in_flight)[-1]
        app.process.wait(timeout=60)

    assert ends == [("failed", {"reason": reason})] * 6
    assert last_event == ("done", {"picture": f"tasks/{task_id}/picture"})
    assert gateway.accepted.total() == SLOTS
    app.check_log()
    assert "unfinished" not in app.log.read_text(encoding="utf-8")


def submit(app: App, visitor: str, prompt: str) -> dict[str, Any]:
    """Request a picture, which the application takes in at once, and return its answer."""
    answer = app.submit_as(visitor, {"prompt": prompt})
    assert answer.status == 202, answer
    data: dict[str, Any] = json.loads(answer.body)
    return data


def fill_slots(app: App) -> str:
    """Have a task in each slot, and return the id of one."""
    ids = [submit(app, new_address(), f"in flight {number}")["id"] for number in range(SLOTS)]
    wait_until(lambda: app.gateway.accepted.total() == SLOTS)
    return str(ids[0])


def end_tasks(gateway: Emulator) -> None:
    for task in tuple(gateway.tasks.values()):
        task.ends = 0.0


def get_status(app: App) -> dict[str, Any]:
    status: dict[str, Any] = app.get("ready").json()
    return status


def follow(app: App, visitor: str, task_id: str) -> contextlib.AbstractContextManager[HTTPResponse]:
    """Open the event stream of a task."""
    return app.open("GET", f"/tasks/{task_id}/events", visitor=visitor)


def read_event(response: HTTPResponse) -> tuple[str, Any]:
    """Return the name and data of the next event."""
    name = ""
    while not name.startswith("event: "):  # between events there are empty lines and comments
        name = response.readline().decode().rstrip()
    return name.removeprefix("event: "), json.loads(response.readline().decode().removeprefix("data: "))


def read_events(response: HTTPResponse) -> list[tuple[str, Any]]:
    """Return the events until the end of the stream."""
    events = re.findall(r"event: (\w+)\r?\ndata: (.*)", response.read().decode())
    return [(name, json.loads(data)) for name, data in events]


def start_submit(app: App, visitor: str) -> socket.socket:
    """Send the beginning of a request, and return its connection."""
    head = b"POST /tasks HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 22\r\n\r\n"
    port = int(app.url.rpartition(":")[2])
    connection = socket.create_connection(("127.0.0.1", port), timeout=120, source_address=(visitor, 0))
    connection.sendall(head + b'{"prompt": ')
    return connection


def count_open(app: App, visitor: str, target: str) -> int:
    """Return how many event streams a visitor can have open at once: as many as none of their requests is served."""
    with ExitStack() as stack:
        opened = [stack.enter_context(app.open("GET", target, visitor=visitor)) for _ in range(REQUESTS)]
        return sum(response.status == 200 for response in opened)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)
