"""Pictures in memory as input images: encoded as PNG, upright and with their alpha."""

import io
from typing import Any, BinaryIO

import pytest
from PIL import Image
from support.responses import picture

from flux2max_async import GenerationRequest, InputImage, InvalidRequestError, SupportsImageSave
from flux2max_async._models.images import has_pictures

MODES = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV", "I", "F")
ORIENTATION = 0x0112


def encoded(image: SupportsImageSave) -> Image.Image:
    """Return what is sent for a picture, decoded."""
    data = InputImage(image).read()
    assert data.startswith(b"\x89PNG")
    decoded = Image.open(io.BytesIO(data))
    decoded.load()
    return decoded


@pytest.mark.parametrize("mode", [*MODES, "I;16", "I;16B", "I;16L", "I;16N"])
def test_every_mode_is_encoded(mode: str) -> None:
    """A Pillow image of any mode becomes a PNG of the same size."""
    assert encoded(Image.new(mode, (5, 3))).size == (5, 3)


@pytest.mark.parametrize("mode", ["RGB", "CMYK", "YCbCr", "HSV", "RGBA", "RGBa", "P"])
def test_colours_are_kept(mode: str) -> None:
    """The colours of a picture are about the same after the encoding, whatever its mode was."""
    original = Image.new("RGB", (4, 4), (200, 40, 90))
    image = original.convert("RGBA").convert(mode) if mode == "RGBa" else original.convert(mode)
    pixel, expected = (picture.convert("RGB").getpixel((1, 1)) for picture in (encoded(image), image))

    assert isinstance(pixel, tuple)
    assert isinstance(expected, tuple)
    assert max(abs(a - b) for a, b in zip(pixel, expected, strict=True)) <= 2


@pytest.mark.parametrize("mode", ["RGBA", "RGBa", "LA", "La", "PA"])
def test_alpha_is_kept(mode: str) -> None:
    """A transparent pixel is still transparent."""
    image = Image.new("RGBA", (2, 1), (90, 90, 90, 255))
    image.putpixel((0, 0), (90, 90, 90, 0))
    if mode != "RGBA":
        image = image.convert("RGBA" if mode in {"RGBa", "PA"} else "LA").convert(mode)
    alpha = encoded(image).convert("RGBA").getchannel("A")

    assert [alpha.getpixel((x, 0)) for x in (0, 1)] == [0, 255]


def test_a_transparent_colour_of_a_palette_is_kept() -> None:
    """A palette's transparent colour, as GIFs have one, is transparent in the PNG."""
    image = Image.new("P", (2, 1), 1)
    image.putpalette([10, 10, 10, 200, 200, 200])
    image.putpixel((0, 0), 0)
    image.info["transparency"] = 0
    alpha = encoded(image).convert("RGBA").getchannel("A")

    assert [alpha.getpixel((x, 0)) for x in (0, 1)] == [0, 255]


def test_a_photo_is_upright() -> None:
    """The orientation in the EXIF data of a photo is applied, and the picture itself isn't changed."""
    photo = Image.new("RGB", (6, 2), "navy")
    exif = photo.getexif()
    exif[ORIENTATION] = 6  # taken upright: to be turned by 90 degrees
    file = io.BytesIO()
    photo.save(file, "JPEG", exif=exif)
    opened = Image.open(file)

    assert encoded(opened).size == (2, 6)
    assert opened.size == (6, 2)
    assert encoded(opened).getexif().get(ORIENTATION, 1) == 1


def test_the_profile_of_other_colours_is_left_out() -> None:
    """The colour profile of a CMYK picture isn't put into the PNG, whose colours are others; that of an RGB one is."""
    print_, screen = Image.new("CMYK", (2, 2)), Image.new("RGB", (2, 2))
    print_.info["icc_profile"] = screen.info["icc_profile"] = b"profile"

    assert "icc_profile" not in encoded(print_).info
    assert encoded(screen).info["icc_profile"] == b"profile"


def test_a_picture_is_encoded_when_its_request_is_built() -> None:
    """A picture that is changed later doesn't change the request."""
    image = Image.new("RGB", (2, 2), "white")
    request = GenerationRequest("a cat", input_images=[image])
    image.putpixel((0, 0), (0, 0, 0))

    assert request == GenerationRequest("a cat", input_images=[Image.new("RGB", (2, 2), "white")])
    assert request != GenerationRequest("a cat", input_images=[image])


class OtherPicture:
    """A picture of another library that saves itself as Pillow's do."""

    def __init__(self, result: bytes | Exception) -> None:
        self.result = result

    def save(self, fp: BinaryIO, /, format: str) -> None:
        assert format == "PNG"
        if isinstance(self.result, Exception):
            raise self.result
        fp.write(self.result)


def test_an_object_that_saves_itself_is_a_picture() -> None:
    """Whatever has Pillow's save() is encoded by it."""
    assert InputImage(OtherPicture(picture())).source == picture()


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (OSError("the file is closed"), r"input_images\[1\]: can't encode the OtherPicture object as PNG: the file is"),
        (KeyError("x"), "can't encode the OtherPicture object as PNG: 'x'"),
        (b"", "the picture, encoded as PNG, is empty"),
        (b"BM....", "the picture, encoded as PNG, is not a PNG, JPEG, WebP or GIF"),
        (picture() + bytes(20_000_000), "the picture, encoded as PNG, is larger than 20 MB"),
    ],
)
def test_a_picture_that_cannot_be_encoded(result: bytes | Exception, message: str) -> None:
    """The error names the index and the reason."""
    with pytest.raises(InvalidRequestError, match=message) as caught:
        GenerationRequest("a cat", input_images=["https://a.example/", OtherPicture(result)])

    assert caught.value.field == "input_images"


def test_a_picture_that_closes_its_file() -> None:
    """An object that closes the file which it is saved into can't be encoded."""

    class ClosingPicture:
        def save(self, fp: BinaryIO, /, format: str) -> None:
            fp.close()

    with pytest.raises(InvalidRequestError, match="can't encode the ClosingPicture object as PNG"):
        InputImage(ClosingPicture())


def test_a_single_picture_is_refused() -> None:
    """Even a single picture has to be in a list."""
    with pytest.raises(InvalidRequestError, match="must be a list"):
        GenerationRequest("a cat", input_images=Image.new("RGB", (1, 1)))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("sources", "expected"),
    [
        (None, False),
        ([], False),
        (["https://a.example/", picture(), io.BytesIO(picture())], False),
        ([picture(), Image.new("RGB", (1, 1))], True),
        ((OtherPicture(b""),), True),
        (Image.new("RGB", (1, 1)), False),
    ],
)
def test_what_takes_long_to_encode(sources: Any, expected: bool) -> None:
    """A list with a picture object is built off the event loop; URLs, bytes and files need not be."""
    assert has_pictures(sources) is expected
