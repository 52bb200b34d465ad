"""Texts of the service and of strangers, as they are shown in logs."""

import logging
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flux2max_async import (
    ConfigurationError,
    DownloadError,
    JournalError,
    ProtocolError,
    RateLimitedError,
    TaskFailedError,
)
from flux2max_async._text import describe, get_logger, printable, redact


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("", ""),
        ("a cat", "a cat"),
        ("eine K\u00e4tzin \u732b \U0001f431", "eine K\u00e4tzin \u732b \U0001f431"),
        ("a\nb\r\tc", r"a\nb\r\tc"),
        ("\x1b[31mred\x07", r"\x1b[31mred\x07"),
        ("\x9b31m\x85", r"\x9b31m\x85"),
        ("\u202egnp.exe\u2066\u200f", r"\u202egnp.exe\u2066\u200f"),
        ("\u2028\u2029\ufeff\x00", r"\u2028\u2029\ufeff\x00"),
        ("\ud800", r"\ud800"),
        ("x" * 200, "x" * 200),
        ("x" * 201, "x" * 199 + "\u2026"),
        ("\n" * 200, r"\n" * 99 + "\\" + "\u2026"),
    ],
    ids=repr,
)
def test_printable(text: str, shown: str) -> None:
    """Controls, line ends and bidi marks become escape sequences, and the text is shortened."""
    assert printable(text) == shown


@given(st.text(), st.integers(1, 50))
def test_any_text_becomes_printable(text: str, limit: int) -> None:
    """Whatever the text is, it is printable and no longer than the limit."""
    shown = printable(text, limit)

    assert shown.isprintable()
    assert len(shown) <= limit


def test_redact() -> None:
    """A secret is replaced in each form that it may have in a text."""
    assert redact('a"b, a\\"b and \\n', ('a"b', "\n")) == "***, *** and ***"


LONG = "x" * 1000


@pytest.mark.parametrize(
    ("error", "shown"),
    [
        (TaskFailedError("a\nb"), r"a\nb"),
        (TaskFailedError(LONG), "x" * 199 + "\u2026"),
        (RateLimitedError(LONG, status=429, code="c"), "x" * 199 + "\u2026 (HTTP 429, code c)"),
        (ProtocolError(LONG), "x" * 199 + "\u2026"),
        (RateLimitedError("no", status=429, code="\x1b"), r"no (HTTP 429, code \x1b)"),
        (OSError(28, "No space left", f"/{LONG}"), f"[Errno 28] No space left: '/{LONG}'"),
        (ValueError("\n"), r"\n"),
        (DownloadError(""), ""),
        (JournalError(f"the journal /{LONG}: the disk is full"), f"the journal /{LONG}: the disk is full"),
        (DownloadError(f"/{LONG} can't be written"), f"/{LONG} can't be written"),
        (ConfigurationError("x" * 3000), "x" * 1999 + "\u2026"),
    ],
    ids=repr,
)
def test_describe(error: Exception, shown: str) -> None:
    """The message is shortened, and the status and code that follow it are shown."""
    assert describe(error) == shown


@pytest.mark.parametrize(
    ("message", "arguments", "shown"),
    [
        ("plain", (), "plain"),
        ("task %s: poll %d", ("t\n1", 2), r"task t\n1: poll 2"),
        ("task %s after %.1f s: %s", ("t1", 1.25, JournalError("\x1b")), r"task t1 after 1.2 s: \x1b"),
        ("unfinished: %s", (["t\n1", LONG, "t3"],), r"unfinished: t\n1, " + "x" * 199 + "\u2026, t3"),
        ("journal %s: %s", (Path(f"/{LONG}\n"), None), f"journal /{LONG}\\n: None"),
        ("%(a)s", ({"a": "text"},), "text"),
    ],
)
def test_log_messages(message: str, arguments: tuple[Any, ...], shown: str, caplog: pytest.LogCaptureFixture) -> None:
    """The arguments of the messages of our loggers are shown safely, ids one by one."""
    get_logger("tests").warning(message, *arguments)

    assert caplog.messages == [shown]


def test_log_of_an_exception(caplog: pytest.LogCaptureFixture) -> None:
    """The traceback of an exception has no control characters, and neither long lines nor very many."""
    error = ValueError("first\nsecond \x1b[31m" + "x" * 1_000_000 + "\nlast" * 1000)
    try:
        raise error
    except ValueError:
        get_logger("tests").exception("unexpected: %s", error)

    (record,) = caplog.records
    assert record.exc_info is not None
    assert record.exc_info[1] is error
    text = logging.Formatter().format(record)
    lines = text.split("\n")
    assert lines[1] == "Traceback (most recent call last):"
    assert lines[-1] == "last"
    assert any(line.startswith(r"second \x1b[31mxxx") and line.endswith("\u2026") for line in lines)
    assert len(lines) <= 202
    assert len(text) < 10_000


def test_every_logger_is_safe() -> None:
    """Each logger of the package has the filter."""
    names = [name for name in logging.root.manager.loggerDict if name.startswith("flux2max_async.")]
    known = {name: logging.getLogger(name).filters for name in names if not name.endswith((".tests", ".emulator"))}

    assert {"flux2max_async.api", "flux2max_async.tasks", "flux2max_async.polling"} <= known.keys()
    assert all(known.values()), known
