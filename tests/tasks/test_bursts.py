"""BurstLimiter and SharedResult: many calls at once, and many who wait for one result."""

import asyncio

from flux2max_async._tasks.bursts import BurstLimiter
from flux2max_async._tasks.shared_result import SharedResult


async def test_calls_that_begin_at_once() -> None:
    """At most 100 calls begin in one iteration of the event loop, in order; those that are cancelled begin never."""
    bursts, begun, sizes = BurstLimiter(), list[int](), list[int]()

    async def call(number: int) -> None:
        await bursts.wait()
        begun.append(number)

    calls = [asyncio.ensure_future(call(number)) for number in range(450)]
    await asyncio.sleep(0)
    for number in (50, 150, 250):
        calls[number].cancel()
    while not all(task.done() for task in calls):
        before = len(begun)
        await asyncio.sleep(0)
        sizes.append(len(begun) - before)

    assert begun == sorted(set(range(450)) - {50, 150, 250})
    assert max(sizes) <= 100
    await asyncio.sleep(0)
    await call(450)
    assert begun[-1] == 450


async def test_calls_that_end_at_once() -> None:
    """Functions are called later, in order, at most 100 in one iteration, beside calls that begin."""
    bursts, called = BurstLimiter(), list[int]()
    for number in range(250):
        bursts.call_later(lambda number=number: called.append(number))  # type: ignore[misc]
    at_once, sizes, begun = len(called), list[int](), list[asyncio.Task[None]]()
    while len(called) < 250:
        before = len(called)
        begun.append(asyncio.create_task(bursts.wait()))
        await asyncio.sleep(0)
        sizes.append(len(called) - before)
    await asyncio.gather(*begun)

    assert at_once == 0
    assert called == list(range(250))
    assert max(sizes) <= 100


async def test_a_result_for_many() -> None:
    """Each wait gets the result, a cancelled one affects no other, and the first result stands."""
    shared = SharedResult[int]()
    waits = [asyncio.ensure_future(shared.wait()) for _ in range(3)]
    futures = [shared.future(), shared.future()]
    await asyncio.sleep(0)
    waits[1].cancel()
    futures[0].cancel()
    await asyncio.sleep(0)
    before = shared.done()
    shared.set_result(1)
    shared.set_result(2)
    shared.discard(futures[1])
    results = await asyncio.gather(*waits, *futures, return_exceptions=True)

    assert not before
    assert [result for result in results if not isinstance(result, BaseException)] == [1, 1, 1]
    assert waits[1].cancelled()
    assert shared.done()
    assert (shared.result(), await shared.wait(), await shared.future()) == (1, 1, 1)


async def test_a_cancelled_wait_leaves_nothing_behind() -> None:
    """Whoever asks again and again, for a short time each, costs no memory."""
    shared = SharedResult[int]()
    for _ in range(100):
        wait = asyncio.ensure_future(shared.wait())
        await asyncio.sleep(0)
        wait.cancel()
        await asyncio.wait([wait])

    assert not shared._waiting
