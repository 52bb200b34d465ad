"""Workbooks of Excel (.xlsx), read as tables of text."""

import io
import warnings
from collections.abc import Iterator
from typing import Any

from flux2max_async._exceptions import InvalidRequestError

Record = tuple[int, list[str] | InvalidRequestError]
"""The number of a row from 1, with its cells, or with the reason why it has none."""


def read_workbook(data: bytes) -> tuple[list[Record], list[str]]:
    """Return the rows of the first sheet that are not empty, and notes for the user.

    Raises:
        ModuleNotFoundError: openpyxl is not installed.
    """
    import openpyxl  # noqa: PLC0415 - it needs the extra `excel`

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about styles and other things that have no effect here
            # Formulas have the results that Excel has stored.
            book = openpyxl.load_workbook(io.BytesIO(data), read_only=True, data_only=True)
            sheets = [sheet for sheet in book.worksheets if sheet.sheet_state == "visible"]
            sheets[0].reset_dimensions()  # they are wrong in the files of some programs
            records = list(_read_rows(sheets[0].iter_rows()))
    except Exception as error:  # noqa: BLE001 - damaged files raise errors of any kind
        reason = f"not a readable .xlsx workbook, or protected by a password ({type(error).__name__})"
        return [(1, InvalidRequestError(reason, field="line"))], []
    notes = [f"only its first sheet is read, {sheets[0].title!r}"] if len(sheets) > 1 else []
    return records, notes


def _read_rows(rows: Any) -> Iterator[Record]:
    for number, row in enumerate(rows, 1):
        if errors := [str(cell.value) for cell in row if getattr(cell, "data_type", None) == "e"]:
            yield number, InvalidRequestError(f"a cell has the error {errors[0][:80]}", field="line")
        elif any(cells := ["" if cell.value is None else str(cell.value) for cell in row]):
            yield number, cells
