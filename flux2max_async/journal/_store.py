"""The SQL statements that read and write a journal's file, those of the leases included. Blocking.

A transaction is atomic: after a crash, all of it can be seen or nothing.
"""

import contextlib
import os
import secrets
import sqlite3
from decimal import Decimal
from pathlib import Path
from typing import Any

from flux2max_async._budget import check_budget
from flux2max_async._sqlite_files import retry_while_locked
from flux2max_async._text import get_logger
from flux2max_async._wake_pipe import pipe_path, remove_if_dead
from flux2max_async.journal._entry import Holder, JournalEntry
from flux2max_async.journal._leases import HEARTBEAT_INTERVAL
from flux2max_async.journal._row_reader import RowReader
from flux2max_async.journal._rows import (
    MAY_UPDATE,
    NANO_DOLLARS_PER_DOLLAR,
    SELECT,
    intent_columns,
    record_columns,
)
from flux2max_async.journal._schema import (
    ADD_COLUMN,
    ADDITIONS,
    SCHEMA,
    check_version,
    has_token_column,
    host_id,
    process_is_gone,
    translate_sqlite_errors,
)
from flux2max_async.journal._sqlite_file import SqliteFile
from flux2max_async.journal._states import StateTable
from flux2max_async.journal._store_protocol import OtherOwner, Row

log = get_logger("journal")

_LOG_IS_LOST = (
    "journal %s: its log %s-wal is missing, and its last process was killed: what was recorded in the last seconds "
    "before may be lost, and is then submitted and paid for again"
)
_MAX_RESULT_LENGTH = 16_384  # characters of a result that is read ahead


class SqliteStore(SqliteFile):
    """A connection to a journal's file, as one owner of several.

    Args:
        path: The file; it is created if it doesn't exist.
        lease: Seconds without a heartbeat after which other owners may presume this one dead.
        busy_timeout: Seconds to wait while another program has the file locked.
        watch_changes: Whether other owners may wake this one.

    Raises:
        JournalError: The file can't be opened, isn't a journal, is damaged, or a newer version wrote it.
    """

    def __init__(self, path: Path, lease: float, busy_timeout: float, *, watch_changes: bool = False) -> None:
        super().__init__(path, busy_timeout)
        self.owner = secrets.token_hex(8)
        self.heartbeat_interval = lease * HEARTBEAT_INTERVAL
        self._lease = lease
        self._rows = RowReader(path, self.owner)
        self.states = StateTable(path, self._read_state, self._write_state)
        try:
            with translate_sqlite_errors(path):
                self._prepare(busy_timeout)
                self._opened()
                self.is_empty: bool = self._value("SELECT NOT EXISTS (SELECT 1 FROM entries)") == 1
        except BaseException:
            self._connection.close()
            raise
        if watch_changes:
            self._create_pipe(self.owner)

    def _prepare(self, busy_timeout: float) -> None:
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
            for statement in ADDITIONS:
                execute(statement)
            others = self.other_owners()
            for owner_id, other in others.items():
                if other.is_gone:
                    self.drop_owner(owner_id)
            self.heartbeat()
        # Without a log, whoever has begun a file has created its tables, and whoever has ended has dropped its row.
        was_killed = any(other.is_gone for other in others.values())
        if (was_killed and not self._log_size) or (is_new and self._had_content and self._log_size is None):
            log.error(_LOG_IS_LOST, self._path, self._path.name)

    def close(self) -> None:
        """Drop this owner, and close the connection."""
        with contextlib.suppress(sqlite3.Error):
            self.drop_owner(self.owner)
        self._close_file()

    # ------------------------------------------------------------------ entries

    def entry(self, row: Row) -> JournalEntry:
        """Return the entry of a row."""
        return self._rows.entry(row)

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
        return row and self.entry(row)

    def find_token(self, token: str) -> JournalEntry | None:
        """Return the entry that was begun with a token."""
        row = self._connection.execute(f"{SELECT} WHERE e.token = ?", (token,)).fetchone()
        return row and self.entry(row)

    def ended_entries(self) -> list[JournalEntry]:
        """Return the entries that are held here and have ended; other sessions may have recorded these ends."""
        rows = self._connection.execute(
            f"{SELECT} WHERE e.owner = ? AND e.state IN ('completed', 'failed')", (self.owner,)
        )
        return [entry for _, entry in self._rows.readable(rows.fetchall(), ended=True)]

    def begin(self, entry: JournalEntry, limit: Decimal | None, begin_id: int = 0) -> bool:  # noqa: ARG002 - never repeated
        """Insert an intent that is held here; return False if its attempt exists and isn't REFUSED."""
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
        """Update an entry as far as this owner may (see `MAY_UPDATE`); known ids, costs and files are kept."""
        updated = self._connection.execute(
            "UPDATE entries SET state = :state, owner = CASE WHEN :keep_owner THEN owner ELSE :owner END,"
            " task_id = coalesce(:task_id, task_id), cost = coalesce(:cost, cost), outlay = :outlay,"
            " submitted = coalesce(:submitted, submitted), ended = :ended, result = :result,"
            " files = CASE :files WHEN '[]' THEN files ELSE :files END"
            f" WHERE key = :key AND attempt = :attempt AND ({MAY_UPDATE})",
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

    def watch(self, entry: JournalEntry) -> None:
        """Do nothing: any change of the file is noticed."""

    def unchanged(self, entries: list[JournalEntry]) -> list[bool]:
        """Return, for each entry, whether neither its state nor its holder has changed since it was read."""
        return [self._rows.is_unchanged(entry, self.find_row(entry.key)) for entry in entries]

    def _read_state(self, name: str) -> Any:
        row = self._connection.execute("SELECT value FROM states WHERE name = ?", (name,)).fetchone()
        return row and row[0]

    def _write_state(self, name: str, value: str) -> None:
        self._connection.execute("INSERT OR REPLACE INTO states VALUES (?, ?)", (name, value))

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
        readable = list(self._rows.readable(map(self._rows.adopted, rows)))
        for entry_id, _ in readable:
            execute("UPDATE entries SET owner = ? WHERE id = ?", (self.owner, entry_id))
        return [entry for _, entry in readable]

    def _value(self, statement: str) -> Any:
        return self._connection.execute(statement).fetchone()[0]
