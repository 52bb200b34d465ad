"""HTTP responses: their JSON, and the errors that they contain.

The letters in brackets name the sources of facts, as in `codec`.
"""

import http
import json
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import attrs

from flux2max_async._api.classification import BALANCE_CODES, is_balance_error
from flux2max_async._api.statuses import status_of
from flux2max_async._api.values import load_object, parse_finite
from flux2max_async._exceptions import (
    AuthenticationError,
    BadRequestError,
    InsufficientBalanceError,
    PermissionDeniedError,
    ProtocolError,
    RateLimitedError,
    ResponseError,
    ServerError,
    TaskNotFoundError,
)
from flux2max_async._models.results import TaskStatus
from flux2max_async._text import redact

_MAX_MESSAGE_LENGTH = 1000
# [C], [D] Some gateways put such a message beside the data of a success.
_SUCCESS_WORDS = re.compile(
    r"\b(ok|okay|success\w*|accept\w*|creat\w*|(en)?queu\w*|submi\w*|receiv\w*|start\w*|pending|process\w*|progress|add(ed)?"
    r"|dispatch\w*|schedul\w*|generat\w*|wait\w*|running|done|ready|complet\w*|thank\w*|will be|shortly|task)\b",
    re.IGNORECASE,
)
_MAX_HTML_BYTES = 4000
"""How much of a body that is not JSON is searched for text."""
_MAX_TEXT_LENGTH = 200
"""How much of that text is shown; of a code or a header, too."""


@attrs.frozen
class HttpResponse:
    """A complete HTTP response."""

    status: int
    headers: Mapping[str, str] = attrs.field(repr=False)
    """A case-insensitive mapping."""
    body: bytes = attrs.field(repr=False)
    received: datetime
    """When it was received, by this machine's clock; timezone-aware."""
    secrets: Sequence[str] = attrs.field(default=(), repr=False)
    """Texts that the service may have echoed, and that no error may show."""

    def with_secret(self, secret: str | None) -> "HttpResponse":
        """Return the response with one more secret to redact in its errors; None adds nothing."""
        return attrs.evolve(self, secrets=(*self.secrets, secret)) if secret else self

    def redact(self, text: str) -> str:
        """Return a text with the secrets replaced by asterisks."""
        return redact(text, self.secrets)


def error_from_response(response: HttpResponse) -> ResponseError:
    """Return the error that a response reports."""
    body = unwrap(load_object(response.body))
    code, message = extract_error(body) or (next(iter(_all_codes(body)), None), _describe_body(response))
    from_api = _has_api_format(body)
    if not from_api and 400 <= response.status < 500:
        message = f"a proxy or firewall, not the API, answered: {message}"
    headers = response.headers
    request_id = headers.get("X-Request-Id")
    if 300 <= response.status < 400:
        location = headers.get("Location", "an unknown location")[:_MAX_MESSAGE_LENGTH]
        message = f"the API redirects to {location}: set base_url to its final location"
    error_class = _error_class(_effective_status(response.status, body), body, message if from_api else "")
    return error_class(
        response.redact(message),
        status=response.status,
        code=code and response.redact(code),
        request_id=request_id and response.redact(request_id[:_MAX_TEXT_LENGTH]),
        retry_after=parse_retry_after(response.headers, response.received, body),
        from_api=from_api,
    )


def _effective_status(status: int, body: Mapping[str, Any]) -> int:
    """Return the HTTP status; for a success, the one in the envelope of the body [C]."""
    match body:
        case {"status": {"code": code}} | {"code": code} if 200 <= status < 300:
            return int(text) if (text := _code(code)) and re.fullmatch(r"[45]\d\d", text) else status
        case _:
            return status


def _error_class(status: int, body: Mapping[str, Any], message: str) -> type[ResponseError]:
    if (status < 300 or 400 <= status < 500) and is_balance_error(_all_codes(body), message):
        return InsufficientBalanceError
    match status:
        case 401:
            return AuthenticationError
        case 402:
            return InsufficientBalanceError
        case 403:
            return PermissionDeniedError
        case 404:
            return TaskNotFoundError
        case 429:
            return RateLimitedError
        case _ if 400 <= status < 500:
            return BadRequestError
        case _ if status >= 500:
            return ServerError
        case _:
            return ResponseError


def unwrap(body: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the object in an envelope [C]; the body itself if it is not one of a success."""
    match body:
        case {"status": {"code": code}, "data": dict(data)} | {"code": code, "data": dict(data)}:
            return data if is_success_code(code) else body
        case _:
            return body


def is_success_code(code: object) -> bool:
    """Return whether the code in an envelope [C] means that all went well: 0, 200 or another 2xx, or a word for it."""
    return re.fullmatch(r"0|2\d\d|ok|success", _code(code) or "", re.IGNORECASE) is not None


def extract_error(body: Mapping[str, Any]) -> tuple[str | None, str] | None:
    """Return the code and the message of the error in a body, in any known format; None if there is no error."""
    body = unwrap(body)
    error, message = body.get("error"), _message(body)
    code = _code(body.get("code"))
    if nested := _nested_errors(body):
        code = next(iter(_all_codes(body)), None)
        message = next(filter(None, map(_message, nested)), None) or message or _dump_json(nested[0])
    elif isinstance(error, str) and error:
        code, message = (error, message) if message else (code, error)
    return (code, message[:_MAX_MESSAGE_LENGTH]) if message else None


def has_clear_error(body: Mapping[str, Any]) -> bool:
    """Return whether the body of a success reports an error, and not merely a message about the success.

    If that is not clear, a task may exist.
    """
    task = unwrap(body)
    error = extract_error(task)
    if error is None or is_success_code(error[0]):
        return False
    code, message = error
    if task.get("error"):
        return True
    if code is not None and re.fullmatch(r"[45]\d{2,4}", code):  # an HTTP status, or one with more digits, as 40201
        return True
    status = task.get("status")
    if task is not body:
        return False
    if isinstance(status, str):
        return status_of(status) is TaskStatus.FAILED
    if task.get("success") is True or task.get("data") or task.get("task_id") or not message.isascii():
        return False
    return _SUCCESS_WORDS.search(f"{code} {message}".replace("_", " ")) is None


def is_gateway_timeout(body: Mapping[str, Any]) -> bool:
    """Return whether the code of an error says that the gateway has given up waiting, like a 408 or 504 [C]."""
    code, _ = extract_error(body) or (None, "")
    return re.fullmatch(r"408|504|.*time_?d?_?out", code or "", re.IGNORECASE) is not None


def _has_api_format(body: Mapping[str, Any]) -> bool:
    """Return whether a body has one of the formats in which the API reports errors."""
    if nested := _nested_errors(body):
        return any(_message(error) or _codes_of(error) for error in nested)
    return extract_error(body) is not None or not BALANCE_CODES.isdisjoint(_all_codes(body))


def _nested_errors(body: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the objects `error` and `status` of a body that report an error; one with empty fields reports none."""
    error, status = body.get("error"), body.get("status")
    nested = [error] if isinstance(error, dict) and any(error.values()) else []
    if isinstance(status, dict) and not is_success_code(status.get("code")):
        nested += [status] if _message(status) or _codes_of(status) else []
    return nested


def _all_codes(body: Mapping[str, Any]) -> list[str]:
    """Return the codes in the body of an error, the most specific one first."""
    codes = [code for nested in _nested_errors(body) for code in _codes_of(nested)]
    error = _code(body.get("error"))
    return [*codes, *filter(None, [error]), *_codes_of(body)]


def _codes_of(error: Mapping[str, Any]) -> list[str]:
    return [code for name in ("error_code", "code") if (code := _code(error.get(name))) is not None]


def _message(body: Mapping[str, Any]) -> str | None:
    for name in ("message", "error_message", "detail"):  # [S], [C], [B]
        if message := body.get(name):
            return message if isinstance(message, str) else _dump_json(message)
    return None


def _dump_json(value: object) -> str:
    try:
        return json.dumps(value)
    except RecursionError:
        return "(nested too deeply)"


def _code(value: object) -> str | None:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    is_code = isinstance(value, (str, int, float)) and not isinstance(value, bool) and value != ""
    return str(value)[:_MAX_TEXT_LENGTH] if is_code else None


def unreadable_body_error(response: HttpResponse) -> ProtocolError:
    """Return the error of a response whose body is not a JSON object."""
    return ProtocolError(f"expected a JSON object, got HTTP {response.status} {_describe_body(response)}")


def _describe_body(response: HttpResponse) -> str:
    """Return the reason phrase and the beginning of a body that may be a proxy's HTML page, plain text, or empty."""
    try:
        phrase = http.HTTPStatus(response.status).phrase
    except ValueError:
        phrase = "unknown status"
    html = response.redact(response.body[:_MAX_HTML_BYTES].decode(errors="replace"))
    text = " ".join(re.sub(r"(?s)<(script|style).*?</\1>|<[^>]*>", " ", html).split())
    return f"{phrase}: {text[:_MAX_TEXT_LENGTH]}" if text else f"{phrase}, with an empty body"


def parse_retry_after(
    headers: Mapping[str, str], received: datetime, body: Mapping[str, Any] | None = None
) -> float | None:
    """Return the requested wait in seconds: seconds or an HTTP date in the header [D], or seconds in the body [B].

    Args:
        headers: A case-insensitive mapping.
        received: When the response was received, by this machine's clock.
        body: The JSON object in the response, if there is one.
    """
    error = body and body.get("error")
    for value in (
        headers.get("Retry-After"),
        body and body.get("retry_after"),
        error.get("retry_after") if isinstance(error, dict) else None,
    ):
        seconds = parse_finite(value)
        if seconds is None and isinstance(value, str) and (then := _parse_http_date(value)):
            # Prefer the server's clock, because this machine's may be wrong.
            seconds = (then - (_parse_http_date(headers.get("Date", "")) or received)).total_seconds()
        if seconds is not None:
            return max(0.0, seconds)
    return None


def _parse_http_date(text: str) -> datetime | None:
    try:
        parsed = parsedate_to_datetime(text)
        return parsed.replace(tzinfo=parsed.tzinfo or UTC).astimezone(UTC)
    except (ValueError, OverflowError):
        return None
