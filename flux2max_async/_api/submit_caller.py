"""What a submit needs from whoever makes it."""

from contextlib import AbstractAsyncContextManager
from typing import Protocol

from flux2max_async._exceptions import FluxError


class SubmitRecord(Protocol):
    """What has to be recorded around each attempt of a submit."""

    async def begin(self) -> None:
        """Called before a byte is sent; an error keeps the attempt from being sent."""

    async def mark_refused(self) -> None:
        """Called when an attempt has certainly created nothing and will be repeated."""


class Cancellation(Protocol):
    """Cancels a submit between its attempts."""

    reason: FluxError | None

    def raise_if_cancelled(self) -> None:
        """Raise the reason, if the submit was cancelled."""

    def guard(self, until: float | None = None) -> AbstractAsyncContextManager[None]:
        """Return a context in which waiting can be cancelled; it raises the reason, or TimeoutError at `until`."""
        ...
