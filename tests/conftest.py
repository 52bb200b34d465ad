"""What the tests share: virtual time, an emulated gateway, and a gateway that does as it is told."""

import contextlib
import logging
import os
import resource
import signal
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import attrs
import pytest
from anyio.from_thread import start_blocking_portal
from support.commands import ENVIRONMENT, KEY, Command, Run
from support.scripted import ScriptedGateway
from support.virtual_time import VirtualTimeLoop
from support.webhooks import InboxServer, door

from flux2max_async import FixedSchedule, FluxSession
from flux2max_async.cli import main
from flux2max_async.emulator import Emulator


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, Any]]:
    """Every asynchronous test runs on virtual time, unless it says otherwise."""
    return "asyncio", {"loop_factory": VirtualTimeLoop}


@pytest.fixture(autouse=True)
def _log_everything(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "flux2max_async")


@pytest.fixture
async def gateway() -> AsyncIterator[Emulator]:
    """An emulated gateway whose tasks take exactly 8 s."""
    async with Emulator(seconds=8.0, spread=0.0, seed=1, pictures=False) as emulator:
        yield emulator


@pytest.fixture
async def session(gateway: Emulator) -> AsyncIterator[FluxSession]:
    """A session on that gateway, which polls every second."""
    async with FluxSession(gateway.api_key, base_url=gateway.url, schedule=FixedSchedule(1.0)) as flux:
        yield flux


@pytest.fixture
async def scripted() -> AsyncIterator[ScriptedGateway]:
    """A gateway that answers each call as its script says, byte by byte."""
    async with ScriptedGateway() as script:
        yield script


@pytest.fixture
async def at() -> AsyncIterator[InboxServer]:
    """A server on 127.0.0.1 with an inbox."""
    async with door() as it:
        yield it


# ---------------------------------------------------------------------- the command line


@pytest.fixture
def empty_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Works in an empty folder, in an environment that sets nothing."""
    for name in ("FLUX2MAX_API_KEY", "FLUX2MAX_BASE_URL", "NO_COLOR", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Emulator]]:
    """Starts an emulated service and puts it into the environment."""
    with contextlib.ExitStack() as stack:

        def start(**options: Any) -> Emulator:
            emulator = stack.enter_context(Emulator(**{"seconds": 0.1, "spread": 0.0, "api_key": KEY, **options}))
            monkeypatch.setenv("FLUX2MAX_API_KEY", KEY)
            monkeypatch.setenv("FLUX2MAX_BASE_URL", emulator.url)
            return emulator

        yield start


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Iterator[ScriptedGateway]:
    """A service that answers as it is told, in the environment."""
    with start_blocking_portal() as portal, portal.wrap_async_context_manager(ScriptedGateway()) as gateway:
        monkeypatch.setenv("FLUX2MAX_API_KEY", gateway.api_key)
        monkeypatch.setenv("FLUX2MAX_BASE_URL", gateway.url)
        yield gateway


@pytest.fixture
def flux2max(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs the command with its output going to pipes."""

    def run(*arguments: str) -> Run:
        monkeypatch.setattr(sys, "argv", ["flux2max", *arguments])
        with pytest.raises(SystemExit) as exited:
            main()
        code = exited.value.code
        assert code is None or isinstance(code, int)
        return Run(code, *capsys.readouterr())

    return run


@pytest.fixture
def on_terminal(monkeypatch: pytest.MonkeyPatch, flux2max: Command) -> Command:
    """Runs the command with both its outputs on a terminal of 80 columns."""
    pty = pytest.importorskip("pty", reason="there are no pseudo terminals here")

    def run(*arguments: str) -> Run:
        master, slave = pty.openpty()
        shown: list[bytes] = []

        def watch() -> None:
            with contextlib.suppress(OSError):  # how a terminal says that nobody writes to it any more
                while data := os.read(master, 65_536):
                    shown.append(data)

        watcher = threading.Thread(target=watch)
        watcher.start()
        with os.fdopen(slave, "w", encoding="utf-8") as screen, monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", screen)
            patch.setattr(sys, "stderr", screen)
            done = flux2max(*arguments)
        watcher.join()
        os.close(master)
        return attrs.evolve(done, out=b"".join(shown).decode())

    return run


@pytest.fixture
def small_disk() -> Iterator[None]:
    """A machine that can't write files of more than a megabyte."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    signal.signal(signal.SIGXFSZ, handler)
