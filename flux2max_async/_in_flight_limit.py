"""The protocol between a session and a limit that it shares with others."""

from typing import Protocol, runtime_checkable


@runtime_checkable
class InFlightLimit(Protocol):
    """A limit on the tasks in flight of several sessions together, in whichever processes they are.

    A session opens and closes it, so each session needs an object of its own. It only counts: the session gives each
    slot, once it has it, to the first of its own queue.

    All methods raise InFlightLimitError if the limit can't be asked.
    """

    @property
    def limit(self) -> int:
        """The number of slots in all, for which a session sizes its look-ahead and its pool of connections."""
        ...

    def expect_adoption(self) -> None:
        """Learn, before `open()`, that the session has a journal: if its process dies, others adopt its tasks.

        A limit may then keep the slots of a dead process until `occupy()` is called for its tasks.
        """

    async def open(self) -> None:
        """Open the limit for a session."""
        ...

    async def acquire(self) -> None:
        """Wait for a slot, and take it. If the wait is cancelled, none is taken."""
        ...

    def occupy(self) -> None:
        """Count a task that runs already, adopted from a process that is gone: at once, even above the limit."""
        ...

    def release(self) -> None:
        """Release a slot, at once or soon."""
        ...

    async def close(self) -> None:
        """Release all slots of the session, and close the limit, also after an `open()` that has failed."""
        ...
