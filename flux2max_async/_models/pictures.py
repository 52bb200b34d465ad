"""Pictures that are objects in memory, like those of Pillow, encoded as PNG."""

import io
import sys
from typing import Any, BinaryIO, Protocol

from flux2max_async._exceptions import InvalidRequestError

_PNG_MODES = frozenset(("1", "L", "LA", "P", "RGB", "RGBA", "I;16"))
"""Pillow's modes that PNG has, too."""
_CONVERTED_MODES = {
    "I": "I;16",
    "I;16B": "I;16",
    "I;16L": "I;16",
    "I;16N": "I;16",
    "F": "L",
    "La": "LA",
    "PA": "RGBA",
    "RGBa": "RGBA",
}
"""What other modes become; those that are not listed have no alpha, and become RGB."""


class SupportsImageSave(Protocol):
    """A Pillow image, or an object that saves itself like one."""

    def save(self, fp: BinaryIO, /, format: str) -> object:
        """Write the picture to a file in a format like "PNG"."""


def is_picture(value: object) -> bool:
    """Return whether an object saves itself like a Pillow image."""
    return callable(getattr(value, "save", None)) and not isinstance(value, type)


def encode_picture(picture: Any) -> bytes:
    """Return a picture as PNG: with its alpha, and upright if a Pillow image has an orientation in its EXIF data.

    Raises:
        InvalidRequestError: It can't be saved.
    """
    file = io.BytesIO()
    try:
        _as_png_mode(picture).save(file, format="PNG")
        return file.getvalue()
    except Exception as error:  # the object is a stranger
        message = f"can't encode the {type(picture).__name__} object as PNG: {error}"
        raise InvalidRequestError(message, field="input_images") from error


def _as_png_mode(picture: Any) -> Any:
    """Return a Pillow image upright and in a mode that PNG has; any other object as it is."""
    # Whoever passes a Pillow image has imported Pillow, which this library doesn't need.
    pillow = sys.modules.get("PIL.Image")
    if pillow is None or not isinstance(picture, pillow.Image):
        return picture
    from PIL import ImageOps  # noqa: PLC0415 - optional

    upright = ImageOps.exif_transpose(picture)
    if upright.mode in _PNG_MODES:
        return upright
    converted = upright.convert(_CONVERTED_MODES.get(upright.mode, "RGB"))
    converted.info.pop("icc_profile", None)  # of the other mode's colours
    return converted
