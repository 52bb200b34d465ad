"""Reading ahead: lookups that go through the file need few queries, and return what is in the file."""

import random
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import attrs
import pytest

from flux2max_async import JournalEntry, JournalError
from flux2max_async.journal import EntryState, Holder, SavedFile, SqliteJournal
from flux2max_async.journal._read_ahead import ReadAhead
from flux2max_async.journal._store import SqliteStore

COUNT = 2_000


def completed(number: int, **more: Any) -> JournalEntry:
    entry = JournalEntry(
        key=f"k{number}", fingerprint="c1", request={"prompt": "a cat"}, state=EntryState.COMPLETED, task_id=f"t{number}",
        result={"images": [], "metadata": {}},
    )  # fmt: skip
    return attrs.evolve(entry, **more)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SqliteStore]:
    opened = SqliteStore(tmp_path / "run.db", 12.0, 10.0)
    yield opened
    opened.close()


def add(store: SqliteStore, *entries: JournalEntry) -> None:
    with store.transaction(durable=False):
        for entry in entries:
            store.begin(attrs.evolve(entry, holder=Holder.US), None)
            store.record(entry)


def count_queries(store: SqliteStore) -> list[str]:
    """Return a list to which the statements that are executed from now on are added."""
    statements: list[str] = []
    store._connection.set_trace_callback(statements.append)
    return statements


@pytest.mark.parametrize("gap", [1, 3])
def test_lookups_in_order_need_few_queries(store: SqliteStore, tmp_path: Path, gap: int) -> None:
    """Each row, or every third, in the order of the file: less than a query for fifty entries, and each is right."""
    add(store, *(completed(number) for number in range(COUNT)))
    ahead, statements = ReadAhead(), count_queries(store)
    numbers = range(0, COUNT, gap)
    found = [ahead.find(store, f"k{number}") for number in numbers]

    assert found == [completed(number) for number in numbers]
    assert len(statements) < COUNT / 50


def test_requests_in_flight_may_be_out_of_order(store: SqliteStore, tmp_path: Path) -> None:
    """Neighbours that change places, or are asked for twice, or are unknown, end no reading ahead."""
    add(store, *(completed(number) for number in range(COUNT)))
    ahead, statements = ReadAhead(), count_queries(store)
    for number in range(0, COUNT, 2):
        for asked in (number + 1, number):
            assert ahead.find(store, f"k{asked}") == completed(asked)
        if number % 100 == 0:
            assert ahead.find(store, f"k{number}") == completed(number)
            assert ahead.find(store, "unknown") is None

    assert len(statements) < COUNT / 20


def test_lookups_without_order_read_nothing_ahead(store: SqliteStore, tmp_path: Path) -> None:
    """Lookups in random order need a query each, and hardly any other."""
    add(store, *(completed(number) for number in range(COUNT)))
    ahead, statements = ReadAhead(), count_queries(store)
    numbers = random.Random(1).sample(range(COUNT), COUNT)
    found = [ahead.find(store, f"k{number}") for number in numbers]

    assert found == [completed(number) for number in numbers]
    assert len(statements) < 1.1 * COUNT


# What is not read ahead, by what it is.
OTHERS: dict[str, JournalEntry] = {
    "failed": completed(20, state=EntryState.FAILED),
    "running": completed(20, state=EntryState.SUBMITTED, result={}, holder=Holder.US),
    "uncertain": completed(20, state=EntryState.UNCERTAIN, task_id=None, result={}),
    "held": completed(20, holder=Holder.US),
    "large": completed(20, result={"images": [], "metadata": {"text": "x" * 20_000}}),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_only_small_completed_entries_are_kept(store: SqliteStore, tmp_path: Path, kind: str) -> None:
    """What may change, or is large, is read when it is looked up, and ends no reading ahead."""
    entries = [OTHERS[kind] if number == 20 else completed(number) for number in range(100)]
    add(store, *entries)
    ahead = ReadAhead()
    found = [ahead.find(store, f"k{number}") for number in range(18)]
    kept = [ahead.take(f"k{number}") for number in (19, 20, 21)]
    changed = attrs.evolve(entries[20], task_id="changed")
    with store.transaction(durable=False):
        store._connection.execute("UPDATE entries SET task_id = 'changed' WHERE key = 'k20'")
    found.append(ahead.find(store, "k20"))

    assert [item and item.key for item in found[:18]] == [f"k{number}" for number in range(18)]
    assert [item and item.key for item in kept] == ["k19", None, "k21"]
    assert found[18] is not None
    assert attrs.evolve(found[18], owner=None) == changed


def test_the_newest_attempt_is_found(store: SqliteStore, tmp_path: Path) -> None:
    """An attempt that was completed although there is a newer one is not read ahead."""
    add(store, *(completed(number) for number in range(50)), completed(20, attempt=2, task_id="new"))
    ahead = ReadAhead()
    found = [ahead.find(store, f"k{number}") for number in range(50)]

    assert [item and item.task_id for item in found] == ["new" if n == 20 else f"t{n}" for n in range(50)]


def test_a_damaged_row_is_an_error_when_it_is_looked_up(store: SqliteStore, tmp_path: Path) -> None:
    """A row that can't be read ends no reading ahead."""
    add(store, *(completed(number) for number in range(50)))
    with store.transaction(durable=False):
        store._connection.execute("UPDATE entries SET files = '{' WHERE key = 'k20'")
    ahead = ReadAhead()
    found = [ahead.find(store, f"k{number}") for number in range(20)]
    with pytest.raises(JournalError, match="'k20'"):
        ahead.find(store, "k20")
    found += [ahead.find(store, f"k{number}") for number in range(21, 50)]

    assert found == [completed(number) for number in range(50) if number != 20]


async def test_what_is_recorded_is_found(tmp_path: Path) -> None:
    """After an image was saved again, the entry has its new path, although it had been read ahead before."""
    path = tmp_path / "run.db"
    with closing(SqliteStore(path, 12.0, 10.0)) as store:
        add(store, *(completed(number) for number in range(100)))
    async with SqliteJournal(path) as journal:
        for number in range(40):
            await journal.find(f"k{number}")
        assert journal._read_ahead.take("k50") == completed(50)
        await journal.record(completed(51, files=(SavedFile(Path("/images/a.png"), 9),)))
        found = [await journal.find(f"k{number}") for number in (50, 51, 52)]

    assert [item and len(item.files) for item in found] == [0, 1, 0]


async def test_a_journal_that_was_never_opened_is_an_error(tmp_path: Path) -> None:
    """find() and record() raise a JournalError."""
    journal = SqliteJournal(tmp_path / "run.db")
    with pytest.raises(JournalError, match="is not open"):
        await journal.find("k")
    with pytest.raises(JournalError, match="is not open"):
        await journal.record(completed(1))


async def test_a_second_session_reads_the_file_anew(tmp_path: Path) -> None:
    """What was read ahead is forgotten when the journal is closed."""
    path = tmp_path / "run.db"
    with closing(SqliteStore(path, 12.0, 10.0)) as store:
        add(store, *(completed(number) for number in range(100)))
    journal = SqliteJournal(path)
    async with journal:
        for number in range(40):
            await journal.find(f"k{number}")
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("UPDATE entries SET task_id = 'changed'")
    async with journal:
        found = await journal.find("k41")

    assert found is not None
    assert found.task_id == "changed"
