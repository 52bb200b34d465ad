"""Brings each verified webhook to the poller of its task, or into the journal for another process."""

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from datetime import UTC, datetime
from typing import Any, TypeVar

import attrs

from flux2max_async._exceptions import ConfigurationError, JournalError, ProtocolError, SessionClosedError
from flux2max_async._models.request import GenerationRequest
from flux2max_async._models.results import Completed, Failed, Outcome, TaskSnapshot, TaskStatus
from flux2max_async._shutdown import Shutdown
from flux2max_async._text import get_logger
from flux2max_async.journal._entry import Holder, JournalEntry
from flux2max_async.journal._protocol import Journal
from flux2max_async.journal._transitions import END_STATES, end_entry, submitted_entry
from flux2max_async.webhooks._payload import read_delivery, reports_not_found
from flux2max_async.webhooks._registry import WebhookRegistry
from flux2max_async.webhooks._tokens import add_token

log = get_logger("webhooks")

_RETRY_DELAYS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 15.0, 30.0)
"""Seconds between attempts to find the task of an early delivery in a shared journal."""
_MAX_LOOKUPS = 1_000
"""How many early deliveries are looked up again; the ends of more are found by polls."""
_MIN_SECRET_LENGTH = 6
"""Shorter texts are not redacted: they might be ordinary words in URLs and messages."""


T = TypeVar("T")


@attrs.frozen
class Receipt:
    """What became of a delivery."""

    task_id: str
    known: bool
    """Whether the task is followed, expected or recorded here."""


@attrs.frozen
class _Session:
    """The open session of a dispatcher."""

    loop: asyncio.AbstractEventLoop
    journal: Journal | None
    secrets: Sequence[str] = attrs.field(repr=False)
    spawn: Callable[[Coroutine[Any, Any, None]], "asyncio.Task[None]"] = attrs.field(repr=False)
    lookups: set[str] = attrs.field(factory=set[str])
    """The tasks whose early deliveries are looked up in the journal again."""


class WebhookDispatcher:
    """Connects an inbox with its session.

    Args:
        public_url: Where the service delivers.
        secret: The secret that new submits name.
        secrets: All secrets that a delivery may be signed with.
    """

    def __init__(self, public_url: str, secret: str, secrets: tuple[str, ...]) -> None:
        self.registry: WebhookRegistry = WebhookRegistry()
        self.secrets: tuple[str, ...] = tuple(secret for secret in secrets if len(secret) >= _MIN_SECRET_LENGTH)
        """What errors must not repeat."""
        self._public_url = public_url
        self._secret = secret
        self._session: _Session | None = None

    def open(
        self,
        shutdown: Shutdown,
        journal: Journal | None,
        *,
        secrets: Sequence[str],
        spawn: Callable[[Coroutine[Any, Any, None]], "asyncio.Task[None]"],
    ) -> None:
        """Accept deliveries for a session.

        Args:
            shutdown: The session's shutdown state.
            journal: Where ends are recorded, if anywhere.
            secrets: What errors must not repeat.
            spawn: Runs a coroutine in the background until the session drains.

        Raises:
            ConfigurationError: Another session uses this inbox.
        """
        if self._session is not None and not self._session.loop.is_closed():
            raise ConfigurationError("this inbox is in use: each session needs a WebhookInbox of its own")
        self.registry.reset(shutdown)
        self._session = _Session(asyncio.get_running_loop(), journal, secrets, spawn)

    def close(self) -> None:
        """Accept no more deliveries."""
        self._session = None

    def add_webhook(self, request: GenerationRequest, token: str) -> GenerationRequest:
        """Return the request with this inbox as its webhook, unless it names a webhook of its own.

        Args:
            request: The request.
            token: The token of its submit.
        """
        if request.webhook_url is not None:
            return request
        return attrs.evolve(request, webhook_url=add_token(self._public_url, token), webhook_secret=self._secret)

    def publish(self, snapshot: TaskSnapshot) -> bool:
        """Pass a snapshot to the task's listener; return whether there is one."""
        listener = self.registry.listener(snapshot.task_id)
        if listener is not None:
            listener.on_webhook(snapshot)
        return listener is not None

    def poll_now(self, task_id: str) -> None:
        """Make the task's listener, if there is one, poll the task at once."""
        listener = self.registry.listener(task_id)
        if listener is not None:
            listener.on_webhook(None)

    async def dispatch(self, body: bytes, token: str | None = None) -> Receipt:
        """Process a delivery whose signature is valid; return when it need not be repeated.

        Args:
            body: Its content.
            token: The token in its URL, if there is one.

        Raises:
            ProtocolError: It can't be read.
            SessionClosedError: No session could use it.
            JournalError: Its end can't be recorded.
        """
        session = self._session
        if session is None or session.loop.is_closed():
            raise SessionClosedError("no session is open for this delivery")
        if session.loop is asyncio.get_running_loop():
            return await self._dispatch(session, body, token)
        return await _run_in_loop(self._dispatch(session, body, token), session.loop)

    async def _dispatch(self, session: _Session, body: bytes, token: str | None) -> Receipt:
        try:
            snapshot = read_delivery(body, session.secrets)
        except ProtocolError as error:
            self.poll_now(error.task_id or "")
            if error.task_id is not None and self.registry.listener(error.task_id) is None:
                # At least the id of a lost submit is known now: polls do the rest.
                unread = TaskSnapshot(task_id=error.task_id, status=TaskStatus.IN_PROGRESS)
                await self._dispatch_unfollowed(session, unread, len(body), token)
            raise
        if snapshot.status.ended:
            self.registry.reliability.record_delivery(snapshot.task_id, session.loop.time())
        listener = self.registry.listener(snapshot.task_id)
        known = listener is not None
        if reports_not_found(snapshot):  # only the service's own answer to a poll can say so
            self.poll_now(snapshot.task_id)
        elif listener is not None:
            listener.on_webhook(snapshot)
            if snapshot.status.ended and session.journal is not None:
                await listener.wait_closed()
                await _record(session.journal, snapshot, token, session.secrets)
        elif snapshot.status.ended or token is not None:
            known = await self._dispatch_unfollowed(session, snapshot, len(body), token)
        return Receipt(snapshot.task_id, known)

    async def _dispatch_unfollowed(
        self, session: _Session, snapshot: TaskSnapshot, size: int, token: str | None
    ) -> bool:
        """Process a delivery about a task that isn't followed here by its id: its submit may have no answer yet.

        Returns:
            Whether the task is known.
        """
        expected = self.registry.resolve(token, snapshot)
        if expected and snapshot.status.ended:
            # For the listener of the task. At once, because it may be registered, and removed again, while the journal
            # is written.
            self.registry.store_early(snapshot, size)
        # Recorded here and not by the expecting runner, so that the id is in the journal before this returns.
        recorded = session.journal is not None and await _record(
            session.journal, snapshot, token, session.secrets, followed=expected
        )
        known = expected or recorded
        return known or (snapshot.status.ended and self._store_early(session, snapshot, size))

    def _store_early(self, session: _Session, snapshot: TaskSnapshot, size: int) -> bool:
        """Store an end until a listener for it is registered: it may arrive before the answer to its submit.

        Returns:
            Whether a listener was registered while the journal was searched.
        """
        if self.publish(snapshot):
            return True
        if self.registry.closed:
            raise SessionClosedError("the session is closing and doesn't know the task of this delivery")
        if self.registry.store_early(snapshot, size) and session.journal is not None:
            self._look_up_later(session, session.journal, snapshot.task_id)
        return False

    def _look_up_later(self, session: _Session, journal: Journal, task_id: str) -> None:
        """Look for the task of an early delivery in the journal until it is recorded, for a minute."""
        if task_id not in session.lookups and len(session.lookups) < _MAX_LOOKUPS:
            session.lookups.add(task_id)
            lookup = session.spawn(self._record_later(journal, task_id, session.secrets))
            lookup.add_done_callback(lambda _: session.lookups.discard(task_id))

    async def _record_later(self, journal: Journal, task_id: str, secrets: Sequence[str]) -> None:
        """Record an end that arrived before the process that submitted the task had recorded its id."""
        for delay in _RETRY_DELAYS:
            await asyncio.sleep(delay)
            snapshot = self.registry.early(task_id)
            if snapshot is None:
                return
            try:
                if await _record(journal, snapshot, None, secrets):
                    self.registry.discard_early(task_id)
                    return
            except JournalError as error:
                log.warning("webhook for task %s: %s", task_id, error)


async def _run_in_loop(work: Coroutine[Any, Any, T], loop: asyncio.AbstractEventLoop) -> T:
    """Run a coroutine in another event loop: some servers give each handler a loop of its own.

    Raises:
        SessionClosedError: That loop ends first.
    """
    try:
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, loop))
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        raise SessionClosedError("the session's event loop ended while it processed this delivery") from None


async def _record(
    journal: Journal, snapshot: TaskSnapshot, token: str | None, secrets: Sequence[str], *, followed: bool = False
) -> bool:
    """Record the id and the end in a delivery; return False if the journal knows neither the task nor the token.

    Args:
        journal: The journal.
        snapshot: The content of the delivery.
        token: The token in its URL, if there is one.
        secrets: What must not be written.
        followed: Whether this session goes on with the request, and must keep its entry.
    """
    entry = await journal.find_task(snapshot.task_id)
    if entry is None and token is not None:
        entry = await journal.find_token(token)
    if entry is None or entry.task_id not in {None, snapshot.task_id}:
        return False
    if entry.state in END_STATES or (entry.task_id is not None and not snapshot.status.ended):
        return True
    # With OTHER, whoever holds the entry keeps it.
    holder = None if entry.holder is Holder.US and not followed else Holder.OTHER
    if snapshot.status.ended:
        cost = snapshot.usage.cost if snapshot.usage else None
        await journal.record(end_entry(entry, _outcome(entry, snapshot), cost, holder=holder, secrets=secrets))
    else:
        await journal.record(attrs.evolve(submitted_entry(entry, snapshot.task_id), holder=holder))
    return True


def _outcome(entry: JournalEntry, snapshot: TaskSnapshot) -> Outcome:
    since = entry.submitted_at or entry.created_at
    elapsed = 0.0 if since is None else max(0.0, (datetime.now(UTC) - since).total_seconds())
    if snapshot.error is not None:
        return Failed(task_id=snapshot.task_id, error=snapshot.error, elapsed=elapsed)
    return Completed(
        task_id=snapshot.task_id,
        images=snapshot.images,
        usage=snapshot.usage,
        metadata=snapshot.metadata,
        partial_error=snapshot.partial_error,
        elapsed=elapsed,
    )
