"""The gallery: an HTML page with all images of an output folder, and their thumbnails."""

import base64
import contextlib
import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

import attrs
from jinja2 import Environment, FileSystemLoader

from flux2max_async.cli._output_dir import OutputDir, write_atomically
from flux2max_async.cli._requests_file import is_derived_key
from flux2max_async.cli._rows import WAITING, Row
from flux2max_async.cli._stored_pictures import StoredPictures
from flux2max_async.cli._terminal import print_error
from flux2max_async.cli._thumbnails import Thumbnails, file_version, stored_name
from flux2max_async.journal._entry import EntryState

_IMAGE_NAME = re.compile(
    r"(?!(?:con|prn|aux|nul|(?:com|lpt)[0-9¹²³])[ ]*\.)[\w(+,=@-][\w.()+,=@ -]*\.\w+", re.IGNORECASE
)
"""Matches the names of saved images, and none that leaves the folder or is a device on any operating system."""
_TEMPLATE, _STYLE, _SCRIPT = (Path(__file__).with_name(f"gallery.{suffix}") for suffix in ("html", "css", "js"))
_STATE_ORDER = [
    *(EntryState.FAILED, EntryState.UNCERTAIN, EntryState.REFUSED),
    *(EntryState.INTENT, EntryState.SUBMITTED, WAITING, EntryState.COMPLETED),
]
"""The order when sorted by state: problems come first, then what is unfinished, then completed requests."""
_STATE_LABELS = {EntryState.INTENT.value: "running", EntryState.SUBMITTED.value: "running"}
"""The names of states on the page, if they differ from the journal's."""


@attrs.define
class Gallery:
    """The page of an output folder."""

    folder: Path
    emulated: bool = False
    """Whether the costs are those of an emulator: nothing was paid."""
    stored: StoredPictures | None = None
    """The pictures in object storage; None if it is unknown, so that only their addresses are shown."""
    skip_thumbnails: bool = False
    """Whether to create no more thumbnails: the page then shows an image itself if its thumbnail is missing."""
    _warned: bool = attrs.field(default=False, init=False)
    """Whether it was reported that there are files that are not shown."""
    _thumbnails: Thumbnails = attrs.field(
        default=attrs.Factory(lambda self: Thumbnails(self.folder), takes_self=True), init=False
    )
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
        """Create missing thumbnails, and replace the page atomically if it has changed.

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
        files = {row.key: row.files for row in rows if row.key not in refused}
        names = dict.fromkeys(name for row_files in files.values() for name in row_files)
        self._thumbnails.update(names, lambda: self.skip_thumbnails)
        self._update_stored([item for row in rows if not files.get(row.key) for item in _stored_locations(row)])
        variants = _find_variants(rows)
        entries = [
            entry for row in rows for entry in self._describe(row, files.get(row.key, []), variants.get(row.key, {}))
        ]
        states = Counter(entry["state"] for entry in entries)
        style, script = (path.read_text(encoding="utf-8") for path in (_STYLE, _SCRIPT))
        page = self._environment.get_template(_TEMPLATE.name).render(
            content_policy=_content_policy(style, script),
            style=style,
            script=script,
            data=",\n".join(map(_to_json, entries)),
            title=self.folder.resolve().name,
            image_count=sum("url" in entry or "location" in entry for entry in entries),
            spent=sum(row.cost for row in rows if row.cost is not None),
            emulated=self.emulated,
            states=sorted(states.items(), key=lambda item: _rank(item[0]), reverse=True),
            running=running,
            now=datetime.now().astimezone(),
        )
        _write_if_changed(self.path, page)

    def _update_stored(self, locations: Sequence[str]) -> None:
        """Create the missing thumbnails of pictures in object storage, and find those that exist."""
        reported = self._thumbnails.problem is not None
        read = self.stored.read if self.stored is not None else lambda _: None
        self._thumbnails.update_stored(locations, read, lambda: self.skip_thumbnails)
        if self._thumbnails.problem is not None and not reported:
            print_error(f"the page has no thumbnails of some pictures: {self._thumbnails.problem}")

    def _is_own_file(self, name: str) -> bool:
        """Check whether a name, which may have been written by somebody else, is that of a file in the folder."""
        return bool(_IMAGE_NAME.fullmatch(name)) and not (self.folder / name).is_symlink()

    def _describe(self, row: Row, files: Sequence[str], variant: dict[str, Any]) -> list[dict[str, Any]]:
        """Return what the page knows about each image of a request, or about a request without images."""
        state = _STATE_LABELS.get(row.state, row.state)
        common = {"prompt": row.prompt, "key": row.key, "state": state, "rank": _rank(row.state), **variant}
        if not is_derived_key(row.key, row.prompt):
            common["ownKey"] = True
        if row.cost is not None:
            common["cost"] = str(row.cost)
        if row.seconds is not None:
            common["seconds"] = round(row.seconds, 1)
        if "seed" in row.params:
            common["seed"] = str(row.params["seed"])
        pictures = [self._describe_file(name) for name in files]
        pictures = pictures or [self._describe_stored(location) for location in _stored_locations(row)]
        if not pictures:
            common["reason"] = row.error or ("not there yet" if state in {WAITING, "running"} else "no file")
        elif row.error:
            common["problem"] = row.error
        requested = [str(row.params.get(side) or "any") for side in ("width", "height")]
        entries: list[dict[str, Any]] = []
        for index, picture in enumerate(pictures or [{}], 1):
            entry = {**common, **picture}
            if "url" not in entry and requested != ["any", "any"]:
                entry["size"] = "\u00d7".join(requested)
            if len(pictures) > 1:
                entry["part"] = f"{index} of {len(pictures)}"
                entry.setdefault("group", row.key)
            entries.append(entry)
        return entries

    def _describe_file(self, name: str) -> dict[str, str]:
        """Return what the page knows about a picture in the folder."""
        return {"url": quote(name), "thumbnail": quote(name), **self._describe_thumbnail(name)}

    def _describe_stored(self, location: str) -> dict[str, str]:
        """Return what the page knows about a picture in object storage: it shows the thumbnail, also in the dialog."""
        picture = {"location": location}
        if self.stored is not None and (link := self.stored.link(location)) is not None:
            picture["link"] = link
        thumbnail = self._describe_thumbnail(stored_name(location))
        return {**picture, **thumbnail, **({"url": thumbnail["thumbnail"]} if thumbnail else {})}

    def _describe_thumbnail(self, name: str) -> dict[str, str]:
        if (source := self._thumbnails.sources.get(name)) is None:
            return {}
        return {"thumbnail": quote(f"thumbs/{name}.jpeg"), "size": f"{source.width}\u00d7{source.height}"}


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


def _write_if_changed(path: Path, content: str) -> None:
    """Replace a file atomically, unless it has this content already.

    Raises:
        OSError: It can't be written; it keeps its old content.
    """
    data = content.encode(errors="backslashreplace")
    with contextlib.suppress(OSError):
        if file_version(path) is not None and path.read_bytes() == data:
            return
    write_atomically(path, data)


def _stored_locations(row: Row) -> list[str]:
    """Return the addresses of a request's pictures in object storage; other locations are paths."""
    return [location for location in row.locations if "://" in location]


def _find_variants(rows: Iterable[Row]) -> dict[str, dict[str, Any]]:
    """Return what the page knows about requests that differ in nothing but the seed, by key."""
    groups: dict[tuple[object, ...], list[str]] = {}
    for row in rows:
        content = (row.prompt, *((name, str(value)) for name, value in row.params.items() if name != "seed"))
        groups.setdefault(content, []).append(row.key)
    return {
        key: {"group": number, "variant": f"variant {index} of {len(keys)}"}
        for number, keys in enumerate(groups.values())
        if len(keys) > 1
        for index, key in enumerate(keys, 1)
    }


def _content_policy(style: str, script: str) -> str:
    """Return the page's Content-Security-Policy: its own script and style, and images beside it.

    Browsers disagree on whether `'self'` includes the files beside a page that was opened as a file.
    """
    hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (style, script)]
    return (
        f"default-src 'none'; script-src 'sha256-{hashes[1]}'; style-src 'sha256-{hashes[0]}'; "
        "img-src 'self' file: data:; base-uri 'none'; form-action 'none'"
    )


def _to_json(entry: dict[str, Any]) -> str:
    """Return an entry as JSON, which can't end the script element that it is in."""
    return json.dumps(entry, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")


def _rank(state: str) -> int:
    return _STATE_ORDER.index(state) if state in _STATE_ORDER else len(_STATE_ORDER)
