"""Saves the images of a stream into a storage: streamed from the service, under free names, and never twice."""

from collections.abc import Callable

import attrs

from flux2max_async._downloads.default_names import choose_stem
from flux2max_async._downloads.filenames import numbered_name
from flux2max_async._downloads.image_download import ImageDownload
from flux2max_async._exceptions import FluxError
from flux2max_async._models.request import OutputFormat
from flux2max_async._models.results import Completed, GeneratedImage
from flux2max_async.journal._budget_record import NullRecord
from flux2max_async.journal._entry import SavedFile
from flux2max_async.storage._protocol import Storage, StoredImage


@attrs.define(eq=False)
class StorageSaver:
    """Saves the images of a stream into a storage.

    An image passes through a bounded buffer, without a file. Its mark tells whose it is: an image that another process
    or an earlier run has stored is neither downloaded nor stored again, and an object with another mark is left alone.

    Args:
        storage: The storage.
        name: Returns the file name for an outcome; None: their default name.
        download: Begins the download of an image.
    """

    storage: Storage
    name: Callable[[Completed], str] | None
    download: Callable[[GeneratedImage], ImageDownload]

    async def prepare(self) -> None:
        """Open the storage.

        Raises:
            StorageError: Nothing can be stored.
        """
        await self.storage.open()

    async def close(self) -> None:
        """Close the storage."""
        await self.storage.close()

    async def save(self, outcome: Completed, record: NullRecord) -> Completed:
        """Return the outcome with the locations of its images; its `save_error` tells why some are missing."""
        async with record.saving:
            files = list(record.files)
            stored: list[SavedFile] = []
            error: FluxError | None = None
            try:
                stem = choose_stem(outcome, self.name, record.fingerprint)
                for image in outcome.images:
                    found = await self._find_known(image, files) or await self._store(image, stem, outcome, record)
                    file = SavedFile.at(found.location, found.size)
                    stored.append(file)
                    if files[image.index : image.index + 1] != [file]:
                        files[image.index : image.index + 1] = [file]
                        await record.set_files(tuple(files))
            except FluxError as failure:
                error = failure
            await record.release()
        return attrs.evolve(
            outcome,
            saved=tuple(file.path for file in stored if file.path is not None),
            locations=tuple(file.location for file in stored),
            save_error=error,
            journal_error=record.problem or outcome.journal_error,
        )

    async def _find_known(self, image: GeneratedImage, files: list[SavedFile]) -> StoredImage | None:
        """Return the image if it is where the journal knows it; the bucket may have been moved."""
        for file in files[image.index : image.index + 1]:
            found = await self.storage.stat(file.location.replace("\\", "/").rpartition("/")[2])
            if found is not None and found.mark in {None, _mark(image)} and found.size == file.size:
                return found
        return None

    async def _store(self, image: GeneratedImage, stem: str, outcome: Completed, record: NullRecord) -> StoredImage:
        """Return the image, which is stored unless it is there already."""
        if outcome.replayed or record.interrupted:
            # It may have been stored in the moment before its process died.
            expected = outcome.request and outcome.request.output_format
            found = await self._find_name(stem, ".png" if expected is OutputFormat.PNG else ".jpeg", image)
            if isinstance(found, StoredImage):
                return found
        while True:
            async with self.download(image) as download:
                suffix = f".{download.content_type.removeprefix('image/')}"
                found = await self._find_name(stem, suffix, image)
                if isinstance(found, StoredImage):
                    return found
                try:
                    return await self.storage.create(
                        found, download, content_type=download.content_type, mark=_mark(image)
                    )
                except FileExistsError:
                    continue  # another process was faster

    async def _find_name(self, stem: str, suffix: str, image: GeneratedImage) -> StoredImage | str:
        """Return the image if it is there under one of its names, or else the first name that is free."""
        number = 1
        while (existing := await self.storage.stat(name := numbered_name(stem, suffix, number))) is not None:
            if existing.mark == _mark(image):
                return existing
            number += 1
        return name


def _mark(image: GeneratedImage) -> str:
    return f"{image.task_id}/{image.index}"
