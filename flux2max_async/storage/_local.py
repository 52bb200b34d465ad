"""A local folder."""

import contextlib
import os
import secrets
import tempfile
from collections.abc import AsyncGenerator, AsyncIterable, Generator
from os import PathLike
from pathlib import Path
from typing import IO

import anyio.to_thread

from flux2max_async._exceptions import FluxError, StorageError
from flux2max_async.storage._protocol import Storage, StoredImage


class _DataError(Exception):
    """The data to store has raised an error, which is none of the folder's."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error


class LocalStorage(Storage):
    """A local folder: what `save_to="pictures"` stands for.

    Files have no marks: a stream recognizes its images by their names in the journal, their sizes and contents.

    Args:
        folder: Created if it doesn't exist.
    """

    def __init__(self, folder: str | PathLike[str]) -> None:
        self.folder: Path = Path(folder)

    async def open(self) -> None:
        with translate_write_errors(self.folder):
            await anyio.to_thread.run_sync(check_writable, self.folder)

    async def stat(self, name: str, /) -> StoredImage | None:
        path = self.folder / name
        with translate_write_errors(path):
            return await anyio.to_thread.run_sync(_stat, path)

    async def create(
        self,
        name: str,
        data: AsyncIterable[bytes],
        /,
        *,
        content_type: str,  # noqa: ARG002 - the suffix tells
        mark: str,  # noqa: ARG002 - files have none
    ) -> StoredImage:
        path, part = self.folder / name, self.folder / f".{secrets.token_hex(8)}.part"
        try:
            with translate_write_errors(path):
                try:  # not in a worker thread: if the wait for it were cancelled, the file would be left behind
                    with part.open("xb") as file:
                        async with contextlib.aclosing(_read(data)) as chunks:
                            async for chunk in chunks:
                                await anyio.to_thread.run_sync(file.write, chunk)
                        await anyio.to_thread.run_sync(_sync, file)
                    size = await anyio.to_thread.run_sync(_publish, part, path)
                finally:
                    part.unlink(missing_ok=True)
        except _DataError as failure:
            raise failure.error from failure.error.__cause__
        if size is None:
            raise FileExistsError(f"{path} exists already")
        return StoredImage(location=str(path), size=size)

    async def close(self) -> None:
        """Do nothing: nothing is open."""


def check_writable(folder: Path) -> None:
    """Create a folder, and check that files can be written to it.

    Raises:
        OSError: They can't.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass  # it has no name, if the file system can do that: a process that is killed here leaves nothing behind


@contextlib.contextmanager
def translate_write_errors(target: Path) -> Generator[None]:
    """Return a context that turns errors of the file system into one that names the target.

    Raises:
        StorageError: The target can't be written, or has no valid name.
    """
    try:
        yield
    except FluxError:
        raise
    except OSError as error:
        raise StorageError(f"can't write {str(target)!r}: {error.strerror or error}") from error
    except ValueError as error:
        raise StorageError(f"can't write {str(target)!r}: {error}") from error


async def _read(data: AsyncIterable[bytes]) -> AsyncGenerator[bytes]:
    try:
        async for chunk in data:
            yield chunk
    except Exception as error:
        raise _DataError(error) from error


def _stat(path: Path) -> StoredImage | None:
    if not os.path.lexists(path):
        return None
    return StoredImage(location=str(path), size=path.lstat().st_size)


def _sync(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())


def _publish(part: Path, path: Path) -> int | None:
    """Rename a file, and return its size; None if the name is taken."""
    size = part.stat().st_size
    try:
        path.hardlink_to(part)
    except OSError:
        if os.path.lexists(path):
            return None
        move(part, path)
    return size


def move(part: Path, path: Path) -> None:
    """Rename a file on a file system without links: an empty file reserves its name.

    Raises:
        FileExistsError: The name is taken.
    """
    path.touch(exist_ok=False)
    try:
        part.replace(path)
    except BaseException:
        path.unlink()
        raise
