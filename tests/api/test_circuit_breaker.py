"""The circuit breaker: answers that are lost, or are not the API's own, stop a stream before they cost much."""

from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

import anyio
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.scripted import Behaviour, ScriptedGateway, answer, completed, disconnect, reset, session_on
from support.virtual_time import VirtualJournal

from flux2max_async import (
    AuthenticationError,
    Completed,
    ConfigurationError,
    Failed,
    FluxError,
    FluxSession,
    JournalEntry,
    Outcome,
    PermissionDeniedError,
    ResponseError,
    SessionClosedError,
    SubmissionUncertainError,
)
from flux2max_async._api.circuit_breaker import Attempt, CircuitBreaker

# ---------------------------------------------------------------------- states


def give_up(breaker: CircuitBreaker, attempt: Attempt) -> bool:
    """Do what the client does after a submit was lost for good; return whether streams have to stop."""
    stops = breaker.is_failed_probe(attempt)
    breaker.release(attempt)
    return stops


def lose(breaker: CircuitBreaker, times: int = 1) -> list[Attempt]:
    """Send submits one after the other, whose answers are all lost; nobody has given them up yet."""
    attempts = []
    for _ in range(times):
        attempts.append(breaker.start())
        breaker.on_uncertain(attempts[-1])
    return attempts


def half_open(max_uncertain: int = 3) -> CircuitBreaker:
    """Return a breaker after so many lost answers."""
    breaker = CircuitBreaker(max_uncertain)
    for attempt in lose(breaker, max_uncertain):
        assert not give_up(breaker, attempt)
    assert not breaker.is_closed
    return breaker


@pytest.mark.parametrize("max_uncertain", [1, 2, 5])
def test_submits_are_probes_after_so_many_lost_answers(max_uncertain: int) -> None:
    """Once so many answers in a row are lost, the next submit is a probe, and further ones wait for it."""
    breaker = CircuitBreaker(max_uncertain)
    first = lose(breaker, max_uncertain - 1)
    closed_before = breaker.is_closed
    first += lose(breaker)
    blocks_before = breaker.blocks
    probe = breaker.start()

    assert closed_before
    assert not breaker.is_closed
    assert not any(attempt.is_probe for attempt in first)
    assert (probe.is_probe, blocks_before, breaker.blocks) == (True, False, True)


def test_probe_that_is_answered() -> None:
    """If the service answers the probe, submits are concurrent again, and a new row is counted."""
    breaker = half_open(3)
    breaker.start()
    breaker.on_answer()

    assert (breaker.is_closed, breaker.blocks, breaker.has_failures) == (True, False, False)
    lose(breaker, 2)
    assert breaker.is_closed
    lose(breaker)
    assert not breaker.is_closed


def test_probe_whose_answer_is_lost() -> None:
    """If the probe's answer is lost for good, streams have to stop; a single call may still probe."""
    breaker = half_open(3)
    (probe,) = lose(breaker)
    waits_for_a_webhook = breaker.blocks

    assert waits_for_a_webhook
    assert give_up(breaker, probe)
    assert not breaker.blocks
    (next_probe,) = lose(breaker)
    assert next_probe.is_probe
    assert give_up(breaker, next_probe)


def test_probe_of_which_nothing_is_learned() -> None:
    """If the probe could not be sent, or was refused for now, the next one starts."""
    breaker = half_open(3)
    probe = breaker.start()
    breaker.release(probe)

    assert not breaker.blocks
    assert breaker.start().is_probe


def test_submit_that_was_on_the_wire_before() -> None:
    """A submit that was sent before submits became probes is none, whatever becomes of it."""
    breaker = CircuitBreaker(3)
    early = [breaker.start() for _ in range(10)]
    for attempt in early:
        breaker.on_uncertain(attempt)
    probe = breaker.start()
    stops = [give_up(breaker, attempt) for attempt in early]

    assert not any(stops)
    assert probe.is_probe
    assert breaker.blocks


@pytest.mark.parametrize("max_uncertain", [1, 3])
def test_success_while_the_probe_is_on_the_wire(max_uncertain: int) -> None:
    """If another submit succeeds in the meantime, the row has ended, and the probe stops nothing."""
    breaker = CircuitBreaker(max_uncertain)
    lose(breaker, max_uncertain)
    probe = breaker.start()
    breaker.on_answer()
    closed = breaker.is_closed
    breaker.on_uncertain(probe)

    assert closed
    assert not give_up(breaker, probe)
    assert breaker.is_closed is (max_uncertain > 1)


def test_success_while_the_webhook_of_the_probe_is_waited_for() -> None:
    """The same holds if the probe's answer is lost already."""
    breaker = CircuitBreaker(3)
    lose(breaker, 3)
    (probe,) = lose(breaker)
    breaker.on_answer()

    assert not breaker.blocks
    assert not give_up(breaker, probe)
    assert breaker.is_closed


def test_submits_that_webhooks_resolve() -> None:
    """A submit that a webhook resolves no longer counts; with fewer than the limit left, submits are concurrent again."""
    breaker = CircuitBreaker(3)
    lost = lose(breaker, 3)
    (probe,) = lose(breaker)
    breaker.resolve(lost[0])
    still_open = not breaker.is_closed
    breaker.resolve(lost[1])

    assert still_open
    assert breaker.is_closed
    assert not give_up(breaker, probe)


def test_probe_that_a_webhook_resolves() -> None:
    """If a webhook resolves the probe, the next submit is a probe, as long as the others are not resolved."""
    breaker = half_open(3)
    (probe,) = lose(breaker)
    breaker.resolve(probe)

    assert (breaker.is_closed, breaker.blocks) == (False, False)
    assert breaker.start().is_probe


def test_submit_of_an_earlier_row() -> None:
    """A submit of an earlier row that a webhook resolves late doesn't count in the current one."""
    breaker = CircuitBreaker(3)
    old = lose(breaker, 2)
    breaker.on_answer()
    lose(breaker, 3)
    for attempt in old:
        breaker.resolve(attempt)

    assert not breaker.is_closed


def test_no_limit() -> None:
    """Without a limit, submits are never probes."""
    breaker = CircuitBreaker(None)
    attempts = lose(breaker, 1000)

    assert (breaker.is_closed, breaker.blocks) == (True, False)
    assert not any(attempt.is_probe or give_up(breaker, attempt) for attempt in attempts)


def test_foreign_answers() -> None:
    """The third answer in a row that isn't the API's own stops streams; only an answer of the API begins a new row."""
    breaker = CircuitBreaker(None)
    assert [breaker.on_foreign_answer(breaker.start()) for _ in range(4)] == [False, False, True, True]

    breaker.on_answer()
    assert [breaker.on_foreign_answer(breaker.start()) for _ in range(2)] == [False, False]
    lose(breaker)
    assert breaker.on_foreign_answer(breaker.start())


def test_foreign_answer_to_a_probe() -> None:
    """An answer that isn't the API's own tells nothing about lost answers: the next probe may start."""
    breaker = half_open(3)
    breaker.on_foreign_answer(breaker.start())

    assert (breaker.is_closed, breaker.blocks) == (False, False)


ON_SENT: dict[str, Callable[[CircuitBreaker, Attempt], bool | None]] = {
    "answer": lambda breaker, _: breaker.on_answer(),
    "foreign": CircuitBreaker.on_foreign_answer,
    "uncertain": CircuitBreaker.on_uncertain,
    "release": CircuitBreaker.release,
}
ON_LOST: dict[str, Callable[[CircuitBreaker, Attempt], bool | None]] = {
    "resolve": CircuitBreaker.resolve,
    "give up": give_up,
}
STEPS = st.tuples(st.sampled_from(["start", "start", *ON_SENT, "uncertain", *ON_LOST]), st.integers(0, 5))


@settings(max_examples=300, deadline=None)
@given(max_uncertain=st.integers(1, 4), steps=st.lists(STEPS, max_size=60))
def test_any_order_of_events(max_uncertain: int, steps: list[tuple[str, int]]) -> None:
    """In any order of events, submits wait only for a probe of which nothing is known, and only while it matters."""
    breaker = CircuitBreaker(max_uncertain)
    sent: list[Attempt] = []
    lost: list[Attempt] = []
    for step, index in steps:
        attempts = lost if step in ON_LOST else sent
        if step == "start":
            if not breaker.blocks:
                sent.append(breaker.start())
        elif attempts:
            attempt = attempts.pop(index % len(attempts))
            stops = {**ON_SENT, **ON_LOST}[step](breaker, attempt)
            lost += [attempt] * (step == "uncertain")
            assert step != "answer" or breaker.is_closed
            assert step != "give up" or not stops or not breaker.is_closed
        assert not breaker.blocks or not breaker.is_closed
        assert not breaker.blocks or any(attempt.is_probe for attempt in (*sent, *lost))
    for attempt in (*sent, *lost):
        breaker.release(attempt)

    assert not breaker.blocks


# ---------------------------------------------------------------------- streams


LOST: dict[str, Behaviour] = {
    "502": answer(502, b"<html>Bad Gateway</html>"),
    "504": answer(504, {"error": {"code": "timeout", "message": "no"}}),
    "reset": reset,
    "closed": disconnect,
    "neither id nor error": answer(200, {"status": {"code": 200, "message": "ok"}, "data": None}),
}
FIREWALL = answer(403, b"<html><h1>Forbidden</h1></html>")


def accepted(count: int) -> Iterator[Behaviour]:
    return (answer(200, completed(f"t{number}")) for number in range(count))


def prompts(count: int) -> Iterator[str]:
    return (f"cat {number}" for number in range(count))


async def run(session: FluxSession, count: int) -> tuple[list[Outcome], FluxError | None]:
    """Return the outcomes of a stream, and the error that it ends with."""
    outcomes: list[Outcome] = []
    try:
        async for outcome in session.stream(prompts(count)):
            outcomes.append(outcome)
    except FluxError as error:
        return outcomes, error
    return outcomes, None


@pytest.mark.parametrize("lost", LOST.values(), ids=LOST)
@pytest.mark.parametrize("after", [0.0, 2.0], ids=["at once", "after 2 s"])
@pytest.mark.parametrize("max_in_flight", [1, 4, 24])
async def test_lost_answers_stop_a_stream(
    scripted: ScriptedGateway, max_in_flight: int, after: float, lost: Behaviour
) -> None:
    """If each answer is lost, the sixth submit stops the stream; others may be on the wire, and no more is sent."""

    async def lose_later(connection: object) -> None:
        await anyio.sleep(after)
        await lost(connection)  # type: ignore[arg-type]

    scripted.submits = deque([lose_later])
    async with session_on(scripted, max_in_flight=max_in_flight) as session:
        outcomes, error = await run(session, 300)
        sent = len(scripted.of("POST"))
        await anyio.sleep(1000.0)

    assert type(error) is SubmissionUncertainError
    assert sent == 6 if max_in_flight == 1 else 6 <= sent <= max_in_flight + 6
    assert len(scripted.of("POST")) == sent
    errors = [type(outcome.error) for outcome in outcomes if isinstance(outcome, Failed)]
    assert errors.count(SubmissionUncertainError) == sent
    assert errors.count(SessionClosedError) == len(outcomes) - sent  # pulled, and not sent
    assert len(outcomes) <= sent + max_in_flight


async def test_what_is_not_sent_is_said_to_be_not_sent(scripted: ScriptedGateway, tmp_path: Path) -> None:
    """Requests that a stream has pulled and not sent are not uncertain, and another run with the journal sends them."""
    scripted.submits = deque([LOST["502"]])
    async with session_on(scripted, max_in_flight=8, journal=VirtualJournal(tmp_path / "run.db")) as session:
        outcomes, error = await run(session, 40)
    sent = len(scripted.of("POST"))
    scripted.submits = deque(accepted(40))
    async with session_on(scripted, max_in_flight=8, journal=VirtualJournal(tmp_path / "run.db")) as session:
        again, no_error = await run(session, 40)

    unsent = [
        outcome for outcome in outcomes if isinstance(outcome, Failed) and type(outcome.error) is SessionClosedError
    ]
    assert type(error) is SubmissionUncertainError
    assert len(unsent) == len(outcomes) - sent > 0
    assert all(outcome.error.__cause__ is error and "not sent" in str(outcome.error) for outcome in unsent)
    assert no_error is None
    assert sum(outcome.ok for outcome in again) == 40 - sent
    assert len(scripted.of("POST")) == 40


async def test_no_limit_of_lost_answers(scripted: ScriptedGateway) -> None:
    """Without a limit, all requests are sent, and the stream doesn't raise."""
    scripted.submits = deque([LOST["502"]])
    async with session_on(scripted, max_in_flight=4, max_uncertain=None) as session:
        outcomes, error = await run(session, 300)

    assert error is None
    assert len(scripted.of("POST")) == len(outcomes) == 300


@pytest.mark.parametrize("max_uncertain", [1, 2, 10])
async def test_limit_of_lost_answers(scripted: ScriptedGateway, max_uncertain: int) -> None:
    """So many answers may be lost in a row, and then that of one probe."""
    scripted.submits = deque([LOST["502"]])
    async with session_on(scripted, max_in_flight=1, max_uncertain=max_uncertain) as session:
        _, error = await run(session, 300)

    assert type(error) is SubmissionUncertainError
    assert len(scripted.of("POST")) == max_uncertain + 1


@pytest.mark.parametrize(
    "between",
    [
        pytest.param(answer(200, completed("t1")), id="accepted"),
        pytest.param(answer(504, {"id": "t1", "status": "in_progress"}), id="504 with an id"),
        pytest.param(answer(400, {"message": "bad prompt"}), id="refused"),
        pytest.param(answer(400, {"message": "flagged as sensitive"}), id="moderated"),
    ],
)
@pytest.mark.parametrize("lost_before", [4, 5])
async def test_answer_of_the_service_in_between(
    scripted: ScriptedGateway, lost_before: int, between: Behaviour
) -> None:
    """An answer of the service, even to a probe, begins a new row."""
    scripted.submits = deque([*[LOST["502"]] * lost_before, between] * 10)
    async with session_on(scripted, max_in_flight=1) as session:
        outcomes, error = await run(session, (lost_before + 1) * 10)

    assert error is None
    assert len(scripted.of("POST")) == len(outcomes) == (lost_before + 1) * 10


async def test_probes_are_sent_one_at_a_time(scripted: ScriptedGateway) -> None:
    """After five lost answers the next submit waits for nothing, further ones for its answer, and then none waits."""
    lost = [answer(502, b"", after=1.0)] * 5
    scripted.submits = deque([*lost, answer(200, completed("p"), after=5.0), *accepted(20)])
    async with session_on(scripted, max_in_flight=5) as session:
        outcomes, error = await run(session, 20)
    first = scripted.of("POST")[0].at

    assert error is None
    assert sum(outcome.ok for outcome in outcomes) == 15
    times = [request.at - first for request in scripted.of("POST")]
    assert times[:6] == pytest.approx([0.0] * 5 + [1.0], abs=0.05)
    assert times[6:] == pytest.approx([6.0] * 14, abs=0.05)


@pytest.mark.parametrize(
    "refusal",
    [
        pytest.param(answer(503, b""), id="503"),
        pytest.param(answer(429, {"message": "slow down"}), id="429"),
        pytest.param(answer(503, b"", [("Retry-After", "7")]), id="503, Retry-After"),
    ],
)
async def test_probe_that_is_refused_for_now(scripted: ScriptedGateway, refusal: Behaviour) -> None:
    """A probe that is refused for now is sent again; others go on in the meantime or after it."""
    scripted.submits = deque([*[LOST["502"]] * 5, refusal, refusal, *accepted(20)])
    async with session_on(scripted, max_in_flight=3) as session:
        outcomes, error = await run(session, 20)

    assert error is None
    assert [outcome.ok for outcome in outcomes].count(True) == 15
    assert len(scripted.of("POST")) == 22


async def test_single_calls_are_not_stopped(scripted: ScriptedGateway) -> None:
    """generate() raises its own error each time, however many came before it."""
    scripted.submits = deque([*[LOST["502"]] * 12, answer(200, completed("t1"))])
    async with session_on(scripted) as session:
        for _ in range(12):
            with pytest.raises(SubmissionUncertainError):
                await session.generate("a cat")
        outcome = await session.generate("a cat")

    assert isinstance(outcome, Completed)
    assert len(scripted.of("POST")) == 13


async def test_single_calls_at_the_same_time(scripted: ScriptedGateway) -> None:
    """Single calls that wait for a probe are sent after it, one at a time, and each raises its own error."""
    scripted.submits = deque([answer(502, b"", after=1.0)])
    errors: list[FluxError] = []

    async def generate(session: FluxSession) -> None:
        with pytest.raises(SubmissionUncertainError) as caught:
            await session.generate("a cat")
        errors.append(caught.value)

    async with session_on(scripted) as session:
        async with anyio.create_task_group() as group:
            for _ in range(5):
                group.start_soon(generate, session)
        async with anyio.create_task_group() as group:
            for _ in range(4):
                group.start_soon(generate, session)
    times = [request.at for request in scripted.of("POST")]

    assert [at - times[0] for at in times] == pytest.approx([0.0] * 5 + [1.0, 2.0, 3.0, 4.0], abs=0.05)
    assert len({id(error) for error in errors}) == 9


# ---------------------------------------------------------------------- firewalls


@pytest.mark.parametrize("status", [400, 401, 402, 403, 451])
@pytest.mark.parametrize("max_in_flight", [1, 24])
async def test_three_answers_of_a_firewall_stop_a_stream(
    scripted: ScriptedGateway, max_in_flight: int, status: int
) -> None:
    """The third answer in a row that isn't the API's own is the error of the stream, which says so."""
    scripted.submits = deque([*accepted(50), answer(status, b"<html><h1>Forbidden</h1></html>")])
    async with session_on(scripted, max_in_flight=max_in_flight) as session:
        outcomes, error = await run(session, 300)
    sent = len(scripted.of("POST"))

    assert isinstance(error, ResponseError)
    assert (error.status, error.from_api) == (status, False)
    assert "a proxy or firewall, not the API" in str(error)
    assert sent == 53 if max_in_flight == 1 else 53 <= sent <= 52 + 2 * max_in_flight
    assert [outcome.ok for outcome in outcomes].count(True) == 50


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("position", [0, 50, 97])
async def test_one_or_two_answers_of_a_firewall(scripted: ScriptedGateway, position: int, times: int) -> None:
    """One or two such answers fail their own requests, and the other 99 or 98 of 100 complete."""
    submits = list(accepted(100))
    submits[position : position + times] = [FIREWALL] * times
    scripted.submits = deque(submits)
    async with session_on(scripted, max_in_flight=1) as session:
        outcomes, error = await run(session, 100)

    failures = [outcome.error for outcome in outcomes if isinstance(outcome, Failed)]
    assert error is None
    assert len(scripted.of("POST")) == len(outcomes) == 100
    assert [type(failure) for failure in failures] == [PermissionDeniedError] * times


async def test_answers_of_a_firewall_that_are_not_in_a_row(scripted: ScriptedGateway) -> None:
    """Many such answers with the API's own in between stop nothing."""
    scripted.submits = deque([FIREWALL, FIREWALL, answer(200, completed("t1"))] * 30)
    async with session_on(scripted, max_in_flight=1) as session:
        outcomes, error = await run(session, 90)

    assert error is None
    assert [outcome.ok for outcome in outcomes].count(True) == 30


async def test_moderated_submit_stops_nothing(scripted: ScriptedGateway) -> None:
    """A 403 of moderation is about its own prompt, however often it comes."""
    moderated = answer(403, {"error": {"code": "content_policy_violation", "message": "no"}})
    scripted.submits = deque([*[moderated] * 50, *accepted(50)])
    async with session_on(scripted, max_in_flight=4) as session:
        outcomes, error = await run(session, 100)

    assert error is None
    assert [outcome.ok for outcome in outcomes].count(True) == 50


@pytest.mark.parametrize(
    ("behaviour", "error_class"),
    [
        pytest.param(answer(403, {"message": "Forbidden"}), PermissionDeniedError, id="403 of the API"),
        pytest.param(answer(401, {"message": "no"}), AuthenticationError, id="401 of the API"),
        pytest.param(answer(404, b"<html>Not Found</html>"), ConfigurationError, id="404"),
        pytest.param(answer(405, {"detail": "Method Not Allowed"}), ConfigurationError, id="405"),
    ],
)
async def test_answers_that_stop_a_stream_at_once(
    scripted: ScriptedGateway, behaviour: Behaviour, error_class: type[FluxError]
) -> None:
    """What every other submit would meet is raised once, after one submit."""
    scripted.submits = deque([behaviour])
    async with session_on(scripted, max_in_flight=1) as session:
        outcomes, error = await run(session, 40)

    assert type(error) is error_class
    assert len(scripted.of("POST")) == len(outcomes) == 1
    assert error_class is not ConfigurationError or scripted.url in str(error)


# ---------------------------------------------------------------------- the setting


@pytest.mark.parametrize("value", [0, -1, True, False, "5", 2.5, float("inf")])
def test_invalid_limit(value: object) -> None:
    """A limit that is not an integer of at least 1 or None is refused when the session is created."""
    with pytest.raises(ConfigurationError, match=f"max_uncertain must be .*{value!r}"):
        FluxSession("key", max_uncertain=value)  # type: ignore[arg-type]


async def test_refusals_for_now_do_not_hide_lost_answers(scripted: ScriptedGateway) -> None:
    """An overloaded gateway that refuses every second submit with 429 and loses the answers to the others is left."""
    scripted.submits = deque([answer(429, {"message": "busy"}), answer(502, b"")] * 60)
    async with session_on(scripted, max_in_flight=1) as session:
        with pytest.raises(SubmissionUncertainError):
            async for outcome in session.stream(f"cat {number}" for number in range(60)):
                assert isinstance(outcome, Failed)

    assert len(scripted.of("POST")) <= 14


@pytest.mark.parametrize("seconds", [0.0, 0.3])
async def test_no_probe_between_the_loss_and_the_stop(
    scripted: ScriptedGateway, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: float
) -> None:
    """However long the outcome of a lost probe takes to be recorded, nothing more is sent before the stream stops."""
    record = VirtualJournal.record

    async def record_slowly(self: VirtualJournal, entry: JournalEntry, /) -> None:
        await anyio.sleep(seconds)
        await record(self, entry)

    monkeypatch.setattr(VirtualJournal, "record", record_slowly)
    scripted.submits = deque([LOST["502"]])
    async with session_on(scripted, max_in_flight=1, journal=VirtualJournal(tmp_path / "journal.db")) as session:
        _, error = await run(session, 300)

    assert type(error) is SubmissionUncertainError
    assert len(scripted.of("POST")) == 6
