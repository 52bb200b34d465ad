"""Which task's poller waits for which webhook. No I/O."""

import asyncio
from collections import OrderedDict
from typing import Protocol

import attrs

from flux2max_async._models.results import TaskSnapshot
from flux2max_async._shutdown import Shutdown
from flux2max_async.webhooks._reliability import WebhookReliability

_MAX_EARLY_DELIVERIES = 1_000
_MAX_EARLY_BYTES = 8_192
"""Size of a delivery that may be stored; a finished task has about one thousand bytes."""
_MAX_ALL_EARLY_BYTES = 1_000_000
"""Size of all that are stored. Parsed, they may need twenty times as much memory."""


class Listener(Protocol):
    """Follows one task."""

    def on_webhook(self, snapshot: TaskSnapshot | None) -> None:
        """Process a verified webhook about the task; None if its content can't be read."""

    async def wait_closed(self) -> None:
        """Wait until the end has been processed, or the task is not followed any more."""


@attrs.define(eq=False)
class WebhookRegistry:
    """The listeners of a session by task id, deliveries that arrived before their listener, and expected submits.

    A submit is expected, by the token in its delivery URL, from before it is sent until its task is followed, or given
    up: a delivery with its token reveals the task's id even if the submit's answer is lost.
    """

    in_use: bool = attrs.field(default=False, init=False)
    """Whether the session has an inbox, or a journal through which other processes report ends."""
    reliability: WebhookReliability = attrs.field(factory=WebhookReliability, init=False)
    _listeners: dict[str, Listener] = attrs.field(factory=dict[str, Listener], init=False)
    _early: OrderedDict[str, tuple[TaskSnapshot, int]] = attrs.field(
        factory=OrderedDict[str, tuple[TaskSnapshot, int]], init=False
    )
    """Ends that no listener waits for yet, by task id, with the sizes of their deliveries, the newest last: a webhook
    may arrive before the answer to its submit."""
    _early_bytes: int = attrs.field(default=0, init=False)
    """The sum of those sizes."""
    _expected: dict[str, "asyncio.Future[TaskSnapshot]"] = attrs.field(
        factory=dict[str, "asyncio.Future[TaskSnapshot]"], init=False
    )
    _shutdown: Shutdown = attrs.field(factory=Shutdown, init=False)

    def reset(self, shutdown: Shutdown) -> None:
        """Start a new session; what was learned about the webhooks stays."""
        self.in_use = True
        self.reliability.reset()
        self._listeners.clear()
        self._early.clear()
        self._early_bytes = 0
        self._expected.clear()
        self._shutdown = shutdown

    @property
    def closed(self) -> bool:
        """Whether no more webhooks are expected: a server that shuts down stops listening before its session closes."""
        return self._shutdown.draining

    @property
    def cost_factor(self) -> float:
        """How many times the usual cost a poll has if a webhook is expected."""
        return 1.0 if self.closed else self.reliability.cost_factor

    def add(self, task_id: str, listener: Listener) -> TaskSnapshot | None:
        """Register the listener of a task; return what was delivered already."""
        self._listeners[task_id] = listener
        early = self.early(task_id)
        self.discard_early(task_id)
        return early

    def remove(self, task_id: str, listener: Listener) -> None:
        """Unregister a listener: the task has ended, or is not followed any more."""
        if self._listeners.get(task_id) is listener:
            del self._listeners[task_id]

    def listener(self, task_id: str) -> Listener | None:
        """Return the listener of a task."""
        return self._listeners.get(task_id)

    def store_early(self, snapshot: TaskSnapshot, size: int) -> bool:
        """Store an end that no listener waits for yet; return whether it was stored.

        Args:
            snapshot: The content of the delivery.
            size: The size of the delivery in bytes.
        """
        if size > _MAX_EARLY_BYTES:
            return False
        self.discard_early(snapshot.task_id)
        self._early[snapshot.task_id] = (snapshot, size)
        self._early_bytes += size
        while len(self._early) > _MAX_EARLY_DELIVERIES or self._early_bytes > _MAX_ALL_EARLY_BYTES:
            self.discard_early(next(iter(self._early)))
        return True

    def early(self, task_id: str) -> TaskSnapshot | None:
        """Return the stored end of a task."""
        snapshot, _ = self._early.get(task_id, (None, 0))
        return snapshot

    def discard_early(self, task_id: str) -> None:
        """Remove the stored end of a task, if there is one."""
        _, size = self._early.pop(task_id, (None, 0))
        self._early_bytes -= size

    def expect(self, token: str) -> "asyncio.Future[TaskSnapshot]":
        """Register a submit that is about to be sent; return the future of the first delivery with its token."""
        future: asyncio.Future[TaskSnapshot] = asyncio.get_running_loop().create_future()
        self._expected[token] = future
        return future

    def forget(self, token: str) -> None:
        """Unregister a submit: its task is followed by its id, or it created none, or it is given up."""
        self._expected.pop(token, None)

    def resolve(self, token: str | None, snapshot: TaskSnapshot) -> bool:
        """Pass a snapshot to the submit with a token; return False if no such submit is expected."""
        future = None if token is None else self._expected.get(token)
        if future is None or future.cancelled():
            return False
        if not future.done():
            future.set_result(snapshot)
        return True
