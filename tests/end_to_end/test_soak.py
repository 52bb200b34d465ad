"""A thousand tasks under all faults at once: every task ends, none is submitted twice, and nothing leaks."""

import asyncio
import gc
import logging
from collections import Counter
from pathlib import Path

import anyio
import pytest

from flux2max_async import (
    Completed,
    ContentModeratedError,
    FluxSession,
    SubmissionUncertainError,
    TaskFailedError,
    TaskNotFoundError,
)
from flux2max_async.emulator import Emulator, Fault

TASKS = 1000
FAULTS = {
    Fault.RATE_LIMITED: 0.03,
    Fault.SERVER_ERROR: 0.02,
    Fault.UNAVAILABLE: 0.03,
    Fault.RESET_BEFORE: 0.02,
    Fault.RESET_AFTER: 0.02,
    Fault.HANG: 0.01,
    Fault.CUT: 0.02,
    Fault.GARBAGE: 0.02,
    Fault.NOT_FOUND: 0.10,
}


DESCRIPTORS = Path("/proc/self/fd")


def open_sockets() -> int:
    # The descriptor that iterdir() itself uses is closed when is_socket() is called, which then returns False.
    return sum(entry.is_socket() for entry in DESCRIPTORS.iterdir())


@pytest.mark.skipif(not DESCRIPTORS.is_dir(), reason="counts sockets in /proc")
async def test_a_thousand_tasks_under_all_faults(caplog: pytest.LogCaptureFixture) -> None:
    """Each request has one outcome, and each completed task is delivered or reported as uncertain."""
    caplog.set_level(logging.ERROR, "flux2max_async")
    sockets, tasks = open_sockets(), asyncio.all_tasks()
    async with Emulator(
        seconds=8.0, spread=0.4, seed=11, faults=FAULTS, failing=0.02, moderated=0.01, pictures=False
    ) as gateway:
        # One answer to a submit in eight is lost: in one batch of 200, six in a row happen by chance, and end the stream.
        async with FluxSession(gateway.api_key, base_url=gateway.url, max_uncertain=None) as session:
            outcomes = [outcome async for outcome in session.stream(f"cat {n}" for n in range(TASKS))]
            stats = session.stats
        accepted = gateway.accepted
        fates = Counter(task.fate for task in gateway.tasks.values())
    await anyio.sleep(1)
    gc.collect()
    ends = Counter("completed" if outcome.ok else type(outcome.error).__name__ for outcome in outcomes)
    uncertain = {
        outcome.request.prompt
        for outcome in outcomes
        if not outcome.ok and isinstance(outcome.error, SubmissionUncertainError) and outcome.request
    }
    delivered = {outcome.request.prompt for outcome in outcomes if isinstance(outcome, Completed) and outcome.request}
    completed = {task.prompt for task in gateway.tasks.values() if task.fate == "completed"}

    assert len(outcomes) == TASKS
    assert len({outcome.request for outcome in outcomes}) == TASKS
    assert max(accepted.values()) == 1
    assert completed - delivered <= uncertain
    assert set(ends) == {"completed", "SubmissionUncertainError", "TaskFailedError", "ContentModeratedError"}
    assert ends["completed"] > 0.8 * TASKS
    assert ends["TaskFailedError"] <= fates["failed"]
    assert stats.in_flight == 0
    assert stats.submitted + ends["SubmissionUncertainError"] == TASKS
    assert asyncio.all_tasks() == tasks
    assert open_sockets() == sockets
    assert issubclass(ContentModeratedError, TaskFailedError)
    assert not any(isinstance(outcome.error, TaskNotFoundError) for outcome in outcomes if not outcome.ok)
