"""SlotQueue: never more slots than there are, none lost, and the right order."""

import asyncio
import contextlib

import anyio
import anyio.lowlevel
import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.virtual_time import VirtualTimeLoop

from flux2max_async._tasks.slots import Place, SlotQueue


async def wait(queue: SlotQueue, place: Place) -> None:
    """Wait for a slot, as a request does."""
    try:
        await place.granted
    except asyncio.CancelledError:
        queue.leave(place)
        raise


async def order_of(*arrivals: tuple[float, str, int]) -> list[str]:
    """Return the order in which requests get the only slot: each arrives after so many seconds, with a priority."""
    queue, got = SlotQueue(0), []

    async def record(name: str, place: Place) -> None:
        await wait(queue, place)
        got.append(name)

    async with asyncio.TaskGroup() as group:
        for delay, name, priority in arrivals:
            await anyio.sleep(delay)
            group.create_task(record(name, queue.enqueue(priority)))
        for _ in arrivals:
            queue.release()
            await anyio.lowlevel.checkpoint()
    assert (queue.free, queue.waiting) == (0, 0)
    return got


@pytest.mark.parametrize(
    ("arrivals", "expected"),
    [
        pytest.param([(0, "a", 0), (0, "b", 0), (1, "c", 0)], "abc", id="equals in order"),
        pytest.param([(0, "a", 0), (1, "b", 1), (1, "c", 0)], "bac", id="the highest first"),
        pytest.param([(0, "a", -1), (1, "b", 0), (1, "c", 1)], "cba", id="below zero"),
        pytest.param([(0, "a", 0), (59, "b", 1)], "ba", id="almost a minute"),
        pytest.param([(0, "a", 0), (60, "b", 1)], "ab", id="a minute counts as one"),
        pytest.param([(0, "a", 0), (119, "b", 2), (2, "c", 2)], "bac", id="two minutes count as two"),
        pytest.param([(0, "a", 0), (1e5, "b", 10**400), (1e5, "c", 10**500)], "bca", id="too large for a float"),
        pytest.param([(0, "a", -(10**400)), (1e5, "b", -(10**18)), (0, "c", -7)], "cba", id="negative and large"),
    ],
)
async def test_order(arrivals: list[tuple[float, str, int]], expected: str) -> None:
    """The highest priority goes first, equals in order, and each minute of waiting counts as one more."""
    assert "".join(await order_of(*arrivals)) == expected


@pytest.mark.parametrize("next_one", [True, False])
async def test_cancelled_in_the_moment_of_the_grant(next_one: bool) -> None:
    """A slot that was granted to a waiter who is cancelled in the same moment goes to the next one, or is free."""
    queue = SlotQueue(0)
    waiters = [asyncio.ensure_future(wait(queue, queue.enqueue(0))) for _ in range(1 + next_one)]
    await anyio.sleep(1)
    queue.release()
    waiters[0].cancel()
    await asyncio.wait(waiters, timeout=1)

    assert [(waiter.done(), waiter.cancelled()) for waiter in waiters] == [(True, True), (True, False)][: len(waiters)]
    assert (queue.free, queue.waiting) == (0 if next_one else 1, 0)


async def test_many_that_leave_at_once() -> None:
    """10,000 waiters that are cancelled at once leave nothing behind, and the slot goes to the one that stays."""
    queue = SlotQueue(0)
    waiters = [asyncio.ensure_future(wait(queue, queue.enqueue(number % 3))) for number in range(10_000)]
    await anyio.sleep(1)
    stays = waiters.pop(5_000)
    for waiter in waiters:
        waiter.cancel()
    await asyncio.gather(*waiters, return_exceptions=True)
    entries, waiting = len(queue._heap), queue.waiting
    queue.release()
    await stays

    assert waiting == 1
    assert entries < 50
    assert (queue.free, queue.waiting) == (0, 0)


async def test_a_priority_that_changes_again_and_again() -> None:
    """Changes of the priority are free of leftovers, too, and the last one counts."""
    queue = SlotQueue(0)
    places = [queue.enqueue(0), queue.enqueue(1)]
    for number in range(1_000):
        queue.set_priority(places[0], number % 2 * 2)
    queue.release()
    granted = [place.granted.done() for place in places]
    queue.set_priority(places[0], 0)
    queue.set_priority(places[1], 0)
    queue.release()

    assert granted == [True, False]
    assert len(queue._heap) < 50
    assert all(place.granted.done() for place in places)


# ---------------------------------------------------------------------- whatever happens


@attrs.define(eq=False)
class Waiter:
    """One request of the model."""

    number: int
    arrived: float
    priority: int
    task: "asyncio.Task[None] | None" = None
    place: Place | None = None
    state: str = "waiting"
    """Then "granted", and "holding" or "gone"."""
    is_started: bool = False
    is_cancelled: bool = False

    @property
    def rank(self) -> tuple[float, int]:
        return self.arrived - 60.0 * self.priority, self.number


class Model:
    """Drives a queue, and predicts by sorting who has a slot."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.queue = SlotQueue(limit)
        self.waiters: list[Waiter] = []
        self.got: list[Waiter] = []

    def of(self, *states: str) -> list[Waiter]:
        return [waiter for waiter in self.waiters if waiter.state in states]

    def pick(self, index: int, *states: str) -> Waiter | None:
        candidates = self.of(*states)
        return candidates[index % len(candidates)] if candidates else None

    def grant(self) -> None:
        if waiting := self.of("waiting"):
            min(waiting, key=lambda waiter: waiter.rank).state = "granted"

    def arrive(self, _: int, priority: int) -> None:
        waiter = Waiter(len(self.waiters), asyncio.get_running_loop().time(), priority)
        is_free = len(self.of("granted", "holding")) < self.limit
        assert self.queue.try_acquire() is is_free
        if is_free:
            waiter.state = "holding"
        else:
            waiter.place = self.queue.enqueue(priority)
            waiter.task = asyncio.ensure_future(wait(self.queue, waiter.place))
        self.waiters.append(waiter)

    def release(self, index: int, _: int) -> None:
        if (waiter := self.pick(index, "holding")) is not None:
            waiter.state = "gone"
            self.queue.release()
            self.grant()

    def cancel(self, index: int, _: int) -> None:
        waiter = self.pick(index, "waiting", "granted")
        if waiter is not None and waiter.task is not None and waiter.is_started and not waiter.is_cancelled:
            waiter.is_cancelled = True
            waiter.task.cancel()
            if waiter.state == "waiting":
                waiter.state = "gone"

    def change(self, index: int, priority: int) -> None:
        waiter = self.pick(index, "waiting", "granted")
        if waiter is not None and waiter.place is not None:
            self.queue.set_priority(waiter.place, priority)
            if waiter.state == "waiting":
                waiter.priority = priority

    async def settle(self, seconds: float) -> None:
        """Let everything run, and compare."""
        await asyncio.sleep(seconds)
        for waiter in self.waiters:
            waiter.is_started = True
        while passed_on := [waiter for waiter in self.of("granted") if waiter.is_cancelled]:
            for waiter in passed_on:  # cancelled in the moment of the grant
                waiter.state = "gone"
                self.grant()
        for waiter in self.of("granted"):
            waiter.state = "holding"
        await asyncio.sleep(1e-6)
        holding = self.of("holding")
        really = [w for w in holding if w.task is None or (w.task.done() and not w.task.cancelled())]
        assert really == holding
        assert not any(waiter.task and waiter.task.done() for waiter in self.of("waiting"))
        assert len(holding) + self.queue.free == self.limit
        assert self.queue.waiting == len(self.of("waiting"))
        assert not (self.queue.free and self.queue.waiting)


async def drive(limit: int, steps: list[tuple[str, int, int, float]]) -> None:
    model = Model(limit)
    for action, index, priority, seconds in steps:
        if action == "settle":
            await model.settle(seconds)
        else:
            getattr(model, action)(index, priority)
    await model.settle(1.0)
    while model.of("holding", "waiting"):
        model.release(0, 0)
        await model.settle(0.001)
    assert model.queue.free == limit
    for waiter in model.waiters:
        if waiter.task is not None:
            with contextlib.suppress(asyncio.CancelledError):
                await waiter.task


actions = st.sampled_from(["arrive", "arrive", "arrive", "release", "release", "cancel", "change", "settle"])
steps = st.tuples(actions, st.integers(0, 20), st.integers(-2, 3), st.sampled_from([0.001, 1.0, 29.0, 60.0]))


@settings(deadline=None)
@given(st.integers(1, 3), st.lists(steps, max_size=40))
def test_whatever_happens_in_whatever_order(limit: int, steps: list[tuple[str, int, int, float]]) -> None:
    """Arrivals, ends, cancellations and changes of priority, also several in one moment: as a sorted list would do."""
    anyio.run(drive, limit, steps, backend_options={"loop_factory": VirtualTimeLoop})
