"""The thread that reads and writes a journal's file, so that the event loop never waits for a disk.

Jobs that are queued while it waits for the disk run together in its next transaction: concurrent intents share an
fsync. The thread also writes this owner's heartbeat and watches those of the others, as `_leases` describes.

A record that fails because there is no space, or for another reason that may pass, is kept, and written together with
whatever comes next: the caller has learned of the error, and goes on. What is begun later waits for it.
"""

import asyncio
import contextlib
import math
import queue
import sqlite3
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flux2max_async._exceptions import FluxError, JournalError
from flux2max_async._text import get_logger
from flux2max_async._wake_pipe import WakePipe, pipe_path, wake_owner
from flux2max_async.journal._entry import JournalEntry
from flux2max_async.journal._jobs import Job, Resolution, Watch, resolve_futures
from flux2max_async.journal._leases import HEARTBEAT_INTERVAL, LeaseMonitor
from flux2max_async.journal._schema import journal_error, may_pass
from flux2max_async.journal._store import SqliteStore

log = get_logger("journal")

_SYNC_DELAY = 1.0
"""Seconds after which writes that didn't wait for the disk are synchronized."""
_CHECK_INTERVAL = 0.25
"""Seconds between checks for changes by other processes, while somebody waits for them."""
_CHECKPOINT_INTERVAL = 3.0
"""Seconds after a write until SQLite's log is copied to the file; twice that if there are jobs all the time."""
_MAX_JOBS_PER_TRANSACTION = 500
_LEASE_IS_LOST = (
    "journal %s: this process was held up for longer than its lease of %g s: others may follow its tasks now, and what "
    "was being submitted counts as uncertain"
)


class JournalWorker:
    """Runs jobs in their order, in a thread of its own, until it is stopped.

    Args:
        path: The journal's file.
        lease: Seconds without a heartbeat after which other owners may presume this one dead.
        busy_timeout: Seconds to wait while another program has the file locked.
        on_external_change: Called in the event loop with tasks that were adopted from another owner, and, if changes
            are watched, with the entries that are held here and have ended.
        watch_changes: Whether to check for ends that other sessions record, and not only while somebody waits.
    """

    def __init__(
        self,
        path: Path,
        lease: float,
        busy_timeout: float,
        on_external_change: Callable[[list[JournalEntry]], None],
        *,
        watch_changes: bool,
    ) -> None:
        self._path = path
        self._lease = lease
        self._busy_timeout = busy_timeout
        self._on_external_change = on_external_change
        self._watch_changes = watch_changes
        self._loop = asyncio.get_running_loop()
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._watches: list[Watch] = []
        self._pipe: WakePipe | None = None
        """Through which other owners report that they have recorded an end, if they are expected to."""
        self._leases = LeaseMonitor(lease)
        self._next_heartbeat_at = 0.0
        self._has_unsynced_writes = False
        self._checkpoint_at: float | None = time.monotonic() + _CHECKPOINT_INTERVAL
        """None if the file itself holds everything."""
        self._is_replaced = False
        self._unwritten: dict[tuple[str, int], Job] = {}
        """The newest record of each entry whose newest record could not be written."""
        self.is_sole_writer = True
        """Whether nobody else has written since the file was opened."""
        self.durable_transactions = 0
        self.stopped: asyncio.Future[None] = self._loop.create_future()
        self.opened: asyncio.Future[bool] = self._loop.create_future()
        """Resolved with whether the journal was empty, or with the JournalError if it can't be used."""
        # A daemon: a session that was never closed must not keep the program from ending.
        threading.Thread(target=self._run_thread, name=f"journal {path.name}", daemon=True).start()

    def run(
        self,
        function: Callable[[SqliteStore], Any],
        *,
        writes: bool = True,
        durable: bool = False,
        single_statement: bool = False,
        entry_id: tuple[str, int] | None = None,
        wakes: str | None = None,
    ) -> "asyncio.Future[Any]":
        """Queue a job and return the future of its result; `Job` describes the arguments."""
        future: asyncio.Future[Any] = self._loop.create_future()
        self._jobs.put(Job(function, future, writes, durable, single_statement, entry_id, wakes))
        return future

    def listen(self) -> None:
        """Check for changes as soon as another owner wakes this one; call it when the file is open."""
        if self._pipe is not None:
            self._loop.add_reader(self._pipe, self._on_woken, self._pipe)

    def _on_woken(self, pipe: WakePipe) -> None:
        pipe.clear()
        self.run(lambda _: None, writes=False)  # the thread checks for changes after each job

    def wait_for_change(self, entry: JournalEntry) -> "asyncio.Future[None]":
        """Return a future that is resolved when an entry has changed or nobody holds it any more."""
        watch = Watch(entry, self._loop.create_future())
        self.run(lambda _: self._watches.append(watch), writes=False)
        return watch.future

    def stop(self) -> None:
        """Stop the thread after the jobs that are queued."""
        if self._pipe is not None:
            self._loop.remove_reader(self._pipe)
        self._jobs.put(None)

    # ------------------------------------------------------------------ in the thread

    def _run_thread(self) -> None:
        try:
            store = SqliteStore(self._path, self._lease, self._busy_timeout)
        except Exception as error:  # noqa: BLE001 - whatever it is, somebody waits for it
            failure = error if isinstance(error, JournalError) else journal_error(self._path, error)
            self._resolve(Resolution(self.opened, error=failure), Resolution(self.stopped))
            return
        try:
            if self._watch_changes:
                # Without a pipe, as on Windows, changes are found by the checks alone.
                with contextlib.suppress(OSError, AttributeError):
                    self._pipe = WakePipe(pipe_path(self._path.resolve(), store.owner))
            self._resolve(Resolution(self.opened, store.is_empty))
            self._run_until_stopped(store)
        finally:
            store.close()
            if self._pipe is not None:
                self._pipe.close()
            # Callers that wait for a change read the entry again, and get the error that the journal is not open.
            unresolved = [Resolution(watch.future) for watch in self._watches]
            with contextlib.suppress(RuntimeError):  # the event loop may have ended first
                self._resolve(*unresolved, Resolution(self.stopped))

    def _run_until_stopped(self, store: SqliteStore) -> None:
        stopping = False
        while not stopping:
            try:
                stopping = self._run_once(store)
            except Exception:
                if self._loop.is_closed():
                    log.warning("journal %s: the event loop ended before its session was closed", self._path)
                    return
                # The thread must go on, or all later jobs would wait forever.
                log.exception("journal %s: unexpected error", self._path)

    def _run_once(self, store: SqliteStore) -> bool:
        """Write the heartbeat if it is due, then run the next jobs; return whether to stop."""
        changed = False
        if time.monotonic() >= self._next_heartbeat_at:
            self._heartbeat(store)
            changed = store.changed_externally()
            self.is_sole_writer = self.is_sole_writer and not changed
        jobs = self._next_jobs()
        pending = [job for job in jobs if job is not None]
        if pending or (self._unwritten and None in jobs):
            self._run_jobs(store, pending)
        if None in jobs:
            return True
        self._checkpoint_if_due(store)
        if (self._watches or self._watch_changes) and (store.changed_externally() or changed):
            self.is_sole_writer = False
            self._check_watches(store)
            if self._watch_changes:
                self._report(store.ended_entries())
        return False

    def _next_jobs(self) -> list[Job | None]:
        """Wait for jobs until the next heartbeat or check is due; None stands for the request to stop."""
        if self._loop.is_closed():
            raise RuntimeError
        timeout = min(self._next_heartbeat_at, self._checkpoint_at or math.inf) - time.monotonic()
        if self._watches or self._watch_changes:
            timeout = min(timeout, _CHECK_INTERVAL)
        try:
            jobs = [self._jobs.get(timeout=max(timeout, 0.0))]
        except queue.Empty:
            return []
        while len(jobs) < _MAX_JOBS_PER_TRANSACTION and not self._jobs.empty():
            jobs.append(self._jobs.get_nowait())
        return jobs

    def _run_jobs(self, store: SqliteStore, jobs: list[Job]) -> None:
        unwritten = len(self._unwritten)
        jobs = [*self._unwritten.values(), *jobs]
        durable = any(job.durable for job in jobs)
        writes = any(job.writes for job in jobs)
        needs_transaction = writes and not (len(jobs) == 1 and jobs[0].single_statement)
        if durable:
            self._check_file(store)
        try:
            if needs_transaction:
                with store.transaction(durable=durable):
                    resolutions = [self._run_job(store, job) for job in jobs]
            else:
                store.set_synchronous(durable=durable)
                resolutions = [self._run_job(store, job) for job in jobs]
        except sqlite3.Error as error:
            failure = journal_error(self._path, error)
            failure.__cause__ = error
            resolutions = [Resolution(job.future, error=failure) for job in jobs]
            if may_pass(error):
                self._keep_unwritten(jobs)
        else:
            if unwritten:
                self._unwritten.clear()
                log.info("journal %s: %d entries were written that could not be before", self._path, unwritten)
            self._on_written(writes=writes, durable=durable)
            for job in jobs:
                if job.wakes is not None:
                    wake_owner(pipe_path(self._path.resolve(), job.wakes))
        self._resolve(*resolutions)

    def _keep_unwritten(self, jobs: list[Job]) -> None:
        self._unwritten.update({job.entry_id: job for job in jobs if job.entry_id is not None})
        if self._unwritten:
            self._next_heartbeat_at = min(self._next_heartbeat_at, time.monotonic() + _SYNC_DELAY)

    def _on_written(self, *, writes: bool, durable: bool) -> None:
        now = time.monotonic()
        self.durable_transactions += durable
        if durable:
            self._has_unsynced_writes = False
        elif writes and not self._has_unsynced_writes:
            self._has_unsynced_writes = True
            self._next_heartbeat_at = min(self._next_heartbeat_at, now + _SYNC_DELAY)
        if writes and self._checkpoint_at is None:
            self._checkpoint_at = now + _CHECKPOINT_INTERVAL

    def _run_job(self, store: SqliteStore, job: Job) -> Resolution:
        if job.durable and self._is_replaced:
            return Resolution(job.future, error=self._replaced_error())
        try:
            return Resolution(job.future, job.function(store))
        except FluxError as error:
            return Resolution(job.future, error=error)
        except sqlite3.Error:
            raise
        except Exception as error:
            log.exception("journal %s: unexpected error", self._path)
            failure = JournalError(f"the journal {self._path} can't store this: {error!r}")
            return Resolution(job.future, error=failure)

    # ------------------------------------------------------------------ the file

    def _checkpoint_if_due(self, store: SqliteStore) -> None:
        """Copy SQLite's log to the file when nobody waits for the thread, or it is long overdue."""
        if self._checkpoint_at is None:
            return
        late = time.monotonic() - self._checkpoint_at
        if late < 0 or (late < _CHECKPOINT_INTERVAL and not self._jobs.empty()):
            return
        try:
            complete = store.checkpoint()
        except sqlite3.Error as error:
            log.warning("%s", journal_error(self._path, error))
            complete = False
        self._checkpoint_at = None if complete else time.monotonic() + _CHECKPOINT_INTERVAL

    def _check_file(self, store: SqliteStore) -> None:
        """Begin nothing more once the file is another one: the next run wouldn't find it, and pay again."""
        if not self._is_replaced and store.is_replaced():
            self._is_replaced = True
            store.detach()
            log.error("%s", self._replaced_error())

    def _replaced_error(self) -> JournalError:
        return JournalError(
            f"the journal {self._path} was deleted, replaced or moved while it was open: nothing more is submitted, "
            "and tasks that are running are recorded in the file that was opened"
        )

    # ------------------------------------------------------------------ leases

    def _heartbeat(self, store: SqliteStore) -> None:
        """Write the heartbeat, drop owners that are presumed dead, and adopt the tasks of dropped ones."""
        now = time.monotonic()
        self._next_heartbeat_at = now + self._lease * HEARTBEAT_INTERVAL
        self._check_file(store)
        if self._unwritten:
            self._run_jobs(store, [])
        try:
            with store.transaction(durable=self._has_unsynced_writes):
                was_dropped = not store.heartbeat()
                adopted = self._leases.check(store, now)
            self._has_unsynced_writes = False
        except sqlite3.Error as error:
            log.warning("%s", journal_error(self._path, error))
        else:
            if was_dropped:
                log.warning(_LEASE_IS_LOST, self._path, self._lease)
            self._report(adopted)
            self._check_watches(store)

    # ------------------------------------------------------------------ changes by other sessions

    def _check_watches(self, store: SqliteStore) -> None:
        waiting: list[Watch] = []
        changed: list[Watch] = []
        for watch in self._watches:
            if not watch.future.done():
                (waiting if self._is_unchanged(store, watch.entry) else changed).append(watch)
        self._watches = waiting
        if changed:
            self._resolve(*(Resolution(watch.future) for watch in changed))

    def _is_unchanged(self, store: SqliteStore, entry: JournalEntry) -> bool:
        try:
            return store.is_unchanged(entry)
        except Exception as error:  # noqa: BLE001 - the caller reads the entry again, and gets the error
            log.warning("%s", journal_error(self._path, error))
            return False

    def _report(self, entries: list[JournalEntry]) -> None:
        if entries:
            self._loop.call_soon_threadsafe(self._on_external_change, entries)

    def _resolve(self, *resolutions: Resolution) -> None:
        self._loop.call_soon_threadsafe(resolve_futures, resolutions)
