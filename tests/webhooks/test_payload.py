"""Signatures and contents of deliveries."""

import contextlib
import functools
import hashlib
import hmac
import json
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from multidict import CIMultiDict
from starlette.datastructures import Headers
from support.responses import finished
from support.strategies import JSON, TASKS, check_snapshot, mostly

from flux2max_async import (
    ContentModeratedError,
    InvalidRequestError,
    ProtocolError,
    TaskSnapshot,
    TaskStatus,
)
from flux2max_async.webhooks import MAX_BODY, WebhookSignatureError, parse, verify
from flux2max_async.webhooks._payload import reports_not_found

SECRET = "hush-7f3a9c"
OTHER_SECRET = "whist-41d0e2"
BODY = b'{"id": "t1", "status": "Ready"}'
NOW = datetime(2025, 11, 22, 10, 0, 0, tzinfo=UTC)
SAMPLE = "https://pictures.example/0.jpeg"


def digest(body: bytes = BODY, secret: str = SECRET) -> str:
    return hmac.new(secret.encode(), body, hashlib.sha256).hexdigest()


def signature_headers(body: bytes = BODY, secret: str = SECRET, header: str = "X-BFL-Signature") -> dict[str, str]:
    return {header: f"sha256={digest(body, secret)}"}


def body_sent_at(timestamp: object) -> bytes:
    return json.dumps({"id": "t1", "status": "Pending", "timestamp": timestamp}).encode()


def check_refused(
    body: bytes, headers: Mapping[str, str], secret: str | Iterable[str] = SECRET, **options: Any
) -> WebhookSignatureError:
    """Check that a delivery is refused, and that the error contains neither a secret nor the valid signature."""
    with pytest.raises(WebhookSignatureError) as caught:
        verify(body, headers, secret, **options)
    text = f"{caught.value} {caught.value!r}"
    assert not any(hidden in text for hidden in (SECRET, OTHER_SECRET, digest(body), digest(body, OTHER_SECRET)))
    return caught.value


# ---------------------------------------------------------------------- signatures


@pytest.mark.parametrize(
    "signature",
    [
        *(f"sha256={digest()}", digest(), digest().upper(), f"SHA256={digest().upper()}", f"  sha256={digest()} "),
        # Joined by a proxy.
        *(f"{digest()}, {digest()}", f"sha256={digest()},{digest().upper()} ,sha256={digest()}"),
    ],
)
def test_valid_signature(signature: str) -> None:
    """The body's HMAC-SHA256 is accepted with or without its prefix, in either case, and repeated."""
    verify(BODY, {"X-BFL-Signature": signature}, SECRET)


@pytest.mark.parametrize("buffer_type", [bytearray, memoryview])
def test_bytes_like_body(buffer_type: Callable[[bytes], Any]) -> None:
    """A bytearray or memoryview is accepted as a body."""
    body = body_sent_at("2025-11-22T10:00:00Z")
    verify(buffer_type(body), signature_headers(body), SECRET, now=NOW)

    assert parse(buffer_type(body)) == parse(body)


@pytest.mark.parametrize(
    "headers",
    [
        pytest.param(signature_headers(header="x-bfl-signature"), id="lower case, as in ASGI"),
        pytest.param(signature_headers(header="X-BFL-SIGNATURE"), id="upper case"),
        pytest.param(CIMultiDict(signature_headers(header="x-Bfl-signature")), id="aiohttp"),
        pytest.param(Headers(signature_headers()), id="starlette"),
        pytest.param(
            CIMultiDict([("X-BFL-Signature", "0" * 64), *signature_headers().items()]), id="two, one of which is valid"
        ),
    ],
)
def test_headers_of_frameworks(headers: Mapping[str, str]) -> None:
    """The header's name is case-insensitive, in plain mappings and in those of the frameworks."""
    verify(BODY, headers, SECRET)


def test_header_option() -> None:
    """The signature is read from the given header only."""
    headers = signature_headers(header="X-Webhook-Signature")

    verify(BODY, headers, SECRET, header="x-webhook-signature")
    assert "X-BFL-Signature" in str(check_refused(BODY, headers))


@pytest.mark.parametrize("secrets", [(SECRET, OTHER_SECRET), [OTHER_SECRET, SECRET], iter(["", SECRET])])
def test_several_secrets(secrets: Iterable[str]) -> None:
    """A signature made with any of several secrets is valid."""
    verify(BODY, signature_headers(), secrets)


@pytest.mark.parametrize("secret", ["", [], [""], ["", OTHER_SECRET]])
def test_empty_secret(secret: str | list[str]) -> None:
    """A signature made with an empty secret is refused: anybody could have made it."""
    check_refused(BODY, signature_headers(secret=""), secret)


@pytest.mark.parametrize(
    "signature",
    [
        None,
        # Not 64 digits, not hexadecimal, not ASCII.
        *("", "sha256=", digest()[:-1], digest() + "0", f"{digest()}\n{digest()}", f"{digest()} {digest()}"),
        # Joined by a proxy, but not all parts are signatures, or they differ.
        *(f"{digest()}, {digest(secret=OTHER_SECRET)}", f"{digest()}, garbage", f"{digest()},", f",{digest()}"),
        # Longer than any proxy makes it.
        *(", ".join([digest()] * 100), digest() + " " * 1_000, "," * 1_000_000),
        *("g" + digest()[1:], "é" + digest()[1:], "\N{FULLWIDTH DIGIT ONE}" * 64),
        *(prefix + digest() for prefix in ("sha512=", "sha256=sha256=", "\N{LATIN SMALL LETTER LONG S}ha256=")),
        # Another algorithm, another secret or another body.
        "sha1=" + hmac.new(SECRET.encode(), BODY, "sha1").hexdigest(),
        hashlib.sha256(BODY).hexdigest(),
        *(digest(secret=OTHER_SECRET), digest(secret=SECRET + " "), digest(BODY + b"\n")),
    ],
)
def test_invalid_signature(signature: str | None) -> None:
    """A missing, malformed or wrong signature is a WebhookSignatureError."""
    check_refused(BODY, {} if signature is None else {"X-BFL-Signature": signature})


@pytest.mark.parametrize("index", range(len(BODY)))
def test_changed_byte(index: int) -> None:
    """A signed body is refused if any of its bytes was changed."""
    check_refused(BODY[:index] + bytes([BODY[index] ^ 1]) + BODY[index + 1 :], signature_headers())


@pytest.mark.parametrize("body", [BODY.decode(), json.loads(BODY), None])
def test_body_that_is_not_bytes(body: Any) -> None:
    """A body that was decoded or parsed already is an InvalidRequestError that names `body`."""
    for call in (lambda: verify(body, signature_headers(), SECRET), lambda: parse(body)):
        with pytest.raises(InvalidRequestError, match="bytes") as caught:
            call()

        assert caught.value.field == "body"


@pytest.mark.parametrize("secret", [[SECRET.encode()], SECRET.encode(), [None]])
def test_secret_that_is_not_text(secret: Any) -> None:
    """A secret that is not text is an InvalidRequestError that does not contain it."""
    with pytest.raises(InvalidRequestError) as caught:
        verify(BODY, signature_headers(), secret)

    assert caught.value.field == "secret"
    assert SECRET not in f"{caught.value} {caught.value!r}"


@settings(max_examples=60, deadline=None)
@given(body=st.binary(), secret=st.text(min_size=1).filter(str.isprintable), other=st.text())
def test_any_signed_body(body: bytes, secret: str, other: str) -> None:
    """Any body verifies with the secret that signed it, and with no other."""
    verify(body, signature_headers(body, secret), secret, max_age=None)

    if other != secret and other.isprintable():
        with pytest.raises(WebhookSignatureError):
            verify(body, signature_headers(body, secret), other)


# ---------------------------------------------------------------------- age


LONG_AGO = (NOW - timedelta(seconds=301)).timestamp()


@pytest.mark.parametrize(
    "timestamp",
    [
        *("2025-11-22T09:54:59Z", "2025-11-22T09:54:59.900000+00:00", "2025-11-22T10:54:59+01:00"),
        *("2025-11-22T09:54:59", "2025-11-21", "0001-01-01T00:00:00+14:00"),
        *(LONG_AGO, int(LONG_AGO), str(LONG_AGO), 0),
        *(LONG_AGO * 1e3, int(LONG_AGO * 1e3), str(int(LONG_AGO * 1e3))),  # milliseconds
    ],
)
def test_old_delivery(timestamp: object) -> None:
    """A delivery sent more than five minutes ago is refused as replayed, unless `max_age` is None."""
    body = body_sent_at(timestamp)

    assert "300 s" in str(check_refused(body, signature_headers(body), now=NOW))
    verify(body, signature_headers(body), SECRET, max_age=None, now=NOW)


@pytest.mark.parametrize("outer", [{}, {"timestamp": None}, {"timestamp": "recently"}])
def test_old_delivery_in_an_envelope(outer: dict[str, object]) -> None:
    """The timestamp may be in an envelope."""
    task = {"id": "t1", "status": "Error", "timestamp": LONG_AGO}
    body = json.dumps({"status": {"code": 200}, "data": task} | outer).encode()

    assert "300 s" in str(check_refused(body, signature_headers(body), now=NOW))


@pytest.mark.parametrize(
    "body",
    [
        *map(body_sent_at, ("2025-11-22T09:55:00Z", "2025-11-22T04:55:00-05:00", NOW.timestamp() - 300)),
        *map(body_sent_at, ("2025-11-22T10:04:00Z", "2025-11-22T10:05:00Z", NOW.timestamp() + 300)),
        *map(body_sent_at, (NOW.timestamp() * 1e3, str(int(NOW.timestamp() * 1e3 - 299_000)))),
        *map(body_sent_at, ("yesterday", "", None, True, [1], {"at": 1}, -1e300, "1e999")),
        *(BODY, b'{"id": "t1", "about": {"timestamp": 1}}', b'["timestamp", 1]'),
        *(b'{"timestamp": 1', b'\xff"timestamp"', b""),
    ],
)
def test_delivery_not_known_to_be_old(body: bytes) -> None:
    """A delivery verifies if it is recent, from the near future, or has no readable timestamp."""
    verify(body, signature_headers(body), SECRET, now=NOW)


@pytest.mark.parametrize(
    "timestamp",
    [
        *("2025-11-22T10:05:01Z", "2025-11-22T11:05:01+01:00", "9999-12-31T23:59:59-14:00"),
        *(NOW.timestamp() + 301, (NOW.timestamp() + 301) * 1e3, str(int(NOW.timestamp() * 1e3) + 301_000)),
    ],
)
def test_delivery_from_the_future(timestamp: object) -> None:
    """A timestamp more than five minutes ahead would count as fresh until then: it is refused."""
    body = body_sent_at(timestamp)

    assert "300 s in the future" in str(check_refused(body, signature_headers(body), now=NOW))
    verify(body, signature_headers(body), SECRET, max_age=None, now=NOW)


def test_max_age() -> None:
    """`max_age` is in seconds, and `now` defaults to this machine's clock."""
    body = body_sent_at("2025-11-22T09:59:50Z")

    verify(body, signature_headers(body), SECRET, max_age=10, now=NOW)
    check_refused(body, signature_headers(body), max_age=9.5, now=NOW)
    check_refused(body, signature_headers(body))
    recent = body_sent_at((datetime.now(UTC) - timedelta(seconds=60)).isoformat())
    verify(recent, signature_headers(recent), SECRET)
    check_refused(recent, signature_headers(recent), max_age=30)


def test_naive_now() -> None:
    """A naive `now` is refused for every delivery, even for one without a timestamp."""
    with pytest.raises(InvalidRequestError) as caught:
        verify(BODY, signature_headers(), SECRET, now=NOW.replace(tzinfo=None))

    assert caught.value.field == "now"


# ---------------------------------------------------------------------- contents


def task_body(**task: object) -> bytes:
    return json.dumps({"id": "t1"} | task).encode()


def parse_error(body: bytes) -> ProtocolError:
    with pytest.raises(ProtocolError) as caught:
        parse(body)
    return caught.value


def test_task_object() -> None:
    """A delivery in the service's format has everything that a poll has, and `raw` is the delivery."""
    task = finished(id="t7")
    snapshot = parse(json.dumps(task).encode())

    assert (snapshot.task_id, snapshot.status, snapshot.error) == ("t7", TaskStatus.COMPLETED, None)
    assert [(image.url, image.task_id, image.extra) for image in snapshot.images] == [(SAMPLE, "t7", {"jobId": "j1"})]
    assert snapshot.usage is not None
    assert str(snapshot.usage.cost) == "0.07"
    assert snapshot.raw == task


@pytest.mark.parametrize("status", ["Ready", "READY", "ready", " Ready "])
def test_bfl_result(status: str) -> None:
    """BFL's sample becomes an image, the rest of the result its `extra`, and `raw` is the delivery."""
    result = {"sample": SAMPLE, "prompt": "a lighthouse", "seed": 1, "url": "u", "type": "t", "extra": 2}
    body = task_body(status=status, result=result, timestamp="2025-11-22T10:00:00Z")
    snapshot = parse(body)

    assert (snapshot.status, snapshot.error, snapshot.usage) == (TaskStatus.COMPLETED, None, None)
    assert [(image.url, image.type, image.task_id) for image in snapshot.images] == [(SAMPLE, "image", "t1")]
    assert snapshot.images[0].extra == {"prompt": "a lighthouse", "seed": 1, "extra": 2}
    assert snapshot.raw == json.loads(body)


@pytest.mark.parametrize(
    "task",
    [
        {"result": {"sample": SAMPLE}},
        *({"status": status, "result": {"sample": SAMPLE}} for status in (None, 200, ["Ready"], "Splendid")),
        *({"status": status, "output": [{"content": [{"url": SAMPLE}]}]} for status in ("succeeded", "DONE", "ready")),
        {"status": "completed", "output": [{"content": [{"image_url": {"url": SAMPLE}}]}]},
    ],
)
def test_finished_task(task: dict[str, object]) -> None:
    """A delivery with an image reports a completed task, in each format, whatever the word for it."""
    before = datetime.now(UTC)
    snapshot = parse(task_body(**task))

    assert (snapshot.status, [image.url for image in snapshot.images]) == (TaskStatus.COMPLETED, [SAMPLE])
    received_at = snapshot.images[0].received_at
    assert received_at is not None
    assert before <= received_at <= datetime.now(UTC)


def test_inline_image() -> None:
    """An image in the delivery itself becomes a `data:` URI."""
    content = {"type": "image", "b64_json": "iVBORw0KGgoAAAA="}
    snapshot = parse(task_body(status="completed", output=[{"content": [content]}]))

    assert [image.url for image in snapshot.images] == ["data:image/png;base64,iVBORw0KGgoAAAA="]


@pytest.mark.parametrize("code", [200, 0])
def test_envelope(code: int) -> None:
    """A task object in the platform's envelope is read; `raw` is the whole delivery."""
    payload = {"status": {"code": code, "message": "ok"}, "data": finished(id="t7")}
    snapshot = parse(json.dumps(payload).encode())
    not_found = parse(json.dumps(payload | {"data": {"id": "t7", "status": "Task_Not-Found"}}).encode())

    assert (snapshot.task_id, snapshot.status, snapshot.raw) == ("t7", TaskStatus.COMPLETED, payload)
    assert (reports_not_found(snapshot), reports_not_found(not_found)) == (False, True)


def test_task_object_takes_precedence() -> None:
    """If a delivery has both formats, the images are those of the task object."""
    snapshot = parse(json.dumps(finished(result={"sample": "https://pictures.example/other.jpeg"})).encode())

    assert [image.url for image in snapshot.images] == [SAMPLE]


def test_byte_order_mark() -> None:
    """A delivery may begin with a UTF-8 byte order mark."""
    assert parse(b"\xef\xbb\xbf" + task_body(status="Pending")).task_id == "t1"


@pytest.mark.parametrize(
    ("task", "moderated", "code", "message"),
    [
        ({"status": "Error", "error": "out_of_memory", "message": "m"}, False, "out_of_memory", "m"),
        ({"status": "ERROR", "message": "m"}, False, "ERROR", "m"),
        ({"status": "Error"}, False, "Error", "Error"),
        ({"status": "Task not found"}, False, "Task not found", "Task not found"),
        ({"status": "Failed"}, False, None, "the service gave no reason"),
        ({"status": "failed", "error": {"code": "c", "message": "m"}}, False, "c", "m"),
        ({"status": "completed", "error": {"code": "c", "message": "m"}}, False, "c", "m"),
        (
            {"status": "Error", "error": "content_policy_violation", "message": "m"},
            True,
            "content_policy_violation",
            "m",
        ),
        ({"status": "Request Moderated"}, True, "Request Moderated", "Request Moderated"),
        ({"status": "content moderated", "message": "m"}, True, "content moderated", "m"),
        ({"status": "Content Moderated", "error": "refused"}, True, "Content Moderated", "refused"),
        ({"status": "Request Moderated", "error": {"code": 7, "message": "no"}}, True, "Request Moderated", "no"),
    ],
)
def test_failure(task: dict[str, object], moderated: bool, code: str | None, message: str) -> None:
    """Failures in both formats become the task's error, or a ContentModeratedError if moderation refused it."""
    snapshot = parse(task_body(**task))
    error = snapshot.error

    assert snapshot.status is TaskStatus.FAILED
    assert error is not None
    assert (error.message, error.task_id, error.code) == (message, "t1", code)
    assert isinstance(error, ContentModeratedError) is moderated


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        ("Pending", "pending"),
        ("processing", "in_progress"),
        ("in_progress", "in_progress"),
        ("Dreaming", "in_progress"),
    ],
)
def test_running_task(status: str, expected: str) -> None:
    """A delivery about a running task is not an end."""
    snapshot = parse(task_body(status=status))

    assert (snapshot.status, snapshot.images, snapshot.error) == (expected, (), None)


@pytest.mark.parametrize(
    "task",
    [
        {"status": "Ready"},
        *(
            {"status": "Ready", "result": result}
            for result in (None, {"sample": None}, {"sample": ""}, {"sample": [1]})
        ),
        *({"status": "completed", "output": output} for output in ([], [{"content": "nothing"}], {"a": 1}, 1)),
        *({"status": status} for status in (None, 200, ["Ready"])),
    ],
)
def test_invalid_delivery_with_id(task: dict[str, object]) -> None:
    """If an invalid delivery has an id, the error contains it."""
    assert parse_error(task_body(**task)).task_id == "t1"


@pytest.mark.parametrize(
    "body",
    [
        *(BODY[:length] for length in (0, 1, 7, 15, len(BODY) - 1)),
        *(BODY.decode().encode(encoding) for encoding in ("utf-16", "utf-16-le", "utf-32")),
        '{"id": "t1", "status": "Ready", "message": "Gemälde"}'.encode("latin-1"),
        *(json.dumps(value).encode() for value in ([], [{"id": "t1"}], "t1", 1, None, True)),
        *(task_body(id=name, status="Pending") for name in (None, "", True, 1.5, ["t1"], {"id": "t1"})),
        b'{"status": "Pending"}',
        BODY + BODY,
        b"id=t1&status=Ready",
        b"<html><h1>Welcome to nginx!</h1></html>",
        b"[" * 100_000,
        b'{"id": ' + b"1" * 5_000 + b"}",
        *(task_body(id=name, status="Pending") for name in ("\ud800", "t\udfff1", "t" * 1_025, 10**1_024)),
        BODY.ljust(MAX_BODY + 1),
    ],
)
def test_unreadable_delivery(body: bytes) -> None:
    """Anything but a JSON object of at most 1 MB with an id is a ProtocolError without a task id."""
    assert parse_error(body).task_id is None


@pytest.mark.parametrize("value", ["[]", "[0]", '{"": 0}', "0"])
def test_json_that_takes_long_to_parse(value: str) -> None:
    """JSON with hundreds of thousands of values is refused before it is parsed, by `verify` for its timestamp, too."""
    values = ",".join([value] * 201_000 if len(value) < 3 else [value] * 110_000)
    body = f'{{"id": "t1", "status": "Pending", "timestamp": {LONG_AGO}, "metadata": [{values}]}}'.encode()

    assert "200,000" in str(parse_error(body))
    verify(body, signature_headers(body), SECRET, now=NOW)


def test_largest_delivery() -> None:
    """A delivery may be as large as the limit; a number is a valid id."""
    assert parse(b'{"id": 12, "status": "Pending"}'.ljust(MAX_BODY)).task_id == "12"


@pytest.mark.parametrize("name", ["error", "message", "result", "output", "metadata", "id"])
@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ('{"a": ', "}")])
def test_deeply_nested_delivery(name: str, opening: str, closing: str) -> None:
    """A delivery nested almost too deeply for the JSON parser is parsed or a ProtocolError."""
    max_depth = max_json_depth()
    results = [
        parse_or_error(f'{{"id": "t1", "status": "Error", "{name}": {opening * depth}1{closing * depth}}}'.encode())
        for depth in range(max_depth - 12, max_depth + 12)
    ]

    assert isinstance(results[-1], ProtocolError)
    assert all(result.task_id == "t1" for result in results if "t1" in str(result))


@functools.cache
def max_json_depth() -> int:
    """Return how many levels of nesting the JSON parser supports, which depends on the Python version."""
    low, high = 1, 400_000
    while high - low > 1:
        middle = (low + high) // 2
        try:
            json.loads("[" * middle + "]" * middle)
        except RecursionError:
            high = middle
        else:
            low = middle
    return low


def parse_or_error(body: bytes) -> TaskSnapshot | ProtocolError:
    """Parse a delivery; return the ProtocolError if there is one."""
    try:
        return parse(body)
    except ProtocolError as error:
        return error


BFL_PAYLOADS = st.fixed_dictionaries(
    {},
    optional={
        "id": mostly(st.just("t1")),
        "status": mostly(st.sampled_from(["Ready", "Error", "Pending", "Request Moderated", "Task not found"])),
        "result": mostly(st.fixed_dictionaries({"sample": mostly(st.just(SAMPLE))}, optional={"seed": JSON})),
        "error": mostly(st.text()),
        "message": mostly(st.text()),
        "timestamp": mostly(st.datetimes().map(datetime.isoformat)),
    },
)
BODIES = st.binary(max_size=60) | st.one_of(JSON, TASKS, BFL_PAYLOADS, BFL_PAYLOADS).map(
    lambda value: json.dumps(value).encode()
)


@settings(max_examples=200, deadline=None)
@given(BODIES)
def test_any_delivery(body: bytes) -> None:
    """Any signed bytes verify, and parse as a snapshot of the task they name or a ProtocolError."""
    verify(body, signature_headers(body), SECRET, max_age=None)
    with contextlib.suppress(WebhookSignatureError):
        verify(body, signature_headers(body), SECRET)
    result = parse_or_error(body)

    if isinstance(result, TaskSnapshot):
        assert result.task_id == str(json.loads(body)["id"]) != ""
        assert result.raw == json.loads(body)
        check_snapshot(result)
    else:
        assert str(result)
