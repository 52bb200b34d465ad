"""Processes that are stopped, or blocked, while the service answers or finishes their tasks, and then continued."""

import asyncio
import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Self

import pytest
from support.processes import running_gateway
from support.responses import jpeg
from support.scripted import Behaviour, Connection, ScriptedGateway, answer, completed, running

TASK_TIMEOUT, TASK_DURATION, STOPPED = 5.0, 2.0, 7.0
"""Seconds. On any machine, tasks end before their deadline, and the deadline passes while the process is stopped."""
COUNT = 10
HTTP_TIMEOUT, HELD_UP = 4.0, 5.0
"""Seconds. All that waits for an answer has reached the server before its time is over."""
CLIENT = """
import asyncio, sys
from flux2max_async import Completed, FixedSchedule, FluxSession

URL, KEY, TIMEOUT, COUNT = sys.argv[1], sys.argv[2], float(sys.argv[3]), int(sys.argv[4])

def session(interval, drain=0.0):
    return FluxSession(KEY, base_url=URL, schedule=FixedSchedule(interval), task_timeout=TIMEOUT, drain=drain)

async def main():
    async with session(1000.0) as rare, session(0.02) as busy, session(1000.0) as attaching:
        draining = session(1000.0, drain=TIMEOUT - 1)
        await draining.__aenter__()
        tasks = {}
        for name, flux in (("rare", rare), ("busy", busy), ("draining", draining)):
            tasks[name] = [await flux.submit(f"{name} {number}") for number in range(COUNT)]
        tasks["attached"] = [attaching.attach(task.id) for task in tasks["rare"]]
        closing = asyncio.ensure_future(draining.aclose())
        await asyncio.sleep(0.1)
        print("submitted", flush=True)
        for name, follow in tasks.items():
            outcomes = [await task.outcome() for task in follow]
            names = {"Completed" if isinstance(o, Completed) else type(o.error).__name__ for o in outcomes}
            print(name, len(outcomes), *sorted(names), flush=True)
        await closing

asyncio.run(main())
"""


@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="this platform can't stop a process")
def test_tasks_of_a_stopped_process(tmp_path: Path) -> None:
    """Whether polls are rare or on the wire, and though a drain was to end: what ended meanwhile comes out completed."""
    script = tmp_path / "client.py"
    script.write_text(CLIENT, encoding="utf-8")
    with running_gateway(seconds=TASK_DURATION, spread=0.0, pictures=False, max_in_flight=100) as gateway:
        arguments = [gateway.url, gateway.api_key, str(TASK_TIMEOUT), str(COUNT)]
        command = [sys.executable, str(script), *arguments]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=_environment()) as process:
            try:
                assert process.stdout is not None
                assert process.stdout.readline() == "submitted\n"
                os.kill(process.pid, signal.SIGSTOP)
                time.sleep(STOPPED)
                os.kill(process.pid, signal.SIGCONT)
                output, _ = process.communicate(timeout=60.0)
            finally:
                process.kill()
        accepted, _ = gateway.counts()

    assert output.splitlines() == [f"{name} {COUNT} Completed" for name in ("rare", "busy", "draining", "attached")]
    assert set(accepted.values()) == {1}


def _environment() -> dict[str, str]:
    paths = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


WAITING_CLIENT = """
import asyncio, sys, threading, time
from flux2max_async import FixedSchedule, FluxSession, GeneratedImage

URL, KEY, TIMEOUT, COUNT, HELD_UP = sys.argv[1], sys.argv[2], float(sys.argv[3]), int(sys.argv[4]), float(sys.argv[5])

def block():
    print("blocked", flush=True)
    time.sleep(HELD_UP)

def block_when_asked(loop):
    if sys.stdin.readline() == "block\\n":
        loop.call_soon_threadsafe(block)

async def main():
    threading.Thread(target=block_when_asked, args=[asyncio.get_running_loop()], daemon=True).start()
    options = {"base_url": URL, "http_timeout": TIMEOUT, "schedule": FixedSchedule(0.1)}
    async with FluxSession(KEY, **options, max_in_flight=50) as flux, FluxSession(KEY, **options) as closing:
        image = GeneratedImage(url=URL + "/0.jpeg", type="image", task_id="t1")
        attached, last = flux.attach("poll"), asyncio.ensure_future(closing.submit("last"))
        kinds = {
            "submits": asyncio.gather(*(flux.submit(f"cat {number}") for number in range(COUNT))),
            "submit with a time limit": flux.submit("cat", timeout=TIMEOUT),
            "fetch": flux.fetch("t1"),
            "poll": attached.outcome(),
            "download": flux.read(image),
        }
        results = asyncio.gather(*kinds.values(), return_exceptions=True)
        for name, result in zip(kinds, await results):
            print(name, repr(result) if isinstance(result, BaseException) else "ok", flush=True)
        print("polls", (await attached.outcome()).polls, flush=True)
        print("retries", flux.stats.retries, flush=True)
        print("last", (await last).id, flush=True)

if sys.argv[6] == "uvloop":
    import uvloop
    uvloop.run(main())
else:
    asyncio.run(main())
"""


class SilentServer:
    """A gateway in a thread of its own, which answers nothing before `answer()` is called."""

    def __init__(self) -> None:
        self.gateway = ScriptedGateway()
        self._started, self._answering, self._stopping = threading.Event(), asyncio.Event(), asyncio.Event()
        self._thread = threading.Thread(target=asyncio.run, args=[self._serve()])

    def __enter__(self) -> Self:
        self._thread.start()
        self._started.wait()
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._loop.call_soon_threadsafe(self._stopping.set)
        self._thread.join()

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.gateway.submits = deque([self._after_the_word(answer(200, running()))])
        self.gateway.polls = deque([self._after_the_word(answer(200, completed()))])
        self.gateway.downloads = deque([self._after_the_word(answer(200, jpeg(bytes(1000))))])
        async with self.gateway:
            self._started.set()
            await self._stopping.wait()

    def _after_the_word(self, behave: Behaviour) -> Behaviour:
        async def wait_and_behave(connection: Connection) -> None:
            await self._answering.wait()
            await behave(connection)

        return wait_and_behave

    def answer(self) -> None:
        """Answer what is asked from now on, and what was asked before."""
        self._loop.call_soon_threadsafe(self._answering.set)


def _run_waiting_client(script: Path, how: str, loop: str) -> list[str]:
    """Run the client, and hold it up while the answers come; return what it prints."""
    with SilentServer() as server:
        gateway = server.gateway
        arguments = [gateway.url, gateway.api_key, str(HTTP_TIMEOUT), str(COUNT), str(HELD_UP), loop]
        with subprocess.Popen(
            [sys.executable, str(script), *arguments],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=_environment(),
        ) as process:  # fmt: skip
            try:
                assert process.stdin is not None
                assert process.stdout is not None
                while len(gateway.received) < COUNT + 5:
                    assert process.poll() is None
                    time.sleep(0.01)
                if how == "stopped":
                    os.kill(process.pid, signal.SIGSTOP)
                else:
                    process.stdin.write("block\n")
                    process.stdin.flush()
                    assert process.stdout.readline() == "blocked\n"
                server.answer()
                if how == "stopped":
                    time.sleep(HELD_UP)
                    os.kill(process.pid, signal.SIGCONT)
                output, _ = process.communicate(timeout=60.0)
            finally:
                process.kill()
    submits = len(gateway.of("POST"))
    return [f"{submits} sent", *output.splitlines()]


@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="this platform can't stop a process")
def test_answers_that_come_while_nothing_runs(tmp_path: Path) -> None:
    """Answers that came while the event loop was blocked or the process stopped are read, though their time is over."""
    script = tmp_path / "client.py"
    script.write_text(WAITING_CLIENT, encoding="utf-8")
    cases = list(itertools.product(("blocked", "stopped"), ("asyncio", "uvloop")))
    with ThreadPoolExecutor(len(cases)) as pool:
        outputs = list(pool.map(lambda case: _run_waiting_client(script, *case), cases))

    kinds = ("submits", "submit with a time limit", "fetch", "poll", "download")
    expected = [f"{COUNT + 2} sent", *(f"{kind} ok" for kind in kinds), "polls 1", "retries 0", "last t1"]
    assert dict(zip(cases, outputs, strict=True)) == dict.fromkeys(cases, expected)
