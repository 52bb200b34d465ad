"""PollLimiter: by itself, and in sessions with an emulated gateway in virtual time."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flux2max_async import FixedSchedule, FluxSession, GenerationRequest, LearnedSchedule
from flux2max_async._api.poll_limiter import PollLimiter
from flux2max_async._api.retry import MAX_PAUSE
from flux2max_async._polling.schedules import CostAwarePlan
from flux2max_async.emulator import Emulator, Fault


def reserve_at_rate(limiter: PollLimiter, seconds: float, *, rate: float, start: float = 0.0) -> list[float]:
    """Reserve polls at a constant rate; return the times at which they may be sent."""
    count = round(seconds * rate)
    return [(now := start + number / rate) + limiter.reserve(now) for number in range(count)]


def test_half_the_limit_has_no_effect() -> None:
    """Half as many polls as allowed are not delayed, and their cost doesn't rise."""
    limiter = PollLimiter(20.0)
    times = reserve_at_rate(limiter, 30, rate=10)

    assert times == [number / 10 for number in range(300)]
    assert limiter.cost_factor(30.0) == 1.0


def test_burst_of_one_second_is_sent_at_once() -> None:
    """Of sixty polls at the same time, twenty are sent at once, and the others evenly, in the order of their reservation."""
    limiter = PollLimiter(20.0)
    delays = [limiter.reserve(100.0) for _ in range(60)]

    assert delays[:20] == pytest.approx([0.0] * 20, abs=1e-9)
    assert delays[20:] == pytest.approx([number / 20 for number in range(1, 41)])


def test_rate_never_exceeds_the_limit() -> None:
    """However many polls are requested, no interval of ten seconds has more than the limit and one burst."""
    times = reserve_at_rate(PollLimiter(5.0), 20, rate=50)
    peak = max(sum(start <= time < start + 10 for time in times) for start in times)

    assert times == sorted(times)
    assert peak <= 5 * 10 + 5 + 1


def test_infinite_limit_has_no_effect() -> None:
    """Without a limit, a thousand polls at the same time are not delayed."""
    limiter = PollLimiter(float("inf"))

    assert {limiter.reserve(1.0) for _ in range(1000)} == {0.0}
    assert limiter.cost_factor(1.0) == 1.0


def test_cost_rises_with_the_load_and_falls_again() -> None:
    """The cost rises just below the limit, falls with fewer polls, and is reset after a time without polls."""
    limiter = PollLimiter(20.0)
    reserve_at_rate(limiter, 10, rate=19)
    loaded = limiter.cost_factor(10.0)
    reserve_at_rate(limiter, 10, rate=10, start=10.0)
    idle = limiter.cost_factor(20.0)
    reserve_at_rate(limiter, 3, rate=40, start=20.0)
    overloaded = limiter.cost_factor(23.0)
    limiter.reserve(100.0)

    assert loaded > 1.4
    assert idle == 1.0
    assert overloaded > 4
    assert limiter.cost_factor(100.0) == 1.0


def refuse(limiter: PollLimiter, times: int, now: float, retry_after: float | None = 1.0) -> None:
    """Let polls be refused at the same time."""
    for _ in range(times):
        limiter.record_refusal(now, retry_after)


def test_cost_rises_after_frequent_refusals_for_a_while() -> None:
    """Four refusals raise the cost, further ones after the pause more; most of that is gone two minutes later."""
    limiter = PollLimiter(20.0)
    refuse(limiter, 3, 10.0)
    after_three = limiter.cost_factor(10.0)
    refuse(limiter, 1, 10.0)
    after_four = limiter.cost_factor(10.0)
    refuse(limiter, 20, 10.5)
    during_the_pause = limiter.cost_factor(10.5)
    for now in range(12, 32, 2):
        refuse(limiter, 4, now)

    assert after_three == 1.0
    assert after_four == during_the_pause == 1.5
    assert 6 < limiter.cost_factor(31.0) < 9
    assert limiter.cost_factor(31.0) > limiter.cost_factor(61.0) > 3
    assert limiter.cost_factor(311.0) == 1.0


def test_polls_that_are_not_refused_lower_the_cost() -> None:
    """A hundred polls later, the refusals have no effect on the cost, however little time has passed."""
    limiter = PollLimiter(20.0)
    for now in range(10, 30, 2):
        refuse(limiter, 4, now)
    for _ in range(150):
        limiter.record_other()

    assert limiter.cost_factor(28.0) == 1.0


@pytest.mark.parametrize(
    ("others", "cost"),
    [
        pytest.param(0, 1.5, id="in a row"),
        pytest.param(2, 1.5, id="four of ten"),
        pytest.param(3, 1.0, id="four of 13"),
        pytest.param(5, 1.0, id="four of 19"),
    ],
)
def test_refusals_far_apart_may_be_chance(others: int, cost: float) -> None:
    """All polls wait after four refusals of 20, but their cost rises only after four of ten."""
    limiter = PollLimiter(20.0)
    for number in range(4):
        for _ in range(others if number else 0):
            limiter.record_other()
        limiter.record_refusal(10.0, 1.0)

    assert limiter.pause_remaining(10.0) == 1.0
    assert limiter.cost_factor(10.0) == cost


@pytest.mark.parametrize(
    ("refusals", "others", "pause"),
    [
        pytest.param([(10.0, 2.0)] * 3, 0, 0.0, id="three"),
        pytest.param([(10.0, 2.0)] * 4, 0, 2.0, id="four"),
        pytest.param([(10.0, None)] * 4, 0, 1.0, id="four without a wait"),
        pytest.param([(10.0, 86400.0)] * 4, 0, 120.0, id="four with a day"),
        pytest.param([(10.0, 9.0), *[(10.0, 1.0)] * 3], 0, 9.0, id="the longest of the four"),
        pytest.param([*[(10.0, 2.0)] * 4, (10.0, 5.0)], 0, 5.0, id="a longer one that was on the wire"),
        pytest.param([(10.0, 2.0)] * 4, 16, 2.0, id="four of 20"),
        pytest.param([(10.0, 2.0)] * 4, 17, 0.0, id="four of 21"),
    ],
)
def test_frequent_refusals_hold_back_all_polls(
    refusals: list[tuple[float, float | None]], others: int, pause: float
) -> None:
    """All polls wait for the longest time requested if four of the last 20 polls were refused."""
    limiter = PollLimiter(20.0)
    for number, (now, retry_after) in enumerate(refusals):
        for _ in range(others if number == 3 else 0):
            limiter.record_other()
        limiter.record_refusal(now, retry_after)

    assert limiter.pause_remaining(10.0) == pause


@given(st.lists(st.one_of(st.just("other"), st.floats(0, 60), st.tuples(st.none() | st.floats(0, 1e9))), max_size=60))
def test_pause_and_cost_are_bounded_after_any_polls(events: list[Any]) -> None:
    """A pause is never shortened and at most two minutes, and the cost is bounded and normal again at last."""
    limiter, now, until = PollLimiter(20.0), 1000.0, 0.0
    for event in events:
        match event:
            case "other":
                limiter.record_other()
            case (retry_after,):
                limiter.record_refusal(now, retry_after)
            case _:
                now += event
        pause = limiter.pause_remaining(now)
        assert pause <= MAX_PAUSE + 1e-6
        assert now + pause >= min(until, now + MAX_PAUSE) - 1e-6
        until = now + pause
        assert 1 <= limiter.cost_factor(now) <= 10
    for _ in range(300):
        limiter.record_other()

    assert limiter.cost_factor(now) == 1.0
    assert limiter.pause_remaining(now + MAX_PAUSE + 1) == 0.0


def test_a_burst_within_the_bucket_does_not_raise_the_cost() -> None:
    """The bucket is there for a burst: only a rate that stays high raises the cost."""
    limiter = PollLimiter(20.0)
    reserve_at_rate(limiter, 10, rate=10)
    for start in range(10, 40, 10):
        reserve_at_rate(limiter, 1.5, rate=25, start=float(start))
        reserve_at_rate(limiter, 8.5, rate=10, start=start + 1.5)
        assert limiter.cost_factor(start + 10.0) == 1.0


def test_polls_of_tasks_that_began_together_do_not_raise_the_cost() -> None:
    """A second of polls may wait before the cost rises; if more and more wait, it does."""
    limiter = PollLimiter(20.0)
    reserve_at_rate(limiter, 2.9, rate=32)
    cost, wait = limiter.cost_factor(2.9), limiter.reserve(2.9)
    reserve_at_rate(limiter, 3.0, rate=32, start=2.9)

    assert cost == 1.0
    assert 0.5 < wait < 1.0
    assert limiter.cost_factor(5.9) > 2


class RecordingSchedule:
    """A learned schedule that records the cost factors that it is given."""

    def __init__(self, poll_price: float) -> None:
        self.cost_factors: list[float] = []
        self._schedule = LearnedSchedule(poll_price=poll_price)

    def begin(self, request: GenerationRequest | None) -> "RecordingPlan":
        return RecordingPlan(self._schedule.begin(request), self.cost_factors)


class RecordingPlan(CostAwarePlan):
    def __init__(self, plan: CostAwarePlan, cost_factors: list[float]) -> None:
        self._plan = plan
        self._cost_factors = cost_factors

    def next_delay(self, elapsed: float, progress: float | None, *, cost_factor: float = 1.0) -> float:
        self._cost_factors.append(cost_factor)
        return self._plan.next_delay(elapsed, progress, cost_factor=cost_factor)

    def finish(self, not_before: float, by: float, *, completed: bool = True) -> None:
        self._plan.finish(not_before, by, completed=completed)


@pytest.mark.parametrize("schedule", [FixedSchedule(0.5), LearnedSchedule()], ids=repr)
async def test_all_tasks_share_the_limit(schedule: FixedSchedule | LearnedSchedule) -> None:
    """Sixty tasks that might need a hundred polls per second are polled five times per second, and all complete."""
    async with (
        Emulator(seconds=20.0, max_in_flight=60, pictures=False) as gateway,
        FluxSession(
            gateway.api_key, base_url=gateway.url, max_in_flight=60, schedule=schedule, max_polls_per_second=5
        ) as session,
    ):
        outcomes = [outcome.unwrap() async for outcome in session.stream(f"lighthouse {n}" for n in range(60))]
        elapsed = max(outcome.elapsed for outcome in outcomes)

        assert len(outcomes) == 60
        assert session.stats.polls <= 5 * elapsed + 5 + 1


async def test_learned_schedule_polls_less_under_load() -> None:
    """If a learned schedule would poll more often than allowed, the cost of a poll rises."""
    schedule = RecordingSchedule(poll_price=0.01)
    async with (
        Emulator(seconds=8.0, max_in_flight=24, pictures=False) as gateway,
        FluxSession(gateway.api_key, base_url=gateway.url, schedule=schedule, max_polls_per_second=6) as session,
    ):
        async for _ in session.stream(f"lighthouse {n}" for n in range(150)):
            pass

    assert max(schedule.cost_factors) > 3


async def test_frequent_429s_raise_the_cost_factor() -> None:
    """After four polls were refused, the cost of a poll is higher than before, even for tasks in flight."""
    schedule = RecordingSchedule(poll_price=0.2)
    async with (
        Emulator(seconds=30.0, pictures=False) as gateway,
        FluxSession(gateway.api_key, base_url=gateway.url, schedule=schedule) as session,
    ):
        gateway.script("poll", *[Fault.RATE_LIMITED] * 4)
        await session.generate("a lighthouse")

    assert schedule.cost_factors[0] == 1
    assert max(schedule.cost_factors) > 1


async def test_stats_report_the_duration_of_tasks() -> None:
    """The stats have the median and the 90th percentile after the first completed task, if the schedule learns them."""
    async with Emulator(seconds=8.0, spread=0.2, pictures=False) as gateway:
        async with FluxSession(gateway.api_key, base_url=gateway.url) as session:
            before = session.stats
            # Only the first 70 tasks: the last ones to end are the long ones.
            snapshots = [session.stats async for _ in session.stream(f"lighthouse {n}" for n in range(100))]
            after = snapshots[70]
        async with FluxSession(gateway.api_key, base_url=gateway.url, schedule=FixedSchedule(1.0)) as session:
            await session.generate("a lighthouse")
            without_learning = session.stats

    assert before.median_duration is before.p90_duration is None
    assert after.median_duration is not None
    assert after.median_duration == pytest.approx(8.0, rel=0.4)
    assert after.p90_duration is not None
    assert after.median_duration < after.p90_duration < 2 * after.median_duration
    assert without_learning.median_duration is without_learning.p90_duration is None
