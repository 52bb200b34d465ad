"""Schedules, driven in virtual time: what they cost, and that nothing throws them off."""

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

PRICE = 0.1
"""Seconds of waiting that one poll is worth: the default of LearnedSchedule."""

Progress = Callable[[float, float], float | None]
"""What a poll says, from the share of the way that is done and the seconds since the submit."""


def drive(plan: PollPlan, duration: float, progress: Progress | None = None) -> tuple[float, int]:
    """Poll one task to its end, and let the plan learn; gives how late the end was seen, and the polls it took."""
    elapsed, seen_running, polls = 0.0, 0.0, 0
    said: float | None = None
    while elapsed < duration:
        seen_running = elapsed
        if polls and progress is not None:
            said = progress(elapsed / duration, elapsed)
        elapsed += plan.next_delay(elapsed, said)
        polls += 1
        assert polls < 10_000, "a task is polled without end"
    plan.finish(seen_running, elapsed)
    return elapsed - duration, polls


def cost(
    schedule: PollSchedule, durations: Sequence[float], progress: Progress | None = None, *, price: float = PRICE
) -> float:
    """Give the mean cost of a task: the delay of seeing its end, and the price of its polls."""
    ends = [drive(schedule.begin(None), duration, progress) for duration in durations]
    return sum(delay + price * polls for delay, polls in ends) / len(ends)


def lognormal(seed: int, count: int, *, median: float = 8.0, spread: float = 0.3) -> list[float]:
    chance = random.Random(seed)
    return [median * math.exp(chance.gauss(0, spread)) for _ in range(count)]


@functools.cache
def _taught(spread: float, median: float, price: float) -> LearnedSchedule:
    schedule = LearnedSchedule(poll_price=price)
    cost(schedule, lognormal(1, 200, median=median, spread=spread))
    return schedule


def learned(*, spread: float = 0.3, median: float = 8.0, price: float = PRICE) -> LearnedSchedule:
    """Give a schedule that started from nothing and has seen 200 tasks."""
    return copy.deepcopy(_taught(spread, median, price))


INTERVALS = [0.1 * 1.25**step for step in range(26)]
"""From a tenth of a second to half a minute."""


def moments(schedule: PollSchedule, count: int) -> list[float]:
    """Give the moments of the first polls of a task."""
    plan = schedule.begin(None)
    found = [0.0]
    for _ in range(count):
        found.append(found[-1] + plan.next_delay(found[-1], None))
    return found[1:]


# ---------------------------------------------------------------------- the simple ones


def test_a_fixed_schedule_polls_at_its_interval() -> None:
    """Every delay of a fixed schedule is its interval, whatever the task says."""
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
def test_an_exponential_schedule_grows_to_its_maximum(schedule: ExponentialSchedule, delays: list[float]) -> None:
    """The delays start at `initial`, are multiplied by `factor` each time, and never pass `maximum`."""
    plan = schedule.begin(None)
    found = [plan.next_delay(10.0 * number, 0.5) for number in range(len(delays))]

    assert found == delays


def test_an_exponential_schedule_never_overflows() -> None:
    """After thousands of polls and with the wildest factor, the delay is still the maximum."""
    plan = ExponentialSchedule(1e-3, factor=1e300, maximum=7).begin(None)
    delays = [plan.next_delay(0.0, None) for _ in range(5000)]

    assert delays[0] == 1e-3
    assert set(delays[1:]) == {7}


@pytest.mark.parametrize("schedule", [FixedSchedule(2), ExponentialSchedule(), LearnedSchedule()], ids=repr)
def test_each_task_has_a_plan_of_its_own(schedule: PollSchedule) -> None:
    """Tasks that are polled side by side don't disturb each other's delays."""
    alone = moments(schedule, 6)
    plans = [schedule.begin(None) for _ in range(3)]
    side_by_side = [0.0] * 3
    for _ in range(6):
        side_by_side = [at + plan.next_delay(at, None) for at, plan in zip(side_by_side, plans, strict=True)]

    assert side_by_side == [alone[-1]] * 3


@pytest.mark.parametrize("schedule", [FixedSchedule(2), ExponentialSchedule()], ids=repr)
def test_the_simple_schedules_learn_nothing(schedule: PollSchedule) -> None:
    """Ends of tasks, completed or failed, leave the delays of later tasks as they were."""
    before = moments(schedule, 6)
    for duration in (0.1, 8.0, 1000.0):
        schedule.begin(None).finish(duration / 2, duration)
        schedule.begin(None).finish(duration / 2, duration, completed=False)

    assert moments(schedule, 6) == before


@pytest.mark.parametrize("schedule", [FixedSchedule(2), ExponentialSchedule()], ids=repr)
def test_a_simple_schedule_cannot_be_changed(schedule: PollSchedule) -> None:
    """What was checked stays as it was checked."""
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        schedule.interval = schedule.initial = -1.0  # type: ignore[attr-defined]


WRONG = [0, 0.0, -1, -math.inf, math.inf, math.nan, "2", None, [2], 2j]


@pytest.mark.parametrize("value", WRONG, ids=repr)
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
def test_a_senseless_schedule_is_refused_by_name(make: Callable[[Any], PollSchedule], name: str, value: object) -> None:
    """A number that no schedule can work with, or no number at all, is a ConfigurationError with its name and value."""
    with pytest.raises(ConfigurationError) as caught:
        make(value)

    assert name in str(caught.value)
    assert repr(value) in str(caught.value)


def test_a_factor_below_one_is_refused() -> None:
    """Delays that shrink to nothing are no schedule."""
    with pytest.raises(ConfigurationError, match="factor must be at least 1"):
        ExponentialSchedule(factor=0.999)


# ---------------------------------------------------------------------- learning


@pytest.mark.parametrize("spread", [0.15, 0.3, 0.5])
def test_after_learning_no_fixed_interval_is_cheaper(spread: float) -> None:
    """Starting from nothing, after 200 tasks of 8 s or so, delay and polls cost less than at any fixed interval."""
    schedule = learned(spread=spread)
    durations = lognormal(2, 200, spread=spread)
    fixed = {interval: cost(FixedSchedule(interval), durations) for interval in INTERVALS}

    assert cost(schedule, durations) < min(fixed.values())


@pytest.mark.parametrize("median", [1.0, 40.0, 120.0])
def test_it_learns_other_durations_too(median: float) -> None:
    """Tasks of a second or of minutes are learned like those of 8 s: the initial guess is no bias that stays."""
    schedule = learned(median=median)
    durations = lognormal(2, 300, median=median)
    fixed = [cost(FixedSchedule(interval * median / 8), durations) for interval in INTERVALS]

    assert cost(schedule, durations) < min(fixed)


def test_the_first_tasks_are_not_left_alone() -> None:
    """Before it has learned anything, a schedule costs little more than afterwards."""
    durations = lognormal(2, 100)
    first = sum(cost(LearnedSchedule(), [duration]) for duration in durations) / len(durations)

    assert first < 2 * cost(learned(), durations)


def test_it_follows_a_service_that_changes() -> None:
    """When tasks suddenly take four times as long, a hundred of them are enough to learn it anew."""
    schedule = learned(median=8.0)
    cost(schedule, lognormal(3, 100, median=32.0))
    durations = lognormal(2, 100, median=32.0)

    assert cost(schedule, durations) < 1.1 * cost(learned(median=32.0), durations)


def test_a_cheaper_poll_makes_more_polls() -> None:
    """The smaller `poll_price` is, the more polls a task gets, and the sooner its end is seen."""
    durations = lognormal(2, 100)
    schedules = [learned(price=price) for price in (0.02, 0.1, 0.5)]
    ends = [[drive(schedule.begin(None), duration) for duration in durations] for schedule in schedules]
    delays = [sum(delay for delay, _ in end) for end in ends]
    polls = [sum(count for _, count in end) for end in ends]

    assert delays == sorted(delays)
    assert polls == sorted(polls, reverse=True)


def test_polls_come_where_the_end_is_likely() -> None:
    """After learning, the first look is well on the way to the end, and looks are closest together around it."""
    at = moments(learned(spread=0.2), 12)
    gaps = [later - earlier for earlier, later in itertools.pairwise(at)]

    assert 4.0 < at[0] < 8.0
    assert max(gaps[:4]) < 2.0 < at[0]


def test_a_task_far_beyond_all_others_is_looked_at_less_and_less() -> None:
    """A task that takes a hundred times as long as all before is neither hammered nor forgotten."""
    schedule = learned()
    plan = schedule.begin(None)
    delays = [plan.next_delay(elapsed, None) for elapsed in (50.0, 200.0, 800.0, 3200.0)]

    assert delays == sorted(delays)
    assert all(0.5 < delay <= elapsed for delay, elapsed in zip(delays, (50.0, 200.0, 800.0, 3200.0), strict=True))


def test_failed_tasks_teach_nothing_about_completed_ones() -> None:
    """Failures, which often come at once, leave the law of the completed tasks alone."""
    schedule = learned()
    before = [schedule.percentile(percent) for percent in (10, 50, 90)]
    for _ in range(100):
        schedule.begin(None).finish(0.0, 0.3, completed=False)

    assert [schedule.percentile(percent) for percent in (10, 50, 90)] == before


def test_failures_that_come_at_once_are_looked_for_at_once() -> None:
    """Where many tasks fail early, the first look comes early, too; where none does any more, it moves back."""
    schedule = learned()
    calm = moments(schedule, 1)[0]
    for _ in range(60):
        schedule.begin(None).finish(0.2, 0.4, completed=False)
        schedule.begin(None).finish(7.5, 8.0)
    failing = moments(schedule, 1)[0]
    cost(schedule, lognormal(3, 2000))

    assert failing < calm / 4
    assert moments(schedule, 1)[0] > calm / 2


def test_the_moment_that_a_webhook_tells_is_learned_exactly() -> None:
    """Where both ends of the interval are one, that is the duration."""
    schedule = LearnedSchedule()
    for _ in range(200):
        schedule.begin(None).finish(20.0, 20.0)

    assert schedule.percentile(50) == pytest.approx(20.0, rel=0.03)
    assert schedule.percentile(90) == pytest.approx(20.0, rel=0.05)


def test_percentiles_tell_how_long_tasks_take() -> None:
    """Nothing is told before the first end; after two hundred, the percentiles are those of the tasks."""
    schedule = learned(median=12.0, spread=0.3)

    assert LearnedSchedule().percentile(50) is None
    assert schedule.percentile(50) == pytest.approx(12.0, rel=0.1)
    assert schedule.percentile(90) == pytest.approx(12.0 * math.exp(0.3 * 1.2816), rel=0.1)
    assert schedule.percentile(-1) == schedule.percentile(0)
    assert schedule.percentile(101) == schedule.percentile(100)


def test_a_change_is_noticed_within_few_tasks() -> None:
    """Ten tasks after the service has become three times slower, or as fast as before, hardly more is paid than later."""
    schedule = learned(median=8.0)
    cost(schedule, lognormal(3, 10, median=25.0))
    slow = cost(schedule, lognormal(4, 30, median=25.0))
    cost(schedule, lognormal(5, 10, median=8.0))
    fast = cost(schedule, lognormal(6, 30, median=8.0))

    assert slow < 1.4 * cost(learned(median=25.0), lognormal(4, 30, median=25.0))
    assert fast < 1.4 * cost(learned(median=8.0), lognormal(6, 30, median=8.0))


def test_what_has_been_is_known_when_it_comes_back() -> None:
    """A service that has been fast and slow by turns is met at its old speed after three tasks."""
    schedule = LearnedSchedule()
    for turn in range(6):
        cost(schedule, lognormal(turn, 60, median=8.0 if turn % 2 else 25.0))
    cost(schedule, lognormal(7, 3, median=25.0))

    assert schedule.percentile(50) == pytest.approx(25.0, rel=0.15)


@pytest.mark.parametrize("seed", range(5))
def test_the_first_of_a_crowd_to_end_are_no_change(seed: int) -> None:
    """Of two dozen tasks that begin together the short ones end first; that the long ones follow is not taken for news."""
    schedule = LearnedSchedule()
    plans = [schedule.begin(None) for _ in range(24)]
    for plan, duration in zip(plans, sorted(lognormal(seed, 24)), strict=True):
        plan.finish(duration - 0.3, duration)

    assert schedule.percentile(50) == pytest.approx(8.0, rel=0.2)


def test_the_memory_of_changes_fades() -> None:
    """After two thousand tasks without a change, a schedule is what one is that has never seen any."""
    schedule = learned(median=25.0)
    cost(schedule, lognormal(3, 2000, median=8.0))
    durations = lognormal(4, 100, median=8.0)

    assert cost(schedule, durations) < 1.05 * cost(learned(median=8.0), durations)


def test_a_change_right_at_the_beginning_is_noticed() -> None:
    """Five quick tasks don't make a law that a few slow ones couldn't replace, and are not remembered as one."""
    schedule = LearnedSchedule()
    for _ in range(5):
        schedule.begin(None).finish(0.95, 1.0)
    for _ in range(6):
        schedule.begin(None).finish(58.0, 60.0)

    assert schedule.percentile(50) == pytest.approx(60.0, rel=0.2)
    assert schedule.state()["law"]["former"] == []


def test_former_laws_are_forgotten_when_nothing_changes_any_more() -> None:
    """After a change, two thousand tasks that are all alike leave nothing of what was before."""
    schedule = learned(median=25.0)
    for _ in range(20):
        schedule.begin(None).finish(7.8, 8.1)
    changed = schedule.state()["law"]
    for _ in range(2000):
        schedule.begin(None).finish(7.8, 8.1)
    calm = schedule.state()["law"]

    assert len(changed["former"]) == 1
    assert changed["steady"] is not None
    assert calm["former"] == []
    assert calm["steady"] is None


SIDES = {side: GenerationRequest("a lighthouse", width=side, height=side) for side in (512, 1024, 2048)}


def test_larger_pictures_are_waited_for_longer() -> None:
    """Where pictures of four times the size take three times as long, each size is polled for itself, and costs less."""
    chance = random.Random(1)
    asked = [chance.choice([512, 1024, 2048]) for _ in range(400)]
    durations = [8.0 * (side / 1024) ** 1.6 * math.exp(chance.gauss(0, 0.1)) for side in asked]
    with_sizes, without = LearnedSchedule(), LearnedSchedule()
    told, untold = 0.0, 0.0
    for number, (side, duration) in enumerate(zip(asked, durations, strict=True)):
        delay, polls = drive(with_sizes.begin(SIDES[side]), duration)
        other_delay, other_polls = drive(without.begin(None), duration)
        if number >= 100:
            told, untold = told + delay + PRICE * polls, untold + other_delay + PRICE * other_polls
    first = {side: with_sizes.begin(request).next_delay(0.0, None) for side, request in SIDES.items()}

    assert told < 0.75 * untold
    assert first[512] < first[1024] / 2 < first[2048] / 4


def test_tasks_that_queue_are_waited_for_longer() -> None:
    """Where a task takes the longer the more are in flight, one that comes to a crowd is looked at later."""
    schedule = LearnedSchedule()
    for _ in range(60):
        plans = [schedule.begin(None) for _ in range(10)]
        for number, plan in enumerate(plans, start=1):
            plan.finish(4.0 * number - 0.2, 4.0 * number)
    alone = schedule.begin(None).next_delay(0.0, None)
    crowd = [schedule.begin(None) for _ in range(9)]

    assert crowd[-1].next_delay(0.0, None) > 3 * alone


def test_a_plan_that_is_dropped_counts_no_more() -> None:
    """A task that is given up, ended or not, is no longer in flight, and one that ended is learned from once."""
    schedule = learned()
    before = moments(schedule, 3)
    kept = [schedule.begin(None) for _ in range(500)]
    del kept
    plan = schedule.begin(None)
    plan.finish(7.0, 8.0)
    after = schedule.state()
    plan.finish(700.0, 800.0)

    assert moments(learned(), 3) == before
    assert schedule.state() == after


def test_a_few_early_ends_are_found() -> None:
    """Where one task in ten begins to end long before the others, that is found out, although nobody looked there."""
    schedule = learned(median=15.0, spread=0.15, price=0.05)
    chance = random.Random(5)
    durations = [(1.0 if chance.random() < 0.1 else 15.0) * math.exp(chance.gauss(0, 0.15)) for _ in range(1500)]
    cost(schedule, durations, price=0.05)

    assert schedule.percentile(5) == pytest.approx(1.0, rel=0.5)


def test_the_first_look_may_be_early_whenever_it_is_planned() -> None:
    """A submit takes a while, and the early look of one task in twenty-five comes all the same."""
    schedule = learned(median=15.0, spread=0.15)
    first = [schedule.begin(None).next_delay(0.3, None) for _ in range(100)]
    early = [delay for delay in first if delay < 0.8 * max(first)]

    assert 2 <= len(early) <= 4


# ---------------------------------------------------------------------- the price


def test_a_new_price_holds_at_once() -> None:
    """Polls that have become dearer come later, for the tasks in flight too; a senseless price is refused."""
    schedule = learned()
    plan = schedule.begin(None)
    cheap = plan.next_delay(6.0, None)
    schedule.poll_price = 2.0
    dear = plan.next_delay(6.0, None)
    with pytest.raises(ConfigurationError, match="poll_price must be more than 0 seconds, not -1"):
        schedule.poll_price = -1

    assert dear > 2 * cheap
    assert schedule.poll_price == 2.0
    assert repr(schedule) == "LearnedSchedule(poll_price=2.0)"


# ---------------------------------------------------------------------- what is kept


def well_travelled() -> LearnedSchedule:
    """Give a schedule that has seen changes, failures, sizes and progress."""
    schedule = learned()
    cost(schedule, lognormal(3, 60, median=25.0), OF_USE["exact"])
    for side, request in SIDES.items():
        schedule.begin(request).finish(side / 100, side / 90)
        schedule.begin(request).finish(0.1, 0.2, completed=False)
    return schedule


@pytest.mark.parametrize("make", [LearnedSchedule, learned, well_travelled])
def test_a_schedule_goes_on_from_what_it_had_learned(make: Callable[[], LearnedSchedule]) -> None:
    """The state survives JSON, is small, and a schedule made of it costs what the one did that gave it."""
    schedule = make()
    text = json.dumps(schedule.state())
    again = LearnedSchedule.from_state(json.loads(text), poll_price=0.1)
    durations = lognormal(8, 150, median=20.0)

    assert len(text) < 20_000
    assert (again.percentile(50) or 0.0) == pytest.approx(schedule.percentile(50) or 0.0, rel=0.03)
    assert cost(again, durations) == pytest.approx(cost(schedule, durations), rel=0.1)


def test_a_script_that_runs_every_hour_does_not_start_cold() -> None:
    """The first tasks with a kept state cost less than the first ones without."""
    kept = learned(spread=0.1).state()
    durations = lognormal(8, 60, spread=0.1)
    warm = sum(cost(LearnedSchedule.from_state(kept), [duration]) for duration in durations)
    cold = sum(cost(LearnedSchedule(), [duration]) for duration in durations)

    assert warm < cold / 2


def _without(name: str) -> dict[str, Any]:
    return {key: value for key, value in learned().state().items() if key != name}


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        (None, "state"),
        ({}, "law"),
        ([1, 2], "state"),
        ("state", "state"),
        (_without("law"), "law"),
        ({**learned().state(), "version": 2}, "version"),
        ({**learned().state(), "failing": 2.0}, "failing"),
        ({**learned().state(), "ended": -1.0}, "ended"),
        ({**learned().state(), "ended": math.nan}, "ended"),
        ({**learned().state(), "surprise": 1}, "surprise"),
        ({**learned().state(), "failures": {"count": 1.0, "first": 0, "weights": []}}, "failures"),
        ({**learned().state(), "failures": {"count": 1.0, "first": 479, "weights": [1.0, 1.0]}}, "failures"),
        ({**learned().state(), "failures": {"count": 1.0, "first": 0, "weights": [-1.0]}}, "failures"),
        (
            {**learned().state(), "failures": {"count": 1e-300, "first": 0, "weights": [1.0]}},
            "count must be 0 or at least 1",
        ),
        ({**learned().state(), "failures": {"count": "many", "first": 0, "weights": [1.0]}}, "failures"),
        ({**learned().state(), "progress": {"laws": [], "leads": []}}, "progress"),
        ({**learned().state(), "effort": {"slopes": [math.inf, 0.0, 0.0]}}, "effort"),
        ({**learned().state(), "effort": {"slopes": [0.0]}}, "effort"),
    ],
)
def test_a_state_that_is_none_is_refused_by_name(state: Any, reason: str) -> None:
    """What `state()` can't have given is a ConfigurationError that names the entry, not a schedule that limps."""
    with pytest.raises(ConfigurationError, match=f"state must be what LearnedSchedule.state\\(\\) gave.*{reason}"):
        LearnedSchedule.from_state(state)


def test_a_kept_state_brings_no_price() -> None:
    """The price is the caller's, not the state's, and checked."""
    assert LearnedSchedule.from_state(learned(price=0.5).state()).poll_price == 0.1
    assert LearnedSchedule.from_state(learned().state(), poll_price=0.3).poll_price == 0.3
    with pytest.raises(ConfigurationError, match="poll_price"):
        LearnedSchedule.from_state(learned().state(), poll_price=0)


def test_one_strange_task_does_not_spoil_the_law() -> None:
    """A task that hung for ten minutes makes the next ones dearer, but not by much, and is soon forgotten."""
    durations = lognormal(2, 100)
    calm = cost(learned(), durations)
    schedule = learned()
    schedule.begin(None).finish(590.0, 600.0)
    cost(schedule, lognormal(3, 60))

    assert cost(schedule, durations) < 1.2 * calm


# ---------------------------------------------------------------------- progress


NO_USE: dict[str, Progress] = {
    "always 0": lambda share, elapsed: 0.0,
    "always a half": lambda share, elapsed: 0.5,
    "always 1": lambda share, elapsed: 1.0,
    "stuck at a tenth": lambda share, elapsed: min(share, 0.1),
    "stuck at a half": lambda share, elapsed: min(share, 0.5),
    "at 99 % after a third": lambda share, elapsed: min(3 * share, 0.99),
    "in quarters": lambda share, elapsed: math.floor(4 * share) / 4,
    "backwards": lambda share, elapsed: 1 - share,
    "very slowly at first": lambda share, elapsed: share**4,
    "queued, then moving": lambda share, elapsed: 0.01 + elapsed / 1e4 if share < 0.6 else 2.5 * share - 1.5,
    "now and then": lambda share, elapsed: None if int(elapsed * 7) % 2 else 0.0,
}


@pytest.mark.parametrize("progress", NO_USE.values(), ids=NO_USE)
@pytest.mark.parametrize("spread", [0.15, 0.3, 0.5])
def test_progress_that_says_little_does_little_harm(spread: float, progress: Progress) -> None:
    """Progress that is coarse, stands still or makes no sense costs hardly more than no progress at all."""
    durations = lognormal(2, 80, spread=spread)
    without = cost(learned(spread=spread), durations)
    given_progress = cost(learned(spread=spread), durations, progress)

    assert given_progress < 1.15 * without


OF_USE: dict[str, Progress] = {
    "exact": lambda share, elapsed: share,
    "in hundredths": lambda share, elapsed: math.floor(100 * share) / 100,
    "slower and slower": lambda share, elapsed: math.sqrt(share),
    "faster and faster": lambda share, elapsed: share * share,
}


@pytest.mark.parametrize("progress", OF_USE.values(), ids=OF_USE)
@pytest.mark.parametrize("spread", [0.3, 0.5])
def test_progress_that_moves_is_used(spread: float, progress: Progress) -> None:
    """Where progress moves with the task, its end is met at clearly less cost."""
    durations = lognormal(2, 80, spread=spread)
    without = cost(learned(spread=spread), durations)
    given_progress = cost(learned(spread=spread), durations, progress)

    assert given_progress < 0.85 * without


# ---------------------------------------------------------------------- anything at all


NUMBERS = st.floats(0, 1e9) | st.sampled_from([0.0, 5e-324, 1e-9, 0.05, 8.0, 1e6])
PROGRESS = st.none() | st.floats() | st.floats(0, 1)


@settings(max_examples=200, deadline=None)
@example(price=1e6, ends=[], looks=[(0.0, None), (10.0, None)])
@example(price=0.1, ends=[], looks=[(2.0, 0.5), (4.0, 0.125), (6.0, 0.25), (8.0, 0.5)])
@example(price=0.1, ends=[], looks=[(2.0, 0.75), (4.0, 0.125), (6.0, 0.25), (8.0, 0.5)])
@example(price=0.1, ends=[], looks=[(2.0, 5e-324), (4.0, 1e-323), (6.0, 1.5e-323), (8.0, 2e-323)])
@example(price=0.1, ends=[], looks=[(2.0, 0.5), (4.0, 0.75), (6.0, math.nextafter(1, 0)), (8.0, 1.0)])
@given(
    price=st.floats(1e-6, 1e6),
    ends=st.lists(st.tuples(NUMBERS, NUMBERS, st.booleans()), max_size=8),
    looks=st.lists(st.tuples(NUMBERS, PROGRESS), min_size=1, max_size=6),
)
def test_every_learned_delay_is_finite_and_more_than_nothing(
    price: float, ends: list[tuple[float, float, bool]], looks: list[tuple[float, float | None]]
) -> None:
    """Whatever was learned, and whatever time and progress come in whichever order, the next delay makes sense."""
    schedule = LearnedSchedule(poll_price=price)
    for one, other, completed in ends:
        schedule.begin(None).finish(min(one, other), max(one, other), completed=completed)
    plan = schedule.begin(None)
    delays = [plan.next_delay(elapsed, progress) for elapsed, progress in looks]

    assert all(0 < delay < math.inf for delay in delays)


@settings(max_examples=100, deadline=None)
@given(
    initial=st.floats(1e-6, 1e6),
    factor=st.floats(1, 1e300),
    maximum=st.floats(1e-6, 1e6),
    looks=st.lists(st.tuples(NUMBERS, PROGRESS), min_size=1, max_size=20),
)
def test_every_simple_delay_is_finite_and_more_than_nothing(
    initial: float, factor: float, maximum: float, looks: list[tuple[float, float | None]]
) -> None:
    """Whatever time and progress come in, the delays of the simple schedules stay within their bounds."""
    exponential = ExponentialSchedule(initial, factor=factor, maximum=maximum).begin(None)
    fixed = FixedSchedule(initial).begin(None)
    delays = [exponential.next_delay(elapsed, progress) for elapsed, progress in looks]

    assert all(min(initial, maximum) <= delay <= maximum for delay in delays)
    assert delays == sorted(delays)
    assert all(fixed.next_delay(elapsed, progress) == initial for elapsed, progress in looks)


@settings(max_examples=60, deadline=None)
@example(duration=19.0, progress=NO_USE["stuck at a tenth"])
@example(duration=500.0, progress=OF_USE["faster and faster"])
@given(duration=st.floats(0.01, 600.0), progress=st.sampled_from([None, *NO_USE.values(), *OF_USE.values()]))
def test_every_task_is_seen_to_end(duration: float, progress: Progress | None) -> None:
    """However long a task takes and whatever it says, its end is seen before half as much time again has passed."""
    delay, polls = drive(LearnedSchedule().begin(None), duration, progress)

    assert delay <= max(2.5, duration / 2)
    assert polls < 300
