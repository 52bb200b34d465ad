"""Outcomes written to journal entries and read back."""

import json
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import attrs
import pytest

from flux2max_async import (
    Completed,
    ContentModeratedError,
    Failed,
    GeneratedImage,
    JournalEntry,
    SubmissionUncertainError,
    TaskFailedError,
    TaskNotFoundError,
    TaskStatus,
    Usage,
)
from flux2max_async._models.results import NO_URL
from flux2max_async.journal import EntryState
from flux2max_async.journal._serialization import outcome_from_entry, outcome_to_json, sanitize, snapshot_from_entry


def ended_entry(outcome: Completed | Failed, secrets: tuple[str, ...] = ()) -> JournalEntry:
    """Return the entry of an outcome, as it is read from a file."""
    result: dict[str, Any] = json.loads(json.dumps(outcome_to_json(outcome, secrets=secrets)))
    state = EntryState.COMPLETED if isinstance(outcome, Completed) else EntryState.FAILED
    return JournalEntry(key="k", fingerprint="c1", request={}, state=state, task_id=outcome.task_id, result=result)


IMAGES = (
    GeneratedImage(url="https://images.example/0", type="image", task_id="t1", extra={"jobId": "j"}, index=0),
    GeneratedImage(url="https://images.example/1", type="image_url", task_id="t1", extra={}, index=1),
)


@pytest.mark.parametrize(
    "outcome",
    [
        Completed(
            task_id="t1",
            request=None,
            images=IMAGES,
            usage=Usage(cost=Decimal("0.0700"), discount=Decimal(1), extra={"x": [1]}),
            metadata={"a": None},
            elapsed=8.5,
            polls=3,
        ),
        Completed(
            task_id="t1",
            request=None,
            images=IMAGES,
            usage=Usage(cost=None, discount=None),
            metadata={},
            elapsed=8.5,
            polls=3,
        ),
        Completed(task_id="t1", request=None, images=IMAGES, usage=None, metadata={}, elapsed=8.5, polls=3),
        Failed(task_id="t1", request=None, error=TaskFailedError("boom", task_id="t1", code="c"), elapsed=2.0, polls=1),
        Failed(task_id="t1", request=None, error=ContentModeratedError("no", task_id="t1"), elapsed=2.0, polls=1),
        Failed(
            task_id="t1",
            request=None,
            error=TaskNotFoundError("gone", status=404, code="c", request_id="r"),
            elapsed=2.0,
            polls=1,
        ),
        Failed(task_id=None, request=None, error=SubmissionUncertainError("lost"), elapsed=2.0, polls=0),
    ],
)
def test_an_outcome_read_back_equals_the_original(outcome: Completed | Failed) -> None:
    """A replayed outcome equals the original, costs to the last digit, except that it is marked as replayed."""
    entry = ended_entry(outcome)
    replayed = outcome_from_entry(entry, None)

    assert replayed.replayed
    if isinstance(outcome, Completed):
        assert replayed == attrs.evolve(outcome, replayed=True)
        assert entry.error is None
    else:
        assert isinstance(replayed, Failed)
        assert (type(replayed.error), replayed.error.args, str(replayed.error)) == (
            type(outcome.error), outcome.error.args, str(outcome.error),
        )  # fmt: skip
        assert (replayed.task_id, replayed.elapsed, replayed.polls) == (outcome.task_id, outcome.elapsed, outcome.polls)
        assert entry.error == outcome.error.message


@pytest.mark.parametrize("error_class", [TaskFailedError, ContentModeratedError])
def test_a_partial_error_is_read_back(error_class: type[TaskFailedError]) -> None:
    """Why further images are missing is replayed, and passed on in a snapshot, without secrets."""
    partial_error = error_class("refused my-key", task_id="t1", code="c")
    outcome = Completed(task_id="t1", images=IMAGES, partial_error=partial_error)
    entry = ended_entry(outcome, secrets=("my-key",))
    replayed, snapshot = outcome_from_entry(entry, None), snapshot_from_entry(entry)

    assert isinstance(replayed, Completed)
    assert snapshot is not None
    for error in (replayed.partial_error, snapshot.partial_error):
        assert type(error) is error_class
        assert (error.message, error.task_id, error.code) == ("refused ***", "t1", "c")
    assert entry.error is None


def test_images_of_an_entry_are_as_old_as_its_end() -> None:
    """The age of a replayed URL is known: it was received when the entry ended."""
    ended_at = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
    entry = attrs.evolve(ended_entry(Completed(task_id="t1", images=IMAGES)), ended_at=ended_at)
    replayed = outcome_from_entry(entry, None)

    assert isinstance(replayed, Completed)
    assert [image.received_at for image in replayed.images] == [ended_at, ended_at]


@pytest.mark.parametrize("characters", [30, 4096, 3_000_000])
@pytest.mark.parametrize("scheme", ["data:image/png;base64,", "DATA:image/png;base64,"])
def test_an_inline_image_is_stored_as_its_length(characters: int, scheme: str) -> None:
    """An inline image is never stored, only its number of characters; its URL has to be requested again."""
    url = scheme.ljust(characters, "A")
    inline = GeneratedImage(url=url, type="image", task_id="t1", extra={"jobId": "j"}, index=0)
    entry = ended_entry(Completed(task_id="t1", images=(inline, IMAGES[1])))
    replayed = outcome_from_entry(entry, None)

    assert entry.to_dict()["result"]["images"][0] == {
        "url": NO_URL, "inline_characters": characters, "type": "image", "extra": {"jobId": "j"},
    }  # fmt: skip
    assert len(json.dumps(entry.to_dict())) < 1000
    assert isinstance(replayed, Completed)
    assert replayed.images == (attrs.evolve(inline, url=NO_URL), IMAGES[1])


def test_secrets_are_masked_and_long_texts_hashed() -> None:
    """Secrets that the service echoes are masked, and texts that may be images are replaced by their hashes."""
    outcome = Completed(
        task_id="t1",
        request=None,
        images=IMAGES,
        usage=None,
        metadata={"echo": ["my-key", {"my-key": 1}], "long": "x" * 10_000},
        elapsed=1.0,
        polls=1,
    )
    text = json.dumps(outcome_to_json(outcome, secrets=("my-key",)))

    assert "my-key" not in text
    assert len(text) < 1000


@pytest.mark.parametrize(
    ("value", "is_kept"),
    [
        (["x" * 4096] * 15, True),
        (["x" * 4096] * 17, False),
        (["x" * 3000] * 40_000, False),
        ({"x" * 1000 + str(number): None for number in range(100)}, False),
        (list(range(10_000)), True),
        ([[], {}] * 50_000, False),
        ([10**4000] * 20, False),
        ("x" * 10_000_000, True),
    ],
)
def test_values_that_are_too_large_are_left_out(value: object, *, is_kept: bool) -> None:
    """Metadata and further values of more than about 64,000 characters are replaced by a note; the images stay."""
    image = attrs.evolve(IMAGES[0], extra={"a": value})
    outcome = Completed(
        task_id="t1", request=None, images=(image,), usage=Usage(extra={"a": value}), metadata={"a": value}
    )
    data = outcome_to_json(outcome)
    replayed = outcome_from_entry(ended_entry(outcome), None).unwrap()

    for values in (data["metadata"], data["usage"]["extra"], data["images"][0]["extra"]):
        assert list(values) == (["a"] if is_kept else ["left_out"])
    assert len(json.dumps(data)) < 3 * 450_000
    assert replayed.images[0].url == image.url


def test_deep_nesting_is_cut() -> None:
    """JSON that is nested too deeply to be written is cut, whatever the service sends."""
    nested: list[Any] = []
    for _ in range(10_000):
        nested = [nested]

    assert "nested too deeply" in json.dumps(sanitize(nested, ()))


def test_sanitize_copies_and_masks() -> None:
    """Texts are masked at any depth, and values of any other kind stay what they are."""
    value = {"a secret": ("a secret", 1, 1.5, None, True, Decimal("0.1")), "b": [{"c": "secret"}]}

    assert sanitize(value, ("secret",)) == {
        "a ***": ["a ***", 1, 1.5, None, True, Decimal("0.1")],
        "b": [{"c": "***"}],
    }


# ---------------------------------------------------------------------- snapshots


def test_a_completed_entry_becomes_a_snapshot() -> None:
    """A snapshot of a completed entry holds what the service reported."""
    usage = Usage(cost=Decimal("0.07"), discount=None)
    outcome = Completed(task_id="t1", request=None, images=IMAGES, usage=usage, metadata={"a": 1}, elapsed=8.5, polls=3)
    snapshot = snapshot_from_entry(ended_entry(outcome))

    assert snapshot is not None
    assert (snapshot.task_id, snapshot.status, snapshot.error) == ("t1", TaskStatus.COMPLETED, None)
    assert (snapshot.images, snapshot.usage, snapshot.metadata) == (IMAGES, usage, {"a": 1})


@pytest.mark.parametrize("error_class", [TaskFailedError, ContentModeratedError])
def test_a_failed_entry_becomes_a_snapshot(error_class: type[TaskFailedError]) -> None:
    """A snapshot of a failed entry holds the error that the service reported."""
    error = error_class("boom", task_id="t1", code="c")
    snapshot = snapshot_from_entry(ended_entry(Failed(task_id="t1", request=None, error=error, elapsed=2.0, polls=1)))

    assert snapshot is not None
    assert (snapshot.task_id, snapshot.status) == ("t1", TaskStatus.FAILED)
    assert isinstance(snapshot.error, error_class)
    assert (snapshot.error.message, snapshot.error.code) == ("boom", "c")


def test_an_end_that_the_service_never_reported_is_no_snapshot() -> None:
    """A task that the service doesn't know any more, or that hasn't ended, has to be polled."""
    not_found = TaskNotFoundError("gone", status=404, code=None, request_id=None)
    forgotten = ended_entry(Failed(task_id="t1", request=None, error=not_found, elapsed=2.0, polls=1))
    running = JournalEntry(key="k", fingerprint="c1", request={}, state=EntryState.SUBMITTED, task_id="t1")

    assert snapshot_from_entry(forgotten) is None
    assert snapshot_from_entry(running) is None
