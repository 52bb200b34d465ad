"""What a batch is about to do: which of its requests are known already, and what the others will probably cost."""

from collections import Counter
from collections.abc import Iterable
from decimal import ROUND_UP, Decimal
from enum import Enum

import attrs

from flux2max_async._entry import EntryState, JournalEntry
from flux2max_async._ledger import Ledger
from flux2max_async.cli._folder import is_lost
from flux2max_async.cli._sheet import BadLine, Line, Sheet
from flux2max_async.cli._terminal import pictures

CENT = Decimal("0.01")


class Fate(Enum):
    """What becomes of a request in this run; the value says how many there are of it."""

    DONE = "{} done already"
    FOLLOWED = "{} running"
    FAILED = "{} failed earlier (--retry-failed pays again)"
    UNCERTAIN = "{} uncertain (--resubmit-uncertain may pay twice)"
    NEW = "{} to be submitted"


@attrs.frozen
class Terms:
    """On which terms a batch takes what the journal knows already."""

    retry_failed: bool = False
    resubmit_uncertain: bool = False


@attrs.frozen
class Plan:
    """What is about to be done."""

    lines: list[Line]
    """In the order in which they are to be asked for: first what is paid for already, since urls are short-lived."""
    fates: dict[str, Fate]
    prices: dict[str, Decimal]
    """US dollars that each of the new ones will probably cost."""
    spent: Decimal
    """US dollars that all runs so far have cost."""
    committed: Decimal
    """US dollars that count against a budget: what is spent, and what is set aside."""

    @property
    def cost(self) -> Decimal:
        """US dollars that all the new ones together will probably cost."""
        return sum(self.prices.values(), Decimal(0))

    @property
    def counts(self) -> Counter[Fate]:
        """How many requests there are of each fate."""
        return Counter(self.fates.values())

    def told(self, budget: Decimal | None) -> str:
        """Say it in one line."""
        parts = [fate.value.format(count) for fate in Fate if (count := self.counts[fate])]
        text = f"{pictures(len(self.lines))}: {', '.join(parts)}"
        if self.prices:
            text += f", for about ${rounded(self.cost)}"
            if budget is not None:
                text += f"; the budget leaves ${rounded(max(budget - self.committed, Decimal(0)))}"
        return text


def plan(lines: Iterable[Line], entries: Iterable[JournalEntry], terms: Terms, price_guess: Decimal | None) -> Plan:
    """Find out what is to be done."""
    every = list(entries)
    newest = {entry.key: entry for entry in every}
    ordered = sorted(lines, key=lambda line: fate_of(newest.get(line.key), terms) is Fate.NEW)
    fates = {line.key: fate_of(newest.get(line.key), terms) for line in ordered}
    ledger = Ledger(None, price_guess)
    for line in ordered:
        entry = newest.get(line.key)
        if entry is not None and entry.state is EntryState.COMPLETED and entry.cost is not None:
            ledger.saw(line.content.megapixels, entry.cost)
    prices = {line.key: ledger.price(line.content.megapixels) for line in ordered if fates[line.key] is Fate.NEW}
    spent = sum((entry.cost for entry in every if entry.cost is not None), Decimal(0))
    return Plan(ordered, fates, prices, spent, sum((entry.outlay for entry in every), Decimal(0)))


def fate_of(entry: JournalEntry | None, terms: Terms) -> Fate:
    """Tell what becomes of a request of which the journal knows this."""
    if entry is None or entry.state is EntryState.REFUSED:
        return Fate.NEW
    if is_lost(entry):
        return Fate.NEW if terms.resubmit_uncertain else Fate.UNCERTAIN
    match entry.state:
        case EntryState.COMPLETED:
            return Fate.DONE
        case EntryState.FAILED:
            return Fate.NEW if terms.retry_failed else Fate.FAILED
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


def rounded(dollars: Decimal) -> Decimal:
    """Round an amount up to whole cents."""
    return dollars.quantize(CENT, ROUND_UP)
