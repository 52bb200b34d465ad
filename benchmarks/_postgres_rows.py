"""The rows of a journal in PostgreSQL: how large they are, and how long it takes to write, find and prune them."""

import asyncio
import statistics
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
from _results import table

from flux2max_async import GenerationRequest
from flux2max_async._models.fingerprint import fingerprint_request
from flux2max_async._postgres import PostgresAddress
from flux2max_async.journal import EntryState, Holder, JournalEntry, PostgresJournal, SavedFile
from flux2max_async.journal._postgres_reader import prune_schema
from flux2max_async.journal._postgres_store import PostgresStore

if TYPE_CHECKING:
    import psycopg
    from support.postgres import PostgresServer

LEASE = 12.0
PROMPT = "plate {} of a herbarium, watercolour on laid paper, with the Latin name in copperplate below and a scale bar"
_FILL = """
    INSERT INTO entries (key, attempt, content, state, task_id, cost, outlay, created, submitted, ended, request,
                         result, files)
    SELECT md5('key' || number), 1, md5('key' || number), 'completed', gen_random_uuid()::text, cost, outlay,
        created - %s + number, submitted - %s + number, ended - %s + number,
        replace(request, 'plate 0 of', 'plate ' || number || ' of'),
        result, files
    FROM entries, generate_series(1, %s) AS number WHERE id = 1
"""
_SIZES = (
    "SELECT pg_table_size('entries'), pg_indexes_size('entries'), (SELECT count(*) FROM entries),"
    " (SELECT string_agg(indexrelname || ' ' || pg_relation_size(indexrelid) / 1024 || ' kB', ', ')"
    " FROM pg_stat_user_indexes WHERE relid = 'entries'::regclass)"
)
_DEAD = "SELECT n_dead_tup > 50 + 0.2 * n_live_tup FROM pg_stat_user_tables WHERE relid = 'entries'::regclass"


@attrs.frozen(kw_only=True)
class RowsSize:
    """How much is measured."""

    rows: tuple[int, ...]
    samples: int
    """How often each statement is measured."""
    written: int
    """Entries that are written as by sessions."""
    pruned: int


def states_of(number: int | str) -> list[JournalEntry]:
    """Return the values that the entry of a request has, one after the other."""
    request = GenerationRequest(PROMPT.format(number), width=1024, height=1024)
    content, now = fingerprint_request(request), datetime.now(UTC)
    intent = JournalEntry(
        key=content.fingerprint, fingerprint=content.fingerprint, request=content.description,
        created_at=now, committed=Decimal("0.07"), holder=Holder.US,
    )  # fmt: skip
    submitted = attrs.evolve(
        intent, state=EntryState.SUBMITTED, task_id=f"{content.fingerprint[:8]}-0000-4000-8000-{number:0>12}"[:36],
        submitted_at=now,
    )  # fmt: skip
    link = f"https://delivery.example/results/{'f' * 32}/sample.jpeg?se=2026-11-27T18%3A00%3A00Z&sp=r&sig={'A' * 44}"
    result = {
        "elapsed": 12.3, "polls": 5, "images": [{"url": link, "type": "image", "extra": {}}], "metadata": {"seed": 1},
        "usage": {"cost": "0.07", "discount": None, "extra": {}},
    }  # fmt: skip
    completed = attrs.evolve(
        submitted, state=EntryState.COMPLETED, cost=Decimal("0.07"), ended_at=now + timedelta(seconds=12), result=result
    )
    saved = attrs.evolve(completed, files=(SavedFile(Path(f"/srv/pictures/{content.fingerprint}.jpeg"), 271_828),))
    return [intent, submitted, completed, saved, attrs.evolve(saved, holder=None)]


def execute(store: PostgresStore, statement: str) -> "psycopg.Cursor[Any]":
    """Run a statement over the connection of a store, whose settings and search path count."""
    return store._execute(statement)  # noqa: SLF001 - a second connection would have settings of its own


def write(store: PostgresStore, entries: list[JournalEntry]) -> None:
    """Write the states of an entry, each in a transaction."""
    for entry in entries:
        with store.transaction(durable=True):
            pending = store.begin(entry, None) if entry.state is EntryState.INTENT else store.record(entry)
            assert not isinstance(pending, bool)
            pending.get()


def fill(address: PostgresAddress, rows: int) -> None:
    """Copy the first entry until there are so many."""
    with address.connect("fill", LEASE, answer_time=3600.0) as connection:
        # The trigger would update one row a million times in a transaction.
        connection.execute("ALTER TABLE entries DISABLE TRIGGER USER")
        connection.execute(_FILL, (rows, rows, rows, rows - 1))
        connection.execute("ALTER TABLE entries ENABLE TRIGGER USER")
        connection.execute("VACUUM ANALYZE entries")
        connection.execute("CHECKPOINT")


def measure_size(store: PostgresStore, rows: int) -> list[str]:
    row = execute(store, _SIZES).fetchone()
    assert row is not None
    table_size, index_size, count, indexes = row
    print(f"{rows} rows: {indexes}", file=sys.stderr)
    return [f"{table_size / count:.0f}", f"{index_size / count:.0f}", f"{(table_size + index_size) / count:.0f}"]


def written_size(address: PostgresAddress, size: RowsSize) -> list[str]:
    """Return the size of entries that were written state by state, and vacuumed as by default."""
    store = PostgresStore(attrs.evolve(address, schema="written"), LEASE)
    execute(store, "SET synchronous_commit = off")
    for number in range(size.written):
        write(store, states_of(number))
        if number % 500 == 0 and execute(store, _DEAD).fetchone() == (True,):
            execute(store, "VACUUM entries")
    found = measure_size(store, size.written)
    store.close()
    return [f"{size.written:,}, as written by sessions", *found]


def timed(function: Callable[[], object], samples: int) -> float:
    """Return the median of the milliseconds that it takes."""
    times = []
    for _ in range(samples):
        started = time.perf_counter()
        function()
        times.append(time.perf_counter() - started)
    return statistics.median(times) * 1e3


def scanned(store: PostgresStore) -> int:
    """Return how many rows of entries were read by sequential scans."""
    execute(store, "SELECT pg_stat_force_next_flush()")
    statement = "SELECT seq_tup_read FROM pg_stat_user_tables WHERE relid = 'entries'::regclass"
    row = execute(store, statement).fetchone()
    return row[0] if row else 0


def measure_statements(address: PostgresAddress, size: RowsSize) -> dict[str, tuple[float, int]]:
    """Return the milliseconds of what sessions do, and the rows that each of it reads by sequential scans."""
    store, numbers = PostgresStore(address, LEASE), iter(range(10**6))
    stamp = str(time.time_ns())
    made = [states_of(f"{number}-{stamp}") for number in range(size.samples)]
    budgeted = [states_of(f"{number}-b-{stamp}")[0] for number in range(size.samples)]
    todo = {part: iter([entries[part] for entries in made]) for part in range(5)}

    def step(part: int) -> Callable[[], object]:
        return lambda: write(store, [next(todo[part])])

    def begin_within_budget() -> None:
        entry = next(iterator)
        with store.transaction(durable=True):
            pending = store.begin(entry, Decimal(10**9), next(numbers))
            assert not isinstance(pending, bool)
            pending.get()

    iterator = iter(budgeted)
    actions: dict[str, Callable[[], object]] = {
        "begin": step(0), "record a task's id": step(1), "record an end": step(2), "record its files": step(3),
        "release": step(4), "begin within a budget": begin_within_budget,
        "find, known": lambda: store.find_row(made[next(numbers) % size.samples][0].key),
        "find, unknown": lambda: store.find_row(f"unknown {next(numbers)}"),
        "find by a task's id": lambda: store.find_task(made[next(numbers) % size.samples][1].task_id or ""),
        "find by an unknown id": lambda: store.find_task(f"unknown {next(numbers)}"),
        "check of the others": store.heartbeat,
        "tasks that have ended elsewhere": store.ended_entries,
    }  # fmt: skip
    found = {}
    for name, action in actions.items():
        before = scanned(store)
        milliseconds = timed(action, size.samples)
        found[name] = (milliseconds, (scanned(store) - before) // size.samples)
    before = scanned(store)
    milliseconds = timed(lambda: PostgresStore(address, LEASE).close(), 10)
    time.sleep(1.0)  # until the statistics of the ended connections are there
    found["open and close a session"] = (milliseconds, (scanned(store) - before) // 10)
    store.close()
    return found


async def read_rate(journal: PostgresJournal, rows: int) -> float:
    """Return the entries that are read in a second."""
    started, count = time.perf_counter(), 0
    async for _ in journal.entries():
        count += 1
        if count == rows:
            break
    return count / (time.perf_counter() - started)


def measure_reading(address: PostgresAddress, rows: int, size: RowsSize) -> list[str]:
    """Measure what reads or prunes a whole journal."""
    rate = asyncio.run(read_rate(PostgresJournal(address.conninfo, schema=address.schema), min(rows, 100_000)))
    times = []
    for before in (time.time() - rows / 2, time.time() - 10 * rows):  # half of the entries, and none
        started = time.perf_counter()
        pruned = prune_schema(address, LEASE, before, size.pruned)
        times.append(f"{pruned:,} in {time.perf_counter() - started:.2f} s")
    return [f"{rows:,}", f"{rate:,.0f}", *times]


def measure_rows(server: "PostgresServer", size: RowsSize) -> None:
    sizes, columns, rates = [], [], []
    for rows in size.rows:
        address = PostgresAddress.parse(server.conninfo(), f"rows_{rows}")
        store = PostgresStore(address, LEASE)
        write(store, states_of(0))
        fill(address, rows)
        sizes.append([f"{rows:,}, as inserted", *measure_size(store, rows)])
        store.close()
        columns.append(measure_statements(address, size))
        rates.append(measure_reading(address, rows, size))
    sizes.append(written_size(PostgresAddress.parse(server.conninfo(), "written"), size))
    print(table(["entries", "bytes of the table", "bytes of its indexes", "bytes each"], sizes), end="\n\n")
    header = ["", *(f"{rows:,} entries: ms" for rows in size.rows), *(f"rows scanned at {n:,}" for n in size.rows)]
    names = [
        [name, *(f"{column[name][0]:.2f}" for column in columns), *(str(column[name][1]) for column in columns)]
        for name in columns[0]
    ]
    print(table(header, names), end="\n\n")
    print(table(["entries", "read per second", "pruned", "if nothing is old enough"], rates), end="\n\n", flush=True)
