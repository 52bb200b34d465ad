"""Whether 429s are frequent: how many of the last 20 calls of one kind were refused."""

import attrs

from flux2max_async._api.retry import DEFAULT_PAUSE, MAX_PAUSE

_WINDOW = (1 << 20) - 1
"""One bit for each of the last 20 calls."""
_DENSE_WINDOW = (1 << 10) - 1
_SPREAD, _MAX_SPREAD = 0.1, 2.0
_SUBMIT_SPREAD, _MAX_SUBMIT_SPREAD = 0.02, 0.1
_FREQUENT = 4
"""So many 429s in the window are a limit; fewer may be chance, and each holds back only its own call."""


def pause_after(retry_after: float | None) -> float:
    """Return the seconds that a refused call is held back.

    Args:
        retry_after: The seconds to wait that the service requests, if it does.
    """
    return DEFAULT_PAUSE if retry_after is None else min(retry_after, MAX_PAUSE)


def spread_pause(pause: float, chance: float) -> float:
    """Return a pause before a poll with up to a tenth more, or two seconds, so that polls spread after it.

    Args:
        pause: The seconds that the service requests.
        chance: 0.0 to 1.0, drawn anew for each poll.
    """
    return pause + chance * min(pause * _SPREAD, _MAX_SPREAD)


def spread_submit_pause(pause: float, chance: float) -> float:
    """Return a pause before a submit with up to a fiftieth more, or 0.1 s: nobody sees a task that isn't submitted."""
    return pause + chance * min(pause * _SUBMIT_SPREAD, _MAX_SUBMIT_SPREAD)


@attrs.define
class RecentRefusals:
    """Which of the last 20 calls of one kind were refused with 429."""

    _bits: int = attrs.field(default=0, init=False)
    """The lowest bit is the newest call."""

    def record_other(self) -> None:
        """Record that a call ended in another way than with a 429."""
        self._bits = self._bits << 1 & _WINDOW

    def record_refusal(self) -> bool:
        """Record that a call was refused with 429; return whether 429s are frequent."""
        self._bits = (self._bits << 1 | 1) & _WINDOW
        return self._bits.bit_count() >= _FREQUENT

    @property
    def are_dense(self) -> bool:
        """Whether four of the last ten calls were refused.

        Where one call in ten is refused by chance, 13 % of the windows of 20 calls have four refusals, and 1 % of
        those of ten.
        """
        return (self._bits & _DENSE_WINDOW).bit_count() >= _FREQUENT

    def clear(self) -> None:
        """Forget all calls."""
        self._bits = 0
