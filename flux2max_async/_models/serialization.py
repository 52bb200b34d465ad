"""What requests, outcomes, snapshots and journals have in common when they are written as JSON values."""

import functools
import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from decimal import Decimal
from enum import Enum
from typing import Any

import attrs

from flux2max_async import _exceptions
from flux2max_async._exceptions import FluxError, InvalidRequestError, TaskFailedError
from flux2max_async._models.generated import GeneratedImage

VERSION = 1
"""Of the format of every dict."""

_MAX_DEPTH = 100
"""Levels of nested values."""
_SECRET_NAMES = ("secret", "password", "api_key", "apikey", "authorization")
"""Parts of the names of values that may be secrets which the service echoes."""


def check_version(data: object, kind: str) -> None:
    """Check that a dict has a format that this release reads.

    Args:
        data: What should be the dict.
        kind: What it stands for.

    Raises:
        InvalidRequestError: It is none, or a later release has written it.
    """
    if not isinstance(data, Mapping):
        raise InvalidRequestError(f"the {kind} must be a mapping, not {type(data).__name__}", field=kind)
    version = data.get("version", VERSION)
    if isinstance(version, bool) or not isinstance(version, int) or version < 1:
        raise InvalidRequestError(f"the version must be a number from 1, not {version!r:.80}", field="version")
    if version > VERSION:
        raise InvalidRequestError(
            f"the {kind} has version {version}, of a later release of flux2max_async; this one reads up to {VERSION}",
            field="version",
        )


def to_json(value: Any, secrets: Sequence[str] = (), depth: int = _MAX_DEPTH) -> Any:
    """Return a value, whatever it is, as JSON values, in which secrets are masked."""
    match value:
        case None | bool() | int():
            return value
        case float():
            return value if math.isfinite(value) else None
        case Enum():
            return value.value
        case datetime():
            return value.isoformat()
        case Mapping() | list() | tuple():
            return _container_to_json(value, secrets, depth)
        case FluxError():
            return error_to_dict(value, secrets)
        case _ if attrs.has(type(value)):
            return fields_to_json(value, secrets)
        case _:  # a text, a path, a Decimal
            return mask(str(value), secrets)


def _container_to_json(value: Any, secrets: Sequence[str], depth: int) -> Any:
    if depth == 0:
        return "(nested too deeply)"
    if not isinstance(value, Mapping):
        return [to_json(item, secrets, depth - 1) for item in value]
    data: dict[str, Any] = {}
    for key, item in value.items():
        name = mask(str(key), secrets)
        is_secret = isinstance(item, str) and any(part in name.lower() for part in _SECRET_NAMES)
        data[name] = "***" if is_secret else to_json(item, secrets, depth - 1)
    return data


def fields_to_json(value: Any, secrets: Sequence[str] = ()) -> dict[str, Any]:
    """Return the fields of an attrs value as JSON values."""
    return {field.name: to_json(getattr(value, field.name), secrets) for field in attrs.fields(type(value))}


def mask(text: str, secrets: Sequence[str]) -> str:
    """Return a text with asterisks in place of secrets."""
    for secret in secrets:
        text = text.replace(secret, "***")
    return text


# ------------------------------------------------------------------ errors


@functools.cache
def _error_classes() -> dict[str, type[FluxError]]:
    classes = [value for value in vars(_exceptions).values() if isinstance(value, type)]
    return {cls.__name__: cls for cls in classes if issubclass(cls, FluxError)}


def error_to_dict(error: FluxError, secrets: Sequence[str] = ()) -> dict[str, Any]:
    """Return an error as JSON values: the name of its class, its message, and the fields that say something."""
    classes = _error_classes()
    kind = next(cls for cls in type(error).__mro__ if classes.get(cls.__name__) is cls)
    data: dict[str, Any] = {"kind": kind.__name__, "message": mask(error.message, secrets)}
    for field in attrs.fields(kind):
        value = getattr(error, field.name)
        if (field.init or field.name == "task_id") and field.name != "message" and value != field.default:
            data[field.name] = to_json(value, secrets)
    return data


def error_from_dict(data: Mapping[str, Any], default: type[FluxError] = FluxError) -> FluxError:
    """Return the error that `error_to_dict()` has written.

    Args:
        data: The error as JSON values; names that are unknown are ignored.
        default: The class if the one that is named is unknown, or its fields are missing.
    """
    error_class = _error_classes().get(str(data["kind"]), default) if "kind" in data else default
    message = str(data.get("message", ""))
    try:
        error = error_class(message, **_init_fields(error_class, data))
    except TypeError:
        error = default(message, **_init_fields(default, data))
    if isinstance(task_id := data.get("task_id"), str):
        error.task_id = task_id
    return error


def _init_fields(error_class: type[FluxError], data: Mapping[str, Any]) -> dict[str, Any]:
    names = [field.name for field in attrs.fields(error_class) if field.init and field.name != "message"]
    return {name: data[name] for name in names if name in data}


def task_error_from_dict(data: Mapping[str, Any], task_id: str | None = None) -> TaskFailedError:
    """Return why images of a task are missing.

    Args:
        data: The error as JSON values.
        task_id: The id of the task, unless the data has it.
    """
    error = error_from_dict(data, TaskFailedError)
    if not isinstance(error, TaskFailedError):
        error = TaskFailedError(error.message)
    error.task_id = task_id or error.task_id
    return error


# ------------------------------------------------------------------ what outcomes hold


def decimal_to_json(number: Decimal | None) -> str | None:
    """Return an amount of money as text, so that it stays exact."""
    return None if number is None else str(number)


def image_from_dict(data: Mapping[str, Any]) -> GeneratedImage:
    """Return a generated image; names that are unknown are ignored.

    Raises:
        KeyError, TypeError, ValueError: It is none.
    """
    received_at = data.get("received_at")
    url, task_id, index = data["url"], data["task_id"], data.get("index", 0)
    is_index = isinstance(index, int) and not isinstance(index, bool) and index >= 0
    if not (isinstance(url, str) and isinstance(task_id, str) and task_id and is_index):
        raise TypeError("an image has a URL, the id of its task and an index")
    return GeneratedImage(
        url=url,
        type=str(data["type"]),
        task_id=task_id,
        extra=dict(data["extra"]),
        index=index,
        received_at=None if received_at is None else datetime_from_json(received_at),
    )


def datetime_from_json(text: str) -> datetime:
    """Return a time, in UTC unless it has an offset."""
    time = datetime.fromisoformat(text)
    return time.replace(tzinfo=time.tzinfo or UTC)
