"""Drawing primitives: colours, gradients, masks and height profiles."""

import math
import random
from collections.abc import Sequence
from itertools import pairwise

from PIL import Image, ImageDraw

Colour = tuple[int, ...]
Point = tuple[float, float]
Polygon = list[Point]

PROFILE_LENGTH = 257
"""Heights in a profile that spans the width of an image."""


def parse_colour(text: str) -> Colour:
    """Parse a colour such as "ffe9b8"."""
    return tuple(bytes.fromhex(text))


def mix(first: Colour, second: Colour, share: float) -> Colour:
    """Interpolate between two colours: share 0 is the first, 1 the second."""
    return tuple(round(a + (b - a) * share) for a, b in zip(first, second, strict=True))


def gradient(colours: Sequence[Colour], size: tuple[int, int]) -> Image.Image:
    """Return a smooth vertical gradient: an RGB image, or a mask if the colours have one channel."""
    mode = "RGB" if len(colours[0]) == 3 else "L"
    column = Image.frombytes(mode, (1, len(colours)), b"".join(bytes(colour) for colour in colours))
    return column.resize((1, size[1]), Image.Resampling.BICUBIC).resize(size, Image.Resampling.NEAREST)


def glow(diameter: float, strength: int) -> Image.Image:
    """Return a round mask of a level (0 to 255) in the centre that fades to 0 at the edge."""
    # Pillow's radial gradient reaches 255 in the corners, and so 180 in the middle of each side.
    disc = Image.radial_gradient("L").point([round(strength * max(0, 1 - level / 180) ** 2.2) for level in range(256)])
    return disc.resize((max(2, round(diameter)), max(2, round(diameter))), Image.Resampling.BICUBIC)


def stamp(canvas: Image.Image, mask: Image.Image, colour: Colour, centre: Point) -> None:
    """Paint a colour through a mask that is centred on a point."""
    left, top = round(centre[0] - mask.width / 2), round(centre[1] - mask.height / 2)
    tint(canvas, colour, (left, top), mask)


def tint(canvas: Image.Image, colour: Colour, corner: tuple[int, int], mask: Image.Image) -> None:
    """Paint a colour through a mask whose top left corner is at a point."""
    # Pillow pastes an image through a mask much faster than a colour.
    canvas.paste(Image.new("RGB", mask.size, colour), corner, mask)


def polygon_mask(size: tuple[int, int], origin: Point, polygons: Sequence[Polygon], level: int = 255) -> Image.Image:
    """Return a mask of polygons with antialiased edges; `origin` is the point at the top left corner of the mask."""
    mask = Image.new("L", (size[0] * 3, size[1] * 3))
    pen = ImageDraw.Draw(mask)
    for polygon in polygons:
        pen.polygon([((x - origin[0]) * 3, (y - origin[1]) * 3) for x, y in polygon], fill=level)
    return mask.reduce(3)


def ridge_line(width: int, base: float, scale: float, heights: list[float]) -> Polygon:
    """Place a height profile over the width of an image, with height 0 at `base`."""
    return [(x * width / (PROFILE_LENGTH - 1), base - scale * height) for x, height in enumerate(heights)]


def smooth_heights(rng: random.Random, waves: float, count: int = PROFILE_LENGTH) -> list[float]:
    """Return a profile of heights from -1 to 1 that is a sum of sine waves."""
    sines = [
        (waves * rng.uniform(0.7, 1.3) * frequency * math.tau / count, rng.uniform(0, math.tau), amplitude)
        for frequency, amplitude in ((1, 0.6), (2.1, 0.3), (4.3, 0.1))
    ]
    return [sum(amplitude * math.sin(step * x + phase) for step, phase, amplitude in sines) for x in range(count)]


def jagged_heights(rng: random.Random, peaks: float) -> list[float]:
    """Return a mountainous profile of heights of about -1 to 1, made by midpoint displacement."""
    heights = [rng.uniform(-1, 1) for _ in range(2 ** max(1, round(math.log2(peaks))) + 1)]
    displacement = 0.45
    while len(heights) < PROFILE_LENGTH:
        midpoints = [(a + b) / 2 + rng.uniform(-displacement, displacement) for a, b in pairwise(heights)]
        heights = [height for pair in zip(heights, midpoints, strict=False) for height in pair] + heights[-1:]
        displacement *= 0.5
    return heights
