"""An event loop with virtual time: whenever nothing is ready, its clock jumps to the next timer.

Hours of sleep take milliseconds. A real server on 127.0.0.1 in the same loop works, because bytes that are written to
the loopback interface are readable immediately. While a worker thread runs for the loop, the clock stops. A test that
waits for something that never happens fails instead of hanging.
"""

import asyncio
import concurrent.futures
import contextlib
import selectors
import threading
from collections.abc import Callable, Generator
from typing import Any

import anyio.to_thread

from flux2max_async import JournalEntry, SqliteJournal
from flux2max_async.journal._store_journal import StoreJournal

_LONG_JUMP = 1.0
"""Virtual seconds. A longer jump may be to a timeout."""
_SETTLE_TIME = 0.002
"""Real seconds that the loopback interface gets before a long jump, so that no timeout expires too early."""
_STUCK_TIMEOUT = 20.0
"""Real seconds."""
_MAX_TIME = 30 * 86_400.0
"""Virtual seconds."""


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """A selector event loop whose clock is moved by its selector."""

    def __init__(self) -> None:
        self._clock = _JumpingSelector(self._has_running_threads)
        self._pauses = 0
        super().__init__(self._clock)

    def time(self) -> float:
        """Return the virtual time, which starts at 1000 s so that nothing can rely on a clock that starts at 0."""
        return self._clock.now

    def hold_up(self, seconds: float) -> None:
        """Advance the clock while nothing runs, as if the loop were blocked or its process stopped."""
        self._clock.now += seconds

    def run_in_executor(  # type: ignore[override]
        self, executor: concurrent.futures.Executor | None, func: Callable[..., Any], *args: Any
    ) -> "asyncio.Future[Any]":
        """Run a function in a thread with the clock stopped. asyncio resolves host names with this method."""
        self._pauses += 1
        future: asyncio.Future[Any] = super().run_in_executor(executor, func, *args)
        future.add_done_callback(self._resume)
        return future

    async def shutdown_default_executor(self, timeout: float | None = None) -> None:  # noqa: ASYNC109 - asyncio's signature
        """Wait for the threads with the clock stopped, or the timeout would expire at once."""
        with self.pause_clock():
            # Before Python 3.12 there is no timeout.
            arguments = () if timeout is None else (timeout,)
            await super().shutdown_default_executor(*arguments)

    @contextlib.contextmanager
    def pause_clock(self) -> Generator[None]:
        """Return a context in which the clock is stopped, to wait for something that happens in real time."""
        self._pauses += 1
        try:
            yield
        finally:
            self._pauses -= 1

    def _resume(self, _: object) -> None:
        self._pauses -= 1

    def _has_running_threads(self) -> bool:
        return self._pauses > 0 or anyio.to_thread.current_default_thread_limiter().borrowed_tokens > 0


class _JumpingSelector(selectors.DefaultSelector):
    def __init__(self, has_running_threads: Callable[[], bool]) -> None:
        super().__init__()
        self.now = 1000.0
        self._has_running_threads = has_running_threads

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(0)
        if ready or timeout == 0:
            return ready
        if self._has_running_threads():
            ready = super().select(_STUCK_TIMEOUT)
            if not ready:
                raise AssertionError(f"a thread has been running for {_STUCK_TIMEOUT:g} s: {threading.enumerate()}")
            return ready
        if timeout is None:
            ready = super().select(_STUCK_TIMEOUT)
            if not ready:
                raise AssertionError(f"the test waits for something that never happens (waited {_STUCK_TIMEOUT:g} s)")
            return ready
        if timeout >= _LONG_JUMP and (ready := super().select(_SETTLE_TIME)):
            return ready
        self.now += max(timeout, 0.0)
        if self.now > _MAX_TIME:
            raise AssertionError("the test has run for more than 30 days of virtual time")
        return []


def hold_up(seconds: float) -> None:
    """Let virtual time pass in which nothing runs."""
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualTimeLoop)
    loop.hold_up(seconds)


def pause_clock() -> contextlib.AbstractContextManager[None]:
    """Return a context in which the clock of the running loop is stopped, if it is a virtual one."""
    loop = asyncio.get_running_loop()
    return loop.pause_clock() if isinstance(loop, VirtualTimeLoop) else contextlib.nullcontext()


class PausesClock(StoreJournal):
    """Lets a journal stop the virtual clock while its thread works."""

    async def open(
        self,
        on_external_change: Callable[[list[JournalEntry]], None] = lambda _: None,
        /,
        *,
        watch_changes: bool = False,
    ) -> None:
        with pause_clock():
            await super().open(on_external_change, watch_changes=watch_changes)

    async def close(self) -> None:
        with pause_clock():
            await super().close()

    async def _run(self, function: Any, **options: Any) -> Any:
        with pause_clock():
            return await super()._run(function, **options)


class VirtualJournal(PausesClock, SqliteJournal):
    """A journal in an SQLite file that stops the virtual clock while its thread works."""
