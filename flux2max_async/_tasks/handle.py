"""The handle by which callers follow a task."""

from collections.abc import AsyncGenerator, Generator
from typing import Any

from flux2max_async._models.request import GenerationRequest
from flux2max_async._models.results import Completed, Outcome, TaskSnapshot
from flux2max_async._tasks.runner import TaskRunner


class GenerationTask:
    """A submitted task. It belongs to the session, which polls it to its end, waited for or not.

    Awaiting it returns `Completed`, or raises. Many can await it; cancelling a wait cancels only that wait.
    """

    __slots__ = ("_runner",)

    def __init__(self, runner: TaskRunner) -> None:
        self._runner = runner

    @property
    def id(self) -> str:
        """The service's id for the task; `session.attach(id)` finds it again from anywhere."""
        return self._runner.task_id or ""

    @property
    def request(self) -> GenerationRequest | None:
        """What was requested; None for a task attached by its id alone."""
        return self._runner.request

    @property
    def snapshot(self) -> TaskSnapshot | None:
        """The newest answer about the task; None until there is one."""
        return self._runner.feed.snapshot

    async def outcome(self) -> Outcome:
        """Wait for the end; a task that failed is a `Failed`, not an exception.

        Raises:
            ConfigurationError: It is awaited in another event loop than its session's, before its end.
        """
        return await self._runner.wait()

    def updates(self) -> AsyncGenerator[TaskSnapshot, None]:
        """Iterate over the newest snapshot, then each new status or progress; ends with the task.

        The last snapshot holds the final status. Close the generator, or cancel whoever iterates, when nobody needs
        the progress any more: until then the task is polled for it, however reliable webhooks are.
        """
        self._runner.check_caller()
        return self._runner.feed.updates()

    def __await__(self) -> Generator[Any, None, Completed]:
        return self._completed().__await__()

    async def _completed(self) -> Completed:
        return (await self.outcome()).unwrap()

    def __repr__(self) -> str:
        status = self.snapshot.status if self.snapshot else "not polled yet"
        return f"<GenerationTask {self.id!r} {status}>"
