"""Names for saved pictures that every file system accepts."""

import re
import unicodedata

_LONGEST = 120
"""Bytes of a name: file systems allow 143 or 255, and a number and an ending are still to come."""
# https://learn.microsoft.com/windows/win32/fileio/naming-a-file
_RESERVED = {"con", "prn", "aux", "nul", *(port + number for port in ("com", "lpt") for number in "123456789¹²³")}


def file_name(text: str) -> str:
    """Make a text fit to be a file's name everywhere."""
    if not isinstance(text, str):
        raise TypeError(f"a name must be text, not {type(text).__name__}")
    name = re.sub(r"[^\w.()+,=@ -]+", "-", unicodedata.normalize("NFC", text)).strip(" .-")
    name = name.encode(errors="ignore")[:_LONGEST].decode(errors="ignore").rstrip(" .")
    if name.partition(".")[0].strip().lower() in _RESERVED:
        name = f"_{name}"
    return name or "picture"
