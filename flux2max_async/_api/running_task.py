"""A short way to read what most polls get: the task object of a task that is still running."""

from collections.abc import Mapping
from typing import Any

from flux2max_async._api.statuses import KNOWN_STATUSES
from flux2max_async._api.values import parse_datetime, parse_object, parse_progress
from flux2max_async._models.results import TaskSnapshot

_RUNNING = {word: status for word, status in KNOWN_STATUSES.items() if not status.ended}
"""The words for it."""


def running_snapshot(task_id: str, body: Mapping[str, Any], raw: Mapping[str, Any]) -> TaskSnapshot | None:
    """Return the snapshot of a task object that has a known word for a running task, and nothing of an ended one.

    `snapshot_from_json()` returns the same without it, in several times the time.
    """
    word = body.get("status")
    status = _RUNNING.get(word) if isinstance(word, str) else None
    if status is None or body.get("output") or body.get("result") or body.get("usage") is not None:
        return None
    return TaskSnapshot(
        task_id=task_id,
        status=status,
        progress=parse_progress(body.get("progress")),
        created_at=parse_datetime(body.get("created_at")),
        metadata=parse_object(body.get("metadata")),
        raw=raw,
    )
