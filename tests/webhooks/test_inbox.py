"""Sessions with webhooks: whichever of webhook and poll is faster brings the end, and nothing is lost where one fails."""

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
from support.webhooks import SECRET, InboxServer, deliver, session_on, signed

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
async def test_a_webhook_brings_the_end(
    at: InboxServer, shape: Any, prompt: str, error: type[Exception] | None
) -> None:
    """A verified delivery of either shape ends the wait at once, and not one poll is made."""
    async with (
        Emulator(seconds=8.0, spread=0.0, seed=1, pictures=False, webhooks=Webhooks(shape=shape)) as gateway,
        session_on(gateway, at.inbox) as session,
    ):
        started = anyio.current_time()
        outcome = await (await session.submit(prompt)).outcome()
        took = anyio.current_time() - started
        stats = session.stats

    assert (type(outcome.error) if isinstance(outcome, Failed) else None) is error
    assert outcome.elapsed == pytest.approx(8.0, abs=0.1)
    assert took == pytest.approx(8.0, abs=0.1)
    assert (outcome.polls, stats.polls, stats.webhooks) == (0, 0, 1)
    assert [delivery.status for delivery in gateway.deliveries] == [200]


async def test_a_poll_on_the_wire_is_cut_short(scripted: ScriptedGateway, at: InboxServer) -> None:
    """A webhook doesn't wait for the answer to a poll that hangs."""
    scripted.polls = deque([hang])
    async with session_on(scripted, at.inbox, schedule=FixedSchedule(0.5)) as session:
        task = await session.submit("a cat")
        await anyio.sleep(5.0)
        await deliver(at.inbox, completed("t1"))
        done = await task
        elapsed = done.elapsed

    assert elapsed == pytest.approx(5.0, abs=0.1)
    assert done.polls == 1


async def test_a_webhook_may_be_faster_than_the_submit(scripted: ScriptedGateway, at: InboxServer) -> None:
    """A delivery that comes before the submit's answer is kept, and ends the task as soon as it has its id."""
    scripted.submits = deque([answer(200, running("t1"), after=3.0)])
    async with session_on(scripted, at.inbox) as session:
        wait = asyncio.ensure_future(session.generate("a cat"))
        await anyio.sleep(1.0)
        await deliver(at.inbox, completed("t1"))
        done = await wait

    assert done.elapsed == pytest.approx(3.0, abs=0.1)
    assert done.polls == 0


async def test_an_attached_task_hears_too(scripted: ScriptedGateway, at: InboxServer) -> None:
    """A task that was submitted elsewhere is polled as always, and ends by a webhook if that is faster."""
    scripted.polls = deque([answer(200, running("t9"))])
    async with session_on(scripted, at.inbox, schedule=FixedSchedule(1.0)) as session:
        tasks = [session.attach("t9"), session.attach("t9")]
        await anyio.sleep(10.5)
        await deliver(at.inbox, completed("t9"))
        done = [await task for task in tasks]

    assert all(one.elapsed == pytest.approx(10.5, abs=0.1) for one in done)
    assert all(one.polls > 8 for one in done)


async def test_each_submit_asks_for_a_webhook(scripted: ScriptedGateway, at: InboxServer) -> None:
    """The address and the secret go with each submit, the first of several; outcomes name the request as it was given."""
    at.inbox = WebhookInbox(secret=["new", "old"], public_url=at.inbox.public_url)
    request = GenerationRequest("a cat")
    async with session_on(scripted, at.inbox, schedule=FixedSchedule(1.0)) as session:
        done = await session.generate(request)
        await session.generate("a dog", webhook_url="https://elsewhere.example/hook", webhook_secret="theirs")
    params = [call.params for call in scripted.of("POST")]

    assert done.request is request
    assert (params[0]["webhook_url"], params[0]["webhook_secret"]) == (at.inbox.public_url, "new")
    assert (params[1]["webhook_url"], params[1]["webhook_secret"]) == ("https://elsewhere.example/hook", "theirs")


async def test_a_request_with_a_webhook_of_its_own_is_polled_as_usual(gateway: Emulator, at: InboxServer) -> None:
    """Where no webhook of ours was asked for, none is relied on."""
    async with session_on(gateway, at.inbox, schedule=FixedSchedule(1.0)) as session:
        done = await session.generate("a cat", webhook_url="http://127.0.0.1:9/nobody")

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
        ({"public_url": "https://app.example/" + "x" * 2083}, "public_url"),
        ({"max_age": 0}, "max_age"),
    ],
)
def test_an_inbox_that_could_not_work_is_refused(settings: dict[str, Any], named: str) -> None:
    """A mistake in the inbox is named before anything is sent."""
    with pytest.raises(ConfigurationError, match=named):
        WebhookInbox(**{"secret": SECRET, "public_url": "https://app.example/hooks", **settings})


async def test_a_session_has_its_inbox_for_itself(gateway: Emulator, at: InboxServer) -> None:
    """An inbox in use can't be given to a second session, and is free again after the first; its secret isn't shown."""
    async with session_on(gateway, at.inbox):
        second = session_on(gateway, at.inbox)
        with pytest.raises(ConfigurationError, match="in use"):
            await second.__aenter__()
        await second.aclose()
        with pytest.raises(ConfigurationError, match="in use"):
            await second.__aenter__()
    async with session_on(gateway, at.inbox) as session:
        done = await session.generate("a cat")

    assert done.polls == 0
    assert SECRET not in repr(at.inbox)


def test_an_inbox_outlives_its_event_loop() -> None:
    """A session whose loop has ended before it was left can be entered, or left, later."""
    inbox = WebhookInbox(secret=SECRET, public_url="https://app.example/hooks")
    session = FluxSession("key", base_url="http://127.0.0.1:9", webhooks=inbox)

    async def twice() -> None:
        async with session:
            pass

    asyncio.run(_entered(session))
    asyncio.run(twice())
    asyncio.run(_entered(session))
    asyncio.run(session.aclose())
    asyncio.run(twice())

    assert session.stats.in_flight == 0


async def _entered(session: FluxSession) -> None:
    await session.__aenter__()
    await session._transport.close()


async def test_polls_stand_down_and_take_over(at: InboxServer) -> None:
    """While webhooks come, hardly a poll is made; when they cease, polls are as usual, and when they come again, rare."""
    async with (
        Emulator(seconds=8.0, spread=0.2, seed=1, pictures=False, max_in_flight=100) as gateway,
        session_on(gateway, at.inbox, schedule=LearnedSchedule(), max_polls_per_second=None) as session,
    ):
        polls: list[float] = []
        for is_open in (True, True, True, False, False, True, True, True, True):
            at.open = is_open
            before = session.stats.polls
            async for outcome in session.stream([f"picture {number}" for number in range(48)]):
                assert outcome.ok
            polls.append((session.stats.polls - before) / 48)

    # In one run of thirty the schedule takes chance for a change of the service, and polls more for one round.
    coming, missing, again = mean(polls[1:3]), polls[4], mean(polls[6:])
    assert coming < 0.5
    assert missing > 1.0
    assert again < 0.5


async def test_a_schedule_that_knows_no_price_is_stretched(at: InboxServer) -> None:
    """A fixed interval becomes up to eight times as long while webhooks come, and is itself again while they don't."""
    async with (
        Emulator(seconds=40.0, spread=0.0, seed=1, pictures=False) as gateway,
        session_on(gateway, at.inbox, schedule=FixedSchedule(1.0)) as session,
    ):
        for _ in range(10):
            await session.generate("a cat")
        trusted = (await session.generate("a cat")).polls
        at.open = False
        for _ in range(20):
            await session.generate("a cat")
        alone = (await session.generate("a cat")).polls

    assert trusted in {4, 5}
    assert alone in {39, 40, 41}


async def test_an_address_that_nobody_reaches_costs_nothing_but_polls(gateway: Emulator) -> None:
    """Where no webhook ever comes, polls bring every end, after the first few as soon as without an inbox."""
    inbox = WebhookInbox(secret=SECRET, public_url="http://127.0.0.1:9/nobody")
    async with session_on(gateway, inbox, schedule=FixedSchedule(1.0)) as session:
        done = [await session.generate("a cat") for _ in range(20)]

    assert {one.polls for one in done[-5:]} <= {8, 9}
    assert session.stats.webhooks == 0
    assert all(delivery.status is None for delivery in gateway.deliveries)


async def test_progress_is_polled_for_while_somebody_watches(gateway: Emulator, at: InboxServer) -> None:
    """Only polls tell of progress: for a task whose updates are followed they go on, and for others they stand down."""
    async with session_on(gateway, at.inbox, schedule=FixedSchedule(1.0)) as session:
        for _ in range(10):
            await session.generate("a cat")
        watched, other = await session.submit("a cat"), await session.submit("a cat")
        await anyio.sleep(0.5)
        also = asyncio.ensure_future(anext(watched.updates()))
        seen = [snapshot.progress async for snapshot in watched.updates()]
        await also
        polls = (await watched).polls, (await other).polls

    assert len(seen) >= 7
    assert polls[0] >= 6
    assert polls[1] <= 1


@pytest.mark.parametrize("schedule", [FixedSchedule(1.0), ExponentialSchedule(1.0, factor=1.5), LearnedSchedule()])
async def test_who_peeks_doesnt_put_polls_off(gateway: Emulator, at: InboxServer, schedule: PollSchedule) -> None:
    """A page that asks for the newest snapshot again and again, and progress that is delivered, delay no look."""
    at.open = False
    async with session_on(gateway, at.inbox, schedule=schedule) as session:
        task = await session.submit("a cat")
        for tick in range(200):
            async with aclosing(task.updates()) as updates:
                await anext(updates)
            if tick % 5 == 0 and task.snapshot and not task.snapshot.status.ended:
                await deliver(at.inbox, running(task.id, progress=(task.snapshot.progress or 0) + 1e-4))
            await anyio.sleep(0.1)
        polls = (await task).polls

    assert polls >= 1


async def test_the_last_look_before_the_deadline_stays(gateway: Emulator, at: InboxServer) -> None:
    """However much webhooks are relied on, a task is looked at once more before it is given up."""
    at.open = False
    async with session_on(gateway, at.inbox, task_timeout=20.0) as session:
        done = await session.generate("a cat")

    assert done.polls == 1
    assert done.elapsed == pytest.approx(19.0, abs=0.2)


async def test_the_usual_mess_does_no_harm(at: InboxServer) -> None:
    """Forged, doubled and dropped deliveries: each task ends once, and as it really did."""
    webhooks = Webhooks(forged=0.5, doubled=0.5, dropped=0.3, delay=0.5)
    async with (
        Emulator(
            seconds=4.0, spread=0.3, seed=1, pictures=False, failing=0.2, max_in_flight=60, webhooks=webhooks
        ) as gateway,
        session_on(gateway, at.inbox, schedule=LearnedSchedule(), max_in_flight=60) as session,
    ):
        outcomes = [outcome async for outcome in session.stream([f"picture {number}" for number in range(120)])]
        await anyio.sleep(2.0)
    statuses = {(delivery.forged, delivery.status) for delivery in gateway.deliveries}

    assert len({outcome.task_id for outcome in outcomes}) == 120
    assert all(outcome.ok is (gateway.tasks[outcome.task_id or ""].fate == "completed") for outcome in outcomes)
    assert statuses == {(True, 401), (False, 200)}


async def test_a_forged_delivery_is_refused(scripted: ScriptedGateway, at: InboxServer) -> None:
    """Who doesn't know the secret can't end a task."""
    scripted.polls = deque([answer(200, running("t1"))])
    async with session_on(scripted, at.inbox) as session:
        task = await session.submit("a cat")
        with pytest.raises(WebhookSignatureError):
            await at.inbox.deliver(*signed(completed("t1"), "another secret"))
        snapshot = task.snapshot

    assert snapshot is not None
    assert not snapshot.status.ended


async def test_an_old_secret_is_valid_while_it_is_being_replaced(scripted: ScriptedGateway, at: InboxServer) -> None:
    """Several secrets verify; the key and the secrets that a service echoes are in no error."""
    inbox = WebhookInbox(secret=["new secret", "old secret"], public_url=at.inbox.public_url)
    said = f"no: new secret, old secret, {scripted.api_key}"
    async with session_on(scripted, inbox) as session:
        task = await session.submit("a cat")
        told = {"id": "t1", "status": "failed", "error": {"code": "x", "message": said}}
        await inbox.deliver(*signed(told, "old secret"))
        outcome = await task.outcome()

    assert isinstance(outcome, Failed)
    assert outcome.error.message == "no: ***, ***, ***"


@pytest.mark.parametrize(
    "told", [{"id": "t1", "status": "completed", "output": []}, {"id": "t1"}, {"id": "t1", "status": 7}]
)
async def test_an_unreadable_delivery_is_a_reason_to_look(
    scripted: ScriptedGateway, at: InboxServer, told: object
) -> None:
    """Something has happened to the task, so it is looked at at once."""
    async with session_on(scripted, at.inbox) as session:
        task = await session.submit("a cat")
        await anyio.sleep(2.0)
        for _ in range(2):
            with pytest.raises(ProtocolError):
                await deliver(at.inbox, told)
        done = await task

    assert done.elapsed == pytest.approx(2.0, abs=0.1)
    assert done.polls == 1


async def test_an_unreadable_delivery_about_nobody_is_refused(gateway: Emulator, at: InboxServer) -> None:
    """What names no task that is followed here is refused, and that is all."""
    async with session_on(gateway, at.inbox) as session:
        for told in ({}, {"id": "somebody's"}, b"\xff\xfe{}"):
            with pytest.raises(ProtocolError):
                await deliver(at.inbox, told)
        polls = session.stats.polls

    assert polls == 0


async def test_the_first_end_stands(scripted: ScriptedGateway, at: InboxServer) -> None:
    """What contradicts an end later is ignored: a delivery after a poll, a poll after a delivery, a second delivery."""
    failed = {"id": "t1", "status": "failed", "error": {"code": "x", "message": "no"}}
    scripted.polls = deque([answer(200, completed("t1")), answer(200, failed, after=2.0)])
    async with session_on(scripted, at.inbox, schedule=FixedSchedule(0.5)) as session:
        by_poll = await session.submit("a cat", webhook_url="https://elsewhere.example/hook")
        first = await by_poll.outcome()
        await deliver(at.inbox, failed)
        by_delivery = await session.submit("a dog", webhook_url="https://elsewhere.example/hook")
        await anyio.sleep(1.0)
        await deliver(at.inbox, completed("t1"))
        await deliver(at.inbox, failed)
        second = await by_delivery.outcome()
        await anyio.sleep(5.0)

    assert isinstance(first, Completed)
    # The end that was kept for an id that nobody followed any more was for the task of that id.
    assert isinstance(second, Failed)


async def test_a_delivery_beats_the_answer_to_a_poll(scripted: ScriptedGateway, at: InboxServer) -> None:
    """A poll that was under way and says something else comes too late."""
    scripted.polls = deque([answer(404, {"error": "no such task"}, after=1.0)])
    async with session_on(scripted, at.inbox, schedule=FixedSchedule(0.5)) as session:
        task = await session.submit("a cat")
        await anyio.sleep(2.5)  # in the middle of the poll, whose interval is stretched to 2 s
        await deliver(at.inbox, completed("t1"))
        await deliver(at.inbox, {"id": "t1", "status": "failed", "error": "no"})
        outcome = await task.outcome()

    assert isinstance(outcome, Completed)


async def test_progress_doesnt_go_back(scripted: ScriptedGateway, at: InboxServer) -> None:
    """A delivery may tell of progress; one that was overtaken is ignored."""
    async with session_on(scripted, at.inbox) as session:
        task = await session.submit("a cat")
        seen: list[float | None] = []
        for progress in (0.5, 0.3, None, 0.7):
            await deliver(at.inbox, running("t1", progress=progress))
            seen.append(task.snapshot.progress if task.snapshot else None)
        await deliver(at.inbox, running("unknown", progress=0.5))

    assert seen == [0.5, 0.5, 0.5, 0.7]


async def test_a_delivery_for_somebody_else_is_kept_for_a_while(scripted: ScriptedGateway, at: InboxServer) -> None:
    """What nobody here waits for is taken, and forgotten when there is too much of it, or if it is too large to keep."""
    scripted.polls = deque([answer(200, running("ours"))])
    async with session_on(scripted, at.inbox) as session:
        await deliver(at.inbox, completed("first"))
        for number in range(1000):
            await deliver(at.inbox, completed(f"theirs-{number}"))
        await deliver(at.inbox, completed("large", metadata={"much": "x" * 10_000}))
        tasks = {name: session.attach(name) for name in ("first", "large", "theirs-0", "theirs-999")}
        await anyio.sleep(0.5)
        ended = {name for name, task in tasks.items() if task.snapshot and task.snapshot.status.ended}

    assert ended == {"theirs-0", "theirs-999"}


async def test_a_thousand_deliveries_at_once(at: InboxServer) -> None:
    """A thousand tasks that end in the same moment are all told by their webhooks, over real sockets."""
    async with (
        Emulator(seconds=8.0, spread=0.0, seed=1, pictures=False, max_in_flight=1000) as gateway,
        session_on(gateway, at.inbox, max_in_flight=1000, max_polls_per_second=None) as session,
    ):
        outcomes = [outcome async for outcome in session.stream(f"picture {number}" for number in range(1000))]
        stats = session.stats

    assert all(isinstance(outcome, Completed) for outcome in outcomes)
    assert (stats.webhooks, stats.polls) == (1000, 0)


async def test_a_task_that_is_said_not_to_exist_is_looked_at(scripted: ScriptedGateway, at: InboxServer) -> None:
    """Who delivers that there is no such task can't know: the service is asked at once."""
    async with session_on(scripted, at.inbox) as session:
        task = await session.submit("a cat")
        await deliver(at.inbox, {"id": "t1", "status": "Task not found"})
        done = await task
        await deliver(at.inbox, {"id": "t2", "status": "Task not found"})

    assert done.polls == 1
    assert done.elapsed < 0.5


async def test_no_open_session_puts_a_delivery_off(gateway: Emulator, at: InboxServer) -> None:
    """Before a session is entered and after it is left, a delivery is to come again, and then it is welcome."""
    with pytest.raises(SessionClosedError):
        await deliver(at.inbox, completed("t1"))
    async with session_on(gateway, at.inbox):
        await deliver(at.inbox, completed("t1"))
    with pytest.raises(SessionClosedError):
        await deliver(at.inbox, completed("t1"))


async def test_a_wake_up_doesnt_take_the_last_look(gateway: Emulator, at: InboxServer) -> None:
    """Who is woken right before the last look before the deadline makes it all the same."""
    at.open = False
    async with session_on(gateway, at.inbox, task_timeout=20.0) as session:
        task = await session.submit("a cat")
        lookout = task._poller.lookout
        await anyio.sleep(lookout.deadline - 1.0 - 0.005 - anyio.current_time())
        await anext(task.updates())
        done = await task

    assert done.polls == 1


def test_a_delivery_meets_an_event_loop_that_has_ended() -> None:
    """A session whose loop is gone is as good as closed, for deliveries and for the next session with its inbox."""
    inbox = WebhookInbox(secret=SECRET, public_url="https://app.example/hooks")
    asyncio.run(_entered(FluxSession("key", base_url="http://127.0.0.1:9", webhooks=inbox)))
    with pytest.raises(SessionClosedError):
        asyncio.run(deliver(inbox, completed("t1")))

    async def next_one() -> None:
        async with FluxSession("key", base_url="http://127.0.0.1:9", webhooks=inbox):
            await deliver(inbox, completed("t1"))

    asyncio.run(next_one())


@in_real_time
@pytest.mark.parametrize("who", ["the session's loop ends", "the handler is cancelled"])
async def test_what_cuts_a_delivery_from_another_loop(scripted: ScriptedGateway, tmp_path: Path, who: str) -> None:
    """A delivery whose session's loop ends in the middle of it is put off; one that is cancelled itself is cancelled."""
    inbox = WebhookInbox(secret=SECRET, public_url="https://app.example/hooks")
    opened, found = threading.Event(), asyncio.Event()

    class Stuck(SqliteJournal):
        async def find_task(self, task_id: str, /) -> JournalEntry | None:
            here.call_soon_threadsafe(found.set)
            await asyncio.sleep(1.0 if who == "the handler is cancelled" else 0.3)
            raise asyncio.CancelledError

    async def session() -> None:
        async with session_on(scripted, inbox, journal=Stuck(tmp_path / "run.db")):
            opened.set()
            await asyncio.sleep(1.5)

    here = asyncio.get_running_loop()
    thread = asyncio.ensure_future(asyncio.to_thread(asyncio.run, session()))
    await asyncio.to_thread(opened.wait)
    delivery = asyncio.ensure_future(deliver(inbox, completed("t1")))
    await found.wait()
    if who == "the handler is cancelled":
        delivery.cancel()
    await asyncio.wait([delivery])
    await thread

    if who == "the handler is cancelled":
        assert delivery.cancelled()
    else:
        assert isinstance(delivery.exception(), SessionClosedError)


async def test_an_inbox_must_be_one(gateway: Emulator) -> None:
    """The address alone is no inbox."""
    with pytest.raises(ConfigurationError, match="WebhookInbox"):
        FluxSession(gateway.api_key, webhooks="https://app.example/hooks")  # type: ignore[arg-type]


@in_real_time
async def test_a_delivery_may_come_in_another_event_loop(scripted: ScriptedGateway, at: InboxServer) -> None:
    """A server whose handlers run in threads of their own delivers as well, and hears what is wrong."""
    async with session_on(scripted, at.inbox) as session:
        task = await session.submit("a cat")
        await asyncio.to_thread(asyncio.run, deliver(at.inbox, completed("t1")))
        done = await task
        with pytest.raises(ProtocolError):
            await asyncio.to_thread(asyncio.run, deliver(at.inbox, {"id": "t1"}))

    assert done.polls == 0


async def test_a_deadline_is_a_deadline(scripted: ScriptedGateway, at: InboxServer) -> None:
    """A webhook in the very moment of the deadline is either taken or too late, and one that comes later is kept."""
    scripted.polls = deque([answer(200, running("t1"))])
    async with session_on(scripted, at.inbox, task_timeout=10.0) as session:
        task = await session.submit("a cat")
        outcome = await task.outcome()
        await deliver(at.inbox, completed("t1"))
        later = await session.attach("t1")

    assert isinstance(outcome, Failed)
    assert isinstance(outcome.error, DeadlineExceededError)
    assert later.polls == 0


async def test_a_pause_is_cut_short(scripted: ScriptedGateway, at: InboxServer) -> None:
    """A webhook ends the wait of a task whose poll waits because the service has asked everybody to."""
    scripted.polls = deque([answer(429, {}, [("Retry-After", "60")])])
    async with session_on(scripted, at.inbox, schedule=FixedSchedule(0.1)) as session:
        task = await session.submit("a cat")
        await anyio.sleep(10.0)
        await deliver(at.inbox, completed("t1"))
        done = await task

    assert done.elapsed == pytest.approx(10.0, abs=0.2)
    assert done.polls == 1


async def test_a_wait_for_the_budget_is_cut_short(scripted: ScriptedGateway, at: InboxServer) -> None:
    """A webhook ends the wait of a task whose poll waits until the budget of polls allows it."""
    scripted.submits = deque([answer(200, running(f"t{number}")) for number in range(3)])
    scripted.polls = deque([answer(200, running("t0"))])
    async with session_on(scripted, at.inbox, schedule=FixedSchedule(0.1), max_polls_per_second=0.01) as session:
        tasks = [await session.submit(f"picture {number}") for number in range(3)]
        await anyio.sleep(10.0)
        for number in range(3):
            await deliver(at.inbox, completed(f"t{number}"))
        done = [await task for task in tasks]

    assert all(one.elapsed == pytest.approx(10.0, abs=0.2) for one in done)
    assert len(scripted.of("GET")) <= 1


async def test_an_answer_in_the_moment_of_a_delivery_changes_nothing(
    scripted: ScriptedGateway, at: InboxServer
) -> None:
    """A poll that is answered in the same turn of the event loop as a delivery comes too late."""
    async with session_on(scripted, at.inbox) as session:
        task = await session.submit("a cat")
        lookout = task._poller.lookout
        lookout.hear(parse(signed(completed("t1"))[0]))
        lookout.see(parse(signed({"id": "t1", "status": "failed", "error": "no"})[0]))
        outcome = await task.outcome()

    assert outcome.ok


def test_trust_has_its_bounds() -> None:
    """However many webhooks come, or fail to come, polls go on at a price between the usual and 64 times as much."""
    mail = WebhookRegistry()
    for _ in range(20_000):
        mail.noticed(told=True)
    most = mail.cost_factor
    for _ in range(20_000):
        mail.noticed(told=False)
    least = mail.cost_factor
    for _ in range(40):
        mail.noticed(told=True)
    again = mail.cost_factor

    assert (most, least, again) == (64.0, 1.0, 64.0)


def test_who_has_never_listened_can_be_forgotten() -> None:
    """Forgetting a listener that is unknown, or one of several, does no harm to the others."""
    mail, (one, two) = WebhookRegistry(), (Deaf(), Deaf())
    mail.expect("t1", one)
    mail.expect("t1", two)
    mail.forget("t1", one)
    mail.forget("t1", one)
    mail.forget("t2", one)

    assert mail.listeners("t1") == (two,)


class Deaf:
    def hear(self, snapshot: TaskSnapshot | None) -> None:
        raise AssertionError

    async def until_over(self) -> None:
        raise AssertionError

    def replan(self) -> None:
        raise AssertionError
