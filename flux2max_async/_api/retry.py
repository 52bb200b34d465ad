"""Whether the same call may be made again, and after how long: facts in, decisions out."""

import errno

from flux2max_async._exceptions import (
    AuthenticationError,
    BudgetExceededError,
    DownloadError,
    FluxError,
    InsufficientBalanceError,
    JournalError,
    PermissionDeniedError,
    ProtocolError,
    RateLimitedError,
    ResponseError,
    ServerError,
    TaskNotFoundError,
    TransportError,
)

NOT_VISIBLE_YET = 30.0
"""For so many seconds after its submit, a task that the service doesn't know is only not visible yet."""

_BASE_DELAY = 0.5
_MAX_DELAY = 15.0


def may_submit_again(error: FluxError) -> bool:
    """Tell whether it is certain that the same submit can't buy a second picture."""
    match error:
        case RateLimitedError():
            return True
        case ServerError(status=503):  # answered before anything was accepted
            return True
        case TransportError(maybe_sent=maybe_sent):
            return not maybe_sent
        case _:
            return False


def is_uncertain(error: FluxError) -> bool:
    """Tell whether a submit that ended like this may have created a task all the same."""
    match error:
        case TransportError(maybe_sent=maybe_sent):
            return maybe_sent
        case ResponseError(status=status):
            return status == 408 or (status >= 500 and status != 503)
        case ProtocolError():
            return True
        case _:
            return False


def may_poll_again(error: FluxError, *, elapsed: float | None) -> bool:
    """Tell whether a failed poll was only a missed look.

    Args:
        error: What the poll came to.
        elapsed: Seconds since the submit; None for a task that was submitted elsewhere.
    """
    match error:
        case TransportError() | RateLimitedError() | ServerError():
            return True
        case TaskNotFoundError():
            return elapsed is not None and elapsed < NOT_VISIBLE_YET
        case ResponseError(status=408):
            return True
        case _:
            return is_unreadable(error)


def is_unreadable(error: FluxError) -> bool:
    """Tell whether a poll was answered, but with nothing that can be read as a task."""
    match error:
        case ProtocolError():
            return True
        case ResponseError(status=status):
            return 200 <= status < 300
        case _:
            return False


def is_fatal_for_batch(error: FluxError) -> bool:
    """Tell whether any further submit with the same key, budget and journal would meet the same refusal."""
    return isinstance(
        error,
        (AuthenticationError, InsufficientBalanceError, PermissionDeniedError, BudgetExceededError, JournalError),
    )


def is_disk_failure(error: FluxError) -> bool:
    """Tell whether any further picture would meet the same disk: it is full, read-only, or not ours to write on."""
    cause = error.__cause__
    return isinstance(error, DownloadError) and isinstance(cause, OSError) and cause.errno in _UNFIT


_UNFIT = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG, errno.EIO, errno.ENOTDIR}


def backoff(failures: int, chance: float) -> float:
    """Give the seconds to wait after so many failures in a row, at least one; doubles up to 15 s.

    Args:
        failures: Failures in a row.
        chance: 0.0 to 1.0, drawn anew each time, so that many callers don't come back in step.
    """
    return min(_BASE_DELAY * 2.0 ** min(failures - 1, 10), _MAX_DELAY) * (0.5 + 0.5 * chance)
