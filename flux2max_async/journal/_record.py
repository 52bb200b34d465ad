"""One request's page in the books: whether it was asked for before, what it may cost, and what became of it."""

import asyncio
import logging
from collections.abc import Callable
from datetime import UTC, datetime
from decimal import Decimal

import anyio.to_thread
import attrs

from flux2max_async._exceptions import (
    FluxError,
    InvalidRequestError,
    JournalError,
    SubmissionUncertainError,
    TaskFailedError,
    TaskNotFoundError,
)
from flux2max_async._models.fingerprint import RequestFingerprint, fingerprint_request, is_local
from flux2max_async._models.request import GenerationRequest
from flux2max_async._models.results import Completed, Failed, Outcome
from flux2max_async.journal import Journal
from flux2max_async.journal._context import Books, KeyConflict, ReusePolicy
from flux2max_async.journal._entry import EntryState, Holder, JournalEntry, SavedFile
from flux2max_async.journal._serialization import outcome_from_entry, outcome_to_json, sanitize

log = logging.getLogger("flux2max_async")


@attrs.define(eq=False)
class RequestRecord:
    """What the books say of one request."""

    books: Books
    request: GenerationRequest | None
    terms: ReusePolicy
    entry: JournalEntry | None = None
    """The request's newest entry; the one that is to be made, until it is."""
    interrupted: bool = attrs.field(default=False, init=False)
    """Whether another session has ended while it was saving the pictures."""
    _content: RequestFingerprint | None = attrs.field(default=None, init=False)
    _reserved: Decimal | None = attrs.field(default=None, init=False)
    """Of this session's budget; None while nothing is."""
    problem: JournalError | None = attrs.field(default=None, init=False)
    """Why the newest facts are not in the journal."""

    @property
    def key(self) -> str | None:
        """What the request is called in the journal; None without one."""
        return None if self.entry is None else self.entry.key

    @property
    def files(self) -> tuple[SavedFile, ...]:
        """The pictures that were saved, or were about to be."""
        return () if self.entry is None else self.entry.files

    def age(self) -> float:
        """Seconds since the request became a task, by the time of day; a clock that was set back counts as no time."""
        since = None if self.entry is None else self.entry.submitted_at
        return 0.0 if since is None else max(0.0, (datetime.now(UTC) - since).total_seconds())

    # ------------------------------------------------------------------ before the submit

    async def identify(self) -> None:
        """Find out what is asked for, and what it is called.

        Raises:
            InvalidRequestError: A local picture can't be read, or the key is no text that could be written.
        """
        request = self.request
        assert request is not None
        if is_local(request):
            content = await anyio.to_thread.run_sync(fingerprint_request, request)
        else:
            content = fingerprint_request(request)
        self._content = content
        if self.books.journal is not None:
            self.entry = JournalEntry(
                key=self._checked_key(request.key) or self._derived_key(content),
                content=content.fingerprint,
                request={**sanitize(content.description, self._secrets()), "prompt": request.prompt},
            )

    def check_same(self, other: "RequestRecord | None") -> None:
        """Make sure that another request of the same key asks for the same.

        Raises:
            InvalidRequestError: It doesn't.
        """
        assert other is not None
        assert other.entry is not None
        self._check_content(other.entry)

    async def look_up(self, waits: Callable[[str | None], None]) -> Outcome | str | None:
        """Look for what became of the request before; waits while another process follows it.

        Args:
            waits: Called while another process follows it, with the task's id if it has one.

        Returns:
            Its outcome, the id of its task that has to be followed, or None where it has to be submitted.

        Raises:
            InvalidRequestError: The key belongs to another request.
            SubmissionUncertainError: Nobody knows whether it was submitted.
        """
        journal, asked = self.books.journal, self.entry
        if journal is None or asked is None:
            return None
        while (found := await journal.find(asked.key)) is not None:
            if found.state is EntryState.REFUSED:
                self.entry = attrs.evolve(asked, attempt=found.attempt)
                return None
            self._check_content(found)
            if found.holder is Holder.OTHER and not self._is_enough(found):
                waits(found.task_id)
                await journal.changed(found)
                continue
            if self._is_orphan(found):
                if not await self._adopt(journal, found):
                    continue
                found = attrs.evolve(found, holder=Holder.US)
                if found.state is EntryState.SUBMITTED:
                    self.entry = found
                    return found.task_id
                self.interrupted = True
            if (known := await self._settled(found)) is not None:
                return known
            self.entry = attrs.evolve(asked, attempt=found.attempt + 1)
            return None
        self.entry = asked
        return None

    async def declare(self) -> None:
        """Set the money aside and write the intent down; the submit may go out when this has returned.

        Raises:
            BudgetExceededError: There is not enough money left.
            JournalError: The intent can't be written.
            OvertakenError: Somebody else has written one.
        """
        assert self._content is not None
        books, ledger = self.books, self.books.ledger
        price = ledger.price(self._content.megapixels)
        if not books.whole_journal:
            ledger.reserve(price)
            self._reserved = price
        if books.journal is None or self.entry is None:
            return
        entry = attrs.evolve(
            self.entry, state=EntryState.INTENT, holder=Holder.US, outlay=price, created_at=datetime.now(UTC)
        )
        try:
            begun = await books.journal.begin(entry, limit=ledger.budget if books.whole_journal else None)
        except BaseException as error:
            self._settle(Decimal(0))
            if not isinstance(error, FluxError):  # cancelled: the intent may be written, but nothing was sent
                self._send_after(attrs.evolve(entry, state=EntryState.REFUSED, holder=None, outlay=Decimal(0)))
            raise
        if not begun:
            self._settle(Decimal(0))
            raise KeyConflict("another process has begun the same request")
        self.entry = entry

    async def revoke(self) -> None:
        """The submit certainly bought nothing, and will be made again."""
        self._settle(Decimal(0))
        if self.entry is not None:
            await self._record(attrs.evolve(self.entry, state=EntryState.REFUSED, holder=None, outlay=Decimal(0)))

    # ------------------------------------------------------------------ after the submit

    async def submitted(self, task_id: str) -> None:
        """The request is a task."""
        if self.entry is not None:
            now = datetime.now(UTC)
            await self._record(attrs.evolve(self.entry, state=EntryState.SUBMITTED, task_id=task_id, submitted_at=now))

    async def close(self, outcome: Outcome, cost: Decimal | None) -> Outcome:
        """The request has come to its end, or nobody here follows it any more.

        Args:
            outcome: What it came to.
            cost: What the service says that it cost.

        Returns:
            The outcome, with the reason if it couldn't be written down.
        """
        if (known := await self._known_elsewhere(outcome)) is not None:
            outcome, cost = known, None if self.entry is None else self.entry.cost
        if self._content is not None and cost is not None and isinstance(outcome, Completed):
            self.books.ledger.saw(self._content.megapixels, cost)
        if (outlay := _outlay_after(outcome, cost)) is not None:
            self._settle(outlay)
        entry = self.entry
        if entry is None or entry.holder is not Holder.US:
            return outcome
        to_be_saved = isinstance(outcome, Completed) and self.terms.to_be_saved
        await self._record(
            ended(entry, outcome, cost, holder=Holder.US if to_be_saved else None, secrets=self._secrets())
        )
        return outcome if self.problem is None else attrs.evolve(outcome, journal_error=self.problem)

    async def _known_elsewhere(self, outcome: Outcome) -> Outcome | None:
        """Give the end of a task that isn't followed here any more, where another process was told of it just now."""
        journal, entry = self.books.journal, self.entry
        if journal is None or entry is None or entry.holder is not Holder.US:
            return None
        if outcome.task_id is None or _state_after(outcome) in _ENDS:
            return None
        try:
            found = await journal.find(entry.key)
        except Exception:  # noqa: BLE001 - whatever a journal does, what is known here stands
            return None
        if found is None or found.attempt != entry.attempt or found.state not in _ENDS:
            return None
        self.entry = found
        return attrs.evolve(
            outcome_from_entry(found, self.request), elapsed=outcome.elapsed, polls=outcome.polls, replayed=False
        )

    async def saving(self, files: tuple[SavedFile, ...]) -> None:
        """Whole pictures are about to get these names."""
        if self.entry is not None:
            await self._record(attrs.evolve(self.entry, files=files))

    async def saved(self) -> None:
        """All pictures are saved, or can't be: others may have the entry."""
        if self.entry is not None and self.entry.holder is Holder.US:
            await self._record(attrs.evolve(self.entry, holder=None))

    # ------------------------------------------------------------------ behind

    async def _record(self, entry: JournalEntry) -> None:
        assert self.books.journal is not None
        self.entry = entry
        try:
            await self.books.journal.record(entry)
            self.problem = None
        except Exception as error:  # noqa: BLE001 - whatever a journal does, what is paid for goes on
            self.problem = error if isinstance(error, JournalError) else JournalError(f"the journal broke: {error!r}")
            log.error("%s goes on, but isn't in the journal as it is: %s", _named(entry), error)  # noqa: TRY400 - its text says all

    def _send_after(self, entry: JournalEntry) -> None:
        """Have something written after what was cut off, without waiting for it."""
        task = asyncio.ensure_future(self._record(entry))
        self.books.errands.add(task)
        task.add_done_callback(self.books.errands.discard)

    async def _adopt(self, journal: Journal, entry: JournalEntry) -> bool:
        try:
            return await journal.adopt(entry)
        except asyncio.CancelledError:
            # It may be ours now, and nobody would follow it.
            self._send_after(attrs.evolve(entry, holder=None))
            raise

    def _settle(self, cost: Decimal) -> None:
        """Replace what this session has set aside by what it cost."""
        if self._reserved is not None:
            self.books.ledger.settle(self._reserved, cost)
            self._reserved = None

    async def _settled(self, found: JournalEntry) -> Outcome | None:
        """Give what stands for good; None where it is to be submitted once more."""
        match found.state:
            case EntryState.COMPLETED:
                return self._replayed(found)
            case EntryState.FAILED:
                return None if self.terms.retry_failed else self._replayed(found)
            case _ if self.terms.resubmit_uncertain:
                return None
            case _:
                raise await self._uncertain(found)

    def _replayed(self, entry: JournalEntry) -> Outcome:
        self.entry = entry
        if self._content is not None and entry.cost is not None and entry.state is EntryState.COMPLETED:
            self.books.ledger.saw(self._content.megapixels, entry.cost)
        return outcome_from_entry(entry, self.request)

    async def _uncertain(self, entry: JournalEntry) -> SubmissionUncertainError:
        if entry.state is EntryState.INTENT:
            await self._record(attrs.evolve(entry, state=EntryState.UNCERTAIN, holder=None))
        self.entry = attrs.evolve(entry, holder=None)
        when = "" if entry.created_at is None else f" at {entry.created_at:%Y-%m-%d %H:%M:%S} UTC"
        return SubmissionUncertainError(
            f"this request was about to be submitted{when}, and no answer is known: a task may exist and cost money; "
            "resubmit_uncertain=True submits it again"
        )

    def _is_enough(self, entry: JournalEntry) -> bool:
        """Tell whether an entry can be used while somebody else still holds it: only its pictures are missing."""
        return entry.state is EntryState.COMPLETED and not self.terms.to_be_saved

    def _is_orphan(self, entry: JournalEntry) -> bool:
        """Tell whether something is left to be done that nobody does: following a task, or saving its pictures."""
        if entry.state is EntryState.COMPLETED:
            return self.terms.to_be_saved and entry.holder is None and entry.owner is not None
        return entry.state is EntryState.SUBMITTED and entry.task_id is not None

    def _check_content(self, found: JournalEntry) -> None:
        assert self.entry is not None
        if found.content != self.entry.content:
            raise InvalidRequestError(
                f"the key {found.key!r} belongs to another request in this journal, for {found.prompt!r}: "
                "each request needs a key of its own",
                "key",
            )

    def _derived_key(self, content: RequestFingerprint) -> str:
        number = 1
        if (occurrences := self.terms.occurrences) is not None:
            occurrences[content.fingerprint] += 1
            number = occurrences[content.fingerprint]
        return f"{content.fingerprint}-{number}"

    def _checked_key(self, key: str | None) -> str | None:
        try:
            return key if key is None else key.encode().decode()
        except UnicodeEncodeError as error:
            raise InvalidRequestError(f"key must be text that can be written as UTF-8, not {key!r}", "key") from error

    def _secrets(self) -> tuple[str, ...]:
        secret = self.request and self.request.webhook_secret
        return (*self.books.secrets, secret) if secret else self.books.secrets


def ended(
    entry: JournalEntry, outcome: Outcome, cost: Decimal | None, *, holder: Holder | None, secrets: tuple[str, ...]
) -> JournalEntry:
    """Give the entry of a request that has come to an outcome, as far as that is an end."""
    state, outlay = _state_after(outcome), _outlay_after(outcome, cost)
    common = attrs.evolve(
        entry, state=state, holder=holder, cost=cost, outlay=entry.outlay if outlay is None else outlay
    )
    if state is EntryState.SUBMITTED:
        return attrs.evolve(common, ended_at=None, result={})
    return attrs.evolve(common, ended_at=datetime.now(UTC), result=outcome_to_json(outcome, secrets=secrets))


_ENDS = frozenset((EntryState.COMPLETED, EntryState.FAILED))


def _outlay_after(outcome: Outcome, cost: Decimal | None) -> Decimal | None:
    """Tell what it has cost; None where nobody knows, and what was set aside stays so."""
    match outcome:
        case Completed() | Failed(error=TaskNotFoundError()):
            return cost
        case _ if _state_after(outcome) in {EntryState.FAILED, EntryState.REFUSED}:
            return cost or Decimal(0)
        case _:
            return None


def _named(entry: JournalEntry) -> str:
    return f"request {entry.key}" if entry.task_id is None else f"task {entry.task_id}"


def _state_after(outcome: Outcome) -> EntryState:
    match outcome:
        case Completed():
            return EntryState.COMPLETED
        case Failed(error=SubmissionUncertainError()):
            return EntryState.UNCERTAIN
        case Failed(task_id=None, error=error):
            # A fault of our own says nothing of what was sent.
            return EntryState.UNCERTAIN if type(error) is FluxError else EntryState.REFUSED
        case Failed(error=TaskFailedError() | TaskNotFoundError()):
            return EntryState.FAILED
        case _:
            return EntryState.SUBMITTED  # not followed any more, here; its end is still to come
