"""Batches that are interrupted: processes of their own, real signals, and the same command afterwards."""

import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import attrs
import pytest
from PIL import Image
from support.commands import Command, finish, start

from flux2max_async.emulator import Emulator

pytestmark = [
    pytest.mark.usefixtures("empty_folder"),
    pytest.mark.skipif(sys.platform == "win32", reason="signals can't be sent to one process alone"),
]

Service = Callable[..., Emulator]
SMALL = ("--width", "64", "--height", "64")


@attrs.define
class Batch:
    """A batch that runs in a process of its own."""

    process: "subprocess.Popen[str]"
    said: list[str]
    """The lines on stderr so far."""
    reader: threading.Thread

    def wait_for(self, pattern: str, seconds: float = 20.0) -> re.Match[str]:
        """Wait until a line says something."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            for line in self.said:
                if match := re.search(pattern, line):
                    return match
            time.sleep(0.01)
        raise AssertionError(f"nothing like {pattern!r} in {self.said}")

    def end(self) -> int:
        code = self.process.wait(timeout=30)
        self.reader.join(10)
        return code


@pytest.fixture
def batch() -> Iterator[Callable[..., Batch]]:
    """Starts batches, and sees to it that none outlives its test."""
    running: list[Batch] = []

    def begin(*arguments: str) -> Batch:
        process = start("batch", *arguments, cwd=Path())
        said: list[str] = []
        assert process.stderr is not None
        reader = threading.Thread(target=_read, args=(process.stderr, said))
        reader.start()
        running.append(Batch(process, said, reader))
        return running[-1]

    yield begin
    for one in running:
        with one.process:
            one.process.kill()
        one.reader.join()


def _read(stream: IO[str], said: list[str]) -> None:
    said.extend(iter(stream.readline, ""))


def sheet_of(count: int) -> str:
    Path("prompts.txt").write_text("".join(f"picture {number}\n" for number in range(count)), encoding="utf-8")
    return "prompts.txt"


def states() -> Counter[str]:
    lines = Path("flux2max-prompts/results.jsonl").read_text(encoding="utf-8").splitlines()
    return Counter(json.loads(line)["state"] for line in lines)


def until(condition: Callable[[], object], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_waits_for_what_is_in_flight(
    batch: Callable[..., Batch], flux2max: Command, service: Service, number: signal.Signals
) -> None:
    """Ctrl-C and SIGTERM stop submitting, say how many are in flight, and wait for those; the next run goes on."""
    gateway = service(seconds=3.0)
    run = batch(sheet_of(6), *SMALL, "--max-in-flight", "3")
    until(lambda: len(gateway.tasks) == 3)
    run.process.send_signal(number)
    said = run.wait_for(r"nothing more is submitted; waiting for (\d) pictures in flight")
    code = run.end()
    stopped = states()
    more = flux2max("batch", "prompts.txt", *SMALL)

    assert said[1] == "3"
    assert code == 128 + number
    assert stopped == {"completed": 3, "waiting": 3}
    assert run.said[-1] == "to go on: flux2max batch prompts.txt --width 64 --height 64 --max-in-flight 3\n"
    assert more.code == 0
    assert gateway.accepted.total() == len(gateway.accepted) == 6


def test_the_second_signal_leaves_at_once(batch: Callable[..., Batch], flux2max: Command, service: Service) -> None:
    """Ctrl-C twice leaves what is in flight; the next run follows it and pays for nothing twice."""
    gateway = service(seconds=18.0)
    run = batch(sheet_of(4), *SMALL, "--max-in-flight", "3")
    plain = run.wait_for(r"^0 done, 0 failed, 3 in flight, 1 waiting; \$0\.00 spent, \d+\.\d polls a task$")
    run.process.send_signal(signal.SIGINT)
    run.wait_for("nothing more is submitted")
    again = time.monotonic()
    run.process.send_signal(signal.SIGTERM)
    code = run.end()
    took = time.monotonic() - again
    stopped = states()
    page = Path("flux2max-prompts/index.html").read_text(encoding="utf-8")
    inside = flux2max("journal", "flux2max-prompts")
    more = flux2max("batch", "prompts.txt", *SMALL)

    assert plain
    assert sum("in flight, " in line for line in run.said) == 1
    assert code == 128 + signal.SIGINT
    assert took < 10
    assert stopped == {"submitted": 3, "waiting": 1}
    assert page.count(">running<") == 3
    assert "data-running" not in page
    assert inside.out.count("\nrunning: ") == 3
    assert more.code == 0
    assert more.err.startswith("4 pictures: 3 running, 1 to be submitted")
    assert gateway.accepted.total() == len(gateway.accepted) == 4


def test_a_signal_before_anything_is_in_flight(batch: Callable[..., Batch], service: Service) -> None:
    """Where the service lets nothing in, the first signal is enough."""
    gateway = service(max_in_flight=0)
    run = batch(sheet_of(2), *SMALL)
    until(lambda: gateway.calls["submit"])
    time.sleep(0.3)  # a refusal is a pause of a second at least
    run.process.send_signal(signal.SIGINT)
    run.wait_for("nothing more is submitted; nothing is in flight")

    assert run.end() == 128 + signal.SIGINT
    assert states()["completed"] == 0
    assert not gateway.tasks


@pytest.mark.parametrize("what", ["stdout", "stderr", "both"])
def test_signals_count_though_nobody_listens(service: Service, what: str) -> None:
    """Whoever reads what is said may be gone: the first signal still stops it, and all that there is is saved."""
    gateway = service(seconds=1.5)
    process = start("batch", sheet_of(20), *SMALL, "--max-in-flight", "2", cwd=Path())
    until(lambda: len(gateway.tasks) == 2)
    for name in ("stdout", "stderr"):
        if what in {name, "both"}:
            getattr(process, name).close()
            setattr(process, name, io.StringIO())
    process.send_signal(signal.SIGTERM)
    run = finish(process)
    paid = gateway.accepted.total()

    assert run.code == 128 + signal.SIGTERM
    assert 2 <= paid < 15
    assert states() == {"completed": paid, "waiting": 20 - paid}
    assert "data-running" not in Path("flux2max-prompts/index.html").read_text(encoding="utf-8")


def test_a_reader_who_does_not_read(batch: Callable[..., Batch], service: Service) -> None:
    """A full pipe holds up neither polls nor signals: all is paid for once, saved, and left by the second Ctrl-C."""
    service(seconds=0.1)
    extra = "x" * 3000
    Path("prompts.txt").write_text("".join(f"{number} {extra}\n" for number in range(40)), encoding="utf-8")
    run = batch("prompts.txt", *SMALL, "--json")
    until(lambda: Path("flux2max-prompts/results.jsonl").exists() and states()["completed"] == 40)
    busy = run.process.poll() is None
    run.process.send_signal(signal.SIGINT)
    run.wait_for("nothing is in flight")
    run.process.send_signal(signal.SIGINT)
    code = run.end()

    assert busy
    assert code == 128 + signal.SIGINT  # not all was delivered
    assert states() == {"completed": 40}
    assert run.said[-1].startswith("40 of 40 pictures in ")


def test_a_reader_of_both_who_does_not_read(service: Service) -> None:
    """Where outcomes and all else go down one pipe that is full, polls and signals go on, too."""
    service(seconds=0.1)
    extra = "x" * 3000
    Path("prompts.txt").write_text("".join(f"{number} {extra}\n" for number in range(40)), encoding="utf-8")
    command = [sys.executable, "-W", "error", "-m", "flux2max_async.cli", "batch", "prompts.txt", *SMALL, "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    until(lambda: Path("flux2max-prompts/results.jsonl").exists() and states()["completed"] == 40)
    for _ in range(2):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
    with process:
        code = process.wait(timeout=20)

    assert code == 128 + signal.SIGTERM
    assert states() == {"completed": 40}


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="terminals aren't closed like this")
def test_a_terminal_that_is_closed(service: Service) -> None:
    """A terminal that goes away is a signal to stop, and what is in flight is saved."""
    pty = pytest.importorskip("pty", reason="there are no pseudo terminals here")
    gateway = service(seconds=1.5)
    command = [sys.executable, "-W", "error", "-m", "flux2max_async.cli", "batch", sheet_of(20), *SMALL, "--yes"]
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [*command, "--max-in-flight", "2"], stdin=slave, stdout=slave, stderr=slave, start_new_session=True
    )
    os.close(slave)
    until(lambda: len(gateway.tasks) == 2)
    process.send_signal(signal.SIGHUP)
    os.close(master)
    code = process.wait(timeout=30)
    paid = gateway.accepted.total()

    assert code == 128 + signal.SIGHUP
    assert 2 <= paid < 15
    assert states() == {"completed": paid, "waiting": 20 - paid}


@pytest.mark.parametrize("arguments", [("--dry-run",), ("--dry-run", "--json"), ("--json",), ()])
def test_a_disk_that_is_full(service: Service, arguments: tuple[str, ...]) -> None:
    """What can't be written to standard output is told in a line, and is no success; no picture is lost for it."""
    gateway = service()
    command = [sys.executable, "-W", "error", "-m", "flux2max_async.cli", "batch", sheet_of(2), *SMALL, *arguments]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)

    assert done.returncode == (1 if arguments else 0)
    assert "No space left on device" in done.stderr
    assert "Traceback" not in done.stderr
    assert gateway.accepted.total() == (0 if "--dry-run" in arguments else 2)


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_what_was_closed_by_who_started_it(service: Service, closed: str) -> None:
    """A batch runs without a standard input, output or error."""
    gateway = service()
    command = f"{shlex.quote(sys.executable)} -W error -m flux2max_async.cli batch {sheet_of(1)} --width 64 {closed}"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)

    assert done.returncode == 0
    assert gateway.accepted.total() == 1
    assert "Traceback" not in done.stderr


def test_a_terminal_of_few_letters(service: Service) -> None:
    """What a terminal can't show is written as an escape, and ends nothing."""
    service()
    Path("prompts.txt").write_text("ein Bär [fail]\n", encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "flux2max_async.cli", "batch", "prompts.txt", *SMALL],
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        check=False,
    )

    assert done.returncode == 1
    assert b"(ein B\\xe4r [fail])" in done.stdout


def test_a_reader_who_leaves(service: Service) -> None:
    """When nobody reads the outcomes any more, nothing more is submitted; what is in flight is saved."""
    gateway = service(seconds=1.0)
    process = start("batch", sheet_of(12), *SMALL, "--max-in-flight", "2", "--json", cwd=Path())
    assert process.stdout is not None
    first = json.loads(process.stdout.readline())
    process.stdout.close()
    process.stdout = io.StringIO()
    run = finish(process)
    paid = gateway.accepted.total()

    assert first["state"] == "completed"
    assert run.code == 1
    assert "can't write to standard output" in run.err
    assert paid < 12
    assert states() == {"completed": paid, "waiting": 12 - paid}


def test_the_page_is_there_while_it_runs(batch: Callable[..., Batch], service: Service) -> None:
    """Results and page are written from the beginning on, and anew as pictures come; neither is ever half-written."""
    service(seconds=4.0, spread=0.5, seed=1)
    run = batch(sheet_of(8), *SMALL)
    pages: set[str] = set()
    results: set[int] = set()
    ended = False
    while not ended:
        ended = run.process.poll() is not None  # and a last look after that
        for name in ("index.html", "results.jsonl"):
            try:
                text = Path("flux2max-prompts", name).read_text(encoding="utf-8")
            except FileNotFoundError:
                continue
            if name == "index.html":
                pages.add(text)
            else:
                results.add(len([json.loads(line) for line in text.splitlines()]))
        time.sleep(0.01)

    assert run.end() == 0
    assert len(pages) >= 3
    assert all(page.startswith("<!DOCTYPE html>") and page.endswith("</html>\n") for page in pages)
    assert sum("data-running" not in page for page in pages) == 1
    assert results == {8}


def test_two_batches_in_one_folder(batch: Callable[..., Batch], flux2max: Command, service: Service) -> None:
    """Each follows its own lines and pays again for nothing of the other's; both show all that the journal knows."""
    gateway = service(seconds=6.0)
    Path("a.txt").write_text("a dog [fail]\na cat\n", encoding="utf-8")
    Path("b.txt").write_text("an owl\n", encoding="utf-8")
    first = batch("a.txt", *SMALL, "--out", "both")
    until(lambda: len(gateway.tasks) == 2)
    second = flux2max("batch", "b.txt", *SMALL, "--out", "both", "--retry-failed", "--task-timeout", "60")
    rows = [json.loads(line) for line in Path("both/results.jsonl").read_text(encoding="utf-8").splitlines()]
    code = first.end()
    after = [json.loads(line) for line in Path("both/results.jsonl").read_text(encoding="utf-8").splitlines()]

    assert second.code == 0
    assert second.err.startswith("1 picture: 1 to be submitted")
    assert {row["prompt"] for row in rows} == {"an owl", "a dog [fail]", "a cat"}
    assert code == 1
    assert {row["prompt"]: row["state"] for row in after} == {
        "a dog [fail]": "failed", "a cat": "completed", "an owl": "completed",
    }  # fmt: skip
    assert set(gateway.accepted.values()) == {1}


PROMPTS = 500


def test_a_batch_survives_its_user(batch: Callable[..., Batch], flux2max: Command, service: Service) -> None:
    """500 lines on a service with faults, killed twice, stopped by a budget that is raised, are paid once at most."""
    faults = {"server_error": 0.005, "reset_after": 0.005, "unavailable": 0.02, "garbage": 0.02, "rate_limited": 0.002}
    gateway = service(seconds=0.4, spread=0.3, seed=6, failing=0.05, time_scale=2.0, max_in_flight=60, faults=faults)
    command = (sheet_of(PROMPTS), *SMALL, "--max-in-flight", "24")
    for seconds in (2.5, 3.0):
        killed = batch(*command, "--budget", "30")
        time.sleep(seconds)
        killed.process.send_signal(signal.SIGKILL)
        assert killed.end() == -signal.SIGKILL
    limited = batch(*command, "--budget", "20")
    stopped = limited.end()
    spent = sum(task.cost for task in gateway.tasks.values() if task.fate == "completed")
    last = flux2max("batch", *command, "--budget", "50")
    rows = [json.loads(line) for line in Path("flux2max-prompts/results.jsonl").read_text("utf-8").splitlines()]
    ends = Counter(row["state"] for row in rows)
    files = [name for row in rows for name in row["files"]]
    for name in files:
        with Image.open(Path("flux2max-prompts", name)) as picture:
            picture.load()
    done = {task.prompt for task in gateway.tasks.values() if task.fate == "completed"}
    lost = {row["prompt"] for row in rows if row["state"] == "uncertain"} & gateway.accepted.keys()
    print(f"{dict(ends)}; {gateway.accepted.total()} tasks paid, {len(lost)} of them uncertain; {dict(gateway.calls)}")

    assert stopped == 1
    assert any("stopped: the budget of $20 doesn't allow" in line for line in limited.said)
    assert spent <= 20
    assert last.code == 1
    assert max(gateway.accepted.values()) == 1
    assert len(rows) == len({row["prompt"] for row in rows}) == PROMPTS
    assert ends.keys() <= {"completed", "failed", "uncertain"}
    assert ends["completed"] > 0.85 * PROMPTS
    assert ends["completed"] == len(done - lost) == len(files) == len(set(files))
    assert {path.name for path in Path("flux2max-prompts").glob("*.jpeg")} == set(files)
    assert {path.name for path in Path("flux2max-prompts/thumbs").iterdir()} == {f"{name}.jpeg" for name in files}
    assert not list(Path("flux2max-prompts").glob("**/*.part"))
