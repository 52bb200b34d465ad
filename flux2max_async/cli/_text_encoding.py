"""The encoding of a requests file: UTF-8, or what a byte order mark names, or Windows-1252 if that is beyond doubt.

It is if all of this holds:
- The file is text or a table. (JSON is UTF-8 by its definition.)
- It is not UTF-8, and its lines end as on Windows: that is how Excel and Notepad there save text.
- What isn't ASCII in it are letters of Western European languages and signs of typography, where those can stand. In
  most other encodings, whole words would consist of such bytes, or would have signs in their middle.

Even then it may be a text with few letters of another alphabet, so the user is shown examples.
"""

import codecs
import re

_MARKS = {
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF32_LE: "utf-32-le",  # begins as UTF-16 does
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}
_LETTERS = "ÀÁÂÃÄÅÆÇÈÉÊËÌÍÎÏÑÒÓÔÕÖØÙÚÛÜßàáâãäåæçèéêëìíîïñòóôõöøùúûüÿœŒ"
_SIGNS_IN_WORDS = "’–—…·\xa0"  # noqa: RUF001 - they are meant
_OTHER_SIGNS = "„‹‘“”•™›¡¢£¥§©ª«®°±²´º»½¼¾¿×÷€"  # noqa: RUF001 - they are meant
_OTHERS = re.compile(
    f"[^\x00-\x7f{_LETTERS}{_SIGNS_IN_WORDS}{_OTHER_SIGNS}]"
    f"|[{_LETTERS}]{{3}}|(?<![A-Za-z])[{_LETTERS}]{{2}}(?![A-Za-z])"
    f"|[A-Za-z{_LETTERS}][{_OTHER_SIGNS}]+[A-Za-z{_LETTERS}]|õ(?!e)"
)
"""Matches what hardly occurs in Western European texts: another character, three letters in a row or a word of two, a
sign in the middle of a word, and in particular what Hungarian becomes."""
_UNREADABLE = "\udcff"
"""Stands for bytes that aren't text: a lone surrogate, as the error handler `surrogateescape` uses them."""
_WORD = re.compile(r"[^\s,;\"]{0,20}[^\x00-\x7f][^\s,;\"]{0,20}")
_MAX_EXAMPLES = 5


def decode_text(data: bytes, *, may_be_cp1252: bool) -> tuple[str, str | None]:
    """Return the text of a file, in which lone surrogates stand for what can't be read, and a note for the user.

    Args:
        data: The file's bytes.
        may_be_cp1252: Whether the format is one that programs on Windows save in Windows-1252.
    """
    for mark, encoding in _MARKS.items():
        if data.startswith(mark):
            if encoding == "utf-8":
                break
            text = data.removeprefix(mark).decode(encoding, errors="replace")
            return text.replace("\N{REPLACEMENT CHARACTER}", _UNREADABLE), None
    text = data.decode("utf-8-sig", errors="surrogateescape")
    if may_be_cp1252 and not text.isascii() and any("\ud800" <= char <= "\udfff" for char in text):
        western = _decode_cp1252(data)
        if western is not None:
            return western, f"not UTF-8; read as Windows-1252: {', '.join(_choose_examples(western))}"
    return text, None


def _choose_examples(text: str) -> list[str]:
    """Return some words that have different characters beyond ASCII."""
    examples: list[str] = []
    for word in _WORD.findall(text):
        seen = set("".join(examples))
        if any(not char.isascii() and char not in seen for char in word):
            examples.append(word)
        if len(examples) == _MAX_EXAMPLES:
            break
    return examples


def _decode_cp1252(data: bytes) -> str | None:
    """Return a file's text if it is beyond doubt that it is in Windows-1252."""
    line_ends = data.count(b"\r\n")
    # Excel writes the line feeds in a cell alone.
    if not line_ends or data.count(b"\r") != line_ends or not data.partition(b"\n")[0].endswith(b"\r"):
        return None
    try:
        text = data.decode("cp1252")
    except UnicodeDecodeError:
        return None
    return None if _OTHERS.search(text) or "\0" in text else text
