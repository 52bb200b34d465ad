"""Measures submits to a gateway that is 100 ms away, over TLS: `python benchmarks/far.py`.

Each client submits at several rhythms, to gateways that treat idle connections differently; its times are given in
round trips. Then FluxSession makes thousands of submits to gateways that close connections at the worst moments: none
may become uncertain, and none may be made twice. Needs root and /dev/net/tun; without them, it is skipped.
"""

import argparse
import asyncio
import json
import logging
import os
import random
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import aiohttp
from _results import RESULTS, about, blocks, table, write
from far_network import FarEnd, far_gateway, missing

from flux2max_async import FixedSchedule, FluxError, FluxSession, SubmissionUncertainError

ROUND_TRIP = 0.1
BURST = 24
CASES = {
    "keeps them": FarEnd(),
    "closes them after 5 s": FarEnd(idle=5),
    "closes them after 2 s": FarEnd(idle=2),
    "closes them after 1 s": FarEnd(idle=1),
}
RHYTHMS = {
    "every 0.3 s": (0.3, 1, 20),
    "every 3 s": (3.0, 1, 9),
    "every 20 s": (20.0, 1, 4),
    "bursts": (0.7, BURST, 12),
}
"""Seconds from one burst to the next, submits in a burst, and bursts."""
SAFETY = {
    "idle connections after 1 s": (FarEnd(idle=1), 1.0, 2_500),
    "idle connections after 2 s": (FarEnd(idle=2), 2.0, 2_000),
    "idle connections after 5 s": (FarEnd(idle=5), 5.0, 1_000),
    "idle connections after 15 s": (FarEnd(idle=15), 15.0, 500),
    "each connection after 3 responses": (FarEnd(requests=3), 1.0, 2_000),
    "all, in a gentle restart every 2 s": (FarEnd(restart=2), 1.5, 2_000),
}
"""What the gateway closes, the gap in seconds around which submits are made, and their number."""

_START_INTERVAL = 2.5
"""Seconds between the starts of two processes, which need the processor for about one."""

Submit = Callable[[str], Awaitable[object]]


# ---------------------------------------------------------------------- clients


@asynccontextmanager
async def open_flux(url: str, schedule: FixedSchedule | None = None) -> AsyncIterator[Submit]:
    async with FluxSession("key-1234567890", base_url=url, max_in_flight=20_000, schedule=schedule) as session:
        yield session.submit


@asynccontextmanager
async def open_flux_without_polls(url: str) -> AsyncIterator[Submit]:
    async with open_flux(url, FixedSchedule(3600.0)) as submit:
        yield submit


@asynccontextmanager
async def open_flux_on_borrowed_session(url: str) -> AsyncIterator[Submit]:
    async with (
        aiohttp.ClientSession() as http,
        FluxSession("key-1234567890", base_url=url, max_in_flight=20_000, http_session=http) as session,
    ):
        yield session.submit


@asynccontextmanager
async def open_aiohttp(url: str) -> AsyncIterator[Submit]:
    async with aiohttp.ClientSession() as session:

        async def submit(prompt: str) -> object:
            body = {"model": "flux_2_max", "input": [{"params": {"prompt": prompt}}]}
            async with session.post(f"{url}/model/v1/generation", json=body) as response:
                return await response.json()

        yield submit


@asynccontextmanager
async def open_replicate(url: str) -> AsyncIterator[Submit]:
    import replicate

    client = replicate.Client(api_token="key", base_url=f"{url}/replicate")

    async def submit(prompt: str) -> object:
        return await client.predictions.async_create(version="v", input={"prompt": prompt})

    yield submit


@asynccontextmanager
async def open_openai(url: str) -> AsyncIterator[Submit]:
    import openai

    async with openai.AsyncOpenAI(api_key="key", base_url=url) as client:

        async def submit(prompt: str) -> object:
            return await client.images.generate(model="flux_2_max", prompt=prompt)

        yield submit


CLIENTS: dict[str, tuple[str, Callable[[str], AbstractAsyncContextManager[Submit]]]] = {
    "FluxSession": ("flux2max_async", open_flux),
    "FluxSession without polls": ("flux2max_async", open_flux_without_polls),
    "FluxSession on a borrowed session": ("flux2max_async", open_flux_on_borrowed_session),
    "aiohttp": ("aiohttp", open_aiohttp),
    "openai": ("openai", open_openai),
    "replicate": ("replicate", open_replicate),
}
"""The module that has to be installed, and the client."""


# ---------------------------------------------------------------------- workloads, each in its own process


async def rhythm(client: str, gap: float, burst: int, bursts: int, url: str) -> dict[str, Any]:
    """Return the times of submits in seconds, those of the first burst separately, and the CPU time of a submit."""
    times: list[list[float]] = []
    failed = 0

    async def timed(prompt: str) -> None:
        nonlocal failed
        started = time.perf_counter()
        try:
            await submit(prompt)
        except Exception:  # noqa: BLE001 - of any client
            failed += 1
        times[-1].append(time.perf_counter() - started)

    async with CLIENTS[client][1](url) as submit:
        await asyncio.sleep(0.2)
        cpu = time.process_time()
        for number in range(bursts):
            times.append([])
            started = time.perf_counter()
            await asyncio.gather(*(timed(f"{number} {each}") for each in range(burst)))
            await asyncio.sleep(max(0.0, gap - (time.perf_counter() - started)))
        cpu = time.process_time() - cpu
    others = [time for burst in times[1:] for time in burst]
    return {"first": times[0], "others": others, "failed": failed, "cpu": cpu / (burst * bursts)}


async def safety(submits: int, gap: float, url: str) -> dict[str, int]:
    """Make submits whose gaps are just below and above `gap`, one at a time and in bursts; return how many failed."""
    generator = random.Random(1)
    uncertain = failed = 0

    async def one(prompt: str) -> None:
        nonlocal uncertain, failed
        try:
            await submit(prompt)
        except SubmissionUncertainError:
            uncertain += 1
        except FluxError:
            failed += 1

    # Right after the last answers, at any time until the gateway closes connections, and just then.
    gaps = [(0.0, 2 * ROUND_TRIP), (0.0, gap), (gap - 2.5 * ROUND_TRIP, gap + ROUND_TRIP)]
    async with open_flux_without_polls(url) as submit:
        while submits > 0:
            await asyncio.sleep(generator.uniform(*generator.choice(gaps)))
            burst = min(submits, generator.choice([1, 1, BURST]))
            await asyncio.gather(*(one(f"{submits} {each}") for each in range(burst)))
            submits -= burst
    return {"uncertain": uncertain, "failed": failed}


def run(workload: str, *arguments: object, far_end: FarEnd, number: int) -> tuple[dict[str, Any], dict[str, int]]:
    """Run a workload with its own gateway; return its results and the gateway's counts."""
    with far_gateway(ROUND_TRIP, far_end, number) as gateway:
        command = [sys.executable, __file__, "--workload", workload, *map(str, arguments), gateway.url]
        environment = os.environ | {"SSL_CERT_FILE": gateway.certificate}
        output = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, timeout=900).stdout
        time.sleep(1.2)
        return json.loads(output), gateway.counts


# ---------------------------------------------------------------------- tables


def rhythm_table(clients: list[str], shrink: int) -> str:
    """Measure all clients at all rhythms."""
    cases = CASES if shrink == 1 else dict(list(CASES.items())[:1])
    rows = []
    for client in clients:
        if find_spec(CLIENTS[client][0]) is None:
            rows.append([client, "not installed", *[""] * (3 + len(RHYTHMS))])
            continue
        # Bursts need the processor: one after the other. All else is idle most of the time.
        with ThreadPoolExecutor(len(cases) * len(RHYTHMS)) as idle, ThreadPoolExecutor(1) as busy:
            futures: dict[str, list[Future[Any]]] = {}
            for case, far_end in cases.items():
                futures[case] = []
                for gap, burst, bursts in RHYTHMS.values():
                    number = sum(map(len, futures.values()))
                    arguments = (client, gap / shrink, burst, max(2, bursts // shrink))
                    pool = idle if burst == 1 else busy
                    futures[case].append(pool.submit(run, "rhythm", *arguments, far_end=far_end, number=number))
                    if burst == 1:
                        time.sleep(_START_INTERVAL / shrink)
        for case in cases:
            results = [future.result()[0] for future in futures[case]]
            times = [[time for each in results if len(each["first"]) == 1 for time in each["first"]]]
            times += [each["others"] for each in results]
            cells = [f"{statistics.median(each) / ROUND_TRIP:.2f}" for each in times]
            cpu, failed = results[-1]["cpu"], sum(each["failed"] for each in results)
            rows.append([client, case, *cells, f"{cpu * 1000:.1f}", str(failed)])
    text = (
        f"Median time of a submit in round trips of {ROUND_TRIP * 1000:.0f} ms, over TLS, to gateways that treat idle "
        "connections differently. Opening a connection takes two. CPU time includes polls, and all connections opened."
    )
    header = ["client", "idle connections", "first", *RHYTHMS, f"CPU, ms per submit of {BURST}", "failed"]
    return blocks(text, table(header, rows))


def safety_table(shrink: int) -> str:
    """Submit just before, while and after the gateway closes connections."""
    with ThreadPoolExecutor(len(SAFETY)) as pool:
        futures = [
            pool.submit(run, "safety", submits // shrink, gap, far_end=far_end, number=100 + number)
            for number, (far_end, gap, submits) in enumerate(SAFETY.values())
        ]
    rows = []
    for case, future in zip(SAFETY, futures, strict=True):
        result, counts = future.result()
        figures = [counts["submits"], counts["connections"], result["uncertain"], counts["doubled"], result["failed"]]
        rows.append([case, *map(str, figures)])
    text = "Submits of a FluxSession, alone and in bursts, just before and after the gateway closes connections."
    header = ["the gateway closes", "submits", "connections", "uncertain", "twice", "failed otherwise"]
    return blocks(text, table(header, rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--short", action="store_true", help="only check that all parts run; the results are meaningless"
    )
    parser.add_argument("--only", default="rhythms,safety", help="parts, separated by commas (%(default)s)")
    parser.add_argument("--clients", default=",".join(CLIENTS), help="separated by commas (%(default)s)")
    parser.add_argument("--write", type=Path, nargs="?", const=RESULTS, help="also write the results to this file")
    parser.add_argument("--workload", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.workload:
        logging.disable()
        name, *values = arguments.workload
        if name == "rhythm":
            client, gap, burst, bursts, url = values
            print(json.dumps(asyncio.run(rhythm(client, float(gap), int(burst), int(bursts), url))))
        else:
            submits, gap, url = values
            print(json.dumps(asyncio.run(safety(int(submits), float(gap), url))))
        return
    if (lacking := missing()) is not None:
        print(f"skipped: the far network needs {lacking}")
        return
    shrink = 10 if arguments.short else 1
    parts = {
        "rhythms": lambda: rhythm_table(arguments.clients.split(","), shrink),
        "safety": lambda: safety_table(shrink),
    }
    text = blocks(*(parts[name]() for name in arguments.only.split(",")))
    command = shlex.join(["python", "benchmarks/far.py", *sys.argv[1:]])
    print(about(command), text, sep="\n\n")
    if arguments.write:
        write("The far network", text, command, arguments.write)


if __name__ == "__main__":
    main()
