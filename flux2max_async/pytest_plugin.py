"""The fixture `flux_emulator` for pytest. Costs nothing until it is asked for: the emulator is imported only then."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from flux2max_async.emulator import Emulator


@pytest.fixture
def flux_emulator() -> "Iterator[Emulator]":
    """An emulated FLUX.2 [max] gateway on 127.0.0.1 whose tasks take a tenth of a second.

    It runs in a thread of its own, so it serves synchronous and asynchronous tests, under any plugin, alike.
    """
    from flux2max_async.emulator import Emulator  # noqa: PLC0415 - see above

    with Emulator(seconds=0.1, spread=0.0, seed=1) as gateway:
        yield gateway
