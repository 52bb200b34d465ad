"""Connections that a submit may use, because the far end certainly keeps them open.

If the far end closes a connection while a submit is on its way, that fails exactly like a submit whose answer was lost.
It can happen in the last round trip before an idle connection is closed, and right after an answer. So a submit uses a
connection only if

- it was opened a moment ago and never used, or its last answer came a moment ago (`IdleLimit` learns how long that is);
- since that answer there was time for the far end's FIN to arrive, and nothing has.

If there is no such connection, the submit opens one. For a minute after each submit, one is kept ready for the next.
Polls use the same connections, and so keep them fresh.

aiohttp has no public interface for this. `_get()` and `_release()`, which take a connection from a connector's pool and
put it back, are extended; the pool itself is aiohttp's.
"""

import asyncio
import math
import selectors
from bisect import bisect_right
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from contextvars import ContextVar
from enum import Enum
from itertools import chain
from operator import attrgetter
from typing import TYPE_CHECKING, Any, NoReturn, cast

import aiohttp
from aiohttp.client_proto import ResponseHandler
from aiohttp.connector import Connection

from flux2max_async._api.header_limit import LimitedHandler
from flux2max_async._api.idle_limit import MAX_LIMIT, IdleLimit
from flux2max_async._clock import suspended_seconds
from flux2max_async._timeouts import Timeout

if TYPE_CHECKING:
    from aiohttp.client_reqrep import ConnectionKey
    from aiohttp.tracing import Trace

_CHECK_INTERVAL = 0.25
"""Seconds between two looks at the idle connections."""
_MIN_CHECK_INTERVAL = 0.05
_MAX_LAG = 0.1
"""Seconds by which a look may be late before the event loop counts as blocked."""
_MIN_REST = 0.1
"""Seconds after an answer in which the far end's FIN arrives if it closes the connection because of it."""
_USE_TIME = 60.0
"""Seconds after a submit for which a connection is kept ready for the next one."""
_MIN_SPARE_LIMIT = 0.2
"""If the far end closes unused connections sooner, none is kept ready."""
_PAUSE_AFTER_FAILURE = 5.0
_OPEN_TIMEOUT = 10.0
_Selector = getattr(selectors, "PollSelector", selectors.SelectSelector)
"""The one that needs the fewest system calls to be used once."""


class ConnectionUse(Enum):
    """Which connections a request may use."""

    ANY = "any"
    WARM = "warm"
    """For a submit: a new one, or one that the far end certainly keeps open."""
    NEW = "new"


connection_use: ContextVar[ConnectionUse] = ContextVar("connection_use", default=ConnectionUse.ANY)
"""That of the next request in this context; aiohttp passes nothing of our own on to a connector."""


class SpareOpened(Exception):  # noqa: N818 - no error
    """Ends the request for a spare connection before anything is sent."""


class _Handler(LimitedHandler):
    """The protocol of a connection, which knows since when it has been idle, and reports when it is lost."""

    def __init__(self, connector: "SubmitConnector") -> None:
        super().__init__(asyncio.get_running_loop())
        self._now, self._on_lost = connector.now, connector.on_lost
        self._opened = math.inf
        self.since = math.inf
        """When its last answer was complete, or when it was opened in advance; infinity if it never was idle."""
        self.limit = connector.unused
        """How long it may be idle."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._opened = self._now()

    def connection_lost(self, exc: BaseException | None) -> None:
        super().connection_lost(exc)
        self._on_lost(self)

    def fresh_until(self, now: float, round_trip: float) -> float:
        """Return until when a submit may be written to it."""
        if self.since < math.inf:
            return self.since + self.limit.seconds(now, round_trip)
        # It is written to at once, unless the event loop is blocked.
        return self._opened + MAX_LIMIT


class SubmitConnector(aiohttp.TCPConnector):
    """A connector for one host, whose requests get the connections that `connection_use` allows.

    Args:
        limit: Maximum number of connections, besides a spare one.
        open_spare: Makes a request with the middleware `open_only`; returns whether that has worked.
    """

    def __init__(self, *, limit: int, open_spare: Callable[[], Awaitable[bool]]) -> None:
        super().__init__(limit=limit)
        self._factory: Any = lambda: _Handler(self)
        self.suspended: Callable[[], float] = suspended_seconds
        self._open_spare = open_spare
        self._after_answer, self.unused = IdleLimit(), IdleLimit()
        self._last_use = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._last_check = self._previous_check = 0.0
        self._spare: _Handler | None = None
        """The newest one that was opened in advance, until it has been used."""
        self._opening: asyncio.Task[None] | None = None
        self._opening_time = 0.0
        self._no_spare_before = 0.0

    def expect_submit(self, delay: float = 0.0) -> None:
        """Keep a connection ready, from `delay` seconds on: a submit is made, or will be soon."""
        self._last_use = self.now()
        if self._timer is None and not self._closed:
            self._timer = self._loop.call_later(delay, self._check)

    def may_write(self, protocol: ResponseHandler) -> bool:
        """Return whether the first byte of a submit may be written to its connection now."""
        now = self.now() - _MAX_LAG
        return _is_open(protocol) and cast("_Handler", protocol).fresh_until(now, self._opening_time) >= now

    async def open_only(self, request: aiohttp.ClientRequest, _: aiohttp.ClientHandlerType) -> NoReturn:
        """Open the connection of a request and keep it as a spare; this middleware sends nothing."""
        started = self.now()
        with Timeout(_OPEN_TIMEOUT):
            protocol = await self._create_connection(request, [], aiohttp.ClientTimeout())
        self._opening_time = self.now() - started
        self._make_room()
        self._release(request.connection_key, protocol)
        self._spare = cast("_Handler", protocol)
        self._spare.limit = self.unused
        raise SpareOpened

    async def close(self, *, abort_ssl: bool = False) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._opening is not None:
            self._opening.cancel()
            await asyncio.wait([self._opening])
        await super().close(abort_ssl=abort_ssl)

    # ------------------------------------------------------------------ the pool

    def _get(self, key: "ConnectionKey", traces: "list[Trace]") -> Any:  # the coroutine; one more would cost each poll
        use = connection_use.get()
        return super()._get(key, traces) if use is ConnectionUse.ANY else self._get_sure(key, traces, use)

    async def _get_sure(self, key: "ConnectionKey", traces: "list[Trace]", use: ConnectionUse) -> Connection | None:
        if use is ConnectionUse.WARM:
            self.expect_submit(_MIN_CHECK_INTERVAL)
            if self._move_good_one_to_front(key):
                return await super()._get(key, traces)
        self._make_room()
        return None

    def _release(self, key: "ConnectionKey", protocol: ResponseHandler, *, should_close: bool = False) -> None:
        handler = cast("_Handler", protocol)
        handler.since, handler.limit = self.now(), self._after_answer
        if handler is self._spare:
            self._spare = None
        super()._release(key, protocol, should_close=should_close)

    def _move_good_one_to_front(self, key: "ConnectionKey") -> bool:
        """Move the newest connection that a submit may use to the front of the pool, which aiohttp takes."""
        pool: deque[Any] = self._conns.get(key) or deque()
        now = self.now()
        # They are in the order in which they became idle. In a burst of submits, most have just answered.
        rested = bisect_right(pool, now - _MIN_REST, key=_since)
        candidates: Iterable[int] = range(rested - 1, -1, -1)
        if self._spare is not None and self._spare.since > now - _MIN_REST:
            spares = [index for index in range(rested, len(pool)) if pool[index][0] is self._spare]
            candidates = chain(candidates, spares)
        for index in candidates:
            entry = pool[index]
            if self._is_good(entry[0], now):
                del pool[index]
                pool.appendleft(entry)
                return True
        return False

    def _is_good(self, handler: _Handler, now: float) -> bool:
        is_fresh = handler.fresh_until(now, self._opening_time) >= now
        return is_fresh and _is_open(handler) and not _has_unread_data(handler)

    def _make_room(self) -> None:
        """Close idle connections, the oldest first, if there are too many for one more."""
        excess = len(self._acquired) + sum(map(len, self._conns.values())) + 1 - self.limit
        if excess > 0:
            for handler in sorted(self._idle_handlers(), key=attrgetter("since"))[:excess]:
                self._remove(handler)
                handler.close()

    def _remove(self, handler: _Handler) -> bool:
        """Remove a connection from the pool; return whether it was there."""
        for pool in self._conns.values():
            for entry in pool:
                if entry[0] is handler:
                    pool.remove(entry)
                    return True
        return False

    def _idle_handlers(self) -> list[_Handler]:
        return [entry[0] for pool in cast("Iterable[Iterable[Any]]", self._conns.values()) for entry in pool]

    # ------------------------------------------------------------------ learning, and the spare connection

    def _check(self) -> None:
        """Look at the idle connections, and open a spare one if none will be good for the next submit."""
        now = self.now()
        self._previous_check, self._last_check = self._last_check, now
        for handler in self._idle_handlers():
            if not _is_open(handler):
                self.on_lost(handler)
                handler.close()
        idle = {limit: [now] for limit in (self._after_answer, self.unused)}
        for handler in self._idle_handlers():
            idle[handler.limit].append(handler.since)
        for limit, since in idle.items():
            # A FIN that has just come may be unread, but none that had come at the last look.
            limit.on_open(self._previous_check - min(since))
        if now - self._last_use > _USE_TIME:
            self._timer = None
            return
        delay = self._spare_delay(
            now, [(limit, max(since[1:], default=now - MAX_LIMIT)) for limit, since in idle.items()]
        )
        if delay <= 0.0 and self._opening is None:
            self._opening = self._loop.create_task(self._open())
        interval = min(_CHECK_INTERVAL, max(_MIN_CHECK_INTERVAL, delay))
        self._timer = self._loop.call_later(interval, self._check)

    def on_lost(self, handler: _Handler) -> None:
        """Learn from a connection that was lost, if it was idle."""
        if not self._remove(handler):
            return
        now = self.now()
        # If the event loop was blocked, the connection may have been closed at any time since.
        was_blocked = now - self._previous_check > 2 * _CHECK_INTERVAL + _MAX_LAG
        seconds = (self._previous_check if was_blocked else now) - handler.since
        # Sooner, it was not closed for being idle, but because of its last answer.
        if seconds >= _MIN_REST:
            handler.limit.on_drop(seconds, now)

    def _spare_delay(self, now: float, newest: Iterable[tuple[IdleLimit, float]]) -> float:
        """Return the seconds until a spare connection should be opened.

        Args:
            now: The time.
            newest: Since when the newest connection of each kind has been idle.
        """
        limit = self.unused.seconds(now, self._opening_time)
        if limit < _MIN_SPARE_LIMIT or now < self._no_spare_before:
            return _CHECK_INTERVAL
        fresh_until = max(since + limit.seconds(now, self._opening_time) for limit, since in newest)
        # Early enough to be open when the last good one is so no longer.
        return fresh_until - min(self._opening_time + _MIN_CHECK_INTERVAL, limit / 2) - now

    async def _open(self) -> None:
        try:
            if not await self._open_spare():
                self._no_spare_before = self.now() + _PAUSE_AFTER_FAILURE
        finally:
            self._opening = None

    def now(self) -> float:
        """Return the time, which goes on while the machine is suspended."""
        return self._loop.time() + self.suspended()


def _since(entry: tuple[_Handler, float]) -> float:
    """Return since when a connection in the pool has been idle."""
    return entry[0].since


def _is_open(protocol: ResponseHandler) -> bool:
    """Return whether the far end has neither closed the connection nor sent anything unasked, such as a 408."""
    return protocol.is_connected() and not protocol.should_close


def _has_unread_data(protocol: ResponseHandler) -> bool:
    """Return whether something has come, perhaps a FIN, that the event loop hasn't read yet."""
    with _Selector() as selector:
        selector.register(cast("asyncio.Transport", protocol.transport).get_extra_info("socket"), selectors.EVENT_READ)
        return bool(selector.select(0))
