"""The words with which services report the state of a task; polls and webhooks share them.

Sources: [C] the vendor's clients and readers of the same platform, [D] the vendor's other pages, [B] the documentation
of BFL, the maker of the model.
"""

import re

from flux2max_async._models.results import TaskStatus

KNOWN_STATUSES = {
    "pending": TaskStatus.PENDING,
    **dict.fromkeys(
        ("in_progress", "inprogress", "processing", "queued", "submitted", "starting", "running"),
        TaskStatus.IN_PROGRESS,
    ),
    **dict.fromkeys(("completed", "success", "succeeded", "ready", "done"), TaskStatus.COMPLETED),
    **dict.fromkeys(
        ("failed", "error", "cancelled", "canceled", "aborted", "timeout", "expired", "rejected"), TaskStatus.FAILED
    ),
    **dict.fromkeys(("moderated", "requestmoderated", "contentmoderated"), TaskStatus.FAILED),
}
"""Most words need not be normalized: `in_progress` is here as it is usually spelled."""
_NOT_FOUND = "tasknotfound"
_MAX_LENGTH = 100
"""A longer text is no known word; with megabytes of it, the event loop would stand still."""


def status_of(text: str) -> TaskStatus | None:
    """Return the status with a name, regardless of case, hyphens, spaces and underscores; None if it is unknown."""
    return KNOWN_STATUSES.get(text) or KNOWN_STATUSES.get(_normalize(text))


def is_moderated(text: str) -> bool:
    """Return whether a status reports that moderation refused the task."""
    return _normalize(text).endswith("moderated") and status_of(text) is TaskStatus.FAILED


def is_not_found(text: object) -> bool:
    """Return whether a status reports that there is no such task [B], as a 404 does."""
    return isinstance(text, str) and _normalize(text) == _NOT_FOUND


def _normalize(text: str) -> str:
    return re.sub(r"[\s_-]+", "", text).lower() if len(text) <= _MAX_LENGTH else text
