"""Reading and pruning a whole journal in PostgreSQL, over a connection of its own. Sessions may use it meanwhile."""

import contextlib
from collections.abc import AsyncGenerator, Generator
from typing import TYPE_CHECKING, Any

import anyio.to_thread

from flux2max_async._exceptions import JournalError
from flux2max_async._postgres import LIVING, PostgresAddress
from flux2max_async.journal._entry import JournalEntry
from flux2max_async.journal._postgres_schema import check_version
from flux2max_async.journal._postgres_store import SELECT_LIVING
from flux2max_async.journal._rows import entry_from_row, row_id

if TYPE_CHECKING:
    from psycopg import Connection

    from flux2max_async.journal._reader import Page

_ENTRIES_PER_PAGE = 500
_ENTRIES_PER_TRANSACTION = 500
_ANSWER_TIME = 120.0
"""Seconds for a page of a large journal."""


class MissingJournalError(JournalError):
    """There is no journal in the schema."""


async def read_pages(address: PostgresAddress, lease: float) -> AsyncGenerator["Page"]:
    """Yield all entries of a journal, the oldest first. They are read in a thread, a page at a time.

    Raises:
        JournalError: It can't be read, or there is none.
    """
    connection = await anyio.to_thread.run_sync(_connect, address, lease)
    try:
        last_id = 0
        while page := await anyio.to_thread.run_sync(_read_page, connection, address, last_id):
            last_id = page[-1][0]
            yield [entry for _, entry in page]
    finally:
        connection.close()


def prune_schema(address: PostgresAddress, lease: float, before: float, limit: int) -> int:
    """Forget entries that ended before a time, the oldest first, and return how many.

    What must hold is what `_prune` says of files.

    Args:
        address: The journal.
        lease: Seconds without a reaction after which the connection counts as lost.
        before: The time, in seconds since the epoch.
        limit: The maximum number of entries.

    Raises:
        JournalError: It can't be read or written, or there is none. Some entries may be forgotten already.
    """
    pruned = last_id = 0
    connection = _connect(address, lease)
    with contextlib.closing(connection), _translated(address):
        while pruned < limit:
            ids = _delete(connection, before, last_id, min(limit - pruned, _ENTRIES_PER_TRANSACTION))
            if not ids:
                break
            pruned, last_id = pruned + len(ids), max(ids)
    return pruned


def _connect(address: PostgresAddress, lease: float) -> "Connection[Any]":
    with _translated(address):
        connection = address.connect("flux2max reader", lease, _ANSWER_TIME)
        try:
            exists = check_version(connection, address)
        except BaseException:
            connection.close()
            raise
    if not exists:
        connection.close()
        raise MissingJournalError(f"there is no journal in the schema {address.schema} of {address}")
    return connection


def _read_page(
    connection: "Connection[Any]", address: PostgresAddress, after: int
) -> list[tuple[int, JournalEntry | JournalError]]:
    statement = f"{SELECT_LIVING} WHERE e.id > %s ORDER BY e.id LIMIT %s"
    with _translated(address):
        rows = connection.execute(statement.encode(), (after, _ENTRIES_PER_PAGE)).fetchall()
    page: list[tuple[int, JournalEntry | JournalError]] = []
    for row in rows:
        try:
            page.append((row_id(row), entry_from_row(address, row)))
        except JournalError as error:
            page.append((row_id(row), error))
    return page


def _delete(connection: "Connection[Any]", before: float, after_id: int, limit: int) -> list[int]:
    def has_ended(entry: str) -> str:
        return (
            f"({entry}.state IN ('completed', 'failed', 'refused')"
            f" AND coalesce({entry}.ended, {entry}.submitted, {entry}.created) < %(before)s"
            f" AND ({entry}.owner IS NULL OR {entry}.owner NOT IN (SELECT id FROM living)))"
        )

    statement = (
        f"WITH living AS MATERIALIZED (SELECT id FROM owners WHERE lock IN ({LIVING})), ended AS ("
        f" SELECT e.id FROM entries e WHERE e.id > %(after)s AND {has_ended('e')}"
        f" AND NOT EXISTS (SELECT 1 FROM entries p WHERE p.key = e.key AND p.attempt < e.attempt"
        f" AND {has_ended('p')} IS NOT TRUE) ORDER BY e.id LIMIT %(limit)s FOR UPDATE OF e SKIP LOCKED)"
        " DELETE FROM entries WHERE id IN (SELECT id FROM ended) RETURNING id"
    )
    values = {"after": after_id, "before": before, "limit": limit}
    rows = connection.execute(statement.encode(), values).fetchall()
    return [entry_id for (entry_id,) in rows]


@contextlib.contextmanager
def _translated(address: PostgresAddress) -> Generator[None]:
    """Raise errors of psycopg as JournalError, without a password."""
    from psycopg import Error  # noqa: PLC0415 - optional

    try:
        yield
    except Error as error:
        failure = address.error(JournalError, "the journal", error)
        raise failure from failure.__cause__
