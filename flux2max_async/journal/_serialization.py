"""Outcomes as JSON values in journal entries, and back."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import attrs

from flux2max_async._exceptions import (
    JournalError,
    TaskFailedError,
)
from flux2max_async._models.outcome_dict import read_usage
from flux2max_async._models.request import GenerationRequest
from flux2max_async._models.results import (
    NO_URL,
    Completed,
    Failed,
    GeneratedImage,
    Outcome,
    TaskSnapshot,
    TaskStatus,
    is_inline,
)
from flux2max_async._models.serialization import (
    decimal_to_json,
    error_from_dict,
    error_to_dict,
    image_from_dict,
    task_error_from_dict,
)
from flux2max_async.journal._entry import EntryState, JournalEntry

_MAX_TEXT_LENGTH = 4096
"""Characters of a text of the service: enough for a prompt, too few for an image."""
_MAX_SIZE = 65_536
"""Characters, about, of further values of the service: each completed task has some, and each is written and read."""
_MAX_DEPTH = 100
"""Levels of nested JSON of the service."""


def outcome_to_json(outcome: Outcome, *, secrets: Sequence[str] = ()) -> dict[str, Any]:
    """Return an outcome as JSON values, in which secrets that the service has echoed are masked."""
    data: dict[str, Any] = {"elapsed": outcome.elapsed, "polls": outcome.polls}
    if isinstance(outcome, Failed):
        data["error"] = error_to_dict(outcome.error)
    else:
        data["images"] = [_image_to_json(image) for image in outcome.images]
        data["metadata"] = _limit(outcome.metadata)
        if (usage := outcome.usage) is not None:
            cost, discount = decimal_to_json(usage.cost), decimal_to_json(usage.discount)
            data["usage"] = {"cost": cost, "discount": discount, "extra": _limit(usage.extra)}
        if outcome.partial_error is not None:
            data["partial_error"] = error_to_dict(outcome.partial_error)
    return dict(sanitize(data, secrets))


def outcome_from_entry(entry: JournalEntry, request: GenerationRequest | None) -> Outcome:
    """Return the outcome that an ended entry holds, marked as replayed.

    Raises:
        JournalError: The entry's result is damaged.
    """
    try:
        return _outcome_from_entry(entry, request)
    except (KeyError, TypeError, ValueError, ArithmeticError, AttributeError) as error:
        message = f"the result of {entry.key!r} in the journal is damaged: {error!r}"
        raise JournalError(message, key=entry.key) from error


def _outcome_from_entry(entry: JournalEntry, request: GenerationRequest | None) -> Outcome:
    result, task_id = entry.result, entry.task_id or ""
    elapsed, polls = float(result.get("elapsed", 0.0)), int(result.get("polls", 0))
    if "error" in result:
        error = error_from_dict(result["error"], TaskFailedError)
        error.task_id = task_id
        return Failed(task_id=entry.task_id, request=request, error=error, elapsed=elapsed, polls=polls, replayed=True)
    images = tuple(
        attrs.evolve(image_from_dict({**image, "task_id": task_id, "index": index}), received_at=entry.ended_at)
        for index, image in enumerate(result["images"])
    )
    return Completed(
        task_id=task_id,
        request=request,
        images=images,
        usage=read_usage(result["usage"]) if result.get("usage") else None,
        metadata=result.get("metadata", {}),
        partial_error=task_error_from_dict(result["partial_error"], task_id) if "partial_error" in result else None,
        elapsed=elapsed,
        polls=polls,
        replayed=True,
    )


def snapshot_from_entry(entry: JournalEntry) -> TaskSnapshot | None:
    """Return an entry's end as the service would have reported it.

    Returns:
        None if the entry holds no end that a snapshot can express: the task hasn't ended, or the service doesn't know
        it any more. The caller has to poll the task itself.
    """
    if entry.state not in {EntryState.COMPLETED, EntryState.FAILED}:
        return None
    match outcome_from_entry(entry, None):
        case Completed() as completed:
            return TaskSnapshot(
                task_id=completed.task_id,
                status=TaskStatus.COMPLETED,
                progress=None,
                images=completed.images,
                usage=completed.usage,
                metadata=completed.metadata,
                partial_error=completed.partial_error,
            )
        case Failed(error=TaskFailedError() as error):
            return TaskSnapshot(task_id=entry.task_id or "", status=TaskStatus.FAILED, error=error)
        case _:
            return None


def _limit(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return values of the service as they are, or, if they are too large for the journal, only that they are."""
    if not values:
        return {}
    size, rest = 0, list[Any]([values])
    while rest and size <= _MAX_SIZE:
        size += 1
        match rest.pop():
            case str(text):
                size += min(len(text), _MAX_TEXT_LENGTH)
            case int(number):
                size += number.bit_length() // 3
            case Mapping() as mapping:
                rest += [*mapping, *mapping.values()]
            case list() | tuple() as items:
                rest += items
            case _:
                pass
    return dict(values) if size <= _MAX_SIZE else {"left_out": "too large for the journal"}


def sanitize(value: Any, secrets: Sequence[str], depth: int = _MAX_DEPTH) -> Any:
    """Copy JSON values: mask secrets, replace texts that may be images by their hashes, and cut what nests too deep."""
    match value:
        case str():
            return _sanitize_text(value, secrets)
        case None | int() | float():  # before the abstract classes, whose checks are slow
            return value
        case dict() | list() | tuple() | Mapping() if depth == 0:
            return "(nested too deeply)"
        case dict() | Mapping():
            return {
                _sanitize_text(str(name), secrets): sanitize(item, secrets, depth - 1) for name, item in value.items()
            }
        case list() | tuple():
            return [sanitize(item, secrets, depth - 1) for item in value]
        case _:
            return value


def _sanitize_text(text: str, secrets: Sequence[str]) -> str:
    for secret in secrets:
        text = text.replace(secret, "***")
    if len(text) <= _MAX_TEXT_LENGTH:
        return text
    digest = hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()
    return f"sha256:{digest} ({len(text)} characters)"


def to_json(value: Any) -> str:
    """Return JSON values as one line of JSON, in which lone surrogates are escaped."""
    return _encoder.encode(value).encode(errors="backslashreplace").decode()


_encoder = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))


def _image_to_json(image: GeneratedImage) -> dict[str, Any]:
    data: dict[str, Any] = {"url": image.url, "type": image.type, "extra": _limit(image.extra)}
    if is_inline(image.url):
        data |= {"url": NO_URL, "inline_characters": len(image.url)}
    elif len(image.url) > _MAX_TEXT_LENGTH:
        data["url"] = NO_URL
    return data
