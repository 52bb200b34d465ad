"""Thumbnails and the program that creates them: hostile images, processes that end, and signals."""

import fcntl
import io
import json
import os
import re
import signal
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image, features

from flux2max_async.cli import _thumbnail_worker
from flux2max_async.cli._gallery import Gallery
from flux2max_async.cli._rows import Row
from flux2max_async.cli._thumbnail_worker import create_thumbnail, serve
from flux2max_async.cli._thumbnails import Source, Thumbnails, _Worker

WORKER = Path(_thumbnail_worker.__file__)


def save_images(folder: Path, *names: str) -> None:
    for name in names:
        Image.new("RGB", (8, 6), "teal").save(folder / name, "PNG")


def update(thumbnails: Thumbnails, *names: str) -> list[str]:
    """Return the images that have a thumbnail after an update."""
    thumbnails.update(names, lambda: False)
    assert set(thumbnails.sources) == {path.name.removesuffix(".jpeg") for path in thumbnails.path.glob("*.jpeg")}
    return sorted(thumbnails.sources)


# ------------------------------------------------------------------ the program


@pytest.mark.parametrize(
    ("mode", "file_format"),
    [
        *(("RGB", "JPEG"), ("L", "JPEG"), ("CMYK", "JPEG"), ("RGBA", "PNG"), ("LA", "PNG"), ("P", "PNG"), ("1", "PNG")),
        *(("I;16", "PNG"), ("RGB", "WEBP"), ("RGBA", "WEBP"), ("P", "GIF"), ("RGB", "AVIF")),
    ],
)
@pytest.mark.parametrize("size", [(1024, 768), (1, 3000), (720, 720), (5, 5)])
def test_thumbnail(tmp_path: Path, mode: str, file_format: str, size: tuple[int, int]) -> None:
    """Images of every format and shape have a JPEG that fits the square and names its source."""
    if file_format == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    path = tmp_path / "image"
    Image.new(mode, size).save(path, file_format)
    thumbnail = create_thumbnail(path)
    with Image.open(io.BytesIO(thumbnail), formats=["JPEG"]) as image:
        image.load()
    status = path.stat()

    assert image.mode == "RGB"
    assert max(image.size) == min(max(size), 360)
    assert Source.parse(thumbnail) == Source(*size, status.st_size, status.st_mtime_ns)


def test_replies(tmp_path: Path) -> None:
    """Each line has a reply, also if it is no path of an image; an empty reply comes first."""
    path = tmp_path / "a \n picture \udcff.png"
    save_images(tmp_path, path.name)
    lines = [json.dumps(str(path)), json.dumps(str(tmp_path / "missing")), json.dumps(str(tmp_path)), "not JSON", "1"]
    replies = io.BytesIO()
    serve(io.BytesIO("".join(f"{line}\n" for line in lines).encode()), replies)
    thumbnail = create_thumbnail(path)

    assert replies.getvalue() == bytes(4) + len(thumbnail).to_bytes(4) + thumbnail + bytes(4 * 4)


def png_header(width: int, height: int) -> bytes:
    """Return a PNG of a size in pixels, without pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 6, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


def gif(screen: tuple[int, int], frame: tuple[int, int]) -> bytes:
    """Return a GIF whose frame may be larger than its screen."""
    palette = bytes(6)
    image = b"," + struct.pack("<HHHHB", 0, 0, *frame, 0) + b"\x02\x02\x44\x01\x00"
    return b"GIF89a" + struct.pack("<HHBBB", *screen, 0x80, 0, 0) + palette + image + b";"


def jpeg_header(width: int, height: int) -> bytes:
    """Return the start of a JPEG of a size in pixels."""
    file = io.BytesIO()
    Image.new("L", (8, 8)).save(file, "JPEG")
    return file.getvalue().replace(b"\x00\x0b\x08\x00\x08\x00\x08", b"\x00\x0b\x08" + struct.pack(">HH", height, width))


BOMBS = {
    "30,000 x 30,000 PNG": png_header(30_000, 30_000),
    "PNG just above the limit": png_header(20_000_001, 1),
    "PNG of 2^31 - 1": png_header(2**31 - 1, 2**31 - 1),
    "65,000 x 65,000 JPEG": jpeg_header(65_000, 65_000),
    "65,535 x 65,535 GIF": gif((65_535, 65_535), (8, 8)),
    "GIF with a large frame": gif((8, 8), (65_535, 65_535)),
}


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux to measure memory")
def test_decompression_bombs(tmp_path: Path) -> None:
    """Images that would need much memory are refused by their headers, and those after them are served."""
    for name, data in BOMBS.items():
        (tmp_path / name).write_bytes(data)
    Image.new("1", (5_000, 4_000)).save(tmp_path / "last.png")  # exactly the limit
    program = (
        "import runpy, sys\n"
        f"runpy.run_path({str(WORKER)!r}, run_name='__main__')\n"
        "print(open('/proc/self/status').read(), file=sys.stderr)"
    )
    lines = "".join(f"{json.dumps(str(tmp_path / name))}\n" for name in (*BOMBS, "last.png"))
    ended = subprocess.run([sys.executable, "-c", program], input=lines.encode(), capture_output=True, check=True)
    thumbnail = create_thumbnail(tmp_path / "last.png")

    assert ended.stdout == bytes(4 * (1 + len(BOMBS))) + len(thumbnail).to_bytes(4) + thumbnail
    (peak,) = re.findall(rb"VmHWM:\s*(\d+) kB", ended.stderr)
    assert int(peak) < 200 * 1024


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes with names")
def test_time_limit(tmp_path: Path) -> None:
    """The program ends if an image takes too long, even in a call that Python can't interrupt."""
    os.mkfifo(tmp_path / "a.png")
    program = (
        f"import sys; sys.path.insert(0, {str(WORKER.parent)!r}); import {WORKER.stem} as worker\n"
        "worker._TIME_LIMIT = 0.2; worker.serve(sys.stdin.buffer, sys.stdout.buffer)"
    )
    line = f"{json.dumps(str(tmp_path / 'a.png'))}\n".encode()
    ended = subprocess.run([sys.executable, "-c", program], input=line, capture_output=True, check=False)

    assert (ended.returncode, ended.stdout) == (1, bytes(4))


# ------------------------------------------------------------------ its processes


HOSTILE = f"""
import fcntl, os, sys, time
sys.path.insert(0, {str(WORKER.parent)!r})
import {WORKER.stem} as worker

class Input:
    ended = False
    def readline(self):
        return b"" if self.ended else sys.stdin.buffer.readline()

def create_thumbnail(path):
    if path.name.startswith("slow"):
        worker.faulthandler.dump_traceback_later(0.3, exit=True)
    if path.name.startswith(("slow", "hangs")):
        time.sleep(1000)
    if path.name.startswith("crashes"):
        os._exit(1)
    paths.ended = path.name.startswith("last")
    return b"without a comment" if path.name.startswith("strange") else create(path)

folder = os.path.dirname(__file__)
lock = open(f"{{folder}}/lock", "w")
fcntl.flock(lock, fcntl.LOCK_SH)  # until the process ends
with open(f"{{folder}}/starts", "a") as log:
    log.write(f"{{sorted(os.environ)}}\\n")
paths, create = Input(), worker.create_thumbnail
worker.create_thumbnail, worker._TIME_LIMIT = create_thumbnail, 1000
worker.serve(paths, sys.stdout.buffer)
"""
"""A program to which the names of images say what they do to it."""


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    """Return the hostile program."""
    path = tmp_path / "hostile_worker.py"
    path.write_text(HOSTILE, encoding="utf-8")
    return path


def count_starts(program: Path) -> int:
    """Return how many processes have run the hostile program."""
    log = program.with_name("starts")
    return len(log.read_text("utf-8").splitlines()) if log.exists() else 0


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def all_ended(program: Path) -> bool:
    """Check whether no process runs the hostile program any more."""
    with program.with_name("lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


@pytest.mark.parametrize(
    ("bad", "first_starts"),
    [("crashes.png", 2), ("slow.png", 2), ("strange.png", 1)],
)
def test_hostile_images(tmp_path: Path, hostile: Path, bad: str, first_starts: int) -> None:
    """An image that ends the process has no thumbnail, the others have; it is tried again only when it has changed."""
    save_images(tmp_path, "a.png", bad, "z.png")
    thumbnails = Thumbnails(tmp_path, hostile)
    first = update(thumbnails, "a.png", bad, "z.png")
    starts = count_starts(hostile)
    second = update(thumbnails, "a.png", bad, "z.png")
    starts_of_second = count_starts(hostile) - starts
    os.utime(tmp_path / bad, (1, 1))
    third = update(thumbnails, "a.png", bad, "z.png")

    assert first == second == third == ["a.png", "z.png"]
    assert (starts, starts_of_second) == (first_starts, 0)
    assert count_starts(hostile) > starts
    assert all_ended(hostile)


def test_processes_that_end_between_images(tmp_path: Path, hostile: Path) -> None:
    """A process that ends after an image is replaced; the next command creates what it left."""
    names = ["last-1.png", "last-2.png", "a.png", "z.png"]
    save_images(tmp_path, *names)
    first, second = (update(Thumbnails(tmp_path, hostile), *names) for _ in range(2))

    assert {"last-1.png", "z.png"} <= set(first)
    assert second == sorted(names)


def test_many_hostile_images(tmp_path: Path, hostile: Path) -> None:
    """After five processes that have ended, no other is started; the next update goes on with the next images."""
    names = [f"crashes-{number}.png" for number in range(9)] + ["z.png"]
    save_images(tmp_path, *names)
    thumbnails = Thumbnails(tmp_path, hostile)
    first, starts = update(thumbnails, *names), count_starts(hostile)
    second = update(thumbnails, *names)

    assert (first, starts) == ([], 5)
    assert second == ["z.png"]
    assert count_starts(hostile) == 10


@pytest.mark.parametrize("program", ["raise SystemExit(2)", "print('usage: flux2max [OPTIONS]')", None])
def test_programs_that_do_not_start(tmp_path: Path, program: str | None) -> None:
    """If the program doesn't start, as in an executable that contains its own Python, there are no thumbnails."""
    path = tmp_path / "program.py"
    if program is not None:
        path.write_text(program)
    save_images(tmp_path, "a.png")

    assert update(Thumbnails(tmp_path, path), "a.png") == []


def test_python_that_does_not_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If there is no Python to start, there are no thumbnails."""
    save_images(tmp_path, "a.png")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "missing"))

    assert update(Thumbnails(tmp_path), "a.png") == []


def test_environment(tmp_path: Path, hostile: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process has no API key, and imports nothing from the working folder."""
    monkeypatch.setenv("FLUX2MAX_API_KEY", "secret")
    monkeypatch.chdir(tmp_path)
    for name in ("PIL", "json", "io"):
        (tmp_path / f"{name}.py").write_text("import pathlib; pathlib.Path('imported').touch()")
    save_images(tmp_path, "a.png", "b.png")
    log = tmp_path / "starts"

    assert update(Thumbnails(Path(), hostile), "a.png") == ["a.png"]
    assert update(Thumbnails(Path()), "a.png", "b.png") == ["a.png", "b.png"]
    assert not (tmp_path / "imported").exists()
    assert "PATH" in log.read_text("utf-8")
    assert "FLUX2MAX" not in log.read_text("utf-8")


def test_several_processes(tmp_path: Path, hostile: Path) -> None:
    """Many images are divided among several processes, if there are several processors."""
    names = [f"{number}.png" for number in range(80)]
    save_images(tmp_path, *names)

    assert update(Thumbnails(tmp_path, hostile), *names) == sorted(names)
    assert count_starts(hostile) == min(4, os.cpu_count() or 1)


def test_cancelling(tmp_path: Path, hostile: Path) -> None:
    """Cancelling ends the process, in the middle of an image, which is tried again by the next update."""
    save_images(tmp_path, "a.png", "hangs.png", "z.png")
    thumbnails = Thumbnails(tmp_path, hostile)
    thumbnails.update(["a.png", "hangs.png", "z.png"], lambda: "a.png" in thumbnails.sources)
    (tmp_path / "hangs.png").rename(tmp_path / "b.png")

    assert list(thumbnails.sources) == ["a.png"]
    assert all_ended(hostile)
    assert update(thumbnails, "a.png", "b.png", "hangs.png", "z.png") == ["a.png", "b.png", "z.png"]


def test_cancelled_before_the_start(tmp_path: Path, hostile: Path) -> None:
    """No process is started after cancelling."""
    save_images(tmp_path, "a.png")
    Thumbnails(tmp_path, hostile).update(["a.png"], lambda: True)
    worker = _Worker(hostile, [tmp_path / "a.png"], lambda *_: None)
    worker.stop()
    worker.run()

    assert count_starts(hostile) == 0
    assert not (tmp_path / "thumbs").exists()


@pytest.mark.parametrize(
    ("number", "to_group", "kind"),
    [
        (signal.SIGINT, True, "hangs"),  # as Ctrl-C in a terminal does
        (signal.SIGINT, False, "hangs"),
        (signal.SIGTERM, True, "slow"),
        (signal.SIGKILL, False, "slow"),
    ],
)
def test_signals(tmp_path: Path, hostile: Path, number: signal.Signals, to_group: bool, kind: str) -> None:
    """No process is left when the command is interrupted or killed; none prints anything when it is interrupted."""
    names = [f"{kind}-{index}.png" for index in range(40)]
    save_images(tmp_path, *names)
    program = (
        "import signal; from pathlib import Path; from flux2max_async.cli._thumbnails import Thumbnails\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"Thumbnails(Path({str(tmp_path)!r}), Path({str(hostile)!r})).update({names!r}, lambda: False)"
    )
    command = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE, start_new_session=True)
    wait_until(lambda: count_starts(hostile) > 0)
    (os.killpg if to_group else os.kill)(command.pid, number)
    _, messages = command.communicate(timeout=60)

    assert command.returncode == -number
    assert messages.decode().count("Traceback") == (number == signal.SIGINT)
    wait_until(lambda: all_ended(hostile))


# ------------------------------------------------------------------ files


@pytest.mark.parametrize("times", [(0, 0), (2_000_000_000, 2_000_000_000), (-5, -5)])
def test_changed_image(tmp_path: Path, times: tuple[int, int]) -> None:
    """A thumbnail is created again if its image has another size or time, also if that is older."""
    save_images(tmp_path, "a.png")
    thumbnails = Thumbnails(tmp_path)
    update(thumbnails, "a.png")
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    os.utime(tmp_path / "a.png", times)
    update(thumbnails, "a.png")
    in_this_process = thumbnails.sources["a.png"]
    Image.new("RGB", (50, 30)).save(tmp_path / "a.png")
    os.utime(tmp_path / "a.png", times)
    in_another = Thumbnails(tmp_path)
    update(in_another, "a.png")

    assert (in_this_process.width, in_this_process.modified) == (40, times[0] * 10**9)
    assert in_another.sources["a.png"].width == 50


def test_unchanged_images(tmp_path: Path, hostile: Path) -> None:
    """No process is started if all thumbnails are those of their images."""
    save_images(tmp_path, "a.png", "b.png")
    update(Thumbnails(tmp_path), "a.png", "b.png")

    assert update(Thumbnails(tmp_path, hostile), "a.png", "b.png") == ["a.png", "b.png"]
    assert count_starts(hostile) == 0


@pytest.mark.parametrize("kind", ["pipe", "folder", "link", "missing", "device"])
def test_images_that_are_no_files(tmp_path: Path, hostile: Path, kind: str) -> None:
    """Only regular files are opened."""
    path = tmp_path / "a.png"
    match kind:
        case "pipe":
            os.mkfifo(path)
        case "folder":
            path.mkdir()
        case "link":
            save_images(tmp_path, "b.png")
            path.symlink_to(tmp_path / "b.png")
        case "device":
            path.symlink_to("/dev/zero")
        case _:
            pass

    assert update(Thumbnails(tmp_path, hostile), "a.png") == []
    assert count_starts(hostile) == 0


def test_thumbnails_that_cannot_be_written(tmp_path: Path) -> None:
    """A thumbnail that can't be written is missing, and the others are written."""
    save_images(tmp_path, "a.png", "z.png")
    (tmp_path / "thumbs" / "a.png.jpeg").mkdir(parents=True)
    thumbnails = Thumbnails(tmp_path)
    thumbnails.update(["a.png", "z.png"], lambda: False)

    assert list(thumbnails.sources) == ["z.png"]


def test_folder_that_cannot_be_created(tmp_path: Path, hostile: Path) -> None:
    """If there is a file instead of the folder, or a link to another folder, nothing is created."""
    save_images(tmp_path, "a.png")
    thumbnails = Thumbnails(tmp_path, hostile)
    (tmp_path / "thumbs").write_text("no folder")
    file = update(thumbnails, "a.png")
    (tmp_path / "thumbs").unlink()
    created = update(thumbnails, "a.png")
    (tmp_path / "thumbs").rename(tmp_path / "moved")
    (tmp_path / "thumbs").symlink_to(tmp_path / "moved")
    thumbnails.update(["a.png"], lambda: False)

    assert (file, created) == ([], ["a.png"])
    assert thumbnails.sources == {}


def test_page_is_written_only_if_it_has_changed(tmp_path: Path) -> None:
    """The page of a batch that has ended is replaced only if its content differs."""
    gallery = Gallery(tmp_path)
    row = Row("a", "a cat \ud800", state="completed")
    gallery.write([row], running=False)
    first = gallery.path.stat().st_ino, gallery.path.stat().st_mtime_ns
    Gallery(tmp_path).write([row], running=False)
    second = gallery.path.stat().st_ino, gallery.path.stat().st_mtime_ns
    row.prompt = "a dog"
    gallery.write([row], running=False)

    assert first == second
    assert "a dog" in gallery.path.read_text(encoding="utf-8")


def test_page_that_is_a_link(tmp_path: Path) -> None:
    """A link is replaced, also if its target has the same content: nothing is written through it."""
    gallery = Gallery(tmp_path)
    gallery.write([], running=False)
    gallery.path.rename(tmp_path / "target.html")
    gallery.path.symlink_to(tmp_path / "target.html")
    gallery.write([], running=False)

    assert not gallery.path.is_symlink()
    assert gallery.path.read_bytes() == (tmp_path / "target.html").read_bytes()
