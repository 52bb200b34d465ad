"""What an outcome makes of a journal entry. Pure, but for the time of day.

An entry's states: INTENT (about to be submitted) -> SUBMITTED (has a task id) -> COMPLETED or FAILED. A submit that
certainly created nothing makes it REFUSED, one whose answer was lost UNCERTAIN. A task that is not followed to its end
here, for whatever reason, stays SUBMITTED. A webhook with the token of a submit takes its entry from any state without
a task id to SUBMITTED or to the end.
"""

from collections.abc import Sequence
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import attrs

from flux2max_async._exceptions import FluxError, SubmissionUncertainError, TaskFailedError, TaskNotFoundError
from flux2max_async._models.results import Completed, Failed, Outcome
from flux2max_async.journal._entry import EntryState, Holder, JournalEntry
from flux2max_async.journal._serialization import outcome_to_json

END_STATES = frozenset((EntryState.COMPLETED, EntryState.FAILED))


def end_entry(
    entry: JournalEntry, outcome: Outcome, cost: Decimal | None, *, holder: Holder | None, secrets: Sequence[str]
) -> JournalEntry:
    """Return the entry of a request that came to an outcome; the outcome may not be the task's end."""
    state, committed = state_after(outcome), committed_after(outcome, cost)
    if state is EntryState.REFUSED and entry.task_id is not None:
        state, committed = EntryState.SUBMITTED, None  # it is a task already, whatever ended this attempt to follow it
    changes: dict[str, Any] = {
        "state": state,
        "holder": holder,
        "cost": cost,
        "committed": entry.committed if committed is None else committed,
        "ended_at": None,
        "result": {},
    }
    if state is EntryState.SUBMITTED or state in END_STATES:
        changes |= _task_id_changes(entry, outcome.task_id)
    if state is not EntryState.SUBMITTED:
        changes |= {"ended_at": datetime.now(UTC), "result": outcome_to_json(outcome, secrets=secrets)}
    return attrs.evolve(entry, **changes)


def submitted_entry(entry: JournalEntry, task_id: str | None) -> JournalEntry:
    """Return the entry of a request that is a task, whose end is not known yet."""
    changes = _task_id_changes(entry, task_id)
    return attrs.evolve(entry, state=EntryState.SUBMITTED, ended_at=None, result={}, **changes)


def _task_id_changes(entry: JournalEntry, task_id: str | None) -> dict[str, Any]:
    """Return what a task id changes that only a webhook, or an error in the answer to the submit, has revealed."""
    return {} if entry.task_id is not None else {"task_id": task_id, "submitted_at": entry.created_at}


def committed_after(outcome: Outcome, cost: Decimal | None) -> Decimal | None:
    """Return what an outcome cost, in US dollars; None if that isn't known and the reservation has to stay."""
    match outcome:
        case Completed() | Failed(error=TaskNotFoundError()):
            return cost
        case _ if state_after(outcome) in {EntryState.FAILED, EntryState.REFUSED}:
            return cost or Decimal(0)
        case _:
            return None


def state_after(outcome: Outcome) -> EntryState:
    """Return the state that an outcome puts its entry into."""
    match outcome:
        case Completed():
            return EntryState.COMPLETED
        case Failed(error=SubmissionUncertainError()):
            return EntryState.UNCERTAIN
        case Failed(task_id=None, error=error):
            # An error of our own, of no kind in particular, says nothing about what was sent.
            return EntryState.UNCERTAIN if type(error) is FluxError else EntryState.REFUSED
        case Failed(error=TaskFailedError() | TaskNotFoundError()):
            return EntryState.FAILED
        case _:
            return EntryState.SUBMITTED
