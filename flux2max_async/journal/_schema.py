"""The journal's SQLite file: its schema and versions, the checks before it is used, and the translation of errors."""

import contextlib
import functools
import os
import socket
import sqlite3
import sys
from collections.abc import Generator
from pathlib import Path

from flux2max_async._exceptions import JournalError
from flux2max_async._sqlite_files import connect
from flux2max_async.journal._states import CREATE_STATES

SCHEMA_VERSION = 1
# Marks the file as a journal, for this library and for file(1): "FLX2" in ASCII.
APPLICATION_ID = 0x464C5832

# Existing journals must stay readable, so the columns keep the names that they were created with. Some differ from the
# names in the code:
#   entries.content = JournalEntry.fingerprint            entries.outlay = JournalEntry.committed, in nano-dollars
#   entries.created, .submitted, .ended = ..._at, in seconds since the epoch
#   owners.beat = the heartbeat counter                   owners.place = host_id()
#   totals.outlay = the sum of entries.outlay, which the triggers maintain
# Earlier versions of the library must be able to read and write the same file, so further columns are nullable, are
# added to existing tables, further tables are none that those need, and neither changes the schema's version.
SCHEMA = (
    """CREATE TABLE entries (
    id INTEGER PRIMARY KEY, key TEXT NOT NULL, attempt INTEGER NOT NULL, content TEXT NOT NULL, state TEXT NOT NULL,
    owner TEXT, task_id TEXT, cost TEXT, outlay INTEGER NOT NULL, created REAL, submitted REAL, ended REAL,
    request TEXT NOT NULL, result TEXT NOT NULL, files TEXT NOT NULL, UNIQUE (key, attempt))""",
    """CREATE TABLE owners (
    id TEXT PRIMARY KEY, beat INTEGER NOT NULL, lease REAL NOT NULL, place TEXT NOT NULL, pid INTEGER NOT NULL)""",
    "CREATE TABLE totals (outlay INTEGER NOT NULL)",
    "INSERT INTO totals VALUES (0)",
    """CREATE TRIGGER add_to_total AFTER INSERT ON entries
    BEGIN UPDATE totals SET outlay = outlay + new.outlay; END""",
    """CREATE TRIGGER update_total AFTER UPDATE OF outlay ON entries WHEN new.outlay != old.outlay
    BEGIN UPDATE totals SET outlay = outlay + new.outlay - old.outlay; END""",
    f"PRAGMA application_id = {APPLICATION_ID}",
    f"PRAGMA user_version = {SCHEMA_VERSION}",
)
ADD_COLUMN = "ALTER TABLE entries ADD COLUMN token TEXT"  # = JournalEntry.webhook_token
ADDITIONS = (
    CREATE_STATES,
    "CREATE INDEX IF NOT EXISTS tasks ON entries (task_id) WHERE task_id IS NOT NULL",
    "CREATE INDEX IF NOT EXISTS held ON entries (owner) WHERE owner IS NOT NULL",
    "CREATE INDEX IF NOT EXISTS tokens ON entries (token) WHERE token IS NOT NULL",
)


# ------------------------------------------------------------------ checks


def check_file(path: Path, busy_timeout: float) -> None:
    """Check that an existing file is an undamaged journal, without changing a byte of it.

    Raises:
        JournalError: It is not.
    """
    # Only SQLite opens the file: with any other descriptor that is closed, POSIX ends all locks of this process on the
    # file. Another process would then delete the log that this one goes on writing to.
    try:
        _check_database(path, busy_timeout)
    except sqlite3.DatabaseError as error:
        name = str(getattr(error, "sqlite_errorname", ""))
        if name == "SQLITE_NOTADB" and not _begins_as_database(path):
            raise JournalError(f"{path} is not a journal; it was left as it is") from error
        if not name.startswith("SQLITE_READONLY"):
            raise
        roll_back(path, busy_timeout)
        _check_database(path, busy_timeout)


def roll_back(path: Path, busy_timeout: float) -> None:
    """Undo what a process has begun that was killed while it created the file; until then it can't be read.

    SQLite does so on the first read over a connection that may write.
    """
    with contextlib.closing(connect(path, busy_timeout)) as connection:
        connection.execute("SELECT count(*) FROM sqlite_master")


def _begins_as_database(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(16) == b"SQLite format 3\0"


def _check_database(path: Path, busy_timeout: float) -> None:
    with contextlib.closing(connect_read_only(path, busy_timeout)) as connection:
        check_version(connection, path)
        result = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
        if result != "ok":
            raise JournalError(f"the journal {path} is damaged ({result}); it was left as it is")


def check_version(connection: sqlite3.Connection, path: Path) -> None:
    """Check that a database is empty or a journal of a known version.

    Raises:
        JournalError: It is another application's database, or a newer version wrote it.
    """
    # The tables must be counted first: if another process creates the file right now, its application id is set by the
    # time its tables can be seen.
    (tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    (application_id,) = connection.execute("PRAGMA application_id").fetchone()
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if application_id != APPLICATION_ID and tables:
        raise JournalError(f"{path} is a database, but not a journal; it was left as it is")
    if version > SCHEMA_VERSION:
        raise JournalError(
            f"the journal {path} was written by a newer version (schema {version}, known up to {SCHEMA_VERSION}): "
            "update flux2max_async; it was left as it is"
        )


def has_token_column(connection: sqlite3.Connection) -> bool:
    """Check whether a journal's entries have the column that earlier versions of the library don't create."""
    rows = connection.execute("SELECT 1 FROM pragma_table_info('entries') WHERE name = 'token'")
    return rows.fetchone() is not None


# ------------------------------------------------------------------ files, connections and processes


def connect_read_only(path: Path, busy_timeout: float) -> sqlite3.Connection:
    return connect(path, busy_timeout, "ro")


def connect_existing(path: Path, busy_timeout: float) -> sqlite3.Connection:
    return connect(path, busy_timeout, "rw")


@functools.cache
def host_id() -> str:
    """Return a name for the scope in which process ids are unique: this machine, or this container on it."""
    pid_namespace = ""
    with contextlib.suppress(OSError):
        pid_namespace = str(Path("/proc/self/ns/pid").readlink())
    return f"{socket.gethostname()} {pid_namespace}"


def process_is_gone(host: str, pid: int) -> bool:
    """Check whether a process has certainly ended; False if that can't be known, as on another host."""
    if host != host_id() or sys.platform == "win32":  # on Windows, os.kill() would terminate the process
        return False
    try:
        with contextlib.suppress(PermissionError):  # another user's process, which is alive
            os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


# ------------------------------------------------------------------ errors


@contextlib.contextmanager
def translate_sqlite_errors(path: Path) -> Generator[None]:
    """Raise errors of SQLite and the file system as JournalError.

    Raises:
        JournalError: The file can't be read or written.
    """
    try:
        yield
    except (sqlite3.Error, OSError) as error:
        raise journal_error(path, error) from error


def journal_error(path: Path, error: Exception) -> JournalError:
    """Return the JournalError that explains an error of SQLite or the file system."""
    name = str(getattr(error, "sqlite_errorname", ""))
    for prefix, reason in _REASONS:
        if name.startswith(prefix):
            return JournalError(f"the journal {path} {reason} ({error})")
    return JournalError(f"the journal {path} can't be used: {getattr(error, 'strerror', None) or error}")


def may_pass(error: Exception) -> bool:
    """Check whether the same write may succeed later: there is no space now, or the disk or a lock was in the way."""
    return str(getattr(error, "sqlite_errorname", "")).startswith(_PASSING)


# The beginnings of SQLite's error names: https://sqlite.org/rescode.html
_PASSING = ("SQLITE_FULL", "SQLITE_IOERR", "SQLITE_BUSY", "SQLITE_READONLY", "SQLITE_CANTOPEN")
_REASONS = (
    ("SQLITE_FULL", "can't be written: its disk is full"),
    ("SQLITE_READONLY", "can't be written: it is read-only"),
    ("SQLITE_CANTOPEN", "can't be opened"),
    ("SQLITE_BUSY", "is locked by another program"),
    ("SQLITE_CORRUPT", "is damaged; it was left as it is"),
    ("SQLITE_NOTADB", "is damaged; it was left as it is"),
    ("SQLITE_IOERR", "can't be read or written: its disk fails"),
)
