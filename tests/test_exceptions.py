"""The errors: their tree, their facts, their way through pickle; and the names that the package exports."""

import asyncio
import copy
import inspect
import json
import pickle
import re
import subprocess
import sys

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
    _exceptions,
)

PARENTS: dict[type[FluxError], tuple[type[Exception], ...]] = {
    FluxError: (Exception,),
    InvalidRequestError: (FluxError, ValueError),
    ConfigurationError: (FluxError,),
    SessionClosedError: (FluxError,),
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
    WebhookSignatureError: (FluxError,),
    DownloadError: (FluxError,),
    ResultExpiredError: (DownloadError,),
}

RESPONSE_FACTS: dict[str, object] = {"status": 429, "code": "too_many", "request_id": "r-1", "retry_after": 2.5}
TASK_FACTS: dict[str, object] = {"task_id": "t1", "code": "boom"}

FACTS: dict[type[FluxError], dict[str, object]] = {
    FluxError: {},
    InvalidRequestError: {"field": "width"},
    ConfigurationError: {},
    SessionClosedError: {},
    TransportError: {"maybe_sent": False},
    ProtocolError: {},
    ResponseError: RESPONSE_FACTS,
    BadRequestError: RESPONSE_FACTS,
    AuthenticationError: RESPONSE_FACTS,
    InsufficientBalanceError: RESPONSE_FACTS,
    PermissionDeniedError: RESPONSE_FACTS,
    TaskNotFoundError: RESPONSE_FACTS,
    RateLimitedError: RESPONSE_FACTS,
    ServerError: RESPONSE_FACTS,
    TaskFailedError: TASK_FACTS,
    ContentModeratedError: TASK_FACTS,
    DeadlineExceededError: {"task_id": "t1"},
    SubmissionUncertainError: {},
    BudgetExceededError: {},
    JournalError: {},
    WebhookSignatureError: {},
    DownloadError: {},
    ResultExpiredError: {},
}

PUBLIC = {
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
}


def an_error(kind: type[FluxError]) -> FluxError:
    """Make an error of a kind, with all its facts."""
    return kind("it went wrong", **FACTS[kind])


def drawn_tree() -> dict[str, str | None]:
    """Read the tree that the module's docstring draws: each name with its parent's."""
    tree: dict[str, str | None] = {}
    above: list[tuple[int, str]] = []
    for line in inspect.getdoc(_exceptions).splitlines():  # type: ignore[union-attr]
        if found := re.match(r"    ([ │├└─]*)([A-Z][A-Za-z]+Error)\b", line):
            depth, name = len(found[1]), found[2]
            while above and above[-1][0] >= depth:
                above.pop()
            tree[name] = above[-1][1] if above else None
            above.append((depth, name))
    return tree


every_kind = pytest.mark.parametrize("kind", PARENTS, ids=lambda kind: kind.__name__)

# ---------------------------------------------------------------------- the tree


@every_kind
def test_each_error_stands_where_the_contract_puts_it(kind: type[FluxError]) -> None:
    """The parents of each error are those that the contract names."""
    parents = kind.__bases__

    assert parents == PARENTS[kind]


def test_the_docstring_draws_the_tree_as_it_is() -> None:
    """The tree in the module's docstring has every error of the module, each below its parent, and nothing else."""
    defined = [kind for kind in vars(_exceptions).values() if inspect.isclass(kind) and issubclass(kind, FluxError)]
    tree = {kind.__name__: None if kind is FluxError else kind.__bases__[0].__name__ for kind in defined}

    assert drawn_tree() == tree
    assert set(defined) == set(PARENTS)


def test_an_invalid_request_is_a_value_error() -> None:
    """Who catches ValueError around the building of a request catches ours."""
    error = InvalidRequestError("width must be at least 64", "width")

    with pytest.raises(ValueError, match="width must be at least 64"):
        raise error


def test_a_missed_deadline_is_a_timeout() -> None:
    """Who catches TimeoutError, by whichever name, catches ours, and finds the task's id in it."""
    with pytest.raises(asyncio.TimeoutError) as caught:
        raise DeadlineExceededError("too late", "t1")

    assert isinstance(caught.value, TimeoutError)
    assert caught.value.task_id == "t1"  # type: ignore[attr-defined]


# ---------------------------------------------------------------------- one error


@every_kind
def test_an_error_says_its_message_and_carries_its_facts(kind: type[FluxError]) -> None:
    """The text of an error begins with its message, and every fact is an attribute."""
    error = an_error(kind)

    assert error.message == "it went wrong"
    assert str(error).startswith("it went wrong")
    assert {name: getattr(error, name) for name in FACTS[kind]} == FACTS[kind]


@every_kind
def test_an_error_survives_pickle_and_copy(kind: type[FluxError]) -> None:
    """What comes back from another process, or from copy, is the same kind with the same message and facts."""
    error = an_error(kind)
    twins = [pickle.loads(pickle.dumps(error, protocol)) for protocol in range(pickle.HIGHEST_PROTOCOL + 1)]
    twins += [copy.copy(error), copy.deepcopy(error)]

    for twin in twins:
        assert type(twin) is kind
        assert str(twin) == str(error)
        assert vars(twin) == vars(error)
        assert twin.args == error.args


@every_kind
def test_an_error_can_be_raised_chained_and_noted(kind: type[FluxError]) -> None:
    """An error takes a cause, a note and a traceback, as any exception does."""
    cause = OSError("the cable")
    error = an_error(kind)
    error.add_note("while testing")

    with pytest.raises(kind) as caught:
        raise error from cause

    assert caught.value is error
    assert error.__cause__ is cause
    assert error.__traceback__ is not None
    assert error.__notes__ == ["while testing"]


def test_two_errors_are_two() -> None:
    """Errors are told apart by what they are, not by what they say, so that they can stand in sets and tracebacks."""
    errors = {FluxError("same"), FluxError("same")}

    assert len(errors) == 2


def test_facts_that_nobody_knows_are_none() -> None:
    """Where the service said nothing, the facts are None; a lost call counts as sent until the contrary is certain."""
    refusal = ResponseError("no", 500)

    assert (refusal.code, refusal.request_id, refusal.retry_after) == (None, None, None)
    assert TaskFailedError("no", "t1").code is None
    assert DeadlineExceededError("late").task_id is None
    assert TransportError("lost").maybe_sent is True


# ---------------------------------------------------------------------- the package


def test_the_package_exports_exactly_the_contract() -> None:
    """`__all__` names what the contract names and nothing more, once each, and each name is there."""
    found = {name: getattr(flux2max_async, name) for name in flux2max_async.__all__}

    assert set(found) == PUBLIC
    assert len(flux2max_async.__all__) == len(PUBLIC)
    assert all(found[kind.__name__] is kind for kind in PARENTS)
    assert set(dir(flux2max_async)) >= PUBLIC


def test_a_name_that_is_not_public_is_an_attribute_error() -> None:
    """A misspelt name is told at once, in Python's own words."""
    with pytest.raises(AttributeError, match=r"module 'flux2max_async' has no attribute 'FluxSesion'"):
        _ = flux2max_async.FluxSesion


def test_importing_the_package_does_not_start_an_http_client() -> None:
    """The package alone loads neither aiohttp nor anyio; the first public name does, and then all names are there."""
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


def test_the_rooms_that_are_public_needn_t_be_imported() -> None:
    """`flux2max_async.webhooks` and `flux2max_async.journal` are there as soon as the package is."""
    script = "import flux2max_async as f; print(f.webhooks.verify.__name__, f.journal.SqliteJournal.__name__)"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)

    assert result.stdout.split() == ["verify", "SqliteJournal"]
