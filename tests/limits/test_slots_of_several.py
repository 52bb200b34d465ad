"""Slots that several sessions share, in this process and in others, in a file or in a database."""

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeAlias

import anyio
import pytest
from support.limits import A_WHILE, PATIENCE, Backend, Limit, acquire, is_free

from flux2max_async import ConfigurationError, InFlightLimit, InFlightLimitError
from flux2max_async._shared_limit.connection import LimitConnection
from flux2max_async._shared_limit.worker import LimitWorker

OpenLimit: TypeAlias = Callable[..., Awaitable[Limit]]


@pytest.fixture
def anyio_backend() -> str:
    """Use real time, in which the threads run."""
    return "asyncio"


# ------------------------------------------------------------------ counting


async def test_two_share(open_limit: OpenLimit) -> None:
    """Two that share a limit have its slots together, and each gets what the other gives back."""
    first, second = await open_limit(2), await open_limit(2)
    await acquire(first)
    await acquire(second)
    waits = [asyncio.ensure_future(acquire(limit)) for limit in (first, second)]
    await anyio.sleep(A_WHILE)
    assert not any(wait.done() for wait in waits)

    second.release()
    first.release()
    await asyncio.gather(*waits)
    assert not await is_free(first)


async def test_several_waits_of_one(open_limit: OpenLimit) -> None:
    """Waits of the same session end in their order."""
    other, limit, order = await open_limit(3), await open_limit(3), []
    for _ in range(3):
        await acquire(other)

    async def wait(number: int) -> None:
        await acquire(limit)
        order.append(number)

    async with asyncio.TaskGroup() as group:
        for number in range(3):
            group.create_task(wait(number))
        await anyio.sleep(A_WHILE)
        for _ in range(3):
            other.release()

    assert order == [0, 1, 2]


async def test_a_cancelled_wait_takes_no_slot(open_limit: OpenLimit) -> None:
    """A wait that is cancelled takes nothing, and leaves its place in the line."""
    first, second = await open_limit(), await open_limit()
    await acquire(first)
    cancelled = asyncio.ensure_future(second.acquire())
    await anyio.sleep(A_WHILE)
    cancelled.cancel()
    await asyncio.wait([cancelled])
    first.release()

    assert cancelled.cancelled()
    await acquire(first)
    first.release()
    await acquire(second)


@pytest.mark.parametrize("yields", range(4))
async def test_cancelled_in_the_moment_of_the_grant(open_limit: OpenLimit, yields: int) -> None:
    """A slot that comes while its wait is being cancelled is given back."""
    limit, other = await open_limit(), await open_limit()
    for delay in (0.0, 0.0002, 0.0005, 0.001, 0.002):
        wait = asyncio.ensure_future(limit.acquire())
        await asyncio.sleep(0)
        time.sleep(delay)  # noqa: ASYNC251 - so that the grant comes while the event loop is busy
        for _ in range(yields):
            await asyncio.sleep(0)
        wait.cancel()
        await asyncio.wait([wait])
        if not wait.cancelled():
            limit.release()
        await acquire(other)
        other.release()


async def test_cancelled_after_the_grant(backend: Backend) -> None:
    """A slot that was granted before its wait could notice that it is being cancelled is given back."""
    worker = LimitWorker(backend.connection())
    await worker.opened
    await worker.acquire()
    wait = asyncio.ensure_future(worker.acquire())
    await anyio.sleep(0.01)
    worker._held += 1  # as the thread does, and then
    worker._end_wait(worker._waiting[0])
    wait.cancel()
    await asyncio.wait([wait])

    assert (wait.cancelled(), worker._held) == (True, 1)
    worker.stop()
    await worker.stopped


async def test_cancelled_in_the_moment_of_a_failure(backend: Backend) -> None:
    """A wait that fails while it is being cancelled gives no slot back."""
    worker = LimitWorker(backend.connection())
    await worker.opened
    await worker.acquire()
    wait = asyncio.ensure_future(worker.acquire())
    await anyio.sleep(0.01)
    worker._waiting[0].set_exception(InFlightLimitError("the database is away"))
    wait.cancel()
    await asyncio.wait([wait])
    again = asyncio.ensure_future(worker.acquire())
    await anyio.sleep(A_WHILE)

    assert (wait.cancelled(), again.done()) == (True, False)
    worker.stop()
    await worker.stopped
    with pytest.raises(InFlightLimitError, match="was closed"):
        await again


async def test_closing_gives_everything_back(open_limit: OpenLimit) -> None:
    """Closing gives back all slots, ends waits with an error, and may be repeated; later releases do nothing."""
    first, second = await open_limit(2), await open_limit(2)
    first.occupy()
    await acquire(first)
    waits = [asyncio.ensure_future(first.acquire()), asyncio.ensure_future(acquire(second))]
    await anyio.sleep(A_WHILE)
    await first.close()
    await first.close()
    first.release()

    results = await asyncio.gather(*waits, return_exceptions=True)
    assert [type(result) for result in results] == [InFlightLimitError, type(None)]
    await acquire(second)
    await first.open()
    assert not await is_free(first)


async def test_states(backend: Backend) -> None:
    """A limit is opened once at a time, and not used before."""
    limit = backend.limit(3)
    with pytest.raises(InFlightLimitError, match="is not open"):
        await limit.acquire()
    limit.expect_adoption()
    await limit.open()
    with pytest.raises(InFlightLimitError, match=f"open already: each session needs a {type(limit).__name__} of"):
        await limit.open()
    await limit.close()

    assert limit.limit == 3
    assert repr(limit).startswith(f"{type(limit).__name__}('")
    assert isinstance(limit, InFlightLimit)


@pytest.mark.parametrize("limit", [0, -1, 1.5, "24", None, True])
def test_a_senseless_limit(backend: Backend, limit: int) -> None:
    """The number of slots is an integer of at least 1."""
    with pytest.raises(ConfigurationError, match="limit must be an integer of at least 1"):
        backend.limit(limit)


@pytest.mark.parametrize("waits", [False, True])
def test_an_event_loop_that_ends_without_closing(backend: Backend, waits: bool) -> None:
    """Its slots are given back, and the limit can be opened again."""
    limit = backend.limit()
    other = backend.limit()

    async def leave_open() -> None:
        await limit.open()
        await acquire(limit)
        if waits:
            task = asyncio.ensure_future(limit.acquire())
            await anyio.sleep(0.05)
            task.cancel()

    async def use() -> None:
        for opened in (limit, other):
            await opened.open()
        await acquire(other)
        for opened in (limit, other):
            await opened.close()

    asyncio.run(leave_open())
    asyncio.run(use())
    deadline = time.monotonic() + PATIENCE
    while any(thread.name.startswith("limit ") for thread in threading.enumerate()):
        assert time.monotonic() < deadline, "its thread has not ended"
        time.sleep(0.01)


async def test_a_session_that_is_cancelled_while_it_opens(backend: Backend) -> None:
    """Nothing is left of an opening that is cancelled."""
    opening = asyncio.ensure_future(backend.limit().open())
    await asyncio.sleep(0)
    opening.cancel()
    await asyncio.wait([opening])
    other = backend.limit()
    await other.open()
    await acquire(other)
    await other.close()

    assert opening.cancelled()


# ------------------------------------------------------------------ other processes

HOLDER = """
import asyncio, os, sys, time
from flux2max_async import PostgresInFlightLimit, SqliteInFlightLimit

async def main():
    kind, place, *schema = sys.argv[1:]
    limit = PostgresInFlightLimit(place, 1, schema=schema[0]) if schema else SqliteInFlightLimit(place, 1)
    await limit.open()
    await limit.acquire()
    if kind == "fork" and not os.fork():
        time.sleep(60)
        os._exit(0)
    print("ready", flush=True)
    await asyncio.sleep(60)

asyncio.run(main())
"""


@pytest.mark.parametrize("kind", ["plain", "fork"])
async def test_a_process_that_is_killed(backend: Backend, open_limit: OpenLimit, kind: str) -> None:
    """Its slots are free soon, also if a fork of it lives on."""
    limit = await open_limit()
    command = [sys.executable, "-W", "ignore", "-c", HOLDER, kind, *backend.arguments]
    # Blocking, because its pipe is read in a thread.
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:  # noqa: ASYNC220
        try:
            assert process.stdout is not None
            assert await asyncio.to_thread(process.stdout.readline) == "ready\n"
            wait = asyncio.ensure_future(acquire(limit))
            await anyio.sleep(A_WHILE)
            assert not wait.done()
            os.kill(process.pid, signal.SIGKILL)
            await wait
        finally:
            os.killpg(process.pid, signal.SIGKILL)


# ------------------------------------------------------------------ a database that fails


class FailingConnection:
    """A connection whose transactions fail while it is away."""

    check_interval = 0.01

    def __init__(self, connection: LimitConnection) -> None:
        self._connection = connection
        self.is_away = False
        self.on_granted: Callable[[], object] = lambda: None
        self.error_of_wait: Exception | None = None

    def __str__(self) -> str:
        return "far away"

    def update(self, held: int, *, waits: bool, adopted: int) -> bool:
        if self.is_away:
            raise OSError("away")
        granted = self._connection.update(held, waits=waits, adopted=adopted)
        if granted:
            self.on_granted()
        return granted

    def wait(self, seconds: float) -> None:
        self._connection.wait(seconds)
        error, self.error_of_wait = self.error_of_wait, None
        if error is not None:
            raise error

    def retry_delay(self) -> float:
        return 0.02

    def __getattr__(self, name: str) -> Any:
        return getattr(self._connection, name)


async def test_a_database_that_is_away_for_a_while(backend: Backend, caplog: pytest.LogCaptureFixture) -> None:
    """Waits go on once it can be used again; after so many seconds they fail. The log says both once."""
    connection = FailingConnection(backend.connection(3))
    worker = LimitWorker(connection, away_time=0.5)
    await worker.opened
    connection.is_away = True
    first = asyncio.ensure_future(worker.acquire())
    await anyio.sleep(0.1)
    assert not first.done()
    connection.is_away = False
    with anyio.fail_after(PATIENCE):
        await first
        connection.is_away = True
        for _ in range(2):  # the second one comes when it has been away for too long
            with pytest.raises(InFlightLimitError, match="can't be used: away"):
                await worker.acquire()
        connection.is_away = False
        await worker.acquire()
        connection.error_of_wait = OSError("lost")
        await worker.acquire()
    worker.stop()
    await worker.stopped

    messages = [record.getMessage().rpartition(": ")[2] for record in caplog.records]
    back = "it can be used again"
    assert messages == [
        "away; it is tried again",
        back,
        "away; it is tried again",
        back,
        "lost; it is tried again",
        back,
    ]


async def test_the_wait_fails_in_the_moment_of_the_grant(backend: Backend) -> None:
    """A slot that is granted when its wait has just failed is given back by the next transaction."""
    connection = FailingConnection(backend.connection(1))
    worker = LimitWorker(connection)
    await worker.opened

    async def fail() -> None:
        worker._away_since = 1.0
        worker._fail_waiting(1.0, InFlightLimitError("away"))

    loop = asyncio.get_running_loop()
    connection.on_granted = lambda: asyncio.run_coroutine_threadsafe(fail(), loop).result()
    with pytest.raises(InFlightLimitError, match="away"):
        await worker.acquire()
    connection.on_granted = lambda: None
    with anyio.fail_after(PATIENCE):
        await worker.acquire()
    worker.stop()
    await worker.stopped
