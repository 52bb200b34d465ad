"""The system's browser, screenshots of pages, and what is hard to use in them."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Literal

from playwright.sync_api import Browser, Page, ViewportSize, sync_playwright

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
SCHEMES: list[Literal["light", "dark"]] = ["light", "dark"]
VIEWPORTS: dict[str, ViewportSize] = {
    "wide": {"width": 1280, "height": 960},
    "narrow": {"width": 390, "height": 844},
    "widest": {"width": 2560, "height": 1440},
}


@contextmanager
def running_browser() -> Iterator[Browser]:
    """Run the system's Chromium in headless mode."""
    with (
        sync_playwright() as playwright,
        playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS) as browser,
    ):
        yield browser


def take_screenshots(page: Page, folder: Path, name: str, *, full_page: bool = True) -> None:
    """Take screenshots of a page in light and dark mode, of three widths.

    Args:
        page: The page.
        folder: Where to save the screenshots.
        name: The prefix of their file names.
        full_page: Whether to capture the full page instead of the viewport.
    """
    for scheme in SCHEMES:
        page.emulate_media(color_scheme=scheme)
        for viewport_name, size in VIEWPORTS.items():
            page.set_viewport_size(size)
            page.screenshot(path=folder / f"{name}-{scheme}-{viewport_name}.png", full_page=full_page)


def find_barriers(page: Page) -> list[str]:
    """Return what axe-core finds to be a serious barrier on a page, in light and dark mode."""
    page.evaluate(files("axe_playwright_python").joinpath("axe.min.js").read_text(encoding="utf-8"))
    found: list[str] = []
    for scheme in SCHEMES:
        page.emulate_media(color_scheme=scheme)
        violations = page.evaluate("axe.run().then((results) => results.violations)")
        found += [
            f"{scheme}: {violation['help']}: {[node['html'][:200] for node in violation['nodes'][:3]]}"
            for violation in violations
            if violation["impact"] in {"serious", "critical"}
        ]
    return found
