"""The command `flux2max`. This module needs no optional package, so that it can name the extra that is missing."""

import sys

from flux2max_async.cli._streams import prepare_standard_streams, redirect_to_devnull

_EXTRAS = {"typer": "cli", "rich": "cli", "dotenv": "cli", "jinja2": "cli", "PIL": "emulator", "openpyxl": "excel"}
"""The extra that installs each optional package."""


def main() -> None:
    """Run the subcommand in `sys.argv`."""
    prepare_standard_streams()
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
