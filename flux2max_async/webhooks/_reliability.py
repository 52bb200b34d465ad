"""How much a session may rely on webhooks: how many ends they report, and how promptly. Pure.

A poll is worth its cost if it notices an end earlier than the webhook does, which happens only if the webhook is lost
or late. So the cost of a poll rises with the trust in webhooks, which each end moves: to 1.0 if a webhook reported it,
to 0.0 if none did, and in between if a poll was first and a webhook came later. Trust has to be earned: at first, polls
cost what they cost without webhooks. It changes within a few ends, in both directions.
"""

import math
from collections import OrderedDict

import attrs

_INITIAL_TRUST = 0.7
"""A few webhooks in a row raise the cost factor."""
_LEARNING_RATE = 0.15
"""How far one end moves the trust."""
_TRUST_EXPONENT = 4
"""With fewer than half of the ends reported, polls are as frequent as without webhooks. With 1.0, the best value for
the mean delay, the ends that are not reported would be noticed too late."""
_MAX_COST_FACTOR = 64.0
"""Polling never stops entirely, however many webhooks arrive."""
_MAX_PENALTY = 8.0
"""One late webhook takes away the trust at most."""
_MAX_AWAITED = 1_000
"""Polled ends whose webhooks may still come."""


@attrs.frozen
class _PolledEnd:
    """An end that a poll noticed first, whose webhook may still come."""

    noticed_at: float
    interval: float
    """Seconds since the poll before."""
    cost_factor: float


@attrs.define(eq=False)
class WebhookReliability:
    """The trust in webhooks, learned from the most recent ends.

    If webhooks take d seconds, and polls come every I, a poll is first with probability d / I, on the average d / 2
    before the webhook. Polls that cost f times as much as usual come every I = I0 sqrt(f). So the mean of 2 f / I times
    the seconds from a poll to the webhook is (d / I0)²: 0.0 if webhooks are prompt, and 1.0 if they take as long as
    polls do without webhooks. That is what a late webhook takes from the trust.
    """

    _trust: float = attrs.field(default=_INITIAL_TRUST, init=False)
    _awaited: OrderedDict[str, _PolledEnd] = attrs.field(factory=OrderedDict[str, _PolledEnd], init=False)
    """By task id, the newest last."""

    @property
    def cost_factor(self) -> float:
        """How many times the usual cost a poll has if a webhook is expected; a power of two, 1.0 to 64.0."""
        usual_share = 1 - self._trust**_TRUST_EXPONENT
        return 2.0 ** round(-math.log2(max(usual_share, 1 / _MAX_COST_FACTOR)))

    @property
    def is_prompt(self) -> bool:
        """Whether webhooks arrive so soon after the ends that they tell when these were."""
        return self._trust > 0.5

    def record_webhook(self) -> None:
        """Learn from an end that a webhook reported first."""
        self._trust += (1 - self._trust) * _LEARNING_RATE

    def record_poll(self, task_id: str, now: float, *, interval: float, cost_factor: float) -> None:
        """Learn from an end that a poll noticed first.

        Args:
            task_id: The task.
            now: When it was noticed.
            interval: Seconds since the poll before, or since the submit.
            cost_factor: By which the polls of this task were planned.
        """
        self._trust -= self._trust * _LEARNING_RATE
        self._awaited[task_id] = _PolledEnd(now, interval, cost_factor)
        if len(self._awaited) > _MAX_AWAITED:
            self._awaited.popitem(last=False)

    def record_delivery(self, task_id: str, now: float) -> None:
        """Learn from a webhook that reports an end: how late it is, if a poll noticed the end first."""
        end = self._awaited.pop(task_id, None)
        # One that comes later than the next poll would have is as good as none. Many such may come after an outage.
        if end is not None and now - end.noticed_at < end.interval:
            penalty = 2 * end.cost_factor * (now - end.noticed_at) / end.interval
            self._trust = max(self._trust + (1 - min(penalty, _MAX_PENALTY)) * _LEARNING_RATE, 0.0)

    def reset(self) -> None:
        """Wait for no webhooks any more; the trust stays."""
        self._awaited.clear()
