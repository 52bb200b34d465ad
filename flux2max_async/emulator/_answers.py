"""The responses that faults cause: a table of their HTTP statuses, bodies and headers.

Texts in braces are placeholders, which `fill()` replaces. The letters name the sources of the shapes: [C] the vendor's
clients, [D] the vendor's other pages, [B] the documentation of the model's maker.
"""

from collections.abc import Mapping
from typing import Any

import attrs

from flux2max_async.emulator._faults import Fault

ABSENT = object()
"""The value of a field that `fill()` leaves out."""


@attrs.frozen
class Answer:
    """A response in place of the usual one."""

    status: int
    body: Any
    """A template of JSON, or text, or an HTML page."""
    headers: Mapping[str, str] = attrs.field(factory=dict[str, str])
    """Templates."""
    wait: float = 1.0
    """What `{wait}` and `{date}` stand for, in seconds of the service."""


def fill(template: Any, values: Mapping[str, Any]) -> Any:
    """Return a template with the placeholders replaced; a text that is only a placeholder becomes the value itself."""
    match template:
        case dict():
            return {name: fill(value, values) for name, value in template.items() if value is not ABSENT}
        case list():
            return [fill(item, values) for item in template]
        case str() if template[1:-1] in values and template == f"{{{template[1:-1]}}}":
            return values[template[1:-1]]
        case str():
            return template.format_map(values)
        case _:
            return template


def error(code: object, message: str) -> dict[str, Any]:
    """Return the usual body of an error."""
    return {"error": {"code": code, "message": message}}


def _status(code: int, message: str, **extra: object) -> dict[str, Any]:
    return {"status": {"code": code, "message": message, **extra}}


def _page(title: str, text: str) -> str:
    return f"<html><head><title>{title}</title></head><body><h1>{title}</h1><p>{text}</p></body></html>"


_WAIT = {"Retry-After": "{wait:g}"}
_LIMITS = {"X-RateLimit-Limit": "24", "X-RateLimit-Remaining": "0", "X-RateLimit-Reset": "{wait:g}"}
_BLOCKED = _page("Attention Required!", "You have been blocked. Ray ID: 8f3a9c7e1b2d4f60")
_INVALID = "width must be an integer of at least 64"
_UNPAID = "this account can not be charged"  # without any of the words that mean an empty balance

ERRORS: dict[Fault, Answer] = {
    Fault.RATE_LIMITED: Answer(429, error("rate_limit_exceeded", "too many requests"), _WAIT),
    Fault.RATE_LIMITED_DATE: Answer(
        429, error("rate_limit_exceeded", "too many requests"), {"Retry-After": "{date}"}, wait=2.0
    ),
    Fault.RATE_LIMITED_BODY: Answer(429, {"message": "too many requests", "retry_after": "{wait}"}, _LIMITS),
    Fault.SERVER_ERROR: Answer(500, error("internal_error", "something broke")),
    Fault.BAD_GATEWAY: Answer(502, _page("502 Bad Gateway", "nginx")),
    Fault.UNAVAILABLE: Answer(503, error("unavailable", "try again later")),
    Fault.RETRY_LATER: Answer(503, error("overloaded", "try again later"), _WAIT, wait=2.0),
    Fault.GATEWAY_TIMEOUT: Answer(504, error("gateway_timeout", "the model did not answer in time")),
    Fault.BAD_REQUEST: Answer(400, error("invalid_parameter", _INVALID)),
    Fault.UNPROCESSABLE: Answer(422, error("invalid_parameter", _INVALID)),
    Fault.UNAUTHORIZED: Answer(401, error("unauthorized", "the API key is missing or wrong")),
    Fault.PAYMENT_REQUIRED: Answer(402, error("40201", "insufficient balance")),
    Fault.FORBIDDEN: Answer(403, error("permission_denied", "this key may not use the model")),
    Fault.NOT_FOUND: Answer(404, error("task_not_found", "no such task")),
    Fault.METHOD_NOT_ALLOWED: Answer(405, {"detail": "Method Not Allowed"}),
    Fault.REQUEST_TIMEOUT: Answer(408, error("request_timeout", "the request did not arrive in time")),
    Fault.STATUS_TASK_NOT_FOUND: Answer(200, {"id": None, "status": "Task not found", "result": None}),  # [B]
    # By the shape of the body
    Fault.ERROR_CODE_MESSAGE: Answer(400, error("invalid_parameter", _INVALID)),
    Fault.ERROR_ERROR_MESSAGE: Answer(400, {"error": {"code": 40001, "error_message": _INVALID}}),  # [C]
    Fault.ERROR_TEXT_AND_MESSAGE: Answer(400, {"error": "invalid_parameter", "message": _INVALID}),
    Fault.ERROR_MESSAGE: Answer(403, {"message": "Forbidden"}),
    Fault.ERROR_STATUS: Answer(400, _status(400, _INVALID)),  # [C]
    Fault.ERROR_DETAIL: Answer(400, {"detail": _INVALID}),  # [B]
    Fault.ERROR_DETAIL_LIST: Answer(422, {"detail": [{"loc": ["body", "width"], "msg": _INVALID}]}),  # [B]
    Fault.ERROR_EMPTY: Answer(400, ""),
    Fault.ERROR_200: Answer(200, {"error": {"code": 40001, "error_message": _INVALID}}),  # [C]
    Fault.ERROR_200_ENVELOPE: Answer(200, _status(500, "something broke") | {"data": None}),  # [C]
    # An empty balance, by code and by words
    Fault.BALANCE_40201: Answer(402, error(40201, _UNPAID)),
    Fault.BALANCE_40202: Answer(402, _status(402, _UNPAID, error_code=40202) | {"data": None}),  # [C]
    Fault.BALANCE_40203: Answer(429, _status(429, _UNPAID, error_code=40203) | {"data": None}),
    Fault.BALANCE_40204: Answer(403, error("40204", _UNPAID)),
    Fault.BALANCE_40205: Answer(400, {"code": 40205, "message": _UNPAID}),
    Fault.BALANCE_40206: Answer(403, _status(403, _UNPAID, error_code=40206) | {"data": None}),
    Fault.BALANCE_40207: Answer(400, {"error": {"code": 40207, "error_message": _UNPAID}}),
    Fault.BALANCE_40208: Answer(429, {"code": 40208, "message": _UNPAID}),
    Fault.INSUFFICIENT_BALANCE: Answer(403, error("insufficient_balance", "top up your account")),
    Fault.INSUFFICIENT_CREDITS: Answer(400, {"error": "insufficient_credits", "message": "Insufficient credits."}),
    Fault.EXHAUSTED_BALANCE: Answer(403, {"detail": "User is locked. Reason: Exhausted balance."}),
    Fault.IN_ARREARS: Answer(400, _status(400, "Your account is in arrears")),
    Fault.QUOTA_EXCEEDED: Answer(429, error("quota", "You exceeded your current quota, please check your plan")),
    # Moderation
    Fault.MODERATION_BLOCKED: Answer(400, error("moderation_blocked", "the request was blocked")),
    Fault.CONTENT_POLICY_VIOLATION: Answer(403, error("content_policy_violation", "the request was refused")),
    Fault.CONTENT_FILTER: Answer(422, {"error": "content_filter", "message": "the request was refused"}),
    Fault.SAFETY_VIOLATION: Answer(400, error("safety_violation", "the request was refused")),
    Fault.FLAGGED_AS_SENSITIVE: Answer(400, error("invalid_request", "The input was flagged as sensitive")),
    Fault.MODERATION_TIMEOUT: Answer(503, error("timeout", "Moderation service timed out, try again")),
    # Firewalls
    Fault.FIREWALL: Answer(403, _BLOCKED),
    Fault.FIREWALL_400: Answer(400, _BLOCKED),
    Fault.FIREWALL_401: Answer(401, _BLOCKED),
    Fault.FIREWALL_402: Answer(402, _BLOCKED),
    Fault.FIREWALL_TEXT: Answer(403, "Access denied. Reference: 18.3a9c7e1b"),
    Fault.FIREWALL_EMPTY: Answer(403, ""),
    Fault.FIREWALL_JSON: Answer(403, {"blocked": True, "ray": "8f3a9c7e1b2d4f60"}),
}
"""The responses to calls that do not take effect."""

RESPONSES: dict[Fault, Answer] = {
    Fault.ENVELOPE: Answer(200, _status(200, "ok") | {"data": "{task}"}),  # [C]
    Fault.ENVELOPE_ZERO: Answer(200, _status(0, "success") | {"data": "{task}"}),  # [C]
    Fault.SYNC_TIMEOUT: Answer(
        504, {"id": "{id}", "status": "in_progress"} | error("SYNC_TIMEOUT", "the task is still running")
    ),  # [C]
    Fault.NO_ID: Answer(200, _status(200, "ok") | {"data": {}}),
}
"""The responses to submits and polls that take effect."""

GARBAGE = Answer(200, _page("Welcome to nginx!", "If you see this page, the web server is working."))

LATE: dict[Fault, Answer] = {
    Fault.LATE_404: Answer(404, "<Error><Code>NoSuchKey</Code></Error>"),
    Fault.LATE_403: Answer(403, "<Error><Code>AccessDenied</Code></Error>"),
    Fault.LATE_202: Answer(202, "processing"),
    Fault.LATE_425: Answer(425, "too early"),
    Fault.LATE_429: Answer(429, "too many requests", _WAIT),
    Fault.LATE_503: Answer(503, "<Error><Code>SlowDown</Code></Error>", _WAIT),
}
"""The responses to downloads in the first two seconds after the end of a task."""
