"""The progress display of a batch: live on a terminal, and as the text of status lines everywhere else."""

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
from flux2max_async.cli._terminal import describe_error

_MAX_FAILURES = 3
"""The number of failures that are shown: the newest ones."""
_MAX_NAME_LENGTH = 36
"""Characters of a request's name that are shown before the reason of its failure."""
_RATE_WINDOW = 50
"""The number of outcomes, the newest ones, over which the rate is measured."""
_DECILE_MIDPOINTS = range(5, 100, 10)
"""Percentiles at equal distances: their mean approximates the mean duration of a task."""


@attrs.define
class ProgressDisplay:
    """The state of a batch, and how it is shown."""

    total: int
    session: "flux.FluxSession"
    schedule: "flux.LearnedSchedule"
    max_in_flight: int
    console: Console
    budget: Decimal | None = None
    spent_before: Decimal = Decimal(0)
    """US dollars of the budget that earlier runs have spent."""
    emulated: bool = False
    """Whether an emulator takes the place of the service: nothing is paid."""
    started_at: float = attrs.field(factory=time.monotonic, init=False)
    """On the clock of `time.monotonic()`."""
    done: int = attrs.field(default=0, init=False)
    failed: int = attrs.field(default=0, init=False)
    stopping: bool = attrs.field(default=False, init=False)
    """Whether nothing more is submitted."""
    log_message: str = attrs.field(default="", init=False)
    """The newest warning or error that was logged."""
    _failures: deque[str] = attrs.field(factory=lambda: deque[str](maxlen=_MAX_FAILURES), init=False)
    _outcome_times: deque[float] = attrs.field(factory=lambda: deque[float](maxlen=_RATE_WINDOW), init=False)
    """On the clock of `time.monotonic()`, without replayed outcomes."""

    @contextmanager
    def live(self) -> Generator[None]:
        """Show the display while the console is an interactive terminal."""
        # Rich prints what is written to stdout above the display, which is right only if stdout is a terminal.
        live = Live(
            self, console=self.console, refresh_per_second=4, transient=True, redirect_stdout=sys.stdout.isatty()
        )
        with live if self.console.is_interactive else nullcontext():
            yield

    def record(self, name: str, outcome: "flux.Outcome") -> None:
        """Count the outcome of a request."""
        if not outcome.replayed:
            self._outcome_times.append(time.monotonic())
        error = outcome.save_error if isinstance(outcome, flux.Completed) else outcome.error
        if error is None:
            self.done += 1
        else:
            self.failed += 1
            if not outcome.replayed:
                short_name = name if len(name) <= _MAX_NAME_LENGTH else f"{name[: _MAX_NAME_LENGTH - 1]}…"
                self._failures.append(f"{short_name}: {describe_error(error)}")

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.started_at

    @property
    def waiting(self) -> int:
        """The number of requests that are still to be submitted."""
        stats = self.session.stats
        ended = max(self.done + self.failed, stats.completed + stats.failed)
        return max(0, self.total - ended - stats.in_flight - stats.submitting)

    def format_counts(self) -> str:
        """Return the number of requests in each state."""
        stats = self.session.stats
        in_flight = stats.in_flight + stats.submitting
        return f"{self.done} done, {self.failed} failed, {in_flight} in flight, {self.waiting} waiting"

    def format_rates(self) -> str:
        """Return the rate of outcomes, the time left, the cost, and the mean number of polls."""
        stats = self.session.stats
        parts: list[str] = []
        if len(self._outcome_times) > 1 and (span := time.monotonic() - self._outcome_times[0]) > 0:
            parts.append(f"{60 * (len(self._outcome_times) - 1) / span:.0f} a minute")
        if (left := self.estimate_seconds_left()) is not None:
            parts.append(f"{format_duration(left)} left")
        limit = "" if self.budget is None else f" of ${self.budget:.2f}"
        meaning = "if it were paid" if self.emulated else "spent"
        parts.append(f"${self.spent_before + stats.spent:.2f}{limit} {meaning}")
        parts.append(f"{polls_per_task(stats):.1f} polls a task")
        return ", ".join(parts)

    def estimate_seconds_left(self) -> float | None:
        """Estimate the remaining time from the durations that the schedule has learned.

        Returns:
            Seconds; None if nothing is left to do, or the schedule has not learned enough yet.
        """
        percentiles = [self.schedule.percentile(percent) for percent in _DECILE_MIDPOINTS]
        known = [duration for duration in percentiles if duration is not None]
        waiting, in_flight = 0 if self.stopping else self.waiting, self.session.stats.in_flight
        if len(known) < len(percentiles) or not waiting + in_flight:
            return None
        # The service may allow fewer concurrent tasks than max_in_flight.
        concurrency = in_flight or self.max_in_flight
        # Tasks in flight are halfway through on average.
        return sum(known) / len(known) * (waiting / concurrency + 0.5)

    def __rich__(self) -> Group:
        bar = Table.grid(expand=True, padding=(0, 1, 0, 0))
        bar.add_column(ratio=1)
        bar.add_column(justify="right")
        bar.add_column(justify="right", min_width=5)
        ended = self.done + self.failed
        bar.add_row(
            ProgressBar(total=self.total, completed=ended), f"{ended} of {self.total}", format_duration(self.elapsed)
        )
        rows = [_row(self.format_counts()), _row(self.format_rates())]
        if self.log_message:
            rows.append(_row(self.log_message, "dim"))
        return Group(bar, *rows, *(_row(f"failed {failure}", "red") for failure in self._failures))


def polls_per_task(stats: "flux.SessionStats") -> float:
    """Return the mean number of polls of the tasks that the session has followed."""
    return stats.polls / max(1, stats.completed + stats.failed - stats.replayed + stats.in_flight)


def format_duration(seconds: float) -> str:
    """Return a duration as m:ss, or as h:mm:ss from an hour on."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _row(text: str, style: str = "") -> Text:
    return Text(text, style=style, overflow="fold")
