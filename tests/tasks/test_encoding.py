"""Pictures in memory as input images of generate() and submit(): encoded off the event loop."""

import asyncio
import base64
import threading
from collections.abc import Awaitable, Callable
from typing import Any, BinaryIO

import pytest
from support.responses import picture
from support.scripted import ScriptedGateway, session_on

from flux2max_async import FluxSession, InvalidRequestError


class SlowPicture:
    """A picture whose encoding lasts until it is released."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.started = asyncio.Event()
        self.release = threading.Event()

    def save(self, fp: BinaryIO, /, format: str) -> None:
        self.loop.call_soon_threadsafe(self.started.set)
        assert self.release.wait(60.0), "the event loop stood still"
        fp.write(picture(format))


@pytest.mark.parametrize("seconds", [None, 3600.0])
@pytest.mark.parametrize("ask", [FluxSession.generate, FluxSession.submit])
async def test_encoding_does_not_stall_the_loop(
    scripted: ScriptedGateway, ask: Callable[..., Awaitable[Any]], seconds: float | None
) -> None:
    """The event loop goes on while a large picture is encoded, and the picture is sent as PNG."""
    slow = SlowPicture()
    async with session_on(scripted) as session:
        call = asyncio.ensure_future(ask(session, "an edit", timeout=seconds, input_images=[slow]))
        await slow.started.wait()
        slow.release.set()
        await call

    (submit,) = scripted.of("POST")
    assert submit.params["input_image"] == base64.b64encode(picture()).decode()


async def test_a_picture_that_cannot_be_encoded_is_an_error(scripted: ScriptedGateway) -> None:
    """An error of the encoding is that of the call, and nothing is sent."""
    slow = SlowPicture()
    slow.save = None  # type: ignore[assignment, method-assign]
    async with session_on(scripted) as session:
        with pytest.raises(InvalidRequestError, match=r"input_images\[0\]: an image must be a URL"):
            await session.generate("an edit", input_images=[slow])
    assert scripted.received == []


@pytest.mark.parametrize("seconds", [None, 3600.0])
async def test_a_caller_who_leaves_does_not_wait_for_the_encoding(
    scripted: ScriptedGateway, seconds: float | None
) -> None:
    """A call that is cancelled while a picture is encoded ends at once, and nothing is sent."""
    slow = SlowPicture()
    async with session_on(scripted) as session:
        call = asyncio.ensure_future(session.generate("an edit", timeout=seconds, input_images=[slow]))
        await slow.started.wait()
        call.cancel()
        await asyncio.wait([call])
        assert call.cancelled()
        slow.release.set()
    assert scripted.received == []


async def test_enqueue_takes_pictures(scripted: ScriptedGateway) -> None:
    """A request that is taken in at once has its picture encoded at once."""
    slow = SlowPicture()
    slow.release.set()
    async with session_on(scripted) as session:
        await session.enqueue("an edit", input_images=[slow])

    assert scripted.of("POST")[0].params["input_image"] == base64.b64encode(picture()).decode()
