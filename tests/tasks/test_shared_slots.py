"""SharedSlotQueue: a session asks its shared limit for slots while somebody waits, and gives each back."""

import asyncio
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import anyio
import pytest
from support.scripted import ScriptedGateway, answer, completed
from support.virtual_time import VirtualJournal

from flux2max_async import (
    ConfigurationError,
    Failed,
    FixedSchedule,
    FluxError,
    FluxSession,
    GenerationRequest,
    InFlightLimit,
    InFlightLimitError,
    QueueFullError,
    SessionClosedError,
)
from flux2max_async._tasks.shared_slots import SharedSlotQueue
from flux2max_async.emulator import Emulator


class Limit(InFlightLimit):
    """A limit for sessions of this process."""

    def __init__(self, limit: int = 1) -> None:
        self._limit = limit
        self._slots = asyncio.Semaphore(limit)
        self.calls: list[str] = []
        self.error: Exception | None = None
        self.held = 0
        self.max_held = 0

    @property
    def limit(self) -> int:
        return self._limit

    def expect_adoption(self) -> None:
        self.calls.append("expect_adoption")

    async def open(self) -> None:
        self.calls.append("open")
        if self.error is not None:
            raise self.error

    async def acquire(self) -> None:
        await self._slots.acquire()
        if self.error is not None:
            self._slots.release()
            raise self.error
        self._count(1)

    def occupy(self) -> None:
        self.calls.append("occupy")
        self._count(1)

    def release(self) -> None:
        self._count(-1)
        self._slots.release()

    async def close(self) -> None:
        self.calls.append("close")

    def _count(self, change: int) -> None:
        self.held += change
        self.max_held = max(self.max_held, self.held)


class Request:
    """A request that waits for a slot."""

    def __init__(self, queue: SharedSlotQueue, priority: int = 0, group: str | None = None) -> None:
        self._queue = queue
        self.got: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.place = queue.enqueue(self, priority, group)

    def on_slot(self) -> None:
        self.got.set_result(None)

    def on_no_slot(self, error: FluxError) -> None:
        self._queue.leave(self.place)
        self.got.set_exception(error)


# ------------------------------------------------------------------ the queue


async def test_slots_go_to_the_first_of_the_queue() -> None:
    """Each slot that the limit has goes to the highest priority, and one is asked for at a time."""
    limit, order = Limit(), []
    queue = SharedSlotQueue(limit)

    async def hold(priority: int) -> None:
        assert not queue.try_acquire()
        await Request(queue, priority).got
        order.append(priority)
        await anyio.sleep(1)
        queue.release()

    async with asyncio.TaskGroup() as group:
        for priority in (0, 2, 1):
            group.create_task(hold(priority))

    assert (order, limit.held, limit.max_held, queue.held, queue.waiting) == ([2, 1, 0], 0, 1, 0, 0)


async def test_a_group_at_its_bound() -> None:
    """While a group holds what it may hold, its requests ask for no slot; they go on once it gives one back."""
    limit = Limit(3)
    queue = SharedSlotQueue(limit, max_per_group=1)
    requests = [Request(queue, group="a") for _ in range(2)]
    other = Request(queue)
    await anyio.sleep(1)
    assert ([request.got.done() for request in requests], other.got.done()) == ([True, False], True)
    assert limit.held == 2

    queue.release("a")
    await requests[1].got
    queue.release("a")
    queue.release()
    assert queue.occupy("a")
    waiting = Request(queue, group="a")
    await anyio.sleep(1)
    assert (limit.held, waiting.got.done()) == (1, False)


async def test_a_group_that_reaches_its_bound_while_it_waits() -> None:
    """A slot that comes when only a group at its bound waits goes back to the limit."""
    limit = Limit(1)
    queue = SharedSlotQueue(limit, max_per_group=1)
    await limit.acquire()
    waiting = Request(queue, group="a")
    await anyio.sleep(1)
    queue.occupy("a")
    limit.release()
    limit.release()
    await anyio.sleep(1)

    assert (limit.held, waiting.got.done()) == (0, False)


async def test_a_slot_that_nobody_waits_for() -> None:
    """When the last one has left, the session doesn't wait for the limit any more, and has taken nothing."""
    limit = Limit()
    queue = SharedSlotQueue(limit)
    await limit.acquire()
    for request in [Request(queue) for _ in range(2)]:
        await anyio.sleep(1)
        queue.leave(request.place)
    limit.release()
    await anyio.sleep(1)
    assert (limit.held, queue.waiting) == (0, 0)

    await Request(queue).got
    assert limit.held == 1


@pytest.mark.parametrize("steps", range(4))
async def test_leaving_in_the_moment_of_the_grant(steps: int) -> None:
    """A slot that comes in the moment in which its request leaves goes back to the limit."""
    limit = Limit()
    queue = SharedSlotQueue(limit)
    await limit.acquire()
    request = Request(queue)
    await anyio.sleep(1)
    limit.release()
    for _ in range(steps):
        await asyncio.sleep(0)
    if request.got.done():
        queue.release()
    queue.leave(request.place)
    await anyio.sleep(1)

    assert (limit.held, queue.held, queue.waiting) == (0, 0, 0)
    await limit.acquire()


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (InFlightLimitError("the database is away"), "the database is away"),
        (RuntimeError("a mistake"), "unexpected error of the limit: RuntimeError('a mistake')"),
    ],
)
async def test_a_limit_that_fails(error: Exception, message: str) -> None:
    """Whoever waits gets the error, each one of its own; later requests ask again."""
    limit = Limit()
    queue = SharedSlotQueue(limit)
    limit.error = error
    results = await asyncio.gather(*[Request(queue).got for _ in range(3)], return_exceptions=True)
    limit.error = None
    await Request(queue).got

    assert [(type(result), str(result)) for result in results] == [(InFlightLimitError, message)] * 3
    assert len({id(result) for result in results}) == 3
    assert (limit.held, queue.waiting) == (1, 0)


# ------------------------------------------------------------------ sessions


@pytest.fixture
async def service() -> AsyncIterator[Emulator]:
    async with Emulator(seconds=8.0, spread=0.0, seed=1, pictures=False, max_in_flight=3) as emulator:
        yield emulator


def session_on(gateway: "Emulator | ScriptedGateway", limit: object, **options: object) -> FluxSession:
    return FluxSession(
        gateway.api_key,
        base_url=gateway.url,
        max_in_flight=limit,  # type: ignore[arg-type]
        schedule=FixedSchedule(1.0),
        **options,  # type: ignore[arg-type]
    )


async def test_two_sessions_share(service: Emulator) -> None:
    """Two sessions keep to one limit, whatever goes through them, and nothing is refused."""
    limit = Limit(3)
    async with session_on(service, limit) as first, session_on(service, limit) as second, asyncio.TaskGroup() as group:
        for number in range(8):
            group.create_task(first.generate(f"first {number}"))
        tasks = [group.create_task(second.submit(f"second {number}")) for number in range(4)]
        await anyio.sleep(2)
        waiting = first.stats.waiting + second.stats.waiting
        outcomes = [outcome async for outcome in second.stream(f"stream {number}" for number in range(6))]
        assert all([await task.result().outcome() for task in tasks])

    assert waiting == 9
    assert all(outcome.ok for outcome in outcomes)
    assert (limit.max_held, limit.held) == (3, 0)
    assert sum(service.accepted.values()) == 18
    assert service.calls["submit"] == 18


async def test_a_bound_of_the_queue(service: Emulator) -> None:
    """Requests that come at once aren't refused while the limit has slots; once it gives none, they are."""
    limit = Limit(4)
    await limit.acquire()  # by another process
    async with session_on(service, limit, max_waiting=0) as session:
        first = [asyncio.ensure_future(session.generate(f"first {number}")) for number in range(3)]
        await anyio.sleep(1)
        fourth = asyncio.ensure_future(session.generate("fourth"))  # nobody knows yet that no slot is left
        await anyio.sleep(1)
        with pytest.raises(QueueFullError, match="the queue is full: 1 requests"):
            await session.generate("fifth")
        limit.release()
        await asyncio.gather(*first, fourth)
        group = [asyncio.ensure_future(session.generate(f"group {number}")) for number in range(5)]
        await anyio.sleep(1)
        refused = [request.done() and isinstance(request.exception(), QueueFullError) for request in group]
        await asyncio.gather(*group, return_exceptions=True)

    assert refused == [False] * 4 + [True]
    assert sum(service.accepted.values()) == 8


async def test_a_burst_fills_slots_and_the_queue(service: Emulator) -> None:
    """Of requests that come at once, as many wait as there are free slots, and as many more as may wait."""
    limit = Limit(3)
    async with session_on(service, limit, max_waiting=2) as session:
        burst = [session.enqueue(f"burst {number}") for number in range(5)]
        with pytest.raises(QueueFullError):
            session.enqueue("one more")
        assert all([(await queued.outcome()).ok for queued in burst])

    assert limit.held == 0


async def test_a_limit_that_fails_while_a_request_is_looked_up(service: Emulator, tmp_path: Path) -> None:
    """A request that joined the queue before its lookup is replayed, if it can be, whatever the limit says."""
    limit = Limit(1)
    async with session_on(service, limit, journal=VirtualJournal(tmp_path / "run.db")) as session:
        first = await session.generate("a cat")
        limit.error = InFlightLimitError("the database is away")
        replayed, new = session.enqueue("a cat"), session.enqueue("a dog")
        outcomes = [await queued.outcome() for queued in (replayed, new)]

    assert (outcomes[0].ok, outcomes[0].task_id, outcomes[0].replayed) == (True, first.task_id, True)
    assert isinstance(outcomes[1], Failed)
    assert isinstance(outcomes[1].error, InFlightLimitError)
    assert limit.held == 0


async def test_visitors_who_leave(service: Emulator) -> None:
    """Requests that are cancelled while they wait take no slot; a submitted one keeps its own until it ends."""
    limit = Limit(1)
    async with session_on(service, limit) as session:
        visits = [asyncio.ensure_future(session.generate(f"visitor {number}")) for number in range(3)]
        await anyio.sleep(1)
        for visit in visits:
            visit.cancel()
        await anyio.sleep(1)
        held = limit.held
        await anyio.sleep(10)

    assert (held, limit.held, sum(service.accepted.values())) == (1, 0, 1)


@pytest.mark.parametrize("drain", [0.0, 20.0])
async def test_closing(service: Emulator, drain: float) -> None:
    """Draining and closing give back everything; what waits isn't submitted any more."""
    limit = Limit(2)
    async with session_on(service, limit) as session:
        requests = [asyncio.ensure_future(session.generate(f"request {number}")) for number in range(4)]
        await anyio.sleep(1)
        await session.aclose(drain=drain)
        results = await asyncio.gather(*requests, return_exceptions=True)

    assert [isinstance(result, SessionClosedError) for result in results] == [not drain, not drain, True, True]
    assert limit.held == 0
    assert limit.calls == ["open", "close"]
    assert sum(service.accepted.values()) == 2


async def test_a_limit_that_fails_ends_a_stream(service: Emulator) -> None:
    """The error is that of generate(), and ends a stream after what was submitted already; nothing else is submitted."""
    limit = Limit(2)
    async with session_on(service, limit) as session:
        stream = session.stream(f"request {number}" for number in range(100))
        first = [await anext(stream)]
        limit.error = InFlightLimitError("the database is away")
        outcomes = [*first]
        with pytest.raises(InFlightLimitError, match="is away"):
            while True:
                outcomes.append(await anext(stream))
        with pytest.raises(InFlightLimitError, match="is away"):
            await session.generate("one more")

    assert sum(outcome.ok for outcome in outcomes) == sum(service.accepted.values()) <= 4
    assert limit.held == 0


async def test_a_limit_that_cannot_be_opened(scripted: ScriptedGateway, tmp_path: Path) -> None:
    """A session whose limit can't be opened isn't opened, and leaves nothing open."""
    limit = Limit()
    limit.error = InFlightLimitError("no such database")
    journal = VirtualJournal(tmp_path / "run.db")
    with pytest.raises(InFlightLimitError, match="no such database"):
        async with session_on(scripted, limit, journal=journal):
            raise AssertionError

    assert limit.calls == ["expect_adoption", "open", "close"]
    async with journal:
        pass  # it was not left open


@pytest.mark.parametrize("limit", [0, -3])
def test_a_limit_without_slots(limit: int) -> None:
    """A limit of one's own must have at least one slot."""
    with pytest.raises(ConfigurationError, match=r"max_in_flight\.limit must be an integer of at least 1, not"):
        FluxSession("key", max_in_flight=Limit(limit) if limit > 0 else make_limit(limit))


def make_limit(number: int) -> Limit:
    limit = Limit()
    limit._limit = number
    return limit


# ------------------------------------------------------------------ tasks that run already


async def submit_and_leave(gateway: ScriptedGateway, path: Path) -> None:
    """Leave a task in the journal that nobody follows."""
    gateway.polls.clear()
    gateway.polls.append(answer(200, {"id": "t1", "status": "in_progress"}))
    async with session_on(gateway, 1, journal=VirtualJournal(path)) as session:
        await session.submit(GenerationRequest("a cat", key="cat"))
    gateway.polls.clear()


Resume = Callable[[FluxSession], "asyncio.Future[object]"]


@pytest.mark.parametrize("by", ["generate", "attach"])
async def test_resumed_tasks_count(scripted: ScriptedGateway, tmp_path: Path, by: str) -> None:
    """A task that a session takes over from one that is gone counts from then to its end, above the limit if need be."""
    await submit_and_leave(scripted, tmp_path / "run.db")
    scripted.polls.append(answer(200, {"id": "t1", "status": "in_progress"}))
    limit = Limit(1)
    async with session_on(scripted, limit, journal=VirtualJournal(tmp_path / "run.db")) as session:
        await limit.acquire()
        request = GenerationRequest("a cat", key="cat")
        task = await session.submit(request) if by == "generate" else session.attach("t1")
        again = session.attach("t1")
        await anyio.sleep(3)
        held = limit.held
        scripted.polls[0] = answer(200, completed("t1"))
        assert (await task.outcome()).ok
        assert (await again.outcome()).ok

    assert (held, limit.held, limit.calls.count("occupy")) == (2, 1, 1)


async def test_attached_tasks_do_not_count(scripted: ScriptedGateway) -> None:
    """A task that is attached by its id alone may be another session's, which counts it."""
    limit = Limit(1)
    async with session_on(scripted, limit) as session:
        assert (await session.attach("t1").outcome()).ok

    assert limit.calls == ["open", "close"]


@pytest.mark.skipif(sys.version_info < (3, 12), reason="eager tasks require Python 3.12")
async def test_eager_tasks() -> None:
    """With eager asyncio tasks, a limit that grants a slot at once is asked for the next one, too."""
    asyncio.get_running_loop().set_task_factory(asyncio.eager_task_factory)  # type: ignore[attr-defined,unused-ignore]
    limit = Limit(1)
    queue = SharedSlotQueue(limit)
    for _ in range(3):
        await Request(queue).got
        queue.release()
    assert (limit.held, queue.held, queue.waiting) == (0, 0, 0)
