"""The interface between a journal's thread and the database that it writes. All methods block.

`SqliteStore` and `PostgresStore` implement it. A store is one owner of the journal among others; `_leases` describes
how owners are presumed dead, and who takes over from them.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from decimal import Decimal
from typing import Any, Protocol

import attrs

from flux2max_async._exceptions import JournalError
from flux2max_async.journal._entry import JournalEntry
from flux2max_async.journal._states import StateTable

Row = tuple[Any, ...]
"""An entry as the database has it."""


@attrs.frozen
class OtherOwner:
    """Another owner, as its row shows it."""

    heartbeat: int
    lease: float
    """Seconds."""
    is_gone: bool
    """Whether its process has certainly ended."""


@attrs.frozen
class Pending:
    """A result that is not there yet: statements are sent together, and their answers are read afterwards."""

    get: Callable[[], Any]
    """Returns the result; called in the transaction, once all its statements are sent."""


class JournalStore(Protocol):
    """A connection to the database of a journal. All that a transaction has written can be seen, or nothing of it."""

    owner: str
    """The id of this owner."""
    is_empty: bool
    """Whether the journal had no entries, and nobody else used it, when it was opened."""
    states: StateTable
    """What sessions have learned."""
    errors: tuple[type[Exception], ...]
    """What the methods raise if the database fails."""
    heartbeat_interval: float
    """Seconds between heartbeats, with which other owners are checked as well."""
    check_interval: float
    """Seconds between checks for changes by other owners, while somebody waits for them."""
    upkeep_at: float | None
    """When `upkeep()` is due, by the monotonic clock."""

    @property
    def is_connected(self) -> bool:
        """Whether the database can be reached; if not, `reconnect()` is called until it can be."""
        ...

    def close(self) -> None:
        """Drop this owner, and close the connection."""
        ...

    def reconnect(self) -> JournalError | None:
        """Try to connect anew; return why that was not possible."""
        ...

    # ------------------------------------------------------------------ failures

    def journal_error(self, error: Exception) -> JournalError:
        """Return the error that explains a failure of the database."""
        ...

    def may_pass(self, error: Exception) -> bool:
        """Check whether the same write may succeed later."""
        ...

    def is_interrupted(self, error: Exception) -> bool:
        """Check whether the same jobs must run again now, since nothing was wrong with them."""
        ...

    def problem(self) -> JournalError | None:
        """Return why nothing may be begun any more; None if all is well."""
        ...

    # ------------------------------------------------------------------ transactions and upkeep

    def transaction(self, *, durable: bool) -> AbstractContextManager[None]:
        """Run a transaction. A durable commit stores all earlier commits, too."""
        ...

    def set_synchronous(self, *, durable: bool) -> None:
        """Set whether the following commits wait until the disk has stored them."""
        ...

    def schedule_upkeep(self) -> None:
        """Plan the upkeep that follows writes."""
        ...

    def upkeep(self, *, is_idle: bool) -> None:
        """Do what is due, or wait for a moment without jobs."""
        ...

    # ------------------------------------------------------------------ changes by other owners

    def fileno(self) -> int | None:
        """Return the descriptor that is readable when another owner wakes this one."""
        ...

    def receive(self) -> None:
        """Read what makes the descriptor readable."""
        ...

    def changed_externally(self) -> bool:
        """Check whether another owner may have changed something since the previous call."""
        ...

    def wake(self, owner: str) -> None:
        """Wake another owner, because an entry that it holds has changed."""
        ...

    def watch(self, entry: JournalEntry) -> None:
        """Ask the holder of an entry to report its changes."""
        ...

    # ------------------------------------------------------------------ entries

    def entry(self, row: Row) -> JournalEntry:
        """Return the entry of a row.

        Raises:
            JournalError: The row is damaged. The error has the key.
        """
        ...

    def find_row(self, key: str) -> Row | None:
        """Return the row of the newest entry of a key."""
        ...

    def completed_rows(self, ids: range) -> list[Row]:
        """Return the rows, among those with the ids, of completed entries of moderate size that nobody holds."""
        ...

    def find_task(self, task_id: str) -> JournalEntry | None:
        """Return the newest entry of a task."""
        ...

    def find_token(self, token: str) -> JournalEntry | None:
        """Return the entry that was begun with a token."""
        ...

    def ended_entries(self) -> list[JournalEntry]:
        """Return the entries that are held here and have ended; other sessions may have recorded these ends."""
        ...

    def begin(self, entry: JournalEntry, limit: Decimal | None, begin_id: int = 0) -> bool | Pending:
        """Insert an intent that is held here; return False if its attempt exists and isn't REFUSED.

        Args:
            entry: The intent.
            limit: US dollars that all entries together may commit.
            begin_id: The number of this call, which is the same if the call is repeated.

        Raises:
            BudgetExceededError: All entries together would commit more than the limit.
        """
        ...

    def adopt(self, entry: JournalEntry) -> bool | Pending:
        """Hold an entry; return False if its state or owner has changed since it was read."""
        ...

    def record(self, entry: JournalEntry) -> Pending | None:
        """Update an entry as far as this owner may; known ids, costs and files are kept."""
        ...

    def unchanged(self, entries: list[JournalEntry]) -> list[bool]:
        """Return, for each entry, whether neither its state nor its holder has changed since it was read."""
        ...

    # ------------------------------------------------------------------ owners

    def heartbeat(self) -> bool:
        """Show that this owner is alive; insert its row and return False if it was dropped."""
        ...

    def other_owners(self) -> dict[str, OtherOwner]:
        """Return all other owners by their ids."""
        ...

    def drop_owner(self, owner_id: str) -> None:
        """Delete an owner's row: what it holds is orphaned."""
        ...

    def adopt_from(self, owner_id: str) -> list[JournalEntry]:
        """Hold the tasks of a dropped owner, and return them; mark its intents as uncertain. Skip damaged rows."""
        ...
