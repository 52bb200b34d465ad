"""Named pipes: processes wake each other, and a pipe whose process has ended is noticed."""

import errno
import os
import resource
import select
from collections.abc import Iterator
from pathlib import Path

import pytest

from flux2max_async._wake_pipe import WakePipe, owner_is_alive, pipe_path, wake_owner


@pytest.fixture
def pipe(tmp_path: Path) -> Iterator[WakePipe]:
    created = WakePipe(pipe_path(tmp_path / "some.db", "me"))
    yield created
    created.close()


def is_readable(pipe: WakePipe) -> bool:
    return bool(select.select([pipe], [], [], 0)[0])


def test_waking(pipe: WakePipe) -> None:
    """A pipe is readable after somebody has woken its owner, here or in another process, until it is cleared."""
    woken = [is_readable(pipe)]
    for wake in (pipe.wake, lambda: wake_owner(pipe.path)):
        wake()
        woken.append(is_readable(pipe))
        pipe.clear()
        woken.append(is_readable(pipe))

    assert woken == [False, True, False, True, False]
    assert pipe.path.name == "some.db-me.wake"


def test_waking_often(pipe: WakePipe) -> None:
    """Whoever wakes an owner that reads nothing is never held up, however often."""
    for _ in range(70_000):
        pipe.wake()

    assert wake_owner(pipe.path)
    pipe.clear()
    assert not is_readable(pipe)


def test_whether_the_owner_is_alive(pipe: WakePipe, tmp_path: Path) -> None:
    """An owner is alive while it has its pipe open; where that can't be known, it is taken for alive."""
    left = WakePipe(tmp_path / "left")
    left.close_descriptors()
    answers = {
        "open": owner_is_alive(pipe.path),
        "closed by the kernel": owner_is_alive(left.path),
        "no such name": owner_is_alive(tmp_path / "none"),
        "not a pipe": owner_is_alive(tmp_path),
    }

    assert answers == {"open": True, "closed by the kernel": False, "no such name": False, "not a pipe": True}
    assert not wake_owner(left.path)
    assert not is_readable(pipe), "asking wakes nobody"


def test_closing(pipe: WakePipe) -> None:
    """A pipe that is closed has no name any more; closing it twice does no harm."""
    existed = pipe.exists()
    pipe.close()
    pipe.close()

    assert (existed, pipe.exists(), owner_is_alive(pipe.path)) == (True, False, False)


def test_too_many_open_files(tmp_path: Path) -> None:
    """A pipe that can't be opened leaves neither a name nor a descriptor."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.dup(0)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest + 1, limits[1]))
    try:
        with pytest.raises(OSError, match="open files") as caught:
            WakePipe(tmp_path / "pipe")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    free = os.dup(0)
    os.close(free)

    assert (caught.value.errno, list(tmp_path.iterdir()), free) == (errno.EMFILE, [], lowest)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_process_holds_no_pipe(pipe: WakePipe) -> None:
    """A fork that lives on doesn't make its parent seem alive: it has closed the pipe, and leaves its name."""
    from_child, to_parent = os.pipe()
    from_parent, to_child = os.pipe()
    if (child := os.fork()) == 0:
        pipe.close()
        os.write(to_parent, str(pipe.exists()).encode())
        os.read(from_parent, 100)
        os._exit(0)
    message = os.read(from_child, 100)
    pipe.close_descriptors()
    alive = owner_is_alive(pipe.path)
    os.write(to_child, b"end")
    _, status = os.waitpid(child, 0)
    for descriptor in (from_child, to_parent, from_parent, to_child):
        os.close(descriptor)

    assert (message, alive, status) == (b"True", False, 0)
