"""What is asked for: requests and their reference pictures, checked where they are made.

Parameters and ranges are those of the vendor's page for FLUX.2 [max].
"""

import base64
import binascii
import copy
import inspect
import json
import os
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any, BinaryIO, Literal, Self
from urllib.parse import unquote_to_bytes, urlsplit

import attrs

from flux2max_async._errors import InvalidRequestError

MAX_INPUT_IMAGES = 8
MAX_INPUT_BYTES = 20_000_000
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


# ------------------------------------------------------------------ reference pictures


def _source(source: "ImageSource") -> str | Path | bytes:
    given: object = source
    match given:
        case InputImage():
            return given.source
        case str(text) if text[:5].lower() == "data:":
            return _data_uri(text)
        case str(text):
            if not is_web_url(text):
                raise _unfit(
                    f"{_short(text)} is neither an http(s) URL nor a data: URI; pass a local file as pathlib.Path"
                )
            return text
        case bytes() | bytearray() | memoryview():
            return _checked(bytes(given), "the picture given as bytes")
        case os.PathLike():
            return Path(os.fsdecode(given))
        case _ if _is_file(given):
            return _read_open_file(given)
        case _:
            raise _unfit(f"give a URL, a pathlib.Path, bytes or an open binary file, not {type(given).__name__}")


def _read_open_file(file: Any) -> bytes:
    name = f"the open file {file.name!r}" if isinstance(getattr(file, "name", None), str) else "the open file"
    if inspect.iscoroutinefunction(file.read):
        raise _unfit(f"{name} has to be awaited: pass `await file.read()`")
    data = bytearray()
    try:
        if isinstance(file.read(0), str):
            raise _unfit(f"{name} gives text: open it with mode 'rb'")
        # A raw file may give less than was asked for, long before its end.
        while len(data) <= MAX_INPUT_BYTES and (piece := file.read(MAX_INPUT_BYTES + 1 - len(data))):
            data += piece
    except InvalidRequestError:
        raise
    except (OSError, ValueError, TypeError) as error:
        raise _unfit(f"can't read {name}: {error}") from error
    return _checked(bytes(data), name)


def _is_file(thing: object) -> bool:
    return callable(getattr(thing, "read", None))


def _data_uri(uri: str) -> bytes:
    head, comma, data = uri.partition(",")
    if not comma:
        raise _unfit("a data: URI needs a comma before its data, as in 'data:image/png;base64,…'")
    if head.lower().endswith(";base64"):
        return _decode(unquote_to_bytes(data).decode("latin-1"))
    return _checked(unquote_to_bytes(data), "the picture in the data: URI")


def _decode(text: Any) -> bytes:
    if not isinstance(text, str):
        raise _unfit(f"base64 must be text, not {type(text).__name__}")
    try:
        data = base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise _unfit(f"not valid base64 text: {error}") from error
    return _checked(data, "the picture given as base64")


def _checked(data: bytes, name: str) -> bytes:
    if not data:
        raise _unfit(f"{name} is empty")
    if len(data) > MAX_INPUT_BYTES:
        raise _unfit(f"{name} is larger than 20 MB")
    if not (
        data.startswith((b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF87a", b"GIF89a"))
        or (data[:4] == b"RIFF" and data[8:12] == b"WEBP")
    ):
        raise _unfit(f"{name} is not a PNG, JPEG, WebP or GIF")
    return data


def _unfit(message: str) -> InvalidRequestError:
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
                raise _unfit(f"{_short(url)} is on the web, not here")
            case path:
                try:
                    if not stat.S_ISREG(path.stat().st_mode):
                        raise _unfit(f"{str(path)!r} is no file")  # a pipe would be waited for, and can be read once
                    with path.open("rb") as file:
                        data = file.read(MAX_INPUT_BYTES + 1)
                except InvalidRequestError:
                    raise
                except (OSError, ValueError) as error:
                    raise _unfit(f"can't read {str(path)!r}: {getattr(error, 'strerror', None) or error}") from error
                return _checked(data, f"{str(path)!r}")

    def __repr__(self) -> str:
        match self.source:
            case bytes(data):
                return f"InputImage(<{len(data)} bytes>)"
            case source:
                return f"InputImage({str(source)!r})"


ImageSource = str | os.PathLike[str] | bytes | BinaryIO | InputImage
"""What an input image can be given as; see `InputImage`."""


# ------------------------------------------------------------------ the request


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


def _images(sources: Sequence[ImageSource]) -> tuple[InputImage, ...]:
    single = isinstance(sources, (str, bytes, bytearray, memoryview, os.PathLike, InputImage)) or _is_file(sources)
    if single or not isinstance(sources, Iterable):
        raise _unfit("give a list of pictures, even for a single one")
    images: list[InputImage] = []
    for index, source in enumerate(sources):
        try:
            images.append(InputImage(source))
        except InvalidRequestError as error:
            raise InvalidRequestError(f"input_images[{index}]: {error.message}", error.field) from error.__cause__
    if len(images) > MAX_INPUT_IMAGES:
        raise _unfit(f"at most {MAX_INPUT_IMAGES} input images are possible, not {len(images)}")
    return tuple(images)


def _output_format(value: OutputFormat | Literal["jpeg", "png"] | None) -> OutputFormat | None:
    try:
        return None if value is None else OutputFormat(value)
    except ValueError:
        raise InvalidRequestError(
            f"output_format must be 'jpeg' or 'png', not {_short(value)}", "output_format"
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
        raise InvalidRequestError(f"{field.name} must be an integer or None, not {_short(value)}", field.name)
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
        raise InvalidRequestError(f"{field.name} must be an http(s) URL, not {_short(value)}", field.name)
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
    input_images: tuple[InputImage, ...] = attrs.field(default=(), converter=_images, kw_only=True)
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


def is_web_url(text: str) -> bool:
    """Tell whether a text is a URL that can be fetched from the web."""
    try:
        parts = urlsplit(text)
    except ValueError:
        return False
    return parts.scheme in {"http", "https"} and bool(parts.hostname) and text.isprintable() and " " not in text


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}…"
