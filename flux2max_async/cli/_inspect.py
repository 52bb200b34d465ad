"""The commands `journal` and `gallery`, which inspect the output folder of a batch without running it."""

import asyncio
import json
import re
import sys
from collections import Counter
from decimal import Decimal
from pathlib import Path
from typing import Any

import attrs
import typer

import flux2max_async as flux
from flux2max_async._text import printable
from flux2max_async.cli._gallery import Gallery, write_outputs
from flux2max_async.cli._journals import AnyJournal, is_address, open_journal, read_pages, without_password
from flux2max_async.cli._output_dir import OutputDir
from flux2max_async.cli._own_files import reject_foreign_files
from flux2max_async.cli._rows import is_uncertain
from flux2max_async.cli._terminal import Counts, Terminal, print_error, print_status, shorten, to_single_line
from flux2max_async.journal._entry import EntryState, JournalEntry

_SECONDS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_MAX_PROMPT_LENGTH = 60
"""The number of characters of a prompt that are shown."""


def print_journal(place: str, *, as_json: bool) -> None:
    """Print what a journal contains: that in a folder, the file itself, or that at an address.

    Raises:
        FluxError: There is no journal, it can't be read, or some of its entries can't.
    """
    journal = _open_journal(place)
    damaged = asyncio.run((_print_entries if as_json else _print_summary)(journal))
    for error in damaged:
        print_error(error)
    if damaged:
        number = "an entry is" if len(damaged) == 1 else f"{len(damaged)} entries are"
        raise flux.JournalError(f"{number} damaged, and left out above")


def prune_journal(place: str, older_than: str) -> None:
    """Forget old entries of a journal that have ended, and print how many.

    Raises:
        FluxError: The time can't be read, or the journal can't be read or written.
    """
    seconds, journal = parse_duration(older_than), _open_journal(place)
    forgotten = asyncio.run(_prune(journal, seconds))
    name = to_single_line(without_password(str(getattr(journal, "path", place))))
    print_status(f"{forgotten:,} {'entry' if forgotten == 1 else 'entries'} forgotten: {name}")


async def _prune(journal: AnyJournal, older_than: float) -> int:
    forgotten = 0
    while number := await journal.prune(older_than=older_than):
        forgotten += number
    return forgotten


def parse_duration(text: str) -> float:
    """Return the seconds of a duration such as 30d, 12h, 90m or 45s.

    Raises:
        ConfigurationError: It is not one.
    """
    match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)([smhd])", text.strip(), re.ASCII)
    if match is None:
        raise flux.ConfigurationError(f"--older-than must be a time such as 30d, 12h, 90m or 45s, not {text!r}")
    return float(match[1]) * _SECONDS[match[2]]


async def _print_entries(journal: AnyJournal) -> "list[flux.JournalError]":
    """Print each entry as JSON; return the errors of those that are damaged."""
    damaged: list[flux.JournalError] = []
    async for page in read_pages(journal):
        for entry in page:
            if isinstance(entry, JournalEntry):
                typer.echo(json.dumps(_describe(entry)))
            else:
                damaged.append(entry)
    return damaged


async def _print_summary(journal: AnyJournal) -> "list[flux.JournalError]":
    """Print counts, costs, and what is unfinished; return the errors of entries that are damaged."""
    newest: dict[str, JournalEntry] = {}
    damaged: list[flux.JournalError] = []
    spent = committed = Decimal(0)
    async for page in read_pages(journal):
        for entry in page:
            if not isinstance(entry, JournalEntry):
                damaged.append(entry)
                continue
            # Journals may be large, and only this is shown of an entry.
            request = {"prompt": entry.prompt[:_MAX_PROMPT_LENGTH]}
            newest[entry.key] = attrs.evolve(entry, request=request, result={}, files=())
            spent += entry.cost or Decimal(0)
            committed += entry.committed
    lost = [entry for entry in newest.values() if is_uncertain(entry)]
    unfinished = (EntryState.SUBMITTED, EntryState.INTENT)
    running = [entry for entry in newest.values() if entry.state in unfinished and not is_uncertain(entry)]
    states = Counter(entry.state for entry in newest.values())
    cells = {
        "all": str(len(newest)),
        "done": str(states[EntryState.COMPLETED]),
        "failed": str(states[EntryState.FAILED]),
        **({"refused": str(states[EntryState.REFUSED])} if states[EntryState.REFUSED] else {}),
        "running": str(len(running)),
        "uncertain": str(len(lost)),
        "spent": f"${spent:.2f}",
        "reserved": f"${max(committed - spent, Decimal(0)):.2f}",
    }
    Terminal(sys.stdout).show(Counts(cells))
    for entry in running:
        task = shorten(entry.task_id) if entry.task_id else "being submitted"
        typer.echo(to_single_line(f"running: {task}  {entry.key}  ({entry.prompt})"))
    for entry in lost:
        created = "" if entry.created_at is None else f"{entry.created_at:%Y-%m-%d %H:%M:%S} UTC  "
        typer.echo(to_single_line(f"uncertain: {created}{entry.key}  ({entry.prompt})"))
    return damaged


def _describe(entry: JournalEntry) -> dict[str, Any]:
    """Return an entry as JSON values, in which the service's task ids and messages are short and escaped."""
    data = entry.to_dict()
    data["task_id"] = entry.task_id and printable(entry.task_id)
    for name in data["result"].keys() & {"error", "partial_error"}:
        error = data["result"][name]
        texts = {field: printable(error[field]) for field in ("message", "task_id") if error.get(field)}
        data["result"][name] = {**error, **texts}
    return data


def rebuild_gallery(path: Path) -> None:
    """Write a folder's `index.html` and `results.jsonl` again, from its journal.

    Raises:
        FluxError: There is no journal, it can't be read, or a file can't be written.
    """
    output_dir = _open_output_dir(path)
    reject_foreign_files(path, way_out="move them away")
    output_dir.update_rows((), asyncio.run(output_dir.open_journal()))
    for error in output_dir.damaged.values():
        print_error(error)
    gallery = Gallery(output_dir.path, emulated=output_dir.emulated)
    if (problem := write_outputs(output_dir, list(output_dir.rows.values()), gallery, running=False)) is not None:
        raise flux.FluxError(problem)
    typer.echo(gallery.path)


def _open_journal(place: str) -> AnyJournal:
    """Return a journal: that at an address, in a file, or in a folder."""
    path = Path(place)
    return open_journal(place if is_address(place) or path.is_file() else _open_output_dir(path).journal_path, "PATH")


def _open_output_dir(path: Path) -> OutputDir:
    output_dir = OutputDir(path)
    if output_dir.journal_path.is_file():
        return output_dir
    emulated = OutputDir(path, emulated=True)
    if not emulated.journal_path.is_file():
        raise flux.ConfigurationError(
            f"there is no {output_dir.journal_path.name} in {str(path)!r}: it is not the output folder of a batch"
        )
    return emulated
