"""The content of a delivery.

BFL is Black Forest Labs, who make the model; [B] marks facts from their documentation. The service documents that it
posts the finished task, but not in which format: both known formats are accepted and distinguished by their keys.
"""

import json
from typing import Any

from flux2max_async._api.codec import snapshot_from_json, task_id_of
from flux2max_async._api.response import extract_error
from flux2max_async._exceptions import InvalidRequestError, ProtocolError
from flux2max_async._models.results import TaskSnapshot

MAX_BODY = 1_000_000
"""Maximum size of a delivery in bytes; a finished task has about one thousand."""


def parse(body: bytes) -> TaskSnapshot:
    """Parse a delivery; verify its signature first.

    Args:
        body: The bytes of the delivery. Either the task object, as in the response to a poll, or BFL's format [B]:
            `{"id", "status": "Ready", "result": {"sample"}}`, `{"id", "status": "Error", "error", "message"}`.

    Returns:
        A snapshot of the task. If the task failed, its `error` is set, and is a ContentModeratedError if moderation
        refused it. BFL's format contains no cost.

    Raises:
        ProtocolError: The body is larger than 1 MB, is not a JSON object, has no id or no status, or reports the task
            as completed without an output. The error's `task_id` is set if the delivery has an id.
        InvalidRequestError: The body is not bytes.
    """
    return read_delivery(require_bytes(body))


def read_delivery(body: bytes, secrets: tuple[str, ...] = ()) -> TaskSnapshot:
    """Parse a delivery and mask the given secrets in the task's error, in case the service echoes them."""
    if len(body) > MAX_BODY:
        raise ProtocolError(f"a delivery has at most {MAX_BODY} bytes, not {len(body)}")
    payload = parse_json_object(body)
    if (task_id := task_id_of(payload)) is None:
        raise ProtocolError("the delivery has no task id")
    try:
        return snapshot_from_json(task_id, _task_object(payload), raw=payload, secrets=secrets)
    except ProtocolError as error:
        error.task_id = task_id
        raise


def is_not_found(snapshot: TaskSnapshot) -> bool:
    """Check whether a delivery reports that its task doesn't exist, which its sender can't reliably know."""
    return snapshot.error is not None and str(snapshot.raw.get("status")).strip().lower() == _NOT_FOUND


def parse_json_object(body: bytes) -> dict[str, Any]:
    payload: object = None
    try:
        payload = json.loads(body.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ProtocolError("the delivery is not UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"the delivery is not valid JSON: {error}") from error
    if not isinstance(payload, dict):
        raise ProtocolError(f"the delivery must be a JSON object, not {type(payload).__name__}")
    return payload


_NOT_FOUND = "task not found"
# [B] BFL's statuses and those of the service that they correspond to.
_STATUSES = {
    "ready": "completed",
    "error": "failed",
    "request moderated": "failed",
    "content moderated": "failed",
    _NOT_FOUND: "failed",
}


def _task_object(payload: dict[str, Any]) -> dict[str, Any]:
    """Convert BFL's format [B] to the task object; leave a task object as it is."""
    task = dict(payload)
    result, status = payload.get("result"), payload.get("status")
    if isinstance(result, dict) and isinstance(result.get("sample"), str) and not payload.get("output"):
        extra = {name: value for name, value in result.items() if name != "sample"}
        task["output"] = [{"content": [{**extra, "type": "image", "url": result["sample"]}]}]
    if isinstance(status, str) and (service_status := _STATUSES.get(status.strip().lower())):
        task["status"] = service_status
        # Without an error, or if the status names moderation, the status is more specific and becomes the code.
        if service_status == "failed" and (not payload.get("error") or "moderated" in status.lower()):
            _, message = extract_error(payload) or (None, status)
            task["error"] = {"code": status, "message": message}
    return task


def require_bytes(body: bytes) -> bytes:
    if not isinstance(body, (bytes, bytearray, memoryview)):
        raise InvalidRequestError(
            f"body must be the bytes of the delivery as they were received, not {type(body).__name__}", field="body"
        )
    return bytes(body)
