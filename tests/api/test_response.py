"""HTTP errors: their classes, codes and messages, in every format that the API or a proxy may send."""

import json
import math
import pickle
from collections.abc import Callable
from datetime import timedelta
from email.utils import format_datetime
from typing import Any

import pytest
from hypothesis import given, settings
from support.errors import API_FORMATS, CLASSES, FOREIGN_BODIES
from support.responses import RECEIVED, make_response
from support.strategies import BODIES, RESPONSE_HEADERS, STATUSES

from flux2max_async import (
    AuthenticationError,
    BadRequestError,
    FluxError,
    InsufficientBalanceError,
    PermissionDeniedError,
    RateLimitedError,
    ResponseError,
    ServerError,
    TaskNotFoundError,
)
from flux2max_async._api.response import HttpResponse, error_from_response, extract_error, has_clear_error, unwrap

SECRET = "hush-7f3a9c"
FOREIGN = "a proxy or firewall, not the API, answered: "


# ---------------------------------------------------------------------- HTTP errors


@pytest.mark.parametrize(
    ("status", "error_class"),
    [
        *((400, BadRequestError), (422, BadRequestError), (401, AuthenticationError), (402, InsufficientBalanceError)),
        *((403, PermissionDeniedError), (404, TaskNotFoundError), (429, RateLimitedError)),
        *((500, ServerError), (501, ServerError), (502, ServerError), (503, ServerError), (504, ServerError)),
        *((520, ServerError), (599, ServerError), (100, ResponseError), (204, ResponseError), (302, ResponseError)),
        *((405, BadRequestError), (408, BadRequestError), (409, BadRequestError), (413, BadRequestError)),
        *((418, BadRequestError), (425, BadRequestError), (451, BadRequestError), (499, BadRequestError)),
    ],
    ids=lambda value: str(value) if isinstance(value, int) else "",
)
def test_error_class_for_each_http_status(status: int, error_class: type[ResponseError]) -> None:
    """The HTTP status determines the class of the error, which has the code, the request id and the wait."""
    headers = {"x-request-id": "r-1"}
    error = error_from_response(make_response({"error": {"code": "c", "message": "m"}}, status, headers))

    assert type(error) is error_class
    assert (error.status, error.code, error.request_id, error.retry_after) == (status, "c", "r-1", None)


WRONG_STATUSES = (400, 401, 402, 403, 404, 405, 408, 409, 413, 422, 429, 451)
"""All HTTP statuses under which an empty balance may be reported, and some more."""

BALANCE_ERRORS: list[object] = [
    *({"code": code, "message": "no"} for code in range(40201, 40209)),
    {"code": "40203", "message": "no"},
    {"code": "x", "message": "Insufficient balance."},
    {"code": "x", "message": "You have INSUFFICIENT CREDITS left"},
]


@pytest.mark.parametrize("error", BALANCE_ERRORS, ids=str)
@pytest.mark.parametrize("status", WRONG_STATUSES)
def test_4xx_for_an_insufficient_balance(status: int, error: object) -> None:
    """A 4xx whose code or message reports an insufficient balance is an InsufficientBalanceError."""
    result = error_from_response(make_response({"error": error}, status))

    assert type(result) is InsufficientBalanceError


@pytest.mark.parametrize("code", [*range(40201, 40209), "40203", 40203.0])
@pytest.mark.parametrize(
    "place",
    [
        lambda code: {"error": {"code": code, "message": "no"}},
        lambda code: {"error": {"code": code, "error_message": "no"}},
        lambda code: {"error": {"code": code}},
        lambda code: {"status": {"code": 402, "message": "no", "error_code": code}, "data": None},
        lambda code: {"status": {"code": 429, "error_code": code}},
        lambda code: {"status": {"code": code, "message": "no"}},
        lambda code: {"code": code, "message": "no"},
        lambda code: {"code": code},
        lambda code: {"error": "forbidden", "code": code},
        lambda code: {"error": str(int(code)), "message": "no"},
    ],
    ids=[
        *("error.code", "error.code with error_message", "error.code alone", "status.error_code"),
        *("status.error_code alone", "status.code", "code", "code alone", "code beside a text", "error"),
    ],
)
@pytest.mark.parametrize("status", [400, 404, 429])
def test_balance_code_in_any_place(status: int, place: Callable[[object], object], code: float | str) -> None:
    """Each of the documented codes counts in each place in which the API reports codes, and the error is the API's own."""
    error = error_from_response(make_response(place(code), status))

    assert type(error) is InsufficientBalanceError
    assert (error.status, error.code, error.from_api) == (status, str(int(code)), True)


@pytest.mark.parametrize(
    "words",
    [
        *("insufficient balance", "insufficient_balance", "insufficient credits", "insufficient_credits"),
        *("Insufficient credit", "exhausted balance", "User is locked. Reason: Exhausted balance."),
        *("in arrears", "Your account is in arrears!", "You exceeded your current quota, please check your plan"),
    ],
)
@pytest.mark.parametrize(
    "place",
    [
        lambda words: {"error": {"code": "x", "message": words}},
        lambda words: {"error": {"code": words}, "message": "no"},
        lambda words: {"error": words, "message": "no"},
        lambda words: {"error": "x", "message": words},
        lambda words: {"error": {"code": "x"}, "message": words},
        lambda words: {"error": words},
        lambda words: {"message": words},
        lambda words: {"detail": words},
        lambda words: {"status": {"code": 403, "message": words}},
        lambda words: {"error": {"code": "x"}, "status": {"message": words}},
    ],
)
@pytest.mark.parametrize("status", [400, 429])
def test_balance_words_in_any_place(status: int, place: Callable[[str], object], words: str) -> None:
    """The words that report an empty balance count in codes and messages alike."""
    error = error_from_response(make_response(place(words), status))

    assert type(error) is InsufficientBalanceError


@pytest.mark.parametrize("status", [500, 502, 503, 504])
@pytest.mark.parametrize("error", BALANCE_ERRORS[-3:], ids=str)
def test_5xx_is_never_an_insufficient_balance(status: int, error: object) -> None:
    """A 5xx is the service's own fault, whatever it says."""
    result = error_from_response(make_response({"error": error}, status))

    assert type(result) is ServerError


@pytest.mark.parametrize("code", [40200, 40209, "402", "x40201"])
def test_403_with_another_code_is_a_permission_error(code: object) -> None:
    """Only the documented codes make a 403 an InsufficientBalanceError."""
    result = error_from_response(make_response({"error": {"code": code, "message": "no"}}, 403))

    assert type(result) is PermissionDeniedError


QUOTED = "a sign that says INSUFFICIENT BALANCE"


@pytest.mark.parametrize(
    "message",
    [
        *(
            f"the prompt '{QUOTED}' is too short",
            f'the prompt "{QUOTED}" is too short',
            f"the prompt `{QUOTED}` is bad",
        ),
        *(
            f"the prompt \u201c{QUOTED}\u201d is bad",
            f"the prompt \u2018{QUOTED}\u2019 is bad",
            f"\xab{QUOTED}\xbb is bad",
        ),
        *(f"can't draw 'it's {QUOTED}'", f'bad: "a "{QUOTED}" b"', f'too long: "{QUOTED}', f"too long: '{QUOTED}..."),
        f"too long: '{'x' * 990} {QUOTED}'",
        [{"loc": ["body", "prompt"], "msg": "too short", "input": QUOTED}],
    ],
)
@pytest.mark.parametrize("name", ["message", "detail", "error"])
@pytest.mark.parametrize("status", [400, 422])
def test_quoted_words_are_no_insufficient_balance(status: int, name: str, message: object) -> None:
    """A prompt that an error quotes can't stop a whole batch, whatever the marks and even if the quotation is cut."""
    flat = error_from_response(make_response({name: message}, status))
    nested = error_from_response(make_response({"error": {"code": "bad_prompt", name: message}}, status))

    assert type(flat) is BadRequestError
    assert type(nested) is BadRequestError


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
        (b"quota exceeded", None, FOREIGN + "I'm a Teapot: quota exceeded"),
        (b'"quota exceeded"', None, FOREIGN + 'I\'m a Teapot: "quota exceeded"'),
        (
            b"<style>h1 {}</style><h1>Bad\n  Gateway</h1><script>x<y</script>",
            None,
            FOREIGN + "I'm a Teapot: Bad Gateway",
        ),
        (b"", None, FOREIGN + "I'm a Teapot, with an empty body"),
        (b"\xff\xfe", None, FOREIGN + "I'm a Teapot: \ufffd\ufffd"),
        ({}, None, FOREIGN + "I'm a Teapot: {}"),
        ({"error": []}, None, FOREIGN + 'I\'m a Teapot: {"error": []}'),
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


# ---------------------------------------------------------------------- formats


@pytest.mark.parametrize("status", CLASSES)
@pytest.mark.parametrize(("body", "code", "message"), API_FORMATS.values(), ids=API_FORMATS)
def test_error_in_each_format_of_the_api(body: object, code: str | None, message: str, status: int) -> None:
    """In each of the API's formats, an error has the class of its HTTP status, a code and a message."""
    error = error_from_response(make_response(body, status))

    assert type(error) is CLASSES[status]
    assert (error.status, error.code, error.message, error.from_api) == (status, code, message, True)


@pytest.mark.parametrize("status", CLASSES)
@pytest.mark.parametrize("body", FOREIGN_BODIES.values(), ids=FOREIGN_BODIES)
def test_error_in_no_format_of_the_api(body: object, status: int) -> None:
    """In any other format, an error has the class of its status too, and its message says who has answered."""
    error = error_from_response(make_response(body, status))

    assert type(error) is CLASSES[status]
    assert not error.from_api
    assert ("a proxy or firewall, not the API" in str(error)) is (status < 500)


@pytest.mark.parametrize("name", ["HTML", "text"])
def test_words_of_a_firewall_are_not_the_apis(name: str) -> None:
    """A firewall's page doesn't report an empty balance, whatever words are on it."""
    page = FOREIGN_BODIES[name]
    assert isinstance(page, bytes)
    error = error_from_response(make_response(page + b" insufficient balance", 403))

    assert type(error) is PermissionDeniedError


@pytest.mark.parametrize("status", [200, 201])
@pytest.mark.parametrize("code", CLASSES)
@pytest.mark.parametrize(
    "place",
    [
        lambda code: {"status": {"code": code, "message": "no"}, "data": None},
        lambda code: {"status": {"code": str(code), "message": "no"}},
        lambda code: {"code": code, "message": "no", "data": None},
    ],
)
def test_error_in_an_envelope_of_a_success(place: Callable[[int], object], code: int, status: int) -> None:
    """If a 2xx holds an envelope with an HTTP error status, that one determines the class."""
    error = error_from_response(make_response(place(code), status))

    assert type(error) is CLASSES[code]
    assert (error.status, error.code, error.message, error.from_api) == (status, str(code), "no", True)


@pytest.mark.parametrize("code", [200, "200", 0, "0", 201, 200.0, "ok", "OK", "Success"])
def test_envelope_of_a_success_is_removed(code: object) -> None:
    """An object in an envelope whose code is a success stands for the whole body."""
    data = {"id": "t1", "status": "in_progress"}

    assert unwrap({"status": {"code": code, "message": "ok"}, "data": data}) == data
    assert unwrap({"code": code, "message": "ok", "data": data}) == data


@pytest.mark.parametrize(
    "body",
    [
        *({"status": {"code": code}, "data": {"id": "t1"}} for code in (400, "400", 7, None, True, "", 20, 2000)),
        {"status": {"code": []}, "data": {"id": "t1"}},
        *({"status": {"code": 200}, "data": data} for data in (None, [], [{"id": "t1"}], "t1", 7)),
        *({"status": {"message": "ok"}, "data": {"id": "t1"}}, {"data": {"id": "t1"}}, {"status": {"code": 200}}),
        {"status": "completed", "code": 7, "data": {"id": "t1"}},
    ],
    ids=json.dumps,
)
def test_anything_else_is_no_envelope(body: dict[str, object]) -> None:
    """A body without the code of a success, or without an object in it, stands for itself."""
    assert unwrap(body) is body


@pytest.mark.parametrize(
    "body",
    [
        *({"error": {"code": "c", "message": "no"}}, {"error": {"code": 7}}, {"error": {"message": "created in vain"}}),
        *(
            {"error": "no"},
            {"error": "accepted"},
            {"error": True, "message": "no"},
            {"error": "c", "message": "queued"},
        ),
        *({"message": "no"}, {"detail": "no"}, {"message": "bad_prompt"}, {"code": 7, "message": "no"}),
        *({"code": 400, "message": "your task could not be created"}, {"code": 40001, "message": "not accepted"}),
        *({"status": {"code": 500, "message": "not started"}}, {"status": {"code": "c", "message": "no"}}),
        *({"status": {"message": "no"}}, {"status": {"code": 7}}, {"status": "failed", "message": "no"}),
        {"success": False, "message": "no"},
        {"status": {"code": 200, "message": "ok"}, "data": {"error": {"code": "c", "message": "accepted, but failed"}}},
        {"status": {"code": 200, "message": "ok"}, "data": {"code": 40001, "message": "no"}},
    ],
    ids=json.dumps,
)
def test_clear_error_in_a_success(body: dict[str, object]) -> None:
    """An error object, the code of an error, and a message that is about no success are clear errors."""
    assert has_clear_error(body)


@pytest.mark.parametrize(
    "body",
    [
        *(
            {},
            {"status": "in_progress"},
            {"error": {}},
            {"error": {"code": 0, "message": ""}},
            {"error": {"code": 200}},
        ),
        *({"error": ""}, {"error": None}, {"error": []}, {"error": True}, {"code": 40001}, {"data": None}),
        *(
            {"message": word}
            for word in ("ok", "OK", "Success", "successfully submitted", "Task created", "request accepted")
        ),
        *(
            {"message": word}
            for word in ("queued", "Enqueued", "in progress", "IN_PROGRESS", "processing", "generating")
        ),
        *({"message": word} for word in ("running", "done", "ready", "completed", "scheduled", "task_received")),
        *({"code": code, "message": "no"} for code in (0, "0", 200, "200", 201, "ok", "SUCCESS")),
        *(
            {"code": 1, "message": "success"},
            {"code": "task_created", "message": "no"},
            {"success": True, "message": "no"},
        ),
        *({"status": word, "message": "hold on"} for word in ("in_progress", "queued", "completed", "unknown word")),
        *({"status": {"code": "QUEUED"}}, {"status": {"state": "new"}}, {"status": {"code": 0, "message": "no"}}),
        {"status": {"code": 200, "message": "ok"}, "data": None},
        {"status": {"code": 200, "message": "ok"}, "data": {}},
        {"status": {"code": 200, "message": "ok"}, "data": {"message": "hold on"}},
        {"code": 200, "message": "no", "data": {"message": "hold on"}},
        {"message": "Your request will be processed shortly"},
        {"message": "Task has been added"},
        {"message": "Dispatched", "data": [{"id": "t1"}]},
        {"message": "no", "task_id": "t1"},
        {"code": 10000, "message": "\u64cd\u4f5c\u6210\u529f"},  # "success"
    ],
    ids=json.dumps,
)
def test_no_clear_error_in_a_success(body: dict[str, object]) -> None:
    """Whatever else a success says, a task may exist."""
    assert not has_clear_error(body)


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


@settings(max_examples=150, deadline=None)
@given(body=BODIES, status=STATUSES, headers=RESPONSE_HEADERS)
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
