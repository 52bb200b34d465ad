"""The codec: requests, and every response that the service or a proxy may send."""

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
from support.responses import RECEIVED, finished, make_response, picture
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
from flux2max_async._api.response import HttpResponse, error_from_response, extract_error

TASK = "/model/v1/generation/task/"
SECRET = "hush-7f3a9c"


def poll(body: object, status: int = 200) -> TaskSnapshot:
    return parse_poll(make_response(body, status), "t1")


def running(**changes: object) -> dict[str, object]:
    """Return the task object of a running task."""
    return finished(**({"status": "in_progress", "output": ..., "usage": ..., "progress": ...} | changes))


def contents(*items: object) -> list[object]:
    """Return an output with one group."""
    return [{"content": list(items)}]


def parse_or_catch(parse: Callable[[], TaskSnapshot]) -> TaskSnapshot | ProtocolError | ResponseError:
    """Parse a response, or return the ProtocolError or ResponseError that it causes."""
    try:
        return parse()
    except (ProtocolError, ResponseError) as error:
        return error


# ---------------------------------------------------------------------- requests


def test_submit_of_a_prompt_alone() -> None:
    """A submit is a POST of the model and one set of parameters, with nothing that the caller didn't set."""
    request = build_submit(GenerationRequest("a lighthouse at dawn"))

    assert (request.method, request.path) == ("POST", "/model/v1/generation")
    assert json.loads(request.body or b"") == {
        "model": "flux_2_max",
        "input": [{"params": {"prompt": "a lighthouse at dawn"}}],
    }


def test_submit_of_every_parameter() -> None:
    """All parameters are sent under their documented names, except for the caller's own key."""
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


def test_error_of_an_unreadable_local_image_has_its_index(tmp_path: Path) -> None:
    """A local image that is gone when the request is sent is an InvalidRequestError with the image's index."""
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
def test_task_id_is_one_path_segment(task_id: str, encoded: str) -> None:
    """A task id always becomes exactly one segment of the path."""
    request = build_poll(task_id)

    assert request == HttpRequest("GET", TASK + encoded, None)


@settings(max_examples=100, deadline=None)
@given(st.text(st.characters(exclude_categories=()), min_size=1))
def test_any_text_can_be_a_task_id(task_id: str) -> None:
    """Any JSON text, lone surrogates included, becomes a path that can be decoded to the id."""
    path = build_poll(task_id).path
    segment = path.removeprefix(TASK)

    assert path.isascii()
    assert path.startswith(TASK)
    assert not set(segment) & set("/?#\\ ")
    assert segment not in {"", ".", ".."}
    assert unquote(segment, errors="surrogatepass") == task_id


def test_repr_shows_neither_bodies_nor_headers() -> None:
    """The reprs of requests and responses show neither bodies nor headers, which may contain secrets."""
    request = build_submit(GenerationRequest("a lighthouse", webhook_secret=SECRET))
    response = make_response({"echo": SECRET}, headers={"Set-Cookie": SECRET})

    assert SECRET.encode() in (request.body or b"")
    assert SECRET not in repr(request)
    assert SECRET not in repr(response)
    assert "200" in repr(response)


# ---------------------------------------------------------------------- responses to submits


def test_parse_documented_response_to_a_submit() -> None:
    """The documented response to a submit is parsed as a running task with an id."""
    body = {"id": "t1", "status": "in_progress", "model": "flux_2_max", "created_at": 1763800000}
    snapshot = parse_submit(make_response(body))

    assert snapshot == TaskSnapshot(
        task_id="t1", status=TaskStatus.IN_PROGRESS, created_at=datetime(2025, 11, 22, 8, 26, 40, tzinfo=UTC), raw=body
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
def test_submit_response_with_an_id_is_never_an_error(
    body: dict[str, object], task_id: str, status: TaskStatus
) -> None:
    """If a response has an id, a task exists and costs money, so no other part of the response can cause an error."""
    snapshot = parse_submit(make_response(body, 201))

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
def test_submit_response_without_an_id_is_a_refusal(body: dict[str, object], code: str | None, message: str) -> None:
    """A response with an error and no id is a refusal, whatever its HTTP status."""
    with pytest.raises(ResponseError) as caught:
        parse_submit(make_response(body))

    assert (caught.value.status, caught.value.code, caught.value.message) == (200, code, message)


@pytest.mark.parametrize("body", [{}, {"id": None}, {"id": ""}, {"id": []}, {"id": 1.5}, {"status": "in_progress"}])
def test_submit_response_without_id_and_error_is_a_protocol_error(body: dict[str, object]) -> None:
    """If a response has neither an id nor an error, it is unknown whether a task exists."""
    with pytest.raises(ProtocolError, match="neither a task id nor an error"):
        parse_submit(make_response(body))


NOT_JSON_OBJECTS = {
    "empty": b"",
    "HTML": b"<html><h1>Welcome to nginx!</h1></html>",
    "truncated": b'{"id": "t1", "sta',
    "a list": b'[{"id": "t1"}]',
    "text": b'"t1"',
    "null": b"null",
    "a number": b"1e999",
    "not UTF-8": b'{"id": "\xff"}',
    "nested too deeply": b'{"id":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "number too long": b'{"id":' + b"1" * 5000 + b"}",
    "two objects": b'{"id": "t1"}{"id": "t2"}',
}


@pytest.mark.parametrize("body", NOT_JSON_OBJECTS.values(), ids=NOT_JSON_OBJECTS)
def test_response_that_is_not_a_json_object_is_a_protocol_error(body: bytes) -> None:
    """A response with status 200 that is not a JSON object is a ProtocolError with a short message."""
    with pytest.raises(ProtocolError, match="expected a JSON object") as submitted:
        parse_submit(make_response(body))
    with pytest.raises(ProtocolError, match="expected a JSON object") as polled:
        parse_poll(make_response(body), "t1")

    assert len(str(submitted.value)) < 400
    assert len(str(polled.value)) < 400


# ---------------------------------------------------------------------- the task object


def test_parse_documented_completed_task() -> None:
    """The documented example of a completed task is parsed into all fields of the snapshot."""
    body = finished()
    snapshot = poll(body)

    assert snapshot.task_id == "t1"
    assert snapshot.status is TaskStatus.COMPLETED
    assert snapshot.progress == 1.0
    assert snapshot.images == (
        GeneratedImage(
            url="https://pictures.example/0.jpeg", type="image", task_id="t1", extra={"jobId": "j1"}, index=0
        ),
    )
    assert snapshot.usage is not None
    assert (snapshot.usage.cost, snapshot.usage.discount) == (Decimal("0.07"), Decimal(1))
    assert snapshot.created_at == datetime(2025, 11, 22, 8, 26, 40, tzinfo=UTC)
    assert (snapshot.error, snapshot.metadata) == (None, {})
    assert snapshot.raw == body


@pytest.mark.parametrize(
    ("text", "status"),
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
def test_status_is_case_insensitive(text: str, status: TaskStatus) -> None:
    """Statuses are case-insensitive; an unknown one counts as in progress."""
    snapshot = poll(finished(status=text))

    assert snapshot.status is status
    assert snapshot.raw["status"] == text


@pytest.mark.parametrize(
    ("text", "status"), [("Processing", TaskStatus.IN_PROGRESS), ("hibernating", None), ("Ready", None)]
)
def test_status_of_an_unknown_status_is_none(text: str, status: TaskStatus | None) -> None:
    """status_of() returns None for an unknown status, so that it can be logged."""
    result = status_of(text)

    assert result is status


@pytest.mark.parametrize(
    ("value", "progress"),
    [
        *((0, 0.0), (0.0, 0.0), (0.5, 0.5), (1, 1.0), ("0.25", 0.25)),
        *((None, None), (..., None), (-0.1, None), (50, None), (True, None), ("half", None), ([], None), ("", None)),
        *((math.nan, None), (math.inf, None), ("nan", None), ({}, None), (10**400, None)),
    ],
    ids=lambda value: str(value)[:20],
)
def test_progress_is_between_0_and_1_or_none(value: object, progress: float | None) -> None:
    """A progress that is not between 0 and 1 is None, and doesn't make the response unreadable."""
    snapshot = poll(running(progress=value))

    assert snapshot.progress == progress


@pytest.mark.parametrize(
    ("value", "created_at"),
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
def test_created_at_is_timezone_aware_or_none(value: object, created_at: datetime | None) -> None:
    """Seconds since the epoch and ISO 8601 are parsed as a time with a time zone; anything else is None."""
    snapshot = poll(running(created_at=value))

    assert snapshot.created_at == created_at
    assert snapshot.created_at is None or snapshot.created_at.tzinfo is not None


@pytest.mark.parametrize(
    ("value", "cost"),
    [
        *(("0.07", Decimal("0.07")), (" 0.07 ", Decimal("0.07")), ("0", Decimal(0)), ("1e-3", Decimal("0.001"))),
        *((0.07, Decimal("0.07")), (1, Decimal(1)), (0.1, Decimal("0.1"))),
        ("0.100000000000000000000000000001", Decimal("0.100000000000000000000000000001")),
        *(("", None), (None, None), (..., None), ("free", None), ("$0.07", None), (True, None), ([], None)),
        *(("NaN", None), ("sNaN", None), ("Infinity", None), (math.nan, None), (math.inf, None), ({}, None)),
    ],
    ids=str,
)
def test_cost_is_exact_or_none(value: object, cost: Decimal | None) -> None:
    """The cost is an exact decimal; an invalid cost is None, and the images are still parsed."""
    usage = {"cost": value} if value is not ... else {}
    snapshot = poll(finished(usage=usage))

    assert snapshot.usage is not None
    assert snapshot.usage.cost == cost
    assert len(snapshot.images) == 1


@pytest.mark.parametrize("cost", ["1e999999999", "-1e999999999", "1e-999999999", "9e999999", "9" * 40], ids=str)
def test_any_cost_can_be_summed(cost: str) -> None:
    """Adding up costs never raises an error, however wrong the service's amounts are."""
    snapshot = poll(finished(usage={"cost": cost}))
    assert snapshot.usage is not None
    total = sum([snapshot.usage.cost or Decimal(0)] * 20, Decimal(0))

    assert total.is_finite()


@pytest.mark.parametrize(
    ("value", "discount"),
    [(1, Decimal(1)), (0.85, Decimal("0.85")), ("0.85", Decimal("0.85")), (None, None), ({}, None)],
)
def test_discount_is_exact_or_none(value: object, discount: Decimal | None) -> None:
    """The discount is an exact decimal or None."""
    snapshot = poll(finished(usage={"cost": "0.07", "discount": value, "currency": "USD", "extra": 1}))

    assert snapshot.usage is not None
    assert snapshot.usage.discount == discount
    assert snapshot.usage.extra == {"currency": "USD", "extra": 1}


@pytest.mark.parametrize("usage", [..., None, [], "0.07", 7, True], ids=str)
def test_invalid_usage_is_none(usage: object) -> None:
    """If `usage` is missing or not an object, it is None, and the images are still parsed."""
    snapshot = poll(finished(usage=usage))

    assert snapshot.usage is None
    assert len(snapshot.images) == 1


@pytest.mark.parametrize("metadata", [..., None, [], "x", 7], ids=str)
def test_metadata_is_an_object_or_empty(metadata: object) -> None:
    """Metadata that is not an object is replaced by an empty one."""
    snapshot = poll(finished(metadata=metadata))

    assert snapshot.metadata == {}
    assert len(snapshot.images) == 1


def test_images_keep_the_order_of_the_response() -> None:
    """The images of all groups have consecutive indexes in the order of the response, and keep unknown fields."""
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


def test_contents_without_a_url_are_not_images() -> None:
    """A content without a URL is skipped."""
    snapshot = poll(
        finished(output=contents({"type": "text"}, {"url": ""}, {"url": None}, {"url": "https://a.example/"}))
    )

    assert [image.url for image in snapshot.images] == ["https://a.example/"]


def test_unknown_fields_are_kept_in_raw() -> None:
    """Unknown fields are available in the snapshot's `raw` and `metadata`."""
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
def test_error_of_a_failed_task(error: object, code: str | None, message: str) -> None:
    """The error of a failed task is parsed from every known format."""
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
def test_error_of_a_moderated_task(error: object) -> None:
    """A task that moderation refused has a ContentModeratedError."""
    snapshot = poll(running(status="failed", error=error))

    assert type(snapshot.error) is ContentModeratedError


@pytest.mark.parametrize("output", [..., None, [], [{}], contents(), contents({"url": ""})], ids=str)
def test_completed_task_with_an_error_and_no_output_has_failed(output: object) -> None:
    """A task that is reported as completed, but has an error and no output, has failed."""
    snapshot = poll(finished(output=output, error={"code": "boom", "message": "it broke"}))

    assert snapshot.status is TaskStatus.FAILED
    assert snapshot.error is not None
    assert (snapshot.error.code, snapshot.error.message) == ("boom", "it broke")


def test_completed_task_with_an_error_and_an_image_is_completed() -> None:
    """A completed task with an image is completed, even if the response has an error too."""
    snapshot = poll(finished(error={"code": "odd", "message": "half-hearted"}))

    assert snapshot.status is TaskStatus.COMPLETED
    assert snapshot.error is None
    assert len(snapshot.images) == 1
    assert snapshot.raw["error"]["code"] == "odd"


@pytest.mark.parametrize("output", [..., None, [], [{}], contents(), contents({"type": "image"})], ids=str)
@pytest.mark.parametrize("error", [..., None, "", {}], ids=str)
def test_completed_task_without_output_and_error_is_a_protocol_error(output: object, error: object) -> None:
    """A completed task without an output and an error is a ProtocolError."""
    with pytest.raises(ProtocolError, match="task t1 is reported as completed, but has no output"):
        poll(finished(output=output, error=error))


@pytest.mark.parametrize(
    ("body", "json_path"),
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
def test_error_of_an_unreadable_task_has_the_json_path(body: dict[str, object], json_path: str) -> None:
    """The error of an unreadable response contains the task id and the JSON path."""
    with pytest.raises(ProtocolError) as caught:
        poll(body)

    assert str(caught.value).startswith("task t1: the response is unreadable: ")
    assert str(caught.value).endswith(f"@ {json_path}")


@pytest.mark.parametrize("parse", [parse_submit, lambda response: parse_poll(response, "t1")], ids=["submit", "poll"])
def test_http_error_status_is_an_error_whatever_the_body(parse: Callable[[HttpResponse], object]) -> None:
    """A response outside of 2xx is an error, even if its body is a valid task."""
    with pytest.raises(ServerError) as caught:
        parse(make_response(finished(), 500))

    assert caught.value.status == 500


@pytest.mark.parametrize(
    "body",
    [
        {"error": {"code": 7, "message": "no"}},
        {"status": {"code": 7, "message": "no"}},
        {"code": 7, "message": "no"},
    ],
)
def test_poll_response_with_an_error_and_status_200_is_an_error(body: dict[str, object]) -> None:
    """A response to a poll that has an error and no status is a ResponseError."""
    with pytest.raises(ResponseError) as caught:
        poll(body)

    assert (caught.value.status, caught.value.code, caught.value.message) == (200, "7", "no")


# ---------------------------------------------------------------------- HTTP errors


@pytest.mark.parametrize(
    ("status", "error_class"),
    [
        *((400, BadRequestError), (422, BadRequestError), (401, AuthenticationError), (402, InsufficientBalanceError)),
        *((403, PermissionDeniedError), (404, TaskNotFoundError), (429, RateLimitedError)),
        *((500, ServerError), (501, ServerError), (502, ServerError), (503, ServerError), (504, ServerError)),
        *((520, ServerError), (599, ServerError), (100, ResponseError), (204, ResponseError), (302, ResponseError)),
        *((405, ResponseError), (408, ResponseError), (409, ResponseError), (413, ResponseError), (451, ResponseError)),
    ],
    ids=lambda value: str(value) if isinstance(value, int) else "",
)
def test_error_class_for_each_http_status(status: int, error_class: type[ResponseError]) -> None:
    """The HTTP status determines the class of the error, which has the code, the request id and the wait."""
    headers = {"x-request-id": "r-1"}
    error = error_from_response(make_response({"error": {"code": "c", "message": "m"}}, status, headers))

    assert type(error) is error_class
    assert (error.status, error.code, error.request_id, error.retry_after) == (status, "c", "r-1", None)


BALANCE_ERRORS: list[object] = [
    *({"code": code, "message": "no"} for code in range(40201, 40209)),
    {"code": "40203", "message": "no"},
    {"code": "x", "message": "Insufficient balance."},
    {"code": "x", "message": "You have INSUFFICIENT CREDITS left"},
]


@pytest.mark.parametrize("error", BALANCE_ERRORS, ids=str)
@pytest.mark.parametrize("status", [402, 403])
def test_403_for_an_insufficient_balance(status: int, error: object) -> None:
    """A 403 whose code or message reports an insufficient balance is an InsufficientBalanceError."""
    result = error_from_response(make_response({"error": error}, status))

    assert type(result) is InsufficientBalanceError


@pytest.mark.parametrize("code", [40200, 40209, "402", "x40201"])
def test_403_with_another_code_is_a_permission_error(code: object) -> None:
    """Only the documented codes make a 403 an InsufficientBalanceError."""
    result = error_from_response(make_response({"error": {"code": code, "message": "no"}}, 403))

    assert type(result) is PermissionDeniedError


@pytest.mark.parametrize(
    "error",
    [
        {"code": 40201, "message": "no"},
        {"code": "bad_prompt", "message": "the prompt 'a sign that says INSUFFICIENT BALANCE' is too short"},
    ],
    ids=["code", "quoted prompt"],
)
@pytest.mark.parametrize("status", [400, 422])
def test_400_is_never_an_insufficient_balance(status: int, error: object) -> None:
    """A 400 concerns a single request: a prompt that it quotes can't stop a whole batch."""
    result = error_from_response(make_response({"error": error}, status))

    assert type(result) is BadRequestError


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
def test_code_and_message_of_every_known_error_body(body: object, code: str | None, message: str) -> None:
    """Code and message are parsed from all known formats; for a proxy's HTML page, its text is the message."""
    error = error_from_response(make_response(body, 418))

    assert (error.code, error.message) == (code, message)
    assert "418" in str(error)


def test_error_with_a_nonstandard_http_status() -> None:
    """A status without a standard reason phrase has a readable error."""
    error = error_from_response(make_response(b"", 599))

    assert "599" in str(error)
    assert "empty body" in str(error)


def test_error_of_a_long_html_page_is_short() -> None:
    """The error contains only the beginning of a megabyte of HTML."""
    error = error_from_response(make_response(b"<p>sorry " * 200_000, 502))

    assert error.message.startswith("Bad Gateway: sorry sorry")
    assert len(str(error)) < 300


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_error_of_a_redirect_suggests_base_url(status: int) -> None:
    """A redirect, which might send the key to another host, is an error with its location and the setting to change."""
    error = error_from_response(make_response(b"<html>Moved</html>", status, {"location": "https://new.example/api"}))
    error_without_location = error_from_response(make_response(b"", status))

    assert type(error) is ResponseError
    assert "https://new.example/api" in str(error)
    assert "base_url" in str(error)
    assert "base_url" in str(error_without_location)


# ---------------------------------------------------------------------- Retry-After


def http_date(seconds: float) -> str:
    """Return the HTTP date that is some seconds after the time at which responses were received."""
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
def test_retry_after_in_header_and_body(headers: dict[str, str], body: object, seconds: float | None) -> None:
    """The first valid wait in the header and the body is used: seconds or a date, and never less than 0."""
    error = error_from_response(make_response(body, 429, headers))

    assert error.retry_after == seconds


def test_retry_after_date_is_relative_to_the_servers_clock() -> None:
    """A date in Retry-After is compared with the server's own clock if the response has a Date header."""
    headers = {"Retry-After": http_date(5), "Date": http_date(0)}
    response = HttpResponse(429, headers, b"", RECEIVED + timedelta(days=400))
    error = error_from_response(response)

    assert error.retry_after == 5.0


# ---------------------------------------------------------------------- secrets


API_KEYS = ["sk-7f3a9c/+=", 'sk-"7f3a9c"', "sk-7f3a9c\\", "sk-<7f3a9c>&"]
WEBHOOK_SECRETS = ["hush hush 7f3a9c", "schlüssel-7f3a9c", "灯台7f3a9c", 'hush\n"7f3a9c"\t']


def escape_all(text: str) -> str:
    """Return a text as JSON with every character escaped."""
    return '"' + "".join(f"\\u{ord(character):04x}" for character in text) + '"'


@pytest.mark.parametrize("secret", [*API_KEYS, *WEBHOOK_SECRETS], ids=ascii)
@pytest.mark.parametrize(
    "encode",
    [
        lambda secret: json.dumps({"error": {"code": "c", "message": f"wrong key {secret}!"}}).encode(),
        lambda secret: json.dumps({"error": {"message": f"wrong key {secret}!"}}, ensure_ascii=False).encode(),
        lambda secret: json.dumps({"error": {"message": f"wrong {secret}!"}}).replace("/", r"\/").encode(),
        lambda secret: b'{"error": {"message": ' + escape_all(secret).encode() + b"}}",
        lambda secret: json.dumps({"error": secret, "message": "wrong key"}).encode(),
        lambda secret: json.dumps({"error": {"code": secret, "headers": {"Authorization": secret}}}).encode(),
        lambda secret: f"<p>wrong key {secret}!</p>".encode(),
        lambda secret: f"wrong key {secret}!".encode(),
    ],
    ids=["JSON", "JSON in UTF-8", "JSON of PHP", "JSON, all escaped", "code", "unknown format", "HTML", "text"],
)
def test_error_redacts_an_echoed_secret(encode: Callable[[str], bytes], secret: str) -> None:
    """No error shows the key or the webhook's secret, however the service escapes it in its response."""
    response = make_response(encode(secret), 401).with_secret(secret)
    error = error_from_response(response)
    texts = [
        str(error),
        repr(error),
        error.message,
        error.code or "",
        *map(str, pickle.loads(pickle.dumps(error)).args),
    ]
    unescaped = secret.encode("unicode_escape").decode()

    assert not [text for text in texts if secret in text or unescaped in text or json.dumps(secret)[1:-1] in text]


@pytest.mark.parametrize("name", ["Location", "X-Request-Id"])
def test_error_redacts_a_secret_echoed_in_a_header(name: str) -> None:
    """An error redacts a secret in the location of a redirect and in the request id."""
    response = make_response(b"", 302, {name: f"https://new.example/?key={SECRET}"}).with_secret(SECRET)
    error = error_from_response(response)

    assert SECRET not in f"{error!s} {error!r}"


def test_protocol_error_redacts_an_echoed_secret() -> None:
    """The description of a response that is not JSON redacts a secret."""
    with pytest.raises(ProtocolError) as caught:
        parse_submit(make_response(f"who is {SECRET}?".encode()).with_secret(SECRET))

    assert SECRET not in f"{caught.value!s} {caught.value!r}"
    assert "who is" in str(caught.value)


@pytest.mark.parametrize("secret", [SECRET, *WEBHOOK_SECRETS], ids=ascii)
def test_repr_of_a_snapshot_shows_no_echoed_secret(secret: str) -> None:
    """If the service echoes the task's parameters, the snapshot's repr and its error don't show the webhook's secret."""
    echo = {"webhook_secret": secret, "params": [{"webhook_secret": secret}]}
    failure = {"code": secret, "message": f"can't post to the webhook with {secret}"}
    completed = parse_poll(make_response(finished(metadata=echo, usage=echo)).with_secret(secret), "t1")
    failed = parse_poll(make_response(running(status="failed", metadata=echo, error=failure)).with_secret(secret), "t1")

    for text in (repr(completed), repr(failed), str(failed.error)):
        assert secret not in text
        assert repr(secret)[1:-1] not in text


@pytest.mark.parametrize("secret", ["1", "t", "id", "status", "in_progress", '"', "https", "pictures.example"])
def test_redacting_keeps_ids_and_urls(secret: str) -> None:
    """A weak secret that occurs in the response changes neither the task's id nor the URLs of its images."""
    submitted = parse_submit(make_response(running()).with_secret(secret))
    polled = parse_poll(make_response(finished()).with_secret(secret), "t1")

    assert submitted.task_id == "t1"
    assert polled.status is TaskStatus.COMPLETED
    assert [image.url for image in polled.images] == ["https://pictures.example/0.jpeg"]


def test_redacting_nothing_changes_nothing() -> None:
    """A response that doesn't contain the secret is parsed as if there were no secret."""
    response = make_response(finished())

    assert parse_poll(response.with_secret(SECRET), "t1") == parse_poll(response, "t1")
    assert parse_poll(response.with_secret(None), "t1") == parse_poll(response, "t1")


# ---------------------------------------------------------------------- arbitrary responses


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
def test_any_submit_response_is_a_task_or_an_error(body: bytes, status: int, headers: dict[str, str]) -> None:
    """Any response to a submit is a task with an id, or a ProtocolError or ResponseError."""
    result = parse_or_catch(lambda: parse_submit(make_response(body, status, headers)))

    if isinstance(result, TaskSnapshot):
        assert result.task_id == str(json.loads(body)["id"]) != ""
        check_snapshot(result)
    else:
        check_error(result, status)


@settings(max_examples=150, deadline=None)
@given(body=BODIES, status=STATUSES, headers=HEADERS)
def test_any_poll_response_is_a_snapshot_or_an_error(body: bytes, status: int, headers: dict[str, str]) -> None:
    """Any response to a poll is a snapshot of the task, or a ProtocolError or ResponseError."""
    result = parse_or_catch(lambda: parse_poll(make_response(body, status, headers), "t1"))

    if isinstance(result, TaskSnapshot):
        assert result.task_id == "t1"
        check_snapshot(result)
    else:
        check_error(result, status)


@settings(max_examples=150, deadline=None)
@given(body=BODIES, status=STATUSES, headers=HEADERS)
def test_any_response_makes_a_valid_error(body: bytes, status: int, headers: dict[str, str]) -> None:
    """Any response can be turned into an error with a text, and with attributes of the declared types."""
    error = error_from_response(make_response(body, status, headers))

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


def test_extract_error_nested_too_deeply() -> None:
    """An error that is nested too deeply to be serialized has a placeholder for a message."""
    deep: dict[str, Any] = {}
    for _ in range(100_000):
        deep = {"more": deep}

    assert extract_error({"error": deep}) == (None, "(nested too deeply)")
    assert extract_error({"error": {"code": "x", "message": [deep]}}) == ("x", "(nested too deeply)")
