"""Reading rows of which some may be damaged."""

from collections.abc import Generator, Iterable

from flux2max_async._exceptions import JournalError
from flux2max_async._text import get_logger
from flux2max_async.journal._entry import JournalEntry
from flux2max_async.journal._rows import entry_from_row, row_id
from flux2max_async.journal._serialization import outcome_from_entry
from flux2max_async.journal._store_protocol import Row

log = get_logger("journal")


class RowReader:
    """Reads the rows of a journal as one of its owners.

    Args:
        journal: The journal's name, for errors.
        owner: The id of the owner.
    """

    def __init__(self, journal: object, owner: str) -> None:
        self._journal = journal
        self._owner = owner
        self._reported: set[int] = set()

    def entry(self, row: Row) -> JournalEntry:
        """Return the entry of a row.

        Raises:
            JournalError: The row is damaged. The error has the key.
        """
        return entry_from_row(self._journal, row, self._owner)

    def readable(self, rows: Iterable[Row], *, ended: bool = False) -> Generator[tuple[int, JournalEntry]]:
        """Yield the entries of rows with their ids; log each row that is damaged once."""
        for row in rows:
            try:
                entry = self.entry(row)
                if ended:
                    outcome_from_entry(entry, None)
                yield row_id(row), entry
            except JournalError as error:
                if row_id(row) not in self._reported:
                    self._reported.add(row_id(row))
                    log.warning("%s", error)

    def adopted(self, row: Row) -> Row:
        """Return a row as it is once its entry is held here."""
        return (*row[:4], self._owner, *row[5:])

    def is_unchanged(self, entry: JournalEntry, row: Row | None) -> bool:
        """Check whether the newest row of a key has the state and the holder that an entry was read with."""
        if row is None:
            return False
        try:
            found = self.entry(row)
        except JournalError as error:  # the caller reads the entry again, and gets the error
            log.warning("%s", error)
            return False
        return (found.attempt, found.state, found.owner, found.holder) == (
            entry.attempt, entry.state, entry.owner, entry.holder,
        )  # fmt: skip
