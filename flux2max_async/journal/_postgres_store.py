"""The SQL statements that read and write a journal in PostgreSQL, those of its owners included. Blocking.

A transaction is atomic, and whoever waits for a row that another one has changed checks its own conditions again: two
owners never begin, or adopt, the same entry.
"""

import contextlib
import math
import re
import time
from decimal import Decimal

from flux2max_async._budget import check_budget
from flux2max_async._exceptions import JournalError
from flux2max_async._postgres import LIVING, PostgresAddress, lock_number
from flux2max_async.journal._entry import Holder, JournalEntry
from flux2max_async.journal._postgres_connection import PostgresConnection
from flux2max_async.journal._row_reader import RowReader
from flux2max_async.journal._rows import (
    COLUMNS,
    MAY_UPDATE,
    NANO_DOLLARS_PER_DOLLAR,
    intent_columns,
    record_columns,
    row_id,
)
from flux2max_async.journal._states import StateTable
from flux2max_async.journal._store_protocol import OtherOwner, Pending, Row

_MAX_RESULT_LENGTH = 16_384  # characters of a result that is read ahead
_MAX_KEY_BYTES = 2_000
"""An index of PostgreSQL can't hold much more."""
# In the place of what SQLite knows of another owner's process: no process is gone from a place without a name. An owner
# that is gone has no row.
_COLUMNS = COLUMNS.replace("o.place, o.pid", "'', 0")
SELECT = f"SELECT {_COLUMNS}, e.id FROM entries e LEFT JOIN owners o ON o.id = e.owner"
SELECT_LIVING = f"{SELECT} AND o.lock IN ({LIVING})"
"""The same for readers, whose view of the owners nobody keeps up to date."""


def _named(statement: str) -> str:
    """Return a statement with its parameters as psycopg wants them."""
    return re.sub(r"(?<!:):(\w+)", r"%(\1)s", statement)


_BEGIN = _named("""
    INSERT INTO entries AS e
        (key, attempt, content, state, owner, outlay, created, token, request, result, files, begin_id)
    VALUES (:key, :attempt, :content, 'intent', :us, :outlay, :created, :token, :request, '{}', '[]', :begin_id)
    ON CONFLICT (key, attempt) DO UPDATE SET
        content = excluded.content, state = 'intent', owner = excluded.owner, outlay = excluded.outlay,
        created = excluded.created, ended = NULL, token = excluded.token, request = excluded.request, result = '{}',
        begin_id = excluded.begin_id
    WHERE e.state = 'refused' OR e.begin_id = excluded.begin_id AND e.state IN ('intent', 'uncertain')
        AND NOT EXISTS (SELECT 1 FROM entries n WHERE n.key = e.key AND n.attempt > e.attempt)
    RETURNING e.id
""")
_RECORD = _named(f"""
    UPDATE entries SET state = :state, owner = CASE WHEN :keep_owner THEN owner ELSE :owner END,
        task_id = coalesce(:task_id, task_id), cost = coalesce(:cost, cost), outlay = :outlay,
        submitted = coalesce(:submitted, submitted), ended = :ended, result = :result,
        files = CASE :files WHEN '[]' THEN files ELSE :files END
    WHERE key = :key AND attempt = :attempt AND ({MAY_UPDATE}) RETURNING watched, id, owner
""")
_OTHERS = f"""
    SELECT id, lock, CASE WHEN id = %s THEN true ELSE lock IN ({LIVING}) END,
        clock_timestamp() - pg_postmaster_start_time() < make_interval(secs => %s)
    FROM owners
"""


class PostgresStore(PostgresConnection):
    """A connection to a journal in PostgreSQL, as one owner of several.

    Args:
        address: The database and the schema, which is created if it doesn't exist.
        lease: Seconds after which a connection that doesn't react any more is ended by either side.

    Raises:
        JournalError: The database can't be reached, or the schema is not a journal of this version.
    """

    def __init__(self, address: PostgresAddress, lease: float) -> None:
        super().__init__(address, lease)
        self._rows = RowReader(address, self.owner)
        self.states = StateTable(address, self._read_state, self._write_state)
        self._budget_lock = lock_number("journal budget", address.schema)
        self._other_locks: dict[str, int] = {}
        self._others: dict[str, OtherOwner] = {}
        try:
            with self.transaction(durable=True):
                self.heartbeat()
                for owner_id in [owner_id for owner_id, other in self._others.items() if other.is_gone]:
                    self.drop_owner(owner_id)
                self._notify(f"opened {self.owner}")
            has_entries = self._execute("SELECT EXISTS (SELECT 1 FROM entries)").fetchone()
        except self.errors as error:
            self._connection.close()
            failure = self.journal_error(error)
            raise failure from failure.__cause__
        self.is_empty: bool = has_entries == (False,) and all(other.is_gone for other in self._others.values())

    def close(self) -> None:
        """Drop this owner, and close the connection."""
        with contextlib.suppress(*self.errors):
            self._execute("DELETE FROM owners WHERE id = %s", (self.owner,))
        self._connection.close()

    # ------------------------------------------------------------------ entries

    def entry(self, row: Row) -> JournalEntry:
        """Return the entry of a row."""
        return self._rows.entry(row)

    def find_row(self, key: str) -> Row | None:
        """Return the row of the newest entry of a key."""
        return self._row(f"{SELECT} WHERE e.key = %s ORDER BY e.attempt DESC LIMIT 1", key)

    def completed_rows(self, ids: range) -> list[Row]:
        """Return the rows, among those with the ids, of completed entries of moderate size that nobody holds."""
        return self._execute(
            f"{SELECT} WHERE e.id >= %s AND e.id < %s AND e.state = 'completed' AND e.owner IS NULL"
            " AND length(e.result) <= %s"
            " AND NOT EXISTS (SELECT 1 FROM entries n WHERE n.key = e.key AND n.attempt > e.attempt)",
            (ids.start, ids.stop, _MAX_RESULT_LENGTH),
        ).fetchall()

    def find_task(self, task_id: str) -> JournalEntry | None:
        """Return the newest entry of a task."""
        row = self._row(f"{SELECT} WHERE e.task_id = %s ORDER BY e.id DESC LIMIT 1", task_id)
        return None if row is None else self.entry(row)

    def find_token(self, token: str) -> JournalEntry | None:
        """Return the entry that was begun with a token."""
        row = self._row(f"{SELECT} WHERE e.token = %s LIMIT 1", token)
        return None if row is None else self.entry(row)

    def ended_entries(self) -> list[JournalEntry]:
        """Return the entries that are held here and have ended; other sessions may have recorded these ends."""
        rows = self._execute(f"{SELECT} WHERE e.owner = %s AND e.state IN ('completed', 'failed')", (self.owner,))
        return [entry for _, entry in self._rows.readable(rows.fetchall(), ended=True)]

    def begin(self, entry: JournalEntry, limit: Decimal | None, begin_id: int = 0) -> bool | Pending:
        """Insert an intent that is held here; return False if its attempt exists and isn't REFUSED."""
        _check_text(entry)
        name = f"{self.owner} {begin_id}"
        if limit is not None and not self._is_within(limit, entry, name):
            return False
        values = {**intent_columns(entry), "us": self.owner, "begin_id": name}
        cursor = self._execute(_BEGIN, values)
        return Pending(lambda: cursor.fetchone() is not None)

    def _is_within(self, limit: Decimal, entry: JournalEntry, name: str) -> bool:
        """Check the limit, and keep all others from doing so until the transaction ends; False if the attempt exists.

        Raises:
            BudgetExceededError: It would be passed.
        """
        self._execute("SELECT pg_advisory_xact_lock(%s)", (self._budget_lock,))
        # A statement of its own, which sees what was committed while this one has waited for the lock.
        row = self._execute(
            "SELECT (SELECT sum(outlay) FROM totals), (SELECT begin_id FROM entries"
            " WHERE key = %s AND attempt = %s AND state != 'refused')",
            (entry.key, entry.attempt),
        ).fetchone()
        committed, begun = row or (0, None)
        if begun is not None:
            return bool(begun == name)  # the answer to its commit was lost
        check_budget(limit, Decimal(committed) / NANO_DOLLARS_PER_DOLLAR, entry.committed)
        return True

    def adopt(self, entry: JournalEntry) -> Pending:
        """Hold an entry; return False if its state or owner has changed since it was read."""
        statement = (
            "UPDATE entries SET owner = %s"
            " WHERE key = %s AND attempt = %s AND state = %s AND owner IS NOT DISTINCT FROM %s RETURNING id"
        )
        values = (self.owner, entry.key, entry.attempt, entry.state.value, entry.owner)
        cursor = self._execute(statement, values)
        return Pending(lambda: cursor.fetchone() is not None)

    def record(self, entry: JournalEntry) -> Pending:
        """Update an entry as far as this owner may (see `MAY_UPDATE`); known ids, costs and files are kept."""
        _check_text(entry)
        cursor = self._execute(
            _RECORD,
            {
                **record_columns(entry),
                "state": entry.state.value,
                "owner": self.owner if entry.holder is Holder.US else None,
                "keep_owner": entry.holder is Holder.OTHER,
                "us": self.owner,
            },
        )
        return Pending(lambda: self._after_record(entry, cursor.fetchone()))

    def _after_record(self, entry: JournalEntry, row: Row | None) -> None:
        """Notify who waits for an entry, or holds it, of the row that was updated, if one was."""
        if row is None and entry.holder is None:
            # Another session has recorded more, but this one releases the entry all the same.
            row = self._execute(
                "UPDATE entries SET owner = NULL WHERE key = %s AND attempt = %s AND owner = %s"
                " RETURNING watched, id, owner",
                (entry.key, entry.attempt, self.owner),
            ).fetchone()
        if row is None:
            return
        is_watched, entry_id, holder = row
        if is_watched:
            self._notify(f"entry {entry_id}")
        if holder is not None and holder != self.owner:
            self._notify(f"owner {holder}")

    def _read_state(self, name: str) -> str | None:
        # A row that doesn't exist yet can't be locked. Outside of a transaction, the lock is released at once.
        self._execute("SELECT pg_advisory_xact_lock(%s)", (lock_number("journal state", self._address.schema, name),))
        row = self._execute("SELECT value FROM states WHERE name = %s", (name,)).fetchone()
        return None if row is None else row[0]

    def _write_state(self, name: str, value: str) -> None:
        statement = "INSERT INTO states VALUES (%s, %s) ON CONFLICT (name) DO UPDATE SET value = excluded.value"
        self._execute(statement, (name, value))

    # ------------------------------------------------------------------ waiting for others

    def watch(self, entry: JournalEntry) -> None:
        """Ask the holder of an entry to report its changes."""
        row = self._execute(
            "UPDATE entries SET watched = true WHERE key = %s AND attempt = %s RETURNING id",
            (entry.key, entry.attempt),
        ).fetchone()
        if row is not None:
            self._watched_ids.add(str(row[0]))
        self._changed = True  # it may have changed before

    def unchanged(self, entries: list[JournalEntry]) -> list[bool]:
        """Return, for each entry, whether neither its state nor its holder has changed since it was read."""
        statement = f"{SELECT} WHERE e.key = ANY(%s) ORDER BY e.attempt"
        rows = {row[0]: row for row in self._execute(statement, ([entry.key for entry in entries],)).fetchall()}
        self._watched_ids = {str(row_id(row)) for row in rows.values()}
        return [self._rows.is_unchanged(entry, rows.get(entry.key)) for entry in entries]

    # ------------------------------------------------------------------ owners

    def heartbeat(self) -> bool:
        """Read who is alive; insert this owner's row and return False if it was dropped."""
        rows = self._execute(_OTHERS, (self.owner, self._grace)).fetchall()
        # After a restart, or a network that was cut, the others may not be connected again yet.
        may_be_late = time.monotonic() < self._grace_until or any(row[3] for row in rows)
        others = [row for row in rows if row[0] != self.owner]
        self._other_locks = {owner_id: lock for owner_id, lock, *_ in others}
        self._others = {
            owner_id: OtherOwner(0, math.inf, is_gone=not is_alive and not may_be_late)
            for owner_id, _, is_alive, _ in others
        }
        if found := len(rows) > len(others):
            return found
        self._execute("INSERT INTO owners VALUES (%s, %s) ON CONFLICT DO NOTHING", (self.owner, self._lock))
        return found

    def other_owners(self) -> dict[str, OtherOwner]:
        """Return the others as `heartbeat()` has found them."""
        return self._others

    def drop_owner(self, owner_id: str) -> None:
        """Delete an owner's row: what it holds is orphaned."""
        self._execute("DELETE FROM owners WHERE id = %s AND lock = %s", (owner_id, self._other_locks[owner_id]))

    def adopt_from(self, owner_id: str) -> list[JournalEntry]:
        """Hold the tasks of a dropped owner, and return them; mark its intents as uncertain. Skip damaged rows."""
        is_orphan = "owner = %s AND NOT EXISTS (SELECT 1 FROM owners WHERE id = owner)"
        self._execute(
            f"UPDATE entries SET state = 'uncertain', owner = NULL WHERE state = 'intent' AND {is_orphan}", (owner_id,)
        )
        rows = self._execute(f"{SELECT} WHERE e.state = 'submitted' AND e.{is_orphan}", (owner_id,)).fetchall()
        readable = dict(self._rows.readable(map(self._rows.adopted, rows)))
        adopted = self._execute(
            f"UPDATE entries SET owner = %s WHERE id = ANY(%s) AND {is_orphan} RETURNING id",
            (self.owner, list(readable), owner_id),
        ).fetchall()
        return [readable[entry_id] for (entry_id,) in sorted(adopted)]

    # ------------------------------------------------------------------ internals

    def _row(self, statement: str, text: str) -> Row | None:
        # No column holds a NUL, and psycopg would refuse the whole transaction.
        return None if "\0" in text else self._execute(statement, (text,)).fetchone()


def _check_text(entry: JournalEntry) -> None:
    """Check that the texts of an entry can be stored, so that it fails alone if they can't.

    Raises:
        JournalError: They can't be.
    """
    if any("\0" in text for text in (entry.key, entry.task_id or "", entry.webhook_token or "")):
        message = f"the journal can't store the request {entry.key!r}: PostgreSQL has no character NUL"
        raise JournalError(message, key=entry.key)
    if len(entry.key) > _MAX_KEY_BYTES // 4 and len(entry.key.encode()) > _MAX_KEY_BYTES:
        raise JournalError(f"the journal can't store the request {entry.key[:50]!r}...: its key is too long")
