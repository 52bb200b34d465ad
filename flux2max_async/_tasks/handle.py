"""The handle by which callers see a task."""

import asyncio
from collections.abc import AsyncGenerator, Generator
from typing import Any

from flux2max_async._models.request import GenerationRequest
from flux2max_async._models.results import Completed, Outcome, TaskSnapshot
from flux2max_async._tasks.runner import TaskRunner


class GenerationTask:
    """A submitted task. It belongs to the session, which polls it to its end, waited for or not.

    Awaiting it gives `Completed`, or raises. Many can await it; cancelling a wait cancels only that wait.
    """

    __slots__ = ("_poller",)

    def __init__(self, poller: TaskRunner) -> None:
        self._poller = poller

    @property
    def id(self) -> str:
        """The service's id for the task; `session.attach(id)` finds it again from anywhere."""
        return self._poller.task_id or ""

    @property
    def request(self) -> GenerationRequest | None:
        """What was asked for; None for a task attached by its id alone."""
        return self._poller.request

    @property
    def snapshot(self) -> TaskSnapshot | None:
        """What the newest answer said; None until there is one."""
        return self._poller.snapshot

    async def outcome(self) -> Outcome:
        """Wait for the end; a task that failed is a `Failed`, not an exception."""
        return await asyncio.shield(self._poller.ended)

    def updates(self) -> AsyncGenerator[TaskSnapshot, None]:
        """Iterate over the newest snapshot, then each new status or progress; ends with the task.

        The last one says how it ended. Close the generator, or cancel whoever iterates, when nobody watches any more:
        until then a task is polled for its progress, however reliable webhooks are.
        """
        return self._poller.updates()

    def __await__(self) -> Generator[Any, None, Completed]:
        return self._completed().__await__()

    async def _completed(self) -> Completed:
        return (await self.outcome()).unwrap()

    def __repr__(self) -> str:
        status = self.snapshot.status if self.snapshot else "not seen yet"
        return f"<GenerationTask {self.id!r} {status}>"
