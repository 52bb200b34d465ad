"""The folder of a batch: its pictures, its journal, and a row for each request, told by `results.jsonl`."""

import contextlib
import json
import re
import secrets
import time
from collections.abc import Iterable, Iterator, Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any

import attrs

import flux2max_async as flux
from flux2max_async.cli._requests_file import Line
from flux2max_async.journal._entry import EntryState, JournalEntry
from flux2max_async.journal._serialization import to_json

WAITING = "waiting"
"""The state of a request of which the journal knows nothing: it was never submitted. All others are the journal's."""
_PARTS = f".flux2max-{'[0-9a-f]' * 16}.part"
"""The names of files that are being written."""
_ABANDONED = 60.0
"""Seconds after which nobody can be writing one still."""
_BOUGHT_NOTHING = (WAITING, EntryState.REFUSED.value)
_ENDS = (EntryState.COMPLETED.value, EntryState.FAILED.value)
_SHOWN = ("seed", "width", "height", "safety_tolerance", "output_format", "input_images")
_NO_FAULT = (
    *(flux.SessionClosedError, flux.AuthenticationError, flux.PermissionDeniedError, flux.InsufficientBalanceError),
    *(flux.BudgetExceededError, flux.JournalError),
)
"""Why a request may not have been submitted though nothing is wrong with it."""
_LOST = "its submit was cut off before there was an answer: a task may exist and cost money"


@attrs.define
class Row:
    """How one request stands."""

    key: str
    prompt: str
    params: Mapping[str, Any] = attrs.field(factory=dict[str, Any])
    """What else was asked for, as JSON values."""
    state: str = WAITING
    task_id: str | None = None
    cost: Decimal | None = None
    """US dollars, once the service has named them."""
    seconds: float | None = None
    """From the submit to the end."""
    polls: int | None = None
    files: list[str] = attrs.field(factory=list[str])
    """The names of its pictures in the folder."""
    error: str | None = None
    """Why it came to nothing, or why its pictures aren't all there."""

    @classmethod
    def of_line(cls, line: Line) -> "Row":
        """Give the row of a request that nobody has submitted."""
        return cls(line.key, line.request.prompt, _shown(line.content.description))

    @classmethod
    def of_entry(cls, entry: JournalEntry, folder: Path) -> "Row":
        """Give the row of what a journal knows."""
        row = cls(entry.key, entry.prompt, _shown(entry.request), entry.state.value, entry.task_id, entry.cost)
        if is_lost(entry):
            row.state, row.error = EntryState.UNCERTAIN.value, _LOST
            return row
        kind = entry.result.get("error", {}).get("kind")
        if entry.state is EntryState.REFUSED and (kind is None or kind in {one.__name__ for one in _NO_FAULT}):
            row.state = WAITING
            return row
        row.seconds, row.polls, row.error = entry.result.get("elapsed"), entry.result.get("polls"), entry.error
        # The folder may have been moved since.
        row.files = [path.name for path in entry.paths if (folder / path.name).is_file()]
        return row

    @classmethod
    def of_json(cls, told: Mapping[str, Any]) -> "Row":
        """Give the row of a line of `results.jsonl`."""
        row = cls(str(told["key"]), str(told["prompt"]), dict(told["params"]), str(told["state"]))
        row.task_id, row.seconds, row.polls, row.error = (
            told[name] for name in ("task_id", "seconds", "polls", "error")
        )
        row.cost = None if told["cost"] is None else Decimal(str(told["cost"]))
        row.files = [str(name) for name in told["files"]]
        return row

    def take(self, outcome: "flux.Outcome") -> None:
        """Take in what the request has come to, or how far it has come before it was left."""
        self.task_id = outcome.task_id
        if isinstance(outcome, flux.Completed):
            self.state = EntryState.COMPLETED.value
            self.cost = outcome.usage.cost if outcome.usage else None
            self.files = [path.name for path in outcome.saved]
            trouble = outcome.save_error or outcome.journal_error
        else:
            self.state = state_of(outcome)
            trouble = None if isinstance(outcome.error, flux.SessionClosedError) else outcome.error
        # What a program could do about it, nobody can at the command line.
        self.error = None if trouble is None else re.sub(r"; (attach\(\)|resubmit_uncertain=True).*", "", str(trouble))
        if is_end(outcome):
            self.seconds, self.polls = outcome.elapsed, outcome.polls

    def as_json(self) -> dict[str, Any]:
        """Give it as JSON values."""
        return {
            "key": self.key,
            "prompt": self.prompt,
            "task_id": self.task_id,
            "state": self.state,
            "cost": None if self.cost is None else str(self.cost),
            "seconds": None if self.seconds is None else round(self.seconds, 3),
            "polls": self.polls,
            "files": self.files,
            "error": self.error,
            "params": dict(self.params),
        }


def is_lost(entry: JournalEntry) -> bool:
    """Tell whether nobody knows, and nobody will find out, if a request has become a task."""
    return entry.state is EntryState.UNCERTAIN or (entry.state is EntryState.INTENT and entry.holder is None)


def state_of(outcome: "flux.Failed") -> str:
    """Name the state of what has come to nothing."""
    match outcome.error:
        case flux.TaskFailedError() | flux.TaskNotFoundError():
            return EntryState.FAILED.value
        case flux.SubmissionUncertainError():
            return EntryState.UNCERTAIN.value
        case _ if outcome.task_id is not None:
            return EntryState.SUBMITTED.value
        case error if isinstance(error, _NO_FAULT):
            return WAITING
        case _:
            return EntryState.REFUSED.value


def is_end(outcome: "flux.Outcome") -> bool:
    """Tell whether a request has come to something, and wasn't merely left as it was."""
    return isinstance(outcome, flux.Completed) or not (
        isinstance(outcome.error, flux.SessionClosedError) or state_of(outcome) == WAITING
    )


@attrs.define
class Folder:
    """The folder of a batch."""

    path: Path
    rows: dict[str, Row] = attrs.field(factory=dict[str, Row], init=False)
    """By their keys: first those of the sheet, in its order."""
    _taken: dict[str, Row] = attrs.field(factory=dict[str, Row], init=False)
    """What this run has seen, by the same keys: the journal may know less of it."""

    @property
    def database(self) -> Path:
        """The journal's file."""
        return self.path / "journal.db"

    @property
    def results(self) -> Path:
        """The file with a line for each request."""
        return self.path / "results.jsonl"

    def make(self) -> None:
        """Make the folder, and remove from it what a killed process has left half-written.

        Raises:
            ConfigurationError: It can't be made.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise flux.ConfigurationError(f"can't make the folder {str(self.path)!r}: {error.strerror}") from error
        for part in [*self.path.glob(_PARTS), *(self.path / "thumbs").glob(_PARTS)]:
            with contextlib.suppress(OSError):  # somebody else may have done so
                if part.stat().st_mtime < time.time() - _ABANDONED:
                    part.unlink()

    async def entries(self) -> "list[JournalEntry]":
        """Give all that the journal knows, in the order of its making.

        Raises:
            ConfigurationError: The folder can't be looked into.
            JournalError: The journal can't be read.
        """
        try:
            if self.path.exists() and not self.path.is_dir():
                raise flux.ConfigurationError(f"{str(self.path)!r} is no folder")
            known = self.database.exists()
        except OSError as error:
            raise flux.ConfigurationError(f"can't look into {str(self.path)!r}: {error.strerror}") from error
        return [entry async for entry in flux.SqliteJournal(self.database).entries()] if known else []

    def paid_without_journal(self, lines: Iterable[Line]) -> int:
        """Count the requests of which only `results.jsonl` knows that they may have been paid for."""
        if self.database.exists():
            return 0
        keys = {line.key for line in lines}
        return sum(row.key in keys for row in self._read_results() if row.state not in _BOUGHT_NOTHING)

    def take(self, outcome: "flux.Outcome") -> Row:
        """Take in what a request has come to; gives its row."""
        assert outcome.request is not None
        row = self.rows[str(outcome.request.key)]
        row.take(outcome)
        self._taken[row.key] = row
        return row

    def gather(self, lines: Iterable[Line], entries: "Iterable[JournalEntry]") -> None:
        """Make the rows anew: of what is asked for, and of what else the journal knows.

        Without lines, what was to be asked for is what `results.jsonl` says.
        """
        # Of several entries with one key, the last one is the newest.
        known = {entry.key: Row.of_entry(entry, self.path) for entry in entries}
        before = {row.key: row for row in self._read_results()}
        asked = {line.key: Row.of_line(line) for line in lines}
        self.rows = {}
        for key in dict.fromkeys((*asked, *before, *known)):
            row = self._completed(known.get(key) or asked.get(key) or before[key])
            # What has bought nothing and isn't asked for any more is gone: somebody has mended his sheet.
            if key in asked or not asked or row.state not in _BOUGHT_NOTHING:
                self.rows[key] = row

    def _completed(self, row: Row) -> Row:
        """Add what only this run knows."""
        mine = self._taken.get(row.key)
        if mine is None:
            return row
        if row.state not in _ENDS and (
            row.state == WAITING or mine.state in _ENDS or (mine.task_id and not row.task_id)
        ):
            return mine
        row.error = row.error or mine.error
        return row

    def write_results(self, rows: Iterable[Row]) -> None:
        """Write `results.jsonl` anew; whole or not at all.

        Raises:
            OSError: It can't be written.
        """
        write_whole(self.results, "".join(f"{to_json(row.as_json())}\n" for row in rows))

    def _read_results(self) -> list[Row]:
        rows: list[Row] = []
        for told in self._told():
            try:
                rows.append(Row.of_json(told))
            except (ValueError, KeyError, TypeError, ArithmeticError):
                continue  # somebody else has written it
        return rows

    def _told(self) -> Iterator[dict[str, Any]]:
        """Give the lines of `results.jsonl`, as far as they can be read."""
        try:
            text = self.results.read_text(encoding="utf-8", errors="replace")
        except OSError:
            return
        for line in text.split("\n"):
            try:
                told = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(told, dict):
                yield told


def write_whole(target: Path, content: str | bytes) -> None:
    """Write a file that nobody ever sees half-written.

    Raises:
        OSError: It can't be written; what was there before is there still.
    """
    part = target.with_name(f".flux2max-{secrets.token_hex(8)}.part")
    try:
        part.write_bytes(content if isinstance(content, bytes) else content.encode(errors="backslashreplace"))
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)


def _shown(described: Mapping[str, Any]) -> dict[str, Any]:
    """Give what a picture's caption tells of its request."""
    return {name: described[name] for name in _SHOWN if name in described}
