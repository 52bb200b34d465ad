"""What a session keeps books with, and on which terms a request is taken that they know already."""

import asyncio
from collections import Counter

import attrs

from flux2max_async._budget import Budget
from flux2max_async._exceptions import FluxError
from flux2max_async.journal import Journal


class KeyConflict(FluxError):
    """Another process has begun the same request in the meantime: look again. It reaches no caller."""


@attrs.frozen
class ReusePolicy:
    """How requests are to be taken that the journal knows already."""

    retry_failed: bool = False
    resubmit_uncertain: bool = False
    to_be_saved: bool = False
    """Whether the pictures are saved by the session, which holds the entry until that is done."""
    occurrences: Counter[str] | None = None
    """How often each content without a key was asked for so far in a list; without one, the same is the same."""


@attrs.frozen
class Books:
    """What a session keeps books with."""

    ledger: Budget
    journal: Journal | None
    whole_journal: bool
    """Whether the budget is that of all that is in the journal, or only of this session."""
    secrets: tuple[str, ...] = attrs.field(repr=False)
    errands: set["asyncio.Task[None]"] = attrs.field(factory=set["asyncio.Task[None]"])
    """What is still being written down though nobody waits for it."""

    @property
    def needed(self) -> bool:
        """Whether there is anything to be kept."""
        return self.journal is not None or self.ledger.budget is not None
