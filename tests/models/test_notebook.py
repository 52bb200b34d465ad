"""What notebooks and terminals show: short, escaped, and without the bytes of pictures."""

import base64
import os
import sys
from decimal import Decimal
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.responses import picture

from flux2max_async import (
    Completed,
    Failed,
    FluxError,
    GeneratedImage,
    GenerationRequest,
    SessionStats,
    TaskFailedError,
    TaskSnapshot,
    TaskStatus,
    Usage,
)
from flux2max_async._models.results import NO_URL

PNG = picture()
URL = "https://a.example/0.png?a=1&b=<2>"
IMAGE = GeneratedImage(url=URL, type="image", task_id="t1")
COMPLETED = Completed(
    task_id="t1",
    request=GenerationRequest("a lighthouse"),
    images=(IMAGE,),
    usage=Usage(cost=Decimal("0.07")),
    elapsed=8.25,
    polls=3,
)


class Page(HTMLParser):
    """The tags, sources and text of a page, as a browser reads them."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.pictures: list[dict[str, str | None]] = []
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag == "img":
            self.pictures.append(dict(attrs))

    def handle_data(self, data: str) -> None:
        self.text += data

    @property
    def sources(self) -> list[str | None]:
        return [picture["src"] for picture in self.pictures]


def shown(**changes: Any) -> Page:
    return Page(attrs.evolve(COMPLETED, **changes)._repr_html_())


# ---------------------------------------------------------------------- HTML


def test_a_picture_is_shown_with_its_prompt_cost_and_time() -> None:
    """A notebook shows the picture by its URL, above what it was, cost and took."""
    page = shown()

    assert page.tags == ["figure", "img", "figcaption"]
    assert page.sources == [URL]
    assert page.pictures[0]["alt"] == "a lighthouse"
    assert page.text == "a lighthouse · $0.07 · 8.2 s"


def test_a_task_without_request_and_cost() -> None:
    """What isn't known is left out; a task that was attached by its id alone is named by it."""
    assert shown(request=None, usage=None).text == "task t1 · 8.2 s"
    assert shown(usage=Usage()).text == "a lighthouse · 8.2 s"


def test_a_saved_picture_is_embedded(tmp_path: Path) -> None:
    """A file that was saved is in the HTML itself, so that it shows when the URL has expired."""
    path = tmp_path / "a.png"
    path.write_bytes(PNG)

    assert shown(saved=(path,)).sources == [f"data:image/png;base64,{base64.b64encode(PNG).decode()}"]


def large(folder: Path) -> Path:
    path = folder / "large.png"
    with path.open("wb") as file:
        file.write(PNG)
        file.truncate(4_000_001)
    return path


def no_picture(folder: Path) -> Path:
    path = folder / "a.html"
    path.write_text("<script>alert(1)</script>")
    return path


@pytest.mark.parametrize(
    "choose",
    [
        large,
        no_picture,
        lambda folder: folder,
        lambda folder: folder / "missing.png",
        lambda folder: folder / "null\0character.png",
    ],
    ids=["large", "no picture", "folder", "missing", "impossible"],
)
def test_a_file_that_is_not_embedded(choose: Any, tmp_path: Path) -> None:
    """What is large, no picture or not there is shown by its URL."""
    assert shown(saved=(choose(tmp_path),)).sources == [URL]


@pytest.mark.skipif(sys.platform == "win32", reason="there are no named pipes")
def test_a_pipe_is_not_opened(tmp_path: Path) -> None:
    """A name that has become a pipe since doesn't block the notebook."""
    os.mkfifo(tmp_path / "pipe.png")

    assert shown(saved=(tmp_path / "pipe.png",)).sources == [URL]


def test_if_files_are_missing_the_urls_are_shown(tmp_path: Path) -> None:
    """If not all images were saved, each is shown once, by its URL."""
    path = tmp_path / "a.png"
    path.write_bytes(PNG)
    images = (IMAGE, attrs.evolve(IMAGE, url="https://a.example/1", index=1))

    assert shown(images=images, saved=(path,)).sources == [URL, "https://a.example/1"]
    assert shown(images=images, saved=(path, path)).sources[0] == shown(saved=(path,)).sources[0]


@pytest.mark.parametrize(
    ("url", "is_shown"),
    [
        (f"data:image/png;base64,{base64.b64encode(PNG).decode()}", True),
        ("DATA:IMAGE/PNG;base64,AAAA", True),
        (f"data:image/png;base64,{'A' * 5_400_000}", False),
        ("data:text/html,<script>alert(1)</script>", False),
        ("javascript:alert(1)", False),
        ("file:///etc/passwd", False),
        (NO_URL, False),
    ],
    ids=["inline", "upper case", "large", "HTML", "script", "file", "none"],
)
def test_only_pictures_are_shown(url: str, is_shown: bool) -> None:
    """A small inline image is shown as it is; no other scheme than http(s) is followed."""
    page = shown(images=(attrs.evolve(IMAGE, url=url),))

    assert page.sources == ([url] if is_shown else [])
    assert page.text == "a lighthouse · $0.07 · 8.2 s"


TEXTS = st.text(max_size=50) | st.sampled_from(['"><script>alert(1)</script>', "' onerror='x", "</figcaption><b>"])


@settings(max_examples=50, deadline=None)
@given(TEXTS.filter(str.strip), TEXTS)
def test_everything_is_escaped(prompt: str, query: str) -> None:
    """Whatever prompts and URLs hold, the page has the same few tags, and the picture the same few attributes."""
    image = attrs.evolve(IMAGE, url=f"https://a.example/?{query}")
    page = shown(request=GenerationRequest(prompt), images=(image,), task_id=query)

    assert [tag for tag in page.tags if tag != "img"] == ["figure", "figcaption"]
    assert all(picture.keys() == {"src", "alt", "style", "referrerpolicy"} for picture in page.pictures)
    assert page.sources in ([], [image.url])


# ---------------------------------------------------------------------- reprs


LONG = "A" * 3_000_000


@pytest.mark.parametrize(
    "value",
    [
        GenerationRequest(LONG, input_images=[PNG, f"https://a.example/{LONG}"] * 4, extra={"a": LONG}, key=LONG),
        attrs.evolve(IMAGE, url=f"https://a.example/?{LONG}"),
        attrs.evolve(IMAGE, url=f"data:image/png;base64,{LONG}"),
        attrs.evolve(COMPLETED, request=GenerationRequest(LONG), metadata={"a": LONG}, saved=(Path(LONG),) * 8),
        attrs.evolve(COMPLETED, images=(attrs.evolve(IMAGE, url=f"data:image/png;base64,{LONG}"),) * 8),
        attrs.evolve(COMPLETED, save_error=FluxError(LONG), journal_error=FluxError(LONG)),
        Failed(request=GenerationRequest(LONG), error=TaskFailedError(LONG)),
        TaskSnapshot(task_id="t1", status=TaskStatus.PENDING, metadata={"a": LONG}, raw={"a": LONG}),
        SessionStats(),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_repr_is_short(value: object) -> None:
    """A repr is never a wall of text, whatever a value holds."""
    assert len(repr(value)) < 1200


def test_reprs_show_what_was_set() -> None:
    """The repr of a request and of an outcome names what is set, and leaves out the rest."""
    request = GenerationRequest("a cat", seed=0, input_images=[PNG], extra={"a": 1}, webhook_secret="hush")
    completed = attrs.evolve(COMPLETED, replayed=True, saved=(Path("a.png"),))
    failed = Failed(task_id="t1", error=FluxError("lost"), elapsed=2.0)

    assert repr(request) == (
        f"GenerationRequest('a cat', input_images=[InputImage(<{len(PNG)} bytes>)], seed=0, extra={{'a': 1}})"
    )
    assert repr(COMPLETED) == (
        "Completed(task_id='t1', prompt='a lighthouse', images=1, cost=Decimal('0.07'), elapsed=8.25, polls=3)"
    )
    assert repr(completed).endswith("polls=3, replayed=True, saved=['a.png'])")
    assert repr(failed) == "Failed(task_id='t1', error=FluxError(message='lost'), elapsed=2.0, polls=0)"
