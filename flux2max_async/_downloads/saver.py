"""Saving the pictures of a stream as its tasks end: named, whole, never over another picture, and never twice."""

import hashlib
import itertools
import os
import secrets
import stat
from collections.abc import Awaitable, Callable
from pathlib import Path

import anyio.to_thread
import attrs

from flux2max_async._downloads.downloader import told_apart
from flux2max_async._downloads.filenames import file_name
from flux2max_async._exceptions import DownloadError, FluxError
from flux2max_async._models.results import Completed, GeneratedImage
from flux2max_async.journal._entry import SavedFile
from flux2max_async.journal._record import RequestRecord

Fetch = Callable[[GeneratedImage, Path, Path], Awaitable[None]]
"""Downloads a picture into a file that is there in the end only if it is whole; the other path is its later name."""

_ENDINGS = {".jpeg", ".jpg", ".png", ".webp"}


@attrs.define(eq=False)
class ImageSaver:
    """Saves into one folder.

    Args:
        folder: It is made if it isn't there.
        name: What to call the pictures of an outcome; None calls them by the request's key, or else the task's id.
        fetch: Downloads.
    """

    folder: Path
    name: Callable[[Completed], str] | None
    fetch: Fetch

    async def prepare(self) -> None:
        """Make the folder and try to write into it.

        Raises:
            DownloadError: That isn't possible.
        """
        with told_apart(self.folder):
            await anyio.to_thread.run_sync(_try_out, self.folder)

    async def save(self, outcome: Completed, page: RequestRecord | None) -> Completed:
        """Give the outcome with the paths of its pictures; what can't be saved is told by its `save_error`."""
        files = list(page.files) if page else []
        saved: list[Path] = []
        error: FluxError | None = None
        try:
            stem = self._stem(outcome)
            with told_apart(self.folder / stem):
                for image in outcome.images:
                    if page is not None and page.interrupted:
                        await anyio.to_thread.run_sync(_sweep, self.folder, _mark(image))
                    there = await anyio.to_thread.run_sync(self._whole, files[image.index : image.index + 1])
                    saved.append(there or await self._save(image, stem, outcome, files, page))
        except FluxError as failure:
            error = failure
        if page is not None:
            await page.saved()
            outcome = attrs.evolve(outcome, journal_error=page.problem or outcome.journal_error)
        return attrs.evolve(outcome, saved=tuple(saved), save_error=error)

    def _whole(self, known: list[SavedFile]) -> Path | None:
        """Give where a picture that was saved earlier still is, the folder having moved perhaps."""
        for file in known:
            path = self.folder / file.path.name
            if path.is_file() and path.stat().st_size == file.size:
                return path
        return None

    async def _save(
        self, image: GeneratedImage, stem: str, outcome: Completed, files: list[SavedFile], page: RequestRecord | None
    ) -> Path:
        part = self.folder / f".{_mark(image)}.{secrets.token_hex(4)}.part"
        await self.fetch(image, part, self.folder / stem)
        try:
            return await self._publish(part, stem, outcome, image.index, files, page)
        finally:
            part.unlink(missing_ok=True)

    async def _publish(
        self, part: Path, stem: str, outcome: Completed, index: int, files: list[SavedFile], page: RequestRecord | None
    ) -> Path:
        """Give a whole picture the first name that is free, or that it has already."""
        ending = await anyio.to_thread.run_sync(_ending, part, outcome)
        if (given := Path(stem).suffix).lower() in _ENDINGS:
            stem, ending = stem.removesuffix(given), given
        size = part.stat().st_size  # noqa: ASYNC240 - it was written just now
        for number in itertools.count(1):
            target = self.folder / f"{stem}{f'-{number}' if number > 1 else ''}{ending}"
            if not await anyio.to_thread.run_sync(_is_free_for, target, part):
                continue
            if page is not None:
                # First the name, then the file: whatever is found under the name later is this picture.
                files[index : index + 1] = [SavedFile(target.absolute(), size)]
                await page.saving(tuple(files))
            if await anyio.to_thread.run_sync(_link, part, target):
                return target
        raise AssertionError  # pragma: no cover - the numbers don't end

    def _stem(self, outcome: Completed) -> str:
        if self.name is None:
            key = outcome.request and outcome.request.key
            return file_name(key or outcome.task_id)
        try:
            return file_name(self.name(outcome))
        except Exception as error:  # noqa: BLE001 - it is the caller's
            # Not as the cause: one with an errno would be taken for what the disk says.
            raise DownloadError(f"no name for the picture: {error!r}")  # noqa: B904 - see above


def _mark(image: GeneratedImage) -> str:
    """Mark the parts of a picture, so that those that are left behind can be told from those of others."""
    return hashlib.sha256(f"{image.task_id} {image.index}".encode(errors="replace")).hexdigest()[:16]


def _try_out(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    trial = folder / f".{secrets.token_hex(8)}.part"
    trial.touch(exist_ok=False)
    trial.unlink()


def _sweep(folder: Path, mark: str) -> None:
    """Remove what a killed process has left of a picture."""
    for part in folder.glob(f".{mark}.*.part"):
        part.unlink(missing_ok=True)


def _ending(part: Path, outcome: Completed) -> str:
    with part.open("rb") as file:
        head = file.read(12)
    if head.startswith(b"\x89PNG"):
        return ".png"
    if head.startswith(b"\xff\xd8\xff"):
        return ".jpeg"
    if head.startswith(b"RIFF") and head.endswith(b"WEBP"):
        return ".webp"
    return f".{(outcome.request and outcome.request.output_format) or 'jpeg'}"


def _is_free_for(target: Path, part: Path) -> bool:
    """Tell whether nothing else is under a name: nothing at all, or the same picture."""
    return not os.path.lexists(target) or _is_same(target, part)


def _is_same(target: Path, part: Path) -> bool:
    """Tell whether a name is that of the same picture."""
    try:
        if not stat.S_ISREG(target.stat().st_mode):
            return False  # opening a pipe would wait for ever
        with target.open("rb") as there, part.open("rb") as new:
            if os.fstat(there.fileno()).st_size != os.fstat(new.fileno()).st_size:
                return False
            while piece := new.read(1 << 20):
                if there.read(1 << 20) != piece:
                    return False
            return True
    except OSError:
        return False  # a link to nothing, or not ours to read


def _link(part: Path, target: Path) -> bool:
    """Give a file its name unless the name is taken; tells whether the file is there now."""
    try:
        target.hardlink_to(part)
    except OSError:
        if os.path.lexists(target):
            return _is_same(target, part)
        return _move(part, target)
    return True


def _move(part: Path, target: Path) -> bool:
    """Do what `_link` does where the file system has no links: an empty file holds the name until then."""
    try:
        target.touch(exist_ok=False)
    except FileExistsError:
        return _is_same(target, part)
    try:
        part.replace(target)
    except BaseException:
        target.unlink()
        raise
    return True
