"""The plan of a batch: which of its requests the journal knows already, and what the others will probably cost."""

from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from decimal import ROUND_UP, Decimal
from enum import Enum
from pathlib import Path
from typing import Any

import attrs

from flux2max_async._budget import Budget
from flux2max_async._exceptions import InvalidRequestError
from flux2max_async._models.fingerprint import fingerprint_request, generated_image
from flux2max_async._models.request import GenerationRequest
from flux2max_async.cli._requests_file import BadLine, Line, RequestsFile, resolve_image_source
from flux2max_async.cli._rows import is_uncertain
from flux2max_async.cli._terminal import format_pictures
from flux2max_async.journal._entry import EntryState, JournalEntry
from flux2max_async.journal._lookup import ReusePolicy

_CENT = Decimal("0.01")


class Action(Enum):
    """What a run does with a request; the value is its name in the JSON output of a dry run."""

    REPLAY = "done"
    RESUME = "followed"
    SKIP_FAILED = "failed"
    SKIP_UNCERTAIN = "uncertain"
    SKIP_LOST = "lost"
    SUBMIT = "new"
    RETRY_FAILED = "again"
    RESUBMIT_UNCERTAIN = "risked"


_DESCRIPTIONS = {
    Action.REPLAY: "done already",
    Action.RESUME: "running",
    Action.SKIP_FAILED: "failed earlier (--retry-failed tries again)",
    Action.SKIP_UNCERTAIN: "uncertain (--resubmit-uncertain may pay twice)",
    Action.SKIP_LOST: "paid for and not in the journal (--resubmit-uncertain may pay again)",
    Action.SUBMIT: "to be submitted",
    Action.RETRY_FAILED: "failed, to be submitted again",
    Action.RESUBMIT_UNCERTAIN: "uncertain, to be submitted again (may be paid twice)",
}
_RESUBMITS = (Action.RETRY_FAILED, Action.RESUBMIT_UNCERTAIN)
_SUBMITS = (Action.SUBMIT, *_RESUBMITS)


@attrs.frozen
class Plan:
    """What a run is about to do."""

    lines: list[Line]
    """In the order of the stream: requests that are paid for come first, since their URLs are short-lived."""
    reuse_policy: ReusePolicy
    actions: dict[str, Action]
    """By the requests' keys."""
    prices: dict[str, Decimal]
    """The probable cost in US dollars of each request that will be submitted, by its key."""
    max_reservation: Decimal
    """The most that a session with a budget may reserve for one of these requests, in US dollars."""
    spent: Decimal
    """US dollars that all runs so far have cost."""
    committed: Decimal
    """US dollars that count against a budget: spent or reserved."""

    @property
    def total_price(self) -> Decimal:
        """The probable cost of everything that will be submitted, in US dollars."""
        return sum(self.prices.values(), Decimal(0))

    @property
    def sufficient_budget(self) -> Decimal:
        """A budget that is enough even if each request costs as much as the largest reservation."""
        return round_up(self.committed + self.max_reservation * len(self.prices))

    def lines_by_reuse_policy(self) -> Iterator[tuple[list[Line], ReusePolicy]]:
        """Yield lists of lines, each with the policy to stream it with; what is lost from the journal is left out.

        Only the requests that this plan resubmits get the user's policy: for all others, whatever happens to them
        after the plan was made, the user has not agreed to pay again.
        """
        resubmitted = [item for item in self.lines if self.actions[item.key] in _RESUBMITS]
        skipped = (*_RESUBMITS, Action.SKIP_LOST)
        others = [item for item in self.lines if self.actions[item.key] not in skipped]
        yield others, ReusePolicy()
        if resubmitted:
            yield resubmitted, self.reuse_policy

    def describe(self, budget: Decimal | None) -> str:
        """Return a line with the counts and the probable cost."""
        counts = Counter(self.actions.values())
        parts = [f"{counts[action]} {text}" for action, text in _DESCRIPTIONS.items() if counts[action]]
        description = f"{format_pictures(len(self.lines))}: {', '.join(parts)}"
        if self.prices:
            description += f", for about ${round_up(self.total_price)}"
            if budget is not None:
                left = max(budget - self.committed, Decimal(0))
                description += f"; the budget leaves ${round_up(left)}"
                if left < self.total_price:
                    description += ", which isn't enough for all"
        return description


def make_plan(
    lines: Sequence[Line],
    entries: Sequence[JournalEntry],
    reuse_policy: ReusePolicy,
    price_guess: Decimal | None,
    *,
    lost: Container[str] = (),
) -> Plan:
    """Decide what to do with each line, by what the journal knows about it, and estimate the cost.

    Args:
        lines: The requests.
        entries: The journal's, the oldest first.
        reuse_policy: What the user agrees to pay for again.
        price_guess: The assumed price of a picture until one is known, in US dollars.
        lost: The keys of requests that are paid for and that the journal doesn't know.
    """
    newest = newest_entries(entries)
    actions = {item.key: _choose_action(newest.get(item.key), reuse_policy, lost=item.key in lost) for item in lines}
    ordered = sorted(lines, key=lambda item: actions[item.key] in _SUBMITS)
    budget, highest_costs = Budget(None, price_guess), dict[int, Decimal]()
    for item in ordered:
        entry, size = newest.get(item.key), item.content.megapixels
        if entry is not None and entry.state is EntryState.COMPLETED and entry.cost:
            budget.observe(size, entry.cost)
            highest_costs[size] = max(highest_costs.get(size, Decimal(0)), entry.cost)
    sizes = {item.key: item.content.megapixels for item in ordered if actions[item.key] in _SUBMITS}
    return Plan(
        lines=ordered,
        reuse_policy=reuse_policy,
        actions=actions,
        prices={key: _estimate_price(size, highest_costs, price_guess) for key, size in sizes.items()},
        max_reservation=max(map(budget.estimate, sizes.values()), default=Decimal(0)),
        spent=total_cost(entries),
        committed=sum((entry.committed for entry in entries), Decimal(0)),
    )


def newest_entries(entries: Iterable[JournalEntry]) -> dict[str, JournalEntry]:
    """Return the newest entry of each key; a journal lists its entries from the oldest to the newest."""
    return {entry.key: entry for entry in entries}


def total_cost(entries: Iterable[JournalEntry]) -> Decimal:
    """Return the US dollars that the service has charged for all entries together."""
    return sum((entry.cost for entry in entries if entry.cost is not None), Decimal(0))


def _estimate_price(megapixels: int, highest_costs: Mapping[int, Decimal], price_guess: Decimal | None) -> Decimal:
    """Return the probable cost of a picture in US dollars.

    It is the highest cost of its own size if that is known, else the highest that the costs of other sizes imply.
    """
    if megapixels in highest_costs:
        return highest_costs[megapixels]
    guess = Budget(None, price_guess).estimate
    scaled = [cost * guess(megapixels) / guess(size) for size, cost in highest_costs.items() if guess(size)]
    return max(scaled, default=guess(megapixels))


def _choose_action(entry: JournalEntry | None, reuse_policy: ReusePolicy, *, lost: bool) -> Action:
    if lost and not reuse_policy.resubmit_uncertain:
        return Action.SKIP_LOST
    if entry is None or entry.state is EntryState.REFUSED:
        return Action.RESUBMIT_UNCERTAIN if lost else Action.SUBMIT
    if is_uncertain(entry):
        return Action.RESUBMIT_UNCERTAIN if reuse_policy.resubmit_uncertain else Action.SKIP_UNCERTAIN
    match entry.state:
        case EntryState.COMPLETED:
            return Action.REPLAY
        case EntryState.FAILED:
            return Action.RETRY_FAILED if reuse_policy.retry_failed else Action.SKIP_FAILED
        case _:
            return Action.RESUME


def reject_key_conflicts(requests_file: RequestsFile, entries: Iterable[JournalEntry]) -> RequestsFile:
    """Mark the lines as bad whose keys belong to other requests in the journal."""
    newest = newest_entries(entries)
    lines: list[Line] = []
    bad = list(requests_file.bad_lines)
    for item in requests_file.lines:
        entry = newest.get(item.key)
        if entry is None or entry.state is EntryState.REFUSED or entry.fingerprint == item.content.fingerprint:
            lines.append(item)
        else:
            reason = f"key {item.key!r} belongs to another request in the journal, for {entry.prompt[:80]!r}"
            bad.append(BadLine(item.number, "key", reason))
    return attrs.evolve(requests_file, lines=lines, bad_lines=sorted(bad, key=lambda bad_line: bad_line.number))


def find_orphans(lines: Iterable[Line], entries: Iterable[JournalEntry]) -> tuple[list[Line], list[JournalEntry]]:
    """Find what an earlier run has paid for and left unfinished, and whose lines are no longer in the file.

    Returns:
        The requests that can be rebuilt from their journal entries, and the entries of the others.
    """
    newest = newest_entries(entries)
    for item in lines:
        newest.pop(item.key, None)
    rebuilt: list[Line] = []
    others: list[JournalEntry] = []
    for entry in newest.values():
        unsaved = entry.state is EntryState.COMPLETED and entry.owner is not None
        if entry.holder is None and (entry.state is EntryState.SUBMITTED or unsaved):
            orphan = _line_from_entry(entry)
            if orphan is not None and orphan.content.fingerprint == entry.fingerprint:
                rebuilt.append(orphan)
            else:
                others.append(entry)
    return rebuilt, others


def _line_from_entry(entry: JournalEntry) -> Line | None:
    """Rebuild a request; return None if that is impossible: an input image was deleted, or was passed as bytes."""
    params: dict[str, Any] = dict(entry.request)
    try:
        descriptions = params.pop("input_images", ())
        images = [generated_image(source) or resolve_image_source(source, Path()) for source in descriptions]
        request = GenerationRequest(**params, input_images=images, key=entry.key)
        return Line(0, request, fingerprint_request(request))
    except (InvalidRequestError, TypeError):
        return None


def round_up(dollars: Decimal) -> Decimal:
    """Round an amount up to whole cents."""
    return dollars.quantize(_CENT, ROUND_UP)
