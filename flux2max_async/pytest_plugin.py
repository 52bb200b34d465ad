"""The pytest fixture `flux_emulator`. The emulator is imported only by tests that use the fixture."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from flux2max_async.emulator import Emulator


@pytest.fixture
def flux_emulator() -> "Iterator[Emulator]":
    """Return an emulated FLUX.2 [max] service on 127.0.0.1 whose tasks take a twentieth of a second.

    It runs in its own thread, so it serves synchronous and asynchronous tests with any plugin. With a session of
    `flux_emulator.session()`, an image takes a tenth of a second.
    """
    from flux2max_async.emulator import Emulator  # noqa: PLC0415 - see the module's docstring

    with Emulator(seconds=0.05, spread=0.0, seed=1) as emulator:
        yield emulator
