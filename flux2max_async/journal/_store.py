"""The journal's file: what stands in which table, and the few statements that read and write it. Blocking.

A transaction is one step: whatever of it is seen after a crash is all of it. Money is kept as whole nano-dollars, so
that sums are exact and made by the database itself.
"""

import contextlib
import json
import os
import secrets
import sqlite3
from collections.abc import Callable, Generator
from datetime import UTC, datetime
from decimal import ROUND_CEILING, Decimal
from pathlib import Path
from typing import Any

from flux2max_async._budget import check_budget
from flux2max_async.journal._entry import EntryState, Holder, JournalEntry, SavedFile
from flux2max_async.journal._schema import (
    INDEXES,
    SCHEMA,
    check_file,
    check_marks,
    connect_to_read,
    here,
    is_gone,
    patiently,
    told_apart,
)
from flux2max_async.journal._serialization import to_json

_PATIENCE = 10.0
"""Seconds that a reader waits while another program has the file locked."""
_NANO = Decimal(10) ** 9
_MOST = 2**62
_COLUMNS = """
    e.key, e.attempt, e.content, e.state, e.owner, e.task_id, e.cost, e.outlay, e.created, e.submitted, e.ended,
    e.request, e.result, e.files, o.id, o.place, o.pid
"""
_FROM = f"SELECT {_COLUMNS}, e.id FROM entries e LEFT JOIN owners o ON o.id = e.owner"
_MAY_REPLACE = """
    owner = :us AND (state NOT IN ('completed', 'failed') OR :state IN (state, 'completed'))
    OR owner IS NULL AND state = :state AND NOT :elsewhere
    OR state IN ('intent', 'uncertain', 'refused') AND :state IN ('submitted', 'completed', 'failed')
    OR state = 'submitted' AND :state IN ('completed', 'failed')
    OR state = 'intent' AND :state = 'uncertain' AND (owner IS NULL OR owner NOT IN (SELECT id FROM owners))
"""
"""Who holds an entry may say anything of it, but an end stays an end, and what is paid for stays completed. Others may
know more of it than is written: an id, an end, or that nobody can know. And what nobody holds may be told again, with
pictures that were saved since."""


class SqliteStore:
    """One connection to the file of a journal, as one owner among several.

    Args:
        path: The file, which is made if it isn't there.
        lease: Seconds without a beat after which others may take this owner for dead.
        patience: Seconds to wait while another program has it locked.

    Raises:
        JournalError: The file can't be opened, isn't a journal, is damaged, or was written by a newer version.
    """

    def __init__(self, path: Path, lease: float, patience: float) -> None:
        self.owner = secrets.token_hex(8)
        self._path = path
        self._lease = lease
        self._durable = True
        with told_apart(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists() and path.stat().st_size:
                check_file(path, patience)
            self._connection = sqlite3.connect(path, timeout=patience, isolation_level=None)
            try:
                self._prepare(patience)
            except BaseException:
                self._connection.close()
                raise
            self.empty: bool = self._value("SELECT NOT EXISTS (SELECT 1 FROM entries)") == 1

    def _prepare(self, patience: float) -> None:
        do = self._connection.execute
        # Several processes may make the file at once; switching to WAL then is refused without waiting.
        patiently(lambda: do("PRAGMA journal_mode = WAL"), patience)
        do("PRAGMA synchronous = FULL")
        do("PRAGMA fullfsync = 1")  # macOS: through the drive's own cache
        with self.transaction(durable=True):
            if not self._value("SELECT count(*) FROM sqlite_master"):
                for statement in SCHEMA:
                    do(statement)
            check_marks(self._connection, self._path)
            for statement in INDEXES:
                do(statement)
            for owner, (_, _, gone) in self.others().items():
                if gone:
                    self.bury(owner)
            self.beat()

    def close(self) -> None:
        """Leave: what is held becomes free."""
        try:
            with contextlib.suppress(sqlite3.Error):
                self._connection.execute("DELETE FROM owners WHERE id = ?", (self.owner,))
        finally:
            self._connection.close()

    # ------------------------------------------------------------------ transactions

    def wait_for_disk(self, *, durable: bool) -> None:
        """Say whether what follows is to be on the disk before it counts as done; a statement alone is done whole."""
        if durable != self._durable:
            self._connection.execute(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
            self._durable = durable

    @contextlib.contextmanager
    def transaction(self, *, durable: bool) -> Generator[None]:
        """Do all inside or nothing; what is durable has reached the disk in the end, and so has all before it."""
        self.wait_for_disk(durable=durable)
        do = self._connection.execute
        do("BEGIN IMMEDIATE")
        try:
            yield
            do("COMMIT")
        except BaseException:
            with contextlib.suppress(sqlite3.Error):
                do("ROLLBACK")
            raise

    # ------------------------------------------------------------------ entries

    def find(self, key: str) -> JournalEntry | None:
        """Give the newest entry of a key."""
        row = self._connection.execute(f"{_FROM} WHERE e.key = ? ORDER BY e.attempt DESC LIMIT 1", (key,)).fetchone()
        return row and self._entry(row)

    def find_task(self, task_id: str) -> JournalEntry | None:
        """Give the entry of a task."""
        row = self._connection.execute(f"{_FROM} WHERE e.task_id = ? ORDER BY e.id DESC LIMIT 1", (task_id,)).fetchone()
        return row and self._entry(row)

    def told(self) -> list[JournalEntry]:
        """Give those entries held here that have ended: what isn't our own doing, somebody else was told."""
        rows = self._connection.execute(
            f"{_FROM} WHERE e.owner = ? AND e.state IN ('completed', 'failed')", (self.owner,)
        )
        return [self._entry(row) for row in rows.fetchall()]

    def begin(self, entry: JournalEntry, limit: Decimal | None) -> bool:
        """Write an intent, unless its attempt has been made already; tells whether it was written.

        Raises:
            BudgetExceededError: Its outlay, on top of all that is there, would pass the limit.
        """
        do = self._connection.execute
        if limit is not None:
            taken = "SELECT 1 FROM entries WHERE key = ? AND attempt = ? AND state != 'refused'"
            if do(taken, (entry.key, entry.attempt)).fetchone():
                return False
            check_budget(limit, Decimal(self._value("SELECT outlay FROM totals")) / _NANO, entry.outlay)
        written: int = do(
            "INSERT INTO entries (key, attempt, content, state, owner, outlay, created, request, result, files)"
            " VALUES (?, ?, ?, 'intent', ?, ?, ?, ?, '{}', '[]') ON CONFLICT (key, attempt) DO UPDATE SET"
            " content = excluded.content, state = 'intent', owner = excluded.owner, outlay = excluded.outlay,"
            " created = excluded.created, ended = NULL, request = excluded.request, result = '{}'"
            " WHERE state = 'refused'",
            (entry.key, entry.attempt, entry.content, self.owner, _nano(entry.outlay), _epoch(entry.created_at),
             to_json(dict(entry.request))),
        ).rowcount  # fmt: skip
        return written == 1

    def adopt(self, entry: JournalEntry) -> bool:
        """Take over a task that nobody follows, or saves; tells whether it was still free."""
        adopted: int = self._connection.execute(
            "UPDATE entries SET owner = ? WHERE key = ? AND attempt = ? AND state = ? AND owner IS ?",
            (self.owner, entry.key, entry.attempt, entry.state, entry.owner),
        ).rowcount
        return adopted == 1

    def record(self, entry: JournalEntry) -> None:
        """Write down what is new, as far as it is ours to say; nothing that is known is forgotten."""
        written = self._connection.execute(
            "UPDATE entries SET state = :state, owner = CASE WHEN :elsewhere THEN owner ELSE :owner END,"
            " task_id = coalesce(:task_id, task_id), cost = coalesce(:cost, cost), outlay = :outlay,"
            " submitted = coalesce(:submitted, submitted), ended = :ended, result = :result,"
            " files = CASE :files WHEN '[]' THEN files ELSE :files END"
            f" WHERE key = :key AND attempt = :attempt AND ({_MAY_REPLACE})",
            {
                "state": entry.state,
                "owner": self.owner if entry.holder is Holder.US else None,
                "elsewhere": entry.holder is Holder.OTHER,
                "task_id": entry.task_id,
                "cost": None if entry.cost is None else str(entry.cost),
                "outlay": _nano(entry.outlay),
                "submitted": _epoch(entry.submitted_at),
                "ended": _epoch(entry.ended_at),
                "result": to_json(dict(entry.result)),
                "files": to_json([[str(file.path), file.size] for file in entry.files]),
                "key": entry.key,
                "attempt": entry.attempt,
                "us": self.owner,
            },
        ).rowcount
        if not written and entry.holder is None:
            # Others knew more of it than we, who are done with it all the same.
            self._connection.execute(
                "UPDATE entries SET owner = NULL WHERE key = ? AND attempt = ? AND owner = ?",
                (entry.key, entry.attempt, self.owner),
            )

    def is_as(self, entry: JournalEntry) -> bool:
        """Tell whether nothing has happened to an entry, nor to who holds it."""
        found = self.find(entry.key)
        return found is not None and (found.attempt, found.state, found.owner, found.holder) == (
            entry.attempt, entry.state, entry.owner, entry.holder,
        )  # fmt: skip

    # ------------------------------------------------------------------ owners

    def beat(self) -> None:
        """Tell the other owners that this one is alive."""
        do = self._connection.execute
        if not do("UPDATE owners SET beat = beat + 1 WHERE id = ?", (self.owner,)).rowcount:
            # Somebody took us for dead, while this machine slept.
            do("INSERT INTO owners VALUES (?, 0, ?, ?, ?)", (self.owner, self._lease, here(), os.getpid()))

    def others(self) -> dict[str, tuple[int, float, bool]]:
        """Give the beat and the lease of each other owner, and whether it is certain that its process is gone."""
        rows = self._connection.execute("SELECT id, beat, lease, place, pid FROM owners WHERE id != ?", (self.owner,))
        return {owner: (beat, lease, is_gone(place, pid)) for owner, beat, lease, place, pid in rows.fetchall()}

    def bury(self, owner: str) -> None:
        """Free what an owner that is dead has held."""
        self._connection.execute("DELETE FROM owners WHERE id = ?", (owner,))

    def inherit(self, owner: str) -> list[JournalEntry]:
        """Take over the tasks of an owner that is gone, unless somebody else has done so."""
        do = self._connection.execute
        gone = "owner = ? AND NOT EXISTS (SELECT 1 FROM owners WHERE id = owner)"
        do(f"UPDATE entries SET state = 'uncertain', owner = NULL WHERE state = 'intent' AND {gone}", (owner,))
        rows = do(f"{_FROM} WHERE e.state = 'submitted' AND e.{gone}", (owner,)).fetchall()
        do(f"UPDATE entries SET owner = ? WHERE state = 'submitted' AND {gone}", (self.owner, owner))
        return [self._entry((*row[:4], self.owner, *row[5:])) for row in rows]

    def others_have_written(self) -> Callable[[], bool]:
        """Give what tells whether another connection has changed anything since it was last asked."""
        seen = self._value("PRAGMA data_version")

        def changed() -> bool:
            nonlocal seen
            before, seen = seen, self._value("PRAGMA data_version")
            return bool(before != seen)

        return changed

    def _entry(self, row: tuple[Any, ...]) -> JournalEntry:
        owner, alive, place, pid = row[4], row[14], row[15], row[16]
        holder = None
        if owner == self.owner:
            holder = Holder.US
        elif alive is not None and not is_gone(place, pid):
            holder = Holder.OTHER
        return _entry(row, holder)

    def _value(self, statement: str) -> Any:
        return self._connection.execute(statement).fetchone()[0]


def listed(path: Path, after: int, limit: int) -> list[tuple[int, JournalEntry]]:
    """List entries in the order of their making, from outside and without writing.

    Raises:
        JournalError: The file can't be read, or isn't a journal.
    """
    with told_apart(path), contextlib.closing(connect_to_read(path, _PATIENCE)) as connection:
        check_marks(connection, path)
        if not connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
            return []  # whoever was about to make it was killed
        rows = connection.execute(f"{_FROM} WHERE e.id > ? ORDER BY e.id LIMIT ?", (after, limit))
        return [
            (row[17], _entry(row, Holder.OTHER if row[14] and not is_gone(row[15], row[16]) else None)) for row in rows
        ]


def _entry(row: tuple[Any, ...], holder: Holder | None) -> JournalEntry:
    key, attempt, content, state, owner, task_id, cost, outlay, created, submitted, ended, request, result, files = row[
        :14
    ]
    return JournalEntry(
        key=key,
        attempt=attempt,
        content=content,
        state=EntryState(state),
        holder=holder,
        owner=owner,
        task_id=task_id,
        cost=None if cost is None else Decimal(cost),
        outlay=Decimal(outlay) / _NANO,
        created_at=_moment(created),
        submitted_at=_moment(submitted),
        ended_at=_moment(ended),
        request=json.loads(request),
        result=json.loads(result),
        files=tuple(SavedFile(Path(path), size) for path, size in json.loads(files)),
    )


def _nano(dollars: Decimal) -> int:
    return min(int((dollars * _NANO).to_integral_value(ROUND_CEILING)), _MOST)


def _epoch(moment: datetime | None) -> float | None:
    return None if moment is None else moment.timestamp()


def _moment(epoch: float | None) -> datetime | None:
    return None if epoch is None else datetime.fromtimestamp(epoch, UTC)
