"""SubmitTurns: in order of their ranks, one at a time, and no turn is lost with one who leaves."""

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.virtual_time import VirtualTimeLoop

from flux2max_async._api.circuit_breaker import CircuitBreaker
from flux2max_async._api.submit_limiter import SubmitLimiter
from flux2max_async._api.submit_turns import SubmitTurns
from flux2max_async._stats import SessionCounters

FULL = 100
"""So many submits on the wire that no further one may start."""


def create(stats: SessionCounters) -> SubmitTurns:
    return SubmitTurns(stats, SubmitLimiter(24), CircuitBreaker(5), asyncio.get_running_loop().time)


class Submits:
    """Submits that wait for their turns, and start when there is room."""

    def __init__(self) -> None:
        self.stats = SessionCounters(submitting=FULL, submitted=FULL)
        self.turns = create(self.stats)
        self.started: list[int] = []
        self.ranks: dict[int, float] = {}
        self.tasks: list[asyncio.Task[None]] = []
        self.cancel_after: dict[int, int] = {}

    def add(self, rank: float) -> None:
        number = len(self.tasks)
        self.ranks[number] = rank
        self.tasks.append(asyncio.ensure_future(self._start(number)))

    async def _start(self, number: int) -> None:
        await self.turns.wait(lambda: self.ranks[number])
        assert self.stats.submitting < FULL
        self.stats.submitting += 1
        self.started.append(number)
        if number in self.cancel_after:
            self.tasks[self.cancel_after[number]].cancel()

    def free(self) -> None:
        self.stats.submitting -= 1
        self.turns.on_capacity_changed()


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


async def test_the_lowest_rank_goes_first() -> None:
    """Whoever has the turn starts first, then the others by their ranks at that time, equals in order."""
    submits = Submits()
    for rank in (5.0, 3.0, 4.0, 3.0, 9.0):
        submits.add(rank)
    await settle()
    submits.ranks[4] = 0.0
    for _ in range(5):
        submits.free()
        await settle()

    assert submits.started == [0, 4, 1, 3, 2]
    assert not submits.turns.must_wait or submits.stats.submitting == FULL


@pytest.mark.parametrize(("submitted", "on_wire"), [(0, 24), (1, 25), (24, 48), (75, 99), (76, 100), (1000, 100)])
async def test_accepted_submits_allow_more_at_the_same_time(submitted: int, on_wire: int) -> None:
    """At first 24 are on the wire, one more for each accepted one, and a hundred at most."""
    stats = SessionCounters(submitting=on_wire - 1, submitted=submitted)
    turns = create(stats)
    before = turns.must_wait
    stats.submitting += 1

    assert (before, turns.must_wait) == (False, True)


@pytest.mark.parametrize("leaver", [0, 1, 2])
async def test_one_who_leaves_passes_the_turn_on(leaver: int) -> None:
    """A submit that is cancelled, with the turn or without it, holds up nobody."""
    submits = Submits()
    for rank in range(3):
        submits.add(rank)
    await settle()
    submits.tasks[leaver].cancel()
    for _ in range(3):
        submits.free()
        await settle()

    assert submits.started == [number for number in range(3) if number != leaver]


async def test_a_turn_that_comes_in_the_moment_of_a_cancellation() -> None:
    """It goes to the next one."""
    submits = Submits()
    for rank in range(3):
        submits.add(rank)
    await settle()
    submits.stats.submitting -= 2
    submits.cancel_after[0] = 1  # in the moment in which it passes the turn on
    submits.turns.on_capacity_changed()
    await settle()

    assert submits.started == [0, 2]


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["add", "cancel", "free", "settle", "step"]), st.integers(0, 20))))
def test_every_turn_is_used(steps: list[tuple[str, int]]) -> None:
    """Whatever arrives, leaves and ends when: with room for all, all that have stayed start."""

    async def run() -> None:
        submits = Submits()
        for step, number in steps:
            if step == "add":
                submits.add(float(number))
            elif step == "cancel" and number < len(submits.tasks):
                submits.tasks[number].cancel()
            elif step == "free" and submits.stats.submitting:
                submits.free()
            elif step == "settle":
                await settle()
            else:
                await asyncio.sleep(0)
        submits.stats.submitting = -FULL
        submits.turns.on_capacity_changed()
        results = await asyncio.wait_for(asyncio.gather(*submits.tasks, return_exceptions=True), 60.0)
        stayed = [number for number, result in enumerate(results) if result is None]

        assert sorted(submits.started) == stayed
        assert not submits.turns.must_wait

    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        runner.run(run())
