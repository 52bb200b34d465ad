"""The session: its lifetime, its slots, waiting, and cancellation."""

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
from support.responses import picture
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
    Outcome,
    SessionClosedError,
    TaskStatus,
)
from flux2max_async._api.codec import HttpRequest
from flux2max_async._tasks.runner import TaskRunner
from flux2max_async.emulator import Emulator


async def test_task_is_awaited_many_times(session: FluxSession, gateway: Emulator) -> None:
    """A task can be awaited many times, and cancelling one wait doesn't affect the others."""
    task = await session.submit("a cat")
    cancelled_wait = asyncio.ensure_future(task.outcome())
    await anyio.sleep(1)
    cancelled_wait.cancel()
    outcomes = await asyncio.gather(task, task.outcome(), task)

    assert cancelled_wait.cancelled()
    assert outcomes[0] is outcomes[1] is outcomes[2] is await task
    assert gateway.accepted["a cat"] == 1


async def test_updates(scripted: ScriptedGateway) -> None:
    """updates() yields the newest snapshot, then each new status or progress, and ends with the task."""
    progress = [0.1, 0.1, 0.4, 0.4, 0.4]
    scripted.polls = deque([*(answer(200, running(progress=p)) for p in progress), answer(200, completed())])
    async with session_on(scripted) as session:
        task = await session.submit("a cat")
        await anyio.sleep(2.5)
        seen = [snapshot async for snapshot in task.updates()]
        after_the_end = [snapshot.status async for snapshot in task.updates()]

    assert [snapshot.progress for snapshot in seen] == [0.1, 0.4, 1.0]
    assert after_the_end == [TaskStatus.COMPLETED]


async def test_updates_of_a_timed_out_task(scripted: ScriptedGateway) -> None:
    """Updates end with a task that ends without a final snapshot."""
    scripted.polls = deque([answer(200, running())])
    async with session_on(scripted, task_timeout=5.0) as session:
        task = await session.submit("a cat")
        seen = [snapshot.status async for snapshot in task.updates()]

    assert seen == [TaskStatus.IN_PROGRESS]


async def test_handle_repr(session: FluxSession) -> None:
    """A handle shows its id, request and newest snapshot."""
    task = await session.submit("a cat", seed=3)

    assert task.request == GenerationRequest("a cat", seed=3)
    assert task.snapshot is not None
    assert task.snapshot.status is TaskStatus.PENDING
    assert repr(task) == f"<GenerationTask {task.id!r} pending>"
    assert repr(session.attach("t7")) == "<GenerationTask 't7' not polled yet>"


async def test_params_override_a_request(session: FluxSession) -> None:
    """Parameters in addition to a request change a copy of it."""
    task = await session.submit(GenerationRequest("a cat", seed=3, width=64), seed=4)

    assert task.request == GenerationRequest("a cat", seed=4, width=64)


@pytest.mark.parametrize(
    ("bad", "field"), [(7, "request"), ("", "prompt"), (None, "request"), (b"a cat", "request")], ids=repr
)
async def test_invalid_request_is_not_sent(session: FluxSession, gateway: Emulator, bad: Any, field: str) -> None:
    """An invalid request raises before anything is sent, and takes no slot."""
    with pytest.raises(InvalidRequestError) as caught:
        await session.generate(bad)

    assert caught.value.field == field
    assert not gateway.calls


@pytest.mark.parametrize("task_id", ["", None, 5])
async def test_invalid_task_id(session: FluxSession, task_id: Any) -> None:
    """attach() and fetch() refuse invalid ids."""
    with pytest.raises(InvalidRequestError, match="task_id"):
        session.attach(task_id)
    with pytest.raises(InvalidRequestError, match="task_id"):
        await session.fetch(task_id)


# ---------------------------------------------------------------------- slots


async def test_slots_limit_tasks_in_flight(gateway: Emulator) -> None:
    """No more tasks than slots are running, whether or not they are awaited."""
    async with FluxSession(
        gateway.api_key, base_url=gateway.url, max_in_flight=3, schedule=FixedSchedule(0.5)
    ) as session:
        most_running = 0
        tasks = []
        for _ in range(9):
            tasks.append(await session.submit("a cat"))
            most_running = max(most_running, sum(task.ends > anyio.current_time() for task in gateway.tasks.values()))
        await asyncio.gather(*tasks)

        assert session.stats.in_flight == 0
    assert most_running == 3


async def test_cancelled_while_waiting_for_a_slot(gateway: Emulator) -> None:
    """A call that is cancelled while it waits for a slot sends nothing and holds no slot."""
    async with FluxSession(gateway.api_key, base_url=gateway.url, max_in_flight=1) as session:
        first = await session.submit("a cat")
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(2):
                await session.generate("a dog")
        await first
        await session.generate("a bird")

    assert gateway.accepted == {"a cat": 1, "a bird": 1}


async def test_stats(gateway: Emulator) -> None:
    """Stats count submits, ends, polls and dollars, and are a copy."""
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
    assert stats.polls == gateway.calls["poll"] - polls_of(gateway, running_task.id)
    assert stats.spent == Decimal("0.10")


def polls_of(gateway: Emulator, task_id: str) -> int:
    return gateway.tasks[task_id].polls


# ---------------------------------------------------------------------- cancellation


async def test_cancelled_generate_keeps_its_slot(gateway: Emulator) -> None:
    """After generate() is cancelled, its task is polled to its end and holds its slot until then."""
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


@pytest.mark.parametrize("method", ["generate", "submit"])
async def test_submit_in_flight_is_finished_in_the_background(scripted: ScriptedGateway, method: str) -> None:
    """If a call is cancelled during its POST, the response is still read and the task is polled."""
    scripted.submits = deque([answer(200, {"id": "t1"}, after=3.0)])
    async with session_on(scripted) as session:
        with anyio.move_on_after(1):
            await getattr(session, method)("a cat")
        stats_when_cancelled = session.stats
        await anyio.sleep(10)

        assert (stats_when_cancelled.submitted, session.stats.submitted, session.stats.completed) == (0, 1, 1)
    assert len(scripted.of("POST")) == 1


async def test_cancelled_between_attempts(scripted: ScriptedGateway) -> None:
    """A submit that is cancelled between two attempts is not sent again, and releases its slot."""
    scripted.submits = deque([answer(429, b"", [("Retry-After", "20")]), answer(200, {"id": "t1"})])
    async with session_on(scripted, max_in_flight=1) as session:
        with anyio.move_on_after(5):
            await session.generate("a cat")
        await anyio.sleep(100)
        posts = len(scripted.of("POST"))
        await session.generate("a dog")

    assert posts == 1


async def test_refused_after_cancellation(scripted: ScriptedGateway) -> None:
    """A POST that is refused after its call was cancelled is not sent again."""
    scripted.submits = deque([answer(429, b"", after=3.0), answer(200, {"id": "t1"})])
    async with session_on(scripted) as session:
        with anyio.move_on_after(1):
            await session.generate("a cat")
        await anyio.sleep(100)

    assert len(scripted.of("POST")) == 1


@pytest.mark.parametrize("moment", [0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.5, 7.0])
async def test_cancelled_at_any_moment(scripted: ScriptedGateway, moment: float) -> None:
    """Whenever generate() is cancelled, an accepted task is polled to its end and the session stays usable."""
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


async def test_closing_with_unfinished_tasks(gateway: Emulator, caplog: pytest.LogCaptureFixture) -> None:
    """Closing ends every wait with SessionClosedError at once, and logs the unfinished ids in one line."""
    session = FluxSession(gateway.api_key, base_url=gateway.url, max_in_flight=2)
    async with session:
        first, second = await session.submit("a cat"), await session.submit("a dog")
        calls = [asyncio.ensure_future(first.outcome()), asyncio.ensure_future(session.generate("waits for a slot"))]
        await anyio.sleep(1)
        started = anyio.current_time()
    outcome, refused = await asyncio.gather(*calls, return_exceptions=True)

    assert anyio.current_time() - started < 0.1
    assert isinstance(outcome, Failed)
    assert isinstance(outcome.error, SessionClosedError)
    assert outcome.task_id == first.id
    assert isinstance(refused, SessionClosedError)
    (line,) = [record.message for record in caplog.records if record.message.startswith("session closed")]
    assert first.id in line
    assert second.id in line
    assert gateway.calls["submit"] == 2


async def test_closing_waits_for_a_submit_in_flight(
    scripted: ScriptedGateway, caplog: pytest.LogCaptureFixture
) -> None:
    """A submit that is answered within a second of closing is logged with its id."""
    scripted.submits = deque([answer(200, {"id": "late-1"}, after=1.0)])
    session = session_on(scripted)
    async with session:
        wait = asyncio.ensure_future(session.generate("a cat"))
        await anyio.sleep(0.5)
    with pytest.raises(SessionClosedError, match="late-1"):
        await wait

    assert "session closed; unfinished tasks: late-1" in caplog.text


async def test_closing_with_a_hanging_submit(scripted: ScriptedGateway, caplog: pytest.LogCaptureFixture) -> None:
    """A submit that is never answered delays closing by at most two seconds, and is logged as uncertain."""
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


async def test_closed_session(gateway: Emulator) -> None:
    """A session refuses to work before it is entered and after it is closed; closing it twice is harmless."""
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


async def test_session_is_entered_twice(session: FluxSession) -> None:
    """Entering an open session raises SessionClosedError."""
    with pytest.raises(SessionClosedError, match="open already"):
        await session.__aenter__()

    assert (await session.generate("still works")).ok


async def test_entered_and_closed_in_different_tasks(gateway: Emulator) -> None:
    """A session may be entered in one asyncio task and closed in another, as fixtures and lifespans do."""
    session = FluxSession(gateway.api_key, base_url=gateway.url)
    await asyncio.create_task(session.__aenter__())
    outcome = await asyncio.create_task(session.generate("a cat"))
    await asyncio.create_task(session.__aexit__(None, None, None))

    assert outcome.ok


async def test_errors_of_the_caller_are_not_wrapped(gateway: Emulator) -> None:
    """An error raised inside the session is not wrapped in an exception group."""
    with pytest.raises(KeyError, match="mine"):
        async with FluxSession(gateway.api_key, base_url=gateway.url) as session:
            await session.submit("a cat")
            raise KeyError("mine")


async def test_closing_leaves_no_asyncio_tasks(gateway: Emulator) -> None:
    """After closing, none of the library's asyncio tasks is left."""
    before = asyncio.all_tasks()
    async with FluxSession(gateway.api_key, base_url=gateway.url, max_in_flight=2) as session:
        stream = session.stream(f"a cat {n}" for n in range(9))
        await anext(stream)
        await session.submit("a dog")
    await anyio.lowlevel.checkpoint()

    assert {task for task in asyncio.all_tasks() - before if "flux2max_async" in repr(task.get_coro())} == set()


@pytest.mark.parametrize("loop_factory", [None, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def test_session_on_two_event_loops(loop_factory: Any) -> None:
    """A closed session can be entered on another event loop, including uvloop's; its counts continue."""
    with Emulator(seconds=0.05, spread=0.0, pictures=False) as gateway:
        session = FluxSession(gateway.api_key, base_url=gateway.url, schedule=FixedSchedule(0.05))

        async def main() -> Completed:
            async with session:
                return await session.generate("a cat")

        for _ in range(2):
            with asyncio.Runner(loop_factory=loop_factory) as runner:
                assert runner.run(main()).ok

        assert session.stats.completed == 2


def test_session_after_its_loop_ended() -> None:
    """A session whose event loop ended without closing it can be entered on the next one."""
    with Emulator(seconds=0.05, spread=0.0, pictures=False) as gateway:
        session = FluxSession(gateway.api_key, base_url=gateway.url, schedule=FixedSchedule(0.05))

        async def enter_only() -> None:
            await session.__aenter__()
            await session._parts.transport.close()

        async def main() -> Completed:
            async with session:
                return await session.generate("a cat")

        asyncio.run(enter_only())

        assert asyncio.run(main()).ok


async def test_closed_http_session(scripted: ScriptedGateway) -> None:
    """A borrowed aiohttp session that is closed raises SessionClosedError, and nothing is sent."""
    http = aiohttp.ClientSession()
    async with session_on(scripted, http_session=http) as session:
        await http.close()
        with pytest.raises(SessionClosedError):
            await session.generate("a cat")

    assert scripted.received == []


@pytest.mark.parametrize(
    ("options", "named"),
    [
        pytest.param({"max_in_flight": 0}, "max_in_flight", id="no slots"),
        pytest.param({"task_timeout": 0}, "task_timeout", id="no time"),
        pytest.param({"http_timeout": -1}, "http_timeout", id="negative time"),
        pytest.param({"base_url": "http://example.com"}, "https", id="plain http"),
    ],
)
def test_invalid_settings(options: dict[str, Any], named: str) -> None:
    """Invalid settings are a ConfigurationError that names them, when the session is created."""
    with pytest.raises(ConfigurationError, match=named):
        FluxSession("key", **options)


# ---------------------------------------------------------------------- logging and secrets


async def test_one_log_line_per_task(session: FluxSession, caplog: pytest.LogCaptureFixture) -> None:
    """At INFO, there is one line for each task when it ends, with its id, seconds and polls."""
    good = await session.submit("a cat")
    bad = await session.submit("a dog [fail]")
    await asyncio.gather(good.outcome(), bad.outcome())
    lines = [record.message for record in caplog.records if record.levelno == logging.INFO]

    assert sorted(line.split(" after ")[0] for line in lines) == sorted(
        [f"task {good.id} completed", f"task {bad.id} failed"]
    )
    assert all("polls" in line for line in lines)


async def test_secrets_are_masked(scripted: ScriptedGateway, caplog: pytest.LogCaptureFixture) -> None:
    """Neither the key nor a webhook secret is in any log, error, repr or stats, even if the service echoes it."""
    secret = "s3cret-of-the-hook"
    echo = {"error": {"code": "x", "message": f"wrong: {scripted.api_key} and {secret}"}}
    scripted.submits = deque([answer(400, echo), hang, answer(200, {"id": "t1"})])
    scripted.polls = deque([answer(500, echo), answer(401, {"message": f"bad key {scripted.api_key}"})])
    texts = []
    async with session_on(scripted) as session:
        for _ in range(3):
            task = None
            try:
                task = await session.submit("a cat", webhook_url="https://app.example/hook", webhook_secret=secret)
                texts.append(repr(await task.outcome()))
                await task
            except Exception as error:
                while error is not None:
                    texts.append(f"{error!r} {error} {vars(error)}")
                    error = error.__cause__ or error.__context__  # type: ignore[assignment]
            texts += [repr(task), repr(task and task.request)]
        texts += [repr(session), repr(session.stats), repr(vars(session).keys())]
    text = "\n".join([*texts, caplog.text])

    assert "***" in text
    assert scripted.api_key not in text
    assert secret not in text


async def test_real_time() -> None:
    """The session works in real time, with a gateway in another thread."""
    with Emulator(seconds=0.2, spread=0.0, pictures=False) as gateway:

        async def main() -> Completed:
            async with FluxSession(gateway.api_key, base_url=gateway.url, schedule=FixedSchedule(0.1)) as session:
                return await session.generate("a cat")

        started = time.monotonic()
        outcome = await anyio.to_thread.run_sync(asyncio.run, main())

    assert outcome.ok
    assert time.monotonic() - started >= 0.2
    gc.collect()


# ---------------------------------------------------------------------- closing under adverse conditions


async def test_closing_in_a_cancelled_scope_waits_for_a_submit(
    scripted: ScriptedGateway, caplog: pytest.LogCaptureFixture
) -> None:
    """A session closed by a cancelled anyio scope waits for a submit in flight as well."""
    scripted.submits = deque([answer(200, {"id": "paid-1"}, after=1.5)])
    with anyio.move_on_after(1):
        async with session_on(scripted) as session:
            await session.generate("a cat")

    assert "session closed; unfinished tasks: paid-1" in caplog.text


@pytest.mark.parametrize("steps", range(8))
async def test_cancelled_close_logs_unfinished_tasks(
    scripted: ScriptedGateway, caplog: pytest.LogCaptureFixture, steps: int
) -> None:
    """If closing is cancelled, the ids of paid tasks are still logged, and a second close completes it."""
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


async def test_concurrent_closes(scripted: ScriptedGateway) -> None:
    """A second close waits for the first; meanwhile, the session refuses work and can't be entered."""
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
async def test_closing_interrupts_saves_and_fetches(
    scripted: ScriptedGateway, tmp_path: Path, task_timeout: float | None
) -> None:
    """A download or fetch in progress ends at once when the session is closed, and leaves no file."""
    scripted.polls = deque([hang])
    scripted.downloads = deque([raw(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nabc", then="hang")])
    image = GeneratedImage(url=f"{scripted.url}/0.jpeg", type="image", task_id="t1")
    async with session_on(scripted, task_timeout=task_timeout) as session:
        calls = [
            asyncio.ensure_future(session.save(image, tmp_path / "a.jpeg")),
            asyncio.ensure_future(session.fetch("t1")),
        ]
        await anyio.sleep(1)
        started = anyio.current_time()
    results = await asyncio.gather(*calls, return_exceptions=True)

    assert anyio.current_time() - started < 0.1
    assert [type(result) for result in results] == [SessionClosedError, SessionClosedError]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "behaviour",
    [answer(401, {"message": "no"}), answer(302, b""), answer(404, {"message": "no"}), answer(403, b"<html></html>")],
    ids=["401", "302", "404", "firewall"],
)
async def test_polling_errors_have_the_task_id(scripted: ScriptedGateway, behaviour: Any) -> None:
    """Any error that ends the polling of a task has its id."""
    scripted.polls = deque([behaviour])
    async with session_on(scripted) as session:
        with pytest.raises(FluxError) as caught:
            await session.generate("a cat")

    assert caught.value.task_id == "t1"


async def test_failed_outcomes_hold_no_request_bodies(scripted: ScriptedGateway) -> None:
    """Failed outcomes keep no reference to the encoded input images."""
    scripted.submits = deque([answer(429, b""), answer(400, b"")])
    data = b"\x89PNG\r\n\x1a\n" + bytes(1_000_000)
    async with session_on(scripted) as session:
        task = asyncio.ensure_future(session.generate("a cat", input_images=[data]))
        await asyncio.wait([task])
        error = task.exception()
        gc.collect()
        http_requests = [item for item in gc.get_objects() if isinstance(item, HttpRequest) and item.method == "POST"]

    assert isinstance(error, FluxError)
    assert http_requests == []


async def test_in_flight_is_reset_on_enter(scripted: ScriptedGateway) -> None:
    """Entering a session resets the number of tasks in flight."""
    session = session_on(scripted)
    async with session:
        session._parts.stats.in_flight = 7
    async with session:
        assert session.stats.in_flight == 0


def test_closing_on_another_loop() -> None:
    """A session whose event loop was closed can be closed on another one."""
    session = FluxSession("key", base_url="http://127.0.0.1:1")
    loop = asyncio.new_event_loop()
    loop.run_until_complete(session.__aenter__())
    loop.run_until_complete(session._parts.transport.close())
    loop.close()
    asyncio.run(session.aclose())

    with pytest.raises(SessionClosedError):
        session.attach("t1")


@pytest.mark.parametrize("steps", range(10))
async def test_cancelled_within_the_first_steps(scripted: ScriptedGateway, steps: int) -> None:
    """A request that is cancelled within the first steps of the event loop is not sent, or sent and polled."""
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


async def test_an_observer_after_the_end_is_called_at_once(session: FluxSession) -> None:
    """An observer that is added when the task has ended receives the outcome all the same."""
    task = await session.submit("a cat")
    outcome = await task.outcome()
    observer = _Observer()
    task._runner.add_observer(observer)

    assert observer.outcomes == [outcome]


class _Observer:
    def __init__(self) -> None:
        self.outcomes: list[Outcome] = []

    def on_waiting_elsewhere(self, *, waiting: bool) -> None:
        raise AssertionError

    def on_ended(self, runner: TaskRunner, outcome: Outcome) -> None:
        self.outcomes.append(outcome)


async def test_further_headers(scripted: ScriptedGateway) -> None:
    """They are sent with submits and polls, in place of the session's own, and never with downloads."""
    scripted.polls = deque([answer(200, completed("t1", f"{scripted.url}/0.jpeg"))])
    scripted.downloads = deque([answer(200, picture())])
    async with session_on(scripted, headers={"X-Team": "art", "user-agent": "mine/1"}) as session:
        outcome = await session.generate("a cat")
        await session.read(outcome.images[0])
    *calls, download = [
        {name.lower(): value for name, value in request.headers.items()} for request in scripted.received
    ]

    assert len(calls) == 2
    for headers in calls:
        assert (headers["x-team"], headers["user-agent"]) == ("art", "mine/1")
        assert headers["authorization"] == f"Bearer {scripted.api_key}"
    assert "x-team" not in download
    assert download["user-agent"].startswith("flux2max_async/")
