"""The post office of a session: brings each webhook to who follows its task, here or in another process."""

import asyncio
import logging
from collections.abc import Callable, Coroutine
from datetime import UTC, datetime
from typing import Any

import attrs

from flux2max_async._exceptions import ConfigurationError, JournalError, ProtocolError, SessionClosedError
from flux2max_async._models.request import GenerationRequest
from flux2max_async._models.results import Completed, Failed, Outcome, TaskSnapshot
from flux2max_async.journal import Journal
from flux2max_async.journal._entry import EntryState, Holder, JournalEntry
from flux2max_async.journal._record import ended
from flux2max_async.webhooks._payload import is_not_found, read_delivery
from flux2max_async.webhooks._registry import WebhookRegistry

log = logging.getLogger("flux2max_async")

_AGAIN = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 15.0, 30.0)
"""Seconds between looks for the task of an early delivery in a journal that others write, too."""
_TELLING = 6
"""Characters from which on a text is a secret, and no mere word that a url or a reason might hold."""


@attrs.frozen
class _Counter:
    """What the office works with while its session is open."""

    loop: asyncio.AbstractEventLoop
    journal: Journal | None
    secrets: tuple[str, ...] = attrs.field(repr=False)
    spawn: Callable[[Coroutine[Any, Any, None]], object] = attrs.field(repr=False)


class WebhookDispatcher:
    """What a session and its inbox have in common.

    Args:
        public_url: Where the service delivers.
        secret: What it is to sign with.
        secrets: All with which it may sign.
    """

    def __init__(self, public_url: str, secret: str, secrets: tuple[str, ...]) -> None:
        self.mail: WebhookRegistry = WebhookRegistry()
        self.secrets: tuple[str, ...] = tuple(one for one in secrets if len(one) >= _TELLING)
        """What no error may repeat."""
        self._public_url = public_url
        self._secret = secret
        self._counter: _Counter | None = None

    def open(
        self,
        journal: Journal | None,
        *,
        secrets: tuple[str, ...],
        spawn: Callable[[Coroutine[Any, Any, None]], object],
    ) -> None:
        """Begin to take deliveries.

        Args:
            journal: Where ends are recorded, if anywhere.
            secrets: What no error may repeat.
            spawn: Runs something in the background until the session is being closed.

        Raises:
            ConfigurationError: Another session has it open.
        """
        if self._counter is not None and not self._counter.loop.is_closed():
            raise ConfigurationError("this inbox is in use: each session needs a WebhookInbox of its own")
        self.mail = self.mail.afresh()
        self._counter = _Counter(asyncio.get_running_loop(), journal, secrets, spawn)

    def close(self) -> None:
        """Take no more deliveries."""
        self._counter = None

    def asked(self, request: GenerationRequest) -> GenerationRequest | None:
        """Give a request that asks for a webhook of ours; None where it has one of its own."""
        if request.webhook_url is not None:
            return None
        return attrs.evolve(request, webhook_url=self._public_url, webhook_secret=self._secret)

    def tell(self, snapshot: TaskSnapshot) -> bool:
        """Tell all who follow a task; False where nobody does, here."""
        listeners = self.mail.listeners(snapshot.task_id)
        for listener in listeners:
            listener.hear(snapshot)
        return bool(listeners)

    async def take_in(self, body: bytes) -> None:
        """Take in a delivery that is the service's; returns when it needn't come again.

        Raises:
            ProtocolError: It can't be read.
            SessionClosedError: Nobody is there who could use it.
            JournalError: Its end can't be recorded.
        """
        counter = self._counter
        if counter is None or counter.loop.is_closed():
            raise SessionClosedError("no session is open for this delivery")
        if counter.loop is asyncio.get_running_loop():
            await self._sort(counter, body)
        else:
            await _elsewhere(self._sort(counter, body), counter.loop)

    # ------------------------------------------------------------------ behind

    async def _sort(self, counter: _Counter, body: bytes) -> None:
        try:
            snapshot = read_delivery(body, counter.secrets)
        except ProtocolError as error:
            self._make_look(error.task_id or "")
            raise
        if is_not_found(snapshot):  # by whom, and where? The service itself has to say so.
            self._make_look(snapshot.task_id)
        elif not snapshot.status.ended:
            self.tell(snapshot)
        elif self.tell(snapshot):
            if counter.journal is not None:
                for listener in self.mail.listeners(snapshot.task_id):
                    await listener.until_over()
                await _record(counter.journal, snapshot, counter.secrets)
        elif counter.journal is None or not await _record(counter.journal, snapshot, counter.secrets):
            self._keep(counter, snapshot, len(body))

    def _make_look(self, task_id: str) -> None:
        for listener in self.mail.listeners(task_id):
            listener.hear(None)

    def _keep(self, counter: _Counter, snapshot: TaskSnapshot, size: int) -> None:
        """Keep an end until somebody asks for it: it may be faster than the answer to its submit."""
        if self.tell(snapshot):
            return  # it has become ours meanwhile
        if self.mail.deaf:
            raise SessionClosedError("the session is being closed, and doesn't know the task of this delivery")
        if self.mail.keep(snapshot, size) and counter.journal is not None:
            counter.spawn(self._record_later(counter.journal, snapshot, counter.secrets))

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


async def _elsewhere(work: Coroutine[Any, Any, None], loop: asyncio.AbstractEventLoop) -> None:
    """Run something in another event loop: some servers give each handler one of its own.

    Raises:
        SessionClosedError: That loop ends before it is done.
    """
    try:
        await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, loop))
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        raise SessionClosedError("the session's event loop has ended in the middle of this delivery") from None


async def _record(journal: Journal, snapshot: TaskSnapshot, secrets: tuple[str, ...]) -> bool:
    """Make sure that an end is in the journal; False where the journal doesn't know the task."""
    entry = await journal.find_task(snapshot.task_id)
    if entry is None:
        return False
    if entry.state not in {EntryState.COMPLETED, EntryState.FAILED}:
        cost = snapshot.usage.cost if snapshot.usage else None
        holder = None if entry.holder is Holder.US else Holder.OTHER
        await journal.record(ended(entry, _outcome(entry, snapshot), cost, holder=holder, secrets=secrets))
    return True


def _outcome(entry: JournalEntry, snapshot: TaskSnapshot) -> Outcome:
    since = entry.submitted_at or entry.created_at
    elapsed = 0.0 if since is None else max(0.0, (datetime.now(UTC) - since).total_seconds())
    if snapshot.error is not None:
        return Failed(snapshot.task_id, None, snapshot.error, elapsed, 0)
    return Completed(snapshot.task_id, None, snapshot.images, snapshot.usage, snapshot.metadata, elapsed, 0)
