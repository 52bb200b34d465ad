"""The commands `journal` and `gallery`, which inspect the output folder of a batch without running it."""

import asyncio
import json
import sys
from collections import Counter
from decimal import Decimal
from pathlib import Path
from typing import Any

import typer

import flux2max_async as flux
from flux2max_async.cli._gallery import Gallery, write_outputs
from flux2max_async.cli._output_dir import OutputDir, is_uncertain
from flux2max_async.cli._plan import newest_entries, total_cost
from flux2max_async.cli._terminal import Terminal, escape, make_table, shorten, to_single_line
from flux2max_async.journal._entry import EntryState, JournalEntry


def print_journal(path: Path, *, as_json: bool) -> None:
    """Print what the journal in a folder contains.

    Raises:
        FluxError: There is no journal, or it can't be read.
    """
    entries = asyncio.run(_open_output_dir(path).read_journal())
    if as_json:
        for entry in entries:
            typer.echo(json.dumps(_describe(entry)))
        return
    newest = newest_entries(entries).values()
    lost = [entry for entry in newest if is_uncertain(entry)]
    unfinished = (EntryState.SUBMITTED, EntryState.INTENT)
    running = [entry for entry in newest if entry.state in unfinished and not is_uncertain(entry)]
    states = Counter(entry.state for entry in newest)
    spent = total_cost(entries)
    reserved = sum((entry.committed for entry in entries), Decimal(0)) - spent
    cells = {
        "all": str(len(newest)),
        "done": str(states[EntryState.COMPLETED]),
        "failed": str(states[EntryState.FAILED]),
        **({"refused": str(states[EntryState.REFUSED])} if states[EntryState.REFUSED] else {}),
        "running": str(len(running)),
        "uncertain": str(len(lost)),
        "spent": f"${spent:.2f}",
        "reserved": f"${max(reserved, Decimal(0)):.2f}",
    }
    Terminal(sys.stdout).show(make_table(cells))
    for entry in running:
        task = shorten(entry.task_id) if entry.task_id else "being submitted"
        typer.echo(to_single_line(f"running: {task}  {entry.key}  ({entry.prompt[:60]})"))
    for entry in lost:
        created = "" if entry.created_at is None else f"{entry.created_at:%Y-%m-%d %H:%M:%S} UTC  "
        typer.echo(to_single_line(f"uncertain: {created}{entry.key}  ({entry.prompt[:60]})"))


def _describe(entry: JournalEntry) -> dict[str, Any]:
    """Return an entry as JSON values, in which the service's task id and message are short and escaped."""
    data = entry.to_dict()
    data["task_id"] = entry.task_id and escape(entry.task_id)
    if entry.error is not None:
        data["result"]["error"] = {**data["result"]["error"], "message": escape(entry.error)}
    return data


def rebuild_gallery(path: Path) -> None:
    """Write a folder's `index.html` and `results.jsonl` again, from its journal.

    Raises:
        FluxError: There is no journal, it can't be read, or a file can't be written.
    """
    output_dir = _open_output_dir(path)
    output_dir.update_rows((), asyncio.run(output_dir.open_journal()))
    gallery = Gallery(output_dir.path)
    if (problem := write_outputs(output_dir, list(output_dir.rows.values()), gallery, running=False)) is not None:
        raise flux.FluxError(problem)
    typer.echo(gallery.path)


def _open_output_dir(path: Path) -> OutputDir:
    output_dir = OutputDir(path)
    if not output_dir.journal_path.is_file():
        raise flux.ConfigurationError(
            f"there is no {output_dir.journal_path.name} in {str(path)!r}: it is not the output folder of a batch"
        )
    return output_dir
