"""Fixtures that the tests share: virtual time, an emulated gateway, and a scripted gateway."""

import contextlib
import itertools
import logging
import os
import resource
import signal
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import attrs
import pytest
from anyio.from_thread import start_blocking_portal
from support.commands import ENVIRONMENT, KEY, Command, Run
from support.journals import use_server
from support.limits import Backend, Limit, PostgresBackend, SqliteBackend
from support.postgres import PostgresServer
from support.scripted import ScriptedGateway
from support.virtual_time import VirtualTimeLoop
from support.webhooks import InboxServer, running_inbox_server

from flux2max_async import FixedSchedule, FluxSession
from flux2max_async.cli import main
from flux2max_async.emulator import Emulator


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options that run tests against another database, or longer."""
    parser.addoption("--backend", choices=["sqlite", "postgres"], default="sqlite")
    parser.addoption("--interrupts", type=int, default=12, help="at how many moments batches are interrupted")


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    """Provide a running PostgreSQL server, one for all tests of a process."""
    with PostgresServer() as server:
        yield server


ABOUT_FILES = (
    "test_damaged_rows.py", "test_durability.py", "test_leases.py", "test_prune.py", "test_read_ahead.py",
    "test_reader.py", "test_serialization.py", "test_sqlite.py", "test_transitions.py", "test_wake_up.py",
)  # fmt: skip
"""Tests of journals that are about SQLite files, or need no database at all."""


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave out what another database has nothing to do with."""
    is_left_out = (
        config.getoption("--backend") == "postgres"
        and collection_path.parent.name == "journal"
        and collection_path.name in ABOUT_FILES
    )
    return is_left_out or None


@pytest.fixture(autouse=True)
def _journal_backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the tests of journals against the server that was asked for."""
    if request.config.getoption("--backend") == "postgres" and request.path.parent.name == "journal":
        use_server(request.getfixturevalue("postgres"))
        # Owners that have no lock are dead at once, and not only when the server has been up for some seconds.
        monkeypatch.setattr("flux2max_async.journal._postgres_connection._GRACE", 0.0)


_schema_numbers = itertools.count()


@pytest.fixture
def schema() -> str:
    """Provide the name of a schema that no other test of this process uses."""
    return f"flux2max_{next(_schema_numbers)}"


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, Any]]:
    """Run every asynchronous test in virtual time by default."""
    return "asyncio", {"loop_factory": VirtualTimeLoop}


@pytest.fixture(autouse=True)
def _log_everything(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "flux2max_async")


@pytest.fixture
async def gateway() -> AsyncIterator[Emulator]:
    """Provide an emulated gateway whose tasks take exactly 8 s."""
    async with Emulator(seconds=8.0, spread=0.0, seed=1, pictures=False) as emulator:
        yield emulator


@pytest.fixture
async def session(gateway: Emulator) -> AsyncIterator[FluxSession]:
    """Provide a session on that gateway that polls every second."""
    async with FluxSession(gateway.api_key, base_url=gateway.url, schedule=FixedSchedule(1.0)) as flux:
        yield flux


@pytest.fixture
async def scripted() -> AsyncIterator[ScriptedGateway]:
    """Provide a gateway whose responses are scripted byte by byte."""
    async with ScriptedGateway() as gateway:
        yield gateway


@pytest.fixture
async def inbox_server() -> AsyncIterator[InboxServer]:
    """Provide a server with an inbox on 127.0.0.1."""
    async with running_inbox_server() as server:
        yield server


# ---------------------------------------------------------------------- limits


@pytest.fixture
def new_backend(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[str], Backend]:
    """Provide a function that returns a place that nobody uses yet, by a name for it."""
    if request.config.getoption("backend") == "sqlite":
        return lambda name: SqliteBackend(tmp_path / f"{name}.db")
    server, schema = request.getfixturevalue("postgres"), request.getfixturevalue("schema")
    return lambda name: PostgresBackend(server.conninfo(), f"{schema}_{name}")


@pytest.fixture
def backend(new_backend: Callable[[str], Backend]) -> Backend:
    """Provide a place where nobody counts yet."""
    return new_backend("limit")


@pytest.fixture
async def open_limit(backend: Backend) -> AsyncIterator[Callable[..., Awaitable[Limit]]]:
    """Provide a function that opens a limit, which is closed at the end."""
    async with contextlib.AsyncExitStack() as stack:

        async def open_one(slots: int = 1) -> Limit:
            opened = backend.limit(slots)
            await opened.open()
            stack.push_async_callback(opened.close)
            return opened

        yield open_one


# ---------------------------------------------------------------------- the command line


@pytest.fixture
def empty_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Change to an empty folder, in an environment without any of our variables."""
    for name in ("FLUX2MAX_API_KEY", "FLUX2MAX_BASE_URL", "NO_COLOR", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Emulator]]:
    """Provide a function that starts an emulated service and sets the environment to use it."""
    with contextlib.ExitStack() as stack:

        def start(**options: Any) -> Emulator:
            emulator = stack.enter_context(Emulator(**{"seconds": 0.1, "spread": 0.0, "api_key": KEY, **options}))
            monkeypatch.setenv("FLUX2MAX_API_KEY", KEY)
            monkeypatch.setenv("FLUX2MAX_BASE_URL", emulator.url)
            return emulator

        yield start


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Iterator[ScriptedGateway]:
    """Provide a scripted gateway and set the environment to use it."""
    with start_blocking_portal() as portal, portal.wrap_async_context_manager(ScriptedGateway()) as gateway:
        monkeypatch.setenv("FLUX2MAX_API_KEY", gateway.api_key)
        monkeypatch.setenv("FLUX2MAX_BASE_URL", gateway.url)
        yield gateway


@pytest.fixture
def flux2max(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Provide a function that runs the command with its output captured."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}

    def run(*arguments: str) -> Run:
        monkeypatch.setattr(sys, "argv", ["flux2max", *arguments])
        with pytest.raises(SystemExit) as exited:
            main()
        for number, handler in handlers.items():  # the command leaves its own ones, since its process ends
            signal.signal(number, handler)
        code = exited.value.code
        assert code is None or isinstance(code, int)
        return Run(code, *capsys.readouterr())

    return run


@pytest.fixture
def on_terminal(monkeypatch: pytest.MonkeyPatch, flux2max: Command) -> Command:
    """Provide a function that runs the command with stdout and stderr on a terminal of 80 columns."""
    pty = pytest.importorskip("pty", reason="this platform has no pseudo terminals")

    def run(*arguments: str) -> Run:
        master, slave = pty.openpty()
        chunks: list[bytes] = []

        def read() -> None:
            with contextlib.suppress(OSError):  # Linux reports the end of the terminal's output as EIO
                while data := os.read(master, 65_536):
                    chunks.append(data)

        reader = threading.Thread(target=read)
        reader.start()
        with os.fdopen(slave, "w", encoding="utf-8") as terminal, monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", terminal)
            patch.setattr(sys, "stderr", terminal)
            result = flux2max(*arguments)
        reader.join()
        os.close(master)
        return attrs.evolve(result, out=b"".join(chunks).decode())

    return run


@pytest.fixture
def small_disk() -> Iterator[None]:
    """Limit files that this process writes to one megabyte."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    signal.signal(signal.SIGXFSZ, handler)
