"""What a session runs in the background, and who may use it: callers in its own process and event loop."""

import asyncio
import os
from collections.abc import Coroutine
from contextvars import Context
from typing import Any, TypeVar

from flux2max_async._exceptions import ConfigurationError, FluxError, SessionClosedError
from flux2max_async._forks import check_process
from flux2max_async._shutdown import Shutdown, closed_error

T = TypeVar("T")


class BackgroundTasks:
    """The asyncio tasks of a session, in the event loop that opened it.

    They are plain asyncio tasks. A task group or cancel scope would stay open in the caller's task, wrap the caller's
    own errors and forbid closing in another task; and in a group, one task's error ends all others.

    Args:
        shutdown: The session's shutdown state.
    """

    def __init__(self, shutdown: Shutdown) -> None:
        self.shutdown = shutdown
        self._loop = asyncio.get_running_loop()
        self._process_id = os.getpid()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._producers: set[asyncio.Task[Any]] = set()
        """Those of the tasks that may never end by themselves; draining cancels them."""

    @property
    def loop_is_closed(self) -> bool:
        """Whether the session's event loop has ended without closing the session."""
        return self._loop.is_closed()

    def check_caller(self) -> None:
        """Check that the session is used in the process and event loop that opened it.

        Raises:
            ConfigurationError: It is not.
            SessionClosedError: Its event loop has ended.
        """
        check_process(self._process_id, "session", ConfigurationError)
        if self._loop.is_closed():
            raise SessionClosedError("the event loop in which this session was opened has ended")
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            loop = None
        if loop is not self._loop:
            raise ConfigurationError(
                f"this session was opened in the event loop {self._loop!r} and is used in {loop or 'no event loop'!r}: "
                "open a session of its own in each event loop"
            )

    def spawn(
        self, work: Coroutine[Any, Any, T], *, until_drain: bool = False, context: Context | None = None
    ) -> "asyncio.Task[T]":
        """Run a coroutine until it ends or the session closes.

        Args:
            work: The coroutine.
            until_drain: Whether draining cancels it, because it might never end by itself.
            context: Its context variables; by default, a copy of the caller's.

        Raises:
            SessionClosedError: The session is closed.
        """
        if self.shutdown.closed:
            work.close()
            raise closed_error()
        task = self._loop.create_task(work, context=context)
        for tasks in (self._tasks, self._producers) if until_drain else (self._tasks,):
            tasks.add(task)
            task.add_done_callback(tasks.discard)
        return task

    async def run_foreground(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine for a caller that waits for it; closing the session ends it.

        Raises:
            SessionClosedError: The session was closed meanwhile.
        """
        try:
            self.check_caller()
        except FluxError:
            work.close()
            raise
        task = self.spawn(work)
        try:
            return await task
        except asyncio.CancelledError:
            caller = asyncio.current_task()
            if caller is not None and not caller.cancelling():
                raise closed_error() from None
            raise
