"""What can go wrong, as one tree: catch `FluxError` for all of it, or a branch for what you can mend.

    FluxError
     ├── InvalidRequestError        the request is wrong; nothing was sent             (also a ValueError)
     ├── ConfigurationError         the session can't be set up like this
     ├── SessionClosedError         the session is not open (any more)
     ├── TransportError             nothing was answered
     ├── ProtocolError              answered, but not as the protocol says
     ├── ResponseError              answered with an error
     │    ├── BadRequestError            400, 422
     │    ├── AuthenticationError        401
     │    ├── InsufficientBalanceError   402, or a 403 that says so
     │    ├── PermissionDeniedError      any other 403
     │    ├── TaskNotFoundError          404
     │    ├── RateLimitedError           429
     │    └── ServerError                5xx
     ├── TaskFailedError            the service says that the task failed
     │    └── ContentModeratedError      the same prompt won't pass again
     ├── DeadlineExceededError      the task took too long; attach() it later          (also a TimeoutError)
     ├── SubmissionUncertainError   the submit went out, its answer was lost: it may cost money
     ├── BudgetExceededError        the budget doesn't allow another picture; nothing was sent
     ├── JournalError               the journal can't be read or written
     ├── WebhookSignatureError      a delivery wasn't signed with the webhook's secret, or is too old
     └── DownloadError              a picture could not be saved
          └── ResultExpiredError         its url has expired, and no fresh one is to be had

Errors carry facts, not policy: `_retry` reads the facts and decides. All of them can be pickled.
"""

import attrs


# Exceptions stay without slots: OSError and ValueError bring layouts of their own, and a FluxError may be both. Those
# without fields of their own inherit all that attrs makes: making it again costs each 0.4 ms of the import.
@attrs.define(slots=False, eq=False)
class FluxError(Exception):
    """Anything that this library raises for a reason of its own."""

    message: str
    task_id: str | None = attrs.field(default=None, init=False, repr=False)
    """The task that it is about, if there is one: what is paid for can be attached to later."""

    def __str__(self) -> str:
        return self.message


@attrs.define(slots=False, eq=False)
class InvalidRequestError(FluxError, ValueError):
    """The request can't be what the caller meant; nothing was sent."""

    field: str
    """The parameter at fault: a field of `GenerationRequest`, or the argument's name."""


class ConfigurationError(FluxError):
    """The session can't work with these settings: no key, a malformed key, an unsafe address, a senseless limit."""


class SessionClosedError(FluxError):
    """The session is not open: not yet entered, or closed while something was still waited for."""


@attrs.define(slots=False, eq=False)
class TransportError(FluxError):
    """Nothing was answered: no connection, a reset, a TLS failure, or the request timeout."""

    maybe_sent: bool = True
    """False when it is certain that not a byte of the call was written."""


class ProtocolError(FluxError):
    """An answer came, but it is not what the protocol says."""


@attrs.define(slots=False, eq=False)
class ResponseError(FluxError):
    """The gateway answered and said no: an HTTP error, or a 200 that holds an error and no task id."""

    status: int
    """The HTTP status."""
    code: str | None = None
    """The service's own error code, as text."""
    request_id: str | None = None
    """What to tell the service's support."""
    retry_after: float | None = None
    """Seconds the gateway asked us to wait, if it did."""

    def __str__(self) -> str:
        code = f", code {self.code}" if self.code else ""
        request_id = f", request {self.request_id}" if self.request_id else ""
        return f"{self.message} (HTTP {self.status}{code}{request_id})"


class BadRequestError(ResponseError):
    """A parameter is wrong (400, 422)."""


class AuthenticationError(ResponseError):
    """The API key is missing or wrong (401)."""


class InsufficientBalanceError(ResponseError):
    """The account can't pay for another picture (402, or a 403 that says so)."""


class PermissionDeniedError(ResponseError):
    """The key may not do this (403)."""


class TaskNotFoundError(ResponseError):
    """The service knows no such task (404)."""


class RateLimitedError(ResponseError):
    """Too many calls, or too many tasks in flight (429)."""


class ServerError(ResponseError):
    """The service's own fault (5xx)."""


@attrs.define(slots=False, eq=False)
class TaskFailedError(FluxError):
    """The service accepted the task and then failed it."""

    # Always known here, so the type is narrower than the base's.
    task_id: str  # pyright: ignore[reportIncompatibleVariableOverride]
    code: str | None = None


class ContentModeratedError(TaskFailedError):
    """Moderation refused the prompt, an input image or the result: the same request won't pass again."""


@attrs.define(slots=False, eq=False)
class DeadlineExceededError(FluxError, TimeoutError):
    """The task did not end within the session's `deadline`."""

    task_id: str | None = None
    """`session.attach(task_id)` takes it up again later: the work is paid for."""


class SubmissionUncertainError(FluxError):
    """The submit was written and its answer was lost: the task may exist, and may cost money.

    It is never repeated by this library; whether to pay a second time is the caller's decision.
    """


class BudgetExceededError(FluxError):
    """What is spent, plus what tasks in flight will probably cost, leaves too little for another; nothing was sent."""


class JournalError(FluxError):
    """The journal can't be opened, read or written: its disk, another program, or what is in the file."""


class WebhookSignatureError(FluxError):
    """A delivery to a webhook isn't the service's: its signature is missing, malformed or wrong, or it is too old."""


class DownloadError(FluxError):
    """A picture could not be fetched or written; nothing stands under the target's name."""


class ResultExpiredError(DownloadError):
    """The picture's url has expired and the service gave no fresh one that works."""
