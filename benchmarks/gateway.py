"""A minimal gateway in its own process, which speaks the API of each measured client and counts what it receives.

The duration of a task is part of its prompt, so that it is the same for each client. The first segment of the path
selects the API. A webhook is sent if the submit requests one. Times are those of CLOCK_MONOTONIC, which all processes
of a machine share.
"""

import argparse
import asyncio
import json
import random
import re
import socket
import struct
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast
from urllib.request import urlopen

from webhook_sender import Webhook, WebhookSender, webhook_of

RATE_LIMITED, UNAVAILABLE, RESET = 0.10, 0.05, 0.02
"""The share of requests with each fault: 429, 503, and a reset after the request was accepted."""
RETRY_AFTER = 1
"""Seconds."""
# An overloaded service usually responds with its proxy's page, and one of the clients checks for that page.
PROXY_PAGE = b"<html><head><title>503 Service Temporarily Unavailable</title></head><body>nginx</body></html>"
CREATED = "2026-01-01T00:00:00Z"


def prompt(number: int, seconds: float) -> str:
    """Return the prompt of a task with a given duration."""
    return f"picture {number} for {seconds:.3f} s"


def durations(tasks: int, median: float, sigma: float) -> list[float]:
    """Return the durations of tasks in seconds: lognormal, and the same for each call."""
    generator = random.Random(1)
    return [median * generator.lognormvariate(0, sigma) for _ in range(tasks)]


# ------------------------------------------------------------------ for the benchmarks


def run_client(*client: str, options: tuple[str, ...] = (), seconds: float = 900) -> tuple[Any, Any]:
    """Run a client, which is a Python script, with its own gateway.

    Args:
        client: The script and its arguments; the gateway's URL is appended to them.
        options: Command-line options of the gateway.
        seconds: Maximum duration.

    Returns:
        What the client printed and the counters of the gateway, both parsed from JSON.

    Raises:
        CalledProcessError: The client failed; its output is in `stderr`.
    """
    with running_gateway(*options) as url:
        # The time limit is enforced by this process, so a client that hangs is killed.
        try:
            command = [sys.executable, *client, url]
            run = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=True)
        except subprocess.CalledProcessError as error:
            error.add_note(error.stderr)
            raise
        with urlopen(f"{url}/counters") as response:
            return json.loads(run.stdout), json.load(response)


@contextmanager
def running_gateway(*options: str) -> Iterator[str]:
    """Run a gateway; the context is its URL."""
    with subprocess.Popen([sys.executable, __file__, *options], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield process.stdout.readline().strip()
        finally:
            process.terminate()


def close_connections(url: str) -> None:
    """Make the gateway close all connections; there must be no request on the wire."""
    with urlopen(f"{url}/close-connections") as response:
        response.read()


def end_all(url: str) -> None:
    """Make all tasks end now."""
    with urlopen(f"{url}/end-all") as response:
        response.read()


# ------------------------------------------------------------------ the service


@dataclass(slots=True)
class Task:
    id: str
    ends: float
    webhook: Webhook | None

    @property
    def ended(self) -> bool:
        return time.monotonic() >= self.ends


@dataclass
class Service:
    """The tasks and the counters of the gateway."""

    faults: bool
    url: str = ""
    requests: int = 0
    tasks: dict[str, Task] = field(default_factory=dict)
    ends: dict[int, list[float]] = field(default_factory=lambda: defaultdict(list))
    """For the number in a prompt, when each task with that prompt ends. Each task costs money."""
    connections: set[asyncio.Transport] = field(default_factory=set)
    fault_generator: random.Random = field(default_factory=lambda: random.Random(2))
    sender: WebhookSender = field(default_factory=WebhookSender)

    def create(self, body: bytes) -> Task:
        match = re.search(rb"picture (\d+) for ([\d.]+) s", body)
        assert match is not None, body
        number, ends = int(match[1]), time.monotonic() + float(match[2])
        self.ends[number].append(ends)
        task = Task(f"task-{number}-{len(self.ends[number])}", ends, webhook_of(body))
        self.tasks[task.id] = task
        if task.webhook is not None:
            # Timers may fire slightly too early.
            asyncio.get_running_loop().call_at(task.ends + task.webhook.delay + 0.001, self.send_webhook, task)
        return task

    def send_webhook(self, task: Task) -> None:
        """Send the webhook of a task that has ended, if its submit requested one."""
        if task.webhook is not None:
            self.sender.deliver(task.webhook, lambda: _flux(self, task, ""))

    def end_all(self) -> None:
        now = time.monotonic()
        for task in self.tasks.values():
            if not task.ended:
                task.ends = now
                self.send_webhook(task)

    def counters(self) -> dict[str, Any]:
        """Return what has happened, and the CPU time of this process in seconds."""
        return {
            "calls": self.requests,
            "ends": self.ends,
            "deliveries": self.sender.statuses,
            "cpu": time.process_time(),
        }


# Returns the response to a submit or a poll. The third argument is None for a submit, and for a poll the part of the
# path after the task's id.
Dialect = Callable[[Service, Task, str | None], dict[str, Any]]


def _flux(service: Service, task: Task, subpath: str | None) -> dict[str, Any]:
    body = {"id": task.id, "status": "in_progress", "model": "flux_2_max", "created_at": 1763800000}
    if subpath is None or not task.ended:
        return body
    content = {"type": "image", "url": f"{service.url}/{task.id}.jpeg", "jobId": task.id}
    usage = {"cost": "0.07", "discount": 1}
    return body | {"status": "completed", "output": [{"content": [content]}], "usage": usage, "metadata": {}}


def _replicate(service: Service, task: Task, subpath: str | None) -> dict[str, Any]:  # noqa: ARG001 - as in all dialects
    return {
        "id": task.id, "model": "black-forest-labs/flux-schnell", "version": "hidden", "input": {}, "logs": "",
        "status": "succeeded" if task.ended else "starting", "created_at": CREATED, "error": None,
        "output": [f"{service.url}/{task.id}.jpeg"] if task.ended else None,
        "urls": {"get": f"{service.url}/replicate/v1/predictions/{task.id}"},
    }  # fmt: skip


def _fal(service: Service, task: Task, subpath: str | None) -> dict[str, Any]:
    if subpath is None:
        base = f"{service.url}/fal/fal-ai/flux/requests/{task.id}"
        urls = {"response_url": base, "status_url": f"{base}/status", "cancel_url": f"{base}/cancel"}
        return {"request_id": task.id, "status": "IN_QUEUE", "queue_position": 0, **urls}
    if subpath.startswith("/status"):
        return {"status": "COMPLETED" if task.ended else "IN_PROGRESS", "request_id": task.id, "logs": []}
    return {"images": [{"url": f"{service.url}/{task.id}.jpeg", "content_type": "image/jpeg"}]}


def _luma(service: Service, task: Task, subpath: str | None) -> dict[str, Any]:  # noqa: ARG001 - as in all dialects
    return {
        "id": task.id, "generation_type": "image", "model": "photon-1", "created_at": CREATED,
        "state": "completed" if task.ended else "dreaming",
        "assets": {"image": f"{service.url}/{task.id}.jpeg"} if task.ended else None,
    }  # fmt: skip


def _runway(service: Service, task: Task, subpath: str | None) -> dict[str, Any]:
    if subpath is None:
        return {"id": task.id, "estimatedCost": {"credits": 5}}
    body = {"id": task.id, "createdAt": CREATED}
    if not task.ended:
        return body | {"status": "RUNNING", "progress": 0.5, "estimatedCost": {"credits": 5}}
    return body | {"status": "SUCCEEDED", "cost": {"credits": 5}, "output": [f"{service.url}/{task.id}.jpeg"]}


DIALECTS: dict[str, Dialect] = {
    "model": _flux,
    "replicate": _replicate,
    "fal": _fal,
    "luma": _luma,
    "runway": _runway,
}

# ------------------------------------------------------------------ HTTP


class Connection(asyncio.Protocol):
    """One connection, with as much of HTTP/1.1 as the measured clients need."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._received = bytearray()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._service.connections.add(self._transport)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - asyncio's signature
        self._service.connections.discard(self._transport)

    def data_received(self, data: bytes) -> None:
        self._received += data
        while (end := self._received.find(b"\r\n\r\n")) >= 0:
            head = bytes(self._received[:end])
            length = re.search(rb"(?i)\r\ncontent-length: *(\d+)", head)
            message_length = end + 4 + (int(length[1]) if length else 0)
            if len(self._received) < message_length:
                return
            body = bytes(self._received[end + 4 : message_length])
            del self._received[:message_length]
            self._handle(head, body)

    def _handle(self, head: bytes, body: bytes) -> None:
        service, path = self._service, head.split(b" ", 2)[1].decode()
        close = re.search(rb"(?i)\r\nconnection: *close", head) is not None
        if (result := self._handle_control(path)) is not None:
            self._respond(200, result, close=True)
            return
        service.requests += 1
        fault = service.fault_generator.random() if service.faults else 1.0
        if fault < RATE_LIMITED:
            self._respond(429, b'{"error": {"code": 429, "message": "too many requests"}}', close=close)
            return
        if fault < RATE_LIMITED + UNAVAILABLE:
            self._respond(503, PROXY_PAGE, close=close)
            return
        dialect = DIALECTS[path.split("/", 2)[1]]
        task_path = re.search(r"(task-\d+-\d+)(.*)", path)
        if task_path is None:
            task, subpath = service.create(body), None
        elif task_path[1] in service.tasks:
            task, subpath = service.tasks[task_path[1]], task_path[2]
        else:
            self._respond(404, b'{"error": {"code": 404, "message": "no such task"}}', close=close)
            return
        if fault < RATE_LIMITED + UNAVAILABLE + RESET:
            self._reset()
        elif re.search(rb"(?i)\r\nprefer: *wait", head):
            # Replicate's service responds to such a submit when the task has ended.
            asyncio.get_running_loop().call_at(
                task.ends + 0.001, self._respond_with_task, dialect, task, subpath, close
            )
        else:
            self._respond_with_task(dialect, task, subpath, close)

    def _handle_control(self, path: str) -> bytes | None:
        """Handle a request of the benchmarks; return None for a request of a client."""
        match path:
            case "/counters":
                return json.dumps(self._service.counters()).encode()
            case "/close-connections":
                for connection in self._service.connections - {self._transport}:
                    connection.close()
            case "/end-all":
                self._service.end_all()
            case _:
                return None
        return b"null"

    def _respond_with_task(
        self,
        dialect: Dialect,
        task: Task,
        subpath: str | None,
        close: bool,  # noqa: FBT001 - call_at() takes no keywords
    ) -> None:
        self._respond(200, json.dumps(dialect(self._service, task, subpath)).encode(), close=close)

    def _respond(self, status: int, body: bytes, *, close: bool) -> None:
        if self._transport.is_closing():
            return
        content_type = b"text/html" if body is PROXY_PAGE else b"application/json"
        headers = b"Retry-After: %d\r\n" % RETRY_AFTER if status == 429 else b""
        headers += b"Connection: close\r\n" * close
        head = b"HTTP/1.1 %d -\r\nContent-Type: %s\r\nContent-Length: %d\r\n%s\r\n"
        self._transport.write(head % (status, content_type, len(body), headers) + body)
        if close:
            self._transport.close()

    def _reset(self) -> None:
        """Close the connection with a TCP reset."""
        connection = self._transport.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._transport.abort()


async def serve(service: Service) -> None:
    """Serve until killed."""
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Connection(service), "127.0.0.1", 0, backlog=4096)
    service.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    print(service.url, flush=True)
    await server.serve_forever()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--faults", action="store_true", help="respond with 429, 503 and resets, from a seeded generator"
    )
    arguments = parser.parse_args()
    asyncio.run(serve(Service(arguments.faults)))


if __name__ == "__main__":
    main()
