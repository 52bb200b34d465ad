"""Whose turn it is: requests that wait for one of the session's slots, by priority and age."""

import asyncio
import heapq

import attrs

_SECONDS_PER_PRIORITY = 60.0
"""After so many seconds of waiting, a request goes as one of the next higher priority: none waits for ever."""
_MAX_PRIORITY = 2**63
"""Higher ones count as this: they could not be compared with times."""


@attrs.define(eq=False)
class Place:
    """The place of one request in the queue."""

    arrived: float
    number: int
    """Decides between equals: the first to arrive goes first."""
    granted: "asyncio.Future[None]"
    """Resolved with the slot; cancelled when nobody waits for it any more."""
    order: float
    """The lowest goes first."""


# A slot is free, or held by a request. `try_acquire()` takes a free one, `release()` gives one back: to the first
# request in the queue, by resolving its `granted`, or to nobody, and then it is free.
#
# Places are in a heap by `order`: the moment of arrival, 60 s earlier for each step of priority. So the order of two
# places never changes with time, although age counts: a request that has waited for a minute and a new one that is one
# priority higher are equals. An entry of the heap is valid if it has its place's present order and `granted` is
# pending; any other is left over from a place that was cancelled or has changed its priority. It is skipped when it
# comes first, and all of them are removed when they are more than half.
#
# Invariants: a slot is free only while nobody waits; `waiting` is the number of places with a pending `granted`; a slot
# that is granted to a waiter who is cancelled in the same moment goes to the next one.
class SlotQueue:
    """The slots of a session, and the requests that wait for one.

    Args:
        limit: The number of slots.
    """

    def __init__(self, limit: int) -> None:
        self.free = limit
        self.waiting = 0
        self._heap: list[tuple[float, int, Place]] = []
        self._arrivals = 0
        self._loop = asyncio.get_running_loop()

    def try_acquire(self) -> bool:
        """Take a slot, if one is free."""
        if self.free:
            self.free -= 1
            return True
        return False

    def release(self) -> None:
        """Pass a slot on to the first in the queue; without a queue, it is free."""
        while self._heap:
            order, _, place = heapq.heappop(self._heap)
            if order == place.order and not place.granted.done():
                self.waiting -= 1
                place.granted.set_result(None)
                return
        self.free += 1

    def enqueue(self, priority: int) -> Place:
        """Return a place in the queue; call it when no slot is free.

        Whoever stops waiting for its `granted` before it has the slot calls `leave()`.
        """
        now = self._loop.time()
        self._arrivals += 1
        place = Place(now, self._arrivals, self._loop.create_future(), order_of(now, priority))
        self.waiting += 1
        self._push(place)
        return place

    def leave(self, place: Place) -> None:
        """Leave the queue; a slot that was granted in the same moment goes to the next one."""
        if place.granted.done() and not place.granted.cancelled():
            self.release()
        else:
            place.granted.cancel()
            self.waiting -= 1
            self._remove_leftovers()

    def set_priority(self, place: Place, priority: int) -> None:
        """Change the priority of a request that waits; its age still counts."""
        order = order_of(place.arrived, priority)
        if order != place.order and not place.granted.done():
            place.order = order
            self._push(place)
            self._remove_leftovers()

    def _push(self, place: Place) -> None:
        heapq.heappush(self._heap, (place.order, place.number, place))

    def _remove_leftovers(self) -> None:
        if len(self._heap) > 2 * self.waiting + 16:
            # A set, because a place whose priority went up and down again has two entries that are equal.
            places = {place for _, _, place in self._heap if not place.granted.done()}
            self._heap = [(place.order, place.number, place) for place in places]
            heapq.heapify(self._heap)


def order_of(arrived: float, priority: int) -> float:
    """Return when a request would have had to arrive with priority 0 to have the same place."""
    return arrived - _SECONDS_PER_PRIORITY * max(-_MAX_PRIORITY, min(priority, _MAX_PRIORITY))
