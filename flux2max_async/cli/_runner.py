"""A batch that runs: its outcomes taken down and shown, its page kept fresh, and a way out by signals."""

import asyncio
import contextlib
import json
import logging
import signal
import sys
import time
from collections.abc import Generator
from decimal import Decimal

import anyio.to_thread
import attrs

import flux2max_async as flux
from flux2max_async.cli._gallery import Gallery, write_all
from flux2max_async.cli._output_dir import Folder, is_end
from flux2max_async.cli._plan import Plan
from flux2max_async.cli._progress import Board
from flux2max_async.cli._terminal import (
    Outlet,
    Screen,
    complain,
    line,
    log_to,
    nobody_reads,
    pictures,
    speaking_aside,
    tell,
)

_LONG = 7 * 86_400.0
"""Seconds that tasks in flight get after the first Ctrl-C: they end by their deadline, or by the second one."""
_PLAIN = 10.0
"""Seconds between two lines where there is no terminal."""
_FRESH, _STALE = 3.0, 30.0
"""Seconds between two states of the page; the more the longer it takes to make it, within these limits."""
_SHARE = 0.1
"""Of the time that may go into the page."""
_TICK = 0.5
_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
"""What asks to leave; the last one comes where a terminal is closed."""


@attrs.frozen(kw_only=True)
class Job:
    """What is to be run."""

    folder: Folder
    plan: Plan
    session: "flux.FluxSession"
    schedule: "flux.LearnedSchedule"
    places: int
    budget: Decimal | None
    as_json: bool


@attrs.define
class Report:
    """What a run has come to."""

    seconds: float = 0.0
    """That it took."""
    task_seconds: list[float] = attrs.field(factory=list[float])
    """That each task took that ended in this run with pictures."""
    task_polls: int = 0
    """What those were polled, together."""
    stopped: "flux.FluxError | None" = None
    """What has stopped it before its end."""
    signals: list[int] = attrs.field(factory=list[int])
    """The signals that have come."""
    unheard: bool = False
    """Whether outcomes couldn't be written to stdout."""
    stuck: bool = False
    """Whether somebody who doesn't read holds stdout, so that the process can't end by itself."""

    @property
    def polls(self) -> float:
        """How often a task was looked at on average."""
        return self.task_polls / max(1, len(self.task_seconds))


async def run(job: Job) -> Report:
    """Run a batch, or go on with it.

    Raises:
        FluxError: It couldn't be begun.
    """
    report = Report()
    async with job.session as session:
        screen = Screen(sys.stderr)
        board = Board(len(job.plan.lines), session, job.schedule, job.places, screen, job.budget, job.plan.spent)
        gallery = Gallery(job.folder.path)
        way_out = _WayOut(board, gallery, report)
        outlet = Outlet("stdout", way_out.unheard) if job.as_json else None
        outlets = [outlet] if outlet else []
        over = asyncio.Event()
        with contextlib.ExitStack() as stack:
            if job.as_json and not screen.is_interactive:  # both may go down one pipe
                outlets.append(Outlet("stderr", lambda _: None))
                stack.enter_context(speaking_aside(outlets[-1]))
            for context in (log_to(_Notes(board)), way_out.watched(), board.shown()):
                stack.enter_context(context)
            keeping = asyncio.create_task(_keep_fresh(job, board, gallery, over))
            try:
                await _take_all(job, board, report, outlet)
            finally:
                report.seconds = board.seconds
                for each in outlets:  # outcomes first: while they are waited for, there may be something to say
                    each.put(None)
                    while each.is_busy and len(report.signals) < 2:  # noqa: ASYNC110 - it is a thread
                        await asyncio.sleep(0.02)
                report.stuck = any(each.is_busy for each in outlets)
                over.set()
                await keeping
                await way_out.closed()
    return report


async def _take_all(job: Job, board: Board, report: Report, outlet: Outlet | None) -> None:
    """Take each outcome as it comes."""
    try:
        for lines, terms in job.plan.lines_by_reuse_policy():
            stream = board.session.stream(
                [line.request for line in lines],
                save_to=job.folder.path,
                retry_failed=terms.retry_failed,
                resubmit_uncertain=terms.resubmit_uncertain,
            )
            async for outcome in stream:
                row = job.folder.take(outcome)
                if not is_end(outcome):
                    board.stopping = True
                    continue
                if isinstance(outcome, flux.Completed) and not outcome.replayed:
                    report.task_seconds.append(outcome.elapsed)
                    report.task_polls += outcome.polls
                board.take(row.key, outcome)
                if outlet is not None:
                    outlet.put(json.dumps(row.as_json()))
    except flux.SessionClosedError:
        pass  # by the way out
    except flux.FluxError as error:
        report.stopped = error


async def _keep_fresh(job: Job, board: Board, gallery: Gallery, over: asyncio.Event) -> None:
    """Write the page and the results anew until it is over, and say how it stands where there is no terminal."""
    trouble: str | None = None
    shown, written, fresh_until = -1, 0.0, 0.0
    spoken = board.began
    while not over.is_set():
        now = time.monotonic()
        stand = board.done + board.failed
        if now >= fresh_until and (shown != stand or now >= written + _STALE):
            shown, written = stand, now
            before, trouble = trouble, await _written(job, gallery)
            if trouble is not None and trouble != before:
                complain(trouble)
            fresh_until = time.monotonic() + min(max(_FRESH, (time.monotonic() - now) / _SHARE), _STALE)
        if not board.console.is_interactive and now >= spoken + _PLAIN:
            spoken = now
            tell(f"{board.counts()}; {board.pace()}")
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_TICK):
                await over.wait()


async def _written(job: Job, gallery: Gallery) -> str | None:
    """Write what the journal knows by now, of other processes as well; gives what keeps it from being written."""
    try:
        job.folder.gather(job.plan.lines, await job.folder.entries())
    except flux.FluxError as error:
        return str(error)
    rows = [attrs.evolve(row) for row in job.folder.rows.values()]  # the writer has a thread of its own
    return await anyio.to_thread.run_sync(lambda: write_all(job.folder, rows, gallery, running=True))


class _WayOut:
    """Leaves a session: at the first signal with all that is in flight, at the second at once."""

    def __init__(self, board: Board, gallery: Gallery, report: Report) -> None:
        self._board = board
        self._gallery = gallery
        self._report = report
        self._leaving: list[asyncio.Task[None]] = []
        # When a terminal has been closed, nothing tells any more that it was one.
        self._terminals = [file for file in (sys.__stdout__, sys.__stderr__) if file is not None and file.isatty()]

    @contextlib.contextmanager
    def watched(self) -> Generator[None]:
        """Mind signals while something is done."""
        loop = asyncio.get_running_loop()

        def arrived(number: int, _: object) -> None:
            loop.call_soon_threadsafe(self._hear, number)

        before = {number: signal.signal(number, arrived) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def unheard(self, error: Exception) -> None:
        """Nobody reads the outcomes any more: submit nothing more."""
        self._report.unheard = True
        self._close(_LONG)
        complain(f"can't write to standard output: {getattr(error, 'strerror', None) or error}; no more is submitted")

    async def closed(self) -> None:
        """Wait until all that was begun to leave has ended."""
        await asyncio.gather(*self._leaving)

    def _hear(self, number: int) -> None:
        self._report.signals.append(number)
        if number == getattr(signal, "SIGHUP", None):
            for file in self._terminals:
                nobody_reads(file)
        if len(self._report.signals) == 1:
            stats = self._board.session.stats
            in_flight = stats.in_flight + stats.submitting
            self._close(_LONG)
            left = f"waiting for {pictures(in_flight)} in flight" if in_flight else "nothing is in flight"
            complain(f"stopping: nothing more is submitted; {left} (Ctrl-C again leaves at once)")
        else:
            self._gallery.hurry = True
            self._close(0.0)
            complain("leaving at once; what is in flight is followed by the next run")

    def _close(self, seconds: float) -> None:
        self._board.stopping = True
        self._leaving.append(asyncio.create_task(self._board.session.aclose(drain=seconds)))


class _Notes(logging.Handler):
    """Puts what is logged on the board; an error is said aloud."""

    def __init__(self, board: Board) -> None:
        super().__init__(logging.WARNING)
        self._board = board

    def emit(self, record: logging.LogRecord) -> None:
        """Take note."""
        if record.levelno >= logging.ERROR:
            complain(record.getMessage())
        self._board.note = line(record.getMessage())
