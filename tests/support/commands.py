"""The command line for tests: run in this process or in one of its own, and what it came to."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import attrs

KEY = "key-that-nobody-may-see"
# Many CI services set FORCE_COLOR, for a pipe as well.
ENVIRONMENT = {"TERM": "xterm-256color", "COLUMNS": "80", "LINES": "24", "FORCE_COLOR": "1"}


@attrs.frozen
class Run:
    """What a command came to."""

    code: int | None
    out: str
    err: str


Command = Callable[..., Run]


def lines_of(shown: str) -> list[str]:
    """Everything that ever stood on a terminal's lines, without escape codes."""
    return [line for line in re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown)) if line]


def start(*arguments: str, cwd: Path, **environment: str) -> "subprocess.Popen[str]":
    """Start the command as a process of its own, its output going to pipes."""
    # Who runs the tests in the background may have told all below it to ignore Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-m", "flux2max_async.cli", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        cwd=cwd,
        env={**os.environ, **ENVIRONMENT, **environment},
    )


def finish(process: "subprocess.Popen[str]") -> Run:
    """Read what is left of a process's output, which must be little, and wait until it has ended."""
    assert process.stdout is not None
    assert process.stderr is not None
    with process:
        return Run(process.wait(timeout=60), process.stdout.read(), process.stderr.read())


def python(code: str) -> Run:
    """Run Python code in a process of its own."""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    return Run(done.returncode, done.stdout, done.stderr)
