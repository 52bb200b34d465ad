"""States: small values that sessions keep in a journal under a name, and change in one transaction."""

import asyncio
import math
import threading
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from support.journals import AnyJournal, execute

from flux2max_async import JournalError
from flux2max_async.journal import Journal


@pytest.fixture
def anyio_backend() -> str:
    """Use real time, in which a journal's thread runs."""
    return "asyncio"


@pytest.fixture
async def journal(tmp_path: Path) -> AsyncIterator[AnyJournal]:
    async with AnyJournal(tmp_path / "run.db") as opened:
        yield opened


def count_up(state: Mapping[str, Any] | None) -> Mapping[str, Any]:
    return {"count": (state or {"count": 0})["count"] + 1}


async def test_a_state_is_kept_under_its_name(tmp_path: Path) -> None:
    """A state is there for the next session, unchanged; other names have others, or none."""
    value = {"text": "Grüße ☃ \ud800", "numbers": [1, 0.1, 1e300], "nothing": None, "nested": {"a": [True]}}
    async with AnyJournal(tmp_path / "run.db") as journal:
        missing = await journal.load_state("a")
        await journal.update_state("a", lambda _: value)
        await journal.update_state("b", count_up)
    async with AnyJournal(tmp_path / "run.db") as journal:
        found = [await journal.load_state(name) for name in ("a", "b", "c")]
        listed = [entry async for entry in journal.entries()]

    assert missing is None
    assert found == [value, {"count": 1}, None]
    assert listed == []


async def test_changes_of_several_sessions_are_all_kept(tmp_path: Path) -> None:
    """A state is read, changed and written in one transaction: no change of 120 by three sessions is lost."""
    path = tmp_path / "run.db"
    async with AnyJournal(path) as a, AnyJournal(path) as b, AnyJournal(path) as c:
        await asyncio.gather(*(journal.update_state("n", count_up) for journal in (a, b, c) for _ in range(40)))
        found = await b.load_state("n")

    assert found == {"count": 120}


async def test_a_change_does_not_run_in_the_event_loop(journal: AnyJournal) -> None:
    """A change that takes long holds up the journal's thread, not the event loop."""
    threads = []

    def change(_: object) -> dict[str, Any]:
        threads.append(threading.current_thread())
        return {}

    await journal.update_state("a", change)

    assert threads != [threading.current_thread()]


@pytest.mark.parametrize(
    "change",
    [lambda _: 1 / 0, lambda _: {"x": object()}, lambda _: {"x": math.nan}, lambda _: None],
    ids=["error", "no JSON", "NaN", "no mapping"],
)
async def test_a_change_that_fails_changes_nothing(journal: AnyJournal, change: Any) -> None:
    """An error of the change, or a value that isn't JSON, is a JournalError; the state stays, and the journal works."""
    await journal.update_state("a", count_up)
    with pytest.raises(JournalError):
        await journal.update_state("a", change)
    kept = await journal.load_state("a")
    await journal.update_state("a", count_up)

    assert kept == {"count": 1}
    assert await journal.load_state("a") == {"count": 2}


@pytest.mark.parametrize("damage", ["{", "[1]", "", "7"])
async def test_a_damaged_state_is_an_error_until_it_is_replaced(
    journal: AnyJournal, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Loading a damaged state is a JournalError that names it; for a change it is missing, which is logged."""
    await journal.update_state("a", count_up)
    execute(journal.path, "UPDATE states SET value = ?", damage)
    with pytest.raises(JournalError, match=r"the state 'a' in the journal .* is damaged"):
        await journal.load_state("a")
    await journal.update_state("a", count_up)

    assert await journal.load_state("a") == {"count": 1}
    assert "is damaged" in caplog.text
    assert "it is replaced" in caplog.text


async def test_a_journal_that_is_not_open_keeps_no_states(tmp_path: Path) -> None:
    """States can be read and changed while the journal is open."""
    journal = AnyJournal(tmp_path / "run.db")
    with pytest.raises(JournalError, match="is not open"):
        await journal.load_state("a")
    with pytest.raises(JournalError, match="is not open"):
        await journal.update_state("a", count_up)


async def test_a_journal_need_not_keep_states() -> None:
    """A journal that is derived from the protocol and knows nothing of states has none."""

    class Forgetful(Journal):
        pass

    journal = Forgetful()  # type: ignore[abstract] # what is missing isn't called
    await journal.update_state("a", count_up)

    assert await journal.load_state("a") is None
