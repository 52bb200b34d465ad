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
import weakref
from collections import deque
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TYPE_CHECKING, NoReturn, cast

import aiohttp
import attrs
from aiohttp.abc import AbstractStreamWriter
from aiohttp.client_proto import ResponseHandler
from aiohttp.connector import Connection
from aiohttp.http import StreamWriter

from flux2max_async._clock import suspended_seconds

if TYPE_CHECKING:
    from aiohttp.client_reqrep import ConnectionKey
    from aiohttp.tracing import Trace

FIRST_LIMIT = 0.5
"""Seconds that a connection may be idle as long as nothing is known about the far end."""
MAX_LIMIT = 4.0
_CHECK_INTERVAL = 0.25
"""Seconds between two looks at the idle connections."""
_MIN_CHECK_INTERVAL = 0.05
_MAX_LAG = 0.1
"""Seconds by which a look may be late before the event loop counts as blocked."""
_MIN_REST = 0.1
"""Seconds after an answer in which the far end's FIN arrives if it closes the connection because of it."""
_DROP_MEMORY = 60.0
_AGREEING_DROPS = 4
_AGREEMENT = 1.2
"""Drops that differ at most by this factor are due to a fixed timeout of the far end."""
_USE_TIME = 60.0
"""Seconds after a submit for which a connection is kept ready for the next one."""
_MIN_SPARE_LIMIT = 0.2
"""If the far end closes unused connections sooner, none is kept ready."""
_PAUSE_AFTER_FAILURE = 5.0
_OPEN_TIMEOUT = 10.0
_CHUNK_BYTES = 65_536


class IdleLimit:
    """Learns how many seconds a connection may be idle before a submit can't rely on it any more.

    It is half of the longest time that one was seen to stay open, or half of the shortest after which one was closed;
    0.7 of it, if several were closed after the same time.
    """

    def __init__(self) -> None:
        self._longest = 0.0
        self._drops: deque[tuple[float, float]] = deque(maxlen=100)
        """When a connection was closed, and how long it had been idle."""
        self._shortest, self._factor = math.inf, 0.5

    def on_open(self, idle: float) -> None:
        """Record that a connection is still open after so many idle seconds."""
        self._longest = max(self._longest, idle)

    def on_drop(self, idle: float, now: float) -> None:
        """Record that the far end has closed a connection after so many idle seconds."""
        # The far end may have changed its timeout: what was seen before no longer counts.
        self._longest = min(self._longest, idle)
        self._drops.append((now, idle))
        self._summarize()

    def seconds(self, now: float, round_trip: float) -> float:
        """Return the limit.

        Args:
            now: The time.
            round_trip: Seconds that a FIN and a submit may need together; at least one round trip.
        """
        if self._drops and self._drops[0][0] < now - _DROP_MEMORY:
            self._drops.popleft()
            self._summarize()
        if not self._drops:
            return min(MAX_LIMIT, max(FIRST_LIMIT, self._longest / 2))
        return min(MAX_LIMIT, self._shortest * self._factor, self._shortest - round_trip)

    def _summarize(self) -> None:
        times = [idle for _, idle in self._drops]
        self._shortest = min(times, default=math.inf)
        is_timeout = len(times) >= _AGREEING_DROPS and max(times) <= _AGREEMENT * self._shortest
        self._factor = 0.7 if is_timeout else 0.5


@attrs.frozen
class _Idle:
    """An idle connection."""

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
    """A connector for one host, whose submits get only connections that the far end certainly keeps open.

    Submits are recognised by the `server_hostname` of their requests; other requests have none.

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
        pool_key = _pool_key(key)
        is_submit = key.server_hostname is not None
        if is_submit:
            self.expect_submit(_MIN_CHECK_INTERVAL)
            if not self._move_good_one_to_front(pool_key):
                return None
        connection = await super()._get(pool_key, traces)
        if connection is not None:
            protocol = cast("ResponseHandler", connection.protocol)
            idle = self._idle.pop(protocol, None)
            if is_submit and idle is not None:
                self._taken[protocol] = idle
        return connection

    def _release(self, key: "ConnectionKey", protocol: ResponseHandler, *, should_close: bool = False) -> None:
        self._taken.pop(protocol, None)
        if self._closed or should_close or protocol.should_close:
            super()._release(key, protocol, should_close=True)
        else:
            self._add(key, protocol, is_unused=False)

    def _add(self, key: "ConnectionKey", protocol: ResponseHandler, *, is_unused: bool) -> None:
        pool_key = _pool_key(key)
        super()._release(pool_key, protocol)
        pool = self._conns[pool_key]
        if protocol not in self._watched:
            self._watched.add(protocol)
            # It is None if the connection is closed already.
            (protocol.closed or self._loop.create_future()).add_done_callback(partial(self._on_closed, protocol))
        if self._timer is not None:
            now = self._now()
            limit, rest = (self._unused, 0.0) if is_unused else (self._after_answer, _MIN_REST)
            self._idle[protocol] = _Idle(protocol, pool[-1], now, now + rest, limit)
        if len(pool) > self.limit:
            oldest, _ = pool.popleft()
            self._idle.pop(oldest, None)
            oldest.close()

    def _move_good_one_to_front(self, pool_key: "ConnectionKey") -> bool:
        """Move the newest connection that a submit may use to the front of the pool, which aiohttp takes."""
        now = self._now()
        for idle in reversed(self._idle.values()):
            if idle.usable_from <= now and self._is_fresh(idle, now) and _is_good(idle.protocol):
                pool = self._conns[pool_key]
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
            self._idle.clear()
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


class SubmitPayload(aiohttp.Payload):
    """The body of a submit: records when it is written, and refuses to be written twice.

    Args:
        value: The body.
        connector: Decides whether it may be written to a connection. None, for a borrowed session: to each, and the
            connection is closed afterwards.
    """

    _autoclose = True

    def __init__(self, value: bytes, connector: SubmitConnector | None = None) -> None:
        super().__init__(value, content_type="application/json")
        self._size = len(value)
        self._connector = connector
        self.is_written = False

    async def write(self, writer: AbstractStreamWriter) -> None:
        await self.write_with_length(writer, None)

    async def write_with_length(self, writer: AbstractStreamWriter, content_length: int | None) -> None:
        if self.is_written:
            raise ConnectionError("a submit is never written twice")  # a borrowed session's middleware may try to
        protocol = cast("ResponseHandler", cast("StreamWriter", writer).protocol)
        if self._connector is None:
            protocol.force_close()
        elif not self._connector.may_write(protocol):
            raise ConnectionError("the connection is closed, or has been idle for too long")
        self.is_written = True
        view = memoryview(self._value)[:content_length]
        # In chunks, so that a body of many megabytes doesn't block the event loop.
        for start in range(0, len(view), _CHUNK_BYTES):
            await writer.write(view[start : start + _CHUNK_BYTES])

    def decode(self, encoding: str = "utf-8", errors: str = "strict") -> str:
        return bytes(self._value).decode(encoding, errors)


def _pool_key(key: "ConnectionKey") -> "ConnectionKey":
    """Return a key that is the same for submits and polls."""
    return key if key.server_hostname is None else key._replace(server_hostname=None)


def _is_open(protocol: ResponseHandler) -> bool:
    """Return whether the far end has neither closed the connection nor sent anything unasked, such as a 408."""
    return protocol.is_connected() and not protocol.should_close


def _is_good(protocol: ResponseHandler) -> bool:
    """Return whether the connection is open, and nothing has come that the event loop hasn't read yet."""
    if not _is_open(protocol):
        return False
    with selectors.DefaultSelector() as selector:
        selector.register(cast("asyncio.Transport", protocol.transport).get_extra_info("socket"), selectors.EVENT_READ)
        return not selector.select(0)
