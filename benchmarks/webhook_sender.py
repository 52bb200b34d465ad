"""Posts webhooks for the lean gateway: signed, each over a connection of its own, and never again if one fails.

How often and how late stands in the prompt, as how long the task takes does: whoever measures decides.
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

LINES = 100
"""Deliveries on the wire at once; further ones wait."""


def told(times: int, late: float = 0.0) -> str:
    """Ask, in a prompt, for so many deliveries, the first one so many seconds after the end."""
    return f", told {times} times after {late:.3f} s"


def signed(content: dict[str, Any], secret: str) -> tuple[bytes, str]:
    """Write a delivery down; gives its body and its signature."""
    body = json.dumps(content).encode()
    return body, f"sha256={hmac.new(secret.encode(), body, hashlib.sha256).hexdigest()}"


@dataclass(slots=True)
class Hook:
    """What a submit has asked for."""

    url: str
    secret: str
    times: int
    late: float


def hook_in(body: bytes) -> Hook | None:
    """Read from a submit where its end is to be told; None where nowhere."""
    if b'"webhook_url"' not in body:
        return None
    params = json.loads(body)["input"][0]["params"]
    asked = re.search(r"told (\d+) times after ([\d.]+) s", params["prompt"])
    times, late = (1, 0.0) if asked is None else (int(asked[1]), float(asked[2]))
    return Hook(params["webhook_url"], params["webhook_secret"], times, late)


class Postman:
    """Delivers what has ended."""

    def __init__(self) -> None:
        self.answers: Counter[str] = Counter()
        """How many deliveries met which status; "none" where nobody answered."""
        self._lines = asyncio.Semaphore(LINES)
        self._errands: set[asyncio.Task[None]] = set()

    def deliver(self, hook: Hook, describe: Callable[[], dict[str, Any]]) -> None:
        """Deliver from now on; `describe` gives the finished task."""
        errand = asyncio.get_running_loop().create_task(self._deliver(hook, describe))
        self._errands.add(errand)
        errand.add_done_callback(self._errands.discard)

    async def _deliver(self, hook: Hook, describe: Callable[[], dict[str, Any]]) -> None:
        letter = b""
        for _ in range(hook.times):
            async with self._lines:
                # Its own moment stands in it; what comes twice comes with the same bytes.
                letter = letter or _letter(hook, describe() | {"metadata": {"sent_at": time.monotonic()}})
                self.answers[await _post(hook.url, letter)] += 1


def _letter(hook: Hook, content: dict[str, Any]) -> bytes:
    body, signature = signed(content, hook.secret)
    where = urlsplit(hook.url)
    head = (
        f"POST {where.path} HTTP/1.1\r\nHost: {where.netloc}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\nX-BFL-Signature: {signature}\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + body


async def _post(url: str, letter: bytes) -> str:
    """Give the status of the answer."""
    where = urlsplit(url)
    try:
        reader, writer = await asyncio.open_connection(where.hostname, where.port)
        try:
            writer.write(letter)
            answer = await reader.read()
        finally:
            writer.close()
    except OSError:
        return "none"
    return answer[9:12].decode() or "none"
