"""Who waits for which webhook, and how far webhooks can be relied on. No I/O.

A poll is worth its price where it notices an end sooner. Where a webhook is expected, it does so only if the webhook
is lost or late: so its price is divided by the share of ends that were noticed by a poll first. That share is learned
from the newest ends and reacts within a few of them, in both directions.
"""

import math
from collections import OrderedDict
from typing import Protocol, Self

import attrs

from flux2max_async._models.results import TaskSnapshot

_FIRST_GUESS = 1 / 16
_PACE = 0.15
"""How much one end changes what was learned before."""
_LEAST = 1 / 64
"""However many webhooks arrive, they aren't relied on more than this: as safety, polls never cease."""
_MUCH, _IN_A_ROW = 4.0, 3
"""How many times less dear polls must have become, and by how many ends in a row, for all to be planned anew."""
_KEPT = 1_000
_SMALL = 8_192
"""Bytes of a delivery that may be kept; a finished task takes about one thousand."""


class Listener(Protocol):
    """Somebody who follows a task."""

    def hear(self, snapshot: TaskSnapshot | None) -> None:
        """A webhook tells of the task; None where what it tells can't be read."""

    async def until_over(self) -> None:
        """Wait until the end has been dealt with, or can't be any more."""

    def replan(self) -> None:
        """Polls have become much less dear: one that is planned may come earlier."""


@attrs.define(eq=False)
class WebhookRegistry:
    """The webhooks of one address."""

    _late: float = _FIRST_GUESS
    """The share of the newest ends that a poll has noticed first."""
    _listeners: dict[str, list[Listener]] = attrs.field(factory=dict[str, list[Listener]], init=False)
    _early: OrderedDict[str, TaskSnapshot] = attrs.field(factory=OrderedDict[str, TaskSnapshot], init=False)
    """What nobody has waited for yet: a webhook may be faster than the answer to its submit."""
    deaf: bool = attrs.field(default=False, init=False)
    """Whether nothing more will come in: servers that shut down stop listening before their sessions are closed."""
    _polled: int = attrs.field(default=0, init=False)
    """How many of the newest ends a poll has noticed first, in a row."""
    _relied: float = attrs.field(default=attrs.Factory(lambda self: self.cost_factor, takes_self=True), init=False)
    """The dearness at which some polls may have been planned."""

    def afresh(self) -> Self:
        """Begin anew, with what was learned of the webhooks."""
        return type(self)(self._late)

    @property
    def cost_factor(self) -> float:
        """How many times as dear as usual a poll is where a webhook is expected; in whole powers of two."""
        if self.deaf:
            return 1.0
        return 2.0 ** round(-math.log2(self._late))

    def noticed(self, *, told: bool) -> None:
        """An end for which a webhook was expected has been noticed: the webhook told it, or a poll was faster."""
        if self.deaf:
            return
        self._late = max(_LEAST, self._late + ((not told) - self._late) * _PACE)
        self._polled = 0 if told else self._polled + 1
        if self._polled >= _IN_A_ROW and self.cost_factor <= self._relied / _MUCH:
            for listeners in self._listeners.values():
                for listener in listeners:
                    listener.replan()
            self._relied = self.cost_factor
        self._relied = max(self._relied, self.cost_factor)

    def expect(self, task_id: str, listener: Listener) -> TaskSnapshot | None:
        """Listen for what is delivered about a task; gives what has come already."""
        self._listeners.setdefault(task_id, []).append(listener)
        return self._early.pop(task_id, None)

    def forget(self, task_id: str, listener: Listener) -> None:
        """Stop listening: the task has ended, or isn't followed any more."""
        listeners = self._listeners.get(task_id, [])
        if listener in listeners:
            listeners.remove(listener)
            if not listeners:
                del self._listeners[task_id]

    def listeners(self, task_id: str) -> tuple[Listener, ...]:
        """Give who follows a task."""
        return tuple(self._listeners.get(task_id, ()))

    def keep(self, snapshot: TaskSnapshot, size: int) -> bool:
        """Keep an end that nobody waits for yet, for a while; tells whether it is kept.

        Args:
            snapshot: What was delivered.
            size: The bytes of the delivery.
        """
        if size > _SMALL:
            return False
        self._early[snapshot.task_id] = snapshot
        if len(self._early) > _KEPT:
            self._early.popitem(last=False)
        return True

    def keeps(self, snapshot: TaskSnapshot) -> bool:
        """Tell whether it is still kept."""
        return self._early.get(snapshot.task_id) is snapshot

    def drop(self, snapshot: TaskSnapshot) -> None:
        """Keep it no longer."""
        self._early.pop(snapshot.task_id, None)
