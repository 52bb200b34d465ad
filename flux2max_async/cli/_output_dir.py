"""The output folder of a batch: images, the journal, and `results.jsonl` with a row for each request."""

import contextlib
import secrets
import stat
import time
from collections.abc import Collection, Iterable
from decimal import Decimal
from pathlib import Path

import attrs

import flux2max_async as flux
from flux2max_async.cli._journals import AnyJournal, open_journal, read_pages
from flux2max_async.cli._requests_file import Line
from flux2max_async.cli._rows import FINAL_STATES, UNPAID_STATES, WAITING, Row, is_lost, parse_rows
from flux2max_async.journal._entry import EntryState, JournalEntry
from flux2max_async.journal._serialization import to_json

_JOURNAL, _EMULATOR_JOURNAL = "journal.db", "journal-emulator.db"
JOURNAL_NAMES = (_JOURNAL, _EMULATOR_JOURNAL)
"""The names of a batch's journal. With the emulator, it is another: whoever finds the usual one may rely on its tasks
and pictures being those that were paid for."""
_TEMP_FILE_PATTERN = f".flux2max-{'[0-9a-f]' * 16}.part"
"""Matches the names of files that are being written."""
_MAX_TEMP_FILE_AGE = 86_400.0
"""Seconds after which a temporary file is left over from a killed process, even if somebody has set the clock."""
_LOST_MESSAGE = "it is in results.jsonl, and not in the journal: flux2max download {} may still save its picture"


@attrs.define
class OutputDir:
    """The output folder of a batch."""

    path: Path
    emulated: bool = False
    """Whether its tasks are those of an emulator."""
    shared_journal: str | None = attrs.field(default=None, repr=False)
    """The path or address of a journal that other batches may use as well; None if it is the one in the folder."""
    keys: Collection[str] = ()
    """The keys of this batch's requests; in a shared journal, others are those of other batches, except former ones."""
    committed_elsewhere: Decimal = attrs.field(default=Decimal(0), init=False)
    """US dollars that others' requests in a shared journal count against a budget."""
    rows: dict[str, Row] = attrs.field(factory=dict[str, Row], init=False)
    """By key; the requests of the file come first, in its order."""
    _recorded: dict[str, Row] = attrs.field(factory=dict[str, Row], init=False)
    """The rows of this run's outcomes by key: the journal may lack some of their results."""
    lost: dict[str, Row] = attrs.field(factory=dict[str, Row], init=False)
    """The rows of requests that are or may be paid for, although the journal doesn't know it, by key."""
    damaged: dict[str, flux.JournalError] = attrs.field(factory=dict[str, flux.JournalError], init=False)
    """Why requests can't be read from the journal, by key."""

    @property
    def journal_path(self) -> Path:
        """The SQLite file of the folder's own journal."""
        return self.path / (_EMULATOR_JOURNAL if self.emulated else _JOURNAL)

    @property
    def results_path(self) -> Path:
        """The file with a line for each request."""
        return self.path / "results.jsonl"

    def open_session_journal(self) -> AnyJournal:
        """Return the journal, which is not opened yet.

        Raises:
            ConfigurationError: The address is wrong.
        """
        return open_journal(self.journal_path if self.shared_journal is None else self.shared_journal)

    def reject_mixture(self) -> None:
        """Check that the folder has no pictures that were paid for if this run is the emulator's, and the reverse.

        Raises:
            ConfigurationError: It has.
        """
        if not self.emulated and (self.path / _EMULATOR_JOURNAL).exists():
            raise flux.ConfigurationError(
                f"{str(self.path)!r} has the emulator's pictures: choose another folder with --out, or delete it"
            )
        paid = (self.path / _JOURNAL).exists() or (self.results_path.exists() and not self.journal_path.exists())
        if self.emulated and paid:
            raise flux.ConfigurationError(
                f"{str(self.path)!r} is the folder of a batch without the emulator: choose another one with --out"
            )

    def create(self) -> None:
        """Create the folder, and delete temporary files that killed processes have left in it.

        Raises:
            ConfigurationError: The folder can't be created.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise flux.ConfigurationError(f"can't create the folder {str(self.path)!r}: {error.strerror}") from error
        for temp_file in [*self.path.glob(_TEMP_FILE_PATTERN), *(self.path / "thumbs").glob(_TEMP_FILE_PATTERN)]:
            with contextlib.suppress(OSError):  # another process may have deleted it
                if temp_file.stat().st_mtime < time.time() - _MAX_TEMP_FILE_AGE:
                    temp_file.unlink()

    async def open_journal(self) -> "list[JournalEntry]":
        """Return all journal entries like `read_journal`, and find what was paid for and is lost from the journal.

        It was replaced by an older copy, deleted, or copied without its write-ahead log; or some entries are damaged.

        Raises:
            ConfigurationError: The folder can't be read.
            JournalError: The journal can't be read.
        """
        # Before the journal: other processes write into the journal first.
        previous = self._read_results()
        entries = await self.read_journal()
        newest = {entry.key: entry for entry in entries}
        self.lost = {key: Row(key, "") for key in self.damaged} | {
            row.key: row for row in previous if row.key in self.damaged or is_lost(row, newest.get(row.key))
        }
        for key, row in self.lost.items():
            if row.state != EntryState.COMPLETED or not self._has_pictures(row):
                message = self.damaged.get(key) or _LOST_MESSAGE.format(row.task_id or "TASK_ID")
                row.state = EntryState.UNCERTAIN.value
                row.set_error(str(message))
        return entries

    def _has_pictures(self, row: Row) -> bool:
        """Check whether the pictures of a row are in the folder, or in object storage as far as is known."""
        if not row.files:
            return bool(row.locations)
        return all((self.path / name).is_file() for name in row.files)

    async def read_journal(self) -> "list[JournalEntry]":
        """Return all journal entries, the oldest first, and update what is damaged.

        Raises:
            ConfigurationError: The folder can't be read.
            JournalError: The journal can't be read.
        """
        try:
            if self.path.exists() and not self.path.is_dir():
                raise flux.ConfigurationError(f"{str(self.path)!r} is not a folder")
            self.journal_path.exists()
        except OSError as error:
            raise flux.ConfigurationError(f"can't read the folder {str(self.path)!r}: {error.strerror}") from error
        self.damaged = {}
        self.committed_elsewhere = Decimal(0)
        own = None if self.shared_journal is None else {*self.keys, *(row.key for row in self._read_results())}
        entries: list[JournalEntry] = []
        async for page in read_pages(self.open_session_journal(), missing_ok=True):
            for entry in page:
                is_own = own is None or entry.key in own
                if not isinstance(entry, JournalEntry):
                    self.damaged |= {str(entry.key): entry} if is_own else {}
                elif is_own:
                    entries.append(entry)
                    self.damaged.pop(entry.key, None)  # it was submitted again
                else:
                    self.committed_elsewhere += entry.committed
        return entries

    def record(self, outcome: "flux.Outcome") -> Row:
        """Update the row of a request with its outcome, and return the row."""
        assert outcome.request is not None
        row = self.rows[str(outcome.request.key)]
        row.update(outcome)
        self._recorded[row.key] = row
        return row

    def update_rows(self, lines: Iterable[Line], entries: "Iterable[JournalEntry]") -> None:
        """Rebuild all rows from the requests of the file, the journal and `results.jsonl`.

        Args:
            lines: The requests; if there are none, `results.jsonl` decides which unpaid requests are kept.
            entries: The journal's, the oldest first: the newest entry of each key counts.
        """
        newest = {entry.key: entry for entry in entries}
        journaled = {key: Row.from_entry(entry, self.path) for key, entry in newest.items()}
        previous = {row.key: row for row in self._read_results()}
        requested = {line.key: Row.from_line(line) for line in lines}
        self.rows = {}
        for key in dict.fromkeys((*requested, *previous, *journaled, *self.lost)):
            known = journaled.get(key) or requested.get(key) or previous.get(key) or self.lost[key]
            row = self._merge_recorded(known)
            if self.shared_journal is not None:
                self._find_own_files(row, previous.get(key))
            if self._stays_lost(key, newest.get(key)):
                row = attrs.evolve(self.lost[key], prompt=self.lost[key].prompt or row.prompt, params=row.params)
            # An unpaid request that is no longer in the file was probably corrected there.
            if key in requested or not requested or row.state not in UNPAID_STATES:
                self.rows[key] = row

    def _stays_lost(self, key: str, entry: JournalEntry | None) -> bool:
        """Check whether a request is lost from the journal, and was not submitted again in this run."""
        recorded = self._recorded.get(key)
        if key not in self.lost or (recorded is not None and recorded.state in FINAL_STATES):
            return False
        return key in self.damaged or is_lost(self.lost[key], entry)

    def _merge_recorded(self, row: Row) -> Row:
        """Return this run's own row if it knows more than the journal does."""
        recorded = self._recorded.get(row.key)
        if recorded is None:
            return row
        if row.state not in FINAL_STATES and (
            row.state == WAITING or recorded.state in FINAL_STATES or (recorded.task_id and not row.task_id)
        ):
            return recorded
        if row.error is None:
            row.error, row.max_error_length = recorded.error, recorded.max_error_length
        return row

    def _find_own_files(self, row: Row, previous: Row | None) -> None:
        """Set the files of a row to those in this folder: the journal may have the names that another host chose."""
        own = self._recorded.get(row.key) or previous
        row.files = [name for name in own.files if (self.path / name).is_file()] if own else []

    def write_results(self, rows: Iterable[Row]) -> None:
        """Replace `results.jsonl` atomically, or raise the OSError for which it can't be written."""
        write_atomically(self.results_path, "".join(f"{to_json(row.to_dict())}\n" for row in rows))

    def _read_results(self) -> list[Row]:
        """Return the rows of `results.jsonl`, without lines that another program has written."""
        try:
            # A link could lead out of the folder; a pipe or a device may never end.
            if not stat.S_ISREG(self.results_path.lstat().st_mode):
                raise flux.ConfigurationError(f"{str(self.results_path)!r} is not a regular file")
            text = self.results_path.read_text(encoding="utf-8", errors="replace")
        except OSError:
            return []
        return parse_rows(text)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace a file atomically: a reader gets either the old or the new content.

    Raises:
        OSError: It can't be written; it keeps its old content.
    """
    temp_file = path.with_name(f".flux2max-{secrets.token_hex(8)}.part")
    try:
        temp_file.write_bytes(content if isinstance(content, bytes) else content.encode(errors="backslashreplace"))
        temp_file.replace(path)
    finally:
        temp_file.unlink(missing_ok=True)
