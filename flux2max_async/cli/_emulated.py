"""The emulator inside of `batch --emulator`, which goes on with the tasks of earlier runs."""

import contextlib
import zlib
from collections.abc import Generator, Iterable, Sequence
from decimal import Decimal
from urllib.parse import urlsplit

from flux2max_async.emulator import Emulator, Webhooks
from flux2max_async.emulator._service import EmulatedTask
from flux2max_async.journal._entry import EntryState, JournalEntry

_SECONDS = 2.0
"""The typical duration of a task: enough to see it run."""


@contextlib.contextmanager
def run_emulator(entries: Sequence[JournalEntry], max_in_flight: int) -> Generator[Emulator]:
    """Run an emulator in a thread of its own, which knows the tasks of earlier runs.

    Args:
        entries: The journal's, the oldest first.
        max_in_flight: The limit on running tasks.
    """
    with contextlib.ExitStack() as stack:
        try:
            gateway = stack.enter_context(_emulator(_find_port(entries), max_in_flight))
        except OSError:
            gateway = stack.enter_context(_emulator(0, max_in_flight))
        _restore_tasks(gateway, entries)
        yield gateway


def _emulator(port: int, max_in_flight: int) -> Emulator:
    # Webhooks would tell a real application of pictures that nobody has paid for.
    webhooks = Webhooks(dropped=1.0)
    return Emulator(seconds=_SECONDS, max_in_flight=max(1, max_in_flight), webhooks=webhooks, port=port)


def _find_port(entries: Sequence[JournalEntry]) -> int:
    """Return the port of an earlier run, so that the URLs of its pictures lead to the emulator; 0 if there is none."""
    for entry in reversed(entries):
        for image in entry.result.get("images", ()):
            with contextlib.suppress(ValueError):
                if port := urlsplit(str(image["url"])).port:
                    return port
    return 0


def _restore_tasks(gateway: Emulator, entries: Iterable[JournalEntry]) -> None:
    """Register the tasks of earlier runs with the emulator, which has lost them."""
    for entry in entries:
        if entry.task_id is not None and entry.state in {EntryState.SUBMITTED, EntryState.COMPLETED}:
            params = entry.request
            seed = params.get("seed")
            gateway.tasks[entry.task_id] = EmulatedTask(
                id=entry.task_id,
                prompt=entry.prompt,
                seed=zlib.crc32(entry.task_id.encode()) if seed is None else seed,
                width=params.get("width") or 1024,
                height=params.get("height") or 1024,
                output_format=params.get("output_format") or "jpeg",
                input_images=(),
                cost=entry.cost or entry.committed or Decimal(0),
                created_at=0.0 if entry.created_at is None else entry.created_at.timestamp(),
                begins=0.0,
                ends=0.0,  # it has ended meanwhile
                fate="failed" if "[fail]" in entry.prompt else "completed",
            )
