"""Named pipes with which the processes of a machine wake each other, and learn of each other's end.

A process creates a pipe under a name of its own and holds both of its ends. The kernel closes them when the process
ends, however that happens: then nobody can open the pipe for writing any more, although its name is still there.
"""

import contextlib
import errno
import os
import weakref
from pathlib import Path

_MODE = 0o600
_NONBLOCK = getattr(os, "O_NONBLOCK", 0)  # Windows has neither this nor named pipes


class WakePipe:
    """A named pipe that this process reads, so that others can wake it.

    Args:
        path: Its name, which no other process uses.

    Raises:
        OSError: The folder is not writable, or its file system has no named pipes.
        AttributeError: The platform has none.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        os.mkfifo(path, _MODE)
        self._descriptors: list[int] = []
        try:
            self._descriptors.append(os.open(path, os.O_RDONLY | _NONBLOCK))
            # Without a writer, a pipe counts as ended, and as readable all the time.
            self._descriptors.append(os.open(path, os.O_WRONLY | _NONBLOCK))
        except BaseException:
            self.close()
            raise
        _pipes.add(self)

    def fileno(self) -> int:
        """Return the descriptor that is readable once somebody has called `wake()` or `wake_owner()`."""
        return self._descriptors[0]

    def exists(self) -> bool:
        """Check whether its name is still there: a program that tidies up may have deleted it."""
        return self.path.is_fifo()

    def wake(self) -> None:
        """Wake this process itself, in whichever of its threads waits for the pipe."""
        with contextlib.suppress(BlockingIOError):  # a full pipe wakes as well
            os.write(self._descriptors[1], b"\0")

    def clear(self) -> None:
        """Read what was written, so that the pipe is no longer readable."""
        with contextlib.suppress(BlockingIOError):
            while os.read(self._descriptors[0], 4096):
                pass

    def close(self) -> None:
        """Close the pipe, and delete its name. Closing it twice does no harm."""
        _pipes.discard(self)
        if self._descriptors:
            with contextlib.suppress(OSError):  # others delete it once they find that nobody reads it
                self.path.unlink()
            self.close_descriptors()

    def close_descriptors(self) -> None:
        """Close both ends, and leave the name: in a forked process, where the pipe is the parent's."""
        descriptors, self._descriptors = self._descriptors, []
        for descriptor in descriptors:
            os.close(descriptor)


_pipes: "weakref.WeakSet[WakePipe]" = weakref.WeakSet()
"""The pipes that are open in this process."""


def _close_in_child() -> None:
    """Close the pipes of the parent: they would stay open, and it would seem to live, as long as a fork of it does."""
    for pipe in list(_pipes):
        pipe.close_descriptors()
    _pipes.clear()


with contextlib.suppress(AttributeError):  # Windows has no fork
    os.register_at_fork(after_in_child=_close_in_child)


def pipe_path(database: Path, owner: str) -> Path:
    """Return the name of the pipe with which one of those who share a database is woken.

    Args:
        database: The file, without symbolic links on the way.
        owner: The name of the one to be woken.
    """
    return database.with_name(f"{database.name}-{owner}.wake")


def wake_owner(path: Path) -> bool:
    """Wake the process that has created a pipe; return False if it has ended."""
    return _open_for_writing(path, b"\0")


def owner_is_alive(path: Path) -> bool:
    """Check whether the process that has created a pipe is still there; True if that can't be known."""
    return _open_for_writing(path, b"")


def remove_if_dead(path: Path) -> bool:
    """Delete the name of a pipe whose process has ended; return whether it has."""
    if owner_is_alive(path):
        return False
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)
    return True


def _open_for_writing(path: Path, data: bytes) -> bool:
    try:
        descriptor = os.open(path, os.O_WRONLY | _NONBLOCK)
    except FileNotFoundError:
        return False
    except OSError as error:
        return error.errno != errno.ENXIO  # nobody reads it
    try:
        if data:
            with contextlib.suppress(OSError):  # full, which wakes as well; or closed in this moment
                os.write(descriptor, data)
    finally:
        os.close(descriptor)
    return True
