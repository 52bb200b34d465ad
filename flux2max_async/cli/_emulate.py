"""The emulator, served by hand: what it is told to do wrong."""

from collections.abc import Iterable

import flux2max_async as flux
from flux2max_async.emulator import Fault


def faults_of(told: Iterable[str]) -> dict[Fault, float]:
    """Read the shares of calls that meet faults, as in "server_error=0.1".

    Raises:
        ConfigurationError: There is no such fault, or that is no share.
    """
    faults: dict[Fault, float] = {}
    for one in told:
        name, _, share = one.partition("=")
        try:
            faults[Fault(name)] = float(share)
            right = 0 <= faults[Fault(name)] <= 1
        except ValueError:
            right = False
        if not right:
            names = ", ".join(fault.value for fault in Fault)
            raise flux.ConfigurationError(f"{one!r} must look like server_error=0.1; the faults are {names}")
    return faults
