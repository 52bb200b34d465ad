"""The journal in PostgreSQL."""

import time
from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING

from flux2max_async._config import validate_seconds
from flux2max_async._postgres import PostgresAddress
from flux2max_async.journal._store_journal import StoreJournal

if TYPE_CHECKING:
    from flux2max_async.journal._reader import Page
    from flux2max_async.journal._store_protocol import JournalStore

_MAX_SECONDS = 3600.0


class PostgresJournal(StoreJournal):
    """A journal in a schema of a PostgreSQL database, for any number of processes on any number of hosts at once.

    Needs psycopg: `pip install 'flux2max_async[postgres]'`. Each session that uses it has one connection, which must
    not go through a pooler in transaction mode: an advisory lock of the connection shows that the session is alive.
    Tasks of a session whose process has died are taken over within about 2 seconds.

    Intents are committed before their submits are sent. If the connection is lost, it is made anew. What is requested
    meanwhile waits, for up to 30 seconds; after that it fails with a JournalError, and what couldn't be recorded is
    kept and written later.

    Args:
        conninfo: The address of the database, as a URL or in libpq's form. What it leaves out is taken from libpq's
            environment variables and `~/.pgpass`, so that the password need not be part of it.
        schema: The schema of the tables. It is created if it doesn't exist.
        lease: Seconds after which the server drops a host whose connection is neither alive nor closed, because it has
            lost its power or its network.

    Raises:
        ConfigurationError: An argument is wrong, or psycopg is not installed.
    """

    def __init__(self, conninfo: str, *, schema: str = "flux2max", lease: float = 12.0) -> None:
        self._address = PostgresAddress.parse(conninfo, schema)
        super().__init__(self._address, validate_seconds("lease", lease, maximum=_MAX_SECONDS))

    def __repr__(self) -> str:
        return f"PostgresJournal({str(self._address)!r}, schema={self._address.schema!r})"

    def _open_store(self, *, watch_changes: bool) -> "JournalStore":  # noqa: ARG002 - the server tells of all changes
        from flux2max_async.journal._postgres_store import PostgresStore  # noqa: PLC0415 - only open journals load it

        return PostgresStore(self._address, self._lease)

    def _read_pages(self) -> "AsyncGenerator[Page]":
        from flux2max_async.journal._postgres_reader import read_pages  # noqa: PLC0415 - as above

        return read_pages(self._address, self._lease)

    def _prune(self, older_than: float, limit: int) -> int:
        from flux2max_async.journal._postgres_reader import prune_schema  # noqa: PLC0415 - as above

        return prune_schema(self._address, self._lease, time.time() - older_than, limit)
