"""The content of a delivery.

BFL is Black Forest Labs, who make the model; [B] marks facts from their documentation. The service documents that it
posts the finished task, but not in which format: all formats of responses to polls are accepted, BFL's among them.
"""

import codecs
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from flux2max_async._api.statuses import is_not_found
from flux2max_async._api.task_object import find_task, snapshot_from_json, unwrap_task
from flux2max_async._api.values import parse_json
from flux2max_async._exceptions import InvalidRequestError, ProtocolError
from flux2max_async._models.results import TaskSnapshot

MAX_BODY = 1_000_000
"""Maximum size of a delivery in bytes; a finished task has about one thousand."""


def parse(body: bytes) -> TaskSnapshot:
    """Parse a delivery; verify its signature first.

    Args:
        body: The bytes of the delivery. Either the task object, as in the response to a poll, or BFL's format [B]:
            `{"id", "status": "Ready", "result": {"sample"}}`, `{"id", "status": "Error", "error", "message"}`; the
            platform's envelope around it, `{"status": {"code": 200}, "data": {...}}`, is removed.

    Returns:
        A snapshot of the task. If the task failed, its `error` is set, and is a ContentModeratedError if moderation
        refused it. BFL's format contains no cost.

    Raises:
        ProtocolError: The body is larger than 1 MB, is not a JSON object, has no id, has neither a status nor an image,
            or reports the task as completed without an output. The error's `task_id` is set if the delivery has an id.
        InvalidRequestError: The body is not bytes.
    """
    return read_delivery(require_bytes(body))


def read_delivery(body: bytes, secrets: Sequence[str] = ()) -> TaskSnapshot:
    """Parse a delivery and mask the given secrets in the task's error, in case the service echoes them."""
    check_size(body)
    payload = parse_json_object(body)
    task_id, task = find_task(payload)
    if task_id is None:
        raise ProtocolError("the delivery has no task id")
    try:
        return snapshot_from_json(task_id, task, raw=payload, secrets=secrets, received_at=datetime.now(UTC))
    except ProtocolError as error:
        error.task_id = task_id
        raise


def check_size(body: bytes) -> None:
    """Raise ProtocolError if a body is too large."""
    if len(body) > MAX_BODY:
        raise ProtocolError(f"a delivery has at most {MAX_BODY} bytes, not {len(body)}")


def reports_not_found(snapshot: TaskSnapshot) -> bool:
    """Check whether a delivery reports that its task doesn't exist, which its sender can't reliably know."""
    return is_not_found(unwrap_task(snapshot.raw).get("status"))


def parse_json_object(body: bytes) -> dict[str, Any]:
    payload: object = None
    try:
        # Without a byte order mark, UTF-16 would be accepted, too.
        payload = parse_json(codecs.BOM_UTF8 + body.decode("utf-8-sig").encode())
    except UnicodeDecodeError as error:
        raise ProtocolError("the delivery is not UTF-8") from error
    except ValueError as error:
        raise ProtocolError(f"the delivery is not valid JSON: {error}") from error
    if not isinstance(payload, dict):
        raise ProtocolError(f"the delivery must be a JSON object, not {type(payload).__name__}")
    return payload


def require_bytes(body: bytes) -> bytes:
    if not isinstance(body, (bytes, bytearray, memoryview)):
        raise InvalidRequestError(
            f"body must be the bytes of the delivery as they were received, not {type(body).__name__}", field="body"
        )
    return bytes(body)
