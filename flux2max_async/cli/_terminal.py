"""What the commands say: lines on stderr, a console for what lives on a terminal, and errors as exit codes."""

import contextlib
import logging
import os
import sys
from collections.abc import Callable, Generator, Mapping
from typing import TextIO

import typer
from rich.console import Console
from rich.table import Table

import flux2max_async as flux


def console(file: TextIO) -> Console:
    """Give a console that draws on a terminal, and down a pipe writes plain text."""
    # Rich would send escape codes down a pipe where FORCE_COLOR is set, as it is on many CI services.
    return Console(file=file, force_terminal=file.isatty(), highlight=False)


def line(said: object) -> str:
    """Bring what the service, say, has said into one line that leaves the terminal alone."""
    return " ".join("".join(letter if letter.isprintable() else " " for letter in str(said)).split())


def tell(said: object) -> None:
    """Say something on stderr, in one line."""
    # Not typer.echo(): it writes past what rich puts in the place of stderr, into the middle of a live line.
    sys.stderr.write(f"{line(said)}\n")
    sys.stderr.flush()


def complain(said: object) -> None:
    """Say that something isn't as it should be."""
    tell(f"flux2max: {said}")


@contextlib.contextmanager
def errors_as_lines(result: Callable[[], str] | None = None) -> Generator[None]:
    """Say what went wrong in one line, and exit with the code for it.

    Args:
        result: Tells what there is when Ctrl-C ends it.
    """
    try:
        yield
    except (flux.InvalidRequestError, flux.ConfigurationError) as error:
        complain(error)
        raise typer.Exit(2) from error
    except flux.FluxError as error:
        complain(error)
        raise typer.Exit(1) from error
    except KeyboardInterrupt:
        complain(f"stopped: {result()}" if result else "stopped")
        raise typer.Exit(130) from None


@contextlib.contextmanager
def log_to(handler: logging.Handler, name: str = "flux2max_async") -> Generator[None]:
    """Let a handler have a library's log; without one, Python prints warnings on its own."""
    log = logging.getLogger(name)
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)


class Complaints(logging.Handler):
    """Says what is logged: a call that has to be made again, or a paid task that is left unfinished."""

    def emit(self, record: logging.LogRecord) -> None:
        """Say it in a line."""
        complain(record.getMessage())


def table(cells: Mapping[str, str]) -> Table:
    """Make a table of one row."""
    made = Table()
    for name in cells:
        made.add_column(name, justify="right")
    made.add_row(*cells.values())
    return made


def polls(picture: "flux.Completed") -> str:
    """Say how often a task was looked at."""
    return "1 poll" if picture.polls == 1 else f"{picture.polls} polls"


def pictures(count: int) -> str:
    """Say how many pictures."""
    return "1 picture" if count == 1 else f"{count} pictures"


def nobody_reads() -> None:
    """Give what is written to stdout from now on to nobody, so that the interpreter's last flush can't fail."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
