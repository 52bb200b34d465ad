"""Signals that begin the drain of a session, before the handlers of the server receive them.

A server closes its session only after its open requests have ended: requests that wait for a slot would be submitted
until then. So the session handles the signals first.
"""

import contextlib
import signal
from collections.abc import Callable, Iterable
from types import FrameType
from typing import Any

import attrs

from flux2max_async._text import get_logger

log = get_logger("signals")


# A handler that was installed with loop.add_signal_handler() is chained as well, although what getsignal() returns for
# it does nothing: the event loop reads the number of each signal from a file descriptor (signal.set_wakeup_fd),
# whichever Python function handles it. Python calls that function first, when the signal interrupts the loop's select.
@attrs.define(eq=False)
class DrainHandler:
    """Handles one signal: begins the drain, and calls the handler that it has replaced."""

    number: signal.Signals
    _begin_drain: Callable[[], None]
    previous: Any = attrs.field(init=False)
    """What `signal.getsignal()` returned before."""

    def install(self) -> None:
        """Handle the signal, unless it is ignored, or handled by something that Python doesn't know.

        Raises:
            ValueError: This is not the main thread.
        """
        self.previous = signal.getsignal(self.number)
        if self.previous is not None and self.previous is not signal.SIG_IGN:
            signal.signal(self.number, self)

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Begin the drain; between any two steps of the main thread."""
        self._begin_drain()
        if callable(self.previous):
            self.previous(number, frame)
        else:
            # Without a handler, the program ends by itself once it has nothing to wait for. The next signal ends it.
            signal.signal(number, signal.SIG_DFL)

    def remove(self) -> None:
        """Restore the previous handler; one that was installed since stays, and is called as before."""
        current: Any = signal.getsignal(self.number)
        if current is self:
            with contextlib.suppress(ValueError):  # in another thread, the handler stays, and does nothing by itself
                signal.signal(self.number, self.previous)
            return
        while isinstance(current, DrainHandler):  # of another session
            if current.previous is self:
                current.previous = self.previous
            current = current.previous


def install_handlers(numbers: Iterable[signal.Signals], begin_drain: Callable[[], None]) -> tuple[DrainHandler, ...]:
    """Call a function when one of the signals arrives, before the handler that is installed now.

    Returns:
        The handlers, to be removed when the session is closed.
    """
    handlers = tuple(DrainHandler(number, begin_drain) for number in numbers)
    try:
        for handler in handlers:
            handler.install()
    except ValueError as error:
        log.warning("drain_signals has no effect, call begin_drain() instead: %s", error)
    return handlers
