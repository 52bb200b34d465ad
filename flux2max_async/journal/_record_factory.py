"""Makes the record of each request of a session, and with it the request's key."""

from collections.abc import Sequence
from decimal import Decimal
from secrets import token_hex

import anyio.to_thread
import attrs

from flux2max_async._budget import Budget
from flux2max_async._config import SessionConfig
from flux2max_async._exceptions import InvalidRequestError, JournalError
from flux2max_async._models.fingerprint import RequestFingerprint, fingerprint_request, is_local
from flux2max_async._models.request import GenerationRequest
from flux2max_async._models.results import Outcome
from flux2max_async._text import get_logger
from flux2max_async.journal._budget_record import BudgetRecord, NullRecord, OnWaiting
from flux2max_async.journal._entry import EntryState, Holder, JournalEntry
from flux2max_async.journal._lookup import Replay, Resume, ReusePolicy, Submit
from flux2max_async.journal._protocol import Journal
from flux2max_async.journal._record import AdoptedRecord, JournalContext, RequestRecord
from flux2max_async.journal._serialization import sanitize

log = get_logger("journal")


class RecordFactory:
    """Makes records.

    Args:
        journal: The session's journal, if it has one.
        budget: The session's budget.
        config: The session's settings.
        secrets: What must not be written.
    """

    def __init__(
        self, journal: Journal | None, budget: Budget, config: SessionConfig, *, secrets: Sequence[str]
    ) -> None:
        self._content_keys = config.content_keys
        limits_journal = config.budget_limits_journal
        self._budget = budget
        self.keeps_nothing: bool = journal is None and budget.budget is None
        """Whether a NullRecord will do for each request."""
        self._context = None if journal is None else JournalContext(journal, budget, limits_journal, secrets)

    async def create(self, request: GenerationRequest, policy: ReusePolicy) -> NullRecord:
        """Return the record of a request; reads its local images in a thread, because their content counts.

        Raises:
            InvalidRequestError: A local image can't be read, or the key can't be written as UTF-8.
        """
        return self._create(request, await anyio.to_thread.run_sync(fingerprint_request, request), policy)

    def create_now(self, request: GenerationRequest, policy: ReusePolicy) -> NullRecord | None:
        """Return the record of a request without local images; None if it has any.

        Raises:
            InvalidRequestError: The key can't be written as UTF-8.
        """
        return None if is_local(request) else self._create(request, fingerprint_request(request), policy)

    def _create(self, request: GenerationRequest, fingerprint: RequestFingerprint, policy: ReusePolicy) -> NullRecord:
        if self._context is None:
            return BudgetRecord(self._budget, fingerprint, policy=policy)
        key = _checked_key(request.key)
        if not key:
            unique = f"{fingerprint.fingerprint}-{token_hex(8)}"
            key = _derived_key(fingerprint, policy) if self._content_keys else unique
        secrets = self._context.secrets
        if request.webhook_secret:
            secrets = (*secrets, request.webhook_secret)
        entry = JournalEntry(
            key=key,
            fingerprint=fingerprint.fingerprint,
            request={**sanitize(fingerprint.description, secrets), "prompt": request.prompt},
        )
        return RequestRecord(self._context, entry, request, fingerprint, policy)

    def attach(self, task_id: str, request: GenerationRequest | None) -> NullRecord:
        """Return the record of a task that was submitted earlier."""
        if self._context is None:
            return BudgetRecord(self._budget, None, task_id=task_id)
        return AttachedRecord(self._context, task_id, request)

    def adopt(self, entry: JournalEntry) -> NullRecord:
        """Return the record of a task that another session left behind and the journal gave to this one."""
        assert self._context is not None
        return AdoptedRecord(self._context, entry, None, None, ReusePolicy())


class AttachedRecord(NullRecord):
    """The record of an attached task: its entry in the journal, if there is one, else the session's budget.

    Its images are saved by nobody: a stream whose request is this task has a record of its own.
    """

    def __init__(self, context: JournalContext, task_id: str, request: GenerationRequest | None) -> None:
        super().__init__(task_id)
        self._context = context
        self._request = request
        self._record = NullRecord(task_id)

    async def find_existing(self, on_waiting: OnWaiting) -> Replay | Resume | Submit:
        try:
            entry = await self._find_entry()
        except JournalError as error:
            log.warning("task %s is polled, but not found in the journal: %s", self.task_id, error)
            entry = None
        if entry is None:
            self._record = BudgetRecord(self._context.budget, None, task_id=self.task_id)
        else:
            self._record = AdoptedRecord(self._context, entry, self._request, None, self.policy)
        return await self._record.find_existing(on_waiting)

    async def finish(self, outcome: Outcome, cost: Decimal | None) -> Outcome:
        return await self._record.finish(outcome, cost)

    def suspend(self, task_id: str) -> None:
        self._record.suspend(task_id)

    def on_adopted(self, entry: JournalEntry) -> None:
        self._record.on_adopted(entry)

    async def _find_entry(self) -> JournalEntry | None:
        """Return the task's entry, held by this session unless another one that is alive holds it."""
        journal = self._context.journal
        entry = await journal.find_task(self.task_id or "")
        if entry is None or entry.state is not EntryState.SUBMITTED or entry.holder is Holder.OTHER:
            return entry
        adopted = entry.holder is Holder.US or await journal.adopt(entry)
        return attrs.evolve(entry, holder=Holder.US if adopted else Holder.OTHER)


def _checked_key(key: str | None) -> str | None:
    try:
        return key if key is None else key.encode().decode()
    except UnicodeEncodeError as error:
        raise InvalidRequestError(f"key must be text that can be written as UTF-8, not {key!r}", field="key") from error


def _derived_key(fingerprint: RequestFingerprint, policy: ReusePolicy) -> str:
    occurrence = 1
    if policy.occurrences is not None:
        policy.occurrences[fingerprint.fingerprint] += 1
        occurrence = policy.occurrences[fingerprint.fingerprint]
    return f"{fingerprint.fingerprint}-{occurrence}"
