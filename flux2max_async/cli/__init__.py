"""The command `flux2max`, as far as it works without its extras: it says which one is missing."""

import sys

_EXTRAS = {"typer": "cli", "rich": "cli", "dotenv": "cli", "jinja2": "cli", "PIL": "emulator"}


def main() -> None:
    """Run the command that the arguments name."""
    try:
        from flux2max_async.cli._app import app  # noqa: PLC0415 - it needs an extra

        app(prog_name="flux2max")
    except ModuleNotFoundError as error:
        package, _, _ = (error.name or "").partition(".")
        if package not in _EXTRAS:
            raise
        sys.exit(f"flux2max: {package} is missing: pip install 'flux2max_async[{_EXTRAS[package]}]'")
