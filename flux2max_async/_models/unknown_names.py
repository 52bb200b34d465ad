"""Errors about parameters that don't exist."""

import difflib
from collections.abc import Iterable

from flux2max_async._exceptions import InvalidRequestError


class _UnknownParameterError(InvalidRequestError, TypeError):
    """There is no parameter of that name: a TypeError, too, as for any other function."""


def unknown_parameter(name: object, known: Iterable[str]) -> InvalidRequestError:
    """Return the error about a parameter that doesn't exist, which suggests the known name that is most like it."""
    close = difflib.get_close_matches(str(name), list(known), n=1)
    hint = f"did you mean {close[0]}?" if close else "what this library doesn't know yet goes into extra"
    return _UnknownParameterError(f"no parameter {name}: {hint}", field=str(name))
