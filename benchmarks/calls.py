"""What a call costs the client in CPU time, beside a hand-written minimum: `python benchmarks/calls.py`.

The gateway runs in a process of its own. Both clients poll each task about every second, in processes of their own,
in turn; the CPU time is the operating system's, system calls included.
"""

import argparse
import asyncio
import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine
from typing import Any

import aiohttp

from flux2max_async import FixedSchedule, FluxSession

INTERVAL = 1.0
SPREAD = 0.1
GATEWAY = """
import asyncio
from flux2max_async.emulator import Emulator

async def main():
    async with Emulator(seconds=4.0, spread=0.2, max_in_flight=100_000, pictures=False) as gateway:
        print(gateway.url, gateway.api_key, flush=True)
        await asyncio.Event().wait()

asyncio.run(main())
"""


async def by_hand(url: str, key: str, tasks: int) -> int:
    """The least that works: one aiohttp session, json.loads, a loop per task."""
    calls = 0

    async def one(http: aiohttp.ClientSession, prompt: str) -> None:
        nonlocal calls
        body = {"model": "flux_2_max", "input": [{"params": {"prompt": prompt}}]}
        async with http.post(f"{url}/model/v1/generation", json=body) as response:
            task_id = json.loads(await response.read())["id"]
        calls += 1
        status = ""
        while status not in {"completed", "failed"}:
            await asyncio.sleep(INTERVAL * random.uniform(1 - SPREAD, 1 + SPREAD))
            async with http.get(f"{url}/model/v1/generation/task/{task_id}") as response:
                status = json.loads(await response.read())["status"]
            calls += 1

    async with aiohttp.ClientSession(headers={"Authorization": f"Bearer {key}"}) as http:
        await asyncio.gather(*(one(http, f"cat {number}") for number in range(tasks)))
    return calls


async def by_session(url: str, key: str, tasks: int) -> int:
    """The same by a FluxSession."""
    async with FluxSession(key, base_url=url, max_in_flight=tasks, schedule=FixedSchedule(INTERVAL)) as session:
        async for outcome in session.stream(f"cat {number}" for number in range(tasks)):
            outcome.unwrap()
        return session.stats.polls + session.stats.submitted


CLIENTS: dict[str, Callable[[str, str, int], Coroutine[Any, Any, int]]] = {
    "by hand": by_hand,
    "FluxSession": by_session,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", type=int, default=50, help="tasks at once (%(default)s)")
    parser.add_argument("--runs", type=int, default=5, help="runs of each client (%(default)s)")
    parser.add_argument("--client", choices=CLIENTS, help=argparse.SUPPRESS)
    parser.add_argument("--gateway", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.client:
        began = time.process_time()
        calls = asyncio.run(CLIENTS[arguments.client](arguments.gateway[0], arguments.gateway[1], arguments.tasks))
        print((time.process_time() - began) / calls)
        return
    with subprocess.Popen([sys.executable, "-c", GATEWAY], stdout=subprocess.PIPE, text=True) as gateway:
        assert gateway.stdout is not None
        try:
            address = gateway.stdout.readline().split()
            seconds: dict[str, list[float]] = {name: [] for name in CLIENTS}
            for _ in range(arguments.runs):
                for name, costs in seconds.items():
                    command = [sys.executable, __file__, "--tasks", str(arguments.tasks), "--client", name]
                    run = subprocess.run([*command, "--gateway", *address], stdout=subprocess.PIPE, check=True)
                    costs.append(float(run.stdout))
        finally:
            gateway.terminate()
    medians = {name: statistics.median(costs) for name, costs in seconds.items()}
    for name, median in medians.items():
        print(f"{name:12} {median * 1e6:7.0f} µs of CPU per call (median of {arguments.runs})")
    print(f"ratio        {medians['FluxSession'] / medians['by hand']:7.2f}")


if __name__ == "__main__":
    main()
