"""The gallery of a batch in a real browser, from its file: 300 pictures, looked at, sifted, sorted and opened.

A session of its own runs these: `nox -s browser`. FLUX2MAX_SCREENSHOTS names a folder to keep what was seen.
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
from support.browser import running_browser, shoot

from flux2max_async.emulator import Emulator

COUNT = 300
SUBJECTS = [
    *("a lighthouse at dawn", "a fox in the autumn forest", "a volcano under the stars", "camels in the dunes"),
    *("a city on a rainy night", "cherry blossoms by the river", "a yacht on a windy morning"),
]
NASTY = '<img src=x onerror="document.title=1"> & "quotes" </script><script>document.title=2</script>'
SIZES = [(512, 384), (384, 512), (512, 512), (768, 320)]


def wishes() -> list[dict[str, object]]:
    """Give the lines of the sheet; every twelfth fails, and the last ones are odd."""
    lines: list[dict[str, object]] = []
    for number in range(COUNT - 2):
        width, height = SIZES[number % len(SIZES)]
        prompt = f"{SUBJECTS[number % len(SUBJECTS)]}, no. {number}"
        if number % 12 == 11:
            prompt += " [moderate]" if number % 24 == 23 else " [fail]"
        lines.append({"prompt": prompt, "seed": 1000 + number, "width": width, "height": height})
    lines.append({"prompt": NASTY, "width": 256, "height": 256, "key": "50% #1?"})
    lines.append({"prompt": "many words " * 80, "width": 256, "height": 256})
    return lines


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """The system's own."""
    with running_browser() as one:
        yield one


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a batch that has been run."""
    place = tmp_path_factory.mktemp("gallery")
    (place / "wishes.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in wishes()), encoding="utf-8")
    with Emulator(seconds=0.2, spread=0.2, seed=1, max_in_flight=60) as gateway:
        done = subprocess.run(
            [
                *(sys.executable, "-m", "flux2max_async.cli", "batch", "wishes.jsonl", "--out", "pictures"),
                *("--max-in-flight", "60", "--budget", "25"),
            ],
            cwd=place,
            env={**os.environ, "FLUX2MAX_API_KEY": gateway.api_key, "FLUX2MAX_BASE_URL": gateway.url},
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 1, done.stderr
    return place / "pictures"


@pytest.fixture
def page(browser: Browser, folder: Path) -> Iterator[Page]:
    """The page, as it is opened from the disk; no script of it may fail, and nothing may be asked of a network."""
    with browser.new_page(viewport={"width": 1280, "height": 860}) as page:
        errors: list[str] = []
        asked: list[str] = []

        def check(route: Route) -> None:
            if not route.request.url.startswith(("file:", "data:")):
                asked.append(route.request.url)
            route.continue_()

        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.route("**/*", check)
        page.set_default_timeout(10_000)
        page.goto((folder / "index.html").as_uri())
        yield page
        assert errors == []
        assert asked == []


@pytest.fixture
def shots(tmp_path: Path) -> Path:
    """Where the screenshots go."""
    return Path(os.environ.get("FLUX2MAX_SCREENSHOTS", tmp_path)) / "gallery"


def shown(page: Page) -> list[str]:
    """Give the prompts of what is shown, in order."""
    return [text.strip() for text in page.locator("#cards > li:visible .prompt").all_inner_texts()]


def test_all_is_shown(page: Page, folder: Path, shots: Path) -> None:
    """Each request has a place in order, with its prompt, seed, size, cost and state, or the reason why there is none."""
    shoot(page, shots, "1-all", whole=False)
    cards = page.locator("#cards > li")
    first, failed = cards.nth(0), cards.nth(11)

    expect(cards).to_have_count(COUNT)
    assert [prompt.split(",")[0] for prompt in shown(page)[:7]] == SUBJECTS
    expect(first).to_contain_text("completed")
    expect(first).to_contain_text("512\u00d7384")
    expect(first).to_contain_text("$0.07")
    expect(first).to_contain_text("1000")
    expect(failed).to_contain_text("the model gave up")
    expect(failed.get_by_role("img")).to_have_count(0)
    expect(page.get_by_role("banner")).to_contain_text("276 completed, 24 failed. $19.32 spent.")
    assert page.title() == f"pictures ({COUNT - 24})"
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    assert (folder / "thumbs").stat().st_size < 1_000_000


def test_pictures_are_loaded_when_they_are_needed(page: Page) -> None:
    """Small copies come as they come into view, and are small; what is below is left until then."""
    page.locator("#cards img").first.evaluate("image => image.decode()")
    loaded = page.evaluate(
        "[...document.images].filter((image) => image.src && image.complete && image.naturalWidth).length"
    )
    page.locator("#cards img").last.scroll_into_view_if_needed()
    page.wait_for_function("[...document.querySelectorAll('#cards img')].at(-1).naturalWidth > 0")
    sides = page.evaluate(
        "[...document.querySelectorAll('#cards img')].filter((image) => image.naturalWidth)"
        ".map((image) => Math.max(image.naturalWidth, image.naturalHeight))"
    )

    assert 0 < loaded < 100
    assert max(sides) <= 360


def test_sifting_and_sorting(page: Page, shots: Path) -> None:
    """What is typed sifts by prompt, seed and state; sorting brings what went wrong to the front; a reload keeps both."""
    box = page.get_by_label("Filter")
    box.fill("fox failed")
    foxes = shown(page)
    told = page.get_by_role("status").inner_text()
    shoot(page, shots, "2-sifted", whole=False)
    page.reload()
    again = shown(page)
    box.fill("1007")
    seed = shown(page)
    box.fill("zebra")
    nothing = page.get_by_text("No picture matches this filter.").is_visible()
    box.fill("")
    page.get_by_label("Sort by").select_option("state")
    page.reload()
    sorted_states = page.locator("#cards .state dd").all_text_contents()
    page.get_by_label("Sort by").select_option("order")

    assert foxes
    assert all("fox" in prompt and ("[fail]" in prompt or "[moderate]" in prompt) for prompt in foxes)
    assert told == f"{len(foxes)} of {COUNT} shown"
    assert again == foxes
    assert seed == ["a lighthouse at dawn, no. 7"]
    assert nothing
    assert sorted_states == ["failed"] * 24 + ["completed"] * (COUNT - 24)
    assert shown(page)[0] == "a lighthouse at dawn, no. 0"


def test_the_full_picture(page: Page, shots: Path) -> None:
    """A click shows the picture itself; arrows go on and back, over what failed too; Escape comes back to the place."""
    page.locator("#cards a").nth(9).click()
    dialog = page.get_by_role("dialog")
    picture = dialog.get_by_role("img")
    picture.evaluate("image => image.decode()")
    size = picture.evaluate("image => [image.naturalWidth, image.naturalHeight]")
    said = dialog.get_by_role("paragraph").inner_text()
    shoot(page, shots, "3-full", whole=False)
    names = []
    for key in ("ArrowRight", "ArrowRight", "ArrowLeft", "Home", "ArrowLeft"):
        page.keyboard.press(key)
        names.append(picture.get_attribute("alt"))
    dialog.get_by_role("button", name="Next picture").click()
    names.append(picture.get_attribute("alt"))
    page.keyboard.press("Escape")

    assert size == [384, 512]
    first, second = said.split("\n")
    assert first == "a volcano under the stars, no. 9"
    assert re.fullmatch(
        f"10 of {COUNT - 24} · completed · 384\u00d7512 · \\$0.07 · seed 1009 · a-volcano-under-the-stars-no-9-\\w{{8}}",
        second,
    )
    assert names == [
        "camels in the dunes, no. 10",
        "cherry blossoms by the river, no. 12",
        "camels in the dunes, no. 10",
        "a lighthouse at dawn, no. 0",
        "many words " * 80,
        "a lighthouse at dawn, no. 0",
    ]
    expect(dialog).to_be_hidden()
    assert page.evaluate("document.activeElement.querySelector('img').alt") == "a lighthouse at dawn, no. 0"


def test_by_keyboard_alone(page: Page) -> None:
    """From the address bar to a picture without a mouse: / for the filter, arrows through the grid, Enter to open."""
    page.keyboard.press("/")
    page.keyboard.type("lighthouse")
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    names = []
    places = []
    for key in ("", "ArrowRight", "ArrowDown", "ArrowDown", "ArrowUp", "ArrowUp", "ArrowLeft"):
        if key:
            page.keyboard.press(key)
        names.append(page.evaluate("document.activeElement.querySelector('img').alt"))
        places.append(page.evaluate("document.activeElement.getBoundingClientRect().left"))
    page.keyboard.press("Enter")

    assert names[0] == names[6] == "a lighthouse at dawn, no. 0"
    assert names[1] == names[5] == "a lighthouse at dawn, no. 7"
    assert names[2] == names[4] != names[3]
    assert places[1] == places[2] == places[3] > places[0]
    expect(page.get_by_role("dialog")).to_contain_text("a lighthouse at dawn, no. 0")
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog")).to_be_hidden()


def test_what_others_have_written(page: Page, folder: Path) -> None:
    """A prompt is text, whatever it holds; a file may be called what it likes."""
    page.get_by_label("Filter").fill("onerror")
    card = page.locator("#cards > li:visible")
    picture = card.get_by_role("img")
    picture.scroll_into_view_if_needed()
    picture.evaluate("image => image.decode()")

    expect(card.locator(".prompt")).to_have_text(NASTY)
    assert picture.get_attribute("alt") == NASTY
    assert page.title().startswith("pictures")
    (file,) = folder.glob("50*")
    assert card.get_by_role("link").get_attribute("href") == quote(file.name)


def test_a_page_that_isnt_finished(browser: Browser, folder: Path, tmp_path: Path) -> None:
    """While more is to come, the page looks for it by itself, unless somebody is in the middle of something.

    What was typed stays, and so does the focus. A page that nobody makes anew any more is looked at less often.
    """
    text = (folder / "index.html").read_text(encoding="utf-8")
    copy = tmp_path / "index.html"

    def write(animal: str, made: int = 1000) -> None:
        new = text.replace("a fox in", f"a {animal} (or fox) in").replace("<body>", f'<body data-running="{made}">')
        copy.write_text(new, encoding="utf-8")

    with browser.new_page() as page:

        def after(seconds: int) -> bool:
            """Tell whether the page has been loaded again some time later."""
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
        typing, idle = after(2), after(10)
        typed, first = page.get_by_label("Filter").input_value(), shown(page)[0]
        focused = page.evaluate("document.activeElement.id")
        page.locator("#cards a:visible").nth(2).click()
        write("lion")
        large = after(30)
        page.keyboard.press("Escape")
        place = page.evaluate("document.activeElement.querySelector('img').alt")
        write("tiger", made=1)
        small = after(11)
        same = page.evaluate("document.activeElement.querySelector('img').alt")
        died = after(30), after(60)

    assert (typing, idle) == (False, True)
    assert typed == "fox"
    assert "vixen" in first
    assert focused == "filter"
    assert (large, small) == (False, True)
    assert same == place.replace("vixen", "tiger")
    assert died == (False, True)


def test_a_reader_of_screens(page: Page) -> None:
    """Controls have names, pictures have the prompts as their texts, and the list says what it is."""
    expect(page.get_by_role("list", name="Pictures").get_by_role("listitem")).to_have_count(COUNT)
    expect(page.get_by_role("searchbox", name="Filter")).to_be_visible()
    expect(page.get_by_role("combobox", name="Sort by")).to_be_visible()
    expect(page.get_by_role("link", name="a lighthouse at dawn, no. 0", exact=True)).to_have_count(1)
    page.get_by_role("link", name="a lighthouse at dawn, no. 0", exact=True).click()
    for name in ("Previous picture", "Next picture", "Close"):
        expect(page.get_by_role("button", name=name)).to_be_visible()
    page.get_by_role("button", name="Close").click()
    expect(page.get_by_role("dialog")).to_be_hidden()
