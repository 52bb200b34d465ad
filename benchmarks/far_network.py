"""A gateway that is far away: TCP and TLS over a link with delay, on one machine. Linux only; needs root.

`far_gateway()` joins two network namespaces by a pair of TUN devices whose packets are held for half a round trip. The
gateway runs in the far one, and its caller in this one. `python benchmarks/far_network.py ROLE ...` runs the two helper
processes.
"""

import argparse
import asyncio
import contextlib
import ctypes
import fcntl
import heapq
import json
import os
import re
import select
import shutil
import ssl
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs

PORT = 8443
_SET_INTERFACE, _TUN, _NO_PACKET_INFO, _NEW_NETWORK = 0x400454CA, 0x0001, 0x1000, 0x40000000
_RESTART_GRACE = 1.5
"""Seconds that a connection which is idle at a restart stays open."""
_START_TIMEOUT = 15.0


@attrs.frozen
class FarEnd:
    """How the gateway treats connections; 0 means never."""

    idle: float = 0.0
    """Seconds after which it closes idle connections."""
    requests: int = 0
    """Responses after which it closes a connection, unannounced."""
    restart: float = 0.0
    """Seconds between two restarts. Each closes connections after their next response, or when they have been idle."""


@attrs.frozen
class FarGateway:
    """A running gateway."""

    url: str
    certificate: str
    _report: Path

    @property
    def counts(self) -> dict[str, int]:
        """The connections and submits so far, and how many prompts came more than once."""
        counts: dict[str, int] = json.loads(self._report.read_text())
        return counts


def missing() -> str | None:
    """Return what this machine lacks."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        return "root"
    if not os.access("/dev/net/tun", os.R_OK | os.W_OK):
        return "/dev/net/tun"
    return next((tool for tool in ("ip", "openssl") if shutil.which(tool) is None), None)


@contextlib.contextmanager
def far_gateway(round_trip: float, far_end: FarEnd, number: int) -> Iterator[FarGateway]:
    """Run a gateway at a given distance.

    Args:
        round_trip: Seconds.
        far_end: How it treats connections.
        number: 0 to 249, different for gateways that run at the same time.
    """
    address, space = f"10.78.{number}.2", f"flux{os.getpid()}-{number}"
    script = [sys.executable, __file__]
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        certificate, key, report, ready = (f"{folder}/{name}" for name in ("cert.pem", "key.pem", "report", "ready"))
        _run(
            f"openssl req -x509 -newkey rsa:2048 -nodes -keyout {key} -out {certificate} -days 2 -subj /CN={address} "
            f"-addext subjectAltName=IP:{address} 2>/dev/null"
        )
        _run(f"ip netns add {space}")
        stack.callback(_run, f"ip netns del {space}")
        _start(stack, [*script, "link", str(round_trip / 2), str(number), space, ready], Path(ready))
        behaviour = [str(value) for value in attrs.astuple(far_end)]
        server = [*script, "serve", address, certificate, key, report, *behaviour]
        _start(stack, ["ip", "netns", "exec", space, *server], Path(report))
        yield FarGateway(f"https://{address}:{PORT}", certificate, Path(report))


def _start(stack: contextlib.ExitStack, command: list[str], ready: Path) -> None:
    process = subprocess.Popen(command)

    def stop() -> None:
        process.terminate()
        process.wait(10)

    stack.callback(stop)
    give_up = time.monotonic() + _START_TIMEOUT
    while not ready.exists():
        if process.poll() is not None or time.monotonic() > give_up:
            raise SystemExit(f"did not start: {' '.join(command)}")
        time.sleep(0.05)


def _run(command: str) -> None:
    subprocess.run(command, shell=True, check=True)


# ---------------------------------------------------------------------- the link


def link(one_way: float, number: int, space: str, ready: Path) -> None:
    """Carry packets between the two namespaces, each after a delay in seconds, until the parent process ends."""
    near = _create_tun(f"near{number}")
    _run(f"ip addr add 10.78.{number}.1/24 dev near{number} && ip link set near{number} up txqueuelen 5000")
    libc, here = ctypes.CDLL(None, use_errno=True), os.open("/proc/self/ns/net", os.O_RDONLY)
    if libc.setns(os.open(f"/var/run/netns/{space}", os.O_RDONLY), _NEW_NETWORK) != 0:
        raise OSError(ctypes.get_errno(), "setns")
    far = _create_tun(f"far{number}")
    libc.setns(here, _NEW_NETWORK)
    in_space = f"ip -n {space}"
    _run(f"{in_space} addr add 10.78.{number}.2/24 dev far{number} && {in_space} link set lo up")
    _run(f"{in_space} link set far{number} up txqueuelen 5000")
    ready.touch()
    held: list[tuple[float, int, int, bytes]] = []
    count = 0
    while os.getppid() != 1:
        while held and held[0][0] <= time.monotonic():
            _, _, out, packet = heapq.heappop(held)
            with contextlib.suppress(OSError):
                os.write(out, packet)
        wait = min(1.0, max(0.0, held[0][0] - time.monotonic())) if held else 1.0
        for device in select.select([near, far], [], [], wait)[0]:
            with contextlib.suppress(BlockingIOError):
                for _ in range(256):
                    packet = os.read(device, 4096)
                    count += 1
                    out = far if device == near else near
                    heapq.heappush(held, (time.monotonic() + one_way, count, out, packet))


def _create_tun(name: str) -> int:
    device = os.open("/dev/net/tun", os.O_RDWR)
    fcntl.ioctl(device, _SET_INTERFACE, struct.pack("16sH", name.encode(), _TUN | _NO_PACKET_INFO))
    os.set_blocking(device, False)
    return device


# ---------------------------------------------------------------------- the gateway


class Gateway:
    """Counts, and restarts."""

    def __init__(self, far_end: FarEnd, report: Path) -> None:
        self.far_end, self.report = far_end, report
        self.generation = self.connections = self.submits = 0
        self.prompts: Counter[str] = Counter()

    async def serve(self, address: str, certificate: str, key: str) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, key)
        loop = asyncio.get_running_loop()
        while True:
            server = await loop.create_server(lambda: Connection(self), address, PORT, ssl=context, backlog=1000)
            self.write_report()
            for _ in range(int(self.far_end.restart or 1e6)):
                await asyncio.sleep(1.0)
                self.write_report()
            self.generation += 1
            server.close()  # connections that are open stay so
            await asyncio.sleep(0.3)

    def write_report(self) -> None:
        counts = {"connections": self.connections, "submits": self.submits}
        counts["doubled"] = sum(count > 1 for count in self.prompts.values())
        temporary = self.report.with_suffix(".new")
        temporary.write_text(json.dumps(counts))
        temporary.replace(self.report)

    def answer(self, method: str, path: str, body: bytes) -> dict[str, Any]:
        """Return the answer to a request of one of the clients; all tasks end immediately."""
        number = str(self.submits)
        if method == "POST":
            self.submits += 1
            if (prompt := re.search(rb'"prompt": ?"([^"]*)"', body)) is not None:
                self.prompts[prompt[1].decode()] += 1
        if path.startswith("/replicate"):
            return {"id": number, "status": "succeeded", "model": "m", "version": "v", "input": {}, "urls": {}}
        status = "in_progress" if method == "POST" else "completed"
        output = [{"content": [{"type": "image", "url": "https://pictures.example/0.jpeg", "jobId": "1"}]}]
        return {"id": f"task{number}" if method == "POST" else path.rpartition("/")[2], "status": status,
                "created_at": 1763800000, "model": "flux_2_max", "output": output if method == "GET" else [],
                "usage": {"cost": "0.07", "discount": 1}}  # fmt: skip


class Connection(asyncio.Protocol):
    """One connection. Whatever it has read is answered."""

    transport: asyncio.Transport

    def __init__(self, gateway: Gateway) -> None:
        self._gateway, self._generation = gateway, gateway.generation
        self._buffer, self._answers = b"", 0
        gateway.connections += 1

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self._last = time.monotonic()
        self._close_if_idle()

    def _close_if_idle(self) -> None:
        idle, quiet = self._gateway.far_end.idle, time.monotonic() - self._last
        is_old = self._gateway.generation > self._generation
        if self.transport.is_closing():
            return
        if not self._buffer and ((idle and quiet >= idle) or (is_old and quiet >= _RESTART_GRACE)):
            self.transport.close()
            return
        asyncio.get_running_loop().call_later(0.02, self._close_if_idle)

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        self._last = time.monotonic()
        while not self.transport.is_closing() and (end := self._buffer.find(b"\r\n\r\n")) >= 0:
            head = self._buffer[:end].decode("latin-1")
            length = re.search(r"content-length: *(\d+)", head, re.IGNORECASE)
            size = end + 4 + (int(length[1]) if length else 0)
            if len(self._buffer) < size:
                return
            body, self._buffer = self._buffer[end + 4 : size], self._buffer[size:]
            method, path, _ = head.split(" ", 2)
            content = json.dumps(self._gateway.answer(method, path, body)).encode()
            header = f"Content-Type: application/json\r\nContent-Length: {len(content)}"
            self.transport.write(f"HTTP/1.1 200 OK\r\n{header}\r\n\r\n".encode() + content)
            self._answers += 1
            if self._answers == self._gateway.far_end.requests or self._gateway.generation > self._generation:
                self.transport.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    roles = parser.add_subparsers(dest="role", required=True)
    carry = roles.add_parser("link")
    for name, kind in {"one_way": float, "number": int, "space": str, "ready": Path}.items():
        carry.add_argument(name, type=kind)
    serve = roles.add_parser("serve")
    for name in ("address", "certificate", "key", "report", "idle", "requests", "restart"):
        serve.add_argument(name)
    arguments = parser.parse_args()
    if arguments.role == "link":
        link(arguments.one_way, arguments.number, arguments.space, arguments.ready)
        return
    far_end = FarEnd(float(arguments.idle), int(arguments.requests), float(arguments.restart))
    gateway = Gateway(far_end, Path(arguments.report))
    asyncio.run(gateway.serve(arguments.address, arguments.certificate, arguments.key))


if __name__ == "__main__":
    main()
