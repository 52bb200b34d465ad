"""Values in JSON that a service or a stranger has sent: parsed if they are what is expected, within limits."""

import json
import math
from datetime import UTC, datetime
from decimal import Decimal, InvalidOperation
from typing import Any

from flux2max_async._exceptions import ProtocolError

_MAX_STRUCTURAL_BYTES = 200_000
"""So many brackets, braces and commas take some 50 ms to parse, during which the event loop stands still."""
MAX_PREFIX_BYTES = 4_000_000
"""What is larger and no JSON is not searched for an object at its beginning: that would take as long again."""
_MAX_SECONDS = 1e11
"""A larger number is a time in a smaller unit: so many seconds after the epoch is the year 5138."""
_MAX_DECIMAL_EXPONENT = 50
"""No discount is that large, and computing with such a number would raise an error."""
_MAX_DIGITS = 50
"""Characters of an amount; the journal would not keep a text that is much longer."""


def load_object(data: bytes) -> dict[str, Any]:
    """Return the JSON object that the body of a response is, or begins with; an empty one if there is none."""
    try:
        body = parse_json(data)
    except ProtocolError:
        return {}
    except ValueError:
        body = _parse_prefix(data) if len(data) <= MAX_PREFIX_BYTES else None
    return body if isinstance(body, dict) else {}


def check_structure(data: bytes) -> None:
    """Check that JSON has no more values than an answer of the API may have.

    Raises:
        ProtocolError: It has, and would take too long to parse.
    """
    if len(data) > _MAX_STRUCTURAL_BYTES and sum(map(data.count, (b"[", b"{", b","))) > _MAX_STRUCTURAL_BYTES:
        raise ProtocolError(f"the JSON has more than {_MAX_STRUCTURAL_BYTES:,} brackets and commas")


def parse_json(data: bytes) -> object:
    """Parse JSON that a stranger has sent.

    Raises:
        ProtocolError: As for `check_structure()`.
        ValueError: It is not JSON, or nested too deeply.
    """
    check_structure(data)
    try:
        return json.loads(data)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def _parse_prefix(data: bytes) -> object:
    """Parse the JSON value with which data begins that is not JSON as a whole; None if there is none.

    Something may follow it, and what is not UTF-8 in it becomes U+FFFD.
    """
    try:
        value, _ = json.JSONDecoder(strict=False).raw_decode(data.decode("utf-8-sig", errors="replace").lstrip())
    except (ValueError, RecursionError):
        return None
    return value


def parse_finite(value: object) -> float | None:
    """Return a number, or a text that represents one, as a float; None for anything else, infinities included."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def parse_datetime(value: object, _: object = None) -> datetime | None:
    """Parse seconds since the epoch [C], or smaller units, or ISO 8601 [D], in UTC unless it has an offset.

    Returns:
        None for anything else.
    """
    try:
        seconds = value if type(value) is int else parse_finite(value)
        if seconds is not None:
            for _unit in range(3):  # milliseconds, microseconds, nanoseconds
                seconds = seconds / 1000 if abs(seconds) > _MAX_SECONDS else seconds
            return datetime.fromtimestamp(seconds, UTC)
        parsed = datetime.fromisoformat(value) if isinstance(value, str) else None
    except (ValueError, OverflowError, OSError):
        return None
    return parsed and parsed.replace(tzinfo=parsed.tzinfo or UTC)


def parse_decimal(value: object, _: object = None) -> Decimal | None:
    """Return a finite number with at most 50 characters, or a text that represents one; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        text = str(value).strip()
        number = Decimal(text if len(text) <= _MAX_DIGITS else "")
    except (InvalidOperation, ValueError):
        return None
    return number if number.is_finite() and abs(number.adjusted()) < _MAX_DECIMAL_EXPONENT else None


def parse_progress(value: object, _: object = None) -> float | None:
    """Return a number from 0 to 1, or a text that represents one, as a float; None for anything else."""
    progress = value if type(value) is float else parse_finite(value)
    return progress if progress is not None and 0 <= progress <= 1 else None


def parse_object(value: object, _: object = None) -> dict[str, Any]:
    """Return a copy of an object; an empty one for anything else."""
    return dict(value) if isinstance(value, dict) else {}
