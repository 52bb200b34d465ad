"""What comes back: snapshots of a task, and the outcome that a request came to."""

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
    """Where a task stands. A status that nobody knows yet counts as IN_PROGRESS; `TaskSnapshot.raw` shows it."""

    PENDING = "pending"
    IN_PROGRESS = "in_progress"
    COMPLETED = "completed"
    FAILED = "failed"

    @property
    def ended(self) -> bool:
        """Whether nothing more will happen to the task."""
        return self in _ENDED


_ENDED = frozenset((TaskStatus.COMPLETED, TaskStatus.FAILED))


NO_URL = "about:blank"
"""Stands for the url of a picture that is known to exist, and has to be asked for anew."""


@attrs.frozen
class Usage:
    """What a task cost."""

    cost: Decimal | None = None
    """US dollars, exact, parsed from the service's string; None where the service gives no readable amount."""
    discount: Decimal | None = None
    extra: Mapping[str, Any] = attrs.field(factory=dict[str, Any], repr=False)
    """What else the service says about it."""


@attrs.frozen
class GeneratedImage:
    """One picture of a completed task. `session.save()` downloads it."""

    url: str
    """Short-lived: about 10 minutes at the model's maker."""
    type: str
    task_id: str
    extra: Mapping[str, Any] = attrs.field(factory=dict[str, Any], repr=False)
    """`jobId` and whatever else the service says."""
    index: int = 0
    """The picture's place among its task's pictures."""


@attrs.frozen
class TaskSnapshot:
    """One answer about a task."""

    task_id: str
    status: TaskStatus
    progress: float | None = None
    """0.0 to 1.0; often missing, sometimes coarse."""
    images: tuple[GeneratedImage, ...] = ()
    usage: Usage | None = None
    created_at: datetime | None = None
    """Timezone-aware."""
    error: TaskFailedError | None = None
    """Set exactly when the status is FAILED."""
    # What the service says freely may echo secrets: it can be reached, and isn't shown.
    metadata: Mapping[str, Any] = attrs.field(factory=dict[str, Any], repr=False)
    raw: Mapping[str, Any] = attrs.field(factory=dict[str, Any], repr=False)
    """The answer as it came."""


@attrs.frozen
class Completed:
    """A request that came to pictures."""

    ok: ClassVar[Literal[True]] = True

    task_id: str
    request: GenerationRequest | None
    """None only for a task that was attached by its id alone."""
    images: tuple[GeneratedImage, ...]
    """Never empty."""
    usage: Usage | None
    metadata: Mapping[str, Any] = attrs.field(repr=False)
    elapsed: float
    """Seconds from the submit (or the attach) to the poll that saw the end."""
    polls: int
    replayed: bool = False
    """Whether it comes from the journal: then nothing was submitted or polled for it now."""
    saved: tuple[Path, ...] = ()
    """The files, where the stream was told to save; in the order of the images."""
    save_error: FluxError | None = None
    """Why not all pictures could be saved; `session.save()` may try again."""
    journal_error: FluxError | None = None
    """Why the journal doesn't know of this end: a rerun asks the service for it again."""

    def unwrap(self) -> Self:
        """Give the outcome itself; the counterpart of `Failed.unwrap()`."""
        return self


@attrs.frozen
class Failed:
    """A request that came to nothing, and why."""

    ok: ClassVar[Literal[False]] = False

    task_id: str | None
    """None where the request was refused or lost before it had an id."""
    request: GenerationRequest | None
    error: FluxError
    elapsed: float
    """Seconds from the submit (or the attach) to the end."""
    polls: int
    replayed: bool = False
    """Whether it comes from the journal: then nothing was submitted or polled for it now."""
    journal_error: FluxError | None = None
    """Why the journal doesn't know of this end."""

    def unwrap(self) -> Completed:
        """Raise the error."""
        # The error may be raised for many waiters: each starts with a clean traceback.
        raise self.error.with_traceback(None)


Outcome = Completed | Failed
"""What one request came to; `match` on the class or look at `ok`."""
