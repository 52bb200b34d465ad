"""Polls: a failed poll is only a missed look, until the deadline."""

from collections import deque
from decimal import Decimal

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

from flux2max_async import (
    AuthenticationError,
    Completed,
    ContentModeratedError,
    DeadlineExceededError,
    Failed,
    FixedSchedule,
    FluxError,
    FluxSession,
    GenerationRequest,
    PollPlan,
    ProtocolError,
    TaskFailedError,
    TaskNotFoundError,
    TaskStatus,
)

done = answer(200, completed())
not_yet = answer(200, running())


async def test_a_task_is_polled_to_its_end(scripted: ScriptedGateway) -> None:
    """The outcome holds the pictures, the bill, the seconds and the polls, and unknown fields stay reachable."""
    scripted.polls = deque([not_yet, answer(200, running(progress=0.5)), answer(200, completed(metadata={"a": 1}))])
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
    assert [call.path for call in scripted.of("GET")] == ["/model/v1/generation/task/t1"] * 3


@pytest.mark.parametrize(
    "behaviour",
    [
        pytest.param(reset, id="reset"),
        pytest.param(disconnect, id="disconnected"),
        pytest.param(half, id="half an answer"),
        pytest.param(half_hang, id="half an answer, then nothing"),
        pytest.param(hang, id="no answer"),
        pytest.param(no_http, id="no HTTP"),
        pytest.param(html, id="a page"),
        pytest.param(answer(200, {"error": {"message": "no"}}), id="200 with an error"),
        pytest.param(answer(200, {"id": "t1", "status": "completed", "output": []}), id="completed without output"),
        pytest.param(answer(404, b""), id="404 soon after the submit"),
        *(pytest.param(answer(status, b""), id=str(status)) for status in (408, 429, 500, 502, 503, 504)),
    ],
)
async def test_a_failed_poll_is_a_missed_look(scripted: ScriptedGateway, behaviour: Behaviour) -> None:
    """Three polls in a row that fail in one way cost three looks and nothing else."""
    scripted.polls = deque([behaviour, behaviour, behaviour, done])
    async with session_on(scripted, http_timeout=5.0) as session:
        outcome = await session.generate("a cat")

        assert session.stats.retries == outcome.polls - 1
    assert outcome.ok
    assert len(scripted.of("GET")) == 4
    # aiohttp sends a GET on a broken connection once again by itself: the gateway saw more polls than we made.
    assert 2 <= outcome.polls <= 4


@pytest.mark.parametrize(
    "behaviour",
    [
        pytest.param(html, id="a page"),
        pytest.param(answer(200, {"id": "t1", "status": "completed"}), id="completed without output"),
        pytest.param(answer(200, {"error": "no"}), id="200 with an error"),
    ],
)
async def test_five_unreadable_answers_in_a_row_end_the_task(scripted: ScriptedGateway, behaviour: Behaviour) -> None:
    """Nobody waits ten minutes for a gateway that speaks another protocol; the task's id stays known."""
    scripted.polls = deque([behaviour])
    async with session_on(scripted) as session:
        outcome = await (await session.submit("a cat")).outcome()

    assert isinstance(outcome, Failed)
    assert isinstance(outcome.error, ProtocolError)
    assert (outcome.task_id, outcome.polls) == ("t1", 5)


async def test_unreadable_answers_that_are_not_in_a_row_are_forgiven(scripted: ScriptedGateway) -> None:
    """Anything readable between unreadable answers starts the count again."""
    scripted.polls = deque([html, html, html, html, not_yet, html, html, html, html, done])
    async with session_on(scripted) as session:
        outcome = await session.generate("a cat")

    assert outcome.polls == 10


@pytest.mark.parametrize(
    ("behaviour", "error"),
    [
        pytest.param(answer(401, b""), AuthenticationError, id="401"),
        pytest.param(answer(200, {"status": "failed", "error": "out of paint"}), TaskFailedError, id="failed"),
        pytest.param(
            answer(200, {"status": "failed", "error": {"code": 1, "error_message": "Request Moderated"}}),
            ContentModeratedError,
            id="moderated",
        ),
    ],
)
async def test_what_ends_a_task_is_its_outcome(
    scripted: ScriptedGateway, behaviour: Behaviour, error: type[FluxError]
) -> None:
    """A failure that another look can't mend ends the task, with its id."""
    scripted.polls = deque([not_yet, behaviour])
    async with session_on(scripted) as session:
        outcome = await (await session.submit("a cat")).outcome()
        with pytest.raises(error):
            outcome.unwrap()

    assert isinstance(outcome, Failed)
    assert not outcome.ok
    assert type(outcome.error) is error
    assert outcome.task_id == "t1"


async def test_a_task_that_stays_unknown_is_not_found(scripted: ScriptedGateway) -> None:
    """A 404 is tolerated for half a minute after the submit, then it is the end."""
    scripted.polls = deque([answer(404, b"")])
    async with session_on(scripted) as session:
        outcome = await (await session.submit("a cat")).outcome()

    assert isinstance(outcome, Failed)
    assert isinstance(outcome.error, TaskNotFoundError)
    assert 30 <= outcome.elapsed < 60


@pytest.mark.parametrize("behaviour", [pytest.param(not_yet, id="running"), pytest.param(hang, id="hung")])
async def test_the_deadline_is_hard(scripted: ScriptedGateway, behaviour: Behaviour) -> None:
    """The deadline ends a task on time, a hung socket included, and the error names the paid task."""
    scripted.polls = deque([behaviour])
    async with session_on(scripted, task_timeout=12.5) as session:
        with pytest.raises(DeadlineExceededError, match="attach") as caught:
            await session.generate("a cat")
        outcome = await session.attach("t1").outcome()

    assert caught.value.task_id == "t1"
    assert isinstance(caught.value, TimeoutError)
    assert outcome.elapsed == pytest.approx(12.5)


async def test_the_last_look_comes_just_before_the_deadline(scripted: ScriptedGateway) -> None:
    """A schedule that would look only after the deadline doesn't cost the picture."""
    async with FluxSession(
        scripted.api_key, base_url=scripted.url, schedule=FixedSchedule(100.0), task_timeout=20.0
    ) as session:
        outcome = await session.generate("a cat")

    assert outcome.elapsed == pytest.approx(19.0)


async def test_without_a_deadline_waiting_has_no_limit(scripted: ScriptedGateway) -> None:
    """With deadline None a task is followed for hours."""
    scripted.polls = deque([*[not_yet] * 7, done])
    async with FluxSession(
        scripted.api_key, base_url=scripted.url, schedule=FixedSchedule(1000.0), task_timeout=None
    ) as session:
        outcome = await session.generate("a cat")

    assert outcome.elapsed > 7_000


async def test_an_unknown_status_is_still_running_and_said_once(
    scripted: ScriptedGateway, caplog: pytest.LogCaptureFixture
) -> None:
    """A status that nobody knows yet counts as running, is shown raw, and is logged once."""
    strange = answer(200, running() | {"status": "Dreaming"})
    scripted.polls = deque([strange, strange, done])
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
async def test_a_429_pauses_polls_and_submits(
    scripted: ScriptedGateway, headers: list[tuple[str, str]], body: object, pause: float
) -> None:
    """After a 429 on a poll, nothing at all is sent for as long as the service says."""
    scripted.polls = deque([answer(429, body, headers), done])
    async with session_on(scripted) as session:
        task = await session.submit("a cat")
        await anyio.sleep(1.5)
        await session.submit("a dog")
        await task

    refused = scripted.of("GET")[0].at
    assert scripted.of("POST")[1].at - refused == pytest.approx(pause, abs=0.01)
    assert pause - 0.01 <= scripted.of("GET")[1].at - refused <= pause + 2.5


async def test_polls_do_not_march_in_step(scripted: ScriptedGateway) -> None:
    """Tasks submitted at the same moment are not polled at the same moment."""
    scripted.submits = deque(answer(200, {"id": f"t{n}"}) for n in range(10))
    async with session_on(scripted) as session:
        outcomes = [outcome async for outcome in session.stream(["a cat"] * 10)]

    moments = {round(call.at, 3) for call in scripted.of("GET")}
    assert len(outcomes) == 10
    assert len(moments) > 5


class Broken:
    """A caller's schedule with a fault in it."""

    def begin(self, request: GenerationRequest | None) -> PollPlan:
        raise ZeroDivisionError("oh")


async def test_a_fault_in_a_schedule_ends_one_task_alone(scripted: ScriptedGateway) -> None:
    """A caller's own schedule that raises fails the task with our error and its cause, and the session lives on."""
    async with FluxSession(scripted.api_key, base_url=scripted.url, schedule=Broken()) as session:
        outcome = await (await session.submit("a cat")).outcome()
        snapshot = await session.fetch("t1")

    assert isinstance(outcome, Failed)
    assert isinstance(outcome.error.__cause__, ZeroDivisionError)
    assert outcome.task_id == "t1"
    assert snapshot.status is TaskStatus.COMPLETED


class Noting:
    """A schedule that notes what it is told."""

    def __init__(self) -> None:
        self.finished: list[tuple[float, float, bool]] = []

    def begin(self, request: GenerationRequest | None) -> "Noting":
        return self

    def next_delay(self, elapsed: float, progress: float | None) -> float:
        return 4.0

    def finish(self, not_before: float, by: float, *, completed: bool = True) -> None:
        self.finished.append((not_before, by, completed))


@pytest.mark.parametrize("ok", [True, False])
async def test_schedules_learn_from_what_was_seen(scripted: ScriptedGateway, ok: bool) -> None:
    """A schedule is told between which two polls the task ended, and whether well; an attached task teaches nothing."""
    schedule = Noting()
    scripted.polls = deque([not_yet, done if ok else answer(200, {"status": "failed"})])
    async with FluxSession(scripted.api_key, base_url=scripted.url, schedule=schedule) as session:
        await (await session.submit("a cat")).outcome()
        await session.attach("t1").outcome()

    ((not_before, by, completed_well),) = schedule.finished
    assert not_before == pytest.approx(4.0, abs=0.41)
    assert by == pytest.approx(8.0, abs=0.81)
    assert completed_well is ok


async def test_attach_finds_a_task_of_another_process(scripted: ScriptedGateway) -> None:
    """An attached task is looked at at once, and its id may hold anything."""
    async with session_on(scripted, max_in_flight=1) as session:
        started = anyio.current_time()
        outcome = await session.attach("a/../b c?é", request=GenerationRequest("a cat"))

        assert anyio.current_time() - started < 0.01
        assert session.stats.submitted == 0
    assert isinstance(outcome, Completed)
    assert outcome.request == GenerationRequest("a cat")
    assert scripted.received[0].path == "/model/v1/generation/task/a%2F..%2Fb%20c%3F%C3%A9"


@pytest.mark.parametrize("task_id", [".", ".."])
async def test_an_id_of_dots_is_not_a_path(scripted: ScriptedGateway, task_id: str) -> None:
    """No id can leave the path of tasks."""
    async with session_on(scripted) as session:
        await session.fetch(task_id)

    assert scripted.received[0].path == "/model/v1/generation/task/" + task_id.replace(".", "%2E")


async def test_an_attached_task_that_is_unknown_ends_at_once(scripted: ScriptedGateway) -> None:
    """There is nothing to wait for when a task that was submitted earlier is not found."""
    scripted.polls = deque([answer(404, {"error": {"code": "task_not_found", "message": "no such task"}})])
    async with session_on(scripted) as session:
        with pytest.raises(TaskNotFoundError, match="no such task") as caught:
            await session.attach("gone")

    assert caught.value.code == "task_not_found"
    assert len(scripted.received) == 1


async def test_fetch_looks_once(scripted: ScriptedGateway) -> None:
    """fetch() is one poll that neither waits nor repeats."""
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
