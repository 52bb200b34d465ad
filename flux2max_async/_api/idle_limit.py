"""How long a connection may be idle before a submit can't rely on it any more."""

import math
from collections import deque

FIRST_LIMIT = 0.5
"""Seconds that a connection may be idle as long as nothing is known about the far end."""
MAX_LIMIT = 4.0
_DROP_MEMORY = 60.0
_AGREEING_DROPS = 4
_AGREEMENT = 1.2
"""Drops that differ at most by this factor are due to a fixed timeout of the far end."""


class IdleLimit:
    """Learns how many seconds a connection may be idle before a submit can't rely on it any more.

    It is half of the longest time that one was seen to stay open, or half of the shortest after which one was closed;
    0.7 of it, if several were closed after the same time.
    """

    def __init__(self) -> None:
        self._longest = 0.0
        self._drops: deque[tuple[float, float]] = deque(maxlen=100)
        """When a connection was closed, and how long it had been idle."""
        self._shortest, self._factor = math.inf, 0.5

    def on_open(self, idle: float) -> None:
        """Record that a connection is still open after so many idle seconds."""
        self._longest = max(self._longest, idle)

    def on_drop(self, idle: float, now: float) -> None:
        """Record that the far end has closed a connection after so many idle seconds."""
        # The far end may have changed its timeout: what was seen before no longer counts.
        self._longest = min(self._longest, idle)
        self._drops.append((now, idle))
        self._summarize()

    def seconds(self, now: float, round_trip: float) -> float:
        """Return the limit.

        Args:
            now: The time.
            round_trip: Seconds that a FIN and a submit may need together; at least one round trip.
        """
        if self._drops and self._drops[0][0] < now - _DROP_MEMORY:
            self._drops.popleft()
            self._summarize()
        if not self._drops:
            return min(MAX_LIMIT, max(FIRST_LIMIT, self._longest / 2))
        return min(MAX_LIMIT, self._shortest * self._factor, self._shortest - round_trip)

    def _summarize(self) -> None:
        times = [idle for _, idle in self._drops]
        self._shortest = min(times, default=math.inf)
        is_timeout = len(times) >= _AGREEING_DROPS and max(times) <= _AGREEMENT * self._shortest
        self._factor = 0.7 if is_timeout else 0.5
