"""The session: lifetimes, places in flight, and the face that callers see."""

import asyncio
import math
import platform
from collections.abc import AsyncIterable, Coroutine, Iterable
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import aiohttp
import anyio
import attrs

from flux2max_async._download import download
from flux2max_async._errors import DownloadError, FluxError, InvalidRequestError, ResultExpiredError, SessionClosedError
from flux2max_async._gateway import Gateway
from flux2max_async._learned import LearnedSchedule
from flux2max_async._poller import GenerationTask, Poller
from flux2max_async._request import GenerationRequest, as_request
from flux2max_async._schedule import PollSchedule
from flux2max_async._settings import checked_base_url, checked_key, checked_places, checked_rate, checked_seconds
from flux2max_async._stats import SessionStats
from flux2max_async._stream import OutcomeStream
from flux2max_async._supervisor import Supervisor, closed_error
from flux2max_async._task import Completed, GeneratedImage, TaskSnapshot
from flux2max_async._transport import Transport
from flux2max_async._version import __version__
from flux2max_async._wire import poll_call

T = TypeVar("T")

_USER_AGENT = f"flux2max_async/{__version__} aiohttp/{aiohttp.__version__} Python/{platform.python_version()}"


class FluxSession:
    """Submits FLUX.2 [max] generations, polls each task, and delivers each as it completes or fails.

    One session holds one connection pool, one in-flight limit and one learned poll schedule: share it, for a whole
    web application or a whole batch. It may be entered in one asyncio task and closed in another, and entered again
    after it was closed. Closing it ends what is still waited for with `Failed(SessionClosedError)`, quickly, and logs
    the ids of unfinished tasks in one line.

    A submit is repeated only when it certainly created nothing (no connection, 429, 503), until the deadline, and
    then the last error is raised. A 429 slows the whole session: submits pause as long as the service says, then one
    probes at a time. Polls are repeated on any transport error, 408, 429, 5xx, a 404 soon after the submit, and an
    unreadable answer (five in a row are a ProtocolError), until the deadline.

    Args:
        api_key: The key; else the environment's FLUX2MAX_API_KEY.
        base_url: The gateway; else FLUX2MAX_BASE_URL, else https://cloud.vtrix.ai. Plain http only to this machine.
        max_in_flight: Places: tasks submitted and not yet ended, waited for or not. The model's maker allows 24.
        schedule: When to poll; a `LearnedSchedule` where none is given.
        deadline: Seconds for a task, from its submit; None waits without limit.
        max_polls_per_second: Of all tasks together; None sets no limit. Polls become dearer, and so rarer, before it is
            reached, and for a while after each 429.
        request_timeout: Seconds for one HTTP exchange, the answer's last byte included.
        http_session: A borrowed aiohttp session, for a proxy or tracing of your own; it is never closed by us.

    Raises:
        ConfigurationError: No key, a malformed key, http:// to another host, a senseless limit.
    """

    def __init__(
        self,
        api_key: str | None = None,
        *,
        base_url: str | None = None,
        max_in_flight: int = 24,
        schedule: PollSchedule | None = None,
        deadline: float | None = 600.0,
        max_polls_per_second: float | None = 20.0,
        request_timeout: float = 30.0,
        http_session: aiohttp.ClientSession | None = None,
    ) -> None:
        self._max_in_flight = checked_places(max_in_flight)
        self._deadline = math.inf if deadline is None else checked_seconds("deadline", deadline)
        self._polls_per_second = checked_rate("max_polls_per_second", max_polls_per_second)
        self._transport = Transport(
            checked_key(api_key),
            checked_base_url(base_url),
            user_agent=_USER_AGENT,
            timeout=checked_seconds("request_timeout", request_timeout),
            http=http_session,
        )
        self._schedule = LearnedSchedule() if schedule is None else schedule
        self._stats = SessionStats()
        self._supervisor: Supervisor | None = None

    # ------------------------------------------------------------------ lifetime

    async def __aenter__(self) -> Self:
        if self._supervisor is not None and not self._supervisor.loop.is_closed():
            raise SessionClosedError("the session is open already: enter it once, and share it")
        self._transport.open(self._max_in_flight)
        self._stats.in_flight = 0
        gateway = Gateway(self._transport, self._stats, self._max_in_flight, self._polls_per_second)
        self._supervisor = Supervisor(gateway, self._stats, self._max_in_flight)
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close the session: what is still waited for ends with SessionClosedError. Doing it twice does no harm."""
        supervisor = self._supervisor
        if supervisor is None or supervisor.loop.is_closed():
            self._supervisor = None
            return
        if supervisor.closing is None:
            supervisor.closing = asyncio.create_task(self._close(supervisor))
        try:
            await asyncio.shield(supervisor.closing)
        except asyncio.CancelledError:
            if anyio.current_effective_deadline() > -math.inf:
                raise
            # In a cancelled scope of anyio nothing else could be waited for; this takes two seconds at most.
            with anyio.CancelScope(shield=True):
                await asyncio.shield(supervisor.closing)
            raise

    # ------------------------------------------------------------------ requests

    async def generate(self, request: str | GenerationRequest, /, **params: Any) -> Completed:
        """Submit one request and wait for it.

        Cancelling it (a web client that left, `asyncio.timeout`) cancels the wait. A call that is on the wire is
        finished in the background so that its id is not lost, and the task keeps its place until it ends, since the
        service counts it.

        Args:
            request: A prompt, or a whole request.
            params: Those of `GenerationRequest`; beside a whole request they replace its own.

        Raises:
            FluxError: It came to nothing; the tree in `flux2max_async._errors` tells the kinds apart.
        """
        poller = await self._start(as_request(request, **params))
        return (await _waited_for(poller, poller.ended)).unwrap()

    async def submit(self, request: str | GenerationRequest, /, **params: Any) -> GenerationTask:
        """Wait for a free place, submit, and return as soon as the service has given the task an id.

        Cancelling it is like cancelling `generate()`.

        Args:
            request: A prompt, or a whole request.
            params: Those of `GenerationRequest`; beside a whole request they replace its own.

        Raises:
            FluxError: There is no task, or nobody knows whether there is (SubmissionUncertainError).
        """
        poller = await self._start(as_request(request, **params))
        await _waited_for(poller, poller.answered)
        if poller.task_id is None:
            poller.ended.result().unwrap()
        return GenerationTask(poller)

    def stream(
        self, requests: Iterable[str | GenerationRequest] | AsyncIterable[str | GenerationRequest], /
    ) -> OutcomeStream:
        """Submit lazily (never more than max_in_flight ahead of the consumer) and yield each outcome as it comes.

        A request or task that fails is yielded. What dooms all the rest (AuthenticationError,
        InsufficientBalanceError, PermissionDeniedError) is yielded for the request that met it and stops new
        submissions; what is already submitted is still polled and yielded, and then the error is raised. The same
        holds when the source itself raises.

        Args:
            requests: Prompts or requests, from anything that can be iterated over; it may be endless.
        """
        if isinstance(requests, (str, GenerationRequest)):
            raise InvalidRequestError("stream() takes many requests: put a single one into a list", "requests")
        return OutcomeStream(
            requests,
            start=self._start,
            spawn=self._spawn,
            ahead=self._max_in_flight,
        )

    def attach(self, task_id: str, /, *, request: GenerationRequest | None = None) -> GenerationTask:
        """Poll a task that was submitted earlier, here or in another process.

        It is looked at at once, with a deadline counted from now, and without taking a place.

        Args:
            task_id: What the service called it.
            request: What was asked for, if it is known; the outcome will name it.
        """
        supervisor = self._running()
        poller = Poller(supervisor.gateway, self._schedule, self._deadline, request, _checked_id(task_id))
        supervisor.follow(poller)
        return GenerationTask(poller)

    async def fetch(self, task_id: str, /) -> TaskSnapshot:
        """Look at a task once, without waiting for anything.

        Raises:
            FluxError: There was no answer, or none that is a task.
        """
        supervisor = self._running()
        return await supervisor.host(supervisor.gateway.poll(poll_call(_checked_id(task_id)), task_id))

    async def save(self, image: GeneratedImage, path: str | PathLike[str], /) -> Path:
        """Download a result: streamed, retried, whole or not at all, and without the API key.

        When its url has expired, the task is asked once for a fresh one. Folders that are missing are made; a file (or
        a link) that is there already is replaced in the moment when the new one is whole.

        Args:
            image: One of `Completed.images`.
            path: The file to write.

        Returns:
            The path.

        Raises:
            ResultExpiredError: The url has expired, and so has the fresh one, if there was any.
            DownloadError: The picture can't be fetched, is larger than 100 MB, or can't be written.
        """
        return await self._running().host(self._save(image, Path(path)))

    @property
    def stats(self) -> SessionStats:
        """The counts so far."""
        stats = attrs.evolve(self._stats)
        if isinstance(self._schedule, LearnedSchedule):
            stats.median_duration = self._schedule.percentile(50)
            stats.p90_duration = self._schedule.percentile(90)
        return stats

    # ------------------------------------------------------------------ behind the face

    async def _save(self, image: GeneratedImage, target: Path) -> Path:
        try:
            async with asyncio.timeout(None if self._deadline == math.inf else self._deadline):
                try:
                    await download(self._transport, image.url, target)
                except ResultExpiredError:
                    await download(self._transport, await self._fresh_url(image), target)
        except TimeoutError as error:
            raise DownloadError(f"the download has not ended within {self._deadline:g} s") from error
        return target

    async def _fresh_url(self, image: GeneratedImage) -> str:
        try:
            snapshot = await self.fetch(image.task_id)
            return snapshot.images[image.index].url
        except (FluxError, IndexError) as error:
            raise ResultExpiredError(
                f"the picture's url has expired, and task {image.task_id} gives no fresh one: {error}"
            ) from error

    async def _close(self, supervisor: Supervisor) -> None:
        await supervisor.close()
        await self._transport.close()
        self._supervisor = None

    async def _start(self, request: GenerationRequest) -> Poller:
        supervisor = self._running()
        # Who is cancelled already stops here; and a source that never waits leaves the event loop room.
        await asyncio.sleep(0)
        await supervisor.places.acquire()
        if supervisor.closing:
            supervisor.places.release()
            raise closed_error()
        poller = Poller(supervisor.gateway, self._schedule, self._deadline, request)
        supervisor.follow(poller, gives_back=supervisor.places)
        return poller

    def _spawn(self, work: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
        try:
            return self._running().spawn(work)
        except SessionClosedError:
            work.close()
            raise

    def _running(self) -> "Supervisor":
        if self._supervisor is None or self._supervisor.closing:
            raise closed_error()
        return self._supervisor


async def _waited_for(poller: Poller, future: "asyncio.Future[T]") -> T:
    """Wait without owning: who is cancelled here withdraws what isn't submitted yet, and nothing else."""
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        poller.withdraw(SessionClosedError("the caller was cancelled before the request was submitted"))
        raise


def _checked_id(task_id: str) -> str:
    if not isinstance(task_id, str) or not task_id:
        raise InvalidRequestError(f"task_id must be text that is not empty, not {task_id!r}", "task_id")
    return task_id
