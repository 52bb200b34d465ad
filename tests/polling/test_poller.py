"""TaskPoller: a failed poll is retried until the deadline; only the service ends a task."""

from collections import deque
from contextlib import nullcontext
from decimal import Decimal
from itertools import pairwise

import anyio
import pytest
from support.scripted import (
    Behaviour,
    ScriptedGateway,
    answer,
    completed,
    disconnect,
    half,
    half_hang,
    hang,
    html,
    no_http,
    reset,
    running,
    session_on,
)
from support.webhooks import SECRET, sign

from flux2max_async import (
    AuthenticationError,
    BadRequestError,
    Completed,
    ContentModeratedError,
    DeadlineExceededError,
    Failed,
    FixedSchedule,
    FluxError,
    FluxSession,
    GenerationRequest,
    InsufficientBalanceError,
    Outcome,
    PermissionDeniedError,
    PollPlan,
    ProtocolError,
    SessionClosedError,
    TaskFailedError,
    TaskNotFoundError,
    TaskSnapshot,
    TaskStatus,
    WebhookInbox,
)

COMPLETED = answer(200, completed())
RUNNING = answer(200, running())


async def test_task_is_polled_until_it_is_completed(scripted: ScriptedGateway) -> None:
    """The outcome has the images, the usage, the duration, the number of polls and the metadata."""
    scripted.polls = deque([RUNNING, answer(200, running(progress=0.5)), answer(200, completed(metadata={"a": 1}))])
    async with session_on(scripted) as session:
        outcome = await session.generate(GenerationRequest("a cat", key="k"))

    assert [image.url for image in outcome.images] == ["https://pictures.example/0.jpeg"]
    assert outcome.images[0].extra == {"jobId": "j1"}
    assert outcome.usage is not None
    assert outcome.usage.cost == Decimal("0.07")
    assert outcome.metadata == {"a": 1}
    assert outcome.request == GenerationRequest("a cat", key="k")
    assert outcome.polls == 3
    assert outcome.elapsed == pytest.approx(3.0, abs=0.35)
    assert outcome.unwrap() is outcome
    assert [request.path for request in scripted.of("GET")] == ["/model/v1/generation/task/t1"] * 3


@pytest.mark.parametrize(
    "behaviour",
    [
        pytest.param(reset, id="reset"),
        pytest.param(disconnect, id="disconnected"),
        pytest.param(half, id="truncated"),
        pytest.param(half_hang, id="truncated, then hung"),
        pytest.param(hang, id="hung"),
        pytest.param(no_http, id="not HTTP"),
        pytest.param(html, id="HTML"),
        pytest.param(answer(200, {"error": {"message": "no"}}), id="200, error"),
        pytest.param(answer(200, {"id": "t1", "status": "completed", "output": []}), id="completed without output"),
        pytest.param(answer(404, b""), id="404 soon after the submit"),
        pytest.param(answer(200, {"status": {"code": 404, "message": "no"}}), id="404 in an envelope"),
        pytest.param(answer(200, {"id": None, "status": "Task not found"}), id="Task not found"),
        *(pytest.param(answer(status, b""), id=str(status)) for status in (408, 429, 500, 502, 503, 504)),
    ],
)
async def test_failed_polls_are_retried(scripted: ScriptedGateway, behaviour: Behaviour) -> None:
    """Three polls in a row that fail in the same way have no effect but the polls themselves."""
    scripted.polls = deque([behaviour, behaviour, behaviour, COMPLETED])
    async with session_on(scripted, http_timeout=5.0) as session:
        outcome = await session.generate("a cat")

        assert session.stats.retries == outcome.polls - 1
    assert outcome.ok
    assert len(scripted.of("GET")) == 4
    # aiohttp itself retries a GET once on a closed connection, so the server may receive more polls than we count.
    assert 2 <= outcome.polls <= 4


@pytest.mark.parametrize(
    "behaviour",
    [
        pytest.param(html, id="HTML"),
        pytest.param(answer(200, {"id": "t1", "status": "completed"}), id="completed without output"),
        pytest.param(answer(200, {"error": "no"}), id="200, error"),
    ],
)
async def test_five_unreadable_responses_in_a_row_end_the_task(scripted: ScriptedGateway, behaviour: Behaviour) -> None:
    """A server that doesn't implement the API ends the task soon; the outcome has the task's id."""
    scripted.polls = deque([behaviour])
    async with session_on(scripted) as session:
        outcome = await (await session.submit("a cat")).outcome()

    assert isinstance(outcome, Failed)
    assert isinstance(outcome.error, ProtocolError)
    assert (outcome.task_id, outcome.polls) == ("t1", 5)


async def test_readable_response_resets_the_count_of_unreadable_ones(scripted: ScriptedGateway) -> None:
    """Any readable response resets the count of unreadable responses."""
    scripted.polls = deque([html, html, html, html, RUNNING, html, html, html, html, COMPLETED])
    async with session_on(scripted) as session:
        outcome = await session.generate("a cat")

    assert outcome.polls == 10


@pytest.mark.parametrize(
    ("behaviour", "error"),
    [
        pytest.param(answer(401, {"message": "no"}), AuthenticationError, id="401"),
        pytest.param(answer(200, {"status": "failed", "error": "out of memory"}), TaskFailedError, id="failed"),
        pytest.param(
            answer(200, {"status": "failed", "error": {"code": 1, "error_message": "Request Moderated"}}),
            ContentModeratedError,
            id="moderated",
        ),
    ],
)
async def test_final_failures_end_the_task(
    scripted: ScriptedGateway, behaviour: Behaviour, error: type[FluxError]
) -> None:
    """A failure that can't be retried is the task's outcome, which has the task's id."""
    scripted.polls = deque([RUNNING, behaviour])
    async with session_on(scripted) as session:
        outcome = await (await session.submit("a cat")).outcome()
        with pytest.raises(error):
            outcome.unwrap()

    assert isinstance(outcome, Failed)
    assert not outcome.ok
    assert type(outcome.error) is error
    assert outcome.task_id == "t1"


@pytest.mark.parametrize(
    "behaviour",
    [
        pytest.param(answer(404, {"error": {"code": "task_not_found", "message": "no such task"}}), id="404"),
        pytest.param(answer(200, {"id": None, "status": "Task not found"}), id="status"),
        pytest.param(answer(200, {"status": {"code": 404, "message": "no such task"}, "data": None}), id="envelope"),
    ],
)
async def test_404_is_final_after_the_grace_period(scripted: ScriptedGateway, behaviour: Behaviour) -> None:
    """A 404 of the API is retried for 30 s after the submit, and is final after that."""
    scripted.polls = deque([behaviour])
    async with session_on(scripted) as session:
        outcome = await (await session.submit("a cat")).outcome()

    assert isinstance(outcome, Failed)
    assert isinstance(outcome.error, TaskNotFoundError)
    assert 30 <= outcome.elapsed < 60


# ---------------------------------------------------------------------- refused polls


REFUSED: dict[str, tuple[int, object, type[FluxError]]] = {
    "400": (400, {"error": {"code": 40001, "error_message": "no"}}, BadRequestError),
    "400, detail": (400, {"detail": "no"}, BadRequestError),
    "401": (401, {"error": {"code": "unauthorized", "message": "no"}}, AuthenticationError),
    "401, two texts": (401, {"error": "unauthorized", "message": "no"}, AuthenticationError),
    "402": (
        402,
        {"status": {"code": 402, "message": "no", "error_code": 40201}, "data": None},
        InsufficientBalanceError,
    ),
    "403": (403, {"error": {"code": "denied", "message": "no"}}, PermissionDeniedError),
    "403, Forbidden": (403, {"message": "Forbidden"}, PermissionDeniedError),
    "403, no balance": (403, {"error": {"code": 40203, "message": "no"}}, InsufficientBalanceError),
    "429, no balance": (429, {"code": 40208, "message": "no"}, InsufficientBalanceError),
    "401 in an envelope": (200, {"status": {"code": 401, "message": "no"}, "data": None}, AuthenticationError),
}
FOREIGN = {
    "HTML": b"<html><h1>Forbidden</h1></html>",
    "text": b"Access denied. Reference: 18.3a9c7e1b",
    "nothing": b"",
    "JSON of a firewall's own": b'{"blocked": true, "ray": "8f3a9c7e1b2d4f60"}',
    "JSON list": b'[{"message": "Forbidden"}]',
}


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize(("status", "body", "error"), REFUSED.values(), ids=REFUSED)
async def test_one_or_two_refused_polls_do_not_end_a_task(
    scripted: ScriptedGateway, status: int, body: object, error: type[FluxError], times: int
) -> None:
    """A paid task goes on after one or two refusals of its polls, and again after each success."""
    refusals = [answer(status, body)] * times
    scripted.polls = deque([RUNNING, *refusals, RUNNING, *refusals, COMPLETED])
    async with session_on(scripted) as session:
        outcome = await session.generate("a cat")

        assert session.stats.retries == 2 * times
    assert outcome.ok
    assert outcome.polls == 3 + 2 * times


@pytest.mark.parametrize(("status", "body", "error"), REFUSED.values(), ids=REFUSED)
async def test_three_refused_polls_in_a_row_end_a_task(
    scripted: ScriptedGateway, status: int, body: object, error: type[FluxError]
) -> None:
    """A refusal that comes three times in a row, over at least 10 s, is the outcome of the task."""
    scripted.polls = deque([RUNNING, answer(status, body)])
    async with session_on(scripted) as session:
        outcome = await (await session.submit("a cat")).outcome()

    times = [request.at for request in scripted.of("GET")]
    assert isinstance(outcome, Failed)
    assert type(outcome.error) is error
    assert (outcome.task_id, outcome.error.task_id, outcome.polls) == ("t1", "t1", 4)
    assert 10.0 <= times[-1] - times[1] < 12.0


async def test_refusals_within_ten_seconds_do_not_end_a_task(scripted: ScriptedGateway) -> None:
    """Three refusals that come faster than that, because a webhook can't be read, are waited out."""
    refused = answer(403, {"message": "Forbidden"})
    scripted.polls = deque([refused, refused, refused, refused, COMPLETED])
    async with session_on(scripted) as session:
        task = await session.submit("a cat")
        for _ in range(2):
            await anyio.sleep(2.0)
            task._runner.poller.on_webhook(None)  # type: ignore[union-attr]
        outcome = await task

    times = [request.at for request in scripted.of("GET")]
    assert outcome.polls == 5
    assert times[3] - times[0] < 10.0
    assert times[4] - times[0] >= 10.0


@pytest.mark.parametrize("status", [400, 401, 402, 403, 404])
@pytest.mark.parametrize("body", FOREIGN.values(), ids=FOREIGN)
async def test_answers_of_a_firewall_never_end_a_task(scripted: ScriptedGateway, body: bytes, status: int) -> None:
    """However often something else answers in the API's place, the task is polled on, and completes."""
    scripted.polls = deque([*[answer(status, body)] * 20, COMPLETED])
    async with session_on(scripted) as session:
        outcome = await session.generate("a cat")

    assert outcome.ok
    assert outcome.polls == 21


@pytest.mark.parametrize("attached", [False, True])
@pytest.mark.parametrize("status", [400, 401, 402, 403, 404])
async def test_answers_of_a_firewall_until_the_deadline(scripted: ScriptedGateway, status: int, attached: bool) -> None:
    """If something else answers until the deadline, the task ends with DeadlineExceededError, and may be attached."""
    scripted.polls = deque([answer(status, b"<html><h1>Forbidden</h1></html>")])
    async with session_on(scripted, task_timeout=60.0) as session:
        task = session.attach("t1") if attached else await session.submit("a cat")
        outcome = await task.outcome()

    assert isinstance(outcome, Failed)
    assert type(outcome.error) is DeadlineExceededError
    assert outcome.task_id == "t1"
    assert outcome.elapsed == pytest.approx(60.0)
    assert outcome.polls > 5


@pytest.mark.parametrize(
    ("status", "body", "stops"),
    [
        pytest.param(403, {"message": "Forbidden"}, False, id="403"),
        pytest.param(400, {"message": "no"}, False, id="400"),
        pytest.param(401, {"message": "no"}, True, id="401"),
        pytest.param(402, {"error": {"code": 40201, "message": "no"}}, True, id="402"),
        pytest.param(401, b"<html>blocked</html>", False, id="401 of a firewall"),
        pytest.param(402, b"", False, id="402 of a firewall"),
    ],
)
async def test_refused_polls_and_the_submits_of_a_stream(
    scripted: ScriptedGateway, status: int, body: object, stops: bool
) -> None:
    """A poll's refusal stops the submits of a stream only if it is about the key or the balance, and confirmed."""
    scripted.submits = deque(answer(200, {"id": f"t{number}", "status": "in_progress"}) for number in range(100))
    scripted.polls = deque([answer(status, body)])
    outcomes: list[Outcome] = []
    async with session_on(scripted, max_in_flight=8, task_timeout=60.0) as session:
        with pytest.raises((AuthenticationError, InsufficientBalanceError)) if stops else nullcontext():
            async for outcome in session.stream(f"cat {number}" for number in range(100)):
                outcomes.append(outcome)

    assert not any(outcome.ok for outcome in outcomes)
    assert len(outcomes) == len(scripted.of("POST"))
    assert len(outcomes) == 100 if not stops else 8 <= len(outcomes) < 20


async def test_requests_that_are_not_sent_after_a_refused_poll(scripted: ScriptedGateway) -> None:
    """If a poll's refusal stops a stream, requests that wait to be sent have neither its task's id nor its error."""
    scripted.submits = deque([answer(200, {"id": "t1"}), answer(503, b"", [("Retry-After", "60")])])
    scripted.polls = deque([answer(401, {"message": "no"})])
    outcomes: list[Outcome] = []
    async with session_on(scripted, max_in_flight=4) as session:
        with pytest.raises(AuthenticationError) as caught:
            async for outcome in session.stream(["cat 0", "cat 1", "cat 2"]):
                outcomes.append(outcome)

    refused, *unsent = (outcome for outcome in outcomes if isinstance(outcome, Failed))
    assert (refused.task_id, refused.error) == ("t1", caught.value)
    assert [(outcome.task_id, type(outcome.error)) for outcome in unsent] == [(None, SessionClosedError)] * 2
    assert all(outcome.error.__cause__ is caught.value for outcome in unsent)


@pytest.mark.parametrize(
    "refusal", [answer(401, {"message": "no"}), answer(402, {"message": "no"})], ids=["401", "402"]
)
async def test_refusals_that_are_not_confirmed_stop_no_stream(scripted: ScriptedGateway, refusal: Behaviour) -> None:
    """A 401 or 402 that each task meets once or twice stops nothing."""
    scripted.submits = deque(answer(200, {"id": f"t{number}", "status": "in_progress"}) for number in range(30))
    scripted.polls = deque([*[refusal] * 8, COMPLETED])
    async with session_on(scripted, max_in_flight=8) as session:
        outcomes = [outcome async for outcome in session.stream(f"cat {number}" for number in range(30))]

    assert [outcome.ok for outcome in outcomes] == [True] * 30


@pytest.mark.parametrize(
    ("headers", "body", "wait"),
    [
        pytest.param([("Retry-After", "30")], b"", 30.0, id="30 s"),
        pytest.param([("Retry-After", "30")], {"error": {"message": "busy"}}, 30.0, id="30 s, JSON"),
        pytest.param(
            [("Retry-After", "Thu, 01 Jan 2026 00:00:45 GMT"), ("Date", "Thu, 01 Jan 2026 00:00:00 GMT")],
            b"<html>busy</html>",
            45.0,
            id="date",
        ),
        pytest.param([], {"message": "busy", "retry_after": 20}, 20.0, id="body"),
        pytest.param([("Retry-After", "86400")], b"", 120.0, id="a day, cut"),
    ],
)
async def test_retry_after_of_a_503(
    scripted: ScriptedGateway, headers: list[tuple[str, str]], body: object, wait: float
) -> None:
    """After a 503 that asks for a wait, each of ten tasks is polled again no earlier than that."""
    scripted.submits = deque(answer(200, {"id": f"t{number}", "status": "in_progress"}) for number in range(10))
    scripted.polls = deque([*[answer(503, body, headers)] * 20, COMPLETED])
    async with session_on(scripted) as session:
        outcomes = [outcome async for outcome in session.stream(f"cat {number}" for number in range(10))]

    polls: dict[str, list[float]] = {}
    for request in scripted.of("GET"):
        polls.setdefault(request.path, []).append(request.at)
    assert [outcome.ok for outcome in outcomes] == [True] * 10
    assert len(polls) == 10
    for times in polls.values():
        assert [later - earlier for earlier, later in pairwise(times)] == pytest.approx([wait, wait], abs=0.5)


@pytest.mark.parametrize(
    ("submitted", "polls", "known"),
    [
        ({"id": "t1", "status": "in_progress"}, [answer(503, b"")], "its last status was 'in_progress'"),
        ({"id": "t1"}, [answer(200, running() | {"status": "Dreaming"})], "its last status was 'Dreaming'"),
        ({"id": "t1", "status": "queued"}, [answer(200, running()), hang], "its last status was 'in_progress'"),
        (
            {"id": "t1"},
            [answer(200, {"status": {"code": 200}, "data": running() | {"status": "step 3"}})],
            "its last status was 'step 3'",
        ),
        ({"id": "t1"}, [answer(200, running() | {"status": "x" * 1000})], f"its last status was '{'x' * 80}'"),
        ({"id": "t1"}, [answer(503, b"")], "no poll has found its status"),
    ],
)
async def test_deadline_error_names_the_last_status(
    scripted: ScriptedGateway, submitted: object, polls: list[Behaviour], known: str
) -> None:
    """The error of the deadline names the last status in the service's own word."""
    scripted.submits = deque([answer(200, submitted)])
    scripted.polls = deque(polls)
    async with session_on(scripted, task_timeout=20.0) as session:
        with pytest.raises(DeadlineExceededError) as caught:
            await session.generate("a cat")

    assert str(caught.value) == f"task t1 has not ended within 20 s: {known}; attach() it later"


# ---------------------------------------------------------------------- deadlines and schedules


@pytest.mark.parametrize("behaviour", [pytest.param(RUNNING, id="running"), pytest.param(hang, id="hung")])
async def test_deadline_ends_the_task_on_time(scripted: ScriptedGateway, behaviour: Behaviour) -> None:
    """The deadline ends a task on time, even during a hung poll, and the error has the task's id."""
    scripted.polls = deque([behaviour])
    async with session_on(scripted, task_timeout=12.5) as session:
        with pytest.raises(DeadlineExceededError, match="attach") as caught:
            await session.generate("a cat")
        outcome = await session.attach("t1").outcome()

    assert caught.value.task_id == "t1"
    assert isinstance(caught.value, TimeoutError)
    assert outcome.elapsed == pytest.approx(12.5)


async def test_last_poll_is_just_before_the_deadline(scripted: ScriptedGateway) -> None:
    """If the schedule's next poll is after the deadline, the task is polled just before the deadline."""
    async with FluxSession(
        scripted.api_key, base_url=scripted.url, schedule=FixedSchedule(100.0), task_timeout=20.0
    ) as session:
        outcome = await session.generate("a cat")

    assert outcome.elapsed == pytest.approx(19.0)


async def test_no_task_timeout(scripted: ScriptedGateway) -> None:
    """Without a task timeout, a task is polled for hours."""
    scripted.polls = deque([*[RUNNING] * 7, COMPLETED])
    async with FluxSession(
        scripted.api_key, base_url=scripted.url, schedule=FixedSchedule(1000.0), task_timeout=None
    ) as session:
        outcome = await session.generate("a cat")

    assert outcome.elapsed > 7_000


async def test_unknown_status_counts_as_running_and_is_logged_once(
    scripted: ScriptedGateway, caplog: pytest.LogCaptureFixture
) -> None:
    """An unknown status counts as in progress and is logged once."""
    unknown = answer(200, running() | {"status": "Dreaming"})
    scripted.polls = deque([unknown, unknown, COMPLETED])
    async with session_on(scripted) as session:
        task = await session.submit("a cat")
        snapshots = [snapshot async for snapshot in task.updates()]

    assert snapshots[0].status is TaskStatus.IN_PROGRESS
    assert snapshots[-1].status is TaskStatus.COMPLETED
    assert [record.message for record in caplog.records if "unknown task status" in record.message] == [
        "unknown task status 'Dreaming': taken for still running"
    ]


@pytest.mark.parametrize(
    ("headers", "body", "pause"),
    [
        pytest.param([("Retry-After", "7")], b"", 7.0, id="seconds"),
        pytest.param([("Retry-After", "2.5")], b"", 2.5, id="decimal"),
        pytest.param(
            [("Retry-After", "Thu, 01 Jan 2026 00:00:09 GMT"), ("Date", "Thu, 01 Jan 2026 00:00:00 GMT")],
            b"",
            9.0,
            id="date",
        ),
        pytest.param([], {"error": {"message": "no", "retry_after": 6}}, 6.0, id="body"),
        pytest.param([("Retry-After", "86400")], b"", 120.0, id="a day, capped"),
    ],
)
async def test_a_429_holds_back_its_own_poll(
    scripted: ScriptedGateway, headers: list[tuple[str, str]], body: object, pause: float
) -> None:
    """After a poll is refused with 429, its task isn't polled for as long as the service requests; all else goes on."""
    scripted.submits = deque([answer(200, {"id": "t1"}), answer(200, {"id": "t2"})])
    scripted.polls = deque([answer(429, body, headers), answer(200, completed("t2")), COMPLETED])
    async with session_on(scripted) as session:
        task = await session.submit("a cat")
        await anyio.sleep(1.5)
        started = anyio.current_time()
        await session.generate("a dog")
        took = anyio.current_time() - started
        await task

    refused, other, again = scripted.of("GET")
    assert (refused.path, other.path) == (again.path, "/model/v1/generation/task/t2")
    assert took == pytest.approx(1.0, abs=0.3)
    assert pause - 0.01 <= again.at - refused.at <= pause + 2.5


async def test_frequent_429s_hold_back_all_polls(scripted: ScriptedGateway) -> None:
    """After four polls are refused with 429, none is sent for as long as the service requests, and then they spread."""
    scripted.polls = deque([*[answer(429, b"", [("Retry-After", "10")])] * 4, COMPLETED])
    async with session_on(scripted) as session:
        tasks = [session.attach(f"t{number}") for number in range(4)]
        await anyio.sleep(1.0)
        tasks += [session.attach(f"t{number}") for number in range(4, 8)]
        for task in tasks:
            await task.outcome()

    times = [request.at - scripted.received[0].at for request in scripted.of("GET")]
    assert max(times[:4]) < 0.1
    assert min(times[4:8]) > 9.9
    assert max(times[4:8]) < 13.0
    assert len({round(time, 3) for time in times[4:8]}) > 1


async def test_no_final_poll_before_the_time_that_a_429_asks_for(scripted: ScriptedGateway) -> None:
    """A task whose poll was refused with 429 isn't polled before its time, not even at its deadline."""
    scripted.polls = deque([answer(429, b"", [("Retry-After", "60")]), COMPLETED])
    async with session_on(scripted, task_timeout=30.0) as session:
        with pytest.raises(DeadlineExceededError):
            await session.generate("a cat")

    assert len(scripted.of("GET")) == 1


async def test_polls_are_spread(scripted: ScriptedGateway) -> None:
    """Tasks that are submitted at the same time are not polled at the same time."""
    scripted.submits = deque(answer(200, {"id": f"t{n}"}) for n in range(10))
    async with session_on(scripted) as session:
        outcomes = [outcome async for outcome in session.stream(["a cat"] * 10)]

    times = {round(request.at, 3) for request in scripted.of("GET")}
    assert len(outcomes) == 10
    assert len(times) > 5


class FailingSchedule:
    """A schedule that raises an error."""

    def begin(self, request: GenerationRequest | None) -> PollPlan:
        raise ZeroDivisionError("division by zero")


async def test_error_in_a_schedule_ends_only_its_task(scripted: ScriptedGateway) -> None:
    """If the caller's schedule raises, the task fails with that error as the cause, and the session stays usable."""
    async with FluxSession(scripted.api_key, base_url=scripted.url, schedule=FailingSchedule()) as session:
        outcome = await (await session.submit("a cat")).outcome()
        snapshot = await session.fetch("t1")

    assert isinstance(outcome, Failed)
    assert isinstance(outcome.error.__cause__, ZeroDivisionError)
    assert outcome.task_id == "t1"
    assert snapshot.status is TaskStatus.COMPLETED


class RecordingSchedule:
    """A schedule that records what its plans learn."""

    def __init__(self) -> None:
        self.finished: list[tuple[float, float, bool]] = []

    def begin(self, request: GenerationRequest | None) -> "RecordingSchedule":
        return self

    def next_delay(self, elapsed: float, progress: float | None) -> float:
        return 4.0

    def finish(self, not_before: float, by: float, *, completed: bool = True) -> None:
        self.finished.append((not_before, by, completed))


@pytest.mark.parametrize("ok", [True, False])
async def test_schedule_learns_when_the_task_ended(scripted: ScriptedGateway, ok: bool) -> None:
    """The plan receives the polls between which the task ended and whether it completed; not for attached tasks."""
    schedule = RecordingSchedule()
    scripted.polls = deque([RUNNING, COMPLETED if ok else answer(200, {"status": "failed"})])
    async with FluxSession(scripted.api_key, base_url=scripted.url, schedule=schedule) as session:
        await (await session.submit("a cat")).outcome()
        await session.attach("t1").outcome()

    ((not_before, by, is_completed),) = schedule.finished
    assert not_before == pytest.approx(4.0, abs=0.41)
    assert by == pytest.approx(8.0, abs=0.81)
    assert is_completed is ok


async def test_attached_task_is_polled_at_once(scripted: ScriptedGateway) -> None:
    """An attached task is polled at once, and its id may contain any characters."""
    async with session_on(scripted, max_in_flight=1) as session:
        started = anyio.current_time()
        outcome = await session.attach("a/../b c?é", request=GenerationRequest("a cat"))

        assert anyio.current_time() - started < 0.01
        assert session.stats.submitted == 0
    assert isinstance(outcome, Completed)
    assert outcome.request == GenerationRequest("a cat")
    assert scripted.received[0].path == "/model/v1/generation/task/a%2F..%2Fb%20c%3F%C3%A9"


@pytest.mark.parametrize("task_id", [".", ".."])
async def test_task_id_of_dots_is_encoded(scripted: ScriptedGateway, task_id: str) -> None:
    """No task id can be a relative path segment."""
    async with session_on(scripted) as session:
        await session.fetch(task_id)

    assert scripted.received[0].path == "/model/v1/generation/task/" + task_id.replace(".", "%2E")


async def test_404_is_final_for_an_attached_task(scripted: ScriptedGateway) -> None:
    """A 404 ends an attached task at once, because it was submitted earlier."""
    scripted.polls = deque([answer(404, {"error": {"code": "task_not_found", "message": "no such task"}})])
    async with session_on(scripted) as session:
        with pytest.raises(TaskNotFoundError, match="no such task") as caught:
            await session.attach("gone")

    assert caught.value.code == "task_not_found"
    assert len(scripted.received) == 1


async def test_fetch_polls_once(scripted: ScriptedGateway) -> None:
    """fetch() is one poll without waiting and without a retry."""
    scripted.polls = deque([answer(200, running(progress=0.25)), answer(503, b"")])
    async with session_on(scripted) as session:
        snapshot = await session.fetch("t1")
        with pytest.raises(FluxError, match="503"):
            await session.fetch("t1")

    assert (snapshot.status, snapshot.progress) == (TaskStatus.IN_PROGRESS, 0.25)
    assert snapshot.created_at is not None
    assert snapshot.created_at.year == 2025
    assert snapshot.raw["model"] == "flux_2_max"
    assert len(scripted.received) == 2


async def test_webhook_during_a_pause(scripted: ScriptedGateway) -> None:
    """A webhook ends a task at once while its poll waits for as long as the service has asked all calls to wait."""
    inbox = WebhookInbox(secret=SECRET, public_url="https://app.example/hooks")
    scripted.submits = deque([answer(200, running("t1")), answer(200, running("t2"))])
    scripted.polls = deque([answer(429, b"", [("Retry-After", "60")])])
    async with session_on(scripted, webhooks=inbox) as session:
        refused = await session.submit("a cat")
        await anyio.sleep(0.5)
        held_back = await session.submit("a dog")
        await anyio.sleep(20.0)
        for task_id in ("t1", "t2"):
            await inbox.deliver(*sign(completed(task_id)))
        outcomes = [await refused.outcome(), await held_back.outcome()]

    assert [(outcome.ok, outcome.polls) for outcome in outcomes] == [(True, 1), (True, 1)]
    assert [outcome.elapsed for outcome in outcomes] == [
        pytest.approx(20.5, abs=0.5),
        pytest.approx(20.0, abs=0.5),
    ]


async def test_webhook_while_all_polls_are_held_back(scripted: ScriptedGateway) -> None:
    """After four 429s in a row the first poll of another task waits too, and a webhook ends that task meanwhile."""
    inbox = WebhookInbox(secret=SECRET, public_url="https://app.example/hooks")
    scripted.submits = deque([answer(200, running("t1")), answer(200, running("t2"))])
    scripted.polls = deque(
        [*[answer(429, b"", [("Retry-After", "1")])] * 3, answer(429, b"", [("Retry-After", "100")])]
    )
    async with session_on(scripted, webhooks=inbox) as session:
        refused = await session.submit("a cat")
        await anyio.sleep(30.0)
        assert session.stats.rate_limited == 4
        held_back = await session.submit("a dog")
        await anyio.sleep(20.0)
        for task_id in ("t1", "t2"):
            await inbox.deliver(*sign(completed(task_id)))
        outcomes = [await refused.outcome(), await held_back.outcome()]

    assert [(outcome.ok, outcome.polls) for outcome in outcomes] == [(True, 4), (True, 0)]
    assert outcomes[1].elapsed == pytest.approx(20.0, abs=0.5)


async def test_unexpected_timeout_ends_only_its_task(scripted: ScriptedGateway) -> None:
    """A TimeoutError that no webhook has caused is the outcome of its task, and not repeated for ever."""

    async def poll(*_: object, **__: object) -> TaskSnapshot:
        raise TimeoutError

    async with session_on(scripted) as session:
        assert session._supervisor is not None
        session._supervisor.client.poll = poll  # type: ignore[method-assign]
        outcome = await (await session.submit("a cat")).outcome()

    assert isinstance(outcome, Failed)
    assert "unexpected error: TimeoutError()" in str(outcome.error)


async def test_final_poll_after_a_failed_one(scripted: ScriptedGateway) -> None:
    """However long the service asks to wait after a failed poll, there is a final one just before the deadline."""
    scripted.polls = deque([answer(503, b"", [("Retry-After", "60")]), COMPLETED])
    async with session_on(scripted, task_timeout=30.0) as session:
        outcome = await session.generate("a cat")

    assert outcome.polls == 2
    assert outcome.elapsed == pytest.approx(29.0, abs=0.5)
