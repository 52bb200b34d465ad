"""The HTTP server of the emulated service."""

import asyncio
import contextlib
import secrets
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from decimal import Decimal
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import anyio
import anyio.to_thread
from aiohttp import web
from anyio.from_thread import start_blocking_portal

from flux2max_async.emulator._answers import ERRORS, GARBAGE, RESPONSES, Answer
from flux2max_async.emulator._faults import Fault
from flux2max_async.emulator._responses import build_response, error_response, reset, send_half
from flux2max_async.emulator._results import Results
from flux2max_async.emulator._service import EmulatedTask, Endpoint, Service
from flux2max_async.emulator._traits import TRAITS
from flux2max_async.emulator._validation import ServiceError, parse_submit
from flux2max_async.emulator._webhook_sender import Delivery, Webhooks, WebhookSender

if TYPE_CHECKING:
    from typing import Unpack

    from flux2max_async._session import FluxSession
    from flux2max_async._session_options import SessionOptions

Handler = Callable[[Fault | None], Awaitable[web.StreamResponse]]

_MAX_INLINE_BODY_BYTES = 20_000
"""Larger bodies are validated in a thread, because decoding input images takes long."""
_USUAL_RESPONSE = Answer(200, "{task}")
_POLL_INTERVAL = 0.02  # seconds
_HUGE_HEADER_BYTES = 20_000
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
        faults: Share of submits and polls that meet each `Fault`; for a trait, share of tasks that have it.
        url_lifetime: Seconds of the service until a result URL expires.
        balance: US dollars in the account; None for unlimited.
        webhooks: How finished tasks are posted to the webhook URLs of their submits; None for `Webhooks()`.
        pictures: False serves the same tiny image for every result, for measurements.
        api_key: The only API key that is accepted; None generates one.
        port: Port to listen on; 0 takes any free port.

    Raises:
        ValueError: There is no such fault, or shares are more than 1 together.
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
        self._results = Results(self._service, lambda: self.url, draws_images=pictures)
        self._webhook_sender = WebhookSender(webhooks or Webhooks(), self._service, self._results.describe)
        self.api_key: str = api_key or f"emulated-{secrets.token_hex(12)}"
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

    def session(self, **options: "Unpack[SessionOptions]") -> "FluxSession":
        """Return a session, to be entered, that has the key and the address of this emulator, and polls quickly.

        Args:
            options: Further parameters of FluxSession, or other values for these.

        Raises:
            RuntimeError: The emulator is not running yet, so its address is not known.
        """
        from flux2max_async._polling.schedules import FixedSchedule  # noqa: PLC0415 - only those who want a session load it
        from flux2max_async._session import FluxSession  # noqa: PLC0415 - as above

        if self._runner is None:
            raise RuntimeError("the emulator is not running: enter it first")
        parameters: SessionOptions = {
            "api_key": self.api_key,
            "base_url": self.url,
            "schedule": FixedSchedule(_POLL_INTERVAL),
            "max_polls_per_second": None,
        }
        parameters.update(options)
        return FluxSession(**parameters)

    def script(self, endpoint: Endpoint, *faults: Fault | str | None) -> None:
        """Queue faults for the next calls to an endpoint, one fault per call.

        Args:
            endpoint: "submit", "poll" or "download".
            faults: None lets a call succeed. A trait is given to the task that the submit creates, or to the task that
                is polled. Downloads can meet errors and faults of connections; their other faults are traits of tasks.

        Raises:
            ValueError: There is no such endpoint, or no such fault of it.
        """
        self._service.script(endpoint, faults)

    # ------------------------------------------------------------------ lifetime

    async def __aenter__(self) -> Self:
        app = web.Application(client_max_size=_MAX_BODY_BYTES)
        app.router.add_post("/model/v1/generation", self._submit)
        app.router.add_get("/model/v1/generation/task/{id}", self._poll)
        app.router.add_get("/results/{id}", self._download)
        app.router.add_get("/signed/{id}/{name:.*}", self._download)
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
        async def handle(fault: Fault | None) -> web.StreamResponse:
            try:
                body = await request.json()
            except ValueError as error:
                raise ServiceError(400, "invalid_json", "the body is not valid JSON") from error
            model = request.headers.get("X-Model")
            if (request.content_length or 0) > _MAX_INLINE_BODY_BYTES:
                parsed = await anyio.to_thread.run_sync(parse_submit, body, model)
            else:
                parsed = parse_submit(body, model)
            trait = fault if fault in TRAITS else None
            task = self._service.accept(parsed, now=_now(), epoch=time.time(), trait=trait)
            self._webhook_sender.schedule(task)
            return self._json(await self._results.describe(task, _now()), fault)

        return await self._respond(request, "submit", handle)

    async def _poll(self, request: web.Request) -> web.StreamResponse:
        async def handle(fault: Fault | None) -> web.StreamResponse:
            now = _now()
            task = self._service.find(request.match_info["id"], now)
            task.polls += 1
            if fault is not None and fault in TRAITS:
                self._service.give_trait(task, fault)
            return self._json(await self._results.describe(task, now), fault)

        return await self._respond(request, "poll", handle)

    async def _download(self, request: web.Request) -> web.StreamResponse:
        async def handle(_: Fault | None) -> web.StreamResponse:
            return await self._results.download(request)

        return await self._respond(request, "download", handle)

    async def _respond(self, request: web.Request, endpoint: Endpoint, handler: Handler) -> web.StreamResponse:
        """Run the handler of a call and return its response, except for what the fault that the call meets changes."""
        fault = self._service.next_fault(endpoint)
        if fault is Fault.RESET_BEFORE:
            return reset(request)
        try:
            self._check_key(request, endpoint)
            if fault is not None and fault in ERRORS:
                return build_response(ERRORS[fault], self._service.time_scale)
            response = await handler(fault)
        except ServiceError as error:
            return error_response(error)
        match fault:
            case Fault.RESET_AFTER:
                return reset(request)
            case Fault.HANG:
                await self._closing.wait()
                return reset(request)
            case Fault.CUT:
                return await send_half(request, response)
            case Fault.GARBAGE:
                return build_response(GARBAGE, self._service.time_scale)
            case Fault.HUGE_HEADERS:
                response.headers["X-Debug"] = "x" * _HUGE_HEADER_BYTES
                return response
            case _:
                return response

    def _check_key(self, request: web.Request, endpoint: Endpoint) -> None:
        key = request.headers.get("Authorization")
        if endpoint == "download":
            if key is not None:
                raise ServiceError(400, "key_leaked", "the API key must not be sent to result URLs")
        elif key != f"Bearer {self.api_key}":
            raise ServiceError(401, "unauthorized", "the API key is missing or wrong")

    def _json(self, task: dict[str, Any], fault: Fault | None) -> web.Response:
        """Return the response to a call that has taken effect."""
        answer = _USUAL_RESPONSE if fault is None else RESPONSES.get(fault, _USUAL_RESPONSE)
        return build_response(answer, self._service.time_scale, {"task": task, "id": task["id"]})


def _now() -> float:
    return asyncio.get_running_loop().time()
