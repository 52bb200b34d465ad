"""The protocol between a session and its journal."""

from collections.abc import AsyncIterator, Callable, Mapping
from decimal import Decimal
from typing import Any, Protocol

from flux2max_async.journal._entry import JournalEntry


class Journal(Protocol):
    """What a session requires of its journal. Entries are values: a change is recorded as a new value.

    All methods raise JournalError if the journal can't be read or written. An entry is held by the session that has
    begun or adopted it, until that session records it with a `holder` of None, closes the journal, or dies.
    """

    async def open(
        self, on_external_change: Callable[[list[JournalEntry]], None], /, *, watch_changes: bool = False
    ) -> None:
        """Open the journal for a session.

        Args:
            on_external_change: Called in the event loop with the tasks of a session that has died, once the journal
                has given them to this session; and with entries of this session whose end another session has recorded.
            watch_changes: Whether other sessions may record such ends, because they receive webhooks for this one. The
                journal must then notice them within a second.
        """
        ...

    async def close(self) -> None:
        """Close the journal, and release the entries that the session holds."""
        ...

    async def find(self, key: str, /) -> JournalEntry | None:
        """Return the newest entry of a key. An entry that another session has only just begun may be missed."""
        ...

    async def find_task(self, task_id: str, /) -> JournalEntry | None:
        """Return the entry of a task."""
        ...

    async def find_token(self, token: str, /) -> JournalEntry | None:  # noqa: ARG002 - for journals that store tokens
        """Return the entry that was begun with this `webhook_token`; None if there is none, or tokens aren't stored."""
        return None

    async def begin(self, entry: JournalEntry, /, *, limit: Decimal | None = None) -> bool:
        """Write an intent durably, so that it survives a power failure, and hold it.

        Args:
            entry: The intent.
            limit: US dollars that all entries of the journal together may commit.

        Returns:
            False if the key has this attempt already. An attempt that is REFUSED is replaced.

        Raises:
            BudgetExceededError: The entry would pass the limit.
        """
        ...

    async def adopt(self, entry: JournalEntry, /) -> bool:
        """Hold an entry that no session holds; return False if another session has changed it first."""
        ...

    async def record(self, entry: JournalEntry, /) -> None:
        """Record an entry's new values.

        A session that doesn't hold the entry can only add what isn't known yet: a task id or an end. If the `holder` is
        OTHER, the session that holds the entry keeps it. A task never becomes REFUSED or UNCERTAIN again: a webhook may
        have revealed it.
        """
        ...

    async def changed(self, entry: JournalEntry, /) -> None:
        """Wait until an entry that another session holds has changed, or that session has died."""
        ...

    async def load_state(self, name: str, /) -> Mapping[str, Any] | None:  # noqa: ARG002 - for journals that keep states
        """Return the small JSON value that was kept under a name; None if nothing was."""
        return None

    async def update_state(self, name: str, change: Callable[[Mapping[str, Any] | None], Mapping[str, Any]], /) -> None:
        """Replace what is kept under a name; it is read, changed and written in one transaction.

        Args:
            name: The name.
            change: Returns the new value for the old one, None if there is none. It is pure, and may run in another
                thread, and more than once.
        """

    async def prune(self, *, older_than: float, limit: int = 10_000) -> int:  # noqa: ARG002 - for journals that can
        """Forget entries that have ended, and return how many.

        Requests that are forgotten are submitted, and paid for, if they are requested again. What they have cost still
        counts against a budget. Entries that may still cost money, and those that a living session holds, are kept.

        Args:
            older_than: Seconds since the end of an entry; later ones are kept.
            limit: The maximum number of entries.
        """
        return 0

    def entries(self) -> AsyncIterator[JournalEntry]:
        """Iterate over all entries, oldest first."""
        ...
