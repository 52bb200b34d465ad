"""The scribe: the one thread that touches a journal's file, so that the event loop never waits for a disk.

What is asked of it while it waits for the disk is done together in its next transaction: concurrent intents share an
fsync. It also tells the other processes that this one is alive, and looks whether they are, by counting their beats
on its own monotonic clock: the machine's time of day may jump as it likes.
"""

import asyncio
import contextlib
import logging
import queue
import sqlite3
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs

from flux2max_async._exceptions import FluxError, JournalError
from flux2max_async.journal._entry import JournalEntry
from flux2max_async.journal._schema import journal_error
from flux2max_async.journal._store import SqliteStore

log = logging.getLogger("flux2max_async")

_SYNC = 1.0
"""Seconds until what was written without waiting for the disk has reached it."""
_LOOK = 0.25
"""Seconds between looks for what others have written, where that is waited for."""
_MOST = 500
"""What is done in one transaction."""


@attrs.frozen(eq=False)
class Job:
    """Something to do with the tables, and who waits for it."""

    work: Callable[[SqliteStore], Any]
    answer: "asyncio.Future[Any]"
    writes: bool = True
    durable: bool = False
    """Whether it has to be on the disk before it is answered."""
    lone: bool = False
    """Whether it is a single statement, which needs no transaction around it."""


@attrs.define(eq=False)
class _Other:
    """What is known of another owner."""

    beat: int
    since: float
    """When its beat was first seen, by our clock."""


class JournalWorker:
    """Runs errands in the order in which they were given, from its start to its dismissal.

    Args:
        path: The journal's file.
        lease: Seconds without a sign of life after which the others may take us for dead.
        patience: Seconds to wait while another program has the file locked.
        news: Called in the event loop with the tasks that another process has left behind, ...
        listening: ... and, if this is true, soon with those of which another process was told the end.
    """

    def __init__(
        self,
        path: Path,
        lease: float,
        patience: float,
        news: Callable[[list[JournalEntry]], None],
        *,
        listening: bool,
    ) -> None:
        self._path = path
        self._lease = lease
        self._patience = patience
        self._news = news
        self._listening = listening
        self._loop = asyncio.get_running_loop()
        self._errands: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._watched: list[tuple[JournalEntry, asyncio.Future[Any]]] = []
        self._others: dict[str, _Other] = {}
        self._next_beat = 0.0
        self._looked = 0.0
        """When we last saw who else is alive."""
        self._unsynced = False
        self.undisturbed = True
        """Whether nobody else has written anything since the file was opened."""
        self.transactions = 0
        """Those that waited for the disk."""
        self.ended: asyncio.Future[None] = self._loop.create_future()
        self.opened: asyncio.Future[bool] = self._loop.create_future()
        """Whether the journal was empty; or why it can't be used."""
        # A daemon: a session that was never closed must not keep the program from ending.
        threading.Thread(target=self._run, name=f"journal {path.name}", daemon=True).start()

    def ask(
        self, work: Callable[[SqliteStore], Any], *, writes: bool = True, durable: bool = False, lone: bool = False
    ) -> "asyncio.Future[Any]":
        """Give an errand; its answer comes in the event loop."""
        answer: asyncio.Future[Any] = self._loop.create_future()
        self._errands.put(Job(work, answer, writes, durable, lone))
        return answer

    def watch(self, entry: JournalEntry) -> "asyncio.Future[None]":
        """Give what is resolved once an entry is not as it was, or nobody holds it any more."""
        changed: asyncio.Future[None] = self._loop.create_future()
        watch = (entry, changed)
        self.ask(lambda _: self._watched.append(watch), writes=False)
        return changed

    def dismiss(self) -> None:
        """Do what was given so far, and stop."""
        self._errands.put(None)

    # ------------------------------------------------------------------ in the thread

    def _run(self) -> None:
        try:
            tables = SqliteStore(self._path, self._lease, self._patience)
        except Exception as error:  # noqa: BLE001 - whatever it is, somebody waits for it
            failure = error if isinstance(error, JournalError) else journal_error(self._path, error)
            self._tell((self.opened, failure, None), (self.ended, None, None))
            return
        try:
            self._tell((self.opened, None, tables.empty))
            self._serve(tables)
        finally:
            tables.close()
            # Whoever still waits for a change asks again, and hears that the journal isn't open.
            unanswered = [(future, None, None) for _, future in self._watched]
            with contextlib.suppress(RuntimeError):  # the event loop may have ended first
                self._tell(*unanswered, (self.ended, None, None))

    def _serve(self, tables: SqliteStore) -> None:
        others_have_written = tables.others_have_written()
        dismissed = False
        while not dismissed:
            try:
                dismissed = self._take_a_turn(tables, others_have_written)
            except Exception:
                if self._loop.is_closed():
                    log.warning("journal %s: the event loop ended before its session was closed", self._path)
                    return
                # Whatever it was, errands are still to be run: without this thread, everybody would wait for ever.
                log.exception("journal %s", self._path)

    def _take_a_turn(self, tables: SqliteStore, others_have_written: Callable[[], bool]) -> bool:
        """Do what there is to be done now; tells whether that was all."""
        news = False
        if time.monotonic() >= self._next_beat:
            self._look_around(tables)
            news = others_have_written()
            self.undisturbed = self.undisturbed and not news
        errands = self._fetch()
        if work := [errand for errand in errands if errand is not None]:
            self._do(tables, work)
        if None in errands:
            return True
        if (self._watched or self._listening) and (others_have_written() or news):
            self.undisturbed = False
            self._look_after_watched(tables)
            if self._listening:
                self._tell_news(tables.told())
        return False

    def _fetch(self) -> list[Job | None]:
        if self._loop.is_closed():
            raise RuntimeError
        wait = self._next_beat - time.monotonic()
        if self._watched or self._listening:
            wait = min(wait, _LOOK)
        errands: list[Job | None] = []
        with contextlib.suppress(queue.Empty):
            errands.append(self._errands.get(timeout=max(wait, 0.0)))
            while len(errands) < _MOST:
                errands.append(self._errands.get_nowait())
        return errands

    def _do(self, tables: SqliteStore, errands: list[Job]) -> None:
        answers: list[tuple[asyncio.Future[Any], FluxError | None, Any]] = []
        durable = any(errand.durable for errand in errands)
        writes = any(errand.writes for errand in errands)
        try:
            lone = len(errands) == 1 and errands[0].lone
            if lone:
                tables.wait_for_disk(durable=durable)
            with tables.transaction(durable=durable) if writes and not lone else contextlib.nullcontext():
                answers.extend(self._one(tables, errand) for errand in errands)
        except sqlite3.Error as error:
            failure = journal_error(self._path, error)
            failure.__cause__ = error
            answers = [(errand.answer, failure, None) for errand in errands]
        else:
            self.transactions += durable
            if durable:
                self._unsynced = False
            elif writes and not self._unsynced:
                self._unsynced = True
                self._next_beat = min(self._next_beat, time.monotonic() + _SYNC)
        self._tell(*answers)

    def _one(self, tables: SqliteStore, errand: Job) -> tuple["asyncio.Future[Any]", FluxError | None, Any]:
        try:
            return errand.answer, None, errand.work(tables)
        except FluxError as error:
            return errand.answer, error, None
        except sqlite3.Error:
            raise
        except Exception as error:
            log.exception("journal %s", self._path)
            return errand.answer, JournalError(f"the journal {self._path} can't hold this: {error!r}"), None

    def _look_around(self, tables: SqliteStore) -> None:
        """Give a sign of life, and see who else is alive."""
        now = time.monotonic()
        self._next_beat = now + self._lease / 4
        left: list[JournalEntry] = []
        try:
            with tables.transaction(durable=self._unsynced):
                tables.beat()
                left = self._inheritance(tables, now)
            self._unsynced = False
        except sqlite3.Error as error:
            log.warning("%s", journal_error(self._path, error))
        else:
            self._tell_news(left)
            self._look_after_watched(tables)

    def _inheritance(self, tables: SqliteStore, now: float) -> list[JournalEntry]:
        """Take over from those who were seen alive and are not any more."""
        # Where we were kept from looking, they may have been kept from beating.
        late = now - self._looked > self._lease / 2
        self._looked = now
        for owner, (beat, lease, gone) in tables.others().items():
            known = self._others.get(owner)
            if known is None or known.beat != beat or late:
                known = self._others[owner] = _Other(beat, now)
            if gone or now - known.since > lease:
                tables.bury(owner)
        left: list[JournalEntry] = []
        for owner in [owner for owner in self._others if owner not in tables.others()]:
            del self._others[owner]
            left += tables.inherit(owner)
        return left

    def _look_after_watched(self, tables: SqliteStore) -> None:
        waiting: list[tuple[JournalEntry, asyncio.Future[Any]]] = []
        changed: list[tuple[JournalEntry, asyncio.Future[Any]]] = []
        for entry, future in self._watched:
            if not future.done():
                (waiting if self._is_as(tables, entry) else changed).append((entry, future))
        self._watched = waiting
        if changed:
            self._tell(*((future, None, None) for _, future in changed))

    def _is_as(self, tables: SqliteStore, entry: JournalEntry) -> bool:
        try:
            return tables.is_as(entry)
        except Exception as error:  # noqa: BLE001 - who waits for it will ask again, and be told
            log.warning("%s", journal_error(self._path, error))
            return False

    def _tell_news(self, entries: list[JournalEntry]) -> None:
        if entries:
            self._loop.call_soon_threadsafe(self._news, entries)

    def _tell(self, *answers: tuple["asyncio.Future[Any]", FluxError | None, Any]) -> None:
        self._loop.call_soon_threadsafe(_answer, answers)


def _answer(answers: tuple[tuple["asyncio.Future[Any]", FluxError | None, Any], ...]) -> None:
    for future, error, value in answers:
        if future.done():
            continue
        if error is None:
            future.set_result(value)
        else:
            future.set_exception(error)
            future.exception()  # whoever waited may be gone; the errand's own caller logs what matters
