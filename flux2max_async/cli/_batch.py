"""The command `batch`: a sheet read and checked, a plan said and agreed to, the run, and what it has come to."""

import asyncio
import json
import os
import sys
from collections.abc import Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import attrs
import typer

import flux2max_async as flux
from flux2max_async.cli._config import Access
from flux2max_async.cli._gallery import Gallery, write_all
from flux2max_async.cli._output_dir import Folder
from flux2max_async.cli._parsers import READERS, guessed_form
from flux2max_async.cli._plan import Plan, checked_against, left_behind, plan, rounded
from flux2max_async.cli._requests_file import Line, Sheet, read_sheet
from flux2max_async.cli._runner import Job, Report, run
from flux2max_async.cli._summary import Command, advice, kind_of, summary
from flux2max_async.cli._terminal import Screen, complain, line, pictures, somebody_can_be_asked, tell, tell_exactly
from flux2max_async.journal._context import ReusePolicy

_STANDARD_INPUT = "-"


@attrs.frozen(kw_only=True)
class Batch:
    """What is asked for, as the options say it."""

    file: str
    form: str | None
    defaults: Mapping[str, Any] = attrs.field(repr=False)
    repeat: int
    skip_bad: bool
    out: Path | None
    access: Access
    max_in_flight: int
    task_timeout: float
    budget: Decimal | None
    price_guess: Decimal | None
    terms: ReusePolicy
    dry_run: bool
    yes: bool
    as_json: bool
    command: Command
    """The one that was typed."""


def do(batch: Batch) -> int:
    """Run a batch, or go on with it; gives the exit code.

    Raises:
        FluxError: It couldn't be begun.
    """
    sheet = _read(batch)
    folder = Folder(batch.out or _own_folder(batch.file))
    entries = asyncio.run(folder.entries())
    sheet = checked_against(sheet, entries)
    for bad in sheet.bad:
        tell(f"{batch.file}:{bad.number}: {bad.field}: {bad.reason}")
    if sheet.bad and not batch.skip_bad:
        count = len({bad.number for bad in sheet.bad})
        those = "a line is" if count == 1 else f"{count} lines are"
        complain(f"{those} bad, so nothing was sent; --skip-bad leaves them out")
        return 2
    if not sheet.lines:
        complain(f"{batch.file} has no prompts")
        return 2
    earlier, lost = left_behind(sheet.lines, entries)
    lines = [*sheet.lines, *earlier]
    todo = plan(lines, entries, batch.terms, batch.price_guess)
    schedule = flux.LearnedSchedule()
    session = batch.access.session(
        needs_key=not batch.dry_run,
        max_in_flight=batch.max_in_flight,
        task_timeout=batch.task_timeout,
        budget=batch.budget,
        price_guess=batch.price_guess,
        schedule=schedule,
        journal=flux.SqliteJournal(folder.database),
    )
    if batch.dry_run:
        _show(todo, batch)
        return 0
    tell(todo.told(batch.budget))
    if earlier:
        tell(f"{len(earlier)} of them no longer in {batch.file}, but paid for")
    for entry in lost:
        complain(f"submitted and no longer in {batch.file}: {entry.key}; to have it: flux2max fetch {entry.task_id}")
    if (refusal := _refusal(batch, todo, folder)) is not None:
        return refusal
    folder.make()
    folder.gather(lines, entries)
    report = asyncio.run(
        run(
            Job(
                folder=folder,
                plan=todo,
                session=session,
                schedule=schedule,
                places=batch.max_in_flight,
                budget=batch.budget,
                as_json=batch.as_json,
            )
        )
    )
    code = _conclude(batch, folder, sheet.lines, lines, report)
    if report.stuck:
        os._exit(code)
    return code


def _own_folder(file: str) -> Path:
    """Name the folder after the file.

    Raises:
        ConfigurationError: It would have another name in the next run.
    """
    if file == _STANDARD_INPUT:
        return Path("flux2max-batch")
    if not Path(file).is_file():
        raise flux.ConfigurationError(f"{file!r} is not a regular file: say with --out where the pictures go")
    return Path(f"flux2max-{Path(file).stem}")


def _read(batch: Batch) -> Sheet:
    """Read the sheet.

    Raises:
        ConfigurationError: It can't be read.
    """
    path = Path(batch.file)
    try:
        data = sys.stdin.buffer.read() if batch.file == _STANDARD_INPUT else path.read_bytes()
    except OSError as error:
        raise flux.ConfigurationError(f"can't read {batch.file!r}: {error.strerror}") from error
    form = batch.form
    if form is None and batch.file == _STANDARD_INPUT:
        form = guessed_form(data)
        if form is None:
            raise flux.ConfigurationError("standard input may be prompts or a table: say which with --as")
    form = form or path.suffix.lower().removeprefix(".")
    if form not in READERS:
        raise flux.ConfigurationError(f"{batch.file!r} is neither .txt nor .jsonl nor .csv: say which with --as")
    folder = Path() if batch.file == _STANDARD_INPUT else path.parent
    return read_sheet(data, form, folder=folder, defaults=batch.defaults, repeat=batch.repeat)


def _show(todo: Plan, batch: Batch) -> None:
    """Show what would be sent."""
    for item in todo.lines:
        price = todo.prices.get(item.key)
        params = dict(item.content.description)
        if batch.as_json:
            fate = todo.fates[item.key].name.lower()
            cost = None if price is None else str(rounded(price))
            typer.echo(json.dumps({"key": item.key, "line": item.number, "fate": fate, "cost": cost, "params": params}))
        elif price is not None:
            prompt = params.pop("prompt")
            more = "".join(f", {name} {_short(value)}" for name, value in params.items())
            typer.echo(line(f"{item.key}: {prompt}{more}, ${rounded(price)}"))
    tell(f"dry run: {todo.told(batch.budget)}")


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 100 else f"{text[:99]}…"


def _refusal(batch: Batch, todo: Plan, folder: Folder) -> int | None:
    """Ask before money is spent, where somebody sits at a terminal; gives the exit code where nobody agrees."""
    if batch.yes or not todo.prices:
        return None
    paid = folder.paid_without_journal(todo.lines)
    if paid:
        known = f"{pictures(paid)} that {folder.results.name} knows"
        complain(f"{folder.database} is gone, and {known} would be paid again")
    if somebody_can_be_asked():
        if typer.confirm("Go on?", err=True):
            return None
        complain("nothing was sent")
        return 1
    if paid or sys.stderr.isatty():
        complain("nobody can be asked, so nothing was sent: add --yes to go ahead")
        return 2
    return None


def _conclude(batch: Batch, folder: Folder, asked: Sequence[Line], lines: Sequence[Line], report: Report) -> int:
    """Write down and say what it has come to; gives the exit code.

    Args:
        batch: What was asked for.
        folder: Where it is.
        asked: What stands in the sheet.
        lines: That, and what an earlier run has left.
        report: What the run has come to.
    """
    # The journal has the last word: it knows what other processes have done, too.
    entries = asyncio.run(folder.entries())
    folder.gather(lines, entries)
    gallery = Gallery(folder.path, hurry=len(report.signals) > 1)
    trouble = write_all(folder, list(folder.rows.values()), gallery, running=False)
    rows = [folder.rows[item.key] for item in asked]
    rest = plan(asked, entries, ReusePolicy(), batch.price_guess)
    Screen(sys.stderr if batch.as_json else sys.stdout).show(*summary(rows, report, rest.spent))
    if trouble is not None:
        complain(trouble)
    if report.stopped is not None:
        complain(f"stopped: {report.stopped}")
    done = sum(kind_of(row) == "done" for row in rows)
    page = "" if trouble else f"; to look at them: {gallery.path}"
    tell(f"{done} of {pictures(len(rows))} in {folder.path}{page}")
    if (todo := advice(batch.command, rows, report, rest, batch.budget)) is not None:
        why, command = todo
        same = " (with the same standard input)" if batch.file == _STANDARD_INPUT else ""
        tell_exactly(f"{why}{same}: {command}")
    if done == len(rows) and trouble is None and not report.unheard and not report.stuck:
        return 0
    return 128 + report.signals[0] if report.signals else 1
