"""The connection of a journal to PostgreSQL: its advisory lock, its notifications, and what happens when it is lost.

Blocking. A host is alive while its connection holds the lock of its owner. Notifications are sent to all owners of a
schema, over one channel:

    opened       an owner has opened the journal
    owner ID     an entry that this owner holds has changed
    entry ID     this entry, which somebody watches, has changed
"""

import contextlib
import secrets
import time
from collections.abc import Generator
from typing import TYPE_CHECKING, Any

from flux2max_async._exceptions import JournalError
from flux2max_async._postgres import PostgresAddress, create_schema, hold_lock, lock_number, may_pass
from flux2max_async.journal._postgres_schema import check_encoding, table_creator

if TYPE_CHECKING:
    from psycopg import Connection, Cursor

_ANSWER_TIME = 10.0
"""Seconds that a statement may take; after that, the connection counts as lost."""
_HEARTBEAT_INTERVAL = 1.0  # seconds
_GRACE = 5.0
"""Seconds after a loss of connections in which other owners may still be connecting anew."""
_ENDED_CONNECTION = ("08", "57P")
"""The beginnings of the SQLSTATEs with which the server ends a connection."""
_INTERRUPTIONS = ("40001", "40P01")
"""The SQLSTATEs of transactions that were in each other's way."""


class PostgresConnection:
    """A connection to a journal's schema, which is created if it doesn't exist.

    Raises:
        JournalError: The database can't be reached, or the schema is not a journal of this version.
    """

    upkeep_at: float | None = None
    check_interval = _HEARTBEAT_INTERVAL

    def __init__(self, address: PostgresAddress, lease: float) -> None:
        from psycopg import Error  # noqa: PLC0415 - optional

        self.errors: tuple[type[Exception], ...] = (Error,)
        self.owner = secrets.token_hex(8)
        self.heartbeat_interval = min(_HEARTBEAT_INTERVAL, lease / 4)
        self._address = address
        self._lease = lease
        self._lock = lock_number("journal", address.schema, self.owner)
        self._grace = _GRACE
        self._grace_until = 0.0
        self._is_in_transaction = False
        self._changed = False
        """Whether another owner may have changed what somebody here waits for."""
        self._watched_ids: set[str] = set()
        self._connection: Connection[Any]
        self._cursor: Cursor[Any]
        try:
            self._connect(is_first=True)
        except self.errors as error:
            failure = self.journal_error(error)
            raise failure from failure.__cause__

    def _connect(self, *, is_first: bool) -> None:
        connection = self._address.connect("flux2max journal", self._lease, _ANSWER_TIME)
        try:
            if is_first:
                check_encoding(connection, self._address)
                create_schema(connection, self._address.schema, table_creator(connection, self._address))
            hold_lock(connection, self._lock)
            connection.add_notify_handler(lambda notification: self._on_notification(notification.payload))
            connection.execute(f'LISTEN "{self._address.schema}"'.encode())
            # Whoever submits must know that an intent is stored, whatever the server's default is.
            connection.execute(
                "SELECT set_config('synchronous_commit', 'on', false)"
                " WHERE current_setting('synchronous_commit') = 'off'"
            )
        except BaseException:
            connection.close()
            raise
        self._connection = connection
        self._cursor = connection.cursor()

    @property
    def is_connected(self) -> bool:
        """Whether the connection is open, as far as this side knows."""
        return not self._connection.closed

    def reconnect(self) -> JournalError | None:
        """Try to connect anew; return why that was not possible."""
        try:
            self._connect(is_first=False)
        except self.errors as error:
            return self.journal_error(error)
        self._grace_until = time.monotonic() + self._grace
        self._changed = True
        return None

    # ------------------------------------------------------------------ failures

    def journal_error(self, error: Exception) -> JournalError:
        """Return the error that explains a failure of the database, without a password."""
        return self._address.error(JournalError, "the journal", error)

    def may_pass(self, error: Exception) -> bool:
        """Check whether the same write may succeed later: the server is full, say."""
        return may_pass(error)

    def is_interrupted(self, error: Exception) -> bool:
        """Check whether the connection is lost, or other transactions were in the way."""
        state = str(getattr(error, "sqlstate", None) or "")
        if state.startswith(_ENDED_CONNECTION):
            self._connection.close()
        return self._connection.closed or state in _INTERRUPTIONS

    def problem(self) -> JournalError | None:
        """Return None: what is lost is the connection, and that comes back."""
        return None

    # ------------------------------------------------------------------ transactions and upkeep

    def _execute(self, statement: str, values: Any = None) -> "Cursor[Any]":
        """Execute a statement; in a transaction, send it, and return the cursor that its answer can be fetched from."""
        cursor = self._connection.cursor() if self._is_in_transaction else self._cursor
        return cursor.execute(statement.encode(), values, prepare=True)

    @contextlib.contextmanager
    def transaction(self, *, durable: bool) -> Generator[None]:  # noqa: ARG002 - every commit is durable
        """Run a transaction, whose statements don't wait for each other's answers. Each commit is durable."""
        try:
            with self._connection.pipeline():
                self._is_in_transaction = True
                self._execute("BEGIN")
                yield
                self._execute("COMMIT")
        except BaseException:
            self._is_in_transaction = False
            with contextlib.suppress(*self.errors):
                self._execute("ROLLBACK")
            raise
        finally:
            self._is_in_transaction = False

    def set_synchronous(self, *, durable: bool) -> None:
        """Do nothing: each commit is durable."""

    def schedule_upkeep(self) -> None:
        """Do nothing: the server takes care of its files."""

    def upkeep(self, *, is_idle: bool) -> None:
        """Do nothing: the server takes care of its files."""

    # ------------------------------------------------------------------ changes by other owners

    def fileno(self) -> int | None:
        """Return the descriptor of the connection; None if it is lost."""
        return None if self._connection.closed else self._connection.fileno()

    def receive(self) -> None:
        """Read notifications; notice when the connection is lost."""
        server = self._connection.pgconn
        try:
            server.consume_input()
            while (notification := server.notifies()) is not None:
                self._on_notification(notification.extra.decode())
        except self.errors as error:
            self.is_interrupted(error)

    def _on_notification(self, payload: str) -> None:
        kind, _, name = payload.partition(" ")
        concerns_us = {
            "entry": name in self._watched_ids, "owner": name == self.owner, "opened": name != self.owner,
        }  # fmt: skip
        self._changed = self._changed or concerns_us.get(kind, False)

    def changed_externally(self) -> bool:
        """Check whether another owner may have changed something since the previous call."""
        changed, self._changed = self._changed, False
        return changed

    def _notify(self, payload: str) -> None:
        self._execute("SELECT pg_notify(%s, %s)", (self._address.schema, payload))

    def wake(self, owner: str) -> None:
        """Do nothing: `record()` has notified the owner."""
