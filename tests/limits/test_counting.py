"""What the sessions that share a limit count: never more slots than there are, none lost, in turn, back from the dead."""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from support.limits import PATIENCE, Backend, ConnectionHolder, die


class Holder(ConnectionHolder):
    """One of those who share a limit, as a session's thread does it."""

    def __init__(self, backend: Backend, slots: int = 1, *, kept: bool = False) -> None:
        super().__init__(backend.connection(slots, kept=kept))

    def has_got_one(self) -> bool:
        """Look whether another one has granted a slot; return whether this one waits no more."""
        self.update()
        return not self.waits


Start = Callable[..., Holder]


@pytest.fixture
def start(backend: Backend) -> Iterator[Start]:
    with ExitStack() as stack:

        def start_holder(slots: int = 1) -> Holder:
            holder = Holder(backend, slots)
            stack.callback(holder.connection.close)
            return holder

        yield start_holder


def test_slots_go_in_turn(start: Start) -> None:
    """A holder whose session has many requests waiting gets every other slot, beside one that has come later."""
    busy, late = start(), start()
    assert [busy.acquire(), busy.acquire(), late.acquire()] == [True, False, False]
    turns: list[str] = []
    for _ in range(6):
        (busy if busy.held else late).release()
        for holder, name in ((busy, "busy"), (late, "late")):
            if holder.has_got_one():
                turns.append(name)
                holder.acquire()

    assert turns == ["busy", "late", "busy", "late", "busy", "late"]


def test_a_grant_that_nobody_waits_for_any_more(start: Start) -> None:
    """A slot that was granted to a holder which has ceased to wait goes to the next one."""
    first, second, third = start(), start(), start()
    assert [first.acquire(), second.acquire(), third.acquire()] == [True, False, False]
    first.release()
    second.waits = False
    second.update()

    assert third.has_got_one()
    assert (first.held, second.held, third.held) == (0, 0, 1)


def test_limits_that_differ(start: Start) -> None:
    """Each holder keeps to its own limit: one with a larger one goes on where the other has to wait."""
    small, large = start(1), start(3)
    assert [large.acquire(), small.acquire(), large.acquire(), large.acquire()] == [True, False, True, True]
    got: list[bool] = []
    for _ in range(3):
        large.release()
        got.append(small.has_got_one())

    assert got == [False, False, True]


def test_several_are_granted_at_once(start: Start) -> None:
    """Whoever gives back several slots grants them to those who have waited longest."""
    first, *others = start(3), start(3), start(3), start(3)
    assert [first.acquire() for _ in range(3)] == [True] * 3
    assert not any(holder.acquire() for holder in others)
    first.held = 1
    first.update()

    assert [holder.has_got_one() for holder in others] == [True, True, False]


def test_leaving(start: Start) -> None:
    """Whoever leaves gives back everything, to those who wait."""
    first, second = start(2), start(2)
    assert [first.acquire(), first.acquire(), second.acquire()] == [True, True, False]
    first.connection.close()

    assert second.has_got_one()
    assert second.acquire()


def test_more_than_there_are(start: Start) -> None:
    """Tasks that run already count above the limit, and nobody gets a slot until enough of them have ended."""
    first, second = start(1), start(1)
    assert first.acquire()
    first.held += 2
    first.update(adopted=2)
    got = [second.acquire()]
    for _ in range(3):
        first.release()
        got.append(second.has_got_one())

    assert got == [False, False, False, True]


def test_a_holder_that_was_away(start: Start) -> None:
    """A holder whose connection has failed counts again once it is back."""
    away, other = start(1), start(1)
    assert away.acquire()
    away.connection.disconnect()
    away.update()

    assert not other.acquire()
    away.release()
    assert other.has_got_one()


class Holders(RuleBasedStateMachine):
    """Holders that come and go, take and give back slots, and die, in any order."""

    new_backend: Callable[[str], Backend]
    numbers = iter(range(1_000_000))

    @initialize(slots=st.integers(1, 4))
    def begin(self, slots: int) -> None:
        self.backend = type(self).new_backend(str(next(self.numbers)))
        self.slots = slots
        self.holders: list[Holder] = []

    def pick(self, number: int) -> Holder:
        return self.holders[number % len(self.holders)]

    @rule()
    def start(self) -> None:
        self.holders.append(Holder(self.backend, self.slots))

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
    def lose_the_connection(self, number: int) -> None:
        holder = self.pick(number)
        holder.connection.disconnect()
        holder.update()

    @precondition(lambda self: self.holders)
    @rule(number=st.integers(0, 9))
    def die(self, number: int) -> None:
        holder = self.pick(number)
        self.holders.remove(holder)
        die(holder.connection)

    @precondition(lambda self: self.holders)
    @rule(number=st.integers(0, 9))
    def leave(self, number: int) -> None:
        holder = self.pick(number)
        self.holders.remove(holder)
        holder.connection.close()

    @invariant()
    def slots_are_used_and_never_more_than_there_are(self) -> None:
        """Once everybody has looked, nobody waits while a slot is free."""
        holders = getattr(self, "holders", [])
        deadline = time.monotonic() + PATIENCE
        while True:
            for holder in [*holders, *holders]:
                holder.update()
            held = sum(holder.held for holder in holders)
            assert held <= getattr(self, "slots", 0)
            if held == getattr(self, "slots", 0) or not any(holder.waits for holder in holders):
                break
            # A server frees the locks of a connection that is closed when it notices that.
            assert time.monotonic() < deadline

    def teardown(self) -> None:
        for holder in getattr(self, "holders", []):
            holder.connection.close()


TestHolders = Holders.TestCase
TestHolders.settings = settings(
    max_examples=10, stateful_step_count=20, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)


@pytest.fixture(autouse=True)
def _new_backend(new_backend: Callable[[str], Backend]) -> None:
    Holders.new_backend = staticmethod(new_backend)
