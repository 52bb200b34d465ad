"""The lifetime of a session: its parts are made from its arguments, opened, drained and closed."""

import math
from functools import partial
from typing import Any, Self

import aiohttp
import attrs

from flux2max_async._api.client import ApiClient
from flux2max_async._api.transport import Transport
from flux2max_async._budget import Budget
from flux2max_async._config import SessionConfig, validate_drain
from flux2max_async._exceptions import ConfigurationError, SessionClosedError
from flux2max_async._health import SessionHealth
from flux2max_async._in_flight_limit import InFlightLimit
from flux2max_async._polling.context import PollingContext
from flux2max_async._polling.learned import LearnedSchedule
from flux2max_async._polling.schedules import PollSchedule
from flux2max_async._polling.shared_learning import SharedLearning
from flux2max_async._shutdown import Shutdown, closed_error
from flux2max_async._signals import DrainHandler, install_handlers
from flux2max_async._stats import SessionCounters, SessionStats
from flux2max_async._tasks.handle import GenerationTask
from flux2max_async._tasks.runner import TaskRunner
from flux2max_async._tasks.shared_slots import SharedSlotQueue
from flux2max_async._tasks.slots import SlotQueue
from flux2max_async._tasks.supervisor import Supervisor
from flux2max_async.journal._protocol import Journal
from flux2max_async.journal._record_factory import RecordFactory
from flux2max_async.webhooks._dispatcher import WebhookDispatcher
from flux2max_async.webhooks._inbox import WebhookInbox
from flux2max_async.webhooks._registry import WebhookRegistry


@attrs.frozen(eq=False)
class SessionParts:
    """What a session consists of while it isn't open, too."""

    config: SessionConfig
    transport: Transport
    records: RecordFactory
    dispatcher: WebhookDispatcher | None
    journal: Journal | None
    schedule: PollSchedule
    learning: SharedLearning | None
    """None without a journal, and with a schedule that belongs to somebody else."""
    stats: SessionCounters = attrs.field(factory=SessionCounters, init=False)

    @classmethod
    def create(
        cls,
        http_session: aiohttp.ClientSession | None,
        journal: Journal | None,
        webhooks: WebhookInbox | None,
        schedule: PollSchedule | None,
        **settings: Any,
    ) -> Self:
        """Make the parts.

        Args:
            http_session: A borrowed aiohttp session.
            journal: The session's journal.
            webhooks: The session's inbox.
            schedule: Belongs to the caller; None: one of the session's own, whose state the journal keeps.
            **settings: The fields of SessionConfig.

        Raises:
            ConfigurationError: A setting is missing or wrong.
        """
        config = SessionConfig(**settings, has_journal=journal is not None)
        if webhooks is not None and not isinstance(webhooks, WebhookInbox):
            raise ConfigurationError(f"webhooks must be a WebhookInbox, not {type(webhooks).__name__}")
        dispatcher = webhooks.dispatcher if webhooks else None
        transport = Transport(
            config.api_key,
            config.base_url,
            timeout=config.http_timeout,
            http=http_session,
            headers=config.headers,
            proxy=config.proxy,
            trust_env=config.trust_env,
            ssl_context=config.ssl_context,
            secrets=dispatcher.secrets if dispatcher else (),
            allow_private_downloads=config.allow_private_downloads,
        )
        records = RecordFactory(journal, Budget(config.budget, config.price_guess), config, secrets=transport.secrets)
        learning = None if journal is None or schedule is not None else SharedLearning(journal)
        schedule = learning.schedule if learning else LearnedSchedule() if schedule is None else schedule
        return cls(config, transport, records, dispatcher, journal, schedule, learning)

    @property
    def shared_limit(self) -> InFlightLimit | None:
        """The limit that is shared with other sessions, if there is one."""
        limit = self.config.max_in_flight
        return None if isinstance(limit, int) else limit

    def _create_slots(self) -> SlotQueue:
        limit, max_per_group = self.config.max_in_flight, self.config.max_per_group
        if isinstance(limit, int):
            return SlotQueue(limit, max_per_group=max_per_group)
        return SharedSlotQueue(limit, max_per_group=max_per_group)

    async def open(self) -> Supervisor:
        """Open the parts; return their supervisor. Nothing is left open if one of them can't be opened."""
        shutdown, config, dispatcher = Shutdown(), self.config, self.dispatcher
        client = ApiClient(self.transport, self.stats, config)
        registry = dispatcher.registry if dispatcher else WebhookRegistry()
        registry.in_use = dispatcher is not None or self.journal is not None
        supervisor = Supervisor(
            PollingContext(client, self.schedule, registry, shutdown, config.task_timeout),
            self.stats,
            self.records,
            slots=self._create_slots(),
            max_waiting=config.max_waiting,
            add_webhook=dispatcher.add_webhook if dispatcher else None,
        )
        if dispatcher is not None:
            spawn = partial(supervisor.spawn, until_drain=True)
            dispatcher.open(shutdown, self.journal, secrets=self.transport.secrets, spawn=spawn)
        self.transport.open(config.in_flight_limit)
        try:
            if self.shared_limit is not None:
                if self.journal is not None:
                    self.shared_limit.expect_adoption()
                await self.shared_limit.open()
            if self.journal is not None:
                await self._open_journal(self.journal, supervisor)
        except BaseException:
            if dispatcher is not None:
                dispatcher.close()
            await self._close_shared()
            raise
        self.stats.in_flight = self.stats.submitting = 0
        return supervisor

    async def close(self, supervisor: Supervisor) -> None:
        """Drain and close the parts, each of them also if another one fails."""
        try:
            await supervisor.drain()
            await supervisor.close()
        finally:
            supervisor.close_now()  # if closing is cut short, as by a second Ctrl-C, the ids are logged all the same
            if self.dispatcher is not None:
                self.dispatcher.close()
            try:
                if self.journal is not None:
                    await self._close_journal(self.journal)
            finally:
                await self._close_shared()

    async def _open_journal(self, journal: Journal, supervisor: Supervisor) -> None:
        await journal.open(supervisor.on_external_change, watch_changes=self.dispatcher is not None)
        if self.learning is not None:
            try:
                await self.learning.load(supervisor.spawn)
            except BaseException:
                supervisor.close_now()  # it may have adopted tasks already
                await journal.close()
                raise

    async def _close_journal(self, journal: Journal) -> None:
        try:
            if self.learning is not None:
                await self.learning.save()
        finally:
            await journal.close()

    async def _close_shared(self) -> None:
        try:
            if self.shared_limit is not None:
                await self.shared_limit.close()
        finally:
            await self.transport.close()


class SessionLifetime:
    """What FluxSession inherits: entering and closing it, and its counters."""

    _parts: SessionParts
    _supervisor: Supervisor | None = None
    """While the session is open."""
    _is_opening = False
    _was_open = False
    _unfinished: tuple[TaskRunner, ...] = ()
    """What was unfinished when the session was closed."""
    _drain_handlers: tuple[DrainHandler, ...] = ()

    async def start(self) -> Self:
        """Do what `async with` does on entering, for notebooks and frameworks with hooks of their own.

        `aclose()` ends the session.

        Returns:
            The session itself.

        Raises:
            SessionClosedError: It is open already.
            FluxError: Its journal or its limit can't be opened.
        """
        is_open = self._supervisor is not None and not self._supervisor.loop_is_closed
        if self._supervisor is not None and is_open:
            self._supervisor.check_caller()
        if self._is_opening or is_open:
            raise SessionClosedError("the session is open already: enter it once, and share it")
        self._forget_supervisor()
        self._is_opening = True
        try:
            self._supervisor = supervisor = await self._parts.open()
        finally:
            self._is_opening = False
        self._was_open = True
        self._drain_handlers = install_handlers(self._parts.config.drain_signals, supervisor.begin_drain)
        return self

    async def __aenter__(self) -> Self:
        return await self.start()

    async def __aexit__(self, *exc: object) -> None:
        await self.aclose()

    async def aclose(self, *, drain: float | None = None) -> None:
        """Close the session: whatever is still waited for ends with SessionClosedError.

        For `drain` seconds, by default the session's own, submitted tasks may still end, and the images of a
        `stream(save_to=...)` be saved, while nothing more is submitted. A second call may shorten that.
        """
        seconds = self._parts.config.drain if drain is None else validate_drain(drain)
        supervisor = self._supervisor
        if supervisor is None or supervisor.loop_is_closed:
            self._forget_supervisor()
            return
        supervisor.check_caller()
        await supervisor.shut_down(seconds, lambda: self._close(supervisor))

    def begin_drain(self) -> None:
        """Submit nothing more from now on, for example because the server is about to stop.

        What waits for a slot, and the rest of a stream's requests, ends at once with SessionClosedError ("the service
        is shutting down"); so does a new request. What is submitted is followed, without a limit of time until
        `aclose()` sets one. With a journal, a request whose task exists is still answered: it shares a running task, of
        another process too, or replays an outcome. `attach()` and downloads go on. Polls don't count on webhooks any
        more, since a server that stops has closed its port.

        It returns at once, may be repeated, and may be called in a signal handler or another thread. It can't be taken
        back, but by `aclose()` and entering the session again. `drain_signals` calls it.
        """
        supervisor = self._supervisor
        if supervisor is not None:
            supervisor.begin_drain()

    @property
    def schedule(self) -> PollSchedule:
        """The schedule that was given, or the session's own `LearnedSchedule`."""
        return self._parts.schedule

    @property
    def stats(self) -> SessionStats:
        """A copy of the counters."""
        counters, schedule, supervisor = self._parts.stats, self._parts.schedule, self._supervisor
        percentile = schedule.percentile if isinstance(schedule, LearnedSchedule) else lambda _: None
        durations = {"median_duration": percentile(50), "p90_duration": percentile(90)}
        if supervisor is None:
            return counters.to_stats(math.inf, in_flight_limit=self._parts.config.in_flight_limit, **durations)
        now, limiter = supervisor.client.now(), supervisor.client.submit_limiter
        return counters.to_stats(
            now,
            waiting=supervisor.slots.waiting,
            oldest_in_flight=max((runner.elapsed for runner in supervisor.unfinished), default=None),
            in_flight_limit=limiter.limit,
            paused_for=limiter.pause_remaining(now),
            **durations,
        )

    @property
    def unfinished(self) -> tuple[GenerationTask, ...]:
        """The tasks that were submitted and whose ends were not seen; after `aclose()`, those that its log line names.

        `attach(task.id)` follows one of them later.
        """
        runners = self._unfinished if self._supervisor is None else self._supervisor.unfinished
        return tuple(map(GenerationTask, runners))

    def health(self) -> SessionHealth:
        """Return whether the session can serve requests now; nothing is sent for it."""
        supervisor = self._supervisor
        if supervisor is None or supervisor.loop_is_closed:
            return SessionHealth(state="closed", ok=False)
        client, shutdown = supervisor.client, supervisor.shutdown
        return client.health.check(
            "closed" if shutdown.closed else "draining" if shutdown.draining else "open",
            client.now(),
            waiting=supervisor.slots.waiting,
            in_flight=self._parts.stats.in_flight,
        )

    async def _close(self, supervisor: Supervisor) -> None:
        try:
            await self._parts.close(supervisor)
        finally:
            self._forget_supervisor()

    def _forget_supervisor(self) -> None:
        if self._supervisor is not None:
            self._unfinished = self._supervisor.unfinished
        self._supervisor = None
        for handler in self._drain_handlers:
            handler.remove()
        self._drain_handlers = ()

    def _get_supervisor(self) -> Supervisor:
        if self._supervisor is None:
            raise closed_error() if self._was_open else _not_started_error()
        return self._supervisor


def _not_started_error() -> SessionClosedError:
    return SessionClosedError("the session has not been started: use `async with`, or `await session.start()`")
