"""A file of requests: text, JSON Lines or CSV becomes requests, and each line that can't is told with its reason."""

import codecs
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import attrs

from flux2max_async._exceptions import ConfigurationError, InvalidRequestError
from flux2max_async._models.fingerprint import RequestFingerprint, fingerprint_request
from flux2max_async._models.request import GenerationRequest
from flux2max_async.cli._parsers import FIELDS, READERS, Fields, unknown

_STEM = 60
"""Bytes of a prompt that go into the name of its picture."""
_MARK = 8
"""Characters of the fingerprint of what is asked for, which make the name that of nothing else."""


@attrs.frozen
class Line:
    """One request of a sheet."""

    number: int
    """The line in the file, counted from 1."""
    request: GenerationRequest
    """With a key: its own, or one made of its prompt and of a fingerprint of all that it asks for."""
    content: RequestFingerprint

    @property
    def key(self) -> str:
        """What the request is called."""
        return str(self.request.key)


@attrs.frozen
class BadLine:
    """A line that is no request."""

    number: int
    field: str
    reason: str


@attrs.frozen
class Sheet:
    """All lines of a file."""

    lines: list[Line]
    bad: list[BadLine]


def read_sheet(
    data: bytes, form: str, *, folder: Path, defaults: Mapping[str, Any] | None = None, repeat: int = 1
) -> Sheet:
    """Read a sheet; the pictures that it names are looked at, too.

    Args:
        data: The file's bytes.
        form: "txt", "jsonl" or "csv".
        folder: What the paths of pictures are relative to.
        defaults: Fields for all lines that don't say otherwise.
        repeat: How many pictures to make of each line. Their seeds are counted up, from the line's own or from 0.

    Raises:
        ConfigurationError: All of it is in another encoding.
    """
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise ConfigurationError("the file is UTF-16: save it as UTF-8")
    names = _Names()
    lines: list[Line] = []
    bad: list[BadLine] = []
    for number, fields in READERS[form](data.decode("utf-8-sig", errors="surrogateescape")):
        try:
            if isinstance(fields, InvalidRequestError):
                raise fields
            asked = _request(_with_defaults(fields, defaults or {}), folder)
            lines += [names.named(number, *again) for again in _repeated(asked, repeat)]
        except InvalidRequestError as error:
            bad.append(BadLine(number, error.field, error.message))
        except RecursionError:
            bad.append(BadLine(number, "line", "the line is nested too deeply"))
    return Sheet(lines, bad)


def _with_defaults(fields: Fields, defaults: Mapping[str, Any]) -> Fields:
    every = {**defaults, **fields}
    if "webhook_url" not in every and "webhook_secret" not in fields:
        every.pop("webhook_secret", None)  # nobody would sign anything with it
    return every


def defaults_of(extra: Iterable[str], **fields: Any) -> Fields:
    """Make the fields for all lines of what options say; paths are relative to the working folder.

    Args:
        extra: As in "name=value"; the value is JSON, or text where it isn't.
        fields: By their names; None is left out.

    Raises:
        InvalidRequestError: A field can't be what is meant, or a picture can't be read.
    """
    defaults = {name: value for name, value in fields.items() if value is not None}
    if "input_images" in defaults:
        defaults["input_images"] = [picture(image, Path()) for image in defaults["input_images"]]
    more: Fields = {}
    for told in extra:
        name, equals, value = told.partition("=")
        if not equals or not name:
            raise InvalidRequestError(f"extra must look like name=value, not {told!r}", field="extra")
        try:
            more[name] = json.loads(value)
        except ValueError:
            more[name] = value
        except RecursionError as error:
            raise InvalidRequestError(f"{name} in extra is nested too deeply", field="extra") from error
    if more:
        defaults["extra"] = more
    trial: Fields = {"prompt": "a trial", **defaults}
    fingerprint_request(GenerationRequest(**trial))
    return defaults


def _request(fields: Fields, folder: Path) -> GenerationRequest:
    for name, value in fields.items():
        if name not in FIELDS:
            raise unknown(name)
        _check_texts(name, value)
    if "prompt" not in fields:
        raise InvalidRequestError("prompt is missing", field="prompt")
    images = fields.get("input_images", ())
    if isinstance(images, (list, tuple)):
        images = [picture(image, folder) for image in images]
    known: Fields = {**fields, "input_images": images}
    return GenerationRequest(**known)


def _check_texts(name: str, value: Any) -> None:
    """Find what isn't UTF-8, wherever in a field it stands."""
    match value:
        case str():
            if any("\ud800" <= letter <= "\udfff" for letter in value):
                raise InvalidRequestError(f"{name} is not UTF-8: save the file in that encoding", field=name)
            if "\0" in value:
                raise InvalidRequestError(f"{name} holds a NUL: the file may be UTF-16, save it as UTF-8", field=name)
        case list():
            for part in value:
                _check_texts(name, part)
        case dict():
            for key, part in value.items():
                _check_texts(name, key)
                _check_texts(name, part)
        case _:
            pass


def picture(source: Any, folder: Path) -> Any:
    """Take a text for a URL where it looks like one, and for a file's path elsewhere."""
    if not isinstance(source, str) or source.lower().startswith(("http://", "https://", "data:")):
        return source
    try:
        return folder / Path(source).expanduser()
    except RuntimeError as error:
        raise InvalidRequestError(f"can't find {source[:80]!r}: {error}", field="input_images") from error


def _repeated(request: GenerationRequest, times: int) -> Iterator[tuple[GenerationRequest, str]]:
    """Give a request so often, each time with its own seed and what to add to its key."""
    if times == 1:
        yield request, ""
        return
    # With a seed of its own, the first one is what it would be alone.
    first = 1 if request.seed is None else 0
    for index in range(times):
        ending = f"-{index + 1}" if index or first else ""
        yield attrs.evolve(request, seed=(request.seed or 0) + index), ending


class _Names:
    """Sees to it that each request has a key, and no two the same."""

    def __init__(self) -> None:
        self._owners: dict[str, int] = {}
        """The lines by their keys."""
        self._counts: Counter[str] = Counter()

    def named(self, number: int, request: GenerationRequest, ending: str) -> Line:
        """Give a request its key.

        Args:
            number: Its line.
            request: Perhaps with a key of its own.
            ending: What is added to that, where the line is repeated.

        Raises:
            InvalidRequestError: A picture that it names can't be read, or another line has its key.
        """
        content = fingerprint_request(request)
        if request.key is not None:
            key = f"{request.key}{ending}"
        else:
            # The key doesn't depend on the place in the file: there, lines come and go.
            words = "-".join(re.findall(r"\w+", request.prompt.lower())).encode()[:_STEM].decode(errors="ignore")
            key = "-".join(filter(None, (words.strip("-"), content.fingerprint[:_MARK])))
            self._counts[key] += 1
            if self._counts[key] > 1:
                key = f"{key}-{self._counts[key]}"
        if (owner := self._owners.setdefault(key, number)) != number:
            raise InvalidRequestError(f"key {key!r} is that of line {owner} already: each needs its own", field="key")
        return Line(number, attrs.evolve(request, key=key), content)
