"""What is measured, each piece in a process of its own: `python benchmarks/workloads.py WORK ARGUMENTS URL` prints JSON.

`by_hand` is the least that works, for comparison: one aiohttp session, `json.loads`, a loop per task. It polls at the
same times as the session does: every `interval` seconds, give or take a tenth.
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
from gateway import close_connections, durations, prompt, running

from flux2max_async import FixedSchedule, FluxSession

SPREAD = 0.1


class ByHand:
    """Asks for pictures with aiohttp and nothing else; `apart` gives each submit a connection of its own."""

    def __init__(self, url: str, interval: float, places: int, *, apart: bool = False) -> None:
        self._url, self._interval, self._apart = url, interval, apart
        self._places = asyncio.Semaphore(places)
        self.polls = 0

    async def all(self, prompts: list[str]) -> None:
        key = {"Authorization": "Bearer key"}
        once = aiohttp.TCPConnector(force_close=True)
        async with (
            aiohttp.ClientSession(headers=key) as http,
            aiohttp.ClientSession(headers=key, connector=once) as http_once,
        ):
            submits = http_once if self._apart else http
            await asyncio.gather(*(self._one(submits, http, text) for text in prompts))

    async def _one(self, submits: aiohttp.ClientSession, polls: aiohttp.ClientSession, text: str) -> None:
        async with self._places:
            body = {"model": "flux_2_max", "input": [{"params": {"prompt": text}}]}
            async with submits.post(f"{self._url}/model/v1/generation", json=body) as response:
                task_id = json.loads(await response.read())["id"]
            status = ""
            while status not in {"completed", "failed"}:
                await asyncio.sleep(self._interval * random.uniform(1 - SPREAD, 1 + SPREAD))
                async with polls.get(f"{self._url}/model/v1/generation/task/{task_id}") as response:
                    status = json.loads(await response.read())["status"]
                self.polls += 1


class BySession:
    """Asks for pictures with a FluxSession: as one stream, or each with a `generate()` of its own."""

    def __init__(self, url: str, interval: float, places: int, *, stream: bool = True) -> None:
        self._session = FluxSession(
            "key", base_url=url, max_in_flight=places, schedule=FixedSchedule(interval), max_polls_per_second=None
        )
        self._stream = stream

    @property
    def polls(self) -> int:
        return self._session.stats.polls

    async def all(self, prompts: list[str]) -> None:
        async with self._session as session:
            if not self._stream:
                await asyncio.gather(*(session.generate(text) for text in prompts))
                return
            async for outcome in session.stream(prompts):
                outcome.unwrap()


def _client(name: str, url: str, interval: float, places: int) -> ByHand | BySession:
    if name.startswith("by hand"):
        return ByHand(url, interval, places, apart=name == "by hand, apart")
    return BySession(url, interval, places, stream=name == "stream")


# ------------------------------------------------------------------ the pieces of work


async def cpu(client: str, tasks: int, places: int, median: float, sigma: float, interval: float, url: str) -> float:
    """Ask for pictures, and give the seconds of CPU time from the first submit to the last end."""
    await _warm_up(client)
    seconds = durations(tasks, median, sigma)
    prompts = [prompt(number, lasting) for number, lasting in enumerate(seconds)]
    began = time.process_time()
    await _client(client, url, interval, places).all(prompts)
    return time.process_time() - began


async def memory(client: str, tasks: int, interval: float, url: str) -> dict[str, float]:
    """Give what each of so many waiting tasks keeps resident, in bytes, after its first poll, without connections."""
    await _warm_up(client)
    prompts = [prompt(number, 3600.0) for number in range(tasks)]
    close_connections(url)
    gc.collect()
    before, sockets = _resident(), _sockets()
    waiting = _client(client, url, interval, tasks)
    work = asyncio.create_task(waiting.all(prompts))
    while waiting.polls < tasks:
        await asyncio.wait([work], timeout=0.1)
        assert not work.done(), work
    await asyncio.sleep(1)  # for the last answers
    close_connections(url)
    await asyncio.sleep(0.5)
    gc.collect()
    after = _resident()
    return {"bytes": (after - before) / tasks, "sockets": _sockets() - sockets, "polls": waiting.polls / tasks}


async def stream(tasks: int, places: int, every: int, url: str) -> dict[str, Any]:
    """Stream pictures that are done at once, and give the resident memory after each so many of them, in bytes."""
    resident: list[int] = []
    began = time.process_time()
    async with FluxSession(
        "key", base_url=url, max_in_flight=places, schedule=FixedSchedule(0.005), max_polls_per_second=None
    ) as session:
        number = 0
        async for outcome in session.stream(prompt(number, 0.0) for number in range(tasks)):
            outcome.unwrap()
            number += 1
            if number % every == 0:
                resident.append(_resident())
    return {"resident": resident, "cpu": (time.process_time() - began) / tasks}


async def _warm_up(client: str) -> None:
    """Draw a few pictures elsewhere first, so that what is loaded at first use is loaded."""
    with running() as url:
        await _client(client, url, 0.01, 5).all([prompt(number, 0.0) for number in range(20)])


def _resident() -> int:
    text = Path("/proc/self/smaps_rollup").read_text(encoding="ascii")
    return int(text.partition("Rss:")[2].split()[0]) * 1024


def _sockets() -> int:
    links = [link.readlink() for link in Path("/proc/self/fd").iterdir() if link.exists()]
    return sum(str(link).startswith("socket:") for link in links)


def main() -> None:
    loop, work, *arguments, url = sys.argv[1:]
    pieces: dict[str, Callable[..., Awaitable[Any]]] = {"cpu": cpu, "memory": memory, "stream": stream}
    factory = importlib.import_module("uvloop").new_event_loop if loop == "uvloop" else None
    with asyncio.Runner(loop_factory=factory) as runner:
        print(json.dumps(runner.run(_run(pieces[work], [_value(text) for text in arguments], url))), flush=True)
        os._exit(0)  # what still waits is left waiting


async def _run(piece: Callable[..., Awaitable[Any]], arguments: list[Any], url: str) -> object:
    return await piece(*arguments, url)


def _value(text: str) -> str | int | float:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


if __name__ == "__main__":
    main()
