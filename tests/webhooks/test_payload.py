"""Webhooks: whose a delivery is, and what it says."""

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

SECRET = "hush-7f3a9c"
OTHER = "whist-41d0e2"
BODY = b'{"id": "t1", "status": "Ready"}'
NOW = datetime(2025, 11, 22, 10, 0, 0, tzinfo=UTC)
SAMPLE = "https://pictures.example/0.jpeg"


def digest(body: bytes = BODY, secret: str = SECRET) -> str:
    return hmac.new(secret.encode(), body, hashlib.sha256).hexdigest()


def signed(body: bytes = BODY, secret: str = SECRET, header: str = "X-BFL-Signature") -> dict[str, str]:
    return {header: f"sha256={digest(body, secret)}"}


def told(timestamp: object) -> bytes:
    return json.dumps({"id": "t1", "status": "Pending", "timestamp": timestamp}).encode()


def refused(
    body: bytes, headers: Mapping[str, str], secret: str | Iterable[str] = SECRET, **options: Any
) -> WebhookSignatureError:
    """Have a delivery refused; the error names neither secret nor the signature that would have been right."""
    with pytest.raises(WebhookSignatureError) as caught:
        verify(body, headers, secret, **options)
    shown = f"{caught.value} {caught.value!r}"
    assert not any(hidden in shown for hidden in (SECRET, OTHER, digest(body), digest(body, OTHER)))
    return caught.value


# ---------------------------------------------------------------------- whose it is


@pytest.mark.parametrize(
    "signature",
    [f"sha256={digest()}", digest(), digest().upper(), f"SHA256={digest().upper()}", f"  sha256={digest()} "],
)
def test_the_signature_of_the_body_verifies(signature: str) -> None:
    """The body's HMAC-SHA256 is taken with its prefix or without, in either case."""
    verify(BODY, {"X-BFL-Signature": signature}, SECRET)


@pytest.mark.parametrize("kind", [bytearray, memoryview])
def test_whatever_holds_bytes_is_a_body(kind: Callable[[bytes], Any]) -> None:
    """A server's buffer is as good as bytes."""
    body = told("2025-11-22T10:00:00Z")
    verify(kind(body), signed(body), SECRET, now=NOW)

    assert parse(kind(body)) == parse(body)


@pytest.mark.parametrize(
    "headers",
    [
        pytest.param(signed(header="x-bfl-signature"), id="lower case, as in ASGI"),
        pytest.param(signed(header="X-BFL-SIGNATURE"), id="upper case"),
        pytest.param(CIMultiDict(signed(header="x-Bfl-signature")), id="aiohttp"),
        pytest.param(Headers(signed()), id="starlette"),
        pytest.param(CIMultiDict([("X-BFL-Signature", "0" * 64), *signed().items()]), id="two, of which one is right"),
    ],
)
def test_headers_are_those_of_any_framework(headers: Mapping[str, str]) -> None:
    """The header's name is found without regard to case, in plain mappings and in those of the frameworks."""
    verify(BODY, headers, SECRET)


def test_the_header_may_have_another_name() -> None:
    """The signature is looked for under the name that was told, and under no other."""
    headers = signed(header="X-Webhook-Signature")

    verify(BODY, headers, SECRET, header="x-webhook-signature")
    assert "X-BFL-Signature" in str(refused(BODY, headers))


@pytest.mark.parametrize("secrets", [(SECRET, OTHER), [OTHER, SECRET], iter(["", SECRET])])
def test_while_a_secret_is_replaced_any_of_them_will_do(secrets: Iterable[str]) -> None:
    """Of several secrets, the signature may be made with any."""
    verify(BODY, signed(), secrets)


@pytest.mark.parametrize("secret", ["", [], [""], ["", OTHER]])
def test_an_empty_secret_verifies_nothing(secret: str | list[str]) -> None:
    """A signature that anybody could have made, keyed with nothing, is refused."""
    refused(BODY, signed(secret=""), secret)


@pytest.mark.parametrize(
    "signature",
    [
        None,
        # Not 64 digits, not hexadecimal ones, not ASCII.
        *("", "sha256=", digest()[:-1], digest() + "0", f"{digest()}, {digest()}", f"{digest()}\n{digest()}"),
        *("g" + digest()[1:], "é" + digest()[1:], "\N{FULLWIDTH DIGIT ONE}" * 64),
        *(prefix + digest() for prefix in ("sha512=", "sha256=sha256=", "\N{LATIN SMALL LETTER LONG S}ha256=")),
        # Made in another way, or of something else.
        "sha1=" + hmac.new(SECRET.encode(), BODY, "sha1").hexdigest(),
        hashlib.sha256(BODY).hexdigest(),
        *(digest(secret=OTHER), digest(secret=SECRET + " "), digest(BODY + b"\n")),
    ],
)
def test_anything_else_is_refused(signature: str | None) -> None:
    """A signature that is missing, malformed or wrong is a WebhookSignatureError, whatever it looks like."""
    refused(BODY, {} if signature is None else {"X-BFL-Signature": signature})


@pytest.mark.parametrize("place", range(len(BODY)))
def test_one_changed_byte_breaks_the_signature(place: int) -> None:
    """No byte of the body can be changed after it was signed."""
    refused(BODY[:place] + bytes([BODY[place] ^ 1]) + BODY[place + 1 :], signed())


@pytest.mark.parametrize("body", [BODY.decode(), json.loads(BODY), None])
def test_a_body_that_was_read_already_is_a_mistake(body: Any) -> None:
    """What isn't the raw bytes can't be verified, and isn't parsed either: the error names `body`."""
    for call in (lambda: verify(body, signed(), SECRET), lambda: parse(body)):
        with pytest.raises(InvalidRequestError, match="bytes") as caught:
            call()

        assert caught.value.field == "body"


@pytest.mark.parametrize("secret", [[SECRET.encode()], SECRET.encode(), [None]])
def test_a_secret_that_is_no_text_is_a_mistake(secret: Any) -> None:
    """A secret given as anything but text is told of, and not shown."""
    with pytest.raises(InvalidRequestError) as caught:
        verify(BODY, signed(), secret)

    assert caught.value.field == "secret"
    assert SECRET not in f"{caught.value} {caught.value!r}"


@settings(max_examples=60, deadline=None)
@given(body=st.binary(), secret=st.text(min_size=1).filter(str.isprintable), other=st.text())
def test_who_knows_the_secret_can_sign_anything(body: bytes, secret: str, other: str) -> None:
    """Any body verifies with the secret that signed it, and with no other."""
    verify(body, signed(body, secret), secret, max_age=None)

    if other != secret and other.isprintable():
        with pytest.raises(WebhookSignatureError):
            verify(body, signed(body, secret), other)


# ---------------------------------------------------------------------- when it was sent


LONG_AGO = (NOW - timedelta(seconds=301)).timestamp()


@pytest.mark.parametrize(
    "timestamp",
    [
        *("2025-11-22T09:54:59Z", "2025-11-22T09:54:59.900000+00:00", "2025-11-22T10:54:59+01:00"),
        *("2025-11-22T09:54:59", "2025-11-21", "0001-01-01T00:00:00+14:00"),
        *(LONG_AGO, int(LONG_AGO), str(LONG_AGO), 0),
    ],
)
def test_an_old_delivery_is_refused(timestamp: object) -> None:
    """A delivery that says that it was sent more than five minutes ago may be a replayed one; unless any age will do."""
    body = told(timestamp)

    assert "300 s" in str(refused(body, signed(body), now=NOW))
    verify(body, signed(body), SECRET, max_age=None, now=NOW)


@pytest.mark.parametrize(
    "body",
    [
        *map(told, ("2025-11-22T09:55:00Z", "2025-11-22T04:55:00-05:00", NOW.timestamp() - 300)),
        *map(told, ("2025-11-22T10:04:00Z", "9999-12-31T23:59:59-14:00")),
        *map(told, ("yesterday", "", None, True, [1], {"at": 1}, 1e300, -1e300, 1763800000000000)),
        *(BODY, b'{"id": "t1", "about": {"timestamp": 1}}', b'["timestamp", 1]'),
        *(b'{"timestamp": 1', b'\xff"timestamp"', b""),
    ],
)
def test_a_delivery_that_is_not_known_to_be_old_is_taken(body: bytes) -> None:
    """A delivery that is young, or by its clock from the future, or doesn't tell readably when it was sent, verifies."""
    verify(body, signed(body), SECRET, now=NOW)


def test_how_old_a_delivery_may_be_is_an_option() -> None:
    """`max_age` counts in seconds, and without `now` this machine's clock says how many have passed."""
    body = told("2025-11-22T09:59:50Z")

    verify(body, signed(body), SECRET, max_age=10, now=NOW)
    refused(body, signed(body), max_age=9.5, now=NOW)
    refused(body, signed(body))
    recent = told((datetime.now(UTC) - timedelta(seconds=60)).isoformat())
    verify(recent, signed(recent), SECRET)
    refused(recent, signed(recent), max_age=30)


def test_a_present_without_a_zone_is_a_mistake() -> None:
    """A `now` whose zone can't be known is told of with each delivery, not only with those that tell their time."""
    with pytest.raises(InvalidRequestError) as caught:
        verify(BODY, signed(), SECRET, now=NOW.replace(tzinfo=None))

    assert caught.value.field == "now"


# ---------------------------------------------------------------------- what it says


def said(**task: object) -> bytes:
    return json.dumps({"id": "t1"} | task).encode()


def unreadable(body: bytes) -> ProtocolError:
    with pytest.raises(ProtocolError) as caught:
        parse(body)
    return caught.value


def test_the_task_object_is_read_as_a_poll_is() -> None:
    """A delivery in the gateway's shape tells all that a poll would, and `raw` is what came."""
    task = finished(id="t7")
    snapshot = parse(json.dumps(task).encode())

    assert (snapshot.task_id, snapshot.status, snapshot.error) == ("t7", TaskStatus.COMPLETED, None)
    assert [(image.url, image.task_id, image.extra) for image in snapshot.images] == [(SAMPLE, "t7", {"jobId": "j1"})]
    assert snapshot.usage is not None
    assert str(snapshot.usage.cost) == "0.07"
    assert snapshot.raw == task


@pytest.mark.parametrize("status", ["Ready", "READY", "ready", " Ready "])
def test_the_makers_result_is_one_picture(status: str) -> None:
    """The maker's sample becomes a picture, what else it says of the result is kept with it, and `raw` is what came."""
    result = {"sample": SAMPLE, "prompt": "a lighthouse", "seed": 1, "url": "u", "type": "t", "extra": 2}
    body = said(status=status, result=result, timestamp="2025-11-22T10:00:00Z")
    snapshot = parse(body)

    assert (snapshot.status, snapshot.error, snapshot.usage) == (TaskStatus.COMPLETED, None, None)
    assert [(image.url, image.type, image.task_id) for image in snapshot.images] == [(SAMPLE, "image", "t1")]
    assert snapshot.images[0].extra == {"prompt": "a lighthouse", "seed": 1, "extra": 2}
    assert snapshot.raw == json.loads(body)


def test_the_task_object_comes_before_the_makers_result() -> None:
    """Where a delivery has both, the pictures are those of the task object."""
    snapshot = parse(json.dumps(finished(result={"sample": "https://pictures.example/other.jpeg"})).encode())

    assert [image.url for image in snapshot.images] == [SAMPLE]


def test_a_byte_order_mark_does_no_harm() -> None:
    """A delivery may begin with the mark that some writers put before UTF-8."""
    assert parse(b"\xef\xbb\xbf" + said(status="Pending")).task_id == "t1"


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
def test_a_failure_says_why(task: dict[str, object], moderated: bool, code: str | None, message: str) -> None:
    """Failures of both shapes become the error of the task, and a ContentModeratedError where moderation refused."""
    snapshot = parse(said(**task))
    error = snapshot.error

    assert snapshot.status is TaskStatus.FAILED
    assert error is not None
    assert (error.message, error.task_id, error.code) == (message, "t1", code)
    assert isinstance(error, ContentModeratedError) is moderated


@pytest.mark.parametrize(
    ("status", "read"),
    [
        ("Pending", "pending"),
        ("processing", "in_progress"),
        ("in_progress", "in_progress"),
        ("Dreaming", "in_progress"),
    ],
)
def test_a_task_that_goes_on_has_not_ended(status: str, read: str) -> None:
    """A delivery about a task that is still running is none about its end."""
    snapshot = parse(said(status=status))

    assert (snapshot.status, snapshot.images, snapshot.error) == (read, (), None)


@pytest.mark.parametrize(
    "task",
    [
        {"status": "Ready"},
        *(
            {"status": "Ready", "result": result}
            for result in (None, {"sample": None}, {"sample": ""}, {"sample": [1]})
        ),
        *({"status": "completed", "output": output} for output in ([], [{"content": "nothing"}], {"a": 1}, 1)),
        *({"status": status, "result": {"sample": SAMPLE}} for status in (None, 200, ["Ready"])),
        {"result": {"sample": SAMPLE}},
    ],
)
def test_what_is_wrong_with_a_known_task_names_it(task: dict[str, object]) -> None:
    """Where a delivery has an id, and nothing that can be read or relied on, the error names the task."""
    assert unreadable(said(**task)).task_id == "t1"


@pytest.mark.parametrize(
    "body",
    [
        *(BODY[:length] for length in (0, 1, 7, 15, len(BODY) - 1)),
        *(BODY.decode().encode(encoding) for encoding in ("utf-16", "utf-16-le", "utf-32")),
        '{"id": "t1", "status": "Ready", "message": "Gemälde"}'.encode("latin-1"),
        *(json.dumps(value).encode() for value in ([], [{"id": "t1"}], "t1", 1, None, True)),
        *(said(id=name, status="Pending") for name in (None, "", True, 1.5, ["t1"], {"id": "t1"})),
        b'{"status": "Pending"}',
        BODY + BODY,
        b"id=t1&status=Ready",
        b"<html><h1>Welcome to nginx!</h1></html>",
        b"[" * 100_000,
        b'{"id": ' + b"1" * 5_000 + b"}",
        BODY.ljust(MAX_BODY + 1),
    ],
)
def test_what_cannot_be_read_is_a_protocol_error(body: bytes) -> None:
    """Whatever isn't a JSON object of at most 1 MB that names a task is a ProtocolError, and about no task."""
    assert unreadable(body).task_id is None


def test_a_delivery_of_one_megabyte_is_read() -> None:
    """A delivery may be as large as the limit; and a number is an id as well."""
    assert parse(b'{"id": 12, "status": "Pending"}'.ljust(MAX_BODY)).task_id == "12"


@pytest.mark.parametrize("name", ["error", "message", "result", "output", "metadata", "id"])
@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ('{"a": ', "}")])
def test_nothing_is_nested_too_deeply(name: str, opening: str, closing: str) -> None:
    """Nested about as deeply as JSON can be read at all, a delivery is read or a ProtocolError."""
    edge = deepest()
    found = [
        outcome(f'{{"id": "t1", "status": "Error", "{name}": {opening * depth}1{closing * depth}}}'.encode())
        for depth in range(edge - 12, edge + 12)
    ]

    assert isinstance(found[-1], ProtocolError)
    assert all(one.task_id == "t1" for one in found if "t1" in str(one))


@functools.cache
def deepest() -> int:
    """Find how many levels of JSON can be read, which depends on the Python."""
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


def outcome(body: bytes) -> TaskSnapshot | ProtocolError:
    """Read a delivery; whatever is raised that isn't a ProtocolError goes on."""
    try:
        return parse(body)
    except ProtocolError as error:
        return error


MAKERS = st.fixed_dictionaries(
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
BODIES = st.binary(max_size=60) | st.one_of(JSON, TASKS, MAKERS, MAKERS).map(lambda value: json.dumps(value).encode())


@settings(max_examples=200, deadline=None)
@given(BODIES)
def test_any_delivery_is_a_snapshot_or_a_protocol_error(body: bytes) -> None:
    """Any bytes verify, if any age will do, and are a snapshot of the task that they name, or a ProtocolError."""
    verify(body, signed(body), SECRET, max_age=None)
    with contextlib.suppress(WebhookSignatureError):
        verify(body, signed(body), SECRET)
    found = outcome(body)

    if isinstance(found, TaskSnapshot):
        assert found.task_id == str(json.loads(body)["id"]) != ""
        assert found.raw == json.loads(body)
        check_snapshot(found)
    else:
        assert str(found)
