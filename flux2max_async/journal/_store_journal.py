"""What the journals in SQLite and in PostgreSQL have in common: all but the database."""

import itertools
import math
import os
from abc import abstractmethod
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import aclosing
from decimal import Decimal
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from flux2max_async._exceptions import ConfigurationError, JournalError
from flux2max_async._forks import check_process
from flux2max_async._text import get_logger
from flux2max_async.journal._entry import Holder, JournalEntry
from flux2max_async.journal._protocol import Journal

if TYPE_CHECKING:
    from flux2max_async.journal._read_ahead import ReadAhead
    from flux2max_async.journal._reader import Page
    from flux2max_async.journal._store_protocol import JournalStore
    from flux2max_async.journal._worker import JournalWorker

log = get_logger("journal")

_MAX_KNOWN_KEYS = 10_000


class StoreJournal(Journal):
    """A journal whose database is read and written by a thread.

    Args:
        name: Its name in messages.
        lease: Seconds after which other owners may presume this one dead.
    """

    def __init__(self, name: object, lease: float) -> None:
        self._name = name
        self._lease = lease
        self._worker: JournalWorker | None = None
        self._process_id = 0
        """Of the process that has opened it."""
        self._read_ahead: ReadAhead
        self._begin_ids = itertools.count()
        self._known_keys: set[str] | None = None
        """All keys in the journal if it was empty when it was opened, which saves a new batch one query per request.
        None if it may hold others."""

    @abstractmethod
    def _open_store(self, *, watch_changes: bool) -> "JournalStore":
        """Open the database; called in the thread."""

    @abstractmethod
    def _read_pages(self) -> "AsyncGenerator[Page]":
        """Yield all entries in pages, oldest first, with errors in the places of damaged ones."""

    @abstractmethod
    def _prune(self, older_than: float, limit: int) -> int:
        """Forget entries that ended more than so many seconds ago; called in a thread."""

    async def open(
        self,
        on_external_change: Callable[[list[JournalEntry]], None] = lambda _: None,
        /,
        *,
        watch_changes: bool = False,
    ) -> None:
        """Open the journal, and create it if it doesn't exist.

        Args:
            on_external_change: Called with the tasks of a process that has died, and with ends that other processes
                have recorded.
            watch_changes: Whether to notice such ends at once.

        Raises:
            JournalError: It can't be opened, isn't a journal, is damaged, or a newer version wrote it.
        """
        from flux2max_async.journal._read_ahead import ReadAhead  # noqa: PLC0415 - only sessions with a journal load it
        from flux2max_async.journal._worker import JournalWorker  # noqa: PLC0415 - as above

        if self._worker is not None and not self._worker.stopped.get_loop().is_closed():
            self._check_process()
            raise JournalError(
                f"the journal {self._name} is open already: each session needs a {type(self).__name__} of its own"
            )
        self._worker = worker = JournalWorker(
            self._name,
            lambda: self._open_store(watch_changes=watch_changes),
            self._lease,
            on_external_change,
            watch_changes=watch_changes,
        )
        self._process_id = os.getpid()
        self._read_ahead = ReadAhead()
        try:
            self._known_keys = set() if await worker.opened else None
        except BaseException:
            self._worker = None
            worker.stop()
            raise

    async def close(self) -> None:
        """Complete the writes that were requested, and close the journal. Closing it twice does no harm."""
        if self._worker is not None:
            self._check_process()
        worker, self._worker = self._worker, None
        if worker is not None and not worker.stopped.get_loop().is_closed():
            worker.stop()
            await worker.stopped

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    # ------------------------------------------------------------------ for sessions

    async def find(self, key: str, /) -> JournalEntry | None:
        """Return the newest entry of a key. An entry that another process has only just begun may be missed."""
        is_sole_writer = self._open_worker().is_sole_writer
        if self._known_keys is not None and is_sole_writer and key not in self._known_keys:
            return None
        found: JournalEntry | None = self._read_ahead.take(key)
        if found is None:
            found = await self._run(lambda store: self._read_ahead.find(store, key), writes=False)
        return found

    async def find_task(self, task_id: str, /) -> JournalEntry | None:
        """Return the entry of a task."""
        found: JournalEntry | None = await self._run(lambda store: store.find_task(task_id), writes=False)
        return found

    async def find_token(self, token: str, /) -> JournalEntry | None:
        """Return the entry that was begun with this `webhook_token`."""
        found: JournalEntry | None = await self._run(lambda store: store.find_token(token), writes=False)
        return found

    async def begin(self, entry: JournalEntry, /, *, limit: Decimal | None = None) -> bool:
        """Write an intent durably; return False if the key has this attempt already."""
        begin_id = next(self._begin_ids)
        begun: bool = await self._run(
            lambda store: store.begin(entry, limit, begin_id), durable=True, single_statement=limit is None
        )
        if self._known_keys is not None:
            self._known_keys.add(entry.key)
            if not begun or len(self._known_keys) > _MAX_KNOWN_KEYS:
                self._known_keys = None
        return begun

    async def adopt(self, entry: JournalEntry, /) -> bool:
        """Hold an entry that no session holds; return False if another session has changed it first."""
        adopted: bool = await self._run(lambda store: store.adopt(entry), single_statement=True)
        return adopted

    async def record(self, entry: JournalEntry, /) -> None:
        """Record an entry's new values. If the disk is full now, it is tried again until the journal is closed."""
        await self._run(
            lambda store: self._read_ahead.record(store, entry),
            single_statement=True,
            entry_id=(entry.key, entry.attempt),
            wakes=entry.owner if entry.holder is Holder.OTHER else None,
        )

    async def changed(self, entry: JournalEntry, /) -> None:
        """Wait until an entry that another session holds has changed, or that session has died."""
        await self._open_worker().wait_for_change(entry)

    async def load_state(self, name: str, /) -> Mapping[str, Any] | None:
        """Return what was kept under a name; None if nothing was.

        Raises:
            JournalError: It is damaged.
        """
        state: Mapping[str, Any] | None = await self._run(lambda store: store.states.load(name), writes=False)
        return state

    async def update_state(self, name: str, change: Callable[[Mapping[str, Any] | None], Mapping[str, Any]], /) -> None:
        """Replace what is kept under a name with what `change` returns for it, in one transaction.

        `change` runs in the journal's thread. If it raises an error, the state stays as it is.
        """
        await self._run(lambda store: store.states.update(name, change))

    # ------------------------------------------------------------------ for readers

    async def entries(self) -> AsyncIterator[JournalEntry]:
        """Iterate over all entries, oldest first. A request that was paid for again has several.

        Entries that are damaged are left out, with a warning for each.

        Raises:
            JournalError: The journal can't be read.
        """
        async for page in self._entry_pages():
            for entry in page:
                yield entry

    async def export(self, path: str | PathLike[str], /) -> Path:
        """Write all entries to a file as JSON Lines, and return its path. If it fails, no file is left.

        Raises:
            JournalError: The journal can't be read.
            OSError: The file can't be written.
        """
        from flux2max_async.journal._reader import export  # noqa: PLC0415 - as in open()

        target = Path(path)
        async with aclosing(self._entry_pages()) as pages:
            await export(pages, target)
        return target

    async def prune(self, *, older_than: float, limit: int = 10_000) -> int:
        """Forget completed, failed and refused entries; return how many were forgotten.

        Works at any time, also while sessions use the journal. Requests that are forgotten are submitted, and paid for,
        if they are requested again. What they have cost still counts against a budget. Uncertain entries, and those
        that a living session holds, are kept.

        Args:
            older_than: Seconds since the end of an entry; later ones are kept.
            limit: The maximum number of entries.

        Raises:
            ConfigurationError: An argument is not a finite number, or is negative.
            JournalError: The journal can't be read or written.
        """
        import anyio.to_thread  # noqa: PLC0415 - as in open()

        for name, value in (("older_than", older_than), ("limit", limit)):
            if not 0 <= value < math.inf:
                raise ConfigurationError(f"{name} must be 0 or more, not {value!r}")
        return await anyio.to_thread.run_sync(self._prune, older_than, limit)

    # ------------------------------------------------------------------ internals

    async def _entry_pages(self) -> AsyncGenerator[list[JournalEntry]]:
        """Yield all entries in pages; log each that is damaged."""
        async with aclosing(self._read_pages()) as pages:
            async for page in pages:
                for damage in page:
                    if isinstance(damage, JournalError):
                        log.warning("%s", damage)
                yield [entry for entry in page if isinstance(entry, JournalEntry)]

    async def _run(
        self,
        function: "Callable[[JournalStore], Any]",
        *,
        writes: bool = True,
        durable: bool = False,
        single_statement: bool = False,
        entry_id: tuple[str, int] | None = None,
        wakes: str | None = None,
    ) -> Any:
        worker = self._open_worker()
        return await worker.run(
            function,
            writes=writes,
            durable=durable,
            single_statement=single_statement,
            entry_id=entry_id,
            wakes=wakes,
        )

    def _open_worker(self) -> "JournalWorker":
        if self._worker is None:
            raise JournalError(f"the journal {self._name} is not open")
        self._check_process()
        return self._worker

    def _check_process(self) -> None:
        check_process(self._process_id, "journal", JournalError)
