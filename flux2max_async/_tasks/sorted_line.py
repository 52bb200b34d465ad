"""A sorted list for queues: entries mostly leave at its front and join at its end."""

from bisect import bisect_left, insort
from typing import Any, Generic, TypeVar

T = TypeVar("T")

_MIN_GAP = 32
"""Entries; a shorter gap is not closed."""


class SortedLine(Generic[T]):
    """Entries of the form (key, number, value), sorted by key and number, which no two of them share.

    The front of the list is a gap, whose end moves with each first entry that leaves, and which is closed when it is
    more than half of the list. So that costs O(1) on average, and nothing has to be moved.
    """

    __slots__ = ("_entries", "_start")

    def __init__(self) -> None:
        self._entries: list[Any] = []
        """None in the gap."""
        self._start = 0
        """Where the gap ends."""

    def __len__(self) -> int:
        return len(self._entries) - self._start

    @property
    def first(self) -> tuple[float, int, T]:
        """The first entry; there must be one."""
        first: tuple[float, int, T] = self._entries[self._start]
        return first

    def add(self, entry: tuple[float, int, T]) -> None:
        """Add an entry."""
        insort(self._entries, entry, lo=self._start)

    def remove(self, entry: tuple[float, int, T]) -> None:
        """Remove an entry, which must be there."""
        index = self.count_before(entry[:2]) + self._start
        if index > self._start:
            del self._entries[index]
            return
        self._entries[index] = None
        self._start += 1
        if self._start > _MIN_GAP and 2 * self._start > len(self._entries):
            del self._entries[: self._start]
            self._start = 0

    def count_before(self, key: tuple[float, int]) -> int:
        """Return how many entries are before a key and number."""
        return bisect_left(self._entries, key, lo=self._start) - self._start
