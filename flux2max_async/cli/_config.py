"""Where the commands have their settings from: options, FLUX2MAX_* variables, a file `.env`, and then defaults."""

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs
import typer

import flux2max_async as flux
from flux2max_async._config import KEY_VARIABLE, URL_VARIABLE
from flux2max_async.cli._terminal import Complaints, complain, line, log_to, somebody_can_be_asked, tell

PREFIX = "FLUX2MAX_"
_KEPT_IN = ".env"


def read_dotenv() -> dict[str, str]:
    """Read our variables from the file `.env` in the working folder; there may be none."""
    path = Path(_KEPT_IN)
    if not path.is_file():
        return {}
    import dotenv  # noqa: PLC0415 - hardly anybody needs it

    try:
        with log_to(Complaints(logging.WARNING), "dotenv"):  # which names the lines that it can't read
            values = dotenv.dotenv_values(path, interpolate=False, encoding="utf-8-sig")
    except (OSError, ValueError) as error:  # it may be somebody else's: what is missing will be told
        complain(f"can't read {_KEPT_IN}: {getattr(error, 'strerror', None) or 'it is no text'}")
        return {}
    return {name: value for name, value in values.items() if name.startswith(PREFIX) and value}


@attrs.frozen
class Access:
    """How to get at the service."""

    dotenv: Mapping[str, str] = attrs.field(repr=False)
    """What stands in `.env`."""
    base_url: str | None = None
    key_file: Path | None = None

    def variable(self, name: str) -> str | None:
        """Give an environment's variable, or what `.env` says of it."""
        return os.environ.get(name) or self.dotenv.get(name)

    def session(self, *, needs_key: bool = True, **settings: Any) -> "flux.FluxSession":
        """Make a session, which is still to be entered; one that needs no key is only to check the settings.

        Raises:
            ConfigurationError: There is no key, or something is wrong with the settings.
        """
        if not needs_key:
            return flux.FluxSession("none", base_url=self.base_url, **settings)
        key = self.key()
        if self.base_url and self.base_url == self.dotenv.get(URL_VARIABLE) and key != self.dotenv.get(KEY_VARIABLE):
            # A folder that somebody else has packed could send a key of ours to an address of his.
            tell(f"gateway: {line(self.base_url)} (as {_KEPT_IN} says)")
        return flux.FluxSession(key, base_url=self.base_url, **settings)

    def key(self) -> str:
        """Give the API key: from the file that was named, the environment, `.env`, or who sits at the terminal.

        Raises:
            ConfigurationError: There is none.
        """
        if self.key_file is not None:
            return self._key_in(self.key_file)
        if key := self.variable(KEY_VARIABLE):
            return key
        if somebody_can_be_asked():
            return str(typer.prompt("API key", hide_input=True, err=True))
        raise flux.ConfigurationError(
            f"no API key: set {KEY_VARIABLE}, in the environment or in {_KEPT_IN}, or name a file with --key-file"
        )

    @staticmethod
    def _key_in(file: Path) -> str:
        try:
            key = file.read_text(encoding="utf-8-sig").strip()
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or "it is no text"
            raise flux.ConfigurationError(f"can't read the key file {str(file)!r}: {reason}") from error
        if not key:
            raise flux.ConfigurationError(f"the key file {str(file)!r} is empty")
        return key
