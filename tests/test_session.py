"""The session: its lifetime, its places, who waits for what, and what cancelling does."""

import asyncio
import gc
import logging
import time
from collections import deque
from decimal import Decimal
from pathlib import Path
from typing import Any

import aiohttp
import anyio
import anyio.lowlevel
import pytest
import uvloop
from support.scripted import ScriptedGateway, answer, completed, hang, raw, running, session_on

from flux2max_async import (
    Completed,
    ConfigurationError,
    Failed,
    FixedSchedule,
    FluxError,
    FluxSession,
    GeneratedImage,
    GenerationRequest,
    InvalidRequestError,
    SessionClosedError,
    TaskStatus,
)
from flux2max_async._api.codec import HttpRequest
from flux2max_async.emulator import Emulator


async def test_many_can_await_one_task(session: FluxSession, gateway: Emulator) -> None:
    """A task can be awaited many times, at once and later, and cancelling one wait touches no other."""
    task = await session.submit("a cat")
    impatient = asyncio.ensure_future(task.outcome())
    await anyio.sleep(1)
    impatient.cancel()
    outcomes = await asyncio.gather(task, task.outcome(), task)

    assert impatient.cancelled()
    assert outcomes[0] is outcomes[1] is outcomes[2] is await task
    assert gateway.accepted["a cat"] == 1


async def test_updates_tell_what_is_new(scripted: ScriptedGateway) -> None:
    """updates() gives the newest snapshot, then each new status or progress, and ends with the task."""
    progress = [0.1, 0.1, 0.4, 0.4, 0.4]
    scripted.polls = deque([*(answer(200, running(progress=p)) for p in progress), answer(200, completed())])
    async with session_on(scripted) as session:
        task = await session.submit("a cat")
        await anyio.sleep(2.5)
        seen = [snapshot async for snapshot in task.updates()]
        again = [snapshot.status async for snapshot in task.updates()]

    assert [snapshot.progress for snapshot in seen] == [0.1, 0.4, 1.0]
    assert again == [TaskStatus.COMPLETED]


async def test_updates_end_with_a_task_that_is_given_up(scripted: ScriptedGateway) -> None:
    """A task that ends without a last snapshot ends its updates, too."""
    scripted.polls = deque([answer(200, running())])
    async with session_on(scripted, task_timeout=5.0) as session:
        task = await session.submit("a cat")
        seen = [snapshot.status async for snapshot in task.updates()]

    assert seen == [TaskStatus.IN_PROGRESS]


async def test_a_handle_says_what_it_is(session: FluxSession) -> None:
    """A handle shows its id, request and newest snapshot."""
    task = await session.submit("a cat", seed=3)

    assert task.request == GenerationRequest("a cat", seed=3)
    assert task.snapshot is not None
    assert task.snapshot.status is TaskStatus.PENDING
    assert repr(task) == f"<GenerationTask {task.id!r} pending>"
    assert repr(session.attach("t7")) == "<GenerationTask 't7' not seen yet>"


async def test_params_replace_those_of_a_request(session: FluxSession) -> None:
    """Parameters beside a whole request give a changed copy of it."""
    task = await session.submit(GenerationRequest("a cat", seed=3, width=64), seed=4)

    assert task.request == GenerationRequest("a cat", seed=4, width=64)


@pytest.mark.parametrize(
    ("bad", "field"), [(7, "request"), ("", "prompt"), (None, "request"), (b"a cat", "request")], ids=repr
)
async def test_bad_requests_never_leave_the_house(
    session: FluxSession, gateway: Emulator, bad: Any, field: str
) -> None:
    """What is no request is an error before anything is sent, and takes no place."""
    with pytest.raises(InvalidRequestError) as caught:
        await session.generate(bad)

    assert caught.value.field == field
    assert not gateway.calls


@pytest.mark.parametrize("task_id", ["", None, 5])
async def test_bad_ids_are_refused(session: FluxSession, task_id: Any) -> None:
    """attach() and fetch() say so when an id can't be one."""
    with pytest.raises(InvalidRequestError, match="task_id"):
        session.attach(task_id)
    with pytest.raises(InvalidRequestError, match="task_id"):
        await session.fetch(task_id)


# ---------------------------------------------------------------------- places


async def test_places_limit_what_is_in_flight(gateway: Emulator) -> None:
    """No more tasks than places are ever running, waited for or not."""
    async with FluxSession(
        gateway.api_key, base_url=gateway.url, max_in_flight=3, schedule=FixedSchedule(0.5)
    ) as session:
        most = 0
        tasks = []
        for _ in range(9):
            tasks.append(await session.submit("a cat"))
            most = max(most, sum(task.ends > anyio.current_time() for task in gateway.tasks.values()))
        await asyncio.gather(*tasks)

        assert session.stats.in_flight == 0
    assert most == 3


async def test_waiting_for_a_place_can_be_cancelled(gateway: Emulator) -> None:
    """Who is cancelled while waiting for a place has sent nothing and holds no place."""
    async with FluxSession(gateway.api_key, base_url=gateway.url, max_in_flight=1) as session:
        first = await session.submit("a cat")
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(2):
                await session.generate("a dog")
        await first
        await session.generate("a bird")

    assert gateway.accepted == {"a cat": 1, "a bird": 1}


async def test_stats_count(gateway: Emulator) -> None:
    """The stats count submits, ends, polls and dollars, and are a copy."""
    async with FluxSession(gateway.api_key, base_url=gateway.url, schedule=FixedSchedule(1.0)) as session:
        before = session.stats
        await session.generate("a cat", width=2048, height=1024)
        failed = await (await session.submit("a dog [fail]")).outcome()
        running_task = await session.submit("a bird")
        stats = session.stats
        await running_task

    assert not failed.ok
    assert before.submitted == 0
    assert (stats.submitted, stats.completed, stats.failed, stats.in_flight) == (3, 1, 1, 1)
    assert stats.polls == gateway.calls["poll"] - running_task_polls(gateway, running_task.id)
    assert stats.spent == Decimal("0.10")


def running_task_polls(gateway: Emulator, task_id: str) -> int:
    return gateway.tasks[task_id].polls


# ---------------------------------------------------------------------- cancelling


async def test_a_cancelled_generate_leaves_its_task_in_its_place(gateway: Emulator) -> None:
    """Cancelling cancels the wait: the task is polled to its end and keeps its place until then."""
    async with FluxSession(
        gateway.api_key, base_url=gateway.url, max_in_flight=1, schedule=FixedSchedule(1.0)
    ) as session:
        started = anyio.current_time()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(2):
                await session.generate("a cat")
        await session.submit("a dog")

        assert anyio.current_time() - started >= 8
        assert session.stats.completed == 1


@pytest.mark.parametrize("verb", ["generate", "submit"])
async def test_a_call_on_the_wire_is_finished_in_the_background(scripted: ScriptedGateway, verb: str) -> None:
    """Cancelled during the POST, the answer is still read, so that the id isn't lost, and the task is followed."""
    scripted.submits = deque([answer(200, {"id": "t1"}, after=3.0)])
    async with session_on(scripted) as session:
        with anyio.move_on_after(1):
            await getattr(session, verb)("a cat")
        stats_then = session.stats
        await anyio.sleep(10)

        assert (stats_then.submitted, session.stats.submitted, session.stats.completed) == (0, 1, 1)
    assert len(scripted.of("POST")) == 1


async def test_a_cancelled_submit_is_not_sent_again(scripted: ScriptedGateway) -> None:
    """Cancelled between two tries, nothing more is sent, and the place is free again."""
    scripted.submits = deque([answer(429, b"", [("Retry-After", "20")]), answer(200, {"id": "t1"})])
    async with session_on(scripted, max_in_flight=1) as session:
        with anyio.move_on_after(5):
            await session.generate("a cat")
        await anyio.sleep(100)
        posts = len(scripted.of("POST"))
        await session.generate("a dog")

    assert posts == 1


async def test_a_refusal_after_the_caller_left_is_not_repeated(scripted: ScriptedGateway) -> None:
    """Cancelled during a POST that is then refused, nobody wants it any more: it isn't sent again."""
    scripted.submits = deque([answer(429, b"", after=3.0), answer(200, {"id": "t1"})])
    async with session_on(scripted) as session:
        with anyio.move_on_after(1):
            await session.generate("a cat")
        await anyio.sleep(100)

    assert len(scripted.of("POST")) == 1


@pytest.mark.parametrize("moment", [0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.5, 7.0])
async def test_cancelling_at_any_moment_loses_nothing(scripted: ScriptedGateway, moment: float) -> None:
    """Wherever a generate is cancelled, what was accepted is followed to its end, and the session stays usable."""
    scripted.submits = deque([answer(503, b"", after=1.0), answer(200, {"id": "t1"}, after=1.0)])
    scripted.polls = deque([answer(200, running(), after=0.7), answer(200, completed(), after=0.7)])
    async with session_on(scripted, max_in_flight=1) as session:
        with anyio.move_on_after(moment):
            await session.generate("a cat")
        await anyio.sleep(30)
        stats = session.stats
        await session.generate("a dog")

        assert session.stats.in_flight == 0
    assert stats.submitted == stats.completed
    assert stats.submitted + stats.failed <= 1


# ---------------------------------------------------------------------- lifetime


async def test_closing_is_quick_and_names_what_is_unfinished(
    gateway: Emulator, caplog: pytest.LogCaptureFixture
) -> None:
    """Closing ends every wait with SessionClosedError at once, and one line names the tasks."""
    session = FluxSession(gateway.api_key, base_url=gateway.url, max_in_flight=2)
    async with session:
        first, second = await session.submit("a cat"), await session.submit("a dog")
        waits = [asyncio.ensure_future(first.outcome()), asyncio.ensure_future(session.generate("no place for me"))]
        await anyio.sleep(1)
        started = anyio.current_time()
    outcome, refused = await asyncio.gather(*waits, return_exceptions=True)

    assert anyio.current_time() - started < 0.1
    assert isinstance(outcome, Failed)
    assert isinstance(outcome.error, SessionClosedError)
    assert outcome.task_id == first.id
    assert isinstance(refused, SessionClosedError)
    (line,) = [record.message for record in caplog.records if record.message.startswith("session closed")]
    assert first.id in line
    assert second.id in line
    assert gateway.calls["submit"] == 2


async def test_closing_waits_a_moment_for_an_id(scripted: ScriptedGateway, caplog: pytest.LogCaptureFixture) -> None:
    """A submit that is answered a second after the session began to close is named in the log."""
    scripted.submits = deque([answer(200, {"id": "late-one"}, after=1.0)])
    session = session_on(scripted)
    async with session:
        wait = asyncio.ensure_future(session.generate("a cat"))
        await anyio.sleep(0.5)
    with pytest.raises(SessionClosedError, match="late-one"):
        await wait

    assert "session closed; unfinished tasks: late-one" in caplog.text


async def test_closing_does_not_wait_for_ever(scripted: ScriptedGateway, caplog: pytest.LogCaptureFixture) -> None:
    """A submit that is never answered holds up closing for two seconds at most, and is said to be uncertain."""
    scripted.submits = deque([hang])
    session = session_on(scripted)
    async with session:
        wait = asyncio.ensure_future(session.generate("a cat"))
        await anyio.sleep(0.5)
        started = anyio.current_time()
    with pytest.raises(SessionClosedError, match="may exist"):
        await wait

    assert anyio.current_time() - started <= 2.1
    assert "a submit without an answer" in caplog.text


async def test_a_closed_session_says_so(gateway: Emulator) -> None:
    """Before it is entered and after it is closed, a session refuses to work, and closing it again does no harm."""
    session = FluxSession(gateway.api_key, base_url=gateway.url)
    with pytest.raises(SessionClosedError):
        await session.generate("a cat")
    async with session:
        stream = session.stream(["a cat"])
    await session.aclose()

    with pytest.raises(SessionClosedError):
        await session.submit("a cat")
    with pytest.raises(SessionClosedError):
        session.attach("t1")
    with pytest.raises(SessionClosedError):
        await session.fetch("t1")
    with pytest.raises(SessionClosedError):
        await anext(stream)


async def test_a_session_is_entered_once_at_a_time(session: FluxSession) -> None:
    """Entering a session that is open already is a mistake that is named."""
    with pytest.raises(SessionClosedError, match="open already"):
        await session.__aenter__()

    assert (await session.generate("still works")).ok


async def test_a_session_may_be_entered_and_left_in_different_tasks(gateway: Emulator) -> None:
    """Fixtures and lifespans enter in one asyncio task and leave in another."""
    session = FluxSession(gateway.api_key, base_url=gateway.url)
    await asyncio.create_task(session.__aenter__())
    outcome = await asyncio.create_task(session.generate("a cat"))
    await asyncio.create_task(session.__aexit__(None, None, None))

    assert outcome.ok


async def test_the_callers_own_errors_pass_unwrapped(gateway: Emulator) -> None:
    """An error raised inside the session comes out as itself, not in an exception group."""
    with pytest.raises(KeyError, match="mine"):
        async with FluxSession(gateway.api_key, base_url=gateway.url) as session:
            await session.submit("a cat")
            raise KeyError("mine")


async def test_closing_leaves_nothing_behind(gateway: Emulator) -> None:
    """After closing, no asyncio task of ours is left, whatever was going on."""
    before = asyncio.all_tasks()
    async with FluxSession(gateway.api_key, base_url=gateway.url, max_in_flight=2) as session:
        stream = session.stream(f"a cat {n}" for n in range(9))
        await anext(stream)
        await session.submit("a dog")
    await anyio.lowlevel.checkpoint()

    assert {task for task in asyncio.all_tasks() - before if "flux2max_async" in repr(task.get_coro())} == set()


@pytest.mark.parametrize("loop_factory", [None, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def test_one_session_serves_two_event_loops_one_after_the_other(loop_factory: Any) -> None:
    """A session that was closed can be entered again, on another event loop, also uvloop's; its counts go on."""
    with Emulator(seconds=0.05, spread=0.0, pictures=False) as gateway:
        session = FluxSession(gateway.api_key, base_url=gateway.url, schedule=FixedSchedule(0.05))

        async def main() -> Completed:
            async with session:
                return await session.generate("a cat")

        for _ in range(2):
            with asyncio.Runner(loop_factory=loop_factory) as runner:
                assert runner.run(main()).ok

        assert session.stats.completed == 2


def test_a_session_survives_a_loop_that_was_torn_down() -> None:
    """A session whose event loop ended without closing it can be entered on the next one."""
    with Emulator(seconds=0.05, spread=0.0, pictures=False) as gateway:
        session = FluxSession(gateway.api_key, base_url=gateway.url, schedule=FixedSchedule(0.05))

        async def torn() -> None:
            await session.__aenter__()
            await session._transport.close()

        async def main() -> Completed:
            async with session:
                return await session.generate("a cat")

        asyncio.run(torn())

        assert asyncio.run(main()).ok


async def test_a_borrowed_session_that_was_closed_is_said_to_be(scripted: ScriptedGateway) -> None:
    """A borrowed aiohttp session that somebody closed is a SessionClosedError, and nothing is sent."""
    http = aiohttp.ClientSession()
    async with session_on(scripted, http_session=http) as session:
        await http.close()
        with pytest.raises(SessionClosedError):
            await session.generate("a cat")

    assert scripted.received == []


@pytest.mark.parametrize(
    ("options", "named"),
    [
        pytest.param({"max_in_flight": 0}, "max_in_flight", id="no places"),
        pytest.param({"task_timeout": 0}, "task_timeout", id="no time"),
        pytest.param({"http_timeout": -1}, "http_timeout", id="less than no time"),
        pytest.param({"base_url": "http://example.com"}, "https", id="plain http"),
    ],
)
def test_a_senseless_session_is_never_made(options: dict[str, Any], named: str) -> None:
    """Wrong settings are a ConfigurationError that names them, when the session is made."""
    with pytest.raises(ConfigurationError, match=named):
        FluxSession("key", **options)


# ---------------------------------------------------------------------- logging and secrets


async def test_one_line_per_task(session: FluxSession, caplog: pytest.LogCaptureFixture) -> None:
    """At INFO there is one line for each task when it ends, with its id, seconds and polls."""
    good = await session.submit("a cat")
    bad = await session.submit("a dog [fail]")
    await asyncio.gather(good.outcome(), bad.outcome())
    lines = [record.message for record in caplog.records if record.levelno == logging.INFO]

    assert sorted(line.split(" after ")[0] for line in lines) == sorted(
        [f"task {good.id} completed", f"task {bad.id} failed"]
    )
    assert all("polls" in line for line in lines)


async def test_secrets_are_never_shown(scripted: ScriptedGateway, caplog: pytest.LogCaptureFixture) -> None:
    """Neither the key nor a webhook secret is in any log line, error, repr or stats, even when the service echoes it."""
    secret = "s3cret-of-the-hook"
    echo = {"error": {"code": "x", "message": f"wrong: {scripted.api_key} and {secret}"}}
    scripted.submits = deque([answer(400, echo), hang, answer(200, {"id": "t1"})])
    scripted.polls = deque([answer(500, echo), answer(401, {"message": f"bad key {scripted.api_key}"})])
    shown = []
    async with session_on(scripted) as session:
        for _ in range(3):
            task = None
            try:
                task = await session.submit("a cat", webhook_url="https://app.example/hook", webhook_secret=secret)
                shown.append(repr(await task.outcome()))
                await task
            except Exception as error:
                while error is not None:
                    shown.append(f"{error!r} {error} {vars(error)}")
                    error = error.__cause__ or error.__context__  # type: ignore[assignment]
            shown += [repr(task), repr(task and task.request)]
        shown += [repr(session), repr(session.stats), repr(vars(session).keys())]
    text = "\n".join([*shown, caplog.text])

    assert "***" in text
    assert scripted.api_key not in text
    assert secret not in text


async def test_a_real_clock_works_too() -> None:
    """The fixture's virtual time is no condition: the same works against the wall clock, in a thread's gateway."""
    with Emulator(seconds=0.2, spread=0.0, pictures=False) as gateway:

        async def main() -> Completed:
            async with FluxSession(gateway.api_key, base_url=gateway.url, schedule=FixedSchedule(0.1)) as session:
                return await session.generate("a cat")

        started = time.monotonic()
        outcome = await anyio.to_thread.run_sync(asyncio.run, main())

    assert outcome.ok
    assert time.monotonic() - started >= 0.2
    gc.collect()


# ---------------------------------------------------------------------- hard exits


async def test_closing_under_a_cancelled_scope_still_waits_for_an_id(
    scripted: ScriptedGateway, caplog: pytest.LogCaptureFixture
) -> None:
    """A session that is left because an anyio scope was cancelled gives a submit on the wire its moment, too."""
    scripted.submits = deque([answer(200, {"id": "paid-1"}, after=1.5)])
    with anyio.move_on_after(1):
        async with session_on(scripted) as session:
            await session.generate("a cat")

    assert "session closed; unfinished tasks: paid-1" in caplog.text


@pytest.mark.parametrize("steps", range(8))
async def test_a_cancelled_close_still_names_the_unfinished(
    scripted: ScriptedGateway, caplog: pytest.LogCaptureFixture, steps: int
) -> None:
    """However soon closing is cancelled itself, the ids of paid tasks are in the log, and a second close ends it."""
    scripted.polls = deque([answer(200, running())])
    session = session_on(scripted)
    await session.__aenter__()
    await session.submit("a cat")
    closing = asyncio.ensure_future(session.aclose())
    for _ in range(steps):
        await asyncio.sleep(0)
    closing.cancel()
    await asyncio.wait([closing])
    await session.aclose()

    assert "session closed; unfinished tasks: t1" in caplog.text


async def test_closing_twice_at_once_waits_for_the_same_end(scripted: ScriptedGateway) -> None:
    """A second close waits for the first, and between them the session refuses work and can't be entered."""
    scripted.submits = deque([hang])
    session = session_on(scripted)
    await session.__aenter__()
    wait = asyncio.ensure_future(session.generate("a cat"))
    await anyio.sleep(1)
    first, second = asyncio.ensure_future(session.aclose()), asyncio.ensure_future(session.aclose())
    await anyio.sleep(1)
    with pytest.raises(SessionClosedError, match="open already"):
        await session.__aenter__()
    with pytest.raises(SessionClosedError):
        await session.generate("a dog")
    done_early = second.done()
    await asyncio.gather(first, second)
    with pytest.raises(SessionClosedError):
        await wait
    async with session:
        pass

    assert not done_early


@pytest.mark.parametrize("task_timeout", [20.0, None])
async def test_closing_ends_saves_and_fetches(
    scripted: ScriptedGateway, tmp_path: Path, task_timeout: float | None
) -> None:
    """A download or a look that is under way when the session is closed ends at once, and leaves no file."""
    scripted.polls = deque([hang])
    scripted.downloads = deque([raw(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nabc", then="hang")])
    image = GeneratedImage(f"{scripted.url}/0.jpeg", "image", "t1")
    async with session_on(scripted, task_timeout=task_timeout) as session:
        waits = [
            asyncio.ensure_future(session.save(image, tmp_path / "a.jpeg")),
            asyncio.ensure_future(session.fetch("t1")),
        ]
        await anyio.sleep(1)
        started = anyio.current_time()
    results = await asyncio.gather(*waits, return_exceptions=True)

    assert anyio.current_time() - started < 0.1
    assert [type(result) for result in results] == [SessionClosedError, SessionClosedError]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("behaviour", [answer(401, b""), answer(302, b""), answer(404, b"")], ids=["401", "302", "404"])
async def test_every_error_about_a_paid_task_names_it(scripted: ScriptedGateway, behaviour: Any) -> None:
    """Whatever ends the polling of a task, the error that generate() raises knows the task's id."""
    scripted.polls = deque([behaviour])
    async with session_on(scripted) as session:
        with pytest.raises(FluxError) as caught:
            await session.generate("a cat")

    assert caught.value.task_id == "t1"


async def test_failed_outcomes_hold_no_bodies(scripted: ScriptedGateway) -> None:
    """Keeping the outcomes of a batch doesn't keep the pictures that were sent with it."""
    scripted.submits = deque([answer(429, b""), answer(400, b"")])
    data = b"\x89PNG\r\n\x1a\n" + bytes(1_000_000)
    async with session_on(scripted) as session:
        task = asyncio.ensure_future(session.generate("a cat", input_images=[data]))
        await asyncio.wait([task])
        error = task.exception()
        gc.collect()
        calls = [thing for thing in gc.get_objects() if isinstance(thing, HttpRequest) and thing.method == "POST"]

    assert isinstance(error, FluxError)
    assert calls == []


async def test_an_attached_task_of_a_lost_loop_is_not_counted_for_ever(scripted: ScriptedGateway) -> None:
    """Entering a session anew counts what is in flight from nothing."""
    session = session_on(scripted)
    async with session:
        session._stats.in_flight = 7
    async with session:
        assert session.stats.in_flight == 0


def test_closing_after_the_loop_has_gone_is_no_error() -> None:
    """A session whose event loop was closed under it can be closed on another one."""
    session = FluxSession("key", base_url="http://127.0.0.1:1")
    loop = asyncio.new_event_loop()
    loop.run_until_complete(session.__aenter__())
    loop.run_until_complete(session._transport.close())
    loop.close()
    asyncio.run(session.aclose())

    with pytest.raises(SessionClosedError):
        session.attach("t1")


@pytest.mark.parametrize("steps", range(10))
async def test_a_request_withdrawn_in_its_first_moments_is_never_half_there(
    scripted: ScriptedGateway, steps: int
) -> None:
    """Cancelled within the first steps of the event loop, a request is either not sent, or sent and followed."""
    async with session_on(scripted) as session:
        call = asyncio.ensure_future(session.generate("a cat"))
        for _ in range(steps):
            await asyncio.sleep(0)
        call.cancel()
        await asyncio.wait([call])
        await anyio.sleep(10)
        stats = session.stats

    assert len(scripted.of("POST")) == stats.submitted == stats.completed
    assert stats.in_flight == 0


async def test_who_asks_after_the_end_is_told_at_once(session: FluxSession) -> None:
    """A listener that comes when the task has ended hears the outcome all the same."""
    task = await session.submit("a cat")
    outcome = await task.outcome()
    heard: list[object] = []
    task._poller.when_ended(lambda _, told: heard.append(told))

    assert heard == [outcome]
