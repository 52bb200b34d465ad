"""One runner for each request and each task, in the process and event loop that opened the session."""

import asyncio
import os
import threading
from collections import deque
from collections.abc import Awaitable, Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import anyio
import pytest
from support.responses import picture
from support.scripted import Connection, ScriptedGateway, answer, completed, running, session_on
from support.virtual_time import VirtualJournal

from flux2max_async import (
    Completed,
    ConfigurationError,
    Failed,
    FluxSession,
    GeneratedImage,
    GenerationRequest,
    JournalEntry,
    SessionClosedError,
)
from flux2max_async.emulator import Emulator
from flux2max_async.journal import EntryState

IMAGE = GeneratedImage(url="http://127.0.0.1:9/0.jpeg", type="image", task_id="t1")

# ---------------------------------------------------------------------- process and event loop


async def take(session: FluxSession) -> None:
    async for _ in session.stream(["a cat"]):
        pass


async def attach(session: FluxSession) -> None:
    session.attach("t1")


METHODS: dict[str, Callable[[FluxSession], Awaitable[object]]] = {
    "generate": lambda session: session.generate("a cat"),
    "submit": lambda session: session.submit("a cat"),
    "stream": take,
    "attach": attach,
    "fetch": lambda session: session.fetch("t1"),
    "save": lambda session: session.save(IMAGE, "never.jpeg"),
    "aclose": lambda session: session.aclose(),
}


def in_another_loop(use: Callable[[], Awaitable[object]]) -> BaseException | None:
    """Run a coroutine in a thread and event loop of its own; return what it raises."""
    caught: list[BaseException] = []

    async def main() -> None:
        await asyncio.wait_for(use(), 5)

    def run() -> None:
        try:
            asyncio.run(main())
        except BaseException as error:
            caught.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return caught[0] if caught else None


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.parametrize("method", METHODS)
async def test_another_event_loop_is_refused(method: str) -> None:
    """Every public method raises at once, names both loops, and sends nothing."""
    async with Emulator(seconds=0.1, seed=1) as gateway:
        async with FluxSession(gateway.api_key, base_url=gateway.url) as session:
            error = await asyncio.to_thread(in_another_loop, lambda: METHODS[method](session))
            own_loop = repr(asyncio.get_running_loop())
        calls = gateway.calls.total()

    assert isinstance(error, ConfigurationError)
    assert str(error).count("EventLoop") == 2
    assert own_loop.split(" running")[0] in str(error)
    assert calls == 0


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_handles_and_streams_are_refused_in_another_loop() -> None:
    """A task is neither awaited nor followed in another loop before its end, and a stream is not iterated there."""
    async with (
        Emulator(seconds=0.3, spread=0.0, seed=1) as gateway,
        FluxSession(gateway.api_key, base_url=gateway.url) as session,
    ):
        task = await session.submit("a cat")
        stream = session.stream(["a dog"])

        async def follow() -> None:
            async for _ in task.updates():
                pass

        errors = [
            await asyncio.to_thread(in_another_loop, use)
            for use in (task.outcome, follow, stream.__anext__, stream.aclose)
        ]
        outcome = await task.outcome()
        late = await asyncio.to_thread(in_another_loop, task.outcome)

    assert [type(error) for error in errors] == [ConfigurationError] * 4
    assert outcome.ok
    assert late is None  # after the end, the outcome is only a value


@pytest.mark.parametrize("method", METHODS)
def test_an_event_loop_that_has_ended_is_a_closed_session(method: str) -> None:
    """A session that was never closed, and whose loop is gone, is closed; closing it then does nothing."""
    session = FluxSession("key", base_url="http://127.0.0.1:9")
    asyncio.run(enter(session))

    if method == "aclose":
        asyncio.run(session.aclose())
    else:
        with pytest.raises(SessionClosedError):
            asyncio.run(run_method(session, method))
    asyncio.run(session._parts.transport.close())  # nobody else does


async def enter(session: FluxSession) -> None:
    await session.__aenter__()


async def run_method(session: FluxSession, method: str) -> None:
    await METHODS[method](session)


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
async def test_a_forked_child_is_refused(method: str) -> None:
    """A child process that inherited an open session gets an error that names both processes."""
    async with FluxSession("key", base_url="http://127.0.0.1:9") as session:
        reading, writing = os.pipe()
        child = os.fork()
        if not child:  # pragma: no cover - runs in the child
            try:
                METHODS[method](session).__await__().send(None)
            except BaseException as error:
                os.write(writing, f"{type(error).__name__}: {error}".encode())
            os._exit(0)
        os.close(writing)
        text = os.read(reading, 10_000).decode()
        os.close(reading)
        os.waitpid(child, 0)  # noqa: ASYNC222 - it has ended already

    assert text.startswith("ConfigurationError")
    assert str(os.getpid()) in text
    assert str(child) in text


# ---------------------------------------------------------------------- one task is one runner


async def test_a_task_that_is_attached_five_times_is_one_task(scripted: ScriptedGateway) -> None:
    """It is polled once per interval, counted once, and its cost is spent once."""
    scripted.polls = deque([*(answer(200, running()) for _ in range(3)), answer(200, completed())])
    async with session_on(scripted) as session:
        submitted = await session.submit("a cat")
        attached = [session.attach(submitted.id) for _ in range(5)]
        in_flight = session.stats.in_flight
        outcomes = [await task.outcome() for task in (submitted, *attached)]

    assert in_flight == 1
    assert all(outcome is outcomes[0] for outcome in outcomes)
    assert len(scripted.of("GET")) == session.stats.polls == outcomes[0].polls == 4
    assert (session.stats.spent, session.stats.completed) == (Decimal("0.07"), 1)


async def test_a_task_from_elsewhere_is_attached_once(scripted: ScriptedGateway) -> None:
    """Attaching an id again, while it is followed, returns the same task; after its end it is polled anew."""
    scripted.polls = deque([answer(200, running()), answer(200, completed())])
    async with session_on(scripted) as session:
        first, second = session.attach("t1"), session.attach("t1")
        assert await first is await second
        polls = len(scripted.of("GET"))
        again = await session.attach("t1")

    assert (polls, len(scripted.of("GET"))) == (2, 3)
    assert again.task_id == "t1"


def opened(scripted: ScriptedGateway, path: Path, **options: Any) -> FluxSession:
    return session_on(scripted, journal=VirtualJournal(path / "run.db"), task_timeout=10.0, **options)


async def test_attaching_after_a_deadline_ends_the_journals_entry(scripted: ScriptedGateway, tmp_path: Path) -> None:
    """The task's end and cost are recorded, and what was reserved for it is free again."""
    scripted.polls = deque([answer(200, running())])
    async with opened(scripted, tmp_path, budget="0.14", budget_scope="session") as session:
        with pytest.raises(TimeoutError) as caught:
            await session.generate("a cat", key="cat")
        scripted.polls = deque([answer(200, completed(usage={"cost": "0.05"}))])
        done = await session.attach(caught.value.task_id or "")  # type: ignore[attr-defined]
        budget = session._parts.records._budget
        committed, spent = budget.committed, session.stats.spent
        again = await session.generate("a cat", key="cat")

    (entry,) = [entry async for entry in VirtualJournal(tmp_path / "run.db").entries()]
    assert (entry.state, entry.cost, entry.committed, entry.holder) == (
        EntryState.COMPLETED, Decimal("0.05"), Decimal("0.05"), None,
    )  # fmt: skip
    assert done.task_id == again.task_id == "t1"
    assert again.replayed
    assert committed == spent == Decimal("0.05")
    assert len(scripted.of("POST")) == 1


async def test_attaching_settles_the_budget_without_a_journal(scripted: ScriptedGateway) -> None:
    """A reservation that outlived its deadline is settled by the attached task's cost."""
    scripted.polls = deque([answer(200, running())])
    async with session_on(scripted, budget="0.14", task_timeout=10.0) as session:
        (outcome,) = [outcome async for outcome in session.stream(["a cat"])]
        budget = session._parts.records._budget
        before = budget.committed
        scripted.polls = deque([answer(200, completed(usage={"cost": "0.05"}))])
        await session.attach(outcome.task_id or "")
        after = budget.committed

    assert (before, after) == (Decimal("0.07"), Decimal("0.05"))


async def test_attaching_a_task_of_the_journal_in_another_session(scripted: ScriptedGateway, tmp_path: Path) -> None:
    """A later session that attaches by id records the end in the entry of the first one."""
    scripted.polls = deque([answer(200, running())])
    async with opened(scripted, tmp_path) as session:
        task_id = (await session.submit("a cat", key="cat")).id
    scripted.polls = deque([answer(200, completed())])
    async with opened(scripted, tmp_path) as session:
        assert (await session.attach(task_id)).ok
        replayed = await session.generate("a cat", key="cat")

    assert replayed.replayed
    assert len(scripted.of("POST")) == 1


async def test_a_request_that_is_attached_already_shares_the_task(scripted: ScriptedGateway, tmp_path: Path) -> None:
    """generate() of a request whose task is being followed by attach() waits for that runner; nothing is counted twice."""
    scripted.polls = deque([answer(200, running())])
    async with opened(scripted, tmp_path) as session:
        task_id = (await session.submit("a cat", key="cat")).id
    scripted.polls = deque([*(answer(200, running()) for _ in range(3)), answer(200, completed())])
    async with opened(scripted, tmp_path) as session:
        attached = session.attach(task_id)
        await anyio.sleep(0.5)
        submitted = await session.submit("a cat", key="cat")
        done, same = await asyncio.gather(attached, submitted)
        updates = [snapshot.status async for snapshot in submitted.updates()]

    assert (done.task_id, same.task_id) == (task_id, task_id)
    assert session.stats.polls == done.polls == 4
    assert session.stats.spent == Decimal("0.07")
    assert [str(status) for status in updates] == ["completed"]
    assert len(scripted.of("POST")) == 1


class _BrokenSearch(VirtualJournal):
    async def find_task(self, task_id: str, /) -> Any:
        from flux2max_async import JournalError  # noqa: PLC0415 - used here alone

        raise JournalError(f"the disk is gone, {task_id}")


async def test_a_journal_that_fails_does_not_keep_a_task_from_being_attached(
    scripted: ScriptedGateway, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A paid task is polled even if its entry can't be found, and the log says so."""
    async with session_on(scripted, journal=_BrokenSearch(tmp_path / "run.db")) as session:
        assert (await session.attach("t1")).ok

    assert "task t1 is polled, but not found in the journal" in caplog.text


# ---------------------------------------------------------------------- callers that share a runner


async def test_a_caller_that_leaves_ends_nothing_for_the_others(scripted: ScriptedGateway, tmp_path: Path) -> None:
    """Of two callers with the same request one may leave before the submit: the other one gets the picture."""
    async with opened(scripted, tmp_path, max_in_flight=1) as session:
        scripted.polls = deque([*(answer(200, running()) for _ in range(3)), answer(200, completed())])
        scripted.submits = deque([answer(200, {"id": "t0"}), answer(200, {"id": "t1"})])
        first = await session.submit("in the way", key="other")
        impatient = asyncio.ensure_future(session.generate("a cat", key="cat"))
        patient = asyncio.ensure_future(session.generate("a cat", key="cat"))
        await anyio.sleep(0.5)
        impatient.cancel()
        done = await patient
        await first

    assert done.task_id == "t1"
    assert len(scripted.of("POST")) == 2


@pytest.mark.parametrize("pause", [0, 1, 2, 3, 5, 8])
async def test_a_caller_that_comes_after_the_last_one_has_left(
    scripted: ScriptedGateway, tmp_path: Path, pause: int
) -> None:
    """Whenever the new caller comes, it gets the picture, and the request is paid for once."""
    async with opened(scripted, tmp_path, max_in_flight=1) as session:
        scripted.polls = deque([answer(200, running()), answer(200, completed())])
        scripted.submits = deque([answer(200, {"id": "t0"}), answer(200, {"id": "t1"})])
        first = await session.submit("in the way", key="other")
        gone = asyncio.ensure_future(session.generate("a cat", key="cat"))
        await anyio.sleep(0.5)
        gone.cancel()
        for _ in range(pause):
            await asyncio.sleep(0)
        done = await session.generate("a cat", key="cat")
        await first

    assert done.task_id == "t1"
    assert len(scripted.of("POST")) == 2


async def test_a_caller_that_comes_while_a_cancelled_submit_is_on_the_wire(
    scripted: ScriptedGateway, tmp_path: Path
) -> None:
    """The submit that the last caller has left is finished; a new caller shares its task."""
    scripted.submits = deque([answer(200, {"id": "t1"}, after=2.0)])
    async with opened(scripted, tmp_path) as session:
        gone = asyncio.ensure_future(session.generate("a cat", key="cat"))
        await anyio.sleep(1.0)
        gone.cancel()
        done = await session.generate("a cat", key="cat")

    assert done.task_id == "t1"
    assert len(scripted.of("POST")) == 1


async def test_sharing_callers_allow_what_one_of_them_allows(scripted: ScriptedGateway, tmp_path: Path) -> None:
    """A failed request is retried if one of two callers that share it allows that."""
    scripted.polls = deque([answer(200, {"id": "t1", "status": "failed", "error": "no"})])
    async with opened(scripted, tmp_path) as session:
        with pytest.raises(Exception, match="no"):
            await session.generate("a cat", key="cat")
        scripted.polls = deque([answer(200, completed())])
        first = asyncio.ensure_future(session.generate("a cat", key="cat"))
        second = asyncio.ensure_future(session.generate("a cat", key="cat", retry_failed=True))
        outcomes = await asyncio.gather(first, second)

    assert all(isinstance(outcome, Completed) for outcome in outcomes)
    assert len(scripted.of("POST")) == 2


async def test_each_caller_gets_its_own_request_back(scripted: ScriptedGateway, tmp_path: Path) -> None:
    """Requests that share a key may differ in their webhook: each outcome names the request it answers."""
    urls = ["https://a.example/", "https://b.example/"]
    async with opened(scripted, tmp_path) as session:
        done = await asyncio.gather(*(session.generate("a cat", key="cat", webhook_url=url) for url in urls))

    assert [outcome.request and outcome.request.webhook_url for outcome in done] == urls
    assert len(scripted.of("POST")) == 1


async def test_a_failed_attach_is_an_outcome(scripted: ScriptedGateway) -> None:
    """An id that the service doesn't know ends as Failed, for each who has attached it."""
    scripted.polls = deque([answer(404, {"message": "no such task"})])
    async with session_on(scripted) as session:
        outcomes = [await session.attach("t9").outcome() for _ in range(2)]

    assert all(isinstance(outcome, Failed) for outcome in outcomes)


@pytest.mark.parametrize("steps", range(8))
async def test_a_caller_that_leaves_at_each_step(scripted: ScriptedGateway, steps: int) -> None:
    """Whenever a caller is cancelled, a request that isn't on the wire is not sent, and one that is becomes a task."""
    async with session_on(scripted) as session:
        caller = asyncio.ensure_future(session.generate("a cat"))
        for _ in range(steps):
            await asyncio.sleep(0)
        caller.cancel()
        await anyio.sleep(10.0)
        stats = session.stats

    assert caller.cancelled()
    assert len(scripted.of("POST")) == stats.submitted == stats.completed
    assert stats.in_flight == 0


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_thread_without_an_event_loop_is_refused() -> None:
    """attach() is no coroutine function, and still belongs to the session's event loop."""
    async with FluxSession("key", base_url="http://127.0.0.1:9") as session:
        with pytest.raises(ConfigurationError, match="no event loop"):
            await asyncio.to_thread(session.attach, "t1")


async def test_images_of_an_attached_task_are_saved_by_a_stream(scripted: ScriptedGateway, tmp_path: Path) -> None:
    """A stream whose request shares the runner of an attached task saves its images, and records their files."""
    scripted.polls = deque([answer(200, running())])
    async with opened(scripted, tmp_path) as session:
        task_id = (await session.submit("a cat", key="cat")).id
    url = f"{scripted.url}/0.jpeg"
    scripted.polls = deque([*(answer(200, running()) for _ in range(3)), answer(200, completed(url=url))])
    scripted.downloads = deque([answer(200, picture("JPEG"))])
    request = GenerationRequest("a cat", key="cat")
    async with opened(scripted, tmp_path) as session:
        attached = session.attach(task_id)
        (outcome,) = [outcome async for outcome in session.stream([request], save_to=tmp_path / "images")]
        await attached

    (entry,) = [entry async for entry in VirtualJournal(tmp_path / "run.db").entries()]
    assert outcome.unwrap().saved == (tmp_path / "images" / "cat.jpeg",)
    assert entry.paths == outcome.unwrap().saved
    assert (entry.state, entry.holder) == (EntryState.COMPLETED, None)


async def test_two_items_of_a_stream_wait_for_another_session(scripted: ScriptedGateway, tmp_path: Path) -> None:
    """Equal requests of a stream that another session follows hold up nothing else, and both get the outcome."""
    scripted.submits = deque([answer(200, {"id": "t1"}), answer(200, {"id": "t2"})])
    polls: list[object] = []

    async def poll(connection: Connection) -> None:
        task_id = connection.call.path.rpartition("/")[2]
        polls.append(task_id)
        ended = task_id == "t2" or len(polls) > 6
        await answer(200, completed(task_id) if ended else running(task_id))(connection)

    scripted.polls = deque([poll])
    requests = [GenerationRequest(name, key=name) for name in ("cat", "cat", "dog")]
    async with opened(scripted, tmp_path) as first, opened(scripted, tmp_path, max_in_flight=1) as second:
        task = await first.submit("cat", key="cat")
        outcomes = [outcome.unwrap() async for outcome in second.stream(requests)]
        await task

    assert [outcome.task_id for outcome in outcomes] == ["t2", "t1", "t1"]
    assert len(scripted.of("POST")) == 2


async def test_changes_reported_while_closing_start_nothing(scripted: ScriptedGateway, tmp_path: Path) -> None:
    """A task that a dead process has left behind is not adopted by a session that drains, or is closed."""
    scripted.polls = deque([answer(200, running()), answer(200, completed())])
    entry = JournalEntry(key="k", fingerprint="f", request={}, state=EntryState.SUBMITTED, task_id="t9")
    async with opened(scripted, tmp_path) as session:
        await session.submit("a cat")
        supervisor = session._supervisor
        assert supervisor is not None
        closing = asyncio.ensure_future(session.aclose(drain=60.0))
        await asyncio.sleep(0)
        supervisor.on_external_change([entry])
        await closing
        supervisor.on_external_change([entry])
        with pytest.raises(SessionClosedError):
            supervisor.intake.attach("t9", None)

    assert not any("t9" in call.path for call in scripted.of("GET"))


async def test_background_work_needs_an_open_session() -> None:
    """Work for a session that isn't open is refused, and its coroutine closed."""

    async def work() -> None:
        raise AssertionError

    async with FluxSession("key") as session:
        supervisor = session._supervisor
        assert supervisor is not None
    with pytest.raises(SessionClosedError):
        supervisor.spawn(work(), until_drain=True)
