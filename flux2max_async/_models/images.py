"""Input images: what each can be given as, and which bytes are a picture."""

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

MAX_INPUT_IMAGES = 8
MAX_INPUT_BYTES = 20_000_000


def _source(source: "ImageSource") -> str | Path | bytes:
    given: object = source
    match given:
        case InputImage():
            return given.source
        case str(text) if text[:5].lower() == "data:":
            return _data_uri(text)
        case str(text):
            if not is_web_url(text):
                raise invalid_image(
                    f"{shorten(text)} is neither an http(s) URL nor a data: URI; pass a local file as pathlib.Path"
                )
            return text
        case bytes() | bytearray() | memoryview():
            return _checked(bytes(given), "the picture given as bytes")
        case os.PathLike():
            return Path(os.fsdecode(given))
        case _ if is_file_like(given):
            return _read_open_file(given)
        case _:
            raise invalid_image(f"give a URL, a pathlib.Path, bytes or an open binary file, not {type(given).__name__}")


def _read_open_file(file: Any) -> bytes:
    name = f"the open file {file.name!r}" if isinstance(getattr(file, "name", None), str) else "the open file"
    if inspect.iscoroutinefunction(file.read):
        raise invalid_image(f"{name} has to be awaited: pass `await file.read()`")
    data = bytearray()
    try:
        if isinstance(file.read(0), str):
            raise invalid_image(f"{name} gives text: open it with mode 'rb'")
        # A raw file may give less than was asked for, long before its end.
        while len(data) <= MAX_INPUT_BYTES and (piece := file.read(MAX_INPUT_BYTES + 1 - len(data))):
            data += piece
    except InvalidRequestError:
        raise
    except (OSError, ValueError, TypeError) as error:
        raise invalid_image(f"can't read {name}: {error}") from error
    return _checked(bytes(data), name)


def is_file_like(thing: object) -> bool:
    return callable(getattr(thing, "read", None))


def _data_uri(uri: str) -> bytes:
    head, comma, data = uri.partition(",")
    if not comma:
        raise invalid_image("a data: URI needs a comma before its data, as in 'data:image/png;base64,…'")
    if head.lower().endswith(";base64"):
        return _decode(unquote_to_bytes(data).decode("latin-1"))
    return _checked(unquote_to_bytes(data), "the picture in the data: URI")


def _decode(text: Any) -> bytes:
    if not isinstance(text, str):
        raise invalid_image(f"base64 must be text, not {type(text).__name__}")
    try:
        data = base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise invalid_image(f"not valid base64 text: {error}") from error
    return _checked(data, "the picture given as base64")


def _checked(data: bytes, name: str) -> bytes:
    if not data:
        raise invalid_image(f"{name} is empty")
    if len(data) > MAX_INPUT_BYTES:
        raise invalid_image(f"{name} is larger than 20 MB")
    if not (
        data.startswith((b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF87a", b"GIF89a"))
        or (data[:4] == b"RIFF" and data[8:12] == b"WEBP")
    ):
        raise invalid_image(f"{name} is not a PNG, JPEG, WebP or GIF")
    return data


def invalid_image(message: str) -> InvalidRequestError:
    return InvalidRequestError(message, "input_images")


@attrs.frozen(repr=False)
class InputImage:
    """A reference picture, sent as its URL or as base64: PNG, JPEG, WebP or GIF, at most 20 MB.

    A string is an http(s) URL or a `data:` URI and never a local file; a local file is a `pathlib.Path` (or any
    PathLike), its bytes, or an open binary file. A path is read when the request is submitted, everything else when
    the picture is built.

    Raises:
        InvalidRequestError: The source is none of these, or not a picture that the service takes.
    """

    source: str | Path | bytes = attrs.field(converter=_source)
    """The URL, the path of the file, or the file's bytes."""

    @classmethod
    def from_base64(cls, text: str) -> Self:
        """Take a picture whose bytes are already encoded as base64."""
        return cls(_decode(text))

    def encode(self) -> str:
        """Give the wire's form: the URL, or the bytes as base64. Reads the file, so keep it off the event loop.

        Raises:
            InvalidRequestError: The file is missing, empty, too large or not a picture that the service takes.
        """
        return self.source if isinstance(self.source, str) else base64.b64encode(self.read()).decode()

    def read(self) -> bytes:
        """Give the bytes of a local picture. Reads the file, so keep it off the event loop.

        Raises:
            InvalidRequestError: The file is missing, empty, too large or not a picture that the service takes.
        """
        match self.source:
            case bytes(data):
                return data
            case str(url):
                raise invalid_image(f"{shorten(url)} is on the web, not here")
            case path:
                try:
                    if not stat.S_ISREG(path.stat().st_mode):
                        raise invalid_image(
                            f"{str(path)!r} is no file"
                        )  # a pipe would be waited for, and can be read once
                    with path.open("rb") as file:
                        data = file.read(MAX_INPUT_BYTES + 1)
                except InvalidRequestError:
                    raise
                except (OSError, ValueError) as error:
                    raise invalid_image(
                        f"can't read {str(path)!r}: {getattr(error, 'strerror', None) or error}"
                    ) from error
                return _checked(data, f"{str(path)!r}")

    def __repr__(self) -> str:
        match self.source:
            case bytes(data):
                return f"InputImage(<{len(data)} bytes>)"
            case source:
                return f"InputImage({str(source)!r})"


ImageSource = str | os.PathLike[str] | bytes | BinaryIO | InputImage
"""What an input image can be given as; see `InputImage`."""


def input_images_from(sources: Sequence[ImageSource]) -> tuple[InputImage, ...]:
    single = isinstance(sources, (str, bytes, bytearray, memoryview, os.PathLike, InputImage)) or is_file_like(sources)
    if single or not isinstance(sources, Iterable):
        raise invalid_image("give a list of pictures, even for a single one")
    images: list[InputImage] = []
    for index, source in enumerate(sources):
        try:
            images.append(InputImage(source))
        except InvalidRequestError as error:
            raise InvalidRequestError(f"input_images[{index}]: {error.message}", error.field) from error.__cause__
    if len(images) > MAX_INPUT_IMAGES:
        raise invalid_image(f"at most {MAX_INPUT_IMAGES} input images are possible, not {len(images)}")
    return tuple(images)


def is_web_url(text: str) -> bool:
    """Tell whether a text is a URL that can be fetched from the web."""
    try:
        parts = urlsplit(text)
    except ValueError:
        return False
    return parts.scheme in {"http", "https"} and bool(parts.hostname) and text.isprintable() and " " not in text


def shorten(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}…"
