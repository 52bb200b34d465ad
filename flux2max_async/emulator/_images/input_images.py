"""Input images: their size, and their thumbnails in the generated image."""

import contextlib
import io
import math
import random
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFilter, ImageOps

from flux2max_async.emulator._images import drawing

_PAPER_COLOUR = (250, 248, 242)


def image_size(data: bytes) -> tuple[int, int]:
    """Return the width and height of an encoded PNG, JPEG, WebP or GIF, as stored (before any EXIF rotation).

    Raises:
        ValueError: The image cannot be decoded completely.
    """
    return _open(data, min_side=1)[0]


def paste_thumbnails(
    canvas: Image.Image, rng: random.Random, unit: float, input_images: Sequence[bytes], bottom: int
) -> None:
    """Paste a thumbnail of each input image above `bottom`, in one row unless they would be much smaller that way."""
    width, count = canvas.width, len(input_images)
    max_height = min(bottom * 0.9, unit * 0.42)
    cells = {rows: min(width * 0.94 / math.ceil(count / rows), max_height / rows) for rows in range(1, count + 1)}
    rows = max(cells, key=lambda rows: cells[rows] * (1.5 if rows == 1 else 1), default=1)
    columns = math.ceil(count / rows)
    for index, data in enumerate(input_images):
        row, column = divmod(index, columns)
        columns_in_row = min(columns, count - row * columns)
        x = width / 2 + (column - (columns_in_row - 1) / 2) * cells[rows]
        _paste_thumbnail(canvas, rng, data, cells[rows], (x, bottom - (rows - row - 0.5) * cells[rows]))


def _paste_thumbnail(canvas: Image.Image, rng: random.Random, data: bytes, cell: float, centre: drawing.Point) -> None:
    """Paste an input image as a slightly rotated photographic print with a shadow."""
    side = max(2, round(cell * 0.74))
    margin = max(1, round(side * 0.06))
    right, bottom = side + 3 * margin, side + 5 * margin
    # The outermost margin of the print is transparent, so that its edges stay smooth when it is rotated.
    thumbnail = Image.new("RGB", (right + margin, bottom + margin), _PAPER_COLOUR)
    thumbnail.paste(_square(data, side), (2 * margin, 2 * margin))
    outline = Image.new("L", (thumbnail.width * 3, thumbnail.height * 3))
    ImageDraw.Draw(outline).rounded_rectangle((3 * margin, 3 * margin, 3 * right - 1, 3 * bottom - 1), 2 * margin, 255)
    thumbnail.putalpha(outline.reduce(3))
    thumbnail = thumbnail.rotate(
        rng.uniform(-3, 3), Image.Resampling.BICUBIC, expand=True, fillcolor=(*_PAPER_COLOUR, 0)
    )
    shadow = Image.new("L", (thumbnail.width + 6 * margin, thumbnail.height + 6 * margin))
    shadow.paste(140, (3 * margin, 4 * margin), thumbnail.getchannel("A"))
    drawing.stamp(canvas, shadow.filter(ImageFilter.GaussianBlur(1.3 * margin)), (0, 0, 0), centre)
    corner = round(centre[0] - thumbnail.width / 2), round(centre[1] - thumbnail.height / 2)
    canvas.paste(thumbnail, corner, thumbnail)


def _square(data: bytes, side: int) -> Image.Image:
    """Decode an input image, rotate it upright and crop it to a square on white."""
    _, image = _open(data, min_side=side)
    with contextlib.suppress(Exception):  # the image is still usable if its EXIF data is broken
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):
        image = image.point(lambda level: level * (1 / 256))
    image = image.convert("RGBA")
    background = Image.new("RGBA", image.size, "white")
    return ImageOps.fit(Image.alpha_composite(background, image).convert("RGB"), (side, side))


def _open(data: bytes, min_side: int) -> tuple[tuple[int, int], Image.Image]:
    """Return the stored size and the decoded image, which is scaled down to about `min_side` if it is a large JPEG."""
    try:
        image = Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP", "GIF"))
        size = _check_size(image)
        image.draft(None, (min_side, min_side))
        image.load()
    except Exception as error:  # Pillow raises many exception types for broken files
        raise ValueError(f"not a readable image: {error}") from error
    return size, image


def _check_size(image: Image.Image) -> tuple[int, int]:
    """Return an image's width and height.

    Raises:
        DecompressionBombError: It would need too much memory. Pillow itself only warns, up to twice its limit.
    """
    if image.width * image.height > (Image.MAX_IMAGE_PIXELS or math.inf):
        raise Image.DecompressionBombError(f"{image.width}\u00d7{image.height} pixels are too many")
    return image.size
