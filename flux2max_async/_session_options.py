"""The parameters of FluxSession as a type, for functions that pass them on."""

import signal
import ssl
from collections.abc import Collection, Mapping
from decimal import Decimal
from typing import Literal, TypedDict

import aiohttp

from flux2max_async._config import ApiKey
from flux2max_async._in_flight_limit import InFlightLimit
from flux2max_async._polling.schedules import PollSchedule
from flux2max_async.journal._protocol import Journal
from flux2max_async.webhooks._inbox import WebhookInbox


class SessionOptions(TypedDict, total=False):
    """Every parameter of FluxSession, which describes them: `def connect(**options: Unpack[SessionOptions])`."""

    api_key: ApiKey | None
    base_url: str | None
    max_in_flight: int | InFlightLimit
    schedule: PollSchedule | None
    task_timeout: float | None
    max_polls_per_second: float | Literal["auto"] | None
    http_timeout: float
    http_session: aiohttp.ClientSession | None
    headers: Mapping[str, str] | None
    proxy: str | None
    trust_env: bool
    ssl_context: ssl.SSLContext | None
    allow_plain_http: bool
    webhooks: WebhookInbox | None
    drain: float
    journal: Journal | None
    budget: Decimal | float | str | None
    price_guess: Decimal | float | str | None
    budget_scope: Literal["session", "journal"] | None
    max_uncertain: int | None
    allow_private_downloads: bool
    content_keys: bool
    drain_signals: Collection[signal.Signals]
    max_waiting: int | None
    max_per_group: int | None
