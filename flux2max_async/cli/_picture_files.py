"""The files of a single task's pictures: which of them may be written, and what they are called."""

import errno
import itertools
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

from flux2max_async._exceptions import ConfigurationError
from flux2max_async._models.results import is_inline

GENERATED_SUFFIXES = (".jpeg", ".jpg", ".png")
"""The suffixes of files for pictures that this command requests."""
PICTURE_SUFFIXES = (*GENERATED_SUFFIXES, ".webp", ".gif", ".avif")
"""The suffixes of files for the pictures of any task."""
_MAX_NAME_BYTES = 120
"""The maximum length of the part of a default file name that is made from the task's id."""


def check_output(path: Path | None, suffixes: tuple[str, ...], *, force: bool) -> None:
    """Check that a picture can be saved as a file, before it is paid for.

    Args:
        path: The file; None names it after the task.
        suffixes: Those that it may have, if it has one.
        force: Whether to replace it if it is there already.

    Raises:
        ConfigurationError: It has another suffix, or it is there already and may not or can't be replaced.
    """
    if path is None:
        return
    if path.suffix and path.suffix.lower() not in suffixes:
        listed = f"{', '.join(suffixes[:-1])} or {suffixes[-1]}"
        raise ConfigurationError(f"can't write to {str(path)!r}: the name of a picture ends in {listed}")
    try:
        mode = path.stat().st_mode
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR):
            return  # a new file
        raise ConfigurationError(f"can't write to {str(path)!r}: {error.strerror}") from error
    # Root may write to files that nobody may write to.
    if not stat.S_ISREG(mode):
        raise ConfigurationError(f"can't write to {str(path)!r}: it is not a regular file")
    if not mode & 0o222 or not os.access(path, os.W_OK):
        raise ConfigurationError(f"can't write to {str(path)!r}: it is read-only")
    if not force:
        raise ConfigurationError(f"{str(path)!r} is there already: choose another name, or replace it with --force")


def default_output(task_id: str, suffix: str) -> Path:
    """Return a file name for the picture of a task."""
    # A task id is arbitrary text of the service: only characters that are safe in a file name are kept.
    name = re.sub(r"[^\w.-]+", "-", task_id).encode()[:_MAX_NAME_BYTES].decode(errors="ignore")
    return Path(f"flux2max-{name}{suffix}")


def numbered_paths(first: Path, *, force: bool) -> Iterator[Path]:
    """Yield a path, and the same with numbers from 2 on; without force, leave out files that are there already."""
    paths = (first if number == 1 else first.with_stem(f"{first.stem}-{number}") for number in itertools.count(1))
    return paths if force else (path for path in paths if not path.exists())


def suffix_of_url(url: str) -> str:
    """Return the suffix of a picture's file, by its URL."""
    path = url.partition(";")[0].replace("data:image/", "picture.") if is_inline(url) else urlsplit(url).path
    suffix = Path(path).suffix.lower()
    return suffix if suffix in PICTURE_SUFFIXES else ".jpeg"
