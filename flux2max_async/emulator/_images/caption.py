"""The caption of an image: its prompt, written in the characters that Pillow's bundled font supports."""

import math
import textwrap
import unicodedata

from PIL import Image, ImageDraw, ImageFont

from flux2max_async.emulator._images import drawing

_MAX_CAPTION_LENGTH = 1200
_MIN_SIDE = 160
"""Smaller images get no caption."""

# The bundled font covers ASCII and a few symbols. Most of Latin script can be written with it when ligatures are
# replaced, and accents are drawn above their letters.
_GLYPHS = {*map(chr, range(0x20, 0x7F)), *"©«°±´·»‘’“”…‹›™"}  # noqa: RUF001  # these characters are meant
_REPLACEMENTS = {
    "ß": "ss",
    "æ": "ae",
    "Æ": "AE",
    "œ": "oe",
    "Œ": "OE",
    "ø": "o",
    "Ø": "O",
    "\u2013": "-",
    "\u2014": "-",
}
_ACCENTS = dict(zip("\u0300\u0301\u0302\u0303\u0308\u030a", ("`", "\u00b4", "^", "~", "··", "°"), strict=True))


def write_caption(canvas: Image.Image, background: drawing.Colour, prompt: str) -> int:
    """Write the prompt along the bottom, and return the y coordinate above which the image stays free."""
    width, height = canvas.size
    text = _supported_text(prompt[:_MAX_CAPTION_LENGTH])
    if min(width, height) < _MIN_SIDE or not text:
        return round(height * 0.97)
    size = max(11.0, min(0.03 * math.sqrt(width * height), 0.07 * min(width, height)))
    font = ImageFont.load_default(size)
    assert isinstance(font, ImageFont.FreeTypeFont)
    lines = _wrap(text, font, width - 3 * size)
    top = round(height - size * (1.4 * len(lines) + 0.9))
    fade = round(size * 3)
    shade = Image.new("L", (width, height - top + fade), 200)
    shade.paste(drawing.gradient([(0,), (30,), (110,), (180,), (200,)], (width, fade)))
    drawing.tint(canvas, drawing.mix(background, (0, 0, 0), 0.5), (0, top - fade), shade)
    pen = ImageDraw.Draw(canvas)
    for row, line in enumerate(lines):
        _write_line(pen, line, font, (width - font.getlength(_without_accents(line))) / 2, top + row * size * 1.4)
    return round(top - size)


def _supported_text(prompt: str) -> str:
    """Remove the characters that the font lacks, such as Chinese and emoji, which would appear as boxes."""
    chars = unicodedata.normalize("NFC", " ".join(prompt.split()))
    return " ".join("".join(char for char in chars if _GLYPHS.issuperset(_decompose(char)[0])).split())


def _decompose(char: str) -> tuple[str, str]:
    """Split a character into the letters that the font has and the accent above them."""
    parts = unicodedata.normalize("NFD", char)
    return _REPLACEMENTS.get(char, parts[0]), _ACCENTS.get(parts[1:], "")


def _without_accents(text: str) -> str:
    return "".join(_decompose(char)[0] for char in text)


def _wrap(text: str, font: ImageFont.FreeTypeFont, max_width: float) -> list[str]:
    columns = max(9, round(len(text) * max_width / font.getlength(_without_accents(text)) * 1.2))
    lines = [text]
    while columns > 8 and max(font.getlength(_without_accents(line)) for line in lines) > max_width:
        lines = textwrap.wrap(text, columns, max_lines=3, placeholder="…")
        columns -= 1
    return lines


def _write_line(pen: ImageDraw.ImageDraw, line: str, font: ImageFont.FreeTypeFont, left: float, top: float) -> None:
    pen.text((left, top), _without_accents(line), "white", font)
    for index, (letter, accent) in enumerate(map(_decompose, line)):
        if accent:
            letter_box, accent_box = _glyph_box(letter, font), _glyph_box(accent, font)
            offset = (letter_box[0] + letter_box[2] - accent_box[0] - accent_box[2]) / 2
            x = left + font.getlength(_without_accents(line[:index])) + offset
            pen.text((x, top + letter_box[1] - accent_box[3] - font.size * 0.06), accent, "white", font)


def _glyph_box(text: str, font: ImageFont.FreeTypeFont) -> tuple[int, int, int, int]:
    """Return the bounding box (left, top, right, bottom) of the pixels that a text covers."""
    image = Image.new("L", (math.ceil(font.size * 2), math.ceil(font.size * 2)))
    ImageDraw.Draw(image).text((0, 0), text, "white", font)
    return image.getbbox() or (0, 0, 0, 0)
