"""Draws the images that the emulator serves: a landscape that depends on the prompt and the seed."""

import io
import math
import random
from collections.abc import Sequence
from itertools import pairwise, product

from PIL import Image, ImageChops, ImageDraw, ImageOps

from flux2max_async.emulator._images import drawing
from flux2max_async.emulator._images.caption import write_caption
from flux2max_async.emulator._images.input_images import paste_thumbnails
from flux2max_async.emulator._images.planning import Scene, plan_scene

_LAMP_COLOUR = (255, 218, 145)

# The snow, petals, leaves and embers in the air.
_PARTICLE_COLOURS = {"winter": "ffffff", "spring": "f59ab8", "autumn": "e8752a", "fire": "ffb347"}

# Polygons "x,y x,y .../x,y ..." of figures that stand at 0,0 and are 100 tall.
_SILHOUETTES = {
    "lighthouse": "-10,-10 -6,72 6,72 10,-10/-9,72 -9,75 9,75 9,72/-4,75 -4,87 4,87 4,75/-7,87 -3,94 0,100 3,94 7,87",
    "boat": "-45,13 -32,0 32,0 47,14/0,17 3,55 0,100 22,60 40,19/-4,19 -4,92 -20,50 -38,20",
    "camel": "-40,40 -30,60 -18,66 -8,84 2,86 12,66 24,62 33,70 36,90 44,96 57,88 55,82 44,80 41,62 32,46 20,38 -20,40"
    " -34,36/-38,-4 -37,45 -27,45 -33,-4/-24,-4 -30,45 -20,45 -19,-4/12,-4 14,45 23,45 17,-4/26,-4 20,45 31,48 31,-4",
    "bird": "95,25 55,50 0,5 -55,50 -95,25 -50,30 0,-5 50,30",
}


def draw(
    prompt: str, *, seed: int, width: int, height: int, output_format: str, input_images: Sequence[bytes] = ()
) -> bytes:
    """Draw a landscape with the prompt as its caption, and return the encoded "jpeg" or "png" file.

    The same arguments always produce the same bytes.

    Raises:
        ValueError: An input image cannot be decoded.
    """
    scene = plan_scene(prompt, seed, width, height)
    _paint_sky(scene)
    (_paint_shore if "shore" in scene.tags else _paint_hills)(scene)
    _paint_air(scene)
    caption_top = write_caption(scene.canvas, scene.land, prompt)
    paste_thumbnails(scene.canvas, scene.rng, scene.unit, input_images, caption_top)
    file = io.BytesIO()
    # `quality` applies to JPEG, `compress_level` to PNG, which is slow at higher levels.
    scene.canvas.save(file, output_format, quality=90, compress_level=1)
    return file.getvalue()


def _paint_sky(scene: Scene) -> None:
    width, height = scene.canvas.size
    # Everything but the stars and the sun is soft, so it is painted small and scaled up, which is much faster.
    scale = min(1.0, 256 / max(width, height))
    size = max(8, round(width * scale)), max(8, round(height * scale))
    horizon = max(4, round(scene.horizon * scale))
    sky = Image.new("RGB", size, scene.sky[-1])
    sky.paste(drawing.gradient([*scene.sky, scene.sky[-1]], (size[0], horizon)))
    (_paint_aurora if "aurora" in scene.tags else _paint_clouds)(sky, scene, horizon)
    glow = drawing.glow(scene.unit * scale * (1.1 if scene.night else 1.6), 110 if scene.night else 235)
    drawing.stamp(sky, glow, scene.light, (scene.sun[0] * scale, scene.sun[1] * scale))
    vignette = Image.radial_gradient("L").point([round(110 * (level / 255) ** 3) for level in range(256)])
    drawing.tint(sky, (8, 8, 20), (0, 0), vignette.resize(size))
    # Skip what land or water will cover.
    visible_height = math.ceil(scene.horizon + (height - scene.horizon) * (0 if "shore" in scene.tags else 0.5))
    visible_box = 0, 0, size[0], size[1] * visible_height / height
    visible_sky = sky.resize((width, visible_height), Image.Resampling.BILINEAR, visible_box)
    scene.canvas.paste(scene.sky[-1], (0, 0, width, height))
    scene.canvas.paste(_add_grain(visible_sky, scene.rng))
    if scene.night:
        stars = [drawing.glow(scene.unit * share, 255) for share in (0.003, 0.004, 0.006, 0.011)]
        _scatter(scene, stars, [scene.light], 140, scene.horizon)
    if scene.tags.isdisjoint({"rain", "aurora"}):
        _paint_sun(scene)


def _paint_clouds(sky: Image.Image, scene: Scene, horizon: int) -> None:
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


def _paint_aurora(sky: Image.Image, scene: Scene, horizon: int) -> None:
    rng, size = scene.rng, (sky.width, horizon)
    for _ in range(2):
        length = max(2, round(horizon * rng.uniform(0.45, 0.7)))
        bottom = horizon * rng.uniform(0.6, 0.85)
        curtain = Image.new("L", size)
        strip = drawing.gradient([(0,), (20,), (70,), (160,), (0,)], (1, length))
        for x, offset in enumerate(drawing.smooth_heights(rng, rng.uniform(1, 2), sky.width)):
            curtain.paste(strip, (x, round(bottom + offset * horizon * 0.13) - length))
        rays = Image.frombytes("L", (40, 1), rng.randbytes(40)).point([90 + level * 165 // 255 for level in range(256)])
        curtain = ImageChops.multiply(curtain, rays.resize(size, Image.Resampling.BICUBIC))
        sky.paste(drawing.gradient([(120, 70, 200), (60, 200, 170), (90, 255, 170)], size), (0, 0), curtain)


def _add_grain(image: Image.Image, rng: random.Random) -> Image.Image:
    """Add noise of a few levels, which hides the bands of a slow gradient."""
    tile = Image.frombytes("L", (128, 128), rng.randbytes(128 * 128)).point([level // 86 for level in range(256)])
    tile = tile.convert("RGB")
    grain = Image.new("RGB", image.size)
    for position in product(range(0, image.width, 128), range(0, image.height, 128)):
        grain.paste(tile, position)
    return ImageChops.add(image, grain, 1, -1)


def _paint_sun(scene: Scene) -> None:
    side = round(scene.unit * scene.rng.uniform(0.08, 0.14)) + 2
    disc = Image.radial_gradient("L").point([max(0, min(255, (174 - level) * 64)) for level in range(256)])
    disc = disc.resize((side, side))
    if scene.night and scene.rng.random() < 0.5:  # a crescent moon
        shadow = Image.new("L", disc.size)
        shadow.paste(disc, (side // 4, -side // 8))
        disc = ImageChops.subtract(disc, shadow)
    drawing.stamp(scene.canvas, disc, scene.light, scene.sun)


def _paint_hills(scene: Scene) -> None:
    rng, unit = scene.rng, scene.unit
    width, height = scene.canvas.size
    for layer in range(5):
        nearness = layer / 4
        if "desert" in scene.tags:
            heights = [0.7 - 2 * abs(level) for level in drawing.smooth_heights(rng, width / unit * 0.7)]
        elif layer < 2:
            heights = drawing.jagged_heights(rng, width / unit * 4)
        else:
            heights = drawing.smooth_heights(rng, width / unit)
        base = scene.horizon + (height - scene.horizon) * (0.1 + 0.6 * nearness)
        ridge = drawing.ridge_line(width, base, min(unit, height) * (0.1 - 0.05 * nearness), heights)
        trees = _grow_trees(rng, ridge, unit * (0.03 + 0.08 * nearness)) if "forest" in scene.tags and layer else []
        _paint_ridge(scene, ridge, trees, nearness)
        if "desert" in scene.tags:
            _shade_dunes(scene, ridge)
        if layer == 2 and "camel" in scene.tags:
            for position in ridge[95:165:18]:
                _paint_figure(scene, "camel", position, unit * 0.06)


def _shade_dunes(scene: Scene, ridge: drawing.Polygon) -> None:
    """Darken the sides of the dunes that are turned away from the sun."""
    width = scene.canvas.width
    upper_edge = ridge if scene.sun[0] < width / 2 else ridge[::-1]
    depth, lower_edge = 0.0, [upper_edge[0]]
    for (_, previous), (x, y) in pairwise(upper_edge):
        depth = depth + y - previous if y > previous else depth * 0.9
        lower_edge.append((x, y + depth))
    shade = upper_edge + lower_edge[::-1]
    top, bottom = math.floor(min(y for _, y in shade)), math.ceil(max(y for _, y in shade))
    mask = drawing.polygon_mask((width, bottom - top), (0, top), [shade], 60)
    drawing.tint(scene.canvas, scene.land, (0, top), mask)


def _paint_shore(scene: Scene) -> None:
    rng, unit = scene.rng, scene.unit
    width, height = scene.canvas.size
    for layer in range(2):
        heights = [max(-0.02, level + 0.3) for level in drawing.jagged_heights(rng, width / unit * 4)]
        ridge = drawing.ridge_line(width, scene.horizon, unit * (0.1 - 0.05 * layer), heights)
        _paint_ridge(scene, ridge, [], 0.1 + 0.25 * layer)
    if "city" in scene.tags:
        _paint_skyline(scene)
    _paint_water(scene)
    side = rng.choice([-1, 1])
    if "boat" in scene.tags:
        _paint_figure(scene, "boat", (width * (0.5 - side * 0.2), scene.horizon * 0.7 + height * 0.3), unit * 0.16)
    heights = [level + side * (x / 32 - 4) for x, level in enumerate(drawing.smooth_heights(rng, width / unit))]
    ridge = drawing.ridge_line(width, height - unit * 0.08, unit * 0.03, heights)
    if "lighthouse" in scene.tags:
        x, y = ridge[128 + side * 75]
        _paint_figure(scene, "lighthouse", (x, y), unit * 0.36)
        drawing.stamp(scene.canvas, drawing.glow(unit * 0.25, 255), _LAMP_COLOUR, (x, y - unit * 0.29))
    _paint_ridge(scene, ridge, _grow_trees(rng, ridge, unit * 0.08), 1)


def _paint_skyline(scene: Scene) -> None:
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
                    lamp = drawing.mix(wall, _LAMP_COLOUR, rng.uniform(0.3, 0.9))
                    pen.rectangle((x, y, x + pitch * 0.35, y + pitch * 0.4), lamp)
            left += columns * pitch * rng.choice([0.9, 1, 1.1, 1.4])


def _paint_water(scene: Scene) -> None:
    rng, unit = scene.rng, scene.unit
    width, height = scene.canvas.size
    top = round(scene.horizon)
    depth = height - top
    # Reducing and enlarging the reflection horizontally smears it like ripples.
    reflection = ImageOps.flip(scene.canvas.crop((0, max(0, top - depth), width, top))).reduce((16, 1))
    reflection = reflection.resize((reflection.width, depth))
    shade = drawing.gradient([(50,), (100,), (190,)], reflection.size)
    drawing.tint(reflection, drawing.mix(scene.sky[0], scene.land, 0.5), (0, 0), shade)
    scene.canvas.paste(reflection.resize((width, depth), Image.Resampling.BILINEAR), (0, top))
    glints = []
    for _ in range(150):
        nearness = rng.random() ** 1.5
        x, y = scene.sun[0] + rng.gauss(0, 1) * unit * (0.06 + 0.2 * nearness), top + nearness * depth * 0.9 + 1
        dx, dy = unit * (0.005 + 0.045 * nearness * rng.random()), unit * 0.0018 * (1 + nearness)
        glints.append([(x - dx, y), (x - dx / 2, y - dy), (x + dx / 2, y - dy), (x + dx, y), (x, y + dy)])
    drawing.tint(scene.canvas, scene.light, (0, top), drawing.polygon_mask((width, depth), (0, top), glints, 150))


def _paint_ridge(scene: Scene, ridge: drawing.Polygon, trees: list[drawing.Polygon], nearness: float) -> None:
    """Paint a layer of land. Distant layers are hazier, and each layer is haziest in its valleys."""
    width, height = scene.canvas.size
    haze = scene.sky[-1]
    colour = drawing.mix(haze, scene.land, 0.25 + 0.75 * nearness)
    top = max(0, math.floor(min(y for polygon in [ridge, *trees] for _, y in polygon)))
    bottom = min(height, max(top + 1, math.ceil(max(y for _, y in ridge))))
    if "winter" in scene.tags:  # dark trees on white ground
        drawing.tint(scene.canvas, colour, (0, top), drawing.polygon_mask((width, bottom - top), (0, top), trees))
        colour = drawing.mix(drawing.mix(haze, scene.land, 0.45), drawing.mix(haze, scene.light, 0.6), nearness)
        trees = []
    fill = drawing.gradient([colour, drawing.mix(colour, haze, 0.5 * (1 - nearness))], (1, height - top))
    # Only the edge along the ridge needs antialiasing; below its lowest point the layer is solid.
    mask = drawing.polygon_mask((width, bottom - top), (0, top), [[*ridge, (width, bottom), (0, bottom)], *trees])
    scene.canvas.paste(fill.crop((0, 0, 1, bottom - top)).resize(mask.size, Image.Resampling.NEAREST), (0, top), mask)
    if bottom < height:
        fill_below = fill.crop((0, bottom - top, 1, height - top))
        scene.canvas.paste(fill_below.resize((width, height - bottom), Image.Resampling.NEAREST), (0, bottom))


def _grow_trees(rng: random.Random, ridge: drawing.Polygon, size: float) -> list[drawing.Polygon]:
    trees = []
    branch = (0.018, 0), (0.05, 0.2)
    x = 0.0
    while x < ridge[-1][0]:
        base = ridge[int(x / ridge[-1][0] * 256)][1] + size * 0.05
        height = size * rng.uniform(0.5, 1)
        right = [(0, 1.05), *((tier * dx, 1.17 - tier * 0.17 - dy) for tier in range(1, 6) for dx, dy in branch)]
        outline = right + [(-dx, dy) for dx, dy in reversed(right)]
        trees.append([(x + dx * height, base - dy * height) for dx, dy in outline])
        x += size * rng.choice([0.15, 0.2, 0.25, 0.35, 0.5, 1.2])
    return trees


def _paint_figure(scene: Scene, name: str, base: drawing.Point, size: float) -> None:
    """Paint a silhouette that stands on a point."""
    side = math.ceil(size * 2) + 2
    left, top = math.floor(base[0] - side / 2), math.floor(base[1] - size * 1.2)
    polygons = [[point.split(",") for point in polygon.split()] for polygon in _SILHOUETTES[name].split("/")]
    scaled = [
        [(base[0] + int(x) / 100 * size, base[1] - int(y) / 100 * size) for x, y in polygon] for polygon in polygons
    ]
    colour = drawing.mix(scene.sky[-1], scene.land, 0.8)
    drawing.tint(scene.canvas, colour, (left, top), drawing.polygon_mask((side, side), (left, top), scaled))


def _paint_air(scene: Scene) -> None:
    """Paint rain, snow, petals, leaves, embers or birds."""
    rng, unit = scene.rng, scene.unit
    for colour in [_PARTICLE_COLOURS[tag] for tag in _PARTICLE_COLOURS if tag in scene.tags]:
        particles = [drawing.glow(unit * share, 255) for share in (0.007, 0.01, 0.014, 0.022)]
        _scatter(scene, particles, [drawing.parse_colour(colour)], 90, scene.canvas.height)
    if "rain" in scene.tags:
        right, bottom = max(2, round(unit * 0.012)), max(4, round(unit * 0.06))
        outline: drawing.Polygon = [(right, 0), (right - 1, 0), (0, bottom), (0.5, bottom)]
        streak = drawing.polygon_mask((right, bottom), (0, 0), [outline], 110)
        # Some streaks are lighter and some darker than the sky, so that they are visible in every palette.
        _scatter(scene, [streak] * 4, [scene.light, scene.sky[0]], 270, scene.canvas.height)
    elif not scene.night:
        x, y = scene.canvas.width - scene.sun[0], scene.horizon * rng.uniform(0.35, 0.7)
        for _ in range(rng.randint(3, 8)):
            position = x + rng.gauss(0, unit * 0.05), y + rng.gauss(0, unit * 0.03)
            _paint_figure(scene, "bird", position, unit * rng.uniform(0.008, 0.016))


def _scatter(scene: Scene, masks: list[Image.Image], colours: list[drawing.Colour], count: int, depth: float) -> None:
    """Scatter particles from the top down to `depth`; the first of the four masks is the most common."""
    rng, width = scene.rng, scene.canvas.width
    area = width * depth
    for _ in range(round(min(count * area / scene.unit**2, count * 4, area / 64))):
        mask = rng.choices(masks, (6, 5, 3, 1))[0]
        drawing.stamp(scene.canvas, mask, rng.choice(colours), (rng.uniform(0, width), depth * rng.random()))
