"""Input images: the sources that are accepted, and the check that their bytes are an image."""

import base64
import binascii
import inspect
import os
import stat
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Self
from urllib.parse import unquote_to_bytes, urlsplit

import attrs

from flux2max_async._exceptions import InvalidRequestError
from flux2max_async._models.generated import NO_URL, GeneratedImage, is_inline, shorten_link
from flux2max_async._models.pictures import SupportsImageSave, encode_picture, is_picture

# The service's limits.
MAX_INPUT_IMAGES = 8
_MAX_IMAGE_BYTES = 20_000_000

_MAX_REPR_LENGTH = 80

_UNACCEPTED_BRANDS = {
    **dict.fromkeys((b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"), "HEIC"),
    **dict.fromkeys((b"avif", b"avis"), "AVIF"),
}
"""Formats of photos that the service doesn't accept, by the brand in their header."""


# ------------------------------------------------------------------ conversion of sources


def _convert_source(source: "ImageSource") -> str | Path | bytes | GeneratedImage:
    untyped: object = source
    match untyped:
        case InputImage():
            return untyped.source
        case GeneratedImage():
            return _validate_generated(untyped)
        case str(text) if text[:5].lower() == "data:":
            return _decode_data_uri(text)
        case str(text) if is_web_url(text):
            return text
        case str(text):
            raise _invalid_image(
                f"{short_repr(text)} is neither an http(s) URL nor a data: URI; pass a local file as pathlib.Path"
            )
        case bytes() | bytearray() | memoryview():
            return _validate_image(bytes(untyped), "the image passed as bytes")
        case os.PathLike():
            return Path(os.fsdecode(untyped))
        case _ if _is_file_like(untyped):
            return _read_open_file(untyped)
        case _ if is_picture(untyped):
            return _validate_image(encode_picture(untyped), "the picture, encoded as PNG,")
        case _:
            raise _invalid_image(
                "an image must be a URL, a pathlib.Path, bytes, an open binary file, a Pillow image or a "
                f"GeneratedImage, not {type(untyped).__name__}"
            )


def _validate_generated(image: GeneratedImage) -> GeneratedImage:
    if image.url != NO_URL and not is_inline(image.url) and not is_web_url(image.url):
        raise _invalid_image(f"the URL of the generated image is no http(s) URL: {short_repr(image.url)}")
    return image


def _decode_data_uri(uri: str) -> bytes:
    header, comma, data = uri.partition(",")
    if not comma:
        raise _invalid_image("a data: URI needs a comma before its data, as in 'data:image/png;base64,…'")
    if header.lower().endswith(";base64"):
        return _decode_base64(unquote_to_bytes(data).decode("latin-1"))
    return _validate_image(unquote_to_bytes(data), "the image in the data: URI")


def _decode_base64(text: Any) -> bytes:
    if not isinstance(text, str):
        raise _invalid_image(f"base64 must be text, not {type(text).__name__}")
    try:
        data = base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise _invalid_image(f"not valid base64 text: {error}") from error
    return _validate_image(data, "the image passed as base64")


def _is_file_like(value: object) -> bool:
    return callable(getattr(value, "read", None))


def _read_open_file(file: Any) -> bytes:
    name = f"the open file {file.name!r}" if isinstance(getattr(file, "name", None), str) else "the open file"
    if inspect.iscoroutinefunction(file.read):
        raise _invalid_image(f"{name} is asynchronous: pass `await file.read()`")
    data = bytearray()
    try:
        if isinstance(file.read(0), str):
            raise _invalid_image(f"{name} is in text mode: open it with mode 'rb'")
        # A raw file may return fewer bytes than requested before its end.
        while len(data) <= _MAX_IMAGE_BYTES and (chunk := file.read(_MAX_IMAGE_BYTES + 1 - len(data))):
            data += chunk
    except InvalidRequestError:
        raise
    except (OSError, ValueError, TypeError) as error:
        raise _invalid_image(f"can't read {name}: {error}") from error
    if not data and _is_past_start(file):
        raise _invalid_image(f"{name} is at its end: call seek(0) first")
    return _validate_image(bytes(data), name)


def _is_past_start(file: Any) -> bool:
    try:
        return bool(file.tell() > 0)
    except (AttributeError, OSError, ValueError, TypeError):  # it can't tell
        return False


def _read_path(path: Path) -> bytes:
    name = repr(str(path))
    try:
        # Opening a named pipe would block, and it could be read only once.
        if not stat.S_ISREG(path.stat().st_mode):
            raise _invalid_image(f"{name} is not a regular file")
        with path.open("rb") as file:
            data = file.read(_MAX_IMAGE_BYTES + 1)
    except InvalidRequestError:
        raise
    except (OSError, ValueError) as error:
        raise _invalid_image(f"can't read {name}: {getattr(error, 'strerror', None) or error}") from error
    return _validate_image(data, name)


def _validate_image(data: bytes, name: str) -> bytes:
    if not data:
        raise _invalid_image(f"{name} is empty")
    if len(data) > _MAX_IMAGE_BYTES:
        raise _invalid_image(f"{name} is larger than 20 MB")
    if not (
        data.startswith((b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF87a", b"GIF89a"))
        or (data[:4] == b"RIFF" and data[8:12] == b"WEBP")
    ):
        unaccepted = _UNACCEPTED_BRANDS.get(data[8:12]) if data[4:8] == b"ftyp" else None
        if unaccepted:
            raise _invalid_image(f"{name}: {unaccepted} is not accepted: convert to PNG or JPEG")
        raise _invalid_image(f"{name} is not a PNG, JPEG, WebP or GIF")
    return data


def _invalid_image(message: str) -> InvalidRequestError:
    return InvalidRequestError(message, field="input_images")


# ------------------------------------------------------------------ values


@attrs.frozen(repr=False)
class InputImage:
    """An input image, sent as its URL or as base64: PNG, JPEG, WebP or GIF, at most 20 MB.

    A string is an http(s) URL or a `data:` URI, never a local file. A local file is a `pathlib.Path` (or any PathLike),
    its bytes, or an open binary file. A path is read when the request is submitted; an open file is read immediately.
    A Pillow image, or another object with such a `save()`, is encoded as PNG immediately. A `GeneratedImage` is sent as
    its URL, a fresh one if that has expired.

    Raises:
        InvalidRequestError: The source is none of these, or not an image that the service accepts.
    """

    source: str | Path | bytes | GeneratedImage = attrs.field(converter=_convert_source)
    """The URL, the path of the file, the file's bytes, or the generated image."""

    @classmethod
    def from_base64(cls, text: str) -> Self:
        """Create an image from its bytes encoded as base64."""
        return cls(_decode_base64(text))

    @property
    def is_local(self) -> bool:
        """Whether it has to be read or decoded before it is sent."""
        match self.source:
            case str():
                return False
            case GeneratedImage(url=url):
                return is_inline(url)
            case _:
                return True

    def encode(self) -> str:
        """Return what is sent: the URL, or the bytes as base64. Reads a local file, so it blocks.

        Raises:
            InvalidRequestError: The file is missing, empty, too large or not an image that the service accepts.
        """
        match self.source:
            case str(url):
                return url
            case GeneratedImage(url=url) if not is_inline(url):
                return url
            case _:
                return base64.b64encode(self.read()).decode()

    def read(self) -> bytes:
        """Return the bytes of a local image. Reads a local file, so it blocks.

        Raises:
            InvalidRequestError: The file is missing, empty, too large or not an image that the service accepts.
        """
        match self.source:
            case bytes(data):
                return data
            case GeneratedImage(url=url) if is_inline(url):
                return _decode_data_uri(url)
            case str(url) | GeneratedImage(url=url):
                raise _invalid_image(f"{short_repr(url)} is a URL, not a local image")
            case path:
                return _read_path(path)

    def __repr__(self) -> str:
        match self.source:
            case bytes(data):
                return f"InputImage(<{len(data)} bytes>)"
            case GeneratedImage(task_id=task_id, index=index):
                return f"InputImage(<image {index} of task {task_id!r}>)"
            case str(url):
                return f"InputImage({shorten_link(url)!r})"
            case path:
                return f"InputImage({str(path)!r})"


ImageSource = str | os.PathLike[str] | bytes | BinaryIO | InputImage | GeneratedImage | SupportsImageSave
"""The types that an input image can be created from; `InputImage` describes them."""


def convert_input_images(sources: Sequence[ImageSource]) -> tuple[InputImage, ...]:
    """Return the input images of a request.

    Raises:
        InvalidRequestError: It is not a list, it is too long, or one of the sources is invalid.
    """
    is_single = isinstance(sources, (str, bytes, bytearray, memoryview, os.PathLike, InputImage, GeneratedImage))
    if is_single or _is_file_like(sources) or not isinstance(sources, Iterable):
        raise _invalid_image("input_images must be a list of images, even for a single one")
    images: list[InputImage] = []
    for index, source in enumerate(sources):
        try:
            images.append(InputImage(source))
        except InvalidRequestError as error:
            raise error_at_index(error, index) from error.__cause__
    if len(images) > MAX_INPUT_IMAGES:
        raise _invalid_image(f"at most {MAX_INPUT_IMAGES} input images are possible, not {len(images)}")
    return tuple(images)


def has_pictures(sources: object) -> bool:
    """Return whether the sources of a request hold an object that takes long to encode."""
    return isinstance(sources, (list, tuple)) and any(
        is_picture(source) and not isinstance(source, os.PathLike) and not _is_file_like(source) for source in sources
    )


def error_at_index(error: InvalidRequestError, index: int) -> InvalidRequestError:
    """Return an error about one input image, with the image's index in its message."""
    return InvalidRequestError(f"input_images[{index}]: {error.message}", field=error.field)


def is_web_url(text: str) -> bool:
    """Return whether a text is an http(s) URL with a host."""
    try:
        parts = urlsplit(text)
    except ValueError:
        return False
    return parts.scheme in {"http", "https"} and bool(parts.hostname) and text.isprintable() and " " not in text


def short_repr(value: object) -> str:
    """Return the repr of a value, cut to 80 characters, for error messages."""
    text = repr(value)
    return text if len(text) <= _MAX_REPR_LENGTH else f"{text[: _MAX_REPR_LENGTH - 3]}…"
