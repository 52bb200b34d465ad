"""The API's two calls, submit and poll, with the retries and limits that keep them safe."""

import asyncio
import math
import random
from collections.abc import Callable

import anyio.to_thread
import attrs

from flux2max_async._api.circuit_breaker import Attempt, CircuitBreaker
from flux2max_async._api.codec import HttpRequest, build_poll, build_submit, parse_poll, parse_submit
from flux2max_async._api.give_up import PollLimit
from flux2max_async._api.input_links import InputLinks
from flux2max_async._api.poll_limiter import PollLimiter
from flux2max_async._api.poll_timeout import PollTimeout
from flux2max_async._api.recent_refusals import pause_after, spread_pause, spread_submit_pause
from flux2max_async._api.retry import backoff, is_uncertain, may_submit_again, min_delay, uncertain_error
from flux2max_async._api.submit_caller import Cancellation, SubmitRecord
from flux2max_async._api.submit_limiter import SubmitLimiter
from flux2max_async._api.submit_turns import Rank, SubmitTurns
from flux2max_async._api.transport import Transport
from flux2max_async._api.unknown_statuses import UnknownStatuses
from flux2max_async._clock import suspended_seconds
from flux2max_async._config import SessionConfig
from flux2max_async._exceptions import (
    ContentModeratedError,
    DeadlineExceededError,
    FluxError,
    RateLimitedError,
    ResponseError,
    SubmissionUncertainError,
)
from flux2max_async._health import HealthMonitor
from flux2max_async._models.request import GenerationRequest
from flux2max_async._models.results import TaskSnapshot, TaskStatus
from flux2max_async._stats import SessionCounters
from flux2max_async._text import get_logger

log = get_logger("api")

_MIN_SUBMIT_TIME = 5.0
"""Seconds that a submit needs before its deadline: cut off, an honest submit would be uncertain."""


@attrs.frozen
class AcceptedSubmit:
    """A submit that the service has accepted."""

    snapshot: TaskSnapshot
    started: float
    """When the accepted attempt was sent, on the event loop's clock."""
    deadline: float
    """When the task is to be given up."""
    by_webhook: bool = False
    """Whether its answer was lost, and the snapshot is what its webhook reports."""


@attrs.frozen
class LostSubmit:
    """A submit whose answer was lost: a task may exist."""

    error: SubmissionUncertainError
    started: float
    """When it was sent, on the event loop's clock."""
    deadline: float
    """When the task, if there is one, is to be given up."""
    attempt: Attempt


class ApiClient:
    """One account at one gateway.

    Args:
        transport: Exchanges HTTP messages.
        stats: The session's counters.
        config: The session's settings.
    """

    def __init__(self, transport: Transport, stats: SessionCounters, config: SessionConfig) -> None:
        self.now: Callable[[], float] = asyncio.get_running_loop().time
        self.suspended: Callable[[], float] = suspended_seconds
        self._transport = transport
        self._stats = stats
        self.poll_limiter: PollLimiter = PollLimiter(config.poll_rate)
        self._http_timeout = config.http_timeout
        self._poll_timeout = PollTimeout(config.http_timeout)
        self.submit_limiter: SubmitLimiter = SubmitLimiter(config.in_flight_limit)
        self._breaker = CircuitBreaker(config.max_uncertain)
        self._turns = SubmitTurns(stats, self.submit_limiter, self._breaker, self.now)
        self.health: HealthMonitor = HealthMonitor()
        self._unknown_statuses = UnknownStatuses()
        self.input_links: InputLinks = InputLinks(self._poll_once)

    # ------------------------------------------------------------------ submits

    async def submit(
        self,
        request: GenerationRequest,
        *,
        deadline: float,
        rank: Rank,
        cancellation: Cancellation,
        record: SubmitRecord,
    ) -> AcceptedSubmit | LostSubmit:
        """Submit until the service accepts or refuses for good, or its answer is lost.

        An attempt on the wire is never cancelled: its task would exist and cost money, and nobody would know its id.

        Args:
            request: What to generate.
            deadline: When the task is given up, on the event loop's clock.
            rank: Returns its place among submits that wait for their turn.
            cancellation: Cancels the submit between two attempts.
            record: Records each attempt.

        Raises:
            InvalidRequestError: An input image can't be read.
            ResponseError: The service refused.
            ContentModeratedError: Moderation refused the content.
            ConfigurationError: There is no such API at the base URL.
            TransportError: No connection within the time.
            DeadlineExceededError: Submits were held back for so long that this one was never sent.
            FluxError: The reason of the cancellation.
        """
        latest = deadline - min(_MIN_SUBMIT_TIME, (deadline - self.now()) / 4)
        request, message = await self._prepare(request, rank, cancellation, latest)
        failures, refusal = 0, None
        while True:
            if request.input_images and self.input_links.are_old(request):  # they have expired during a wait
                request, message = await self._prepare(request, rank, cancellation, latest)
            started = self.now()
            attempt = self._breaker.start() if self._breaker.has_failures else Attempt()
            try:
                return AcceptedSubmit(
                    await self._try_submit(message, request, record, deadline, attempt), started, deadline
                )
            except FluxError as error:
                self._record_error(error, is_poll=False)
                if is_uncertain(error):
                    return LostSubmit(uncertain_error(error), started, deadline, attempt)
                if not may_submit_again(error, refusal):
                    raise
                refusal = error.with_traceback(None)
            await record.mark_refused()
            failures += 1
            try:
                async with cancellation.guard(until=latest):
                    await self._wait_to_retry(refusal, failures, rank)
            except TimeoutError:
                raise refusal from refusal.__cause__
            self._stats.retries += 1
            log.warning("submit not accepted (%s); sending it again", refusal)

    async def _prepare(
        self, request: GenerationRequest, rank: Rank, cancellation: Cancellation, latest: float
    ) -> tuple[GenerationRequest, HttpRequest]:
        """Build the message and wait for the submit's turn, which has to come before `latest`.

        Returns:
            The request, in which links that have expired are renewed, and the message.
        """
        try:
            if request.input_images and self.input_links.are_old(request):
                async with cancellation.guard(until=latest):
                    request = await self.input_links.renew(request)
            if any(image.is_local for image in request.input_images):
                self._transport.expect_submit()
                async with cancellation.guard(until=latest):
                    message = await anyio.to_thread.run_sync(build_submit, request)
            else:
                message = build_submit(request)
            if self._turns.must_wait:
                async with cancellation.guard(until=latest):
                    await self._turns.wait(rank)
            elif cancellation.reason is not None:
                cancellation.raise_if_cancelled()
        except TimeoutError:
            raise DeadlineExceededError("not sent within its task_timeout: submits were held back") from None
        return request, message

    async def _poll_once(self, task_id: str) -> TaskSnapshot:
        return await self.poll(build_poll(task_id), task_id)

    async def _try_submit(
        self, message: HttpRequest, request: GenerationRequest, record: SubmitRecord, deadline: float, attempt: Attempt
    ) -> TaskSnapshot:
        limiter = self.submit_limiter
        probe = limiter.refused and limiter.submit_started(self.now())
        self._stats.submitting += 1
        try:
            await record.begin()
            response = await self._transport.exchange(message, within=deadline - self.now())
            if request.webhook_secret is not None:
                response = response.with_secret(request.webhook_secret)
            snapshot = parse_submit(response, base_url=self._transport.base_url)
        except RateLimitedError as error:
            self._stats.rate_limited += 1
            limiter.submit_refused(self.now(), self._stats.in_flight, error.retry_after, probe=probe)
            # It ends no row: an overloaded gateway refuses some submits, and loses the answers to others.
            self._breaker.release(attempt)
            raise
        except BaseException as error:
            limiter.submit_ended(probe=probe)
            self._record_failed_submit(error, attempt)
            raise
        else:
            self._stats.submitted += 1
            self._stats.in_flight += 1
            self.health.on_success(self.now(), is_poll=False)
            if self._breaker.has_failures:
                self._breaker.on_answer()
            if limiter.refused:
                limiter.submit_accepted(self._stats.in_flight, probe=probe)
            return snapshot
        finally:
            self._stats.submitting -= 1
            self._turns.on_capacity_changed()

    def _record_failed_submit(self, error: BaseException, attempt: Attempt) -> None:
        """Record in the circuit breaker what a failed submit reveals about further ones."""
        if isinstance(error, FluxError) and is_uncertain(error):
            self._breaker.on_uncertain(attempt)
        elif isinstance(error, (ResponseError, ContentModeratedError)) and not may_submit_again(error):
            if getattr(error, "from_api", True):
                self._breaker.on_answer()
            else:
                error.stops_stream = self._breaker.on_foreign_answer(attempt)
        else:
            self._breaker.release(attempt)

    def resolve(self, lost: LostSubmit) -> None:
        """Record that a webhook has reported which task a lost submit created; the task counts as in flight."""
        self._breaker.resolve(lost.attempt)
        self._stats.submitted += 1
        self.add_in_flight()
        self._turns.on_capacity_changed()

    def give_up(self, lost: LostSubmit) -> None:
        """Record that nobody will report any more what became of a lost submit; call `release()` after its outcome."""
        lost.error.stops_stream = self._breaker.is_failed_probe(lost.attempt)

    def release(self, lost: LostSubmit) -> None:
        """Allow the next probe to start; a stream that its error stops has stopped by now."""
        self._breaker.release(lost.attempt)
        self._turns.on_capacity_changed()

    async def _wait_to_retry(self, refusal: FluxError, failures: int, rank: Rank) -> None:
        asked = min_delay(refusal)
        if isinstance(refusal, RateLimitedError):
            asked = spread_submit_pause(pause_after(refusal.retry_after), random.random())
        await asyncio.sleep(max(backoff(failures, random.random()), asked))
        await self._turns.wait(rank)

    # ------------------------------------------------------------------ polls

    def limit_poll(self, within: float, *, gives_up: bool) -> PollLimit:
        """Return the time limit of a poll that is sent now.

        Args:
            within: Seconds that it may take, if that is less than the HTTP timeout.
            gives_up: Whether it is given up if it takes far longer than polls usually do.
        """
        return PollLimit(min(self._http_timeout, within), self._poll_timeout, gives_up)

    async def poll(
        self,
        message: HttpRequest,
        task_id: str,
        limit: PollLimit | None = None,
        *,
        request: GenerationRequest | None = None,
        within: float = math.inf,
        fresh_connection: bool = False,
    ) -> TaskSnapshot:
        """Poll a task once.

        Args:
            message: The poll, as `build_poll()` makes it.
            task_id: The task's id.
            limit: Its time limit, if it is repeated when it fails.
            request: What was requested: the service might echo its webhook secret.
            within: Seconds for which it is repeated.
            fresh_connection: Whether it uses a new connection.

        Raises:
            FluxError: The poll failed, or the service refused; `_retry` tells the two apart.
        """
        self._stats.count_poll(self.now())
        limiter = self.poll_limiter
        try:
            response = await self._transport.exchange(message, limit, within=within, fresh_connection=fresh_connection)
            if limit is not None:
                limit.record_answer()
            if request is not None and request.webhook_secret is not None:
                response = response.with_secret(request.webhook_secret)
            snapshot = parse_poll(response, task_id)
        except FluxError as error:
            self._record_error(error, is_poll=True)
            if isinstance(error, RateLimitedError):
                self._stats.rate_limited += 1
                limiter.record_refusal(self.now(), error.retry_after)
            else:
                limiter.record_other()
            # Without the parser's frames, which hold what is redacted in the error.
            raise error.with_traceback(None) from error.__cause__
        self.health.on_success(self.now(), is_poll=True)
        if limiter.refused:
            limiter.record_other()
        if snapshot.status is TaskStatus.IN_PROGRESS:
            self._unknown_statuses.log(snapshot)
        return snapshot

    def pause(self, chance: float) -> float:
        """Return the seconds that the service asked all polls to wait, plus up to two so that they spread.

        Args:
            chance: 0.0 to 1.0, drawn anew for each caller.
        """
        return spread_pause(self.poll_limiter.pause_remaining(self.now()), chance)

    def reserve_poll(self) -> float:
        """Reserve one poll of the session's limit; return the seconds until it may be made."""
        return self.poll_limiter.reserve(self.now())

    def poll_cost_factor(self) -> float:
        """Return how many times its usual cost a poll has now."""
        return self.poll_limiter.cost_factor(self.now())

    def count_retry(self) -> None:
        """Count a poll that will be made again."""
        self._stats.retries += 1

    def _record_error(self, error: FluxError, *, is_poll: bool) -> None:
        self.health.on_error(error, self.now(), is_poll=is_poll, is_reported=self._transport.outage.is_reported)

    # ------------------------------------------------------------------ tasks in flight

    def add_in_flight(self) -> None:
        """Count a task that was submitted elsewhere."""
        self._stats.in_flight += 1

    def remove_in_flight(self) -> None:
        """Count a task that has ended, or is not followed any more."""
        self._stats.in_flight -= 1
        self._turns.on_capacity_changed()
