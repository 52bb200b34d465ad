"""What a session has done so far, in numbers."""

import math
from decimal import Decimal
from typing import Any

import attrs

_RATE_WINDOW = 10.0
"""Seconds; what happened longer ago hardly counts in a rate."""


@attrs.define
class RecentRate:
    """How many events there were per second in the last seconds: an exponential moving average."""

    _rate: float = 0.0
    _at: float = -math.inf

    def add(self, now: float) -> None:
        """Count an event."""
        self._rate, self._at = self.value(now) + 1 / _RATE_WINDOW, now

    def value(self, now: float) -> float:
        """Return the events per second."""
        return self._rate * math.exp((self._at - now) / _RATE_WINDOW)


@attrs.define
class SessionCounters:
    """What a session counts; `SessionStats` describes it."""

    submitted: int = 0
    submitting: int = 0
    in_flight: int = 0
    completed: int = 0
    failed: int = 0
    uncertain: int = 0
    withdrawn: int = 0
    replayed: int = 0
    webhooks: int = 0
    polls: int = 0
    retries: int = 0
    rate_limited: int = 0
    spent: Decimal = Decimal(0)
    downloading: int = 0
    downloaded_bytes: int = 0
    poll_rate: RecentRate = attrs.field(factory=RecentRate, init=False)

    def count_poll(self, now: float) -> None:
        """Count a poll that is sent now."""
        self.polls += 1
        self.poll_rate.add(now)

    def to_stats(self, now: float, **more: Any) -> "SessionStats":
        """Return a copy of the counts.

        Args:
            now: The time on the event loop's clock.
            **more: What isn't counted here.
        """
        counted = {name: getattr(self, name) for name in attrs.fields_dict(SessionCounters) if name != "poll_rate"}
        return SessionStats(**counted, polls_per_second=self.poll_rate.value(now), **more)


@attrs.frozen
class SessionStats:
    """The counts of a session since it was made; `session.stats` gives a copy of the moment."""

    waiting: int = 0
    """Requests that wait for a slot."""
    submitted: int = 0
    """Submits that the service gave an id."""
    submitting: int = 0
    """Submits that are on the wire now: each may become a task."""
    in_flight: int = 0
    """Tasks followed now, attached ones included."""
    oldest_in_flight: float | None = None
    """Seconds since the submit (or the attach) of the oldest of them; None if there is none."""
    in_flight_limit: int = 0
    """The tasks that may be in flight now: `max_in_flight`, or fewer after refusals."""
    paused_for: float = 0.0
    """Seconds until submits go on, because the service has asked for a pause; 0.0 without one."""
    completed: int = 0
    failed: int = 0
    """Requests that came to nothing, for whatever reason. What was withdrawn, or refused because the queue was full,
    doesn't count."""
    uncertain: int = 0
    """How many of the failed ones were submits whose answers were lost: each may have created a task."""
    withdrawn: int = 0
    """Requests that ended before they were submitted because nobody wanted them any more: their callers were cancelled
    or their timeouts over, `withdraw()` was called, or their stream has stopped."""
    replayed: int = 0
    """How many of the completed and failed ones came from the journal."""
    webhooks: int = 0
    """How many tasks ended by a webhook, before a poll had seen it."""
    polls: int = 0
    polls_per_second: float = 0.0
    """In about the last ten seconds."""
    retries: int = 0
    """Calls made again after a failure."""
    rate_limited: int = 0
    """Answers with 429."""
    spent: Decimal = Decimal(0)
    """US dollars: the sum of `usage.cost` over what has ended."""
    downloading: int = 0
    """Downloads that run now, those that wait for a connection included."""
    downloaded_bytes: int = 0
    """Bytes of images that were received, those of repeated attempts included."""
    median_duration: float | None = None
    """Seconds within which half of the tasks complete, as the schedule has learned it; None until it has."""
    p90_duration: float | None = None
    """Seconds within which nine of ten tasks complete."""

    def to_dict(self) -> dict[str, Any]:
        """Return the counts as JSON values, with a "version"; dollars are text, so that they stay exact."""
        return {"version": 1, **attrs.asdict(self), "spent": str(self.spent)}
