"""The images of the emulator: reproducible, of the requested size and format, and with caption and input images."""

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
from flux2max_async.emulator._images.input_images import image_size
from flux2max_async.emulator._images.planning import MOODS, plan_scene
from flux2max_async.emulator._images.scenes import draw

MAGENTA = (255, 0, 200)
LONG_PROMPT = (
    "A wide panorama of an old stone bridge across a misty valley, painted in the manner of the romantics, " * 6
)
ORIENTATION_TAG = 0x0112


def draw_image(prompt: str, *, seed: int = 1, side: int = 256, inputs: Sequence[bytes] = ()) -> Image.Image:
    data = draw(prompt, seed=seed, width=side, height=side, output_format="png", input_images=inputs)
    return Image.open(io.BytesIO(data))


def encode(image: Image.Image, output_format: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, output_format, **options)
    return file.getvalue()


def solid(colour: tuple[int, ...] | int = MAGENTA, mode: str = "RGB") -> Image.Image:
    return Image.new(mode, (90, 60), colour)


def bounding_box(image: Image.Image, colour: tuple[int, ...]) -> tuple[int, int, int, int] | None:
    """Return the box around all pixels whose colour is close to the given one."""
    red, green, blue = ImageChops.difference(image, Image.new("RGB", image.size, colour)).split()
    difference = ImageChops.lighter(ImageChops.lighter(red, green), blue)
    return difference.point([255 * (level < 12) for level in range(256)]).getbbox()


def count_text_lines(image: Image.Image, top: int) -> int:
    """Count the lines of white text below a y coordinate."""
    white = image.convert("L").point([255 * (level > 210) for level in range(256)])
    rows = [white.crop((0, y, white.width, y + 1)).getbbox() is not None for y in range(top, white.height)]
    return sum(below and not above for above, below in pairwise(rows))


def brightness(image: Image.Image) -> float:
    return ImageStat.Stat(image.convert("L")).mean[0]


@pytest.mark.parametrize("output_format", ["png", "jpeg"])
def test_the_same_arguments_produce_the_same_bytes_in_every_process(output_format: str) -> None:
    """An image depends only on its arguments, not on the iteration order of sets."""
    prompt = "winter fire in spring, autumn rain"
    code = (
        "import sys; from flux2max_async.emulator._images.scenes import draw;"
        f"sys.stdout.buffer.write(draw({prompt!r}, seed=7, width=96, height=96, output_format={output_format!r}))"
    )

    in_other_processes = [
        subprocess.run(
            [sys.executable, "-c", code], env=os.environ | {"PYTHONHASHSEED": seed}, stdout=subprocess.PIPE, check=True
        ).stdout
        for seed in ("1", "2")
    ]

    in_this_process = draw(prompt, seed=7, width=96, height=96, output_format=output_format)
    assert in_other_processes == [in_this_process, in_this_process]


def test_the_same_input_images_produce_the_same_bytes() -> None:
    """An image with input images is reproducible, too."""
    inputs = [encode(solid()), encode(solid((0, 90, 250)), "JPEG")]

    first, second = (
        draw("a fox", seed=3, width=200, height=160, output_format="jpeg", input_images=inputs) for _ in range(2)
    )

    assert first == second


@pytest.mark.parametrize("prompt", ["", "a forest", "a portrait", "the sea at night"])
def test_another_seed_draws_a_clearly_different_image(prompt: str) -> None:
    """Images of the same prompt with different seeds differ in more than their noise."""
    images = [draw_image(prompt, seed=seed) for seed in (0, 1, 2**40)]

    for first, second in combinations(images, 2):
        assert brightness(ImageChops.difference(first, second)) > 4


def test_another_prompt_draws_a_clearly_different_image() -> None:
    """Images of different prompts with the same seed differ in more than their noise."""
    images = [draw_image(prompt) for prompt in ("a forest", "a forest.", "a portrait", "the sea at night")]

    for first, second in combinations(images, 2):
        assert brightness(ImageChops.difference(first, second)) > 4


@pytest.mark.parametrize("output_format", ["png", "jpeg"])
@pytest.mark.parametrize("size", [(64, 64), (64, 2048), (2048, 64), (1024, 1024), (333, 777)])
@pytest.mark.parametrize(
    "prompt", ["a city with lighthouse and boats", "a snowy forest at night", "camels in the rain"]
)
def test_size_and_format_are_those_requested(prompt: str, size: tuple[int, int], output_format: str) -> None:
    """An image has exactly the requested size and format, even if it is small, large or very long."""
    data = draw(prompt, seed=1, width=size[0], height=size[1], output_format=output_format)

    with Image.open(io.BytesIO(data)) as image:
        assert (image.format, image.mode, image.size) == (output_format.upper(), "RGB", size)
    assert image_size(data) == size


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
def test_words_of_the_prompt_select_the_palette(darker: str, lighter: str) -> None:
    """Night is darker than day, and so on, with any seed."""
    for seed in range(4):
        assert brightness(draw_image(darker, seed=seed)) + 10 < brightness(draw_image(lighter, seed=seed))


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
def test_words_are_recognised_in_their_usual_forms(form: str, word: str) -> None:
    """The plural or the adjective of a word selects the same palette."""
    assert plan_scene(f"a {form} view", 1, 64, 64).sky == plan_scene(f"some {word}", 2, 64, 64).sky


@pytest.mark.parametrize("mood", MOODS)
def test_the_caption_is_legible_on_every_palette(mood: str) -> None:
    """The white letters have a much darker background, even on snow."""
    word = {"day": "noon"}.get(mood, mood)
    image = draw_image(f"{word} hill", side=512)

    strip = image.convert("L").crop((0, 485, 512, 500))
    assert count_text_lines(image, 470) == 1
    assert ImageStat.Stat(strip).median[0] < 110
    assert ImageStat.Stat(strip).extrema[0][1] > 250


@pytest.mark.parametrize(("words", "lines"), [(0, 0), (1, 1), (15, 1), (30, 2), (50, 3), (2000, 3)])
def test_a_caption_has_at_most_three_lines(words: int, lines: int) -> None:
    """A prompt is wrapped, and truncated if it is too long."""
    image = draw_image("hill " * words, side=800)

    assert count_text_lines(image, 670) == lines


def test_a_truncated_caption_ends_in_an_ellipsis_and_fits_the_image() -> None:
    """A truncated caption ends in an ellipsis, and no line exceeds the available width."""
    font = ImageFont.load_default(20)
    assert isinstance(font, ImageFont.FreeTypeFont)

    lines = _wrap(LONG_PROMPT, font, 400)

    assert len(lines) == 3
    assert lines[-1].endswith("…")
    assert max(font.getlength(line) for line in lines) <= 400
    assert _wrap("W" * 60, font, 30) == ["W" * 9, "W" * 9, "…"]


@pytest.mark.parametrize("prompt", ["一只狐狸在森林里", "🦊✨", "\ud83e lone surrogate", "\x00\x01\u0301", "  \n\t "])
def test_characters_that_the_font_lacks_are_omitted(prompt: str) -> None:
    """Any prompt can be drawn; unsupported characters are missing from the caption."""
    image = draw_image(prompt)

    assert image.size == (256, 256)
    assert count_text_lines(image, 225) == (1 if "lone" in prompt else 0)


@pytest.mark.parametrize(
    ("accented", "plain"), [("ü", "u"), ("Ä", "A"), ("é", "e"), ("ñ", "n"), ("Å", "A"), ("ô", "o")]
)
def test_accents_are_drawn_above_their_letters(accented: str, plain: str) -> None:
    """An accented letter is the plain letter with additional pixels above it."""
    font = ImageFont.load_default(40)
    assert isinstance(font, ImageFont.FreeTypeFont)
    canvases = []
    for text in (accented, plain):
        canvases.append(Image.new("L", (100, 100)))
        _write_line(ImageDraw.Draw(canvases[-1]), text, font, 20, 30)

    accented_box, plain_box = (canvas.getbbox() for canvas in canvases)
    accent_box = ImageChops.difference(*canvases).getbbox()

    assert accented_box is not None
    assert plain_box is not None
    assert accent_box is not None
    assert accented_box[1] < plain_box[1]
    assert accent_box[3] <= plain_box[1]
    assert abs((accent_box[0] + accent_box[2]) - (plain_box[0] + plain_box[2])) <= 4


def test_small_images_have_no_caption() -> None:
    """Below 160 pixels a side, the lower rows contain no white text."""
    assert count_text_lines(draw_image("dark hill at night", side=159), 135) == 0
    assert count_text_lines(draw_image("dark hill at night", side=160), 135) == 1


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
def test_input_images_of_any_mode_are_shown(image: Image.Image, colour: tuple[int, ...]) -> None:
    """The thumbnail has the colours of the input image, and a white background if that is transparent."""
    thumbnail = draw_image("cherry blossoms", inputs=[encode(image)]).crop((110, 140, 146, 176))

    assert bounding_box(thumbnail, colour) == (0, 0, 36, 36)


@pytest.mark.parametrize("output_format", ["JPEG", "WEBP", "GIF"])
def test_input_images_of_any_format_are_shown(output_format: str) -> None:
    """Every format that the service accepts as an input image is shown."""
    assert bounding_box(draw_image("spring", inputs=[encode(solid(), output_format, quality=100)]), MAGENTA)


def test_a_cmyk_input_image_is_shown() -> None:
    """A CMYK image is converted to RGB."""
    assert bounding_box(
        draw_image("spring", inputs=[encode(solid((0, 255, 51, 0), "CMYK"), "JPEG", quality=100)]), (255, 0, 204)
    )


def test_an_animation_is_shown_by_its_first_frame() -> None:
    """The thumbnail of an animated GIF is its first frame."""
    data = encode(solid(), "GIF", save_all=True, append_images=[solid((0, 255, 0))])

    image = draw_image("spring", inputs=[data])

    assert bounding_box(image, MAGENTA)
    assert not bounding_box(image, (0, 255, 0))


@pytest.mark.parametrize("output_format", ["JPEG", "PNG", "WEBP"])
def test_the_exif_orientation_is_applied(output_format: str) -> None:
    """A photograph that was taken with a rotated camera is shown upright."""
    sideways = Image.new("RGB", (200, 200), MAGENTA)
    sideways.paste((0, 0, 255), (100, 0, 200, 200))
    exif = Image.Exif()
    exif[ORIENTATION_TAG] = 6  # rotate clockwise: the left side becomes the top

    image = draw_image("spring", inputs=[encode(sideways, output_format, exif=exif, quality=100)])

    top, bottom = bounding_box(image, MAGENTA), bounding_box(image, (0, 0, 255))
    assert top is not None
    assert bottom is not None
    assert top[3] <= bottom[1] + 8
    assert abs(top[0] - bottom[0]) < 12


def test_broken_exif_data_is_ignored() -> None:
    """An image with invalid EXIF data is shown as it is stored."""
    assert bounding_box(draw_image("spring", inputs=[encode(solid(), exif=b"nonsense")]), MAGENTA)


@pytest.mark.parametrize("size", [(1024, 1024), (1536, 512), (300, 900), (64, 64), (64, 2048), (2048, 64)])
@pytest.mark.parametrize("count", [1, 3, 8])
def test_all_input_images_are_shown_side_by_side(count: int, size: tuple[int, int]) -> None:
    """Up to eight thumbnails are completely visible and do not overlap."""
    colours = [MAGENTA, (255, 0, 0), (0, 255, 0), (0, 0, 255), (0, 255, 255), (255, 255, 0), (120, 0, 255), (0, 120, 0)]
    inputs = [encode(solid(colour)) for colour in colours[:count]]
    data = draw("spring", seed=2, width=size[0], height=size[1], output_format="png", input_images=inputs)
    image = Image.open(io.BytesIO(data))

    boxes = [bounding_box(image, colour) for colour in colours[:count]]

    for box in boxes:
        assert box is not None
        assert min(box[2] - box[0], box[3] - box[1]) >= 4
        assert box[0] > 0
        assert box[1] > 0
        assert box[2] < size[0]
        assert box[3] < size[1]
    for first, second in combinations(boxes, 2):
        assert first is not None
        assert second is not None
        assert first[2] <= second[0] or second[2] <= first[0] or first[3] <= second[1] or second[3] <= first[1]


@pytest.mark.parametrize("count", [1, 3, 8])
def test_input_images_do_not_hide_the_caption(count: int) -> None:
    """The rows of the caption are the same with and without input images."""
    with_thumbnails, without = (
        draw_image("a fox in the snow", side=1024, inputs=inputs).crop((0, 955, 1024, 1024)).convert("L")
        for inputs in ([encode(solid())] * count, [])
    )

    # The shadows of the thumbnails may reach into the caption.
    assert ImageStat.Stat(ImageChops.difference(with_thumbnails, without)).extrema[0][1] < 24


def test_an_unreadable_input_image_is_refused() -> None:
    """Drawing fails instead of omitting an input image."""
    with pytest.raises(ValueError, match="not a readable image"):
        draw_image("a fox", inputs=[encode(solid()), b"not an image"])


@pytest.mark.parametrize("output_format", ["PNG", "JPEG", "WEBP", "GIF"])
def test_image_size_reads_the_four_formats(output_format: str) -> None:
    """The size is that of the stored image, even if it is scaled down while it is decoded."""
    assert image_size(encode(Image.new("RGB", (1234, 567)), output_format)) == (1234, 567)


def test_image_size_ignores_the_orientation() -> None:
    """The EXIF orientation does not swap width and height."""
    exif = Image.Exif()
    exif[ORIENTATION_TAG] = 6

    assert image_size(encode(solid(), "JPEG", exif=exif)) == (90, 60)


def png_header(width: int, height: int) -> bytes:
    """Return the beginning of a PNG file of a size, without any pixels."""
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"not an image",
        b"\x89PNG\r\n\x1a\n",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        png_header(90, 60),
        png_header(60_000, 60_000),
        png_header(12_000, 12_000),
        encode(solid(), "BMP"),
    ],
    ids=["empty", "text", "signature", "svg", "header", "bomb", "large", "bmp"],
)
def test_image_size_refuses_invalid_images(data: bytes) -> None:
    """Broken files, other formats and decompression bombs raise ValueError."""
    with pytest.raises(ValueError, match="not a readable image"):
        image_size(data)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_decompression_limit_is_an_error() -> None:
    """A complete image above Pillow's limit is refused, also if Pillow would only warn."""
    with pytest.raises(ValueError, match="9600\u00d79600 pixels are too many"):
        image_size(encode(Image.new("1", (9_600, 9_600)), "PNG"))


@pytest.mark.parametrize("output_format", ["PNG", "JPEG", "WEBP", "GIF"])
def test_image_size_refuses_a_truncated_file(output_format: str) -> None:
    """A file must contain all its pixels, not only a valid header."""
    data = encode(draw_image("a fox"), output_format)

    with pytest.raises(ValueError, match="not a readable image"):
        image_size(data[: len(data) // 2])
