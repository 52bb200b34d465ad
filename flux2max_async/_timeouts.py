"""Time limits that give up nothing that has already come.

If the event loop was blocked, or the process stopped, timers are late, and what came in the meantime has not been read.
Some event loops run late timers before they read. So at the end of a time limit the loop first runs several times more,
which takes no time if it has nothing to do; an answer that is there then counts. Besides, a limit may have a grace
period, which begins when its timer is late: for what could not be done meanwhile, and can't be repeated.
"""

import asyncio
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection
from types import TracebackType
from typing import Any

import attrs

GRACE_PERIOD = 5.0
"""Seconds for an answer from another machine."""
MAX_LATENESS = 0.1
"""Seconds by which a timer may be late before the grace period begins."""
_ROUNDS = 20
"""Iterations of the event loop. Each reads up to 256 KiB of each connection, and passes a result on by one task."""


@attrs.define(eq=False)
class _Limit(ABC):
    """A time limit.

    States: running (`start()`), reading, over. If its timer is late, a limit with a grace period runs once more.
    `cancel()` stops it in any state.
    """

    _grace: float = attrs.field(default=0.0, kw_only=True, alias="grace")
    """Seconds."""
    is_due: bool = attrs.field(default=False, init=False)
    """Whether the time has come, and nothing but what is there already may still be done."""
    _loop: asyncio.AbstractEventLoop = attrs.field(factory=asyncio.get_running_loop, init=False)
    _handle: asyncio.Handle | None = attrs.field(default=None, init=False)

    def cancel(self) -> None:
        """Stop it."""
        if self._handle is not None:
            self._handle.cancel()

    def _start(self, at: float) -> None:
        self._handle = self._loop.call_at(at, self._on_time, at)

    def _on_time(self, at: float) -> None:
        now = self._loop.time()
        if self._grace and now > at + MAX_LATENESS:
            grace, self._grace = self._grace, 0.0
            self._start(now + grace)
        else:
            self.is_due = True
            self._read(_ROUNDS)

    def _read(self, rounds: int) -> None:
        if rounds:
            self._handle = self._loop.call_soon(self._read, rounds - 1)
        else:
            self._end()

    @abstractmethod
    def _end(self) -> None:
        """Do what is due at the end of the limit."""


@attrs.define(eq=False)
class Timer(_Limit):
    """Calls a function at the end of a time limit.

    Args:
        seconds: The limit, which begins now.
        callback: The function.
        grace: If its timer is late, the limit is so many seconds longer.
    """

    _seconds: float
    _callback: Callable[[], object]

    def __attrs_post_init__(self) -> None:
        self._start(self._loop.time() + self._seconds)

    def _end(self) -> None:
        self._callback()


@attrs.define(eq=False)
class Timeout(_Limit):
    """A context that raises TimeoutError if it takes longer than its limit, like `asyncio.timeout()`.

    Args:
        seconds: The limit; infinite for none.
        grace: If its timer is late, the limit is so many seconds longer.
    """

    seconds: float
    is_over: bool = attrs.field(default=False, init=False)
    """Whether what runs in the context has been cancelled."""
    _task: "asyncio.Task[Any]" = attrs.field(init=False)
    _cancelling: int = attrs.field(init=False)

    def __enter__(self) -> None:
        task = asyncio.current_task()
        assert task is not None, "asyncio runs coroutines in tasks only"
        self._task, self._cancelling = task, task.cancelling()
        self._begin()

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.cancel()
        # If somebody else has cancelled the task as well, the cancellation is theirs.
        if self.is_over and self._task.uncancel() <= self._cancelling and exc_type is asyncio.CancelledError:
            raise self._error() from None

    def _begin(self) -> None:
        if self.seconds < math.inf:
            self._start(self._loop.time() + self.seconds)

    def _end(self) -> None:
        self.is_over = True
        self._task.cancel()

    def _error(self) -> Exception:
        return TimeoutError()


async def wait(futures: "Collection[asyncio.Future[Any]]", seconds: float, *, grace: float = 0.0) -> None:
    """Wait for futures, as `asyncio.wait()` does, but not longer than `seconds`."""
    loop = asyncio.get_running_loop()
    until = loop.time() + seconds
    await asyncio.wait(futures, timeout=seconds)
    if grace and loop.time() > until + MAX_LATENESS:
        await asyncio.wait(futures, timeout=grace)
    for _ in range(_ROUNDS):
        if all(future.done() for future in futures):
            break
        await asyncio.sleep(0)
