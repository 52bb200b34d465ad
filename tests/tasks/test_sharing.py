"""Runners that are shared, resumed, adopted or cancelled in an unlucky moment: nothing is paid twice, or left held."""

import asyncio
import contextlib
import math
import sqlite3
from collections import deque
from decimal import Decimal
from pathlib import Path
from typing import Any

import anyio
import pytest
from support.responses import picture
from support.scripted import Connection, ScriptedGateway, answer, completed, running, session_on
from support.virtual_time import VirtualJournal

from flux2max_async import (
    Failed,
    FluxSession,
    GenerationRequest,
    InvalidRequestError,
    JournalEntry,
    SessionClosedError,
    SubmissionUncertainError,
)
from flux2max_async._tasks.cancellation import SubmitCancellation
from flux2max_async.journal import EntryState
from flux2max_async.journal._budget_record import NullRecord
from flux2max_async.journal._transitions import end_entry

CAT = GenerationRequest("a cat", key="cat")


def opened(scripted: ScriptedGateway, folder: Path, **options: Any) -> FluxSession:
    return session_on(scripted, journal=VirtualJournal(folder / "run.db"), **options)


def rows(folder: Path) -> list[tuple[str, str | None]]:
    """Read the state and the owner of each entry."""
    with contextlib.closing(sqlite3.connect(folder / "run.db")) as connection:
        return connection.execute("SELECT state, owner FROM entries ORDER BY id").fetchall()


def set_owner(folder: Path, owner: str, *, alive: bool) -> None:
    """Let another owner hold all entries: one that is gone, or one on another host whose lease ends soon."""
    with contextlib.closing(sqlite3.connect(folder / "run.db")) as connection:
        connection.execute("UPDATE entries SET owner = ?", (owner,))
        if alive:
            connection.execute("INSERT INTO owners VALUES (?, 0, 1.0, 'another host', 1)", (owner,))
        connection.commit()


async def leave_behind(scripted: ScriptedGateway, folder: Path) -> None:
    """Submit a request whose session ends before its task."""
    scripted.polls = deque([answer(200, running())])
    async with opened(scripted, folder) as session:
        await session.submit(CAT)


class SlowlyAdopting(VirtualJournal):
    """A journal whose first adoption is done, but reported later."""

    adopted: "asyncio.Future[None] | None" = None

    async def adopt(self, entry: JournalEntry, /) -> bool:
        adopted = await super().adopt(entry)
        if self.adopted is None:
            self.adopted = asyncio.get_running_loop().create_future()
            await self.adopted
        return adopted


async def test_cancelled_in_the_moment_of_adoption(scripted: ScriptedGateway, tmp_path: Path) -> None:
    """A caller that leaves just as its task is found: the task is followed all the same, and not paid for again."""
    await leave_behind(scripted, tmp_path)
    journal = SlowlyAdopting(tmp_path / "run.db")
    async with session_on(scripted, journal=journal) as session:
        caller = asyncio.ensure_future(session.generate(CAT))
        while journal.adopted is None:  # noqa: ASYNC110 - it is set once, soon
            await anyio.sleep(0.1)
        caller.cancel()
        journal.adopted.set_result(None)
        await anyio.sleep(1.5)
        state = rows(tmp_path)[0][0]
        scripted.polls = deque([answer(200, completed())])
        await session.generate(CAT)

    assert state == "submitted"
    assert len(scripted.of("POST")) == 1
    assert rows(tmp_path) == [("completed", None)]


async def test_stream_that_takes_up_a_cancelled_submit_holds_the_entry(
    scripted: ScriptedGateway, tmp_path: Path
) -> None:
    """What the new caller allows holds, even if nobody else has waited: while it saves, the entry is held."""
    scripted.submits = deque([answer(200, {"id": "t1"}, after=2.0)])
    scripted.polls = deque([answer(200, completed(url=f"{scripted.url}/x.jpeg"))])
    scripted.downloads = deque([answer(200, picture("JPEG"), after=5.0)])
    async with opened(scripted, tmp_path) as session:
        gone = asyncio.ensure_future(session.generate(CAT))
        await anyio.sleep(1.0)
        gone.cancel()
        consumer = asyncio.ensure_future(anext(session.stream([CAT], save_to=tmp_path / "images")))
        await anyio.sleep(5.0)
        ((state, owner),) = rows(tmp_path)
        outcome = await consumer

    assert (state, owner is None) == ("completed", False)
    assert outcome.unwrap().saved
    assert rows(tmp_path) == [("completed", None)]


async def test_request_beside_an_attached_task(scripted: ScriptedGateway, tmp_path: Path) -> None:
    """A request whose task is attached keeps its own key: another request with that key is refused, nothing leaks."""
    await leave_behind(scripted, tmp_path)
    async with opened(scripted, tmp_path) as session:
        attached = session.attach("t1")
        await anyio.sleep(0.5)
        generated = asyncio.ensure_future(session.generate(CAT))
        await anyio.sleep(0.5)
        with pytest.raises(InvalidRequestError, match="belongs to another request"):
            await session.generate("a dog", key="cat")
        scripted.polls = deque([answer(200, completed())])
        await asyncio.gather(attached, generated)
        supervisor = session._supervisor
        assert supervisor is not None
        left = [*supervisor.single_flight.by_key, *supervisor.single_flight.by_task_id]

    assert left == []
    assert rows(tmp_path) == [("completed", None)]


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_updates_while_another_session_follows_the_task(scripted: ScriptedGateway, tmp_path: Path) -> None:
    """Updates that began while another session followed the task go on with whoever follows it here, and end."""
    scripted.polls = deque([answer(200, running())])
    first, second = opened(scripted, tmp_path), opened(scripted, tmp_path)
    await first.__aenter__()
    async with second:
        await first.submit(CAT)
        task = await second.submit(CAT)

        async def statuses() -> list[str]:
            return [snapshot.status async for snapshot in task.updates()]

        updates = asyncio.ensure_future(statuses())
        await anyio.sleep(0.1)
        second.attach("t1")
        await first.aclose()
        await anyio.sleep(0.5)
        scripted.polls = deque([answer(200, completed())])
        async with asyncio.timeout(10):
            assert (await task).ok
            assert (await updates)[-1] == "completed"

    assert rows(tmp_path) == [("completed", None)]


async def test_conflicting_request_does_not_revive_a_cancelled_submit(
    scripted: ScriptedGateway, tmp_path: Path
) -> None:
    """A request that is refused because its key belongs to another one leaves that one cancelled."""
    scripted.submits = deque([answer(429, {}, [("Retry-After", "1")], after=2.0), answer(200, {"id": "t1"})])
    async with opened(scripted, tmp_path) as session:
        gone = asyncio.ensure_future(session.generate(CAT))
        await anyio.sleep(1.0)
        gone.cancel()
        with pytest.raises(InvalidRequestError):
            await session.generate("a dog", key="cat")
        await anyio.sleep(30.0)

    assert len(scripted.of("POST")) == 1
    assert rows(tmp_path) == [("refused", None)]


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_attached_task_whose_owner_dies(scripted: ScriptedGateway, tmp_path: Path) -> None:
    """The journal gives the entry of a dead owner to the session that has attached its task; the end frees it."""
    await leave_behind(scripted, tmp_path)
    set_owner(tmp_path, "other", alive=True)
    from flux2max_async import SqliteJournal  # noqa: PLC0415 - in real time

    async with session_on(scripted, journal=SqliteJournal(tmp_path / "run.db", lease=1.0)) as session:
        task = session.attach("t1")
        while rows(tmp_path)[0][1] == "other":  # noqa: ASYNC110 - the lease has to end
            await anyio.sleep(0.1)
        await anyio.sleep(0.3)
        scripted.polls = deque([answer(200, completed())])
        await task
        after = rows(tmp_path)

    assert after == [("completed", None)]


async def test_joining_caller_that_allows_to_resubmit(scripted: ScriptedGateway, tmp_path: Path) -> None:
    """A caller that may pay twice joins a submit that turns out to be uncertain: only its own request is sent again."""
    scripted.submits = deque([answer(502, {}, after=2.0), answer(200, {"id": "t2"})])
    scripted.polls = deque([answer(200, completed("t2"))])
    async with opened(scripted, tmp_path) as session:
        first = asyncio.ensure_future(session.generate(CAT))
        await anyio.sleep(1.0)
        second = await session.generate(CAT, resubmit_uncertain=True)
        with pytest.raises(SubmissionUncertainError):
            await first

    assert second.task_id == "t2"
    assert len(scripted.of("POST")) == 2


async def test_closing_a_stream_does_not_wait_for_others(scripted: ScriptedGateway, tmp_path: Path) -> None:
    """A request of a stream that somebody else waits for, too, goes on, and doesn't hold up the stream's close."""
    scripted.submits = deque([answer(200, {"id": "t1"}), answer(200, {"id": "t2"})])
    scripted.polls = deque([*(answer(200, running()) for _ in range(20)), answer(200, completed())])
    async with opened(scripted, tmp_path, max_in_flight=1) as session:
        await session.submit("in the way", key="dog")
        other = asyncio.ensure_future(session.generate(CAT))
        stream = session.stream([CAT])
        consumer = asyncio.ensure_future(anext(stream))
        await anyio.sleep(1.0)
        started = anyio.current_time()
        await stream.aclose()
        took = anyio.current_time() - started
        with pytest.raises(StopAsyncIteration):
            await consumer
        done = await other

    assert took < 1.0
    assert done.ok


async def test_callers_who_leave_are_forgotten(scripted: ScriptedGateway, tmp_path: Path) -> None:
    """Callers who leave while others wait for the same request leave nothing behind."""
    scripted.submits = deque([answer(200, running("t1"), after=5.0)])
    scripted.polls = deque([answer(200, completed("t1"))])
    async with session_on(scripted, journal=VirtualJournal(tmp_path / "run.db")) as session:
        stays = asyncio.ensure_future(session.generate("a cat", key="cat"))
        await anyio.sleep(1.0)
        leave = [asyncio.ensure_future(session.generate("a cat", key="cat")) for _ in range(20)]
        await anyio.sleep(1.0)
        for caller in leave:
            caller.cancel()
        await asyncio.gather(*leave, return_exceptions=True)
        assert session._supervisor is not None
        (runner,) = session._supervisor.single_flight.by_key.values()
        waiting = [len(shared._waiting or ()) for shared in (runner.ended, runner.answered)]
        await stays

    assert waiting == [1, 1]


async def test_reservation_that_outlives_its_session(scripted: ScriptedGateway) -> None:
    """What was reserved for a task that was unfinished at closing is settled when the task is attached again."""
    scripted.polls = deque([answer(200, running())])
    session = session_on(scripted, budget="0.10", price_guess="0.07")
    async with session:
        await session.submit("a cat")
    reserved = session._parts.records._budget.committed
    scripted.polls = deque([answer(200, completed(usage={"cost": "0.05"}))])
    async with session:
        await session.attach("t1")

    assert (str(reserved), str(session._parts.records._budget.committed)) == ("0.07", "0.05")


async def test_attached_task_that_is_unfinished_at_closing(scripted: ScriptedGateway, tmp_path: Path) -> None:
    """With a journal, the reservation of a task whose deadline came stays the task's, however often it is attached."""
    scripted.polls = deque([answer(200, running())])
    session = opened(scripted, tmp_path, budget="0.10", price_guess="0.07", budget_scope="session", task_timeout=10.0)
    async with session:
        task = await session.submit(CAT)
        assert not (await task.outcome()).ok
        session.attach(task.id)
        await anyio.sleep(1.0)
    suspended = session._parts.records._budget.committed
    scripted.polls = deque([answer(200, completed(usage={"cost": "0.05"}))])
    async with session:
        await session.attach(task.id)

    assert (str(suspended), str(session._parts.records._budget.committed)) == ("0.07", "0.05")


async def test_cancelled_submit_that_waits_for_nothing(scripted: ScriptedGateway) -> None:
    """A submit that was cancelled before its first step is not sent, even if nothing is in its way."""
    cancellation = SubmitCancellation()
    cancellation.cancel(SessionClosedError("nobody is left"))
    async with session_on(scripted) as session:
        supervisor = session._supervisor
        assert supervisor is not None
        with pytest.raises(SessionClosedError, match="nobody is left"):
            await supervisor.client.submit(
                CAT, deadline=math.inf, rank=lambda: 0.0, cancellation=cancellation, record=NullRecord()
            )

    assert scripted.received == []


def test_a_task_is_never_recorded_as_refused() -> None:
    """Whatever ends the attempt to follow a task, its entry says that it was submitted, and its price stays reserved."""
    entry = JournalEntry(
        key="k", fingerprint="f", request={}, state=EntryState.SUBMITTED, task_id="t1", committed=Decimal("0.07")
    )
    outcome = Failed(error=SessionClosedError("the caller left"))
    ended = end_entry(entry, outcome, None, holder=None, secrets=())

    assert (ended.state, ended.committed, ended.holder) == (EntryState.SUBMITTED, Decimal("0.07"), None)


async def test_report_about_an_entry_that_is_held_here(scripted: ScriptedGateway, tmp_path: Path) -> None:
    """A report that an entry is this session's changes nothing if it was already."""
    await leave_behind(scripted, tmp_path)
    async with opened(scripted, tmp_path) as session:
        task = await session.submit(CAT)
        supervisor = session._supervisor
        assert supervisor is not None
        entry = await VirtualJournal.find(session._parts.journal, "cat")  # type: ignore[arg-type]
        assert entry is not None
        supervisor.on_external_change([entry])
        scripted.polls = deque([answer(200, completed())])
        await task

    assert rows(tmp_path) == [("completed", None)]


async def test_submit_that_joins_an_adopted_task_names_its_request(scripted: ScriptedGateway, tmp_path: Path) -> None:
    """A task that was adopted unasked gets its request from the first caller who asks for it."""
    await leave_behind(scripted, tmp_path)
    async with opened(scripted, tmp_path) as session:
        supervisor = session._supervisor
        assert supervisor is not None
        entry = await VirtualJournal.find(session._parts.journal, "cat")  # type: ignore[arg-type]
        assert entry is not None
        supervisor.on_external_change([entry])
        await anyio.sleep(0.5)
        task = await session.submit(CAT)
        request = task.request
        scripted.polls = deque([answer(200, completed())])
        done = await task

    assert request == done.request == CAT


async def test_items_with_one_key_after_an_interrupted_save(scripted: ScriptedGateway, tmp_path: Path) -> None:
    """Several items of a stream that share an interrupted entry save its images once, one after the other."""
    downloads: list[str] = []
    urls = [f"{scripted.url}/{index}.jpeg" for index in range(3)]

    async def download(connection: Connection) -> None:
        downloads.append(connection.call.path)
        await answer(200, picture("JPEG") + connection.call.path.encode(), after=0.5)(connection)

    scripted.polls = deque(
        [answer(200, completed(output=[{"content": [{"type": "image", "url": url} for url in urls]}]))]
    )
    scripted.downloads = deque([download])
    async with opened(scripted, tmp_path) as session:
        await session.generate(CAT)
    set_owner(tmp_path, "gone", alive=False)
    async with opened(scripted, tmp_path) as session:
        outcomes = [outcome.unwrap() async for outcome in session.stream([CAT] * 3, save_to=tmp_path / "images")]

    assert [outcome.save_error for outcome in outcomes] == [None] * 3
    assert len({outcome.saved for outcome in outcomes}) == 1
    assert len(downloads) == 3


async def test_fourth_429_holds_back_polls_that_wait_for_the_limit(scripted: ScriptedGateway) -> None:
    """Polls whose turn had been reserved before the fourth 429 wait as long as it says."""

    async def poll(connection: Connection) -> None:
        await answer(200, running(connection.call.path.rpartition("/")[2]))(connection)

    scripted.polls = deque([*[answer(429, {}, [("Retry-After", "6")])] * 4, poll])
    async with session_on(scripted, max_polls_per_second=1.0) as session:
        for number in range(8):
            session.attach(f"t{number}")
        await anyio.sleep(12.0)
        *_, fourth, fifth = sorted(call.at for call in scripted.received)[:5]

    assert fifth - fourth >= 6.0
