"""The exceptions: one tree, so that `FluxError` catches all of them and each branch what can be handled alike.

    FluxError
     ├── InvalidRequestError        a parameter is wrong; nothing was sent             (also a ValueError)
     ├── ConfigurationError         a setting of the session is missing or wrong
     ├── SessionClosedError         the session was not entered, or is closed
     ├── QueueFullError             as many requests as may wait for a slot are waiting; nothing was sent
     ├── TransportError             no response: no connection, a reset, a timeout
     ├── ProtocolError              a response that doesn't follow the protocol
     ├── ResponseError              an error response
     │    ├── BadRequestError            400, 422, and any other 4xx without a class of its own
     │    ├── AuthenticationError        401
     │    ├── InsufficientBalanceError   402, and any 4xx whose code or words say so
     │    ├── PermissionDeniedError      any other 403
     │    ├── TaskNotFoundError          404
     │    ├── RateLimitedError           429
     │    └── ServerError                5xx
     ├── TaskFailedError            the service reports that the task failed, or refuses its content
     │    └── ContentModeratedError      moderation refused it; the same request would be refused again
     ├── DeadlineExceededError      the task took too long; attach() it later          (also a TimeoutError)
     ├── SubmissionUncertainError   the response to a submit was lost: a task may exist, and may cost money
     ├── BudgetExceededError        the budget doesn't allow another image; nothing was sent
     ├── JournalError               the journal can't be read or written
     ├── InFlightLimitError         the limit that several processes share can't be asked; nothing was sent
     ├── WebhookSignatureError      a webhook's signature is missing or wrong, or it is too old
     └── DownloadError              an image could not be saved
          ├── StorageError               the folder, disk or bucket refuses it
          └── ResultExpiredError         its URL has expired, and the service gave no new one

Errors carry facts, not policy: `_api.retry` reads the facts and decides. All of them can be pickled.
"""

from functools import partial
from typing import Any, Literal

import attrs

ConnectionFault = Literal["certificate", "tls", "unknown_host", "proxy"]
"""Why there was no connection, if the reason is one that lasts: the certificate is not trusted or is another host's;
the far end doesn't speak TLS, or not in a way that both support; there is no host of this name; the proxy refuses, for
example with a 407."""


# Exceptions have no slots: OSError and ValueError have layouts of their own, and a FluxError may be either. Classes
# without fields of their own are not decorated: that would cost 0.4 ms of import time for each.
@attrs.define(slots=False, eq=False)
class FluxError(Exception):
    """The base class of every error that this library raises."""

    message: str
    task_id: str | None = attrs.field(default=None, init=False, repr=False)
    """The task that the error is about, if there is one: `session.attach(task_id)` follows it again."""
    stops_stream: bool = attrs.field(default=False, init=False, repr=False)
    """Whether it was the last of several in a row that show that further submits would end in the same way."""

    def __str__(self) -> str:
        return self.message

    def __reduce__(self) -> tuple[Any, ...]:
        # BaseException's own would pass all fields by position.
        fields = {field.name: getattr(self, field.name) for field in attrs.fields(type(self)) if field.init}
        return partial(type(self), **fields), (), self.__dict__


@attrs.define(slots=False, eq=False)
class InvalidRequestError(FluxError, ValueError):
    """A parameter is wrong; nothing was sent."""

    field: str = attrs.field(kw_only=True)
    """The wrong parameter: a field of `GenerationRequest`, or an argument's name."""


class ConfigurationError(FluxError):
    """A setting is missing or wrong: no key, a malformed key, an unsafe base_url, a limit out of range."""


class SessionClosedError(FluxError):
    """The session is not open: it was not entered, or was closed before the outcome was known."""


@attrs.define(slots=False, eq=False)
class QueueFullError(FluxError):
    """As many requests as `max_waiting` are waiting for a slot; nothing was sent."""

    waiting: int = attrs.field(kw_only=True)
    """Requests that wait for a slot."""
    retry_after: float | None = attrs.field(default=None, kw_only=True)
    """Seconds until those that wait have a slot, by the durations that the schedule has learned: for a Retry-After
    header. None if no task has completed yet, or the schedule doesn't learn."""


@attrs.define(slots=False, eq=False)
class TransportError(FluxError):
    """There was no response: no connection, a reset, a TLS failure or a timeout."""

    maybe_sent: bool = attrs.field(default=True, kw_only=True)
    """False if it is certain that the service got nothing of the HTTP request."""
    fault: ConnectionFault | None = attrs.field(default=None, kw_only=True)
    """Why there was no connection, if further attempts will probably fail in the same way: "certificate", "tls",
    "unknown_host" or "proxy"."""


class ProtocolError(FluxError):
    """The response doesn't follow the protocol."""


@attrs.define(slots=False, eq=False)
class ResponseError(FluxError):
    """The service responded with an HTTP error, or with a 200 that holds an error and no task id."""

    status: int = attrs.field(kw_only=True)
    """The HTTP status."""
    code: str | None = attrs.field(default=None, kw_only=True)
    """The service's own error code, as text."""
    request_id: str | None = attrs.field(default=None, kw_only=True)
    """The service's id of the HTTP request, for its support."""
    retry_after: float | None = attrs.field(default=None, kw_only=True)
    """Seconds to wait before the next attempt, if the service requested it."""
    from_api: bool = attrs.field(default=True, kw_only=True, repr=False)
    """False if the body has none of the API's formats, like the page of a proxy or firewall. Such an answer reveals
    nothing about the account or the task."""

    def __str__(self) -> str:
        code = f", code {self.code}" if self.code else ""
        request_id = f", request {self.request_id}" if self.request_id else ""
        return f"{self.message} (HTTP {self.status}{code}{request_id})"


class BadRequestError(ResponseError):
    """The service refused a parameter (400, 422), or the request for a reason without a class of its own."""


class AuthenticationError(ResponseError):
    """The API key is missing or wrong (401)."""


class InsufficientBalanceError(ResponseError):
    """The account can't pay for another image (402, and any 4xx whose code or words say so)."""


class PermissionDeniedError(ResponseError):
    """The API key may not be used for this (403)."""


class TaskNotFoundError(ResponseError):
    """The service knows no task with this id (404)."""


class RateLimitedError(ResponseError):
    """Too many HTTP requests, or too many tasks in flight (429)."""


class ServerError(ResponseError):
    """The service itself failed (5xx)."""


@attrs.define(slots=False, eq=False)
class TaskFailedError(FluxError):
    """The service reports that the task failed, or refused its content at the submit."""

    task_id: str | None = attrs.field(default=None, kw_only=True)
    """None if the content was refused at the submit."""
    code: str | None = attrs.field(default=None, kw_only=True)
    """The service's own error code, as text."""


class ContentModeratedError(TaskFailedError):
    """Moderation refused the prompt, an input image or the result; the same request would be refused again."""


@attrs.define(slots=False, eq=False)
class DeadlineExceededError(FluxError, TimeoutError):
    """The task did not end within the session's `task_timeout`, or the call within its `timeout`."""

    task_id: str | None = attrs.field(default=None, kw_only=True)
    """`session.attach(task_id)` follows the task again later: it is paid for. None if there is no task yet."""


class SubmissionUncertainError(FluxError):
    """A submit was sent and its response was lost: the task may exist, and may cost money.

    This library never repeats such a submit; whether to risk a second payment is the caller's decision.
    """


class BudgetExceededError(FluxError):
    """The budget doesn't allow another image, given what is spent and reserved; nothing was sent."""


@attrs.define(slots=False, eq=False)
class JournalError(FluxError):
    """The journal can't be opened, read or written: a disk failure, another program, or an unexpected content."""

    key: str | None = attrs.field(default=None, kw_only=True)
    """The key of the only request that the error is about, if its entry is damaged and the others are not."""


class InFlightLimitError(FluxError):
    """The limit that several processes share can't be opened or asked: its file is damaged, say, or locked for 30 s.

    Nothing is submitted without a slot.
    """


class WebhookSignatureError(FluxError):
    """The signature of a webhook is missing, malformed or wrong, or the webhook is too old."""


class DownloadError(FluxError):
    """An image could not be downloaded or written; there is no file under the target's name."""


class StorageError(DownloadError):
    """The folder, disk or bucket refuses an image; nothing of it is left there."""


class ResultExpiredError(DownloadError):
    """The image's URL has expired, and the service gave no new one that works."""
