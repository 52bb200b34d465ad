"""The output folder of a batch: images, the journal, and `results.jsonl` with a row for each request."""

import contextlib
import json
import re
import secrets
import stat
import time
from collections.abc import Iterable, Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any

import attrs

import flux2max_async as flux
from flux2max_async._config import parse_dollars
from flux2max_async._text import MAX_LENGTH, printable
from flux2max_async.cli._requests_file import Line
from flux2max_async.journal._entry import EntryState, JournalEntry
from flux2max_async.journal._reader import read_pages
from flux2max_async.journal._serialization import to_json

WAITING = "waiting"
"""The state of a request that was never submitted. All other states are those of journal entries."""
_TEMP_FILE_PATTERN = f".flux2max-{'[0-9a-f]' * 16}.part"
"""Matches the names of files that are being written."""
_MAX_TEMP_FILE_AGE = 86_400.0
"""Seconds after which a temporary file is left over from a killed process, even if somebody has set the clock."""
_UNPAID_STATES = (WAITING, EntryState.REFUSED.value)
_FINAL_STATES = (EntryState.COMPLETED.value, EntryState.FAILED.value)
_LOST_MESSAGE = "it is in results.jsonl, and not in the journal: flux2max download {} may still save its picture"
_ROW_PARAMS = ("seed", "width", "height", "safety_tolerance", "output_format", "input_images")
"""The parameters that a row has, besides the prompt."""
_BATCH_ERRORS = (
    *(flux.SessionClosedError, flux.AuthenticationError, flux.PermissionDeniedError, flux.InsufficientBalanceError),
    *(flux.BudgetExceededError, flux.JournalError),
)
"""Errors that keep a request from being submitted although nothing is wrong with the request itself."""
_BATCH_ERROR_NAMES = {error_type.__name__ for error_type in _BATCH_ERRORS}
_UNREADABLE = (ValueError, KeyError, TypeError, ArithmeticError, RecursionError, flux.ConfigurationError)
"""What reading a line of `results.jsonl` raises if another program has written it."""
_UNCERTAIN_MESSAGE = "the submit was interrupted before the service responded: a task may exist and cost money"


def _limit(text: str | None) -> str | None:
    return text and text[: MAX_LENGTH + 1]  # the last character shows that there is more


@attrs.define
class Row:
    """The state of one request."""

    key: str
    prompt: str
    params: Mapping[str, Any] = attrs.field(factory=dict[str, Any])
    """The other parameters, as JSON values."""
    state: str = WAITING
    task_id: str | None = attrs.field(default=None, converter=_limit)
    cost: Decimal | None = None
    """US dollars; None until the service has reported the cost."""
    seconds: float | None = None
    """From the submit to the end of the task."""
    polls: int | None = None
    files: list[str] = attrs.field(factory=list[str])
    """The file names of the images in the folder."""
    error: str | None = attrs.field(default=None, converter=_limit)
    """Why the request failed, or why not all of its images are saved."""

    @classmethod
    def from_line(cls, line: Line) -> "Row":
        """Return the row of a request that was not submitted."""
        return cls(line.key, line.request.prompt, _select_params(line.content.description))

    @classmethod
    def from_entry(cls, entry: JournalEntry, folder: Path) -> "Row":
        """Return the row of a journal entry."""
        row = cls(entry.key, entry.prompt, _select_params(entry.request), entry.state.value, entry.task_id, entry.cost)
        if is_uncertain(entry):
            row.state, row.error = EntryState.UNCERTAIN.value, _UNCERTAIN_MESSAGE
            return row
        error_name = entry.result.get("error", {}).get("kind")
        if entry.state is EntryState.REFUSED and (error_name is None or error_name in _BATCH_ERROR_NAMES):
            row.state = WAITING
            return row
        row.seconds, row.polls, row.error = entry.result.get("elapsed"), entry.result.get("polls"), entry.error
        # By name, since the folder may have been moved.
        row.files = [path.name for path in entry.paths if (folder / path.name).is_file()]
        return row

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Row":
        """Return the row of a line of `results.jsonl`; raise one of `_UNREADABLE` if another program has written it."""
        return cls(
            key=str(data["key"]),
            prompt=str(data["prompt"]),
            params=dict(data["params"]),
            state=str(data["state"]),
            task_id=None if data["task_id"] is None else str(data["task_id"]),
            cost=None if data["cost"] is None else parse_dollars("cost", data["cost"]),
            seconds=None if data["seconds"] is None else float(data["seconds"]),
            polls=None if data["polls"] is None else int(data["polls"]),
            files=[str(name) for name in data["files"]],
            error=None if data["error"] is None else str(data["error"]),
        )

    def update(self, outcome: "flux.Outcome") -> None:
        """Update the row with an outcome, which may have left the request unfinished."""
        self.task_id = outcome.task_id
        error: flux.FluxError | None
        if isinstance(outcome, flux.Completed):
            self.state = EntryState.COMPLETED.value
            self.cost = outcome.usage.cost if outcome.usage else None
            self.files = [path.name for path in outcome.saved]
            error = outcome.save_error or outcome.journal_error
        else:
            self.state = state_after_failure(outcome)
            error = None if isinstance(outcome.error, flux.SessionClosedError) else outcome.error
        # Advice about the Python API doesn't help a user of the command line.
        self.error = None if error is None else re.sub(r"; (attach\(\)|resubmit_uncertain=True).*", "", str(error))
        if is_final(outcome):
            self.seconds, self.polls = outcome.elapsed, outcome.polls

    def to_dict(self) -> dict[str, Any]:
        """Return the row as JSON values."""
        return {
            "key": self.key,
            "prompt": self.prompt,
            "task_id": None if self.task_id is None else printable(self.task_id),
            "state": self.state,
            "cost": None if self.cost is None else str(self.cost),
            "seconds": None if self.seconds is None else round(self.seconds, 3),
            "polls": self.polls,
            "files": self.files,
            "error": None if self.error is None else printable(self.error),
            "params": dict(self.params),
        }


def _is_lost(row: Row, entry: JournalEntry | None) -> bool:
    """Check whether a request is paid for according to its row of `results.jsonl`, and the journal doesn't know."""
    match None if entry is None else entry.state:
        case None:
            return row.state not in _UNPAID_STATES
        # Rows can be older than entries: what failed and was refused when it was tried again is not paid for.
        case EntryState.REFUSED:
            return row.task_id is not None and row.state not in (*_UNPAID_STATES, EntryState.FAILED)
        case EntryState.FAILED:
            return row.task_id is not None and row.state in {EntryState.COMPLETED, EntryState.UNCERTAIN}
        case _:
            return False


def is_uncertain(entry: JournalEntry) -> bool:
    """Check whether nothing can determine any more if the submit created a task."""
    return entry.state is EntryState.UNCERTAIN or (entry.state is EntryState.INTENT and entry.holder is None)


def state_after_failure(outcome: "flux.Failed") -> str:
    """Return the state of a request that failed or is unfinished."""
    match outcome.error:
        case flux.TaskFailedError() | flux.TaskNotFoundError():
            return EntryState.FAILED.value
        case flux.SubmissionUncertainError() | flux.JournalError(key=str()):  # the entry of this key is damaged
            return EntryState.UNCERTAIN.value
        case _ if outcome.task_id is not None:
            return EntryState.SUBMITTED.value
        case error if isinstance(error, _BATCH_ERRORS):
            return WAITING
        case _:
            return EntryState.REFUSED.value


def is_final(outcome: "flux.Outcome") -> bool:
    """Check whether an outcome is the request's own result; if not, the batch stopped before there was one."""
    return isinstance(outcome, flux.Completed) or not (
        isinstance(outcome.error, flux.SessionClosedError) or state_after_failure(outcome) == WAITING
    )


@attrs.define
class OutputDir:
    """The output folder of a batch."""

    path: Path
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
        """The journal's SQLite file."""
        return self.path / "journal.db"

    @property
    def results_path(self) -> Path:
        """The file with a line for each request."""
        return self.path / "results.jsonl"

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
            row.key: row for row in previous if row.key in self.damaged or _is_lost(row, newest.get(row.key))
        }
        for key, row in self.lost.items():
            if row.state != EntryState.COMPLETED or not all((self.path / name).is_file() for name in row.files or [""]):
                message = self.damaged.get(key) or _LOST_MESSAGE.format(row.task_id or "TASK_ID")
                row.state, row.error = EntryState.UNCERTAIN.value, str(message)
        return entries

    async def read_journal(self) -> "list[JournalEntry]":
        """Return all journal entries, the oldest first, and update what is damaged.

        Raises:
            ConfigurationError: The folder can't be read.
            JournalError: The journal can't be read.
        """
        try:
            if self.path.exists() and not self.path.is_dir():
                raise flux.ConfigurationError(f"{str(self.path)!r} is not a folder")
            has_journal = self.journal_path.exists()
        except OSError as error:
            raise flux.ConfigurationError(f"can't read the folder {str(self.path)!r}: {error.strerror}") from error
        self.damaged = {}
        entries: list[JournalEntry] = []
        if has_journal:
            async for page in read_pages(self.journal_path):
                for entry in page:
                    if isinstance(entry, JournalEntry):
                        entries.append(entry)
                        self.damaged.pop(entry.key, None)  # it was submitted again
                    else:
                        self.damaged[str(entry.key)] = entry
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
            if self._stays_lost(key, newest.get(key)):
                row = attrs.evolve(self.lost[key], prompt=self.lost[key].prompt or row.prompt, params=row.params)
            # An unpaid request that is no longer in the file was probably corrected there.
            if key in requested or not requested or row.state not in _UNPAID_STATES:
                self.rows[key] = row

    def _stays_lost(self, key: str, entry: JournalEntry | None) -> bool:
        """Check whether a request is lost from the journal, and was not submitted again in this run."""
        recorded = self._recorded.get(key)
        if key not in self.lost or (recorded is not None and recorded.state in _FINAL_STATES):
            return False
        return key in self.damaged or _is_lost(self.lost[key], entry)

    def _merge_recorded(self, row: Row) -> Row:
        """Return this run's own row if it knows more than the journal does."""
        recorded = self._recorded.get(row.key)
        if recorded is None:
            return row
        if row.state not in _FINAL_STATES and (
            row.state == WAITING or recorded.state in _FINAL_STATES or (recorded.task_id and not row.task_id)
        ):
            return recorded
        row.error = row.error or recorded.error
        return row

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
        rows: list[Row] = []
        for line in text.split("\n"):
            with contextlib.suppress(*_UNREADABLE):
                rows.append(Row.from_dict(json.loads(line)))
        return rows


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


def _select_params(params: Mapping[str, Any]) -> dict[str, Any]:
    return {name: params[name] for name in _ROW_PARAMS if name in params}
