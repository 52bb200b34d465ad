"""The pictures of the emulator: the same every time, of the size asked for, and showing what they were given."""

import io
import os
import struct
import subprocess
import sys
import zlib
from collections.abc import Sequence
from itertools import combinations, pairwise
from typing import Any

import pytest
from PIL import Image, ImageChops, ImageDraw, ImageFont, ImageStat

from flux2max_async.emulator._images.caption import _wrap, _write_line
from flux2max_async.emulator._images.input_images import size_of
from flux2max_async.emulator._images.scenes import _MOODS, _plan, draw

MAGENTA = (255, 0, 200)
LONG = "A wide panorama of an old stone bridge across a misty valley, painted in the manner of the romantics, " * 6
ORIENTATION = 0x0112


def picture(prompt: str, *, seed: int = 1, side: int = 256, inputs: Sequence[bytes] = ()) -> Image.Image:
    data = draw(prompt, seed=seed, width=side, height=side, output_format="png", input_images=inputs)
    return Image.open(io.BytesIO(data))


def encoded(image: Image.Image, output_format: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, output_format, **options)
    return file.getvalue()


def solid(colour: tuple[int, ...] | int = MAGENTA, mode: str = "RGB") -> Image.Image:
    return Image.new(mode, (90, 60), colour)


def box_of(image: Image.Image, colour: tuple[int, ...]) -> tuple[int, int, int, int] | None:
    """The box around all pixels that are nearly of a colour."""
    red, green, blue = ImageChops.difference(image, Image.new("RGB", image.size, colour)).split()
    far = ImageChops.lighter(ImageChops.lighter(red, green), blue)
    return far.point([255 * (level < 12) for level in range(256)]).getbbox()


def lines_of_text(image: Image.Image, top: int) -> int:
    """How many runs of rows with the white of letters there are below a height."""
    white = image.convert("L").point([255 * (level > 210) for level in range(256)])
    rows = [white.crop((0, y, white.width, y + 1)).getbbox() is not None for y in range(top, white.height)]
    return sum(below and not above for above, below in pairwise(rows))


def brightness(image: Image.Image) -> float:
    return ImageStat.Stat(image.convert("L")).mean[0]


@pytest.mark.parametrize("output_format", ["png", "jpeg"])
def test_the_same_arguments_give_the_same_bytes_in_every_process(output_format: str) -> None:
    """A picture hangs on its arguments only, not on the order in which a process happens to keep its sets."""
    prompt = "winter fire in spring, autumn rain"
    code = (
        "import sys; from flux2max_async.emulator._images.scenes import draw;"
        f"sys.stdout.buffer.write(draw({prompt!r}, seed=7, width=96, height=96, output_format={output_format!r}))"
    )

    elsewhere = [
        subprocess.run(
            [sys.executable, "-c", code], env=os.environ | {"PYTHONHASHSEED": seed}, stdout=subprocess.PIPE, check=True
        ).stdout
        for seed in ("1", "2")
    ]

    here = draw(prompt, seed=7, width=96, height=96, output_format=output_format)
    assert elsewhere == [here, here]


def test_the_same_input_images_give_the_same_bytes() -> None:
    """Input images make no difference from one time to the next either."""
    inputs = [encoded(solid()), encoded(solid((0, 90, 250)), "JPEG")]

    first, second = (
        draw("a fox", seed=3, width=200, height=160, output_format="jpeg", input_images=inputs) for _ in range(2)
    )

    assert first == second


@pytest.mark.parametrize("prompt", ["", "a forest", "a portrait", "the sea at night"])
def test_another_seed_gives_a_clearly_different_picture(prompt: str) -> None:
    """Pictures of one prompt differ from seed to seed in more than their grain."""
    pictures = [picture(prompt, seed=seed) for seed in (0, 1, 2**40)]

    for one, other in combinations(pictures, 2):
        assert brightness(ImageChops.difference(one, other)) > 4


def test_another_prompt_gives_a_clearly_different_picture() -> None:
    """Pictures of one seed differ from prompt to prompt in more than their grain."""
    pictures = [picture(prompt) for prompt in ("a forest", "a forest.", "a portrait", "the sea at night")]

    for one, other in combinations(pictures, 2):
        assert brightness(ImageChops.difference(one, other)) > 4


@pytest.mark.parametrize("output_format", ["png", "jpeg"])
@pytest.mark.parametrize("size", [(64, 64), (64, 2048), (2048, 64), (1024, 1024), (333, 777)])
@pytest.mark.parametrize(
    "prompt", ["a city with lighthouse and boats", "a snowy forest at night", "camels in the rain"]
)
def test_size_and_format_are_those_asked_for(prompt: str, size: tuple[int, int], output_format: str) -> None:
    """A picture has exactly the pixels and the format that were asked for, be it small, large or very long."""
    data = draw(prompt, seed=1, width=size[0], height=size[1], output_format=output_format)

    with Image.open(io.BytesIO(data)) as image:
        assert (image.format, image.mode, image.size) == (output_format.upper(), "RGB", size)
    assert size_of(data) == size


@pytest.mark.parametrize(
    ("darker", "lighter"),
    [
        ("a lake at night", "a lake at noon"),
        ("hills under northern lights", "hills under the summer sky"),
        ("a forest at night", "a snowy forest"),
        ("a volcano", "a glacier"),
        ("a harbour in the rain", "a harbour in spring"),
    ],
)
def test_words_of_the_prompt_lead_the_picture(darker: str, lighter: str) -> None:
    """Night is darker than day, and so on, whatever the seed."""
    for seed in range(4):
        assert brightness(picture(darker, seed=seed)) + 10 < brightness(picture(lighter, seed=seed))


@pytest.mark.parametrize(
    ("form", "word"),
    [
        ("rainy", "rain"),
        ("sunsets", "sunset"),
        ("cherries", "blossom"),
        ("SNOWY", "snow"),
        ("foggy", "fog"),
        ("galaxy", "galaxies"),
        ("sunny", "sky"),
        ("beaches", "beach"),
        ("starry", "night"),
    ],
)
def test_words_lead_the_picture_in_their_usual_forms(form: str, word: str) -> None:
    """A word in the plural or with an ending of its own calls for the same palette."""
    assert _plan(f"a {form} thing", 1, 64, 64).sky == _plan(f"some {word}", 2, 64, 64).sky


@pytest.mark.parametrize("mood", _MOODS)
def test_the_caption_is_legible_on_every_palette(mood: str) -> None:
    """White letters stand on a ground much darker than they are, even on snow."""
    word = {"day": "noon"}.get(mood, mood)
    image = picture(f"{word} hill", side=512)

    strip = image.convert("L").crop((0, 485, 512, 500))
    assert lines_of_text(image, 470) == 1
    assert ImageStat.Stat(strip).median[0] < 110
    assert ImageStat.Stat(strip).extrema[0][1] > 250


@pytest.mark.parametrize(("words", "lines"), [(0, 0), (1, 1), (15, 1), (30, 2), (50, 3), (2000, 3)])
def test_a_caption_has_at_most_three_lines(words: int, lines: int) -> None:
    """A prompt is wrapped, and one that is too long is cut."""
    image = picture("hill " * words, side=800)

    assert lines_of_text(image, 670) == lines


def test_a_cut_caption_ends_in_an_ellipsis_and_keeps_within_the_picture() -> None:
    """What was cut is seen to be cut; lines are no longer than the room they have."""
    font = ImageFont.load_default(20)
    assert isinstance(font, ImageFont.FreeTypeFont)

    lines = _wrap(LONG, font, 400)

    assert len(lines) == 3
    assert lines[-1].endswith("…")
    assert max(font.getlength(line) for line in lines) <= 400
    assert _wrap("W" * 60, font, 30) == ["W" * 9, "W" * 9, "…"]


@pytest.mark.parametrize("prompt", ["一只狐狸在森林里", "🦊✨", "\ud83e lone surrogate", "\x00\x01\u0301", "  \n\t "])
def test_characters_that_the_font_lacks_do_no_harm(prompt: str) -> None:
    """Any text at all can be drawn; what cannot be written is left out."""
    image = picture(prompt)

    assert image.size == (256, 256)
    assert lines_of_text(image, 225) == (1 if "lone" in prompt else 0)


@pytest.mark.parametrize(
    ("accented", "plain"), [("ü", "u"), ("Ä", "A"), ("é", "e"), ("ñ", "n"), ("Å", "A"), ("ô", "o")]
)
def test_accents_are_written_above_their_letters(accented: str, plain: str) -> None:
    """An accented letter is the plain one with ink above it."""
    font = ImageFont.load_default(40)
    assert isinstance(font, ImageFont.FreeTypeFont)
    papers = []
    for text in (accented, plain):
        papers.append(Image.new("L", (100, 100)))
        _write_line(ImageDraw.Draw(papers[-1]), text, font, 20, 30)

    with_ink, without = (paper.getbbox() for paper in papers)
    added = ImageChops.difference(*papers).getbbox()

    assert with_ink is not None
    assert without is not None
    assert added is not None
    assert with_ink[1] < without[1]
    assert added[3] <= without[1]
    assert abs((added[0] + added[2]) - (without[0] + without[2])) <= 4


def test_small_pictures_have_no_caption() -> None:
    """Below 160 pixels a side there is no room for letters: the lower rows have nothing of their white."""
    assert lines_of_text(picture("dark hill at night", side=159), 135) == 0
    assert lines_of_text(picture("dark hill at night", side=160), 135) == 1


@pytest.mark.parametrize(
    ("image", "colour"),
    [
        (solid(), MAGENTA),
        (solid().quantize(4), MAGENTA),
        (solid((*MAGENTA, 255), "RGBA"), MAGENTA),
        (solid((*MAGENTA, 128), "RGBA"), (255, 127, 227)),
        (solid((40, 255), "LA"), (40, 40, 40)),
        (solid(90, "L"), (90, 90, 90)),
        (solid(0, "1"), (0, 0, 0)),
        (solid(40000, "I;16"), (156, 156, 156)),
    ],
    ids=lambda value: value.mode if isinstance(value, Image.Image) else None,
)
def test_input_images_of_any_mode_are_seen(image: Image.Image, colour: tuple[int, ...]) -> None:
    """An input image has its colours in the picture, too; where it is clear, it lies on white paper."""
    shown = picture("cherry blossoms", inputs=[encoded(image)]).crop((110, 140, 146, 176))

    assert box_of(shown, colour) == (0, 0, 36, 36)


@pytest.mark.parametrize("output_format", ["JPEG", "WEBP", "GIF"])
def test_input_images_of_any_format_are_seen(output_format: str) -> None:
    """What the gateway takes as an input image, the picture shows."""
    assert box_of(picture("spring", inputs=[encoded(solid(), output_format, quality=100)]), MAGENTA)


def test_a_cmyk_input_image_is_seen() -> None:
    """Printers' colours are turned into those of a screen."""
    assert box_of(
        picture("spring", inputs=[encoded(solid((0, 255, 51, 0), "CMYK"), "JPEG", quality=100)]), (255, 0, 204)
    )


def test_of_an_animation_the_first_frame_is_shown() -> None:
    """A moving GIF stands still at its beginning."""
    data = encoded(solid(), "GIF", save_all=True, append_images=[solid((0, 255, 0))])

    image = picture("spring", inputs=[data])

    assert box_of(image, MAGENTA)
    assert not box_of(image, (0, 255, 0))


@pytest.mark.parametrize("output_format", ["JPEG", "PNG", "WEBP"])
def test_the_exif_orientation_is_obeyed(output_format: str) -> None:
    """A photograph taken with the camera on its side is shown upright."""
    sideways = Image.new("RGB", (200, 200), MAGENTA)
    sideways.paste((0, 0, 255), (100, 0, 200, 200))
    exif = Image.Exif()
    exif[ORIENTATION] = 6  # to be turned to the right: the left becomes the top

    image = picture("spring", inputs=[encoded(sideways, output_format, exif=exif, quality=100)])

    top, bottom = box_of(image, MAGENTA), box_of(image, (0, 0, 255))
    assert top is not None
    assert bottom is not None
    assert top[3] <= bottom[1] + 8
    assert abs(top[0] - bottom[0]) < 12


def test_a_broken_note_of_the_orientation_is_overlooked() -> None:
    """A picture with nonsense for EXIF is shown as it is."""
    assert box_of(picture("spring", inputs=[encoded(solid(), exif=b"nonsense")]), MAGENTA)


@pytest.mark.parametrize("size", [(1024, 1024), (1536, 512), (300, 900), (64, 64), (64, 2048), (2048, 64)])
@pytest.mark.parametrize("count", [1, 3, 8])
def test_all_input_images_are_seen_side_by_side(count: int, size: tuple[int, int]) -> None:
    """Up to eight prints lie apart from one another within the picture."""
    colours = [MAGENTA, (255, 0, 0), (0, 255, 0), (0, 0, 255), (0, 255, 255), (255, 255, 0), (120, 0, 255), (0, 120, 0)]
    inputs = [encoded(solid(colour)) for colour in colours[:count]]
    data = draw("spring", seed=2, width=size[0], height=size[1], output_format="png", input_images=inputs)
    image = Image.open(io.BytesIO(data))

    boxes = [box_of(image, colour) for colour in colours[:count]]

    for box in boxes:
        assert box is not None
        assert min(box[2] - box[0], box[3] - box[1]) >= 4
        assert box[0] > 0
        assert box[1] > 0
        assert box[2] < size[0]
        assert box[3] < size[1]
    for one, other in combinations(boxes, 2):
        assert one is not None
        assert other is not None
        assert one[2] <= other[0] or other[2] <= one[0] or one[3] <= other[1] or other[3] <= one[1]


@pytest.mark.parametrize("count", [1, 3, 8])
def test_input_images_do_not_hide_the_caption(count: int) -> None:
    """The rows of the caption look the same with input images and without."""
    with_prints, without = (
        picture("a fox in the snow", side=1024, inputs=inputs).crop((0, 955, 1024, 1024)).convert("L")
        for inputs in ([encoded(solid())] * count, [])
    )

    # The shadows of the prints may end there.
    assert ImageStat.Stat(ImageChops.difference(with_prints, without)).extrema[0][1] < 24


def test_an_input_image_that_cannot_be_read_is_refused() -> None:
    """Rather than leave an input image out, drawing fails."""
    with pytest.raises(ValueError, match="not a readable picture"):
        picture("a fox", inputs=[encoded(solid()), b"no picture"])


@pytest.mark.parametrize("output_format", ["PNG", "JPEG", "WEBP", "GIF"])
def test_size_of_reads_the_four_formats(output_format: str) -> None:
    """The size is that of the file, however large the picture is scaled while it is read."""
    assert size_of(encoded(Image.new("RGB", (1234, 567)), output_format)) == (1234, 567)


def test_size_of_gives_the_stored_size() -> None:
    """EXIF does not turn the size around."""
    exif = Image.Exif()
    exif[ORIENTATION] = 6

    assert size_of(encoded(solid(), "JPEG", exif=exif)) == (90, 60)


def header(width: int, height: int) -> bytes:
    """The beginning of a PNG file that promises so many pixels."""
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"no picture",
        b"\x89PNG\r\n\x1a\n",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        header(90, 60),
        header(60_000, 60_000),
        header(12_000, 12_000),
        encoded(solid(), "BMP"),
    ],
    ids=["empty", "text", "signature", "svg", "header", "bomb", "large", "bmp"],
)
def test_size_of_refuses_what_is_no_picture(data: bytes) -> None:
    """What cannot be read, is of another kind, or would fill the memory is a ValueError."""
    with pytest.raises(ValueError, match="not a readable picture"):
        size_of(data)


@pytest.mark.parametrize("output_format", ["PNG", "JPEG", "WEBP", "GIF"])
def test_size_of_refuses_a_file_cut_short(output_format: str) -> None:
    """A header alone does not make a picture: the pixels must be there."""
    data = encoded(picture("a fox"), output_format)

    with pytest.raises(ValueError, match="not a readable picture"):
        size_of(data[: len(data) // 2])
