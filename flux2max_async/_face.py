"""All that is public, imported; `flux2max_async` hands it on when it is first asked for."""

from flux2max_async._errors import (
    AuthenticationError,
    BadRequestError,
    BudgetExceededError,
    ConfigurationError,
    ContentModeratedError,
    DeadlineExceededError,
    DownloadError,
    FluxError,
    InsufficientBalanceError,
    InvalidRequestError,
    JournalError,
    PermissionDeniedError,
    ProtocolError,
    RateLimitedError,
    ResponseError,
    ResultExpiredError,
    ServerError,
    SessionClosedError,
    SubmissionUncertainError,
    TaskFailedError,
    TaskNotFoundError,
    TransportError,
    WebhookSignatureError,
)
from flux2max_async._handle import GenerationTask
from flux2max_async._inbox import WebhookInbox
from flux2max_async._learned import LearnedSchedule
from flux2max_async._request import GenerationRequest, ImageSource, InputImage, OutputFormat
from flux2max_async._schedule import ExponentialSchedule, FixedSchedule, PollPlan, PollSchedule
from flux2max_async._session import FluxSession
from flux2max_async._stats import SessionStats
from flux2max_async._stream import OutcomeStream
from flux2max_async._task import Completed, Failed, GeneratedImage, Outcome, TaskSnapshot, TaskStatus, Usage
from flux2max_async._version import __version__
from flux2max_async.journal import Journal, JournalEntry, SqliteJournal

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
