"""The turns of submits: first come, first served, as the limits allow."""

import asyncio
import contextlib
import math
from collections.abc import Callable

import attrs

from flux2max_async._api.circuit_breaker import CircuitBreaker
from flux2max_async._api.submit_limiter import SubmitLimiter
from flux2max_async._stats import SessionStats

_MAX_CONCURRENT_SUBMITS = 100
"""One that waits for a connection takes 8 KiB, and its time for the exchange is running."""


@attrs.define(eq=False)
class SubmitTurns:
    """Decides when the next submit may start."""

    _stats: SessionStats
    _limiter: SubmitLimiter
    _breaker: CircuitBreaker
    _now: Callable[[], float]
    _turn: asyncio.Lock = attrs.field(factory=asyncio.Lock, init=False)
    _capacity_changed: asyncio.Event = attrs.field(factory=asyncio.Event, init=False)

    @property
    def must_wait(self) -> bool:
        """Whether a submit can't start at once."""
        return self._turn.locked() or self._delay() > 0

    async def wait(self) -> None:
        """Wait until one more submit may start; the caller starts it without awaiting."""
        async with self._turn:
            while (delay := self._delay()) > 0:
                self._capacity_changed = asyncio.Event()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(delay if delay < math.inf else None):
                        await self._capacity_changed.wait()

    def on_capacity_changed(self) -> None:
        """Check again whether the next submit may start: another one, or a task, has ended."""
        self._capacity_changed.set()

    def _delay(self) -> float:
        stats, breaker = self._stats, self._breaker
        if stats.submitting >= _MAX_CONCURRENT_SUBMITS or (breaker.has_failures and breaker.blocks):
            return math.inf
        if not self._limiter.refused:
            return 0.0
        return self._limiter.submit_delay(self._now(), stats.in_flight, stats.submitting)
