"""An asyncio-native client for the FLUX.2 [max] image API: submit many, poll each, and take each as it ends.

    async with FluxSession() as session:
        picture = await session.generate("a lighthouse at dawn")
        await session.save(picture.images[0], "lighthouse.jpeg")

Nothing is imported before a name is first used: pytest loads this package for its plugin, wanted or not, and that
must not cost an HTTP client's start.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from flux2max_async._version import __version__

if TYPE_CHECKING:
    from flux2max_async import journal as journal
    from flux2max_async import webhooks as webhooks
    from flux2max_async._face import *

__all__ = [
    "AuthenticationError",
    "BadRequestError",
    "BudgetExceededError",
    "Completed",
    "ConfigurationError",
    "ContentModeratedError",
    "DeadlineExceededError",
    "DownloadError",
    "ExponentialSchedule",
    "Failed",
    "FixedSchedule",
    "FluxError",
    "FluxSession",
    "GeneratedImage",
    "GenerationRequest",
    "GenerationTask",
    "ImageSource",
    "InputImage",
    "InsufficientBalanceError",
    "InvalidRequestError",
    "Journal",
    "JournalEntry",
    "JournalError",
    "LearnedSchedule",
    "Outcome",
    "OutcomeStream",
    "OutputFormat",
    "PermissionDeniedError",
    "PollPlan",
    "PollSchedule",
    "ProtocolError",
    "RateLimitedError",
    "ResponseError",
    "ResultExpiredError",
    "ServerError",
    "SessionClosedError",
    "SessionStats",
    "SqliteJournal",
    "SubmissionUncertainError",
    "TaskFailedError",
    "TaskNotFoundError",
    "TaskSnapshot",
    "TaskStatus",
    "TransportError",
    "Usage",
    "WebhookInbox",
    "WebhookSignatureError",
    "__version__",
]
_ROOMS = ("journal", "webhooks")


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return import_module(f"{__name__}.{name}")
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    face = import_module("flux2max_async._face")
    globals().update((public, getattr(face, public)) for public in __all__)
    return globals()[name]


def __dir__() -> list[str]:
    return [*globals(), *__all__]
