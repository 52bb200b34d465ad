"""The one shutdown state of a session, which its parts read, and the times of a shutdown."""

import math

import attrs

from flux2max_async._exceptions import SessionClosedError

ANSWER_TIMEOUT = 2.0
"""Seconds that closing waits for the answers to submits on the wire: without its id, a paid task is lost."""
SETTLE_TIME = 0.05
"""Seconds in which callers that were waiting for an outcome can begin to save its images before a drain ends."""
_FINAL_POLL_MARGIN = 1.0
"""Seconds before the end of the drain at which running tasks are polled for the last time."""


@attrs.define(eq=False)
class Shutdown:
    """When a session stops.

    States: open, draining (`draining` is set), closed (`finish`); never back. Only the supervisor changes them.
    `deadline` is infinite while the session is open, and while it drains without being closed (`set_deadline`);
    afterwards it only moves closer, but for one `extend()`.
    """

    draining: bool = attrs.field(default=False, init=False)
    """Whether nothing more is submitted; submitted tasks may still end. A signal handler or a thread may set it."""
    closed: bool = attrs.field(default=False, init=False)
    """Whether nothing at all is started any more."""
    deadline: float = attrs.field(default=math.inf, init=False)
    """When the drain ends, on the event loop's clock."""
    final_poll_at: float = attrs.field(default=math.inf, init=False)
    """When tasks that are still running are polled for the last time."""

    def set_deadline(self, now: float, seconds: float) -> None:
        """Stop submitting, and end the drain in `seconds`; a second call can only end it earlier."""
        self.draining = True
        if now + seconds < self.deadline:
            self.deadline = now + seconds
            self.final_poll_at = self.deadline - min(_FINAL_POLL_MARGIN, seconds / 10)

    def extend(self, now: float, seconds: float, *, lateness: float) -> bool:
        """Put off the end of a drain, and poll running tasks now, if nothing could run at the time of the final polls.

        Args:
            now: The current time, after the deadline.
            seconds: How long the drain goes on.
            lateness: Seconds after the deadline which show that nothing could run. A drain that was ended at once, with
                no time for polls, is not put off.

        Returns:
            Whether the drain goes on.
        """
        if now <= self.deadline + lateness or self.final_poll_at >= self.deadline:
            return False
        self.deadline, self.final_poll_at = now + seconds, now
        return True

    def finish(self) -> None:
        """Start nothing any more."""
        self.draining = self.closed = True

    def error(self) -> SessionClosedError:
        """Return the error for what is not submitted any more."""
        return closed_error() if self.closed else SessionClosedError("the service is shutting down")

    def check_submitting(self) -> None:
        """Check that requests are submitted.

        Raises:
            SessionClosedError: The session drains, or is closed.
        """
        if self.draining:
            raise self.error()


def closed_error() -> SessionClosedError:
    """Return the error for a session that is not open."""
    return SessionClosedError("the session is closed: use it inside `async with FluxSession(...)`")
