"""Image formats: which one bytes have, and whether they are the whole image.

An image is whole if its structure reaches its end; whatever follows the end is ignored.
"""

import re
from collections.abc import Callable, Generator
from pathlib import Path

import attrs

HEAD_BYTES = 64
"""How many of the first bytes determine the format."""
_TAIL_BYTES = 12
_CHUNK_BYTES = 1 << 20
FORMATS_BY_SUFFIX = {
    ".jpeg": "jpeg",
    ".jpg": "jpeg",
    ".png": "png",
    ".webp": "webp",
    ".gif": "gif",
    ".avif": "avif",
}

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
    structure = ImageStructure()
    structure.feed(data)
    return structure.is_whole


def is_whole_file(path: Path) -> bool:
    """Return whether a file is an image up to its end. Reads all of it only if it doesn't end as images normally do."""
    with path.open("rb") as file:
        head = file.read(HEAD_BYTES)
        size = file.seek(0, 2)
        file.seek(max(0, size - _TAIL_BYTES))
        if _has_usual_end(detect_format(head), head, file.read(), size):
            return True
        file.seek(0)
        structure = ImageStructure()
        while chunk := file.read(_CHUNK_BYTES):
            structure.feed(chunk)
        return structure.is_whole


def _has_usual_end(image_format: str | None, head: bytes, tail: bytes, size: int) -> bool:
    match image_format:
        case "jpeg":
            return tail.endswith(b"\xff\xd9")
        case "png":
            return tail == _PNG_END
        case "gif":
            return tail.endswith(b"\0\x3b")
        case "webp":
            return 8 + int.from_bytes(head[4:8], "little") <= size
        case _:
            return False


class ImageStructure:
    """Reads the structure of an image whose bytes come one after another; it keeps next to none of them."""

    def __init__(self) -> None:
        self.is_whole = False
        """Whether the image is whole if nothing follows."""
        self._bytes = _Bytes()
        self._reader: Generator[bool, None, bool] | None = None
        self._has_ended = False

    def feed(self, data: bytes) -> None:
        """Read further bytes."""
        if self._has_ended:
            return
        self._bytes.data += data
        if self._reader is None:
            head = bytes(self._bytes.data[:HEAD_BYTES])
            image_format = detect_format(head)
            if image_format is None:
                self._has_ended = len(head) == HEAD_BYTES
                return
            self._reader = _READERS[image_format](self._bytes)
        try:
            self.is_whole = next(self._reader)
        except StopIteration as end:
            self.is_whole, self._has_ended = end.value, True


@attrs.define(eq=False)
class _Bytes:
    """The bytes of an image that are not read yet.

    Its generators yield if further bytes are needed: whether the image is whole if none follow.
    """

    data: bytearray = attrs.field(factory=bytearray)

    def take(self, count: int, *, is_whole: bool = False) -> Generator[bool, None, bytes]:
        """Return the next bytes."""
        while len(self.data) < count:
            yield is_whole
        taken = bytes(self.data[:count])
        del self.data[:count]
        return taken

    def take_int(self, count: int) -> Generator[bool, None, int]:
        """Return the next bytes as a number."""
        return int.from_bytes((yield from self.take(count)))

    def skip(self, count: int) -> Generator[bool, None, None]:
        """Leave out bytes."""
        while len(self.data) < count:
            count -= len(self.data)
            self.data.clear()
            yield False
        del self.data[:count]

    def find(self, pattern: re.Pattern[bytes]) -> Generator[bool, None, int]:
        """Return the last byte of the next match, which has two."""
        while (match := pattern.search(self.data)) is None:
            del self.data[:-1]
            yield False
        code = match[1][0]
        del self.data[: match.end()]
        return code


def _read_jpeg(image: _Bytes) -> Generator[bool, None, bool]:
    """Read the segments: the thumbnail inside one of them has an end marker, too."""
    yield from image.skip(2)
    has_scan = False
    while (code := (yield from image.find(_JPEG_MARKER))) != _JPEG_END:
        has_scan = has_scan or code == _JPEG_SCAN
        length = yield from image.take_int(2)
        yield from image.skip(max(0, length - 2))
    return has_scan


def _read_png(image: _Bytes) -> Generator[bool, None, bool]:
    yield from image.skip(len(_PNG_SIGNATURE))
    kind = b""
    while kind != b"IEND":
        length = yield from image.take_int(4)
        kind = yield from image.take(4)
        yield from image.skip(length + 4)
    return True


def _read_webp(image: _Bytes) -> Generator[bool, None, bool]:
    head = yield from image.take(8)
    yield from image.skip(int.from_bytes(head[4:], "little"))
    return True


def _read_gif(image: _Bytes) -> Generator[bool, None, bool]:
    head = yield from image.take(13)
    yield from image.skip(_gif_color_table_bytes(head[10]))
    has_image = False
    while (code := (yield from image.take_int(1))) != _GIF_END:
        match code:
            case code if code == _GIF_EXTENSION:
                yield from image.skip(1)
            case code if code == _GIF_IMAGE:
                has_image = True
                descriptor = yield from image.take(9)
                yield from image.skip(_gif_color_table_bytes(descriptor[8]) + 1)
            case _:
                return False
        # Blocks of data follow, each with its length before it; one of length 0 is the last.
        while length := (yield from image.take_int(1)):
            yield from image.skip(length)
    return has_image


def _gif_color_table_bytes(flags: int) -> int:
    return 3 * 2 ** (1 + flags % 8) if flags & 0x80 else 0


def _read_avif(image: _Bytes) -> Generator[bool, None, bool]:
    """Read the boxes up to the end of the file, or to bytes that are no box; the pixels are in `mdat`."""
    has_pixels = False
    while True:
        head = yield from image.take(8, is_whole=has_pixels)
        size, kind = int.from_bytes(head[:4]), head[4:]
        if not kind.isalnum():
            return has_pixels
        if size == 0:  # up to the end of the file
            return has_pixels or kind == b"mdat"
        rest = size - 8
        if size == 1:
            rest = (yield from image.take_int(8)) - 16
        if rest < 0:
            return False
        yield from image.skip(rest)
        has_pixels = has_pixels or kind == b"mdat"


_READERS: dict[str, Callable[[_Bytes], Generator[bool, None, bool]]] = {
    "jpeg": _read_jpeg,
    "png": _read_png,
    "webp": _read_webp,
    "gif": _read_gif,
    "avif": _read_avif,
}
