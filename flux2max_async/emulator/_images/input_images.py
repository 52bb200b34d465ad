"""Input pictures: how large they are, and how they lie in a result as small photographic prints."""

import contextlib
import io
import math
import random
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFilter, ImageOps

from flux2max_async.emulator._images import drawing


def size_of(data: bytes) -> tuple[int, int]:
    """Give the width and height of an encoded PNG, JPEG, WebP or GIF, as stored (before any EXIF rotation).

    Raises ValueError when the picture cannot be read to its end.
    """
    return _read(data, enough=1)[0]


def lay_out_prints(
    canvas: Image.Image, rng: random.Random, unit: float, input_images: Sequence[bytes], floor: int
) -> None:
    """Lay the input images out as small photographic prints, in one row unless they would be tiny in it."""
    width, count = canvas.width, len(input_images)
    depth = min(floor * 0.9, unit * 0.42)
    cells = {rows: min(width * 0.94 / math.ceil(count / rows), depth / rows) for rows in range(1, count + 1)}
    rows = max(cells, key=lambda rows: cells[rows] * (1.5 if rows == 1 else 1), default=1)
    columns = math.ceil(count / rows)
    for place, data in enumerate(input_images):
        row, column = divmod(place, columns)
        beside = min(columns, count - row * columns)
        x = width / 2 + (column - (beside - 1) / 2) * cells[rows]
        _lay_print(canvas, rng, data, cells[rows], (x, floor - (rows - row - 0.5) * cells[rows]))


def _lay_print(canvas: Image.Image, rng: random.Random, data: bytes, cell: float, centre: drawing.Point) -> None:
    side = max(2, round(cell * 0.74))
    rim = max(1, round(side * 0.06))
    right, bottom = side + 3 * rim, side + 5 * rim
    # The paper has a see-through margin, so that its edges stay smooth when it is turned.
    sheet = Image.new("RGB", (right + rim, bottom + rim), (250, 248, 242))
    sheet.paste(_photo(data, side), (2 * rim, 2 * rim))
    shape = Image.new("L", (sheet.width * 3, sheet.height * 3))
    ImageDraw.Draw(shape).rounded_rectangle((3 * rim, 3 * rim, 3 * right - 1, 3 * bottom - 1), 2 * rim, 255)
    sheet.putalpha(shape.reduce(3))
    sheet = sheet.rotate(rng.uniform(-3, 3), Image.Resampling.BICUBIC, expand=True, fillcolor=(250, 248, 242, 0))
    shadow = Image.new("L", (sheet.width + 6 * rim, sheet.height + 6 * rim))
    shadow.paste(140, (3 * rim, 4 * rim), sheet.getchannel("A"))
    drawing.stamp(canvas, shadow.filter(ImageFilter.GaussianBlur(1.3 * rim)), (0, 0, 0), centre)
    canvas.paste(sheet, (round(centre[0] - sheet.width / 2), round(centre[1] - sheet.height / 2)), sheet)


def _photo(data: bytes, side: int) -> Image.Image:
    _, image = _read(data, enough=side)
    with contextlib.suppress(Exception):  # a broken note of the orientation is no reason to refuse the picture
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):
        image = image.point(lambda level: level * (1 / 256))
    image = image.convert("RGBA")
    paper = Image.new("RGBA", image.size, "white")
    return ImageOps.fit(Image.alpha_composite(paper, image).convert("RGB"), (side, side))


def _read(data: bytes, enough: int) -> tuple[tuple[int, int], Image.Image]:
    """Give a picture and its stored size; where that is cheap, scaled down to no less than enough pixels a side."""
    try:
        image = Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP", "GIF"))
        size = image.size
        image.draft(None, (enough, enough))
        image.load()
    except Exception as error:  # Pillow raises many kinds for the ways in which a file can be broken
        raise ValueError(f"not a readable picture: {error}") from error
    return size, image
