"""Everything that `from flux2max_async import ...` offers: the only list of the public names.

`flux2max_async` imports this module when one of them is first used.
"""

from flux2max_async._config import ApiKey as ApiKey
from flux2max_async._downloads.image_download import ImageDownload as ImageDownload
from flux2max_async._exceptions import (
    AuthenticationError as AuthenticationError,
)
from flux2max_async._exceptions import (
    BadRequestError as BadRequestError,
)
from flux2max_async._exceptions import (
    BudgetExceededError as BudgetExceededError,
)
from flux2max_async._exceptions import (
    ConfigurationError as ConfigurationError,
)
from flux2max_async._exceptions import (
    ContentModeratedError as ContentModeratedError,
)
from flux2max_async._exceptions import (
    DeadlineExceededError as DeadlineExceededError,
)
from flux2max_async._exceptions import (
    DownloadError as DownloadError,
)
from flux2max_async._exceptions import (
    FluxError as FluxError,
)
from flux2max_async._exceptions import (
    InFlightLimitError as InFlightLimitError,
)
from flux2max_async._exceptions import (
    InsufficientBalanceError as InsufficientBalanceError,
)
from flux2max_async._exceptions import (
    InvalidRequestError as InvalidRequestError,
)
from flux2max_async._exceptions import (
    JournalError as JournalError,
)
from flux2max_async._exceptions import (
    PermissionDeniedError as PermissionDeniedError,
)
from flux2max_async._exceptions import (
    ProtocolError as ProtocolError,
)
from flux2max_async._exceptions import (
    QueueFullError as QueueFullError,
)
from flux2max_async._exceptions import (
    RateLimitedError as RateLimitedError,
)
from flux2max_async._exceptions import (
    ResponseError as ResponseError,
)
from flux2max_async._exceptions import (
    ResultExpiredError as ResultExpiredError,
)
from flux2max_async._exceptions import (
    ServerError as ServerError,
)
from flux2max_async._exceptions import (
    SessionClosedError as SessionClosedError,
)
from flux2max_async._exceptions import (
    StorageError as StorageError,
)
from flux2max_async._exceptions import (
    SubmissionUncertainError as SubmissionUncertainError,
)
from flux2max_async._exceptions import (
    TaskFailedError as TaskFailedError,
)
from flux2max_async._exceptions import (
    TaskNotFoundError as TaskNotFoundError,
)
from flux2max_async._exceptions import (
    TransportError as TransportError,
)
from flux2max_async._exceptions import (
    WebhookSignatureError as WebhookSignatureError,
)
from flux2max_async._health import SessionHealth as SessionHealth
from flux2max_async._models.images import ImageSource as ImageSource
from flux2max_async._models.images import InputImage as InputImage
from flux2max_async._models.outcome_dict import outcome_from_dict as outcome_from_dict
from flux2max_async._models.pictures import SupportsImageSave as SupportsImageSave
from flux2max_async._models.request import (
    GenerationParams as GenerationParams,
)
from flux2max_async._models.request import (
    GenerationRequest as GenerationRequest,
)
from flux2max_async._models.request import (
    OutputFormat as OutputFormat,
)
from flux2max_async._models.results import (
    Completed as Completed,
)
from flux2max_async._models.results import (
    Failed as Failed,
)
from flux2max_async._models.results import (
    GeneratedImage as GeneratedImage,
)
from flux2max_async._models.results import (
    Outcome as Outcome,
)
from flux2max_async._models.results import (
    TaskSnapshot as TaskSnapshot,
)
from flux2max_async._models.results import (
    TaskStatus as TaskStatus,
)
from flux2max_async._models.results import (
    Usage as Usage,
)
from flux2max_async._polling.learned import LearnedSchedule as LearnedSchedule
from flux2max_async._polling.schedules import (
    ExponentialSchedule as ExponentialSchedule,
)
from flux2max_async._polling.schedules import (
    FixedSchedule as FixedSchedule,
)
from flux2max_async._polling.schedules import (
    PollPlan as PollPlan,
)
from flux2max_async._polling.schedules import (
    PollSchedule as PollSchedule,
)
from flux2max_async._session import FluxSession as FluxSession
from flux2max_async._session_options import SessionOptions as SessionOptions
from flux2max_async._stats import SessionStats as SessionStats
from flux2max_async._stream import OutcomeStream as OutcomeStream
from flux2max_async._tasks.handle import GenerationTask as GenerationTask
from flux2max_async._tasks.queued import QueuedGeneration as QueuedGeneration
from flux2max_async._version import __version__ as __version__
from flux2max_async.journal import (
    Journal as Journal,
)
from flux2max_async.journal import (
    JournalEntry as JournalEntry,
)
from flux2max_async.journal import (
    PostgresJournal as PostgresJournal,
)
from flux2max_async.journal import (
    SqliteJournal as SqliteJournal,
)
from flux2max_async.limits import (
    InFlightLimit as InFlightLimit,
)
from flux2max_async.limits import (
    PostgresInFlightLimit as PostgresInFlightLimit,
)
from flux2max_async.limits import (
    SqliteInFlightLimit as SqliteInFlightLimit,
)
from flux2max_async.webhooks._headers import HeadersLike as HeadersLike
from flux2max_async.webhooks._inbox import WebhookInbox as WebhookInbox
