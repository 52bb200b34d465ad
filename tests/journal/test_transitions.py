"""What an outcome makes of a journal entry."""

from datetime import UTC, datetime
from decimal import Decimal

import attrs
import pytest

from flux2max_async import (
    BadRequestError,
    Completed,
    ContentModeratedError,
    DeadlineExceededError,
    Failed,
    FluxError,
    GeneratedImage,
    JournalEntry,
    Outcome,
    SubmissionUncertainError,
    TaskFailedError,
    TaskNotFoundError,
    TransportError,
)
from flux2max_async.journal import EntryState, Holder
from flux2max_async.journal._transitions import END_STATES, end_entry, submitted_entry

CREATED = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
SUBMITTED = datetime(2026, 1, 2, 3, 4, 6, tzinfo=UTC)
INTENT = JournalEntry(
    key="k",
    fingerprint="c1",
    request={},
    holder=Holder.US,
    created_at=CREATED,
    committed=Decimal("0.07"),
    webhook_token="token",
)
TASK = attrs.evolve(INTENT, state=EntryState.SUBMITTED, task_id="t0", submitted_at=SUBMITTED)
UNCERTAIN = attrs.evolve(
    INTENT, state=EntryState.UNCERTAIN, holder=None, ended_at=CREATED, result={"error": {"message": "lost"}}
)

COMPLETED = Completed(task_id="t1", images=(GeneratedImage(url="https://a.example/", type="image", task_id="t1"),))
REFUSAL = BadRequestError("no", status=400)


def failed(error: FluxError, task_id: str | None = None) -> Failed:
    return Failed(task_id=task_id, error=error)


@pytest.mark.parametrize(
    ("outcome", "state", "task_id", "committed"),
    [
        (COMPLETED, "completed", "t1", "0.06"),
        (failed(TaskFailedError("no"), "t1"), "failed", "t1", "0.06"),
        (failed(ContentModeratedError("no"), "t1"), "failed", "t1", "0.06"),
        (failed(TaskNotFoundError("gone", status=404), "t1"), "failed", "t1", "0.06"),
        # The task exists: whatever the submit or a poll was answered, a rerun polls it.
        (failed(REFUSAL, "t1"), "submitted", "t1", "0.07"),
        (failed(DeadlineExceededError("late"), "t1"), "submitted", "t1", "0.07"),
        (failed(FluxError("unexpected"), "t1"), "submitted", "t1", "0.07"),
        # No task, or nobody knows.
        (failed(REFUSAL), "refused", None, "0.06"),
        (failed(ContentModeratedError("no")), "refused", None, "0.06"),
        (failed(TransportError("no connection", maybe_sent=False)), "refused", None, "0.06"),
        (failed(SubmissionUncertainError("lost")), "uncertain", None, "0.07"),
        (failed(FluxError("unexpected")), "uncertain", None, "0.07"),
    ],
)
def test_outcome_of_an_intent(outcome: Outcome, state: str, task_id: str | None, committed: str) -> None:
    """An intent takes the outcome's id, if there is one, and what was committed stays unless the cost is known."""
    entry = end_entry(INTENT, outcome, Decimal("0.06"), holder=None, secrets=())

    assert (entry.state, entry.task_id, entry.webhook_token, entry.holder) == (state, task_id, "token", None)
    assert entry.submitted_at == (CREATED if task_id else None)
    assert str(entry.committed) == committed
    assert (entry.ended_at is None) == (not entry.result) == (entry.state is EntryState.SUBMITTED)


@pytest.mark.parametrize("outcome", [COMPLETED, failed(REFUSAL, "t1"), failed(REFUSAL)])
def test_outcome_of_a_task(outcome: Outcome) -> None:
    """A task keeps its id and the time of its submit, whatever the outcome."""
    entry = end_entry(TASK, outcome, None, holder=None, secrets=())

    assert (entry.task_id, entry.submitted_at) == ("t0", SUBMITTED)
    assert entry.state in {EntryState.SUBMITTED, *END_STATES}


def test_uncertain_submit_becomes_a_task() -> None:
    """The error of an uncertain submit is forgotten when its task is known; an id that is known stays."""
    entry = submitted_entry(UNCERTAIN, "t1")

    assert entry == attrs.evolve(INTENT, holder=None, state=EntryState.SUBMITTED, task_id="t1", submitted_at=CREATED)
    assert submitted_entry(TASK, "t1") == TASK
