"""ImageDownload: bytes as they come, each once, in bounded memory, and nothing left open when nobody wants the rest."""

import asyncio
import base64
import gc
import logging
import tracemalloc
from collections import deque
from collections.abc import AsyncIterator
from pathlib import Path

import anyio
import pytest
from support.responses import jpeg, picture
from support.scripted import Behaviour, Connection, ScriptedGateway, answer, completed, raw, session_on

from flux2max_async import (
    DownloadError,
    FluxSession,
    GeneratedImage,
    ImageDownload,
    ResultExpiredError,
    SessionClosedError,
)
from flux2max_async._downloads import sinks
from flux2max_async._downloads.image_format import ImageStructure, is_whole

IMAGE = jpeg(bytes(range(256)) * 12_000)  # 3 MB
SIZE = len(IMAGE)
TYPE_LESS = [("Content-Type", "application/octet-stream")]
RANGES = ("Accept-Ranges: bytes", 'ETag: "v1"')


def image_at(scripted: ScriptedGateway) -> GeneratedImage:
    return GeneratedImage(url=f"{scripted.url}/0.jpeg", type="image", task_id="t1")


def cut(after: int, *headers: str, image: bytes = IMAGE, then: str = "close") -> Behaviour:
    """Send a part of an image, and close the connection."""
    head = "\r\n".join(["HTTP/1.1 200 OK", f"Content-Length: {len(image)}", *headers, "", ""])
    return raw(head.encode() + image[:after], then=then)


def without_length(data: bytes) -> Behaviour:
    """Send bytes whose end is that of the connection."""
    return raw(b"HTTP/1.1 200 OK\r\n\r\n" + data)


async def remainder(connection: Connection) -> None:
    """Send the requested range of the image."""
    start = int(connection.call.headers["Range"].removeprefix("bytes=").removesuffix("-"))
    headers = [("Content-Range", f"bytes {start}-{SIZE - 1}/{SIZE}"), ("ETag", '"v1"')]
    await answer(206, IMAGE[start:], headers)(connection)


async def collect(download: AsyncIterator[bytes]) -> bytes:
    return b"".join([chunk async for chunk in download])


@pytest.fixture
async def session(scripted: ScriptedGateway) -> AsyncIterator[FluxSession]:
    """Provide a session on the scripted gateway."""
    async with session_on(scripted) as flux:
        yield flux


# ---------------------------------------------------------------------- the two forms


async def test_as_a_context_manager(scripted: ScriptedGateway, session: FluxSession) -> None:
    """Within `async with`, the type and the size are known, and all bytes come, in chunks."""
    scripted.downloads = deque([answer(200, IMAGE, TYPE_LESS)])
    async with session.download(image_at(scripted)) as download:
        assert (download.content_type, download.size) == ("image/jpeg", SIZE)
        chunks = [chunk async for chunk in download]

    assert b"".join(chunks) == IMAGE
    assert max(map(len, chunks)) <= 65_536 + 64


async def test_awaited(scripted: ScriptedGateway, session: FluxSession) -> None:
    """Awaiting begins it, once; it may be entered as well, and its end stays its end."""
    scripted.downloads = deque([answer(200, IMAGE, TYPE_LESS)])
    download = await session.download(image_at(scripted))
    async with await download as same:
        assert same is download
        assert isinstance(download, ImageDownload)
        assert download.content_type == "image/jpeg"
        assert await collect(download) == IMAGE
        assert await collect(download) == b""

    assert len(scripted.received) == 1


async def test_iterated_at_once(scripted: ScriptedGateway, session: FluxSession) -> None:
    """Iterating begins it, too."""
    scripted.downloads = deque([answer(200, IMAGE)])

    assert await collect(session.download(image_at(scripted))) == IMAGE


async def test_before_it_begins(scripted: ScriptedGateway, session: FluxSession) -> None:
    """Nothing is requested, nothing is known, and nothing has to be closed."""
    download = session.download(image_at(scripted))
    with pytest.raises(DownloadError, match="has not begun"):
        _ = download.content_type
    with pytest.raises(DownloadError, match="has not begun"):
        _ = download.size
    await download.aclose()

    assert await collect(await download) == b""
    assert scripted.received == []


@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "WEBP", "GIF"])
async def test_type_is_that_of_the_bytes(scripted: ScriptedGateway, session: FluxSession, image_format: str) -> None:
    """The content type is that of the bytes, not what the server says, nor what was requested."""
    scripted.downloads = deque([answer(200, picture(image_format), [("Content-Type", "text/html")])])
    async with session.download(image_at(scripted)) as download:
        assert download.content_type == f"image/{image_format.lower()}"


async def test_inline_image(session: FluxSession) -> None:
    """An image that is part of the result comes in chunks, too."""
    image = GeneratedImage(url=f"data:image/png;base64,{base64.b64encode(IMAGE).decode()}", type="image", task_id="t1")
    async with session.download(image) as download:
        assert (download.content_type, download.size) == ("image/jpeg", SIZE)
        chunks = [chunk async for chunk in download]

    assert b"".join(chunks) == IMAGE
    assert len(chunks) > 40


# ---------------------------------------------------------------------- interruptions


async def test_it_is_resumed(scripted: ScriptedGateway, session: FluxSession) -> None:
    """After an interruption only the rest is requested, and the consumer sees each byte once."""
    scripted.downloads = deque([cut(1_500_000, *RANGES), remainder])
    async with session.download(image_at(scripted)) as download:
        assert await collect(download) == IMAGE

    assert scripted.received[1].headers["Range"] != "bytes=0-"
    assert scripted.received[1].headers["If-Range"] == '"v1"'


@pytest.mark.parametrize("second", [answer(200, IMAGE), without_length(IMAGE)])
async def test_it_is_continued_without_ranges(
    scripted: ScriptedGateway, session: FluxSession, second: Behaviour
) -> None:
    """If the server can only send the whole image again, what the consumer has is left out."""
    scripted.downloads = deque([cut(1_500_000), cut(700_000), second])
    async with session.download(image_at(scripted)) as download:
        assert await collect(download) == IMAGE

    assert [request.headers.get("Range") for request in scripted.received] == [None] * 3


async def test_an_expired_url_in_the_middle(scripted: ScriptedGateway, session: FluxSession) -> None:
    """If the URL has expired when the download is resumed, it is continued with a fresh one, without a repeated byte."""

    async def serve(connection: Connection) -> None:
        behave = answer(200, IMAGE) if connection.call.path == "/fresh" else expired.popleft()
        await behave(connection)

    expired = deque([cut(1_500_000, *RANGES), *[answer(403, b"")] * 30])
    scripted.downloads = deque([serve])
    scripted.polls = deque([answer(200, completed("t1", url=f"{scripted.url}/fresh"))])
    async with session.download(image_at(scripted)) as download:
        assert await collect(download) == IMAGE

    assert "Range" not in scripted.received[-1].headers
    assert len([request for request in scripted.received if "/task/" in request.path]) == 1


OTHER = jpeg(bytes(range(255, -1, -1)) * 12_000)


@pytest.mark.parametrize(
    "second",
    [
        pytest.param(answer(200, OTHER), id="other bytes"),
        pytest.param(answer(200, IMAGE + b"more"), id="another length"),
        pytest.param(without_length(picture("JPEG")), id="shorter"),
        pytest.param(without_length(IMAGE[:1_200_000]), id="not whole"),
        pytest.param(answer(200, b"<html>" * 50_000), id="no image"),
    ],
)
async def test_another_image_is_not_mixed_in(
    scripted: ScriptedGateway, session: FluxSession, second: Behaviour
) -> None:
    """Bytes of another image never follow those of the first: the attempt has failed, and another one may succeed."""
    scripted.downloads = deque([cut(1_500_000), second, answer(200, IMAGE)])
    async with session.download(image_at(scripted)) as download:
        assert await collect(download) == IMAGE

    assert len(scripted.received) == 3


async def test_a_shorter_image_of_unknown_length(scripted: ScriptedGateway, session: FluxSession) -> None:
    """A whole image that is shorter than what the consumer has is another one, if no length was known either."""
    chunked = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n100000\r\n" + IMAGE[:0x100000] + b"\r\n"
    scripted.downloads = deque([raw(chunked), without_length(picture("JPEG")), answer(200, IMAGE)])
    async with session.download(image_at(scripted)) as download:
        assert download.size is None
        assert await collect(download) == IMAGE

    assert len(scripted.received) == 3


async def test_it_fails_in_the_middle(scripted: ScriptedGateway, session: FluxSession) -> None:
    """What has come is yielded first, then the error is raised, which names the task; then it is over."""
    scripted.downloads = deque([cut(100_000, *RANGES), answer(400, b"")])
    chunks: list[bytes] = []
    async with session.download(image_at(scripted)) as download:
        with pytest.raises(DownloadError, match="HTTP 400") as caught:
            async for chunk in download:
                chunks.append(chunk)
        assert await collect(download) == b""

    assert b"".join(chunks) == IMAGE[:100_000]
    assert caught.value.task_id == "t1"


async def test_what_is_no_image_is_not_passed_on(scripted: ScriptedGateway, session: FluxSession) -> None:
    """A response that comes in many pieces and is no image is read to its end, tried again, and never yielded."""
    scripted.downloads = deque([answer(200, b"<!DOCTYPE html>" * 100_000), answer(200, IMAGE)])
    async with session.download(image_at(scripted)) as download:
        assert await collect(download) == IMAGE

    assert len(scripted.received) == 2


async def test_it_fails_at_once(scripted: ScriptedGateway, session: FluxSession) -> None:
    """The beginning raises what `save()` would: a handler knows it before its response begins."""
    scripted.downloads = deque([answer(404, b"")])
    scripted.polls = deque([answer(200, completed("t1", url=f"{scripted.url}/0.jpeg"))])
    with pytest.raises(ResultExpiredError):
        await session.download(image_at(scripted))
    scripted.downloads = deque([answer(200, b"no image")])
    with pytest.raises(DownloadError, match=r"for 60 s: the response is not an image: it begins with b'no image'"):
        async with session.download(image_at(scripted)):
            pass


async def test_private_addresses_are_refused(tmp_path: Path) -> None:
    """The guard against private addresses holds for downloads, too."""
    async with FluxSession("test-key-1234567890", base_url="https://service.example") as session:
        with pytest.raises(DownloadError, match="private"):
            await session.download(GeneratedImage(url="http://127.0.0.1:9/", type="image", task_id="t1"))


# ---------------------------------------------------------------------- the end


async def until_free(scripted: ScriptedGateway) -> None:
    """Wait until the server has noticed that its connections are closed."""
    if tasks := list(scripted._tasks):
        await asyncio.wait(tasks, timeout=5)
    assert not scripted._tasks


async def drip(connection: Connection) -> None:
    """Send an image slowly."""
    await connection.send(f"HTTP/1.1 200 OK\r\nContent-Length: {SIZE}\r\n\r\n".encode() + IMAGE[:100_000])
    for position in range(100_000, SIZE, 1000):
        await anyio.sleep(0.1)
        await connection.send(IMAGE[position : position + 1000])


async def test_leaving_it_early(scripted: ScriptedGateway, session: FluxSession) -> None:
    """Leaving the context ends the download and its connection; then there is nothing more to iterate over."""
    scripted.downloads = deque([drip])
    async with session.download(image_at(scripted)) as download:
        assert await anext(download)
    await until_free(scripted)

    assert await collect(download) == b""


async def test_its_iteration_is_cancelled(scripted: ScriptedGateway, session: FluxSession) -> None:
    """Cancelling the iteration closes it."""
    scripted.downloads = deque([drip])
    download = await session.download(image_at(scripted))
    with anyio.move_on_after(5):
        await collect(download)
    await until_free(scripted)


async def test_its_beginning_is_cancelled(scripted: ScriptedGateway, session: FluxSession) -> None:
    """Cancelling the wait for the first bytes closes it."""
    scripted.downloads = deque([answer(200, IMAGE, after=1000.0)])
    with anyio.move_on_after(5):
        await session.download(image_at(scripted))
    await anyio.sleep(0.1)

    assert not session._get_supervisor()._tasks


async def test_it_is_dropped(scripted: ScriptedGateway, session: FluxSession) -> None:
    """When nobody refers to it, the download ends, without a warning."""
    scripted.downloads = deque([drip])
    download = await session.download(image_at(scripted))
    assert await anext(download)
    del download
    gc.collect()
    await until_free(scripted)

    assert not session._get_supervisor()._tasks


async def test_the_session_is_closed(scripted: ScriptedGateway) -> None:
    """Closing the session ends its downloads with SessionClosedError, and no other begins."""
    scripted.downloads = deque([drip])
    session = session_on(scripted)
    with pytest.raises(SessionClosedError):
        session.download(image_at(scripted))
    async with session:
        download = await session.download(image_at(scripted))
        late = session.download(image_at(scripted))
    with pytest.raises(SessionClosedError, match="before the download had ended"):
        await collect(download)
    with pytest.raises(SessionClosedError):
        await late


def test_it_outlives_its_event_loop() -> None:
    """Dropping it after the end of the event loop is no error."""
    downloads: list[ImageDownload] = []

    async def begin() -> None:
        async with ScriptedGateway() as scripted:
            scripted.downloads = deque([drip])
            session = await session_on(scripted).__aenter__()
            downloads.append(await session.download(image_at(scripted)))
            work = downloads[0]._work
            assert work is not None
            work.get_loop().call_soon(work.get_loop().stop)
            await asyncio.sleep(0)
            await session.aclose()

    loop = asyncio.new_event_loop()
    try:
        task = loop.create_task(begin())
        with pytest.raises(RuntimeError, match="stopped before"):
            loop.run_until_complete(task)
        downloads.clear()
        loop.run_until_complete(task)
    finally:
        loop.close()


# ---------------------------------------------------------------------- slow consumers


async def test_slow_consumer_holds_no_connection(scripted: ScriptedGateway, session: FluxSession) -> None:
    """If nobody takes the bytes for 10 s, the connection is closed; later the download is resumed."""
    scripted.downloads = deque([answer(200, IMAGE, [("Accept-Ranges", "bytes"), ("ETag", '"v1"')]), remainder])
    async with session.download(image_at(scripted)) as download:
        first = await anext(download)
        await anyio.sleep(5000)
        assert len(scripted.received) == 1
        assert not scripted._tasks
        assert first + await collect(download) == IMAGE

    start = int(scripted.received[1].headers["Range"].removeprefix("bytes=").removesuffix("-"))
    assert 1_000_000 <= start < 1_200_000


async def test_slow_consumer_without_ranges(scripted: ScriptedGateway, session: FluxSession) -> None:
    """If the download could not be resumed, its connection stays open while the consumer is slow."""
    scripted.downloads = deque([answer(200, IMAGE)])
    async with session.download(image_at(scripted)) as download:
        first = await anext(download)
        await anyio.sleep(100)
        assert first + await collect(download) == IMAGE

    assert len(scripted.received) == 1


async def test_consumer_in_bursts(scripted: ScriptedGateway, session: FluxSession) -> None:
    """A consumer that takes a part every few seconds is waited for 10 s in all, and gets everything."""
    scripted.downloads = deque([answer(200, IMAGE, [("Accept-Ranges", "bytes"), ("ETag", '"v1"')]), remainder])
    received = b""
    async with session.download(image_at(scripted)) as download:
        async for chunk in download:
            received += chunk
            await anyio.sleep(4)

    assert received == IMAGE
    assert len(scripted.received) > 1


async def test_memory_is_bounded(scripted: ScriptedGateway, session: FluxSession) -> None:
    """While a consumer takes 100 MB, at most 2 MiB of them are in memory."""
    piece = b"\xff\xfe\xff\xff" + bytes(65_533)
    head, end = picture("JPEG")[:2], picture("JPEG")[2:]
    count = 1500
    total = len(head) + count * len(piece) + len(end)

    async def send(connection: Connection) -> None:
        connection.writer.transport.set_write_buffer_limits(high=65_536)
        await connection.send(f"HTTP/1.1 200 OK\r\nContent-Length: {total}\r\n\r\n".encode() + head)
        for _ in range(count):
            await connection.send(piece)
        await connection.send(end)

    scripted.downloads = deque([send])
    received = 0
    async with session.download(image_at(scripted)) as download:
        tracemalloc.start()
        async for chunk in download:
            received += len(chunk)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()

    assert received == total > 98_000_000
    assert peak < 2 * 1024 * 1024


async def test_sink_takes_back_what_nobody_has() -> None:
    """A download that starts again before its first byte was delivered compares nothing."""
    sink = sinks.StreamSink()
    sink.restart()
    await sink.write(b"abc")
    sink.restart()
    await sink.write(b"ab")
    await sink.write(b"cd")
    sink.end(None)

    assert [await sink.take() for _ in range(3)] == [b"abc", b"d", b""]


# ---------------------------------------------------------------------- structure


@pytest.mark.parametrize("size", [1, 2, 7, 64, 1000])
@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "WEBP", "GIF"])
def test_structure_in_pieces(image_format: str, size: int) -> None:
    """In whatever pieces an image comes, it is whole at its end, and not before."""
    data = picture(image_format)
    structure = ImageStructure()
    for start in range(0, len(data), size):
        assert not structure.is_whole
        structure.feed(data[start : start + size])

    assert structure.is_whole
    structure.feed(b"more")
    assert structure.is_whole
    assert is_whole(data)


# ---------------------------------------------------------------------- saving


async def test_save_into_a_folder(scripted: ScriptedGateway, session: FluxSession, tmp_path: Path) -> None:
    """A target that is a folder is refused before anything is downloaded."""
    with pytest.raises(DownloadError, match="it is a folder, not a regular file: name a file in it"):
        await session.save(image_at(scripted), tmp_path)

    assert scripted.received == []


@pytest.mark.parametrize(
    ("name", "warnings"),
    [
        ("x.png", ["{} has the name of a png, but the image is a jpeg"]),
        ("x.jpg", []),
        ("x.JPEG", []),
        ("x", []),
        ("x.data", []),
    ],
)
async def test_save_under_the_name_of_another_format(
    scripted: ScriptedGateway,
    session: FluxSession,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    name: str,
    warnings: list[str],
) -> None:
    """A file whose suffix is another format's is saved all the same, with a warning that names both."""
    scripted.downloads = deque([answer(200, IMAGE)])
    path = await session.save(image_at(scripted), tmp_path / name)

    assert path.read_bytes() == IMAGE
    logged = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert logged == [text.format(path) for text in warnings]
