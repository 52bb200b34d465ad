"""What the tests in a browser share."""

from collections.abc import Iterator

import pytest
from _screen import ARGUMENTS, CHROMIUM
from playwright.sync_api import Browser, sync_playwright


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """The system's own."""
    with sync_playwright() as playwright, playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS) as one:
        yield one
