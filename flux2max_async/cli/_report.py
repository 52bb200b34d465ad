"""The end of a batch, told: a table, failures grouped by their reasons, and the command to go on with."""

import re
import shlex
from collections import Counter
from collections.abc import Iterable, Sequence
from decimal import Decimal

import attrs
from rich.console import Console

import flux2max_async as flux
from flux2max_async._entry import EntryState
from flux2max_async.cli._board import clock
from flux2max_async.cli._folder import WAITING, Row
from flux2max_async.cli._plan import Plan, rounded
from flux2max_async.cli._run import Report
from flux2max_async.cli._terminal import line, table

_WRONG = ("unsaved", EntryState.FAILED, EntryState.UNCERTAIN, EntryState.REFUSED)


def kind_of(row: Row) -> str:
    """Say how a request stands, in one word."""
    match row.state:
        case EntryState.COMPLETED:
            return "done" if row.files else "unsaved"
        case EntryState.SUBMITTED | EntryState.INTENT:
            return "running"
        case state:
            return state


def summarize(screen: Console, rows: Sequence[Row], report: Report, spent: Decimal) -> Counter[str]:
    """Show what a run has come to; gives how many requests there are of each kind."""
    kinds = Counter(kind_of(row) for row in rows)
    cells = {
        **{kind: str(kinds[kind]) for kind in ("done", "failed")},
        **{kind: str(kinds[kind]) for kind in ("uncertain", "refused", "unsaved", "running", "waiting") if kinds[kind]},
        "time": clock(report.seconds),
        "seconds a task": f"{sum(report.task_seconds) / len(report.task_seconds):.1f}" if report.task_seconds else "-",
        "polls a task": f"{report.stats.polls / max(report.stats.submitted, 1):.1f}",
        "spent": f"${spent:.2f}",
    }
    screen.print(table(cells))
    for row, count in _reasons(rows):
        screen.print(
            f"{count} {kind_of(row)}: {line(row.error)}, as {row.key} ({line(row.prompt)[:60]})",
            markup=False, soft_wrap=True,
        )  # fmt: skip
    return kinds


def _reasons(rows: Iterable[Row]) -> list[tuple[Row, int]]:
    """Group what went wrong by its reason, the most frequent first; each with one example."""
    examples: dict[tuple[str, str], Row] = {}
    counts: Counter[tuple[str, str]] = Counter()
    for row in rows:
        if (kind := kind_of(row)) in _WRONG:
            # Ids and amounts don't make another reason.
            reason = re.sub(r"\b[0-9a-f]{8,}\b|\d+", "#", (row.error or "").replace(row.task_id or "\0", "#"))
            examples.setdefault((kind, reason), row)
            counts[kind, reason] += 1
    return [(examples[reason], count) for reason, count in counts.most_common()]


@attrs.frozen
class Advice:
    """What to do next."""

    why: str
    command: str


def advice(
    arguments: Sequence[str], kinds: Counter[str], report: Report, rest: Plan, budget: Decimal | None
) -> Advice | None:
    """Give the command to go on with; None where there is nothing left to do.

    Args:
        arguments: Those of the command that has just ended.
        kinds: How many requests there are of each kind.
        report: What the run has come to.
        rest: What the next run would do.
        budget: What has limited it.
    """
    command = ["flux2max", *arguments]
    left = kinds["running"] + kinds[WAITING] + kinds["unsaved"] + kinds["refused"]
    if left:
        if budget is not None and isinstance(report.stopped, flux.BudgetExceededError):
            needed = rounded(rest.committed + rest.cost)
            return Advice(f"to go on, with a budget for the other {left}", shlex.join(_with_budget(command, needed)))
        return Advice("to go on", shlex.join(command))
    flags: list[str] = []
    whys: list[str] = []
    if kinds["failed"]:
        flags.append("--retry-failed")
        whys.append(f"pay again for the {kinds['failed']} that failed")
    if kinds["uncertain"]:
        flags.append("--resubmit-uncertain")
        whys.append(f"submit the {kinds['uncertain']} uncertain again, and perhaps pay twice")
    if not flags:
        return None
    added = [flag for flag in flags if flag not in command]
    return Advice(f"to {' and '.join(whys)}", shlex.join([*command, *added]))


def _with_budget(command: list[str], budget: Decimal) -> list[str]:
    """Replace the budget in a command, or add one: it may come from elsewhere."""
    kept: list[str] = []
    words = iter(command)
    for word in words:
        if word == "--budget":
            next(words, None)
        elif not word.startswith("--budget="):
            kept.append(word)
    return [*kept, "--budget", str(budget)]
