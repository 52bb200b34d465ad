"""SqliteInFlightLimit: its file, and what happens to that; what holds for other limits as well is in limits/."""

import asyncio
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from pathlib import Path

import anyio
import pytest
from support.limits import A_WHILE, PATIENCE, acquire, is_free

from flux2max_async import InFlightLimitError, SqliteInFlightLimit, SqliteJournal
from flux2max_async._shared_limit.sqlite import SqliteConnection
from flux2max_async._shared_limit.worker import LimitWorker


@pytest.fixture
def anyio_backend() -> str:
    """Use real time, in which the threads run."""
    return "asyncio"


@pytest.fixture
async def open_limit(tmp_path: Path) -> AsyncIterator[Callable[..., "asyncio.Future[SqliteInFlightLimit]"]]:
    async with AsyncExitStack() as stack:

        async def open_one(limit: int = 1, path: Path = tmp_path / "limit.db") -> SqliteInFlightLimit:
            opened = SqliteInFlightLimit(path, limit)
            await opened.open()
            stack.push_async_callback(opened.close)
            return opened

        yield lambda *arguments: asyncio.ensure_future(open_one(*arguments))


# ------------------------------------------------------------------ files


async def test_no_files_are_left(tmp_path: Path) -> None:
    """After all have closed it, only the file itself is left; nothing else was in the way of a long path."""
    path = tmp_path / ("folder" * 20) / ("limit" * 20)
    async with AsyncExitStack() as stack:
        for _ in range(2):
            limit = SqliteInFlightLimit(path, 1)
            await limit.open()
            stack.push_async_callback(limit.close)
            await acquire(limit)
            limit.release()

    assert [file.name for file in path.parent.iterdir()] == [path.name]
    assert path.stat().st_mode & 0o777 == 0o600


async def test_a_symbolic_link(
    tmp_path: Path, open_limit: Callable[..., "asyncio.Future[SqliteInFlightLimit]"]
) -> None:
    """Those who open the file by another name share its slots, and wake each other."""
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    first, second = (
        await open_limit(1, tmp_path / "real" / "limit.db"),
        await open_limit(1, tmp_path / "link" / "limit.db"),
    )
    await acquire(first)
    wait = asyncio.ensure_future(acquire(second))
    await anyio.sleep(A_WHILE)
    first.release()
    await wait

    assert not await is_free(first)


# ------------------------------------------------------------------ other processes

HOLDER = """
import asyncio, os, sys, time
from flux2max_async import SqliteInFlightLimit

async def main():
    limit = SqliteInFlightLimit(sys.argv[1], 1)
    if sys.argv[2] == "journal":
        limit.expect_adoption()
    await limit.open()
    await limit.acquire()
    if sys.argv[2] == "fork" and not os.fork():
        time.sleep(60)
        os._exit(0)
    print("ready", flush=True)
    await asyncio.sleep(60)

asyncio.run(main())
"""


@pytest.mark.parametrize(("kind", "is_free_at_once"), [("plain", True), ("fork", True), ("journal", False)])
async def test_a_process_that_is_killed(
    tmp_path: Path,
    open_limit: Callable[..., "asyncio.Future[SqliteInFlightLimit]"],
    kind: str,
    is_free_at_once: bool,
) -> None:
    """Its slots are free at once, also if a fork of it lives on; with a journal, once its tasks are adopted and end."""
    limit = await open_limit()
    command = [sys.executable, "-W", "ignore", "-c", HOLDER, str(tmp_path / "limit.db"), kind]
    # Blocking, because its pipe is read in a thread.
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:  # noqa: ASYNC220
        try:
            assert process.stdout is not None
            assert await asyncio.to_thread(process.stdout.readline) == "ready\n"
            wait = asyncio.ensure_future(acquire(limit))
            await anyio.sleep(A_WHILE)
            assert not wait.done()
            os.kill(process.pid, signal.SIGKILL)
            if not is_free_at_once:
                await anyio.sleep(A_WHILE)
                assert not wait.done()
                limit.occupy()
                await anyio.sleep(A_WHILE)
                assert not wait.done()
                limit.release()
            await wait
        finally:
            os.killpg(process.pid, signal.SIGKILL)


# ------------------------------------------------------------------ a file that can't be used


async def make_folder(path: Path) -> None:
    path.mkdir()


async def make_journal(path: Path) -> None:
    async with SqliteJournal(path):
        pass


async def make_newer(path: Path) -> None:
    limit = SqliteInFlightLimit(path, 1)
    await limit.open()
    await limit.close()
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA user_version = 99")
    connection.close()


async def make_garbage(path: Path) -> None:
    path.write_bytes(b"garbage" * 1000)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (make_folder, "can't be used"),
        (make_garbage, "can't be used: file is not a database"),
        (make_journal, "a database, but not that of a limit: it needs a file of its own; it was left as it is"),
        (make_newer, "a newer version wrote the limit"),
    ],
)
async def test_what_is_not_a_limit(
    tmp_path: Path, make: Callable[[Path], "asyncio.Future[None]"], message: str
) -> None:
    """What can't be used is an error when it is opened, which names the file, and is left as it is."""
    path = tmp_path / "limit.db"
    await make(path)
    before = None if path.is_dir() else path.read_bytes()
    limit = SqliteInFlightLimit(path, 1)
    with pytest.raises(InFlightLimitError, match=message) as caught:
        await limit.open()
    await limit.close()

    assert str(path) in str(caught.value)
    assert before == (None if path.is_dir() else path.read_bytes())
    assert {file.suffix for file in tmp_path.iterdir()} == {".db"}


async def test_a_table_that_is_dropped(
    tmp_path: Path, open_limit: Callable[..., "asyncio.Future[SqliteInFlightLimit]"]
) -> None:
    """A transaction that fails changes nothing; it is tried again with another connection, and everything counts."""
    limit = await open_limit(2)
    await acquire(limit)
    connection = sqlite3.connect(tmp_path / "limit.db")
    connection.execute("DROP TABLE holders")
    connection.commit()
    connection.close()
    await acquire(limit)

    assert not await is_free(limit)


@pytest.mark.parametrize("name", ["limit.db", "*.wake"])
async def test_files_that_are_deleted_while_they_are_open(
    tmp_path: Path, open_limit: Callable[..., "asyncio.Future[SqliteInFlightLimit]"], name: str
) -> None:
    """A file or pipe that somebody deletes is made anew, and what is held still counts."""
    first, second = await open_limit(2), await open_limit(2)
    await acquire(first)
    for file in tmp_path.glob(name):
        file.unlink()
    await acquire(first)
    wait = asyncio.ensure_future(acquire(second))
    await anyio.sleep(A_WHILE)
    assert not wait.done()
    first.release()
    await wait

    assert not await is_free(first)


async def test_a_folder_that_is_replaced_by_a_file(tmp_path: Path) -> None:
    """The limit can be closed, although its pipe can't be deleted, and those who wait are told."""
    limit = SqliteInFlightLimit(tmp_path / "folder" / "limit.db", 1)
    await limit.open()
    await acquire(limit)
    wait = asyncio.ensure_future(limit.acquire())
    await asyncio.sleep(0)
    shutil.rmtree(tmp_path / "folder")
    (tmp_path / "folder").write_text("a file")
    with anyio.fail_after(PATIENCE):
        await limit.close()

        with pytest.raises(InFlightLimitError, match="was closed"):
            await wait


async def test_a_file_that_is_away_for_a_while(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Waits go on once the file can be used again; after so many seconds they fail. The log says both once."""
    path = tmp_path / "limit.db"
    worker = LimitWorker(SqliteConnection(path, 2, keep_after_death=False), away_time=1.0)
    await worker.opened
    path.unlink()
    path.mkdir()
    first = asyncio.ensure_future(worker.acquire())
    await anyio.sleep(A_WHILE)
    assert not first.done()
    path.rmdir()
    with anyio.fail_after(PATIENCE):
        await first
    path.unlink()
    path.mkdir()
    with pytest.raises(InFlightLimitError, match="can't be used"), anyio.fail_after(PATIENCE):
        await worker.acquire()
    path.rmdir()
    with anyio.fail_after(PATIENCE):
        await worker.acquire()
    worker.stop()
    await worker.stopped

    messages = [record.getMessage() for record in caplog.records]
    assert [message.rpartition(": ")[2] for message in messages] == [
        "unable to open database file; it is tried again", "it can be used again",
        "unable to open database file; it is tried again", "it can be used again",
    ]  # fmt: skip


# ------------------------------------------------------------------ misuse


async def test_a_session_that_is_cancelled_while_it_opens(tmp_path: Path) -> None:
    """Nothing is left of an opening that is cancelled."""
    limit = SqliteInFlightLimit(tmp_path / "limit.db", 1)
    opening = asyncio.ensure_future(limit.open())
    await asyncio.sleep(0)
    opening.cancel()
    await asyncio.wait([opening])
    other = SqliteInFlightLimit(tmp_path / "limit.db", 1)
    await other.open()
    await acquire(other)
    await other.close()
    with anyio.fail_after(PATIENCE):
        while list(tmp_path.glob("*.wake")):  # noqa: ASYNC110 - another thread deletes it
            await anyio.sleep(0.01)

    assert opening.cancelled()


async def test_its_text(tmp_path: Path) -> None:
    """A limit shows its file and its slots."""
    limit = SqliteInFlightLimit(tmp_path / "limit.db", 3)

    assert repr(limit) == f"SqliteInFlightLimit({str(limit.path)!r}, 3)"
