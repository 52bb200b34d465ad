"""The client that `webhooks.py` measures: a session with an inbox and its server, in one process.

Usage: `python webhook_client.py PIECE SCENARIO NUMBER... GATEWAY_URL`. Prints its measurements as JSON.
"""

import asyncio
import hashlib
import hmac
import json
import random
import socket
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import aiohttp
from aiohttp import web
from gateway import durations, end_all, prompt
from webhook_sender import delivery_instruction, sign

from flux2max_async import FixedSchedule, FluxError, FluxSession, LearnedSchedule, WebhookInbox

SECRET = "a webhook secret for benchmarks"
TASK_TIMEOUT = 60.0
"""Seconds after which a task counts as lost."""
SIGMA = 0.3
"""Of the logarithm of the tasks' durations."""
TASK_SECONDS = 3600.0
"""Duration of tasks that are ended by the benchmark."""

Handler = Callable[[web.Request], Awaitable[web.Response]]


# ------------------------------------------------------------------ steady load


async def run_steady(
    scenario: str, tasks: int, warmup: int, slots: int, median: float, delay: float, poll_price: float, url: str
) -> dict[str, Any]:
    """Keep all slots busy until all tasks are done, and return when and how each caller got its outcome.

    Args:
        scenario: How webhooks behave; a key of `SCENARIOS` in `webhooks.py`, or "outage".
        tasks: The number of tasks.
        warmup: How many tasks are left out of the CPU time.
        slots: Tasks in flight.
        median: The median duration of a task, in seconds.
        delay: Seconds from an end to its delivery, in the scenario "late".
        poll_price: Of the learned schedule.
        url: The gateway's URL.
    """
    seconds_of_tasks = durations(tasks, median, SIGMA)
    min_seconds = sum(seconds_of_tasks) / slots
    outcomes: dict[int, tuple[float, float | None, int]] = {}
    errors: dict[int, str] = {}
    cpu: dict[int, float] = {}
    queue = iter(enumerate(seconds_of_tasks))

    async def work(slot: int) -> None:
        await asyncio.sleep(median * slot / slots)  # otherwise all tasks would end at the same time, repeatedly
        for number, seconds in queue:
            expected_end = (time.monotonic() + seconds - started) / min_seconds
            text = prompt(number, seconds) + _instruction(scenario, rng, delay, expected_end)
            try:
                completed = await session.generate(text)
            except FluxError as error:
                errors[number] = repr(error)
            else:
                outcomes[number] = time.monotonic(), completed.metadata.get("sent_at"), completed.polls
            cpu[len(outcomes)] = time.process_time()

    rng = random.Random(3)
    async with _running_inbox(reachable=scenario != "unreachable") as inbox:
        started, started_cpu = time.monotonic(), time.process_time()
        async with FluxSession(
            "key",
            base_url=url,
            max_in_flight=slots,
            schedule=LearnedSchedule(poll_price=poll_price),
            max_polls_per_second=None,
            task_timeout=TASK_TIMEOUT,
            webhooks=None if scenario == "polling" else inbox,
        ) as session:
            await asyncio.gather(*map(work, range(slots)))
    # All slots are busy at both of these moments.
    first, last = warmup, max(tasks - slots, warmup + 1)
    return {
        "outcomes": outcomes,
        "errors": errors,
        "cpu": (cpu.get(last, started_cpu) - cpu.get(first, started_cpu)) / (last - first),
        "started": started,
        "min_seconds": min_seconds,
        "seconds": time.monotonic() - started,
    }


def _instruction(scenario: str, rng: random.Random, delay: float, expected_end: float) -> str:
    """Return what a prompt says about its deliveries.

    Args:
        scenario: How webhooks behave.
        rng: Decides which deliveries are lost.
        delay: Seconds from an end to its delivery, in the scenario "late".
        expected_end: When the task ends, as a fraction of the minimum duration of the run.
    """
    match scenario:
        case "half":
            return delivery_instruction(rng.randrange(2))
        case "late":
            return delivery_instruction(1, delay)
        case "twice":
            return delivery_instruction(2)
        case "outage":
            return delivery_instruction(0 if 1 / 3 <= expected_end < 2 / 3 else 1)
        case _:
            return ""


# ------------------------------------------------------------------ many deliveries at once


async def run_burst(receiver: str, tasks: int, runs: int, url: str) -> list[dict[str, float]]:
    """Let many tasks end at once, and measure from the first delivery until the last caller has its outcome."""
    prepare = {"by hand": _by_hand, "handler": _by_handler, "deliver": _by_deliver}[receiver]
    results: list[dict[str, float]] = []
    async for waits, end_tasks in prepare(tasks, runs, url):
        await asyncio.sleep(0.2)  # until the last submit has been processed
        started, started_cpu = time.monotonic(), time.process_time()
        await end_tasks()
        await asyncio.gather(*waits)
        cpu = (time.process_time() - started_cpu) / tasks
        results.append({"cpu": cpu, "seconds": time.monotonic() - started})
    return results[1:]  # the first run includes imports


Burst = tuple[list["asyncio.Future[Any]"], Callable[[], Awaitable[object]]]
"""The callers' waits, and the function that ends all tasks."""


async def _by_hand(tasks: int, runs: int, url: str) -> AsyncIterator[Burst]:
    """Receive webhooks with aiohttp.web alone."""
    waiting: dict[str, asyncio.Future[Any]] = {}

    async def handle(request: web.Request) -> web.Response:
        body = await request.read()
        expected = hmac.new(SECRET.encode(), body, hashlib.sha256).hexdigest()
        if not hmac.compare_digest(request.headers["X-BFL-Signature"], f"sha256={expected}"):
            return web.Response(status=401)
        task = json.loads(body)
        waiting.pop(task["id"]).set_result(task)
        return web.Response(text="ok")

    with _bound_socket() as (listener, address):
        async with _running_server(listener, handle), aiohttp.ClientSession() as http:
            for run in range(runs + 1):
                for number in range(tasks):
                    params = {
                        "prompt": prompt(run * tasks + number, TASK_SECONDS),
                        "webhook_url": address,
                        "webhook_secret": SECRET,
                    }
                    submit = {"model": "flux_2_max", "input": [{"params": params}]}
                    async with http.post(f"{url}/model/v1/generation", json=submit) as response:
                        waiting[(await response.json())["id"]] = asyncio.get_running_loop().create_future()
                yield list(waiting.values()), lambda: asyncio.to_thread(end_all, url)


async def _by_handler(tasks: int, runs: int, url: str) -> AsyncIterator[Burst]:
    """Receive webhooks with an inbox and its aiohttp handler."""
    async with _running_inbox() as inbox, _session(tasks, url, inbox) as session:
        for run in range(runs + 1):
            handles = await _submit_all(session, run, tasks)
            yield [asyncio.ensure_future(_wait(task)) for task in handles], lambda: asyncio.to_thread(end_all, url)


async def _by_deliver(tasks: int, runs: int, url: str) -> AsyncIterator[Burst]:
    """Pass webhooks to `inbox.deliver()`, without a server."""

    async def deliver() -> None:
        for body, headers in deliveries:
            await inbox.deliver(body, headers)

    async with _running_inbox(reachable=False) as inbox, _session(tasks, url, inbox) as session:
        for run in range(runs + 1):
            handles = await _submit_all(session, run, tasks)
            deliveries = [_delivery(task.id) for task in handles]
            yield [asyncio.ensure_future(_wait(task)) for task in handles], deliver


async def _submit_all(session: FluxSession, run: int, tasks: int) -> list[Any]:
    numbers = range(run * tasks, (run + 1) * tasks)
    return await asyncio.gather(*(session.submit(prompt(number, TASK_SECONDS)) for number in numbers))


def _delivery(task_id: str) -> tuple[bytes, dict[str, str]]:
    content = {"type": "image", "url": f"http://127.0.0.1/{task_id}.jpeg", "jobId": task_id}
    task = {"id": task_id, "status": "completed", "output": [{"content": [content]}], "usage": {"cost": "0.07"}}
    body, signature = sign(task, SECRET)
    return body, {"X-BFL-Signature": signature}


async def _wait(task: Awaitable[Any]) -> None:
    await task


def _session(slots: int, url: str, inbox: WebhookInbox) -> FluxSession:
    """Create a session that doesn't poll during the benchmark."""
    return FluxSession("key", base_url=url, max_in_flight=slots, schedule=FixedSchedule(3600), webhooks=inbox)


# ------------------------------------------------------------------ servers


@asynccontextmanager
async def _running_inbox(*, reachable: bool = True) -> AsyncIterator[WebhookInbox]:
    """Create an inbox, and serve it if it is reachable."""
    with _bound_socket() as (listener, address):
        inbox = WebhookInbox(secret=SECRET, public_url=address)
        if not reachable:
            yield inbox
            return
        async with _running_server(listener, inbox.aiohttp_handler):
            yield inbox


@contextmanager
def _bound_socket() -> Iterator[tuple[socket.socket, str]]:
    """Bind a free port, which refuses connections until a server listens on it."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        yield listener, f"http://127.0.0.1:{listener.getsockname()[1]}/hook"


@asynccontextmanager
async def _running_server(listener: socket.socket, handler: Handler) -> AsyncIterator[None]:
    app = web.Application()
    app.router.add_post("/hook", handler)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.SockSite(runner, listener).start()
    try:
        yield
    finally:
        await runner.cleanup()


PIECES: dict[str, Callable[..., Coroutine[Any, Any, Any]]] = {"steady": run_steady, "burst": run_burst}


def main() -> None:
    piece, scenario, *numbers, url = sys.argv[1:]
    print(json.dumps(asyncio.run(PIECES[piece](scenario, *map(json.loads, numbers), url))))


if __name__ == "__main__":
    main()
