"""Requests, outcomes, snapshots and statistics as JSON, and back."""

import json
import math
from collections.abc import Mapping
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import attrs
import httpx
import pytest
from fastapi import FastAPI
from hypothesis import given, settings
from hypothesis import strategies as st
from support.responses import picture
from support.strategies import JSON

import flux2max_async
from flux2max_async import (
    BadRequestError,
    Completed,
    ConfigurationError,
    ContentModeratedError,
    Failed,
    FluxError,
    GeneratedImage,
    GenerationRequest,
    InvalidRequestError,
    JournalEntry,
    Outcome,
    QueueFullError,
    SessionStats,
    TaskFailedError,
    TaskSnapshot,
    TaskStatus,
    TransportError,
    Usage,
    outcome_from_dict,
)
from flux2max_async._config import NoKeyError
from flux2max_async._models.outcome_dict import _READERS
from flux2max_async._models.serialization import VERSION

SECRET = "hush-7f3a9c"
RECEIVED = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
IMAGE = GeneratedImage(
    url="https://a.example/?signed", type="image", task_id="t1", extra={"jobId": "j"}, index=1, received_at=RECEIVED
)
REQUEST = GenerationRequest(
    "a lighthouse",
    input_images=["https://a.example/a.png", picture(), picture("JPEG"), Path("local.png"), IMAGE],
    seed=7,
    width=1024,
    height=0,
    safety_tolerance=0,
    output_format="png",
    webhook_url="https://app.example/hook",
    extra={"steps": 4, "nested": [{"a": None}]},
    key="row 1",
)
COMPLETED = Completed(
    task_id="t1",
    request=REQUEST,
    images=(IMAGE, attrs.evolve(IMAGE, index=2, received_at=None)),
    usage=Usage(cost=Decimal("0.070"), discount=None, extra={"currency": "USD"}),
    metadata={"region": "eu", "list": (1, 2.5)},
    partial_error=ContentModeratedError("refused", task_id="t1", code="m"),
    elapsed=8.25,
    polls=3,
    replayed=True,
    saved=(Path("pictures/a.png"),),
    save_error=FluxError("disk full"),
    journal_error=FluxError("disk full"),
)
FAILED = Failed(task_id="t1", request=REQUEST, error=TaskFailedError("gave up", task_id="t1", code="boom"), elapsed=1.5)


def through_json(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return what another program reads."""
    return json.loads(json.dumps(data, allow_nan=False))  # type: ignore[no-any-return]


# ---------------------------------------------------------------------- requests


def test_a_request_comes_back_equal() -> None:
    """A request without secrets is the same after a way through JSON, if paths are accepted."""
    restored = GenerationRequest.from_dict(through_json(REQUEST.to_dict()), allow_files=True)

    assert restored == REQUEST
    assert restored.input_images[4].source == IMAGE
    assert GenerationRequest.from_dict(GenerationRequest("x").to_dict()) == GenerationRequest("x")


def test_only_what_is_set_is_in_the_dict() -> None:
    """The dict of a request has its version and what the caller has set, as JSON has it."""
    assert GenerationRequest("a cat").to_dict() == {"version": 1, "prompt": "a cat"}
    assert GenerationRequest("a cat", seed=0, output_format="png", extra={"a": 1}).to_dict() == {
        "version": 1, "prompt": "a cat", "seed": 0, "output_format": "png", "extra": {"a": 1},
    }  # fmt: skip


def test_the_secret_is_in_the_dict_only_if_it_is_asked_for() -> None:
    """With `secrets=True`, the request comes back with its secret; without, there is none in the dict."""
    request = attrs.evolve(REQUEST, webhook_secret=SECRET)
    kept = through_json(request.to_dict(secrets=True))

    assert SECRET not in json.dumps(request.to_dict())
    assert GenerationRequest.from_dict(request.to_dict(), allow_files=True) == REQUEST
    assert GenerationRequest.from_dict(kept, allow_files=True) == request
    assert type(request.to_dict(secrets=True)["webhook_secret"]) is str


def test_a_changed_dict_changes_nothing() -> None:
    """The dict is a copy: the request is immutable."""
    request = GenerationRequest("a cat", extra={"a": [1]})
    request.to_dict()["extra"]["a"].append(2)

    assert request.extra == {"a": [1]}


@pytest.mark.parametrize("image", ["local.png", "/etc/passwd", {"path": "/etc/passwd"}, "file:///etc/passwd", "."])
def test_a_path_needs_permission(image: object) -> None:
    """What came in from the web can't make the library read the server's disk."""
    data = {"prompt": "a cat", "input_images": ["https://a.example/", image]}
    with pytest.raises(InvalidRequestError, match=r"input_images\[1\]: .*allow_files=True") as caught:
        GenerationRequest.from_dict(data)
    allowed = GenerationRequest.from_dict(data, allow_files=True)

    assert caught.value.field == "input_images"
    assert allowed.input_images[1].source == Path(image["path"] if isinstance(image, dict) else str(image))


IMAGE_DATA = {"url": "https://a.example/", "type": "image", "task_id": "t1", "extra": {}, "index": 0}


@pytest.mark.parametrize(
    ("data", "field"),
    [
        ({}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": 7}, "prompt"),
        ({"prompt": "x", "widht": 3}, "widht"),
        ({"prompt": "x", "timeout": 3}, "timeout"),
        ({"prompt": "x", 7: 3}, "7"),
        ({"prompt": "x", "width": "big"}, "width"),
        ({"prompt": "x", "version": 2}, "version"),
        ({"prompt": "x", "version": 0}, "version"),
        ({"prompt": "x", "version": "1"}, "version"),
        ({"prompt": "x", "version": True}, "version"),
        ({"prompt": "x", "version": None}, "version"),
        ({"prompt": "x", "input_images": "https://a.example/"}, "input_images"),
        ({"prompt": "x", "input_images": [7]}, "input_images"),
        ({"prompt": "x", "input_images": [Path("a.png")]}, "input_images"),
        ({"prompt": "x", "input_images": ["data:image/png;base64,AAAA"]}, "input_images"),
        ({"prompt": "x", "input_images": [{}]}, "input_images"),
        *(
            ({"prompt": "x", "input_images": [{**IMAGE_DATA, **change}]}, "input_images")
            for change in (
                {"url": None}, {"url": "file:///x"}, {"task_id": ""}, {"task_id": 7}, {"index": -1}, {"index": "0"},
                {"index": True},
                {"extra": None}, {"received_at": "yesterday"}, {"received_at": 7},
            )
        ),
        ([], "request"),
        ("a cat", "request"),
        (None, "request"),
    ],
)  # fmt: skip
def test_a_wrong_request_is_refused(data: Any, field: str) -> None:
    """Names that are unknown and values that are wrong are errors: they may be typos, and cost money."""
    with pytest.raises(InvalidRequestError) as caught:
        GenerationRequest.from_dict(data)

    assert caught.value.field == field


def test_errors_of_a_dict_help() -> None:
    """The errors say what was meant, and that a later release is needed."""
    with pytest.raises(InvalidRequestError, match=r"no parameter widht: did you mean width\?"):
        GenerationRequest.from_dict({"prompt": "x", "widht": 3})
    with pytest.raises(InvalidRequestError, match="the request has version 2, of a later release of flux2max_async"):
        GenerationRequest.from_dict({"prompt": "x", "version": VERSION + 1})
    with pytest.raises(InvalidRequestError, match="the outcome has version 7"):
        outcome_from_dict({**COMPLETED.to_dict(), "version": 7})


def test_null_means_not_set() -> None:
    """Clients that send null for what is not set are understood."""
    names = ["input_images", *(field.name for field in attrs.fields(GenerationRequest) if field.name != "prompt")]

    assert GenerationRequest.from_dict({"prompt": "x", **dict.fromkeys(names)}) == GenerationRequest("x")


# ---------------------------------------------------------------------- outcomes


@pytest.mark.parametrize(
    "outcome",
    [
        COMPLETED,
        FAILED,
        Completed(task_id="t1", images=(IMAGE,)),
        Failed(error=FluxError("lost")),
        Failed(error=BadRequestError("no", status=400, code="c", request_id="r", retry_after=1.5, from_api=False)),
        Failed(error=TransportError("no", maybe_sent=False, fault="tls")),
        Failed(error=QueueFullError("full", waiting=3, retry_after=2.0)),
        Failed(error=InvalidRequestError("no", field="seed")),
    ],
)
def test_an_outcome_comes_back_with_the_same_dict(outcome: Outcome) -> None:
    """An outcome has the same dict after a way through JSON, and an error of the same class with the same fields."""
    data = through_json(outcome.to_dict())
    restored = outcome_from_dict(data)

    assert data == outcome.to_dict()
    assert data["version"] == 1
    assert restored.to_dict() == data
    assert type(restored) is type(outcome)
    if isinstance(outcome, Failed):
        assert isinstance(restored, Failed)
        assert type(restored.error) is type(outcome.error)
        assert vars(restored.error) == vars(outcome.error)
        assert str(restored.error) == str(outcome.error)
    else:
        assert attrs.evolve(restored.unwrap(), partial_error=None, save_error=None, journal_error=None) == attrs.evolve(
            outcome, partial_error=None, save_error=None, journal_error=None, metadata=data["metadata"]
        )


def test_every_field_is_in_the_dict() -> None:
    """The dict of an outcome has each of its fields, and each is read back."""
    assert COMPLETED.to_dict().keys() == {"version", "ok", *(field.name for field in attrs.fields(Completed))}
    assert FAILED.to_dict().keys() == {"version", "ok", *(field.name for field in attrs.fields(Failed))}
    assert _READERS.keys() >= {field.name for cls in (Completed, Failed) for field in attrs.fields(cls)}
    assert COMPLETED.to_dict()["usage"] == {"cost": "0.070", "discount": None, "extra": {"currency": "USD"}}
    assert COMPLETED.to_dict()["saved"] == [str(Path("pictures/a.png"))]
    assert FAILED.to_dict()["error"] == {
        "kind": "TaskFailedError", "message": "gave up", "task_id": "t1", "code": "boom",
    }  # fmt: skip


def test_unknown_names_of_an_outcome_are_ignored() -> None:
    """What a later release adds to an outcome, its request, images and error, doesn't keep it from being read."""
    data = through_json(COMPLETED.to_dict())
    data["request"]["later"] = data["images"][0]["later"] = data["usage"]["later"] = data["later"] = 1
    data["partial_error"]["later"] = 1

    assert outcome_from_dict(data).to_dict() == COMPLETED.to_dict()


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        ({"kind": "LaterError", "message": "new", "code": "c"}, FluxError),
        ({"kind": "Exception", "message": "new"}, FluxError),
        ({"kind": "ResponseError", "message": "new"}, FluxError),  # without a status
        ({"message": "new"}, FluxError),
        ({"kind": "TaskFailedError", "message": "new", "task_id": 7}, TaskFailedError),
    ],
)
def test_an_unknown_error_becomes_a_flux_error(error: dict[str, Any], expected: type[FluxError]) -> None:
    """An error whose class is unknown keeps its message."""
    restored = outcome_from_dict({"ok": False, "error": error})

    assert isinstance(restored, Failed)
    assert (type(restored.error), restored.error.message) == (expected, "new")


def test_an_error_of_another_library_is_named_after_its_known_class() -> None:
    """A subclass that only this program has is written as the class that every program has."""

    class OwnError(TaskFailedError):
        pass

    kinds = [Failed(error=error).to_dict()["error"]["kind"] for error in (OwnError("x"), NoKeyError("x"))]

    assert kinds == ["TaskFailedError", "ConfigurationError"]
    assert issubclass(NoKeyError, ConfigurationError)


def test_a_partial_error_is_that_of_a_task() -> None:
    """Why images are missing is a TaskFailedError, whatever was written."""
    data = {**COMPLETED.to_dict(), "partial_error": {"kind": "FluxError", "message": "odd"}}
    restored = outcome_from_dict(data).unwrap()

    assert type(restored.partial_error) is TaskFailedError
    assert restored.partial_error.message == "odd"


@pytest.mark.parametrize(
    "change",
    [
        {"images": []}, {"images": None}, {"images": [{"url": "x"}]}, {"images": 7}, {"task_id": None}, {"task_id": 7},
        {"usage": {"cost": "much"}}, {"elapsed": "long"}, {"ok": False}, {"request": {"seed": 1}}, {"metadata": 7},
    ],
)  # fmt: skip
def test_what_is_no_outcome_is_refused(change: dict[str, Any]) -> None:
    """A dict that isn't an outcome is an InvalidRequestError."""
    with pytest.raises(InvalidRequestError):
        outcome_from_dict({**COMPLETED.to_dict(), **change})


def test_no_secret_is_in_the_dict_of_an_outcome() -> None:
    """Neither the request's secret nor what the service echoes of it is in the dict, nor what is named like one."""
    echo = {"params": [{"webhook_secret": "other"}], f"is {SECRET}": f"it is {SECRET}", "X-Api_Key": "k", "secret": 7}
    request = attrs.evolve(REQUEST, webhook_secret=SECRET)
    image = attrs.evolve(IMAGE, extra=echo)
    error = TaskFailedError(f"can't sign with {SECRET}", code=SECRET)
    completed = Completed(task_id="t1", request=request, images=(image,), metadata=echo, usage=Usage(extra=echo))
    masked = {"params": [{"webhook_secret": "***"}], "is ***": "***", "X-Api_Key": "***", "secret": 7}

    for values in (completed, attrs.evolve(completed, partial_error=error), Failed(request=request, error=error)):
        assert SECRET not in json.dumps(values.to_dict())
    assert completed.to_dict()["metadata"] == masked | {"is ***": "it is ***"}
    snapshot = TaskSnapshot(task_id="t1", status=TaskStatus.COMPLETED, images=(image,), metadata=echo)
    assert "other" not in json.dumps(snapshot.to_dict())


def test_values_that_json_does_not_have() -> None:
    """Whatever metadata holds, the dict can be written as strict JSON."""
    deep: list[Any] = []
    for _ in range(5000):
        deep = [deep]
    metadata: dict[Any, Any] = {
        "nan": math.nan,
        "inf": -math.inf,
        "date": RECEIVED,
        "path": Path("a"),
        7: {1},
        "deep": deep,
    }
    data = through_json(attrs.evolve(COMPLETED, metadata=metadata).to_dict())["metadata"]

    assert (data["nan"], data["inf"], data["date"], data["path"], data["7"]) == (
        None, None, "2026-01-02T03:04:05+00:00", "a", "{1}",
    )  # fmt: skip
    assert "(nested too deeply)" in json.dumps(data["deep"])


def test_a_time_without_an_offset_is_utc() -> None:
    """The age of a restored image can always be computed."""
    data = {**COMPLETED.to_dict(), "images": [{**IMAGE_DATA, "received_at": "2026-01-02T03:04:05"}]}

    assert outcome_from_dict(data).unwrap().images[0].received_at == RECEIVED


async def test_a_handler_returns_an_outcome() -> None:
    """A handler of FastAPI can return the dict of an outcome; a client in Python reads it."""
    app = FastAPI()

    @app.get("/completed")
    async def completed() -> dict[str, Any]:
        return attrs.evolve(COMPLETED, metadata={"nan": math.nan}).to_dict()

    @app.get("/failed")
    async def failed() -> Any:
        return FAILED.to_dict()

    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://app") as client:
        responses = [await client.get("/completed"), await client.get("/failed")]

    assert [response.status_code for response in responses] == [200, 200]
    assert outcome_from_dict(responses[0].json()).unwrap().images == COMPLETED.images
    assert outcome_from_dict(responses[1].json()).to_dict() == FAILED.to_dict()


# ---------------------------------------------------------------------- properties

TEXTS = st.text(min_size=1, max_size=20)
TIMES = st.none() | st.datetimes(timezones=st.just(UTC))
COSTS = st.none() | st.decimals(allow_nan=False, allow_infinity=False, places=3)
MAPPINGS = st.dictionaries(TEXTS, JSON, max_size=3)
IMAGES = st.builds(
    GeneratedImage,
    url=st.sampled_from(["https://a.example/?x", "data:image/png;base64,iVBORw0KGgo=", "about:blank"]),
    type=TEXTS,
    task_id=TEXTS,
    extra=MAPPINGS,
    index=st.integers(0, 63),
    received_at=TIMES,
)
FINITE_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats(allow_nan=False, allow_infinity=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)
SOURCES = st.sampled_from(["https://a.example/", picture(), picture("GIF"), Path("a b.png")])
# A secret-like name in `extra` of a generated image is masked in dicts.
PLAIN_IMAGES = st.builds(attrs.evolve, IMAGES, extra=st.dictionaries(st.sampled_from(["jobId", "x"]), FINITE_JSON))
SIDES = st.none() | st.just(0) | st.integers(64, 2**63)
REQUESTS = st.builds(
    GenerationRequest,
    TEXTS.filter(str.strip),
    input_images=st.lists(SOURCES | PLAIN_IMAGES, max_size=4),
    seed=st.none() | st.integers(-(2**63), 2**63),
    width=SIDES,
    height=SIDES,
    safety_tolerance=st.none() | st.integers(0, 5),
    output_format=st.sampled_from([None, "png", "jpeg"]),
    webhook_url=st.sampled_from([None, "https://a.example/hook"]),
    extra=st.dictionaries(st.sampled_from(["steps", "a secret", "ä"]), FINITE_JSON, max_size=2),
    key=st.none() | TEXTS,
)
ERRORS = st.builds(
    lambda cls, message, code, task_id: cls(message, code=code, task_id=task_id),
    st.sampled_from([TaskFailedError, ContentModeratedError]),
    TEXTS,
    st.none() | TEXTS,
    st.none() | TEXTS,
)
COMMON: dict[str, Any] = {
    "request": st.none() | REQUESTS,
    "elapsed": st.floats(0, 1e6),
    "polls": st.integers(0, 100),
    "replayed": st.booleans(),
}
OUTCOMES = st.builds(
    Completed,
    task_id=TEXTS,
    images=st.lists(IMAGES, min_size=1, max_size=2).map(tuple),
    usage=st.none() | st.builds(Usage, cost=COSTS, discount=COSTS, extra=MAPPINGS),
    metadata=MAPPINGS,
    partial_error=st.none() | ERRORS,
    saved=st.lists(st.just(Path("a.png")), max_size=2).map(tuple),
    **COMMON,
) | st.builds(Failed, task_id=st.none() | TEXTS, error=ERRORS, **COMMON)


@settings(max_examples=50, deadline=None)
@given(REQUESTS)
def test_any_request_comes_back_equal(request: GenerationRequest) -> None:
    """Every request without secrets is equal to itself after a way through JSON."""
    assert GenerationRequest.from_dict(through_json(request.to_dict()), allow_files=True) == request


@settings(max_examples=50, deadline=None)
@given(OUTCOMES)
def test_any_outcome_comes_back_with_the_same_dict(outcome: Outcome) -> None:
    """Every outcome has the same dict after a way through JSON."""
    data = outcome.to_dict()

    assert outcome_from_dict(json.loads(json.dumps(data))).to_dict() == data


@settings(max_examples=100, deadline=None)
@given(JSON | st.dictionaries(st.sampled_from([*COMPLETED.to_dict(), "error"]), JSON))
def test_any_json_is_an_outcome_or_an_error(data: Any) -> None:
    """Whatever JSON is read, the only error is an InvalidRequestError."""
    for read in (outcome_from_dict, GenerationRequest.from_dict):
        try:
            read(data)
        except InvalidRequestError:
            continue


# ---------------------------------------------------------------------- snapshots, entries, statistics


def test_a_snapshot_as_a_dict() -> None:
    """The dict of a snapshot has all but the answer as it came."""
    error = TaskFailedError("boom", task_id="t1")
    snapshot = TaskSnapshot(
        task_id="t1", status=TaskStatus.FAILED, progress=0.5, error=error, created_at=RECEIVED, raw={"id": "t1"}
    )
    data = through_json(snapshot.to_dict())

    assert data == snapshot.to_dict()
    assert data.keys() == {"version", *(field.name for field in attrs.fields(TaskSnapshot))} - {"raw"}
    assert (data["version"], data["status"], data["progress"], data["created_at"]) == (
        1, "failed", 0.5, "2026-01-02T03:04:05+00:00",
    )  # fmt: skip
    assert data["error"] == {"kind": "TaskFailedError", "message": "boom", "task_id": "t1"}


def test_statistics_as_a_dict() -> None:
    """The dict of a session's counts has each of them, and dollars as text."""
    stats = SessionStats(submitted=3, spent=Decimal("0.210"), median_duration=8.5)
    data = through_json(stats.to_dict())

    assert data == stats.to_dict()
    assert data.keys() == {"version", *(field.name for field in attrs.fields(SessionStats))}
    assert (data["version"], data["submitted"], data["spent"], data["median_duration"]) == (1, 3, "0.210", 8.5)


def test_an_entry_as_a_dict() -> None:
    """The dict of a journal's entry has a version, too."""
    data = JournalEntry(key="k", fingerprint="c1", request={"prompt": "a cat"}).to_dict()

    assert through_json(data) == data
    assert data["version"] == 1


def test_names_are_public() -> None:
    """What reads and writes dicts can be imported from the package."""
    assert flux2max_async.outcome_from_dict is outcome_from_dict
