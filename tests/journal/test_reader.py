"""Reading and exporting whole journals, of any size."""

import json
import sqlite3
import tracemalloc
from contextlib import closing
from pathlib import Path

import pytest

from flux2max_async import JournalError
from flux2max_async.journal import SqliteJournal

_MIB = 2**20
COUNT = 20_000


@pytest.fixture
def anyio_backend() -> str:
    """Use real time, in which a journal's thread runs."""
    return "asyncio"


async def create_journal(path: Path, count: int) -> SqliteJournal:
    """Create a journal of completed entries, each with about 2 KB of JSON."""
    async with SqliteJournal(path):
        pass
    request = json.dumps({"prompt": "a cat", "text": "x" * 1000})
    result = json.dumps({"images": [], "metadata": {"text": "y" * 1000}})
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute(
            "INSERT INTO entries (key, attempt, content, state, outlay, request, result, files)"
            " WITH RECURSIVE numbers(n) AS (SELECT 0 UNION ALL SELECT n + 1 FROM numbers LIMIT ?)"
            " SELECT 'k' || n, 1, 'c1', 'completed', 0, ?, ?, '[]' FROM numbers",
            (count, request, result),
        )
    return SqliteJournal(path)


async def test_memory_does_not_grow_with_the_journal(tmp_path: Path) -> None:
    """20,000 entries of 2 KB are exported, and listed, with less than 16 MiB."""
    journal = await create_journal(tmp_path / "run.db", COUNT)
    tracemalloc.start()
    try:
        target = await journal.export(tmp_path / "run.jsonl")
        exporting = tracemalloc.get_traced_memory()[1]
        tracemalloc.reset_peak()
        listed = 0
        async for _ in journal.entries():
            listed += 1
        listing = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    with target.open(encoding="utf-8") as file:
        keys = [json.loads(line)["key"] for line in file]

    assert target.stat().st_size > 40 * _MIB
    assert keys == [f"k{number}" for number in range(COUNT)]
    assert listed == COUNT
    assert max(exporting, listing) < 16 * _MIB


async def test_an_export_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    """If a page can't be read, or the target isn't a regular file, nothing is replaced and no file is left over."""
    journal = await create_journal(tmp_path / "run.db", 1)
    target = tmp_path / "run.jsonl"
    target.write_text("old", encoding="utf-8")
    (tmp_path / "other.db").write_bytes(b"no journal")
    with pytest.raises(JournalError):
        await SqliteJournal(tmp_path / "other.db").export(target)
    with pytest.raises(OSError, match="not a regular file"):
        await journal.export(tmp_path)
    with pytest.raises(FileNotFoundError):
        await journal.export(tmp_path / "missing" / "run.jsonl")

    assert target.read_text(encoding="utf-8") == "old"
    assert not list(tmp_path.glob(".*"))


async def test_an_export_through_a_link_keeps_the_link(tmp_path: Path) -> None:
    """The file that a link leads to is replaced."""
    journal = await create_journal(tmp_path / "run.db", 3)
    link = tmp_path / "link.jsonl"
    link.symlink_to("run.jsonl")
    exported = await journal.export(link)

    assert exported == link
    assert link.is_symlink()
    assert len((tmp_path / "run.jsonl").read_text(encoding="utf-8").splitlines()) == 3
