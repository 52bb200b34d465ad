"""What the event loop hands over to the journal's thread, and what comes back."""

import asyncio
from collections.abc import Callable
from typing import Any

import attrs

from flux2max_async._exceptions import FluxError
from flux2max_async.journal._entry import JournalEntry
from flux2max_async.journal._store_protocol import JournalStore


# One for each write: frozen ones take several times as long to create.
@attrs.define(eq=False)
class Job:
    """A function to run on the store, and the future of its result."""

    function: Callable[[JournalStore], Any]
    future: "asyncio.Future[Any]"
    writes: bool = True
    durable: bool = False
    """Whether the disk must have stored it before the future is resolved."""
    single_statement: bool = False
    """Whether it consists of one statement, which is atomic without a transaction."""
    entry_id: tuple[str, int] | None = None
    """The key and attempt of the entry that it records, if the write is to be repeated until it succeeds."""
    wakes: str | None = None
    """The owner to be woken once it is written, because it holds the entry."""


@attrs.define(eq=False)
class Resolution:
    """The result or the error for a future of the event loop."""

    future: "asyncio.Future[Any]"
    result: Any = None
    error: FluxError | None = None


@attrs.frozen(eq=False)
class Watch:
    """An entry, and the future that is resolved when it changes."""

    entry: JournalEntry
    future: "asyncio.Future[Any]"


def resolve_futures(resolutions: tuple[Resolution, ...]) -> None:
    """Resolve the futures that nobody has cancelled; call it in the event loop."""
    for resolution in resolutions:
        future = resolution.future
        if future.done():
            continue
        if resolution.error is None:
            future.set_result(resolution.result)
        else:
            future.set_exception(resolution.error)
            future.exception()  # marks it as retrieved: the caller may have left already
