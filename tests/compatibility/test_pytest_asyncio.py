"""The library and its fixture under pytest-asyncio, which runs fixtures in separate asyncio tasks."""

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from flux2max_async import FixedSchedule, FluxSession
from flux2max_async.emulator import Emulator


@pytest_asyncio.fixture
async def flux(flux_emulator: Emulator) -> AsyncIterator[FluxSession]:
    """Provide a session that is entered in one asyncio task and closed in another."""
    async with FluxSession(flux_emulator.api_key, base_url=flux_emulator.url, schedule=FixedSchedule(0.05)) as session:
        yield session


@pytest.mark.asyncio
async def test_generate(flux: FluxSession, flux_emulator: Emulator) -> None:
    """generate() works with a session from a fixture."""
    outcome = await flux.generate("a cat")

    assert outcome.ok
    assert flux_emulator.accepted["a cat"] == 1


@pytest.mark.asyncio
async def test_stream(flux: FluxSession) -> None:
    """A stream works with a session from a fixture."""
    outcomes = [outcome async for outcome in flux.stream(f"cat {n}" for n in range(30))]

    assert len(outcomes) == 30
    assert all(outcome.ok for outcome in outcomes)
