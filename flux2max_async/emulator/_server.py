"""The HTTP server of the emulated service."""

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
from flux2max_async.emulator._service import EmulatedTask, Endpoint, Fault, Service
from flux2max_async.emulator._validation import ServiceError, parse_submit
from flux2max_async.emulator._webhook_sender import Delivery, Webhooks, WebhookSender

Handler = Callable[[], Awaitable[web.StreamResponse]]

_MAX_INLINE_BODY_BYTES = 20_000
"""Larger bodies are validated in a thread, because decoding input images takes long."""
_MAX_BODY_BYTES = 300_000_000  # eight input images of 20 MB, as base64


class Emulator:
    """A gateway on 127.0.0.1. Enter it with `async with`, or with `with`, which runs it in a thread of its own.

    Args:
        seconds: Median duration of a task. Durations are lognormal.
        spread: Standard deviation of the logarithm of a duration; 0 makes all durations equal.
        seed: Makes durations, ids and faults the same in every run.
        time_scale: Seconds of the service per real second.
        max_in_flight: Limit on running tasks; further submits are refused with 429.
        failing: Share of tasks that fail; a prompt that contains "[fail]" always does.
        moderated: Share of tasks that moderation refuses; a prompt that contains "[moderate]" always is.
        faults: Share of submits and polls that meet each `Fault`.
        url_lifetime: Seconds of the service until a result URL expires.
        balance: US dollars in the account; None for unlimited.
        webhooks: How finished tasks are posted to the webhook URLs of their submits; None for `Webhooks()`.
        pictures: False serves the same tiny image for every result, for measurements.
        api_key: The only API key that is accepted; None generates one.
        port: Port to listen on; 0 takes any free port.

    Raises:
        ValueError: There is no such fault.
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
        faults: Mapping[Fault, float] | Mapping[str, float] | None = None,
        url_lifetime: float = 600.0,
        balance: Decimal | None = None,
        webhooks: Webhooks | None = None,
        pictures: bool = True,
        api_key: str | None = None,
        port: int = 0,
    ) -> None:
        self._service = Service(
            seconds=seconds,
            spread=spread,
            time_scale=time_scale,
            max_in_flight=max_in_flight,
            failing=failing,
            moderated=moderated,
            faults=faults or {},
            url_lifetime=url_lifetime,
            balance=balance,
            seed=seed,
        )
        self._webhook_sender = WebhookSender(webhooks or Webhooks(), self._service, self._result_url)
        self.api_key: str = api_key or f"emulated-{secrets.token_hex(12)}"
        self._draws_images = pictures
        self._port = port
        self._runner: web.AppRunner | None = None
        self._closing = asyncio.Event()
        self._exit_stack = contextlib.ExitStack()

    # ------------------------------------------------------------------ state

    @property
    def url(self) -> str:
        """The base URL for clients."""
        return f"http://127.0.0.1:{self._port}"

    @property
    def accepted(self) -> Counter[str]:
        """Number of created tasks per prompt. More than 1 means that the client paid twice."""
        return self._service.accepted

    @property
    def calls(self) -> Counter[str]:
        """Number of calls to "submit", "poll" and "download", and number of attempts to post a "webhook"."""
        return self._service.calls

    @property
    def tasks(self) -> dict[str, EmulatedTask]:
        """The tasks by id, in order of submission."""
        return self._service.tasks

    @property
    def deliveries(self) -> list[Delivery]:
        """The completed attempts to post finished tasks, in the order in which they ended."""
        return self._webhook_sender.deliveries

    @property
    def balance(self) -> Decimal | None:
        """US dollars in the account. Set it to top up the account."""
        return self._service.balance

    @balance.setter
    def balance(self, dollars: Decimal | None) -> None:
        self._service.balance = dollars

    def script(self, endpoint: Endpoint, *faults: Fault | str | None) -> None:
        """Queue faults for the next calls to an endpoint, one fault per call.

        Args:
            endpoint: "submit", "poll" or "download".
            faults: Any fault can be used with any endpoint; None lets a call succeed.

        Raises:
            ValueError: There is no such endpoint or fault.
        """
        self._service.script(endpoint, faults)

    # ------------------------------------------------------------------ lifetime

    async def __aenter__(self) -> Self:
        app = web.Application(client_max_size=_MAX_BODY_BYTES)
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
            # Shielded, because the port would stay in use if this were cancelled.
            with anyio.move_on_after(5, shield=True):
                await self._runner.cleanup()
        finally:
            # After the server has stopped, because submits schedule webhooks.
            with anyio.move_on_after(5, shield=True):
                await self._webhook_sender.close()

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            portal = stack.enter_context(start_blocking_portal())
            stack.enter_context(portal.wrap_async_context_manager(self))
            self._exit_stack = stack.pop_all()
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._exit_stack.close()

    # ------------------------------------------------------------------ endpoints

    async def _submit(self, request: web.Request) -> web.StreamResponse:
        async def handle() -> web.StreamResponse:
            try:
                body = await request.json()
            except ValueError as error:
                raise ServiceError(400, "invalid_json", "the body is not valid JSON") from error
            model = request.headers.get("X-Model")
            if (request.content_length or 0) > _MAX_INLINE_BODY_BYTES:
                parsed = await anyio.to_thread.run_sync(parse_submit, body, model)
            else:
                parsed = parse_submit(body, model)
            task = self._service.accept(parsed, now=_now(), epoch=time.time())
            self._webhook_sender.schedule(task)
            return self._json(self._service.describe(task, "", _now()))

        return await self._respond(request, "submit", handle)

    async def _poll(self, request: web.Request) -> web.StreamResponse:
        async def handle() -> web.StreamResponse:
            now = _now()
            task = self._service.find(request.match_info["id"], now)
            task.polls += 1
            return self._json(self._service.describe(task, self._result_url(task, now), now))

        return await self._respond(request, "poll", handle)

    async def _download(self, request: web.Request) -> web.StreamResponse:
        async def handle() -> web.StreamResponse:
            task_id, _, _ = request.match_info["id"].rpartition(".")
            task = self._service.tasks.get(task_id)
            if task is None:
                raise self._service.not_found()
            if _now() > float(request.query.get("expires", "0")):
                raise ServiceError(403, "expired", "the url has expired")
            data = await self._image(task)
            headers = {"Accept-Ranges": "bytes", "ETag": f'"{task.id}"'}
            start = request.http_range.start or 0
            if start and request.headers.get("If-Range", headers["ETag"]) == headers["ETag"]:
                headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
                return web.Response(
                    status=206, body=data[start:], content_type=f"image/{task.output_format}", headers=headers
                )
            return web.Response(body=data, content_type=f"image/{task.output_format}", headers=headers)

        return await self._respond(request, "download", handle)

    async def _respond(self, request: web.Request, endpoint: Endpoint, handler: Handler) -> web.StreamResponse:
        """Run the handler of a call and return its response, except for what the fault that the call meets changes."""
        fault = self._service.next_fault(endpoint)
        if fault is Fault.RESET_BEFORE:
            return _reset(request)
        try:
            self._check_key(request, endpoint)
            self._service.raise_for_fault(fault)
            response = await handler()
        except ServiceError as error:
            return _error_response(error)
        match fault:
            case Fault.RESET_AFTER:
                return _reset(request)
            case Fault.HANG:
                await self._closing.wait()
                return _reset(request)
            case Fault.CUT:
                return await _send_half(request, response)
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
                raise ServiceError(400, "key_leaked", "the API key must not be sent to result URLs")
        elif key != f"Bearer {self.api_key}":
            raise ServiceError(401, "unauthorized", "the API key is missing or wrong")

    def _json(self, body: dict[str, Any]) -> web.Response:
        return web.json_response(body, headers={"X-Request-Id": secrets.token_hex(8)})

    def _result_url(self, task: EmulatedTask, now: float) -> str:
        """Return the URL of a task's result; its lifetime starts at `now`."""
        expires = now + self._service.url_lifetime / self._service.time_scale
        return f"{self.url}/results/{task.id}.{task.output_format}?expires={expires!r}"

    async def _image(self, task: EmulatedTask) -> bytes:
        if not self._draws_images:
            return _draw("", 0, 64, 64, task.output_format, ())
        return await anyio.to_thread.run_sync(
            _draw, task.prompt, task.seed, task.width, task.height, task.output_format, task.input_images
        )


@functools.lru_cache(maxsize=32)
def _draw(prompt: str, seed: int, width: int, height: int, output_format: str, inputs: tuple[bytes, ...]) -> bytes:
    return draw(prompt, seed=seed, width=width, height=height, output_format=output_format, input_images=inputs)


def _now() -> float:
    return asyncio.get_running_loop().time()


def _error_response(error: ServiceError) -> web.Response:
    headers = {"X-Request-Id": secrets.token_hex(8)}
    if error.retry_after is not None:
        headers["Retry-After"] = f"{error.retry_after:g}"
    body = {"error": {"code": error.code, "message": error.message}}
    return web.json_response(body, status=error.status, headers=headers)


def _reset(request: web.Request) -> web.Response:
    """Reset the TCP connection, as a crashed proxy does."""
    if request.transport is not None:  # pragma: no branch - None if the client has just disconnected
        connection: socket.socket = request.transport.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        request.transport.abort()
    return web.Response()  # aiohttp needs one, but cannot send it


async def _send_half(request: web.Request, response: web.StreamResponse) -> web.StreamResponse:
    """Send the headers and half of the body, then close the connection."""
    assert isinstance(response, web.Response)
    body = response.body
    assert isinstance(body, bytes)
    partial = web.StreamResponse(status=response.status, headers=response.headers)
    partial.content_length = len(body)
    await partial.prepare(request)
    await partial.write(body[: len(body) // 2])
    if request.transport is not None:  # pragma: no branch - None if the client has just disconnected
        request.transport.close()
    return partial
