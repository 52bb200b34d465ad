"""A process that is stopped past the deadline of its tasks, and continued, while the service finishes them."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.processes import running_gateway

TASK_TIMEOUT, TASK_DURATION, STOPPED = 5.0, 2.0, 7.0
"""Seconds. On any machine, tasks end before their deadline, and the deadline passes while the process is stopped."""
COUNT = 10
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
        paths = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
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
