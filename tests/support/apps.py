"""The examples, each in a process of its own, beside an emulated gateway that posts webhooks to it."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attrs
import httpx

from flux2max_async.emulator import Emulator

EXAMPLES = Path(__file__).parents[2] / "examples"
NAMES = ("fastapi", "aiohttp")

SECRET = "a secret of the tests, of some length"


@attrs.frozen
class App:
    """An example that runs."""

    url: str
    http: httpx.Client
    gateway: Emulator
    process: "subprocess.Popen[bytes]"
    log: Path

    def submit(self, prompt: str, **params: int) -> str:
        """Ask for a picture, as the page does; gives its id."""
        reply = self.post({"prompt": prompt, **params})
        assert reply.status_code == 201, reply.text
        return str(reply.json()["id"])

    def post(self, wish: dict[str, Any]) -> httpx.Response:
        return self.http.post("tasks", json=wish)

    def get(self, path: str) -> httpx.Response:
        return self.http.get(path)

    def events(self, task_id: str) -> Generator[tuple[str, dict[str, Any]]]:
        """Follow a task as a browser does: each event's name and data, until the server ends the answer."""
        with self.http.stream("GET", f"tasks/{task_id}/events") as reply:
            assert reply.status_code == 200
            assert reply.headers["content-type"].startswith("text/event-stream")
            assert reply.headers["cache-control"] == "no-cache"
            name = ""
            for line in reply.iter_lines():
                field, _, value = line.partition(": ")
                match field:
                    case "event":
                        name = value
                    case "data":
                        yield name, json.loads(value)
                    case _:
                        assert line == ""

    def stop(self) -> int:
        """Ask it to end, as an operator does, and wait until it has; gives its exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=25)


@contextmanager
def running_app(name: str, gateway: Emulator, folder: Path) -> Iterator[App]:
    """Run an example in a folder, where every warning is an error, until the block ends."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    url = f"http://127.0.0.1:{port}"
    settings = {
        "FLUX2MAX_API_KEY": gateway.api_key,
        "FLUX2MAX_BASE_URL": gateway.url,
        "PUBLIC_URL": url,
        "WEBHOOK_SECRET": SECRET,
        "PORT": port,
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
            _wait_for(app)
            yield app
        finally:
            process.kill()


def _wait_for(app: App) -> None:
    until = time.monotonic() + 20
    while time.monotonic() < until and app.process.poll() is None:
        try:
            assert app.get("ready").status_code == 200
        except httpx.TransportError:
            time.sleep(0.05)
        else:
            return
    raise AssertionError(f"the server didn't come up:\n{app.log.read_text(encoding='utf-8')}")
