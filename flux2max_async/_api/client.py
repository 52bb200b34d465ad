"""The API's verbs, submit and poll: the wire, the transport, and the pace and retries that keep them safe."""

import asyncio
import contextlib
import logging
import math
import random
from collections.abc import AsyncGenerator, Callable
from typing import Protocol

import anyio.to_thread

from flux2max_async._api.codec import HttpRequest, build_submit, parse_poll, parse_submit, status_of
from flux2max_async._api.poll_limiter import PollLimiter
from flux2max_async._api.retry import backoff, is_uncertain, may_submit_again
from flux2max_async._api.submit_limiter import MAX_PAUSE, SubmitLimiter
from flux2max_async._api.transport import Transport
from flux2max_async._exceptions import FluxError, RateLimitedError, SubmissionUncertainError
from flux2max_async._models.request import GenerationRequest
from flux2max_async._models.results import TaskSnapshot
from flux2max_async._stats import SessionStats

log = logging.getLogger("flux2max_async")


class SubmitCancellation:
    """What a submit waits under between its calls: there it can be withdrawn, and never during a call."""

    __slots__ = ("_reason", "_wait")

    def __init__(self) -> None:
        self._reason: FluxError | None = None
        self._wait: asyncio.Timeout | None = None

    def end(self, reason: FluxError) -> None:
        """Withdraw the submit: nothing more is sent, and a call on the wire is the last one."""
        self._reason = reason
        if self._wait is not None and not self._wait.expired():
            self._wait.reschedule(0.0)

    @contextlib.asynccontextmanager
    async def waiting(self, until: float | None = None) -> AsyncGenerator[None]:
        """Wait inside.

        Args:
            until: The moment at which patience ends by itself.

        Raises:
            TimeoutError: That moment came.
            FluxError: The submit is withdrawn; this is why.
        """
        if self._reason is None:
            try:
                async with asyncio.timeout_at(until) as self._wait:
                    yield
            except TimeoutError:
                if self._reason is None:
                    raise
            finally:
                self._wait = None
        # Whoever was withdrawn in the moment of its turn stops here, too.
        if self._reason is not None:
            raise self._reason


class Intent(Protocol):
    """What has to be done about each try of a submit, in its own turn."""

    async def declare(self) -> None:
        """Called before a byte is sent; an error keeps it from being sent."""

    async def revoke(self) -> None:
        """Called when a try has certainly bought nothing, and another one will follow."""


class ApiClient:
    """One account at one gateway: what is sent to it, in which order, and how it takes it.

    Args:
        transport: Makes the calls.
        stats: Counts them.
        places: The most tasks that the session keeps in flight.
        polls_per_second: The most polls that all tasks together make.
    """

    def __init__(self, transport: Transport, stats: SessionStats, places: int, polls_per_second: float) -> None:
        self.now: Callable[[], float] = asyncio.get_running_loop().time
        self._transport = transport
        self._stats = stats
        self._pace = SubmitLimiter(places)
        self._budget = PollLimiter(polls_per_second)
        self._turn = asyncio.Lock()
        self._changed = asyncio.Event()
        self._unknown_statuses: set[str] = set()

    async def submit(
        self, request: GenerationRequest, *, seconds: float, patience: SubmitCancellation, intent: Intent | None = None
    ) -> tuple[TaskSnapshot, float, float]:
        """Submit until the service answers for good; gives the new task, the moment of its submit, and its deadline.

        Args:
            request: What to draw.
            seconds: How long to go on, from the first call.
            patience: Withdraws the submit between two calls. What is on the wire is answered, or given up when its
                time is over: cut there, a task would exist, cost money, and have no name.
            intent: Hears of each try.

        Raises:
            InvalidRequestError: An input image can't be read.
            ResponseError: The service refused.
            TransportError: No connection within the time.
            SubmissionUncertainError: The answer was lost; nobody knows whether there is a task.
            FluxError: Why patience has ended.
        """
        async with patience.waiting():
            if any(not isinstance(image.source, str) for image in request.input_images):
                call = await anyio.to_thread.run_sync(build_submit, request)
            else:
                call = build_submit(request)
            await self._wait_for_turn()
        deadline = self.now() + seconds
        failures = 0
        refusal: FluxError | None = None
        while True:
            started = self.now()
            try:
                return await self._submit_once(call, request, intent, deadline), started, deadline
            except FluxError as error:
                if is_uncertain(error):
                    raise SubmissionUncertainError(
                        f"the submit went out, but its answer was lost ({error}): a task may exist and cost money"
                    ) from error
                if not may_submit_again(error):
                    raise
                refusal = error.with_traceback(None)
            assert refusal is not None
            if intent is not None:
                await intent.revoke()
            failures += 1
            # A last call with no time left for its answer would make an honest submit uncertain.
            try:
                async with patience.waiting(until=deadline - min(_LEAST_TIME, seconds / 4)):
                    if not isinstance(refusal, RateLimitedError):  # for those, the pace says how long
                        asked = getattr(refusal, "retry_after", None) or 0.0
                        await asyncio.sleep(max(backoff(failures, random.random()), min(asked, MAX_PAUSE)))
                    await self._wait_for_turn()
            except TimeoutError:
                raise refusal from refusal.__cause__
            self._stats.retries += 1
            log.warning("submit not accepted (%s); sent again", refusal)

    async def poll(
        self, call: HttpRequest, task_id: str, *, request: GenerationRequest | None = None, within: float = math.inf
    ) -> TaskSnapshot:
        """Look at a task once.

        Args:
            call: How to ask.
            task_id: What the task is called.
            request: What was asked for: the service might echo its secret.
            within: Seconds that the look may take, where that is less than the request timeout.

        Raises:
            FluxError: The look was missed, or the service refused; `_retry` tells which.
        """
        self._stats.polls += 1
        try:
            reply = await self._transport.exchange(call, within=within)
            snapshot = parse_poll(reply.without(request.webhook_secret) if request else reply, task_id)
        except RateLimitedError as error:
            self._stats.rate_limited += 1
            self._pace.poll_refused(self.now(), error.retry_after)
            self._budget.refused(self.now())
            raise
        self._note_status(snapshot)
        return snapshot

    def pause(self, chance: float) -> float:
        """Seconds that the service asked everybody to wait, and up to two more, so that not all come back at once."""
        pause = self._pace.pause(self.now())
        return pause + chance * min(pause, _SPREAD)

    def book_poll(self) -> float:
        """Book one poll of the budget that all tasks share; gives the seconds until it may be made."""
        return self._budget.book(self.now())

    def cost_factor(self) -> float:
        """How many times as dear as usual a poll is now."""
        return self._budget.cost_factor(self.now())

    def note_retry(self) -> None:
        """A poll is about to be made again."""
        self._stats.retries += 1

    def follow(self) -> None:
        """One more task is in flight that was not submitted here."""
        self._stats.in_flight += 1

    def release(self) -> None:
        """One task less is in flight."""
        self._stats.in_flight -= 1
        self._changed.set()

    async def _submit_once(
        self, call: HttpRequest, request: GenerationRequest, intent: Intent | None, deadline: float
    ) -> TaskSnapshot:
        probe = self._pace.submit_started()
        self._stats.submitting += 1
        try:
            if intent is not None:
                await intent.declare()
            reply = await self._transport.exchange(call, within=deadline - self.now())
            snapshot = parse_submit(reply.without(request.webhook_secret))
        except RateLimitedError as error:
            self._stats.rate_limited += 1
            self._pace.submit_refused(self.now(), self._stats.in_flight, error.retry_after, probe=probe)
            self._budget.refused(self.now())
            raise
        except BaseException:
            self._pace.submit_ended(probe=probe)
            raise
        else:
            self._stats.submitted += 1
            self._stats.in_flight += 1
            self._pace.submit_accepted(self._stats.in_flight, probe=probe)
            self._note_status(snapshot)
            return snapshot
        finally:
            self._stats.submitting -= 1
            self._changed.set()

    async def _wait_for_turn(self) -> None:
        """Wait until one more submit may start; first come, first served. No wait comes between this and the submit."""
        async with self._turn:
            while (delay := self._submit_delay()) > 0:
                self._changed = asyncio.Event()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(delay if delay < math.inf else None):
                        await self._changed.wait()

    def _submit_delay(self) -> float:
        if self._stats.submitting >= _LINES:
            return math.inf
        return self._pace.submit_delay(self.now(), self._stats.in_flight)

    def _note_status(self, snapshot: TaskSnapshot) -> None:
        status = snapshot.raw.get("status")
        if isinstance(status, str) and status_of(status) is None and status not in self._unknown_statuses:
            self._unknown_statuses.add(status)
            log.warning("unknown task status %r: taken for still running", status)


_LINES = 100
"""Submits on the wire at once: one that waits for a connection takes 8 KiB, and its time for the exchange runs."""
_LEAST_TIME = 5.0
_SPREAD = 2.0
