"""Interrupted batches: real signals to separate processes, closed pipes and terminals, and continuing afterwards."""

import contextlib
import io
import json
import os
import re
import shlex
import shutil
import signal
import sqlite3
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
    pytest.mark.skipif(sys.platform == "win32", reason="Windows can't send signals to a single process"),
]

Service = Callable[..., Emulator]
SMALL = ("--width", "64", "--height", "64")


@attrs.define
class Batch:
    """A batch that runs in a separate process."""

    process: "subprocess.Popen[str]"
    messages: list[str]
    """The lines on stderr so far."""
    reader: threading.Thread

    def wait_for(self, pattern: str, seconds: float = 120.0) -> re.Match[str]:
        """Wait until a line on stderr matches, and return the match."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            for line in self.messages:
                if match := re.search(pattern, line):
                    return match
            time.sleep(0.01)
        raise AssertionError(f"no line matches {pattern!r}: {self.messages}")

    def wait(self) -> int:
        """Wait until the process has ended, and return its exit code."""
        code = self.process.wait(timeout=120)
        self.reader.join(10)
        return code


@pytest.fixture
def batch() -> Iterator[Callable[..., Batch]]:
    """Provide a function that starts batches; all are killed at the end of the test."""
    running: list[Batch] = []

    def start_batch(*arguments: str) -> Batch:
        process = start("batch", *arguments, cwd=Path())
        messages: list[str] = []
        assert process.stderr is not None
        reader = threading.Thread(target=_read, args=(process.stderr, messages))
        reader.start()
        running.append(Batch(process, messages, reader))
        return running[-1]

    yield start_batch
    for started in running:
        with started.process:
            started.process.kill()
        started.reader.join()


def _read(stream: IO[str], messages: list[str]) -> None:
    messages.extend(iter(stream.readline, ""))


def write_prompts(count: int) -> str:
    Path("prompts.txt").write_text("".join(f"picture {number}\n" for number in range(count)), encoding="utf-8")
    return "prompts.txt"


def states() -> Counter[str]:
    lines = Path("flux2max-prompts/results.jsonl").read_text(encoding="utf-8").splitlines()
    return Counter(json.loads(line)["state"] for line in lines)


def wait_until(condition: Callable[[], object], seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_first_signal_waits_for_tasks_in_flight(
    batch: Callable[..., Batch], flux2max: Command, service: Service, number: signal.Signals
) -> None:
    """Ctrl-C and SIGTERM stop submitting, report the number of tasks in flight and wait for them; the next run continues."""
    gateway = service(seconds=3.0)
    run = batch(write_prompts(6), *SMALL, "--max-in-flight", "3")
    wait_until(lambda: len(gateway.tasks) == 3)
    run.process.send_signal(number)
    match = run.wait_for(r"nothing more is submitted; waiting for (\d) pictures in flight")
    code = run.wait()
    stopped = states()
    more = flux2max("batch", "prompts.txt", *SMALL)

    assert match[1] == "3"
    assert code == 128 + number
    assert stopped == {"completed": 3, "waiting": 3}
    assert run.messages[-1] == "to go on: flux2max batch prompts.txt --width 64 --height 64 --max-in-flight 3\n"
    assert more.code == 0
    assert gateway.accepted.total() == len(gateway.accepted) == 6


def test_second_signal_exits_at_once(batch: Callable[..., Batch], flux2max: Command, service: Service) -> None:
    """A second signal exits without waiting; the next run resumes the tasks in flight and pays for nothing twice."""
    gateway = service(seconds=18.0)
    run = batch(write_prompts(4), *SMALL, "--max-in-flight", "3")
    progress = run.wait_for(r"^0 done, 0 failed, 3 in flight, 1 waiting; \$0\.00 spent, \d+\.\d polls a task$")
    run.process.send_signal(signal.SIGINT)
    run.wait_for("nothing more is submitted")
    second_signal_at = time.monotonic()
    run.process.send_signal(signal.SIGTERM)
    code = run.wait()
    took = time.monotonic() - second_signal_at
    stopped = states()
    page = Path("flux2max-prompts/index.html").read_text(encoding="utf-8")
    journal = flux2max("journal", "show", "flux2max-prompts")
    more = flux2max("batch", "prompts.txt", *SMALL)

    assert progress
    assert sum("in flight, " in line for line in run.messages) == 1
    assert code == 128 + signal.SIGINT
    assert took < 10
    assert stopped == {"submitted": 3, "waiting": 1}
    assert page.count('"state":"running"') == 3
    assert "data-running" not in page
    assert journal.out.count("\nrunning: ") == 3
    assert more.code == 0
    assert more.err.startswith("4 pictures: 3 running, 1 to be submitted")
    assert gateway.accepted.total() == len(gateway.accepted) == 4


def test_signal_with_nothing_in_flight(batch: Callable[..., Batch], service: Service) -> None:
    """The first signal ends a batch whose submits were all refused so far."""
    gateway = service(max_in_flight=0)
    run = batch(write_prompts(2), *SMALL)
    wait_until(lambda: gateway.calls["submit"])
    time.sleep(0.3)  # a refusal pauses submits for at least a second
    run.process.send_signal(signal.SIGINT)
    run.wait_for("nothing more is submitted; nothing is in flight")

    assert run.wait() == 128 + signal.SIGINT
    assert states()["completed"] == 0
    assert not gateway.tasks


@pytest.mark.parametrize("closed", ["stdout", "stderr", "both"])
def test_signal_with_closed_pipes(service: Service, closed: str) -> None:
    """The first signal works even if the pipes are closed, and all paid pictures are saved."""
    gateway = service(seconds=1.5)
    process = start("batch", write_prompts(20), *SMALL, "--max-in-flight", "2", cwd=Path())
    wait_until(lambda: len(gateway.tasks) == 2)
    for name in ("stdout", "stderr"):
        if closed in {name, "both"}:
            getattr(process, name).close()
            setattr(process, name, io.StringIO())
    process.send_signal(signal.SIGTERM)
    run = finish(process)
    paid = gateway.accepted.total()

    assert run.code == 128 + signal.SIGTERM
    assert 2 <= paid < 15
    assert states() == {"completed": paid, "waiting": 20 - paid}
    assert "data-running" not in Path("flux2max-prompts/index.html").read_text(encoding="utf-8")


def test_full_stdout_pipe(batch: Callable[..., Batch], service: Service) -> None:
    """A full pipe blocks neither polls nor signals: all pictures are saved, and the second Ctrl-C exits."""
    service(seconds=0.1)
    extra = "x" * 3000
    Path("prompts.txt").write_text("".join(f"{number} {extra}\n" for number in range(40)), encoding="utf-8")
    run = batch("prompts.txt", *SMALL, "--json")
    wait_until(lambda: Path("flux2max-prompts/results.jsonl").exists() and states()["completed"] == 40)
    is_running = run.process.poll() is None
    run.process.send_signal(signal.SIGINT)
    run.wait_for("nothing is in flight")
    run.process.send_signal(signal.SIGINT)
    code = run.wait()

    assert is_running
    assert code == 128 + signal.SIGINT  # not all outcomes were written
    assert states() == {"completed": 40}
    assert run.messages[-1].startswith("40 of 40 pictures in ")


def test_full_pipe_for_stdout_and_stderr(service: Service) -> None:
    """If stdout and stderr share a full pipe, polls and signals still work."""
    service(seconds=0.1)
    extra = "x" * 3000
    Path("prompts.txt").write_text("".join(f"{number} {extra}\n" for number in range(40)), encoding="utf-8")
    command = [sys.executable, "-W", "error", "-m", "flux2max_async.cli", "batch", "prompts.txt", *SMALL, "--json"]
    read_fd, write_fd = os.pipe()
    process = subprocess.Popen(command, stdout=write_fd, stderr=write_fd)
    wait_until(lambda: Path("flux2max-prompts/results.jsonl").exists() and states()["completed"] == 40)
    # An outcome that is too long for the rest of the pipe's buffer may leave enough of it for a short message.
    filler = threading.Thread(target=_fill_pipe, args=(write_fd,), daemon=True)
    filler.start()
    for _ in range(2):
        time.sleep(0.5)
        process.send_signal(signal.SIGTERM)
    with process:
        code = process.wait(timeout=120)
    os.close(read_fd)
    filler.join()
    os.close(write_fd)

    assert code == 128 + signal.SIGTERM
    assert states() == {"completed": 40}


def _fill_pipe(write_fd: int) -> None:
    """Write until the pipe's reader is closed."""
    with contextlib.suppress(BrokenPipeError):
        while True:
            os.write(write_fd, b" ")


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="this platform has no SIGHUP")
def test_closed_terminal(service: Service) -> None:
    """Closing the terminal stops the batch, and the tasks in flight are saved."""
    pty = pytest.importorskip("pty", reason="this platform has no pseudo terminals")
    gateway = service(seconds=1.5)
    command = [sys.executable, "-W", "error", "-m", "flux2max_async.cli", "batch", write_prompts(20), *SMALL, "--yes"]
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [*command, "--max-in-flight", "2"], stdin=slave, stdout=slave, stderr=slave, start_new_session=True
    )
    os.close(slave)
    wait_until(lambda: len(gateway.tasks) == 2)
    process.send_signal(signal.SIGHUP)
    os.close(master)
    code = process.wait(timeout=120)
    paid = gateway.accepted.total()

    assert code == 128 + signal.SIGHUP
    assert 2 <= paid < 15
    assert states() == {"completed": paid, "waiting": 20 - paid}


@pytest.mark.parametrize(
    ("arguments", "unbuffered"),
    [(("--dry-run",), ""), (("--dry-run", "--json"), "1"), (("--json",), ""), ((), ""), ((), "1")],
)
def test_full_disk(service: Service, arguments: tuple[str, ...], unbuffered: str) -> None:
    """If standard output can't be written, that is reported; --json and --dry-run then fail; no picture is lost."""
    gateway = service()
    command = [sys.executable, "-W", "error", "-m", "flux2max_async.cli", "batch", write_prompts(2), *SMALL, *arguments]
    with Path("/dev/full").open("w") as full:
        environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False, env=environment)

    assert done.returncode == (1 if arguments else 0)
    assert "No space left on device" in done.stderr
    assert "Traceback" not in done.stderr
    assert gateway.accepted.total() == (0 if "--dry-run" in arguments else 2)


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_standard_streams(service: Service, closed: str) -> None:
    """A batch runs without standard input, output or error."""
    gateway = service()
    command = (
        f"{shlex.quote(sys.executable)} -W error -m flux2max_async.cli batch {write_prompts(1)} --width 64 {closed}"
    )
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)

    assert done.returncode == 0
    assert gateway.accepted.total() == 1
    assert "Traceback" not in done.stderr


def test_ascii_terminal(service: Service) -> None:
    """Characters that the terminal's encoding doesn't have are escaped."""
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


def test_stdout_is_closed_during_the_run(service: Service) -> None:
    """When the reader of the outcomes closes the pipe, nothing more is submitted; the tasks in flight are saved."""
    gateway = service(seconds=1.0)
    process = start("batch", write_prompts(12), *SMALL, "--max-in-flight", "2", "--json", cwd=Path())
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


def test_files_are_updated_during_the_run(batch: Callable[..., Batch], service: Service) -> None:
    """Results and gallery exist from the start and are updated with each picture; neither is ever incomplete."""
    service(seconds=4.0, spread=0.5, seed=1)
    run = batch(write_prompts(8), *SMALL)
    pages: set[str] = set()
    results: set[int] = set()
    ended = False
    while not ended:
        ended = run.process.poll() is not None  # the files are read once more after that
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

    assert run.wait() == 0
    assert len(pages) >= 3
    assert all(page.startswith("<!DOCTYPE html>") and page.endswith("</html>\n") for page in pages)
    assert sum("data-running" not in page for page in pages) == 1
    assert results == {8}


def test_two_batches_share_a_folder(batch: Callable[..., Batch], flux2max: Command, service: Service) -> None:
    """Each runs its own lines and never pays again for the other's; both list everything in the journal."""
    gateway = service(seconds=6.0)
    Path("a.txt").write_text("a dog [fail]\na cat\n", encoding="utf-8")
    Path("b.txt").write_text("an owl\n", encoding="utf-8")
    first = batch("a.txt", *SMALL, "--out", "both")
    wait_until(lambda: len(gateway.tasks) == 2)
    second = flux2max("batch", "b.txt", *SMALL, "--out", "both", "--retry-failed", "--task-timeout", "60")
    rows = [json.loads(line) for line in Path("both/results.jsonl").read_text(encoding="utf-8").splitlines()]
    code = first.wait()
    after = [json.loads(line) for line in Path("both/results.jsonl").read_text(encoding="utf-8").splitlines()]

    assert second.code == 0
    assert second.err.startswith("1 picture: 1 to be submitted")
    assert {row["prompt"] for row in rows} == {"an owl", "a dog [fail]", "a cat"}
    assert code == 1
    assert {row["prompt"]: row["state"] for row in after} == {
        "a dog [fail]": "failed", "a cat": "completed", "an owl": "completed",
    }  # fmt: skip
    assert set(gateway.accepted.values()) == {1}


PROMPT_COUNT = 500


def test_batch_survives_kills_and_faults(batch: Callable[..., Batch], flux2max: Command, service: Service) -> None:
    """500 lines on a faulty service, killed twice and then stopped by a budget that is raised, are each paid at most once."""
    faults = {"server_error": 0.005, "reset_after": 0.005, "unavailable": 0.02, "garbage": 0.02, "rate_limited": 0.002}
    gateway = service(seconds=0.4, spread=0.3, seed=6, failing=0.05, time_scale=2.0, max_in_flight=60, faults=faults)
    command = (write_prompts(PROMPT_COUNT), *SMALL, "--max-in-flight", "24")
    for seconds in (2.5, 3.0):
        killed = batch(*command, "--budget", "30")
        time.sleep(seconds)
        killed.process.send_signal(signal.SIGKILL)
        assert killed.wait() == -signal.SIGKILL
    limited = batch(*command, "--budget", "20")
    stopped = limited.wait()
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
    assert any("stopped: the budget of $20 doesn't allow" in line for line in limited.messages)
    assert spent <= 20
    assert last.code == 1
    assert max(gateway.accepted.values()) == 1
    assert len(rows) == len({row["prompt"] for row in rows}) == PROMPT_COUNT
    assert ends.keys() <= {"completed", "failed", "uncertain"}
    assert ends["completed"] > 0.85 * PROMPT_COUNT
    assert ends["completed"] == len(done - lost) == len(files) == len(set(files))
    assert {path.name for path in Path("flux2max-prompts").glob("*.jpeg")} == set(files)
    assert {path.name for path in Path("flux2max-prompts/thumbs").iterdir()} == {f"{name}.jpeg" for name in files}
    assert not list(Path("flux2max-prompts").glob("**/*.part"))


def recorded_tasks(path: Path) -> set[str]:
    """Return the prompts of the tasks that a journal's file has without its log."""
    copy = Path(shutil.copy(path, "copy.db"))
    try:
        with contextlib.closing(sqlite3.connect(copy)) as connection:
            rows = connection.execute("SELECT json_extract(request, '$.prompt') FROM entries WHERE task_id IS NOT NULL")
            return {prompt for (prompt,) in rows}
    except sqlite3.Error:  # it was copied while it was written
        return set()


def test_journal_without_its_log(batch: Callable[..., Batch], flux2max: Command, service: Service) -> None:
    """A copy of the killed batch's journal.db alone has what is older than seconds, and results.jsonl names the rest."""
    gateway = service(seconds=0.5, spread=0.0)
    folder = Path("flux2max-prompts")
    run = batch(write_prompts(100), *SMALL, "--max-in-flight", "4")
    wait_until(lambda: gateway.accepted.total() >= 20)
    old = set(gateway.accepted)
    wait_until(lambda: old <= recorded_tasks(folder / "journal.db"))  # within about 6 s, unless the machine is slow
    copied = gateway.accepted.total()
    wait_until(lambda: gateway.accepted.total() >= copied + 8)
    run.process.send_signal(signal.SIGKILL)
    killed = run.wait()
    before = Counter(gateway.accepted)
    for name, files in (("both", ["journal.db", "results.jsonl"]), ("alone", ["journal.db"])):
        Path(name).mkdir()
        for file in files:
            shutil.copy(folder / file, name)
    recorded = recorded_tasks(Path("alone/journal.db"))
    rows = [json.loads(line) for line in Path("both/results.jsonl").read_text("utf-8").splitlines()]
    known = {row["prompt"] for row in rows if row["task_id"]}
    both = flux2max("batch", "prompts.txt", *SMALL, "--out", "both", "--yes")
    after_both = Counter(gateway.accepted)
    flux2max("batch", "prompts.txt", *SMALL, "--out", "alone", "--yes")
    print(f"{before.total()} paid before the kill, {len(recorded)} in the file, {len(known)} in results.jsonl")

    assert killed == -signal.SIGKILL
    assert before.total() < 100
    assert old <= recorded
    assert all(after_both[prompt] == 1 for prompt in recorded | known)
    assert ("was lost or replaced" in both.err) is bool(known - recorded)
    assert all(gateway.accepted[prompt] == 1 for prompt in recorded)
