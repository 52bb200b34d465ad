"""Webhooks for tests: a server for an inbox, and deliveries signed by hand."""

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
    """Where an inbox is reached."""

    inbox: WebhookInbox
    open: bool = True
    """False answers 502, as a proxy does while the server behind it is away."""

    async def handle(self, request: web.Request) -> web.Response:
        return await self.inbox.aiohttp_handler(request) if self.open else web.Response(status=502)


@asynccontextmanager
async def door(**settings: Any) -> AsyncIterator[InboxServer]:
    """Serve an inbox on 127.0.0.1."""
    found: list[InboxServer] = []

    async def handle(request: web.Request) -> web.Response:
        return await found[0].handle(request)

    app = web.Application()
    app.router.add_post("/hooks", handle)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0, backlog=1024).start()
        url = f"http://127.0.0.1:{runner.addresses[0][1]}/hooks"
        found.append(InboxServer(WebhookInbox(**{"secret": SECRET, "public_url": url, **settings})))
        yield found[0]
    finally:
        await runner.cleanup()


def signed(body: object, secret: str = SECRET) -> tuple[bytes, dict[str, str]]:
    """Give the body and headers of a delivery."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    signature = hmac.new(secret.encode(), content, hashlib.sha256).hexdigest()
    return content, {"X-BFL-Signature": f"sha256={signature}"}


SELDOM = FixedSchedule(1000.0)
"""For tests in which webhooks are to be faster than polls."""


def session_on(gateway: Emulator | ScriptedGateway, inbox: WebhookInbox, **settings: Any) -> FluxSession:
    """Make a session with an inbox, which hardly ever polls."""
    settings = {"schedule": SELDOM, "task_timeout": 100_000.0, **settings}
    return FluxSession(gateway.api_key, base_url=gateway.url, webhooks=inbox, **settings)


async def deliver(inbox: WebhookInbox, told: object) -> None:
    """Deliver what the service says."""
    await inbox.deliver(*signed(told))
