"""Connections to PostgreSQL, for the journal and the limit that several hosts share. Blocking, but for `wake()`.

A host is alive while a connection of it holds an advisory lock whose number nobody else has: the server frees the lock
when the connection ends, however that happens. If the host loses its power or its network, nothing ends the connection;
so each session asks the server, and the client, to check it often enough to notice within a lease.

psycopg is imported when it is needed, as the extra that it belongs to may not be installed.
"""

import contextlib
import functools
import hashlib
import os
import random
import re
import selectors
import socket
import time
import weakref
from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import quote

import attrs

from flux2max_async._exceptions import ConfigurationError, FluxError
from flux2max_async._text import redact

if TYPE_CHECKING:
    from psycopg import Connection, Notify

ErrorT = TypeVar("ErrorT", bound=FluxError)

_ANSWER_TIME = 20.0
"""Seconds for each answer of the server, unless the caller needs more. After that, the connection counts as lost."""
_CONNECT_TIME = 10  # seconds
_FIRST_DELAY, _MAX_DELAY = 0.1, 2.0  # seconds
_SCHEMA_PATTERN = re.compile(r"(?!pg_)[a-z_][a-z0-9_]{0,62}")
_WRONG_ADDRESS = (
    "the address of a database must be like postgresql://USER@HOST:PORT/DATABASE, or like 'host=HOST dbname=DATABASE';"
    " @ : / and % in a user's name or a password are written as %40 %3A %2F and %25"
)
_HELD_LOCKS = """
    FROM pg_locks WHERE locktype = 'advisory' AND objsubid = 1 AND granted
    AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
"""
# Both halves are unsigned; the sum of them wraps around, as the number itself is signed.
_LOCK_NUMBER = "((classid::bigint << 32) | objid::bigint)"
LIVING = f"SELECT {_LOCK_NUMBER} {_HELD_LOCKS}"
"""The numbers of the advisory locks that are held in this database; pg_locks shows those of all databases."""


# ------------------------------------------------------------------ addresses


@attrs.frozen(repr=False)
class PostgresAddress:
    """A schema of a database, and how to connect to it. Its text has no password."""

    conninfo: str
    schema: str
    _parameters: dict[str, Any]

    @classmethod
    def parse(cls, conninfo: str, schema: str) -> "PostgresAddress":
        """Check a conninfo of libpq, which is a URL or `name=value` pairs, and the name of a schema.

        Raises:
            ConfigurationError: One of them is wrong, or psycopg is not installed. It doesn't quote the conninfo.
        """
        try:
            from psycopg import Error  # noqa: PLC0415 - optional
            from psycopg.conninfo import conninfo_to_dict  # noqa: PLC0415 - optional
        except ImportError as error:
            raise ConfigurationError("PostgreSQL needs psycopg: pip install 'flux2max_async[postgres]'") from error
        if not isinstance(schema, str) or not _SCHEMA_PATTERN.fullmatch(schema):
            raise ConfigurationError(
                "schema must be at most 63 lower-case letters, digits and underscores, and not begin with a digit or"
                f" pg_, not {schema!r}"
            )
        try:
            parameters = conninfo_to_dict(conninfo)
        except (Error, ValueError, AttributeError):  # their texts quote what may be a password
            raise ConfigurationError(_WRONG_ADDRESS) from None
        if not _is_plausible(conninfo, parameters):
            raise ConfigurationError(_WRONG_ADDRESS)
        return cls(conninfo, schema, parameters)

    def __str__(self) -> str:
        values = {name: str(self._parameters.get(name, "")) for name in ("user", "host", "port", "dbname", "service")}
        user, host, port, database, service = values.values()
        return "".join((
            "postgresql://",
            f"{quote(user)}@" if user else "",
            quote(host, safe=",:"),
            f":{port}" if port else "",
            f"/{quote(database)}" if database else "",
            f"?service={quote(service)}" if service else "",
        ))  # fmt: skip

    def __repr__(self) -> str:
        return repr(str(self))

    def error(self, error_class: type[ErrorT], subject: str, error: Exception) -> ErrorT:
        """Return an error of another class with the text of psycopg's as its cause, on one line and without password.

        Args:
            error_class: The class of the new error.
            subject: What can't be used: "the journal", say.
            error: What was raised.
        """
        if isinstance(error, error_class):
            return error
        secrets = [str(value) for name, value in self._parameters.items() if "password" in name and value]
        text = redact(str(error), secrets)
        failure = error_class(f"{subject} {self} can't be used: {' '.join(text.split())}")
        if text == str(error):
            failure.__cause__ = error.with_traceback(None)  # psycopg's frames hold the password
        return failure

    def connect(self, name: str, lease: float, answer_time: float = _ANSWER_TIME) -> "Connection[Any]":
        """Open a connection in autocommit mode, whose tables are those of the schema.

        What the address says about timeouts holds, and what the environment says.

        Args:
            name: What the server shows as the name of the application.
            lease: Seconds after which either side ends a connection whose other side doesn't react any more.
            answer_time: Seconds that a statement may take.
        """
        idle = max(1, round(lease / 3))
        interval = max(1, round(lease / 6))
        count = max(1, round((lease - idle) / interval))
        milliseconds = round(lease * 1000)
        defaults: dict[str, Any] = {
            "keepalives_idle": idle, "keepalives_interval": interval, "keepalives_count": count,
            "tcp_user_timeout": milliseconds, "client_encoding": "utf8",
        }  # fmt: skip
        if "PGCONNECT_TIMEOUT" not in os.environ:
            defaults["connect_timeout"] = _CONNECT_TIME
        if "PGAPPNAME" not in os.environ:
            defaults["application_name"] = name
        settings = {
            "tcp_keepalives_idle": str(idle), "tcp_keepalives_interval": str(interval),
            "tcp_keepalives_count": str(count), "tcp_user_timeout": str(milliseconds),
            "search_path": f'"{self.schema}"', "default_transaction_isolation": "read committed",
        }  # fmt: skip
        parameters = {**defaults, **self._parameters}
        connection: Connection[Any] = _connection_class(answer_time).connect(autocommit=True, **parameters)
        _connections.add(connection)
        try:
            # Not as options of the connection, which poolers refuse.
            names = (
                "SELECT set_config(name, value, false) FROM unnest(%s::text[], %s::text[]) AS settings (name, value)"
            )
            connection.execute(names, (list(settings), list(settings.values())))
        except BaseException:
            connection.close()
            raise
        return connection


def _is_plausible(conninfo: str, parameters: dict[str, Any]) -> bool:
    """Check whether no part of a password was taken for a host, a port or a database, which errors would show."""
    ports = str(parameters.get("port", "")).split(",")
    before, at, _ = conninfo.partition("://")[2].partition("@")
    slash_in_password = bool(at) and "/" in before and "?" not in before
    at_in_password = "@" in str(parameters.get("host", ""))
    return all(not port or port.isdecimal() for port in ports) and not slash_in_password and not at_in_password


@functools.cache
def _connection_class(answer_time: float) -> Any:
    """Return a class of connections whose statements end after so many seconds, whatever the server does."""
    from psycopg import Connection, OperationalError  # noqa: PLC0415 - optional

    class BoundedConnection(Connection[Any]):
        def wait(self, gen: Generator[Any, Any, Any], *args: Any, **kwargs: Any) -> Any:
            return super().wait(self._bounded(gen), *args, **kwargs)

        def _bounded(self, gen: Generator[Any, Any, Any]) -> Generator[Any, Any, Any]:
            deadline = time.monotonic() + answer_time
            try:
                wanted = next(gen)
                while True:
                    ready = yield wanted  # at least ten times a second, with 0 if nothing has arrived
                    if not ready and time.monotonic() > deadline:
                        self.close()
                        raise OperationalError(f"the server has not answered for {answer_time:g} s")
                    wanted = gen.send(ready)
            except StopIteration as ended:
                return ended.value

    return BoundedConnection


_connections: "weakref.WeakSet[Connection[Any]]" = weakref.WeakSet()
"""The connections of this process."""


def _close_in_child() -> None:
    """Close the sockets of the parent: its connections would last, and it would seem to live, as long as a fork of it.

    Nothing is sent, and the descriptors stay taken, so that nothing is sent to another file either.
    """
    with open(os.devnull, "r+b") as null:  # noqa: PTH123 - a descriptor is needed
        for connection in list(_connections):
            if not connection.closed:
                os.dup2(null.fileno(), connection.fileno())
    _connections.clear()


with contextlib.suppress(AttributeError):  # Windows has no fork
    os.register_at_fork(after_in_child=_close_in_child)


def may_pass(error: Exception) -> bool:
    """Check whether the same statement may succeed later: the server is away, being restarted, full or a standby."""
    from psycopg import InterfaceError, OperationalError  # noqa: PLC0415 - optional
    from psycopg.errors import ReadOnlySqlTransaction  # noqa: PLC0415 - optional

    return isinstance(error, (OperationalError, InterfaceError, ReadOnlySqlTransaction))


# ------------------------------------------------------------------ schemas and locks


def lock_number(*names: str) -> int:
    """Return the number of the advisory lock that these names stand for."""
    digest = hashlib.blake2b("\0".join(names).encode(), digest_size=8).digest()
    return int.from_bytes(digest, signed=True)


def create_schema(connection: "Connection[Any]", schema: str, create_tables: Callable[[], object]) -> None:
    """Create a schema if it doesn't exist, and its tables, in a transaction that waits for others which do the same."""
    with connection.transaction():
        connection.execute("SELECT pg_advisory_xact_lock(%s)", (lock_number("flux2max", "schema", schema),))
        # IF NOT EXISTS would need the right to create schemas even if it exists.
        if connection.execute("SELECT 1 FROM pg_namespace WHERE nspname = %s", (schema,)).fetchone() is None:
            connection.execute(f'CREATE SCHEMA "{schema}"'.encode())
        create_tables()


def hold_lock(connection: "Connection[Any]", number: int) -> None:
    """Hold an advisory lock, whose number nobody else has, for as long as the connection lasts.

    If an earlier connection of this host still holds it, the server doesn't know yet that it is lost: it is ended.
    """
    row = connection.execute("SELECT pg_try_advisory_lock(%s)", (number,)).fetchone()
    if row is None or not row[0]:
        connection.execute(f"SELECT pg_terminate_backend(pid) {_HELD_LOCKS} AND {_LOCK_NUMBER} = %s", (number,))
        connection.execute("SELECT pg_advisory_lock(%s)", (number,))


# ------------------------------------------------------------------ waiting

_Selector = getattr(
    selectors, "PollSelector", selectors.SelectSelector
)  # Windows has no poll(); epoll would open a file


class Waiter:
    """Waits for notifications in a thread that other threads can wake."""

    def __init__(self) -> None:
        self._reader, self._writer = socket.socketpair()
        for end in (self._reader, self._writer):
            end.setblocking(False)  # noqa: FBT003 - its only argument

    def wake(self) -> None:
        """Wake the thread; later calls have no effect until it waits again."""
        with contextlib.suppress(OSError):  # full, which wakes as well; or closed
            self._writer.send(b"\0")

    def wait(self, connection: "Connection[Any] | None", seconds: float) -> "list[Notify]":
        """Wait until somebody calls `wake()`, notifications arrive, or the time is over; return the notifications.

        Raises:
            psycopg.Error: The connection is lost.
        """
        notifications = [] if connection is None else list(connection.notifies(timeout=0))
        if not notifications and self._select(connection, seconds) and connection is not None:
            notifications = list(connection.notifies(timeout=0))
        with contextlib.suppress(BlockingIOError):
            while self._reader.recv(4096):
                pass
        return notifications

    def _select(self, connection: "Connection[Any] | None", seconds: float) -> bool:
        with _Selector() as selector:
            selector.register(self._reader, selectors.EVENT_READ)
            if connection is not None:
                selector.register(connection, selectors.EVENT_READ)
            return any(key.fileobj is connection for key, _ in selector.select(max(0.0, seconds)))

    def close(self) -> None:
        """Close both sockets."""
        self._reader.close()
        self._writer.close()


class Backoff:
    """The delays between attempts to connect: random, so that the hosts don't come at once, and at most 2 seconds."""

    def __init__(self) -> None:
        self._delay = _FIRST_DELAY

    def next_delay(self) -> float:
        """Return the seconds to wait now."""
        delay, self._delay = self._delay, min(2 * self._delay, _MAX_DELAY)
        return random.uniform(delay / 2, delay)

    def reset(self) -> None:
        """Begin anew, after a success."""
        self._delay = _FIRST_DELAY
