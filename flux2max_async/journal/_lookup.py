"""Whether a request that the journal knows already is replayed, resumed or submitted."""

from collections import Counter

import attrs

from flux2max_async._exceptions import FluxError
from flux2max_async._models.results import Outcome


@attrs.frozen
class ReusePolicy:
    """What a caller wants done with a request that the journal knows already."""

    retry_failed: bool = False
    resubmit_uncertain: bool = False
    save_images: bool = False
    """Whether the session saves the images, and holds the entry until it has done so."""
    occurrences: Counter[str] | None = None
    """How often each fingerprint without a key occurred in a list so far; None takes equal requests for the same."""

    def merge(self, other: "ReusePolicy") -> "ReusePolicy":
        """Return the policy of two callers that share one runner: what either of them allows."""
        return ReusePolicy(
            self.retry_failed or other.retry_failed,
            self.resubmit_uncertain or other.resubmit_uncertain,
            self.save_images or other.save_images,
            self.occurrences,
        )


@attrs.frozen
class Replay:
    """The request has ended; this is its outcome."""

    outcome: Outcome


@attrs.frozen
class Resume:
    """The request is a task already, which has to be polled."""

    task_id: str
    age: float | None
    """Seconds since its submit; None if nobody knows."""
    adopted: bool = False
    """Whether this session has taken it over, and no other one counts it as in flight."""


@attrs.frozen
class Submit:
    """The request has to be submitted."""


class KeyConflictError(FluxError):
    """Another process has begun the same request in the meantime: look it up again. It reaches no caller."""
