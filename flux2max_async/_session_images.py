"""What FluxSession inherits: downloading images."""

from collections.abc import Callable
from functools import partial
from os import PathLike
from pathlib import Path

from flux2max_async._downloads.downloader import Downloader
from flux2max_async._downloads.image_download import ImageDownload
from flux2max_async._downloads.saver import ImageSaver
from flux2max_async._downloads.storage_saver import StorageSaver
from flux2max_async._exceptions import ConfigurationError
from flux2max_async._lifetime import SessionLifetime
from flux2max_async._models.results import Completed, GeneratedImage
from flux2max_async.storage._local import LocalStorage
from flux2max_async.storage._protocol import Storage


class SessionImages(SessionLifetime):
    """The public methods for images."""

    _downloader: Downloader

    def _create_saver(
        self, save_to: str | PathLike[str] | Storage, name: Callable[[Completed], str] | None
    ) -> ImageSaver | StorageSaver:
        """Return what saves a stream's images.

        Raises:
            ConfigurationError: It is a URL, or neither a folder nor a storage.
        """
        if isinstance(save_to, str) and "://" in save_to:
            raise ConfigurationError(
                f"save_to is a folder or a storage: for {save_to!r}, use "
                f"save_to=flux2max_async.storage.ObjectStorage.from_url({save_to!r})"
            )
        if type(save_to) is LocalStorage:  # one that is derived may do something else
            save_to = save_to.folder
        if isinstance(save_to, (str, PathLike)):
            return ImageSaver(Path(save_to), name, self._downloader.fetch)
        if not callable(getattr(save_to, "create", None)) or isinstance(save_to, type):
            raise ConfigurationError(f"save_to must be a folder or a storage, not {save_to!r:.80}")
        return StorageSaver(save_to, name, self.download)

    async def save(self, image: GeneratedImage, path: str | PathLike[str], /) -> Path:
        """Download an image: streamed, retried, whole or not at all, without the API key; return the path.

        If its URL has expired, the task is polled once for a fresh one. Missing folders are created. Regular, writable
        files are replaced once the new one is complete, and so is the file to which a symbolic link leads. A path whose
        suffix is that of another format is logged as a warning.

        Raises:
            ResultExpiredError: The URL has expired, and so has the fresh one, if there was any.
            DownloadError: The image can't be downloaded, is larger than 100 MB, or can't be written to the path. If the
                path is a folder, nothing is downloaded.
        """
        return await self._get_supervisor().run_foreground(self._downloader.save(image, Path(path)))

    async def read(self, image: GeneratedImage, /) -> bytes:
        """Return the bytes of an image: retried, checked and renewed as by `save()`, with the same errors."""
        return await self._get_supervisor().run_foreground(self._downloader.read(image))

    def download(self, image: GeneratedImage, /) -> ImageDownload:
        """Return the bytes of an image as they come, for web responses and storage of your own.

        It begins when it is awaited, or entered with `async with`. It is retried, checked and renewed as by `save()`,
        with the same errors.
        """
        supervisor = self._get_supervisor()
        supervisor.check_caller()
        return ImageDownload(partial(self._downloader.download, image), supervisor.spawn)
