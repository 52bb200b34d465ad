"""Cancelling a submit while it waits."""

import asyncio

import pytest

from flux2max_async import SessionClosedError
from flux2max_async._tasks.cancellation import SubmitCancellation

REASON = SessionClosedError("closed")


async def test_a_cancelled_submit_stops_waiting() -> None:
    """What waits inside the guard ends with the reason, and then the cancellation can't be taken back."""
    cancellation = SubmitCancellation()
    asyncio.get_running_loop().call_later(1.0, cancellation.cancel, REASON)
    with pytest.raises(SessionClosedError, match="closed"):
        async with cancellation.guard():
            await asyncio.sleep(1_000)

    assert not cancellation.revoke()


async def test_a_cancelled_task_is_not_a_cancelled_submit() -> None:
    """Whoever cancels the waiting task causes a CancelledError, whether the submit is cancelled too or not."""

    async def wait(cancellation: SubmitCancellation) -> None:
        async with cancellation.guard():
            await asyncio.sleep(1_000)

    for cancel_submit in (False, True):
        cancellation = SubmitCancellation()
        waiting = asyncio.create_task(wait(cancellation))
        await asyncio.sleep(0)
        waiting.cancel()
        if cancel_submit:
            cancellation.cancel(REASON)
        await asyncio.wait([waiting])
        assert waiting.cancelled()


async def test_a_cancellation_that_is_taken_back() -> None:
    """A submit that doesn't wait goes on if its cancellation is taken back before it takes effect."""
    cancellation = SubmitCancellation()
    cancellation.cancel(REASON)
    revoked = cancellation.revoke()
    cancellation.raise_if_cancelled()
    cancellation.cancel(REASON)
    with pytest.raises(SessionClosedError, match="closed"):
        cancellation.raise_if_cancelled()

    assert revoked
    assert not cancellation.revoke()
