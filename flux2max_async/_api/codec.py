"""What goes over the wire and what comes back: calls made from requests, snapshots or errors made from replies.

Sources: [S] the vendor's page for the model, [C] the vendor's open-source clients, [D] the vendor's other pages,
[B] the documentation of the model's maker, whose service sits behind the gateway. Where a reader meets variations,
it takes them all; what it can't read is a ProtocolError that says where.
"""

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

from flux2max_async._api.response import HttpResponse, finite, masked, parse_json_object, problem, response_error
from flux2max_async._exceptions import ContentModeratedError, InvalidRequestError, ProtocolError, TaskFailedError
from flux2max_async._models.request import IMAGE_PARAMETERS, GenerationRequest
from flux2max_async._models.results import GeneratedImage, TaskSnapshot, TaskStatus, Usage

MODEL = "flux_2_max"

# Both paths are those of C and D.
_GENERATION = "/model/v1/generation"
_TASK = "/model/v1/generation/task/"

T = TypeVar("T")


@attrs.frozen
class HttpRequest:
    """One HTTP request to make, relative to the base url."""

    method: str
    path: str
    """Percent-encoded."""
    body: bytes | None = attrs.field(default=None, repr=False)


# ------------------------------------------------------------------ calls


def build_submit(request: GenerationRequest) -> HttpRequest:
    """Write a request down. Reads and encodes local pictures, so keep it off the event loop where there are any.

    Raises:
        InvalidRequestError: A local picture is missing, empty, too large or of a kind that the service doesn't take.
    """
    params: dict[str, Any] = _converter.unstructure(request)
    for index, (name, image) in enumerate(zip(IMAGE_PARAMETERS, request.input_images, strict=False)):
        try:
            params[name] = image.encode()
        except InvalidRequestError as error:
            raise InvalidRequestError(f"input_images[{index}]: {error.message}", error.field) from error.__cause__
    params.update((name, value) for name, value in request.extra.items() if value is not None)
    return HttpRequest("POST", _GENERATION, json.dumps({"model": MODEL, "input": [{"params": params}]}).encode())


def build_poll(task_id: str) -> HttpRequest:
    """Ask for a task. Its id is opaque: slashes are encoded, and so are the dots that a path would swallow."""
    encoded = quote(task_id, safe="", errors="surrogatepass")
    return HttpRequest("GET", _TASK + (encoded.replace(".", "%2E") if task_id in {".", ".."} else encoded))


# ------------------------------------------------------------------ replies


def parse_submit(reply: HttpResponse) -> TaskSnapshot:
    """Read the answer to a submit; with an id in hand, nothing else in it can make it fail.

    Raises:
        ResponseError: The gateway refused.
        ProtocolError: There is neither an id nor an error in the answer: whether a task exists is unknown.
    """
    if not 200 <= reply.status < 300:
        raise response_error(reply)
    body = parse_json_object(reply)
    if (task_id := task_id_of(body)) is None:
        if problem(body) is not None:
            # [C] "An answer without an id is a refusal whatever its HTTP status".
            raise response_error(reply)
        raise ProtocolError("the answer to the submit holds neither a task id nor an error")
    try:
        return snapshot_from_json(task_id, body, raw=body, secrets=reply.secrets)
    except ProtocolError:
        return TaskSnapshot(task_id, TaskStatus.IN_PROGRESS, raw=body)


def parse_poll(reply: HttpResponse, task_id: str) -> TaskSnapshot:
    """Read the answer to a poll.

    Raises:
        ResponseError: The gateway answered with an error.
        ProtocolError: The answer is no task that can be read.
    """
    if not 200 <= reply.status < 300:
        raise response_error(reply)
    body = parse_json_object(reply)
    if not isinstance(body.get("status"), str) and problem(body) is not None:
        raise response_error(reply)
    return snapshot_from_json(task_id, body, raw=body, secrets=reply.secrets)


# ------------------------------------------------------------------ the task object

# These live for one reading and go nowhere: what a frozen class has beyond them would cost each answer and the import.


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
    """The task object [S], [C], as far as we read it."""

    status: str
    progress: float | None = None
    created_at: datetime | None = None
    output: list[_Group] = attrs.field(factory=list[_Group])
    usage: Usage | None = None
    metadata: Mapping[str, Any] = attrs.field(factory=dict[str, Any])


def task_id_of(body: Mapping[str, Any]) -> str | None:
    """Read a task's id, which is opaque; None where there is none."""
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
    """Read the task object.

    Args:
        task_id: What the task is called.
        body: The object.
        raw: What came, if that isn't the object itself.
        secrets: What the service may have echoed, and no error may repeat.

    Raises:
        ProtocolError: It can't be read, or says that the task is completed and holds no output.
    """
    try:
        task = _converter.structure(body, _Task)
    except (cattrs.BaseValidationError, TypeError, ValueError, RecursionError) as fault:
        where = "; ".join(cattrs.transform_error(fault, "$"))
        raise ProtocolError(f"task {task_id}: the answer is unreadable: {where}") from fault
    contents = [content for group in task.output for content in group.content if content.url]
    images = tuple(
        GeneratedImage(content.url or "", content.type, task_id, content.extra, index)
        for index, content in enumerate(contents)
    )
    status = status_of(task.status) or TaskStatus.IN_PROGRESS
    error: TaskFailedError | None = None
    if status is TaskStatus.FAILED or (status is TaskStatus.COMPLETED and not images):
        if status is TaskStatus.COMPLETED and not body.get("error"):
            raise ProtocolError(f"task {task_id} is said to be completed, but holds no output")
        status = TaskStatus.FAILED
        code, message = problem(body) or (None, "the service gave no reason")
        error = _task_error(task_id, code and masked(code, secrets), masked(message, secrets))
    return TaskSnapshot(
        task_id, status, task.progress, images, task.usage, task.created_at, error, task.metadata, raw=raw
    )


def status_of(text: str) -> TaskStatus | None:
    """Read a status without regard to case; None for one that nobody knows yet."""
    return _STATUSES.get(text.strip().lower())


_STATUSES = {status.value: status for status in TaskStatus} | {"processing": TaskStatus.IN_PROGRESS}  # [D]


def _task_error(task_id: str, code: str | None, message: str) -> TaskFailedError:
    # [B] "content_policy_violation", "Request Moderated", "Content Moderated".
    moderated = re.search(r"moderat(ed|ion)|content.?policy|nsfw", f"{code} {message}", re.IGNORECASE)
    return (ContentModeratedError if moderated else TaskFailedError)(message, task_id, code)


# ------------------------------------------------------------------ the converter


def _progress(value: object, _: object = None) -> float | None:
    share = finite(value)
    return share if share is not None and 0 <= share <= 1 else None


def _decimal(value: object, _: object = None) -> Decimal | None:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        number = Decimal(str(value).strip())
    except (InvalidOperation, ValueError):
        return None
    # Nothing costs a number of fifty digits; and such a number couldn't be added to others.
    return number if number.is_finite() and abs(number.adjusted()) < 50 else None


def moment(value: object, _: object = None) -> datetime | None:
    """Read a moment: seconds since the epoch [C], or ISO 8601 [D], which counts as UTC where it doesn't say."""
    try:
        seconds = finite(value)
        if seconds is not None:
            return datetime.fromtimestamp(seconds, UTC)
        moment = datetime.fromisoformat(value) if isinstance(value, str) else None
    except (ValueError, OverflowError, OSError):
        return None
    return moment and moment.replace(tzinfo=moment.tzinfo or UTC)


def _string(value: object, _: object = None) -> str:
    if not isinstance(value, str):
        raise TypeError(f"expected text, not {type(value).__name__}")
    return value


def _object(value: object, _: object = None) -> dict[str, Any]:
    return dict(value) if isinstance(value, dict) else {}


def _null_is_missing(cls: type[T], converter: cattrs.Converter) -> Callable[[Any, Any], T]:
    """Structure a class from an object in which null is as good as missing, keeping unknown keys in `extra`."""
    known = attrs.fields_dict(cls).keys()  # type: ignore[arg-type]
    structure = make_dict_structure_fn(cls, converter)

    def hook(value: Any, _: Any) -> T:
        if not isinstance(value, dict):
            raise TypeError(f"expected an object, not {type(value).__name__}")
        found = {name: entry for name, entry in value.items() if name in known and entry is not None}
        if "extra" in known:
            found["extra"] = {name: entry for name, entry in value.items() if name not in known or name == "extra"}
        return structure(found, cls)

    return hook


def _make_converter() -> cattrs.Converter:
    converter = cattrs.Converter()
    converter.register_structure_hook(str, _string)
    converter.register_structure_hook(float | None, _progress)
    converter.register_structure_hook(Decimal | None, _decimal)
    converter.register_structure_hook(datetime | None, moment)
    converter.register_structure_hook_func(lambda cls: cls == Mapping[str, Any], _object)
    usage = _null_is_missing(Usage, converter)
    # A bill that can't be read must not cost us the picture.
    converter.register_structure_hook(
        Usage | None, lambda value, _: usage(value, Usage) if isinstance(value, dict) else None
    )
    for cls in (_Content, _Group, _Task):
        converter.register_structure_hook(cls, _null_is_missing(cls, converter))
    converter.register_unstructure_hook(
        GenerationRequest,
        make_dict_unstructure_fn(
            GenerationRequest,
            converter,
            # "Send only what the caller set; never send null."
            _cattrs_omit_if_default=True,
            input_images=override(omit=True),
            extra=override(omit=True),
            key=override(omit=True),
        ),
    )
    return converter


_converter = _make_converter()
