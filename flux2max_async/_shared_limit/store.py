"""The SQL statements that count the slots of several processes. Blocking.

Each session that has opened the file is a holder, with a row in `holders`:

  slots    its limit: nothing is granted to it while all holders together have so many
  held     how many slots it has; only it writes this
  ticket   its place in the line for one more slot; NULL if it doesn't wait
  granted  1 from the moment another holder has given it the slot that it waits for until it has noticed that
  kept     whether its slots count after its death, because its tasks are in a journal
  died     when its death was noticed, by the monotonic clock; NULL while it lives

What must hold at the end of each transaction: nobody waits whose `slots` are more than all that are held and granted.
So whoever gives back a slot grants it, in the same transaction, to the one that has waited longest.

A holder is alive while its named pipe is open (see `_wake_pipe`). Whoever would have to wait checks the others first,
and deletes those that are gone, or marks them as dead if their slots are kept. Of a dead holder's slots, one goes with
each task that somebody adopts, and the rest is given up after a while.

A power failure may undo the last transactions; but then no holder is alive either.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import TypeAlias

import attrs

from flux2max_async._exceptions import InFlightLimitError
from flux2max_async._sqlite_files import connect, create_file, file_id, retry_while_locked, transaction
from flux2max_async._wake_pipe import pipe_path, remove_if_dead

KEEP_TIME = 10.0
"""Seconds for which the slots of a dead holder with a journal count at most. Others adopt its tasks within the quarter
of the journal's lease, which is 3 s by default."""
_BUSY_TIMEOUT = 5.0
"""Seconds to wait for another holder's transaction, which takes less than a millisecond."""
# Marks the file for this library and for file(1): "FLXL" in ASCII.
_APPLICATION_ID = 0x464C584C
_SCHEMA_VERSION = 1
_SCHEMA = (
    """CREATE TABLE holders (
    id TEXT PRIMARY KEY, slots INTEGER NOT NULL, held INTEGER NOT NULL, ticket INTEGER,
    granted INTEGER NOT NULL DEFAULT 0, kept INTEGER NOT NULL, died REAL)""",
    f"PRAGMA application_id = {_APPLICATION_ID}",
    f"PRAGMA user_version = {_SCHEMA_VERSION}",
)

Row: TypeAlias = tuple[str, int, int, int | None, int]
"""The columns id, slots, held, ticket and granted of a holder."""


@attrs.frozen
class Update:
    """What a transaction has changed."""

    granted: bool
    """Whether this holder has got one more slot."""
    woken: list[str]
    """The holders that were granted a slot, and have to be woken."""


class LimitStore:
    """A connection to the file of a limit, as one holder of several.

    Args:
        path: The file, without symbolic links on the way; it is created if it doesn't exist.
        holder: The name of this holder. Its pipe exists already.
        slots: The number of slots of all holders together.
        keep_after_death: Whether its slots count after its death until its tasks are adopted.

    Raises:
        InFlightLimitError: The file is another program's database, or a newer version wrote it.
        sqlite3.Error, OSError: It can't be opened.
    """

    def __init__(self, path: Path, holder: str, slots: int, *, keep_after_death: bool) -> None:
        self._path = path
        self._holder = holder
        self._slots = slots
        self._kept = keep_after_death
        path.parent.mkdir(parents=True, exist_ok=True)
        create_file(path)
        self._file_id = file_id(path)
        self._connection = connect(path, _BUSY_TIMEOUT)
        try:
            self._prepare()
        except BaseException:
            self._connection.close()
            raise

    def _prepare(self) -> None:
        execute = self._connection.execute
        self._check_file()
        retry_while_locked(lambda: execute("PRAGMA journal_mode = WAL"), _BUSY_TIMEOUT)
        execute("PRAGMA synchronous = NORMAL")
        with transaction(self._connection):
            if not execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
                for statement in _SCHEMA:
                    execute(statement)

    def _check_file(self) -> None:
        execute = self._connection.execute
        # The tables first: once another process has created them, the application id is there, too.
        (tables,) = execute("SELECT count(*) FROM sqlite_master").fetchone()
        (application_id,) = execute("PRAGMA application_id").fetchone()
        (version,) = execute("PRAGMA user_version").fetchone()
        if tables and application_id != _APPLICATION_ID:
            raise InFlightLimitError(
                f"{self._path} is a database, but not that of a limit: it needs a file of its own; it was left as it is"
            )
        if version > _SCHEMA_VERSION:
            raise InFlightLimitError(
                f"a newer version wrote the limit {self._path} (schema {version}, known up to {_SCHEMA_VERSION}): "
                "update flux2max_async"
            )

    def is_replaced(self) -> bool:
        """Check whether the file was deleted or replaced: those who open it now count in another one."""
        return file_id(self._path) != self._file_id

    def close(self) -> None:
        """Close the connection; the holder's row stays."""
        self._connection.close()

    # ------------------------------------------------------------------ transactions

    def update(self, held: int, now: float, *, waits: bool = False, adopted: int = 0) -> Update:
        """Write how many slots this holder has, take the one that was granted to it, and grant what is free.

        Args:
            held: Its slots, without one that was granted to it in the meantime.
            now: The time on the monotonic clock.
            waits: Whether it waits for a slot.
            adopted: How many of its slots are for tasks of dead holders that it has adopted since the previous update.
        """
        with transaction(self._connection):
            was_granted = waits and self._is_granted()
            self._write(held + was_granted, waits=waits and not was_granted)
            if adopted:
                self._find_dead(now)
                self._give_up_kept(adopted)
            granted = self._grant()
            if waits and not was_granted and self._holder not in granted and self._find_dead(now):
                granted += self._grant()
        others = [holder for holder in granted if holder != self._holder]
        return Update(was_granted or len(others) < len(granted), others)

    def leave(self) -> list[str]:
        """Delete this holder, and return the holders that were granted its slots and have to be woken."""
        with transaction(self._connection):
            self._delete(self._holder)
            return self._grant()

    def _is_granted(self) -> bool:
        row = self._connection.execute("SELECT granted FROM holders WHERE id = ?", (self._holder,)).fetchone()
        return row is not None and row[0] == 1

    def _write(self, held: int, *, waits: bool) -> None:
        # A row that is as it should be is not written. It is inserted again if somebody took this holder for dead.
        self._connection.execute(
            "INSERT INTO holders (id, slots, held, ticket, kept)"
            " VALUES (:id, :slots, :held,"
            "  CASE WHEN :waits THEN (SELECT coalesce(max(ticket), 0) + 1 FROM holders) END, :kept)"
            " ON CONFLICT (id) DO UPDATE SET held = excluded.held, granted = 0, died = NULL,"
            "  ticket = CASE WHEN :waits THEN coalesce(ticket, excluded.ticket) END"
            " WHERE held != excluded.held OR granted OR died IS NOT NULL OR (ticket IS NOT NULL) != :waits",
            {"id": self._holder, "slots": self._slots, "held": held, "waits": waits, "kept": self._kept},
        )

    def _grant(self) -> list[str]:
        execute = self._connection.execute
        rows: list[Row] = execute("SELECT id, slots, held, ticket, granted FROM holders").fetchall()
        granted = holders_to_grant(rows)
        for holder in granted:
            if holder == self._holder:
                execute("UPDATE holders SET held = held + 1, ticket = NULL WHERE id = ?", (holder,))
            else:
                execute("UPDATE holders SET granted = 1, ticket = NULL WHERE id = ?", (holder,))
        return granted

    def _find_dead(self, now: float) -> bool:
        """Delete the holders that are gone, or mark them as dead; return whether any slots may be free now."""
        freed = False
        rows = self._connection.execute(
            "SELECT id, held, granted, kept, died FROM holders WHERE id != ?", (self._holder,)
        ).fetchall()
        for holder, held, granted, kept, died in rows:
            if died is not None:
                # The clock begins anew when the machine starts.
                if not 0 <= now - died < KEEP_TIME:
                    self._delete(holder)
                    freed = True
            elif remove_if_dead(pipe_path(self._path, holder)):
                if kept and held:
                    statement = "UPDATE holders SET died = ?, ticket = NULL, granted = 0 WHERE id = ?"
                    self._connection.execute(statement, (now, holder))
                    freed = freed or granted == 1
                else:
                    self._delete(holder)
                    freed = True
        return freed

    def _give_up_kept(self, adopted: int) -> None:
        """Take slots from dead holders, one for each of their tasks that was adopted."""
        execute = self._connection.execute
        for holder, held in execute("SELECT id, held FROM holders WHERE died IS NOT NULL ORDER BY died").fetchall():
            taken = min(held, adopted)
            adopted -= taken
            if taken == held:
                self._delete(holder)
            else:
                execute("UPDATE holders SET held = held - ? WHERE id = ?", (taken, holder))

    def _delete(self, holder: str) -> None:
        self._connection.execute("DELETE FROM holders WHERE id = ?", (holder,))


def holders_to_grant(rows: Iterable[Row]) -> list[str]:
    """Return who gets a slot now: those who have waited longest, as far as their limits allow."""
    rows = list(rows)
    total = sum(held + granted for _, _, held, _, granted in rows)
    waiting = sorted((ticket, holder, slots) for holder, slots, _, ticket, _ in rows if ticket is not None)
    chosen: list[str] = []
    for _, holder, slots in waiting:
        if total < slots:
            chosen.append(holder)
            total += 1
    return chosen
