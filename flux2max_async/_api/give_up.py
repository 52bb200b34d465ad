"""The time limit of a poll on the wire, which doesn't expire while its answer is coming, or may have arrived unread."""

import asyncio
import math
from collections.abc import Callable, Coroutine
from types import TracebackType
from typing import Any

import attrs

from flux2max_async._api.poll_timeout import MIN_SECONDS, PollTimeout, SlowPollError
from flux2max_async._api.response import HttpResponse
from flux2max_async._api.response_content import LARGE_RESPONSE_BYTES, OnData

_MAX_LATENESS = 0.1
"""Seconds by which the timer may be late. One that is later shows that the event loop was blocked, or the process
stopped: an answer may have arrived that could not be read."""
_READING_TIME = 0.5
"""Seconds that are left to read it, once: a loop that is always late must not put the end off for ever."""


async def finish_or_give_up(
    exchange: Callable[[OnData], Coroutine[Any, Any, HttpResponse]], learned: PollTimeout
) -> HttpResponse:
    """Return the response to a poll, unless nothing comes for far longer than polls usually take.

    Args:
        exchange: Makes the poll.
        learned: What polls usually take.

    Raises:
        SlowPollError: Nothing came.
    """
    timer = _GiveUpTimer(learned)
    try:
        async with timer:
            response = await exchange(timer.on_data)
    except TimeoutError:
        learned.record_given_up(timer.seconds)
        raise SlowPollError(f"no answer within {timer.seconds:.1f} s", maybe_sent=True) from None
    learned.record_answer(timer.first_data_after)
    return response


@attrs.define(eq=False)
class _GiveUpTimer:
    """An asynchronous context for the exchange of a poll; raises TimeoutError if it takes longer than polls usually do.

    The limit is that of the time at which the poll is sent. If what polls take has been learned since, it is the lower
    one. It begins anew with each part of the answer, because an image in it may take long. A large answer has no limit:
    it may have to wait until others have been read.
    """

    _learned: PollTimeout
    seconds: float = attrs.field(init=False)
    """The limit."""
    _loop: asyncio.AbstractEventLoop = attrs.field(factory=asyncio.get_running_loop, init=False)
    _timeout: asyncio.Timeout = attrs.field(factory=lambda: asyncio.timeout(None), init=False)
    first_data_after: float = attrs.field(default=math.nan, init=False)
    """Seconds until the answer began."""
    _started: float = attrs.field(init=False)
    _silent_since: float = attrs.field(init=False)
    """When something came last; infinity if the limit doesn't apply any more."""
    _was_late: bool = attrs.field(default=False, init=False)
    _timer: asyncio.TimerHandle = attrs.field(init=False)

    async def __aenter__(self) -> None:
        await self._timeout.__aenter__()
        self.seconds = self._learned.seconds
        self._started = self._silent_since = self._loop.time()
        self._start_timer(self._started + min(self.seconds, MIN_SECONDS))

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._timer.cancel()
        await self._timeout.__aexit__(exc_type, exc, traceback)

    def on_data(self, received: int) -> None:
        """Record that a part of the answer has come."""
        now = self._loop.time()
        if not received:
            self.first_data_after = now - self._started
        self._silent_since = math.inf if received > LARGE_RESPONSE_BYTES else now

    def _start_timer(self, at: float) -> None:
        self._timer = self._loop.call_at(at, self._on_timer, at)

    def _on_timer(self, at: float) -> None:
        self.seconds = min(self.seconds, self._learned.seconds)
        if self._loop.time() > at + _MAX_LATENESS and not self._was_late:
            self._was_late = True
            self._start_timer(self._loop.time() + _READING_TIME)
        elif at < self._silent_since + self.seconds:
            self._start_timer(self._silent_since + self.seconds)
        else:
            self._timeout.reschedule(at)
