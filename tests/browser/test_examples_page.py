"""The page of the example applications in a real browser, from the prompt to the picture.

Run these tests with `nox -s browser`. Set FLUX2MAX_SCREENSHOTS to a folder to keep the screenshots.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect
from support.apps import NAMES, App, new_address, running_app
from support.browser import find_barriers, running_browser, take_screenshots

from flux2max_async.emulator import Emulator

# Records each value of the progress bar in `window.progressValues`.
RECORD_PROGRESS = """() => {
    const bar = document.querySelector("progress");
    window.progressValues = [];
    new MutationObserver(() => progressValues.push(bar.value)).observe(bar, {attributes: true, attributeFilter: ["value"]});
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Provide the system's browser."""
    with running_browser() as browser:
        yield browser


@pytest.fixture(scope="module", params=NAMES)
def app(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[App]:
    """Run each of the examples with a service whose tasks take 2 s."""
    with (
        Emulator(seconds=2.0, spread=0.0, seed=1) as gateway,
        running_app(request.param, gateway, tmp_path_factory.mktemp(request.param)) as running,
    ):
        yield running


@pytest.fixture
def page(browser: Browser, app: App) -> Iterator[Page]:
    """Open the page; fail on any script error."""
    with browser.new_page() as page:
        errors: list[str] = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.set_default_timeout(10_000)
        page.goto(app.url)
        yield page
        # Chromium logs every response with an error status.
        assert [error for error in errors if not re.search("status of (422|404)", error)] == []


@pytest.fixture
def shots(app: App, tmp_path: Path) -> Path:
    """Return the folder for screenshots."""
    name = app.log.parent.name.rstrip("0123456789")
    return Path(os.environ.get("FLUX2MAX_SCREENSHOTS", tmp_path)) / name


def test_prompt_to_picture(page: Page, app: App, shots: Path) -> None:
    """A visitor enters a prompt, sees the progress, and then the picture in the requested size."""
    prompt = "a lighthouse at dawn, <b>watercolour</b>"
    take_screenshots(page, shots, "1-empty")
    page.evaluate(RECORD_PROGRESS)
    page.get_by_label("Prompt").fill(prompt)
    page.get_by_label("Shape").select_option("Portrait")
    page.get_by_role("button", name="Draw").click()
    expect(page.get_by_role("progressbar")).to_be_visible()
    expect(page.get_by_role("status")).to_contain_text("%")
    expect(page.get_by_role("button", name="Draw")).to_be_disabled()
    take_screenshots(page, shots, "2-drawing")
    picture = page.get_by_role("img", name=prompt, exact=True)
    picture.wait_for(state="visible")
    size = picture.evaluate("image => [image.naturalWidth, image.naturalHeight]")
    take_screenshots(page, shots, "3-done")
    values = {value for value in page.evaluate("progressValues") if 0 < value < 1}

    assert size == [768, 1024]
    assert len(values) >= 2
    expect(page.get_by_role("status")).to_have_text("Done.")
    expect(page.get_by_role("progressbar")).to_be_hidden()
    expect(page.get_by_role("button", name="Draw")).to_be_enabled()
    expect(page.get_by_role("figure")).to_contain_text(prompt)
    assert app.gateway.accepted[prompt] == 1
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


def test_place_in_the_queue(page: Page, app: App, shots: Path) -> None:
    """A visitor who has to wait sees the place in the queue and how long it takes, and then the picture."""
    app.get(f"tasks/{app.submit('how long it takes', width=64, height=64)}/picture")
    for number in range(40):
        app.submit_as(new_address(), {"prompt": f"before {number}", "width": 64, "height": 64})
    page.get_by_label("Prompt").fill("a heron")
    page.get_by_role("button", name="Draw").click()
    expect(page.get_by_role("status")).to_have_text(re.compile(r"Number \d+ in the queue, about \d+ s …"))
    take_screenshots(page, shots, "4-waiting")
    page.get_by_role("img", name="a heron").wait_for(state="visible")

    assert app.gateway.accepted["a heron"] == 1


def test_moderated_prompt(page: Page, shots: Path) -> None:
    """A visitor whose prompt is refused sees the reason, and can submit another one."""
    page.get_by_label("Prompt").fill("something indecent [moderate]")
    page.get_by_role("button", name="Draw").click()
    expect(page.get_by_role("status")).to_have_text("Moderation refused this prompt. Try another one.")
    take_screenshots(page, shots, "5-refused")
    picture_hidden = page.get_by_role("figure").is_hidden()
    page.get_by_label("Prompt").fill("something decent")
    page.get_by_role("button", name="Draw").click()
    page.get_by_role("img", name="something decent").wait_for(state="visible")

    assert picture_hidden
    expect(page.get_by_role("status")).to_have_text("Done.")


def test_blank_prompt(page: Page) -> None:
    """A blank prompt, which the browser accepts and the library refuses, is marked as invalid with the reason."""
    page.get_by_label("Prompt").fill("   ")
    page.get_by_role("button", name="Draw").click()

    expect(page.get_by_role("status")).to_have_text("prompt must not be blank")
    expect(page.get_by_label("Prompt")).to_have_attribute("aria-invalid", "true")
    expect(page.get_by_role("button", name="Draw")).to_be_enabled()


def test_reload_keeps_the_picture(browser: Browser, page: Page, app: App) -> None:
    """A reload goes on with a picture that is being drawn, and shows one that is done; neither is paid for again."""
    page.get_by_label("Prompt").fill("a kingfisher")
    page.get_by_label("Prompt").press("Enter")
    expect(page.get_by_role("status")).to_contain_text("%")
    address = page.url
    page.reload()
    picture = page.get_by_role("img", name="a kingfisher", exact=True)
    picture.wait_for(state="visible")
    page.reload()
    picture.wait_for(state="visible")
    reloaded = page.url
    with browser.new_page() as other:
        other.goto(address)
        other.get_by_role("img", name="The picture").wait_for(state="visible")

    assert address == reloaded
    assert re.fullmatch(r"#[\w-]{22}", address.removeprefix(app.url + "/"))
    expect(page.get_by_role("status")).to_have_text("Done.")
    expect(page.get_by_label("Prompt")).to_have_value("a kingfisher")
    assert app.gateway.accepted["a kingfisher"] == 1


def test_enter_submits(page: Page, app: App) -> None:
    """Enter submits the prompt once, Shift+Enter begins a new line, and Enter in an empty field does nothing."""
    field = page.get_by_label("Prompt")
    field.press("Enter")
    field.press_sequentially("a wren")
    field.press("Shift+Enter")
    field.press_sequentially("in the snow")
    for _ in range(3):
        field.press("Enter")
    page.get_by_role("figure").wait_for(state="visible")

    assert field.input_value() == "a wren\nin the snow"
    assert app.gateway.accepted["a wren\nin the snow"] == 1
    assert "" not in app.gateway.accepted


def test_picture_is_no_longer_there(page: Page, app: App) -> None:
    """The address of a picture that the server doesn't have says so, and one that has failed isn't kept."""
    page.goto(f"{app.url}/#unknown-id")
    page.reload()
    expect(page.get_by_role("status")).to_have_text("The server no longer has this picture. Try again.")
    page.get_by_label("Prompt").fill("a wolf [moderate]")
    page.get_by_label("Prompt").press("Enter")
    expect(page.get_by_role("status")).to_contain_text("Moderation refused this prompt.")

    assert page.url == f"{app.url}/"


def test_barriers(page: Page) -> None:
    """axe-core finds no serious barrier before, while and after a picture is drawn."""
    barriers = find_barriers(page)
    page.get_by_label("Prompt").fill("a stork")
    page.get_by_label("Prompt").press("Enter")
    expect(page.get_by_role("progressbar")).to_be_visible()
    barriers += find_barriers(page)
    page.get_by_role("img", name="a stork").wait_for(state="visible")

    assert barriers + find_barriers(page) == []
