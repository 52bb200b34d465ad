"""Run the command `flux2max` in tests, in this process or in a separate one."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import attrs

KEY = "key-that-must-not-leak"
# FORCE_COLOR as on many CI services, where it also applies to pipes.
ENVIRONMENT = {"TERM": "xterm-256color", "COLUMNS": "80", "LINES": "24", "FORCE_COLOR": "1"}


@attrs.frozen
class Run:
    """The result of a command: its exit code, stdout and stderr."""

    code: int | None
    out: str
    err: str


Command = Callable[..., Run]


def visible_lines(output: str) -> list[str]:
    """Return every line that a terminal has shown at any time, without escape sequences."""
    return [line for line in re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", output)) if line]


def start(*arguments: str, cwd: Path, **environment: str) -> "subprocess.Popen[str]":
    """Start the command in a separate process, with its output in pipes."""
    # A shell that runs the tests in the background may have made its children ignore SIGINT.
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
    """Wait until a process has ended and return the rest of its output, which must fit into the pipes."""
    assert process.stdout is not None
    assert process.stderr is not None
    with process:
        return Run(process.wait(timeout=60), process.stdout.read(), process.stderr.read())


def python(code: str) -> Run:
    """Run Python code in a separate process."""
    result = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    return Run(result.returncode, result.stdout, result.stderr)
