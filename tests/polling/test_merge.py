"""`LearnedSchedule.merge()`: what several schedules have learned, as one would have learned it from the tasks of all."""

import itertools
import json
import math
import random
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flux2max_async import ConfigurationError, LearnedSchedule, PollSchedule
from flux2max_async._polling.histogram import BINS
from flux2max_async._polling.learned import EndedTask

State = Mapping[str, Any]

# ---------------------------------------------------------------------- states


def through_json(schedule: LearnedSchedule) -> State:
    """Return a schedule's state as it comes from a file."""
    state: State = json.loads(json.dumps(schedule.state()))
    return state


def learned_from(tasks: Sequence[EndedTask]) -> State:
    """Return the state of a schedule that has learned from tasks."""
    schedule = LearnedSchedule()
    for task in tasks:
        schedule.replay(task)
    return through_json(schedule)


def around(
    seconds: float, count: int, *, seed: int = 1, spread: float = 0.2, completed: bool = True
) -> list[EndedTask]:
    """Return tasks that took about so many seconds, and were seen to end within a tenth of that."""
    rng = random.Random(seed)
    ends = [seconds * math.exp(rng.gauss(0, spread)) for _ in range(count)]
    return [EndedTask((0.0, 0.0, 0.0), (), end * 0.95, end * 1.05, completed, 0) for end in ends]


SECONDS = st.floats(0.01, 2000.0)
TASKS = st.builds(
    lambda features, readings, times, completed, in_flight: EndedTask(
        features, tuple(readings), min(times), max(times), completed, in_flight
    ),
    st.tuples(st.floats(-2, 3), st.sampled_from([0.0, 1.0, 8.0]), st.floats(0, 5)),
    st.lists(st.tuples(SECONDS, st.floats(0.02, 0.99)), max_size=2),
    st.tuples(SECONDS, SECONDS),
    st.booleans(),
    st.integers(0, 30),
)
# A few tasks again and again, then others: the durations have changed.
REPEATED_TASKS = st.tuples(st.lists(TASKS, max_size=3), st.sampled_from([1, 8, 90])).map(lambda part: part[0] * part[1])
STATES = st.lists(REPEATED_TASKS, max_size=3).map(lambda parts: learned_from([*itertools.chain(*parts)]))


def merged(*states: State) -> State:
    return through_json(LearnedSchedule.merge(*states))


def with_all_bins(state: Any) -> Any:
    """Return a state whose histograms have all bins: which of the outermost are left out depends on the rounding."""
    match state:
        case {"count": count, "first_bin": first, "weights": weights}:
            return {"count": count, "weights": [0.0] * first + weights + [0.0] * (BINS - first - len(weights))}
        case dict():
            return {key: with_all_bins(value) for key, value in state.items()}
        case list() | tuple():
            return [with_all_bins(item) for item in state]
        case _:
            return state


def rounded(state: Any) -> Any:
    """Return what equals a state but for rounding: that of weights to three digits, and that of all numbers."""
    match state:
        case {"count": count, "weights": weights}:
            return {"count": pytest.approx(count), "weights": pytest.approx(weights, rel=0.015, abs=4e-4)}
        case dict():
            return {key: rounded(value) for key, value in state.items()}
        case [dict(), *_]:
            return [rounded(item) for item in state]
        case None:
            return None
        case _:
            return pytest.approx(state, abs=1e-9)


# ---------------------------------------------------------------------- sums


@settings(max_examples=30, deadline=None)
@given(STATES)
def test_a_state_alone_is_kept(state: State) -> None:
    """A schedule that was made from one state has that state, to the last digit."""
    assert merged(state) == state
    assert through_json(LearnedSchedule.from_state(state)) == state


@settings(max_examples=30, deadline=None)
@given(st.lists(STATES, min_size=2, max_size=4), st.randoms(use_true_random=False))
def test_the_order_of_states_does_not_matter(states: list[State], rng: random.Random) -> None:
    """States in another order have the same sum, to the last digit."""
    shuffled = rng.sample(states, len(states))

    assert merged(*shuffled) == merged(*states)


@settings(max_examples=30, deadline=None)
@given(STATES, STATES, STATES)
def test_states_can_be_merged_one_after_the_other(a: State, b: State, c: State) -> None:
    """Which states are merged first makes no difference but for the rounding of what is stored in between."""
    all_at_once = rounded(with_all_bins(merged(a, b, c)))

    assert with_all_bins(merged(merged(a, b), c)) == all_at_once
    assert with_all_bins(merged(a, merged(b, c))) == all_at_once


def test_counts_and_weights_are_added() -> None:
    """A merged histogram has the sum of the counts, and in each bin the sum of the weights."""
    states = [learned_from(around(seconds, 20)) for seconds in (5.0, 6.0, 7.0)]
    histograms = [with_all_bins(state["durations"]["current"]) for state in states]
    total = with_all_bins(merged(*states)["durations"]["current"])

    assert total["count"] == math.fsum(histogram["count"] for histogram in histograms)
    assert total["weights"] == pytest.approx(
        [sum(weights) for weights in zip(*(histogram["weights"] for histogram in histograms), strict=True)], rel=0.006
    )


def test_failures_count_by_the_number_of_tasks() -> None:
    """The failure rate of two hosts is that of all their tasks together."""
    state = merged(learned_from(around(2.0, 30, completed=False)), learned_from(around(8.0, 90)))

    assert state["failure_rate"] == pytest.approx(0.25)
    assert state["finished"] == 120


def test_a_change_that_one_host_has_seen_is_remembered() -> None:
    """The long-term histogram has the tasks of all hosts, also of one that knows of no change and has none."""
    stable, changed = learned_from(around(8.0, 50)), learned_from(around(8.0, 50) + around(40.0, 30))
    total = merged(stable, changed)["durations"]

    assert stable["durations"]["long_term"] is None
    assert total["long_term"]["count"] == pytest.approx(50 + changed["durations"]["long_term"]["count"], rel=0.15)
    assert total["previous"] == changed["durations"]["previous"]
    assert total["change_count"] == changed["durations"]["change_count"] > 0


def test_nothing_merged_is_nothing_learned() -> None:
    """Without states, the schedule is a new one; one that has learned nothing changes no other."""
    state, empty = learned_from(around(8.0, 50)), learned_from([])

    assert merged() == empty
    assert merged(empty, empty) == empty
    assert with_all_bins(merged(empty, state, empty)) == rounded(with_all_bins(state))


# ---------------------------------------------------------------------- what it is good for


def mean_cost(schedule: PollSchedule, tasks: Sequence[EndedTask]) -> float:
    """Return the mean cost of a task: the seconds until its end is seen, and a tenth of a second for each poll."""
    cost = 0.0
    for task in tasks:
        plan, elapsed, running_until = schedule.begin(None), 0.0, 0.0
        while elapsed < task.by:
            running_until = elapsed
            elapsed += plan.next_delay(elapsed, None)
            cost += 0.1
        plan.finish(running_until, elapsed)
        cost += elapsed - task.by
    return cost / len(tasks)


def test_hosts_know_together_what_one_would_know() -> None:
    """Five hosts that have seen a fifth of the tasks each, merged, poll as well as one that has seen all."""
    seen, next_tasks = around(12.0, 60), around(12.0, 6, seed=2)
    hosts = [learned_from(seen[number::5]) for number in range(5)]
    together, alone = (
        mean_cost(LearnedSchedule.merge(*states), next_tasks) for states in (hosts, [learned_from(seen)])
    )

    assert together == pytest.approx(alone, rel=0.1)
    assert together < 0.8 * mean_cost(LearnedSchedule(), next_tasks)


def test_what_many_hosts_know_is_forgotten_as_quickly() -> None:
    """When tasks take longer than all of forty hosts have seen, their merged schedule notices it within ten tasks."""
    schedule = LearnedSchedule.merge(*[learned_from(around(8.0, 300, seed=seed)) for seed in range(40)])
    before = schedule.percentile(50)
    mean_cost(schedule, around(30.0, 10, seed=50))
    after = schedule.percentile(50)

    assert before == pytest.approx(8.0, rel=0.1)
    assert after == pytest.approx(30.0, rel=0.2)
    assert schedule.state()["durations"]["current"]["count"] < 20


def test_a_larger_count_than_one_schedule_remembers_shrinks_with_the_next_task() -> None:
    """The next task counts as much after a merge as it would in a schedule of its own."""
    state = learned_from(around(8.0, 1000))
    schedule = LearnedSchedule.merge(*[state] * 10)
    before = schedule.state()["durations"]["current"]["count"]
    schedule.begin(None).finish(7.9, 8.1)
    after = schedule.state()["durations"]["current"]
    mine = LearnedSchedule.from_state(state)
    mine.begin(None).finish(7.9, 8.1)

    assert before == pytest.approx(10 * state["durations"]["current"]["count"])
    assert with_all_bins(after) == {
        "count": pytest.approx(200.0, abs=1.0),
        "weights": pytest.approx(with_all_bins(mine.state()["durations"]["current"])["weights"], rel=0.03, abs=2e-3),
    }


# ---------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("states", "reason"),
    [
        ([{}], r"states\[0\] must be what LearnedSchedule.state\(\) returned.*durations"),
        ([learned_from([]), None], r"states\[1\] must be what LearnedSchedule.state\(\) returned"),
        ([learned_from([]), {**learned_from([]), "version": 3}], r"states\[1\] must be .*version"),
        ([{**learned_from([]), "finished": 9e8}] * 2, "the states can't be merged: .*finished"),
    ],
    ids=["empty", "no mapping", "another version", "too large"],
)
def test_an_invalid_state_is_named(states: list[Any], reason: str) -> None:
    """A state that `state()` can't have returned is a ConfigurationError that names it, and what is wrong with it."""
    with pytest.raises(ConfigurationError, match=reason):
        LearnedSchedule.merge(*states)


def test_the_price_is_the_callers() -> None:
    """The price is an argument, as for `from_state()`, and checked."""
    assert LearnedSchedule.merge(learned_from([]), poll_price=0.5).poll_price == 0.5
    with pytest.raises(ConfigurationError, match="poll_price"):
        LearnedSchedule.merge(poll_price=0)
