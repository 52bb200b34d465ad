"""The file of a limit: never more slots than there are, none lost, in turn, and back from the dead."""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from flux2max_async._shared_limit.store import KEEP_TIME, LimitStore, Row, holders_to_grant
from flux2max_async._wake_pipe import WakePipe, pipe_path


class Holder:
    """One of those who share the file, as a session does it."""

    def __init__(self, path: Path, name: str, slots: int, *, kept: bool = False) -> None:
        self.path, self.name = path, name
        self.pipe = WakePipe(pipe_path(path, name))
        self.store = LimitStore(path, name, slots, keep_after_death=kept)
        self.held = 0
        self.waits = False
        self.now = 0.0
        self.update()

    def update(self, *, adopted: int = 0) -> list[str]:
        """Run one transaction, and return whom it has granted a slot."""
        update = self.store.update(self.held, self.now, waits=self.waits, adopted=adopted)
        self.held += update.granted
        self.waits = self.waits and not update.granted
        return update.woken

    def acquire(self) -> bool:
        self.waits = True
        self.update()
        return not self.waits

    def release(self) -> list[str]:
        self.held -= 1
        return self.update()

    def occupy(self) -> None:
        self.held += 1
        self.update(adopted=1)

    def die(self) -> None:
        """End as a killed process does."""
        self.store.close()
        self.pipe.close_descriptors()

    def leave(self) -> list[str]:
        woken = self.store.leave()
        self.store.close()
        self.pipe.close()
        return woken


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Holder]]:
    with ExitStack() as stack:

        def start_holder(name: str, slots: int = 2, *, kept: bool = False) -> Holder:
            holder = Holder(tmp_path / "limit.db", name, slots, kept=kept)
            stack.callback(holder.die)
            return holder

        yield start_holder


# ------------------------------------------------------------------ who is next


@given(
    st.lists(
        st.tuples(st.integers(1, 6), st.integers(0, 3), st.none() | st.integers(1, 50), st.integers(0, 1)), max_size=6
    )
)
def test_the_longest_waiting_are_granted_what_is_free(holders: list[tuple[int, int, int | None, int]]) -> None:
    """Those who have waited longest get what is free, each within its own limit, and nobody who could have one waits."""
    rows: list[Row] = [(f"h{number}", *columns) for number, columns in enumerate(holders)]
    total = sum(held + granted for _, _, held, _, granted in rows)
    slots = {name: limit for name, limit, *_ in rows}
    waiting = sorted((ticket, name) for name, _, _, ticket, _ in rows if ticket is not None)
    chosen = holders_to_grant(rows)

    assert len(chosen) == len(set(chosen))
    assert [name for _, name in waiting if name in chosen] == chosen
    for number, name in enumerate(chosen):
        assert total + number < slots[name]
    for _, name in waiting:
        if name not in chosen:
            assert total + len(chosen) >= slots[name]


def test_slots_go_in_turn(start: Callable[..., Holder]) -> None:
    """A holder whose session has many requests waiting gets every other slot, beside one that has come later."""
    busy, late = start("busy", 1), start("late", 1)
    order = [busy.acquire(), busy.acquire(), late.acquire()]
    assert order == [True, False, False]
    turns: list[str] = []
    for _ in range(6):
        (busy if busy.held else late).release()
        for holder in (busy, late):
            holder.update()
            if not holder.waits:
                turns.append(holder.name)
                holder.acquire()

    assert turns == ["busy", "late", "busy", "late", "busy", "late"]


def test_a_grant_that_nobody_waits_for_any_more(start: Callable[..., Holder]) -> None:
    """A slot that was granted to a holder which has ceased to wait goes to the next one."""
    first, second, third = start("1", 1), start("2", 1), start("3", 1)
    assert (first.acquire(), second.acquire(), third.acquire()) == (True, False, False)
    assert first.release() == ["2"]
    second.waits = False

    assert second.update() == ["3"]
    third.update()
    assert (second.held, third.held, third.waits) == (0, 1, False)


def test_limits_that_differ(start: Callable[..., Holder]) -> None:
    """Each holder keeps to its own limit: one with a larger one goes on where the other has to wait."""
    small, large = start("small", 1), start("large", 3)

    assert (large.acquire(), small.acquire(), large.acquire(), large.acquire()) == (True, False, True, True)
    assert large.release() == []
    assert large.release() == []
    assert large.release() == ["small"]


def test_leaving(start: Callable[..., Holder]) -> None:
    """Whoever leaves gives back everything, to those who wait."""
    first, second = start("1"), start("2")
    assert first.acquire()
    assert first.acquire()
    assert not second.acquire()

    assert first.leave() == ["2"]
    second.update()
    assert (second.held, second.acquire()) == (1, True)


# ------------------------------------------------------------------ the dead


@pytest.mark.parametrize("granted", [False, True])
def test_slots_of_the_dead(start: Callable[..., Holder], granted: bool) -> None:
    """Slots of a holder that has died, and one that was just granted to it, go to whoever waits."""
    dead, other, waiting = start("dead"), start("other"), start("waiting")
    assert other.acquire()
    if granted:
        assert other.acquire()
        assert not dead.acquire()
        assert other.release() == ["dead"]
    else:
        assert dead.acquire()
    dead.die()

    assert waiting.acquire()
    assert not dead.pipe.exists()


def test_slots_of_the_dead_are_kept_until_their_tasks_are_adopted(start: Callable[..., Holder]) -> None:
    """With a journal, slots of the dead count until somebody has adopted their tasks, or for so many seconds."""
    dead, adopter, waiting = start("dead", 3, kept=True), start("adopter", 3), start("waiting", 3)
    assert [dead.acquire() for _ in range(3)] == [True, True, True]
    dead.die()
    waiting.now = 100.0
    assert not waiting.acquire()
    adopter.now = 101.0
    adopter.occupy()
    adopter.occupy()
    waiting.now = 100.0 + KEEP_TIME - 0.1
    waiting.update()
    assert waiting.waits

    waiting.now = 100.0 + KEEP_TIME
    waiting.update()
    assert (waiting.held, adopter.held) == (1, 2)
    assert not waiting.acquire(), "two are adopted"


def test_a_grant_to_the_dead_is_not_kept(start: Callable[..., Holder]) -> None:
    """What was granted to a holder that died before it could use it is no task, and free at once."""
    dead, other, waiting = start("dead", kept=True), start("other"), start("waiting")
    assert dead.acquire()
    assert other.acquire()
    assert not dead.acquire()
    assert other.release() == ["dead"]
    dead.die()

    assert waiting.acquire()
    assert not waiting.acquire()


def test_tasks_are_adopted_before_the_death_was_noticed(start: Callable[..., Holder]) -> None:
    """The slots move with the tasks: the first adoption finds the death; one too many counts above the limit."""
    dead, adopter = start("dead", kept=True), start("adopter")
    assert [dead.acquire() for _ in range(2)] == [True, True]
    dead.die()
    for _ in range(3):
        adopter.occupy()

    assert adopter.held == 3
    adopter.release()
    adopter.release()
    assert (adopter.acquire(), adopter.acquire()) == (True, False)


def test_a_new_start_of_the_machine(start: Callable[..., Holder]) -> None:
    """Slots that are kept since a time that is to come, by a clock that has begun anew, are free."""
    dead, waiting = start("dead", 1, kept=True), start("waiting", 1)
    assert dead.acquire()
    dead.die()
    waiting.now = 1000.0
    assert not waiting.acquire()
    waiting.now = 5.0
    waiting.update()

    assert waiting.held == 1


def test_a_holder_that_was_taken_for_dead(start: Callable[..., Holder]) -> None:
    """A holder whose pipe was deleted, and which lives, counts again with its next change."""
    alive, other = start("alive", 1), start("other", 1)
    assert alive.acquire()
    alive.pipe.path.unlink()
    assert other.acquire()
    alive.pipe = WakePipe(alive.pipe.path)
    alive.update()

    assert other.release() == []
    assert not other.acquire(), "the other one has it again"


class Holders(RuleBasedStateMachine):
    """Holders that come and go, take and give back slots, and die, in any order."""

    @initialize(slots=st.integers(1, 4))
    def begin(self, slots: int) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.path = Path(self.folder.name).resolve() / "limit.db"
        self.slots = slots
        self.holders: list[Holder] = []
        self.started = 0

    def pick(self, number: int) -> Holder:
        return self.holders[number % len(self.holders)]

    @rule()
    def start(self) -> None:
        self.started += 1
        self.holders.append(Holder(self.path, str(self.started), self.slots))

    @precondition(lambda self: self.holders)
    @rule(number=st.integers(0, 9))
    def acquire(self, number: int) -> None:
        self.pick(number).acquire()

    @precondition(lambda self: self.holders)
    @rule(number=st.integers(0, 9))
    def release(self, number: int) -> None:
        holder = self.pick(number)
        if holder.held:
            holder.release()

    @precondition(lambda self: self.holders)
    @rule(number=st.integers(0, 9))
    def cease_to_wait(self, number: int) -> None:
        holder = self.pick(number)
        holder.waits = False
        holder.update()

    @precondition(lambda self: self.holders)
    @rule(number=st.integers(0, 9))
    def die(self, number: int) -> None:
        holder = self.pick(number)
        self.holders.remove(holder)
        holder.die()

    @precondition(lambda self: self.holders)
    @rule(number=st.integers(0, 9))
    def leave(self, number: int) -> None:
        holder = self.pick(number)
        self.holders.remove(holder)
        holder.leave()

    @invariant()
    def slots_are_used_and_never_more_than_there_are(self) -> None:
        """Once everybody has looked, nobody waits while a slot is free."""
        for holder in [*getattr(self, "holders", []), *getattr(self, "holders", [])]:
            holder.update()
        held = sum(holder.held for holder in getattr(self, "holders", []))
        if any(holder.waits for holder in getattr(self, "holders", [])):
            assert held == self.slots
        assert held <= getattr(self, "slots", 0)

    def teardown(self) -> None:
        for holder in getattr(self, "holders", []):
            holder.die()
        if hasattr(self, "folder"):
            self.folder.cleanup()


TestHolders = Holders.TestCase
TestHolders.settings = settings(max_examples=15, stateful_step_count=25, deadline=None)
