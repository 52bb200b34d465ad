"""Saves the images of a stream as its tasks end: complete, under free names, and never twice."""

import contextlib
import hashlib
import itertools
import os
import secrets
import stat
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import anyio.to_thread
import attrs

from flux2max_async._downloads.default_names import choose_stem
from flux2max_async._downloads.filenames import numbered_name
from flux2max_async._downloads.image_format import is_whole_file
from flux2max_async._downloads.targets import is_writable
from flux2max_async._exceptions import FluxError
from flux2max_async._models.results import Completed, GeneratedImage
from flux2max_async.journal._budget_record import NullRecord
from flux2max_async.journal._entry import SavedFile
from flux2max_async.storage._local import check_writable, move, translate_write_errors

Download = Callable[[GeneratedImage, Path, Path], Awaitable[str]]
"""Downloads an image into a file that exists afterwards only if it is complete, and returns the image's format; errors
name the second path."""


@attrs.define(eq=False)
class _Images:
    """The images of one outcome while they are saved, by index."""

    files: list[SavedFile]
    """What the journal knows."""
    saved: dict[int, Path] = attrs.field(factory=dict[int, Path], init=False)
    parts: dict[int, Path] = attrs.field(factory=dict[int, Path], init=False)
    """Those that were downloaded."""
    suffixes: dict[int, str] = attrs.field(factory=dict[int, str], init=False)
    """Of those in `parts`."""


@attrs.define(eq=False)
class ImageSaver:
    """Saves the images of a stream into one folder.

    Each image is downloaded into a part file of its own and then published under a free name: an existing file is never
    replaced, and an image that is already there is not stored twice. The exception is a file that the journal knows as
    this image, and that is no whole image any more.

    Args:
        folder: Created if it doesn't exist.
        name: Returns the file name for an outcome; None stands for `default_name()`.
        download: Downloads one image.
    """

    folder: Path
    name: Callable[[Completed], str] | None
    download: Download

    async def prepare(self) -> None:
        """Create the folder, and check that it can be written to.

        Raises:
            DownloadError: It can't.
        """
        with translate_write_errors(self.folder):
            await anyio.to_thread.run_sync(check_writable, self.folder)

    async def save(self, outcome: Completed, record: NullRecord) -> Completed:
        """Return the outcome with the paths of its images; its `save_error` tells why some are missing."""
        async with record.saving:
            return await self._save_all(outcome, record)

    def find_all_saved(self, outcome: Completed, files: Sequence[SavedFile]) -> tuple[Path, ...] | None:
        """Return where the images of an outcome are, if all are saved and whole; blocking."""
        paths: list[Path] = []
        try:
            for image in outcome.images:
                path, whole = self._find_saved(files[image.index : image.index + 1])
                if path is None or not whole:
                    return None
                paths.append(path)
        except OSError:
            return None  # save() gives the reason
        return tuple(paths)

    async def _save_all(self, outcome: Completed, record: NullRecord) -> Completed:
        images = _Images(list(record.files))
        error: FluxError | None = None
        try:
            stem = choose_stem(outcome, self.name, record.fingerprint)
            error = await self._collect(outcome, stem, images, record)
            with translate_write_errors(self.folder / stem):
                await self._publish(stem, images, record)  # also those that were downloaded before one failed
        except FluxError as failure:
            error = error or failure
        finally:
            for part in images.parts.values():
                with contextlib.suppress(OSError):
                    part.unlink(missing_ok=True)
        await record.release()
        saved = tuple(path for _, path in sorted(images.saved.items()))
        journal_error = record.problem or outcome.journal_error
        locations = tuple(map(str, saved))
        return attrs.evolve(outcome, saved=saved, locations=locations, save_error=error, journal_error=journal_error)

    async def _collect(self, outcome: Completed, stem: str, images: _Images, record: NullRecord) -> FluxError | None:
        """Find each image that was saved earlier and download the others, up to one that fails; return why it does."""
        try:
            with translate_write_errors(self.folder / stem):
                for image in outcome.images:
                    if record.interrupted:
                        await anyio.to_thread.run_sync(_remove_parts, self.folder, _part_prefix(image))
                    known = images.files[image.index : image.index + 1]
                    existing, whole = (
                        await anyio.to_thread.run_sync(self._find_saved, known) if known else (None, False)
                    )
                    if existing is not None and whole:
                        images.saved[image.index] = existing
                        continue
                    part = self.folder / f".{_part_prefix(image)}.{secrets.token_hex(4)}.part"
                    images.suffixes[image.index] = f".{await self.download(image, part, self.folder / stem)}"
                    images.parts[image.index] = part
                    if existing is not None:
                        await self._replace(existing, image.index, images, record)
        except FluxError as error:
            return error
        return None

    def _find_saved(self, known: Sequence[SavedFile]) -> tuple[Path | None, bool]:
        """Return where an image that was saved earlier is, and whether it is whole; the folder may have been moved."""
        for file in known:
            if file.path is None:  # it is in object storage
                continue
            path = self.folder / file.path.name
            if path.is_file() and path.stat().st_size == file.size:
                return path, not _is_damaged(path)
        return None, False

    async def _replace(self, damaged: Path, index: int, images: _Images, record: NullRecord) -> None:
        """Replace a damaged file with the complete image, unless its size has changed."""
        part = images.parts[index]
        replaced = await anyio.to_thread.run_sync(_replace_file, part, damaged, images.files[index].size)
        if replaced is not None:
            images.files[index], images.saved[index] = replaced, damaged
            # Not before: if this is not written, the next run finds the same image under this name.
            await record.set_files(tuple(images.files))

    async def _publish(self, stem: str, images: _Images, record: NullRecord) -> None:
        """Publish the downloaded images, each under the first name that is free, or that the same image already has."""
        while missing := {index: part for index, part in images.parts.items() if index not in images.saved}:
            suffixes = [images.suffixes[index] for index in missing]
            targets = await anyio.to_thread.run_sync(
                _choose_targets, list(missing.values()), suffixes, self.folder, stem
            )
            # First the journal, then the files: a file that is found under this name later is this image.
            for index, (target, size) in zip(missing, targets, strict=True):
                images.files[index : index + 1] = [SavedFile(target.absolute(), size)]
            await record.set_files(tuple(images.files))
            for (index, part), (target, _) in zip(missing.items(), targets, strict=True):
                if await anyio.to_thread.run_sync(_link, part, target):
                    images.saved[index] = target


def _part_prefix(image: GeneratedImage) -> str:
    """Return what the part files of an image begin with, so that they are not mistaken for those of other images."""
    return hashlib.sha256(f"{image.task_id} {image.index}".encode(errors="replace")).hexdigest()[:16]


def _remove_parts(folder: Path, prefix: str) -> None:
    """Remove what a killed process has left of an image."""
    for part in folder.glob(f".{prefix}.*.part"):
        part.unlink(missing_ok=True)


def _is_damaged(path: Path) -> bool:
    try:
        return not is_whole_file(path)
    except PermissionError:
        return False  # nothing is known against it


def _replace_file(part: Path, target: Path, recorded_size: int) -> SavedFile | None:
    """Replace a file if it still has its recorded size; return the new one, or None if it was left alone.

    A read-only file is left alone, and so is a symbolic link: what it leads to may belong to another folder.
    """
    try:
        status = target.lstat()
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(status.st_mode) or status.st_size != recorded_size or not is_writable(target, status.st_mode):
        return None
    size = part.stat().st_size
    part.replace(target)
    return SavedFile(target.absolute(), size)


def _choose_targets(parts: list[Path], suffixes: list[str], folder: Path, stem: str) -> list[tuple[Path, int]]:
    """Return a file name for each image, which is available and no other image's, and the size of the image."""
    chosen: dict[Path, Path] = {}
    targets: list[tuple[Path, int]] = []
    for part, suffix in zip(parts, suffixes, strict=True):
        for number in itertools.count(1):  # pragma: no branch - it doesn't end
            target = folder / numbered_name(stem, suffix, number)
            if _is_same(chosen[target], part) if target in chosen else _is_available(target, part):
                chosen.setdefault(target, part)
                targets.append((target, part.stat().st_size))
                break
    return targets


def _is_available(target: Path, part: Path) -> bool:
    """Check whether a name is free, or belongs to the same image."""
    return not os.path.lexists(target) or _is_same(target, part)


def _is_same(target: Path, part: Path) -> bool:
    """Check whether a file holds the same image."""
    try:
        if not stat.S_ISREG(target.stat().st_mode):
            return False  # opening a pipe would block
        with target.open("rb") as existing, part.open("rb") as new:
            if os.fstat(existing.fileno()).st_size != os.fstat(new.fileno()).st_size:
                return False
            while chunk := new.read(1 << 20):
                if existing.read(1 << 20) != chunk:
                    return False
            return True
    except OSError:
        return False  # a broken link, or a file that we may not read


def _link(part: Path, target: Path) -> bool:
    """Publish a file under its name, unless the name is taken; return whether the image is stored under it now."""
    try:
        target.hardlink_to(part)
    except OSError:
        if os.path.lexists(target):
            return _is_same(target, part)
        return _move(part, target)
    return True


def _move(part: Path, target: Path) -> bool:
    """Do what `_link` does on a file system without links."""
    try:
        move(part, target)
    except FileExistsError:
        return _is_same(target, part)
    return True
