"""A batch: its requests submitted, its outcomes taken down and shown, stopped by a signal and gone on with later."""

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
from flux2max_async.cli._board import Board
from flux2max_async.cli._folder import Folder, is_end
from flux2max_async.cli._gallery import Gallery
from flux2max_async.cli._plan import Plan, Terms
from flux2max_async.cli._settings import Access
from flux2max_async.cli._terminal import complain, console, line, log_to, nobody_reads, pictures, tell

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
class Settings:
    """How a batch is to be run."""

    access: Access
    max_in_flight: int
    deadline: float
    budget: Decimal | None
    price_guess: Decimal | None
    terms: Terms
    as_json: bool


@attrs.define
class Report:
    """What a run has come to."""

    seconds: float = 0.0
    """That it took."""
    task_seconds: list[float] = attrs.field(factory=list[float])
    """That each completed task took, of those that ended in this run."""
    stats: "flux.SessionStats" = attrs.field(factory=flux.SessionStats)
    stopped: "flux.FluxError | None" = None
    """What has stopped it before its end."""
    signal: int | None = None
    """The signal that has stopped it."""


async def run(folder: Folder, plan: Plan, settings: Settings) -> Report:
    """Run a batch, or go on with it.

    Raises:
        FluxError: It couldn't be begun.
    """
    schedule = flux.LearnedSchedule()
    report = Report()
    async with settings.access.session(
        max_in_flight=settings.max_in_flight,
        deadline=settings.deadline,
        budget=settings.budget,
        price_guess=settings.price_guess,
        schedule=schedule,
        journal=flux.SqliteJournal(folder.database),
    ) as session:
        screen = console(sys.stderr)
        board = Board(len(plan.lines), session, schedule, settings.max_in_flight, screen, settings.budget, plan.spent)
        exit_door = _ExitDoor(board)
        over = asyncio.Event()
        with log_to(_Notes(board)), exit_door.watched(), board.shown():
            keeping = asyncio.create_task(_keep_fresh(folder, board, over))
            try:
                await _take_all(folder, plan, settings, exit_door, board, report)
            finally:
                over.set()
                await keeping
                await exit_door.closed()
                report.stats, report.seconds, report.signal = session.stats, board.seconds, exit_door.signal
    return report


async def _take_all(
    folder: Folder, plan: Plan, settings: Settings, exit_door: "_ExitDoor", board: Board, report: Report
) -> None:
    """Take each outcome as it comes."""
    stream = board.session.stream(
        [line.request for line in plan.lines],
        save_to=folder.path,
        retry_failed=settings.terms.retry_failed,
        resubmit_uncertain=settings.terms.resubmit_uncertain,
    )
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
            board.take(row.key, outcome)
            if settings.as_json:
                try:
                    sys.stdout.write(json.dumps(row.as_json()) + "\n")
                    sys.stdout.flush()
                except OSError as error:
                    nobody_reads()
                    complain(f"can't write to standard output: {error.strerror}; no more is submitted")
                    exit_door.leave()
    except flux.SessionClosedError:
        pass  # through the exit door
    except flux.FluxError as error:
        report.stopped = error


async def _keep_fresh(folder: Folder, board: Board, over: asyncio.Event) -> None:
    """Write the page and the results anew while the batch runs, and say how it stands where there is no terminal."""
    gallery, trouble = Gallery(folder.path), None
    shown, fresh_until = -1, 0.0
    spoken = board.began
    while not over.is_set():
        now = time.monotonic()
        if shown != board.done + board.failed and now >= fresh_until:
            shown = board.done + board.failed
            before, trouble = trouble, await write(folder, gallery, running=True)
            if trouble is not None and trouble != before:
                complain(trouble)
            fresh_until = time.monotonic() + min(max(_FRESH, (time.monotonic() - now) / _SHARE), _STALE)
        if not board.console.is_interactive and now >= spoken + _PLAIN:
            spoken = now
            tell(f"{board.counts()}; {board.pace()}")
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_TICK):
                await over.wait()


async def write(folder: Folder, gallery: Gallery, *, running: bool) -> str | None:
    """Write the results and the page; gives what has kept them from being written, which keeps nothing else."""
    rows = [attrs.evolve(row) for row in folder.rows.values()]  # the writer has a thread of its own

    def work() -> None:
        folder.write_results(rows)
        gallery.write(rows, running=running)

    try:
        await anyio.to_thread.run_sync(work)
    except OSError as error:
        return f"can't write {folder.results.name} and {gallery.path.name}: {error}"
    return None


class _ExitDoor:
    """Leaves a session: at the first signal with all that is in flight, at the second at once."""

    def __init__(self, board: Board) -> None:
        self.signal: int | None = None
        self._board = board
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

    def leave(self) -> None:
        """Submit nothing more."""
        self._close(_LONG)

    async def closed(self) -> None:
        """Wait until all that was begun to leave has ended."""
        await asyncio.gather(*self._leaving)

    def _hear(self, number: int) -> None:
        if self.signal is None:
            self.signal = number
            stats = self._board.session.stats
            in_flight = stats.in_flight + stats.submitting
            left = f"waiting for {pictures(in_flight)} in flight" if in_flight else "nothing is in flight"
            complain(f"no more is submitted; {left}. Again leaves at once; either way the same command goes on")
            self._close(_LONG)
        else:
            complain("leaving at once")
            self._close(0.0)

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
