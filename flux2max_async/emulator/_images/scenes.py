"""Draws the pictures that the emulator hands out: a landscape led by the prompt's words and varied by the seed."""

import hashlib
import io
import math
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, product

from PIL import Image, ImageChops, ImageDraw, ImageOps

from flux2max_async.emulator._images import drawing
from flux2max_async.emulator._images.caption import write_caption
from flux2max_async.emulator._images.input_images import lay_out_prints


def draw(
    prompt: str, *, seed: int, width: int, height: int, output_format: str, input_images: Sequence[bytes] = ()
) -> bytes:
    """Draws a landscape captioned with the prompt and gives the encoded "jpeg" or "png" file.

    The same arguments always give the same bytes. An input image that cannot be read raises ValueError.
    """
    scene = _plan(prompt, seed, width, height)
    _paint_sky(scene)
    (_paint_shore if "shore" in scene.cues else _paint_hills)(scene)
    _paint_air(scene)
    floor = write_caption(scene.canvas, scene.land, prompt)
    lay_out_prints(scene.canvas, scene.rng, scene.unit, input_images, floor)
    file = io.BytesIO()
    # Each format takes the setting that is its own: a good quality for JPEG, a quick packing for PNG.
    scene.canvas.save(file, output_format, quality=90, compress_level=1)
    return file.getvalue()


# Each mood: the words that call for it, the sky from zenith to horizon, the sun or moon, and the nearest land.
# The first one called for wins, so the stronger moods come first.
_MOODS = {
    "aurora": ("aurora|northern light|polar light", "050a1c 0a1a38 10364f 2b7a78", "eefcf6", "03101a"),
    "night": ("night|midnight|moon|moonlight|starr?|galax", "070b1f 10204a 274680 6d8fbf", "f4f1e2", "050a1c"),
    "sunset": ("sunset|sundown|evening|golden hour", "2d1e4f 8e3b6e e8684a fdb863", "ffe9b8", "24102f"),
    "dawn": ("dawn|sunrise|daybreak|morning", "44558a 9484b0 eaaca3 fcdcb8", "fff4da", "2a2c4c"),
    "twilight": ("twilight|dusk|neon|cyberpunk|dream", "1b1d4d 4b3f8f b16fa8 f6bcae", "fff0e0", "150f33"),
    "fire": ("fire|volcano|lava|dragon|ember|inferno", "1a0b16 561a2a b33a2a f3964a", "ffdf9e", "12060d"),
    "desert": ("desert|dune|camel|caravan|sand|cactus|canyon", "4f6f9f c0a0a0 f0b98a fbe0b0", "fff3d0", "6e2c1f"),
    "spring": ("spring|cherr|blossom|sakura|flower|garden", "7f9fc9 c3b5d9 f2c4cf fbe6d8", "fffaf0", "463a63"),
    "winter": ("snow|winter|ice|ic|frost|arctic|glacier", "5f87b8 98b6d8 cfdeee fbeee6", "ffffff", "2f4668"),
    "autumn": ("autumn|fall|harvest|october|maple", "6b4a5e c27b5a eeb866 fbe5b0", "fff6d6", "381d22"),
    "storm": ("rain|storm|thunder|fogg?|mist|cloud", "333f4a 586973 8a999c c6cbc2", "eef0e6", "172126"),
    "forest": ("forest|wood|tree|jungle|pine|fox|deer|bear|owl", "4f8a94 92b8ae d3e0c0 f8f1d4", "fffbe6", "0f2b27"),
    "sea": ("sea|ocean|wave|water|beach|island|coast|lighthouse", "1d6f93 4fb0b5 a9dcc4 fdf0c4", "fffdf0", "0b3546"),
    "day": ("summer|noon|sunn|sk|meadow", "3a7fc2 79b4de bcdcec f5efdc", "fffce8", "1b4550"),
}
_NIGHTS = {"aurora", "night", "twilight"}
_LAMP = (255, 218, 145)

_THINGS = {
    "shore": "sea|ocean|wave|water|beach|island|coast|lighthouse|lake|river|pond|harbou?r|boat|ship|sail|sailing|yacht",
    "peaks": "mountain|alp|peak|summit|hill|valley|volcano|dragon",
    "city": "cit|town|skyline|street|skyscraper|metropolis",
    "rain": "rain|storm|thunder|downpour",
    "lighthouse": "lighthouse",
    "boat": "boat|ship|sail|sailing|yacht",
    "camel": "camel|caravan",
}

# What floats through the air in a mood: snow, petals, leaves and embers.
_SPECKS = {"winter": "ffffff", "spring": "f59ab8", "autumn": "e8752a", "fire": "ffb347"}

# Silhouettes as polygons "x,y x,y .../x,y ..." that stand at 0,0 and are 100 tall.
_FIGURES = {
    "lighthouse": "-10,-10 -6,72 6,72 10,-10/-9,72 -9,75 9,75 9,72/-4,75 -4,87 4,87 4,75/-7,87 -3,94 0,100 3,94 7,87",
    "boat": "-45,13 -32,0 32,0 47,14/0,17 3,55 0,100 22,60 40,19/-4,19 -4,92 -20,50 -38,20",
    "camel": "-40,40 -30,60 -18,66 -8,84 2,86 12,66 24,62 33,70 36,90 44,96 57,88 55,82 44,80 41,62 32,46 20,38 -20,40"
    " -34,36/-38,-4 -37,45 -27,45 -33,-4/-24,-4 -30,45 -20,45 -19,-4/12,-4 14,45 23,45 17,-4/26,-4 20,45 31,48 31,-4",
    "bird": "95,25 55,50 0,5 -55,50 -95,25 -50,30 0,-5 50,30",
}


@dataclass
class _Scene:
    canvas: Image.Image
    rng: random.Random
    cues: set[str]
    sky: list[drawing.Colour]
    light: drawing.Colour
    land: drawing.Colour
    night: bool
    horizon: float
    sun: drawing.Point
    unit: float  # what things are measured in: about the picture's side, less when it is very long


def _plan(prompt: str, seed: int, width: int, height: int) -> _Scene:
    rng = random.Random(hashlib.sha256(f"{seed} {prompt}".encode("utf-8", "surrogatepass")).digest())
    words = {name: mood[0] for name, mood in _MOODS.items()} | _THINGS
    cues = {cue for cue in words if re.search(rf"\b(?:{words[cue]})(?:e?s|y|ies)?\b", prompt, re.IGNORECASE)}
    any_mood = rng.choice(list(_MOODS))
    mood = next((name for name in _MOODS if name in cues), any_mood)
    if "city" in cues:  # whose skyline is seen across the water
        cues.add("shore")
    if not cues & {"shore", "desert", "forest", "peaks"}:
        cues.add(rng.choice(["shore", "forest", "desert", "peaks"]))
    _, sky, light, land = _MOODS[mood]
    horizon = height * rng.uniform(0.48, 0.66)
    altitude = rng.uniform(0.5, 0.8) if mood in _NIGHTS else rng.uniform(0.12, 0.5)
    across = rng.choice([rng.uniform(0.18, 0.4), rng.uniform(0.6, 0.82)])
    return _Scene(
        canvas=Image.new("RGB", (width, height)),
        rng=rng,
        cues=cues,
        sky=[drawing.colour(text) for text in sky.split()],
        light=drawing.colour(light),
        land=drawing.colour(land),
        night=mood in _NIGHTS,
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
    sky.paste(drawing.gradient([*scene.sky, scene.sky[-1]], (size[0], horizon)))
    (_paint_aurora if "aurora" in scene.cues else _paint_clouds)(sky, scene, horizon)
    glow = drawing.glow(scene.unit * scale * (1.1 if scene.night else 1.6), 110 if scene.night else 235)
    drawing.stamp(sky, glow, scene.light, (scene.sun[0] * scale, scene.sun[1] * scale))
    vignette = Image.radial_gradient("L").point([round(110 * (level / 255) ** 3) for level in range(256)])
    drawing.tint(sky, (8, 8, 20), (0, 0), vignette.resize(size))
    # Land or water covers the rest.
    reach = math.ceil(scene.horizon + (height - scene.horizon) * (0 if "shore" in scene.cues else 0.5))
    part = sky.resize((width, reach), Image.Resampling.BILINEAR, (0, 0, size[0], size[1] * reach / height))
    scene.canvas.paste(scene.sky[-1], (0, 0, width, height))
    scene.canvas.paste(_grainy(part, scene.rng))
    if scene.night:
        stars = [drawing.glow(scene.unit * share, 255) for share in (0.003, 0.004, 0.006, 0.011)]
        _scatter(scene, stars, [scene.light], 140, scene.horizon)
    if not scene.cues & {"rain", "aurora"}:
        _paint_sun(scene)


def _paint_clouds(sky: Image.Image, scene: _Scene, horizon: int) -> None:
    size = sky.width, horizon
    mask = Image.new("L", size, 128)
    for rows, share in ((3, 0.7), (7, 0.5), (15, 0.35), (31, 0.2)):
        columns = max(2, round(rows * size[0] / size[1] / 2.5))
        noise = Image.frombytes("L", (columns, rows), scene.rng.randbytes(columns * rows))
        mask = Image.blend(mask, noise.resize(size, Image.Resampling.BICUBIC), share)
    threshold = scene.rng.uniform(120, 150)
    mask = mask.point([round(max(0.0, min(1.0, (level - threshold) / 70)) * 125) for level in range(256)])
    mask = ImageChops.multiply(mask, drawing.gradient([(255,), (255,), (255,), (160,), (0,)], size))
    colour = (
        drawing.mix(scene.sky[1], scene.sky[2], 0.5) if scene.night else drawing.mix(scene.sky[-1], scene.light, 0.5)
    )
    drawing.tint(sky, colour, (0, 0), mask)


def _paint_aurora(sky: Image.Image, scene: _Scene, horizon: int) -> None:
    rng, size = scene.rng, (sky.width, horizon)
    for _ in range(2):
        reach = max(2, round(horizon * rng.uniform(0.45, 0.7)))
        foot = horizon * rng.uniform(0.6, 0.85)
        curtain = Image.new("L", size)
        strip = drawing.gradient([(0,), (20,), (70,), (160,), (0,)], (1, reach))
        for x, sway in enumerate(drawing.rolling(rng, rng.uniform(1, 2), sky.width)):
            curtain.paste(strip, (x, round(foot + sway * horizon * 0.13) - reach))
        rays = Image.frombytes("L", (40, 1), rng.randbytes(40)).point([90 + level * 165 // 255 for level in range(256)])
        curtain = ImageChops.multiply(curtain, rays.resize(size, Image.Resampling.BICUBIC))
        sky.paste(drawing.gradient([(120, 70, 200), (60, 200, 170), (90, 255, 170)], size), (0, 0), curtain)


def _grainy(picture: Image.Image, rng: random.Random) -> Image.Image:
    """Adds noise of a few levels, which hides the bands that a slow gradient would show."""
    tile = Image.frombytes("L", (128, 128), rng.randbytes(128 * 128)).point([level // 86 for level in range(256)])
    tile = tile.convert("RGB")
    grain = Image.new("RGB", picture.size)
    for spot in product(range(0, picture.width, 128), range(0, picture.height, 128)):
        grain.paste(tile, spot)
    return ImageChops.add(picture, grain, 1, -1)


def _paint_sun(scene: _Scene) -> None:
    side = round(scene.unit * scene.rng.uniform(0.08, 0.14)) + 2
    disc = Image.radial_gradient("L").point([max(0, min(255, (174 - level) * 64)) for level in range(256)])
    disc = disc.resize((side, side))
    if scene.night and scene.rng.random() < 0.5:  # a crescent moon
        bite = Image.new("L", disc.size)
        bite.paste(disc, (side // 4, -side // 8))
        disc = ImageChops.subtract(disc, bite)
    drawing.stamp(scene.canvas, disc, scene.light, scene.sun)


def _paint_hills(scene: _Scene) -> None:
    rng, unit = scene.rng, scene.unit
    width, height = scene.canvas.size
    for layer in range(5):
        near = layer / 4
        if "desert" in scene.cues:
            heights = [0.7 - 2 * abs(level) for level in drawing.rolling(rng, width / unit * 0.7)]
        else:
            heights = drawing.jagged(rng, width / unit * 4) if layer < 2 else drawing.rolling(rng, width / unit)
        base = scene.horizon + (height - scene.horizon) * (0.1 + 0.6 * near)
        crest = drawing.crest(width, base, min(unit, height) * (0.1 - 0.05 * near), heights)
        trees = _trees(rng, crest, unit * (0.03 + 0.08 * near)) if "forest" in scene.cues and layer else []
        _paint_ridge(scene, crest, trees, near)
        if "desert" in scene.cues:
            _shade_dunes(scene, crest)
        if layer == 2 and "camel" in scene.cues:
            for spot in crest[95:165:18]:
                _place(scene, "camel", spot, unit * 0.06)


def _shade_dunes(scene: _Scene, crest: drawing.Shape) -> None:
    """Darkens the sides of the dunes that lie away from the sun."""
    width = scene.canvas.width
    away = crest if scene.sun[0] < width / 2 else crest[::-1]
    sag, foot = 0.0, [away[0]]
    for (_, before), (x, y) in pairwise(away):
        sag = sag + y - before if y > before else sag * 0.9
        foot.append((x, y + sag))
    shade = away + foot[::-1]
    top, low = math.floor(min(y for _, y in shade)), math.ceil(max(y for _, y in shade))
    drawing.tint(scene.canvas, scene.land, (0, top), drawing.stencil((width, low - top), (0, top), [shade], 60))


def _paint_shore(scene: _Scene) -> None:
    rng, unit = scene.rng, scene.unit
    width, height = scene.canvas.size
    for layer in range(2):
        heights = [max(-0.02, level + 0.3) for level in drawing.jagged(rng, width / unit * 4)]
        _paint_ridge(
            scene, drawing.crest(width, scene.horizon, unit * (0.1 - 0.05 * layer), heights), [], 0.1 + 0.25 * layer
        )
    if "city" in scene.cues:
        _paint_skyline(scene)
    _paint_water(scene)
    side = rng.choice([-1, 1])
    if "boat" in scene.cues:
        _place(scene, "boat", (width * (0.5 - side * 0.2), scene.horizon * 0.7 + height * 0.3), unit * 0.16)
    heights = [level + side * (x / 32 - 4) for x, level in enumerate(drawing.rolling(rng, width / unit))]
    crest = drawing.crest(width, height - unit * 0.08, unit * 0.03, heights)
    if "lighthouse" in scene.cues:
        x, y = crest[128 + side * 75]
        _place(scene, "lighthouse", (x, y), unit * 0.36)
        drawing.stamp(scene.canvas, drawing.glow(unit * 0.25, 255), _LAMP, (x, y - unit * 0.29))
    _paint_ridge(scene, crest, _trees(rng, crest, unit * 0.08), 1)


def _paint_skyline(scene: _Scene) -> None:
    rng, unit, width = scene.rng, scene.unit, scene.canvas.width
    pitch = max(3.0, unit * 0.009)
    pen = ImageDraw.Draw(scene.canvas)
    for layer in range(2):
        wall = drawing.mix(scene.sky[-1], scene.land, 0.35 + 0.35 * layer)
        left = 0.0
        while left < width:
            columns = rng.randint(3, 7)
            slope = 1 - abs(left / width - 0.5) * 1.3  # the tallest houses stand in the middle
            rows = round(unit / pitch * (0.03 + rng.random() ** 1.6 * (0.3 - 0.12 * layer) * slope))
            top = scene.horizon - rows * pitch
            pen.rectangle((left, top, left + columns * pitch, scene.horizon + 2), wall)
            for column, row in product(range(1, columns), range(rows)):
                if rng.random() < 0.3:
                    x, y = left + (column - 0.2) * pitch, top + (row + 0.6) * pitch
                    lamp = drawing.mix(wall, _LAMP, rng.uniform(0.3, 0.9))
                    pen.rectangle((x, y, x + pitch * 0.35, y + pitch * 0.4), lamp)
            left += columns * pitch * rng.choice([0.9, 1, 1.1, 1.4])


def _paint_water(scene: _Scene) -> None:
    rng, unit = scene.rng, scene.unit
    width, height = scene.canvas.size
    top = round(scene.horizon)
    depth = height - top
    # A mirrored picture that is squeezed and stretched sideways is smeared the way ripples do it.
    mirrored = ImageOps.flip(scene.canvas.crop((0, max(0, top - depth), width, top))).reduce((16, 1))
    mirrored = mirrored.resize((mirrored.width, depth))
    shade = drawing.gradient([(50,), (100,), (190,)], mirrored.size)
    drawing.tint(mirrored, drawing.mix(scene.sky[0], scene.land, 0.5), (0, 0), shade)
    scene.canvas.paste(mirrored.resize((width, depth), Image.Resampling.BILINEAR), (0, top))
    glints = []
    for _ in range(150):
        near = rng.random() ** 1.5
        x, y = scene.sun[0] + rng.gauss(0, 1) * unit * (0.06 + 0.2 * near), top + near * depth * 0.9 + 1
        dx, dy = unit * (0.005 + 0.045 * near * rng.random()), unit * 0.0018 * (1 + near)
        glints.append([(x - dx, y), (x - dx / 2, y - dy), (x + dx / 2, y - dy), (x + dx, y), (x, y + dy)])
    drawing.tint(scene.canvas, scene.light, (0, top), drawing.stencil((width, depth), (0, top), glints, 150))


def _paint_ridge(scene: _Scene, crest: drawing.Shape, trees: list[drawing.Shape], near: float) -> None:
    """Paints a layer of land: the farther, the hazier, and hazier still in its valleys."""
    width, height = scene.canvas.size
    haze = scene.sky[-1]
    colour = drawing.mix(haze, scene.land, 0.25 + 0.75 * near)
    top = max(0, math.floor(min(y for shape in [crest, *trees] for _, y in shape)))
    low = min(height, max(top + 1, math.ceil(max(y for _, y in crest))))
    if "winter" in scene.cues:  # dark trees on white ground
        drawing.tint(scene.canvas, colour, (0, top), drawing.stencil((width, low - top), (0, top), trees))
        colour, trees = drawing.mix(drawing.mix(haze, scene.land, 0.45), drawing.mix(haze, scene.light, 0.6), near), []
    fill = drawing.gradient([colour, drawing.mix(colour, haze, 0.5 * (1 - near))], (1, height - top))
    # Only the crest has an edge to smooth; below its lowest point the layer is solid.
    mask = drawing.stencil((width, low - top), (0, top), [[*crest, (width, low), (0, low)], *trees])
    scene.canvas.paste(fill.crop((0, 0, 1, low - top)).resize(mask.size, Image.Resampling.NEAREST), (0, top), mask)
    if low < height:
        rest = fill.crop((0, low - top, 1, height - top))
        scene.canvas.paste(rest.resize((width, height - low), Image.Resampling.NEAREST), (0, low))


def _trees(rng: random.Random, crest: drawing.Shape, size: float) -> list[drawing.Shape]:
    trees = []
    branch = (0.018, 0), (0.05, 0.2)
    x = 0.0
    while x < crest[-1][0]:
        foot = crest[int(x / crest[-1][0] * 256)][1] + size * 0.05
        tall = size * rng.uniform(0.5, 1)
        right = [(0, 1.05), *((tier * dx, 1.17 - tier * 0.17 - dy) for tier in range(1, 6) for dx, dy in branch)]
        outline = right + [(-dx, dy) for dx, dy in reversed(right)]
        trees.append([(x + dx * tall, foot - dy * tall) for dx, dy in outline])
        x += size * rng.choice([0.15, 0.2, 0.25, 0.35, 0.5, 1.2])
    return trees


def _place(scene: _Scene, name: str, foot: drawing.Point, size: float) -> None:
    """Sets a silhouette with its foot at a point."""
    side = math.ceil(size * 2) + 2
    left, top = math.floor(foot[0] - side / 2), math.floor(foot[1] - size * 1.2)
    shapes = [[point.split(",") for point in shape.split()] for shape in _FIGURES[name].split("/")]
    scaled = [[(foot[0] + int(x) / 100 * size, foot[1] - int(y) / 100 * size) for x, y in shape] for shape in shapes]
    colour = drawing.mix(scene.sky[-1], scene.land, 0.8)
    drawing.tint(scene.canvas, colour, (left, top), drawing.stencil((side, side), (left, top), scaled))


def _paint_air(scene: _Scene) -> None:
    """Paints what is in the air: rain, snow, petals, leaves, embers or birds."""
    rng, unit = scene.rng, scene.unit
    for colour in [_SPECKS[cue] for cue in _SPECKS if cue in scene.cues]:
        specks = [drawing.glow(unit * share, 255) for share in (0.007, 0.01, 0.014, 0.022)]
        _scatter(scene, specks, [drawing.colour(colour)], 90, scene.canvas.height)
    if "rain" in scene.cues:
        size = max(2, round(unit * 0.012)), max(4, round(unit * 0.06))
        streak = drawing.stencil(size, (0, 0), [[(size[0], 0), (size[0] - 1, 0), (0, size[1]), (0.5, size[1])]], 110)
        # Streaks both lighter and darker than the sky show on every palette.
        _scatter(scene, [streak] * 4, [scene.light, scene.sky[0]], 270, scene.canvas.height)
    elif not scene.night:
        x, y = scene.canvas.width - scene.sun[0], scene.horizon * rng.uniform(0.35, 0.7)
        for _ in range(rng.randint(3, 8)):
            spot = x + rng.gauss(0, unit * 0.05), y + rng.gauss(0, unit * 0.03)
            _place(scene, "bird", spot, unit * rng.uniform(0.008, 0.016))


def _scatter(scene: _Scene, masks: list[Image.Image], colours: list[drawing.Colour], count: int, depth: float) -> None:
    """Strews marks over the picture down to a depth, more of the first of the four masks than of the last."""
    rng, width = scene.rng, scene.canvas.width
    area = width * depth
    for _ in range(round(min(count * area / scene.unit**2, count * 4, area / 64))):
        mask = rng.choices(masks, (6, 5, 3, 1))[0]
        drawing.stamp(scene.canvas, mask, rng.choice(colours), (rng.uniform(0, width), depth * rng.random()))
