"""Where the journal of a batch is: in a file, in its output folder by default, or in a database that hosts share."""

import re
from collections.abc import AsyncGenerator
from contextlib import aclosing
from pathlib import Path
from typing import TypeAlias

import flux2max_async as flux
from flux2max_async.journal._entry import JournalEntry
from flux2max_async.journal._postgres_reader import MissingJournalError

AnyJournal: TypeAlias = "flux.SqliteJournal | flux.PostgresJournal"


def is_address(place: str | Path) -> bool:
    """Check whether the text of an option is the address of a database, and not a path."""
    return "://" in str(place)


def open_journal(place: str | Path, option: str = "--journal") -> AnyJournal:
    """Return the journal at a path or an address; nothing is opened yet.

    Raises:
        ConfigurationError: The address is wrong, or a library is missing. It names the option, and no password.
    """
    if not is_address(place):
        return flux.SqliteJournal(place)
    try:
        return flux.PostgresJournal(str(place))
    except flux.ConfigurationError as error:
        error.message = f"{option}: {error.message}"
        raise


async def read_pages(
    journal: AnyJournal, *, missing_ok: bool = False
) -> "AsyncGenerator[list[JournalEntry | flux.JournalError]]":
    """Yield all entries in pages, the oldest first, and errors in the places of damaged ones.

    Args:
        journal: The journal.
        missing_ok: Whether one that doesn't exist yet has no entries.

    Raises:
        JournalError: The journal can't be read.
    """
    if missing_ok and isinstance(journal, flux.SqliteJournal) and not journal.path.exists():
        return
    async with aclosing(journal._read_pages()) as pages:  # noqa: SLF001 - entries() leaves damaged ones out
        try:
            async for page in pages:
                yield page
        except MissingJournalError:
            if not missing_ok:
                raise


def without_password(place: str) -> str:
    """Return a text, which may be an address or an option with one, without the password of the address."""
    if re.search(r"postgres(ql)?://", place) is None:
        return place
    place = re.sub(r"(://[^/?@:]*):[^@]*@", r"\1@", place)
    return re.sub(r"(?<=[?&])(ssl)?password=[^&]*&?", "", place).rstrip("?&")


def share_limit(place: str | None, slots: int) -> "int | flux.InFlightLimit":
    """Return the limit of the tasks in flight, which all have together whose journal is at the same address."""
    if place is None or not is_address(place) or slots < 1:  # the session reports a wrong number
        return slots
    return flux.PostgresInFlightLimit(place, slots)
