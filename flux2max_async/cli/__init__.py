"""The command `flux2max`. This module needs no optional package, so that it can name the extra that is missing."""

import io
import os
import sys
from typing import IO

_EXTRAS = {"typer": "cli", "rich": "cli", "dotenv": "cli", "jinja2": "cli", "PIL": "emulator"}
"""The extra that installs each optional package."""


def main() -> None:
    """Run the subcommand in `sys.argv`."""
    _prepare_standard_streams()
    try:
        from flux2max_async.cli._app import app  # noqa: PLC0415 - it needs the extra `cli`

        app(prog_name="flux2max")
    except ModuleNotFoundError as error:
        package, _, _ = (error.name or "").partition(".")
        if package not in _EXTRAS:
            raise
        sys.exit(f"flux2max: {package} is missing: pip install 'flux2max_async[{_EXTRAS[package]}]'")
    finally:
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except OSError:  # it would fail again at exit, where Python prints a message and changes the exit code
                redirect_to_devnull(stream)


def redirect_to_devnull(stream: IO[str]) -> None:
    """Discard what is written to a stream from now on: its reader is gone, its disk is full, or its terminal closed."""
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, stream.fileno())
    os.close(devnull)


def _prepare_standard_streams() -> None:
    """Replace standard streams that are closed, and escape characters that the terminal's encoding doesn't have."""
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:  # the parent process has closed it
            mode = "r" if name == "stdin" else "w"
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: PTH123, SIM115 - stays open to the end
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # pragma: no branch - unless the stream was replaced
            stream.reconfigure(errors="backslashreplace")
