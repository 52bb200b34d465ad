"""A batch while it runs: outcomes are recorded and shown, the gallery is kept up to date, and signals stop it."""

import asyncio
import contextlib
import json
import logging
import signal
import sys
import time
from collections.abc import AsyncGenerator, Generator
from decimal import Decimal
from typing import TextIO, cast

import anyio.to_thread
import attrs

import flux2max_async as flux
from flux2max_async.cli._gallery import Gallery, write_outputs
from flux2max_async.cli._output_dir import OutputDir
from flux2max_async.cli._plan import Plan
from flux2max_async.cli._progress import ProgressDisplay
from flux2max_async.cli._rows import is_final
from flux2max_async.cli._stored_pictures import StoredPictures
from flux2max_async.cli._streams import redirect_to_devnull
from flux2max_async.cli._terminal import (
    LineWriter,
    Terminal,
    attach_log_handler,
    format_pictures,
    print_error,
    print_status,
    to_single_line,
)
from flux2max_async.storage import Storage

_DRAIN_SECONDS = 7 * 86_400.0
"""The limit for tasks in flight after the first signal: practically none, since they end by their own deadlines."""
_STATUS_INTERVAL = 10.0
"""Seconds between status lines if there is no live display."""
_MIN_REFRESH_INTERVAL, _MAX_REFRESH_INTERVAL = 3.0, 30.0
"""Seconds between two versions of the gallery; the longer it takes to write, the rarer it is written."""
_MAX_REFRESH_SHARE = 0.1
"""The share of the time that writing the gallery may take."""
_TICK = 0.5
"""Seconds between two checks whether something is due."""
_SIGHUP = getattr(signal, "SIGHUP", None)
"""The signal that the terminal was closed; Windows has none."""
_SIGNALS = [number for number in (signal.SIGINT, signal.SIGTERM, _SIGHUP) if number is not None]


@attrs.frozen(kw_only=True)
class Batch:
    """A batch that is ready to run."""

    output_dir: OutputDir
    storage: Storage | None = None
    """Where the pictures go; None: into the output folder."""
    stored: StoredPictures | None = None
    """The pictures in this storage, for the page."""
    plan: Plan
    session: "flux.FluxSession"
    """A session that is not entered yet."""
    schedule: "flux.LearnedSchedule"
    max_in_flight: int
    budget: Decimal | None
    as_json: bool
    """Whether outcomes are written to stdout."""
    gallery: Gallery = attrs.field(
        default=attrs.Factory(
            lambda self: Gallery(self.output_dir.path, emulated=self.output_dir.emulated, stored=self.stored),
            takes_self=True,
        ),
        init=False,
    )


@attrs.define
class Report:
    """The result of a run."""

    seconds: float = 0.0
    task_seconds: list[float] = attrs.field(factory=list[float])
    """The durations of the tasks that were completed in this run."""
    task_polls: int = 0
    """The number of polls of all these tasks together."""
    spent: Decimal = Decimal(0)
    """US dollars that this run has cost."""
    error: "flux.FluxError | None" = None
    """The error that stopped the run."""
    signals: list[int] = attrs.field(factory=list[int])
    """The signals that were received, in their order: the first stops the run, the second ends it at once."""
    stdout_failed: bool = False
    """Whether outcomes couldn't be written to stdout."""
    output_blocked: bool = False
    """Whether a thread is blocked by a reader that doesn't read: only `os._exit()` ends the process then."""

    @property
    def polls_per_task(self) -> float:
        """The mean number of polls of the tasks that were completed in this run."""
        return self.task_polls / max(1, len(self.task_seconds))

    @property
    def must_exit_now(self) -> bool:
        """Whether a second signal was received."""
        return len(self.signals) > 1


async def run(batch: Batch) -> Report:
    """Run or continue a batch until all requests have ended, or until an error or a signal stops it.

    Raises:
        FluxError: The session couldn't be opened.
    """
    report = Report()
    async with batch.session as session:
        display = ProgressDisplay(
            total=sum(len(lines) for lines, _ in batch.plan.lines_by_reuse_policy()),
            session=session,
            schedule=batch.schedule,
            max_in_flight=batch.max_in_flight,
            console=Terminal(sys.stderr),
            budget=batch.budget,
            spent_before=batch.plan.spent,
            emulated=batch.output_dir.emulated,
        )
        graceful_exit = GracefulExit(display, batch.gallery, report)
        with attach_log_handler(DisplayLogHandler(display)), graceful_exit.handle_signals(), display.live():
            finished = asyncio.Event()
            refreshing = asyncio.create_task(_refresh_until(finished, batch, display))
            try:
                output = _json_output(display, graceful_exit, report) if batch.as_json else contextlib.nullcontext()
                async with output as outcomes:
                    await _process_outcomes(batch, display, report, outcomes)
            finally:
                finished.set()
                await refreshing
                await graceful_exit.wait_closed()
    report.spent = session.stats.spent
    return report


@contextlib.asynccontextmanager
async def _json_output(
    display: ProgressDisplay, graceful_exit: "GracefulExit", report: Report
) -> AsyncGenerator[LineWriter]:
    """Yield a writer to stdout. Until it has written everything, slow readers of stdout or stderr block nothing."""
    stderr = sys.stderr
    writers = [LineWriter(sys.stdout, graceful_exit.on_stdout_error)]
    if not display.console.is_interactive:  # stderr may be the same pipe as stdout
        writers.append(LineWriter(stderr, lambda _: None))
        sys.stderr = cast("TextIO", writers[-1])
    try:
        yield writers[0]
    finally:
        # Outcomes come first: messages may still be printed while they are written.
        drained = [await writer.drain(is_cancelled=lambda: report.must_exit_now) for writer in writers]
        report.output_blocked = not all(drained)
        if drained[-1]:  # a blocked stderr stays replaced, so that nothing blocks the main thread from now on
            sys.stderr = stderr


async def _process_outcomes(
    batch: Batch, display: ProgressDisplay, report: Report, outcomes: LineWriter | None
) -> None:
    """Record each outcome in the output folder, on the display and in the report, and write it to stdout."""
    try:
        for lines, reuse_policy in batch.plan.lines_by_reuse_policy():
            stream = display.session.stream(
                [line.request for line in lines],
                save_to=batch.storage or batch.output_dir.path,
                retry_failed=reuse_policy.retry_failed,
                resubmit_uncertain=reuse_policy.resubmit_uncertain,
            )
            async for outcome in stream:
                row = batch.output_dir.record(outcome)
                if not is_final(outcome):
                    display.stopping = True
                    continue
                if isinstance(outcome, flux.Completed) and not outcome.replayed:
                    report.task_seconds.append(outcome.elapsed)
                    report.task_polls += outcome.polls
                display.record(row.key, outcome)
                if outcomes is not None:
                    outcomes.write(f"{json.dumps(row.to_dict())}\n")
    except flux.SessionClosedError:
        pass  # a signal or an error of stdout has closed the session
    except flux.FluxError as error:
        report.error = error
    finally:
        report.seconds = display.elapsed


async def _refresh_until(finished: asyncio.Event, batch: Batch, display: ProgressDisplay) -> None:
    """Keep results and gallery up to date, and print status lines if there is no live display."""
    last_problem: str | None = None
    last_count, last_write, next_write = -1, 0.0, 0.0
    next_status = display.started_at + _STATUS_INTERVAL
    while not finished.is_set():
        now, count = time.monotonic(), display.done + display.failed
        if now >= next_write and (count != last_count or now >= last_write + _MAX_REFRESH_INTERVAL):
            last_count, last_write = count, now
            problem = await _write_outputs(batch)
            if problem is not None and problem != last_problem:
                print_error(problem)
            last_problem = problem
            duration = time.monotonic() - now
            interval = min(max(_MIN_REFRESH_INTERVAL, duration / _MAX_REFRESH_SHARE), _MAX_REFRESH_INTERVAL)
            next_write = time.monotonic() + interval
        if not display.console.is_interactive and now >= next_status:
            next_status = now + _STATUS_INTERVAL
            print_status(f"{display.format_counts()}; {display.format_rates()}")
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_TICK):
                await finished.wait()


async def _write_outputs(batch: Batch) -> str | None:
    """Write results and gallery from the journal, which includes what other processes do; return what failed."""
    if batch.output_dir.shared_journal is None:  # a shared one may be large and far away; its outcomes come here, too
        try:
            batch.output_dir.update_rows(batch.plan.lines, await batch.output_dir.read_journal())
        except flux.FluxError as error:
            return str(error)
    rows = [attrs.evolve(row) for row in batch.output_dir.rows.values()]  # copies, since a thread reads them
    return await anyio.to_thread.run_sync(lambda: write_outputs(batch.output_dir, rows, batch.gallery, running=True))


class GracefulExit:
    """Stops a batch when a signal is received.

    Running -> stopping: the first signal, or an error of stdout. Nothing more is submitted, and the session closes
    as soon as all tasks in flight have ended.
    Stopping -> exiting: the second signal. The session closes at once; the next run resumes the tasks in flight.
    After the run, signals no longer end the process, which writes the results and the summary, and ends by itself; the
    second one still keeps it from creating thumbnails.
    """

    def __init__(self, display: ProgressDisplay, gallery: Gallery, report: Report) -> None:
        self._display = display
        self._gallery = gallery
        self._report = report
        self._closing: list[asyncio.Task[None]] = []

    @contextlib.contextmanager
    def handle_signals(self) -> Generator[None]:
        """Handle signals within the context, and record those that come later, until the process ends."""
        loop = asyncio.get_running_loop()

        def handle(number: int, _: object) -> None:
            self._record(number)
            loop.call_soon_threadsafe(self._on_signal, number, self._report.must_exit_now)

        for number in _SIGNALS:
            signal.signal(number, handle)
        try:
            yield
        finally:
            for number in _SIGNALS:
                signal.signal(number, self._record)

    def on_stdout_error(self, error: OSError) -> None:
        """Stop, since nobody would see the outcomes."""
        self._report.stdout_failed = True
        self._close(_DRAIN_SECONDS)
        print_error(f"can't write to standard output: {error.strerror}; nothing more is submitted")

    async def wait_closed(self) -> None:
        """Wait until the session is closed, if it is being closed."""
        await asyncio.gather(*self._closing)

    def _record(self, number: int, _: object = None) -> None:
        self._report.signals.append(number)
        self._gallery.skip_thumbnails = self._report.must_exit_now

    def _on_signal(self, number: int, must_exit_now: bool) -> None:  # noqa: FBT001 - it is a callback
        if number == _SIGHUP and self._display.console.is_terminal:
            # Every write to a terminal that was closed fails, which the live display would not survive.
            redirect_to_devnull(self._display.console.file)
        if must_exit_now:
            self._close(0.0)
            print_error("exiting at once; the next run resumes the tasks in flight")
            return
        stats = self._display.session.stats
        in_flight = stats.in_flight + stats.submitting
        self._close(_DRAIN_SECONDS)
        waiting = f"waiting for {format_pictures(in_flight)} in flight" if in_flight else "nothing is in flight"
        print_error(f"stopping: nothing more is submitted; {waiting} (Ctrl-C again exits at once)")

    def _close(self, drain: float) -> None:
        self._display.stopping = True
        self._closing.append(asyncio.create_task(self._display.session.aclose(drain=drain)))


class DisplayLogHandler(logging.Handler):
    """Shows the newest warning on the display, and prints errors as well, and what is waited for."""

    def __init__(self, display: ProgressDisplay) -> None:
        super().__init__(logging.WARNING)
        self._display = display

    def emit(self, record: logging.LogRecord) -> None:
        """Show the message."""
        if record.levelno >= logging.ERROR or getattr(record, "is_notice", False):
            print_error(record.getMessage())
        self._display.log_message = to_single_line(record.getMessage())
