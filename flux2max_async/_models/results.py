"""The results: snapshots of a task, and the outcome of a request."""

from collections.abc import Mapping
from datetime import datetime
from decimal import Decimal
from enum import StrEnum
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import attrs

from flux2max_async._exceptions import FluxError, TaskFailedError
from flux2max_async._models.request import GenerationRequest


class TaskStatus(StrEnum):
    """The state of a task. An unknown status is read as IN_PROGRESS; `TaskSnapshot.raw` holds the original."""

    PENDING = "pending"
    IN_PROGRESS = "in_progress"
    COMPLETED = "completed"
    FAILED = "failed"

    @property
    def ended(self) -> bool:
        """Whether the task has completed or failed."""
        return self in FINAL_STATUSES


FINAL_STATUSES = frozenset((TaskStatus.COMPLETED, TaskStatus.FAILED))

NO_URL = "about:blank"
"""The URL of an image whose real URL is unknown and has to be requested from the service."""

_MAX_URL_REPR = 200
# What the base64 of an image begins with.
_MEDIA_TYPES = {
    "/9j/": "image/jpeg",
    "iVBORw0KGgo": "image/png",
    "UklGR": "image/webp",
    "R0lGOD": "image/gif",
}


def is_inline(url: str) -> bool:
    """Return whether an image's URL is a `data:` URI, which contains the image itself."""
    return url[:5].lower() == "data:"


def inline_url(data: str) -> str:
    """Return the `data:` URI of an image in base64, which may be one already."""
    if is_inline(data):
        return data
    known = (media_type for start, media_type in _MEDIA_TYPES.items() if data.startswith(start))
    return f"data:{next(known, 'application/octet-stream')};base64,{data}"


def _shorten_url(url: str) -> str:
    """Return the repr of a URL, in which an inline image is replaced by its length."""
    if is_inline(url):
        header, _, data = url.partition(",")
        return repr(f"{header[:_MAX_URL_REPR]},... ({len(data)} characters)")
    return repr(url)


@attrs.frozen(kw_only=True)
class Usage:
    """The cost of a task."""

    cost: Decimal | None = None
    """US dollars, exact; None if the service gave no readable amount."""
    discount: Decimal | None = None
    extra: Mapping[str, Any] = attrs.field(factory=dict[str, Any], repr=False)
    """Whatever else the service reports."""


@attrs.frozen(kw_only=True)
class GeneratedImage:
    """An image of a completed task. `session.save()` downloads it."""

    url: str = attrs.field(repr=_shorten_url)
    """Short-lived: it expires after about 10 minutes. An inline image is a `data:` URI, which never expires."""
    type: str
    task_id: str
    extra: Mapping[str, Any] = attrs.field(factory=dict[str, Any], repr=False)
    """`jobId` and whatever else the service reports."""
    index: int = 0
    """The position among the task's images, from 0."""
    received_at: datetime | None = attrs.field(default=None, eq=False, repr=False)
    """When the URL was received, by this machine's clock; timezone-aware. None if nobody knows."""


@attrs.frozen(kw_only=True)
class TaskSnapshot:
    """The state of a task, as reported in one response or webhook."""

    task_id: str
    status: TaskStatus
    progress: float | None = None
    """0.0 to 1.0; often missing, sometimes coarse."""
    images: tuple[GeneratedImage, ...] = ()
    usage: Usage | None = None
    created_at: datetime | None = None
    """Timezone-aware."""
    error: TaskFailedError | None = None
    """Set if and only if the status is FAILED."""
    partial_error: TaskFailedError | None = None
    """Why a completed task has fewer images than it should have."""
    # Both may echo secrets, so neither is in the repr.
    metadata: Mapping[str, Any] = attrs.field(factory=dict[str, Any], repr=False)
    raw: Mapping[str, Any] = attrs.field(factory=dict[str, Any], repr=False)
    """The JSON object as it was received."""


@attrs.frozen(kw_only=True)
class Completed:
    """The outcome of a request whose images were generated."""

    ok: ClassVar[Literal[True]] = True

    task_id: str
    request: GenerationRequest | None = None
    """None only for a task that was attached by its id alone."""
    images: tuple[GeneratedImage, ...]
    """Never empty."""
    usage: Usage | None = None
    metadata: Mapping[str, Any] = attrs.field(factory=dict[str, Any], repr=False)
    partial_error: TaskFailedError | None = None
    """Why further images of the same task are missing, as when moderation refused some; None if none are."""
    elapsed: float = 0.0
    """Seconds from the submit (or the attach) to the poll or webhook that reported the end."""
    polls: int = 0
    replayed: bool = False
    """Whether it was read from the journal, without a submit; at most a poll has renewed its links."""
    saved: tuple[Path, ...] = ()
    """The files that a stream with `save_to` wrote, in the order of the images."""
    save_error: FluxError | None = None
    """Why not all images could be saved; `session.save()` can try again."""
    journal_error: FluxError | None = None
    """Why the outcome could not be written to the journal; the next run polls the task again."""

    def unwrap(self) -> Self:
        """Return the outcome itself; the counterpart of `Failed.unwrap()`."""
        return self


@attrs.frozen(kw_only=True)
class Failed:
    """The outcome of a request without images, and the reason."""

    ok: ClassVar[Literal[False]] = False

    task_id: str | None = None
    """None if the submit was refused, or its response was lost."""
    request: GenerationRequest | None = None
    error: FluxError
    elapsed: float = 0.0
    """Seconds from the submit (or the attach) to the end."""
    polls: int = 0
    replayed: bool = False
    """Whether it was read from the journal, without a submit or poll."""
    journal_error: FluxError | None = None
    """Why the outcome could not be written to the journal."""

    def unwrap(self) -> Completed:
        """Raise the error."""
        # The error may be raised for many waiters, and each raise would extend the same traceback.
        raise self.error.with_traceback(None)


Outcome = Completed | Failed
"""The outcome of a request; `match` on the class, or check `ok`."""
