"""Transport: responses with large headers, over sessions of our own and borrowed ones."""

from collections import deque
from collections.abc import AsyncIterator

import aiohttp
import pytest
from support.responses import jpeg
from support.scripted import ScriptedGateway, answer, completed, raw, running, session_on

from flux2max_async import FluxSession, ProtocolError, SubmissionUncertainError, TaskStatus

IMAGE = jpeg()


@pytest.fixture(params=["own", "borrowed"])
async def session(request: pytest.FixtureRequest, scripted: ScriptedGateway) -> AsyncIterator[FluxSession]:
    """Provide a session with its own aiohttp session, and one with a borrowed one that has other limits."""
    if request.param == "own":
        async with session_on(scripted) as flux:
            yield flux
    else:
        http = aiohttp.ClientSession(max_line_size=1000, max_field_size=1000, max_headers=8)
        async with http, session_on(scripted, http_session=http) as flux:
            yield flux


@pytest.mark.parametrize(
    "headers",
    [
        pytest.param([("Set-Cookie", "x" * 20_000)], id="20 KB"),
        pytest.param([("Content-Security-Policy", "x" * 60_000)], id="60 KB"),
        pytest.param([(f"X-{number}", "x" * 1000) for number in range(60)], id="60 of 1 KB"),
        pytest.param([(f"X-{number}", "x" * 100) for number in range(500)], id="500"),
    ],
)
async def test_large_headers(scripted: ScriptedGateway, session: FluxSession, headers: list[tuple[str, str]]) -> None:
    """Responses with large headers are read: to a submit, which is sent once, to polls and to downloads."""
    scripted.submits = deque([answer(200, running(), headers)])
    scripted.polls = deque([answer(200, completed(url=f"{scripted.url}/0.jpeg"), headers)])
    scripted.downloads = deque([answer(302, b"", [("Location", "/1.jpeg"), *headers]), answer(200, IMAGE, headers)])
    outcome = await session.generate("a cat")

    assert await session.read(outcome.images[0]) == IMAGE
    assert [request.method for request in scripted.received] == ["POST", "GET", "GET", "GET"]


async def test_headers_that_are_too_large(scripted: ScriptedGateway, session: FluxSession) -> None:
    """A submit whose response has a larger header is uncertain, and is sent once."""
    scripted.submits = deque([answer(200, running(), [("Set-Cookie", "x" * 70_000)])])
    with pytest.raises(SubmissionUncertainError):
        await session.generate("a cat")

    assert len(scripted.received) == 1


async def test_headers_that_are_too_large_after_early_hints(scripted: ScriptedGateway) -> None:
    """The limit counts until the response itself, and not until an informational one."""
    headers = b"".join(b"X-%d: %s\r\n" % (number, b"x" * 60_000) for number in range(100))
    response = b"HTTP/1.1 103 Early Hints\r\n\r\nHTTP/1.1 200 OK\r\n" + headers + b"Content-Length: 2\r\n\r\n{}"
    scripted.polls = deque([raw(response), answer(200, completed())])
    async with session_on(scripted) as session:
        with pytest.raises(ProtocolError, match="not valid HTTP"):
            await session.fetch("t1")
        assert (await session.fetch("t1")).status is TaskStatus.COMPLETED


@pytest.mark.parametrize("size", [1100, 60_000])
async def test_headers_that_are_too_large_together(scripted: ScriptedGateway, size: int) -> None:
    """A response with more than 1 MB of headers is not read to the end of them; the next one is."""
    headers = [(f"X-{number}", "x" * size) for number in range(990)]
    scripted.polls = deque([answer(200, running(), headers), answer(200, completed())])
    async with session_on(scripted) as session:
        with pytest.raises(ProtocolError, match="not valid HTTP"):
            await session.fetch("t1")
        snapshot = await session.fetch("t1")

    assert snapshot.status is TaskStatus.COMPLETED
