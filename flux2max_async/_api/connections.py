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
import selectors
import weakref
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from enum import Enum
from functools import partial
from typing import TYPE_CHECKING, NoReturn, cast

import aiohttp
import attrs
from aiohttp.client_proto import ResponseHandler
from aiohttp.connector import Connection

from flux2max_async._api.idle_limit import IdleLimit
from flux2max_async._clock import suspended_seconds

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


class ConnectionUse(Enum):
    """Which connections a request may use."""

    ANY = "any"
    WARM = "warm"
    """For a submit: a new one, or one that the far end certainly keeps open."""
    NEW = "new"


connection_use: ContextVar[ConnectionUse] = ContextVar("connection_use", default=ConnectionUse.ANY)
"""That of the next request in this context; aiohttp passes nothing of our own on to a connector."""


@attrs.frozen
class _Idle:
    """An idle connection."""

    key: "ConnectionKey"
    protocol: ResponseHandler
    entry: tuple[ResponseHandler, float]
    """Its entry in aiohttp's pool."""
    since: float
    usable_from: float
    limit: IdleLimit
    """How long it may be idle."""


class SpareOpened(Exception):  # noqa: N818 - no error
    """Ends the request for a spare connection before anything is sent."""


class SubmitConnector(aiohttp.TCPConnector):
    """A connector for one host, whose requests get the connections that `connection_use` allows.

    Args:
        limit: Maximum number of connections in use.
        open_spare: Makes a request with the middleware `open_only`; returns whether that has worked.
    """

    def __init__(self, *, limit: int, open_spare: Callable[[], Awaitable[bool]]) -> None:
        super().__init__(limit=limit)
        self.suspended: Callable[[], float] = suspended_seconds
        self._open_spare = open_spare
        self._idle: dict[ResponseHandler, _Idle] = {}
        self._taken: dict[ResponseHandler, _Idle] = {}
        self._watched = weakref.WeakSet[ResponseHandler]()
        self._after_answer, self._unused = IdleLimit(), IdleLimit()
        self._last_use = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._last_check = self._previous_check = 0.0
        self._opening: asyncio.Task[None] | None = None
        self._opening_time = 0.0
        self._no_spare_before = 0.0

    def expect_submit(self, delay: float = 0.0) -> None:
        """Keep a connection ready, from `delay` seconds on: a submit is made, or will be soon."""
        self._last_use = self._now()
        if self._timer is None and not self._closed:
            self._timer = self._loop.call_later(delay, self._check)

    def may_write(self, protocol: ResponseHandler) -> bool:
        """Return whether the first byte of a submit may be written to its connection now."""
        idle = self._taken.get(protocol)
        return _is_open(protocol) and (idle is None or self._is_fresh(idle, self._now() - _MAX_LAG))

    async def open_only(self, request: aiohttp.ClientRequest, _: aiohttp.ClientHandlerType) -> NoReturn:
        """Open the connection of a request and keep it as a spare; this middleware sends nothing."""
        started = self._now()
        async with asyncio.timeout(_OPEN_TIMEOUT):
            protocol = await self._create_connection(request, [], aiohttp.ClientTimeout())
        self._opening_time = self._now() - started
        self._add(request.connection_key, protocol, is_unused=True)
        raise SpareOpened

    async def close(self, *, abort_ssl: bool = False) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._opening is not None:
            self._opening.cancel()
            await asyncio.wait([self._opening])
        await super().close(abort_ssl=abort_ssl)

    # ------------------------------------------------------------------ the pool

    async def _get(self, key: "ConnectionKey", traces: "list[Trace]") -> Connection | None:
        use = connection_use.get()
        if use is ConnectionUse.WARM:
            self.expect_submit(_MIN_CHECK_INTERVAL)
        if use is ConnectionUse.NEW or (use is ConnectionUse.WARM and not self._move_good_one_to_front(key)):
            return None
        connection = await super()._get(key, traces)
        if connection is not None:
            protocol = cast("ResponseHandler", connection.protocol)
            idle = self._idle.pop(protocol, None)
            if use is ConnectionUse.WARM and idle is not None:
                self._taken[protocol] = idle
        return connection

    def _release(self, key: "ConnectionKey", protocol: ResponseHandler, *, should_close: bool = False) -> None:
        self._taken.pop(protocol, None)
        if should_close:
            super()._release(key, protocol, should_close=True)
        else:
            self._add(key, protocol, is_unused=False)

    def _add(self, key: "ConnectionKey", protocol: ResponseHandler, *, is_unused: bool) -> None:
        super()._release(key, protocol)
        if self._closed or not _is_open(protocol):
            return
        pool = self._conns[key]
        if protocol not in self._watched:
            self._watched.add(protocol)
            closed = cast("asyncio.Future[None]", protocol.closed)
            closed.add_done_callback(partial(self._on_closed, protocol))
        now = self._now()
        limit, rest = (self._unused, 0.0) if is_unused else (self._after_answer, _MIN_REST)
        self._idle[protocol] = _Idle(key, protocol, pool[-1], now, now + rest, limit)
        if len(pool) > self.limit:
            oldest, _ = pool.popleft()
            self._idle.pop(oldest, None)
            oldest.close()

    def _move_good_one_to_front(self, key: "ConnectionKey") -> bool:
        """Move the newest connection that a submit may use to the front of the pool, which aiohttp takes."""
        now = self._now()
        for idle in reversed(self._idle.values()):
            is_usable = idle.key == key and idle.usable_from <= now and self._is_fresh(idle, now)
            if is_usable and _is_open(idle.protocol) and not _has_unread_data(idle.protocol):
                pool = self._conns[key]
                pool.remove(idle.entry)
                pool.appendleft(idle.entry)
                return True
        return False

    # ------------------------------------------------------------------ learning, and the spare connection

    def _check(self) -> None:
        """Look at the idle connections, and open a spare one if none will be good for the next submit."""
        now = self._now()
        self._previous_check, self._last_check = self._last_check, now
        for idle in list(self._idle.values()):
            if _is_open(idle.protocol):
                # A FIN that has just come may be unread, but none that had come at the last look.
                idle.limit.on_open(self._previous_check - idle.since)
            else:
                idle.protocol.close()
                self._on_drop(idle, now)
        if now - self._last_use > _USE_TIME:
            self._timer = None
            return
        delay = self._spare_delay(now)
        if delay <= 0.0 and self._opening is None:
            self._opening = self._loop.create_task(self._open())
        interval = min(_CHECK_INTERVAL, max(_MIN_CHECK_INTERVAL, delay))
        self._timer = self._loop.call_later(interval, self._check)

    def _on_closed(self, protocol: ResponseHandler, closed: "asyncio.Future[None]") -> None:
        closed.exception()
        if (idle := self._idle.get(protocol)) is not None:
            self._on_drop(idle, self._now())

    def _on_drop(self, idle: _Idle, now: float) -> None:
        """Record that the far end has closed an idle connection."""
        del self._idle[idle.protocol]
        # If the event loop was blocked, the connection may have been closed at any time since.
        was_blocked = now - self._previous_check > 2 * _CHECK_INTERVAL + _MAX_LAG
        seconds = (self._previous_check if was_blocked else now) - idle.since
        # Sooner, it was not closed for being idle, but because of its last answer.
        if seconds >= _MIN_REST:
            idle.limit.on_drop(seconds, now)

    def _spare_delay(self, now: float) -> float:
        """Return the seconds until a spare connection should be opened."""
        limit = self._unused.seconds(now, self._opening_time)
        if limit < _MIN_SPARE_LIMIT or now < self._no_spare_before:
            return _CHECK_INTERVAL
        fresh_until = max(
            (idle.since + idle.limit.seconds(now, self._opening_time) for idle in self._idle.values()), default=now
        )
        # Early enough to be open when the last good one is so no longer.
        return fresh_until - min(self._opening_time + _MIN_CHECK_INTERVAL, limit / 2) - now

    async def _open(self) -> None:
        try:
            if not await self._open_spare():
                self._no_spare_before = self._now() + _PAUSE_AFTER_FAILURE
        finally:
            self._opening = None

    def _is_fresh(self, idle: _Idle, now: float) -> bool:
        return now - idle.since <= idle.limit.seconds(now, self._opening_time)

    def _now(self) -> float:
        return self._loop.time() + self.suspended()


def _is_open(protocol: ResponseHandler) -> bool:
    """Return whether the far end has neither closed the connection nor sent anything unasked, such as a 408."""
    return protocol.is_connected() and not protocol.should_close


def _has_unread_data(protocol: ResponseHandler) -> bool:
    """Return whether something has come, perhaps a FIN, that the event loop hasn't read yet."""
    with selectors.DefaultSelector() as selector:
        selector.register(cast("asyncio.Transport", protocol.transport).get_extra_info("socket"), selectors.EVENT_READ)
        return bool(selector.select(0))
