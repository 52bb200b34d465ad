"""The standard streams of the command, which may be closed, full, or a pipe without a reader."""

import io
import os
import sys
from typing import IO


def redirect_to_devnull(stream: IO[str]) -> None:
    """Discard what is written to a stream from now on: its reader is gone, its disk is full, or its terminal closed."""
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, stream.fileno())
    os.close(devnull)


def prepare_standard_streams() -> None:
    """Replace standard streams that are closed, and escape characters that the terminal's encoding doesn't have."""
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:  # the parent process has closed it
            mode = "r" if name == "stdin" else "w"
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: PTH123, SIM115 - stays open to the end
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # pragma: no branch - unless the stream was replaced
            stream.reconfigure(errors="backslashreplace")
