"""Cancelling a submit while it waits."""

import asyncio

import pytest

from flux2max_async import SessionClosedError
from flux2max_async._tasks.cancellation import SubmitCancellation

REASON = SessionClosedError("closed")


def new_future() -> "asyncio.Future[None]":
    return asyncio.get_running_loop().create_future()


async def test_a_cancelled_submit_stops_waiting() -> None:
    """The wait for a future ends with the reason, and the future is cancelled."""
    cancellation, future = SubmitCancellation(), new_future()
    asyncio.get_running_loop().call_soon(cancellation.cancel, REASON)
    with pytest.raises(SessionClosedError):
        await cancellation.wait_for(future)

    assert future.cancelled()
    assert not cancellation.revoke()


async def test_a_cancelled_task_is_not_a_cancelled_submit() -> None:
    """Who cancels the waiting task, or the future, gets a CancelledError, whether the submit is cancelled too or not."""
    for cancel_submit in (False, True):
        cancellation, future = SubmitCancellation(), new_future()
        waiting = asyncio.create_task(cancellation.wait_for(future))
        await asyncio.sleep(0)
        waiting.cancel()
        if cancel_submit:
            cancellation.cancel(REASON)
        await asyncio.wait([waiting])
        assert waiting.cancelled()

    cancellation, future = SubmitCancellation(), new_future()
    future.cancel()
    with pytest.raises(asyncio.CancelledError):
        await cancellation.wait_for(future)
