"""The protocol that a session expects of its journal."""

from collections.abc import AsyncIterator, Callable
from decimal import Decimal
from typing import Protocol

from flux2max_async.journal._entry import JournalEntry


class Journal(Protocol):
    """What a session tells its journal, and what it asks. An entry is a value: what is new is told as a new entry.

    All methods raise JournalError where the journal can't be read or written. An entry is held by the session that has
    begun or adopted it, until that records it with a `holder` of None, closes the journal, or dies.
    """

    async def open(self, news: Callable[[list[JournalEntry]], None], /, *, listening: bool = False) -> None:
        """Begin a session.

        Args:
            news: To be called, in the event loop, with the tasks that a dying process has left behind, once the journal
                has given them to this session; and with ends of this session's tasks that others have recorded.
            listening: Whether there may be such ends, because other processes receive webhooks: then they are to be
                noticed within a second.
        """
        ...

    async def close(self) -> None:
        """End the session, and free what it holds."""
        ...

    async def find(self, key: str, /) -> JournalEntry | None:
        """Give the newest entry of a key, its `holder` as seen from here; what others write just now may be missed."""
        ...

    async def find_task(self, task_id: str, /) -> JournalEntry | None:
        """Give the entry of a task."""
        ...

    async def begin(self, entry: JournalEntry, /, *, limit: Decimal | None = None) -> bool:
        """Write an intent so that a power cut can't undo it, and hold it.

        False where that attempt of that key is there already, unless it is REFUSED: then it is begun anew.

        Raises:
            BudgetExceededError: The entry's outlay, on top of all that is in the journal, would pass the limit.
        """
        ...

    async def adopt(self, entry: JournalEntry, /) -> bool:
        """Hold a task that nobody follows, or whose pictures nobody saves; False where somebody was faster."""
        ...

    async def record(self, entry: JournalEntry, /) -> None:
        """Write down what is new. Whoever doesn't hold the entry can only add what isn't known yet: an id, an end.

        With a `holder` of OTHER, whoever holds it goes on holding it.
        """
        ...

    async def changed(self, entry: JournalEntry, /) -> None:
        """Wait until an entry that is held elsewhere has changed, or whoever held it is gone."""
        ...

    def entries(self) -> AsyncIterator[JournalEntry]:
        """Iterate over all entries in the order of their making."""
        ...
