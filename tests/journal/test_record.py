"""Sessions with a journal: what was asked for before is not paid for again, whatever ended the first session."""

import asyncio
import base64
import sqlite3
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import closing
from decimal import Decimal
from pathlib import Path
from typing import Any

import anyio
import attrs
import pytest
from PIL import Image
from support.scripted import ScriptedGateway, answer, completed
from support.virtual_time import VirtualJournal

from flux2max_async import (
    AuthenticationError,
    BudgetExceededError,
    Completed,
    DeadlineExceededError,
    Failed,
    FixedSchedule,
    FluxSession,
    GenerationRequest,
    InvalidRequestError,
    JournalEntry,
    JournalError,
    Outcome,
    ResultExpiredError,
    SessionClosedError,
    SubmissionUncertainError,
    TaskFailedError,
    TaskNotFoundError,
)
from flux2max_async.emulator import Emulator, Fault
from flux2max_async.journal import EntryState, Holder, SqliteJournal

Open = Callable[..., FluxSession]


@pytest.fixture
def reopen(gateway: Emulator, tmp_path: Path) -> Open:
    """Give what makes a session on the same journal, as the next run of a program would."""

    def session(**settings: Any) -> FluxSession:
        settings = {"schedule": FixedSchedule(1.0), "journal": VirtualJournal(tmp_path / "run.db"), **settings}
        return FluxSession(gateway.api_key, base_url=gateway.url, **settings)

    return session


async def run(session: FluxSession, *prompts: str | GenerationRequest, **options: Any) -> list[Outcome]:
    async with session:
        return [outcome async for outcome in session.stream(prompts, **options)]


def ends(outcomes: list[Outcome]) -> Counter[str]:
    return Counter("completed" if outcome.ok else type(outcome.error).__name__ for outcome in outcomes)


async def entries(tmp_path: Path) -> list[JournalEntry]:
    return [entry async for entry in SqliteJournal(tmp_path / "run.db").entries()]


def rewrite(tmp_path: Path, statement: str, *arguments: object) -> None:
    """Change the journal from outside, as time and accidents do."""
    with closing(sqlite3.connect(tmp_path / "run.db")) as connection, connection:
        connection.execute(statement, arguments)


# ---------------------------------------------------------------------- run again


async def test_a_second_run_pays_nothing_and_polls_nothing(reopen: Open, gateway: Emulator) -> None:
    """What has ended is yielded again at once, as it was, and says that it is replayed."""
    prompts = [f"cat {number}" for number in range(30)] + ["dog [fail]", "eel [moderate]"]
    first = await run(reopen(), *prompts)
    calls = gateway.calls.copy()
    began = anyio.current_time()
    session = reopen()
    second = await run(session, *prompts)

    assert gateway.calls == calls
    assert anyio.current_time() == began
    assert all(outcome.replayed for outcome in second)
    assert not any(outcome.replayed for outcome in first)
    assert ends(second) == ends(first) == {"completed": 30, "TaskFailedError": 1, "ContentModeratedError": 1}
    told = {outcome.request: outcome for outcome in second}
    for outcome in first:
        again = told[outcome.request]
        if isinstance(outcome, Completed):
            assert again == attrs.evolve(outcome, replayed=True)
        else:
            assert again.task_id == outcome.task_id
    assert (session.stats.completed, session.stats.failed, session.stats.replayed) == (30, 2, 32)
    assert (session.stats.submitted, session.stats.spent) == (0, Decimal(0))


async def test_a_list_with_repeats_stays_one(reopen: Open, gateway: Emulator) -> None:
    """Three times the same prompt are three pictures, in each run the same three; a fourth is a new one."""
    first = await run(reopen(), "cat", "cat", "cat")
    second = await run(reopen(), "cat", "cat", "cat", "cat")

    assert len({outcome.task_id for outcome in first}) == 3
    assert {outcome.task_id for outcome in first} < {outcome.task_id for outcome in second}
    assert gateway.accepted["cat"] == 4


async def test_a_job_that_is_delivered_twice_is_paid_for_once(reopen: Open, gateway: Emulator) -> None:
    """The same call of generate() or submit(), at once, later or in the next run, gives the same task."""
    async with reopen() as session:
        pictures = await asyncio.gather(*(session.generate("cat") for _ in range(5)))
        task = await session.submit("cat")
        later = await session.submit("cat")
        same = await session.generate("cat", key="a name of its own")
    async with reopen() as session:
        again = await session.generate("cat")

    assert {picture.task_id for picture in pictures} == {task.id, later.id, again.task_id}
    assert [picture.replayed for picture in pictures] == [False] * 5
    assert again.replayed
    assert same.task_id != again.task_id
    assert gateway.accepted["cat"] == 2


async def test_followers_see_what_their_leader_sees(reopen: Open) -> None:
    """A second submit of what is running is a handle on the same task, snapshots included."""
    async with reopen() as session:
        first = await session.submit("cat", key="c")
        second = await session.submit("cat", key="c")
        seen = [snapshot.progress async for snapshot in second.updates()]
        done = await second

    assert first.id == second.id
    assert len(seen) > 3
    assert second.snapshot is first.snapshot
    assert done == await first


async def test_a_key_belongs_to_one_request(reopen: Open, gateway: Emulator) -> None:
    """The same key for something else is an error that says so, while the first runs, after it, and in the next run."""
    async with reopen() as session:
        task = await session.submit("a cat", key="c")
        with pytest.raises(
            InvalidRequestError, match=r"key 'c' belongs to another request in this journal, for 'a cat'"
        ):
            await session.generate("a dog", key="c")
        await task
        with pytest.raises(InvalidRequestError, match="belongs to another") as caught:
            await session.generate("a dog", key="c")
    second = await run(reopen(), GenerationRequest("a dog", key="c"), GenerationRequest("a cat", key="c", seed=1))

    assert caught.value.field == "key"
    assert ends(second) == {"InvalidRequestError": 2}
    assert gateway.accepted.total() == 1


async def test_a_key_has_to_be_text_that_can_be_written(reopen: Open, gateway: Emulator) -> None:
    """Half a character is no key."""
    async with reopen() as session:
        with pytest.raises(InvalidRequestError, match="key must be text that can be written as UTF-8"):
            await session.generate("a cat", key="\ud800")

    assert gateway.calls["submit"] == 0


async def test_failed_tasks_are_paid_for_again_only_when_told_to(reopen: Open, gateway: Emulator) -> None:
    """retry_failed submits what failed, and nothing else; the journal keeps both attempts."""
    prompts = ["cat", "dog [fail]"]
    await run(reopen(), *prompts)
    await run(reopen(), *prompts)
    before = gateway.accepted.copy()
    third = await run(reopen(), *prompts, retry_failed=True)
    async with reopen() as session:
        with pytest.raises(TaskFailedError):
            await session.generate("dog [fail]", retry_failed=True)
        with pytest.raises(TaskFailedError):
            await session.submit("dog [fail]")
            await session.generate("dog [fail]")

    assert before == {"cat": 1, "dog [fail]": 1}
    assert gateway.accepted == {"cat": 1, "dog [fail]": 3}
    assert {outcome.replayed for outcome in third if not outcome.ok} == {False}


async def test_what_was_refused_is_submitted_again(reopen: Open, gateway: Emulator, tmp_path: Path) -> None:
    """A refusal bought nothing: the next run submits again, even with a mended request of the same key."""
    bad = FluxSession("wrong", base_url=gateway.url, journal=VirtualJournal(tmp_path / "run.db"))
    async with bad:
        with pytest.raises(AuthenticationError):
            await bad.generate("a cat", key="c")
    refused = await entries(tmp_path)
    done = await run(reopen(), GenerationRequest("a better cat", key="c"))

    assert [(entry.state, entry.outlay) for entry in refused] == [(EntryState.REFUSED, Decimal(0))]
    assert "API key" in str(refused[0].error)
    assert ends(done) == {"completed": 1}
    assert len(await entries(tmp_path)) == 1


async def test_a_submit_that_is_refused_for_now_is_declared_anew(
    reopen: Open, gateway: Emulator, tmp_path: Path
) -> None:
    """Between two tries of a submit the journal knows that nothing was bought."""
    gateway.script("submit", Fault.UNAVAILABLE, Fault.RATE_LIMITED, Fault.RESET_BEFORE)
    states: list[EntryState] = []
    async with reopen() as session:
        work = asyncio.ensure_future(session.generate("cat"))
        while gateway.calls["submit"] < 3:
            await asyncio.sleep(0.1)
            states += [entry.state for entry in await entries(tmp_path)]
        outcome = await asyncio.gather(work, return_exceptions=True)

    assert EntryState.REFUSED in states
    assert gateway.calls["submit"] == 3
    assert isinstance(outcome[0], SubmissionUncertainError)


# ---------------------------------------------------------------------- uncertain


async def test_an_uncertain_submit_stays_uncertain(reopen: Open, gateway: Emulator) -> None:
    """A lost answer is told in each run and never submitted again, unless the caller says so."""
    gateway.script("submit", Fault.RESET_AFTER)
    first = await run(reopen(), "cat")
    second = await run(reopen(), "cat")
    async with reopen() as session:
        with pytest.raises(
            SubmissionUncertainError, match=r"about to be submitted at .* UTC, .*resubmit_uncertain=True"
        ):
            await session.generate("cat", key=None)
    accepted = gateway.accepted["cat"]
    third = await run(reopen(), "cat", resubmit_uncertain=True)
    fourth = await run(reopen(), "cat")

    assert ends(first) == ends(second) == {"SubmissionUncertainError": 1}
    assert accepted == 1
    assert ends(third) == ends(fourth) == {"completed": 1}
    assert gateway.accepted["cat"] == 2


async def test_an_intent_without_an_id_is_uncertain(reopen: Open, gateway: Emulator, tmp_path: Path) -> None:
    """A power cut that left the intent and took the id: the request is not submitted again by itself."""
    await run(reopen(), "cat")
    rewrite(tmp_path, "UPDATE entries SET state = 'intent', task_id = NULL, created = NULL")
    second = await run(reopen(), "cat")
    found = await entries(tmp_path)
    third = await run(reopen(), "cat", resubmit_uncertain=True)

    assert ends(second) == {"SubmissionUncertainError": 1}
    assert [entry.state for entry in found] == [EntryState.UNCERTAIN]
    assert ends(third) == {"completed": 1}
    assert gateway.accepted["cat"] == 2


# ---------------------------------------------------------------------- tasks without an end


async def test_a_task_that_was_left_running_is_polled_on(reopen: Open, gateway: Emulator, tmp_path: Path) -> None:
    """A session that was closed in the middle leaves ids, and the next one follows them without a submit."""
    async with reopen() as session:
        tasks = [await session.submit(f"cat {number}") for number in range(3)]
    left = await entries(tmp_path)
    second = await run(reopen(), *(f"cat {number}" for number in range(3)))

    assert {entry.state for entry in left} == {EntryState.SUBMITTED}
    assert {entry.task_id for entry in left} == {task.id for task in tasks} == {out.task_id for out in second}
    assert ends(second) == {"completed": 3}
    assert not any(outcome.replayed for outcome in second)
    assert gateway.calls["submit"] == 3


async def test_a_deadline_is_no_end(reopen: Open, gateway: Emulator) -> None:
    """A task that took too long is followed again, in the same session and in the next run."""
    async with reopen(task_timeout=5.0) as session:
        with pytest.raises(DeadlineExceededError):
            await session.generate("cat")
        done = await session.generate("cat")
    again = await run(reopen(), "cat")

    assert (done.replayed, again[0].replayed) == (False, True)
    assert gateway.calls["submit"] == 1


async def test_a_task_that_the_service_has_forgotten_has_failed(
    reopen: Open, gateway: Emulator, tmp_path: Path
) -> None:
    """An old id that the service doesn't know any more is a TaskNotFoundError, once and for all; retry_failed applies."""
    async with reopen() as session:
        await session.submit("cat")
    gateway.tasks.clear()
    rewrite(tmp_path, "UPDATE entries SET submitted = submitted - 3600")
    second = await run(reopen(), "cat")
    third = await run(reopen(), "cat")
    fourth = await run(reopen(), "cat", retry_failed=True)

    assert ends(second) == ends(third) == {"TaskNotFoundError": 1}
    assert [outcome.replayed for outcome in (*second, *third)] == [False, True]
    assert isinstance(third[0], Failed)
    assert isinstance(third[0].error, TaskNotFoundError)
    assert (third[0].error.status, third[0].error.task_id) == (404, third[0].task_id)
    assert ends(fourth) == {"completed": 1}


@pytest.mark.parametrize("set_back", [0.0, 86_400.0], ids=["just now", "the clock was set back"])
async def test_a_task_that_cannot_be_seen_yet_is_waited_for(
    reopen: Open, gateway: Emulator, tmp_path: Path, set_back: float
) -> None:
    """A crash right after the submit, and a rerun before the service shows the task: it is not given up as unknown."""
    async with reopen() as session:
        await session.submit("cat")
    rewrite(tmp_path, "UPDATE entries SET submitted = submitted + ?, created = created + ?", set_back, set_back)
    gateway.script("poll", Fault.NOT_FOUND, Fault.NOT_FOUND)
    second = await run(reopen(), "cat")

    assert ends(second) == {"completed": 1}
    assert gateway.calls["submit"] == 1


async def test_a_wait_that_is_withdrawn_ends_nobody_elses(reopen: Open, gateway: Emulator) -> None:
    """Who shares a request that isn't submitted yet submits it himself when the first one leaves."""
    async with reopen(max_in_flight=1) as session:
        busy = await session.submit("busy")
        first = asyncio.ensure_future(session.generate("cat"))
        await asyncio.sleep(1)
        second = asyncio.ensure_future(session.generate("cat"))
        await asyncio.sleep(1)
        first.cancel()
        done = await second
        await busy

    assert first.cancelled()
    assert not done.replayed
    assert gateway.accepted["cat"] == 1


async def test_a_session_that_closes_ends_all_who_share(reopen: Open) -> None:
    """Leader and followers are told that the session is closed."""
    async with reopen() as session:
        waits = [asyncio.ensure_future(session.generate("cat")) for _ in range(3)]
        await asyncio.sleep(2)
    results = await asyncio.gather(*waits, return_exceptions=True)

    assert {type(result) for result in results} == {SessionClosedError}


async def test_what_a_follower_saves_is_remembered(reopen: Open, gateway: Emulator, tmp_path: Path) -> None:
    """A stream that shares its request with somebody else saves the picture once, and the next run knows of it."""
    async with reopen() as session:
        leader = asyncio.ensure_future(session.generate("cat"))
        await asyncio.sleep(1)
        (saved,) = [
            outcome.unwrap().saved
            async for outcome in session.stream([GenerationRequest("cat")], save_to=tmp_path / "pictures")
        ]
        await leader
    (again,) = await run(reopen(), "cat", save_to=tmp_path / "pictures")

    assert again.unwrap().saved == saved != ()
    assert gateway.calls["download"] == gateway.calls["submit"] == 1


async def test_half_a_character_in_a_prompt_is_no_matter(reopen: Open, gateway: Emulator) -> None:
    """A prompt that can be sent can be written down."""
    first = await run(reopen(), "a \ud800 cat")
    second = await run(reopen(), "a \ud800 cat")

    assert ends(first) == ends(second) == {"completed": 1}
    assert gateway.calls["submit"] == 1


# ---------------------------------------------------------------------- a journal that fails


async def test_nothing_is_sent_that_cannot_be_written_down(
    gateway: Emulator, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """An intent that can't be written is a JournalError, stops the stream, and no byte goes to the service."""

    class Failing(VirtualJournal):
        async def begin(self, entry: JournalEntry, /, **limits: Any) -> bool:
            raise JournalError(f"the disk is full, {entry.key}")

    session = FluxSession(gateway.api_key, base_url=gateway.url, journal=Failing(tmp_path / "run.db"), max_in_flight=2)
    outcomes: list[Outcome] = []
    async with session:
        with pytest.raises(JournalError, match="the disk is full"):
            async for outcome in session.stream(f"cat {number}" for number in range(100)):
                outcomes.append(outcome)

    assert ends(outcomes) == {"JournalError": len(outcomes)}
    assert 1 <= len(outcomes) <= 4
    assert gateway.calls["submit"] == 0
    assert not caplog.records or "Traceback" not in caplog.text


async def test_a_task_goes_on_when_its_end_cannot_be_written(
    gateway: Emulator, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """After the submit a failing journal costs nothing that is paid for: it is logged, and the outcome tells."""

    class Failing(VirtualJournal):
        broken = True

        async def record(self, entry: JournalEntry, /) -> None:
            if self.broken:
                raise JournalError("the disk is full")
            await super().record(entry)

    journal = Failing(tmp_path / "run.db")
    async with FluxSession(gateway.api_key, base_url=gateway.url, journal=journal) as session:
        done = await session.generate("cat")
        with pytest.raises(TaskFailedError):
            await session.generate("dog [fail]")
        task = await session.submit("elk")
        journal.broken = False
        healed = await task

    assert isinstance(done.journal_error, JournalError)
    assert f"task {done.task_id} goes on, but isn't in the journal as it is: the disk is full" in caplog.text
    assert healed.journal_error is None
    assert [(entry.state, entry.prompt) for entry in await entries(tmp_path) if entry.prompt == "elk"] == [
        (EntryState.COMPLETED, "elk")
    ]


async def test_a_journal_that_cannot_be_opened_opens_no_session(gateway: Emulator, tmp_path: Path) -> None:
    """Entering says why, before anything else happens; and what can't be opened beside it leaves the journal closed."""
    (tmp_path / "run.db").write_text("my diary")
    session = FluxSession(gateway.api_key, base_url=gateway.url, journal=VirtualJournal(tmp_path / "run.db"))
    with pytest.raises(JournalError, match="is not a journal"):
        async with session:
            pass

    assert (tmp_path / "run.db").read_text() == "my diary"
    with pytest.raises(SessionClosedError):
        await session.generate("cat")


async def test_cancelled_before_it_is_sent(gateway: Emulator, tmp_path: Path) -> None:
    """A poller that is cut off while its intent is being written takes it back, for nothing was sent."""
    begun, go_on = asyncio.Event(), asyncio.Event()

    class Slow(VirtualJournal):
        async def begin(self, entry: JournalEntry, /, **limits: Any) -> bool:
            written = await super().begin(entry, **limits)
            begun.set()
            await go_on.wait()
            return written

    async with FluxSession(gateway.api_key, base_url=gateway.url, journal=Slow(tmp_path / "run.db")) as session:
        work = asyncio.ensure_future(session.generate("cat"))
        await begun.wait()
    await asyncio.gather(work, return_exceptions=True)

    assert [entry.state for entry in await entries(tmp_path)] == [EntryState.REFUSED]
    assert gateway.calls["submit"] == 0


async def test_an_end_is_delivered_even_when_the_session_closes_while_it_is_written(
    gateway: Emulator, tmp_path: Path
) -> None:
    """An end that is known is not replaced by the news that the session was closed."""
    ending = asyncio.Event()

    class Slow(VirtualJournal):
        async def record(self, entry: JournalEntry, /) -> None:
            await super().record(entry)
            if entry.state is EntryState.COMPLETED:
                ending.set()
                await asyncio.sleep(1000)

    async with FluxSession(gateway.api_key, base_url=gateway.url, journal=Slow(tmp_path / "run.db")) as session:
        work = asyncio.ensure_future(session.generate("cat"))
        await ending.wait()
    done = await work

    assert done.ok


async def test_a_picture_that_ends_while_the_session_closes_is_delivered_unsaved(
    gateway: Emulator, tmp_path: Path
) -> None:
    """A stream that saves doesn't lose an outcome for which there is no time left."""
    ending = asyncio.Event()

    class Slow(VirtualJournal):
        async def record(self, entry: JournalEntry, /) -> None:
            await super().record(entry)
            if entry.state is EntryState.COMPLETED:
                ending.set()
                await asyncio.sleep(1000)

    async with FluxSession(gateway.api_key, base_url=gateway.url, journal=Slow(tmp_path / "run.db")) as session:
        stream = session.stream(["cat"], save_to=tmp_path / "pictures")
        waiting = asyncio.ensure_future(anext(stream))
        await ending.wait()
    done = await waiting

    assert isinstance(done, Completed)
    assert isinstance(done.save_error, SessionClosedError)
    assert done.saved == ()


async def test_who_is_overtaken_while_adopting_looks_again(gateway: Emulator, tmp_path: Path) -> None:
    """A task that somebody else takes over in the same moment is not followed twice, and nothing that comes late is."""
    told: list[Callable[[list[JournalEntry]], None]] = []

    class Raced(VirtualJournal):
        lost = 0

        async def open(
            self, news: Callable[[list[JournalEntry]], None] = lambda _: None, /, *, listening: bool = False
        ) -> None:
            told.append(news)
            await super().open(news, listening=listening)

        async def adopt(self, entry: JournalEntry, /) -> bool:
            self.lost += 1
            return self.lost > 2 and await super().adopt(entry)

    journal = Raced(tmp_path / "run.db")
    async with FluxSession(gateway.api_key, base_url=gateway.url, journal=journal) as session:
        task = await session.submit("cat")
    async with session:
        done = await session.generate("cat")
    told[-1](await entries(tmp_path))

    assert (done.task_id, journal.lost) == (task.id, 3)
    assert session.stats.in_flight == 0


async def test_a_journal_that_breaks_in_its_own_way_costs_no_task(gateway: Emulator, tmp_path: Path) -> None:
    """Whatever a journal raises, what is paid for is followed; and a journal that fails to close leaves nothing open."""

    class Broken(VirtualJournal):
        async def record(self, entry: JournalEntry, /) -> None:
            raise KeyError(entry.key)

        async def close(self) -> None:
            await super().close()
            raise JournalError("can't be closed")

    session = FluxSession(gateway.api_key, base_url=gateway.url, journal=Broken(tmp_path / "run.db"))
    await session.__aenter__()
    done = await session.generate("cat")
    for _ in range(2):
        with pytest.raises(JournalError, match="can't be closed"):
            await session.aclose()
        await session.__aenter__()
    with pytest.raises(JournalError):
        await session.aclose()

    assert "the journal broke: KeyError" in str(done.journal_error)


async def test_a_journal_that_contradicts_itself_is_told(gateway: Emulator, tmp_path: Path) -> None:
    """One that knows nothing of a request and won't have it begun is an error, not an endless loop."""

    class Contrary(VirtualJournal):
        async def begin(self, entry: JournalEntry, /, **limits: Any) -> bool:
            return False

    journal = Contrary(tmp_path / "run.db")
    async with FluxSession(gateway.api_key, base_url=gateway.url, journal=journal) as session:
        with pytest.raises(JournalError, match="the journal says neither that 'c' can be begun"):
            await session.generate("cat", key="c")

    assert gateway.calls["submit"] == 0


async def test_who_leaves_while_adopting_leaves_the_task_to_others(
    reopen: Open, gateway: Emulator, tmp_path: Path
) -> None:
    """A web client that goes away in that moment doesn't make its task nobody's."""
    adopted = asyncio.Event()

    class Slow(VirtualJournal):
        async def adopt(self, entry: JournalEntry, /) -> bool:
            taken = await super().adopt(entry)
            adopted.set()
            await asyncio.sleep(1000)
            return taken

    async with reopen() as session:
        task = await session.submit("cat")
    async with reopen(journal=Slow(tmp_path / "run.db")) as session:
        leaving = asyncio.ensure_future(session.generate("cat"))
        await adopted.wait()
        leaving.cancel()
        async with reopen() as other:
            done = await other.generate("cat")

    assert done.task_id == task.id


async def test_pictures_whose_saving_cannot_be_written_down_are_told(gateway: Emulator, tmp_path: Path) -> None:
    """A saved picture of which the journal doesn't know is in its folder, and the outcome says so."""

    class Failing(VirtualJournal):
        async def record(self, entry: JournalEntry, /) -> None:
            if entry.files:
                raise JournalError("the disk is full")
            await super().record(entry)

    session = FluxSession(gateway.api_key, base_url=gateway.url, journal=Failing(tmp_path / "run.db"))
    (done,) = await run(session, "cat", save_to=tmp_path / "pictures")

    assert len(done.unwrap().saved) == 1
    assert isinstance(done.journal_error, JournalError)


# ---------------------------------------------------------------------- sharing


async def test_a_follower_has_its_own_terms(reopen: Open, gateway: Emulator) -> None:
    """What ends a request for one who asks isn't always the end for another who asks for the same at the same time."""
    gateway.script("submit", None, Fault.RESET_AFTER)
    await run(reopen(), "dog [fail]", "cat")
    async with reopen() as session:
        results = await asyncio.gather(
            session.generate("dog [fail]"),
            session.generate("dog [fail]", retry_failed=True),
            session.generate("cat"),
            session.generate("cat", resubmit_uncertain=True),
            return_exceptions=True,
        )

    assert [type(result) for result in results] == [
        TaskFailedError, TaskFailedError, SubmissionUncertainError, Completed,
    ]  # fmt: skip
    assert gateway.accepted == {"dog [fail]": 2, "cat": 2}


async def test_a_paid_task_that_is_forgotten_still_counts(reopen: Open, gateway: Emulator, tmp_path: Path) -> None:
    """A task that the service doesn't know any more was paid for all the same, as far as anybody knows."""
    async with reopen(budget="0.10") as session:
        await session.submit("cat")
    gateway.tasks.clear()
    rewrite(tmp_path, "UPDATE entries SET submitted = submitted - 3600")
    await run(reopen(budget="0.10"), "cat")
    async with reopen(budget="0.10") as session:
        with pytest.raises(BudgetExceededError):
            await session.generate("dog")

    assert [entry.outlay for entry in await entries(tmp_path)] == [Decimal("0.07")]


# ---------------------------------------------------------------------- what is never written


async def test_a_very_long_url_is_asked_for_anew(scripted: ScriptedGateway, tmp_path: Path) -> None:
    """A url that is too long to be kept is got by one poll when its picture is to be saved."""
    long = f"{scripted.url}/0.jpeg?{'x' * 5000}"
    scripted.polls.clear()
    scripted.polls.append(answer(200, completed(url=long)))
    scripted.downloads.clear()
    scripted.downloads.append(answer(200, b"\xff\xd8\xff"))

    def session() -> FluxSession:
        return FluxSession(scripted.api_key, base_url=scripted.url, journal=VirtualJournal(tmp_path / "run.db"))

    await run(session(), "cat")
    (again,) = await run(session(), "cat", save_to=tmp_path / "pictures")

    assert again.unwrap().save_error is None
    assert len(again.unwrap().saved) == 1


async def test_long_texts_among_the_parameters_are_known_by_their_fingerprint(
    reopen: Open, gateway: Emulator, tmp_path: Path
) -> None:
    """A picture that is passed through as a parameter of the service's own isn't in the file, but tells requests apart."""
    masks = [base64.b64encode(bytes([number]) * 6000).decode() for number in range(2)]
    await run(reopen(), *(GenerationRequest("cat", extra={"mask": mask}) for mask in masks))
    data = (tmp_path / "run.db").read_bytes()

    assert gateway.accepted["cat"] == 2
    assert not any(mask[:64].encode() in data for mask in masks)
    assert b"(8000 characters)" in data


async def test_neither_key_nor_secret_nor_picture_is_in_the_file(scripted: ScriptedGateway, tmp_path: Path) -> None:
    """Whatever the service echoes, the file holds no API key, no webhook secret, and no bytes of a picture."""
    path = tmp_path / "in.png"
    Image.effect_noise((64, 64), 50).save(path)
    picture = path.read_bytes()
    scripted.polls.clear()
    scripted.polls.append(
        answer(
            200, completed(metadata={"echo": [scripted.api_key, "my-secret"]}, usage={"cost": "0.07", "k": "my-secret"})
        )
    )
    session = FluxSession(scripted.api_key, base_url=scripted.url, journal=VirtualJournal(tmp_path / "run.db"))
    async with session:
        await session.generate("cat", input_images=[picture, path], webhook_secret="my-secret")
    data = b"".join(file.read_bytes() for file in tmp_path.iterdir() if file != path)

    assert b"in.png" in data
    for secret in (scripted.api_key.encode(), b"my-secret", picture[:64], picture[-64:]):
        assert secret not in data


# ---------------------------------------------------------------------- several sessions


@pytest.fixture
async def quick() -> AsyncIterator[Emulator]:
    """A gateway whose tasks take a third of a real second."""
    async with Emulator(seconds=0.3, spread=0.0, seed=1, pictures=False) as emulator:
        yield emulator


def on(gateway: Emulator, tmp_path: Path, **settings: Any) -> FluxSession:
    journal = SqliteJournal(tmp_path / "run.db", lease=0.4)
    return FluxSession(gateway.api_key, base_url=gateway.url, journal=journal, schedule=FixedSchedule(0.05), **settings)


in_real_time = pytest.mark.parametrize("anyio_backend", ["asyncio"])


@in_real_time
async def test_two_sessions_share_what_both_ask_for(quick: Emulator, tmp_path: Path) -> None:
    """Two sessions on one journal pay once, follow once, and both get the outcome; submit() gives the task's id at once."""
    prompts = [f"cat {number}" for number in range(40)]

    async def one(session: FluxSession) -> list[Outcome]:
        return [outcome async for outcome in session.stream(prompts, save_to=tmp_path / "pictures")]

    async with on(quick, tmp_path, max_in_flight=8) as first, on(quick, tmp_path, max_in_flight=8) as second:
        both = await asyncio.gather(one(first), one(second))
        task = await first.submit("dog", key="d")
        other = await second.submit("dog", key="d")
        waited = not other._poller.ended.done()
        done, same = await asyncio.gather(task, other)

    assert [ends(outcomes) for outcomes in both] == [{"completed": 40}] * 2
    assert quick.accepted.total() == quick.calls["submit"] == 41
    assert quick.calls["download"] == 40
    assert first.stats.submitted + second.stats.submitted == 41
    assert (done.task_id, waited, same.replayed) == (same.task_id, True, True)


@in_real_time
async def test_what_a_dying_process_leaves_is_followed_to_its_end(quick: Emulator, tmp_path: Path) -> None:
    """A session takes over the tasks of one that dies beside it, without a submit, whoever asks for them or not."""
    async with on(quick, tmp_path) as dying:
        task = await dying.submit("cat")
    async with on(quick, tmp_path) as session:
        rewrite(tmp_path, "INSERT INTO owners VALUES ('them', 1, 0.4, 'elsewhere', 1)")
        rewrite(tmp_path, "UPDATE entries SET owner = 'them'")
        asked = asyncio.ensure_future(session.generate("cat"))
        async with asyncio.timeout(10):
            done = await asked

    assert done.task_id == task.id
    assert quick.calls["submit"] == 1
    assert [entry.state for entry in await entries(tmp_path)] == [EntryState.COMPLETED]


@in_real_time
async def test_what_nobody_asks_for_is_followed_too(quick: Emulator, tmp_path: Path) -> None:
    """The end of what a dead process has left is in the journal before anybody asks; and who asks meanwhile shares it."""
    async with on(quick, tmp_path) as dying:
        tasks = [await dying.submit("cat"), await dying.submit("dog")]
    quick.script("poll", *[Fault.SERVER_ERROR] * 2)  # so that it takes a little longer
    async with on(quick, tmp_path) as session:
        rewrite(tmp_path, "INSERT INTO owners VALUES ('them', 1, 0.4, 'elsewhere', 1)")
        rewrite(tmp_path, "UPDATE entries SET owner = 'them'")
        asked = asyncio.ensure_future(session.generate("dog"))
        async with asyncio.timeout(10):
            while session.stats.polls < 2:  # noqa: ASYNC110 - nothing tells
                await asyncio.sleep(0.01)
            done = await session.generate("cat")
            await asked

    assert done.task_id == tasks[0].id
    assert not done.replayed
    assert done.request is not None
    assert quick.calls["submit"] == 2
    assert {entry.state for entry in await entries(tmp_path)} == {EntryState.COMPLETED}


@in_real_time
async def test_a_wait_for_another_process_can_be_cancelled(quick: Emulator, tmp_path: Path) -> None:
    """Who waits for what somebody else follows can leave, and so can a stream and a session."""
    async with on(quick, tmp_path) as session:
        await session.generate("before")
    (content_key,) = [entry.key for entry in await entries(tmp_path)]
    async with SqliteJournal(tmp_path / "run.db") as other, on(quick, tmp_path, max_in_flight=1) as session:
        before = await other.find(content_key)
        assert before is not None
        held = attrs.evolve(before, key="k", state=EntryState.INTENT, holder=Holder.US)
        assert await other.begin(held)
        await other.record(attrs.evolve(held, state=EntryState.SUBMITTED, task_id="t"))
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.3):
                await session.generate("before", key="k")
        async with session.stream([GenerationRequest("before", key="k"), "after"]) as stream:
            outcome = await anext(stream)
        waiting = asyncio.ensure_future(session.generate("before", key="k"))
        await asyncio.sleep(0.1)
    with pytest.raises(SessionClosedError):
        await waiting

    assert outcome.request is not None
    assert outcome.request.prompt == "after"


# ---------------------------------------------------------------------- urls that expire


async def test_a_picture_whose_url_expired_meanwhile_is_still_saved(
    reopen: Open, gateway: Emulator, tmp_path: Path
) -> None:
    """A fresh poll brings a fresh url; where the service has forgotten the task, the error names it."""
    await run(reopen(), "cat")
    await asyncio.sleep(3600)
    async with reopen() as session:
        done = await session.generate("cat")
        await session.save(done.images[0], tmp_path / "cat.jpeg")
    await asyncio.sleep(3600)
    gateway.tasks.clear()
    (again,) = await run(reopen(), "cat", save_to=tmp_path / "pictures")

    assert (tmp_path / "cat.jpeg").stat().st_size > 0
    assert isinstance(again, Completed)
    assert isinstance(again.save_error, ResultExpiredError)
    assert again.save_error.task_id == again.task_id
    assert again.saved == ()
