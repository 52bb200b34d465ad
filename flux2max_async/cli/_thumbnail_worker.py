"""The program that creates thumbnails, in a process of its own: what a hostile image does to a decoder stays there.

It reads the paths of images from standard input, each as a line of JSON. For each it writes a thumbnail to standard
output: the length as four bytes, and a JPEG, which is empty if the image can't be decoded. An empty one comes first,
when the program is ready. It ends with its input. It is started by its path, and imports nothing else of the package.
"""

import faulthandler
import io
import json
import os
import signal
import sys
from pathlib import Path
from typing import BinaryIO

from PIL import Image

SIDE = 360
"""The length of a thumbnail's longer side in pixels."""
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "AVIF")
"""The formats that are opened: Pillow has others, and runs Ghostscript for one of them."""
_MAX_PIXELS = 20_000_000
"""The size above which an image is not decoded. Those of the service have at most a fifth of it; a decoder needs up to
350 MB for it."""
_TIME_LIMIT = 10.0
"""Seconds for one image, which takes some hundredths of a second."""


def create_thumbnail(path: Path) -> bytes:
    """Return a smaller JPEG of an image; transparent pixels become white.

    Its comment names the size of the image in pixels, and the size and modification time of its file.
    """
    with path.open("rb") as file, Image.open(file, formats=_FORMATS) as image:
        status = os.fstat(file.fileno())
        comment = f"flux2max {image.width}x{image.height} {status.st_size} {status.st_mtime_ns}"
        # A gap of 1.0 decodes a JPEG in a reduced size, and averages other pixels, except 16 bits of grey, beforehand.
        image.thumbnail((SIDE, SIDE), reducing_gap=None if image.mode.startswith("I;16") else 1.0)
        if image.mode in {"RGBA", "LA", "PA"} or "transparency" in image.info:
            thumbnail = Image.new("RGB", image.size, "white")
            transparent = image.convert("RGBA")
            thumbnail.paste(transparent, mask=transparent)
        else:
            thumbnail = image.convert("RGB")
        output = io.BytesIO()
        thumbnail.save(output, "JPEG", quality=80, optimize=True, comment=comment)
        return output.getvalue()


def serve(requests: BinaryIO, replies: BinaryIO) -> None:
    """Write a thumbnail for each path, until there are no more."""
    thumbnail = b""
    while True:
        replies.write(len(thumbnail).to_bytes(4) + thumbnail)
        replies.flush()
        if not (line := requests.readline()):
            return
        # Ends the process if a decoder takes too long, also if the process that started it has ended.
        faulthandler.dump_traceback_later(_TIME_LIMIT, exit=True)
        try:
            thumbnail = create_thumbnail(Path(json.loads(line)))
        except Exception:  # noqa: BLE001 - Pillow raises many exception types for broken files
            thumbnail = b""
        faulthandler.cancel_dump_traceback_later()


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that has started this one
    Image.MAX_IMAGE_PIXELS = _MAX_PIXELS // 2  # Pillow warns from this size on, and refuses twice of it
    serve(sys.stdin.buffer, sys.stdout.buffer)
