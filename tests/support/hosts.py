"""Hosts without shared files that run one batch, are killed, and lose their database."""

import asyncio
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import attrs
from PIL import Image

from flux2max_async import (
    Completed,
    Failed,
    FixedSchedule,
    FluxSession,
    GenerationRequest,
    Outcome,
    PostgresInFlightLimit,
)
from flux2max_async.emulator import Emulator
from flux2max_async.journal import EntryState, JournalEntry, PostgresJournal
from support.postgres import PostgresServer
from support.tcp_proxy import TcpProxy

LIMIT = 24
_ROUND_TRIP = 0.15
"""Seconds to the service and back: some submits are on the wire when their host is killed."""
_PATIENCE = 120.0
"""Seconds without a new outcome after which a host counts as stuck."""


@attrs.frozen(kw_only=True)
class Settings:
    """What happens to the hosts; times are in seconds."""

    requests: int
    kills: int
    kill_every: float
    task_seconds: float
    crashes: int
    """How often the database crashes and is started again."""
    held: float
    """How long no packet reaches the database, once."""
    hosts: int = 3


# ------------------------------------------------------------------ a host


class _TracedJournal(PostgresJournal):
    """A journal that writes which tasks its session follows, and since when."""

    def __init__(self, conninfo: str, schema: str, trace: int) -> None:
        super().__init__(conninfo, schema=schema)
        self._trace = trace

    def _write(self, entry: JournalEntry, event: str) -> None:
        os.write(self._trace, f"{time.monotonic()} {os.getpid()} {event} {entry.task_id}\n".encode())

    async def open(
        self,
        on_external_change: Callable[[list[JournalEntry]], None] = lambda _: None,
        /,
        *,
        watch_changes: bool = False,
    ) -> None:
        def traced(entries: list[JournalEntry]) -> None:
            for entry in entries:
                if entry.state is EntryState.SUBMITTED:
                    self._write(entry, "adopted")
            on_external_change(entries)

        await super().open(traced, watch_changes=watch_changes)

    async def adopt(self, entry: JournalEntry, /) -> bool:
        if adopted := await super().adopt(entry):
            self._write(entry, "adopted")
        return adopted

    async def record(self, entry: JournalEntry, /) -> None:
        await super().record(entry)
        if entry.state is EntryState.SUBMITTED:
            self._write(entry, "submitted")
        elif entry.state in {EntryState.COMPLETED, EntryState.FAILED}:
            self._write(entry, "ended")


def requests(count: int) -> list[GenerationRequest]:
    return [GenerationRequest(f"image {number}", width=64, height=64, key=f"no. {number}") for number in range(count)]


async def _run(url: str, key: str, conninfo: str, schema: str, folder: Path, count: int) -> list[Outcome]:
    trace = os.open(folder / "trace", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    async with FluxSession(
        key,
        base_url=url,
        max_in_flight=PostgresInFlightLimit(conninfo, LIMIT, schema=schema),
        schedule=FixedSchedule(0.3),
        journal=_TracedJournal(conninfo, schema, trace),
    ) as session:
        return [outcome async for outcome in session.stream(requests(count), save_to=folder / "images")]


def _end(outcome: Outcome) -> str:
    if isinstance(outcome, Failed):
        return type(outcome.error).__name__
    return f"not saved: {outcome.save_error!r}" if outcome.save_error else "completed"


def _main() -> None:
    url, key, conninfo, schema, folder, count = sys.argv[1:]
    outcomes = asyncio.run(_run(url, key, conninfo, schema, Path(folder), int(count)))
    ends = {str(outcome.request and outcome.request.key): _end(outcome) for outcome in outcomes}
    paths = [str(path) for outcome in outcomes if isinstance(outcome, Completed) for path in outcome.saved]
    Path(folder, "report").write_text(json.dumps([len(outcomes), ends, paths]), encoding="utf-8")


class Host:
    """A process with a folder of its own, which is started again each time that it is killed or fails."""

    def __init__(self, folder: Path, *arguments: str, count: int) -> None:
        folder.mkdir()
        self.folder = folder
        self.failures: list[str] = []
        self._arguments = (*arguments, str(folder), str(count))
        self._process = self._start()

    def _start(self) -> subprocess.Popen[str]:
        paths = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
        return subprocess.Popen(
            [sys.executable, "-c", "import support.hosts; support.hosts._main()", *self._arguments],
            stderr=subprocess.PIPE, text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
        )  # fmt: skip

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def ended(self) -> bool:
        return (self.folder / "report").exists() and self._process.poll() is not None

    def kill(self) -> None:
        self._process.kill()
        self._process.communicate()

    def restart(self) -> None:
        """Start it again if it has not ended well."""
        if self._process.poll() is not None and not self.ended:
            if self._process.returncode >= 0:
                self.failures.append(self._process.communicate()[1][-2000:])
            self._process = self._start()

    def follows_tasks(self) -> bool:
        """Check whether the running process has submitted or adopted a task."""
        trace = self.folder / "trace"
        return trace.exists() and f" {self.pid} " in trace.read_text()

    def report(self) -> tuple[int, dict[str, str], list[str]]:
        number, ends, paths = json.loads((self.folder / "report").read_text(encoding="utf-8"))
        return number, ends, paths


# ------------------------------------------------------------------ what happens to them


@attrs.frozen(kw_only=True)
class Kill:
    """A host that was killed: when, and which process."""

    moment: float
    pid: int


@attrs.frozen(kw_only=True)
class Result:
    """What has become of the requests."""

    seconds: float
    tasks: list[tuple[str, str, float, float]]
    """The id of each task at the service, its prompt, its begin and its end."""
    downloads: Counter[int]
    """How many completed tasks' images were downloaded how often."""
    entries: list[JournalEntry]
    reports: list[tuple[int, dict[str, str], list[str]]]
    """Of each host: the number of outcomes, how each request ended by its key, and the saved files."""
    failures: list[str]
    """What a host wrote that ended without being killed."""
    adoptions: list[list[float]]
    """For each kill, in seconds after it: when each of the tasks that were followed there was followed again."""
    lost: int
    """Tasks that nobody followed again."""

    @property
    def accepted(self) -> Counter[str]:
        return Counter(prompt for _, prompt, _, _ in self.tasks)

    def most_in_flight(self, *, known: bool) -> int:
        """Return the most tasks in flight at once; with `known`, without those whose id died with its host."""
        ids = {entry.task_id for entry in self.entries}
        tasks = [(begin, end) for task_id, _, begin, end in self.tasks if task_id in ids or not known]
        return max(sum(begin <= moment < end for begin, end in tasks) for moment, _ in tasks)

    def whole_images(self) -> int:
        """Decode every saved image of the first host, and return their number."""
        _, _, paths = self.reports[0]
        for path in paths:
            with Image.open(path) as image:
                image.load()
        return len(paths)

    def figures(self) -> dict[str, Any]:
        """Return what there is to print."""
        first = [min(adopted) for adopted in self.adoptions if adopted]
        every = [seconds for adopted in self.adoptions for seconds in adopted]
        return {
            "seconds": round(self.seconds, 1),
            "kills": len(self.adoptions),
            "accepted": len(self.tasks),
            "paid twice": sum(count > 1 for count in self.accepted.values()),
            "entries": dict(Counter(str(entry.state) for entry in self.entries)),
            "outcomes of each host": [dict(Counter(ends.values())) for _, ends, _ in self.reports],
            "most in flight": (self.most_in_flight(known=True), self.most_in_flight(known=False)),
            "first adopted: median, worst": first and (round(statistics.median(first), 2), round(max(first), 2)),
            "all adopted: median, worst": every and (round(statistics.median(every), 2), round(max(every), 2)),
            "never followed again": self.lost,
            "downloads of a task": dict(sorted(self.downloads.items())),
            "whole images": self.whole_images(),
            "ended without being killed": len(self.failures),
        }


def run(settings: Settings, server: PostgresServer, schema: str, folder: Path) -> Result:
    """Run a batch on several hosts, and do to them and to their database what the settings say."""
    rng = random.Random(1)
    begun = time.monotonic()
    with ExitStack() as stack:
        gateway = stack.enter_context(
            Emulator(seconds=settings.task_seconds, spread=0.2, seed=1, max_in_flight=10 * LIMIT)
        )
        service = stack.enter_context(TcpProxy(int(gateway.url.rpartition(":")[2]), delay=_ROUND_TRIP / 2))
        database = stack.enter_context(TcpProxy(server.port))
        conninfo = server.conninfo().replace(f":{server.port}/", f":{database.port}/")
        url = f"http://127.0.0.1:{service.port}"
        hosts = [
            Host(folder / f"host{number}", url, gateway.api_key, conninfo, schema, count=settings.requests)
            for number in range(settings.hosts)
        ]
        for host in hosts:
            stack.callback(host.kill)
        kills = _disturb(settings, rng, hosts, server, database)
        progress, seen = time.monotonic(), 0
        while not all(host.ended for host in hosts):
            for host in hosts:
                host.restart()
            size = sum((host.folder / "trace").stat().st_size for host in hosts if (host.folder / "trace").exists())
            if size != seen:
                progress, seen = time.monotonic(), size
            assert time.monotonic() < progress + _PATIENCE, [host.failures for host in hosts]
            time.sleep(0.1)
        entries = asyncio.run(_entries(conninfo, schema))
        tasks = list(gateway.tasks.values())
    adoptions, lost = _adoptions(hosts, kills, {entry.task_id for entry in entries if entry.ended_at})
    return Result(
        seconds=time.monotonic() - begun,
        tasks=[(task.id, task.prompt, task.begins, task.ends) for task in tasks],
        downloads=Counter(task.downloads for task in tasks),
        entries=entries,
        reports=[host.report() for host in hosts],
        failures=[failure for host in hosts for failure in host.failures],
        adoptions=adoptions,
        lost=lost,
    )


def _disturb(
    settings: Settings, rng: random.Random, hosts: list[Host], server: PostgresServer, database: TcpProxy
) -> list[Kill]:
    """Kill hosts, crash the database and hold its network, each at its time; return the kills."""
    kills = []
    crashes = {round(settings.kills * (number + 1) / (settings.crashes + 2)) for number in range(settings.crashes)}
    for number in range(1, settings.kills + 1):
        time.sleep(settings.kill_every)
        host = _choose(rng, hosts)
        if host is None:
            break
        kills.append(Kill(moment=time.monotonic(), pid=host.pid))
        host.kill()
        host.restart()
        if number in crashes:
            server.stop("immediate")
            server.start()
        if number == round(settings.kills * 0.8) and settings.held:
            database.hold()
            time.sleep(settings.held)
            database.resume()
    return kills


def _choose(rng: random.Random, hosts: list[Host]) -> Host | None:
    """Wait until a host that follows tasks can be chosen, and return it; None if all have ended."""
    deadline = time.monotonic() + _PATIENCE
    while time.monotonic() < deadline:
        running = [host for host in hosts if not host.ended]
        if not running:
            return None
        host = rng.choice(running)
        if host.follows_tasks():
            return host
        time.sleep(0.05)
    raise AssertionError([host.failures for host in hosts])


async def _entries(conninfo: str, schema: str) -> list[JournalEntry]:
    return [entry async for entry in PostgresJournal(conninfo, schema=schema).entries()]


def _adoptions(hosts: list[Host], kills: list[Kill], ended: set[str | None]) -> tuple[list[list[float]], int]:
    """Return, for each kill, after how many seconds each task was followed again, and how many never were."""
    lines = [line.split() for host in hosts for line in (host.folder / "trace").read_text().splitlines()]
    events = sorted((float(moment), int(pid), event, task_id) for moment, pid, event, task_id in lines)
    adoptions, lost = [], 0
    for kill in kills:
        followed = {task_id: pid for moment, pid, event, task_id in events if moment <= kill.moment}
        ends = {task_id for moment, _, event, task_id in events if event == "ended" and moment <= kill.moment}
        again: dict[str, float] = {}
        for moment, pid, event, task_id in events:
            if moment > kill.moment and pid != kill.pid and event in {"adopted", "ended"}:
                again.setdefault(task_id, moment - kill.moment)
        orphans = {task_id for task_id, pid in followed.items() if pid == kill.pid} - ends
        adoptions.append([again[task_id] for task_id in orphans & again.keys()])
        lost += len(orphans - again.keys() - ended)
    return adoptions, lost
