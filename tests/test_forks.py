"""Processes that are forked while a session, its journal and its limit are open: clear errors, and no harm."""

import json
import os
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from flux2max_async import InFlightLimitError
from flux2max_async._forks import check_process
from flux2max_async._sqlite_files import _inherited, _on_fork, connect
from flux2max_async.emulator import Emulator

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform can't fork")

# The parent opens everything in an event loop, and forks a child for each case, which runs it in an event loop of its
# own and exits as programs do. A child that hangs is killed after a while. Then the parent goes on.
SCRIPT = """
import asyncio, json, os, signal, sys, warnings
warnings.simplefilter("ignore", DeprecationWarning)  # forking with threads is what this is about
from flux2max_async import FluxSession, SqliteInFlightLimit
from flux2max_async.journal import SqliteJournal

key, url, folder = sys.argv[1:]
journal = SqliteJournal(f"{folder}/run.db")
limit = SqliteInFlightLimit(f"{folder}/limit.db", 3)
session = FluxSession(key, base_url=url, journal=journal, max_in_flight=limit)
loop = asyncio.new_event_loop()
run = loop.run_until_complete

async def stream():
    return [outcome async for outcome in session.stream(["x"])]

async def entries(path):
    return [entry.key async for entry in SqliteJournal(path).entries()]

async def open_close(opened):
    await opened.open()
    await opened.close()

async def synchronous(function, *arguments):
    return function(*arguments)

async def own_session():
    own = SqliteJournal(f"{folder}/own.db")
    own_limit = SqliteInFlightLimit(f"{folder}/own-limit.db", 3)
    async with FluxSession(key, base_url=url, journal=own, max_in_flight=own_limit) as mine:
        return (await mine.generate("of the child")).ok

run(session.__aenter__())
first = run(session.generate("before"))
waiting = loop.create_task(session.generate("while"))
run(asyncio.sleep(0))
image = first.images[0]
CASES = {
    "generate": lambda: session.generate("x"),
    "submit": lambda: session.submit("x"),
    "enqueue": lambda: synchronous(session.enqueue, "x"),
    "stream": stream,
    "attach": lambda: synchronous(session.attach, first.task_id),
    "fetch": lambda: session.fetch(first.task_id),
    "save": lambda: session.save(image, f"{folder}/x.jpeg"),
    "read": lambda: session.read(image),
    "download": lambda: synchronous(session.download, image),
    "aclose": session.aclose,
    "enter": session.__aenter__,
    "journal.find": lambda: journal.find("x"),
    "journal.update_state": lambda: journal.update_state("x", lambda _: {}),
    "journal.open": journal.open,
    "journal.close": journal.close,
    "journal.entries": lambda: entries(journal.path),
    "journal.export": lambda: journal.export(f"{folder}/x.jsonl"),
    "journal.prune": lambda: journal.prune(older_than=0.0),
    "another journal": lambda: open_close(SqliteJournal(journal.path)),
    "limit.acquire": limit.acquire,
    "limit.occupy": lambda: synchronous(limit.occupy),
    "limit.release": lambda: synchronous(limit.release),
    "limit.open": limit.open,
    "limit.close": limit.close,
    "another limit": lambda: open_close(SqliteInFlightLimit(limit.path, 3)),
    "own session": own_session,
    "begin_drain": lambda: synchronous(session.begin_drain),
}

def in_child(case):
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        signal.alarm(60)
        os.close(reader)
        try:
            text = repr(asyncio.run(case()))
        except BaseException as error:
            text = f"{type(error).__name__}: {error}"
        os.write(writer, text.replace(str(os.getpid()), "CHILD").replace(str(os.getppid()), "PARENT").encode())
        sys.exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        text = pipe.read()
    return text, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

results = {name: in_child(case) for name, case in CASES.items()}
after = [run(waiting).ok, run(session.generate("after")).ok]
stats = session.stats
run(session.aclose())
run(open_close(limit))
results["parent"] = [after, stats.in_flight, sorted(os.listdir(folder)), len(run(entries(journal.path)))]
print(json.dumps(results))
"""
SESSION = (
    "ConfigurationError: this session was opened in process PARENT and is used in process CHILD, forked from it: "
    "open a session of its own in each process"
)
JOURNAL = SESSION.replace("ConfigurationError", "JournalError").replace("session", "journal")
LIMIT = SESSION.replace("ConfigurationError", "InFlightLimitError").replace("session", "limit")
FILE = (
    "{}: the {} {} can't be used: it was open in process PARENT when process CHILD was forked from it, which must not "
    "use it: fork before it is opened, or spawn processes instead"
)
NAMES_OF_ERRORS = {"journal": "JournalError", "limit": "InFlightLimitError"}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Provide what each child has printed, with its exit code; and what the parent has found afterwards."""
    folder = tmp_path_factory.mktemp("forks")
    with Emulator(seconds=0.1, spread=0.0, seed=1) as emulator:
        command = [sys.executable, "-c", SCRIPT, emulator.api_key, emulator.url, str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        accepted = dict(emulator.accepted)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found | {"folder": folder, "accepted": accepted, "stderr": done.stderr}


@pytest.mark.parametrize(
    "case",
    ["generate", "submit", "enqueue", "stream", "attach", "fetch", "save", "read", "download", "aclose", "enter"],
)
def test_a_session_of_the_parent(results: dict[str, Any], case: str) -> None:
    """Using it in a child is an error that names both processes, and the child ends."""
    assert results[case] == [SESSION, 0]


@pytest.mark.parametrize("case", ["find", "update_state", "open", "close"])
def test_a_journal_of_the_parent(results: dict[str, Any], case: str) -> None:
    """Using it in a child is an error that names both processes, and the child ends."""
    assert results[f"journal.{case}"] == [JOURNAL, 0]


@pytest.mark.parametrize("case", ["acquire", "occupy", "release", "open", "close"])
def test_a_limit_of_the_parent(results: dict[str, Any], case: str) -> None:
    """Using it in a child is an error that names both processes, and the child ends."""
    assert results[f"limit.{case}"] == [LIMIT, 0]


@pytest.mark.parametrize(
    ("case", "kind", "file"),
    [
        ("journal.entries", "journal", "run.db"),
        ("journal.export", "journal", "run.db"),
        ("journal.prune", "journal", "run.db"),
        ("another journal", "journal", "run.db"),
        ("another limit", "limit", "limit.db"),
    ],
)
def test_a_file_that_the_parent_has_open(results: dict[str, Any], case: str, kind: str, file: str) -> None:
    """No child opens it, since SQLite would use it without locks there."""
    assert results[case] == [FILE.format(NAMES_OF_ERRORS[kind], kind, results["folder"] / file), 0]


def test_a_child_can_have_its_own(results: dict[str, Any]) -> None:
    """A child opens a session, a journal and a limit of its own, with files of its own."""
    assert results["own session"] == ["True", 0]


def test_draining_has_no_effect_in_a_child(results: dict[str, Any]) -> None:
    """A signal that reaches a child as well drains nothing there, and is no error."""
    assert results["begin_drain"] == ["None", 0]


def test_the_parent_goes_on(results: dict[str, Any]) -> None:
    """Its task and its next one end, each was paid for once, its files are whole, and nothing is left beside them."""
    assert results["parent"] == [[True, True], 0, ["limit.db", "own-limit.db", "own.db", "run.db"], 3]
    assert results["accepted"] == {"before": 1, "while": 1, "after": 1, "of the child": 1}
    assert results["stderr"] == ""


# ---------------------------------------------------------------------- the same in one process


def test_the_process_that_has_opened_something_may_use_it() -> None:
    """The check passes in the process itself, and names both in another one."""
    check_process(os.getpid(), "limit", InFlightLimitError)
    with pytest.raises(InFlightLimitError, match=rf"opened in process 0 and is used in process {os.getpid()}, forked"):
        check_process(0, "limit", InFlightLimitError)


def test_only_files_that_were_open_are_inherited(tmp_path: Path) -> None:
    """A file that was closed before the fork can be opened after it, and so can one that the parent has never opened."""
    left_open = connect(tmp_path / "open.db", 1.0)
    connect(tmp_path / "closed.db", 1.0).close()
    try:
        _on_fork()
        with pytest.raises(sqlite3.OperationalError, match="forked"):
            connect(tmp_path / "open.db", 1.0, "ro")
        for name in ("closed.db", "new.db"):
            connect(tmp_path / name, 1.0).close()
    finally:
        _inherited.clear()
        left_open.close()
