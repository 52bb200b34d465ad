"""Journals in the database that the tests run against: SQLite files, or schemas of a PostgreSQL server.

`--backend` chooses it. A path stands for a journal in both: for the name of its file, or of its schema.
"""

import hashlib
import sqlite3
from collections.abc import AsyncGenerator
from contextlib import closing
from pathlib import Path
from typing import Any

from flux2max_async import PostgresJournal, SqliteJournal
from flux2max_async.journal._reader import Page
from flux2max_async.journal._store_journal import StoreJournal
from flux2max_async.journal._store_protocol import JournalStore
from support.postgres import PostgresServer
from support.virtual_time import PausesClock

_servers: list[PostgresServer] = []
"""The server that the tests run against; empty for SQLite."""


def use_server(server: PostgresServer) -> None:
    """Let journals be schemas of this server from now on."""
    _servers[:] = [server]


def uses_server() -> bool:
    """Check whether journals are schemas of a server."""
    return bool(_servers)


def schema_of(path: Path) -> str:
    """Return the schema that a path stands for."""
    return f"j{hashlib.blake2b(str(path.absolute()).encode(), digest_size=12).hexdigest()}"


class AnyJournal(StoreJournal):
    """A journal in the database that the tests run against."""

    def __init__(self, path: Path, *, lease: float = 12.0) -> None:
        self.path = path
        self._inner: StoreJournal = (
            PostgresJournal(_servers[0].conninfo(), schema=schema_of(path), lease=lease)
            if _servers
            else SqliteJournal(path, lease=lease)
        )
        super().__init__(self._inner._name, lease)

    def _open_store(self, *, watch_changes: bool) -> JournalStore:
        return self._inner._open_store(watch_changes=watch_changes)

    def _read_pages(self) -> AsyncGenerator[Page]:
        return self._inner._read_pages()

    def _prune(self, older_than: float, limit: int) -> int:
        return self._inner._prune(older_than, limit)


class VirtualAnyJournal(PausesClock, AnyJournal):
    """The same, in virtual time."""


def execute(path: Path, statement: str, *values: object) -> list[tuple[Any, ...]]:
    """Run a statement over another connection, with `?` for each value."""
    if not _servers:
        with closing(sqlite3.connect(path)) as connection, connection:
            return connection.execute(statement, values).fetchall()
    import psycopg  # noqa: PLC0415 - only where the tests run against a server

    options = f"-csearch_path={schema_of(path)}"
    with psycopg.connect(_servers[0].conninfo(), options=options, autocommit=True) as server:
        cursor = server.execute(statement.replace("?", "%s").encode(), values or None)
        return cursor.fetchall() if cursor.description else []


def stored_bytes(path: Path) -> bytes:
    """Return all that a journal has stored, whatever the format is."""
    if _servers:
        return "".join(text for (text,) in execute(path, "SELECT e::text FROM entries e")).encode()
    return b"".join(file.read_bytes() for file in path.parent.glob(f"{path.name}*"))


def add_dead_owner(path: Path, owner: str = "them") -> None:
    """Add an owner whose process has ended, and that nobody has noticed yet."""
    if _servers:
        execute(path, "INSERT INTO owners VALUES (?, 1)", owner)
    else:
        from flux2max_async.journal._schema import host_id  # noqa: PLC0415 - only of files

        execute(path, "INSERT INTO owners VALUES (?, 1, 60, ?, ?)", owner, host_id(), 2**22 + 1)
