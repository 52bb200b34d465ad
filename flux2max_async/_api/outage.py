"""Reports that a service can't be reached: once, while calls are still repeated."""

import asyncio
import datetime as dt
import math
import os

from flux2max_async._exceptions import FluxError, TransportError
from flux2max_async._text import get_logger
from flux2max_async._timeouts import Timer

log = get_logger("api")

_REPORT_AFTER = 5.0
_MAX_LEFT = 1e9
"""Seconds; much more is beyond what a date can hold."""


class Outage:
    """The calls in a row that got no answer.

    Args:
        base_url: What is called.
    """

    def __init__(self, base_url: str) -> None:
        self._base_url = base_url
        self.is_on: bool = False
        self.lasts: bool = False
        """Whether the reason of the newest failure is one that lasts."""
        self._failures = 0
        self._error: FluxError | None = None
        self._ends_at = 0.0
        self._timer: Timer | None = None

    @property
    def is_reported(self) -> bool:
        """Whether the warning was logged, or will be unless a call is answered before."""
        return self._failures >= 2

    def on_failure(self, error: FluxError, within: float, *, is_poll: bool) -> None:
        """Record a failed call.

        Args:
            error: Its error.
            within: Seconds for which it is repeated; infinite for a call that isn't, or for ever.
            is_poll: Whether it is repeated in any case, and not only if it was certainly not sent.
        """
        if not isinstance(error, TransportError):
            return
        self.lasts = error.fault is not None
        if self.lasts:  # those who meet it report it
            self.is_on = True
            return
        if not math.isfinite(within) or (error.maybe_sent and not is_poll):
            return
        loop = asyncio.get_running_loop()
        self._failures += 1
        self._error = error
        self._ends_at = loop.time() + within
        self.is_on = True
        if self._timer is None:
            self._timer = Timer(_REPORT_AFTER, self._report, grace=_REPORT_AFTER)

    def end(self) -> None:
        """Record that a call was answered, or that the session is closed."""
        self.is_on = self.lasts = False
        self._failures = 0
        self._error = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _report(self) -> None:
        if not self.is_reported or self._error is None:  # a single call, which has not been repeated
            self.end()
            return
        left = dt.timedelta(seconds=min(self._ends_at - asyncio.get_running_loop().time(), _MAX_LEFT))
        log.warning(
            "no answer from %s for %g s (%s): trying again until %s",
            self._base_url,
            _REPORT_AFTER,
            _reason(self._error),
            f"{dt.datetime.now().astimezone() + left:%H:%M:%S}",
            extra={"is_notice": True},
        )


def _reason(error: FluxError) -> str:
    number = getattr(error.__cause__, "errno", None)
    return os.strerror(number).lower() if isinstance(number, int) and number > 0 else str(error)
