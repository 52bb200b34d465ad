"""The interface between the thread of a limit and the database in which several sessions count."""

from typing import Protocol

from flux2max_async._exceptions import InFlightLimitError


class LimitConnection(Protocol):
    """A session's access to a shared count of slots, for one thread; `wake()` alone is called by others.

    `update()` connects if need be, also again after `disconnect()`.
    """

    check_interval: float
    """Seconds between checks for sessions that have died, while this one waits for a slot."""

    def __str__(self) -> str:
        """Return the file or address, without a password."""
        ...

    def wake(self) -> None:
        """End a `wait()` of the thread, or its next one."""
        ...

    def wait(self, seconds: float) -> None:
        """Wait until the thread is woken, a slot has been granted, or the time is over."""
        ...

    def update(self, held: int, *, waits: bool, adopted: int) -> bool:
        """Write how many slots this session has, grant what is free, and return whether it has got one more.

        Args:
            held: Its slots, without one that was granted to it in the meantime.
            waits: Whether it waits for a slot.
            adopted: How many of its slots are for tasks of dead sessions that it has adopted since the previous update.
        """
        ...

    def disconnect(self) -> None:
        """Close what an error has left open."""
        ...

    def retry_delay(self) -> float:
        """Return the seconds until the next attempt after an error."""
        ...

    def close(self) -> None:
        """Release all slots, as far as that is possible, and close everything."""
        ...

    def error(self, error: Exception) -> InFlightLimitError:
        """Return the error that explains another one."""
        ...
