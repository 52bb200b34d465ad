"""The caption of a picture: its prompt, written with the few letters that Pillow's own font has."""

import math
import textwrap
import unicodedata

from PIL import Image, ImageDraw, ImageFont

from flux2max_async.emulator._images import drawing

# The bundled font has the letters of English only; spelled like this, most of Latin script can be written with it.
_LETTERS = {*map(chr, range(0x20, 0x7F)), *"©«°±´·»‘’“”…‹›™"}  # noqa: RUF001  # these very signs are in the font
_SPELLINGS = {"ß": "ss", "æ": "ae", "Æ": "AE", "œ": "oe", "Œ": "OE", "ø": "o", "Ø": "O", "\u2013": "-", "\u2014": "-"}
_ACCENTS = dict(zip("\u0300\u0301\u0302\u0303\u0308\u030a", ("`", "\u00b4", "^", "~", "··", "°"), strict=True))


def write_caption(canvas: Image.Image, land: drawing.Colour, prompt: str) -> int:
    """Write the prompt along the bottom and give the height that is left free above it."""
    width, height = canvas.size
    text = _legible(prompt[:1200])
    if min(width, height) < 160 or not text:
        return round(height * 0.97)
    size = max(11.0, min(0.03 * math.sqrt(width * height), 0.07 * min(width, height)))
    font = ImageFont.load_default(size)
    assert isinstance(font, ImageFont.FreeTypeFont)
    lines = _wrap(text, font, width - 3 * size)
    top = round(height - size * (1.4 * len(lines) + 0.9))
    fade = round(size * 3)
    shade = Image.new("L", (width, height - top + fade), 200)
    shade.paste(drawing.gradient([(0,), (30,), (110,), (180,), (200,)], (width, fade)))
    drawing.tint(canvas, drawing.mix(land, (0, 0, 0), 0.5), (0, top - fade), shade)
    pen = ImageDraw.Draw(canvas)
    for row, line in enumerate(lines):
        _write_line(pen, line, font, (width - font.getlength(_plain(line))) / 2, top + row * size * 1.4)
    return round(top - size)


def _legible(prompt: str) -> str:
    """Leave out what the bundled font has no letters for, such as Chinese and emoji, rather than draw boxes."""
    chars = unicodedata.normalize("NFC", " ".join(prompt.split()))
    return " ".join("".join(char for char in chars if _LETTERS.issuperset(_spell(char)[0])).split())


def _spell(char: str) -> tuple[str, str]:
    """Give the letters, and the accent above them, with which the bundled font can write a character."""
    parts = unicodedata.normalize("NFD", char)
    return _SPELLINGS.get(char, parts[0]), _ACCENTS.get(parts[1:], "")


def _plain(text: str) -> str:
    return "".join(_spell(char)[0] for char in text)


def _wrap(text: str, font: ImageFont.FreeTypeFont, room: float) -> list[str]:
    columns = max(9, round(len(text) * room / font.getlength(_plain(text)) * 1.2))
    lines = [text]
    while columns > 8 and max(font.getlength(_plain(line)) for line in lines) > room:
        lines = textwrap.wrap(text, columns, max_lines=3, placeholder="…")
        columns -= 1
    return lines


def _write_line(pen: ImageDraw.ImageDraw, line: str, font: ImageFont.FreeTypeFont, left: float, top: float) -> None:
    pen.text((left, top), _plain(line), "white", font)
    for place, (letter, accent) in enumerate(map(_spell, line)):
        if accent:
            below, mark = _ink(letter, font), _ink(accent, font)
            x = left + font.getlength(_plain(line[:place])) + (below[0] + below[2] - mark[0] - mark[2]) / 2
            pen.text((x, top + below[1] - mark[3] - font.size * 0.06), accent, "white", font)


def _ink(text: str, font: ImageFont.FreeTypeFont) -> tuple[int, int, int, int]:
    paper = Image.new("L", (math.ceil(font.size * 2), math.ceil(font.size * 2)))
    ImageDraw.Draw(paper).text((0, 0), text, "white", font)
    return paper.getbbox() or (0, 0, 0, 0)
