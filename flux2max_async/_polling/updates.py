"""The newest snapshot of a task, for everybody who follows the task."""

import asyncio
from collections.abc import AsyncGenerator, Callable

import attrs

from flux2max_async._models.results import FINAL_STATUSES, TaskSnapshot


@attrs.define(eq=False)
class SnapshotFeed:
    """The newest snapshot of one task.

    The feed is open until `close()`. The first snapshot with a final status stands: whatever is published after it is
    ignored. `updates()` ends when the feed is closed, which may also happen without a final status.
    """

    snapshot: TaskSnapshot | None = attrs.field(default=None, init=False)
    ended: bool = attrs.field(default=False, init=False)
    """Whether the task has reached a final status."""
    closed: bool = attrs.field(default=False, init=False)
    watchers: int = attrs.field(default=0, init=False)
    """How many iterations of `updates()` are running."""
    on_first_watcher: Callable[[], None] | None = attrs.field(default=None, init=False)
    _changed: asyncio.Event | None = attrs.field(default=None, init=False)

    @property
    def progress(self) -> float:
        """The progress that the service reported last; 0.0 if it reported none."""
        return (self.snapshot and self.snapshot.progress) or 0.0

    def publish(self, snapshot: TaskSnapshot) -> None:
        """Make this the newest snapshot, unless the task has ended already."""
        if not self.ended:
            self.snapshot = snapshot
            self.ended = snapshot.status in FINAL_STATUSES
            self._notify()

    def close(self) -> None:
        """Publish nothing any more."""
        self.closed = True
        self._notify()

    async def updates(self) -> AsyncGenerator[TaskSnapshot, None]:
        """Yield the newest snapshot, then each with a new status or progress, until the feed is closed."""
        last_yielded = None
        self.watchers += 1
        if self.watchers == 1 and self.on_first_watcher is not None:
            self.on_first_watcher()
        try:
            while True:
                snapshot = self.snapshot
                if snapshot is not None and (snapshot.status, snapshot.progress) != last_yielded:
                    last_yielded = (snapshot.status, snapshot.progress)
                    yield snapshot
                elif self.closed:
                    return
                else:
                    await self._wait_for_change()
        finally:
            self.watchers -= 1

    async def wait_closed(self) -> None:
        """Wait until the feed is closed: the end has been recorded, or the task is not followed any more."""
        while not self.closed:
            await self._wait_for_change()

    async def _wait_for_change(self) -> None:
        self._changed = self._changed or asyncio.Event()
        await self._changed.wait()

    def _notify(self) -> None:
        if self._changed is not None:
            self._changed.set()
            self._changed = None


@attrs.define(eq=False)
class Wakeup:
    """A sleep that can be cut short. One coroutine sleeps; anybody may wake it."""

    _sleeping: "asyncio.Future[bool] | None" = attrs.field(default=None, init=False)
    """Resolved when the sleep is over: True if it lasted as long as it should."""

    async def sleep(self, seconds: float) -> bool:
        """Sleep; return False if `wake()` has cut the sleep short."""
        loop = asyncio.get_running_loop()
        self._sleeping = loop.create_future()
        timer = loop.call_later(seconds, self._resolve, self._sleeping, True)  # noqa: FBT003 - the future's value
        try:
            return await self._sleeping
        finally:
            timer.cancel()
            self._sleeping = None

    def wake(self) -> None:
        """End the sleep now, if there is one."""
        if self._sleeping is not None:
            self._resolve(self._sleeping, False)  # noqa: FBT003 - the future's value

    @staticmethod
    def _resolve(sleeping: "asyncio.Future[bool]", undisturbed: bool) -> None:  # noqa: FBT001 - the future's value
        if not sleeping.done():
            sleeping.set_result(undisturbed)
