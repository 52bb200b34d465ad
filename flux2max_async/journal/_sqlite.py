"""The journal: what was asked for, paid for and delivered, kept so that a batch survives whatever ends its process.

    async with FluxSession(journal=SqliteJournal("run.db")) as session:
        async for outcome in session.stream(prompts, save_to="pictures"):
            ...

Run twice, this pays once.
"""

import json
import secrets
from collections.abc import AsyncIterator, Callable, Iterable
from decimal import Decimal
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import anyio.to_thread

from flux2max_async._config import validate_seconds
from flux2max_async._exceptions import JournalError
from flux2max_async.journal._entry import JournalEntry

if TYPE_CHECKING:
    from flux2max_async.journal._store import SqliteStore
    from flux2max_async.journal._worker import JournalWorker


class SqliteJournal:
    """A journal in one SQLite file, for any number of processes on one machine at once.

    A session opens and closes it. `entries()` and `export()` work at any time, beside running sessions, too. One thread
    writes; what comes while it waits for the disk shares the next fsync. Intents are on the disk before their submits
    are sent; all else is safe from a killed process at once, and from a power cut within a second.

    Args:
        path: The file. It is made, with its folder, if it isn't there; beside it, SQLite keeps two files of its own
            while it is in use.
        lease: Seconds without a sign of life after which others take over what this process holds. One that has ended
            on the same machine needn't be waited for.
        busy_timeout: Seconds to wait while another program has the file locked.

    Raises:
        ConfigurationError: A time that is not more than 0 seconds, or more than an hour.
    """

    def __init__(self, path: str | PathLike[str], *, lease: float = 12.0, busy_timeout: float = 10.0) -> None:
        self.path: Path = Path(path)
        self._lease = validate_seconds("lease", lease, most=_LONGEST)
        self._busy_timeout = validate_seconds("busy_timeout", busy_timeout, most=_LONGEST)
        self._scribe: JournalWorker | None = None
        self._begun: set[str] | None = None
        """Where the file was empty, the only keys that we can know of; None where asking is the only way."""

    def __repr__(self) -> str:
        return f"SqliteJournal({str(self.path)!r})"

    async def open(
        self, news: Callable[[list[JournalEntry]], None] = lambda _: None, /, *, listening: bool = False
    ) -> None:
        """Open the file, or make it.

        Args:
            news: Hears of tasks that a dying process leaves behind, and of ends that others have recorded.
            listening: Whether to look for such ends all the time, four times a second.

        Raises:
            JournalError: It can't be opened, isn't a journal, is damaged, or was written by a newer version.
        """
        from flux2max_async.journal._worker import JournalWorker  # noqa: PLC0415 - sessions without a journal don't need a database

        if self._scribe is not None and not self._scribe.ended.get_loop().is_closed():
            raise JournalError(
                f"the journal {self.path} is open already: each session needs a SqliteJournal of its own"
            )
        self._scribe = scribe = JournalWorker(self.path, self._lease, self._busy_timeout, news, listening=listening)
        try:
            self._begun = set() if await scribe.opened else None
        except BaseException:
            self._scribe = None
            scribe.dismiss()
            raise

    async def close(self) -> None:
        """Write what is still to be written, and close the file. Doing it twice does no harm."""
        scribe, self._scribe = self._scribe, None
        if scribe is not None and not scribe.ended.get_loop().is_closed():
            scribe.dismiss()
            await scribe.ended

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    # ------------------------------------------------------------------ what a session needs

    async def find(self, key: str, /) -> JournalEntry | None:
        """Give the newest entry of a key; only `begin()` is sure to see what others have begun a moment ago."""
        undisturbed = self._open_scribe().undisturbed
        if self._begun is not None and undisturbed and key not in self._begun:
            return None
        found: JournalEntry | None = await self._ask(lambda tables: tables.find(key), writes=False)
        return found

    async def find_task(self, task_id: str, /) -> JournalEntry | None:
        """Give the entry of a task."""
        found: JournalEntry | None = await self._ask(lambda tables: tables.find_task(task_id), writes=False)
        return found

    async def begin(self, entry: JournalEntry, /, *, limit: Decimal | None = None) -> bool:
        """Write an intent durably; False where its attempt has been made by somebody else."""
        begun: bool = await self._ask(lambda tables: tables.begin(entry, limit), durable=True, lone=limit is None)
        if self._begun is not None:
            self._begun.add(entry.key)
            if not begun or len(self._begun) > _FEW:
                self._begun = None
        return begun

    async def adopt(self, entry: JournalEntry, /) -> bool:
        """Take over a task that nobody follows, or whose pictures nobody saves; False where somebody was faster."""
        adopted: bool = await self._ask(lambda tables: tables.adopt(entry), lone=True)
        return adopted

    async def record(self, entry: JournalEntry, /) -> None:
        """Write down what is new about an entry."""
        await self._ask(lambda tables: tables.record(entry), lone=True)

    async def changed(self, entry: JournalEntry, /) -> None:
        """Wait until an entry that is held elsewhere has changed, or whoever held it is gone."""
        await self._open_scribe().watch(entry)

    # ------------------------------------------------------------------ looking inside

    async def entries(self) -> AsyncIterator[JournalEntry]:
        """Iterate over all entries in the order of their making; a request paid for again has several.

        Raises:
            JournalError: The file can't be read, or isn't a journal.
        """
        from flux2max_async.journal._store import listed  # noqa: PLC0415 - as above

        after = 0
        while page := await anyio.to_thread.run_sync(listed, self.path, after, _PAGE):
            for number, entry in page:
                after = number
                yield entry

    async def export(self, path: str | PathLike[str], /) -> Path:
        """Write all entries into a file, as JSON Lines; whole or not at all.

        Raises:
            JournalError: The journal can't be read.
            OSError: The file can't be written.
        """
        target = Path(path)
        lines = [json.dumps(entry.as_json(), ensure_ascii=False) async for entry in self.entries()]
        await anyio.to_thread.run_sync(_write, target, lines)
        return target

    # ------------------------------------------------------------------ behind

    async def _ask(
        self, work: "Callable[[SqliteStore], Any]", *, writes: bool = True, durable: bool = False, lone: bool = False
    ) -> Any:
        return await self._open_scribe().ask(work, writes=writes, durable=durable, lone=lone)

    def _open_scribe(self) -> "JournalWorker":
        if self._scribe is None:
            raise JournalError(f"the journal {self.path} is not open")
        return self._scribe


_LONGEST = 3600.0
_PAGE = 500
_FEW = 10_000
"""Keys that are remembered to spare a fresh batch its questions."""


def _write(target: Path, lines: Iterable[str]) -> None:
    part = target.with_name(f".{secrets.token_hex(8)}.part")
    try:
        part.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8", errors="backslashreplace")
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)
