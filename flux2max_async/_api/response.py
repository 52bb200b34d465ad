"""HTTP responses: their JSON, and the errors that they contain.

The letters in brackets name the sources of facts, as in `codec`.
"""

import contextlib
import http
import json
import math
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import attrs

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

_BALANCE_CODES = {str(code) for code in range(40201, 40209)}
_MAX_MESSAGE_LENGTH = 1000
_MAX_HTML_BYTES = 4000
"""How much of a body that is not JSON is searched for text."""
_MAX_TEXT_LENGTH = 200
"""How much of that text is shown."""


@attrs.frozen
class HttpResponse:
    """A complete HTTP response."""

    status: int
    headers: Mapping[str, str] = attrs.field(repr=False)
    """A case-insensitive mapping."""
    body: bytes = attrs.field(repr=False)
    received: datetime
    """When it was received, by this machine's clock; timezone-aware."""
    secrets: tuple[str, ...] = attrs.field(default=(), repr=False)
    """Texts that the service may have echoed, and that no error may show."""

    def with_secret(self, secret: str | None) -> "HttpResponse":
        """Return the response with one more secret to redact in its errors; None adds nothing."""
        return attrs.evolve(self, secrets=(*self.secrets, secret)) if secret else self

    def redact(self, text: str) -> str:
        """Return a text with the secrets replaced by asterisks."""
        return redact(text, self.secrets)


def redact(text: str, secrets: tuple[str, ...]) -> str:
    """Return a text with the secrets replaced by asterisks, whether they are escaped in it or not."""
    for secret in secrets:
        for form in (secret, json.dumps(secret)[1:-1], secret.encode("unicode_escape").decode()):
            text = text.replace(form, "***")
    return text


def error_from_response(response: HttpResponse) -> ResponseError:
    """Return the error that a response reports."""
    try:
        body = parse_json_object(response)
    except ProtocolError:
        body = {}
    code, message = extract_error(body) or (None, _describe_body(response))
    headers = response.headers
    request_id = headers.get("X-Request-Id")
    if 300 <= response.status < 400:
        location = headers.get("Location", "an unknown location")
        message = f"the API redirects to {location}: set base_url to its final location"
    error_class = _error_class(response.status, code, message)
    return error_class(
        response.redact(message),
        status=response.status,
        code=code and response.redact(code),
        request_id=request_id and response.redact(request_id),
        retry_after=_parse_retry_after(response, body),
    )


def _error_class(status: int, code: str | None, message: str) -> type[ResponseError]:
    # [C] Codes 40201 to 40208 and these words mean an insufficient balance, with status 402, 403 or even 200.
    is_balance_error = (code or "") in _BALANCE_CODES or re.search(
        r"insufficient (balance|credits)", message, re.IGNORECASE
    )
    match status:
        case 402:
            return InsufficientBalanceError
        case _ if is_balance_error and (status == 403 or status < 300):
            return InsufficientBalanceError
        case 400 | 422:
            return BadRequestError
        case 401:
            return AuthenticationError
        case 403:
            return PermissionDeniedError
        case 404:
            return TaskNotFoundError
        case 429:
            return RateLimitedError
        case _ if status >= 500:
            return ServerError
        case _:
            return ResponseError


def extract_error(body: Mapping[str, Any]) -> tuple[str | None, str] | None:
    """Return the code and the message of the error in a body, in any known format; None if there is no error."""
    for nested in (body.get("error"), body.get("status")):
        if isinstance(nested, dict) and nested:
            return _code(nested.get("code")), (_message(nested) or _dump_json(nested))[:_MAX_MESSAGE_LENGTH]
    error, message = body.get("error"), _message(body)
    if isinstance(error, str) and error:
        return (error, message) if message else (_code(body.get("code")), error)
    return (_code(body.get("code")), message) if message else None


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
    return str(value) if isinstance(value, (str, int, float)) and not isinstance(value, bool) and value != "" else None


def parse_json_object(response: HttpResponse) -> dict[str, Any]:
    """Parse the body of a response.

    Raises:
        ProtocolError: It is not a JSON object.
    """
    body: object = None
    with contextlib.suppress(ValueError, RecursionError):
        body = json.loads(response.body)
    if not isinstance(body, dict):
        raise ProtocolError(f"expected a JSON object, got HTTP {response.status} {_describe_body(response)}")
    return body


def _describe_body(response: HttpResponse) -> str:
    """Return the reason phrase and the beginning of a body that may be a proxy's HTML page, plain text, or empty."""
    try:
        phrase = http.HTTPStatus(response.status).phrase
    except ValueError:
        phrase = "unknown status"
    html = response.redact(response.body[:_MAX_HTML_BYTES].decode(errors="replace"))
    text = " ".join(re.sub(r"(?s)<(script|style).*?</\1>|<[^>]*>", " ", html).split())
    return f"{phrase}: {text[:_MAX_TEXT_LENGTH]}" if text else f"{phrase}, with an empty body"


def _parse_retry_after(response: HttpResponse, body: Mapping[str, Any]) -> float | None:
    """Return the requested wait in seconds: seconds or an HTTP date in the header [D], or seconds in the body [B]."""
    error = body.get("error")
    for value in (
        response.headers.get("Retry-After"),
        body.get("retry_after"),
        error.get("retry_after") if isinstance(error, dict) else None,
    ):
        seconds = parse_finite(value)
        if seconds is None and isinstance(value, str):
            seconds = _seconds_until(value, response)
        if seconds is not None:
            return max(0.0, seconds)
    return None


def _seconds_until(http_date: str, response: HttpResponse) -> float | None:
    then = _parse_http_date(http_date)
    # Prefer the server's clock, because this machine's may be wrong.
    now = _parse_http_date(response.headers.get("Date", "")) or response.received
    return (then - now).total_seconds() if then else None


def _parse_http_date(text: str) -> datetime | None:
    try:
        parsed = parsedate_to_datetime(text)
        return parsed.replace(tzinfo=parsed.tzinfo or UTC).astimezone(UTC)
    except (ValueError, OverflowError):
        return None


def parse_finite(value: object) -> float | None:
    """Return a number, or a text that represents one, as a float; None for anything else, infinities included."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None
