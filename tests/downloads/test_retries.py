"""Failed downloads: what is tried again, for how long, and when the task is asked for a fresh URL."""

from collections import deque
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

import anyio
import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.responses import jpeg, picture
from support.scripted import (
    Behaviour,
    Connection,
    ScriptedGateway,
    answer,
    completed,
    disconnect,
    raw,
    reset,
    session_on,
)

from flux2max_async import DownloadError, GeneratedImage, ResultExpiredError, SessionClosedError, TaskSnapshot
from flux2max_async._api.transport import Transport
from flux2max_async._downloads.downloader import Downloader
from flux2max_async._downloads.retries import EXPIRY_GRACE, RETRY_WINDOW, Link, Retries
from flux2max_async._downloads.transfer import AttemptError
from flux2max_async._models.results import NO_URL
from flux2max_async._stats import SessionCounters

IMAGE = jpeg(bytes(range(256)) * 12)
POLL_PATH = "/model/v1/generation/task/t1"


def image_at(scripted: ScriptedGateway, age: float | None = None) -> GeneratedImage:
    """Return an image whose URL was received so many seconds ago."""
    received_at = None if age is None else datetime.now(UTC) - timedelta(seconds=age)
    return GeneratedImage(url=f"{scripted.url}/0.jpeg", type="image", task_id="t1", received_at=received_at)


def until(seconds: float, behaviour: Behaviour, then: Behaviour | None = None) -> Behaviour:
    """Behave in one way for so many seconds from now, and then in another, by default with the image."""
    end = anyio.current_time() + seconds
    then = then or answer(200, IMAGE)

    async def behave(connection: Connection) -> None:
        await (behaviour if anyio.current_time() < end else then)(connection)

    return behave


def by_path(**behaviours: Behaviour) -> Behaviour:
    """Behave as the name of the requested file says."""

    async def behave(connection: Connection) -> None:
        await behaviours[connection.call.path.strip("/").partition(".")[0]](connection)

    return behave


def fresh_url(scripted: ScriptedGateway) -> Behaviour:
    return answer(200, completed(url=f"{scripted.url}/fresh.jpeg"))


def times(scripted: ScriptedGateway, path: str = "/0.jpeg") -> list[float]:
    """Return when a path was requested, in seconds since the first request."""
    return [round(request.at - scripted.received[0].at, 3) for request in scripted.received if request.path == path]


async def read(
    scripted: ScriptedGateway, image: GeneratedImage | None = None, *, task_timeout: float | None = 600.0
) -> bytes:
    async with session_on(scripted, task_timeout=task_timeout) as session:
        return await session.read(image or image_at(scripted))


def cut(image: bytes) -> Behaviour:
    """Send half of an image without its length."""
    return raw(b"HTTP/1.1 200 OK\r\nContent-Type: image/jpeg\r\n\r\n" + image[: len(image) // 2])


def chunked(content: bytes) -> Behaviour:
    """Send content in one chunk."""
    head = f"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n{len(content):x}\r\n"

    async def behave(connection: Connection) -> None:
        await connection.send(head.encode() + content + b"\r\n0\r\n\r\n")

    return behave


NO_IMAGES = [
    pytest.param(answer(200, b"<html><h1>Just a moment...</h1></html>", [("Content-Type", "image/jpeg")]), id="HTML"),
    pytest.param(answer(200, {"detail": "not ready"}), id="JSON"),
    pytest.param(answer(200, b""), id="empty"),
    pytest.param(answer(200, b"pending\n"), id="text"),
    pytest.param(answer(200, b"\xff\xd8"), id="two bytes"),
    pytest.param(cut(IMAGE), id="JPEG cut without a length"),
    pytest.param(cut(picture("PNG")), id="PNG cut without a length"),
    pytest.param(cut(picture("WEBP")), id="WebP cut without a length"),
    pytest.param(chunked(IMAGE[:-1]), id="JPEG without its end, in chunks"),
    pytest.param(answer(200, IMAGE[:-1], [("Content-Encoding", "identity")]), id="JPEG without its end, encoded"),
    pytest.param(answer(200, IMAGE[:99], [("Accept-Ranges", "bytes"), ("Content-Encoding", "x")]), id="encoded"),
]
STATUSES = [pytest.param(answer(status, b""), id=str(status)) for status in (202, 204, 408, 425, 429, 500, 503, 599)]
REFUSALS = [pytest.param(answer(status, b""), id=str(status)) for status in (403, 404, 410)]


# ---------------------------------------------------------------------- what is tried again


@pytest.mark.parametrize("seconds", [2.0, 12.0, 50.0])
@pytest.mark.parametrize("failure", [*STATUSES, *NO_IMAGES, pytest.param(disconnect, id="disconnected")])
async def test_failures_are_tried_again(scripted: ScriptedGateway, failure: Behaviour, seconds: float) -> None:
    """What may be over soon is tried again for 60 s, whatever the task timeout is, and without asking the task."""
    scripted.downloads = deque([until(seconds, failure)])

    assert await read(scripted, task_timeout=1.0) == IMAGE
    assert {request.path for request in scripted.received} == {"/0.jpeg"}
    assert len(scripted.received) <= 40


@pytest.mark.parametrize("age", [None, 1.0, 40.0])
@pytest.mark.parametrize("refusal", REFUSALS)
async def test_young_link_that_does_not_work_yet(
    scripted: ScriptedGateway, refusal: Behaviour, age: float | None
) -> None:
    """A young link that is refused for a few seconds is tried again, without asking the task."""
    scripted.downloads = deque([until(5.0, refusal)])

    assert await read(scripted, image_at(scripted, age), task_timeout=1.0) == IMAGE
    assert {request.path for request in scripted.received} == {"/0.jpeg"}


@pytest.mark.parametrize("whole", [chunked(IMAGE), raw(b"HTTP/1.1 200 OK\r\n\r\n" + IMAGE), answer(203, IMAGE)])
async def test_image_without_a_length(scripted: ScriptedGateway, whole: Behaviour) -> None:
    """An image whose end is there needs no length, and a proxy may have passed it on."""
    scripted.downloads = deque([whole])

    assert await read(scripted) == IMAGE
    assert len(scripted.received) == 1


async def test_length_is_enough(scripted: ScriptedGateway) -> None:
    """If all bytes that were declared came, they are saved as the service has them."""
    scripted.downloads = deque([answer(200, IMAGE[:-1])])

    assert await read(scripted) == IMAGE[:-1]


@pytest.mark.parametrize("failure", [*STATUSES, *NO_IMAGES])
async def test_failures_until_the_end(scripted: ScriptedGateway, failure: Behaviour, tmp_path: Path) -> None:
    """After 60 s of failures one more attempt is made, and then the download fails and leaves no file."""
    scripted.downloads = deque([failure])
    async with session_on(scripted, task_timeout=1.0) as session:
        with pytest.raises(DownloadError, match="times in a row, for 60 s") as caught:
            await session.save(image_at(scripted), tmp_path / "a.jpeg")

    assert not isinstance(caught.value, ResultExpiredError)
    assert caught.value.task_id == "t1"
    assert times(scripted)[-1] == RETRY_WINDOW
    assert {request.path for request in scripted.received} == {"/0.jpeg"}
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("status", [304, 400, 401, 402, 405, 451])
async def test_other_statuses_are_final(scripted: ScriptedGateway, status: int) -> None:
    """Any other status ends the download at once."""
    scripted.downloads = deque([answer(status, b"")])
    with pytest.raises(DownloadError, match=f"HTTP {status}"):
        await read(scripted)

    assert len(scripted.received) == 1


async def test_attempt_that_hangs_until_the_end(scripted: ScriptedGateway) -> None:
    """If an attempt takes longer than what is left of the 60 s, there is one more at once."""
    scripted.downloads = deque([answer(503, b""), raw(b"", then="hang"), raw(b"", then="hang"), answer(200, IMAGE)])
    async with session_on(scripted, http_timeout=40.0) as session:
        assert await session.read(image_at(scripted)) == IMAGE

    assert times(scripted)[-1] > RETRY_WINDOW
    assert len(scripted.received) == 4


async def test_closing_the_session_ends_the_waits(scripted: ScriptedGateway) -> None:
    """Closing the session ends a download that waits for its next attempt at once."""
    scripted.downloads = deque([answer(503, b"", [("Retry-After", "50")])])
    session = session_on(scripted)
    async with anyio.create_task_group() as group, session:

        async def read_and_fail() -> None:
            with pytest.raises(SessionClosedError):
                await session.read(image_at(scripted))

        group.start_soon(read_and_fail)
        await anyio.sleep(5)
        closed_at = anyio.current_time()
        await session.aclose()
    assert anyio.current_time() - closed_at < 1.0
    assert len(scripted.received) == 1


# ---------------------------------------------------------------------- Retry-After


def retry_after(value: str, *headers: tuple[str, str]) -> list[tuple[str, str]]:
    return [("Retry-After", value), *headers]


SUNDAY = datetime(2026, 11, 22, 10, 0, 0, tzinfo=UTC)
DATE = ("Date", format_datetime(SUNDAY, usegmt=True))


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        pytest.param(retry_after("20"), 20.0, id="seconds"),
        pytest.param(retry_after("20.5"), 20.5, id="fraction"),
        pytest.param(retry_after(format_datetime(SUNDAY + timedelta(seconds=33), usegmt=True), DATE), 33.0, id="date"),
        pytest.param(retry_after("60"), 60.0, id="the whole window"),
        pytest.param(retry_after("3600"), 60.0, id="longer than the window"),
        pytest.param(retry_after(format_datetime(SUNDAY - timedelta(days=1), usegmt=True), DATE), None, id="past"),
        pytest.param(retry_after("0"), None, id="now"),
        pytest.param(retry_after("soon"), None, id="not valid"),
    ],
)
@pytest.mark.parametrize("status", [202, 403, 404, 408, 410, 416, 425, 429, 500, 503])
async def test_retry_after(
    scripted: ScriptedGateway, status: int, headers: list[tuple[str, str]], expected: float | None
) -> None:
    """Nothing is requested before the time that the server names, but once at the end of the 60 s in any case."""
    scripted.downloads = deque([answer(status, b"", headers), answer(200, IMAGE)])

    assert await read(scripted) == IMAGE
    first, second = times(scripted)
    assert first == 0.0
    assert second == expected if expected is not None else 0.0 < second <= 0.5


# ---------------------------------------------------------------------- fresh URLs


@pytest.mark.parametrize("refusal", REFUSALS)
async def test_young_link_that_stays_refused(scripted: ScriptedGateway, refusal: Behaviour) -> None:
    """After 10 s of refusals the task is asked once for a fresh URL, which works."""
    scripted.downloads = deque([by_path(**{"0": refusal}, fresh=answer(200, IMAGE))])
    scripted.polls = deque([fresh_url(scripted)])

    assert await read(scripted) == IMAGE
    assert times(scripted, POLL_PATH) == [EXPIRY_GRACE]
    assert times(scripted)[-1] == EXPIRY_GRACE


@pytest.mark.parametrize("failure", [*STATUSES, *REFUSALS, *NO_IMAGES])
@pytest.mark.parametrize("age", [61.0, 86_400.0])
async def test_old_link(scripted: ScriptedGateway, failure: Behaviour, age: float) -> None:
    """An old link that is refused is replaced at once, and the fresh one is tried for 60 s of its own."""
    scripted.downloads = deque(
        [by_path(**{"0": answer(404, b"")}, fresh=until(55.0, failure, until(5.0, failure)))],
    )
    scripted.polls = deque([fresh_url(scripted)])

    assert await read(scripted, image_at(scripted, age), task_timeout=1.0) == IMAGE
    assert times(scripted) == [0.0]
    assert times(scripted, POLL_PATH) == [0.0]
    assert times(scripted, "/fresh.jpeg")[-1] >= 55.0


async def test_old_link_after_other_failures(scripted: ScriptedGateway) -> None:
    """The fresh URL of an old link has 60 s of its own, even if other failures came before the refusal."""
    fresh = until(100.0, answer(404, b""))
    scripted.downloads = deque([by_path(**{"0": until(45.0, answer(503, b""), answer(410, b""))}, fresh=fresh)])
    scripted.polls = deque([fresh_url(scripted)])

    assert await read(scripted, image_at(scripted, 100.0)) == IMAGE
    assert times(scripted, "/fresh.jpeg")[-1] >= 100.0
    assert len(times(scripted, POLL_PATH)) == 1


@pytest.mark.parametrize("age", [None, 1.0, 61.0])
@pytest.mark.parametrize("refusal", REFUSALS)
async def test_fresh_url_is_refused_too(scripted: ScriptedGateway, refusal: Behaviour, age: float | None) -> None:
    """The fresh URL gets what remains of the 60 s, and then the error says that both have expired."""
    scripted.downloads = deque([refusal])
    scripted.polls = deque([fresh_url(scripted)])
    with pytest.raises(ResultExpiredError, match=r"expired \(HTTP 4\d\d\), and so has the fresh one of task t1"):
        await read(scripted, image_at(scripted, age))

    assert times(scripted, "/fresh.jpeg")[-1] == RETRY_WINDOW
    assert len(times(scripted, POLL_PATH)) == 1


POLLS_WITHOUT_URL = [
    pytest.param(answer(503, b""), id="503"),
    pytest.param(answer(404, b""), id="no such task"),
    pytest.param(answer(200, {"status": "in_progress"}), id="no images"),
    pytest.param(disconnect, id="disconnected"),
]


@pytest.mark.parametrize("poll", POLLS_WITHOUT_URL)
async def test_young_link_without_a_fresh_one(scripted: ScriptedGateway, poll: Behaviour) -> None:
    """If the task has no fresh URL, a young link is tried on, and saved if it begins to work within its 60 s."""
    scripted.downloads = deque([until(40.0, answer(404, b""))])
    scripted.polls = deque([poll])

    assert await read(scripted) == IMAGE
    assert times(scripted)[-1] >= 40.0


@pytest.mark.parametrize("poll", POLLS_WITHOUT_URL)
async def test_young_link_without_a_fresh_one_expires(scripted: ScriptedGateway, poll: Behaviour) -> None:
    """If a young link never works and the task has no fresh URL, the error says both, after 60 s and one poll."""
    scripted.downloads = deque([answer(404, b"")])
    scripted.polls = deque([poll])
    with pytest.raises(ResultExpiredError, match=r"expired \(HTTP 404\), and task t1 has no fresh one"):
        await read(scripted)

    assert times(scripted)[-1] == RETRY_WINDOW
    assert len({*times(scripted, POLL_PATH)}) == 1


@pytest.mark.parametrize("age", [None, 61.0])
async def test_fresh_url_is_the_same(scripted: ScriptedGateway, age: float | None) -> None:
    """If the task returns the URL that was refused, it is tried on, and not before the time that its server names."""
    scripted.downloads = deque([until(45.0, answer(404, b"", retry_after("20")))])
    scripted.polls = deque([answer(200, completed(url=f"{scripted.url}/0.jpeg"))])

    assert await read(scripted, image_at(scripted, age)) == IMAGE
    assert times(scripted) == [0.0, 20.0, 40.0, 60.0]
    assert times(scripted, POLL_PATH) == [20.0 if age is None else 0.0]


async def test_refusal_at_the_end_of_other_failures(scripted: ScriptedGateway) -> None:
    """A link that is refused only at the end of the 60 s is replaced, and the fresh one is tried once."""
    scripted.downloads = deque(
        [by_path(**{"0": until(59.9, answer(503, b""), answer(404, b""))}, fresh=answer(200, IMAGE))]
    )
    scripted.polls = deque([fresh_url(scripted)])

    assert await read(scripted) == IMAGE
    assert times(scripted, "/fresh.jpeg") == [RETRY_WINDOW]


@pytest.mark.parametrize(("url", "images"), [(NO_URL, [IMAGE]), ("/0.jpeg", [])])
async def test_closed_session_while_the_task_is_asked(scripted: ScriptedGateway, url: str, images: list[bytes]) -> None:
    """If the session is closed when the task is asked, that is the error, and not an expired URL."""
    scripted.downloads = deque([answer(404, b"")])

    async def poll(_: str) -> TaskSnapshot:
        raise SessionClosedError("closed")

    transport = Transport("key", scripted.url, timeout=30.0, http=None)
    transport.open(1)
    image = GeneratedImage(url=NO_URL if images else scripted.url + url, type="image", task_id="t1")
    with pytest.raises(SessionClosedError):
        await Downloader(transport, 600.0, poll, SessionCounters()).read(image)
    await transport.close()


async def test_image_without_a_url(scripted: ScriptedGateway) -> None:
    """The task of an image whose URL is not known is asked at once, and nothing is requested before."""
    scripted.downloads = deque([until(55.0, answer(404, b""))])
    scripted.polls = deque([fresh_url(scripted)])
    image = GeneratedImage(url=NO_URL, type="image", task_id="t1")

    assert await read(scripted, image) == IMAGE
    assert [request.path for request in scripted.received[:2]] == [POLL_PATH, "/fresh.jpeg"]
    assert len(times(scripted, POLL_PATH)) == 1


@pytest.mark.parametrize("poll", POLLS_WITHOUT_URL)
async def test_image_without_any_url(scripted: ScriptedGateway, poll: Behaviour) -> None:
    """If the task has no URL for an image without one, it has expired."""
    scripted.polls = deque([poll])
    with pytest.raises(ResultExpiredError, match="task t1 has no fresh one"):
        await read(scripted, GeneratedImage(url=NO_URL, type="image", task_id="t1"))

    assert len({request.path for request in scripted.received}) == 1


# ---------------------------------------------------------------------- progress


def dribble(seconds: float, count: int) -> Behaviour:
    """Send a few more bytes of the image, after a while, and disconnect."""
    headers = 'Accept-Ranges: bytes\r\nETag: "v1"\r\n'

    async def behave(connection: Connection) -> None:
        start = int(connection.call.headers.get("Range", "bytes=0-").removeprefix("bytes=").removesuffix("-"))
        content_range = f"Content-Range: bytes {start}-{len(IMAGE) - 1}/{len(IMAGE)}\r\n" if start else ""
        head = (
            f"HTTP/1.1 {206 if start else 200} OK\r\nContent-Length: {len(IMAGE) - start}\r\n{content_range}{headers}"
        )
        await anyio.sleep(seconds)
        await connection.send(f"{head}\r\n".encode() + IMAGE[start : start + count])
        connection.writer.close()

    return behave


async def test_progress_begins_a_new_row(scripted: ScriptedGateway) -> None:
    """A download that is continued again and again is not given up as long as something comes each time."""
    scripted.downloads = deque([dribble(25.0, len(IMAGE) // 10)])

    assert await read(scripted) == IMAGE
    assert times(scripted)[-1] > 200.0


async def test_progress_does_not_last_for_ever(scripted: ScriptedGateway) -> None:
    """A server that sends a byte for each request is given up after the timeout and the 60 s."""
    scripted.downloads = deque([dribble(1.0, 1)])
    with pytest.raises(DownloadError, match="times in a row"):
        await read(scripted, task_timeout=300.0)

    assert 300.0 <= times(scripted)[-1] <= 365.0


async def test_restarts_are_no_progress(scripted: ScriptedGateway) -> None:
    """Bytes that have to be requested again don't prolong the 60 s, however many they are."""
    lengths = iter(range(100, 10_000, 100))

    async def longer_each_time(connection: Connection) -> None:
        await raw(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n" + bytes(next(lengths)))(connection)

    scripted.downloads = deque([longer_each_time])
    with pytest.raises(DownloadError, match="for 60 s"):
        await read(scripted)

    assert times(scripted)[-1] == RETRY_WINDOW


# ---------------------------------------------------------------------- the functions of the time


@given(st.lists(st.tuples(st.floats(0.0, 100.0), st.floats(0.0, 1.0), st.none() | st.floats(0.0, 1e9)), min_size=1))
def test_row_of_failures(attempts: list[tuple[float, float, float | None]]) -> None:
    """Whatever attempts take, a row ends with the first that begins 60 s after the first failure, and with no other."""
    retries, now, end = Retries(), 0.0, 0.0
    for number, (duration, jitter, seconds) in enumerate(attempts, start=1):
        began, now = now, now + duration
        end = end or now + RETRY_WINDOW
        is_over = retries.add(now, AttemptError("HTTP 503", retry_after=seconds))
        assert retries.failures == number
        assert is_over == (number > 1 and began >= end)
        if is_over:
            break
        delay = retries.next_delay(now, jitter)
        assert 0.0 <= delay <= RETRY_WINDOW + 0.001
        assert delay >= min(seconds or 0.0, max(0.0, end - now))
        now = end if retries.is_last and now < end else now + delay


@pytest.mark.parametrize(
    ("age", "is_fresh", "expected"),
    [
        *((None, False, True), (0.0, False, True), (59.9, False, True), (-3600.0, False, True)),
        *((60.0, False, False), (1e6, False, False), (1e6, True, True)),
    ],
)
def test_young_links(age: float | None, is_fresh: bool, expected: bool) -> None:
    """A link is young for 60 s, if nobody knows its age, and if the task has just returned it."""
    received_at = None if age is None else SUNDAY - timedelta(seconds=age)

    assert Link("", received_at, is_fresh=is_fresh).is_young(SUNDAY) is expected


@pytest.mark.parametrize("url", ["an old link", NO_URL])
@pytest.mark.parametrize(
    "failure", [answer(503, b"", retry_after("1")), answer(429, b""), answer(403, b"<html>"), reset]
)
async def test_poll_for_a_fresh_url_is_repeated(scripted: ScriptedGateway, failure: Behaviour, url: str) -> None:
    """If the poll for a fresh URL fails for a reason that isn't the task's, it is repeated until it is answered."""
    scripted.downloads = deque([by_path(**{"0": answer(403, b"")}, fresh=answer(200, IMAGE))])
    scripted.polls = deque([failure, failure, fresh_url(scripted)])
    image = image_at(scripted, 86_400.0)

    assert await read(scripted, attrs.evolve(image, url=NO_URL) if url == NO_URL else image) == IMAGE


async def test_poll_for_a_fresh_url_that_always_fails(scripted: ScriptedGateway) -> None:
    """After 60 s without an answer to the poll for a fresh URL, an old link counts as expired."""
    scripted.downloads = deque([answer(403, b"")])
    scripted.polls = deque([answer(503, b"")])
    with pytest.raises(ResultExpiredError, match=r"has no fresh one: .*503"):
        await read(scripted, image_at(scripted, 86_400.0))

    assert times(scripted, POLL_PATH)[-1] == pytest.approx(RETRY_WINDOW, abs=0.1)
