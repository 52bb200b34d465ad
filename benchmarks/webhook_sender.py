"""Posts webhooks for the benchmark gateway: signed, each over a new connection, and never repeated if one fails.

The prompt of a submit says how many deliveries are posted and after what delay.
"""

import asyncio
import hashlib
import hmac
import json
import re
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

MAX_CONNECTIONS = 100
"""Concurrent deliveries; further ones wait."""


def delivery_instruction(count: int, delay: float = 0.0) -> str:
    """Return the part of a prompt that requests `count` deliveries, the first one `delay` seconds after the end."""
    return f", delivered {count} times after {delay:.3f} s"


def sign(content: dict[str, Any], secret: str) -> tuple[bytes, str]:
    """Return the body of a delivery and its signature."""
    body = json.dumps(content).encode()
    return body, f"sha256={hmac.new(secret.encode(), body, hashlib.sha256).hexdigest()}"


@dataclass(slots=True)
class Webhook:
    """The webhook that a submit requested."""

    url: str
    secret: str
    count: int
    """How many times the end is delivered."""
    delay: float
    """Seconds from the end of the task to the first delivery."""


def webhook_of(submit: bytes) -> Webhook | None:
    """Return the webhook that a submit requests."""
    if b'"webhook_url"' not in submit:
        return None
    params = json.loads(submit)["input"][0]["params"]
    match = re.search(r"delivered (\d+) times after ([\d.]+) s", params["prompt"])
    count, delay = (1, 0.0) if match is None else (int(match[1]), float(match[2]))
    return Webhook(params["webhook_url"], params["webhook_secret"], count, delay)


class WebhookSender:
    """Delivers the ends of tasks."""

    def __init__(self) -> None:
        self.statuses: Counter[str] = Counter()
        """The number of deliveries by HTTP status; "none" if there was no response."""
        self._connections = asyncio.Semaphore(MAX_CONNECTIONS)
        self._deliveries: set[asyncio.Task[None]] = set()

    def deliver(self, webhook: Webhook, describe: Callable[[], dict[str, Any]]) -> None:
        """Start to deliver the task that `describe` returns."""
        delivery = asyncio.get_running_loop().create_task(self._deliver(webhook, describe))
        self._deliveries.add(delivery)
        delivery.add_done_callback(self._deliveries.discard)

    async def _deliver(self, webhook: Webhook, describe: Callable[[], dict[str, Any]]) -> None:
        request = b""
        for _ in range(webhook.count):
            async with self._connections:
                # Built when the first delivery starts (`sent_at`); repeated deliveries are identical.
                request = request or _http_request(webhook, describe() | {"metadata": {"sent_at": time.monotonic()}})
                self.statuses[await _post(webhook.url, request)] += 1


def _http_request(webhook: Webhook, content: dict[str, Any]) -> bytes:
    body, signature = sign(content, webhook.secret)
    url = urlsplit(webhook.url)
    head = (
        f"POST {url.path} HTTP/1.1\r\nHost: {url.netloc}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\nX-BFL-Signature: {signature}\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + body


async def _post(url: str, request: bytes) -> str:
    """Send the request and return the status of the response."""
    parts = urlsplit(url)
    try:
        reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
        try:
            writer.write(request)
            response = await reader.read()
        finally:
            writer.close()
    except OSError:
        return "none"
    return response[9:12].decode() or "none"
