"""The summary at the end of a batch: a table, failures grouped by reason, and the command that goes on."""

import itertools
import os
import re
import shlex
import sys
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from decimal import Decimal

import attrs
import typer
from rich.console import RenderableType
from typer.core import TyperOption

import flux2max_async as flux
from flux2max_async.cli._journals import without_password
from flux2max_async.cli._plan import Plan
from flux2max_async.cli._progress import format_duration
from flux2max_async.cli._rows import WAITING, Row
from flux2max_async.cli._runner import Report
from flux2max_async.cli._terminal import Counts, to_single_line
from flux2max_async.journal._entry import EntryState

_PROBLEM_STATES = ("unsaved", EntryState.FAILED, EntryState.UNCERTAIN, EntryState.REFUSED)
_OPTIONAL_COLUMNS = ("uncertain", "refused", "unsaved", "running", "waiting")
"""The states that the table shows only if requests are in them."""
_CONSENT_OPTIONS = ("--retry-failed", "--resubmit-uncertain")
"""The options by which a user agrees to pay again; they hold for one run and are never carried over to the next."""

_ADDRESS_PARAMETERS = frozenset(("base_url", "allow_plain_http", "journal"))


def display_state(row: Row) -> str:
    """Return the state of a request as the summary names it."""
    match row.state:
        case EntryState.COMPLETED:
            return "done" if row.files or row.locations else "unsaved"
        case EntryState.SUBMITTED | EntryState.INTENT:
            return "running"
        case state:
            return state


def summary(rows: Sequence[Row], report: Report, spent: Decimal, *, emulated: bool) -> list[RenderableType]:
    """Return the table of states, a line with time and cost, and a line for each reason of failure.

    Args:
        rows: The states of all requests.
        report: The result of the run.
        spent: US dollars that all runs so far have cost.
        emulated: Whether they are those of an emulator.
    """
    states = Counter(map(display_state, rows))
    columns = ["done", "failed", *(state for state in _OPTIONAL_COLUMNS if states[state])]
    cost = (
        f"${report.spent:.2f} spent"
        if report.spent == spent
        else f"${report.spent:.2f} spent, ${spent:.2f} in all runs"
    )
    facts = [format_duration(report.seconds), "nothing spent" if emulated else cost]
    if report.task_seconds:
        mean = sum(report.task_seconds) / len(report.task_seconds)
        facts.insert(1, f"{mean:.1f} s and {report.polls_per_task:.1f} polls a task")
    return [Counts({state: str(states[state]) for state in columns}), ", ".join(facts), *_failure_reasons(rows)]


def _failure_reasons(rows: Iterable[Row]) -> list[str]:
    """Group failures by state and reason; return a line with an example for each group, the largest group first."""
    examples: dict[tuple[str, str], Row] = {}
    counts: Counter[tuple[str, str]] = Counter()
    for row in rows:
        if (state := display_state(row)) in _PROBLEM_STATES:
            # Messages that differ only in ids and numbers are the same reason.
            reason = re.sub(r"\b[0-9a-f]{8,}\b|\d+", "#", (row.error or "").replace(row.task_id or "\0", "#"))
            examples.setdefault((state, reason), row)
            counts[state, reason] += 1
    return [
        f"{count} {state}: {row.reason}, e.g. {to_single_line(row.key)} ({to_single_line(row.prompt)[:60].rstrip()})"
        for (state, reason), count in counts.most_common()
        for row in (examples[state, reason],)
    ]


@attrs.frozen
class Command:
    """The command line of the run that has just ended."""

    arguments: Sequence[str]
    """The subcommand and its arguments, including the options that were set by environment variables."""
    options_with_value: Collection[str]
    """The names of the options that take a value."""

    @classmethod
    def create(cls, context: typer.Context) -> "Command":
        """Return the command line of a subcommand, with the options that environment variables have set written out."""
        params = [param for param in context.command.params if isinstance(param, TyperOption)]
        from_environment: list[str] = []
        for param in params:
            source = context.get_parameter_source(str(param.name))
            # What concerns an address stays a variable: it belongs with a key, or has a password.
            if source is not None and source.name == "ENVIRONMENT" and param.name not in _ADDRESS_PARAMETERS:
                from_environment += [param.opts[0], os.environ[str(param.envvar)]]
        name, *arguments = map(without_password, sys.argv[1:])
        return cls(
            [name, *from_environment, *arguments],
            options_with_value=[name for param in params if not param.is_flag for name in param.opts],
        )

    def render(self, *, without: Collection[str], add: Sequence[str] = ()) -> str:
        """Return the command as shell text, with some options removed and others added."""
        name, *rest = self.arguments
        kept: list[str] = []
        words = iter(rest)
        for word in words:
            if word == "--":  # only positional arguments follow
                return shlex.join(["flux2max", name, *kept, *add, word, *words])
            option = [word, *itertools.islice(words, word in self.options_with_value)]
            if word.partition("=")[0] not in without:
                kept += option
        return shlex.join(["flux2max", name, *kept, *add])


def suggest_command(
    command: Command, rows: Sequence[Row], report: Report, next_plan: Plan, budget: Decimal | None
) -> tuple[str, str] | None:
    """Return what the next command would do, and the command itself; None if nothing is left to do.

    Args:
        command: The command that has just ended.
        rows: The states of all requests in the file.
        report: The result of the run.
        next_plan: What the same command would do next.
        budget: The run's budget in US dollars.
    """
    states = Counter(map(display_state, rows))
    left = states["running"] + states[WAITING] + states["unsaved"]
    if left:
        match report.error:
            case flux.BudgetExceededError() if budget is not None:
                return f"to go on, with a budget for the other {left}", command.render(
                    without=(*_CONSENT_OPTIONS, "--budget"), add=("--budget", str(next_plan.sufficient_budget))
                )
            case flux.InsufficientBalanceError():
                purpose = "to go on, once the account has been topped up"
            case flux.AuthenticationError() | flux.PermissionDeniedError():
                purpose = "to go on, with another key"
            case flux.ConfigurationError():
                purpose = "to go on, with the right FLUX2MAX_BASE_URL"
            case _:
                purpose = "to go on"
        return purpose, command.render(without=_CONSENT_OPTIONS)
    purposes: list[str] = []
    consent: list[str] = []
    if states["refused"]:
        purposes.append(f"submit the {states['refused']} refused again, once that is fixed")
    if states["failed"]:
        consent.append("--retry-failed")
        purposes.append(f"submit the {states['failed']} failed again")
    if states["uncertain"]:
        consent.append("--resubmit-uncertain")
        purposes.append(f"submit the {states['uncertain']} uncertain again (may be paid twice)")
    if not purposes:
        return None
    return f"to {' and '.join(purposes)}", command.render(without=_CONSENT_OPTIONS, add=consent)
