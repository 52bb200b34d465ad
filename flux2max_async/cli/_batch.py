"""The command `batch`: a sheet read and checked, a plan said and agreed to, the run, and what it has come to."""

import asyncio
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import typer

import flux2max_async as flux
from flux2max_async._entry import JournalEntry
from flux2max_async._settings import checked_dollars
from flux2max_async.cli._folder import Folder
from flux2max_async.cli._gallery import Gallery
from flux2max_async.cli._plan import Plan, Terms, checked_against, plan, rounded
from flux2max_async.cli._report import advice, summarize
from flux2max_async.cli._run import Report, Settings, run, write
from flux2max_async.cli._settings import Access
from flux2max_async.cli._sheet import FORMATS, Sheet, read_sheet
from flux2max_async.cli._terminal import complain, console, line, pictures, tell

STANDARD_INPUT = "-"


@attrs.frozen(kw_only=True)
class Batch:
    """What is asked for."""

    file: str
    form: str | None
    defaults: Mapping[str, Any] = attrs.field(repr=False)
    repeat: int
    skip_bad: bool
    out: Path | None
    access: Access
    max_in_flight: int
    deadline: float
    budget: str | None
    price_guess: str | None
    terms: Terms
    dry_run: bool
    yes: bool
    as_json: bool
    arguments: Sequence[str]
    """Those of the command."""

    def settings(self) -> Settings:
        """Give what the run needs.

        Raises:
            ConfigurationError: An amount of money is none.
        """
        return Settings(
            access=self.access,
            max_in_flight=self.max_in_flight,
            deadline=self.deadline,
            budget=checked_dollars("budget", self.budget),
            price_guess=checked_dollars("price_guess", self.price_guess),
            terms=self.terms,
            as_json=self.as_json,
        )


def do(batch: Batch) -> int:
    """Run a batch, or go on with it; gives the exit code.

    Raises:
        FluxError: It couldn't be begun.
    """
    settings = batch.settings()
    folder = Folder(batch.out or Path(_default_out(batch.file)))
    sheet = _read(batch)
    entries = asyncio.run(folder.entries())
    sheet = checked_against(sheet, entries)
    for bad in sheet.bad:
        tell(f"{batch.file}:{bad.number}: {bad.field}: {bad.reason}")
    if sheet.bad and not batch.skip_bad:
        lines = "a line is" if len(sheet.bad) == 1 else f"{len(sheet.bad)} lines are"
        complain(f"{lines} bad, so nothing was sent; --skip-bad goes on without what is bad")
        return 2
    if not sheet.lines:
        complain(f"there is nothing to draw in {batch.file}")
        return 2
    todo = plan(sheet.lines, entries, batch.terms, settings.price_guess)
    if batch.dry_run:
        _show(todo, settings)
        return 0
    batch.access.key()  # asked for before anything else, if need be
    tell(todo.told(settings.budget))
    if not batch.yes and todo.prices and sys.stdin.isatty() and sys.stderr.isatty():
        typer.confirm("Go on?", abort=True, err=True)
    _make(folder.path)
    folder.gather(sheet.lines, entries)
    report = asyncio.run(run(folder, todo, settings))
    return asyncio.run(_conclude(batch, settings, folder, sheet, report))


def _default_out(file: str) -> str:
    return f"flux2max-{'batch' if file == STANDARD_INPUT else Path(file).stem}"


def _read(batch: Batch) -> Sheet:
    """Read the sheet.

    Raises:
        ConfigurationError: It can't be read.
    """
    path = Path(batch.file)
    try:
        data = sys.stdin.buffer.read() if batch.file == STANDARD_INPUT else path.read_bytes()
    except OSError as error:
        raise flux.ConfigurationError(f"can't read {batch.file!r}: {error.strerror}") from error
    form = batch.form
    if form is None and batch.file == STANDARD_INPUT:
        form = "jsonl" if data.lstrip().startswith(b"{") else "txt"
    form = form or path.suffix.lower().removeprefix(".")
    if form not in FORMATS:
        raise flux.ConfigurationError(f"{batch.file!r} is neither .txt nor .jsonl nor .csv: say which with --as")
    folder = Path() if batch.file == STANDARD_INPUT else path.parent
    return read_sheet(data, form, folder=folder, defaults=batch.defaults, repeat=batch.repeat)


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise flux.ConfigurationError(f"can't make the folder {str(folder)!r}: {error.strerror}") from error


def _show(todo: Plan, settings: Settings) -> None:
    """Show what would be sent."""
    for item in todo.lines:
        price = todo.prices.get(item.key)
        params = dict(item.content.description)
        if settings.as_json:
            fate = todo.fates[item.key].name.lower()
            cost = None if price is None else str(rounded(price))
            typer.echo(json.dumps({"key": item.key, "line": item.number, "fate": fate, "cost": cost, "params": params}))
        elif price is not None:
            prompt = params.pop("prompt")
            more = "".join(f", {name} {_short(value)}" for name, value in params.items())
            typer.echo(line(f"{item.key}: {prompt}{more}, ${rounded(price)}"))
    tell(f"dry run: {todo.told(settings.budget)}")


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 100 else f"{text[:99]}…"


async def _conclude(batch: Batch, settings: Settings, folder: Folder, sheet: Sheet, report: Report) -> int:
    """Write down and say what it has come to; gives the exit code."""
    # The journal has the last word: it knows what other processes have done, too.
    entries: list[JournalEntry] = await folder.entries()
    folder.gather(sheet.lines, entries)
    if (trouble := await write(folder, Gallery(folder.path), running=False)) is not None:
        complain(trouble)
    rows = [folder.rows[item.key] for item in sheet.lines]
    rest = plan(sheet.lines, entries, batch.terms, settings.price_guess)
    screen = console(sys.stderr if batch.as_json else sys.stdout)
    kinds = summarize(screen, rows, report, rest.spent)
    if report.stopped is not None:
        complain(f"stopped: {report.stopped}")
    tell(f"{kinds['done']} of {pictures(len(rows))} are in {folder.path}; look at {folder.path / 'index.html'}")
    if (todo := advice(batch.arguments, kinds, report, rest, settings.budget)) is not None:
        tell(f"{todo.why}: {todo.command}")
    if kinds["done"] == len(rows):
        return 0
    return 1 if report.signal is None else 128 + report.signal
