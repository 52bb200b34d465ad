"""The session: lifetimes, places in flight, and the face that callers see."""

import asyncio
import math
import platform
from collections import Counter
from collections.abc import AsyncIterable, Callable, Coroutine, Iterable
from decimal import Decimal
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, TypeVar

import aiohttp
import anyio
import attrs

from flux2max_async._api.client import ApiClient
from flux2max_async._api.codec import build_poll
from flux2max_async._api.transport import Transport
from flux2max_async._budget import Budget
from flux2max_async._config import (
    validate_api_key,
    validate_base_url,
    validate_dollars,
    validate_drain,
    validate_max_in_flight,
    validate_rate,
    validate_seconds,
)
from flux2max_async._downloads.downloader import Downloader
from flux2max_async._downloads.saver import ImageSaver
from flux2max_async._exceptions import (
    ConfigurationError,
    InvalidRequestError,
    SessionClosedError,
)
from flux2max_async._models.request import GenerationRequest, as_request
from flux2max_async._models.results import Completed, GeneratedImage, TaskSnapshot
from flux2max_async._polling.learned import LearnedSchedule
from flux2max_async._polling.poller import TaskPoller
from flux2max_async._polling.schedules import PollSchedule
from flux2max_async._stats import SessionStats
from flux2max_async._stream import OutcomeStream
from flux2max_async._tasks.handle import GenerationTask
from flux2max_async._tasks.runner import TaskRunner
from flux2max_async._tasks.supervisor import Supervisor, closed_error
from flux2max_async._version import __version__
from flux2max_async.journal import Journal
from flux2max_async.journal._context import Books, ReusePolicy
from flux2max_async.journal._entry import EntryState, JournalEntry
from flux2max_async.journal._record import RequestRecord
from flux2max_async.journal._serialization import snapshot_from_entry
from flux2max_async.webhooks._inbox import WebhookInbox

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
        task_timeout: Seconds for a task, from its submit; None waits without limit.
        max_polls_per_second: Of all tasks together; None sets no limit. Polls become dearer, and so rarer, before it is
            reached, and for a while after each 429.
        http_timeout: Seconds for one HTTP exchange, the answer's last byte included.
        http_session: A borrowed aiohttp session, for a proxy or tracing of your own; it is never closed by us.
        webhooks: Takes in the service's webhooks, where your server passes them on; polls then become rare.
        drain: Seconds that closing gives submitted tasks to end before they are left, as servers do at their shutdown.
        journal: Where intents, task ids and ends are kept, so that what is asked for again isn't paid for again: a
            `SqliteJournal`. The session opens and closes it.
        budget: US dollars. A submit whose probable cost, on top of what is spent and set aside, would pass it, is a
            BudgetExceededError; nothing is sent.
        price_guess: US dollars that a request will probably cost, until the first one has told; by default 0.07, and
            0.03 for each further megapixel of output and input.
        budget_scope: "session" counts what this session spends, "journal" all that is in the journal, which is the
            default where there is one.

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
        task_timeout: float | None = 600.0,
        max_polls_per_second: float | None = 20.0,
        http_timeout: float = 30.0,
        http_session: aiohttp.ClientSession | None = None,
        webhooks: WebhookInbox | None = None,
        drain: float = 0.0,
        journal: Journal | None = None,
        budget: Decimal | float | str | None = None,
        price_guess: Decimal | float | str | None = None,
        budget_scope: Literal["session", "journal"] | None = None,
    ) -> None:
        self._max_in_flight = validate_max_in_flight(max_in_flight)
        self._deadline = math.inf if task_timeout is None else validate_seconds("task_timeout", task_timeout)
        self._polls_per_second = validate_rate("max_polls_per_second", max_polls_per_second)
        if webhooks is not None and not isinstance(webhooks, WebhookInbox):
            raise ConfigurationError(f"webhooks must be a WebhookInbox, not {type(webhooks).__name__}")
        self._office = webhooks.office if webhooks else None
        self._transport = Transport(
            validate_api_key(api_key),
            validate_base_url(base_url),
            user_agent=_USER_AGENT,
            timeout=validate_seconds("http_timeout", http_timeout),
            http=http_session,
            secrets=self._office.secrets if self._office else (),
        )
        self._drain = validate_drain(drain)
        if budget_scope not in {None, "session", "journal"} or (budget_scope == "journal" and journal is None):
            raise ConfigurationError(
                f"budget_scope must be 'session', or 'journal' where there is one, not {budget_scope!r}"
            )
        self._books = Books(
            Budget(validate_dollars("budget", budget), validate_dollars("price_guess", price_guess)),
            journal,
            whole_journal=journal is not None and budget_scope != "session",
            secrets=self._transport.secrets,
        )
        self._schedule = LearnedSchedule() if schedule is None else schedule
        self._stats = SessionStats()
        self._downloads = Downloader(self._transport, self._deadline, self.fetch)
        self._supervisor: Supervisor | None = None

    # ------------------------------------------------------------------ lifetime

    async def __aenter__(self) -> Self:
        if self._supervisor is not None and not self._supervisor.loop.is_closed():
            raise SessionClosedError("the session is open already: enter it once, and share it")
        if self._office is not None:
            self._office.open(self._books.journal, secrets=self._books.secrets, spawn=self._spawn_until_drain)
        try:
            if self._books.journal is not None:
                await self._books.journal.open(self._hear, listening=self._office is not None)
        except BaseException:
            self._stop_listening()
            raise
        self._transport.open(self._max_in_flight)
        self._stats.in_flight = self._stats.submitting = 0
        gateway = ApiClient(self._transport, self._stats, self._max_in_flight, self._polls_per_second)
        self._supervisor = Supervisor(gateway, self._stats, self._max_in_flight)
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self, *, drain: float | None = None) -> None:
        """Close the session: what is still waited for ends with SessionClosedError. Doing it twice does no harm.

        Args:
            drain: Seconds that submitted tasks get to end first, and the pictures of a `stream(save_to=...)` to be
                saved, while nothing more is submitted; by default, the session's own. A second call may shorten it.
        """
        seconds = self._drain if drain is None else validate_drain(drain)
        supervisor = self._supervisor
        if supervisor is None or supervisor.loop.is_closed():
            self._supervisor = None
            return
        supervisor.hasten(seconds)
        if supervisor.closing is None:
            supervisor.closing = asyncio.create_task(self._close(supervisor))
        try:
            await asyncio.shield(supervisor.closing)
        except asyncio.CancelledError:
            if anyio.current_effective_deadline() > -math.inf:
                raise
            # In a cancelled scope of anyio nothing else could be waited for; this takes two seconds at most.
            supervisor.hasten(0.0)
            with anyio.CancelScope(shield=True):
                await asyncio.shield(supervisor.closing)
            raise

    # ------------------------------------------------------------------ requests

    async def generate(
        self,
        request: str | GenerationRequest,
        /,
        *,
        retry_failed: bool = False,
        resubmit_uncertain: bool = False,
        **params: Any,
    ) -> Completed:
        """Submit one request and wait for it.

        With a journal, what was asked for before, here or in another process, is not paid for again: the same key, or
        without one the same content, gives the same task.

        Cancelling it (a web client that left, `asyncio.timeout`) cancels the wait. A call that is on the wire is
        finished in the background so that its id is not lost, and the task keeps its place until it ends, since the
        service counts it.

        Args:
            request: A prompt, or a whole request.
            retry_failed: Submit again what the journal knows to have failed.
            resubmit_uncertain: Submit again what the journal has no answer for, and perhaps pay twice.
            params: Those of `GenerationRequest`; beside a whole request they replace its own.

        Raises:
            FluxError: It came to nothing; the tree in `flux2max_async._exceptions` tells the kinds apart.
        """
        poller = await self._start(as_request(request, **params), ReusePolicy(retry_failed, resubmit_uncertain))
        return (await _waited_for(poller, poller.ended)).unwrap()

    async def submit(
        self,
        request: str | GenerationRequest,
        /,
        *,
        retry_failed: bool = False,
        resubmit_uncertain: bool = False,
        **params: Any,
    ) -> GenerationTask:
        """Wait for a free place, submit, and return as soon as the service has given the task an id.

        With a journal, it gives the task that there is already, as `generate()` does.

        Cancelling it is like cancelling `generate()`.

        Args:
            request: A prompt, or a whole request.
            retry_failed: Submit again what the journal knows to have failed.
            resubmit_uncertain: Submit again what the journal has no answer for, and perhaps pay twice.
            params: Those of `GenerationRequest`; beside a whole request they replace its own.

        Raises:
            FluxError: There is no task, or nobody knows whether there is (SubmissionUncertainError).
        """
        poller = await self._start(as_request(request, **params), ReusePolicy(retry_failed, resubmit_uncertain))
        await _waited_for(poller, poller.answered)
        if poller.task_id is None:
            poller.ended.result().unwrap()
        return GenerationTask(poller)

    def stream(
        self,
        requests: Iterable[str | GenerationRequest] | AsyncIterable[str | GenerationRequest],
        /,
        *,
        save_to: str | PathLike[str] | None = None,
        name: Callable[[Completed], str] | None = None,
        retry_failed: bool = False,
        resubmit_uncertain: bool = False,
    ) -> OutcomeStream:
        """Submit lazily (never more than max_in_flight ahead of the consumer) and yield each outcome as it comes.

        A request or task that fails is yielded. What dooms all the rest (AuthenticationError,
        InsufficientBalanceError, PermissionDeniedError, BudgetExceededError, JournalError, a disk on which no picture
        can be saved) is yielded for the request that met it and stops new submissions; what is already submitted is
        still polled and yielded, and then the error is raised. The same holds when the source itself raises.

        With a journal, the same list can be streamed again, after whatever has ended the first run: what has ended is
        yielded at once, what is a task is followed, and only the rest is submitted. A list with repeats stays one.

        Args:
            requests: Prompts or requests, from anything that can be iterated over; it may be endless. (With a journal,
                an endless source had better give keys: what has none is counted, which takes memory.)
            save_to: A folder into which the pictures are saved as soon as their tasks end; `Completed.saved` names the
                files, or `save_error` tells why there are none. No other picture is ever replaced, and what is there
                already according to the journal is not fetched again.
            name: What to call an outcome's pictures, without or with an ending; by default, the request's key or the
                task's id. Whatever a file's name can't hold is replaced, and further pictures are numbered.
            retry_failed: Submit again what the journal knows to have failed.
            resubmit_uncertain: Submit again what the journal has no answer for, and perhaps pay twice; otherwise it is
                yielded as Failed, with a SubmissionUncertainError.
        """
        if isinstance(requests, (str, GenerationRequest)):
            raise InvalidRequestError("stream() takes many requests: put a single one into a list", "requests")
        if name is not None and save_to is None:
            raise InvalidRequestError("name is for the files in save_to: give both", "name")
        terms = ReusePolicy(
            retry_failed, resubmit_uncertain, to_be_saved=save_to is not None, occurrences=Counter[str]()
        )
        return OutcomeStream(
            requests,
            start=lambda request: self._start(request, terms),
            spawn=self._spawn,
            ahead=self._max_in_flight,
            saver=None if save_to is None else ImageSaver(Path(save_to), name, self._downloads.fetch),
        )

    def attach(self, task_id: str, /, *, request: GenerationRequest | None = None) -> GenerationTask:
        """Poll a task that was submitted earlier, here or in another process.

        It is looked at at once, with a deadline counted from now, and without taking a place.

        Args:
            task_id: What the service called it.
            request: What was asked for, if it is known; the outcome will name it.
        """
        supervisor = self._running()
        poller = self._poller(supervisor, request, _checked_id(task_id))
        supervisor.follow(poller)
        return GenerationTask(poller)

    async def fetch(self, task_id: str, /) -> TaskSnapshot:
        """Look at a task once, without waiting for anything.

        Raises:
            FluxError: There was no answer, or none that is a task.
        """
        supervisor = self._running()
        return await supervisor.host(supervisor.gateway.poll(build_poll(_checked_id(task_id)), task_id))

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
        return await self._running().host(self._downloads.save(image, Path(path)))

    @property
    def stats(self) -> SessionStats:
        """The counts so far."""
        stats = attrs.evolve(self._stats)
        if isinstance(self._schedule, LearnedSchedule):
            stats.median_duration = self._schedule.percentile(50)
            stats.p90_duration = self._schedule.percentile(90)
        return stats

    # ------------------------------------------------------------------ behind the face

    async def _close(self, supervisor: Supervisor) -> None:
        if self._office is not None:
            self._office.mail.deaf = True
        try:
            await supervisor.drain()
            await supervisor.close()
        finally:
            supervisor.abandon()  # where closing is cut short, as by a second Ctrl-C, the ids are left all the same
            self._stop_listening()
            try:
                if self._books.journal is not None:
                    await self._books.journal.close()
            finally:
                await self._transport.close()
                self._supervisor = None

    def _stop_listening(self) -> None:
        if self._office is not None:
            self._office.close()

    async def _start(self, request: GenerationRequest, terms: ReusePolicy) -> TaskRunner:
        self._submitting()
        # Who is cancelled already stops here; and a source that never waits leaves the event loop room.
        await asyncio.sleep(0)
        supervisor = self._submitting()
        page = RequestRecord(self._books, request, terms) if self._books.needed else None
        poller = self._poller(supervisor, request, page=page)
        supervisor.follow(poller)
        return poller

    def _hear(self, entries: list[JournalEntry]) -> None:
        """Hear from the journal what other processes have done."""
        if self._supervisor is None or self._supervisor.drained:
            return
        for entry in entries:
            if entry.state is not EntryState.SUBMITTED:
                if self._office is not None and self._office.mail.listeners(entry.task_id or ""):
                    self._office.tell(snapshot_from_entry(entry))
            elif entry.key not in self._supervisor.desk and not self._supervisor.closing:
                self._inherit(self._supervisor, entry)

    def _inherit(self, supervisor: Supervisor, entry: JournalEntry) -> None:
        """Follow what a process that is gone has left behind, so that it ends in the journal whoever asks for it."""
        poller = self._poller(supervisor, None, entry.task_id, RequestRecord(self._books, None, ReusePolicy(), entry))
        supervisor.desk[entry.key] = poller
        supervisor.follow(poller)

    def _poller(
        self,
        supervisor: Supervisor,
        request: GenerationRequest | None,
        task_id: str | None = None,
        page: RequestRecord | None = None,
    ) -> TaskRunner:
        mail = self._office.mail if self._office else None
        hooked = self._office.asked(request) if self._office and request and task_id is None else None
        lookout = TaskPoller(supervisor.gateway, self._schedule, self._deadline, request, mail)
        return TaskRunner(
            supervisor.gateway, lookout, request, supervisor.places, task_id, page, supervisor.desk, hooked
        )

    def _spawn(self, work: Coroutine[Any, Any, None], *, until_drain: bool = False) -> "asyncio.Task[None]":
        try:
            return self._running().spawn(work, until_drain=until_drain)
        except SessionClosedError:
            work.close()
            raise

    def _spawn_until_drain(self, work: Coroutine[Any, Any, None]) -> None:
        self._spawn(work, until_drain=True)

    def _running(self) -> Supervisor:
        if self._supervisor is None or self._supervisor.drained:
            raise closed_error()
        return self._supervisor

    def _submitting(self) -> Supervisor:
        supervisor = self._running()
        if supervisor.closing:
            raise closed_error()
        return supervisor


async def _waited_for(poller: TaskRunner, future: "asyncio.Future[T]") -> T:
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
