"""Posts finished tasks to where their submits asked for: signed, repeated, and as unreliably as a test wants it."""

import asyncio
import hashlib
import hmac
import json
import random
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, Literal

import aiohttp
import anyio
import attrs
from attrs import validators

from flux2max_async.emulator._service import EmulatedTask, Service

# Seconds that the maker's sender waits for a 2xx [B].
_PATIENCE = 30.0
# Seconds from an arrival to its double.
_MOMENT = 1.0

_NOT_NEGATIVE = validators.ge(0.0)
_SHARE = validators.and_(_NOT_NEGATIVE, validators.le(1.0))


@attrs.frozen(kw_only=True)
class Webhooks:
    """How the service posts finished tasks. All seconds are the service's own, which `time_scale` divides.

    Raises:
        ValueError: A value can't be; the message names it.
    """

    shape: Literal["task", "maker"] = attrs.field(default="task", validator=validators.in_(("task", "maker")))
    """What is posted: the task object that a poll shows, or what the model's maker posts."""
    delay: float = attrs.field(default=0.0, validator=_NOT_NEGATIVE)
    """Seconds from a task's end to the first attempt."""
    dropped: float = attrs.field(default=0.0, validator=_SHARE)
    """The share of tasks that are never posted."""
    doubled: float = attrs.field(default=0.0, validator=_SHARE)
    """The share of tasks that are posted once more a second after they have arrived."""
    forged: float = attrs.field(default=0.0, validator=_SHARE)
    """The share of tasks, of those with a secret, before whose delivery comes one that is signed with another secret
    and tells the contrary of what is true."""
    # X-BFL-Signature is the maker's [B]; gateways have names of their own.
    header: str = "X-BFL-Signature"
    """The header that holds the signature."""
    # The waits are the maker's [B].
    retries: tuple[float, ...] = attrs.field(
        default=(1.0, 5.0, 30.0), validator=validators.deep_iterable(_NOT_NEGATIVE)
    )
    """Seconds to wait before each further attempt, where one wasn't answered with a 2xx within 30 s."""


@attrs.frozen
class Delivery:
    """One attempt to post a finished task."""

    task_id: str
    attempt: int
    """Counts from 1; a doubled delivery counts on, a forged one is 0."""
    forged: bool
    status: int | None
    """What the receiver answered; None where no answer came."""
    sent_at: float
    """The moment on the event loop's clock at which the attempt began."""
    body: bytes


class WebhookSender:
    """Waits for the end of each task that asks for a webhook, and posts it.

    Args:
        webhooks: How.
        service: What knows the tasks.
        link: Gives the url of a task's result, as of a moment.
    """

    def __init__(self, webhooks: Webhooks, service: Service, link: Callable[[EmulatedTask, float], str]) -> None:
        self._how = webhooks
        self._service = service
        self._link = link
        self.deliveries: list[Delivery] = []
        self._errands: set[asyncio.Task[None]] = set()
        self._http: aiohttp.ClientSession | None = None

    def expect(self, task: EmulatedTask) -> None:
        """Post a task when it has ended, if its submit asked for that."""
        # Ids come from the seed: the same task meets the same luck, whatever else goes on and comes first.
        luck = random.Random(task.id)
        shares = (self._how.dropped, self._how.doubled, self._how.forged)
        dropped, doubled, forged = (luck.random() < share for share in shares)
        if task.webhook_url is not None and not dropped:
            errand = asyncio.create_task(self._deliver(task, task.webhook_url, doubled=doubled, forged=forged))
            self._errands.add(errand)
            errand.add_done_callback(self._errands.discard)

    async def close(self) -> None:
        """Leave everything that isn't delivered undelivered."""
        for errand in self._errands:
            errand.cancel()
        await asyncio.gather(*self._errands, return_exceptions=True)
        if self._http is not None:
            await self._http.close()
            self._http = None

    async def _deliver(self, task: EmulatedTask, url: str, *, doubled: bool, forged: bool) -> None:
        await anyio.sleep_until(task.ends)
        await self._pause(self._how.delay)
        if forged and task.webhook_secret:
            await self._post(url, self._forge(task), attempt=0)
        letter = self._write(task)
        for attempt, wait in enumerate((0.0, *self._how.retries), 1):
            await self._pause(wait)
            if await self._post(url, letter, attempt):
                if doubled:
                    await self._pause(_MOMENT)
                    await self._post(url, letter, attempt + 1)
                break

    async def _pause(self, seconds: float) -> None:
        await anyio.sleep(seconds / self._service.time_scale)

    def _write(self, task: EmulatedTask) -> "_Letter":
        """Tell of a task's end; every attempt brings the same bytes."""
        now = max(anyio.current_time(), task.ends)  # a timer may go off a little early
        url = self._link(task, now)
        content = self._service.describe(task, url, now)
        if self._how.shape == "maker":
            content = _as_the_maker_tells(task, content, url)
        body = json.dumps(content).encode()
        headers = {"Content-Type": "application/json"}
        if task.webhook_secret:
            headers[self._how.header] = _signature(body, task.webhook_secret)
        return _Letter(task.id, body, headers)

    def _forge(self, task: EmulatedTask) -> "_Letter":
        """Tell what isn't true, as one who doesn't know the secret."""
        return self._write(
            attrs.evolve(
                task,
                fate="failed" if task.fate == "completed" else "completed",
                webhook_secret=f"not {task.webhook_secret}",
            )
        )

    async def _post(self, url: str, letter: "_Letter", attempt: int) -> bool:
        """Make one attempt, and tell whether it arrived."""
        if self._http is None:
            # A connection for each attempt: on one that is kept, a POST may meet the receiver's closing it.
            connector = aiohttp.TCPConnector(limit=0, force_close=True)
            self._http = aiohttp.ClientSession(connector=connector, cookie_jar=aiohttp.DummyCookieJar())
        self._service.calls["webhook"] += 1
        status, sent_at = None, anyio.current_time()
        try:
            # aiohttp's own limits are rounded up to whole seconds.
            async with (
                asyncio.timeout(_PATIENCE / self._service.time_scale),
                self._http.post(
                    url,
                    data=letter.body,
                    headers=letter.headers,
                    allow_redirects=False,
                    timeout=aiohttp.ClientTimeout(total=None),
                ) as response,
            ):
                status = response.status
        except (aiohttp.ClientError, OSError, ValueError):
            pass  # nobody is there, or what is there doesn't answer
        finally:
            self.deliveries.append(Delivery(letter.task_id, attempt, attempt == 0, status, sent_at, letter.body))
        return status is not None and 200 <= status < 300


@attrs.frozen
class _Letter:
    task_id: str
    body: bytes
    headers: dict[str, str]


def _as_the_maker_tells(task: EmulatedTask, content: dict[str, Any], url: str) -> dict[str, Any]:
    """Give what the model's maker posts of a task that has ended [B]."""
    match content:
        case {"error": {"code": code, "message": message}}:
            end = {"status": "Error", "error": code, "message": message}
        case _:
            end = {"status": "Ready", "result": {"sample": url, "prompt": task.prompt, "seed": task.seed}}
    return {"id": task.id, **end, "timestamp": datetime.now(UTC).isoformat()}


def _signature(body: bytes, secret: str) -> str:
    """Sign a body as the model's maker does [B]."""
    # What JSON can hold and UTF-8 can't is no reason to post nothing.
    return f"sha256={hmac.new(secret.encode('utf-8', 'surrogatepass'), body, hashlib.sha256).hexdigest()}"
