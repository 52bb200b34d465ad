"""Deadline: a task is never given up without a poll that could have found its end."""

import math
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flux2max_async._polling.deadline import GRACE_PERIOD, MAX_LATENESS, Deadline

AT = 100.0


def create() -> Deadline:
    return Deadline.create(AT, 60.0, float)


def poll(deadline: Deadline, sent_at: float, ended_at: float, *, is_answered: bool) -> float:
    within = deadline.begin_poll(sent_at)
    deadline.end_poll(sent_at, ended_at, is_answered=is_answered)
    return within


@pytest.mark.parametrize(
    ("sent_at", "ended_at", "is_answered", "over_at", "is_over"),
    [
        pytest.param(99.0, 99.1, True, 100.0, True, id="final poll answered"),
        pytest.param(99.0, 99.1, False, 100.0, True, id="final poll failed"),
        pytest.param(99.0, 100.0, False, 100.0, True, id="final poll hung"),
        pytest.param(70.0, 100.0, False, 100.0, True, id="hung from long before until the deadline"),
        pytest.param(70.0, 100.4, False, 100.4, True, id="hung, and the timer a little late"),
        pytest.param(99.0, 99.1, True, 104.0, True, id="late by less than the grace period after an answer"),
        pytest.param(99.0, 99.1, True, 3700.0, False, id="an hour late after an answer"),
        pytest.param(99.0, 3700.0, False, 3700.0, False, id="an hour late during the final poll"),
        pytest.param(99.0, 103.0, False, 103.0, False, id="a few seconds late during the final poll"),
        pytest.param(70.0, 3700.0, False, 3700.0, False, id="an hour late during an earlier poll"),
        pytest.param(70.0, 99.5, False, 100.0, False, id="an earlier poll failed after the time of the final one"),
        pytest.param(70.0, 99.5, True, 100.0, False, id="an earlier poll answered after the time of the final one"),
        pytest.param(70.0, 70.1, True, 100.0, False, id="no final poll"),
    ],
)
def test_when_the_deadline_ends_a_task(
    sent_at: float, ended_at: float, is_answered: bool, over_at: float, is_over: bool
) -> None:
    """The deadline ends a task only if its newest poll could have found its end, moments before."""
    deadline = create()
    poll(deadline, sent_at, ended_at, is_answered=is_answered)

    assert deadline.is_over(over_at, is_paused=False) is is_over


@pytest.mark.parametrize(
    ("prepare", "now", "is_over"),
    [
        pytest.param(lambda _: None, AT, True, id="on time"),
        pytest.param(lambda _: None, AT + 1.0, False, id="late"),
        pytest.param(lambda deadline: deadline.extend(AT), AT + GRACE_PERIOD, False, id="extended"),
    ],
)
def test_a_pause_past_the_deadline(prepare: Callable[[Deadline], None], now: float, is_over: bool) -> None:
    """A pause that the service asked for may leave no time for a final poll, unless the deadline is an extended one."""
    deadline = create()
    prepare(deadline)

    assert deadline.is_over(now, is_paused=True) is is_over


@pytest.mark.parametrize(
    ("sent_at", "within"),
    [
        pytest.param(50.0, 50.0, id="early"),
        pytest.param(99.0, 1.0, id="on time"),
        pytest.param(99.4, 0.6, id="a little late"),
        pytest.param(99.9, GRACE_PERIOD, id="with no time left"),
        pytest.param(3700.0, GRACE_PERIOD, id="an hour late"),
    ],
)
def test_time_for_the_final_poll(sent_at: float, within: float) -> None:
    """A final poll that is sent too late gets the whole grace period, and no other poll does."""
    deadline = create()

    assert poll(deadline, sent_at, sent_at, is_answered=True) == pytest.approx(within)
    assert deadline.begin_poll(sent_at) == pytest.approx(within if deadline.at > sent_at else 0.0)


def test_an_answer_ends_an_extension() -> None:
    """In the grace period polls may fail, but the first answer, that it is running, ends the task."""
    deadline = create()
    deadline.extend(3700.0)
    poll(deadline, 3700.0, 3700.1, is_answered=False)
    after_failure = deadline.at
    poll(deadline, 3701.0, 3701.1, is_answered=True)

    assert after_failure == 3700.0 + GRACE_PERIOD
    assert deadline.at == 3701.1
    assert deadline.is_over(3701.1, is_paused=False)


def test_a_loop_that_is_always_late_does_not_put_the_deadline_off_for_ever() -> None:
    """After three polls that failed late, the next one is the last: an answer may never be read in time."""
    deadline, now, extensions = Deadline.create(AT, 60.0, float), AT, 0
    while not deadline.is_over(now, is_paused=False):
        deadline.extend(now)
        extensions += 1
        now += GRACE_PERIOD + 1.0
        poll(deadline, now - GRACE_PERIOD - 1.0, now, is_answered=False)

    assert extensions == 4


@pytest.mark.parametrize(("seconds", "is_final"), [(1.0, True), (GRACE_PERIOD, True), (GRACE_PERIOD + 0.1, False)])
def test_slow_answer_when_the_final_poll_is_due(seconds: float, *, is_final: bool) -> None:
    """An answer that comes while the final poll is due counts as that, unless it may have been held up itself."""
    deadline = Deadline.create(AT, 60.0, float)
    poll(deadline, AT - 0.1 - seconds, AT - 0.1, is_answered=True)

    assert (deadline.until_final_poll(AT - 0.1, math.inf) == math.inf) is is_final


def test_no_deadline() -> None:
    """Without a deadline there is no final poll but that of a drain, and nothing is ever late."""
    deadline = Deadline.create(math.inf, math.inf, float)

    assert deadline.until_final_poll(0.0, math.inf) == math.inf
    assert deadline.until_final_poll(0.0, 5.0) == 5.0
    assert poll(deadline, 6.0, 6.1, is_answered=True) == math.inf
    assert deadline.until_final_poll(7.0, 5.0) == math.inf


seconds = st.floats(0.0, 20.0)
gaps = st.one_of(st.just(0.0), st.just(0.0), st.floats(0.0, 1.0), st.floats(0.0, 10_000.0))


@given(
    st.lists(st.tuples(seconds, gaps, st.sampled_from(["answer", "failure", "hang"]), seconds, gaps), max_size=30),
    st.sampled_from([1.0, 5.0, 30.0, 600.0]),
    st.sampled_from([3.0, 30.0]),
)
def test_whatever_happens_there_is_an_honest_poll(
    steps: list[tuple[float, float, str, float, float]], task_timeout: float, http_timeout: float
) -> None:
    """The end comes after a poll near the deadline that had time for an answer, or after three that were held up."""
    now = 0.0
    deadline = Deadline.create(task_timeout, task_timeout, float)
    honest: list[tuple[float, float]] = []
    held_up, late_polls = 0.0, 0
    steps = [*steps, *[(20.0, 0.0, "answer", 0.1, 0.0)] * 60]
    for delay, gap, kind, duration, gap_in_poll in steps:
        wakes_at = now + min(delay, deadline.until_final_poll(now, math.inf), max(deadline.at - now, 0.0))
        is_last = wakes_at >= deadline.at
        now = wakes_at + gap
        held_up += gap
        if is_last and deadline.is_over(now, is_paused=False):
            break
        if is_last:
            deadline.extend(now)
        sent_at, limit = now, min(deadline.begin_poll(now), http_timeout)
        is_cut = kind == "hang" or duration > limit or gap_in_poll > limit
        now += max(limit if is_cut else duration, gap_in_poll)
        held_up += gap_in_poll
        is_answered = kind == "answer" and not is_cut
        deadline.end_poll(sent_at, now, is_answered=is_answered)
        # One whose own HTTP timeout was noticed late counts, too, if the deadline has not passed meanwhile.
        if is_answered or now <= max(deadline.at, sent_at + max(limit, 0.0)) + MAX_LATENESS:
            honest.append((sent_at, now))
        if not is_answered and now > deadline.at + MAX_LATENESS:
            late_polls += 1
    else:
        raise AssertionError("the task is never given up")

    if late_polls < 3:
        margin = min(1.0, task_timeout / 10)
        last_honest = max(ended_at for _, ended_at in honest)
        assert last_honest >= task_timeout - margin - 0.02
        assert last_honest >= now - 2 * GRACE_PERIOD - 0.02
    assert now <= task_timeout + held_up + 30 * (GRACE_PERIOD + MAX_LATENESS) + 1.0
