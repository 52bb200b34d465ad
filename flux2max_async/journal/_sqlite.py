"""The journal in an SQLite file."""

import time
from collections.abc import AsyncGenerator
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

from flux2max_async._config import validate_seconds
from flux2max_async.journal._store_journal import StoreJournal

if TYPE_CHECKING:
    from flux2max_async.journal._reader import Page
    from flux2max_async.journal._store_protocol import JournalStore

_MAX_SECONDS = 3600.0


class SqliteJournal(StoreJournal):
    """A journal in an SQLite file, for any number of processes on one machine at once.

    A session opens and closes it. `entries()` and `export()` work at any time, also while sessions use the file. One
    thread writes, and writes that are requested while it waits for the disk share the next fsync. Intents are on the
    disk before their submits are sent. All other writes survive a killed process at once, and a power failure after a
    second. With `watch_changes`, ends that other processes record are noticed when they report them through a named
    pipe beside the file, or else four times a second.

    `prune()` makes the file smaller. If the disk is too full for that, the file stays as large as it is, with a
    warning, and the space is used by later entries. The first time that a file of an earlier version is pruned,
    sessions wait while it is written anew.

    Args:
        path: The file. It is created, with its folder, if it doesn't exist. SQLite keeps two more files beside it while
            it is in use.
        lease: Seconds without a heartbeat after which other processes take over the tasks of this one. The tasks of a
            process that has ended on the same machine are taken over without waiting.
        busy_timeout: Seconds to wait while another program has the file locked.

    Raises:
        ConfigurationError: A time is not more than 0 seconds, or is more than an hour.
    """

    def __init__(self, path: str | PathLike[str], *, lease: float = 12.0, busy_timeout: float = 10.0) -> None:
        self.path: Path = Path(path)
        super().__init__(self.path, validate_seconds("lease", lease, maximum=_MAX_SECONDS))
        self._busy_timeout = validate_seconds("busy_timeout", busy_timeout, maximum=_MAX_SECONDS)

    def __repr__(self) -> str:
        return f"SqliteJournal({str(self.path)!r})"

    def _open_store(self, *, watch_changes: bool) -> "JournalStore":
        from flux2max_async.journal._store import SqliteStore  # noqa: PLC0415 - only sessions with a journal load sqlite3

        return SqliteStore(self.path, self._lease, self._busy_timeout, watch_changes=watch_changes)

    def _read_pages(self) -> "AsyncGenerator[Page]":
        from flux2max_async.journal._reader import read_pages  # noqa: PLC0415 - as above

        return read_pages(self.path)

    def _prune(self, older_than: float, limit: int) -> int:
        from flux2max_async.journal._prune import prune_file  # noqa: PLC0415 - as above

        return prune_file(self.path, time.time() - older_than, limit, self._busy_timeout)
