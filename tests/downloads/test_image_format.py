"""Image formats: which bytes are an image, and which are all of it."""

import io
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageSequence
from support.responses import jpeg, picture

from flux2max_async._downloads.image_format import HEAD_BYTES, detect_format, is_whole, is_whole_file


def noise(image_format: str, **options: Any) -> bytes:
    """Return an image whose data has every byte."""
    file = io.BytesIO()
    Image.effect_noise((16, 12), 90).convert("RGB").save(file, image_format, **options)
    return file.getvalue()


def with_thumbnail() -> bytes:
    """Return a JPEG whose EXIF segment contains a thumbnail, which is a whole JPEG."""
    thumbnail = picture("JPEG")
    exif = b"Exif\0\0" + thumbnail
    return b"\xff\xd8\xff\xe1" + (len(exif) + 2).to_bytes(2, "big") + exif + noise("JPEG")[2:]


def animation() -> bytes:
    file = io.BytesIO()
    frames = [Image.effect_noise((20, 10), sigma).convert("P") for sigma in (10, 60, 90)]
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:], comment=b"three frames")
    assert len(list(ImageSequence.Iterator(Image.open(file)))) == 3
    return file.getvalue()


def box(kind: bytes, content: bytes = b"........") -> bytes:
    return (8 + len(content)).to_bytes(4, "big") + kind + content


FILE_TYPE = box(b"ftyp", b"mif1\0\0\0\0mif1avif")
LOCAL_COLORS = (  # a GIF without a global colour table, of one pixel
    b"GIF89a\x01\0\x01\0\0\0\0" + b",\0\0\0\0\x01\0\x01\0\x80" + bytes(6) + b"\x02\x02D\x01\0" + b";"
)
IMAGES = {
    "jpeg": [
        pytest.param(picture("JPEG"), id="small JPEG"),
        pytest.param(noise("JPEG", quality=95), id="JPEG"),
        pytest.param(noise("JPEG", progressive=True), id="progressive JPEG"),
        pytest.param(noise("JPEG", restart_marker_blocks=1), id="JPEG with restart markers"),
        pytest.param(with_thumbnail(), id="JPEG with a thumbnail"),
        pytest.param(jpeg(bytes(range(256)) * 3), id="JPEG with comments"),
        pytest.param(picture("JPEG")[:-2] + b"\xff\xff\xff\xd9", id="JPEG with padding"),
    ],
    "png": [pytest.param(picture("PNG"), id="small PNG"), pytest.param(noise("PNG"), id="PNG")],
    "webp": [
        pytest.param(picture("WEBP"), id="small WebP"),
        pytest.param(noise("WEBP", lossless=True, exif=b"Exif\0\0abc"), id="WebP"),
    ],
    "gif": [
        pytest.param(picture("GIF"), id="small GIF"),
        pytest.param(noise("GIF"), id="GIF"),
        pytest.param(animation(), id="animated GIF"),
        pytest.param(LOCAL_COLORS, id="GIF with a local colour table"),
    ],
    "avif": [
        pytest.param(FILE_TYPE + box(b"meta") + box(b"mdat", bytes(100)), id="AVIF"),
        pytest.param(box(b"ftyp", b"avis\0\0\0\0") + box(b"moov") + box(b"mdat") + box(b"free"), id="AVIF sequence"),
        pytest.param(
            FILE_TYPE + box(b"meta") + b"\0\0\0\1mdat" + (20).to_bytes(8, "big") + b"....", id="AVIF with a long box"
        ),
    ],
}
CASES = [pytest.param(name, *case.values, id=case.id) for name, cases in IMAGES.items() for case in cases]


@pytest.mark.parametrize(("image_format", "data"), CASES)
def test_whole_images(image_format: str, data: bytes, tmp_path: Path) -> None:
    """An image has its format and is whole, alone and with anything behind it."""
    assert detect_format(data[:HEAD_BYTES]) == image_format
    for rest in (b"", b"\0", b"\n", bytes(100), b"<html>not a part of it</html>"):
        (tmp_path / "a").write_bytes(data + rest)

        assert is_whole(data + rest)
        assert is_whole_file(tmp_path / "a")


@pytest.mark.parametrize(("image_format", "data"), CASES)
def test_cut_images(image_format: str, data: bytes, tmp_path: Path) -> None:
    """An image that is cut anywhere isn't whole."""
    end = len(data) - 16 if b"free" in data else len(data)  # without that box it is complete
    for length in range(end):
        assert not is_whole(data[:length])
    (tmp_path / "a").write_bytes(data[: end - 1])
    assert not is_whole_file(tmp_path / "a")


@pytest.mark.parametrize(("image_format", "data"), [case for case in CASES if case.values[0] in {"jpeg", "png", "gif"}])
def test_images_that_end_with_zeros(image_format: str, data: bytes, tmp_path: Path) -> None:
    """A file whose last half is zeros, as after a power failure, isn't a whole image."""
    (tmp_path / "a").write_bytes(data[: len(data) // 2].ljust(len(data), b"\0"))

    assert detect_format(data) == image_format
    assert not is_whole_file(tmp_path / "a")


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"<!DOCTYPE html><html><h1>Just a moment...</h1></html>", id="HTML"),
        pytest.param(b'{"detail": "expired"}', id="JSON"),
        pytest.param(b"ok\n", id="text"),
        pytest.param(b"RIFF\x04\0\0\0AVI LIST", id="AVI"),
        pytest.param(b"RIFF\x04\0\0\0WEB", id="cut RIFF"),
        pytest.param(box(b"ftyp", b"isom\0\0\0\0mp41") + box(b"mdat"), id="MP4"),
        pytest.param(box(b"ftyp", b"heicavif") + box(b"mdat"), id="HEIC of version avif"),
        pytest.param(box(b"ftyp", b"heic\0\0\0\0") + b"avif", id="brand behind the box"),
        pytest.param(b"%PDF-1.7", id="PDF"),
        pytest.param(b"\xff\xd8", id="two bytes"),
        pytest.param(b"\x89PNG\n", id="PNG with converted line breaks"),
    ],
)
def test_other_bytes(data: bytes, tmp_path: Path) -> None:
    """Other bytes have no format and are no whole image."""
    (tmp_path / "a").write_bytes(data)

    assert detect_format(data[:HEAD_BYTES]) is None
    assert not is_whole(data)
    assert not is_whole_file(tmp_path / "a")


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"\xff\xd8\xff\xd9", id="JPEG without a scan"),
        pytest.param(b"GIF89a\x01\0\x01\0\0\0\0;", id="GIF without an image"),
        pytest.param(LOCAL_COLORS[:-1] + b"?;", id="GIF with an unknown block"),
        pytest.param(FILE_TYPE + box(b"meta"), id="AVIF without pixels"),
        pytest.param(FILE_TYPE + b"\0\0\0\0meta....", id="AVIF whose last box is not for pixels"),
        pytest.param(FILE_TYPE + box(b"mdat") + b"\0\0\0\7meta", id="AVIF with a box that is too small"),
    ],
)
def test_damaged_structures(data: bytes) -> None:
    """Bytes that begin like an image, and whose structure leads to no end, are not a whole image."""
    assert detect_format(data[:HEAD_BYTES]) is not None
    assert not is_whole(data)


def test_avif_whose_last_box_has_no_length() -> None:
    """A box of length 0 reaches to the end of the file."""
    assert is_whole(FILE_TYPE + box(b"meta") + b"\0\0\0\0mdat....")


HEADS = st.sampled_from([b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"RIFF", b"GIF89a", FILE_TYPE, b""])


@given(HEADS, st.binary())
def test_any_bytes_are_read(head: bytes, rest: bytes) -> None:
    """Any bytes are either a whole image or not: nothing is raised, and reading ends."""
    assert is_whole(head + rest) in {True, False}
