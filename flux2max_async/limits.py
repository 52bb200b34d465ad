"""Limits on the tasks in flight that several processes share.

    async with FluxSession(max_in_flight=SqliteInFlightLimit("limit.db", 24)) as session:
        ...

Each worker of a web server opens the same file; together they have 24 slots.
"""

from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

from flux2max_async._config import validate_count
from flux2max_async._exceptions import InFlightLimitError
from flux2max_async._in_flight_limit import InFlightLimit

if TYPE_CHECKING:
    from flux2max_async._shared_limit.worker import LimitWorker

__all__ = ["InFlightLimit", "SqliteInFlightLimit"]


class SqliteInFlightLimit(InFlightLimit):
    """A limit in an SQLite file, for any number of processes on one machine.

    Slots go to the processes in turn: to the one that has waited longest since its last slot, whoever has more requests
    waiting. Each submits into a slot as soon as it has it, so all slots are in use while anybody has requests.

    The slots of a process that dies are free again within a tenth of a second. If its session had a journal, they count
    until a session that adopts its tasks has taken them over, or for 10 seconds, in which adoption happens by default.

    While the file can't be used, requests wait for up to 30 seconds, and then fail with InFlightLimitError.

    Windows lacks the named pipes that it needs: there, opening it is an InFlightLimitError.

    Args:
        path: The file; not that of a journal, and in no folder that is tidied: where it is deleted while it is open, a
            new one counts from zero for up to a second. It is created, with its folder, if it doesn't exist. Beside it
            are two files of SQLite and a named pipe of each process.
        limit: The number of slots. Each process keeps to its own, if they differ.

    Raises:
        ConfigurationError: The limit is not an integer of at least 1.
    """

    def __init__(self, path: str | PathLike[str], limit: int) -> None:
        validate_count("limit", limit)
        self.path: Path = Path(path)
        self._limit = limit
        self._expects_adoption = False
        self._worker: LimitWorker | None = None

    def __repr__(self) -> str:
        return f"SqliteInFlightLimit({str(self.path)!r}, {self._limit})"

    @property
    def limit(self) -> int:
        """The number of slots in all."""
        return self._limit

    def expect_adoption(self) -> None:
        """Learn, before `open()`, that the session has a journal."""
        self._expects_adoption = True

    async def open(self) -> None:
        """Open the file, or create it.

        Raises:
            InFlightLimitError: It can't be opened, or is another program's database.
        """
        from flux2max_async._shared_limit.worker import LimitWorker  # noqa: PLC0415 - only sessions that share load sqlite3

        if self._worker is not None:
            if not self._worker.loop_is_closed:
                raise InFlightLimitError(
                    f"the limit {self.path} is open already: each session needs a SqliteInFlightLimit of its own"
                )
            self._worker.stop()
        self._worker = worker = LimitWorker(self.path, self._limit, keep_after_death=self._expects_adoption)
        try:
            await worker.opened
        except BaseException:
            self._worker = None
            worker.stop()
            raise

    async def acquire(self) -> None:
        """Wait for a slot, and take it. If the wait is cancelled, none is taken.

        Raises:
            InFlightLimitError: The limit is not open, or its file can't be used for 30 seconds.
        """
        await self._open_worker().acquire()

    def occupy(self) -> None:
        """Count a task that runs already, even above the limit."""
        self._open_worker().occupy()

    def release(self) -> None:
        """Release a slot; closing has released all."""
        if self._worker is not None:
            self._worker.release()

    async def close(self) -> None:
        """Release all slots, and close the file. Closing it twice does no harm."""
        worker, self._worker = self._worker, None
        self._expects_adoption = False
        if worker is not None and not worker.loop_is_closed:
            worker.stop()
            await worker.stopped

    def _open_worker(self) -> "LimitWorker":
        if self._worker is None:
            raise InFlightLimitError(f"the limit {self.path} is not open")
        return self._worker
