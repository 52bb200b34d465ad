"""enqueue(), and the bound of the queue."""

import asyncio
import pickle
from collections import deque
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import anyio
import pytest
from support.responses import picture
from support.scripted import ScriptedGateway, answer, completed, hang, running, session_on
from support.virtual_time import VirtualJournal, VirtualTimeLoop

from flux2max_async import (
    BadRequestError,
    Completed,
    ConfigurationError,
    DeadlineExceededError,
    Failed,
    FixedSchedule,
    FluxSession,
    GenerationRequest,
    InvalidRequestError,
    LearnedSchedule,
    QueuedGeneration,
    QueueFullError,
    SessionClosedError,
)
from flux2max_async._tasks.intake import CallOptions
from flux2max_async.emulator import Emulator
from flux2max_async.journal._lookup import ReusePolicy


def opened(gateway: Emulator, **options: Any) -> FluxSession:
    """Return a session with one slot; a task takes 8 s."""
    options = {"schedule": FixedSchedule(0.5), "max_in_flight": 1, **options}
    return FluxSession(gateway.api_key, base_url=gateway.url, **options)


def submitted(gateway: Emulator) -> list[str]:
    """Return the prompts that were submitted, in order."""
    return [task.prompt for task in gateway.tasks.values()]


def local(folder: Path) -> Path:
    """Return a local image."""
    (folder / "cat.png").write_bytes(picture())
    return folder / "cat.png"


@pytest.fixture(params=["nothing", "budget", "journal"])
async def kept(request: pytest.FixtureRequest, gateway: Emulator, tmp_path: Path) -> AsyncIterator[FluxSession]:
    """Provide a session with one slot that keeps nothing, has a budget, or a journal, and lets two requests wait."""
    options: dict[str, dict[str, Any]] = {
        "nothing": {},
        "budget": {"budget": 100},
        "journal": {"journal": VirtualJournal(tmp_path / "run.db")},
    }
    async with opened(gateway, max_waiting=2, **options[request.param]) as session:
        yield session


# ---------------------------------------------------------------------- requests that are taken in


async def test_a_request_from_its_place_to_its_picture(kept: FluxSession, gateway: Emulator, tmp_path: Path) -> None:
    """Requests have their place at once, also if their images have to be read, are submitted in order, and complete."""
    image = local(tmp_path)
    queued = [kept.enqueue("0"), kept.enqueue("1"), kept.enqueue("2", input_images=[image])]
    at_once = [task.position for task in queued]
    await anyio.sleep(4)
    later = [task.position for task in queued]
    texts = [repr(task) for task in queued]
    tasks = [await task.submitted() for task in queued]
    outcomes = await asyncio.gather(*queued, *[task.outcome() for task in queued])

    assert at_once == later == [None, 1, 2]
    assert texts == [
        f"<QueuedGeneration, task {tasks[0].id!r}>",
        *[f"<QueuedGeneration, position {n}>" for n in (1, 2)],
    ]
    assert submitted(gateway) == ["0", "1", "2"]
    assert [task.id for task in tasks] == [outcome.task_id for outcome in outcomes[:3]]
    assert outcomes[:3] == outcomes[3:]
    assert [task.position for task in queued] == [None] * 3
    assert (kept.stats.completed, kept.stats.failed, kept.stats.withdrawn) == (3, 0, 0)


async def test_nobody_has_to_wait_for_it(gateway: Emulator, caplog: pytest.LogCaptureFixture) -> None:
    """The session runs it to its end, and a wait that is cancelled logs nothing: nobody was expected to wait."""
    async with opened(gateway) as session:
        queued = [session.enqueue(f"{number}") for number in range(2)]
        for task in queued:
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(task.outcome(), 2.0)
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(task.submitted() if task is queued[1] else task.outcome(), 1.0)
        await anyio.sleep(20)

    assert session.stats.completed == 2
    assert "nobody waits" not in caplog.text


@pytest.mark.parametrize("step", ["enqueue", "outcome"])
async def test_errors_of_a_request(scripted: ScriptedGateway, step: str, tmp_path: Path) -> None:
    """A wrong parameter is raised at once; what the service or the disk refuses, by awaiting."""
    scripted.submits = deque([answer(422, {"error": "no"})])
    async with session_on(scripted, budget=100) as session:
        if step == "enqueue":
            wrong: list[dict[str, Any]] = [{"width": 1}, {"priority": "1"}, {"timeout": 0}, {"group": 5}]
            for params in wrong:
                with pytest.raises(InvalidRequestError) as caught:
                    session.enqueue("a cat", **params)
                assert caught.value.field == next(iter(params))
            return
        queued = session.enqueue("a cat")
        with pytest.raises(BadRequestError):
            await queued
        with pytest.raises(BadRequestError):
            await queued.submitted()
        unreadable = session.enqueue("a cat", input_images=[tmp_path / "none.png"])
        outcome = await unreadable.outcome()
        with pytest.raises(InvalidRequestError):
            await unreadable.submitted()

    assert isinstance(outcome, Failed)
    assert isinstance(outcome.error, InvalidRequestError)
    assert unreadable.position is None
    assert not unreadable.withdraw()
    assert session.stats.failed == 1


async def test_a_defect_while_a_request_starts(session: FluxSession, tmp_path: Path) -> None:
    """An unexpected error while its images are read is its outcome, and it doesn't wait for ever."""

    class Broken:
        keeps_nothing = False

        def create_now(self, *_: object) -> None:
            return None

        async def create(self, *_: object) -> None:
            raise ZeroDivisionError("a defect")

    assert session._supervisor is not None
    session._supervisor.intake._records = Broken()  # type: ignore[assignment]
    outcome = await session.enqueue("a cat", input_images=[local(tmp_path)]).outcome()

    assert isinstance(outcome, Failed)
    assert "a defect" in str(outcome.error)


@pytest.mark.parametrize("images", [False, True])
async def test_closed_sessions(gateway: Emulator, tmp_path: Path, images: bool) -> None:
    """What waits ends when the session closes, and neither a draining nor a closed session takes anything in."""
    params: dict[str, Any] = {"input_images": [local(tmp_path)]} if images else {}
    async with opened(gateway, budget=100) as session:
        first = await session.submit("0")
        queued = session.enqueue("1", **params)
        closing = asyncio.ensure_future(session.aclose(drain=60))
        await asyncio.sleep(0)
        with pytest.raises(SessionClosedError):
            session.enqueue("2")
        with pytest.raises(SessionClosedError):
            await queued
        await closing
    with pytest.raises(SessionClosedError):
        session.enqueue("3")

    assert (await first).ok
    assert submitted(gateway) == ["0"]
    assert (session.stats.failed, session.stats.withdrawn) == (0 if images else 1, 0)


async def test_closed_while_images_are_read(session: FluxSession, tmp_path: Path) -> None:
    """A request that has no runner yet ends, too."""
    async with session_on_emulator(session) as other:
        queued = other.enqueue("a cat", input_images=[local(tmp_path)])
        await other.aclose()
        outcome = await queued.outcome()

    assert isinstance(outcome, Failed)
    assert isinstance(outcome.error, SessionClosedError)


def session_on_emulator(session: FluxSession) -> FluxSession:
    config = session._parts.config
    return FluxSession(config.api_key, base_url=config.base_url, budget=100)


async def test_another_event_loop(session: FluxSession) -> None:
    """A request is awaited in the event loop of its session."""
    queued = session.enqueue("a cat")
    starting = QueuedGeneration(queued._context, queued._request, 0, None)

    def elsewhere() -> list[Any]:
        async def wait() -> list[Any]:
            return list(await asyncio.gather(queued, starting, return_exceptions=True))

        with asyncio.Runner() as runner:
            return runner.run(wait())

    results = await anyio.to_thread.run_sync(elsewhere)
    assert [type(result) for result in results] == [ConfigurationError] * 2


# ---------------------------------------------------------------------- requests that are withdrawn


async def test_withdrawn_while_it_waits(kept: FluxSession, gateway: Emulator) -> None:
    """It leaves the queue at once, nothing is sent, it doesn't count as failed, and a second call returns the same."""
    queued = [kept.enqueue(f"{number}") for number in range(3)]
    await anyio.sleep(1)
    withdrawn = [queued[1].withdraw(), queued[1].withdraw(), queued[0].withdraw()]
    positions = [task.position for task in queued]
    with pytest.raises(SessionClosedError, match="withdrawn"):
        await queued[1]
    outcome = await queued[1].outcome()
    await queued[2]

    assert withdrawn == [True, True, False]
    assert positions == [None, None, 1]
    assert isinstance(outcome, Failed)
    assert submitted(gateway) == ["0", "2"]
    assert (kept.stats.withdrawn, kept.stats.failed, kept.stats.completed) == (1, 0, 2)
    assert not queued[2].withdraw()


async def test_withdrawn_at_once(kept: FluxSession, gateway: Emulator, tmp_path: Path) -> None:
    """A request can be withdrawn before it was looked up, and before its images were read."""
    first = await kept.submit("0")
    queued = [kept.enqueue("1"), kept.enqueue("2", input_images=[local(tmp_path)])]
    assert [task.withdraw() for task in queued] == [True, True]
    for task in queued:
        with pytest.raises(SessionClosedError, match="withdrawn"):
            await task.submitted()
    assert all(task.withdraw() for task in queued)
    again = [kept.enqueue("3"), kept.enqueue("4")]
    await first
    await asyncio.gather(*again)

    assert submitted(gateway) == ["0", "3", "4"]
    assert kept.stats.withdrawn == 2


async def test_withdrawn_by_one_of_two(gateway: Emulator, tmp_path: Path) -> None:
    """A request that two have asked for goes on until both have withdrawn it, or one of them gets it."""
    async with opened(gateway, journal=VirtualJournal(tmp_path / "run.db")) as session:
        first = await session.submit("0")
        pairs = [(session.enqueue(prompt), session.enqueue(prompt, priority=1)) for prompt in ("1", "2")]
        await anyio.sleep(1)
        one = pairs[0][0].withdraw(), pairs[1][0].withdraw()
        both = pairs[1][1].withdraw(), pairs[1][0].withdraw()
        await first
        outcomes = await asyncio.gather(*pairs[0])
        with pytest.raises(SessionClosedError, match="withdrawn"):
            await pairs[1][0]

    assert (one, both) == ((False, False), (True, True))
    assert outcomes[0] == outcomes[1]
    assert submitted(gateway) == ["0", "1"]


async def test_what_is_withdrawn_can_be_asked_for_again(gateway: Emulator, tmp_path: Path) -> None:
    """The same request, right after it was withdrawn, is a new one, with a place of its own."""
    async with opened(gateway, journal=VirtualJournal(tmp_path / "run.db")) as session:
        first = await session.submit("0")
        withdrawn = session.enqueue("1")
        await anyio.sleep(1)
        withdrawn.withdraw()
        again = session.enqueue("1")
        position = again.position
        await first
        await again

    assert position == 1
    assert submitted(gateway) == ["0", "1"]
    assert (session.stats.withdrawn, session.stats.failed) == (1, 0)


async def test_what_is_withdrawn_stays_so(gateway: Emulator, tmp_path: Path) -> None:
    """If the same request is asked for again before the withdrawn one has ended, only the new one gets the image."""
    async with opened(gateway, journal=VirtualJournal(tmp_path / "run.db")) as session:
        withdrawn = session.enqueue("1")
        answers = [withdrawn.withdraw()]
        again = session.enqueue("1")
        answers.append(withdrawn.withdraw())
        position = withdrawn.position
        with pytest.raises(SessionClosedError, match="withdrawn"):
            await withdrawn.submitted()
        completed = await again
        with pytest.raises(SessionClosedError, match="withdrawn"):
            await withdrawn

    assert answers == [True, True]
    assert position is None
    assert completed.ok
    assert submitted(gateway) == ["1"]
    assert (session.stats.completed, session.stats.failed) == (1, 0)


async def test_what_counts_as_withdrawn(gateway: Emulator) -> None:
    """Callers that are cancelled, timeouts that are over, and streams that are left, before the submit."""
    async with opened(gateway) as session:
        first = await session.submit("0")
        cancelled = asyncio.ensure_future(session.generate("1"))
        late = asyncio.ensure_future(session.generate("2", timeout=2))
        queued = session.enqueue("3", timeout=2)
        stream = session.stream(["4"])
        reader = asyncio.ensure_future(anext(stream))
        await anyio.sleep(1)
        cancelled.cancel()
        await stream.aclose()
        outcomes = await asyncio.gather(cancelled, late, queued, reader, return_exceptions=True)
        await first

    expected = [asyncio.CancelledError, DeadlineExceededError, DeadlineExceededError, StopAsyncIteration]
    assert [type(outcome) for outcome in outcomes] == expected
    assert submitted(gateway) == ["0"]
    assert (session.stats.withdrawn, session.stats.failed, session.stats.completed) == (4, 0, 1)


# ---------------------------------------------------------------------- timeouts


async def test_timeout_while_it_waits(gateway: Emulator, tmp_path: Path) -> None:
    """What isn't submitted in time is not submitted any more, whether or not anybody waits; others are not affected."""
    async with opened(gateway, budget=100) as session:
        first = await session.submit("0")
        queued = [session.enqueue("1", timeout=3), session.enqueue("2", timeout=3), session.enqueue("3", timeout=60)]
        began = anyio.current_time()
        with pytest.raises(DeadlineExceededError) as caught:
            await queued[0]
        seconds = anyio.current_time() - began
        with pytest.raises(DeadlineExceededError):
            await queued[0].submitted()
        await first
        await queued[2]
        outcome = await queued[1].outcome()
        timers = [task._timer for task in queued]

    assert seconds == pytest.approx(3)
    assert caught.value.task_id is None
    assert isinstance(outcome, Failed)
    assert isinstance(outcome.error, DeadlineExceededError)
    assert submitted(gateway) == ["0", "3"]
    assert session.stats.withdrawn == 2
    assert timers[2] is not None
    assert timers[2].cancelled()


async def test_timeout_of_a_task(gateway: Emulator) -> None:
    """A task goes on, and the error names it; later, its outcome is known."""
    async with opened(gateway) as session:
        queued = session.enqueue("1", timeout=3)
        task = await queued.submitted()
        with pytest.raises(DeadlineExceededError) as caught:
            await queued
        await task
        outcome = await queued.outcome()

    assert caught.value.task_id == task.id
    assert isinstance(outcome, Completed)
    assert (session.stats.withdrawn, session.stats.completed) == (0, 1)


@pytest.mark.parametrize("seconds", [4, 30])
async def test_withdrawn_after_the_timeout(gateway: Emulator, seconds: float) -> None:
    """After its timeout, a request that was submitted can't be withdrawn; one that was not has been."""
    async with opened(gateway) as session:
        submitted_in_time, too_late = session.enqueue("1", timeout=3), session.enqueue("2", timeout=3)
        await anyio.sleep(seconds)
        withdrawn = [submitted_in_time.withdraw(), too_late.withdraw(), submitted_in_time.withdraw()]
        await submitted_in_time.outcome()

    assert withdrawn == [False, True, False]
    assert submitted(gateway) == ["1"]


async def test_timeout_while_a_submit_is_unanswered(scripted: ScriptedGateway) -> None:
    """submitted() ends with the timeout, too."""
    scripted.submits = deque([hang])
    async with session_on(scripted) as session:
        with pytest.raises(DeadlineExceededError):
            await session.enqueue("1", timeout=3).submitted()


async def test_timeout_while_images_are_read(gateway: Emulator, tmp_path: Path) -> None:
    """The timeout ends a request that isn't started yet; nothing of it is left."""
    async with opened(gateway, budget=100) as session:
        queued = session.enqueue("1", input_images=[local(tmp_path)], timeout=1e-6)
        queued._on_timeout()
        with pytest.raises(DeadlineExceededError):
            await queued
        await anyio.sleep(1)

    assert not submitted(gateway)
    assert (session.stats.withdrawn, session.stats.failed) == (1, 0)


# ---------------------------------------------------------------------- estimates


async def test_expected_wait(gateway: Emulator) -> None:
    """It is unknown until the schedule has learned how long tasks take, and then about right, also for QueueFullError."""
    schedule = LearnedSchedule()
    async with opened(gateway, schedule=schedule, max_in_flight=2, max_waiting=10) as session:
        unknown = [session.enqueue(f"{number}") for number in range(3)]
        before = [task.expected_wait for task in unknown]
        await asyncio.gather(*unknown)
        await anyio.sleep(2)
        queued = [session.enqueue(f"{number}") for number in range(12)]
        with pytest.raises(QueueFullError) as caught:
            session.enqueue("one more")
        await anyio.sleep(0.1)
        expected = [task.expected_wait or 0.0 for task in queued]
        began, waited = anyio.current_time(), list[float]()
        for task in queued:
            await task
            waited.append(anyio.current_time() - began)
        after = [queued[0].expected_wait, unknown[0].expected_wait]

    assert before == [None] * 3
    assert after == [0.0, 0.0]
    assert expected == sorted(expected)
    assert max(abs(a - b) for a, b in zip(expected, waited, strict=True)) < 9  # at most one task too many or too few
    assert caught.value.waiting == 10
    assert caught.value.retry_after == pytest.approx(44, rel=0.3)


async def test_expected_wait_of_a_request_that_is_being_started(gateway: Emulator, tmp_path: Path) -> None:
    """Reading its images, waiting for the answer to its submit, and a failed start."""
    async with opened(gateway, schedule=LearnedSchedule(), max_in_flight=2, budget=100) as session:
        await session.generate("0")
        await anyio.sleep(2)
        reading = session.enqueue("1", input_images=[local(tmp_path)])
        submitting = session.enqueue("2")
        failed = session.enqueue("3", input_images=[tmp_path / "none.png"])
        expected = [reading.expected_wait, submitting.expected_wait]
        await failed.outcome()
        at_the_end = failed.expected_wait
        await asyncio.gather(reading, submitting)

    assert expected[0] == pytest.approx(16, rel=0.2)
    assert expected[1] == pytest.approx(8, rel=0.2)
    assert at_the_end == 0.0


async def test_expected_wait_where_the_service_allows_fewer_tasks(scripted: ScriptedGateway) -> None:
    """If the service allows fewer tasks than there are slots, its number counts, and those before one with a slot."""
    refused = answer(429, {"error": "too many"}, [("Retry-After", "1")])
    scripted.submits = deque([answer(200, {"id": "t0"}), answer(200, {"id": "t1"}), refused])
    scripted.polls = deque([answer(200, completed("t0")), answer(200, running("t1"))])
    options: dict[str, Any] = {"base_url": scripted.url, "max_in_flight": 6, "schedule": LearnedSchedule()}
    async with FluxSession(scripted.api_key, **options) as session:
        await session.generate("0")
        queued = [session.enqueue(f"{number}") for number in range(1, 9)]
        before = queued[-1].expected_wait
        await anyio.sleep(20)
        after = queued[-1].expected_wait
        for task in queued:
            task.withdraw()

    assert before is not None
    assert after is not None
    # One of six slots has a task; the second in the queue waits for the five others, too.
    assert after == pytest.approx((before / (2 / 6 + 1)) * (2 + 5 + 1), rel=0.1)


# ---------------------------------------------------------------------- the bound of the queue


@pytest.mark.parametrize("method", ["enqueue", "generate", "submit"])
async def test_one_more_than_may_wait(kept: FluxSession, gateway: Emulator, method: str) -> None:
    """One more is refused before anything is sent or written, and counts neither as failed nor as withdrawn."""
    queued = [kept.enqueue(f"{number}") for number in range(3)]
    await anyio.sleep(1)
    with pytest.raises(QueueFullError, match="2 requests wait") as caught:
        result = getattr(kept, method)("3")
        await result
    stats = kept.stats
    await asyncio.gather(*queued)

    assert caught.value.waiting == 2
    assert caught.value.retry_after is None
    assert pickle.loads(pickle.dumps(caught.value)).waiting == 2
    assert (stats.waiting, stats.failed, stats.withdrawn) == (2, 0, 0)
    assert submitted(gateway) == ["0", "1", "2"]


async def test_all_at_once(kept: FluxSession, gateway: Emulator) -> None:
    """Of many that come at once, as many are taken in as slots are free and requests may wait."""
    calls = await asyncio.gather(*[kept.generate(f"{number}") for number in range(8)], return_exceptions=True)

    assert sum(isinstance(call, Completed) for call in calls) == 3
    assert sum(isinstance(call, QueueFullError) for call in calls) == 5
    assert len(submitted(gateway)) == 3


async def test_requests_whose_images_are_read_count(gateway: Emulator, tmp_path: Path) -> None:
    """They have no place in the queue yet, but it is reserved."""
    image = local(tmp_path)
    async with opened(gateway, budget=100, max_waiting=2) as session:
        first = await session.submit("0")
        queued = [session.enqueue(f"{number}", input_images=[image]) for number in (1, 2)]
        with pytest.raises(QueueFullError):
            session.enqueue("3")
        with pytest.raises(QueueFullError):
            session.enqueue("3", input_images=[image])
        await asyncio.gather(first, *queued)

    assert len(submitted(gateway)) == 3


async def test_nobody_may_wait(gateway: Emulator) -> None:
    """With 0, requests are taken in while slots are free."""
    async with opened(gateway, max_in_flight=2, max_waiting=0) as session:
        queued = [session.enqueue("0"), session.enqueue("1")]
        with pytest.raises(QueueFullError):
            await session.generate("2")
        await asyncio.gather(*queued)
        await session.generate("3")

    assert submitted(gateway) == ["0", "1", "3"]


async def test_streams_wait_by_themselves(gateway: Emulator) -> None:
    """The requests of a stream are never refused, and don't count."""
    async with opened(gateway, max_in_flight=2, max_waiting=1) as session:
        streams = [session.stream([f"{number}"] * 3) for number in range(2)]
        readers = [asyncio.ensure_future(anext(stream)) for stream in streams]
        await anyio.sleep(1)
        waiting, queued = session.stats.waiting, session.enqueue("queued")
        with pytest.raises(QueueFullError):
            session.enqueue("one more")
        await asyncio.gather(*readers)
        outcomes = [outcome for stream in streams async for outcome in stream]
        await queued

    assert waiting == 2
    assert len(outcomes) == 4
    assert all(outcome.ok for outcome in outcomes)


async def test_what_needs_no_slot_is_not_refused(gateway: Emulator, tmp_path: Path) -> None:
    """The same request as one that runs, waits, or is recorded is not refused when the queue is full."""
    async with opened(gateway, journal=VirtualJournal(tmp_path / "run.db"), max_waiting=1) as session:
        recorded = await session.generate("recorded")
        queued = [session.enqueue("running"), session.enqueue("waiting")]
        await anyio.sleep(1)
        same = [session.enqueue("running"), session.enqueue("waiting")]
        replay = await session.generate("recorded")
        shared = await session.submit("running")
        with pytest.raises(QueueFullError):
            session.enqueue("another", key="another")
        tasks = [await task.submitted() for task in (*queued, *same)]
        await asyncio.gather(*queued, *same)

    assert replay.replayed
    assert replay.task_id == recorded.task_id
    assert [task.id for task in tasks[2:]] == [task.id for task in tasks[:2]]
    assert shared.id == tasks[0].id
    assert submitted(gateway) == ["recorded", "running", "waiting"]


async def test_a_recorded_request_gives_its_place_back(gateway: Emulator, tmp_path: Path) -> None:
    """enqueue() takes a place before it looks the request up; what has ended already, or is a task, needs none."""
    async with opened(gateway, journal=VirtualJournal(tmp_path / "run.db")) as session:
        await session.generate("recorded")
        left = await session.submit("left behind")
    async with opened(gateway, journal=VirtualJournal(tmp_path / "run.db")) as session:
        free = session.enqueue("recorded")
        assert (await free).replayed
        first = await session.submit("0")
        queued = [session.enqueue("recorded"), session.enqueue("left behind"), session.enqueue("1")]
        assert [task.position for task in queued] == [1, 2, 3]
        await anyio.sleep(0.5)
        assert [task.position for task in queued] == [None, None, 1]
        outcomes = await asyncio.gather(*queued, first)

    assert [outcome.replayed for outcome in outcomes] == [True, False, False, False]
    assert outcomes[1].task_id == left.id
    assert session.stats.in_flight == 0


async def test_a_slot_that_comes_before_the_lookup_ends(gateway: Emulator, tmp_path: Path) -> None:
    """The request goes on with the slot when it was looked up, and is submitted once."""
    async with opened(gateway, journal=VirtualJournal(tmp_path / "run.db")) as session:
        assert session._supervisor is not None
        slots = session._supervisor.slots
        assert slots.try_acquire()
        queued = session.enqueue("0")
        slots.release()
        positions = queued.position
        await queued

    assert positions is None
    assert submitted(gateway) == ["0"]
    assert (slots.free, slots.held, slots.waiting) == (1, 0, 0)


async def test_resubmit_of_what_is_unanswered(scripted: ScriptedGateway, tmp_path: Path) -> None:
    """A request that may be submitted again waits for the answer to its submit, and shares the task."""
    scripted.submits = deque([answer(200, {"id": "t1"}, after=5.0)])
    scripted.polls = deque([answer(200, running()), answer(200, completed())])
    async with session_on(scripted, journal=VirtualJournal(tmp_path / "run.db")) as session:
        queued = session.enqueue("a cat")
        again = session.enqueue("a cat", resubmit_uncertain=True)
        position = again.position
        outcomes = await asyncio.gather(queued, again)

    assert position == 1
    assert outcomes[0].task_id == outcomes[1].task_id == "t1"
    assert len(scripted.of("POST")) == 1


# ---------------------------------------------------------------------- groups


@pytest.mark.parametrize("group", [5, b"x", True])
@pytest.mark.parametrize("method", ["generate", "submit", "enqueue"])
async def test_invalid_group(session: FluxSession, gateway: Emulator, method: str, group: Any) -> None:
    """Anything but a text is refused by name, before anything is sent."""
    with pytest.raises(InvalidRequestError, match="group") as caught:
        await getattr(session, method)("a cat", group=group)

    assert caught.value.field == "group"
    assert not gateway.calls


async def test_groups_take_turns(gateway: Emulator) -> None:
    """Whoever has many requests waiting, others get every other turn, whichever method they use."""
    async with opened(gateway) as session:
        many = [session.enqueue(f"a{number}", group="a") for number in range(5)]
        others = [
            asyncio.ensure_future(session.generate("b0", group="b")),
            asyncio.ensure_future(session.submit("b1", group="b")),
            asyncio.ensure_future(session.generate("c0")),
        ]
        await anyio.sleep(1)
        positions = [task.position for task in many]
        await asyncio.gather(*many, *others)

    assert submitted(gateway) == ["a0", "a1", "b0", "c0", "a2", "b1", "a3", "a4"]
    assert positions == [None, 1, 4, 6, 7]


async def test_slots_of_a_group(gateway: Emulator) -> None:
    """A group holds at most `max_per_group` slots; the other slots are for others, and it goes on when one is free."""
    async with opened(gateway, max_in_flight=4, max_per_group=2, max_waiting=3) as session:
        many = [session.enqueue(f"a{number}", group="a") for number in range(5)]
        with pytest.raises(QueueFullError):
            session.enqueue("a5", group="a")
        other = [session.enqueue("b0", group="b"), session.enqueue("c0")]
        await anyio.sleep(2)
        before = submitted(gateway)
        await asyncio.gather(*many, *other)

    assert before == ["a0", "a1", "b0", "c0"]
    assert submitted(gateway)[4:] == ["a2", "a3", "a4"]


# ---------------------------------------------------------------------- the same request, asked for again


async def test_the_bound_counts_those_that_wait_for_an_answer(scripted: ScriptedGateway, tmp_path: Path) -> None:
    """Requests that may be submitted again if the submit on the wire is uncertain count as waiting until it is not."""
    scripted.submits = deque([hang])
    journal = VirtualJournal(tmp_path / "run.db")
    async with session_on(scripted, max_in_flight=1, max_waiting=1, journal=journal) as session:
        queued = [session.enqueue("1")]
        await anyio.sleep(1)
        queued.append(session.enqueue("1", resubmit_uncertain=True))
        with pytest.raises(QueueFullError):
            session.enqueue("1", resubmit_uncertain=True)
        queued.append(session.enqueue("1"))
        await session.aclose()
        outcomes = [await task.outcome() for task in queued]

    assert not any(outcome.ok for outcome in outcomes)


async def test_asked_for_again_while_it_runs(gateway: Emulator, tmp_path: Path) -> None:
    """A request whose task is known joins it at once, also if it may be submitted again, and takes no room."""
    async with opened(gateway, journal=VirtualJournal(tmp_path / "run.db"), max_waiting=1) as session:
        task = await session.submit("1")
        full = session.enqueue("2")
        again = [session.enqueue("1", resubmit_uncertain=True) for _ in range(3)]
        ids = [(await one.submitted()).id for one in again]
        await anyio.sleep(1)
        full.withdraw()
        room = session.enqueue("3")
        room.withdraw()
        await task

    assert ids == [task.id] * 3


async def test_asked_for_again_after_it_was_withdrawn(gateway: Emulator, tmp_path: Path) -> None:
    """A request that was withdrawn needs room like any other."""
    async with opened(gateway, journal=VirtualJournal(tmp_path / "run.db"), max_waiting=1) as session:
        await session.submit("1")
        withdrawn = session.enqueue("2")
        await anyio.sleep(1)
        withdrawn.withdraw()
        session.enqueue("3")
        with pytest.raises(QueueFullError):
            session.enqueue("2")


@pytest.mark.parametrize("joins", ["stream", "enqueue"])
async def test_joining_a_request_that_is_looked_up(gateway: Emulator, tmp_path: Path, joins: str) -> None:
    """Streams make it wait although the queue is full; enqueue() is refused, as if it were the first."""
    async with opened(gateway, journal=VirtualJournal(tmp_path / "run.db"), max_waiting=1) as session:
        assert session._supervisor is not None
        intake = session._supervisor.intake
        await session.submit("1")
        session.enqueue("2")
        call = asyncio.ensure_future(session.generate("3"))
        if joins == "stream":
            item = intake.start_item(GenerationRequest("3"), CallOptions(0, ReusePolicy()))
            runner = await asyncio.ensure_future(item)  # begins after the call
            outcomes = await asyncio.gather(call, runner.wait())
            assert outcomes[0] == outcomes[1]
        else:
            while len(session._supervisor.single_flight.by_key) < 3:  # noqa: ASYNC110 - between two steps of the call
                await asyncio.sleep(0)
            with pytest.raises(QueueFullError):
                session.enqueue("3")
            with pytest.raises(QueueFullError):
                await call


# ---------------------------------------------------------------------- thousands


async def test_thousands_that_come_and_leave_at_once(gateway: Emulator) -> None:
    """10,000 calls wait without an asyncio task of their own, in order, and leave nothing behind when they go."""
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualTimeLoop)
    async with opened(gateway) as session:
        assert session._supervisor is not None
        supervisor = session._supervisor
        first = await session.submit("0")
        calls = [asyncio.ensure_future(session.generate(f"{number}")) for number in range(1, 10_001)]
        await anyio.sleep(1)
        waiting, tasks = session.stats.waiting, len(supervisor._tasks)
        for call in calls[1:]:
            call.cancel()
        await anyio.sleep(1)
        left = session.stats.waiting, len(supervisor._runners), session.stats.withdrawn
        await first
        await calls[0]
        await asyncio.gather(*calls, return_exceptions=True)

    assert waiting == 10_000
    assert tasks == 1
    assert left == (1, 2, 9_999)
    assert submitted(gateway) == ["0", "1"]
