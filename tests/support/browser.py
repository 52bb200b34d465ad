"""The system's browser, and screenshots of pages."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Browser, Page, sync_playwright

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
# Without network access, the browser's own background requests would slow the tests down.
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
VIEWPORTS = {"wide": {"width": 1280, "height": 960}, "narrow": {"width": 390, "height": 844}}


@contextmanager
def running_browser() -> Iterator[Browser]:
    """Run the system's Chromium in headless mode."""
    with (
        sync_playwright() as playwright,
        playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS) as browser,
    ):
        yield browser


def take_screenshots(page: Page, folder: Path, name: str, *, full_page: bool = True) -> None:
    """Take screenshots of a page in light and dark mode, wide and narrow.

    Args:
        page: The page.
        folder: Where to save the screenshots.
        name: The prefix of their file names.
        full_page: Whether to capture the full page instead of the viewport.
    """
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme="dark" if scheme == "dark" else "light")
        for viewport_name, size in VIEWPORTS.items():
            page.set_viewport_size({"width": size["width"], "height": size["height"]})
            page.screenshot(path=folder / f"{name}-{scheme}-{viewport_name}.png", full_page=full_page)
