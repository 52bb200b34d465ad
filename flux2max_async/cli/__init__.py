"""The command `flux2max`, as far as it works without its extras: it says which one is missing."""

import io
import os
import sys

_EXTRAS = {"typer": "cli", "rich": "cli", "dotenv": "cli", "jinja2": "cli", "PIL": "emulator"}


def main() -> None:
    """Run the command that the arguments name."""
    _open_what_is_closed()
    try:
        from flux2max_async.cli._app import app  # noqa: PLC0415 - it needs an extra

        app(prog_name="flux2max")
    except ModuleNotFoundError as error:
        package, _, _ = (error.name or "").partition(".")
        if package not in _EXTRAS:
            raise
        sys.exit(f"flux2max: {package} is missing: pip install 'flux2max_async[{_EXTRAS[package]}]'")


def _open_what_is_closed() -> None:
    """See to it that whatever can't be shown is written all the same, and that nothing is written nowhere."""
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by who has started us
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w", encoding="utf-8"))  # noqa: PTH123, SIM115 - for good
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # pragma: no branch - unless somebody has put something else there
            stream.reconfigure(errors="backslashreplace")
