"""How long one call of generate() or submit() may take."""

import asyncio
import sys
from collections.abc import Coroutine
from typing import Any, TypeVar

import attrs

from flux2max_async._exceptions import DeadlineExceededError, InvalidRequestError
from flux2max_async._tasks.shared_result import SharedResult
from flux2max_async._timeouts import Timeout, wait

T = TypeVar("T")

_GRACE_PERIOD = 0.5
"""Seconds in which an outcome that has come while the event loop was blocked can be read and recorded."""


@attrs.frozen
class TimeLimit:
    """The time that one call may take, however it is spent."""

    seconds: float
    ends_at: float
    """On the event loop's clock."""

    @classmethod
    def start(cls, seconds: float) -> "TimeLimit":
        """Return the limit of a call that begins now.

        Raises:
            InvalidRequestError: The seconds are not a finite number above 0.
        """
        is_number = isinstance(seconds, (int, float)) and not isinstance(seconds, bool)
        if not is_number or not 0 < seconds <= sys.float_info.max:
            raise InvalidRequestError(
                f"timeout must be a finite number of seconds above 0, or None, not {seconds!r}", field="timeout"
            )
        return cls(seconds, asyncio.get_running_loop().time() + seconds)

    async def run(self, starting: Coroutine[Any, Any, T]) -> T:
        """Start a request within the time.

        Raises:
            DeadlineExceededError: The time was over first; nothing was started.
        """
        try:
            with Timeout(self._remaining(), grace=_GRACE_PERIOD):
                return await starting
        except TimeoutError:
            raise self.exceeded(None) from None

    async def wait(self, shared: SharedResult[Any]) -> bool:
        """Wait for a result; return False if the time was over first."""
        if not shared.done():
            future = shared.future()
            try:
                await wait((future,), self._remaining(), grace=_GRACE_PERIOD)
            finally:
                shared.discard(future)
        return shared.done()

    def _remaining(self) -> float:
        return max(self.ends_at - asyncio.get_running_loop().time(), 0.0)

    def exceeded(self, task_id: str | None) -> DeadlineExceededError:
        """Return the error of a call that has taken too long."""
        known = "there is no task yet; if a submit is on the wire, its task's id will be logged"
        if task_id is not None:
            known = f"task {task_id} goes on; attach() it later"
        return DeadlineExceededError(f"the timeout of {self.seconds:g} s is over: {known}", task_id=task_id)
