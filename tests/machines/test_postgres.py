"""Connections to PostgreSQL: addresses without passwords, liveness by locks, and waiting for notifications."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from typing import Any

import psycopg
import pytest
from support.postgres import PASSWORD, PostgresServer

from flux2max_async import ConfigurationError, InFlightLimitError, JournalError
from flux2max_async._postgres import (
    LIVING,
    Backoff,
    PostgresAddress,
    Waiter,
    create_schema,
    hold_lock,
    lock_number,
    may_pass,
)

Connect = Callable[..., "psycopg.Connection[Any]"]


@pytest.fixture
def connect(postgres: PostgresServer, schema: str) -> Iterator[Connect]:
    """Provide a function that opens a connection, which is closed at the end."""
    with ExitStack() as stack:

        def open_connection(*, lease: float = 12.0, **options: Any) -> "psycopg.Connection[Any]":
            address = PostgresAddress.parse(postgres.conninfo(**options), schema)
            return stack.enter_context(closing(address.connect("a test", lease)))

        yield open_connection


def living(connection: "psycopg.Connection[Any]") -> set[int]:
    return {number for (number,) in connection.execute(LIVING)}


# ------------------------------------------------------------------ addresses


@pytest.mark.parametrize(
    ("conninfo", "text"),
    [
        ("postgresql://me:secret@db.example:5433/flux?sslmode=require", "postgresql://me@db.example:5433/flux"),
        ("postgres://me:sec%40ret@db.example/flux", "postgresql://me@db.example/flux"),
        ("host=db.example dbname=flux user=me password='sec ret'", "postgresql://me@db.example/flux"),
        ("postgresql://one:1,two:2/flux", "postgresql://one,two:1,2/flux"),
        ("postgresql:///flux?host=/run/postgresql&password=secret", "postgresql://%2Frun%2Fpostgresql/flux"),
        ("postgresql://db.example/flux?user=me@home&password=secret", "postgresql://me%40home@db.example/flux"),
        ("service=flux password=secret", "postgresql://?service=flux"),
        ("", "postgresql://"),
    ],
)
def test_the_text_of_an_address(conninfo: str, text: str) -> None:
    """The text of an address names user, host and database, whichever form it has, and no password."""
    address = PostgresAddress.parse(conninfo, "flux2max")

    assert (str(address), repr(address)) == (text, repr(text))


@pytest.mark.parametrize(
    "conninfo",
    [
        "postgresql://me:sec/ret@db.example/flux",
        "postgresql://me:12/34@db.example/flux",
        "postgresql://me:sec@ret@db.example/flux",
        "postgresql://me:sec%ret@db.example/flux",
        "postgresql+psycopg://me:secret@db.example/flux",
        "host=db.example password=sec ret",
        "postgresql://db.example/flux?passwort=secret",
        "sec\0ret",
        "sec\ud800ret",
        7,
    ],
)
def test_a_wrong_address(conninfo: Any) -> None:
    """A wrong address is a ConfigurationError that says what is right, and quotes no part of what may be a password."""
    with pytest.raises(ConfigurationError, match="postgresql://USER@HOST:PORT/DATABASE") as raised:
        PostgresAddress.parse(conninfo, "flux2max")

    assert "sec" not in str(raised.value)
    assert raised.value.__cause__ is None
    assert raised.value.__suppress_context__ or raised.value.__context__ is None


@pytest.mark.parametrize("schema", ["", "Flux", "pg_flux", "1st", 'a"b', "x" * 64, None])
def test_a_wrong_schema(schema: Any) -> None:
    """A name of a schema that would have to be quoted, or that belongs to the server, is a ConfigurationError."""
    with pytest.raises(ConfigurationError, match="schema must be"):
        PostgresAddress.parse("", schema)


def test_the_extra_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without psycopg, the error says what to install."""
    monkeypatch.setitem(sys.modules, "psycopg", None)

    with pytest.raises(ConfigurationError, match=r"pip install 'flux2max_async\[postgres\]'"):
        PostgresAddress.parse("", "flux2max")


# ------------------------------------------------------------------ errors


def test_an_error_of_the_server(postgres: PostgresServer) -> None:
    """A wrong password is an error with the server's reason on one line, and nowhere the password."""
    address = PostgresAddress.parse(postgres.conninfo().replace(PASSWORD, "secret-1"), "flux2max")
    with pytest.raises(psycopg.OperationalError) as raised:
        address.connect("a test", 12.0)
    error = address.error(JournalError, "the journal", raised.value)

    assert f"the journal {address} can't be used: connection failed" in str(error)
    assert 'password authentication failed for user "flux"' in str(error)
    assert "\n" not in str(error)
    assert error.__cause__ is raised.value
    assert "secret-1" not in f"{error} {error!r} {error.__cause__} {error.__cause__!r}"
    assert raised.value.__traceback__ is None  # whose frames hold the password, and error reports show them


def test_an_error_with_the_password() -> None:
    """A text that quotes the password is shown without it, and its error is no cause."""
    address = PostgresAddress.parse("host=db.example password=secret-1", "flux2max")
    error = address.error(InFlightLimitError, "the limit", ValueError("it was secret-1"))

    assert str(error).endswith("it was ***")
    assert error.__cause__ is None
    assert address.error(InFlightLimitError, "the limit", error) is error


def test_which_errors_may_pass(postgres: PostgresServer, connect: Connect) -> None:
    """A server that is away, stopped or a standby may come back; a statement that is wrong stays wrong."""
    connection = connect()
    errors: dict[str, Exception] = {}

    def run(name: str, function: Callable[[], object]) -> None:
        with pytest.raises(psycopg.Error) as raised:
            function()
        errors[name] = raised.value

    run("nonsense", lambda: connection.execute("nonsense"))
    run("a column", lambda: connection.execute("SELECT nothing"))
    connection.execute("SET default_transaction_read_only = on")
    run("a standby", lambda: connection.execute("CREATE TABLE t (x int)"))
    run("ended", lambda: connection.execute("SELECT pg_terminate_backend(pg_backend_pid())"))
    run("closed", lambda: connection.execute("SELECT 1"))
    run("away", lambda: PostgresAddress.parse("host=127.0.0.1 port=1", "flux2max").connect("a test", 12.0))

    assert {name: may_pass(error) for name, error in errors.items()} == {
        "nonsense": False, "a column": False, "a standby": True, "ended": True, "closed": True, "away": True,
    }  # fmt: skip


# ------------------------------------------------------------------ connections


def test_settings_of_a_connection(connect: Connect, schema: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both sides check the other one often enough for the lease; the server shows who is connected."""
    for name in ("PGAPPNAME", "PGCONNECT_TIMEOUT"):
        monkeypatch.delenv(name, raising=False)
    connection = connect(lease=12.0)
    names = ["tcp_keepalives_idle", "tcp_keepalives_interval", "tcp_keepalives_count", "tcp_user_timeout"]
    shown = {name: connection.execute(f"SHOW {name}").fetchone() for name in [*names, "search_path"]}
    ours = connection.info.get_parameters()

    assert list(shown.values()) == [("4",), ("2",), ("4",), ("12000",), (f'"{schema}"',)]
    assert ours["application_name"] == "a test"
    assert (ours["connect_timeout"], ours["tcp_user_timeout"], ours["keepalives_idle"]) == ("10", "12000", "4")


def test_settings_of_the_user(connect: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the address or the environment says is left as it is."""
    monkeypatch.setenv("PGAPPNAME", "mine")
    monkeypatch.setenv("PGCONNECT_TIMEOUT", "77")
    ours = connect(keepalives_idle="33").info.get_parameters()

    assert (ours["application_name"], ours["connect_timeout"], ours["keepalives_idle"]) == ("mine", "77", "33")


def test_a_connection_that_can_not_be_set_up(postgres: PostgresServer) -> None:
    """A connection whose settings the server refuses is closed."""
    address = PostgresAddress.parse(postgres.conninfo(keepalives="0", tcp_user_timeout="1000"), "flux2max")

    with pytest.raises(psycopg.errors.InvalidParameterValue):
        address.connect("a test", 1e8)


def test_a_server_that_does_not_answer(postgres: PostgresServer) -> None:
    """A statement that takes longer than the answer may take ends the connection; one that takes less doesn't."""
    address = PostgresAddress.parse(postgres.conninfo(), "flux2max")
    with closing(address.connect("a test", 12.0, answer_time=0.5)) as connection:
        assert connection.execute("SELECT 1 FROM pg_sleep(0.2)").fetchone() == (1,)
        with pytest.raises(psycopg.OperationalError, match=r"not answered for 0\.5 s"):
            connection.execute("SELECT pg_sleep(60)")

        assert connection.closed


# ------------------------------------------------------------------ schemas and locks


def test_several_create_a_schema(connect: Connect, schema: str) -> None:
    """Of several who come at once, one creates the schema and its tables, and the others find them."""
    failures: list[Exception] = []

    def create(connection: "psycopg.Connection[Any]") -> None:
        try:
            create_schema(
                connection, schema, lambda: connection.execute("CREATE TABLE IF NOT EXISTS numbers (n integer)")
            )
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=create, args=(connect(),)) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert failures == []
    assert connect().execute("SELECT count(*) FROM numbers").fetchone() == (0,)


def test_a_schema_of_others(connect: Connect, schema: str) -> None:
    """A role that may not create schemas can use one that exists."""
    admin = connect()
    admin.execute(f'CREATE SCHEMA {schema}; CREATE ROLE "{schema}_user"; SET ROLE "{schema}_user"')
    created: list[None] = []
    create_schema(admin, schema, lambda: created.append(None))

    assert created == [None]


def test_locks_show_who_is_alive(postgres: PostgresServer, connect: Connect) -> None:
    """A lock is seen by all connections to the database, and by no others, until its connection ends."""
    first, second = connect(), connect()
    first.execute("CREATE DATABASE others")
    numbers = [lock_number("a"), lock_number("a", "b"), 5, -5]
    for number in numbers:
        hold_lock(first, number)
    elsewhere = PostgresAddress.parse(f"{postgres.conninfo()}?dbname=others", "flux2max").connect("a test", 12.0)
    with closing(elsewhere):
        seen_elsewhere = living(elsewhere)
    seen = living(second)
    first.close()
    while living(second) & {*numbers}:
        time.sleep(0.01)

    assert {*numbers} <= seen
    assert len({*numbers}) == 4
    assert seen_elsewhere == set()


def test_a_lock_of_a_lost_connection(connect: Connect) -> None:
    """Who holds a lock by a connection that the server believes alive ends it, and has the lock."""
    lost, new = connect(), connect()
    hold_lock(lost, 77)
    hold_lock(new, 77)

    with pytest.raises(psycopg.OperationalError):
        lost.execute("SELECT 1")
    assert 77 in living(new)


FORKING = """
import os, sys, time
from flux2max_async._postgres import PostgresAddress, hold_lock
address = PostgresAddress.parse(sys.argv[1], "flux2max")
connection = address.connect("a parent", 12.0)
hold_lock(connection, 78)
closed = address.connect("closed", 12.0)
closed.close()
if os.fork() == 0:
    connection.close()
    print("forked", flush=True)
    sys.stdin.read()
    os._exit(0)
os.close(0)
time.sleep(60)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform has no fork")
def test_a_fork_does_not_keep_a_host_alive(postgres: PostgresServer, connect: Connect) -> None:
    """The server frees the locks of a process that is killed while a fork of it lives; the fork's close() ends nothing."""
    connection = connect()
    command = [sys.executable, "-W", "ignore", "-c", FORKING, postgres.conninfo()]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == b"forked\n"
        was_alive = 78 in living(connection)
        parent.send_signal(signal.SIGKILL)
        parent.wait()
        while 78 in living(connection):
            time.sleep(0.01)

    assert was_alive


# ------------------------------------------------------------------ waiting


def test_waiting_for_notifications(connect: Connect) -> None:
    """A waiter returns what was sent while it waited, and what arrived with the answer to a statement before."""
    ours, other = connect(), connect()
    ours.execute("LISTEN flux")
    with closing(Waiter()) as waiter:
        other.execute("NOTIFY flux, 'one'")
        ours.execute("SELECT 1")
        received = [waiter.wait(ours, 60.0)]
        timer = threading.Timer(0.1, other.execute, ("NOTIFY flux, 'two'",))
        timer.start()
        received.append(waiter.wait(ours, 60.0))
        timer.join()
        received.append(waiter.wait(ours, 0.0))

    assert [[notification.payload for notification in batch] for batch in received] == [["one"], ["two"], []]


def test_waking_a_waiter(connect: Connect) -> None:
    """Other threads wake it, before it waits or while it does, with a connection or without; once for many calls."""
    with closing(Waiter()) as waiter:
        for connection in (None, connect()):
            for _ in range(70_000 if connection is None else 1):
                waiter.wake()
            waiter.wait(connection, 60.0)
            timer = threading.Timer(0.1, waiter.wake)
            timer.start()
            assert waiter.wait(connection, 60.0) == []
            timer.join()
    waiter.wake()


def test_waiting_on_a_lost_connection(connect: Connect) -> None:
    """A connection that the server ends is noticed at once."""
    ours, other = connect(), connect()
    with closing(Waiter()) as waiter:
        other.execute("SELECT pg_terminate_backend(%s)", (ours.info.backend_pid,))
        with pytest.raises(psycopg.OperationalError):
            while True:  # the reason may arrive before the end
                waiter.wait(ours, 60.0)


def test_the_delays_between_attempts() -> None:
    """Delays double up to 2 s, are random by half, and begin anew after a success."""
    backoff = Backoff()
    delays = [backoff.next_delay() for _ in range(8)]
    backoff.reset()

    for delay, longest in zip(
        [*delays, backoff.next_delay()], (0.1, 0.2, 0.4, 0.8, 1.6, 2.0, 2.0, 2.0, 0.1), strict=True
    ):
        assert longest / 2 <= delay <= longest
