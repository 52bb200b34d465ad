"""The parts of a session: made from its arguments, opened, and closed."""

from functools import partial
from typing import Any

import aiohttp

from flux2max_async._api.client import ApiClient
from flux2max_async._api.transport import Transport
from flux2max_async._budget import Budget
from flux2max_async._config import SessionConfig
from flux2max_async._exceptions import ConfigurationError
from flux2max_async._polling.context import PollingContext
from flux2max_async._polling.schedules import PollSchedule
from flux2max_async._shutdown import Shutdown
from flux2max_async._stats import SessionStats
from flux2max_async._tasks.supervisor import Supervisor
from flux2max_async.journal._protocol import Journal
from flux2max_async.journal._record_factory import RecordFactory
from flux2max_async.webhooks._dispatcher import WebhookDispatcher
from flux2max_async.webhooks._inbox import WebhookInbox
from flux2max_async.webhooks._registry import WebhookRegistry


def set_up(
    http_session: aiohttp.ClientSession | None, journal: Journal | None, webhooks: WebhookInbox | None, **settings: Any
) -> tuple[SessionConfig, Transport, RecordFactory, WebhookDispatcher | None]:
    """Return the settings, the transport, the records, and the dispatcher of webhooks, if there are any.

    Args:
        http_session: A borrowed aiohttp session.
        journal: The session's journal.
        webhooks: The session's inbox.
        **settings: The fields of SessionConfig.

    Raises:
        ConfigurationError: A setting is missing or wrong.
    """
    config = SessionConfig(**settings, has_journal=journal is not None)
    if webhooks is not None and not isinstance(webhooks, WebhookInbox):
        raise ConfigurationError(f"webhooks must be a WebhookInbox, not {type(webhooks).__name__}")
    dispatcher = webhooks.dispatcher if webhooks else None
    transport = Transport(
        config.api_key,
        config.base_url,
        timeout=config.http_timeout,
        http=http_session,
        proxy=config.proxy,
        trust_env=config.trust_env,
        ssl_context=config.ssl_context,
        secrets=dispatcher.secrets if dispatcher else (),
        allow_private_downloads=config.allow_private_downloads,
    )
    records = RecordFactory(journal, Budget(config.budget, config.price_guess), config, secrets=transport.secrets)
    return config, transport, records, dispatcher


async def open_session(
    config: SessionConfig,
    transport: Transport,
    stats: SessionStats,
    schedule: PollSchedule,
    records: RecordFactory,
    journal: Journal | None,
    dispatcher: WebhookDispatcher | None,
) -> Supervisor:
    """Open the parts of a session; return its supervisor. Nothing is left open if one of them can't be opened."""
    shutdown = Shutdown()
    client = ApiClient(transport, stats, config)
    registry = dispatcher.registry if dispatcher else WebhookRegistry()
    registry.in_use = dispatcher is not None or journal is not None
    supervisor = Supervisor(
        PollingContext(client, schedule, registry, shutdown, config.task_timeout),
        stats,
        records,
        max_in_flight=config.max_in_flight,
        add_webhook=dispatcher.add_webhook if dispatcher else None,
    )
    if dispatcher is not None:
        spawn = partial(supervisor.spawn, until_drain=True)
        dispatcher.open(shutdown, journal, secrets=transport.secrets, spawn=spawn)
    transport.open(config.max_in_flight)
    try:
        if journal is not None:
            await journal.open(supervisor.on_external_change, watch_changes=dispatcher is not None)
    except BaseException:
        if dispatcher is not None:
            dispatcher.close()
        await transport.close()
        raise
    stats.in_flight = stats.submitting = 0
    return supervisor


async def close_session(
    supervisor: Supervisor, transport: Transport, journal: Journal | None, dispatcher: WebhookDispatcher | None
) -> None:
    """Drain and close the parts of a session, each of them also if another one fails."""
    try:
        await supervisor.drain()
        await supervisor.close()
    finally:
        supervisor.close_now()  # if closing is cut short, as by a second Ctrl-C, the ids are logged all the same
        if dispatcher is not None:
            dispatcher.close()
        try:
            if journal is not None:
                await journal.close()
        finally:
            await transport.close()
