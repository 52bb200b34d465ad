"""What a reply says, whatever its shape: its JSON, the error in it, and how long the service asks to wait.

Sources are named as in `_wire`.
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


@attrs.frozen
class HttpResponse:
    """One HTTP answer, read whole."""

    status: int
    headers: Mapping[str, str] = attrs.field(repr=False)
    """Looked up without regard to case."""
    body: bytes = attrs.field(repr=False)
    received: datetime
    """When it came, by this machine's clock; timezone-aware."""

    secrets: tuple[str, ...] = attrs.field(default=(), repr=False)
    """What the service may have echoed, and no error may repeat."""

    def without(self, secret: str | None) -> "HttpResponse":
        """Keep a secret out of whatever error this reply may become."""
        return attrs.evolve(self, secrets=(*self.secrets, secret)) if secret else self

    def masked(self, text: str) -> str:
        """Give a text of this reply without the secrets."""
        return masked(text, self.secrets)


def masked(text: str, secrets: tuple[str, ...]) -> str:
    """Give a text without the secrets, however they are escaped in it."""
    for secret in secrets:
        for form in (secret, json.dumps(secret)[1:-1], secret.encode("unicode_escape").decode()):
            text = text.replace(form, "***")
    return text


def response_error(reply: HttpResponse) -> ResponseError:
    """Make the error that a reply amounts to."""
    try:
        body = parse_json_object(reply)
    except ProtocolError:
        body = {}
    code, message = problem(body) or (None, _text(reply))
    headers = reply.headers
    request_id = headers.get("X-Request-Id")
    if 300 <= reply.status < 400:
        message = f"the gateway redirects to {headers.get('Location', 'nowhere')}: set base_url to where it really is"
    kind = _error_class(reply.status, code, message)
    return kind(
        reply.masked(message),
        reply.status,
        code and reply.masked(code),
        request_id and reply.masked(request_id),
        _retry_after(reply, body),
    )


def _error_class(status: int, code: str | None, message: str) -> type[ResponseError]:
    # [C] Body codes 40201 to 40208 and these words mean an empty balance, be the status 402, 403 or even 200.
    broke = (code or "") in _BALANCE_CODES or re.search(r"insufficient (balance|credits)", message, re.IGNORECASE)
    match status:
        case 402:
            return InsufficientBalanceError
        case _ if broke and (status == 403 or status < 300):
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


_BALANCE_CODES = {str(code) for code in range(40201, 40209)}


_LONGEST = 1000
"""Characters of a message; a service that says more has lost its way."""


def problem(body: Mapping[str, Any]) -> tuple[str | None, str] | None:
    """Find the code and message of an error, in any of the shapes seen; None where there is no error."""
    for nested in (body.get("error"), body.get("status")):
        if isinstance(nested, dict) and nested:
            return _code(nested.get("code")), (_message(nested) or _dumped(nested))[:_LONGEST]
    error, message = body.get("error"), _message(body)
    if isinstance(error, str) and error:
        return (error, message) if message else (_code(body.get("code")), error)
    return (_code(body.get("code")), message) if message else None


def _message(body: Mapping[str, Any]) -> str | None:
    for name in ("message", "error_message", "detail"):  # [S], [C], [B]
        if said := body.get(name):
            return said if isinstance(said, str) else _dumped(said)
    return None


def _dumped(value: object) -> str:
    try:
        return json.dumps(value)
    except RecursionError:
        return "(nested too deeply)"


def _code(value: object) -> str | None:
    return str(value) if isinstance(value, (str, int, float)) and not isinstance(value, bool) and value != "" else None


def parse_json_object(reply: HttpResponse) -> dict[str, Any]:
    """Read the body as what the protocol says it is.

    Raises:
        ProtocolError: It is something else.
    """
    body: object = None
    with contextlib.suppress(ValueError, RecursionError):
        body = json.loads(reply.body)
    if not isinstance(body, dict):
        raise ProtocolError(f"expected a JSON object, got HTTP {reply.status} {_text(reply)}")
    return body


def _text(reply: HttpResponse) -> str:
    """Describe a body that is no JSON object: a proxy's HTML page, plain text, or nothing at all."""
    try:
        phrase = http.HTTPStatus(reply.status).phrase
    except ValueError:
        phrase = "unknown status"
    page = reply.masked(reply.body[:4000].decode(errors="replace"))
    text = " ".join(re.sub(r"(?s)<(script|style).*?</\1>|<[^>]*>", " ", page).split())
    return f"{phrase}: {text[:200]}" if text else f"{phrase}, with an empty body"


def _retry_after(reply: HttpResponse, body: Mapping[str, Any]) -> float | None:
    """Read how long the service asks to wait: seconds or an HTTP date in the header [D], or seconds in the body [B]."""
    error = body.get("error")
    for value in (
        reply.headers.get("Retry-After"),
        body.get("retry_after"),
        error.get("retry_after") if isinstance(error, dict) else None,
    ):
        seconds = finite(value)
        if seconds is None and isinstance(value, str):
            seconds = _seconds_until(value, reply)
        if seconds is not None:
            return max(0.0, seconds)
    return None


def _seconds_until(date: str, reply: HttpResponse) -> float | None:
    moment = _http_date(date)
    # Against the gateway's own clock where it tells, so that this machine's may be wrong.
    now = _http_date(reply.headers.get("Date", "")) or reply.received
    return (moment - now).total_seconds() if moment else None


def _http_date(text: str) -> datetime | None:
    try:
        moment = parsedate_to_datetime(text)
        return moment.replace(tzinfo=moment.tzinfo or UTC).astimezone(UTC)
    except (ValueError, OverflowError):
        return None


def finite(value: object) -> float | None:
    """Read a number, or a text that is one; None for anything else, infinities included."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None
