"""Files that the command would replace: only those that it has written itself, or that the user agrees to replace."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from support.commands import Command, Run
from support.responses import jpeg
from support.scripted import ScriptedGateway, answer, completed

from flux2max_async import ConfigurationError
from flux2max_async.cli._gallery import Gallery
from flux2max_async.cli._own_files import reject_foreign_files
from flux2max_async.cli._picture_files import GENERATED_SUFFIXES, PICTURE_SUFFIXES, check_output
from flux2max_async.cli._rows import Row
from flux2max_async.emulator import Emulator

pytestmark = pytest.mark.usefixtures("empty_folder")

Service = Callable[..., Emulator]
SMALL = ("--width", "64", "--height", "64")
HOME_PAGE = "<!DOCTYPE html>\n<title>My bakery</title>\n"
# As the first version of the page began.
OLD_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>pictures (3)</title>
<link rel="icon" href="data:,">
<style>
:root {
  color-scheme: light dark;
  --ground: light-dark(#f6f5f2, #17181a); --card: light-dark(#fff, #222427); --ink: light-dark(#1d1f21, #ecebe8);
"""
ROW = json.dumps({"key": "a", "prompt": "a cat", "task_id": None, "state": "waiting"})
RECORD = json.dumps({"key": "a", "accuracy": 0.9})


@pytest.fixture(scope="module")
def own_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Provide a folder with a page and a thumbnail of this version."""
    folder = tmp_path_factory.mktemp("own")
    Image.new("RGB", (64, 64)).save(folder / "cat.jpeg")
    Gallery(folder).write([Row("a", "a cat", files=["cat.jpeg"])], running=False)
    return folder


def make_file(path: Path, content: str) -> None:
    """Create what a word stands for, or else a file with the content."""
    path.parent.mkdir(parents=True, exist_ok=True)
    match content:
        case "folder":
            path.mkdir()
        case "link":
            path.symlink_to(path.with_name("elsewhere"))
        case "pipe":
            os.mkfifo(path)
        case _:
            path.write_text(content, encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "content", "is_own"),
    [
        ("index.html", HOME_PAGE, False),
        ("index.html", "x" * 10_000 + OLD_PAGE, False),
        ("index.html", OLD_PAGE, True),
        ("index.html", "", True),
        ("index.html", "folder", True),
        ("index.html", "link", False),
        ("index.html", "pipe", False),
        ("results.jsonl", f"{RECORD}\n{RECORD}\n", False),
        ("results.jsonl", "not JSON\n[]\n" + "[" * 100_000, False),
        ("results.jsonl", "\n", False),
        ("results.jsonl", f"{RECORD}\n[]\n{ROW}\n", True),
        ("results.jsonl", "", True),
        ("results.jsonl", "link", True),  # refused as no regular file when it is read
        ("thumbs/cat.jpeg", "a picture", False),
        ("thumbs/cat", "folder", False),
        ("thumbs/.DS_Store", "x", True),
        ("thumbs/Thumbs.db", "x", True),
        ("thumbs", "folder", True),
        ("thumbs", "a file", False),
        ("thumbs", "link", True),
        ("readme.md", "x", True),
    ],
)
def test_whose_files_they_are(tmp_path: Path, name: str, content: str, is_own: bool) -> None:
    """A page, results and thumbnails are refused unless a batch has written them, or they are empty."""
    folder = tmp_path / "site"
    make_file(folder / name, content)
    if is_own:
        reject_foreign_files(folder)
    else:
        with pytest.raises(ConfigurationError, match=f"has {name.partition('/')[0]} that flux2max has not written"):
            reject_foreign_files(folder)


@pytest.mark.parametrize("journal", ["journal.db", "journal-emulator.db"])
@pytest.mark.parametrize(
    ("name", "content", "is_own"),
    [
        ("index.html", HOME_PAGE, False),
        ("results.jsonl", f"{RECORD}\n\n{RECORD}\n", False),
        ("results.jsonl", f"{RECORD}\nnot JSON\n", True),
        ("thumbs/cat.jpeg", "a picture", False),
    ],
)
def test_files_beside_a_journal(tmp_path: Path, journal: str, name: str, content: str, is_own: bool) -> None:
    """A journal, which a program may have in a folder of its own, makes only damaged results those of a batch."""
    make_file(tmp_path / name, content)
    make_file(tmp_path / journal, "x")
    if is_own:
        reject_foreign_files(tmp_path)
    else:
        with pytest.raises(ConfigurationError, match="that flux2max has not written"):
            reject_foreign_files(tmp_path)


def test_own_folder(own_folder: Path) -> None:
    """What this version writes is its own, also beside other thumbnails; a folder that is not there is free."""
    reject_foreign_files(own_folder)
    (own_folder / "thumbs" / "other.jpeg").write_bytes(b"x")
    (own_folder / "thumbs" / "notes.txt").write_bytes(b"x")

    reject_foreign_files(own_folder)
    reject_foreign_files(own_folder / "new")


def content_of(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("options", [(), ("--dry-run",)])
def test_batch_in_the_folder_of_a_website(flux2max: Command, service: Service, options: tuple[str, ...]) -> None:
    """A batch is refused, with the names of all files in the way, before anything is sent or written."""
    gateway = service()
    for name in ("index.html", "results.jsonl", "thumbs/logo.jpeg", "about.html"):
        make_file(Path("site", name), HOME_PAGE)
    before = content_of(Path("site"))
    Path("prompts.txt").write_text("a cat\n", encoding="utf-8")
    run = flux2max("batch", "prompts.txt", "--out", "site", *SMALL, *options)

    assert run == Run(
        2,
        "",
        "flux2max: 'site' has index.html, results.jsonl and thumbs that flux2max has not written, and does not "
        "replace: choose another folder with --out, or move them away\n",
    )
    assert content_of(Path("site")) == before
    assert not gateway.calls


def test_gallery_in_the_folder_of_a_program(flux2max: Command, service: Service) -> None:
    """`gallery` replaces no page of somebody else beside a journal; `batch` goes on where only its own files are."""
    service()
    Path("prompts.txt").write_text("a cat\n", encoding="utf-8")
    batch = ("batch", "prompts.txt", *SMALL)
    runs = [flux2max(*batch)]
    page = Path("flux2max-prompts/index.html")
    for path in page.parent.glob("journal.db*"):
        path.rename(path.name)
    runs.append(flux2max(*batch))  # without its journal, the folder's other files are its own still
    for path in Path().glob("journal.db*"):
        path.rename(page.parent / path.name)
    page.write_text(HOME_PAGE, encoding="utf-8")
    refused = flux2max("gallery", "flux2max-prompts")

    assert [run.code for run in runs] == [0, 0]
    assert refused == Run(
        2,
        "",
        "flux2max: 'flux2max-prompts' has index.html that flux2max has not written, and does not replace: "
        "move them away\n",
    )
    assert page.read_text(encoding="utf-8") == HOME_PAGE


def test_demo_in_the_folder_of_a_website(flux2max: Command) -> None:
    """The demo is refused before it starts."""
    make_file(Path("site/index.html"), HOME_PAGE)
    run = flux2max("demo", "--out", "site")

    assert (run.code, run.out) == (2, "")
    assert "'site' has index.html that flux2max has not written" in run.err
    assert [path.name for path in Path("site").iterdir()] == ["index.html"]


# ---------------------------------------------------------------------- generate and download


@pytest.mark.parametrize(
    ("name", "refused_for"),
    [
        ("x.bmp", "generate download"),
        ("x.pgn", "generate download"),
        ("x.jpeg.txt", "generate download"),
        ("v1.5", "generate download"),
        ("x.webp", "generate"),
        ("x.JPG", ""),
        ("x.png", ""),
        ("x", ""),
        (".x", ""),
    ],
)
def test_suffixes_of_pictures(name: str, refused_for: str) -> None:
    """The name of a picture has the suffix of one, or none; a task that is downloaded may have any kind of picture."""
    for command, suffixes in (("generate", GENERATED_SUFFIXES), ("download", PICTURE_SUFFIXES)):
        if command in refused_for:
            with pytest.raises(ConfigurationError, match="the name of a picture ends in "):
                check_output(Path(name), suffixes, force=True)
        else:
            check_output(Path(name), suffixes, force=False)


@pytest.mark.parametrize(
    ("command", "listed"),
    [("generate", ".jpeg, .jpg or .png"), ("download", ".jpeg, .jpg, .png, .webp, .gif or .avif")],
)
def test_suffix_of_another_kind(flux2max: Command, service: Service, command: str, listed: str) -> None:
    """A name with another suffix is refused before anything is sent, with those that are right."""
    gateway = service()
    run = flux2max(command, "t1", "-o", "x.bmp")

    assert run == Run(2, "", f"flux2max: can't write to 'x.bmp': the name of a picture ends in {listed}\n")
    assert not gateway.calls


@pytest.mark.parametrize("command", ["generate", "download"])
def test_existing_file(flux2max: Command, script: ScriptedGateway, command: str) -> None:
    """A file that is there already is replaced with --force only; nothing is sent otherwise."""
    script.polls[0] = answer(200, completed(url=f"{script.url}/0.jpeg"))
    script.downloads[0] = answer(200, jpeg())
    Path("cat.jpeg").write_bytes(b"old")
    refused = flux2max(command, "t1", "-o", "cat.jpeg")
    kept, sent = Path("cat.jpeg").read_bytes(), list(script.received)
    run = flux2max(command, "t1", "-o", "cat.jpeg", "--force")

    assert refused == Run(
        2, "", "flux2max: 'cat.jpeg' is there already: choose another name, or replace it with --force\n"
    )
    assert (kept, sent) == (b"old", [])
    assert (run.code, run.out, Path("cat.jpeg").read_bytes()) == (0, "cat.jpeg\n", jpeg())


@pytest.mark.parametrize(
    ("arguments", "existing", "expected"),
    [
        ((), "flux2max-t1.jpeg", ["flux2max-t1-2.jpeg", "flux2max-t1-3.jpeg"]),
        (("-o", "cat.jpeg"), "cat-2.jpeg", ["cat.jpeg", "cat-3.jpeg"]),
        (("-o", "cat.jpeg", "--force"), "cat-2.jpeg", ["cat.jpeg", "cat-2.jpeg"]),
    ],
)
def test_names_that_are_taken(
    flux2max: Command, script: ScriptedGateway, arguments: tuple[str, ...], existing: str, expected: list[str]
) -> None:
    """Names that are known only when the task has ended, and are taken then, are left out."""
    contents = [{"type": "image", "url": f"{script.url}/{number}.jpeg"} for number in range(2)]
    script.polls[0] = answer(200, completed(output=[{"content": contents}]))
    script.downloads[0] = answer(200, jpeg())
    Path(existing).write_bytes(b"old")
    run = flux2max("download", "t1", *arguments)

    assert (run.code, run.out.splitlines()) == (0, expected)
    assert (Path(existing).read_bytes() == b"old") is ("--force" not in arguments)
