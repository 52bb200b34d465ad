"""The codec: requests, and every response that the service or a proxy may send to a submit or a poll."""

import base64
import json
import math
import pickle
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.errors import API_FORMATS, CLASSES, FOREIGN_BODIES
from support.responses import finished, make_response, picture
from support.strategies import BODIES, JSON, RESPONSE_HEADERS, STATUSES, TASKS, check_snapshot

from flux2max_async import (
    AuthenticationError,
    BadRequestError,
    ConfigurationError,
    ContentModeratedError,
    FluxError,
    GenerationRequest,
    InsufficientBalanceError,
    InvalidRequestError,
    PermissionDeniedError,
    ProtocolError,
    ResponseError,
    TaskNotFoundError,
    TaskSnapshot,
    TaskStatus,
)
from flux2max_async._api.codec import HttpRequest, build_poll, build_submit, parse_poll, parse_submit, validate_task_id
from flux2max_async._api.response import error_from_response
from flux2max_async._api.retry import is_uncertain, may_submit_again
from flux2max_async._api.statuses import status_of
from flux2max_async._api.task_object import task_id_of

TASK = "/model/v1/generation/task/"
SECRET = "hush-7f3a9c"


def poll(body: object, status: int = 200) -> TaskSnapshot:
    return parse_poll(make_response(body, status), "t1")


def submit(body: object, status: int = 200) -> TaskSnapshot:
    return parse_submit(make_response(body, status), base_url="https://gateway.example/prefix")


def running(**changes: object) -> dict[str, object]:
    """Return the task object of a running task."""
    return finished(**({"status": "in_progress", "output": ..., "usage": ..., "progress": ...} | changes))


def parse_or_catch(parse: Callable[[], TaskSnapshot]) -> TaskSnapshot | FluxError:
    """Parse a response, or return the error that it causes."""
    try:
        return parse()
    except FluxError as error:
        return error


def catch(parse: Callable[[], TaskSnapshot]) -> FluxError:
    """Return the error that parsing a response causes."""
    with pytest.raises(FluxError) as caught:
        parse()
    return caught.value


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
    "nested too deeply": b'{"id":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "number too long": b'{"id":' + b"1" * 5000 + b"}",
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


HALF_READABLE = {
    "a stray byte": b'{"id": "t1", "status": "pending"}\x00',
    "two objects": b'{"id": "t1", "status": "pending"}{"id": "t2", "status": "completed"}',
    "the same twice": b'{"id": "t1", "status": "pending"}' * 2,
    "a page": b'{"id": "t1", "status": "pending"}\n<html>502</html>',
    "cut off later": b'{"id": "t1", "status": "pending"}, {"id": "t',
    "Latin-1": '{"id": "t1", "status": "pending", "prompt": "caf\xe9"}'.encode("latin-1"),
    "a newline in a text": b'{"id": "t1", "status": "pending", "prompt": "a\ncat"}',
    "a byte order mark": b'\xef\xbb\xbf {"id": "t1", "status": "pending"};',
    "an envelope": b'{"code": 200, "data": {"id": "t1", "status": "pending"}}}',
}


@pytest.mark.parametrize("status", [200, 202, 500, 504])
@pytest.mark.parametrize("body", HALF_READABLE.values(), ids=HALF_READABLE)
def test_half_readable_submit_response(body: bytes, status: int) -> None:
    """The id is taken from a response that begins with a whole object which has one."""
    assert parse_submit(make_response(body, status)).task_id == "t1"


@pytest.mark.parametrize("body", HALF_READABLE.values(), ids=HALF_READABLE)
def test_half_readable_poll_response(body: bytes) -> None:
    """A response to a poll is read if it begins with a whole object."""
    assert parse_poll(make_response(body), "t1").status is TaskStatus.PENDING


@pytest.mark.parametrize(
    "body",
    [
        b'{"id": "\xff"}',
        b'{"id": "t1\xe9", "status": "pending"}',
        b'{"id": "t1\\ud800", "status": "pending"}',
        b'{"status": "pending"}{"id": "t1"}',
        b'{"error": {"message": "bad prompt"}} {"id": "t1"}',
        b'x{"id": "t1"}',
        b'{"id": "t1", "output": [',
    ],
)
def test_submit_response_without_a_readable_id_is_uncertain(body: bytes) -> None:
    """If no whole object with an id is at the beginning, it is unknown whether a task exists, even with an error."""
    with pytest.raises(ProtocolError) as caught:
        parse_submit(make_response(body))

    assert is_uncertain(caught.value)


@pytest.mark.parametrize("task_id", ["x" * 1024, "\n" * 1024, 10**1023])
def test_longest_task_id(task_id: str | int) -> None:
    """A task id may have 1,024 characters."""
    assert parse_submit(make_response({"id": task_id})).task_id == str(task_id)
    assert poll({"id": task_id, "status": "pending"}).status is TaskStatus.PENDING
    assert validate_task_id(str(task_id)) == str(task_id)


@pytest.mark.parametrize("status", [200, 400, 500])
@pytest.mark.parametrize("body", [{"id": "x" * 1025}, {"id": "x" * 5_000_000}, {"code": 0, "data": {"id": 10**1024}}])
def test_task_id_that_is_too_long(body: dict[str, object], status: int) -> None:
    """A longer task id is a ProtocolError with a short message, which makes a submit uncertain."""
    with pytest.raises(ProtocolError, match=r"the task id has .* characters; at most 1,024 are accepted") as submitted:
        parse_submit(make_response(body, status))
    with pytest.raises(ProtocolError, match=r"the task id has .* characters; at most 1,024 are accepted"):
        poll({"status": "completed", **body})

    assert is_uncertain(submitted.value)
    assert len(str(submitted.value)) < 100


def test_own_task_id_that_is_too_long() -> None:
    """An id that no service can have given is refused before anything is sent."""
    with pytest.raises(InvalidRequestError, match="task_id must have at most 1,024 characters, not 1,025"):
        validate_task_id("x" * 1025)


BOMBS = {
    "brackets": b"[" * 15_000_000,
    "objects": b'{"id": "t1", "status": "completed", "output": [' + b"{}," * 200_000 + b"{}]}",
    "commas": b'{"id": "t1", "status": "pending", "x": [' + b"1," * 200_001 + b"1]}",
    "after the id": b'{"id": "t1", "status": "pending"}' + b"[" * 200_000,
    "UTF-16": ("[" * 200_001).encode("utf-16"),
}


@pytest.mark.parametrize("body", BOMBS.values(), ids=BOMBS)
def test_json_with_too_many_values_is_not_parsed(body: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """JSON with more than 200,000 brackets, braces and commas is refused before it is parsed."""
    monkeypatch.setattr(json, "loads", None)
    monkeypatch.setattr(json, "JSONDecoder", None)
    for parse in (parse_submit, lambda response: parse_poll(response, "t1")):
        with pytest.raises(ProtocolError, match="more than 200,000 brackets and commas"):
            parse(make_response(body))

    assert error_from_response(make_response(body, 500)).status == 500


@pytest.mark.parametrize("status", [200, 400, 429, 503, 504])
@pytest.mark.parametrize(
    "body",
    [
        b'{"id": "t1", "x": [' + b"1," * 200_001 + b"1]}",
        b'{"id": "t\xff1"}',
        b'{"id": "t1\\ud800"}',
        b'{"data": {"id": "t\xff1"}}',
        b'{"id": "t1"}' + b" " * 4_000_000 + b"x",
        b'{"id": "t1", "number": ' + b"1" * 5000 + b"}",
        b'{"id": "t1", "x": ' + b"[" * 90_000 + b"]" * 90_000 + b"}",
        b'{"id": "t1", "sta',
        b' [{"id": "t1"}]',
    ],
    ids=[
        *("too many values", "not UTF-8", "a surrogate", "not UTF-8 in an envelope", "too large to be searched"),
        *("long number", "nested too deeply", "cut off", "a list"),
    ],
)
def test_id_that_cannot_be_read_is_uncertain_whatever_the_status(body: bytes, status: int) -> None:
    """A response that may have an id is no refusal, not even with a status after which a submit is repeated."""
    with pytest.raises(ProtocolError) as caught:
        parse_submit(make_response(body, status))

    assert is_uncertain(caught.value)
    assert not may_submit_again(caught.value)


def test_large_json_with_few_values_is_parsed() -> None:
    """The size alone is no reason to refuse a response: a picture may be in it."""
    data = base64.b64encode(bytes(13_000_000)).decode()
    snapshot = poll({"id": "t1", "status": "completed", "output": [{"content": [{"b64_json": data}]}]})

    assert len(snapshot.images[0].url) > 17_000_000


@pytest.mark.parametrize("status", CLASSES)
def test_http_error_status_of_a_poll_is_an_error_whatever_the_body(status: int) -> None:
    """A response to a poll outside of 2xx is an error, even if its body is a valid task."""
    with pytest.raises(CLASSES[status]) as caught:
        poll(finished(), status)

    assert caught.value.status == status


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


# ---------------------------------------------------------------------- refusals


SUBMIT_CLASSES: dict[int, type[FluxError]] = {
    **CLASSES,
    **dict.fromkeys((301, 302, 307, 404, 405), ConfigurationError),
}
FOREIGN_STATUSES = (302, 400, 401, 402, 403, 404, 405, 408, 429, 502, 503)
POLL_STATUSES = (400, 401, 402, 403, 404, 405, 503)
UNCERTAIN = (408, 500, 502, 504)
RETRIED = (429, 503)


@pytest.mark.parametrize("status", SUBMIT_CLASSES)
@pytest.mark.parametrize(("body", "code", "message"), API_FORMATS.values(), ids=API_FORMATS)
def test_refused_submit_in_each_format(body: object, code: str | None, message: str, status: int) -> None:
    """Each HTTP error has its class, code and message, in each format; where the API is not, that is a wrong base_url."""
    error = catch(lambda: submit(body, status))

    assert type(error) is SUBMIT_CLASSES[status]
    assert (is_uncertain(error), may_submit_again(error)) == (status in UNCERTAIN, status in RETRIED)
    assert error.task_id is None
    if isinstance(error, ResponseError):
        assert (error.status, error.code, error.message, error.from_api) == (status, code, message, True)
    else:
        assert "base_url 'https://gateway.example/prefix'" in str(error)
        assert "no such API is there" in str(error)


@pytest.mark.parametrize("status", FOREIGN_STATUSES)
@pytest.mark.parametrize("body", FOREIGN_BODIES.values(), ids=FOREIGN_BODIES)
def test_submit_that_something_else_has_answered(body: object, status: int) -> None:
    """What answers in any other format has the class of its status, and is told apart from the API."""
    error = catch(lambda: submit(body, status))

    assert type(error) is SUBMIT_CLASSES[status]
    assert (is_uncertain(error), may_submit_again(error)) == (status in UNCERTAIN, status in RETRIED)
    if isinstance(error, ResponseError):
        assert not error.from_api
        assert ("a proxy or firewall, not the API" in str(error)) is (status < 500)


@pytest.mark.parametrize("status", POLL_STATUSES)
@pytest.mark.parametrize(("body", "code", "message"), API_FORMATS.values(), ids=API_FORMATS)
def test_refused_poll_in_each_format(body: object, code: str | None, message: str, status: int) -> None:
    """A poll has the same errors; where the API is not, it is a missing task or a bad request."""
    error = catch(lambda: poll(body, status))

    assert type(error) is CLASSES[status]
    assert isinstance(error, ResponseError)
    assert (error.status, error.code, error.message, error.from_api) == (status, code, message, True)


@pytest.mark.parametrize("status", POLL_STATUSES)
@pytest.mark.parametrize("body", FOREIGN_BODIES.values(), ids=FOREIGN_BODIES)
def test_poll_that_something_else_has_answered(body: object, status: int) -> None:
    """What answers a poll in any other format is told apart from the API."""
    error = catch(lambda: poll(body, status))

    assert type(error) is CLASSES[status]
    assert isinstance(error, ResponseError)
    assert not error.from_api
    assert ("a proxy or firewall, not the API" in str(error)) is (status < 500)


@pytest.mark.parametrize("status", [200, 400, 402, 403, 404, 405, 408, 422, 429])
def test_submit_without_balance(status: int) -> None:
    """An empty balance is known under any 4xx, and refuses for good: it is neither uncertain nor retried."""
    error = catch(lambda: submit({"status": {"code": 402, "message": "no", "error_code": 40201}, "data": None}, status))

    assert type(error) is InsufficientBalanceError
    assert (error.status, error.code, error.from_api) == (status, "40201", True)
    assert (is_uncertain(error), may_submit_again(error)) == (False, False)


MODERATED: dict[str, tuple[object, str | None]] = {
    **{
        code: ({"error": {"code": code, "message": "no"}}, code)
        for code in ("moderation_blocked", "content_policy_violation", "content_filter", "safety_violation", "safety")
    },
    "text": ({"error": "content_policy_violation", "message": "no"}, "content_policy_violation"),
    "words": ({"error": {"code": "bad", "message": "The input was flagged as sensitive"}}, "bad"),
    "message": ({"message": "flagged as sensitive"}, None),
    "envelope": ({"status": {"code": 400, "message": "Content moderated"}, "data": None}, "400"),
    "detail": ({"detail": "Request Moderated"}, None),
}


@pytest.mark.parametrize("status", [200, 400, 403, 409, 422])
@pytest.mark.parametrize(("body", "code"), MODERATED.values(), ids=MODERATED)
def test_moderated_submit(body: object, code: str | None, status: int) -> None:
    """Moderation of a submit has the same error as moderation at the end of a task, but no task."""
    error = catch(lambda: submit(body, status))

    assert type(error) is ContentModeratedError
    assert (error.task_id, error.code) == (None, code)
    assert error.message
    assert (is_uncertain(error), may_submit_again(error)) == (False, False)


@pytest.mark.parametrize("status", [401, 402, 404, 405, 408, 429, 500, 502, 503, 504])
@pytest.mark.parametrize(("body", "code"), MODERATED.values(), ids=MODERATED)
def test_other_statuses_with_words_of_moderation(body: object, code: str | None, status: int) -> None:
    """Under an HTTP status with another certain meaning, the words of moderation change nothing."""
    error = catch(lambda: submit(body, status))

    assert type(error) is SUBMIT_CLASSES[status]
    assert code is None or code in str(error)


@pytest.mark.parametrize(
    "body",
    [
        {"error": {"code": "timeout", "message": "Moderation service timed out, try again"}},
        {"error": {"code": "invalid_parameter", "message": "safety_tolerance must be at most 5"}},
        {"error": {"code": "invalid_parameter", "message": "too long: 'a sign: flagged as sensitive'"}},
        b"<html>Blocked by the content filter of your company</html>",
    ],
)
@pytest.mark.parametrize("status", [400, 403, 422])
def test_submit_that_is_not_moderated(status: int, body: object) -> None:
    """An outage of moderation, a wrong parameter, a quoted prompt and a firewall's page are not moderation."""
    error = catch(lambda: submit(body, status))

    assert type(error) is CLASSES[status]


@pytest.mark.parametrize("parse", [submit, poll])
@pytest.mark.parametrize("code", CLASSES)
def test_error_in_an_envelope(code: int, parse: Callable[[object], TaskSnapshot]) -> None:
    """The status code in the envelope of a 200 counts as the HTTP status does."""
    error = catch(lambda: parse({"status": {"code": code, "message": "no"}, "data": None}))

    if parse is submit and code in {408, 504}:  # the gateway has given up waiting
        assert type(error) is ProtocolError
        assert is_uncertain(error)
        return
    assert type(error) is CLASSES[code]
    assert "no" in error.message
    assert not is_uncertain(error)


@pytest.mark.parametrize("code", [408, 504, "504", "SYNC_TIMEOUT", "timed_out", "gateway_timeout"])
def test_gateway_that_has_given_up_waiting_leaves_a_submit_uncertain(code: object) -> None:
    """An error that says so in the answer to a submit is no refusal, also with the status 200."""
    error = catch(lambda: submit({"error": {"code": code, "message": "no"}}))

    assert is_uncertain(error)


# ---------------------------------------------------------------------- ids and envelopes


TIMEOUT = {"code": "SYNC_TIMEOUT", "message": "the task is still running"}


@pytest.mark.parametrize(
    ("http_status", "body", "status"),
    [
        (504, {"id": "t1", "status": "in_progress", "error": TIMEOUT}, TaskStatus.IN_PROGRESS),
        (504, {"id": "t1", "status": "queued", "error": TIMEOUT}, TaskStatus.IN_PROGRESS),
        (504, {"id": "t1", "status": "pending"}, TaskStatus.PENDING),
        (504, {"id": "t1", "error": TIMEOUT}, TaskStatus.IN_PROGRESS),
        (504, {"id": "t1", "status": "waiting for the model", "error": TIMEOUT}, TaskStatus.IN_PROGRESS),
        (504, {"id": "t1", "status": "completed"}, TaskStatus.IN_PROGRESS),
        (504, {"id": "t1", "status": "completed", "error": TIMEOUT}, TaskStatus.IN_PROGRESS),
        (504, {"id": "t1", "status": "failed", "error": TIMEOUT}, TaskStatus.FAILED),
        (504, finished(error=TIMEOUT), TaskStatus.COMPLETED),
        (504, {"status": {"code": 504, "message": "timed out"}, "data": {"id": "t1"}}, TaskStatus.IN_PROGRESS),
        *(
            (status, {"id": "t1", "error": TIMEOUT}, TaskStatus.IN_PROGRESS)
            for status in (408, 429, 500, 502, 503, 599)
        ),
        *((status, {"id": "t1", "status": "in_progress"}, TaskStatus.IN_PROGRESS) for status in (302, 400, 402, 403)),
    ],
    ids=lambda value: json.dumps(value)[:60] if isinstance(value, dict) else "",
)
def test_id_in_an_error_is_a_task(http_status: int, body: dict[str, object], status: TaskStatus) -> None:
    """If an HTTP error has an id and is not final, the task exists; the error is only why its end wasn't waited for."""
    snapshot = submit(body, http_status)

    assert (snapshot.task_id, snapshot.status, snapshot.partial_error) == ("t1", status, None)
    assert snapshot.raw == body


@pytest.mark.parametrize(
    ("status", "changes", "error_class"),
    [
        (400, {}, BadRequestError),
        (400, {"status": "failed"}, BadRequestError),
        (400, {"status": {"code": 400, "message": "no"}}, BadRequestError),
        (400, {"status": "waiting"}, BadRequestError),
        (401, {}, AuthenticationError),
        (402, {}, InsufficientBalanceError),
        (402, {"status": "failed", "error": {"code": 40201, "message": "no"}}, InsufficientBalanceError),
        (403, {}, PermissionDeniedError),
        (403, {"error": "content_policy_violation", "message": "no"}, ContentModeratedError),
        (404, {}, ConfigurationError),
        (422, {"error": ..., "detail": "no"}, BadRequestError),
        (409, {"error": ...}, BadRequestError),
    ],
)
def test_final_error_with_an_id(status: int, changes: dict[str, object], error_class: type[FluxError]) -> None:
    """If an HTTP error with an id is final, it has the id of the task."""
    body = {"id": "t1", "error": {"code": "bad", "message": "no"}, **changes}
    error = catch(lambda: submit({name: value for name, value in body.items() if value is not ...}, status))

    assert type(error) is error_class
    assert error.task_id == "t1"
    assert (is_uncertain(error), may_submit_again(error)) == (False, False)


def test_final_error_with_an_id_in_an_envelope() -> None:
    """The id of a final error may be in an envelope."""
    error = catch(lambda: submit({"status": {"code": 400, "message": "no"}, "data": {"id": "t1"}}, 400))

    assert type(error) is BadRequestError
    assert (error.task_id, error.code, error.message) == ("t1", "400", "no")


@pytest.mark.parametrize("code", [200, "200", 0, "0", 201, 200.0, "ok", "success"])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda code, data: {"status": {"code": code, "message": "ok"}, "data": data},
        lambda code, data: {"code": code, "message": "success", "data": data},
        lambda code, data: {"id": None, "status": {"code": code}, "data": data, "error": None},
    ],
)
def test_task_in_an_envelope(wrap: Callable[[object, object], dict[str, object]], code: object) -> None:
    """In the envelope of a success, a task is the same as without, for submits and polls alike."""
    submitted, polled = submit(wrap(code, running())), poll(wrap(code, finished()))

    assert (submitted.task_id, submitted.status) == ("t1", TaskStatus.IN_PROGRESS)
    assert submitted.raw == wrap(code, running())
    assert polled.images == poll(finished()).images
    assert (polled.status, polled.usage) == (TaskStatus.COMPLETED, poll(finished()).usage)
    assert polled.raw == wrap(code, finished())


@pytest.mark.parametrize("code", [400, 402, 40201, 500, 504, "failed", None])
def test_id_under_a_failing_code(code: object) -> None:
    """An id in the envelope of a 2xx is a task, even if the envelope reports an error."""
    snapshot = submit({"status": {"code": code, "message": "no", "error_code": 40201}, "data": {"id": "t1"}})

    assert (snapshot.task_id, snapshot.status) == ("t1", TaskStatus.IN_PROGRESS)


@pytest.mark.parametrize("wrapper_id", ["r1", 7])
def test_id_of_the_envelope(wrapper_id: object) -> None:
    """The id of an envelope is not the id of the task in it."""
    snapshot = submit({"id": wrapper_id, "status": {"code": 200}, "data": {"id": "t1"}})

    assert snapshot.task_id == "t1"


@pytest.mark.parametrize(
    "data", [None, {}, [], "t1", [{"id": "t1"}], {"id": None}, {"status": "queued"}], ids=json.dumps
)
@pytest.mark.parametrize("message", ["ok", "no", ""])
def test_envelope_without_an_id(message: str, data: object) -> None:
    """The envelope of a success without an id in it says nothing clear: a task may exist."""
    body = {"status": {"code": 200, "message": message}, "data": data}

    assert type(catch(lambda: submit(body))) is ProtocolError
    assert type(catch(lambda: submit({"code": 0, "message": message, "data": data}))) is ProtocolError


@pytest.mark.parametrize("data", [None, {}, [], {"id": "t1"}], ids=json.dumps)
def test_poll_without_a_task_in_its_envelope(data: object) -> None:
    """The envelope of a success without a task in it is an unreadable response to a poll."""
    error = catch(lambda: poll({"status": {"code": 200, "message": "ok"}, "data": data}))

    assert type(error) is ProtocolError


@pytest.mark.parametrize(
    "data", [{"error": {"code": "bad", "message": "no"}}, {"error": "bad", "message": "no"}, {"id": "", "error": "no"}]
)
def test_error_inside_an_envelope(data: dict[str, object]) -> None:
    """An error in the envelope of a success is a refusal of a submit."""
    error = catch(lambda: submit({"status": {"code": 200, "message": "ok"}, "data": data}))

    assert type(error) is ResponseError
    assert (error.status, error.message, error.from_api) == (200, "no", True)


# ---------------------------------------------------------------------- secrets


WEBHOOK_SECRETS = ["hush hush 7f3a9c", "schlüssel-7f3a9c", "灯台7f3a9c", 'hush\n"7f3a9c"\t']


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


@pytest.mark.parametrize("status", [302, 404])
def test_configuration_error_redacts_an_echoed_secret(status: int) -> None:
    """The error of a wrong base_url doesn't show a secret that was echoed."""
    response = make_response(
        {"message": f"who is {SECRET}?"}, status, {"Location": f"https://new.example/?key={SECRET}"}
    )
    error = catch(lambda: parse_submit(response.with_secret(SECRET), base_url="https://gateway.example"))

    assert type(error) is ConfigurationError
    assert SECRET not in f"{error!s} {error!r}"


# ---------------------------------------------------------------------- arbitrary responses


MESSAGES = st.sampled_from(
    [
        *("ok", "no", "queued", "", f"wrong key {SECRET}", "insufficient balance", "moderation_blocked", "flagged"),
        *({"code": 40203, "message": "no"}, {"code": SECRET, "message": SECRET}, {"code": 0}, {"message": "accepted"}),
    ]
)
WORDS = st.sampled_from(
    ["Ready", "succeeded", "Content Moderated", "canceled", "queued", "Task not found", SECRET, "?"]
)
CODES: st.SearchStrategy[Any] = st.sampled_from(
    [0, 200, "200", 201, "ok", 400, 402, "40203", 404, 429, 500, 504, None, True, 7, []]
)
ANY_TASK = st.builds(
    lambda task, changes: {**task, **changes},
    TASKS,
    st.fixed_dictionaries(
        {},
        optional={
            "status": WORDS,
            "message": MESSAGES,
            "error": MESSAGES,
            "code": CODES,
            "result": st.just({"sample": "https://a.example/"}),
        },
    ),
)
ANY_DATA = ANY_TASK | ANY_TASK | JSON
STATUS_OBJECTS = st.fixed_dictionaries({"code": CODES}, optional={"message": MESSAGES, "error_code": CODES})
ENVELOPES = st.one_of(
    ANY_TASK,
    st.fixed_dictionaries({"status": STATUS_OBJECTS, "data": ANY_DATA}, optional={"error": MESSAGES}),
    st.fixed_dictionaries({"code": CODES, "data": ANY_DATA}, optional={"message": MESSAGES, "id": JSON}),
).map(lambda value: json.dumps(value).encode())
ANY_BODY = BODIES | ENVELOPES | ENVELOPES
STATUS = STATUSES | st.sampled_from([302, 400, 401, 402, 403, 404, 408, 422, 429, 500, 503, 504])


def may_be_clear_error(body: dict[str, Any]) -> bool:
    """Return whether an object has an error or its code, or a message without a status that says that all is well."""
    match body:
        case {"error": error} if error:
            return True
        case {"code": code} if str(code).startswith(("4", "5")):
            return True
        case {"status": str(word)} if status_of(word) is not TaskStatus.FAILED:
            return False
        case {"status": dict(status)} if status and status.get("code") not in [0, 200, "200", 201, "ok"]:
            return True
        case _:
            return any(body.get(name) for name in ("message", "error_message", "detail"))


def load(body: bytes) -> dict[str, Any]:
    """Return the JSON object in a body; an empty one if there is none."""
    try:
        value = json.loads(body)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


@settings(max_examples=500, deadline=None)
@given(body=ANY_BODY, status=STATUS, headers=RESPONSE_HEADERS)
def test_any_submit_response_is_a_task_or_an_error(body: bytes, status: int, headers: dict[str, str]) -> None:
    """Any response to a submit is the task with the id in it, a refusal with a clear error, or uncertain."""
    result = parse_or_catch(lambda: parse_submit(make_response(body, status, headers).with_secret(SECRET)))
    answered = load(body)
    parts = [part for part in (answered, answered.get("data")) if isinstance(part, dict)]
    ids = {task_id for part in parts if (task_id := task_id_of(part)) is not None}

    if isinstance(result, TaskSnapshot):
        assert result.task_id in ids
        assert SECRET not in f"{result.error!r} {result.partial_error!r}"
        check_snapshot(result)
        return
    check_error(result, status)
    is_refusal = not is_uncertain(result) and not may_submit_again(result)
    if 200 <= status < 300:
        assert not ids
        assert not is_refusal or any(map(may_be_clear_error, parts))
    elif ids:
        assert 300 <= status < 500
        assert is_refusal
        assert result.task_id in ids
    elif status >= 500 and status != 503:
        assert is_uncertain(result)
    else:
        assert not isinstance(result, ProtocolError) or b'"id"' in body


@settings(max_examples=300, deadline=None)
@given(body=ANY_BODY, status=STATUS, headers=RESPONSE_HEADERS)
def test_any_poll_response_is_a_snapshot_or_an_error(body: bytes, status: int, headers: dict[str, str]) -> None:
    """Any response to a poll is a snapshot of the task, or a ProtocolError or ResponseError."""
    result = parse_or_catch(lambda: parse_poll(make_response(body, status, headers).with_secret(SECRET), "t1"))

    if isinstance(result, TaskSnapshot):
        assert result.task_id == "t1"
        assert SECRET not in f"{result.error!r} {result.partial_error!r}"
        check_snapshot(result)
    else:
        assert isinstance(result, (ProtocolError, ResponseError))
        check_error(result, status, 404 if isinstance(result, TaskNotFoundError) else status)


def check_error(error: FluxError, *statuses: int) -> None:
    assert str(error)
    assert isinstance(error.message, str)
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
    assert SECRET not in f"{error!s} {error!r} {error.__cause__!r}"
    if isinstance(error, ResponseError):
        assert error.status in statuses
        assert isinstance(error.code, str | None)
        assert error.code != ""
        assert error.retry_after is None or 0 <= error.retry_after < math.inf
