"""The words for the state of a task: one table for polls and webhooks."""

import json
import re
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.responses import finished, make_response

from flux2max_async import (
    ContentModeratedError,
    ProtocolError,
    ResponseError,
    TaskFailedError,
    TaskNotFoundError,
    TaskSnapshot,
    TaskStatus,
)
from flux2max_async._api.codec import parse_poll
from flux2max_async._api.statuses import is_moderated, is_not_found, status_of
from flux2max_async.webhooks import parse

RUNNING = ("in_progress", "processing", "queued", "submitted", "starting", "running")
COMPLETED = ("completed", "success", "succeeded", "ready", "done")
FAILED = ("failed", "error", "cancelled", "canceled", "aborted", "timeout", "expired", "rejected")
MODERATED = ("moderated", "request moderated", "content moderated")
UNKNOWN = ("dreaming", "step 3 of 9", "not ready", "unmoderated", "")
WORDS = {
    "pending": TaskStatus.PENDING,
    **dict.fromkeys(RUNNING, TaskStatus.IN_PROGRESS),
    **dict.fromkeys(COMPLETED, TaskStatus.COMPLETED),
    **dict.fromkeys((*FAILED, *MODERATED), TaskStatus.FAILED),
}

SPELLINGS: dict[str, Callable[[list[str]], str]] = {
    "upper case with underscores": lambda parts: "_".join(parts).upper(),
    "capitals with spaces": lambda parts: " ".join(parts).title(),
    "hyphens": lambda parts: f" {'-'.join(parts)}\n",
    "in one word": lambda parts: "".join(map(str.capitalize, parts)),
}

IMAGES = finished()["output"]
ERROR = {"code": "boom", "message": "it broke"}


def poll(body: dict[str, object]) -> TaskSnapshot:
    return parse_poll(make_response(body), "t1")


def deliver(body: dict[str, object]) -> TaskSnapshot:
    return parse(json.dumps(body).encode())


def task(word: object, *, has_images: bool, has_error: bool) -> dict[str, object]:
    return finished(status=word, output=IMAGES if has_images else [], error=ERROR if has_error else None)


READERS = pytest.mark.parametrize("read", [poll, deliver])
Read = Callable[[dict[str, object]], TaskSnapshot]


@READERS
@pytest.mark.parametrize("spelling", SPELLINGS.values(), ids=SPELLINGS)
@pytest.mark.parametrize(("word", "status"), WORDS.items())
def test_known_word(word: str, status: TaskStatus, spelling: Callable[[list[str]], str], read: Read) -> None:
    """Each known word means the same in polls and webhooks, regardless of case, hyphens, spaces and underscores."""
    text = spelling(re.split("[ _]", word))
    snapshot = read(task(text, has_images=True, has_error=False))

    assert snapshot.status is status
    assert snapshot.raw["status"] == text
    assert len(snapshot.images) == 1
    assert snapshot.partial_error is None
    assert type(snapshot.error) is (
        ContentModeratedError if word in MODERATED else TaskFailedError if word in FAILED else type(None)
    )


@READERS
@pytest.mark.parametrize("has_error", [False, True], ids=["", "error"])
@pytest.mark.parametrize("has_images", [False, True], ids=["", "images"])
@pytest.mark.parametrize("word", ["pending", *RUNNING])
def test_running_task(word: str, has_images: bool, has_error: bool, read: Read) -> None:
    """A task that is reported as running is running, even with an error or an image beside that."""
    snapshot = read(task(word, has_images=has_images, has_error=has_error))

    assert snapshot.status is WORDS[word]
    assert (snapshot.error, snapshot.partial_error) == (None, None)


@READERS
@pytest.mark.parametrize("word", COMPLETED)
def test_completed_task(word: str, read: Read) -> None:
    """A completed task has images, and perhaps an error that tells why others are missing; with neither it is unreadable."""
    partial = read(task(word, has_images=True, has_error=True))
    failed = read(task(word, has_images=False, has_error=True))

    assert (partial.status, partial.error) == (TaskStatus.COMPLETED, None)
    assert partial.partial_error is not None
    assert (partial.partial_error.task_id, partial.partial_error.code) == ("t1", "boom")
    assert (failed.status, failed.partial_error) == (TaskStatus.FAILED, None)
    assert failed.error is not None
    assert (failed.error.code, failed.error.message) == ("boom", "it broke")
    with pytest.raises(ProtocolError, match="task t1 is reported as completed, but has no output"):
        read(task(word, has_images=False, has_error=False))


@READERS
@pytest.mark.parametrize("has_images", [False, True], ids=["", "images"])
@pytest.mark.parametrize("word", FAILED)
def test_failed_task(word: str, has_images: bool, read: Read) -> None:
    """A failed task has the service's error; without one, the word itself is the reason."""
    with_error = read(task(word, has_images=has_images, has_error=True))
    without_error = read(task(word, has_images=has_images, has_error=False))

    assert with_error.status is without_error.status is TaskStatus.FAILED
    assert type(with_error.error) is type(without_error.error) is TaskFailedError
    assert (with_error.error.code, with_error.error.message) == ("boom", "it broke")
    reason = (None, "the service gave no reason") if word == "failed" else (word, word)
    assert (without_error.error.code, without_error.error.message) == reason


@READERS
@pytest.mark.parametrize("has_error", [False, True], ids=["", "error"])
@pytest.mark.parametrize("word", MODERATED)
def test_moderated_task(word: str, has_error: bool, read: Read) -> None:
    """A status that names moderation is a refusal by it, whatever error there is."""
    snapshot = read(task(word, has_images=False, has_error=has_error))

    assert snapshot.status is TaskStatus.FAILED
    assert type(snapshot.error) is ContentModeratedError
    assert (snapshot.error.code, snapshot.error.message) == (word, "it broke" if has_error else word)


@READERS
@pytest.mark.parametrize("word", UNKNOWN)
def test_unknown_word(word: str, read: Read) -> None:
    """With a word that nobody knows, images mean completed, and otherwise an error means failed."""
    running = read(task(word, has_images=False, has_error=False))
    failed = read(task(word, has_images=False, has_error=True))
    completed = read(task(word, has_images=True, has_error=False))
    partial = read(task(word, has_images=True, has_error=True))

    assert (running.status, running.error) == (TaskStatus.IN_PROGRESS, None)
    assert failed.status is TaskStatus.FAILED
    assert failed.error is not None
    assert (failed.error.code, failed.error.message) == ("boom", "it broke")
    assert (completed.status, completed.error, completed.partial_error) == (TaskStatus.COMPLETED, None, None)
    assert (partial.status, partial.error) == (TaskStatus.COMPLETED, None)
    assert partial.partial_error is not None
    assert partial.partial_error.message == "it broke"


@READERS
@pytest.mark.parametrize("word", [..., None, 7, True, [], {}], ids=str)
def test_missing_word(word: object, read: Read) -> None:
    """Without a word, images mean completed; without images the state of the task is unknown."""
    completed = read(task(word, has_images=True, has_error=False))
    partial = read(task(word, has_images=True, has_error=True))

    assert completed.status is partial.status is TaskStatus.COMPLETED
    assert completed.partial_error is None
    assert partial.partial_error is not None
    for has_error in (False, True):
        with pytest.raises((ProtocolError, ResponseError)):
            read(task(word, has_images=False, has_error=has_error))


@pytest.mark.parametrize("word", ["Task not found", "task_not_found", "TASK-NOT-FOUND", "TaskNotFound "])
def test_task_not_found(word: str) -> None:
    """In a poll, the status "Task not found" is what a 404 is; in a webhook, it is a failure."""
    with pytest.raises(TaskNotFoundError) as caught:
        poll({"id": None, "status": word, "result": None})
    delivered = deliver({"id": "t1", "status": word, "result": None})

    assert (caught.value.status, caught.value.from_api) == (404, True)
    assert delivered.status is TaskStatus.FAILED
    assert delivered.error is not None
    assert (delivered.error.code, delivered.error.message) == (word, word)


@pytest.mark.parametrize("value", ["not found", "task", "", None, 404, ["Task not found"]])
def test_other_values_do_not_report_a_missing_task(value: object) -> None:
    """Nothing else reports that there is no such task."""
    assert not is_not_found(value)


@pytest.mark.parametrize("word", UNKNOWN)
def test_status_of_an_unknown_word(word: str) -> None:
    """An unknown word has no status and doesn't report moderation, even if it resembles one that does."""
    assert status_of(word) is None
    assert not is_moderated(word)


def test_long_words_are_unknown() -> None:
    """A text of more than 100 characters is no known word, whatever is left of it without spaces."""
    for word in ("completed", "moderated", "task not found"):
        longest, longer = word.ljust(100), word.ljust(101)
        assert (status_of(longest) is None, is_not_found(longest)) == (status_of(word) is None, is_not_found(word))
        assert (status_of(longer), is_moderated(longer), is_not_found(longer)) == (None, False, False)


@settings(max_examples=200, deadline=None)
@given(word=st.text() | st.sampled_from([*WORDS, *UNKNOWN]), has_images=st.booleans(), has_error=st.booleans())
def test_polls_and_webhooks_agree(word: str, has_images: bool, has_error: bool) -> None:
    """Whatever the word, a poll and a webhook report the same state, images and error."""
    body = task(word, has_images=has_images, has_error=has_error)
    results: list[object] = []
    for read in (poll, deliver):
        try:
            snapshot = read(body)
        except ProtocolError as error:
            results.append(str(error))
        except TaskNotFoundError:
            results.append(TaskStatus.FAILED)
        else:
            errors = [str(error) for error in (snapshot.error, snapshot.partial_error)]
            results.append(
                TaskStatus.FAILED if is_not_found(word) else (snapshot.status, snapshot.images, errors, snapshot.raw)
            )

    assert results[0] == results[1]
