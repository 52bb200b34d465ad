"""Sessions with webhooks: the faster of webhook and poll ends the task, and polls replace webhooks that are lost."""

import asyncio
import threading
from collections import deque
from contextlib import aclosing
from pathlib import Path
from statistics import mean
from typing import Any

import anyio
import pytest
from support.scripted import ScriptedGateway, answer, completed, hang, running
from support.webhooks import SECRET, InboxServer, deliver, session_on, sign

from flux2max_async import (
    Completed,
    ConfigurationError,
    ContentModeratedError,
    DeadlineExceededError,
    ExponentialSchedule,
    Failed,
    FixedSchedule,
    FluxSession,
    GenerationRequest,
    LearnedSchedule,
    PollSchedule,
    ProtocolError,
    SessionClosedError,
    SqliteJournal,
    TaskFailedError,
    TaskSnapshot,
    WebhookInbox,
    WebhookSignatureError,
)
from flux2max_async.emulator import Emulator, Webhooks
from flux2max_async.journal import JournalEntry
from flux2max_async.webhooks import parse
from flux2max_async.webhooks._registry import WebhookRegistry

in_real_time = pytest.mark.parametrize("anyio_backend", ["asyncio"])


@pytest.mark.parametrize("shape", ["task", "maker"])
@pytest.mark.parametrize(
    ("prompt", "error"),
    [("a cat", None), ("a cat [fail]", TaskFailedError), ("a cat [moderate]", ContentModeratedError)],
)
async def test_webhook_ends_the_task(
    inbox_server: InboxServer, shape: Any, prompt: str, error: type[Exception] | None
) -> None:
    """A verified delivery in either format ends the wait at once, without any poll."""
    async with (
        Emulator(seconds=8.0, spread=0.0, seed=1, pictures=False, webhooks=Webhooks(shape=shape)) as gateway,
        session_on(gateway, inbox_server.inbox) as session,
    ):
        started = anyio.current_time()
        outcome = await (await session.submit(prompt)).outcome()
        elapsed = anyio.current_time() - started
        stats = session.stats

    assert (type(outcome.error) if isinstance(outcome, Failed) else None) is error
    assert outcome.elapsed == pytest.approx(8.0, abs=0.1)
    assert elapsed == pytest.approx(8.0, abs=0.1)
    assert (outcome.polls, stats.polls, stats.webhooks) == (0, 0, 1)
    assert [delivery.status for delivery in gateway.deliveries] == [200]


async def test_webhook_interrupts_a_poll(scripted: ScriptedGateway, inbox_server: InboxServer) -> None:
    """A webhook doesn't wait for the response to a poll that hangs."""
    scripted.polls = deque([hang])
    async with session_on(scripted, inbox_server.inbox, schedule=FixedSchedule(0.5)) as session:
        task = await session.submit("a cat")
        await anyio.sleep(5.0)
        await deliver(inbox_server.inbox, completed("t1"))
        done = await task
        elapsed = done.elapsed

    assert elapsed == pytest.approx(5.0, abs=0.1)
    assert done.polls == 1


async def test_webhook_before_the_submit_response(scripted: ScriptedGateway, inbox_server: InboxServer) -> None:
    """A delivery that arrives before the response to its submit ends the task as soon as its id is known."""
    scripted.submits = deque([answer(200, running("t1"), after=3.0)])
    async with session_on(scripted, inbox_server.inbox) as session:
        wait = asyncio.ensure_future(session.generate("a cat"))
        await anyio.sleep(1.0)
        await deliver(inbox_server.inbox, completed("t1"))
        done = await wait

    assert done.elapsed == pytest.approx(3.0, abs=0.1)
    assert done.polls == 0


async def test_attached_task(scripted: ScriptedGateway, inbox_server: InboxServer) -> None:
    """A task that was submitted elsewhere is polled as usual, and ends by a webhook if that is faster."""
    scripted.polls = deque([answer(200, running("t9"))])
    async with session_on(scripted, inbox_server.inbox, schedule=FixedSchedule(1.0)) as session:
        tasks = [session.attach("t9"), session.attach("t9")]
        await anyio.sleep(10.5)
        await deliver(inbox_server.inbox, completed("t9"))
        done = [await task for task in tasks]

    assert all(result.elapsed == pytest.approx(10.5, abs=0.1) for result in done)
    assert all(result.polls > 8 for result in done)


async def test_submits_name_the_inbox(scripted: ScriptedGateway, inbox_server: InboxServer) -> None:
    """Each submit has the inbox's URL with a token, and its first secret; outcomes have the original request."""
    inbox_server.inbox = WebhookInbox(secret=["new", "old"], public_url=inbox_server.inbox.public_url)
    request = GenerationRequest("a cat")
    async with session_on(scripted, inbox_server.inbox, schedule=FixedSchedule(1.0)) as session:
        done = await session.generate(request)
        await session.generate("a dog", webhook_url="https://elsewhere.example/hook", webhook_secret="theirs")
    params = [call.params for call in scripted.of("POST")]

    assert done.request is request
    url, _, token = str(params[0]["webhook_url"]).partition("?flux2max_submit=")
    assert (url, params[0]["webhook_secret"]) == (inbox_server.inbox.public_url, "new")
    assert len(token) == 22
    assert (params[1]["webhook_url"], params[1]["webhook_secret"]) == ("https://elsewhere.example/hook", "theirs")


async def test_request_with_its_own_webhook(gateway: Emulator, inbox_server: InboxServer) -> None:
    """A request with a webhook URL of its own is polled at the usual rate."""
    async with session_on(gateway, inbox_server.inbox, schedule=FixedSchedule(1.0)) as session:
        done = await session.generate("a cat", webhook_url="http://127.0.0.1:9/unreachable")

    assert done.polls in {8, 9}


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"secret": ""}, "secret"),
        ({"secret": []}, "secret"),
        ({"secret": ["good", ""]}, "secret"),
        ({"secret": [1]}, "secret"),
        ({"secret": None}, "secret"),
        ({"public_url": None}, "public_url"),
        ({"public_url": "ftp://app.example"}, "public_url"),
        ({"public_url": "https://app.example/" + "x" * 2083}, "public_url must have at most 2083"),
        ({"public_url": "https://app.example/" + "x" * 2050}, "public_url, with the token .* at most 2083"),
        ({"max_age": 0}, "max_age"),
    ],
)
def test_invalid_settings(settings: dict[str, Any], named: str) -> None:
    """Invalid settings of an inbox are a ConfigurationError that names them."""
    with pytest.raises(ConfigurationError, match=named):
        WebhookInbox(**{"secret": SECRET, "public_url": "https://app.example/hooks", **settings})


async def test_inbox_belongs_to_one_session(gateway: Emulator, inbox_server: InboxServer) -> None:
    """An inbox in use is refused for a second session and available after the first; its repr hides its secret."""
    async with session_on(gateway, inbox_server.inbox):
        second = session_on(gateway, inbox_server.inbox)
        with pytest.raises(ConfigurationError, match="in use"):
            await second.__aenter__()
        await second.aclose()
        with pytest.raises(ConfigurationError, match="in use"):
            await second.__aenter__()
    async with session_on(gateway, inbox_server.inbox) as session:
        done = await session.generate("a cat")

    assert done.polls == 0
    assert SECRET not in repr(inbox_server.inbox)


def test_inbox_outlives_its_event_loop() -> None:
    """A session whose loop ended before it was closed can be entered or closed on another loop."""
    inbox = WebhookInbox(secret=SECRET, public_url="https://app.example/hooks")
    session = FluxSession("key", base_url="http://127.0.0.1:9", webhooks=inbox)

    async def enter_and_close() -> None:
        async with session:
            pass

    asyncio.run(_enter(session))
    asyncio.run(enter_and_close())
    asyncio.run(_enter(session))
    asyncio.run(session.aclose())
    asyncio.run(enter_and_close())

    assert session.stats.in_flight == 0


async def _enter(session: FluxSession) -> None:
    await session.__aenter__()
    await session._parts.transport.close()


async def test_polls_adapt_to_webhooks(inbox_server: InboxServer) -> None:
    """Polls are rare while webhooks arrive, usual when they stop, and rare again when they return."""
    async with (
        Emulator(seconds=8.0, spread=0.2, seed=1, pictures=False, max_in_flight=100) as gateway,
        session_on(gateway, inbox_server.inbox, schedule=LearnedSchedule(), max_polls_per_second=None) as session,
    ):
        polls: list[float] = []
        for is_open in (True, True, True, False, False, True, True, True, True):
            inbox_server.open = is_open
            before = session.stats.polls
            async for outcome in session.stream([f"picture {number}" for number in range(48)]):
                assert outcome.ok
            polls.append((session.stats.polls - before) / 48)

    # Averaged, because in one run of thirty the schedule mistakes random variation for a change and polls more.
    with_webhooks, without_webhooks, recovered = mean(polls[1:3]), polls[4], mean(polls[6:])
    assert with_webhooks < 0.5
    assert without_webhooks > 1.0
    assert recovered < 0.5


async def test_schedule_without_cost_factor(inbox_server: InboxServer) -> None:
    """A fixed interval becomes up to eight times as long while webhooks arrive, and normal when they stop."""
    async with (
        Emulator(seconds=40.0, spread=0.0, seed=1, pictures=False) as gateway,
        session_on(gateway, inbox_server.inbox, schedule=FixedSchedule(1.0)) as session,
    ):
        for _ in range(30):
            await session.generate("a cat")
        with_webhooks = (await session.generate("a cat")).polls
        inbox_server.open = False
        for _ in range(20):
            await session.generate("a cat")
        without_webhooks = (await session.generate("a cat")).polls

    assert with_webhooks in {4, 5}
    assert without_webhooks in {39, 40, 41}


async def test_unreachable_inbox(gateway: Emulator) -> None:
    """If no webhook ever arrives, polls notice every end, after the first few as soon as without an inbox."""
    inbox = WebhookInbox(secret=SECRET, public_url="http://127.0.0.1:9/unreachable")
    async with session_on(gateway, inbox, schedule=FixedSchedule(1.0)) as session:
        done = [await session.generate("a cat") for _ in range(20)]

    assert {result.polls for result in done[-5:]} <= {8, 9}
    assert session.stats.webhooks == 0
    assert all(delivery.status is None for delivery in gateway.deliveries)


async def test_watched_task_is_polled_for_progress(gateway: Emulator, inbox_server: InboxServer) -> None:
    """A task whose updates are iterated over is still polled, because only polls report progress; others aren't."""
    async with session_on(gateway, inbox_server.inbox, schedule=FixedSchedule(1.0)) as session:
        for _ in range(30):
            await session.generate("a cat")
        watched, unwatched = await session.submit("a cat"), await session.submit("a cat")
        await anyio.sleep(0.5)
        second_watcher = asyncio.ensure_future(anext(watched.updates()))
        seen = [snapshot.progress async for snapshot in watched.updates()]
        await second_watcher
        polls = (await watched).polls, (await unwatched).polls

    assert len(seen) >= 7
    assert polls[0] >= 6
    assert polls[1] <= 1


@pytest.mark.parametrize("schedule", [FixedSchedule(1.0), ExponentialSchedule(1.0, factor=1.5), LearnedSchedule()])
async def test_reading_updates_does_not_delay_polls(
    gateway: Emulator, inbox_server: InboxServer, schedule: PollSchedule
) -> None:
    """Reading the newest snapshot often, and deliveries of progress, don't delay polls."""
    inbox_server.open = False
    async with session_on(gateway, inbox_server.inbox, schedule=schedule) as session:
        task = await session.submit("a cat")
        for tick in range(200):
            async with aclosing(task.updates()) as updates:
                await anext(updates)
            if tick % 5 == 0 and task.snapshot and not task.snapshot.status.ended:
                await deliver(inbox_server.inbox, running(task.id, progress=(task.snapshot.progress or 0) + 1e-4))
            await anyio.sleep(0.1)
        polls = (await task).polls

    assert polls >= 1


async def test_final_poll_before_the_deadline(gateway: Emulator, inbox_server: InboxServer) -> None:
    """However rare polls are, a task is polled once more shortly before its deadline."""
    inbox_server.open = False
    async with session_on(gateway, inbox_server.inbox, task_timeout=20.0) as session:
        done = await session.generate("a cat")

    assert done.polls == 1
    assert done.elapsed == pytest.approx(19.0, abs=0.2)


async def test_unreliable_webhooks(inbox_server: InboxServer) -> None:
    """With forged, repeated and dropped deliveries, each task ends once and with its true outcome."""
    webhooks = Webhooks(forged=0.5, doubled=0.5, dropped=0.3, delay=0.5)
    async with (
        Emulator(
            seconds=4.0, spread=0.3, seed=1, pictures=False, failing=0.2, max_in_flight=60, webhooks=webhooks
        ) as gateway,
        session_on(gateway, inbox_server.inbox, schedule=LearnedSchedule(), max_in_flight=60) as session,
    ):
        outcomes = [outcome async for outcome in session.stream([f"picture {number}" for number in range(120)])]
        await anyio.sleep(2.0)
    statuses = {(delivery.forged, delivery.status) for delivery in gateway.deliveries}

    assert len({outcome.task_id for outcome in outcomes}) == 120
    assert all(outcome.ok is (gateway.tasks[outcome.task_id or ""].fate == "completed") for outcome in outcomes)
    assert statuses == {(True, 401), (False, 200)}


async def test_forged_delivery(scripted: ScriptedGateway, inbox_server: InboxServer) -> None:
    """A delivery signed with another secret is refused and ends nothing."""
    scripted.polls = deque([answer(200, running("t1"))])
    async with session_on(scripted, inbox_server.inbox) as session:
        task = await session.submit("a cat")
        with pytest.raises(WebhookSignatureError):
            await inbox_server.inbox.deliver(*sign(completed("t1"), "another secret"))
        snapshot = task.snapshot

    assert snapshot is not None
    assert not snapshot.status.ended


async def test_several_secrets(scripted: ScriptedGateway, inbox_server: InboxServer) -> None:
    """Each of several secrets is valid; errors contain neither the API key nor any secret."""
    inbox = WebhookInbox(secret=["new secret", "old secret"], public_url=inbox_server.inbox.public_url)
    message = f"no: new secret, old secret, {scripted.api_key}"
    async with session_on(scripted, inbox) as session:
        task = await session.submit("a cat")
        payload = {"id": "t1", "status": "failed", "error": {"code": "x", "message": message}}
        await inbox.deliver(*sign(payload, "old secret"))
        outcome = await task.outcome()

    assert isinstance(outcome, Failed)
    assert outcome.error.message == "no: ***, ***, ***"


@pytest.mark.parametrize(
    "payload", [{"id": "t1", "status": "completed", "output": []}, {"id": "t1"}, {"id": "t1", "status": 7}]
)
async def test_unreadable_delivery_causes_a_poll(
    scripted: ScriptedGateway, inbox_server: InboxServer, payload: object
) -> None:
    """An unreadable delivery makes its task be polled at once."""
    async with session_on(scripted, inbox_server.inbox) as session:
        task = await session.submit("a cat")
        await anyio.sleep(2.0)
        for _ in range(2):
            with pytest.raises(ProtocolError):
                await deliver(inbox_server.inbox, payload)
        done = await task

    assert done.elapsed == pytest.approx(2.0, abs=0.1)
    assert done.polls == 1


async def test_unreadable_delivery_for_an_unknown_task(gateway: Emulator, inbox_server: InboxServer) -> None:
    """An unreadable delivery for an unknown task is a ProtocolError and causes no poll."""
    async with session_on(gateway, inbox_server.inbox) as session:
        for payload in ({}, {"id": "unknown"}, b"\xff\xfe{}"):
            with pytest.raises(ProtocolError):
                await deliver(inbox_server.inbox, payload)
        polls = session.stats.polls

    assert polls == 0


async def test_first_end_wins(scripted: ScriptedGateway, inbox_server: InboxServer) -> None:
    """Later contradictory ends are ignored: a delivery after a poll, a poll after a delivery, a second delivery."""
    failed = {"id": "t1", "status": "failed", "error": {"code": "x", "message": "no"}}
    scripted.polls = deque([answer(200, completed("t1")), answer(200, failed, after=2.0)])
    async with session_on(scripted, inbox_server.inbox, schedule=FixedSchedule(0.5)) as session:
        by_poll = await session.submit("a cat", webhook_url="https://elsewhere.example/hook")
        first = await by_poll.outcome()
        await deliver(inbox_server.inbox, failed)
        by_delivery = await session.submit("a dog", webhook_url="https://elsewhere.example/hook")
        await anyio.sleep(1.0)
        await deliver(inbox_server.inbox, completed("t1"))
        await deliver(inbox_server.inbox, failed)
        second = await by_delivery.outcome()
        await anyio.sleep(5.0)

    assert isinstance(first, Completed)
    # The failure was stored for this id after its first task had ended, and ends the next task with the same id.
    assert isinstance(second, Failed)


async def test_delivery_during_a_poll(scripted: ScriptedGateway, inbox_server: InboxServer) -> None:
    """The response to a poll that was in flight when the delivery arrived is ignored."""
    scripted.polls = deque([answer(404, {"error": "no such task"}, after=1.0)])
    async with session_on(scripted, inbox_server.inbox, schedule=FixedSchedule(0.5)) as session:
        task = await session.submit("a cat")
        await anyio.sleep(2.5)  # during the poll at 2 s: polls are four times rarer than the schedule says
        await deliver(inbox_server.inbox, completed("t1"))
        await deliver(inbox_server.inbox, {"id": "t1", "status": "failed", "error": "no"})
        outcome = await task.outcome()

    assert isinstance(outcome, Completed)


async def test_progress_never_decreases(scripted: ScriptedGateway, inbox_server: InboxServer) -> None:
    """A delivery may report progress; an out-of-order delivery is ignored."""
    async with session_on(scripted, inbox_server.inbox) as session:
        task = await session.submit("a cat")
        seen: list[float | None] = []
        for progress in (0.5, 0.3, None, 0.7):
            await deliver(inbox_server.inbox, running("t1", progress=progress))
            seen.append(task.snapshot.progress if task.snapshot else None)
        await deliver(inbox_server.inbox, running("unknown", progress=0.5))

    assert seen == [0.5, 0.5, 0.5, 0.7]


async def test_early_deliveries_are_limited(scripted: ScriptedGateway, inbox_server: InboxServer) -> None:
    """Deliveries for unknown tasks are stored, up to a number and a size."""
    scripted.polls = deque([answer(200, running("ours"))])
    async with session_on(scripted, inbox_server.inbox) as session:
        await deliver(inbox_server.inbox, completed("oldest"))
        for number in range(1000):
            await deliver(inbox_server.inbox, completed(f"other-{number}"))
        await deliver(inbox_server.inbox, completed("large", metadata={"text": "x" * 10_000}))
        tasks = {name: session.attach(name) for name in ("oldest", "large", "other-0", "other-999")}
        await anyio.sleep(0.5)
        ended = {name for name, task in tasks.items() if task.snapshot and task.snapshot.status.ended}

    assert ended == {"other-0", "other-999"}


async def test_size_of_all_early_deliveries_is_limited(scripted: ScriptedGateway, inbox_server: InboxServer) -> None:
    """Deliveries for unknown tasks are stored up to a size of all together; one that is sent again counts once."""
    scripted.polls = deque([answer(200, running("ours"))])
    filler = {"text": "x" * 7_500}
    async with session_on(scripted, inbox_server.inbox) as session:
        for _ in range(200):
            await deliver(inbox_server.inbox, completed("again", metadata=filler))
        await deliver(inbox_server.inbox, completed("first", metadata=filler))
        for number in range(130):
            await deliver(inbox_server.inbox, completed(f"other-{number}", metadata=filler))
            if number == 100:
                within = {name for name in ("again", "first") if inbox_server.inbox.dispatcher.registry.early(name)}
        tasks = {name: session.attach(name) for name in ("again", "first", "other-0", "other-20", "other-129")}
        await anyio.sleep(0.5)
        ended = {name for name, task in tasks.items() if task.snapshot and task.snapshot.status.ended}

    assert within == {"again", "first"}
    assert ended == {"other-20", "other-129"}


async def test_thousand_deliveries_at_once(inbox_server: InboxServer) -> None:
    """A thousand tasks that end at the same moment all end by their webhooks, over real sockets."""
    async with (
        Emulator(seconds=8.0, spread=0.0, seed=1, pictures=False, max_in_flight=1000) as gateway,
        session_on(gateway, inbox_server.inbox, max_in_flight=1000, max_polls_per_second=None) as session,
    ):
        outcomes = [outcome async for outcome in session.stream(f"picture {number}" for number in range(1000))]
        stats = session.stats

    assert all(isinstance(outcome, Completed) for outcome in outcomes)
    assert (stats.webhooks, stats.polls) == (1000, 0)


async def test_not_found_delivery_causes_a_poll(scripted: ScriptedGateway, inbox_server: InboxServer) -> None:
    """A delivery that says the task doesn't exist can't be relied on: the task is polled at once."""
    async with session_on(scripted, inbox_server.inbox) as session:
        task = await session.submit("a cat")
        await deliver(inbox_server.inbox, {"id": "t1", "status": "Task not found"})
        done = await task
        await deliver(inbox_server.inbox, {"id": "t2", "status": "Task not found"})

    assert done.polls == 1
    assert done.elapsed < 0.5


async def test_delivery_without_an_open_session(gateway: Emulator, inbox_server: InboxServer) -> None:
    """Before a session is entered and after it is closed, a delivery is a SessionClosedError."""
    with pytest.raises(SessionClosedError):
        await deliver(inbox_server.inbox, completed("t1"))
    async with session_on(gateway, inbox_server.inbox):
        await deliver(inbox_server.inbox, completed("t1"))
    with pytest.raises(SessionClosedError):
        await deliver(inbox_server.inbox, completed("t1"))


async def test_wakeup_just_before_the_final_poll(gateway: Emulator, inbox_server: InboxServer) -> None:
    """A wakeup just before the final poll doesn't prevent that poll."""
    inbox_server.open = False
    async with session_on(gateway, inbox_server.inbox, task_timeout=20.0) as session:
        task = await session.submit("a cat")
        poller = task._runner.poller
        assert poller is not None
        await anyio.sleep(poller._start.deadline - 1.0 - 0.005 - anyio.current_time())
        await anext(task.updates())
        done = await task

    assert done.polls == 1


def test_delivery_after_the_loop_ended() -> None:
    """A session whose loop has ended counts as closed, for deliveries and for the inbox's next session."""
    inbox = WebhookInbox(secret=SECRET, public_url="https://app.example/hooks")
    asyncio.run(_enter(FluxSession("key", base_url="http://127.0.0.1:9", webhooks=inbox)))
    with pytest.raises(SessionClosedError):
        asyncio.run(deliver(inbox, completed("t1")))

    async def next_session() -> None:
        async with FluxSession("key", base_url="http://127.0.0.1:9", webhooks=inbox):
            await deliver(inbox, completed("t1"))

    asyncio.run(next_session())


@in_real_time
@pytest.mark.parametrize("interruption", ["the session's loop ends", "the handler is cancelled"])
async def test_interrupted_delivery_from_another_loop(
    scripted: ScriptedGateway, tmp_path: Path, interruption: str
) -> None:
    """A delivery is a SessionClosedError if the session's loop ends first, and is cancelled if its handler is."""
    inbox = WebhookInbox(secret=SECRET, public_url="https://app.example/hooks")
    session_opened, journal_called = threading.Event(), asyncio.Event()

    class BlockedJournal(SqliteJournal):
        async def find_task(self, task_id: str, /) -> JournalEntry | None:
            test_loop.call_soon_threadsafe(journal_called.set)
            await asyncio.sleep(1.0 if interruption == "the handler is cancelled" else 0.3)
            raise asyncio.CancelledError

    async def session() -> None:
        async with session_on(scripted, inbox, journal=BlockedJournal(tmp_path / "run.db")):
            session_opened.set()
            await asyncio.sleep(1.5)

    test_loop = asyncio.get_running_loop()
    thread = asyncio.ensure_future(asyncio.to_thread(asyncio.run, session()))
    await asyncio.to_thread(session_opened.wait)
    delivery = asyncio.ensure_future(deliver(inbox, completed("t1")))
    await journal_called.wait()
    if interruption == "the handler is cancelled":
        delivery.cancel()
    await asyncio.wait([delivery])
    await thread

    if interruption == "the handler is cancelled":
        assert delivery.cancelled()
    else:
        assert isinstance(delivery.exception(), SessionClosedError)


async def test_inbox_of_wrong_type(gateway: Emulator) -> None:
    """A URL instead of an inbox is a ConfigurationError."""
    with pytest.raises(ConfigurationError, match="WebhookInbox"):
        FluxSession(gateway.api_key, webhooks="https://app.example/hooks")  # type: ignore[arg-type]


@in_real_time
async def test_delivery_from_another_loop(scripted: ScriptedGateway, inbox_server: InboxServer) -> None:
    """A delivery can be awaited in another thread's event loop, and raises its errors there."""
    async with session_on(scripted, inbox_server.inbox) as session:
        task = await session.submit("a cat")
        await asyncio.to_thread(asyncio.run, deliver(inbox_server.inbox, completed("t1")))
        done = await task
        with pytest.raises(ProtocolError):
            await asyncio.to_thread(asyncio.run, deliver(inbox_server.inbox, {"id": "t1"}))

    assert done.polls == 0


async def test_webhook_after_the_deadline(scripted: ScriptedGateway, inbox_server: InboxServer) -> None:
    """A webhook that arrives after the deadline is stored, and ends a task attached later."""
    scripted.polls = deque([answer(200, running("t1"))])
    async with session_on(scripted, inbox_server.inbox, task_timeout=10.0) as session:
        task = await session.submit("a cat")
        outcome = await task.outcome()
        await deliver(inbox_server.inbox, completed("t1"))
        later = await session.attach("t1")

    assert isinstance(outcome, Failed)
    assert isinstance(outcome.error, DeadlineExceededError)
    assert later.polls == 0


async def test_webhook_interrupts_a_pause(scripted: ScriptedGateway, inbox_server: InboxServer) -> None:
    """A webhook ends a task whose poll is paused by a Retry-After."""
    scripted.polls = deque([answer(429, {}, [("Retry-After", "60")])])
    async with session_on(scripted, inbox_server.inbox, schedule=FixedSchedule(0.1)) as session:
        task = await session.submit("a cat")
        await anyio.sleep(10.0)
        await deliver(inbox_server.inbox, completed("t1"))
        done = await task

    assert done.elapsed == pytest.approx(10.0, abs=0.2)
    assert done.polls == 1


async def test_webhook_interrupts_a_rate_limited_poll(scripted: ScriptedGateway, inbox_server: InboxServer) -> None:
    """A webhook ends a task whose poll waits for the poll limiter."""
    scripted.submits = deque([answer(200, running(f"t{number}")) for number in range(3)])
    scripted.polls = deque([answer(200, running("t0"))])
    async with session_on(
        scripted, inbox_server.inbox, schedule=FixedSchedule(0.1), max_polls_per_second=0.01
    ) as session:
        tasks = [await session.submit(f"picture {number}") for number in range(3)]
        await anyio.sleep(10.0)
        for number in range(3):
            await deliver(inbox_server.inbox, completed(f"t{number}"))
        done = [await task for task in tasks]

    assert all(result.elapsed == pytest.approx(10.0, abs=0.2) for result in done)
    assert len(scripted.of("GET")) <= 1


async def test_poll_response_right_after_a_delivery(scripted: ScriptedGateway, inbox_server: InboxServer) -> None:
    """A poll response in the same event loop iteration as a delivery is ignored."""
    async with session_on(scripted, inbox_server.inbox) as session:
        task = await session.submit("a cat")
        poller = task._runner.poller
        assert poller is not None
        poller.on_webhook(parse(sign(completed("t1"))[0]))
        poller._feed.publish(parse(sign({"id": "t1", "status": "failed", "error": "no"})[0]))
        outcome = await task.outcome()

    assert outcome.ok


def test_removing_an_unknown_listener_changes_nothing() -> None:
    """Removing a listener that was never added, or has been replaced, does no harm to the one that is registered."""
    registry, (first, second) = WebhookRegistry(), (SilentListener(), SilentListener())
    registry.add("t1", first)
    registry.add("t1", second)
    registry.remove("t1", first)
    registry.remove("t2", first)

    assert registry.listener("t1") is second
    registry.remove("t1", second)
    registry.remove("t1", second)
    assert registry.listener("t1") is None


class SilentListener:
    def on_webhook(self, snapshot: TaskSnapshot | None) -> None:
        raise AssertionError

    async def wait_closed(self) -> None:
        raise AssertionError
