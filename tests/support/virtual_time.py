"""An event loop on virtual time: whenever nothing is ready, its clock jumps to the next timer.

Hours of sleep take milliseconds, and a real server on 127.0.0.1 in the same loop keeps working, since bytes written to
the loopback are there at once. While a thread works for the loop, the clock stands still. A test that waits for
nothing fails with a message instead of hanging.
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

_LONG_JUMP = 1.0
_SETTLE = 0.002
"""Real seconds that the loopback gets before a long jump, which may be a timeout that would fire wrongly."""
_STUCK = 20.0
_END_OF_TIME = 30 * 86_400.0


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """A selector event loop whose clock is moved by its selector."""

    def __init__(self) -> None:
        self._selector_of_time = _JumpingSelector(self._threads_at_work)
        self._lookups = 0
        super().__init__(self._selector_of_time)

    def time(self) -> float:
        """Give the virtual time, which starts at 1000 s so that nothing relies on a clock that starts at 0."""
        return self._selector_of_time.now

    def run_in_executor(  # type: ignore[override]
        self, executor: concurrent.futures.Executor | None, func: Callable[..., Any], *args: Any
    ) -> "asyncio.Future[Any]":
        """Run something in a thread, and let time stand still meanwhile; host names are looked up like this."""
        self._lookups += 1
        future: asyncio.Future[Any] = super().run_in_executor(executor, func, *args)
        future.add_done_callback(self._looked_up)
        return future

    async def shutdown_default_executor(self, timeout: float | None = None) -> None:  # noqa: ASYNC109 - as asyncio has it
        """Wait for the threads in real time: the limit for that would pass in no time."""
        with self.standing_still():
            # Before Python 3.12 there is no limit.
            limit = () if timeout is None else (timeout,)
            await super().shutdown_default_executor(*limit)

    @contextlib.contextmanager
    def standing_still(self) -> Generator[None]:
        """Let time stand still while something is waited for that goes on in real time."""
        self._lookups += 1
        try:
            yield
        finally:
            self._lookups -= 1

    def _looked_up(self, _: object) -> None:
        self._lookups -= 1

    def _threads_at_work(self) -> bool:
        return self._lookups > 0 or anyio.to_thread.current_default_thread_limiter().borrowed_tokens > 0


class _JumpingSelector(selectors.DefaultSelector):
    def __init__(self, at_work: Callable[[], bool]) -> None:
        super().__init__()
        self.now = 1000.0
        self._at_work = at_work

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(0)
        if ready or timeout == 0:
            return ready
        if self._at_work():
            ready = super().select(_STUCK)
            if not ready:
                raise AssertionError(f"a thread has been at work for {_STUCK:g} s: {threading.enumerate()}")
            return ready
        if timeout is None:
            ready = super().select(_STUCK)
            if not ready:
                raise AssertionError(f"the test waits for something that never comes (waited for {_STUCK:g} real s)")
            return ready
        if timeout >= _LONG_JUMP and (ready := super().select(_SETTLE)):
            return ready
        self.now += max(timeout, 0.0)
        if self.now > _END_OF_TIME:
            raise AssertionError("the test goes on for more than 30 days of virtual time")
        return []


def _standing_still() -> contextlib.AbstractContextManager[None]:
    loop = asyncio.get_running_loop()
    return loop.standing_still() if isinstance(loop, VirtualTimeLoop) else contextlib.nullcontext()


class VirtualJournal(SqliteJournal):
    """A journal whose thread virtual time waits for."""

    async def open(
        self, news: Callable[[list[JournalEntry]], None] = lambda _: None, /, *, listening: bool = False
    ) -> None:
        with _standing_still():
            await super().open(news, listening=listening)

    async def close(self) -> None:
        with _standing_still():
            await super().close()

    async def _ask(self, work: Any, **how: bool) -> Any:
        with _standing_still():
            return await super()._ask(work, **how)
