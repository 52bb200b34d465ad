"""What only a journal in PostgreSQL has: connections that get lost, hosts that die, and a schema with a version."""

import asyncio
import contextlib
import signal
import subprocess
import sys
import textwrap
import threading
import traceback
from collections.abc import AsyncIterator, Callable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any, cast

import attrs
import psycopg
import pytest
from support.ports import free_port
from support.postgres import PASSWORD, PostgresServer
from support.tcp_proxy import TcpProxy

from flux2max_async import (
    BudgetExceededError,
    ConfigurationError,
    GenerationRequest,
    JournalError,
    PostgresJournal,
)
from flux2max_async.emulator import Emulator
from flux2max_async.journal import EntryState, Holder, JournalEntry, SavedFile
from flux2max_async.journal._postgres_store import PostgresStore

PATIENCE = 40.0
"""Seconds for what takes one or two."""
WORKER = "flux2max_async.journal._worker"
CONNECTION = "flux2max_async.journal._postgres_connection"


@pytest.fixture
def anyio_backend() -> str:
    """Use real time, in which a server answers."""
    return "asyncio"


@pytest.fixture
async def journal(postgres: PostgresServer, schema: str) -> AsyncIterator[PostgresJournal]:
    async with PostgresJournal(postgres.conninfo(), schema=schema) as opened:
        yield opened


@pytest.fixture
def no_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Presume owners without a lock dead at once, although the server was started a moment ago."""
    monkeypatch.setattr(f"{CONNECTION}._GRACE", 0.0)


@pytest.fixture
def proxy(postgres: PostgresServer) -> Iterator[TcpProxy]:
    with TcpProxy(postgres.port) as running:
        yield running


def through(proxy: TcpProxy, **options: str) -> str:
    """Return the address of the server behind a proxy."""
    query = "&".join(f"{name}={value}" for name, value in options.items())
    return f"postgresql://flux:{PASSWORD}@127.0.0.1:{proxy.port}/flux?{query}"


def intent(key: str = "k", **more: Any) -> JournalEntry:
    return JournalEntry(
        key=key, fingerprint="c1", request={"prompt": f"a {key}"}, holder=Holder.US, committed=Decimal("0.07"), **more
    )


def submitted(key: str = "k") -> JournalEntry:
    return attrs.evolve(intent(key), state=EntryState.SUBMITTED, task_id=f"t-{key}")


def completed(key: str = "k") -> JournalEntry:
    return attrs.evolve(submitted(key), state=EntryState.COMPLETED, holder=None, result={"images": []})


def execute(postgres: PostgresServer, schema: str, statement: str, *values: object) -> list[tuple[Any, ...]]:
    with psycopg.connect(postgres.conninfo(), options=f"-csearch_path={schema}", autocommit=True) as connection:
        cursor = connection.execute(statement.encode(), values or None)
        return cursor.fetchall() if cursor.description else []


def states(postgres: PostgresServer, schema: str) -> dict[str, str]:
    return dict(execute(postgres, schema, "SELECT key, state FROM entries"))


async def wait_until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE):
        while not condition():  # noqa: ASYNC110 - a database has no event
            await asyncio.sleep(0.05)


# ------------------------------------------------------------------ connections that are lost


async def test_the_server_is_restarted(
    postgres: PostgresServer, schema: str, journal: PostgresJournal, caplog: pytest.LogCaptureFixture
) -> None:
    """What is requested while the server is down waits and is done, in its order; entries keep their holder."""
    await journal.begin(intent())
    postgres.stop("immediate")
    pending = [
        asyncio.ensure_future(call)
        for call in (journal.record(submitted()), journal.begin(intent("b")), journal.find("k"))
    ]
    await asyncio.sleep(0.5)
    waited = not any(call.done() for call in pending)
    postgres.start()
    async with asyncio.timeout(PATIENCE):
        _, begun, first = await asyncio.gather(*pending)
        second = await journal.find("b")
    await wait_until(lambda: "connected again after" in caplog.text)

    assert waited
    assert begun is True
    assert isinstance(first, JournalEntry)
    assert isinstance(second, JournalEntry)
    assert (first.state, first.task_id, first.holder) == (EntryState.SUBMITTED, "t-k", Holder.US)
    assert (second.state, second.holder) == (EntryState.INTENT, Holder.US)
    assert states(postgres, schema) == {"k": "submitted", "b": "intent"}


async def test_an_outage_that_lasts(
    postgres: PostgresServer, schema: str, journal: PostgresJournal, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the longest outage nothing waits any more, and nothing is begun; ends are written when there is a server."""
    monkeypatch.setattr(f"{WORKER}._MAX_OUTAGE", 0.5)
    for key in ("a", "b"):
        await journal.begin(intent(key))
    postgres.stop()
    try:
        async with asyncio.timeout(PATIENCE):
            errors = await asyncio.gather(
                journal.record(submitted("a")), journal.record(completed("a")), journal.record(submitted("b")),
                journal.begin(intent("c")), journal.find("a"), return_exceptions=True,
            )  # fmt: skip
            later = await asyncio.gather(journal.begin(intent("d")), return_exceptions=True)
    finally:
        postgres.start()
    await wait_until(lambda: states(postgres, schema) == {"a": "completed", "b": "submitted"})

    assert {type(error) for error in (*errors, *later)} == {JournalError}
    assert "the journal postgresql://flux@127.0.0.1" in str(errors[0])
    assert PASSWORD not in str(errors)
    assert await journal.begin(intent("c"))


@pytest.mark.parametrize("returns", [True, False])
async def test_a_journal_is_closed_while_the_server_is_down(
    postgres: PostgresServer, schema: str, monkeypatch: pytest.MonkeyPatch, returns: bool
) -> None:
    """Closing waits for the server if there is something to write, but not for longer than any call."""
    monkeypatch.setattr(f"{WORKER}._MAX_OUTAGE", PATIENCE if returns else 1.0)
    journal = PostgresJournal(postgres.conninfo(), schema=schema)
    await journal.open()
    await journal.begin(intent())
    postgres.stop()
    try:
        recording = asyncio.ensure_future(journal.record(submitted()))
        await asyncio.sleep(0.3)
        closing = asyncio.ensure_future(journal.close())
        await asyncio.sleep(0.3)
        waited = not closing.done()
        if not returns:
            async with asyncio.timeout(PATIENCE):
                await closing
    finally:
        postgres.start()
    async with asyncio.timeout(PATIENCE):
        await closing
    (error,) = await asyncio.gather(recording, return_exceptions=True)

    assert waited
    assert isinstance(error, JournalError) is not returns
    assert states(postgres, schema) == {"k": "submitted" if returns else "intent"}


async def test_closing_without_anything_to_write(postgres: PostgresServer, schema: str) -> None:
    """A journal that has nothing to write is closed at once, with or without a server."""
    journal = PostgresJournal(postgres.conninfo(), schema=schema)
    await journal.open()
    postgres.stop()
    try:
        async with asyncio.timeout(PATIENCE):
            await journal.close()
    finally:
        postgres.start()


def test_an_event_loop_ends_while_the_server_is_down(
    postgres: PostgresServer, schema: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The thread of a journal that nobody has closed ends, with a warning."""

    async def open_without_closing() -> None:
        await PostgresJournal(postgres.conninfo(), schema=schema).open()
        postgres.stop()
        await asyncio.sleep(0.3)

    async def wait() -> None:
        await wait_until(lambda: "the event loop ended before its session was closed" in caplog.text)

    try:
        asyncio.run(open_without_closing())
        asyncio.run(wait())
    finally:
        postgres.start()


Lose = Callable[[PostgresStore], None]


def lose_answer(monkeypatch: pytest.MonkeyPatch, statement: str, *, is_done: bool, then: Lose = lambda _: None) -> None:
    """Lose the connection once, after a statement was sent, or instead.

    Args:
        monkeypatch: The fixture.
        statement: How it begins.
        is_done: Whether the server has executed it.
        then: What happens before there is a connection again.
    """
    original = PostgresStore._execute
    lost: list[str] = []

    def execute_once(store: PostgresStore, text: str, values: Any = None) -> Any:
        if text.strip().startswith(statement) and not lost:
            lost.append(text)
            if is_done:
                original(store, text, values)
                if (pipeline := store._connection._pipeline) is not None:
                    pipeline.sync()
            then(store)
            store._connection.close()
            raise psycopg.OperationalError("the answer was lost")
        return original(store, text, values)

    monkeypatch.setattr(PostgresStore, "_execute", execute_once)


@pytest.mark.parametrize("limit", [None, Decimal("0.15")])
@pytest.mark.parametrize("is_done", [True, False])
async def test_an_intent_whose_answer_was_lost(
    postgres: PostgresServer, schema: str, journal: PostgresJournal, monkeypatch: pytest.MonkeyPatch, is_done: bool,
    limit: Decimal | None,
) -> None:  # fmt: skip
    """It is begun once, and counts once, whether the server has stored it before the connection was lost or not."""
    lose_answer(monkeypatch, "COMMIT" if limit else "INSERT INTO entries", is_done=is_done)
    begun = await asyncio.gather(*(journal.begin(intent(), limit=limit) for _ in range(2)))

    assert sorted(begun) == [False, True]
    assert states(postgres, schema) == {"k": "intent"}
    assert await journal.begin(intent("b"), limit=Decimal("0.15"))
    with pytest.raises(BudgetExceededError, match=r"\$0.14 are spent"):
        await journal.begin(intent("c"), limit=Decimal("0.15"))


async def test_an_intent_that_another_host_takes_for_uncertain(
    postgres: PostgresServer, schema: str, journal: PostgresJournal, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was not sent yet: it becomes an intent again, unless somebody has submitted the request anew."""

    def adopt(store: PostgresStore) -> None:
        execute(postgres, schema, "UPDATE entries SET state = 'uncertain', owner = NULL WHERE state = 'intent'")

    def submit_again(store: PostgresStore) -> None:
        adopt(store)
        execute(
            postgres, schema,
            "INSERT INTO entries (key, attempt, content, state, outlay, request, result, files)"
            " SELECT key, attempt + 1, content, 'submitted', outlay, request, result, files FROM entries WHERE key = 'b'",
        )  # fmt: skip

    lose_answer(monkeypatch, "INSERT INTO entries", is_done=True, then=adopt)
    begun = await journal.begin(intent("a"))
    await journal.record(submitted("a"))
    lose_answer(monkeypatch, "INSERT INTO entries", is_done=True, then=submit_again)
    again = await journal.begin(intent("b"))

    assert (begun, again) == (True, False)
    found = await journal.find("a")
    assert found is not None
    assert (found.state, found.holder) == (EntryState.SUBMITTED, Holder.US)


def fail_once(monkeypatch: pytest.MonkeyPatch, statement: str, error: Exception) -> None:
    """Raise an error once instead of executing a statement."""
    original = PostgresStore._execute
    failures = [error]

    def execute_or_fail(store: PostgresStore, text: str, values: Any = None) -> Any:
        if text.strip().startswith(statement) and failures:
            raise failures.pop()
        return original(store, text, values)

    monkeypatch.setattr(PostgresStore, "_execute", execute_or_fail)


INTERRUPTIONS = {
    "deadlock": psycopg.errors.DeadlockDetected("deadlock detected"),
    "shutdown": psycopg.errors.AdminShutdown("terminating connection"),
}


@pytest.mark.parametrize("interruption", INTERRUPTIONS)
@pytest.mark.parametrize("closes", [False, True])
async def test_jobs_that_are_interrupted_run_again(
    postgres: PostgresServer, schema: str, monkeypatch: pytest.MonkeyPatch, interruption: str, closes: bool
) -> None:
    """A transaction that the server ends runs again, and nobody notices, also if the journal is closed meanwhile."""
    monkeypatch.setattr(f"{CONNECTION}._HEARTBEAT_INTERVAL", 3600.0)
    journal = PostgresJournal(postgres.conninfo(), schema=schema, lease=3600.0)
    await journal.open()
    await journal.find("k")  # there has been a heartbeat
    is_held_up, held_up = threading.Event(), threading.Event()

    def hold_up(_: object) -> bool:
        is_held_up.set()
        return held_up.wait(PATIENCE)

    calls = [asyncio.ensure_future(journal._run(hold_up, writes=False))]
    await asyncio.to_thread(is_held_up.wait, PATIENCE)  # what follows is for the thread one group
    fail_once(monkeypatch, "COMMIT", INTERRUPTIONS[interruption])
    calls += [asyncio.ensure_future(journal.begin(intent(f"{number}"))) for number in range(5)]
    await asyncio.sleep(0)
    closing = asyncio.ensure_future(journal.close()) if closes else None
    await asyncio.sleep(0)
    held_up.set()
    async with asyncio.timeout(PATIENCE):
        begun = await asyncio.gather(*calls)
        await (closing or journal.close())

    assert begun == [True] * 6
    assert len(states(postgres, schema)) == 5


@pytest.mark.parametrize("interruption", INTERRUPTIONS)
async def test_a_heartbeat_that_is_interrupted(
    journal: PostgresJournal, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, interruption: str
) -> None:
    """The next one follows, over another connection if need be, and no error is logged."""
    beats: list[str] = []
    fail_once(monkeypatch, "COMMIT", INTERRUPTIONS[interruption])
    heartbeat = PostgresStore.heartbeat

    def count(store: PostgresStore) -> bool:
        beats.append(store.owner)
        return heartbeat(store)

    monkeypatch.setattr(PostgresStore, "heartbeat", count)
    await wait_until(lambda: len(beats) >= 3)

    assert await journal.begin(intent())
    assert "can't be used" not in caplog.text


_SELECT = "SELECT \n    e.key"
"""How the statements that read entries begin."""


@pytest.mark.parametrize(
    ("waits", "error"),
    [
        (True, psycopg.errors.AdminShutdown("shutting down")),
        (True, psycopg.errors.DiskFull("full")),
        (False, psycopg.errors.AdminShutdown("shutting down")),
    ],
)
async def test_changes_are_noticed_although_reading_them_fails_once(
    postgres: PostgresServer, schema: str, monkeypatch: pytest.MonkeyPatch, waits: bool, error: psycopg.Error
) -> None:
    """Who waits for an entry, or holds one that has ended, learns of it over the next connection, or by the next try."""
    reports: asyncio.Queue[list[JournalEntry]] = asyncio.Queue()
    journal = PostgresJournal(postgres.conninfo(), schema=schema)
    await journal.open(reports.put_nowait, watch_changes=True)
    try:
        async with PostgresJournal(postgres.conninfo(), schema=schema) as other:
            for key, owner in (("ours", journal), ("theirs", other)):
                await owner.begin(intent(key))
                await owner.record(submitted(key))
            held = await journal.find("theirs")
            assert held is not None
            waiting = asyncio.ensure_future(journal.changed(held)) if waits else None
            await asyncio.sleep(0.3)
            found = await other.find("ours")
            assert found is not None
            fail_once(monkeypatch, _SELECT, error)
            await other.record(completed("theirs"))
            await other.record(attrs.evolve(completed("ours"), holder=Holder.OTHER))
            async with asyncio.timeout(PATIENCE):
                (entry,) = await reports.get()
                await (waiting or asyncio.sleep(0))
    finally:
        await journal.close()

    assert found.holder is Holder.OTHER
    assert (entry.key, entry.state, entry.holder) == ("ours", EntryState.COMPLETED, Holder.US)


async def test_a_record_that_the_server_has_no_room_for(
    postgres: PostgresServer, schema: str, journal: PostgresJournal, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is an error of its caller, and written a little later."""
    await journal.begin(intent())
    fail_once(monkeypatch, "UPDATE entries", psycopg.errors.DiskFull("no space left on device"))
    with pytest.raises(JournalError, match="no space left on device"):
        await journal.record(submitted())
    await wait_until(lambda: states(postgres, schema) == {"k": "submitted"})


async def test_an_error_of_the_server_is_one_of_the_calls(
    postgres: PostgresServer, schema: str, journal: PostgresJournal, caplog: pytest.LogCaptureFixture
) -> None:
    """If the tables are gone, each call raises a JournalError, and so does who waits for a change."""
    await journal.begin(intent())
    found = await journal.find("k")
    assert found is not None
    waiting = asyncio.ensure_future(journal.changed(found))
    await asyncio.sleep(0.2)
    execute(postgres, schema, "ALTER TABLE entries RENAME TO something")
    async with asyncio.timeout(PATIENCE):
        await waiting
    with pytest.raises(JournalError, match="does not exist"):
        await journal.begin(intent("b"))
    execute(postgres, schema, "DROP TABLE owners")
    await wait_until(lambda: '"owners" does not exist' in caplog.text)


async def test_a_network_that_loses_everything(proxy: TcpProxy, schema: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that doesn't answer is one whose connection is lost; there is another one as soon as there can be."""
    monkeypatch.setattr(f"{CONNECTION}._ANSWER_TIME", 0.5)
    async with PostgresJournal(through(proxy, connect_timeout="2"), schema=schema) as journal:
        await journal.begin(intent())
        proxy.hold()
        beginning = asyncio.ensure_future(journal.begin(intent("b")))
        await asyncio.sleep(1.0)
        waited = not beginning.done()
        proxy.resume()
        async with asyncio.timeout(PATIENCE):
            begun = await beginning

    assert waited
    assert begun


# ------------------------------------------------------------------ several hosts

_HOST = """
    import asyncio, sys
    from flux2max_async import PostgresJournal
    from flux2max_async.journal import EntryState, Holder, JournalEntry

    async def main():
        journal = PostgresJournal(sys.argv[1], schema=sys.argv[2])
        await journal.open()
        for key in ("a", "b"):
            entry = JournalEntry(key=key, fingerprint="c1", request={}, holder=Holder.US)
            await journal.begin(entry)
        await journal.record(JournalEntry(key="a", fingerprint="c1", request={}, holder=Holder.US, task_id="t-a",
                                          state=EntryState.SUBMITTED))
        print("ready", flush=True)
        await asyncio.sleep(60)

    asyncio.run(main())
"""


@contextlib.contextmanager
def _killed(process: "subprocess.Popen[str]") -> Iterator[None]:
    """Kill a process at the end of the block, however that is left."""
    try:
        yield
    finally:
        process.kill()


@pytest.mark.usefixtures("no_grace")
async def test_the_death_of_a_process_is_noticed(postgres: PostgresServer, schema: str) -> None:
    """Another host gets its tasks; its intent is uncertain; and who waits for one of its entries learns of it."""
    reports: asyncio.Queue[list[JournalEntry]] = asyncio.Queue()
    journal = PostgresJournal(postgres.conninfo(), schema=schema)
    await journal.open(reports.put_nowait)
    command = [sys.executable, "-c", textwrap.dedent(_HOST), postgres.conninfo(), schema]
    try:
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process, _killed(process):  # noqa: ASYNC220 - starts at once
            assert process.stdout is not None
            assert await asyncio.to_thread(process.stdout.readline) == "ready\n"
            async with asyncio.timeout(PATIENCE):
                while (held := await journal.find("b")) is None:  # noqa: ASYNC110 - another host has no event
                    await asyncio.sleep(0.05)  # find() may miss what another host has only just begun
            waiting = asyncio.ensure_future(journal.changed(held))
            await asyncio.sleep(1.5)
            was_waiting = not waiting.done() and reports.empty()
            process.send_signal(signal.SIGKILL)
            async with asyncio.timeout(PATIENCE):
                (adopted,) = await reports.get()
                await waiting
        uncertain = await journal.find("b")
    finally:
        await journal.close()

    assert was_waiting
    assert held.holder is Holder.OTHER
    assert (adopted.task_id, adopted.holder) == ("t-a", Holder.US)
    assert uncertain is not None
    assert (uncertain.state, uncertain.holder) == (EntryState.UNCERTAIN, None)


async def test_a_restart_of_the_server_is_nobodys_death(
    postgres: PostgresServer, schema: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hosts that have to connect anew don't take each other's tasks."""
    monkeypatch.setattr(f"{CONNECTION}._GRACE", PATIENCE)
    reports: list[list[JournalEntry]] = []
    first, second = (PostgresJournal(postgres.conninfo(), schema=schema) for _ in range(2))
    for journal in (first, second):
        await journal.open(reports.append)
    await first.begin(intent("a"))
    await first.record(submitted("a"))
    await second.begin(intent("b"))
    await second.record(submitted("b"))
    await asyncio.sleep(1.2)  # until they have seen each other
    postgres.stop("immediate")
    postgres.start()
    await asyncio.sleep(3)
    async with asyncio.timeout(PATIENCE):
        found = [await first.find("a"), await second.find("b"), await first.find("b")]
    for journal in (first, second):
        await journal.close()

    assert [entry and (entry.state, entry.holder) for entry in found] == [
        (EntryState.SUBMITTED, Holder.US), (EntryState.SUBMITTED, Holder.US), (EntryState.SUBMITTED, Holder.OTHER),
    ]  # fmt: skip
    assert reports == []


@pytest.mark.usefixtures("no_grace")
async def test_a_host_that_is_cut_off_comes_back(
    postgres: PostgresServer, proxy: TcpProxy, schema: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Its task is adopted meanwhile, and it says so; the end that it records then is there for both."""
    reports: asyncio.Queue[list[JournalEntry]] = asyncio.Queue()
    other = PostgresJournal(postgres.conninfo(), schema=schema)
    await other.open(reports.put_nowait, watch_changes=True)
    try:
        async with PostgresJournal(through(proxy), schema=schema) as journal:
            await journal.begin(intent())
            await journal.record(submitted())
            await asyncio.sleep(1.5)
            proxy.cut()
            async with asyncio.timeout(PATIENCE):
                (adopted,) = await reports.get()
            recording = asyncio.ensure_future(journal.record(completed()))
            proxy.resume()
            async with asyncio.timeout(PATIENCE):
                await recording
            await wait_until(lambda: "others may follow its tasks now" in caplog.text)
        ended = await other.find("k")
    finally:
        await other.close()

    assert (adopted.state, adopted.holder) == (EntryState.SUBMITTED, Holder.US)
    assert ended == completed()


async def test_many_hosts_create_the_schema_at_once(postgres: PostgresServer, schema: str) -> None:
    """Twenty journals that are opened at once share one schema, and no budget is passed."""
    journals = [PostgresJournal(postgres.conninfo(), schema=schema) for _ in range(20)]
    await asyncio.gather(*(journal.open() for journal in journals))
    begun = await asyncio.gather(
        *(
            journal.begin(intent(f"{number}-{again}"), limit=Decimal("1.0"))
            for number, journal in enumerate(journals)
            for again in range(2)
        ),
        return_exceptions=True,
    )
    await asyncio.gather(*(journal.close() for journal in journals))

    assert begun.count(True) == 14
    assert {type(error) for error in begun if error is not True} == {BudgetExceededError}
    assert len(states(postgres, schema)) == 14


async def test_an_entry_that_is_gone_has_changed(
    postgres: PostgresServer, schema: str, journal: PostgresJournal
) -> None:
    """changed() returns if the entry isn't there any more."""
    async with asyncio.timeout(PATIENCE):
        await journal.changed(attrs.evolve(intent(), holder=Holder.OTHER, owner="them"))


@pytest.mark.usefixtures("no_grace")
async def test_damaged_rows_are_skipped(
    postgres: PostgresServer, schema: str, caplog: pytest.LogCaptureFixture
) -> None:
    """They are neither listed nor adopted, with a warning for each; waiting for one ends."""
    reports: asyncio.Queue[list[JournalEntry]] = asyncio.Queue()
    journal = PostgresJournal(postgres.conninfo(), schema=schema)
    await journal.open(reports.put_nowait)
    try:
        for key in ("a", "b"):
            await journal.begin(intent(key))
            await journal.record(submitted(key))
        held = await journal.find("a")
        assert held is not None
        execute(postgres, schema, "UPDATE entries SET request = '{' WHERE key = 'a'")
        execute(postgres, schema, "UPDATE entries SET owner = 'them'")
        execute(postgres, schema, "INSERT INTO owners VALUES ('them', 1)")
        async with asyncio.timeout(PATIENCE):
            await journal.changed(held)
            adopted = await reports.get()
        listed = [entry.key async for entry in journal.entries()]
    finally:
        await journal.close()

    assert [entry.key for entry in adopted] == ["b"]
    assert listed == ["b"]
    assert "the entry of 'a' in the journal postgresql://flux@" in caplog.text


# ------------------------------------------------------------------ reading and pruning


async def test_all_entries_are_listed_in_pages(
    postgres: PostgresServer, schema: str, journal: PostgresJournal, tmp_path: Path
) -> None:
    """Entries are listed in their order, with their holders, also by who has not opened the journal; and exported."""
    await journal.begin(intent("first", webhook_token="token"))
    await asyncio.gather(*(journal.begin(intent(f"{number}")) for number in range(1_100)))
    await journal.record(attrs.evolve(completed("first"), files=(SavedFile(Path("/a.png"), 3),)))
    execute(postgres, schema, "UPDATE entries SET owner = 'them' WHERE key = '7'")
    execute(postgres, schema, "INSERT INTO owners VALUES ('them', 1)")
    reader = PostgresJournal(postgres.conninfo(), schema=schema)
    listed = [entry async for entry in reader.entries()]
    exported = await reader.export(tmp_path / "all.jsonl")

    assert len(listed) == 1_101
    assert listed[0] == attrs.evolve(completed("first"), files=(SavedFile(Path("/a.png"), 3),), webhook_token="token")
    holders = {entry.key: entry.holder for entry in listed[1:]}
    assert holders.pop("7") is None
    assert set(holders.values()) == {Holder.OTHER}
    assert len(exported.read_text().splitlines()) == 1_101
    assert "token" not in exported.read_text()


@pytest.mark.parametrize("state", list(EntryState))
@pytest.mark.parametrize("owner", [None, "living", "dead"])
async def test_what_is_forgotten(
    postgres: PostgresServer, schema: str, journal: PostgresJournal, state: EntryState, owner: str | None
) -> None:
    """Old ends that no living session holds, and no attempt behind one that stays; their cost still counts."""
    await asyncio.gather(*(journal.begin(intent(key)) for key in ("a", "new", "later")))
    await journal.begin(attrs.evolve(intent("later"), attempt=2))
    execute(postgres, schema, "UPDATE entries SET created = 1, state = 'completed', owner = NULL")
    execute(postgres, schema, "UPDATE entries SET ended = 4e9 WHERE key = 'new'")
    execute(postgres, schema, "UPDATE entries SET state = 'uncertain' WHERE key = 'later' AND attempt = 1")
    execute(postgres, schema, "INSERT INTO owners VALUES ('dead', 1)")
    ((us,),) = execute(postgres, schema, "SELECT id FROM owners WHERE id != 'dead'")
    holder = us if owner == "living" else owner
    execute(
        postgres,
        schema,
        "UPDATE entries SET state = %s, owner = %s, task_id = 't' WHERE key = 'a'",
        state.value,
        holder,
    )
    forgotten = await PostgresJournal(postgres.conninfo(), schema=schema).prune(older_than=3600)

    has_ended = state in {EntryState.COMPLETED, EntryState.FAILED, EntryState.REFUSED}
    assert forgotten == (has_ended and owner != "living")
    assert ("a" in states(postgres, schema)) is not forgotten
    with pytest.raises(BudgetExceededError, match=r"\$0.28 are spent"):
        await journal.begin(intent("more"), limit=Decimal("0.3"))


async def test_the_oldest_are_forgotten_first(postgres: PostgresServer, schema: str, journal: PostgresJournal) -> None:
    """At most so many are forgotten as were asked for, in as many transactions as that takes."""
    await asyncio.gather(*(journal.begin(intent(f"{number}")) for number in range(1_200)))
    execute(postgres, schema, "UPDATE entries SET created = 1, state = 'failed', owner = NULL")

    assert await journal.prune(older_than=3600, limit=0) == 0
    assert await journal.prune(older_than=3600, limit=1_150) == 1_150
    assert min(execute(postgres, schema, "SELECT id FROM entries")) == (1_151,)
    assert await journal.prune(older_than=3600) == 50


# ------------------------------------------------------------------ schemas


async def test_a_schema_without_a_journal(postgres: PostgresServer, schema: str) -> None:
    """Reading and pruning create nothing: the error says that there is no journal."""
    journal = PostgresJournal(postgres.conninfo(), schema=schema)
    with pytest.raises(JournalError, match=f"there is no journal in the schema {schema} of postgresql://flux@"):
        _ = [entry async for entry in journal.entries()]
    with pytest.raises(JournalError, match="there is no journal"):
        await journal.prune(older_than=0)

    assert execute(postgres, "public", f"SELECT 1 FROM pg_namespace WHERE nspname = '{schema}'") == []


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        ("UPDATE version SET version = 2", "written by a newer version .schema 2, known is 1.: update flux2max_async"),
        ("UPDATE version SET version = 0", "written by an older version .schema 0, known is 1.: use another schema"),
        ("DROP TABLE version", "has tables that are not a journal's"),
        ("DELETE FROM version", "has tables that are not a journal's"),
        ("ALTER TABLE version RENAME COLUMN version TO number", "has tables that are not a journal's"),
    ],
)
async def test_other_schemas_are_refused(postgres: PostgresServer, schema: str, statement: str, message: str) -> None:
    """A schema of another version, or of another program, is left as it is."""
    journal = PostgresJournal(postgres.conninfo(), schema=schema)
    async with journal:
        pass
    execute(postgres, schema, statement)
    with pytest.raises(JournalError, match=message) as caught:
        await journal.open()
    with pytest.raises(JournalError, match=message):
        _ = [entry async for entry in journal.entries()]

    assert "left as it is" in str(caught.value)


@pytest.mark.parametrize(("encoding", "message"), [("LATIN1", "needs a database with the encoding UTF8, not LATIN1"),
                                                   ("SQL_ASCII", None)])  # fmt: skip
async def test_encodings(postgres: PostgresServer, schema: str, encoding: str, message: str | None) -> None:
    """A database that can't store every text is refused at once: one request would make others fail."""
    with psycopg.connect(postgres.conninfo(), autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {schema} ENCODING '{encoding}' LOCALE 'C' TEMPLATE template0".encode())
    journal = PostgresJournal(postgres.conninfo(dbname=schema), schema=schema)
    with pytest.raises(JournalError, match=message) if message else contextlib.nullcontext():
        async with journal:
            await journal.begin(intent("größe 🦊"))
            assert [entry.key async for entry in journal.entries()] == ["größe 🦊"]


async def test_a_key_that_cannot_be_stored_concerns_no_other_request(postgres: PostgresServer, schema: str) -> None:
    """A stream goes on after a request whose key the database can't store."""
    requests = [GenerationRequest("a cat", key=key) for key in ("a", "b\0", "c")]
    journal = PostgresJournal(postgres.conninfo(), schema=schema)
    async with Emulator(seconds=0.01, spread=0.0) as emulator, emulator.session(journal=journal) as session:
        outcomes = [outcome async for outcome in session.stream(requests)]

    assert sorted((outcome.request.key, outcome.ok) for outcome in outcomes if outcome.request) == [
        ("a", True), ("b\0", False), ("c", True),
    ]  # fmt: skip


async def test_tables_that_look_like_a_journals(postgres: PostgresServer, schema: str) -> None:
    """If a journal can't be used after all, the error says why, and the connection is closed."""
    journal = PostgresJournal(postgres.conninfo(), schema=schema)
    async with journal:
        pass
    execute(postgres, schema, "DROP TABLE owners")
    with pytest.raises(JournalError, match='"owners" does not exist'):
        await journal.open()


async def test_every_commit_is_durable(postgres: PostgresServer, schema: str) -> None:
    """A server whose commits don't wait for the disk waits for those of a journal."""
    conninfo = postgres.conninfo(options="-csynchronous_commit%3Doff")
    async with PostgresJournal(conninfo, schema=schema) as journal:
        assert await journal._run(
            lambda store: cast("PostgresStore", store)._execute("SHOW synchronous_commit").fetchone()
        ) == ("on",)


async def test_a_key_that_is_too_long_fails_alone(journal: PostgresJournal) -> None:
    """A key that no index can hold is a JournalError of its own request."""
    long, short = await asyncio.gather(
        journal.begin(intent("ö" * 1_500)), journal.begin(intent("ö" * 900)), return_exceptions=True
    )

    assert isinstance(long, JournalError)
    assert "its key is too long" in str(long)
    assert short is True


# ------------------------------------------------------------------ addresses


def texts(error: BaseException | None) -> str:
    """Return all that could be shown of an error, its causes included."""
    assert error is not None
    return "".join([*traceback.format_exception(error), repr(error), repr(error.__cause__), repr(error.__context__)])


async def test_a_database_that_is_not_there(postgres: PostgresServer) -> None:
    """It is a JournalError without the password, whatever the reason is, for who opens it and for who reads it."""
    addresses = [
        f"postgresql://flux:{PASSWORD}@127.0.0.1:{free_port()}/flux",
        postgres.conninfo().removesuffix("/flux") + "/missing",
        f"host=127.0.0.1 port={postgres.port} dbname=flux user=flux password=wrong-{PASSWORD}",
    ]
    for address in addresses:
        journal = PostgresJournal(address)
        with pytest.raises(JournalError, match=r"the journal postgresql://flux@127\.0\.0\.1") as opening:
            await journal.open()
        with pytest.raises(JournalError) as reading:
            _ = [entry async for entry in journal.entries()]
        assert PASSWORD not in texts(opening.value) + texts(reading.value)


def test_the_text_of_a_journal_has_no_password(postgres: PostgresServer) -> None:
    """It names the database and the schema."""
    text = repr(PostgresJournal(postgres.conninfo(), schema="team"))

    assert text == f"PostgresJournal('postgresql://flux@127.0.0.1:{postgres.port}/flux', schema='team')"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"conninfo": "postgresql://flux:secret@host:port/db"}, "the address of a database must be like postgresql://"),
        ({"schema": "Robert'); DROP"}, "schema must be"),
        ({"lease": 0.0}, "lease must be more than 0 seconds"),
    ],
)
def test_wrong_arguments(options: dict[str, Any], message: str) -> None:
    """They are errors that say what is right, and don't show a password."""
    with pytest.raises(ConfigurationError, match=message) as caught:
        PostgresJournal(**{"conninfo": "postgresql://host/db", **options})

    assert "secret" not in texts(caught.value)


def test_psycopg_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error says what to install."""
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(ConfigurationError, match=r"pip install 'flux2max_async\[postgres\]'"):
        PostgresJournal("postgresql://host/db")


async def test_the_password_may_be_in_the_environment(
    postgres: PostgresServer, schema: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the address leaves out is taken from libpq's variables."""
    for name, value in (
        ("PGHOST", "127.0.0.1"), ("PGPORT", str(postgres.port)), ("PGUSER", "flux"), ("PGPASSWORD", PASSWORD),
    ):  # fmt: skip
        monkeypatch.setenv(name, value)
    with contextlib.suppress(KeyError):
        monkeypatch.delenv("PGDATABASE")
    async with PostgresJournal("dbname=flux", schema=schema) as journal:
        assert await journal.begin(intent())
