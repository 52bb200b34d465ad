"""The turns of submits: one after the other, as the limits allow."""

import asyncio
import contextlib
import math
from collections.abc import Callable

import attrs

from flux2max_async._api.circuit_breaker import CircuitBreaker
from flux2max_async._api.submit_limiter import SubmitLimiter
from flux2max_async._stats import SessionCounters

_MAX_FIRST_SUBMITS = 24
"""So many are on the wire at first, and one more for each that was accepted: a limit is known after few refusals."""
_MAX_CONCURRENT_SUBMITS = 100
"""One that waits for a connection takes 8 KiB, and its time for the exchange is running."""


Rank = Callable[[], float]
"""Returns the place of a submit among those that wait, which may change meanwhile: the lowest goes first."""


@attrs.define(eq=False)
class SubmitTurns:
    """Decides when the next submit may start, and which one that is.

    One of those that wait has the turn: it waits for the limits, starts, and passes the turn on.
    """

    _stats: SessionCounters
    _limiter: SubmitLimiter
    _breaker: CircuitBreaker
    _now: Callable[[], float]
    _is_taken: bool = attrs.field(default=False, init=False)
    """Whether a submit has the turn."""
    _waiting: "dict[asyncio.Future[None], Rank]" = attrs.field(factory=dict, init=False)
    """Those that wait for the turn, in order of arrival; it comes with the result of the future."""
    _capacity_changed: asyncio.Event = attrs.field(factory=asyncio.Event, init=False)

    @property
    def must_wait(self) -> bool:
        """Whether a submit can't start at once."""
        return self._is_taken or self._delay() > 0

    async def wait(self, rank: Rank) -> None:
        """Wait until a submit may start; the caller starts it without awaiting."""
        await self._take_turn(rank)
        try:
            while (delay := self._delay()) > 0:
                self._capacity_changed = asyncio.Event()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(delay if delay < math.inf else None):
                        await self._capacity_changed.wait()
        finally:
            self._pass_turn()

    def on_capacity_changed(self) -> None:
        """Check again whether the next submit may start: another one, or a task, has ended."""
        self._capacity_changed.set()

    async def _take_turn(self, rank: Rank) -> None:
        if not self._is_taken:
            self._is_taken = True
            return
        turn = asyncio.get_running_loop().create_future()
        self._waiting[turn] = rank
        try:
            await turn
        except asyncio.CancelledError:
            if not turn.cancelled():  # it came in the same moment
                self._pass_turn()
            raise
        finally:
            self._waiting.pop(turn, None)

    def _pass_turn(self) -> None:
        waiting = [turn for turn in self._waiting if not turn.done()]
        self._is_taken = bool(waiting)
        if waiting:
            min(waiting, key=lambda turn: self._waiting[turn]()).set_result(None)

    def _delay(self) -> float:
        stats, breaker = self._stats, self._breaker
        max_on_wire = min(_MAX_FIRST_SUBMITS + stats.submitted, _MAX_CONCURRENT_SUBMITS)
        if stats.submitting >= max_on_wire or (breaker.has_failures and breaker.blocks):
            return math.inf
        if not self._limiter.refused:
            return 0.0
        return self._limiter.submit_delay(self._now(), stats.in_flight, stats.submitting)
