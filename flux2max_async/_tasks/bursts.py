"""Many calls that come or go at once are processed in parts, so that the event loop goes on."""

import asyncio
from collections import deque
from collections.abc import Callable
from functools import partial

_MAX_PER_ITERATION = 100
"""Calls for each iteration of the event loop: it takes some milliseconds, with a journal too."""


class BurstLimiter:
    """Lets a limited number of calls begin or end in each iteration of the event loop; the others follow, in order."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._count = 0
        """In the present iteration."""
        self._line: deque[Callable[[], None]] = deque()

    async def wait(self) -> None:
        """Wait for the next iteration; in a burst, for a later one."""
        if self._count < _MAX_PER_ITERATION:
            self._count_one()
            await asyncio.sleep(0)
        else:
            future = self._loop.create_future()
            self._line.append(partial(_wake, future))
            await future

    def call_later(self, function: Callable[[], None]) -> None:
        """Call a function in the next iteration; in a burst, in a later one."""
        self._line.append(function)
        if not self._count:
            self._count_one()

    def _count_one(self) -> None:
        if not self._count:
            self._loop.call_soon(self._next_iteration)
        self._count += 1

    def _next_iteration(self) -> None:
        self._count = min(len(self._line), _MAX_PER_ITERATION)
        for _ in range(self._count):
            self._line.popleft()()
        if self._count:
            self._loop.call_soon(self._next_iteration)


def _wake(future: "asyncio.Future[None]") -> None:
    if not future.done():  # else its caller was cancelled
        future.set_result(None)
