"""Starting a session without `async with`, and using one that was never started."""

import asyncio
import threading
from collections.abc import Awaitable, Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from flux2max_async import ConfigurationError, FluxError, FluxSession, GeneratedImage, JournalError, SessionClosedError
from flux2max_async.emulator import Emulator
from flux2max_async.journal import SqliteJournal

IMAGE = GeneratedImage(url="https://example.com/x", type="image", task_id="t1")


async def synchronous(function: Callable[..., Any], *arguments: Any) -> Any:
    return function(*arguments)


METHODS: dict[str, Callable[[FluxSession], Awaitable[Any]]] = {
    "generate": lambda session: session.generate("a cat"),
    "submit": lambda session: session.submit("a cat"),
    "enqueue": lambda session: synchronous(session.enqueue, "a cat"),
    "stream": lambda session: synchronous(session.stream, ["a cat"]),
    "attach": lambda session: synchronous(session.attach, "t1"),
    "fetch": lambda session: session.fetch("t1"),
    "save": lambda session: session.save(IMAGE, "x.jpeg"),
    "read": lambda session: session.read(IMAGE),
    "download": lambda session: synchronous(session.download, IMAGE),
}


async def test_a_session_is_started_and_closed(gateway: Emulator) -> None:
    """`start()` returns the session, which works until `aclose()`; then it can be started once more."""
    session = await FluxSession(gateway.api_key, base_url=gateway.url).start()
    first = await session.generate("a cat")
    await session.aclose()
    with pytest.raises(SessionClosedError, match="the session is closed"):
        await session.generate("a dog")
    again = await session.start()
    second = await session.generate("a fox")
    await session.aclose()
    await session.aclose()

    assert again is session
    assert first.ok
    assert second.ok


async def test_a_session_is_started_twice(gateway: Emulator) -> None:
    """Starting an open session is an error, also while another call opens it; the session goes on."""
    session = FluxSession(gateway.api_key, base_url=gateway.url, journal=None)
    await session.start()
    with pytest.raises(SessionClosedError, match="open already"):
        await session.start()
    with pytest.raises(SessionClosedError, match="open already"):
        async with session:
            pass
    assert (await session.generate("a cat")).ok
    await session.aclose()


@pytest.mark.parametrize("anyio_backend", ["asyncio"])  # real time, in which a journal's thread runs
async def test_a_session_is_started_by_two_at_once(gateway: Emulator, tmp_path: Path) -> None:
    """The second call is an error, and does no harm to the first."""
    session = FluxSession(gateway.api_key, base_url=gateway.url, journal=SqliteJournal(tmp_path / "run.db"))
    first, second = await asyncio.gather(session.start(), session.start(), return_exceptions=True)
    ok = session.health().ok
    await session.aclose()

    assert first is session
    assert isinstance(second, SessionClosedError)
    assert "open already" in str(second)
    assert ok


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_session_that_cannot_be_started(gateway: Emulator, tmp_path: Path) -> None:
    """After an error of its journal, a session has still not been started, and can be."""
    path = tmp_path / "run.db"
    path.write_bytes(b"no journal")
    session = FluxSession(gateway.api_key, base_url=gateway.url, journal=SqliteJournal(path))
    with pytest.raises(JournalError):
        await session.start()
    with pytest.raises(SessionClosedError, match="has not been started"):
        await session.fetch("t1")
    path.unlink()
    await session.start()
    await session.aclose()


@pytest.mark.parametrize("method", METHODS)
async def test_a_session_that_was_never_started(method: str) -> None:
    """Every method says that the session has not been started, and how that is done."""
    session = FluxSession("key", base_url="http://127.0.0.1:9")
    with pytest.raises(
        SessionClosedError, match=r"has not been started: use `async with`, or `await session.start\(\)`"
    ):
        await METHODS[method](session)


async def test_closing_a_session_that_was_never_started() -> None:
    """It does nothing, and the session can be looked at."""
    session = FluxSession("key", base_url="http://127.0.0.1:9")
    await session.aclose()
    session.begin_drain()

    assert session.stats.submitted == 0
    assert session.health().state == "closed"


@pytest.mark.parametrize("enter", [FluxSession.start, FluxSession.__aenter__])
def test_a_session_is_started_in_another_event_loop(enter: Callable[[FluxSession], Awaitable[FluxSession]]) -> None:
    """Starting an open session again in the event loop of another thread is an error that names both event loops."""
    errors: list[FluxError] = []

    async def main() -> FluxSession:
        return await enter(session)

    def in_thread() -> None:
        try:
            asyncio.run(main())
        except FluxError as error:
            errors.append(error)

    with Emulator(seconds=0.1, pictures=False) as emulator, closing(asyncio.new_event_loop()) as loop:
        session = FluxSession(emulator.api_key, base_url=emulator.url)
        loop.run_until_complete(main())
        thread = threading.Thread(target=in_thread)
        thread.start()
        thread.join()
        still_works = loop.run_until_complete(session.generate("a cat")).ok
        loop.run_until_complete(session.aclose())

    assert [type(error) for error in errors] == [ConfigurationError]
    assert "opened in the event loop" in str(errors[0])
    assert still_works
