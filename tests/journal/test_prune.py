"""Forgetting ended entries: which ones, what they leave behind, and the size of the file."""

import asyncio
import json
import math
import os
import resource
import sqlite3
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import closing
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import attrs
import pytest

from flux2max_async import BudgetExceededError, ConfigurationError, JournalError
from flux2max_async.journal import EntryState, Holder, Journal, JournalEntry, SqliteJournal
from flux2max_async.journal._schema import host_id

HOUR = 3600.0
LARGE = json.dumps({"text": "x" * 2000})
FOREIGN_PROCESS = os.getppid()
"""Of this machine, and alive."""


@pytest.fixture
def anyio_backend() -> str:
    """Use real time, in which a journal's thread runs."""
    return "asyncio"


@pytest.fixture
async def path(tmp_path: Path) -> Path:
    """Return the path of an empty journal that no session uses."""
    async with SqliteJournal(tmp_path / "run.db"):
        pass
    return tmp_path / "run.db"


@pytest.fixture
async def session(path: Path) -> AsyncIterator[SqliteJournal]:
    """Return a journal that a session has opened."""
    async with SqliteJournal(path) as journal:
        yield journal


@pytest.fixture
def limit_file_size() -> Iterator[Callable[[int], None]]:
    """Return a function that simulates a full disk: nothing can be written beyond so many bytes of a file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def execute(path: Path, statement: str, *values: Any) -> list[tuple[Any, ...]]:
    with closing(sqlite3.connect(path)) as connection, connection:
        return connection.execute(statement, values).fetchall()


def insert(
    path: Path, key: str, state: str = "completed", *, hours: float = 2.0, owner: str | None = None, attempt: int = 1
) -> None:
    """Insert an entry that ended, or was begun, so many hours ago."""
    ended = time.time() - hours * HOUR
    execute(
        path,
        "INSERT INTO entries (key, attempt, content, state, owner, task_id, outlay, created, ended, request, result,"
        " files) VALUES (?, ?, 'c', ?, ?, 't', 70000000, ?, ?, '{}', ?, '[]')",
        key, attempt, state, owner, ended, ended if state in {"completed", "failed"} else None, LARGE,
    )  # fmt: skip


def ended_process() -> int:
    """Return the id of a process that has ended."""
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    return process.pid


def insert_many(path: Path, count: int) -> None:
    execute(
        path,
        "INSERT INTO entries (key, attempt, content, state, outlay, ended, request, result, files)"
        " WITH RECURSIVE numbers(n) AS (SELECT 0 UNION ALL SELECT n + 1 FROM numbers LIMIT ?)"
        " SELECT 'k' || n, 1, 'c', 'completed', 70000000, n, '{}', ?, '[]' FROM numbers",
        count, LARGE,
    )  # fmt: skip


def keys(path: Path) -> list[str]:
    return [key for (key,) in execute(path, "SELECT key || '-' || attempt FROM entries ORDER BY id")]


def downgrade(path: Path) -> None:
    """Make the file one that an earlier version has created."""
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("PRAGMA auto_vacuum = NONE")
        connection.execute("VACUUM")
    assert execute(path, "PRAGMA auto_vacuum") == [(0,)]


# ------------------------------------------------------------------ which entries


@pytest.mark.parametrize("hours", [0.5, 2.0])
@pytest.mark.parametrize("owner", [None, "living", "dead"])
@pytest.mark.parametrize("state", list(EntryState))
async def test_only_old_entries_that_have_ended_are_forgotten(
    path: Path, state: EntryState, owner: str | None, hours: float
) -> None:
    """Entries that may still cost money, those that a living session holds, and newer ones are kept."""
    for owner_id, pid in (("living", FOREIGN_PROCESS), ("dead", ended_process())):
        execute(path, "INSERT INTO owners VALUES (?, 0, 12, ?, ?)", owner_id, host_id(), pid)
    insert(path, "a", state, owner=owner, hours=hours)
    has_ended = state in {EntryState.COMPLETED, EntryState.FAILED, EntryState.REFUSED}

    forgotten = has_ended and hours > 1 and owner != "living"
    assert await SqliteJournal(path).prune(older_than=HOUR) == forgotten
    assert keys(path) == ([] if forgotten else ["a-1"])


async def test_what_the_own_session_holds_is_kept(session: SqliteJournal) -> None:
    """A completed entry whose images are still being saved is kept until it is released."""
    entry = JournalEntry(key="a", fingerprint="c", request={}, holder=Holder.US, created_at=datetime.now(UTC))
    await session.begin(entry)
    ended = attrs.evolve(entry, state=EntryState.COMPLETED, task_id="t", ended_at=datetime(2020, 1, 1, tzinfo=UTC))
    await session.record(ended)

    assert await session.prune(older_than=HOUR) == 0
    await session.record(attrs.evolve(ended, holder=None))
    assert await session.prune(older_than=HOUR) == 1
    assert await session.find("a") is None
    assert await session.begin(entry)


@pytest.mark.parametrize(
    ("attempts", "kept"),
    [
        (["failed", "completed"], []),
        (["uncertain", "completed"], ["a-1", "a-2"]),
        (["failed", "uncertain", "completed"], ["a-2", "a-3"]),
        (["failed", "submitted"], ["a-2"]),
        (["failed", "intent"], ["a-2"]),
        (["refused"], []),
    ],
)
async def test_an_attempt_that_stays_keeps_the_later_ones(path: Path, attempts: list[str], kept: list[str]) -> None:
    """An uncertain attempt doesn't become the newest one of its key again."""
    for number, state in enumerate(attempts, 1):
        insert(path, "a", state, attempt=number)
    insert(path, "b")

    assert await SqliteJournal(path).prune(older_than=HOUR) == len(attempts) - len(kept) + 1
    assert keys(path) == kept


async def test_limit(path: Path) -> None:
    """The oldest entries are forgotten first, at most so many at once."""
    insert_many(path, 1300)
    journal = SqliteJournal(path)

    assert await journal.prune(older_than=HOUR, limit=0) == 0
    assert await journal.prune(older_than=HOUR, limit=1100) == 1100
    assert keys(path) == [f"k{number}-1" for number in range(1100, 1300)]
    assert await journal.prune(older_than=HOUR) == 200
    assert await journal.prune(older_than=HOUR) == 0


@pytest.mark.parametrize(
    ("name", "value"), [("older_than", -1.0), ("older_than", math.nan), ("older_than", math.inf), ("limit", -1)]
)
async def test_invalid_arguments(path: Path, name: str, value: Any) -> None:
    """Both arguments are finite, and not negative."""
    with pytest.raises(ConfigurationError, match=f"{name} must be 0 or more"):
        await SqliteJournal(path).prune(**{"older_than": 0.0, name: value})  # pyright: ignore[reportArgumentType]


async def test_journals_that_cannot_forget() -> None:
    """By default, a journal keeps everything."""

    class Minimal(Journal):
        def entries(self) -> AsyncIterator[JournalEntry]:
            raise NotImplementedError

    assert await Minimal().prune(older_than=0.0) == 0  # type: ignore[abstract] # pyright: ignore[reportAbstractUsage]


# ------------------------------------------------------------------ what stays


async def test_the_cost_of_forgotten_entries_counts(session: SqliteJournal) -> None:
    """A limit for the whole journal includes what forgotten entries have cost."""
    for number in range(3):
        insert(session.path, f"k{number}")
    await session.prune(older_than=HOUR)
    entry = JournalEntry(
        key="a", fingerprint="c", request={}, holder=Holder.US, committed=Decimal("0.07"), created_at=datetime.now(UTC)
    )

    assert keys(session.path) == []
    with pytest.raises(BudgetExceededError, match=r"\$0\.210* are spent"):
        await session.begin(entry, limit=Decimal("0.27"))
    assert await session.begin(entry, limit=Decimal("0.28"))


@pytest.mark.parametrize("is_old", [False, True], ids=["new file", "file of an earlier version"])
async def test_the_file_shrinks_while_sessions_use_it(path: Path, is_old: bool) -> None:
    """The space goes back to the file system, its log's too; sessions go on, and none sees the file as another one."""
    if is_old:
        downgrade(path)
    insert_many(path, 3000)
    async with SqliteJournal(path) as one, SqliteJournal(path) as other:
        size = path.stat().st_size
        begun = [
            asyncio.create_task(
                journal.begin(JournalEntry(key=f"{name}{number}", fingerprint="c", request={}, holder=Holder.US))
            )
            for number in range(20)
            for name, journal in (("one", one), ("other", other))
        ]
        pruned = await one.prune(older_than=HOUR)
        await asyncio.gather(*begun)
        sizes = [file.stat().st_size for file in (path, path.with_name("run.db-wal"))]
        await other.begin(JournalEntry(key="last", fingerprint="c", request={}, holder=Holder.US))
        assert await one.find("last") is not None

    assert pruned == 3000
    assert size > 6_000_000
    assert sizes[0] < 300_000
    assert sizes[1] < 300_000
    assert len(keys(path)) == 41
    assert execute(path, "PRAGMA integrity_check") == [("ok",)]
    assert execute(path, "PRAGMA auto_vacuum") == [(2,)]


# ------------------------------------------------------------------ failures


async def test_no_space_to_write_the_file_anew(
    path: Path, limit_file_size: Callable[[int], None], caplog: pytest.LogCaptureFixture
) -> None:
    """If the file can't shrink because the disk is full, that is a warning: the entries are forgotten all the same."""
    downgrade(path)
    insert_many(path, 3000)
    size = path.stat().st_size
    execute(path, "UPDATE entries SET ended = ? WHERE id > 100", time.time())
    limit_file_size(2_000_000)

    assert await SqliteJournal(path).prune(older_than=HOUR) == 100
    assert "100 entries are forgotten, but the journal" in caplog.text
    limit_file_size(resource.getrlimit(resource.RLIMIT_FSIZE)[1])
    assert path.stat().st_size == size
    assert len(keys(path)) == 2900
    assert execute(path, "PRAGMA integrity_check") == [("ok",)]


async def test_no_space_at_all(session: SqliteJournal, limit_file_size: Callable[[int], None]) -> None:
    """On a disk without any space, nothing is forgotten, and nothing is damaged."""
    insert_many(session.path, 100)
    limit_file_size(session.path.with_name("run.db-wal").stat().st_size)
    with pytest.raises(JournalError, match=r"disk"):
        await session.prune(older_than=HOUR)
    limit_file_size(resource.getrlimit(resource.RLIMIT_FSIZE)[1])

    assert len(keys(session.path)) == 100
    assert await session.prune(older_than=HOUR) == 100


async def test_a_locked_file(path: Path) -> None:
    """A file that another program has locked is an error after the time that the journal waits."""
    insert(path, "a")
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        with pytest.raises(JournalError, match="locked by another program"):
            await SqliteJournal(path, busy_timeout=0.05).prune(older_than=HOUR)

    assert keys(path) == ["a-1"]


async def test_a_file_without_tables(tmp_path: Path) -> None:
    """A journal whose process was killed before it had created the tables has no entries."""
    (tmp_path / "run.db").touch()

    assert await SqliteJournal(tmp_path / "run.db").prune(older_than=0.0) == 0


@pytest.mark.parametrize("content", [None, b"hello", b"SQLite format 3\0"])
async def test_what_is_not_a_journal(tmp_path: Path, content: bytes | None) -> None:
    """Other files, and missing ones, are left as they are."""
    path = tmp_path / "run.db"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(JournalError):
        await SqliteJournal(path).prune(older_than=0.0)

    assert (path.read_bytes() if path.exists() else None) == content
