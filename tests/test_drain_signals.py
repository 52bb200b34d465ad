"""Signals that begin the drain of a session, and the handlers that are installed already."""

import asyncio
import os
import random
import signal
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest

from flux2max_async import Completed, ConfigurationError, FixedSchedule, FluxSession, SessionClosedError
from flux2max_async.emulator import Emulator

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Windows can't send signals to a single process")

SIGNAL = getattr(signal, "SIGUSR1", signal.SIGTERM)
LOOPS: list[Any] = [asyncio.SelectorEventLoop]
if sys.platform != "win32":
    import uvloop

    LOOPS.append(uvloop.new_event_loop)


@pytest.fixture(autouse=True)
def _restore_handlers() -> Iterator[None]:
    """Restore the handlers that a test has replaced."""
    handlers = {number: signal.getsignal(number) for number in (SIGNAL, signal.SIGINT, signal.SIGALRM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def make_session(*signals: signal.Signals, **options: Any) -> FluxSession:
    """Make a session that needs no service; without signals, it drains at SIGNAL."""
    return FluxSession("key", base_url="http://127.0.0.1:9", drain_signals=signals or (SIGNAL,), **options)


def is_draining(session: FluxSession) -> bool:
    assert session._supervisor is not None
    return session._supervisor.shutdown.draining


def run(work: Awaitable[Any], loop_factory: Callable[[], asyncio.AbstractEventLoop] | None = None) -> None:
    with asyncio.Runner(loop_factory=loop_factory) as runner:
        runner.run(work)  # type: ignore[arg-type]


@pytest.mark.parametrize("loop_factory", LOOPS)
@pytest.mark.parametrize("how", ["signal.signal", "loop.add_signal_handler"])
def test_the_drain_begins_before_the_server_stops(loop_factory: Any, how: str) -> None:
    """Requests that wait end, and then the server's own handler is called, once; closing restores it."""
    seen: list[bool] = []

    async def main() -> None:
        loop, called = asyncio.get_running_loop(), asyncio.Event()

        def handle(*_: object) -> None:
            seen.append(is_draining(session) if session._supervisor else False)
            loop.call_soon_threadsafe(called.set)

        if how == "signal.signal":
            signal.signal(SIGNAL, handle)
        else:
            loop.add_signal_handler(SIGNAL, handle)
        installed = signal.getsignal(SIGNAL)
        session = make_session(max_in_flight=1)
        async with session:
            assert session._supervisor is not None
            assert session._supervisor.slots.try_acquire()
            waiting = asyncio.ensure_future(session.generate("a cat"))
            while not session.stats.waiting:  # noqa: ASYNC110 - soon
                await asyncio.sleep(0)
            os.kill(os.getpid(), SIGNAL)
            with pytest.raises(SessionClosedError, match="the service is shutting down"):
                await asyncio.wait_for(waiting, 60)
            await asyncio.wait_for(called.wait(), 60)
        assert signal.getsignal(SIGNAL) is installed
        called.clear()
        os.kill(os.getpid(), SIGNAL)
        await asyncio.wait_for(called.wait(), 60)
        if how == "loop.add_signal_handler":
            loop.remove_signal_handler(SIGNAL)

    run(main(), loop_factory)

    assert seen == [True, False]


@pytest.mark.parametrize("loop_factory", LOOPS)
def test_interrupted_program(loop_factory: Any) -> None:
    """SIGINT drains, and ends a program as ever: its main task is cancelled, and KeyboardInterrupt raised."""
    seen: list[bool] = []

    async def main() -> None:
        async with make_session(signal.SIGINT) as session:
            os.kill(os.getpid(), signal.SIGINT)
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                seen.append(is_draining(session))
                raise

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a program in the background ignores it
    try:
        with pytest.raises(KeyboardInterrupt):
            run(main(), loop_factory)
    finally:
        signal.signal(signal.SIGINT, before)

    assert seen == [True]


def test_without_a_handler() -> None:
    """The first signal only drains; the next one has its default effect, which closing does not change."""

    async def main() -> None:
        async with make_session() as session:
            signal.raise_signal(SIGNAL)
            assert is_draining(session)
            assert signal.getsignal(SIGNAL) is signal.SIG_DFL
        assert signal.getsignal(SIGNAL) is signal.SIG_DFL

    signal.signal(SIGNAL, signal.SIG_DFL)
    run(main())


def test_an_ignored_signal() -> None:
    """A signal that is ignored goes on being ignored."""

    async def main() -> None:
        async with make_session() as session:
            signal.raise_signal(SIGNAL)
            assert not is_draining(session)
            assert signal.getsignal(SIGNAL) is signal.SIG_IGN

    signal.signal(SIGNAL, signal.SIG_IGN)
    run(main())


def test_no_signals() -> None:
    """Without drain_signals no handler is touched."""

    async def main() -> None:
        before = [signal.getsignal(number) for number in signal.valid_signals()]
        async with FluxSession("key"):
            assert [signal.getsignal(number) for number in signal.valid_signals()] == before

    run(main())


def test_outside_the_main_thread(caplog: pytest.LogCaptureFixture) -> None:
    """In another thread there is one warning and no handler; the session works, and can be drained by a call."""
    signal.signal(SIGNAL, signal.SIG_IGN)
    drained: list[bool] = []

    async def main() -> None:
        async with make_session(signal.SIGTERM, signal.SIGINT) as session:
            session.begin_drain()
            drained.append(is_draining(session))

    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    thread = threading.Thread(target=run, args=(main(),))
    thread.start()
    thread.join()

    assert drained == [True]
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before
    assert [record.levelname for record in caplog.records if "drain_signals has no effect" in record.message] == [
        "WARNING"
    ]


def test_closed_in_another_thread() -> None:
    """A session whose event loop goes on in another thread is closed; its handler stays, and calls the server's."""
    calls: list[int] = []
    signal.signal(SIGNAL, lambda *_: calls.append(1))
    loop = asyncio.new_event_loop()
    session = make_session()
    loop.run_until_complete(session.__aenter__())
    thread = threading.Thread(target=loop.run_until_complete, args=(session.aclose(),))
    thread.start()
    thread.join()
    loop.close()
    signal.raise_signal(SIGNAL)

    assert session._supervisor is None
    assert calls == [1]


@pytest.mark.parametrize("order", [(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)])
def test_several_sessions(order: tuple[int, ...]) -> None:
    """In whichever order sessions are closed: each signal drains those that are open and reaches the server once."""
    calls: list[int] = []

    def handle(*_: object) -> None:
        calls.append(1)

    async def main() -> None:
        for closed in range(4):
            sessions = [make_session() for _ in range(3)]
            for session in sessions:
                await session.__aenter__()
            for number in order[:closed]:
                await sessions[number].aclose()
            calls.clear()
            signal.raise_signal(SIGNAL)
            assert calls == [1]
            assert all(is_draining(sessions[number]) for number in order[closed:])
            for number in order[closed:]:
                await sessions[number].aclose()
            assert signal.getsignal(SIGNAL) is handle

    signal.signal(SIGNAL, handle)
    run(main())


def test_a_handler_that_is_installed_later() -> None:
    """A handler that replaces the session's own stays at close; if it calls that one, the session drains."""
    seen: list[bool] = []

    async def main(*, calls: bool) -> None:
        async with make_session() as session:
            previous: Any = signal.getsignal(SIGNAL)

            def handle(*arguments: Any) -> None:
                if calls:
                    previous(*arguments)
                seen.append(is_draining(session))

            signal.signal(SIGNAL, handle)
            signal.raise_signal(SIGNAL)
        assert signal.getsignal(SIGNAL) is handle

    for calls in (False, True):
        signal.signal(SIGNAL, lambda *_: None)
        run(main(calls=calls))

    assert seen == [False, True]


@pytest.mark.parametrize("forgets", ["by entering it again", "by closing it"])
def test_an_event_loop_that_has_ended(forgets: str) -> None:
    """A session that its event loop has left open restores the handler when it is closed or entered again."""

    def handle(*_: object) -> None:
        raise AssertionError

    async def leave_open() -> None:
        await session.__aenter__()
        await session._parts.transport.close()

    async def enter_again() -> None:
        if forgets == "by closing it":
            await session.aclose()
            assert signal.getsignal(SIGNAL) is handle
        async with session:
            assert signal.getsignal(SIGNAL) is not handle
        assert signal.getsignal(SIGNAL) is handle

    signal.signal(SIGNAL, handle)
    session = make_session()
    run(leave_open())
    run(enter_again())


@pytest.mark.parametrize(
    "value",
    [
        signal.SIGTERM,
        "SIGTERM",
        ["SIGTERM"],
        [15],
        None,
        [None],
        (signal.SIGTERM, "SIGINT"),
        *([[signal.SIGKILL], (signal.SIGINT, signal.SIGSTOP)] if sys.platform != "win32" else []),
    ],
)
def test_wrong_values(value: Any) -> None:
    """What is not a collection of signals that can be handled is refused, by name."""
    with pytest.raises(ConfigurationError, match=r"^drain_signals must be"):
        FluxSession("key", drain_signals=value)


def test_a_signal_that_is_named_twice() -> None:
    """A signal that is named twice has one handler."""

    async def main() -> None:
        async with make_session(SIGNAL, SIGNAL):
            pass
        assert signal.getsignal(SIGNAL) is signal.SIG_IGN

    signal.signal(SIGNAL, signal.SIG_IGN)
    run(main())
    assert make_session(SIGNAL, SIGNAL)._parts.config.drain_signals == (SIGNAL,)


@pytest.mark.parametrize("loop_factory", LOOPS)
def test_at_any_moment(loop_factory: Any) -> None:
    """Whenever the signal arrives: what was submitted is delivered, the rest refused, and nothing hangs."""

    async def main() -> None:
        async with Emulator(seconds=0.01, spread=0.5, pictures=False, max_in_flight=1000) as gateway:
            for _ in range(20):
                gateway.accepted.clear()
                session = FluxSession(
                    gateway.api_key,
                    base_url=gateway.url,
                    max_in_flight=4,
                    schedule=FixedSchedule(0.01),
                    max_polls_per_second=None,
                    drain_signals=(signal.SIGALRM,),
                )
                async with session:
                    signal.setitimer(signal.ITIMER_REAL, random.uniform(0.0001, 0.05))
                    calls = [session.generate(f"picture {number}") for number in range(30)]
                    results = await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), 60)
                    signal.setitimer(signal.ITIMER_REAL, 0)
                    await session.aclose(drain=0.0)
                ends = [
                    result.request.prompt if isinstance(result, Completed) and result.request else str(result)
                    for result in results
                ]
                delivered = sorted(end for end in ends if end.startswith("picture"))
                assert delivered == sorted(gateway.accepted)
                assert set(ends) - set(delivered) <= {"the service is shutting down"}

    signal.signal(signal.SIGALRM, lambda *_: None)
    run(main(), loop_factory)
