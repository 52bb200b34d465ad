"""SlotQueue: never more slots than there are, none lost, and the right order, with turns of groups."""

import copy
from typing import Any

import anyio
import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.virtual_time import VirtualTimeLoop

from flux2max_async import FluxError
from flux2max_async._tasks.slots import Place, SlotQueue
from flux2max_async._tasks.sorted_line import SortedLine


@attrs.define(eq=False)
class Request:
    """A request that waits for a slot."""

    name: str
    got: list[str]
    place: Place | None = None

    def on_slot(self) -> None:
        self.got.append(self.name)

    def on_no_slot(self, error: FluxError) -> None:
        raise AssertionError


Arrival = tuple[float, str, int, str | None]
"""After so many seconds, a request with this name arrives, with a priority and a group."""


async def arrive(queue: SlotQueue, got: list[str], *arrivals: Arrival) -> dict[str, Place]:
    """Let requests arrive; return their places."""
    places = {}
    for delay, name, priority, group in arrivals:
        await anyio.sleep(delay)
        places[name] = queue.enqueue(Request(name, got), priority, group)
    return places


async def order_of(*arrivals: Arrival) -> list[str]:
    """Return the order in which requests get the only slot."""
    queue, got = SlotQueue(0), list[str]()
    queue.count_held(None)
    await arrive(queue, got, *arrivals)
    for _ in arrivals:
        queue.release()
        queue.count_held(None)
    assert (queue.free, queue.waiting, queue.counted) == (0, 0, 0)
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
    assert "".join(await order_of(*[(*arrival, None) for arrival in arrivals])) == expected
    assert "".join(await order_of(*[(*arrival, f"group {arrival[1]}") for arrival in arrivals])) == expected


@pytest.mark.parametrize(
    ("arrivals", "expected"),
    [
        pytest.param("a1 a2 a3 b1 b2", "a1 b1 a2 b2 a3", id="two groups"),
        pytest.param("a1 a2 a3 -1 -2 b1", "a1 -1 -2 b1 a2 a3", id="each request without a group is one of its own"),
        pytest.param("a1 a2 a3 a4 b1 c1 c2 c3", "a1 b1 c1 a2 c2 a3 c3 a4", id="three groups"),
        pytest.param("a1 a2 +b1 +b2 +c1", "b1 c1 b2 a1 a2", id="the highest priority first, in turns"),
        pytest.param("a1 a2 +a3 b1", "a3 a1 b1 a2", id="the highest priority of a group first"),
        pytest.param("a1 a2 a3 60 +b1 +b2", "a1 b1 b2 a2 a3", id="a minute counts for the first of a group"),
        pytest.param("a1 a2 a3 59 +b1 +b2", "b1 b2 a1 a2 a3", id="a little less doesn't"),
        pytest.param("a1 a2 a3 300 b1", "a1 b1 a2 a3", id="a long queue doesn't make a group more urgent"),
    ],
)
async def test_turns_of_groups(arrivals: str, expected: str) -> None:
    """Among equal priorities groups take turns, whoever has more requests waiting, and each group's go in order."""
    requests, delay = [], 0.0
    for word in arrivals.split():
        if word.isdigit():
            delay = float(word)
            continue
        name = word.removeprefix("+")
        requests.append((delay, name, int(name != word), None if name[0] == "-" else name[0]))
        delay = 0.0
    assert await order_of(*requests) == expected.split()


async def test_a_group_at_its_bound_blocks_nobody() -> None:
    """A group holds at most `max_per_group` slots: others go before it, and it goes on when one of its own is free."""
    queue, got = SlotQueue(3, max_per_group=2), list[str]()
    taken = [queue.try_acquire("a") for _ in range(3)]
    places = await arrive(queue, got, (0, "a3", 0, "a"), (0, "a4", 1, "a"))
    alone, wanted = queue.try_acquire(None), queue.is_wanted
    await arrive(queue, got, (1, "b1", 0, "b"), (1, "b2", 0, "b"))
    at_bound = [queue.position(place) for place in places.values()]
    queue.release(None)
    queue.release("a")
    queue.release("a")
    queue.release("b")

    assert (taken, alone, wanted) == ([True, True, False], True, False)
    assert at_bound == [2, 1]
    assert got == ["b1", "a4", "a3", "b2"]
    assert (queue.free, queue.held, queue.waiting) == (0, 3, 0)


async def test_a_free_slot_while_only_groups_at_their_bound_wait() -> None:
    """A slot that nobody may have stays free for others, and the group that waits gets it when it may."""
    queue, got = SlotQueue(2, max_per_group=1), list[str]()
    assert queue.try_acquire("a")
    await arrive(queue, got, (0, "a2", 0, "a"), (0, "a3", 0, "a"))
    free = queue.free
    queue.release("a")
    queue.release("a")
    queue.release("a")

    assert (free, queue.free, queue.held) == (1, 2, 0)
    assert got == ["a2", "a3"]
    assert not queue._groups


async def test_many_that_leave_at_once() -> None:
    """10,000 requests that leave at once leave nothing behind, and the slot goes to the one that stays."""
    queue, got = SlotQueue(0), list[str]()
    places = [queue.enqueue(Request(str(number), got), number % 3, "ab"[: number % 2]) for number in range(10_000)]
    for place in places:
        if place.waiter.name != "5000":  # type: ignore[attr-defined]
            queue.leave(place)
            queue.leave(place)
    entries, groups, positions = sum(map(len, queue._lines.values())), len(queue._groups), queue.position(places[5_000])
    queue.count_held(None)
    queue.release()

    assert (entries, groups, positions) == (1, 1, 1)
    assert queue.position(places[0]) is None
    assert (queue.free, queue.waiting, got) == (0, 0, ["5000"])


async def test_a_priority_that_changes_again_and_again() -> None:
    """The last priority counts, and changes leave nothing behind."""
    queue, got = SlotQueue(0), list[str]()
    places = list((await arrive(queue, got, (0, "a", 0, None), (0, "b", 1, None))).values())
    for number in range(1_001):
        queue.set_priority(places[0], (number + 1) % 2 * 2)
    queue.count_held(None)
    queue.release()
    queue.set_priority(places[0], 0)
    queue.set_priority(places[1], 0)
    queue.set_priority(places[1], 0)
    queue.count_held(None)
    queue.release()

    assert got == ["a", "b"]
    assert not queue._lines


# ---------------------------------------------------------------------- whatever happens


@attrs.define(eq=False)
class Waiting:
    """A request in the model."""

    number: int
    arrived: float
    priority: int
    group: str | None

    @property
    def row(self) -> tuple[int, Any]:
        return self.priority, self.number if self.group is None else self.group


class Model:
    """Predicts by looking at every request who is the next."""

    def __init__(self, limit: int, bound: int | None) -> None:
        self.limit = limit
        self.bound = bound
        self.number = 0
        self.waiting: list[Waiting] = []
        self.holding: list[Waiting] = []
        self.turns: dict[tuple[int, Any], tuple[float, int]] = {}

    def may_hold(self, group: str | None) -> bool:
        held = [request for request in self.holding if request.group == group]
        return group is None or self.bound is None or len(held) < self.bound

    def key(self, row: tuple[int, Any]) -> tuple[float, int]:
        first = min((request.arrived, request.number) for request in self.waiting if request.row == row)
        start, number = max(first, self.turns.get(row, first))
        return start - 60.0 * row[0], number

    def next(self, now: float) -> Waiting | None:
        """Return the next one, and let it hold a slot."""
        rows = {request.row for request in self.waiting if self.may_hold(request.group)}
        if not rows or len(self.holding) >= self.limit:
            return None
        row = min(rows, key=self.key)
        request = min((request for request in self.waiting if request.row == row), key=lambda request: request.number)
        self.number += 1
        self.turns[row] = now, self.number
        self.waiting.remove(request)
        self.holding.append(request)
        self.forget()
        return request

    def forget(self) -> None:
        """A row that is empty has no last turn."""
        rows = {request.row for request in self.waiting}
        self.turns = {row: turn for row, turn in self.turns.items() if row in rows}

    def position(self, request: Waiting) -> int | None:
        """Return how many requests have a turn until this one has."""
        if request not in self.waiting:
            return None
        model = copy.copy(self)
        model.limit, model.bound = 10**6, None
        model.waiting, model.holding, model.turns = self.waiting[:], [], dict(self.turns)
        for position in range(1, len(self.waiting) + 1):
            # Each turn comes later than all that has happened.
            if model.next(1e9 + position) is request:
                return position
        raise AssertionError("it has no turn")


class Driver:
    """Drives a queue and the model."""

    def __init__(self, limit: int, bound: int | None, *, with_positions: bool) -> None:
        self.model = Model(limit, bound)
        self.with_positions = with_positions
        self.got: list[Waiting] = []
        self.places: dict[Waiting, Place] = {}

    async def run(self, limit: int, bound: int | None, steps: list[tuple[str, int, int, str | None, float]]) -> None:
        self.queue = SlotQueue(limit, max_per_group=bound)
        for action, index, priority, group, seconds in steps:
            await anyio.sleep(seconds)
            getattr(self, action)(index, priority, group)
            self.check()
        while self.model.holding or self.model.waiting:
            self.release(0, 0, None)
            self.check()
        assert self.queue.free == limit
        assert not self.queue._groups
        assert not self.queue._lines

    def check(self) -> None:
        model, queue = self.model, self.queue
        assert (queue.waiting, queue.held) == (len(model.waiting), len(model.holding))
        assert queue.held + queue.free == model.limit
        for request, place in self.places.items() if self.with_positions else ():
            assert queue.position(place) == model.position(request)

    def arrive(self, _: int, priority: int, group: str | None) -> None:
        model = self.model
        request = Waiting(model.number + 1, anyio.current_time(), priority, group)
        is_free = model.may_hold(group) and len(model.holding) < model.limit
        assert self.queue.try_acquire(group) is is_free
        if is_free:
            model.holding.append(request)
            return
        model.number += 1
        model.waiting.append(request)
        self.places[request] = self.queue.enqueue(Slot(request, self.got), priority, group)

    def release(self, index: int, _: int, __: str | None) -> None:
        model = self.model
        if model.holding:
            group = model.holding.pop(index % len(model.holding)).group
            expected = model.next(anyio.current_time())
            self.queue.release(group)
            assert self.got == ([] if expected is None else [expected])
            self.got.clear()

    def leave(self, index: int, _: int, __: str | None) -> None:
        if self.model.waiting:
            request = self.model.waiting.pop(index % len(self.model.waiting))
            self.model.forget()
            self.queue.leave(self.places[request])

    def change(self, index: int, priority: int, _: str | None) -> None:
        if self.model.waiting:
            request = self.model.waiting[index % len(self.model.waiting)]
            self.queue.set_priority(self.places[request], priority)
            request.priority = priority
            self.model.forget()


@attrs.frozen
class Slot:
    """Records who got a slot."""

    request: Waiting
    got: list[Waiting]

    def on_slot(self) -> None:
        self.got.append(self.request)

    def on_no_slot(self, error: FluxError) -> None:
        raise AssertionError


def actions(priorities: st.SearchStrategy[int]) -> st.SearchStrategy[list[Any]]:
    kinds = st.sampled_from(["arrive", "arrive", "arrive", "release", "release", "leave", "change"])
    seconds = st.sampled_from([0.0, 0.0, 0.001, 1.0, 29.0, 60.0])
    return st.lists(
        st.tuples(kinds, st.integers(0, 20), priorities, st.sampled_from([None, "a", "b", "c"]), seconds), max_size=40
    )


@settings(deadline=None)
@given(st.integers(1, 3), st.sampled_from([None, 1, 2]), actions(st.integers(-2, 3)))
def test_whatever_happens_in_whatever_order(limit: int, bound: int | None, steps: list[Any]) -> None:
    """Arrivals, ends, leavers and changes of priority, also several in one moment: as a search of all would do."""
    driver = Driver(limit, bound, with_positions=False)
    anyio.run(driver.run, limit, bound, steps, backend_options={"loop_factory": VirtualTimeLoop})


@settings(deadline=None)
@given(actions(st.just(0)))
def test_positions(steps: list[Any]) -> None:
    """Among equal priorities, a position is the number of turns until one's own, at each moment."""
    driver = Driver(1, None, with_positions=True)
    anyio.run(driver.run, 1, None, steps, backend_options={"loop_factory": VirtualTimeLoop})


async def test_positions_beside_other_priorities() -> None:
    """All requests of higher groups that are before one count, and the first of lower ones that have waited longer."""
    queue, got = SlotQueue(0), list[str]()
    places = await arrive(
        queue,
        got,
        (0, "l1", 0, "l"),
        (0, "l2", 0, "l"),
        (90, "h1", 2, "h"),
        (0, "h2", 2, "h"),
        (0, "m1", 1, None),
        (0, "x1", 0, None),
    )
    assert {name: queue.position(place) for name, place in places.items()} == {
        "h1": 1, "h2": 2, "l1": 3, "m1": 4, "l2": 6, "x1": 5,
    }  # fmt: skip


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 200)), max_size=300))
def test_sorted_line(steps: list[tuple[bool, int]]) -> None:
    """Entries that come and leave anywhere, and mostly at the front, are those of a sorted list."""
    line, expected = SortedLine[str](), list[tuple[float, int, str]]()
    for number, (joins, index) in enumerate([(True, 0)] * 100 + steps + [(False, 0)] * 90):
        if joins:
            entry = (float(index), number, "")
            line.add(entry)
            expected = sorted([*expected, entry])
        elif expected:
            line.remove(expected.pop(index % len(expected) if index % 3 == 0 else 0))
        assert len(line) == len(expected)
        assert not expected or line.first == expected[0]
        assert line.count_before((float(index), number)) == sum(entry < (index, number) for entry in expected)
