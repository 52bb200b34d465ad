"""Settings of the commands: options come first, then FLUX2MAX_* variables, then the file `.env`, then defaults."""

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs
import typer

import flux2max_async as flux
from flux2max_async._config import KEY_VARIABLE
from flux2max_async.cli._terminal import (
    StderrLogHandler,
    attach_log_handler,
    can_prompt,
    print_error,
)

_PREFIX = "FLUX2MAX_"
_DOTENV_FILE = ".env"
_ADDRESS_OPTIONS = ("--base-url", "--webhook-url")


def read_dotenv() -> dict[str, str]:
    """Return the FLUX2MAX_* variables in the working folder's file `.env`; none if there is no such file."""
    path = Path(_DOTENV_FILE)
    if not path.is_file():
        return {}
    import dotenv  # noqa: PLC0415 - only users of a .env file need it

    try:
        # Dotenv logs a warning for each line that it can't parse.
        with attach_log_handler(StderrLogHandler(logging.WARNING), "dotenv"):
            values = dotenv.dotenv_values(path, interpolate=False, encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        # Not fatal: the file may belong to another program, and a setting that is missing is reported later.
        print_error(f"can't read {_DOTENV_FILE}: {_failure_reason(error)}")
        return {}
    return {name: value for name, value in values.items() if name.startswith(_PREFIX) and value}


@attrs.frozen
class ServiceSettings:
    """Where the service is, and where its API key comes from."""

    dotenv: Mapping[str, str] = attrs.field(repr=False)
    """The variables in `.env`."""
    base_url: str | None = None
    key_file: Path | None = None
    allow_plain_http: bool = False
    dotenv_options: Mapping[str, Any] = attrs.field(factory=dict[str, Any])
    """The options whose values come from `.env`."""
    emulator_key: str | None = attrs.field(default=None, repr=False)
    """The key of the emulator at `base_url`, if it is one."""

    @classmethod
    def create(
        cls, context: typer.Context, base_url: str | None, key_file: Path | None, *, allow_plain_http: bool
    ) -> "ServiceSettings":
        """Return the settings of a subcommand, whose context has the variables in `.env`."""
        sources = {name: context.get_parameter_source(name) for name in context.params}
        from_dotenv = {name for name, source in sources.items() if source is not None and source.name == "DEFAULT_MAP"}
        values = {f"--{name.replace('_', '-')}": context.params[name] for name in context.params if name in from_dotenv}
        return cls(context.obj or {}, base_url, key_file, allow_plain_http, values)

    def with_emulator(self, base_url: str, key: str) -> "ServiceSettings":
        """Return settings with an emulator in the place of the service."""
        # Its address is trusted, and nothing is posted to others.
        options = {name: value for name, value in self.dotenv_options.items() if name == "--out"}
        return attrs.evolve(self, base_url=base_url, emulator_key=key, dotenv_options=options)

    def get_variable(self, name: str) -> str | None:
        """Return a variable of the environment, or else of `.env`."""
        return os.environ.get(name) or self.dotenv.get(name)

    def create_session(self, *, needs_key: bool = True, **options: Any) -> "flux.FluxSession":
        """Create a session, which the caller has to enter.

        Args:
            needs_key: Whether the session will be entered; False only checks the options.
            **options: FluxSession's.

        Raises:
            ConfigurationError: There is no API key, or an option is invalid.
        """
        self.check_addresses()
        options |= {"base_url": self.base_url, "allow_plain_http": self.allow_plain_http}
        try:
            return flux.FluxSession(self.read_key() if needs_key else "none", **options)
        except flux.ConfigurationError as error:
            error.message = error.message.replace("allow_plain_http=True", "--allow-plain-http")
            raise

    def read_key(self) -> str:
        """Return the emulator's API key, if it is one, or else that of the user.

        It is read from the key file, the environment, `.env` or a prompt on the terminal, in this order.

        Raises:
            ConfigurationError: There is none, or the key file can't be read.
        """
        if self.emulator_key is not None:
            return self.emulator_key
        if self.key_file is not None:
            return _read_key_file(self.key_file)
        if key := self.get_variable(KEY_VARIABLE):
            return key
        if can_prompt():
            return str(typer.prompt("API key", hide_input=True, err=True))
        raise flux.ConfigurationError(
            f"no API key: set {KEY_VARIABLE} in the environment or in {_DOTENV_FILE}, or pass a file with --key-file"
        )

    def check_addresses(self) -> None:
        """Refuse addresses, and an output folder elsewhere, from `.env` unless the API key is from there too.

        Otherwise the file in a folder from somebody else could direct the user's own key, or the user's results, to a
        foreign address, or have files elsewhere replaced.

        Raises:
            ConfigurationError: There is such an option.
        """
        key = self.dotenv.get(KEY_VARIABLE)
        options = [option for option, value in self.dotenv_options.items() if _leads_elsewhere(option, value)]
        if options and (self.key_file is not None or not key or self.get_variable(KEY_VARIABLE) != key):
            option = options[0]
            variable = f"{_PREFIX}{option.removeprefix('--').replace('-', '_').upper()}"
            raise flux.ConfigurationError(
                f"{variable} in {_DOTENV_FILE} counts only with the API key from the same file: "
                f"set {KEY_VARIABLE} there and nowhere else, or pass {option} if you trust it"
            )


def _leads_elsewhere(option: str, value: Any) -> bool:
    """Check whether an option is an address, or what permits one, or an output folder outside of the working folder."""
    if option == "--out":
        folder = Path.cwd().resolve()
        return not (folder / str(value)).resolve().is_relative_to(folder)
    if option == "--journal":  # a file would be created, or the results and the money be counted elsewhere
        return True
    if option == "--allow-plain-http":  # others could read a key that is sent to another address
        return bool(value)
    return option in _ADDRESS_OPTIONS


def _read_key_file(file: Path) -> str:
    try:
        key = file.read_text(encoding="utf-8-sig").strip()
    except (OSError, ValueError) as error:
        raise flux.ConfigurationError(f"can't read the key file {str(file)!r}: {_failure_reason(error)}") from error
    if not key:
        raise flux.ConfigurationError(f"the key file {str(file)!r} is empty")
    return key


def _failure_reason(error: OSError | ValueError) -> str:
    return getattr(error, "strerror", None) or "it is not UTF-8 text"
