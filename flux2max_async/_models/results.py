"""The results: snapshots of a task, and the outcome of a request."""

from collections.abc import Mapping
from datetime import datetime
from decimal import Decimal
from enum import StrEnum
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import attrs

from flux2max_async._exceptions import FluxError, TaskFailedError
from flux2max_async._models.generated import NO_URL as NO_URL
from flux2max_async._models.generated import GeneratedImage as GeneratedImage
from flux2max_async._models.generated import inline_url as inline_url
from flux2max_async._models.generated import is_inline as is_inline
from flux2max_async._models.notebook import completed_as_html, short_repr_of
from flux2max_async._models.request import GenerationRequest
from flux2max_async._models.serialization import VERSION, fields_to_json


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


@attrs.frozen(kw_only=True)
class Usage:
    """The cost of a task."""

    cost: Decimal | None = None
    """US dollars, exact; None if the service gave no readable amount."""
    discount: Decimal | None = None
    extra: Mapping[str, Any] = attrs.field(factory=dict[str, Any], repr=False)
    """Whatever else the service reports."""


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

    def to_dict(self) -> dict[str, Any]:
        """Return the fields other than `raw` as JSON values, with a "version"."""
        data = fields_to_json(attrs.evolve(self, raw={}))
        del data["raw"]
        return {"version": VERSION, **data}


@attrs.frozen(kw_only=True, repr=False)
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
    """The files that a stream with `save_to` wrote into a local folder, in the order of the images."""
    locations: tuple[str, ...] = ()
    """Where each saved image is, as text: a path, or an address like "s3://bucket/prefix/fox.jpeg"."""
    save_error: FluxError | None = None
    """Why not all images could be saved; `session.save()` can try again."""
    journal_error: FluxError | None = None
    """Why the outcome could not be written to the journal; the next run polls the task again."""

    def to_dict(self) -> dict[str, Any]:
        """Return the outcome as JSON values, with a "version"; `outcome_from_dict()` reads them. It holds no secret."""
        return _outcome_to_dict(self)

    def unwrap(self) -> Self:
        """Return the outcome itself; the counterpart of `Failed.unwrap()`."""
        return self

    def __repr__(self) -> str:
        return short_repr_of(
            self,
            task_id=self.task_id,
            prompt=self.request and self.request.prompt,
            images=len(self.images),
            cost=self.usage and self.usage.cost,
            elapsed=self.elapsed,
            polls=self.polls,
            replayed=self.replayed or None,
            saved=[*(self.locations or map(str, self.saved))] or None,
            partial_error=self.partial_error,
            save_error=self.save_error,
            journal_error=self.journal_error,
        )

    def _repr_html_(self) -> str:
        """Return the pictures for notebooks: embedded if they were saved and are small, or else by their URLs."""
        return completed_as_html(self)


@attrs.frozen(kw_only=True, repr=False)
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

    def to_dict(self) -> dict[str, Any]:
        """Return the outcome as JSON values, with a "version"; `outcome_from_dict()` reads them. It holds no secret."""
        return _outcome_to_dict(self)

    def unwrap(self) -> Completed:
        """Raise the error."""
        # The error may be raised for many waiters, and each raise would extend the same traceback.
        raise self.error.with_traceback(None)

    def __repr__(self) -> str:
        return short_repr_of(
            self,
            task_id=self.task_id,
            prompt=self.request and self.request.prompt,
            error=self.error,
            elapsed=self.elapsed,
            polls=self.polls,
            replayed=self.replayed or None,
            journal_error=self.journal_error,
        )


Outcome = Completed | Failed
"""The outcome of a request: `match` on the class, or check `isinstance(outcome, Completed)` or `outcome.ok is True`."""


def _outcome_to_dict(outcome: Outcome) -> dict[str, Any]:
    request = outcome.request
    secrets = () if request is None or not request.webhook_secret else (request.webhook_secret,)
    data = fields_to_json(attrs.evolve(outcome, request=None), secrets)
    data["request"] = None if request is None else request.to_dict()
    return {"version": VERSION, "ok": outcome.ok, **data}
