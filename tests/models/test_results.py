"""Snapshots and outcomes: immutable, comparable, and without secrets in their repr."""

import copy
import pickle
import traceback
from collections.abc import Callable
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import attrs
import pytest

from flux2max_async import (
    Completed,
    Failed,
    FluxError,
    GeneratedImage,
    GenerationRequest,
    Outcome,
    RateLimitedError,
    TaskFailedError,
    TaskSnapshot,
    TaskStatus,
    Usage,
)
from flux2max_async._models.results import is_inline

REQUEST = GenerationRequest("a lighthouse", webhook_secret="hush-7f3a9c", extra={"steps": 4})
WITHOUT_SECRET = attrs.evolve(REQUEST, webhook_secret=None)
IMAGE = GeneratedImage(url="https://pictures.example/0.jpeg", type="image", task_id="t1", extra={"jobId": "j1"})
USAGE = Usage(cost=Decimal("0.07"), discount=Decimal(1), extra={"currency": "USD"})
COMPLETED = Completed(
    task_id="t1", request=REQUEST, images=(IMAGE,), usage=USAGE, metadata={"region": "eu"}, elapsed=8.25, polls=3
)
FAILED = Failed(
    task_id="t1",
    request=REQUEST,
    error=TaskFailedError("the model gave up", task_id="t1", code="boom"),
    elapsed=8.25,
    polls=3,
)
SNAPSHOT = TaskSnapshot(
    task_id="t1",
    status=TaskStatus.COMPLETED,
    progress=1.0,
    images=(IMAGE,),
    usage=USAGE,
    created_at=datetime(2025, 11, 22, 10, 0, tzinfo=UTC),
    error=None,
    metadata={"region": "eu"},
    raw={"id": "t1", "status": "completed", "token": "unchanged"},
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
def test_completed_and_failed_tasks_have_ended(status: TaskStatus, ended: bool) -> None:
    """`ended` is True for the two final states and False for the others."""
    assert status.ended is ended


def test_a_status_is_the_text_of_the_service() -> None:
    """A status equals the service's text for it and prints as that text."""
    texts = ["pending", "in_progress", "completed", "failed"]

    assert list(TaskStatus) == texts
    assert [str(status) for status in TaskStatus] == texts


def test_outcomes_can_be_matched() -> None:
    """`match` over the two classes destructures an outcome."""

    def describe(outcome: Outcome) -> str:
        match outcome:
            case Completed(images=images, usage=usage):
                return f"{len(images)} for {usage and usage.cost}"
            case Failed(error=error):
                return str(error)

    assert describe(COMPLETED) == "1 for 0.07"
    assert describe(FAILED) == "the model gave up"


def test_ok_distinguishes_the_outcomes() -> None:
    """`ok` is True for images and False for an error; it is not a parameter."""
    outcomes: list[Outcome] = [COMPLETED, FAILED]

    assert [outcome.ok for outcome in outcomes] == [True, False]


def test_unwrap_of_a_completed_outcome_returns_it() -> None:
    """`unwrap()` of a completed outcome is the outcome itself."""
    unwrapped = COMPLETED.unwrap()

    assert unwrapped is COMPLETED


def test_unwrap_of_a_failed_outcome_raises_its_error() -> None:
    """`unwrap()` of a failed outcome raises the same error object, with its cause."""
    cause = OSError("disconnected")
    error = RateLimitedError("slow down", status=429, retry_after=2.0)
    error.__cause__ = cause

    with pytest.raises(RateLimitedError) as caught:
        Failed(task_id=None, request=REQUEST, error=error, elapsed=1.0, polls=0).unwrap()

    assert caught.value is error
    assert caught.value.__cause__ is cause


def test_the_traceback_of_an_unwrapped_error_does_not_grow() -> None:
    """Each `unwrap()` raises the error with a new traceback."""
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
def test_results_are_immutable(value: Any, name: str) -> None:
    """No field of a result can be set."""
    with pytest.raises(AttributeError):
        setattr(value, name, None)


@pytest.mark.parametrize("value", [COMPLETED, SNAPSHOT, IMAGE, USAGE], ids=lambda value: type(value).__name__)
@pytest.mark.parametrize(
    "copied",
    [copy.copy, copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))],
    ids=["copy", "deepcopy", "pickle"],
)
def test_a_result_survives_copying(value: Any, copied: Callable[[Any], Any]) -> None:
    """A copied or unpickled result is equal to the original, but for the secret of its request."""
    value = attrs.evolve(value, request=WITHOUT_SECRET) if isinstance(value, Completed) else value
    copy_ = copied(value)

    assert copy_ == value
    assert repr(copy_) == repr(value)


def test_a_failed_outcome_survives_pickle() -> None:
    """An unpickled outcome has an error of the same class with the same fields; errors themselves are never equal."""
    unpickled = pickle.loads(pickle.dumps(FAILED))

    assert (unpickled.task_id, unpickled.request, unpickled.elapsed, unpickled.polls) == (
        "t1",
        WITHOUT_SECRET,
        8.25,
        3,
    )
    assert type(unpickled.error) is TaskFailedError
    assert vars(unpickled.error) == vars(FAILED.error)
    assert unpickled.ok is False


@pytest.mark.parametrize("outcome", [COMPLETED, FAILED], ids=["Completed", "Failed"])
def test_the_repr_of_an_outcome_shows_no_secret(outcome: Outcome) -> None:
    """The repr of an outcome shows the task and the prompt, but not the request's webhook secret."""
    shown = repr(outcome)

    assert "'t1'" in shown
    assert "a lighthouse" in shown
    assert "hush-7f3a9c" not in shown


def test_the_repr_of_a_snapshot_does_not_show_raw() -> None:
    """The JSON object of the service can be read from a snapshot, but is not in its repr."""
    shown = repr(SNAPSHOT)

    assert SNAPSHOT.raw["token"] == "unchanged"
    assert "unchanged" not in shown
    assert "t1" in shown


def test_missing_facts_are_none_or_empty() -> None:
    """A snapshot of an id and a status has no images, usage or error, and its mappings are not shared."""
    first, second = (TaskSnapshot(task_id="t1", status=TaskStatus.PENDING) for _ in range(2))

    assert first == second
    assert (first.progress, first.images, first.usage, first.created_at, first.error) == (None, (), None, None, None)
    assert first.partial_error is None
    assert first.metadata == first.raw == Usage().extra == {}
    assert first.metadata is not second.metadata
    assert (Usage().cost, Usage().discount) == (None, None)


def test_only_what_identifies_an_outcome_is_required() -> None:
    """Tests of an application can create outcomes from an id and images, or from an error alone."""
    completed, failed = Completed(task_id="t1", images=(IMAGE,)), Failed(error=FluxError("no"))

    assert (completed.request, completed.usage, completed.metadata) == (None, None, {})
    assert completed.partial_error is None
    assert (completed.elapsed, completed.polls, completed.replayed, completed.saved) == (0.0, 0, False, ())
    assert (failed.task_id, failed.request, failed.elapsed, failed.polls) == (None, None, 0.0, 0)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://pictures.example/0.jpeg?Signature=abc", "'https://pictures.example/0.jpeg?Signature=abc'"),
        (f"https://p.example/?{'s' * 2000}", f"'https://p.example/?{'s' * 81}... (2019 characters)'"),
        ("data:image/png;base64,iVBORw0KGgo", "'data:image/png;base64,... (11 characters)'"),
        ("DATA:image/png;base64,iVBORw0KGgo", "'DATA:image/png;base64,... (11 characters)'"),
        (f"data:image/png;base64,{'A' * 5_000_000}", "'data:image/png;base64,... (5000000 characters)'"),
        (f"data:{'A' * 5_000_000}", f"'data:{'A' * 195},... (0 characters)'"),
        ("data:", "'data:,... (0 characters)'"),
    ],
    ids=["link", "signed link", "inline", "upper case", "large", "malformed", "empty"],
)
def test_the_repr_of_an_inline_image_shows_its_length(url: str, shown: str) -> None:
    """The repr of an image shows a link, but of an inline image only the length."""
    image = attrs.evolve(IMAGE, url=url)

    assert f"(url={shown}, " in repr(image)
    assert len(repr(attrs.evolve(COMPLETED, images=(image,)))) < 1000
    assert is_inline(url) is not url.startswith("https")


def test_the_time_of_receipt_does_not_distinguish_images() -> None:
    """Images that were received at different times are equal, and the time is not in their repr."""
    received = attrs.evolve(IMAGE, received_at=datetime(2025, 11, 22, 10, 0, tzinfo=UTC))

    assert received == IMAGE
    assert repr(received) == repr(IMAGE)
    assert IMAGE.received_at is None


@pytest.mark.parametrize("kind", [Usage, GeneratedImage, TaskSnapshot, Completed, Failed])
def test_fields_are_keyword_only(kind: type) -> None:
    """The order of the fields is not part of the API."""
    assert all(field.kw_only for field in attrs.fields(kind))
    with pytest.raises(TypeError, match="positional"):
        kind("t1")
