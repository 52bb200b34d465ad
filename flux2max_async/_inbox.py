"""The inbox: takes in webhooks, whichever server has received them, and brings each to who follows its task."""

import asyncio
import logging
from collections.abc import Callable, Coroutine, Iterable, Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import attrs

from flux2max_async._delivery import MAX_AGE, SIGNATURE_HEADER, read_delivery, verify
from flux2max_async._entry import EntryState, Holder, JournalEntry
from flux2max_async._errors import (
    ConfigurationError,
    InvalidRequestError,
    JournalError,
    ProtocolError,
    SessionClosedError,
)
from flux2max_async._hooks import AsgiApp, aiohttp_answer
from flux2max_async._mail import Mail
from flux2max_async._page import ended
from flux2max_async._request import GenerationRequest
from flux2max_async._settings import checked_seconds
from flux2max_async._task import Completed, Failed, Outcome, TaskSnapshot
from flux2max_async.journal import Journal

if TYPE_CHECKING:
    from aiohttp import web

log = logging.getLogger("flux2max_async")

_AGAIN = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 15.0, 30.0)
"""Seconds between looks for the task of an early delivery in a journal that others write, too."""


@attrs.frozen
class _Office:
    """What an inbox works with while its session is open."""

    journal: Journal | None
    secrets: tuple[str, ...] = attrs.field(repr=False)
    spawn: Callable[[Coroutine[Any, Any, None]], object]


class WebhookInbox:
    """Takes in the service's webhooks for a session, so that ends are known without polling.

        inbox = WebhookInbox(secret=os.environ["WEBHOOK_SECRET"], public_url="https://app.example/hooks/flux")
        app.router.add_post("/hooks/flux", inbox.aiohttp_handler)   # aiohttp.web
        app.mount("/hooks", inbox.asgi)                             # FastAPI, Starlette: above the path, not at it
        async with FluxSession(webhooks=inbox) as session: ...

    The session asks for a webhook with each submit whose request names none of its own. A delivery whose signature is
    right ends its task at once; polls cover what is lost or late, and become the rarer the more webhooks arrive first.
    The server must run in the session's event loop.

    With several server processes behind one address, a delivery can reach one that doesn't follow the task. Where they
    share a journal, it records the end there, and the task's own process notices within a second. Without one, the
    task is polled as if its webhook was lost.

    Args:
        secret: What the service signs deliveries with: at least 32 random characters do well. Several while an old one
            is being replaced: all are valid, and new submits name the first.
        public_url: Where the service reaches this inbox; http(s), at most 2083 characters.
        header: Which header holds the signature.
        max_age: Seconds after which a delivery that tells when it was sent counts as a replayed one; None for any.

    Raises:
        ConfigurationError: The secret is empty, or the address is none that a request could name.
    """

    def __init__(
        self,
        *,
        secret: str | Iterable[str],
        public_url: str,
        header: str = SIGNATURE_HEADER,
        max_age: float | None = MAX_AGE,
    ) -> None:
        self.secrets: tuple[str, ...] = (secret,) if isinstance(secret, str) else tuple(secret)
        if not self.secrets or not all(isinstance(one, str) and one for one in self.secrets):
            raise ConfigurationError("secret must be text that is not empty, or several such texts")
        try:
            GenerationRequest("-", webhook_url=public_url)
        except InvalidRequestError as error:
            raise ConfigurationError(error.message.replace("webhook_url", "public_url")) from error
        self.public_url: str = public_url
        self.asgi: AsgiApp = AsgiApp(self.deliver)
        """An ASGI application that answers on any path.

        Mount it above the path of `public_url`: at the very path of a mount, Starlette redirects to one with a slash.
        """
        self.mail: Mail = Mail()
        """Who waits for what; the session's."""
        self._header = header
        self._max_age = None if max_age is None else checked_seconds("max_age", max_age)
        self._office: _Office | None = None

    def __repr__(self) -> str:
        return f"WebhookInbox(public_url={self.public_url!r})"

    async def aiohttp_handler(self, request: "web.Request") -> "web.Response":
        """Answer the service, as a handler of aiohttp.web: `app.router.add_post(path, inbox.aiohttp_handler)`."""
        return await aiohttp_answer(self.deliver, request)

    async def deliver(self, body: bytes, headers: Mapping[str, str]) -> None:
        """Take in one delivery, for servers of other kinds; returns when it needn't come again.

        With a journal, what it says is recorded then. What is delivered twice, or about a task that has ended, does no
        harm; what nobody waits for is kept for a while, because it may be faster than the answer to its submit.

        Args:
            body: As it came, byte by byte.
            headers: Of the delivery.

        Raises:
            WebhookSignatureError: It isn't the service's; answer 401.
            ProtocolError: It can't be read; answer 400.
            SessionClosedError: No session is open; answer 503, and the service will try again.
            JournalError: The end can't be recorded; answer 503, too.
        """
        verify(body, headers, self.secrets, header=self._header, max_age=self._max_age)
        office = self._office
        if office is None:
            raise SessionClosedError("no session is open for this delivery")
        try:
            snapshot = read_delivery(body, office.secrets)
        except ProtocolError as error:
            for listener in self.mail.listeners(error.task_id or ""):
                listener.hear(None)
            raise
        if not self.tell(snapshot) or not snapshot.status.ended:
            await self._find_owner(office, snapshot, len(body))
        elif office.journal is not None:
            for listener in self.mail.listeners(snapshot.task_id):
                await listener.until_over()
            await _record(office.journal, snapshot, office.secrets)

    def open(
        self,
        journal: Journal | None,
        *,
        secrets: tuple[str, ...],
        spawn: Callable[[Coroutine[Any, Any, None]], object],
    ) -> None:
        """Begin to take deliveries; a session does this.

        Args:
            journal: Where ends are recorded, if anywhere.
            secrets: What no error may repeat.
            spawn: Runs something in the background until the session is being closed.

        Raises:
            ConfigurationError: Another session has it open.
        """
        if self._office is not None:
            raise ConfigurationError("this inbox is in use: each session needs a WebhookInbox of its own")
        self._office = _Office(journal, secrets, spawn)

    def close(self) -> None:
        """Take no more deliveries."""
        self._office = None

    def asked(self, request: GenerationRequest) -> GenerationRequest | None:
        """Give a request that asks for a webhook of ours; None where it has one of its own."""
        if request.webhook_url is not None:
            return None
        return attrs.evolve(request, webhook_url=self.public_url, webhook_secret=self.secrets[0])

    def tell(self, snapshot: TaskSnapshot) -> bool:
        """Tell all who follow a task; False where nobody does, here."""
        listeners = self.mail.listeners(snapshot.task_id)
        for listener in listeners:
            listener.hear(snapshot)
        return bool(listeners)

    # ------------------------------------------------------------------ behind

    async def _find_owner(self, office: _Office, snapshot: TaskSnapshot, size: int) -> None:
        """Record an end for the process that follows the task, or keep it until somebody here asks for it."""
        if not snapshot.status.ended:
            return
        if office.journal is not None and await _record(office.journal, snapshot, office.secrets):
            return
        # It may have become ours meanwhile.
        if not self.tell(snapshot) and self.mail.keep(snapshot, size) and office.journal is not None:
            office.spawn(self._record_later(office.journal, snapshot, office.secrets))

    async def _record_later(self, journal: Journal, snapshot: TaskSnapshot, secrets: tuple[str, ...]) -> None:
        """Record an end that came before the process that submitted the task has written down its id."""
        for seconds in _AGAIN:
            await asyncio.sleep(seconds)
            if not self.mail.keeps(snapshot):
                return
            try:
                if await _record(journal, snapshot, secrets):
                    self.mail.drop(snapshot)
                    return
            except JournalError as error:
                log.warning("webhook for task %s: %s", snapshot.task_id, error)


async def _record(journal: Journal, snapshot: TaskSnapshot, secrets: tuple[str, ...]) -> bool:
    """Make sure that an end is in the journal; False where the journal doesn't know the task."""
    entry = await journal.find_task(snapshot.task_id)
    if entry is None:
        return False
    if entry.state not in {EntryState.COMPLETED, EntryState.FAILED}:
        cost = snapshot.usage.cost if snapshot.usage else None
        holder = None if entry.holder is Holder.US else Holder.OTHER
        outcome = _outcome(entry, snapshot)
        await journal.record(ended(entry, outcome, cost, holder=holder, secrets=secrets))
    return True


def _outcome(entry: JournalEntry, snapshot: TaskSnapshot) -> Outcome:
    since = entry.submitted_at or entry.created_at
    elapsed = 0.0 if since is None else max(0.0, (datetime.now(UTC) - since).total_seconds())
    if snapshot.error is not None:
        return Failed(snapshot.task_id, None, snapshot.error, elapsed, 0)
    return Completed(snapshot.task_id, None, snapshot.images, snapshot.usage, snapshot.metadata, elapsed, 0)
