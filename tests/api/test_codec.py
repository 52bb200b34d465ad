"""The wire: what is sent, and everything that may come back."""

import json
import math
import pickle
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from email.utils import format_datetime
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.responses import RECEIVED, finished, picture, reply
from support.strategies import DATE_LIKE, DATES, JSON, TASKS, check_snapshot

from flux2max_async import (
    AuthenticationError,
    BadRequestError,
    ContentModeratedError,
    FluxError,
    GeneratedImage,
    GenerationRequest,
    InsufficientBalanceError,
    InvalidRequestError,
    PermissionDeniedError,
    ProtocolError,
    RateLimitedError,
    ResponseError,
    ServerError,
    TaskFailedError,
    TaskNotFoundError,
    TaskSnapshot,
    TaskStatus,
)
from flux2max_async._api.codec import HttpRequest, build_poll, build_submit, parse_poll, parse_submit, status_of
from flux2max_async._api.response import HttpResponse, problem, response_error

TASK = "/model/v1/generation/task/"
SECRET = "hush-7f3a9c"


def poll(body: object, status: int = 200) -> TaskSnapshot:
    return parse_poll(reply(body, status), "t1")


def running(**changes: object) -> dict[str, object]:
    """Make a task object that is still running."""
    return finished(**({"status": "in_progress", "output": ..., "usage": ..., "progress": ...} | changes))


def contents(*found: object) -> list[object]:
    """Make an output of one group."""
    return [{"content": list(found)}]


def outcome(read: Callable[[], TaskSnapshot]) -> TaskSnapshot | ProtocolError | ResponseError:
    """Read an answer; whatever is raised that isn't one of the two errors goes on."""
    try:
        return read()
    except (ProtocolError, ResponseError) as error:
        return error


# ---------------------------------------------------------------------- calls


def test_a_prompt_alone_is_sent_in_the_envelope() -> None:
    """A submit is a POST of the model and one set of parameters, with nothing in it that the caller didn't set."""
    call = build_submit(GenerationRequest("a lighthouse at dawn"))

    assert (call.method, call.path) == ("POST", "/model/v1/generation")
    assert json.loads(call.body or b"") == {
        "model": "flux_2_max",
        "input": [{"params": {"prompt": "a lighthouse at dawn"}}],
    }


def test_every_parameter_goes_out_under_its_name() -> None:
    """All that the caller set is sent under the names of the vendor's page, but for the caller's own key."""
    request = GenerationRequest(
        "a lighthouse 灯台",
        input_images=["https://pictures.example/a.png", picture()],
        seed=0,
        width=0,
        height=768,
        safety_tolerance=0,
        output_format="jpeg",
        webhook_url="https://app.example/hook",
        webhook_secret=SECRET,
        extra={"prompt_upsampling": False, "nothing": None},
        key="row 1",
    )
    params = json.loads(build_submit(request).body or b"")["input"][0]["params"]

    assert next(iter(params)) == "prompt"
    assert params == {
        "prompt": "a lighthouse 灯台",
        "input_image": "https://pictures.example/a.png",
        "input_image_2": params["input_image_2"],
        "seed": 0,
        "width": 0,
        "height": 768,
        "safety_tolerance": 0,
        "output_format": "jpeg",
        "webhook_url": "https://app.example/hook",
        "webhook_secret": SECRET,
        "prompt_upsampling": False,
    }


def test_a_picture_that_cannot_be_read_is_told_by_its_place(tmp_path: Path) -> None:
    """A local picture that is gone when the request is sent is an InvalidRequestError, which says which one."""
    request = GenerationRequest("a lighthouse", input_images=["https://pictures.example/a.png", tmp_path / "gone.png"])

    with pytest.raises(InvalidRequestError) as caught:
        build_submit(request)

    assert caught.value.field == "input_images"
    assert str(caught.value).startswith("input_images[1]: ")


@pytest.mark.parametrize(
    ("task_id", "encoded"),
    [
        ("abc-123_X.~", "abc-123_X.~"),
        ("a/b", "a%2Fb"),
        ("../../admin", "..%2F..%2Fadmin"),
        (".", "%2E"),
        ("..", "%2E%2E"),
        ("...", "..."),
        ("a b", "a%20b"),
        ("a?b#c&d", "a%3Fb%23c%26d"),
        ("100%", "100%25"),
        ("%2F", "%252F"),
        ("ä", "%C3%A4"),
        ("a\r\nHost: evil", "a%0D%0AHost%3A%20evil"),
    ],
)
def test_a_task_id_is_one_segment_of_the_path(task_id: str, encoded: str) -> None:
    """Whatever an id looks like, it can't leave its place in the path."""
    call = build_poll(task_id)

    assert call == HttpRequest("GET", TASK + encoded, None)


@settings(max_examples=100, deadline=None)
@given(st.text(st.characters(exclude_categories=()), min_size=1))
def test_any_text_can_be_a_task_id(task_id: str) -> None:
    """Any text that JSON can hold, half a surrogate pair too, becomes a path that reads back as the id."""
    path = build_poll(task_id).path
    segment = path.removeprefix(TASK)

    assert path.isascii()
    assert path.startswith(TASK)
    assert not set(segment) & set("/?#\\ ")
    assert segment not in {"", ".", ".."}
    assert unquote(segment, errors="surrogatepass") == task_id


def test_what_may_hold_a_secret_is_not_shown() -> None:
    """The repr of a call and of a reply shows neither bodies nor headers."""
    call = build_submit(GenerationRequest("a lighthouse", webhook_secret=SECRET))
    answer = reply({"echo": SECRET}, headers={"Set-Cookie": SECRET})

    assert SECRET.encode() in (call.body or b"")
    assert SECRET not in repr(call)
    assert SECRET not in repr(answer)
    assert "200" in repr(answer)


# ---------------------------------------------------------------------- answers to a submit


def test_a_submit_gives_a_snapshot_of_the_new_task() -> None:
    """The protocol's example of an answer to a submit is a running task with an id."""
    body = {"id": "t1", "status": "in_progress", "model": "flux_2_max", "created_at": 1763800000}
    snapshot = parse_submit(reply(body))

    assert snapshot == TaskSnapshot(
        "t1", TaskStatus.IN_PROGRESS, created_at=datetime(2025, 11, 22, 8, 26, 40, tzinfo=UTC), raw=body
    )


@pytest.mark.parametrize(
    ("body", "task_id", "status"),
    [
        ({"id": "t1"}, "t1", TaskStatus.IN_PROGRESS),
        ({"id": 42, "status": "pending"}, "42", TaskStatus.PENDING),
        ({"id": 0}, "0", TaskStatus.IN_PROGRESS),
        ({"id": "t1", "status": None, "output": None}, "t1", TaskStatus.IN_PROGRESS),
        ({"id": "t1", "status": 7, "created_at": [], "output": "?", "usage": 0}, "t1", TaskStatus.IN_PROGRESS),
        ({"id": "t1", "status": "completed"}, "t1", TaskStatus.IN_PROGRESS),
        ({"id": "t1", "message": "accepted"}, "t1", TaskStatus.IN_PROGRESS),
        ({"id": "t1", "error": {"code": "odd", "message": "half-hearted"}}, "t1", TaskStatus.IN_PROGRESS),
        ({"id": "t1", "status": "failed", "error": "no"}, "t1", TaskStatus.FAILED),
        (finished(), "t1", TaskStatus.COMPLETED),
    ],
    ids=lambda value: json.dumps(value)[:60] if isinstance(value, dict) else "",
)
def test_with_an_id_a_submit_cannot_fail(body: dict[str, object], task_id: str, status: TaskStatus) -> None:
    """Once there is an id, a task exists and costs money: nothing else in the answer makes us lose it."""
    snapshot = parse_submit(reply(body, 201))

    assert snapshot.task_id == task_id
    assert snapshot.status is status
    assert snapshot.raw == body


@pytest.mark.parametrize(
    ("body", "code", "message"),
    [
        ({"error": {"code": "bad_prompt", "message": "no"}}, "bad_prompt", "no"),
        ({"error": {"code": 123, "error_message": "no"}}, "123", "no"),
        ({"id": None, "error": {"message": "no"}}, None, "no"),
        ({"id": "", "error": "no"}, None, "no"),
        ({"id": True, "error": "bad_prompt", "message": "no"}, "bad_prompt", "no"),
        ({"message": "no"}, None, "no"),
        ({"code": 7, "message": "no"}, "7", "no"),
        ({"status": {"code": 7, "message": "no"}}, "7", "no"),
        ({"id": "", "detail": "no"}, None, "no"),
    ],
    ids=lambda value: json.dumps(value)[:60] if isinstance(value, dict) else "",
)
def test_without_an_id_a_submit_is_refused(body: dict[str, object], code: str | None, message: str) -> None:
    """An answer with an error and no id is a refusal whatever its HTTP status, and shows its error."""
    with pytest.raises(ResponseError) as caught:
        parse_submit(reply(body))

    assert (caught.value.status, caught.value.code, caught.value.message) == (200, code, message)


@pytest.mark.parametrize("body", [{}, {"id": None}, {"id": ""}, {"id": []}, {"id": 1.5}, {"status": "in_progress"}])
def test_neither_id_nor_error_breaks_the_protocol(body: dict[str, object]) -> None:
    """An answer that neither names a task nor refuses one leaves it open whether there is one, and is told as that."""
    with pytest.raises(ProtocolError, match="neither a task id nor an error"):
        parse_submit(reply(body))


BROKEN = {
    "nothing": b"",
    "a page": b"<html><h1>Welcome to nginx!</h1></html>",
    "half": b'{"id": "t1", "sta',
    "a list": b'[{"id": "t1"}]',
    "text": b'"t1"',
    "null": b"null",
    "a number": b"1e999",
    "no UTF-8": b'{"id": "\xff"}',
    "too deep": b'{"id":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "too long a number": b'{"id":' + b"1" * 5000 + b"}",
    "two objects": b'{"id": "t1"}{"id": "t2"}',
}


@pytest.mark.parametrize("body", BROKEN.values(), ids=BROKEN)
def test_what_is_no_json_object_breaks_the_protocol(body: bytes) -> None:
    """A 200 that is no JSON object is a ProtocolError, for a submit and for a poll."""
    with pytest.raises(ProtocolError, match="expected a JSON object") as submitted:
        parse_submit(reply(body))
    with pytest.raises(ProtocolError, match="expected a JSON object") as polled:
        parse_poll(reply(body), "t1")

    assert len(str(submitted.value)) < 400
    assert len(str(polled.value)) < 400


# ---------------------------------------------------------------------- the task


def test_a_finished_task_is_read_whole() -> None:
    """The protocol's example of a finished task gives every field of the snapshot."""
    body = finished()
    snapshot = poll(body)

    assert snapshot.task_id == "t1"
    assert snapshot.status is TaskStatus.COMPLETED
    assert snapshot.progress == 1.0
    assert snapshot.images == (GeneratedImage("https://pictures.example/0.jpeg", "image", "t1", {"jobId": "j1"}, 0),)
    assert snapshot.usage is not None
    assert (snapshot.usage.cost, snapshot.usage.discount) == (Decimal("0.07"), Decimal(1))
    assert snapshot.created_at == datetime(2025, 11, 22, 8, 26, 40, tzinfo=UTC)
    assert (snapshot.error, snapshot.metadata) == (None, {})
    assert snapshot.raw == body


@pytest.mark.parametrize(
    ("word", "status"),
    [
        ("pending", TaskStatus.PENDING),
        ("PENDING", TaskStatus.PENDING),
        ("in_progress", TaskStatus.IN_PROGRESS),
        ("In_Progress", TaskStatus.IN_PROGRESS),
        ("processing", TaskStatus.IN_PROGRESS),
        ("Processing", TaskStatus.IN_PROGRESS),
        ("completed", TaskStatus.COMPLETED),
        (" Completed\n", TaskStatus.COMPLETED),
        ("FAILED", TaskStatus.FAILED),
        ("hibernating", TaskStatus.IN_PROGRESS),
        ("", TaskStatus.IN_PROGRESS),
    ],
)
def test_a_status_is_read_without_regard_to_case(word: str, status: TaskStatus) -> None:
    """Every status seen in any writing is known; one that nobody knows yet counts as still running."""
    snapshot = poll(finished(status=word))

    assert snapshot.status is status
    assert snapshot.raw["status"] == word


@pytest.mark.parametrize(
    ("word", "status"), [("Processing", TaskStatus.IN_PROGRESS), ("hibernating", None), ("Ready", None)]
)
def test_an_unknown_status_is_told_from_a_known_one(word: str, status: TaskStatus | None) -> None:
    """Who wants to log unknown statuses can tell them."""
    found = status_of(word)

    assert found is status


@pytest.mark.parametrize(
    ("given", "progress"),
    [
        *((0, 0.0), (0.0, 0.0), (0.5, 0.5), (1, 1.0), ("0.25", 0.25)),
        *((None, None), (..., None), (-0.1, None), (50, None), (True, None), ("half", None), ([], None), ("", None)),
        *((math.nan, None), (math.inf, None), ("nan", None), ({}, None), (10**400, None)),
    ],
    ids=lambda value: str(value)[:20],
)
def test_progress_is_between_zero_and_one_or_unknown(given: object, progress: float | None) -> None:
    """A progress that isn't a share of the way is no progress, and never spoils the answer."""
    snapshot = poll(running(progress=given))

    assert snapshot.progress == progress


@pytest.mark.parametrize(
    ("given", "created_at"),
    [
        (1763800000, datetime(2025, 11, 22, 8, 26, 40, tzinfo=UTC)),
        (1763800000.5, datetime(2025, 11, 22, 8, 26, 40, 500_000, tzinfo=UTC)),
        ("1763800000", datetime(2025, 11, 22, 8, 26, 40, tzinfo=UTC)),
        (0, datetime(1970, 1, 1, tzinfo=UTC)),
        ("2025-11-22T08:26:40Z", datetime(2025, 11, 22, 8, 26, 40, tzinfo=UTC)),
        ("2025-11-22T09:26:40+01:00", datetime(2025, 11, 22, 8, 26, 40, tzinfo=UTC)),
        ("2025-11-22T08:26:40.123456Z", datetime(2025, 11, 22, 8, 26, 40, 123_456, tzinfo=UTC)),
        ("2025-11-22 08:26:40", datetime(2025, 11, 22, 8, 26, 40, tzinfo=UTC)),
        *((None, None), (..., None), ("", None), ("yesterday", None), (True, None), ([], None), ({}, None)),
        *((1e300, None), (-1e300, None), (math.nan, None), (10**400, None), ("9" * 30, None)),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_creation_time_is_aware_or_unknown(given: object, created_at: datetime | None) -> None:
    """Seconds since the epoch and ISO 8601 both give a moment with a time zone; anything else gives none."""
    snapshot = poll(running(created_at=given))

    assert snapshot.created_at == created_at
    assert snapshot.created_at is None or snapshot.created_at.tzinfo is not None


@pytest.mark.parametrize(
    ("given", "cost"),
    [
        *(("0.07", Decimal("0.07")), (" 0.07 ", Decimal("0.07")), ("0", Decimal(0)), ("1e-3", Decimal("0.001"))),
        *((0.07, Decimal("0.07")), (1, Decimal(1)), (0.1, Decimal("0.1"))),
        ("0.100000000000000000000000000001", Decimal("0.100000000000000000000000000001")),
        *(("", None), (None, None), (..., None), ("free", None), ("$0.07", None), (True, None), ([], None)),
        *(("NaN", None), ("sNaN", None), ("Infinity", None), (math.nan, None), (math.inf, None), ({}, None)),
    ],
    ids=str,
)
def test_a_cost_is_exact_or_unknown(given: object, cost: Decimal | None) -> None:
    """The bill is the service's own decimal, to the last digit; what is no amount doesn't cost the picture."""
    usage = {"cost": given} if given is not ... else {}
    snapshot = poll(finished(usage=usage))

    assert snapshot.usage is not None
    assert snapshot.usage.cost == cost
    assert len(snapshot.images) == 1


@pytest.mark.parametrize("cost", ["1e999999999", "-1e999999999", "1e-999999999", "9e999999", "9" * 40], ids=str)
def test_any_cost_can_be_summed(cost: str) -> None:
    """However wrong the service's amount is, adding it to what was spent is no error."""
    snapshot = poll(finished(usage={"cost": cost}))
    assert snapshot.usage is not None
    total = sum([snapshot.usage.cost or Decimal(0)] * 20, Decimal(0))

    assert total.is_finite()


@pytest.mark.parametrize(
    ("given", "discount"),
    [(1, Decimal(1)), (0.85, Decimal("0.85")), ("0.85", Decimal("0.85")), (None, None), ({}, None)],
)
def test_a_discount_is_read_like_a_cost(given: object, discount: Decimal | None) -> None:
    """The discount is an exact number or unknown."""
    snapshot = poll(finished(usage={"cost": "0.07", "discount": given, "currency": "USD", "extra": 1}))

    assert snapshot.usage is not None
    assert snapshot.usage.discount == discount
    assert snapshot.usage.extra == {"currency": "USD", "extra": 1}


@pytest.mark.parametrize("usage", [..., None, [], "0.07", 7, True], ids=str)
def test_a_bill_that_cannot_be_read_does_not_cost_the_picture(usage: object) -> None:
    """Where `usage` is missing or no object, there is no bill, and the pictures are there all the same."""
    snapshot = poll(finished(usage=usage))

    assert snapshot.usage is None
    assert len(snapshot.images) == 1


@pytest.mark.parametrize("metadata", [..., None, [], "x", 7], ids=str)
def test_metadata_is_an_object_or_empty(metadata: object) -> None:
    """What stands in the place of metadata and is no object is as good as nothing."""
    snapshot = poll(finished(metadata=metadata))

    assert snapshot.metadata == {}
    assert len(snapshot.images) == 1


def test_several_groups_and_contents_keep_their_order() -> None:
    """All pictures of all groups come in the service's order, counted through, with all that is said about each."""
    output = [
        {"content": [{"type": "image", "url": "https://a.example/0", "jobId": "j0"}, {"url": "https://a.example/1"}]},
        {"content": []},
        {"content": None, "type": "group"},
        {"type": "group"},
        {"content": [{"type": "image_url", "url": "https://a.example/2", "nsfw": False, "extra": 1, "index": 9}]},
    ]
    images = poll(finished(output=output)).images

    assert [image.url for image in images] == ["https://a.example/0", "https://a.example/1", "https://a.example/2"]
    assert [image.index for image in images] == [0, 1, 2]
    assert [image.type for image in images] == ["image", "image", "image_url"]
    assert [image.extra for image in images] == [{"jobId": "j0"}, {}, {"nsfw": False, "extra": 1, "index": 9}]
    assert {image.task_id for image in images} == {"t1"}


def test_contents_without_an_address_are_no_pictures() -> None:
    """A content that has no url can't be fetched, and doesn't hide those that can."""
    snapshot = poll(
        finished(output=contents({"type": "text"}, {"url": ""}, {"url": None}, {"url": "https://a.example/"}))
    )

    assert [image.url for image in snapshot.images] == ["https://a.example/"]


def test_unknown_fields_stay_within_reach() -> None:
    """Whatever the service says beyond the protocol can be read from the snapshot."""
    body = finished(queue="fast", metadata={"region": "eu"}, seed=7)
    snapshot = poll(body)

    assert (snapshot.raw["queue"], snapshot.raw["seed"]) == ("fast", 7)
    assert snapshot.metadata == {"region": "eu"}


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        ({"code": "boom", "message": "it broke"}, "boom", "it broke"),
        ({"code": 123, "error_message": "it broke"}, "123", "it broke"),
        ({"code": 0, "message": "it broke"}, "0", "it broke"),
        ({"code": "", "message": "it broke"}, None, "it broke"),
        ({"code": None, "message": "it broke"}, None, "it broke"),
        ({"message": "it broke"}, None, "it broke"),
        ("it broke", None, "it broke"),
        ({"code": "boom"}, "boom", '{"code": "boom"}'),
        ({"reason": "it broke"}, None, '{"reason": "it broke"}'),
        (None, None, "the service gave no reason"),
        (..., None, "the service gave no reason"),
        ("", None, "the service gave no reason"),
        ({}, None, "the service gave no reason"),
        ([1], None, "the service gave no reason"),
    ],
    ids=str,
)
def test_a_failed_task_tells_its_error(error: object, code: str | None, message: str) -> None:
    """The error of a failed task is read from every shape that was seen."""
    snapshot = poll(running(status="failed", error=error))

    assert snapshot.status is TaskStatus.FAILED
    assert type(snapshot.error) is TaskFailedError
    assert (snapshot.error.task_id, snapshot.error.code, snapshot.error.message) == ("t1", code, message)


@pytest.mark.parametrize(
    "error",
    [
        {"code": "content_policy_violation", "message": "no"},
        {"code": 7, "message": "Request Moderated"},
        {"code": "content_moderated", "error_message": "no"},
        "Content Moderated",
        "content policy violation",
        "NSFW content",
    ],
    ids=str,
)
def test_a_moderated_task_is_told_from_a_broken_one(error: object) -> None:
    """Where moderation refused, the same prompt won't pass again, and the error's kind says so."""
    snapshot = poll(running(status="failed", error=error))

    assert type(snapshot.error) is ContentModeratedError


@pytest.mark.parametrize("output", [..., None, [], [{}], contents(), contents({"url": ""})], ids=str)
def test_completed_with_an_error_and_no_output_is_a_failure(output: object) -> None:
    """A task that is said to be completed, but brings an error instead of a picture, has failed."""
    snapshot = poll(finished(output=output, error={"code": "boom", "message": "it broke"}))

    assert snapshot.status is TaskStatus.FAILED
    assert snapshot.error is not None
    assert (snapshot.error.code, snapshot.error.message) == ("boom", "it broke")


def test_completed_with_an_error_and_a_picture_is_completed() -> None:
    """A picture that is there is delivered, whatever is complained about beside it."""
    snapshot = poll(finished(error={"code": "odd", "message": "half-hearted"}))

    assert snapshot.status is TaskStatus.COMPLETED
    assert snapshot.error is None
    assert len(snapshot.images) == 1
    assert snapshot.raw["error"]["code"] == "odd"


@pytest.mark.parametrize("output", [..., None, [], [{}], contents(), contents({"type": "image"})], ids=str)
@pytest.mark.parametrize("error", [..., None, "", {}], ids=str)
def test_completed_without_output_breaks_the_protocol(output: object, error: object) -> None:
    """A completed task without pictures and without an error says neither, and the error says so."""
    with pytest.raises(ProtocolError, match="task t1 is said to be completed, but holds no output"):
        poll(finished(output=output, error=error))


@pytest.mark.parametrize(
    ("body", "where"),
    [
        ({}, "$.status"),
        (finished(status=...), "$.status"),
        (finished(status=None), "$.status"),
        (finished(status=7), "$.status"),
        (finished(output=7), "$.output"),
        (finished(output=["x"]), "$.output[0]"),
        (finished(output=[{"content": 7}]), "$.output[0].content"),
        (finished(output=contents("x")), "$.output[0].content[0]"),
        (finished(output=contents({"url": "https://a.example/"}, {"url": 7})), "$.output[0].content[1].url"),
        (finished(output=contents({"url": "https://a.example/", "type": []})), "$.output[0].content[0].type"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_read_is_told_by_its_place(body: dict[str, object], where: str) -> None:
    """The error of an unreadable answer names the task and the place, as a path that a person can read."""
    with pytest.raises(ProtocolError) as caught:
        poll(body)

    assert str(caught.value).startswith("task t1: the answer is unreadable: ")
    assert str(caught.value).endswith(f"@ {where}")


@pytest.mark.parametrize("read", [parse_submit, lambda answer: parse_poll(answer, "t1")], ids=["submit", "poll"])
def test_an_http_error_is_one_for_submits_and_polls(read: Callable[[HttpResponse], object]) -> None:
    """Outside of 2xx, an answer is an error whatever its body looks like, even like a task."""
    with pytest.raises(ServerError) as caught:
        read(reply(finished(), 500))

    assert caught.value.status == 500


@pytest.mark.parametrize(
    "body",
    [
        {"error": {"code": 7, "message": "no"}},
        {"status": {"code": 7, "message": "no"}},
        {"code": 7, "message": "no"},
    ],
)
def test_a_poll_that_is_answered_with_an_error_and_200_is_an_error(body: dict[str, object]) -> None:
    """An answer to a poll that holds an error and no status is that error."""
    with pytest.raises(ResponseError) as caught:
        poll(body)

    assert (caught.value.status, caught.value.code, caught.value.message) == (200, "7", "no")


# ---------------------------------------------------------------------- HTTP errors


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        *((400, BadRequestError), (422, BadRequestError), (401, AuthenticationError), (402, InsufficientBalanceError)),
        *((403, PermissionDeniedError), (404, TaskNotFoundError), (429, RateLimitedError)),
        *((500, ServerError), (501, ServerError), (502, ServerError), (503, ServerError), (504, ServerError)),
        *((520, ServerError), (599, ServerError), (100, ResponseError), (204, ResponseError), (302, ResponseError)),
        *((405, ResponseError), (408, ResponseError), (409, ResponseError), (413, ResponseError), (451, ResponseError)),
    ],
    ids=lambda value: str(value) if isinstance(value, int) else "",
)
def test_each_status_has_its_kind(status: int, kind: type[ResponseError]) -> None:
    """The kind of an error follows from the HTTP status as the contract says, and the facts are in it."""
    headers = {"x-request-id": "r-1"}
    error = response_error(reply({"error": {"code": "c", "message": "m"}}, status, headers))

    assert type(error) is kind
    assert (error.status, error.code, error.request_id, error.retry_after) == (status, "c", "r-1", None)


BROKE: list[object] = [
    *({"code": code, "message": "no"} for code in range(40201, 40209)),
    {"code": "40203", "message": "no"},
    {"code": "x", "message": "Insufficient balance."},
    {"code": "x", "message": "You have INSUFFICIENT CREDITS left"},
]


@pytest.mark.parametrize("error", BROKE, ids=str)
@pytest.mark.parametrize("status", [402, 403])
def test_an_empty_balance_is_told_from_a_forbidden_call(status: int, error: object) -> None:
    """A 403 that says that the balance is too low, by code or by words, is no matter of permissions."""
    found = response_error(reply({"error": error}, status))

    assert type(found) is InsufficientBalanceError


@pytest.mark.parametrize("code", [40200, 40209, "402", "x40201"])
def test_other_codes_do_not_mean_an_empty_balance(code: object) -> None:
    """Only the codes that are known for it turn a 403 into an empty balance."""
    found = response_error(reply({"error": {"code": code, "message": "no"}}, 403))

    assert type(found) is PermissionDeniedError


@pytest.mark.parametrize(
    "error",
    [
        {"code": 40201, "message": "no"},
        {"code": "bad_prompt", "message": "the prompt 'a sign that says INSUFFICIENT BALANCE' is too short"},
    ],
    ids=["a code", "a prompt that is quoted"],
)
@pytest.mark.parametrize("status", [400, 422])
def test_a_wrong_parameter_is_not_an_empty_balance(status: int, error: object) -> None:
    """A 400 is about this one request: the words of a prompt that it quotes can't stop a whole batch."""
    found = response_error(reply({"error": error}, status))

    assert type(found) is BadRequestError


@pytest.mark.parametrize(
    ("body", "code", "message"),
    [
        ({"error": {"code": "c", "message": "m"}}, "c", "m"),
        ({"error": {"code": 7, "error_message": "m"}}, "7", "m"),
        ({"error": "c", "message": "m"}, "c", "m"),
        ({"error": "m"}, None, "m"),
        ({"message": "m"}, None, "m"),
        ({"status": {"code": 7, "message": "m"}}, "7", "m"),
        ({"error": None, "status": {"code": "c", "message": "m"}}, "c", "m"),
        ({"detail": "m"}, None, "m"),
        ({"detail": [{"loc": ["body", "width"]}]}, None, '[{"loc": ["body", "width"]}]'),
        (b"quota exceeded", None, "I'm a Teapot: quota exceeded"),
        (b'"quota exceeded"', None, 'I\'m a Teapot: "quota exceeded"'),
        (b"<style>h1 {}</style><h1>Bad\n  Gateway</h1><script>x<y</script>", None, "I'm a Teapot: Bad Gateway"),
        (b"", None, "I'm a Teapot, with an empty body"),
        (b"\xff\xfe", None, "I'm a Teapot: \ufffd\ufffd"),
        ({}, None, "I'm a Teapot: {}"),
        ({"error": []}, None, 'I\'m a Teapot: {"error": []}'),
    ],
    ids=lambda value: str(value)[:50],
)
def test_an_error_is_found_in_every_body_seen(body: object, code: str | None, message: str) -> None:
    """Code and message are read from all shapes of the protocol, and of a proxy's page its text is shown."""
    error = response_error(reply(body, 418))

    assert (error.code, error.message) == (code, message)
    assert "418" in str(error)


def test_a_status_without_a_name_is_told_by_its_number() -> None:
    """A status that HTTP doesn't know makes an error that can be read."""
    error = response_error(reply(b"", 599))

    assert "599" in str(error)
    assert "empty body" in str(error)


def test_a_long_page_makes_a_short_error() -> None:
    """Of a megabyte of HTML, the error says the beginning."""
    error = response_error(reply(b"<p>sorry " * 200_000, 502))

    assert error.message.startswith("Bad Gateway: sorry sorry")
    assert len(str(error)) < 300


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_a_redirect_is_explained(status: int) -> None:
    """A redirect, which would carry the key elsewhere, is an error that says where it goes and what to do."""
    told = response_error(reply(b"<html>Moved</html>", status, {"location": "https://new.example/api"}))
    untold = response_error(reply(b"", status))

    assert type(told) is ResponseError
    assert "https://new.example/api" in str(told)
    assert "base_url" in str(told)
    assert "base_url" in str(untold)


# ---------------------------------------------------------------------- how long to wait


def http_date(seconds: float) -> str:
    """Write the moment so many seconds after the reply's as an HTTP date."""
    return format_datetime(RECEIVED + timedelta(seconds=seconds), usegmt=True)


@pytest.mark.parametrize(
    ("headers", "body", "seconds"),
    [
        ({"Retry-After": "7"}, {}, 7.0),
        ({"retry-after": " 7 "}, {}, 7.0),
        ({"Retry-After": "0"}, {}, 0.0),
        ({"Retry-After": "0.25"}, {}, 0.25),
        ({"Retry-After": "-5"}, {}, 0.0),
        ({"Retry-After": http_date(90)}, {}, 90.0),
        ({"Retry-After": http_date(-90)}, {}, 0.0),
        ({"Retry-After": "Saturday, 22-Nov-25 10:01:30 GMT"}, {}, 90.0),
        ({"Retry-After": "Sat, 22 Nov 2025 11:01:30 +0100"}, {}, 90.0),
        ({"Retry-After": http_date(3690), "Date": http_date(3600)}, {}, 90.0),
        ({"Retry-After": http_date(90), "Date": "soon"}, {}, 90.0),
        ({"Retry-After": http_date(90), "Date": ""}, {}, 90.0),
        ({}, {"retry_after": 7}, 7.0),
        ({}, {"retry_after": "7.5"}, 7.5),
        ({}, {"error": {"message": "m", "retry_after": 7}}, 7.0),
        ({"Retry-After": "3"}, {"retry_after": 7}, 3.0),
        ({"Retry-After": "soon"}, {"retry_after": 7}, 7.0),
        ({"Retry-After": "nan"}, {"error": {"retry_after": 7}}, 7.0),
        ({"Retry-After": "inf"}, {}, None),
        ({"Retry-After": "1e999"}, {}, None),
        ({"Retry-After": ""}, {}, None),
        ({"Retry-After": "soon"}, {"retry_after": "later"}, None),
        ({"Retry-After": "Sat, 99 Nov 2025 10:00:00 GMT"}, {}, None),
        ({"Retry-After": "Sat, 22 Nov 2025 10:00:00 +9999999999"}, {}, None),
        ({}, {"retry_after": True}, None),
        ({}, {"retry_after": [7]}, None),
        ({}, {"retry_after": 10**400}, None),
        ({}, {}, None),
        ({}, b"<html>slow down</html>", None),
    ],
    ids=lambda value: json.dumps(value)[:70] if isinstance(value, dict) else "",
)
def test_the_wait_is_read_from_header_and_body(headers: dict[str, str], body: object, seconds: float | None) -> None:
    """Of header and body, the first wait that can be read counts, as seconds or a date, and never below zero."""
    error = response_error(reply(body, 429, headers))

    assert error.retry_after == seconds


def test_the_wait_does_not_depend_on_this_machines_clock() -> None:
    """A date to come back at is compared with the gateway's own clock, where it shows it."""
    headers = {"Retry-After": http_date(5), "Date": http_date(0)}
    wrong = HttpResponse(429, headers, b"", RECEIVED + timedelta(days=400))
    error = response_error(wrong)

    assert error.retry_after == 5.0


# ---------------------------------------------------------------------- secrets


KEYS = ["sk-7f3a9c/+=", 'sk-"7f3a9c"', "sk-7f3a9c\\", "sk-<7f3a9c>&"]
HOOKS = ["hush hush 7f3a9c", "schlüssel-7f3a9c", "灯台7f3a9c", 'hush\n"7f3a9c"\t']


def escaped(text: str) -> str:
    """Write text as JSON with every character escaped that can be."""
    return '"' + "".join(f"\\u{ord(character):04x}" for character in text) + '"'


@pytest.mark.parametrize("secret", [*KEYS, *HOOKS], ids=ascii)
@pytest.mark.parametrize(
    "write",
    [
        lambda secret: json.dumps({"error": {"code": "c", "message": f"wrong key {secret}!"}}).encode(),
        lambda secret: json.dumps({"error": {"message": f"wrong key {secret}!"}}, ensure_ascii=False).encode(),
        lambda secret: json.dumps({"error": {"message": f"wrong {secret}!"}}).replace("/", r"\/").encode(),
        lambda secret: b'{"error": {"message": ' + escaped(secret).encode() + b"}}",
        lambda secret: json.dumps({"error": secret, "message": "wrong key"}).encode(),
        lambda secret: json.dumps({"error": {"code": secret, "headers": {"Authorization": secret}}}).encode(),
        lambda secret: f"<p>wrong key {secret}!</p>".encode(),
        lambda secret: f"wrong key {secret}!".encode(),
    ],
    ids=["JSON", "JSON in UTF-8", "JSON of PHP", "JSON all escaped", "code", "unknown shape", "page", "text"],
)
def test_a_secret_that_is_echoed_is_not_repeated(write: Callable[[str], bytes], secret: str) -> None:
    """However the service writes the key or the webhook's secret into its answer, no error of ours repeats it."""
    answer = reply(write(secret), 401).without(secret)
    error = response_error(answer)
    told = [str(error), repr(error), error.message, error.code or "", *map(str, pickle.loads(pickle.dumps(error)).args)]
    unescaped = secret.encode("unicode_escape").decode()

    assert not [text for text in told if secret in text or unescaped in text or json.dumps(secret)[1:-1] in text]


@pytest.mark.parametrize("name", ["Location", "X-Request-Id"])
def test_a_secret_that_is_echoed_in_a_header_is_not_repeated(name: str) -> None:
    """A gateway that redirects to an address with the key in it doesn't get the key into our error."""
    answer = reply(b"", 302, {name: f"https://new.example/?key={SECRET}"}).without(SECRET)
    error = response_error(answer)

    assert SECRET not in f"{error!s} {error!r}"


def test_a_broken_answer_does_not_repeat_a_secret() -> None:
    """An answer that is no JSON and echoes the key is described without it."""
    with pytest.raises(ProtocolError) as caught:
        parse_submit(reply(f"who is {SECRET}?".encode()).without(SECRET))

    assert SECRET not in f"{caught.value!s} {caught.value!r}"
    assert "who is" in str(caught.value)


@pytest.mark.parametrize("secret", [SECRET, *HOOKS], ids=ascii)
def test_a_snapshot_does_not_show_a_secret_that_is_echoed(secret: str) -> None:
    """A service that tells a task's parameters back doesn't get the webhook's secret into logs of the snapshot."""
    told = {"webhook_secret": secret, "params": [{"webhook_secret": secret}]}
    failure = {"code": secret, "message": f"can't post to the webhook with {secret}"}
    completed = parse_poll(reply(finished(metadata=told, usage=told)).without(secret), "t1")
    failed = parse_poll(reply(running(status="failed", metadata=told, error=failure)).without(secret), "t1")

    for shown in (repr(completed), repr(failed), str(failed.error)):
        assert secret not in shown
        assert repr(secret)[1:-1] not in shown


@pytest.mark.parametrize("secret", ["1", "t", "id", "status", "in_progress", '"', "https", "pictures.example"])
def test_masking_a_secret_does_not_lose_the_task(secret: str) -> None:
    """A weak secret, which happens to be part of the answer, costs neither the task's id nor its pictures."""
    submitted = parse_submit(reply(running()).without(secret))
    polled = parse_poll(reply(finished()).without(secret), "t1")

    assert submitted.task_id == "t1"
    assert polled.status is TaskStatus.COMPLETED
    assert [image.url for image in polled.images] == ["https://pictures.example/0.jpeg"]


def test_nothing_to_mask_changes_nothing() -> None:
    """A reply without the secret in it, or without a secret at all, stays as it came."""
    answer = reply(finished())

    assert parse_poll(answer.without(SECRET), "t1") == parse_poll(answer, "t1")
    assert parse_poll(answer.without(None), "t1") == parse_poll(answer, "t1")


# ---------------------------------------------------------------------- anything at all


HEADERS = st.fixed_dictionaries(
    {},
    optional={
        "Retry-After": st.text(max_size=20) | st.floats().map(str) | DATES | DATE_LIKE,
        "Date": DATES | DATE_LIKE | st.text(max_size=20),
        "Location": st.text(max_size=10),
        "X-Request-Id": st.text(max_size=10),
    },
)
BODIES = st.binary(max_size=60) | st.one_of(JSON, TASKS, TASKS, TASKS).map(lambda value: json.dumps(value).encode())
STATUSES = st.sampled_from([200, 200, 200, 201, 204]) | st.integers(100, 599)


@settings(max_examples=150, deadline=None)
@given(body=BODIES, status=STATUSES, headers=HEADERS)
def test_any_answer_to_a_submit_is_a_task_or_one_of_our_errors(
    body: bytes, status: int, headers: dict[str, str]
) -> None:
    """Any bytes with any status and headers are a task that has an id, or a ProtocolError or ResponseError."""
    found = outcome(lambda: parse_submit(reply(body, status, headers)))

    if isinstance(found, TaskSnapshot):
        assert found.task_id == str(json.loads(body)["id"]) != ""
        check_snapshot(found)
    else:
        check_error(found, status)


@settings(max_examples=150, deadline=None)
@given(body=BODIES, status=STATUSES, headers=HEADERS)
def test_any_answer_to_a_poll_is_a_snapshot_or_one_of_our_errors(
    body: bytes, status: int, headers: dict[str, str]
) -> None:
    """Any bytes with any status and headers are a snapshot of the task, or a ProtocolError or ResponseError."""
    found = outcome(lambda: parse_poll(reply(body, status, headers), "t1"))

    if isinstance(found, TaskSnapshot):
        assert found.task_id == "t1"
        check_snapshot(found)
    else:
        check_error(found, status)


@settings(max_examples=150, deadline=None)
@given(body=BODIES, status=STATUSES, headers=HEADERS)
def test_any_answer_makes_a_readable_error(body: bytes, status: int, headers: dict[str, str]) -> None:
    """Of any answer an error can be made, with a text and with facts that are what their types say."""
    error = response_error(reply(body, status, headers))

    check_error(error, status)
    assert error.request_id == headers.get("X-Request-Id")


def check_error(error: FluxError, status: int) -> None:
    assert str(error)
    assert isinstance(error.message, str)
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
    if isinstance(error, ResponseError):
        assert error.status == status
        assert isinstance(error.code, str | None)
        assert error.code != ""
        assert error.retry_after is None or 0 <= error.retry_after < math.inf


def test_an_error_nested_too_deeply_is_an_error_all_the_same() -> None:
    """A reason that can't even be written down again is no reason to break."""
    deep: dict[str, Any] = {}
    for _ in range(100_000):
        deep = {"more": deep}

    assert problem({"error": deep}) == (None, "(nested too deeply)")
    assert problem({"error": {"code": "x", "message": [deep]}}) == ("x", "(nested too deeply)")
