"""Headers of deliveries, in the forms in which servers and frameworks pass them on."""

import hashlib
import hmac
from collections.abc import Callable, Iterable
from email.message import EmailMessage, Message
from http.client import HTTPMessage
from io import BytesIO
from typing import Any
from wsgiref.util import setup_testing_defaults

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from multidict import CIMultiDict, CIMultiDictProxy, MultiDict
from starlette.datastructures import Headers
from starlette.datastructures import MultiDict as StarletteMultiDict

from flux2max_async import InvalidRequestError, WebhookInbox
from flux2max_async.webhooks import WebhookSignatureError, verify
from flux2max_async.webhooks._headers import header_values

SECRET = "hush-7f3a9c"
BODY = b'{"id": "t1", "status": "Ready"}'
SIGNATURE = f"sha256={hmac.new(SECRET.encode(), BODY, hashlib.sha256).hexdigest()}"
OTHER = f"sha256={'0' * 64}"

Pairs = list[tuple[str, str]]


class ListsDict(dict[str, list[str]]):
    """A mapping in the style of Werkzeug and Django, whose items() has only one value for each name."""

    def lists(self) -> Iterable[tuple[str, list[str]]]:
        return super().items()

    def items(self) -> Any:
        return [(name, values[0]) for name, values in super().items()]


def wsgi_environ(pairs: Pairs) -> dict[str, Any]:
    """Return WSGI's environ, which holds more than text; servers join repeated headers."""
    environ: dict[str, Any] = {"wsgi.input": BytesIO(), "CONTENT_LENGTH": "31"}
    setup_testing_defaults(environ)
    for name, value in pairs:
        key = f"HTTP_{name.upper().replace('-', '_')}"
        environ[key] = f"{environ[key]},{value}" if key in environ else value
    return environ


def with_values(headers: Any, pairs: Pairs) -> Any:
    for name, value in pairs:
        headers[name] = value
    return headers


def grouped(pairs: Pairs) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for name, value in pairs:
        groups.setdefault(name, []).append(value)
    return groups


def encoded(pairs: Pairs) -> list[tuple[bytes, bytes]]:
    return [(name.encode(), value.encode()) for name, value in pairs]


MULTI_VALUE_FORMS: dict[str, Callable[[Pairs], Any]] = {
    "pairs": lambda pairs: pairs,
    "an iterator of pairs": iter,
    "a tuple of lists": lambda pairs: tuple(list(pair) for pair in pairs),
    "ASGI": encoded,
    "bytes in lists, as in ASGI": lambda pairs: [list(pair) for pair in encoded(pairs)],
    "multiValueHeaders of AWS": grouped,
    "tuples of values": lambda pairs: {name: tuple(values) for name, values in grouped(pairs).items()},
    "bytes in lists of values": lambda pairs: {
        name.encode(): [value.encode() for value in values] for name, values in grouped(pairs).items()
    },
    "aiohttp": CIMultiDict,
    "aiohttp, read-only": lambda pairs: CIMultiDictProxy(CIMultiDict(pairs)),
    "multidict": MultiDict,
    "starlette": lambda pairs: Headers(raw=encoded([(name.lower(), value) for name, value in pairs])),
    "starlette's multi-value mapping": StarletteMultiDict,
    "werkzeug's multi-value mapping": lambda pairs: ListsDict(grouped(pairs)),
    "httpx": httpx.Headers,
    "http.client": lambda pairs: with_values(HTTPMessage(), pairs),
    "email": lambda pairs: with_values(Message(), pairs),
    "email, new API": lambda pairs: with_values(EmailMessage(), pairs),
}
SINGLE_VALUE_FORMS: dict[str, Callable[[Pairs], Any]] = {
    "a dictionary": dict,
    "items of a dictionary": lambda pairs: dict(pairs).items(),
    "a dictionary of bytes": lambda pairs: dict(encoded(pairs)),
    "WSGI": wsgi_environ,
}
FORMS = MULTI_VALUE_FORMS | SINGLE_VALUE_FORMS


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["X-BFL-Signature", "x-bfl-signature", "X-Bfl-SIGNATURE"])
def test_forms_of_headers(form: str, name: str) -> None:
    """In each form, the signature is found, whatever the case of its name, and a missing one is missed."""
    others = [("Host", "app.example"), ("X-Other", OTHER)]
    verify(BODY, FORMS[form]([*others, (name, SIGNATURE)]), SECRET)

    with pytest.raises(WebhookSignatureError, match="has no X-BFL-Signature header"):
        verify(BODY, FORMS[form](others), SECRET)
    with pytest.raises(WebhookSignatureError, match="signature is wrong"):
        verify(BODY, FORMS[form]([*others, (name, OTHER)]), SECRET)


@pytest.mark.parametrize("form", MULTI_VALUE_FORMS)
def test_all_values_of_a_repeated_header(form: str) -> None:
    """A header that occurs twice has two values; a valid one is found, whichever of them it is."""
    for values in ((OTHER, SIGNATURE), (SIGNATURE, OTHER)):
        pairs = [("X-BFL-Signature", value) for value in values]

        assert header_values(MULTI_VALUE_FORMS[form](pairs), "x-bfl-signature") == list(values)
        verify(BODY, MULTI_VALUE_FORMS[form](pairs), SECRET)


def test_a_header_that_was_joined() -> None:
    """In WSGI, a repeated header is one value: it counts if its parts agree, and is refused if they differ."""
    verify(BODY, wsgi_environ([("X-BFL-Signature", SIGNATURE)] * 2), SECRET)

    with pytest.raises(WebhookSignatureError, match="several that differ"):
        verify(BODY, wsgi_environ([("X-BFL-Signature", OTHER), ("X-BFL-Signature", SIGNATURE)]), SECRET)


@pytest.mark.parametrize(
    ("headers", "name", "values"),
    [
        (wsgi_environ([]), "Content-Length", ["31"]),
        ({"HTTP_CONTENT_LENGTH": "7"}, "Content-Length", []),  # WSGI has no such name
        ({"CONTENT_TYPE": "text/plain"}, "content-type", ["text/plain"]),
        ({"X_BFL_SIGNATURE": "a"}, "X-BFL-Signature", []),
        ({b"Stra\xdfe": b"\xfc"}, "straße", ["ü"]),
        ({"X": []}, "X", []),
        ({"X": None}, "X", []),
        ({"X": ["a", None]}, "Y", []),
        ({"X": 1, "Y": object()}, "Z", []),
        ({}, "X", []),
        ([], "X", []),
    ],
)
def test_values(headers: Any, name: str, values: list[str]) -> None:
    """Names in WSGI's environ have their prefix, bytes are Latin-1, None is missing, other headers may be anything."""
    assert header_values(headers, name) == values


@pytest.mark.parametrize(
    ("headers", "problem"),
    [
        (None, "not NoneType"),
        (1, "not int"),
        ("X-BFL-Signature: a", "not str"),
        (b"X-BFL-Signature: a", "not bytes"),
        (["X-BFL-Signature", SIGNATURE], "not an iterable of str"),
        (["ab"], "not an iterable of str"),
        ([("X-BFL-Signature",)], "not an iterable of tuple"),
        ([("X-BFL-Signature", SIGNATURE, 1)], "not an iterable of tuple"),
        ([{"X-BFL-Signature": SIGNATURE}], "not an iterable of dict"),
        ({1: SIGNATURE}, "must be text or bytes, not int"),
        ([(None, SIGNATURE)], "must be text or bytes, not NoneType"),
        ({"X-BFL-Signature": 1}, "must be text or bytes, not int"),
        ({"X-BFL-Signature": {"value": SIGNATURE}}, "must be text or bytes, not dict"),
        ({"X-BFL-Signature": [SIGNATURE, 1]}, "must be text or bytes, not int"),
        ({"X-BFL-Signature": [[SIGNATURE]]}, "must be text or bytes, not list"),
    ],
)
async def test_headers_of_no_known_form(headers: Any, problem: str) -> None:
    """Anything else is an InvalidRequestError that names `headers`, says what is right, and doesn't show a value."""
    inbox = WebhookInbox(secret=SECRET, public_url="https://app.example/hooks")
    with pytest.raises(InvalidRequestError, match=problem) as caught:
        verify(BODY, headers, SECRET)
    with pytest.raises(InvalidRequestError, match=problem):
        await inbox.deliver(BODY, headers)

    assert caught.value.field == "headers"
    assert "a mapping, WSGI's environ, or pairs of names and values" in caught.value.message
    assert SIGNATURE not in caught.value.message


NAMES = st.text(st.characters(codec="latin-1", exclude_categories=["Cc"]), min_size=1, max_size=5)
VALUES = st.text(st.characters(codec="latin-1"), max_size=5)


@given(st.lists(st.tuples(NAMES, VALUES), max_size=5), NAMES)
def test_text_and_bytes_are_equal(pairs: Pairs, name: str) -> None:
    """Headers as text and as bytes have the same values, in the same order."""
    as_bytes = [(key.encode("latin-1"), value.encode("latin-1")) for key, value in pairs]

    assert header_values(pairs, name) == header_values(as_bytes, name)
    assert len(header_values(pairs, name)) >= sum(key == name for key, _ in pairs)
