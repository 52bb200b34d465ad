"""Tokens in webhook URLs: they tell which submit a delivery belongs to, even if the submit's answer was lost."""

import secrets
from urllib.parse import parse_qsl

TOKEN_PARAMETER = "flux2max_submit"  # noqa: S105 - the name of a parameter
"""The query parameter that holds the token."""
_TOKEN_BYTES = 16


def new_token() -> str:
    """Return a random token, which needs no percent-encoding."""
    return secrets.token_urlsafe(_TOKEN_BYTES)


def add_token(url: str, token: str) -> str:
    """Return a URL with a token in its query; everything else stays as it is."""
    address, hash_sign, fragment = url.partition("#")
    _, question_mark, query = address.partition("?")
    separator = "" if question_mark and not query else "&" if question_mark else "?"
    return f"{address}{separator}{TOKEN_PARAMETER}={token}{hash_sign}{fragment}"


def token_of(url: str | None) -> str | None:
    """Return the token in a URL, or in a path with a query; None if there is none, or several that differ."""
    query = (url or "").partition("#")[0].partition("?")[2]
    tokens = {value for name, value in parse_qsl(query) if name == TOKEN_PARAMETER}
    return tokens.pop() if len(tokens) == 1 else None
