"""PostgresInFlightLimit: hosts that die, tasks that outlive them, and a server that is away."""

import asyncio
import contextlib
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import anyio
import psycopg
import pytest
from support.limits import A_WHILE, PATIENCE, ConnectionHolder, acquire
from support.postgres import PASSWORD, PostgresServer

from flux2max_async import ConfigurationError, InFlightLimitError, PostgresInFlightLimit
from flux2max_async._postgres import LIVING, PostgresAddress, create_schema, hold_lock, lock_number
from flux2max_async._shared_limit.postgres import PostgresConnection
from flux2max_async._shared_limit.worker import LimitWorker
from flux2max_async.journal._postgres_schema import TABLES

FOREVER = 3600.0


@pytest.fixture
def anyio_backend() -> str:
    """Use real time, in which the threads run."""
    return "asyncio"


@pytest.fixture
def address(postgres: PostgresServer, schema: str) -> PostgresAddress:
    return PostgresAddress.parse(postgres.conninfo(), schema)


@pytest.fixture(scope="module")
def own_server() -> Iterator[PostgresServer]:
    """Provide a server that the tests of this module may stop; they leave it running."""
    with PostgresServer() as server:
        yield server


class Holder(ConnectionHolder):
    """One of those who share a limit, as a session's thread does it."""

    connection: PostgresConnection

    def __init__(self, address: PostgresAddress, slots: int, *, kept: bool = False, return_time: float = 0.0) -> None:
        super().__init__(PostgresConnection(address, slots, keep_after_death=kept, return_time=return_time))

    def die(self) -> None:
        """End as a killed process does."""
        self.connection.disconnect()
        self.connection.close()


@pytest.fixture
def start(address: PostgresAddress) -> Iterator[Callable[..., Holder]]:
    with ExitStack() as stack:

        def start_holder(slots: int, **options: Any) -> Holder:
            holder = Holder(address, slots, **options)
            stack.callback(holder.connection.close)
            return holder

        yield start_holder


class Tasks:
    """The tables of a journal, and connections of the owners of its tasks."""

    def __init__(self, address: PostgresAddress) -> None:
        self._address = address
        self._connection = address.connect("a test", 12.0)
        self._owners: dict[str, psycopg.Connection[Any]] = {}
        create_schema(self._connection, address.schema, self._create_tables)

    def _create_tables(self) -> None:
        for table in TABLES:
            self._connection.execute(table.encode())

    def add_owner(self, owner: str) -> None:
        connection = self._owners[owner] = self._address.connect("a test", 12.0)
        lock = lock_number(self._address.schema, owner)
        hold_lock(connection, lock)
        connection.execute("INSERT INTO owners VALUES (%s, %s)", (owner, lock))

    def add(self, owner: str | None, state: str = "submitted", *, age: float = 0.0) -> None:
        submitted = None if state == "intent" else time.time() - age
        self._connection.execute(
            "INSERT INTO entries (key, attempt, content, state, owner, outlay, submitted, request, result, files)"
            " VALUES (gen_random_uuid()::text, 1, '', %s, %s, 0, %s, '{}', '{}', '[]')",
            (state, owner, submitted),
        )

    def adopt(self, owner: str | None, state: str = "submitted") -> None:
        self._connection.execute("UPDATE entries SET owner = %s, state = %s WHERE state = 'submitted'", (owner, state))

    def kill(self, owner: str) -> None:
        """End an owner's connection, and wait until the server has noticed it."""
        self._owners.pop(owner).close()
        self.wait_for_end(lock_number(self._address.schema, owner))

    def wait_for_end(self, lock: int) -> None:
        deadline = time.monotonic() + PATIENCE
        while (lock,) in self._connection.execute(LIVING).fetchall():
            assert time.monotonic() < deadline
            time.sleep(0.005)

    def close(self) -> None:
        for connection in (self._connection, *self._owners.values()):
            connection.close()


@pytest.fixture
def tasks(address: PostgresAddress) -> Iterator[Tasks]:
    with closing(Tasks(address)) as tables:
        yield tables


# ------------------------------------------------------------------ the tasks of the dead


def test_tasks_count_until_they_have_ended(tasks: Tasks, start: Callable[..., Holder]) -> None:
    """The tasks of a dead host count while nobody follows them, and then as its adopter's, until they have ended."""
    dead, adopter, waiting = start(3, kept=True), start(3, kept=True), start(3)
    tasks.add_owner("dead")
    tasks.add_owner("adopter")
    assert [dead.acquire() for _ in range(3)] == [True] * 3
    tasks.add("dead")
    tasks.add("dead")
    tasks.add("dead", "intent")  # whose answer is lost
    dead.die()
    tasks.kill("dead")
    free = [waiting.acquire(), waiting.acquire()]
    tasks.adopt("adopter")
    adopter.held = 2
    adopter.update(adopted=2)
    waiting.update()
    free.append(not waiting.waits)
    tasks.adopt(None, "completed")
    adopter.release()
    waiting.update()
    free.append(not waiting.waits)

    assert free == [True, False, False, True], "the submit whose answer is lost doesn't count"
    assert (waiting.held, adopter.held) == (2, 1)


def test_no_gap_between_adoption_and_occupation(tasks: Tasks, start: Callable[..., Holder]) -> None:
    """A task whose adopter has not occupied a slot for it yet counts as the dead one's slot."""
    dead, adopter, waiting = (start(2, kept=True, return_time=FOREVER) for _ in range(3))
    tasks.add_owner("dead")
    tasks.add_owner("adopter")
    assert [dead.acquire(), dead.acquire()] == [True, True]
    tasks.add("dead")
    tasks.add("dead")
    dead.die()
    tasks.kill("dead")
    free = [waiting.acquire()]
    tasks.adopt("adopter")
    waiting.update()
    free.append(not waiting.waits)
    adopter.held = 1
    adopter.update(adopted=1)
    waiting.update()
    free.append(not waiting.waits)
    adopter.held = 2
    adopter.update(adopted=1)
    adopter.release()
    waiting.update()

    assert free == [False] * 3
    assert not waiting.waits


def test_tasks_without_anybody(tasks: Tasks, start: Callable[..., Holder]) -> None:
    """Running tasks count whose host has left nothing else; not those that are held, ended, uncertain or very old."""
    tasks.add_owner("alive")
    for owner, state, age in (
        ("gone", "submitted", 60.0), ("gone", "submitted", 3600.0), ("gone", "intent", 0.0), ("gone", "completed", 0.0),
        (None, "uncertain", 0.0), ("alive", "submitted", 0.0),
    ):  # fmt: skip
        tasks.add(owner, state, age=age)
    holder = start(2)

    assert [holder.acquire(), holder.acquire()] == [True, False]


def test_a_journal_that_is_created_later(address: PostgresAddress, start: Callable[..., Holder]) -> None:
    """A limit that was opened before the journal was created counts its tasks all the same."""
    holder = start(2)
    assert holder.acquire()
    with closing(Tasks(address)) as tasks:
        holder.release()
        tasks.add("gone")
        got = [holder.acquire(), holder.acquire()]

    assert got == [True, False]


def test_a_dead_host_without_a_journal(tasks: Tasks, start: Callable[..., Holder]) -> None:
    """Its slots are free after a while, although tasks of others that are gone still count."""
    dead, waiting = start(3), start(3)
    tasks.add("gone")
    assert [dead.acquire(), dead.acquire(), waiting.acquire()] == [True, True, False]
    dead.die()
    tasks.wait_for_end(dead.connection._lock)

    assert [waiting.acquire(), waiting.acquire(), waiting.acquire()] == [True, True, False]


# ------------------------------------------------------------------ connections that are lost


def test_a_host_that_is_back_in_time(start: Callable[..., Holder]) -> None:
    """A host that connects again has kept its slots, and its turn is the last one."""
    away, other = start(1, return_time=FOREVER), start(1, return_time=FOREVER)
    assert [away.acquire(), other.acquire()] == [True, False]
    away.connection.disconnect()
    other.update()
    got = [not other.waits]
    away.update()
    other.update()
    got.append(not other.waits)
    away.release()
    other.update()

    assert [*got, not other.waits] == [False, False, True]


def test_a_host_that_is_back_late(tasks: Tasks, start: Callable[..., Holder]) -> None:
    """Its slots count again, above the limit, and nobody gets one until there are fewer than the limit."""
    away, other = start(1), start(1)
    assert [away.acquire(), other.acquire()] == [True, False]
    away.connection.disconnect()
    tasks.wait_for_end(away.connection._lock)
    other.update()
    assert other.held == 1
    away.update()
    other.release()

    assert not other.acquire()
    away.release()
    other.update()
    assert other.held == 1


async def test_a_restart_of_the_server(
    own_server: PostgresServer, schema: str, caplog: pytest.LogCaptureFixture
) -> None:
    """After a crash of the server the slots are whose they were; those who wait go on waiting, and get theirs."""
    address = PostgresAddress.parse(own_server.conninfo(), schema)
    first, second = workers = [
        LimitWorker(PostgresConnection(address, 2, keep_after_death=False, return_time=FOREVER)) for _ in range(2)
    ]
    for worker in workers:
        await worker.opened
        await worker.acquire()
    wait = asyncio.ensure_future(first.acquire())
    await anyio.sleep(A_WHILE)
    await asyncio.to_thread(own_server.stop, "immediate")
    second.release()
    await anyio.sleep(A_WHILE)
    await asyncio.to_thread(own_server.start)
    with anyio.fail_after(PATIENCE):
        await wait
    late = asyncio.ensure_future(second.acquire())
    await anyio.sleep(A_WHILE)
    had_to_wait = not late.done()
    first.release()
    with anyio.fail_after(PATIENCE):
        await late
    for worker in workers:
        worker.stop()
        await worker.stopped

    assert had_to_wait
    assert PASSWORD not in caplog.text
    assert sum("it can be used again" in record.getMessage() for record in caplog.records) == 2


async def test_a_server_that_does_not_come_back(own_server: PostgresServer, schema: str) -> None:
    """Waits fail after a while; closing does no harm."""
    address = PostgresAddress.parse(own_server.conninfo(), schema)
    worker = LimitWorker(PostgresConnection(address, 1, keep_after_death=False), away_time=0.5)
    await worker.opened
    await asyncio.to_thread(own_server.stop, "immediate")
    try:
        with pytest.raises(InFlightLimitError, match="can't be used") as raised, anyio.fail_after(PATIENCE):
            await worker.acquire()
        worker.stop()
        await worker.stopped
    finally:
        await asyncio.to_thread(own_server.start)

    assert PASSWORD not in f"{raised.value} {raised.value.__cause__}"


async def test_the_connection_is_lost_while_it_is_closed(address: PostgresAddress) -> None:
    """A close that can't give the slots back leaves that to the others."""
    connection = PostgresConnection(address, 1, keep_after_death=False)
    connection.update(1, waits=False, adopted=0)
    assert connection._cursor is not None
    connection._cursor.connection.pgconn.finish()
    connection.close()


# ------------------------------------------------------------------ addresses and schemas


async def test_a_database_that_can_not_be_used(postgres: PostgresServer, schema: str) -> None:
    """A wrong password and a server that isn't there are errors when the limit is opened, without the password."""
    messages: list[str] = []
    for conninfo in (
        postgres.conninfo().replace(PASSWORD, "secret-1"), "postgresql://flux:secret-1@127.0.0.1:1/flux",
    ):  # fmt: skip
        limit = PostgresInFlightLimit(conninfo, 1, schema=schema)
        with pytest.raises(InFlightLimitError) as raised:
            await limit.open()
        await limit.close()
        messages.append(f"{raised.value}{raised.value.__cause__}")

    assert "password authentication failed" in messages[0]
    assert "Connection refused" in messages[1]
    assert all("127.0.0.1" in message and "secret-1" not in message for message in messages)


def test_its_text() -> None:
    """A limit shows its address without the password, its slots and its schema; a wrong address is an error."""
    limit = PostgresInFlightLimit("postgresql://me:secret-1@db.example/flux", 24)
    with pytest.raises(ConfigurationError, match="the address of a database"):
        PostgresInFlightLimit("db.example", 24)

    assert repr(limit) == "PostgresInFlightLimit('postgresql://me@db.example/flux', 24, schema='flux2max')"
    assert limit.limit == 24


async def test_what_is_not_this_version(address: PostgresAddress, postgres: PostgresServer, schema: str) -> None:
    """A table that a newer version has created is an error, and left as it is; a table that is lost is made anew."""
    first = PostgresInFlightLimit(postgres.conninfo(), 2, schema=schema)
    await first.open()
    with closing(address.connect("a test", 12.0)) as connection:
        connection.execute("DROP TABLE limit_holders")
        with anyio.fail_after(PATIENCE):
            await first.acquire()
        await first.close()
        connection.execute("COMMENT ON TABLE limit_holders IS 'flux2max_async in-flight limit, version 99'")
        with pytest.raises(InFlightLimitError, match=r"a newer version wrote the limit .* version 99"):
            await PostgresInFlightLimit(postgres.conninfo(), 2, schema=schema).open()


# ------------------------------------------------------------------ several processes

HOST = """
import asyncio, sys
from flux2max_async import PostgresInFlightLimit

async def run(name, limit, port):
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    while True:
        await limit.acquire()
        for word in ("begin", "end"):
            writer.write(f"{word} {name}\\n".encode())
            await reader.readline()
            await asyncio.sleep(0.005)
        limit.release()

async def main():
    conninfo, schema, slots, port, name, requests = sys.argv[1:]
    limit = PostgresInFlightLimit(conninfo, int(slots), schema=schema)
    await limit.open()
    await asyncio.gather(*(run(name, limit, int(port)) for _ in range(int(requests))))

asyncio.run(main())
"""


class Service:
    """Counts how many tasks the hosts have in flight; those of a host that is killed end with its connections."""

    def __init__(self) -> None:
        self.in_flight = 0
        self.most = 0
        self.begun: Counter[str] = Counter()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        in_flight = 0
        with contextlib.suppress(ConnectionError):
            while line := (await reader.readline()).decode().split():
                change = 1 if line[0] == "begin" else -1
                self.begun[line[1]] += line[0] == "begin"
                in_flight += change
                self.in_flight += change
                self.most = max(self.most, self.in_flight)
                writer.write(b"\n")
        self.in_flight -= in_flight
        writer.close()

    async def wait_for(self, name: str, more: int) -> None:
        wanted = self.begun[name] + more
        with anyio.fail_after(PATIENCE):
            while self.begun[name] < wanted:  # noqa: ASYNC110 - the other side is a process
                await anyio.sleep(0.01)


async def test_hosts_share_a_limit(postgres: PostgresServer, schema: str, tmp_path: Path) -> None:
    """Never more than the limit are in flight, those who have few requests get their turns, and slots come back."""
    service = Service()
    (tmp_path / "host.py").write_text(HOST)
    with ExitStack() as stack:
        async with await asyncio.start_server(service.serve, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]

            def start(name: str, requests: int) -> "subprocess.Popen[bytes]":
                arguments = (postgres.conninfo(), schema, "3", str(port), name, str(requests))
                process = subprocess.Popen([sys.executable, str(tmp_path / "host.py"), *arguments])
                stack.callback(process.wait)
                stack.callback(process.kill)
                return process

            first = start("busy", 30)
            await service.wait_for("busy", 10)
            start("small", 1)
            await service.wait_for("small", 1)
            before = service.begun.copy()
            await service.wait_for("small", 20)
            turns = service.begun - before
            start("second", 30)
            await service.wait_for("second", 10)
            first.send_signal(signal.SIGKILL)
            first.wait()
            await service.wait_for("second", 50)
            stack.close()

    assert service.most == 3
    assert turns["busy"] <= 10 * turns["small"]


def test_a_notification_that_comes_late(start: Callable[..., Holder]) -> None:
    """A grant that was found before its notification arrived is not taken for another one."""
    first, second = start(1), start(1)
    assert [first.acquire(), second.acquire()] == [True, False]
    first.release()
    second.update()
    second.release()
    assert [first.acquire(), second.acquire()] == [True, False]
    second.connection.wait(PATIENCE)
    second.update()
    late = second.held
    first.release()
    second.connection.wait(PATIENCE)
    second.update()

    assert (late, second.held, second.waits) == (0, 1, False)
    assert not first.acquire()


def test_many_that_wait(start: Callable[..., Holder], address: PostgresAddress) -> None:
    """The more wait, the less often each checks the others; a notification still ends its wait."""
    first, second = start(1), start(1)
    first.acquire()
    second.acquire()
    with address.connect("a test", 12.0) as connection:
        for number in range(99):
            hold_lock(connection, number)
            connection.execute(
                "INSERT INTO limit_holders (id, lock, slots, held, ticket, kept) VALUES (%s, %s, 1, 0, %s, false)",
                (f"other {number}", number, 1000 + number),
            )
        second.update()
        started = time.monotonic()
        second.connection.wait(0.1)
        waited = time.monotonic() - started
        first.release()
        second.connection.wait(PATIENCE)
        second.update()

    assert waited > 0.35
    assert (second.held, second.waits) == (1, False)


async def test_a_slot_that_is_released_wakes_another_host(postgres: PostgresServer, schema: str) -> None:
    """A slot goes to the one that waits at once, however long it would wait by itself."""
    limits = [PostgresInFlightLimit(postgres.conninfo(), 1, schema=schema) for _ in range(2)]
    async with contextlib.AsyncExitStack() as stack:
        for limit in limits:
            await limit.open()
            stack.push_async_callback(limit.close)
        first, second = limits
        await acquire(first)
        assert second._worker is not None
        second._worker._connection.check_interval = FOREVER
        wait = asyncio.ensure_future(acquire(second))
        await anyio.sleep(A_WHILE)
        first.release()
        await wait
