"""The retry policy: one table of cases for each decision."""

from collections.abc import Callable, Iterable
from typing import TypeVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flux2max_async import (
    AuthenticationError,
    BadRequestError,
    BudgetExceededError,
    ConfigurationError,
    ContentModeratedError,
    DeadlineExceededError,
    DownloadError,
    FluxError,
    InFlightLimitError,
    InsufficientBalanceError,
    InvalidRequestError,
    JournalError,
    PermissionDeniedError,
    ProtocolError,
    RateLimitedError,
    ResponseError,
    ResultExpiredError,
    ServerError,
    SessionClosedError,
    SubmissionUncertainError,
    TaskFailedError,
    TaskNotFoundError,
    TransportError,
)
from flux2max_async._api.retry import (
    MAX_PAUSE,
    NOT_FOUND_GRACE_PERIOD,
    backoff,
    is_fatal_for_batch,
    is_lasting,
    is_uncertain,
    is_unreadable,
    may_poll_again,
    may_submit_again,
    min_delay,
)
from flux2max_async._config import NoKeyError

ErrorT = TypeVar("ErrorT", bound=FluxError)


def of_poll(error: ErrorT) -> ErrorT:
    """Return the error of a task's poll, which has the task's id."""
    error.task_id = "t1"
    return error


def last_of_several(error: ErrorT) -> ErrorT:
    """Return the error that was the last of too many in a row."""
    error.stops_stream = True
    return error


CASES: dict[str, FluxError] = {
    "not sent": TransportError("no connection", maybe_sent=False),
    "response lost": TransportError("reset", maybe_sent=True),
    "untrusted certificate": TransportError("no", maybe_sent=False, fault="certificate"),
    "no TLS": TransportError("no", maybe_sent=False, fault="tls"),
    "refused by the proxy": TransportError("no", maybe_sent=False, fault="proxy"),
    "unknown host": TransportError("no", maybe_sent=False, fault="unknown_host"),
    "not HTTP": ProtocolError("SSH-2.0"),
    "200, error": ResponseError("no", status=200),
    "299, error": ResponseError("no", status=299),
    "200, no balance": InsufficientBalanceError("no", status=200),
    "200, 401 in an envelope": AuthenticationError("no", status=200),
    "200, 403 in an envelope": PermissionDeniedError("no", status=200),
    "200, 404 in an envelope": TaskNotFoundError("no", status=200),
    "200, 429 in an envelope": RateLimitedError("no", status=200),
    "200, 500 in an envelope": ServerError("no", status=200),
    "307": ResponseError("redirect", status=307),
    "400": BadRequestError("no", status=400),
    "401": AuthenticationError("no", status=401),
    "402": InsufficientBalanceError("no", status=402),
    "403": PermissionDeniedError("no", status=403),
    "403, no balance": InsufficientBalanceError("no", status=403),
    "404": TaskNotFoundError("no", status=404),
    "405": ResponseError("no", status=405),
    "408": ResponseError("no", status=408),
    "409": ResponseError("no", status=409),
    "422": BadRequestError("no", status=422),
    "400 of a firewall": BadRequestError("no", status=400, from_api=False),
    "401 of a firewall": AuthenticationError("no", status=401, from_api=False),
    "402 of a firewall": InsufficientBalanceError("no", status=402, from_api=False),
    "403 of a firewall": PermissionDeniedError("no", status=403, from_api=False),
    "404 of a firewall": TaskNotFoundError("no", status=404, from_api=False),
    "302 of a firewall": ResponseError("no", status=302, from_api=False),
    "third 403 of a firewall": last_of_several(PermissionDeniedError("no", status=403, from_api=False)),
    "401 of a poll": of_poll(AuthenticationError("no", status=401)),
    "402 of a poll": of_poll(InsufficientBalanceError("no", status=402)),
    "403 of a poll": of_poll(PermissionDeniedError("no", status=403)),
    "408, no balance": InsufficientBalanceError("no", status=408),
    "429, no balance": InsufficientBalanceError("no", status=429),
    "429": RateLimitedError("no", status=429),
    "429, Retry-After": RateLimitedError("no", status=429, retry_after=7.0),
    "500": ServerError("no", status=500),
    "502": ServerError("no", status=502),
    "503": ServerError("no", status=503),
    "503, Retry-After": ServerError("no", status=503, retry_after=7.0),
    "504": ServerError("no", status=504),
    "599": ServerError("no", status=599),
    "failed": TaskFailedError("no", task_id="t1"),
    "moderated": ContentModeratedError("no", task_id="t1"),
    "moderated at the submit": ContentModeratedError("no"),
    "deadline exceeded": DeadlineExceededError("late", task_id="t1"),
    "uncertain": SubmissionUncertainError("lost"),
    "uncertain probe": last_of_several(SubmissionUncertainError("lost")),
    "budget": BudgetExceededError("spent"),
    "journal": JournalError("full"),
    "shared limit": InFlightLimitError("away"),
    "invalid request": InvalidRequestError("no", field="width"),
    "invalid settings": ConfigurationError("no"),
    "no key": NoKeyError("the vault is sealed"),
    "closed": SessionClosedError("closed"),
    "download": DownloadError("no"),
    "expired": ResultExpiredError("no"),
    "other": FluxError("polling failed"),
}


def table(*true_cases: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Parametrize a test with every case, and with whether its expected result is True."""
    assert set(true_cases) <= set(CASES)
    rows: Iterable[object] = [pytest.param(error, name in true_cases, id=name) for name, error in CASES.items()]
    return pytest.mark.parametrize(("error", "expected"), rows)


LASTING = ("untrusted certificate", "no TLS", "refused by the proxy")


@table("not sent", "unknown host", "429", "429, Retry-After", "503", "503, Retry-After", "200, 429 in an envelope")
def test_submit_is_retried_only_if_it_certainly_created_nothing(error: FluxError, expected: bool) -> None:
    """After no connection, a 429 or a 503 there is no task; after anything else, a retry might be paid for twice."""
    result = may_submit_again(error)

    assert result is expected


@table("response lost", "not HTTP", "408", "500", "502", "504", "599")
def test_submit_is_uncertain_if_its_response_is_lost(error: FluxError, expected: bool) -> None:
    """If the request may have been sent and no response reports its result, a task may exist."""
    result = is_uncertain(error)

    assert result is expected


@pytest.mark.parametrize("error", CASES.values(), ids=CASES)
def test_uncertain_submit_is_never_retried(error: FluxError) -> None:
    """No error is both uncertain and retried."""
    both = may_submit_again(error) and is_uncertain(error)

    assert not both


@table(*LASTING, "unknown host")
def test_reasons_that_last(error: FluxError, expected: bool) -> None:
    """Some connections fail in the same way again; a host has to be unknown twice in a row."""
    assert is_lasting(error, error) is expected
    for other in (None, CASES["not sent"], CASES["429"], CASES["untrusted certificate"]):
        assert is_lasting(error, other) is (expected and error is not CASES["unknown host"])


@pytest.mark.parametrize(
    ("name", "seconds"),
    [("not sent", 0.0), ("unknown host", 2.0), ("429", 0.0), ("503, Retry-After", 7.0), ("no TLS", 0.0)],
)
def test_min_delay(name: str, seconds: float) -> None:
    """A call is not repeated before the service allows it, nor an unknown host looked up again at once."""
    assert min_delay(CASES[name]) == seconds
    assert min_delay(RateLimitedError("no", status=429, retry_after=1e6)) == MAX_PAUSE


RETRIED_POLLS = (
    *(*LASTING, "unknown host", "no key"),
    *("not sent", "response lost", "not HTTP", "200, error", "299, error", "200, no balance"),
    *("408", "429", "429, Retry-After", "500", "502", "503", "503, Retry-After", "504", "599"),
    *("200, 429 in an envelope", "200, 500 in an envelope", "408, no balance"),
    *(f"{status} of a firewall" for status in ("302", "400", "401", "402", "403", "404", "third 403")),
)


@table(*RETRIED_POLLS, "404", "200, 404 in an envelope")
def test_poll_is_retried_soon_after_the_submit(error: FluxError, expected: bool) -> None:
    """A failed poll is retried, and so is a 404 soon after the submit."""
    result = may_poll_again(error, elapsed=NOT_FOUND_GRACE_PERIOD - 0.001)

    assert result is expected


@pytest.mark.parametrize(
    "elapsed", [NOT_FOUND_GRACE_PERIOD, 1e6, None], ids=["later", "much later", "submitted elsewhere"]
)
@table(*RETRIED_POLLS)
def test_poll_is_not_retried_after_a_late_404(error: FluxError, expected: bool, elapsed: float | None) -> None:
    """A failed poll is retried at any time; a 404 is final after the grace period, or if the submit was made elsewhere."""
    result = may_poll_again(error, elapsed=elapsed)

    assert result is expected


@table("not HTTP", "200, error", "299, error", "200, no balance")
def test_response_that_is_not_a_task_is_unreadable(error: FluxError, expected: bool) -> None:
    """A response that was received, but is not a task, is unreadable; the poller limits these in a row."""
    result = is_unreadable(error)

    assert result is expected


@pytest.mark.parametrize("error", CASES.values(), ids=CASES)
def test_unreadable_response_is_retried(error: FluxError) -> None:
    """Every unreadable response is retried, so that the poller can count them."""
    is_final = is_unreadable(error) and not may_poll_again(error, elapsed=None)

    assert not is_final


@table(
    *("401", "402", "403", "403, no balance", "200, no balance", "408, no balance", "429, no balance"),
    *("200, 401 in an envelope", "200, 403 in an envelope", "401 of a poll", "402 of a poll"),
    *("third 403 of a firewall", "uncertain probe", "invalid settings", "budget", "journal", "shared limit"),
    *(*LASTING, "unknown host", "no key"),
)
def test_errors_that_are_fatal_for_a_batch(error: FluxError, expected: bool) -> None:
    """What every further submit would meet ends a stream; a single answer of a firewall and a poll's 403 do not."""
    result = is_fatal_for_batch(error)

    assert result is expected


@pytest.mark.parametrize(
    ("failures", "shortest", "longest"),
    [
        (1, 0.25, 0.5),
        (2, 0.5, 1.0),
        (3, 1.0, 2.0),
        (4, 2.0, 4.0),
        (5, 4.0, 8.0),
        (6, 7.5, 15.0),
        (7, 7.5, 15.0),
        (1000, 7.5, 15.0),
    ],
)
def test_backoff_doubles_up_to_a_limit(failures: int, shortest: float, longest: float) -> None:
    """The jitter selects a delay between half and all of a value that doubles with each failure, up to 15 s."""
    delays = [backoff(failures, jitter) for jitter in (0.0, 0.5, 1.0)]

    assert delays == [shortest, (shortest + longest) / 2, longest]


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 10**6), st.floats(0, 1))
def test_backoff_is_bounded(failures: int, jitter: float) -> None:
    """For any number of failures and any jitter, the delay is between 0.25 and 15 s."""
    delay = backoff(failures, jitter)

    assert 0.25 <= delay <= 15.0
