"""Files that may be replaced: regular and writable ones, so that no device, pipe or read-only file becomes an image."""

import os
import stat
from pathlib import Path


def resolve_target(path: Path) -> Path:
    """Return the file to write for a path, which is what its symbolic links lead to, if it may be created or replaced.

    Raises:
        OSError: It is not a regular file, is read-only, or can't be examined, as for links that form a loop.
    """
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        pass  # a new file, or one that a link names
    else:
        if stat.S_ISDIR(mode):
            raise OSError("it is a folder, not a regular file: name a file in it")
        if not stat.S_ISREG(mode):
            raise OSError("it is not a regular file")
        if not is_writable(path, mode):
            raise OSError("it is read-only")
    return Path(os.path.realpath(path))


def is_writable(path: Path, mode: int) -> bool:
    """Return whether a file may be written to, by its mode too: root may write to files that nobody may write to."""
    return bool(mode & 0o222) and os.access(path, os.W_OK)
