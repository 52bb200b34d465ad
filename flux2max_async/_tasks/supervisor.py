"""The supervisor: under it run the pollers of a session, from its entering to its leaving."""

import asyncio
import logging
import math
from collections.abc import Coroutine
from typing import Any, TypeVar

from flux2max_async._api.client import ApiClient
from flux2max_async._exceptions import SessionClosedError
from flux2max_async._models.results import Completed, Outcome
from flux2max_async._stats import SessionStats
from flux2max_async._tasks.runner import TaskRunner

log = logging.getLogger("flux2max_async")

T = TypeVar("T")

_LAST_ANSWERS = 2.0
"""Seconds that closing waits for the answers to submits on the wire: without its id, a paid task is lost."""

_BREATH = 0.05
"""Seconds for whoever has waited for a task to begin saving its pictures."""


class Supervisor:
    """What runs in the background of a session between its entering and its leaving.

    It holds plain asyncio tasks. No task group or cancel scope stays open in the caller's task, where it would wrap
    the caller's own errors and forbid leaving in another task; and unlike in a group, no task's fault ends the others.
    """

    def __init__(self, gateway: ApiClient, stats: SessionStats, places: int) -> None:
        self.loop = asyncio.get_running_loop()
        self.gateway = gateway
        self.places = asyncio.Semaphore(places)
        self.desk: dict[str, TaskRunner] = {}
        """The pollers by the keys of their requests, where there is a journal."""
        self.closing: asyncio.Task[None] | None = None
        """What closes the session, once it is being closed: then nothing more is submitted."""
        self.drained = False
        """Whether nothing at all may be begun any more."""
        self._until = math.inf
        """The moment at which draining ends, once the session is being closed."""
        self._draining: asyncio.Timeout | None = None
        self._stats = stats
        self._pollers: set[TaskRunner] = set()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._endless: set[asyncio.Task[Any]] = set()

    def spawn(self, work: Coroutine[Any, Any, T], *, until_drain: bool = False) -> "asyncio.Task[T]":
        """Run something until it ends or the session does.

        Args:
            work: What to run.
            until_drain: Whether it ends where draining begins, because it might never end by itself.
        """
        task = self.loop.create_task(work)
        for tasks in (self._tasks, self._endless) if until_drain else (self._tasks,):
            tasks.add(task)
            task.add_done_callback(tasks.discard)
        return task

    def follow(self, poller: TaskRunner) -> None:
        """Run a poller to its end."""

        def ended(poller: TaskRunner, outcome: Outcome) -> None:
            self._pollers.discard(poller)
            self._count(poller, outcome)

        self._pollers.add(poller)
        poller.when_ended(ended)
        poller.lookout.hurry(self._until)
        self.spawn(poller.run())

    async def host(self, work: Coroutine[Any, Any, T]) -> T:
        """Run something that its caller waits for, but that closing doesn't.

        Raises:
            SessionClosedError: The session was closed meanwhile.
        """
        task = self.spawn(work)
        try:
            return await task
        except asyncio.CancelledError:
            caller = asyncio.current_task()
            if caller is not None and not caller.cancelling():
                raise closed_error() from None
            raise

    async def drain(self) -> None:
        """Submit nothing more, and let what is submitted end, and be saved, until the moment that `hasten` has set."""
        if self._until <= self.loop.time():
            return
        for poller in list(self._pollers):
            poller.withdraw(closed_error())
        for task in list(self._endless):
            task.cancel()
        try:
            async with asyncio.timeout_at(self._until) as self._draining:
                await asyncio.sleep(_BREATH)
                while tasks := self._tasks - self._endless:
                    await asyncio.wait(tasks)
                    await asyncio.sleep(_BREATH)
        except TimeoutError:
            pass  # the rest is left
        finally:
            self._draining = None

    def hasten(self, seconds: float) -> None:
        """Drain no longer than so many seconds from now."""
        self._until = min(self._until, self.loop.time() + seconds)
        for poller in self._pollers:
            poller.lookout.hurry(self._until)
        if self._draining is not None and not self._draining.expired():
            self._draining.reschedule(self._until)

    async def close(self) -> None:
        """End everything: what is on the wire gets a moment, what is still waited for SessionClosedError."""
        self.drained = True
        for poller in list(self._pollers):
            poller.withdraw(closed_error())
        # Without its id, a paid task is lost: give what is on the wire a moment.
        if unanswered := [poller.answered for poller in self._pollers if not poller.answered.done()]:
            await asyncio.wait(unanswered, timeout=_LAST_ANSWERS)
        self.abandon()
        if tasks := list(self._tasks):
            await asyncio.wait(tasks)

    def abandon(self) -> None:
        """End everything at once, and leave the ids of what is unfinished."""
        unfinished = [poller for poller in self._pollers if not poller.ended.done()]
        for task in self._tasks:
            task.cancel()
        for poller in unfinished:
            poller.abandon()
        if unfinished:
            ids = ", ".join(poller.task_id or "(a submit without an answer)" for poller in unfinished)
            log.warning("session closed; unfinished tasks: %s", ids)

    def _count(self, poller: TaskRunner, outcome: Outcome) -> None:
        if isinstance(outcome, Completed):
            self._stats.completed += 1
        else:
            self._stats.failed += 1
        self._stats.replayed += outcome.replayed
        self._stats.webhooks += poller.lookout.told
        snapshot = poller.lookout.snapshot
        if snapshot and snapshot.usage and snapshot.usage.cost:
            self._stats.spent += snapshot.usage.cost


def closed_error() -> SessionClosedError:
    """Say that there is no open session."""
    return SessionClosedError("the session is closed: use it inside `async with FluxSession(...)`")
