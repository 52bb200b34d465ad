"""Runs the web servers that `backends.py` measures, and their visitors. Nothing that is started outlives its block."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import attrs
from backend_app import Settings

from flux2max_async.emulator import Emulator

_FOLDER = Path(__file__).parent
_START_TIMEOUT = 60.0
_BACKLOG = "4096"


class StartError(Exception):
    """A server can't be started."""


@attrs.frozen
class Backend:
    """A web server."""

    name: str
    modules: tuple[str, ...]
    """What must be installed."""
    command: Callable[["Backend", str, str, str], list[str]]
    """Gets the port, the event loop, and the seconds that open requests have after SIGTERM."""
    workers: int = 1

    def check_installed(self, loop: str) -> None:
        """Check that the server and the event loop are installed.

        Raises:
            StartError: Something is missing.
        """
        if missing := [name for name in (*self.modules, loop) if find_spec(name) is None]:
            raise StartError(f"not installed: {', '.join(missing)}")


def _uvicorn(backend: Backend, port: str, loop: str, grace: str) -> list[str]:
    return [
        "-m", "uvicorn", "--factory", "backend_app:build_asgi", "--port", port, "--loop", loop, "--workers",
        str(backend.workers), "--backlog", _BACKLOG, "--timeout-graceful-shutdown", grace, "--log-level", "warning",
    ]  # fmt: skip


def _granian(backend: Backend, port: str, loop: str, grace: str) -> list[str]:
    return [
        "-m", "granian", "--interface", "asgi", "--factory", "backend_app:build_asgi", "--port", port, "--loop", loop,
        "--workers", str(backend.workers), "--backlog", _BACKLOG, "--backpressure", _BACKLOG, "--workers-kill-timeout",
        grace, "--log-level", "warning",
    ]  # fmt: skip


def _gunicorn(backend: Backend, port: str, loop: str, grace: str) -> list[str]:
    # The other worker takes uvloop if it is installed.
    worker = "uvicorn_worker.UvicornH11Worker" if loop == "asyncio" else "uvicorn_worker.UvicornWorker"
    return [
        "-m", "gunicorn", "backend_app:build_asgi()", "--bind", f"127.0.0.1:{port}", "--worker-class", worker,
        "--workers", str(backend.workers), "--backlog", _BACKLOG, "--graceful-timeout", grace, "--log-level", "warning",
        "--no-control-socket",
    ]  # fmt: skip


def _aiohttp(_: Backend, port: str, loop: str, grace: str) -> list[str]:
    return [str(_FOLDER / "backend_app.py"), port, loop, grace]


AIOHTTP = Backend("aiohttp.web", (), _aiohttp)
BACKENDS = (
    Backend("uvicorn", ("uvicorn", "fastapi"), _uvicorn),
    Backend("uvicorn, 4 workers", ("uvicorn", "fastapi"), _uvicorn, workers=4),
    Backend("granian", ("granian", "fastapi"), _granian),
    Backend("gunicorn", ("gunicorn", "uvicorn_worker", "fastapi"), _gunicorn),
    AIOHTTP,
)


@attrs.define(eq=False)
class Server:
    """A running server."""

    process: subprocess.Popen[bytes]
    port: int

    def cpu_seconds(self) -> float:
        """Return the CPU time of all its processes so far; 0 where there is no /proc."""
        ticks = 0
        for path in Path("/proc").glob("[0-9]*/stat"):
            with suppress(OSError):
                # After the name, which may contain anything, the fields begin with the third one.
                fields = path.read_text(encoding="utf-8", errors="replace").rpartition(") ")[2].split()
                if int(fields[3]) == self.process.pid:  # its session
                    ticks += int(fields[11]) + int(fields[12])
        return ticks / os.sysconf("SC_CLK_TCK")

    @contextmanager
    def visitors(
        self, path: str, count: int, *, share: float = 0.0, seconds: float = 0.0
    ) -> Iterator[Callable[[], list[dict[str, Any]]]]:
        """Let visitors come; the context is a function that waits for what became of them."""
        arguments = [self.port, path, count, share, seconds]
        command = [sys.executable, str(_FOLDER / "visitors.py"), *map(str, arguments)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:

            def wait() -> list[dict[str, Any]]:
                output, _ = process.communicate()
                if process.returncode:
                    raise subprocess.CalledProcessError(process.returncode, command)
                visitors: list[dict[str, Any]] = json.loads(output)
                return visitors

            try:
                yield wait
            finally:
                process.kill()


@contextmanager
def running_server(
    backend: Backend, loop: str, gateway: Emulator, *, grace: int = 20, webhooks: bool = False, **settings: Any
) -> Iterator[Server]:
    """Run a server with a service; the context begins when all its workers are ready.

    Args:
        backend: The server.
        loop: The event loop: "asyncio" or "uvloop".
        gateway: The service that generates the pictures.
        grace: Seconds that open requests have after SIGTERM.
        webhooks: Whether the service is to post tasks that have ended.
        **settings: Further settings of the service.

    Raises:
        StartError: It can't be started.
    """
    backend.check_installed(loop)
    # A worker that is just being killed may still write to the folder.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        port = _free_port()
        url = f"http://127.0.0.1:{port}/hooks/flux" if webhooks else None
        service = Settings(gateway.url, gateway.api_key, folder, webhook_url=url, drain=grace, **settings)
        paths = filter(None, [str(_FOLDER), os.environ.get("PYTHONPATH", "")])
        environment = {**os.environ, **service.to_environment(), "PYTHONPATH": os.pathsep.join(paths)}
        command = [sys.executable, *backend.command(backend, str(port), loop, str(grace))]
        log = Path(folder) / "log.txt"
        # A session of its own: its processes are found and killed together, and get no Ctrl-C of this one.
        with (
            log.open("wb") as output,
            subprocess.Popen(
                command, cwd=folder, env=environment, stdout=output, stderr=output, start_new_session=True
            ) as process,
        ):
            try:
                _wait_until_ready(process, backend, Path(folder), port)
                yield Server(process, port)
            finally:
                kill(process)


def kill(server: subprocess.Popen[bytes]) -> None:
    """Kill a server with all its workers."""
    with suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGKILL)


def _free_port() -> int:
    """Return a port that is free, and not one that the system gives to connections."""
    while True:
        port = random.randrange(20_000, 32_000)
        with suppress(OSError), socket.socket() as listener:
            listener.bind(("127.0.0.1", port))
            return port


def _wait_until_ready(process: subprocess.Popen[bytes], backend: Backend, folder: Path, port: int) -> None:
    deadline = time.monotonic() + _START_TIMEOUT
    while len(list(folder.glob("ready-*"))) < backend.workers or not _is_listening(port):
        log = (folder / "log.txt").read_text(encoding="utf-8", errors="replace")
        # Some servers start a worker that has failed again and again.
        if process.poll() is not None or time.monotonic() > deadline or "Traceback" in log:
            time.sleep(0.2)  # for the rest of the traceback
            raise StartError(
                f"doesn't start: {_error_in((folder / 'log.txt').read_text(errors='replace').splitlines())}"
            )
        time.sleep(0.05)


def _error_in(log: Sequence[str]) -> str:
    """Return the line of a log that says what is wrong."""
    errors = [line.strip() for line in log if line.partition(":")[0].strip().endswith(("Error", "Exception"))]
    return (errors or [line for line in log if line.strip()] or ["no reason in its log"])[-1]


def _is_listening(port: int) -> bool:
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False
