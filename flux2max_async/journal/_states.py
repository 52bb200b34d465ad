"""The states in the tables of a journal."""

import json
import sqlite3
from pathlib import Path
from typing import Any

from flux2max_async._exceptions import JournalError
from flux2max_async._text import get_logger
from flux2max_async.journal._store_protocol import ChangeState, State

log = get_logger("journal")

CREATE_STATES = "CREATE TABLE IF NOT EXISTS states (name TEXT PRIMARY KEY, value TEXT NOT NULL)"


class StateTable:
    """The states in a journal's file.

    Args:
        connection: Its transactions are the caller's.
        path: The journal's file.
    """

    def __init__(self, connection: sqlite3.Connection, path: Path) -> None:
        self._connection = connection
        self._path = path

    def load(self, name: str) -> State | None:
        """Return a state; None if there is none.

        Raises:
            JournalError: Its row is damaged.
        """
        row = self._connection.execute("SELECT value FROM states WHERE name = ?", (name,)).fetchone()
        return None if row is None else decode_state(name, row[0], f"the journal {self._path}")

    def update(self, name: str, change: ChangeState) -> None:
        """Replace a state with what `change` returns for it; one that is damaged counts as missing."""
        try:
            state = self.load(name)
        except JournalError as error:
            log.warning("%s; it is replaced", error)
            state = None
        value = encode_state(change(state))
        self._connection.execute("INSERT OR REPLACE INTO states VALUES (?, ?)", (name, value))


def encode_state(state: State) -> str:
    """Return a state as JSON."""
    return json.dumps(dict(state), allow_nan=False)


def decode_state(name: str, value: Any, journal: str) -> State:
    """Return the state that a row holds.

    Args:
        name: The state's name.
        value: What `encode_state()` returned, unless the row is damaged.
        journal: What the error calls the journal.

    Raises:
        JournalError: The row is damaged.
    """
    try:
        state = json.loads(value)
    except (ValueError, TypeError, RecursionError) as error:
        raise JournalError(f"the state {name!r} in {journal} is damaged: {error!r}") from error
    if not isinstance(state, dict):
        raise JournalError(f"the state {name!r} in {journal} is damaged: it is not an object")
    return state
