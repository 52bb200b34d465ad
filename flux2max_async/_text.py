"""Texts of the service or of strangers, made safe to show: short, on one line, without secrets and controls."""

import json
import logging
import traceback
from collections.abc import Sequence
from typing import Any

from flux2max_async._exceptions import ProtocolError, ResponseError, TaskFailedError

MAX_LENGTH = 200
"""Characters of such a text that are shown."""
_MAX_LOCAL_LENGTH = 2000
"""Characters of this library's and the system's own messages, which may hold paths, and of lines of a traceback."""

_MAX_LINES = 200
"""Lines of a traceback."""


def printable(text: str, limit: int = MAX_LENGTH) -> str:
    """Return a text shortened, with escape sequences for what is not printable: controls, newlines, bidi marks."""
    cut = text[: limit + 1]  # a text may have megabytes
    if not cut.isprintable():
        cut = "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in cut)
    return cut if len(cut) <= limit else f"{cut[: limit - 1]}…"


def describe(error: BaseException) -> str:
    """Return the text of an error, with its message shortened if that may be the service's."""
    text = str(error)
    if isinstance(error, (ProtocolError, ResponseError, TaskFailedError)):
        return printable(error.message) + printable(text.removeprefix(error.message))
    return printable(text, _MAX_LOCAL_LENGTH)


def redact(text: str, secrets: Sequence[str]) -> str:
    """Return a text with the secrets replaced by asterisks, whether they are escaped in it or not."""
    for secret in secrets:
        for form in (secret, json.dumps(secret)[1:-1], secret.encode("unicode_escape").decode()):
            text = text.replace(form, "***")
    return text


class _PrintableArguments(logging.Filter):
    """Makes the arguments and tracebacks of log messages safe to show; a sequence becomes a list of its items."""

    def filter(self, record: logging.LogRecord) -> bool:
        if isinstance(record.args, tuple):
            record.args = tuple(map(_printable_argument, record.args))
        if record.exc_info and record.exc_info[1] is not None:
            # Formatters take the text that is there; handlers that need the exception itself have it.
            lines = "".join(traceback.format_exception(record.exc_info[1])).rstrip().split("\n")
            if len(lines) > _MAX_LINES:  # the exception itself is at the end
                lines = [*lines[: _MAX_LINES // 2], "...", *lines[-_MAX_LINES // 2 :]]
            record.exc_text = "\n".join(printable(line, _MAX_LOCAL_LENGTH) for line in lines)
        return True


_FILTER = _PrintableArguments()


def get_logger(name: str) -> logging.Logger:
    """Return a logger whose messages show no text of the service as it was received."""
    logger = logging.getLogger(f"flux2max_async.{name}")
    logger.addFilter(_FILTER)
    return logger


def _printable_argument(argument: Any) -> Any:
    match argument:
        case bool() | int() | float() | None:
            return argument
        case BaseException():
            return describe(argument)
        case str():
            return printable(argument)
        case list() | tuple():
            return ", ".join(printable(str(item)) for item in argument)
        case _:
            return printable(str(argument), _MAX_LOCAL_LENGTH)
