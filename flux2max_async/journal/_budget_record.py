"""Records of requests without a journal: in nothing (NullRecord), or in the session's budget (BudgetRecord)."""

import asyncio
from collections.abc import Callable
from decimal import Decimal
from functools import cached_property

from flux2max_async._budget import Budget
from flux2max_async._exceptions import JournalError
from flux2max_async._models.fingerprint import RequestFingerprint
from flux2max_async._models.results import Completed, Outcome
from flux2max_async.journal._entry import JournalEntry, SavedFile
from flux2max_async.journal._lookup import Replay, Resume, ReusePolicy, Submit
from flux2max_async.journal._transitions import committed_after

OnWaiting = Callable[[str | None], None]
"""Called with the task's id, if it has one, while another process follows the request."""


class NullRecord:
    """The record of a session without journal and budget: it keeps nothing.

    Args:
        task_id: The id of a task that was submitted earlier; None for a request that has to be submitted.
    """

    key: str | None = None
    """The request's name in the journal."""
    files: tuple[SavedFile, ...] = ()
    """The images that were saved, or were about to be."""
    interrupted: bool = False
    """Whether another session ended while it saved the images."""
    problem: JournalError | None = None
    """Why the newest facts are not in the journal."""
    fingerprint: RequestFingerprint | None = None
    """The request's content, as far as this record needs it."""
    webhook_token: str | None = None
    """The token in the webhook URL of the next attempt; set before `begin()`."""

    def __init__(self, task_id: str | None = None, policy: ReusePolicy | None = None) -> None:
        self.task_id: str | None = task_id
        self.policy: ReusePolicy = policy or ReusePolicy()

    @cached_property
    def saving(self) -> asyncio.Lock:
        """Held while images are saved: several items of streams may share this record."""
        return asyncio.Lock()

    def check_same(self, other: "NullRecord") -> None:
        """Check that another request with the same key asks for the same.

        Raises:
            InvalidRequestError: It does not.
        """

    async def find_existing(self, on_waiting: OnWaiting) -> Replay | Resume | Submit:  # noqa: ARG002 - for subclasses
        """Find out what became of the request earlier; wait while another process follows it.

        Raises:
            InvalidRequestError: The key belongs to another request.
            SubmissionUncertainError: Nobody knows whether it was submitted.
        """
        return Submit() if self.task_id is None else Resume(self.task_id, None)

    async def begin(self) -> None:
        """Reserve the money and write the intent; an attempt may be sent once this has returned.

        Raises:
            BudgetExceededError: The budget doesn't allow it.
            JournalError: The intent can't be written.
            KeyConflictError: Another process has written one.
        """

    async def mark_refused(self) -> None:
        """Record that an attempt certainly created nothing."""

    async def mark_submitted(self, task_id: str) -> None:
        """Record that the request is a task."""

    async def finish(self, outcome: Outcome, cost: Decimal | None) -> Outcome:  # noqa: ARG002 - for subclasses
        """Record the outcome, which may not be the task's end.

        Args:
            outcome: The outcome.
            cost: US dollars, as the service reports.

        Returns:
            The outcome, with the reason if it could not be recorded.
        """
        return outcome

    def suspend(self, task_id: str) -> None:
        """Keep what is reserved for a task that is not followed any more: whoever attaches it settles that."""

    def on_adopted(self, entry: JournalEntry) -> None:
        """Learn that the journal has given the entry, which another session held, to this one."""

    async def set_files(self, files: tuple[SavedFile, ...]) -> None:
        """Record under which names complete images are about to be stored."""

    async def release(self) -> None:
        """Release the entry: all images are saved, or can't be."""


class BudgetRecord(NullRecord):
    """The record of a request in the session's budget.

    Args:
        budget: The session's budget.
        fingerprint: The request's content; None for a task that was attached by its id alone.
        reserves: Whether the session's own budget is reserved from; the journal counts for itself.
    """

    def __init__(
        self,
        budget: Budget,
        fingerprint: RequestFingerprint | None,
        *,
        reserves: bool = True,
        task_id: str | None = None,
        policy: ReusePolicy | None = None,
    ) -> None:
        super().__init__(task_id, policy)
        self._budget = budget
        self.fingerprint = fingerprint
        self._reserves = reserves
        self._reserved = None if task_id is None else budget.resume(task_id)
        """US dollars; None while nothing is reserved."""

    async def begin(self) -> None:
        self._reserve(self._estimate())

    async def mark_refused(self) -> None:
        self._settle(Decimal(0))

    async def finish(self, outcome: Outcome, cost: Decimal | None) -> Outcome:
        if self.fingerprint is not None and cost is not None and isinstance(outcome, Completed):
            self._budget.observe(self.fingerprint.megapixels, cost)
        if (committed := committed_after(outcome, cost)) is not None:
            self._settle(committed)
        elif outcome.task_id is not None:
            self.suspend(outcome.task_id)
        return outcome

    def suspend(self, task_id: str) -> None:
        if self._reserved is not None:
            self._budget.suspend(task_id, self._reserved)
            self._reserved = None

    def _estimate(self) -> Decimal:
        return self._budget.estimate(1 if self.fingerprint is None else self.fingerprint.megapixels)

    def _reserve(self, amount: Decimal) -> None:
        if self._reserves:
            self._budget.reserve(amount)
            self._reserved = amount

    def _settle(self, cost: Decimal) -> None:
        if self._reserved is not None:
            self._budget.settle(self._reserved, cost)
            self._reserved = None
