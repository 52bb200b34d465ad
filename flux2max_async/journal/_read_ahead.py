"""Reading ahead: a list that is streamed again looks its requests up in the order in which they were recorded."""

from flux2max_async._exceptions import JournalError
from flux2max_async.journal._entry import JournalEntry
from flux2max_async.journal._rows import row_id
from flux2max_async.journal._store_protocol import JournalStore, Pending

_MAX_ROWS = 256
_MAX_GAP = 32
"""Rows by which lookups may be off and still go from row to row: requests are not begun exactly in their order."""


class ReadAhead:
    """Completed entries that are in the file behind those that were looked up last.

    While lookups go through the file from row to row, each that needs the file reads twice as many rows as the previous
    one. Only completed entries that nobody holds are kept, each for one lookup: they don't change any more, but for
    images that are saved again.

    `take()` is called in the event loop, all else in the journal's thread; both change the dict in single steps.
    """

    def __init__(self) -> None:
        self._entries: dict[str, JournalEntry] = {}
        self._window = range(1)
        """The ids of the rows that were read last."""

    def take(self, key: str) -> JournalEntry | None:
        """Return the entry of a key, once, if it was read ahead."""
        return self._entries.pop(key, None)

    def find(self, store: JournalStore, key: str) -> JournalEntry | None:
        """Return the newest entry of a key; read ahead if it follows the entries that were read last."""
        if (entry := self.take(key)) is not None:
            return entry
        row = store.find_row(key)
        if row is None:
            return None
        entry = store.entry(row)
        number, window = row_id(row), self._window
        if not window.start - _MAX_GAP <= number < window.stop:
            follows = 0 <= number - window.stop < _MAX_GAP
            self._window = range(number, number + (min(2 * len(window), _MAX_ROWS) if follows else 1))
            self._entries.clear()
            if follows:
                self._read(store)
        return entry

    def record(self, store: JournalStore, entry: JournalEntry) -> Pending | None:
        """Record an entry's new values."""
        self.take(entry.key)
        return store.record(entry)

    def _read(self, store: JournalStore) -> None:
        for row in store.completed_rows(self._window[1:]):
            try:
                entry = store.entry(row)
            except JournalError:
                continue  # whoever looks it up gets the error
            self._entries[entry.key] = entry
