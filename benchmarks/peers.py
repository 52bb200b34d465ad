"""Other clients, each used as its documentation says, compared with this library: the same tasks in 24 slots.

`python benchmarks/peers.py NAME TASKS SECONDS URL` runs one of them in this process and prints its results.
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
from gateway import durations, prompt, run_client, running_gateway

SLOTS = 24
SIGMA = 0.4
CONCURRENT_CLIENTS = 3
"""Clients that are measured at the same time: they are mostly idle, and CPU time is measured per process."""

Generate = Callable[[str], Awaitable[object]]
"""Generates an image from a prompt and waits for it."""


@asynccontextmanager
async def open_flux(url: str) -> AsyncIterator[Generate]:
    from flux2max_async import FluxSession

    async with FluxSession("key", base_url=url, max_in_flight=SLOTS) as session:
        yield session.generate


@asynccontextmanager
async def open_replicate_run(url: str) -> AsyncIterator[Generate]:
    import replicate

    client = replicate.Client(api_token="key", base_url=f"{url}/replicate")

    async def generate(text: str) -> object:
        return await client.async_run("black-forest-labs/flux-schnell", input={"prompt": text})

    yield generate


@asynccontextmanager
async def open_replicate_wait(url: str) -> AsyncIterator[Generate]:
    import replicate

    client = replicate.Client(api_token="key", base_url=f"{url}/replicate")

    async def generate(text: str) -> object:
        model = "black-forest-labs/flux-schnell"
        prediction = await client.predictions.async_create(model=model, input={"prompt": text})
        await prediction.async_wait()
        assert prediction.status == "succeeded"
        return prediction.output

    yield generate


@asynccontextmanager
async def open_fal(url: str) -> AsyncIterator[Generate]:
    import fal_client

    # The host can be configured (FAL_QUEUE_RUN_HOST), but not the scheme, and all clients here use plain http.
    fal_client.client.QUEUE_URL_FORMAT = f"{url}/fal/"
    client = fal_client.AsyncClient(key="key")

    async def generate(text: str) -> object:
        handle = await client.submit("fal-ai/flux", arguments={"prompt": text})
        return (await handle.get())["images"]

    yield generate


@asynccontextmanager
async def open_luma(url: str) -> AsyncIterator[Generate]:
    from lumaai import AsyncLumaAI

    async with AsyncLumaAI(auth_token="key", base_url=f"{url}/luma") as client:

        async def generate(text: str) -> object:
            generation = await client.generations.image.create(model="photon-1", prompt=text)
            while True:
                generation = await client.generations.get(id=generation.id)
                if generation.state == "completed":
                    return generation.assets.image
                assert generation.state != "failed"
                await asyncio.sleep(3)

        yield generate


@asynccontextmanager
async def open_runway(url: str) -> AsyncIterator[Generate]:
    from runwayml import AsyncRunwayML

    async with AsyncRunwayML(api_key="key", base_url=f"{url}/runway") as client:

        async def generate(text: str) -> object:
            task = await client.text_to_image.create(model="gen4_image", ratio="1360:768", prompt_text=text)
            return (await task.wait_for_task_output()).output

        yield generate


@asynccontextmanager
async def open_seaart(url: str) -> AsyncIterator[Generate]:
    import seaart_sdk

    client = seaart_sdk.Client(seaart_sdk.ClientConfig(api_key="key", base_url=url))
    threads = ThreadPoolExecutor(SLOTS)  # it has no asynchronous API

    def blocking(text: str) -> object:
        task = client.modal.create({"model": "flux_2_max", "input": [{"params": {"prompt": text}}]})
        return task.wait(seaart_sdk.with_poll_interval(3.0)).urls()

    async def generate(text: str) -> object:
        return await asyncio.get_running_loop().run_in_executor(threads, blocking, text)

    yield generate


@dataclass
class Client:
    """One way to generate images with a library."""

    distribution: str
    module: str
    usage: str
    """The calls that are used."""
    open: Callable[[str], AbstractAsyncContextManager[Generate]]


CLIENTS = {
    "flux2max_async": Client("flux2max_async", "flux2max_async", "`generate()`, learned schedule", open_flux),
    "seaart-sdk": Client("seaart-sdk", "seaart_sdk", "`create()`, `wait()` every 3 s, in threads", open_seaart),
    "replicate-run": Client("replicate", "replicate", "`async_run()`, with a delayed response", open_replicate_run),
    "replicate-wait": Client("replicate", "replicate", "`async_create()`, `async_wait()`", open_replicate_wait),
    "fal-client": Client("fal-client", "fal_client", "`submit()`, `get()`", open_fal),
    "lumaai": Client("lumaai", "lumaai", "`create()`, `get()` every 3 s", open_luma),
    "runwayml": Client("runwayml", "runwayml", "`create()`, `wait_for_task_output()`", open_runway),
}

# ------------------------------------------------------------------ one client, in its own process


async def run(name: str, tasks: int, median: float, url: str) -> dict[str, Any]:
    """Run all tasks with one client; return its CPU time, when each task was delivered, and the errors."""
    slots = asyncio.Semaphore(SLOTS)
    delivered: dict[int, float] = {}
    errors: dict[int, tuple[str, bool]] = {}

    async def run_task(number: int, duration: float) -> None:
        async with slots:
            try:
                await generate(prompt(number, duration))
            except Exception as error:  # noqa: BLE001 - any error means that the image was not delivered
                # Whether the caller can know that there may be a task that costs money.
                is_reported = error.__class__.__name__ == "SubmissionUncertainError" or bool(
                    getattr(error, "task_id", None)
                )
                errors[number] = (error.__class__.__name__, is_reported)
            else:
                delivered[number] = time.monotonic()

    # One image from another gateway, so that first-use costs are not measured.
    with running_gateway() as other_url:
        async with CLIENTS[name].open(other_url) as generate:
            await generate(prompt(0, 0.0))
    async with CLIENTS[name].open(url) as generate:
        started, cpu_started = time.monotonic(), time.process_time()
        await asyncio.gather(*(run_task(n, duration) for n, duration in enumerate(durations(tasks, median, SIGMA))))
        cpu, seconds = time.process_time() - cpu_started, time.monotonic() - started
        return {"cpu": cpu, "seconds": seconds, "delivered": delivered, "errors": errors}


# ------------------------------------------------------------------ comparison of all clients


def compare(tasks: int, median: float, names: list[str]) -> str:
    """Measure the clients without and with faults; return two tables in Markdown."""
    with ThreadPoolExecutor(CONCURRENT_CLIENTS) as pool:
        rows = {
            faults: [pool.submit(_row, name, tasks, median, faults=faults) for name in names]
            for faults in (False, True)
        }
    header = [
        "client", "usage", "CPU per task, ms", "requests per task", "delay, mean s", "delay, 95th percentile s",
        "duration, s",
    ]  # fmt: skip
    fault_columns = ["delivered", "paid and lost", "of these reported", "failed, not paid", "paid twice", "errors"]
    without_faults, with_faults = ([row.result() for row in rows[faults]] for faults in (False, True))
    return blocks(
        f"{tasks} tasks, lognormal, median {median:g} s, sigma {SIGMA}; {SLOTS} slots; each client with its own "
        "retries and poll times. Delay: from the end of a task at the gateway to the return of its caller's await. "
        "The gateway reports no progress. Without faults:",
        table([*header, "lost"], [[*row[:7], *row[8:9]] for row in without_faults]),
        "With faults, for each request: 10 % are responded to with 429 (`Retry-After: 1`), 5 % with 503 (a proxy's "
        "page), and 2 % are reset after they were accepted. Lost: a task was created, and so paid for, and its caller "
        "got no image; reported: the error says that it may cost money, or has the task's id. Paid twice: tasks beyond "
        "the first for the same request.",
        table([header[0], *header[2:], *fault_columns], [[row[0], *row[2:]] for row in with_faults]),
    )


def _row(name: str, tasks: int, median: float, *, faults: bool) -> list[str]:
    client = CLIENTS[name]
    if find_spec(client.module) is None:
        return [client.distribution, "not installed"]
    title = [f"{client.distribution} {version(client.distribution)}", client.usage]
    arguments = (__file__, name, str(tasks), str(median))
    try:
        result, counters = run_client(*arguments, options=("--faults",) if faults else ())
    except subprocess.CalledProcessError as error:
        return [title[0], f"failed: {error.stderr.strip().splitlines()[-1]}"]
    except subprocess.TimeoutExpired:
        return [title[0], "timed out"]
    delivered: dict[str, float] = result["delivered"]
    errors: dict[str, tuple[str, bool]] = result["errors"]
    ends: dict[str, list[float]] = counters["ends"]
    # A request that was paid twice has several tasks: its caller got the newest one that had ended.
    delays = sorted(now - max(end for end in ends[number] if end <= now) for number, now in delivered.items())
    lost = [number for number in ends if number not in delivered]
    return [
        *title,
        f"{result['cpu'] / tasks * 1e3:.2f}",
        f"{counters['calls'] / tasks:.1f}",
        f"{statistics.mean(delays):.2f}" if delays else "-",
        f"{delays[math.ceil(0.95 * len(delays)) - 1]:.2f}" if delays else "-",
        f"{result['seconds']:.0f}",
        str(len(delivered)),
        str(len(lost)),
        str(sum(errors[number][1] for number in lost)),
        str(tasks - len(delivered) - len(lost)),
        str(sum(len(end_times) - 1 for end_times in ends.values())),
        ", ".join(f"{count} {name}" for name, count in Counter(name for name, _ in errors.values()).items()) or "-",
    ]


if __name__ == "__main__":
    print(json.dumps(asyncio.run(run(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), sys.argv[4]))))
