"""The exceptions: their tree, fields and pickling; and the public names of the package."""

import asyncio
import copy
import inspect
import json
import pickle
import re
import subprocess
import sys

import attrs
import pytest

import flux2max_async
from flux2max_async import (
    AuthenticationError,
    BadRequestError,
    BudgetExceededError,
    ConfigurationError,
    ContentModeratedError,
    DeadlineExceededError,
    DownloadError,
    FluxError,
    InFlightLimitError,
    InsufficientBalanceError,
    InvalidRequestError,
    JournalError,
    PermissionDeniedError,
    ProtocolError,
    QueueFullError,
    RateLimitedError,
    ResponseError,
    ResultExpiredError,
    ServerError,
    SessionClosedError,
    StorageError,
    SubmissionUncertainError,
    TaskFailedError,
    TaskNotFoundError,
    TransportError,
    WebhookSignatureError,
    _exceptions,
)

PARENTS: dict[type[FluxError], tuple[type[Exception], ...]] = {
    FluxError: (Exception,),
    InvalidRequestError: (FluxError, ValueError),
    ConfigurationError: (FluxError,),
    SessionClosedError: (FluxError,),
    QueueFullError: (FluxError,),
    TransportError: (FluxError,),
    ProtocolError: (FluxError,),
    ResponseError: (FluxError,),
    BadRequestError: (ResponseError,),
    AuthenticationError: (ResponseError,),
    InsufficientBalanceError: (ResponseError,),
    PermissionDeniedError: (ResponseError,),
    TaskNotFoundError: (ResponseError,),
    RateLimitedError: (ResponseError,),
    ServerError: (ResponseError,),
    TaskFailedError: (FluxError,),
    ContentModeratedError: (TaskFailedError,),
    DeadlineExceededError: (FluxError, TimeoutError),
    SubmissionUncertainError: (FluxError,),
    BudgetExceededError: (FluxError,),
    JournalError: (FluxError,),
    InFlightLimitError: (FluxError,),
    WebhookSignatureError: (FluxError,),
    DownloadError: (FluxError,),
    ResultExpiredError: (DownloadError,),
    StorageError: (DownloadError,),
}

RESPONSE_FIELDS: dict[str, object] = {
    "status": 429,
    "code": "too_many",
    "request_id": "r-1",
    "retry_after": 2.5,
    "from_api": False,
}
TASK_FIELDS: dict[str, object] = {"task_id": "t1", "code": "boom"}

FIELDS: dict[type[FluxError], dict[str, object]] = {
    FluxError: {},
    InvalidRequestError: {"field": "width"},
    ConfigurationError: {},
    SessionClosedError: {},
    QueueFullError: {"waiting": 100, "retry_after": 2.5},
    TransportError: {"maybe_sent": False},
    ProtocolError: {},
    ResponseError: RESPONSE_FIELDS,
    BadRequestError: RESPONSE_FIELDS,
    AuthenticationError: RESPONSE_FIELDS,
    InsufficientBalanceError: RESPONSE_FIELDS,
    PermissionDeniedError: RESPONSE_FIELDS,
    TaskNotFoundError: RESPONSE_FIELDS,
    RateLimitedError: RESPONSE_FIELDS,
    ServerError: RESPONSE_FIELDS,
    TaskFailedError: TASK_FIELDS,
    ContentModeratedError: TASK_FIELDS,
    DeadlineExceededError: {"task_id": "t1"},
    SubmissionUncertainError: {},
    BudgetExceededError: {},
    JournalError: {},
    InFlightLimitError: {},
    WebhookSignatureError: {},
    DownloadError: {},
    ResultExpiredError: {},
    StorageError: {},
}

PUBLIC = {
    "ApiKey",
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
    "GenerationParams",
    "GenerationRequest",
    "GenerationTask",
    "HeadersLike",
    "ImageDownload",
    "ImageSource",
    "InFlightLimit",
    "InFlightLimitError",
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
    "PostgresInFlightLimit",
    "PostgresJournal",
    "ProtocolError",
    "QueueFullError",
    "QueuedGeneration",
    "RateLimitedError",
    "ResponseError",
    "ResultExpiredError",
    "ServerError",
    "SessionClosedError",
    "SessionHealth",
    "SessionOptions",
    "SessionStats",
    "SqliteInFlightLimit",
    "SqliteJournal",
    "StorageError",
    "SubmissionUncertainError",
    "SupportsImageSave",
    "TaskFailedError",
    "TaskNotFoundError",
    "TaskSnapshot",
    "TaskStatus",
    "TransportError",
    "Usage",
    "WebhookInbox",
    "WebhookSignatureError",
    "outcome_from_dict",
    "__version__",
}


def create_error(error_type: type[FluxError]) -> FluxError:
    """Return an error of a class, with all its fields."""
    error = error_type("it went wrong", **FIELDS[error_type])
    error.stops_stream = True
    return error


def documented_tree() -> dict[str, str | None]:
    """Return the tree in the module's docstring: the parent of each class."""
    tree: dict[str, str | None] = {}
    ancestors: list[tuple[int, str]] = []
    for line in inspect.getdoc(_exceptions).splitlines():  # type: ignore[union-attr]
        if match := re.match(r"    ([ │├└─]*)([A-Z][A-Za-z]+Error)\b", line):
            depth, name = len(match[1]), match[2]
            while ancestors and ancestors[-1][0] >= depth:
                ancestors.pop()
            tree[name] = ancestors[-1][1] if ancestors else None
            ancestors.append((depth, name))
    return tree


every_class = pytest.mark.parametrize("error_type", PARENTS, ids=lambda error_type: error_type.__name__)

# ---------------------------------------------------------------------- the tree


@every_class
def test_the_bases_of_an_error_are_part_of_the_api(error_type: type[FluxError]) -> None:
    """Each class has exactly the documented base classes."""
    assert error_type.__bases__ == PARENTS[error_type]


def test_the_docstring_shows_the_whole_tree() -> None:
    """The tree in the module's docstring contains every class of the module, below its parent, and nothing else."""
    defined = [cls for cls in vars(_exceptions).values() if inspect.isclass(cls) and issubclass(cls, FluxError)]
    tree = {cls.__name__: None if cls is FluxError else cls.__bases__[0].__name__ for cls in defined}

    assert documented_tree() == tree
    assert set(defined) == set(PARENTS)


def test_an_invalid_request_is_a_value_error() -> None:
    """`except ValueError` catches the error about an invalid parameter."""
    error = InvalidRequestError("width must be at least 64", field="width")

    with pytest.raises(ValueError, match="width must be at least 64"):
        raise error


def test_a_missed_deadline_is_a_timeout() -> None:
    """`except TimeoutError`, by either of its names, catches the error, which has the task's id."""
    with pytest.raises(asyncio.TimeoutError) as caught:
        raise DeadlineExceededError("too late", task_id="t1")

    assert isinstance(caught.value, TimeoutError)
    assert caught.value.task_id == "t1"  # type: ignore[attr-defined]


# ---------------------------------------------------------------------- one error


@every_class
def test_an_error_has_its_message_and_fields(error_type: type[FluxError]) -> None:
    """The text of an error begins with its message, and every field is an attribute."""
    error = create_error(error_type)

    assert error.message == "it went wrong"
    assert str(error).startswith("it went wrong")
    assert {name: getattr(error, name) for name in FIELDS[error_type]} == FIELDS[error_type]


@every_class
def test_an_error_survives_pickle_and_copy(error_type: type[FluxError]) -> None:
    """A copied or unpickled error has the same class, message and fields."""
    error = create_error(error_type)
    copies = [pickle.loads(pickle.dumps(error, protocol)) for protocol in range(pickle.HIGHEST_PROTOCOL + 1)]
    copies += [copy.copy(error), copy.deepcopy(error)]

    for copied in copies:
        assert type(copied) is error_type
        assert str(copied) == str(error)
        assert vars(copied) == vars(error)
        assert copied.args == error.args


@every_class
def test_an_error_can_be_raised_chained_and_noted(error_type: type[FluxError]) -> None:
    """An error has a cause, notes and a traceback like any exception."""
    cause = OSError("disconnected")
    error = create_error(error_type)
    error.add_note("while testing")

    with pytest.raises(error_type) as caught:
        raise error from cause

    assert caught.value is error
    assert error.__cause__ is cause
    assert error.__traceback__ is not None
    assert error.__notes__ == ["while testing"]


def test_errors_are_compared_by_identity() -> None:
    """Two errors with equal messages are not equal, and errors can be members of sets."""
    errors = {FluxError("same"), FluxError("same")}

    assert len(errors) == 2


@every_class
def test_only_the_message_is_positional(error_type: type[FluxError]) -> None:
    """Every field other than the message is keyword-only."""
    positional = [field.name for field in attrs.fields(error_type) if field.init and not field.kw_only]

    assert positional == ["message"]


def test_unknown_fields_are_none() -> None:
    """What the service doesn't report is None; a failed HTTP request counts as sent unless the contrary is certain."""
    response_error, task_error = ResponseError("no", status=500), TaskFailedError("no")

    assert (response_error.code, response_error.request_id, response_error.retry_after) == (None, None, None)
    assert (task_error.task_id, task_error.code) == (None, None)
    assert DeadlineExceededError("late").task_id is None
    assert TransportError("lost").maybe_sent is True
    assert response_error.from_api is True
    assert response_error.stops_stream is False


# ---------------------------------------------------------------------- the package


def test_the_package_exports_exactly_the_public_names() -> None:
    """`__all__` contains each public name once, and nothing else, and each can be imported."""
    exported = {name: getattr(flux2max_async, name) for name in flux2max_async.__all__}

    assert set(exported) == PUBLIC
    assert len(flux2max_async.__all__) == len(PUBLIC)
    assert all(exported[error_type.__name__] is error_type for error_type in PARENTS)
    assert set(dir(flux2max_async)) >= PUBLIC


def test_an_unknown_name_is_an_attribute_error() -> None:
    """A misspelt name is the usual AttributeError of a module."""
    with pytest.raises(AttributeError, match=r"module 'flux2max_async' has no attribute 'FluxSesion'"):
        _ = flux2max_async.FluxSesion


def test_importing_the_package_does_not_start_an_http_client() -> None:
    """Importing the package imports neither aiohttp nor anyio; the first public name does, and then all are available."""
    script = """
import json, sys
import flux2max_async
before = sorted({"aiohttp", "anyio", "flux2max_async._session"} & set(sys.modules))
from flux2max_async import *
after = sorted({"aiohttp", "anyio", "flux2max_async._session"} & set(sys.modules))
print(json.dumps([before, after, sorted(set(flux2max_async.__all__) & set(globals()))]))
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True, text=True)
    before, after, names = json.loads(run.stdout)

    assert before == []
    assert after == ["aiohttp", "anyio", "flux2max_async._session"]
    assert set(names) == PUBLIC


def test_public_modules_are_attributes_of_the_package() -> None:
    """`flux2max_async.webhooks`, `.journal` and `.limits` need no import of their own."""
    script = (
        "import flux2max_async as f; print(f.webhooks.verify.__name__, f.journal.Journal.__name__, f.limits.__name__)"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)

    assert result.stdout.split() == ["verify", "Journal", "flux2max_async.limits"]
