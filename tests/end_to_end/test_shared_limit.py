"""Four worker processes on an account that allows 24 tasks in flight: they use all of it, and never more."""

import sys
from collections import Counter
from contextlib import ExitStack, closing
from pathlib import Path

import pytest
from support.workers import Report, Worker, running_account

LIMIT = 24
OTHERS = ("w1", "w2", "w3")
IN_TURN = 8
"""Tasks of each small worker in which it is compared with the large one."""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no named pipes")
def test_workers_share_an_account(tmp_path: Path) -> None:
    """One has most visitors, another is killed, a third replaced while it drains: nothing is refused or paid twice."""
    with ExitStack() as stack, running_account(seconds=0.8, seed=1, pictures=False, max_in_flight=LIMIT) as account:

        def start(name: str, visitors: int) -> Worker:
            return stack.enter_context(closing(Worker(account, tmp_path, name, visitors)))

        workers = [start("w0", 90), *(start(name, 20) for name in OTHERS)]
        again, replacement = start("w3", 20), start("w4", 20)
        large, replaced, remaining, killed = workers
        large.begin()
        account.wait_until(lambda report: report.begun_by("w0") >= LIMIT)
        for worker in (replaced, remaining, killed):
            worker.begin()
        shared = account.wait_until(lambda report: min(report.begun_by(name) for name in OTHERS) >= IN_TURN)
        account.wait_until(lambda report: report.in_flight_of("w3") > 0)
        killed.kill()
        replaced.terminate()
        again.begin()
        replacement.begin()
        ends = [worker.ends() for worker in (large, remaining, again, replacement)]
        drained = replaced.ends()
        report = account.report()

    assert report.submits == len(report.tasks), "some were refused"
    assert set(report.accepted.values()) == {1}
    assert report.most_in_flight() == LIMIT
    assert_in_turn(shared)
    # What was on its way when the worker was killed is uncertain.
    results = Counter(end for worker in ends for end in worker.values())
    assert results["Completed"] + results["SubmissionUncertainError"] == 150 == results.total()
    assert results["SubmissionUncertainError"] <= LIMIT
    begun = report.begun_by("w1")
    assert sorted(drained.values()) == ["Completed"] * begun + ["SessionClosedError"] * (20 - begun)


def assert_in_turn(report: Report) -> None:
    """Check that the large worker had no more than its turns while the others had requests waiting."""
    workers = [prompt.partition(" ")[0] for prompt, _, _ in report.tasks]
    for name in OTHERS:
        begun = [number for number, worker in enumerate(workers) if worker == name]
        turns = Counter(workers[begun[0] : begun[IN_TURN - 1]])
        assert turns["w0"] <= 3 * IN_TURN, (name, turns)
