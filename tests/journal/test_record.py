"""Sessions with a journal: a request is paid for once, however earlier sessions have ended."""

import asyncio
import base64
from collections import Counter
from collections.abc import AsyncIterator, Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import anyio
import attrs
import pytest
from PIL import Image
from support.journals import AnyJournal, VirtualAnyJournal, add_dead_owner, execute, stored_bytes
from support.scripted import ScriptedGateway, answer, completed

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
from flux2max_async.journal import EntryState, Holder

Open = Callable[..., FluxSession]


@pytest.fixture
def reopen(gateway: Emulator, tmp_path: Path) -> Open:
    """Return a function that creates a session on the same journal, like the next run of a program."""

    def session(**settings: Any) -> FluxSession:
        settings = {"schedule": FixedSchedule(1.0), "journal": VirtualAnyJournal(tmp_path / "run.db"), **settings}
        return FluxSession(gateway.api_key, base_url=gateway.url, **settings)

    return session


async def run(session: FluxSession, *prompts: str | GenerationRequest, **options: Any) -> list[Outcome]:
    async with session:
        return [outcome async for outcome in session.stream(prompts, **options)]


def ends(outcomes: list[Outcome]) -> Counter[str]:
    return Counter("completed" if outcome.ok else type(outcome.error).__name__ for outcome in outcomes)


async def entries(tmp_path: Path) -> list[JournalEntry]:
    return [entry async for entry in AnyJournal(tmp_path / "run.db").entries()]


def rewrite(tmp_path: Path, statement: str, *arguments: object) -> None:
    """Change the journal over another connection."""
    execute(tmp_path / "run.db", statement, *arguments)


# ---------------------------------------------------------------------- reruns


async def test_a_second_run_submits_nothing_and_polls_nothing(reopen: Open, gateway: Emulator) -> None:
    """Outcomes of an earlier run are yielded at once, unchanged, and marked as replayed."""
    prompts = [f"cat {number}" for number in range(30)] + ["dog [fail]", "eel [moderate]"]
    first = await run(reopen(), *prompts)
    calls = gateway.calls.copy()
    started = anyio.current_time()
    session = reopen()
    second = await run(session, *prompts)

    assert gateway.calls == calls
    assert anyio.current_time() == started
    assert all(outcome.replayed for outcome in second)
    assert not any(outcome.replayed for outcome in first)
    assert ends(second) == ends(first) == {"completed": 30, "TaskFailedError": 1, "ContentModeratedError": 1}
    replays = {outcome.request: outcome for outcome in second}
    for outcome in first:
        replay = replays[outcome.request]
        if isinstance(outcome, Completed):
            assert replay == attrs.evolve(outcome, replayed=True)
        else:
            assert replay.task_id == outcome.task_id
    assert (session.stats.completed, session.stats.failed, session.stats.replayed) == (30, 2, 32)
    assert (session.stats.submitted, session.stats.spent) == (0, Decimal(0))


async def test_repeated_prompts_are_separate_requests(reopen: Open, gateway: Emulator) -> None:
    """A prompt that occurs three times is three tasks, the same three in each run; a fourth occurrence is a new task."""
    first = await run(reopen(), "cat", "cat", "cat")
    second = await run(reopen(), "cat", "cat", "cat", "cat")

    assert len({outcome.task_id for outcome in first}) == 3
    assert {outcome.task_id for outcome in first} < {outcome.task_id for outcome in second}
    assert gateway.accepted["cat"] == 4


async def test_equal_calls_share_one_task(reopen: Open, gateway: Emulator) -> None:
    """Equal calls of generate() and submit(), concurrent, later or in the next run, return the same task."""
    async with reopen() as session:
        results = await asyncio.gather(*(session.generate("cat") for _ in range(5)))
        task = await session.submit("cat")
        later = await session.submit("cat")
        other = await session.generate("cat", key="a key of its own")
    async with reopen() as session:
        again = await session.generate("cat")

    assert {result.task_id for result in results} == {task.id, later.id, again.task_id}
    assert [result.replayed for result in results] == [False] * 5
    assert again.replayed
    assert other.task_id != again.task_id
    assert gateway.accepted["cat"] == 2


async def test_a_second_submit_shares_the_task_and_its_snapshots(reopen: Open) -> None:
    """A submit with the key of a running task returns a handle on that task, with the same snapshots."""
    async with reopen() as session:
        first = await session.submit("cat", key="c")
        second = await session.submit("cat", key="c")
        progress = [snapshot.progress async for snapshot in second.updates()]
        done = await second

    assert first.id == second.id
    assert len(progress) > 3
    assert second.snapshot is first.snapshot
    assert done == await first


async def test_a_key_belongs_to_one_request(reopen: Open, gateway: Emulator) -> None:
    """A key that another request has is an error, while that request runs, after it has ended, and in the next run."""
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


async def test_a_key_has_to_be_encodable(reopen: Open, gateway: Emulator) -> None:
    """A key with a lone surrogate is an InvalidRequestError."""
    async with reopen() as session:
        with pytest.raises(InvalidRequestError, match="key must be text that can be written as UTF-8"):
            await session.generate("a cat", key="\ud800")

    assert gateway.calls["submit"] == 0


async def test_failed_tasks_are_submitted_again_only_with_retry_failed(reopen: Open, gateway: Emulator) -> None:
    """retry_failed=True submits failed requests again, and no others; without it, they are replayed."""
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


async def test_a_refused_request_is_submitted_again(reopen: Open, gateway: Emulator, tmp_path: Path) -> None:
    """A refused submit created no task: the next run submits again, even a corrected request with the same key."""
    unauthorized = FluxSession("wrong", base_url=gateway.url, journal=VirtualAnyJournal(tmp_path / "run.db"))
    async with unauthorized:
        with pytest.raises(AuthenticationError):
            await unauthorized.generate("a cat", key="c")
    refused = await entries(tmp_path)
    done = await run(reopen(), GenerationRequest("a better cat", key="c"))

    assert [(entry.state, entry.committed) for entry in refused] == [(EntryState.REFUSED, Decimal(0))]
    assert "API key" in str(refused[0].error)
    assert ends(done) == {"completed": 1}
    assert len(await entries(tmp_path)) == 1


async def test_each_submit_attempt_is_begun_and_refused(reopen: Open, gateway: Emulator, tmp_path: Path) -> None:
    """Between two attempts of a submit, the journal records that no task was created."""
    gateway.script("submit", Fault.UNAVAILABLE, Fault.RATE_LIMITED, Fault.RESET_BEFORE)
    states: list[EntryState] = []
    async with reopen() as session:
        generating = asyncio.ensure_future(session.generate("cat"))
        while gateway.calls["submit"] < 3:
            await asyncio.sleep(0.1)
            states += [entry.state for entry in await entries(tmp_path)]
        (error,) = await asyncio.gather(generating, return_exceptions=True)

    assert EntryState.REFUSED in states
    assert gateway.calls["submit"] == 3
    assert isinstance(error, SubmissionUncertainError)


# ---------------------------------------------------------------------- uncertain


async def test_an_uncertain_submit_stays_uncertain(reopen: Open, gateway: Emulator) -> None:
    """A submit whose response was lost is an error in each run, and is repeated only with resubmit_uncertain=True."""
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


async def test_an_intent_without_a_task_id_is_uncertain(reopen: Open, gateway: Emulator, tmp_path: Path) -> None:
    """If a power failure has lost the task id but not the intent, the request is not submitted again by itself."""
    await run(reopen(), "cat")
    rewrite(tmp_path, "UPDATE entries SET state = 'intent', task_id = NULL, created = NULL")
    second = await run(reopen(), "cat")
    found = await entries(tmp_path)
    third = await run(reopen(), "cat", resubmit_uncertain=True)

    assert ends(second) == {"SubmissionUncertainError": 1}
    assert [entry.state for entry in found] == [EntryState.UNCERTAIN]
    assert ends(third) == {"completed": 1}
    assert gateway.accepted["cat"] == 2


# ---------------------------------------------------------------------- tasks that haven't ended


async def test_an_unfinished_task_is_resumed(reopen: Open, gateway: Emulator, tmp_path: Path) -> None:
    """A session that is closed early leaves task ids in the journal, and the next one polls them without a submit."""
    async with reopen() as session:
        tasks = [await session.submit(f"cat {number}") for number in range(3)]
    unfinished = await entries(tmp_path)
    second = await run(reopen(), *(f"cat {number}" for number in range(3)))

    assert {entry.state for entry in unfinished} == {EntryState.SUBMITTED}
    assert {entry.task_id for entry in unfinished} == {task.id for task in tasks} == {end.task_id for end in second}
    assert ends(second) == {"completed": 3}
    assert not any(outcome.replayed for outcome in second)
    assert gateway.calls["submit"] == 3


async def test_a_task_past_its_deadline_is_resumed(reopen: Open, gateway: Emulator) -> None:
    """A task that has passed its deadline is polled again when it is requested again."""
    async with reopen(task_timeout=5.0) as session:
        with pytest.raises(DeadlineExceededError):
            await session.generate("cat")
        done = await session.generate("cat")
    again = await run(reopen(), "cat")

    assert (done.replayed, again[0].replayed) == (False, True)
    assert gateway.calls["submit"] == 1


async def test_a_task_that_the_service_no_longer_knows_has_failed(
    reopen: Open, gateway: Emulator, tmp_path: Path
) -> None:
    """An old task id that the service doesn't know any more is a TaskNotFoundError in each run, until retry_failed=True."""
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
async def test_a_task_that_the_service_does_not_show_yet_is_polled(
    reopen: Open, gateway: Emulator, tmp_path: Path, set_back: float
) -> None:
    """A 404 is no end in a rerun right after the submit, when the service may not show the task yet."""
    async with reopen() as session:
        await session.submit("cat")
    rewrite(tmp_path, "UPDATE entries SET submitted = submitted + ?, created = created + ?", set_back, set_back)
    gateway.script("poll", Fault.NOT_FOUND, Fault.NOT_FOUND)
    second = await run(reopen(), "cat")

    assert ends(second) == {"completed": 1}
    assert gateway.calls["submit"] == 1


async def test_a_cancelled_caller_does_not_cancel_a_shared_request(reopen: Open, gateway: Emulator) -> None:
    """If two callers share a request that isn't submitted yet, and one is cancelled, it is submitted for the other."""
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


async def test_closing_the_session_ends_all_callers_of_a_shared_request(reopen: Open) -> None:
    """All callers that share a request get a SessionClosedError."""
    async with reopen() as session:
        waits = [asyncio.ensure_future(session.generate("cat")) for _ in range(3)]
        await asyncio.sleep(2)
    results = await asyncio.gather(*waits, return_exceptions=True)

    assert {type(result) for result in results} == {SessionClosedError}


async def test_files_saved_for_a_shared_request_are_recorded(reopen: Open, gateway: Emulator, tmp_path: Path) -> None:
    """A stream that shares its request with generate() saves the image once, and the next run knows the file."""
    async with reopen() as session:
        generating = asyncio.ensure_future(session.generate("cat"))
        await asyncio.sleep(1)
        (saved,) = [
            outcome.unwrap().saved
            async for outcome in session.stream([GenerationRequest("cat")], save_to=tmp_path / "images")
        ]
        await generating
    (again,) = await run(reopen(), "cat", save_to=tmp_path / "images")

    assert again.unwrap().saved == saved != ()
    assert gateway.calls["download"] == gateway.calls["submit"] == 1


async def test_a_prompt_may_hold_a_lone_surrogate(reopen: Open, gateway: Emulator) -> None:
    """A prompt that can be sent can be recorded."""
    first = await run(reopen(), "a \ud800 cat")
    second = await run(reopen(), "a \ud800 cat")

    assert ends(first) == ends(second) == {"completed": 1}
    assert gateway.calls["submit"] == 1


# ---------------------------------------------------------------------- failures of the journal


async def test_nothing_is_submitted_without_an_intent(
    gateway: Emulator, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """If an intent can't be written, the stream raises the JournalError, and nothing is submitted."""

    class Failing(VirtualAnyJournal):
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
    """A journal that fails after the submit loses no task: the error is logged, and the outcome holds it."""

    class Failing(VirtualAnyJournal):
        fails = True

        async def record(self, entry: JournalEntry, /) -> None:
            if self.fails:
                raise JournalError("the disk is full")
            await super().record(entry)

    journal = Failing(tmp_path / "run.db")
    async with FluxSession(gateway.api_key, base_url=gateway.url, journal=journal) as session:
        done = await session.generate("cat")
        with pytest.raises(TaskFailedError):
            await session.generate("dog [fail]")
        task = await session.submit("elk")
        journal.fails = False
        recorded = await task

    assert isinstance(done.journal_error, JournalError)
    assert f"task {done.task_id} goes on, but its journal entry is not up to date: the disk is full" in caplog.text
    assert recorded.journal_error is None
    assert [(entry.state, entry.prompt) for entry in await entries(tmp_path) if entry.prompt == "elk"] == [
        (EntryState.COMPLETED, "elk")
    ]


async def test_an_intent_is_taken_back_if_its_submit_is_cancelled(gateway: Emulator, tmp_path: Path) -> None:
    """If the session closes while an intent is being written, the entry becomes REFUSED: nothing was sent."""
    begun, never = asyncio.Event(), asyncio.Event()

    class Slow(VirtualAnyJournal):
        async def begin(self, entry: JournalEntry, /, **limits: Any) -> bool:
            written = await super().begin(entry, **limits)
            begun.set()
            await never.wait()
            return written

    async with FluxSession(gateway.api_key, base_url=gateway.url, journal=Slow(tmp_path / "run.db")) as session:
        generating = asyncio.ensure_future(session.generate("cat"))
        await begun.wait()
    await asyncio.gather(generating, return_exceptions=True)

    assert [entry.state for entry in await entries(tmp_path)] == [EntryState.REFUSED]
    assert gateway.calls["submit"] == 0


async def test_an_outcome_is_returned_if_the_session_closes_while_it_is_recorded(
    gateway: Emulator, tmp_path: Path
) -> None:
    """An outcome that is known is not replaced by a SessionClosedError."""
    ending = asyncio.Event()

    class Slow(VirtualAnyJournal):
        async def record(self, entry: JournalEntry, /) -> None:
            await super().record(entry)
            if entry.state is EntryState.COMPLETED:
                ending.set()
                await asyncio.sleep(1000)

    async with FluxSession(gateway.api_key, base_url=gateway.url, journal=Slow(tmp_path / "run.db")) as session:
        generating = asyncio.ensure_future(session.generate("cat"))
        await ending.wait()
    done = await generating

    assert done.ok


async def test_a_stream_yields_an_unsaved_outcome_if_the_session_closes(gateway: Emulator, tmp_path: Path) -> None:
    """A stream with save_to yields an outcome even if the session closes before its image can be saved."""
    ending = asyncio.Event()

    class Slow(VirtualAnyJournal):
        async def record(self, entry: JournalEntry, /) -> None:
            await super().record(entry)
            if entry.state is EntryState.COMPLETED:
                ending.set()
                await asyncio.sleep(1000)

    async with FluxSession(gateway.api_key, base_url=gateway.url, journal=Slow(tmp_path / "run.db")) as session:
        stream = session.stream(["cat"], save_to=tmp_path / "images")
        waiting = asyncio.ensure_future(anext(stream))
        await ending.wait()
    done = await waiting

    assert isinstance(done, Completed)
    assert isinstance(done.save_error, SessionClosedError)
    assert done.saved == ()


async def test_a_lost_race_to_adopt_is_repeated(gateway: Emulator, tmp_path: Path) -> None:
    """If another session adopts the entry first, it is read again; changes reported after the close are ignored."""
    callbacks: list[Callable[[list[JournalEntry]], None]] = []

    class Raced(VirtualAnyJournal):
        adoptions = 0

        async def open(
            self,
            on_external_change: Callable[[list[JournalEntry]], None] = lambda _: None,
            /,
            *,
            watch_changes: bool = False,
        ) -> None:
            callbacks.append(on_external_change)
            await super().open(on_external_change, watch_changes=watch_changes)

        async def adopt(self, entry: JournalEntry, /) -> bool:
            self.adoptions += 1
            return self.adoptions > 2 and await super().adopt(entry)

    journal = Raced(tmp_path / "run.db")
    async with FluxSession(gateway.api_key, base_url=gateway.url, journal=journal) as session:
        task = await session.submit("cat")
    async with session:
        done = await session.generate("cat")
    callbacks[-1](await entries(tmp_path))

    assert (done.task_id, journal.adoptions) == (task.id, 3)
    assert session.stats.in_flight == 0


async def test_unexpected_errors_of_a_journal_lose_no_task(gateway: Emulator, tmp_path: Path) -> None:
    """Whatever a journal raises, the task is followed; if closing it fails, the session is closed all the same."""

    class Broken(VirtualAnyJournal):
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

    assert "the journal failed: KeyError" in str(done.journal_error)


async def test_a_journal_that_contradicts_itself_is_an_error(gateway: Emulator, tmp_path: Path) -> None:
    """A journal that neither begins a request nor finds its entry is a JournalError, not an endless loop."""

    class Contrary(VirtualAnyJournal):
        async def begin(self, entry: JournalEntry, /, **limits: Any) -> bool:
            return False

    journal = Contrary(tmp_path / "run.db")
    async with FluxSession(gateway.api_key, base_url=gateway.url, journal=journal) as session:
        with pytest.raises(JournalError, match="the journal neither begins 'c' nor returns its entry"):
            await session.generate("cat", key="c")

    assert gateway.calls["submit"] == 0


async def test_a_caller_that_is_cancelled_while_it_adopts_releases_the_entry(
    reopen: Open, gateway: Emulator, tmp_path: Path
) -> None:
    """If a caller is cancelled while its session adopts a task, another session can adopt it."""
    adopted = asyncio.Event()

    class Slow(VirtualAnyJournal):
        async def adopt(self, entry: JournalEntry, /) -> bool:
            result = await super().adopt(entry)
            adopted.set()
            await asyncio.sleep(1000)
            return result

    async with reopen() as session:
        task = await session.submit("cat")
    async with reopen(journal=Slow(tmp_path / "run.db")) as session:
        cancelled = asyncio.ensure_future(session.generate("cat"))
        await adopted.wait()
        cancelled.cancel()
        async with reopen() as other:
            done = await other.generate("cat")

    assert done.task_id == task.id


async def test_files_that_cannot_be_recorded_are_reported(gateway: Emulator, tmp_path: Path) -> None:
    """If a saved image can't be recorded, the file is kept, and the outcome holds the JournalError."""

    class Failing(VirtualAnyJournal):
        async def record(self, entry: JournalEntry, /) -> None:
            if entry.files:
                raise JournalError("the disk is full")
            await super().record(entry)

    session = FluxSession(gateway.api_key, base_url=gateway.url, journal=Failing(tmp_path / "run.db"))
    (done,) = await run(session, "cat", save_to=tmp_path / "images")

    assert len(done.unwrap().saved) == 1
    assert isinstance(done.journal_error, JournalError)


# ---------------------------------------------------------------------- sharing


async def test_callers_of_a_shared_request_share_their_policies(reopen: Open, gateway: Emulator) -> None:
    """What one of several concurrent callers allows is submitted again; who didn't allow to pay twice hears so."""
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
        TaskFailedError,
        TaskFailedError,
        SubmissionUncertainError,
        Completed,
    ]
    assert gateway.accepted == {"dog [fail]": 2, "cat": 2}


async def test_a_task_that_the_service_no_longer_knows_counts(reopen: Open, gateway: Emulator, tmp_path: Path) -> None:
    """A task that the service doesn't know any more may have cost money, and counts against the budget."""
    async with reopen(budget="0.10") as session:
        await session.submit("cat")
    gateway.tasks.clear()
    rewrite(tmp_path, "UPDATE entries SET submitted = submitted - 3600")
    await run(reopen(budget="0.10"), "cat")
    async with reopen(budget="0.10") as session:
        with pytest.raises(BudgetExceededError):
            await session.generate("dog")

    assert [entry.committed for entry in await entries(tmp_path)] == [Decimal("0.07")]


# ---------------------------------------------------------------------- content of the file


async def test_a_very_long_url_is_not_stored_but_polled_again(scripted: ScriptedGateway, tmp_path: Path) -> None:
    """A URL that is too long for the journal is renewed by one poll when its image has to be saved."""
    url = f"{scripted.url}/0.jpeg?{'x' * 5000}"
    scripted.polls.clear()
    scripted.polls.append(answer(200, completed(url=url)))
    scripted.downloads.clear()
    scripted.downloads.append(answer(200, b"\xff\xd8\xff"))

    def session() -> FluxSession:
        return FluxSession(scripted.api_key, base_url=scripted.url, journal=VirtualAnyJournal(tmp_path / "run.db"))

    await run(session(), "cat")
    (again,) = await run(session(), "cat", save_to=tmp_path / "images")

    assert again.unwrap().save_error is None
    assert len(again.unwrap().saved) == 1


async def test_long_parameters_are_stored_as_hashes(reopen: Open, gateway: Emulator, tmp_path: Path) -> None:
    """An image among the extra parameters is stored as its hash, and requests with different ones are different."""
    masks = [base64.b64encode(bytes([number]) * 6000).decode() for number in range(2)]
    await run(reopen(), *(GenerationRequest("cat", extra={"mask": mask}) for mask in masks))
    data = stored_bytes(tmp_path / "run.db")

    assert gateway.accepted["cat"] == 2
    assert not any(mask[:64].encode() in data for mask in masks)
    assert b"(8000 characters)" in data


async def test_the_file_holds_no_secrets_and_no_images(scripted: ScriptedGateway, tmp_path: Path) -> None:
    """Whatever the service echoes, the file holds no API key, no webhook secret and no image data."""
    path = tmp_path / "in.png"
    Image.effect_noise((64, 64), 50).save(path)
    image = path.read_bytes()
    scripted.polls.clear()
    scripted.polls.append(
        answer(
            200, completed(metadata={"echo": [scripted.api_key, "my-secret"]}, usage={"cost": "0.07", "k": "my-secret"})
        )
    )
    session = FluxSession(scripted.api_key, base_url=scripted.url, journal=VirtualAnyJournal(tmp_path / "run.db"))
    async with session:
        await session.generate("cat", input_images=[image, path], webhook_secret="my-secret")
    data = stored_bytes(tmp_path / "run.db")

    assert b"in.png" in data
    for secret in (scripted.api_key.encode(), b"my-secret", image[:64], image[-64:]):
        assert secret not in data


# ---------------------------------------------------------------------- several sessions


@pytest.fixture
async def quick() -> AsyncIterator[Emulator]:
    """Run a gateway whose tasks take a third of a second of real time."""
    async with Emulator(seconds=0.3, spread=0.0, seed=1, pictures=False) as emulator:
        yield emulator


def session_on(gateway: Emulator, tmp_path: Path, **settings: Any) -> FluxSession:
    journal = AnyJournal(tmp_path / "run.db", lease=0.4)
    return FluxSession(gateway.api_key, base_url=gateway.url, journal=journal, schedule=FixedSchedule(0.05), **settings)


in_real_time = pytest.mark.parametrize("anyio_backend", ["asyncio"])


@in_real_time
async def test_two_sessions_share_equal_requests(quick: Emulator, tmp_path: Path) -> None:
    """Two sessions on one journal submit and poll a request once, and both get its outcome; submit() returns at once."""
    prompts = [f"cat {number}" for number in range(40)]

    async def stream(session: FluxSession) -> list[Outcome]:
        return [outcome async for outcome in session.stream(prompts, save_to=tmp_path / "images")]

    async with (
        session_on(quick, tmp_path, max_in_flight=8) as first,
        session_on(quick, tmp_path, max_in_flight=8) as second,
    ):
        both = await asyncio.gather(stream(first), stream(second))
        task = await first.submit("dog", key="d")
        other = await second.submit("dog", key="d")
        waited = not other._runner.ended.done()
        done, same = await asyncio.gather(task, other)

    assert [ends(outcomes) for outcomes in both] == [{"completed": 40}] * 2
    assert quick.accepted.total() == quick.calls["submit"] == 41
    assert quick.calls["download"] == 40
    assert first.stats.submitted + second.stats.submitted == 41
    assert (done.task_id, waited, same.replayed) == (same.task_id, True, True)


@in_real_time
async def test_a_request_waits_for_a_dead_process_and_adopts_its_task(quick: Emulator, tmp_path: Path) -> None:
    """A request that another process was following is resumed without a submit when that process has died."""
    async with session_on(quick, tmp_path) as dying:
        task = await dying.submit("cat")
    async with session_on(quick, tmp_path) as session:
        rewrite(tmp_path, "UPDATE entries SET owner = 'them'")
        add_dead_owner(tmp_path / "run.db")
        generating = asyncio.ensure_future(session.generate("cat"))
        async with asyncio.timeout(10):
            done = await generating

    assert done.task_id == task.id
    assert quick.calls["submit"] == 1
    assert [entry.state for entry in await entries(tmp_path)] == [EntryState.COMPLETED]


@in_real_time
async def test_tasks_of_a_dead_process_are_followed_without_a_request(quick: Emulator, tmp_path: Path) -> None:
    """A session follows the tasks of a process that has died, and a later request for one of them shares it."""
    async with session_on(quick, tmp_path) as dying:
        tasks = [await dying.submit("cat"), await dying.submit("dog")]
    quick.script("poll", *[Fault.SERVER_ERROR] * 2)  # so that polling takes longer
    async with session_on(quick, tmp_path) as session:
        rewrite(tmp_path, "UPDATE entries SET owner = 'them'")
        add_dead_owner(tmp_path / "run.db")
        generating = asyncio.ensure_future(session.generate("dog"))
        async with asyncio.timeout(10):
            while session.stats.polls < 2:  # noqa: ASYNC110 - no event reports it
                await asyncio.sleep(0.01)
            done = await session.generate("cat")
            await generating

    assert done.task_id == tasks[0].id
    assert not done.replayed
    assert done.request is not None
    assert quick.calls["submit"] == 2
    assert {entry.state for entry in await entries(tmp_path)} == {EntryState.COMPLETED}


@in_real_time
async def test_a_wait_for_another_process_can_be_cancelled(quick: Emulator, tmp_path: Path) -> None:
    """generate(), a stream and a session can be cancelled or closed while they wait for another process."""
    async with session_on(quick, tmp_path) as session:
        await session.generate("before")
    (derived_key,) = [entry.key for entry in await entries(tmp_path)]
    async with AnyJournal(tmp_path / "run.db") as other, session_on(quick, tmp_path, max_in_flight=1) as session:
        before = await other.find(derived_key)
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


# ---------------------------------------------------------------------- URLs that expire


async def test_an_image_whose_url_has_expired_is_saved(reopen: Open, gateway: Emulator, tmp_path: Path) -> None:
    """A poll renews the URL; if the service doesn't know the task any more, the error holds the task id."""
    await run(reopen(), "cat")
    await asyncio.sleep(3600)
    async with reopen() as session:
        done = await session.generate("cat")
        await session.save(done.images[0], tmp_path / "cat.jpeg")
    await asyncio.sleep(3600)
    gateway.tasks.clear()
    (again,) = await run(reopen(), "cat", save_to=tmp_path / "images")

    assert (tmp_path / "cat.jpeg").stat().st_size > 0
    assert isinstance(again, Completed)
    assert isinstance(again.save_error, ResultExpiredError)
    assert again.save_error.task_id == again.task_id
    assert again.saved == ()
