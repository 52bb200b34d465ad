"""Run the example applications, each in its own process, with an emulated gateway that posts webhooks to it."""

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

SECRET = "a sufficiently long secret for tests"


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
        assert response.status_code == 201, response.text
        return str(response.json()["id"])

    def post(self, body: dict[str, Any]) -> httpx.Response:
        return self.http.post("tasks", json=body)

    def get(self, path: str) -> httpx.Response:
        return self.http.get(path)

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
                        assert line == ""

    def stop(self) -> int:
        """Terminate the application with SIGTERM, wait until it has exited, and return its exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=25)


@contextmanager
def running_app(name: str, gateway: Emulator, folder: Path) -> Iterator[App]:
    """Run an example in a folder, with warnings as errors, until the block ends."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
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
            _wait_until_ready(app)
            yield app
        finally:
            process.kill()


def _wait_until_ready(app: App) -> None:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and app.process.poll() is None:
        try:
            assert app.get("ready").status_code == 200
        except httpx.TransportError:
            time.sleep(0.05)
        else:
            return
    raise AssertionError(f"the server did not start:\n{app.log.read_text(encoding='utf-8')}")
