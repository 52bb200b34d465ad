"""The SQL statements that read and write a journal's file, those of the leases included. Blocking.

A transaction is atomic: after a crash, all of it can be seen or nothing.
"""

import contextlib
import os
import secrets
import sqlite3
import sys
from collections.abc import Generator, Iterable
from decimal import Decimal
from pathlib import Path
from typing import Any

from flux2max_async._budget import check_budget
from flux2max_async._exceptions import JournalError
from flux2max_async._sqlite_files import create_file, file_id, retry_while_locked, transaction
from flux2max_async._text import get_logger
from flux2max_async._wake_pipe import pipe_path, remove_if_dead
from flux2max_async.journal._entry import Holder, JournalEntry
from flux2max_async.journal._rows import (
    NANO_DOLLARS_PER_DOLLAR,
    SELECT,
    Row,
    decode_text,
    entry_from_row,
    intent_columns,
    record_columns,
    row_id,
)
from flux2max_async.journal._schema import (
    ADD_COLUMN,
    INDEXES,
    SCHEMA,
    OtherOwner,
    check_file,
    check_version,
    has_token_column,
    host_id,
    process_is_gone,
    translate_sqlite_errors,
)
from flux2max_async.journal._serialization import outcome_from_entry

log = get_logger("journal")

_LOG_IS_LOST = (
    "journal %s: its log %s-wal is missing, and its last process was killed: what was recorded in the last seconds "
    "before may be lost, and is then submitted and paid for again"
)
_MAX_RESULT_LENGTH = 16_384  # characters of a result that is read ahead

# The holder may change everything, but a task stays a task, an end stays an end, and a completed request stays
# completed: a webhook may have revealed the task of a submit whose answer was lost. Others may add what isn't recorded
# yet: a task id, an end, or that the intent of a dropped owner is uncertain. An entry that nobody holds may be recorded
# again in the same state, with images that were saved since.
_MAY_UPDATE = """
    owner = :us AND (state NOT IN ('completed', 'failed') OR :state IN (state, 'completed'))
        AND (state != 'submitted' OR :state IN ('submitted', 'completed', 'failed'))
    OR owner IS NULL AND state = :state AND NOT :keep_owner
    OR state IN ('intent', 'uncertain', 'refused') AND :state IN ('submitted', 'completed', 'failed')
    OR state = 'submitted' AND :state IN ('completed', 'failed')
    OR state = 'intent' AND :state = 'uncertain' AND (owner IS NULL OR owner NOT IN (SELECT id FROM owners))
"""


class SqliteStore:
    """A connection to a journal's file, as one owner of several.

    Args:
        path: The file; it is created if it doesn't exist.
        lease: Seconds without a heartbeat after which other owners may presume this one dead.
        busy_timeout: Seconds to wait while another program has the file locked.

    Raises:
        JournalError: The file can't be opened, isn't a journal, is damaged, or a newer version wrote it.
    """

    def __init__(self, path: Path, lease: float, busy_timeout: float) -> None:
        self.owner = secrets.token_hex(8)
        self._path = path
        self._lease = lease
        self._durable = True
        with translate_sqlite_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            logs = [Path(f"{path.resolve()}{suffix}") for suffix in ("-wal", "-shm")]
            log_size = logs[0].stat().st_size if logs[0].exists() else None
            has_content = path.exists() and path.stat().st_size > 0
            if has_content:
                check_file(path, busy_timeout)  # which may create an empty log
            create_file(path)
            self._connection = sqlite3.connect(path, timeout=busy_timeout, isolation_level=None)
            self._connection.text_factory = decode_text
            self._file_id = file_id(path)
            self._reported_rows: set[int] = set()
            try:
                self._prepare(busy_timeout, has_content=has_content, log_size=log_size)
                self._log_ids = [(log_path, file_id(log_path)) for log_path in logs]
                self._data_version = self._value("PRAGMA data_version")
                self.is_empty: bool = self._value("SELECT NOT EXISTS (SELECT 1 FROM entries)") == 1
            except BaseException:
                self._connection.close()
                raise

    def _prepare(self, busy_timeout: float, *, has_content: bool, log_size: int | None) -> None:
        execute = self._connection.execute
        # Several processes may create the file at once, and SQLite refuses to switch to WAL then without waiting.
        execute("PRAGMA auto_vacuum = INCREMENTAL")  # before a new file has a page; prune() makes the file smaller
        retry_while_locked(lambda: execute("PRAGMA journal_mode = WAL"), busy_timeout)
        execute("PRAGMA synchronous = FULL")
        execute("PRAGMA fullfsync = 1")  # macOS: flushes the drive's own cache, too
        with self.transaction(durable=True):
            if is_new := not self._value("SELECT count(*) FROM sqlite_master"):
                for statement in SCHEMA:
                    execute(statement)
            check_version(self._connection, self._path)
            if not has_token_column(self._connection):
                execute(ADD_COLUMN)
            for statement in INDEXES:
                execute(statement)
            others = self.other_owners()
            for owner_id, other in others.items():
                if other.is_gone:
                    self.drop_owner(owner_id)
            self.heartbeat()
        # Without a log, whoever has begun a file has created its tables, and whoever has ended has dropped its row.
        was_killed = any(other.is_gone for other in others.values())
        if (was_killed and not log_size) or (is_new and has_content and log_size is None):
            log.error(_LOG_IS_LOST, self._path, self._path.name)

    def close(self) -> None:
        """Drop this owner, and close the connection."""
        try:
            with contextlib.suppress(sqlite3.Error):
                self.drop_owner(self.owner)
                if self.is_replaced():
                    self.detach()
        finally:
            self._connection.close()

    # ------------------------------------------------------------------ the file

    def is_replaced(self) -> bool:
        """Check whether the file that is open was deleted, replaced or moved: its path leads to another one, or none.

        Not on Windows, which keeps files that are open from being deleted or moved.
        """
        return sys.platform != "win32" and file_id(self._path) != self._file_id

    def detach(self) -> None:
        """Copy SQLite's log to the file that was moved, and delete the log's names, as far as they are still its own.

        Whoever opens another file under the journal's name would share the log and its locks, and damage both files.
        """
        with contextlib.suppress(sqlite3.Error, OSError):
            self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
            if all(file_id(log_path) == log_id for log_path, log_id in self._log_ids):
                for log_path, _ in self._log_ids:
                    log_path.unlink()

    def checkpoint(self) -> bool:
        """Copy what is in SQLite's log to the file itself, as far as no reader is in the way; return whether all is.

        The file alone then holds what was written so far, for backups and for a log that gets lost.
        """
        _, logged, copied = self._connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
        return bool(logged == copied)

    # ------------------------------------------------------------------ transactions

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

    def changed_externally(self) -> bool:
        """Check whether another connection has changed the file since the previous call."""
        previous, self._data_version = self._data_version, self._value("PRAGMA data_version")
        return bool(previous != self._data_version)

    # ------------------------------------------------------------------ entries

    def find(self, key: str) -> JournalEntry | None:
        """Return the newest entry of a key."""
        row = self.find_row(key)
        return None if row is None else self._entry(row)

    def find_row(self, key: str) -> Row | None:
        """Return the row of the newest entry of a key."""
        statement = f"{SELECT} WHERE e.key = ? ORDER BY e.attempt DESC LIMIT 1"
        row: Row | None = self._connection.execute(statement, (key,)).fetchone()
        return row

    def completed_rows(self, ids: range) -> list[Row]:
        """Return the rows, among those with the ids, of completed entries of moderate size that nobody holds."""
        return self._connection.execute(
            f"{SELECT} WHERE e.id >= ? AND e.id < ? AND e.state = 'completed' AND e.owner IS NULL"
            " AND length(e.result) <= ?"
            " AND NOT EXISTS (SELECT 1 FROM entries n WHERE n.key = e.key AND n.attempt > e.attempt)",
            (ids.start, ids.stop, _MAX_RESULT_LENGTH),
        ).fetchall()

    def find_task(self, task_id: str) -> JournalEntry | None:
        """Return the newest entry of a task."""
        statement = f"{SELECT} WHERE e.task_id = ? ORDER BY e.id DESC LIMIT 1"
        row = self._connection.execute(statement, (task_id,)).fetchone()
        return row and self._entry(row)

    def find_token(self, token: str) -> JournalEntry | None:
        """Return the entry that was begun with a token."""
        row = self._connection.execute(f"{SELECT} WHERE e.token = ?", (token,)).fetchone()
        return row and self._entry(row)

    def ended_entries(self) -> list[JournalEntry]:
        """Return the entries that are held here and have ended; other sessions may have recorded these ends."""
        rows = self._connection.execute(
            f"{SELECT} WHERE e.owner = ? AND e.state IN ('completed', 'failed')", (self.owner,)
        )
        return [entry for _, entry in self._readable(rows.fetchall(), ended=True)]

    def begin(self, entry: JournalEntry, limit: Decimal | None) -> bool:
        """Insert an intent that is held here; return False if its attempt exists and isn't REFUSED.

        Raises:
            BudgetExceededError: All entries together would commit more than the limit, in US dollars.
        """
        execute = self._connection.execute
        if limit is not None:
            exists = "SELECT 1 FROM entries WHERE key = ? AND attempt = ? AND state != 'refused'"
            if execute(exists, (entry.key, entry.attempt)).fetchone():
                return False
            committed = Decimal(self._value("SELECT outlay FROM totals")) / NANO_DOLLARS_PER_DOLLAR
            check_budget(limit, committed, entry.committed)
        inserted: int = execute(
            "INSERT INTO entries (key, attempt, content, state, owner, outlay, created, token, request, result, files)"
            " VALUES (:key, :attempt, :content, 'intent', :us, :outlay, :created, :token, :request, '{}', '[]')"
            " ON CONFLICT (key, attempt) DO UPDATE SET"
            " content = excluded.content, state = 'intent', owner = excluded.owner, outlay = excluded.outlay,"
            " created = excluded.created, ended = NULL, token = excluded.token, request = excluded.request,"
            " result = '{}' WHERE state = 'refused'",
            {**intent_columns(entry), "us": self.owner},
        ).rowcount
        return inserted == 1

    def adopt(self, entry: JournalEntry) -> bool:
        """Hold an entry; return False if its state or owner has changed since it was read."""
        adopted: int = self._connection.execute(
            "UPDATE entries SET owner = ? WHERE key = ? AND attempt = ? AND state = ? AND owner IS ?",
            (self.owner, entry.key, entry.attempt, entry.state, entry.owner),
        ).rowcount
        return adopted == 1

    def record(self, entry: JournalEntry) -> None:
        """Update an entry as far as this owner may (see `_MAY_UPDATE`); known ids, costs and files are kept."""
        updated = self._connection.execute(
            "UPDATE entries SET state = :state, owner = CASE WHEN :keep_owner THEN owner ELSE :owner END,"
            " task_id = coalesce(:task_id, task_id), cost = coalesce(:cost, cost), outlay = :outlay,"
            " submitted = coalesce(:submitted, submitted), ended = :ended, result = :result,"
            " files = CASE :files WHEN '[]' THEN files ELSE :files END"
            f" WHERE key = :key AND attempt = :attempt AND ({_MAY_UPDATE})",
            {
                **record_columns(entry),
                "owner": self.owner if entry.holder is Holder.US else None,
                "keep_owner": entry.holder is Holder.OTHER,
                "us": self.owner,
            },
        ).rowcount
        if not updated and entry.holder is None:
            # Another session has recorded more, but this one releases the entry all the same.
            self._connection.execute(
                "UPDATE entries SET owner = NULL WHERE key = ? AND attempt = ? AND owner = ?",
                (entry.key, entry.attempt, self.owner),
            )

    def is_unchanged(self, entry: JournalEntry) -> bool:
        """Check whether neither an entry's state nor its holder has changed since it was read."""
        found = self.find(entry.key)
        return found is not None and (found.attempt, found.state, found.owner, found.holder) == (
            entry.attempt, entry.state, entry.owner, entry.holder,
        )  # fmt: skip

    # ------------------------------------------------------------------ owners

    def heartbeat(self) -> bool:
        """Increment this owner's heartbeat counter; insert its row and return False if it has none."""
        owner, execute = (self.owner, self._lease, host_id(), os.getpid()), self._connection.execute
        if not (found := execute("UPDATE owners SET beat = beat + 1 WHERE id = ?", owner[:1]).rowcount > 0):
            execute("INSERT INTO owners VALUES (?, 0, ?, ?, ?)", owner)
        return found

    def other_owners(self) -> dict[str, OtherOwner]:
        """Return all other owners by their ids."""
        rows = self._connection.execute("SELECT id, beat, lease, place, pid FROM owners WHERE id != ?", (self.owner,))
        return {
            owner_id: OtherOwner(heartbeat, lease, process_is_gone(host, pid))
            for owner_id, heartbeat, lease, host, pid in rows.fetchall()
        }

    def drop_owner(self, owner_id: str) -> None:
        """Delete an owner's row: what it holds is orphaned."""
        self._connection.execute("DELETE FROM owners WHERE id = ?", (owner_id,))
        remove_if_dead(pipe_path(self._path.resolve(), owner_id))

    def adopt_from(self, owner_id: str) -> list[JournalEntry]:
        """Hold the tasks of a dropped owner, and return them; mark its intents as uncertain. Skip damaged rows."""
        execute = self._connection.execute
        is_orphan = "owner = ? AND NOT EXISTS (SELECT 1 FROM owners WHERE id = owner)"
        execute(
            f"UPDATE entries SET state = 'uncertain', owner = NULL WHERE state = 'intent' AND {is_orphan}", (owner_id,)
        )
        rows = execute(f"{SELECT} WHERE e.state = 'submitted' AND e.{is_orphan}", (owner_id,)).fetchall()
        readable = list(self._readable((*row[:4], self.owner, *row[5:]) for row in rows))
        for entry_id, _ in readable:
            execute("UPDATE entries SET owner = ? WHERE id = ?", (self.owner, entry_id))
        return [entry for _, entry in readable]

    def _entry(self, row: Row) -> JournalEntry:
        return entry_from_row(self._path, row, self.owner)

    def _readable(self, rows: Iterable[Row], *, ended: bool = False) -> Generator[tuple[int, JournalEntry]]:
        """Yield the entries of rows with their ids; log each row that is damaged once."""
        for row in rows:
            try:
                entry = self._entry(row)
                if ended:
                    outcome_from_entry(entry, None)
                yield row_id(row), entry
            except JournalError as error:
                if row_id(row) not in self._reported_rows:
                    self._reported_rows.add(row_id(row))
                    log.warning("%s", error)

    def _value(self, statement: str) -> Any:
        return self._connection.execute(statement).fetchone()[0]
