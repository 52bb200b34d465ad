"""Inline images: a data: URI is saved, read and streamed without any request for it."""

import base64
from collections import deque
from pathlib import Path
from urllib.parse import quote, quote_from_bytes

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.responses import jpeg, picture
from support.scripted import ScriptedGateway, answer, completed, session_on

from flux2max_async import DownloadError, GeneratedImage
from flux2max_async._downloads import transfer
from flux2max_async._downloads.inline_images import decode_inline_image
from flux2max_async._models.results import NO_URL

IMAGE = jpeg(bytes(range(256)))
BASE64 = base64.b64encode(IMAGE).decode()
URI = f"data:image/jpeg;base64,{BASE64}"


def inline(uri: str) -> GeneratedImage:
    return GeneratedImage(url=uri, type="image", task_id="t1")


@pytest.mark.parametrize(
    "uri",
    [
        pytest.param(URI, id="base64"),
        pytest.param(f"DATA:Image/JPEG;Base64,{BASE64}", id="uppercase"),
        pytest.param(f"data:;base64,{BASE64}", id="no type"),
        pytest.param(f"data:image/jpeg;name=a%2Cb;charset=utf-8; base64 ,{BASE64}", id="parameters"),
        pytest.param(f"data:image/png;base64,{BASE64}", id="another type"),
        pytest.param(f"data:image/jpeg;base64,{quote(BASE64, safe='')}", id="base64 with escapes"),
        pytest.param(f"data:image/jpeg;base64,{BASE64.rstrip('=')}", id="no padding"),
        pytest.param(f"data:image/jpeg;base64,{base64.encodebytes(IMAGE).decode()}", id="lines"),
        pytest.param(f"data:image/jpeg;base64,{base64.urlsafe_b64encode(IMAGE).decode()}", id="URL-safe alphabet"),
        pytest.param(f"data:image/jpeg,{quote_from_bytes(IMAGE)}", id="escapes"),
        pytest.param(f"data:,{quote_from_bytes(IMAGE)}", id="escapes without a type"),
    ],
)
async def test_inline_image(scripted: ScriptedGateway, tmp_path: Path, uri: str) -> None:
    """An inline image is saved, read and streamed, and nothing is requested for it."""
    scripted.submits = deque([answer(200, completed(url=uri))])
    async with session_on(scripted) as session:
        path = await session.save(inline(uri), tmp_path / "a.jpeg")
        content = await session.read(inline(uri))
        (outcome,) = [outcome.unwrap() async for outcome in session.stream(["a cat"], save_to=tmp_path / "cats")]

    assert path.read_bytes() == content == IMAGE
    assert outcome.saved == (tmp_path / "cats" / "a-cat-6a1b0141.jpeg",)
    assert outcome.saved[0].read_bytes() == IMAGE
    assert [request.method for request in scripted.received] == ["POST"]


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        pytest.param("data:image/jpeg;base64", "no comma", id="no comma"),
        pytest.param("data:image/jpeg;base64,/9j!", "not valid base64", id="not base64"),
        pytest.param("data:image/jpeg;base64,/9j/A", "not valid base64", id="wrong length"),
        pytest.param("data:image/jpeg;base64,é", "not valid base64", id="not ASCII"),
        pytest.param("data:image/jpeg;base64,", "not an image", id="empty"),
        pytest.param("data:text/html,<h1>Sorry</h1>", "not an image", id="HTML"),
        pytest.param(f"data:image/jpeg,{BASE64}", "not an image", id="base64 that isn't declared"),
        pytest.param(f"data:image/jpeg;base64,{BASE64[:400]}", "not complete", id="cut"),
    ],
)
async def test_inline_image_that_is_none(scripted: ScriptedGateway, tmp_path: Path, uri: str, message: str) -> None:
    """Bad inline data is a DownloadError that says so, at once, and no file is left."""
    async with session_on(scripted) as session:
        with pytest.raises(DownloadError, match=message) as caught:
            await session.save(inline(uri), tmp_path / "a.jpeg")
        with pytest.raises(DownloadError, match=message):
            await session.read(inline(uri))

    assert caught.value.task_id == "t1"
    assert list(tmp_path.iterdir()) == []
    assert scripted.received == []


def test_inline_image_that_is_too_large() -> None:
    """The limit of 100 MB holds for inline images too."""
    uri = f"data:image/jpeg,{quote_from_bytes(jpeg())}" + "x" * transfer.MAX_IMAGE_BYTES
    with pytest.raises(DownloadError, match="100 MB"):
        decode_inline_image(uri)


async def test_fresh_image_is_inline(scripted: ScriptedGateway, tmp_path: Path) -> None:
    """An inline image that the journal doesn't hold is taken from the task's fresh poll."""
    scripted.polls = deque([answer(200, completed(url=URI))])
    async with session_on(scripted) as session:
        path = await session.save(inline(NO_URL), tmp_path / "a.jpeg")

    assert path.read_bytes() == IMAGE
    assert [request.path for request in scripted.received] == ["/model/v1/generation/task/t1"]


@given(st.binary(), st.sampled_from(["png", "jpeg"]))
def test_any_inline_image(payload: bytes, image_format: str) -> None:
    """The bytes of any image come back, in both encodings, with whatever follows the image."""
    data = (jpeg(payload) if image_format == "jpeg" else picture("PNG")) + payload

    assert decode_inline_image(f"data:;base64,{base64.b64encode(data).decode()}") == (data, image_format)
    assert decode_inline_image(f"data:,{quote_from_bytes(data)}") == (data, image_format)
