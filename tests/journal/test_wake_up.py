"""An owner of a journal is woken at once by those who record the ends of its tasks."""

import asyncio
import sqlite3
from collections.abc import AsyncIterator
from pathlib import Path

import attrs
import pytest

from flux2max_async import JournalEntry, SqliteJournal
from flux2max_async._wake_pipe import WakePipe, pipe_path
from flux2max_async.journal import EntryState, Holder

PATIENCE = 30.0
"""Seconds for what takes milliseconds."""


@pytest.fixture
def anyio_backend() -> str:
    """Use real time, in which a journal's thread runs."""
    return "asyncio"


@pytest.fixture(autouse=True)
def _no_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let nothing but a pipe wake the thread of a journal."""
    for name in ("_worker._SYNC_DELAY", "_sqlite_file._CHECK_INTERVAL", "_sqlite_file._CHECKPOINT_INTERVAL"):
        monkeypatch.setattr(f"flux2max_async.journal.{name}", 3600.0)


@attrs.define
class Holding:
    """A session that holds a task, and what is reported to it."""

    journal: SqliteJournal
    reports: "asyncio.Queue[list[JournalEntry]]" = attrs.field(factory=asyncio.Queue)


@pytest.fixture
async def holding(tmp_path: Path) -> AsyncIterator[Holding]:
    session = Holding(SqliteJournal(tmp_path / "run.db", lease=3600.0))
    await session.journal.open(session.reports.put_nowait, watch_changes=True)
    entry = JournalEntry(key="k", fingerprint="f", request={"prompt": "a cat"})
    await session.journal.begin(entry)
    await session.journal.record(attrs.evolve(entry, holder=Holder.US, state=EntryState.SUBMITTED, task_id="t1"))
    yield session
    await session.journal.close()


async def record_end(path: Path) -> None:
    """Record the end of the task, as another worker does that gets its webhook."""
    async with SqliteJournal(path) as other:
        found = await other.find_task("t1")
        assert found is not None
        await other.record(attrs.evolve(found, state=EntryState.COMPLETED, result={"images": []}))


@pytest.mark.parametrize("by_link", [False, True])
async def test_an_end_is_known_at_once(tmp_path: Path, holding: Holding, by_link: bool) -> None:
    """The holder gets an end that another session records, whatever name that has opened the file by."""
    path = tmp_path / "run.db"
    if by_link:
        path = tmp_path / "link.db"
        path.symlink_to("run.db")
    await record_end(path)
    async with asyncio.timeout(PATIENCE):
        (entry,) = await holding.reports.get()

    assert (entry.task_id, entry.state, entry.holder) == ("t1", EntryState.COMPLETED, Holder.US)


async def test_no_pipe_is_left(tmp_path: Path, holding: Holding) -> None:
    """Only sessions that expect such reports have a pipe, and it is gone when they are closed."""
    async with SqliteJournal(tmp_path / "run.db"):
        during = [path.suffix for path in tmp_path.iterdir() if path.is_fifo()]
    await holding.journal.close()

    assert during == [".wake"]
    assert not list(tmp_path.glob("*.wake"))


async def test_without_pipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there are no pipes, changes are found by looking for them."""
    monkeypatch.setattr("flux2max_async.journal._sqlite_file._CHECK_INTERVAL", 0.05)

    def fail(_: object) -> None:
        raise OSError

    monkeypatch.setattr("flux2max_async.journal._sqlite_file.WakePipe", fail)
    session = Holding(SqliteJournal(tmp_path / "run.db", lease=3600.0))
    await session.journal.open(session.reports.put_nowait, watch_changes=True)
    entry = JournalEntry(key="k", fingerprint="f", request={"prompt": "a cat"})
    await session.journal.begin(entry)
    await session.journal.record(attrs.evolve(entry, holder=Holder.US, state=EntryState.SUBMITTED, task_id="t1"))
    await record_end(tmp_path / "run.db")
    async with asyncio.timeout(PATIENCE):
        (reported,) = await session.reports.get()
    await session.journal.close()

    assert reported.state is EntryState.COMPLETED


async def test_pipes_of_the_dead(tmp_path: Path, holding: Holding) -> None:
    """The pipe of an owner that has died is removed with its row; that of one that only seemed to be dead stays."""
    path = tmp_path / "run.db"
    dead = WakePipe(pipe_path(path, "dead"))
    dead.close_descriptors()
    seems_dead = WakePipe(pipe_path(path, "asleep"))
    connection = sqlite3.connect(path)
    # No process can have this number.
    place = connection.execute("SELECT place FROM owners").fetchone()[0]
    for owner in ("dead", "asleep"):
        connection.execute("INSERT INTO owners VALUES (?, 0, 12, ?, 999999999)", (owner, place))
    connection.commit()
    connection.close()
    async with SqliteJournal(path):
        pass
    alive = seems_dead.exists()
    seems_dead.close()

    assert (dead.path.exists(), alive) == (False, True)
    await record_end(path)
    async with asyncio.timeout(PATIENCE):
        assert await holding.reports.get()
