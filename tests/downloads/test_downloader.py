"""Downloader: streamed, resumed, complete or not at all, and without the key."""

import asyncio
import contextlib
import errno
from collections import deque
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import anyio
import attrs
import pytest
from PIL import Image
from support.responses import jpeg
from support.scripted import Behaviour, Connection, ScriptedGateway, answer, completed, hang, raw, session_on

from flux2max_async import DownloadError, FluxSession, GeneratedImage, ResultExpiredError, SessionClosedError
from flux2max_async.emulator import Emulator, Fault

IMAGE = jpeg(bytes(range(256)) * 12_000)  # 3 MB
OTHER_IMAGE = jpeg(b"another")
LONG_AGO = datetime(2025, 11, 22, tzinfo=UTC)


def image_at(scripted: ScriptedGateway, received_at: datetime | None = None) -> GeneratedImage:
    return GeneratedImage(url=f"{scripted.url}/0.jpeg", type="image", task_id="t1", received_at=received_at)


def partial_content(start: int, *, etag: str = '"v1"', total: int = len(IMAGE)) -> Behaviour:
    return answer(206, IMAGE[start:], [("Content-Range", f"bytes {start}-{total - 1}/{total}"), ("ETag", etag)])


def truncated(after: int, *headers: str) -> Behaviour:
    head = "\r\n".join(["HTTP/1.1 200 OK", f"Content-Length: {len(IMAGE)}", *headers, "", ""])
    return raw(head.encode() + IMAGE[:after])


RANGE_HEADERS = ("Accept-Ranges: bytes", 'ETag: "v1"')


async def save(
    scripted: ScriptedGateway, target: Path, *, received_at: datetime | None = None, **options: object
) -> Path:
    async with session_on(scripted, **options) as session:
        return await session.save(image_at(scripted, received_at), target)


async def test_save_an_image_of_the_emulator(session: FluxSession, tmp_path: Path) -> None:
    """The file contains the image that the emulator drew, and its path is returned."""
    async with Emulator(seconds=1.0, seed=1) as gateway, FluxSession(gateway.api_key, base_url=gateway.url) as flux:
        outcome = await flux.generate("a lighthouse at dawn", width=320, height=200, output_format="png")
        path = await flux.save(outcome.images[0], tmp_path / "new folder" / "lighthouse.png")

    with Image.open(path) as image:
        assert (image.format, image.size) == ("PNG", (320, 200))
    assert [file.name for file in path.parent.iterdir()] == ["lighthouse.png"]


async def test_downloads_never_send_the_key(scripted: ScriptedGateway, tmp_path: Path) -> None:
    """Neither the host of the image nor one that it redirects to receives the key."""
    async with ScriptedGateway() as other_host:
        other_host.downloads = deque([answer(200, IMAGE)])
        scripted.downloads = deque([answer(302, b"", [("Location", f"{other_host.url}/image.jpeg")])])
        path = await save(scripted, tmp_path / "a.jpeg")

        requests = scripted.received + other_host.received
    assert path.read_bytes() == IMAGE
    assert len(requests) == 2
    assert all("Authorization" not in request.headers for request in requests)
    assert all(scripted.api_key not in str(request) for request in requests)


async def test_interrupted_download_is_resumed(scripted: ScriptedGateway, tmp_path: Path) -> None:
    """If the server supports ranges, only the rest of the same image is requested."""

    async def remainder(connection: Connection) -> None:
        start = int(connection.call.headers["Range"].removeprefix("bytes=").removesuffix("-"))
        await partial_content(start)(connection)

    scripted.downloads = deque([truncated(1_500_000, *RANGE_HEADERS), remainder])
    path = await save(scripted, tmp_path / "a.jpeg")

    assert path.read_bytes() == IMAGE
    assert scripted.received[1].headers["Range"] != "bytes=0-"
    assert scripted.received[1].headers["If-Range"] == '"v1"'


@pytest.mark.parametrize(
    "headers",
    [
        pytest.param(('ETag: "v1"',), id="ranges not offered"),
        pytest.param(("Accept-Ranges: bytes", "Content-Encoding: identity"), id="encoded"),
    ],
)
async def test_interrupted_download_without_ranges_is_restarted(
    scripted: ScriptedGateway, tmp_path: Path, headers: tuple[str, ...]
) -> None:
    """If the server doesn't support ranges, an interrupted download is restarted at the first byte."""
    scripted.downloads = deque([truncated(1_500_000, *headers), answer(200, IMAGE)])
    path = await save(scripted, tmp_path / "a.jpeg")

    assert path.read_bytes() == IMAGE
    assert "Range" not in scripted.received[1].headers


@pytest.mark.parametrize(
    "second",
    [
        pytest.param(partial_content(7), id="another range"),
        pytest.param(answer(416, b""), id="416"),
        pytest.param(answer(206, IMAGE[1_500_000:]), id="no Content-Range"),
    ],
)
async def test_wrong_range_is_discarded(scripted: ScriptedGateway, tmp_path: Path, second: Behaviour) -> None:
    """A response that isn't the requested range is discarded, and the download is restarted."""
    scripted.downloads = deque([truncated(1_500_000, *RANGE_HEADERS), second, answer(200, IMAGE)])
    path = await save(scripted, tmp_path / "a.jpeg")

    assert path.read_bytes() == IMAGE


async def test_full_response_to_a_range_request_replaces_the_content(scripted: ScriptedGateway, tmp_path: Path) -> None:
    """If the server responds to a range request with the whole image, that is saved."""
    scripted.downloads = deque(
        [truncated(1_500_000, "Accept-Ranges: bytes", 'ETag: W/"weak"'), answer(200, OTHER_IMAGE)]
    )
    path = await save(scripted, tmp_path / "a.jpeg")

    assert path.read_bytes() == OTHER_IMAGE
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
async def test_transient_failures_are_retried(scripted: ScriptedGateway, tmp_path: Path, behaviour: Behaviour) -> None:
    """A download is retried after transient failures."""
    scripted.downloads = deque([behaviour, behaviour, answer(200, IMAGE)])
    path = await save(scripted, tmp_path / "a.jpeg")

    assert path.read_bytes() == IMAGE


@pytest.mark.parametrize(
    ("behaviour", "message"),
    [
        pytest.param(answer(503, b""), "times in a row, for 60 s: HTTP 503", id="always 503"),
        pytest.param(answer(400, b""), "HTTP 400", id="400"),
        pytest.param(raw(b"SSH-2.0\r\n\r\n"), "can't download", id="not HTTP"),
        pytest.param(raw(b"HTTP/1.1 200 OK\r\nContent-Length: 100000001\r\n\r\n"), "100 MB", id="declared too large"),
    ],
)
async def test_failed_download_leaves_no_files(
    scripted: ScriptedGateway, tmp_path: Path, behaviour: Behaviour, message: str
) -> None:
    """If the download fails, the error has the reason, no part file is left, and the target is unchanged."""
    target = tmp_path / "a.jpeg"
    target.write_bytes(b"previous content")
    scripted.downloads = deque([behaviour])
    with pytest.raises(DownloadError, match=message):
        await save(scripted, target)

    assert target.read_bytes() == b"previous content"
    assert list(tmp_path.iterdir()) == [target]


async def test_download_without_a_length_is_limited(scripted: ScriptedGateway, tmp_path: Path) -> None:
    """An image of unknown size is refused once more than 100 MB were received."""
    scripted.downloads = deque([raw(b"HTTP/1.1 200 OK\r\n\r\n" + bytes(100_000_001))])
    with pytest.raises(DownloadError, match="100 MB"):
        await save(scripted, tmp_path / "a.jpeg")

    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("task_timeout", "limit"), [(300.0, 300.0), (1.0, 120.0)])
async def test_slow_download_times_out(
    scripted: ScriptedGateway, tmp_path: Path, task_timeout: float, limit: float
) -> None:
    """A download that is just fast enough and never ends is aborted after the timeout, but not before 120 s."""

    async def trickle(connection: Connection) -> None:
        await connection.send(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n")
        while True:
            await connection.send(bytes(11_000))
            await anyio.sleep(10)

    scripted.downloads = deque([trickle])
    with pytest.raises(DownloadError, match=f"within {limit:g} s"):
        await save(scripted, tmp_path / "a.jpeg", task_timeout=task_timeout)

    assert list(tmp_path.iterdir()) == []


async def test_save_without_a_task_timeout(scripted: ScriptedGateway, tmp_path: Path) -> None:
    """A session without a task timeout can save images."""
    scripted.downloads = deque([answer(200, IMAGE)])

    assert (await save(scripted, tmp_path / "a.jpeg", task_timeout=None)).exists()


async def test_cancelled_download_leaves_no_files(scripted: ScriptedGateway, tmp_path: Path) -> None:
    """Cancelling a download removes its part file."""
    scripted.downloads = deque([raw(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nabc", then="hang")])
    with anyio.move_on_after(3):
        await save(scripted, tmp_path / "a.jpeg")

    assert len(scripted.received) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("status", [403, 404, 410])
async def test_expired_url_is_refreshed(scripted: ScriptedGateway, tmp_path: Path, status: int) -> None:
    """If the URL has expired, the task is polled for a fresh one, which is downloaded."""
    scripted.downloads = deque([answer(status, b""), answer(200, IMAGE)])
    scripted.polls = deque([answer(200, completed(url=f"{scripted.url}/fresh.jpeg"))])
    path = await save(scripted, tmp_path / "a.jpeg", received_at=LONG_AGO)

    assert path.read_bytes() == IMAGE
    assert [request.path for request in scripted.received] == [
        "/0.jpeg",
        "/model/v1/generation/task/t1",
        "/fresh.jpeg",
    ]


@pytest.mark.parametrize(
    "poll",
    [
        pytest.param(answer(200, completed(url="http://127.0.0.1:1/unreachable.jpeg")), id="unreachable URL"),
        pytest.param(answer(404, b""), id="no such task"),
        pytest.param(answer(200, {"status": "in_progress"}), id="no images"),
    ],
)
async def test_no_fresh_url(scripted: ScriptedGateway, tmp_path: Path, poll: Behaviour) -> None:
    """If there is no fresh URL, the download fails after one poll."""
    scripted.downloads = deque([answer(410, b"")])
    scripted.polls = deque([poll])
    with pytest.raises(DownloadError):
        await save(scripted, tmp_path / "a.jpeg", received_at=LONG_AGO)

    assert sum("/task/" in request.path for request in scripted.received) == 1
    assert list(tmp_path.iterdir()) == []


async def test_expired_fresh_url_is_not_refreshed_again(scripted: ScriptedGateway, tmp_path: Path) -> None:
    """The task is polled only once for a fresh URL."""
    scripted.downloads = deque([answer(410, b"")])
    scripted.polls = deque([answer(200, completed(url=f"{scripted.url}/fresh.jpeg"))])
    with pytest.raises(ResultExpiredError, match="expired"):
        await save(scripted, tmp_path / "a.jpeg", received_at=LONG_AGO)

    first, poll, *fresh = (request.path for request in scripted.received)
    assert (first, poll, set(fresh)) == ("/0.jpeg", "/model/v1/generation/task/t1", {"/fresh.jpeg"})


async def test_save_an_image_of_the_emulator_after_its_url_expired(tmp_path: Path) -> None:
    """An image that is saved long after its task ended is downloaded from a fresh URL."""
    async with Emulator(seconds=8.0, seed=1, url_lifetime=600.0) as gateway:
        async with FluxSession(gateway.api_key, base_url=gateway.url) as session:
            outcome = await session.generate("a cat", width=64, height=64)
            gateway.script("download", None, Fault.CUT, Fault.RESET_AFTER)
            await anyio.sleep(3600)
            # Virtual time doesn't make the URL older.
            expired = attrs.evolve(outcome.images[0], received_at=LONG_AGO)
            path = await session.save(expired, tmp_path / "a.jpeg")

        assert gateway.calls["download"] == 4
    with Image.open(path) as image:
        assert image.size == (64, 64)


@pytest.mark.usefixtures("small_disk")
async def test_full_disk(scripted: ScriptedGateway, tmp_path: Path) -> None:
    """An image that can't be written is a DownloadError that names the file, and no file is left."""
    scripted.downloads = deque([answer(200, IMAGE)])
    with pytest.raises(DownloadError, match=r"can't write .*a\.jpeg.*too large") as caught:
        await save(scripted, tmp_path / "a.jpeg")

    assert isinstance(caught.value.__cause__, OSError)
    assert caught.value.__cause__.errno == errno.EFBIG
    assert list(tmp_path.iterdir()) == []


async def test_target_is_a_folder(scripted: ScriptedGateway, tmp_path: Path) -> None:
    """A target that is a folder is a DownloadError."""
    scripted.downloads = deque([answer(200, IMAGE)])
    with pytest.raises(DownloadError, match="can't write"):
        await save(scripted, tmp_path)


async def test_save_with_a_closed_session(scripted: ScriptedGateway, tmp_path: Path) -> None:
    """Saving with a closed session is a SessionClosedError."""
    session = session_on(scripted)
    with pytest.raises(SessionClosedError):
        await session.save(image_at(scripted), tmp_path / "a.jpeg")

    assert list(tmp_path.iterdir()) == []


async def test_invalid_image_url(session: FluxSession, tmp_path: Path) -> None:
    """An image URL that isn't http(s) is a DownloadError."""
    with pytest.raises(DownloadError, match="can't download"):
        await session.save(GeneratedImage(url="ftp://x.example/a", type="image", task_id="t1"), tmp_path / "a.jpeg")
    with pytest.raises(DownloadError, match="can't download"):
        await session.save(GeneratedImage(url="nonsense", type="image", task_id="t1"), tmp_path / "a.jpeg")


@pytest.mark.parametrize("url", ["", "//x/y", "http://", "http://a b/", "file:///etc/passwd"])
async def test_image_url_without_scheme_or_host(session: FluxSession, tmp_path: Path, url: str) -> None:
    """An image URL that no browser would open is a DownloadError, and no file is created."""
    with pytest.raises(DownloadError, match="not an http"):
        await session.save(GeneratedImage(url=url, type="image", task_id="t1"), tmp_path / "a.jpeg")

    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("url", ["http://a..b/x", f"http://{'x' * 70}.example/"])
async def test_image_url_with_an_invalid_host(session: FluxSession, tmp_path: Path, url: str) -> None:
    """A host name that can't be encoded is a DownloadError."""
    with pytest.raises(DownloadError):
        await session.save(GeneratedImage(url=url, type="image", task_id="t1"), tmp_path / "a.jpeg")


@pytest.mark.parametrize("name", ["", ".", "/", "a\0b"])
async def test_target_without_a_file_name(scripted: ScriptedGateway, name: str) -> None:
    """A path without a valid file name is a DownloadError."""
    scripted.downloads = deque([answer(200, IMAGE)])
    async with session_on(scripted) as session:
        with pytest.raises(DownloadError, match="can't write"):
            await session.save(image_at(scripted), name)


@pytest.mark.parametrize(
    "first",
    [
        pytest.param(
            answer(206, IMAGE[:1000], [("Content-Range", f"bytes 0-999/{len(IMAGE)}")]), id="unrequested range"
        ),
        pytest.param(answer(200, b""), id="empty"),
    ],
)
async def test_incomplete_response_is_retried(scripted: ScriptedGateway, tmp_path: Path, first: Behaviour) -> None:
    """A partial response that wasn't requested and an empty one are not saved as the image."""
    scripted.downloads = deque([first, answer(200, IMAGE)])
    path = await save(scripted, tmp_path / "a.jpeg")

    assert path.read_bytes() == IMAGE


@pytest.mark.parametrize(
    "rest",
    [
        pytest.param({"etag": '"v2"'}, id="another version"),
        pytest.param({"total": len(IMAGE) + 1}, id="another length"),
    ],
)
async def test_range_of_another_image_is_discarded(
    scripted: ScriptedGateway, tmp_path: Path, rest: dict[str, Any]
) -> None:
    """A range of another version of the image is discarded, and the download is restarted."""

    async def other_remainder(connection: Connection) -> None:
        start = int(connection.call.headers["Range"].removeprefix("bytes=").removesuffix("-"))
        await partial_content(start, **rest)(connection)

    scripted.downloads = deque([truncated(1_500_000, *RANGE_HEADERS), other_remainder, answer(200, IMAGE)])
    path = await save(scripted, tmp_path / "a.jpeg")

    assert path.read_bytes() == IMAGE
    assert len(scripted.received) == 3


@pytest.mark.parametrize("cancel_after", [step / 40 for step in range(12)])
async def test_save_cancelled_by_asyncio_at_any_time_leaves_no_part(
    scripted: ScriptedGateway, tmp_path: Path, cancel_after: float
) -> None:
    """Whenever asyncio cancels a download, only a complete image can be left."""
    scripted.downloads = deque([answer(200, IMAGE, after=0.1)])
    async with session_on(scripted) as session:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(cancel_after):
                await session.save(image_at(scripted), tmp_path / "a.jpeg")
        await anyio.sleep(1)

    assert {path.name for path in tmp_path.iterdir()} <= {"a.jpeg"}


async def test_remainder_in_two_ranges(scripted: ScriptedGateway, tmp_path: Path) -> None:
    """If the server sends less than the requested range, the missing rest is requested."""

    async def part_of_remainder(connection: Connection) -> None:
        start = int(connection.call.headers["Range"].removeprefix("bytes=").removesuffix("-"))
        end = start + 100_000
        headers = [("Content-Range", f"bytes {start}-{end - 1}/{len(IMAGE)}"), ("ETag", '"v1"')]
        await answer(206, IMAGE[start:end], headers)(connection)

    async def remainder(connection: Connection) -> None:
        await partial_content(int(connection.call.headers["Range"].removeprefix("bytes=").removesuffix("-")))(
            connection
        )

    scripted.downloads = deque([truncated(1_500_000, *RANGE_HEADERS), part_of_remainder, remainder])
    path = await save(scripted, tmp_path / "a.jpeg")

    assert path.read_bytes() == IMAGE
    assert len(scripted.received) == 3
