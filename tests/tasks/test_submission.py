"""Submits whose answers are lost: the webhook of such a submit tells its task, and until then it holds its slot."""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import aiohttp
import anyio
import pytest
from support.scripted import Behaviour, Connection, ScriptedGateway, answer, completed, hang, html, reset, running
from support.virtual_time import VirtualJournal, hold_up
from support.webhooks import SECRET, InboxServer, session_on, sign

from flux2max_async import (
    BudgetExceededError,
    Completed,
    ContentModeratedError,
    DeadlineExceededError,
    Failed,
    FixedSchedule,
    FluxSession,
    GenerationRequest,
    JournalEntry,
    LearnedSchedule,
    Outcome,
    SessionClosedError,
    SqliteJournal,
    SubmissionUncertainError,
    TaskFailedError,
    WebhookInbox,
)
from flux2max_async.journal import EntryState
from flux2max_async.webhooks._tokens import token_of

LOST: dict[str, Behaviour] = {
    "reset": reset,
    "hang": hang,
    "bad gateway": answer(502, b"<html>502 Bad Gateway</html>"),
    "page": html,
    "no id": answer(200, {"status": {"code": 200, "message": "ok"}, "data": {}}),
}
"""All ways in which the answer to a submit is lost."""
HTTP_TIMEOUT = 5.0
MODERATED = {"id": "t1", "status": "Request Moderated", "error": "content_policy_violation"}
FAILED = {"id": "t1", "status": "failed", "error": {"code": "x", "message": "no"}}

Post = Callable[..., Awaitable[int]]

every_loss = pytest.mark.parametrize("lost", LOST.values(), ids=LOST)
in_real_time = pytest.mark.parametrize("anyio_backend", ["asyncio"])


async def post(url: str, payload: object, secret: str = SECRET) -> int:
    """Deliver a payload over HTTP, as the service does; return the HTTP status of the response."""
    body, headers = sign(payload, secret)
    async with aiohttp.ClientSession() as http, http.post(url, data=body, headers=headers) as response:
        return response.status


def webhook_url(gateway: ScriptedGateway, submit: int = 0) -> str:
    """Return the webhook URL that a submit named."""
    return str(gateway.of("POST")[submit].params["webhook_url"])


def opened(scripted: ScriptedGateway, server: InboxServer, **settings: Any) -> FluxSession:
    return session_on(scripted, server.inbox, **{"http_timeout": HTTP_TIMEOUT, **settings})


def expected_submits(server: InboxServer) -> object:
    return server.inbox.dispatcher.registry._expected


async def wait_for_posts(scripted: ScriptedGateway, count: int) -> None:
    while len(scripted.of("POST")) < count:  # noqa: ASYNC110 - the server has no event for it
        await anyio.sleep(0.05)


async def only_entry(path: Path) -> JournalEntry:
    (entry,) = [entry async for entry in SqliteJournal(path).entries()]
    return entry


def learned(seconds: float) -> LearnedSchedule:
    """Return a schedule that has learned that tasks take about so many seconds."""
    schedule = LearnedSchedule()
    for _ in range(50):
        schedule.begin(None).finish(seconds, seconds, completed=True)
    return schedule


# ---------------------------------------------------------------------- the delivery comes


@every_loss
async def test_delivery_during_the_wait(scripted: ScriptedGateway, inbox_server: InboxServer, lost: Behaviour) -> None:
    """A request whose answer is lost completes with its delivery: submitted once, never polled, counted once."""
    scripted.submits = deque([lost])
    async with opened(scripted, inbox_server) as session:
        waiting = asyncio.ensure_future(session.generate("a cat"))
        await anyio.sleep(40.0)
        before = session.stats
        status = await post(webhook_url(scripted), completed("t1"))
        done = await waiting
        stats = session.stats

    assert status == 200
    assert (done.task_id, len(done.images), done.polls, done.replayed) == ("t1", 1, 0, False)
    assert done.elapsed == pytest.approx(40.0, abs=0.2)
    assert (before.submitted, before.submitting, before.in_flight, before.completed) == (0, 0, 0, 0)
    assert (stats.submitted, stats.submitting, stats.in_flight, stats.completed, stats.failed) == (1, 0, 0, 1, 0)
    assert (stats.webhooks, stats.spent, stats.polls) == (1, Decimal("0.07"), 0)
    assert len(scripted.of("POST")) == 1
    assert not expected_submits(inbox_server)


@every_loss
async def test_delivery_before_the_answer_is_lost(
    scripted: ScriptedGateway, inbox_server: InboxServer, lost: Behaviour
) -> None:
    """A delivery that comes before the answer is lost counts as well."""
    statuses: list[int] = []

    async def deliver_first(connection: Connection) -> None:
        statuses.append(await post(connection.call.params["webhook_url"], completed("t1")))
        await lost(connection)

    scripted.submits = deque([deliver_first])
    async with opened(scripted, inbox_server) as session:
        done = await session.generate("a cat")
        stats = session.stats
        registry = inbox_server.inbox.dispatcher.registry

        assert not registry._expected
        assert not registry._early
    assert statuses == [200]
    assert (done.task_id, len(done.images), done.polls) == ("t1", 1, 0)
    assert done.elapsed < HTTP_TIMEOUT + 1.0
    assert (stats.submitted, stats.in_flight, stats.completed) == (1, 0, 1)


@every_loss
async def test_delivery_of_a_running_task(
    scripted: ScriptedGateway, inbox_server: InboxServer, lost: Behaviour
) -> None:
    """If the delivery says that the task is still running, the task is polled to its end, and counts as in flight."""
    scripted.submits = deque([lost])
    scripted.polls = deque([answer(200, running("t1"))] * 2 + [answer(200, completed("t1"))])
    async with opened(scripted, inbox_server, schedule=FixedSchedule(3.0)) as session:
        waiting = asyncio.ensure_future(session.submit("a cat"))
        await anyio.sleep(10.0)
        await post(webhook_url(scripted), running("t1", progress=0.5))
        task = await waiting
        in_flight = session.stats.in_flight
        progress = task.snapshot and task.snapshot.progress
        outcome = await task.outcome()
        stats = session.stats

    assert (task.id, in_flight, progress) == ("t1", 1, 0.5)
    assert (outcome.ok, outcome.polls) == (True, 3)
    assert (stats.submitted, stats.in_flight, stats.completed, stats.webhooks) == (1, 0, 1, 0)
    assert len(scripted.of("POST")) == 1


async def test_running_task_that_a_second_delivery_ends(scripted: ScriptedGateway, inbox_server: InboxServer) -> None:
    """After a delivery of a running task, the next one ends it without a poll."""
    scripted.submits = deque([reset])
    async with opened(scripted, inbox_server) as session:
        waiting = asyncio.ensure_future(session.generate("a cat"))
        await anyio.sleep(10.0)
        await post(webhook_url(scripted), running("t1", progress=0.5))
        await anyio.sleep(10.0)
        await post(webhook_url(scripted), completed("t1"))
        done = await waiting

    assert (done.task_id, done.polls) == ("t1", 0)


@pytest.mark.parametrize(("payload", "error"), [(FAILED, TaskFailedError), (MODERATED, ContentModeratedError)])
async def test_delivery_of_a_failed_task(
    scripted: ScriptedGateway, inbox_server: InboxServer, payload: dict[str, Any], error: type[TaskFailedError]
) -> None:
    """If the delivery says that the task has failed, so does the request, with the task's id and error."""
    scripted.submits = deque([reset])
    async with opened(scripted, inbox_server) as session:
        waiting = asyncio.ensure_future(session.generate("a cat"))
        await anyio.sleep(10.0)
        await post(webhook_url(scripted), payload)
        with pytest.raises(TaskFailedError) as caught:
            await waiting
        stats = session.stats

    assert type(caught.value) is error
    assert caught.value.task_id == "t1"
    assert (stats.submitted, stats.in_flight, stats.completed, stats.failed) == (1, 0, 0, 1)


async def test_repeated_deliveries(scripted: ScriptedGateway, inbox_server: InboxServer, tmp_path: Path) -> None:
    """A delivery that comes several times, at once and after the end, completes its request once."""
    scripted.submits = deque([reset])
    async with opened(scripted, inbox_server, journal=VirtualJournal(tmp_path / "run.db")) as session:
        waiting = asyncio.ensure_future(session.generate("a cat"))
        await anyio.sleep(10.0)
        url = webhook_url(scripted)
        statuses = await asyncio.gather(*(post(url, completed("t1")) for _ in range(3)))
        done = await waiting
        statuses.append(await post(url, completed("t1")))
        stats = session.stats
        registry = inbox_server.inbox.dispatcher.registry

        assert not registry._expected
        assert not registry._early
    assert statuses == [200] * 4
    assert done.task_id == "t1"
    assert (stats.submitted, stats.in_flight, stats.completed) == (1, 0, 1)


async def test_forged_delivery(scripted: ScriptedGateway, inbox_server: InboxServer) -> None:
    """A delivery with the right token and a wrong signature is refused, and the request waits for the real one."""
    scripted.submits = deque([reset])
    async with opened(scripted, inbox_server) as session:
        waiting = asyncio.ensure_future(session.generate("a cat"))
        await anyio.sleep(10.0)
        forged = await post(webhook_url(scripted), completed("forged"), secret="another secret")
        await anyio.sleep(10.0)
        done_by_forgery = waiting.done()
        await post(webhook_url(scripted), completed("t1"))
        done = await waiting

    assert (forged, done_by_forgery, done.task_id) == (401, False, "t1")


@pytest.mark.parametrize("query", ["", "?flux2max_submit=another", "?flux2max_submit="])
async def test_delivery_without_the_token(
    scripted: ScriptedGateway, inbox_server: InboxServer, query: str, tmp_path: Path
) -> None:
    """A delivery with another token, or without one, is accepted and doesn't tell whose task it reports."""
    scripted.submits = deque([reset])
    async with opened(scripted, inbox_server, journal=VirtualJournal(tmp_path / "run.db")) as session:
        waiting = asyncio.ensure_future(session.generate("a cat"))
        await anyio.sleep(10.0)
        status = await post(inbox_server.inbox.public_url + query, completed("t1"))
        with pytest.raises(SubmissionUncertainError):
            await waiting

    assert status == 200
    assert (await only_entry(tmp_path / "run.db")).state is EntryState.UNCERTAIN


async def test_each_submit_has_a_token_of_its_own(scripted: ScriptedGateway, inbox_server: InboxServer) -> None:
    """Deliveries reach their requests in any order."""
    scripted.submits = deque([reset])
    prompts = [f"cat {number}" for number in range(5)]
    async with opened(scripted, inbox_server) as session:
        waiting = [asyncio.ensure_future(session.generate(prompt)) for prompt in prompts]
        await anyio.sleep(10.0)
        for received in reversed(scripted.of("POST")):
            await post(received.params["webhook_url"], completed(f"task of {received.params['prompt']}"))
        done = await asyncio.gather(*waiting)

    assert [outcome.task_id for outcome in done] == [f"task of {prompt}" for prompt in prompts]
    assert len({token_of(received.params["webhook_url"]) for received in scripted.of("POST")}) == len(prompts)


async def test_retried_submit_keeps_its_token(scripted: ScriptedGateway, inbox_server: InboxServer) -> None:
    """An attempt after a refused one has the same token, and its elapsed time begins with itself."""
    scripted.submits = deque([answer(503, {}, [("Retry-After", "30")]), reset])
    async with opened(scripted, inbox_server) as session:
        waiting = asyncio.ensure_future(session.generate("a cat"))
        await wait_for_posts(scripted, 2)
        await anyio.sleep(10.0)
        await post(webhook_url(scripted, 1), completed("t1"))
        done = await waiting

    assert webhook_url(scripted, 0) == webhook_url(scripted, 1)
    assert done.elapsed == pytest.approx(10.0, abs=0.5)


async def test_answer_that_is_not_lost(scripted: ScriptedGateway, inbox_server: InboxServer) -> None:
    """A submit that is answered, or refused, leaves nothing behind, whether or not its delivery was faster."""

    async def deliver_first(connection: Connection) -> None:
        await post(connection.call.params["webhook_url"], completed("t1"))
        await answer(200, running("t1"))(connection)

    scripted.submits = deque([deliver_first, answer(400, {"message": "width is odd"}), answer(200, running("t2"))])
    async with opened(scripted, inbox_server) as session:
        outcomes = [outcome async for outcome in session.stream(["cat 1"])]
        outcomes += [outcome async for outcome in session.stream(["cat 2"])]
        task = await session.submit("cat 3")
        registry = inbox_server.inbox.dispatcher.registry
        left = (dict(registry._expected), dict(registry._early))
        await post(webhook_url(scripted, 2), completed("t2"))
        outcomes.append(await task.outcome())

    assert [outcome.ok for outcome in outcomes] == [True, False, True]
    assert [outcome.polls for outcome in outcomes] == [0, 0, 0]
    assert left == ({}, {})


async def test_learned_durations_of_lost_submits(scripted: ScriptedGateway, inbox_server: InboxServer) -> None:
    """A delivery that waited for a hanging submit doesn't teach the schedule that the task took as long."""

    async def deliver_first(connection: Connection) -> None:
        await anyio.sleep(2.0)
        await post(connection.call.params["webhook_url"], completed("t1"))
        await hang(connection)

    schedule = learned(2.0)
    before = schedule.percentile(50)
    scripted.submits = deque([deliver_first])
    async with opened(scripted, inbox_server, schedule=schedule, http_timeout=300.0, max_uncertain=None) as session:
        await asyncio.gather(*(session.generate(f"cat {number}") for number in range(20)))
    after = schedule.percentile(50)

    assert before is not None
    assert after == pytest.approx(before, rel=0.1)


# ---------------------------------------------------------------------- with a journal, with a budget


@pytest.mark.parametrize(
    ("payload", "state"),
    [
        (completed("t1"), EntryState.COMPLETED),
        (FAILED, EntryState.FAILED),
        (running("t1"), EntryState.SUBMITTED),
    ],
)
@every_loss
async def test_id_is_in_the_journal_before_the_response(
    scripted: ScriptedGateway,
    inbox_server: InboxServer,
    tmp_path: Path,
    lost: Behaviour,
    payload: dict[str, Any],
    state: EntryState,
) -> None:
    """When the delivery is answered with 200, the id and the end are in the file; the intent held the token."""
    scripted.submits = deque([lost])
    scripted.polls = deque([answer(200, completed("t1"), after=2.0)])
    path = tmp_path / "run.db"
    async with opened(scripted, inbox_server, journal=VirtualJournal(path)) as session:
        waiting = asyncio.ensure_future(anext(session.stream(["a cat"])))
        await anyio.sleep(10.0)
        intent = await only_entry(path)
        status = await post(webhook_url(scripted), payload)
        answered = await only_entry(path)
        outcome = await waiting
        ended = await only_entry(path)

    assert (intent.state, intent.task_id) == (EntryState.INTENT, None)
    assert intent.webhook_token == token_of(webhook_url(scripted))
    assert intent.webhook_token
    assert (status, answered.state, answered.task_id) == (200, state, "t1")
    assert (ended.state, ended.task_id, ended.owner) == (
        EntryState.FAILED if payload is FAILED else EntryState.COMPLETED, "t1", None,
    )  # fmt: skip
    assert outcome.task_id == "t1"
    assert ended.webhook_token == intent.webhook_token


async def test_saved_images_of_a_lost_submit(
    scripted: ScriptedGateway, inbox_server: InboxServer, tmp_path: Path
) -> None:
    """A stream that saves images saves those of a task that a webhook has told, and the entry is held until then."""
    from support.responses import picture  # noqa: PLC0415 - Pillow is needed only here

    scripted.submits = deque([reset])
    scripted.downloads = deque([answer(200, picture("JPEG"), after=5.0)])
    path = tmp_path / "run.db"
    async with opened(scripted, inbox_server, journal=VirtualJournal(path)) as session:
        waiting = asyncio.ensure_future(anext(session.stream(["a cat"], save_to=tmp_path / "images")))
        await anyio.sleep(10.0)
        await post(webhook_url(scripted), completed("t1", url=f"{scripted.url}/0.jpeg"))
        await anyio.sleep(1.0)
        saving = await only_entry(path)
        outcome = await waiting
        ended = await only_entry(path)

    assert (saving.state, saving.owner is None) == (EntryState.COMPLETED, False)
    assert isinstance(outcome, Completed)
    assert [file.path for file in ended.files] == list(outcome.saved) == list((tmp_path / "images").iterdir())
    assert ended.owner is None


@pytest.mark.parametrize("with_journal", [False, True])
async def test_budget_of_a_lost_submit(
    scripted: ScriptedGateway, inbox_server: InboxServer, tmp_path: Path, with_journal: bool
) -> None:
    """What a lost submit may cost is reserved while it waits, and settled by its end."""
    scripted.submits = deque([reset, answer(200, {"id": "t2"})])
    scripted.polls = deque([answer(200, completed("t2"))])
    journal = VirtualJournal(tmp_path / "run.db") if with_journal else None
    async with opened(
        scripted, inbox_server, journal=journal, budget="0.10", price_guess="0.07", schedule=FixedSchedule(1.0)
    ) as session:
        waiting = asyncio.ensure_future(session.generate("cat 1"))
        await anyio.sleep(10.0)
        with pytest.raises(BudgetExceededError):
            await session.generate("cat 2")
        await post(webhook_url(scripted), completed("t1", usage={"cost": "0.03"}))
        await waiting
        second = await session.generate("cat 2")
        with pytest.raises(BudgetExceededError):
            await session.generate("cat 3")

    assert second.task_id == "t2"
    assert len(scripted.of("POST")) == 2


async def test_budget_of_a_submit_that_stays_uncertain(scripted: ScriptedGateway, inbox_server: InboxServer) -> None:
    """If no delivery comes, what the task may have cost stays reserved."""
    scripted.submits = deque([reset])
    async with opened(scripted, inbox_server, budget="0.10", price_guess="0.07") as session:
        with pytest.raises(SubmissionUncertainError):
            await session.generate("cat 1")
        with pytest.raises(BudgetExceededError):
            await session.generate("cat 2")


# ---------------------------------------------------------------------- no delivery comes


class PercentileSchedule(FixedSchedule):
    """A schedule of a user's own, with a method of the same name and another meaning."""

    def percentile(self, fraction: str) -> str:
        return fraction.upper()


@pytest.mark.parametrize(
    ("schedule", "task_timeout", "expected"),
    [
        pytest.param(FixedSchedule(1.0), 600.0, 60.0, id="a schedule that learns nothing"),
        pytest.param(PercentileSchedule(1.0), 600.0, 60.0, id="a schedule of another kind"),
        pytest.param(LearnedSchedule(), 600.0, 60.0, id="nothing learned yet"),
        pytest.param(learned(8.0), 600.0, 60.0, id="short tasks"),
        pytest.param(learned(100.0), 600.0, None, id="long tasks"),
        pytest.param(learned(100.0), None, None, id="long tasks without a deadline"),
        pytest.param(learned(400.0), 600.0, 600.0, id="tasks that are too long"),
        pytest.param(FixedSchedule(1.0), 20.0, 20.0, id="an early deadline"),
    ],
)
async def test_how_long_a_delivery_is_waited_for(
    scripted: ScriptedGateway,
    inbox_server: InboxServer,
    schedule: Any,
    task_timeout: float | None,
    expected: float | None,
) -> None:
    """A delivery is waited for twice the 99th percentile of the durations and at least 60 s, but not too long."""
    if expected is None:
        expected = 2 * schedule.percentile(99)
        assert 200.0 < expected < 400.0
    scripted.submits = deque([reset])
    async with opened(scripted, inbox_server, schedule=schedule, task_timeout=task_timeout) as session:
        (outcome,) = [outcome async for outcome in session.stream(["a cat"])]
        stats = session.stats

    assert isinstance(outcome, Failed)
    assert isinstance(outcome.error, SubmissionUncertainError)
    assert outcome.task_id is None
    assert outcome.elapsed == pytest.approx(expected, abs=0.2)
    assert (stats.submitted, stats.in_flight, stats.completed, stats.failed) == (0, 0, 0, 1)
    assert not expected_submits(inbox_server)


async def test_answer_that_is_lost_at_the_deadline(scripted: ScriptedGateway, inbox_server: InboxServer) -> None:
    """A submit that hangs until the task's deadline is uncertain at once, unless its delivery is there already."""

    async def deliver_first(connection: Connection) -> None:
        await post(connection.call.params["webhook_url"], running("t2"))
        await hang(connection)

    async def deliver_end_first(connection: Connection) -> None:
        await post(connection.call.params["webhook_url"], completed("t3"))
        await hang(connection)

    scripted.submits = deque([hang, deliver_first, deliver_end_first])
    scripted.polls = deque([answer(200, running("t2"))])
    async with opened(scripted, inbox_server, http_timeout=100.0, task_timeout=20.0) as session:
        outcomes = [await anext(session.stream([f"cat {number}"])) for number in range(3)]

    assert [type(outcome.error) if isinstance(outcome, Failed) else None for outcome in outcomes] == [
        SubmissionUncertainError, DeadlineExceededError, None,
    ]  # fmt: skip
    assert [outcome.task_id for outcome in outcomes] == [None, "t2", "t3"]
    assert [outcome.elapsed for outcome in outcomes] == [pytest.approx(20.0, abs=0.2)] * 3


@pytest.mark.parametrize("lost", [reset, hang], ids=["lost before", "lost in the gap"])
@pytest.mark.parametrize("gap", [100.0, 3600.0])
@pytest.mark.parametrize(
    ("payload", "error"),
    [
        pytest.param(completed("t1"), None, id="end"),
        pytest.param(running("t1"), None, id="id of a task that ends"),
        pytest.param(None, SubmissionUncertainError, id="nothing"),
    ],
)
async def test_delivery_that_waits_for_a_process_that_was_held_up(
    scripted: ScriptedGateway,
    inbox_server: InboxServer,
    lost: Behaviour,
    gap: float,
    payload: object,
    error: type[Exception] | None,
) -> None:
    """After a gap past its time, a delivery still has five seconds to be read, and its task gets a poll."""
    scripted.submits = deque([lost])
    async with opened(scripted, inbox_server, http_timeout=30.0, task_timeout=90.0) as session:
        stream = session.stream(["a cat"])
        waiting = asyncio.ensure_future(anext(stream))
        await anyio.sleep(20.0)
        hold_up(gap)
        resumed_at = anyio.current_time()
        await anyio.sleep(2.0)
        if payload is not None:
            await post(webhook_url(scripted), payload)
        outcome = await waiting

    assert (type(outcome.error) if isinstance(outcome, Failed) else None) is error
    assert anyio.current_time() - resumed_at <= 5.5
    assert len(scripted.of("POST")) == 1


async def test_request_with_a_webhook_of_its_own(scripted: ScriptedGateway, inbox_server: InboxServer) -> None:
    """A request that names a webhook of its own has no token, and its lost answer is reported at once."""
    scripted.submits = deque([reset])
    request = GenerationRequest("a cat", webhook_url="https://own.example/hooks", webhook_secret="own secret")
    async with opened(scripted, inbox_server) as session:
        started = anyio.current_time()
        with pytest.raises(SubmissionUncertainError):
            await session.generate(request)
        elapsed = anyio.current_time() - started

    assert elapsed < 1.0
    assert webhook_url(scripted) == "https://own.example/hooks"


async def test_slot_is_held_during_the_wait(scripted: ScriptedGateway, inbox_server: InboxServer) -> None:
    """The task may be running, so its slot is not free: another request waits, and is sent after the wait."""
    scripted.submits = deque([reset, answer(200, {"id": "t2"})])
    scripted.polls = deque([answer(200, completed("t2"))])
    async with opened(scripted, inbox_server, max_in_flight=1, schedule=FixedSchedule(1.0)) as session:
        first = asyncio.ensure_future(session.generate("cat 1"))
        second = asyncio.ensure_future(session.generate("cat 2"))
        await anyio.sleep(55.0)
        sent_during_the_wait = len(scripted.of("POST"))
        results = await asyncio.gather(first, second, return_exceptions=True)
        elapsed = scripted.of("POST")[1].at - scripted.of("POST")[0].at

    assert sent_during_the_wait == 1
    assert isinstance(results[0], SubmissionUncertainError)
    assert isinstance(results[1], Completed)
    assert elapsed == pytest.approx(60.0, abs=0.5)


async def test_stream_of_lost_submits_keeps_its_slots(scripted: ScriptedGateway, inbox_server: InboxServer) -> None:
    """Lost answers leak neither slots nor look-ahead: as many requests as before run at once afterwards."""
    accepted = 0

    async def submit(connection: Connection) -> None:
        nonlocal accepted
        number = int(connection.call.params["prompt"].removeprefix("cat "))
        if number < 8 and number % 2 == 0:
            await reset(connection)
            return
        accepted += 1
        await answer(200, running(f"t{number}"))(connection)

    scripted.submits = deque([submit])
    async with opened(scripted, inbox_server, max_in_flight=4, max_uncertain=None) as session:
        stream = session.stream(f"cat {number}" for number in range(20))
        outcomes: list[Outcome] = []

        async def consume() -> None:
            async for outcome in stream:
                outcomes.append(outcome)

        consumer = asyncio.ensure_future(consume())
        most_unended = 0
        ended: set[int] = set()
        while not consumer.done():
            await anyio.sleep(5.0)
            received = scripted.of("POST")
            most_unended = max(most_unended, len(received) - len(outcomes))
            for index, call in enumerate(received):
                number = int(call.params["prompt"].removeprefix("cat "))
                if index not in ended and number % 4:  # of the lost ones, every second is never delivered
                    ended.add(index)
                    await post(call.params["webhook_url"], completed(f"t{number}"))
            for call in received:
                number = int(call.params["prompt"].removeprefix("cat "))
                if number >= 8:
                    await post(call.params["webhook_url"], completed(f"t{number}"))
        await consumer
        slots = session._supervisor._context.slots if session._supervisor else None
        stats = session.stats

        assert slots is not None
        assert slots.free == 4
    uncertain = [outcome for outcome in outcomes if not outcome.ok]
    assert len(outcomes) == 20
    assert len({outcome.request for outcome in outcomes}) == 20
    assert sorted(str(outcome.request and outcome.request.prompt) for outcome in uncertain) == ["cat 0", "cat 4"]
    assert most_unended <= 4
    assert (stats.submitted, stats.in_flight, stats.completed, stats.failed) == (18, 0, 18, 2)
    assert not expected_submits(inbox_server)


# ---------------------------------------------------------------------- closing, draining, leaving


async def test_closing_during_the_wait(scripted: ScriptedGateway, inbox_server: InboxServer, tmp_path: Path) -> None:
    """Closing doesn't wait for a webhook. The entry is uncertain until the delivery comes, to a later session."""
    scripted.submits = deque([reset])
    path = tmp_path / "run.db"
    async with opened(scripted, inbox_server, journal=VirtualJournal(path)) as session:
        waiting = asyncio.ensure_future(session.generate("a cat"))
        await anyio.sleep(10.0)
        started = anyio.current_time()
        await session.aclose()
        elapsed = anyio.current_time() - started
        with pytest.raises(SessionClosedError):
            await waiting
        assert not expected_submits(inbox_server)
    async with opened(scripted, inbox_server, journal=VirtualJournal(path)) as session:
        with pytest.raises(SubmissionUncertainError):
            await session.generate("a cat")
        uncertain = await only_entry(path)
        status = await post(webhook_url(scripted), completed("t1"))
        done = await session.generate("a cat")

    assert elapsed < 0.1
    assert uncertain.state is EntryState.UNCERTAIN
    assert (status, done.task_id, done.replayed) == (200, "t1", True)
    assert len(scripted.of("POST")) == 1


@pytest.mark.parametrize("delivered_after", [None, 10.0])
async def test_draining_waits_for_the_delivery(
    scripted: ScriptedGateway, inbox_server: InboxServer, delivered_after: float | None
) -> None:
    """A drain waits for the webhook of a lost submit, until its deadline."""
    scripted.submits = deque([reset])
    async with opened(scripted, inbox_server) as session:
        waiting = asyncio.ensure_future(anext(session.stream(["a cat"])))
        await anyio.sleep(10.0)
        started = anyio.current_time()
        closing = asyncio.ensure_future(session.aclose(drain=30.0))
        if delivered_after is not None:
            await anyio.sleep(delivered_after)
            await post(webhook_url(scripted), completed("t1"))
        await closing
        elapsed = anyio.current_time() - started
        outcome = await waiting

    assert elapsed == pytest.approx(delivered_after or 30.0, abs=0.2)
    assert outcome.ok is (delivered_after is not None)
    if isinstance(outcome, Failed):
        assert isinstance(outcome.error, SessionClosedError)


async def test_cancelled_caller(scripted: ScriptedGateway, inbox_server: InboxServer, tmp_path: Path) -> None:
    """Cancelling the caller doesn't end the wait: the delivery is recorded, and the next caller has it."""
    scripted.submits = deque([reset])
    async with opened(scripted, inbox_server, journal=VirtualJournal(tmp_path / "run.db")) as session:
        caller = asyncio.ensure_future(session.generate("a cat"))
        await anyio.sleep(10.0)
        caller.cancel()
        await anyio.sleep(10.0)
        later = asyncio.ensure_future(session.generate("a cat"))
        await anyio.sleep(10.0)
        later.cancel()
        await post(webhook_url(scripted), completed("t1"))
        await anyio.sleep(1.0)
        stats = session.stats
        replayed = await session.generate("a cat")

    assert caller.cancelled()
    assert later.cancelled()
    assert (stats.submitted, stats.in_flight, stats.completed, stats.failed) == (1, 0, 1, 0)
    assert (replayed.task_id, replayed.replayed) == ("t1", True)
    assert len(scripted.of("POST")) == 1


async def test_two_callers_of_a_lost_submit(
    scripted: ScriptedGateway, inbox_server: InboxServer, tmp_path: Path
) -> None:
    """Callers that share a request share its delivery; one that may submit it again doesn't need to."""
    scripted.submits = deque([reset])
    async with opened(scripted, inbox_server, journal=VirtualJournal(tmp_path / "run.db")) as session:
        callers = [asyncio.ensure_future(session.generate("a cat"))]
        await anyio.sleep(10.0)
        callers.append(asyncio.ensure_future(session.generate("a cat")))
        callers.append(asyncio.ensure_future(session.generate("a cat", resubmit_uncertain=True)))
        await anyio.sleep(10.0)
        await post(webhook_url(scripted), completed("t1"))
        done = await asyncio.gather(*callers)

    assert [outcome.task_id for outcome in done] == ["t1"] * 3
    assert len(scripted.of("POST")) == 1


@pytest.mark.parametrize("lost", [reset, answer(502, b"", after=2.0)], ids=["before", "meanwhile"])
async def test_closing_a_stream(scripted: ScriptedGateway, inbox_server: InboxServer, lost: Behaviour) -> None:
    """Closing a stream doesn't wait for webhooks; the request goes on, and its delivery counts."""
    scripted.submits = deque([lost])
    async with opened(scripted, inbox_server) as session:
        stream = session.stream(["a cat"])
        consumer = asyncio.ensure_future(anext(stream))
        await anyio.sleep(1.0)
        consumer.cancel()
        started = anyio.current_time()
        await stream.aclose()
        elapsed = anyio.current_time() - started
        unfinished = stream.unfinished
        await anyio.sleep(10.0)
        await post(webhook_url(scripted), completed("t1"))
        await anyio.sleep(1.0)
        stats = session.stats

    assert elapsed < 1.1
    assert unfinished == ()
    assert (stats.submitted, stats.in_flight, stats.completed) == (1, 0, 1)


# ---------------------------------------------------------------------- the circuit breaker


async def test_resolved_submit_no_longer_counts(scripted: ScriptedGateway, inbox_server: InboxServer) -> None:
    """A lost submit doesn't count any more once its webhook has come: further submits start at the same time."""
    scripted.submits = deque([reset])
    async with opened(scripted, inbox_server, max_uncertain=2) as session:
        tasks = [asyncio.ensure_future(session.generate(f"cat {number}")) for number in range(2)]
        await anyio.sleep(5.0)
        scripted.submits = deque([answer(200, {"id": "t9"}, after=4.0)])
        tasks += [asyncio.ensure_future(session.generate(f"cat {number}")) for number in range(2, 5)]
        await anyio.sleep(1.0)
        sent_as_probes = len(scripted.of("POST")) - 2
        await post(webhook_url(scripted), completed("t1"))
        await anyio.sleep(0.5)
        sent_after_the_webhook = len(scripted.of("POST")) - 2
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    assert (sent_as_probes, sent_after_the_webhook) == (1, 3)


async def test_lost_probe_blocks_until_its_delivery(scripted: ScriptedGateway, inbox_server: InboxServer) -> None:
    """While it isn't known what became of a probe, nothing is sent; with its delivery, the next probe goes on."""
    scripted.submits = deque([reset, reset, answer(200, {"id": "t9"})])
    scripted.polls = deque([answer(200, completed("t9"))])
    async with opened(scripted, inbox_server, max_uncertain=1, schedule=FixedSchedule(1.0)) as session:
        outcomes: list[Outcome] = []

        async def consume() -> None:
            async for outcome in session.stream(f"cat {number}" for number in range(6)):
                outcomes.append(outcome)

        first = asyncio.ensure_future(session.generate("a cat"))
        await anyio.sleep(5.0)
        consumer = asyncio.ensure_future(consume())
        await anyio.sleep(40.0)
        sent_before = len(scripted.of("POST"))
        await post(webhook_url(scripted, 1), completed("probe"))
        await consumer
        await post(webhook_url(scripted, 0), completed("first"))
        done = await first

    assert sent_before == 2
    assert len(outcomes) == 6
    assert all(outcome.ok for outcome in outcomes)
    assert done.task_id == "first"
    assert len(scripted.of("POST")) == 7


async def test_probe_that_is_given_up_after_the_others_are_resolved(
    scripted: ScriptedGateway, inbox_server: InboxServer
) -> None:
    """A probe whose delivery never comes doesn't stop the stream, if the row before it was resolved meanwhile."""
    scripted.submits = deque([reset, reset, reset, answer(200, {"id": "t9"})])
    scripted.polls = deque([answer(200, completed("t9"))])
    outcomes: list[Outcome] = []
    async with opened(scripted, inbox_server, max_uncertain=2, max_in_flight=3, schedule=FixedSchedule(1.0)) as session:

        async def consume() -> None:
            async for outcome in session.stream(f"cat {number}" for number in range(10)):
                outcomes.append(outcome)

        first = [asyncio.ensure_future(session.generate(f"dog {number}")) for number in range(2)]
        await anyio.sleep(5.0)
        consumer = asyncio.ensure_future(consume())
        await anyio.sleep(5.0)
        sent_with_the_probe = len(scripted.of("POST"))
        for number in range(2):
            await post(webhook_url(scripted, number), completed(f"t{number}"))
        await asyncio.gather(*first)
        await consumer

    assert sent_with_the_probe == 3
    assert [outcome.ok for outcome in outcomes].count(False) == 1
    assert len(outcomes) == 10


@pytest.mark.parametrize("has_inbox", [False, True])
async def test_answers_that_are_always_lost(
    scripted: ScriptedGateway, inbox_server: InboxServer, has_inbox: bool
) -> None:
    """After five lost answers in a row submits are probes; if a probe's is lost, too, the stream sends nothing more."""
    scripted.submits = deque([answer(502, b"<html></html>")])
    outcomes: list[Outcome] = []
    async with opened(scripted, inbox_server, max_in_flight=5) as with_inbox:
        plain = FluxSession(scripted.api_key, base_url=scripted.url, max_in_flight=5)
        async with plain:
            session = with_inbox if has_inbox else plain
            with pytest.raises(SubmissionUncertainError):
                async for outcome in session.stream(f"cat {number}" for number in range(300)):
                    outcomes.append(outcome)
            sent = len(scripted.of("POST"))
            with pytest.raises(SubmissionUncertainError):  # not a stream: each call is a probe
                await session.generate("a dog")

    assert 6 <= sent <= 10
    assert len(outcomes) >= sent
    errors = [outcome.error for outcome in outcomes if isinstance(outcome, Failed)]
    assert len(errors) == len(outcomes)
    assert [type(error) for error in errors].count(SubmissionUncertainError) == sent
    assert {type(error) for error in errors} <= {SubmissionUncertainError, SessionClosedError}  # the latter: not sent
    assert len({id(error) for error in errors if error.stops_stream}) == 1


async def test_no_limit_for_lost_answers(scripted: ScriptedGateway) -> None:
    """With `max_uncertain=None` all requests are sent, however many answers are lost."""
    scripted.submits = deque([reset])
    async with FluxSession(scripted.api_key, base_url=scripted.url, max_uncertain=None) as session:
        outcomes = [outcome async for outcome in session.stream(f"cat {number}" for number in range(40))]

    assert len(outcomes) == len(scripted.of("POST")) == 40


# ---------------------------------------------------------------------- another process


@in_real_time
@pytest.mark.parametrize("payload", [completed("t1"), FAILED])
@pytest.mark.parametrize("lost", [reset, answer(502, b"", after=1.0)], ids=["before", "after"])
async def test_delivery_to_another_process(
    scripted: ScriptedGateway, inbox_server: InboxServer, tmp_path: Path, payload: dict[str, Any], lost: Behaviour
) -> None:
    """If the delivery reaches another process with the same journal, the one that has submitted ends within seconds."""
    scripted.submits = deque([lost])
    path = tmp_path / "run.db"
    other_inbox = WebhookInbox(secret=SECRET, public_url=inbox_server.inbox.public_url)
    async with (
        opened(scripted, inbox_server, journal=SqliteJournal(path)) as session,
        session_on(scripted, other_inbox, journal=SqliteJournal(path)) as other,
    ):
        submitter = inbox_server.inbox
        inbox_server.inbox = other_inbox
        waiting = asyncio.ensure_future(anext(session.stream(["a cat"])))
        await wait_for_posts(scripted, 1)
        await anyio.sleep(0.3)
        status = await post(webhook_url(scripted), payload)
        started = anyio.current_time()
        async with asyncio.timeout(10.0):
            outcome = await waiting
        elapsed = anyio.current_time() - started
        stats, other_stats = session.stats, other.stats

        assert not submitter.dispatcher.registry._expected
        assert not other_inbox.dispatcher.registry._early
    entry = await only_entry(path)

    assert status == 200
    assert (outcome.task_id, outcome.ok, outcome.polls) == ("t1", payload is not FAILED, 0)
    assert elapsed < 5.0  # a quarter of a second on an idle machine
    assert (stats.submitted, stats.in_flight, stats.completed + stats.failed) == (1, 0, 1)
    assert (other_stats.submitted, other_stats.completed, other_stats.failed) == (0, 0, 0)
    assert (entry.state, entry.owner) == (EntryState.FAILED if payload is FAILED else EntryState.COMPLETED, None)
