"""Object storage: S3, Google Cloud Storage, Azure, and what else obstore speaks.

An image is stored by one conditional PUT (If-None-Match: *), or, if it is large, by a multipart upload, which becomes
visible only when it is completed. No store that obstore speaks to completes a multipart upload on condition that the
name is free, so the name is looked up once more immediately before that.
"""

import asyncio
import importlib
import os
import re
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Generator
from contextlib import aclosing, contextmanager, suppress
from datetime import timedelta
from typing import Any, Self

from flux2max_async._exceptions import ConfigurationError, StorageError
from flux2max_async.storage._protocol import Storage, StoredImage

MARK = "flux2max-mark"
"""The object's metadata that says whose image it is; S3 shows it as `x-amz-meta-flux2max-mark`."""
_MAX_SINGLE_BYTES = 8 << 20
"""Larger images are uploaded in parts. So many bytes of each image may be in memory."""
_PART_BYTES = 5 << 20  # S3 accepts no smaller ones but the last
_ABORT_TIMEOUT = 10.0
"""Seconds for a cancelled upload to be aborted at the store."""
_SETTLE_TIME = 0.1
"""Seconds."""
_RETRIES: dict[str, Any] = {"max_retries": 8, "retry_timeout": timedelta(seconds=60)}
_SCHEMES = {"S3Store": ("s3", "bucket"), "GCSStore": ("gs", "bucket"), "AzureStore": ("az", "container_name")}
_STATUS = re.compile(r"status code: (\d+[^:\n]*)")
_CODE = re.compile(r"<Code>([^<]*)</Code>")
_MESSAGE = re.compile(r"<Message>([^<]*)</Message>")
_MAX_SHOWN = 300


class _NameTakenError(Exception):
    """The name was taken while the image was uploaded."""


class _ProbedError(Exception):
    """Ends the probing upload, which is then aborted."""


class _CancelledError(Exception):
    """Ends the upload of a call that was cancelled, which is then aborted."""


class ObjectStorage(Storage):
    """A bucket, or a prefix in it.

    Args:
        store: A store of obstore, `obstore.store.S3Store(...)` for example.
        prefix: What comes before the names; a slash follows it.

    Raises:
        ConfigurationError: obstore isn't installed.
    """

    def __init__(self, store: Any, prefix: str = "") -> None:
        self._obstore = _import("obstore")
        self._store = store
        self._prefix = f"{prefix.strip('/')}/" if prefix.strip("/") else ""
        self._url = url_of(store)

    @classmethod
    def from_url(cls, url: str, /, **options: Any) -> Self:
        """Return the storage of a URL: "s3://bucket/prefix", "gs://..." or "az://...".

        Args:
            url: The bucket, and the prefix of names in it.
            **options: Those of `obstore.store.from_url()`: `region`, `endpoint`, `credential_provider`, for example.
                What is missing comes from the environment, such as AWS_ACCESS_KEY_ID. An endpoint with http:// is
                accepted.

        Raises:
            ConfigurationError: The URL or an option is wrong, or obstore isn't installed.
        """
        return cls(open_store(url, **options))

    async def open(self) -> None:
        """Check that images can be stored: an upload is begun and aborted, which leaves nothing behind.

        S3 and Google Cloud Storage refuse that if the bucket doesn't exist, or the credentials may not write.
        """
        with self._translate(""):
            try:
                path = f"{self._prefix}.flux2max"
                await self._obstore.put_async(self._store, path, _Probe(), use_multipart=True)
            except _ProbedError:
                pass

    async def stat(self, name: str, /) -> StoredImage | None:
        with self._translate(name):
            try:
                found = await self._obstore.get_async(self._store, self._prefix + name, options={"head": True})
            except FileNotFoundError:
                return None
            return StoredImage(location=self._location(name), size=found.meta["size"], mark=found.attributes.get(MARK))

    async def create(self, name: str, data: AsyncIterable[bytes], /, *, content_type: str, mark: str) -> StoredImage:
        upload = _Upload(aiter(data))
        options = {"attributes": {"Content-Type": content_type, MARK: mark}}
        try:
            if await upload.fill():
                with self._translate(name):
                    put = self._obstore.put_async(
                        self._store,
                        self._prefix + name,
                        upload.content(),
                        mode="create",
                        use_multipart=False,
                        **options,
                    )
                    await put
            else:
                await self._put_in_parts(name, upload, options)
        except self._obstore.exceptions.AlreadyExistsError:
            raise FileExistsError(f"{self._location(name)} exists already") from None
        return StoredImage(location=self._location(name), size=upload.size, mark=mark)

    async def close(self) -> None:
        """Wait for the threads of obstore: if they hold objects when the interpreter ends, it aborts the process."""
        await asyncio.sleep(_SETTLE_TIME)

    async def _put_in_parts(self, name: str, upload: "_Upload", options: dict[str, Any]) -> None:
        async def parts() -> AsyncGenerator[bytes]:
            async for chunk in upload.rest():
                yield chunk
            if await self.stat(name) is not None:
                raise _NameTakenError

        async with aclosing(parts()) as chunks:
            put = asyncio.ensure_future(
                self._obstore.put_async(
                    self._store, self._prefix + name, chunks, chunk_size=_PART_BYTES, max_concurrency=1,
                    use_multipart=True, **options,
                )
            )  # fmt: skip
            try:
                await asyncio.wait([put])
            except asyncio.CancelledError:
                # Dropped, the upload would stay in the bucket, invisible and paid for.
                upload.cancel()
                with suppress(TimeoutError):
                    async with asyncio.timeout(_ABORT_TIMEOUT):
                        await asyncio.gather(put, return_exceptions=True)
                raise
            if upload.error is not None:
                put.exception()
                raise upload.error
            try:
                with self._translate(name):
                    put.result()
            except _NameTakenError:
                raise FileExistsError(f"{self._location(name)} exists already") from None

    def _location(self, name: str) -> str:
        return f"{self._url}{self._prefix}{name}"

    @contextmanager
    def _translate(self, name: str) -> Generator[None]:
        """Return a context that turns errors of the store into a StorageError."""
        exceptions = self._obstore.exceptions
        try:
            yield
        except (_NameTakenError, _ProbedError, exceptions.AlreadyExistsError):
            raise
        except (exceptions.BaseError, OSError, ValueError) as error:
            raise StorageError(f"can't store images in {self._location(name)}: {describe(error)}") from error


class _Upload:
    """The bytes of an image on their way to a store, with what was read ahead."""

    def __init__(self, data: AsyncIterator[bytes]) -> None:
        self._data = data
        self._cancelled = asyncio.get_running_loop().create_future()
        self._head: deque[bytes] = deque()
        self.size = 0
        self.error: BaseException | None = None
        """What `data` has raised."""

    async def fill(self) -> bool:
        """Read up to `_MAX_SINGLE_BYTES`; return whether that is everything."""
        async for chunk in self._data:
            self._head.append(chunk)
            self.size += len(chunk)
            if self.size > _MAX_SINGLE_BYTES:
                return False
        return True

    def content(self) -> bytes:
        """Return what was read, which is everything."""
        return b"".join(self._head)

    async def rest(self) -> AsyncGenerator[bytes]:
        """Yield what was read ahead, and then the rest."""
        while self._head:
            yield self._head.popleft()
        while chunk := await self._next():
            self.size += len(chunk)
            yield chunk

    def cancel(self) -> None:
        """Make `rest()` raise."""
        self._cancelled.cancel()

    async def _next(self) -> bytes:
        """Return the next bytes; nothing at the end."""
        step = asyncio.ensure_future(_step(self._data))
        await asyncio.wait([step, self._cancelled], return_when=asyncio.FIRST_COMPLETED)
        if not step.done():
            step.cancel()
            await asyncio.wait([step])
        if self._cancelled.done():
            raise _CancelledError
        try:
            return step.result()
        except BaseException as error:
            self.error = error
            raise


async def _step(data: AsyncIterator[bytes]) -> bytes:
    return await anext(data, b"")


class _Probe(AsyncIterator[bytes]):
    """The content of the probing upload."""

    async def __anext__(self) -> bytes:
        raise _ProbedError


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigurationError(
            "object storage needs obstore: pip install 'flux2max_async[object-storage]'"
        ) from error


def open_store(url: str, **options: Any) -> Any:
    """Return the store of obstore for a URL; the options are those of `ObjectStorage.from_url()`.

    Raises:
        ConfigurationError: The URL or an option is wrong, or obstore isn't installed.
    """
    store_module = _import("obstore.store")
    endpoint = options.get("endpoint") or os.environ.get("AWS_ENDPOINT_URL") or os.environ.get("AWS_ENDPOINT") or ""
    client = {"timeout": "120s", "allow_http": str(endpoint).startswith("http://")}
    options["client_options"] = client | dict(options.get("client_options") or {})
    options.setdefault("retry_config", _RETRIES)
    try:
        return store_module.from_url(url, **options)
    except Exception as error:  # noqa: BLE001 - obstore's own and built-in ones
        raise ConfigurationError(f"no object storage can be made of {url!r}: {describe(error)}") from None


def url_of(store: Any) -> str:
    """Return the URL of a store, with a slash at its end."""
    scheme, option = _SCHEMES.get(type(store).__name__, (type(store).__name__.removesuffix("Store").lower(), ""))
    bucket = str(getattr(store, "config", {}).get(option, "")) if option else ""
    prefix = str(getattr(store, "prefix", None) or "").strip("/")
    return "/".join([f"{scheme}:/", *filter(None, (bucket, prefix)), ""])


def describe(error: BaseException) -> str:
    """Return one line about an error of obstore, which has many, with the whole response."""
    text = str(error)
    parts = [match[1].strip() for pattern in (_STATUS, _CODE, _MESSAGE) if (match := pattern.search(text))]
    return ", ".join(parts) or text.partition("\n")[0][:_MAX_SHOWN] or repr(error)
