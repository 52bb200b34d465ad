"""The gallery: an HTML page with all images of an output folder, and their thumbnails."""

import base64
import hashlib
import io
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from urllib.parse import quote

import attrs
from jinja2 import Environment, FileSystemLoader
from PIL import Image

from flux2max_async.cli._output_dir import WAITING, OutputDir, Row, write_atomically
from flux2max_async.cli._terminal import print_error
from flux2max_async.journal._entry import EntryState

_THUMBNAIL_SIDE = 360
"""The length of a thumbnail's longer side in pixels."""
_IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "AVIF")
"""The formats of images that are opened: Pillow has others, and runs Ghostscript for one of them."""
_IMAGE_NAME = re.compile(
    r"(?!(?:con|prn|aux|nul|(?:com|lpt)[0-9¹²³])[ ]*\.)[\w(+,=@-][\w.()+,=@ -]*\.\w+", re.IGNORECASE
)
"""Matches the names of saved images, and none that leaves the folder or is a device on any operating system."""
_TEMPLATE = "gallery.html"
_STATE_ORDER = [
    *(EntryState.FAILED, EntryState.UNCERTAIN, EntryState.REFUSED),
    *(EntryState.INTENT, EntryState.SUBMITTED, WAITING, EntryState.COMPLETED),
]
"""The order when sorted by state: problems come first, then what is unfinished, then completed requests."""
_STATE_LABELS = {EntryState.INTENT.value: "running", EntryState.SUBMITTED.value: "running"}
"""The names of states on the page, if they differ from the journal's."""


@attrs.frozen
class Card:
    """One image on the page, or the placeholder of a request without images."""

    row: Row
    number: int
    """The position on the page, from 1."""
    state: str
    rank: int
    """The position of the state in `_STATE_ORDER`."""
    image_url: str = ""
    """Relative to the page; empty if there is no image."""
    thumbnail_url: str = ""
    size: Sequence[object] = ()
    """The image's width and height in pixels; without an image, the requested ones."""
    part: str = ""
    """The position among several images of one request, such as "1 of 2"."""


@attrs.define
class Gallery:
    """The page of an output folder."""

    folder: Path
    skip_thumbnails: bool = False
    """Whether to create no more thumbnails: the page then shows an image itself if its thumbnail is missing."""
    _warned: bool = attrs.field(default=False, init=False)
    """Whether it was reported that there are files that are not shown."""
    _sizes: dict[str, tuple[int, int]] = attrs.field(factory=dict[str, tuple[int, int]], init=False)
    """The width and height in pixels of images that were opened, by file name."""
    _environment: Environment = attrs.field(
        factory=lambda: Environment(
            loader=FileSystemLoader(Path(__file__).parent),
            autoescape=True,
            trim_blocks=True,
            lstrip_blocks=True,
            keep_trailing_newline=True,
        ),
        init=False,
    )

    @property
    def path(self) -> Path:
        """The HTML file."""
        return self.folder / "index.html"

    def write(self, rows: Sequence[Row], *, running: bool) -> None:
        """Create missing thumbnails, and replace the page atomically.

        Args:
            rows: The requests to show, in order.
            running: Whether the batch is still running: the page then reloads itself.

        Raises:
            OSError: The page can't be written.
        """
        refused = {row.key for row in rows if not all(map(self._is_own_file, row.files))}
        if refused and not self._warned:
            self._warned = True
            print_error(
                f"the page doesn't show the pictures of {len(refused)} requests: their files aren't in the folder"
            )
        cards: list[Card] = []
        for row in rows:
            cards += self._create_cards(row, [] if row.key in refused else row.files, len(cards) + 1)
        states = Counter(card.state for card in cards)
        page = self._environment.get_template(_TEMPLATE).render(
            content_policy=self._content_policy(),
            cards=cards,
            title=self.folder.resolve().name,
            image_count=sum(bool(card.image_url) for card in cards),
            spent=sum(row.cost for row in rows if row.cost is not None),
            states=sorted(states.items(), key=lambda item: _rank(item[0]), reverse=True),
            running=running,
            now=datetime.now().astimezone(),
        )
        write_atomically(self.path, page)

    def _content_policy(self) -> str:
        """Return the page's Content-Security-Policy: its own script and style, and images beside it.

        Browsers disagree on whether `'self'` includes the files beside a page that was opened as a file.
        """
        source = (Path(__file__).parent / _TEMPLATE).read_text(encoding="utf-8")
        hashes: dict[str, str] = {}
        for tag in ("script", "style"):
            content = source.partition(f"<{tag}>")[2].partition(f"</{tag}>")[0]
            hashes[tag] = f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"
        return (
            f"default-src 'none'; script-src {hashes['script']}; style-src {hashes['style']}; "
            "img-src 'self' file: data:; base-uri 'none'; form-action 'none'"
        )

    def _is_own_file(self, name: str) -> bool:
        """Check whether a name, which may have been written by somebody else, is that of a file in the folder."""
        return bool(_IMAGE_NAME.fullmatch(name)) and not (self.folder / name).is_symlink()

    def _create_cards(self, row: Row, files: Sequence[str], number: int) -> list[Card]:
        """Return a card for each image of a request, or a placeholder."""
        state, rank = _STATE_LABELS.get(row.state, row.state), _rank(row.state)
        cards: list[Card] = []
        for index, name in enumerate(files, 1):
            thumbnail_url, size = self._create_thumbnail(name)
            part = f"{index} of {len(files)}" if len(files) > 1 else ""
            cards.append(Card(row, number + index - 1, state, rank, quote(name), thumbnail_url, size, part))
        requested = [row.params.get(side) or "any" for side in ("width", "height")]
        return cards or [Card(row, number, state, rank, size=[] if requested == ["any", "any"] else requested)]

    def _create_thumbnail(self, name: str) -> tuple[str, Sequence[object]]:
        """Create an image's thumbnail if it is missing or outdated.

        Returns:
            The URL of the thumbnail, or of the image itself if it has none, and the image's width and height.
        """
        path, thumbnail = self.folder / name, self.folder / "thumbs" / f"{name}.jpeg"
        try:
            # A link could lead out of the folder.
            exists = thumbnail.is_file() and not thumbnail.is_symlink()
            if name not in self._sizes or not exists:
                with Image.open(path, formats=_IMAGE_FORMATS) as image:
                    size = _check_size(image)
                    if (self.skip_thumbnails and not exists) or thumbnail.parent.is_symlink():
                        return quote(name), size
                    if not exists or thumbnail.stat().st_mtime < path.stat().st_mtime:
                        thumbnail.parent.mkdir(exist_ok=True)
                        write_atomically(thumbnail, _encode_thumbnail(image))
                self._sizes[name] = size
        except Exception:  # noqa: BLE001 - a damaged image must not keep the others from being shown
            return quote(name), []
        return quote(f"thumbs/{thumbnail.name}"), self._sizes[name]


def write_outputs(output_dir: OutputDir, rows: Sequence[Row], gallery: Gallery, *, running: bool) -> str | None:
    """Write the results and the gallery, each even if the other fails.

    Returns:
        The failures, or None if both were written.
    """
    writers: dict[Path, Callable[[], None]] = {
        output_dir.results_path: lambda: output_dir.write_results(rows),
        gallery.path: lambda: gallery.write(rows, running=running),
    }
    problems: list[str] = []
    for path, write in writers.items():
        try:
            write()
        except Exception as error:  # noqa: BLE001 - no failure here may stop the batch
            problems.append(f"can't write {path.name}: {getattr(error, 'strerror', None) or repr(error)}")
    return "; ".join(problems) or None


def _check_size(image: Image.Image) -> tuple[int, int]:
    """Return an image's width and height.

    Raises:
        DecompressionBombError: It would need too much memory. Pillow itself only warns, up to twice its limit.
    """
    if image.width * image.height > (Image.MAX_IMAGE_PIXELS or math.inf):
        raise Image.DecompressionBombError(f"an image of {image.width}\u00d7{image.height} pixels")
    return image.size


def _encode_thumbnail(image: Image.Image) -> bytes:
    """Return a smaller JPEG of an image; transparent pixels become white."""
    image.draft("RGB", (2 * _THUMBNAIL_SIDE, 2 * _THUMBNAIL_SIDE))  # so that a JPEG isn't decoded in full size
    image.thumbnail((_THUMBNAIL_SIDE, _THUMBNAIL_SIDE))
    if image.mode in {"RGBA", "LA", "PA"} or "transparency" in image.info:
        thumbnail = Image.new("RGB", image.size, "white")
        transparent = image.convert("RGBA")
        thumbnail.paste(transparent, mask=transparent)
    else:
        thumbnail = image.convert("RGB")
    file = io.BytesIO()
    thumbnail.save(file, "JPEG", quality=80, optimize=True)
    return file.getvalue()


def _rank(state: str) -> int:
    return _STATE_ORDER.index(state) if state in _STATE_ORDER else len(_STATE_ORDER)
