"""Headers as servers and frameworks of several kinds pass them on."""

from collections.abc import Iterable, Mapping
from typing import Any

from flux2max_async._exceptions import InvalidRequestError

HeadersLike = Mapping[str, Any] | Mapping[bytes, bytes] | Iterable[tuple[str | bytes, str | bytes]]
"""A mapping, one with several values for a name, WSGI's environ, or pairs of names and values, as in ASGI."""

_WITHOUT_PREFIX = frozenset(("content_length", "content_type"))
"""The headers whose names in WSGI's environ don't begin with HTTP_."""


def header_values(headers: HeadersLike, name: str) -> list[str]:
    """Return all values of a header, whose name is case-insensitive.

    Raises:
        InvalidRequestError: The headers have none of the known forms, or a value of this header is not text.
    """
    name = name.lower()
    environ_name = name.replace("-", "_")
    if environ_name not in _WITHOUT_PREFIX:
        environ_name = f"http_{environ_name}"
    values: list[str] = []
    for key, value in _pairs(headers):
        if _to_text(key).lower() in {name, environ_name}:
            values += map(_to_text, _as_list(value))
    return values


def _pairs(headers: object) -> Iterable[tuple[object, object]]:
    """Return the names and values; a value may be a list of several."""
    # Multi-value mappings whose items() omits values have a method of another name: multi_items() in Starlette and
    # httpx, lists() in Werkzeug and Django.
    for method in ("multi_items", "lists", "items"):
        if callable(items := getattr(headers, method, None)):
            return items()  # type: ignore[no-any-return]
    if not isinstance(headers, Iterable) or isinstance(headers, (str, bytes)):
        raise _invalid(f"not {type(headers).__name__}")
    return map(_as_pair, headers)


def _as_pair(item: object) -> tuple[object, object]:
    if not isinstance(item, (list, tuple)) or len(item) != 2:
        raise _invalid(f"not an iterable of {type(item).__name__}")
    return item[0], item[1]


def _as_list(value: object) -> Iterable[object]:
    """Return the values; none for None, with which some callers pass on that the header is missing."""
    if value is None:
        return ()
    return value if isinstance(value, (list, tuple)) else (value,)


def _to_text(value: object) -> str:
    if isinstance(value, bytes):
        return value.decode("latin-1")
    if not isinstance(value, str):
        raise _invalid(f"and names and values must be text or bytes, not {type(value).__name__}")
    return value


def _invalid(problem: str) -> InvalidRequestError:
    return InvalidRequestError(
        "headers must be the delivery's headers: a mapping, WSGI's environ, or pairs of names and values, " + problem,
        field="headers",
    )
