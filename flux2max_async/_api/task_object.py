"""The task object: the JSON with which polls and webhooks report a task, parsed into a snapshot.

The letters in brackets name the sources of facts, as in `codec`. All formats that are known of the gateway, its sibling
services and the maker of the model are accepted.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from decimal import Decimal
from typing import Any, TypeVar

import attrs
import cattrs
from cattrs.gen import make_dict_structure_fn

from flux2max_async._api.classification import is_moderation
from flux2max_async._api.response import (
    extract_error,
    has_clear_error,
    unwrap,
)
from flux2max_async._api.running_task import running_snapshot
from flux2max_async._api.statuses import KNOWN_STATUSES, is_moderated, is_not_found, status_of
from flux2max_async._api.values import parse_datetime, parse_decimal, parse_object, parse_progress
from flux2max_async._exceptions import ContentModeratedError, ProtocolError, TaskFailedError
from flux2max_async._models.results import GeneratedImage, TaskSnapshot, TaskStatus, Usage, inline_url
from flux2max_async._text import printable, redact

MAX_ID_LENGTH = 1024
"""Characters. A longer id doesn't fit into the URL of a poll everywhere."""
_MAX_COST = 1000
"""US dollars of one task; nothing costs so much, and a budget must not believe it."""
_MAX_IMAGES = 64
"""More images of one task than that are ignored; the service makes one or a few."""
_LIST_FIELDS = frozenset(("output", "content"))
_NO_UNICODE = re.compile("[\ufffd\ud800-\udfff]")
"""What stands for bytes that were not UTF-8, and surrogates, which have no bytes."""
_IMAGE_FIELDS = frozenset(("image_url", "b64_json", "base64"))
T = TypeVar("T")

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

    status: Any = None
    progress: float | None = None
    created_at: datetime | None = None
    output: list[_Group] = attrs.field(factory=list[_Group])
    usage: Usage | None = None
    metadata: Mapping[str, Any] = attrs.field(factory=dict[str, Any])


def task_id_of(body: Mapping[str, Any]) -> str | None:
    """Return the task id in a response, as text; None if there is none.

    Raises:
        ProtocolError: It is too long, or can't be expressed in UTF-8.
    """
    match body.get("id"):
        case str(text) if text:
            task_id = text
        case int(number) if not isinstance(number, bool):
            task_id = str(number)
        case _:
            return None
    if len(task_id) > MAX_ID_LENGTH:
        raise ProtocolError(f"the task id has {len(task_id):,} characters; at most {MAX_ID_LENGTH:,} are accepted")
    if _NO_UNICODE.search(task_id):
        raise ProtocolError(f"the task id is not valid UTF-8: {printable(task_id)}")
    return task_id


def find_task(body: Mapping[str, Any]) -> tuple[str | None, Mapping[str, Any]]:
    """Return the id of the task in a response or webhook, if there is one, and the task object."""
    task = unwrap_task(body)
    task_id = task_id_of(task)
    return task_id_of(body) if task_id is None else task_id, task


def unwrap_task(body: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the task object in a response or webhook, which may be in an envelope [C].

    An object `data` that looks like a task is one, even if the envelope has no code or reports an error, unless the
    body around it is a task itself.
    """
    status, data = body.get("status"), body.get("data")
    is_task = "output" in body or "result" in body or (isinstance(status, str) and task_id_of(body) is not None)
    if isinstance(data, dict) and not is_task and (task_id_of(data) is not None or isinstance(data.get("status"), str)):
        return data
    return body if isinstance(status, str) else unwrap(body)


def snapshot_from_json(
    task_id: str,
    body: Mapping[str, Any],
    *,
    raw: Mapping[str, Any],
    secrets: Sequence[str],
    received_at: datetime | None = None,
) -> TaskSnapshot:
    """Parse a task object.

    Args:
        task_id: The id of the task.
        body: The task object.
        raw: The original JSON, which becomes the snapshot's `raw`.
        secrets: Texts to redact in the task's error, in case the service echoes them.
        received_at: When it was received; timezone-aware.

    Raises:
        ProtocolError: It can't be parsed, or reports the task as completed without an output or an error.
    """
    if (running := running_snapshot(task_id, body, raw)) is not None:
        return running
    body, image_count = _limit_output(body)
    try:
        task = _converter.structure(_with_output(body), _Task)
    except (cattrs.BaseValidationError, TypeError, ValueError, RecursionError) as cause:
        word = body.get("status")
        if "output" in body and isinstance(word, str) and status_of(word) not in {None, TaskStatus.COMPLETED}:
            rest = {name: value for name, value in body.items() if name != "output"}  # which is not needed
            return snapshot_from_json(task_id, rest, raw=raw, secrets=secrets, received_at=received_at)
        details = "; ".join(cattrs.transform_error(cause, "$"))
        raise ProtocolError(f"task {task_id}: the response is unreadable: {printable(details)}") from cause
    contents = [content for group in task.output for content in group.content if content.url]
    images = tuple(
        GeneratedImage(
            url=content.url or "",
            type=content.type,
            task_id=task_id,
            extra=content.extra,
            index=index,
            received_at=received_at,
        )
        for index, content in enumerate(contents)
    )
    status = _resolve_status(task_id, task.status, body, has_images=bool(images))
    failed = status is TaskStatus.FAILED
    error: TaskFailedError | None = None
    if failed or (status is TaskStatus.COMPLETED and _reported_error(body) is not None):
        error = _task_error(task_id, body, secrets)
    elif status is TaskStatus.COMPLETED and image_count > _MAX_IMAGES:
        message = f"the task has {image_count:,} images, of which the first {_MAX_IMAGES} are used"
        error = TaskFailedError(message, task_id=task_id)
    return TaskSnapshot(
        task_id=task_id,
        status=status,
        progress=task.progress,
        images=images,
        usage=task.usage,
        created_at=task.created_at,
        error=error if failed else None,
        partial_error=None if failed else error,
        metadata=task.metadata,
        raw=raw,
    )


def reported_status(snapshot: TaskSnapshot) -> str | None:
    """Return the word with which the service reported the state of a task; None if there was none."""
    word = unwrap_task(snapshot.raw).get("status")
    return word if isinstance(word, str) else None


def _resolve_status(task_id: str, word: object, body: Mapping[str, Any], *, has_images: bool) -> TaskStatus:
    """Return the state of a task, given the word for it, which may be unknown.

    A known word decides, but a completed task without images has failed if there is an error. With an unknown word,
    images mean that the task has completed, and otherwise an error means that it has failed.

    Raises:
        ProtocolError: There is no word and no image, or the task is reported as completed without an output or error.
    """
    status = KNOWN_STATUSES.get(word) or status_of(word) if isinstance(word, str) else None
    if status is None and is_not_found(word):
        return TaskStatus.FAILED
    if status is None and has_images:
        return TaskStatus.COMPLETED
    if not isinstance(word, str):
        raise ProtocolError(
            f"task {task_id}: the response is unreadable: expected text, not {type(word).__name__} @ $.status"
        )
    has_error = _reported_error(body) is not None
    if status is None:
        return TaskStatus.FAILED if has_error else TaskStatus.IN_PROGRESS
    if status is TaskStatus.COMPLETED and not has_images:
        if not has_error:
            raise ProtocolError(f"task {task_id} is reported as completed, but has no output")
        return TaskStatus.FAILED
    return status


def _reported_error(body: Mapping[str, Any]) -> Any:
    """Return the error of a task, or of one of its outputs; None if there is none."""
    return next(filter(_is_error, (body.get("error"), *_errors_in_output(body.get("output")))), None)


def _is_error(value: object) -> bool:
    """Return whether a value is an error, and not an object for one with empty fields or the code of a success."""
    return has_clear_error({"error": value}) if isinstance(value, dict) else bool(value)


def _errors_in_output(output: Any) -> Iterator[Any]:
    """Yield what stands for an error in each group and content of an output that can be read."""
    for group in filter(None, output or ()):
        yield group.get("error")
        for content in filter(None, group.get("content") or ()):
            yield content.get("error")


def _task_error(task_id: str, body: Mapping[str, Any], secrets: Sequence[str]) -> TaskFailedError:
    reported, word = _reported_error(body), str(body.get("status"))
    known = extract_error({"error": reported, "message": body.get("message")} if reported else body)
    code, message = known or (None, "the service gave no reason")
    # [B] Without an error, or if the status names moderation, the status is more specific.
    has_word = isinstance(body.get("status"), str) and word.strip().lower() != "failed"
    if has_word and (is_moderated(word) or not reported):
        code, message = word, message if known else word
    moderated = is_moderated(word) or is_moderation(code, message)
    error_class = ContentModeratedError if moderated else TaskFailedError
    return error_class(redact(message, secrets), task_id=task_id, code=code and redact(code, secrets))


# ------------------------------------------------------------------ images


def _with_output(body: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a task object with the image in the format of the model's maker [B] as its output."""
    match body.get("result"):
        case {"sample": str(url), **extra} if not body.get("output"):
            return {**body, "output": [{"content": [{**extra, "type": "image", "url": url}]}]}
        case _:
            return body


def _limit_output(body: Mapping[str, Any]) -> tuple[Mapping[str, Any], int]:
    """Return a task object with no more than the first images of its output, and how many it had."""
    output = body.get("output")
    elements = output if isinstance(output, list) else []
    groups = [group for group in elements if isinstance(group, dict)]
    contents = [content for group in groups if isinstance(group.get("content"), list) for content in group["content"]]
    if len(elements) <= _MAX_IMAGES >= len(contents):
        return body, len(contents)
    used = [content for content in contents if content is not None]
    return {**body, "output": [{**next(iter(groups), {}), "content": used[:_MAX_IMAGES]}]}, len(used)


def _with_url(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return a content with the URL of its image in `url`, wherever it was; an inline image becomes a `data:` URI."""
    match content:
        case {"url": str(url)} if url:
            pass
        case {"image_url": str(url)} | {"image_url": {"url": str(url)}} if url:  # [D]
            pass
        case {"b64_json": str(data)} | {"base64": str(data)} if data:
            url = inline_url(data)
        case _:
            return dict(content)
    # Nothing else of it holds the image, which may have megabytes.
    return {name: value for name, value in content.items() if name not in _IMAGE_FIELDS} | {"url": url}


# ------------------------------------------------------------------ the converter


def _require_string(value: object, _: object = None) -> str:
    if not isinstance(value, str):
        raise TypeError(f"expected text, not {type(value).__name__}")
    return value


def _make_lenient_hook(cls: type[T], converter: cattrs.Converter) -> Callable[[Any, Any], T]:
    """Return a structure hook for a class that treats null as missing and keeps unknown keys in `extra`."""
    field_names = attrs.fields_dict(cls).keys()  # type: ignore[arg-type]  # T is an attrs class
    structure = make_dict_structure_fn(cls, converter)

    def hook(value: Any, _: Any) -> T:
        if not isinstance(value, dict):
            raise TypeError(f"expected an object, not {type(value).__name__}")
        known = {name: item for name, item in value.items() if name in field_names and item is not None}
        for name, item in known.items():
            if name in _LIST_FIELDS and item and isinstance(item, (str, dict)):
                known[name] = 1  # just as wrong: but each letter or name would be checked, for minutes
            if isinstance(item, list) and None in item:  # what is missing, like an image that moderation has removed
                known[name] = [element for element in item if element is not None]
        if "extra" in field_names:
            known["extra"] = {name: item for name, item in value.items() if name not in field_names or name == "extra"}
        return structure(known, cls)

    return hook


def _make_converter() -> cattrs.Converter:
    converter = cattrs.Converter()
    converter.register_structure_hook(str, _require_string)
    converter.register_structure_hook(float | None, parse_progress)
    converter.register_structure_hook(Decimal | None, parse_decimal)
    converter.register_structure_hook(datetime | None, parse_datetime)
    converter.register_structure_hook_func(lambda cls: cls == Mapping[str, Any], parse_object)
    structure_usage = _make_lenient_hook(Usage, converter)

    def structure_cost(value: Any, _: Any) -> Usage | None:
        if not isinstance(value, dict):
            return None  # an unreadable usage must not make the images unreadable
        usage = structure_usage(value, Usage)
        if value.get("cost") is None or (usage.cost is not None and 0 <= usage.cost <= _MAX_COST):
            return usage
        return attrs.evolve(usage, cost=None, extra={**usage.extra, "cost": value["cost"]})

    converter.register_structure_hook(Usage | None, structure_cost)
    structure_content = _make_lenient_hook(_Content, converter)
    converter.register_structure_hook(
        _Content, lambda value, cls: structure_content(_with_url(value) if isinstance(value, dict) else value, cls)
    )
    for cls in (_Group, _Task):
        converter.register_structure_hook(cls, _make_lenient_hook(cls, converter))
    return converter


_converter = _make_converter()
