"""Runs one request: look it up, submit it if need be, poll its task to the end, and record the outcome."""

import asyncio
from contextlib import aclosing

import attrs

from flux2max_async._api.client import LostSubmit
from flux2max_async._exceptions import FluxError, JournalError, SessionClosedError
from flux2max_async._models.results import Completed, Failed, Outcome
from flux2max_async._polling.context import PollStart
from flux2max_async._polling.poller import TaskPoller
from flux2max_async._shutdown import closed_error
from flux2max_async._tasks.context import RunnerObserver
from flux2max_async._tasks.shared_result import SharedResult
from flux2max_async._tasks.slot_holder import SlotHolder
from flux2max_async._tasks.slots import order_of
from flux2max_async._tasks.submission import ExpectedWebhook, make_good
from flux2max_async._text import get_logger
from flux2max_async.journal._entry import JournalEntry
from flux2max_async.journal._lookup import KeyConflictError, Replay, Resume, Submit

log = get_logger("tasks")

_MAX_KEY_CONFLICTS = 20
"""In a row, before the journal is taken for broken."""


@attrs.define(eq=False, repr=False)
class TaskRunner(SlotHolder):
    """Runs one request, and outlives whoever waits for it. Its end is an outcome, never an exception.

    States: looking up (`record.find_existing()`), waiting for a slot, submitting, polling, recording, ended. `answered`
    is resolved once there is a task id, or never will be one, and `submit_done` at the same time, or earlier if the
    answer to the submit is lost and only a webhook can still reveal the id; `ended` is resolved with the outcome, on
    every path. Only `run()` moves forward; `cancel_submit()` ends a runner that has not been submitted, `close_now()`
    ends any. Whoever cancels the asyncio task of `run()`, perhaps before its first step, calls `close_now()`.
    """

    _created: float = attrs.field(kw_only=True, alias="created")
    _observers: list[RunnerObserver] = attrs.field(kw_only=True, alias="observers")
    _key_conflicts: int = attrs.field(default=0, init=False)
    submit_done: SharedResult[None] = attrs.field(factory=SharedResult, init=False)
    poller: TaskPoller | None = attrs.field(default=None, init=False)
    _lost: LostSubmit | None = attrs.field(default=None, init=False)
    _recorded: bool = attrs.field(default=False, init=False)
    """Whether the outcome is recorded already: it is a replay."""
    _unrecorded: Outcome | None = attrs.field(default=None, init=False)
    """The outcome while it is being recorded, or the links of a replay are renewed."""

    @property
    def polls(self) -> int:
        """How many polls were made."""
        return 0 if self.poller is None else self.poller.polls

    @property
    def elapsed(self) -> float:
        """Seconds since the submit, or before it since the request."""
        return asyncio.get_running_loop().time() - self._created if self.poller is None else self.poller.elapsed

    def _end_unsubmitted(self) -> None:
        self._end(self._failed(self._cancellation.reason or closed_error()))

    def close_now(self) -> None:
        """End at once, because the session does."""
        error: FluxError = self._cancellation.reason or closed_error()
        if self.task_id is not None:
            error = SessionClosedError(
                f"the session was closed before task {self.task_id} had ended; attach() it later"
            )
            self.record.suspend(self.task_id)
        elif self.may_be_submitted:
            message = "the session was closed while a submit was unanswered: a task may exist and cost money"
            error = SessionClosedError(message)
        self._end(self._unrecorded or self._failed(error))

    # ------------------------------------------------------------------ the run

    async def run(self) -> None:
        """Run the request to its end, or until it waits for a slot."""
        try:
            self._unrecorded = outcome = await self._run()
            if outcome is None:
                self._is_running = False
                return
            if not self._recorded:
                usage = self.feed.snapshot and self.feed.snapshot.usage
                self._unrecorded = outcome = await self.record.finish(outcome, usage.cost if usage else None)
        except BaseException:
            if not self.ended.done():  # ended by the event loop, not the session
                self._context.begin_drain()  # the loop won't follow what gets this slot, but could still submit it
                if self._unrecorded is None:
                    log.warning("unfinished task: %s", self.task_id or "(a submit without an answer)")
            self.close_now()
            raise
        self._end(outcome)

    async def _run(self) -> Outcome | None:
        """Return the outcome; None if the request waits for a slot first."""
        try:
            while self._key_conflicts < _MAX_KEY_CONFLICTS:
                if not self._is_new:
                    existing = await self._find_existing()
                    if isinstance(existing, Replay):
                        return await self._replay(existing.outcome)
                    if isinstance(existing, Resume):
                        return await self._resume(existing)
                    self._is_new = True
                    self._context.polling.shutdown.check_submitting()
                if not self._take_slot():
                    return None
                try:
                    start = await self._submit()
                except KeyConflictError:
                    self._key_conflicts += 1
                    self._is_new = False
                    self._give_up_slot()
                else:
                    return await self._poll(start)
            return self._failed(JournalError(f"the journal neither begins {self.record.key!r} nor returns its entry"))
        except FluxError as error:
            return self._failed(error)
        except Exception as error:
            log.exception("task %s: unexpected error", self.task_id)
            unexpected = FluxError(f"unexpected error: {error!r}")
            unexpected.__cause__ = error
            return self._failed(unexpected)

    async def _replay(self, outcome: Outcome) -> Outcome:
        self._give_up_slot()
        self.task_id, self._recorded = outcome.task_id, True
        self._unrecorded = outcome  # this is given out if the session is closed before the links are renewed
        self.submit_done.set_result(None)
        return await self._context.renew_links(outcome, self.record.policy)

    async def _find_existing(self) -> Replay | Resume | Submit:
        if self.record.key is None:  # then there is nothing to wait for
            return await self.record.find_existing(self._on_waiting_elsewhere)
        existing: Replay | Resume | Submit | None = None
        try:
            async with self._cancellation.guard():
                existing = await self.record.find_existing(self._on_waiting_elsewhere)
        except FluxError:
            # Cancelled in the moment in which an answer was found: a task that exists is followed all the same.
            if existing is None or isinstance(existing, Submit):
                raise
        finally:
            self._set_waiting(waiting=False)
        return existing

    async def _submit(self) -> PollStart:
        assert self.request is not None
        self._context.polling.shutdown.check_submitting()
        self.task_id = None  # of an earlier attempt, which another process has followed
        polling, add_webhook = self._context.polling, self._context.add_webhook
        deadline = polling.client.now() + polling.task_timeout
        expected = None if add_webhook is None else ExpectedWebhook.create(self.request, add_webhook, polling)
        self.record.webhook_token = expected.token if expected else None
        try:
            accepted = await polling.client.submit(
                expected.request if expected else self.request,
                deadline=deadline,
                rank=self._rank,
                cancellation=self._cancellation,
                record=self.record,
            )
            self.submit_done.set_result(None)
            if isinstance(accepted, LostSubmit):
                self._lost = accepted
                accepted = await make_good(accepted, expected, polling)
        finally:
            if expected:
                expected.forget()
        if not accepted.by_webhook:
            self.feed.publish(accepted.snapshot)
        return PollStart(
            task_id=accepted.snapshot.task_id,
            request=self.request,
            started=accepted.started,
            deadline=accepted.deadline,
            age=0.0,
            submitted_here=True,
            expects_webhook=expected is not None,
            webhook=accepted.snapshot if accepted.by_webhook else None,
        )

    def _rank(self) -> float:
        return order_of(self._created, max(self.callers, default=0))

    async def _resume(self, existing: Resume) -> Outcome:
        """Follow a task that was submitted earlier; together with whoever follows it here already."""
        task_id = existing.task_id
        self._give_up_slot()
        leader = self._context.single_flight.by_task_id.setdefault(task_id, self)
        if leader is not self:
            self._set_task_id(task_id)
            async with aclosing(leader.feed.updates()) as updates:
                async for snapshot in updates:
                    self.feed.publish(snapshot)
            return attrs.evolve(await leader.ended.wait(), request=self.request)
        if existing.adopted:
            self._occupy_slot()
        polling = self._context.polling
        polling.client.add_in_flight()
        now = polling.client.now()
        return await self._poll(
            PollStart(
                task_id=task_id,
                request=self.request,
                started=now,
                deadline=now + polling.task_timeout,
                age=existing.age,
                submitted_here=False,
                expects_webhook=False,
            )
        )

    async def _poll(self, start: PollStart) -> Outcome:
        """Poll a task that counts as in flight."""
        polling = self._context.polling
        self.poller = TaskPoller(polling, start, self.feed)
        try:
            self.poller.listen()
            if start.submitted_here:
                self.task_id = start.task_id
                self._context.single_flight.by_task_id[start.task_id] = self
                await self.record.mark_submitted(start.task_id)
            self._set_task_id(start.task_id)
            end = await self.poller.run()
        finally:
            polling.client.remove_in_flight()
        if end.error is not None:
            return self._failed(end.error)
        return Completed(
            task_id=start.task_id,
            request=self.request,
            images=end.images,
            usage=end.usage,
            metadata=end.metadata,
            partial_error=end.partial_error,
            elapsed=polling.client.now() - start.started,
            polls=self.poller.polls,
        )

    # ------------------------------------------------------------------ state changes

    def add_observer(self, observer: RunnerObserver) -> None:
        """Call the observer from now on; at once if the runner has ended."""
        if self.ended.done():
            observer.on_ended(self, self.ended.result())
            return
        self._observers.append(observer)
        if self._waiting_elsewhere:
            observer.on_waiting_elsewhere(waiting=True)

    def on_adopted(self, entry: JournalEntry) -> None:
        """Learn that the journal has given the task, which another session held, to this one."""
        self.record.on_adopted(entry)
        self._occupy_slot()

    def _occupy_slot(self) -> None:
        self._holds_slot = self._holds_slot or self._context.slots.occupy(self._group)

    def _on_waiting_elsewhere(self, task_id: str | None) -> None:
        self._give_up_slot()
        shutdown = self._context.polling.shutdown
        if task_id is not None:
            self._set_task_id(task_id)
        elif shutdown.draining:  # that process may have to wait for a slot, and this one doesn't wait so long
            self.cancel_submit(shutdown.error())
        self._set_waiting(waiting=True)

    def _set_waiting(self, *, waiting: bool) -> None:
        changed, self._waiting_elsewhere = waiting is not self._waiting_elsewhere, waiting
        for observer in self._observers if changed else ():
            observer.on_waiting_elsewhere(waiting=waiting)

    def _set_task_id(self, task_id: str) -> None:
        self.task_id = task_id
        self.submit_done.set_result(None)
        self.answered.set_result(None)

    def _end(self, outcome: Outcome) -> None:
        if self.ended.done():
            return
        self._leave_single_flight()
        self.feed.close()
        if self.poller is not None and self._context.polling.registry.in_use:
            self.poller.close()
        self._give_up_slot()
        self.submit_done.set_result(None)
        self.answered.set_result(None)
        self.ended.set_result(outcome)
        for observer in self._observers:
            observer.on_ended(self, outcome)
        if self._lost is not None:
            self._context.polling.client.release(self._lost)
        if isinstance(outcome, Completed):
            log.info("task %s completed after %.1f s, %d polls", self.task_id, outcome.elapsed, outcome.polls)
        else:
            name = "a request without a task" if self.task_id is None else f"task {self.task_id}"
            log.info("%s failed after %.1f s, %d polls: %s", name, outcome.elapsed, outcome.polls, outcome.error)

    def _leave_single_flight(self) -> None:
        by_key, by_task_id = self._context.single_flight.by_key, self._context.single_flight.by_task_id
        if self.record.key is not None and by_key.get(self.record.key) is self:
            del by_key[self.record.key]
        if self.task_id is not None and by_task_id.get(self.task_id) is self:
            del by_task_id[self.task_id]

    def _failed(self, error: FluxError) -> Failed:
        if error.task_id is None:
            error.task_id = self.task_id
        # The frames of a traceback hold the body of the submit, images included; an outcome must not keep them.
        link: BaseException | None = error
        while link is not None:
            link.__traceback__ = None
            link = link.__cause__ or link.__context__
        return Failed(task_id=error.task_id, request=self.request, error=error, elapsed=self.elapsed, polls=self.polls)
