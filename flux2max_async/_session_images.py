"""What FluxSession inherits: downloading images."""

from functools import partial
from os import PathLike
from pathlib import Path

from flux2max_async._downloads.downloader import Downloader
from flux2max_async._downloads.image_download import ImageDownload
from flux2max_async._lifetime import SessionLifetime
from flux2max_async._models.results import GeneratedImage


class SessionImages(SessionLifetime):
    """The public methods for images."""

    _downloader: Downloader

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
