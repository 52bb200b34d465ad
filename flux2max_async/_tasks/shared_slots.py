"""The queue of a session whose slots belong to a limit that it shares with other processes."""

import asyncio

from flux2max_async._exceptions import InFlightLimitError
from flux2max_async._in_flight_limit import InFlightLimit
from flux2max_async._tasks.slots import Place, SlotQueue, Waiter
from flux2max_async._text import get_logger

log = get_logger("tasks")

_ANSWER_TIME = 0.1
"""Seconds in which a limit that has free slots grants them. After that, it has none."""


# The session has a slot only for a task: it asks the limit for one while somebody waits, one at a time, gives it to the
# next in the queue, and gives back each slot as soon as it is free.
#
# Invariants: `free` is 0; while somebody waits who may have a slot, `_acquiring` asks for one.
class SharedSlotQueue(SlotQueue):
    """The requests of a session that wait for a slot of a limit.

    Args:
        limit: The limit, which is open while the queue is used.
        max_per_group: How many slots one group may hold.
    """

    def __init__(self, limit: InFlightLimit, *, max_per_group: int | None = None) -> None:
        super().__init__(0, max_per_group=max_per_group)
        self._limit = limit
        self._acquiring: asyncio.Task[None] | None = None
        self._asking_since: float | None = None
        """Since when somebody waits all the time."""

    @property
    def soon_free(self) -> int:
        """How many of those who wait may get a slot in a moment: all that there may be, until some have waited."""
        is_full = self._asking_since is not None and self._loop.time() - self._asking_since >= _ANSWER_TIME
        return 0 if is_full else max(0, self._limit.limit - self.held)

    def try_acquire(self, group: str | None = None) -> bool:  # noqa: ARG002 - the limit has to be asked
        """Return False: a slot takes at least a moment."""
        return False

    def occupy(self, group: str | None = None) -> bool:
        """Count a task that was adopted from another process: it has a slot from now on."""
        self.count_held(group)
        self._limit.occupy()
        return True

    def release(self, group: str | None = None) -> None:
        """Release a slot of the limit, which may grant it to another process."""
        self.count_released(group)
        self._limit.release()
        self._ask()

    def enqueue(self, waiter: Waiter, priority: int, group: str | None = None, *, counted: bool = True) -> Place:
        """Return a place in the queue, as `SlotQueue.enqueue()` does."""
        place = super().enqueue(waiter, priority, group, counted=counted)
        self._ask()
        return place

    def leave(self, place: Place) -> None:
        """Leave the queue; the last one to leave ends the wait for the limit."""
        super().leave(place)
        if not self.is_wanted and self._acquiring is not None:
            self._acquiring.cancel()
            self._acquiring = self._asking_since = None

    def _ask(self) -> None:
        if self.is_wanted and self._acquiring is None:
            self._asking_since = self._loop.time()
            # Never an eager task: it could give a slot to a request that has no place yet.
            self._acquiring = asyncio.Task(self._acquire(), loop=self._loop)

    async def _acquire(self) -> None:
        try:
            while self.is_wanted:
                await self._limit.acquire()
                if not self.grant_next():
                    self._limit.release()
        except InFlightLimitError as error:
            self._refuse_all(error)
        except Exception as error:
            log.exception("unexpected error of the in-flight limit")
            unexpected = InFlightLimitError(f"unexpected error of the limit: {error!r}")
            unexpected.__cause__ = error
            self._refuse_all(unexpected)
        finally:
            if self._acquiring is asyncio.current_task():
                self._acquiring = self._asking_since = None

    def _refuse_all(self, error: InFlightLimitError) -> None:
        while self._lines:
            place = min([line.first for line in self._lines.values()])[2].places[0]
            failure = InFlightLimitError(error.message)
            failure.__cause__ = error
            place.waiter.on_no_slot(failure)
