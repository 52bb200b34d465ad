"""A session's access to the file of a limit: its store, and the named pipe through which others wake it."""

import contextlib
import secrets
import select
import sqlite3
import threading
import time
from pathlib import Path

from flux2max_async._exceptions import InFlightLimitError
from flux2max_async._shared_limit.store import LimitStore
from flux2max_async._wake_pipe import WakePipe, pipe_path, wake_owner

_RETRY_INTERVAL = 0.5
"""Seconds between attempts to use the file while it can't be used."""


class SqliteConnection:
    """Implements `LimitConnection` with a file that the processes of one machine share.

    Args:
        path: The limit's file.
        slots: The number of slots of all sessions together.
        keep_after_death: Whether the slots count after this process's death until its tasks are adopted.
    """

    check_interval = 0.1
    """Also for a grant whose byte was lost."""

    def __init__(self, path: Path, slots: int, *, keep_after_death: bool) -> None:
        self._path = path.absolute()
        self._slots = slots
        self._keep_after_death = keep_after_death
        self._holder = secrets.token_hex(8)
        self._store: LimitStore | None = None
        self._lock = threading.Lock()  # for the pipe
        self._pipe: WakePipe | None = None

    def __str__(self) -> str:
        return str(self._path)

    def wake(self) -> None:
        """End a wait; before the pipe is there, the thread doesn't wait."""
        with self._lock:
            if self._pipe is not None:
                self._pipe.wake()

    def wait(self, seconds: float) -> None:
        """Wait for the pipe."""
        assert self._pipe is not None
        poll = select.poll()
        poll.register(self._pipe, select.POLLIN)
        poll.poll(1000 * seconds)
        self._pipe.clear()

    def update(self, held: int, *, waits: bool, adopted: int) -> bool:
        """Run a transaction, and wake those to whom it has granted a slot."""
        update = self._open_store().update(held, time.monotonic(), waits=waits, adopted=adopted)
        self._wake_others(update.woken)
        return update.granted

    def disconnect(self) -> None:
        """Close the store; the pipe stays."""
        store, self._store = self._store, None
        if store is not None:
            store.close()

    def retry_delay(self) -> float:
        """Return always the same: nobody else is in the way of a file's disk."""
        return _RETRY_INTERVAL

    def close(self) -> None:
        """Delete this holder from the file, and the pipe."""
        try:
            if self._store is not None:
                with contextlib.suppress(sqlite3.Error):  # others will notice that the pipe is closed
                    self._wake_others(self._store.leave())
        finally:
            self.disconnect()
            with self._lock:
                pipe, self._pipe = self._pipe, None
            if pipe is not None:
                pipe.close()

    def error(self, error: Exception) -> InFlightLimitError:
        """Return an error that names the file."""
        if isinstance(error, InFlightLimitError):
            return error
        failure = InFlightLimitError(f"the limit {self} can't be used: {error}")
        failure.__cause__ = error
        return failure

    def _open_store(self) -> LimitStore:
        """Return the store, opened anew if its file or the pipe was deleted, or it has failed."""
        if self._store is not None and self._store.is_replaced():
            self.disconnect()
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

    def _wake_others(self, holders: list[str]) -> None:
        path = self._path.resolve()
        for holder in holders:
            wake_owner(pipe_path(path, holder))
