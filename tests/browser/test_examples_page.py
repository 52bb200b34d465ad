"""The examples' page in a real browser: what a visitor sees, from the prompt to the picture.

A session of its own runs these: `nox -s browser`. FLUX2MAX_SCREENSHOTS names a folder to keep what was seen.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect
from support.apps import NAMES, App, running_app
from support.browser import running_browser, shoot

from flux2max_async.emulator import Emulator

# What the bar shows, each time it changes.
WATCH = """() => {
    const bar = document.querySelector("progress");
    window.seen = [];
    new MutationObserver(() => seen.push(bar.value)).observe(bar, {attributes: true, attributeFilter: ["value"]});
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """The system's own."""
    with running_browser() as one:
        yield one


@pytest.fixture(scope="module", params=NAMES)
def app(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[App]:
    """Each of the examples, on a service whose tasks take 2 s."""
    with (
        Emulator(seconds=2.0, spread=0.0, seed=1) as gateway,
        running_app(request.param, gateway, tmp_path_factory.mktemp(request.param)) as running,
    ):
        yield running


@pytest.fixture
def page(browser: Browser, app: App) -> Iterator[Page]:
    """The page, of which no script may fail."""
    with browser.new_page() as page:
        errors: list[str] = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.set_default_timeout(10_000)
        page.goto(app.url)
        yield page
        # The browser itself remarks on each answer with an error's status.
        assert [error for error in errors if "status of 422" not in error] == []


@pytest.fixture
def shots(app: App, tmp_path: Path) -> Path:
    """Where the screenshots go."""
    name = app.log.parent.name.rstrip("0123456789")
    return Path(os.environ.get("FLUX2MAX_SCREENSHOTS", tmp_path)) / name


def test_a_prompt_becomes_a_picture(page: Page, app: App, shots: Path) -> None:
    """A visitor types a prompt, sees it being drawn, and then the picture, in the size that was asked for."""
    prompt = "a lighthouse at dawn, <b>watercolour</b>"
    shoot(page, shots, "1-empty")
    page.evaluate(WATCH)
    page.get_by_label("Prompt").fill(prompt)
    page.get_by_label("Shape").select_option("Portrait")
    page.get_by_role("button", name="Draw").click()
    expect(page.get_by_role("progressbar")).to_be_visible()
    expect(page.get_by_role("status")).to_contain_text("%")
    expect(page.get_by_role("button", name="Draw")).to_be_disabled()
    shoot(page, shots, "2-drawing")
    picture = page.get_by_role("img", name=prompt, exact=True)
    picture.wait_for(state="visible")
    size = picture.evaluate("image => [image.naturalWidth, image.naturalHeight]")
    shoot(page, shots, "3-done")
    seen = {value for value in page.evaluate("seen") if 0 < value < 1}

    assert size == [768, 1024]
    assert len(seen) >= 2
    expect(page.get_by_role("status")).to_have_text("Done.")
    expect(page.get_by_role("progressbar")).to_be_hidden()
    expect(page.get_by_role("button", name="Draw")).to_be_enabled()
    expect(page.get_by_role("figure")).to_contain_text(prompt)
    assert app.gateway.accepted[prompt] == 1
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


def test_a_prompt_that_moderation_refuses(page: Page, shots: Path) -> None:
    """A visitor whose prompt is refused reads why, and can try another one, which works."""
    page.get_by_label("Prompt").fill("something unseemly [moderate]")
    page.get_by_role("button", name="Draw").click()
    expect(page.get_by_role("status")).to_have_text("Moderation refused this prompt. Try another one.")
    shoot(page, shots, "4-refused")
    picture_hidden = page.get_by_role("figure").is_hidden()
    page.get_by_label("Prompt").fill("something seemly")
    page.get_by_role("button", name="Draw").click()
    page.get_by_role("img", name="something seemly").wait_for(state="visible")

    assert picture_hidden
    expect(page.get_by_role("status")).to_have_text("Done.")


def test_a_prompt_that_is_blank(page: Page) -> None:
    """What the browser lets pass and the library doesn't is marked where it is, and said."""
    page.get_by_label("Prompt").fill("   ")
    page.get_by_role("button", name="Draw").click()

    expect(page.get_by_role("status")).to_have_text("prompt must not be blank")
    expect(page.get_by_label("Prompt")).to_have_attribute("aria-invalid", "true")
    expect(page.get_by_role("button", name="Draw")).to_be_enabled()
