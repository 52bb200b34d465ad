"""A gateway that answers a third of all requests honestly, and the rest with everything that an attacker may try."""

import json
import os
import shutil
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from support.hostile import KINDS, PAID_KINDS, kind_of
from support.hostile_client import PUBLIC, UNREACHABLE
from support.hostile_gateway import Totals, make_certificate, running_hostile_gateway

pytestmark = [
    pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="measures memory in /proc"),
    pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the gateway's certificate"),
]

BUDGET = Decimal(33)
PRICE = Decimal("0.07")
MAX_GROWTH = 64 * 1024 * 1024
"""Bytes of memory."""
MAX_STALL = 0.2
"""Seconds of processor time on a machine that does `reference_time()` in `REFERENCE` seconds."""
REFERENCE = 0.05
MAX_LOG = 1_000_000
Run = tuple[dict[str, Any], Totals, Path]
"""The client's report, the gateway's totals, and the folder around everything that the client may write."""


@pytest.fixture
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """Run the client against the gateway, and provide what came of it."""
    folder = tmp_path_factory.mktemp("hostile")
    for name in ("journal", "logs", "cwd", "tmp", "home"):
        (folder / name).mkdir()
    certificate = make_certificate(tmp_path_factory.mktemp("certificate"))
    # Measuring coverage would be most of what is measured here.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE")}
    paths = [str(Path(__file__).parents[1]), environment.get("PYTHONPATH", "")]
    environment |= {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "PYTHONDONTWRITEBYTECODE": "1",
        "SSL_CERT_FILE": str(certificate),
        "HOME": str(folder / "home"),
        "TMPDIR": str(folder / "tmp"),
        # glibc raises both by itself, and then keeps tens of megabytes of what was freed.
        "MALLOC_MMAP_THRESHOLD_": "131072",
        "MALLOC_TRIM_THRESHOLD_": "131072",
    }
    with running_hostile_gateway(certificate) as gateway:
        ports = gateway.ports
        arguments = [str(folder), str(ports.tls), str(ports.private), "key-that-must-not-leak", str(BUDGET)]
        done = subprocess.run(
            [sys.executable, "-W", "error", "-m", "support.hostile_client", *arguments],
            cwd=folder / "cwd",
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-5000:]
        yield json.loads(done.stdout), gateway.totals(), folder


def check_each_answer_has_its_outcome(run: Run) -> None:
    """Honest tasks are saved, and each hostile answer costs its own request alone what it has to."""
    report, totals, _ = run
    ends: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for outcome in report["outcomes"]:
        ends[kind_of(outcome["prompt"])][outcome["end"]] += 1
    wrong = {name: dict(counts) for name, counts in ends.items() if not counts.keys() <= KINDS[name].expected}
    lengths = {outcome["prompt"]: outcome["error_length"] for outcome in report["outcomes"]}
    many = [outcome for outcome in report["outcomes"] if kind_of(outcome["prompt"]) == "many_pictures"]
    print(f"{len(report['outcomes'])} requests of {len(KINDS)} kinds; {totals.accepted.total()} submits")

    assert report["failure"] is None
    assert len(report["outcomes"]) == sum(kind.count for kind in KINDS.values())
    assert wrong == {}
    assert max(totals.accepted.values()) == 1
    assert [outcome["journal_error"] for outcome in report["outcomes"] if outcome["journal_error"]] == []
    assert {prompt: length for prompt, length in lengths.items() if length > 2000} == {}
    assert [(len(outcome["saved"]), outcome["partial"]) for outcome in many] == [(64, True)] * len(many)


def check_budget_holds(run: Run) -> None:
    """Whatever the service says that a task has cost, the budget ends the batch."""
    report, totals, _ = run
    costs = Counter(outcome["cost"] for outcome in report["outcomes"] if outcome["end"] in {"saved", "unsaved"})
    completed = sum(count for prompt, count in totals.accepted.items() if kind_of(prompt) in PAID_KINDS)
    print(f"{completed} tasks were paid for, at most {BUDGET / PRICE:.0f} are allowed")

    assert costs.keys() <= {None, "0.07"}
    assert report["stopped"] is not None
    assert report["refused"] is not None
    assert completed * PRICE <= BUDGET


def check_private_addresses_are_never_contacted(run: Run) -> None:
    """No picture comes from an address that only this machine or its network has, however it is spelled."""
    report, totals, _ = run

    assert set(report["contacted"]) <= {PUBLIC, UNREACHABLE}
    assert totals.private_connections == 0


def check_memory_is_bounded(run: Run) -> None:
    """The client never takes more than 64 MiB above what it has taken for honest tasks."""
    report, _, _ = run
    print(f"at most {report['peak'] / 2**20:.0f} MiB more, {report['growth'] / 2**20:.0f} MiB at the end")

    assert report["peak"] <= MAX_GROWTH


def check_event_loop_is_never_stalled(run: Run) -> None:
    """No answer keeps the event loop from everything else for more than 0.2 s."""
    report, _, _ = run
    limit = MAX_STALL * max(1.0, report["reference"] / REFERENCE)
    print(f"at most {report['stall']:.3f} s, {limit:.3f} s are allowed; reference {report['reference']:.3f} s")

    assert report["stall"] <= limit


def check_logs_are_short_and_harmless(run: Run) -> None:
    """The whole log stays under 1 MB, and no message holds a line end, an escape sequence or a bidi control."""
    report, _, folder = run
    size = (folder / "logs" / "client.log").stat().st_size
    print(f"{size} bytes of logs, the longest message has {report['longest_message']} characters")

    assert report["bad_messages"] == []
    assert size < MAX_LOG
    assert "key-that-must-not-leak" not in (folder / "logs" / "client.log").read_text(encoding="utf-8")


def check_only_pictures_are_written(run: Run) -> None:
    """Nothing is written outside `save_to` and the journal's folder, and there only whole pictures under plain names."""
    report, _, folder = run
    names = {name for outcome in report["outcomes"] for name in outcome["saved"]}
    written = list((folder / "pictures").rglob("*"))
    for path in written:
        with Image.open(path, formats=("JPEG", "PNG", "WEBP", "GIF", "AVIF")) as image:
            image.load()
    outside = [
        path.relative_to(folder)
        for path in folder.rglob("*")
        if not path.is_relative_to(folder / "pictures") and not path.is_relative_to(folder / "journal")
    ]

    assert names <= {path.name for path in written}
    assert all(path.parent == folder / "pictures" for path in written)
    assert all(path.name.isprintable() and not path.name.startswith(".") for path in written)
    assert {str(path) for path in outside} == {"pictures", "journal", "logs", "logs/client.log", "cwd", "tmp", "home"} - {
        "pictures", "journal",
    }  # fmt: skip
    assert {path.name for path in (folder / "journal").iterdir()} <= {"run.db", "run.db-wal", "run.db-shm"}


CHECKS = (
    check_each_answer_has_its_outcome,
    check_budget_holds,
    check_private_addresses_are_never_contacted,
    check_memory_is_bounded,
    check_event_loop_is_never_stalled,
    check_logs_are_short_and_harmless,
    check_only_pictures_are_written,
)


def test_hostile_gateway(run: Run) -> None:
    """A session survives the hostile gateway in one run, in every respect."""
    errors: list[AssertionError] = []
    for check in CHECKS:
        try:
            check(run)
        except AssertionError as error:
            errors.append(error)
    if errors:
        raise ExceptionGroup(f"{len(errors)} of {len(CHECKS)} checks failed", errors)
