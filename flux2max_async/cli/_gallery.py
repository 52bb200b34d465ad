"""The gallery: one page of all pictures of a folder to look at, with small copies of them, made once."""

import io
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from urllib.parse import quote

import attrs
from jinja2 import Environment, FileSystemLoader
from PIL import Image

from flux2max_async.cli._output_dir import WAITING, Folder, Row, write_whole
from flux2max_async.journal._entry import EntryState

_SIDE = 360
"""Pixels of the longer side of a small copy."""
_ORDER = [
    *(EntryState.FAILED, EntryState.UNCERTAIN, EntryState.REFUSED),
    *(EntryState.INTENT, EntryState.SUBMITTED, WAITING, EntryState.COMPLETED),
]
"""States in the order in which somebody may want to see them: what went wrong, what is under way, what is well."""
_NAMES = {EntryState.INTENT.value: "running", EntryState.SUBMITTED.value: "running"}
"""What states are called here, where that isn't their own name."""


@attrs.frozen
class Card:
    """What stands under one picture, or in its place."""

    row: Row
    number: int
    """In the order of the page, from 1."""
    state: str
    rank: int
    """Of the state, where they are sorted by it."""
    full: str = ""
    """The url of the picture, relative to the page; empty where there is none."""
    small: str = ""
    size: Sequence[object] = ()
    """The width and height of the picture in pixels, or as they were asked for."""
    part: str = ""
    """Which of several pictures of one request it is."""


@attrs.define
class Gallery:
    """The page of one folder."""

    folder: Path
    hurry: bool = False
    """Whether no more small copies are to be made now."""
    _sizes: dict[str, tuple[int, int]] = attrs.field(factory=dict[str, tuple[int, int]], init=False)
    """Of pictures that have been looked at."""
    _page: Environment = attrs.field(
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
        """The page."""
        return self.folder / "index.html"

    def write(self, rows: Sequence[Row], *, running: bool) -> None:
        """Make small copies of the pictures that have none yet, and write the page; whole or not at all.

        Args:
            rows: What is to be shown, in order.
            running: Whether there is more to come: then the page looks for it by itself.

        Raises:
            OSError: It can't be written.
        """
        cards: list[Card] = []
        for row in rows:
            cards += self._cards(row, len(cards) + 1)
        states = Counter(card.state for card in cards)
        page = self._page.get_template("gallery.html").render(
            cards=cards,
            title=self.folder.resolve().name,
            pictures=sum(bool(card.full) for card in cards),
            spent=sum(row.cost for row in rows if row.cost is not None),
            states=sorted(states.items(), key=lambda item: _rank(item[0]), reverse=True),
            running=running,
            now=datetime.now().astimezone(),
        )
        write_whole(self.path, page)

    def _cards(self, row: Row, number: int) -> list[Card]:
        state, rank = _NAMES.get(row.state, row.state), _rank(row.state)
        cards: list[Card] = []
        for index, name in enumerate(row.files, 1):
            small, size = self._small_copy(name)
            part = f"{index} of {len(row.files)}" if len(row.files) > 1 else ""
            cards.append(Card(row, number + index - 1, state, rank, quote(name), small, size, part))
        asked = [row.params.get(side) or "any" for side in ("width", "height")]
        return cards or [Card(row, number, state, rank, size=[] if asked == ["any", "any"] else asked)]

    def _small_copy(self, name: str) -> tuple[str, Sequence[object]]:
        """Give the url of a picture's small copy, which is made if need be, and the picture's width and height."""
        picture, small = self.folder / name, self.folder / "thumbs" / f"{name}.jpeg"
        try:
            if name not in self._sizes or not small.exists():
                with Image.open(picture) as image:
                    size = image.size
                    if self.hurry and not small.exists():
                        return quote(name), size
                    if not small.exists() or small.stat().st_mtime < picture.stat().st_mtime:
                        small.parent.mkdir(exist_ok=True)
                        write_whole(small, _shrunk(image))
                self._sizes[name] = size
        except Exception:  # noqa: BLE001 - whatever is wrong with one picture, the page shows all the others
            return quote(name), []
        return quote(f"thumbs/{small.name}"), self._sizes[name]


def write_all(folder: Folder, rows: Sequence[Row], gallery: Gallery, *, running: bool) -> str | None:
    """Write the results and the page, and tell what has kept them from being written: it keeps nothing else."""
    works: dict[Path, Callable[[], None]] = {
        folder.results: lambda: folder.write_results(rows),
        gallery.path: lambda: gallery.write(rows, running=running),
    }
    troubles: list[str] = []
    for path, work in works.items():
        try:
            work()
        except Exception as error:  # noqa: BLE001 - whatever is wrong with it, the pictures go on
            troubles.append(f"can't write {path.name}: {getattr(error, 'strerror', None) or repr(error)}")
    return "; ".join(troubles) or None


def _shrunk(image: Image.Image) -> bytes:
    image.draft("RGB", (2 * _SIDE, 2 * _SIDE))  # a JPEG is decoded no larger than it needs to be
    image.thumbnail((_SIDE, _SIDE))
    if image.mode in {"RGBA", "LA", "PA"} or "transparency" in image.info:
        ground = Image.new("RGB", image.size, "white")
        copy = image.convert("RGBA")
        ground.paste(copy, mask=copy)
    else:
        ground = image.convert("RGB")
    file = io.BytesIO()
    ground.save(file, "JPEG", quality=80, optimize=True)
    return file.getvalue()


def _rank(state: str) -> int:
    return _ORDER.index(state) if state in _ORDER else len(_ORDER)
