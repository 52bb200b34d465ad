"""Visitors who leave while they wait for pictures, with real servers in processes of their own."""

import http.client
import importlib.util
import json
import os
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path

import attrs
import pytest
from support.ports import free_port
from support.visited import SLOTS

from flux2max_async.emulator import Emulator

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="ends servers with SIGTERM")

SERVERS = [
    ("uvicorn", "h11", "asyncio"),
    ("uvicorn", "h11", "uvloop", "middleware"),
    ("uvicorn", "httptools", "asyncio", "middleware"),
    ("uvicorn", "httptools", "uvloop"),
    ("aiohttp", "asyncio"),
    ("aiohttp", "uvloop"),
]
ASGI_TARGETS = [
    f"/{path}?read={when}"
    for path, when in [
        ("json", "before"),
        *((p, w) for p in ("request", "raw/") for w in ("before", "inside", "after")),
    ]
]
AIOHTTP_TARGETS = [f"/request?read={when}" for when in ("before", "inside", "after")]


@attrs.define(eq=False)
class Server:
    """A server of `support.visited`, and the emulated service whose pictures it generates."""

    port: int
    gateway: Emulator
    targets: list[str]
    log: Path

    def state(self, query: str = "") -> dict[str, int]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        try:
            connection.request("GET", f"/state{query}")
            return dict(json.loads(connection.getresponse().read()))
        finally:
            connection.close()

    def wait_until(self, **expected: int) -> None:
        """Wait until the state has these counts."""
        wait_for(lambda: expected.items() <= self.state().items(), lambda: f"{self.state()}, not {expected}")

    def end_tasks(self) -> None:
        """End all tasks that the service has, at once."""
        for task in tuple(self.gateway.tasks.values()):
            task.ends = 0.0

    def end_tasks_until(self, **expected: int) -> None:
        """End tasks as they come, until the state has these counts."""

        def end() -> bool:
            self.end_tasks()
            return expected.items() <= self.state().items()

        wait_for(end, lambda: f"{self.state()}, not {expected}")


def wait_for(condition: Callable[[], bool], describe: Callable[[], str] = lambda: "") -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline, describe()
        time.sleep(0.02)


@attrs.define(eq=False)
class Visitor:
    """A connection on which a request was sent."""

    connection: socket.socket
    prompt: str
    body: bytes

    @classmethod
    def request(
        cls,
        server: Server,
        target: str,
        prompt: str,
        *,
        size: int = 3000,
        sent: int | None = None,
        connection: socket.socket | None = None,
    ) -> "Visitor":
        """Send a request, or its headers and the first bytes of its body, on a new connection or a used one."""
        body = b'"%s"' % (prompt.encode() + b"." * size)
        head = f"POST {target}&prompt={prompt} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        connection = connection or socket.create_connection(("127.0.0.1", server.port), timeout=120)
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body[:sent])
        return cls(connection, prompt, body)

    def leave(self, *, reset: bool) -> None:
        """Close the connection, with FIN or with RST."""
        if reset:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()

    def check_response(self) -> None:
        """Check that the response describes the body."""
        response = http.client.HTTPResponse(self.connection)
        response.begin()
        content = json.loads(response.read())
        assert (response.status, content) == (200, {"size": len(self.body), "sha256": sha256(self.body).hexdigest()})
        response.close()


@contextmanager
def running_server(arguments: tuple[str, ...], folder: Path) -> Iterator[Server]:
    if arguments[1] == "httptools" and importlib.util.find_spec("httptools") is None:
        pytest.skip("httptools isn't installed")
    if "uvloop" in arguments and importlib.util.find_spec("uvloop") is None:
        pytest.skip("uvloop isn't installed")
    port = free_port()
    name, *options = arguments
    targets = ASGI_TARGETS if name == "uvicorn" else AIOHTTP_TARGETS
    log = folder / "log.txt"
    with Emulator(seconds=600.0, spread=0.0, seed=1, pictures=False) as gateway, log.open("wb") as output:
        paths = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "FLUX2MAX_API_KEY": gateway.api_key,
            "FLUX2MAX_BASE_URL": gateway.url,
        }
        command = [sys.executable, "-W", "error", "-m", "support.visited", name, str(port), *options]
        with subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT) as process:
            try:
                server = Server(port, gateway, targets, log)
                wait_for(lambda: is_serving(server), lambda: log.read_text(encoding="utf-8"))
                yield server
            finally:
                server.end_tasks()
                process.terminate()
                try:
                    process.wait(timeout=120)
                finally:
                    process.kill()
    text = log.read_text(encoding="utf-8")
    assert not any(word in text for word in ("Traceback", "ERROR", "WARNING", "destroyed", "never retrieved")), text


def is_serving(server: Server) -> bool:
    try:
        server.state()
    except OSError:
        return False
    return True


@pytest.fixture(scope="module", params=SERVERS, ids="-".join)
def running(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Run each kind of server, with a service whose tasks end when the test ends them."""
    with running_server(request.param, tmp_path_factory.mktemp("server")) as server:
        yield server


@pytest.fixture
def server(running: Server) -> Server:
    """Provide a server and a service that have counted nothing yet."""
    running.state("?clear")
    running.gateway.accepted.clear()
    return running


def enter(server: Server, count: int) -> list[Visitor]:
    """Let visitors request pictures, one in each way, until all wait for theirs."""
    visitors = [
        Visitor.request(server, server.targets[number % len(server.targets)], f"no{number}") for number in range(count)
    ]
    server.wait_until(waiting=count)
    wait_for(lambda: server.gateway.accepted.total() == SLOTS)
    return visitors


def test_visitors_who_leave(server: Server) -> None:
    """Of 20 visitors, only those who stay are paid for, and those whose pictures were submitted before they left."""
    visitors = enter(server, 20)
    submitted = set(server.gateway.accepted)
    in_flight = [visitor for visitor in visitors if visitor.prompt in submitted]
    queued = [visitor for visitor in visitors if visitor.prompt not in submitted]
    leaving = in_flight[::2] + queued[::2]
    staying = in_flight[1::2] + queued[1::2]
    for number, visitor in enumerate(leaving):
        visitor.leave(reset=number % 4 < 2)
    server.wait_until(left=10, waiting=10)

    assert set(server.gateway.accepted) == submitted
    server.end_tasks_until(served=10)
    for visitor in staying:
        visitor.check_response()
        visitor.leave(reset=False)
    assert server.gateway.accepted == dict.fromkeys(submitted | {visitor.prompt for visitor in staying}, 1)
    assert server.state() == {"waiting": 0, "left": 10, "served": 10}


def test_body_that_arrives_late(server: Server) -> None:
    """A body whose parts arrive before, in and after the block is complete, and so is a large one."""
    target = next(target for target in server.targets if target.startswith("/request") and target.endswith("after"))
    late = Visitor.request(server, target, "late", sent=1000)
    large = Visitor.request(server, target, "large", size=2_000_000, sent=0)
    server.wait_until(waiting=2)
    late.connection.sendall(late.body[1000:2000])
    sending = threading.Thread(
        target=large.connection.sendall, args=[large.body]
    )  # the server doesn't read all of it yet
    sending.start()
    server.end_tasks_until(waiting=0)
    late.connection.sendall(late.body[2000:])
    late.check_response()
    large.check_response()
    sending.join()
    for visitor in (late, large):
        visitor.leave(reset=False)

    assert server.state() == {"waiting": 0, "served": 2}


def test_further_requests_on_a_connection(server: Server) -> None:
    """A further request on the same connection is no disconnect, whether it is sent before the response or after it."""
    target = server.targets[0]
    first = Visitor.request(server, target, "first")
    second = Visitor.request(server, target, "second", connection=first.connection)
    server.wait_until(waiting=1)
    for visitor in (first, second):
        wait_for(lambda visitor=visitor: bool(server.gateway.accepted[visitor.prompt]))  # type: ignore[misc]
        server.end_tasks()
        visitor.check_response()
    third = Visitor.request(server, target, "third", connection=first.connection)
    wait_for(lambda: bool(server.gateway.accepted["third"]))
    server.end_tasks()
    third.check_response()
    first.leave(reset=False)

    assert server.state() == {"waiting": 0, "served": 3}
    assert server.gateway.accepted == {"first": 1, "second": 1, "third": 1}
