"""A file of requests: text, JSON Lines or CSV becomes requests, and each line that can't is told with its reason."""

import csv
import difflib
import io
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import attrs

from flux2max_async._content import Content, content_of
from flux2max_async._errors import InvalidRequestError
from flux2max_async._request import GenerationRequest

FORMATS = ("txt", "jsonl", "csv")
FIELDS = tuple(field.name for field in attrs.fields(GenerationRequest))
_NUMBERS = ("seed", "width", "height", "safety_tolerance")
_STEM = 60
"""Bytes of a prompt that go into the name of its picture."""
_MARK = 8
"""Characters of the fingerprint of what is asked for, which make the name that of nothing else."""
_LONGEST_CELL = 300_000_000
"""Characters: eight pictures of 20 MB as data: URIs."""


@attrs.frozen
class Line:
    """One request of a sheet."""

    number: int
    """The line in the file, counted from 1."""
    request: GenerationRequest
    """With a key: its own, or one made of its prompt and of a fingerprint of all that it asks for."""
    content: Content

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


Fields = dict[str, Any]
Raw = Iterator[tuple[int, Fields | InvalidRequestError]]
"""The lines as they stand in the file: fields by name, or why there are none."""


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
    """
    read: Callable[[str], Raw] = {"txt": _text, "jsonl": _json_lines, "csv": _csv}[form]
    names = _Names()
    lines: list[Line] = []
    bad: list[BadLine] = []
    for number, fields in read(data.decode("utf-8-sig", errors="surrogateescape")):
        try:
            if isinstance(fields, InvalidRequestError):
                raise fields
            asked = _request({**(defaults or {}), **fields}, folder)
            lines += [names.named(number, again, index) for index, again in enumerate(_repeated(asked, repeat))]
        except InvalidRequestError as error:
            bad.append(BadLine(number, error.field, error.message))
    return Sheet(lines, bad)


def defaults_of(extra: Iterable[str], **fields: Any) -> Fields:
    """Make the fields for all lines of what options say; paths are relative to the working folder.

    Args:
        extra: As in "name=value"; the value is JSON, or text where it isn't.
        fields: By their names; None is left out.

    Raises:
        InvalidRequestError: A field can't be what is meant.
    """
    defaults = {name: value for name, value in fields.items() if value is not None}
    if "input_images" in defaults:
        defaults["input_images"] = [picture(image, Path()) for image in defaults["input_images"]]
    more: Fields = {}
    for told in extra:
        name, equals, value = told.partition("=")
        if not equals or not name:
            raise InvalidRequestError(f"extra must look like name=value, not {told!r}", "extra")
        try:
            more[name] = json.loads(value)
        except ValueError:
            more[name] = value
    if more:
        defaults["extra"] = more
    trial: Fields = {"prompt": "a trial", **defaults}
    GenerationRequest(**trial)
    return defaults


# ---------------------------------------------------------------------- the formats


def _text(text: str) -> Raw:
    for number, line in enumerate(text.split("\n"), 1):
        prompt = line.strip()
        if prompt and not prompt.startswith("#"):
            yield number, {"prompt": prompt}


def _json_lines(text: str) -> Raw:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                fields = json.loads(line)
            except (ValueError, RecursionError) as error:
                yield number, InvalidRequestError(f"the line is no JSON: {error}", "line")
                continue
            if isinstance(fields, dict):
                yield number, {name: value for name, value in fields.items() if value is not None}
            else:
                yield number, InvalidRequestError('the line must be an object, as in {"prompt": "a cat"}', "line")


def _csv(text: str) -> Raw:
    head, _, _ = text.partition("\n")
    # Spreadsheets write semicolons where the comma stands in numbers.
    delimiter = max(",;\t", key=head.count)
    csv.field_size_limit(_LONGEST_CELL)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    columns: list[str] | None = None
    while True:
        number = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield number, InvalidRequestError(f"the line is no CSV: {error}", "line")
            continue
        if not any(cell.strip() for cell in cells):
            continue
        if columns is None:
            columns = [cell.strip().lower() for cell in cells]
            if problems := _problems_of(columns):
                for problem in problems:
                    yield number, problem
                return
        elif len(cells) > len(columns):
            yield (
                number,
                InvalidRequestError(
                    f"the line has {len(cells)} cells, but the first one names {len(columns)} columns", "line"
                ),
            )
        else:
            yield number, _fields_of(zip(columns, cells, strict=False))


def _problems_of(columns: list[str]) -> list[InvalidRequestError]:
    problems = [_unknown(name) for name in columns if name not in FIELDS]
    problems += [
        InvalidRequestError("the first line names this column twice", name)
        for name, count in Counter(columns).items()
        if count > 1 and name in FIELDS
    ]
    return problems


def _fields_of(cells: Iterable[tuple[str, str]]) -> Fields | InvalidRequestError:
    fields: Fields = {}
    for name, cell in cells:
        text = cell.strip()
        if not text:
            continue
        try:
            if name in _NUMBERS:
                fields[name] = int(text)
            elif name == "input_images":
                # The semicolon in a data: URI separates nothing.
                fields[name] = [part.strip() for part in re.split(r";(?!base64,)", text) if part.strip()]
            elif name == "extra":
                fields[name] = json.loads(text)
            else:
                fields[name] = text
        except (ValueError, RecursionError):
            wanted = "an integer" if name in _NUMBERS else 'JSON, as in {"name": 1}'
            return InvalidRequestError(f"{name} must be {wanted}, not {text[:80]!r}", name)
    return fields


# ---------------------------------------------------------------------- the requests


def _request(fields: Fields, folder: Path) -> GenerationRequest:
    for name, value in fields.items():
        if name not in FIELDS:
            raise _unknown(name)
        for text in (name, value):
            if isinstance(text, str) and any("\ud800" <= letter <= "\udfff" for letter in text):
                raise InvalidRequestError(f"{name} is not UTF-8: save the file in that encoding", name)
    if "prompt" not in fields:
        raise InvalidRequestError("prompt is missing", "prompt")
    images = fields.get("input_images", ())
    if isinstance(images, (list, tuple)):
        images = [picture(image, folder) for image in images]
    known: Fields = {**fields, "input_images": images}
    return GenerationRequest(**known)


def picture(source: Any, folder: Path) -> Any:
    """Take a text for a URL where it looks like one, and for a file's path elsewhere."""
    if not isinstance(source, str) or source.lower().startswith(("http://", "https://", "data:")):
        return source
    return folder / Path(source).expanduser()


def _unknown(name: str) -> InvalidRequestError:
    close = difflib.get_close_matches(name, FIELDS, 1)
    hint = f"did you mean {close[0]}?" if close else f"the fields are {', '.join(FIELDS)}"
    return InvalidRequestError(f"there is no field {name[:80]!r}: {hint}", name[:80])


def _repeated(request: GenerationRequest, times: int) -> Iterator[GenerationRequest]:
    if times == 1:
        yield request
    else:
        for seed in range(request.seed or 0, (request.seed or 0) + times):
            yield attrs.evolve(request, seed=seed)


class _Names:
    """Sees to it that each request has a key, and no two the same."""

    def __init__(self) -> None:
        self._owners: dict[str, int] = {}
        """The lines by their keys."""
        self._counts: Counter[str] = Counter()

    def named(self, number: int, request: GenerationRequest, index: int) -> Line:
        """Give a request its key.

        Args:
            number: Its line.
            request: Perhaps with a key of its own.
            index: Which of the line's pictures it is, from 0.

        Raises:
            InvalidRequestError: A picture that it names can't be read, or another line has its key.
        """
        content = content_of(request)
        if request.key is not None:
            key = request.key if index == 0 else f"{request.key}-{index + 1}"
        else:
            # The key doesn't depend on the place in the file: there, lines come and go.
            words = "-".join(re.findall(r"\w+", request.prompt.lower())).encode()[:_STEM].decode(errors="ignore")
            key = "-".join(filter(None, (words.strip("-"), content.fingerprint[:_MARK])))
            self._counts[key] += 1
            if self._counts[key] > 1:
                key = f"{key}-{self._counts[key]}"
        if (owner := self._owners.setdefault(key, number)) != number:
            raise InvalidRequestError(f"key {key!r} is that of line {owner} already: each needs its own", "key")
        return Line(number, attrs.evolve(request, key=key), content)
