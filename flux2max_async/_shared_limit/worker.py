"""The thread that counts a session's slots in the file of a limit, so that the event loop never waits for a disk.

It sleeps until its pipe wakes it: the event loop has changed something, or another process has granted a slot. Only
while the session waits for a slot it wakes by itself, to find processes that have died.
"""

import asyncio
import contextlib
import secrets
import select
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

from flux2max_async._exceptions import InFlightLimitError
from flux2max_async._shared_limit.store import LimitStore
from flux2max_async._text import get_logger
from flux2max_async._wake_pipe import WakePipe, pipe_path, wake_owner

log = get_logger("tasks")

_CHECK_INTERVAL = 0.1
"""Seconds between checks for dead processes, and for a grant whose byte was lost, while the session waits."""
_RETRY_INTERVAL = 0.5
"""Seconds between attempts to use the file while it can't be used."""
_IDLE_INTERVAL = 1.0
"""Seconds between checks whether the event loop has ended without closing the session."""
AWAY_TIME = 30.0  # seconds


class LimitWorker:
    """Holds the slots of one session, in a thread of its own, until it is stopped.

    Args:
        path: The limit's file.
        slots: The number of slots of all sessions together.
        keep_after_death: Whether the slots count after this process's death until its tasks are adopted.
        away_time: Seconds for which the file may be unusable before waiting requests fail.
    """

    def __init__(self, path: Path, slots: int, *, keep_after_death: bool, away_time: float = AWAY_TIME) -> None:
        self._path = path.absolute()
        self._slots = slots
        self._keep_after_death = keep_after_death
        self._away_time = away_time
        self._holder = secrets.token_hex(8)
        self._loop = asyncio.get_running_loop()
        self.opened: asyncio.Future[None] = self._loop.create_future()
        """Resolved when slots can be acquired, or with the InFlightLimitError if the file can't be used."""
        self.stopped: asyncio.Future[None] = self._loop.create_future()
        self._store: LimitStore | None = None
        self._away_since: float | None = None
        """Since when the file can't be used; None if it can."""
        # What the event loop and the thread share, and the lock for all of it.
        self._lock = threading.Lock()
        self._pipe: WakePipe | None = None
        self._held = 0
        self._adopted = 0
        """How many slots were occupied since the last transaction."""
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._stopping = False
        # A daemon: a session that was never closed must not keep the program from ending.
        threading.Thread(target=self._run, name=f"limit {path.name}", daemon=True).start()

    # ------------------------------------------------------------------ in the event loop

    @property
    def loop_is_closed(self) -> bool:
        """Whether the event loop has ended without stopping the thread."""
        return self._loop.is_closed()

    async def acquire(self) -> None:
        """Wait for a slot.

        Raises:
            InFlightLimitError: The file can't be used.
        """
        future: asyncio.Future[None] = self._loop.create_future()
        with self._lock:
            self._waiting.append(future)
            self._wake()
        try:
            await future
        except asyncio.CancelledError:
            if future.cancelled():
                with self._lock:
                    self._wake()
            elif future.exception() is None:  # cancelled in the moment of the grant
                self.release()
            raise

    def occupy(self) -> None:
        """Count a slot for an adopted task."""
        with self._lock:
            self._held += 1
            self._adopted += 1
            self._wake()

    def release(self) -> None:
        """Release a slot."""
        with self._lock:
            self._held -= 1
            self._wake()

    def stop(self) -> None:
        """Release all slots, and end the thread."""
        with self._lock:
            self._stopping = True
            self._wake()

    def _wake(self) -> None:
        """Wake the thread; call it with the lock."""
        if self._pipe is not None:
            self._pipe.wake()

    def _end_wait(self, future: "asyncio.Future[None]") -> None:
        """Hand a slot over."""
        if future.done():
            self.release()  # the wait was cancelled
        else:
            future.set_result(None)

    # ------------------------------------------------------------------ in the thread

    def _run(self) -> None:
        failure: InFlightLimitError | None = None
        try:
            try:
                self._wake_others(self._open_store().update(0, time.monotonic()).woken)
            except Exception as error:  # noqa: BLE001 - whatever it is, somebody waits for it
                failure = self._error(error)
                self._close()
            with contextlib.suppress(RuntimeError):  # the event loop may end at any time
                self._call(_resolve, self.opened, failure)
                if failure is None:
                    self._run_until_stopped()
        finally:
            try:
                self._close()
            finally:
                with contextlib.suppress(RuntimeError):
                    for future in self._waiting:
                        self._call(_resolve, future, InFlightLimitError(f"the limit {self._path} was closed"))
                    self._call(_resolve, self.stopped, None)

    def _run_until_stopped(self) -> None:
        while not self._stopping:
            self._wait()
            if self._loop.is_closed():
                log.warning("limit %s: the event loop ended before its session was closed", self._path)
                return
            self._run_once()

    def _wait(self) -> None:
        """Wait until there is something to do."""
        assert self._pipe is not None
        seconds = _CHECK_INTERVAL if self._waiting else _IDLE_INTERVAL
        poll = select.poll()
        poll.register(self._pipe, select.POLLIN)
        poll.poll(1000 * (seconds if self._away_since is None else _RETRY_INTERVAL))
        self._pipe.clear()

    def _run_once(self) -> None:
        """Write what has changed, and take the slot that was granted."""
        with self._lock:
            self._waiting = deque(future for future in self._waiting if not future.done())
            held, adopted, waits = self._held, self._adopted, bool(self._waiting)
        try:
            store = self._open_store()
            update = store.update(held, time.monotonic(), waits=waits, adopted=adopted)
        except Exception as error:  # noqa: BLE001 - whatever it is, it may pass
            self._on_failure(error)
            return
        self._on_success(adopted)
        if update.granted:
            self._on_granted()
        self._wake_others(update.woken)

    def _open_store(self) -> LimitStore:
        """Return the store, opened anew if its file or the pipe was deleted, or it has failed."""
        if self._store is not None and self._store.is_replaced():
            self._store.close()
            self._store = None
        path = self._path.resolve()
        if self._pipe is None or not self._pipe.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            pipe = WakePipe(pipe_path(path, self._holder))
            with self._lock:
                replaced, self._pipe = self._pipe, pipe
            if replaced is not None:
                replaced.close_descriptors()
        if self._store is None:
            self._store = LimitStore(path, self._holder, self._slots, keep_after_death=self._keep_after_death)
        return self._store

    def _on_success(self, adopted: int) -> None:
        with self._lock:
            self._adopted -= adopted
        if self._away_since is not None:
            self._away_since = None
            log.info("limit %s: it can be used again", self._path)

    def _on_failure(self, error: Exception) -> None:
        now = time.monotonic()
        failure = self._error(error)
        if self._store is not None:
            self._store.close()
            self._store = None
        if self._away_since is None:
            self._away_since = now
            log.warning("%s; it is tried again", failure)
        if now - self._away_since >= self._away_time:
            with self._lock:
                failed, self._waiting = self._waiting, deque()
            for future in failed:
                self._call(_resolve, future, failure)

    def _on_granted(self) -> None:
        with self._lock:
            self._held += 1
            future = self._waiting.popleft()
            if self._waiting:
                self._wake()
        self._call(self._end_wait, future)

    def _wake_others(self, holders: list[str]) -> None:
        path = self._path.resolve()
        for holder in holders:
            wake_owner(pipe_path(path, holder))

    def _close(self) -> None:
        store, self._store = self._store, None
        if store is not None:
            with contextlib.suppress(sqlite3.Error):  # others will notice that the pipe is closed
                self._wake_others(store.leave())
            store.close()
        with self._lock:
            pipe, self._pipe = self._pipe, None
        if pipe is not None:
            pipe.close()

    def _error(self, error: Exception) -> InFlightLimitError:
        if isinstance(error, InFlightLimitError):
            return error
        failure = InFlightLimitError(f"the limit {self._path} can't be used: {error}")
        failure.__cause__ = error
        return failure

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
