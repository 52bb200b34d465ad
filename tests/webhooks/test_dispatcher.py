"""Webhooks with a journal: ends are recorded before deliveries are answered, and reach the task's own process."""

import asyncio
from collections import deque
from pathlib import Path
from typing import Any

import anyio
import attrs
import pytest
from support.scripted import ScriptedGateway, answer, completed, hang, running
from support.virtual_time import VirtualJournal
from support.webhooks import RARE_POLLS, SECRET, InboxServer, deliver, session_on

from flux2max_async import (
    BadRequestError,
    Completed,
    DeadlineExceededError,
    Failed,
    FixedSchedule,
    FluxSession,
    JournalError,
    SessionClosedError,
    SqliteJournal,
    TaskFailedError,
    WebhookInbox,
)
from flux2max_async.journal import EntryState, JournalEntry

in_real_time = pytest.mark.parametrize("anyio_backend", ["asyncio"])


@pytest.mark.parametrize("source", ["delivery", "poll"])
async def test_deeply_nested_metadata(
    scripted: ScriptedGateway, inbox_server: InboxServer, tmp_path: Path, source: str
) -> None:
    """Metadata of hundreds of levels reaches the caller, and the journal up to its maximum depth."""
    nested: Any = "leaf"
    for _ in range(600):
        nested = {"inner": nested}
    payload = completed("t1", metadata={"deep": nested})
    scripted.polls = deque([answer(200, payload)])
    journal = VirtualJournal(tmp_path / "run.db")
    schedule = RARE_POLLS if source == "delivery" else FixedSchedule(0.5)
    async with session_on(scripted, inbox_server.inbox, journal=journal, schedule=schedule) as session:
        task = await session.submit("a cat")
        if source == "delivery":
            await deliver(inbox_server.inbox, payload)
        done = await task
        entry = await only_entry(journal)

    assert done.journal_error is None
    assert entry.state is EntryState.COMPLETED
    assert "nested too deeply" in str(entry.result["metadata"])


async def only_entry(journal: SqliteJournal) -> JournalEntry:
    (entry,) = [entry async for entry in journal.entries()]
    return entry


@pytest.mark.parametrize("status", ["completed", "failed"])
async def test_end_is_recorded_before_the_response(
    scripted: ScriptedGateway, inbox_server: InboxServer, tmp_path: Path, status: str
) -> None:
    """When `deliver()` returns, the end is in the journal."""
    payload = (
        completed("t1") if status == "completed" else {"id": "t1", "status": "Error", "error": "x", "message": "no"}
    )
    journal = VirtualJournal(tmp_path / "run.db")
    async with session_on(scripted, inbox_server.inbox, journal=journal) as session:
        task = await session.submit("a cat")
        await deliver(inbox_server.inbox, payload)
        entry = await only_entry(journal)
        outcome = await task.outcome()
        await deliver(inbox_server.inbox, payload)  # a repeated delivery

    assert entry.state == status
    assert entry.holder is None
    assert entry.committed == entry.cost if status == "completed" else entry.committed == 0
    assert outcome.ok is (status == "completed")


async def test_delivery_without_cost(scripted: ScriptedGateway, inbox_server: InboxServer, tmp_path: Path) -> None:
    """BFL's format has no cost: the budget keeps the estimated cost committed."""
    journal = VirtualJournal(tmp_path / "run.db")
    async with session_on(scripted, inbox_server.inbox, journal=journal, price_guess="0.10") as session:
        task = await session.submit("a cat")
        await deliver(
            inbox_server.inbox, {"id": "t1", "status": "Ready", "result": {"sample": "https://p.example/1.jpeg"}}
        )
        done = await task
        entry = await only_entry(journal)

    assert done.usage is None
    assert (entry.cost, str(entry.committed)) == (None, "0.1")


class FailingJournal(VirtualJournal):
    """A journal whose writes fail while `fails` is set."""

    fails = False

    async def record(self, entry: JournalEntry, /) -> None:
        if self.fails:
            raise JournalError("the disk is full")
        await super().record(entry)


async def test_end_that_cannot_be_recorded(
    scripted: ScriptedGateway, inbox_server: InboxServer, tmp_path: Path
) -> None:
    """If an end can't be recorded, `deliver()` raises, and a repeated delivery records it."""
    journal = FailingJournal(tmp_path / "run.db")
    async with session_on(scripted, inbox_server.inbox, journal=journal) as session:
        task = await session.submit("a cat")
        journal.fails = True
        with pytest.raises(JournalError, match="disk is full"):
            await deliver(inbox_server.inbox, completed("t1"))
        done = await task
        journal.fails = False
        await deliver(inbox_server.inbox, completed("t1"))
        entry = await only_entry(journal)

    assert isinstance(done.journal_error, JournalError)
    assert (entry.state, entry.holder) == (EntryState.COMPLETED, None)


async def test_delivery_after_the_process_ended(
    scripted: ScriptedGateway, inbox_server: InboxServer, tmp_path: Path
) -> None:
    """An end that arrives after the submitting process has gone is recorded, and replayed on request."""
    async with session_on(scripted, inbox_server.inbox, journal=VirtualJournal(tmp_path / "run.db")) as session:
        await session.submit("a cat")
    async with session_on(scripted, inbox_server.inbox, journal=VirtualJournal(tmp_path / "run.db")) as session:
        await deliver(inbox_server.inbox, completed("t1"))
        done = await session.generate("a cat")

    assert done.replayed
    assert done.images[0].url == "https://pictures.example/0.jpeg"
    assert scripted.of("GET") == []


async def test_delivery_while_closing(scripted: ScriptedGateway, inbox_server: InboxServer, tmp_path: Path) -> None:
    """A delivery at any moment of closing is recorded in the journal or raises."""
    for steps in range(12):
        folder = tmp_path / str(steps)
        journal = VirtualJournal(folder / "run.db")
        async with session_on(scripted, inbox_server.inbox, journal=journal) as session:
            await session.submit("a cat")
            delivery = asyncio.ensure_future(deliver(inbox_server.inbox, completed("t1")))
            for _ in range(steps):
                await asyncio.sleep(0)
        await asyncio.wait([delivery])
        entry = await only_entry(journal)

        assert entry.state is EntryState.COMPLETED or isinstance(
            delivery.exception(), (SessionClosedError, JournalError)
        )


@in_real_time
@pytest.mark.parametrize("status", ["completed", "failed"])
async def test_delivery_to_another_process(scripted: ScriptedGateway, tmp_path: Path, status: str) -> None:
    """With a shared journal, the task's own process notices the end within a second, without a poll."""
    payload = completed("t1") if status == "completed" else {"id": "t1", "status": "failed", "error": "no"}
    url = "https://app.example/hooks"
    owner_inbox, other_inbox = (WebhookInbox(secret=SECRET, public_url=url) for _ in range(2))
    path = tmp_path / "run.db"
    async with (
        session_on(scripted, owner_inbox, journal=SqliteJournal(path)) as owner,
        session_on(scripted, other_inbox, journal=SqliteJournal(path)) as other,
    ):
        task = await owner.submit("a cat")
        waiting = asyncio.ensure_future(other.submit("a cat"))
        await asyncio.sleep(0.1)
        await deliver(other_inbox, payload)
        started = anyio.current_time()
        outcome = await task.outcome()
        elapsed = anyio.current_time() - started
        other_outcome = await (await waiting).outcome()
        stats = owner.stats

    assert elapsed < 5.0  # about 0.25 s, unless the machine is busy
    assert outcome.ok is other_outcome.ok is (status == "completed")
    assert (stats.webhooks, stats.polls) == (1, 0)
    assert len(scripted.of("POST")) == 1
    assert scripted.of("GET") == []


@in_real_time
async def test_end_recorded_by_another_process_just_before_the_deadline(
    scripted: ScriptedGateway, tmp_path: Path
) -> None:
    """If another process recorded the end just before the deadline, the task is completed."""
    owner_inbox, other_inbox = (WebhookInbox(secret=SECRET, public_url="https://app.example/hooks") for _ in range(2))
    path = tmp_path / "run.db"
    scripted.polls = deque([hang])
    async with (
        session_on(scripted, owner_inbox, journal=UnwatchedJournal(path), task_timeout=0.5) as owner,
        session_on(scripted, other_inbox, journal=SqliteJournal(path)),
    ):
        task = await owner.submit("a cat")
        await asyncio.sleep(0.1)
        await deliver(other_inbox, completed("t1"))
        outcome = await task.outcome()
        entry = await only_entry(SqliteJournal(path))

    assert isinstance(outcome, Completed)
    assert not outcome.replayed
    assert (entry.state, entry.owner) == (EntryState.COMPLETED, None)


class UnwatchedJournal(SqliteJournal):
    """A journal that doesn't report changes by other processes."""

    async def open(self, on_external_change: Any = lambda _: None, /, *, watch_changes: bool = False) -> None:
        await super().open(lambda _: None)


@in_real_time
async def test_journal_fails_at_the_deadline(scripted: ScriptedGateway, tmp_path: Path) -> None:
    """At the deadline, the task ends with DeadlineExceededError if the journal fails or has no end."""

    class UnreadableJournal(UnwatchedJournal):
        fails = False

        async def find(self, key: str, /) -> JournalEntry | None:
            if self.fails:
                raise JournalError("the disk does not respond")
            return await super().find(key)

    scripted.polls = deque([hang])
    journal = UnreadableJournal(tmp_path / "run.db")
    outcomes: list[Any] = []
    for fails in (False, True):
        inbox = WebhookInbox(secret=SECRET, public_url="https://app.example/hooks")
        async with session_on(scripted, inbox, journal=journal, task_timeout=0.2) as session:
            task = await session.submit("a cat")
            journal.fails = fails
            outcomes.append(await task.outcome())
            journal.fails = False

    assert all(isinstance(outcome.error, DeadlineExceededError) for outcome in outcomes)


@in_real_time
async def test_completed_replaces_failed(scripted: ScriptedGateway, tmp_path: Path) -> None:
    """If another process recorded a failure and the owner sees the image, the journal has the image."""
    inbox = WebhookInbox(secret=SECRET, public_url="https://app.example/hooks")
    path = tmp_path / "run.db"
    scripted.polls = deque([answer(200, completed("t1"), after=0.3)])
    async with (
        FluxSession(
            scripted.api_key, base_url=scripted.url, journal=SqliteJournal(path), schedule=FixedSchedule(0.05)
        ) as owner,
        session_on(scripted, inbox, journal=SqliteJournal(path)),
    ):
        task = await owner.submit("a cat")
        await asyncio.sleep(0.2)
        await deliver(inbox, {"id": "t1", "status": "Error", "error": "x", "message": "no"})
        await task
        entry = await only_entry(SqliteJournal(path))

    assert (entry.state, str(entry.committed)) == (EntryState.COMPLETED, "0.07")


@in_real_time
async def test_refusal_with_a_broken_journal(scripted: ScriptedGateway, tmp_path: Path) -> None:
    """A refusal is recorded without reading the journal again."""

    class BrokenJournal(VirtualJournal):
        lookups = 0

        async def find(self, key: str, /) -> JournalEntry | None:
            self.lookups += 1
            if self.lookups > 1:
                raise OSError(5, "broken")
            return await super().find(key)

    scripted.submits = deque([answer(400, {"error": "no"})])
    journal = BrokenJournal(tmp_path / "run.db")
    async with FluxSession(scripted.api_key, base_url=scripted.url, journal=journal) as session:
        with pytest.raises(BadRequestError):
            await session.generate("a cat")
        entry = await only_entry(journal)

    assert entry.state is EntryState.REFUSED


@in_real_time
async def test_first_end_stays_in_the_journal(scripted: ScriptedGateway, tmp_path: Path) -> None:
    """An end that the owner sees after another process recorded one doesn't replace it."""
    owner_inbox, other_inbox = (WebhookInbox(secret=SECRET, public_url="https://app.example/hooks") for _ in range(2))
    path = tmp_path / "run.db"
    scripted.polls = deque([answer(200, {"id": "t1", "status": "failed", "error": "no"}, after=0.3)])
    async with (
        session_on(scripted, owner_inbox, journal=UnwatchedJournal(path), schedule=FixedSchedule(0.05)) as owner,
        session_on(scripted, other_inbox, journal=SqliteJournal(path)),
    ):
        task = await owner.submit("a cat")
        await asyncio.sleep(0.2)
        await deliver(other_inbox, completed("t1"))
        await task.outcome()
        entry = await only_entry(SqliteJournal(path))

    assert (entry.state, entry.owner, str(entry.committed)) == (EntryState.COMPLETED, None, "0.07")


@in_real_time
async def test_early_delivery_to_another_process(scripted: ScriptedGateway, tmp_path: Path) -> None:
    """A delivery to another process before the submit response is recorded once the journal has the task."""
    scripted.submits = deque([answer(200, running("t1"), after=0.6)])
    owner_inbox, other_inbox = (WebhookInbox(secret=SECRET, public_url="https://app.example/hooks") for _ in range(2))
    path = tmp_path / "run.db"
    async with (
        session_on(scripted, owner_inbox, journal=SqliteJournal(path)) as owner,
        session_on(scripted, other_inbox, journal=SqliteJournal(path)),
    ):
        wait = asyncio.ensure_future(owner.generate("a cat"))
        await asyncio.sleep(0.1)
        await deliver(other_inbox, completed("t1"))
        assert other_inbox.dispatcher.registry.early("t1")
        done = await wait
        with anyio.fail_after(30):
            while other_inbox.dispatcher.registry.early("t1"):  # noqa: ASYNC110 - what is waited for has no event
                await anyio.sleep(0.01)

    assert done.elapsed < 3.0
    assert done.polls == 0


async def test_id_becomes_known_during_the_lookup(
    scripted: ScriptedGateway, inbox_server: InboxServer, tmp_path: Path
) -> None:
    """A delivery ends a task whose id became known while the journal was searched for it."""

    class SlowJournal(VirtualJournal):
        async def find_task(self, task_id: str, /) -> JournalEntry | None:
            found = await super().find_task(task_id)
            await anyio.sleep(1.0)
            return found

    scripted.submits = deque([answer(200, running("t1"), after=0.5)])
    async with session_on(scripted, inbox_server.inbox, journal=SlowJournal(tmp_path / "run.db")) as session:
        wait = asyncio.ensure_future(session.generate("a cat"))
        await anyio.sleep(0.1)
        await deliver(inbox_server.inbox, completed("t1"))
        done = await wait

    assert done.elapsed == pytest.approx(1.1, abs=0.2)
    assert done.polls == 0


async def test_early_delivery_lookups_end(
    scripted: ScriptedGateway, inbox_server: InboxServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """An unknown id is looked up for a minute, or until its task is attached; errors are logged."""

    class CountingJournal(VirtualJournal):
        lookups = 0

        async def find_task(self, task_id: str, /) -> JournalEntry | None:
            self.lookups += 1
            if self.lookups == 3:
                raise JournalError("the disk does not respond")
            return await super().find_task(task_id)

    journal = CountingJournal(tmp_path / "run.db")
    async with session_on(scripted, inbox_server.inbox, journal=journal) as session:
        await deliver(inbox_server.inbox, completed("unknown"))
        await anyio.sleep(100.0)
        lookups = journal.lookups
        await deliver(inbox_server.inbox, completed("attached"))
        await session.attach("attached")
        await anyio.sleep(100.0)
        later_lookups = journal.lookups - lookups

    assert lookups == 9
    assert later_lookups == 2  # one for the delivery, one for the entry of the attached task
    assert "the disk does not respond" in caplog.text


async def test_lookups_of_many_early_deliveries(
    scripted: ScriptedGateway, inbox_server: InboxServer, tmp_path: Path
) -> None:
    """However often the end of an unknown task is delivered, it is looked up as if it had been delivered once."""

    class CountingJournal(VirtualJournal):
        lookups = 0

        async def find_task(self, task_id: str, /) -> JournalEntry | None:
            self.lookups += 1
            return await super().find_task(task_id)

    journal = CountingJournal(tmp_path / "run.db")
    async with session_on(scripted, inbox_server.inbox, journal=journal):
        for number in range(20):
            await deliver(inbox_server.inbox, completed("unknown", metadata={"attempt": number}))
        at_once = journal.lookups
        await anyio.sleep(100.0)
        later = journal.lookups - at_once
        await deliver(inbox_server.inbox, completed("unknown"))
        await anyio.sleep(100.0)
        again = journal.lookups - at_once - later

    assert (at_once, later, again) == (20, 8, 9)


async def test_external_end_is_processed_once(
    scripted: ScriptedGateway, inbox_server: InboxServer, tmp_path: Path
) -> None:
    """An end recorded by another process ends the task; later notifications about it change nothing."""
    callbacks: list[Any] = []

    class CapturingJournal(VirtualJournal):
        async def open(self, on_external_change: Any = lambda _: None, /, *, watch_changes: bool = False) -> None:
            callbacks.append(on_external_change)
            await super().open(on_external_change, watch_changes=watch_changes)

    journal = CapturingJournal(tmp_path / "run.db")
    async with session_on(scripted, inbox_server.inbox, journal=journal) as session:
        task = await session.submit("a cat")
        entry = attrs.evolve(await only_entry(journal), task_id="t1")
        stored_result = {"error": {"kind": TaskFailedError.__name__, "message": "gone"}}
        callbacks[0]([attrs.evolve(entry, state=EntryState.FAILED, result=stored_result)])
        outcome = await task.outcome()
        callbacks[0]([attrs.evolve(entry, state=EntryState.FAILED, result=stored_result)])
    callbacks[0]([entry])

    assert isinstance(outcome, Failed)
    assert isinstance(outcome.error, TaskFailedError)
    assert outcome.error.message == "gone"


async def test_inbox_is_released_if_opening_fails(
    scripted: ScriptedGateway, inbox_server: InboxServer, tmp_path: Path
) -> None:
    """A session that fails to open releases its inbox."""
    (tmp_path / "run.db").write_text("this is not a journal")
    with pytest.raises(JournalError):
        await session_on(scripted, inbox_server.inbox, journal=VirtualJournal(tmp_path / "run.db")).__aenter__()
    async with session_on(scripted, inbox_server.inbox) as session:
        assert session.stats.in_flight == 0
