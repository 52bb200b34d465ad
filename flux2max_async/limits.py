"""Limits on the tasks in flight that several processes share.

    async with FluxSession(max_in_flight=SqliteInFlightLimit("limit.db", 24)) as session:
        ...

Each worker of a web server opens the same file; together they have 24 slots. On several hosts, it is a database:

    async with FluxSession(max_in_flight=PostgresInFlightLimit("postgresql://db.example/flux", 24)) as session:
        ...
"""

import os
from abc import abstractmethod
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

from flux2max_async._config import validate_count
from flux2max_async._exceptions import InFlightLimitError
from flux2max_async._forks import check_process
from flux2max_async._in_flight_limit import InFlightLimit

if TYPE_CHECKING:
    from flux2max_async._shared_limit.connection import LimitConnection
    from flux2max_async._shared_limit.worker import LimitWorker

__all__ = ["InFlightLimit", "PostgresInFlightLimit", "SqliteInFlightLimit"]


class _CountedLimit(InFlightLimit):
    """A limit whose slots a thread counts in a database."""

    def __init__(self, limit: int) -> None:
        validate_count("limit", limit)
        self._limit = limit
        self._expects_adoption = False
        self._worker: LimitWorker | None = None
        self._process_id = 0
        """Of the process that has opened it."""

    @property
    def limit(self) -> int:
        """The number of slots in all."""
        return self._limit

    def expect_adoption(self) -> None:
        """Learn, before `open()`, that the session has a journal."""
        self._expects_adoption = True

    async def open(self) -> None:
        """Open the file or the database, or create what is missing.

        Raises:
            InFlightLimitError: It can't be opened, or is another program's.
        """
        from flux2max_async._shared_limit.worker import LimitWorker  # noqa: PLC0415 - only sessions that share load it

        if self._worker is not None:
            if not self._worker.loop_is_closed:
                self._check_process()
                raise InFlightLimitError(
                    f"the limit {self._name} is open already: each session needs a {type(self).__name__} of its own"
                )
            self._worker.stop()
        self._process_id = os.getpid()
        self._worker = worker = LimitWorker(self._connection())
        try:
            await worker.opened
        except BaseException:
            self._worker = None
            worker.stop()
            raise

    async def acquire(self) -> None:
        """Wait for a slot, and take it. If the wait is cancelled, none is taken.

        Raises:
            InFlightLimitError: The limit is not open, or can't be used for 30 seconds.
        """
        await self._open_worker().acquire()

    def occupy(self) -> None:
        """Count a task that runs already, even above the limit."""
        self._open_worker().occupy()

    def release(self) -> None:
        """Release a slot; closing has released all."""
        if self._worker is not None:
            self._check_process()
            self._worker.release()

    async def close(self) -> None:
        """Release all slots, and close the limit. Closing it twice does no harm."""
        if self._worker is not None:
            self._check_process()
        worker, self._worker = self._worker, None
        self._expects_adoption = False
        if worker is not None and not worker.loop_is_closed:
            worker.stop()
            await worker.stopped

    def _open_worker(self) -> "LimitWorker":
        if self._worker is None:
            raise InFlightLimitError(f"the limit {self._name} is not open")
        self._check_process()
        return self._worker

    def _check_process(self) -> None:
        check_process(self._process_id, "limit", InFlightLimitError)

    @property
    @abstractmethod
    def _name(self) -> str:
        """Where the slots are counted."""

    @abstractmethod
    def _connection(self) -> "LimitConnection":
        """Return a new connection to where they are counted."""


class SqliteInFlightLimit(_CountedLimit):
    """A limit in an SQLite file, for any number of processes on one machine.

    Slots go to the processes in turn: to the one that has waited longest since its last slot, whoever has more requests
    waiting. Each submits into a slot as soon as it has it, so all slots are in use while anybody has requests.

    The slots of a process that dies are free again within a tenth of a second. If its session had a journal, they count
    until a session that adopts its tasks has taken them over, or for 10 seconds, in which adoption happens by default.

    While the file can't be used, requests wait for up to 30 seconds, and then fail with InFlightLimitError.

    Windows lacks the named pipes that it needs: there, opening it is an InFlightLimitError.

    Args:
        path: The file; not that of a journal, and in no folder that is tidied: where it is deleted while it is open, a
            new one counts from zero for up to a second. It is created, with its folder, if it doesn't exist. Beside it
            are two files of SQLite and a named pipe of each process.
        limit: The number of slots. Each process keeps to its own, if they differ.

    Raises:
        ConfigurationError: The limit is not an integer of at least 1.
    """

    def __init__(self, path: str | PathLike[str], limit: int) -> None:
        super().__init__(limit)
        self.path: Path = Path(path)

    def __repr__(self) -> str:
        return f"SqliteInFlightLimit({str(self.path)!r}, {self._limit})"

    @property
    def _name(self) -> str:
        return str(self.path)

    def _connection(self) -> "LimitConnection":
        from flux2max_async._shared_limit.sqlite import SqliteConnection  # noqa: PLC0415 - loads sqlite3

        return SqliteConnection(self.path, self._limit, keep_after_death=self._expects_adoption)


class PostgresInFlightLimit(_CountedLimit):
    """A limit in a PostgreSQL database, for any number of processes on any number of hosts.

    Slots go to the sessions in turn, as with SqliteInFlightLimit: to the one that has waited longest since its last
    slot, whoever has more requests waiting. It needs the extra `postgres`. Everything is in one schema, which is
    created if it doesn't exist; a PostgresJournal may be in the same one.

    If a host dies, or loses its connection and isn't back within 1.5 seconds, others get its slots. If it loses its
    power or its network, the server notices that within 12 seconds. Its tasks may still run then: with a
    PostgresJournal in the same schema, each counts until it has ended, whoever follows it; without one, or with another
    journal, they don't count any more. A submit whose answer was lost with its host doesn't count.

    While the database can't be used, the slots that a session holds stay its own, and its requests wait for up to 30
    seconds for more, and then fail with InFlightLimitError. When it can be used again, every session claims its slots
    before others get them; only without a journal, and if a session alone is cut off for longer than 1.5 seconds, may
    others get them as well, and more tasks be in flight than there are slots until some have ended.

    Args:
        conninfo: The database: a URL, or names and values, as libpq reads them. What is left out is taken from its
            environment variables, and a password from `~/.pgpass`. A pooler must keep a session's connection for it.
        limit: The number of slots. Each session keeps to its own, if they differ.
        schema: The schema. Those who share an account share a schema, and others have another one.

    Raises:
        ConfigurationError: psycopg is not installed, the address or the name of the schema is wrong, or the limit is
            not an integer of at least 1.
    """

    def __init__(self, conninfo: str, limit: int, *, schema: str = "flux2max") -> None:
        from flux2max_async._postgres import PostgresAddress  # noqa: PLC0415 - only those who use it load it

        super().__init__(limit)
        self._address = PostgresAddress.parse(conninfo, schema)

    def __repr__(self) -> str:
        return f"PostgresInFlightLimit({self._name!r}, {self._limit}, schema={self._address.schema!r})"

    @property
    def _name(self) -> str:
        return str(self._address)

    def _connection(self) -> "LimitConnection":
        from flux2max_async._shared_limit.postgres import PostgresConnection  # noqa: PLC0415 - loads psycopg

        return PostgresConnection(self._address, self._limit, keep_after_death=self._expects_adoption)
