"""One batch on one bad day: a full disk, kills, a lost write-ahead log, a stopped process, and a clock that jumps."""

import contextlib
import json
import os
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attrs
import pytest
from aiohttp import web
from PIL import Image
from support.commands import KEY, Run, finish, start

from flux2max_async.emulator import Emulator

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="signals and limits of other processes")

PICTURES = 24
MAX_IN_FLIGHT = 8
FULL_SECONDS = 3.0
CHECKPOINTED = 6.5
"""Seconds after which what was written is in the journal's file itself."""
TASK_TIMEOUT = 5
DISK_BYTES = 8_000_000
CLOCK = Path(__file__).parents[1] / "support" / "shifted_clock"


class Gateway(Emulator):
    """An emulated gateway that calls a function when it has accepted a submit, and before it answers."""

    on_accepted: Callable[[int], None] = staticmethod(lambda _: None)

    async def _submit(self, request: web.Request) -> web.StreamResponse:
        response = await super()._submit(request)
        self.on_accepted(self.accepted.total())
        return response

    def set_seconds(self, seconds: float) -> None:
        """Set the duration of the tasks that are submitted from now on."""
        self._service.seconds, self._service.spread = seconds, 0.0


@contextmanager
def small_disk(folder: Path) -> Iterator[bool]:
    """Make a folder a small disk of its own, and return whether that was possible: it takes root's rights."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(folder)]
    is_mounted = (
        shutil.which("mount") is not None and subprocess.run(mount, capture_output=True, check=False).returncode == 0
    )
    try:
        yield is_mounted
    finally:
        if is_mounted:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)


@attrs.define
class Disk:
    """A disk that can be full for a while: a small one that is filled, or else a limit for what a process may write."""

    folder: Path
    is_small: bool
    was_full: threading.Event = attrs.field(factory=threading.Event)
    """Set once it is no longer full."""

    def fill(self, pid: int) -> None:
        if self.is_small:
            with contextlib.suppress(OSError), self._ballast.open("wb", buffering=0) as file:
                while file.write(bytes(4096)):
                    pass
        else:
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
        threading.Timer(FULL_SECONDS, self._make_room, [pid]).start()

    def _make_room(self, pid: int) -> None:
        if self.is_small:
            self._ballast.unlink()
        else:
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        self.was_full.set()

    @property
    def _ballast(self) -> Path:
        return self.folder / "ballast"


def wait_until(condition: Callable[[], object], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def known_tasks(folder: Path) -> dict[str, str]:
    """Return the ids of all tasks in the journal, by key."""
    with contextlib.closing(sqlite3.connect(f"file:{folder / 'journal.db'}?mode=ro", uri=True)) as connection:
        return dict(connection.execute("SELECT key, task_id FROM entries WHERE task_id IS NOT NULL"))


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text(encoding="utf-8").splitlines()]


@attrs.define
class Day:
    """The folder, the gateway and the disk of the batch."""

    cwd: Path
    out: Path
    gateway: Gateway
    disk: Disk

    def start(self, *options: str) -> "subprocess.Popen[str]":
        command = ("batch", "prompts.txt", "--width", "64", "--height", "64", "--out", str(self.out))
        paths = [str(CLOCK), os.environ.get("PYTHONPATH", "")]
        return start(
            *command, "--max-in-flight", str(MAX_IN_FLIGHT), *options,
            cwd=self.cwd,
            FLUX2MAX_API_KEY=KEY,
            FLUX2MAX_BASE_URL=self.gateway.url,
            CLOCK_SHIFT_FILE=str(self.clock),
            PYTHONPATH=os.pathsep.join(filter(None, paths)),
        )  # fmt: skip

    @property
    def clock(self) -> Path:
        return self.cwd / "clock"

    def kill(self, process: "subprocess.Popen[str]") -> Run:
        process.kill()
        return finish(process)


@pytest.fixture
def day(tmp_path: Path) -> Iterator[Day]:
    out = tmp_path / "disk"
    (tmp_path / "prompts.txt").write_text("".join(f"picture {number}\n" for number in range(PICTURES)), "utf-8")
    with small_disk(out) as is_small, Gateway(seconds=3.0, spread=0.5, api_key=KEY, seed=3) as gateway:
        yield Day(tmp_path, out, gateway, Disk(out, is_small))


def fill_disk_and_kill(day: Day) -> dict[str, str]:
    """Fill the disk while submits are on the wire, and kill the batch once there has been room again for a while."""
    batch = day.start()
    day.gateway.on_accepted = lambda count: day.disk.fill(batch.pid) if count == MAX_IN_FLIGHT // 2 else None
    assert day.disk.was_full.wait(30)
    time.sleep(2.5)
    known = known_tasks(day.out)
    run = day.kill(batch)
    print(f"1. the disk was full for {FULL_SECONDS:g} s: {day.gateway.accepted.total()} tasks, {len(known)} ids known;")
    assert "its journal entry is not up to date" in run.err
    return known


def kill_and_lose_the_log(day: Day) -> dict[str, str]:
    """Kill the batch when everything that it has submitted is some seconds old, and remove the write-ahead log."""
    before = day.gateway.accepted.total()
    day.gateway.set_seconds(11.0)
    batch = day.start()
    wait_until(lambda: day.gateway.accepted.total() == before + MAX_IN_FLIGHT)
    wait_until(lambda: len(known_tasks(day.out)) == before + MAX_IN_FLIGHT)
    known = known_tasks(day.out)
    time.sleep(CHECKPOINTED)
    day.kill(batch)
    log = day.out / "journal.db-wal"
    size = log.stat().st_size if log.exists() else 0
    for path in (log, day.out / "journal.db-shm"):
        path.unlink(missing_ok=True)
    left = known_tasks(day.out)
    print(f"2. killed, and {size} bytes of the log removed: {len(known)} ids were known, the file holds {len(left)};")
    return known


def stop_past_the_timeout(day: Day) -> Run:
    """Stop the batch for longer than a task may take, put the clock forward by an hour, and let it go on."""
    polls = day.gateway.calls["poll"]
    day.gateway.set_seconds(1.5)
    batch = day.start("--task-timeout", str(TASK_TIMEOUT))
    wait_until(lambda: day.gateway.calls["poll"] >= polls + MAX_IN_FLIGHT)
    batch.send_signal(signal.SIGSTOP)
    polled = day.gateway.calls["poll"]
    running = day.gateway._service.in_flight(time.monotonic())
    day.clock.write_text("3600", encoding="ascii")
    time.sleep(TASK_TIMEOUT + 1.5)
    batch.send_signal(signal.SIGCONT)
    run = finish(batch)
    print(
        f"3. stopped for {TASK_TIMEOUT + 1.5:g} s with {running} tasks running: {day.gateway.calls['poll'] - polled} polls after it;"
    )
    return run


def test_nothing_is_paid_twice_and_nothing_known_is_lost(day: Day) -> None:
    """Each picture is paid for once, and every task whose id was on the disk has its picture in the end."""
    known = fill_disk_and_kill(day)
    known |= kill_and_lose_the_log(day)
    woken = stop_past_the_timeout(day)
    rows = rows_of(day.out)
    last = finish(day.start())
    accepted = day.gateway.accepted
    task_ids = {row["key"]: row["task_id"] for row in rows}
    states = Counter(row["state"] for row in rows)
    for name in (name for row in rows for name in row["files"]):
        with Image.open(day.out / name) as picture:
            picture.load()
    print(
        f"{'a small disk' if day.disk.is_small else 'a limit for files'}; {dict(states)}; {accepted.total()} tasks paid"
    )

    assert accepted == Counter(f"picture {number}" for number in range(PICTURES))
    assert known.items() <= task_ids.items()
    assert states == {"completed": PICTURES}
    assert all(len(row["files"]) == 1 for row in rows)
    assert woken.code == 0, woken.err
    assert "has not ended" not in woken.err + woken.out
    assert last.code == 0, last.err
