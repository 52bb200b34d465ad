"""Pictures in object storage on the page: each is read once for its thumbnail, and linked to if that is possible."""

import io
import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import attrs
import pytest
from PIL import Image

from flux2max_async import StorageError
from flux2max_async.cli._gallery import Gallery
from flux2max_async.cli._rows import Row
from flux2max_async.cli._stored_pictures import StoredPictures
from flux2max_async.cli._thumbnails import stored_name

ROOT = "s3://bucket/some/"


@attrs.define
class FakeStore:
    """A store with the interface of obstore's."""

    pictures: dict[str, bytes] = attrs.field(factory=dict[str, bytes])
    error: Exception | None = None
    sizes: dict[str, int] = attrs.field(factory=dict[str, int])
    """Sizes that are not those of the content."""
    reads: Counter[str] = attrs.field(factory=Counter[str])

    def get(self, name: str) -> Any:
        self.reads[name] += 1
        if self.error is not None:
            raise self.error
        if name not in self.pictures:
            raise FileNotFoundError(name)
        content = self.pictures[name]
        return SimpleNamespace(meta={"size": self.sizes.get(name, len(content))}, bytes=lambda: content)


class LinkedPictures(StoredPictures):
    """Pictures that have links."""

    def link(self, location: str) -> str | None:
        return f"https://pictures.example/{location.removeprefix(ROOT)}"


def picture(width: int = 720, height: int = 480) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), "red").save(file, "PNG")
    return file.getvalue()


def row(name: str, *others: str, **values: Any) -> Row:
    locations = [ROOT + each for each in (name, *others)]
    return Row(name, f"a {name}", state="completed", locations=locations, **values)


def entries_of(gallery: Gallery) -> list[dict[str, Any]]:
    """Return what the page knows about each of its cards."""
    page = gallery.path.read_text(encoding="utf-8")
    (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    entries: list[dict[str, Any]] = json.loads(data)
    return entries


def test_thumbnails_of_stored_pictures(tmp_path: Path) -> None:
    """Each picture is read once, by the first run that lacks its thumbnail; the page shows it with its address."""
    store = FakeStore({"a.png": picture(), "b 1.png": picture(64, 96)})
    rows = [row("a.png", "b 1.png", error="only two of three")]
    Gallery(tmp_path, stored=LinkedPictures(store, ROOT)).write(rows, running=True)
    gallery = Gallery(tmp_path, stored=LinkedPictures(store, ROOT))
    for running in (True, False):
        gallery.write(rows, running=running)
    names = [stored_name(location) for location in rows[0].locations]

    assert store.reads == {"a.png": 1, "b 1.png": 1}
    assert {path.name for path in (tmp_path / "thumbs").iterdir()} == {f"{name}.jpeg" for name in names}
    common = {"prompt": "a a.png", "state": "completed", "group": "a.png", "problem": "only two of three"}
    assert [{**entry, **common} == entry for entry in entries_of(gallery)] == [True, True]
    assert [
        [entry[name] for name in ("location", "link", "url", "thumbnail", "size", "part")]
        for entry in entries_of(gallery)
    ] == [
        [f"{ROOT}a.png", "https://pictures.example/a.png", *2 * [f"thumbs/{names[0]}.jpeg"], "720\u00d7480", "1 of 2"],
        [
            f"{ROOT}b 1.png",
            "https://pictures.example/b 1.png",
            *2 * [f"thumbs/{names[1]}.jpeg"],
            "64\u00d796",
            "2 of 2",
        ],
    ]
    with Image.open(tmp_path / "thumbs" / f"{names[0]}.jpeg") as thumbnail:
        assert thumbnail.size == (360, 240)


def test_page_without_the_store(tmp_path: Path) -> None:
    """If the store is unknown, thumbnails are kept, and addresses are shown without links."""
    rows = [row("a.png"), row("b.png", params={"width": 64})]
    Gallery(tmp_path, stored=LinkedPictures(FakeStore({"a.png": picture()}), ROOT)).write(rows, running=False)
    gallery = Gallery(tmp_path)
    gallery.write(rows, running=False)
    first, second = entries_of(gallery)

    assert first["thumbnail"] == f"thumbs/{stored_name(f'{ROOT}a.png')}.jpeg"
    assert (second["location"], second["size"]) == (f"{ROOT}b.png", "64\u00d7any")
    assert not {"link", "url", "thumbnail", "reason"} & second.keys()
    assert "link" not in first
    assert "(2)</title>" in gallery.path.read_text(encoding="utf-8")


def test_picture_in_the_folder_is_not_read(tmp_path: Path) -> None:
    """A picture that this host has in its folder is shown from there."""
    (tmp_path / "own.png").write_bytes(picture())
    store = FakeStore({"a.png": picture()})
    gallery = Gallery(tmp_path, stored=StoredPictures(store, ROOT))
    gallery.write([row("a.png", files=["own.png"])], running=False)

    assert [entry["url"] for entry in entries_of(gallery)] == ["own.png"]
    assert not store.reads


@pytest.mark.parametrize(
    ("location", "reads"),
    [
        ("s3://other/a.png", 0),
        ("s3://bucket/some/a/b.png", 0),
        ("s3://bucket/some/..", 0),
        ("s3://bucket/some/", 0),
        ("s3://bucket/some/missing.png", 1),
        ("s3://bucket/some/large.png", 1),
        ("s3://bucket/some/damaged.png", 1),
        ("s3://bucket/some/\ud800.png", 1),
    ],
)
def test_pictures_without_a_thumbnail(tmp_path: Path, location: str, reads: int) -> None:
    """What is elsewhere, missing, too large or damaged has no thumbnail; it is read at most once in a run."""
    store = FakeStore(
        {"a.png": picture(), "large.png": picture(), "damaged.png": b"\x89PNG"}, sizes={"large.png": (32 << 20) + 1}
    )
    gallery = Gallery(tmp_path, stored=StoredPictures(store, ROOT))
    for _ in range(2):
        gallery.write([Row("a", "a", state="completed", locations=[location]), row("a.png")], running=False)
    entries = entries_of(gallery)

    assert "thumbnail" not in entries[0]
    assert "thumbnail" in entries[1]
    assert store.reads.pop("a.png") == 1
    assert store.reads.total() == reads
    assert not list(tmp_path.rglob("*.part"))


def test_store_that_cannot_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The first error of the store is reported once, and nothing more is read in this run."""
    store = FakeStore(error=PermissionError("no"))
    gallery = Gallery(tmp_path, stored=StoredPictures(store, ROOT))
    for _ in range(2):
        gallery.write([row(f"{number}.png") for number in range(200)], running=False)

    assert 1 <= store.reads.total() <= 8
    assert re.fullmatch(
        rf"flux2max: the page has no thumbnails of some pictures: can't read {ROOT}\d\.png: no\n",
        capsys.readouterr().err,
    )
    assert len(entries_of(gallery)) == 200


def test_more_than_at_once(tmp_path: Path) -> None:
    """Only some pictures are in the folder at the same time."""
    store, at_once = FakeStore({f"{number}.png": picture(8, 8) for number in range(70)}), 0

    class Counting(StoredPictures):
        def read(self, location: str) -> bytes | None:
            nonlocal at_once
            at_once = max(at_once, len(list(tmp_path.rglob("*.part"))))
            return super().read(location)

    gallery = Gallery(tmp_path, stored=Counting(store, ROOT))
    gallery.write([row(name) for name in store.pictures], running=False)

    assert all("thumbnail" in entry for entry in entries_of(gallery))
    assert 1 <= at_once < 64


def _link(folder: Path, gallery: Gallery) -> None:
    (folder / "other").mkdir()
    (folder / "thumbs").symlink_to(folder / "other")


def _file(folder: Path, gallery: Gallery) -> None:
    (folder / "thumbs").write_bytes(b"")


def _skip(folder: Path, gallery: Gallery) -> None:
    gallery.skip_thumbnails = True


@pytest.mark.parametrize("prevent", [_link, _file, _skip])
def test_no_place_for_thumbnails(tmp_path: Path, prevent: Callable[[Path, Gallery], None]) -> None:
    """Without a folder for thumbnails, or after a second signal, nothing is read."""
    store = FakeStore({"a.png": picture()})
    gallery = Gallery(tmp_path, stored=StoredPictures(store, ROOT))
    prevent(tmp_path, gallery)
    gallery.write([row("a.png")], running=False)

    assert [entry["location"] for entry in entries_of(gallery)] == [f"{ROOT}a.png"]
    assert "thumbnail" not in entries_of(gallery)[0]
    assert not store.reads


def test_skipped_while_pictures_are_read(tmp_path: Path) -> None:
    """A second signal ends the reading."""
    store = FakeStore({f"{number}.png": picture(8, 8) for number in range(40)})

    class Interrupted(StoredPictures):
        def read(self, location: str) -> bytes | None:
            gallery.skip_thumbnails = True
            return super().read(location)

    gallery = Gallery(tmp_path, stored=Interrupted(store, ROOT))
    gallery.write([row(name) for name in store.pictures], running=False)

    assert 1 <= store.reads.total() <= 8
    assert not any("thumbnail" in entry for entry in entries_of(gallery))
    assert not list(tmp_path.rglob("*.part"))


def test_full_disk(tmp_path: Path) -> None:
    """A picture that can't be written for its thumbnail is shown without one."""

    class Disturbing(StoredPictures):
        def read(self, location: str) -> bytes | None:
            (tmp_path / "thumbs").rmdir()
            return super().read(location)

    gallery = Gallery(tmp_path, stored=Disturbing(FakeStore({"a.png": picture()}), ROOT))
    gallery.write([row("a.png")], running=False)

    assert "thumbnail" not in entries_of(gallery)[0]


def test_no_link_without_signatures() -> None:
    """A store that has no links, or can't sign them, has none on the page."""
    assert StoredPictures(FakeStore(), ROOT).link(f"{ROOT}a.png") is None
    assert StoredPictures(FakeStore(), ROOT).link("s3://other/a.png") is None


def test_errors_have_the_reason() -> None:
    """An error of the store names the picture."""
    with pytest.raises(StorageError, match=r"can't read s3://bucket/some/a\.png: timeout"):
        StoredPictures(FakeStore(error=RuntimeError("timeout")), ROOT).read(f"{ROOT}a.png")
