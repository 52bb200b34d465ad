"""The API's verbs, submit and poll: the wire, the transport, and the pace and retries that keep them safe."""

import logging
import math
import random

import anyio
import anyio.lowlevel
import anyio.to_thread

from flux2max_async._errors import FluxError, RateLimitedError, SubmissionUncertainError
from flux2max_async._pace import MAX_PAUSE, Pace
from flux2max_async._request import GenerationRequest
from flux2max_async._retry import backoff, is_uncertain, may_submit_again
from flux2max_async._stats import SessionStats
from flux2max_async._task import TaskSnapshot
from flux2max_async._transport import Transport
from flux2max_async._wire import Call, read_poll, read_submit, status_of, submit_call

log = logging.getLogger("flux2max_async")


class Gateway:
    """One account at one gateway: what is sent to it, in which order, and how it takes it.

    Args:
        transport: Makes the calls.
        stats: Counts them.
        places: The most tasks that the session keeps in flight.
    """

    def __init__(self, transport: Transport, stats: SessionStats, places: int) -> None:
        self._transport = transport
        self._stats = stats
        self._pace = Pace(places)
        self._turn = anyio.Lock(fast_acquire=True)
        self._changed = anyio.Event()
        self._unknown_statuses: set[str] = set()

    async def submit(self, request: GenerationRequest, *, seconds: float) -> tuple[TaskSnapshot, float, float]:
        """Submit until the service answers for good; gives the new task, the moment of its submit, and its deadline.

        Cancelling it takes effect between two calls, never during one: what is on the wire is answered, or given up
        when its time is over.

        Args:
            request: What to draw.
            seconds: How long to go on, from the first call.

        Raises:
            InvalidRequestError: An input image can't be read.
            ResponseError: The service refused.
            TransportError: No connection within the time.
            SubmissionUncertainError: The answer was lost; nobody knows whether there is a task.
        """
        if any(not isinstance(image.source, str) for image in request.input_images):
            call = await anyio.to_thread.run_sync(submit_call, request)
        else:
            call = submit_call(request)
        await self._wait_for_turn()
        deadline = anyio.current_time() + seconds
        failures = 0
        refusal: FluxError | None = None
        while True:
            started = anyio.current_time()
            try:
                # Cut here, a task would exist, cost money, and have no name.
                with anyio.CancelScope(shield=True):
                    return await self._submit_once(call, request, deadline - started), started, deadline
            except FluxError as error:
                if is_uncertain(error):
                    raise SubmissionUncertainError(
                        f"the submit went out, but its answer was lost ({error}): a task may exist and cost money"
                    ) from error
                if not may_submit_again(error):
                    raise
                refusal = error.with_traceback(None)
            assert refusal is not None
            failures += 1
            # A last call with no time left for its answer would make an honest submit uncertain.
            with anyio.CancelScope(deadline=deadline - min(_LEAST_TIME, seconds / 4)) as patience:
                if not isinstance(refusal, RateLimitedError):  # for those, the pace says how long
                    asked = getattr(refusal, "retry_after", None) or 0.0
                    await anyio.sleep(max(backoff(failures, random.random()), min(asked, MAX_PAUSE)))
                await self._wait_for_turn()
            if patience.cancelled_caught:
                raise refusal
            self._stats.retries += 1
            log.warning("submit not accepted (%s); sent again", refusal)

    async def poll(
        self, call: Call, task_id: str, *, request: GenerationRequest | None = None, within: float = math.inf
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
            snapshot = read_poll(reply.without(request.webhook_secret) if request else reply, task_id)
        except RateLimitedError as error:
            self._stats.rate_limited += 1
            self._pace.poll_refused(anyio.current_time(), error.retry_after)
            raise
        self._note_status(snapshot)
        return snapshot

    def pause(self, chance: float) -> float:
        """Seconds that the service asked everybody to wait, and up to two more, so that not all come back at once."""
        pause = self._pace.pause(anyio.current_time())
        return pause + chance * min(pause, _SPREAD)

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

    async def _submit_once(self, call: Call, request: GenerationRequest, within: float) -> TaskSnapshot:
        probe = self._pace.submit_started()
        try:
            reply = await self._transport.exchange(call, within=within)
            snapshot = read_submit(reply.without(request.webhook_secret))
        except RateLimitedError as error:
            self._stats.rate_limited += 1
            self._pace.submit_refused(anyio.current_time(), self._stats.in_flight, error.retry_after, probe=probe)
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
            self._changed.set()

    async def _wait_for_turn(self) -> None:
        """Wait until one more submit may start; first come, first served. No wait comes between this and the submit."""
        async with self._turn:
            while (delay := self._pace.submit_delay(anyio.current_time(), self._stats.in_flight)) > 0:
                self._changed = anyio.Event()
                with anyio.move_on_after(delay):
                    await self._changed.wait()
            # Whoever was withdrawn in the moment of its turn stops here; for all others this is no wait at all.
            await anyio.lowlevel.checkpoint_if_cancelled()

    def _note_status(self, snapshot: TaskSnapshot) -> None:
        status = snapshot.raw.get("status")
        if isinstance(status, str) and status_of(status) is None and status not in self._unknown_statuses:
            self._unknown_statuses.add(status)
            log.warning("unknown task status %r: taken for still running", status)


_LEAST_TIME = 5.0
_SPREAD = 2.0
