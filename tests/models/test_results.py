"""Snapshots and outcomes: values that keep their promises."""

import copy
import pickle
import traceback
from collections.abc import Callable
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import pytest

from flux2max_async import (
    Completed,
    Failed,
    GeneratedImage,
    GenerationRequest,
    Outcome,
    RateLimitedError,
    TaskFailedError,
    TaskSnapshot,
    TaskStatus,
    Usage,
)

REQUEST = GenerationRequest("a lighthouse", webhook_secret="hush-7f3a9c", extra={"steps": 4})
IMAGE = GeneratedImage("https://pictures.example/0.jpeg", "image", "t1", {"jobId": "j1"})
USAGE = Usage(Decimal("0.07"), Decimal(1), {"currency": "USD"})
COMPLETED = Completed("t1", REQUEST, (IMAGE,), USAGE, {"region": "eu"}, 8.25, 3)
FAILED = Failed("t1", REQUEST, TaskFailedError("the model gave up", "t1", "boom"), 8.25, 3)
SNAPSHOT = TaskSnapshot(
    "t1",
    TaskStatus.COMPLETED,
    1.0,
    (IMAGE,),
    USAGE,
    datetime(2025, 11, 22, 10, 0, tzinfo=UTC),
    None,
    {"region": "eu"},
    {"id": "t1", "status": "completed", "token": "as it came"},
)


@pytest.mark.parametrize(
    ("status", "ended"),
    [
        (TaskStatus.PENDING, False),
        (TaskStatus.IN_PROGRESS, False),
        (TaskStatus.COMPLETED, True),
        (TaskStatus.FAILED, True),
    ],
)
def test_a_status_tells_whether_the_task_has_ended(status: TaskStatus, ended: bool) -> None:
    """Completed and failed tasks have ended, all others go on."""
    found = status.ended

    assert found is ended


def test_a_status_is_its_word() -> None:
    """A status compares and prints as the service's word for it, and the four words are the contract's."""
    words = ["pending", "in_progress", "completed", "failed"]

    assert list(TaskStatus) == words
    assert [str(status) for status in TaskStatus] == words


def test_outcomes_are_told_apart_by_match() -> None:
    """`match` over the two kinds takes an outcome apart."""

    def told(outcome: Outcome) -> str:
        match outcome:
            case Completed(images=images, usage=usage):
                return f"{len(images)} for {usage and usage.cost}"
            case Failed(error=error):
                return str(error)

    assert told(COMPLETED) == "1 for 0.07"
    assert told(FAILED) == "the model gave up"


def test_outcomes_are_told_apart_by_ok() -> None:
    """`ok` is True for pictures and False for an error, and nobody has to give it."""
    outcomes: list[Outcome] = [COMPLETED, FAILED]

    assert [outcome.ok for outcome in outcomes] == [True, False]


def test_unwrapping_what_completed_gives_it_back() -> None:
    """`unwrap()` of a completed outcome is the outcome itself."""
    unwrapped = COMPLETED.unwrap()

    assert unwrapped is COMPLETED


def test_unwrapping_what_failed_raises_its_error() -> None:
    """`unwrap()` of a failed outcome raises its very error, with its cause."""
    cause = OSError("the cable")
    error = RateLimitedError("slow down", 429, retry_after=2.0)
    error.__cause__ = cause

    with pytest.raises(RateLimitedError) as caught:
        Failed(None, REQUEST, error, 1.0, 0).unwrap()

    assert caught.value is error
    assert caught.value.__cause__ is cause


def test_an_error_that_is_raised_for_many_does_not_grow() -> None:
    """Each waiter gets the error with a traceback of its own: it doesn't collect those of the others."""
    lengths = []
    for _ in range(5):
        try:
            FAILED.unwrap()
        except TaskFailedError as error:
            lengths.append(len(traceback.extract_tb(error.__traceback__)))

    assert lengths == [2] * 5


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (COMPLETED, "images"),
        (COMPLETED, "ok"),
        (FAILED, "error"),
        (FAILED, "ok"),
        (SNAPSHOT, "status"),
        (SNAPSHOT, "raw"),
        (IMAGE, "url"),
        (USAGE, "cost"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_a_value_cannot_be_changed(value: Any, name: str) -> None:
    """What was seen stays what was seen."""
    with pytest.raises(AttributeError):
        setattr(value, name, None)


@pytest.mark.parametrize("value", [COMPLETED, SNAPSHOT, IMAGE, USAGE], ids=lambda value: type(value).__name__)
@pytest.mark.parametrize(
    "copied",
    [copy.copy, copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))],
    ids=["copy", "deepcopy", "pickle"],
)
def test_a_value_survives_copying(value: Any, copied: Callable[[Any], Any]) -> None:
    """What goes to another process and back is equal to what stayed."""
    twin = copied(value)

    assert twin == value
    assert repr(twin) == repr(value)


def test_a_failed_outcome_survives_pickle() -> None:
    """A failed outcome comes back with the same kind of error and the same facts; errors themselves are never equal."""
    twin = pickle.loads(pickle.dumps(FAILED))

    assert (twin.task_id, twin.request, twin.elapsed, twin.polls) == ("t1", REQUEST, 8.25, 3)
    assert type(twin.error) is TaskFailedError
    assert vars(twin.error) == vars(FAILED.error)
    assert twin.ok is False


@pytest.mark.parametrize("outcome", [COMPLETED, FAILED], ids=["Completed", "Failed"])
def test_an_outcome_shows_what_was_asked_but_no_secret(outcome: Outcome) -> None:
    """The repr of an outcome names task and prompt, and keeps the request's webhook secret."""
    shown = repr(outcome)

    assert "'t1'" in shown
    assert "a lighthouse" in shown
    assert "hush-7f3a9c" not in shown


def test_a_snapshot_does_not_show_the_raw_answer() -> None:
    """The raw answer is there for who asks, and doesn't flood logs."""
    shown = repr(SNAPSHOT)

    assert SNAPSHOT.raw["token"] == "as it came"
    assert "as it came" not in shown
    assert "t1" in shown


def test_what_the_service_does_not_say_is_empty() -> None:
    """A snapshot of an id and a status alone has no pictures, no bill, no error, and mappings of its own."""
    one, two = TaskSnapshot("t1", TaskStatus.PENDING), TaskSnapshot("t1", TaskStatus.PENDING)

    assert one == two
    assert (one.progress, one.images, one.usage, one.created_at, one.error) == (None, (), None, None, None)
    assert one.metadata == one.raw == Usage().extra == {}
    assert one.metadata is not two.metadata
    assert (Usage().cost, Usage().discount) == (None, None)
