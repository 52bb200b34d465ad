"""Draws the pictures that the emulator hands out: a landscape led by the prompt's words and varied by the seed."""

import contextlib
import hashlib
import io
import math
import random
import re
import textwrap
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont, ImageOps

_Colour = tuple[int, ...]
_Point = tuple[float, float]
_Shape = list[_Point]


def draw(
    prompt: str, *, seed: int, width: int, height: int, output_format: str, input_images: Sequence[bytes] = ()
) -> bytes:
    """Draws a landscape captioned with the prompt and gives the encoded "jpeg" or "png" file.

    The same arguments always give the same bytes. An input image that cannot be read raises ValueError.
    """
    scene = _plan(prompt, seed, width, height)
    _paint_sky(scene)
    if scene.cues & {"sea", "city"}:
        _paint_shore(scene)
    else:
        _paint_hills(scene)
    _paint_weather(scene)
    floor = _write_caption(scene.canvas, prompt)
    _lay_out_prints(scene, input_images, floor)
    file = io.BytesIO()
    scene.canvas.save(file, output_format, **_ENCODING[output_format])
    return file.getvalue()


def size_of(data: bytes) -> tuple[int, int]:
    """Gives the width and height of an encoded PNG, JPEG, WebP or GIF, as stored (before any EXIF rotation).

    Raises ValueError when the picture cannot be read to its end.
    """
    return _read(data, enough=1)[0]


class _Palette(NamedTuple):
    sky: str  # colours from the zenith to the horizon
    light: str  # sun or moon
    land: str  # the nearest silhouettes
    night: bool = False


_ENCODING = {"jpeg": {"quality": 90}, "png": {"compress_level": 1}}

# The first palette that a cue names wins, so the stronger moods come first.
_PALETTES = {
    "aurora": _Palette("050a1c 0a1a38 10364f 2b7a78", "eefcf6", "03101a", night=True),
    "night": _Palette("070b1f 10204a 274680 6d8fbf", "f4f1e2", "050a1c", night=True),
    "sunset": _Palette("2d1e4f 8e3b6e e8684a fdb863", "ffe9b8", "24102f"),
    "dawn": _Palette("44558a 9484b0 eaaca3 fcdcb8", "fff4da", "2a2c4c"),
    "twilight": _Palette("1b1d4d 4b3f8f b16fa8 f6bcae", "fff0e0", "150f33", night=True),
    "fire": _Palette("1a0b16 561a2a b33a2a f3964a", "ffdf9e", "12060d"),
    "desert": _Palette("4f6f9f c0a0a0 f0b98a fbe0b0", "fff3d0", "6e2c1f"),
    "spring": _Palette("7f9fc9 c3b5d9 f2c4cf fbe6d8", "fffaf0", "463a63"),
    "winter": _Palette("7f9cc2 adc3dc d8e2ee f8f1ea", "ffffff", "2f4668"),
    "autumn": _Palette("6b4a5e c27b5a eeb866 fbe5b0", "fff6d6", "381d22"),
    "storm": _Palette("333f4a 586973 8a999c c6cbc2", "eef0e6", "172126"),
    "forest": _Palette("5f8f8a 9dbfa8 d5e0bd f6f0d2", "fffbe6", "0f2b27"),
    "sea": _Palette("1d6f93 4fb0b5 a9dcc4 fdf0c4", "fffdf0", "0b3546"),
    "day": _Palette("3a7fc2 79b4de bcdcec f5efdc", "fffce8", "1b4550"),
}

_CUES = {
    "aurora": "aurora|northern light|polar light",
    "night": "night|midnight|moon|moonlit|moonlight|star|starr|starlit|galax|space|cosmos",
    "sunset": "sunset|sundown|evening|golden hour",
    "dawn": "dawn|sunrise|daybreak|morning",
    "twilight": "twilight|dusk|neon|cyberpunk|dream",
    "fire": "fire|volcano|lava|dragon|ember|inferno",
    "desert": "desert|dune|sahara|camel|caravan|sand|cactus|canyon|mars",
    "spring": "spring|cherr|blossom|sakura|flower|garden",
    "winter": "snow|winter|ice|ic|frost|arctic|christmas|glacier",
    "autumn": "autumn|fall|harvest|october|maple",
    "storm": "rain|storm|thunder|fogg?|mist|cloud",
    "rain": "rain|storm|thunder|downpour",
    "forest": "forest|wood|tree|jungle|pine|fox|deer|bear|owl|wolf|cabin",
    "sea": "sea|ocean|beach|island|lake|river|pond|harbou?r|lighthouse|boat|ship|fish|koi|whale|coast|wave|water",
    "city": "cit(?:y|ie)|town|skyline|street|skyscraper|metropolis",
    "day": "summer|noon|sunn|sk(?:y|ie)|mountain",
    "lighthouse": "lighthouse|beacon",
    "boat": "boat|ship|sail|sailing|sailor|yacht|regatta",
    "camel": "camel|caravan",
    "cabin": "cabin|hut|house|cottage|village|farm",
}

# What falls through the air: its colour, and how large a speck is next to a snowflake.
_SPECKS = {"winter": ("ffffff", 1.0), "spring": ("ffc4d4", 0.9), "autumn": ("f08c2e", 0.9), "fire": ("ffb347", 0.6)}

# Silhouettes as polygons that stand at (0, 0); a unit is the figure's height.
_FIGURES: dict[str, list[_Shape]] = {
    "lighthouse": [
        [(-0.1, -0.1), (-0.06, 0.72), (0.06, 0.72), (0.1, -0.1)],
        [(-0.09, 0.72), (-0.09, 0.75), (0.09, 0.75), (0.09, 0.72)],
        [(-0.045, 0.75), (-0.045, 0.87), (0.045, 0.87), (0.045, 0.75)],
        [(-0.07, 0.87), (-0.03, 0.94), (0, 1), (0.03, 0.94), (0.07, 0.87)],
    ],
    "boat": [
        [(-0.45, 0.13), (-0.32, 0), (0.32, 0), (0.47, 0.14)],
        [(0, 0.17), (0.03, 0.55), (0, 1), (0.22, 0.6), (0.4, 0.19)],
        [(-0.04, 0.19), (-0.04, 0.92), (-0.2, 0.5), (-0.38, 0.2)],
    ],
    "camel": [
        [(-0.4, 0.4), (-0.3, 0.6), (-0.18, 0.66), (-0.08, 0.84), (0.02, 0.86), (0.12, 0.66), (0.24, 0.62), (0.33, 0.7),
         (0.36, 0.9), (0.44, 0.96), (0.57, 0.88), (0.55, 0.82), (0.44, 0.8), (0.41, 0.62), (0.32, 0.46), (0.2, 0.38),
         (-0.2, 0.4), (-0.34, 0.36)],
        [(-0.38, -0.04), (-0.37, 0.45), (-0.27, 0.45), (-0.33, -0.04)],
        [(-0.24, -0.04), (-0.3, 0.45), (-0.2, 0.45), (-0.19, -0.04)],
        [(0.12, -0.04), (0.14, 0.45), (0.23, 0.45), (0.17, -0.04)],
        [(0.26, -0.04), (0.2, 0.45), (0.31, 0.48), (0.31, -0.04)],
    ],
    "cabin": [
        [(-0.5, -0.1), (-0.5, 0.45), (0.5, 0.45), (0.5, -0.1)],
        [(-0.62, 0.4), (-0.38, 0.92), (0.38, 0.92), (0.62, 0.4)],
        [(0.18, 0.8), (0.18, 1.08), (0.32, 1.08), (0.32, 0.8)],
    ],
}  # fmt: skip


@dataclass
class _Scene:
    canvas: Image.Image
    rng: random.Random
    cues: set[str]
    sky: list[_Colour]
    light: _Colour
    land: _Colour
    night: bool
    horizon: float
    sun: _Point
    unit: float  # what elements are measured in: about the picture's side, less when it is very long


def _plan(prompt: str, seed: int, width: int, height: int) -> _Scene:
    rng = random.Random(hashlib.sha256(f"{seed} {prompt}".encode("utf-8", "surrogatepass")).digest())
    cues = {cue for cue, words in _CUES.items() if re.search(rf"\b(?:{words})(?:e?s|y)?\b", prompt, re.IGNORECASE)}
    chosen = rng.choice(list(_PALETTES))
    palette = _PALETTES[next((name for name in _PALETTES if name in cues), chosen)]
    if not cues & {"sea", "city", "desert", "forest"}:
        cues.add(rng.choice(["sea", "forest", "desert", "peaks"]))
    horizon = height * rng.uniform(0.52, 0.64)
    altitude = rng.uniform(0.5, 0.8) if palette.night else rng.uniform(0.12, 0.5)
    across = rng.choice([rng.uniform(0.18, 0.4), rng.uniform(0.6, 0.82)])
    return _Scene(
        canvas=Image.new("RGB", (width, height)),
        rng=rng,
        cues=cues,
        sky=[_colour(text) for text in palette.sky.split()],
        light=_colour(palette.light),
        land=_colour(palette.land),
        night=palette.night,
        horizon=horizon,
        sun=(width * across, horizon * (1 - altitude)),
        unit=min(math.sqrt(width * height), 1.5 * min(width, height)),
    )


def _paint_sky(scene: _Scene) -> None:
    width, height = scene.canvas.size
    # All but the stars and the sun is soft, so that a small picture scaled up looks the same and costs little.
    scale = min(1.0, 256 / max(width, height))
    size = max(8, round(width * scale)), max(8, round(height * scale))
    horizon = max(4, round(scene.horizon * scale))
    sky = Image.new("RGB", size, scene.sky[-1])
    sky.paste(_gradient([*scene.sky, scene.sky[-1]], (size[0], horizon)))
    if "aurora" in scene.cues:
        for _ in range(2):
            _paint_aurora(sky, scene.rng, horizon)
    else:
        _paint_clouds(sky, scene, horizon)
    glow = _soft_disc(max(4, round(scene.unit * scale * (1.1 if scene.night else 1.6))), 110 if scene.night else 235)
    _stamp(sky, glow, scene.light, (scene.sun[0] * scale, scene.sun[1] * scale))
    vignette = Image.radial_gradient("L").point([round(110 * (value / 255) ** 3) for value in range(256)])
    sky.paste((8, 8, 20), (0, 0, *size), vignette.resize(size))
    reach = math.ceil(scene.horizon + (height - scene.horizon) * 0.3)
    part = sky.resize((width, reach), Image.Resampling.BILINEAR, (0, 0, size[0], size[1] * reach / height))
    scene.canvas.paste(scene.sky[-1], (0, 0, width, height))
    scene.canvas.paste(_grainy(part, scene.rng))
    if scene.night:
        _paint_stars(scene)
    if not scene.cues & {"rain", "aurora"}:
        _paint_sun(scene)


def _grainy(picture: Image.Image, rng: random.Random) -> Image.Image:
    """Adds noise of a few levels, which hides the bands that a slow gradient would show."""
    tile = Image.frombytes("L", (128, 128), rng.randbytes(128 * 128)).point([value // 64 for value in range(256)])
    grain = Image.new("L", picture.size)
    for y in range(0, picture.height, 128):
        for x in range(0, picture.width, 128):
            grain.paste(tile, (x, y))
    return ImageChops.add(picture, Image.merge("RGB", (grain, grain, grain)), 1, -1)


def _paint_clouds(sky: Image.Image, scene: _Scene, horizon: int) -> None:
    size = sky.width, horizon
    mask = Image.new("L", size, 128)
    for rows, share in ((3, 0.7), (7, 0.5), (15, 0.35), (31, 0.2)):
        columns = max(2, round(rows * size[0] / size[1] / 2.5))
        noise = Image.frombytes("L", (columns, rows), scene.rng.randbytes(columns * rows))
        mask = Image.blend(mask, noise.resize(size, Image.Resampling.BICUBIC), share)
    threshold = scene.rng.uniform(120, 150)
    mask = mask.point([round(max(0.0, min(1.0, (value - threshold) / 70)) * 125) for value in range(256)])
    mask = ImageChops.multiply(mask, _fade([255, 255, 255, 160, 0], size))
    colour = _mix(scene.sky[1], scene.sky[2], 0.5) if scene.night else _mix(scene.sky[-1], scene.light, 0.5)
    sky.paste(colour, (0, 0, *size), mask)


def _paint_aurora(sky: Image.Image, rng: random.Random, horizon: int) -> None:
    width = sky.width
    reach = max(2, round(horizon * rng.uniform(0.45, 0.7)))
    foot = horizon * rng.uniform(0.6, 0.85)
    curtain = Image.new("L", (width, horizon))
    strip = _fade([0, 20, 70, 160, 0], (1, reach))
    for x, sway in enumerate(_rolling(rng, rng.uniform(1, 2), width)):
        curtain.paste(strip, (x, round(foot + sway * horizon * 0.13) - reach))
    rays = Image.frombytes("L", (40, 1), rng.randbytes(40)).point([90 + value * 165 // 255 for value in range(256)])
    curtain = ImageChops.multiply(curtain, rays.resize((width, horizon), Image.Resampling.BICUBIC))
    sky.paste(_gradient([(120, 70, 200), (60, 200, 170), (90, 255, 170)], (width, horizon)), (0, 0), curtain)


def _paint_stars(scene: _Scene) -> None:
    rng, unit, width = scene.rng, scene.unit, scene.canvas.width
    sprites = [_soft_disc(max(2, round(unit * size)), 255) for size in (0.003, 0.004, 0.006, 0.011)]
    for _ in range(round(120 * min(4.0, width * scene.horizon / unit**2) + 20)):
        spot = rng.uniform(0, width), scene.horizon * rng.random() ** 1.4
        _stamp(scene.canvas, rng.choices(sprites, (6, 5, 3, 1))[0], scene.light, spot)


def _paint_sun(scene: _Scene) -> None:
    radius = scene.unit * scene.rng.uniform(0.04, 0.07)
    side = math.ceil(2 * radius) + 2
    mask = _stencil((side, side), (0, 0), [_ellipse(side / 2, side / 2, radius, radius, 90)])
    if scene.night and scene.rng.random() < 0.5:
        bite = _ellipse(side / 2 + radius * 0.5, side / 2 - radius * 0.25, radius * 0.9, radius * 0.9, 90)
        mask = ImageChops.subtract(mask, _stencil((side, side), (0, 0), [bite]))
    _stamp(scene.canvas, mask, scene.light, scene.sun)


def _paint_hills(scene: _Scene) -> None:
    rng, unit = scene.rng, scene.unit
    width, height = scene.canvas.size
    ground = height - scene.horizon
    for layer in range(5):
        near = layer / 4
        base = scene.horizon + ground * (0.1 + 0.6 * near)
        rise = min(unit, height) * (0.1 - 0.05 * near)
        if "desert" in scene.cues:
            heights = [0.7 - 2 * abs(value) for value in _rolling(rng, max(0.5, width / unit * 0.7))]
        elif layer < 2:
            heights = _jagged(rng, width / unit * 4)
        else:
            heights = _rolling(rng, width / unit)
        crest = [(x * width / 512, base - value * rise) for x, value in enumerate(heights)]
        trees = _trees(rng, crest, unit * (0.03 + 0.08 * near)) if "forest" in scene.cues and layer else []
        _paint_ridge(scene, crest, trees, near)
        if "desert" in scene.cues:
            _shade_dunes(scene, crest, near)
        if layer == 2 and "camel" in scene.cues:
            for place in range(4):
                _place(scene, "camel", crest[190 + place * 36], unit * 0.06, 0.8)
        if layer == 2 and "cabin" in scene.cues:
            _place(scene, "cabin", crest[rng.choice([150, 360])], unit * 0.09, 0.75)


def _shade_dunes(scene: _Scene, crest: _Shape, near: float) -> None:
    pass


def _paint_shore(scene: _Scene) -> None:
    rng, unit = scene.rng, scene.unit
    width, height = scene.canvas.size
    for layer in range(2):
        rise = unit * (0.1 - 0.05 * layer)
        crest = [
            (x * width / 512, scene.horizon - max(-0.02, value + 0.3) * rise)
            for x, value in enumerate(_jagged(rng, width / unit * 4))
        ]
        _paint_ridge(scene, crest, [], 0.1 + 0.25 * layer)
    if "city" in scene.cues:
        _paint_skyline(scene)
    _paint_water(scene)
    side = rng.choice([-1, 1])
    if "boat" in scene.cues:
        _place(scene, "boat", (width * (0.5 - side * 0.2), scene.horizon + (height - scene.horizon) * 0.3), unit * 0.16, 0.8)
    crest = [
        (x * width / 512, height - unit * (0.08 + side * (x / 256 - 1) * 0.12 + value * 0.03))
        for x, value in enumerate(_rolling(rng, width / unit))
    ]
    if "lighthouse" in scene.cues:
        _place(scene, "lighthouse", crest[256 + side * 150], unit * 0.36, 0.9)
    _paint_ridge(scene, crest, _trees(rng, crest, unit * 0.08), 1)


def _paint_skyline(scene: _Scene) -> None:
    rng, unit, width = scene.rng, scene.unit, scene.canvas.width
    lamp = (255, 214, 140)
    for layer in range(2):
        near = 0.35 + 0.35 * layer
        colour = _mix(scene.sky[-1], scene.land, near)
        pen = ImageDraw.Draw(scene.canvas)
        x = 0.0
        pitch = max(3.0, unit * 0.009)
        while x < width:
            across = unit * rng.uniform(0.025, 0.06)
            middle = 1 - abs(x / width - 0.5) * 1.3
            tall = unit * (0.03 + rng.random() ** 1.6 * (0.3 - 0.12 * layer) * middle)
            left, right, top = round(x), round(x + across), round(scene.horizon - tall)
            pen.rectangle((left, top, right, scene.horizon + 2), fill=colour)
            if rng.random() < 0.2:
                pen.rectangle(((left + right) // 2, top - tall * 0.2, (left + right) // 2 + unit // 400, top), fill=colour)
            for row in range(int(tall / pitch)):
                for column in range(1, int(across / pitch)):
                    if rng.random() < 0.3:
                        spot = left + column * pitch, top + (row + 0.6) * pitch
                        pen.rectangle((*spot, spot[0] + pitch * 0.35, spot[1] + pitch * 0.4), fill=_mix(colour, lamp, rng.uniform(0.3, 0.9)))
            x += across * rng.choice([0.9, 1, 1.1, 1.4])


def _paint_water(scene: _Scene) -> None:
    rng, unit = scene.rng, scene.unit
    width, height = scene.canvas.size
    top = round(scene.horizon)
    size = width, height - top
    mirrored = ImageOps.flip(scene.canvas.crop((0, max(0, 2 * top - height), width, top)))
    # Squeezing and stretching the picture sideways smears it the way ripples do.
    mirrored = mirrored.reduce((min(16, width), 1))
    mirrored = mirrored.resize((mirrored.width, size[1]))
    mirrored.paste(_mix(scene.sky[0], scene.land, 0.5), (0, 0, *mirrored.size), _fade([50, 100, 190], mirrored.size))
    scene.canvas.paste(mirrored.resize(size, Image.Resampling.BILINEAR), (0, top))
    glints = []
    for _ in range(150):
        near = rng.random() ** 1.5
        spot = scene.sun[0] + rng.gauss(0, 1) * unit * (0.06 + 0.2 * near), top + near * size[1] * 0.9 + 1
        length = unit * (0.004 + 0.04 * near * rng.random())
        glints.append(_ellipse(*spot, length, unit * 0.0015 * (1 + near), 12))
    mask = _stencil(size, (0, top), glints).point([value * 150 // 255 for value in range(256)])
    scene.canvas.paste(scene.light, (0, top, width, height), mask)


def _paint_ridge(scene: _Scene, crest: _Shape, trees: list[_Shape], near: float) -> None:
    """Paints a layer of land: the farther, the hazier, and hazier still in its valleys."""
    width, height = scene.canvas.size
    colour = _mix(scene.sky[-1], scene.land, 0.25 + 0.75 * near)
    valley = _mix(colour, scene.sky[-1], 0.5 * (1 - near))
    top = max(0, math.floor(min(y for shape in [crest, *trees] for _, y in shape)))
    low = min(height, max(top + 1, math.ceil(max(y for _, y in crest))))
    fill = _gradient([colour, valley], (width, height - top))
    # Only the crest has an edge to smooth; below its lowest point the layer is solid.
    mask = _stencil((width, low - top), (0, top), [[*crest, (width, low), (0, low)], *trees])
    scene.canvas.paste(fill.crop((0, 0, width, low - top)), (0, top), mask)
    scene.canvas.paste(fill.crop((0, low - top, width, height - top)), (0, low))


def _trees(rng: random.Random, crest: _Shape, size: float) -> list[_Shape]:
    trees = []
    width = crest[-1][0]
    x = 0.0
    while x < width:
        foot = crest[int(x / width * 512)][1] + size * 0.05
        trees.append(_conifer(x, foot, size * rng.uniform(0.5, 1)))
        x += size * rng.choice([0.15, 0.2, 0.25, 0.35, 0.5, 1.2])
    return trees


def _conifer(x: float, foot: float, size: float) -> _Shape:
    right = [(0.0, size * 1.05)]
    for tier in range(5):
        reach, top = size * 0.05 * (tier + 1), size * (1 - tier * 0.17)
        right += [(reach * 0.35, top), (reach, top - size * 0.2)]
    return [(x + dx, foot - dy) for dx, dy in right] + [(x - dx, foot - dy) for dx, dy in reversed(right)]


def _place(scene: _Scene, name: str, foot: _Point, size: float, near: float) -> None:
    left, top = math.floor(foot[0] - size), math.floor(foot[1] - size * 1.1)
    shapes = [[(foot[0] + x * size, foot[1] - y * size) for x, y in shape] for shape in _FIGURES[name]]
    side = math.ceil(size * 2)
    mask = _stencil((side, side), (left, top), shapes)
    scene.canvas.paste(_mix(scene.sky[-1], scene.land, near), (left, top, left + side, top + side), mask)
    if name in ("lighthouse", "cabin"):
        lamp = foot[0], foot[1] - size * (0.81 if name == "lighthouse" else 0.22)
        _stamp(scene.canvas, _soft_disc(math.ceil(size * 0.7), 255), (255, 224, 150), lamp)


def _paint_weather(scene: _Scene) -> None:
    rng, unit = scene.rng, scene.unit
    width, height = scene.canvas.size
    count = round(90 * min(4.0, width * height / unit**2))
    if "rain" in scene.cues:
        across, along = max(2, round(unit * 0.012)), max(4, round(unit * 0.06))
        streak = _stencil((across, along), (0, 0), [[(across, 0), (across - 1, 0), (0, along), (0.5, along)]])
        streak = streak.point([value * 90 // 255 for value in range(256)])
        for _ in range(count * 2):
            _stamp(scene.canvas, streak, (235, 240, 245), (rng.uniform(0, width), rng.uniform(0, height)))
        return
    for cue, (colour, scale) in _SPECKS.items():
        if cue in scene.cues:
            flakes = [_soft_disc(max(2, round(unit * size * scale)), 255) for size in (0.007, 0.01, 0.014, 0.022)]
            for _ in range(count):
                spot = rng.uniform(0, width), rng.uniform(0, height)
                _stamp(scene.canvas, rng.choices(flakes, (5, 4, 3, 1))[0], _colour(colour), spot)


def _write_caption(canvas: Image.Image, prompt: str) -> int:
    """Writes the prompt along the bottom and gives the height that is left free above it."""
    width, height = canvas.size
    text = _legible(prompt[:600])
    if min(width, height) < 160 or not text:
        return height
    size = max(11.0, min(0.03 * math.sqrt(width * height), 0.07 * min(width, height)))
    font = ImageFont.load_default(size)
    lines = _wrap(text, font, width - 3 * size)
    top = round(height - size * (1.4 * len(lines) + 0.9))
    fade = round(size * 2.5)
    shade = Image.new("L", (1, height - top + fade), 165)
    shade.paste(_fade([0, 20, 90, 150, 165], (1, fade)))
    box = (0, top - fade, width, height)
    canvas.paste((6, 8, 16), box, shade.resize((width, shade.height), Image.Resampling.NEAREST))
    pen = ImageDraw.Draw(canvas)
    for row, line in enumerate(lines):
        _write_line(pen, line, font, ((width - font.getlength(_plain(line))) / 2, top + row * size * 1.4))
    return round(top - size)


def _write_line(pen: ImageDraw.ImageDraw, line: str, font: ImageFont.FreeTypeFont, spot: _Point) -> None:
    pen.text(spot, _plain(line), (255, 255, 255), font)


def _wrap(text: str, font: ImageFont.FreeTypeFont, room: float) -> list[str]:
    columns = max(8, round(len(text) * room / font.getlength(_plain(text)) * 1.2))
    while True:
        lines = textwrap.wrap(text, columns, max_lines=3, placeholder="…")
        if columns <= 8 or max(font.getlength(_plain(line)) for line in lines) <= room:
            return lines
        columns -= 1


def _legible(prompt: str) -> str:
    return prompt


def _plain(text: str) -> str:
    return text


def _lay_out_prints(scene: _Scene, input_images: Sequence[bytes], floor: int) -> None:
    pass


def _read(data: bytes, enough: int) -> tuple[tuple[int, int], Image.Image]:
    image = Image.open(io.BytesIO(data))
    return image.size, image


def _colour(text: str) -> _Colour:
    return tuple(bytes.fromhex(text))


def _mix(one: _Colour, other: _Colour, share: float) -> _Colour:
    return tuple(round(a + (b - a) * share) for a, b in zip(one, other, strict=True))


def _gradient(colours: Sequence[_Colour], size: tuple[int, int]) -> Image.Image:
    column = Image.frombytes("RGB", (1, len(colours)), b"".join(bytes(colour) for colour in colours))
    return column.resize((1, size[1]), Image.Resampling.BICUBIC).resize(size, Image.Resampling.NEAREST)


def _fade(levels: list[int], size: tuple[int, int]) -> Image.Image:
    column = Image.frombytes("L", (1, len(levels)), bytes(levels))
    return column.resize((1, size[1]), Image.Resampling.BICUBIC).resize(size, Image.Resampling.NEAREST)


def _soft_disc(diameter: int, strength: int) -> Image.Image:
    # Pillow's gradient reaches its corners at 255, and so its sides at 180.
    disc = Image.radial_gradient("L").point([round(strength * max(0, 1 - v / 180) ** 2.2) for v in range(256)])
    return disc.resize((diameter, diameter), Image.Resampling.BICUBIC)


def _stamp(canvas: Image.Image, mask: Image.Image, colour: _Colour, centre: _Point) -> None:
    left, top = round(centre[0] - mask.width / 2), round(centre[1] - mask.height / 2)
    canvas.paste(colour, (left, top, left + mask.width, top + mask.height), mask)


def _stencil(size: tuple[int, int], origin: _Point, shapes: Iterable[_Shape]) -> Image.Image:
    """Gives a mask of polygons, drawn three times as large and shrunk so that their edges are smooth."""
    mask = Image.new("L", (size[0] * 3, size[1] * 3))
    pen = ImageDraw.Draw(mask)
    for shape in shapes:
        pen.polygon([((x - origin[0]) * 3, (y - origin[1]) * 3) for x, y in shape], fill=255)
    return mask.reduce(3)


def _ellipse(x: float, y: float, across: float, along: float, corners: int) -> _Shape:
    angles = [corner * math.tau / corners for corner in range(corners)]
    return [(x + across * math.cos(angle), y + along * math.sin(angle)) for angle in angles]


def _rolling(rng: random.Random, waves: float, count: int = 513) -> list[float]:
    """Gives a smooth line of heights from -1 to 1."""
    parts = [
        (waves * rng.uniform(0.7, 1.3) * speed * math.tau / count, rng.uniform(0, math.tau), share)
        for speed, share in ((1, 0.6), (2.1, 0.3), (4.3, 0.1))
    ]
    return [sum(share * math.sin(speed * x + start) for speed, start, share in parts) for x in range(count)]


def _jagged(rng: random.Random, peaks: float) -> list[float]:
    """Gives a mountainous line of 513 heights of about -1 to 1, by displacing midpoints."""
    heights = [rng.uniform(-1, 1) for _ in range(2 ** max(1, round(math.log2(peaks))) + 1)]
    shake = 0.45
    while len(heights) < 513:
        middles = [(a + b) / 2 + rng.uniform(-shake, shake) for a, b in pairwise(heights)]
        heights = [height for pair in zip(heights, middles, strict=False) for height in pair] + heights[-1:]
        shake *= 0.5
    return heights
