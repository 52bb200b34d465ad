"""A damaged row of the journal is an error of its own request, and of no other."""

import asyncio
import logging
import pickle
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from decimal import Decimal
from pathlib import Path

import attrs
import pytest

from flux2max_async import Failed, FixedSchedule, FluxSession, GenerationRequest, JournalEntry, JournalError
from flux2max_async.emulator import Emulator
from flux2max_async.journal import EntryState, Holder, SqliteJournal

KEYS = ("a", "k", "z")

# What a column of the row "k" is set to, and what the error says.
DAMAGE: dict[str, tuple[str, object, str]] = {
    "request: cut off": ("request", '{"prompt": "a', "JSONDecodeError"),
    "request: no object": ("request", "[1]", "not of type dict"),
    "request: bytes": ("request", b"\xff\xfe\x00", "Error"),
    "request: nested too deeply": ("request", "[" * 100_000, "RecursionError"),
    "result: empty": ("result", "", "JSONDecodeError"),
    "result: no object": ("result", "null", "not of type dict"),
    "result: error without a message": ("result", '{"error": {"kind": "TaskFailedError"}}', "KeyError"),
    "result: error is a text": ("result", '{"error": "boom"}', "TypeError"),
    "files: cut off": ("files", '[["/images/a.png"', "JSONDecodeError"),
    "files: no list": ("files", '{"/images/a.png": 9}', "not of type list"),
    "files: no pairs": ("files", '["/images/a.png"]', "ValueError"),
    "files: path is a number": ("files", "[[1, 9]]", "TypeError"),
    "files: size is a text": ("files", '[["/images/a.png", "9"]]', "not of type int"),
    "state: unknown": ("state", "sumbitted", "EntryState"),
    "state: not UTF-8": ("state", b"\xc3(", "EntryState"),
    "cost: no number": ("cost", "0.07O", "InvalidOperation"),
    "cost: NaN": ("cost", "NaN", "not an amount"),
    "cost: infinite": ("cost", "Infinity", "not an amount"),
    "cost: negative": ("cost", "-0.5", "not an amount"),
    "committed: a text": ("outlay", "much", "not of type int"),
    "committed: negative": ("outlay", -1, "not an amount"),
    "time: a text": ("ended", "yesterday", "TypeError"),
    "time: out of range": ("created", 1e300, "Error"),
    "attempt: a text": ("attempt", "first", "not of type int"),
    "fingerprint: bytes": ("content", b"\x00\xff", "not of type str"),
    "task id: bytes": ("task_id", b"\xff", "not of type str"),
    "task id: missing": ("task_id", None, "a task without an id"),
    "token: bytes": ("token", b"\xff", "not of type str"),
}


@pytest.fixture
def anyio_backend() -> str:
    """Use real time, in which a journal's thread runs."""
    return "asyncio"


def entry(key: str) -> JournalEntry:
    return JournalEntry(
        key=key, fingerprint="c1", request={"prompt": f"a {key}"}, holder=Holder.US, committed=Decimal("0.07"),
        webhook_token=f"token-{key}",
    )  # fmt: skip


def submitted(key: str) -> JournalEntry:
    return attrs.evolve(entry(key), state=EntryState.SUBMITTED, task_id=f"t-{key}")


async def create_journal(path: Path) -> None:
    async with SqliteJournal(path) as journal:
        for key in KEYS:
            await journal.begin(entry(key))
            await journal.record(submitted(key))


def rewrite(path: Path, statement: str, *arguments: object) -> None:
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute(statement, arguments)


def damage_row(path: Path, damage: str, key: str = "k") -> None:
    """Damage one row. Bytes are stored as text, as they would be after a bit has flipped."""
    column, value, _ = DAMAGE[damage]
    placeholder = "CAST(? AS TEXT)" if isinstance(value, bytes) else "?"
    rewrite(path, f"UPDATE entries SET {column} = {placeholder} WHERE key = ?", value, key)


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


@pytest.mark.parametrize("damage", DAMAGE)
async def test_a_damaged_row_is_an_error_of_its_own_request(
    damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """find() raises a JournalError with the key; other rows are found, and listed and exported with one warning."""
    path = tmp_path / "run.db"
    await create_journal(path)
    damage_row(path, damage)
    listed = [found.key async for found in SqliteJournal(path).entries()]
    warned = warnings(caplog)
    exported = await SqliteJournal(path).export(tmp_path / "run.jsonl")
    async with SqliteJournal(path) as journal:
        errors = await asyncio.gather(
            *(journal.find("k"), journal.find_task("t-k"), journal.find_token("token-k")), return_exceptions=True
        )
        others = await asyncio.gather(*(journal.find(key) for key in ("a", "z")))
        begun = await journal.begin(entry("new"))

    # A task id or a token that is damaged is not found; all else is.
    raised = [error for error in errors if error is not None]
    assert len(raised) >= 2
    assert [(type(error), getattr(error, "key", None)) for error in raised] == [(JournalError, "k")] * len(raised)
    assert DAMAGE[damage][2] in str(raised[0])
    assert f"the entry of 'k' in the journal {path} is damaged" in str(raised[0])
    assert listed == ["a", "z"]
    assert len(warned) == 1
    assert str(raised[0]).startswith(warned[0].removesuffix("…"))
    assert len(exported.read_text().splitlines()) == 2
    assert [other and other.key for other in others] == ["a", "z"]
    assert begun


async def test_a_damaged_key_is_named_as_well_as_it_can_be(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A key that is not UTF-8 any more is shown with its bytes, and the other entries are listed."""
    path = tmp_path / "run.db"
    await create_journal(path)
    rewrite(path, "UPDATE entries SET key = CAST(? AS TEXT) WHERE key = 'k'", b"k\xff")
    listed = [found.key async for found in SqliteJournal(path).entries()]

    assert listed == ["a", "z"]
    assert "b'k\\\\xff'" in warnings(caplog)[0]


async def test_a_page_of_damaged_rows_does_not_end_the_list(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Entries behind 600 damaged ones are listed."""
    path = tmp_path / "run.db"
    async with SqliteJournal(path) as journal:
        await asyncio.gather(*(journal.begin(entry(f"{number}")) for number in range(601)))
    rewrite(path, "UPDATE entries SET request = '?' WHERE key != '600'")
    listed = [found.key async for found in SqliteJournal(path).entries()]

    assert listed == ["600"]
    assert len(warnings(caplog)) == 600


def test_the_error_can_be_pickled() -> None:
    """The key survives pickling."""
    error = pickle.loads(pickle.dumps(JournalError("damaged", key="k")))

    assert (str(error), error.key) == ("damaged", "k")


# ---------------------------------------------------------------------- adoption, and ends recorded by others


@pytest.mark.parametrize("damage", [name for name in DAMAGE if not name.startswith("state")])
async def test_adoption_skips_damaged_rows(damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Of the tasks of a dead process, those that can be read are adopted; a damaged one stays as it is."""
    path = tmp_path / "run.db"
    await create_journal(path)
    reported: asyncio.Future[list[JournalEntry]] = asyncio.get_running_loop().create_future()
    journal = SqliteJournal(path, lease=0.2)
    rewrite(path, "INSERT INTO owners VALUES ('them', 1, 0.2, 'elsewhere', 1)")
    rewrite(path, "UPDATE entries SET owner = 'them'")
    damage_row(path, damage)
    await journal.open(reported.set_result)
    try:
        async with asyncio.timeout(5):
            adopted = await reported
    finally:
        await journal.close()
    with closing(sqlite3.connect(path)) as connection:
        owners = connection.execute("SELECT owner FROM entries WHERE owner = 'them'").fetchall()

    assert [found.key for found in adopted] == ["a", "z"]
    assert owners == [("them",)]
    assert [message for message in warnings(caplog) if "'k'" in message] == warnings(caplog)[:1]


@pytest.mark.parametrize("damage", ["{", '{"elapsed": "long", "images": []}', '{"images": [{"url": "x"}]}', "{}"])
async def test_a_damaged_end_does_not_keep_others_from_being_reported(
    damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Ends that another session records are reported, without the one whose result can't be read; it is logged once."""
    path = tmp_path / "run.db"
    await create_journal(path)
    reports: asyncio.Queue[list[JournalEntry]] = asyncio.Queue()
    holder = SqliteJournal(path)
    await holder.open(reports.put_nowait, watch_changes=True)
    try:
        for key in ("a", "k", "z"):
            found = await holder.find(key)
            assert found is not None
            await holder.adopt(found)
        for key in ("k", "a", "z"):
            rewrite(path, "UPDATE entries SET state = 'completed', result = ? WHERE key = ?",
                    damage if key == "k" else '{"images": [], "metadata": {}}', key)  # fmt: skip
            await asyncio.sleep(0.4)
        reported = {found.key for _ in range(reports.qsize()) for found in reports.get_nowait()}
    finally:
        await holder.close()

    assert reported == {"a", "z"}
    assert len([message for message in warnings(caplog) if "'k'" in message]) == 1


async def test_waiting_for_a_row_that_gets_damaged_ends(tmp_path: Path) -> None:
    """changed() returns when the entry can't be read any more, and find() raises the error."""
    path = tmp_path / "run.db"
    await create_journal(path)
    async with SqliteJournal(path) as first, SqliteJournal(path) as second:
        found = await first.find("k")
        assert found is not None
        await first.adopt(found)
        held = await second.find("k")
        assert held is not None
        waiting = asyncio.ensure_future(second.changed(held))
        await asyncio.sleep(0.1)
        damage_row(path, "request: cut off")
        async with asyncio.timeout(2):
            await waiting
        with pytest.raises(JournalError, match="'k'"):
            await second.find("k")


# ---------------------------------------------------------------------- sessions


@pytest.fixture
def gateway() -> Iterator[Emulator]:
    with Emulator(seconds=0.1, spread=0.0, seed=1) as emulator:
        yield emulator


@pytest.mark.parametrize(
    ("column", "value"),
    [("request", "{"), ("state", "done"), ("result", "{}"), ("result", '{"images": [1]}'), ("cost", "free")],
)
async def test_a_stream_goes_on_past_a_damaged_row(gateway: Emulator, tmp_path: Path, column: str, value: str) -> None:
    """The request of the damaged row fails with its key and is not paid for again; the others are replayed, new ones run."""
    path = tmp_path / "run.db"

    async def run(*keys: str) -> dict[str | None, object]:
        session = FluxSession(
            gateway.api_key, base_url=gateway.url, journal=SqliteJournal(path), schedule=FixedSchedule(0.05)
        )
        async with session:
            outcomes = [
                outcome async for outcome in session.stream(GenerationRequest("a cat", key=key) for key in keys)
            ]
        return {outcome.request.key: outcome for outcome in outcomes if outcome.request}

    await run(*KEYS)
    rewrite(path, f"UPDATE entries SET {column} = ? WHERE key = 'k'", value)
    outcomes = await run(*KEYS, "new")
    failed = outcomes.pop("k")

    assert isinstance(failed, Failed)
    assert isinstance(failed.error, JournalError)
    assert failed.error.key == "k"
    assert "'k'" in str(failed.error)
    assert [key for key, outcome in outcomes.items() if not isinstance(outcome, Failed)] == ["a", "z", "new"]
    assert sum(gateway.accepted.values()) == len(KEYS) + 1
    assert [file.name for file in tmp_path.iterdir()] == ["run.db"]


@pytest.mark.parametrize("attempts", [1, 3])
async def test_a_damaged_row_is_submitted_again_with_consent(gateway: Emulator, tmp_path: Path, attempts: int) -> None:
    """resubmit_uncertain=True submits the request again, as the attempt after the damaged one, and then replays that."""
    path = tmp_path / "run.db"
    await create_journal(path)
    for attempt in range(1, attempts):
        rewrite(path, "INSERT INTO entries SELECT NULL, key, attempt + 1, content, 'failed', owner, task_id, cost, outlay,"
                " created, submitted, ended, request, result, files, NULL FROM entries WHERE key = 'k' AND attempt = ?",
                attempt)  # fmt: skip
    rewrite(path, "UPDATE entries SET request = '{' WHERE key = 'k' AND attempt = ?", attempts)
    session = FluxSession(
        gateway.api_key, base_url=gateway.url, journal=SqliteJournal(path), schedule=FixedSchedule(0.05)
    )
    async with session:
        request = GenerationRequest("a cat", key="k")
        with pytest.raises(JournalError, match="'k'"):
            await session.generate(request)
        done = [await session.generate(request, resubmit_uncertain=True), await session.generate(request)]
    found = [item.attempt async for item in SqliteJournal(path).entries() if item.task_id == done[0].task_id]

    assert [outcome.replayed for outcome in done] == [False, True]
    assert done[0].task_id == done[1].task_id
    assert found == [attempts + 1]
    assert sum(gateway.accepted.values()) == 1
