"""Webhooks and journals: ends are recorded before deliveries are answered, and reach whoever follows the task."""

import asyncio
from collections import deque
from pathlib import Path
from typing import Any

import anyio
import attrs
import pytest
from support.scripted import ScriptedGateway, answer, completed, hang, running
from support.virtual_time import VirtualJournal
from support.webhooks import SECRET, SELDOM, InboxServer, deliver, session_on

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


@pytest.mark.parametrize("how", ["delivery", "poll"])
async def test_whatever_is_nested_deeply_does_no_harm(
    scripted: ScriptedGateway, at: InboxServer, tmp_path: Path, how: str
) -> None:
    """Metadata of hundreds of levels reach the caller, and the journal as far as it can hold them."""
    deep: Any = "the bottom"
    for _ in range(600):
        deep = {"more": deep}
    told = completed("t1", metadata={"deep": deep})
    scripted.polls = deque([answer(200, told)])
    journal = VirtualJournal(tmp_path / "run.db")
    schedule = SELDOM if how == "delivery" else FixedSchedule(0.5)
    async with session_on(scripted, at.inbox, journal=journal, schedule=schedule) as session:
        task = await session.submit("a cat")
        if how == "delivery":
            await deliver(at.inbox, told)
        done = await task
        entry = await entry_of(journal)

    assert done.journal_error is None
    assert entry.state is EntryState.COMPLETED
    assert "nested too deeply" in str(entry.result["metadata"])


async def entry_of(journal: SqliteJournal) -> JournalEntry:
    (entry,) = [entry async for entry in journal.entries()]
    return entry


@pytest.mark.parametrize("status", ["completed", "failed"])
async def test_the_end_is_recorded_before_the_answer(
    scripted: ScriptedGateway, at: InboxServer, tmp_path: Path, status: str
) -> None:
    """When a delivery is answered with 200, the journal knows the end."""
    told = completed("t1") if status == "completed" else {"id": "t1", "status": "Error", "error": "x", "message": "no"}
    journal = VirtualJournal(tmp_path / "run.db")
    async with session_on(scripted, at.inbox, journal=journal) as session:
        task = await session.submit("a cat")
        await deliver(at.inbox, told)
        entry = await entry_of(journal)
        outcome = await task.outcome()
        await deliver(at.inbox, told)  # comes twice

    assert entry.state == status
    assert entry.holder is None
    assert entry.outlay == entry.cost if status == "completed" else entry.outlay == 0
    assert outcome.ok is (status == "completed")


async def test_a_cost_that_a_delivery_doesnt_name_stays_set_aside(
    scripted: ScriptedGateway, at: InboxServer, tmp_path: Path
) -> None:
    """The maker's own payload names no cost: the budget goes on counting what the picture will probably cost."""
    journal = VirtualJournal(tmp_path / "run.db")
    async with session_on(scripted, at.inbox, journal=journal, price_guess="0.10") as session:
        task = await session.submit("a cat")
        await deliver(at.inbox, {"id": "t1", "status": "Ready", "result": {"sample": "https://p.example/1.jpeg"}})
        done = await task
        entry = await entry_of(journal)

    assert done.usage is None
    assert (entry.cost, str(entry.outlay)) == (None, "0.1")


class Failing(VirtualJournal):
    """A journal whose disk fails while it is told to."""

    fails = False

    async def record(self, entry: JournalEntry, /) -> None:
        if self.fails:
            raise JournalError("the disk is full")
        await super().record(entry)


async def test_an_end_that_isnt_recorded_is_asked_for_again(
    scripted: ScriptedGateway, at: InboxServer, tmp_path: Path
) -> None:
    """A delivery whose end can't be written down is put off, and what comes again later heals the journal."""
    journal = Failing(tmp_path / "run.db")
    async with session_on(scripted, at.inbox, journal=journal) as session:
        task = await session.submit("a cat")
        journal.fails = True
        with pytest.raises(JournalError, match="disk is full"):
            await deliver(at.inbox, completed("t1"))
        done = await task
        journal.fails = False
        await deliver(at.inbox, completed("t1"))
        entry = await entry_of(journal)

    assert isinstance(done.journal_error, JournalError)
    assert (entry.state, entry.holder) == (EntryState.COMPLETED, None)


async def test_a_delivery_that_nobody_waits_for_is_found_by_the_next_run(
    scripted: ScriptedGateway, at: InboxServer, tmp_path: Path
) -> None:
    """The process that submitted the task is gone: the end is recorded all the same, and replayed when asked for."""
    async with session_on(scripted, at.inbox, journal=VirtualJournal(tmp_path / "run.db")) as session:
        await session.submit("a cat")
    async with session_on(scripted, at.inbox, journal=VirtualJournal(tmp_path / "run.db")) as session:
        await deliver(at.inbox, completed("t1"))
        done = await session.generate("a cat")

    assert done.replayed
    assert done.images[0].url == "https://pictures.example/0.jpeg"
    assert scripted.of("GET") == []


async def test_a_delivery_in_the_middle_of_closing_is_put_off_or_recorded(
    scripted: ScriptedGateway, at: InboxServer, tmp_path: Path
) -> None:
    """Whatever moment closing comes in, a delivery that is answered with 200 is in the journal."""
    for turns in range(12):
        folder = tmp_path / str(turns)
        journal = VirtualJournal(folder / "run.db")
        async with session_on(scripted, at.inbox, journal=journal) as session:
            await session.submit("a cat")
            delivery = asyncio.ensure_future(deliver(at.inbox, completed("t1")))
            for _ in range(turns):
                await asyncio.sleep(0)
        await asyncio.wait([delivery])
        entry = await entry_of(journal)

        assert entry.state is EntryState.COMPLETED or isinstance(
            delivery.exception(), (SessionClosedError, JournalError)
        )


@in_real_time
@pytest.mark.parametrize("status", ["completed", "failed"])
async def test_a_delivery_to_another_process_reaches_the_owner(
    scripted: ScriptedGateway, tmp_path: Path, status: str
) -> None:
    """With a shared journal, whoever follows the task knows its end within a second, and hasn't polled."""
    told = completed("t1") if status == "completed" else {"id": "t1", "status": "failed", "error": "no"}
    url = "https://app.example/hooks"
    ours, theirs = (WebhookInbox(secret=SECRET, public_url=url) for _ in range(2))
    path = tmp_path / "run.db"
    async with (
        session_on(scripted, ours, journal=SqliteJournal(path)) as owner,
        session_on(scripted, theirs, journal=SqliteJournal(path)) as other,
    ):
        task = await owner.submit("a cat")
        waiting = asyncio.ensure_future(other.submit("a cat"))
        await asyncio.sleep(0.1)
        await deliver(theirs, told)
        started = anyio.current_time()
        outcome = await task.outcome()
        took = anyio.current_time() - started
        same = await (await waiting).outcome()
        stats = owner.stats

    assert took < 5.0  # a quarter of a second, on a machine that isn't too busy
    assert outcome.ok is same.ok is (status == "completed")
    assert (stats.webhooks, stats.polls) == (1, 0)
    assert len(scripted.of("POST")) == 1
    assert scripted.of("GET") == []


@in_real_time
async def test_an_end_told_to_another_process_is_not_given_up(scripted: ScriptedGateway, tmp_path: Path) -> None:
    """Where the deadline comes right after another process was told the end, the end counts, and all can save it."""
    ours, theirs = (WebhookInbox(secret=SECRET, public_url="https://app.example/hooks") for _ in range(2))
    path = tmp_path / "run.db"
    scripted.polls = deque([hang])
    async with (
        session_on(scripted, ours, journal=Blind(path), task_timeout=0.5) as owner,
        session_on(scripted, theirs, journal=SqliteJournal(path)),
    ):
        task = await owner.submit("a cat")
        await asyncio.sleep(0.1)
        await deliver(theirs, completed("t1"))
        outcome = await task.outcome()
        entry = await entry_of(SqliteJournal(path))

    assert isinstance(outcome, Completed)
    assert not outcome.replayed
    assert (entry.state, entry.owner) == (EntryState.COMPLETED, None)


class Blind(SqliteJournal):
    """A journal that tells no news."""

    async def open(self, news: Any = lambda _: None, /, *, listening: bool = False) -> None:
        await super().open(lambda _: None)


@in_real_time
async def test_a_journal_that_fails_in_the_end_changes_no_outcome(scripted: ScriptedGateway, tmp_path: Path) -> None:
    """Where nobody can say whether others know the end, the deadline stands; so it does where they know of none."""

    class Unreadable(Blind):
        fails = False

        async def find(self, key: str, /) -> JournalEntry | None:
            if self.fails:
                raise JournalError("the disk sleeps")
            return await super().find(key)

    scripted.polls = deque([hang])
    journal = Unreadable(tmp_path / "run.db")
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
async def test_what_is_paid_for_stays_completed(scripted: ScriptedGateway, tmp_path: Path) -> None:
    """Where another process was told of a failure, and the owner sees a picture, the journal knows the picture."""
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
        entry = await entry_of(SqliteJournal(path))

    assert (entry.state, str(entry.outlay)) == (EntryState.COMPLETED, "0.07")


@in_real_time
async def test_a_broken_journal_changes_no_refusal(scripted: ScriptedGateway, tmp_path: Path) -> None:
    """What the service has refused is recorded as such, without a question that could fail."""

    class Broken(VirtualJournal):
        asked = 0

        async def find(self, key: str, /) -> JournalEntry | None:
            self.asked += 1
            if self.asked > 1:
                raise OSError(5, "broken")
            return await super().find(key)

    scripted.submits = deque([answer(400, {"error": "no"})])
    journal = Broken(tmp_path / "run.db")
    async with FluxSession(scripted.api_key, base_url=scripted.url, journal=journal) as session:
        with pytest.raises(BadRequestError):
            await session.generate("a cat")
        entry = await entry_of(journal)

    assert entry.state is EntryState.REFUSED


@in_real_time
async def test_the_first_end_stands_in_the_journal(scripted: ScriptedGateway, tmp_path: Path) -> None:
    """What the owner of a task sees after another process has recorded its end replaces nothing, and holds nothing up."""
    ours, theirs = (WebhookInbox(secret=SECRET, public_url="https://app.example/hooks") for _ in range(2))
    path = tmp_path / "run.db"
    scripted.polls = deque([answer(200, {"id": "t1", "status": "failed", "error": "no"}, after=0.3)])
    async with (
        session_on(scripted, ours, journal=Blind(path), schedule=FixedSchedule(0.05)) as owner,
        session_on(scripted, theirs, journal=SqliteJournal(path)),
    ):
        task = await owner.submit("a cat")
        await asyncio.sleep(0.2)
        await deliver(theirs, completed("t1"))
        await task.outcome()
        entry = await entry_of(SqliteJournal(path))

    assert (entry.state, entry.owner, str(entry.outlay)) == (EntryState.COMPLETED, None, "0.07")


@in_real_time
async def test_a_delivery_to_another_process_may_come_before_the_id(scripted: ScriptedGateway, tmp_path: Path) -> None:
    """A delivery that overtakes the submit's answer, at another process, is recorded when the journal knows the task."""
    scripted.submits = deque([answer(200, running("t1"), after=0.6)])
    ours, theirs = (WebhookInbox(secret=SECRET, public_url="https://app.example/hooks") for _ in range(2))
    path = tmp_path / "run.db"
    async with (
        session_on(scripted, ours, journal=SqliteJournal(path)) as owner,
        session_on(scripted, theirs, journal=SqliteJournal(path)),
    ):
        wait = asyncio.ensure_future(owner.generate("a cat"))
        await asyncio.sleep(0.1)
        await deliver(theirs, completed("t1"))
        done = await wait

    assert done.elapsed < 3.0
    assert done.polls == 0


async def test_a_task_may_get_its_id_while_a_delivery_is_looked_up(
    scripted: ScriptedGateway, at: InboxServer, tmp_path: Path
) -> None:
    """A delivery for which the journal knows no task yet ends the one that has just become ours."""

    class Slow(VirtualJournal):
        async def find_task(self, task_id: str, /) -> JournalEntry | None:
            found = await super().find_task(task_id)
            await anyio.sleep(1.0)
            return found

    scripted.submits = deque([answer(200, running("t1"), after=0.5)])
    async with session_on(scripted, at.inbox, journal=Slow(tmp_path / "run.db")) as session:
        wait = asyncio.ensure_future(session.generate("a cat"))
        await anyio.sleep(0.1)
        await deliver(at.inbox, completed("t1"))
        done = await wait

    assert done.elapsed == pytest.approx(1.1, abs=0.2)
    assert done.polls == 0


async def test_an_early_delivery_is_looked_for_no_longer_than_it_is_kept(
    scripted: ScriptedGateway, at: InboxServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """An id that no journal ever knows is asked for a minute; an id that is claimed here, until then; errors are logged."""

    class Counting(VirtualJournal):
        asked = 0

        async def find_task(self, task_id: str, /) -> JournalEntry | None:
            self.asked += 1
            if self.asked == 3:
                raise JournalError("the disk sleeps")
            return await super().find_task(task_id)

    journal = Counting(tmp_path / "run.db")
    async with session_on(scripted, at.inbox, journal=journal) as session:
        await deliver(at.inbox, completed("nobody's"))
        await anyio.sleep(100.0)
        asked = journal.asked
        await deliver(at.inbox, completed("claimed"))
        await session.attach("claimed")
        await anyio.sleep(100.0)
        more = journal.asked - asked

    assert asked == 9
    assert more == 1
    assert "the disk sleeps" in caplog.text


async def test_what_the_journal_tells_is_heard_once(scripted: ScriptedGateway, at: InboxServer, tmp_path: Path) -> None:
    """An end that another process has recorded ends the task; what is told of it afterwards does no harm."""
    heard: list[Any] = []

    class Overheard(VirtualJournal):
        async def open(self, news: Any = lambda _: None, /, *, listening: bool = False) -> None:
            heard.append(news)
            await super().open(news, listening=listening)

    journal = Overheard(tmp_path / "run.db")
    async with session_on(scripted, at.inbox, journal=journal) as session:
        task = await session.submit("a cat")
        entry = attrs.evolve(await entry_of(journal), task_id="t1")
        told = {"error": {"kind": TaskFailedError.__name__, "message": "gone"}}
        heard[0]([attrs.evolve(entry, state=EntryState.FAILED, result=told)])
        outcome = await task.outcome()
        heard[0]([attrs.evolve(entry, state=EntryState.FAILED, result=told)])
    heard[0]([entry])

    assert isinstance(outcome, Failed)
    assert isinstance(outcome.error, TaskFailedError)
    assert outcome.error.message == "gone"


async def test_a_journal_that_cant_be_opened_leaves_the_inbox_free(
    scripted: ScriptedGateway, at: InboxServer, tmp_path: Path
) -> None:
    """A session that fails to open gives its inbox back."""
    (tmp_path / "run.db").write_text("not a journal, but a letter")
    with pytest.raises(JournalError):
        await session_on(scripted, at.inbox, journal=VirtualJournal(tmp_path / "run.db")).__aenter__()
    async with session_on(scripted, at.inbox) as session:
        assert session.stats.in_flight == 0
