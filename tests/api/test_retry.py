"""The retry policy, one table for each question."""

from collections.abc import Callable, Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flux2max_async import (
    AuthenticationError,
    BadRequestError,
    ConfigurationError,
    ContentModeratedError,
    DeadlineExceededError,
    DownloadError,
    FluxError,
    InsufficientBalanceError,
    InvalidRequestError,
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
    NOT_VISIBLE_YET,
    backoff,
    is_fatal_for_batch,
    is_uncertain,
    is_unreadable,
    may_poll_again,
    may_submit_again,
)

CASES: dict[str, FluxError] = {
    "not sent": TransportError("no connection", maybe_sent=False),
    "answer lost": TransportError("reset", maybe_sent=True),
    "no HTTP": ProtocolError("SSH-2.0"),
    "200 with an error": ResponseError("no", 200),
    "299 with an error": ResponseError("no", 299),
    "200 without money": InsufficientBalanceError("no", 200),
    "307": ResponseError("redirect", 307),
    "400": BadRequestError("no", 400),
    "401": AuthenticationError("no", 401),
    "402": InsufficientBalanceError("no", 402),
    "403": PermissionDeniedError("no", 403),
    "403 without money": InsufficientBalanceError("no", 403),
    "404": TaskNotFoundError("no", 404),
    "405": ResponseError("no", 405),
    "408": ResponseError("no", 408),
    "409": ResponseError("no", 409),
    "422": BadRequestError("no", 422),
    "429": RateLimitedError("no", 429),
    "429 with a wait": RateLimitedError("no", 429, retry_after=7.0),
    "500": ServerError("no", 500),
    "502": ServerError("no", 502),
    "503": ServerError("no", 503),
    "503 with a wait": ServerError("no", 503, retry_after=7.0),
    "504": ServerError("no", 504),
    "599": ServerError("no", 599),
    "failed": TaskFailedError("no", "t1"),
    "moderated": ContentModeratedError("no", "t1"),
    "task_timeout": DeadlineExceededError("late", "t1"),
    "uncertain": SubmissionUncertainError("lost"),
    "wrong request": InvalidRequestError("no", "width"),
    "wrong settings": ConfigurationError("no"),
    "closed": SessionClosedError("closed"),
    "download": DownloadError("no"),
    "expired": ResultExpiredError("no"),
    "a fault": FluxError("polling broke"),
}


def table(*yes: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Run a test for every case, with whether its answer is yes."""
    assert set(yes) <= set(CASES)
    rows: Iterable[object] = [pytest.param(error, name in yes, id=name) for name, error in CASES.items()]
    return pytest.mark.parametrize(("error", "expected"), rows)


@table("not sent", "429", "429 with a wait", "503", "503 with a wait")
def test_a_submit_is_repeated_only_when_it_certainly_created_nothing(error: FluxError, expected: bool) -> None:
    """No connection, 429 and 503 leave no task behind; after anything else, the same submit might pay twice."""
    again = may_submit_again(error)

    assert again is expected


@table("answer lost", "no HTTP", "408", "500", "502", "504", "599")
def test_a_submit_is_uncertain_when_its_answer_is_lost(error: FluxError, expected: bool) -> None:
    """Where the call went out and no answer says what became of it, a task may exist."""
    uncertain = is_uncertain(error)

    assert uncertain is expected


@pytest.mark.parametrize("error", CASES.values(), ids=CASES)
def test_what_is_uncertain_is_never_repeated(error: FluxError) -> None:
    """No error both leaves a task possible and lets the same submit go out again."""
    both = may_submit_again(error) and is_uncertain(error)

    assert not both


MISSED_LOOKS = (
    *("not sent", "answer lost", "no HTTP", "200 with an error", "299 with an error", "200 without money"),
    *("408", "429", "429 with a wait", "500", "502", "503", "503 with a wait", "504", "599"),
)


@table(*MISSED_LOOKS, "404")
def test_soon_after_the_submit_a_task_may_not_be_visible_yet(error: FluxError, expected: bool) -> None:
    """A lost poll is a missed look, and so is a 404 shortly after the submit."""
    again = may_poll_again(error, elapsed=NOT_VISIBLE_YET - 0.001)

    assert again is expected


@pytest.mark.parametrize("elapsed", [NOT_VISIBLE_YET, 1e6, None], ids=["later", "much later", "submitted elsewhere"])
@table(*MISSED_LOOKS)
def test_later_a_task_that_is_not_found_is_gone(error: FluxError, expected: bool, elapsed: float | None) -> None:
    """A lost poll is a missed look however late it is; a 404 is the end, at once where the submit was not seen."""
    again = may_poll_again(error, elapsed=elapsed)

    assert again is expected


@table("no HTTP", "200 with an error", "299 with an error", "200 without money")
def test_an_answer_that_is_no_task_is_unreadable(error: FluxError, expected: bool) -> None:
    """Answered, but not with a task: only so many of these in a row are borne."""
    unreadable = is_unreadable(error)

    assert unreadable is expected


@pytest.mark.parametrize("error", CASES.values(), ids=CASES)
def test_what_is_unreadable_may_be_looked_at_again(error: FluxError) -> None:
    """Every unreadable answer is a missed look, so that the poller counts them instead of ending at the first."""
    ends_at_once = is_unreadable(error) and not may_poll_again(error, elapsed=None)

    assert not ends_at_once


@table("401", "402", "403", "403 without money", "200 without money")
def test_some_refusals_would_meet_every_further_submit(error: FluxError, expected: bool) -> None:
    """A key that is wrong, poor or forbidden dooms the rest of a stream; nothing else does."""
    doomed = is_fatal_for_batch(error)

    assert doomed is expected


@pytest.mark.parametrize(
    ("failures", "least", "most"),
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
def test_the_wait_doubles_up_to_a_limit(failures: int, least: float, most: float) -> None:
    """Chance draws the wait between half and whole of what doubles with each failure, up to 15 s."""
    waits = [backoff(failures, chance) for chance in (0.0, 0.5, 1.0)]

    assert waits == [least, (least + most) / 2, most]


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 10**6), st.floats(0, 1))
def test_the_wait_is_never_nothing_and_never_long(failures: int, chance: float) -> None:
    """However many failures and whatever the chance, the wait is between a quarter of a second and 15 s."""
    wait = backoff(failures, chance)

    assert 0.25 <= wait <= 15.0
