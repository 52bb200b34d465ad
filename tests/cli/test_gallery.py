"""The gallery's file: small copies of whatever the service may send, and a place for each picture."""

import logging
import re
import sys
from decimal import Decimal
from pathlib import Path

import pytest
from PIL import Image

from flux2max_async import FluxSession, LearnedSchedule
from flux2max_async.cli._gallery import Gallery
from flux2max_async.cli._output_dir import OutputDir, Row
from flux2max_async.cli._plan import make_plan
from flux2max_async.cli._progress import ProgressDisplay, format_duration
from flux2max_async.cli._runner import Batch, DisplayLogHandler, _write_outputs
from flux2max_async.cli._terminal import Terminal, attach_log_handler
from flux2max_async.journal._lookup import ReusePolicy


def text_of(folder: Path, *rows: Row, running: bool = False) -> str:
    Gallery(folder).write(rows, running=running)
    return (folder / "index.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "mode", "colour", "seen"),
    [
        ("a.jpeg", "RGB", "red", (254, 0, 0)),
        ("a.jpeg", "L", 128, (128, 128, 128)),
        ("a.png", "RGBA", (255, 0, 0, 0), (255, 255, 255)),
        ("a.png", "LA", (0, 255), (0, 0, 0)),
        ("a.png", "P", 0, (0, 0, 0)),
        ("a.png", "I;16", 0, (0, 0, 0)),
        ("a.webp", "RGB", "blue", (0, 0, 254)),
    ],
)
def test_small_copies(
    tmp_path: Path, name: str, mode: str, colour: str | int | tuple[int, ...], seen: tuple[int, int, int]
) -> None:
    """Whatever a picture is, its small copy is a JPEG of 360 pixels; what is transparent lies on white."""
    Image.new(mode, (720, 480), colour).save(tmp_path / name)
    page = text_of(tmp_path, Row("a", "a", state="completed", files=[name]))

    assert f'src="thumbs/{name}.jpeg"' in page
    assert "720\u00d7480" in page
    with Image.open(tmp_path / "thumbs" / f"{name}.jpeg") as small:
        assert (small.format, small.mode, small.size) == ("JPEG", "RGB", (360, 240))
        found = small.getpixel((100, 100))
    assert found == pytest.approx(seen, abs=3)


def test_small_copies_are_made_once(tmp_path: Path) -> None:
    """A copy that is there is left as it is, unless the picture is newer."""
    picture, small = tmp_path / "a.png", tmp_path / "thumbs" / "a.png.jpeg"
    Image.new("RGB", (8, 8)).save(picture)
    row = Row("a", "a", state="completed", files=["a.png"])
    text_of(tmp_path, row)
    small.write_bytes(b"as it was")
    text_of(tmp_path, row)
    kept = small.read_bytes()
    small.unlink()
    text_of(tmp_path, row)
    again = small.read_bytes()

    assert kept == b"as it was"
    assert again.startswith(b"\xff\xd8")


def test_small_copies_can_wait(tmp_path: Path) -> None:
    """Whoever leaves at once doesn't wait for small copies: the pictures themselves stand in their places."""
    Image.new("RGB", (8, 6)).save(tmp_path / "a.png")
    Gallery(tmp_path, skip_thumbnails=True).write([Row("a", "a", state="completed", files=["a.png"])], running=False)
    page = (tmp_path / "index.html").read_text(encoding="utf-8")

    assert 'src="a.png"' in page
    assert "8\u00d76" in page
    assert not (tmp_path / "thumbs").exists()


def test_a_picture_that_cannot_be_read(tmp_path: Path) -> None:
    """A picture that is damaged, or gone, is shown as it is, and keeps no other from being shown."""
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n and then nothing")
    page = text_of(tmp_path, Row("a", "a", state="completed", files=["a.png", "gone.png"]))

    assert 'src="a.png"' in page
    assert 'src="gone.png"' in page
    assert "1 of 2" in page
    assert "2 of 2" in page


@pytest.mark.parametrize(
    ("state", "error", "shown", "reason"),
    [
        ("waiting", None, "waiting", "not there yet"),
        ("submitted", None, "running", "not there yet"),
        ("intent", None, "running", "not there yet"),
        ("failed", "<b>why</b>", "failed", "&lt;b&gt;why&lt;/b&gt;"),
        ("uncertain", "lost", "uncertain", "lost"),
        ("refused", "no", "refused", "no"),
        ("completed", "expired", "completed", "expired"),
        ("completed", None, "completed", "no file"),
        ("of a newer version", None, "of a newer version", "no file"),
    ],
)
def test_what_is_not_there(tmp_path: Path, state: str, error: str | None, shown: str, reason: str) -> None:
    """In the place of a picture that isn't there stands why, and what was asked for."""
    page = text_of(tmp_path, Row("a", "a cat", {"width": 640}, state=state, error=error), running=state == "waiting")

    assert f'<p class="reason" dir="auto">{reason}</p>' in page
    assert f"<dd>{shown}</dd>" in page
    assert "640\u00d7any" in page
    assert ("<body data-running=" in page) is (state == "waiting")


def test_a_picture_in_trouble(tmp_path: Path) -> None:
    """What is wrong with a picture that is there stands under it; costs are summed up."""
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    row = Row("a", "a", state="completed", files=["a.png"], error="only one of two", cost=Decimal("0.07"))
    page = text_of(tmp_path, row, Row("b", "b", state="completed", cost=Decimal("0.1")))

    assert '<p class="trouble" dir="auto">only one of two</p>' in page
    assert "$0.17 spent." in page


def test_nothing_yet(tmp_path: Path) -> None:
    """A page of nothing says so."""
    assert re.search(r"<p>nothing yet\.\s*</p>", text_of(tmp_path))


async def test_a_journal_that_breaks_while_a_batch_runs(tmp_path: Path) -> None:
    """Where the journal can't be read any more, the page stays as it is, and why is told."""
    folder = OutputDir(tmp_path)
    folder.journal_path.write_bytes(b"SQLite format 3\0 and then nothing" * 40)
    batch = Batch(
        folder=folder,
        plan=make_plan([], [], ReusePolicy(), None),
        session=FluxSession("key"),
        schedule=LearnedSchedule(),
        max_in_flight=1,
        budget=None,
        as_json=False,
    )
    trouble = await _write_outputs(batch, Gallery(tmp_path))

    assert trouble is not None
    assert trouble.startswith(f"the journal {folder.journal_path} is damaged")
    assert not (tmp_path / "index.html").exists()


def test_what_is_logged(capsys: pytest.CaptureFixture[str]) -> None:
    """A warning stands on the board; an error is said aloud, too."""
    schedule = LearnedSchedule()
    display = ProgressDisplay(1, FluxSession("key"), schedule, 1, Terminal(sys.stderr))
    log = logging.getLogger("flux2max_async")
    with attach_log_handler(DisplayLogHandler(display)):
        log.warning("submit not accepted")
        first = display.log_message
        log.error("the journal's disk\nis full")

    assert first == "submit not accepted"
    assert display.log_message == "the journal's disk is full"
    assert capsys.readouterr().err == "flux2max: the journal's disk is full\n"


@pytest.mark.parametrize(("seconds", "written"), [(0, "0:00"), (59.6, "1:00"), (754, "12:34"), (3661, "1:01:01")])
def test_durations(seconds: float, written: str) -> None:
    """Minutes and seconds, and hours where there are any."""
    assert format_duration(seconds) == written
