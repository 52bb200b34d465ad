"""The file that a journal is in: whether it is one, whether those who had it open are gone, and what is wrong."""

import contextlib
import functools
import os
import socket
import sqlite3
import sys
import time
from collections.abc import Callable, Generator
from pathlib import Path
from urllib.parse import quote

from flux2max_async._exceptions import JournalError

VERSION = 1
APPLICATION = 0x464C5832
"""Marks the file as ours, for us and for `file`."""


SCHEMA = (
    """CREATE TABLE entries (
    id INTEGER PRIMARY KEY, key TEXT NOT NULL, attempt INTEGER NOT NULL, content TEXT NOT NULL, state TEXT NOT NULL,
    owner TEXT, task_id TEXT, cost TEXT, outlay INTEGER NOT NULL, created REAL, submitted REAL, ended REAL,
    request TEXT NOT NULL, result TEXT NOT NULL, files TEXT NOT NULL, UNIQUE (key, attempt))""",
    """CREATE TABLE owners (
    id TEXT PRIMARY KEY, beat INTEGER NOT NULL, lease REAL NOT NULL, place TEXT NOT NULL, pid INTEGER NOT NULL)""",
    "CREATE TABLE totals (outlay INTEGER NOT NULL)",
    "INSERT INTO totals VALUES (0)",
    """CREATE TRIGGER made AFTER INSERT ON entries
    BEGIN UPDATE totals SET outlay = outlay + new.outlay; END""",
    """CREATE TRIGGER told AFTER UPDATE OF outlay ON entries WHEN new.outlay != old.outlay
    BEGIN UPDATE totals SET outlay = outlay + new.outlay - old.outlay; END""",
    f"PRAGMA application_id = {APPLICATION}",
    f"PRAGMA user_version = {VERSION}",
)
INDEXES = (
    "CREATE INDEX IF NOT EXISTS tasks ON entries (task_id) WHERE task_id IS NOT NULL",
    "CREATE INDEX IF NOT EXISTS held ON entries (owner) WHERE owner IS NOT NULL",
)


def check_file(path: Path, patience: float) -> None:
    """Look at a file that is there already, without changing a byte of it."""
    with path.open("rb") as file:
        if file.read(16) != b"SQLite format 3\0":
            raise JournalError(f"{path} is not a journal; it was left as it is")
    try:
        _look_inside(path, patience)
    except sqlite3.OperationalError as error:
        if not str(getattr(error, "sqlite_errorname", "")).startswith("SQLITE_READONLY"):
            raise
        # A process was killed while it made the file. What it left is rolled back by whoever may write.
        with contextlib.closing(sqlite3.connect(path, timeout=patience)) as connection:
            connection.execute("SELECT count(*) FROM sqlite_master")
        _look_inside(path, patience)


def _look_inside(path: Path, patience: float) -> None:
    with contextlib.closing(connect_to_read(path, patience)) as connection:
        check_marks(connection, path)
        found = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
        if found != "ok":
            raise JournalError(f"the journal {path} is damaged ({found}); it was left as it is")


def check_marks(connection: sqlite3.Connection, path: Path) -> None:
    # In this order: where another process makes the file just now, the marks are there as soon as the tables are.
    (tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    (application,) = connection.execute("PRAGMA application_id").fetchone()
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if application != APPLICATION and tables:
        raise JournalError(f"{path} is a database, but not a journal; it was left as it is")
    if version > VERSION:
        raise JournalError(
            f"the journal {path} was written by a newer version (schema {version}, known up to {VERSION}): update "
            "flux2max_async; it was left as it is"
        )


def connect_to_read(path: Path, patience: float) -> sqlite3.Connection:
    return sqlite3.connect(
        f"file:{quote(str(path.absolute()))}?mode=ro", timeout=patience, uri=True, isolation_level=None
    )


def patiently(work: Callable[[], object], patience: float) -> None:
    until = time.monotonic() + patience
    while True:
        try:
            work()
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > until:
                raise
            time.sleep(0.02)
        else:
            return


@functools.cache
def here() -> str:
    """Name what process numbers are unique in: this machine, or this container of it."""
    namespace = ""
    with contextlib.suppress(OSError):
        namespace = str(Path("/proc/self/ns/pid").readlink())
    return f"{socket.gethostname()} {namespace}"


def is_gone(place: str, pid: int) -> bool:
    """Tell whether it is certain that a process has ended."""
    if place != here() or sys.platform == "win32":  # there, asking would be killing
        return False
    try:
        with contextlib.suppress(PermissionError):  # it is somebody else's, and alive
            os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


@contextlib.contextmanager
def told_apart(path: Path) -> Generator[None]:
    """Say in our words what is wrong with the file.

    Raises:
        JournalError: Something is.
    """
    try:
        yield
    except (sqlite3.Error, OSError) as error:
        raise journal_error(path, error) from error


def journal_error(path: Path, error: Exception) -> JournalError:
    """Say in our words what is wrong with the file."""
    name = str(getattr(error, "sqlite_errorname", ""))
    for begin, reason in _REASONS:
        if name.startswith(begin):
            return JournalError(f"the journal {path} {reason} ({error})")
    return JournalError(f"the journal {path} can't be used: {getattr(error, 'strerror', None) or error}")


_REASONS = (
    ("SQLITE_FULL", "can't be written: its disk is full"),
    ("SQLITE_READONLY", "can't be written: it is read-only"),
    ("SQLITE_CANTOPEN", "can't be opened"),
    ("SQLITE_BUSY", "is locked by another program"),
    ("SQLITE_CORRUPT", "is damaged; it was left as it is"),
    ("SQLITE_NOTADB", "is damaged; it was left as it is"),
    ("SQLITE_IOERR", "can't be read or written: its disk fails"),
)
