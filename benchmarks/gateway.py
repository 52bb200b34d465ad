"""A lean gateway in a process of its own: it answers in each measured client's own dialect, and keeps the books.

How long a task takes stands in its prompt, so that it is the same for each client. The dialect is the first part of
the path. Who asks for a webhook gets one. Moments are those of CLOCK_MONOTONIC, which all processes of a machine share.
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

from webhook_sender import Hook, Postman, hook_in

TOO_MANY, UNAVAILABLE, RESET = 0.10, 0.05, 0.02
"""The shares of calls that meet each fault: 429, 503, and a reset after the call was accepted."""
RETRY_AFTER = 1
# What a client sees of an overloaded service is most often its proxy. (One of the clients looks for just this.)
PROXY_PAGE = b"<html><head><title>503 Service Temporarily Unavailable</title></head><body>nginx</body></html>"
CREATED = "2026-01-01T00:00:00Z"


def prompt(number: int, seconds: float) -> str:
    """Ask for a picture that takes so long."""
    return f"picture {number} for {seconds:.3f} s"


def durations(tasks: int, median: float, sigma: float) -> list[float]:
    """Draw how long tasks take, in seconds: lognormal, and the same each time."""
    chance = random.Random(1)
    return [median * chance.lognormvariate(0, sigma) for _ in range(tasks)]


# ------------------------------------------------------------------ for those who measure


def measured(*client: str, options: tuple[str, ...] = (), seconds: float = 900) -> tuple[Any, Any]:
    """Run a client, a Python script, against a gateway of its own.

    Args:
        client: The script and its arguments; the gateway's address is added as the last one.
        options: The gateway's.
        seconds: How long it may take.

    Returns:
        What the client printed and what the gateway counted, both JSON.

    Raises:
        CalledProcessError: The client failed; its last words are in `stderr`.
    """
    with running(*options) as url:
        # It is waited for by this process's own clock: a client that hangs is killed.
        try:
            command = [sys.executable, *client, url]
            run = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=True)
        except subprocess.CalledProcessError as error:
            error.add_note(error.stderr)
            raise
        with urlopen(f"{url}/books") as answer:
            return json.loads(run.stdout), json.load(answer)


@contextmanager
def running(*options: str) -> Iterator[str]:
    """Run a gateway, and give its address."""
    with subprocess.Popen([sys.executable, __file__, *options], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield process.stdout.readline().strip()
        finally:
            process.terminate()


def close_connections(url: str) -> None:
    """Have the gateway close all connections; there must be no call on the wire."""
    with urlopen(f"{url}/quiet") as answer:
        answer.read()


def end_all(url: str) -> None:
    """Have all tasks end now."""
    with urlopen(f"{url}/end") as answer:
        answer.read()


# ------------------------------------------------------------------ the service


@dataclass(slots=True)
class Task:
    id: str
    ends: float
    hook: Hook | None

    @property
    def ended(self) -> bool:
        return time.monotonic() >= self.ends


@dataclass
class Service:
    """All tasks, and what came in."""

    faults: bool
    url: str = ""
    calls: int = 0
    tasks: dict[str, Task] = field(default_factory=dict)
    ends: dict[int, list[float]] = field(default_factory=lambda: defaultdict(list))
    """By the number of the picture: when each task that was created for it ends. Each task costs money."""
    connections: set[asyncio.Transport] = field(default_factory=set)
    chance: random.Random = field(default_factory=lambda: random.Random(2))
    postman: Postman = field(default_factory=Postman)

    def create(self, body: bytes) -> Task:
        asked = re.search(rb"picture (\d+) for ([\d.]+) s", body)
        assert asked is not None, body
        number, ends = int(asked[1]), time.monotonic() + float(asked[2])
        self.ends[number].append(ends)
        task = Task(f"task-{number}-{len(self.ends[number])}", ends, hook_in(body))
        self.tasks[task.id] = task
        if task.hook is not None:
            # A timer may go off a little early.
            asyncio.get_running_loop().call_at(task.ends + task.hook.late + 0.001, self.tell, task)
        return task

    def tell(self, task: Task) -> None:
        """Post a task that has ended to where its submit has asked for."""
        if task.hook is not None:
            self.postman.deliver(task.hook, lambda: _flux(self, task, ""))

    def end_all(self) -> None:
        now = time.monotonic()
        for task in self.tasks.values():
            if not task.ended:
                task.ends = now
                self.tell(task)

    def books(self) -> dict[str, Any]:
        """Tell what has happened, and how many seconds of CPU time that took here."""
        answers = self.postman.answers
        return {"calls": self.calls, "ends": self.ends, "deliveries": answers, "cpu": time.process_time()}


# Each gives the answer to a submit, where `asked` is empty, or to a question about a task, where it is what stands
# behind the task's id in the path.
Dialect = Callable[[Service, Task, str | None], dict[str, Any]]


def _flux(service: Service, task: Task, asked: str | None) -> dict[str, Any]:
    answer = {"id": task.id, "status": "in_progress", "model": "flux_2_max", "created_at": 1763800000}
    if asked is None or not task.ended:
        return answer
    content = {"type": "image", "url": f"{service.url}/{task.id}.jpeg", "jobId": task.id}
    usage = {"cost": "0.07", "discount": 1}
    return answer | {"status": "completed", "output": [{"content": [content]}], "usage": usage, "metadata": {}}


def _replicate(service: Service, task: Task, asked: str | None) -> dict[str, Any]:  # noqa: ARG001 - as all dialects
    return {
        "id": task.id, "model": "black-forest-labs/flux-schnell", "version": "hidden", "input": {}, "logs": "",
        "status": "succeeded" if task.ended else "starting", "created_at": CREATED, "error": None,
        "output": [f"{service.url}/{task.id}.jpeg"] if task.ended else None,
        "urls": {"get": f"{service.url}/replicate/v1/predictions/{task.id}"},
    }  # fmt: skip


def _fal(service: Service, task: Task, asked: str | None) -> dict[str, Any]:
    if asked is None:
        base = f"{service.url}/fal/fal-ai/flux/requests/{task.id}"
        urls = {"response_url": base, "status_url": f"{base}/status", "cancel_url": f"{base}/cancel"}
        return {"request_id": task.id, "status": "IN_QUEUE", "queue_position": 0, **urls}
    if asked.startswith("/status"):
        return {"status": "COMPLETED" if task.ended else "IN_PROGRESS", "request_id": task.id, "logs": []}
    return {"images": [{"url": f"{service.url}/{task.id}.jpeg", "content_type": "image/jpeg"}]}


def _luma(service: Service, task: Task, asked: str | None) -> dict[str, Any]:  # noqa: ARG001 - as all dialects
    return {
        "id": task.id, "generation_type": "image", "model": "photon-1", "created_at": CREATED,
        "state": "completed" if task.ended else "dreaming",
        "assets": {"image": f"{service.url}/{task.id}.jpeg"} if task.ended else None,
    }  # fmt: skip


def _runway(service: Service, task: Task, asked: str | None) -> dict[str, Any]:
    if asked is None:
        return {"id": task.id, "estimatedCost": {"credits": 5}}
    answer = {"id": task.id, "createdAt": CREATED}
    if not task.ended:
        return answer | {"status": "RUNNING", "progress": 0.5, "estimatedCost": {"credits": 5}}
    return answer | {"status": "SUCCEEDED", "cost": {"credits": 5}, "output": [f"{service.url}/{task.id}.jpeg"]}


DIALECTS: dict[str, Dialect] = {
    "model": _flux,
    "replicate": _replicate,
    "fal": _fal,
    "luma": _luma,
    "runway": _runway,
}

# ------------------------------------------------------------------ the wire


class Connection(asyncio.Protocol):
    """One client's connection: as much of HTTP/1.1 as the measured clients speak."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._received = bytearray()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._service.connections.add(self._transport)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - asyncio calls it so
        self._service.connections.discard(self._transport)

    def data_received(self, data: bytes) -> None:
        self._received += data
        while (end := self._received.find(b"\r\n\r\n")) >= 0:
            head = bytes(self._received[:end])
            length = re.search(rb"(?i)\r\ncontent-length: *(\d+)", head)
            whole = end + 4 + (int(length[1]) if length else 0)
            if len(self._received) < whole:
                return
            body = bytes(self._received[end + 4 : whole])
            del self._received[:whole]
            self._answer(head, body)

    def _answer(self, head: bytes, body: bytes) -> None:
        service, path = self._service, head.split(b" ", 2)[1].decode()
        close = re.search(rb"(?i)\r\nconnection: *close", head) is not None
        if (told := self._manage(path)) is not None:
            self._reply(200, told, close=True)
            return
        service.calls += 1
        fault = service.chance.random() if service.faults else 1.0
        if fault < TOO_MANY:
            self._reply(429, b'{"error": {"code": 429, "message": "too many requests"}}', close=close)
            return
        if fault < TOO_MANY + UNAVAILABLE:
            self._reply(503, PROXY_PAGE, close=close)
            return
        dialect = DIALECTS[path.split("/", 2)[1]]
        about = re.search(r"(task-\d+-\d+)(.*)", path)
        if about is None:
            task, asked = service.create(body), None
        elif about[1] in service.tasks:
            task, asked = service.tasks[about[1]], about[2]
        else:
            self._reply(404, b'{"error": {"code": 404, "message": "no such task"}}', close=close)
            return
        if fault < TOO_MANY + UNAVAILABLE + RESET:
            self._reset()
        elif re.search(rb"(?i)\r\nprefer: *wait", head):
            # Replicate's service holds the answer to such a submit back until the task has ended.
            asyncio.get_running_loop().call_at(task.ends + 0.001, self._tell, dialect, task, asked, close)
        else:
            self._tell(dialect, task, asked, close)

    def _manage(self, path: str) -> bytes | None:
        """Do what those who measure ask for; None where a client calls."""
        match path:
            case "/books":
                return json.dumps(self._service.books()).encode()
            case "/quiet":
                for connection in self._service.connections - {self._transport}:
                    connection.close()
            case "/end":
                self._service.end_all()
            case _:
                return None
        return b"null"

    def _tell(self, dialect: Dialect, task: Task, asked: str | None, close: bool) -> None:  # noqa: FBT001 - call_at too
        self._reply(200, json.dumps(dialect(self._service, task, asked)).encode(), close=close)

    def _reply(self, status: int, body: bytes, *, close: bool) -> None:
        if self._transport.is_closing():
            return
        kind = b"text/html" if body is PROXY_PAGE else b"application/json"
        more = (b"Retry-After: %d\r\n" % RETRY_AFTER if status == 429 else b"") + (b"Connection: close\r\n" * close)
        head = b"HTTP/1.1 %d -\r\nContent-Type: %s\r\nContent-Length: %d\r\n%s\r\n" % (status, kind, len(body), more)
        self._transport.write(head + body)
        if close:
            self._transport.close()

    def _reset(self) -> None:
        """Break the connection so that the client sees a reset, not an end."""
        wire = self._transport.get_extra_info("socket")
        wire.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
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
    parser.add_argument("--faults", action="store_true", help="429, 503 and resets, drawn by a seeded generator")
    arguments = parser.parse_args()
    asyncio.run(serve(Service(arguments.faults)))


if __name__ == "__main__":
    main()
