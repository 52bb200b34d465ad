"""How fast a download must be, and how many slow ones run at once, so that slow servers can't stop other downloads.

An attempt takes a slot, and is slow once it has run for 30 s. Slow attempts hold at most half of the slots: an attempt
that becomes slow when that half is taken ends, and is repeated like any other that failed. A download that was slow
once stays slow: its further attempts wait for that half, so that they don't take the other one 30 s at a time.
"""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import anyio

from flux2max_async._exceptions import TransportError
from flux2max_async._timeouts import MAX_LATENESS

_WINDOW = 30.0
"""Seconds."""
_MIN_BYTES = 30 * 1024
"""In each window: 1 KiB/s."""


class DownloadSlots:
    """The slots of downloads that run at the same time.

    Args:
        size: How many there are.
    """

    def __init__(self, size: int) -> None:
        self.all = anyio.Semaphore(size, fast_acquire=True)
        self.slow = anyio.Semaphore(max(1, size // 2), fast_acquire=True)
        """Those of `all` that slow attempts may hold. Whoever needs both acquires this one first."""


class Pace:
    """The pace of one download, which is measured in each of its attempts.

    An attempt of a fast download holds a slot. At the end of its first window it is slow, and holds one of the slots
    for slow attempts too; an attempt of a slow download does so from its beginning. At the end of each window the
    timer, and nothing else, may cut the attempt: then the scope cancels it, and `is_cut` stays true until the next one.
    """

    def __init__(self, slots: DownloadSlots) -> None:
        self._slots = slots
        self._is_slow = False
        self._holds_slow_slot = False
        self._is_receiving = False
        self.is_writing = False
        """Whether what has come is being passed on: then it isn't the server that is slow."""
        self._received = 0
        """Bytes in this window."""
        self._problem = ""
        """Why the attempt was ended, if it was."""
        self._scope = anyio.CancelScope()
        self._timer: asyncio.TimerHandle | None = None

    @property
    def is_cut(self) -> bool:
        """Whether the attempt is being ended because it is too slow."""
        return bool(self._problem)

    @asynccontextmanager
    async def attempt(self) -> AsyncGenerator[None]:
        """Return a context for one attempt, which begins as soon as there is a slot for it.

        Raises:
            TransportError: The attempt was too slow.
        """
        self._problem = ""
        self._is_receiving = self.is_writing = False
        if self._is_slow:
            await self._slots.slow.acquire()
        self._holds_slow_slot = self._is_slow
        try:
            async with self._slots.all:
                with anyio.CancelScope() as self._scope:
                    self._start_window()
                    try:
                        yield
                    finally:
                        self._stop_window()
        finally:
            if self._holds_slow_slot:
                self._slots.slow.release()
        if self._scope.cancelled_caught:
            raise TransportError(self._problem)

    def start_receiving(self) -> None:
        """Expect the content of the response from now on."""
        self._is_receiving = True
        self._start_window()

    def add(self, count: int) -> None:
        """Count bytes of the content."""
        self._received += count

    def _start_window(self) -> None:
        self._stop_window()
        self._received = 0
        loop = asyncio.get_running_loop()
        self._timer = loop.call_at(at := loop.time() + _WINDOW, self._end_window, at)

    def _stop_window(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _end_window(self, at: float) -> None:
        is_late = asyncio.get_running_loop().time() > at + MAX_LATENESS  # what came meanwhile has not been read
        if is_late or self.is_writing:
            self._start_window()
            return
        self._is_slow = True
        if self._is_receiving and self._received < _MIN_BYTES:
            self._cut(f"the download was slower than 1 KiB/s for {_WINDOW:g} s")
            return
        if not self._holds_slow_slot:
            try:
                self._slots.slow.acquire_nowait()
            except anyio.WouldBlock:
                self._cut(f"the download took more than {_WINDOW:g} s while too many others were slow")
                return
            self._holds_slow_slot = True
        self._start_window()

    def _cut(self, problem: str) -> None:
        self._problem = problem
        self._scope.cancel()
