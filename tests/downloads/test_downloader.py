"""Saving: streamed, resumed, whole or not at all, and without the key."""

import asyncio
import contextlib
import errno
from collections import deque
from pathlib import Path
from typing import Any

import anyio
import pytest
from PIL import Image
from support.scripted import Behaviour, Connection, ScriptedGateway, answer, completed, hang, raw, session_on

from flux2max_async import DownloadError, FluxSession, GeneratedImage, ResultExpiredError, SessionClosedError
from flux2max_async.emulator import Emulator, Fault

PICTURE = bytes(range(256)) * 12_000  # 3 MB


def image_at(scripted: ScriptedGateway, path: str = "/0.jpeg") -> GeneratedImage:
    return GeneratedImage(scripted.url + path, "image", "t1")


def part(start: int, *, etag: str = '"v1"', total: int = len(PICTURE)) -> Behaviour:
    return answer(206, PICTURE[start:], [("Content-Range", f"bytes {start}-{total - 1}/{total}"), ("ETag", etag)])


def cut(after: int, *headers: str) -> Behaviour:
    head = "\r\n".join(["HTTP/1.1 200 OK", f"Content-Length: {len(PICTURE)}", *headers, "", ""])
    return raw(head.encode() + PICTURE[:after])


OFFERED = ("Accept-Ranges: bytes", 'ETag: "v1"')


async def save(scripted: ScriptedGateway, target: Path, **options: object) -> Path:
    async with session_on(scripted, **options) as session:
        return await session.save(image_at(scripted), target)


async def test_a_real_picture_is_saved(session: FluxSession, tmp_path: Path) -> None:
    """The file holds the picture that the service drew, and the path is given back."""
    async with Emulator(seconds=1.0, seed=1) as gateway, FluxSession(gateway.api_key, base_url=gateway.url) as real:
        outcome = await real.generate("a lighthouse at dawn", width=320, height=200, output_format="png")
        path = await real.save(outcome.images[0], tmp_path / "new folder" / "lighthouse.png")

    with Image.open(path) as picture:
        assert (picture.format, picture.size) == ("PNG", (320, 200))
    assert [file.name for file in path.parent.iterdir()] == ["lighthouse.png"]


async def test_the_key_stays_at_home(scripted: ScriptedGateway, tmp_path: Path) -> None:
    """Neither the host of the picture nor one that it redirects to sees the key."""
    async with ScriptedGateway() as elsewhere:
        elsewhere.downloads = deque([answer(200, PICTURE)])
        scripted.downloads = deque([answer(302, b"", [("Location", f"{elsewhere.url}/there.jpeg")])])
        path = await save(scripted, tmp_path / "a.jpeg")

        calls = scripted.received + elsewhere.received
    assert path.read_bytes() == PICTURE
    assert len(calls) == 2
    assert all("Authorization" not in call.headers for call in calls)
    assert all(scripted.api_key not in str(call) for call in calls)


async def test_a_cut_download_is_resumed(scripted: ScriptedGateway, tmp_path: Path) -> None:
    """Where the server offers ranges, only the rest is asked for, and only if it is still the same picture."""

    async def the_rest(connection: Connection) -> None:
        start = int(connection.call.headers["Range"].removeprefix("bytes=").removesuffix("-"))
        await part(start)(connection)

    scripted.downloads = deque([cut(1_500_000, *OFFERED), the_rest])
    path = await save(scripted, tmp_path / "a.jpeg")

    assert path.read_bytes() == PICTURE
    assert scripted.received[1].headers["Range"] != "bytes=0-"
    assert scripted.received[1].headers["If-Range"] == '"v1"'


@pytest.mark.parametrize(
    "headers",
    [
        pytest.param(('ETag: "v1"',), id="ranges not offered"),
        pytest.param(("Accept-Ranges: bytes", "Content-Encoding: identity"), id="encoded"),
    ],
)
async def test_without_ranges_it_starts_again(
    scripted: ScriptedGateway, tmp_path: Path, headers: tuple[str, ...]
) -> None:
    """Where the server offers no ranges, a cut download starts from its first byte."""
    scripted.downloads = deque([cut(1_500_000, *headers), answer(200, PICTURE)])
    path = await save(scripted, tmp_path / "a.jpeg")

    assert path.read_bytes() == PICTURE
    assert "Range" not in scripted.received[1].headers


@pytest.mark.parametrize(
    "second",
    [
        pytest.param(part(7), id="another range"),
        pytest.param(answer(416, b""), id="416"),
        pytest.param(answer(206, PICTURE[1_500_000:]), id="no Content-Range"),
    ],
)
async def test_a_wrong_rest_is_not_glued_on(scripted: ScriptedGateway, tmp_path: Path, second: Behaviour) -> None:
    """A rest that isn't the one asked for is thrown away, and the picture fetched from its first byte."""
    scripted.downloads = deque([cut(1_500_000, *OFFERED), second, answer(200, PICTURE)])
    path = await save(scripted, tmp_path / "a.jpeg")

    assert path.read_bytes() == PICTURE


async def test_a_changed_picture_is_taken_whole(scripted: ScriptedGateway, tmp_path: Path) -> None:
    """A server that answers a range with the whole picture is believed."""
    scripted.downloads = deque([cut(1_500_000, "Accept-Ranges: bytes", 'ETag: W/"weak"'), answer(200, PICTURE[::-1])])
    path = await save(scripted, tmp_path / "a.jpeg")

    assert path.read_bytes() == PICTURE[::-1]
    assert "If-Range" not in scripted.received[1].headers


@pytest.mark.parametrize(
    "behaviour",
    [
        *(pytest.param(answer(status, b""), id=str(status)) for status in (408, 429, 500, 503)),
        pytest.param(hang, id="hung"),
        pytest.param(raw(b""), id="disconnected"),
        pytest.param(raw(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nabc", then="hang"), id="stalled"),
    ],
)
async def test_downloads_are_repeated(scripted: ScriptedGateway, tmp_path: Path, behaviour: Behaviour) -> None:
    """What may pass passes, by trying again."""
    scripted.downloads = deque([behaviour, behaviour, answer(200, PICTURE)])
    path = await save(scripted, tmp_path / "a.jpeg")

    assert path.read_bytes() == PICTURE


@pytest.mark.parametrize(
    ("behaviour", "message"),
    [
        pytest.param(answer(503, b""), "5 times in a row", id="always 503"),
        pytest.param(answer(400, b""), "HTTP 400", id="400"),
        pytest.param(raw(b"SSH-2.0\r\n\r\n"), "can't download", id="no HTTP"),
        pytest.param(raw(b"HTTP/1.1 200 OK\r\nContent-Length: 100000001\r\n\r\n"), "100 MB", id="declared too large"),
    ],
)
async def test_a_failed_download_leaves_nothing(
    scripted: ScriptedGateway, tmp_path: Path, behaviour: Behaviour, message: str
) -> None:
    """When it can't be fetched, the error says why, and no file is left: neither a part, nor a broken target."""
    target = tmp_path / "a.jpeg"
    target.write_bytes(b"what was here before")
    scripted.downloads = deque([behaviour])
    with pytest.raises(DownloadError, match=message):
        await save(scripted, target)

    assert target.read_bytes() == b"what was here before"
    assert list(tmp_path.iterdir()) == [target]


async def test_an_endless_download_is_refused(scripted: ScriptedGateway, tmp_path: Path) -> None:
    """A picture whose size isn't announced is refused once it passes 100 MB."""
    scripted.downloads = deque([raw(b"HTTP/1.1 200 OK\r\n\r\n" + bytes(100_000_001))])
    with pytest.raises(DownloadError, match="100 MB"):
        await save(scripted, tmp_path / "a.jpeg")

    assert list(tmp_path.iterdir()) == []


async def test_a_trickling_download_ends_with_the_deadline(scripted: ScriptedGateway, tmp_path: Path) -> None:
    """A download that never stalls and never ends is given up at the deadline."""

    async def trickle(connection: Connection) -> None:
        await connection.send(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n")
        while True:
            await connection.send(b"x")
            await anyio.sleep(10)

    scripted.downloads = deque([trickle])
    with pytest.raises(DownloadError, match="100 s"):
        await save(scripted, tmp_path / "a.jpeg", task_timeout=100.0)

    assert list(tmp_path.iterdir()) == []


async def test_without_a_deadline_a_download_has_none(scripted: ScriptedGateway, tmp_path: Path) -> None:
    """A session without a deadline saves, too."""
    scripted.downloads = deque([answer(200, PICTURE)])

    assert (await save(scripted, tmp_path / "a.jpeg", task_timeout=None)).exists()


async def test_a_cancelled_download_leaves_nothing(scripted: ScriptedGateway, tmp_path: Path) -> None:
    """Cancelling a download removes what it has written."""
    scripted.downloads = deque([raw(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nabc", then="hang")])
    with anyio.move_on_after(3):
        await save(scripted, tmp_path / "a.jpeg")

    assert len(scripted.received) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("status", [403, 404, 410])
async def test_an_expired_url_is_renewed_once(scripted: ScriptedGateway, tmp_path: Path, status: int) -> None:
    """When the url has expired, the task is asked for a fresh one, which is used."""
    scripted.downloads = deque([answer(status, b""), answer(200, PICTURE)])
    scripted.polls = deque([answer(200, completed(url=f"{scripted.url}/fresh.jpeg"))])
    path = await save(scripted, tmp_path / "a.jpeg")

    assert path.read_bytes() == PICTURE
    assert [call.path for call in scripted.received] == [
        "/0.jpeg",
        "/model/v1/generation/task/t1",
        "/fresh.jpeg",
    ]


@pytest.mark.parametrize(
    "poll",
    [
        pytest.param(answer(200, completed(url="http://127.0.0.1:1/nobody/listens.jpeg")), id="a url that is no use"),
        pytest.param(answer(404, b""), id="no such task"),
        pytest.param(answer(200, {"status": "in_progress"}), id="no pictures"),
    ],
)
async def test_no_fresh_url(scripted: ScriptedGateway, tmp_path: Path, poll: Behaviour) -> None:
    """When no fresh url is to be had, the error says so, after one question."""
    scripted.downloads = deque([answer(410, b"")])
    scripted.polls = deque([poll])
    with pytest.raises(DownloadError):
        await save(scripted, tmp_path / "a.jpeg")

    assert sum("/task/" in call.path for call in scripted.received) == 1
    assert list(tmp_path.iterdir()) == []


async def test_a_fresh_url_that_has_expired_too_is_the_end(scripted: ScriptedGateway, tmp_path: Path) -> None:
    """The task is asked once, not for ever."""
    scripted.downloads = deque([answer(410, b"")])
    scripted.polls = deque([answer(200, completed(url=f"{scripted.url}/fresh.jpeg"))])
    with pytest.raises(ResultExpiredError, match="expired"):
        await save(scripted, tmp_path / "a.jpeg")

    assert [call.path for call in scripted.received][2:] == ["/fresh.jpeg"]


async def test_urls_of_the_emulator_expire(tmp_path: Path) -> None:
    """A picture that is saved long after its task ended is still saved, by a fresh url."""
    async with Emulator(seconds=8.0, seed=1, url_lifetime=600.0) as gateway:
        async with FluxSession(gateway.api_key, base_url=gateway.url) as session:
            outcome = await session.generate("a cat", width=64, height=64)
            gateway.script("download", None, Fault.CUT, Fault.RESET_AFTER)
            await anyio.sleep(3600)
            path = await session.save(outcome.images[0], tmp_path / "a.jpeg")

        assert gateway.calls["download"] == 4
    with Image.open(path) as picture:
        assert picture.size == (64, 64)


@pytest.mark.usefixtures("small_disk")
async def test_a_full_disk_is_a_clear_error(scripted: ScriptedGateway, tmp_path: Path) -> None:
    """A picture that can't be written is a DownloadError that names the file, and leaves nothing behind."""
    scripted.downloads = deque([answer(200, PICTURE)])
    with pytest.raises(DownloadError, match=r"can't write .*a\.jpeg.*too large") as caught:
        await save(scripted, tmp_path / "a.jpeg")

    assert isinstance(caught.value.__cause__, OSError)
    assert caught.value.__cause__.errno == errno.EFBIG
    assert list(tmp_path.iterdir()) == []


async def test_a_folder_is_no_target(scripted: ScriptedGateway, tmp_path: Path) -> None:
    """A target that is a folder is a clear error."""
    scripted.downloads = deque([answer(200, PICTURE)])
    with pytest.raises(DownloadError, match="can't write"):
        await save(scripted, tmp_path)


async def test_saving_needs_an_open_session(scripted: ScriptedGateway, tmp_path: Path) -> None:
    """A closed session can't save, and says so."""
    session = session_on(scripted)
    with pytest.raises(SessionClosedError):
        await session.save(image_at(scripted), tmp_path / "a.jpeg")

    assert list(tmp_path.iterdir()) == []


async def test_a_url_that_is_none_is_a_clear_error(session: FluxSession, tmp_path: Path) -> None:
    """A result url that isn't http is a DownloadError, not somebody else's exception."""
    with pytest.raises(DownloadError, match="can't download"):
        await session.save(GeneratedImage("ftp://x.example/a", "image", "t1"), tmp_path / "a.jpeg")
    with pytest.raises(DownloadError, match="can't download"):
        await session.save(GeneratedImage("nonsense", "image", "t1"), tmp_path / "a.jpeg")


@pytest.mark.parametrize("url", ["", "//x/y", "http://", "http://a b/", "file:///etc/passwd"])
async def test_what_is_no_web_address_is_not_fetched(session: FluxSession, tmp_path: Path, url: str) -> None:
    """A result url that no browser would open is a DownloadError."""
    with pytest.raises(DownloadError, match="no http"):
        await session.save(GeneratedImage(url, "image", "t1"), tmp_path / "a.jpeg")

    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("url", ["http://a..b/x", f"http://{'x' * 70}.example/"])
async def test_a_host_that_cannot_be_is_our_error(session: FluxSession, tmp_path: Path, url: str) -> None:
    """A host name that can't be encoded is a DownloadError, too."""
    with pytest.raises(DownloadError):
        await session.save(GeneratedImage(url, "image", "t1"), tmp_path / "a.jpeg")


@pytest.mark.parametrize("name", ["", ".", "/", "a\0b"])
async def test_a_target_without_a_name_is_our_error(scripted: ScriptedGateway, name: str) -> None:
    """A path that can't be a file's is a DownloadError."""
    scripted.downloads = deque([answer(200, PICTURE)])
    async with session_on(scripted) as session:
        with pytest.raises(DownloadError, match="can't write"):
            await session.save(image_at(scripted), name)


@pytest.mark.parametrize(
    "first",
    [
        pytest.param(answer(206, PICTURE[:1000], [("Content-Range", f"bytes 0-999/{len(PICTURE)}")]), id="a part"),
        pytest.param(answer(200, b""), id="nothing"),
    ],
)
async def test_what_is_not_whole_is_not_saved(scripted: ScriptedGateway, tmp_path: Path, first: Behaviour) -> None:
    """A part that nobody asked for, and an answer with nothing in it, are no pictures."""
    scripted.downloads = deque([first, answer(200, PICTURE)])
    path = await save(scripted, tmp_path / "a.jpeg")

    assert path.read_bytes() == PICTURE


@pytest.mark.parametrize(
    "rest",
    [
        pytest.param({"etag": '"v2"'}, id="another version"),
        pytest.param({"total": len(PICTURE) + 1}, id="another length"),
    ],
)
async def test_the_rest_of_another_picture_is_not_glued_on(
    scripted: ScriptedGateway, tmp_path: Path, rest: dict[str, Any]
) -> None:
    """A partial answer that belongs to another picture is thrown away."""

    async def other(connection: Connection) -> None:
        start = int(connection.call.headers["Range"].removeprefix("bytes=").removesuffix("-"))
        await part(start, **rest)(connection)

    scripted.downloads = deque([cut(1_500_000, *OFFERED), other, answer(200, PICTURE)])
    path = await save(scripted, tmp_path / "a.jpeg")

    assert path.read_bytes() == PICTURE
    assert len(scripted.received) == 3


@pytest.mark.parametrize("moment", [step / 40 for step in range(12)])
async def test_a_natively_cancelled_save_leaves_no_part(
    scripted: ScriptedGateway, tmp_path: Path, moment: float
) -> None:
    """Wherever asyncio's own cancellation hits a download, nothing but a whole picture is left."""
    slow = answer(200, PICTURE, after=0.1)
    scripted.downloads = deque([slow])
    async with session_on(scripted) as session:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(moment):
                await session.save(image_at(scripted), tmp_path / "a.jpeg")
        await anyio.sleep(1)

    assert {path.name for path in tmp_path.iterdir()} <= {"a.jpeg"}


async def test_a_rest_in_two_parts_is_put_together(scripted: ScriptedGateway, tmp_path: Path) -> None:
    """A server that sends less of the rest than was asked for is asked for what is still missing."""

    async def some(connection: Connection) -> None:
        start = int(connection.call.headers["Range"].removeprefix("bytes=").removesuffix("-"))
        end = start + 100_000
        headers = [("Content-Range", f"bytes {start}-{end - 1}/{len(PICTURE)}"), ("ETag", '"v1"')]
        await answer(206, PICTURE[start:end], headers)(connection)

    async def the_rest(connection: Connection) -> None:
        await part(int(connection.call.headers["Range"].removeprefix("bytes=").removesuffix("-")))(connection)

    scripted.downloads = deque([cut(1_500_000, *OFFERED), some, the_rest])
    path = await save(scripted, tmp_path / "a.jpeg")

    assert path.read_bytes() == PICTURE
    assert len(scripted.received) == 3
