"""The gallery of 20,000 pictures, and what its Content-Security-Policy blocks, in a real browser.

Run these tests with `nox -s browser`. Set FLUX2MAX_SCREENSHOTS to a folder to keep the screenshots.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image
from playwright.sync_api import Browser, Page, expect
from support.browser import running_browser, take_screenshots

from flux2max_async.cli._gallery import Gallery
from flux2max_async.cli._rows import Row

COUNT = 20_000
COLOURS = ["crimson", "teal", "goldenrod", "slateblue", "olive"]


def create_rows() -> Iterator[Row]:
    """Yield the rows; the first, the last and every 16th between them failed, and some pictures have an error."""
    for number in range(COUNT):
        colour = COLOURS[number % len(COLOURS)]
        row = Row(f"key-{number}", f"{colour}, no. {number}", {"seed": 70_000 + number}, state="completed")
        if number % 16 == 0 or number == COUNT - 1:
            row.state, row.error = "failed", "the model gave up " * (1 + number % 10)
        else:
            row.files = [f"{colour}.png"]
            row.error = "only one of two pictures could be saved" if number % 50 == 7 else None
        yield row


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Provide the system's browser."""
    with running_browser() as browser:
        yield browser


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the gallery of five pictures that are shown again and again."""
    folder = tmp_path_factory.mktemp("large")
    for colour in COLOURS:
        Image.new("RGB", (640, 480), colour).save(folder / f"{colour}.png")
    Gallery(folder).write(list(create_rows()), running=False)
    return folder


@pytest.fixture
def page(browser: Browser, folder: Path) -> Iterator[Page]:
    """Open the page from its file; fail on any error."""
    with browser.new_page(viewport={"width": 1280, "height": 860}) as page:
        errors: list[str] = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.goto((folder / "index.html").as_uri())
        yield page
        assert errors == []


@pytest.fixture
def shots(tmp_path: Path) -> Path:
    """Return the folder for screenshots."""
    return Path(os.environ.get("FLUX2MAX_SCREENSHOTS", tmp_path)) / "large-gallery"


def card_positions(page: Page) -> list[int]:
    """Return the numbers of the cards that exist, from 1, in the document's order."""
    positions: list[int] = page.evaluate("[...list.children].map((card) => Number(card.ariaPosInSet))")
    return positions


def wait_for_card(page: Page, prompt: str) -> None:
    """Wait until a card is shown, and its picture is decoded if it has one."""
    card = page.locator("#cards > li").filter(has_text=prompt).first
    expect(card).to_be_in_viewport()
    card.evaluate("async (card) => { await card.querySelector('img')?.decode(); }")


def test_scrolling_to_the_end(page: Page, shots: Path) -> None:
    """Only cards near the visible part exist, each in its place, and scrolling changes neither heights nor places."""
    wait_for_card(page, "crimson, no. 5")
    take_screenshots(page, shots, "1-start", full_page=False)
    page.set_viewport_size({"width": 1280, "height": 860})
    heights, seen = set[float](), set[int]()
    for share in (0.0, 0.3, 0.999, 0.5, 1.0):
        page.evaluate(f"scrollTo(0, {share} * document.documentElement.scrollHeight)")
        page.wait_for_timeout(100)
        heights.add(page.evaluate("document.documentElement.scrollHeight"))
        positions = card_positions(page)
        seen.update(positions)
        in_order = page.evaluate("""[...list.children].map((card) => card.getBoundingClientRect()).every(
            (box, index, all) => !index || box.left >= all[index - 1].right || box.top >= all[index - 1].bottom
        )""")
        tops = page.evaluate("""[...list.children].map((card) =>
            (card.getBoundingClientRect().top - list.getBoundingClientRect().top) / step
        )""")

        assert positions == list(range(positions[0], positions[-1] + 1))
        assert len(positions) < 100
        assert in_order
        assert tops == pytest.approx([(position - 1) // 5 for position in positions], abs=0.02)
    wait_for_card(page, "olive, no. 19999")
    take_screenshots(page, shots, "2-end", full_page=False)

    assert len(heights) == 1
    assert {1, COUNT} < seen
    expect(page.get_by_role("listitem").last).to_have_attribute("aria-setsize", str(COUNT))


def test_filter_covers_all(page: Page, shots: Path) -> None:
    """The filter and the order apply to all entries, also to those without a card; the first match is shown."""
    page.evaluate("scrollTo(0, 0.5 * document.documentElement.scrollHeight)")
    page.get_by_label("Filter").fill("key-19 goldenrod seed 89")
    scrolled = page.evaluate("scrollY")
    status, found = page.get_by_role("status").inner_text(), page.locator("#cards .prompt").all_text_contents()
    take_screenshots(page, shots, "3-filtered", full_page=False)
    page.get_by_label("Filter").fill("89998")
    (only,) = page.locator("#cards .prompt").all_text_contents()
    page.get_by_label("Filter").fill("")
    page.get_by_label("Sort by").select_option("state")
    sorted_states = page.locator("#cards .state dd").all_text_contents()
    page.evaluate("scrollTo(0, document.documentElement.scrollHeight)")
    wait_for_card(page, "slateblue, no. 19998")
    last_states = page.locator("#cards .state dd").all_text_contents()
    last_count = page.locator("#cards > li a").count()

    assert scrolled == 0
    assert status == f"200 of {COUNT} shown"
    assert found == [f"goldenrod, no. {number}" for number in range(19_002, COUNT, 5)]
    assert only == "slateblue, no. 19998"
    assert set(sorted_states) == {"failed"}
    assert (set(last_states), last_count > 10) == (set(), True)  # only other states than "completed" are shown


def test_keyboard_only(page: Page) -> None:
    """Arrow keys, Home and End go through all pictures; focus stays when its card scrolls out, and returns after Escape."""

    def focused() -> str:
        return str(page.evaluate("document.activeElement.querySelector('img').alt"))

    page.keyboard.press("/")
    for _ in range(2):
        page.keyboard.press("Tab")
    visited = [focused()]
    for key in ("ArrowRight", "ArrowDown", "End", "ArrowLeft", "ArrowUp", "Home"):
        page.keyboard.press(key)
        visited.append(focused())
        expect(page.locator("#cards a:focus")).to_be_in_viewport()
    page.keyboard.press("ArrowRight")
    page.evaluate("scrollTo(0, document.documentElement.scrollHeight)")
    wait_for_card(page, "slateblue, no. 19998")
    after_scrolling = focused()
    kept = card_positions(page)[:2]
    page.keyboard.press("ArrowRight")
    visited.append(focused())
    page.keyboard.press("Enter")
    page.keyboard.press("End")
    expect(page.get_by_role("dialog")).to_contain_text("slateblue, no. 19998")
    for name in ("Previous picture", "Next picture", "Close"):
        expect(page.get_by_role("button", name=name)).to_be_in_viewport(ratio=1)
    page.keyboard.press("Escape")

    assert visited == [
        *("teal, no. 1", "goldenrod, no. 2", "goldenrod, no. 7", "slateblue, no. 19998", "goldenrod, no. 19997"),
        *("goldenrod, no. 19992", "teal, no. 1", "slateblue, no. 3"),
    ]
    assert after_scrolling == "goldenrod, no. 2"
    assert kept[0] == 3 < kept[1] - 1_000
    expect(page.locator("#cards a:focus img")).to_have_attribute("alt", "slateblue, no. 19998")
    expect(page.locator("#cards a:focus")).to_be_in_viewport()


def test_tab_reaches_the_next_cards(page: Page) -> None:
    """Tab goes on beyond the cards that existed at first."""
    page.locator("#cards a").first.focus()
    for _ in range(120):
        page.keyboard.press("Tab")

    # Of each 16 cards, one has no picture.
    assert page.evaluate("document.activeElement.closest('li').ariaPosInSet") == str(2 + 120 + 8)


def test_window_is_resized(page: Page) -> None:
    """The cards are laid out again when the window becomes narrower, and the same ones are visible as before."""

    def first_visible() -> int:
        positions: list[int] = page.evaluate("""[...list.children]
            .filter((card) => card.getBoundingClientRect().bottom > 100).map((card) => Number(card.ariaPosInSet))""")
        return positions[0]

    page.evaluate("scrollTo(0, 0.5 * document.documentElement.scrollHeight)")
    page.wait_for_timeout(100)
    columns, first = page.evaluate("columns"), first_visible()
    page.set_viewport_size({"width": 390, "height": 844})
    page.wait_for_function("() => columns === 2")
    page.wait_for_timeout(100)

    assert columns == 5
    assert first_visible() == pytest.approx(first, abs=10)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert page.evaluate("new Set([...list.children].map((card) => card.getBoundingClientRect().left)).size") == 2


INJECTIONS = {
    "script": "<script>injected = true</script>",
    "event handler": '<img src="missing" onerror="injected = true">',
    "javascript URL": '<a id="injected-link" href="javascript:injected = true">x</a>',
    "remote script": '<script src="http://127.0.0.1:9/x.js"></script>',
    "data script": '<script src="data:text/javascript,injected = true"></script>',
    "style": "<style>h1 { color: rgb(1, 2, 3) !important }</style>",
    "style attribute": '<p style="position: fixed">x</p>',
    "frame": '<iframe srcdoc="<script>top.injected = true</script>"></iframe>',
    "remote image": '<img src="http://127.0.0.1:9/x.png">',
    "object": '<object data="data:text/html,x"></object>',
    "font": '<link rel="stylesheet" href="http://127.0.0.1:9/x.css">',
}


@pytest.mark.parametrize("name", INJECTIONS)
def test_injected_content_is_blocked(browser: Browser, folder: Path, name: str) -> None:
    """Content that got into the page is blocked, and the page itself still works."""
    text = (folder / "index.html").read_text(encoding="utf-8")
    file = folder / "injected.html"
    file.write_text(text.replace("<main>", f"<main>{INJECTIONS[name]}"), encoding="utf-8")
    messages: list[str] = []
    requests: list[str] = []
    with browser.new_page() as page:
        page.on("console", lambda message: messages.append(message.text))
        page.on("requestfinished", lambda request: requests.append(request.url))
        page.goto(file.as_uri())
        wait_for_card(page, "crimson, no. 5")
        if name == "javascript URL":
            page.locator("#injected-link").click()
        page.wait_for_timeout(100)
        injected = page.evaluate("'injected' in globalThis")
        colour = page.locator("h1").evaluate("heading => getComputedStyle(heading).color")
        grid = page.locator("#cards").evaluate("list => getComputedStyle(list).display")

    assert any("Content Security Policy" in message for message in messages), messages
    assert not injected
    assert colour != "rgb(1, 2, 3)"
    assert grid == "grid"
    assert not [url for url in requests if not url.startswith(("file:", "data:,"))]
