"""What runners share with their session, and who follows them."""

import asyncio
from collections.abc import Callable, Coroutine
from contextvars import Context
from typing import TYPE_CHECKING, Any, Protocol

import attrs

from flux2max_async._models.results import Outcome
from flux2max_async._polling.context import PollingContext
from flux2max_async._tasks.bursts import BurstLimiter
from flux2max_async._tasks.link_renewal import LinkRenewer
from flux2max_async._tasks.queue_bound import QueueBound
from flux2max_async._tasks.single_flight import SingleFlight
from flux2max_async._tasks.slots import SlotQueue
from flux2max_async._tasks.submission import AddWebhook
from flux2max_async.journal._lookup import ReusePolicy

if TYPE_CHECKING:
    from flux2max_async._tasks.runner import TaskRunner


class Spawn(Protocol):
    """Runs a coroutine in the background as long as the session is open."""

    def __call__(
        self, work: Coroutine[Any, Any, Any], *, until_drain: bool = False, context: Context | None = None
    ) -> "asyncio.Task[Any]":
        """Return the task that runs it, in a context of its own if one is given.

        Args:
            work: The coroutine.
            until_drain: Whether it might never end by itself.
            context: Its context variables; by default, a copy of the caller's.
        """
        ...


class RunnerObserver(Protocol):
    """Follows a runner; its methods are called synchronously and must not raise."""

    def on_waiting_elsewhere(self, *, waiting: bool) -> None:
        """Called when the runner begins, or ceases, to wait for another process that follows the request."""

    def on_ended(self, runner: "TaskRunner", outcome: Outcome) -> None:
        """Called in the moment of the end, before anything else can happen."""


@attrs.frozen
class RunnerContext:
    """What the runners of a session share."""

    polling: PollingContext
    slots: SlotQueue
    """A request gets one before its submit, and holds it until the task ends."""
    bound: QueueBound
    add_webhook: AddWebhook | None
    """None if the session has no inbox."""
    single_flight: SingleFlight
    spawn: Spawn
    check_caller: Callable[[], None]
    """Raises if the calling process or event loop is not the session's."""
    begin_drain: Callable[[], None]
    bursts: BurstLimiter = attrs.field(factory=BurstLimiter, init=False)
    _links: LinkRenewer = attrs.field(factory=LinkRenewer, init=False)

    async def renew_links(self, replay: Outcome, policy: ReusePolicy) -> Outcome:
        """Return the outcome of a replay with links that work.

        In a list, they stay as they are: it may have very many, and `save()` renews those that are used.
        """
        is_in_list = policy.occurrences is not None
        return replay if is_in_list else await self._links.renew(replay, self.polling.client)
