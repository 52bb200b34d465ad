"""Reading a whole journal, page by page, and exporting it. Sessions may use the file; nothing is written into it."""

import contextlib
import errno
import json
import secrets
import sqlite3
from collections.abc import AsyncGenerator, Generator, Iterable
from io import TextIOWrapper
from pathlib import Path

import anyio.to_thread

from flux2max_async._exceptions import JournalError
from flux2max_async.journal._entry import JournalEntry
from flux2max_async.journal._rows import SELECT, decode_text, entry_from_row, row_id
from flux2max_async.journal._schema import (
    check_version,
    connect_read_only,
    has_token_column,
    roll_back,
    translate_sqlite_errors,
)
from flux2max_async.journal._store_protocol import Row

_BUSY_TIMEOUT = 10.0  # seconds
_ENTRIES_PER_PAGE = 500

Page = list[JournalEntry | JournalError]
"""Some entries; for each that is damaged, the error."""


async def read_pages(path: Path) -> AsyncGenerator[Page]:
    """Yield all entries of a journal, the oldest first. They are read in a thread, a page at a time.

    Raises:
        JournalError: The file can't be read, or isn't a journal.
    """
    last_id = 0
    while page := await anyio.to_thread.run_sync(_read_page, path, last_id):
        last_id = page[-1][0]
        yield [entry for _, entry in page]


async def export(pages: AsyncGenerator[list[JournalEntry]], target: Path) -> None:
    """Write entries to a file as JSON Lines, a page at a time, and replace the file once all are written.

    Raises:
        OSError: The file can't be written, or is a device or the like.
    """
    with _replacing(target) as file:
        async for page in pages:
            await anyio.to_thread.run_sync(_write, file, page)


def _read_page(path: Path, after: int) -> list[tuple[int, JournalEntry | JournalError]]:
    """Return the entries that follow a row id, with their own row ids."""
    with translate_sqlite_errors(path):
        try:
            return _read_rows(path, after)
        except sqlite3.OperationalError as error:
            if not str(getattr(error, "sqlite_errorname", "")).startswith("SQLITE_READONLY"):
                raise
        roll_back(path, _BUSY_TIMEOUT)
        return _read_rows(path, after)


def _read_rows(path: Path, after: int) -> list[tuple[int, JournalEntry | JournalError]]:
    with contextlib.closing(connect_read_only(path, _BUSY_TIMEOUT)) as connection:
        connection.text_factory = decode_text
        check_version(connection, path)
        if not connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
            return []  # the process that created the file was killed before it created the tables
        select = SELECT if has_token_column(connection) else SELECT.replace("e.token", "NULL")
        rows = connection.execute(f"{select} WHERE e.id > ? ORDER BY e.id LIMIT ?", (after, _ENTRIES_PER_PAGE))
        return [(row_id(row), _entry_or_error(path, row)) for row in rows]


def _entry_or_error(path: Path, row: Row) -> JournalEntry | JournalError:
    try:
        return entry_from_row(path, row)
    except JournalError as error:
        return error


@contextlib.contextmanager
def _replacing(target: Path) -> Generator[TextIOWrapper]:
    """Yield a new file, which replaces the target if all went well."""
    target = target.resolve()  # a link stays one
    if target.exists() and not target.is_file():
        raise OSError(errno.EINVAL, "not a regular file", str(target))
    part = target.with_name(f".{secrets.token_hex(8)}.part")
    try:
        with part.open("x", encoding="utf-8", errors="backslashreplace", newline="\n") as file:
            yield file
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)


def _write(file: TextIOWrapper, entries: Iterable[JournalEntry]) -> None:
    file.writelines(f"{json.dumps(entry.to_dict(), ensure_ascii=False)}\n" for entry in entries)
