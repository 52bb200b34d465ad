"""A session's own schedule: its journal keeps what it has learned, and the next sessions begin with that."""

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from support.virtual_time import VirtualJournal

from flux2max_async import (
    Completed,
    FluxSession,
    JournalError,
    LearnedSchedule,
    PollSchedule,
    SessionClosedError,
)
from flux2max_async._polling.shared_learning import SharedLearning
from flux2max_async.emulator import Emulator
from flux2max_async.journal import Journal

State = Mapping[str, Any]
NAME = "learned_schedule"
LOST = "what earlier sessions have learned about durations can't be used"
NOT_KEPT = "what was learned about durations can't be kept"


@pytest.fixture
async def slow() -> AsyncIterator[Emulator]:
    """Provide a gateway whose tasks take about 40 s, much longer than expected."""
    async with Emulator(seconds=40.0, spread=0.1, seed=1, pictures=False) as emulator:
        yield emulator


_prompts = (f"picture {number}" for number in itertools.count())


def session_on(gateway: Emulator, journal: Journal | None, schedule: PollSchedule | None = None) -> FluxSession:
    return FluxSession(gateway.api_key, base_url=gateway.url, journal=journal, schedule=schedule)


async def generate(session: FluxSession, count: int) -> list[Completed]:
    """Generate new pictures all at once."""
    return await asyncio.gather(*(session.generate(next(_prompts)) for _ in range(count)))


async def stored(path: Path) -> Any:
    async with VirtualJournal(path) as journal:
        return await journal.load_state(NAME)


# ---------------------------------------------------------------------- sessions


async def test_the_next_session_begins_with_what_was_learned(slow: Emulator, tmp_path: Path) -> None:
    """A second session polls its first tasks as seldom as a session does that knows the service; the first did not."""
    async with session_on(slow, VirtualJournal(tmp_path / "run.db")) as first:
        cold = await generate(first, 10)
        await generate(first, 90)
        warm = await generate(first, 10)
    async with session_on(slow, VirtualJournal(tmp_path / "run.db")) as second:
        expected = second.stats.median_duration
        polled = await generate(second, 10)
    at_first, later, by_the_second = (sum(task.polls for task in tasks) for tasks in (cold, warm, polled))

    assert expected == pytest.approx(40.0, rel=0.4)
    assert later < at_first / 3
    assert by_the_second < at_first / 3


async def test_nothing_is_counted_twice(slow: Emulator, tmp_path: Path) -> None:
    """After any number of sessions, also of one that is opened again, the state has each ended task once."""
    path, counts = tmp_path / "run.db", list[float]()
    again = session_on(slow, VirtualJournal(path))
    for session, tasks in ((again, 3), (session_on(slow, VirtualJournal(path)), 0), (again, 2), (again, 0)):
        async with session:
            await generate(session, tasks)
        counts.append((await stored(path))["finished"])

    assert counts == [3, 3, 5, 5]


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0)], ids=str)
async def test_sessions_at_once_add_what_each_has_learned(
    slow: Emulator, tmp_path: Path, order: tuple[int, ...]
) -> None:
    """Of three sessions that run at once, the state has all tasks, in whichever order they close."""
    path = tmp_path / "run.db"
    async with session_on(slow, VirtualJournal(path)) as earlier:
        await generate(earlier, 4)
    sessions = [session_on(slow, VirtualJournal(path)) for _ in range(3)]
    for session in sessions:
        await session.__aenter__()
    await asyncio.gather(*(generate(session, tasks) for session, tasks in zip(sessions, (5, 6, 7), strict=True)))
    for number in order:
        await sessions[number].aclose()
    state = await stored(path)

    assert state["finished"] == 22
    assert LearnedSchedule.from_state(state).percentile(50) == pytest.approx(40.0, rel=0.4)


async def test_a_session_that_is_killed_has_saved_most(slow: Emulator, tmp_path: Path) -> None:
    """The state is saved after 20 tasks, and each time that their number has doubled; the end saves the rest."""
    path, sizes = tmp_path / "run.db", list[float]()

    class Counting(VirtualJournal):
        async def update_state(self, name: str, change: Callable[[State | None], State], /) -> None:
            await super().update_state(name, change)
            state = await self.load_state(name)
            assert state is not None
            sizes.append(state["finished"])

    async with session_on(slow, Counting(path)) as session:
        for _ in range(50):
            await generate(session, 2)
        kept_so_far = await stored(path)

    assert sizes == [20, 40, 80, 100]
    assert kept_so_far["finished"] == 80


async def test_a_schedule_that_is_given_is_its_owners(slow: Emulator, tmp_path: Path) -> None:
    """A schedule of the caller's is neither changed by the journal's state nor kept there."""
    path = tmp_path / "run.db"
    async with session_on(slow, VirtualJournal(path)) as session:
        await generate(session, 5)
    before = await stored(path)
    mine = LearnedSchedule()
    async with session_on(slow, VirtualJournal(path), mine) as session:
        expected = session.stats.median_duration
        await generate(session, 30)

    assert expected is None
    assert mine.state()["finished"] == 30
    assert session.schedule is mine
    assert await stored(path) == before


async def test_without_a_journal_a_session_learns_for_itself(slow: Emulator) -> None:
    """A session's schedule can be read, and goes on when the session is opened again."""
    session = session_on(slow, None)
    for _ in range(2):
        async with session:
            await generate(session, 2)

    assert isinstance(session.schedule, LearnedSchedule)
    assert session.schedule.state()["finished"] == 4


NEWER = LearnedSchedule().state() | {"version": 3, "finished": 7}


@pytest.mark.parametrize(
    ("state", "kept"),
    [({}, 2), ({"version": "new"}, 2), (LearnedSchedule().state() | {"finished": -1}, 2), (NEWER, 7)],
    ids=["empty", "damaged", "invalid", "newer"],
)
async def test_a_state_that_cannot_be_used_is_a_warning(
    slow: Emulator, tmp_path: Path, caplog: pytest.LogCaptureFixture, state: State, kept: int
) -> None:
    """A damaged state is replaced, that of a newer version left as it is; the session begins without, and works."""
    path = tmp_path / "run.db"
    async with VirtualJournal(path) as journal:
        await journal.update_state(NAME, lambda _: state)
    async with session_on(slow, VirtualJournal(path)) as session:
        expected = session.stats.median_duration
        await generate(session, 2)
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]

    assert expected is None
    assert [LOST in warning for warning in warnings] == [True]
    assert (await stored(path))["finished"] == kept


class Broken(VirtualJournal):
    """A journal that can't do what is named in `broken`."""

    broken: tuple[str, ...] = ()

    async def load_state(self, name: str, /) -> State | None:
        if "load" in self.broken:
            raise AttributeError("load_state")
        return await super().load_state(name)

    async def update_state(self, name: str, change: Callable[[State | None], State], /) -> None:
        if "update" in self.broken:
            raise JournalError("the disk is full")
        if "answer" in self.broken:
            await asyncio.Event().wait()
        await super().update_state(name, change)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ("load", f"{LOST}: load_state"),
        ("update", f"{NOT_KEPT}: the disk is full"),
        ("answer", f"{NOT_KEPT}: the journal"),
    ],
)
async def test_a_journal_that_fails_with_states_fails_no_request(
    slow: Emulator, tmp_path: Path, caplog: pytest.LogCaptureFixture, broken: str, message: str
) -> None:
    """What goes wrong with the state is a warning, and closing takes two seconds at most; the next end makes up for it."""
    path = tmp_path / "run.db"
    journal = Broken(path)
    journal.broken = (broken,)
    session, loop = session_on(slow, journal), asyncio.get_running_loop()
    async with session:
        await generate(session, 3)
        closing_at = loop.time()
    seconds = loop.time() - closing_at
    failed = caplog.text
    journal.broken = ()
    async with session_on(slow, VirtualJournal(path)) as other:
        await generate(other, 4)
    async with session:
        learned = session.schedule
    state = await stored(path)

    assert message in failed
    assert seconds < 2.1
    assert isinstance(learned, LearnedSchedule)
    assert learned.state()["finished"] == 7
    assert state["finished"] == 7


async def test_opening_that_is_cancelled_closes_the_journal(slow: Emulator, tmp_path: Path) -> None:
    """A session whose opening is cancelled while it reads the state is closed, and can be opened."""
    reading = asyncio.Event()

    class Slow(VirtualJournal):
        async def load_state(self, name: str, /) -> State | None:
            if not reading.is_set():
                reading.set()
                await asyncio.Event().wait()
            return await super().load_state(name)

    session = session_on(slow, Slow(tmp_path / "run.db"))
    opening = asyncio.ensure_future(session.__aenter__())
    await reading.wait()
    opening.cancel()
    with pytest.raises(asyncio.CancelledError):
        await opening
    with pytest.raises(SessionClosedError):
        await session.generate("a fox")
    async with session:
        await generate(session, 1)


# ---------------------------------------------------------------------- one by one


class States(Journal):
    """A journal of states alone."""

    def __init__(self) -> None:
        self.states: dict[str, State | None] = {}

    async def load_state(self, name: str, /) -> State | None:
        return self.states.get(name)

    async def update_state(self, name: str, change: Callable[[State | None], State], /) -> None:
        self.states[name] = change(self.states.get(name))


def end(schedule: LearnedSchedule, count: int) -> None:
    for _ in range(count):
        schedule.begin(None).finish(7.0, 8.0)


async def test_of_very_many_tasks_the_newest_are_kept() -> None:
    """Between two saves, the newest 400 tasks are kept in memory; at least every 2,000 tasks they are saved."""
    journal = States()  # type: ignore[abstract] # what is missing isn't called
    learning = SharedLearning(journal)
    spawned = list[int]()

    def spawn(work: Any) -> None:
        work.close()
        spawned.append(number)

    await learning.load(spawn)
    number = 0
    while number < 7000:
        number += 1
        end(learning.schedule, 1)
    await learning.save()
    await learning.save()
    state = journal.states[NAME]

    assert spawned == [20, 40, 80, 160, 320, 640, 1280, 2560, 4560, 6560]
    assert state is not None
    assert state["finished"] == 200
    assert state["durations"]["current"]["count"] == pytest.approx(200 * (1 - 0.995**400), rel=0.01)


async def test_a_task_that_ends_while_its_session_closes_is_saved_by_closing() -> None:
    """When a session starts nothing more, the save that is due is left to its end."""
    journal = States()  # type: ignore[abstract] # what is missing isn't called
    learning = SharedLearning(journal)

    def spawn(work: Any) -> None:
        work.close()
        raise SessionClosedError("the session is closed")

    await learning.load(spawn)
    end(learning.schedule, 25)
    before = dict(journal.states)
    await learning.save()

    assert before == {}
    assert journal.states[NAME] == learning.schedule.state()
