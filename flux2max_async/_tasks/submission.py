"""What makes good a submit whose answer was lost: its webhook, which has the id and the end of the task.

Each submit names a delivery URL of its own, with a random token in the query. The dispatcher passes a delivery with an
expected token to whoever expects it.
"""

import asyncio
from collections.abc import Callable
from typing import Self

import attrs

from flux2max_async._api.client import AcceptedSubmit, LostSubmit
from flux2max_async._models.request import GenerationRequest
from flux2max_async._models.results import TaskSnapshot
from flux2max_async._polling.context import PollingContext
from flux2max_async._polling.deadline import GRACE_PERIOD
from flux2max_async._polling.learned import LearnedSchedule
from flux2max_async._text import get_logger
from flux2max_async._timeouts import wait
from flux2max_async.webhooks._tokens import new_token

log = get_logger("tasks")

AddWebhook = Callable[[GenerationRequest, str], GenerationRequest]
"""Returns the request with the session's webhook, whose URL holds a token, or the same request if it has its own."""

_MIN_WAIT = 60.0
"""Seconds that the webhook of a lost submit is waited for, unless the task's deadline comes first."""
_WAIT_FACTOR = 2.0
"""It is waited for at least so many times as long as 99 of 100 tasks take."""


@attrs.define(eq=False)
class ExpectedWebhook:
    """The webhook of one submit. Call `forget()` when the submit has ended, however that was."""

    request: GenerationRequest
    """The request as it is sent."""
    token: str
    _polling: PollingContext
    _delivered: "asyncio.Future[TaskSnapshot]"

    @classmethod
    def create(cls, request: GenerationRequest, add_webhook: AddWebhook, polling: PollingContext) -> Self | None:
        """Expect the webhook of a submit that is about to be made; return None if the request names one of its own."""
        token = new_token()
        sent = add_webhook(request, token)
        return None if sent is request else cls(sent, token, polling, polling.registry.expect(token))

    async def wait(self, lost: LostSubmit) -> TaskSnapshot | None:
        """Wait as long as such tasks usually take; return None if nothing was delivered."""
        schedule, now = self._polling.schedule, self._polling.client.now
        usual = schedule.percentile(99) if isinstance(schedule, LearnedSchedule) else None
        seconds = max(0.0, min(max(_MIN_WAIT, _WAIT_FACTOR * (usual or 0.0)), lost.deadline - now()))
        log.warning("%s; waiting up to %.0f s for its webhook", lost.error, seconds)
        await wait((self._delivered,), seconds, grace=GRACE_PERIOD)
        if not self._delivered.done():
            return None
        log.info("a webhook has brought the id of a lost submit: task %s", self._delivered.result().task_id)
        return self._delivered.result()

    def forget(self) -> None:
        """Expect the webhook no longer by its token: its task is followed by its id, or not at all."""
        self._polling.registry.forget(self.token)


async def make_good(lost: LostSubmit, webhook: ExpectedWebhook | None, polling: PollingContext) -> AcceptedSubmit:
    """Return a lost submit as one that was accepted, if its webhook reports a task.

    The request keeps its slot meanwhile, because the task may be running.

    Raises:
        SubmissionUncertainError: There is no webhook, or it has not come in time.
    """
    delivered = None if webhook is None else await webhook.wait(lost)
    if delivered is None:
        polling.client.give_up(lost)
        raise lost.error
    polling.client.resolve(lost)
    return AcceptedSubmit(delivered, lost.started, lost.deadline, by_webhook=True)
