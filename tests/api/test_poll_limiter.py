"""The budget of polls: pure, then in a session against an emulated gateway, on virtual time."""

import pytest

from flux2max_async import FixedSchedule, FluxSession, LearnedSchedule
from flux2max_async._api.poll_limiter import PollLimiter
from flux2max_async.emulator import Emulator, Fault


def booked(budget: PollLimiter, seconds: float, *, per_second: float, start: float = 0.0) -> list[float]:
    """Book polls at a steady rate; gives the moments at which they may be made."""
    count = round(seconds * per_second)
    return [(now := start + number / per_second) + budget.book(now) for number in range(count)]


def test_a_budget_that_is_not_reached_costs_nothing() -> None:
    """Half as many polls as allowed wait for nothing and become no dearer."""
    budget = PollLimiter(20.0)
    moments = booked(budget, 30, per_second=10)

    assert moments == [number / 10 for number in range(300)]
    assert budget.cost_factor(30.0) == 1.0


def test_a_burst_of_one_second_comes_at_once_and_the_rest_in_turn() -> None:
    """Of sixty polls at one moment twenty are made then, and the others evenly, in the order of their booking."""
    budget = PollLimiter(20.0)
    waits = [budget.book(100.0) for _ in range(60)]

    assert waits[:20] == pytest.approx([0.0] * 20, abs=1e-9)
    assert waits[20:] == pytest.approx([number / 20 for number in range(1, 41)])


def test_no_second_sees_more_than_the_budget() -> None:
    """Whatever is asked for, in the long run polls come no faster than they may."""
    moments = booked(PollLimiter(5.0), 20, per_second=50)
    most = max(sum(start <= moment < start + 10 for moment in moments) for start in moments)

    assert moments == sorted(moments)
    assert most <= 5 * 10 + 5 + 1


def test_no_limit_is_no_limit() -> None:
    """Without a limit a million polls at one moment wait for nothing."""
    budget = PollLimiter(float("inf"))

    assert {budget.book(1.0) for _ in range(1000)} == {0.0}
    assert budget.cost_factor(1.0) == 1.0


def test_polls_become_dearer_before_the_budget_is_reached_and_cheaper_after() -> None:
    """Just below the limit the price already rises; with fewer polls it falls back, and after a silence it is forgotten."""
    budget = PollLimiter(20.0)
    booked(budget, 10, per_second=19)
    crowded = budget.cost_factor(10.0)
    booked(budget, 10, per_second=10, start=10.0)
    calm = budget.cost_factor(20.0)
    booked(budget, 3, per_second=40, start=20.0)
    crowded_again = budget.cost_factor(23.0)
    budget.book(100.0)

    assert crowded > 1.4
    assert calm == 1.0
    assert crowded_again > 4
    assert budget.cost_factor(100.0) == 1.0


def test_a_refusal_makes_polls_dearer_for_a_while() -> None:
    """Each 429 adds to the price, up to four times what it was; a minute later most of that is gone."""
    budget = PollLimiter(20.0)
    budget.refused(10.0)
    once = budget.cost_factor(10.0)
    for _ in range(50):
        budget.refused(11.0)

    assert 1.5 < once < 2.5
    assert 3 < budget.cost_factor(11.0) < 4
    assert budget.cost_factor(11.0) > budget.cost_factor(71.0) > 1.4
    assert budget.cost_factor(311.0) == 1.0


@pytest.mark.parametrize("schedule", [FixedSchedule(0.5), LearnedSchedule()], ids=repr)
async def test_all_tasks_share_one_budget(schedule: FixedSchedule | LearnedSchedule) -> None:
    """Sixty tasks that could make a hundred polls a second make five, and all of them end well."""
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


async def test_a_budget_is_kept_by_price_rather_than_by_waiting() -> None:
    """Where a learned schedule would poll more often than it may, polls become dearer, and then cheap again."""
    schedule = LearnedSchedule(poll_price=0.01)
    async with (
        Emulator(seconds=8.0, max_in_flight=24, pictures=False) as gateway,
        FluxSession(gateway.api_key, base_url=gateway.url, schedule=schedule, max_polls_per_second=6) as session,
    ):
        prices = [schedule.poll_price async for _ in session.stream(f"lighthouse {n}" for n in range(150))]

    assert max(prices) > 0.03


async def test_a_429_makes_polls_dearer() -> None:
    """After a poll was refused, the price is higher than before, for the tasks in flight, too."""
    schedule = LearnedSchedule(poll_price=0.2)
    async with (
        Emulator(seconds=30.0, pictures=False) as gateway,
        FluxSession(gateway.api_key, base_url=gateway.url, schedule=schedule) as session,
    ):
        gateway.script("poll", Fault.RATE_LIMITED)
        await session.generate("a lighthouse")

    assert schedule.cost_factor > 1
    assert schedule.poll_price == 0.2 * schedule.cost_factor


async def test_stats_tell_how_long_tasks_take() -> None:
    """Nothing before the first end; then the median and the 90th percentile; and nothing from a schedule that can't."""
    async with Emulator(seconds=8.0, spread=0.2, pictures=False) as gateway:
        async with FluxSession(gateway.api_key, base_url=gateway.url) as session:
            before = session.stats
            # Taken while new tasks still begin: the last ones to end are the long ones.
            learned = [session.stats async for _ in session.stream(f"lighthouse {n}" for n in range(100))]
            after = learned[70]
        async with FluxSession(gateway.api_key, base_url=gateway.url, schedule=FixedSchedule(1.0)) as session:
            await session.generate("a lighthouse")
            unlearned = session.stats

    assert before.median_duration is before.p90_duration is None
    assert after.median_duration is not None
    assert after.median_duration == pytest.approx(8.0, rel=0.4)
    assert after.p90_duration is not None
    assert after.median_duration < after.p90_duration < 2 * after.median_duration
    assert unlearned.median_duration is unlearned.p90_duration is None
