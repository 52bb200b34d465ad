"""What the commands say: lines on stderr, a console for what lives on a terminal, and errors as exit codes."""

import asyncio
import contextlib
import errno
import logging
import os
import queue
import sys
import threading
from collections.abc import Callable, Generator, Mapping
from typing import TextIO

import typer
from rich.console import Console, RenderableType
from rich.table import Table

import flux2max_async as flux


class Screen(Console):
    """A console that draws on a terminal, writes plain text down a pipe, and goes on when nobody reads it any more."""

    def __init__(self, file: TextIO) -> None:
        # Rich would send escape codes down a pipe where FORCE_COLOR is set, as it is on many CI services.
        super().__init__(file=file, force_terminal=file.isatty(), highlight=False)

    def on_broken_pipe(self) -> None:
        """Write to nobody from now on, where rich would end the program."""
        nobody_reads(self.file)

    def show(self, *things: RenderableType) -> None:
        """Show what a command comes to; where that can't be written, it is said."""
        try:
            for thing in things:
                self.print(thing, markup=False, soft_wrap=isinstance(thing, str))
            self.file.flush()
        except OSError as error:
            nobody_reads(self.file)
            complain(f"can't write to standard output: {error.strerror}")


def line(said: object) -> str:
    """Bring what the service, say, has said into one line that leaves the terminal alone."""
    return " ".join("".join(letter if letter.isprintable() else " " for letter in str(said)).split())


def tell(said: object) -> None:
    """Say something on stderr, in one line."""
    tell_exactly(line(said))


def tell_exactly(text: str) -> None:
    """Say something on stderr as it is; if nobody hears it, nothing happens."""
    if _aside and _aside[-1].is_busy:
        _aside[-1].put(text)
        return
    with contextlib.suppress(OSError, ValueError):
        # Not typer.echo(): it writes past what rich puts in the place of stderr, into the middle of a live line.
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()


def complain(said: object) -> None:
    """Say that something isn't as it should be."""
    tell(f"flux2max: {said}")


def somebody_can_be_asked() -> bool:
    """Tell whether somebody sits at a terminal who sees a question and can answer it."""
    return sys.stdin.isatty() and sys.stderr.isatty()


@contextlib.contextmanager
def errors_as_lines(result: Callable[[], str] | None = None) -> Generator[None]:
    """Say what went wrong in one line, and exit with the code for it.

    Args:
        result: Tells what there is when Ctrl-C ends it.
    """
    try:
        yield
        sys.stdout.flush()
    except (flux.InvalidRequestError, flux.ConfigurationError) as error:
        complain(error)
        raise typer.Exit(2) from error
    except flux.FluxError as error:
        complain(error)
        raise typer.Exit(1) from error
    except OSError as error:
        if error.errno != errno.EPIPE:
            complain(error)
        nobody_reads(sys.stdout)
        raise typer.Exit(1) from error
    except (KeyboardInterrupt, typer.Abort):
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


class Outlet:
    """Writes lines in a thread of its own: a reader who is slow, or has gone, holds nothing else up.

    Args:
        name: "stdout" or "stderr", looked up for each line: what lives on a terminal may stand in its place.
        failed: Called in the event loop when nothing can be written any more.
    """

    def __init__(self, name: str, failed: Callable[[Exception], None]) -> None:
        self._name = name
        self._failed = failed
        self._loop = asyncio.get_running_loop()
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def put(self, text: str | None) -> None:
        """Have a line written; None is the end."""
        self._lines.put(text)

    @property
    def is_busy(self) -> bool:
        """Whether something is still to be written."""
        return self._thread.is_alive()

    def _work(self) -> None:
        while (text := self._lines.get()) is not None:
            file = getattr(sys, self._name)
            try:
                file.write(f"{text}\n")
                file.flush()
            except (OSError, ValueError) as error:
                nobody_reads(file)
                with contextlib.suppress(RuntimeError):  # the loop has ended before
                    self._loop.call_soon_threadsafe(self._failed, error)
                return


_aside: list[Outlet] = []
"""What takes the lines for stderr, while nothing may wait for who reads them."""


@contextlib.contextmanager
def speaking_aside(outlet: Outlet) -> Generator[None]:
    """Have all that is said on stderr written by another thread."""
    _aside.append(outlet)
    try:
        yield
    finally:
        _aside.remove(outlet)


def table(cells: Mapping[str, str]) -> Table:
    """Make a table of one row, of which nothing is cut off."""
    made = Table()
    for name in cells:
        made.add_column(name, justify="right", no_wrap=True)
    made.add_row(*cells.values())
    return made


def polls(picture: "flux.Completed") -> str:
    """Say how often a task was looked at."""
    return "1 poll" if picture.polls == 1 else f"{picture.polls} polls"


def pictures(count: int) -> str:
    """Say how many pictures."""
    return "1 picture" if count == 1 else f"{count} pictures"


def nobody_reads(file: object) -> None:
    """Give what is written from now on to nobody, so that the interpreter's last flush can't fail."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, file.fileno())  # type: ignore[attr-defined]
        os.close(nowhere)
