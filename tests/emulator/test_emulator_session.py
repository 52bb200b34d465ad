"""`Emulator.session()`: sessions for tests of application code, and the type of their options."""

import asyncio
import inspect
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from support.virtual_time import VirtualJournal

from flux2max_async import FixedSchedule, FluxSession, LearnedSchedule, SessionOptions
from flux2max_async.emulator import Emulator


async def test_a_session_has_the_key_and_the_address(gateway: Emulator) -> None:
    """A session of an emulator generates there, and notices the end of a task of 8 s within a twentieth of a second."""
    loop = asyncio.get_running_loop()
    async with gateway.session() as session:
        before = loop.time()
        outcome = await session.generate("a cat")
        seconds = loop.time() - before

    assert outcome.ok
    assert 8.0 <= seconds < 8.05
    assert gateway.accepted == {"a cat": 1}


async def test_many_tasks_are_polled_as_quickly() -> None:
    """No limit on polls delays the ends of 24 tasks at once."""
    async with Emulator(seconds=1.0, spread=0.0, seed=1, pictures=False) as gateway, gateway.session() as session:
        outcomes = await asyncio.gather(*(session.generate(f"cat {number}") for number in range(24)))

    assert max(outcome.elapsed for outcome in outcomes) < 1.1


async def test_options_are_those_of_the_session(gateway: Emulator, tmp_path: Path) -> None:
    """Every parameter of FluxSession can be given, also another key, address or schedule."""
    schedule, journal = LearnedSchedule(), VirtualJournal(tmp_path / "run.db")
    async with gateway.session(schedule=schedule, journal=journal, max_in_flight=2) as session:
        await session.generate("a cat")
    other = gateway.session(api_key="other", base_url="http://127.0.0.1:9")

    assert session.schedule is schedule
    assert (tmp_path / "run.db").exists()
    assert isinstance(other.schedule, FixedSchedule)
    assert gateway.accepted == {"a cat": 1}


def test_an_emulator_that_is_not_running_has_no_sessions() -> None:
    """Its address is known when it runs: before, a session is an error that says so."""
    with pytest.raises(RuntimeError, match="not running"):
        Emulator().session()


def test_a_session_of_an_emulator_in_a_thread() -> None:
    """In synchronous code, the session runs in an event loop of the caller's."""

    async def main(emulator: Emulator) -> bool:
        async with emulator.session() as session:
            return (await session.generate("a cat")).ok

    with Emulator(seconds=0.05, pictures=False) as emulator:
        assert asyncio.run(main(emulator))


def test_the_options_are_the_parameters() -> None:
    """SessionOptions has every parameter of FluxSession with its type; none is required."""
    parameters = get_type_hints(FluxSession.__init__)
    del parameters["return"]
    names: list[Any] = list(inspect.signature(FluxSession).parameters)

    assert get_type_hints(SessionOptions) == parameters
    assert sorted(SessionOptions.__annotations__) == sorted(names)
    assert SessionOptions.__required_keys__ == frozenset()
