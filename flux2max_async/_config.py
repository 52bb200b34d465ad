"""What a session is set up with, from its arguments and the environment, checked before anything is sent."""

import ipaddress
import math
import os
import re
from decimal import Decimal, InvalidOperation
from urllib.parse import urlsplit

from flux2max_async._exceptions import ConfigurationError

DEFAULT_BASE_URL = "https://cloud.vtrix.ai"
# Nearly all hosts are like this; what may be an international name is checked by a codec that takes 13 ms to load.
_PLAIN_HOST = re.compile(r"([\w:-]{1,63}\.)*[\w:-]{1,63}", re.ASCII)
_MOST_DOLLARS = 10**9
KEY_VARIABLE = "FLUX2MAX_API_KEY"
URL_VARIABLE = "FLUX2MAX_BASE_URL"


def validate_api_key(api_key: str | None) -> str:
    """Give the API key, which is never shown in an error.

    Raises:
        ConfigurationError: There is none, or it can't be one.
    """
    key = os.environ.get(KEY_VARIABLE) if api_key is None else api_key
    if not key:
        raise ConfigurationError(f"no API key: pass api_key or set {KEY_VARIABLE}")
    if not isinstance(key, str) or not all("!" <= character <= "~" for character in key):
        raise ConfigurationError(
            "the API key is malformed: it must be printable ASCII without spaces and line ends, and without 'Bearer'"
        )
    return key


def validate_base_url(base_url: str | None) -> str:
    """Give the gateway's address, without a slash at its end.

    Raises:
        ConfigurationError: It is no address to which a key could be sent safely.
    """
    url = (os.environ.get(URL_VARIABLE) or DEFAULT_BASE_URL) if base_url is None else base_url
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
        if host and not _PLAIN_HOST.fullmatch(host):
            host.encode("idna")
    except (ValueError, AttributeError, TypeError) as error:
        raise ConfigurationError("base_url is not a URL") from error
    if parts.username or parts.password:
        raise ConfigurationError("base_url must not hold a user name or password")
    if parts.scheme not in {"http", "https"} or not host or not url.isprintable() or set(url) & set("?#\\ "):
        # It isn't shown: a key may have found its way into it.
        raise ConfigurationError("base_url must look like https://host/prefix, without query, fragment and spaces")
    if parts.scheme == "http" and not _is_this_machine(host):
        raise ConfigurationError(f"base_url must be https for {host}: over http the key could be read on the way")
    return url.rstrip("/")


def validate_seconds(name: str, seconds: float, *, most: float = math.inf) -> float:
    """Give a duration that is more than nothing, and no more than the most.

    Raises:
        ConfigurationError: It is not.
    """
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not seconds > 0:
        raise ConfigurationError(f"{name} must be more than 0 seconds, not {seconds!r}")
    if seconds > most:
        raise ConfigurationError(f"{name} must be at most {most:g} seconds, not {seconds!r}")
    return seconds


def validate_drain(seconds: float) -> float:
    """Give how long closing waits for submitted tasks.

    Raises:
        ConfigurationError: It is no number of seconds.
    """
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not 0 <= seconds < math.inf:
        raise ConfigurationError(f"drain must be 0 seconds or more, not {seconds!r}")
    return seconds


def validate_rate(name: str, rate: float | None) -> float:
    """Give a rate that is more than nothing; None is no limit.

    Raises:
        ConfigurationError: It is not.
    """
    if rate is None:
        return math.inf
    if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not rate > 0:
        raise ConfigurationError(f"{name} must be more than 0, or None for no limit, not {rate!r}")
    return rate


def validate_max_in_flight(places: int) -> int:
    """Give the most tasks to keep in flight.

    Raises:
        ConfigurationError: It is less than one.
    """
    if isinstance(places, bool) or not isinstance(places, int) or places < 1:
        raise ConfigurationError(f"max_in_flight must be an integer of at least 1, not {places!r}")
    return places


def validate_dollars(name: str, dollars: Decimal | float | str | None) -> Decimal | None:
    """Give an amount of money, exactly as it is written; None is none.

    Raises:
        ConfigurationError: It is no amount that could be spent.
    """
    if dollars is None:
        return None
    try:
        amount = Decimal(str(dollars))
    except InvalidOperation:
        amount = Decimal("NaN")
    if isinstance(dollars, bool) or not amount.is_finite() or not 0 <= amount <= _MOST_DOLLARS:
        raise ConfigurationError(f"{name} must be an amount of US dollars, such as 5.00, not {dollars!r}")
    return amount


def _is_this_machine(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
