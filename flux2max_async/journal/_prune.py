"""Forgetting ended entries, so that a journal doesn't grow for ever. Sessions may use the file meanwhile. Blocking.

What must hold: an entry that may still cost money stays, and so does one that a living session holds. The sum that a
budget of the whole journal is compared with stays as it is: no trigger takes deleted entries off the total. An earlier
attempt that stays, such as an uncertain one, keeps the later ones of its key, for it would be the newest one otherwise,
and mean something else.

Others can write between the transactions, none of which takes long. A full disk can stop any of them: what is done then
is done, and space that the file doesn't give back is used by later entries.
"""

import contextlib
import sqlite3
import time
from pathlib import Path

from flux2max_async._text import get_logger
from flux2max_async.journal._schema import (
    check_file,
    connect_existing,
    journal_error,
    process_is_gone,
    translate_sqlite_errors,
)

log = get_logger("journal")

_ENTRIES_PER_TRANSACTION = 500
_PAGES_PER_TRANSACTION = 500
_PAUSE = 0.01
"""Seconds between transactions, in which those who wait for the file get their turn."""
_CHECKPOINT_TIMEOUT = 1.0
"""Seconds to wait for readers, who keep SQLite's log from being emptied."""
_INCREMENTAL = 2  # of `PRAGMA auto_vacuum`


def prune_file(path: Path, before: float, limit: int, busy_timeout: float) -> int:
    """Forget entries that ended before a time, the oldest first, and return how many.

    Args:
        path: The journal's file.
        before: The time, in seconds since the epoch.
        limit: The maximum number of entries.
        busy_timeout: Seconds to wait while another program has the file locked.

    Raises:
        JournalError: The file can't be read or written, or isn't a journal. Some entries may be forgotten already.
    """
    with translate_sqlite_errors(path):
        check_file(path, busy_timeout)
        with contextlib.closing(connect_existing(path, busy_timeout)) as connection:
            if not connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
                return 0  # the process that created the file was killed before it created the tables
            pruned = _delete(connection, before, limit)
            if pruned:
                try:
                    _shrink(connection)
                except sqlite3.Error as error:
                    log.warning("%d entries are forgotten, but %s", pruned, journal_error(path, error))
    return pruned


def _delete(connection: sqlite3.Connection, before: float, limit: int) -> int:
    pruned = last_id = 0
    while pruned < limit:
        with contextlib.closing(connection.cursor()) as cursor:
            cursor.execute("BEGIN IMMEDIATE")
            try:
                ids = _prunable_ids(cursor, before, last_id, min(limit - pruned, _ENTRIES_PER_TRANSACTION))
                cursor.executemany("DELETE FROM entries WHERE id = ?", [(entry_id,) for entry_id in ids])
                cursor.execute("COMMIT")
            except BaseException:
                with contextlib.suppress(sqlite3.Error):
                    cursor.execute("ROLLBACK")
                raise
        if not ids:
            break
        pruned, last_id = pruned + len(ids), ids[-1]
        time.sleep(_PAUSE)
    return pruned


def _prunable_ids(cursor: sqlite3.Cursor, before: float, after_id: int, limit: int) -> list[int]:
    owners = cursor.execute("SELECT id, place, pid FROM owners").fetchall()
    alive = [owner_id for owner_id, host, pid in owners if not process_is_gone(host, pid)]
    places = ", ".join(f":owner{number}" for number in range(len(alive)))

    def has_ended(entry: str) -> str:
        return (
            f"({entry}.state IN ('completed', 'failed', 'refused')"
            f" AND coalesce({entry}.ended, {entry}.submitted, {entry}.created) < :before"
            f" AND ({entry}.owner IS NULL OR {entry}.owner NOT IN ({places})))"
        )

    rows = cursor.execute(
        f"SELECT e.id FROM entries e WHERE e.id > :after AND {has_ended('e')}"  # noqa: S608 - constants and placeholders
        f" AND NOT EXISTS (SELECT 1 FROM entries p WHERE p.key = e.key AND p.attempt < e.attempt"
        f" AND {has_ended('p')} IS NOT TRUE) ORDER BY e.id LIMIT :limit",
        {
            "after": after_id, "before": before, "limit": limit,
            **{f"owner{number}": owner_id for number, owner_id in enumerate(alive)},
        },
    )  # fmt: skip
    return [entry_id for (entry_id,) in rows]


def _shrink(connection: sqlite3.Connection) -> None:
    """Return the space of deleted entries to the file system."""
    execute = connection.execute
    if execute("PRAGMA auto_vacuum").fetchone()[0] == _INCREMENTAL:
        while execute("PRAGMA freelist_count").fetchone()[0]:
            execute(f"PRAGMA incremental_vacuum({_PAGES_PER_TRANSACTION})").fetchall()
            time.sleep(_PAUSE)
    else:
        # An earlier version created the file. It is written anew, once, in a single transaction.
        execute("PRAGMA auto_vacuum = INCREMENTAL")
        execute("VACUUM")
    execute(f"PRAGMA busy_timeout = {_CHECKPOINT_TIMEOUT * 1000:.0f}")
    execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
