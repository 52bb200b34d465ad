"""The rows of `results.jsonl`: the state of each request of a batch, from its journal entry or its outcome."""

import contextlib
import json
import re
from collections.abc import Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any

import attrs

import flux2max_async as flux
from flux2max_async._config import parse_dollars
from flux2max_async._text import MAX_LENGTH, printable
from flux2max_async.cli._requests_file import Line
from flux2max_async.cli._terminal import MAX_REASON_LENGTH, SERVICE_ERRORS, to_single_line
from flux2max_async.journal._entry import EntryState, JournalEntry

WAITING = "waiting"
"""The state of a request that was never submitted. All other states are those of journal entries."""
UNPAID_STATES = (WAITING, EntryState.REFUSED.value)
FINAL_STATES = (EntryState.COMPLETED.value, EntryState.FAILED.value)
_ROW_PARAMS = ("seed", "width", "height", "safety_tolerance", "output_format", "input_images")
"""The parameters that a row has, besides the prompt."""
_BATCH_ERRORS = (
    *(flux.SessionClosedError, flux.AuthenticationError, flux.PermissionDeniedError, flux.InsufficientBalanceError),
    *(flux.BudgetExceededError, flux.JournalError),
)
"""Errors that keep a request from being submitted although nothing is wrong with the request itself."""
_BATCH_ERROR_NAMES = {error_type.__name__ for error_type in _BATCH_ERRORS}
_SERVICE_ERROR_NAMES = {cls.__name__ for base in SERVICE_ERRORS for cls in (base, *base.__subclasses__())}
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
    locations: list[str] = attrs.field(factory=list[str])
    """Where the images are: paths, or addresses in object storage."""
    error: str | None = None
    """Why the request failed, or why not all of its images are saved."""
    max_error_length: int = MAX_LENGTH
    """Characters of the error that are shown: fewer of the service's words than of our own."""

    @classmethod
    def from_line(cls, line: Line) -> "Row":
        """Return the row of a request that was not submitted."""
        return cls(line.key, line.request.prompt, _select_params(line.content.description))

    @classmethod
    def from_entry(cls, entry: JournalEntry, folder: Path) -> "Row":
        """Return the row of a journal entry."""
        row = cls(entry.key, entry.prompt, _select_params(entry.request), entry.state.value, entry.task_id, entry.cost)
        if is_uncertain(entry):
            row.state = EntryState.UNCERTAIN.value
            row.set_error(_UNCERTAIN_MESSAGE)
            return row
        error_name = entry.result.get("error", {}).get("kind")
        if entry.state is EntryState.REFUSED and (error_name is None or error_name in _BATCH_ERROR_NAMES):
            row.state = WAITING
            return row
        row.seconds, row.polls = entry.result.get("elapsed"), entry.result.get("polls")
        row.set_error(entry.error, from_service=error_name in _SERVICE_ERROR_NAMES)
        # By name, since the folder may have been moved.
        row.files = [path.name for path in entry.paths if (folder / path.name).is_file()]
        row.locations = [
            *(str(folder / name) for name in row.files),
            *(file.location for file in entry.files if file.path is None),
        ]
        return row

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Row":
        """Return the row of a line of `results.jsonl`; raise one of `_UNREADABLE` if another program has written it."""
        row = cls(
            key=str(data["key"]),
            prompt=str(data["prompt"]),
            params=dict(data["params"]),
            state=str(data["state"]),
            task_id=None if data["task_id"] is None else str(data["task_id"]),
            cost=None if data["cost"] is None else parse_dollars("cost", data["cost"]),
            seconds=None if data["seconds"] is None else float(data["seconds"]),
            polls=None if data["polls"] is None else int(data["polls"]),
            files=[str(name) for name in data["files"]],
            locations=[str(location) for location in data.get("locations", [])],
        )
        row.set_error(None if data["error"] is None else str(data["error"]))
        return row

    def update(self, outcome: "flux.Outcome") -> None:
        """Update the row with an outcome, which may have left the request unfinished."""
        self.task_id = outcome.task_id
        error: flux.FluxError | None
        if isinstance(outcome, flux.Completed):
            self.state = EntryState.COMPLETED.value
            self.cost = outcome.usage.cost if outcome.usage else None
            self.files = [path.name for path in outcome.saved]
            self.locations = list(outcome.locations)
            error = outcome.save_error or outcome.journal_error
        else:
            self.state = state_after_failure(outcome)
            error = None if isinstance(outcome.error, flux.SessionClosedError) else outcome.error
        # Advice about the Python API doesn't help a user of the command line.
        if error is None:
            self.error = None
        else:
            text = re.sub(r"; (attach\(\)|resubmit_uncertain=True).*", "", str(error))
            self.set_error(text, from_service=isinstance(error, SERVICE_ERRORS))
        if is_final(outcome):
            self.seconds, self.polls = outcome.elapsed, outcome.polls

    def set_error(self, text: str | None, *, from_service: bool = False) -> None:
        """Set the error's text, which may be one of the service's."""
        self.max_error_length = MAX_LENGTH if from_service else MAX_REASON_LENGTH
        self.error = text and text[: self.max_error_length + 1]  # the last character shows that there is more

    @property
    def reason(self) -> str:
        """The error on one line, or an empty text."""
        return printable(to_single_line(self.error or ""), self.max_error_length)

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
            "locations": self.locations,
            "error": None if self.error is None else printable(self.error, self.max_error_length),
            "params": dict(self.params),
        }


def parse_rows(text: str) -> list[Row]:
    """Return the rows of `results.jsonl`, without lines that another program has written."""
    rows: list[Row] = []
    for line in text.split("\n"):
        with contextlib.suppress(*_UNREADABLE):
            rows.append(Row.from_dict(json.loads(line)))
    return rows


def is_lost(row: Row, entry: JournalEntry | None) -> bool:
    """Check whether a request is paid for according to its row of `results.jsonl`, and the journal doesn't know."""
    match None if entry is None else entry.state:
        case None:
            return row.state not in UNPAID_STATES
        # Rows can be older than entries: what failed and was refused when it was tried again is not paid for.
        case EntryState.REFUSED:
            return row.task_id is not None and row.state not in (*UNPAID_STATES, EntryState.FAILED)
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


def _select_params(params: Mapping[str, Any]) -> dict[str, Any]:
    return {name: params[name] for name in _ROW_PARAMS if name in params}
