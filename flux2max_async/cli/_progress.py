"""The board: how many pictures are done, failed and under way, live on a terminal or as plain lines down a pipe."""

import sys
import time
from collections import deque
from collections.abc import Generator
from contextlib import contextmanager, nullcontext
from decimal import Decimal

import attrs
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

import flux2max_async as flux
from flux2max_async.cli._terminal import line

_FAILURES = 3
"""The newest failures that are shown."""
_NAME = 36
"""Characters of a name that are shown beside the reason."""
_RECENT = 50
"""The newest ends of which the rate is that of the whole."""
_DECILES = range(5, 100, 10)


@attrs.define
class Board:
    """How it stands, and what is shown of that."""

    total: int
    session: "flux.FluxSession"
    schedule: "flux.LearnedSchedule"
    places: int
    console: Console
    budget: Decimal | None = None
    spent_before: Decimal = Decimal(0)
    """US dollars that earlier runs have spent of it."""
    began: float = attrs.field(factory=time.monotonic, init=False)
    """The moment of the start, on the clock of `time.monotonic()`."""
    done: int = attrs.field(default=0, init=False)
    failed: int = attrs.field(default=0, init=False)
    stopping: bool = attrs.field(default=False, init=False)
    """Whether nothing more is submitted."""
    note: str = attrs.field(default="", init=False)
    """The newest of what else there is to be said."""
    _failures: deque[str] = attrs.field(factory=lambda: deque[str](maxlen=_FAILURES), init=False)
    _ends: deque[float] = attrs.field(factory=lambda: deque[float](maxlen=_RECENT), init=False)
    """The moments of the newest ends."""

    @contextmanager
    def shown(self) -> Generator[None]:
        """Show the board on a terminal while something is done."""
        # What goes to stdout meanwhile is let through above the board only if it ends on the same terminal.
        live = Live(
            self, console=self.console, refresh_per_second=4, transient=True, redirect_stdout=sys.stdout.isatty()
        )
        with live if self.console.is_interactive else nullcontext():
            yield

    def take(self, name: str, outcome: "flux.Outcome") -> None:
        """Take in what a request has come to."""
        if not outcome.replayed:
            self._ends.append(time.monotonic())
        trouble = outcome.save_error if isinstance(outcome, flux.Completed) else outcome.error
        if trouble is None:
            self.done += 1
        else:
            self.failed += 1
            if not outcome.replayed:
                self._failures.append(f"{name if len(name) <= _NAME else name[: _NAME - 1] + '…'}: {line(trouble)}")

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.began

    @property
    def waiting(self) -> int:
        """How many have not been submitted yet."""
        stats = self.session.stats
        ended = max(self.done + self.failed, stats.completed + stats.failed)
        return max(0, self.total - ended - stats.in_flight - stats.submitting)

    def counts(self) -> str:
        """Say how many there are of each kind."""
        stats = self.session.stats
        in_flight = stats.in_flight + stats.submitting
        return f"{self.done} done, {self.failed} failed, {in_flight} in flight, {self.waiting} waiting"

    def pace(self) -> str:
        """Say how fast it goes, and what it costs."""
        stats = self.session.stats
        parts: list[str] = []
        if len(self._ends) > 1 and (span := time.monotonic() - self._ends[0]) > 0:
            parts.append(f"{60 * (len(self._ends) - 1) / span:.0f} a minute")
        if (left := self.seconds_left()) is not None:
            parts.append(f"{clock(left)} left")
        of = "" if self.budget is None else f" of ${self.budget:.2f}"
        parts.append(f"${self.spent_before + stats.spent:.2f}{of} spent")
        parts.append(f"{polls_a_task(stats):.1f} polls a task")
        return ", ".join(parts)

    def seconds_left(self) -> float | None:
        """Tell how long the rest will take, by what the schedule has learned of tasks; None until it has."""
        shares = [self.schedule.percentile(percent) for percent in _DECILES]
        known = [share for share in shares if share is not None]
        waiting, in_flight = 0 if self.stopping else self.waiting, self.session.stats.in_flight
        if len(known) < len(shares) or not waiting + in_flight:
            return None
        # The service may allow fewer at once than we would like to have.
        at_once = in_flight or self.places
        return sum(known) / len(known) * (waiting / at_once + 0.5)

    def __rich__(self) -> Group:
        top = Table.grid(expand=True, padding=(0, 1, 0, 0))
        top.add_column(ratio=1)
        top.add_column(justify="right")
        top.add_column(justify="right", min_width=5)
        ended = self.done + self.failed
        top.add_row(ProgressBar(total=self.total, completed=ended), f"{ended} of {self.total}", clock(self.seconds))
        return Group(
            top,
            _row(self.counts()),
            _row(self.pace()),
            *(_row(self.note, "dim") for _ in range(bool(self.note))),
            *(_row(f"failed {failure}", "red") for failure in self._failures),
        )


def polls_a_task(stats: "flux.SessionStats") -> float:
    """Tell how often a task was looked at on average, of those that were followed."""
    return stats.polls / max(1, stats.completed + stats.failed - stats.replayed + stats.in_flight)


def clock(seconds: float) -> str:
    """Write a duration as minutes and seconds, or with hours before them."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _row(text: str, style: str = "") -> Text:
    return Text(text, style=style, no_wrap=True, overflow="ellipsis")
