"""Image formats: which one bytes have, and whether they are the whole image. Pure functions of the bytes.

An image is whole if its structure reaches its end; whatever follows the end is ignored.
"""

import re
from collections.abc import Callable
from pathlib import Path

HEAD_BYTES = 64
"""How many of the first bytes determine the format."""
_TAIL_BYTES = 12

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PNG_END = b"\0\0\0\0IEND\xaeB`\x82"
# In a scan, FF is followed by 00 if it is data, by D0 to D7 if it is a restart marker, and by FF if it is padding.
_JPEG_MARKER = re.compile(rb"\xff([^\x00\xd0-\xd7\xff])")
_JPEG_SCAN, _JPEG_END = 0xDA, 0xD9
_GIF_EXTENSION, _GIF_IMAGE, _GIF_END = 0x21, 0x2C, 0x3B


def detect_format(head: bytes) -> str | None:
    """Return "jpeg", "png", "webp", "gif" or "avif", which is also the file's suffix; None for anything else.

    Args:
        head: The first `HEAD_BYTES` of a file.
    """
    if head.startswith(b"\xff\xd8\xff"):
        return "jpeg"
    if head.startswith(_PNG_SIGNATURE):
        return "png"
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "webp"
    if head.startswith((b"GIF87a", b"GIF89a")):
        return "gif"
    if head[4:8] == b"ftyp":
        box = head[8 : int.from_bytes(head[:4])]
        brands = {box[:4], *(box[start : start + 4] for start in range(8, len(box), 4))}
        return "avif" if brands & {b"avif", b"avis"} else None
    return None


def is_whole(data: bytes) -> bool:
    """Return whether bytes are an image up to its end."""
    image_format = detect_format(data[:HEAD_BYTES])
    return image_format is not None and _READERS[image_format](data)


def is_whole_file(path: Path) -> bool:
    """Return whether a file is an image up to its end. Reads all of it only if it doesn't end as images normally do."""
    with path.open("rb") as file:
        head = file.read(HEAD_BYTES)
        size = file.seek(0, 2)
        file.seek(max(0, size - _TAIL_BYTES))
        if _has_usual_end(detect_format(head), head, file.read(), size):
            return True
        file.seek(0)
        return is_whole(file.read())


def _has_usual_end(image_format: str | None, head: bytes, tail: bytes, size: int) -> bool:
    match image_format:
        case "jpeg":
            return tail.endswith(b"\xff\xd9")
        case "png":
            return tail == _PNG_END
        case "gif":
            return tail.endswith(b"\0\x3b")
        case "webp":
            return _is_whole_webp_of(head, size)
        case _:
            return False


def _is_whole_jpeg(data: bytes) -> bool:
    """Walk the segments: the thumbnail inside one of them has an end marker, too."""
    position, has_scan = 2, False
    while marker := _JPEG_MARKER.search(data, position):
        code, position = marker[1][0], marker.end()
        if code == _JPEG_END:
            return has_scan
        has_scan = has_scan or code == _JPEG_SCAN
        position += int.from_bytes(data[position : position + 2])
    return False


def _is_whole_png(data: bytes) -> bool:
    position = len(_PNG_SIGNATURE)
    while position + 12 <= len(data):
        kind = data[position + 4 : position + 8]
        position += 12 + int.from_bytes(data[position : position + 4])
        if kind == b"IEND":
            return position <= len(data)
    return False


def _is_whole_webp(data: bytes) -> bool:
    return _is_whole_webp_of(data, len(data))


def _is_whole_webp_of(head: bytes, size: int) -> bool:
    return 8 + int.from_bytes(head[4:8], "little") <= size


def _is_whole_gif(data: bytes) -> bool:
    position, has_image = 6, False
    position += 7 + _gif_color_table_bytes(data[10:11])
    while position < len(data):
        match data[position]:
            case code if code == _GIF_END:
                return has_image
            case code if code == _GIF_EXTENSION:
                position += 2
            case code if code == _GIF_IMAGE:
                has_image = True
                position += 11 + _gif_color_table_bytes(data[position + 9 : position + 10])
            case _:
                return False
        # Blocks of data follow, each with its length before it; one of length 0 is the last.
        while position < len(data) and data[position]:
            position += 1 + data[position]
        position += 1
    return False


def _gif_color_table_bytes(flags: bytes) -> int:
    value = int.from_bytes(flags)
    return 3 * 2 ** (1 + value % 8) if value & 0x80 else 0


def _is_whole_avif(data: bytes) -> bool:
    """Walk the boxes up to the end of the file, or to bytes that are no box; the pixels are in `mdat`."""
    position, has_pixels = 0, False
    while len(data) - position >= 8:
        size, kind = int.from_bytes(data[position : position + 4]), data[position + 4 : position + 8]
        if not kind.isalnum():
            break
        if size == 0:  # up to the end of the file
            return has_pixels or kind == b"mdat"
        if size == 1:
            size = int.from_bytes(data[position + 8 : position + 16])
        if size < 8 or size > len(data) - position:
            return False
        has_pixels = has_pixels or kind == b"mdat"
        position += size
    return has_pixels


_READERS: dict[str, Callable[[bytes], bool]] = {
    "jpeg": _is_whole_jpeg,
    "png": _is_whole_png,
    "webp": _is_whole_webp,
    "gif": _is_whole_gif,
    "avif": _is_whole_avif,
}
