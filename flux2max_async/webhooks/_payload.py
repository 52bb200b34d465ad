"""What a webhook delivers: whether it comes from the service, and what it says of a task.

Sources are named as in `_wire`. The service documents that it posts the finished task, not in which shape: both that
are known are read, and told apart by their keys.
"""

import json
from typing import Any

from flux2max_async._api.codec import snapshot_from_json, task_id_of
from flux2max_async._api.response import problem
from flux2max_async._exceptions import InvalidRequestError, ProtocolError
from flux2max_async._models.results import TaskSnapshot

MAX_BODY = 1_000_000
"""Bytes of a delivery; a finished task takes about one thousand."""


def parse(body: bytes) -> TaskSnapshot:
    """Read what a delivery says of its task; verify it first.

    Args:
        body: The task object as polls answer it, or the maker's own: `{"id", "status": "Ready", "result": {"sample"}}`,
            `{"id", "status": "Error", "error", "message"}` [B].

    Returns:
        The task; one that failed has an `error`, a ContentModeratedError where moderation refused it. The maker's own
        payload names no cost.

    Raises:
        ProtocolError: It is larger than 1 MB, no JSON object, has no id or no status, or says that the task is
            completed and holds no output. Its `task_id` names the task where there is an id.
        InvalidRequestError: The body isn't given as bytes.
    """
    return read_delivery(require_bytes(body))


def read_delivery(body: bytes, secrets: tuple[str, ...] = ()) -> TaskSnapshot:
    """Read a delivery, keeping secrets that the service has echoed out of the error in it."""
    if len(body) > MAX_BODY:
        raise ProtocolError(f"a delivery has at most {MAX_BODY} bytes, not {len(body)}")
    told = parse_json_object(body)
    if (task_id := task_id_of(told)) is None:
        raise ProtocolError("the delivery names no task: its id is missing")
    try:
        return snapshot_from_json(task_id, _task_object(told), raw=told, secrets=secrets)
    except ProtocolError as error:
        error.task_id = task_id
        raise


def is_not_found(snapshot: TaskSnapshot) -> bool:
    """Tell whether a delivery says that there is no such task, which whoever sends it can't well know."""
    return snapshot.error is not None and str(snapshot.raw.get("status")).strip().lower() == _NOT_FOUND


def parse_json_object(body: bytes) -> dict[str, Any]:
    told: object = None
    try:
        told = json.loads(body.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ProtocolError("the delivery is not UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"the delivery is no JSON that could be read: {error}") from error
    if not isinstance(told, dict):
        raise ProtocolError(f"the delivery must be a JSON object, not {type(told).__name__}")
    return told


_NOT_FOUND = "task not found"
# [B] The maker's statuses, in the gateway's words.
_STATUSES = {
    "ready": "completed",
    "error": "failed",
    "request moderated": "failed",
    "content moderated": "failed",
    _NOT_FOUND: "failed",
}


def _task_object(told: dict[str, Any]) -> dict[str, Any]:
    """Give the maker's payload the shape of the task object [B], which stays as it is."""
    task = dict(told)
    result, status = told.get("result"), told.get("status")
    if isinstance(result, dict) and isinstance(result.get("sample"), str) and not told.get("output"):
        about = {name: value for name, value in result.items() if name != "sample"}
        task["output"] = [{"content": [{**about, "type": "image", "url": result["sample"]}]}]
    if isinstance(status, str) and (ours := _STATUSES.get(status.strip().lower())):
        task["status"] = ours
        # A status that says more than the error does, as that of moderation may, becomes its code.
        if ours == "failed" and (not told.get("error") or "moderated" in status.lower()):
            _, message = problem(told) or (None, status)
            task["error"] = {"code": status, "message": message}
    return task


def require_bytes(body: bytes) -> bytes:
    if not isinstance(body, (bytes, bytearray, memoryview)):
        raise InvalidRequestError(
            f"body must be the bytes of the delivery as they came, not {type(body).__name__}", "body"
        )
    return bytes(body)
