"""The journal's file: what it keeps, whom it serves at once, and what it refuses."""

import asyncio
import json
import os
import resource
import sqlite3
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import closing
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import attrs
import pytest

from flux2max_async import (
    BudgetExceededError,
    Completed,
    ConfigurationError,
    ContentModeratedError,
    Failed,
    GeneratedImage,
    JournalEntry,
    JournalError,
    SubmissionUncertainError,
    TaskFailedError,
    TaskNotFoundError,
    Usage,
)
from flux2max_async.journal import EntryState, Holder, SavedFile, SqliteJournal
from flux2max_async.journal._serialization import outcome_from_entry, outcome_to_json

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


@pytest.fixture
def anyio_backend() -> str:
    """A journal's thread works in real time."""
    return "asyncio"


@pytest.fixture
async def journal(tmp_path: Path) -> AsyncIterator[SqliteJournal]:
    async with SqliteJournal(tmp_path / "run.db", lease=4.0) as opened:
        yield opened


def intent(key: str = "k", **more: Any) -> JournalEntry:
    return JournalEntry(
        key=key, content="c1", request={"prompt": f"a {key}"}, holder=Holder.US, outlay=Decimal("0.07"), created_at=NOW,
        **more,
    )  # fmt: skip


def submitted(key: str = "k") -> JournalEntry:
    return attrs.evolve(intent(key), state=EntryState.SUBMITTED, task_id=f"t-{key}", submitted_at=NOW)


def completed(key: str = "k") -> JournalEntry:
    return attrs.evolve(
        submitted(key), state=EntryState.COMPLETED, holder=None, ended_at=NOW, cost=Decimal("0.0725"),
        outlay=Decimal("0.0725"), result={"images": []}, files=(SavedFile(Path("/pictures/a.png"), 9),),
    )  # fmt: skip


async def made(path: Path, entries: int = 200) -> None:
    """Make a journal with so many entries."""
    async with SqliteJournal(path) as journal:
        await asyncio.gather(*(journal.begin(intent(f"{number}")) for number in range(entries)))


def rewrite(path: Path, statement: str, *arguments: object) -> None:
    """Change a journal from outside, as time and accidents do."""
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute(statement, arguments)


def someone_elsewhere(path: Path, owner: str = "them") -> None:
    """Let somebody hold the journal from another machine's process, of whom nothing but a beat is known."""
    rewrite(path, "INSERT INTO owners VALUES (?, 1, 0.4, 'elsewhere', 1)", owner)


def gone_process() -> int:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        pass
    return process.pid


# ---------------------------------------------------------------------- what it keeps


async def test_what_is_recorded_is_found_again_by_another_session(tmp_path: Path) -> None:
    """All that an entry says is in the file, and another session reads it as it was."""
    path = tmp_path / "new" / "run.db"
    async with SqliteJournal(path) as journal:
        assert await journal.find("k") is None
        assert await journal.begin(intent())
        await journal.record(submitted())
        await journal.record(completed())
    async with SqliteJournal(path) as journal:
        found = await journal.find("k")

    assert found == completed()
    assert found is not None
    assert (found.prompt, found.paths, found.error) == ("a k", (Path("/pictures/a.png"),), None)


async def test_entries_are_listed_in_order_beside_a_running_session(journal: SqliteJournal) -> None:
    """Entries can be listed while the journal is in use, in the order in which they were begun."""
    keys = [f"{number}" for number in range(1200)]
    await asyncio.gather(*(journal.begin(intent(key)) for key in keys))
    other = SqliteJournal(journal.path)
    listed = [entry async for entry in other.entries()]

    assert [entry.key for entry in listed] == keys
    assert {entry.holder for entry in listed} == {Holder.OTHER}
    assert repr(other) == f"SqliteJournal('{journal.path}')"


@pytest.mark.parametrize("begun", [b"", None])
async def test_a_file_without_tables_has_no_entries(tmp_path: Path, begun: bytes | None) -> None:
    """A process that was killed while it made the file has left nothing to list, and nothing that is in the way."""
    path = tmp_path / "run.db"
    if begun is not None:
        path.write_bytes(begun)
    else:
        with closing(sqlite3.connect(path)) as connection:
            connection.execute("PRAGMA journal_mode = WAL")
    before = [entry async for entry in SqliteJournal(path).entries()]
    async with SqliteJournal(path) as journal:
        assert await journal.begin(intent())
    after = [entry async for entry in SqliteJournal(path).entries()]

    assert (len(before), len(after)) == (0, 1)


async def test_whoever_is_gone_holds_nothing(tmp_path: Path) -> None:
    """An entry of a process that has ended on this machine is listed as held by nobody."""
    path = tmp_path / "run.db"
    async with SqliteJournal(path) as journal:
        await journal.begin(intent())
        with closing(sqlite3.connect(path)) as connection:
            connection.execute("UPDATE owners SET pid = ?", (2**22 + 1,))  # more than Linux gives
            connection.commit()
        (entry,) = [entry async for entry in journal.entries()]

    assert (entry.state, entry.holder) == (EntryState.INTENT, None)


async def test_an_export_has_a_line_of_json_for_each_entry(journal: SqliteJournal, tmp_path: Path) -> None:
    """An export can be read without this library, in any language."""
    await journal.begin(intent("größe"))
    await journal.record(completed("größe"))
    await journal.begin(intent("b"))
    target = await journal.export(tmp_path / "run.jsonl")
    first, second = [json.loads(line) for line in target.read_text(encoding="utf-8").splitlines()]

    assert target == tmp_path / "run.jsonl"
    assert (first["key"], first["state"], first["cost"]) == ("größe", "completed", "0.0725")
    assert (first["paths"], first["ended_at"]) == (["/pictures/a.png"], "2026-01-02T03:04:05+00:00")
    assert (second["key"], second["state"], second["task_id"]) == ("b", "intent", None)
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix == ".part") == []


async def test_concurrent_intents_share_an_fsync(journal: SqliteJournal) -> None:
    """Two hundred intents at once wait for the disk a few times, and not two hundred times."""
    assert journal._scribe is not None
    before = journal._scribe.transactions
    begun = await asyncio.gather(*(journal.begin(intent(f"{number}")) for number in range(200)))

    assert all(begun)
    assert 1 <= journal._scribe.transactions - before <= 20


async def test_an_attempt_is_begun_once(journal: SqliteJournal) -> None:
    """Of two who begin the same attempt one is told that he was too late; a refused one may be begun again."""
    first, second = await asyncio.gather(journal.begin(intent()), journal.begin(intent()))
    await journal.record(attrs.evolve(intent(), state=EntryState.REFUSED, holder=None, outlay=Decimal(0)))
    again = await journal.begin(attrs.evolve(intent(), content="c2"))
    found = await journal.find("k")

    assert sorted([first, second]) == [False, True]
    assert again
    assert found is not None
    assert (found.state, found.content, found.attempt) == (EntryState.INTENT, "c2", 1)


async def test_an_end_stands(journal: SqliteJournal) -> None:
    """Whoever comes late with less than an end can't undo it, nor spoil the sum of what was spent."""
    await journal.begin(intent())
    await journal.record(completed())
    await journal.record(submitted())
    await journal.record(intent("unknown"))
    found = await journal.find("k")

    assert found is not None
    assert found.state is EntryState.COMPLETED
    with pytest.raises(BudgetExceededError, match=r"\$0.0725 are spent"):
        await journal.begin(intent("b"), limit=Decimal("0.1"))


async def test_only_who_holds_an_entry_may_take_something_back(tmp_path: Path) -> None:
    """Somebody else can add an id or an end that isn't known yet; he can't undo anything, nor lose an id or a picture."""
    path = tmp_path / "run.db"
    await made(path)
    async with SqliteJournal(path) as one, SqliteJournal(path) as two:
        await one.begin(intent())
        await one.record(submitted())
        await two.record(attrs.evolve(intent(), state=EntryState.REFUSED, holder=None, outlay=Decimal(0)))
        await two.record(attrs.evolve(submitted(), holder=None))
        before = await one.find("k")
        await two.record(completed())
        await one.record(attrs.evolve(completed(), files=(), task_id=None))
        await one.record(submitted())
        after = await two.find("k")
        await one.begin(intent("b"))
        await two.record(attrs.evolve(intent("b"), state=EntryState.UNCERTAIN, holder=None))
        held = await one.find("b")

    assert before is not None
    assert (before.state, before.holder, before.outlay) == (EntryState.SUBMITTED, Holder.US, Decimal("0.07"))
    assert after is not None
    assert (after.state, after.task_id, after.files) == (EntryState.COMPLETED, "t-k", completed().files)
    assert held is not None
    assert held.state is EntryState.INTENT


async def test_what_is_begun_already_is_told_before_the_money_is_counted(journal: SqliteJournal) -> None:
    """A limit that is used up by the request itself doesn't hide that somebody has begun it."""
    await journal.begin(intent())

    assert not await journal.begin(intent(), limit=Decimal("0.07"))


async def test_a_limit_counts_what_all_have_begun(journal: SqliteJournal) -> None:
    """An intent that would pass the limit isn't written; what bought nothing doesn't count."""
    limit = Decimal("0.14")
    begun = [await journal.begin(intent(key), limit=limit) for key in ("a", "b")]
    with pytest.raises(BudgetExceededError, match=r"\$0.14 doesn't allow another picture for about \$0.07"):
        await journal.begin(intent("c"), limit=limit)
    await journal.record(attrs.evolve(intent("a"), state=EntryState.REFUSED, holder=None, outlay=Decimal(0)))

    assert begun == [True, True]
    assert await journal.begin(intent("c"), limit=limit)


async def test_a_key_that_somebody_else_has_begun_is_found_in_the_end(tmp_path: Path) -> None:
    """Two who open an empty journal together don't ask for each other's keys at first, but never begin one twice."""
    path = tmp_path / "run.db"
    async with SqliteJournal(path) as one, SqliteJournal(path) as two:
        await one.begin(intent())
        early = await two.find("k")
        begun = await two.begin(intent())
        found = await two.find("k")

    assert (early, begun) == (None, False)
    assert found is not None
    assert found.holder is Holder.OTHER


async def test_what_cannot_be_written_is_our_error(journal: SqliteJournal) -> None:
    """An id that no file can hold fails for itself, and for nobody else."""
    await journal.begin(intent())
    odd = attrs.evolve(submitted(), task_id="\ud800")
    failure, begun = await asyncio.gather(journal.record(odd), journal.begin(intent("b")), return_exceptions=True)

    assert isinstance(failure, JournalError)
    assert begun is True


# ---------------------------------------------------------------------- outcomes

IMAGES = (
    GeneratedImage("https://pictures.example/0", "image", "t1", {"jobId": "j"}, 0),
    GeneratedImage("https://pictures.example/1", "image_url", "t1", {}, 1),
)


@pytest.mark.parametrize(
    "outcome",
    [
        Completed("t1", None, IMAGES, Usage(Decimal("0.0700"), Decimal(1), {"x": [1]}), {"a": None}, 8.5, 3),
        Completed("t1", None, IMAGES, Usage(None, None), {}, 8.5, 3),
        Completed("t1", None, IMAGES, None, {}, 8.5, 3),
        Failed("t1", None, TaskFailedError("boom", "t1", "c"), 2.0, 1),
        Failed("t1", None, ContentModeratedError("no", "t1"), 2.0, 1),
        Failed("t1", None, TaskNotFoundError("gone", 404, "c", "r"), 2.0, 1),
        Failed(None, None, SubmissionUncertainError("lost"), 2.0, 0),
    ],
)
def test_an_outcome_survives_being_written_down(outcome: Completed | Failed) -> None:
    """What is replayed is what it was, money to the last digit, and says that it is replayed."""
    entry = attrs.evolve(completed(), task_id=outcome.task_id, result=json.loads(json.dumps(outcome_to_json(outcome))))
    again = outcome_from_entry(entry, None)

    assert again.replayed
    if isinstance(outcome, Completed):
        assert again == attrs.evolve(outcome, replayed=True)
        assert entry.error is None
    else:
        assert isinstance(again, Failed)
        assert (type(again.error), again.error.args, str(again.error)) == (
            type(outcome.error), outcome.error.args, str(outcome.error),
        )  # fmt: skip
        assert (again.task_id, again.elapsed, again.polls) == (outcome.task_id, outcome.elapsed, outcome.polls)
        assert entry.error == outcome.error.message


def test_no_secret_and_no_picture_is_written_down() -> None:
    """What the service echoes of secrets is blotted out, and what is long enough to be a picture is cut."""
    outcome = Completed("t1", None, IMAGES, None, {"echo": ["my-key", {"my-key": 1}], "long": "x" * 10_000}, 1.0, 1)
    text = json.dumps(outcome_to_json(outcome, secrets=("my-key",)))

    assert "my-key" not in text
    assert len(text) < 1000


# ---------------------------------------------------------------------- several at once


async def test_a_task_that_is_held_is_not_adopted(tmp_path: Path) -> None:
    """Two journals on one file see who holds what; only what is free can be adopted, and only once."""
    path = tmp_path / "run.db"
    await made(path)
    async with SqliteJournal(path) as one, SqliteJournal(path) as two, SqliteJournal(path) as three:
        await one.begin(intent())
        await one.record(submitted())
        held = await two.find("k")
        assert held is not None
        await one.record(attrs.evolve(submitted(), holder=None))
        free = await two.find("k")
        assert free is not None
        adopted = [await two.adopt(free), await three.adopt(free)]
        ours = await two.find("k")

    assert held.holder is Holder.OTHER
    assert free.holder is None
    assert adopted == [True, False]
    assert ours is not None
    assert ours.holder is Holder.US


async def test_a_change_made_elsewhere_is_noticed_within_a_second(tmp_path: Path) -> None:
    """Who waits for an entry is woken when its holder writes its end, and not before."""
    path = tmp_path / "run.db"
    await made(path)
    async with SqliteJournal(path) as one, SqliteJournal(path) as two:
        await one.begin(intent())
        await one.record(submitted())
        held = await two.find("k")
        assert held is not None
        waiting = asyncio.ensure_future(two.changed(held))
        await one.begin(intent("third"))
        done, _ = await asyncio.wait([waiting], timeout=0.4)
        await one.record(completed())
        async with asyncio.timeout(1):
            await waiting

    assert not done


async def test_closing_ends_a_wait_for_a_change(tmp_path: Path) -> None:
    """Who waits for somebody else's entry isn't left waiting by a journal that is closed."""
    path = tmp_path / "run.db"
    await made(path)
    async with SqliteJournal(path) as one:
        async with SqliteJournal(path) as two:
            await one.begin(intent())
            held = await two.find("k")
            assert held is not None
            waiting = asyncio.ensure_future(two.changed(held))
            await asyncio.sleep(0.1)
        async with asyncio.timeout(1):
            await waiting

    assert held.holder is Holder.OTHER


async def test_whoever_gives_no_sign_of_life_is_dead(tmp_path: Path) -> None:
    """Tasks of somebody who beats no more are taken over and told; a submit of his that has no id is uncertain."""
    path = tmp_path / "run.db"
    left: asyncio.Future[list[JournalEntry]] = asyncio.get_running_loop().create_future()
    async with SqliteJournal(path) as one:
        for key in ("k", "begun", "done"):
            await one.begin(intent(key))
        await one.record(submitted())
        await one.record(completed("done"))
    journal = SqliteJournal(path, lease=0.4)  # for how often it looks
    someone_elsewhere(path)
    rewrite(path, "UPDATE entries SET owner = 'them'")
    await journal.open(left.set_result)
    try:
        held = await journal.find("k")
        for beat in range(5):  # he lives on for half a second
            await asyncio.sleep(0.1)
            rewrite(path, "UPDATE owners SET beat = ? WHERE id = 'them'", 10 + beat)
        still_alive = not left.done()
        async with asyncio.timeout(5):
            found = await left
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


async def test_a_process_that_is_gone_need_not_be_waited_for(journal: SqliteJournal) -> None:
    """What a dead process of this machine has left is free at once, and whoever waits for it is told."""
    await journal.begin(intent())
    await journal.record(submitted())
    with closing(sqlite3.connect(journal.path)) as connection:
        ((place,),) = connection.execute("SELECT place FROM owners").fetchall()
    rewrite(journal.path, "INSERT INTO owners VALUES ('them', 1, 60, ?, ?)", place, os.getpid())
    rewrite(journal.path, "UPDATE entries SET owner = 'them'")
    held = await journal.find("k")
    assert held is not None
    waiting = asyncio.ensure_future(journal.changed(held))
    await asyncio.sleep(0.1)
    rewrite(journal.path, "UPDATE owners SET pid = ? WHERE id = 'them'", gone_process())
    async with asyncio.timeout(5):
        await waiting
    free = await journal.find("k")

    assert held.holder is Holder.OTHER
    assert free is not None
    assert free.holder is not Holder.OTHER


async def test_who_is_gone_before_a_journal_is_opened_holds_nothing(tmp_path: Path) -> None:
    """After a crash, a program that is started again finds what it left free at once."""
    path = tmp_path / "run.db"
    async with SqliteJournal(path) as journal:
        await journal.begin(intent())
        await journal.record(submitted())
        with closing(sqlite3.connect(path)) as connection:
            ((place,),) = connection.execute("SELECT place FROM owners").fetchall()
    rewrite(path, "INSERT INTO owners VALUES ('them', 1, 60, ?, ?)", place, gone_process())
    rewrite(path, "UPDATE entries SET owner = 'them'")
    async with SqliteJournal(path) as journal:
        found = await journal.find("k")
        with closing(sqlite3.connect(path)) as connection:
            ((owners,),) = connection.execute("SELECT count(*) FROM owners").fetchall()

    assert found is not None
    assert (found.state, found.holder) == (EntryState.SUBMITTED, None)
    assert owners == 1


async def test_nobody_dies_of_a_lock(tmp_path: Path) -> None:
    """When another program locks the file for longer than the lease, those who couldn't show that they live are not dead."""
    path = tmp_path / "run.db"
    async with (
        SqliteJournal(path, lease=0.4, busy_timeout=5) as one,
        SqliteJournal(path, lease=0.4, busy_timeout=5) as two,
    ):
        await one.begin(intent())
        await one.record(submitted())
        await asyncio.sleep(0.3)
        with closing(sqlite3.connect(path, isolation_level=None, timeout=5)) as other:
            other.execute("BEGIN IMMEDIATE")
            await asyncio.sleep(1)
            other.execute("COMMIT")
        await asyncio.sleep(0.3)
        await two.begin(intent("b"))
        found = await two.find("k")

    assert found is None or found.holder is Holder.OTHER


async def test_a_sleeper_who_was_taken_for_dead_is_alive_again(tmp_path: Path) -> None:
    """A process that was stopped for longer than its lease goes on, and the others see it again."""
    async with SqliteJournal(tmp_path / "run.db", lease=0.2) as journal:
        rewrite(journal.path, "DELETE FROM owners")
        await asyncio.sleep(0.3)
        with closing(sqlite3.connect(journal.path)) as connection:
            ((owners,),) = connection.execute("SELECT count(*) FROM owners").fetchall()

    assert owners == 1


async def test_a_session_that_was_never_closed_keeps_nobody_waiting(tmp_path: Path) -> None:
    """When an event loop ends without closing its journal, its thread ends by itself and frees what it held."""
    path = tmp_path / "run.db"

    async def forget() -> None:
        journal = SqliteJournal(path, lease=0.2)
        await journal.open()
        await journal.begin(intent())
        await journal.record(submitted())

    await asyncio.to_thread(asyncio.run, forget())
    async with asyncio.timeout(10):
        async with SqliteJournal(path) as journal:
            while True:
                found = await journal.find("k")
                assert found is not None
                if found.holder is None:
                    break
                await asyncio.sleep(0.05)

    assert found.state is EntryState.SUBMITTED


async def test_a_journal_serves_one_session_at_a_time(journal: SqliteJournal) -> None:
    """Opening it twice is refused; before and after, it can't be asked; it can be opened again; closing twice is fine."""
    with pytest.raises(JournalError, match="open already: each session needs a SqliteJournal of its own"):
        await journal.open()
    await journal.close()
    await journal.close()
    with pytest.raises(JournalError, match="is not open"):
        await journal.find("k")
    with pytest.raises(JournalError, match="is not open"):
        await journal.begin(intent())
    await journal.open()

    assert await journal.begin(intent())


@pytest.mark.parametrize("setting", ["lease", "busy_timeout"])
def test_senseless_times_are_refused(setting: str, tmp_path: Path) -> None:
    """A time of nothing, or without an end, is an error that names the setting."""
    with pytest.raises(ConfigurationError, match=f"{setting} must be more than 0 seconds"):
        SqliteJournal(tmp_path / "run.db", **{setting: 0.0})
    with pytest.raises(ConfigurationError, match=f"{setting} must be at most 3600 seconds, not inf"):
        SqliteJournal(tmp_path / "run.db", **{setting: float("inf")})


# ---------------------------------------------------------------------- what it refuses


def newer(path: Path) -> None:
    rewrite(path, "PRAGMA user_version = 2")


def somebody_elses(path: Path) -> None:
    rewrite(path, "PRAGMA application_id = 7")


def no_database(path: Path) -> None:
    path.write_bytes(b"once upon a time")


def torn(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[4096 * 3 : 4096 * 5] = bytes(8192)
    path.write_bytes(data)


def torn_head(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[16:100] = b"\xff" * 84
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (newer, "written by a newer version .schema 2, known up to 1.: update flux2max_async"),
        (somebody_elses, "is a database, but not a journal"),
        (no_database, "is not a journal"),
        (torn, "is damaged"),
        (torn_head, "is damaged"),
    ],
)
async def test_what_is_no_journal_is_refused_and_left_untouched(
    tmp_path: Path, spoil: Callable[[Path], None], said: str
) -> None:
    """A newer, foreign or damaged file is refused in words that say why, and not a byte of it is changed."""
    path = tmp_path / "run.db"
    await made(path)
    spoil(path)
    before = path.read_bytes()
    with pytest.raises(JournalError, match=f"{said}.*") as caught:
        await SqliteJournal(path).open()

    assert "left as it is" in str(caught.value)
    assert str(path) in str(caught.value)
    assert path.read_bytes() == before


async def test_a_file_whose_making_was_cut_off_is_made_anew(tmp_path: Path) -> None:
    """A kill in the middle of the making leaves SQLite's own notes on how to undo it, which is done."""
    path = tmp_path / "run.db"
    with closing(sqlite3.connect(tmp_path / "begun.db", isolation_level=None)) as connection:
        connection.execute("CREATE TABLE first (a)")
        connection.execute("PRAGMA cache_size = 1")
        connection.execute("BEGIN")
        connection.execute("INSERT INTO first SELECT randomblob(3000) FROM (WITH RECURSIVE n(i) AS "
                           "(SELECT 1 UNION ALL SELECT i + 1 FROM n LIMIT 50) SELECT i FROM n)")  # fmt: skip
        connection.execute("DROP TABLE first")
        for ending in ("", "-journal"):
            path.with_name(f"run.db{ending}").write_bytes((tmp_path / f"begun.db{ending}").read_bytes())
        connection.execute("ROLLBACK")
    with pytest.raises(JournalError, match="is a database, but not a journal"):
        await SqliteJournal(path).open()

    assert not path.with_name("run.db-journal").exists()


async def test_an_empty_file_becomes_a_journal(tmp_path: Path) -> None:
    """A file with nothing in it, as a crash right at the beginning leaves it, is as good as none."""
    path = tmp_path / "run.db"
    path.touch()
    await made(path, 1)

    assert [entry.key async for entry in SqliteJournal(path).entries()] == ["0"]


async def test_a_place_where_nothing_can_be_written_is_told_when_it_is_opened() -> None:
    """A folder that can't be written to is an error of ours, which names the file."""
    with pytest.raises(JournalError, match=r"/proc/run.db"):
        await SqliteJournal("/proc/run.db").open()
    with pytest.raises(JournalError, match=r"/dev/null/x/run.db"):
        await SqliteJournal("/dev/null/x/run.db").open()
    with pytest.raises(JournalError, match=r"can.t be used: .*null"):
        await SqliteJournal("a\0b").open()


async def test_what_is_not_there_cannot_be_listed(tmp_path: Path) -> None:
    """Listing makes no file where there is none."""
    with pytest.raises(JournalError, match="can't be opened"):
        _ = [entry async for entry in SqliteJournal(tmp_path / "run.db").entries()]

    assert list(tmp_path.iterdir()) == []


async def test_a_locked_file_is_waited_for_and_then_told(tmp_path: Path) -> None:
    """While another program has the file locked, we wait; when that takes too long, the error says so."""
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
    """A file that another program keeps to itself is told when it is opened, after a while."""
    path = tmp_path / "run.db"
    await made(path, 1)
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("PRAGMA journal_mode = DELETE")
        for lock in ("BEGIN IMMEDIATE", "BEGIN EXCLUSIVE"):
            other.execute(lock)
            with pytest.raises(JournalError, match="locked by another program"):
                await SqliteJournal(path, busy_timeout=0.2).open()
            other.execute("COMMIT")


async def test_several_make_the_file_at_once(tmp_path: Path) -> None:
    """Eight sessions that begin at the same moment make one journal."""
    journals = [SqliteJournal(tmp_path / "run.db") for _ in range(8)]
    await asyncio.gather(*(journal.open() for journal in journals))
    begun = await asyncio.gather(*(journal.begin(intent(f"{n}")) for n, journal in enumerate(journals)))
    await asyncio.gather(*(journal.close() for journal in journals))

    assert all(begun)
    assert len([entry async for entry in journals[0].entries()]) == 8


async def test_what_breaks_while_it_is_in_use_is_told(journal: SqliteJournal, caplog: pytest.LogCaptureFixture) -> None:
    """A file that somebody spoils under a running session is an error of each call, and of nothing else."""
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
    await asyncio.sleep(1.2)  # a sign of life is due
    await journal.close()

    assert "no such table" in caplog.text


async def test_whatever_is_in_the_file_the_thread_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A row that makes no sense is logged, and those who wait for other things are served."""
    async with SqliteJournal(tmp_path / "run.db", lease=0.4) as journal:
        with closing(sqlite3.connect(journal.path)) as connection:
            ((place,),) = connection.execute("SELECT place FROM owners").fetchall()
        rewrite(journal.path, "INSERT INTO owners VALUES ('them', 1, 60, ?, 'nonsense')", place)
        await asyncio.sleep(0.3)
        begun = await journal.begin(intent())

    assert begun
    assert "TypeError" in caplog.text


@pytest.fixture
def full_disk(journal: SqliteJournal) -> Iterator[Callable[[], None]]:
    """Give what makes the disk full: no file can grow beyond what the journal has now."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    log = journal.path.with_name("run.db-wal")
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (log.stat().st_size, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


async def test_a_full_disk_is_told(
    journal: SqliteJournal, full_disk: Callable[[], None], caplog: pytest.LogCaptureFixture
) -> None:
    """What can't be written is an error, all of it; what was written before is still there."""
    await journal.begin(intent())
    full_disk()
    failures = await asyncio.gather(
        *(journal.begin(intent(f"{number}")) for number in range(50)), return_exceptions=True
    )
    found = await SqliteJournal(journal.path).entries().__anext__()

    assert {type(failure) for failure in failures} == {JournalError}
    assert "run.db can't be" in str(failures[0])
    assert found.key == "k"
