"""Batches that are killed: real processes and SIGKILL, and the gateway's own books to tell what was paid."""

import json
import random
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image
from support.processes import ProcessGroup, kill, requests, running_gateway, wait_for

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="kills with SIGKILL")

KILLS = 50


def whole_pictures(folder: Path) -> int:
    """Count the files, each of which has to be a whole picture."""
    names = list(folder.iterdir())
    for name in names:
        with Image.open(name) as picture:
            picture.load()
    return len(names)


def test_a_batch_survives_fifty_kills(tmp_path: Path) -> None:
    """Killed at 50 random moments, a batch of 200 pays for each request once at most, and has one outcome for each."""
    chance = random.Random(4)
    count, report = 200, tmp_path / "report.json"
    killed = 0
    with running_gateway(seconds=0.3, spread=0.2, seed=4) as gateway, ProcessGroup() as nursery:
        arguments = (gateway.url, gateway.api_key, tmp_path, count, 8, report)
        while killed < KILLS:
            process = nursery.start(*arguments)
            time.sleep(chance.uniform(0.02, 0.3))
            killed += kill(process)
        report.unlink(missing_ok=True)
        wait_for(nursery.start(*arguments), 60)
        accepted, calls = gateway.counts()
    told = json.loads(report.read_text(encoding="utf-8"))
    ends = Counter(outcome["end"] for outcome in told)
    paid_for_nothing = {
        outcome["prompt"] for outcome in told if outcome["end"] == "SubmissionUncertainError"
    } & accepted.keys()
    replayed = sum(outcome["replayed"] for outcome in told)
    print(f"{killed} kills; {dict(ends)}, {replayed} of them before the last run; {dict(calls)};", end=" ")
    print(f"{accepted.total()} tasks accepted, {len(paid_for_nothing)} of them reported as uncertain")

    assert max(accepted.values()) == 1
    assert Counter(outcome["prompt"] for outcome in told) == Counter(request.prompt for request in requests(count))
    assert ends.keys() <= {"completed", "TaskFailedError", "SubmissionUncertainError"}
    assert accepted.total() == ends["completed"] + ends["TaskFailedError"] + len(paid_for_nothing)
    assert ends["completed"] > 0.7 * count
    assert {outcome["trouble"] for outcome in told} <= {"None", "False"}
    assert len({path for outcome in told for path in outcome["saved"]}) == ends["completed"]
    assert whole_pictures(tmp_path / "pictures") == ends["completed"]


def test_four_processes_share_a_journal(tmp_path: Path) -> None:
    """Four processes with the same 400 requests pay for each once; one is killed, and the others end what it began."""
    count = 400
    reports = [tmp_path / f"report {number}.json" for number in range(4)]
    with running_gateway(seconds=0.2, spread=0.2, seed=5) as gateway, ProcessGroup() as nursery:
        processes = [nursery.start(gateway.url, gateway.api_key, tmp_path, count, 6, report) for report in reports]
        time.sleep(1.5)
        killed = kill(processes[0])
        for process in processes[1:]:
            wait_for(process, 90)
        accepted, calls = gateway.counts()
    told = [json.loads(report.read_text(encoding="utf-8")) for report in reports[1:]]
    ends = [Counter(outcome["end"] for outcome in one) for one in told]
    tasks = {outcome["task_id"] for one in told for outcome in one if outcome["task_id"]}
    print([dict(one) for one in ends], dict(calls), f"{accepted.total()} tasks accepted")

    assert killed
    assert not reports[0].exists()
    assert max(accepted.values()) == 1
    for one, end in zip(told, ends, strict=True):
        assert Counter(outcome["prompt"] for outcome in one) == Counter(request.prompt for request in requests(count))
        assert end == ends[0]
        assert {outcome["trouble"] for outcome in one} <= {"None", "False"}
    assert ends[0].keys() <= {"completed", "TaskFailedError", "SubmissionUncertainError"}
    assert len(tasks) == ends[0]["completed"] + ends[0]["TaskFailedError"]
    assert accepted.total() - len(tasks) <= ends[0]["SubmissionUncertainError"]
    assert whole_pictures(tmp_path / "pictures") == ends[0]["completed"]
