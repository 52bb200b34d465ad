"""The end of a batch, told: a table, failures grouped by their reasons, and the command to go on with."""

import itertools
import re
import shlex
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from decimal import Decimal

import attrs
from rich.console import RenderableType

import flux2max_async as flux
from flux2max_async.cli._output_dir import WAITING, Row
from flux2max_async.cli._plan import Plan
from flux2max_async.cli._progress import clock
from flux2max_async.cli._runner import Report
from flux2max_async.cli._terminal import line, table
from flux2max_async.journal._entry import EntryState

_WRONG = ("unsaved", EntryState.FAILED, EntryState.UNCERTAIN, EntryState.REFUSED)
_RARE = ("uncertain", "refused", "unsaved", "running", "waiting")


def kind_of(row: Row) -> str:
    """Say how a request stands, in one word."""
    match row.state:
        case EntryState.COMPLETED:
            return "done" if row.files else "unsaved"
        case EntryState.SUBMITTED | EntryState.INTENT:
            return "running"
        case state:
            return state


def summary(rows: Sequence[Row], report: Report, spent: Decimal) -> list[RenderableType]:
    """Tell what a run has come to."""
    kinds = Counter(map(kind_of, rows))
    counts = {kind: str(kinds[kind]) for kind in ("done", "failed", *_RARE) if kinds[kind] or kind not in _RARE}
    facts = [clock(report.seconds), f"${spent:.2f} spent"]
    if report.task_seconds:
        facts.insert(
            1, f"{sum(report.task_seconds) / len(report.task_seconds):.1f} s and {report.polls:.1f} polls a task"
        )
    return [table(counts), ", ".join(facts), *_reasons(rows)]


def _reasons(rows: Iterable[Row]) -> list[str]:
    """Group what went wrong by its reason, the most frequent first; each with one example."""
    examples: dict[tuple[str, str], Row] = {}
    counts: Counter[tuple[str, str]] = Counter()
    for row in rows:
        if (kind := kind_of(row)) in _WRONG:
            # Ids and amounts don't make another reason.
            reason = re.sub(r"\b[0-9a-f]{8,}\b|\d+", "#", (row.error or "").replace(row.task_id or "\0", "#"))
            examples.setdefault((kind, reason), row)
            counts[kind, reason] += 1
    return [
        f"{count} {kind}: {line(row.error)}, e.g. {line(row.key)} ({line(row.prompt)[:60].rstrip()})"
        for (kind, reason), count in counts.most_common()
        for row in (examples[kind, reason],)
    ]


@attrs.frozen
class Command:
    """The command that has just ended."""

    arguments: Sequence[str]
    """Its name and all that follows, settings of the environment among it."""
    valued: Collection[str]
    """The options that are followed by a value."""

    def changed(self, *, without: Collection[str], add: Sequence[str] = ()) -> str:
        """Write it as it would have to be typed, with other options."""
        name, *rest = self.arguments
        kept: list[str] = []
        words = iter(rest)
        for word in words:
            if word == "--":  # what follows is no option
                return shlex.join(["flux2max", name, *kept, *add, word, *words])
            whole = [word, *itertools.islice(words, word in self.valued)]
            if word.partition("=")[0] not in without:
                kept += whole
        return shlex.join(["flux2max", name, *kept, *add])


def advice(
    command: Command, rows: Sequence[Row], report: Report, rest: Plan, budget: Decimal | None
) -> tuple[str, str] | None:
    """Say what the next command is for, and give it; None where there is nothing left to do.

    Args:
        command: The one that has just ended.
        rows: How all requests stand.
        report: What the run has come to.
        rest: What the next run would do.
        budget: What has limited it.
    """
    kinds = Counter(map(kind_of, rows))
    left = kinds["running"] + kinds[WAITING] + kinds["unsaved"]
    # Whoever goes on doesn't pay again, or twice, for what this run has just paid for again.
    consents = ("--retry-failed", "--resubmit-uncertain")
    if left:
        match report.stopped:
            case flux.BudgetExceededError() if budget is not None:
                return f"to go on, with a budget for the other {left}", command.changed(
                    without=(*consents, "--budget"), add=("--budget", str(rest.needed))
                )
            case flux.InsufficientBalanceError():
                why = "to go on, once the account has been topped up"
            case flux.AuthenticationError() | flux.PermissionDeniedError():
                why = "to go on, with another key"
            case _:
                why = "to go on"
        return why, command.changed(without=consents)
    whys: list[str] = []
    flags: list[str] = []
    if kinds["refused"]:
        whys.append(f"submit the {kinds['refused']} refused again, once that is mended")
    if kinds["failed"]:
        flags.append("--retry-failed")
        whys.append(f"submit the {kinds['failed']} failed again")
    if kinds["uncertain"]:
        flags.append("--resubmit-uncertain")
        whys.append(f"submit the {kinds['uncertain']} uncertain again (may be paid twice)")
    return (f"to {' and '.join(whys)}", command.changed(without=consents, add=flags)) if whys else None
