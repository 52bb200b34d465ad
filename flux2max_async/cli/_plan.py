"""What a batch is about to do: which of its requests are known already, and what the others will probably cost."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from decimal import ROUND_UP, Decimal
from enum import Enum
from pathlib import Path
from typing import Any

import attrs

from flux2max_async._budget import Budget
from flux2max_async._exceptions import InvalidRequestError
from flux2max_async._models.fingerprint import fingerprint_request
from flux2max_async._models.request import GenerationRequest
from flux2max_async.cli._output_dir import is_lost
from flux2max_async.cli._requests_file import BadLine, Line, Sheet, picture
from flux2max_async.cli._terminal import pictures
from flux2max_async.journal._context import ReusePolicy
from flux2max_async.journal._entry import EntryState, JournalEntry

_CENT = Decimal("0.01")


class Fate(Enum):
    """What becomes of a request in this run; the value says how many there are of it."""

    DONE = "{} done already"
    FOLLOWED = "{} running"
    FAILED = "{} failed earlier (--retry-failed tries again)"
    UNCERTAIN = "{} uncertain (--resubmit-uncertain may pay twice)"
    NEW = "{} to be submitted"
    AGAIN = "{} failed, to be submitted again"
    RISKED = "{} uncertain, to be submitted again (may be paid twice)"


_BUYS = (Fate.NEW, Fate.AGAIN, Fate.RISKED)


@attrs.frozen
class Plan:
    """What is about to be done."""

    lines: list[Line]
    """In the order in which they are to be asked for: first what is paid for already, since urls are short-lived."""
    terms: ReusePolicy
    fates: dict[str, Fate]
    prices: dict[str, Decimal]
    """US dollars that each of those that are to be submitted will probably cost."""
    dearest: Decimal
    """US dollars that a session with a budget may set aside for one of them."""
    spent: Decimal
    """US dollars that all runs so far have cost."""
    committed: Decimal
    """US dollars that count against a budget: what is spent, and what is set aside."""

    @property
    def cost(self) -> Decimal:
        """US dollars that all of them together will probably cost."""
        return sum(self.prices.values(), Decimal(0))

    @property
    def needed(self) -> Decimal:
        """A budget that is enough if each of them costs what may be set aside for the dearest."""
        return rounded(self.committed + self.dearest * len(self.prices))

    def consenting(self) -> Iterator[tuple[list[Line], ReusePolicy]]:
        """Give the lines with the terms on which they are taken: what is paid for again was planned to be, and told."""
        again = [line for line in self.lines if self.fates[line.key] in {Fate.AGAIN, Fate.RISKED}]
        others = [line for line in self.lines if self.fates[line.key] not in {Fate.AGAIN, Fate.RISKED}]
        yield others, ReusePolicy()
        if again:
            yield again, self.terms

    def told(self, budget: Decimal | None) -> str:
        """Say it in one line."""
        counts = Counter(self.fates.values())
        parts = [fate.value.format(counts[fate]) for fate in Fate if counts[fate]]
        text = f"{pictures(len(self.lines))}: {', '.join(parts)}"
        if self.prices:
            text += f", for about ${rounded(self.cost)}"
            if budget is not None:
                left = max(budget - self.committed, Decimal(0))
                text += f"; the budget leaves ${rounded(left)}"
                if left < self.cost:
                    text += ", which isn't enough for all"
        return text


def plan(
    lines: Iterable[Line], entries: Iterable[JournalEntry], terms: ReusePolicy, price_guess: Decimal | None
) -> Plan:
    """Find out what is to be done."""
    every = list(entries)
    newest = {entry.key: entry for entry in every}
    ordered = sorted(lines, key=lambda line: fate_of(newest.get(line.key), terms) in _BUYS)
    fates = {line.key: fate_of(newest.get(line.key), terms) for line in ordered}
    ledger, seen = Budget(None, price_guess), dict[int, Decimal]()
    for line in ordered:
        entry, size = newest.get(line.key), line.content.megapixels
        if entry is not None and entry.state is EntryState.COMPLETED and entry.cost:
            ledger.saw(size, entry.cost)
            seen[size] = max(seen.get(size, Decimal(0)), entry.cost)
    sizes = {line.key: line.content.megapixels for line in ordered if fates[line.key] in _BUYS}
    return Plan(
        ordered,
        terms,
        fates,
        {key: _price(size, seen, price_guess) for key, size in sizes.items()},
        max(map(ledger.price, sizes.values()), default=Decimal(0)),
        sum((entry.cost for entry in every if entry.cost is not None), Decimal(0)),
        sum((entry.outlay for entry in every), Decimal(0)),
    )


def _price(megapixels: int, seen: Mapping[int, Decimal], price_guess: Decimal | None) -> Decimal:
    """Give what a picture will probably cost: what others of its size did, or what the guess makes of other sizes."""
    if megapixels in seen:
        return seen[megapixels]
    guess = Budget(None, price_guess).price
    scaled = [cost * guess(megapixels) / guess(size) for size, cost in seen.items() if guess(size)]
    return max(scaled, default=guess(megapixels))


def fate_of(entry: JournalEntry | None, terms: ReusePolicy) -> Fate:
    """Tell what becomes of a request of which the journal knows this."""
    if entry is None or entry.state is EntryState.REFUSED:
        return Fate.NEW
    if is_lost(entry):
        return Fate.RISKED if terms.resubmit_uncertain else Fate.UNCERTAIN
    match entry.state:
        case EntryState.COMPLETED:
            return Fate.DONE
        case EntryState.FAILED:
            return Fate.AGAIN if terms.retry_failed else Fate.FAILED
        case _:
            return Fate.FOLLOWED


def checked_against(sheet: Sheet, entries: Iterable[JournalEntry]) -> Sheet:
    """Find the lines whose keys belong to other requests in the journal: they are bad, too."""
    newest = {entry.key: entry for entry in entries}
    lines: list[Line] = []
    bad = list(sheet.bad)
    for line in sheet.lines:
        entry = newest.get(line.key)
        if entry is None or entry.state is EntryState.REFUSED or entry.content == line.content.fingerprint:
            lines.append(line)
        else:
            reason = f"key {line.key!r} is that of another request in the journal, for {entry.prompt[:80]!r}"
            bad.append(BadLine(line.number, "key", reason))
    return Sheet(lines, sorted(bad, key=lambda one: one.number))


def left_behind(lines: Iterable[Line], entries: Iterable[JournalEntry]) -> tuple[list[Line], list[JournalEntry]]:
    """Find what a run that is gone has paid for and left unfinished, and what stands in the sheet no more.

    Returns:
        Those that can be asked for again by what the journal knows of them, and the others.
    """
    newest = {entry.key: entry for entry in entries}
    for line in lines:
        newest.pop(line.key, None)
    found: list[Line] = []
    others: list[JournalEntry] = []
    for entry in newest.values():
        unsaved = entry.state is EntryState.COMPLETED and entry.owner is not None
        if entry.holder is None and (entry.state is EntryState.SUBMITTED or unsaved):
            again = _line_of(entry)
            if again is not None and again.content.fingerprint == entry.content:
                found.append(again)
            else:
                others.append(entry)
    return found, others


def _line_of(entry: JournalEntry) -> Line | None:
    params: dict[str, Any] = dict(entry.request)
    try:
        images = [picture(source, Path()) for source in params.pop("input_images", ())]
        request = GenerationRequest(**params, input_images=images, key=entry.key)
        return Line(0, request, fingerprint_request(request))
    except (InvalidRequestError, TypeError):
        return None  # a picture is gone, say, or was given as bytes


def rounded(dollars: Decimal) -> Decimal:
    """Round an amount up to whole cents."""
    return dollars.quantize(_CENT, ROUND_UP)
