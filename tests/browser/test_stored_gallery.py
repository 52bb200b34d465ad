"""The gallery of pictures in object storage in a real browser: thumbnails, links, and addresses to copy.

Run these tests with `nox -s browser`. Set FLUX2MAX_SCREENSHOTS to a folder to keep the screenshots.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image
from playwright.sync_api import Browser, Page, expect
from support.browser import find_barriers, running_browser, take_screenshots

from flux2max_async.cli._gallery import Gallery
from flux2max_async.cli._rows import Row
from flux2max_async.cli._stored_pictures import StoredPictures

ROOT = "s3://bucket/some/"
NAMES = ("linked.png", "private.png", "missing.png", "missing-private.png")


class Pictures(StoredPictures):
    """Pictures of which some have links."""

    def read(self, location: str) -> bytes | None:
        return None if "missing" in location else Path(self.store, "picture.png").read_bytes()

    def link(self, location: str) -> str | None:
        return None if "private" in location else f"https://pictures.example/{location.removeprefix(ROOT)}"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Provide the system's browser."""
    with running_browser() as browser:
        yield browser


@pytest.fixture
def page(browser: Browser, tmp_path: Path) -> Iterator[Page]:
    """Open the page of four stored pictures; fail on any script error, and on what the page may not load."""
    Image.linear_gradient("L").resize((1024, 768)).save(tmp_path / "picture.png")
    rows = [Row(name, f"picture {name}", state="completed", locations=[ROOT + name]) for name in NAMES]
    Gallery(tmp_path, stored=Pictures(tmp_path, ROOT)).write(rows, running=False)
    errors: list[str] = []
    requests: list[str] = []
    with browser.new_page(viewport={"width": 1280, "height": 860}) as page:
        page.set_default_timeout(10_000)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.on("request", lambda request: requests.append(request.url))
        page.goto((tmp_path / "index.html").as_uri())
        yield page
    assert errors == []
    assert [url for url in requests if not url.startswith(("file:", "data:"))] == []


def test_cards(page: Page, tmp_path: Path) -> None:
    """A card shows the thumbnail or the address; both lead to the picture if a browser can open it."""
    shots = Path(os.environ.get("FLUX2MAX_SCREENSHOTS", tmp_path)) / "stored-gallery"
    take_screenshots(page, shots, "cards", full_page=False)
    cards = page.locator("#cards > li")

    expect(cards).to_have_count(4)
    for index, (width, links) in enumerate([(360, 2), (360, 1), (None, 1), (None, 0)]):
        card, images = cards.nth(index), cards.nth(index).get_by_role("img")
        expect(card.get_by_role("link")).to_have_count(links)
        expect(images).to_have_count(0 if width is None else 1)
        if width is None:
            expect(card.locator(".reason")).to_have_text(ROOT + NAMES[index])
        else:
            images.evaluate("image => image.decode()")
            assert images.evaluate("image => image.naturalWidth") == width
            expect(card).to_contain_text("1024\u00d7768")
    for link in (cards.nth(0).locator("a.frame"), cards.nth(0).get_by_role("link", name="original")):
        expect(link).to_have_attribute("href", "https://pictures.example/linked.png")
    expect(cards.nth(2).get_by_role("link")).to_have_attribute("href", "https://pictures.example/missing.png")
    expect(cards.nth(2).get_by_role("link")).to_have_attribute("rel", "noreferrer")
    assert find_barriers(page) == []
    page.get_by_role("searchbox").fill("some/private")
    expect(cards).to_have_count(1)


def test_dialog(page: Page, tmp_path: Path) -> None:
    """The dialog enlarges the thumbnail, in the picture's own size too, and shows the link or the address."""
    shots = Path(os.environ.get("FLUX2MAX_SCREENSHOTS", tmp_path)) / "stored-gallery"
    page.locator("a.frame").first.click()
    picture, caption = page.locator("#viewer img"), page.locator("#caption")
    picture.evaluate("image => image.decode()")
    take_screenshots(page, shots, "dialog", full_page=False)
    fitted = picture.evaluate("image => image.width")
    expect(caption.get_by_role("link", name=f"{ROOT}linked.png")).to_have_attribute(
        "href", "https://pictures.example/linked.png"
    )
    page.keyboard.press("z")
    zoomed = picture.evaluate("image => image.width")
    page.keyboard.press("z")
    page.keyboard.press("ArrowRight")

    assert fitted > 800
    assert zoomed == 1024
    expect(caption).to_contain_text("2 of 2")
    expect(caption).to_contain_text(f"{ROOT}private.png")
    expect(caption.get_by_role("link")).to_have_count(0)
    page.locator("#stored span").click()
    assert page.evaluate("getSelection().toString().trim()") == f"{ROOT}private.png"
    page.keyboard.press("Escape")
    expect(page.locator("dialog")).not_to_be_visible()
