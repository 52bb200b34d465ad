"""The settings of a session, from its arguments and the environment, validated before anything is sent."""

import ipaddress
import math
import os
import re
import signal
import ssl
from collections.abc import Awaitable, Callable, Collection, Mapping
from decimal import Decimal, InvalidOperation
from typing import Any, Literal, TypeAlias
from urllib.parse import SplitResult, urlsplit

import attrs

from flux2max_async._exceptions import ConfigurationError
from flux2max_async._in_flight_limit import InFlightLimit

DEFAULT_BASE_URL = "https://cloud.vtrix.ai"
KEY_VARIABLE = "FLUX2MAX_API_KEY"
URL_VARIABLE = "FLUX2MAX_BASE_URL"

ApiKey: TypeAlias = str | Callable[[], str | Awaitable[str]]
"""The API key, or a function that returns it, awaited or not.

The function is called in the event loop before each call, at most once a second, and must not block.
"""
KEY_FORMAT = "must be printable ASCII without spaces and line ends, and without 'Bearer'"

_OWN_HEADERS = ("authorization", "x-key", "host", "connection", "transfer-encoding", "accept-encoding")
_HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_HEADER_VALUE = re.compile(r"[ -~]*")
_MAX_DOLLARS = 10**9
_UNCATCHABLE = {"SIGKILL", "SIGSTOP"}
_MIN_AUTO_RATE = 20.0
"""Polls per second that "auto" allows at least."""
# Most hosts match this; any other is checked by the idna codec, whose import takes 13 ms.
_ASCII_HOST = re.compile(r"([\w:-]{1,63}\.)*[\w:-]{1,63}", re.ASCII)


class NoKeyError(ConfigurationError):
    """The function that returns the API key has failed, or has returned none: `__cause__` is its error."""


def validate_seconds(name: str, seconds: float, *, maximum: float = math.inf) -> float:
    """Return a duration that is more than 0 and at most `maximum` seconds.

    Raises:
        ConfigurationError: It isn't.
    """
    if not _is_number(seconds) or not seconds > 0:
        raise ConfigurationError(f"{name} must be more than 0 seconds, not {seconds!r}")
    if seconds > maximum:
        raise ConfigurationError(f"{name} must be at most {maximum:g} seconds, not {seconds!r}")
    return seconds


def validate_drain(seconds: float) -> float:
    """Return the finite number of seconds for which closing a session waits for its tasks.

    Raises:
        ConfigurationError: It is negative, infinite or not a number.
    """
    if not _is_number(seconds) or not 0 <= seconds < math.inf:
        raise ConfigurationError(f"drain must be 0 seconds or more, not {seconds!r}")
    return seconds


def validate_count(name: str, count: int) -> None:
    """Check that a limit is an integer of at least 1.

    Raises:
        ConfigurationError: It isn't.
    """
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ConfigurationError(f"{name} must be an integer of at least 1, not {count!r}")


def parse_dollars(name: str, amount: Decimal | float | str | None) -> Decimal | None:
    """Return an amount of US dollars, exactly as it is written.

    Raises:
        ConfigurationError: It is not a finite amount of 0 or more.
    """
    if amount is None:
        return None
    try:
        dollars = Decimal(str(amount))
    except InvalidOperation:
        dollars = Decimal("NaN")
    if isinstance(amount, bool) or not dollars.is_finite() or not 0 <= dollars <= _MAX_DOLLARS:
        raise ConfigurationError(f"{name} must be an amount of US dollars, such as 5.00, not {amount!r}")
    return dollars


def is_well_formed_key(key: object) -> bool:
    """Return whether a key can be sent."""
    return isinstance(key, str) and key != "" and all("!" <= character <= "~" for character in key)


def _read_api_key(api_key: ApiKey | None) -> ApiKey:
    key = os.environ.get(KEY_VARIABLE) if api_key is None else api_key
    if callable(key):
        return key
    if not key:
        raise ConfigurationError(f"no API key: pass api_key or set {KEY_VARIABLE}")
    if not is_well_formed_key(key):
        # The message never shows the key.
        raise ConfigurationError(f"the API key is malformed: it {KEY_FORMAT}")
    return key


def _read_base_url(base_url: str | None) -> str:
    url = (os.environ.get(URL_VARIABLE) or DEFAULT_BASE_URL) if base_url is None else base_url
    parts = _split(url)
    if parts is None:
        raise ConfigurationError("base_url is not a URL")
    if parts.username or parts.password:
        raise ConfigurationError("base_url must not hold a user name or password")
    if parts.scheme not in {"http", "https"} or not parts.hostname or not url.isprintable() or set(url) & set("?#\\ "):
        # The message doesn't show the URL: a key may have been pasted into it.
        raise ConfigurationError("base_url must look like https://host/prefix, without query, fragment and spaces")
    return url.rstrip("/")


def _split(url: str) -> SplitResult | None:
    """Return the parts of a URL; None if it isn't one. It is no exception, whose frames would hold the URL."""
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port  # the port is read because urlsplit validates it only then
        if host and not _ASCII_HOST.fullmatch(host):
            host.encode("idna")
    except (ValueError, AttributeError, TypeError):
        return None
    return parts


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _parse_budget(amount: Decimal | float | str | None) -> Decimal | None:
    return parse_dollars("budget", amount)


def _parse_price_guess(amount: Decimal | float | str | None) -> Decimal | None:
    return parse_dollars("price_guess", amount)


def _parse_signals(signals: Collection[signal.Signals]) -> tuple[signal.Signals, ...]:
    if not isinstance(signals, Collection) or not all(isinstance(number, signal.Signals) for number in signals):
        raise ConfigurationError(f"drain_signals must be like (signal.SIGTERM, signal.SIGINT), not {signals!r}")
    for number in signals:
        if number.name in _UNCATCHABLE:
            raise ConfigurationError(f"drain_signals must be signals that a process can handle, not {number.name}")
    return tuple(dict.fromkeys(signals))


def _infinite_if_none(value: Any) -> Any:
    return math.inf if value is None else value


# ------------------------------------------------------------------ attrs validators


def _validate_count(_: Any, field: "attrs.Attribute[Any]", value: int) -> None:
    validate_count(field.name, value)


def _validate_in_flight(_: Any, field: "attrs.Attribute[Any]", value: object) -> None:
    if isinstance(value, InFlightLimit):
        validate_count(f"{field.name}.limit", value.limit)
    elif isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigurationError(
            f"{field.name} must be an integer of at least 1, or an InFlightLimit such as SqliteInFlightLimit, not "
            f"{value!r}"
        )


def _validate_max_waiting(_: Any, field: "attrs.Attribute[Any]", value: int | None) -> None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
        raise ConfigurationError(f"{field.name} must be an integer of at least 0, or None for no bound, not {value!r}")


def _validate_duration(_: Any, field: "attrs.Attribute[Any]", value: float) -> None:
    validate_seconds(field.name, value)


def _validate_rate(_: Any, field: "attrs.Attribute[Any]", value: Any) -> None:
    if value != "auto" and (not _is_number(value) or not value > 0):
        raise ConfigurationError(f"{field.name} must be more than 0, or None for no limit, not {value!r}")


def _validate_drain(_: Any, __: "attrs.Attribute[Any]", value: float) -> None:
    validate_drain(value)


def _validate_flag(_: Any, field: "attrs.Attribute[Any]", value: object) -> None:
    if not isinstance(value, bool):
        raise ConfigurationError(f"{field.name} must be True or False, not {value!r}")


def _validate_budget_scope(config: "SessionConfig", field: "attrs.Attribute[Any]", value: object) -> None:
    if value not in (None, "session", "journal") or (value == "journal" and not config.has_journal):
        raise ConfigurationError(f"{field.name} must be 'session', or 'journal' if there is a journal, not {value!r}")


def _validate_security(config: "SessionConfig", _: Any, value: bool) -> None:  # noqa: FBT001 - attrs passes it
    """Check that the key isn't sent over a network without TLS."""
    _validate_flag(config, attrs.fields(SessionConfig).allow_plain_http, value)
    url = urlsplit(config.base_url)
    if value or url.scheme != "http":
        return
    remedy = "over http, others could read the API key (allow_plain_http=True permits it inside one's own network)"
    if not _is_loopback(url.hostname or ""):
        raise ConfigurationError(f"base_url must be https for {url.hostname}: {remedy}")
    if config.proxy is not None and not _is_loopback(_proxy_host(config.proxy)):
        raise ConfigurationError(f"base_url must be https with a proxy on another machine: {remedy}")


def _proxy_host(proxy: str) -> str:
    parts = _split(proxy if "://" in proxy else f"//{proxy}")
    return (parts and parts.hostname) or ""


def _parse_headers(headers: Mapping[str, str] | None) -> Mapping[str, str]:
    if headers is not None and not isinstance(headers, Mapping):
        raise ConfigurationError(f"headers must be a mapping of names and values, not {type(headers).__name__}")
    for name, value in (headers or {}).items():
        # The message doesn't show a value: it may be a secret.
        if not isinstance(name, str) or not _HEADER_NAME.fullmatch(name):
            raise ConfigurationError(f"headers has a name that can't be sent: {name!r:.80}")
        if name.lower() in _OWN_HEADERS or name.lower().startswith("content-"):
            raise ConfigurationError(f"headers can't hold {name}: the session sets it itself")
        if not isinstance(value, str) or not _HEADER_VALUE.fullmatch(value):
            raise ConfigurationError(f"the value of {name} in headers must be a line of printable ASCII")
    return dict(headers or {})


def _validate_ssl_context(_: Any, field: "attrs.Attribute[Any]", value: object) -> None:
    if value is not None and not isinstance(value, ssl.SSLContext):
        raise ConfigurationError(f"{field.name} must be an ssl.SSLContext, not {type(value).__name__}")


@attrs.frozen(kw_only=True)
class SessionConfig:
    """The settings of a session; `FluxSession` documents each of them.

    Raises:
        ConfigurationError: A setting is missing or wrong.
    """

    api_key: ApiKey = attrs.field(converter=_read_api_key, repr=False)
    """None reads the environment."""
    base_url: str = attrs.field(converter=_read_base_url)
    """None reads the environment."""
    proxy: str | None = attrs.field(repr=False)
    trust_env: bool = attrs.field(validator=_validate_flag)
    headers: Mapping[str, str] = attrs.field(default=None, converter=_parse_headers, repr=False)
    ssl_context: ssl.SSLContext | None = attrs.field(validator=_validate_ssl_context)
    allow_plain_http: bool = attrs.field(validator=_validate_security)
    max_in_flight: int | InFlightLimit = attrs.field(validator=_validate_in_flight)
    max_waiting: int | None = attrs.field(validator=_validate_max_waiting)
    max_per_group: int | None = attrs.field(validator=attrs.validators.optional(_validate_count))
    max_polls_per_second: float | Literal["auto"] = attrs.field(converter=_infinite_if_none, validator=_validate_rate)
    task_timeout: float = attrs.field(converter=_infinite_if_none, validator=_validate_duration)
    http_timeout: float = attrs.field(validator=_validate_duration)
    drain: float = attrs.field(validator=_validate_drain)
    budget: Decimal | None = attrs.field(converter=_parse_budget)
    price_guess: Decimal | None = attrs.field(converter=_parse_price_guess)
    has_journal: bool
    budget_scope: str | None = attrs.field(validator=_validate_budget_scope)
    max_uncertain: int | None = attrs.field(validator=attrs.validators.optional(_validate_count))
    allow_private_downloads: bool = attrs.field(validator=_validate_flag)
    content_keys: bool = attrs.field(validator=_validate_flag)
    drain_signals: tuple[signal.Signals, ...] = attrs.field(converter=_parse_signals)

    @property
    def in_flight_limit(self) -> int:
        """The maximum number of tasks in flight, alone or together with other sessions."""
        return self.max_in_flight if isinstance(self.max_in_flight, int) else self.max_in_flight.limit

    @property
    def poll_rate(self) -> float:
        """The maximum number of polls per second."""
        rate = self.max_polls_per_second
        return max(_MIN_AUTO_RATE, self.in_flight_limit) if rate == "auto" else rate

    @property
    def budget_limits_journal(self) -> bool:
        """Whether the budget limits everything in the journal, or only what this session spends."""
        return self.has_journal and self.budget_scope != "session"
