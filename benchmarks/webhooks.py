"""What webhooks bring: `python benchmarks/webhooks.py` measures delays, polls and CPU time with them and without them.

Each client runs in a process of its own, with its webhooks' server in it, against a gateway in another process, which
posts them. A delivery tells when its sender began with it, on the clock that both processes share. CPU time is what
the operating system says that the client's process has used, system calls and the webhooks' server included.

It fails if a task is lost: if one has no outcome, an outcome before its end, or more than one submit.
"""

import argparse
import asyncio
import hashlib
import hmac
import json
import math
import random
import shlex
import socket
import statistics
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import aiohttp
from _results import RESULTS, about, blocks, table, write
from aiohttp import web
from gateway import durations, end_all, measured, prompt
from webhook_sender import signed, told

from flux2max_async import FixedSchedule, FluxError, FluxSession, LearnedSchedule, WebhookInbox

SECRET = "a secret of the two sides"
PATIENCE = 60.0
"""Seconds after which a task counts as lost."""
SIGMA = 0.3

Handler = Callable[[web.Request], Awaitable[web.Response]]


@dataclass
class Size:
    """How much is measured."""

    tasks: int
    left_out: int
    """The first so many, while the schedule learns."""
    places: int
    seconds: float
    """The median of a task."""
    late: float
    """Seconds from an end to its delivery, where that comes late."""
    stopped: int
    """Tasks, where deliveries stop for a third of the time."""
    reaction: float
    """Seconds after such a change that are looked at by themselves."""
    burst: int
    """Deliveries at once."""
    runs: int
    """How often each kind of webhooks is measured, and such a burst."""
    clients: int
    """Measured at the same time: they wait most of it, and their CPU time is their own."""
    price: float = 0.1
    """Of a poll, in seconds; as the schedule has it where none is given."""


FULL = Size(
    tasks=1_100, left_out=500, places=200, seconds=4.0, late=1.0, stopped=2_400, reaction=5.0, burst=1_000, runs=2,
    clients=3,
)  # fmt: skip
SHORT = Size(
    tasks=30, left_out=10, places=10, seconds=0.3, late=0.1, stopped=40, reaction=0.2, burst=20, runs=1,
    clients=6, price=0.002,
)  # fmt: skip

WAYS = {
    "polling": "polling alone, no inbox",
    "on time": "webhooks that work",
    "half": "half of them are lost",
    "nowhere": "none arrives: nobody listens at the address",
    "late": "each {late:g} s late",
    "twice": "each comes twice",
}

# ------------------------------------------------------------------ the client, in a process of its own


async def steady(
    way: str, tasks: int, left_out: int, places: int, median: float, late: float, price: float, url: str
) -> Any:
    """Keep so many tasks in flight; tell when each caller got its own, by what, and after how many polls."""
    work = iter(enumerate(durations(tasks, median, SIGMA)))
    chance = random.Random(3)
    whole = sum(durations(tasks, median, SIGMA)) / places
    """Seconds that it takes at least."""
    got: dict[int, tuple[float, float | None, int]] = {}
    errors: dict[int, str] = {}
    cpu: dict[int, float] = {}

    def words(seconds: float) -> str:
        match way:
            case "half":
                return told(chance.randrange(2))
            case "late":
                return told(1, late)
            case "twice":
                return told(2)
            case "stopped":
                return told(0 if whole / 3 <= time.monotonic() + seconds - began < whole * 2 / 3 else 1)
            case _:
                return ""

    async def keep_going(place: int) -> None:
        await asyncio.sleep(median * place / places)  # or all would end together, again and again
        for number, seconds in work:
            try:
                completed = await session.generate(prompt(number, seconds) + words(seconds))
            except FluxError as error:
                errors[number] = repr(error)
            else:
                got[number] = time.monotonic(), completed.metadata.get("sent_at"), completed.polls
            cpu[len(got)] = time.process_time()

    async with _inbox(reachable=way != "nowhere") as inbox:
        began, began_cpu = time.monotonic(), time.process_time()
        async with FluxSession(
            "key",
            base_url=url,
            max_in_flight=places,
            schedule=LearnedSchedule(poll_price=price),
            max_polls_per_second=None,
            task_timeout=PATIENCE,
            webhooks=None if way == "polling" else inbox,
        ) as session:
            await asyncio.gather(*map(keep_going, range(places)))
    # All places are taken at both moments.
    first, last = left_out, max(tasks - places, left_out + 1)
    used = (cpu.get(last, began_cpu) - cpu.get(first, began_cpu)) / (last - first)
    seconds = time.monotonic() - began
    return {"got": got, "errors": errors, "cpu": used, "began": began, "whole": whole, "seconds": seconds}


async def burst(way: str, tasks: int, runs: int, url: str) -> Any:
    """Have so many tasks end at once; give the CPU time from the first delivery to the last caller's return."""
    receive = {"by hand": _by_hand, "handler": _by_handler, "deliver": _by_deliver}[way]
    found = []
    async for ends in receive(tasks, runs, url):
        waits, release = ends
        await asyncio.sleep(0.2)  # for the last answers
        began, began_cpu = time.monotonic(), time.process_time()
        await release()
        await asyncio.gather(*waits)
        found.append({"cpu": (time.process_time() - began_cpu) / tasks, "seconds": time.monotonic() - began})
    return found[1:]  # at first use, some things are loaded


Ends = tuple[list["asyncio.Future[Any]"], Callable[[], Awaitable[object]]]
"""What waits for the ends, and what brings them."""


async def _by_hand(tasks: int, runs: int, url: str) -> AsyncIterator[Ends]:
    """Receive webhooks with aiohttp.web and nothing else."""
    waiting: dict[str, asyncio.Future[Any]] = {}

    async def handle(request: web.Request) -> web.Response:
        body = await request.read()
        expected = hmac.new(SECRET.encode(), body, hashlib.sha256).hexdigest()
        if not hmac.compare_digest(request.headers["X-BFL-Signature"], f"sha256={expected}"):
            return web.Response(status=401)
        task = json.loads(body)
        waiting.pop(task["id"]).set_result(task)
        return web.Response(text="ok")

    with _door() as (door, address):
        async with _served(door, handle), aiohttp.ClientSession() as http:
            for run in range(runs + 1):
                for number in range(tasks):
                    params = {
                        "prompt": prompt(run * tasks + number, 3600), "webhook_url": address, "webhook_secret": SECRET
                    }  # fmt: skip
                    submit = {"model": "flux_2_max", "input": [{"params": params}]}
                    async with http.post(f"{url}/model/v1/generation", json=submit) as response:
                        waiting[(await response.json())["id"]] = asyncio.get_running_loop().create_future()
                yield list(waiting.values()), lambda: asyncio.to_thread(end_all, url)


async def _by_handler(tasks: int, runs: int, url: str) -> AsyncIterator[Ends]:
    """Receive them with an inbox."""
    async with _inbox() as inbox, _unpolled(tasks, url, inbox) as session:
        for run in range(runs + 1):
            numbers = range(run * tasks, (run + 1) * tasks)
            handles = await asyncio.gather(*(session.submit(prompt(number, 3600)) for number in numbers))
            yield [asyncio.ensure_future(_got(task)) for task in handles], lambda: asyncio.to_thread(end_all, url)


async def _by_deliver(tasks: int, runs: int, url: str) -> AsyncIterator[Ends]:
    """Hand them to an inbox without any server."""

    async def deliver() -> None:
        for body, headers in letters:
            await inbox.deliver(body, headers)

    async with _inbox(reachable=False) as inbox, _unpolled(tasks, url, inbox) as session:
        for run in range(runs + 1):
            numbers = range(run * tasks, (run + 1) * tasks)
            handles = await asyncio.gather(*(session.submit(prompt(number, 3600)) for number in numbers))
            letters = [(body, {"X-BFL-Signature": sign}) for body, sign in (_letter(task.id) for task in handles)]
            yield [asyncio.ensure_future(_got(task)) for task in handles], deliver


def _letter(task_id: str) -> tuple[bytes, str]:
    content = {"type": "image", "url": f"http://127.0.0.1/{task_id}.jpeg", "jobId": task_id}
    task = {"id": task_id, "status": "completed", "output": [{"content": [content]}], "usage": {"cost": "0.07"}}
    return signed(task, SECRET)


async def _got(task: Awaitable[Any]) -> None:
    await task


def _unpolled(places: int, url: str, inbox: WebhookInbox) -> FluxSession:
    return FluxSession("key", base_url=url, max_in_flight=places, schedule=FixedSchedule(3600), webhooks=inbox)


@asynccontextmanager
async def _inbox(*, reachable: bool = True) -> AsyncIterator[WebhookInbox]:
    """Make an inbox, and serve it."""
    with _door() as (door, address):
        inbox = WebhookInbox(secret=SECRET, public_url=address)
        if not reachable:
            yield inbox
            return
        async with _served(door, inbox.aiohttp_handler):
            yield inbox


@contextmanager
def _door() -> Iterator[tuple[socket.socket, str]]:
    """Take a port; until somebody listens there, connections are refused."""
    with socket.socket() as door:
        door.bind(("127.0.0.1", 0))
        yield door, f"http://127.0.0.1:{door.getsockname()[1]}/hook"


@asynccontextmanager
async def _served(door: socket.socket, handler: Handler) -> AsyncIterator[None]:
    app = web.Application()
    app.router.add_post("/hook", handler)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.SockSite(runner, door).start()
    try:
        yield
    finally:
        await runner.cleanup()


# ------------------------------------------------------------------ the comparison


@dataclass
class Got:
    """One task, as its caller got it. Moments and durations are seconds."""

    number: int
    ended: float
    returned: float
    sent: float | None
    """When its sender began to deliver it; None where a poll has brought the end."""
    polls: int

    @property
    def delay(self) -> float:
        return self.returned - self.ended


@dataclass
class Run:
    """What one client has found."""

    got: list[Got]
    first: list[Got]
    """Those that were submitted before anything had been learned; they are not among `got`."""
    lost: list[str]
    """What is wrong, in words."""
    cpu: float
    began: float
    whole: float
    gateway: float
    """The share of one processor that the gateway has used."""


def beside(size: Size) -> tuple[str, list[str]]:
    """Measure webhooks of several kinds, and polling alone."""
    runs: dict[str, list[Run]] = {way: [] for way in WAYS}
    with ThreadPoolExecutor(size.clients) as pool:
        ways = list(WAYS) * size.runs
        for way, run in zip(ways, pool.map(lambda way: _steady(way, size.tasks, size), ways), strict=True):
            runs[way].append(run)
    all_runs = list(chain.from_iterable(runs.values()))
    cpu = {way: statistics.median(run.cpu for run in found) * 1e3 for way, found in runs.items()}
    rows = []
    for way, name in WAYS.items():
        got = [one for run in runs[way] for one in run.got]
        brought = [one.returned - one.sent for one in got if one.sent is not None]
        by_webhook = [_ms(statistics.median(brought), 1), _ms(_late(brought), 1)] if brought else ["-", "-"]
        delays = [one.delay for one in got]
        spread = sorted(run.cpu * 1e3 for run in runs[way])
        rows.append([
            name.format(late=size.late), str(sum(len(run.lost) for run in runs[way])),
            f"{len(brought) / max(len(got), 1):.0%}", *by_webhook, _ms(statistics.mean(delays)), _ms(_late(delays)),
            f"{statistics.mean(one.polls for one in got):.2f}", f"{cpu[way]:.2f}", f"{cpu[way] / cpu['polling']:.2f}",
            f"{spread[0]:.2f} to {spread[-1]:.2f}",
            _ms(statistics.mean(one.delay for run in runs[way] for one in run.first)),
        ])  # fmt: skip
    sent = [one.sent - one.ended for run in runs["on time"] for one in run.got if one.sent is not None]
    text = blocks(
        f"{size.places} tasks in flight, all the time: {size.tasks:,} tasks, lognormal, median {size.seconds:g} s, "
        f"sigma {SIGMA}, of which the first {size.left_out} are left out, while the schedule learns. The same tasks "
        f"for each client, {size.clients} clients at the same time, {size.runs} runs of each: all their tasks count "
        "together, and of the CPU times the median. The schedule that learns, no limit to its polls "
        "(`max_polls_per_second=None`), or the limit would hide what polls cost. A delivery that fails isn't tried "
        "again. Reaction: from the sender's start of a delivery, before it connects, to the return of the caller's "
        "`await session.generate(...)`, where a webhook has brought the end; its median is to be at most 50 ms. "
        "Delay: from a task's true end to that return, whatever has brought it. Polls per task are to be at most 1 "
        "where webhooks work, and no task may be lost anywhere.",
        table(
            [
                "", "lost", "ended by a webhook", "reaction, median ms", "95th percentile ms", "delay, mean ms",
                "95th percentile ms", "polls per task", "CPU time, ms per task", "by polling's", "runs with",
                f"of the first {size.places}: delay, mean ms",
            ],
            rows,
        ),
        f"The gateway is no bottleneck: its process used {max(run.gateway for run in all_runs):.0%} of a processor at "
        f"most, and where webhooks work, it began with 95 % of them within {_ms(_late(sent), 1)} ms of the ends.",
    )  # fmt: skip
    return text, [complaint for run in all_runs for complaint in run.lost]


def stopped(size: Size) -> tuple[str, list[str]]:
    """Measure a time in which no webhook arrives."""
    run = _steady("stopped", size.stopped, size)
    stop, back = run.began + run.whole / 3, run.began + run.whole * 2 / 3
    soon = size.reaction
    parts = {
        "webhooks work": (-math.inf, stop),
        "**they have stopped**": (stop, back),
        f"ended in the first {soon:g} s of it": (stop, stop + soon),
        "later": (stop + soon, back),
        "**they work again**": (back, math.inf),
        f"ended in the first {soon:g} s of it ": (back, back + soon),
        "later ": (back + soon, math.inf),
    }
    rows = []
    for name, (since, until) in parts.items():
        part = [one for one in run.got if since <= one.ended < until]
        if not part:
            continue
        delays = [one.delay for one in part]
        by_webhook = sum(one.sent is not None for one in part) / len(part)
        rows.append([
            name.strip(), str(len(part)), f"{by_webhook:.0%}", _ms(statistics.mean(delays)), _ms(_late(delays)),
            _ms(max(delays)), f"{statistics.mean(one.polls for one in part):.2f}",
        ])  # fmt: skip
    text = blocks(
        f"The same with {size.stopped:,} tasks, whose webhooks work, then stop for {run.whole / 3:.1f} s, and then "
        "work again; by when the tasks ended:",
        table(
            [
                "", "tasks", "ended by a webhook", "delay, mean ms", "95th percentile ms", "longest ms",
                "polls per task",
            ],
            rows,
        ),
    )  # fmt: skip
    return text, run.lost


def at_once(size: Size) -> tuple[str, list[str]]:
    """Measure many deliveries at once."""
    ways = {
        "by hand: aiohttp.web, `hmac`, `json.loads`, a future": "by hand",
        "`inbox.aiohttp_handler`": "handler",
        "`inbox.deliver()` alone, without a server": "deliver",
    }
    rows = []
    for name, way in ways.items():
        found, _ = measured(__file__, "--client", "burst", way, str(size.burst), str(size.runs))
        cpu, seconds = (statistics.median(one[clock] for one in found) for clock in ("cpu", "seconds"))
        rows.append([name, f"{cpu * 1e3:.2f}", f"{seconds:.2f}"])
    text = blocks(
        f"{size.burst:,} tasks that end at once, and are all waited for; their deliveries come over up to 100 "
        "connections at a time, a new one for each. Polls play no part. Until the last caller has its picture. "
        f"Medians of {size.runs}:",
        table(["", "CPU time, ms per delivery", "all of them, s"], rows),
    )
    return text, []


def _steady(way: str, tasks: int, size: Size) -> Run:
    """Run a client."""
    load = (tasks, size.left_out, size.places, size.seconds, size.late, size.price)
    found, books = measured(__file__, "--client", "steady", way, *map(str, load), seconds=300)
    ends: dict[str, list[float]] = books["ends"]
    got = {number: Got(int(number), ends[number][0], *one) for number, one in found["got"].items()}
    lost = [f"{way}: task {number}: {error}" for number, error in found["errors"].items()]
    lost += [f"{way}: task {number}: nobody got it" for number in ends.keys() - got.keys() - found["errors"].keys()]
    lost += [f"{way}: task {number}: submitted {len(ends[number])} times" for number in ends if len(ends[number]) > 1]
    lost += [f"{way}: task {number}: told before its end" for number, one in got.items() if one.delay < 0]
    if len(ends) != tasks:
        lost.append(f"{way}: {tasks - len(ends)} of {tasks} tasks were never submitted")
    kept = [one for one in got.values() if one.number >= size.left_out]
    first = [one for one in got.values() if one.number < size.places]
    return Run(kept, first, lost, found["cpu"], found["began"], found["whole"], books["cpu"] / found["seconds"])


def _late(values: list[float]) -> float:
    """Give the 95th percentile."""
    return sorted(values)[math.ceil(0.95 * len(values)) - 1] if values else math.nan


def _ms(seconds: float, digits: int = 0) -> str:
    return f"{seconds * 1e3:,.{digits}f}"


PIECES: dict[str, Callable[..., Coroutine[Any, Any, Any]]] = {"steady": steady, "burst": burst}
PARTS: dict[str, Callable[[Size], tuple[str, list[str]]]] = {"beside": beside, "stopped": stopped, "at_once": at_once}


def main() -> None:
    if sys.argv[1:2] == ["--client"]:
        piece, way, *load, url = sys.argv[2:]
        numbers = [json.loads(number) for number in load]
        print(json.dumps(asyncio.run(PIECES[piece](way, *numbers, url))))
        return
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--short", action="store_true", help="prove that each part runs; the figures are worth nothing")
    parser.add_argument("--only", default=",".join(PARTS), help="parts, with commas between them (%(default)s)")
    parser.add_argument("--write", type=Path, nargs="?", const=RESULTS, help="where to write the results, too")
    arguments = parser.parse_args()
    size = SHORT if arguments.short else FULL
    command = shlex.join(["python", "benchmarks/webhooks.py", *sys.argv[1:]])
    print(about(command), flush=True)
    names = arguments.only.split(",")
    texts, lost = [], []
    # One part after another, or they would disturb each other; where only running counts, all at once.
    with ThreadPoolExecutor(len(names) if arguments.short else 1) as pool:
        for text, complaints in pool.map(lambda name: PARTS[name](size), names):
            print(f"\n{text}", flush=True)
            texts.append(text)
            lost += complaints
    if lost:
        sys.exit("\n".join(["", f"{len(lost)} tasks went wrong:", *lost]))
    if arguments.write:
        write("Webhooks", blocks(*texts), command, arguments.write)


if __name__ == "__main__":
    main()
