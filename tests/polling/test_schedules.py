"""Poll schedules in virtual time: what they cost, what they learn, and that every delay is valid."""

import copy
import functools
import itertools
import json
import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import attrs
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from flux2max_async import (
    ConfigurationError,
    ExponentialSchedule,
    FixedSchedule,
    GenerationRequest,
    LearnedSchedule,
    PollPlan,
    PollSchedule,
)
from flux2max_async._polling.schedules import CostAwarePlan

POLL_PRICE = 0.1
"""Default of LearnedSchedule, in seconds of delay per poll."""

ProgressFunction = Callable[[float, float], float | None]
"""Returns the progress that a poll reports: (elapsed share of the duration, elapsed seconds) -> progress."""


def drive(plan: PollPlan, duration: float, progress_at: ProgressFunction | None = None) -> tuple[float, int]:
    """Poll one task to its end and let the plan learn; return the delay of the last poll and the number of polls."""
    elapsed, running_until, polls = 0.0, 0.0, 0
    progress: float | None = None
    while elapsed < duration:
        running_until = elapsed
        if polls and progress_at is not None:
            progress = progress_at(elapsed / duration, elapsed)
        elapsed += plan.next_delay(elapsed, progress)
        polls += 1
        assert polls < 10_000, "polling does not end"
    plan.finish(running_until, elapsed)
    return elapsed - duration, polls


def mean_cost(
    schedule: PollSchedule,
    durations: Sequence[float],
    progress_at: ProgressFunction | None = None,
    *,
    poll_price: float = POLL_PRICE,
) -> float:
    """Return the mean cost of a task: the delay until its end is seen, and the price of its polls."""
    results = [drive(schedule.begin(None), duration, progress_at) for duration in durations]
    return sum(delay + poll_price * polls for delay, polls in results) / len(results)


def lognormal(seed: int, count: int, *, median: float = 8.0, spread: float = 0.3) -> list[float]:
    rng = random.Random(seed)
    return [median * math.exp(rng.gauss(0, spread)) for _ in range(count)]


@functools.cache
def _learned(spread: float, median: float, poll_price: float) -> LearnedSchedule:
    schedule = LearnedSchedule(poll_price=poll_price)
    mean_cost(schedule, lognormal(1, 200, median=median, spread=spread))
    return schedule


def learned(*, spread: float = 0.3, median: float = 8.0, poll_price: float = POLL_PRICE) -> LearnedSchedule:
    """Return a schedule that has learned from 200 tasks."""
    return copy.deepcopy(_learned(spread, median, poll_price))


INTERVALS = [0.1 * 1.25**step for step in range(26)]
"""From 0.1 to 26 seconds."""


def poll_times(schedule: PollSchedule, count: int) -> list[float]:
    """Return the times of the first polls of a task."""
    plan = schedule.begin(None)
    times = [0.0]
    for _ in range(count):
        times.append(times[-1] + plan.next_delay(times[-1], None))
    return times[1:]


# ---------------------------------------------------------------------- simple schedules


def test_fixed_schedule_polls_at_its_interval() -> None:
    """Every delay of a fixed schedule is its interval, whatever the elapsed time and the progress are."""
    plan = FixedSchedule(2.5).begin(GenerationRequest("a lighthouse"))
    delays = [plan.next_delay(elapsed, progress) for elapsed in (0.0, 2.5, 1e6) for progress in (None, 0.0, 0.99)]

    assert delays == [2.5] * 9


@pytest.mark.parametrize(
    ("schedule", "delays"),
    [
        (ExponentialSchedule(), [0.5, 1, 2, 4, 8, 10, 10, 10]),
        (ExponentialSchedule(1, factor=3, maximum=20), [1, 3, 9, 20, 20]),
        (ExponentialSchedule(2, factor=1), [2, 2, 2, 2]),
        (ExponentialSchedule(1.0, factor=1.5, maximum=3), [1, 1.5, 2.25, 3, 3]),
        (ExponentialSchedule(30, maximum=10), [10, 10, 10]),
        (ExponentialSchedule(10, maximum=10), [10, 10, 10]),
    ],
    ids=lambda value: "" if isinstance(value, list) else repr(value),
)
def test_exponential_schedule_grows_to_its_maximum(schedule: ExponentialSchedule, delays: list[float]) -> None:
    """The delays start at `initial`, are multiplied by `factor` each time, and never exceed `maximum`."""
    plan = schedule.begin(None)
    found = [plan.next_delay(10.0 * number, 0.5) for number in range(len(delays))]

    assert found == delays


def test_exponential_schedule_never_overflows() -> None:
    """After thousands of polls with an extreme factor, the delay is still the maximum."""
    plan = ExponentialSchedule(1e-3, factor=1e300, maximum=7).begin(None)
    delays = [plan.next_delay(0.0, None) for _ in range(5000)]

    assert delays[0] == 1e-3
    assert set(delays[1:]) == {7}


@pytest.mark.parametrize("schedule", [FixedSchedule(2), ExponentialSchedule(), LearnedSchedule()], ids=repr)
def test_plans_are_independent(schedule: PollSchedule) -> None:
    """Tasks that are polled concurrently don't influence each other's delays."""
    alone = poll_times(schedule, 6)
    plans = [schedule.begin(None) for _ in range(3)]
    concurrent = [0.0] * 3
    for _ in range(6):
        concurrent = [at + plan.next_delay(at, None) for at, plan in zip(concurrent, plans, strict=True)]

    assert concurrent == [alone[-1]] * 3


@pytest.mark.parametrize("schedule", [FixedSchedule(2), ExponentialSchedule()], ids=repr)
def test_simple_schedules_learn_nothing(schedule: PollSchedule) -> None:
    """Ends of tasks, completed or failed, don't change the delays of later tasks."""
    before = poll_times(schedule, 6)
    for duration in (0.1, 8.0, 1000.0):
        schedule.begin(None).finish(duration / 2, duration)
        schedule.begin(None).finish(duration / 2, duration, completed=False)

    assert poll_times(schedule, 6) == before


@pytest.mark.parametrize("schedule", [FixedSchedule(2), ExponentialSchedule()], ids=repr)
def test_simple_schedules_are_immutable(schedule: PollSchedule) -> None:
    """Validated parameters can't be changed afterwards."""
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        schedule.interval = schedule.initial = -1.0  # type: ignore[attr-defined]


INVALID = [0, 0.0, -1, -math.inf, math.inf, math.nan, "2", None, [2], 2j]


@pytest.mark.parametrize("value", INVALID, ids=repr)
@pytest.mark.parametrize(
    ("make", "name"),
    [
        (FixedSchedule, "interval"),
        (ExponentialSchedule, "initial"),
        (lambda value: ExponentialSchedule(maximum=value), "maximum"),
        (lambda value: ExponentialSchedule(factor=value), "factor"),
        (lambda value: LearnedSchedule(poll_price=value), "poll_price"),
    ],
    ids=["Fixed", "initial", "maximum", "factor", "poll_price"],
)
def test_invalid_parameters_are_rejected(make: Callable[[Any], PollSchedule], name: str, value: object) -> None:
    """A parameter that is not a positive number is a ConfigurationError with its name and value."""
    with pytest.raises(ConfigurationError) as caught:
        make(value)

    assert name in str(caught.value)
    assert repr(value) in str(caught.value)


def test_factor_below_one_is_rejected() -> None:
    """An exponential schedule whose delays would shrink is a ConfigurationError."""
    with pytest.raises(ConfigurationError, match="factor must be at least 1"):
        ExponentialSchedule(factor=0.999)


# ---------------------------------------------------------------------- learning


@pytest.mark.parametrize("spread", [0.15, 0.3, 0.5])
def test_learned_schedule_is_cheaper_than_any_fixed_interval(spread: float) -> None:
    """After 200 tasks of about 8 s, delay and polls cost less than at any fixed interval."""
    schedule = learned(spread=spread)
    durations = lognormal(2, 200, spread=spread)
    fixed = {interval: mean_cost(FixedSchedule(interval), durations) for interval in INTERVALS}

    assert mean_cost(schedule, durations) < min(fixed.values())


@pytest.mark.parametrize("median", [1.0, 40.0, 120.0])
def test_other_durations_are_learned_too(median: float) -> None:
    """The prior leaves no bias: tasks of a second or of minutes are learned like those of 8 s."""
    schedule = learned(median=median)
    durations = lognormal(2, 300, median=median)
    fixed = [mean_cost(FixedSchedule(interval * median / 8), durations) for interval in INTERVALS]

    assert mean_cost(schedule, durations) < min(fixed)


def test_first_tasks_cost_little_more() -> None:
    """A schedule that has learned nothing costs less than twice as much as afterwards."""
    durations = lognormal(2, 100)
    first = sum(mean_cost(LearnedSchedule(), [duration]) for duration in durations) / len(durations)

    assert first < 2 * mean_cost(learned(), durations)


def test_changed_durations_are_learned() -> None:
    """When tasks suddenly take four times as long, a hundred of them are enough to learn the new durations."""
    schedule = learned(median=8.0)
    mean_cost(schedule, lognormal(3, 100, median=32.0))
    durations = lognormal(2, 100, median=32.0)

    assert mean_cost(schedule, durations) < 1.1 * mean_cost(learned(median=32.0), durations)


def test_lower_price_makes_more_polls() -> None:
    """The lower `poll_price` is, the more polls a task gets, and the sooner its end is seen."""
    durations = lognormal(2, 100)
    schedules = [learned(poll_price=poll_price) for poll_price in (0.02, 0.1, 0.5)]
    results = [[drive(schedule.begin(None), duration) for duration in durations] for schedule in schedules]
    delays = [sum(delay for delay, _ in result) for result in results]
    polls = [sum(count for _, count in result) for result in results]

    assert delays == sorted(delays)
    assert polls == sorted(polls, reverse=True)


def test_polls_are_dense_where_the_end_is_likely() -> None:
    """The first poll of a learned schedule comes shortly before the likely end, and the next ones follow closely."""
    times = poll_times(learned(spread=0.2), 12)
    gaps = [later - earlier for earlier, later in itertools.pairwise(times)]

    assert 4.0 < times[0] < 8.0
    assert max(gaps[:4]) < 2.0 < times[0]


def test_delays_grow_for_a_task_longer_than_all_others() -> None:
    """The delays of a task that takes a hundred times as long as all others grow, but not faster than its duration."""
    schedule = learned()
    plan = schedule.begin(None)
    delays = [plan.next_delay(elapsed, None) for elapsed in (50.0, 200.0, 800.0, 3200.0)]

    assert delays == sorted(delays)
    assert all(0.5 < delay <= elapsed for delay, elapsed in zip(delays, (50.0, 200.0, 800.0, 3200.0), strict=True))


def test_failures_do_not_change_percentiles() -> None:
    """Failures, which often come at once, don't change what is known of the durations of completed tasks."""
    schedule = learned()
    before = [schedule.percentile(percent) for percent in (10, 50, 90)]
    for _ in range(100):
        schedule.begin(None).finish(0.0, 0.3, completed=False)

    assert [schedule.percentile(percent) for percent in (10, 50, 90)] == before


def test_early_failures_move_the_first_poll() -> None:
    """The first poll comes earlier when many tasks fail early, and later again when they no longer do."""
    schedule = learned()
    without_failures = poll_times(schedule, 1)[0]
    for _ in range(60):
        schedule.begin(None).finish(0.2, 0.4, completed=False)
        schedule.begin(None).finish(7.5, 8.0)
    with_failures = poll_times(schedule, 1)[0]
    mean_cost(schedule, lognormal(3, 2000))

    assert with_failures < without_failures / 4
    assert poll_times(schedule, 1)[0] > without_failures / 2


@pytest.mark.parametrize("seconds", [0.001, 0.02, 0.03, 0.05, 0.1, 0.2, 0.5])
def test_tasks_that_fail_at_once(seconds: float) -> None:
    """Failures within milliseconds, whatever the size of the image, leave the delays of larger images finite."""
    schedule = LearnedSchedule()
    for _ in range(100):
        small = GenerationRequest("a cat", width=512, height=512)
        schedule.begin(small).finish(seconds, seconds, completed=False)
        schedule.begin(small).finish(8.0, 8.0, completed=True)
    plans = [schedule.begin(GenerationRequest("a cat", width=side, height=side)) for side in (64, 512, 2048, 4096)]
    first = [plan.next_delay(0.0, None) for plan in plans]
    later = [plan.next_delay(elapsed, None) for plan, elapsed in zip(plans, (1.0, 7.0, 8.0, 100.0), strict=True)]

    assert all(0.0 < delay < 60.0 for delay in first + later)


def test_duration_from_a_webhook_is_learned_exactly() -> None:
    """An interval whose bounds are equal is learned as that duration."""
    schedule = LearnedSchedule()
    for _ in range(200):
        schedule.begin(None).finish(20.0, 20.0)

    assert schedule.percentile(50) == pytest.approx(20.0, rel=0.03)
    assert schedule.percentile(90) == pytest.approx(20.0, rel=0.05)


def test_percentiles() -> None:
    """Percentiles are None before the first end; after two hundred, they are those of the tasks."""
    schedule = learned(median=12.0, spread=0.3)

    assert LearnedSchedule().percentile(50) is None
    assert schedule.percentile(50) == pytest.approx(12.0, rel=0.1)
    assert schedule.percentile(90) == pytest.approx(12.0 * math.exp(0.3 * 1.2816), rel=0.1)
    assert schedule.percentile(-1) == schedule.percentile(0)
    assert schedule.percentile(101) == schedule.percentile(100)


def test_change_is_detected_within_ten_tasks() -> None:
    """Ten tasks after the service has become three times slower, or fast again, the cost is nearly normal."""
    schedule = learned(median=8.0)
    mean_cost(schedule, lognormal(3, 10, median=25.0))
    slow = mean_cost(schedule, lognormal(4, 30, median=25.0))
    mean_cost(schedule, lognormal(5, 10, median=8.0))
    fast = mean_cost(schedule, lognormal(6, 30, median=8.0))

    assert slow < 1.4 * mean_cost(learned(median=25.0), lognormal(4, 30, median=25.0))
    assert fast < 1.4 * mean_cost(learned(median=8.0), lognormal(6, 30, median=8.0))


def test_previous_durations_are_recalled() -> None:
    """When a service that alternates between fast and slow changes again, three tasks are enough to adapt."""
    schedule = LearnedSchedule()
    for turn in range(6):
        mean_cost(schedule, lognormal(turn, 60, median=8.0 if turn % 2 else 25.0))
    mean_cost(schedule, lognormal(7, 3, median=25.0))

    assert schedule.percentile(50) == pytest.approx(25.0, rel=0.15)


@pytest.mark.parametrize("seed", range(5))
def test_concurrent_start_is_no_change(seed: int) -> None:
    """Of tasks that start together the short ones end first; the long ones that follow are not taken for a change."""
    schedule = LearnedSchedule()
    plans = [schedule.begin(None) for _ in range(24)]
    for plan, duration in zip(plans, sorted(lognormal(seed, 24)), strict=True):
        plan.finish(duration - 0.3, duration)

    assert schedule.percentile(50) == pytest.approx(8.0, rel=0.2)


def test_effect_of_changes_fades() -> None:
    """After two thousand tasks without a change, polling costs no more than if there had never been one."""
    schedule = learned(median=25.0)
    mean_cost(schedule, lognormal(3, 2000, median=8.0))
    durations = lognormal(4, 100, median=8.0)

    assert mean_cost(schedule, durations) < 1.05 * mean_cost(learned(median=8.0), durations)


def test_change_after_a_few_tasks_is_detected() -> None:
    """A change after only five tasks is detected, and their histogram is not kept as a previous one."""
    schedule = LearnedSchedule()
    for _ in range(5):
        schedule.begin(None).finish(0.95, 1.0)
    for _ in range(6):
        schedule.begin(None).finish(58.0, 60.0)

    assert schedule.percentile(50) == pytest.approx(60.0, rel=0.2)
    assert schedule.state()["durations"]["previous"] == []


def test_previous_histograms_are_dropped_when_nothing_changes() -> None:
    """Two thousand equal tasks after a change, the previous and the long-term histograms are gone."""
    schedule = learned(median=25.0)
    for _ in range(20):
        schedule.begin(None).finish(7.8, 8.1)
    after_change = schedule.state()["durations"]
    for _ in range(2000):
        schedule.begin(None).finish(7.8, 8.1)
    stable = schedule.state()["durations"]

    assert len(after_change["previous"]) == 1
    assert after_change["long_term"] is not None
    assert stable["previous"] == []
    assert stable["long_term"] is None


REQUESTS_BY_SIDE = {side: GenerationRequest("a lighthouse", width=side, height=side) for side in (512, 1024, 2048)}


def test_larger_images_are_polled_later() -> None:
    """If images of four times the size take three times as long, polling by size costs less."""
    rng = random.Random(1)
    sides = [rng.choice([512, 1024, 2048]) for _ in range(400)]
    durations = [8.0 * (side / 1024) ** 1.6 * math.exp(rng.gauss(0, 0.1)) for side in sides]
    with_sizes, without_sizes = LearnedSchedule(), LearnedSchedule()
    cost_with_sizes = cost_without_sizes = 0.0
    for number, (side, duration) in enumerate(zip(sides, durations, strict=True)):
        delay, polls = drive(with_sizes.begin(REQUESTS_BY_SIDE[side]), duration)
        other_delay, other_polls = drive(without_sizes.begin(None), duration)
        if number >= 100:
            cost_with_sizes += delay + POLL_PRICE * polls
            cost_without_sizes += other_delay + POLL_PRICE * other_polls
    first = {side: with_sizes.begin(request).next_delay(0.0, None) for side, request in REQUESTS_BY_SIDE.items()}

    assert cost_with_sizes < 0.75 * cost_without_sizes
    assert first[512] < first[1024] / 2 < first[2048] / 4


def test_tasks_that_queue_are_polled_later() -> None:
    """If tasks take longer the more are in flight, a task that starts with many others is polled later."""
    schedule = LearnedSchedule()
    for _ in range(60):
        plans = [schedule.begin(None) for _ in range(10)]
        for number, plan in enumerate(plans, start=1):
            plan.finish(4.0 * number - 0.2, 4.0 * number)
    alone = schedule.begin(None).next_delay(0.0, None)
    concurrent = [schedule.begin(None) for _ in range(9)]

    assert concurrent[-1].next_delay(0.0, None) > 3 * alone


def test_dropped_plan_is_not_in_flight() -> None:
    """A plan that is dropped is no longer in flight, ended or not; a task that has ended is learned from once."""
    schedule = learned()
    before = poll_times(schedule, 3)
    dropped = [schedule.begin(None) for _ in range(500)]
    del dropped
    plan = schedule.begin(None)
    plan.finish(7.0, 8.0)
    after = schedule.state()
    plan.finish(700.0, 800.0)

    assert poll_times(learned(), 3) == before
    assert schedule.state() == after


def test_rare_early_ends_are_found() -> None:
    """When one task in ten begins to end long before the usual first poll, this is learned."""
    schedule = learned(median=15.0, spread=0.15, poll_price=0.05)
    rng = random.Random(5)
    durations = [(1.0 if rng.random() < 0.1 else 15.0) * math.exp(rng.gauss(0, 0.15)) for _ in range(1500)]
    mean_cost(schedule, durations, poll_price=0.05)

    assert schedule.percentile(5) == pytest.approx(1.0, rel=0.5)


def test_first_poll_is_early_for_some_tasks() -> None:
    """One task in twenty-five is polled early, also if the submit took a while."""
    schedule = learned(median=15.0, spread=0.15)
    first = [schedule.begin(None).next_delay(0.3, None) for _ in range(100)]
    early = [delay for delay in first if delay < 0.8 * max(first)]

    assert 2 <= len(early) <= 4


# ---------------------------------------------------------------------- price and cost factor


def test_cost_factor_multiplies_the_price() -> None:
    """A plan's delay is that of a schedule whose price is `poll_price` times the cost factor, for that call only."""
    plan = LearnedSchedule(poll_price=0.1).begin(None)
    delays = [plan.next_delay(6.0, None, cost_factor=cost_factor) for cost_factor in (1.0, 20.0, 1.0)]
    expensive = LearnedSchedule(poll_price=2.0).begin(None)

    assert delays[1] == expensive.next_delay(6.0, None) > 2 * delays[0]
    assert delays[2] == delays[0] == plan.next_delay(6.0, None)


def test_price_is_read_only() -> None:
    """`poll_price` can't be set, and neither it nor repr() is changed by cost factors."""
    schedule = learned(poll_price=0.2)
    plan = schedule.begin(None)
    for cost_factor in (1.0, 4.0, 64.0):
        plan.next_delay(6.0, None, cost_factor=cost_factor)
        assert schedule.poll_price == 0.2
        assert repr(schedule) == "LearnedSchedule(poll_price=0.2)"
    with pytest.raises(AttributeError):
        schedule.poll_price = 2.0  # type: ignore[misc]


def test_users_with_different_cost_factors_share_a_schedule() -> None:
    """Two sessions with different cost factors don't displace each other's cached poll times."""
    schedule = learned()
    cheap, expensive = schedule.begin(None), schedule.begin(None)

    def alternate() -> list[float]:
        return [
            plan.next_delay(6.0, None, cost_factor=cost_factor)
            for _ in range(3)
            for plan, cost_factor in ((cheap, 1.0), (expensive, 8.0))
        ]

    delays = alternate()
    cached = dict(schedule._poll_times)
    delays_again = alternate()

    assert delays == delays_again == delays[:2] * 3
    assert delays[0] < delays[1]
    assert len(cached) == 2
    assert schedule._poll_times.keys() == cached.keys()
    assert all(schedule._poll_times[key] is times for key, times in cached.items())


def test_cached_poll_times_are_dropped_when_a_histogram_changes() -> None:
    """After enough ends to change a histogram, completed or failed, no earlier poll times are used."""
    schedule = learned()
    for completed in (True, False):
        schedule.begin(None).next_delay(6.0, None, cost_factor=8.0)
        before = set(schedule._poll_times.values())
        for _ in range(100):
            schedule.begin(None).finish(7.0, 8.0, completed=completed)
        schedule.begin(None).next_delay(6.0, None)

        assert before
        assert len(schedule._poll_times) == 1
        assert before.isdisjoint(schedule._poll_times.values())


def test_cache_of_poll_times_is_bounded() -> None:
    """A cost factor that differs in every call doesn't make the cache grow without bound."""
    schedule = learned()
    plan = schedule.begin(None)
    delays = [plan.next_delay(6.0, None, cost_factor=1 + number / 100) for number in range(1000)]

    assert delays == sorted(delays)
    assert len(schedule._poll_times) == 128


def test_any_plan_may_support_the_cost_factor() -> None:
    """A plan that derives from CostAwarePlan has the attribute that the poller reads; simple plans don't have it."""

    class UserPlan(CostAwarePlan):
        def next_delay(self, elapsed: float, progress: float | None, *, cost_factor: float = 1.0) -> float:
            return 2.0 * cost_factor

        def finish(self, not_before: float, by: float, *, completed: bool = True) -> None:
            pass

    plans: list[PollPlan] = [UserPlan(), LearnedSchedule().begin(None)]
    plans += [FixedSchedule(2.0).begin(None), ExponentialSchedule().begin(None)]

    assert [getattr(plan, "supports_cost_factor", False) for plan in plans] == [True, True, False, False]


# ---------------------------------------------------------------------- stored state


def varied() -> LearnedSchedule:
    """Return a schedule that has learned from changes, failures, sizes and progress."""
    schedule = learned()
    mean_cost(schedule, lognormal(3, 60, median=25.0), INFORMATIVE["exact"])
    for side, request in REQUESTS_BY_SIDE.items():
        schedule.begin(request).finish(side / 100, side / 90)
        schedule.begin(request).finish(0.1, 0.2, completed=False)
    return schedule


@pytest.mark.parametrize("make", [LearnedSchedule, learned, varied])
def test_state_round_trip(make: Callable[[], LearnedSchedule]) -> None:
    """The state survives JSON, is small, and a schedule made from it costs as much as the original."""
    schedule = make()
    text = json.dumps(schedule.state())
    restored = LearnedSchedule.from_state(json.loads(text), poll_price=0.1)
    durations = lognormal(8, 150, median=20.0)

    assert len(text) < 20_000
    assert (restored.percentile(50) or 0.0) == pytest.approx(schedule.percentile(50) or 0.0, rel=0.03)
    assert mean_cost(restored, durations) == pytest.approx(mean_cost(schedule, durations), rel=0.1)


def test_stored_state_makes_the_first_tasks_cheaper() -> None:
    """The first task costs less than half with a stored state as without."""
    state = learned(spread=0.1).state()
    durations = lognormal(8, 60, spread=0.1)
    with_state = sum(mean_cost(LearnedSchedule.from_state(state), [duration]) for duration in durations)
    without_state = sum(mean_cost(LearnedSchedule(), [duration]) for duration in durations)

    assert with_state < without_state / 2


def _state_without(name: str) -> dict[str, Any]:
    return {key: value for key, value in learned().state().items() if key != name}


def _state_with(**changes: Any) -> dict[str, Any]:
    return learned().state() | changes


def _histogram_state(count: object, first_bin: int, weights: list[float]) -> dict[str, Any]:
    return {"count": count, "first_bin": first_bin, "weights": weights}


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        (None, "state"),
        ({}, "durations"),
        ([1, 2], "state"),
        ("state", "state"),
        (_state_without("durations"), "durations"),
        (_state_with(version=1), "version"),
        (_state_with(version=3), "version"),
        (_state_with(failure_rate=2.0), "failure_rate"),
        (_state_with(finished=-1.0), "finished"),
        (_state_with(finished=math.nan), "finished"),
        (_state_with(unknown=1), "unknown"),
        (_state_with(failure_durations=_histogram_state(1.0, 0, [])), "failure_durations"),
        (_state_with(failure_durations=_histogram_state(1.0, 479, [1.0, 1.0])), "failure_durations"),
        (_state_with(failure_durations=_histogram_state(1.0, 0, [-1.0])), "failure_durations"),
        (_state_with(failure_durations=_histogram_state(1e-300, 0, [1.0])), "count must be 0 or at least 1"),
        (_state_with(failure_durations=_histogram_state("many", 0, [1.0])), "failure_durations"),
        (_state_with(progress={"ratios": [], "scores": []}), "progress"),
        (_state_with(regression={"coefficients": [math.inf, 0.0, 0.0]}), "regression"),
        (_state_with(regression={"coefficients": [0.0]}), "regression"),
    ],
)
def test_invalid_state_is_rejected(state: Any, reason: str) -> None:
    """A state that `state()` can't have returned is a ConfigurationError that names the entry."""
    with pytest.raises(ConfigurationError, match=f"state must be what LearnedSchedule.state\\(\\) returned.*{reason}"):
        LearnedSchedule.from_state(state)


def test_state_contains_no_price() -> None:
    """The price comes from the caller, not from the state, and is validated."""
    assert LearnedSchedule.from_state(learned(poll_price=0.5).state()).poll_price == 0.1
    assert LearnedSchedule.from_state(learned().state(), poll_price=0.3).poll_price == 0.3
    with pytest.raises(ConfigurationError, match="poll_price"):
        LearnedSchedule.from_state(learned().state(), poll_price=0)


def test_outlier_is_forgotten() -> None:
    """A task of ten minutes raises the cost of the next ones only a little, and not for long."""
    durations = lognormal(2, 100)
    normal = mean_cost(learned(), durations)
    schedule = learned()
    schedule.begin(None).finish(590.0, 600.0)
    mean_cost(schedule, lognormal(3, 60))

    assert mean_cost(schedule, durations) < 1.2 * normal


# ---------------------------------------------------------------------- progress


UNINFORMATIVE: dict[str, ProgressFunction] = {
    "always 0": lambda share, elapsed: 0.0,
    "always a half": lambda share, elapsed: 0.5,
    "always 1": lambda share, elapsed: 1.0,
    "stuck at a tenth": lambda share, elapsed: min(share, 0.1),
    "stuck at a half": lambda share, elapsed: min(share, 0.5),
    "at 99 % after a third": lambda share, elapsed: min(3 * share, 0.99),
    "in quarters": lambda share, elapsed: math.floor(4 * share) / 4,
    "backwards": lambda share, elapsed: 1 - share,
    "very slow at first": lambda share, elapsed: share**4,
    "queued, then moving": lambda share, elapsed: 0.01 + elapsed / 1e4 if share < 0.6 else 2.5 * share - 1.5,
    "intermittent": lambda share, elapsed: None if int(elapsed * 7) % 2 else 0.0,
}


@pytest.mark.parametrize("progress_at", UNINFORMATIVE.values(), ids=UNINFORMATIVE)
@pytest.mark.parametrize("spread", [0.15, 0.3, 0.5])
def test_uninformative_progress_does_little_harm(spread: float, progress_at: ProgressFunction) -> None:
    """Progress that is coarse, doesn't move or makes no sense costs little more than no progress at all."""
    durations = lognormal(2, 80, spread=spread)
    without_progress = mean_cost(learned(spread=spread), durations)
    with_progress = mean_cost(learned(spread=spread), durations, progress_at)

    assert with_progress < 1.15 * without_progress


INFORMATIVE: dict[str, ProgressFunction] = {
    "exact": lambda share, elapsed: share,
    "in hundredths": lambda share, elapsed: math.floor(100 * share) / 100,
    "decelerating": lambda share, elapsed: math.sqrt(share),
    "accelerating": lambda share, elapsed: share * share,
}


@pytest.mark.parametrize("progress_at", INFORMATIVE.values(), ids=INFORMATIVE)
@pytest.mark.parametrize("spread", [0.3, 0.5])
def test_informative_progress_is_used(spread: float, progress_at: ProgressFunction) -> None:
    """Progress that moves with the task makes polling clearly cheaper."""
    durations = lognormal(2, 80, spread=spread)
    without_progress = mean_cost(learned(spread=spread), durations)
    with_progress = mean_cost(learned(spread=spread), durations, progress_at)

    assert with_progress < 0.85 * without_progress


def test_progress_is_read_only_if_it_is_worth_a_poll() -> None:
    """The first poll comes early to read the progress, unless polls are too expensive for that."""
    schedule = learned()
    mean_cost(schedule, lognormal(3, 80), INFORMATIVE["exact"])
    plans = [LearnedSchedule.from_state(schedule.state(), poll_price=price).begin(None) for price in (0.1, 10.0)]
    cheap, expensive = (plan.next_delay(0.0, None) for plan in plans)

    assert cheap == pytest.approx(schedule.percentile(5), rel=0.05)
    assert expensive > 8.0


# ---------------------------------------------------------------------- arbitrary input


SECONDS = st.floats(0, 1e9) | st.sampled_from([0.0, 5e-324, 1e-9, 0.05, 8.0, 1e6])
PROGRESS = st.none() | st.floats() | st.floats(0, 1)


@settings(max_examples=200, deadline=None)
@example(poll_price=1e6, ends=[], polls=[(0.0, None), (10.0, None)])
@example(poll_price=0.1, ends=[], polls=[(2.0, 0.5), (4.0, 0.125), (6.0, 0.25), (8.0, 0.5)])
@example(poll_price=0.1, ends=[], polls=[(2.0, 0.75), (4.0, 0.125), (6.0, 0.25), (8.0, 0.5)])
@example(poll_price=0.1, ends=[], polls=[(2.0, 5e-324), (4.0, 1e-323), (6.0, 1.5e-323), (8.0, 2e-323)])
@example(poll_price=0.1, ends=[], polls=[(2.0, 0.5), (4.0, 0.75), (6.0, math.nextafter(1, 0)), (8.0, 1.0)])
@given(
    poll_price=st.floats(1e-6, 1e6),
    ends=st.lists(st.tuples(SECONDS, SECONDS, st.booleans()), max_size=8),
    polls=st.lists(st.tuples(SECONDS, PROGRESS), min_size=1, max_size=6),
)
def test_learned_delays_are_finite_and_positive(
    poll_price: float, ends: list[tuple[float, float, bool]], polls: list[tuple[float, float | None]]
) -> None:
    """Whatever was learned, and whatever times and progress come in any order, the next delay is valid."""
    schedule = LearnedSchedule(poll_price=poll_price)
    for start, end, completed in ends:
        schedule.begin(None).finish(min(start, end), max(start, end), completed=completed)
    plan = schedule.begin(None)
    delays = [plan.next_delay(elapsed, progress) for elapsed, progress in polls]

    assert all(0 < delay < math.inf for delay in delays)


@settings(max_examples=100, deadline=None)
@given(
    initial=st.floats(1e-6, 1e6),
    factor=st.floats(1, 1e300),
    maximum=st.floats(1e-6, 1e6),
    polls=st.lists(st.tuples(SECONDS, PROGRESS), min_size=1, max_size=20),
)
def test_simple_delays_are_within_their_bounds(
    initial: float, factor: float, maximum: float, polls: list[tuple[float, float | None]]
) -> None:
    """Whatever times and progress come in, the delays of the simple schedules are within their bounds."""
    exponential = ExponentialSchedule(initial, factor=factor, maximum=maximum).begin(None)
    fixed = FixedSchedule(initial).begin(None)
    delays = [exponential.next_delay(elapsed, progress) for elapsed, progress in polls]

    assert all(min(initial, maximum) <= delay <= maximum for delay in delays)
    assert delays == sorted(delays)
    assert all(fixed.next_delay(elapsed, progress) == initial for elapsed, progress in polls)


@settings(max_examples=60, deadline=None)
@example(duration=19.0, progress_at=UNINFORMATIVE["stuck at a tenth"])
@example(duration=500.0, progress_at=INFORMATIVE["accelerating"])
@given(
    duration=st.floats(0.01, 600.0), progress_at=st.sampled_from([None, *UNINFORMATIVE.values(), *INFORMATIVE.values()])
)
def test_end_is_seen_in_time(duration: float, progress_at: ProgressFunction | None) -> None:
    """Whatever a task's duration and progress are, its end is seen within half its duration."""
    delay, polls = drive(LearnedSchedule().begin(None), duration, progress_at)

    assert delay <= max(2.5, duration / 2)
    assert polls < 300
