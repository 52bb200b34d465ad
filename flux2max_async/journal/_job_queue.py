"""The queue between the event loop and a journal's thread, which may wait for a descriptor at the same time."""

import contextlib
import queue
import selectors
import socket

from flux2max_async.journal._jobs import Job

# Windows has no poll().
_Selector: type[selectors.BaseSelector] = getattr(selectors, "PollSelector", selectors.SelectSelector)


class JobQueue:
    """Jobs in their order; None stands for the request to stop. `put()` is called in any thread, all else in one."""

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._sockets: tuple[socket.socket, socket.socket] | None = None
        """A pair for waking the thread, once it has waited for a descriptor."""
        self._is_selecting = False

    def put(self, job: Job | None) -> None:
        """Add a job, and wake the thread."""
        self._jobs.put(job)
        if self._is_selecting and self._sockets is not None:
            with contextlib.suppress(OSError):  # full, which wakes as well; or closed
                self._sockets[1].send(b"\0")

    def is_empty(self) -> bool:
        """Check whether no job is waiting."""
        return self._jobs.empty()

    def get(self, limit: int, seconds: float, descriptor: int | None) -> tuple[list[Job | None], bool]:
        """Wait for jobs, for a descriptor that gets readable, or until the time is over.

        Returns:
            The jobs that are waiting then, at most so many, and whether the descriptor is readable.
        """
        jobs: list[Job | None] = []
        is_readable = False
        if descriptor is None:
            with contextlib.suppress(queue.Empty):
                jobs.append(self._jobs.get(timeout=max(seconds, 0.0)))
        else:
            is_readable = self._select(seconds, descriptor)
        while len(jobs) < limit and not self._jobs.empty():
            jobs.append(self._jobs.get_nowait())
        return jobs, is_readable

    def _select(self, seconds: float, descriptor: int) -> bool:
        if not self._jobs.empty():
            return False
        if self._sockets is None:
            self._sockets = socket.socketpair()
            for end in self._sockets:
                end.setblocking(False)  # noqa: FBT003 - its only argument
        woken = self._sockets[0]
        with _Selector() as selector:
            selector.register(woken, selectors.EVENT_READ)
            selector.register(descriptor, selectors.EVENT_READ)
            self._is_selecting = True
            try:
                # A job that was put before the flag was set has woken nobody.
                found = selector.select(max(seconds, 0.0) if self._jobs.empty() else 0)
            finally:
                self._is_selecting = False
        with contextlib.suppress(BlockingIOError):
            while woken.recv(4096):
                pass
        return any(key.fd == descriptor for key, _ in found)

    def close(self) -> None:
        """Close the sockets."""
        for end in self._sockets or ():
            end.close()
