"""What a request asks for, apart from its name: a fingerprint, a description without pictures, and its size.

Local pictures are read here, so keep it off the event loop where there are any.
"""

import hashlib
import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs

from flux2max_async._exceptions import InvalidRequestError
from flux2max_async._models.request import GenerationRequest

_MEGAPIXEL = 1024 * 1024


@attrs.frozen
class RequestFingerprint:
    """What is asked for."""

    fingerprint: str
    """The same for the same picture asked for twice, whatever it is called and wherever its webhook goes."""
    description: Mapping[str, Any]
    """JSON values: pictures by url or name and fingerprint, and no secrets."""
    megapixels: int
    """Of the output and of all inputs, each picture rounded up, as the service bills them."""


def fingerprint_request(request: GenerationRequest) -> RequestFingerprint:
    """Look at what a request asks for, the bytes of local pictures included.

    Raises:
        InvalidRequestError: A local picture can't be read.
    """
    params: dict[str, Any] = {
        name: value
        for name in ("prompt", "seed", "width", "height", "safety_tolerance", "output_format")
        if (value := getattr(request, name)) is not None
    }
    if request.extra:
        params["extra"] = dict(request.extra)
    if not request.input_images:
        return RequestFingerprint(_hash(params), params, _output_megapixels(request))
    fingerprints: list[str] = []
    names: list[str] = []
    megapixels = _output_megapixels(request)
    for index, image in enumerate(request.input_images):
        if isinstance(image.source, str):
            fingerprints.append(image.source)
            names.append(image.source)
            megapixels += 1
            continue
        try:
            data = image.read()
        except InvalidRequestError as error:
            raise InvalidRequestError(f"input_images[{index}]: {error.message}", error.field) from error.__cause__
        fingerprint = f"sha256:{hashlib.sha256(data).hexdigest()}"
        fingerprints.append(fingerprint)
        names.append(str(image.source) if isinstance(image.source, Path) else fingerprint)
        width, height = dimensions(data) or (1024, 1024)
        megapixels += _megapixels(width, height)
    fingerprint = _hash({**params, "input_images": fingerprints})
    return RequestFingerprint(fingerprint, {**params, "input_images": names}, megapixels)


def is_local(request: GenerationRequest) -> bool:
    """Tell whether a request holds pictures that have to be read."""
    return any(not isinstance(image.source, str) for image in request.input_images)


def _hash(params: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(params, sort_keys=True).encode()).hexdigest()[:32]


def _output_megapixels(request: GenerationRequest) -> int:
    return _megapixels(request.width or 1024, request.height or 1024)


def _megapixels(width: int, height: int) -> int:
    return max(1, math.ceil(width * height / _MEGAPIXEL))


def dimensions(data: bytes) -> tuple[int, int] | None:
    """Read the width and height of a PNG, JPEG, WebP or GIF from its head; None where they can't be found."""
    try:
        if data.startswith(b"\x89PNG"):
            return struct.unpack_from(">II", data, 16)
        if data.startswith(b"GIF8"):
            return struct.unpack_from("<HH", data, 6)
        if data.startswith(b"RIFF"):
            return _webp_dimensions(data)
        if data.startswith(b"\xff\xd8"):
            return _jpeg_dimensions(data)
    except (struct.error, IndexError):
        pass  # it ends too soon
    return None


def _webp_dimensions(data: bytes) -> tuple[int, int] | None:
    # https://developers.google.com/speed/webp/docs/riff_container
    match data[12:16]:
        case b"VP8 ":
            width, height = struct.unpack_from("<HH", data, 26)
            return width & 0x3FFF, height & 0x3FFF
        case b"VP8L":
            (bits,) = struct.unpack_from("<I", data, 21)
            return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
        case b"VP8X":
            low_width, high_width, low_height, high_height = struct.unpack_from("<HBHB", data, 24)
            return low_width + (high_width << 16) + 1, low_height + (high_height << 16) + 1
        case _:
            return None


def _jpeg_dimensions(data: bytes) -> tuple[int, int] | None:
    # ITU-T T.81, B.2.2: the frame header follows one of the SOF markers.
    place = 2
    while data[place] == 0xFF:
        marker = data[place + 1]
        if 0xC0 <= marker <= 0xCF and marker not in {0xC4, 0xC8, 0xCC}:
            height, width = struct.unpack_from(">HH", data, place + 5)
            return width, height
        if marker == 0xFF:  # a fill byte
            place += 1
        else:
            place += 2 + int.from_bytes(data[place + 2 : place + 4], "big")
    return None
