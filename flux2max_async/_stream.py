"""A stream of outcomes: requests go in lazily, outcomes come out in order of completion."""

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Coroutine, Iterable
from types import TracebackType
from typing import Any, Protocol, Self

import attrs

from flux2max_async._api.retry import is_disk_failure, is_fatal_for_batch
from flux2max_async._downloads.saver import ImageSaver
from flux2max_async._exceptions import FluxError, SessionClosedError
from flux2max_async._models.request import GenerationRequest, as_request
from flux2max_async._models.results import Completed, Failed, Outcome
from flux2max_async._tasks.handle import GenerationTask
from flux2max_async._tasks.runner import TaskRunner

Requests = Iterable[str | GenerationRequest] | AsyncIterable[str | GenerationRequest]

_UNANSWERED = 5.0
"""Seconds that leaving a stream waits for the ids of submits that are on the wire."""


Start = Callable[[GenerationRequest], Awaitable[TaskRunner]]
"""Waits for a place, then submits and follows in the background."""


class Spawn(Protocol):
    """Runs something in the background, as long as the session is open."""

    def __call__(self, work: Coroutine[Any, Any, None], *, until_drain: bool = False) -> "asyncio.Task[None]":
        """Give the task that runs it; until_drain tells that it might never end by itself."""
        ...


class OutcomeStream(AsyncIterator[Outcome]):
    """Outcomes in order of completion.

    Leaving it early, by `async with` or by dropping it, stops new submissions; what is submitted already is still
    followed by the session, and `unfinished` names it.
    """

    def __init__(self, requests: Requests, *, start: Start, spawn: Spawn, ahead: int, saver: ImageSaver | None) -> None:
        self._feed = _Feed(requests, start, spawn, ahead, saver)

    @property
    def unfinished(self) -> tuple[GenerationTask, ...]:
        """The tasks that were submitted and whose outcome was not delivered."""
        return tuple(GenerationTask(poller) for poller in self._feed.undelivered if poller.task_id is not None)

    async def __anext__(self) -> Outcome:
        return await self._feed.next()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Stop submitting, and wait briefly until each submit on the wire has its id."""
        await self._feed.close()

    def __del__(self) -> None:
        # Dropped in the middle of a loop: nobody will take what further submissions would cost.
        if hasattr(self, "_feed"):
            self._feed.drop()


class _Feed:
    """What goes on behind a stream. It doesn't know its stream, so that dropping that is noticed."""

    def __init__(self, requests: Requests, start: Start, spawn: Spawn, ahead: int, saver: ImageSaver | None) -> None:
        self.undelivered: dict[TaskRunner, None] = {}
        """In order of submission."""
        self._start = start
        self._spawn = spawn
        self._saver = saver
        self._pull = _puller(requests)
        self._credit = _Credit(ahead)
        """One for each request that may be pulled before another outcome is delivered."""
        self._ready: deque[tuple[Outcome, TaskRunner | None]] = deque()
        self._producer: asyncio.Task[None] | None = None
        self._doom: BaseException | None = None
        """What to raise after the last outcome."""
        self._dry = False
        """Nothing more will be pulled."""
        self._stopped = False
        """Nothing more will be submitted, of what was pulled neither."""
        self._closed = False
        self._news: asyncio.Event | None = None

    async def next(self) -> Outcome:
        if self._producer is None and not self._dry:
            self._producer = self._spawn(self._produce(), until_drain=True)
        while not self._closed:
            if self._ready:
                outcome, poller = self._ready.popleft()
                if poller is not None:
                    del self.undelivered[poller]
                self._credit.give()
                return outcome
            if self._dry and not self.undelivered:
                break
            self._news = self._news or asyncio.Event()
            await self._news.wait()
        doom, self._doom = self._doom, None
        if doom is not None:
            raise doom
        raise StopAsyncIteration

    def stop(self, doom: FluxError | None) -> None:
        """Submit nothing more; what is submitted already is followed and delivered, and then the doom raised."""
        if self._stopped:
            return
        self._stopped = True
        if self._doom is None and not (self._dry and isinstance(doom, SessionClosedError)):
            self._doom = doom
        self._dry = True
        if self._producer is not None:
            self._producer.cancel()
            reason = doom if isinstance(doom, FluxError) else SessionClosedError("the stream was left")
            for poller in self.undelivered:
                poller.withdraw(reason)
        self._tell()

    def drop(self) -> None:
        """Stop from wherever the garbage collector runs, which may be another thread, or after the event loop's end."""
        if self._producer is not None:
            with contextlib.suppress(RuntimeError):
                self._producer.get_loop().call_soon_threadsafe(self.stop, None)

    async def close(self) -> None:
        self.stop(None)
        self._closed = True
        self._doom = None
        self._tell()
        if unanswered := [poller.answered for poller in self.undelivered if not poller.answered.done()]:
            await asyncio.wait(unanswered, timeout=_UNANSWERED)

    async def _produce(self) -> None:
        request: GenerationRequest | None = None
        try:
            if self._saver is not None:
                await self._saver.prepare()
            while True:
                await self._credit.take()
                item = await self._pull()
                try:
                    request = as_request(item)
                    poller = await self._start(request)
                except FluxError as error:
                    self._refuse(request, error)
                else:
                    poller.lend = self._credit.give
                    self.undelivered[poller] = None
                    poller.when_ended(self._arrived)
                request = None
        except StopAsyncIteration:
            self._dry = True
            self._tell()
        except asyncio.CancelledError as cancelled:
            task = asyncio.current_task()
            if task is not None and not task.cancelling():
                self._source_failed(RuntimeError("the source of the requests was cancelled"), cancelled)
                return
            # Either the stream was stopped, or its session ends.
            self.stop(SessionClosedError("the session was closed before all requests were submitted"))
            if request is not None and isinstance(self._doom, FluxError):
                self._refuse(request, self._doom)
            raise
        except BaseException as error:  # noqa: BLE001 - the source is the caller's, and so are its errors
            self._source_failed(error, error.__cause__)

    def _source_failed(self, error: BaseException, cause: BaseException | None) -> None:
        """End with the source's own error, after all that it gave is delivered."""
        error.__cause__ = cause
        self._dry = True
        self._doom = error
        self._tell()

    def _arrived(self, poller: TaskRunner, outcome: Outcome) -> None:
        if self._saver is None or isinstance(outcome, Failed):
            self._deliver(poller, outcome)
            return
        try:
            self._spawn(self._save(self._saver, poller, outcome))
        except SessionClosedError as error:
            self._deliver(poller, attrs.evolve(outcome, save_error=error))

    async def _save(self, saver: ImageSaver, poller: TaskRunner, outcome: Completed) -> None:
        saved = attrs.evolve(outcome, save_error=SessionClosedError("the session was closed before all was saved"))
        try:
            saved = await saver.save(outcome, poller.page)
        finally:
            if saved.save_error is not None and is_disk_failure(saved.save_error):
                self.stop(saved.save_error)
            self._deliver(poller, saved)

    def _deliver(self, poller: TaskRunner, outcome: Outcome) -> None:
        self._ready.append((outcome, poller))
        if isinstance(outcome, Failed) and _ends_the_stream(outcome.error):
            self.stop(outcome.error)
        self._tell()

    def _refuse(self, request: GenerationRequest | None, error: FluxError) -> None:
        """Deliver a request that was pulled and never submitted: nothing pulled is lost."""
        self._ready.append((Failed(None, request, error, 0.0, 0), None))
        if _ends_the_stream(error):
            self.stop(error)
        self._tell()

    def _tell(self) -> None:
        if self._news is not None:
            self._news.set()
            self._news = None


class _Credit:
    """How many requests a stream may still pull before another outcome is delivered; below nothing, it is in debt."""

    __slots__ = ("_amount", "_given")

    def __init__(self, amount: int) -> None:
        self._amount = amount
        self._given = asyncio.Event()

    async def take(self) -> None:
        """Wait for one."""
        while self._amount < 1:
            self._given.clear()
            await self._given.wait()
        self._amount -= 1

    def give(self, amount: int = 1) -> None:
        """Give some, or take what has been given."""
        self._amount += amount
        self._given.set()


def _ends_the_stream(error: FluxError) -> bool:
    return is_fatal_for_batch(error) or isinstance(error, SessionClosedError)


def _puller(requests: Requests) -> Callable[[], Awaitable[str | GenerationRequest]]:
    """Give what pulls one more request, and raises StopAsyncIteration at the end."""
    if isinstance(requests, AsyncIterable):
        return aiter(requests).__anext__
    iterator = iter(requests)

    async def pull() -> str | GenerationRequest:
        for request in iterator:
            return request
        raise StopAsyncIteration

    return pull
