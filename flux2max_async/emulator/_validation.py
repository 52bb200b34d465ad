"""Validation of submits as the vendor's page describes it, and the error responses of the service."""

import base64
import binascii
from collections.abc import Callable, Mapping
from typing import Any

import attrs

from flux2max_async.emulator._images.input_images import image_size

MODEL = "flux_2_max"
MEGAPIXEL = 1024 * 1024

_INPUT_IMAGES = ["input_image", *(f"input_image_{number}" for number in range(2, 9))]


@attrs.frozen
class ServiceError(Exception):
    """An error response of the service."""

    status: int
    """HTTP status."""
    code: str
    message: str
    retry_after: float | None = None
    """Seconds."""


@attrs.frozen
class SubmitRequest:
    """A validated submit."""

    params: dict[str, Any]
    input_images: tuple[bytes, ...]
    """The input images that were sent as base64."""
    input_pixels: list[int]
    """The pixels of each input image; one that was sent as a URL counts as a megapixel."""


def parse_submit(body: object, header_model: str | None) -> SubmitRequest:
    """Validate a submit.

    Args:
        body: The decoded JSON body.
        header_model: The header `X-Model`, which may replace the body's `model`.

    Raises:
        ServiceError: Something is invalid; the message names it.
    """
    params = _validate_params(body, header_model)
    return SubmitRequest(params, *_decode_input_images(params))


def _validate_params(body: object, header_model: str | None) -> dict[str, Any]:
    fields: dict[str, Any] = body if isinstance(body, dict) else {}
    body_model = fields.get("model")
    if body_model is not None and header_model is not None and body_model != header_model:
        raise _invalid("model", f"is {body_model!r} in the body, but {header_model!r} in the header X-Model")
    if (body_model if header_model is None else header_model) != MODEL:
        raise _invalid("model", f"must be {MODEL}")
    match fields.get("input"):
        case [{"params": dict(params)}]:
            pass
        case _:
            raise _invalid("input", 'must be [{"params": {…}}]')
    if "prompt" not in params:
        raise _invalid("prompt", "is required")
    for name, (is_valid, rule) in _RULES.items():
        value = params.get(name)
        if name in params and not (is_valid(value) or (value is None and name != "prompt")):
            raise _invalid(name, rule)
    return params


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_side(value: Any) -> bool:
    return _is_integer(value) and (value == 0 or value >= 64)


# For each parameter: the check, and the rule as the vendor's page has it [S].
_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "prompt": (lambda value: isinstance(value, str) and bool(value.strip()), "must be text that is not blank"),
    "seed": (_is_integer, "must be an integer"),
    "width": (_is_side, "must be an integer of at least 64"),
    "height": (_is_side, "must be an integer of at least 64"),
    "safety_tolerance": (lambda value: _is_integer(value) and 0 <= value <= 5, "must be an integer from 0 to 5"),
    "output_format": (lambda value: value in ("jpeg", "png"), "must be jpeg or png"),
    "webhook_url": (
        lambda value: isinstance(value, str) and 1 <= len(value) <= 2083,
        "must be a URL of 1 to 2083 characters",
    ),
    "webhook_secret": (lambda value: isinstance(value, str), "must be text"),
}


def _decode_input_images(params: Mapping[str, Any]) -> tuple[tuple[bytes, ...], list[int]]:
    """Return the input images that were sent as base64, and the pixels of all input images."""
    images: list[bytes] = []
    pixels: list[int] = []
    for name in _INPUT_IMAGES:
        match params.get(name):
            case None:
                pass
            case str(url) if url.startswith(("http://", "https://")):
                pixels.append(MEGAPIXEL)
            case str(text):
                try:
                    data = base64.b64decode(text, validate=True)
                    width, height = image_size(data)
                except (binascii.Error, ValueError) as error:
                    raise _invalid(name, "must be a URL or an image as base64") from error
                images.append(data)
                pixels.append(width * height)
            case _:
                raise _invalid(name, "must be a URL or an image as base64")
    return tuple(images), pixels


def _invalid(name: str, message: str) -> ServiceError:
    return ServiceError(400, "invalid_parameter", f"{name} {message}")
