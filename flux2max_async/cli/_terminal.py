"""Output of the commands: results on stdout, status and error lines on stderr, and exit codes for errors."""

import asyncio
import contextlib
import io
import logging
import queue
import sys
import threading
from collections.abc import Callable, Generator, Iterator, Mapping
from typing import TextIO

import attrs
import typer
from rich.console import Console, ConsoleOptions, RenderableType
from rich.table import Table
from rich.text import Text

import flux2max_async as flux
from flux2max_async._text import MAX_LENGTH, printable

SERVICE_ERRORS = (flux.ProtocolError, flux.ResponseError, flux.TaskFailedError)
"""Errors whose messages may be the service's own texts."""
MAX_REASON_LENGTH = 2000
"""Characters of other errors' messages, which may hold paths and several reasons."""
_DRAIN_INTERVAL = 0.05
"""Seconds."""


class Terminal(Console):
    """A console that uses escape codes on a terminal only, and plain text everywhere else."""

    def __init__(self, file: TextIO) -> None:
        # Rich would write escape codes to a pipe if FORCE_COLOR is set, as it is on many CI services.
        super().__init__(file=file, force_terminal=file.isatty(), highlight=False)

    def show(self, *renderables: RenderableType) -> None:
        """Print the result of a command; if that fails, report why and go on."""
        try:
            # Captured first, because rich exits the process if the reader of the pipe it prints to is gone.
            with self.capture() as capture:
                for renderable in renderables:
                    self.print(renderable, markup=False, soft_wrap=isinstance(renderable, str))
            self.file.write(capture.get())
            self.file.flush()
        except OSError as error:
            print_error(f"can't write to standard output: {error.strerror}")


class LineWriter(io.TextIOBase):
    """A text stream that writes in a background thread, so that a slow reader never blocks the event loop.

    Args:
        stream: The stream to write to.
        on_error: Called in the event loop when a write fails. Nothing is written after that.
    """

    def __init__(self, stream: TextIO, on_error: Callable[[OSError], object]) -> None:
        super().__init__()
        self._stream = stream
        self._on_error = on_error
        self._loop = asyncio.get_running_loop()
        self._texts: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._write_texts, daemon=True)
        self._thread.start()

    def write(self, text: str) -> int:
        """Write text later."""
        self._texts.put(text)
        return len(text)

    async def drain(self, *, is_cancelled: Callable[[], bool]) -> bool:
        """Wait until everything is written, and end the thread; return False if that was cancelled before."""
        self._texts.put(None)
        while self._thread.is_alive():
            await asyncio.sleep(_DRAIN_INTERVAL)
            if is_cancelled():
                break
        await asyncio.sleep(0)  # if the last write has failed, `on_error` is called now
        return not self._thread.is_alive()

    def _write_texts(self) -> None:
        try:
            for text in iter(self._texts.get, None):
                self._stream.write(text)
                self._stream.flush()
        except OSError as error:
            with contextlib.suppress(RuntimeError):  # the event loop is closed
                self._loop.call_soon_threadsafe(self._on_error, error)


def to_single_line(value: object) -> str:
    """Return text on one line and without control characters, which could change the terminal's state."""
    return " ".join("".join(char if char.isprintable() else " " for char in str(value)).split())


def shorten(text: str) -> str:
    """Return a text of the service on one line, without control characters, and shortened."""
    return printable(to_single_line(text[: 10 * MAX_LENGTH]))


def describe_error(error: flux.FluxError) -> str:
    """Return the text of an error on one line; only what the service says in it is shortened."""
    text = str(error)
    if isinstance(error, SERVICE_ERRORS):
        return f"{shorten(error.message)} {shorten(text.removeprefix(error.message))}".rstrip()
    return printable(to_single_line(text), MAX_REASON_LENGTH)


def print_status(message: object) -> None:
    """Print a message on stderr, on a single line."""
    print_verbatim(to_single_line(message))


def print_error(message: object) -> None:
    """Print an error or a warning on stderr, on a single line that begins with the program's name."""
    print_status(f"flux2max: {message}")


def print_verbatim(text: str) -> None:
    """Print text on stderr without changing it; ignore errors, since there is nowhere else to report them."""
    with contextlib.suppress(OSError):
        # Not typer.echo(), which bypasses rich's replacement of sys.stderr and would write into the live display.
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()


def can_prompt() -> bool:
    """Check whether a user can see a question on the terminal and answer it."""
    return sys.stdin.isatty() and sys.stderr.isatty()


@contextlib.contextmanager
def report_errors(interrupt_hint: Callable[[], str] | None = None) -> Generator[None]:
    """Print an error on a single line, and exit with its code: 2 for wrong usage, 130 for Ctrl-C, else 1.

    Args:
        interrupt_hint: Returns the text to print after Ctrl-C.
    """
    try:
        yield
    except (flux.InvalidRequestError, flux.ConfigurationError) as error:
        print_error(error)
        raise typer.Exit(2) from error
    except flux.FluxError as error:
        print_error(describe_error(error))
        raise typer.Exit(1) from error
    except BrokenPipeError as error:  # as in `flux2max demo | head`: no reason for a message
        raise typer.Exit(1) from error
    except OSError as error:
        print_error(error)
        raise typer.Exit(1) from error
    except (KeyboardInterrupt, typer.Abort):
        print_error(f"stopped: {interrupt_hint()}" if interrupt_hint else "stopped")
        raise typer.Exit(130) from None


@contextlib.contextmanager
def attach_log_handler(handler: logging.Handler, logger_name: str = "flux2max_async") -> Generator[None]:
    """Attach a handler to a logger; with a handler, Python doesn't print warnings to stderr itself."""
    logger = logging.getLogger(logger_name)
    # That all requests fail is for the logs of servers: a command ends with the reason.
    handler.addFilter(lambda record: record.name != "flux2max_async.health")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


class StderrLogHandler(logging.Handler):
    """Prints log messages: for example about a submit that is repeated, or a paid task that is left unfinished."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print the message on a single line."""
        print_error(record.getMessage())


@attrs.frozen
class Counts:
    """A table with a header and one row; where it is too wide for the terminal, a line for each cell."""

    cells: Mapping[str, str]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        # Each cell has a border and a space on both sides.
        if sum(max(len(name), len(value)) + 3 for name, value in self.cells.items()) + 1 <= options.max_width:
            table = Table()
            for name in self.cells:
                table.add_column(name, justify="right", no_wrap=True)
            table.add_row(*self.cells.values())
            yield table
            return
        widths = (max(map(len, self.cells)), max(map(len, self.cells.values())))
        for name, value in self.cells.items():
            yield Text(f"{name:<{widths[0]}}  {value:>{widths[1]}}")


def format_polls(completed: "flux.Completed") -> str:
    """Return the number of polls of a task, as in "2 polls"."""
    return "1 poll" if completed.polls == 1 else f"{completed.polls} polls"


def format_pictures(count: int) -> str:
    """Return a number of pictures, as in "2 pictures"."""
    return "1 picture" if count == 1 else f"{count} pictures"
