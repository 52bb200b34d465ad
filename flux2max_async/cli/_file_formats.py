"""The formats of requests files: text, JSON and tables are parsed into fields, which are not validated here."""

import csv
import difflib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import attrs

from flux2max_async._exceptions import InvalidRequestError
from flux2max_async._models.request import GenerationRequest
from flux2max_async.cli._text_encoding import decode_text
from flux2max_async.cli._workbooks import Record, read_workbook

FIELDS = tuple(field.name for field in attrs.fields(GenerationRequest))
_INTEGER_FIELDS = ("seed", "width", "height", "safety_tolerance")
_MAX_CELL_LENGTH = 300_000_000
"""Characters: enough for eight images of 20 MB as data: URIs."""
_SPACES = re.compile(r"\s*")
_MAX_EXACT_FLOAT = 2**53
"""Floating-point numbers up to here have all their digits."""

Fields = dict[str, Any]
ParsedLines = Iterator[tuple[int, Fields | InvalidRequestError]]
"""Line numbers from 1, each with the line's fields by name, or with the reason why it has none."""


def guess_format(data: bytes) -> str | None:
    """Guess the format of standard input.

    Returns:
        "xlsx" for a workbook, "jsonl" for text that begins with an object, "json" for an array of objects or texts,
        "csv" for a table whose first line consists of field names, "txt" for prompts, or None if it may be a table as
        well as prompts.
    """
    if data.startswith(b"PK\3\4"):
        return "xlsx"
    text = decode_text(data, may_be_cp1252=True)[0].lstrip()
    if text.startswith("{"):
        return "jsonl"
    if re.match(r'\[\s*[{"]', text):
        return "json"
    _, cells = next(_csv_records(text), (1, list[str]()))
    if isinstance(cells, InvalidRequestError):
        return "txt"
    are_fields = [cell.strip().lower() in FIELDS for cell in cells if cell.strip()]
    if len(are_fields) > 1 and all(are_fields):
        return "csv"
    return None if text.startswith(("[", "sep=")) or (len(are_fields) > 1 and any(are_fields)) else "txt"


def _numbered_lines(text: str) -> Iterator[tuple[int, str]]:
    """Yield the lines with their numbers, for line endings of any operating system."""
    # Not str.splitlines(), which also splits at characters that may be part of a prompt.
    return enumerate(text.replace("\r\n", "\n").replace("\r", "\n").split("\n"), 1)


def parse_text(text: str) -> ParsedLines:
    """Parse a file with a prompt on each line."""
    for number, line in _numbered_lines(text):
        prompt = line.strip()
        if prompt and not prompt.startswith("#"):
            yield number, {"prompt": prompt}


def parse_jsonl(text: str) -> ParsedLines:
    """Parse a file with a JSON object on each line."""
    for number, line in _numbered_lines(text):
        if line.strip():
            try:
                fields = json.loads(line, object_pairs_hook=_reject_duplicate_names)
            except (ValueError, RecursionError) as error:
                yield number, InvalidRequestError(f"not valid JSON: {error}", field="line")
                continue
            yield number, _fields_of_object(fields)


def parse_json(text: str) -> ParsedLines:
    """Parse an array of JSON objects or prompts; each has the number of the line that it begins on."""
    decoder = json.JSONDecoder(object_pairs_hook=_reject_duplicate_names)
    position, number = 0, 1

    def skip_spaces(start: int) -> str:
        """Move to the next character that is no space, and return it."""
        nonlocal position, number
        spaces = _SPACES.match(text, start)
        assert spaces is not None
        end = spaces.end()
        number += text.count("\n", position, end)
        position = end
        return text[position : position + 1]

    if skip_spaces(0) != "[":
        reason = 'not an array such as [{"prompt": "a cat"}]; a file with an object on each line is .jsonl'
        yield number, InvalidRequestError(reason, field="line")
        return
    following = skip_spaces(position + 1)
    while following != "]":
        try:
            item, end = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            yield number, InvalidRequestError(f"not valid JSON: {error}; the rest is not read", field="line")
            return
        yield number, {"prompt": item} if isinstance(item, str) else _fields_of_object(item)
        following = skip_spaces(end)
        if following == ",":
            following = skip_spaces(position + 1)
        elif following != "]":
            yield number, InvalidRequestError("not valid JSON: a comma is missing; the rest is not read", field="line")
            return
    if skip_spaces(position + 1):
        yield number, InvalidRequestError("not valid JSON: more follows after the array", field="line")


def _fields_of_object(item: Any) -> Fields | InvalidRequestError:
    """Return the values that an object sets; null sets none."""
    if not isinstance(item, dict):
        return InvalidRequestError('not an object such as {"prompt": "a cat"}', field="line")
    fields: Fields = {name: value for name, value in item.items() if value is not None}
    for name in _INTEGER_FIELDS:
        value = fields.get(name)
        # Pandas writes the integers of a column with gaps as 1.0.
        if isinstance(value, float) and value.is_integer() and abs(value) <= _MAX_EXACT_FLOAT:
            fields[name] = int(value)
    return fields


def _reject_duplicate_names(pairs: list[tuple[str, Any]]) -> Fields:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise ValueError("an object has the same name twice")
    return fields


def parse_csv(text: str) -> ParsedLines:
    """Parse a CSV file whose first line consists of field names."""
    return parse_records(_csv_records(text))


def parse_records(records: Iterable[Record]) -> ParsedLines:
    """Parse the records of a table, of which the first consists of field names."""
    columns: list[str] | None = None
    for number, cells in records:
        if isinstance(cells, InvalidRequestError):
            yield number, cells
        elif columns is None:
            columns = [cell.strip().lower() for cell in cells]
            if problems := _validate_columns(columns):
                yield from ((number, problem) for problem in problems)
                return
        elif len(cells) > len(columns):
            problem = f"the line has {len(cells)} cells, but the first line has {len(columns)} columns"
            yield number, InvalidRequestError(problem, field="line")
        else:
            yield number, _parse_cells(zip(columns, cells, strict=False))


def _csv_records(text: str) -> Iterator[Record]:
    """Yield the cells of each record that is not empty, with the number of the record's first line."""
    skipped, delimiter, lines = _find_table(text)
    csv.field_size_limit(_MAX_CELL_LENGTH)
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    while True:
        number = skipped + reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            is_unclosed = "unexpected end" in str(error)
            reason = "a quote is opened and never closed, so it includes the rest of the file" if is_unclosed else error
            yield number, InvalidRequestError(f"not valid CSV: {reason}", field="line")
        else:
            if any(cell.strip() for cell in cells):
                yield number, cells


def _find_table(text: str) -> tuple[int, str, Iterator[str]]:
    """Return the number of lines before the table, the delimiter of its cells, and its lines."""
    delimiter = ""
    lines = [line for _, line in _numbered_lines(text)]
    for skipped, line in enumerate(lines):
        if separator := re.fullmatch('"?sep=([^"])"?', line.strip(" ")):  # a line for spreadsheet programs
            delimiter = separator[1]
        elif line.strip():
            # Spreadsheet programs write semicolons where the comma is the decimal separator.
            delimiter = delimiter or max(",;\t", key=line.count)
            return skipped, delimiter, (f"{line}\n" for line in lines[skipped:])
    return 0, ",", iter(())


def _validate_columns(columns: list[str]) -> list[InvalidRequestError]:
    problems = [unknown_field_error(name) for name in columns if name and name not in FIELDS]
    problems += [
        InvalidRequestError("the first line has this column twice", field=name)
        for name, count in Counter(columns).items()
        if count > 1 and name in FIELDS
    ]
    return problems


def _parse_cells(cells: Iterable[tuple[str, str]]) -> Fields | InvalidRequestError:
    fields: Fields = {}
    for position, (name, cell) in enumerate(cells):
        text = cell.strip()
        if not text or (position == 0 and not name and text.isdecimal()):  # the row numbers that pandas writes
            continue
        try:
            if not name:
                return InvalidRequestError(f"{text[:80]!r} is in a column without a name", field="line")
            if name in _INTEGER_FIELDS:
                fields[name] = _parse_integer(text)
            elif name == "input_images":
                # The semicolon of a data: URI doesn't separate images.
                fields[name] = [source.strip() for source in re.split(r";(?!base64,)", text) if source.strip()]
            elif name == "extra":
                fields[name] = json.loads(text)
            else:
                fields[name] = text
        except (ValueError, RecursionError):
            expected = "an integer" if name in _INTEGER_FIELDS else 'JSON such as {"name": 1}'
            return InvalidRequestError(f"{name} must be {expected}, not {text[:80]!r}", field=name)
    return fields


def _parse_integer(text: str) -> int:
    # int() also takes 1_000, and pandas writes the integers of a column with gaps as 1.0.
    if (match := re.fullmatch(r"([+-]?[0-9]+)(\.0*)?", text)) is None:
        raise ValueError
    return int(match[1])


def unknown_field_error(name: str) -> InvalidRequestError:
    """Return the error for a field that doesn't exist, with a suggestion."""
    close_matches = difflib.get_close_matches(name, FIELDS, 1)
    hint = f"did you mean {close_matches[0]}?" if close_matches else f"the fields are {', '.join(FIELDS)}"
    return InvalidRequestError(f"there is no field {name[:80]!r}: {hint}", field=name[:80])


PARSERS: dict[str, Callable[[str], ParsedLines]] = {
    "txt": parse_text,
    "jsonl": parse_jsonl,
    "json": parse_json,
    "csv": parse_csv,
}
"""Of text, by file suffix, without the dot."""
FORMATS = (*PARSERS, "xlsx")
"""All formats, by file suffix, without the dot."""


def parse_file(data: bytes, file_format: str) -> tuple[ParsedLines, list[str]]:
    """Parse a file of one of `FORMATS`; return its lines, and notes for the user."""
    if file_format == "xlsx":
        records, notes = read_workbook(data)
        return parse_records(records), notes
    text, note = decode_text(data, may_be_cp1252=file_format in {"txt", "csv"})
    return PARSERS[file_format](text), [] if note is None else [note]
