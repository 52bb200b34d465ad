"""The gallery of a batch of 300 pictures, opened as a file in a real browser.

Run these tests with `nox -s browser`. Set FLUX2MAX_SCREENSHOTS to a folder to keep the screenshots.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import quote

import pytest
from playwright.sync_api import Browser, Page, Route, expect
from support.browser import running_browser, take_screenshots

from flux2max_async.emulator import Emulator

COUNT = 300
SUBJECTS = [
    *("a lighthouse at dawn", "a fox in the autumn forest", "a volcano under the stars", "camels in the dunes"),
    *("a city on a rainy night", "cherry blossoms by the river", "a yacht on a windy morning"),
]
HTML_PROMPT = '<img src=x onerror="document.title=1"> & "quotes" </script><script>document.title=2</script>'
SIZES = [(512, 384), (384, 512), (512, 512), (768, 320)]


def request_lines() -> list[dict[str, object]]:
    """Return the lines of the requests file; every twelfth fails, and the last ones are unusual."""
    lines: list[dict[str, object]] = []
    for number in range(COUNT - 2):
        width, height = SIZES[number % len(SIZES)]
        prompt = f"{SUBJECTS[number % len(SUBJECTS)]}, no. {number}"
        if number % 12 == 11:
            prompt += " [moderate]" if number % 24 == 23 else " [fail]"
        lines.append({"prompt": prompt, "seed": 1000 + number, "width": width, "height": height})
    lines.append({"prompt": HTML_PROMPT, "width": 256, "height": 256, "key": "50% #1?"})
    lines.append({"prompt": "many words " * 80, "width": 256, "height": 256})
    return lines


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Provide the system's browser."""
    with running_browser() as browser:
        yield browser


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run a batch and return its folder."""
    work_folder = tmp_path_factory.mktemp("gallery")
    (work_folder / "requests.jsonl").write_text(
        "".join(f"{json.dumps(line)}\n" for line in request_lines()), encoding="utf-8"
    )
    with Emulator(seconds=0.2, spread=0.2, seed=1, max_in_flight=60) as gateway:
        process = subprocess.run(
            [
                *(sys.executable, "-m", "flux2max_async.cli", "batch", "requests.jsonl", "--out", "pictures"),
                *("--max-in-flight", "60", "--budget", "25"),
            ],
            cwd=work_folder,
            env={**os.environ, "FLUX2MAX_API_KEY": gateway.api_key, "FLUX2MAX_BASE_URL": gateway.url},
            capture_output=True,
            text=True,
            check=False,
        )
    assert process.returncode == 1, process.stderr
    return work_folder / "pictures"


@pytest.fixture
def page(browser: Browser, folder: Path) -> Iterator[Page]:
    """Open the page from its file; fail on any script error or network request."""
    with browser.new_page(viewport={"width": 1280, "height": 860}) as page:
        errors: list[str] = []
        network_requests: list[str] = []

        def check(route: Route) -> None:
            if not route.request.url.startswith(("file:", "data:")):
                network_requests.append(route.request.url)
            route.continue_()

        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.route("**/*", check)
        page.set_default_timeout(10_000)
        page.goto((folder / "index.html").as_uri())
        yield page
        assert errors == []
        assert network_requests == []


@pytest.fixture
def shots(tmp_path: Path) -> Path:
    """Return the folder for screenshots."""
    return Path(os.environ.get("FLUX2MAX_SCREENSHOTS", tmp_path)) / "gallery"


def visible_prompts(page: Page) -> list[str]:
    """Return the prompts of the visible cards, in order."""
    return [text.strip() for text in page.locator("#cards > li:visible .prompt").all_inner_texts()]


def test_all_requests_are_shown(page: Page, folder: Path, shots: Path) -> None:
    """Each request has a card with its prompt, seed, size and cost, or its state and error."""
    take_screenshots(page, shots, "1-all", full_page=False)
    cards = page.locator("#cards > li")
    first, failed = cards.nth(0), cards.nth(11)

    expect(cards).to_have_count(COUNT)
    assert [prompt.split(",")[0] for prompt in visible_prompts(page)[:7]] == SUBJECTS
    expect(first).not_to_contain_text("completed")
    expect(first).to_contain_text("512\u00d7384")
    expect(first).to_contain_text("$0.07")
    expect(first).to_contain_text("1000")
    expect(failed).to_contain_text("failed")
    expect(failed).to_contain_text("the model gave up")
    expect(failed.get_by_role("img")).to_have_count(0)
    expect(page.get_by_role("banner")).to_contain_text("276 completed, 24 failed. $19.32 spent.")
    assert page.title() == f"pictures ({COUNT - 24})"
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    assert (folder / "thumbs").stat().st_size < 1_000_000


def test_pictures_are_loaded_lazily(page: Page) -> None:
    """Thumbnails are small, and are loaded when they scroll into view."""
    page.locator("#cards img").first.evaluate("image => image.decode()")
    loaded = page.evaluate(
        "[...document.images].filter((image) => image.src && image.complete && image.naturalWidth).length"
    )
    page.locator("#cards img").last.scroll_into_view_if_needed()
    page.locator("#cards img").last.evaluate("image => image.decode()")
    side_lengths = page.evaluate(
        "[...document.querySelectorAll('#cards img')].filter((image) => image.naturalWidth)"
        ".map((image) => Math.max(image.naturalWidth, image.naturalHeight))"
    )

    assert 0 < loaded < 100
    assert max(side_lengths) <= 360


def test_filter_and_sort(page: Page, shots: Path) -> None:
    """The filter covers prompt, seed and state; sorting by state lists failures first; a reload keeps both."""
    filter_box = page.get_by_label("Filter")
    filter_box.fill("fox failed")
    foxes = visible_prompts(page)
    status_text = page.get_by_role("status").inner_text()
    take_screenshots(page, shots, "2-filtered", full_page=False)
    page.reload()
    after_reload = visible_prompts(page)
    filter_box.fill("1007")
    seed = visible_prompts(page)
    filter_box.fill("zebra")
    no_match_visible = page.get_by_text("No picture matches this filter.").is_visible()
    filter_box.fill("")
    page.get_by_label("Sort by").select_option("state")
    page.reload()
    sorted_states = page.locator("#cards > li:nth-child(-n+25) .state dd").all_text_contents()
    page.get_by_label("Sort by").select_option("order")

    assert foxes
    assert all("fox" in prompt and ("[fail]" in prompt or "[moderate]" in prompt) for prompt in foxes)
    assert status_text == f"{len(foxes)} of {COUNT} shown"
    assert after_reload == foxes
    assert seed == ["a lighthouse at dawn, no. 7"]
    assert no_match_visible
    assert sorted_states == ["failed"] * 24
    assert visible_prompts(page)[0] == "a lighthouse at dawn, no. 0"


def test_full_picture(page: Page, shots: Path) -> None:
    """A click opens the picture, arrow keys move between pictures, and Escape returns to the card."""
    page.locator("#cards a").nth(9).click()
    dialog = page.get_by_role("dialog")
    picture = dialog.get_by_role("img")
    picture.evaluate("image => image.decode()")
    size = picture.evaluate("image => [image.naturalWidth, image.naturalHeight]")
    caption = dialog.get_by_role("paragraph").inner_text()
    take_screenshots(page, shots, "3-full", full_page=False)
    alts = []
    for key in ("ArrowRight", "ArrowRight", "ArrowLeft", "Home", "ArrowLeft"):
        page.keyboard.press(key)
        alts.append(picture.get_attribute("alt"))
    dialog.get_by_role("button", name="Next picture").click()
    alts.append(picture.get_attribute("alt"))
    page.keyboard.press("Escape")

    assert size == [384, 512]
    first, second = caption.split("\n")
    assert first == "a volcano under the stars, no. 9"
    assert re.fullmatch(
        f"10 of {COUNT - 24} · 384\u00d7512 · \\$0.07 · [\\d.]+ s · seed 1009 · a-volcano-under-the-stars-no-9-\\w{{8}}",
        second,
    )
    assert alts == [
        "camels in the dunes, no. 10",
        "cherry blossoms by the river, no. 12",
        "camels in the dunes, no. 10",
        "a lighthouse at dawn, no. 0",
        "many words " * 80,
        "a lighthouse at dawn, no. 0",
    ]
    expect(dialog).to_be_hidden()
    assert page.evaluate("document.activeElement.querySelector('img').alt") == "a lighthouse at dawn, no. 0"


def test_keyboard_navigation(page: Page) -> None:
    """The filter (/), the grid (arrow keys) and the pictures (Enter) can be used without a mouse."""
    page.keyboard.press("/")
    page.keyboard.type("lighthouse")
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    alts = []
    lefts = []
    for key in ("", "ArrowRight", "ArrowDown", "ArrowDown", "ArrowUp", "ArrowUp", "ArrowLeft"):
        if key:
            page.keyboard.press(key)
        alts.append(page.evaluate("document.activeElement.querySelector('img').alt"))
        lefts.append(page.evaluate("document.activeElement.getBoundingClientRect().left"))
    page.keyboard.press("Enter")

    assert alts[0] == alts[6] == "a lighthouse at dawn, no. 0"
    assert alts[1] == alts[5] == "a lighthouse at dawn, no. 7"
    assert alts[2] == alts[4] != alts[3]
    assert lefts[1] == lefts[2] == lefts[3] > lefts[0]
    expect(page.get_by_role("dialog")).to_contain_text("a lighthouse at dawn, no. 0")
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog")).to_be_hidden()


def test_untrusted_text(page: Page, folder: Path) -> None:
    """Prompts are escaped, and file names are quoted."""
    page.get_by_label("Filter").fill("onerror")
    card = page.locator("#cards > li:visible")
    picture = card.get_by_role("img")
    picture.scroll_into_view_if_needed()
    picture.evaluate("image => image.decode()")

    expect(card.locator(".prompt")).to_have_text(HTML_PROMPT)
    assert picture.get_attribute("alt") == HTML_PROMPT
    assert page.title().startswith("pictures")
    (file,) = folder.glob("50*")
    assert card.get_by_role("link").get_attribute("href") == quote(file.name)


def test_running_batch(browser: Browser, folder: Path, tmp_path: Path) -> None:
    """The page of a running batch reloads itself, unless the visitor is typing or has a picture open.

    The filter and the focus are kept. A page that is no longer rewritten reloads less often.
    """
    text = (folder / "index.html").read_text(encoding="utf-8")
    copy = tmp_path / "index.html"

    def write(animal: str, modified: int = 1000) -> None:
        new = text.replace("a fox in", f"a {animal} (or fox) in").replace("<body>", f'<body data-running="{modified}">')
        copy.write_text(new, encoding="utf-8")

    with browser.new_page() as page:

        def reloaded_after(seconds: int) -> bool:
            """Return whether the page has reloaded itself after some seconds."""
            page.evaluate("window.old = true")
            page.clock.fast_forward(seconds * 1000)
            page.wait_for_timeout(300)
            return not page.evaluate("window.old")

        page.clock.install(time=datetime.fromtimestamp(1000, UTC))
        write("wolf")
        page.goto(copy.as_uri())
        page.get_by_label("Filter").fill("fox")
        write("vixen")
        page.clock.fast_forward(9000)
        page.keyboard.press("End")
        reloaded_while_typing, reloaded_when_idle = reloaded_after(2), reloaded_after(10)
        filter_text, first = page.get_by_label("Filter").input_value(), visible_prompts(page)[0]
        focused = page.evaluate("document.activeElement.id")
        page.locator("#cards a:visible").nth(2).click()
        write("lion")
        reloaded_while_open = reloaded_after(30)
        page.keyboard.press("Escape")
        focused_before = page.evaluate("document.activeElement.querySelector('img').alt")
        write("tiger", modified=1)
        reloaded_when_closed = reloaded_after(11)
        focused_after = page.evaluate("document.activeElement.querySelector('img').alt")
        reloaded_when_stale = reloaded_after(30), reloaded_after(60)

    assert (reloaded_while_typing, reloaded_when_idle) == (False, True)
    assert filter_text == "fox"
    assert "vixen" in first
    assert focused == "filter"
    assert (reloaded_while_open, reloaded_when_closed) == (False, True)
    assert focused_after == focused_before.replace("vixen", "tiger")
    assert reloaded_when_stale == (False, True)


def test_accessible_names(page: Page) -> None:
    """Controls have names, pictures have their prompts as alternative texts, and the list has a label."""
    expect(page.get_by_role("list", name="Pictures").get_by_role("listitem")).to_have_count(COUNT)
    expect(page.get_by_role("searchbox", name="Filter")).to_be_visible()
    expect(page.get_by_role("combobox", name="Sort by")).to_be_visible()
    expect(page.get_by_role("link", name="a lighthouse at dawn, no. 0", exact=True)).to_have_count(1)
    page.get_by_role("link", name="a lighthouse at dawn, no. 0", exact=True).click()
    for name in ("Previous picture", "Next picture", "Close"):
        expect(page.get_by_role("button", name=name)).to_be_visible()
    page.get_by_role("button", name="Close").click()
    expect(page.get_by_role("dialog")).to_be_hidden()
