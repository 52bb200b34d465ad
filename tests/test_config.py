"""Settings: what a session is set up with, from arguments and environment, checked before anything is sent."""

import math
import pickle
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flux2max_async import ConfigurationError, FluxSession
from flux2max_async._config import (
    DEFAULT_BASE_URL,
    KEY_VARIABLE,
    URL_VARIABLE,
    validate_api_key,
    validate_base_url,
    validate_max_in_flight,
    validate_rate,
    validate_seconds,
)


def refused_url(url: object) -> ConfigurationError:
    with pytest.raises(ConfigurationError) as caught:
        validate_base_url(url)  # type: ignore[arg-type]
    return caught.value


# ---------------------------------------------------------------------- the key


@pytest.mark.parametrize("key", ["k", "sk-7f3a9c", "a.b_c~d/e+f==", "!\"#$%&'()*+,-./:;<=>?@[]^_`{|}~"])
def test_a_printable_key_is_taken(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any printable ASCII text without spaces can be a key, and one that is given beats the environment's."""
    monkeypatch.setenv(KEY_VARIABLE, "another")

    assert validate_api_key(key) == key


def test_the_key_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no key is given, FLUX2MAX_API_KEY has it."""
    monkeypatch.setenv("FLUX2MAX_API_KEY", "sk-7f3a9c")

    assert validate_api_key(None) == "sk-7f3a9c"


@pytest.mark.parametrize(("key", "variable"), [(None, None), (None, ""), ("", "sk-7f3a9c")])
def test_no_key_is_told_with_both_ways_to_give_one(
    key: str | None, variable: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a key, the error names the argument and the variable; an empty key that is given doesn't fall back."""
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    if variable is not None:
        monkeypatch.setenv(KEY_VARIABLE, variable)

    with pytest.raises(ConfigurationError) as caught:
        validate_api_key(key)

    assert "api_key" in str(caught.value)
    assert "FLUX2MAX_API_KEY" in str(caught.value)


MALFORMED = [
    "Bearer sk-7f3a9c",
    "sk-7f3a9c\n",
    "sk-7f3a9c\r\nX-Evil: 1",
    " sk-7f3a9c",
    "sk-7f3a9c ",
    "sk 7f3a9c",
    "sk-7f3a9c\x7f",
    "sk-7f3a9ç",
    "sk-7f3a9c\ufeff",
]


@pytest.mark.parametrize("key", [*MALFORMED, "sk-7f3a9c\x00", b"sk-7f3a9c", ["sk-7f3a9c"]], ids=ascii)
def test_a_malformed_key_is_refused_without_showing_it(key: object) -> None:
    """A key that can't stand in a header is refused before anything is sent, and no text of the error holds it."""
    with pytest.raises(ConfigurationError) as caught:
        validate_api_key(key)  # type: ignore[arg-type]

    assert "malformed" in str(caught.value)
    assert "7f3a9c" not in f"{caught.value} {caught.value!r} {pickle.dumps(caught.value)!r}"


@pytest.mark.parametrize("key", MALFORMED, ids=ascii)
def test_a_malformed_key_in_the_environment_is_refused_without_showing_it(
    key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The environment's key, with a line end from a file perhaps, is checked like one that is given."""
    monkeypatch.setenv(KEY_VARIABLE, key)

    with pytest.raises(ConfigurationError) as caught:
        validate_api_key(None)

    assert "malformed" in str(caught.value)
    assert "7f3a9c" not in f"{caught.value} {caught.value!r} {pickle.dumps(caught.value)!r}"


@pytest.mark.parametrize("key", [7, 0.5, True, object()], ids=["integer", "float", "bool", "object"])
def test_a_key_that_is_no_text_is_refused(key: object) -> None:
    """A key of another type is a setting that can't be, in our words."""
    with pytest.raises(ConfigurationError, match="malformed"):
        validate_api_key(key)  # type: ignore[arg-type]


# ---------------------------------------------------------------------- the address


@pytest.mark.parametrize(
    ("url", "checked"),
    [
        ("https://cloud.vtrix.ai", "https://cloud.vtrix.ai"),
        ("https://cloud.vtrix.ai/", "https://cloud.vtrix.ai"),
        ("https://proxy.example:8443/flux/v2//", "https://proxy.example:8443/flux/v2"),
        ("https://[2001:db8::1]:8443/flux", "https://[2001:db8::1]:8443/flux"),
        ("https://10.0.0.7", "https://10.0.0.7"),
        ("HTTPS://proxy.example/Flux", "HTTPS://proxy.example/Flux"),
        ("http://localhost", "http://localhost"),
        ("http://LocalHost:8000/", "http://LocalHost:8000"),
        ("http://127.0.0.1:8000", "http://127.0.0.1:8000"),
        ("http://127.8.9.1", "http://127.8.9.1"),
        ("http://[::1]:8000/flux/", "http://[::1]:8000/flux"),
    ],
)
def test_an_address_is_taken_without_its_last_slash(url: str, checked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Anything over https, and plain http to this machine, is taken with its path, and beats the environment."""
    monkeypatch.setenv(URL_VARIABLE, "https://another.example")

    assert validate_base_url(url) == checked


@pytest.mark.parametrize(
    ("variable", "checked"),
    [
        (None, "https://cloud.vtrix.ai"),
        ("", "https://cloud.vtrix.ai"),
        ("https://proxy.example/flux/", "https://proxy.example/flux"),
    ],
    ids=["not set", "empty", "set"],
)
def test_the_address_comes_from_the_environment(
    variable: str | None, checked: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where no address is given, FLUX2MAX_BASE_URL has it, and else the vendor's is taken."""
    monkeypatch.delenv(URL_VARIABLE, raising=False)
    if variable is not None:
        monkeypatch.setenv("FLUX2MAX_BASE_URL", variable)

    assert validate_base_url(None) == checked
    assert DEFAULT_BASE_URL == "https://cloud.vtrix.ai"


def test_a_wrong_address_in_the_environment_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment's address is checked like one that is given."""
    monkeypatch.setenv(URL_VARIABLE, "http://proxy.example")

    with pytest.raises(ConfigurationError, match="https"):
        validate_base_url(None)


@pytest.mark.parametrize(
    "url",
    [
        "http://cloud.vtrix.ai",
        "http://localhost.evil.example",
        "http://127.0.0.1.evil.example",
        "http://10.0.0.7",
        "http://0.0.0.0:8000",
        "http://[::]",
        "http://2130706433",
        "HTTP://proxy.example",
    ],
)
def test_plain_http_is_for_this_machine_only(url: str) -> None:
    """The key never goes over a line that others can read."""
    error = refused_url(url)

    assert "https" in str(error)
    assert "key" in str(error)


@pytest.mark.parametrize(
    "url",
    [
        *("", "/", "cloud.vtrix.ai", "cloud.vtrix.ai:443", "//cloud.vtrix.ai", "ftp://cloud.vtrix.ai", "https://"),
        *("https:///flux", "https:cloud.vtrix.ai", "https://:443", "https://?", "https://#"),
        *(
            "https://proxy.example/?tenant=7",
            "https://proxy.example/#top",
            "https://proxy.example?",
            "https://proxy.example/#",
        ),
        *(
            "https://proxy.example\n",
            "https://proxy.example/\x00",
            "https://proxy.example/flux\t",
            "https://pro\r\nxy.example",
        ),
        *(
            " https://proxy.example",
            "https://proxy.example ",
            "https://my proxy.example",
            "https://proxy.example/my flux",
        ),
        *("https://proxy.example\\flux", "https://[::1", "https://proxy.example:port", "https://proxy.example:99999"),
        *(b"https://proxy.example", 7, ["https://proxy.example"], object()),
    ],
    ids=lambda value: ascii(value) if isinstance(value, (str, bytes)) else type(value).__name__,
)
def test_what_is_no_address_is_refused(url: object) -> None:
    """An address under which no call can be made is refused when the session is made, by the argument's name."""
    error = refused_url(url)

    assert "base_url" in str(error)


@pytest.mark.parametrize(
    "url", ["https://me:7f3a9c@proxy.example", "https://7f3a9c@proxy.example/", "https://:7f3a9c@proxy.example"]
)
def test_a_password_in_the_address_is_refused_without_showing_it(url: str) -> None:
    """An address isn't the place for a password, and the error doesn't spread it."""
    error = refused_url(url)

    assert "user name or password" in str(error)
    assert "7f3a9c" not in f"{error} {error!r}"


@pytest.mark.parametrize("url", ["https://proxy.example/?key=7f3a9c", "https://proxy.example/#7f3a9c"])
def test_a_key_in_the_address_is_refused_without_showing_it(url: str) -> None:
    """Who puts the key into the address's query gets an error that can be logged."""
    error = refused_url(url)

    assert "7f3a9c" not in f"{error} {error!r}"


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=20) | st.text("htps:/@?#[]\\ .%0a1é\n", max_size=20).map("https://{}".format))
def test_any_text_is_an_address_or_refused_in_our_words(url: str) -> None:
    """Whatever text is given, it is taken with nothing but its last slashes cut, or it is a ConfigurationError."""
    try:
        checked: str | None = validate_base_url(url)
    except ConfigurationError:
        checked = None

    assert checked in {None, url.rstrip("/")}


# ---------------------------------------------------------------------- the numbers


@pytest.mark.parametrize("seconds", [1, 0.001, 600.0, 1e9, math.inf], ids=str)
def test_a_duration_that_is_more_than_nothing_is_taken(seconds: float) -> None:
    """Any positive number of seconds is a duration."""
    checked = validate_seconds("task_timeout", seconds)

    assert checked == seconds


@pytest.mark.parametrize(
    "seconds", [0, 0.0, -0.0, -1, -math.inf, math.nan, True, False, None, "30", [30], 30j, Fraction(30)], ids=repr
)
def test_a_senseless_duration_is_refused_by_name(seconds: object) -> None:
    """What is no positive number of seconds is refused, with its name, its value and the unit."""
    with pytest.raises(ConfigurationError) as caught:
        validate_seconds("http_timeout", seconds)  # type: ignore[arg-type]

    assert "http_timeout" in str(caught.value)
    assert repr(seconds) in str(caught.value)
    assert "seconds" in str(caught.value)


@pytest.mark.parametrize("places", [1, 24, 10**6])
def test_at_least_one_place_is_taken(places: int) -> None:
    """Any positive integer is a number of places."""
    checked = validate_max_in_flight(places)

    assert checked == places


@pytest.mark.parametrize("places", [0, -1, 1.0, 24.5, math.inf, math.nan, True, False, None, "24", [24]], ids=repr)
def test_a_senseless_number_of_places_is_refused_by_name(places: object) -> None:
    """What is no positive integer is refused, with its name and its value."""
    with pytest.raises(ConfigurationError) as caught:
        validate_max_in_flight(places)  # type: ignore[arg-type]

    assert "max_in_flight" in str(caught.value)
    assert repr(places) in str(caught.value)


@pytest.mark.parametrize(("rate", "taken"), [(20, 20.0), (0.1, 0.1), (None, math.inf), (math.inf, math.inf)])
def test_a_rate_or_none_is_taken(rate: float | None, taken: float) -> None:
    """Any positive number is a rate, and None is no limit."""
    checked = validate_rate("max_polls_per_second", rate)

    assert checked == taken


@pytest.mark.parametrize("rate", [0, -1, math.nan, True, False, "20", [20]], ids=repr)
def test_a_senseless_rate_is_refused_by_name(rate: object) -> None:
    """What is no positive number is refused, with its name, its value and what would be right."""
    with pytest.raises(ConfigurationError) as caught:
        FluxSession("test-key-1234567890", max_polls_per_second=rate)  # type: ignore[arg-type]

    assert str(caught.value) == f"max_polls_per_second must be more than 0, or None for no limit, not {rate!r}"
