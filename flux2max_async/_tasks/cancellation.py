"""Cancelling a submit between its calls, and never during one."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator

import attrs

from flux2max_async._exceptions import FluxError


@attrs.define(eq=False)
class SubmitCancellation:
    """Whether a submit was cancelled, and why.

    A submit waits only inside `guard()`: for the journal, its turn, or its next attempt. There `cancel()` ends the wait
    at once. Outside of it a call may be on the wire; then the cancellation takes effect at the next one, so that no
    answer, and no task id, is lost. Where nothing has to be waited for, checking `reason` is enough. What waits for a
    slot is ended by its runner.
    """

    reason: FluxError | None = attrs.field(default=None, init=False)
    _guarded: asyncio.Timeout | None = attrs.field(default=None, init=False)
    has_taken_effect: bool = attrs.field(default=False, init=False)
    """Whether the submit has ended with the reason."""

    def cancel(self, reason: FluxError) -> None:
        """Send nothing more; a call that is on the wire is the last one."""
        self.reason = reason
        if self._guarded is not None and not self._guarded.expired():
            self._guarded.reschedule(0.0)

    def revoke(self) -> bool:
        """Take a cancellation back; return False if it has taken effect already."""
        if self.reason is not None and (self.has_taken_effect or self._guarded is not None):
            return False
        self.reason = None
        return True

    def raise_if_cancelled(self) -> None:
        """Raise the reason, if the submit was cancelled."""
        if self.reason is not None:
            self.has_taken_effect = True
            raise self.reason

    @contextlib.asynccontextmanager
    async def guard(self, until: float | None = None) -> AsyncGenerator[None]:
        """Make what waits inside cancellable.

        Args:
            until: When the wait ends by itself, on the event loop's clock.

        Raises:
            TimeoutError: That moment has come.
            FluxError: The submit was cancelled; this is the reason.
        """
        if self.reason is None:
            try:
                async with asyncio.timeout_at(until) as self._guarded:
                    yield
            except TimeoutError:
                if self.reason is None:
                    raise
            finally:
                self._guarded = None
        # A cancellation that came in the moment at which the wait ended counts, too.
        self.raise_if_cancelled()
