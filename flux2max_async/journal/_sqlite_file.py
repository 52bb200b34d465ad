"""The connection to a journal's SQLite file: what is special about files, and nothing about entries. Blocking."""

import contextlib
import math
import sqlite3
import sys
import time
from collections.abc import Generator
from pathlib import Path

from flux2max_async._exceptions import JournalError
from flux2max_async._sqlite_files import connect, create_file, file_id, transaction
from flux2max_async._text import get_logger
from flux2max_async._wake_pipe import WakePipe, pipe_path, wake_owner
from flux2max_async.journal._rows import decode_text
from flux2max_async.journal._schema import check_file, journal_error, may_pass, translate_sqlite_errors

log = get_logger("journal")

_CHECK_INTERVAL = 0.25
"""Seconds between checks for changes by other processes, while somebody waits for them."""
_CHECKPOINT_INTERVAL = 3.0
"""Seconds after a write until SQLite's log is copied to the file; twice that if there are jobs all the time."""


class SqliteFile:
    """A connection to a journal's file, which is created if it doesn't exist.

    Raises:
        JournalError: The file can't be opened, isn't a journal, or is damaged.
    """

    is_connected = True
    errors: tuple[type[Exception], ...] = (sqlite3.Error,)

    def __init__(self, path: Path, busy_timeout: float) -> None:
        self._path = path
        self._durable = True
        self._problem: JournalError | None = None
        self._pipe: WakePipe | None = None
        """Through which other owners report that they have recorded an end, if they are expected to."""
        self.check_interval = _CHECK_INTERVAL
        self.upkeep_at: float | None = time.monotonic() + _CHECKPOINT_INTERVAL
        """When the log is to be copied; None if the file itself holds everything."""
        with translate_sqlite_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._logs = [Path(f"{path.resolve()}{suffix}") for suffix in ("-wal", "-shm")]
            self._log_size = self._logs[0].stat().st_size if self._logs[0].exists() else None
            self._had_content = path.exists() and path.stat().st_size > 0
            if self._had_content:
                check_file(path, busy_timeout)  # which may create an empty log
            create_file(path)
            self._connection = connect(path, busy_timeout)
            self._connection.text_factory = decode_text
            self._file_id = file_id(path)

    def _opened(self) -> None:
        """Note which files belong together, once the log exists."""
        self._log_ids = [(log_path, file_id(log_path)) for log_path in self._logs]
        self._data_version = self._get_data_version()

    def reconnect(self) -> None:
        """Do nothing: a file that is open stays open."""

    def _close_file(self) -> None:
        try:
            with contextlib.suppress(sqlite3.Error):
                if self._is_replaced():
                    self._detach()
        finally:
            self._connection.close()
            if self._pipe is not None:
                self._pipe.close()

    # ------------------------------------------------------------------ failures

    def journal_error(self, error: Exception) -> JournalError:
        """Return the error that explains a failure of the file."""
        failure = journal_error(self._path, error)
        failure.__cause__ = error
        return failure

    def may_pass(self, error: Exception) -> bool:
        """Check whether the same write may succeed later: there is no space now, say, or a lock was in the way."""
        return may_pass(error)

    def is_interrupted(self, error: Exception) -> bool:  # noqa: ARG002 - no connection gets lost
        """Return False: an error of a file is one of its jobs."""
        return False

    def problem(self) -> JournalError | None:
        """Return an error once the file is another one: the next run wouldn't find what is begun now, and pay again."""
        if self._problem is None and self._is_replaced():
            self._problem = JournalError(
                f"the journal {self._path} was deleted, replaced or moved while it was open: nothing more is submitted,"
                " and tasks that are running are recorded in the file that was opened"
            )
            self._detach()
            log.error("%s", self._problem)
        return self._problem

    def _is_replaced(self) -> bool:
        """Check whether the file that is open was deleted, replaced or moved: its path leads to another one, or none.

        Not on Windows, which keeps files that are open from being deleted or moved.
        """
        return sys.platform != "win32" and file_id(self._path) != self._file_id

    def _detach(self) -> None:
        """Copy SQLite's log to the file that was moved, and delete the log's names, as far as they are still its own.

        Whoever opens another file under the journal's name would share the log and its locks, and damage both files.
        """
        with contextlib.suppress(sqlite3.Error, OSError):
            self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
            if all(file_id(log_path) == log_id for log_path, log_id in self._log_ids):
                for log_path, _ in self._log_ids:
                    log_path.unlink()

    # ------------------------------------------------------------------ transactions and upkeep

    def set_synchronous(self, *, durable: bool) -> None:
        """Set whether the following commits wait until the disk has stored them."""
        if durable != self._durable:
            self._connection.execute(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
            self._durable = durable

    @contextlib.contextmanager
    def transaction(self, *, durable: bool) -> Generator[None]:
        """Run a transaction. A durable commit stores all earlier commits, too."""
        self.set_synchronous(durable=durable)
        with transaction(self._connection):
            yield

    def schedule_upkeep(self) -> None:
        """Plan to copy SQLite's log."""
        if self.upkeep_at is None:
            self.upkeep_at = time.monotonic() + _CHECKPOINT_INTERVAL

    def upkeep(self, *, is_idle: bool) -> None:
        """Copy SQLite's log to the file when nobody waits for the thread, or it is long overdue."""
        late = -math.inf if self.upkeep_at is None else time.monotonic() - self.upkeep_at
        if late < 0 or (late < _CHECKPOINT_INTERVAL and not is_idle):
            return
        try:
            complete = self.checkpoint()
        except sqlite3.Error as error:
            log.warning("%s", journal_error(self._path, error))
            complete = False
        self.upkeep_at = None if complete else time.monotonic() + _CHECKPOINT_INTERVAL

    def checkpoint(self) -> bool:
        """Copy what is in SQLite's log to the file itself, as far as no reader is in the way; return whether all is.

        The file alone then holds what was written so far, for backups and for a log that gets lost.
        """
        _, logged, copied = self._connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
        return bool(logged == copied)

    # ------------------------------------------------------------------ changes by other processes

    def _create_pipe(self, owner: str) -> None:
        # Without a pipe, as on Windows, changes are found by the checks alone.
        with contextlib.suppress(OSError, AttributeError):
            self._pipe = WakePipe(pipe_path(self._path.resolve(), owner))

    def fileno(self) -> int | None:
        """Return the descriptor that is readable when another owner wakes this one; None without a pipe."""
        return None if self._pipe is None else self._pipe.fileno()

    def receive(self) -> None:
        """Empty the pipe."""
        assert self._pipe is not None  # it has a descriptor
        self._pipe.clear()

    def changed_externally(self) -> bool:
        """Check whether another connection has changed the file since the previous call."""
        previous, self._data_version = self._data_version, self._get_data_version()
        return bool(previous != self._data_version)

    def _get_data_version(self) -> int:
        version: int = self._connection.execute("PRAGMA data_version").fetchone()[0]
        return version

    def wake(self, owner: str) -> None:
        """Wake another owner, if it has a pipe."""
        wake_owner(pipe_path(self._path.resolve(), owner))
