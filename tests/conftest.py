"""What the tests share: virtual time, an emulated gateway, and a gateway that does as it is told."""

import logging
from collections.abc import AsyncIterator
from typing import Any

import pytest
from _hooked import Door, door
from _scripted import ScriptedGateway
from _virtual import VirtualTimeLoop

from flux2max_async import FixedSchedule, FluxSession
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
async def at() -> AsyncIterator[Door]:
    """A server on 127.0.0.1 with an inbox."""
    async with door() as it:
        yield it
