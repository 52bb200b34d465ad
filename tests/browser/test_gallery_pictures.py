"""The gallery's pictures in a real browser: their shapes, variants and order, the focus, the lightbox, and barriers.

Run these tests with `nox -s browser`. Set FLUX2MAX_SCREENSHOTS to a folder to keep the screenshots.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from decimal import Decimal
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from playwright.sync_api import Browser, BrowserContext, Page, expect
from support.browser import VIEWPORTS, find_barriers, running_browser, take_screenshots

from flux2max_async.cli._gallery import Gallery
from flux2max_async.cli._requests_file import read_requests_file
from flux2max_async.cli._rows import Row

Open = Callable[..., Page]
COUNT = 500
SHAPES = {"landscape": (640, 480), "portrait": (480, 640), "square": (512, 512), "panorama": (768, 320)}
ACCENT = (0x1F, 0x5F, 0xBF)


def create_rows(prompts: int, repeat: int = 1, shapes: Sequence[str] = ("landscape",)) -> list[Row]:
    """Return completed rows of a requests file, as they are after `batch --repeat`."""
    text = "".join(f"picture number {number}\n" for number in range(prompts))
    rows = [
        Row.from_line(line) for line in read_requests_file(text.encode(), "txt", folder=Path(), repeat=repeat).lines
    ]
    for number, row in enumerate(rows):
        row.state, row.cost, row.seconds = "completed", Decimal("0.07"), 8.0
        row.files = [f"{shapes[number % len(shapes)]}.png"]
    return rows


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Provide the system's browser."""
    with running_browser() as browser:
        yield browser


@pytest.fixture
def context(browser: Browser) -> Iterator[BrowserContext]:
    """Provide a browser profile in which pages may read the clipboard."""
    with browser.new_context(viewport={"width": 1280, "height": 860}, color_scheme="light") as context:
        context.grant_permissions(["clipboard-read", "clipboard-write"])
        yield context


@pytest.fixture
def open_gallery(context: BrowserContext, tmp_path: Path) -> Iterator[Open]:
    """Provide a function that opens the gallery of some rows; fail on any script error."""
    errors: list[str] = []
    for name, size in SHAPES.items():
        Image.linear_gradient("L").resize(size).save(tmp_path / f"{name}.png")

    def open_page(rows: list[Row]) -> Page:
        Gallery(tmp_path).write(rows, running=False)
        page = context.new_page()
        page.set_default_timeout(10_000)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.goto((tmp_path / "index.html").as_uri())
        return page

    yield open_page
    assert errors == []


@pytest.fixture
def shots(tmp_path: Path) -> Path:
    """Return the folder for screenshots."""
    return Path(os.environ.get("FLUX2MAX_SCREENSHOTS", tmp_path)) / "gallery-pictures"


def wait_for_picture(page: Page) -> None:
    """Wait until the picture in the lightbox is decoded."""
    page.locator("#viewer img").evaluate("image => image.decode()")


def get_box(page: Page, selector: str) -> dict[str, float]:
    """Return the place and the size of the first element that matches."""
    box: dict[str, float] = page.locator(selector).first.evaluate("element => element.getBoundingClientRect().toJSON()")
    return box


@pytest.mark.parametrize(
    ("shapes", "unfilled"),
    [
        (["landscape"], set[str]()),
        (["portrait"], set()),
        (["panorama"], set()),
        (["landscape", "square", "panorama"], set()),
        (["square", "landscape", "portrait"], {"portrait"}),
    ],
)
def test_shapes(open_gallery: Open, shots: Path, shapes: list[str], unfilled: set[str]) -> None:
    """Pictures fill their frames without bars, cards are equally high, and no text covers a picture."""
    page = open_gallery(create_rows(30, shapes=shapes))
    page.locator("#cards img").last.scroll_into_view_if_needed()
    if len(shapes) > 1:
        take_screenshots(page, shots, f"shapes-{'-'.join(shapes)}", full_page=False)
    measured: list[list[Any]] = page.evaluate("""[...list.children].map((card) => {
        const [image, frame, about] = ["img", ".frame", ".about"].map((part) => card.querySelector(part).getBoundingClientRect());
        const name = card.querySelector("a").getAttribute("href").split(".")[0];
        return [name, frame.width / frame.height, card.getBoundingClientRect().height, about.top - image.bottom];
    })""")

    for name, ratio, _, gap in measured:
        width, height = SHAPES[name]
        assert gap == pytest.approx(0, abs=1)
        if name not in unfilled:
            assert ratio == pytest.approx(width / height, rel=0.02)
    assert len({round(height) for _, _, height, _ in measured}) == 1


@pytest.mark.parametrize("shape", SHAPES)
def test_focus_is_visible(open_gallery: Open, shape: str) -> None:
    """The card that has the focus is outlined, whatever shape its picture has."""
    page = open_gallery(create_rows(5, shapes=[shape]))
    page.keyboard.press("/")
    for _ in range(2):
        page.keyboard.press("Tab")
    box = get_box(page, "#cards > li:focus-within")

    def has_outline() -> bool:
        left = page.screenshot(clip={"x": box["x"] - 8, "y": box["y"], "width": 8, "height": box["height"]})
        with Image.open(BytesIO(left)) as picture:
            colours = picture.convert("RGB").getcolors(1_000_000)
        assert colours is not None
        return any(count > 0.8 * box["height"] and colour == ACCENT for count, colour in colours)

    focused = has_outline()
    page.keyboard.press("ArrowRight")

    assert focused
    assert not has_outline()


@pytest.mark.parametrize(("width", "columns"), [(390, 2), (1280, 5), (2560, 10)])
@pytest.mark.parametrize("repeat", [3, 4, 7])
def test_variants_stay_together(open_gallery: Open, width: int, columns: int, repeat: int) -> None:
    """The variants of a prompt are in one row if they fit, on a common background, and all are shown."""
    page = open_gallery(create_rows(20, repeat=repeat))
    page.set_viewport_size({"width": width, "height": 860})
    page.wait_for_function(f"() => columns === {columns}")
    cells: list[list[Any]] = page.evaluate("""[...list.children].map((card) => [
        card.querySelector(".prompt").textContent, card.entry.cell,
        card.classList.contains("first") ? Number(card.style.getPropertyValue("--span")) : 1,
    ])""")

    assert len({cell for _, cell, _ in cells}) == len(cells) == 20 * repeat
    for number in range(20):
        group = [(cell, span) for prompt, cell, span in cells if prompt == f"picture number {number}"]
        rows = {cell // columns for cell, _ in group}
        first = [cell for cell, _ in group]
        assert first == list(range(first[0], first[0] + repeat))
        assert len(rows) == -(-repeat // columns)
        backgrounds = {(cell // columns): span for cell, span in group if span > 1}
        for row in rows:
            count = sum(cell // columns == row for cell in first)
            assert backgrounds.get(row, 1) == count
    expect(page.locator("#cards > li").nth(1)).to_contain_text(f"variant 2 of {repeat}")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_order(open_gallery: Open) -> None:
    """Pictures can be sorted by cost and by time; what has none comes last, equal ones stay in the file's order."""
    rows = create_rows(6)
    costs = ["0.10", "0.07", None, "0.07", "1.40", "0.20"]
    times = [1.0, 12.0, 3.5, None, 3.5, 100.0]
    for row, cost, seconds in zip(rows, costs, times, strict=True):
        row.cost, row.seconds = None if cost is None else Decimal(cost), seconds
    page = open_gallery(rows)

    def numbers() -> list[int]:
        return [int(text.split()[-1]) for text in page.locator("#cards .prompt").all_text_contents()]

    page.get_by_label("Sort by").select_option("cost")
    by_cost = numbers()
    page.get_by_label("Sort by").select_option("time")
    page.reload()
    by_time = numbers()

    assert by_cost == [4, 5, 0, 1, 3, 2]
    assert by_time == [5, 1, 2, 4, 0, 3]
    expect(page.locator("#cards > li").first).to_contain_text("100 s")


def test_filter_finds_what_is_shown(open_gallery: Open) -> None:
    """The filter finds neither the hashes in keys nor anything else that no card shows, but a whole key."""
    rows = create_rows(COUNT)
    own = Row("shop-49-front", "a heron", state="completed", files=["square.png"])
    page = open_gallery([*rows, own])

    def find(text: str) -> list[str]:
        page.get_by_label("Filter").fill(text)
        return page.locator("#cards .prompt").all_text_contents()

    assert find("number 49") == [f"picture number {number}" for number in range(COUNT) if "49" in str(number)]
    assert find(rows[49].key) == ["picture number 49"]
    assert find(rows[49].key[-8:]) == []
    assert find("FRONT") == ["a heron"]


def test_keyboard_only(open_gallery: Open) -> None:
    """The keyboard alone reaches a picture, its actual size, its prompt and the next one, and goes back to the card."""
    page = open_gallery(create_rows(125, repeat=4))
    focused = "document.activeElement.ariaLabel ?? document.activeElement.textContent ?? ''"
    for key in ("/", "Tab", "Tab", "ArrowRight", "ArrowDown", "c"):
        page.keyboard.press(key)
    expect(page.get_by_text("Prompt copied.")).to_be_visible()
    copied = [page.evaluate("navigator.clipboard.readText()")]
    page.keyboard.press("Enter")
    wait_for_picture(page)
    first_focus = page.evaluate("document.activeElement.id || document.activeElement.matches('#viewer img')")
    page.keyboard.press("Enter")
    zoomed = page.locator("#viewer img").evaluate("image => [image.width, image.naturalWidth]")
    page.keyboard.press("z")
    fits = page.evaluate("viewer.scrollHeight <= viewer.clientHeight")
    page.keyboard.press("PageDown")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("c")
    expect(page.get_by_role("dialog").get_by_text("Prompt copied.")).to_be_visible()
    copied.append(page.evaluate("navigator.clipboard.readText()"))
    reached = []
    for _ in range(5):
        page.keyboard.press("Tab")
        reached.append(page.evaluate(focused))
    page.keyboard.press("Escape")

    assert copied == ["picture number 1", "picture number 2"]
    assert first_focus is True
    assert zoomed == [640, 640]
    assert fits
    assert reached == ["Previous picture", "Next picture", "Actual size", "Copy prompt", "Close"]
    expect(page.get_by_role("dialog")).to_be_hidden()
    expect(page.locator("#cards a:focus")).to_have_count(1)
    assert page.evaluate("document.activeElement.closest('li').entry.order") == 8


def test_clipboard_is_not_available(open_gallery: Open) -> None:
    """If the browser has no clipboard for this page, that is said instead."""
    page = open_gallery(create_rows(1))
    page.evaluate("Object.defineProperty(navigator, 'clipboard', {value: undefined})")
    page.locator("#cards a").click()
    page.get_by_role("button", name="Copy prompt").click()

    expect(page.get_by_role("dialog").get_by_text("doesn't allow copying")).to_be_visible()


def test_actual_size(open_gallery: Open, tmp_path: Path, shots: Path) -> None:
    """A click shows a picture in its actual size around that point; arrow keys, the mouse and the next picture keep it."""
    Image.linear_gradient("L").resize((3000, 2000)).save(tmp_path / "large.png")
    rows = create_rows(3)
    rows[0].files = rows[1].files = ["large.png"]
    page = open_gallery(rows)
    page.locator("#cards a").first.click()
    wait_for_picture(page)
    picture = page.locator("#viewer img")
    fit = get_box(page, "#viewer img")
    page.mouse.click(fit["x"] + 0.25 * fit["width"], fit["y"] + 0.75 * fit["height"])
    take_screenshots(page, shots, "actual-size", full_page=False)
    page.set_viewport_size(VIEWPORTS["wide"])
    middle = "[(viewer.scrollLeft + viewer.clientWidth / 2) / full.width, (viewer.scrollTop + viewer.clientHeight / 2) / full.height]"
    page.evaluate("setZoom(true, 0.25, 0.75)")
    zoomed, width = page.evaluate(middle), picture.evaluate("image => image.width")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowUp")
    panned = page.evaluate(middle)
    page.mouse.move(640, 400)
    page.mouse.down()
    page.mouse.move(540, 430, steps=4)
    page.mouse.up()
    dragged = page.evaluate(middle)
    page.keyboard.press("PageDown")
    wait_for_picture(page)
    next_picture = page.evaluate(
        "[full.width, ...document.querySelector('#caption').textContent.split(' ').slice(2, 3)]"
    )
    kept = page.evaluate(middle)
    page.mouse.click(640, 400)
    pressed = page.get_by_role("button", name="Actual size").get_attribute("aria-pressed")
    fit_again = get_box(page, "#viewer img")

    assert width == 3000
    assert zoomed == pytest.approx([0.25, 0.75], abs=0.001)
    assert panned == pytest.approx([zoomed[0] + 80 / 3000, zoomed[1] - 80 / 2000], abs=0.001)
    assert dragged == pytest.approx([panned[0] + 100 / 3000, panned[1] - 30 / 2000], abs=0.001)
    assert kept == pytest.approx(dragged, abs=0.001)
    assert next_picture[0] == 3000
    assert pressed == "false"
    assert fit_again["width"] / fit_again["height"] == pytest.approx(1.5, abs=0.01)
    assert fit_again["width"] <= 1280
    page.mouse.click(fit_again["x"] + fit_again["width"] / 2, fit_again["y"] + 2)
    expect(page.get_by_role("button", name="Actual size")).to_have_attribute("aria-pressed", "true")
    page.get_by_role("button", name="Close").click()
    expect(page.get_by_role("dialog")).to_be_hidden()


def test_click_beside_the_picture(open_gallery: Open) -> None:
    """A click beside the picture closes the lightbox; a small picture is enlarged until it fits."""
    page = open_gallery(create_rows(1, shapes=["portrait"]))
    page.locator("#cards a").click()
    wait_for_picture(page)
    box = get_box(page, "#viewer img")
    page.mouse.click(box["x"] - 100, box["y"] + 100)

    assert box["height"] > 640
    assert box["width"] / box["height"] == pytest.approx(0.75, abs=0.01)
    expect(page.get_by_role("dialog")).to_be_hidden()


@pytest.mark.parametrize("width", [390, 1280])
def test_barriers(open_gallery: Open, shots: Path, width: int) -> None:
    """axe-core finds no serious barrier among variants and failures with long reasons, and in the lightbox."""
    rows = create_rows(10, repeat=4)
    for row in rows[::20]:
        row.state, row.files, row.error = "failed", [], "the service gave a long reason; " * 30
    for row in rows[1::20]:
        row.error = "only one of two pictures could be saved"
    rows[2].state, rows[2].files = "waiting", []
    page = open_gallery(rows)
    if width == 1280:
        take_screenshots(page, shots, "barriers", full_page=False)
    page.set_viewport_size({"width": width, "height": 860})
    grid = find_barriers(page)
    page.locator("#cards a").first.click()
    wait_for_picture(page)
    lightbox = find_barriers(page)
    page.get_by_role("button", name="Actual size").click()

    assert grid == []
    assert lightbox == []
    assert find_barriers(page) == []


def test_long_reasons_can_be_scrolled(open_gallery: Open) -> None:
    """A reason that is longer than its card can have the focus, so that keys scroll it; a short one can't."""
    rows = create_rows(2)
    for row, error in zip(rows, ("short", "a long reason; " * 100), strict=True):
        row.state, row.files, row.error = "failed", [], error
    page = open_gallery(rows)

    assert page.locator(".reason").evaluate_all("reasons => reasons.map((reason) => reason.tabIndex)") == [-1, 0]
