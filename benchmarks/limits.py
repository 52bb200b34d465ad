"""Gateways that refuse calls with 429, and polls that hang: `python benchmarks/limits.py` prints a table.

Real sessions in virtual time; only the exchange of HTTP messages is simulated, with 50 ms for each. The figures don't
depend on the machine, except for the order in which simultaneous events run.
"""

import argparse
import asyncio
import contextlib
import heapq
import json
import logging
import math
import random
import selectors
import shlex
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import attrs
from _results import RESULTS, blocks, table, write
from multidict import CIMultiDict

from flux2max_async import FluxSession
from flux2max_async._api.codec import HttpRequest
from flux2max_async._api.give_up import PollLimit
from flux2max_async._api.outage import Outage
from flux2max_async._api.response import HttpResponse

_ROUND_TRIP = 0.05
"""Seconds of an exchange."""
_STEP = 0.01
_HANG = 60.0
"""Seconds until a poll that hangs is answered."""


class _VirtualTime(selectors.DefaultSelector):
    """Advances a clock instead of waiting."""

    now = 1000.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if ready := super().select(0):
            return ready
        self.now += timeout or 0.0
        return []


class _VirtualLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self._virtual_time = _VirtualTime()
        super().__init__(self._virtual_time)

    def time(self) -> float:
        return self._virtual_time.now


# ---------------------------------------------------------------------- what a gateway allows


class TokenBucket:
    """Allows `rate` calls a second, and bursts of `size`."""

    def __init__(self, rate: float, size: float) -> None:
        self.rate, self.size, self._tokens, self._as_of = rate, size, size, -math.inf

    def take(self, now: float) -> float:
        """Take a token and return 0, or return the seconds until there is one."""
        self._tokens, self._as_of = min(self.size, self._tokens + (now - self._as_of) * self.rate), now
        if self._tokens < 1:
            return (1 - self._tokens) / self.rate
        self._tokens -= 1
        return 0.0


@attrs.define
class Scenario:
    """A gateway, and the batch that is generated with it."""

    name: str
    count: int = 200
    slots: int = 24
    seconds: float = 8.0
    sigma: float = 0.4
    refused: float = 0.0
    """Share of calls that are refused at random."""
    retry_after: float | None = 1.0
    """None: the 429 doesn't say; 0: when the token bucket has the next token."""
    in_flight: Callable[[float], float] = lambda _: math.inf
    """Returns how many tasks may run, some seconds after the start."""
    submits: float = math.inf
    """Submits a second."""
    calls: float = math.inf
    """Submits and polls a second."""
    polls: float | Literal["auto"] | None = "auto"
    """The session's `max_polls_per_second`."""
    hanging: float = 0.0
    """Share of polls that hang."""


class Gateway:
    """Stands in for the transport of a session."""

    base_url = "http://gateway"
    secrets: tuple[str, ...] = ("key",)
    max_downloads = 8
    outage = Outage(base_url)

    def __init__(self, scenario: Scenario, seed: int) -> None:
        self._scenario, self._random = scenario, random.Random(seed)
        self._submits = TokenBucket(scenario.submits, max(scenario.submits, 1.0))
        self._calls = TokenBucket(scenario.calls, max(scenario.calls, 1.0))
        self._ends: dict[str, float] = {}
        self._start = 0.0
        self._not_before: dict[str, float] = {}
        self.counts: dict[str, int] = dict.fromkeys(("POST", "GET", "POST 429", "GET 429", "early"), 0)
        self.delays: list[float] = []
        self.durations: list[float] = []

    def open(self, _: int) -> None:
        self._start = asyncio.get_running_loop().time()

    async def close(self) -> None:
        pass

    async def exchange(
        self,
        request: HttpRequest,
        limit: PollLimit | None = None,
        *,
        within: float = math.inf,  # noqa: ARG002 - as the transport has it
        fresh_connection: bool = False,  # noqa: ARG002 - as the transport has it
    ) -> HttpResponse:
        with limit or contextlib.nullcontext():
            return await self._exchange(request, limit)

    async def _exchange(self, request: HttpRequest, limit: PollLimit | None) -> HttpResponse:
        await asyncio.sleep(_ROUND_TRIP / 2)
        method = "GET" if request.body is None else "POST"
        call = request.path if request.body is None else str(json.loads(request.body)["input"][0]["params"]["prompt"])
        status, body, wait = self._answer(method, call)
        headers = CIMultiDict[str]()
        if status == 429:
            self.counts[f"{method} 429"] += 1
            if self._scenario.retry_after is not None:
                wait = self._scenario.retry_after or wait
                headers["Retry-After"] = f"{wait:.6f}"
            self._not_before[call] = self._now() + (1.0 if self._scenario.retry_after is None else wait) - 1e-5
        elif method == "GET" and self._random.random() < self._scenario.hanging:
            await asyncio.sleep(_HANG)
        await asyncio.sleep(_ROUND_TRIP / 2)
        if limit is not None:
            limit.on_data(0)
        if body.get("status") == "completed":
            self.delays.append(self._now() - self._ends.pop(call))
        return HttpResponse(status, headers, json.dumps(body).encode(), cast("Any", None))

    def _now(self) -> float:
        return asyncio.get_running_loop().time()

    def _answer(self, method: str, call: str) -> tuple[int, dict[str, Any], float]:
        scenario, now = self._scenario, self._now()
        self.counts[method] += 1
        self.counts["early"] += now < self._not_before.get(call, 0.0)
        wait = self._calls.take(now) or (self._submits.take(now) if method == "POST" else 0.0)
        running = sum(end > now for end in self._ends.values()) if method == "POST" else 0
        if (
            wait
            or self._random.random() < scenario.refused
            or running >= scenario.in_flight(now - self._start) * (method == "POST" or math.inf)
        ):
            return 429, {"message": "too many"}, wait or 1.0
        task = {"id": call.rpartition("/")[2], "status": "in_progress", "created_at": 1763800000}
        if method == "POST":
            duration = scenario.seconds * math.exp(self._random.gauss(0, scenario.sigma))
            path = f"/model/v1/generation/task/{call}"
            self._ends[path] = now + duration
            self.durations.append(duration)
            task["id"] = call
        elif now >= self._ends[call]:
            image = {"type": "image", "url": "https://pictures.example/0.jpeg"}
            task |= {"status": "completed", "output": [{"content": [image]}]}
        return 200, task, 0.0


@attrs.define
class Figures:
    """What one run of a scenario has shown."""

    seconds: float
    gateway: Gateway


async def run(scenario: Scenario, seed: int) -> Figures:
    """Generate the batch of a scenario."""
    gateway = Gateway(scenario, seed)
    session = FluxSession(
        "key", base_url="http://127.0.0.1", max_in_flight=scenario.slots, max_polls_per_second=scenario.polls
    )
    session._parts = attrs.evolve(session._parts, transport=cast("Any", gateway))  # noqa: SLF001 - no sockets in virtual time
    loop = asyncio.get_running_loop()
    async with session:
        start = loop.time()
        async for outcome in session.stream(f"p{number}" for number in range(scenario.count)):
            outcome.unwrap()
        return Figures(loop.time() - start, gateway)


def simulate(scenario: Scenario, seed: int) -> Figures:
    """Run a scenario in virtual time."""
    random.seed(seed)
    with asyncio.Runner(loop_factory=_VirtualLoop) as runner:
        return runner.run(run(scenario, seed))


def _limit_that_falls(seconds: float) -> float:
    return 6 if 60 <= seconds < 180 else 24


SCENARIOS = [
    Scenario("no refusals, 24 slots"),
    Scenario("10 % at random, Retry-After 1", refused=0.1),
    Scenario("no refusals, 3,000 tasks of 1.5 s, 200 slots", count=3000, slots=200, seconds=1.5, sigma=0.0),
    Scenario(
        "5 % at random, 3,000 tasks of 1.5 s, 200 slots", count=3000, slots=200, refused=0.05, seconds=1.5, sigma=0.0
    ),
    Scenario("200 tasks of 8 s at once", slots=200),
    Scenario("200 tasks of 8 s at once, no poll limit", slots=200, polls=None),
    Scenario("200 tasks of 8 s at once, sigma .2, no poll limit", slots=200, sigma=0.2, polls=None),
    Scenario("200 tasks of 8 s at once, sigma .2", slots=200, sigma=0.2),
    Scenario("3 tasks in flight", in_flight=lambda _: 3),
    Scenario("10 tasks in flight", in_flight=lambda _: 10),
    Scenario("24 tasks in flight, 40 slots", slots=40, in_flight=lambda _: 24),
    Scenario("24, then 6, then 24 tasks in flight", count=800, in_flight=_limit_that_falls),
    Scenario("5 submits a second", submits=5, seconds=1.5, count=400),
    Scenario("5 submits a second, 24 slots of 8 s", submits=5),
    Scenario("5 submits a second, 8 s", submits=5, slots=100, count=400),
    Scenario("5 submits a second, 200 slots", submits=5, seconds=1.5, slots=200, count=800),
    Scenario("5 submits a second, exact Retry-After", submits=5, seconds=1.5, count=400, retry_after=0),
    Scenario("10 calls a second", calls=10),
    Scenario("10 calls a second, exact Retry-After", calls=10, retry_after=0),
    Scenario("1 poll in 20 hangs for 60 s", hanging=0.05),
]


NOTES = (
    "Real sessions in virtual time with gateways that refuse calls with 429, or whose polls hang: 50 ms for an "
    "exchange, tasks of 8 s (lognormal, sigma 0.4), 24 slots, batches of 200, Retry-After 1, unless the row says "
    "otherwise; means of one run with each seed.\n\n"
    "The least time is that of the same tasks if each began as soon as the slots and the gateway allow it, and its end "
    "was known at once. Where submits and polls share a limit, it counts two calls for each task, but a client that "
    'doesn\'t know when tasks end needs more. "Too early" are calls before the time at which they were allowed to be '
    "repeated. Where 100 slots begin at once and five submits a second are allowed, 95 are refused before anything is "
    "known about the limit: 19 % of all in a batch of 400."
)


def least_seconds(scenario: Scenario, durations: list[float]) -> float:
    """Return what the batch takes at least, if no call is refused at random, in steps of 10 ms.

    Each task begins as soon as there is a slot and the gateway allows it, and its end is known at once. Of the calls
    that submits and polls share, each task needs two at least.
    """
    submits = min(scenario.submits, scenario.calls / 2)
    bucket = TokenBucket(submits, max(submits, 1.0))
    ends: list[float] = []
    step, last = 0, 0.0
    for duration in durations:
        while True:
            now = step * _STEP
            while ends and ends[0] <= now:
                heapq.heappop(ends)
            if len(ends) < min(scenario.slots, scenario.in_flight(now)) and not bucket.take(now):
                break
            step += 1
        heapq.heappush(ends, now + duration)
        last = max(last, now + duration)
    return last


HEADER = [
    "gateway", "batch, s", "least time / batch", "mean delay, s", "polls per task", "submits refused", "polls refused",
    "too early",
]  # fmt: skip


def measure(scenario: Scenario, seeds: Sequence[int]) -> list[str]:
    """Return a row of the table: means of one run with each seed."""
    runs = [simulate(scenario, seed) for seed in seeds]
    counts = sum((Counter(figures.gateway.counts) for figures in runs), Counter[str]())
    delays = [delay for figures in runs for delay in figures.gateway.delays]
    seconds = sum(figures.seconds for figures in runs)
    least = sum(least_seconds(scenario, figures.gateway.durations) for figures in runs)
    return [
        scenario.name,
        f"{seconds / len(runs):.1f}",
        f"{least / seconds:.0%}",
        f"{sum(delays) / len(delays):.2f}",
        f"{counts['GET'] / len(delays):.2f}",
        f"{counts['POST 429'] / counts['POST']:.1%}",
        f"{counts['GET 429'] / counts['GET']:.1%}",
        str(counts["early"]),
    ]


def main() -> None:
    """Print the table of all scenarios, or of those whose names contain one of the words."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("words", nargs="*", help="only scenarios whose names contain one of these")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="one run of each scenario for each")
    parser.add_argument("--write", type=Path, nargs="?", const=RESULTS, help="also write the results to this file")
    arguments = parser.parse_args()
    logging.disable()
    rows = []
    for scenario in SCENARIOS:
        if not arguments.words or any(word in scenario.name for word in arguments.words):
            rows.append(measure(scenario, arguments.seeds))
            print(" | ".join(rows[-1]), flush=True)
    if arguments.write:
        command = f"python {shlex.join(['benchmarks/limits.py', *sys.argv[1:]])}"
        write("Limits", blocks(NOTES, table(HEADER, rows)), command, arguments.write)


if __name__ == "__main__":
    main()
