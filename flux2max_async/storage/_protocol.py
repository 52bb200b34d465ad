"""The protocol between a stream and its storage."""

from collections.abc import AsyncIterable
from typing import Protocol

import attrs


@attrs.frozen(kw_only=True)
class StoredImage:
    """An image in a storage."""

    location: str
    """A path, or an address like "s3://bucket/prefix/fox.jpeg"."""
    size: int
    """Bytes."""
    mark: str | None = None
    """Whose image it is ("<task id>/<index>"); None if nobody can tell."""


class Storage(Protocol):
    """Where `stream(save_to=...)` puts images.

    The stream opens and closes it, and many of its tasks use it at once. All methods raise StorageError if the storage
    refuses, which stops the stream like a full disk.
    """

    async def open(self) -> None:
        """Check that images can be stored; it fails before anything is submitted."""

    async def stat(self, name: str, /) -> StoredImage | None:
        """Return the image of a name; None if the name is free."""
        ...

    async def create(self, name: str, data: AsyncIterable[bytes], /, *, content_type: str, mark: str) -> StoredImage:
        """Store a new image, whole or not at all: nothing is left if `data` raises or the call is cancelled.

        Args:
            name: The file name.
            data: The bytes.
            content_type: "image/jpeg", for example.
            mark: Whose image it is; `stat()` returns it.

        Raises:
            FileExistsError: The name is taken, by whatever.
        """
        ...

    async def close(self) -> None:
        """Release what `open()` has opened."""
