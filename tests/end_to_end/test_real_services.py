"""A thousand tasks at a service that answers in every way that services have been seen to answer."""

import random
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image
from support.virtual_time import VirtualJournal
from support.webhooks import running_inbox_server

from flux2max_async import (
    Completed,
    FluxError,
    FluxSession,
    GenerationRequest,
    Outcome,
    SubmissionUncertainError,
)
from flux2max_async.emulator import Emulator, Fault
from flux2max_async.journal import EntryState

TASKS = 1000
SHARE = 0.01
# A submit that meets one of these ends a stream by design, whose rest is then not sent.
ENDS_A_STREAM = {
    *(Fault.UNAUTHORIZED, Fault.PAYMENT_REQUIRED, Fault.FORBIDDEN, Fault.ERROR_MESSAGE, Fault.METHOD_NOT_ALLOWED),
    *(Fault.INSUFFICIENT_BALANCE, Fault.INSUFFICIENT_CREDITS, Fault.EXHAUSTED_BALANCE, Fault.IN_ARREARS),
    *(Fault.QUOTA_EXCEEDED, *(fault for fault in Fault if fault.startswith("balance_"))),
}
# The answer to a submit is lost, and the task exists.
LOST = (Fault.RESET_AFTER, Fault.HANG, Fault.CUT, Fault.GARBAGE, Fault.NO_ID)


def requests() -> list[GenerationRequest]:
    return [GenerationRequest(f"cat {number}", width=64, height=64, key=f"{number}") for number in range(TASKS)]


def whole_pictures(paths: list[Path]) -> int:
    """Decode pictures, and count them."""
    for path in paths:
        with Image.open(path) as picture:
            picture.load()
            assert picture.size == (64, 64)
    return len(paths)


async def test_all_answers_mixed(tmp_path: Path) -> None:
    """Each request has one outcome in each run and nothing is paid twice; each picture of a known task is on disk."""
    folder = tmp_path / "pictures"
    runs: list[Counter[str]] = []
    shares = {fault: SHARE for fault in Fault if fault not in ENDS_A_STREAM}
    async with Emulator(seconds=8.0, spread=0.4, seed=13, faults=shares, max_in_flight=TASKS) as gateway:
        fatal = [fault for fault in ENDS_A_STREAM for _ in range(round(SHARE * TASKS))]
        polls: list[Fault | None] = [*fatal, *[None] * (3 * TASKS)]
        random.Random(13).shuffle(polls)
        gateway.script("poll", *polls)
        unfinished = True
        while unfinished and len(runs) < 30:
            outcomes = await run(gateway, tmp_path, folder)
            runs.append(Counter(map(kind, outcomes)))
            assert len(outcomes) == len({outcome.request.key for outcome in outcomes if outcome.request})
            journal = VirtualJournal(tmp_path / "journal.db")
            entries = {entry.task_id: entry async for entry in journal.entries() if entry.task_id}
            drawn = {task.id for task in gateway.tasks.values() if task.fate == "completed"}
            known = drawn & entries.keys()
            # A run gives a task up if chance refuses its polls three times in a row; the next run follows it again.
            given_up = any(entries[task_id].state is EntryState.SUBMITTED for task_id in known)
            unfinished = bool(runs[-1]["refused"]) or given_up
        saved = {task_id: entries[task_id].paths for task_id in known}
        print("\n".join(map(str, runs)))
        print(f"accepted {gateway.accepted.total()}, drawn {len(drawn)}, of known ids {len(known)}")

    assert max(gateway.accepted.values()) == 1
    assert runs[-1]["refused"] == 0
    assert len(outcomes) == TASKS
    assert {entries[task_id].state for task_id in known} == {EntryState.COMPLETED}
    # By the faults' shares about 702 are known, give or take a few by the order in which answers come.
    assert whole_pictures([path for paths in saved.values() for path in paths]) >= len(known) > 0.65 * TASKS
    assert all(saved.values())


async def run(gateway: Emulator, folder: Path, pictures: Path) -> list[Outcome]:
    """Run the whole batch once; what stops it leaves the rest to the next run."""
    outcomes: list[Outcome] = []
    journal = VirtualJournal(folder / "journal.db")
    async with FluxSession(
        gateway.api_key, base_url=gateway.url, journal=journal, max_in_flight=50, http_timeout=5.0
    ) as session:
        try:
            async for outcome in session.stream(requests(), save_to=pictures):
                outcomes.append(outcome)
        except FluxError as error:
            print(f"stopped: {error}")
    return outcomes


def kind(outcome: Outcome) -> str:
    if isinstance(outcome, Completed):
        return "completed" if outcome.save_error is None else "unsaved"
    if isinstance(outcome.error, SubmissionUncertainError):
        return "uncertain"
    return "refused" if outcome.task_id is None else "failed"


@pytest.mark.parametrize("has_journal", [False, True])
async def test_lost_answers_with_webhooks(has_journal: bool, tmp_path: Path) -> None:
    """If a fifth of the answers to submits is lost and webhooks arrive, no picture is lost and none is paid twice."""
    rng = random.Random(7)
    async with (
        running_inbox_server() as server,
        Emulator(seconds=8.0, spread=0.4, seed=7, max_in_flight=TASKS, pictures=False) as gateway,
        FluxSession(
            gateway.api_key,
            base_url=gateway.url,
            webhooks=server.inbox,
            journal=VirtualJournal(tmp_path / "journal.db") if has_journal else None,
            max_in_flight=50,
            http_timeout=5.0,
        ) as session,
    ):
        faults = [rng.choice(LOST) if rng.random() < 0.2 else None for _ in range(TASKS)]
        gateway.script("submit", *faults)
        outcomes = [outcome async for outcome in session.stream(requests())]
        expected = session._parts.dispatcher.registry._expected if session._parts.dispatcher else None
        stats = session.stats
        lost = TASKS - faults.count(None)
        print(f"{lost} of {TASKS} answers lost; {stats}")

    assert lost > 150
    assert [outcome.ok for outcome in outcomes].count(True) == TASKS
    assert set(gateway.accepted.values()) == {1}
    assert gateway.accepted.total() == TASKS
    assert expected == {}
    assert (stats.submitted, stats.completed, stats.in_flight, stats.submitting) == (TASKS, TASKS, 0, 0)
