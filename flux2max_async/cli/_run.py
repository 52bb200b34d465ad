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

import attrs

import flux2max_async as flux
from flux2max_async._books import Terms
from flux2max_async.cli._board import Board
from flux2max_async.cli._folder import Folder, is_end
from flux2max_async.cli._gallery import Gallery, write_all
from flux2max_async.cli._plan import Plan
from flux2max_async.cli._terminal import Outlet, Screen, complain, line, log_to, pictures, tell

_LONG = 7 * 86_400.0
"""Seconds that tasks in flight get after the first Ctrl-C: they end by their deadline, or by the second one."""
_PLAIN = 10.0
"""Seconds between two lines where there is no terminal."""
_FRESH, _STALE = 3.0, 30.0
"""Seconds between two states of the page; the more the longer it takes to make it, within these limits."""
_SHARE = 0.1
"""Of the time that may go into the page."""
_TICK = 0.5


@attrs.frozen(kw_only=True)
class Job:
    """What is to be run."""

    folder: Folder
    plan: Plan
    session: "flux.FluxSession"
    schedule: "flux.LearnedSchedule"
    places: int
    budget: Decimal | None
    terms: Terms
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
        stream = session.stream(
            [line.request for line in job.plan.lines],
            save_to=job.folder.path,
            retry_failed=job.terms.retry_failed,
            resubmit_uncertain=job.terms.resubmit_uncertain,
        )
        screen = Screen(sys.stderr)
        board = Board(len(job.plan.lines), session, job.schedule, job.places, screen, job.budget, job.plan.spent)
        page = _Page(job.folder, stream, board)
        way_out = _WayOut(board, page, report)
        outlet = Outlet(way_out.unheard) if job.as_json else None
        with log_to(_Notes(board)), way_out.watched(), board.shown():
            keeping = asyncio.create_task(page.keep_fresh())
            try:
                await _take_all(stream, job.folder, board, report, outlet)
            finally:
                if outlet is not None:
                    outlet.put(None)
                    while outlet.is_busy and len(report.signals) < 2:  # noqa: ASYNC110 - for a thread
                        await asyncio.sleep(0.02)
                    report.stuck = outlet.is_busy
                page.over.set()
                await keeping
                await way_out.closed()
                report.seconds = board.seconds
    return report


async def _take_all(
    stream: "flux.OutcomeStream", folder: Folder, board: Board, report: Report, outlet: Outlet | None
) -> None:
    """Take each outcome as it comes."""
    try:
        async for outcome in stream:
            assert outcome.request is not None
            row = folder.rows[str(outcome.request.key)]
            row.take(outcome)
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


@attrs.define
class _Page:
    """The page and the results of a batch that runs."""

    folder: Folder
    stream: "flux.OutcomeStream"
    board: Board
    over: asyncio.Event = attrs.field(factory=asyncio.Event, init=False)
    gallery: Gallery = attrs.field(init=False, default=attrs.Factory(lambda self: Gallery(self.folder.path), True))  # noqa: FBT003

    async def keep_fresh(self) -> None:
        """Write them anew until it is over, and say how it stands where there is no terminal."""
        trouble: str | None = None
        shown, written, fresh_until = -1, 0.0, 0.0
        spoken = self.board.began
        while not self.over.is_set():
            now = time.monotonic()
            stand = self.board.done + self.board.failed
            if now >= fresh_until and (shown != stand or now >= written + _STALE):
                shown, written = stand, now
                self._mark_what_runs()
                before, trouble = trouble, await write_all(self.folder, self.gallery, running=True)
                if trouble is not None and trouble != before:
                    complain(trouble)
                fresh_until = time.monotonic() + min(max(_FRESH, (time.monotonic() - now) / _SHARE), _STALE)
            if not self.board.console.is_interactive and now >= spoken + _PLAIN:
                spoken = now
                tell(f"{self.board.counts()}; {self.board.pace()}")
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_TICK):
                    await self.over.wait()

    def _mark_what_runs(self) -> None:
        for task in self.stream.unfinished:
            assert task.request is not None
            self.folder.rows[str(task.request.key)].runs_as(task.id)


class _WayOut:
    """Leaves a session: at the first signal with all that is in flight, at the second at once."""

    def __init__(self, board: Board, page: _Page, report: Report) -> None:
        self._board = board
        self._page = page
        self._report = report
        self._leaving: list[asyncio.Task[None]] = []

    @contextlib.contextmanager
    def watched(self) -> Generator[None]:
        """Mind signals while something is done."""
        loop = asyncio.get_running_loop()

        def arrived(number: int, _: object) -> None:
            loop.call_soon_threadsafe(self._hear, number)

        before = {number: signal.signal(number, arrived) for number in (signal.SIGINT, signal.SIGTERM)}
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
        if len(self._report.signals) == 1:
            stats = self._board.session.stats
            in_flight = stats.in_flight + stats.submitting
            self._close(_LONG)
            left = f"waiting for {pictures(in_flight)} in flight" if in_flight else "nothing is in flight"
            complain(f"no more is submitted; {left} (again to leave at once)")
        else:
            self._page.gallery.hurry = True
            self._close(0.0)
            complain("leaving at once")

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
