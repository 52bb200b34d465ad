"""The task object: every format of it, and whatever is missing or wrong in it."""

import base64
import json
import math
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from decimal import Decimal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.responses import RECEIVED, finished, make_response, picture

from flux2max_async import (
    ContentModeratedError,
    GeneratedImage,
    ProtocolError,
    TaskFailedError,
    TaskSnapshot,
    TaskStatus,
)
from flux2max_async._api import task_object
from flux2max_async._api.codec import parse_poll, parse_submit
from flux2max_async._api.running_task import running_snapshot
from flux2max_async._api.statuses import KNOWN_STATUSES
from flux2max_async._api.task_object import reported_status
from flux2max_async._api.values import parse_datetime
from flux2max_async._models.results import is_inline
from flux2max_async.webhooks import parse

URL = "https://pictures.example/0.jpeg"


def poll(body: object, status: int = 200) -> TaskSnapshot:
    return parse_poll(make_response(body, status), "t1")


def running(**changes: object) -> dict[str, object]:
    """Return the task object of a running task."""
    return finished(**({"status": "in_progress", "output": ..., "usage": ..., "progress": ...} | changes))


def contents(*items: object) -> list[object]:
    """Return an output with one group."""
    return [{"content": list(items)}]


# ---------------------------------------------------------------------- fields


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
        ("hibernating", TaskStatus.COMPLETED),
        ("", TaskStatus.COMPLETED),
    ],
)
def test_status_is_case_insensitive(text: str, status: TaskStatus) -> None:
    """Statuses are case-insensitive; with an unknown one, an image means that the task has completed."""
    snapshot = poll(finished(status=text))

    assert snapshot.status is status
    assert snapshot.raw["status"] == text


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


CREATED = datetime(2025, 11, 22, 8, 26, 40, tzinfo=UTC)


@pytest.mark.parametrize(
    ("value", "created_at"),
    [
        (1763800000, datetime(2025, 11, 22, 8, 26, 40, tzinfo=UTC)),
        (1763800000.5, datetime(2025, 11, 22, 8, 26, 40, 500_000, tzinfo=UTC)),
        ("1763800000", datetime(2025, 11, 22, 8, 26, 40, tzinfo=UTC)),
        (0, datetime(1970, 1, 1, tzinfo=UTC)),
        *((1763800000_000, CREATED), (1763800000_000_000, CREATED), (1763800000_000_000_000, CREATED)),
        *(("1763800000000", CREATED), (1763800000000.0, CREATED), ("1763800000000000000", CREATED)),
        (1763800000_500, datetime(2025, 11, 22, 8, 26, 40, 500_000, tzinfo=UTC)),
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
    """The time since the epoch in any unit and ISO 8601 are parsed as a time with a time zone; anything else is None."""
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


@pytest.mark.parametrize("cost", [0, "0", "-0", 1000, "1000.00", 999.99, "1e3", "1e-40"], ids=str)
def test_cost_in_range(cost: object) -> None:
    """A cost is an amount from 0 to 1,000 dollars."""
    snapshot = poll(finished(usage={"cost": cost}))

    assert snapshot.usage is not None
    assert snapshot.usage.cost == Decimal(str(cost))
    assert snapshot.usage.extra == {}


@pytest.mark.parametrize(
    "cost",
    [
        -0.5,
        "-0.50",
        "-1e-40",
        1000.01,
        "1000.000001",
        1e30,
        "1e30",
        -1e30,
        "NaN",
        "-Infinity",
        math.nan,
        math.inf,
        "free",
        [],
        True,
    ],
    ids=str,
)
def test_absurd_cost_is_unknown(cost: object) -> None:
    """A cost out of range, or no number, is unknown; what was reported is in `extra`, and the rest is read."""
    snapshot = poll(finished(usage={"cost": cost, "discount": 0.85}))

    assert snapshot.usage is not None
    assert snapshot.usage.cost is None
    assert snapshot.usage.discount == Decimal("0.85")
    assert repr(snapshot.usage.extra) == repr({"cost": cost})
    assert len(snapshot.images) == 1


@pytest.mark.parametrize(
    "number", ["0." + "1" * 5000, " " * 60 + "0.07", 10**40 + 10**60], ids=["decimals", "text", "int"]
)
def test_amounts_have_at_most_50_characters(number: object) -> None:
    """A cost or discount of thousands of digits is unknown: the journal would not keep it."""
    snapshot = poll(finished(usage={"cost": number, "discount": number}))

    assert snapshot.usage is not None
    assert (snapshot.usage.cost, snapshot.usage.discount) == (
        Decimal("0.07") if number == " " * 60 + "0.07" else None,
    ) * 2


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


IMAGE: dict[str, object] = {"type": "image", "url": URL}


@pytest.mark.parametrize(
    ("output", "count"),
    [
        (contents(*[IMAGE] * 65), 65),
        (contents(*[IMAGE] * 10_000), 10_000),
        (contents(*[IMAGE]) * 10_000, 10_000),
        ([*contents(*[IMAGE] * 60, None, None), None, *contents(*[IMAGE] * 60)], 120),
        ([{"content": None}, {}, *contents(*[IMAGE] * 100)], 100),
        ([*[7] * 10_000, *contents(*[IMAGE] * 100)], 100),
    ],
)
def test_images_beyond_the_first_64_are_not_used(output: list[object], count: int) -> None:
    """A task has at most 64 images; what is left out is reported."""
    body = finished(output=output)
    snapshot = poll(body)

    assert len(snapshot.images) == 64
    assert [image.index for image in snapshot.images] == list(range(64))
    assert snapshot.partial_error is not None
    assert snapshot.partial_error.message == f"the task has {count:,} images, of which the first 64 are used"
    assert snapshot.raw == body


@pytest.mark.parametrize(
    "output",
    [
        contents(*[IMAGE] * 64),
        contents(IMAGE) * 64,
        [*contents(*[IMAGE] * 64), *[{"content": []}] * 10_000],
        contents(*[None] * 10_000, *[IMAGE] * 64),
    ],
)
def test_64_images_are_all(output: list[object]) -> None:
    """A task with 64 images is complete, whatever else without an image is in its output."""
    snapshot = poll(finished(output=output))

    assert len(snapshot.images) == 64
    assert snapshot.partial_error is None


def test_output_of_nothing_but_other_values() -> None:
    """Thousands of values that are no groups are as good as no output, and no error is made for each."""
    with pytest.raises(ProtocolError, match="task t1 is reported as completed, but has no output"):
        poll(finished(output=[7] * 10_000))


def test_too_many_images_of_other_tasks() -> None:
    """The reason that the service has for missing images, or for a failure, takes precedence; a running task has none."""
    many = contents(*[IMAGE] * 65)
    partial = poll(finished(output=many, error={"code": "oops", "message": "the rest is lost"}))
    failed = poll(finished(status="failed", output=many, error={"code": "oops", "message": "lost"}))

    assert partial.partial_error is not None
    assert partial.partial_error.message == "the rest is lost"
    assert (failed.partial_error, failed.error and failed.error.message) == (None, "lost")
    assert poll(running(output=many)).partial_error is None


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
    """A completed task with an image is completed, and an error beside it tells why others are missing."""
    snapshot = poll(finished(error={"code": "odd", "message": "half-hearted"}))

    assert snapshot.status is TaskStatus.COMPLETED
    assert snapshot.error is None
    assert type(snapshot.partial_error) is TaskFailedError
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
        (finished(status=..., output=...), "$.status"),
        (finished(status=None, output=[]), "$.status"),
        (finished(status=7, output=contents()), "$.status"),
        (finished(output=7), "$.output"),
        (finished(output="x" * 100_000), "$.output"),
        (finished(output={str(number): 7 for number in range(1_000)}), "$.output"),
        (finished(output=["x"]), "$.output[0]"),
        (finished(output=[{"content": 7}]), "$.output[0].content"),
        (finished(output=[{"content": "x" * 100_000}]), "$.output[0].content"),
        (finished(output=[{"content": {"url": "https://a.example/"}}]), "$.output[0].content"),
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


# ---------------------------------------------------------------------- partial errors


MODERATED = {"code": "content_policy_violation", "message": "no"}


@pytest.mark.parametrize(
    ("changes", "code", "message"),
    [
        ({"error": {"code": "boom", "message": "it broke"}}, "boom", "it broke"),
        ({"error": {"code": 7, "error_message": "it broke"}}, "7", "it broke"),
        ({"error": "it broke"}, None, "it broke"),
        ({"error": "boom", "message": "it broke"}, "boom", "it broke"),
        ({"output": [{"content": [{"url": URL}]}, {"content": [], "error": "it broke"}]}, None, "it broke"),
        ({"output": [{"error": {"message": "it broke"}}, {"content": [{"url": URL}]}]}, None, "it broke"),
        ({"output": contents({"url": URL}, {"type": "image", "error": {"message": "it broke"}})}, None, "it broke"),
        ({"output": contents({"url": None, "error": "it broke"}, {"url": URL}, {"url": ""})}, None, "it broke"),
        ({"output": contents({"url": URL}, {"error": "second"}), "error": "it broke"}, None, "it broke"),
        ({"output": contents({"url": URL, "error": {}}, {"error": "it broke"}, {"error": "third"})}, None, "it broke"),
    ],
    ids=lambda value: json.dumps(value)[:70] if isinstance(value, dict) else "",
)
def test_partial_error(changes: dict[str, object], code: str | None, message: str) -> None:
    """An error beside the images, in a group or in a content tells why others are missing."""
    snapshot = poll(finished(**changes))

    assert (snapshot.status, snapshot.error, len(snapshot.images)) == (TaskStatus.COMPLETED, None, 1)
    assert type(snapshot.partial_error) is TaskFailedError
    assert (snapshot.partial_error.task_id, snapshot.partial_error.code) == ("t1", code)
    assert snapshot.partial_error.message == message


@pytest.mark.parametrize(
    "changes",
    [
        {"error": MODERATED},
        {"error": "content_policy_violation", "message": "no"},
        {"output": contents({"url": URL}, {"error": MODERATED})},
        {"output": [{"content": [{"url": URL}]}, {"error": {"code": 7, "message": "Request Moderated"}}]},
    ],
    ids=lambda value: json.dumps(value)[:70],
)
def test_partial_moderation(changes: dict[str, object]) -> None:
    """If moderation refused some of the images, the partial error says so."""
    snapshot = poll(finished(**changes))

    assert (snapshot.status, len(snapshot.images)) == (TaskStatus.COMPLETED, 1)
    assert type(snapshot.partial_error) is ContentModeratedError


NO_ERRORS: tuple[object, ...] = (
    *(
        ...,
        None,
        "",
        {},
        [],
        {"code": "", "message": ""},
        {"code": 0, "message": ""},
        {"code": None},
        {"message": None},
    ),
    *({"code": 0, "message": "ok"}, {"code": "200", "message": "success"}, {"code": "OK", "message": "no error"}),
)
"""What services send in place of an error if there is none."""


@pytest.mark.parametrize("error", NO_ERRORS, ids=str)
@pytest.mark.parametrize(
    "place",
    [
        lambda error: finished(error=error),
        lambda error: finished(output=[{"content": [{"url": URL}]}, {"content": [], "error": error}]),
        lambda error: finished(output=contents({"url": URL, "error": None if error is ... else error})),
    ],
    ids=["task", "group", "content"],
)
def test_no_partial_error(place: Callable[[object], dict[str, object]], error: object) -> None:
    """An empty error, or one with the code of a success, is none."""
    body = json.loads(json.dumps(place(error), default=lambda _: None))
    snapshot = poll(body)

    assert (snapshot.status, snapshot.error, snapshot.partial_error) == (TaskStatus.COMPLETED, None, None)


@pytest.mark.parametrize("error", NO_ERRORS, ids=str)
def test_empty_error_ends_no_task(error: object) -> None:
    """An empty error neither ends a task with an unknown status, nor is the failure of one without output."""
    snapshot = poll(running(status="dreaming", error=error))

    assert (snapshot.status, snapshot.error) == (TaskStatus.IN_PROGRESS, None)
    with pytest.raises(ProtocolError, match="has no output"):
        poll(finished(output=[], error=error))


# ---------------------------------------------------------------------- the maker's format


@pytest.mark.parametrize("word", ["Ready", "completed", "dreaming", ...])
def test_sample_is_an_image(word: object) -> None:
    """The sample in the format of the model's maker is an image, which keeps the other fields of the result."""
    body = {"id": "t1", "status": word, "result": {"sample": URL, "prompt": "a cat", "seed": 1}}
    snapshot = poll({name: value for name, value in body.items() if value is not ...})

    assert snapshot.status is TaskStatus.COMPLETED
    assert snapshot.images == (
        GeneratedImage(url=URL, type="image", task_id="t1", extra={"prompt": "a cat", "seed": 1}, index=0),
    )


@pytest.mark.parametrize("result", [None, {}, [], "x", {"sample": None}, {"sample": ""}, {"sample": 7}], ids=str)
def test_result_without_a_sample(result: object) -> None:
    """Any other result is no image."""
    snapshot = poll({"id": "t1", "status": "Pending", "result": result})

    assert (snapshot.status, snapshot.images) == (TaskStatus.PENDING, ())
    with pytest.raises(ProtocolError, match="has no output"):
        poll({"id": "t1", "status": "Ready", "result": result})


def test_output_beside_a_result() -> None:
    """If there is an output, the result holds no further image."""
    snapshot = poll(finished(result={"sample": "https://pictures.example/other.jpeg"}))

    assert [image.url for image in snapshot.images] == [URL]


def test_images_know_when_they_were_received() -> None:
    """The time of an image is the time of the response, and doesn't make equal images different."""
    (image,) = poll(finished()).images

    assert image.received_at == RECEIVED
    assert image == GeneratedImage(url=URL, type="image", task_id="t1", extra={"jobId": "j1"})


# ---------------------------------------------------------------------- inline images


PNG = base64.b64encode(picture("PNG")).decode()
DATA_URI = f"data:image/png;base64,{PNG}"


@pytest.mark.parametrize(
    ("content", "url"),
    [
        ({"url": DATA_URI}, DATA_URI),
        ({"url": DATA_URI.upper().replace("BASE64", "base64")}, DATA_URI.upper().replace("BASE64", "base64")),
        ({"b64_json": PNG}, DATA_URI),
        ({"base64": PNG}, DATA_URI),
        ({"b64_json": DATA_URI}, DATA_URI),
        ({"url": None, "b64_json": PNG}, DATA_URI),
        ({"url": "", "base64": PNG}, DATA_URI),
        ({"url": [], "base64": PNG}, DATA_URI),
        ({"image_url": None, "b64_json": None, "base64": PNG}, DATA_URI),
        ({"image_url": DATA_URI}, DATA_URI),
        ({"image_url": {"url": DATA_URI}}, DATA_URI),
        ({"image_url": {"url": DATA_URI, "detail": "high"}, "url": None}, DATA_URI),
        ({"image_url": {"url": ""}, "base64": PNG}, DATA_URI),
        ({"image_url": URL}, URL),
        ({"image_url": {"url": URL}}, URL),
        ({"url": URL, "b64_json": PNG}, URL),
        ({"url": URL, "base64": PNG, "image_url": {"url": DATA_URI}}, URL),
        ({"b64_json": "/9j/4AAQ"}, "data:image/jpeg;base64,/9j/4AAQ"),
        ({"b64_json": "UklGRnAA"}, "data:image/webp;base64,UklGRnAA"),
        ({"b64_json": "R0lGODlh"}, "data:image/gif;base64,R0lGODlh"),
        ({"b64_json": "AAAAHGZ0eXBhdmlm"}, "data:application/octet-stream;base64,AAAAHGZ0eXBhdmlm"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_image_in_each_place(content: dict[str, object], url: str) -> None:
    """An image is found in each place; one that comes inline has a `data:` URI, and nothing else holds it."""
    snapshot = poll(finished(output=contents({"type": "image_url", "jobId": "j1", **content})))
    (image,) = snapshot.images

    assert snapshot.status is TaskStatus.COMPLETED
    assert (image.url, image.type, image.extra) == (url, "image_url", {"jobId": "j1"})
    assert is_inline(image.url) is not url.startswith("https:")


@pytest.mark.parametrize(
    "content",
    [
        *({"b64_json": ""}, {"b64_json": None}, {"b64_json": 7}, {"b64_json": []}),
        *({"image_url": ""}, {"image_url": None}, {"image_url": {}}, {"image_url": {"url": ""}}),
        {"image_url": {"url": 7}},
        *({}, {"base64": None}, {"type": "text", "text": "a cat"}, {"error": "it broke"}),
    ],
    ids=str,
)
def test_content_without_an_image(content: dict[str, object]) -> None:
    """A content without an image in any of these places is skipped."""
    snapshot = poll(finished(output=contents(content, {"url": URL})))

    assert [(image.url, image.index) for image in snapshot.images] == [(URL, 0)]


def test_inline_sample() -> None:
    """The sample in the format of the model's maker may be an inline image."""
    snapshot = poll({"id": "t1", "status": "Ready", "result": {"sample": DATA_URI}})

    assert [image.url for image in snapshot.images] == [DATA_URI]


@pytest.mark.parametrize("name", ["url", "b64_json", "base64", "image_url"])
def test_inline_image_of_megabytes_has_a_short_repr(name: str) -> None:
    """The repr of a snapshot shows the length of an inline image, and its content is held once."""
    data = "/9j/" + "A" * 4_000_000
    content = f"data:image/jpeg;base64,{data}" if name in {"url", "image_url"} else data
    snapshot = poll(finished(output=contents({"type": "image", name: content}), usage=None))

    assert len(repr(snapshot)) < 1000
    assert "(4000004 characters)" in repr(snapshot)
    assert snapshot.images[0].extra == {}
    assert str(snapshot.images[0].url).endswith(data)


# ---------------------------------------------------------------------- times and words


@settings(max_examples=200, deadline=None)
@given(st.integers(10**9, 10**10), st.sampled_from([1, 10**3, 10**6, 10**9]))
def test_any_unit_of_time(seconds: int, unit: int) -> None:
    """A time of this century is the same in seconds, milliseconds, microseconds and nanoseconds."""
    expected = datetime.fromtimestamp(seconds, UTC)

    for value in (seconds * unit, str(seconds * unit)):
        assert abs((parse_datetime(value) or RECEIVED) - expected) < timedelta(milliseconds=1)


@pytest.mark.parametrize(
    ("body", "word"),
    [
        (running(status="Dreaming"), "Dreaming"),
        ({"status": {"code": 200, "message": "ok"}, "data": running(status="queued")}, "queued"),
        ({"code": 0, "data": running(status="queued")}, "queued"),
        (finished(status=None), None),
    ],
)
def test_reported_status(body: dict[str, object], word: str | None) -> None:
    """The service's own word for the state is known, in an envelope as well."""
    assert reported_status(poll(body)) == word


@pytest.mark.parametrize(
    "output",
    [
        [{"content": [{"type": "image", "url": "https://a.example/0"}, None]}],
        [None, {"content": [None, {"type": "image", "url": "https://a.example/0"}]}, None],
    ],
)
def test_missing_elements_of_an_output_are_skipped(output: list[object]) -> None:
    """A null in place of a group or a content, as where moderation has removed an image, makes no other unreadable."""
    snapshot = poll(finished(output=output))

    assert snapshot.status is TaskStatus.COMPLETED
    assert [image.url for image in snapshot.images] == ["https://a.example/0"]


@pytest.mark.parametrize("code", [408, 504, "timeout", "SYNC_TIMEOUT"])
@pytest.mark.parametrize("word", ["completed", "failed", "some other end"])
def test_task_that_has_failed_by_a_timeout(word: str, code: object) -> None:
    """An error whose code is a timeout is an error of the task, like any other."""
    snapshot = poll(finished(status=word, output=[], error={"code": code, "message": "it took too long"}))

    assert snapshot.status is TaskStatus.FAILED
    assert snapshot.error is not None
    assert (snapshot.error.code, snapshot.error.message) == (str(code), "it took too long")


@pytest.mark.parametrize("output", [{"content": []}, [7], [{"content": 7}], [{"content": [{"url": 7}]}], "none"])
@pytest.mark.parametrize("word", ["in_progress", "queued", "failed"])
def test_odd_output_of_a_task_that_needs_none(word: str, output: object) -> None:
    """An output that can't be read makes neither a running nor a failed task unreadable."""
    snapshot = poll(finished(status=word, output=output, error="no"))

    assert snapshot.status is (TaskStatus.FAILED if word == "failed" else TaskStatus.IN_PROGRESS)
    assert snapshot.images == ()
    assert snapshot.raw["output"] == output


@pytest.mark.parametrize(
    "wrap",
    [
        lambda task: {"data": task},
        lambda task: {"success": True, "data": task},
        lambda task: {"status": "success", "data": task},
        lambda task: {"status": "ok", "data": task},
        lambda task: {"code": 10000, "message": "ok", "data": task},
        lambda task: {"id": "request-1", "code": 0, "data": task},
        lambda task: {"status": {"code": 504, "message": "late"}, "data": task},
    ],
)
def test_every_envelope_is_read_alike(wrap: Callable[[object], dict[str, object]]) -> None:
    """What is taken for the task in the answer to a submit is the task in a poll and in a webhook, too."""
    body = wrap(finished(id="t1"))
    snapshots = [parse_submit(make_response(body)), poll(body), parse(json.dumps(body).encode())]

    assert [(snapshot.task_id, snapshot.status) for snapshot in snapshots] == [("t1", TaskStatus.COMPLETED)] * 3
    assert all(len(snapshot.images) == 1 for snapshot in snapshots)


@pytest.mark.parametrize(
    "data", [{}, {"region": "eu"}, {"id": "user-7"}, {"status": "active"}, {"id": "u", "status": "x"}]
)
def test_data_beside_a_task_is_not_the_task(data: dict[str, object]) -> None:
    """A task object that has a field `data` of its own is not an envelope."""
    snapshot = parse_submit(make_response({"id": "t1", "status": "in_progress", "data": data}))

    assert snapshot.task_id == "t1"
    assert snapshot.status is TaskStatus.IN_PROGRESS


def read_running(body: dict[str, object]) -> TaskSnapshot | str:
    try:
        return task_object.snapshot_from_json("t1", body, raw=body, secrets=(), received_at=RECEIVED)
    except ProtocolError as error:
        return str(error)


VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(max_size=3), st.just("0.5"),
    st.just("2026-01-01T00:00:00Z"), st.sampled_from([[], {}, [None], [{}], {"sample": URL}, {"cost": "0.07"}]),
    st.just([{"content": [{"url": URL}]}]), st.integers(10**9, 10**10), st.floats(0, 1),
)  # fmt: skip


@given(
    st.one_of(st.sampled_from([*KNOWN_STATUSES, "Pending", "new", "IN-PROGRESS"]), VALUES),
    st.dictionaries(
        st.sampled_from(["output", "result", "usage", "error", "progress", "created_at", "metadata", "id", "x"]), VALUES
    ),
)
def test_short_way_reads_the_same(word: object, fields: dict[str, object]) -> None:
    """A running task is read as it would be without the short way."""
    body = {"status": word, **fields}
    short = read_running(body)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(task_object, "running_snapshot", lambda *_: None)
        full = read_running(body)
    # Errors are compared by what they say.
    assert repr(short) == repr(full)
    assert isinstance(short, str) or isinstance(full, str) or short.raw == full.raw
    assert isinstance(short, str) or isinstance(full, str) or short.metadata == full.metadata


@pytest.mark.parametrize(
    ("changes", "is_short"),
    [
        ({}, True), ({"status": "pending"}, True), ({"output": []}, True), ({"error": "late"}, True),
        ({"usage": {}}, False), ({"output": [{}]}, False), ({"result": {"sample": URL}}, False),
        ({"status": "In Progress"}, False), ({"status": "failed"}, False), ({"status": {"code": 1}}, False),
    ],
)  # fmt: skip
def test_what_is_read_the_short_way(changes: dict[str, object], is_short: bool) -> None:
    """Whatever could hold more than the state of a running task is read in full."""
    body = running(**changes)
    assert (running_snapshot("t1", body, body) is not None) is is_short
