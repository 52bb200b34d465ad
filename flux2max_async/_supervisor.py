"""The supervisor: under it run the pollers of a session, from its entering to its leaving."""

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any

import anyio

from flux2max_async._errors import SessionClosedError
from flux2max_async._gateway import Gateway
from flux2max_async._poller import Poller
from flux2max_async._stats import SessionStats
from flux2max_async._task import Completed, Outcome, TaskSnapshot

log = logging.getLogger("flux2max_async")

_LAST_ANSWERS = 2.0
"""Seconds that closing waits for the answers to submits on the wire: without its id, a paid task is lost."""


class Supervisor:
    """What a session has between entering and leaving: an asyncio task, and the pollers that run under it.

    The task is the supervisor's own, so that no task group or cancel scope stays open in the caller's. Its group is
    asyncio's: anyio's costs 3 KiB and 60 microseconds more for each poller.
    """

    def __init__(self, gateway: Gateway, stats: SessionStats, places: int) -> None:
        self.loop = asyncio.get_running_loop()
        self.gateway = gateway
        self.places = anyio.Semaphore(places)
        self.closing = False
        self.ready = anyio.Event()
        self._stats = stats
        self._pollers: set[Poller] = set()
        self._group = asyncio.TaskGroup()
        self._supervisor = self.loop.create_task(self._supervise(), name="flux2max_async supervisor")

    def spawn(self, work: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
        """Run something until it ends or the session does."""
        return self._group.create_task(work)

    def follow(self, poller: Poller, *, gives_back: anyio.Semaphore | None = None) -> None:
        """Run a poller to its end, which gives a place back."""

        def ended(poller: Poller, outcome: Outcome) -> None:
            self._pollers.discard(poller)
            self._count(poller.snapshot, outcome)
            if gives_back is not None:
                gives_back.release()

        self._pollers.add(poller)
        poller.listeners.append(ended)
        self.spawn(poller.run())

    async def close(self) -> None:
        """End everything: what is on the wire gets a moment, what is still waited for SessionClosedError."""
        self.closing = True
        for _ in range(self.places.statistics().tasks_waiting):
            self.places.release()  # who waits for a place is told instead
        for poller in list(self._pollers):
            poller.withdraw(closed_error())
        try:
            # Without its id, a paid task is lost: give what is on the wire a moment.
            if unanswered := [poller.answered for poller in self._pollers if not poller.answered.done()]:
                await asyncio.wait(unanswered, timeout=_LAST_ANSWERS)
        finally:
            unfinished = [poller for poller in self._pollers if not poller.ended.done()]
            self._supervisor.cancel()
            # Must not be cut short, or pollers outlive their session; they end as soon as they are cancelled.
            with anyio.CancelScope(shield=True):
                await asyncio.wait([self._supervisor])
            for poller in unfinished:
                poller.abandon()
            if unfinished:
                ids = ", ".join(poller.task_id or "(a submit without an answer)" for poller in unfinished)
                log.warning("session closed; unfinished tasks: %s", ids)

    def _count(self, snapshot: TaskSnapshot | None, outcome: Outcome) -> None:
        if isinstance(outcome, Completed):
            self._stats.completed += 1
        else:
            self._stats.failed += 1
        if snapshot and snapshot.usage and snapshot.usage.cost:
            self._stats.spent += snapshot.usage.cost

    async def _supervise(self) -> None:
        async with self._group:
            self.ready.set()
            await self.loop.create_future()  # until it is cancelled


def closed_error() -> SessionClosedError:
    """Say that there is no open session."""
    return SessionClosedError("the session is closed: use it inside `async with FluxSession(...)`")
