"""What pollers share with their session, and what is known of a task when its polling starts."""

import attrs

from flux2max_async._api.client import ApiClient
from flux2max_async._models.request import GenerationRequest
from flux2max_async._models.results import TaskSnapshot
from flux2max_async._polling.schedules import PollSchedule
from flux2max_async._shutdown import Shutdown
from flux2max_async.webhooks._registry import WebhookRegistry


@attrs.frozen
class PollingContext:
    """What the pollers of a session share."""

    client: ApiClient
    schedule: PollSchedule
    registry: WebhookRegistry
    shutdown: Shutdown
    task_timeout: float
    """Seconds from a task's submit, or from its attach, to its deadline."""


@attrs.frozen(kw_only=True)
class PollStart:
    """What is known of a task when its polling starts."""

    task_id: str
    request: GenerationRequest | None
    started: float
    """When it was submitted, or attached, on the event loop's clock."""
    deadline: float
    age: float | None
    """Seconds from its submit to `started`; None if nobody here knows when it was submitted."""
    submitted_here: bool
    """Whether the schedule may learn from it."""
    expects_webhook: bool
    webhook: TaskSnapshot | None = None
    """What a webhook reported, if the task is known by it: the answer to its submit was lost."""
