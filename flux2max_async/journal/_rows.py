"""The rows of a journal's database as entries, and the damage that they may have.

A row is read on its own: if a disk, another program or a person with an editor has damaged it, the request that it
belongs to is an error, and all others are read. Amounts of money are stored as whole nano-dollars, so that sums are
exact and the database can compute them.
"""

import json
from datetime import UTC, datetime
from decimal import ROUND_CEILING, Decimal
from typing import Any

from flux2max_async._exceptions import JournalError
from flux2max_async.journal._entry import EntryState, Holder, JournalEntry, SavedFile
from flux2max_async.journal._schema import process_is_gone
from flux2max_async.journal._serialization import to_json
from flux2max_async.journal._store_protocol import Row

NANO_DOLLARS_PER_DOLLAR = Decimal(10) ** 9
_MAX_NANO_DOLLARS = 2**62  # SQLite's integers have 64 bits
COLUMNS = """
    e.key, e.attempt, e.content, e.state, e.owner, e.task_id, e.cost, e.outlay, e.created, e.submitted, e.ended,
    e.request, e.result, e.files, e.token, o.id, o.place, o.pid
"""
SELECT = f"SELECT {COLUMNS}, e.id FROM entries e LEFT JOIN owners o ON o.id = e.owner"  # noqa: S608 - constants
# The holder may change everything, but a task stays a task, an end stays an end, and a completed request stays
# completed: a webhook may have revealed the task of a submit whose answer was lost. Others may add what isn't recorded
# yet: a task id, an end, or that the intent of a dropped owner is uncertain. An entry that nobody holds may be recorded
# again in the same state, with images that were saved since.
MAY_UPDATE = """
    owner = :us AND (state NOT IN ('completed', 'failed') OR :state IN (state, 'completed'))
        AND (state != 'submitted' OR :state IN ('submitted', 'completed', 'failed'))
    OR owner IS NULL AND state = :state AND NOT :keep_owner
    OR state IN ('intent', 'uncertain', 'refused') AND :state IN ('submitted', 'completed', 'failed')
    OR state = 'submitted' AND :state IN ('completed', 'failed')
    OR state = 'intent' AND :state = 'uncertain' AND (owner IS NULL OR owner NOT IN (SELECT id FROM owners))
"""
"""The condition for `record()` on the row of an entry."""


def decode_text(data: bytes) -> str | bytes:
    """Return a text of the file; unchanged if it isn't UTF-8, so that only its own row can't be read."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return data


def row_id(row: Row) -> int:
    """Return the id of an entry's row."""
    return int(row[18])


def entry_from_row(journal: object, row: Row, us: str | None = None) -> JournalEntry:
    """Return the entry of a row.

    Args:
        journal: The journal's name, for errors.
        row: A row of `SELECT`.
        us: The id of the owner that reads it, if one does.

    Raises:
        JournalError: The row is damaged. The error has the key.
    """
    try:
        return _parse(row, us)
    except (ValueError, TypeError, KeyError, ArithmeticError, OSError, RecursionError) as error:
        key = row[0] if isinstance(row[0], str) else repr(row[0])
        raise JournalError(f"the entry of {key!r} in the journal {journal} is damaged: {error!r}", key=key) from error


def intent_columns(entry: JournalEntry) -> dict[str, Any]:
    """Return what is stored of an intent, by column, without its owner."""
    return {
        "key": entry.key,
        "attempt": entry.attempt,
        "content": entry.fingerprint,
        "outlay": _to_nano_dollars(entry.committed),
        "created": _to_epoch(entry.created_at),
        "token": entry.webhook_token,
        "request": to_json(dict(entry.request)),
    }


def record_columns(entry: JournalEntry) -> dict[str, Any]:
    """Return what is stored of an entry once it was begun, by column, without its owner."""
    return {
        "key": entry.key,
        "attempt": entry.attempt,
        "state": entry.state,
        "task_id": entry.task_id,
        "cost": None if entry.cost is None else str(entry.cost),
        "outlay": _to_nano_dollars(entry.committed),
        "submitted": _to_epoch(entry.submitted_at),
        "ended": _to_epoch(entry.ended_at),
        "result": to_json(dict(entry.result)) if entry.result else "{}",
        "files": to_json([[file.location, file.size] for file in entry.files]) if entry.files else "[]",
    }


def _to_nano_dollars(dollars: Decimal) -> int:
    return min(int((dollars * NANO_DOLLARS_PER_DOLLAR).to_integral_value(ROUND_CEILING)), _MAX_NANO_DOLLARS)


def _to_epoch(time: datetime | None) -> float | None:
    return None if time is None else time.timestamp()


# ------------------------------------------------------------------ parsing


def _parse(row: Row, us: str | None) -> JournalEntry:
    (key, attempt, fingerprint, state, owner, task_id, cost, committed, created_at, submitted_at, ended_at, request,
     result, files, token) = row[:15]  # fmt: skip
    entry = JournalEntry(
        key=_checked(key, str),
        attempt=_checked(attempt, int),
        fingerprint=_checked(fingerprint, str),
        state=EntryState(state),
        holder=_holder(row, us),
        owner=_optional(owner, str),
        task_id=_optional(task_id, str),
        cost=None if cost is None else _amount(Decimal(cost)),
        committed=_amount(Decimal(_checked(committed, int))) / NANO_DOLLARS_PER_DOLLAR,
        created_at=_from_epoch(created_at),
        submitted_at=_from_epoch(submitted_at),
        ended_at=_from_epoch(ended_at),
        request=_checked(json.loads(request), dict),
        result=_checked(json.loads(result), dict),
        files=tuple(
            SavedFile.at(_checked(at, str), _checked(size, int)) for at, size in _checked(json.loads(files), list)
        ),
        webhook_token=_optional(token, str),
    )
    _ = entry.error  # raises an error if `result` holds one that can't be read
    if entry.state is EntryState.SUBMITTED and entry.task_id is None:
        raise ValueError("it is a task without an id")
    return entry


def _holder(row: Row, us: str | None) -> Holder | None:
    owner_id, host, pid = row[15:18]
    if us is not None and row[4] == us:
        return Holder.US
    return None if owner_id is None or process_is_gone(host, pid) else Holder.OTHER


def _checked(value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        raise TypeError(f"{value!r:.100} is not of type {kind.__name__}")
    return value


def _optional(value: Any, kind: type) -> Any:
    return value if value is None else _checked(value, kind)


def _amount(number: Decimal) -> Decimal:
    if not number.is_finite() or number < 0:
        raise ValueError(f"{number} is not an amount of money")
    return number


def _from_epoch(seconds: float | None) -> datetime | None:
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC)
