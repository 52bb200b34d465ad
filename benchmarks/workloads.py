"""The measured workloads: `python benchmarks/workloads.py LOOP WORKLOAD ARGUMENTS URL` runs one and prints JSON.

The baseline is the minimum that works, for comparison: one aiohttp session, `json.loads`, a loop per task. It polls
like the session does: every `interval` seconds ± 10 %.
"""

import asyncio
import gc
import importlib
import json
import os
import random
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import aiohttp
from gateway import close_connections, durations, prompt, running_gateway

from flux2max_async import FixedSchedule, FluxSession

SPREAD = 0.1


class Baseline:
    """Generates images with aiohttp alone; `separate_submits` opens a new connection for each submit."""

    def __init__(self, url: str, interval: float, slots: int, *, separate_submits: bool = False) -> None:
        self._url, self._interval, self._separate_submits = url, interval, separate_submits
        self._slots = asyncio.Semaphore(slots)
        self.polls = 0

    async def run(self, prompts: list[str]) -> None:
        headers = {"Authorization": "Bearer key"}
        connector = aiohttp.TCPConnector(force_close=True)
        async with (
            aiohttp.ClientSession(headers=headers) as polls,
            aiohttp.ClientSession(headers=headers, connector=connector) as separate,
        ):
            submits = separate if self._separate_submits else polls
            await asyncio.gather(*(self._generate(submits, polls, text) for text in prompts))

    async def _generate(self, submits: aiohttp.ClientSession, polls: aiohttp.ClientSession, text: str) -> None:
        async with self._slots:
            body = {"model": "flux_2_max", "input": [{"params": {"prompt": text}}]}
            async with submits.post(f"{self._url}/model/v1/generation", json=body) as response:
                task_id = json.loads(await response.read())["id"]
            status = ""
            while status not in {"completed", "failed"}:
                await asyncio.sleep(self._interval * random.uniform(1 - SPREAD, 1 + SPREAD))
                async with polls.get(f"{self._url}/model/v1/generation/task/{task_id}") as response:
                    status = json.loads(await response.read())["status"]
                self.polls += 1


class SessionClient:
    """Generates images with a FluxSession: as one stream, or with one `generate()` for each."""

    def __init__(self, url: str, interval: float, slots: int, *, stream: bool = True) -> None:
        self._session = FluxSession(
            "key", base_url=url, max_in_flight=slots, schedule=FixedSchedule(interval), max_polls_per_second=None
        )
        self._stream = stream

    @property
    def polls(self) -> int:
        return self._session.stats.polls

    async def run(self, prompts: list[str]) -> None:
        async with self._session as session:
            if not self._stream:
                await asyncio.gather(*(session.generate(text) for text in prompts))
                return
            async for outcome in session.stream(prompts):
                outcome.unwrap()


def _create_client(name: str, url: str, interval: float, slots: int) -> Baseline | SessionClient:
    if name.startswith("baseline"):
        return Baseline(url, interval, slots, separate_submits=name == "baseline, separate submits")
    return SessionClient(url, interval, slots, stream=name == "stream")


# ------------------------------------------------------------------ workloads


async def cpu(client: str, tasks: int, slots: int, median: float, sigma: float, interval: float, url: str) -> float:
    """Generate images; return the CPU time in seconds, from the first submit to the end of the last task."""
    await _warm_up(client)
    seconds = durations(tasks, median, sigma)
    prompts = [prompt(number, duration) for number, duration in enumerate(seconds)]
    started = time.process_time()
    await _create_client(client, url, interval, slots).run(prompts)
    return time.process_time() - started


async def memory(client: str, tasks: int, interval: float, url: str) -> dict[str, float]:
    """Return the resident memory per waiting task in bytes, after its first poll and without connections."""
    await _warm_up(client)
    prompts = [prompt(number, 3600.0) for number in range(tasks)]
    close_connections(url)
    gc.collect()
    before, sockets = _resident(), _sockets()
    generator = _create_client(client, url, interval, tasks)
    run = asyncio.create_task(generator.run(prompts))
    while generator.polls < tasks:
        await asyncio.wait([run], timeout=0.1)
        assert not run.done(), run
    await asyncio.sleep(1)  # for the last responses
    close_connections(url)
    await asyncio.sleep(0.5)
    gc.collect()
    after = _resident()
    return {"bytes": (after - before) / tasks, "sockets": _sockets() - sockets, "polls": generator.polls / tasks}


async def stream(tasks: int, slots: int, step: int, url: str) -> dict[str, Any]:
    """Stream tasks that end immediately; return the resident memory in bytes after each `step` outcomes."""
    resident: list[int] = []
    started = time.process_time()
    async with FluxSession(
        "key", base_url=url, max_in_flight=slots, schedule=FixedSchedule(0.005), max_polls_per_second=None
    ) as session:
        number = 0
        async for outcome in session.stream(prompt(number, 0.0) for number in range(tasks)):
            outcome.unwrap()
            number += 1
            if number % step == 0:
                resident.append(_resident())
    return {"resident": resident, "cpu": (time.process_time() - started) / tasks}


async def _warm_up(client: str) -> None:
    """Generate a few images with another gateway, so that first-use costs are not measured."""
    with running_gateway() as url:
        await _create_client(client, url, 0.01, 5).run([prompt(number, 0.0) for number in range(20)])


def _resident() -> int:
    text = Path("/proc/self/smaps_rollup").read_text(encoding="ascii")
    return int(text.partition("Rss:")[2].split()[0]) * 1024


def _sockets() -> int:
    links = [link.readlink() for link in Path("/proc/self/fd").iterdir() if link.exists()]
    return sum(str(link).startswith("socket:") for link in links)


def main() -> None:
    loop, workload, *arguments, url = sys.argv[1:]
    workloads: dict[str, Callable[..., Awaitable[Any]]] = {"cpu": cpu, "memory": memory, "stream": stream}
    factory = importlib.import_module("uvloop").new_event_loop if loop == "uvloop" else None
    with asyncio.Runner(loop_factory=factory) as runner:
        values = [_parse_value(text) for text in arguments]
        print(json.dumps(runner.run(_run(workloads[workload], values, url))), flush=True)
        os._exit(0)  # without waiting for tasks that still run


async def _run(workload: Callable[..., Awaitable[Any]], arguments: list[Any], url: str) -> object:
    return await workload(*arguments, url)


def _parse_value(text: str) -> str | int | float:
    for type_ in (int, float):
        try:
            return type_(text)
        except ValueError:
            continue
    return text


if __name__ == "__main__":
    main()
