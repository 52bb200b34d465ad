"""What the SQLite files of this library have in common: how they are created, identified and opened by several."""

import contextlib
import os
import sqlite3
import threading
import time
import weakref
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Literal
from urllib.parse import quote

_RETRY_DELAY = 0.02  # seconds
_FILE_MODE = 0o600
_creating = threading.Lock()
"""Held until a new file is closed, since that would end the locks of another connection of this process."""


class _Connection(sqlite3.Connection):
    def close(self) -> None:
        super().close()
        _open.pop(self, None)


_open: "weakref.WeakKeyDictionary[_Connection, tuple[int, int] | None]" = weakref.WeakKeyDictionary()
"""The ids of the files that are open in this process."""
_inherited: "dict[tuple[int, int] | None, int]" = {}
"""The ids of the files that were open when this process was forked, and those of the processes that had opened them.

SQLite keeps a table of the files that a process has open and of the locks that it holds. A forked process has a copy of
the table, but not the locks: it would read and write without any, and damage the file. It must not even close it."""


def _on_fork() -> None:
    global _creating  # noqa: PLW0603 - a thread that isn't in this process may have held it
    _creating = threading.Lock()
    for inherited in _open.values():
        _inherited.setdefault(inherited, os.getppid())


with contextlib.suppress(AttributeError):  # Windows has no fork
    os.register_at_fork(after_in_child=_on_fork)


def connect(path: Path, busy_timeout: float, mode: Literal["ro", "rw", "rwc"] = "rwc") -> sqlite3.Connection:
    """Open a file in autocommit mode.

    Args:
        path: The file.
        busy_timeout: Seconds to wait while another connection has it locked.
        mode: "ro" only reads, "rw" also writes, "rwc" also creates the file.

    Raises:
        sqlite3.Error: It can't be opened, or was open when this process was forked.
    """
    if _inherited and (parent_id := _inherited.get(file_id(path))):
        raise sqlite3.OperationalError(
            f"it was open in process {parent_id} when process {os.getpid()} was forked from it, which must not use it: "
            "fork before it is opened, or spawn processes instead"
        )
    address = f"file:{quote(str(path.absolute()))}?mode={mode}"
    connection = sqlite3.connect(address, timeout=busy_timeout, uri=True, isolation_level=None, factory=_Connection)
    _open[connection] = file_id(path)
    return connection


def create_file(path: Path) -> None:
    """Create an empty file that only its owner may read and write, if there is none.

    From the beginning, whatever the umask is. SQLite gives the files beside it the same mode.
    """
    with _creating:
        try:
            descriptor = os.open(path.resolve(), os.O_CREAT | os.O_EXCL | os.O_RDWR, _FILE_MODE)
        except FileExistsError:
            return
        os.close(descriptor)
        path.chmod(_FILE_MODE)


def file_id(path: Path) -> tuple[int, int] | None:
    """Return the device and inode of the file that a path leads to; None if there is none."""
    try:
        status = os.stat(path)  # noqa: PTH116 - half of the time of Path.stat(), and each intent is preceded by it
    except OSError:
        return None
    return status.st_dev, status.st_ino


@contextlib.contextmanager
def transaction(connection: sqlite3.Connection) -> Generator[None]:
    """Run a transaction that waits for other writers first, and is rolled back at an error."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        with contextlib.suppress(sqlite3.Error):
            connection.execute("ROLLBACK")
        raise


def retry_while_locked(function: Callable[[], object], busy_timeout: float) -> None:
    """Call a function again while it fails because the database is locked.

    Raises:
        sqlite3.OperationalError: It is still locked after `busy_timeout` seconds, or the function fails otherwise.
    """
    deadline = time.monotonic() + busy_timeout
    while True:
        try:
            function()
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(_RETRY_DELAY)
        else:
            return
