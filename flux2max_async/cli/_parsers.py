"""The formats of sheets: text, JSON Lines or CSV becomes fields by name, line by line, as they stand in the file."""

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

FIELDS = tuple(field.name for field in attrs.fields(GenerationRequest))
_NUMBERS = ("seed", "width", "height", "safety_tolerance")
_LONGEST_CELL = 300_000_000
"""Characters: eight pictures of 20 MB as data: URIs."""

Fields = dict[str, Any]
Raw = Iterator[tuple[int, Fields | InvalidRequestError]]
"""The numbers of lines, and their fields by name, or why there are none."""


def guessed_form(data: bytes) -> str | None:
    """Guess what is read from standard input: objects, a table whose first line names fields, or prompts.

    None where that is in doubt.
    """
    text = data.decode("utf-8-sig", errors="replace").lstrip()
    if text.startswith("{"):
        return "jsonl"
    _, cells = next(_records(text), (1, list[str]()))
    if isinstance(cells, InvalidRequestError):
        return "txt"
    named = [cell.strip().lower() in FIELDS for cell in cells if cell.strip()]
    if len(named) > 1 and all(named):
        return "csv"
    return None if text.startswith(("[", "sep=")) or (len(named) > 1 and any(named)) else "txt"


def _numbered(text: str) -> Iterator[tuple[int, str]]:
    """Give the lines with their numbers, whichever system has ended them."""
    return enumerate(text.replace("\r\n", "\n").replace("\r", "\n").split("\n"), 1)


def prompts(text: str) -> Raw:
    """Read a prompt a line."""
    for number, line in _numbered(text):
        prompt = line.strip()
        if prompt and not prompt.startswith("#"):
            yield number, {"prompt": prompt}


def objects(text: str) -> Raw:
    """Read an object a line."""
    for number, line in _numbered(text):
        if line.strip():
            try:
                fields = json.loads(line, object_pairs_hook=_named_once)
            except (ValueError, RecursionError) as error:
                yield number, InvalidRequestError(f"not valid JSON: {error}", field="line")
                continue
            if isinstance(fields, dict):
                yield number, {name: value for name, value in fields.items() if value is not None}
            else:
                yield number, InvalidRequestError('not an object, as in {"prompt": "a cat"}', field="line")


def _named_once(pairs: list[tuple[str, Any]]) -> Fields:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise ValueError("a name stands in it twice")
    return fields


def table(text: str) -> Raw:
    """Read CSV, whose first line names the fields."""
    columns: list[str] | None = None
    for number, cells in _records(text):
        if isinstance(cells, InvalidRequestError):
            yield number, cells
        elif columns is None:
            columns = [cell.strip().lower() for cell in cells]
            if problems := _problems_of(columns):
                yield from ((number, problem) for problem in problems)
                return
        elif len(cells) > len(columns):
            problem = f"the line has {len(cells)} cells, but the first one names {len(columns)} columns"
            yield number, InvalidRequestError(problem, field="line")
        else:
            yield number, _fields_of(zip(columns, cells, strict=False))


def _records(text: str) -> Iterator[tuple[int, list[str] | InvalidRequestError]]:
    """Give the cells of each record that has any, with the number of its first line."""
    before, delimiter, rest = _table_in(text)
    csv.field_size_limit(_LONGEST_CELL)
    reader = csv.reader(rest, delimiter=delimiter, strict=True)
    while True:
        number = before + reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            endless = "unexpected end" in str(error)
            reason = "a quote is opened and never closed, so that all that follows belongs to it" if endless else error
            yield number, InvalidRequestError(f"not valid CSV: {reason}", field="line")
        else:
            if any(cell.strip() for cell in cells):
                yield number, cells


def _table_in(text: str) -> tuple[int, str, Iterator[str]]:
    """Find where the table begins, what separates its cells, and its lines."""
    delimiter = ""
    lines = [line for _, line in _numbered(text)]
    for before, line in enumerate(lines):
        if told := re.fullmatch('"?sep=([^"])"?', line.strip(" ")):  # so that a spreadsheet knows
            delimiter = told[1]
        elif line.strip():
            # Spreadsheets write semicolons where the comma stands in numbers.
            delimiter = delimiter or max(",;\t", key=line.count)
            return before, delimiter, (f"{line}\n" for line in lines[before:])
    return 0, ",", iter(())


def _problems_of(columns: list[str]) -> list[InvalidRequestError]:
    problems = [unknown(name) for name in columns if name and name not in FIELDS]
    problems += [
        InvalidRequestError("the first line names this column twice", field=name)
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
            if not name:
                return InvalidRequestError(f"{text[:80]!r} stands in a column without a name", field="line")
            if name in _NUMBERS:
                fields[name] = _integer(text)
            elif name == "input_images":
                # The semicolon in a data: URI separates nothing.
                fields[name] = [part.strip() for part in re.split(r";(?!base64,)", text) if part.strip()]
            elif name == "extra":
                fields[name] = json.loads(text)
            else:
                fields[name] = text
        except (ValueError, RecursionError):
            wanted = "an integer" if name in _NUMBERS else 'JSON, as in {"name": 1}'
            return InvalidRequestError(f"{name} must be {wanted}, not {text[:80]!r}", field=name)
    return fields


def _integer(text: str) -> int:
    if not re.fullmatch("[+-]?[0-9]+", text):
        raise ValueError
    return int(text)


def unknown(name: str) -> InvalidRequestError:
    close = difflib.get_close_matches(name, FIELDS, 1)
    hint = f"did you mean {close[0]}?" if close else f"the fields are {', '.join(FIELDS)}"
    return InvalidRequestError(f"there is no field {name[:80]!r}: {hint}", field=name[:80])


READERS: dict[str, Callable[[str], Raw]] = {"txt": prompts, "jsonl": objects, "csv": table}
"""By the endings of files."""
