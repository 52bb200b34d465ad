"""Takes requests in: finds or creates the runner of each, and starts it."""

from functools import partial
from typing import Any, Self

import anyio.to_thread
import attrs

from flux2max_async._exceptions import InvalidRequestError
from flux2max_async._models.images import has_pictures
from flux2max_async._models.request import GenerationParams, GenerationRequest, as_request, validate_priority
from flux2max_async._shutdown import closed_error
from flux2max_async._tasks.context import RunnerContext, RunnerObserver
from flux2max_async._tasks.queued import QueuedGeneration
from flux2max_async._tasks.runner import TaskRunner
from flux2max_async._tasks.shared_result import SharedResult
from flux2max_async._tasks.time_limit import TimeLimit
from flux2max_async.journal._budget_record import NullRecord
from flux2max_async.journal._lookup import ReusePolicy
from flux2max_async.journal._record_factory import RecordFactory


def _validate_group(_: Any, __: "attrs.Attribute[Any]", value: object) -> None:
    if value is not None and not isinstance(value, str):
        raise InvalidRequestError(f"group must be a text or None, not {value!r}", field="group")


_DEFAULT_POLICY = ReusePolicy()


@attrs.frozen
class CallOptions:
    """How one call wants its request to be treated.

    Raises:
        InvalidRequestError: The priority is not an integer, or the group not a text.
    """

    priority: int = attrs.field(converter=validate_priority)
    policy: ReusePolicy
    group: str | None = attrs.field(default=None, validator=_validate_group)
    is_counted: bool = attrs.field(default=False, kw_only=True)
    """Whether the request counts as one of `max_waiting`, and is refused if the queue is full."""

    @classmethod
    def create(cls, priority: int, group: str | None, retry_failed: bool, resubmit_uncertain: bool) -> Self:  # noqa: FBT001 - passed on
        """Return the options of a call of generate(), submit() or enqueue()."""
        policy = (
            ReusePolicy(retry_failed, resubmit_uncertain) if retry_failed or resubmit_uncertain else _DEFAULT_POLICY
        )
        return cls(priority, policy, group, is_counted=True)


@attrs.define(eq=False)
class Intake:
    """Starts the runners of a session."""

    _context: RunnerContext
    _records: RecordFactory
    _runners: set[TaskRunner]
    """The unfinished runners, which the observer removes at their end."""
    _observer: RunnerObserver

    async def arrive(self) -> None:
        """Wait until a call may begin.

        Raises:
            SessionClosedError: The session is closed.
            ConfigurationError: It was opened in another process or event loop.
        """
        self._check_open()
        # Callers that are cancelled already stop here, and a source that never waits lets the event loop run.
        await self._context.bursts.wait()

    async def start_call(
        self,
        request: str | GenerationRequest,
        params: GenerationParams,
        options: CallOptions,
        limit: TimeLimit | None,
    ) -> tuple[GenerationRequest, TaskRunner]:
        """Return the request of a call, and its runner, which the caller has joined with its priority.

        Raises:
            InvalidRequestError: A parameter is wrong, a local image can't be read, or the key belongs to another
                request.
            QueueFullError: No slot is free, and as many requests as may wait are waiting.
            DeadlineExceededError: The time limit was over first.
            SessionClosedError: The session is closed or draining.
            ConfigurationError: It was opened in another process or event loop.
        """
        await self.arrive()
        if has_pictures(params.get("input_images")):
            building = anyio.to_thread.run_sync(partial(as_request, request, **params), abandon_on_cancel=True)
            request = await (building if limit is None else limit.run(building))
        else:
            request = as_request(request, **params)
        starting = self.start_request(request, options)
        return request, await (starting if limit is None else limit.run(starting))

    async def start_item(self, request: GenerationRequest, options: CallOptions) -> TaskRunner:
        """Do `arrive()` and `start_request()` for an item of a stream."""
        await self.arrive()
        return await self.start_request(request, options)

    async def start_request(self, request: GenerationRequest, options: CallOptions) -> TaskRunner:
        """Return the runner of a request, which the caller has joined with its priority.

        Raises:
            InvalidRequestError: A local image can't be read, or the key belongs to another request.
            QueueFullError: No slot is free, and as many requests as may wait are waiting.
            SessionClosedError: The session is closed or draining.
        """
        if self._records.keeps_nothing:
            record = NullRecord(policy=options.policy)
        else:
            record = await self._create_record(request, options.policy)
        if record.key is None:  # any other is looked up first
            self._context.polling.shutdown.check_submitting()
            if options.is_counted:
                self._context.bound.check_room(options.group)
        runner = self._get_or_create(request, record, options)
        runner.join(options.policy, options.priority)
        runner.is_admitted |= not options.is_counted
        runner.start()
        return runner

    def enqueue(self, request: GenerationRequest, options: CallOptions, limit: TimeLimit | None) -> QueuedGeneration:
        """Return a request that was taken in.

        Raises:
            InvalidRequestError: The key can't be written as UTF-8, or belongs to another request.
            QueueFullError: No slot is free, and as many requests as may wait are waiting.
            SessionClosedError: The session is closed or draining.
            ConfigurationError: It was opened in another process or event loop.
        """
        self._context.check_caller()
        self._context.polling.shutdown.check_submitting()
        queued = QueuedGeneration(self._context, request, options.priority, limit)
        if self._records.keeps_nothing:
            record: NullRecord | None = NullRecord(policy=options.policy)
        else:
            record = self._records.create_now(request, options.policy)
        unanswered = None if record is None else self._unanswered(record)
        if record is None or unanswered is not None or self._needs_room(record):
            self._context.bound.check_room(options.group)
        if record is not None and unanswered is None:
            self._start_queued(queued, request, record, options)
        else:
            queued.start_later(self._start_later(queued, request, options))
        return queued

    def attach(self, task_id: str, request: GenerationRequest | None) -> TaskRunner:
        """Return the runner of a task that was submitted earlier.

        Raises:
            SessionClosedError: The session is closed.
            ConfigurationError: It was opened in another process or event loop.
        """
        self._check_open()
        runner = self._context.single_flight.by_task_id.get(task_id)
        return runner or self.start_runner(request, self._records.attach(task_id, request), task_id)

    def start_runner(
        self, request: GenerationRequest | None, record: NullRecord, task_id: str | None = None
    ) -> TaskRunner:
        """Start the runner of a task that exists, whoever may wait for it."""
        runner = self._create(request, record, task_id=task_id)
        runner.start()
        return runner

    # ------------------------------------------------------------------ internals

    async def _start_later(self, queued: QueuedGeneration, request: GenerationRequest, options: CallOptions) -> None:
        """Start a request of which something has to be read or answered first."""
        record = await self._create_record(request, options.policy)
        self._context.polling.shutdown.check_submitting()
        self._start_queued(queued, request, record, options)

    def _start_queued(
        self, queued: QueuedGeneration, request: GenerationRequest, record: NullRecord, options: CallOptions
    ) -> None:
        runner = self._get_or_create(request, record, options)
        runner.join(options.policy, options.priority)
        runner.is_admitted = True
        runner.start(joins_queue=True)
        queued.follow(runner)

    async def _create_record(self, request: GenerationRequest, policy: ReusePolicy) -> NullRecord:
        record = self._records.create_now(request, policy)
        if record is None:
            record = await self._records.create(request, policy)
        if (unanswered := self._unanswered(record)) is not None:
            # If the submit that is under way turns out to be uncertain, it is to be made again.
            await unanswered.wait()
        return record

    def _unanswered(self, record: NullRecord) -> SharedResult[None] | None:
        """Return what has to be waited for before a request may be submitted again, if its submit may be uncertain."""
        runner = self._context.single_flight.by_key.get(record.key or "")
        if runner is None or runner.answered.done() or not record.policy.resubmit_uncertain:
            return None
        return runner.answered

    def _needs_room(self, record: NullRecord) -> bool:
        """Check whether nobody has asked for the same who may wait for a slot, or got it already."""
        existing = self._context.single_flight.by_key.get(record.key or "")
        return existing is None or existing.was_withdrawn or not existing.is_admitted

    def _get_or_create(self, request: GenerationRequest, record: NullRecord, options: CallOptions) -> TaskRunner:
        if record.key is None:
            return self._create(request, record, options)
        single_flight = self._context.single_flight
        if (existing := single_flight.by_key.get(record.key)) is not None:
            existing.record.check_same(record)
        runner = single_flight.get_or_create(record.key, lambda: self._create(request, record, options))
        runner.request = runner.request or request
        return runner

    def _create(
        self,
        request: GenerationRequest | None,
        record: NullRecord,
        options: CallOptions | None = None,
        *,
        task_id: str | None = None,
    ) -> TaskRunner:
        self._check_not_closed()
        runner = TaskRunner(
            request,
            record,
            self._context,
            task_id,
            created=self._context.polling.client.now(),
            observers=[self._observer],
            group=None if options is None else options.group,
            is_counted=options is not None and options.is_counted,
        )
        if task_id is not None:
            self._context.single_flight.by_task_id[task_id] = runner
        self._runners.add(runner)
        return runner

    def _check_open(self) -> None:
        self._context.check_caller()
        self._check_not_closed()

    def _check_not_closed(self) -> None:
        if self._context.polling.shutdown.closed:
            raise closed_error()
