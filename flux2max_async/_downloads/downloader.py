"""Downloads images: into a part file beside the target, retried, and published only when complete."""

import random
import secrets
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from pathlib import Path

import anyio
import anyio.to_thread
import attrs

from flux2max_async._api.retry import may_poll_again
from flux2max_async._api.transport import Transport
from flux2max_async._downloads.image_format import FORMATS_BY_SUFFIX
from flux2max_async._downloads.inline_images import decode_inline_image
from flux2max_async._downloads.pace import DownloadSlots, Pace
from flux2max_async._downloads.retries import RETRY_WINDOW, YOUNG_AGE, Link, Retries
from flux2max_async._downloads.sinks import ConsumerPausedError, FileSink, MemorySink, Sink
from flux2max_async._downloads.targets import resolve_target
from flux2max_async._downloads.transfer import AttemptError, LinkRefusedError, Transfer
from flux2max_async._exceptions import (
    DownloadError,
    FluxError,
    ProtocolError,
    ResultExpiredError,
    SessionClosedError,
    TaskNotFoundError,
    TransportError,
)
from flux2max_async._models.results import NO_URL, GeneratedImage, TaskSnapshot, is_inline
from flux2max_async._stats import SessionCounters
from flux2max_async._text import get_logger
from flux2max_async._timeouts import Timeout
from flux2max_async.storage._local import translate_write_errors

log = get_logger("downloads")

_CHUNK_BYTES = 65_536


class Downloader:
    """Downloads the images of tasks.

    An attempt that fails is repeated for 60 s, whatever the timeout is, because the link of a task that has just ended
    may not work yet; not if there is no connection for a reason that lasts. An attempt that is slower than 1 KiB/s for
    30 s has failed. If an image's URL has expired, its task is polled once for a fresh one. An image whose URL is a
    `data:` URI needs no download.

    Args:
        transport: Opens the downloads.
        timeout: Maximum duration of one attempt in seconds, at least 120; infinite for no limit.
        poll: Polls a task once.
        stats: The session's counters.
    """

    def __init__(
        self,
        transport: Transport,
        timeout: float,
        poll: Callable[[str], Awaitable[TaskSnapshot]],
        stats: SessionCounters,
    ) -> None:
        self._transport = transport
        self._timeout = max(timeout, RETRY_WINDOW + YOUNG_AGE)
        self._poll = poll
        self._stats = stats
        self._slots = DownloadSlots(transport.max_downloads)

    async def save(self, image: GeneratedImage, target: Path) -> Path:
        """Download an image to a path; an existing file is replaced once the download is complete.

        A symbolic link stays, and the file is written to which it leads.

        Raises:
            DownloadError: As `fetch()` does, or what exists is not a regular, writable file.
        """
        with translate_write_errors(target):
            file = await anyio.to_thread.run_sync(resolve_target, target)
            part = file.with_name(f".{secrets.token_hex(8)}.part")
        image_format = await self.fetch(image, part, target)
        try:
            with translate_write_errors(target):
                await anyio.to_thread.run_sync(_publish, part, file)
        finally:
            part.unlink(missing_ok=True)
        named_format = FORMATS_BY_SUFFIX.get(target.suffix.lower(), image_format)
        if named_format != image_format:
            log.warning("%s has the name of a %s, but the image is a %s", target, named_format, image_format)
        return target

    async def read(self, image: GeneratedImage) -> bytes:
        """Return the bytes of an image.

        Raises:
            DownloadError: As `fetch()` does.
        """
        sink = MemorySink()
        await self.download(image, sink)
        return sink.content.getvalue()

    async def fetch(self, image: GeneratedImage, part: Path, target: Path) -> str:
        """Download an image into a part file, which exists afterwards only if the image is complete.

        Args:
            image: The image.
            part: The file to create, and its folder if that is missing.
            target: The path to which the caller will publish the file; named in errors.

        Returns:
            The image's format: "jpeg", "png", "webp", "gif" or "avif".

        Raises:
            ResultExpiredError: The URL has expired, and there is no fresh one that works.
            DownloadError: The image can't be downloaded, is larger than 100 MB, or can't be written.
        """
        with translate_write_errors(target):
            # Not in a worker thread: it takes microseconds, and if the wait for the thread were cancelled, the file
            # would be left behind.
            part.parent.mkdir(parents=True, exist_ok=True)
            with part.open("xb+") as file:
                try:
                    sink = FileSink(file)
                    image_format = await self.download(image, sink)
                    await sink.sync()
                except BaseException:
                    part.unlink(missing_ok=True)  # noqa: ASYNC240 - as above
                    raise
        return image_format

    async def download(self, image: GeneratedImage, sink: Sink) -> str:
        """Download an image into a sink, and return its format.

        Raises:
            ResultExpiredError: The URL has expired, and there is no fresh one that works.
            DownloadError: The image can't be downloaded, or is larger than 100 MB.
        """
        self._stats.downloading += 1
        try:
            return await self._download_with_retries(image, sink)
        except DownloadError as error:
            error.task_id = image.task_id
            raise
        finally:
            self._stats.downloading -= 1

    async def _download_with_retries(self, image: GeneratedImage, sink: Sink) -> str:
        link = Link(image.url, image.received_at)
        if image.url == NO_URL:
            link = await self._renew(link, image)
        transfer, retries = Transfer(sink, Pace(self._slots), self._stats), Retries()
        started = anyio.current_time()
        while True:
            try:
                return await self._attempt(link.url, transfer)
            except (TransportError, AttemptError) as error:
                failure = error
            except ConsumerPausedError:
                paused = anyio.current_time()
                await sink.wait_until_taken()
                started += anyio.current_time() - paused
                continue
            now = anyio.current_time()
            # Without a limit, a server that sends a byte for each request would be asked for days.
            if transfer.has_progressed and now < started + self._timeout:
                retries = Retries()
            is_over = retries.add(now, failure)
            time = datetime.now(UTC)
            if isinstance(failure, LinkRefusedError) and link.needs_renewal(now, time, is_over=is_over):
                refused, link = link, await self._renew(link, image)
                now = anyio.current_time()
                if link.is_fresh and not refused.is_young(time):
                    retries = Retries()
                    is_over = retries.add(now, failure)
                if link.url != refused.url:  # otherwise its server may have said when to come back
                    transfer.received = 0
                    continue
            if is_over:
                raise _final_error(failure, link, retries.failures, image.task_id) from failure
            at_most = link.until_renewal(now)
            await anyio.sleep(retries.next_delay(now, random.random(), at_most=at_most))

    async def _attempt(self, url: str, transfer: Transfer) -> str:
        if is_inline(url):
            return await _pass_inline_image(url, transfer.sink)
        try:
            async with transfer.pace.attempt():
                with Timeout(self._timeout, grace=RETRY_WINDOW):
                    return await transfer.attempt(self._transport, url)
        except TimeoutError as error:
            raise DownloadError(f"the download has not ended within {self._timeout:g} s") from error
        except ProtocolError as error:
            raise DownloadError(f"can't download: {error}") from error

    async def _renew(self, link: Link, image: GeneratedImage) -> Link:
        """Ask the task for a fresh URL; without one, a young URL may still begin to work.

        If the poll fails for a reason that isn't the task's, it is repeated, unless the URL is young.

        Raises:
            ResultExpiredError: There is none, and the URL is not young.
        """
        retries = Retries()
        while True:
            try:
                fresh = (await self._poll(image.task_id)).images[image.index]
            except SessionClosedError:
                raise
            except (FluxError, IndexError) as error:
                if link.url != NO_URL and link.is_young(datetime.now(UTC)):
                    return attrs.evolve(link, problem=error)
                now = anyio.current_time()
                is_answer = isinstance(error, (IndexError, TaskNotFoundError)) or not may_poll_again(
                    error, elapsed=None
                )
                if retries.add(now, error) or is_answer:
                    raise _expired("", image.task_id, error) from error
                delay = retries.next_delay(now, random.random())
            else:
                return Link(fresh.url, fresh.received_at, is_fresh=True)
            await anyio.sleep(delay)


async def _pass_inline_image(uri: str, sink: Sink) -> str:
    data, image_format = await anyio.to_thread.run_sync(decode_inline_image, uri)
    sink.restart()
    sink.begin(image_format, len(data))
    for start in range(0, len(data), _CHUNK_BYTES):
        await sink.write(data[start : start + _CHUNK_BYTES])
    await sink.flush()
    return image_format


def _publish(part: Path, file: Path) -> None:
    # Once more: the download may have taken minutes.
    part.replace(resolve_target(file))


def _final_error(failure: Exception, link: Link, failures: int, task_id: str) -> DownloadError:
    if isinstance(failure, LinkRefusedError):
        return _expired(f" ({failure})", task_id, link.problem)
    if getattr(failure, "fault", None) is not None:
        return DownloadError(f"can't download: {failure}")
    return DownloadError(f"the download failed {failures} times in a row, for {RETRY_WINDOW:g} s: {failure}")


def _expired(detail: str, task_id: str, problem: Exception | None) -> ResultExpiredError:
    rest = (
        f"and task {task_id} has no fresh one: {problem}" if problem else f"and so has the fresh one of task {task_id}"
    )
    return ResultExpiredError(f"the image's URL has expired{detail}, {rest}")
