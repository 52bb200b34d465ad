"""The session, with its public methods; `_lifetime` has what opens and closes it."""

import signal
import ssl
from collections import Counter
from collections.abc import AsyncIterable, Callable, Collection, Iterable, Mapping
from decimal import Decimal
from functools import partial
from os import PathLike
from typing import Literal, Unpack

import aiohttp
import attrs

from flux2max_async._api.codec import build_poll, validate_task_id
from flux2max_async._config import ApiKey, validate_count
from flux2max_async._downloads.downloader import Downloader
from flux2max_async._exceptions import ConfigurationError, InvalidRequestError
from flux2max_async._in_flight_limit import InFlightLimit
from flux2max_async._lifetime import SessionParts
from flux2max_async._models.request import GenerationParams, GenerationRequest, as_request
from flux2max_async._models.results import Completed, Failed, TaskSnapshot
from flux2max_async._polling.schedules import PollSchedule
from flux2max_async._session_images import SessionImages
from flux2max_async._stream import OutcomeStream
from flux2max_async._tasks.handle import GenerationTask
from flux2max_async._tasks.intake import CallOptions
from flux2max_async._tasks.queued import QueuedGeneration
from flux2max_async._tasks.time_limit import TimeLimit
from flux2max_async.journal._lookup import ReusePolicy
from flux2max_async.journal._protocol import Journal
from flux2max_async.storage._protocol import Storage
from flux2max_async.webhooks._inbox import WebhookInbox


class FluxSession(SessionImages):
    """Submits FLUX.2 [max] generations, polls each task, and delivers each as it completes or fails.

    One session holds one connection pool, one in-flight limit and one learned poll schedule: share it, for a whole
    web application or a whole batch. It may be entered in one asyncio task and closed in another, and entered again
    after it was closed, but it is used in one event loop at a time. Closing it ends what is still waited for with
    `Failed(SessionClosedError)`, quickly, and logs the ids of unfinished tasks in one line.

    A submit is repeated only if it certainly created nothing (no connection, 429, 503), until the deadline, and then
    the last error is raised. A lone 429 holds back its own call as long as the service says, at most 120 s; four or
    more among the last 20 calls of its kind hold back all submits, or all polls; submits then probe one at a time.
    Polls are repeated until the deadline on any transport error, 408, 429, 5xx, a 404 soon after the submit, an
    unreadable answer (five in a row are a ProtocolError), and a refusal, unless the API repeats it three times over
    10 s; the page of a proxy or firewall never ends a task.

    Args:
        api_key: The key, or a function that returns it, awaited or not; else the environment's FLUX2MAX_API_KEY.
        base_url: The gateway; else FLUX2MAX_BASE_URL, else https://cloud.vtrix.ai. Plain http only to this machine.
        max_in_flight: Slots: tasks submitted and not yet ended, waited for or not. The model's maker allows 24. A
            `SqliteInFlightLimit` has one number of slots for several processes.
        schedule: When to poll; by default, a `LearnedSchedule` of its own, whose state the journal keeps for the next
            sessions. One that is given may serve several sessions, and is kept by nobody.
        task_timeout: Seconds for a task from the moment it holds its slot to its end; None sets no limit.
        max_polls_per_second: For all tasks together. "auto" is one for each slot, at least 20; None sets no limit. Near
            the limit, and after frequent 429s, polls become rarer.
        http_timeout: Seconds for one HTTP exchange, the last byte of its answer included; for polls, at most.
        http_session: A borrowed aiohttp session, for tracing or a connector of your own; it is never closed by us. Its
            middlewares see downloads too, but the hosts of images get none of its headers, cookies and credentials.
        headers: Further headers of calls to the API, never of downloads, for gateways in between. The session sets
            Authorization and those of the content itself.
        proxy: The URL of an HTTP proxy for the API and downloads; else the environment's HTTPS_PROXY, HTTP_PROXY and
            ALL_PROXY, except for this machine, NO_PROXY, and a borrowed session with a proxy or connector of its own.
        trust_env: False: no proxy from the environment. `.netrc` is never used.
        ssl_context: Verifies all certificates; by default those of the system, or of SSL_CERT_FILE.
        allow_plain_http: Accept http:// for other hosts: for gateways inside your own network.
        webhooks: Receives the service's webhooks from your server. Polls become rare, and a lost answer to a submit is
            made good by its webhook.
        drain: Seconds that closing gives submitted tasks to end, as servers do at their shutdown.
        drain_signals: Signals that call `begin_drain()`, before the handlers that are installed when the session opens:
            (signal.SIGTERM, signal.SIGINT) in a web server, which closes the session only after its open requests.
            Without such a handler, the first signal only drains. Outside the main thread, they have no effect.
        journal: Records intents, task ids and ends, so that a repeated request isn't paid for again: a `SqliteJournal`,
            which the session opens and closes.
        budget: US dollars. A submit whose probable cost, on top of what is spent and reserved, would exceed it raises
            BudgetExceededError; nothing is sent.
        price_guess: US dollars for a request until the first real cost is known; by default 0.07 for the first
            megapixel and 0.03 for each further one; each input image counts as one.
        max_waiting: Requests that may wait for a slot; one more is a QueueFullError, before anything is sent or
            written. Streams wait by themselves and don't count. None sets no bound.
        max_per_group: Slots that the requests of one `group` may hold at once; None sets no bound.
        content_keys: False never takes requests without a `key` for one another, even if a journal knows an equal one.
        budget_scope: "session" counts what this session spends, "journal", the default with one, everything in it.
        max_uncertain: After so many lost answers to submits in a row, submits are sent one at a time; one more, and a
            stream submits nothing more. None sets no limit.
        allow_private_downloads: Accept images from loopback, link-local and private addresses even if base_url isn't at
            one. Otherwise they are a DownloadError, except that nobody can tell what a proxy connects to.

    Raises:
        ConfigurationError: No key, a malformed key, http:// to another host, a senseless limit.
    """

    def __init__(
        self,
        api_key: ApiKey | None = None,
        *,
        base_url: str | None = None,
        max_in_flight: int | InFlightLimit = 24,
        schedule: PollSchedule | None = None,
        task_timeout: float | None = 600.0,
        max_polls_per_second: float | Literal["auto"] | None = "auto",
        http_timeout: float = 30.0,
        http_session: aiohttp.ClientSession | None = None,
        headers: Mapping[str, str] | None = None,
        proxy: str | None = None,
        trust_env: bool = True,
        ssl_context: ssl.SSLContext | None = None,
        allow_plain_http: bool = False,
        webhooks: WebhookInbox | None = None,
        drain: float = 0.0,
        journal: Journal | None = None,
        budget: Decimal | float | str | None = None,
        price_guess: Decimal | float | str | None = None,
        budget_scope: Literal["session", "journal"] | None = None,
        max_uncertain: int | None = 5,
        allow_private_downloads: bool = False,
        content_keys: bool = True,
        drain_signals: Collection[signal.Signals] = (),
        max_waiting: int | None = None,
        max_per_group: int | None = None,
    ) -> None:
        try:
            self._parts = SessionParts.create(
                http_session,
                journal,
                webhooks,
                schedule,
                api_key=api_key,
                base_url=base_url,
                proxy=proxy,
                trust_env=trust_env,
                headers=headers,
                ssl_context=ssl_context,
                allow_plain_http=allow_plain_http,
                max_in_flight=max_in_flight,
                task_timeout=task_timeout,
                max_polls_per_second=max_polls_per_second,
                http_timeout=http_timeout,
                drain=drain,
                budget=budget,
                price_guess=price_guess,
                budget_scope=budget_scope,
                max_uncertain=max_uncertain,
                allow_private_downloads=allow_private_downloads,
                content_keys=content_keys,
                drain_signals=drain_signals,
                max_waiting=max_waiting,
                max_per_group=max_per_group,
            )
        except ConfigurationError as error:
            # What is wrong may be a secret, or hold one: the frames of the traceback must not.
            del api_key, base_url, headers, proxy
            raise error.with_traceback(None) from None
        self._downloader = Downloader(
            self._parts.transport, self._parts.config.task_timeout, self.fetch, self._parts.stats
        )

    # ------------------------------------------------------------------ requests

    async def generate(
        self,
        request: str | GenerationRequest,
        /,
        *,
        timeout: float | None = None,  # noqa: ASYNC109 - more than a cancel scope: the error names the task
        priority: int = 0,
        group: str | None = None,
        retry_failed: bool = False,
        resubmit_uncertain: bool = False,
        **params: Unpack[GenerationParams],
    ) -> Completed:
        """Submit one request and wait for it.

        With a journal, what was requested before, here or in another process, is not paid for again: the same key, or
        without a key the same content, returns the same task, with fresh links if its own have expired.

        Cancelling it cancels the wait. A call that is on the wire is finished in the background so that its id is not
        lost, and the task keeps its slot until it ends, since the service counts it. The id is logged as a warning,
        unless somebody else waits for the task.

        Args:
            request: A prompt, or a whole request.
            timeout: Seconds for the whole call, with all that it waits for. Then what is not submitted is not submitted
                any more, and a task goes on.
            priority: Among requests that wait for a slot the highest goes first, equals in order. Each minute of
                waiting counts as one more, so that none waits for ever.
            group: A user or tenant, for example. Among equal priorities groups take turns, whoever has more requests
                waiting; the minutes of a request count from its group's last turn. None: a group of its own.
            retry_failed: Submit again what the journal knows to have failed.
            resubmit_uncertain: Submit again what the journal has no answer for, and perhaps pay twice.
            params: Those of `GenerationRequest`; with a whole request they replace its own.

        Raises:
            DeadlineExceededError: The `timeout` or the session's `task_timeout` was over; it names the task's id.
            FluxError: There is no image; `flux2max_async._exceptions` draws the tree of errors.
        """
        intake, limit = self._get_supervisor().intake, None if timeout is None else TimeLimit.start(timeout)
        # The frame of a call that waits holds nothing that it doesn't need: thousands may wait.
        request, runner = await intake.start_call(
            request, params, CallOptions.create(priority, group, retry_failed, resubmit_uncertain), limit
        )
        outcome = await runner.wait_as_caller(runner.ended, priority, limit)
        if isinstance(outcome, Failed):
            raise outcome.error.with_traceback(None)
        return outcome if outcome.request is request else attrs.evolve(outcome, request=request)

    async def submit(
        self,
        request: str | GenerationRequest,
        /,
        *,
        timeout: float | None = None,  # noqa: ASYNC109 - more than a cancel scope: the error names the task
        priority: int = 0,
        group: str | None = None,
        retry_failed: bool = False,
        resubmit_uncertain: bool = False,
        **params: Unpack[GenerationParams],
    ) -> GenerationTask:
        """Wait for a free slot, submit, and return as soon as the service has given the task an id.

        Journals, cancelling and the arguments are as in `generate()`; `timeout` is for this call, which ends with the
        id.

        Raises:
            FluxError: There is no task, or nobody knows whether there is one (SubmissionUncertainError).
        """
        intake, limit = self._get_supervisor().intake, None if timeout is None else TimeLimit.start(timeout)
        request, runner = await intake.start_call(
            request, params, CallOptions.create(priority, group, retry_failed, resubmit_uncertain), limit
        )
        await runner.wait_as_caller(runner.answered, priority, limit)
        if runner.task_id is None:
            runner.ended.result().unwrap()
        return GenerationTask(runner)

    def enqueue(
        self,
        request: str | GenerationRequest,
        /,
        *,
        timeout: float | None = None,
        priority: int = 0,
        group: str | None = None,
        retry_failed: bool = False,
        resubmit_uncertain: bool = False,
        **params: Unpack[GenerationParams],
    ) -> QueuedGeneration:
        """Take a request in and return at once: for handlers that respond with 202.

        The session runs it, waited for or not, unless it is withdrawn. Journals and the arguments are as in
        `generate()`. When the `timeout` is over, what is not submitted is not submitted any more, and awaiting it
        raises DeadlineExceededError.

        Raises:
            InvalidRequestError: A parameter is wrong. An image that can't be read is raised by awaiting.
            QueueFullError: No slot is free, and `max_waiting` requests are waiting. If the journal knows the outcome,
                `generate()` returns it all the same.
            SessionClosedError: The session is closed or draining.
        """
        intake, limit = self._get_supervisor().intake, None if timeout is None else TimeLimit.start(timeout)
        options = CallOptions.create(priority, group, retry_failed, resubmit_uncertain)
        return intake.enqueue(as_request(request, **params), options, limit)

    def stream(
        self,
        requests: Iterable[str | GenerationRequest] | AsyncIterable[str | GenerationRequest],
        /,
        *,
        save_to: str | PathLike[str] | Storage | None = None,
        name: Callable[[Completed], str] | None = None,
        max_in_flight: int | None = None,
        priority: int = 0,
        retry_failed: bool = False,
        resubmit_uncertain: bool = False,
    ) -> OutcomeStream:
        """Submit lazily (never more than max_in_flight ahead of the consumer) and yield each outcome as it comes.

        A request or task that fails is yielded. An error that all the rest would meet (AuthenticationError,
        InsufficientBalanceError, PermissionDeniedError, ConfigurationError, BudgetExceededError, JournalError, a full
        disk, `max_uncertain`) is yielded and stops new submissions; what is already submitted is still polled and
        yielded, and then the error is raised. The same holds if the source itself raises.

        With a journal, the same list can be streamed again: what has ended is yielded at once, tasks are polled, and
        only the rest is submitted. A list with repeats keeps its repeats. Links may have expired: `save()` renews them.

        Args:
            requests: From any iterable, which may be endless (with a journal, give keys then: without them, requests
                are counted, which takes memory).
            save_to: A folder, or a storage of `flux2max_async.storage`, into which the images are saved as soon as
                their tasks end; `Completed.locations` names them, or `save_error` tells why some are missing. Up to
                twice max_in_flight outcomes may be saving beside the look-ahead. No existing file is replaced, and none
                that the journal knows downloaded again.
            name: Returns the file name for an outcome's images, with or without a suffix; by default, the key, or else
                the prompt's first words and a short fingerprint. Characters that a file name can't hold are replaced,
                further images are numbered.
            max_in_flight: At most so many of the session's slots at once, so that the rest stays free for others;
                None: all.
            priority: That of its requests among those that wait for a slot, as in `generate()`.
            retry_failed: Submit again what the journal knows to have failed.
            resubmit_uncertain: Submit again what the journal has no answer for, and perhaps pay twice.
        """
        if isinstance(requests, (str, GenerationRequest)):
            raise InvalidRequestError("stream() takes many requests: put a single one into a list", field="requests")
        if name is not None and save_to is None:
            raise InvalidRequestError("name is for the files in save_to: give both", field="name")
        if max_in_flight is not None:
            validate_count("max_in_flight", max_in_flight)
        supervisor = self._get_supervisor()
        supervisor.check_caller()
        policy = ReusePolicy(retry_failed, resubmit_uncertain, save_to is not None, occurrences=Counter[str]())
        slots = self._parts.config.in_flight_limit
        return OutcomeStream(
            requests,
            start=partial(supervisor.intake.start_item, options=CallOptions(priority, policy)),
            spawn=supervisor.spawn,
            look_ahead=min(max_in_flight or slots, slots),
            priority=priority,
            saver=None if save_to is None else self._create_saver(save_to, name),
            check_caller=supervisor.check_caller,
            shutdown=supervisor.shutdown,
        )

    def attach(self, task_id: str, /, *, request: GenerationRequest | None = None) -> GenerationTask:
        """Poll a task that was submitted earlier, here or in another process: at once, and without taking a slot.

        Its deadline is counted from now. If this session follows the task already, nothing is polled or counted twice.
        With a journal, its end is recorded there. The outcome names the `request`, if it is given.
        """
        return GenerationTask(self._get_supervisor().intake.attach(validate_task_id(task_id), request))

    async def fetch(self, task_id: str, /) -> TaskSnapshot:
        """Poll a task once, without waiting for anything; raises FluxError if there is no readable answer."""
        supervisor = self._get_supervisor()
        return await supervisor.run_foreground(supervisor.client.poll(build_poll(validate_task_id(task_id)), task_id))
