"""The three measurements of `backends.py`. Each returns a row of its table for one server, event loop and service."""

import json
import math
import statistics
import subprocess
import time
from collections import Counter
from typing import Any

import attrs
from backend_app import ACCOUNT_LIMIT, POLL_INTERVAL
from backend_servers import Backend, kill, running_server

from flux2max_async.emulator import Emulator


@attrs.frozen
class Size:
    """The size of the measurements."""

    visitors: int
    seconds: float
    """Median duration of a task."""
    loops: tuple[str, ...]
    backends: tuple[Backend, ...]
    orders: int
    """Requests that are taken in for later."""
    max_waiting: int
    stopped_visitors: int
    stopped_seconds: float
    """Duration of each task in the part with SIGTERM."""
    grace: int
    """Seconds that open requests have after SIGTERM."""
    warm_up: int
    """Visitors who are served before those who are measured."""
    idle: float
    """Seconds without a running task after which nothing more is submitted."""
    all_variants: bool = True
    share: float = 0.3
    """Share of visitors who leave."""

    @property
    def leave_within(self) -> float:
        """Seconds in which they leave: a quarter of the time in which all could be served."""
        return self.visitors * self.seconds / ACCOUNT_LIMIT / 4


@attrs.frozen
class Variant:
    """How the service is written."""

    name: str
    settings: dict[str, Any]


def variants(backend: Backend, size: Size) -> list[Variant]:
    """Return the services that are measured with a server."""
    variants = _all_variants(backend)
    return variants if size.all_variants else [variants[0], variants[-1]]


def _all_variants(backend: Backend) -> list[Variant]:
    if backend.workers == 1:
        return [
            Variant("aiohttp alone", {"library": False}),
            Variant("flux2max_async", {"library": True}),
            Variant("flux2max_async, webhooks", {"library": True, "webhooks": True}),
        ]
    slots = ACCOUNT_LIMIT // backend.workers
    return [
        Variant(f"aiohttp alone, {slots} slots each", {"library": False, "slots": slots}),
        Variant(f"flux2max_async, {slots} slots each", {"library": True, "slots": slots}),
        Variant("flux2max_async, shared limit", {"library": True, "shared_limit": True}),
        Variant("flux2max_async, shared limit, webhooks", {"library": True, "shared_limit": True, "webhooks": True}),
    ]


# ---------------------------------------------------------------------- visitors who wait, and of whom some leave

LOAD_HEADER = [
    "pictures/s", "seen", "paid", "paid, not seen", "p50, ms", "p99, ms", "slots busy", "polls per picture",
    "submits refused", "CPU per picture, ms", "other responses",
]  # fmt: skip


def load_notes(size: Size) -> str:
    return (
        f"{size.visitors:,} visitors come at once and wait for a picture each; {size.share:.0%} of them leave, at "
        f"random times in the first {size.leave_within:.1f} s. Tasks of {size.seconds:g} s (lognormal, sigma 0.3), of "
        f"which the account may have {ACCOUNT_LIMIT} in flight. p50 and p99 are what is added to the service's own "
        "time: from the end of a task at the service until the visitor has the response. Slots busy: the mean number "
        "of tasks in flight from the first submit to the last. Refused submits got 429. The CPU time is that of all "
        f"processes of the server, start excluded. aiohttp alone polls every {POLL_INTERVAL:g} s, and does nothing "
        f"about visitors who leave. Before them, {size.warm_up} visitors are served, so that first-use costs aren't "
        "measured, and the session has learned how long tasks take. With its default schedule, a poll "
        "is worth 0.1 s of delay."
    )


def measure_load(backend: Backend, loop: str, variant: Variant, size: Size) -> list[str]:
    """Return a row of the first table, without its name."""
    with (
        Emulator(seconds=size.seconds, seed=1, pictures=False) as gateway,
        running_server(backend, loop, gateway, **variant.settings) as server,
    ):
        if size.warm_up:
            with server.visitors("/picture", size.warm_up) as wait:
                wait()
        first = len(gateway.tasks)
        calls = gateway.calls.copy()
        cpu = -server.cpu_seconds()
        with server.visitors("/picture", size.visitors, share=size.share, seconds=size.leave_within) as wait:
            visitors = wait()
        _wait_until_idle(gateway, size)
        cpu += server.cpu_seconds()
    tasks, calls = list(gateway.tasks.values())[first:], gateway.calls - calls
    ends = {task.prompt: task.ends for task in tasks}
    seen = [visitor for visitor in visitors if visitor["status"] == 200]
    others = Counter(visitor["status"] or "cut" for visitor in visitors if visitor not in seen and not visitor["left"])
    if not seen:
        return [f"no pictures: {_counts(others)}"]
    added = sorted(visitor["ended"] - ends[f"visitor{visitor['number']}"] for visitor in seen)
    begun, last = min(task.begins for task in tasks), max(task.begins for task in tasks)
    busy = sum(min(task.ends, last) - task.begins for task in tasks) / (last - begun)
    elapsed = max(visitor["ended"] for visitor in seen) - min(visitor["came"] for visitor in visitors)
    return [
        f"{len(seen) / elapsed:.1f}",
        str(len(seen)),
        str(len(tasks)),
        str(len(tasks) - len(seen)),
        f"{statistics.median(added) * 1e3:.0f}",
        f"{_percentile(added, 0.99) * 1e3:.0f}",
        f"{busy:.1f}",
        f"{calls['poll'] / len(tasks):.1f}",
        str(calls["submit"] - len(tasks)),
        f"{cpu / len(seen) * 1e3:.1f}" if cpu else "-",
        _counts(others),
    ]


def _wait_until_idle(gateway: Emulator, size: Size) -> None:
    """Wait until the requests of visitors who have left are served, too."""
    while time.monotonic() < max((task.ends for task in tuple(gateway.tasks.values())), default=0.0) + size.idle:
        time.sleep(0.05)


# ---------------------------------------------------------------------- requests that are taken in for later

QUEUE_HEADER = [
    "202", "p50, ms", "p99, ms", "with a position", "503 with Retry-After", "longest wait for a picture, s",
    "other responses",
]  # fmt: skip


def queue_notes(size: Size) -> str:
    return (
        f"{size.orders} visitors post a request at once that the service takes in and generates later: p50 and p99 of "
        f"the response, from before the connection is opened. With the library at most {size.max_waiting} requests "
        "may wait (divided among the workers); without it, all do."
    )


def measure_queue(backend: Backend, loop: str, variant: Variant, size: Size) -> list[str]:
    """Return a row of the second table, without its name."""
    max_waiting = size.max_waiting // backend.workers
    with (
        Emulator(seconds=size.seconds, seed=1, pictures=False) as gateway,
        running_server(backend, loop, gateway, max_waiting=max_waiting, **variant.settings) as server,
    ):
        with server.visitors("/tasks", size.orders) as wait:
            visitors = wait()
        _wait_until_idle(gateway, size)
    accepted = [visitor for visitor in visitors if visitor["status"] == 202]
    refused = [visitor for visitor in visitors if visitor["status"] == 503 and visitor["retry_after"]]
    others = Counter(visitor["status"] or "cut" for visitor in visitors if visitor not in (*accepted, *refused))
    if not accepted:
        return [f"nothing was taken in: {_counts(others)}"]
    seconds = sorted(visitor["ended"] - visitor["came"] for visitor in (*accepted, *refused))
    came = min(visitor["came"] for visitor in visitors)
    return [
        str(len(accepted)),
        f"{statistics.median(seconds) * 1e3:.0f}",
        f"{_percentile(seconds, 0.99) * 1e3:.0f}",
        str(sum(json.loads(visitor["body"]).get("position") is not None for visitor in accepted)),
        str(len(refused)),
        f"{max(task.ends for task in gateway.tasks.values()) - came:.1f}",
        _counts(others),
    ]


# ---------------------------------------------------------------------- SIGTERM

STOP_HEADER = [
    "delivered", "503 within 1 s", "other ends", "paid", "paid, nobody got", "last submit, s", "stopped, s",
]  # fmt: skip


def stop_notes(size: Size) -> str:
    return (
        f"{size.stopped_visitors} visitors wait for tasks of {size.stopped_seconds:g} s. When the first task has run "
        f"for half of its time, the server gets SIGTERM; open requests then have {size.grace} s. Times are those "
        "after SIGTERM. Other ends: connections that were cut, later or other errors. aiohttp alone goes on with "
        "its queue after SIGTERM: with more time it would deliver everything, and the server would stop later."
    )


def measure_stop(backend: Backend, loop: str, variant: Variant, size: Size) -> list[str]:
    """Return a row of the third table, without its name."""
    with (
        Emulator(seconds=size.stopped_seconds, spread=0.0, pictures=False) as gateway,
        running_server(backend, loop, gateway, grace=size.grace, **variant.settings) as server,
        server.visitors("/picture", size.stopped_visitors) as wait,
    ):
        while not gateway.tasks and server.process.poll() is None:
            time.sleep(0.005)
        time.sleep(size.stopped_seconds / 2)
        stopped = time.monotonic()
        server.process.terminate()
        try:
            server.process.wait(size.grace + 5)
        except subprocess.TimeoutExpired:
            seconds = f"killed after {size.grace + 5}"
            kill(server.process)
        else:
            seconds = f"{time.monotonic() - stopped:.1f}"
        time.sleep(0.2)
        visitors = wait()
        tasks = list(gateway.tasks.values())
    delivered = {visitor["number"] for visitor in visitors if visitor["status"] == 200}
    refused = {v["number"] for v in visitors if v["status"] == 503 and v["ended"] <= stopped + 1}
    others = Counter(v["status"] or "cut" for v in visitors if v["number"] not in delivered | refused)
    lost = sum(int(task.prompt.removeprefix("visitor")) not in delivered for task in tasks)
    last = max(task.begins for task in tasks) - stopped
    return [
        str(len(delivered)),
        str(len(refused)),
        _counts(others),
        str(len(tasks)),
        str(lost),
        f"{last:.1f}" if last > 0 else "before",
        seconds,
    ]


def _percentile(values: list[float], share: float) -> float:
    return values[math.ceil(share * len(values)) - 1]


def _counts(counts: Counter[Any]) -> str:
    return ", ".join(f"{count} x {what}" for what, count in counts.items()) or "-"
