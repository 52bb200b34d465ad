"""The client of the hostile gateway: a process of its own, which measures itself and prints what came of it as JSON.

Its event loop stands for the network: it resolves names from a table, and lets a public address lead to the gateway on
this machine, and every private one to a server that counts its callers. The library runs unchanged, and sees the
addresses as on the Internet. The loop's clock is faster than the real one, so that timeouts don't take minutes.
"""

import asyncio
import contextlib
import gc
import json
import logging
import random
import selectors
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs

from flux2max_async import (
    BudgetExceededError,
    Completed,
    FixedSchedule,
    FluxError,
    FluxSession,
    GenerationRequest,
    Outcome,
    SqliteJournal,
)
from support.hostile import GATEWAY_HOST, KINDS, PICTURES_HOST, TIME_SCALE

PUBLIC, UNREACHABLE = "93.184.216.34", "93.184.216.35"
_NAMES = {
    GATEWAY_HOST: [PUBLIC],
    PICTURES_HOST: [PUBLIC],
    "localhost": ["127.0.0.1", "::1"],
    "loopback.example": ["127.0.0.1"],
    "metadata.example": ["169.254.169.254"],
    "mixed.example": [UNREACHABLE, "127.0.0.1"],
}
WARM_UP_KINDS = (
    "eps",
    "data_url",
    "file_url",
    "redirect_loop",
    "private_0",
    "poll_bomb",
    "endless_headers",
    "controls_code",
)
"""Small answers that need modules, threads and buffers which honest ones don't."""
_TICK = 0.05
"""Seconds of the loop's clock between two measurements."""


# ------------------------------------------------------------------ the network and the clock


class _FastSelector(selectors.DefaultSelector):
    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        return super().select(timeout and timeout / TIME_SCALE)


class ClientLoop(asyncio.SelectorEventLoop):
    """An event loop with a fast clock, and with a network of its own.

    Args:
        private_port: Where connections to addresses that are not public lead.
    """

    def __init__(self, private_port: int) -> None:
        super().__init__(_FastSelector())
        self._private_port = private_port
        self._peers: dict[int, tuple[Any, ...]] = {}
        self.contacted: set[str] = set()
        """All addresses to which a connection was attempted."""
        self._resolutions = 0

    def time(self) -> float:
        return time.monotonic() * TIME_SCALE

    async def getaddrinfo(self, host: Any, port: Any, **options: Any) -> Any:
        """Resolve a name from the table, and numbers in every spelling as the system does."""
        name = (host.decode() if isinstance(host, bytes) else host).rstrip(".").lower()
        addresses = _NAMES.get(name)
        if name == "rebinding.example":
            self._resolutions += 1
            addresses = [PUBLIC if self._resolutions % 2 else "127.0.0.1"]
        if addresses is None:
            addresses = [socket.inet_ntoa(socket.inet_aton(name))] if _is_number(name) else []
        if not addresses:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return [
            (socket.AF_INET6, socket.SOCK_STREAM, 6, "", (address, port, 0, 0))
            if ":" in address
            else (socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))
            for address in addresses
        ]

    async def sock_connect(self, sock: socket.socket, address: Any) -> None:
        """Connect to what stands for an address."""
        self.contacted.add(address[0])
        port = {PUBLIC: address[1], UNREACHABLE: 1}.get(address[0], self._private_port)
        host = "127.0.0.1" if sock.family == socket.AF_INET else "::ffff:127.0.0.1"
        await super().sock_connect(sock, (host, port))
        self._peers[sock.fileno()] = address

    def _make_socket_transport(self, sock: socket.socket, *arguments: Any, **options: Any) -> Any:
        peer = self._peers.get(sock.fileno())
        extra = {**(options.pop("extra", None) or {}), **({"peername": peer} if peer else {})}
        return super()._make_socket_transport(sock, *arguments, extra=extra, **options)  # type: ignore[misc]

    def _make_ssl_transport(self, rawsock: socket.socket, *arguments: Any, **options: Any) -> Any:
        peer = self._peers.get(rawsock.fileno())
        extra = {**(options.pop("extra", None) or {}), **({"peername": peer} if peer else {})}
        return super()._make_ssl_transport(rawsock, *arguments, extra=extra, **options)  # type: ignore[misc]


def _is_number(name: str) -> bool:
    with contextlib.suppress(OSError):
        return bool(socket.inet_aton(name))
    return False


# ------------------------------------------------------------------ measurements


@attrs.define
class Meter:
    """Measures stalls of the event loop, and the memory that the process takes."""

    longest_stall: float = 0.0
    """Seconds of processor time that the process has used while the loop was not ready for others.

    Time in which other processes had the processor doesn't count, but that of threads that hold the interpreter does.
    """
    baseline: int = 0

    async def watch(self) -> None:
        while True:
            before = time.process_time()
            await asyncio.sleep(_TICK)
            self.longest_stall = max(self.longest_stall, time.process_time() - before)

    def start(self) -> None:
        """Forget what was measured, and measure memory from here on."""
        gc.collect()
        self.longest_stall = 0.0
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets VmHWM
        self.baseline = _memory("VmRSS")

    def report(self) -> dict[str, float]:
        peak = _memory("VmHWM") - self.baseline
        gc.collect()
        return {"stall": self.longest_stall, "peak": peak, "growth": _memory("VmRSS") - self.baseline}


def _memory(name: str) -> int:
    """Return the resident memory of this process, now (VmRSS) or at its highest (VmHWM), in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def reference_time() -> float:
    """Return the processor time of a fixed piece of work, as a measure of this machine's speed."""
    started = time.thread_time()
    json.loads(json.dumps([{"number": number, "text": str(number)} for number in range(50_000)]))
    return time.thread_time() - started


class Counting(logging.FileHandler):
    """Writes a log, and keeps the first messages that hold what no log may."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, encoding="utf-8", errors="backslashreplace")
        self.bad: list[str] = []
        self.longest = 0

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        self.longest = max(self.longest, len(message))
        if not message.isprintable() and len(self.bad) < 20:
            self.bad.append(ascii(message[:300]))
        super().emit(record)


# ------------------------------------------------------------------ the run


def requests(*names: str, start: int = 0, count: int | None = None) -> Iterator[GenerationRequest]:
    """Yield the requests of some kinds."""
    for name in names:
        for number in range(start, start + (KINDS[name].count if count is None else count)):
            yield GenerationRequest(f"{name}.{number}", width=64, height=64, key=f"{name}.{number}")


def describe(outcome: Outcome) -> dict[str, Any]:
    assert outcome.request is not None
    error: BaseException | None
    if isinstance(outcome, Completed):
        error = outcome.save_error
        missing = "partly saved" if outcome.saved else "unsaved"
        end = missing if error else "saved"
        saved, partial = [path.name for path in outcome.saved], outcome.partial_error is not None
        cost = str(outcome.usage.cost) if outcome.usage and outcome.usage.cost is not None else None
    else:
        error, saved, partial, cost = outcome.error, [], False, None
        end = type(outcome.error).__name__
    text = str(error or "")
    return {
        "prompt": outcome.request.prompt,
        "end": end,
        "saved": saved,
        "partial": partial,
        "cost": cost and cost[:20],
        "error": ascii(text[:300]),
        "error_length": len(text),
        "journal_error": ascii(str(outcome.journal_error)[:300]) if outcome.journal_error else None,
    }


async def run(folder: Path, port: int, key: str, budget: str) -> dict[str, Any]:
    loop = asyncio.get_running_loop()
    assert isinstance(loop, ClientLoop)
    meter = Meter()
    watching = asyncio.create_task(meter.watch())
    mixed = list(requests(*KINDS))
    random.Random(7).shuffle(mixed)
    outcomes: list[dict[str, Any]] = []
    failure = stopped = refused = None
    async with FluxSession(
        key,
        base_url=f"https://{GATEWAY_HOST}:{port}",
        max_in_flight=24,
        schedule=FixedSchedule(1.0),
        task_timeout=60.0,
        journal=SqliteJournal(folder / "journal" / "run.db"),
        budget=budget,
        max_uncertain=None,
        max_polls_per_second=None,
    ) as session:
        warm_up = [*requests("honest", start=1000, count=150), *requests(*WARM_UP_KINDS, start=1000, count=1)]
        async for _ in session.stream(warm_up, save_to=folder / "pictures"):
            pass
        meter.start()
        try:
            async for outcome in session.stream(mixed, save_to=folder / "pictures"):
                outcomes.append(describe(outcome))
        except FluxError as error:
            failure = str(error)
        measured = meter.report()
        try:
            costs = requests("negative_cost", "huge_cost", "nan_cost", start=1000, count=1000)
            async for _ in session.stream(costs, save_to=folder / "pictures"):
                pass
        except BudgetExceededError as error:
            stopped = str(error)
        try:
            await session.generate("honest.9999")
        except BudgetExceededError as error:
            refused = str(error)
    watching.cancel()
    return {
        "outcomes": outcomes,
        "failure": failure,
        "stopped": stopped,
        "refused": refused,
        "contacted": sorted(loop.contacted),
        "reference": reference_time(),
        **measured,
    }


def main() -> None:
    folder, tls_port, private_port, key, budget = sys.argv[1:]
    log = Counting(Path(folder, "logs", "client.log"))
    logging.basicConfig(level=logging.DEBUG, handlers=[log])
    loop = ClientLoop(int(private_port))
    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        report = runner.run(run(Path(folder), int(tls_port), key, budget))
    print(json.dumps({**report, "bad_messages": log.bad, "longest_message": log.longest}))


if __name__ == "__main__":
    main()
