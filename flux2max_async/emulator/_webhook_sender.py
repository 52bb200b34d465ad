"""Posts finished tasks to the webhook URLs of their submits: signed, with retries, and as unreliably as configured."""

import asyncio
import hashlib
import hmac
import json
import random
from datetime import UTC, datetime
from typing import Any, Literal, Protocol

import aiohttp
import anyio
import attrs
from attrs import validators

from flux2max_async.emulator._service import EmulatedTask, Service

# The model's maker waits this many seconds for a 2xx [B].
_RESPONSE_TIMEOUT = 30.0
# Seconds from a successful delivery to its duplicate.
_DUPLICATE_DELAY = 1.0

_NOT_NEGATIVE = validators.ge(0.0)
_SHARE = validators.and_(_NOT_NEGATIVE, validators.le(1.0))


@attrs.frozen(kw_only=True)
class Webhooks:
    """How the service posts finished tasks. All seconds are the service's own, which `time_scale` divides.

    Raises:
        ValueError: A value is invalid; the message names it.
    """

    shape: Literal["task", "maker"] = attrs.field(default="task", validator=validators.in_(("task", "maker")))
    """The body: the task object that polls return, or the body that the model's maker posts."""
    delay: float = attrs.field(default=0.0, validator=_NOT_NEGATIVE)
    """Seconds from the end of a task to the first attempt."""
    dropped: float = attrs.field(default=0.0, validator=_SHARE)
    """Share of tasks that are never posted."""
    doubled: float = attrs.field(default=0.0, validator=_SHARE)
    """Share of tasks that are posted again one second after their successful delivery."""
    forged: float = attrs.field(default=0.0, validator=_SHARE)
    """Share of the tasks with a secret whose delivery is preceded by a forged one, which has a wrong signature and
    reports a completed task as failed, or a failed task as completed."""
    # X-BFL-Signature is the maker's header [B]; gateways use names of their own.
    header: str = "X-BFL-Signature"
    """The header that holds the signature."""
    # These are the maker's delays [B].
    retries: tuple[float, ...] = attrs.field(
        default=(1.0, 5.0, 30.0), validator=validators.deep_iterable(_NOT_NEGATIVE)
    )
    """Seconds before each retry of an attempt that was not answered with a 2xx within 30 s."""


@attrs.frozen
class Delivery:
    """An attempt to post a finished task."""

    task_id: str
    attempt: int
    """Counts from 1, duplicates included; 0 for a forged delivery."""
    forged: bool
    status: int | None
    """The HTTP status of the response; None if there was no response."""
    sent_at: float
    """When the attempt began, on the event loop's clock."""
    body: bytes


@attrs.frozen
class _Message:
    task_id: str
    body: bytes
    headers: dict[str, str]


class _Describe(Protocol):
    async def __call__(self, task: EmulatedTask, now: float, *, maker: bool) -> dict[str, Any]: ...


class WebhookSender:
    """Waits for the end of each task that has a webhook URL, and posts the task.

    Args:
        webhooks: The settings.
        service: The service that owns the tasks.
        describe: Returns the task object of a task as of a time; with `maker`, in the format of the model's maker.
    """

    def __init__(self, webhooks: Webhooks, service: Service, describe: _Describe) -> None:
        self._webhooks = webhooks
        self._service = service
        self._describe = describe
        self.deliveries: list[Delivery] = []
        self._running: set[asyncio.Task[None]] = set()
        self._http: aiohttp.ClientSession | None = None

    def schedule(self, task: EmulatedTask) -> None:
        """Start the background task that posts a task when it has ended, if it has a webhook URL."""
        # Derived from the id, so that with a seed each task is treated the same in every run.
        rng = random.Random(task.id)
        shares = (self._webhooks.dropped, self._webhooks.doubled, self._webhooks.forged)
        dropped, doubled, forged = (rng.random() < share for share in shares)
        if task.webhook_url is not None and not dropped:
            delivery = asyncio.create_task(self._deliver(task, task.webhook_url, doubled=doubled, forged=forged))
            self._running.add(delivery)
            delivery.add_done_callback(self._running.discard)

    async def close(self) -> None:
        """Cancel all deliveries."""
        for delivery in self._running:
            delivery.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)
        if self._http is not None:
            await self._http.close()
            self._http = None

    async def _deliver(self, task: EmulatedTask, url: str, *, doubled: bool, forged: bool) -> None:
        await anyio.sleep_until(task.ends)
        await self._sleep(self._webhooks.delay)
        if forged and task.webhook_secret:
            await self._post(url, await self._build_forged_message(task), attempt=0)
        message = await self._build_message(task)
        for attempt, delay in enumerate((0.0, *self._webhooks.retries), 1):
            await self._sleep(delay)
            if await self._post(url, message, attempt):
                if doubled:
                    await self._sleep(_DUPLICATE_DELAY)
                    await self._post(url, message, attempt + 1)
                break

    async def _sleep(self, seconds: float) -> None:
        await anyio.sleep(seconds / self._service.time_scale)

    async def _build_message(self, task: EmulatedTask) -> _Message:
        now = max(anyio.current_time(), task.ends)  # timers may fire slightly early
        if self._webhooks.shape == "maker":
            content = await self._describe(task, now, maker=True)
            content["timestamp"] = datetime.now(UTC).isoformat()
        else:
            content = await self._describe(task, now, maker=False)
        body = json.dumps(content).encode()
        headers = {"Content-Type": "application/json"}
        if task.webhook_secret:
            headers[self._webhooks.header] = _compute_signature(body, task.webhook_secret)
        return _Message(task.id, body, headers)

    async def _build_forged_message(self, task: EmulatedTask) -> _Message:
        return await self._build_message(
            attrs.evolve(
                task,
                fate="failed" if task.fate == "completed" else "completed",
                webhook_secret=f"not {task.webhook_secret}",
            )
        )

    async def _post(self, url: str, message: _Message, attempt: int) -> bool:
        """Make an attempt, and return whether it was answered with a 2xx."""
        if self._http is None:
            # Each attempt opens a connection: the receiver may close an idle one at the moment of the POST.
            connector = aiohttp.TCPConnector(limit=0, force_close=True)
            self._http = aiohttp.ClientSession(connector=connector, cookie_jar=aiohttp.DummyCookieJar())
        self._service.calls["webhook"] += 1
        status, sent_at = None, anyio.current_time()
        try:
            # aiohttp rounds its own timeouts up to whole seconds.
            async with (
                asyncio.timeout(_RESPONSE_TIMEOUT / self._service.time_scale),
                self._http.post(
                    url,
                    data=message.body,
                    headers=message.headers,
                    allow_redirects=False,
                    timeout=aiohttp.ClientTimeout(total=None),
                ) as response,
            ):
                status = response.status
        except (aiohttp.ClientError, OSError, ValueError):
            pass  # an invalid URL, no connection or no response
        finally:
            self.deliveries.append(Delivery(message.task_id, attempt, attempt == 0, status, sent_at, message.body))
        return status is not None and 200 <= status < 300


def _compute_signature(body: bytes, secret: str) -> str:
    """Return the value of the signature header, as the model's maker computes it [B]."""
    # JSON strings may hold surrogates, which UTF-8 cannot encode.
    return f"sha256={hmac.new(secret.encode('utf-8', 'surrogatepass'), body, hashlib.sha256).hexdigest()}"
