"""A session's access to the tables in which the sessions of several hosts count their slots.

Each session is a holder, with a row in `limit_holders`, whose columns are those of the SQLite file (see `store`), and
`lock`: the number of the advisory lock that its connection holds while it lives. The transactions are the same, too;
each is one message to the server and one answer. What differs:

  alive     the lock is held. Only a holder that waits for a slot checks the others, when it begins to wait and every
            half second, or less often if many wait.
  dead      the lock is not held, and `died` says since when that is known. Its slots count for `RETURN_TIME`, in which
            a host that has lost its connection is back, and then its row is deleted; or it is back later, and counts
            again, perhaps above the limit.
  woken     by a notification on a channel of its own, from the one that has granted it a slot.

With a journal in the same schema, the tasks of hosts that are gone are its rows whose owner holds no lock. They count
until they are adopted or end, or are so old that the service has ended them. The slots of a dead holder that had a
journal don't count beside them, but instead, whichever are more: so there is no gap between the moment in which a
task is adopted and the one in which the adopter occupies a slot for it, which takes one from the dead.

After a crash of the server, some of the last transactions may be missing. Every holder writes its row anew as it
connects, which takes less than `RETURN_TIME` from the moment in which the first one does.
"""

import contextlib
import secrets
from typing import TYPE_CHECKING, Any

from flux2max_async._exceptions import InFlightLimitError
from flux2max_async._postgres import LIVING, Backoff, PostgresAddress, Waiter, create_schema, hold_lock, lock_number

if TYPE_CHECKING:
    from psycopg import ClientCursor, Connection

_LEASE = 12.0
"""Seconds after which the server ends the connection of a host that has lost its power or its network."""
_ANSWER_TIME = 10.0  # seconds
RETURN_TIME = 1.5
"""Seconds for which the slots of a host count whose connection was lost; more than the delays between its attempts."""
_FEW = 25
"""If more holders than this wait, each checks less often, as every check looks at all of them."""
_MAX_TASK_TIME = 900.0
"""Seconds after its submit in which the service has ended a task, even if nobody has followed it."""
_VERSION = 1
_COMMENT = "flux2max_async in-flight limit, version "
_CREATE_TABLE = f"""
    CREATE TABLE limit_holders (
        id text PRIMARY KEY, lock bigint NOT NULL, slots integer NOT NULL, held integer NOT NULL, ticket bigint,
        granted boolean NOT NULL DEFAULT false, kept boolean NOT NULL, died timestamptz
    ) WITH (fillfactor = 50);
    COMMENT ON TABLE limit_holders IS '{_COMMENT}{_VERSION}'
"""

# ------------------------------------------------------------------ the parts of a transaction

_LOCK = "SELECT pg_advisory_xact_lock(%(gate)s)"
"""All transactions of a limit wait for each other."""

# A row that is as it should be is not written, and returns nothing. It is inserted again if it was deleted.
_WRITE = """
    INSERT INTO limit_holders AS own (id, lock, slots, held, ticket, kept)
    VALUES (%(us)s, %(lock)s, %(slots)s, %(held)s,
            CASE WHEN %(waits)s THEN (SELECT coalesce(max(ticket), 0) + 1 FROM limit_holders) END, %(kept)s)
    ON CONFLICT (id) DO UPDATE SET
        held = excluded.held + (own.granted AND %(waits)s)::integer, granted = false, died = NULL,
        ticket = CASE WHEN %(waits)s AND NOT own.granted THEN coalesce(own.ticket, excluded.ticket) END
    WHERE own.held <> excluded.held OR own.granted OR own.died IS NOT NULL OR (own.ticket IS NOT NULL) <> %(waits)s
    RETURNING held > %(held)s
"""
_NO_ORPHANS = "0"
_ORPHANS = f"""(
    SELECT count(*) FROM entries WHERE state = 'submitted' AND owner IS NOT NULL
    AND submitted > extract(epoch FROM clock_timestamp()) - {_MAX_TASK_TIME}
    AND owner NOT IN (SELECT id FROM owners WHERE lock IN ({LIVING}))
)"""
_FIND_DEAD = f"""
    UPDATE limit_holders SET died = clock_timestamp(), ticket = NULL, granted = false
    WHERE died IS NULL AND lock NOT IN ({LIVING})
        OR kept AND died < clock_timestamp() - interval '0.5 s' AND {{orphans}} > 0;
    DELETE FROM limit_holders WHERE died < clock_timestamp() - make_interval(secs => %(return_time)s)
"""
_GIVE_UP = """
    WITH dead AS (
        SELECT id, sum(held) OVER (ORDER BY died, id) - held AS before
        FROM limit_holders WHERE died IS NOT NULL AND kept
    )
    UPDATE limit_holders AS holder SET held = holder.held - least(holder.held, greatest(0, %(adopted)s - dead.before))
    FROM dead WHERE dead.id = holder.id
"""
# Those who have waited longest get what is free, as far as their own limits allow.
_GRANT = """
    WITH RECURSIVE line AS (
        SELECT row_number() OVER (ORDER BY ticket, id) AS place, id, slots FROM limit_holders WHERE ticket IS NOT NULL
    ), chosen AS (
        SELECT 0::bigint AS place, ''::text AS id, false AS granted, (
            SELECT coalesce(sum(held + granted::integer) FILTER (WHERE died IS NULL OR NOT kept), 0)
                + greatest(coalesce(sum(held) FILTER (WHERE died IS NOT NULL AND kept), 0), {orphans})
            FROM limit_holders
        )::bigint AS total
        UNION ALL
        SELECT line.place, line.id, chosen.total < line.slots, chosen.total + (chosen.total < line.slots)::integer
        FROM chosen JOIN line ON line.place = chosen.place + 1 WHERE chosen.total < (SELECT max(slots) FROM line)
    ), granted AS (
        UPDATE limit_holders AS holder SET ticket = NULL,
            held = held + (holder.id = %(us)s)::integer, granted = holder.id <> %(us)s
        FROM chosen WHERE chosen.granted AND holder.id = chosen.id RETURNING holder.id
    )
    SELECT id = %(us)s, CASE WHEN id <> %(us)s THEN pg_notify('flux2max_limit_' || id, '') END FROM granted
"""
_COUNT_WAITING = "SELECT count(*) FROM limit_holders WHERE ticket IS NOT NULL"
_HAS_JOURNAL = "SELECT to_regclass('entries') IS NOT NULL AND to_regclass('owners') IS NOT NULL"
_DELETE = "DELETE FROM limit_holders WHERE id = %(us)s"


class PostgresConnection:
    """Implements `LimitConnection` with a database that the sessions of several hosts share.

    Args:
        address: The database, and the schema in it.
        slots: The number of slots of all sessions together.
        keep_after_death: Whether the session has a journal.
        return_time: Seconds for which the slots of a dead holder without one count.
    """

    check_interval = 0.5

    def __init__(
        self, address: PostgresAddress, slots: int, *, keep_after_death: bool, return_time: float = RETURN_TIME
    ) -> None:
        self._address = address
        self._waiter = Waiter()
        self._backoff = Backoff()
        self._cursor: ClientCursor[Any] | None = None
        self._holder = secrets.token_hex(8)
        self._lock = int.from_bytes(bytes.fromhex(self._holder), signed=True)
        self._parameters = {
            "us": self._holder,
            "lock": self._lock,
            "gate": lock_number("flux2max", "limit", address.schema),
            "slots": slots,
            "kept": keep_after_death,
            "return_time": return_time,
        }
        self._has_journal = False
        """Whether a journal is known to be in the same schema."""
        self._is_notified = False
        """Whether a slot has probably been granted."""
        self._waiting = 0
        """How many holders wait, as of its last transaction."""
        self._written: tuple[int, bool] | None = None
        """What its row says: how many slots it holds, and whether it waits; None if that isn't known."""

    def __str__(self) -> str:
        return str(self._address)

    def wake(self) -> None:
        """End a wait."""
        self._waiter.wake()

    def wait(self, seconds: float) -> None:
        """Wait for a notification, or for `wake()`."""
        connection = None if self._cursor is None else self._cursor.connection
        if self._written is not None and self._written[1]:
            seconds *= max(1.0, self._waiting / _FEW)
        self._is_notified = bool(self._waiter.wait(connection, seconds))

    def update(self, held: int, *, waits: bool, adopted: int) -> bool:
        """Run a transaction, which notifies those to whom it has granted a slot."""
        if self._cursor is None:
            self._cursor = self._connect()
        if self._written == (held, False) and not waits and not adopted:
            return False
        if self._is_notified and waits and self._written == (held, True) and not adopted:
            # Its slot has been counted already, so that nobody else need be looked at.
            self._is_notified = False
            if self._run(self._cursor, [_WRITE], held=held, waits=True) == [[(True,)]]:
                self._written = (held + 1, False)
                return True
        parts = [_LOCK, _WRITE]
        if waits or adopted:
            parts.append(_FIND_DEAD)
        if adopted:
            parts.append(_GIVE_UP)
        results = self._run(self._cursor, [*parts, _GRANT, _COUNT_WAITING], held=held, waits=waits, adopted=adopted)
        granted = results[1] == [(True,)] or (True, None) in results[-2]
        self._waiting = results[-1][0][0]
        self._written = (held + granted, waits and not granted)
        self._backoff.reset()
        return granted

    def disconnect(self) -> None:
        """Close the connection, if there is one."""
        cursor, self._cursor = self._cursor, None
        self._written = None
        if cursor is not None:
            cursor.connection.close()

    def retry_delay(self) -> float:
        """Return a delay that grows, but is shorter than the time for which the slots of this host still count."""
        return min(self._backoff.next_delay(), RETURN_TIME / 2)

    def close(self) -> None:
        """Delete this holder's row; if that fails, others will notice that its lock is free."""
        if self._cursor is not None:
            with contextlib.suppress(Exception):
                self._run(self._cursor, [_LOCK, _DELETE, _GRANT])
        self.disconnect()
        self._waiter.close()

    def error(self, error: Exception) -> InFlightLimitError:
        """Return an error that names the database, without its password."""
        return self._address.error(InFlightLimitError, "the limit", error)

    def _connect(self) -> "ClientCursor[Any]":
        from psycopg import ClientCursor  # noqa: PLC0415 - optional

        connection = self._address.connect("flux2max limit", _LEASE, _ANSWER_TIME)
        try:
            connection.execute("SET synchronous_commit = off")
            create_schema(connection, self._address.schema, lambda: self._create_table(connection))
            hold_lock(connection, self._lock)
            connection.execute(f"LISTEN flux2max_limit_{self._holder}".encode())
        except BaseException:
            connection.close()
            raise
        self._has_journal = connection.execute(_HAS_JOURNAL).fetchone() == (True,)
        # Its parameters are put into the statements here, without which the server takes one statement at a time.
        return ClientCursor(connection)

    def _create_table(self, connection: "Connection[Any]") -> None:
        """Create the table, or check whose it is.

        Raises:
            InFlightLimitError: A newer version created it.
        """
        row = connection.execute("SELECT obj_description(to_regclass('limit_holders'), 'pg_class')").fetchone()
        comment = row and row[0]
        if comment is None:
            connection.execute(_CREATE_TABLE.encode())
        elif comment != f"{_COMMENT}{_VERSION}":
            raise InFlightLimitError(
                f"a newer version wrote the limit {self._address} ({comment}, known up to {_VERSION}): "
                "update flux2max_async"
            )

    def _run(self, cursor: "ClientCursor[Any]", parts: list[str], **parameters: Any) -> list[list[Any]]:
        """Run statements in one transaction, and return the rows of each."""
        if not self._has_journal:
            parts = [_HAS_JOURNAL, *parts]
        orphans = _ORPHANS if self._has_journal else _NO_ORPHANS
        statement = ";".join(parts).replace("{orphans}", orphans)
        cursor.execute(statement.encode(), {**self._parameters, **parameters})
        results = [cursor.fetchall() if cursor.description else []]
        while cursor.nextset():
            results.append(cursor.fetchall() if cursor.description else [])
        if not self._has_journal:
            self._has_journal = results.pop(0) == [(True,)]
        return results
