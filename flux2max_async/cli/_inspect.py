"""What is in the folder of a batch, looked at without running it."""

import asyncio
import sys
from collections import Counter
from decimal import Decimal
from pathlib import Path

import typer

import flux2max_async as flux
from flux2max_async.cli._gallery import Gallery, write_all
from flux2max_async.cli._output_dir import Folder, is_lost
from flux2max_async.cli._terminal import Screen, line, table
from flux2max_async.journal._entry import EntryState
from flux2max_async.journal._serialization import to_json


def tell_journal(path: Path, *, as_json: bool) -> None:
    """Tell what the journal in a folder knows.

    Raises:
        FluxError: There is none, or it can't be read.
    """
    folder = _with_journal(path)
    entries = asyncio.run(folder.entries())
    if as_json:
        for entry in entries:
            typer.echo(to_json(entry.as_json()))
        return
    newest = {entry.key: entry for entry in entries}.values()
    lost = [entry for entry in newest if is_lost(entry)]
    going = (EntryState.SUBMITTED, EntryState.INTENT)
    running = [entry for entry in newest if entry.state in going and not is_lost(entry)]
    states = Counter(entry.state for entry in newest)
    spent = sum((entry.cost for entry in entries if entry.cost is not None), Decimal(0))
    aside = sum((entry.outlay for entry in entries), Decimal(0)) - spent
    cells = {
        "all": str(len(newest)),
        "done": str(states[EntryState.COMPLETED]),
        "failed": str(states[EntryState.FAILED]),
        **({"refused": str(states[EntryState.REFUSED])} if states[EntryState.REFUSED] else {}),
        "running": str(len(running)),
        "uncertain": str(len(lost)),
        "spent": f"${spent:.2f}",
        "set aside": f"${max(aside, Decimal(0)):.2f}",
    }
    Screen(sys.stdout).show(table(cells))
    for entry in running:
        typer.echo(line(f"running: {entry.task_id or 'being submitted'}  {entry.key}  ({entry.prompt[:60]})"))
    for entry in lost:
        when = "" if entry.created_at is None else f"{entry.created_at:%Y-%m-%d %H:%M:%S} UTC  "
        typer.echo(line(f"uncertain: {when}{entry.key}  ({entry.prompt[:60]})"))


def make_gallery(path: Path) -> None:
    """Make the page and the results anew.

    Raises:
        FluxError: There is no journal, or it can't be read.
    """
    folder = _with_journal(path)
    folder.gather((), asyncio.run(folder.entries()))
    gallery = Gallery(folder.path)
    if (trouble := write_all(folder, list(folder.rows.values()), gallery, running=False)) is not None:
        raise flux.FluxError(trouble)
    typer.echo(gallery.path)


def _with_journal(path: Path) -> Folder:
    folder = Folder(path)
    if not folder.database.is_file():
        raise flux.ConfigurationError(
            f"there is no {folder.database.name} in {str(path)!r}: it is not the folder of a batch"
        )
    return folder
