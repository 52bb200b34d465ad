"""Money: what may still be spent, what a request will probably cost, and what it asks for."""

import asyncio
import io
import itertools
from collections import Counter, deque
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import anyio
import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from support.responses import picture
from support.scripted import Behaviour, ScriptedGateway, answer, completed, raw, reset, running, session_on
from support.virtual_time import VirtualJournal

from flux2max_async import (
    AuthenticationError,
    BadRequestError,
    BudgetExceededError,
    ConfigurationError,
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
from flux2max_async._models.fingerprint import RequestFingerprint, dimensions, fingerprint_request, is_local
from flux2max_async.emulator import Emulator

Open = Callable[..., FluxSession]
FOUR_MEGAPIXELS = GenerationRequest("a wide cat", width=2048, height=2048)
"""For $0.16."""


@pytest.fixture
def opened(gateway: Emulator) -> Open:
    """Give what makes a session on the gateway."""

    def session(**settings: Any) -> FluxSession:
        return FluxSession(gateway.api_key, base_url=gateway.url, schedule=FixedSchedule(1.0), **settings)

    return session


async def run(session: FluxSession, *requests: str | GenerationRequest, **options: Any) -> list[Outcome]:
    """Stream until the end, or until the budget ends it."""
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


def paid(outcomes: list[Outcome]) -> int:
    return sum(outcome.ok for outcome in outcomes)


def cats(count: int) -> list[str]:
    return [f"cat {number}" for number in range(count)]


# ---------------------------------------------------------------------- a budget


@pytest.mark.parametrize(
    "budget", [Decimal("0.21"), "0.21", 0.21, "0.27", "2.1e-1"], ids=["Decimal", "str", "float", "rest", "exponent"]
)
async def test_a_budget_is_not_passed(opened: Open, gateway: Emulator, budget: Any) -> None:
    """Nothing is submitted whose probable cost would pass the budget, however many places are free."""
    outcomes = await run(opened(budget=budget), *cats(50))

    assert paid(outcomes) == gateway.calls["submit"] == 3


@pytest.mark.parametrize(("budget", "expected"), [(1, 14), (0, 0), (None, 20), ("0.06", 0)])
async def test_whole_budgets_and_none(opened: Open, gateway: Emulator, budget: Any, expected: int) -> None:
    """A dollar is 14 pictures, nothing is none, and no budget sets no limit."""
    outcomes = await run(opened(budget=budget), *cats(20))

    assert paid(outcomes) == gateway.calls["submit"] == expected


async def test_generate_and_submit_tell(opened: Open, gateway: Emulator) -> None:
    """Where the money is used up, generate() and submit() raise before anything is sent, and say what is left."""
    async with opened(budget="0.10") as session:
        await session.generate("a cat")
        with pytest.raises(BudgetExceededError, match=r"\$0\.10 .* about \$0\.07: \$0\.07 are"):
            await session.generate("another cat")
        with pytest.raises(BudgetExceededError):
            await session.submit("another cat")
        with pytest.raises(BudgetExceededError):
            await session.submit("another cat", key="with a key")

    assert gateway.calls["submit"] == 1


async def test_a_stream_delivers_what_is_paid_for(opened: Open, gateway: Emulator) -> None:
    """A stream yields the refusal at once, then what is running, and then raises; its source is pulled no further."""
    pulled = itertools.count()
    outcomes: list[Outcome] = []
    async with opened(budget="0.50", max_in_flight=4) as session:
        with pytest.raises(BudgetExceededError) as caught:
            async for outcome in session.stream(f"cat {number}" for number in pulled):
                outcomes.append(outcome)
    refused = [outcome for outcome in outcomes if not outcome.ok]

    assert paid(outcomes) == gateway.calls["submit"] == 7
    assert [outcome.ok for outcome in outcomes[-3:]] == [True] * 3
    assert all(outcome.error == caught.value and outcome.task_id is None for outcome in refused)
    assert len(outcomes) == next(pulled)
    assert len(refused) <= 4


async def test_what_runs_counts(opened: Open, gateway: Emulator) -> None:
    """Tasks in flight count as what they will probably cost, and then as what they did."""
    async with opened(budget="0.20", price_guess="0.10") as session:
        first = await session.submit("cat 1")
        await anyio.sleep(4)
        second = await session.submit("cat 2")
        with pytest.raises(BudgetExceededError, match=r"\$0\.20 are spent or set aside"):
            await session.submit("cat 3")
        await first
        with pytest.raises(BudgetExceededError, match=r"\$0\.17 are"):
            await session.submit("cat 3")
        await second
        with pytest.raises(BudgetExceededError, match=r"\$0\.14 are"):
            await session.submit("cat 3")

    assert gateway.calls["submit"] == 2


async def test_submits_at_once_share_the_budget(opened: Open, gateway: Emulator) -> None:
    """Callers that ask at the same moment can't spend the same money."""
    async with opened(budget="0.35") as session:
        results = await asyncio.gather(*map(session.generate, cats(20)), return_exceptions=True)

    assert Counter(map(type, results))[BudgetExceededError] == 15
    assert gateway.calls["submit"] == 5


# ---------------------------------------------------------------------- what comes back


NO_HTTP = raw(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{")


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
    """What was set aside for a submit that the service refuses can be spent on another one."""
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
    """A submit that never reached anybody gives back what was set aside for it, however often it was tried."""
    session = FluxSession("key", base_url="http://127.0.0.1:1", budget="0.07", task_timeout=30.0)
    async with session:
        for prompt in ("a cat", "another cat"):
            with pytest.raises(TransportError):
                await session.generate(prompt)

    assert session.stats.retries > 2


async def test_a_submit_that_is_repeated_is_paid_for_once(scripted: ScriptedGateway) -> None:
    """While a submit waits to be repeated its money is free; all tries together cost what the task does."""
    busy = answer(503, b"")
    scripted.submits = deque([busy, busy, answer(200, completed("t1")), answer(200, completed("t2"))])
    async with session_on(scripted, budget="0.14") as session:
        assert (await session.generate("a cat")).task_id == "t1"
        assert (await session.generate("another cat")).task_id == "t2"
        with pytest.raises(BudgetExceededError):
            await session.generate("a third cat")


@pytest.mark.parametrize("submit", [reset, NO_HTTP, answer(500, b"")], ids=["reset", "cut", "500"])
async def test_an_uncertain_submit_stays_paid(scripted: ScriptedGateway, submit: Behaviour) -> None:
    """Where a task may exist, what it may cost stays set aside."""
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
async def test_a_failed_task_costs_what_the_service_says(
    scripted: ScriptedGateway, usage: dict[str, object], spent: str
) -> None:
    """A task that fails without a cost is free; with one, it counts."""
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
async def test_a_picture_without_a_price_costs_what_was_guessed(
    scripted: ScriptedGateway, usage: dict[str, str] | None
) -> None:
    """Where the service names no cost, the guess stands for it."""
    scripted.submits = deque([answer(200, completed(usage=usage))])
    async with session_on(scripted, budget="0.10", price_guess="0.05") as session:
        await session.generate("a cat")
        await session.generate("another cat")
        with pytest.raises(BudgetExceededError, match=r"\$0\.10 are"):
            await session.generate("a third cat")


async def test_a_task_that_is_not_followed_any_more_stays_paid(opened: Open) -> None:
    """A task that is left at its deadline, or when its session closes, may still cost what was set aside."""
    session = opened(budget="0.15", task_timeout=3.0)
    async with session:
        with pytest.raises(DeadlineExceededError):
            await session.generate("a cat")
        await session.submit("another cat")
    async with session:
        with pytest.raises(BudgetExceededError, match=r"\$0\.14 are"):
            await session.submit("a third cat")


async def test_a_gift_is_no_price(scripted: ScriptedGateway) -> None:
    """A task that cost nothing doesn't make the next ones free: what they may cost is still set aside."""
    scripted.submits = deque([answer(200, completed(usage={"cost": "0"})), answer(200, running())])
    scripted.polls = deque([answer(200, running())])
    async with session_on(scripted, budget="0.10") as session:
        await session.generate("a cat")
        await session.submit("another cat")
        with pytest.raises(BudgetExceededError, match=r"about \$0\.07: \$0\.07 are"):
            await session.submit("a third cat")


# ---------------------------------------------------------------------- prices


async def test_the_price_is_learned_from_the_dearest(scripted: ScriptedGateway) -> None:
    """Once a task has told what it cost, the next is thought to cost as much, and no cheaper one changes that."""
    costs = iter(["0.03", "0.02", "0.04"])
    scripted.submits = deque(answer(200, completed(usage={"cost": cost})) for cost in costs)
    async with session_on(scripted, budget="0.12") as session:
        for prompt in cats(3):
            await session.generate(prompt)
        with pytest.raises(BudgetExceededError, match=r"another picture for about \$0\.04: \$0\.09 are"):
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
async def test_larger_requests_are_dearer(
    opened: Open, gateway: Emulator, request_: GenerationRequest, budget: str, allowed: bool
) -> None:
    """The first price is guessed by the megapixels of the output and all inputs, just as the service bills them."""
    (outcome,) = await run(opened(budget=budget), request_)

    assert outcome.ok is allowed
    assert gateway.calls["submit"] == allowed


@given(
    seen=st.integers(1, 40),
    asked=st.integers(1, 40),
    cost=st.decimals("0.01", "9.99", places=2),
)
def test_a_learned_price_grows_with_the_request(seen: int, asked: int, cost: Decimal) -> None:
    """A larger request is thought to be dearer in the proportion of the guesses, a smaller one not to be cheaper."""
    ledger, fresh = Budget(None, None), Budget(None, None)
    ledger.saw(seen, cost)

    assert ledger.price(seen) == cost
    if asked <= seen:
        assert ledger.price(asked) == cost
    else:
        assert ledger.price(asked) == cost * fresh.price(asked) / fresh.price(seen) > cost


@pytest.mark.parametrize("megapixels", range(1, 100))
def test_a_price_that_is_exact_stays_exact(megapixels: int) -> None:
    """A service that bills as we guess is guessed to the cent, so that a budget that suffices isn't refused."""
    ledger, fresh = Budget(None, None), Budget(None, None)
    ledger.saw(1, Decimal("0.07"))
    price = fresh.price(megapixels)
    exactly = Budget(price, None)
    exactly.reserve(ledger.price(megapixels))

    assert ledger.price(megapixels) == price == Decimal("0.07") + Decimal("0.03") * (megapixels - 1)


@pytest.mark.parametrize(("guess", "expected"), [("0.50", 2), (0.25, 4), (1, 1), (Decimal("1.01"), 0)])
async def test_a_price_of_the_callers_own(opened: Open, gateway: Emulator, guess: Any, expected: int) -> None:
    """Until the first task has told, each costs what the caller guesses, whatever its size."""
    async with opened(budget=1, price_guess=guess) as session:
        for number in range(expected):
            await session.submit(FOUR_MEGAPIXELS, seed=number)
        with pytest.raises(BudgetExceededError):
            await session.submit("a small cat")

    assert gateway.calls["submit"] == expected


async def test_a_guess_is_given_up_for_what_is_known(opened: Open, gateway: Emulator) -> None:
    """A guess that was much too high binds only until the first task has told its price."""
    async with opened(budget="0.60", price_guess="0.50") as session:
        await session.generate("a cat")
        outcomes = [outcome async for outcome in session.stream(cats(7))]

    assert paid(outcomes) == 7
    assert gateway.calls["submit"] == 8


# ---------------------------------------------------------------------- settings


@pytest.mark.parametrize("name", ["budget", "price_guess"])
@pytest.mark.parametrize(
    "amount", [-1, "-0.01", float("nan"), float("inf"), "sNaN", "five", "", "$5", "5,00", True, False, b"5", [], object]
)
def test_an_amount_that_cannot_be_spent_is_refused(name: str, amount: Any) -> None:
    """What is no amount of money is a ConfigurationError that names the parameter."""
    settings: dict[str, Any] = {name: amount}
    with pytest.raises(ConfigurationError, match=rf"^{name} must be an amount of US dollars"):
        FluxSession("key", **settings)


@pytest.mark.parametrize("scope", ["journal", "Session", "", 1])
def test_a_scope_that_is_none_is_refused(scope: Any) -> None:
    """A budget of the whole journal needs a journal, and other scopes than these two there are none."""
    with pytest.raises(ConfigurationError, match=r"^budget_scope must be"):
        FluxSession("key", budget=5, budget_scope=scope)


# ---------------------------------------------------------------------- with a journal


@pytest.mark.parametrize(
    ("scope", "expected"),
    [
        pytest.param({}, 0, id="by default the journal's"),
        pytest.param({"budget_scope": "journal"}, 0, id="the journal's"),
        pytest.param({"budget_scope": "session"}, 4, id="the session's"),
    ],
)
async def test_the_next_run_counts_what_the_first_has_spent(
    opened: Open, gateway: Emulator, tmp_path: Path, scope: dict[str, Any], expected: int
) -> None:
    """With a journal the budget is for all runs together, unless it is said to be the session's."""

    def session() -> FluxSession:
        return opened(journal=VirtualJournal(tmp_path / "run.db"), budget="0.30", **scope)

    first = await run(session(), *cats(20))
    second = await run(session(), *(f"dog {number}" for number in range(20)))

    assert (paid(first), paid(second)) == (4, expected)
    assert gateway.calls["submit"] == 4 + expected


@pytest.mark.parametrize("scope", [None, "session"])
async def test_a_journal_sets_no_budget(opened: Open, gateway: Emulator, tmp_path: Path, scope: Any) -> None:
    """Books that are kept without a budget hold nothing back."""
    session = opened(journal=VirtualJournal(tmp_path / "run.db"), budget_scope=scope)

    assert paid(await run(session, *cats(20))) == gateway.calls["submit"] == 20


@pytest.mark.parametrize("scope", ["journal", "session"])
async def test_a_rerun_costs_nothing(opened: Open, gateway: Emulator, tmp_path: Path, scope: str) -> None:
    """What is in the journal is delivered whatever the budget, and none of it is paid for again."""
    journal = VirtualJournal(tmp_path / "run.db")
    first = await run(opened(journal=journal, budget="0.28", budget_scope=scope), *cats(4))
    again = await run(opened(journal=journal, budget=0, budget_scope=scope), *cats(4))
    more = await run(opened(journal=journal, budget="0.35", budget_scope=scope), *cats(4), "a dog")

    assert paid(first) == paid(again) == 4
    assert paid(more) == 5
    assert all(outcome.replayed for outcome in again)
    assert gateway.calls["submit"] == 5
    assert max(gateway.accepted.values()) == 1


async def test_a_raised_budget_lets_the_rest_through(opened: Open, gateway: Emulator, tmp_path: Path) -> None:
    """The same list, run again with more money, comes to its end, and each picture of it is paid for once."""

    def session(budget: str) -> FluxSession:
        return opened(journal=VirtualJournal(tmp_path / "run.db"), budget=budget)

    first = await run(session("0.40"), *cats(12))
    second = await run(session("0.70"), *cats(12))
    third = await run(session("0.84"), *cats(12))

    assert (paid(first), paid(second), paid(third)) == (5, 10, 12)
    assert set(gateway.accepted.values()) == {1}
    assert gateway.calls["submit"] == 12


async def test_the_next_run_knows_what_a_picture_costs(scripted: ScriptedGateway, tmp_path: Path) -> None:
    """Prices are learned from what is replayed, too."""
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
async def test_refusals_and_failures_are_free_in_the_journal_too(
    scripted: ScriptedGateway, tmp_path: Path, scope: str
) -> None:
    """A refused submit gives its money back, an uncertain one doesn't, a failed task is free."""
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


# ---------------------------------------------------------------------- what is asked for


def encoded(size: tuple[int, int], kind: str, mode: str = "RGB", **options: Any) -> bytes:
    file = io.BytesIO()
    image = Image.effect_noise(size, 50).convert(mode)
    if options.get("save_all"):
        options["append_images"] = [Image.new(mode, size)]
    image.save(file, kind, **options)
    return file.getvalue()


def exif() -> bytes:
    """What a camera writes: an orientation and, where a reader might stumble over it, a whole smaller picture."""
    tags = Image.Exif()
    tags[0x0112] = 6
    tags[0x9286] = encoded((48, 32), "JPEG")
    return tags.tobytes()


KINDS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "PNG": ("PNG", "RGBA", {}),
    "JPEG": ("JPEG", "RGB", {}),
    "progressive JPEG": ("JPEG", "RGB", {"progressive": True}),
    "grey JPEG": ("JPEG", "L", {}),
    "JPEG of a camera": ("JPEG", "RGB", {"exif": exif(), "icc_profile": bytes(70_000), "comment": b"\xff\xc0" * 9}),
    "lossy WebP": ("WEBP", "RGB", {}),
    "lossless WebP": ("WEBP", "RGB", {"lossless": True}),
    "WebP with alpha": ("WEBP", "RGBA", {"exif": exif()}),
    "animated WebP": ("WEBP", "RGB", {"save_all": True}),
    "GIF": ("GIF", "P", {}),
}
SIZES = [(333, 77), (77, 333), (1, 1), (1025, 3)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_dimensions_are_read_from_the_head(kind: str, size: tuple[int, int]) -> None:
    """Whatever the format, and whatever stands before its frame, the width and height are those of the picture."""
    data = encoded(size, KINDS[kind][0], KINDS[kind][1], **KINDS[kind][2])

    assert dimensions(data) == size


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        pytest.param(b"RIFF\0\0\0\0WEBPVP8X\x0a\0\0\0\0\0\0\0" + b"\xff\xff\x01\0\0\x02", (131072, 131073), id="WebP"),
        pytest.param(b"\xff\xd8\xff\xff\xff\xc4\0\x04ab\xff\xc2\0\x11\x08\0\x07\0\x09", (9, 7), id="filled JPEG"),
        pytest.param(b"\xff\xd8\xff\xe0\0\x02\x00", None, id="JPEG that is broken"),
        pytest.param(b"RIFF\0\0\0\0AVI LIST" + bytes(99), None, id="film"),
        pytest.param(b"\xfe\xd8\xff\xc0\0\x11\x08\0\x07\0\x09", None, id="no JPEG"),
        pytest.param(b"", None, id="nothing"),
    ],
)
def test_dimensions_of_unusual_heads(data: bytes, expected: tuple[int, int] | None) -> None:
    """Large canvases and fill bytes are read right; what isn't a picture has no dimensions."""
    assert dimensions(data) == expected


@pytest.mark.parametrize("kind", KINDS)
def test_a_head_that_is_cut_has_no_dimensions(kind: str) -> None:
    """However little of a picture there is, its dimensions are found or not, and never wrong."""
    data = encoded((333, 77), KINDS[kind][0], KINDS[kind][1], **KINDS[kind][2])
    found = [dimensions(data[:length]) for length in range(min(len(data), 700))]

    assert set(found) <= {None, (333, 77)}
    assert found[0] is None


HEADS = [b"", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"RIFF....WEBPVP8 ", b"RIFF....WEBPVP8L", b"RIFF....WEBPVP8X", b"RIFF"]


@given(st.sampled_from([*HEADS, b"\xff\xd8\xff", b"\xff\xd8\xff\xe1"]), st.binary(max_size=60))
def test_garbage_hurts_nobody(head: bytes, rest: bytes) -> None:
    """Whatever follows a familiar beginning, there are two numbers or there are none."""
    found = dimensions(head + rest)

    assert found is None or (len(found) == 2 and min(found) >= 0)
    assert found is None or len(head) > 2


def content(**params: Any) -> RequestFingerprint:
    return fingerprint_request(GenerationRequest(**{"prompt": "a cat", **params}))


def test_a_picture_is_the_same_however_it_is_given(tmp_path: Path) -> None:
    """Bytes, a path, an open file and base64 of one picture are the same content; its name is only for people."""
    (tmp_path / "cat.png").write_bytes(picture())
    with (tmp_path / "cat.png").open("rb") as file:
        found = [content(input_images=[source]) for source in (picture(), tmp_path / "cat.png", file)]

    assert len({one.fingerprint for one in found}) == 1
    assert {one.megapixels for one in found} == {2}
    assert found[0].description["input_images"] == found[2].description["input_images"] != [picture()]
    assert found[1].description["input_images"] == [str(tmp_path / "cat.png")]


DIFFERENT: dict[str, Any] = {
    "prompt": "a dog",
    "seed": 7,
    "width": 512,
    "height": 512,
    "safety_tolerance": 0,
    "output_format": "png",
    "extra": {"raw": True},
    "input_images": [picture("PNG")],
}
PICTURES = [
    [picture("JPEG")],
    [picture("PNG"), picture("JPEG")],
    [picture("JPEG"), picture("PNG")],
    ["https://pictures.example/a.png"],
    ["https://pictures.example/b.png"],
]


def test_every_parameter_makes_a_difference() -> None:
    """Whatever changes what is drawn changes the fingerprint, the order of the pictures included."""
    found = [content(), content(seed=8, width=512), content(seed=512, width=8 * 8), content(extra={"raw": False})]
    found += [content(**{name: value}) for name, value in DIFFERENT.items()]
    found += [content(input_images=pictures) for pictures in PICTURES]

    assert len({one.fingerprint for one in found}) == len(found)
    assert DIFFERENT.keys() | {"webhook_url", "webhook_secret", "key"} == {
        field.name for field in attrs.fields(GenerationRequest)
    }


@pytest.mark.parametrize("params", [{}, {"input_images": [picture()]}], ids=["text", "pictures"])
def test_names_and_webhooks_make_none(params: dict[str, Any]) -> None:
    """The same picture is the same whatever it is called and wherever it is announced, and no secret is described."""
    plain = content(**params)
    named = content(key="k", webhook_url="https://app.example/hook", webhook_secret="hush", **params)

    assert named == plain
    assert "hush" not in repr(named)


@pytest.mark.parametrize(
    ("params", "megapixels"),
    [
        ({}, 1),
        ({"width": 0, "height": 0}, 1),
        ({"width": 64, "height": 64}, 1),
        ({"width": 1024, "height": 1024}, 1),
        ({"width": 1025, "height": 1024}, 2),
        ({"width": 2048}, 2),
        ({"width": 2048, "height": 2048}, 4),
        ({"input_images": ["https://pictures.example/a.png"] * 3}, 4),
        ({"input_images": [encoded((1025, 1024), "GIF", "P"), picture("WEBP")], "height": 2000}, 5),
        ({"input_images": [b"\xff\xd8\xff\xe0 whatever"]}, 2),
    ],
)
def test_megapixels_are_those_that_are_billed(params: dict[str, Any], megapixels: int) -> None:
    """Each picture is rounded up, output and inputs alike; one whose size isn't known counts as a megapixel."""
    assert content(**params).megapixels == megapixels


def test_a_picture_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    """A local picture that is missing is an InvalidRequestError that says which of them it is."""
    request = GenerationRequest("a cat", input_images=[picture(), tmp_path / "missing.png"])
    with pytest.raises(InvalidRequestError, match=r"input_images\[1\]: can't read .*missing\.png") as caught:
        fingerprint_request(request)

    assert isinstance(caught.value.__cause__, OSError)
    assert caught.value.field == "input_images"
    assert is_local(request)
    assert not is_local(GenerationRequest("a cat", input_images=["https://pictures.example/a.png"]))


async def test_a_picture_that_cannot_be_read_costs_nothing(opened: Open, gateway: Emulator, tmp_path: Path) -> None:
    """A request with a missing picture is refused before money is set aside for it."""
    async with opened(budget="0.10") as session:
        with pytest.raises(InvalidRequestError, match=r"input_images\[0\]"):
            await session.generate("a cat", input_images=[tmp_path / "missing.png"])
        await session.generate("a cat")

    assert gateway.calls["submit"] == 1


async def test_a_guess_of_nothing_still_counts_what_is_spent(opened: Open) -> None:
    """With a guess that is too low by all, the first tasks get through, and their cost counts against the budget."""
    async with opened(budget="0.10", price_guess=0, max_in_flight=1) as session:
        await session.generate("cat 0")
        with pytest.raises(BudgetExceededError, match=r"\$0.07 are spent"):
            await session.generate("cat 1")


async def test_what_a_failed_task_costs_is_no_price(scripted: ScriptedGateway) -> None:
    """A failure for a cent doesn't make pictures cheap."""
    failure = running(status="failed", error={"code": "x", "message": "no"}, usage={"cost": "0.01"})
    scripted.polls = deque([answer(200, failure), answer(200, completed())])
    async with session_on(scripted, budget="0.10") as session:
        with pytest.raises(TaskFailedError):
            await session.generate("cat 0")
        await session.generate("cat 1")
        with pytest.raises(BudgetExceededError, match=r"for about \$0.07: \$0.08 are spent"):
            await session.generate("cat 2")


async def test_a_budget_and_a_folder_need_no_journal(opened: Open, tmp_path: Path) -> None:
    """A stream with a budget saves its pictures with or without a journal."""
    outcomes = await run(opened(budget=1), *cats(3), save_to=tmp_path)

    assert len({path for outcome in outcomes for path in outcome.unwrap().saved}) == 3
