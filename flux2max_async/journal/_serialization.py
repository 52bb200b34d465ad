"""Outcomes and requests as JSON values, and back."""

import hashlib
import json
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

from flux2max_async._exceptions import (
    ContentModeratedError,
    FluxError,
    SubmissionUncertainError,
    TaskFailedError,
    TaskNotFoundError,
)
from flux2max_async._models.request import GenerationRequest
from flux2max_async._models.results import (
    NO_URL,
    Completed,
    Failed,
    GeneratedImage,
    Outcome,
    TaskSnapshot,
    TaskStatus,
    Usage,
)
from flux2max_async.journal._entry import JournalEntry

_LONGEST = 4096
"""Characters of one text that is kept of what the service says freely: enough for a prompt, too few for a picture."""

_DEEPEST = 100
"""Levels of JSON that are kept of it."""


def outcome_to_json(outcome: Outcome, *, secrets: tuple[str, ...] = ()) -> dict[str, Any]:
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
    return dict(sanitize(found, secrets))


def outcome_from_entry(entry: JournalEntry, request: GenerationRequest | None) -> Outcome:
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


def snapshot_from_entry(entry: JournalEntry) -> TaskSnapshot:
    """Say what is written of an end as the service would have said it."""
    outcome = outcome_from_entry(entry, None)
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


def sanitize(value: Any, secrets: tuple[str, ...], depth: int = _DEEPEST) -> Any:
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
            return {sanitize(str(name), secrets): sanitize(entry, secrets, depth - 1) for name, entry in value.items()}
        case list() | tuple():
            return [sanitize(entry, secrets, depth - 1) for entry in value]
        case _:
            return value


def _decimal(text: str | None) -> Decimal | None:
    return None if text is None else Decimal(text)


def _text(number: Decimal | None) -> str | None:
    return None if number is None else str(number)


def to_json(value: Any) -> str:
    """Write JSON values down in one line, half characters as the escapes that they are in JSON."""
    return _encoder.encode(value).encode(errors="backslashreplace").decode()


_encoder = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))
