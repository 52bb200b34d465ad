"""Whose the files are that a batch would replace: an `index.html`, for example, may be the home page of a website.

Each file is judged by its own content: a journal may have been deleted, and a journal may belong to a program that has
written the other files itself. What has no content is nobody's.
"""

import json
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flux2max_async._exceptions import ConfigurationError
from flux2max_async.cli._output_dir import JOURNAL_NAMES
from flux2max_async.cli._thumbnails import read_source

_CHOOSE_ANOTHER_FOLDER = "choose another folder with --out, or move them away"
_PAGE_MARKS = (
    b'<meta name="generator" content="flux2max">',
    # Earlier versions wrote no such element.
    b'<link rel="icon" href="data:,">\n<style>\n:root {\n  color-scheme: light dark;\n  --',
)
_PAGE_HEAD_LENGTH = 4096
"""The bytes of a page that contain its mark."""
_ROW_FIELDS = frozenset(("key", "prompt", "state", "task_id"))
"""The fields that the rows of all versions have."""
_FOLDER_SETTINGS = ("thumbs.db", "desktop.ini")
"""What Windows itself puts into folders with pictures; on other systems, such files have a dot in front."""


def reject_foreign_files(folder: Path, *, way_out: str = _CHOOSE_ANOTHER_FOLDER) -> None:
    """Check that the page, the results and the thumbnails in a folder, if there are any, are those of a batch.

    Args:
        folder: The output folder, which may not exist yet.
        way_out: What the user can do instead.

    Raises:
        ConfigurationError: Some are not.
        OSError: They can't be read.
    """
    if foreign := [name for name, is_own in _CHECKS.items() if not is_own(folder / name)]:
        names = " and ".join(filter(None, (", ".join(foreign[:-1]), foreign[-1])))
        raise ConfigurationError(
            f"{str(folder)!r} has {names} that flux2max has not written, and does not replace: {way_out}"
        )


def _file_mode(path: Path) -> int:
    """Return the mode of a file, or 0 if there is none."""
    try:
        return path.lstat().st_mode
    except OSError:  # if the folder can't be read, that is reported when it is
        return 0


def _is_own_page(path: Path) -> bool:
    mode = _file_mode(path)
    if not stat.S_ISREG(mode):
        return not mode or stat.S_ISDIR(mode)  # a folder isn't replaced: that fails, and is reported
    with path.open("rb") as file:
        head = file.read(_PAGE_HEAD_LENGTH)
    return not head or any(mark in head for mark in _PAGE_MARKS)


def _is_own_results_file(path: Path) -> bool:
    # What is no regular file is refused when it is read.
    if not stat.S_ISREG(_file_mode(path)) or path.stat().st_size == 0:
        return True
    damaged = False
    with path.open("rb") as file:
        for line in filter(bytes.strip, file):
            record = _parse_record(line)
            if record is not None and record.keys() >= _ROW_FIELDS:
                return True
            damaged = damaged or record is None
    # Whole records are those of another program; anything else beside a journal is a damaged file of a batch.
    return damaged and any(path.with_name(name).exists() for name in JOURNAL_NAMES)


def _parse_record(line: bytes) -> dict[str, Any] | None:
    try:
        record: Any = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def _is_own_thumbnail_folder(path: Path) -> bool:
    mode = _file_mode(path)
    if not stat.S_ISDIR(mode):
        return not mode or stat.S_ISLNK(mode)  # nothing is written through a link
    others = False
    for file in path.iterdir():
        if file.suffix == ".jpeg" and file.is_file() and read_source(file) is not None:
            return True
        others = others or not (file.name.startswith(".") or file.name.lower() in _FOLDER_SETTINGS)
    return not others


_CHECKS: dict[str, Callable[[Path], bool]] = {
    "index.html": _is_own_page,
    "results.jsonl": _is_own_results_file,
    "thumbs": _is_own_thumbnail_folder,
}
