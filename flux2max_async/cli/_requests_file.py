"""Requests files: text, JSON or a table is read into requests, and each bad line is reported with its reason."""

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import attrs

from flux2max_async._downloads.default_names import FINGERPRINT_LENGTH, name_after_content
from flux2max_async._exceptions import InvalidRequestError
from flux2max_async._models.fingerprint import RequestFingerprint, fingerprint_request
from flux2max_async._models.request import GenerationRequest
from flux2max_async.cli._file_formats import FIELDS, Fields, parse_file, unknown_field_error

_KEY_END = re.compile(rf"[0-9a-f]{{{FINGERPRINT_LENGTH}}}(-\d+)?")
"""Matches the rest of a derived key, after the part that is made from the prompt."""


@attrs.frozen
class Line:
    """A request of the file."""

    number: int
    """The number of the line, from 1."""
    request: GenerationRequest
    """Always has a key: its own, or one that is derived from the prompt and the fingerprint of the content."""
    content: RequestFingerprint

    @property
    def key(self) -> str:
        """The key of the request."""
        return str(self.request.key)


@attrs.frozen
class BadLine:
    """A line that is not a valid request."""

    number: int
    field: str
    reason: str


@attrs.frozen
class RequestsFile:
    """The requests and the bad lines of a file."""

    lines: list[Line]
    bad_lines: list[BadLine]
    notes: list[str] = attrs.field(factory=list[str])
    """What the user should know about how the file was read."""


def read_requests_file(
    data: bytes, file_format: str, *, folder: Path, defaults: Mapping[str, Any] | None = None, repeat: int = 1
) -> RequestsFile:
    """Read a requests file and the images that it refers to.

    Args:
        data: The file's bytes.
        file_format: One of `FORMATS`.
        folder: The folder that the paths of images are relative to.
        defaults: The values of fields for lines that don't set them.
        repeat: The number of requests for each line. Their seeds are consecutive, from the line's own seed or from 0.
    """
    keys = _KeyAllocator()
    lines: list[Line] = []
    bad_lines: list[BadLine] = []
    parsed, notes = parse_file(data, file_format)
    for number, fields in parsed:
        try:
            if isinstance(fields, InvalidRequestError):
                raise fields
            request = _create_request(_add_defaults(fields, defaults or {}), folder)
            lines += [keys.assign(number, *repetition) for repetition in _repeat(request, repeat)]
        except InvalidRequestError as error:
            bad_lines.append(BadLine(number, error.field, error.message))
        except RecursionError:
            bad_lines.append(BadLine(number, "line", "the line is nested too deeply"))
    return RequestsFile(lines, bad_lines, notes)


def _add_defaults(fields: Fields, defaults: Mapping[str, Any]) -> Fields:
    merged = {**defaults, **fields}
    if "webhook_url" not in merged and "webhook_secret" not in fields:
        merged.pop("webhook_secret", None)  # a secret is invalid without a webhook
    return merged


def parse_defaults(extra: Iterable[str], **options: Any) -> Fields:
    """Return the default values of fields, as given by command-line options.

    Args:
        extra: Parameters such as "name=value". The value is JSON, or else text.
        **options: The values of fields; None leaves a field out. Paths are relative to the working folder.

    Raises:
        InvalidRequestError: A value is invalid, or an image can't be read.
    """
    defaults = {name: value for name, value in options.items() if value is not None}
    if "input_images" in defaults:
        defaults["input_images"] = [resolve_image_source(source, Path()) for source in defaults["input_images"]]
    extra_params: Fields = {}
    for option in extra:
        name, equals, value = option.partition("=")
        if not equals or not name:
            raise InvalidRequestError(f"extra must be like name=value, not {option!r}", field="extra")
        try:
            extra_params[name] = json.loads(value)
        except ValueError:
            extra_params[name] = value
        except RecursionError as error:
            raise InvalidRequestError(f"{name} in extra is nested too deeply", field="extra") from error
    if extra_params:
        defaults["extra"] = extra_params
    sample: Fields = {"prompt": "a sample, to validate the other fields", **defaults}
    fingerprint_request(GenerationRequest(**sample))
    return defaults


def _create_request(fields: Fields, folder: Path) -> GenerationRequest:
    for name, value in fields.items():
        if name not in FIELDS:
            raise unknown_field_error(name)
        _validate_encoding(name, value)
    if "prompt" not in fields:
        raise InvalidRequestError("prompt is missing", field="prompt")
    images = fields.get("input_images", ())
    if isinstance(images, (list, tuple)):
        images = [resolve_image_source(source, folder) for source in images]
    resolved: Fields = {**fields, "input_images": images}
    return GenerationRequest(**resolved)


def _validate_encoding(name: str, value: Any) -> None:
    """Check that all text in a field's value, at any depth, was UTF-8."""
    match value:
        case str():
            if any("\ud800" <= char <= "\udfff" for char in value):  # from the error handler `surrogateescape`
                raise InvalidRequestError(f"{name} is not UTF-8: save the file in that encoding", field=name)
            if "\0" in value:
                raise InvalidRequestError(
                    f"{name} contains a NUL character: if the file is in UTF-16, save it as UTF-8", field=name
                )
        case list():
            for item in value:
                _validate_encoding(name, item)
        case dict():
            for key, item in value.items():
                _validate_encoding(name, key)
                _validate_encoding(name, item)
        case _:
            pass


def resolve_image_source(source: Any, folder: Path) -> Any:
    """Return text that is not a URL as a path relative to a folder, and everything else unchanged.

    Raises:
        InvalidRequestError: The path begins with an unknown user's home folder.
    """
    if not isinstance(source, str) or source.lower().startswith(("http://", "https://", "data:")):
        return source
    try:
        return folder / Path(source).expanduser()
    except RuntimeError as error:
        raise InvalidRequestError(f"can't find {source[:80]!r}: {error}", field="input_images") from error


def _repeat(request: GenerationRequest, count: int) -> Iterator[tuple[GenerationRequest, str]]:
    """Yield the request with consecutive seeds, each time with the suffix of its key."""
    if count == 1:
        yield request, ""
        return
    # The first repetition of a request that has a seed equals the request itself, so its key has no suffix.
    has_seed = request.seed is not None
    for index in range(count):
        suffix = "" if has_seed and index == 0 else f"-{index + 1}"
        yield attrs.evolve(request, seed=(request.seed or 0) + index), suffix


class _KeyAllocator:
    """Assigns a unique key to each request of a file."""

    def __init__(self) -> None:
        self._line_numbers: dict[str, int] = {}
        """By key."""
        self._derived_counts: Counter[str] = Counter()
        """How often each key was derived: equal requests get numbered keys."""

    def assign(self, number: int, request: GenerationRequest, suffix: str) -> Line:
        """Return a line whose request has a key.

        Args:
            number: The number of the line.
            request: The request, with or without a key of its own.
            suffix: Text to append to the request's own key.

        Raises:
            InvalidRequestError: An input image can't be read, or another line has the same key.
        """
        content = fingerprint_request(request)
        if request.key is not None:
            key = f"{request.key}{suffix}"
        else:
            # The line's number is no part of the key, since lines may be inserted and deleted between two runs.
            key = name_after_content(request.prompt, content.fingerprint)
            self._derived_counts[key] += 1
            if self._derived_counts[key] > 1:
                key = f"{key}-{self._derived_counts[key]}"
        if (owner := self._line_numbers.setdefault(key, number)) != number:
            raise InvalidRequestError(f"line {owner} has the key {key!r} already: keys must be unique", field="key")
        return Line(number, attrs.evolve(request, key=key), content)


def is_derived_key(key: str, prompt: str) -> bool:
    """Check whether the key of a request was derived from its content, and is not one that the user has chosen."""
    stem = name_after_content(prompt, "")
    return key.startswith(stem) and bool(_KEY_END.fullmatch(key, len(stem)))
