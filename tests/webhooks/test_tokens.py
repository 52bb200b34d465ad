"""Tokens in webhook URLs."""

from urllib.parse import parse_qsl, urlsplit

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from flux2max_async.webhooks._tokens import TOKEN_PARAMETER, add_token, new_token, token_of

ANY_TEXT = st.text(st.characters(exclude_categories=()))


def test_tokens_are_random_and_need_no_encoding() -> None:
    """A token has 128 random bits, in characters that URLs hold as they are."""
    tokens = {new_token() for _ in range(1000)}

    assert len(tokens) == 1000
    assert all(len(token) == 22 and token.replace("-", "a").replace("_", "a").isalnum() for token in tokens)


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("https://app.example", "https://app.example?flux2max_submit=T"),
        ("https://app.example/hooks", "https://app.example/hooks?flux2max_submit=T"),
        ("https://app.example/hooks?", "https://app.example/hooks?flux2max_submit=T"),
        ("https://app.example/?a=1", "https://app.example/?a=1&flux2max_submit=T"),
        ("https://app.example/?a=%2F+%40&b", "https://app.example/?a=%2F+%40&b&flux2max_submit=T"),
        ("https://app.example/%7Ea/%C3%BC?sig=a/b@:c", "https://app.example/%7Ea/%C3%BC?sig=a/b@:c&flux2max_submit=T"),
        ("https://app.example/hooks#top", "https://app.example/hooks?flux2max_submit=T#top"),
        ("https://app.example/hooks?a=1#b?c", "https://app.example/hooks?a=1&flux2max_submit=T#b?c"),
    ],
)
def test_adding_a_token(url: str, expected: str) -> None:
    """The token joins the query; the rest of the URL, an existing query and a fragment stay byte for byte."""
    assert add_token(url, "T") == expected
    assert token_of(expected) == "T"


@pytest.mark.parametrize(
    ("url", "token"),
    [
        ("/hooks?flux2max_submit=T", "T"),
        ("?flux2max_submit=T", "T"),
        ("https://app.example/hooks?a=1&flux2max_submit=T&b=2#c", "T"),
        ("/hooks?flux2max%5Fsubmit=a%2Db", "a-b"),  # encoded by a proxy
        ("/hooks?flux2max_submit=T&flux2max_submit=T", "T"),
        ("/hooks?flux2max_submit=T&flux2max_submit=U", None),
        *((url, None) for url in (None, "", "/hooks", "/hooks?", "/hooks?flux2max_submit", "/hooks?flux2max_submit=")),
        *((url, None) for url in ("/flux2max_submit=T", "/hooks#?flux2max_submit=T", "/hooks?FLUX2MAX_SUBMIT=T")),
        *((url, None) for url in ("http://[", "https://a:b:c/?x", "?%", "?flux2max_submit", "\ud800?a=\ud800")),
    ],
)
def test_reading_a_token(url: str | None, token: str | None) -> None:
    """The token is read from a URL or a path with a query; there is none if it is missing, empty or ambiguous."""
    assert token_of(url) == token


@given(ANY_TEXT)
@example("?flux2max_submit=%ff&flux2max_submit=%ed%a0%80;&&==")
def test_reading_never_raises(text: str) -> None:
    """Any text has a token or none, and so has any query."""
    for url in (text, f"?{text}", f"/hooks?{TOKEN_PARAMETER}={text}"):
        assert token_of(url) is None or token_of(url)


@given(st.from_regex(r"https?://[a-z.]{1,9}(/[a-zA-Z0-9%_.~-]{0,9}){0,3}(\?[a-z0-9=&%+/-]{0,20})?", fullmatch=True))
def test_a_token_that_was_added_is_read(url: str) -> None:
    """Whatever the URL, its token is read back, and its other parameters stay."""
    token = new_token()
    with_token = add_token(url, token)

    assert token_of(with_token) == token
    assert with_token.startswith(url)
    assert parse_qsl(urlsplit(with_token).query)[:-1] == parse_qsl(urlsplit(url).query)
