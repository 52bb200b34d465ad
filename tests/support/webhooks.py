"""Webhooks for tests: a server with an inbox, and signed deliveries."""

import hashlib
import hmac
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import attrs
from aiohttp import web

from flux2max_async import FixedSchedule, FluxSession, WebhookInbox
from flux2max_async.emulator import Emulator
from support.scripted import ScriptedGateway

SECRET = "an old lighthouse keeper's secret"


@attrs.define
class InboxServer:
    """A server that passes deliveries to an inbox."""

    inbox: WebhookInbox
    open: bool = True
    """If False, the server answers 502, like a reverse proxy whose upstream server is down."""

    async def handle(self, request: web.Request) -> web.Response:
        return await self.inbox.aiohttp_handler(request) if self.open else web.Response(status=502)


@asynccontextmanager
async def running_inbox_server(**settings: Any) -> AsyncIterator[InboxServer]:
    """Run a server with an inbox on 127.0.0.1."""
    servers: list[InboxServer] = []

    async def handle(request: web.Request) -> web.Response:
        return await servers[0].handle(request)

    app = web.Application()
    app.router.add_post("/hooks", handle)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0, backlog=1024).start()
        url = f"http://127.0.0.1:{runner.addresses[0][1]}/hooks"
        servers.append(InboxServer(WebhookInbox(**{"secret": SECRET, "public_url": url, **settings})))
        yield servers[0]
    finally:
        await runner.cleanup()


def sign(payload: object, secret: str = SECRET) -> tuple[bytes, dict[str, str]]:
    """Return the body and headers of a delivery."""
    body = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
    signature = hmac.new(secret.encode(), body, hashlib.sha256).hexdigest()
    return body, {"X-BFL-Signature": f"sha256={signature}"}


RARE_POLLS = FixedSchedule(1000.0)
"""For tests in which webhooks must be faster than polls."""


def session_on(gateway: Emulator | ScriptedGateway, inbox: WebhookInbox, **settings: Any) -> FluxSession:
    """Create a session with an inbox, which polls rarely by default."""
    settings = {"schedule": RARE_POLLS, "task_timeout": 100_000.0, **settings}
    return FluxSession(gateway.api_key, base_url=gateway.url, webhooks=inbox, **settings)


async def deliver(inbox: WebhookInbox, payload: object, *, url: str | None = None) -> None:
    """Deliver a payload with a valid signature."""
    await inbox.deliver(*sign(payload), url=url)
