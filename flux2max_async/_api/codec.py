"""Serialization: requests to HTTP requests, HTTP responses to task snapshots.

Sources of facts: [S] the vendor's page for the model, [C] the vendor's open-source clients, [D] the vendor's other
pages, [B] the documentation of BFL, the maker of the model, whose service processes the requests. If these sources
differ, all variants are accepted. A response that can't be parsed is a ProtocolError with the JSON path.
"""

import contextlib
import json
import re
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from decimal import Decimal, InvalidOperation
from typing import Any, TypeVar
from urllib.parse import quote

import attrs
import cattrs
from cattrs.gen import make_dict_structure_fn, make_dict_unstructure_fn, override

from flux2max_async._api.response import (
    HttpResponse,
    error_from_response,
    extract_error,
    parse_finite,
    parse_json_object,
    redact,
)
from flux2max_async._exceptions import ContentModeratedError, InvalidRequestError, ProtocolError, TaskFailedError
from flux2max_async._models.images import error_at_index
from flux2max_async._models.request import IMAGE_PARAMETERS, GenerationRequest
from flux2max_async._models.results import GeneratedImage, TaskSnapshot, TaskStatus, Usage

MODEL = "flux_2_max"

# As in [C] and [D].
_GENERATION_PATH = "/model/v1/generation"
_TASK_PATH = "/model/v1/generation/task/"

_MAX_DECIMAL_EXPONENT = 50
"""No price is that large, and adding such a number to others would raise an error."""

T = TypeVar("T")


@attrs.frozen
class HttpRequest:
    """An HTTP request to the API."""

    method: str
    path: str
    """Percent-encoded, relative to the base URL."""
    body: bytes | None = attrs.field(default=None, repr=False)


# ------------------------------------------------------------------ requests


def build_submit(request: GenerationRequest) -> HttpRequest:
    """Return the submit of a request.

    Reads and encodes local images: if there are any, call this in a worker thread.

    Raises:
        InvalidRequestError: A local image is missing, empty, too large or of a type that the service doesn't accept.
    """
    params: dict[str, Any] = _converter.unstructure(request)
    for index, (name, image) in enumerate(zip(IMAGE_PARAMETERS, request.input_images, strict=False)):
        try:
            params[name] = image.encode()
        except InvalidRequestError as error:
            raise error_at_index(error, index) from error.__cause__
    params.update((name, value) for name, value in request.extra.items() if value is not None)
    return HttpRequest("POST", _GENERATION_PATH, json.dumps({"model": MODEL, "input": [{"params": params}]}).encode())


def validate_task_id(task_id: str) -> str:
    """Return the task id.

    Raises:
        InvalidRequestError: It can't be one.
    """
    if not isinstance(task_id, str) or not task_id:
        raise InvalidRequestError(f"task_id must be text that is not empty, not {task_id!r}", field="task_id")
    return task_id


def build_poll(task_id: str) -> HttpRequest:
    """Return the poll of a task.

    Task ids are opaque: slashes are percent-encoded, and so are ids that would be relative path segments.
    """
    encoded = quote(task_id, safe="", errors="surrogatepass")
    return HttpRequest("GET", _TASK_PATH + (encoded.replace(".", "%2E") if task_id in {".", ".."} else encoded))


# ------------------------------------------------------------------ responses


def parse_submit(response: HttpResponse) -> TaskSnapshot:
    """Parse the response to a submit.

    If it has a task id, no other part of it can cause an error, because the task exists and costs money.

    Raises:
        ResponseError: The service refused the submit.
        ProtocolError: The response has neither an id nor an error, so it is unknown whether a task exists.
    """
    if not 200 <= response.status < 300:
        raise error_from_response(response)
    body = _parse_body(response)
    if (task_id := task_id_of(body)) is None:
        if extract_error(body) is not None:
            # [C] A response without an id is a refusal, whatever its HTTP status.
            raise error_from_response(response)
        raise ProtocolError("the response to the submit has neither a task id nor an error")
    try:
        return snapshot_from_json(task_id, body, raw=body, secrets=response.secrets)
    except ProtocolError:
        return TaskSnapshot(task_id=task_id, status=TaskStatus.IN_PROGRESS, raw=body)


def parse_poll(response: HttpResponse, task_id: str) -> TaskSnapshot:
    """Parse the response to a poll.

    Raises:
        ResponseError: The service responded with an error.
        ProtocolError: The response can't be parsed as a task.
    """
    if not 200 <= response.status < 300:
        raise error_from_response(response)
    body = _parse_body(response)
    if not isinstance(body.get("status"), str) and extract_error(body) is not None:
        raise error_from_response(response)
    return snapshot_from_json(task_id, body, raw=body, secrets=response.secrets)


# ------------------------------------------------------------------ the task object

# Intermediate values, discarded after parsing: frozen classes would make each response and the import slower.


@attrs.define(eq=False, repr=False)
class _Content:
    url: str | None = None
    type: str = "image"
    extra: Mapping[str, Any] = attrs.field(factory=dict[str, Any])


@attrs.define(eq=False, repr=False)
class _Group:
    content: list[_Content] = attrs.field(factory=list[_Content])


@attrs.define(eq=False, repr=False)
class _Task:
    """The fields of the task object [S], [C] that are parsed."""

    status: str
    progress: float | None = None
    created_at: datetime | None = None
    output: list[_Group] = attrs.field(factory=list[_Group])
    usage: Usage | None = None
    metadata: Mapping[str, Any] = attrs.field(factory=dict[str, Any])


def _parse_body(response: HttpResponse) -> dict[str, Any]:
    """Return the JSON object in a response.

    Raises:
        ProtocolError: There is none.
    """
    body: object = None
    with contextlib.suppress(ValueError, RecursionError):
        body = json.loads(response.body)
    return body if isinstance(body, dict) else parse_json_object(response)


def task_id_of(body: Mapping[str, Any]) -> str | None:
    """Return the task id in a response, as text; None if there is none."""
    match body.get("id"):
        case str(task_id) if task_id:
            return task_id
        case int(number) if not isinstance(number, bool):
            return str(number)
        case _:
            return None


def snapshot_from_json(
    task_id: str, body: Mapping[str, Any], *, raw: Mapping[str, Any], secrets: tuple[str, ...]
) -> TaskSnapshot:
    """Parse a task object.

    Args:
        task_id: The id of the task.
        body: The task object.
        raw: The original JSON, which becomes the snapshot's `raw`.
        secrets: Texts to redact in the task's error, in case the service echoes them.

    Raises:
        ProtocolError: It can't be parsed, or reports the task as completed without an output or an error.
    """
    try:
        task = _converter.structure(body, _Task)
    except (cattrs.BaseValidationError, TypeError, ValueError, RecursionError) as cause:
        details = "; ".join(cattrs.transform_error(cause, "$"))
        raise ProtocolError(f"task {task_id}: the response is unreadable: {details}") from cause
    contents = [content for group in task.output for content in group.content if content.url]
    images = tuple(
        GeneratedImage(url=content.url or "", type=content.type, task_id=task_id, extra=content.extra, index=index)
        for index, content in enumerate(contents)
    )
    status = status_of(task.status) or TaskStatus.IN_PROGRESS
    error: TaskFailedError | None = None
    if status is TaskStatus.FAILED or (status is TaskStatus.COMPLETED and not images):
        if status is TaskStatus.COMPLETED and not body.get("error"):
            raise ProtocolError(f"task {task_id} is reported as completed, but has no output")
        status = TaskStatus.FAILED
        code, message = extract_error(body) or (None, "the service gave no reason")
        error = _task_error(task_id, code and redact(code, secrets), redact(message, secrets))
    return TaskSnapshot(
        task_id=task_id,
        status=status,
        progress=task.progress,
        images=images,
        usage=task.usage,
        created_at=task.created_at,
        error=error,
        metadata=task.metadata,
        raw=raw,
    )


def status_of(text: str) -> TaskStatus | None:
    """Return the status with a name, which is case-insensitive; None if it is unknown."""
    return _STATUSES.get(text.strip().lower())


_STATUSES = {status.value: status for status in TaskStatus} | {"processing": TaskStatus.IN_PROGRESS}  # [D]


def _task_error(task_id: str, code: str | None, message: str) -> TaskFailedError:
    # [B] "content_policy_violation", "Request Moderated", "Content Moderated".
    moderated = re.search(r"moderat(ed|ion)|content.?policy|nsfw", f"{code} {message}", re.IGNORECASE)
    return (ContentModeratedError if moderated else TaskFailedError)(message, task_id=task_id, code=code)


# ------------------------------------------------------------------ the converter


def _parse_progress(value: object, _: object = None) -> float | None:
    progress = value if type(value) is float else parse_finite(value)
    return progress if progress is not None and 0 <= progress <= 1 else None


def _parse_decimal(value: object, _: object = None) -> Decimal | None:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        number = Decimal(str(value).strip())
    except (InvalidOperation, ValueError):
        return None
    return number if number.is_finite() and abs(number.adjusted()) < _MAX_DECIMAL_EXPONENT else None


def parse_datetime(value: object, _: object = None) -> datetime | None:
    """Parse seconds since the epoch [C] or ISO 8601 [D], in UTC unless it has an offset; None for anything else."""
    try:
        seconds = value if type(value) is int else parse_finite(value)
        if seconds is not None:
            return datetime.fromtimestamp(seconds, UTC)
        parsed = datetime.fromisoformat(value) if isinstance(value, str) else None
    except (ValueError, OverflowError, OSError):
        return None
    return parsed and parsed.replace(tzinfo=parsed.tzinfo or UTC)


def _require_string(value: object, _: object = None) -> str:
    if not isinstance(value, str):
        raise TypeError(f"expected text, not {type(value).__name__}")
    return value


def _parse_object(value: object, _: object = None) -> dict[str, Any]:
    return dict(value) if isinstance(value, dict) else {}


def _make_lenient_hook(cls: type[T], converter: cattrs.Converter) -> Callable[[Any, Any], T]:
    """Return a structure hook for a class that treats null as missing and keeps unknown keys in `extra`."""
    field_names = attrs.fields_dict(cls).keys()  # type: ignore[arg-type]  # T is an attrs class
    structure = make_dict_structure_fn(cls, converter)

    def hook(value: Any, _: Any) -> T:
        if not isinstance(value, dict):
            raise TypeError(f"expected an object, not {type(value).__name__}")
        known = {name: item for name, item in value.items() if name in field_names and item is not None}
        if "extra" in field_names:
            known["extra"] = {name: item for name, item in value.items() if name not in field_names or name == "extra"}
        return structure(known, cls)

    return hook


def _make_converter() -> cattrs.Converter:
    converter = cattrs.Converter()
    converter.register_structure_hook(str, _require_string)
    converter.register_structure_hook(float | None, _parse_progress)
    converter.register_structure_hook(Decimal | None, _parse_decimal)
    converter.register_structure_hook(datetime | None, parse_datetime)
    converter.register_structure_hook_func(lambda cls: cls == Mapping[str, Any], _parse_object)
    structure_usage = _make_lenient_hook(Usage, converter)
    # An unreadable usage must not make the images unreadable.
    converter.register_structure_hook(
        Usage | None, lambda value, _: structure_usage(value, Usage) if isinstance(value, dict) else None
    )
    for cls in (_Content, _Group, _Task):
        converter.register_structure_hook(cls, _make_lenient_hook(cls, converter))
    converter.register_unstructure_hook(
        GenerationRequest,
        make_dict_unstructure_fn(
            GenerationRequest,
            converter,
            # Only what the caller set is sent, and never null.
            _cattrs_omit_if_default=True,
            input_images=override(omit=True),
            extra=override(omit=True),
            key=override(omit=True),
        ),
    )
    return converter


_converter = _make_converter()
