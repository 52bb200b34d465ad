"""What a session has done so far, in numbers."""

from decimal import Decimal
from typing import Any

import attrs


@attrs.define
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
    completed: int = 0
    failed: int = 0
    """Requests that came to nothing, for whatever reason. What was withdrawn, or refused because the queue was full,
    doesn't count."""
    withdrawn: int = 0
    """Requests that ended before they were submitted because nobody wanted them any more: their callers were cancelled
    or their timeouts over, `withdraw()` was called, or their stream has stopped."""
    replayed: int = 0
    """How many of the completed and failed ones came from the journal."""
    webhooks: int = 0
    """How many tasks ended by a webhook, before a poll had seen it."""
    polls: int = 0
    retries: int = 0
    """Calls made again after a failure."""
    rate_limited: int = 0
    """Answers with 429."""
    spent: Decimal = Decimal(0)
    """US dollars: the sum of `usage.cost` over what has ended."""
    median_duration: float | None = None
    """Seconds within which half of the tasks complete, as the schedule has learned it; None until it has."""
    p90_duration: float | None = None
    """Seconds within which nine of ten tasks complete."""

    def to_dict(self) -> dict[str, Any]:
        """Return the counts as JSON values, with a "version"; dollars are text, so that they stay exact."""
        return {"version": 1, **attrs.asdict(self), "spent": str(self.spent)}
