"""Where the limits of tests count: in a file, or in a database."""

from pathlib import Path
from typing import TypeAlias

import anyio

from flux2max_async import InFlightLimit, PostgresInFlightLimit, SqliteInFlightLimit
from flux2max_async._postgres import PostgresAddress
from flux2max_async._shared_limit.connection import LimitConnection
from flux2max_async._shared_limit.postgres import PostgresConnection
from flux2max_async._shared_limit.sqlite import SqliteConnection

PATIENCE = 30.0
"""Seconds for what takes milliseconds."""
A_WHILE = 0.3
"""Seconds in which what must not happen would have happened."""

Limit: TypeAlias = SqliteInFlightLimit | PostgresInFlightLimit


class SqliteBackend:
    """A file in a folder."""

    def __init__(self, path: Path) -> None:
        self.arguments = (str(path),)

    def limit(self, slots: int = 1) -> Limit:
        return SqliteInFlightLimit(self.arguments[0], slots)

    def connection(self, slots: int = 1, *, kept: bool = False) -> LimitConnection:
        return SqliteConnection(Path(self.arguments[0]), slots, keep_after_death=kept)


class PostgresBackend:
    """A schema of a database, where slots of the dead are free at once."""

    def __init__(self, conninfo: str, schema: str) -> None:
        self.arguments = (conninfo, schema)

    def limit(self, slots: int = 1) -> Limit:
        conninfo, schema = self.arguments
        return PostgresInFlightLimit(conninfo, slots, schema=schema)

    def connection(self, slots: int = 1, *, kept: bool = False) -> LimitConnection:
        address = PostgresAddress.parse(*self.arguments)
        return PostgresConnection(address, slots, keep_after_death=kept, return_time=0.0)


Backend: TypeAlias = SqliteBackend | PostgresBackend


class ConnectionHolder:
    """One of those who share a limit, as a session's thread does it."""

    def __init__(self, connection: LimitConnection) -> None:
        self.connection = connection
        self.held = 0
        self.waits = False
        self.update()

    def update(self, *, adopted: int = 0) -> None:
        granted = self.connection.update(self.held, waits=self.waits, adopted=adopted)
        self.held += granted
        self.waits = self.waits and not granted

    def acquire(self) -> bool:
        self.waits = True
        self.update()
        return not self.waits

    def release(self) -> None:
        self.held -= 1
        self.update()


async def acquire(limit: InFlightLimit) -> None:
    """Acquire a slot that must be free in a moment."""
    with anyio.fail_after(PATIENCE):
        await limit.acquire()


async def is_free(limit: InFlightLimit) -> bool:
    """Check whether a slot can be had within a while, and give it back."""
    with anyio.move_on_after(A_WHILE):
        await limit.acquire()
        limit.release()
        return True
    return False


def die(connection: LimitConnection) -> None:
    """End a holder as a killed process does."""
    connection.disconnect()
    if isinstance(connection, SqliteConnection):
        assert connection._pipe is not None
        connection._pipe.close_descriptors()
        connection._pipe = None
    connection.close()
