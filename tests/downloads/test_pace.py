"""The pace of downloads: too slow attempts fail and are resumed, and slow servers don't stop other downloads."""

import asyncio
import contextlib
from collections import deque
from pathlib import Path

import aiohttp
import anyio
import pytest
from support.responses import jpeg
from support.scripted import Behaviour, Connection, ScriptedGateway, answer, session_on

from flux2max_async import DownloadError, FluxSession, GeneratedImage, SessionClosedError, TransportError
from flux2max_async._api.transport import Transport
from flux2max_async._downloads.pace import DownloadSlots, Pace

IMAGE = jpeg(bytes(range(256)) * 400)  # 100 KB
SLOW = "slower than 1 KiB/s for 30 s"


def image_at(scripted: ScriptedGateway, name: str = "0") -> GeneratedImage:
    return GeneratedImage(url=f"{scripted.url}/{name}", type="image", task_id="t1")


def drip(count: int, every: float, *, is_resumable: bool = True, content: bytes = IMAGE) -> Behaviour:
    """Send an image, or the requested rest of it, so many bytes at a time, with a pause in seconds after each."""

    async def behave(connection: Connection) -> None:
        start = int(connection.call.headers.get("Range", "bytes=0-").removeprefix("bytes=").removesuffix("-"))
        head = [f"HTTP/1.1 {206 if start else 200} OK", f"Content-Length: {len(content) - start}"]
        if is_resumable:
            head += ["Accept-Ranges: bytes", 'ETag: "v1"']
        if start:
            head.append(f"Content-Range: bytes {start}-{len(content) - 1}/{len(content)}")
        await connection.send("\r\n".join([*head, "", ""]).encode())
        for position in range(start, len(content), count):
            await connection.send(content[position : position + count])
            await anyio.sleep(every)

    return behave


def drip_head(every: float) -> Behaviour:
    """Send a header that never ends, one byte at a time."""

    async def behave(connection: Connection) -> None:
        await connection.send(b"HTTP/1.1 200 OK\r\nX-Long: ")
        while True:
            await connection.send(b"x")
            await anyio.sleep(every)

    return behave


def by_name(scripted: ScriptedGateway, **behaviours: Behaviour) -> None:
    """Behave as the first part of the requested file's name says."""

    async def behave(connection: Connection) -> None:
        await behaviours[connection.call.path.strip("/").partition("-")[0]](connection)

    scripted.downloads = deque([behave])


def times(scripted: ScriptedGateway) -> list[float]:
    return [round(request.at - scripted.received[0].at, 1) for request in scripted.received]


# ---------------------------------------------------------------------- the minimum pace


async def test_too_slow_attempt_is_resumed(scripted: ScriptedGateway) -> None:
    """An attempt below 1 KiB/s fails after 30 s, and the next one requests what is missing."""
    scripted.downloads = deque([drip(3, 1.0), drip(100_000, 1.0)])
    async with session_on(scripted) as session:
        assert await session.read(image_at(scripted)) == IMAGE

    first, second = times(scripted)
    assert (first, 30.0 <= second <= 31.0) == (0.0, True)
    assert scripted.received[1].headers["Range"] == "bytes=90-"


async def test_pace_is_measured_until_the_end(scripted: ScriptedGateway) -> None:
    """An attempt whose pace drops in the middle fails within two windows, and keeps what it has."""

    async def fast_then_slow(connection: Connection) -> None:
        await connection.send(
            f"HTTP/1.1 200 OK\r\nContent-Length: {len(IMAGE)}\r\nAccept-Ranges: bytes\r\n\r\n".encode()
        )
        for position in range(0, 80_000, 1000):
            await connection.send(IMAGE[position : position + 1000])
            await anyio.sleep(0.9)
        await drip_head(1.0)(connection)

    scripted.downloads = deque([fast_then_slow, drip(100_000, 1.0)])
    async with session_on(scripted) as session:
        await session.read(image_at(scripted))

    assert 72.0 < times(scripted)[1] <= 72.0 + 61.0
    assert int(scripted.received[1].headers["Range"].removeprefix("bytes=").removesuffix("-")) > 80_000


async def test_too_slow_attempt_without_ranges(scripted: ScriptedGateway, tmp_path: Path) -> None:
    """If a download can't be resumed and is always too slow, it fails when its 60 s of failures are over."""
    scripted.downloads = deque([drip(1000, 1.0, is_resumable=False)])
    async with session_on(scripted) as session:
        with pytest.raises(DownloadError, match=f"times in a row, for 60 s: the download was {SLOW}"):
            await session.save(image_at(scripted), tmp_path / "a.jpeg")

    assert 90.0 <= times(scripted)[-1] <= 92.0
    assert list(tmp_path.iterdir()) == []


async def test_too_slow_download_that_is_resumed_for_ever(scripted: ScriptedGateway) -> None:
    """A download that makes a little progress in each attempt is given up after the timeout and the 60 s."""
    scripted.downloads = deque([drip(3, 1.0)])
    async with session_on(scripted, task_timeout=300.0) as session:
        with pytest.raises(DownloadError, match=SLOW):
            await session.read(image_at(scripted))

    assert 300.0 <= times(scripted)[-1] <= 400.0


@pytest.mark.parametrize(
    ("count", "every"),
    [
        pytest.param(1100, 1.0, id="a little faster than 1 KiB/s"),
        pytest.param(35_000, 29.0, id="in bursts"),
        pytest.param(100_000, 0.0, id="fast"),
    ],
)
async def test_fast_enough(scripted: ScriptedGateway, count: int, every: float) -> None:
    """An attempt that keeps the pace is not interrupted, even if it is slow."""
    scripted.downloads = deque([drip(count, every)])
    async with session_on(scripted, http_timeout=60.0) as session:
        assert await session.read(image_at(scripted)) == IMAGE

    assert len(scripted.received) == 1


async def test_small_image_within_the_first_window(scripted: ScriptedGateway) -> None:
    """An image that is complete within 30 s may come as slowly as it likes."""
    small = jpeg()
    scripted.downloads = deque([drip(len(small) // 20, 1.0, content=small)])
    async with session_on(scripted) as session:
        assert await session.read(image_at(scripted)) == small

    assert len(scripted.received) == 1


async def test_waiting_for_the_response_is_not_slow(scripted: ScriptedGateway) -> None:
    """The pace is that of the content: a server may take as long as the HTTP timeout until it responds."""
    scripted.downloads = deque([answer(200, IMAGE, after=80.0)])
    async with session_on(scripted, http_timeout=90.0) as session:
        assert await session.read(image_at(scripted)) == IMAGE

    assert len(scripted.received) == 1


# ---------------------------------------------------------------------- slots


@pytest.mark.parametrize(
    "slow",
    [
        pytest.param(drip(3, 1.0), id="too slow"),
        pytest.param(drip(3, 1.0, is_resumable=False), id="too slow, not resumable"),
        pytest.param(drip(5000, 4.0), id="just fast enough"),
        pytest.param(drip_head(5.0), id="in the headers"),
    ],
)
async def test_slow_downloads_do_not_stop_others(scripted: ScriptedGateway, slow: Behaviour) -> None:
    """With 100 slow downloads, others wait for 30 s at most, and later ones not at all."""
    by_name(scripted, slow=slow, fast=answer(200, IMAGE))

    async def read_many(session: FluxSession, count: int) -> float:
        """Return how long it takes to read images from a fast server."""
        started = anyio.current_time()
        for image in await asyncio.gather(*(session.read(image_at(scripted, f"fast-{n}")) for n in range(count))):
            assert image == IMAGE
        return anyio.current_time() - started

    async def read_slowly(session: FluxSession, number: int) -> None:
        with contextlib.suppress(SessionClosedError, DownloadError):
            await session.read(image_at(scripted, f"slow-{number}"))

    async with session_on(scripted) as session:
        tasks = [asyncio.ensure_future(read_slowly(session, number)) for number in range(100)]
        await anyio.sleep(1)
        first = await read_many(session, 20)
        await anyio.sleep(5)
        later = []
        for _ in range(4):
            later.append(await read_many(session, 60))
            await anyio.sleep(10)
        assert not all(task.done() for task in tasks)
    await asyncio.wait(tasks)

    assert first <= 31.0
    assert max(later) < 1.0


async def test_slow_attempts_beyond_half_of_the_slots(scripted: ScriptedGateway) -> None:
    """Of two downloads that become slow, the second is interrupted, waits for the first, and is resumed."""
    by_name(scripted, first=drip(2000, 1.0), second=drip(1900, 1.0))
    async with session_on(scripted) as session:
        session._downloader._slots = DownloadSlots(2)
        first = asyncio.ensure_future(session.read(image_at(scripted, "first")))
        await anyio.sleep(1)
        assert await session.read(image_at(scripted, "second")) == IMAGE
        assert await first == IMAGE

    assert [request.path for request in scripted.received] == ["/first", "/second", "/second"]
    start = int(scripted.received[2].headers["Range"].removeprefix("bytes=").removesuffix("-"))
    assert 50_000 < start < 60_000
    assert times(scripted)[2] > 50.0


async def test_slots_are_returned(scripted: ScriptedGateway) -> None:
    """Whatever ends downloads, waiting, fast or slow ones, all slots are free afterwards."""
    by_name(scripted, slow=drip(1100, 1.0), fast=answer(200, IMAGE), bad=answer(400, b""))
    slots = DownloadSlots(4)
    async with session_on(scripted) as session:
        session._downloader._slots = slots
        for seconds in (0.5, 20.0, 45.0):
            with anyio.move_on_after(seconds):
                await asyncio.gather(*(session.read(image_at(scripted, f"slow-{n}")) for n in range(8)))
            assert (slots.all.value, slots.slow.value) == (4, 2)
        for _ in range(6):
            await session.read(image_at(scripted, "fast"))
            with pytest.raises(DownloadError, match="HTTP 400"):
                await session.read(image_at(scripted, "bad"))

    assert (slots.all.value, slots.slow.value) == (4, 2)


@pytest.mark.parametrize("size", [1, 2, 3, 100])
async def test_a_slow_download_alone_is_not_interrupted(size: int) -> None:
    """However few slots there are, one slow attempt may run."""
    slots = DownloadSlots(size)
    async with Pace(slots).attempt():
        await anyio.sleep(100)
    with pytest.raises(TransportError, match="too many others"):
        async with contextlib.AsyncExitStack() as stack:
            for _ in range(max(1, size // 2)):
                slots.slow.acquire_nowait()
                stack.callback(slots.slow.release)
            async with Pace(slots).attempt():
                await anyio.sleep(100)

    assert (slots.all.value, slots.slow.value) == (size, max(1, size // 2))


@pytest.mark.parametrize(
    ("limit", "limit_per_host", "expected"), [(100, 0, 100), (0, 0, 100), (20, 0, 20), (100, 5, 5), (500, 0, 100)]
)
async def test_slots_of_a_borrowed_session(limit: int, limit_per_host: int, expected: int) -> None:
    """With a borrowed session there are no more slots than connections."""
    connector = aiohttp.TCPConnector(limit=limit, limit_per_host=limit_per_host)
    async with aiohttp.ClientSession(connector=connector) as http:
        assert Transport("key", "https://a.example", timeout=30.0, http=http).max_downloads == expected
    assert Transport("key", "https://a.example", timeout=30.0, http=http).max_downloads == 100
    assert Transport("key", "https://a.example", timeout=30.0, http=None).max_downloads == 100
