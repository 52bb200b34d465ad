"""Batches that are killed with SIGKILL: the gateway counts which tasks were accepted."""

import json
import random
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image
from support.processes import ProcessGroup, kill, requests, running_gateway, wait_for

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL doesn't exist")

KILLS = 50


def count_images(folder: Path) -> int:
    """Count the files in a folder, and check that each of them is a complete image."""
    paths = list(folder.iterdir())
    for path in paths:
        with Image.open(path) as image:
            image.load()
    return len(paths)


def test_a_batch_survives_fifty_kills(tmp_path: Path) -> None:
    """A batch of 200 that is killed 50 times submits each request at most once, and ends with one outcome for each."""
    rng = random.Random(4)
    count, report = 200, tmp_path / "report.json"
    killed = 0
    with running_gateway(seconds=0.3, spread=0.2, seed=4) as gateway, ProcessGroup() as processes:
        arguments = (gateway.url, gateway.api_key, tmp_path, count, 8, report)
        while killed < KILLS:
            pid = processes.start(*arguments)
            # On a slow machine, too, most of the requests get beyond their submit before the last kill.
            time.sleep(rng.uniform(0.02, 0.6))
            killed += kill(pid)
        report.unlink(missing_ok=True)
        wait_for(processes.start(*arguments), 60)
        accepted, calls = gateway.counts()
    outcomes = json.loads(report.read_text(encoding="utf-8"))
    ends = Counter(outcome["end"] for outcome in outcomes)
    uncertain = {outcome["prompt"] for outcome in outcomes if outcome["end"] == "SubmissionUncertainError"}
    lost = uncertain & accepted.keys()
    replayed = sum(outcome["replayed"] for outcome in outcomes)
    print(f"{killed} kills; {dict(ends)}, {replayed} of them before the last run; {dict(calls)};", end=" ")
    print(f"{accepted.total()} tasks accepted, {len(lost)} of them reported as uncertain")

    assert max(accepted.values()) == 1
    assert Counter(outcome["prompt"] for outcome in outcomes) == Counter(request.prompt for request in requests(count))
    assert ends.keys() <= {"completed", "TaskFailedError", "SubmissionUncertainError"}
    assert accepted.total() == ends["completed"] + ends["TaskFailedError"] + len(lost)
    # On a busy machine more submits are on the wire at a kill, and uncertain.
    assert ends["completed"] > 0.5 * count
    assert {outcome["save_error"] for outcome in outcomes} == {None}
    assert len({path for outcome in outcomes for path in outcome["saved"]}) == ends["completed"]
    assert count_images(tmp_path / "images") == ends["completed"]


def test_four_processes_share_a_journal(tmp_path: Path) -> None:
    """Four processes with the same 400 requests submit each once; one is killed, and the others finish its tasks."""
    count = 400
    reports = [tmp_path / f"report {number}.json" for number in range(4)]
    with running_gateway(seconds=0.2, spread=0.2, seed=5) as gateway, ProcessGroup() as processes:
        pids = [processes.start(gateway.url, gateway.api_key, tmp_path, count, 6, report) for report in reports]
        time.sleep(1.5)
        killed = kill(pids[0])
        for pid in pids[1:]:
            wait_for(pid, 90)
        accepted, calls = gateway.counts()
    batches = [json.loads(report.read_text(encoding="utf-8")) for report in reports[1:]]
    ends = [Counter(outcome["end"] for outcome in outcomes) for outcomes in batches]
    tasks = {outcome["task_id"] for outcomes in batches for outcome in outcomes if outcome["task_id"]}
    print([dict(counts) for counts in ends], dict(calls), f"{accepted.total()} tasks accepted")

    assert killed
    assert not reports[0].exists()
    assert max(accepted.values()) == 1
    for outcomes, counts in zip(batches, ends, strict=True):
        assert Counter(outcome["prompt"] for outcome in outcomes) == Counter(
            request.prompt for request in requests(count)
        )
        assert counts == ends[0]
        assert {outcome["save_error"] for outcome in outcomes} == {None}
    assert ends[0].keys() <= {"completed", "TaskFailedError", "SubmissionUncertainError"}
    assert len(tasks) == ends[0]["completed"] + ends[0]["TaskFailedError"]
    assert accepted.total() - len(tasks) <= ends[0]["SubmissionUncertainError"]
    assert count_images(tmp_path / "images") == ends[0]["completed"]
