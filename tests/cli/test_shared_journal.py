"""`--journal` with a file: batches in other folders share it, and each sees its own requests."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.commands import Command

from flux2max_async import ConfigurationError
from flux2max_async.cli import _journals as journals
from flux2max_async.emulator import Emulator

pytestmark = pytest.mark.usefixtures("empty_folder")

SMALL = ("--width", "64", "--height", "64")


def write(name: str, *lines: str) -> str:
    Path(name).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return name


def results(folder: str) -> dict[str, dict[str, Any]]:
    """Return the rows of results.jsonl by prompt."""
    lines = Path(folder, "results.jsonl").read_text(encoding="utf-8").splitlines()
    return {row["prompt"]: row for row in map(json.loads, lines)}


def batch(flux2max: Command, file: str, folder: str, *options: str) -> Any:
    return flux2max("batch", file, *SMALL, "--yes", "--journal", "shared.db", "--out", folder, *options)


def test_two_folders_share_a_journal(flux2max: Command, service: Callable[..., Emulator]) -> None:
    """A second folder gets the pictures of the first without paying, under its own names, and none of others' rows."""
    gateway = service()
    one, two = write("one.txt", "a cat", "a dog"), write("two.txt", "a dog", "a fox")
    runs = [batch(flux2max, one, "first"), batch(flux2max, two, "second"), batch(flux2max, one, "first")]
    shown = flux2max("journal", "show", "shared.db", "--json")

    assert [run.code for run in runs] == [0, 0, 0]
    assert sorted(gateway.accepted.values()) == [1, 1, 1]
    assert [set(results(folder)) for folder in ("first", "second")] == [{"a cat", "a dog"}, {"a dog", "a fox"}]
    for folder in ("first", "second"):
        files = [name for row in results(folder).values() for name in row["files"]]
        assert len(files) == 2
        assert all(Path(folder, name).is_file() for name in files)
        assert not Path(folder, "journal.db").exists()
    assert json.loads(shown.out.splitlines()[0])["key"]
    assert len(shown.out.splitlines()) == 3


def test_what_others_have_spent_counts(flux2max: Command, service: Callable[..., Emulator]) -> None:
    """The budget is that of the journal, whose other requests are no rows of this batch; the plan says what is left."""
    service()
    batch(flux2max, write("one.txt", "a cat", "a dog"), "first", "--budget", "1")
    price = float(results("first")["a cat"]["cost"])
    dry = batch(flux2max, write("two.txt", "a fox"), "second", "--budget", "1", "--dry-run")
    stopped = batch(flux2max, "two.txt", "second", "--budget", str(round(2 * price, 4)))

    assert f"the budget leaves ${1 - 2 * price:.2f}" in dry.err
    assert stopped.code == 1
    assert results("second")["a fox"]["state"] == "waiting"


def test_pictures_that_were_deleted(flux2max: Command, service: Callable[..., Emulator]) -> None:
    """A picture that is gone from its folder is fetched again, and what the file no longer has keeps its row."""
    gateway = service()
    batch(flux2max, write("one.txt", "a cat", "a dog"), "first")
    (name,) = results("first")["a cat"]["files"]
    Path("first", name).unlink()
    batch(flux2max, write("one.txt", "a cat"), "first")

    assert Path("first", name).is_file()
    assert results("first").keys() == {"a cat", "a dog"}
    assert sorted(gateway.accepted.values()) == [1, 1]


def test_a_journal_that_is_another_one(flux2max: Command, service: Callable[..., Emulator]) -> None:
    """What results.jsonl has as paid for is not paid again because of another journal."""
    gateway = service()
    flux2max("batch", write("one.txt", "a cat", "a dog"), *SMALL, "--yes", "--out", "first")
    write("one.txt", "a cat", "a dog", "a fox")
    run = batch(flux2max, "one.txt", "first")
    again = batch(flux2max, "one.txt", "first", "--resubmit-uncertain")

    assert "the journal shared.db was pruned, is damaged, or is another one: it lacks 2 pictures" in run.err
    assert (run.code, again.code) == (0, 0)
    assert sorted(gateway.accepted.values()) == [1, 2, 2]


def test_the_emulator_has_its_own(flux2max: Command) -> None:
    """The emulator's tasks don't come into a journal of tasks that were paid for."""
    run = batch(flux2max, write("one.txt", "a cat"), "first", "--emulator")

    assert run.code == 2
    assert "--emulator has a journal of its own, in the output folder: leave --journal out" in run.err
    assert not Path("shared.db").exists()


def test_a_dotenv_file_of_somebody_else(
    flux2max: Command, service: Callable[..., Emulator], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An address in .env counts only with the key from the same file, or results would go where its author wants."""
    service()
    Path(".env").write_text("FLUX2MAX_JOURNAL=shared.db\n")
    run = flux2max("batch", write("one.txt", "a cat"), *SMALL, "--yes")

    assert run.code == 2
    assert "FLUX2MAX_JOURNAL in .env counts only with the API key from the same file" in run.err
    assert "or pass --journal if you trust it" in run.err


def test_a_path_that_is_not_there(flux2max: Command) -> None:
    """A journal to be shown has to exist."""
    run = flux2max("journal", "show", "nothing")

    assert run.code == 2
    assert "Path 'nothing' does not exist." in run.err


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("postgresql://me:secret@db/flux", "postgresql://me@db/flux"),
        ("--journal=postgres://me:sec:ret@db/flux?sslmode=require", "--journal=postgres://me@db/flux?sslmode=require"),
        (
            "postgresql://db/flux?user=me&password=secret&sslmode=require",
            "postgresql://db/flux?user=me&sslmode=require",
        ),
        ("postgresql://db/flux?password=secret", "postgresql://db/flux"),
        ("postgresql://me@db:5433/flux", "postgresql://me@db:5433/flux"),
        ("a cat: http://me:it@home", "a cat: http://me:it@home"),
        ("journal.db", "journal.db"),
    ],
)
def test_addresses_are_shown_without_passwords(text: str, shown: str) -> None:
    """What is printed of a command or an address has no password; other texts stay as they are."""
    assert journals.without_password(text) == shown


def test_a_missing_library(flux2max: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without psycopg, an address is an error that names the option and says what to install."""
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(ConfigurationError, match=r"^--journal: .*pip install 'flux2max_async\[postgres\]'"):
        journals.open_journal("postgresql://db/flux")
    run = flux2max("journal", "show", "postgresql://me:secret@db/flux")

    assert run.code == 2
    assert "PATH: PostgreSQL needs psycopg" in run.err
    assert "secret" not in run.err
