"""Outcomes that were written as JSON values."""

from collections.abc import Callable, Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any

import attrs

from flux2max_async._exceptions import InvalidRequestError
from flux2max_async._models.request import GenerationParams, GenerationRequest
from flux2max_async._models.results import Completed, Failed, Outcome, Usage
from flux2max_async._models.serialization import check_version, error_from_dict, image_from_dict, task_error_from_dict


def outcome_from_dict(data: Mapping[str, Any]) -> Outcome:
    """Return the outcome that `Completed.to_dict()` or `Failed.to_dict()` has written.

    An error has its class, message and fields, or is a FluxError if its class is unknown; its cause is not kept. Names
    that are unknown are ignored. Read only what comes from a place of your own: the request of the outcome may name
    local files.

    Raises:
        InvalidRequestError: It is not an outcome, or a later release of this library has written it.
    """
    check_version(data, "outcome")
    outcome_class = Completed if data.get("ok", "error" not in data) else Failed
    try:
        return _from_dict(outcome_class, data)
    except (KeyError, TypeError, ValueError, ArithmeticError, AttributeError) as error:
        raise InvalidRequestError(f"this is not an outcome: {error!r}", field="outcome") from error


def _from_dict(outcome_class: type[Completed] | type[Failed], data: Mapping[str, Any]) -> Outcome:
    names = attrs.fields_dict(outcome_class)
    values = {name: _READERS[name](data[name]) for name in names if data.get(name) is not None}
    return outcome_class(**values)


def _read_text(value: object) -> str:
    if not isinstance(value, str) or not value:
        raise TypeError(f"{value!r:.80} is not a text")
    return value


def _read_number(value: object) -> float:
    if not isinstance(value, (int, float)):
        raise TypeError(f"{value!r:.80} is not a number")
    return value


def _read_request(data: Mapping[str, Any]) -> GenerationRequest:
    names = ("version", "prompt", *GenerationParams.__annotations__)
    known = {name: value for name, value in data.items() if name in names}
    return GenerationRequest.from_dict(known, allow_files=True)


def _read_images(values: list[Mapping[str, Any]]) -> Any:
    if not values:
        raise ValueError("a completed task has at least one image")
    return tuple(map(image_from_dict, values))


def read_usage(data: Mapping[str, Any]) -> Usage:
    """Return the cost of a task.

    Raises:
        TypeError, ValueError, ArithmeticError: It is none.
    """
    cost, discount = (None if data.get(name) is None else Decimal(data[name]) for name in ("cost", "discount"))
    return Usage(cost=cost, discount=discount, extra=dict(data.get("extra") or {}))


_READERS: dict[str, Callable[[Any], Any]] = {
    "task_id": _read_text,
    "request": _read_request,
    "images": _read_images,
    "usage": read_usage,
    "metadata": dict,
    "partial_error": task_error_from_dict,
    "error": error_from_dict,
    "elapsed": _read_number,
    "polls": int,
    "replayed": bool,
    "saved": lambda paths: tuple(map(Path, paths)),
    "locations": lambda locations: tuple(map(_read_text, locations)),
    "save_error": error_from_dict,
    "journal_error": error_from_dict,
}
"""By the name of a field: what returns its value."""
