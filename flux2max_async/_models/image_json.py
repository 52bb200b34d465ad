"""Input images as JSON values, and back."""

import base64
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flux2max_async._exceptions import InvalidRequestError
from flux2max_async._models.generated import GeneratedImage, inline_url
from flux2max_async._models.images import ImageSource, InputImage, error_at_index, is_web_url, short_repr
from flux2max_async._models.serialization import fields_to_json, image_from_dict


def image_to_json(image: InputImage) -> Any:
    """Return an input image as JSON: its URL, a `data:` URI, or an object with a path or a generated image."""
    match image.source:
        case bytes(data):
            return inline_url(base64.b64encode(data).decode())
        case Path() as path:
            return {"path": str(path)}
        case GeneratedImage() as generated:
            return fields_to_json(generated)
        case url:
            return url


def images_from_json(values: object, *, allow_files: bool) -> list[InputImage]:
    """Return the input images that stand for JSON values.

    Args:
        values: A list of them.
        allow_files: Whether paths are accepted.

    Raises:
        InvalidRequestError: One of them isn't an image, or a path that is not accepted.
    """
    if not isinstance(values, (list, tuple)):
        raise _invalid("input_images must be a list of images, even for a single one")
    images: list[InputImage] = []
    for index, value in enumerate(values):
        try:
            images.append(InputImage(_source_from_json(value, allow_files=allow_files)))
        except InvalidRequestError as error:
            raise error_at_index(error, index) from error.__cause__
    return images


def _source_from_json(value: object, *, allow_files: bool) -> ImageSource:
    match value:
        case str() if value[:5].lower() == "data:" or is_web_url(value):
            return value
        case str(path) | {"path": str(path)}:
            if not allow_files:
                raise _invalid(
                    f"{short_repr(path)} is neither an http(s) URL nor a data: URI; paths need allow_files=True"
                )
            return Path(path)
        case Mapping():
            try:
                return image_from_dict(value)
            except (KeyError, TypeError, ValueError) as error:
                raise _invalid(f"an object must have a path, or be a generated image: {error!r}") from error
        case _:
            raise _invalid(f"an image must be text or an object, not {type(value).__name__}")


def _invalid(message: str) -> InvalidRequestError:
    return InvalidRequestError(message, field="input_images")
