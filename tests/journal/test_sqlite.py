"""The journal in an SQLite file: what it stores, how processes share it, and which files it refuses."""

import asyncio
import os
import resource
import sqlite3
import stat
import subprocess
import sys
import textwrap
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import closing, nullcontext
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any, ClassVar

import attrs
import pytest

from flux2max_async import (
    BudgetExceededError,
    ConfigurationError,
    FluxSession,
    JournalEntry,
    JournalError,
    SessionClosedError,
)
from flux2max_async._sqlite_files import create_file, retry_while_locked
from flux2max_async.emulator import Emulator
from flux2max_async.journal import EntryState, Holder, SavedFile, SqliteJournal

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


@pytest.fixture
def anyio_backend() -> str:
    """Use real time, in which a journal's thread runs."""
    return "asyncio"


@pytest.fixture
async def journal(tmp_path: Path) -> AsyncIterator[SqliteJournal]:
    async with SqliteJournal(tmp_path / "run.db", lease=4.0) as opened:
        yield opened


def intent(key: str = "k", **more: Any) -> JournalEntry:
    return JournalEntry(
        key=key, fingerprint="c1", request={"prompt": f"a {key}"}, holder=Holder.US, committed=Decimal("0.07"), created_at=NOW,
        **more,
    )  # fmt: skip


def submitted(key: str = "k") -> JournalEntry:
    return attrs.evolve(intent(key), state=EntryState.SUBMITTED, task_id=f"t-{key}", submitted_at=NOW)


def completed(key: str = "k") -> JournalEntry:
    return attrs.evolve(
        submitted(key), state=EntryState.COMPLETED, holder=None, ended_at=NOW, cost=Decimal("0.0725"),
        committed=Decimal("0.0725"), result={"images": []}, files=(SavedFile(Path("/images/a.png"), 9),),
    )  # fmt: skip


async def create_journal(path: Path, entries: int = 200) -> None:
    """Create a journal with so many entries."""
    async with SqliteJournal(path) as journal:
        await asyncio.gather(*(journal.begin(intent(f"{number}")) for number in range(entries)))


def rewrite(path: Path, statement: str, *arguments: object) -> None:
    """Change a journal's file over another connection."""
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute(statement, arguments)


# A file of schema version 1 with one task. The names of its triggers don't matter.
VERSION_1 = """
CREATE TABLE entries (id INTEGER PRIMARY KEY, key TEXT NOT NULL, attempt INTEGER NOT NULL, content TEXT NOT NULL,
    state TEXT NOT NULL, owner TEXT, task_id TEXT, cost TEXT, outlay INTEGER NOT NULL, created REAL, submitted REAL,
    ended REAL, request TEXT NOT NULL, result TEXT NOT NULL, files TEXT NOT NULL, UNIQUE (key, attempt));
CREATE TABLE owners
    (id TEXT PRIMARY KEY, beat INTEGER NOT NULL, lease REAL NOT NULL, place TEXT NOT NULL, pid INTEGER NOT NULL);
CREATE TABLE totals (outlay INTEGER NOT NULL);
INSERT INTO totals VALUES (0);
CREATE TRIGGER inserted AFTER INSERT ON entries BEGIN UPDATE totals SET outlay = outlay + new.outlay; END;
CREATE TRIGGER updated AFTER UPDATE OF outlay ON entries WHEN new.outlay != old.outlay
    BEGIN UPDATE totals SET outlay = outlay + new.outlay - old.outlay; END;
PRAGMA application_id = 0x464C5832;
PRAGMA user_version = 1;
INSERT INTO entries VALUES (1, 'k', 1, 'c1', 'submitted', NULL, 't-k', NULL, 70000000, 1767323045.0, 1767323045.0,
    NULL, '{"prompt":"a k"}', '{}', '[]');
"""


def add_remote_owner(path: Path, owner: str = "them") -> None:
    """Add an owner on another machine, of which only the heartbeat is known."""
    rewrite(path, "INSERT INTO owners VALUES (?, 1, 0.4, 'elsewhere', 1)", owner)


def dead_process_id() -> int:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        pass
    return process.pid


# ---------------------------------------------------------------------- entries


@pytest.mark.parametrize("content", [b"", None])
async def test_a_file_without_tables_has_no_entries(tmp_path: Path, content: bytes | None) -> None:
    """A file whose creation was interrupted has no entries, and can be opened as a new journal."""
    path = tmp_path / "run.db"
    if content is not None:
        path.write_bytes(content)
    else:
        with closing(sqlite3.connect(path)) as connection:
            connection.execute("PRAGMA journal_mode = WAL")
    before = [entry async for entry in SqliteJournal(path).entries()]
    async with SqliteJournal(path) as journal:
        assert await journal.begin(intent())
    after = [entry async for entry in SqliteJournal(path).entries()]

    assert (len(before), len(after)) == (0, 1)


async def test_a_dead_process_holds_no_entry(tmp_path: Path) -> None:
    """An entry of a process that has ended on this machine is listed without a holder."""
    path = tmp_path / "run.db"
    async with SqliteJournal(path) as journal:
        await journal.begin(intent())
        with closing(sqlite3.connect(path)) as connection:
            connection.execute("UPDATE owners SET pid = ?", (2**22 + 1,))  # Linux assigns smaller ids only
            connection.commit()
        (entry,) = [entry async for entry in journal.entries()]

    assert (entry.state, entry.holder) == (EntryState.INTENT, None)


async def test_find_may_miss_an_entry_but_begin_never_does(tmp_path: Path) -> None:
    """Two sessions that open an empty journal at once may miss each other's first entries, but never begin one twice."""
    path = tmp_path / "run.db"
    async with SqliteJournal(path) as first, SqliteJournal(path) as second:
        await first.begin(intent())
        early = await second.find("k")
        begun = await second.begin(intent())
        found = await second.find("k")

    # Once the second session has seen the first one, it looks into the file.
    assert early is None or early.holder is Holder.OTHER
    assert begun is False
    assert found is not None
    assert found.holder is Holder.OTHER


# ---------------------------------------------------------------------- tokens of webhooks


async def test_tokens_are_indexed(journal: SqliteJournal) -> None:
    """An entry is found by its token without reading the others."""
    await journal.begin(intent(webhook_token="token"))
    with closing(sqlite3.connect(journal.path)) as connection:
        plan = connection.execute("EXPLAIN QUERY PLAN SELECT * FROM entries e WHERE e.token = ?", ("token",)).fetchall()

    assert "USING INDEX tokens" in str(plan)


# ---------------------------------------------------------------------- entries that can't be stored


# ---------------------------------------------------------------------- sharing, and leases


async def test_tasks_of_an_owner_without_heartbeat_are_adopted(tmp_path: Path) -> None:
    """Tasks are adopted and reported when their owner's lease has expired; its intents become uncertain."""
    path = tmp_path / "run.db"
    reported: asyncio.Future[list[JournalEntry]] = asyncio.get_running_loop().create_future()
    async with SqliteJournal(path) as first:
        for key in ("k", "begun", "done"):
            await first.begin(intent(key))
        await first.record(submitted())
        await first.record(completed("done"))
    journal = SqliteJournal(path, lease=0.4)  # it checks the other owners four times in its own lease
    add_remote_owner(path)
    rewrite(path, "UPDATE entries SET owner = 'them'")
    await journal.open(reported.set_result)
    try:
        held = await journal.find("k")
        for heartbeat in range(5):  # the owner is alive for half a second
            await asyncio.sleep(0.1)
            rewrite(path, "UPDATE owners SET beat = ? WHERE id = 'them'", 10 + heartbeat)
        still_alive = not reported.done()
        async with asyncio.timeout(5):
            found = await reported
        begun, done = await journal.find("begun"), await journal.find("done")
    finally:
        await journal.close()

    assert held is not None
    assert held.holder is Holder.OTHER
    assert still_alive
    assert [(entry.key, entry.holder, entry.task_id) for entry in found] == [("k", Holder.US, "t-k")]
    assert begun is not None
    assert (begun.state, begun.holder) == (EntryState.UNCERTAIN, None)
    assert done is not None
    assert (done.state, done.holder) == (EntryState.COMPLETED, None)


async def test_the_lease_of_a_dead_process_ends_at_once(journal: SqliteJournal) -> None:
    """Entries of a process that has ended on this machine can be adopted at once, and changed() returns."""
    await journal.begin(intent())
    await journal.record(submitted())
    with closing(sqlite3.connect(journal.path)) as connection:
        ((host,),) = connection.execute("SELECT place FROM owners").fetchall()
    rewrite(journal.path, "INSERT INTO owners VALUES ('them', 1, 60, ?, ?)", host, os.getpid())
    rewrite(journal.path, "UPDATE entries SET owner = 'them'")
    held = await journal.find("k")
    assert held is not None
    waiting = asyncio.ensure_future(journal.changed(held))
    await asyncio.sleep(0.1)
    rewrite(journal.path, "UPDATE owners SET pid = ? WHERE id = 'them'", dead_process_id())
    async with asyncio.timeout(5):
        await waiting
    free = await journal.find("k")

    assert held.holder is Holder.OTHER
    assert free is not None
    assert free.holder is not Holder.OTHER


async def test_dead_processes_are_dropped_when_a_journal_is_opened(tmp_path: Path) -> None:
    """A program that is restarted after a crash can adopt its own tasks at once."""
    path = tmp_path / "run.db"
    async with SqliteJournal(path) as journal:
        await journal.begin(intent())
        await journal.record(submitted())
        with closing(sqlite3.connect(path)) as connection:
            ((host,),) = connection.execute("SELECT place FROM owners").fetchall()
    rewrite(path, "INSERT INTO owners VALUES ('them', 1, 60, ?, ?)", host, dead_process_id())
    rewrite(path, "UPDATE entries SET owner = 'them'")
    async with SqliteJournal(path) as journal:
        found = await journal.find("k")
        with closing(sqlite3.connect(path)) as connection:
            ((owners,),) = connection.execute("SELECT count(*) FROM owners").fetchall()

    assert found is not None
    assert (found.state, found.holder) == (EntryState.SUBMITTED, None)
    assert owners == 1


async def test_a_locked_file_ends_no_lease(tmp_path: Path) -> None:
    """An owner that couldn't write its heartbeat because another program locked the file is not presumed dead."""
    path = tmp_path / "run.db"
    async with (
        SqliteJournal(path, lease=0.4, busy_timeout=5) as first,
        SqliteJournal(path, lease=0.4, busy_timeout=5) as second,
    ):
        await first.begin(intent())
        await first.record(submitted())
        await asyncio.sleep(0.3)
        with closing(sqlite3.connect(path, isolation_level=None, timeout=5)) as other:
            other.execute("BEGIN IMMEDIATE")
            await asyncio.sleep(1)
            other.execute("COMMIT")
        await asyncio.sleep(0.3)
        await second.begin(intent("b"))
        found = await second.find("k")

    assert found is None or found.holder is Holder.OTHER


def test_the_text_of_a_journal_is_its_path(tmp_path: Path) -> None:
    """repr() shows the file."""
    assert repr(SqliteJournal(tmp_path / "run.db")) == f"SqliteJournal('{tmp_path / 'run.db'}')"


@pytest.mark.parametrize("setting", ["lease", "busy_timeout"])
def test_invalid_times_are_refused(setting: str, tmp_path: Path) -> None:
    """A time of 0 or infinity is an error that names the setting."""
    with pytest.raises(ConfigurationError, match=f"{setting} must be more than 0 seconds"):
        SqliteJournal(tmp_path / "run.db", **{setting: 0.0})
    with pytest.raises(ConfigurationError, match=f"{setting} must be at most 3600 seconds, not inf"):
        SqliteJournal(tmp_path / "run.db", **{setting: float("inf")})


# ---------------------------------------------------------------------- files


def set_newer_version(path: Path) -> None:
    rewrite(path, "PRAGMA user_version = 2")


def set_other_application(path: Path) -> None:
    rewrite(path, "PRAGMA application_id = 7")


def replace_by_text(path: Path) -> None:
    path.write_bytes(b"once upon a time")


def overwrite_pages(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[4096 * 3 : 4096 * 5] = bytes(8192)
    path.write_bytes(data)


def overwrite_header(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[16:100] = b"\xff" * 84
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (set_newer_version, "written by a newer version .schema 2, known up to 1.: update flux2max_async"),
        (set_other_application, "is a database, but not a journal"),
        (replace_by_text, "is not a journal"),
        (overwrite_pages, "is damaged"),
        (overwrite_header, "is damaged"),
    ],
)
async def test_a_file_that_is_no_journal_is_refused_and_not_changed(
    tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    """A newer, foreign or damaged file is a JournalError that gives the reason, and not a byte of it is changed."""
    path = tmp_path / "run.db"
    await create_journal(path)
    damage(path)
    before = path.read_bytes()
    with pytest.raises(JournalError, match=f"{message}.*") as caught:
        await SqliteJournal(path).open()

    assert "left as it is" in str(caught.value)
    assert str(path) in str(caught.value)
    assert path.read_bytes() == before


async def test_a_file_of_schema_version_1_goes_on_working(tmp_path: Path) -> None:
    """A file with the tables, columns and triggers of schema version 1 is read, written and counted."""
    path = tmp_path / "run.db"
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(VERSION_1)
    async with SqliteJournal(path) as journal:
        found = await journal.find("k")
        await journal.record(completed())
        with pytest.raises(BudgetExceededError, match=r"\$0.0725 are spent"):
            await journal.begin(intent("b"), limit=Decimal("0.1"))
        ended = await journal.find("k")

    assert found == attrs.evolve(submitted(), holder=None)
    assert ended == completed()


async def test_a_file_without_the_column_of_tokens_is_read_and_extended(tmp_path: Path) -> None:
    """A file of an earlier version is listed as it is; a session adds the column, and the earlier version goes on."""
    path = tmp_path / "run.db"
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(VERSION_1)
    before = path.read_bytes()
    listed = [entry async for entry in SqliteJournal(path).entries()]
    unchanged = path.read_bytes() == before
    async with SqliteJournal(path) as journal:
        await journal.begin(intent("new", webhook_token="token"))
        # Statements of an earlier version, over a connection that was opened before the column existed.
        rewrite(
            path,
            "INSERT INTO entries (key, attempt, content, state, owner, outlay, created, request, result, files)"
            " VALUES ('old', 1, 'c1', 'intent', NULL, 0, NULL, '{}', '{}', '[]')",
        )
        found = [await journal.find_token("token"), await journal.find("old")]
    async with SqliteJournal(path) as journal:  # the column is added once
        again = await journal.find_token("token")
    with closing(sqlite3.connect(path)) as connection:
        ((version,),) = connection.execute("PRAGMA user_version").fetchall()

    assert unchanged
    assert listed == [attrs.evolve(submitted(), holder=None)]
    assert [entry and (entry.key, entry.webhook_token) for entry in (*found, again)] == [
        ("new", "token"), ("old", None), ("new", "token"),
    ]  # fmt: skip
    assert version == 1


async def test_an_interrupted_creation_is_rolled_back(tmp_path: Path) -> None:
    """If the process was killed while it created the file, SQLite's rollback journal is applied before the checks."""
    path = tmp_path / "run.db"
    with closing(sqlite3.connect(tmp_path / "interrupted.db", isolation_level=None)) as connection:
        connection.execute("CREATE TABLE first (a)")
        connection.execute("PRAGMA cache_size = 1")
        connection.execute("BEGIN")
        connection.execute("INSERT INTO first SELECT randomblob(3000) FROM (WITH RECURSIVE n(i) AS "
                           "(SELECT 1 UNION ALL SELECT i + 1 FROM n LIMIT 50) SELECT i FROM n)")  # fmt: skip
        connection.execute("DROP TABLE first")
        for suffix in ("", "-journal"):
            path.with_name(f"run.db{suffix}").write_bytes((tmp_path / f"interrupted.db{suffix}").read_bytes())
        connection.execute("ROLLBACK")
    with pytest.raises(JournalError, match="is a database, but not a journal"):
        await SqliteJournal(path).open()

    assert not path.with_name("run.db-journal").exists()


@pytest.mark.parametrize("reads_first", [False, True])
async def test_a_journal_whose_creation_was_interrupted(tmp_path: Path, *, reads_first: bool) -> None:
    """If the process was killed while it created the file, it can be read, and is empty, and used from then on."""
    path = tmp_path / "run.db"
    with closing(sqlite3.connect(tmp_path / "interrupted.db", isolation_level=None)) as connection:
        connection.execute("PRAGMA cache_size = 1")
        connection.execute("BEGIN")
        connection.execute("CREATE TABLE entries (a)")
        connection.execute("INSERT INTO entries SELECT randomblob(3000) FROM (WITH RECURSIVE n(i) AS "
                           "(SELECT 1 UNION ALL SELECT i + 1 FROM n LIMIT 50) SELECT i FROM n)")  # fmt: skip
        for suffix in ("", "-journal"):
            path.with_name(f"run.db{suffix}").write_bytes((tmp_path / f"interrupted.db{suffix}").read_bytes())
        connection.execute("ROLLBACK")
    if reads_first:
        assert [entry async for entry in SqliteJournal(path).entries()] == []
    await create_journal(path, 1)

    assert [entry.key async for entry in SqliteJournal(path).entries()] == ["0"]


async def test_an_empty_file_becomes_a_journal(tmp_path: Path) -> None:
    """A file of 0 bytes, which a crash during creation can leave, becomes a new journal."""
    path = tmp_path / "run.db"
    path.touch()
    await create_journal(path, 1)

    assert [entry.key async for entry in SqliteJournal(path).entries()] == ["0"]


async def test_a_path_that_cannot_be_written_is_a_journal_error() -> None:
    """Opening a journal in a folder that can't be written to raises a JournalError with its path."""
    with pytest.raises(JournalError, match=r"/proc/run.db"):
        await SqliteJournal("/proc/run.db").open()
    with pytest.raises(JournalError, match=r"/dev/null/x/run.db"):
        await SqliteJournal("/dev/null/x/run.db").open()
    with pytest.raises(JournalError, match=r"can.t be used: .*null"):
        await SqliteJournal("a\0b").open()


class WatchedPath(type(Path())):  # type: ignore[misc]
    """A path that notes the mode which its file had before it was changed."""

    modes: ClassVar[list[int]] = []

    def chmod(self, mode: int, *, follow_symlinks: bool = True) -> None:
        self.modes.append(stat.S_IMODE(self.stat().st_mode))
        super().chmod(mode, follow_symlinks=follow_symlinks)


@pytest.fixture(params=[0o022, 0o000, 0o077, 0o277, 0o777])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def modes(folder: Path) -> dict[str, int]:
    return {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.glob("run.db*")}


async def test_only_the_owner_can_read_a_new_journal(tmp_path: Path, umask: int) -> None:
    """The file and those beside it have mode 0600 under any umask, and never had a wider one; through a link, too."""
    (tmp_path / "link.db").symlink_to("run.db")
    WatchedPath.modes.clear()
    async with SqliteJournal(tmp_path / "link.db") as journal:
        await journal.begin(intent())
        open_modes = modes(tmp_path)
    create_file(WatchedPath(tmp_path / "other.db"))

    assert open_modes == {"run.db": 0o600, "run.db-wal": 0o600, "run.db-shm": 0o600}
    assert modes(tmp_path) == {"run.db": 0o600}
    assert WatchedPath.modes == [0o600 & ~umask]


async def test_a_file_keeps_its_mode(tmp_path: Path) -> None:
    """A file whose owner lets others read it stays readable, and so are the files beside it."""
    path = tmp_path / "run.db"
    await create_journal(path)
    path.chmod(0o640)
    async with SqliteJournal(path) as journal:
        await journal.begin(intent())
        open_modes = modes(tmp_path)

    assert open_modes == dict.fromkeys(("run.db", "run.db-wal", "run.db-shm"), 0o640)


_SECOND_PROCESS = """
    import asyncio, sys
    from flux2max_async.journal import SqliteJournal

    async def main():
        async with SqliteJournal(sys.argv[1]) as journal:
            await journal.find("k")

    asyncio.run(main())
"""


async def test_a_second_journal_in_the_same_process_ends_no_locks(tmp_path: Path) -> None:
    """After another journal of this process was opened and closed, other processes don't take the file for unused.

    They would delete the log, and what is begun here afterwards would be lost.
    """
    path = tmp_path / "run.db"
    async with SqliteJournal(path) as journal:
        await journal.begin(intent("a"))
        await create_journal(path, 1)
        listed = [entry.key async for entry in SqliteJournal(path).entries()]
        await journal.export(tmp_path / "run.jsonl")
        await asyncio.to_thread(
            subprocess.run, [sys.executable, "-c", textwrap.dedent(_SECOND_PROCESS), str(path)], check=True
        )
        logged = path.with_name("run.db-wal").exists()
        await journal.begin(intent("b"))
        with closing(sqlite3.connect(path)) as connection:
            keys = [key for (key,) in connection.execute("SELECT key FROM entries ORDER BY id")]

    assert listed == ["a", "0"]
    assert logged
    assert keys == ["a", "0", "b"]


async def test_listing_a_missing_file_creates_none(tmp_path: Path) -> None:
    """Listing the entries of a file that doesn't exist is a JournalError, and creates no file."""
    with pytest.raises(JournalError, match="can't be opened"):
        _ = [entry async for entry in SqliteJournal(tmp_path / "run.db").entries()]

    assert list(tmp_path.iterdir()) == []


async def test_a_call_waits_while_the_file_is_locked(tmp_path: Path) -> None:
    """While another program locks the file, calls wait; after `busy_timeout` they raise a JournalError."""
    path = tmp_path / "run.db"
    async with SqliteJournal(path, busy_timeout=0.3) as journal:
        with closing(sqlite3.connect(path, isolation_level=None)) as other:
            other.execute("BEGIN EXCLUSIVE")
            with pytest.raises(JournalError, match="locked by another program"):
                await journal.begin(intent())
            waiting = asyncio.ensure_future(journal.begin(intent()))
            await asyncio.sleep(0.1)
            other.execute("COMMIT")

            assert await waiting


async def test_a_file_that_stays_locked_cannot_be_opened(tmp_path: Path) -> None:
    """Opening a file that stays locked raises a JournalError after `busy_timeout`."""
    path = tmp_path / "run.db"
    await create_journal(path, 1)
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("PRAGMA journal_mode = DELETE")
        for lock in ("BEGIN IMMEDIATE", "BEGIN EXCLUSIVE"):
            other.execute(lock)
            with pytest.raises(JournalError, match="locked by another program"):
                await SqliteJournal(path, busy_timeout=0.2).open()
            other.execute("COMMIT")


async def test_damage_while_a_session_runs_fails_each_call(
    journal: SqliteJournal, caplog: pytest.LogCaptureFixture
) -> None:
    """If the file is damaged while a session uses it, each call raises a JournalError, and the thread goes on."""
    async with SqliteJournal(journal.path) as other:
        await other.begin(intent("k"))
        await journal.begin(intent("k"))
        held = await journal.find("k")
        assert held is not None
        waiting = asyncio.ensure_future(journal.changed(held))
        rewrite(journal.path, "ALTER TABLE entries RENAME TO something")
        async with asyncio.timeout(2):
            await waiting
    rewrite(journal.path, "DROP TABLE owners")
    with pytest.raises(JournalError, match="no such table"):
        await journal.begin(intent())
    await asyncio.sleep(1.2)  # until the next heartbeat
    await journal.close()

    assert "no such table" in caplog.text


async def test_the_thread_survives_unexpected_errors(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A row that can't be read is logged, and other jobs still run."""
    async with SqliteJournal(tmp_path / "run.db", lease=0.4) as journal:
        with closing(sqlite3.connect(journal.path)) as connection:
            ((host,),) = connection.execute("SELECT place FROM owners").fetchall()
        rewrite(journal.path, "INSERT INTO owners VALUES ('them', 1, 60, ?, 'nonsense')", host)
        await asyncio.sleep(0.3)
        begun = await journal.begin(intent())

    assert begun
    assert "TypeError" in caplog.text


@pytest.fixture
def full_disk(journal: SqliteJournal) -> Iterator[Callable[[], None]]:
    """Return a function that simulates a full disk: no file can grow beyond the journal's present size."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    wal = journal.path.with_name("run.db-wal")
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (wal.stat().st_size, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


async def test_a_full_disk_is_a_journal_error(
    journal: SqliteJournal, full_disk: Callable[[], None], caplog: pytest.LogCaptureFixture
) -> None:
    """Each entry that can't be written raises a JournalError; earlier entries are still there."""
    await journal.begin(intent())
    full_disk()
    failures = await asyncio.gather(
        *(journal.begin(intent(f"{number}")) for number in range(50)), return_exceptions=True
    )
    found = await SqliteJournal(journal.path).entries().__anext__()

    assert {type(failure) for failure in failures} == {JournalError}
    assert "run.db can't be" in str(failures[0])
    assert found.key == "k"


@pytest.mark.parametrize(
    ("errors", "busy_timeout", "calls"),
    [
        ([], 5.0, 1),
        (["database is locked"] * 2, 5.0, 3),
        (["database is locked"], -1.0, 1),
        (["disk I/O error"], 5.0, 1),
        (["database is locked", "disk I/O error"], 5.0, 2),
    ],
)
def test_retry_while_locked(errors: list[str], busy_timeout: float, calls: int) -> None:
    """Only a locked database is tried again, until the time is over."""
    made = 0

    def open_file() -> None:
        nonlocal made
        made += 1
        if made <= len(errors):
            raise sqlite3.OperationalError(errors[made - 1])

    succeeds = calls == len(errors) + 1
    with nullcontext() if succeeds else pytest.raises(sqlite3.OperationalError):
        retry_while_locked(open_file, busy_timeout)

    assert made == calls


async def test_a_file_without_states_is_read_and_extended(tmp_path: Path) -> None:
    """A session adds the table to a file of an earlier version, whose schema keeps its version."""
    path = tmp_path / "run.db"
    async with SqliteJournal(path):
        pass
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("DROP TABLE states")
    async with SqliteJournal(path) as journal:
        missing = await journal.load_state("a")
        await journal.update_state("a", lambda state: {"count": 1 + len(state or {})})
        found = await journal.load_state("a")
    with closing(sqlite3.connect(path)) as connection:
        ((version,),) = connection.execute("PRAGMA user_version").fetchall()

    assert missing is None
    assert found == {"count": 1}
    assert version == 1


async def test_a_session_is_not_entered_if_its_journal_cannot_be_opened(gateway: Emulator, tmp_path: Path) -> None:
    """Entering the session raises the JournalError, and the session stays closed."""
    (tmp_path / "run.db").write_text("my diary")
    session = FluxSession(gateway.api_key, base_url=gateway.url, journal=SqliteJournal(tmp_path / "run.db"))
    with pytest.raises(JournalError, match="is not a journal"):
        async with session:
            pass

    assert (tmp_path / "run.db").read_text() == "my diary"
    with pytest.raises(SessionClosedError):
        await session.generate("cat")


@pytest.mark.parametrize("damage", ["7", "x'ff'", "CAST(x'ff' AS TEXT)"])
async def test_a_damaged_state_is_an_error(journal: SqliteJournal, damage: str) -> None:
    """A state that is no text, or not UTF-8, is a JournalError that names it, until it is replaced."""
    await journal.update_state("a", lambda _: {"count": 1})
    rewrite(journal.path, f"UPDATE states SET value = {damage}")
    with pytest.raises(JournalError, match=r"the state 'a' in the journal .*run\.db is damaged"):
        await journal.load_state("a")
    await journal.update_state("a", lambda _: {"count": 2})

    assert await journal.load_state("a") == {"count": 2}
