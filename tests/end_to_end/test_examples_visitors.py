"""The example applications with more visitors than slots, of whom many leave."""

import json
import select
import socket
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest
from support.apps import NAMES, App, new_address, running_app

from flux2max_async.emulator import Emulator

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="visitors have loopback addresses of their own")

SLOTS = 24
REQUESTS = 10
"""How many requests of one visitor the examples serve at once, and how many submits in a minute."""


@pytest.mark.parametrize("name", NAMES)
def test_visitors_who_leave(name: str, tmp_path: Path) -> None:
    """Requests of a visitor who has left while they waited for a slot are never submitted; the others are."""
    with (
        Emulator(seconds=3600.0, spread=0.0, seed=1, pictures=False) as gateway,
        running_app(name, gateway, tmp_path) as app,
        ExitStack() as stack,
    ):
        for number in range(SLOTS):
            answer = app.submit_as(new_address(), {"prompt": f"in flight {number}"})
            assert answer.status == 201
        stream = f"/tasks/{json.loads(answer.body)['id']}/events"
        leaver, stayer = new_address(), new_address()
        staying = stack.enter_context(start_submit(app, stayer, "staying"))
        leaving = [start_submit(app, leaver, f"leaving {number}") for number in range(REQUESTS)]
        wait_until(lambda: app.request("GET", "/", visitor=leaver).status == 429)
        for connection in leaving:
            connection.close()
        wait_until(lambda: count_open(app, leaver, stream) == REQUESTS)
        still_waits = not select.select([staying], [], [], 0)[0]
        accepted = gateway.accepted.total()
        for task in tuple(gateway.tasks.values()):
            task.ends = 0.0
        status = staying.recv(12)
        wait_until(lambda: app.get("/ready").json()["completed"] == SLOTS)

        # It came before those who have left: their requests have ended because they left, and not after a time limit.
        assert still_waits
        assert accepted == SLOTS
        # On a very slow machine, the stayer may have been told to try again later.
        assert (status, gateway.accepted["staying"]) in {(b"HTTP/1.1 201", 1), (b"HTTP/1.1 503", 0)}
        assert [prompt for prompt in gateway.accepted if "leaving" in prompt] == []
        app.check_log()


def start_submit(app: App, visitor: str, prompt: str) -> socket.socket:
    """Request a picture, and return the connection on which the response will come."""
    body = json.dumps({"prompt": prompt}).encode()
    head = f"POST /tasks HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    port = int(app.url.rpartition(":")[2])
    connection = socket.create_connection(("127.0.0.1", port), timeout=120, source_address=(visitor, 0))
    connection.sendall(head.encode() + body)
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
