"""Journals, whatever their database is: what they store, and how sessions share them."""

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import attrs
import pytest
from support.journals import AnyJournal, add_dead_owner, execute

from flux2max_async import BudgetExceededError, JournalEntry, JournalError
from flux2max_async.journal import EntryState, Holder, SavedFile

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


@pytest.fixture
def anyio_backend() -> str:
    """Use real time, in which a journal's thread runs."""
    return "asyncio"


@pytest.fixture
async def journal(tmp_path: Path) -> AsyncIterator[AnyJournal]:
    async with AnyJournal(tmp_path / "run.db", lease=4.0) as opened:
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
    async with AnyJournal(path) as journal:
        await asyncio.gather(*(journal.begin(intent(f"{number}")) for number in range(entries)))


async def test_another_session_reads_entries_as_they_were_recorded(tmp_path: Path) -> None:
    """The file stores every field of an entry, and another session reads an equal entry."""
    path = tmp_path / "new" / "run.db"
    async with AnyJournal(path) as journal:
        assert await journal.find("k") is None
        assert await journal.begin(intent())
        await journal.record(submitted())
        await journal.record(completed())
    async with AnyJournal(path) as journal:
        found = await journal.find("k")

    assert found == completed()
    assert found is not None
    assert (found.prompt, found.paths, found.error) == ("a k", (Path("/images/a.png"),), None)


async def test_entries_can_be_listed_while_a_session_runs(journal: AnyJournal) -> None:
    """Entries can be listed while a session uses the journal, in the order in which they were begun."""
    keys = [f"{number}" for number in range(1200)]
    await asyncio.gather(*(journal.begin(intent(key)) for key in keys))
    other = AnyJournal(journal.path)
    listed = [entry async for entry in other.entries()]

    assert [entry.key for entry in listed] == keys
    assert {entry.holder for entry in listed} == {Holder.OTHER}


async def test_an_export_has_a_line_of_json_for_each_entry(journal: AnyJournal, tmp_path: Path) -> None:
    """An export is a file of JSON Lines, which other programs can read."""
    await journal.begin(intent("größe"))
    await journal.record(completed("größe"))
    await journal.begin(intent("b"))
    target = await journal.export(tmp_path / "run.jsonl")
    first, second = [json.loads(line) for line in target.read_text(encoding="utf-8").splitlines()]

    assert target == tmp_path / "run.jsonl"
    assert (first["key"], first["state"], first["cost"]) == ("größe", "completed", "0.0725")
    assert (first["paths"], first["ended_at"]) == (["/images/a.png"], "2026-01-02T03:04:05+00:00")
    assert (second["key"], second["state"], second["task_id"]) == ("b", "intent", None)
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix == ".part") == []


async def test_concurrent_intents_share_an_fsync(journal: AnyJournal) -> None:
    """Two hundred concurrent intents need at most twenty fsyncs."""
    assert journal._worker is not None
    before = journal._worker.durable_transactions
    begun = await asyncio.gather(*(journal.begin(intent(f"{number}")) for number in range(200)))

    assert all(begun)
    assert 1 <= journal._worker.durable_transactions - before <= 20


async def test_an_attempt_is_begun_once(journal: AnyJournal) -> None:
    """Of two concurrent calls that begin the same attempt, one returns False; a refused attempt can be begun again."""
    first, second = await asyncio.gather(journal.begin(intent()), journal.begin(intent()))
    await journal.record(attrs.evolve(intent(), state=EntryState.REFUSED, holder=None, committed=Decimal(0)))
    again = await journal.begin(attrs.evolve(intent(), fingerprint="c2"))
    found = await journal.find("k")

    assert sorted([first, second]) == [False, True]
    assert again
    assert found is not None
    assert (found.state, found.fingerprint, found.attempt) == (EntryState.INTENT, "c2", 1)


async def test_an_end_is_never_undone(journal: AnyJournal) -> None:
    """Recording an earlier state after the end changes neither the entry nor the sum that was spent."""
    await journal.begin(intent())
    await journal.record(completed())
    await journal.record(submitted())
    await journal.record(intent("unknown"))
    found = await journal.find("k")

    assert found is not None
    assert found.state is EntryState.COMPLETED
    with pytest.raises(BudgetExceededError, match=r"\$0.0725 are spent"):
        await journal.begin(intent("b"), limit=Decimal("0.1"))


async def test_only_the_holder_can_take_back_what_is_recorded(tmp_path: Path) -> None:
    """Another session can add a task id or an end that isn't known yet, but removes nothing."""
    path = tmp_path / "run.db"
    await create_journal(path)
    async with AnyJournal(path) as first, AnyJournal(path) as second:
        await first.begin(intent())
        await first.record(submitted())
        await second.record(attrs.evolve(intent(), state=EntryState.REFUSED, holder=None, committed=Decimal(0)))
        await second.record(attrs.evolve(submitted(), holder=None))
        before = await first.find("k")
        await second.record(completed())
        await first.record(attrs.evolve(completed(), files=(), task_id=None))
        await first.record(submitted())
        after = await second.find("k")
        await first.begin(intent("b"))
        await second.record(attrs.evolve(intent("b"), state=EntryState.UNCERTAIN, holder=None))
        held = await first.find("b")

    assert before is not None
    assert (before.state, before.holder, before.committed) == (EntryState.SUBMITTED, Holder.US, Decimal("0.07"))
    assert after is not None
    assert (after.state, after.task_id, after.files) == (EntryState.COMPLETED, "t-k", completed().files)
    assert held is not None
    assert held.state is EntryState.INTENT


async def test_begin_checks_for_an_existing_attempt_before_the_limit(journal: AnyJournal) -> None:
    """If the same attempt has used up the limit, begin() returns False instead of raising an error."""
    await journal.begin(intent())

    assert not await journal.begin(intent(), limit=Decimal("0.07"))


async def test_a_limit_counts_all_entries_of_the_journal(journal: AnyJournal) -> None:
    """An intent that would pass the limit isn't written; refused entries don't count."""
    limit = Decimal("0.14")
    begun = [await journal.begin(intent(key), limit=limit) for key in ("a", "b")]
    with pytest.raises(BudgetExceededError, match=r"\$0.14 doesn't allow another image for about \$0.07"):
        await journal.begin(intent("c"), limit=limit)
    await journal.record(attrs.evolve(intent("a"), state=EntryState.REFUSED, holder=None, committed=Decimal(0)))

    assert begun == [True, True]
    assert await journal.begin(intent("c"), limit=limit)


async def test_an_entry_is_found_by_its_token(journal: AnyJournal, tmp_path: Path) -> None:
    """The token of an intent finds its entry, through all later states; it is neither exported nor in the repr."""
    await asyncio.gather(*(journal.begin(intent(key, webhook_token=f"token-{key}")) for key in ("a", "k", "z")))
    await journal.begin(intent("without"))
    begun = await journal.find_token("token-k")
    await journal.record(submitted())
    await journal.record(completed())
    ended = await journal.find_token("token-k")
    listed = [entry.webhook_token async for entry in AnyJournal(journal.path).entries()]
    exported = await journal.export(tmp_path / "run.jsonl")

    assert begun is not None
    assert attrs.evolve(begun, owner=None) == intent(webhook_token="token-k")
    assert ended == attrs.evolve(completed(), webhook_token="token-k")
    assert listed == ["token-a", "token-k", "token-z", None]
    assert await journal.find_token("unknown") is None
    assert "token-k" not in exported.read_text()
    assert "token-k" not in repr(ended)


async def test_an_attempt_that_is_begun_again_has_its_new_token(journal: AnyJournal) -> None:
    """When a refused attempt is begun again, its earlier token is forgotten."""
    await journal.begin(intent(webhook_token="first"))
    await journal.record(attrs.evolve(intent(), state=EntryState.REFUSED, holder=None))
    await journal.begin(intent(webhook_token="second"))
    found = [await journal.find_token(token) for token in ("first", "second")]

    assert [entry and entry.state for entry in found] == [None, EntryState.INTENT]


async def test_an_end_that_another_session_found_by_its_token_is_reported(tmp_path: Path) -> None:
    """The holder of an intent is told its end, with its token, when another session records it; it keeps the entry."""
    path = tmp_path / "run.db"
    await create_journal(path)
    reports: asyncio.Queue[list[JournalEntry]] = asyncio.Queue()
    holder = AnyJournal(path)
    await holder.open(reports.put_nowait, watch_changes=True)
    try:
        await holder.begin(intent(webhook_token="token"))
        async with AnyJournal(path) as other:
            found = await other.find_token("token")
            assert found is not None
            await other.record(attrs.evolve(completed(), holder=Holder.OTHER))
            async with asyncio.timeout(1):
                (entry,) = await reports.get()
        await holder.record(attrs.evolve(intent(), state=EntryState.UNCERTAIN, holder=None))
        released = await holder.find("k")
    finally:
        await holder.close()

    expected = attrs.evolve(completed(), webhook_token="token")
    assert (found.state, found.holder) == (EntryState.INTENT, Holder.OTHER)
    assert entry == attrs.evolve(expected, holder=Holder.US, owner=found.owner)
    assert released == expected


@pytest.mark.parametrize("state", [EntryState.UNCERTAIN, EntryState.REFUSED, EntryState.INTENT])
async def test_a_task_that_another_session_found_by_its_token_stays_one(tmp_path: Path, state: EntryState) -> None:
    """A holder that takes its submit for lost or refused doesn't undo the task id that a webhook has revealed."""
    path = tmp_path / "run.db"
    await create_journal(path)
    async with AnyJournal(path) as first, AnyJournal(path) as second:
        await first.begin(intent(webhook_token="token"))
        await second.record(attrs.evolve(submitted(), holder=Holder.OTHER))
        held = await first.find("k")
        await first.record(attrs.evolve(intent(), state=state, holder=None, committed=Decimal(0)))
        found = await first.find("k")
        begun = await first.begin(intent())

    assert held is not None
    assert held.holder is Holder.US
    assert found == attrs.evolve(submitted(), holder=None, webhook_token="token")
    assert not begun


async def test_an_uncertain_submit_becomes_a_task_or_an_end(tmp_path: Path) -> None:
    """An entry that nobody holds takes the id and the end that a webhook reveals, and stays free."""
    async with AnyJournal(tmp_path / "run.db") as journal:
        for key in ("k", "b"):
            await journal.begin(intent(key))
            await journal.record(attrs.evolve(intent(key), state=EntryState.UNCERTAIN, holder=None))
        await journal.record(attrs.evolve(submitted(), holder=Holder.OTHER))
        await journal.record(attrs.evolve(completed("b"), holder=Holder.OTHER))
        found = [await journal.find(key) for key in ("k", "b")]

    assert found == [attrs.evolve(submitted(), holder=None), completed("b")]


async def test_an_entry_that_cannot_be_stored_fails_alone(journal: AnyJournal) -> None:
    """A task id that can't be written as UTF-8 is a JournalError for its own caller only."""
    await journal.begin(intent())
    unencodable = attrs.evolve(submitted(), task_id="\ud800")
    failure, begun = await asyncio.gather(
        journal.record(unencodable), journal.begin(intent("b")), return_exceptions=True
    )

    assert isinstance(failure, JournalError)
    assert begun is True


async def test_only_a_free_entry_can_be_adopted_and_only_once(tmp_path: Path) -> None:
    """Journals on one file see which entries the others hold; one of two that adopt a free entry gets it."""
    path = tmp_path / "run.db"
    await create_journal(path)
    async with AnyJournal(path) as first, AnyJournal(path) as second, AnyJournal(path) as third:
        await first.begin(intent())
        await first.record(submitted())
        held = await second.find("k")
        assert held is not None
        await first.record(attrs.evolve(submitted(), holder=None))
        free = await second.find("k")
        assert free is not None
        adopted = [await second.adopt(free), await third.adopt(free)]
        adopted_entry = await second.find("k")

    assert held.holder is Holder.OTHER
    assert free.holder is None
    assert adopted == [True, False]
    assert adopted_entry is not None
    assert adopted_entry.holder is Holder.US


async def test_a_change_by_another_session_is_noticed_within_a_second(tmp_path: Path) -> None:
    """changed() returns when the holder records the entry's end, and not before."""
    path = tmp_path / "run.db"
    await create_journal(path)
    async with AnyJournal(path) as first, AnyJournal(path) as second:
        await first.begin(intent())
        await first.record(submitted())
        held = await second.find("k")
        assert held is not None
        waiting = asyncio.ensure_future(second.changed(held))
        await first.begin(intent("third"))
        done, _ = await asyncio.wait([waiting], timeout=0.4)
        await first.record(completed())
        async with asyncio.timeout(1):
            await waiting

    assert not done


async def test_an_end_recorded_by_another_session_is_reported(tmp_path: Path) -> None:
    """With watch_changes=True, the holder's callback gets an entry whose end another session records."""
    path = tmp_path / "run.db"
    await create_journal(path)
    reports: asyncio.Queue[list[JournalEntry]] = asyncio.Queue()
    holder = AnyJournal(path)
    await holder.open(reports.put_nowait, watch_changes=True)
    try:
        await holder.begin(intent())
        await holder.record(submitted())
        async with AnyJournal(path) as other:
            found = await other.find_task("t-k")
            assert found is not None
            await other.record(attrs.evolve(completed(), holder=found.holder))
            async with asyncio.timeout(1):
                (entry,) = await reports.get()
    finally:
        await holder.close()

    assert found.holder is Holder.OTHER
    assert entry == attrs.evolve(completed(), holder=Holder.US, owner=found.owner)


async def test_closing_ends_a_wait_for_a_change(tmp_path: Path) -> None:
    """changed() returns when the journal is closed."""
    path = tmp_path / "run.db"
    await create_journal(path)
    async with AnyJournal(path) as first:
        async with AnyJournal(path) as second:
            await first.begin(intent())
            held = await second.find("k")
            assert held is not None
            waiting = asyncio.ensure_future(second.changed(held))
            await asyncio.sleep(0.1)
        async with asyncio.timeout(1):
            await waiting

    assert held.holder is Holder.OTHER


async def test_a_dropped_owner_that_is_alive_returns(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A process that was suspended for longer than its lease adds its row again with its next heartbeat, and says so."""
    async with AnyJournal(tmp_path / "run.db", lease=0.2) as journal:
        execute(journal.path, "DELETE FROM owners")
        await asyncio.sleep(0.3)
        ((owners,),) = execute(journal.path, "SELECT count(*) FROM owners")

    assert owners == 1
    (warning,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert "held up for longer than its lease of 0.2 s" in warning.getMessage()


async def test_the_thread_ends_with_its_event_loop(tmp_path: Path) -> None:
    """If an event loop ends without closing its journal, the thread ends by itself and releases its entries."""
    path = tmp_path / "run.db"

    async def open_without_closing() -> None:
        journal = AnyJournal(path, lease=0.2)
        await journal.open()
        await journal.begin(intent())
        await journal.record(submitted())

    await asyncio.to_thread(asyncio.run, open_without_closing())
    async with asyncio.timeout(10):
        async with AnyJournal(path) as journal:
            while True:
                found = await journal.find("k")
                assert found is not None
                if found.holder is None:
                    break
                await asyncio.sleep(0.05)

    assert found.state is EntryState.SUBMITTED


async def test_a_journal_serves_one_session_at_a_time(journal: AnyJournal) -> None:
    """An open journal can't be opened, a closed one can't be used, but be opened again; closing it twice does no harm."""
    with pytest.raises(JournalError, match="open already: each session needs a AnyJournal of its own"):
        await journal.open()
    await journal.close()
    await journal.close()
    with pytest.raises(JournalError, match="is not open"):
        await journal.find("k")
    with pytest.raises(JournalError, match="is not open"):
        await journal.begin(intent())
    await journal.open()

    assert await journal.begin(intent())


async def test_several_sessions_create_the_file_at_once(tmp_path: Path) -> None:
    """Eight sessions that open a new journal at the same time share one file."""
    journals = [AnyJournal(tmp_path / "run.db") for _ in range(8)]
    await asyncio.gather(*(journal.open() for journal in journals))
    begun = await asyncio.gather(*(journal.begin(intent(f"{n}")) for n, journal in enumerate(journals)))
    await asyncio.gather(*(journal.close() for journal in journals))

    assert all(begun)
    assert len([entry async for entry in journals[0].entries()]) == 8


async def test_dead_processes_are_dropped_when_a_journal_is_opened(tmp_path: Path) -> None:
    """A program that is restarted after a crash can adopt its own tasks at once."""
    path = tmp_path / "run.db"
    async with AnyJournal(path) as journal:
        await journal.begin(intent())
        await journal.record(submitted())
    execute(path, "UPDATE entries SET owner = 'them'")
    add_dead_owner(path)
    async with AnyJournal(path) as journal:
        found = await journal.find("k")
        ((owners,),) = execute(path, "SELECT count(*) FROM owners")
        adopted = found is not None and await journal.adopt(found)

    assert found is not None
    assert (found.state, found.holder, adopted) == (EntryState.SUBMITTED, None, True)
    assert owners == 1


async def test_the_tasks_of_a_dead_process_are_adopted(tmp_path: Path) -> None:
    """Its tasks are reported, its intents are uncertain, and what has ended is free; nobody has to ask for them."""
    path = tmp_path / "run.db"
    reports: asyncio.Queue[list[JournalEntry]] = asyncio.Queue()
    journal = AnyJournal(path, lease=1.0)
    await journal.open(reports.put_nowait)
    try:
        for key in ("k", "begun", "done"):
            await journal.begin(intent(key))
        await journal.record(submitted())
        await journal.record(completed("done"))
        execute(path, "UPDATE entries SET owner = 'them'")
        add_dead_owner(path)
        async with asyncio.timeout(10):
            adopted = await reports.get()
        begun, done = await journal.find("begun"), await journal.find("done")
    finally:
        await journal.close()

    assert [(entry.key, entry.holder, entry.task_id) for entry in adopted] == [("k", Holder.US, "t-k")]
    assert begun is not None
    assert (begun.state, begun.holder) == (EntryState.UNCERTAIN, None)
    assert done is not None
    assert (done.state, done.holder) == (EntryState.COMPLETED, None)


async def test_the_tasks_of_a_session_that_has_closed_are_adopted(tmp_path: Path) -> None:
    """Tasks that a session leaves behind are followed by another one that was open at the same time."""
    path = tmp_path / "run.db"
    reports: asyncio.Queue[list[JournalEntry]] = asyncio.Queue()
    journal = AnyJournal(path, lease=1.0)
    await journal.open(reports.put_nowait)
    try:
        async with AnyJournal(path, lease=1.0) as leaving:
            await leaving.begin(intent())
            await leaving.record(submitted())
            await asyncio.sleep(1.2)  # until the other one has seen it
        async with asyncio.timeout(10):
            (adopted,) = await reports.get()
    finally:
        await journal.close()

    assert (adopted.key, adopted.holder) == ("k", Holder.US)


@pytest.mark.parametrize("text", ["a\0b", "größe"])
async def test_unusual_texts(journal: AnyJournal, text: str) -> None:
    """A text that a database can't store fails alone, and finds nothing; others don't notice."""
    found = (await journal.find(text), await journal.find_task(text), await journal.find_token(text))
    begun, other = await asyncio.gather(journal.begin(intent(text)), journal.begin(intent("b")), return_exceptions=True)

    assert found == (None, None, None)
    assert isinstance(begun, JournalError) or begun is True
    assert other is True
