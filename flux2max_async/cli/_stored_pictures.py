"""Pictures in object storage, as the page shows them: read for their thumbnails, and linked to."""

import importlib
from contextlib import suppress
from datetime import timedelta
from functools import cached_property
from typing import Any, Self
from urllib.parse import quote, urlsplit

import attrs

from flux2max_async._exceptions import StorageError
from flux2max_async.storage._objects import describe, open_store, url_of

_MAX_BYTES = 32 << 20
"""Larger pictures are not read. As many bytes for each thread that reads may be in memory."""
_RETRIES: dict[str, Any] = {"max_retries": 2, "retry_timeout": timedelta(seconds=5)}
_CLIENT_OPTIONS = {"timeout": "20s", "connect_timeout": "5s"}
"""Nobody waits long for a thumbnail."""
_SIGNATURE_LIFETIME = timedelta(seconds=60)


@attrs.define
class StoredPictures:
    """The pictures in a bucket, or below a prefix in it."""

    store: Any
    """A store of obstore."""
    root: str
    """What comes before the name in a picture's location, with a slash at its end."""

    @classmethod
    def from_url(cls, url: str) -> Self:
        """Return the pictures below a URL like "s3://bucket/prefix".

        Raises:
            ConfigurationError: The URL is wrong, or obstore isn't installed.
        """
        store = open_store(url, retry_config=_RETRIES, client_options=_CLIENT_OPTIONS)
        return cls(store, url_of(store))

    def read(self, location: str) -> bytes | None:
        """Return a picture; None if it is somewhere else, is no longer there, or is too large.

        Raises:
            StorageError: The store can't be read.
        """
        if (name := self._name(location)) is None:
            return None
        try:
            found = self.store.get(name)
            return bytes(found.bytes()) if found.meta["size"] <= _MAX_BYTES else None
        except FileNotFoundError:
            return None
        except Exception as error:  # obstore's own and built-in ones
            raise StorageError(f"can't read {location}: {describe(error)}") from error

    def link(self, location: str) -> str | None:
        """Return the address of a picture that a browser can open, if it may read the bucket; None if there is none."""
        name = self._name(location)
        return None if name is None or self._base_address is None else f"{self._base_address}{quote(name)}"

    def _name(self, location: str) -> str | None:
        """Return the name of a picture; None for a location that the stream has not chosen, or in another store."""
        name = location.removeprefix(self.root)
        return name if name != location and name not in {"", ".", ".."} and "/" not in name else None

    @cached_property
    def _base_address(self) -> str | None:
        """The address that the store itself uses, without the name: where a signed link leads to."""
        with suppress(Exception):  # not every store has links, and some credentials can't sign
            signed = importlib.import_module("obstore").sign(self.store, "GET", "x", _SIGNATURE_LIFETIME)
            address = urlsplit(signed)
            host = address.netloc.rpartition("@")[2]  # no password of an endpoint
            return f"{address.scheme}://{host}{address.path.removesuffix('x')}"
        return None
