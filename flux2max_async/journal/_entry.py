"""What a journal holds of a request: one entry for each time that it was to be paid for, and its outcome as JSON."""

from collections.abc import Mapping
from datetime import datetime
from decimal import Decimal
from enum import StrEnum
from pathlib import Path
from typing import Any

import attrs


class EntryState(StrEnum):
    """How far a request has come."""

    INTENT = "intent"
    """It is being submitted. Found after a crash, it means that nobody knows whether there is a task."""
    SUBMITTED = "submitted"
    """It is a task, whose end is not known yet."""
    COMPLETED = "completed"
    FAILED = "failed"
    UNCERTAIN = "uncertain"
    """Its submit went out and the answer was lost: a task may exist and cost money."""
    REFUSED = "refused"
    """It bought nothing, and will be submitted when it is asked for again."""


class Holder(StrEnum):
    """Who follows the request of an entry."""

    US = "us"
    OTHER = "other"
    """A session elsewhere that is alive."""


@attrs.frozen
class SavedFile:
    """A picture on disk, as it was when it was whole."""

    path: Path
    size: int
    """Bytes."""


@attrs.frozen(kw_only=True)
class JournalEntry:
    """What a journal knows of a request. A request that is paid for again gets another entry, with its own attempt."""

    key: str
    """The caller's, or one derived from what is asked for."""
    attempt: int = 1
    content: str
    """A fingerprint of what is asked for: the same key with another one is a mistake."""
    request: Mapping[str, Any] = attrs.field(repr=False)
    """The parameters, as JSON values: pictures by name or fingerprint, and without secrets."""
    state: EntryState = EntryState.INTENT
    holder: Holder | None = None
    task_id: str | None = None
    cost: Decimal | None = None
    """US dollars, once the service has named them."""
    outlay: Decimal = Decimal(0)
    """US dollars that count against a budget: the probable cost, and in the end the real one."""
    created_at: datetime | None = None
    """When it was about to be submitted; timezone-aware, by this machine's clock, like all moments here."""
    submitted_at: datetime | None = None
    ended_at: datetime | None = None
    result: Mapping[str, Any] = attrs.field(factory=dict[str, Any], repr=False)
    """The outcome as JSON values; `outcome_of()` makes it one again."""
    files: tuple[SavedFile, ...] = ()
    """The pictures that were saved, in their order."""
    owner: str | None = attrs.field(default=None, repr=False)
    """The journal's own mark of who holds it."""

    @property
    def prompt(self) -> str:
        """What was to be drawn."""
        return str(self.request.get("prompt", ""))

    @property
    def paths(self) -> tuple[Path, ...]:
        """The paths of the pictures that were saved."""
        return tuple(file.path for file in self.files)

    @property
    def error(self) -> str | None:
        """Why it came to nothing, if it did."""
        error = self.result.get("error")
        return str(error["message"]) if error else None

    def as_json(self) -> dict[str, Any]:
        """Give all of it as JSON values."""
        return {
            "key": self.key,
            "attempt": self.attempt,
            "state": self.state.value,
            "task_id": self.task_id,
            "cost": None if self.cost is None else str(self.cost),
            "outlay": str(self.outlay),
            "created_at": _iso(self.created_at),
            "submitted_at": _iso(self.submitted_at),
            "ended_at": _iso(self.ended_at),
            "paths": [str(path) for path in self.paths],
            "request": dict(self.request),
            "result": dict(self.result),
        }


def _iso(moment: datetime | None) -> str | None:
    return None if moment is None else moment.isoformat()
