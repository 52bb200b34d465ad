"""The hostile gateway's server, in a process of its own: its memory and processor time are not the client's."""

import asyncio
import logging
import multiprocessing
import ssl
import subprocess
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection as Pipe
from pathlib import Path
from typing import Any, Self
from urllib.parse import unquote

import attrs

from support.hostile import GATEWAY_HOST, KINDS, PICTURES_HOST, PRIVATE_URLS, kind_of, picture, redirect, with_pictures
from support.scripted import Behaviour, Received, ScriptedGateway, answer, completed, running


@attrs.frozen
class Ports:
    """Where the server listens."""

    tls: int
    plain: int
    private: int
    """What nobody may ask: it stands for everything at a private address."""


@attrs.frozen
class Totals:
    """What the server has seen."""

    accepted: Counter[str]
    """The number of tasks created for each prompt."""
    private_connections: int


class HostileGateway(ScriptedGateway):
    """Answers each request as the `Kind` does that its prompt names.

    Args:
        certificate: The file with the certificate and key of the TLS port.
    """

    def __init__(self, certificate: Path) -> None:
        super().__init__()
        self._context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        self._context.load_cert_chain(certificate)
        self.accepted: Counter[str] = Counter()
        self.private_connections = 0
        self._prompts: dict[str, str] = {}
        """By task id."""
        self._polled: set[str] = set()

    @property
    def ports(self) -> Ports:
        servers = (self._tls, self._server, self._private)
        return Ports(*(server.sockets[0].getsockname()[1] for server in servers))

    async def __aenter__(self) -> Self:
        await super().__aenter__()
        self._tls = await asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=self._context)
        self._private = await asyncio.start_server(self._serve_private, "127.0.0.1", 0)
        return self

    async def _serve_private(self, _: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.private_connections += 1
        body = picture()
        writer.write(f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
        writer.close()

    def _script(self, request: Received) -> deque[Behaviour]:
        self.received.clear()
        if request.method == "POST":
            return deque([self._submit(request.params["prompt"])])
        if "/task/" in request.path:
            return deque([self._poll(unquote(request.path.partition("/task/")[2], errors="surrogatepass"))])
        return deque([self._download(request.path.split("/")[1])])

    def _submit(self, prompt: str) -> Behaviour:
        kind = KINDS[kind_of(prompt)]
        self.accepted[prompt] += 1
        task_id = kind.new_id(prompt)
        self._prompts[task_id] = prompt
        return kind.submit(prompt) if kind.submit else answer(200, running(task_id))

    def _poll(self, task_id: str) -> Behaviour:
        prompt = self._prompts[task_id]
        name = kind_of(prompt)
        if name == "honest" and task_id not in self._polled:
            self._polled.add(task_id)
            return answer(200, running(task_id, progress=0.5))
        host = "rebinding.example" if name == "rebinding" else PICTURES_HOST
        url = f"http://{host}:{self.ports.plain}/{prompt}/picture.jpeg"
        if name.startswith("private_"):
            return with_pictures(self._private_url(name))(task_id, url)
        poll = KINDS[name].poll
        return poll(task_id, url) if poll else answer(200, completed(task_id, url))

    def _download(self, prompt: str) -> Behaviour:
        name = kind_of(prompt)
        if name.startswith("redirect_") and name[9:].isdecimal():
            return redirect(self._private_url(name))
        download = KINDS[name].download if name in KINDS else None
        return download() if download else answer(200, picture(), [("Content-Type", "image/jpeg")])

    def _private_url(self, name: str) -> str:
        return PRIVATE_URLS[int(name.rpartition("_")[2])].replace("{port}", str(self.ports.private))


def make_certificate(folder: Path) -> Path:
    """Return a new file with a key and a certificate, which signs itself, for the hosts of the gateway."""
    path, key = folder / "certificate.pem", folder / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-days", "2", "-subj", f"/CN={GATEWAY_HOST}", "-addext", f"subjectAltName=DNS:{GATEWAY_HOST}"]
    subprocess.run([*command, "-keyout", str(key), "-out", str(path)], check=True, capture_output=True)
    path.write_bytes(path.read_bytes() + key.read_bytes())
    return path


# ------------------------------------------------------------------ the process

_SPAWN_CONTEXT = multiprocessing.get_context("spawn")


async def _run(pipe: Pipe, certificate: Path) -> None:
    loop = asyncio.get_running_loop()
    # Clients hang up on hostile answers.
    loop.set_exception_handler(lambda _, __: None)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    async with HostileGateway(certificate) as gateway:
        pipe.send(gateway.ports)
        while await loop.run_in_executor(None, pipe.recv):
            pipe.send(Totals(gateway.accepted, gateway.private_connections))


def _serve(pipe: Pipe, certificate: Path) -> None:
    asyncio.run(_run(pipe, certificate))


@attrs.frozen
class RunningGateway:
    """A hostile gateway in another process."""

    pipe: Any
    ports: Ports

    def totals(self) -> Totals:
        self.pipe.send(True)
        totals: Totals = self.pipe.recv()
        return totals


@contextmanager
def running_hostile_gateway(certificate: Path) -> Iterator[RunningGateway]:
    """Run a hostile gateway until the block ends."""
    pipe, child_pipe = _SPAWN_CONTEXT.Pipe()
    process = _SPAWN_CONTEXT.Process(target=_serve, args=(child_pipe, certificate), daemon=True)
    process.start()
    child_pipe.close()  # so that the end of the process is noticed
    try:
        yield RunningGateway(pipe, pipe.recv())
    finally:
        process.kill()
        process.join()
