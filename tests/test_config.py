"""The settings of a session: read from arguments and environment, and validated before anything is sent."""

import math
import pickle
import signal
from decimal import Decimal
from fractions import Fraction
from typing import Any

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flux2max_async import ConfigurationError, FluxSession
from flux2max_async._config import (
    DEFAULT_BASE_URL,
    KEY_VARIABLE,
    URL_VARIABLE,
    SessionConfig,
    validate_drain,
    validate_seconds,
)

VALID: dict[str, Any] = {
    "api_key": "sk-7f3a9c",
    "base_url": "https://cloud.vtrix.ai",
    "headers": {"X-Team": "art"},
    "proxy": None,
    "trust_env": True,
    "ssl_context": None,
    "allow_plain_http": False,
    "max_in_flight": 24,
    "max_polls_per_second": 20.0,
    "task_timeout": 600.0,
    "http_timeout": 30.0,
    "drain": 0.0,
    "budget": None,
    "price_guess": None,
    "budget_scope": None,
    "has_journal": False,
    "max_uncertain": 5,
    "allow_private_downloads": False,
    "content_keys": True,
    "drain_signals": (signal.SIGTERM,),
    "max_waiting": None,
    "max_per_group": None,
}


def config(**changes: Any) -> SessionConfig:
    return SessionConfig(**{**VALID, **changes})


def config_error(**changes: Any) -> ConfigurationError:
    with pytest.raises(ConfigurationError) as caught:
        config(**changes)
    return caught.value


def test_valid_settings_are_kept() -> None:
    """Settings that need no conversion are fields of the config, and the config is immutable."""
    valid = config()

    assert attrs.asdict(valid) == VALID
    with pytest.raises(AttributeError):
        valid.max_in_flight = 1  # type: ignore[misc]


# ---------------------------------------------------------------------- api_key


@pytest.mark.parametrize("key", ["k", "sk-7f3a9c", "a.b_c~d/e+f==", "!\"#$%&'()*+,-./:;<=>?@[]^_`{|}~"])
def test_a_printable_key_is_accepted(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any printable ASCII text without spaces can be a key, and the argument takes precedence over the environment."""
    monkeypatch.setenv(KEY_VARIABLE, "another")

    assert config(api_key=key).api_key == key


def test_the_key_is_read_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the argument, the key is the value of FLUX2MAX_API_KEY."""
    monkeypatch.setenv("FLUX2MAX_API_KEY", "sk-7f3a9c")

    assert config(api_key=None).api_key == "sk-7f3a9c"


def test_the_key_is_not_in_the_repr() -> None:
    """The config can be logged."""
    shown = repr(config(api_key="sk-7f3a9c"))

    assert "https://cloud.vtrix.ai" in shown
    assert "7f3a9c" not in shown


def test_a_function_is_a_key() -> None:
    """A key may be a function, which is not called yet."""

    def api_key() -> str:
        raise AssertionError

    assert config(api_key=api_key).api_key is api_key


@pytest.mark.parametrize(("key", "variable"), [(None, None), (None, ""), ("", "sk-7f3a9c")])
def test_a_missing_key_is_an_error_that_names_argument_and_variable(
    key: str | None, variable: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error names the argument and the variable; an empty argument doesn't fall back to the environment."""
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    if variable is not None:
        monkeypatch.setenv(KEY_VARIABLE, variable)

    error = config_error(api_key=key)

    assert "api_key" in str(error)
    assert "FLUX2MAX_API_KEY" in str(error)


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
def test_a_malformed_key_is_refused_without_being_shown(key: object) -> None:
    """A key that can't be sent in a header is refused, and neither the error's text nor its pickle contains it."""
    error = config_error(api_key=key)

    assert "malformed" in str(error)
    assert "7f3a9c" not in f"{error} {error!r} {pickle.dumps(error)!r}"


@pytest.mark.parametrize("key", MALFORMED, ids=ascii)
def test_a_malformed_key_in_the_environment_is_refused_without_being_shown(
    key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The environment's key, which may end with a newline from a file, is validated like the argument."""
    monkeypatch.setenv(KEY_VARIABLE, key)

    error = config_error(api_key=None)

    assert "malformed" in str(error)
    assert "7f3a9c" not in f"{error} {error!r} {pickle.dumps(error)!r}"


@pytest.mark.parametrize("key", [7, 0.5, True, object()], ids=["integer", "float", "bool", "object"])
def test_a_key_of_another_type_is_refused(key: object) -> None:
    """A key that is not text is a ConfigurationError, not a TypeError."""
    error = config_error(api_key=key)

    assert "malformed" in str(error)


# ---------------------------------------------------------------------- base_url


@pytest.mark.parametrize(
    ("url", "expected"),
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
def test_a_base_url_loses_its_trailing_slashes(url: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any https URL, and plain http to a loopback address, is accepted, and takes precedence over the environment."""
    monkeypatch.setenv(URL_VARIABLE, "https://another.example")

    assert config(base_url=url).base_url == expected


@pytest.mark.parametrize(
    ("variable", "expected"),
    [
        (None, "https://cloud.vtrix.ai"),
        ("", "https://cloud.vtrix.ai"),
        ("https://proxy.example/flux/", "https://proxy.example/flux"),
    ],
    ids=["not set", "empty", "set"],
)
def test_the_base_url_is_read_from_the_environment(
    variable: str | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the argument, the base URL is the value of FLUX2MAX_BASE_URL, or else the vendor's."""
    monkeypatch.delenv(URL_VARIABLE, raising=False)
    if variable is not None:
        monkeypatch.setenv("FLUX2MAX_BASE_URL", variable)

    assert config(base_url=None).base_url == expected
    assert DEFAULT_BASE_URL == "https://cloud.vtrix.ai"


def test_an_invalid_base_url_in_the_environment_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment's base URL is validated like the argument."""
    monkeypatch.setenv(URL_VARIABLE, "http://proxy.example")

    assert "https" in str(config_error(base_url=None))


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
def test_plain_http_is_for_loopback_addresses_only(url: str) -> None:
    """The key is never sent unencrypted over a network."""
    error = config_error(base_url=url)

    assert "https" in str(error)
    assert "key" in str(error)


@pytest.mark.parametrize("url", ["http://10.0.0.7:8000", "http://gateway.internal/flux", "http://0.0.0.0"])
def test_plain_http_can_be_allowed(url: str) -> None:
    """The error about plain http names the option that permits it."""
    error = config_error(base_url=url)

    assert "allow_plain_http=True" in str(error)
    assert config(base_url=url, allow_plain_http=True).base_url == url
    assert config(base_url=url, allow_plain_http=True, proxy="http://10.0.0.1").base_url == url


@pytest.mark.parametrize("host", ["10.0.0.1:3128", "user:pass@proxy.example", "127.0.0.1.example", "[::1"])
@pytest.mark.parametrize("scheme", ["http://", ""])
def test_plain_http_to_this_machine_through_a_proxy(scheme: str, host: str) -> None:
    """The key isn't sent without TLS to a proxy on another machine; one on this machine is fine."""
    error = config_error(base_url="http://127.0.0.1:8765", proxy=f"{scheme}{host}")

    assert "with a proxy on another machine" in str(error)
    assert "allow_plain_http=True" in str(error)
    for proxy in ("127.0.0.1:3128", "localhost", "user:pass@[::1]:3128"):
        assert config(base_url="http://127.0.0.1:8765", proxy=f"{scheme}{proxy}").proxy == f"{scheme}{proxy}"
    assert config(proxy=f"{scheme}{host}").base_url == "https://cloud.vtrix.ai"


@pytest.mark.parametrize("context", [True, False, "certificate.pem", object()], ids=lambda value: type(value).__name__)
def test_an_ssl_context_of_another_type_is_refused_by_name(context: object) -> None:
    """`ssl_context` is an ssl.SSLContext; that False would turn verification off is no option."""
    error = config_error(ssl_context=context)

    assert str(error) == f"ssl_context must be an ssl.SSLContext, not {type(context).__name__}"


@pytest.mark.parametrize(
    "url",
    [
        *("", "/", "cloud.vtrix.ai", "cloud.vtrix.ai:443", "//cloud.vtrix.ai", "ftp://cloud.vtrix.ai", "https://"),
        *("https:///flux", "https:cloud.vtrix.ai", "https://:443", "https://?", "https://#"),
        "https://proxy.example/?tenant=7",
        "https://proxy.example/#top",
        "https://proxy.example?",
        "https://proxy.example/#",
        "https://proxy.example\n",
        "https://proxy.example/\x00",
        "https://proxy.example/flux\t",
        "https://pro\r\nxy.example",
        " https://proxy.example",
        "https://proxy.example ",
        "https://my proxy.example",
        "https://proxy.example/my flux",
        *("https://proxy.example\\flux", "https://[::1", "https://proxy.example:port", "https://proxy.example:99999"),
        *(b"https://proxy.example", 7, ["https://proxy.example"], object()),
    ],
    ids=lambda value: ascii(value) if isinstance(value, (str, bytes)) else type(value).__name__,
)
def test_an_unusable_base_url_is_refused_by_name(url: object) -> None:
    """A base URL to which nothing can be sent is refused when the session is created."""
    error = config_error(base_url=url)

    assert "base_url" in str(error)


@pytest.mark.parametrize(
    "url", ["https://me:7f3a9c@proxy.example", "https://7f3a9c@proxy.example/", "https://:7f3a9c@proxy.example"]
)
def test_a_password_in_the_base_url_is_refused_without_being_shown(url: str) -> None:
    """The error about a user name or password in the base URL doesn't repeat it."""
    error = config_error(base_url=url)

    assert "user name or password" in str(error)
    assert "7f3a9c" not in f"{error} {error!r}"


@pytest.mark.parametrize("url", ["https://proxy.example/?key=7f3a9c", "https://proxy.example/#7f3a9c"])
def test_a_key_in_the_base_url_is_refused_without_being_shown(url: str) -> None:
    """The error about a query or fragment, which may hold the key, can be logged."""
    error = config_error(base_url=url)

    assert "7f3a9c" not in f"{error} {error!r}"


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=20) | st.text("htps:/@?#[]\\ .%0a1é\n", max_size=20).map("https://{}".format))
def test_any_text_is_a_base_url_or_a_configuration_error(url: str) -> None:
    """Any text is either accepted, without its trailing slashes, or is a ConfigurationError."""
    try:
        accepted: str | None = config(base_url=url).base_url
    except ConfigurationError:
        accepted = None

    assert accepted in {None, url.rstrip("/")}


# ---------------------------------------------------------------------- durations, limits and rates

NOT_DURATIONS = [0, 0.0, -0.0, -1, -math.inf, math.nan, True, False, "30", [30], 30j, Fraction(30)]


@pytest.mark.parametrize("name", ["task_timeout", "http_timeout"])
@pytest.mark.parametrize("seconds", [1, 0.001, 600.0, 1e9, math.inf], ids=str)
def test_a_positive_duration_is_accepted(name: str, seconds: float) -> None:
    """Any positive number of seconds is a timeout."""
    assert getattr(config(**{name: seconds}), name) == seconds


@pytest.mark.parametrize(
    ("name", "seconds"),
    [
        *(("task_timeout", seconds) for seconds in NOT_DURATIONS),
        *(("http_timeout", seconds) for seconds in [*NOT_DURATIONS, None]),
    ],
    ids=repr,
)
def test_an_invalid_duration_is_refused_by_name(name: str, seconds: object) -> None:
    """The error about a timeout that is not a positive number names the setting, its value and the unit."""
    error = config_error(**{name: seconds})

    assert str(error) == f"{name} must be more than 0 seconds, not {seconds!r}"


def test_a_duration_can_have_a_maximum() -> None:
    """A duration of exactly the maximum is accepted, a longer one is refused with the maximum in the error."""
    assert validate_seconds("lease", 60, maximum=60) == 60
    with pytest.raises(ConfigurationError, match=r"^lease must be at most 60 seconds, not 60\.1$"):
        validate_seconds("lease", 60.1, maximum=60)


@pytest.mark.parametrize("seconds", [0, 0.0, 30, 1e9])
def test_a_drain_of_zero_or_more_is_accepted(seconds: float) -> None:
    """A drain may be 0, which waits for nothing."""
    assert config(drain=seconds).drain == validate_drain(seconds) == seconds


@pytest.mark.parametrize("seconds", [-1, math.inf, math.nan, None, True, "30"], ids=repr)
def test_an_invalid_drain_is_refused_by_name(seconds: Any) -> None:
    """A drain that is negative, infinite or not a number is refused."""
    with pytest.raises(ConfigurationError) as caught:
        validate_drain(seconds)

    assert str(caught.value) == f"drain must be 0 seconds or more, not {seconds!r}"
    assert str(config_error(drain=seconds)) == str(caught.value)


@pytest.mark.parametrize("name", ["max_polls_per_second", "task_timeout"])
@pytest.mark.parametrize(("value", "expected"), [(20, 20.0), (0.1, 0.1), (None, math.inf), (math.inf, math.inf)])
def test_none_is_no_limit(name: str, value: float | None, expected: float) -> None:
    """Any positive number is a limit, and None is an infinite one."""
    assert getattr(config(**{name: value}), name) == expected


@pytest.mark.parametrize("rate", [0, -1, math.nan, True, False, "20", [20]], ids=repr)
def test_an_invalid_rate_is_refused_by_name(rate: object) -> None:
    """The error about a rate that is not a positive number names the setting, its value and a valid one."""
    error = config_error(max_polls_per_second=rate)

    assert str(error) == f"max_polls_per_second must be more than 0, or None for no limit, not {rate!r}"


@pytest.mark.parametrize("limit", [1, 24, 10**6])
def test_at_least_one_task_in_flight_is_accepted(limit: int) -> None:
    """Any positive integer is a number of slots."""
    assert config(max_in_flight=limit).max_in_flight == limit


@pytest.mark.parametrize("limit", [0, -1, 1.0, 24.5, math.inf, math.nan, True, False, None, "24", [24]], ids=repr)
def test_an_invalid_number_of_slots_is_refused_by_name(limit: object) -> None:
    """The error about a max_in_flight that is not a positive integer names the setting and its value."""
    error = config_error(max_in_flight=limit)

    expected = "max_in_flight must be an integer of at least 1, or an InFlightLimit such as SqliteInFlightLimit"
    assert str(error) == f"{expected}, not {limit!r}"


@pytest.mark.parametrize("limit", [None, 1, 5, 10**9])
def test_a_valid_max_uncertain_is_kept(limit: int | None) -> None:
    """max_uncertain may be any positive integer, or None for no limit."""
    assert config(max_uncertain=limit).max_uncertain == limit


@pytest.mark.parametrize("limit", [0, -1, 1.5, "5", True, math.inf, []], ids=repr)
def test_an_invalid_max_uncertain_is_refused_by_name(limit: Any) -> None:
    """The error about a max_uncertain that is not a positive integer names the setting and its value."""
    error = config_error(max_uncertain=limit)

    assert str(error) == f"max_uncertain must be an integer of at least 1, not {limit!r}"


@pytest.mark.parametrize("name", ["allow_private_downloads", "allow_plain_http", "trust_env"])
@pytest.mark.parametrize("flag", [None, 0, 1, "", "false", []], ids=repr)
def test_an_invalid_flag_is_refused_by_name(flag: Any, name: str) -> None:
    """Text such as "false", which would count as true, is refused."""
    error = config_error(**{name: flag})

    assert str(error) == f"{name} must be True or False, not {flag!r}"


# ---------------------------------------------------------------------- budget


@pytest.mark.parametrize("name", ["budget", "price_guess"])
@pytest.mark.parametrize(
    ("amount", "expected"),
    [
        (None, None),
        (0, Decimal(0)),
        (5, Decimal(5)),
        (0.1, Decimal("0.1")),
        ("5.00", Decimal("5.00")),
        ("2.1e-1", Decimal("0.21")),
        (Decimal("1.01"), Decimal("1.01")),
    ],
    ids=repr,
)
def test_an_amount_is_kept_exactly(name: str, amount: Any, expected: Decimal | None) -> None:
    """An amount is the decimal number that the caller wrote, whatever its type."""
    assert getattr(config(**{name: amount}), name) == expected


@pytest.mark.parametrize("name", ["budget", "price_guess"])
@pytest.mark.parametrize(
    "amount", [-1, "-0.01", math.nan, math.inf, "sNaN", "five", "", "$5", "5,00", True, False, b"5", [], object]
)
def test_an_invalid_amount_is_refused_by_name(name: str, amount: Any) -> None:
    """The error about an amount that can't be spent names the setting and shows a valid one."""
    error = config_error(**{name: amount})

    assert str(error) == f"{name} must be an amount of US dollars, such as 5.00, not {amount!r}"


@pytest.mark.parametrize(
    ("scope", "has_journal", "limits_journal"),
    [
        (None, False, False),
        (None, True, True),
        ("session", False, False),
        ("session", True, False),
        ("journal", True, True),
    ],
)
def test_the_budget_limits_the_journal_by_default(scope: Any, has_journal: bool, limits_journal: bool) -> None:
    """A budget limits everything in the journal if there is one, unless its scope is the session."""
    assert config(budget_scope=scope, has_journal=has_journal).budget_limits_journal is limits_journal


@pytest.mark.parametrize(
    ("scope", "has_journal"), [("journal", False), ("Session", True), ("", True), (1, True), (["journal"], True)]
)
def test_an_invalid_budget_scope_is_refused_by_name(scope: Any, has_journal: bool) -> None:
    """The scope "journal" requires a journal, and any scope other than the two is refused."""
    error = config_error(budget_scope=scope, has_journal=has_journal)

    assert str(error) == f"budget_scope must be 'session', or 'journal' if there is a journal, not {scope!r}"


# ---------------------------------------------------------------------- FluxSession


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"api_key": "sk 7f3a9c"}, "the API key is malformed"),
        ({"base_url": "cloud.vtrix.ai"}, "base_url must look like"),
        (
            {"max_in_flight": 0},
            "max_in_flight must be an integer of at least 1, or an InFlightLimit such as SqliteInFlightLimit, not 0",
        ),
        ({"max_waiting": -1}, "max_waiting must be an integer of at least 0, or None for no bound, not -1"),
        ({"max_waiting": True}, "max_waiting must be an integer of at least 0, or None for no bound, not True"),
        ({"max_waiting": 1.0}, "max_waiting must be an integer of at least 0, or None for no bound, not 1.0"),
        ({"max_per_group": 0}, "max_per_group must be an integer of at least 1, not 0"),
        ({"max_polls_per_second": 0}, "max_polls_per_second must be more than 0"),
        ({"task_timeout": 0}, "task_timeout must be more than 0 seconds"),
        ({"http_timeout": None}, "http_timeout must be more than 0 seconds"),
        ({"drain": -1}, "drain must be 0 seconds or more"),
        ({"budget": -1}, "budget must be an amount"),
        ({"price_guess": "much"}, "price_guess must be an amount"),
        ({"budget_scope": "journal"}, "budget_scope must be 'session'"),
        ({"max_uncertain": 0}, "max_uncertain must be an integer of at least 1, not 0"),
        ({"allow_private_downloads": "no"}, "allow_private_downloads must be True or False, not 'no'"),
        ({"content_keys": 0}, "content_keys must be True or False, not 0"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_session_validates_its_settings(settings_: dict[str, Any], message: str) -> None:
    """Every setting of FluxSession is validated when it is created."""
    with pytest.raises(ConfigurationError) as caught:
        FluxSession(**{"api_key": "test-key-1234567890", **settings_})

    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("limit", "slots", "rate"),
    [("auto", 1, 20.0), ("auto", 24, 24.0), ("auto", 200, 200.0), (5, 200, 5.0), (None, 200, math.inf), (math.inf, 1, math.inf)],
)  # fmt: skip
def test_polls_per_second(limit: Any, slots: int, rate: float) -> None:
    """By default there may be one poll per second for each slot, and at least 20."""
    assert config(max_polls_per_second=limit, max_in_flight=slots).poll_rate == rate


@pytest.mark.parametrize(
    ("headers", "message"),
    [
        ({"Authorization": "secret-1"}, "can't hold Authorization"),
        ({"x-key": "secret-1"}, "can't hold x-key"),
        ({"content-encoding": "gzip"}, "can't hold content-encoding"),
        ({"Host": "a.example"}, "can't hold Host"),
        ({"X Team": "secret-1"}, "a name that can't be sent: 'X Team'"),
        ({"": "secret-1"}, "a name that can't be sent: ''"),
        ({7: "secret-1"}, "a name that can't be sent: 7"),
        ({"X-Team": "secret-1\r\nX: y"}, "the value of X-Team in headers must be a line"),
        ({"X-Team": "größe"}, "the value of X-Team in headers must be a line"),
        ({"X-Team": 1}, "the value of X-Team in headers must be a line"),
        ([("X-Team", "secret-1")], "headers must be a mapping of names and values, not list"),
    ],
)
def test_headers_that_cannot_be_sent(headers: Any, message: str) -> None:
    """A header that the session sets itself, or that can't be sent, is an error that doesn't show its value."""
    error = config_error(headers=headers)

    assert message in str(error)
    assert "secret-1" not in str(error)


def test_headers_are_copied_and_not_shown() -> None:
    """What is given may be changed later, and may hold secrets."""
    headers = {"X-Team": "secret-1"}
    kept = config(headers=headers)
    headers["X-Team"] = "other"

    assert kept.headers == {"X-Team": "secret-1"}
    assert "secret-1" not in repr(kept)
    assert config(headers=None).headers == {}
