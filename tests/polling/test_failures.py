"""PollFailures: which failures in a row end a task, and when the next poll may be made."""

from itertools import groupby

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flux2max_async import (
    AuthenticationError,
    BadRequestError,
    FluxError,
    InsufficientBalanceError,
    PermissionDeniedError,
    ProtocolError,
    RateLimitedError,
    ResponseError,
    ServerError,
    SessionClosedError,
    TaskNotFoundError,
    TransportError,
)
from flux2max_async._api.poll_timeout import SlowPollError
from flux2max_async._polling.failures import PollFailures

REFUSALS = {
    "400": BadRequestError("no", status=400),
    "401": AuthenticationError("no", status=401),
    "402": InsufficientBalanceError("no", status=402),
    "403": PermissionDeniedError("no", status=403),
    "307": ResponseError("no", status=307),
    "200, 401 in an envelope": AuthenticationError("no", status=200),
}
UNREADABLE = {
    "HTML": ProtocolError("not JSON"),
    "200, error": ResponseError("no", status=200),
}
HARMLESS = {
    "no connection": TransportError("no connection", maybe_sent=False),
    "answer lost": TransportError("reset"),
    "408": BadRequestError("no", status=408),
    "429": RateLimitedError("no", status=429),
    "500": ServerError("no", status=500),
    "503": ServerError("no", status=503),
    "200, 500 in an envelope": ServerError("no", status=200),
    "400 of a firewall": BadRequestError("no", status=400, from_api=False),
    "401 of a firewall": AuthenticationError("no", status=401, from_api=False),
    "402 of a firewall": InsufficientBalanceError("no", status=402, from_api=False),
    "403 of a firewall": PermissionDeniedError("no", status=403, from_api=False),
    "404 of a proxy": TaskNotFoundError("no", status=404, from_api=False),
    "302 of a proxy": ResponseError("no", status=302, from_api=False),
}
NOT_FOUND = TaskNotFoundError("no", status=404)


def record(*failures: tuple[FluxError | None, float], elapsed: float | None = 100.0) -> FluxError | None:
    """Record failures, or None for a success, at some times; return the last result; all others must be None."""
    recorder = PollFailures()
    result: FluxError | None = None
    for error, at in failures:
        assert result is None
        if error is None:
            recorder.reset()
        else:
            result = recorder.record(error, at, elapsed=elapsed)
    return result


def delay_after(*failures: tuple[FluxError, float], elapsed: float | None = 100.0) -> float:
    """Return the delay after some failures that don't end the task, without jitter."""
    recorder = PollFailures()
    for error, at in failures:
        assert recorder.record(error, at, elapsed=elapsed) is None
    return recorder.retry_delay(failures[-1][1], 1.0)


@pytest.mark.parametrize("elapsed", [None, 0.0, 100.0])
@pytest.mark.parametrize("error", REFUSALS.values(), ids=REFUSALS)
def test_refusals(error: FluxError, elapsed: float | None) -> None:
    """A refusal ends the task if it comes three times in a row over at least 10 s, whenever the task was submitted."""
    assert record((error, 0.0), (error, 11.0), elapsed=elapsed) is None
    assert record((error, 0.0), (error, 0.5), (error, 9.9), elapsed=elapsed) is None
    assert record((error, 0.0), (error, 0.5), (error, 10.0), elapsed=elapsed) is error
    assert record((error, 0.0), (error, 1.0), (error, 2.0), (error, 3.0), (error, 10.0), elapsed=elapsed) is error


@pytest.mark.parametrize("error", REFUSALS.values(), ids=REFUSALS)
@pytest.mark.parametrize(
    "between", [None, *HARMLESS.values(), *UNREADABLE.values()], ids=["success", *HARMLESS, *UNREADABLE]
)
def test_refusals_that_are_not_in_a_row(between: FluxError | None, error: FluxError) -> None:
    """A success or another failure in between begins the row anew."""
    first = ((error, 0.0), (error, 5.0), (between, 6.0), (error, 20.0), (error, 25.0))

    assert record(*first, (error, 29.9)) is None
    assert record(*first, (error, 30.0)) is error


@pytest.mark.parametrize("error", REFUSALS.values(), ids=REFUSALS)
def test_another_refusal_is_not_confirmed_by_the_first(error: FluxError) -> None:
    """A refusal is confirmed by the same one only."""
    other = NOT_FOUND

    assert record((error, 0.0), (other, 5.0), (error, 11.0), (other, 20.0), (error, 30.0)) is None
    assert record((other, 0.0), (other, 5.0), (error, 11.0)) is None


@pytest.mark.parametrize("error", HARMLESS.values(), ids=HARMLESS)
def test_failures_that_never_end_a_task(error: FluxError) -> None:
    """A lost connection, the service's own faults and everything that something else answers never end a task."""
    assert record(*((error, 10.0 * number) for number in range(1000))) is None


@pytest.mark.parametrize("error", UNREADABLE.values(), ids=UNREADABLE)
def test_unreadable_answers(error: FluxError) -> None:
    """Five unreadable answers in a row over at least 10 s end the task with a ProtocolError that quotes the last one."""
    assert record(*((error, 10.0 * number) for number in range(4))) is None
    assert record(*((error, float(number)) for number in range(9))) is None
    result = record(*((error, 2.5 * number) for number in range(5)))

    assert isinstance(result, ProtocolError)
    assert str(result) == f"5 unreadable answers in a row: {error}"


def test_different_unreadable_answers_are_one_row() -> None:
    """Whatever can't be read counts alike."""
    html, error = UNREADABLE.values()

    assert isinstance(record((html, 0.0), (error, 3.0), (html, 6.0), (error, 9.0), (html, 12.0)), ProtocolError)


@pytest.mark.parametrize("between", [None, *HARMLESS.values(), REFUSALS["403"]])
def test_unreadable_answers_that_are_not_in_a_row(between: FluxError | None) -> None:
    """A success or another failure begins their row anew, too."""
    html = UNREADABLE["HTML"]
    four = tuple((html, 5.0 * number) for number in range(4))

    assert record(*four, (between, 20.0), *((html, 30.0 + at) for _, at in four)) is None


def test_new_task_that_is_not_visible_yet() -> None:
    """A 404 doesn't end a new task, and is final once the task should be visible, if it has come three times."""
    recorder = PollFailures()
    results = [recorder.record(NOT_FOUND, at, elapsed=at) for at in (1.0, 5.0, 15.0, 29.0, 30.0)]

    assert results == [None, None, None, None, NOT_FOUND]
    assert record((NOT_FOUND, 0.0), (NOT_FOUND, 9.0), elapsed=1e6) is None
    assert record((NOT_FOUND, 0.0), (NOT_FOUND, 9.0), (NOT_FOUND, 10.0), elapsed=1e6) is NOT_FOUND


def test_attached_task_that_does_not_exist() -> None:
    """A 404 of the API ends a task at once that was submitted elsewhere; a proxy's does not."""
    assert record((NOT_FOUND, 0.0), elapsed=None) is NOT_FOUND
    assert record(*((HARMLESS["404 of a proxy"], 10.0 * number) for number in range(100)), elapsed=None) is None


def test_404_of_a_proxy_confirms_nothing() -> None:
    """A proxy's 404 doesn't count among the API's refusals."""
    proxy, refusal = HARMLESS["404 of a proxy"], REFUSALS["403"]

    assert record((proxy, 0.0), (proxy, 5.0), (refusal, 12.0)) is None
    assert record((proxy, 0.0), (proxy, 5.0), (NOT_FOUND, 12.0)) is None


def test_error_without_a_response_is_final() -> None:
    """What is neither a response nor a lost connection ends the polling at once."""
    error = SessionClosedError("closed")

    assert record((error, 0.0)) is error


@pytest.mark.parametrize(
    ("asked", "delay"),
    [(None, 0.5), (0.0, 0.5), (0.1, 0.5), (30.0, 30.0), (120.0, 120.0), (121.0, 120.0), (1e9, 120.0)],
)
@pytest.mark.parametrize("error_class", [ServerError, BadRequestError, PermissionDeniedError])
def test_retry_after(error_class: type[ResponseError], asked: float | None, delay: float) -> None:
    """The next poll waits as long as the service asked, but at most 120 s, and never less than the backoff."""
    error = error_class("no", status=503, retry_after=asked)

    assert delay_after((error, 50.0)) == pytest.approx(delay)


@pytest.mark.parametrize(
    ("asked", "earliest", "latest"),
    [
        (None, 1.0, 1.1),
        (0.0, 0.25, 0.5),
        (0.1, 0.25, 0.5),
        (4.0, 4.0, 4.4),
        (30.0, 30.0, 32.0),
        (121.0, 120.0, 122.0),
        (1e9, 120.0, 122.0),
    ],
)
def test_retry_after_a_429(asked: float | None, earliest: float, latest: float) -> None:
    """After a 429 the next poll waits as long as the service asked, or for a second, and refused polls spread."""
    failures = PollFailures()
    failures.record(RateLimitedError("no", status=429, retry_after=asked), 50.0, elapsed=1.0)

    assert failures.retry_delay(50.0, 0.0) == pytest.approx(earliest)
    assert failures.retry_delay(50.0, 1.0) == pytest.approx(latest)
    assert failures.refused_until == pytest.approx(50.0 + (min(asked, 120.0) if asked is not None else 1.0))


def test_a_slow_poll_is_made_again_at_once() -> None:
    """A poll that was given up is made again at once; from the second in a row on, the usual backoff applies."""
    failures, slow = PollFailures(), SlowPollError("no answer", maybe_sent=True)
    failures.record(slow, 50.0, elapsed=1.0)
    first = failures.is_slow, failures.retry_delay(50.0, 1.0)
    failures.record(slow, 52.0, elapsed=1.0)
    second = failures.is_slow, failures.retry_delay(52.0, 1.0)
    failures.record(HARMLESS["answer lost"], 55.0, elapsed=1.0)
    after_another_failure = failures.is_slow
    failures.record(slow, 55.0, elapsed=1.0)
    failures.reset()

    assert (first, second) == ((True, 0.0), (True, 1.0))
    assert not after_another_failure
    assert not failures.is_slow


def test_retry_after_is_forgotten() -> None:
    """The wait of an earlier failure is not that of the next one."""
    busy, lost = ServerError("no", status=503, retry_after=60.0), HARMLESS["answer lost"]

    assert delay_after((busy, 0.0), (lost, 60.0)) == pytest.approx(1.0)


def test_delay_is_counted_from_the_last_poll() -> None:
    """If the poll was given up later than its failure was recorded, the wait is shorter by that."""
    recorder = PollFailures()
    recorder.record(ServerError("no", status=503, retry_after=30.0), 100.0, elapsed=1.0)

    assert recorder.retry_delay(103.0, 1.0) == pytest.approx(27.0)


def test_last_confirmation_waits() -> None:
    """The poll that would confirm a refusal or an unreadable answer is made when 10 s have passed, no earlier."""
    refusal, html = REFUSALS["403"], UNREADABLE["HTML"]

    assert delay_after((refusal, 0.0)) == pytest.approx(0.5)
    assert delay_after((refusal, 0.0), (refusal, 0.5)) == pytest.approx(9.5)
    assert delay_after(*((html, float(at)) for at in range(3))) == pytest.approx(2.0)
    assert delay_after(*((html, float(at)) for at in range(4))) == pytest.approx(7.0)
    assert delay_after((NOT_FOUND, 0.0), (NOT_FOUND, 0.5), elapsed=1.0) == pytest.approx(1.0)


ANY_ERROR = st.sampled_from([None, NOT_FOUND, *REFUSALS.values(), *UNREADABLE.values(), *HARMLESS.values()])


@settings(max_examples=200, deadline=None)
@given(
    failures=st.lists(st.tuples(ANY_ERROR, st.floats(0.0, 20.0)), max_size=30),
    age=st.none() | st.floats(0.0, 60.0),
    jitter=st.floats(0.0, 1.0),
)
def test_any_failures(failures: list[tuple[FluxError | None, float]], age: float | None, jitter: float) -> None:
    """Only the same failure of the API three times in a row over 10 s ends a task, or five unreadable answers do."""
    recorder, now, row = PollFailures(), 0.0, list[tuple[FluxError, float]]()
    for error, pause in failures:
        now += pause
        if error is None:
            recorder.reset()
            row.clear()
            assert recorder.count == 0
            continue
        row.append((error, now))
        final = recorder.record(error, now, elapsed=None if age is None else age + now)
        if final is None:
            assert recorder.count == len(row)
            assert recorder.retry_delay(now, jitter) >= 0.25
            continue
        if error is NOT_FOUND and age is None:
            assert final is error
            return
        common, tail = next((key, list(group)) for key, group in groupby(reversed(row), key=kind_of))
        assert common is not None
        assert len(tail) >= (5 if common is ProtocolError else 3)
        assert now - tail[-1][1] >= 10.0
        return


def kind_of(failure: tuple[FluxError, float]) -> type[FluxError] | None:
    """Return what the failures of a row have in common; None if the failure can't end a task."""
    error, _ = failure
    if error in HARMLESS.values():
        return None
    return ProtocolError if error in UNREADABLE.values() else type(error)
