"""The command `emulate`: the faults that the emulator injects."""

from collections.abc import Iterable

import flux2max_async as flux
from flux2max_async.emulator import Fault
from flux2max_async.emulator._service import parse_shares


def parse_faults(options: Iterable[str]) -> dict[Fault, float]:
    """Parse options such as "server_error=0.1" into the share of calls or tasks that each fault hits, from 0 to 1.

    Raises:
        ConfigurationError: There is no such fault, or the share is invalid, or the shares are more than 1 together.
    """
    faults: dict[Fault, float] = {}
    for option in options:
        name, _, share = option.partition("=")
        try:
            faults[Fault(name)] = float(share)
            is_valid = 0 <= faults[Fault(name)] <= 1
        except ValueError:
            is_valid = False
        if not is_valid:
            names = ", ".join(fault.value for fault in Fault)
            raise flux.ConfigurationError(f"{option!r} must be like server_error=0.1; the faults are {names}")
    try:
        return parse_shares(faults)
    except ValueError as error:
        raise flux.ConfigurationError(str(error)) from error
