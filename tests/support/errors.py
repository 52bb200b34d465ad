"""Bodies of HTTP errors: in every format of the API, and in formats that only others use."""

from flux2max_async import (
    AuthenticationError,
    BadRequestError,
    InsufficientBalanceError,
    PermissionDeniedError,
    RateLimitedError,
    ResponseError,
    ServerError,
    TaskNotFoundError,
)

CLASSES: dict[int, type[ResponseError]] = {
    **dict.fromkeys((400, 405, 408, 409, 413, 422, 451), BadRequestError),
    401: AuthenticationError,
    402: InsufficientBalanceError,
    403: PermissionDeniedError,
    404: TaskNotFoundError,
    429: RateLimitedError,
    **dict.fromkeys((500, 502, 503, 504), ServerError),
}
"""The class of the error for each HTTP status."""

API_FORMATS: dict[str, tuple[object, str | None, str]] = {
    "code and message": ({"error": {"code": "c", "message": "m"}}, "c", "m"),
    "number and error_message": ({"error": {"code": 7, "error_message": "m"}}, "7", "m"),
    "code alone": ({"error": {"code": "c"}}, "c", '{"code": "c"}'),
    "code, and a message beside it": ({"error": {"code": "c"}, "message": "m"}, "c", "m"),
    "two texts": ({"error": "c", "message": "m"}, "c", "m"),
    "one text": ({"error": "m"}, None, "m"),
    "a flag and a message": ({"error": True, "message": "m"}, None, "m"),
    "message": ({"message": "m"}, None, "m"),
    "message beside a number": ({"status": 403, "message": "m"}, None, "m"),
    "Forbidden": ({"message": "Forbidden"}, None, "Forbidden"),
    "flat code": ({"code": "c", "message": "m"}, "c", "m"),
    "envelope": ({"status": {"code": 7, "message": "m"}, "data": None}, "7", "m"),
    "envelope with error_code": ({"status": {"code": 7, "message": "m", "error_code": 8}, "data": None}, "8", "m"),
    "detail": ({"detail": "m"}, None, "m"),
    "details": ({"detail": [{"loc": ["body"], "msg": "m"}]}, None, '[{"loc": ["body"], "msg": "m"}]'),
    "error in an envelope": ({"status": {"code": 200}, "data": {"error": {"code": "c", "message": "m"}}}, "c", "m"),
}

FOREIGN_BODIES: dict[str, object] = {
    "HTML": b"<html><h1>403 Forbidden</h1></html>",
    "HTML that looks like JSON": b'<script>{"message": "Forbidden"}</script>',
    "text": b"Access denied. Reference: 18.3a9c7e1b",
    "nothing": b"",
    "truncated JSON": b'{"error": {"code": "c", "mess',
    "JSON text": b'"Forbidden"',
    "JSON list": [{"message": "Forbidden"}],
    "JSON null": b"null",
    "empty object": {},
    "object of the firewall's own": {"blocked": True, "ray": "8f3a9c7e1b2d4f60"},
    "code alone": {"code": 403},
    "status as a number": {"status": 403, "title": "Forbidden"},
    "status as a text": {"status": "error"},
    "status without code and message": {"status": {"state": "blocked"}},
    "empty error": {"error": {}},
    "error with empty fields": {"error": {"code": "", "message": ""}},
    "error with unknown fields": {"error": {"reason": "blocked"}},
    "error as a flag": {"error": True},
    "error as a list": {"error": ["blocked"]},
    "empty texts": {"error": "", "message": "", "detail": []},
    "several errors": {"errors": [{"message": "blocked"}]},
}
