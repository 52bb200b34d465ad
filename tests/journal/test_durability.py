"""What of a journal survives: a kill without SQLite's log, another file under its name, a disk that was full."""

import asyncio
import logging
import os
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
import textwrap
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path

import attrs
import pytest

from flux2max_async import (
    Completed,
    FixedSchedule,
    FluxSession,
    GenerationRequest,
    JournalEntry,
    JournalError,
    Outcome,
)
from flux2max_async.emulator import Emulator
from flux2max_async.journal import EntryState, Holder, SqliteJournal
from flux2max_async.journal._store import SqliteStore


@pytest.fixture
def anyio_backend() -> str:
    """Use real time, in which a journal's thread runs."""
    return "asyncio"


@pytest.fixture
async def journal(tmp_path: Path) -> AsyncIterator[SqliteJournal]:
    async with SqliteJournal(tmp_path / "run.db", lease=1.0) as opened:
        yield opened


def intent(key: str = "k") -> JournalEntry:
    return JournalEntry(key=key, fingerprint="c1", request={"prompt": f"a {key}"}, holder=Holder.US)


def submitted(key: str = "k") -> JournalEntry:
    return attrs.evolve(intent(key), state=EntryState.SUBMITTED, task_id=f"t-{key}")


def completed(key: str = "k") -> JournalEntry:
    return attrs.evolve(submitted(key), state=EntryState.COMPLETED, holder=None, result={"images": []})


def states(path: Path) -> dict[str, str]:
    """Return the state of each entry in a file."""
    with closing(sqlite3.connect(path)) as connection:
        return dict(connection.execute("SELECT key, state FROM entries").fetchall())


# ---------------------------------------------------------------------- the file without its log

_WRITER = """
    import asyncio, sys
    from flux2max_async.journal import EntryState, Holder, JournalEntry, SqliteJournal

    async def main():
        async with SqliteJournal(sys.argv[1]) as journal:
            for number in range(100):
                entry = JournalEntry(key=f"{number}", fingerprint="c1", request={}, holder=Holder.US)
                await journal.begin(entry)
            print("written", flush=True)
            await asyncio.sleep(60)

    asyncio.run(main())
"""


def test_after_a_kill_the_file_alone_holds_what_was_written_seconds_ago(tmp_path: Path) -> None:
    """A process writes, is idle for 5 s and is killed: a copy of the file without the log holds all of its entries."""
    path, copy = tmp_path / "run.db", tmp_path / "copy" / "run.db"
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(_WRITER), str(path)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "written\n"
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(5)
        process.send_signal(signal.SIGKILL)
    logged = path.with_name("run.db-wal").exists()
    copy.parent.mkdir()
    shutil.copy(path, copy)

    assert logged
    assert len(states(copy)) == 100


@pytest.mark.parametrize("suffixes", [("",), ("", "-wal"), ("", "-wal", "-shm")])
@pytest.mark.parametrize("seconds", [0.0, 5.0])
def test_a_log_that_is_missing_after_a_kill_is_an_error_in_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, suffixes: tuple[str, ...], seconds: float
) -> None:
    """If a process was killed and SQLite's log is gone, the next one says so; with the log nothing is said."""
    path = tmp_path / "run.db"
    command = [sys.executable, "-c", textwrap.dedent(_WRITER), str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"written\n"
        time.sleep(seconds)  # after some seconds, the file itself has the tables and the owner
        process.kill()
    for suffix in suffixes:
        shutil.copy(f"{path}{suffix}", tmp_path / f"copy.db{suffix}")
    for _ in range(2):
        SqliteStore(tmp_path / "copy.db", 12.0, 10.0).close()

    messages = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert len(messages) == (suffixes == ("",))
    assert all("its log copy.db-wal is missing" in message for message in messages)


@pytest.fixture
def short_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flux2max_async.journal._sqlite_file._CHECKPOINT_INTERVAL", 0.2)


def copied_states(path: Path) -> dict[str, str]:
    """Return the states in a copy of the file alone."""
    copy = Path(shutil.copy(path, path.with_name("copy.db")))
    try:
        return states(copy)
    except sqlite3.OperationalError:  # not even the tables are in the file
        return {}


@pytest.mark.usefixtures("short_interval")
async def test_the_file_is_complete_while_jobs_never_pause(tmp_path: Path) -> None:
    """The log is copied also while there is always another job."""
    path, stopped = tmp_path / "run.db", asyncio.Event()
    async with SqliteJournal(path) as journal:

        async def keep_busy() -> None:
            while not stopped.is_set():
                await asyncio.gather(*(journal.find(f"{number}") for number in range(50)))

        await journal.begin(intent())
        busy = [asyncio.create_task(keep_busy()) for _ in range(4)]
        for _ in range(100):
            await asyncio.sleep(0.05)
            with suppress(sqlite3.DatabaseError):  # it was copied while the log was
                if copied_states(path):
                    break
        found = copied_states(path)
        stopped.set()
        await asyncio.gather(*busy)

    assert found == {"k": "intent"}


@pytest.mark.usefixtures("short_interval")
async def test_a_reader_delays_the_copy(tmp_path: Path) -> None:
    """What a reader keeps from being copied is copied once it has finished."""
    path = tmp_path / "run.db"
    async with SqliteJournal(path) as journal:
        await journal.begin(intent("a"))
        await asyncio.sleep(0.5)
        with closing(sqlite3.connect(path, isolation_level=None)) as reader:
            reader.execute("BEGIN")
            reader.execute("SELECT count(*) FROM entries").fetchall()
            await journal.begin(intent("b"))
            await asyncio.sleep(0.6)
            before = copied_states(path)
        await asyncio.sleep(0.6)
        after = copied_states(path)

    assert list(before) == ["a"]
    assert list(after) == ["a", "b"]


@pytest.mark.usefixtures("short_interval")
async def test_a_copy_that_fails_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """If the disk fails while the log is copied, it is logged, and copied at the next chance, and then not again."""
    failures = [sqlite3.OperationalError("disk I/O error")]
    copied: list[bool] = []
    checkpoint = SqliteStore.checkpoint

    def fail_once(store: SqliteStore) -> bool:
        if failures:
            raise failures.pop()
        copied.append(checkpoint(store))
        return copied[-1]

    monkeypatch.setattr(SqliteStore, "checkpoint", fail_once)
    path = tmp_path / "run.db"
    async with SqliteJournal(path) as journal:
        await journal.begin(intent())
        await asyncio.sleep(1)
        found = copied_states(path)
        await journal.find("k")
        await asyncio.sleep(0.5)

    assert found == {"k": "intent"}
    assert copied == [True]
    assert "disk I/O error" in caplog.text


# ---------------------------------------------------------------------- another file under its name


def delete(path: Path) -> Path | None:
    path.unlink()
    return None


def move(path: Path) -> Path | None:
    return path.rename(path.with_name("moved.db"))


def replace_by_copy(path: Path) -> Path | None:
    copy = shutil.copy(path, path.with_name("copy.db"))
    old = path.rename(path.with_name("moved.db"))
    Path(copy).rename(path)
    return old


def replace_by_empty_file(path: Path) -> Path | None:
    old = path.rename(path.with_name("moved.db"))
    path.touch()
    return old


def move_folder(path: Path) -> Path | None:
    return path.parent.rename(path.parent.with_name("moved")) / path.name


Replace = Callable[[Path], Path | None]
REPLACEMENTS: list[Replace] = [delete, move, replace_by_copy, replace_by_empty_file, move_folder]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out" / "run.db"


@pytest.mark.parametrize("replace", REPLACEMENTS)
async def test_nothing_is_begun_in_a_file_that_is_gone(
    path: Path, replace: Replace, caplog: pytest.LogCaptureFixture
) -> None:
    """begin() raises a JournalError that gives the reason, for good; records go to the file that was opened."""
    async with SqliteJournal(path) as journal:
        await journal.begin(intent())
        await journal.record(submitted())
        old = replace(path)
        errors = await asyncio.gather(
            *(journal.begin(intent(f"{number}")) for number in range(3)), return_exceptions=True
        )
        if old is not None and old.parent == path.parent:
            old.replace(path)  # too late
        errors.append((await asyncio.gather(journal.begin(intent("late")), return_exceptions=True))[0])
        await journal.record(completed())
        found = await journal.find("k")

    assert [type(error) for error in errors] == [JournalError] * 4
    assert "was deleted, replaced or moved while it was open: nothing more is submitted" in str(errors[0])
    assert caplog.text.count("was deleted, replaced or moved") == 1
    assert found is not None
    assert found.state is EntryState.COMPLETED
    if old is not None:
        assert states(path if old.parent == path.parent else old) == {"k": "completed"}


@pytest.mark.parametrize("replace", REPLACEMENTS)
async def test_a_file_that_was_replaced_just_before_the_end_is_complete(path: Path, replace: Replace) -> None:
    """A file that is moved before it is closed gets what is in the log; no log is left for the file under its name."""
    async with SqliteJournal(path) as journal:
        await journal.begin(intent())
        await journal.record(completed())
        old = replace(path)
    left = [entry.name for entry in path.parent.iterdir()] if path.parent.exists() else []

    assert not [name for name in left if name.endswith(("-wal", "-shm"))]
    if old is not None:
        assert states(old) == {"k": "completed"}


async def test_it_is_noticed_while_nothing_is_begun(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A heartbeat notices it, too; a new journal under the same name then shares nothing with the old one."""
    async with SqliteJournal(path, lease=0.2) as journal:
        await journal.begin(intent())
        path.unlink()
        await asyncio.sleep(0.3)
        noticed = caplog.text
        async with SqliteJournal(path) as other:
            begun = [await other.begin(intent(f"{number}")) for number in range(50)]
            for _ in range(50):
                await journal.record(submitted())
            await journal.record(completed())
            found = [await other.find("k"), await other.find("49")]

    assert "nothing more is submitted" in noticed
    assert all(begun)
    assert [entry and entry.key for entry in found] == [None, "49"]
    assert len(states(path)) == 50


async def test_files_are_told_apart_by_device_and_inode(path: Path) -> None:
    """A file that is written to, renamed and renamed back, or reached through a link is still the same."""
    link = path.with_name("link.db")
    async with SqliteJournal(path) as journal:
        await journal.begin(intent("a"))
        path.rename(path.with_name("moved.db")).rename(path)
        os.utime(path, (1, 1))
        begun = [await journal.begin(intent("b"))]
    link.symlink_to(path)
    async with SqliteJournal(link) as journal:
        begun.append(await journal.begin(intent("c")))
        link.unlink()
        with pytest.raises(JournalError, match="deleted, replaced or moved"):
            await journal.begin(intent("d"))

    assert begun == [True, True]
    assert sorted(states(path)) == ["a", "b", "c"]


@pytest.mark.parametrize("replace", REPLACEMENTS)
async def test_a_stream_stops_when_its_journal_is_gone(path: Path, replace: Replace) -> None:
    """Nothing new is submitted, the stream raises the error after the tasks that run have ended, and these are recorded."""
    with Emulator(seconds=0.5, spread=0.0, seed=1) as gateway:
        session = FluxSession(
            gateway.api_key,
            base_url=gateway.url,
            max_in_flight=4,
            schedule=FixedSchedule(0.05),
            journal=SqliteJournal(path),
        )
        old: Path | None = None
        outcomes: list[Outcome] = []
        async with session:
            with pytest.raises(JournalError, match="nothing more is submitted"):
                async for outcome in session.stream(GenerationRequest("a cat", key=f"{n}") for n in range(40)):
                    if not outcomes:
                        old = replace(path)
                    outcomes.append(outcome)
        accepted = sum(gateway.accepted.values())

    done = [outcome for outcome in outcomes if isinstance(outcome, Completed)]
    assert 4 <= accepted <= 12
    assert len(done) == accepted
    assert all(outcome.task_id is None for outcome in outcomes if outcome not in done)
    if old is not None:
        assert list(states(old).values()) == ["completed"] * accepted


# ---------------------------------------------------------------------- a disk that was full


class Disk:
    """Simulates a full disk: no file of this process can grow beyond the log's present size."""

    def __init__(self, path: Path) -> None:
        self._log = path.with_name(f"{path.name}-wal")
        self._soft, self._hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(self) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (self._log.stat().st_size, self._hard))

    def free(self) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (self._soft, self._hard))


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    simulated = Disk(tmp_path / "run.db")
    yield simulated
    simulated.free()


async def record_on_full_disk(journal: SqliteJournal, *entries: JournalEntry) -> None:
    for entry in entries:
        with pytest.raises(JournalError, match=r"run.db can't be"):
            await journal.record(entry)


async def wait_for_states(path: Path, expected: dict[str, str]) -> None:
    async with asyncio.timeout(5):
        while states(path) != expected:  # noqa: ASYNC110 - a file has no event
            await asyncio.sleep(0.05)


async def test_what_a_full_disk_kept_from_being_recorded_is_written_later(
    journal: SqliteJournal, disk: Disk, caplog: pytest.LogCaptureFixture
) -> None:
    """Each record() raises a JournalError; the newest values are written once there is room, though nobody asks again."""
    caplog.set_level(logging.INFO, "flux2max_async.journal")
    for key in ("a", "b", "c"):
        await journal.begin(intent(key))
    disk.fill()
    await record_on_full_disk(journal, submitted("a"), submitted("b"), completed("b"))
    await asyncio.sleep(1.2)  # it is tried, in vain
    before = states(journal.path)
    disk.free()
    await wait_for_states(journal.path, {"a": "submitted", "b": "completed", "c": "intent"})
    found = await journal.find("a")

    assert set(before.values()) == {"intent"}
    assert found is not None
    assert (found.task_id, found.holder) == ("t-a", Holder.US)
    assert "2 entries were written that could not be before" in caplog.text


async def test_it_is_written_before_the_next_intent(journal: SqliteJournal, disk: Disk) -> None:
    """A refused attempt that couldn't be recorded is recorded first when it is begun again."""
    await journal.begin(intent())
    disk.fill()
    await record_on_full_disk(journal, attrs.evolve(intent(), state=EntryState.REFUSED, holder=None))
    with pytest.raises(JournalError):
        await journal.begin(intent())
    disk.free()
    begun = await journal.begin(attrs.evolve(intent(), fingerprint="c2"))
    await asyncio.sleep(1.2)
    found = await journal.find("k")

    assert begun
    assert found is not None
    assert (found.state, found.fingerprint) == (EntryState.INTENT, "c2")


async def test_it_is_written_when_the_journal_is_closed(tmp_path: Path, disk: Disk) -> None:
    """Closing the journal tries once more."""
    async with SqliteJournal(tmp_path / "run.db", lease=100) as journal:
        await journal.begin(intent())
        disk.fill()
        await record_on_full_disk(journal, submitted())
        disk.free()

    assert states(journal.path) == {"k": "submitted"}


async def test_a_lock_that_lasts_delays_a_record(tmp_path: Path) -> None:
    """What another program's lock has kept from being recorded is written once it is gone."""
    path = tmp_path / "run.db"
    async with SqliteJournal(path, lease=1.0, busy_timeout=0.1) as journal:
        await journal.begin(intent())
        with closing(sqlite3.connect(path, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            with pytest.raises(JournalError, match="locked by another program"):
                await journal.record(submitted())
            other.execute("COMMIT")
        await wait_for_states(path, {"k": "submitted"})


async def test_an_entry_that_can_never_be_stored_is_not_tried_again(journal: SqliteJournal) -> None:
    """An error of the entry itself, or a damaged file, is not repeated."""
    await journal.begin(intent())
    with pytest.raises(JournalError):
        await journal.record(attrs.evolve(submitted(), task_id="\ud800"))
    with closing(sqlite3.connect(journal.path)) as connection, connection:
        connection.execute("ALTER TABLE entries RENAME TO something")
    with pytest.raises(JournalError, match="no such table"):
        await journal.record(submitted())

    assert journal._worker is not None
    assert journal._worker._unwritten == {}


async def test_the_ids_of_running_tasks_survive_a_full_disk(tmp_path: Path, disk: Disk) -> None:
    """If the disk is full while answers to submits arrive, their ids are in the journal soon after there is room."""
    path = tmp_path / "run.db"
    with Emulator(seconds=8.0, spread=0.0, seed=1) as gateway:
        session = FluxSession(gateway.api_key, base_url=gateway.url, journal=SqliteJournal(path, lease=1.0))
        async with session:
            begun = session._parts.journal
            assert isinstance(begun, SqliteJournal)
            record, full = begun.record, asyncio.Event()

            async def fill_then_record(entry: JournalEntry, /) -> None:
                if not full.is_set():
                    disk.fill()
                    full.set()
                await record(entry)

            begun.record = fill_then_record  # type: ignore[method-assign]
            tasks = [asyncio.create_task(session.submit(GenerationRequest("a cat", key=f"{n}"))) for n in range(6)]
            await asyncio.wait(tasks)
            ids = {task.result().id for task in tasks if task.exception() is None}
            before = states(path)
            disk.free()
            await wait_for_states(path, dict.fromkeys(before, "submitted"))
            stored = {entry.task_id async for entry in SqliteJournal(path).entries()}

    assert set(before.values()) == {"intent"}
    assert ids
    assert stored == ids
