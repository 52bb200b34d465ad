"""The thread that reads and writes a journal's database, so that the event loop never waits for a disk or a network.

Jobs that are queued while it waits run together in its next transaction: concurrent intents share an fsync. The thread
also writes this owner's heartbeat and watches those of the others, as `_leases` describes.

A record that fails because there is no space, or for another reason that may pass, is kept, and written together with
whatever comes next: the caller has learned of the error, and goes on. What is begun later waits for it.

If the connection to the database is lost, jobs wait until there is one again, for at most 30 seconds after the loss.
Then they fail, and so does what is requested later; records are kept as above.
"""

import asyncio
import contextlib
import math
import threading
import time
from collections.abc import Callable
from typing import Any

from flux2max_async._exceptions import FluxError, JournalError
from flux2max_async._postgres import Backoff
from flux2max_async._text import get_logger
from flux2max_async.journal._entry import JournalEntry
from flux2max_async.journal._job_queue import JobQueue
from flux2max_async.journal._jobs import Job, Resolution, Watch, resolve_futures
from flux2max_async.journal._leases import LeaseMonitor
from flux2max_async.journal._store_protocol import JournalStore, Pending

log = get_logger("journal")

_SYNC_DELAY = 1.0
"""Seconds after which writes that didn't wait for the disk are synchronized."""
_MAX_OUTAGE = 30.0
"""Seconds without a connection that jobs wait."""
_MAX_JOBS_PER_TRANSACTION = 500
_LEASE_IS_LOST = (
    "journal %s: this process was held up for longer than its lease of %g s: others may follow its tasks now, and what "
    "was being submitted counts as uncertain"
)


class JournalWorker:
    """Runs jobs in their order, in a thread of its own, until it is stopped.

    Args:
        name: The journal's name, for messages.
        open_store: Opens the database; called in the thread.
        lease: Seconds without a heartbeat after which other owners may presume this one dead.
        on_external_change: Called in the event loop with tasks that were adopted from another owner, and, if changes
            are watched, with the entries that are held here and have ended.
        watch_changes: Whether to check for ends that other sessions record, and not only while somebody waits.
    """

    def __init__(
        self,
        name: object,
        open_store: Callable[[], JournalStore],
        lease: float,
        on_external_change: Callable[[list[JournalEntry]], None],
        *,
        watch_changes: bool,
    ) -> None:
        self._name = name
        self._open_store = open_store
        self._lease = lease
        self._on_external_change = on_external_change
        self._watch_changes = watch_changes
        self._loop = asyncio.get_running_loop()
        self._jobs = JobQueue()
        self._watches: list[Watch] = []
        self._leases = LeaseMonitor(lease)
        self._next_heartbeat_at = 0.0
        self._has_unsynced_writes = False
        self._unwritten: dict[tuple[str, int], Job] = {}
        """The newest record of each entry whose newest record could not be written."""
        self._postponed: list[Job] = []
        """Jobs that run again, since they were interrupted, or wait for a connection."""
        self._lost_at: float | None = None
        """When the connection was lost, until all is well again."""
        self._retry_at: float | None = None
        self._backoff = Backoff()
        self._stopping = False
        """Whether the request to stop has come while there was no connection."""
        self.is_sole_writer = True
        """Whether nobody else has written since the journal was opened."""
        self.durable_transactions = 0
        self.stopped: asyncio.Future[None] = self._loop.create_future()
        self.opened: asyncio.Future[bool] = self._loop.create_future()
        """Resolved with whether the journal was empty, or with the JournalError if it can't be used."""
        # A daemon: a session that was never closed must not keep the program from ending.
        threading.Thread(target=self._run_thread, name=f"journal {name}", daemon=True).start()

    def run(self, function: Callable[[JournalStore], Any], **options: Any) -> "asyncio.Future[Any]":
        """Queue a job and return the future of its result; `Job` describes the options."""
        future: asyncio.Future[Any] = self._loop.create_future()
        self._jobs.put(Job(function, future, **options))
        return future

    async def wait_for_change(self, entry: JournalEntry) -> None:
        """Wait until an entry has changed or nobody holds it any more."""
        watch = Watch(entry, self._loop.create_future())
        await self.run(lambda store: self._add_watch(store, watch), writes=False)
        await watch.future

    def stop(self) -> None:
        """Stop the thread after the jobs that are queued."""
        self._jobs.put(None)

    # ------------------------------------------------------------------ in the thread

    def _run_thread(self) -> None:
        try:
            store = self._open_store()
        except Exception as error:  # noqa: BLE001 - whatever it is, somebody waits for it
            failure = JournalError(f"the journal {self._name} can't be used: {error}")
            failure = error if isinstance(error, JournalError) else failure
            self._resolve(Resolution(self.opened, error=failure), Resolution(self.stopped))
            return
        try:
            self._resolve(Resolution(self.opened, store.is_empty))
            self._run_until_stopped(store)
        finally:
            store.close()
            self._jobs.close()
            # Callers that wait for a change read the entry again, and get the error that the journal is not open.
            unresolved = [Resolution(watch.future) for watch in self._watches]
            with contextlib.suppress(RuntimeError):  # the event loop may have ended first
                self._resolve(*unresolved, Resolution(self.stopped))

    def _run_until_stopped(self, store: JournalStore) -> None:
        stopping = False
        while not stopping:
            try:
                stopping = self._run_once(store) if store.is_connected else self._wait_for_connection(store)
            except Exception:
                if self._loop.is_closed():
                    log.warning("journal %s: the event loop ended before its session was closed", self._name)
                    return
                # The thread must go on, or all later jobs would wait forever.
                log.exception("journal %s: unexpected error", self._name)

    def _run_once(self, store: JournalStore) -> bool:
        """Write the heartbeat if it is due, then run the next jobs; return whether to stop."""
        changed = False
        if time.monotonic() >= self._next_heartbeat_at:
            self._heartbeat(store)
            changed = store.changed_externally()
            self.is_sole_writer = self.is_sole_writer and not changed
            if not store.is_connected:
                return False
        jobs = self._next_jobs(store)
        pending = [job for job in jobs if job is not None]
        if pending or (self._unwritten and None in jobs):
            self._run_jobs(store, pending)
        if None in jobs:
            if self._postponed:
                self._jobs.put(None)
            return not self._postponed
        store.upkeep(is_idle=self._jobs.is_empty())
        if self._watches or self._watch_changes or store.fileno() is not None:
            changed = store.changed_externally() or changed
        if changed:
            self.is_sole_writer = False
            self._check_watches(store)
            if self._watch_changes:
                self._report_ends(store)
        return False

    def _next_jobs(self, store: JournalStore) -> list[Job | None]:
        """Wait for jobs until the next heartbeat or check is due; None stands for the request to stop."""
        if self._loop.is_closed():
            raise RuntimeError
        timeout = min(self._next_heartbeat_at, store.upkeep_at or math.inf) - time.monotonic()
        if self._watches or self._watch_changes:
            timeout = min(timeout, store.check_interval)
        jobs, is_readable = self._jobs.get(
            _MAX_JOBS_PER_TRANSACTION, 0.0 if self._postponed else timeout, store.fileno()
        )
        if is_readable:
            store.receive()
        jobs[:0], self._postponed = self._postponed, []
        return jobs

    def _run_jobs(self, store: JournalStore, jobs: list[Job]) -> None:
        unwritten, new = len(self._unwritten), jobs
        jobs = [*self._unwritten.values(), *jobs]
        durable = any(job.durable for job in jobs)
        writes = any(job.writes for job in jobs)
        needs_transaction = writes and not (len(jobs) == 1 and jobs[0].single_statement)
        problem = store.problem() if durable else None
        try:
            if needs_transaction:
                with store.transaction(durable=durable):
                    resolutions = self._run_each(store, jobs, problem)
            else:
                store.set_synchronous(durable=durable)
                resolutions = self._run_each(store, jobs, problem)
        except store.errors as error:
            if store.is_interrupted(error):
                self._postponed += new
                return
            failure = store.journal_error(error)
            resolutions = [Resolution(job.future, error=failure) for job in jobs]
            if store.may_pass(error):
                self._keep_unwritten(jobs)
        else:
            if unwritten:
                self._unwritten.clear()
                log.info("journal %s: %d entries were written that could not be before", self._name, unwritten)
            self._on_written(store, writes=writes, durable=durable)
            for job in jobs:
                if job.wakes is not None:
                    store.wake(job.wakes)
        self._resolve(*resolutions)

    # ------------------------------------------------------------------ without a connection

    def _wait_for_connection(self, store: JournalStore) -> bool:
        """Try to connect anew, and postpone what is requested meanwhile; return whether to stop."""
        if self._loop.is_closed():
            raise RuntimeError
        now = time.monotonic()
        if self._lost_at is None:
            self._lost_at = now
            log.warning("journal %s: its connection is lost; nothing is submitted without one", self._name)
        self._retry_at = now + self._backoff.next_delay() if self._retry_at is None else self._retry_at
        jobs, _ = self._jobs.get(_MAX_JOBS_PER_TRANSACTION, self._retry_at - now, None)
        self._postponed += [job for job in jobs if job is not None]
        self._stopping = self._stopping or None in jobs
        if time.monotonic() >= self._retry_at:
            self._retry_at = None
            failure = store.reconnect()
            if failure is None:
                self._next_heartbeat_at = 0.0
                if self._stopping:
                    self._jobs.put(None)
                return False
            if time.monotonic() - self._lost_at >= _MAX_OUTAGE:
                self._resolve(*(Resolution(job.future, error=failure) for job in self._postponed))
                self._keep_unwritten(self._postponed)
                self._postponed = []
                return self._stopping
        return self._stopping and not (self._postponed or self._unwritten)

    def _keep_unwritten(self, jobs: list[Job]) -> None:
        self._unwritten.update({job.entry_id: job for job in jobs if job.entry_id is not None})
        if self._unwritten:
            self._next_heartbeat_at = min(self._next_heartbeat_at, time.monotonic() + _SYNC_DELAY)

    def _on_written(self, store: JournalStore, *, writes: bool, durable: bool) -> None:
        self.durable_transactions += durable
        if durable:
            self._has_unsynced_writes = False
        elif writes and not self._has_unsynced_writes:
            self._has_unsynced_writes = True
            self._next_heartbeat_at = min(self._next_heartbeat_at, time.monotonic() + _SYNC_DELAY)
        if writes:
            store.schedule_upkeep()

    def _run_each(self, store: JournalStore, jobs: list[Job], problem: JournalError | None) -> list[Resolution]:
        resolutions = [self._run_job(store, job, problem) for job in jobs]
        for resolution in resolutions:
            if isinstance(resolution.result, Pending):
                resolution.result = resolution.result.get()
        return resolutions

    def _run_job(self, store: JournalStore, job: Job, problem: JournalError | None) -> Resolution:
        if job.durable and problem is not None:
            return Resolution(job.future, error=problem)
        try:
            return Resolution(job.future, job.function(store))
        except FluxError as error:
            return Resolution(job.future, error=error)
        except store.errors:
            raise
        except Exception as error:
            log.exception("journal %s: unexpected error", self._name)
            failure = JournalError(f"the journal {self._name} can't store this: {error!r}")
            return Resolution(job.future, error=failure)

    # ------------------------------------------------------------------ leases

    def _heartbeat(self, store: JournalStore) -> None:
        """Write the heartbeat, drop owners that are presumed dead, and adopt the tasks of dropped ones."""
        now = time.monotonic()
        self._next_heartbeat_at = now + store.heartbeat_interval
        store.problem()
        if self._unwritten:
            self._run_jobs(store, [])
        try:
            with store.transaction(durable=self._has_unsynced_writes):
                was_dropped = not store.heartbeat()
                adopted = self._leases.check(store, now)
            self._has_unsynced_writes = False
        except store.errors as error:
            if not store.is_interrupted(error):
                log.warning("%s", store.journal_error(error))
        else:
            if was_dropped:
                log.warning(_LEASE_IS_LOST, self._name, self._lease)
            if self._lost_at is not None:
                log.info("journal %s: connected again after %.1f s", self._name, now - self._lost_at)
                self._lost_at = None
            self._backoff.reset()
            self._report(adopted)
            self._check_watches(store)

    # ------------------------------------------------------------------ changes by other sessions

    def _add_watch(self, store: JournalStore, watch: Watch) -> None:
        store.watch(watch.entry)
        self._watches.append(watch)

    def _check_watches(self, store: JournalStore) -> None:
        watches = [watch for watch in self._watches if not watch.future.done()]
        self._watches = watches
        if not watches:
            return
        try:
            unchanged = store.unchanged([watch.entry for watch in watches])
        except store.errors as error:
            if store.is_interrupted(error):
                return  # they are checked again as soon as that is possible
            log.warning("%s", store.journal_error(error))
            unchanged = [False] * len(watches)  # the callers read their entries again, and get the error
        changed = [Resolution(w.future) for w, is_unchanged in zip(watches, unchanged, strict=True) if not is_unchanged]
        if changed:
            self._watches = [w for w, is_unchanged in zip(watches, unchanged, strict=True) if is_unchanged]
            self._resolve(*changed)

    def _report_ends(self, store: JournalStore) -> None:
        try:
            self._report(store.ended_entries())
        except store.errors as error:
            store.is_interrupted(error)  # if the connection is lost, they are read again over the next one
            log.warning("%s", store.journal_error(error))

    def _report(self, entries: list[JournalEntry]) -> None:
        if entries:
            self._loop.call_soon_threadsafe(self._on_external_change, entries)

    def _resolve(self, *resolutions: Resolution) -> None:
        self._loop.call_soon_threadsafe(resolve_futures, resolutions)
