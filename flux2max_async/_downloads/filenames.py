"""File names that are valid on every common file system."""

import re
import unicodedata
from pathlib import Path

from flux2max_async._downloads.image_format import FORMATS_BY_SUFFIX

_MAX_NAME_BYTES = 120
"""File systems allow 143 or 255 bytes, and a number and a suffix are appended."""
# https://learn.microsoft.com/windows/win32/fileio/naming-a-file
_RESERVED_NAMES = {"con", "prn", "aux", "nul", *(port + digit for port in ("com", "lpt") for digit in "123456789¹²³")}


def file_name(text: str) -> str:
    """Return a text as a portable file name, with other characters replaced by hyphens.

    Raises:
        TypeError: It is not text.
    """
    if not isinstance(text, str):
        raise TypeError(f"a name must be text, not {type(text).__name__}")
    name = re.sub(r"[^\w.()+,=@ -]+", "-", unicodedata.normalize("NFC", text)).strip(" .-")
    name = name.encode(errors="ignore")[:_MAX_NAME_BYTES].decode(errors="ignore").rstrip(" .")
    if name.partition(".")[0].strip().lower() in _RESERVED_NAMES:
        name = f"_{name}"
    return name or "picture"


def numbered_name(stem: str, suffix: str, number: int) -> str:
    """Return a file name with a number, unless that is 1; a suffix that the stem has is kept."""
    given = Path(stem).suffix
    if given.lower() in FORMATS_BY_SUFFIX:
        stem, suffix = stem.removesuffix(given), given
    return f"{stem}{f'-{number}' if number > 1 else ''}{suffix}"
