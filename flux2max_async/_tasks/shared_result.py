"""A result that several callers wait for, each without an effect on the others."""

import asyncio
from typing import Generic, TypeVar, cast

T = TypeVar("T")


class SharedResult(Generic[T]):
    """A result for which any number of callers can wait; cancelling a wait cancels only that wait.

    It does what `asyncio.shield()` does with a future, in a fraction of the memory: thousands of requests may wait for
    a slot.
    """

    __slots__ = ("_is_done", "_value", "_waiting")

    def __init__(self) -> None:
        self._is_done = False
        self._value: T | None = None
        self._waiting: list[asyncio.Future[T]] | None = None

    def done(self) -> bool:
        """Return whether there is a result."""
        return self._is_done

    def result(self) -> T:
        """Return the result; there must be one."""
        assert self._is_done
        return cast("T", self._value)

    def set_result(self, value: T) -> None:
        """Set the result, unless there is one."""
        if not self._is_done:
            self._is_done, self._value = True, value
            for future in self._waiting or ():
                if not future.done():
                    future.set_result(value)
            self._waiting = None

    def future(self) -> "asyncio.Future[T]":
        """Return a future of the caller's own; pass it to `discard()` if it isn't needed any more before the result."""
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        if self._is_done:
            future.set_result(self.result())
        elif self._waiting is None:
            self._waiting = [future]
        else:
            self._waiting.append(future)
        return future

    def discard(self, future: "asyncio.Future[T]") -> None:
        """Forget a future."""
        if self._waiting is not None:
            self._waiting.remove(future)

    async def wait(self) -> T:
        """Wait for the result."""
        if not self._is_done:
            future = self.future()
            try:
                await future
            except asyncio.CancelledError:
                self.discard(future)
                raise
        return self.result()
