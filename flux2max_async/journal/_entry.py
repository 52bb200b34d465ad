"""The entries of a journal, as values."""

from collections.abc import Mapping
from datetime import datetime
from decimal import Decimal
from enum import StrEnum
from pathlib import Path
from typing import Any, Self

import attrs

from flux2max_async._models.serialization import VERSION


class EntryState(StrEnum):
    """How far a request has come."""

    INTENT = "intent"
    """It is being submitted. If its process has died, it isn't known whether a task exists."""
    SUBMITTED = "submitted"
    """A task exists, and its end is not known yet."""
    COMPLETED = "completed"
    FAILED = "failed"
    UNCERTAIN = "uncertain"
    """It was sent and the response was lost: a task may exist and cost money."""
    REFUSED = "refused"
    """It certainly created no task, and is submitted when it is requested again."""


class Holder(StrEnum):
    """Which session is responsible for an entry."""

    US = "us"
    """The session that reads the entry."""
    OTHER = "other"
    """Another session, which is alive."""


@attrs.frozen
class SavedFile:
    """An image that was saved completely."""

    path: Path | None
    """None if it is in object storage."""
    size: int
    """Bytes."""
    location: str = attrs.Factory(lambda self: str(self.path), takes_self=True)
    """The path, or an address like "s3://bucket/prefix/fox.jpeg"."""

    @classmethod
    def at(cls, location: str, size: int) -> Self:
        """Return the file at a location."""
        return cls(None if "://" in location else Path(location), size, location)


@attrs.frozen(kw_only=True)
class JournalEntry:
    """A request in the journal. If it is paid for again, it gets another entry with the next attempt number."""

    key: str
    """The caller's key, or one that is derived from the request's fingerprint."""
    attempt: int = 1
    fingerprint: str
    """The fingerprint of the request's content: requests with the same key must have the same one."""
    request: Mapping[str, Any] = attrs.field(repr=False)
    """The parameters as JSON values: images as names or fingerprints, and no secrets."""
    state: EntryState = EntryState.INTENT
    holder: Holder | None = None
    """None if no session that is alive holds the entry."""
    task_id: str | None = None
    cost: Decimal | None = None
    """US dollars; None until the service has reported the cost."""
    committed: Decimal = Decimal(0)
    """US dollars that count against a budget: the estimated cost, replaced by the real one when it is known."""
    created_at: datetime | None = None
    """When the submit was about to be sent. This and the other times are timezone-aware, by this machine's clock."""
    submitted_at: datetime | None = None
    ended_at: datetime | None = None
    result: Mapping[str, Any] = attrs.field(factory=dict[str, Any], repr=False)
    """The outcome as JSON values; empty until there is one."""
    files: tuple[SavedFile, ...] = ()
    """The saved images, in their order."""
    owner: str | None = attrs.field(default=None, repr=False)
    """The journal's own id of the session that holds the entry, or held it when it died."""
    webhook_token: str | None = attrs.field(default=None, repr=False)
    """The token in the submit's webhook URL, by which a delivery finds the entry if the submit's answer was lost."""

    @property
    def prompt(self) -> str:
        """The request's prompt."""
        return str(self.request.get("prompt", ""))

    @property
    def paths(self) -> tuple[Path, ...]:
        """The paths of the saved images that are local files."""
        return tuple(file.path for file in self.files if file.path is not None)

    @property
    def locations(self) -> tuple[str, ...]:
        """Where each saved image is, as text."""
        return tuple(file.location for file in self.files)

    @property
    def error(self) -> str | None:
        """The message of the error that the request ended with; None if there was none."""
        error = self.result.get("error")
        return str(error["message"]) if error else None

    def to_dict(self) -> dict[str, Any]:
        """Return the entry as JSON values, with a "version"."""
        return {
            "version": VERSION,
            "key": self.key,
            "attempt": self.attempt,
            "state": self.state.value,
            "task_id": self.task_id,
            "cost": None if self.cost is None else str(self.cost),
            "committed": str(self.committed),
            "created_at": _iso_format(self.created_at),
            "submitted_at": _iso_format(self.submitted_at),
            "ended_at": _iso_format(self.ended_at),
            "paths": [str(path) for path in self.paths],
            "locations": list(self.locations),
            "request": dict(self.request),
            "result": dict(self.result),
        }


def _iso_format(time: datetime | None) -> str | None:
    return None if time is None else time.isoformat()
