"""The peers, each used as its own documentation says, and this library beside them: the same pictures, 24 places.

`python benchmarks/peers.py NAME TASKS SECONDS URL` runs one of them, in this process, and prints what its caller got.
"""

import asyncio
import json
import math
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

from _results import blocks, table
from gateway import durations, measured, prompt, running

PLACES = 24
SIGMA = 0.4
AT_ONCE = 3  # clients measured at the same time: they wait most of it, and their CPU time is their own

Draw = Callable[[str], Awaitable[object]]
"""Asks for a picture, and comes back when it is there."""


@asynccontextmanager
async def by_flux(url: str) -> AsyncIterator[Draw]:
    from flux2max_async import FluxSession

    async with FluxSession("key", base_url=url, max_in_flight=PLACES) as session:
        yield session.generate


@asynccontextmanager
async def by_replicate_run(url: str) -> AsyncIterator[Draw]:
    import replicate

    client = replicate.Client(api_token="key", base_url=f"{url}/replicate")

    async def draw(text: str) -> object:
        return await client.async_run("black-forest-labs/flux-schnell", input={"prompt": text})

    yield draw


@asynccontextmanager
async def by_replicate_wait(url: str) -> AsyncIterator[Draw]:
    import replicate

    client = replicate.Client(api_token="key", base_url=f"{url}/replicate")

    async def draw(text: str) -> object:
        model = "black-forest-labs/flux-schnell"
        prediction = await client.predictions.async_create(model=model, input={"prompt": text})
        await prediction.async_wait()
        assert prediction.status == "succeeded"
        return prediction.output

    yield draw


@asynccontextmanager
async def by_fal(url: str) -> AsyncIterator[Draw]:
    import fal_client

    # Its host can be set from outside (FAL_QUEUE_RUN_HOST), its https can't; all clients here speak plain http.
    fal_client.client.QUEUE_URL_FORMAT = f"{url}/fal/"
    client = fal_client.AsyncClient(key="key")

    async def draw(text: str) -> object:
        handle = await client.submit("fal-ai/flux", arguments={"prompt": text})
        return (await handle.get())["images"]

    yield draw


@asynccontextmanager
async def by_luma(url: str) -> AsyncIterator[Draw]:
    from lumaai import AsyncLumaAI

    async with AsyncLumaAI(auth_token="key", base_url=f"{url}/luma") as client:

        async def draw(text: str) -> object:
            generation = await client.generations.image.create(model="photon-1", prompt=text)
            while True:
                generation = await client.generations.get(id=generation.id)
                if generation.state == "completed":
                    return generation.assets.image
                assert generation.state != "failed"
                await asyncio.sleep(3)

        yield draw


@asynccontextmanager
async def by_runway(url: str) -> AsyncIterator[Draw]:
    from runwayml import AsyncRunwayML

    async with AsyncRunwayML(api_key="key", base_url=f"{url}/runway") as client:

        async def draw(text: str) -> object:
            task = await client.text_to_image.create(model="gen4_image", ratio="1360:768", prompt_text=text)
            return (await task.wait_for_task_output()).output

        yield draw


@asynccontextmanager
async def by_seaart(url: str) -> AsyncIterator[Draw]:
    import seaart_sdk

    client = seaart_sdk.Client(seaart_sdk.ClientConfig(api_key="key", base_url=url))
    threads = ThreadPoolExecutor(PLACES)  # it has no asynchronous face

    def blocking(text: str) -> object:
        task = client.modal.create({"model": "flux_2_max", "input": [{"params": {"prompt": text}}]})
        return task.wait(seaart_sdk.with_poll_interval(3.0)).urls()

    async def draw(text: str) -> object:
        return await asyncio.get_running_loop().run_in_executor(threads, blocking, text)

    yield draw


@dataclass
class Client:
    """One way to ask for a picture and wait for it."""

    distribution: str
    module: str
    way: str
    """How it is used."""
    enter: Callable[[str], AbstractAsyncContextManager[Draw]]


CLIENTS = {
    "flux2max_async": Client("flux2max_async", "flux2max_async", "`generate()`, the schedule that learns", by_flux),
    "seaart-sdk": Client("seaart-sdk", "seaart_sdk", "`create()`, `wait()` every 3 s, in threads", by_seaart),
    "replicate-run": Client("replicate", "replicate", "`async_run()`, the service holds the answer", by_replicate_run),
    "replicate-wait": Client("replicate", "replicate", "`async_create()`, `async_wait()`", by_replicate_wait),
    "fal-client": Client("fal-client", "fal_client", "`submit()`, `get()`", by_fal),
    "lumaai": Client("lumaai", "lumaai", "`create()`, a loop with `get()` every 3 s", by_luma),
    "runwayml": Client("runwayml", "runwayml", "`create()`, `wait_for_task_output()`", by_runway),
}

# ------------------------------------------------------------------ one client, in a process of its own


async def run(name: str, tasks: int, median: float, url: str) -> dict[str, Any]:
    """Draw all pictures with one client; tell its CPU time, when its caller got each, and the errors."""
    places = asyncio.Semaphore(PLACES)
    got: dict[int, float] = {}
    errors: dict[int, tuple[str, bool]] = {}

    async def one(number: int, seconds: float) -> None:
        async with places:
            try:
                await draw(prompt(number, seconds))
            except Exception as error:  # noqa: BLE001 - of whatever kind: the picture is not there
                # Whether its caller can know that there may be a task that costs money.
                told = error.__class__.__name__ == "SubmissionUncertainError" or bool(getattr(error, "task_id", None))
                errors[number] = (error.__class__.__name__, told)
            else:
                got[number] = time.monotonic()

    # What is loaded at first use is loaded by a picture drawn elsewhere.
    with running() as elsewhere:
        async with CLIENTS[name].enter(elsewhere) as draw:
            await draw(prompt(0, 0.0))
    async with CLIENTS[name].enter(url) as draw:
        began, began_cpu = time.monotonic(), time.process_time()
        await asyncio.gather(*(one(n, seconds) for n, seconds in enumerate(durations(tasks, median, SIGMA))))
        cpu, seconds = time.process_time() - began_cpu, time.monotonic() - began
        return {"cpu": cpu, "seconds": seconds, "got": got, "errors": errors}


# ------------------------------------------------------------------ all of them, side by side


def compared(tasks: int, median: float, names: list[str]) -> str:
    """Measure the clients without and with faults; give two tables in Markdown."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        rows = {
            faults: [pool.submit(_row, name, tasks, median, faults=faults) for name in names]
            for faults in (False, True)
        }
    header = [
        "client", "used by", "CPU per task, ms", "calls per task", "delay, mean s", "delay, 95th percentile s",
        "whole run, s",
    ]  # fmt: skip
    more = ["got", "paid and lost", "of these told", "given up, not paid", "paid twice", "errors"]
    calm, faulty = ([row.result() for row in rows[faults]] for faults in (False, True))
    return blocks(
        f"{tasks} tasks, lognormal, median {median:g} s, sigma {SIGMA}; {PLACES} places; each client with the retries "
        "and poll times that are its own. Delay: from a task's end at the gateway to the return of its caller's await. "
        "The gateway tells no progress. Without faults:",
        table([*header, "lost"], [[*row[:7], *row[8:9]] for row in calm]),
        "With faults, on each call: 429 on 10 % (`Retry-After: 1`), 503 on 5 % (a proxy's page), a reset after "
        "accepting on 2 %. Lost: a task was created, and so paid, and its caller got no picture; told: the error says "
        "that it may cost money, or names the task. Paid twice: tasks created beyond the first for the same request.",
        table([header[0], *header[2:], *more], [[row[0], *row[2:]] for row in faulty]),
    )


def _row(name: str, tasks: int, median: float, *, faults: bool) -> list[str]:
    client = CLIENTS[name]
    if find_spec(client.module) is None:
        return [client.distribution, "not installed"]
    title = [f"{client.distribution} {version(client.distribution)}", client.way]
    arguments = (__file__, name, str(tasks), str(median))
    try:
        result, books = measured(*arguments, options=("--faults",) if faults else ())
    except subprocess.CalledProcessError as error:
        return [title[0], f"failed: {error.stderr.strip().splitlines()[-1]}"]
    except subprocess.TimeoutExpired:
        return [title[0], "not done in time"]
    got: dict[str, float] = result["got"]
    errors: dict[str, tuple[str, bool]] = result["errors"]
    ends: dict[str, list[float]] = books["ends"]
    # A request that was paid twice has several ends: what its caller got is the newest task that had ended.
    delays = sorted(moment - max(end for end in ends[number] if end <= moment) for number, moment in got.items())
    lost = [number for number in ends if number not in got]
    return [
        *title,
        f"{result['cpu'] / tasks * 1e3:.2f}",
        f"{books['calls'] / tasks:.1f}",
        f"{statistics.mean(delays):.2f}" if delays else "-",
        f"{delays[math.ceil(0.95 * len(delays)) - 1]:.2f}" if delays else "-",
        f"{result['seconds']:.0f}",
        str(len(got)),
        str(len(lost)),
        str(sum(errors[number][1] for number in lost)),
        str(tasks - len(got) - len(lost)),
        str(sum(len(tries) - 1 for tries in ends.values())),
        ", ".join(f"{count} {kind}" for kind, count in Counter(kind for kind, _ in errors.values()).items()) or "-",
    ]


if __name__ == "__main__":
    print(json.dumps(asyncio.run(run(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), sys.argv[4]))))
