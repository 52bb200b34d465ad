"""What a journal holds of a request: one entry for each time that it was to be paid for, and its outcome as JSON."""

import hashlib
import json
from collections.abc import Mapping
from datetime import datetime
from decimal import Decimal
from enum import StrEnum
from pathlib import Path
from typing import Any

import attrs

from flux2max_async._errors import (
    ContentModeratedError,
    FluxError,
    SubmissionUncertainError,
    TaskFailedError,
    TaskNotFoundError,
)
from flux2max_async._request import GenerationRequest
from flux2max_async._task import (
    NO_URL,
    Completed,
    Failed,
    GeneratedImage,
    Outcome,
    TaskSnapshot,
    TaskStatus,
    Usage,
)

_LONGEST = 4096
"""Characters of one text that is kept of what the service says freely: enough for a prompt, too few for a picture."""

_DEEPEST = 100
"""Levels of JSON that are kept of it."""


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


# ------------------------------------------------------------------ outcomes


def result_of(outcome: Outcome, *, secrets: tuple[str, ...] = ()) -> dict[str, Any]:
    """Write an outcome down as JSON values, with whatever secrets the service has echoed blotted out."""
    common: dict[str, Any] = {"elapsed": outcome.elapsed, "polls": outcome.polls}
    if isinstance(outcome, Failed):
        error = outcome.error
        told = {name: getattr(error, name, None) for name in ("code", "status", "request_id")}
        told = {name: value for name, value in told.items() if value is not None}
        found = {**common, "error": {"kind": type(error).__name__, "message": error.message, **told}}
    else:
        images = [
            {"url": image.url if len(image.url) <= _LONGEST else NO_URL, "type": image.type, "extra": dict(image.extra)}
            for image in outcome.images
        ]
        found = {**common, "images": images, "metadata": dict(outcome.metadata)}
        if outcome.usage is not None:
            cost, discount, extra = outcome.usage.cost, outcome.usage.discount, dict(outcome.usage.extra)
            found["usage"] = {"cost": _text(cost), "discount": _text(discount), "extra": extra}
    return dict(kept(found, secrets))


def outcome_of(entry: JournalEntry, request: GenerationRequest | None) -> Outcome:
    """Make an outcome again of what was written down."""
    result, task_id = entry.result, entry.task_id or ""
    elapsed, polls = float(result.get("elapsed", 0.0)), int(result.get("polls", 0))
    if "error" in result:
        error = _error_of(result["error"], task_id)
        error.task_id = task_id
        return Failed(entry.task_id, request, error, elapsed, polls, replayed=True)
    images = tuple(
        GeneratedImage(image["url"], image["type"], task_id, image["extra"], index)
        for index, image in enumerate(result["images"])
    )
    usage = None
    if told := result.get("usage"):
        usage = Usage(_decimal(told["cost"]), _decimal(told["discount"]), told["extra"])
    return Completed(task_id, request, images, usage, result["metadata"], elapsed, polls, replayed=True)


def snapshot_of(entry: JournalEntry) -> TaskSnapshot:
    """Say what is written of an end as the service would have said it."""
    outcome = outcome_of(entry, None)
    if isinstance(outcome, Completed):
        return TaskSnapshot(
            outcome.task_id, TaskStatus.COMPLETED, None, outcome.images, outcome.usage, metadata=outcome.metadata
        )
    assert isinstance(outcome.error, TaskFailedError)
    return TaskSnapshot(entry.task_id or "", TaskStatus.FAILED, error=outcome.error)


def _error_of(told: Mapping[str, Any], task_id: str) -> FluxError:
    kind, message = told.get("kind"), str(told.get("message", ""))
    if kind == TaskNotFoundError.__name__:
        return TaskNotFoundError(message, told.get("status", 404), told.get("code"), told.get("request_id"))
    if kind == SubmissionUncertainError.__name__:
        return SubmissionUncertainError(message)
    moderated = kind == ContentModeratedError.__name__
    return (ContentModeratedError if moderated else TaskFailedError)(message, task_id, told.get("code"))


def kept(value: Any, secrets: tuple[str, ...], depth: int = _DEEPEST) -> Any:
    """Copy JSON values without secrets, without texts that are long enough to be pictures, and not all too deep."""
    match value:
        case str():
            for secret in secrets:
                value = value.replace(secret, "***")
            if len(value) <= _LONGEST:
                return value
            fingerprint = hashlib.sha256(value.encode(errors="surrogatepass")).hexdigest()
            return f"sha256:{fingerprint} ({len(value)} characters)"
        case Mapping() | list() | tuple() if depth == 0:
            return "(nested too deeply)"
        case Mapping():
            return {kept(str(name), secrets): kept(entry, secrets, depth - 1) for name, entry in value.items()}
        case list() | tuple():
            return [kept(entry, secrets, depth - 1) for entry in value]
        case _:
            return value


def _decimal(text: str | None) -> Decimal | None:
    return None if text is None else Decimal(text)


def _text(number: Decimal | None) -> str | None:
    return None if number is None else str(number)


def _iso(moment: datetime | None) -> str | None:
    return None if moment is None else moment.isoformat()


def to_json(value: Any) -> str:
    """Write JSON values down in one line, half characters as the escapes that they are in JSON."""
    return _encoder.encode(value).encode(errors="backslashreplace").decode()


_encoder = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))
