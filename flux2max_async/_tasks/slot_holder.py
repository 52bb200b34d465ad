"""A request that needs a slot before it is submitted, and may wait for it."""

from abc import ABC, abstractmethod
from collections.abc import Coroutine
from contextvars import Context, copy_context
from typing import Any

import attrs

from flux2max_async._exceptions import FluxError
from flux2max_async._tasks.shared_task import SharedTask
from flux2max_async._tasks.slots import Place
from flux2max_async.journal._lookup import ReusePolicy


@attrs.define(eq=False, repr=False)
class SlotHolder(SharedTask, ABC):
    """A request, and its slot or its place in the queue.

    States: without a slot, waiting (`_place`), holding a slot (`_holds_slot`); at its end a subclass calls
    `_give_up_slot()`. `run()` runs in an asyncio task, but nothing runs while the request only waits for a slot:
    `run()` returns, or has not begun, and `on_slot()` starts it again, in the context of the first caller. So thousands
    that wait cost little memory, and little time when they arrive or leave at once.
    """

    _group: str | None = attrs.field(default=None, kw_only=True, alias="group")
    """Whose turns it uses."""
    _caller_context: Context = attrs.field(factory=copy_context, init=False)
    _is_counted: bool = attrs.field(default=False, kw_only=True, alias="is_counted")
    """Whether it counts as one of `max_waiting` while it waits."""
    _is_running: bool = attrs.field(default=False, init=False)
    """Whether there is an asyncio task of `run()`."""
    _holds_slot: bool = attrs.field(default=False, init=False)
    _place: Place | None = attrs.field(default=None, init=False)
    """Its place in the queue; None unless it waits for a slot."""
    _is_started: bool = attrs.field(default=False, init=False)
    is_admitted: bool = attrs.field(default=False, init=False)
    """Whether it may wait for a slot, however many do."""
    _is_new: bool = attrs.field(default=False, init=False)
    """Whether it was looked up, or need not be: it is to be submitted."""

    @property
    def is_waiting(self) -> bool:
        """Whether it is certain that nothing was submitted, and that nothing will be if all callers leave."""
        return not (self.ended.done() or (self._is_new and self._holds_slot) or self.task_id is not None)

    @property
    def was_withdrawn(self) -> bool:
        """Whether all callers have left before the submit, and nobody has joined since."""
        if self.ended.done():
            return self.is_withdrawn(self.ended.result())
        return self._withdrawal is not None and self.is_waiting

    @property
    def may_be_submitted(self) -> bool:
        """Whether there is a task, or a submit may be on the wire."""
        return self._holds_slot or self.task_id is not None

    @property
    def position(self) -> int | None:
        """Its place among those that wait for a slot, 1 for the next one; None if it doesn't wait."""
        return None if self._place is None else self._context.slots.position(self._place)

    # ------------------------------------------------------------------ state changes

    def start(self, *, joins_queue: bool = False) -> None:
        """Begin; do nothing if it has begun already.

        Args:
            joins_queue: Whether it takes a slot, or its place in the queue, which must not be full, before it is
                looked up.
        """
        if self._is_started:
            return
        self._is_started = True
        self._is_new = self.record.key is None and self.task_id is None
        self.is_admitted = self._is_new or joins_queue
        has_slot = self.is_admitted and self._take_slot()
        if has_slot or not self._is_new:
            self._spawn_run()

    def on_slot(self) -> None:
        """Go on with the slot."""
        self._place, self._holds_slot = None, True
        if not self._is_running:
            self._spawn_run()

    def on_no_slot(self, error: FluxError) -> None:
        """End without a slot, or ask again after the lookup, which may reveal that none is needed."""
        if self._is_running:
            self._give_up_slot()
        else:
            self.cancel_submit(error)

    def cancel_submit(self, reason: FluxError) -> None:
        """Submit nothing more. A call on the wire is finished, and the task it creates is polled."""
        super().cancel_submit(reason)
        if self._place is not None and not self._is_running:
            self._give_up_slot()
            self._cancellation.has_taken_effect = True
            self._context.bursts.call_later(self._end_unsubmitted)

    def submit_nothing(self, reason: FluxError) -> None:
        """Submit nothing more, because the session drains; follow a task that exists.

        While the journal is asked, a task may turn out to exist. Otherwise `run()` ends the request.
        """
        if self._is_new or (self._waiting_elsewhere and self.task_id is None):
            self.cancel_submit(reason)

    def join(self, policy: ReusePolicy, priority: int) -> None:
        """Count a caller; what it allows to be submitted again is allowed from now on."""
        super().join(policy, priority)
        self._update_priority()

    def leave(self, priority: int, reason: FluxError) -> None:
        """Count a caller out that has joined with this priority; the last one to leave cancels the submit."""
        super().leave(priority, reason)
        self._update_priority()

    def _update_priority(self) -> None:
        if self._place is not None and self.callers:
            self._context.slots.set_priority(self._place, max(self.callers))

    def _take_slot(self) -> bool:
        """Take a slot, if it has none; if none is free, wait for one and return False.

        Raises:
            QueueFullError: It can't wait.
        """
        slots = self._context.slots
        if not self._holds_slot and self._place is None:
            self._holds_slot = slots.try_acquire(self._group)
            if not self._holds_slot:
                if self._is_counted and not self.is_admitted:
                    self._context.bound.check_room(self._group)
                priority = max(self.callers, default=0)
                self._place = slots.enqueue(self, priority, self._group, counted=self._is_counted)
            self.is_admitted = True
        return self._holds_slot

    def _give_up_slot(self) -> None:
        if self._place is not None:
            self._context.slots.leave(self._place)
            self._place = None
        if self._holds_slot:
            self._holds_slot = False
            self._context.slots.release(self._group)

    def _spawn_run(self) -> None:
        self._is_running = True
        self._context.spawn(self.run(), context=self._caller_context)

    # ------------------------------------------------------------------ for subclasses

    @abstractmethod
    def run(self) -> Coroutine[Any, Any, None]:
        """Run the request to its end, or until it waits for a slot."""

    @abstractmethod
    def _end_unsubmitted(self) -> None:
        """End a request that was cancelled while it waited for its slot."""
