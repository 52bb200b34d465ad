"""Whether the service answers a session's calls and accepts its account: for readiness checks, and once in the log.

Pure: it does no I/O and reads no clock.
"""

import copy
import math
from typing import Any, Literal

import attrs

from flux2max_async._exceptions import (
    AuthenticationError,
    ConfigurationError,
    FluxError,
    InsufficientBalanceError,
    PermissionDeniedError,
    ProtocolError,
    RateLimitedError,
    ResponseError,
    ServerError,
    TaskFailedError,
    TransportError,
)
from flux2max_async._text import describe, get_logger

log = get_logger("health")

_MAX_FAILURES = 5
"""So many submits, or polls, in a row without an answer mean that the service is silent."""
_FAILURE_LIFETIME = 60.0
"""Seconds for which failures count. Servers that aren't ready get no requests, and would never be ready again."""
_LOG_INTERVAL = 60.0
"""Seconds between two lines about the same problem."""


@attrs.frozen(kw_only=True)
class SessionHealth:
    """Whether a session can serve requests, as far as its calls, which are submits and polls, have shown."""

    state: Literal["open", "draining", "closed"]
    """"closed" also before the session is entered; "draining": nothing more is submitted."""
    ok: bool
    """Whether the session is open, the service has not refused the account (401, 402, 403) or the settings been found
    wrong, and fewer than 5 submits, and fewer than 5 polls, in a row were without an answer. No connection, a timeout,
    5xx and the page of a proxy are no answer; 429 is one. The next success makes it true again, as does a minute in
    which no call fails: servers that aren't ready get no requests, and would never learn that the service is back."""
    waiting: int = 0
    """Requests that wait for a slot."""
    in_flight: int = 0
    """Tasks followed now."""
    last_success: float | None = None
    """How many seconds ago a call succeeded; None: none has since the session was opened."""
    last_error: FluxError | None = None
    """The newest error of a call that counts as a failure, also if others have succeeded since; without its cause."""
    consecutive_failures: int = 0
    """Failed calls in a row: of submits or of polls, whichever are more."""

    def to_dict(self) -> dict[str, Any]:
        """Return the fields for JSON; the error as its class and its message, in which the service may be quoted."""
        error = self.last_error
        data = attrs.asdict(self, recurse=False)
        return {**data, "last_error": error and {"kind": type(error).__name__, "message": describe(error)}}


@attrs.define(eq=False)
class _Calls:
    """The newest calls of one kind: the success of a poll reveals nothing about submits, nor the other way round."""

    failures: int = 0
    """In a row."""
    failed_at: float = -math.inf
    is_refused: bool = False
    """Whether one of them shows that all others will fail in the same way."""

    def has_failed(self, now: float) -> bool:
        """Return whether the next call will probably fail."""
        is_serious = self.is_refused or self.failures >= _MAX_FAILURES
        return is_serious and now < self.failed_at + _FAILURE_LIFETIME


class HealthMonitor:
    """What the ends of a session's calls reveal about the service."""

    def __init__(self) -> None:
        self._submits = _Calls()
        self._polls = _Calls()
        self._succeeded_at: float | None = None
        self._error: FluxError | None = None
        self._logged_at: dict[str, float] = {}
        """By what was logged."""

    def on_success(self, now: float, *, is_poll: bool) -> None:
        """Record that the service has accepted a submit, or answered a poll."""
        self._succeeded_at = now
        calls = self._polls if is_poll else self._submits
        if calls.failures:
            calls.failures = 0
            calls.is_refused = False

    def on_error(self, error: FluxError, now: float, *, is_poll: bool, is_reported: bool) -> None:
        """Record that a call has ended with an error, whoever is to blame for it.

        Args:
            error: The error of the call.
            now: The current time.
            is_poll: Whether the call was a poll, and not a submit.
            is_reported: Whether an `Outage` reports it.
        """
        calls = self._polls if is_poll else self._submits
        advice = _find_advice(error, is_poll=is_poll)
        if advice is None and not _is_failure(error):
            if isinstance(error, (ResponseError, TaskFailedError)) and not calls.is_refused:
                calls.failures = 0  # the service has answered
            return
        calls.failures += 1
        calls.failed_at = now
        # A copy has no traceback, whose frames hold the content of the submit.
        self._error = copy.copy(error)
        if advice is not None:
            calls.is_refused = True
            self._log(now, advice, "every request fails like this one: %s: %s", error, advice)
        elif calls.failures >= _MAX_FAILURES and not is_reported:
            name = "polls" if is_poll else "submits"
            self._log(now, name, "%d %s in a row without an answer of the service: %s", calls.failures, name, error)

    def check(
        self, state: Literal["open", "draining", "closed"], now: float, *, waiting: int, in_flight: int
    ) -> SessionHealth:
        """Return the health of a session in a state."""
        has_failed = self._submits.has_failed(now) or self._polls.has_failed(now)
        return SessionHealth(
            state=state,
            ok=state == "open" and not has_failed,
            waiting=waiting,
            in_flight=in_flight,
            last_success=None if self._succeeded_at is None else now - self._succeeded_at,
            last_error=self._error,
            consecutive_failures=max(self._submits.failures, self._polls.failures),
        )

    def _log(self, now: float, problem: str, message: str, *arguments: object) -> None:
        if now >= self._logged_at.get(problem, -math.inf) + _LOG_INTERVAL:
            self._logged_at[problem] = now
            log.error(message, *arguments)


def _find_advice(error: FluxError, *, is_poll: bool) -> str | None:
    """Return what to check if every call will fail like this one, until somebody puts it right; else None."""
    match error:
        case ConfigurationError():  # no key, or no such API
            return "check the settings of the session"
        case TransportError(fault="certificate" | "tls" | "proxy"):
            return "check base_url, the proxy and the certificates"
        case AuthenticationError(from_api=True):
            return "check the API key (api_key, FLUX2MAX_API_KEY)"
        case InsufficientBalanceError(from_api=True):
            return "check the balance of the account"
        # A poll may be refused because the task is another account's.
        case PermissionDeniedError(from_api=True) if not is_poll:
            return "check what the account and its API key may be used for"
        case _:
            return None


def _is_failure(error: FluxError) -> bool:
    """Return whether a call got no usable answer of the service, or a refusal that may concern other calls, too."""
    match error:
        case RateLimitedError():
            return False
        case TransportError() | ProtocolError() | ServerError() | PermissionDeniedError():
            return True
        case ResponseError(status=status, from_api=from_api):
            return status == 408 or not from_api
        case _:
            return False
