"""ImageSaver: each image is saved when its task ends, under its own name, never over another file and never twice."""

import asyncio
import errno
import io
import itertools
import os
import re
from collections import deque
from collections.abc import AsyncIterator, Callable
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import anyio
import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from support.responses import picture
from support.scripted import Behaviour, Connection, ScriptedGateway, answer, completed, raw, running, session_on
from support.virtual_time import VirtualJournal

from flux2max_async import (
    Completed,
    DownloadError,
    FixedSchedule,
    FluxSession,
    GenerationRequest,
    InvalidRequestError,
    JournalEntry,
    Outcome,
    ResultExpiredError,
    SessionClosedError,
)
from flux2max_async._downloads import retries, saver
from flux2max_async._downloads.filenames import file_name
from flux2max_async._downloads.saver import _link, _move
from flux2max_async.emulator import Emulator


def encode_image(colour: str, image_format: str = "JPEG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (16, 16), colour).save(file, image_format)
    return file.getvalue()


RED, BLUE = encode_image("red"), encode_image("blue")
AVIF = b"\0\0\0\x14ftypavif\0\0\0\0mif1" + b"\0\0\0\x10meta........" + b"\0\0\0\x10mdat........"
STALLED = raw(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n" + RED, then="hang")


def picture_with(number: int) -> bytes:
    """Return an image that differs from those with other numbers."""
    return encode_image(f"#{number:02x}{255 - number:02x}80", "PNG")


class CountingJournal(VirtualJournal):
    """A journal that remembers what was recorded."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.recorded: list[JournalEntry] = []

    async def record(self, entry: JournalEntry, /) -> None:
        self.recorded.append(entry)
        await super().record(entry)


def serve(scripted: ScriptedGateway, *tasks: bytes | Behaviour | list[bytes | Behaviour]) -> None:
    """Script one completed task with these images for each submit."""
    images = [task if isinstance(task, list) else [task] for task in tasks]

    def completed_task(number: int) -> dict[str, object]:
        urls = [f"{scripted.url}/{number}/{index}" for index in range(len(images[number - 1]))]
        return completed(f"t{number}", output=[{"content": [{"type": "image", "url": url} for url in urls]}])

    async def poll(connection: Connection) -> None:
        await answer(200, completed_task(int(connection.call.path.rpartition("/t")[2])))(connection)

    async def download(connection: Connection) -> None:
        _, number, index = connection.call.path.split("/")
        image = images[int(number) - 1][int(index)]
        await (answer(200, image) if isinstance(image, bytes) else image)(connection)

    scripted.submits = deque(answer(200, completed_task(number)) for number in range(1, len(tasks) + 1))
    scripted.polls = deque([poll])
    scripted.downloads = deque([download])


def downloads(scripted: ScriptedGateway) -> list[str]:
    return [request.path for request in scripted.of("GET") if "/task/" not in request.path]


def by_id(outcome: Completed) -> str:
    """Name images after their keys, or else their tasks, whose ids are known before."""
    return (outcome.request and outcome.request.key) or outcome.task_id


async def run(session: FluxSession, *requests: str | GenerationRequest, **options: Any) -> list[Completed]:
    options.setdefault("name", by_id if "save_to" in options else None)
    async with session:
        return [outcome.unwrap() async for outcome in session.stream(requests, **options)]


async def save_image(scripted: ScriptedGateway, content: bytes, folder: Path, name: str = "cat") -> Completed:
    serve(scripted, content)
    (outcome,) = await run(session_on(scripted), "a cat", save_to=folder, name=lambda _: name)
    return outcome


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ---------------------------------------------------------------------- saving


async def test_images_are_saved_while_other_tasks_run(tmp_path: Path) -> None:
    """Each outcome is delivered with its saved image, long before the last task has ended."""
    saved: dict[str, tuple[Path, ...]] = {}
    in_flight_at_delivery: list[int] = []
    async with Emulator(seconds=8.0, spread=0.5, seed=1) as gateway:
        async with FluxSession(gateway.api_key, base_url=gateway.url, schedule=FixedSchedule(0.5)) as session:
            requests = (GenerationRequest(f"cat {number}", width=64, height=64) for number in range(12))
            async for outcome in session.stream(requests, save_to=tmp_path / "new" / "folder", name=by_id):
                saved[outcome.unwrap().task_id] = outcome.unwrap().saved
                in_flight_at_delivery.append(session.stats.in_flight)
                with Image.open(saved[outcome.unwrap().task_id][0]) as image:
                    image.load()

        assert gateway.calls["download"] == 12
    assert saved == {task_id: (tmp_path / "new" / "folder" / f"{task_id}.jpeg",) for task_id in gateway.tasks}
    assert names(tmp_path / "new" / "folder") == sorted(f"{task_id}.jpeg" for task_id in gateway.tasks)
    assert in_flight_at_delivery[0] > 6


async def test_slow_download_does_not_delay_other_outcomes(scripted: ScriptedGateway, tmp_path: Path) -> None:
    """An outcome with a slow download is delivered once it is saved, after outcomes that were saved earlier."""
    serve(scripted, answer(200, RED, after=20.0), BLUE)
    outcomes = await run(session_on(scripted), "slow", "fast", save_to=str(tmp_path))

    assert [outcome.request and outcome.request.prompt for outcome in outcomes] == ["fast", "slow"]
    assert [path.read_bytes() for outcome in outcomes for path in outcome.saved] == [BLUE, RED]


async def test_failed_task_creates_no_file(session: FluxSession, tmp_path: Path) -> None:
    """A failed task is yielded as usual, and no file is created for it."""
    outcomes = [outcome async for outcome in session.stream(["dog [fail]"], save_to=tmp_path, name=by_id)]

    assert [outcome.ok for outcome in outcomes] == [False]
    assert names(tmp_path) == []


async def test_name_without_save_to_is_an_error(session: FluxSession) -> None:
    """The argument `name` without `save_to` is an error before anything is sent."""
    with pytest.raises(InvalidRequestError, match="save_to") as caught:
        session.stream(["a cat"], name=lambda _: "cat")

    assert caught.value.field == "name"


# ---------------------------------------------------------------------- file names


@pytest.mark.parametrize(
    ("request_", "name", "expected"),
    [
        pytest.param("A cat, on a sofa!", None, "a-cat-on-a-sofa-cbf3fa64.jpeg", id="words and a fingerprint"),
        pytest.param("☃", None, "56ab3d6c.jpeg", id="no words"),
        pytest.param(GenerationRequest("a cat", key="row 1/2"), None, "row 1-2.jpeg", id="key"),
        pytest.param(
            GenerationRequest("a cat", key="row 1"), lambda outcome: outcome.task_id * 2, "t1t1.jpeg", id="name"
        ),
        pytest.param("a cat", lambda outcome: outcome.request.prompt + ".png", "a cat.png", id="name with a suffix"),
        pytest.param("a cat", lambda _: "cat.JPG", "cat.JPG", id="name with an uppercase suffix"),
        pytest.param("a cat", lambda _: "cat.gif", "cat.gif", id="name with the suffix of another format"),
        pytest.param("a cat", lambda _: "no. 7.5", "no. 7.5.jpeg", id="name with a dot"),
        pytest.param("a cat", lambda _: "../../etc/passwd", "etc-passwd.jpeg", id="name with a path"),
    ],
)
async def test_file_name(scripted: ScriptedGateway, tmp_path: Path, request_: Any, name: Any, expected: str) -> None:
    """The name is the caller's, the request's key, or the prompt's first words; a given suffix is kept."""
    serve(scripted, RED)
    (outcome,) = await run(session_on(scripted), request_, save_to=tmp_path / "here", name=name)

    assert outcome.saved == (tmp_path / "here" / expected,)
    assert names(tmp_path / "here") == [expected]
    assert names(tmp_path) == ["here"]


async def test_equal_requests_have_numbered_names(scripted: ScriptedGateway, tmp_path: Path) -> None:
    """A prompt that is there twice makes two files, and the next run of the same list finds both."""
    serve(scripted, RED, BLUE)
    saved: list[list[str]] = []
    for _ in range(2):
        journal = VirtualJournal(tmp_path / "run.db")
        outcomes = await run(
            session_on(scripted, journal=journal), "a cat", "a cat", save_to=tmp_path / "cats", name=None
        )
        saved.append(sorted(path.name for outcome in outcomes for path in outcome.saved))

    assert saved == [["a-cat-6a1b0141-2.jpeg", "a-cat-6a1b0141.jpeg"]] * 2
    assert len(downloads(scripted)) == 2


@pytest.mark.parametrize(
    ("content", "output_format", "suffix"),
    [
        pytest.param(picture("PNG"), "jpeg", "png", id="PNG"),
        pytest.param(picture("JPEG"), "png", "jpeg", id="JPEG"),
        pytest.param(picture("WEBP"), "png", "webp", id="WebP"),
        pytest.param(picture("GIF"), "png", "gif", id="GIF"),
        pytest.param(AVIF, None, "avif", id="AVIF"),
    ],
)
async def test_suffix_matches_the_content(
    scripted: ScriptedGateway, tmp_path: Path, content: bytes, output_format: Any, suffix: str
) -> None:
    """The suffix is that of the image's format, whatever was requested."""
    serve(scripted, content)
    request = GenerationRequest("a cat", output_format=output_format)
    (outcome,) = await run(session_on(scripted), request, save_to=tmp_path)

    assert outcome.saved == (tmp_path / f"t1.{suffix}",)


async def test_several_images_of_a_task_are_numbered(scripted: ScriptedGateway, tmp_path: Path) -> None:
    """All images of a task are saved, in their order."""
    serve(scripted, [RED, BLUE, encode_image("green")])
    (outcome,) = await run(session_on(scripted), GenerationRequest("cats", key="cats"), save_to=tmp_path)

    assert outcome.saved == tuple(tmp_path / name for name in ("cats.jpeg", "cats-2.jpeg", "cats-3.jpeg"))
    assert [path.read_bytes() for path in outcome.saved] == [RED, BLUE, encode_image("green")]


async def test_many_images_of_a_task_are_recorded_together(scripted: ScriptedGateway, tmp_path: Path) -> None:
    """Of a task with 100 images, the first 64 are saved, each content once, and the journal's entry is written once."""
    contents: list[bytes | Behaviour] = [picture_with(number % 60) for number in range(100)]
    serve(scripted, contents)
    journal = CountingJournal(tmp_path / "journal.db")
    request = GenerationRequest("cats", key="cats")
    (outcome,) = await run(session_on(scripted, journal=journal), request, save_to=tmp_path / "pictures")
    (again,) = await run(session_on(scripted, journal=journal), request, save_to=tmp_path / "pictures")

    assert len(outcome.images) == len(outcome.saved) == 64
    assert [path.read_bytes() for path in outcome.saved] == contents[:64]
    assert len(set(outcome.saved)) == len(names(tmp_path / "pictures")) == 60
    assert outcome.partial_error is not None
    assert outcome.partial_error.message == "the task has 100 images, of which the first 64 are used"
    assert [len(entry.files) for entry in journal.recorded if entry.files] == [64, 64]  # its files; its release
    assert again.replayed
    assert again.saved == outcome.saved
    assert len(downloads(scripted)) == 64


async def test_images_before_one_that_fails_are_saved(scripted: ScriptedGateway, tmp_path: Path) -> None:
    """If an image can't be downloaded, those before it are saved, those after it are left to the next run."""
    serve(scripted, [RED, BLUE, answer(400, b""), encode_image("green")])
    (outcome,) = await run(session_on(scripted), GenerationRequest("cats", key="cats"), save_to=tmp_path)

    assert outcome.saved == (tmp_path / "cats.jpeg", tmp_path / "cats-2.jpeg")
    assert str(outcome.save_error) == "can't download: HTTP 400"
    assert names(tmp_path) == ["cats-2.jpeg", "cats.jpeg"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a cat", "a cat"),
        ("(1+1)=2, v0.1 @home_", "(1+1)=2, v0.1 @home_"),
        ("a/b\\c:d*e?f\"g<h>i|j'k", "a-b-c-d-e-f-g-h-i-j-k"),
        ("line\nbreak\0nul\x7f", "line-break-nul"),
        ("..", "picture"),
        ("", "picture"),
        (" \t", "picture"),
        ("😀", "picture"),
        ("...hidden", "hidden"),
        ("-rf", "rf"),
        ("trailing. . ", "trailing"),
        ("CON", "_CON"),
        ("nul.txt", "_nul.txt"),
        ("Lpt9 .a.b", "_Lpt9 .a.b"),
        ("com\N{SUPERSCRIPT TWO}", "_com\N{SUPERSCRIPT TWO}"),
        ("console", "console"),
        ("com0", "com0"),
        ("猫 на крыше", "猫 на крыше"),
        ("cafe\N{COMBINING ACUTE ACCENT}", "caf\N{LATIN SMALL LETTER E WITH ACUTE}"),
        ("half a pair \ud800", "half a pair"),
        ("x" * 300, "x" * 120),
        ("é" * 100, "é" * 60),
        ("x" * 119 + "é", "x" * 119),
        ("x" * 119 + ". more", "x" * 119),
    ],
)
def test_file_name_of_a_text(text: str, expected: str) -> None:
    """Characters that are not portable are replaced, and all others stay."""
    assert file_name(text) == expected


RESERVED_NAME = re.compile(r"(con|prn|aux|nul|(com|lpt)[1-9¹²³]) *(\..*)?", re.IGNORECASE | re.DOTALL)
TRICKY_TEXT = st.text(st.sampled_from("conCONauxprnul1¹ ./\\:-\0\n\ud800é\u0301😀猫"))


@given(st.one_of(st.text(), TRICKY_TEXT))
def test_file_name_of_any_text(text: str) -> None:
    """Any text has a file name that is a single path component, short, encodable and not reserved."""
    name = file_name(text)

    assert PurePosixPath(name).parts == PureWindowsPath(name).parts == (name,)
    assert 0 < len(name.encode()) <= 130
    assert name.isprintable()
    assert name == name.strip(" .")
    assert not RESERVED_NAME.fullmatch(name)


# ---------------------------------------------------------------------- existing files


def stat_fields(path: Path) -> tuple[int, ...]:
    """Return what would change if a file were replaced or modified; the access time is not included."""
    stat = path.lstat()
    return stat.st_ino, stat.st_mode, stat.st_nlink, stat.st_size, stat.st_mtime_ns


@pytest.mark.parametrize(
    "create",
    [
        pytest.param(lambda path: path.write_bytes(BLUE + b"!"), id="image of another size"),
        pytest.param(lambda path: path.write_bytes(BLUE), id="image of the same size"),
        pytest.param(lambda path: path.mkdir(), id="folder"),
        pytest.param(lambda path: path.symlink_to("nothing"), id="broken link"),
        pytest.param(lambda path: path.symlink_to(path), id="link to itself"),
        pytest.param(os.mkfifo, id="pipe"),
        pytest.param(lambda path: path.symlink_to("/dev/null"), id="link to a device"),
        pytest.param(lambda path: path.touch(0o444), id="read-only file"),
    ],
)
async def test_existing_files_are_never_replaced(
    scripted: ScriptedGateway, tmp_path: Path, create: Callable[[Path], object]
) -> None:
    """Whatever has the name already stays unchanged, and the image gets the next free name."""
    create(tmp_path / "cat.jpeg")
    before = stat_fields(tmp_path / "cat.jpeg")
    outcome = await save_image(scripted, RED, tmp_path)

    assert len(RED) == len(BLUE)
    assert outcome.saved == (tmp_path / "cat-2.jpeg",)
    assert outcome.saved[0].read_bytes() == RED
    assert stat_fields(tmp_path / "cat.jpeg") == before
    assert names(tmp_path) == ["cat-2.jpeg", "cat.jpeg"]


@pytest.mark.parametrize("is_large", [False, True])
async def test_identical_image_is_not_stored_twice(scripted: ScriptedGateway, tmp_path: Path, is_large: bool) -> None:
    """If the same image has the name already, the outcome refers to that file, which stays unchanged."""
    content = RED + bytes(3_000_000 if is_large else 0)
    (tmp_path / "cat.jpeg").write_bytes(b"another file")
    (tmp_path / "elsewhere.jpeg").write_bytes(content)
    (tmp_path / "cat-2.jpeg").symlink_to("elsewhere.jpeg")
    outcome = await save_image(scripted, content, tmp_path)

    assert outcome.saved == (tmp_path / "cat-2.jpeg",)
    assert names(tmp_path) == ["cat-2.jpeg", "cat.jpeg", "elsewhere.jpeg"]


async def test_many_images_with_the_same_name(scripted: ScriptedGateway, tmp_path: Path) -> None:
    """Images that are saved under the same name at the same time get numbers, and none is lost."""
    images = [RED + bytes([number]) for number in range(20)]
    serve(scripted, *images)
    requests = [f"cat {number}" for number in range(20)]
    outcomes = await run(session_on(scripted), *requests, save_to=tmp_path, name=lambda _: "cat")

    assert {path.read_bytes() for outcome in outcomes for path in outcome.saved} == set(images)
    assert names(tmp_path) == sorted(["cat.jpeg", *(f"cat-{number}.jpeg" for number in range(2, 21))])


class JournalWithIntruder(VirtualJournal):
    """A journal that creates a file just before an image is published under that name."""

    intruder = BLUE

    async def record(self, entry: JournalEntry, /) -> None:
        await super().record(entry)
        if entry.files and (path := Path(entry.files[-1].location)).name == "t1.jpeg" and not path.exists():
            path.write_bytes(self.intruder)


@pytest.mark.parametrize(
    ("intruder", "expected"),
    [pytest.param(BLUE, "t1-2.jpeg", id="another image"), pytest.param(RED, "t1.jpeg", id="the same image")],
)
async def test_name_that_is_taken_before_publishing(
    scripted: ScriptedGateway, tmp_path: Path, intruder: bytes, expected: str
) -> None:
    """A name that was free when it was checked, and isn't any more, is not overwritten."""
    serve(scripted, RED)
    journal = JournalWithIntruder(tmp_path / "run.db")
    journal.intruder = intruder
    (outcome,) = await run(session_on(scripted, journal=journal), "a cat", save_to=tmp_path / "cats")

    assert outcome.saved == (tmp_path / "cats" / expected,)
    assert outcome.saved[0].read_bytes() == RED
    assert (tmp_path / "cats" / "t1.jpeg").read_bytes() == intruder


def test_move_without_hard_links(tmp_path: Path) -> None:
    """Without hard links, an existing file is never replaced, and after an error no name stays reserved."""
    part, target = tmp_path / "part", tmp_path / "target"
    part.write_bytes(RED)
    moved = _move(part, target)
    part.write_bytes(BLUE)
    moved_again = _move(part, target)
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="ot a directory"):
        _link(tmp_path / "folder", tmp_path / "new")  # a folder can't be hard-linked

    assert (moved, moved_again) == (True, False)
    assert target.read_bytes() == RED
    assert names(tmp_path) == ["folder", "part", "target"]


# ---------------------------------------------------------------------- errors


async def test_failed_download_affects_only_its_outcome(scripted: ScriptedGateway, tmp_path: Path) -> None:
    """If an image can't be downloaded, its outcome has the error and keeps the URL; the other images are saved."""
    serve(scripted, RED, answer(400, b""), [BLUE, answer(400, b""), RED], RED)
    outcomes = await run(session_on(scripted), "1", "2", "3", "4", save_to=tmp_path)
    by_id = {outcome.task_id: outcome for outcome in outcomes}

    assert isinstance(by_id["t2"].save_error, DownloadError)
    assert by_id["t2"].save_error.task_id == "t2"
    assert by_id["t2"].images[0].url.endswith("/2/0")
    assert {task_id: [path.name for path in outcome.saved] for task_id, outcome in by_id.items()} == {
        "t1": ["t1.jpeg"],
        "t2": [],
        "t3": ["t3.jpeg"],
        "t4": ["t4.jpeg"],
    }
    assert [by_id[task_id].save_error is None for task_id in ("t1", "t3", "t4")] == [True, False, True]
    assert names(tmp_path) == ["t1.jpeg", "t3.jpeg", "t4.jpeg"]


@pytest.mark.parametrize("name", [None, 7, b"cat", Path("cat")])
async def test_name_that_is_not_text(scripted: ScriptedGateway, tmp_path: Path, name: object) -> None:
    """A name that isn't text is the outcome's save_error, and nothing is downloaded for it."""
    serve(scripted, RED)
    (outcome,) = await run(session_on(scripted), "a cat", save_to=tmp_path, name=lambda _: name)

    assert isinstance(outcome.save_error, DownloadError)
    assert "name must be text" in str(outcome.save_error)
    assert downloads(scripted) == []


@pytest.mark.parametrize("cause", [KeyError("t1"), PermissionError(errno.EACCES, "permission denied")])
async def test_error_in_the_name_function(scripted: ScriptedGateway, tmp_path: Path, cause: Exception) -> None:
    """An error that `name` raises is the outcome's save_error, and the stream continues."""

    def name(outcome: Completed) -> str:
        if outcome.task_id == "t1":
            raise cause
        return outcome.task_id

    images = [RED + bytes([number]) for number in range(5)]
    serve(scripted, *images)
    session = session_on(scripted, max_in_flight=1)
    first, *rest = await run(session, *"12345", save_to=tmp_path, name=name)

    assert isinstance(first.save_error, DownloadError)
    assert repr(cause) in str(first.save_error)
    assert first.save_error.__context__ is cause
    rest.sort(key=lambda outcome: outcome.task_id)  # images are saved concurrently
    assert [outcome.saved[0].read_bytes() for outcome in rest] == images[1:]


@pytest.mark.parametrize(
    "folder",
    [
        pytest.param("/proc/not/writable", id="not writable"),
        pytest.param("file/below", id="below a file"),
        pytest.param("file", id="file"),
        pytest.param("/dev/null", id="device"),
        pytest.param("a\0b", id="invalid path"),
    ],
)
async def test_unusable_folder_is_an_error_before_any_submit(
    scripted: ScriptedGateway, tmp_path: Path, folder: str
) -> None:
    """If no image could be saved, nothing is submitted, and the source is not read."""
    (tmp_path / "file").write_bytes(b"content")
    source = iter(["a cat"])
    async with session_on(scripted) as session:
        with pytest.raises(DownloadError, match="can't write"):
            await anext(session.stream(source, save_to=tmp_path / folder, name=by_id))

    assert scripted.received == []
    assert next(source) == "a cat"


async def stream_until_disk_failure(session: FluxSession, folder: Path, outcomes: list[Outcome]) -> DownloadError:
    """Stream endless requests until the disk fails."""
    async with session:
        with pytest.raises(DownloadError) as caught:
            async for outcome in session.stream(
                (f"cat {number}" for number in itertools.count()), save_to=folder, name=by_id
            ):
                outcomes.append(outcome)
    return caught.value


@pytest.mark.usefixtures("small_disk")
async def test_full_disk_stops_the_stream(scripted: ScriptedGateway, tmp_path: Path) -> None:
    """Once the disk is full, nothing more is submitted; running tasks are delivered, and then the error is raised."""
    end_time = anyio.current_time() + 100
    serve(scripted, bytes(3_000_000), RED, BLUE)
    poll_completed = scripted.polls[0]

    async def poll(connection: Connection) -> None:
        task_id = connection.call.path.rpartition("/")[2]
        poll_running = answer(200, running(task_id))
        await (poll_completed if anyio.current_time() > end_time else poll_running)(connection)

    scripted.submits = deque([answer(200, running(f"t{number}")) for number in (2, 3)])
    scripted.submits.appendleft(answer(200, completed("t1", f"{scripted.url}/1/0"), after=20.0))
    scripted.polls = deque([poll])
    outcomes: list[Outcome] = []
    error = await stream_until_disk_failure(session_on(scripted, max_in_flight=3), tmp_path, outcomes)
    first, *rest = (outcome.unwrap() for outcome in outcomes)

    assert len(scripted.of("POST")) == 3
    assert (first.task_id, first.save_error) == ("t1", error)
    assert {outcome.task_id for outcome in rest} == {"t2", "t3"}
    assert all(outcome.saved for outcome in rest)
    assert names(tmp_path) == ["t2.jpeg", "t3.jpeg"]


async def test_lost_folder_stops_the_stream(gateway: Emulator, tmp_path: Path) -> None:
    """If the folder can't be written to any more, the stream ends after all submitted tasks are delivered."""
    session = FluxSession(gateway.api_key, base_url=gateway.url, max_in_flight=2, schedule=FixedSchedule(1.0))
    outcomes: list[Outcome] = []

    async def replace_folder() -> None:
        await anyio.sleep(30)
        (tmp_path / "disk").rename(tmp_path / "moved")
        (tmp_path / "disk").write_bytes(b"")

    async with anyio.create_task_group() as group:
        group.start_soon(replace_folder)
        error = await stream_until_disk_failure(session, tmp_path / "disk" / "cats", outcomes)

    # While images are saved, one more request may have been pulled: it waits for a slot, and is not submitted any more.
    submitted = [outcome for outcome in outcomes if outcome.task_id is not None]
    assert len(submitted) == gateway.calls["submit"]
    assert all(outcome.ok for outcome in submitted)
    assert [outcome.error for outcome in outcomes if not outcome.ok] == [error] * (len(outcomes) - len(submitted))
    assert len(names(tmp_path / "moved" / "cats")) == sum(outcome.unwrap().save_error is None for outcome in submitted)


# ---------------------------------------------------------------------- leaving the stream or the session


async def test_download_continues_after_leaving_the_stream(scripted: ScriptedGateway, tmp_path: Path) -> None:
    """An image that is being downloaded when its stream is left is still saved while the session is open."""
    serve(scripted, RED, answer(200, BLUE, after=20.0))
    async with session_on(scripted) as session:
        async with session.stream(["1", "2"], save_to=tmp_path, name=by_id) as stream:
            await anext(stream)
        names_on_leaving = names(tmp_path)
        await anyio.sleep(60)
        with pytest.raises(StopAsyncIteration):
            await anext(stream)

    assert "t2.jpeg" not in names_on_leaving
    assert [task.id for task in stream.unfinished] == ["t2"]
    assert names(tmp_path) == ["t1.jpeg", "t2.jpeg"]


async def test_closing_the_session_during_a_download(scripted: ScriptedGateway, tmp_path: Path) -> None:
    """A waiting consumer gets the outcome with the reason why it isn't saved, and no part file is left."""
    serve(scripted, STALLED)
    session = session_on(scripted)
    await session.__aenter__()
    stream = session.stream(["a cat"], save_to=tmp_path, name=by_id)
    waiting = asyncio.ensure_future(anext(stream))
    await anyio.sleep(5)
    parts = names(tmp_path)
    await session.aclose()
    outcome = (await waiting).unwrap()

    assert [name.endswith(".part") for name in parts] == [True]
    assert outcome.images
    assert outcome.saved == ()
    assert isinstance(outcome.save_error, SessionClosedError)
    assert names(tmp_path) == []
    with pytest.raises(StopAsyncIteration):
        await anext(stream)


async def test_leaving_stream_and_session_during_a_download(scripted: ScriptedGateway, tmp_path: Path) -> None:
    """Leaving the stream and then the session during a download leaves no part file and doesn't hang."""
    serve(scripted, RED, STALLED)
    async with session_on(scripted) as session, session.stream(["1", "2"], save_to=tmp_path, name=by_id) as stream:
        await anext(stream)
        await anyio.sleep(5)

    assert names(tmp_path) == ["t1.jpeg"]


@pytest.mark.parametrize("steps", [0, 8, 16, 32, 64, 128, 256, 512])
async def test_closing_the_session_at_any_time_leaves_no_part(
    scripted: ScriptedGateway, tmp_path: Path, steps: int
) -> None:
    """Whenever the session is closed, each image is complete or absent, and each outcome is delivered."""
    requested = asyncio.Event()

    async def download(connection: Connection) -> None:
        requested.set()
        await answer(200, RED)(connection)

    serve(scripted, download, [download, BLUE])
    session = session_on(scripted)
    await session.__aenter__()
    stream = session.stream(["1", "2"], save_to=tmp_path, name=by_id)
    waiting = asyncio.ensure_future(anext(stream))
    await requested.wait()
    for _ in range(steps):
        await asyncio.sleep(0)
    await session.aclose()
    outcomes = [await waiting, *[outcome async for outcome in stream]]

    assert len(outcomes) == 2
    assert all(isinstance(outcome, Completed) and (outcome.saved or outcome.save_error) for outcome in outcomes)
    assert not [name for name in names(tmp_path) if not name.startswith("t")]
    assert all(path.read_bytes() in (RED, BLUE) for path in tmp_path.iterdir())


# ---------------------------------------------------------------------- reruns with a journal

CATS = [GenerationRequest(f"cat {number}", width=64, height=64, key=f"cat {number}") for number in range(5)]


@pytest.fixture
async def image_gateway() -> AsyncIterator[Emulator]:
    """A gateway that draws a different image for each request."""
    async with Emulator(seconds=8.0, spread=0.0, seed=1) as gateway:
        yield gateway


def journal_session(gateway: Emulator | ScriptedGateway, tmp_path: Path) -> FluxSession:
    """Return a session on the same journal, like the next run of a program."""
    journal = VirtualJournal(tmp_path / "run.db")
    return FluxSession(gateway.api_key, base_url=gateway.url, schedule=FixedSchedule(1.0), journal=journal)


@pytest.mark.parametrize(
    ("damage", "downloads"),
    [
        pytest.param(lambda folder: None, 0, id="no damage"),
        pytest.param(lambda folder: (folder / "cat 1.jpeg").unlink(), 1, id="missing file"),
        pytest.param(lambda folder: os.truncate(folder / "cat 2.jpeg", 100), 1, id="truncated file"),
        pytest.param(lambda folder: [path.unlink() for path in folder.iterdir()], 5, id="no files"),
    ],
)
async def test_rerun_downloads_only_missing_images(
    image_gateway: Emulator, tmp_path: Path, damage: Callable[[Path], object], downloads: int
) -> None:
    """Complete files aren't downloaded again, missing and truncated ones are, and nothing is submitted or polled."""
    folder = tmp_path / "cats"
    first = await run(journal_session(image_gateway, tmp_path), *CATS, save_to=folder)
    images = {path: path.read_bytes() for outcome in first for path in outcome.saved}
    calls = image_gateway.calls.copy()
    damage(folder)
    second = await run(journal_session(image_gateway, tmp_path), *CATS, save_to=folder)
    third = await run(journal_session(image_gateway, tmp_path), *CATS, save_to=folder)

    assert image_gateway.calls - calls == ({"download": downloads} if downloads else {})
    assert all(outcome.replayed and outcome.save_error is None for outcome in second)
    assert all(path.read_bytes() in images.values() for outcome in second for path in outcome.saved)
    assert len({path.read_bytes() for outcome in second for path in outcome.saved}) == 5
    assert {outcome.saved for outcome in third} == {outcome.saved for outcome in second}


HTML = b"<html><h1>Just a moment...</h1></html>"


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(answer(200, HTML, [("Content-Type", "image/jpeg")]), id="HTML"),
        pytest.param(answer(200, b""), id="empty"),
        pytest.param(raw(b"HTTP/1.1 200 OK\r\n\r\n" + RED[:300]), id="cut without a length"),
    ],
)
async def test_what_is_no_image_is_not_saved(scripted: ScriptedGateway, tmp_path: Path, content: Behaviour) -> None:
    """What is not a whole image is the outcome's save_error, is not recorded, and a rerun downloads the image."""
    serve(scripted, content)
    (first,) = await run(journal_session(scripted, tmp_path), "a cat", save_to=tmp_path / "cats")
    async with VirtualJournal(tmp_path / "run.db") as journal:
        (entry,) = [entry async for entry in journal.entries()]
    names_after_failure = names(tmp_path / "cats")
    serve(scripted, RED)
    (second,) = await run(journal_session(scripted, tmp_path), "a cat", save_to=tmp_path / "cats")

    assert isinstance(first.save_error, DownloadError)
    assert (first.saved, entry.files, names_after_failure) == ((), (), [])
    assert second.saved == (tmp_path / "cats" / "t1.jpeg",)
    assert second.saved[0].read_bytes() == RED


DAMAGES = [
    pytest.param(lambda data: data[: len(data) // 2].ljust(len(data), b"\0"), id="zeros at the end"),
    pytest.param(lambda data: bytes(len(data)), id="zeros"),
    pytest.param(lambda data: HTML.ljust(len(data)), id="HTML"),
    pytest.param(lambda data: b"\0" + data[1:], id="zero at the start"),
]


@pytest.mark.parametrize("damage", DAMAGES)
async def test_rerun_replaces_damaged_files(
    image_gateway: Emulator, tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:
    """A file of the recorded size that isn't a whole image is replaced by the image, under the same name."""
    folder = tmp_path / "cats"
    first = await run(journal_session(image_gateway, tmp_path), *CATS, save_to=folder)
    images = {path: path.read_bytes() for outcome in first for path in outcome.saved}
    (folder / "cat 1.jpeg").write_bytes(damage(images[folder / "cat 1.jpeg"]))
    calls = image_gateway.calls.copy()
    second = await run(journal_session(image_gateway, tmp_path), *CATS, save_to=folder)
    third = await run(journal_session(image_gateway, tmp_path), *CATS, save_to=folder)

    assert image_gateway.calls - calls == {"download": 1}
    assert all(outcome.save_error is None for outcome in (*second, *third))
    assert {path: path.read_bytes() for path in folder.iterdir()} == images


async def test_rerun_mends_what_was_saved_in_place_of_an_image(scripted: ScriptedGateway, tmp_path: Path) -> None:
    """A page of HTML that was recorded as an image is replaced, and the size of the image is recorded."""
    serve(scripted, RED)
    (outcome,) = await run(journal_session(scripted, tmp_path), "a cat", save_to=tmp_path / "cats")
    async with VirtualJournal(tmp_path / "run.db") as journal:
        (entry,) = [entry async for entry in journal.entries()]
        await journal.record(attrs.evolve(entry, files=(attrs.evolve(entry.files[0], size=len(HTML)),)))
    outcome.saved[0].write_bytes(HTML)
    second = await run(journal_session(scripted, tmp_path), "a cat", save_to=tmp_path / "cats")
    third = await run(journal_session(scripted, tmp_path), "a cat", save_to=tmp_path / "cats")

    assert [again.saved for again in (*second, *third)] == [outcome.saved] * 2
    assert outcome.saved[0].read_bytes() == RED
    assert names(tmp_path / "cats") == ["t1.jpeg"]
    assert len(downloads(scripted)) == 2


@pytest.mark.parametrize("change", [lambda path: path.write_bytes(b"notes"), lambda path: path.unlink()])
async def test_damaged_file_that_changes_meanwhile(
    scripted: ScriptedGateway, tmp_path: Path, change: Callable[[Path], object]
) -> None:
    """A damaged file that somebody changes during the download is left alone."""
    serve(scripted, RED)
    (outcome,) = await run(journal_session(scripted, tmp_path), "a cat", save_to=tmp_path / "cats")
    (path,) = outcome.saved
    path.write_bytes(bytes(len(RED)))

    async def change_and_send(connection: Connection) -> None:
        change(path)
        await answer(200, RED)(connection)

    serve(scripted, change_and_send)
    (second,) = await run(journal_session(scripted, tmp_path), "a cat", save_to=tmp_path / "cats")

    is_free = not path.exists() or path.read_bytes() == RED
    assert second.saved == ((path if is_free else path.with_name("t1-2.jpeg")),)
    assert second.saved[0].read_bytes() == RED
    assert is_free or path.read_bytes() == b"notes"


def make_link(path: Path) -> None:
    elsewhere = path.parent.with_name("elsewhere")
    path.rename(elsewhere)
    path.symlink_to(elsewhere)


@pytest.mark.parametrize("protect", [lambda path: path.chmod(0o444), make_link])
async def test_damaged_file_that_is_not_replaced(
    scripted: ScriptedGateway, tmp_path: Path, protect: Callable[[Path], object]
) -> None:
    """A damaged file that is read-only, or is a link, is left alone, and the image gets the next free name."""
    serve(scripted, RED)
    (outcome,) = await run(journal_session(scripted, tmp_path), "a cat", save_to=tmp_path / "cats")
    (path,) = outcome.saved
    path.write_bytes(bytes(len(RED)))
    protect(path)
    before = stat_fields(path)
    (second,) = await run(journal_session(scripted, tmp_path), "a cat", save_to=tmp_path / "cats")

    assert second.saved == (path.with_name("t1-2.jpeg"),)
    assert second.saved[0].read_bytes() == RED
    assert stat_fields(path) == before
    assert path.read_bytes() == bytes(len(RED))


async def test_folder_that_is_a_link(scripted: ScriptedGateway, tmp_path: Path) -> None:
    """A link to a folder is as good as the folder."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("folder")
    outcome = await save_image(scripted, RED, tmp_path / "link")

    assert outcome.saved == (tmp_path / "link" / "cat.jpeg",)
    assert names(tmp_path / "folder") == ["cat.jpeg"]
    assert (tmp_path / "link").is_symlink()


async def test_saved_file_that_may_not_be_read(
    scripted: ScriptedGateway, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that this user may not read is taken for the image if it has its size."""
    serve(scripted, RED)
    (first,) = await run(journal_session(scripted, tmp_path), "a cat", save_to=tmp_path / "cats")

    def refuse(_: Path) -> bool:  # as root, every file can be read
        raise PermissionError

    monkeypatch.setattr(saver, "is_whole_file", refuse)
    (second,) = await run(journal_session(scripted, tmp_path), "a cat", save_to=tmp_path / "cats")

    assert second.saved == first.saved
    assert len(downloads(scripted)) == 1


async def test_rerun_with_a_moved_folder(image_gateway: Emulator, tmp_path: Path) -> None:
    """Images are recognized by name and size if their folder was moved; for a new folder they are downloaded again."""
    first = await run(journal_session(image_gateway, tmp_path), *CATS, save_to=tmp_path / "cats")
    (tmp_path / "cats").rename(tmp_path / "moved")
    second = await run(journal_session(image_gateway, tmp_path), *CATS, save_to=tmp_path / "moved")
    downloads_before = image_gateway.calls["download"]
    third = await run(journal_session(image_gateway, tmp_path), *CATS, save_to=tmp_path / "copies")

    assert (downloads_before, image_gateway.calls["download"]) == (5, 10)
    moved = {outcome.saved for outcome in second}
    assert moved == {(tmp_path / "moved" / path.name,) for outcome in first for path in outcome.saved}
    assert {outcome.saved for outcome in third} == {(tmp_path / "copies" / path.name,) for (path,) in moved}


async def test_rerun_after_the_url_expired(
    image_gateway: Emulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An image that is missing long after its URL expired is downloaded again, after one poll of its task."""
    monkeypatch.setattr(retries, "YOUNG_AGE", 0.0)  # virtual time doesn't make the URL older
    await run(journal_session(image_gateway, tmp_path), *CATS, save_to=tmp_path / "cats")
    (tmp_path / "cats" / "cat 3.jpeg").unlink()
    await anyio.sleep(86_400)
    calls = image_gateway.calls.copy()
    await run(journal_session(image_gateway, tmp_path), *CATS, save_to=tmp_path / "cats")

    assert image_gateway.calls - calls == {"poll": 1, "download": 2}
    assert len(names(tmp_path / "cats")) == 5


async def test_rerun_after_the_service_deleted_the_task(image_gateway: Emulator, tmp_path: Path) -> None:
    """If the service has no fresh URL, the outcome's save_error is a ResultExpiredError with the task's id."""
    outcomes = await run(journal_session(image_gateway, tmp_path), *CATS, save_to=tmp_path / "cats")
    lost = outcomes[0]
    lost.saved[0].unlink()
    del image_gateway.tasks[lost.task_id]
    again = await run(journal_session(image_gateway, tmp_path), *CATS, save_to=tmp_path / "cats")

    (missing,) = (outcome for outcome in again if outcome.save_error)
    assert missing.task_id == lost.task_id
    assert isinstance(missing.save_error, ResultExpiredError)
    assert missing.save_error.task_id == lost.task_id
    assert missing.saved == ()


@pytest.mark.parametrize("missing", ["cats.jpeg", "cats-2.jpeg", "cats-3.jpeg"])
async def test_rerun_with_one_of_several_images_missing(
    scripted: ScriptedGateway, tmp_path: Path, missing: str
) -> None:
    """Of a task with several images, only the missing one is downloaded again, and each keeps its name."""
    serve(scripted, [RED, BLUE, encode_image("green")])
    cats = GenerationRequest("cats", key="cats")
    (first,) = await run(journal_session(scripted, tmp_path), cats, save_to=tmp_path / "cats")
    (tmp_path / "cats" / missing).unlink()
    (second,) = await run(journal_session(scripted, tmp_path), cats, save_to=tmp_path / "cats")

    assert second.saved == first.saved
    assert [path.read_bytes() for path in second.saved] == [RED, BLUE, encode_image("green")]
    assert len(downloads(scripted)) == 4


async def interrupt_download(scripted: ScriptedGateway, tmp_path: Path) -> str:
    """Close a session during a download; return the name of the part file, which was removed."""
    serve(scripted, STALLED)
    async with journal_session(scripted, tmp_path) as session:
        async with session.stream(["a cat"], save_to=tmp_path / "cats", name=by_id) as stream:
            waiting = asyncio.ensure_future(anext(stream))
            await anyio.sleep(5)
            (part,) = names(tmp_path / "cats")
        await asyncio.wait([waiting])
    assert isinstance(waiting.exception(), StopAsyncIteration)
    serve(scripted, RED)
    return part


async def test_rerun_removes_part_files_of_a_killed_run(scripted: ScriptedGateway, tmp_path: Path) -> None:
    """The part files that a killed process left of an image are removed before the image is downloaded; others stay."""
    part = await interrupt_download(scripted, tmp_path)
    (tmp_path / "cats" / part).write_bytes(RED[:100])
    (tmp_path / "cats" / ".another.program.part").write_bytes(b"")
    (outcome,) = await run(journal_session(scripted, tmp_path), "a cat", save_to=tmp_path / "cats")

    assert outcome.replayed
    assert outcome.saved == (tmp_path / "cats" / "t1.jpeg",)
    assert names(tmp_path / "cats") == [".another.program.part", "t1.jpeg"]
    assert len(scripted.of("POST")) == 1


async def test_part_file_that_cannot_be_removed(scripted: ScriptedGateway, tmp_path: Path) -> None:
    """An error of the file system is the outcome's save_error, and the outcome isn't lost."""
    part = await interrupt_download(scripted, tmp_path)
    (tmp_path / "cats" / part).mkdir()
    (outcome,) = await run(journal_session(scripted, tmp_path), "a cat", save_to=tmp_path / "cats")

    assert isinstance(outcome.save_error, DownloadError)
    assert isinstance(outcome.save_error.__cause__, OSError)
    assert outcome.images


# ---------------------------------------------------------------------- saving and look-ahead


async def test_saving_does_not_delay_submits(scripted: ScriptedGateway, tmp_path: Path) -> None:
    """If downloads take as long as tasks, all slots are used, because saving has a limit of its own."""
    delivered_at: dict[str, float] = {}

    async def poll(connection: Connection) -> None:
        task_id = connection.call.path.rpartition("/")[2]
        await answer(200, completed(task_id, url=f"{scripted.url}/{task_id}.jpeg"))(connection)

    scripted.submits = deque(answer(200, running(f"t{number}")) for number in range(24))
    scripted.polls = deque([poll])
    scripted.downloads = deque([answer(200, RED, after=4.0)])
    schedule = FixedSchedule(4.0)
    async with FluxSession(scripted.api_key, base_url=scripted.url, max_in_flight=4, schedule=schedule) as session:
        started = anyio.current_time()
        async for outcome in session.stream([f"cat {number}" for number in range(24)], save_to=tmp_path, name=by_id):
            delivered_at[outcome.unwrap().task_id] = anyio.current_time() - started

    # 24 tasks of 4 s in 4 slots take 24 s, the first and the last download 4 s each; one after the other they take 48 s.
    assert max(delivered_at.values()) < 36.0
    assert len(names(tmp_path)) == 24


async def test_slow_saving_delays_submits_eventually(scripted: ScriptedGateway, tmp_path: Path) -> None:
    """If saving is much slower than the service, submits wait for it eventually."""
    scripted.submits = deque(answer(200, completed(f"t{n}", url=f"{scripted.url}/{n}.jpeg")) for n in range(100))
    scripted.downloads = deque([answer(200, RED), answer(200, RED, after=50.0)])
    async with session_on(scripted, max_in_flight=4) as session:
        stream = session.stream([f"cat {number}" for number in range(100)], save_to=tmp_path, name=by_id)
        await anext(stream)
        consumer = asyncio.ensure_future(anext(stream))
        await anyio.sleep(40.0)
        submitted = len(scripted.of("POST"))
        await consumer
        await stream.aclose()

    assert 9 <= submitted <= 13  # 1 delivered, twice the look-ahead being saved, and the look-ahead
