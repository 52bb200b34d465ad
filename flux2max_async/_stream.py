"""A stream of outcomes: requests go in lazily, outcomes come out in order of completion."""

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Self

import attrs

from flux2max_async._api.retry import is_disk_failure, is_fatal_for_batch
from flux2max_async._downloads.replays import SavedImageFinder
from flux2max_async._downloads.saver import ImageSaver
from flux2max_async._downloads.storage_saver import StorageSaver
from flux2max_async._exceptions import DownloadError, FluxError, SessionClosedError
from flux2max_async._models.request import GenerationRequest, as_request
from flux2max_async._models.results import Completed, Failed, Outcome
from flux2max_async._shutdown import Shutdown
from flux2max_async._stream_input import LookAhead, Requests, source_of, why_not_sent
from flux2max_async._tasks.context import Spawn
from flux2max_async._tasks.handle import GenerationTask
from flux2max_async._tasks.runner import TaskRunner
from flux2max_async._timeouts import wait

Start = Callable[[GenerationRequest], Awaitable[TaskRunner]]
"""Starts a request and returns its runner, which the stream has joined with its priority."""

_ANSWER_TIMEOUT = 5.0
"""Seconds that closing a stream waits for the ids of submits that are on the wire."""


class OutcomeStream(AsyncIterator[Outcome]):
    """Outcomes in order of completion.

    Leaving it early, by `async with` or by dropping it, stops new submissions; what is submitted already is still
    polled by the session, and `unfinished` names it.
    """

    def __init__(
        self,
        requests: Requests,
        *,
        start: Start,
        spawn: Spawn,
        look_ahead: int,
        priority: int,
        saver: ImageSaver | StorageSaver | None,
        check_caller: Callable[[], None],
        shutdown: Shutdown,
    ) -> None:
        self._pipeline = _Pipeline(requests, start, spawn, look_ahead, priority, saver, shutdown)
        self._check_caller = check_caller

    @property
    def unfinished(self) -> tuple[GenerationTask, ...]:
        """The tasks that were submitted and whose outcome was not delivered."""
        runners = dict.fromkeys(item.runner for item in self._pipeline.undelivered)
        return tuple(GenerationTask(runner) for runner in runners if runner.task_id is not None)

    async def __anext__(self) -> Outcome:
        self._check_caller()
        return await self._pipeline.next()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Stop submitting, and wait briefly until each submit on the wire has its id."""
        self._check_caller()
        await self._pipeline.close()

    def __del__(self) -> None:
        # Dropped in the middle of a loop: nobody would take what further submissions cost.
        if hasattr(self, "_pipeline"):
            self._pipeline.drop()


@attrs.define(eq=False)
class _Item:
    """One request of a stream; observes its runner."""

    pipeline: "_Pipeline"
    request: GenerationRequest
    runner: TaskRunner

    def on_waiting_elsewhere(self, *, waiting: bool) -> None:
        """Allow the stream to pull another request while this one waits for another process."""
        self.pipeline.look_ahead.release(1 if waiting else -1)

    def on_ended(self, runner: TaskRunner, outcome: Outcome) -> None:
        """Pass the outcome on, to be saved or delivered."""
        if outcome.request is not self.request:  # equal requests share a runner
            outcome = attrs.evolve(outcome, request=self.request)
        self.pipeline.on_ended(self, runner, outcome)


class _Pipeline:
    """What happens behind a stream. It has no reference to the stream, so that dropping the stream is noticed.

    States of the producer: not started (until the first `next()`), pulling, exhausted (the source has ended or
    failed), stopped (nothing more is submitted, not even what was pulled). After the last outcome `next()` raises
    `_error`, if there is one. `close()` also stops the delivery.

    Each pulled request is one item, which moves from running over saving, if there is a saver and the task completed,
    to ready, and then to the consumer. Invariant: every item becomes ready on every path, since its runner ends on
    every path and the end of its saving is observed by a callback, which is called even if saving is cancelled before
    its first step. The same holds for the producer.
    """

    def __init__(
        self,
        requests: Requests,
        start: Start,
        spawn: Spawn,
        look_ahead: int,
        priority: int,
        saver: ImageSaver | StorageSaver | None,
        shutdown: Shutdown,
    ) -> None:
        self.undelivered: dict[_Item, None] = {}
        """In order of submission."""
        self.look_ahead = LookAhead(look_ahead)
        self._start = start
        self._spawn = spawn
        self._priority = priority
        self._saver = saver
        self._shutdown = shutdown
        self._finder = SavedImageFinder(saver, spawn) if isinstance(saver, ImageSaver) else None
        self._max_saving = 2 * look_ahead
        """So many items may be saving without counting as look-ahead: downloads may take as long as tasks do."""
        self._unready = 0
        """Items that will be delivered."""
        self._saving = 0
        self._has_saved = False
        """Until one image is on the disk, saving counts as look-ahead: a disk that is full costs no further task."""
        self._next_request = source_of(requests)
        self._ready: deque[tuple[Outcome, _Item | None]] = deque()
        self._producer: asyncio.Task[None] | None = None
        self._error: BaseException | None = None
        self._exhausted = False
        self._stopped = False
        self._closed = False
        self._changed: asyncio.Event | None = None

    # ------------------------------------------------------------------ the consumer

    async def next(self) -> Outcome:
        if self._producer is None and not self._exhausted:
            self._producer = self._spawn(self._produce(), until_drain=True)
            self._producer.add_done_callback(self._on_producer_done)
        while not self._closed:
            if self._ready:
                outcome, item = self._ready.popleft()
                if item is not None:
                    del self.undelivered[item]
                self.look_ahead.release()
                return outcome
            if self._exhausted and not self.undelivered:
                break
            await self._wait_for_change()
        error, self._error = self._error, None
        if error is not None:
            raise error
        raise StopAsyncIteration

    async def _wait_for_change(self) -> None:
        self._changed = self._changed or asyncio.Event()
        await self._changed.wait()

    def stop(self, error: FluxError | None) -> None:
        """Submit nothing more; deliver what is submitted already, and then raise the error."""
        if self._stopped:
            return
        self._stopped = True
        if self._error is None and not (self._exhausted and isinstance(error, SessionClosedError)):
            self._error = error
        self._exhausted = True
        if self._producer is not None:
            self._producer.cancel()
            reason = why_not_sent(error)
            for item in self.undelivered:
                item.runner.leave(self._priority, reason)
        self._notify()

    def drop(self) -> None:
        """Stop from the garbage collector, which may run in another thread, or after the event loop's end."""
        if self._producer is not None:
            with contextlib.suppress(RuntimeError):
                self._producer.get_loop().call_soon_threadsafe(self.stop, None)

    async def close(self) -> None:
        self.stop(None)
        self._closed = True
        self._error = None
        self._notify()
        runners = [item.runner for item in self.undelivered if not item.runner.callers]
        if unanswered := [runner.submit_done.future() for runner in runners if not runner.submit_done.done()]:
            await wait(unanswered, _ANSWER_TIMEOUT, grace=_ANSWER_TIMEOUT)

    # ------------------------------------------------------------------ the producer

    async def _produce(self) -> None:
        request: GenerationRequest | None = None
        try:
            if self._saver is not None:
                await self._saver.prepare()
                self._keep_open(self._saver)
            while not self._stopped:
                await self.look_ahead.acquire()
                pulled = await self._next_request()
                try:
                    request = as_request(pulled)
                    item = _Item(self, request, await self._start(request))
                except FluxError as error:
                    self._reject(request, error)
                else:
                    self.undelivered[item] = None
                    self._unready += 1
                    item.runner.add_observer(item)
                request = None
        except StopAsyncIteration:
            self._exhausted = True
            self._notify()
        except asyncio.CancelledError as cancelled:
            task = asyncio.current_task()
            if task is not None and not task.cancelling():
                self._on_source_failed(RuntimeError("the source of the requests was cancelled"), cancelled)
                return
            self._stop_for_shutdown()
            if request is not None and isinstance(self._error, FluxError):
                self._reject(request, why_not_sent(self._error))
            raise
        except BaseException as error:  # noqa: BLE001 - the source is the caller's, and so are its errors
            self._on_source_failed(error, error.__cause__)

    def _on_producer_done(self, producer: "asyncio.Task[None]") -> None:
        if producer.cancelled():  # perhaps before its first step
            self._stop_for_shutdown()

    def _stop_for_shutdown(self) -> None:
        """Stop because the session drains or closes; if the stream itself has stopped the producer, do nothing."""
        error = SessionClosedError("the session was closed before all requests were submitted")
        self.stop(error if self._shutdown.closed else self._shutdown.error())

    def _on_source_failed(self, error: BaseException, cause: BaseException | None) -> None:
        """End with the source's own error, after everything that the source has yielded is delivered."""
        error.__cause__ = cause
        self._exhausted = True
        self._error = error
        self._notify()

    def _reject(self, request: GenerationRequest | None, error: FluxError) -> None:
        """Deliver a request that was pulled and never submitted: nothing that was pulled is lost."""
        self._ready.append((Failed(request=request, error=error), None))
        if _ends_the_stream(error):
            self.stop(error)
        self._notify()

    # ------------------------------------------------------------------ from the end of a task to its delivery

    def on_ended(self, item: _Item, runner: TaskRunner, outcome: Outcome) -> None:
        """Save the images of a completed task, if the stream saves, or deliver at once."""
        if self._saver is None or isinstance(outcome, Failed):
            self._deliver(item, outcome)
        elif self._finder is not None and outcome.replayed and runner.record.files and not runner.record.interrupted:
            self._finder.find(outcome, runner.record.files, partial(self._on_found, item, outcome))
        else:
            self._save(item, outcome)

    def _on_found(self, item: _Item, outcome: Completed, saved: tuple[Path, ...] | None) -> None:
        """Deliver a replayed outcome whose images are there, or save them again."""
        if saved is None:
            self._save(item, outcome)
        else:
            self._has_saved = True
            self._deliver(item, attrs.evolve(outcome, saved=saved, locations=tuple(map(str, saved))))

    def _save(self, item: _Item, outcome: Completed) -> None:
        assert self._saver is not None
        try:
            saving = self._spawn(self._saver.save(outcome, item.runner.record))
        except SessionClosedError as error:
            self._deliver(item, attrs.evolve(outcome, save_error=error))
            return
        # The slot is free again: let the next request be submitted while the images are downloaded.
        self._saving += 1
        lent = self._has_saved and self._saving <= self._max_saving
        self.look_ahead.release(int(lent))
        saving.add_done_callback(partial(self._on_saved, item, outcome, lent))

    def _on_saved(self, item: _Item, outcome: Completed, lent: bool, saving: "asyncio.Task[Completed]") -> None:  # noqa: FBT001 - bound by partial
        self._saving -= 1
        self.look_ahead.release(-int(lent))
        if saving.cancelled():
            error = SessionClosedError("the session was closed before all images were saved")
            outcome = attrs.evolve(outcome, save_error=error)
        elif (failure := saving.exception()) is not None:
            unexpected = DownloadError(f"unexpected error while saving: {failure!r}")
            unexpected.__cause__ = failure
            outcome = attrs.evolve(outcome, save_error=unexpected)
        else:
            outcome = saving.result()
            self._has_saved = self._has_saved or bool(outcome.locations)
        if outcome.save_error is not None and is_disk_failure(outcome.save_error):
            self.stop(outcome.save_error)
        self._deliver(item, outcome)

    def _keep_open(self, saver: ImageSaver | StorageSaver) -> None:
        if isinstance(saver, StorageSaver):
            self._spawn(self._close_storage(saver))

    async def _close_storage(self, saver: StorageSaver) -> None:
        try:
            while not self._exhausted or self._unready:
                await self._wait_for_change()
        finally:
            await saver.close()

    def _deliver(self, item: _Item, outcome: Outcome) -> None:
        self._unready -= 1
        self._ready.append((outcome, item))
        if isinstance(outcome, Failed) and _ends_the_stream(outcome.error):
            self.stop(outcome.error)
        self._notify()

    def _notify(self) -> None:
        if self._changed is not None:
            self._changed.set()
            self._changed = None


def _ends_the_stream(error: FluxError) -> bool:
    return is_fatal_for_batch(error) or isinstance(error, SessionClosedError)
