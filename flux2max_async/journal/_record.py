"""One request's record in the journal, and in the budget.

A runner calls, in this order: `find_existing()`; for a request that has to be submitted `begin()` before each attempt
and `mark_refused()` after each that created nothing, then `mark_submitted()`; and at last `finish()`. Whoever saves the
images calls `set_files()` before each file gets its name, and `release()` when all is done.
"""

import asyncio
from collections.abc import Sequence
from datetime import UTC, datetime
from decimal import Decimal

import attrs

from flux2max_async._budget import Budget
from flux2max_async._exceptions import FluxError, InvalidRequestError, JournalError, SubmissionUncertainError
from flux2max_async._models.fingerprint import RequestFingerprint
from flux2max_async._models.request import GenerationRequest
from flux2max_async._models.results import Completed, Outcome
from flux2max_async._text import get_logger
from flux2max_async.journal._budget_record import BudgetRecord, NullRecord, OnWaiting
from flux2max_async.journal._entry import EntryState, Holder, JournalEntry, SavedFile
from flux2max_async.journal._lookup import KeyConflictError, Replay, Resume, ReusePolicy, Submit
from flux2max_async.journal._protocol import Journal
from flux2max_async.journal._serialization import outcome_from_entry
from flux2max_async.journal._transitions import END_STATES, end_entry, state_after

log = get_logger("journal")


@attrs.frozen
class JournalContext:
    """What the records of a session share."""

    journal: Journal
    budget: Budget
    limits_journal: bool
    """Whether the budget limits everything in the journal, or only what this session spends."""
    secrets: Sequence[str] = attrs.field(repr=False)
    background: set["asyncio.Task[None]"] = attrs.field(factory=set["asyncio.Task[None]"], repr=False)
    """Writes that nobody waits for."""


class RequestRecord(BudgetRecord):
    """The record of a request in the journal.

    Args:
        context: What the records of a session share.
        entry: The request's entry as it would be written now, or as it was found.
        request: The request; None for a task that another process left behind.
        fingerprint: The request's content, if the request is known.
    """

    def __init__(
        self,
        context: JournalContext,
        entry: JournalEntry,
        request: GenerationRequest | None,
        fingerprint: RequestFingerprint | None,
        policy: ReusePolicy,
    ) -> None:
        super().__init__(context.budget, fingerprint, reserves=not context.limits_journal, policy=policy)
        self._context = context
        self._journal = context.journal
        self._requested = entry
        self.entry: JournalEntry = entry
        """The newest entry; the one that would be written, until it is."""
        self._request = request
        self._skipped = 0
        """How many attempts were skipped because the newest entry is damaged."""

    @property
    def key(self) -> str:  # type: ignore[override]
        return self.entry.key

    @property
    def files(self) -> tuple[SavedFile, ...]:  # type: ignore[override]
        return self.entry.files

    def check_same(self, other: NullRecord) -> None:
        assert other.fingerprint is not None  # it has a key, so it was computed
        self._check_fingerprint(self.entry, other.fingerprint.fingerprint)

    # ------------------------------------------------------------------ before the submit

    async def find_existing(self, on_waiting: OnWaiting) -> Replay | Resume | Submit:
        while (found := await self._find()) is not None:
            if found.state is EntryState.REFUSED:
                self.entry = attrs.evolve(self._requested, attempt=found.attempt)
                return Submit()
            self._check_fingerprint(found, self._requested.fingerprint)
            if found.holder is Holder.OTHER and not self._is_usable(found):
                on_waiting(found.task_id)
                await self._journal.changed(found)
                continue
            if self._is_orphan(found):
                if not await self._adopt(found):
                    continue
                found = attrs.evolve(found, holder=Holder.US)
                if found.state is EntryState.SUBMITTED:
                    return self._resume(found)
                self.interrupted = True
            return await self._decide(found)
        self.entry = attrs.evolve(self._requested, attempt=1 + self._skipped)
        return Submit()

    async def begin(self) -> None:
        amount = self._estimate()
        self._reserve(amount)
        entry = attrs.evolve(
            self.entry,
            state=EntryState.INTENT,
            holder=Holder.US,
            committed=amount,
            created_at=datetime.now(UTC),
            webhook_token=self.webhook_token,
        )
        limit = self._budget.budget if self._context.limits_journal else None
        try:
            begun = await self._journal.begin(entry, limit=limit)
        except BaseException as error:
            self._settle(Decimal(0))
            if not isinstance(error, FluxError):  # cancelled: the intent may be written, but nothing was sent
                self._write_in_background(_refused(entry))
            raise
        if not begun:
            self._settle(Decimal(0))
            raise KeyConflictError("another process has begun the same request")
        self.entry = entry

    async def mark_refused(self) -> None:
        self._settle(Decimal(0))
        await self._write(_refused(self.entry))

    # ------------------------------------------------------------------ after the submit

    async def mark_submitted(self, task_id: str) -> None:
        submitted_at = datetime.now(UTC)
        await self._write(
            attrs.evolve(self.entry, state=EntryState.SUBMITTED, task_id=task_id, submitted_at=submitted_at)
        )

    async def finish(self, outcome: Outcome, cost: Decimal | None) -> Outcome:
        if (known := await self._recorded_elsewhere(outcome)) is not None:
            outcome, cost = known, self.entry.cost
        outcome = await super().finish(outcome, cost)
        if self.entry.holder is None:
            return outcome
        holder: Holder | None = self.entry.holder
        if holder is Holder.US and not (isinstance(outcome, Completed) and self.policy.save_images):
            holder = None
        await self._write(end_entry(self.entry, outcome, cost, holder=holder, secrets=self._secrets()))
        return outcome if self.problem is None else attrs.evolve(outcome, journal_error=self.problem)

    def on_adopted(self, entry: JournalEntry) -> None:
        if self.entry.holder is Holder.OTHER:
            self.entry = attrs.evolve(self.entry, holder=Holder.US, owner=entry.owner)

    async def set_files(self, files: tuple[SavedFile, ...]) -> None:
        await self._write(attrs.evolve(self.entry, files=files))

    async def release(self) -> None:
        if self.entry.holder is Holder.US:
            await self._write(attrs.evolve(self.entry, holder=None))

    # ------------------------------------------------------------------ internals

    async def _find(self) -> JournalEntry | None:
        """Return the newest entry; None if it is damaged and the request is to be submitted again all the same."""
        try:
            return await self._journal.find(self.key)
        except JournalError as error:
            if error.key is None or not self.policy.resubmit_uncertain:
                raise
            # Its number isn't known. If the next one isn't free, the entry is looked up again.
            self._skipped += 1
            return None

    async def _recorded_elsewhere(self, outcome: Outcome) -> Outcome | None:
        """Return the end that another process has recorded of a task that is not followed here any more.

        It may have recorded the end of an uncertain submit, too, from a webhook with its token.
        """
        entry, state = self.entry, state_after(outcome)
        if entry.holder is not Holder.US or state in END_STATES:
            return None
        if outcome.task_id is None and (state is not EntryState.UNCERTAIN or entry.webhook_token is None):
            return None
        try:
            found = await self._journal.find(entry.key)
        except Exception:  # noqa: BLE001 - whatever a journal raises, what is known here stands
            return None
        if found is None or found.attempt != entry.attempt or found.state not in END_STATES:
            return None
        self.entry = found
        recorded = outcome_from_entry(found, self._request)
        return attrs.evolve(recorded, elapsed=outcome.elapsed, polls=outcome.polls, replayed=False)

    async def _write(self, entry: JournalEntry) -> None:
        self.entry = entry
        try:
            await self._journal.record(entry)
            self.problem = None
        except Exception as error:  # noqa: BLE001 - whatever a journal raises, paid work goes on
            self.problem = error if isinstance(error, JournalError) else JournalError(f"the journal failed: {error!r}")
            name = f"request {entry.key}" if entry.task_id is None else f"task {entry.task_id}"
            log.error("%s goes on, but its journal entry is not up to date: %s", name, error)  # noqa: TRY400 - the text is enough

    def _write_in_background(self, entry: JournalEntry) -> None:
        task = asyncio.ensure_future(self._write(entry))
        self._context.background.add(task)
        task.add_done_callback(self._context.background.discard)

    async def _adopt(self, entry: JournalEntry) -> bool:
        try:
            return await self._journal.adopt(entry)
        except asyncio.CancelledError:
            # It may have been adopted, and nobody would follow it.
            self._write_in_background(attrs.evolve(entry, holder=None))
            raise

    def _resume(self, found: JournalEntry) -> Resume:
        assert found.task_id is not None
        self.entry = found
        self._reserved = self._reserved or self._budget.resume(found.task_id)
        return Resume(found.task_id, age_of(found), adopted=found.holder is Holder.US)

    async def _decide(self, found: JournalEntry) -> Replay | Submit:
        match found.state:
            case EntryState.COMPLETED:
                return self._replay(found)
            case EntryState.FAILED if not self.policy.retry_failed:
                return self._replay(found)
            case EntryState.INTENT | EntryState.UNCERTAIN if not self.policy.resubmit_uncertain:
                raise await self._uncertain(found)
            case _:
                self.entry = attrs.evolve(self._requested, attempt=found.attempt + 1)
                return Submit()

    def _replay(self, entry: JournalEntry) -> Replay:
        self.entry = entry
        if self.fingerprint is not None and entry.cost is not None and entry.state is EntryState.COMPLETED:
            self._budget.observe(self.fingerprint.megapixels, entry.cost)
        return Replay(outcome_from_entry(entry, self._request))

    async def _uncertain(self, entry: JournalEntry) -> SubmissionUncertainError:
        if entry.state is EntryState.INTENT:
            await self._write(attrs.evolve(entry, state=EntryState.UNCERTAIN, holder=None))
        self.entry = attrs.evolve(entry, holder=None)
        when = "" if entry.created_at is None else f" at {entry.created_at:%Y-%m-%d %H:%M:%S} UTC"
        return SubmissionUncertainError(
            f"this request was about to be submitted{when}, and its answer is unknown: a task may exist and cost "
            "money; resubmit_uncertain=True submits it again"
        )

    def _is_usable(self, entry: JournalEntry) -> bool:
        """Check whether an entry can be used while another session holds it: only its images are still being saved."""
        return entry.state is EntryState.COMPLETED and not self.policy.save_images

    def _is_orphan(self, entry: JournalEntry) -> bool:
        """Check whether work is left that nobody does: following a task, or saving its images."""
        if entry.state is EntryState.COMPLETED:
            return self.policy.save_images and entry.holder is None and entry.owner is not None
        return entry.state is EntryState.SUBMITTED and entry.task_id is not None

    def _check_fingerprint(self, found: JournalEntry, fingerprint: str) -> None:
        if found.fingerprint != fingerprint:
            raise InvalidRequestError(
                f"the key {found.key!r} belongs to another request in this journal, for {found.prompt!r}: "
                "each request needs a key of its own",
                field="key",
            )

    def _secrets(self) -> Sequence[str]:
        secret = self._request and self._request.webhook_secret
        return (*self._context.secrets, secret) if secret else self._context.secrets


class AdoptedRecord(RequestRecord):
    """The record of a task that has an entry already: adopted from a session that is gone, or attached by its id."""

    async def find_existing(self, on_waiting: OnWaiting) -> Replay | Resume | Submit:  # noqa: ARG002 - nobody is in the way
        return self._resume(self.entry)


def age_of(entry: JournalEntry) -> float:
    """Return the seconds since an entry's submit by the time of day; 0.0 if the clock was set back."""
    since = entry.submitted_at
    return 0.0 if since is None else max(0.0, (datetime.now(UTC) - since).total_seconds())


def _refused(entry: JournalEntry) -> JournalEntry:
    return attrs.evolve(entry, state=EntryState.REFUSED, holder=None, committed=Decimal(0))
