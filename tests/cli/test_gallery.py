"""The gallery: thumbnails of all image formats, and a card for each image or request without images."""

import base64
import hashlib
import json
import logging
import os
import re
import subprocess
import sys
from decimal import Decimal
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from PIL import Image

from flux2max_async import ConfigurationError, FluxSession, LearnedSchedule
from flux2max_async.cli._gallery import Gallery
from flux2max_async.cli._output_dir import OutputDir
from flux2max_async.cli._plan import make_plan
from flux2max_async.cli._progress import ProgressDisplay, format_duration
from flux2max_async.cli._requests_file import read_requests_file
from flux2max_async.cli._rows import Row
from flux2max_async.cli._runner import Batch, DisplayLogHandler, _write_outputs
from flux2max_async.cli._terminal import Terminal, attach_log_handler
from flux2max_async.journal._lookup import ReusePolicy


def write_page(folder: Path, *rows: Row, running: bool = False) -> str:
    Gallery(folder).write(rows, running=running)
    return (folder / "index.html").read_text(encoding="utf-8")


def entries_of(page: str) -> list[dict[str, Any]]:
    """Return what a page knows about each of its cards."""
    (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    entries: list[dict[str, Any]] = json.loads(data)
    return entries


def thumbnails_of(page: str) -> list[str]:
    """Return the URLs of the thumbnails, or of the pictures that are shown instead of them."""
    return [entry["thumbnail"] for entry in entries_of(page) if "thumbnail" in entry]


@pytest.mark.parametrize(
    ("name", "mode", "color", "expected"),
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
def test_thumbnails(
    tmp_path: Path, name: str, mode: str, color: str | int | tuple[int, ...], expected: tuple[int, int, int]
) -> None:
    """The thumbnail of any image is a JPEG of 360 pixels; transparent pixels become white."""
    Image.new(mode, (720, 480), color).save(tmp_path / name)
    page = write_page(tmp_path, Row("a", "a", state="completed", files=[name]))

    assert thumbnails_of(page) == [f"thumbs/{name}.jpeg"]
    assert entries_of(page)[0]["size"] == "720\u00d7480"
    with Image.open(tmp_path / "thumbs" / f"{name}.jpeg") as thumbnail:
        assert (thumbnail.format, thumbnail.mode, thumbnail.size) == ("JPEG", "RGB", (360, 240))
        pixel = thumbnail.getpixel((100, 100))
    assert pixel == pytest.approx(expected, abs=3)


def test_thumbnails_are_created_once(tmp_path: Path) -> None:
    """An existing thumbnail is kept, and a missing one is created again."""
    thumbnail = tmp_path / "thumbs" / "a.png.jpeg"
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    row = Row("a", "a", state="completed", files=["a.png"])
    write_page(tmp_path, row)
    comment = thumbnail.read_bytes()[:200]
    thumbnail.write_bytes(comment)  # no image any more, but of the right source
    write_page(tmp_path, row)
    kept = thumbnail.read_bytes()
    thumbnail.unlink()
    write_page(tmp_path, row)
    created_again = thumbnail.read_bytes()

    assert kept == comment
    assert len(created_again) > len(kept)


def test_outdated_thumbnail(tmp_path: Path) -> None:
    """A thumbnail that is older than its image is replaced."""
    thumbnail = tmp_path / "thumbs" / "a.png.jpeg"
    thumbnail.parent.mkdir()
    thumbnail.write_bytes(b"outdated")
    os.utime(thumbnail, (0, 0))
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    write_page(tmp_path, Row("a", "a", state="completed", files=["a.png"]))

    assert thumbnail.read_bytes().startswith(b"\xff\xd8")


def test_images_are_opened_once(tmp_path: Path) -> None:
    """While a batch is running, an image that has a thumbnail is not opened for each version of the page."""
    image = tmp_path / "a.png"
    row = Row("a", "a", state="completed", files=[image.name])
    gallery = Gallery(tmp_path)
    Image.new("RGB", (8, 6)).save(image)
    gallery.write([row], running=True)
    image.unlink()
    gallery.write([row], running=True)
    page = gallery.path.read_text(encoding="utf-8")

    assert thumbnails_of(page) == ["thumbs/a.png.jpeg"]
    assert entries_of(page)[0]["size"] == "8\u00d76"


def test_skipped_thumbnails(tmp_path: Path) -> None:
    """If thumbnails are skipped, the page shows the images themselves."""
    Image.new("RGB", (8, 6)).save(tmp_path / "a.png")
    Gallery(tmp_path, skip_thumbnails=True).write([Row("a", "a", state="completed", files=["a.png"])], running=False)
    page = (tmp_path / "index.html").read_text(encoding="utf-8")

    assert thumbnails_of(page) == ["a.png"]
    assert not (tmp_path / "thumbs").exists()


def test_unreadable_images(tmp_path: Path) -> None:
    """An image that is damaged or missing is linked without a thumbnail, and the other images are still shown."""
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n truncated")
    page = write_page(tmp_path, Row("a", "a", state="completed", files=["a.png", "missing.png"]))

    assert thumbnails_of(page) == ["a.png", "missing.png"]
    assert [entry["part"] for entry in entries_of(page)] == ["1 of 2", "2 of 2"]


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"


def test_other_formats_are_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PostScript is never run, whatever its file is called, and the other images are still shown."""
    commands, folder = tmp_path / "commands", tmp_path / "pictures"
    commands.mkdir()
    folder.mkdir()
    ghostscript, log = commands / "gs", tmp_path / "log"
    ghostscript.write_text(f"#!/bin/sh\necho run >> {log}\n")
    ghostscript.chmod(0o755)
    monkeypatch.setenv("PATH", f"{commands}{os.pathsep}{os.environ['PATH']}")
    (folder / "a.jpeg").write_bytes(EPS)
    Image.new("RGB", (8, 8)).save(folder / "b.bmp")
    Image.new("RGB", (8, 8)).save(folder / "c.jpeg")
    page = write_page(folder, Row("a", "a", state="completed", files=["a.jpeg", "b.bmp", "c.jpeg"]))
    run_by_the_gallery = log.exists()
    unlimited = f"from PIL import Image; Image.open({str(folder / 'a.jpeg')!r}).load()"
    subprocess.run([sys.executable, "-c", unlimited], capture_output=True, check=False)

    assert (run_by_the_gallery, log.exists()) == (False, True)
    assert [path.name for path in (folder / "thumbs").iterdir()] == ["c.jpeg.jpeg"]
    assert thumbnails_of(page) == ["a.jpeg", "b.bmp", "thumbs/c.jpeg.jpeg"]


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [9_600, 14_000])
def test_decompression_bombs(tmp_path: Path, side: int) -> None:
    """An image above Pillow's limit is not decoded, also if Pillow would only warn; the others are still shown."""
    Image.new("1", (side, side)).save(tmp_path / "a.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "b.png")
    page = write_page(tmp_path, Row("a", "a", state="completed", files=["a.png", "b.png"]))

    assert thumbnails_of(page) == ["a.png", "thumbs/b.png.jpeg"]
    assert [path.name for path in (tmp_path / "thumbs").iterdir()] == ["b.png.jpeg"]


@pytest.mark.parametrize(
    "name",
    [
        *("../secret.png", "..", ".", "", "/etc/secret.png", "sub/secret.png", "./secret.png", "..\\secret.png"),
        *("\\\\server\\share\\secret.png", "C:\\secret.png", "C:secret.png", "a.png:stream.png", "NUL", "nul.png"),
        *("Con .jpeg", "com1.png", "LPT9.x.png", ".hidden.png", " a.png", "a", "a.", "a.png ", "a\n.png", "a\0.png"),
        *(
            "a\u202egnp.png",
            "\ud800.png",
            "a/../../secret.png",
            "http://foreign.example/a.png",
            "javascript:alert(1).x",
        ),
        *("link.png", "link-inside.png", "dangling.png"),
    ],
)
def test_foreign_files(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    """A request whose files are not plain names in the folder is shown without pictures, which is reported once."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for path in (tmp_path / "secret.png", folder / "own.png"):
        Image.new("RGB", (8, 8)).save(path)
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    (folder / "link-inside.png").symlink_to("own.png")
    (folder / "dangling.png").symlink_to(tmp_path / "nothing.png")
    gallery = Gallery(folder)
    rows = [Row(str(key), "a cat", state="completed", files=["own.png", name]) for key in range(2)]
    for _ in range(2):
        gallery.write([*rows, Row("own", "an owl", state="completed", files=["own.png"])], running=False)
    page = gallery.path.read_text(encoding="utf-8")

    assert capsys.readouterr().err == (
        "flux2max: the page doesn't show the pictures of 2 requests: their files aren't in the folder\n"
    )
    assert re.findall(r'(?:src|href)="(?!data:)([^"]+)"', page) == []
    entries = entries_of(page)
    assert [entry.get("url") for entry in entries] == [None, None, "own.png"]
    assert [entry.get("thumbnail") for entry in entries] == [None, None, "thumbs/own.png.jpeg"]
    assert [entry.get("reason") for entry in entries] == ["no file", "no file", None]
    assert {path.name for path in tmp_path.iterdir()} == {"pictures", "secret.png"}
    assert [path.name for path in (folder / "thumbs").iterdir()] == ["own.png.jpeg"]


@pytest.mark.parametrize(
    "name",
    ["a.png", "a-cat-1a2b3c4d-2.jpeg", "Katze (süß), 50@2x=+.webp", "a..b.gif", "console.png", "_nul.png", "-x.png"],
)
def test_own_files(tmp_path: Path, name: str) -> None:
    """Every name that a saved picture can have is shown."""
    Image.new("RGB", (8, 8)).save(tmp_path / name)

    assert thumbnails_of(write_page(tmp_path, Row("a", "a", state="completed", files=[name]))) == [
        f"thumbs/{quote(name)}.jpeg"
    ]


@pytest.mark.parametrize("kind", ["link", "dangling link", "device", "pipe", "folder"])
async def test_results_that_are_no_file(tmp_path: Path, kind: str) -> None:
    """Results are read from a regular file in the folder only: a link may lead out of it, and a pipe may never end."""
    output_dir = OutputDir(tmp_path / "pictures")
    output_dir.create()
    outside = tmp_path / "outside.jsonl"
    outside.write_text("{}\n")
    match kind:
        case "pipe":
            os.mkfifo(output_dir.results_path)
        case "folder":
            output_dir.results_path.mkdir()
        case _:
            target = {"link": outside, "device": Path("/dev/zero")}.get(kind, tmp_path / "missing")
            output_dir.results_path.symlink_to(target)

    with pytest.raises(ConfigurationError, match=r"results\.jsonl' is not a regular file"):
        await output_dir.open_journal()
    with pytest.raises(ConfigurationError, match=r"results\.jsonl' is not a regular file"):
        output_dir.update_rows((), ())
    assert outside.read_text() == "{}\n"


def test_thumbnails_stay_in_the_folder(tmp_path: Path) -> None:
    """A thumbnail that is a link is replaced, and nothing is written through a link to another folder."""
    folder, other = tmp_path / "pictures", tmp_path / "other"
    folder.mkdir()
    other.mkdir()
    (folder / "thumbs").symlink_to(other)
    Image.new("RGB", (8, 8)).save(folder / "a.png")
    row = Row("a", "a", state="completed", files=["a.png"])
    through_link = write_page(folder, row)
    (folder / "thumbs").unlink()
    (folder / "thumbs").mkdir()
    secret = other / "secret.jpeg"
    secret.write_bytes(b"secret")
    (folder / "thumbs" / "a.png.jpeg").symlink_to(secret)
    page = write_page(folder, row)

    assert thumbnails_of(through_link) == ["a.png"]
    assert thumbnails_of(page) == ["thumbs/a.png.jpeg"]
    assert list(other.iterdir()) == [secret]
    assert secret.read_bytes() == b"secret"
    assert not (folder / "thumbs" / "a.png.jpeg").is_symlink()


def test_content_policy(tmp_path: Path) -> None:
    """The page allows exactly its own script and style, by their hashes, and images."""
    page = write_page(tmp_path, Row("a", "<script>alert(1)</script>", state="waiting"), running=True)
    found = re.search(r'<meta http-equiv="Content-Security-Policy" content="([^"]+)">', page)
    assert found
    policy = found[1].replace("&#39;", "'")
    allowed = dict(part.split(" ", 1) for part in policy.split("; "))

    for tag in ("script", "style"):
        (content,) = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert allowed.pop(f"{tag}-src") == f"'sha256-{digest}'"
        assert page.index(f"<{tag}>") > found.end()
    assert allowed == {
        "default-src": "'none'",
        "img-src": "'self' file: data:",
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    # What the policy would block.
    assert not re.search(r"\bon\w+=| style=|eval\(|setAttribute\(.style", page)


@pytest.mark.parametrize(
    ("state", "error", "label", "reason"),
    [
        ("waiting", None, "waiting", "not there yet"),
        ("submitted", None, "running", "not there yet"),
        ("intent", None, "running", "not there yet"),
        ("failed", "</script><b>why</b>", "failed", "</script><b>why</b>"),
        ("uncertain", "lost", "uncertain", "lost"),
        ("refused", "no", "refused", "no"),
        ("completed", "expired", "completed", "expired"),
        ("completed", None, "completed", "no file"),
        ("of a newer version", None, "of a newer version", "no file"),
    ],
)
def test_placeholders(tmp_path: Path, state: str, error: str | None, label: str, reason: str) -> None:
    """A placeholder shows why there is no image, and the requested size."""
    page = write_page(
        tmp_path, Row("a", "a cat", {"width": 640, "seed": 7}, state=state, error=error), running=state == "waiting"
    )

    (entry,) = entries_of(page)
    assert (entry["reason"], entry["state"], entry["size"]) == (reason, label, "640\u00d7any")
    assert entry["seed"] == "7"
    assert ("<body data-running=" in page) is (state == "waiting")


def test_image_with_an_error(tmp_path: Path) -> None:
    """An error is shown below the image if there is one; the page shows the total cost."""
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    row = Row("a", "a", state="completed", files=["a.png"], error="only one of two", cost=Decimal("0.07"))
    page = write_page(tmp_path, row, Row("b", "b", state="completed", cost=Decimal("0.1")))

    assert [entry.get("problem") for entry in entries_of(page)] == ["only one of two", None]
    assert "$0.17 spent." in page


def test_empty_gallery(tmp_path: Path) -> None:
    """A gallery without requests shows that there is nothing yet."""
    assert re.search(r"<p>nothing yet\.\s*</p>", write_page(tmp_path))


def test_variants(tmp_path: Path) -> None:
    """Requests that differ in nothing but the seed are variants; the pictures of one request belong together too."""
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    rows = [
        Row("a", "a cat", {"seed": 0, "width": 64}, state="completed"),
        Row("b", "an owl", {"seed": 0, "width": 64}, state="completed", files=["a.png", "a.png"]),
        Row("c", "a cat", {"seed": 1, "width": 64}),
        Row("d", "a cat", {"seed": 1, "width": 96}),
    ]
    entries = entries_of(write_page(tmp_path, *rows))

    assert [entry.get("variant") for entry in entries] == ["variant 1 of 2", None, None, "variant 2 of 2", None]
    assert [entry.get("group") for entry in entries] == [0, "b", "b", 0, None]


def test_what_the_page_searches_and_sorts(tmp_path: Path) -> None:
    """The page knows the cost, the seconds, and whether the user has chosen the key."""
    lines = read_requests_file(b"a cat\n!\na cat\n", "txt", folder=tmp_path).lines
    rows = [Row.from_line(line) for line in lines]
    rows[0].cost, rows[0].seconds = Decimal("0.07"), 8.04
    own = [Row("a-cat", "a cat"), Row("a-cat-1a2b3c4g", "a cat"), Row("my-1a2b3c4d", "a cat"), Row("0123456", "!")]
    entries = entries_of(write_page(tmp_path, *rows, *own))

    assert [entry.get("ownKey", False) for entry in entries] == [False] * 3 + [True] * 4
    assert (entries[0]["cost"], entries[0]["seconds"]) == ("0.07", 8.0)
    assert not {"cost", "seconds"} & entries[1].keys()


async def test_damaged_journal_while_a_batch_is_running(tmp_path: Path) -> None:
    """If the journal can no longer be read, the page is not written, and the reason is returned."""
    output_dir = OutputDir(tmp_path)
    output_dir.journal_path.write_bytes(b"SQLite format 3\0 truncated" * 60)
    batch = Batch(
        output_dir=output_dir,
        storage=None,
        plan=make_plan([], [], ReusePolicy(), None),
        session=FluxSession("key"),
        schedule=LearnedSchedule(),
        max_in_flight=1,
        budget=None,
        as_json=False,
    )
    problem = await _write_outputs(batch)

    assert problem is not None
    assert problem.startswith(f"the journal {output_dir.journal_path} is damaged")
    assert not (tmp_path / "index.html").exists()


def test_log_messages(capsys: pytest.CaptureFixture[str]) -> None:
    """The progress display shows the newest warning or error; errors are also printed, and what is waited for."""
    schedule = LearnedSchedule()
    display = ProgressDisplay(1, FluxSession("key"), schedule, 1, Terminal(sys.stderr))
    log = logging.getLogger("flux2max_async")
    with attach_log_handler(DisplayLogHandler(display)):
        log.warning("submit not accepted")
        warning = display.log_message
        log.error("the journal's disk\nis full")
        error = display.log_message
        log.warning("trying again until %s", "12:34:56" * 20, extra={"is_notice": True})

    assert warning == "submit not accepted"
    assert error == "the journal's disk is full"
    assert display.log_message == f"trying again until {'12:34:56' * 20}"
    lines = ["the journal's disk is full", f"trying again until {'12:34:56' * 20}"]
    assert capsys.readouterr().err == "".join(f"flux2max: {line}\n" for line in lines)


@pytest.mark.parametrize(("seconds", "expected"), [(0, "0:00"), (59.6, "1:00"), (754, "12:34"), (3661, "1:01:01")])
def test_durations(seconds: float, expected: str) -> None:
    """Durations have minutes and seconds, and hours from one hour on."""
    assert format_duration(seconds) == expected
