"""What is asked for: requests and their reference pictures, checked where they are made.

Parameters and ranges are those of the vendor's page for FLUX.2 [max].
"""

import copy
import json
from collections.abc import Iterator, Mapping
from enum import StrEnum
from typing import Any, Literal

import attrs

from flux2max_async._exceptions import InvalidRequestError
from flux2max_async._models.images import (
    MAX_INPUT_IMAGES,
    InputImage,
    input_images_from,
    is_web_url,
    shorten,
)

_MIN_SIDE = 64
_MAX_TOLERANCE = 5
_MAX_URL = 2083
_DEEPEST = 100
"""Levels of JSON in `extra`: more could neither be copied nor be written down."""

IMAGE_PARAMETERS = ("input_image", *(f"input_image_{n}" for n in range(2, MAX_INPUT_IMAGES + 1)))
"""The service's names for the reference pictures, in order."""


class OutputFormat(StrEnum):
    """How the picture is encoded."""

    JPEG = "jpeg"
    PNG = "png"


@attrs.frozen(eq=False)
class _FrozenMapping(Mapping[str, Any]):
    """A mapping that can't be changed, compares like a dict, and can be pickled (a MappingProxyType can't)."""

    _values: dict[str, Any]

    def __getitem__(self, key: str) -> Any:
        return copy.deepcopy(self._values[key])

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        return repr(self._values)


_NOTHING = _FrozenMapping({})


def _output_format(value: OutputFormat | Literal["jpeg", "png"] | None) -> OutputFormat | None:
    try:
        return None if value is None else OutputFormat(value)
    except ValueError:
        raise InvalidRequestError(
            f"output_format must be 'jpeg' or 'png', not {shorten(value)}", "output_format"
        ) from None


def _extra(value: Mapping[str, Any]) -> Mapping[str, Any]:
    if isinstance(value, _FrozenMapping):
        return value
    if not isinstance(value, Mapping):
        raise InvalidRequestError(f"extra must be a mapping of parameters, not {type(value).__name__}", "extra")
    for name in value:
        if not isinstance(name, str):
            raise InvalidRequestError(f"extra's names must be text, not {name!r}", "extra")
        if name in _KNOWN:
            raise InvalidRequestError(f"extra can't hold {name!r}: it is a parameter of its own", "extra")
    try:
        # Through JSON and back: what can't be sent is found here, and the caller's later changes don't reach us.
        values = json.loads(json.dumps(dict(value), allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidRequestError(f"extra must hold JSON values only: {error}", "extra") from error
    if _is_deep(values, _DEEPEST):
        raise InvalidRequestError(f"extra must not be nested more than {_DEEPEST} levels deep", "extra")
    return _FrozenMapping(values)


def _is_deep(value: Any, levels: int) -> bool:
    match value:
        case dict() | list() if levels == 0:
            return True
        case dict():
            return any(_is_deep(part, levels - 1) for part in value.values())
        case list():
            return any(_is_deep(part, levels - 1) for part in value)
        case _:
            return False


def _is_prompt(_: Any, __: Any, value: Any) -> None:
    if not isinstance(value, str):
        raise InvalidRequestError(f"prompt must be text, not {type(value).__name__}", "prompt")
    if not value.strip():
        raise InvalidRequestError("prompt must not be blank", "prompt")


def _is_integer(_: Any, field: "attrs.Attribute[Any]", value: object) -> None:
    if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
        raise InvalidRequestError(f"{field.name} must be an integer or None, not {shorten(value)}", field.name)
    if value is not None and abs(value) >= 2**64:
        raise InvalidRequestError(f"{field.name} must be an integer of at most 64 bits", field.name)


def _is_side(instance: Any, field: "attrs.Attribute[Any]", value: int | None) -> None:
    _is_integer(instance, field, value)
    if value and value < _MIN_SIDE:
        raise InvalidRequestError(
            f"{field.name} must be at least {_MIN_SIDE} pixels, or 0 or None to let the model choose, not {value}",
            field.name,
        )


def _is_tolerance(instance: Any, field: "attrs.Attribute[Any]", value: int | None) -> None:
    _is_integer(instance, field, value)
    if value is not None and not 0 <= value <= _MAX_TOLERANCE:
        raise InvalidRequestError(
            f"{field.name} must be from 0 (strictest) to {_MAX_TOLERANCE}, not {value}", field.name
        )


def _is_webhook(_: Any, field: "attrs.Attribute[Any]", value: object) -> None:
    if value is None:
        return
    if not isinstance(value, str) or not is_web_url(value):
        raise InvalidRequestError(f"{field.name} must be an http(s) URL, not {shorten(value)}", field.name)
    if len(value) > _MAX_URL:
        raise InvalidRequestError(f"{field.name} must have at most {_MAX_URL} characters, not {len(value)}", field.name)


def _is_text(_: Any, field: "attrs.Attribute[Any]", value: object) -> None:
    # The value may be a secret: it is never shown.
    if value is not None and not isinstance(value, str):
        raise InvalidRequestError(f"{field.name} must be text or None, not {type(value).__name__}", field.name)
    if value == "":
        raise InvalidRequestError(f"{field.name} must not be empty; None leaves it out", field.name)


@attrs.frozen
class GenerationRequest:
    """One picture to generate; immutable, hashable, and equal when all fields are equal.

    Args:
        prompt: What to draw; not blank.
        input_images: At most 8 reference pictures, in order; see `InputImage` for what each can be.
        seed: The same seed gives the same picture again.
        width: Pixels, at least 64; None or 0 lets the model choose.
        height: Pixels, at least 64; None or 0 lets the model choose.
        safety_tolerance: 0 (strictest) to 5; None leaves it to the service (2).
        output_format: "jpeg" or "png"; None leaves it to the service (jpeg).
        webhook_url: Where the service posts the finished task; http(s), at most 2083 characters.
        webhook_secret: What the service signs that post with; never shown.
        extra: Parameters of the service that this library doesn't know yet, as JSON values. None isn't sent.
        key: Your own name for this request; never sent.

    Raises:
        InvalidRequestError: A parameter is wrong; `field` names it.
    """

    prompt: str = attrs.field(validator=_is_prompt)
    input_images: tuple[InputImage, ...] = attrs.field(default=(), converter=input_images_from, kw_only=True)
    seed: int | None = attrs.field(default=None, validator=_is_integer, kw_only=True)
    width: int | None = attrs.field(default=None, validator=_is_side, kw_only=True)
    height: int | None = attrs.field(default=None, validator=_is_side, kw_only=True)
    safety_tolerance: int | None = attrs.field(default=None, validator=_is_tolerance, kw_only=True)
    output_format: OutputFormat | None = attrs.field(default=None, converter=_output_format, kw_only=True)
    webhook_url: str | None = attrs.field(default=None, validator=_is_webhook, kw_only=True)
    webhook_secret: str | None = attrs.field(default=None, validator=_is_text, repr=False, kw_only=True)
    # Hashing skips it because its values may be lists; equality doesn't.
    extra: Mapping[str, Any] = attrs.field(default=_NOTHING, converter=_extra, hash=False, kw_only=True)
    key: str | None = attrs.field(default=None, validator=_is_text, kw_only=True)


def as_request(request: str | GenerationRequest, **params: Any) -> GenerationRequest:
    """Make a request of a prompt and its parameters, or a changed copy of a request.

    Raises:
        InvalidRequestError: It is neither, or a parameter is wrong.
    """
    given: object = request
    match given:
        case GenerationRequest():
            return attrs.evolve(given, **params) if params else given
        case str():
            return GenerationRequest(given, **params)
        case _:
            raise InvalidRequestError(f"give a prompt or a GenerationRequest, not {type(given).__name__}", "request")


_KNOWN = {"model", *IMAGE_PARAMETERS, *(field.name for field in attrs.fields(GenerationRequest))} - {"extra", "key"}
