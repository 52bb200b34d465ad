"""The poller coroutine: one per request, from its submit to its end."""

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable
from typing import Any

import attrs

from flux2max_async._api.client import ApiClient, SubmitCancellation
from flux2max_async._exceptions import FluxError, JournalError, SessionClosedError
from flux2max_async._models.request import GenerationRequest
from flux2max_async._models.results import Completed, Failed, Outcome, TaskSnapshot
from flux2max_async._polling.poller import TaskPoller
from flux2max_async.journal._context import KeyConflict
from flux2max_async.journal._record import RequestRecord

log = logging.getLogger("flux2max_async")

_OVERTAKEN_IN_A_ROW = 20


def _future() -> "asyncio.Future[Any]":
    return asyncio.get_running_loop().create_future()


@attrs.define(eq=False, repr=False)
class TaskRunner:
    """Follows one task. It outlives whoever waits for it, and its end is an outcome, never an exception."""

    gateway: ApiClient
    """Where the task is, or is to be."""
    lookout: TaskPoller
    """What follows the task, once it is one."""
    request: GenerationRequest | None
    """What is to be drawn, or was; None for a task known by its id alone."""
    places: asyncio.Semaphore
    """Where one has to be free before a submit; it is taken until the end."""
    task_id: str | None = None
    """Given for a task that was submitted elsewhere."""
    page: RequestRecord | None = None
    """What the books say of the request, where they are kept."""
    desk: dict[str, "TaskRunner"] = attrs.field(factory=dict[str, "TaskRunner"])
    """The pollers of a session by the keys of their requests: the same request is followed once."""
    hooked: GenerationRequest | None = None
    """The request as it is submitted, where it asks for a webhook of ours."""

    lend: Callable[[int], None] | None = attrs.field(default=None, init=False)
    """Lends the place in a stream to the next request while another process follows this one, and takes it back."""
    leader: "TaskRunner | None" = attrs.field(default=None, init=False)
    """Who follows the same request already."""
    answered: "asyncio.Future[None]" = attrs.field(factory=_future, init=False)
    """Resolved once the task has an id, or never will have one."""
    ended: "asyncio.Future[Outcome]" = attrs.field(factory=_future, init=False)
    """Resolved with the outcome."""

    _listeners: list[Callable[["TaskRunner", Outcome], None]] = attrs.field(factory=list, init=False)
    _lent: bool = attrs.field(default=False, init=False)
    _placed: bool = attrs.field(default=False, init=False)
    """Whether it takes one of the places."""
    _outcome: Outcome | None = attrs.field(default=None, init=False)
    """What it has come to, while that is being written down."""
    _patience: SubmitCancellation = attrs.field(factory=SubmitCancellation, init=False)

    @property
    def snapshot(self) -> TaskSnapshot | None:
        """What the service has said of the task last."""
        return (self.leader or self).lookout.snapshot

    def updates(self) -> AsyncGenerator[TaskSnapshot, None]:
        """Give the newest snapshot, then each that says something new, until the end."""
        return (self.leader or self).lookout.updates()

    def when_ended(self, listener: Callable[["TaskRunner", Outcome], None]) -> None:
        """Tell the outcome in the moment of the end, before anything else can happen."""
        if self.ended.done():
            listener(self, self.ended.result())
        else:
            self._listeners.append(listener)

    def withdraw(self, reason: FluxError) -> None:
        """Don't submit what is not submitted yet. A call on the wire is finished, and what it creates is followed."""
        self._patience.end(reason)

    def abandon(self) -> None:
        """End at once, as the session does."""
        if self._outcome is not None:
            self._end(self._outcome)
            return
        if self.task_id is None:
            message = "the session was closed while a submit was unanswered: a task may exist and cost money"
        else:
            message = f"the session was closed before task {self.task_id} had ended; attach() it later"
        self._end(self._failed(SessionClosedError(message)))

    async def run(self) -> None:
        """Submit if need be, then look until the end."""
        try:
            outcome = await self._come_to_an_end()
        except BaseException:
            if not self.ended.done():  # not the session has ended it, but the event loop
                log.warning("unfinished task: %s", self.task_id or "(a submit without an answer)")
            self.abandon()
            raise
        self._outcome = outcome
        try:
            if self.page is not None and self.leader is None and not outcome.replayed:
                usage = self.snapshot and self.snapshot.usage
                outcome = await self.page.close(outcome, usage.cost if usage else None)
        finally:
            self._end(outcome)

    async def _come_to_an_end(self) -> Outcome:
        try:
            if self.task_id is not None:
                return await self._follow()
            if self.page is not None:
                return await self._by_the_book(self.page)
            await self._submit()
            return await self._look()
        except FluxError as error:
            return self._failed(error)
        except Exception as error:
            log.exception("task %s: polling broke", self.task_id)
            broken = FluxError(f"polling broke: {error!r}")
            broken.__cause__ = error
            return self._failed(broken)

    async def _by_the_book(self, page: RequestRecord) -> Outcome:
        """Submit only what was never submitted before, by anybody."""
        async with self._patience.waiting():
            await page.identify()
        overtaken = 0
        while overtaken < _OVERTAKEN_IN_A_ROW:
            leader = self if page.key is None else self.desk.setdefault(page.key, self)
            if leader is not self:
                page.check_same(leader.page)
                if (outcome := await self._share(leader)) is not None:
                    return outcome
                continue
            try:
                async with self._patience.waiting():
                    known = await page.look_up(self._wait_elsewhere)
            finally:
                self._lend(back=True)
            if isinstance(known, str):
                return await self._resume(page, known)
            if known is not None:
                self.task_id = known.task_id
                return known
            try:
                await self._submit()
            except KeyConflict:
                self._give_place_back()
                overtaken += 1
            else:
                return await self._look()
        raise JournalError(f"the journal says neither that {page.key!r} can be begun, nor what became of it")

    async def _share(self, leader: "TaskRunner") -> Outcome | None:
        """Wait for the end that somebody else brings; None where it is of no use to others."""
        # Without patience: what withdraws this one withdraws the other too, if its submit isn't on the wire.
        self.leader = leader
        await asyncio.shield(leader.answered)
        if leader.task_id is not None:
            self._name(leader.task_id)
        outcome = await asyncio.shield(leader.ended)
        assert self.page is not None
        assert leader.page is not None
        if isinstance(outcome, Failed) and (
            outcome.task_id is None
            or isinstance(outcome.error, SessionClosedError)
            or (outcome.replayed and self.page.terms.retry_failed)
        ):
            self.leader = None
            return None
        self.page.entry = leader.page.entry
        self.task_id = outcome.task_id
        return attrs.evolve(outcome, request=self.request)

    async def _resume(self, page: RequestRecord, task_id: str) -> Outcome:
        """Follow a task that an earlier session has submitted."""
        self.lookout.take_up(age=page.age())
        self._name(task_id)
        return await self._follow()

    async def _submit(self) -> None:
        assert self.request is not None
        async with self._patience.waiting():
            await self.places.acquire()
            self._placed = True
        snapshot, started, deadline = await self.gateway.submit(
            self.hooked or self.request, seconds=self.lookout.seconds, patience=self._patience, intent=self.page
        )
        self._name(snapshot.task_id)
        self.lookout.take_over(snapshot, started, deadline, hooked=self.hooked is not None)

    async def _follow(self) -> Outcome:
        """Look at a task that was submitted elsewhere."""
        self.gateway.follow()
        return await self._look()

    async def _look(self) -> Outcome:
        """Look until the end at a task that counts as being in flight."""
        assert self.task_id is not None
        self.lookout.listen(self.task_id)
        try:
            if self.page is not None and self.lookout.learning:
                await self.page.submitted(self.task_id)
            _resolve(self.answered, None)
            seen = await self.lookout.look()
        finally:
            self.gateway.release()
        if seen.error is not None:
            return self._failed(seen.error)
        elapsed, polls = self.lookout.elapsed, self.lookout.polls
        return Completed(self.task_id, self.request, seen.images, seen.usage, seen.metadata, elapsed, polls)

    def _wait_elsewhere(self, task_id: str | None) -> None:
        """Another process follows the request."""
        if task_id is not None:
            self._name(task_id)
        self._lend(back=False)

    def _lend(self, *, back: bool) -> None:
        if self.lend is not None and self._lent is back:
            self._lent = not back
            self.lend(-1 if back else 1)

    def _name(self, task_id: str) -> None:
        self.task_id = task_id
        _resolve(self.answered, None)

    def _end(self, outcome: Outcome) -> None:
        if self.ended.done():
            return
        if self.page is not None and self.page.key is not None and self.desk.get(self.page.key) is self:
            del self.desk[self.page.key]
        self.lookout.end()
        self._give_place_back()
        _resolve(self.answered, None)
        _resolve(self.ended, outcome)
        for listener in self._listeners:
            listener(self, outcome)
        if isinstance(outcome, Completed):
            log.info("task %s completed after %.1f s, %d polls", self.task_id, outcome.elapsed, outcome.polls)
        else:
            name = "a request without a task" if self.task_id is None else f"task {self.task_id}"
            log.info("%s failed after %.1f s, %d polls: %s", name, outcome.elapsed, outcome.polls, outcome.error)

    def _give_place_back(self) -> None:
        if self._placed:
            self._placed = False
            self.places.release()

    def _failed(self, error: FluxError) -> Failed:
        if error.task_id is None:
            error.task_id = self.task_id
        # Their frames hold the body of the submit, pictures and all; whoever keeps the outcome should not keep those.
        link: BaseException | None = error
        while link is not None:
            link.__traceback__ = None
            link = link.__cause__ or link.__context__
        return Failed(self.task_id, self.request, error, self.lookout.elapsed, self.lookout.polls)


def _resolve(future: "asyncio.Future[Any]", value: object) -> None:
    if not future.done():
        future.set_result(value)
