"""Streams that save: each picture as its task ends, under a name of its own, never over another one, and never twice."""

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
from flux2max_async._downloads.filenames import file_name
from flux2max_async._downloads.saver import _link, _move
from flux2max_async.emulator import Emulator


def drawn(colour: str, kind: str = "JPEG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (16, 16), colour).save(file, kind)
    return file.getvalue()


RED, BLUE = drawn("red"), drawn("blue")
HALF = raw(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n" + RED, then="hang")


def serve(scripted: ScriptedGateway, *tasks: bytes | Behaviour | list[bytes | Behaviour]) -> None:
    """Let each submit be a task that is completed at once, with these pictures."""
    pictures = [task if isinstance(task, list) else [task] for task in tasks]

    def end_of(number: int) -> dict[str, object]:
        urls = [f"{scripted.url}/{number}/{index}" for index in range(len(pictures[number - 1]))]
        return completed(f"t{number}", output=[{"content": [{"type": "image", "url": url} for url in urls]}])

    async def poll(connection: Connection) -> None:
        await answer(200, end_of(int(connection.call.path.rpartition("/t")[2])))(connection)

    async def download(connection: Connection) -> None:
        _, number, index = connection.call.path.split("/")
        found = pictures[int(number) - 1][int(index)]
        await (answer(200, found) if isinstance(found, bytes) else found)(connection)

    scripted.submits = deque(answer(200, end_of(number)) for number in range(1, len(tasks) + 1))
    scripted.polls = deque([poll])
    scripted.downloads = deque([download])


def downloads(scripted: ScriptedGateway) -> list[str]:
    return [call.path for call in scripted.of("GET") if "/task/" not in call.path]


async def run(session: FluxSession, *requests: str | GenerationRequest, **options: Any) -> list[Completed]:
    async with session:
        return [outcome.unwrap() async for outcome in session.stream(requests, **options)]


async def save_one(scripted: ScriptedGateway, content: bytes, folder: Path, name: str = "cat") -> Completed:
    serve(scripted, content)
    (outcome,) = await run(session_on(scripted), "a cat", save_to=folder, name=lambda _: name)
    return outcome


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ---------------------------------------------------------------------- as each task ends


async def test_each_picture_is_saved_while_other_tasks_run(tmp_path: Path) -> None:
    """Each outcome comes with the file of its picture, whole, long before the last task has ended."""
    saved: dict[str, tuple[Path, ...]] = {}
    running_then: list[int] = []
    async with Emulator(seconds=8.0, spread=0.5, seed=1) as gateway:
        async with FluxSession(gateway.api_key, base_url=gateway.url, schedule=FixedSchedule(0.5)) as session:
            requests = (GenerationRequest(f"cat {number}", width=64, height=64) for number in range(12))
            async for outcome in session.stream(requests, save_to=tmp_path / "new" / "folder"):
                saved[outcome.unwrap().task_id] = outcome.unwrap().saved
                running_then.append(session.stats.in_flight)
                with Image.open(saved[outcome.unwrap().task_id][0]) as image:
                    image.load()

        assert gateway.calls["download"] == 12
    assert saved == {task_id: (tmp_path / "new" / "folder" / f"{task_id}.jpeg",) for task_id in gateway.tasks}
    assert names(tmp_path / "new" / "folder") == sorted(f"{task_id}.jpeg" for task_id in gateway.tasks)
    assert running_then[0] > 6


async def test_a_slow_download_holds_nobody_up(scripted: ScriptedGateway, tmp_path: Path) -> None:
    """A picture that takes long to come is delivered when it is saved, after those that came sooner."""
    serve(scripted, answer(200, RED, after=20.0), BLUE)
    outcomes = await run(session_on(scripted), "slow", "quick", save_to=str(tmp_path))

    assert [outcome.request and outcome.request.prompt for outcome in outcomes] == ["quick", "slow"]
    assert [path.read_bytes() for outcome in outcomes for path in outcome.saved] == [BLUE, RED]


async def test_failures_have_nothing_to_save(session: FluxSession, tmp_path: Path) -> None:
    """A task that fails is yielded as ever, and no file is made for it."""
    outcomes = [outcome async for outcome in session.stream(["dog [fail]"], save_to=tmp_path)]

    assert [outcome.ok for outcome in outcomes] == [False]
    assert names(tmp_path) == []


async def test_a_name_needs_a_folder(session: FluxSession) -> None:
    """A name for files that are not saved is a mistake, told before anything is sent."""
    with pytest.raises(InvalidRequestError, match="save_to") as caught:
        session.stream(["a cat"], name=lambda _: "cat")

    assert caught.value.field == "name"


# ---------------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("request_", "name", "expected"),
    [
        pytest.param("a cat", None, "t1.jpeg", id="the task's id"),
        pytest.param(GenerationRequest("a cat", key="row 1/2"), None, "row 1-2.jpeg", id="the key"),
        pytest.param(GenerationRequest("a cat", key="row 1"), lambda done: done.task_id * 2, "t1t1.jpeg", id="a name"),
        pytest.param("a cat", lambda done: done.request.prompt + ".png", "a cat.png", id="with an ending"),
        pytest.param("a cat", lambda _: "cat.JPG", "cat.JPG", id="with a loud ending"),
        pytest.param("a cat", lambda _: "no. 7.5", "no. 7.5.jpeg", id="with a dot"),
        pytest.param("a cat", lambda _: "../../etc/passwd", "etc-passwd.jpeg", id="with a way out"),
    ],
)
async def test_a_picture_is_called(
    scripted: ScriptedGateway, tmp_path: Path, request_: Any, name: Any, expected: str
) -> None:
    """A picture is called by its name, its request's key or its task's id, and keeps an ending that it was given."""
    serve(scripted, RED)
    (outcome,) = await run(session_on(scripted), request_, save_to=tmp_path / "here", name=name)

    assert outcome.saved == (tmp_path / "here" / expected,)
    assert names(tmp_path / "here") == [expected]
    assert names(tmp_path) == ["here"]


@pytest.mark.parametrize(
    ("content", "output_format", "ending"),
    [
        pytest.param(picture("PNG"), "jpeg", "png", id="PNG"),
        pytest.param(picture("JPEG"), "png", "jpeg", id="JPEG"),
        pytest.param(picture("WEBP"), "png", "webp", id="WebP"),
        pytest.param(picture("GIF"), "png", "png", id="something that was asked for as PNG"),
        pytest.param(b"?", None, "jpeg", id="something"),
        pytest.param(b"RIFF\x04\0\0\0AVI LIST", None, "jpeg", id="RIFF that is no WebP"),
    ],
)
async def test_the_ending_is_that_of_the_content(
    scripted: ScriptedGateway, tmp_path: Path, content: bytes, output_format: Any, ending: str
) -> None:
    """The ending says what the picture is; where its bytes don't tell, what was asked for."""
    serve(scripted, content)
    request = GenerationRequest("a cat", output_format=output_format)
    (outcome,) = await run(session_on(scripted), request, save_to=tmp_path)

    assert outcome.saved == (tmp_path / f"t1.{ending}",)


async def test_several_pictures_of_a_task_are_numbered(scripted: ScriptedGateway, tmp_path: Path) -> None:
    """All pictures of a task are saved, in their order."""
    serve(scripted, [RED, BLUE, drawn("green")])
    (outcome,) = await run(session_on(scripted), GenerationRequest("cats", key="cats"), save_to=tmp_path)

    assert outcome.saved == tuple(tmp_path / name for name in ("cats.jpeg", "cats-2.jpeg", "cats-3.jpeg"))
    assert [path.read_bytes() for path in outcome.saved] == [RED, BLUE, drawn("green")]


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
def test_a_text_becomes_a_name(text: str, expected: str) -> None:
    """What a file's name can't hold somewhere is replaced, and what can stays."""
    assert file_name(text) == expected


RESERVED = re.compile(r"(con|prn|aux|nul|(com|lpt)[1-9¹²³]) *(\..*)?", re.IGNORECASE | re.DOTALL)
TRICKY = st.text(st.sampled_from("conCONauxprnul1¹ ./\\:-\0\n\ud800é\u0301😀猫"))


@given(st.one_of(st.text(), TRICKY))
def test_any_text_gives_a_name(text: str) -> None:
    """Whatever the text, its name is one component of a path, short, encodable and reserved nowhere."""
    name = file_name(text)

    assert PurePosixPath(name).parts == PureWindowsPath(name).parts == (name,)
    assert 0 < len(name.encode()) <= 130
    assert name.isprintable()
    assert name == name.strip(" .")
    assert not RESERVED.fullmatch(name)


# ---------------------------------------------------------------------- never over another picture


def marks(path: Path) -> tuple[int, ...]:
    """Tell whether something is still the same; that it was looked at makes no difference."""
    found = path.lstat()
    return found.st_ino, found.st_mode, found.st_nlink, found.st_size, found.st_mtime_ns


@pytest.mark.parametrize(
    "there",
    [
        pytest.param(lambda path: path.write_bytes(BLUE + b"!"), id="a picture of another size"),
        pytest.param(lambda path: path.write_bytes(BLUE), id="a picture of the same size"),
        pytest.param(lambda path: path.mkdir(), id="a folder"),
        pytest.param(lambda path: path.symlink_to("nothing"), id="a link to nothing"),
        pytest.param(lambda path: path.symlink_to(path), id="a link to itself"),
        pytest.param(os.mkfifo, id="a pipe"),
    ],
)
async def test_nothing_else_is_replaced(
    scripted: ScriptedGateway, tmp_path: Path, there: Callable[[Path], object]
) -> None:
    """Whatever is under a name already stays as it was, and the picture gets the next name."""
    there(tmp_path / "cat.jpeg")
    before = marks(tmp_path / "cat.jpeg")
    outcome = await save_one(scripted, RED, tmp_path)

    assert len(RED) == len(BLUE)
    assert outcome.saved == (tmp_path / "cat-2.jpeg",)
    assert outcome.saved[0].read_bytes() == RED
    assert marks(tmp_path / "cat.jpeg") == before
    assert names(tmp_path) == ["cat-2.jpeg", "cat.jpeg"]


@pytest.mark.parametrize("big", [False, True])
async def test_the_same_picture_is_not_kept_twice(scripted: ScriptedGateway, tmp_path: Path, big: bool) -> None:
    """Where the same picture is under the name already, it is that file, untouched."""
    content = RED + bytes(3_000_000 if big else 0)
    (tmp_path / "cat.jpeg").write_bytes(b"something else")
    (tmp_path / "elsewhere.jpeg").write_bytes(content)
    (tmp_path / "cat-2.jpeg").symlink_to("elsewhere.jpeg")
    outcome = await save_one(scripted, content, tmp_path)

    assert outcome.saved == (tmp_path / "cat-2.jpeg",)
    assert names(tmp_path) == ["cat-2.jpeg", "cat.jpeg", "elsewhere.jpeg"]


async def test_many_pictures_of_one_name_all_stay(scripted: ScriptedGateway, tmp_path: Path) -> None:
    """Pictures that are saved at once under the same name get numbers, and none is lost."""
    pictures = [RED + bytes([number]) for number in range(20)]
    serve(scripted, *pictures)
    requests = [f"cat {number}" for number in range(20)]
    outcomes = await run(session_on(scripted), *requests, save_to=tmp_path, name=lambda _: "cat")

    assert {path.read_bytes() for outcome in outcomes for path in outcome.saved} == set(pictures)
    assert names(tmp_path) == sorted(["cat.jpeg", *(f"cat-{number}.jpeg" for number in range(2, 21))])


class Busy(VirtualJournal):
    """A journal in whose folder somebody else is at work: they take a name in the moment before it is given."""

    intruder = BLUE

    async def record(self, entry: JournalEntry, /) -> None:
        await super().record(entry)
        if entry.files and (path := entry.files[-1].path).name == "t1.jpeg" and not path.exists():
            path.write_bytes(self.intruder)


@pytest.mark.parametrize(
    ("intruder", "expected"),
    [pytest.param(BLUE, "t1-2.jpeg", id="another picture"), pytest.param(RED, "t1.jpeg", id="the same picture")],
)
async def test_a_name_that_is_taken_in_the_last_moment(
    scripted: ScriptedGateway, tmp_path: Path, intruder: bytes, expected: str
) -> None:
    """A name that was free when it was looked at and isn't any more is left to whoever has it."""
    serve(scripted, RED)
    journal = Busy(tmp_path / "run.db")
    journal.intruder = intruder
    (outcome,) = await run(session_on(scripted, journal=journal), "a cat", save_to=tmp_path / "cats")

    assert outcome.saved == (tmp_path / "cats" / expected,)
    assert outcome.saved[0].read_bytes() == RED
    assert (tmp_path / "cats" / "t1.jpeg").read_bytes() == intruder


def test_what_cannot_be_linked_is_moved(tmp_path: Path) -> None:
    """Where there are no hard links, a name that is taken stays so, and one that is free isn't taken in vain."""
    part, there = tmp_path / "part", tmp_path / "there"
    part.write_bytes(RED)
    moved = _move(part, there)
    part.write_bytes(BLUE)
    again = _move(part, there)
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="ot a directory"):
        _link(tmp_path / "folder", tmp_path / "new")  # of a folder, there is no hard link

    assert (moved, again) == (True, False)
    assert there.read_bytes() == RED
    assert names(tmp_path) == ["folder", "part", "there"]


# ---------------------------------------------------------------------- what goes wrong


async def test_a_failed_download_loses_nothing(scripted: ScriptedGateway, tmp_path: Path) -> None:
    """A picture that can't be fetched is told beside its outcome, which keeps its url; the others are saved."""
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


@pytest.mark.parametrize("wrong", [None, 7, b"cat", Path("cat")])
async def test_a_name_that_is_no_text_is_told(scripted: ScriptedGateway, tmp_path: Path, wrong: object) -> None:
    """A name that is no text is the outcome's save_error, and nothing is fetched for it."""
    serve(scripted, RED)
    (outcome,) = await run(session_on(scripted), "a cat", save_to=tmp_path, name=lambda _: wrong)

    assert isinstance(outcome.save_error, DownloadError)
    assert "name must be text" in str(outcome.save_error)
    assert downloads(scripted) == []


@pytest.mark.parametrize("problem", [KeyError("t1"), PermissionError(errno.EACCES, "not your list of names")])
async def test_a_name_that_cannot_be_found_is_told(
    scripted: ScriptedGateway, tmp_path: Path, problem: Exception
) -> None:
    """What `name` raises is told by its outcome's save_error, and whatever it is, the stream goes on."""

    def name(outcome: Completed) -> str:
        if outcome.task_id == "t1":
            raise problem
        return outcome.task_id

    pictures = [RED + bytes([number]) for number in range(5)]
    serve(scripted, *pictures)
    session = session_on(scripted, max_in_flight=1)
    first, *rest = await run(session, *"12345", save_to=tmp_path, name=name)

    assert isinstance(first.save_error, DownloadError)
    assert repr(problem) in str(first.save_error)
    assert first.save_error.__context__ is problem
    assert [outcome.saved[0].read_bytes() for outcome in rest] == pictures[1:]


@pytest.mark.parametrize(
    "folder",
    [
        pytest.param("/proc/nobody/can/write/here", id="not writable"),
        pytest.param("file/below", id="below a file"),
        pytest.param("file", id="a file"),
        pytest.param("a\0b", id="no path"),
    ],
)
async def test_a_folder_that_is_no_use_is_told_at_once(scripted: ScriptedGateway, tmp_path: Path, folder: str) -> None:
    """Where no picture could be saved, none is bought, and the source isn't touched."""
    (tmp_path / "file").write_bytes(b"something")
    source = iter(["a cat"])
    async with session_on(scripted) as session:
        with pytest.raises(DownloadError, match="can't write"):
            await anext(session.stream(source, save_to=tmp_path / folder))

    assert scripted.received == []
    assert next(source) == "a cat"


async def until_it_stops(session: FluxSession, folder: Path, outcomes: list[Outcome]) -> DownloadError:
    """Stream without end until the disk ends it."""
    async with session:
        with pytest.raises(DownloadError) as caught:
            async for outcome in session.stream((f"cat {number}" for number in itertools.count()), save_to=folder):
                outcomes.append(outcome)
    return caught.value


@pytest.mark.usefixtures("small_disk")
async def test_a_full_disk_stops_the_stream(scripted: ScriptedGateway, tmp_path: Path) -> None:
    """Once no picture fits, nothing more is bought; what is running is still delivered, then the error is raised."""
    ended = anyio.current_time() + 100
    serve(scripted, bytes(3_000_000), RED, BLUE)
    end_of = scripted.polls[0]

    async def poll(connection: Connection) -> None:
        task_id = connection.call.path.rpartition("/")[2]
        still = answer(200, running(task_id))
        await (end_of if anyio.current_time() > ended else still)(connection)

    scripted.submits = deque([answer(200, running(f"t{number}")) for number in (2, 3)])
    scripted.submits.appendleft(answer(200, completed("t1", f"{scripted.url}/1/0"), after=20.0))
    scripted.polls = deque([poll])
    outcomes: list[Outcome] = []
    error = await until_it_stops(session_on(scripted, max_in_flight=3), tmp_path, outcomes)
    first, *rest = (outcome.unwrap() for outcome in outcomes)

    assert len(scripted.of("POST")) == 3
    assert (first.task_id, first.save_error) == ("t1", error)
    assert {outcome.task_id for outcome in rest} == {"t2", "t3"}
    assert all(outcome.saved for outcome in rest)
    assert names(tmp_path) == ["t2.jpeg", "t3.jpeg"]


async def test_a_folder_that_is_lost_stops_the_stream(gateway: Emulator, tmp_path: Path) -> None:
    """A folder that can't be written any more ends the stream, after all that is paid for is delivered."""
    session = FluxSession(gateway.api_key, base_url=gateway.url, max_in_flight=2, schedule=FixedSchedule(1.0))
    outcomes: list[Outcome] = []

    async def lose() -> None:
        await anyio.sleep(30)
        (tmp_path / "disk").rename(tmp_path / "gone")
        (tmp_path / "disk").write_bytes(b"")

    async with anyio.create_task_group() as group:
        group.start_soon(lose)
        await until_it_stops(session, tmp_path / "disk" / "cats", outcomes)

    assert len(outcomes) == gateway.calls["submit"]
    assert all(outcome.ok for outcome in outcomes)
    assert len(names(tmp_path / "gone" / "cats")) == sum(outcome.unwrap().save_error is None for outcome in outcomes)


# ---------------------------------------------------------------------- leaving


async def test_leaving_the_stream_lets_a_picture_come(scripted: ScriptedGateway, tmp_path: Path) -> None:
    """A picture that is on its way when its stream is left is still saved, while the session lasts."""
    serve(scripted, RED, answer(200, BLUE, after=20.0))
    async with session_on(scripted) as session:
        async with session.stream(["1", "2"], save_to=tmp_path) as stream:
            await anext(stream)
        left = names(tmp_path)
        await anyio.sleep(60)
        with pytest.raises(StopAsyncIteration):
            await anext(stream)

    assert "t2.jpeg" not in left
    assert [task.id for task in stream.unfinished] == ["t2"]
    assert names(tmp_path) == ["t1.jpeg", "t2.jpeg"]


async def test_closing_the_session_while_a_picture_comes(scripted: ScriptedGateway, tmp_path: Path) -> None:
    """Who waits for a picture when the session is closed gets the outcome, and why it isn't saved; no part is left."""
    serve(scripted, HALF)
    session = session_on(scripted)
    await session.__aenter__()
    stream = session.stream(["a cat"], save_to=tmp_path)
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


async def test_leaving_both_while_a_picture_comes(scripted: ScriptedGateway, tmp_path: Path) -> None:
    """Leaving the stream and then the session, in the middle of a download, leaves no part and doesn't hang."""
    serve(scripted, RED, HALF)
    async with session_on(scripted) as session, session.stream(["1", "2"], save_to=tmp_path) as stream:
        await anext(stream)
        await anyio.sleep(5)

    assert names(tmp_path) == ["t1.jpeg"]


@pytest.mark.parametrize("steps", [0, 8, 16, 32, 64, 128, 256, 512])
async def test_closing_at_any_moment_leaves_no_part(scripted: ScriptedGateway, tmp_path: Path, steps: int) -> None:
    """Wherever in its saving a closed session hits a picture, it is there whole or not at all, and its outcome comes."""
    begun = asyncio.Event()

    async def begin(connection: Connection) -> None:
        begun.set()
        await answer(200, RED)(connection)

    serve(scripted, begin, [begin, BLUE])
    session = session_on(scripted)
    await session.__aenter__()
    stream = session.stream(["1", "2"], save_to=tmp_path)
    waiting = asyncio.ensure_future(anext(stream))
    await begun.wait()
    for _ in range(steps):
        await asyncio.sleep(0)
    await session.aclose()
    outcomes = [await waiting, *[outcome async for outcome in stream]]

    assert len(outcomes) == 2
    assert all(isinstance(outcome, Completed) and (outcome.saved or outcome.save_error) for outcome in outcomes)
    assert not [name for name in names(tmp_path) if not name.startswith("t")]
    assert all(path.read_bytes() in (RED, BLUE) for path in tmp_path.iterdir())


# ---------------------------------------------------------------------- once more, with a journal

CATS = [GenerationRequest(f"cat {number}", width=64, height=64, key=f"cat {number}") for number in range(5)]


@pytest.fixture
async def painter() -> AsyncIterator[Emulator]:
    """A gateway whose pictures differ."""
    async with Emulator(seconds=8.0, spread=0.0, seed=1) as gateway:
        yield gateway


def book(gateway: Emulator | ScriptedGateway, tmp_path: Path) -> FluxSession:
    """Give a session on the same journal, as the next run of a program would have."""
    journal = VirtualJournal(tmp_path / "run.db")
    return FluxSession(gateway.api_key, base_url=gateway.url, schedule=FixedSchedule(1.0), journal=journal)


@pytest.mark.parametrize(
    ("damage", "again"),
    [
        pytest.param(lambda folder: None, 0, id="nothing"),
        pytest.param(lambda folder: (folder / "cat 1.jpeg").unlink(), 1, id="a file is gone"),
        pytest.param(lambda folder: os.truncate(folder / "cat 2.jpeg", 100), 1, id="a file is cut"),
        pytest.param(lambda folder: [path.unlink() for path in folder.iterdir()], 5, id="all are gone"),
    ],
)
async def test_a_rerun_fetches_only_what_is_missing(
    painter: Emulator, tmp_path: Path, damage: Callable[[Path], object], again: int
) -> None:
    """What is on disk and whole isn't fetched once more, what isn't is, and nothing is submitted or polled."""
    folder = tmp_path / "cats"
    first = await run(book(painter, tmp_path), *CATS, save_to=folder)
    pictures = {path: path.read_bytes() for outcome in first for path in outcome.saved}
    calls = painter.calls.copy()
    damage(folder)
    second = await run(book(painter, tmp_path), *CATS, save_to=folder)
    third = await run(book(painter, tmp_path), *CATS, save_to=folder)

    assert painter.calls - calls == ({"download": again} if again else {})
    assert all(outcome.replayed and outcome.save_error is None for outcome in second)
    assert all(path.read_bytes() in pictures.values() for outcome in second for path in outcome.saved)
    assert len({path.read_bytes() for outcome in second for path in outcome.saved}) == 5
    assert {outcome.saved for outcome in third} == {outcome.saved for outcome in second}


async def test_a_folder_that_has_moved_is_known_again(painter: Emulator, tmp_path: Path) -> None:
    """Pictures are known by name and size wherever their folder is now; in a new folder they are fetched once more."""
    first = await run(book(painter, tmp_path), *CATS, save_to=tmp_path / "cats")
    (tmp_path / "cats").rename(tmp_path / "moved")
    second = await run(book(painter, tmp_path), *CATS, save_to=tmp_path / "moved")
    fetched = painter.calls["download"]
    third = await run(book(painter, tmp_path), *CATS, save_to=tmp_path / "copies")

    assert (fetched, painter.calls["download"]) == (5, 10)
    moved = {outcome.saved for outcome in second}
    assert moved == {(tmp_path / "moved" / path.name,) for outcome in first for path in outcome.saved}
    assert {outcome.saved for outcome in third} == {(tmp_path / "copies" / path.name,) for (path,) in moved}


async def test_an_expired_url_is_refreshed(painter: Emulator, tmp_path: Path) -> None:
    """A picture that is missing long after its url has expired is fetched again, by one poll for its task."""
    await run(book(painter, tmp_path), *CATS, save_to=tmp_path / "cats")
    (tmp_path / "cats" / "cat 3.jpeg").unlink()
    await anyio.sleep(86_400)
    calls = painter.calls.copy()
    await run(book(painter, tmp_path), *CATS, save_to=tmp_path / "cats")

    assert painter.calls - calls == {"poll": 1, "download": 2}
    assert len(names(tmp_path / "cats")) == 5


async def test_a_picture_that_the_service_has_lost(painter: Emulator, tmp_path: Path) -> None:
    """Where the service gives no fresh url, the outcome says that it has expired, and for which task."""
    outcomes = await run(book(painter, tmp_path), *CATS, save_to=tmp_path / "cats")
    lost = outcomes[0]
    lost.saved[0].unlink()
    del painter.tasks[lost.task_id]
    again = await run(book(painter, tmp_path), *CATS, save_to=tmp_path / "cats")

    (missing,) = (outcome for outcome in again if outcome.save_error)
    assert missing.task_id == lost.task_id
    assert isinstance(missing.save_error, ResultExpiredError)
    assert missing.save_error.task_id == lost.task_id
    assert missing.saved == ()


@pytest.mark.parametrize("missing", ["cats.jpeg", "cats-2.jpeg", "cats-3.jpeg"])
async def test_one_of_several_pictures_is_missing(scripted: ScriptedGateway, tmp_path: Path, missing: str) -> None:
    """Of a task with several pictures, only the one that isn't there is fetched again, each keeping its name."""
    serve(scripted, [RED, BLUE, drawn("green")])
    cats = GenerationRequest("cats", key="cats")
    (first,) = await run(book(scripted, tmp_path), cats, save_to=tmp_path / "cats")
    (tmp_path / "cats" / missing).unlink()
    (second,) = await run(book(scripted, tmp_path), cats, save_to=tmp_path / "cats")

    assert second.saved == first.saved
    assert [path.read_bytes() for path in second.saved] == [RED, BLUE, drawn("green")]
    assert len(downloads(scripted)) == 4


async def interrupted(scripted: ScriptedGateway, tmp_path: Path) -> str:
    """Close a session in the middle of a download, and give what the part was called that it took away."""
    serve(scripted, HALF)
    async with book(scripted, tmp_path) as session:
        async with session.stream(["a cat"], save_to=tmp_path / "cats") as stream:
            waiting = asyncio.ensure_future(anext(stream))
            await anyio.sleep(5)
            (part,) = names(tmp_path / "cats")
        await asyncio.wait([waiting])
    assert isinstance(waiting.exception(), StopAsyncIteration)
    serve(scripted, RED)
    return part


async def test_the_parts_of_a_killed_run_are_swept(scripted: ScriptedGateway, tmp_path: Path) -> None:
    """What a killed process has left of a picture is removed when the picture is fetched again, and nothing else is."""
    part = await interrupted(scripted, tmp_path)
    (tmp_path / "cats" / part).write_bytes(RED[:100])
    (tmp_path / "cats" / ".somebody.else.part").write_bytes(b"")
    (outcome,) = await run(book(scripted, tmp_path), "a cat", save_to=tmp_path / "cats")

    assert outcome.replayed
    assert outcome.saved == (tmp_path / "cats" / "t1.jpeg",)
    assert names(tmp_path / "cats") == [".somebody.else.part", "t1.jpeg"]
    assert len(scripted.of("POST")) == 1


async def test_a_part_that_cannot_be_swept_is_told(scripted: ScriptedGateway, tmp_path: Path) -> None:
    """Whatever the disk says on the way to a picture is its outcome's save_error, and the outcome isn't lost."""
    part = await interrupted(scripted, tmp_path)
    (tmp_path / "cats" / part).mkdir()
    (outcome,) = await run(book(scripted, tmp_path), "a cat", save_to=tmp_path / "cats")

    assert isinstance(outcome.save_error, DownloadError)
    assert isinstance(outcome.save_error.__cause__, OSError)
    assert outcome.images
