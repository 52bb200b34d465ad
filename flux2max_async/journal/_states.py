"""Small values that sessions keep in a journal under a name, such as what they have learned. Blocking."""

import json
from collections.abc import Callable, Mapping
from typing import Any

from flux2max_async._exceptions import JournalError
from flux2max_async._text import get_logger

log = get_logger("journal")

State = Mapping[str, Any]
ChangeState = Callable[[State | None], State]
"""Returns the new value of a state; None stands for one that isn't there. Pure: it runs in the journal's thread."""

CREATE_STATES = "CREATE TABLE IF NOT EXISTS states (name TEXT PRIMARY KEY, value TEXT NOT NULL)"


class StateTable:
    """The states in a journal.

    Args:
        journal: The journal's name, for errors.
        read: Returns what is stored under a name, or None, and keeps others from changing it in a transaction.
        write: Stores a value under a name. Its transactions are the caller's.
    """

    def __init__(self, journal: object, read: Callable[[str], Any], write: Callable[[str, str], None]) -> None:
        self._journal = journal
        self._read = read
        self._write = write

    def load(self, name: str) -> State | None:
        """Return a state; None if there is none.

        Raises:
            JournalError: Its row is damaged.
        """
        value = self._read(name)
        return None if value is None else decode_state(name, value, f"the journal {self._journal}")

    def update(self, name: str, change: ChangeState) -> None:
        """Replace a state with what `change` returns for it; one that is damaged counts as missing."""
        try:
            state = self.load(name)
        except JournalError as error:
            log.warning("%s; it is replaced", error)
            state = None
        self._write(name, encode_state(change(state)))


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
