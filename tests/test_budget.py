"""The budget: estimates, reservations and settlements, in one session and across sessions with a journal."""

import asyncio
import itertools
from collections import Counter, deque
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.responses import picture
from support.scripted import Behaviour, ScriptedGateway, answer, completed, raw, reset, running, session_on
from support.virtual_time import VirtualJournal

from flux2max_async import (
    AuthenticationError,
    BadRequestError,
    BudgetExceededError,
    DeadlineExceededError,
    FixedSchedule,
    FluxSession,
    GenerationRequest,
    InsufficientBalanceError,
    InvalidRequestError,
    Outcome,
    RateLimitedError,
    SubmissionUncertainError,
    TaskFailedError,
    TransportError,
)
from flux2max_async._budget import Budget
from flux2max_async.emulator import Emulator

SessionFactory = Callable[..., FluxSession]
FOUR_MEGAPIXELS = GenerationRequest("a wide cat", width=2048, height=2048)
"""Costs $0.16."""


@pytest.fixture
def create_session(gateway: Emulator) -> SessionFactory:
    """Return a function that creates a session on the emulator."""

    def session(**settings: Any) -> FluxSession:
        return FluxSession(gateway.api_key, base_url=gateway.url, schedule=FixedSchedule(1.0), **settings)

    return session


async def run(session: FluxSession, *requests: str | GenerationRequest, **options: Any) -> list[Outcome]:
    """Return the outcomes of a stream, which the budget may end early."""
    outcomes: list[Outcome] = []
    async with session:
        try:
            async for outcome in session.stream(requests, **options):
                outcomes.append(outcome)
        except BudgetExceededError:
            assert any(isinstance(getattr(outcome, "error", None), BudgetExceededError) for outcome in outcomes)
        else:
            assert all(outcome.ok for outcome in outcomes)
    return outcomes


def count_completed(outcomes: list[Outcome]) -> int:
    return sum(outcome.ok for outcome in outcomes)


def cats(count: int) -> list[str]:
    return [f"cat {number}" for number in range(count)]


# ---------------------------------------------------------------------- a budget


@pytest.mark.parametrize(
    "budget", [Decimal("0.21"), "0.21", 0.21, "0.27", "2.1e-1"], ids=["Decimal", "str", "float", "rest", "exponent"]
)
async def test_a_budget_is_not_exceeded(create_session: SessionFactory, gateway: Emulator, budget: Any) -> None:
    """Nothing is submitted whose probable cost would exceed the budget, however many slots are free."""
    outcomes = await run(create_session(budget=budget), *cats(50))

    assert count_completed(outcomes) == gateway.calls["submit"] == 3


@pytest.mark.parametrize(("budget", "expected"), [(1, 14), (0, 0), (None, 20), ("0.06", 0)])
async def test_a_budget_may_be_zero_or_none(
    create_session: SessionFactory, gateway: Emulator, budget: Any, expected: int
) -> None:
    """A dollar pays for 14 images, 0 for none, and None sets no limit."""
    outcomes = await run(create_session(budget=budget), *cats(20))

    assert count_completed(outcomes) == gateway.calls["submit"] == expected


async def test_generate_and_submit_raise_when_the_budget_is_used_up(
    create_session: SessionFactory, gateway: Emulator
) -> None:
    """generate() and submit() raise before anything is sent, and the error names the budget and what is committed."""
    async with create_session(budget="0.10") as session:
        await session.generate("a cat")
        with pytest.raises(BudgetExceededError, match=r"\$0\.10 .* about \$0\.07: \$0\.07 are"):
            await session.generate("another cat")
        with pytest.raises(BudgetExceededError):
            await session.submit("another cat")
        with pytest.raises(BudgetExceededError):
            await session.submit("another cat", key="with a key")

    assert gateway.calls["submit"] == 1


async def test_a_stream_yields_what_is_in_flight_before_it_raises(
    create_session: SessionFactory, gateway: Emulator
) -> None:
    """A stream yields the failed request at once, then what is in flight, and then raises; it pulls no more requests."""
    pulled = itertools.count()
    outcomes: list[Outcome] = []
    async with create_session(budget="0.50", max_in_flight=4) as session:
        with pytest.raises(BudgetExceededError) as caught:
            async for outcome in session.stream(f"cat {number}" for number in pulled):
                outcomes.append(outcome)
    refused = [outcome for outcome in outcomes if not outcome.ok]

    assert count_completed(outcomes) == gateway.calls["submit"] == 7
    assert [outcome.ok for outcome in outcomes[-3:]] == [True] * 3
    assert all(outcome.error == caught.value and outcome.task_id is None for outcome in refused)
    assert len(outcomes) == next(pulled)
    assert len(refused) <= 4


async def test_tasks_in_flight_count_as_estimated(create_session: SessionFactory, gateway: Emulator) -> None:
    """A task in flight counts with its estimated cost, and a completed one with its real cost."""
    async with create_session(budget="0.20", price_guess="0.10") as session:
        first = await session.submit("cat 1")
        await anyio.sleep(4)
        second = await session.submit("cat 2")
        with pytest.raises(BudgetExceededError, match=r"\$0\.20 are spent or reserved"):
            await session.submit("cat 3")
        await first
        with pytest.raises(BudgetExceededError, match=r"\$0\.17 are"):
            await session.submit("cat 3")
        await second
        with pytest.raises(BudgetExceededError, match=r"\$0\.14 are"):
            await session.submit("cat 3")

    assert gateway.calls["submit"] == 2


async def test_concurrent_submits_share_the_budget(create_session: SessionFactory, gateway: Emulator) -> None:
    """Concurrent callers can't spend the same money twice."""
    async with create_session(budget="0.35") as session:
        results = await asyncio.gather(*map(session.generate, cats(20)), return_exceptions=True)

    assert Counter(map(type, results))[BudgetExceededError] == 15
    assert gateway.calls["submit"] == 5


async def test_a_stream_with_budget_and_save_to_needs_no_journal(
    create_session: SessionFactory, tmp_path: Path
) -> None:
    """A stream with a budget saves its images without a journal, too."""
    outcomes = await run(create_session(budget=1), *cats(3), save_to=tmp_path)

    assert len({path for outcome in outcomes for path in outcome.unwrap().saved}) == 3


# ---------------------------------------------------------------------- settlement


CUT_RESPONSE = raw(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{")


@pytest.mark.parametrize(
    ("submit", "error"),
    [
        pytest.param(answer(400, b""), BadRequestError, id="400"),
        pytest.param(answer(401, b""), AuthenticationError, id="401"),
        pytest.param(answer(402, b""), InsufficientBalanceError, id="402"),
        pytest.param(answer(429, b"", [("Retry-After", "1000")]), RateLimitedError, id="429 until the deadline"),
    ],
)
async def test_a_refusal_costs_nothing(scripted: ScriptedGateway, submit: Behaviour, error: type[Exception]) -> None:
    """The reservation for a submit that the service refuses is released."""
    scripted.submits = deque([submit])
    async with session_on(scripted, budget="0.07", task_timeout=20.0) as session:
        with pytest.raises(error):
            await session.generate("a cat")
        scripted.submits = deque([answer(200, completed("t1"))])
        await anyio.sleep(2000)
        await session.generate("another cat")
        with pytest.raises(BudgetExceededError):
            await session.generate("a third cat")


async def test_no_connection_costs_nothing() -> None:
    """The reservation for a submit that never reached the service is released, however often it was attempted."""
    session = FluxSession("key", base_url="http://127.0.0.1:1", budget="0.07", task_timeout=30.0)
    async with session:
        for prompt in ("a cat", "another cat"):
            with pytest.raises(TransportError):
                await session.generate(prompt)

    assert session.stats.retries > 2


async def test_a_repeated_submit_is_reserved_for_once(scripted: ScriptedGateway) -> None:
    """A submit reserves nothing while it waits for its next attempt; all attempts together cost what the task does."""
    busy = answer(503, b"")
    scripted.submits = deque([busy, busy, answer(200, completed("t1")), answer(200, completed("t2"))])
    async with session_on(scripted, budget="0.14") as session:
        assert (await session.generate("a cat")).task_id == "t1"
        assert (await session.generate("another cat")).task_id == "t2"
        with pytest.raises(BudgetExceededError):
            await session.generate("a third cat")


@pytest.mark.parametrize("submit", [reset, CUT_RESPONSE, answer(500, b"")], ids=["reset", "cut", "500"])
async def test_an_uncertain_submit_stays_reserved(scripted: ScriptedGateway, submit: Behaviour) -> None:
    """The reservation stays if a task may exist."""
    scripted.submits = deque([submit, answer(200, completed("t1"))])
    async with session_on(scripted, budget="0.14") as session:
        with pytest.raises(SubmissionUncertainError):
            await session.generate("a cat")
        await session.generate("another cat")
        with pytest.raises(BudgetExceededError, match=r"\$0\.14 are"):
            await session.generate("a third cat")


@pytest.mark.parametrize(
    ("usage", "spent"),
    [
        pytest.param({}, "0.00", id="no usage"),
        pytest.param({"usage": {"cost": "0.05"}}, "0.05", id="a cost"),
        pytest.param({"usage": {"cost": "?"}}, "0.00", id="no amount"),
    ],
)
async def test_a_failed_task_costs_what_the_service_reports(
    scripted: ScriptedGateway, usage: dict[str, object], spent: str
) -> None:
    """A failed task counts with its cost, if the service reports one, and else is free."""
    failed = {"id": "t1", "status": "failed", "error": {"code": "x", "message": "no"}, **usage}
    scripted.submits = deque([answer(200, running())])
    scripted.polls = deque([answer(200, failed)])
    async with session_on(scripted, budget="0.09") as session:
        with pytest.raises(TaskFailedError):
            await session.generate("a cat")
        if spent == "0.00":
            await session.submit("another cat")
        with pytest.raises(BudgetExceededError):
            await session.submit("another cat")


@pytest.mark.parametrize("usage", [None, {}, {"cost": "a lot"}], ids=["none", "empty", "no amount"])
async def test_an_image_without_a_cost_counts_as_estimated(
    scripted: ScriptedGateway, usage: dict[str, str] | None
) -> None:
    """If the service reports no cost, the estimate counts instead."""
    scripted.submits = deque([answer(200, completed(usage=usage))])
    async with session_on(scripted, budget="0.10", price_guess="0.05") as session:
        await session.generate("a cat")
        await session.generate("another cat")
        with pytest.raises(BudgetExceededError, match=r"\$0\.10 are"):
            await session.generate("a third cat")


async def test_a_task_that_is_no_longer_followed_stays_reserved(create_session: SessionFactory) -> None:
    """The reservation stays for a task that missed its deadline or whose session was closed: it may still cost money."""
    session = create_session(budget="0.15", task_timeout=3.0)
    async with session:
        with pytest.raises(DeadlineExceededError):
            await session.generate("a cat")
        await session.submit("another cat")
    async with session:
        with pytest.raises(BudgetExceededError, match=r"\$0\.14 are"):
            await session.submit("a third cat")


async def test_a_free_task_does_not_lower_the_estimate(scripted: ScriptedGateway) -> None:
    """After a task that cost nothing, the next ones are still estimated by megapixels."""
    scripted.submits = deque([answer(200, completed(usage={"cost": "0"})), answer(200, running())])
    scripted.polls = deque([answer(200, running())])
    async with session_on(scripted, budget="0.10") as session:
        await session.generate("a cat")
        await session.submit("another cat")
        with pytest.raises(BudgetExceededError, match=r"about \$0\.07: \$0\.07 are"):
            await session.submit("a third cat")


async def test_an_unreadable_image_costs_nothing(
    create_session: SessionFactory, gateway: Emulator, tmp_path: Path
) -> None:
    """A request with a missing image is refused before anything is reserved for it."""
    async with create_session(budget="0.10") as session:
        with pytest.raises(InvalidRequestError, match=r"input_images\[0\]"):
            await session.generate("a cat", input_images=[tmp_path / "missing.png"])
        await session.generate("a cat")

    assert gateway.calls["submit"] == 1


# ---------------------------------------------------------------------- reservations


def test_a_settlement_replaces_a_reservation() -> None:
    """Committed is what is reserved and spent, and a reservation counts until it is settled with the real cost."""
    budget = Budget(Decimal("0.20"), None)
    budget.reserve(Decimal("0.07"))
    budget.reserve(Decimal("0.13"))
    with pytest.raises(BudgetExceededError, match=r"^the budget of \$0\.20 .* about \$0\.01: \$0\.20 are"):
        budget.reserve(Decimal("0.01"))
    budget.settle(Decimal("0.13"), Decimal("0.10"))
    budget.reserve(Decimal("0.03"))
    budget.settle(Decimal("0.07"), Decimal(0))

    assert budget.committed == Decimal("0.13")


def test_a_refused_reservation_changes_nothing() -> None:
    """A reservation that the budget doesn't allow is not counted."""
    budget = Budget(Decimal("0.20"), None)
    with pytest.raises(BudgetExceededError):
        budget.reserve(Decimal("0.21"))

    assert budget.committed == 0


def test_a_suspended_reservation_counts_until_it_is_settled() -> None:
    """A suspended reservation stays committed, and can be resumed once, under its task's id, to be settled."""
    budget = Budget(Decimal("0.20"), None)
    for task_id, amount in (("t1", Decimal("0.07")), ("t2", Decimal("0.10"))):
        budget.reserve(amount)
        budget.suspend(task_id, amount)

    assert budget.committed == Decimal("0.17")
    assert budget.resume("t1") == Decimal("0.07")
    assert budget.resume("t1") is None
    assert budget.resume("unknown") is None
    assert budget.committed == Decimal("0.17")
    budget.settle(Decimal("0.07"), Decimal("0.05"))
    assert budget.committed == Decimal("0.15")
    assert budget.resume("t2") == Decimal("0.10")


async def test_an_attached_task_settles_its_suspended_reservation(
    create_session: SessionFactory, gateway: Emulator
) -> None:
    """A task that missed its deadline is attached later, and its real cost replaces the reservation."""
    async with create_session(budget="0.20", price_guess="0.10", task_timeout=3.0) as session:
        with pytest.raises(DeadlineExceededError) as caught:
            await session.generate("a cat")
        assert caught.value.task_id is not None
        await anyio.sleep(8)
        await session.attach(caught.value.task_id)
        await session.submit("another cat")
        with pytest.raises(BudgetExceededError, match=r"\$0\.17 are"):
            await session.submit("a third cat")

    assert gateway.calls["submit"] == 2


# ---------------------------------------------------------------------- estimates


async def test_the_estimate_is_the_highest_cost_so_far(scripted: ScriptedGateway) -> None:
    """Once a cost is known, the next task is expected to cost as much, and no cheaper task changes that."""
    costs = iter(["0.03", "0.02", "0.04"])
    scripted.submits = deque(answer(200, completed(usage={"cost": cost})) for cost in costs)
    async with session_on(scripted, budget="0.12") as session:
        for prompt in cats(3):
            await session.generate(prompt)
        with pytest.raises(BudgetExceededError, match=r"another image for about \$0\.04: \$0\.09 are"):
            await session.generate("a cat")


@pytest.mark.parametrize(
    ("request_", "budget", "allowed"),
    [
        pytest.param(FOUR_MEGAPIXELS, "0.16", True, id="output"),
        pytest.param(FOUR_MEGAPIXELS, "0.15", False, id="output, a cent too little"),
        pytest.param(GenerationRequest("x", width=1025, height=1024), "0.10", True, id="a pixel more"),
        pytest.param(GenerationRequest("x", width=1025, height=1024), "0.09", False, id="a pixel more, too little"),
        pytest.param(GenerationRequest("x", input_images=[picture()] * 2), "0.13", True, id="two inputs"),
        pytest.param(GenerationRequest("x", input_images=[picture()] * 2), "0.12", False, id="two inputs, too little"),
    ],
)
async def test_larger_requests_cost_more(
    create_session: SessionFactory, gateway: Emulator, request_: GenerationRequest, budget: str, allowed: bool
) -> None:
    """The first estimate is by the megapixels of the output, and one for each input image."""
    (outcome,) = await run(create_session(budget=budget), request_)

    assert outcome.ok is allowed
    assert gateway.calls["submit"] == allowed


@given(
    observed=st.integers(1, 40),
    estimated=st.integers(1, 40),
    cost=st.decimals("0.01", "9.99", places=2),
)
def test_a_learned_cost_is_scaled_up_but_not_down(observed: int, estimated: int, cost: Decimal) -> None:
    """A request with more megapixels is expected to cost proportionally more, one with fewer not to cost less."""
    budget, untaught = Budget(None, None), Budget(None, None)
    budget.observe(observed, cost)

    assert budget.estimate(observed) == cost
    if estimated <= observed:
        assert budget.estimate(estimated) == cost
    else:
        expected = cost * untaught.estimate(estimated) / untaught.estimate(observed)
        assert budget.estimate(estimated) == expected > cost


@pytest.mark.parametrize("megapixels", range(1, 100))
def test_an_exact_estimate_stays_exact(megapixels: int) -> None:
    """Scaling doesn't round: a budget of exactly the cost is enough."""
    budget, cost = Budget(None, None), Budget(None, None).estimate(megapixels)
    budget.observe(1, Decimal("0.07"))
    Budget(cost, None).reserve(budget.estimate(megapixels))

    assert budget.estimate(megapixels) == cost == Decimal("0.07") + Decimal("0.03") * (megapixels - 1)


@pytest.mark.parametrize(("guess", "expected"), [("0.50", 2), (0.25, 4), (1, 1), (Decimal("1.01"), 0)])
async def test_price_guess_replaces_the_estimate_by_megapixels(
    create_session: SessionFactory, gateway: Emulator, guess: Any, expected: int
) -> None:
    """Until the first cost is known, each request is expected to cost `price_guess`, whatever its size."""
    async with create_session(budget=1, price_guess=guess) as session:
        for number in range(expected):
            await session.submit(FOUR_MEGAPIXELS, seed=number)
        with pytest.raises(BudgetExceededError):
            await session.submit("a small cat")

    assert gateway.calls["submit"] == expected


async def test_price_guess_is_replaced_by_the_first_known_cost(
    create_session: SessionFactory, gateway: Emulator
) -> None:
    """A guess that is much too high limits the session only until the first cost is known."""
    async with create_session(budget="0.60", price_guess="0.50") as session:
        await session.generate("a cat")
        outcomes = [outcome async for outcome in session.stream(cats(7))]

    assert count_completed(outcomes) == 7
    assert gateway.calls["submit"] == 8


async def test_a_price_guess_of_zero_still_counts_real_costs(create_session: SessionFactory) -> None:
    """With a guess of 0, the first tasks are submitted, and their costs count against the budget."""
    async with create_session(budget="0.10", price_guess=0, max_in_flight=1) as session:
        await session.generate("cat 0")
        with pytest.raises(BudgetExceededError, match=r"\$0.07 are spent"):
            await session.generate("cat 1")


async def test_the_cost_of_a_failed_task_is_not_learned(scripted: ScriptedGateway) -> None:
    """A failed task that cost a cent doesn't lower the estimate."""
    failure = running(status="failed", error={"code": "x", "message": "no"}, usage={"cost": "0.01"})
    scripted.polls = deque([answer(200, failure), answer(200, completed())])
    async with session_on(scripted, budget="0.10") as session:
        with pytest.raises(TaskFailedError):
            await session.generate("cat 0")
        await session.generate("cat 1")
        with pytest.raises(BudgetExceededError, match=r"for about \$0.07: \$0.08 are spent"):
            await session.generate("cat 2")


# ---------------------------------------------------------------------- with a journal


@pytest.mark.parametrize(
    ("scope", "expected"),
    [
        pytest.param({}, 0, id="by default the journal's"),
        pytest.param({"budget_scope": "journal"}, 0, id="the journal's"),
        pytest.param({"budget_scope": "session"}, 4, id="the session's"),
    ],
)
async def test_a_budget_limits_all_sessions_with_one_journal(
    create_session: SessionFactory, gateway: Emulator, tmp_path: Path, scope: dict[str, Any], expected: int
) -> None:
    """With a journal, the budget is for all sessions together, unless its scope is the session."""

    def session() -> FluxSession:
        return create_session(journal=VirtualJournal(tmp_path / "run.db"), budget="0.30", **scope)

    first = await run(session(), *cats(20))
    second = await run(session(), *(f"dog {number}" for number in range(20)))

    assert (count_completed(first), count_completed(second)) == (4, expected)
    assert gateway.calls["submit"] == 4 + expected


@pytest.mark.parametrize("scope", [None, "session"])
async def test_a_journal_without_a_budget_sets_no_limit(
    create_session: SessionFactory, gateway: Emulator, tmp_path: Path, scope: Any
) -> None:
    """The scope of a budget that is None has no effect."""
    session = create_session(journal=VirtualJournal(tmp_path / "run.db"), budget_scope=scope)

    assert count_completed(await run(session, *cats(20))) == gateway.calls["submit"] == 20


@pytest.mark.parametrize("scope", ["journal", "session"])
async def test_replayed_outcomes_cost_nothing(
    create_session: SessionFactory, gateway: Emulator, tmp_path: Path, scope: str
) -> None:
    """Outcomes in the journal are delivered whatever the budget, and are not paid for again."""
    journal = VirtualJournal(tmp_path / "run.db")
    first = await run(create_session(journal=journal, budget="0.28", budget_scope=scope), *cats(4))
    again = await run(create_session(journal=journal, budget=0, budget_scope=scope), *cats(4))
    more = await run(create_session(journal=journal, budget="0.35", budget_scope=scope), *cats(4), "a dog")

    assert count_completed(first) == count_completed(again) == 4
    assert count_completed(more) == 5
    assert all(outcome.replayed for outcome in again)
    assert gateway.calls["submit"] == 5
    assert max(gateway.accepted.values()) == 1


async def test_a_higher_budget_completes_the_rest(
    create_session: SessionFactory, gateway: Emulator, tmp_path: Path
) -> None:
    """The same requests, streamed again with higher budgets, are all completed, and each is paid for once."""

    def session(budget: str) -> FluxSession:
        return create_session(journal=VirtualJournal(tmp_path / "run.db"), budget=budget)

    first = await run(session("0.40"), *cats(12))
    second = await run(session("0.70"), *cats(12))
    third = await run(session("0.84"), *cats(12))

    assert (count_completed(first), count_completed(second), count_completed(third)) == (5, 10, 12)
    assert set(gateway.accepted.values()) == {1}
    assert gateway.calls["submit"] == 12


async def test_costs_are_learned_from_the_journal(scripted: ScriptedGateway, tmp_path: Path) -> None:
    """The estimate is also learned from replayed outcomes."""
    scripted.submits = deque([answer(200, completed(usage={"cost": "0.50"}))])
    journal = VirtualJournal(tmp_path / "run.db")
    async with session_on(scripted, journal=journal, budget="1.20") as session:
        await session.generate("a cat")
        await session.generate("another cat")
    async with session_on(scripted, journal=journal, budget="1.20") as session:
        await session.generate("a cat")
        with pytest.raises(BudgetExceededError, match=r"\$1\.20 .* about \$0\.50: \$1(\.0+)? are"):
            await session.generate("a third cat")

    assert len(scripted.of("POST")) == 2


@pytest.mark.parametrize("scope", ["journal", "session"])
async def test_refused_and_failed_requests_are_free_in_the_journal(
    scripted: ScriptedGateway, tmp_path: Path, scope: str
) -> None:
    """The reservation of a refused or failed request is released, that of an uncertain submit is not."""
    failed = {"id": "t1", "status": "failed", "error": {"code": "x", "message": "no"}}
    scripted.submits = deque(
        [answer(400, b""), answer(503, b""), answer(200, failed), reset, answer(200, completed("t1"))]
    )
    journal = VirtualJournal(tmp_path / "run.db")
    async with session_on(scripted, journal=journal, budget="0.14", budget_scope=scope) as session:
        with pytest.raises(BadRequestError):
            await session.generate("cat 1")
        with pytest.raises(TaskFailedError):
            await session.generate("cat 2")
        with pytest.raises(SubmissionUncertainError):
            await session.generate("cat 3")
        await session.generate("cat 4")
        with pytest.raises(BudgetExceededError):
            await session.generate("cat 5")

    assert len(scripted.of("POST")) == 5


@pytest.mark.parametrize("cost", ["-0.50", -5, 1e30, "NaN", "1e999999", "free"])
@pytest.mark.parametrize("scope", ["session", "journal"])
async def test_absurd_costs_keep_the_reservation(
    scripted: ScriptedGateway, tmp_path: Path, caplog: pytest.LogCaptureFixture, scope: str, cost: object
) -> None:
    """A cost that is no amount from 0 to 1,000 dollars is logged, and its task counts with what was reserved for it."""
    scripted.submits = deque(answer(200, completed(f"t{number}", usage={"cost": cost})) for number in range(4))
    journal = VirtualJournal(tmp_path / "run.db") if scope == "journal" else None
    async with session_on(scripted, journal=journal, budget="0.21") as session:
        outcomes = [await session.generate(prompt) for prompt in cats(3)]
        with pytest.raises(BudgetExceededError, match=r"\$0\.21 are spent or reserved"):
            await session.generate("one more cat")

    assert len(scripted.of("POST")) == 3
    assert [outcome.usage and outcome.usage.cost for outcome in outcomes] == [None] * 3
    assert session.stats.spent == 0
    shown = [message for message in caplog.messages if "its cost is unknown" in message]
    assert shown == [
        f"task t{number}: its cost is unknown: {cost} is not an amount from 0 to 1,000 dollars" for number in range(3)
    ]
