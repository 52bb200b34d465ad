"""The poller coroutine: one per task, from its submit to its end."""

import asyncio
import logging
import random
from collections.abc import AsyncIterator, Callable
from typing import Any

import attrs

from flux2max_async._books import OvertakenError
from flux2max_async._errors import DeadlineExceededError, FluxError, JournalError, ProtocolError, SessionClosedError
from flux2max_async._gateway import Gateway, Patience
from flux2max_async._learned import LearnedSchedule
from flux2max_async._page import Page
from flux2max_async._request import GenerationRequest
from flux2max_async._retry import backoff, is_unreadable, may_poll_again
from flux2max_async._schedule import PollPlan, PollSchedule
from flux2max_async._task import Completed, Failed, Outcome, TaskSnapshot
from flux2max_async._wire import Call, poll_call

log = logging.getLogger("flux2max_async")

_UNREADABLE_IN_A_ROW = 5
_OVERTAKEN_IN_A_ROW = 20
_JITTER, _MOST_JITTER = 0.1, 0.25
_LAST_LOOK = 1.0


def _future() -> "asyncio.Future[Any]":
    return asyncio.get_running_loop().create_future()


@attrs.define(eq=False, repr=False)
class Poller:
    """Follows one task. It outlives whoever waits for it, and its end is an outcome, never an exception."""

    gateway: Gateway
    """Where the task is, or is to be."""
    schedule: PollSchedule
    seconds: float
    """From the submit, or from the attach, to giving up."""
    request: GenerationRequest | None
    """What is to be drawn, or was; None for a task known by its id alone."""
    places: asyncio.Semaphore
    """Where one has to be free before a submit; it is taken until the end."""
    task_id: str | None = None
    """Given for a task that was submitted elsewhere."""
    page: Page | None = None
    """What the books say of the request, where they are kept."""
    desk: dict[str, "Poller"] = attrs.field(factory=dict[str, "Poller"])
    """The pollers of a session by the keys of their requests: the same request is followed once."""

    lend: Callable[[int], None] | None = attrs.field(default=None, init=False)
    """Lends the place in a stream to the next request while another process follows this one, and takes it back."""
    leader: "Poller | None" = attrs.field(default=None, init=False)
    """Who follows the same request already."""
    snapshot: TaskSnapshot | None = attrs.field(default=None, init=False)
    polls: int = attrs.field(default=0, init=False)
    answered: "asyncio.Future[None]" = attrs.field(factory=_future, init=False)
    """Resolved once the task has an id, or never will have one."""
    ended: "asyncio.Future[Outcome]" = attrs.field(factory=_future, init=False)
    """Resolved with the outcome."""

    _listeners: list[Callable[["Poller", Outcome], None]] = attrs.field(factory=list, init=False)
    _started: float = attrs.field(default=attrs.Factory(lambda self: self.gateway.now(), takes_self=True), init=False)
    """The moment of the submit that was accepted, or of the attach."""
    _deadline: float = attrs.field(
        default=attrs.Factory(lambda self: self._started + self.seconds, takes_self=True), init=False
    )
    """The moment of giving up."""
    _age: float | None = attrs.field(default=None, init=False)
    """Seconds from the submit to `_started`; None where the submit wasn't seen by anybody we know."""
    _learning: bool = attrs.field(default=False, init=False)
    """Whether the schedule may learn from the task: only where its submit was seen here."""
    _lent: bool = attrs.field(default=False, init=False)
    _placed: bool = attrs.field(default=False, init=False)
    """Whether it takes one of the places."""
    _running_until: float = attrs.field(default=0.0, init=False)
    """Seconds from the submit to the newest poll that saw the task running."""
    _missed: int = attrs.field(default=0, init=False)
    """Looks missed in a row."""
    _unreadable: int = attrs.field(default=0, init=False)
    """Answers in a row that could not be read."""
    _outcome: Outcome | None = attrs.field(default=None, init=False)
    """What it has come to, while that is being written down."""
    _patience: Patience = attrs.field(factory=Patience, init=False)
    _news: asyncio.Event | None = attrs.field(default=None, init=False)

    def when_ended(self, listener: Callable[["Poller", Outcome], None]) -> None:
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
            self.abandon()
            raise
        self._outcome = outcome
        try:
            if self.page is not None and self.leader is None and not outcome.replayed:
                usage = self.snapshot and self.snapshot.usage
                outcome = await self.page.close(outcome, usage.cost if usage else None)
        finally:
            self._end(outcome)

    async def updates(self) -> AsyncIterator[TaskSnapshot]:
        """Give the newest snapshot, then each that says something new, until the end."""
        said = None
        while True:
            snapshot = self.snapshot
            if self.leader is not None:
                async for seen in self.leader.updates():
                    yield seen
                return
            if snapshot is not None and (snapshot.status, snapshot.progress) != said:
                said = (snapshot.status, snapshot.progress)
                yield snapshot
            elif self.ended.done():
                return
            else:
                self._news = self._news or asyncio.Event()
                await self._news.wait()

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

    async def _by_the_book(self, page: Page) -> Outcome:
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
            except OvertakenError:
                self._give_place_back()
                overtaken += 1
            else:
                return await self._look()
        raise JournalError(f"the journal says neither that {page.key!r} can be begun, nor what became of it")

    async def _share(self, leader: "Poller") -> Outcome | None:
        """Wait for the end that somebody else brings; None where it is of no use to others."""
        async with self._patience.waiting():
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

    async def _resume(self, page: Page, task_id: str) -> Outcome:
        """Follow a task that an earlier session has submitted."""
        self._started = self.gateway.now()
        self._deadline = self._started + self.seconds
        self._age = page.age()
        self._name(task_id)
        return await self._follow()

    async def _submit(self) -> None:
        assert self.request is not None
        async with self._patience.waiting():
            await self.places.acquire()
            self._placed = True
        snapshot, self._started, self._deadline = await self.gateway.submit(
            self.request, seconds=self.seconds, patience=self._patience, intent=self.page
        )
        self._name(snapshot.task_id)
        self._see(snapshot)
        self._age, self._learning = 0.0, True

    async def _follow(self) -> Outcome:
        """Look at a task that was submitted elsewhere."""
        self.gateway.follow()
        return await self._look()

    async def _look(self) -> Outcome:
        """Look until the end at a task that counts as being in flight."""
        assert self.task_id is not None
        try:
            if self.page is not None and self._learning:
                await self.page.submitted(self.task_id)
            return await self._look_until_the_end(self.task_id)
        finally:
            self.gateway.release()

    async def _look_until_the_end(self, task_id: str) -> Outcome:
        _resolve(self.answered, None)
        call = poll_call(task_id)
        plan = self.schedule.begin(self.request)
        while self.snapshot is None or not self.snapshot.status.ended:
            await self._sleep(self._delay(plan))
            await self._pause()
            if (wait := self.gateway.book_poll()) > 0:
                await self._sleep(wait)
                await self._pause()
            await self._poll(call, task_id)
        snapshot, elapsed = self.snapshot, self._elapsed()
        if self._learning:
            plan.finish(self._running_until, elapsed, completed=snapshot.error is None)
        if snapshot.error is not None:
            return self._failed(snapshot.error)
        return Completed(task_id, self.request, snapshot.images, snapshot.usage, snapshot.metadata, elapsed, self.polls)

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

    def _delay(self, plan: PollPlan) -> float:
        if self._missed:
            return backoff(self._missed, random.random())
        if self.snapshot is None:
            return 0.0  # submitted elsewhere: it may have ended long ago
        if isinstance(self.schedule, LearnedSchedule):
            self.schedule.dearness = self.gateway.dearness()
        delay = plan.next_delay(self._elapsed(), self.snapshot.progress)
        delay += min(_JITTER * delay, _MOST_JITTER) * random.uniform(-1, 1)
        # If the deadline comes first, a last look shortly before it may still save what is paid for.
        last = self._deadline - self.gateway.now() - min(_LAST_LOOK, self.seconds / 10)
        return last if 0.01 < last < delay else delay

    async def _pause(self) -> None:
        while (pause := self.gateway.pause(random.random())) > 0:
            await self._sleep(pause)

    async def _sleep(self, delay: float) -> None:
        remaining = self._deadline - self.gateway.now()
        if delay < remaining:
            await asyncio.sleep(delay)
        else:
            await asyncio.sleep(max(remaining, 0.0))
            raise DeadlineExceededError(
                f"task {self.task_id} has not ended within {self.seconds:g} s; attach() it later", self.task_id
            )

    async def _poll(self, call: Call, task_id: str) -> None:
        asked = self.gateway.now()
        self.polls += 1
        try:
            snapshot = await self.gateway.poll(call, task_id, request=self.request, within=self._deadline - asked)
        except FluxError as error:
            if not may_poll_again(error, elapsed=None if self._age is None else self._age + self._elapsed()):
                raise
            self._missed += 1
            self._unreadable = self._unreadable + 1 if is_unreadable(error) else 0
            if self._unreadable == _UNREADABLE_IN_A_ROW:
                raise ProtocolError(
                    f"task {task_id}: {_UNREADABLE_IN_A_ROW} unreadable answers in a row: {error}"
                ) from error
            self.gateway.note_retry()
            log.warning("task %s: poll %d missed (%s)", task_id, self.polls, error)
        else:
            self._missed = self._unreadable = 0
            if not snapshot.status.ended:
                self._running_until = asked - self._started
            self._see(snapshot)
            log.debug("task %s: poll %d: %s, progress %s", task_id, self.polls, snapshot.status, snapshot.progress)

    def _see(self, snapshot: TaskSnapshot) -> None:
        self.snapshot = snapshot
        self._tell()

    def _end(self, outcome: Outcome) -> None:
        if self.ended.done():
            return
        if self.page is not None and self.page.key is not None and self.desk.get(self.page.key) is self:
            del self.desk[self.page.key]
        self._give_place_back()
        _resolve(self.answered, None)
        _resolve(self.ended, outcome)
        self._tell()
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
        return Failed(self.task_id, self.request, error, self._elapsed(), self.polls)

    def _elapsed(self) -> float:
        return self.gateway.now() - self._started

    def _tell(self) -> None:
        if self._news is not None:
            self._news.set()
            self._news = None


def _resolve(future: "asyncio.Future[Any]", value: object) -> None:
    if not future.done():
        future.set_result(value)
