"""The retry policy: whether a request may be sent again, and after which delay. Pure functions of the error."""

import errno

from flux2max_async._config import NoKeyError
from flux2max_async._exceptions import (
    AuthenticationError,
    BudgetExceededError,
    ConfigurationError,
    FluxError,
    InFlightLimitError,
    InsufficientBalanceError,
    JournalError,
    PermissionDeniedError,
    ProtocolError,
    RateLimitedError,
    ResponseError,
    ServerError,
    StorageError,
    SubmissionUncertainError,
    TaskNotFoundError,
    TransportError,
)
from flux2max_async._text import describe

NOT_FOUND_GRACE_PERIOD = 30.0
"""Seconds after a submit during which a 404 may only mean that the new task is not visible yet."""

DEFAULT_PAUSE = 1.0
"""Seconds to pause after a 429 that doesn't say how long."""
MAX_PAUSE = 120.0
"""Maximum pause in seconds, even if the service requests a longer one."""

UNKNOWN_HOST_DELAY = 2.0
"""Seconds until a host name that doesn't exist is looked up once more."""

_BASE_DELAY = 0.5
"""Seconds."""
_MAX_DELAY = 15.0
"""Seconds."""
_DISK_ERRNOS = frozenset(
    (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG, errno.EIO, errno.ENOTDIR)
)


def may_submit_again(error: FluxError, previous: FluxError | None = None) -> bool:
    """Return whether the failed submit has certainly created no task, and another attempt may succeed.

    Args:
        error: The error of the submit.
        previous: The error of the attempt before.
    """
    if is_lasting(error, previous):
        return False
    match error:
        case RateLimitedError():
            return True
        case ServerError(status=503):  # sent before a submit is accepted
            return True
        case TransportError(maybe_sent=maybe_sent):
            return not maybe_sent
        case _:
            return False


def is_lasting(error: Exception, previous: Exception | None = None) -> bool:
    """Return whether there was no connection for a reason that lasts; a host must be unknown twice in a row.

    Args:
        error: The error of a call.
        previous: The error of the attempt before.
    """
    match error:
        case TransportError(fault="unknown_host"):
            return isinstance(previous, TransportError) and previous.fault == "unknown_host"
        case TransportError(fault=fault):
            return fault is not None
        case _:
            return False


def min_delay(error: Exception) -> float:
    """Return the seconds after which the call may be repeated at the earliest."""
    asked = min(getattr(error, "retry_after", None) or 0.0, MAX_PAUSE)
    return max(asked, UNKNOWN_HOST_DELAY) if getattr(error, "fault", None) == "unknown_host" else asked


def is_uncertain(error: FluxError) -> bool:
    """Return whether the failed submit may have created a task."""
    match error:
        case TransportError(maybe_sent=maybe_sent):
            return maybe_sent
        case InsufficientBalanceError():
            return False
        case ResponseError(status=status):
            return status == 408 or (status >= 500 and status != 503)
        case ProtocolError():
            return True
        case _:
            return False


def uncertain_error(cause: FluxError) -> SubmissionUncertainError:
    """Return the error of a submit that was sent and not answered."""
    error = SubmissionUncertainError(
        f"the submit was sent, but its answer was lost ({describe(cause)}): a task may exist and cost money"
    )
    error.__cause__ = cause.with_traceback(None)
    return error


def may_poll_again(error: FluxError, *, elapsed: float | None) -> bool:
    """Return whether the task should be polled again after a failed poll, because the error isn't about the task.

    Args:
        error: The error of the poll.
        elapsed: Seconds since the submit; None for a task that was submitted elsewhere.
    """
    match error:
        case TransportError() | RateLimitedError() | ServerError() | NoKeyError():
            return True
        case TaskNotFoundError(from_api=True):
            return elapsed is not None and elapsed < NOT_FOUND_GRACE_PERIOD
        case ResponseError(status=408) | ResponseError(from_api=False):
            return True
        case _:
            return is_unreadable(error)


def is_unreadable(error: FluxError) -> bool:
    """Return whether a poll got a response that can't be parsed as a task."""
    match error:
        case ProtocolError():
            return True
        # The envelope of the response has a status code of its own [C].
        case TaskNotFoundError() | RateLimitedError() | ServerError() | AuthenticationError() | PermissionDeniedError():
            return False
        case ResponseError(status=status):
            return 200 <= status < 300
        case _:
            return False


def is_fatal_for_batch(error: FluxError) -> bool:
    """Return whether every further submit of the same session would fail in the same way.

    An answer that is not the API's own reveals nothing about other requests, until several in a row are alike. A poll
    that is refused concerns other submits only if it is about the key or the balance. A connection that fails for a
    lasting reason does so for all of them.
    """
    match error:
        case TransportError(fault=fault):
            return fault is not None or error.stops_stream
        case BudgetExceededError() | JournalError(key=None) | InFlightLimitError() | ConfigurationError():
            return True
        case AuthenticationError(from_api=True) | InsufficientBalanceError(from_api=True):
            return True
        case PermissionDeniedError(from_api=True, task_id=None):
            return True
        case _:
            return error.stops_stream


def is_disk_failure(error: FluxError) -> bool:
    """Return whether every further image would fail in the same way: the disk is full, or the bucket refuses."""
    match error.__cause__:
        case OSError(errno=int(number)):
            return isinstance(error, StorageError) and number in _DISK_ERRNOS
        case ValueError():  # about one name
            return False
        case _:
            return isinstance(error, StorageError)


def backoff(failures: int, jitter: float) -> float:
    """Return the delay before the next attempt in seconds, which doubles with each failure up to 15 s.

    Args:
        failures: The number of failures in a row, at least 1.
        jitter: A new random number from 0.0 to 1.0, so that many callers don't retry at the same time.
    """
    return min(_BASE_DELAY * 2.0 ** min(failures - 1, 10), _MAX_DELAY) * (0.5 + 0.5 * jitter)
