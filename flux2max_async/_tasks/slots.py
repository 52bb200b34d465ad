"""Whose turn it is: requests that wait for one of the session's slots, by priority, age, and turns of groups."""

import asyncio
from bisect import bisect_left, insort
from operator import attrgetter
from typing import Protocol

import attrs

from flux2max_async._exceptions import FluxError
from flux2max_async._tasks.sorted_line import SortedLine

_SECONDS_PER_PRIORITY = 60.0
"""After so many seconds of waiting, a request goes as one of the next higher priority: none waits for ever."""
_MAX_PRIORITY = 2**63
"""Higher ones count as this: they could not be compared with times."""

_number = attrgetter("number")


class Waiter(Protocol):
    """Who waits for a slot."""

    def on_slot(self) -> None:
        """Called with the slot, which is the waiter's from now on; must not raise."""

    def on_no_slot(self, error: FluxError) -> None:
        """Called if there is no way to get a slot; the waiter then leaves the queue."""


@attrs.define(eq=False, weakref_slot=False)
class Place:
    """The place of one request in the queue."""

    waiter: Waiter
    arrived: float
    number: int
    """The number of its arrival."""
    counted: bool
    """Whether it counts as one of `max_waiting`."""
    row: "_Row | None"
    """None when it has a slot, or has left."""


@attrs.define(eq=False, weakref_slot=False)
class _Group:
    """The slots and the waiting requests of one group."""

    name: str
    held: int = 0
    rows: "dict[int, _Row]" = attrs.field(factory=dict)
    """By priority."""


@attrs.define(eq=False, weakref_slot=False)
class _Row:
    """The requests of one group and priority that wait; one without a group has a row of its own."""

    priority: int
    group: _Group | None
    places: list[Place]
    """In order of arrival; never empty while the row is in use."""
    last_turn: tuple[float, int] = (0.0, 0)
    """When one of them got a slot, and the number of that turn."""
    entry: "tuple[float, int, _Row] | None" = None
    """What stands for the row in its line; None while the group holds all the slots it may hold."""

    def key(self) -> tuple[float, int]:
        """Return what orders the row: the lowest is the next."""
        since, number = max((self.places[0].arrived, self.places[0].number), self.last_turn)
        return since - _SECONDS_PER_PRIORITY * self.priority, number


# A slot is free, or held by a request. `try_acquire()` takes a free one, `release()` gives one back: to the first
# request in the queue, by calling its waiter's `on_slot()`, or to nobody, and then it is free.
#
# Groups take turns as in start-time fair queueing: the first request of a row starts at its arrival, or at the last
# turn of its row, whichever is later, and the row that started first is the next. So a group joins the end of the line
# again with each slot that it gets, however many of its requests wait, and requests without a group, each of which is a
# row of its own, go in order of arrival. A row starts 60 s earlier for each step of its priority. So the order of two
# rows never changes with time, although age counts: one that has waited for a minute and a new one that is one priority
# higher are equals. The age of a request counts from the moment at which only other groups are before it; otherwise a
# group with a backlog of more than a minute would have all slots until the backlog has gone.
#
# A group that holds `max_per_group` slots has no row in a line, and keeps its start: it returns when it gives one back.
# There is one line for each priority and each number of requests in a row, so that `position()` can count without
# looking at each request. There are few lines: one without groups, and at most about sqrt(2 n) for n waiting requests.
#
# With n waiting requests, a turn, an arrival, and a request that leaves cost a binary search, O(log n), and the time to
# move at most 8 n bytes; mostly neither, because rows leave at the front of a line and join at its end. `position()` is
# O(lines * log n).
#
# Invariants: a slot is free only while everybody who waits belongs to a group at its bound; `waiting` is the number of
# places with a row; `held` is the number of slots that were taken or granted and not given back.
class SlotQueue:
    """The slots of a session, and the requests that wait for one.

    A subclass whose slots come from elsewhere overrides `try_acquire()`, `release()` and `enqueue()`, and calls
    `grant_next()` with each slot that it has got.

    Args:
        limit: The number of slots.
        max_per_group: How many of them one group may hold.
    """

    def __init__(self, limit: int, *, max_per_group: int | None = None) -> None:
        self.free: int = limit
        self.held: int = 0
        """Slots that are taken."""
        self.waiting: int = 0
        self.counted: int = 0
        """How many of those who wait count as `max_waiting`."""
        self._max_per_group = max_per_group
        self._groups: dict[str, _Group] = {}
        """Those that hold slots or wait."""
        self._lines: dict[tuple[int, int], SortedLine[_Row]] = {}
        """By priority and number of places in a row; none is empty."""
        self._last_number = 0
        self._loop = asyncio.get_running_loop()

    @property
    def is_wanted(self) -> bool:
        """Whether somebody waits who may have a slot."""
        return bool(self._lines)

    @property
    def soon_free(self) -> int:
        """How many of those who wait may get a slot in a moment: none, because free ones are taken at once."""
        return 0

    def has_free(self, group: str | None = None) -> bool:
        """Check whether a slot is free, and the group may have it."""
        return self.free > 0 and not self.is_at_bound(group)

    def try_acquire(self, group: str | None = None) -> bool:
        """Take a slot, if one is free and the group may have it."""
        if self.has_free(group):
            self.free -= 1
            self.count_held(group)
            return True
        return False

    def occupy(self, group: str | None = None) -> bool:  # noqa: ARG002 - for a subclass
        """Count a task that was adopted from another process; return whether it has a slot, and must release it.

        Here it has none: only a limit that is shared with that process counts it.
        """
        return False

    def release(self, group: str | None = None) -> None:
        """Pass a slot on to the next in the queue; if there is none, it is free."""
        self.count_released(group)
        if not self.grant_next():
            self.free += 1

    def enqueue(self, waiter: Waiter, priority: int, group: str | None = None, *, counted: bool = True) -> Place:
        """Return a place in the queue; call it when `try_acquire()` takes none.

        Args:
            waiter: Who gets the slot. Whoever stops waiting before that calls `leave()`.
            priority: Any integer.
            group: Whose turn it uses.
            counted: Whether it counts as one of `max_waiting`.
        """
        place = Place(waiter, self._loop.time(), self._next_number(), counted, None)
        self.waiting += 1
        self.counted += counted
        self._put(place, clamp(priority), self._group(group))
        return place

    def grant_next(self) -> bool:
        """Grant a slot to the next in the queue; return False if nobody waits who may have it."""
        if not self._lines:
            return False
        row = min([line.first for line in self._lines.values()])[2]
        place = row.places[0]
        self._remove(place, turn=(self._loop.time(), self._next_number()))
        self._hold(row.group)
        place.waiter.on_slot()
        return True

    def leave(self, place: Place) -> None:
        """Leave the queue; do nothing if the place is in it no longer."""
        if place.row is not None:
            group = place.row.group
            self._remove(place)
            self._forget_unused(group)

    def set_priority(self, place: Place, priority: int) -> None:
        """Change the priority of a request that waits; its age still counts."""
        row, priority = place.row, clamp(priority)
        if row is not None and row.priority != priority:
            self._remove(place)
            self.waiting += 1
            self.counted += place.counted
            self._put(place, priority, row.group)

    def position(self, place: Place) -> int | None:
        """Return how many requests get a slot until it is this one's turn; 1 for the next; None if it doesn't wait.

        It is exact among equal priorities as long as nobody arrives or leaves. Of higher ones, all requests of the
        groups before it count, and of lower ones those that have become equal by their age.
        """
        row = place.row
        if row is None:
            return None
        index = bisect_left(row.places, place.number, key=_number)
        before, key = 0, row.key()
        if row.entry is None and row.group is not None:  # at its bound, and in no line
            higher = [other for other in row.group.rows.values() if other.priority > row.priority]
            before = index + sum(len(other.places) for other in higher)
        for (priority, length), line in self._lines.items():
            ahead = line.count_before(key)
            if priority > row.priority:
                before += (len(line) if index else ahead) * length
            elif priority < row.priority:
                before += ahead
            else:
                # Each row has as many turns as there are requests before this one in its own; those ahead, one more.
                before += len(line) * min(length, index) + (ahead if length > index else 0)
        return before + 1

    # ------------------------------------------------------------------ slots of groups

    def is_at_bound(self, group: str | None) -> bool:
        """Check whether a group holds as many slots as it may hold."""
        if group is None or self._max_per_group is None:
            return False
        return group in self._groups and self._groups[group].held >= self._max_per_group

    def count_held(self, group: str | None) -> None:
        """Count a slot that was taken, and not granted by `grant_next()`."""
        self._hold(self._group(group))

    def count_released(self, group_name: str | None) -> None:
        """Count a slot that is given back."""
        self.held -= 1
        if group_name is not None:
            group = self._groups[group_name]
            group.held -= 1
            for row in group.rows.values():
                if row.entry is None:
                    self._add_to_line(row)
            self._forget_unused(group)

    def _hold(self, group: _Group | None) -> None:
        self.held += 1
        if group is not None:
            group.held += 1
            if self._max_per_group is not None and group.held >= self._max_per_group:
                for row in group.rows.values():
                    self._remove_from_line(row)

    def _group(self, name: str | None) -> _Group | None:
        return None if name is None else self._groups.setdefault(name, _Group(name))

    def _forget_unused(self, group: _Group | None) -> None:
        if group is not None and not group.held and not group.rows:
            del self._groups[group.name]

    # ------------------------------------------------------------------ rows and lines

    def _next_number(self) -> int:
        self._last_number += 1
        return self._last_number

    def _put(self, place: Place, priority: int, group: _Group | None) -> None:
        """Add a place to its row; to a new one, if it has no group."""
        row = None if group is None else group.rows.get(priority)
        if row is None:
            place.row = row = _Row(priority, group, [place])
            if group is not None:
                group.rows[priority] = row
        else:
            self._remove_from_line(row)
            insort(row.places, place, key=_number)
            place.row = row
        self._add_to_line(row)

    def _remove(self, place: Place, turn: tuple[float, int] | None = None) -> None:
        """Remove a place from its row.

        Args:
            place: The place.
            turn: The time and number of the row's turn, if this is one.
        """
        row = place.row
        assert row is not None
        place.row = None
        self.waiting -= 1
        self.counted -= place.counted
        self._remove_from_line(row)
        if len(row.places) > 1:
            del row.places[bisect_left(row.places, place.number, key=_number)]
            row.last_turn = turn or row.last_turn
            self._add_to_line(row)
        elif row.group is not None:
            del row.group.rows[row.priority]

    def _add_to_line(self, row: _Row) -> None:
        """Add a row to its line, where it waits for its turn, unless its group is at its bound."""
        if row.group is None or self._max_per_group is None or row.group.held < self._max_per_group:
            kind = row.priority, len(row.places)
            line = self._lines.get(kind)
            if line is None:
                line = self._lines[kind] = SortedLine()
            row.entry = (*row.key(), row)
            line.add(row.entry)

    def _remove_from_line(self, row: _Row) -> None:
        if row.entry is not None:
            kind = row.priority, len(row.places)
            line = self._lines[kind]
            line.remove(row.entry)
            row.entry = None
            if not line:
                del self._lines[kind]


def order_of(arrived: float, priority: int) -> float:
    """Return when a request would have had to arrive with priority 0 to have the same place."""
    return arrived - _SECONDS_PER_PRIORITY * clamp(priority)


def clamp(priority: int) -> int:
    """Return a priority that can be compared with times."""
    return max(-_MAX_PRIORITY, min(priority, _MAX_PRIORITY))
