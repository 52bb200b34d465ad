"""What the SQLite files of this library have in common: how they are created, identified and opened by several."""

import contextlib
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Generator
from pathlib import Path

_RETRY_DELAY = 0.02  # seconds
_FILE_MODE = 0o600
_creating = threading.Lock()
"""Held until a new file is closed, since that would end the locks of another connection of this process."""


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
