"""The thread that counts a session's slots in a database, so that the event loop never waits for it.

It sleeps until it is woken: the event loop has changed something, or another session has granted a slot. Only while the
session waits for a slot it wakes by itself, to find sessions that have died.
"""

import asyncio
import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable

from flux2max_async._exceptions import InFlightLimitError
from flux2max_async._shared_limit.connection import LimitConnection
from flux2max_async._text import get_logger

log = get_logger("tasks")

_IDLE_INTERVAL = 1.0
"""Seconds between checks whether the event loop has ended without closing the session."""
AWAY_TIME = 30.0  # seconds


class LimitWorker:
    """Holds the slots of one session, in a thread of its own, until it is stopped.

    Args:
        connection: Where they are counted.
        away_time: Seconds for which the database may be unusable before waiting requests fail.
    """

    def __init__(self, connection: LimitConnection, *, away_time: float = AWAY_TIME) -> None:
        self._connection = connection
        self._away_time = away_time
        self._loop = asyncio.get_running_loop()
        self.opened: asyncio.Future[None] = self._loop.create_future()
        """Resolved when slots can be acquired, or with the InFlightLimitError if the database can't be used."""
        self.stopped: asyncio.Future[None] = self._loop.create_future()
        # What the event loop and the thread share, and the lock for all of it.
        self._lock = threading.Lock()
        self._held = 0
        self._adopted = 0
        """How many slots were occupied since the last transaction."""
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._away_since: float | None = None
        """Since when the database can't be used; None if it can."""
        self._stopping = False
        # A daemon: a session that was never closed must not keep the program from ending.
        threading.Thread(target=self._run, name=f"limit {connection}", daemon=True).start()

    # ------------------------------------------------------------------ in the event loop

    @property
    def loop_is_closed(self) -> bool:
        """Whether the event loop has ended without stopping the thread."""
        return self._loop.is_closed()

    async def acquire(self) -> None:
        """Wait for a slot.

        Raises:
            InFlightLimitError: The database can't be used.
        """
        future: asyncio.Future[None] = self._loop.create_future()
        with self._lock:
            self._waiting.append(future)
            self._connection.wake()
        try:
            await future
        except asyncio.CancelledError:
            if future.cancelled():
                with self._lock:
                    self._connection.wake()
            elif future.exception() is None:  # cancelled in the moment of the grant
                self.release()
            raise

    def occupy(self) -> None:
        """Count a slot for an adopted task."""
        with self._lock:
            self._held += 1
            self._adopted += 1
            self._connection.wake()

    def release(self) -> None:
        """Release a slot."""
        with self._lock:
            self._held -= 1
            self._connection.wake()

    def stop(self) -> None:
        """Release all slots, and end the thread."""
        with self._lock:
            self._stopping = True
            self._connection.wake()

    def _end_wait(self, future: "asyncio.Future[None]") -> None:
        """Hand a slot over."""
        if future.done():
            self.release()  # the wait was cancelled
        else:
            future.set_result(None)

    def _fail_waiting(self, since: float, error: InFlightLimitError) -> None:
        """End all waits, if the database has been away since then."""
        with self._lock:
            if self._away_since != since:
                return
            failed, self._waiting = self._waiting, deque()
        for future in failed:
            _resolve(future, error)

    # ------------------------------------------------------------------ in the thread

    def _run(self) -> None:
        failure: InFlightLimitError | None = None
        try:
            try:
                self._connection.update(0, waits=False, adopted=0)
            except Exception as error:  # noqa: BLE001 - whatever it is, somebody waits for it
                failure = self._connection.error(error)
                self._connection.close()
            with contextlib.suppress(RuntimeError):  # the event loop may end at any time
                self._call(_resolve, self.opened, failure)
                if failure is None:
                    self._run_until_stopped()
        finally:
            try:
                self._connection.close()
            finally:
                with contextlib.suppress(RuntimeError):
                    for future in self._waiting:
                        self._call(_resolve, future, InFlightLimitError(f"the limit {self._connection} was closed"))
                    self._call(_resolve, self.stopped, None)

    def _run_until_stopped(self) -> None:
        while not self._stopping:
            began = time.monotonic()
            try:
                self._connection.wait(self._seconds_to_wait())
                if self._loop.is_closed():
                    log.warning("limit %s: the event loop ended before its session was closed", self._connection)
                    return
                self._run_once()
            except Exception as error:  # noqa: BLE001 - whatever it is, it may pass
                self._on_failure(error, began)

    def _seconds_to_wait(self) -> float:
        if self._away_since is not None:
            return self._connection.retry_delay()
        return self._connection.check_interval if self._waiting else _IDLE_INTERVAL

    def _run_once(self) -> None:
        """Write what has changed, and take the slot that was granted."""
        with self._lock:
            self._waiting = deque(future for future in self._waiting if not future.done())
            held, adopted, waits = self._held, self._adopted, bool(self._waiting)
        granted = self._connection.update(held, waits=waits, adopted=adopted)
        with self._lock:
            self._adopted -= adopted
            was_away, self._away_since = self._away_since is not None, None
            # None if the waits have failed in the meantime: the next transaction gives the slot back.
            future = self._waiting.popleft() if granted and self._waiting else None
            self._held += future is not None
            if granted:
                self._connection.wake()
        if was_away:
            log.info("limit %s: it can be used again", self._connection)
        if future is not None:
            self._call(self._end_wait, future)

    def _on_failure(self, error: Exception, began: float) -> None:
        """Close the connection, and have the waits fail once it has been away too long."""
        failure = self._connection.error(error)
        self._connection.disconnect()
        with self._lock:
            is_first, since = self._away_since is None, began if self._away_since is None else self._away_since
            self._away_since = since
        remaining = self._away_time - (time.monotonic() - since)
        if is_first:
            log.warning("%s; it is tried again", failure)
            self._call(self._loop.call_later, max(0.0, remaining), self._fail_waiting, since, failure)
        elif remaining <= 0:
            self._call(self._fail_waiting, since, failure)

    def _call(self, function: Callable[..., object], *arguments: object) -> None:
        self._loop.call_soon_threadsafe(function, *arguments)


def _resolve(future: "asyncio.Future[None]", error: InFlightLimitError | None) -> None:
    if future.done():
        return
    if error is None:
        future.set_result(None)
    else:
        future.set_exception(error)
        future.exception()  # marks it as retrieved: the caller may have left already
