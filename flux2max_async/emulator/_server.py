"""The emulated service as a real HTTP server on this machine."""

import asyncio
import contextlib
import functools
import secrets
import socket
import struct
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from decimal import Decimal
from types import TracebackType
from typing import Any, Self

import anyio
import anyio.to_thread
from aiohttp import web
from anyio.from_thread import start_blocking_portal

from flux2max_async.emulator._images.scenes import draw
from flux2max_async.emulator._service import EmulatedTask, Endpoint, Fault, Refusal, Service, read_submit
from flux2max_async.emulator._webhook_sender import Delivery, Webhooks, WebhookSender

Effect = Callable[[], Awaitable[web.StreamResponse]]

_SMALL_BODY = 20_000
_MAX_BODY = 300_000_000  # eight input images of 20 MB, as base64


class Emulator:
    """A gateway on 127.0.0.1. Enter it with `async with`, or with `with`, which runs it in a thread of its own.

    Args:
        seconds: The median of a task's duration, which is lognormal.
        spread: The standard deviation of its logarithm; 0 makes all tasks equally long.
        seed: Makes durations, ids and faults the same in each run.
        time_scale: How many seconds of the service pass in one real second.
        max_in_flight: Tasks running at once before submits are refused with 429.
        failing: The share of tasks that fail; a prompt with "[fail]" in it always does.
        moderated: The share of tasks that moderation refuses; a prompt with "[moderate]" in it always is.
        faults: The share of submits and polls that meet each `Fault`.
        url_lifetime: Seconds of the service that a result's url is valid.
        balance: US dollars that the account holds; None for plenty.
        webhooks: How finished tasks are posted to where their submits ask for; None for `Webhooks()`.
        pictures: False serves every result as the same tiny picture, for measurements.
        api_key: The only key that is let in; one is made where none is given.
        port: Where to listen; 0 takes any free port.
    """

    def __init__(
        self,
        *,
        seconds: float = 8.0,
        spread: float = 0.3,
        seed: int | None = None,
        time_scale: float = 1.0,
        max_in_flight: int = 24,
        failing: float = 0.0,
        moderated: float = 0.0,
        faults: Mapping[Fault, float] | None = None,
        url_lifetime: float = 600.0,
        balance: Decimal | None = None,
        webhooks: Webhooks | None = None,
        pictures: bool = True,
        api_key: str | None = None,
        port: int = 0,
    ) -> None:
        self._service = Service(
            seconds, spread, time_scale, max_in_flight, failing, moderated, faults or {}, url_lifetime, balance, seed
        )
        self._postman = WebhookSender(webhooks or Webhooks(), self._service, self._link)
        self.api_key: str = api_key or f"emulated-{secrets.token_hex(12)}"
        self._pictures = pictures
        self._port = port
        self._runner: web.AppRunner | None = None
        self._closing = asyncio.Event()
        self._thread = contextlib.ExitStack()

    # ------------------------------------------------------------------ what a test wants to know

    @property
    def url(self) -> str:
        """The base url to give to a client."""
        return f"http://127.0.0.1:{self._port}"

    @property
    def accepted(self) -> Counter[str]:
        """How many POSTs became a task, per prompt: more than 1 means that somebody paid twice."""
        return self._service.accepted

    @property
    def calls(self) -> Counter[str]:
        """How many calls came in, per endpoint: "submit", "poll" and "download"; and how many went out: "webhook"."""
        return self._service.calls

    @property
    def tasks(self) -> dict[str, EmulatedTask]:
        """The tasks by their id, in order of submission."""
        return self._service.tasks

    @property
    def deliveries(self) -> list[Delivery]:
        """The attempts to post finished tasks that are over, in the order in which they were."""
        return self._postman.deliveries

    @property
    def balance(self) -> Decimal | None:
        """US dollars left; set it to top the account up."""
        return self._service.balance

    @balance.setter
    def balance(self, dollars: Decimal | None) -> None:
        self._service.balance = dollars

    def script(self, endpoint: Endpoint, *faults: Fault | None) -> None:
        """Decide what the next calls to an endpoint meet, one fault each; None lets a call pass."""
        self._service.script(endpoint, faults)

    # ------------------------------------------------------------------ lifetime

    async def __aenter__(self) -> Self:
        app = web.Application(client_max_size=_MAX_BODY)
        app.router.add_post("/model/v1/generation", self._submit)
        app.router.add_get("/model/v1/generation/task/{id}", self._poll)
        app.router.add_get("/results/{id}", self._download)
        self._closing = asyncio.Event()
        self._runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=1.0)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self._port)
        await site.start()
        self._port = self._runner.addresses[0][1]
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._closing.set()
        assert self._runner is not None
        try:
            # Must not be cut short, or the port stays taken.
            with anyio.move_on_after(5, shield=True):
                await self._runner.cleanup()
        finally:
            # When nothing is accepted any more, or more would be expected.
            with anyio.move_on_after(5, shield=True):
                await self._postman.close()

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            portal = stack.enter_context(start_blocking_portal())
            stack.enter_context(portal.wrap_async_context_manager(self))
            self._thread = stack.pop_all()
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._thread.close()

    # ------------------------------------------------------------------ endpoints

    async def _submit(self, request: web.Request) -> web.StreamResponse:
        async def effect() -> web.StreamResponse:
            try:
                body = await request.json()
            except ValueError as error:
                raise Refusal(400, "invalid_json", "the body is no JSON") from error
            # Input pictures are decoded to be measured, which takes its time.
            large = (request.content_length or 0) > _SMALL_BODY
            ask = await anyio.to_thread.run_sync(read_submit, body) if large else read_submit(body)
            task = self._service.accept(ask, now=_now(), epoch=time.time())
            self._postman.expect(task)
            return self._json(self._service.describe(task, "", _now()))

        return await self._answer(request, "submit", effect)

    async def _poll(self, request: web.Request) -> web.StreamResponse:
        async def effect() -> web.StreamResponse:
            now = _now()
            task = self._service.find(request.match_info["id"], now)
            task.polls += 1
            return self._json(self._service.describe(task, self._link(task, now), now))

        return await self._answer(request, "poll", effect)

    async def _download(self, request: web.Request) -> web.StreamResponse:
        async def effect() -> web.StreamResponse:
            task_id, _, _ = request.match_info["id"].rpartition(".")
            task = self._service.tasks.get(task_id)
            if task is None:
                raise self._service.not_found()
            if _now() > float(request.query.get("expires", "0")):
                raise Refusal(403, "expired", "the url has expired")
            picture = await self._picture(task)
            headers = {"Accept-Ranges": "bytes", "ETag": f'"{task.id}"'}
            start = request.http_range.start or 0
            if start and request.headers.get("If-Range", headers["ETag"]) == headers["ETag"]:
                headers["Content-Range"] = f"bytes {start}-{len(picture) - 1}/{len(picture)}"
                return web.Response(
                    status=206, body=picture[start:], content_type=f"image/{task.output_format}", headers=headers
                )
            return web.Response(body=picture, content_type=f"image/{task.output_format}", headers=headers)

        return await self._answer(request, "download", effect)

    async def _answer(self, request: web.Request, endpoint: Endpoint, effect: Effect) -> web.StreamResponse:
        """Let a call take effect and be answered, as far as the fault that it meets allows."""
        fault = self._service.next_fault(endpoint)
        if fault is Fault.RESET_BEFORE:
            return _reset(request)
        try:
            self._check_key(request, endpoint)
            self._service.refuse(fault)
            response = await effect()
        except Refusal as refusal:
            return _refused(refusal)
        match fault:
            case Fault.RESET_AFTER:
                return _reset(request)
            case Fault.HANG:
                await self._closing.wait()
                return _reset(request)
            case Fault.CUT:
                return await _cut(request, response)
            case Fault.GARBAGE:
                return web.Response(
                    text="<html><body><h1>Welcome to nginx!</h1></body></html>", content_type="text/html"
                )
            case _:
                return response

    def _check_key(self, request: web.Request, endpoint: Endpoint) -> None:
        key = request.headers.get("Authorization")
        if endpoint == "download":
            if key is not None:
                raise Refusal(400, "key_leaked", "the key must not be sent to where pictures are stored")
        elif key != f"Bearer {self.api_key}":
            raise Refusal(401, "unauthorized", "the API key is missing or wrong")

    def _json(self, body: dict[str, Any]) -> web.Response:
        return web.json_response(body, headers={"X-Request-Id": secrets.token_hex(8)})

    def _link(self, task: EmulatedTask, now: float) -> str:
        """Give the url of a task's result, which is valid from now on for a while."""
        expires = now + self._service.url_lifetime / self._service.time_scale
        return f"{self.url}/results/{task.id}.{task.output_format}?expires={expires!r}"

    async def _picture(self, task: EmulatedTask) -> bytes:
        if not self._pictures:
            return _draw("", 0, 64, 64, task.output_format, ())
        return await anyio.to_thread.run_sync(
            _draw, task.prompt, task.seed, task.width, task.height, task.output_format, task.input_images
        )


@functools.lru_cache(maxsize=32)
def _draw(prompt: str, seed: int, width: int, height: int, output_format: str, inputs: tuple[bytes, ...]) -> bytes:
    return draw(prompt, seed=seed, width=width, height=height, output_format=output_format, input_images=inputs)


def _now() -> float:
    return asyncio.get_running_loop().time()


def _refused(refusal: Refusal) -> web.Response:
    headers = {"X-Request-Id": secrets.token_hex(8)}
    if refusal.retry_after is not None:
        headers["Retry-After"] = f"{refusal.retry_after:g}"
    error = {"code": refusal.code, "message": refusal.message}
    return web.json_response({"error": error}, status=refusal.status, headers=headers)


def _reset(request: web.Request) -> web.Response:
    """Break the connection with a reset, as a crashed proxy does."""
    if request.transport is not None:  # pragma: no branch - unless the client has just left
        connection: socket.socket = request.transport.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        request.transport.abort()
    return web.Response()  # goes nowhere


async def _cut(request: web.Request, response: web.StreamResponse) -> web.StreamResponse:
    """Send the head and half of the body, then hang up."""
    assert isinstance(response, web.Response)
    body = response.body
    assert isinstance(body, bytes)
    half = web.StreamResponse(status=response.status, headers=response.headers)
    half.content_length = len(body)
    await half.prepare(request)
    await half.write(body[: len(body) // 2])
    if request.transport is not None:  # pragma: no branch - unless the client has just left
        request.transport.close()
    return half
