"""Signals at random moments of a batch whose pictures take minutes to download: it ends, and the next run goes on."""

import asyncio
import json
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import attrs
import pytest
from support.commands import Command
from support.responses import picture
from support.scripted import Connection, ScriptedGateway, answer, completed, running

from flux2max_async import FluxSession, LearnedSchedule
from flux2max_async.cli._gallery import Gallery
from flux2max_async.cli._progress import ProgressDisplay
from flux2max_async.cli._runner import GracefulExit, Report
from flux2max_async.cli._terminal import Terminal

pytestmark = [
    pytest.mark.usefixtures("empty_folder"),
    pytest.mark.skipif(sys.platform == "win32", reason="Windows can't send signals to a single process"),
]

PICTURES = 6
COMMAND = ("batch", "prompts.txt", "--width", "64", "--height", "64")


@attrs.define
class SlowService:
    """A service for many batches: some pictures arrive a byte at a time, which would take ten minutes."""

    gateway: ScriptedGateway
    is_slow: bool = True
    prompts: dict[str, str] = attrs.field(factory=dict[str, str])
    """By task id. All prompts begin with the name of their batch."""
    calls: Counter[str] = attrs.field(factory=Counter[str])
    """By batch: submits, polls, and pieces of downloads."""

    def __attrs_post_init__(self) -> None:
        self.gateway.submits = deque([self.submit])
        self.gateway.polls = deque([self.poll])
        self.gateway.downloads = deque([self.download])

    @property
    def accepted(self) -> Counter[str]:
        """How often each prompt was accepted, and is paid for."""
        return Counter(self.prompts.values())

    def count(self, prompt: str) -> None:
        self.calls[prompt.split(",", maxsplit=1)[0]] += 1

    async def submit(self, connection: Connection) -> None:
        task_id, prompt = f"t{len(self.prompts)}", str(connection.call.params["prompt"])
        self.prompts[task_id] = prompt
        self.count(prompt)
        await answer(200, running(task_id), after=0.05 * (len(prompt) % 3))(connection)

    async def poll(self, connection: Connection) -> None:
        task_id = connection.call.path.rpartition("/")[2].partition("?")[0]
        self.count(self.prompts[task_id])
        url = f"{self.gateway.url}/pictures/{task_id}"
        await answer(200, completed(task_id, url))(connection)

    async def download(self, connection: Connection) -> None:
        prompt = self.prompts[connection.call.path.rpartition("/")[2]]
        content = picture()
        batch, number = map(int, re.findall(r"\d+", prompt))
        # One batch in three has no slow picture, and may be about to end by itself.
        is_slow = self.is_slow and batch % 3 and number % 2
        await connection.send(f"HTTP/1.1 200 OK\r\nContent-Length: {len(content)}\r\n\r\n".encode())
        step = 1 if is_slow else len(content)
        for start in range(0, len(content), step):
            self.count(prompt)
            await connection.send(content[start : start + step])
            await asyncio.sleep(600 / len(content) if is_slow else 0)


@attrs.frozen
class Moment:
    """When the two signals are sent to a batch, and which."""

    name: str
    calls: int
    """How many calls the batch has made when the first one is sent."""
    signals: tuple[signal.Signals, signal.Signals]
    pause: float | None
    """Seconds between the answer to the first one and the second; None sends both at once."""


@attrs.frozen
class End:
    """How a batch has ended."""

    moment: Moment
    code: int | None
    """The exit code; None if it was killed because it did not end."""
    messages: str
    """What it has written to stderr."""
    startup: float
    """Seconds from its start to its first submit."""
    seconds: float
    """From the second signal to its end."""


def choose_moments(count: int, seed: int = 18) -> list[Moment]:
    choose = random.Random(seed)
    numbers = (signal.SIGINT, signal.SIGTERM)
    moments: list[Moment] = []
    for index in range(count):
        signals = (numbers[index % 2], numbers[index // 2 % 2])
        # Two equal signals at once would be one.
        at_once = signals[0] != signals[1] and choose.random() < 0.5
        pause = None if at_once else choose.choice([0.0, choose.uniform(0, 0.5)])
        moments.append(Moment(f"batch {index}", choose.randint(1, 18), signals, pause))
    return moments


def interrupt(service: SlowService, moment: Moment) -> End:
    """Run a batch in a folder of its own, and send it the signals."""
    folder = Path(moment.name)
    folder.mkdir()
    prompts = "".join(f"{moment.name}, picture {number}\n" for number in range(PICTURES))
    (folder / "prompts.txt").write_text(prompts, encoding="utf-8")
    messages = folder / "messages.txt"
    command = [sys.executable, "-W", "error", "-m", "flux2max_async.cli", *COMMAND, "--max-in-flight", "4"]
    with messages.open("wb") as stderr:
        started = time.monotonic()
        process = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=stderr)

    def wait_for(condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 300
        while process.poll() is None and not condition() and time.monotonic() < deadline:
            time.sleep(0.002)

    with process:
        try:
            wait_for(lambda: service.calls[moment.name] > 0)
            startup = time.monotonic() - started
            wait_for(lambda: service.calls[moment.name] >= moment.calls)
            process.send_signal(moment.signals[0])
            if moment.pause is not None:
                wait_for(lambda: b"stopping: " in messages.read_bytes())
                time.sleep(moment.pause)
            process.send_signal(moment.signals[1])
            sent = time.monotonic()
            code = process.wait(timeout=300)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            process.kill()
    return End(moment, code, messages.read_text(encoding="utf-8"), startup, time.monotonic() - sent)


def test_signals_at_random_moments(
    script: ScriptedGateway, flux2max: Command, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """A batch ends within 3 s of the second signal; the next run finishes it, and pays for nothing twice."""
    # A shell that runs the tests in the background may have made its children ignore it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    monkeypatch.delenv("FORCE_COLOR")
    service = SlowService(script)
    moments = choose_moments(request.config.getoption("--interrupts"))
    with ThreadPoolExecutor(6) as pool:
        ends = list(pool.map(lambda moment: interrupt(service, moment), moments))
    service.is_slow = False
    top = Path.cwd()
    for end in ends:
        monkeypatch.chdir(top / end.moment.name)
        more = flux2max(*COMMAND)
        rows = [json.loads(line) for line in Path("flux2max-prompts/results.jsonl").read_text("utf-8").splitlines()]

        check_end(end)
        assert more.code == 0, (end, more)
        assert [row["state"] for row in rows] == ["completed"] * PICTURES
        assert all((Path("flux2max-prompts") / name).is_file() for row in rows for name in row["files"])
    assert service.accepted == Counter(
        f"{moment.name}, picture {number}" for moment in moments for number in range(PICTURES)
    )
    longest = max(ends, key=lambda end: end.seconds)
    print(f"at most {longest.seconds:.2f} s from the second signal to the end; the start took {longest.startup:.2f} s")


def check_end(end: End) -> None:
    """Check when and how a batch has ended, and its last lines."""
    *_, summary, advice = end.messages.splitlines()
    # Of two signals at once, either may be the first that arrives. While the interpreter ends, it handles none any more.
    codes = {128 + number for number in end.moment.signals[: 2 if end.moment.pause is None else 1]}
    codes.add(-end.moment.signals[1])
    if advice.startswith(f"{PICTURES} of {PICTURES} pictures "):  # it has ended by itself before they had an effect
        assert end.code in codes - {128 + number for number in end.moment.signals} | {0}, end
    else:
        assert end.code in codes, end
        assert re.match(rf"[0-5] of {PICTURES} pictures in flux2max-prompts; to view them: ", summary), end
        assert advice == "to go on: flux2max batch prompts.txt --width 64 --height 64 --max-in-flight 4", end
    assert "Traceback" not in end.messages, end
    # A machine that is slower is so at the start too, which takes longer than the end.
    assert end.seconds < max(3.0, 4 * end.startup), end


async def test_signals_after_the_run() -> None:
    """After the run, signals are counted until the process ends; the second one keeps it from creating thumbnails."""
    report, gallery = Report(), Gallery(Path())
    display = ProgressDisplay(1, FluxSession("key"), LearnedSchedule(), 1, Terminal(sys.stderr))
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    skipped: list[bool] = []
    try:
        with GracefulExit(display, gallery, report).handle_signals():
            pass
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.raise_signal(number)
            skipped.append(gallery.skip_thumbnails)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)

    assert report.signals == [signal.SIGINT, signal.SIGTERM]
    assert skipped == [False, True]
