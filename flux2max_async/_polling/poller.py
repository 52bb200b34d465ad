"""The lookout: follows one task by looking at it now and then, and by listening for the webhook that may be faster."""

import asyncio
import logging
import math
import random
from collections.abc import AsyncGenerator
from typing import Any

import attrs

from flux2max_async._api.client import ApiClient
from flux2max_async._api.codec import HttpRequest, build_poll
from flux2max_async._api.retry import backoff, is_unreadable, may_poll_again
from flux2max_async._exceptions import DeadlineExceededError, FluxError, ProtocolError
from flux2max_async._models.request import GenerationRequest
from flux2max_async._models.results import TaskSnapshot
from flux2max_async._polling.learned import LearnedSchedule
from flux2max_async._polling.schedules import PollPlan, PollSchedule
from flux2max_async.webhooks._registry import WebhookRegistry

log = logging.getLogger("flux2max_async")

_UNREADABLE_IN_A_ROW = 5
_JITTER, _MOST_JITTER = 0.1, 0.25
_LAST_LOOK = 1.0


@attrs.define(eq=False, repr=False)
class TaskPoller:
    """What is seen of one task."""

    gateway: ApiClient
    schedule: PollSchedule
    seconds: float
    """From the submit, or from the attach, to giving up."""
    request: GenerationRequest | None
    mail: WebhookRegistry | None = None
    """Where webhooks come in."""

    snapshot: TaskSnapshot | None = attrs.field(default=None, init=False)
    polls: int = attrs.field(default=0, init=False)
    told: bool = attrs.field(default=False, init=False)
    """Whether a webhook has brought the end."""
    started: float = attrs.field(default=attrs.Factory(lambda self: self.gateway.now(), takes_self=True), init=False)
    """The moment of the submit that was accepted, or of the attach."""
    deadline: float = attrs.field(
        default=attrs.Factory(lambda self: self.started + self.seconds, takes_self=True), init=False
    )
    """The moment of giving up."""
    age: float | None = attrs.field(default=None, init=False)
    """Seconds from the submit to `started`; None where the submit wasn't seen by anybody we know."""
    learning: bool = attrs.field(default=False, init=False)
    """Whether the schedule may learn from the task: only where its submit was seen here."""
    _hooked: bool = attrs.field(default=False, init=False)
    """Whether its submit asked for a webhook of ours."""

    _task_id: str = attrs.field(default="", init=False)
    _over: bool = attrs.field(default=False, init=False)
    """Whether nothing more will be seen."""
    _last_look: float = attrs.field(default=math.inf, init=False)
    """The moment shortly before the session closes, once that is known."""
    _progress: float | None = attrs.field(default=None, init=False)
    """What the newest look said of it; a webhook's word has another moment."""
    _planned: bool = attrs.field(default=False, init=False)
    """Whether it sleeps until the next look as planned, and for no other reason."""
    _looked: float = attrs.field(default=0.0, init=False)
    """The moment of the last look, or of the first plan."""
    _interval: float | None = attrs.field(default=None, init=False)
    """Seconds from the last look to the next as planned, where webhooks aren't expected."""
    _running_until: float = attrs.field(default=0.0, init=False)
    """Seconds from the submit to the newest poll that saw the task running."""
    _missed: int = attrs.field(default=0, init=False)
    """Looks missed in a row."""
    _unreadable: int = attrs.field(default=0, init=False)
    """Answers in a row that could not be read."""
    _hurry: bool = attrs.field(default=False, init=False)
    """Whether there is a reason to look at once."""
    _watchers: int = attrs.field(default=0, init=False)
    """How many follow the updates."""
    _news: asyncio.Event | None = attrs.field(default=None, init=False)
    _nap: "asyncio.Future[bool] | None" = attrs.field(default=None, init=False)
    """Resolved when a sleep is over: True if nothing has cut it short."""
    _exchange: asyncio.Timeout | None = attrs.field(default=None, init=False)
    """Around a poll that is on the wire."""

    @property
    def elapsed(self) -> float:
        """Seconds since the submit, or the attach."""
        return self.gateway.now() - self.started

    def take_over(self, snapshot: TaskSnapshot, started: float, deadline: float, *, hooked: bool) -> None:
        """Follow a task that has just been submitted here."""
        self.started, self.deadline, self.age = started, deadline, 0.0
        self.learning, self._hooked = True, hooked
        self._progress = snapshot.progress
        self.see(snapshot)

    def take_up(self, *, age: float) -> None:
        """Follow a task that was submitted by somebody else, so many seconds ago."""
        self.started = self.gateway.now()
        self.deadline = self.started + self.seconds
        self.age = age

    def listen(self, task_id: str) -> None:
        """Listen for webhooks of the task from now on, and take what has come already."""
        self._task_id = task_id
        if self.mail is not None and (early := self.mail.expect(task_id, self)) is not None:
            self.hear(early)

    def end(self) -> None:
        """Nothing more will be seen."""
        self._over = True
        if self.mail is not None:
            self.mail.forget(self._task_id, self)
        self._tell()

    def see(self, snapshot: TaskSnapshot) -> None:
        """Take in what the service says; the first end stands, whatever it says later."""
        if not self._has_ended():
            self.snapshot = snapshot
            self._tell()

    def hear(self, snapshot: TaskSnapshot | None) -> None:
        """A webhook tells of the task; None where what it tells can't be read, which is a reason to look."""
        if self._has_ended():
            return
        if snapshot is None:
            self._hurry = True
        elif snapshot.status.ended or _progress(snapshot) > _progress(self.snapshot):
            self.see(snapshot)
        self.told = self._has_ended()
        if self.told and self._exchange is not None:
            self._exchange.reschedule(0.0)
        if self.told or self._hurry:
            self._wake()

    def hurry(self, until: float) -> None:
        """The session closes at a moment, if it isn't infinitely far: look once more shortly before."""
        if until < math.inf:
            now = self.gateway.now()
            self._last_look = until - min(_LAST_LOOK, (until - now) / 10)
            if self._planned:
                self._wake()

    def replan(self) -> None:
        """A poll may have become less dear than it was when the next look was planned."""
        if self._hooked and self._planned:
            self._wake()

    async def updates(self) -> AsyncGenerator[TaskSnapshot, None]:
        """Give the newest snapshot, then each that says something new, until the end."""
        said = None
        self._watchers += 1
        if self._watchers == 1:
            self.replan()  # of progress only polls tell, whatever brings the end
        try:
            while True:
                snapshot = self.snapshot
                if snapshot is not None and (snapshot.status, snapshot.progress) != said:
                    said = (snapshot.status, snapshot.progress)
                    yield snapshot
                elif self._over:
                    return
                else:
                    await self._next_news()
        finally:
            self._watchers -= 1

    async def until_over(self) -> None:
        """Wait until nothing more will be seen: the end is recorded if need be, or the task is followed no more."""
        while not self._over:
            await self._next_news()

    async def look(self) -> TaskSnapshot:
        """Look until the task has ended.

        Raises:
            FluxError: It is not followed to its end, and this is why.
        """
        call = build_poll(self._task_id)
        plan = self.schedule.begin(self.request)
        self._looked = self.gateway.now()
        while not self._has_ended():
            if await self._wait_for_look(plan) and await self._pause():
                wait = self.gateway.book_poll()
                if wait == 0 or (await self._sleep(wait) and await self._pause()):
                    await self._poll(call)
        snapshot, elapsed = self.snapshot, self.elapsed
        assert snapshot is not None
        if self.learning:
            plan.finish(elapsed if self.told else self._running_until, elapsed, completed=snapshot.error is None)
        if self._hooked and self.mail is not None and (self.told or self.polls):
            self.mail.noticed(told=self.told)
        return snapshot

    # ------------------------------------------------------------------ when

    async def _wait_for_look(self, plan: PollPlan) -> bool:
        """Sleep until the next look is due; False where something has cut it short."""
        self._planned = True
        try:
            return await self._sleep(self._delay(plan))
        finally:
            self._planned = False

    def _delay(self, plan: PollPlan) -> float:
        if self._hurry:
            self._hurry = False
            return 0.0
        if self._missed:
            return self._left_of(backoff(self._missed, random.random()))
        if self.snapshot is None:
            return 0.0  # submitted elsewhere: it may have ended long ago
        delay = self._planned_delay(plan)
        delay = self._left_of(delay + min(_JITTER * delay, _MOST_JITTER) * random.uniform(-1, 1))
        # If the deadline comes first, a last look shortly before it may still save what is paid for.
        last = min(self.deadline - min(_LAST_LOOK, self.seconds / 10), self._last_look)
        now = self.gateway.now()
        return max(0.0, last - now) if self._looked < last - 0.01 and now + delay > last else delay

    def _planned_delay(self, plan: PollPlan) -> float:
        """Ask the plan; where a webhook will probably bring the end, a poll is dearer, and comes later."""
        cost_factor = self.mail.cost_factor if self._hooked and self.mail and not self._watchers else 1.0
        elapsed = self._looked - self.started
        if isinstance(self.schedule, LearnedSchedule):
            self.schedule.cost_factor = self.gateway.cost_factor() * cost_factor
            return plan.next_delay(elapsed, self._progress)
        if self._interval is None:  # it is asked for once after each look
            self._interval = plan.next_delay(elapsed, self._progress)
        # At a constant rate of ending, the best interval grows as the root of the price.
        return self._interval * math.sqrt(cost_factor)

    def _left_of(self, delay: float) -> float:
        """Give what is left of a delay that began with the last look: who is woken in between doesn't start anew."""
        return max(0.0, self._looked + delay - self.gateway.now())

    async def _pause(self) -> bool:
        """Wait as long as the service has asked everybody to; False where something has cut it short."""
        while (pause := self.gateway.pause(random.random())) > 0:
            if not await self._sleep(pause):
                return False
        return True

    async def _sleep(self, delay: float) -> bool:
        """Sleep, within the deadline; False where something has cut it short."""
        remaining = self.deadline - self.gateway.now()
        undisturbed = await self._rest(min(delay, max(remaining, 0.0)))
        if undisturbed and delay >= remaining:
            raise DeadlineExceededError(
                f"task {self._task_id} has not ended within {self.seconds:g} s; attach() it later", self._task_id
            )
        return undisturbed

    async def _rest(self, delay: float) -> bool:
        loop = asyncio.get_running_loop()
        self._nap = loop.create_future()
        timer = loop.call_later(delay, _resolve, self._nap, True)  # noqa: FBT003 - it is the future's value
        try:
            return await self._nap and not self._has_ended()
        finally:
            timer.cancel()
            self._nap = None

    def _wake(self) -> None:
        if self._nap is not None:
            _resolve(self._nap, False)  # noqa: FBT003 - as above

    # ------------------------------------------------------------------ a look

    async def _poll(self, call: HttpRequest) -> None:
        asked = self.gateway.now()
        self.polls += 1
        try:
            async with asyncio.timeout(None) as self._exchange:
                snapshot = await self.gateway.poll(
                    call, self._task_id, request=self.request, within=self.deadline - asked
                )
        except (TimeoutError, FluxError) as error:
            if not self._has_ended():  # else a webhook was faster
                self._miss(error)
        else:
            self._missed = self._unreadable = 0
            if not snapshot.status.ended:
                self._running_until = asked - self.started
            self._progress = snapshot.progress
            self.see(snapshot)
            log.debug(
                "task %s: poll %d: %s, progress %s", self._task_id, self.polls, snapshot.status, snapshot.progress
            )
        finally:
            self._exchange = None
            self._looked = self.gateway.now()
            self._interval = None

    def _miss(self, error: Exception) -> None:
        """Take note of a look that brought nothing; raises where another one would be pointless."""
        if not isinstance(error, FluxError) or not may_poll_again(
            error, elapsed=None if self.age is None else self.age + self.elapsed
        ):
            raise error
        self._missed += 1
        self._unreadable = self._unreadable + 1 if is_unreadable(error) else 0
        if self._unreadable == _UNREADABLE_IN_A_ROW:
            raise ProtocolError(
                f"task {self._task_id}: {_UNREADABLE_IN_A_ROW} unreadable answers in a row: {error}"
            ) from error
        self.gateway.note_retry()
        log.warning("task %s: poll %d missed (%s)", self._task_id, self.polls, error)

    def _has_ended(self) -> bool:
        return self.snapshot is not None and self.snapshot.status.ended

    async def _next_news(self) -> None:
        self._news = self._news or asyncio.Event()
        await self._news.wait()

    def _tell(self) -> None:
        if self._news is not None:
            self._news.set()
            self._news = None


def _progress(snapshot: TaskSnapshot | None) -> float:
    return (snapshot and snapshot.progress) or 0.0


def _resolve(future: "asyncio.Future[Any]", value: object) -> None:
    if not future.done():
        future.set_result(value)
