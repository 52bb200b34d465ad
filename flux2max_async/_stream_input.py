"""What goes into a stream: where its requests come from, and how many are pulled ahead."""

import asyncio
from collections.abc import AsyncIterable, Awaitable, Callable, Iterable

from flux2max_async._exceptions import FluxError, SessionClosedError, SubmissionUncertainError
from flux2max_async._models.request import GenerationRequest

Requests = Iterable[str | GenerationRequest] | AsyncIterable[str | GenerationRequest]


class LookAhead:
    """How many requests a stream may still pull before another outcome is delivered; it may be negative.

    A semaphore that can be taken back: an item that doesn't hold a slot lends its share to the next request.
    """

    __slots__ = ("_available", "_released")

    def __init__(self, available: int) -> None:
        self._available = available
        self._released = asyncio.Event()

    async def acquire(self) -> None:
        while self._available < 1:
            self._released.clear()
            await self._released.wait()
        self._available -= 1

    def release(self, amount: int = 1) -> None:
        self._available += amount
        self._released.set()


def source_of(requests: Requests) -> Callable[[], Awaitable[str | GenerationRequest]]:
    """Return the coroutine function that yields the next request, and raises StopAsyncIteration at the end."""
    if isinstance(requests, AsyncIterable):
        return aiter(requests).__anext__
    iterator = iter(requests)

    async def next_request() -> str | GenerationRequest:
        for request in iterator:
            return request
        raise StopAsyncIteration

    return next_request


def why_not_sent(error: FluxError | None) -> FluxError:
    """Return the error of requests that are not sent because a stream stops: its own, unless that is about another."""
    if error is None:
        return SessionClosedError("the stream was closed")
    if isinstance(error, SubmissionUncertainError) or error.task_id is not None:
        reason = SessionClosedError(f"not sent, because the stream has stopped: {error}")
        reason.__cause__ = error
        return reason
    return error
