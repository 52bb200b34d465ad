"""The fingerprint of a request: what makes two requests the same.

Fingerprinting reads local images, so a request that has some belongs in a thread.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs

from flux2max_async._exceptions import InvalidRequestError
from flux2max_async._models.generated import NO_URL, GeneratedImage
from flux2max_async._models.images import error_at_index
from flux2max_async._models.request import GenerationRequest

_MEGAPIXEL = 1024 * 1024
_DEFAULT_SIDE = 1024
_FIELDS = ("prompt", "seed", "width", "height", "safety_tolerance", "output_format")
_TASK_PREFIX = "task:"
"""Begins the description of a generated image: its task's id, a slash, and its index."""


@attrs.frozen
class RequestFingerprint:
    """The content of a request: all that determines the image, and neither its key nor its webhook."""

    fingerprint: str
    """Equal for requests with equal content; 32 hexadecimal digits."""
    description: Mapping[str, Any]
    """The content as JSON values. Local images are represented by path or hash, generated ones by task and
    index; there are no secrets."""
    megapixels: int
    """For the estimate of the cost: the output, rounded up, and one for each input image."""


def fingerprint_request(request: GenerationRequest) -> RequestFingerprint:
    """Return the fingerprint of a request. Reads local images.

    Raises:
        InvalidRequestError: A local image can't be read.
    """
    params: dict[str, Any] = {name: value for name in _FIELDS if (value := getattr(request, name)) is not None}
    if request.extra:
        params["extra"] = dict(request.extra)
    megapixels = _output_megapixels(request) + len(request.input_images)
    if not request.input_images:
        return RequestFingerprint(_hash(params), params, megapixels)
    digests: list[str] = []
    descriptions: list[str] = []
    for index, image in enumerate(request.input_images):
        if isinstance(image.source, str):
            digest = image.source
        elif isinstance(image.source, GeneratedImage):
            # Not the URL, which is signed anew each time: the same edit would be paid for twice.
            digest = f"{_TASK_PREFIX}{image.source.task_id}/{image.source.index}"
        else:
            try:
                digest = f"sha256:{hashlib.sha256(image.read()).hexdigest()}"
            except InvalidRequestError as error:
                raise error_at_index(error, index) from error.__cause__
        digests.append(digest)
        descriptions.append(str(image.source) if isinstance(image.source, Path) else digest)
    return RequestFingerprint(
        _hash({**params, "input_images": digests}), {**params, "input_images": descriptions}, megapixels
    )


def is_local(request: GenerationRequest) -> bool:
    """Return whether a request has input images that have to be read for its fingerprint."""
    return any(isinstance(image.source, (bytes, Path)) for image in request.input_images)


def generated_image(description: object) -> GeneratedImage | None:
    """Return the generated image that an input image in a description is, without its URL; None if it is none."""
    if not isinstance(description, str) or not description.startswith(_TASK_PREFIX):
        return None
    task_id, _, index = description.removeprefix(_TASK_PREFIX).rpartition("/")
    if not task_id or not index.isdecimal():
        return None
    return GeneratedImage(url=NO_URL, type="image", task_id=task_id, index=int(index))


def _hash(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


def _output_megapixels(request: GenerationRequest) -> int:
    return math.ceil((request.width or _DEFAULT_SIDE) * (request.height or _DEFAULT_SIDE) / _MEGAPIXEL)
