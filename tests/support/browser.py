"""The system's browser, and what pages look like in it."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Browser, Page, sync_playwright

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
# On a machine without a way out, its own errands get in the way of ours.
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
SIZES = {"wide": {"width": 1280, "height": 960}, "narrow": {"width": 390, "height": 844}}


@contextmanager
def running_browser() -> Iterator[Browser]:
    """Run the system's own, without a window."""
    with sync_playwright() as playwright, playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS) as one:
        yield one


def shoot(page: Page, shots: Path, name: str, *, whole: bool = True) -> None:
    """Keep what the page looks like, by day and by night, on a desk and in a hand; all of it, or what is in view."""
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme="dark" if scheme == "dark" else "light")
        for width, size in SIZES.items():
            page.set_viewport_size({"width": size["width"], "height": size["height"]})
            page.screenshot(path=shots / f"{name}-{scheme}-{width}.png", full_page=whole)
