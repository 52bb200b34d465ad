"""Brushes: colours, gradients, glows, masks and lines of heights, of which pictures are made."""

import math
import random
from collections.abc import Sequence
from itertools import pairwise

from PIL import Image, ImageDraw

Colour = tuple[int, ...]
Point = tuple[float, float]
Shape = list[Point]


def colour(text: str) -> Colour:
    """Read a colour from hexadecimal digits."""
    return tuple(bytes.fromhex(text))


def mix(one: Colour, other: Colour, share: float) -> Colour:
    """Give the colour a share of the way from one to the other."""
    return tuple(round(a + (b - a) * share) for a, b in zip(one, other, strict=True))


def gradient(colours: Sequence[Colour], size: tuple[int, int]) -> Image.Image:
    """Give a smooth run through the colours (or, if they are of one number, levels) from top to bottom."""
    mode = "RGB" if len(colours[0]) == 3 else "L"
    column = Image.frombytes(mode, (1, len(colours)), b"".join(bytes(colour) for colour in colours))
    return column.resize((1, size[1]), Image.Resampling.BICUBIC).resize(size, Image.Resampling.NEAREST)


def glow(diameter: float, strength: int) -> Image.Image:
    """Give a mask that fades from its middle to its rim."""
    # Pillow's gradient is 255 in its corners, and so 180 at its sides.
    disc = Image.radial_gradient("L").point([round(strength * max(0, 1 - level / 180) ** 2.2) for level in range(256)])
    return disc.resize((max(2, round(diameter)), max(2, round(diameter))), Image.Resampling.BICUBIC)


def stamp(canvas: Image.Image, mask: Image.Image, colour: Colour, centre: Point) -> None:
    """Colour the canvas through a mask, around a point."""
    left, top = round(centre[0] - mask.width / 2), round(centre[1] - mask.height / 2)
    tint(canvas, colour, (left, top), mask)


def tint(canvas: Image.Image, colour: Colour, spot: tuple[int, int], mask: Image.Image) -> None:
    """Colour the canvas through a mask, from a corner on."""
    # Pillow pastes a picture through a mask much faster than it does a colour.
    canvas.paste(Image.new("RGB", mask.size, colour), spot, mask)


def stencil(size: tuple[int, int], origin: Point, shapes: Sequence[Shape], level: int = 255) -> Image.Image:
    """Give a mask of polygons, drawn three times as large and shrunk so that their edges are smooth."""
    mask = Image.new("L", (size[0] * 3, size[1] * 3))
    pen = ImageDraw.Draw(mask)
    for shape in shapes:
        pen.polygon([((x - origin[0]) * 3, (y - origin[1]) * 3) for x, y in shape], fill=level)
    return mask.reduce(3)


def crest(width: int, base: float, rise: float, heights: list[float]) -> Shape:
    """Lay a line of heights over the width of a picture."""
    return [(x * width / 256, base - rise * height) for x, height in enumerate(heights)]


def rolling(rng: random.Random, waves: float, count: int = 257) -> list[float]:
    """Give a smooth line of heights from -1 to 1."""
    parts = [
        (waves * rng.uniform(0.7, 1.3) * speed * math.tau / count, rng.uniform(0, math.tau), share)
        for speed, share in ((1, 0.6), (2.1, 0.3), (4.3, 0.1))
    ]
    return [sum(share * math.sin(speed * x + start) for speed, start, share in parts) for x in range(count)]


def jagged(rng: random.Random, peaks: float) -> list[float]:
    """Give a mountainous line of 257 heights of about -1 to 1, by displacing midpoints."""
    heights = [rng.uniform(-1, 1) for _ in range(2 ** max(1, round(math.log2(peaks))) + 1)]
    shake = 0.45
    while len(heights) < 257:
        middles = [(a + b) / 2 + rng.uniform(-shake, shake) for a, b in pairwise(heights)]
        heights = [height for pair in zip(heights, middles, strict=False) for height in pair] + heights[-1:]
        shake *= 0.5
    return heights
