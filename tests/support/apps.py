"""Run the example applications, each in its own process, with an emulated gateway that posts webhooks to it."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path
from typing import Any

import attrs
import httpx

from flux2max_async.emulator import Emulator
from support.ports import free_port

EXAMPLES = Path(__file__).parents[2] / "examples"
NAMES = ("fastapi", "aiohttp")

SECRET = "a sufficiently long secret for tests"

_ADDRESSES = (f"127.1.{number // 200}.{number % 200 + 1}" for number in itertools.count())


def new_address() -> str:
    """Return a loopback address that no other visitor has; only Linux lets programs use all of 127.0.0.0/8."""
    return next(_ADDRESSES)


@attrs.frozen
class Answer:
    """A response to a visitor with an address of their own."""

    status: int
    headers: dict[str, str]
    """With names in lower case."""
    body: bytes

    @property
    def detail(self) -> str:
        """The reason of an error."""
        assert self.headers["content-type"].startswith("application/json"), self
        return str(json.loads(self.body)["detail"])


@attrs.frozen
class App:
    """A running example application."""

    url: str
    http: httpx.Client
    gateway: Emulator
    process: "subprocess.Popen[bytes]"
    log: Path

    def submit(self, prompt: str, **params: int) -> str:
        """Request a picture, as the page does, and return the task id."""
        response = self.post({"prompt": prompt, **params})
        assert response.status_code == 202, response.text
        return str(response.json()["id"])

    def post(self, body: dict[str, Any]) -> httpx.Response:
        return self.http.post("tasks", json=body)

    def get(self, path: str) -> httpx.Response:
        return self.http.get(path)

    @contextmanager
    def open(
        self,
        method: str,
        target: str,
        *,
        visitor: str,
        headers: Mapping[str, str] | None = None,
        body: bytes | Iterable[bytes] | None = None,
    ) -> Iterator[HTTPResponse]:
        """Send a request from a visitor's address, whatever a browser would make of its target; yield the response."""
        server = httpx.URL(self.url)
        connection = HTTPConnection(server.host, server.port, timeout=60, source_address=(visitor, 0))
        try:
            with suppress(ConnectionError):  # the server may respond, and close, before it has read the whole body
                connection.request(method, target, body, dict(headers or {}))
            response = connection.getresponse()
            with response:
                yield response
        finally:
            connection.close()

    def request(self, method: str, target: str, *, visitor: str | None = None, **rest: Any) -> Answer:
        """Send a request like `open()`, by default as a new visitor, and return the whole response."""
        with self.open(method, target, visitor=visitor or new_address(), **rest) as response:
            headers = {name.lower(): value for name, value in response.getheaders()}
            return Answer(response.status, headers, response.read())

    def submit_as(self, visitor: str, body: Mapping[str, Any], headers: Mapping[str, str] | None = None) -> Answer:
        """Request a picture from a visitor's address."""
        headers = {"Content-Type": "application/json", **(headers or {})}
        return self.request("POST", "/tasks", visitor=visitor, headers=headers, body=json.dumps(body).encode())

    def events(self, task_id: str) -> Generator[tuple[str, dict[str, Any]]]:
        """Yield the name and data of each server-sent event of a task, until the server ends the response."""
        with self.http.stream("GET", f"tasks/{task_id}/events") as response:
            assert response.status_code == 200
            assert response.headers["content-type"].startswith("text/event-stream")
            assert response.headers["cache-control"] == "no-cache"
            name = ""
            for line in response.iter_lines():
                field, _, value = line.partition(": ")
                match field:
                    case "event":
                        name = value
                    case "data":
                        yield name, json.loads(value)
                    case _:
                        assert line == "" or line.startswith(":")  # a comment keeps the connection open

    def check_log(self) -> None:
        """Check that the log shows no secret, and no error that nobody has handled."""
        log = self.log.read_text(encoding="utf-8")
        assert [text for text in (self.gateway.api_key, SECRET, "Traceback") if text in log] == [], log

    def stop(self) -> int:
        """Terminate the application with SIGTERM, wait until it has exited, and return its exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=25)


@contextmanager
def running_app(name: str, gateway: Any, folder: Path, **variables: str) -> Iterator[App]:
    """Run an example in a folder, with warnings as errors and environment variables, until the block ends."""
    port = str(free_port())
    url = f"http://127.0.0.1:{port}"
    settings = {
        "FLUX2MAX_API_KEY": gateway.api_key,
        "FLUX2MAX_BASE_URL": gateway.url,
        "PUBLIC_URL": url,
        "WEBHOOK_SECRET": SECRET,
        "PORT": port,
        **variables,
    }
    command = [sys.executable, "-W", "error"]
    if name == "fastapi":
        command += ["-m", "uvicorn", "--app-dir", str(EXAMPLES), "--timeout-graceful-shutdown", "20"]
        command += ["--port", port, "fastapi_app:app"]
    else:
        command += [str(EXAMPLES / "aiohttp_app.py")]
    log = folder / "log.txt"
    with (
        httpx.Client(base_url=url, timeout=10, limits=httpx.Limits(keepalive_expiry=1), trust_env=False) as http,
        log.open("wb") as output,
        subprocess.Popen(
            command, env={**os.environ, **settings}, cwd=folder, stdout=output, stderr=subprocess.STDOUT
        ) as process,
    ):
        try:
            app = App(url, http, gateway, process, log)
            _wait_until_ready(app)
            yield app
        finally:
            process.kill()


def _wait_until_ready(app: App) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and app.process.poll() is None:
        try:
            assert app.get("ready").status_code == 200
        except httpx.TransportError:
            time.sleep(0.05)
        else:
            return
    raise AssertionError(f"the server did not start:\n{app.log.read_text(encoding='utf-8')}")
