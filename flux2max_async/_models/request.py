"""The request for one image, validated when it is created.

Parameters and ranges are those of the vendor's documentation of FLUX.2 [max].
"""

import copy
import json
import operator
from collections.abc import Iterator, Mapping, Sequence
from enum import StrEnum
from typing import Any, Literal, Self, SupportsIndex, TypedDict, Unpack

import attrs

from flux2max_async._exceptions import InvalidRequestError
from flux2max_async._models.image_json import image_to_json, images_from_json
from flux2max_async._models.images import (
    MAX_INPUT_IMAGES,
    ImageSource,
    InputImage,
    convert_input_images,
    is_web_url,
    short_repr,
)
from flux2max_async._models.notebook import short_repr_of
from flux2max_async._models.secret_text import SecretText
from flux2max_async._models.serialization import VERSION, check_version
from flux2max_async._models.unknown_names import unknown_parameter

_MIN_SIDE = 64
"""Pixels."""
_MAX_SAFETY_TOLERANCE = 5
_MAX_URL_LENGTH = 2083
_MAX_EXTRA_DEPTH = 100
"""Levels of nested JSON; a request with many more could be neither copied nor serialized."""

_CALL_OPTIONS = ("timeout", "priority", "group", "retry_failed", "resubmit_uncertain")
"""The options of generate(), submit() and enqueue(), beside the request's parameters."""

IMAGE_PARAMETERS = ("input_image", *(f"input_image_{number}" for number in range(2, MAX_INPUT_IMAGES + 1)))
"""The names under which the input images are sent, in order."""


class OutputFormat(StrEnum):
    """The file format of the generated image."""

    JPEG = "jpeg"
    PNG = "png"


class GenerationParams(TypedDict, total=False):
    """The fields of `GenerationRequest` other than the prompt, as keyword arguments."""

    input_images: Sequence[ImageSource]
    seed: SupportsIndex | None
    width: SupportsIndex | None
    height: SupportsIndex | None
    safety_tolerance: SupportsIndex | None
    output_format: OutputFormat | Literal["jpeg", "png"] | None
    webhook_url: str | None
    webhook_secret: str | None
    extra: Mapping[str, Any]
    key: str | None


@attrs.frozen(eq=False)
class _FrozenMapping(Mapping[str, Any]):
    """An immutable mapping that can be pickled, which a MappingProxyType can't."""

    _values: dict[str, Any]

    def __getitem__(self, key: str) -> Any:
        return copy.deepcopy(self._values[key])

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        return repr(self._values)


_NO_EXTRA = _FrozenMapping({})


# ------------------------------------------------------------------ attrs converters and validators


def _convert_output_format(value: OutputFormat | Literal["jpeg", "png"] | None) -> OutputFormat | None:
    try:
        return None if value is None else OutputFormat(value)
    except ValueError:
        raise InvalidRequestError(
            f"output_format must be 'jpeg' or 'png', not {short_repr(value)}", field="output_format"
        ) from None


def _convert_extra(value: Mapping[str, Any]) -> Mapping[str, Any]:
    if isinstance(value, _FrozenMapping):
        return value
    if not isinstance(value, Mapping):
        raise InvalidRequestError(f"extra must be a mapping of parameters, not {type(value).__name__}", field="extra")
    for name in value:
        if not isinstance(name, str):
            raise InvalidRequestError(f"extra's names must be text, not {name!r}", field="extra")
        if name in _KNOWN_PARAMETERS:
            raise InvalidRequestError(f"extra can't hold {name!r}: it is a parameter of its own", field="extra")
    try:
        # The round trip through JSON rejects what can't be sent, and copies what the caller may change later.
        values = json.loads(json.dumps(dict(value), allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidRequestError(f"extra must hold JSON values only: {error}", field="extra") from error
    if _is_deeper_than(values, _MAX_EXTRA_DEPTH):
        raise InvalidRequestError(f"extra must not be nested more than {_MAX_EXTRA_DEPTH} levels deep", field="extra")
    return _FrozenMapping(values)


def _is_deeper_than(value: Any, levels: int) -> bool:
    match value:
        case dict() | list() if levels == 0:
            return True
        case dict():
            return any(_is_deeper_than(child, levels - 1) for child in value.values())
        case list():
            return any(_is_deeper_than(child, levels - 1) for child in value)
        case _:
            return False


def _convert_integer(value: SupportsIndex | None) -> int | None:
    """Return numpy's integers as Python's; what is no integer is for the validator."""
    if value is None or isinstance(value, int):
        return value
    try:
        return operator.index(value)
    except TypeError:
        return value  # type: ignore[return-value]  # a value of any type, which the validator refuses


def _convert_secret(value: str | None) -> str | None:
    return SecretText(value) if isinstance(value, str) else value


def _validate_prompt(_: Any, __: Any, value: Any) -> None:
    if not isinstance(value, str):
        raise InvalidRequestError(f"prompt must be text, not {type(value).__name__}", field="prompt")
    if not value.strip():
        raise InvalidRequestError("prompt must not be blank", field="prompt")


def _validate_integer(_: Any, field: "attrs.Attribute[Any]", value: object) -> None:
    if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
        raise InvalidRequestError(f"{field.name} must be an integer or None, not {short_repr(value)}", field=field.name)
    if value is not None and abs(value) >= 2**64:
        raise InvalidRequestError(f"{field.name} must be an integer of at most 64 bits", field=field.name)


def _validate_side(instance: Any, field: "attrs.Attribute[Any]", value: int | None) -> None:
    _validate_integer(instance, field, value)
    if value and value < _MIN_SIDE:
        raise InvalidRequestError(
            f"{field.name} must be at least {_MIN_SIDE} pixels, or 0 or None to let the model choose, not {value}",
            field=field.name,
        )


def _validate_safety_tolerance(instance: Any, field: "attrs.Attribute[Any]", value: int | None) -> None:
    _validate_integer(instance, field, value)
    if value is not None and not 0 <= value <= _MAX_SAFETY_TOLERANCE:
        raise InvalidRequestError(
            f"{field.name} must be from 0 (strictest) to {_MAX_SAFETY_TOLERANCE}, not {value}", field=field.name
        )


def _validate_webhook_url(_: Any, field: "attrs.Attribute[Any]", value: object) -> None:
    if value is None:
        return
    if not isinstance(value, str) or not is_web_url(value):
        raise InvalidRequestError(f"{field.name} must be an http(s) URL, not {short_repr(value)}", field=field.name)
    if len(value) > _MAX_URL_LENGTH:
        raise InvalidRequestError(
            f"{field.name} must have at most {_MAX_URL_LENGTH} characters, not {len(value)}", field=field.name
        )


def _validate_text(_: Any, field: "attrs.Attribute[Any]", value: object) -> None:
    # The value may be a secret, so the message never shows it.
    if value is not None and not isinstance(value, str):
        raise InvalidRequestError(f"{field.name} must be text or None, not {type(value).__name__}", field=field.name)
    if value == "":
        raise InvalidRequestError(f"{field.name} must not be empty; None omits it", field=field.name)


# ------------------------------------------------------------------ the request


def _convert_input_images(sources: Sequence[ImageSource]) -> tuple[InputImage, ...]:
    return () if isinstance(sources, tuple) and not sources else convert_input_images(sources)


@attrs.frozen(repr=False)
class GenerationRequest:
    """A request for one image; immutable, hashable, and equal if all fields are equal.

    Args:
        prompt: The description of the image; not blank.
        input_images: At most 8 images that the model edits or refers to, in order; see `InputImage` for the sources.
        seed: The same seed generates the same image again.
        width: Pixels, at least 64; None or 0 lets the model choose.
        height: Pixels, at least 64; None or 0 lets the model choose.
        safety_tolerance: 0 (strictest) to 5; None uses the service's default (2).
        output_format: "jpeg" or "png"; None uses the service's default (jpeg).
        webhook_url: The http(s) URL to which the service posts the finished task; at most 2083 characters.
        webhook_secret: The secret for the signature of that post; never shown. Pickles, too, are without it: to pass it
            on, pickle `to_dict(secrets=True)`.
        extra: Parameters of the service that this library doesn't know yet, as JSON values; None values are not sent.
        key: Your own name for this request; never sent.

    Raises:
        InvalidRequestError: A parameter is wrong; `field` names it.
    """

    prompt: str = attrs.field(validator=_validate_prompt)
    input_images: tuple[InputImage, ...] = attrs.field(default=(), converter=_convert_input_images, kw_only=True)
    seed: int | None = attrs.field(default=None, converter=_convert_integer, validator=_validate_integer, kw_only=True)
    width: int | None = attrs.field(default=None, converter=_convert_integer, validator=_validate_side, kw_only=True)
    height: int | None = attrs.field(default=None, converter=_convert_integer, validator=_validate_side, kw_only=True)
    safety_tolerance: int | None = attrs.field(
        default=None, converter=_convert_integer, validator=_validate_safety_tolerance, kw_only=True
    )
    output_format: OutputFormat | None = attrs.field(default=None, converter=_convert_output_format, kw_only=True)
    webhook_url: str | None = attrs.field(default=None, validator=_validate_webhook_url, kw_only=True)
    webhook_secret: str | None = attrs.field(
        default=None, converter=_convert_secret, validator=_validate_text, repr=False, kw_only=True
    )
    # The hash omits it because its values may be lists; equality doesn't.
    extra: Mapping[str, Any] = attrs.field(default=_NO_EXTRA, converter=_convert_extra, hash=False, kw_only=True)
    key: str | None = attrs.field(default=None, validator=_validate_text, kw_only=True)

    def __repr__(self) -> str:
        named: dict[str, Any] = {name: getattr(self, name) for name in GenerationParams.__annotations__}
        named |= {"input_images": list(self.input_images) or None, "extra": self.extra or None, "webhook_secret": None}
        return short_repr_of(self, self.prompt, **named)

    def to_dict(self, *, secrets: bool = False) -> dict[str, Any]:
        """Return the parameters that are set as JSON values, with a "version"; `from_dict()` reads them.

        Local images become `data:` URIs, if they were passed as bytes or encoded, or else paths.

        Args:
            secrets: Whether the `webhook_secret` is in it.
        """
        params = {
            name: value for name in GenerationParams.__annotations__ if (value := getattr(self, name)) is not None
        }
        data: dict[str, Any] = {"version": VERSION, "prompt": self.prompt, **params}
        data["input_images"] = [image_to_json(image) for image in self.input_images]
        data["extra"] = dict(self.extra)
        if self.output_format is not None:
            data["output_format"] = self.output_format.value
        if self.webhook_secret is not None:
            data["webhook_secret"] = str(self.webhook_secret)
        left_out = {name for name in ("input_images", "extra") if not data[name]}
        left_out |= set() if secrets else {"webhook_secret"}
        return {name: value for name, value in data.items() if name not in left_out}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], *, allow_files: bool = False) -> Self:
        """Return the request that `to_dict()` has written, or that came in as JSON from elsewhere; None means not set.

        Args:
            data: The parameters.
            allow_files: Accept paths as input images: what came in from the web must not read the server's disk.

        Raises:
            InvalidRequestError: A parameter is wrong or unknown, a path is not accepted, or a later release of this
                library has written it.
        """
        check_version(data, "request")
        known = ("prompt", *GenerationParams.__annotations__)
        for name in data:
            if name not in known and name != "version":
                raise unknown_parameter(name, known)
        params = {name: value for name, value in data.items() if name != "version" and value is not None}
        if "prompt" not in params:
            raise InvalidRequestError("prompt is missing", field="prompt")
        images = images_from_json(params.pop("input_images", ()), allow_files=allow_files)
        return cls(**params, input_images=images)


_KNOWN_PARAMETERS = {"model", *IMAGE_PARAMETERS, *attrs.fields_dict(GenerationRequest)} - {"extra", "key"}


def as_request(request: str | GenerationRequest, **params: Unpack[GenerationParams]) -> GenerationRequest:
    """Return a request made of a prompt and parameters, or a copy of a request with some parameters replaced.

    Raises:
        InvalidRequestError: A parameter is wrong or unknown, or `request` is neither a prompt nor a request.
    """
    for name in params:
        if name not in GenerationParams.__annotations__:
            raise unknown_parameter(name, ("prompt", *GenerationParams.__annotations__, *_CALL_OPTIONS))
    untyped: object = request
    match untyped:
        case GenerationRequest():
            return attrs.evolve(untyped, **params) if params else untyped
        case str():
            return GenerationRequest(untyped, **params)
        case _:
            raise InvalidRequestError(
                f"request must be a prompt or a GenerationRequest, not {type(untyped).__name__}", field="request"
            )


def validate_priority(priority: int) -> int:
    """Return the priority of a request, which may be any integer.

    Raises:
        InvalidRequestError: It is not an integer.
    """
    if isinstance(priority, bool) or not isinstance(priority, int):
        raise InvalidRequestError(f"priority must be an integer, not {priority!r}", field="priority")
    return priority
