"""`flux2max batch`: output files, messages and exit codes; nothing is paid for or downloaded twice."""

import contextlib
import json
import os
import re
import shlex
import shutil
import sqlite3
import threading
from collections import Counter, deque
from collections.abc import Callable, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from support.commands import KEY, Command, Run, visible_lines
from support.responses import jpeg
from support.scripted import ScriptedGateway, answer, completed, running

import flux2max_async as flux
from flux2max_async._downloads import retries
from flux2max_async.cli._inspect import parse_duration
from flux2max_async.cli._rows import Row, is_final, is_lost, state_after_failure
from flux2max_async.emulator import Emulator, Fault
from flux2max_async.journal._entry import EntryState, JournalEntry

pytestmark = pytest.mark.usefixtures("empty_folder")

Service = Callable[..., Emulator]
SMALL = ("--width", "64", "--height", "64")


def write(*lines: str, name: str = "prompts.txt") -> str:
    Path(name).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return name


def results(folder: str = "flux2max-prompts") -> dict[str, dict[str, Any]]:
    """Return the rows of results.jsonl by prompt."""
    lines = Path(folder, "results.jsonl").read_text(encoding="utf-8").splitlines()
    return {row["prompt"]: row for row in map(json.loads, lines)}


def states(folder: str = "flux2max-prompts") -> dict[str, str]:
    return {prompt: row["state"] for prompt, row in results(folder).items()}


def pictures(folder: str = "flux2max-prompts") -> list[Path]:
    """Return the paths of the pictures, each of which can be decoded."""
    found = sorted(path for path in Path(folder).iterdir() if path.suffix in {".jpeg", ".png"})
    for path in found:
        with Image.open(path) as picture:
            picture.load()
    return found


def suggested_command(run: Run) -> list[str]:
    """Return the arguments of the command that the last line of stderr suggests."""
    return shlex.split(run.err.splitlines()[-1].partition(": flux2max ")[2])


# ---------------------------------------------------------------------- output


def test_batch(flux2max: Command, service: Service) -> None:
    """A text file becomes a folder with pictures, thumbnails, a gallery, results and a journal."""
    gateway = service()
    run = flux2max("batch", write("a cat", "a dog", "", "# nothing", "an owl"), "--width", "640", "--height", "480")
    rows = results()
    (file,) = rows["a cat"]["files"]

    assert run.code == 0
    assert run.err.splitlines() == [
        "3 pictures: 3 to be submitted, for about $0.21",
        f"3 of 3 pictures in flux2max-prompts; to view them: {Path('flux2max-prompts/index.html')}",
    ]
    assert [cell.strip() for cell in run.out.splitlines()[1].split("┃")[1:-1]] == ["done", "failed"]
    assert re.match(r"│ +3 │ +0 │", run.out.splitlines()[3])
    assert re.fullmatch(r"0:0\d, \d\.\d s and \d\.\d polls a task, \$0\.21 spent", run.out.splitlines()[5])
    assert list(rows) == ["a cat", "a dog", "an owl"]
    assert rows["a cat"] == {
        "key": Path(file).stem,
        "prompt": "a cat",
        "task_id": next(task.id for task in gateway.tasks.values() if task.prompt == "a cat"),
        "state": "completed",
        "cost": "0.07",
        "seconds": rows["a cat"]["seconds"],
        "polls": rows["a cat"]["polls"],
        "files": [file],
        "locations": [str(Path("flux2max-prompts", file))],
        "error": None,
        "params": {"width": 640, "height": 480},
    }
    assert 0 < rows["a cat"]["seconds"] < 30
    assert rows["a cat"]["polls"] >= 1
    assert len(pictures()) == 3
    assert {path.name for path in Path("flux2max-prompts").iterdir() if "journal.db-" not in path.name} == {
        *("journal.db", "results.jsonl", "index.html", "thumbs"),
        *(name for row in rows.values() for name in row["files"]),
    }
    assert all(prompt in Path("flux2max-prompts/index.html").read_text(encoding="utf-8") for prompt in rows)


def test_same_command_again(flux2max: Command, service: Service) -> None:
    """Completed requests are not paid for, downloaded or scaled down again; only a new line is submitted."""
    gateway = service()
    prompts_file = write("a cat", "a dog")
    flux2max("batch", prompts_file, *SMALL)
    before = {path: path.stat().st_mtime_ns for path in Path("flux2max-prompts").glob("**/*.jpeg")}
    again = flux2max("batch", prompts_file, *SMALL)
    calls = Counter(gateway.calls)
    write("an owl", "a dog", "a cat")
    more = flux2max("batch", prompts_file, *SMALL)
    after = {path: path.stat().st_mtime_ns for path in Path("flux2max-prompts").glob("**/*.jpeg")}

    assert (again.code, more.code) == (0, 0)
    assert again.err.startswith("2 pictures: 2 done already\n")
    assert ", $0.00 spent, $0.14 in all runs\n" in again.out
    assert ", $0.07 spent, $0.21 in all runs\n" in more.out
    assert more.err.startswith("3 pictures: 2 done already, 1 to be submitted, for about $0.07\n")
    assert (calls["submit"], calls["download"]) == (2, 2)
    assert set(gateway.accepted.values()) == {1}
    assert gateway.calls["download"] == 3
    assert len(before) == 4
    assert {path: after[path] for path in before} == before
    assert list(results()) == ["an owl", "a dog", "a cat"]


def test_deleted_picture_is_downloaded_again(flux2max: Command, service: Service) -> None:
    """A deleted picture is downloaded again without being paid for, even if the folder was moved."""
    gateway = service()
    prompts_file = write("a cat", "a dog")
    flux2max("batch", prompts_file, *SMALL, "--out", "one")
    Path("one", results("one")["a cat"]["files"][0]).unlink()
    Path("one").rename("two")
    run = flux2max("batch", prompts_file, *SMALL, "--out", "two")

    assert run.code == 0
    assert len(pictures("two")) == 2
    assert (gateway.calls["submit"], gateway.calls["download"]) == (2, 3)


def test_outcomes_as_json(flux2max: Command, service: Service) -> None:
    """With --json, stdout has a line for each outcome and nothing else; messages go to stderr."""
    service()
    run = flux2max("batch", write("a cat", "a dog [fail]"), *SMALL, "--json")
    rows = {row["prompt"]: row for row in map(json.loads, run.out.splitlines())}

    assert run.code == 1
    assert rows == results()
    assert (rows["a cat"]["state"], rows["a dog [fail]"]["state"]) == ("completed", "failed")
    assert "spent" in run.err


def test_standard_input(flux2max: Command, service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """Standard input has one prompt per line, or JSON objects if it begins with one."""
    gateway = service()
    for text in ("a cat\n", '{"prompt": "a dog", "width": 64, "height": 64}\n'):
        read_fd, write_fd = os.pipe()
        with os.fdopen(write_fd, "w") as pipe:
            pipe.write(text)
        with os.fdopen(read_fd) as source, monkeypatch.context() as patch:
            patch.setattr("sys.stdin", source)
            assert flux2max("batch", "-").code == 0

    assert set(gateway.accepted) == {"a cat", "a dog"}
    assert list(results("flux2max-batch")) == ["a dog", "a cat"]


def test_options_for_all_lines(flux2max: Command, script: ScriptedGateway) -> None:
    """Options apply to each line; secrets are sent to the service only, and never written to a file."""
    script.submits[0] = answer(400, {"message": "invalid request"})
    os.environ["FLUX2MAX_WEBHOOK_SECRET"] = "webhook-secret"
    try:
        run = flux2max(
            *("batch", write("a cat"), "--seed", "5", "--format", "png", "--safety-tolerance", "1", "--repeat", "2"),
            *("--webhook-url", "https://app.example/hook", "--extra", "upsampling=true", *SMALL),
            *("-i", "https://pictures.example/1.png"),
        )
    finally:
        del os.environ["FLUX2MAX_WEBHOOK_SECRET"]
    sent = [call.params for call in script.received]
    seen = b"".join(path.read_bytes() for path in Path("flux2max-prompts").iterdir() if path.is_file())

    assert run.code == 1
    assert sent == [
        {
            "prompt": "a cat",
            "input_image": "https://pictures.example/1.png",
            "seed": seed,
            "width": 64,
            "height": 64,
            "safety_tolerance": 1,
            "output_format": "png",
            "webhook_url": "https://app.example/hook",
            "webhook_secret": "webhook-secret",
            "upsampling": True,
        }
        for seed in (5, 6)
    ]
    assert b"webhook-secret" not in seen
    assert script.api_key.encode() not in seen
    assert "webhook-secret" not in run.out + run.err


# ---------------------------------------------------------------------- checks before anything is sent


def test_bad_lines(flux2max: Command, service: Service) -> None:
    """Each bad line is reported with its number, field and reason; nothing is sent without --skip-bad."""
    gateway = service()
    prompts_file = write(
        '{"prompt": "a cat"}', '{"promt": "a dog"}', '{"prompt": "an owl", "width": 10}', name="bad.jsonl"
    )
    run = flux2max("batch", prompts_file, *SMALL[2:])
    calls, files = dict(gateway.calls), [path.name for path in Path().iterdir()]
    skipping = flux2max("batch", prompts_file, *SMALL, "--skip-bad")

    assert (run.code, run.out) == (2, "")
    assert run.err.splitlines() == [
        "bad.jsonl:2: promt: there is no field 'promt': did you mean prompt?",
        "bad.jsonl:3: width: width must be at least 64 pixels, or 0 or None to let the model choose, not 10",
        "flux2max: 2 lines are bad, so nothing was sent; --skip-bad skips bad lines",
    ]
    assert (calls, files) == ({}, ["bad.jsonl"])
    assert skipping.code == 0
    assert set(gateway.accepted) == {"a cat"}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.csv", "promt,seed\na cat,1\na dog,2\n", "1 line is bad, so nothing was sent"),
        ("p.jsonl", '{"seed": 1}\n[]\n', "2 lines are bad, so nothing was sent"),
        ("p.json", "{}", "1 line is bad, so nothing was sent"),
        (
            "p.jsonl",
            '{"seed": 1}\n{"prompt": "a cat"}\n',
            "1 line is bad, so nothing was sent; --skip-bad skips bad lines",
        ),
    ],
)
def test_advice_to_skip_bad_lines(flux2max: Command, service: Service, name: str, text: str, message: str) -> None:
    """--skip-bad is advised only if lines are left then."""
    gateway = service()
    Path(name).write_text(text, encoding="utf-8")
    run = flux2max("batch", name)
    skipping = flux2max("batch", name, "--skip-bad", "--dry-run")

    assert (run.code, run.err.splitlines()[-1]) == (2, f"flux2max: {message}")
    if "--skip-bad" in message:
        assert skipping.code == 0
    else:
        assert skipping.err.splitlines()[-1] == f"flux2max: {name} has no other lines"
    assert not gateway.calls


def test_notes_about_the_file(flux2max: Command, service: Service) -> None:
    """How a file was read is printed before anything is sent."""
    gateway = service()
    Path("prompts.csv").write_bytes("prompt;seed\r\nein Café;7.0\r\n".encode("cp1252"))
    run = flux2max("batch", "prompts.csv", *SMALL)

    assert run.code == 0
    assert run.err.startswith("prompts.csv: not UTF-8; read as Windows-1252: Café\n1 picture: 1 to be submitted")
    assert [(task.prompt, task.seed) for task in gateway.tasks.values()] == [("ein Café", 7)]


def test_key_of_another_request(flux2max: Command, service: Service) -> None:
    """A key that belongs to another request in the journal is reported before anything is sent."""
    gateway = service()
    prompts_file = write('{"prompt": "a cat", "key": "one"}', name="prompts.jsonl")
    flux2max("batch", prompts_file, *SMALL)
    write('{"prompt": "a dog", "key": "one"}', '{"prompt": "an owl", "key": "two"}', name=prompts_file)
    run = flux2max("batch", prompts_file, *SMALL)

    assert run.code == 2
    assert run.err.startswith(
        "prompts.jsonl:1: key: key 'one' belongs to another request in the journal, for 'a cat'\n"
    )
    assert gateway.calls["submit"] == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing.txt"], "can't read 'nothing.txt': No such file"),
        (["."], "can't read '.'"),
        (["prompts.doc"], "'prompts.doc' is not .txt, .jsonl, .json, .csv or .xlsx: specify the format with --as"),
        (["empty.txt"], "empty.txt has no prompts"),
        (["prompts.txt", "--width", "10"], "width must be at least 64"),
        (["prompts.txt", "--budget", "much"], "budget must be an amount of US dollars"),
        (["prompts.txt", "--max-in-flight", "0"], "max_in_flight must be an integer of at least 1"),
        (["prompts.txt", "--extra", "x"], "extra must be like name=value"),
        (["prompts.txt", "--out", "empty.txt"], "'empty.txt' is not a folder"),
        (["prompts.txt", "--key-file", "empty.txt"], "the key file 'empty.txt' is empty"),
        (["prompts.txt", "--key-file", "nothing.txt"], "can't read the key file 'nothing.txt'"),
    ],
)
def test_wrong_usage(flux2max: Command, service: Service, arguments: list[str], message: str) -> None:
    """Wrong usage is reported on one line, with exit code 2, before anything is sent."""
    gateway = service()
    for name in ("prompts.txt", "prompts.doc"):
        write("a cat", name=name)
    write("# nothing", name="empty.txt")
    Path("empty.txt").write_text(" \n" if "--key-file" in arguments else "# nothing\n", encoding="utf-8")
    run = flux2max("batch", *arguments)

    assert (run.code, run.out) == (2, "")
    assert run.err.splitlines()[-1].startswith(f"flux2max: {message}")
    assert not gateway.calls


def test_dry_run(flux2max: Command, service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """A dry run prints what would be sent and the cost, and needs no API key; it sends and writes nothing."""
    gateway = service()
    monkeypatch.delenv("FLUX2MAX_API_KEY")
    prompts_file = write("a cat", "a dog")
    run = flux2max("batch", prompts_file, "--dry-run", "--width", "2048", "--height", "1024", "--seed", "3")
    as_json = flux2max("batch", prompts_file, "--dry-run", "--json", "--extra", f"note={'x' * 200}")
    long = flux2max("batch", prompts_file, "--dry-run", "--extra", f"note={'x' * 200}")

    assert (run.code, as_json.code) == (0, 0)
    assert re.fullmatch(
        r"a-cat-\w{8}: a cat, seed 3, width 2048, height 1024, \$0\.10\na-dog-\w{8}: a dog, .*\n", run.out
    )
    assert run.err == "dry run: 2 pictures: 2 to be submitted, for about $0.20\n"
    first = json.loads(as_json.out.splitlines()[0])
    assert {**first, "key": ""} == {
        "key": "",
        "line": 1,
        "fate": "new",
        "cost": "0.07",
        "params": {"prompt": "a cat", "extra": {"note": "x" * 200}},
    }
    assert all(len(line) < 200 for line in long.out.splitlines())
    assert not gateway.calls
    assert [path.name for path in Path().iterdir()] == [prompts_file]


def test_dry_run_reads_the_journal(flux2max: Command, service: Service) -> None:
    """A dry run omits completed requests, and estimates costs from what they cost."""
    service()
    prompts_file = write("a cat", "a dog [fail]")
    flux2max("batch", prompts_file, "--width", "2048", "--height", "1024")
    write("a cat", "a dog [fail]", "an owl", name=prompts_file)
    options = ("batch", prompts_file, "--width", "2048", "--height", "1024", "--dry-run")
    run = flux2max(*options, "--budget", "0.15")
    retrying = flux2max(*options, "--json", "--retry-failed")
    actions = {row["params"]["prompt"]: row["fate"] for row in map(json.loads, retrying.out.splitlines())}

    assert run.err == (
        "dry run: 3 pictures: 1 done already, 1 failed earlier (--retry-failed tries again), 1 to be submitted, "
        "for about $0.10; the budget leaves $0.05, which isn't enough for all\n"
    )
    assert run.out.startswith("an-owl-")
    assert actions == {"a cat": "done", "a dog [fail]": "again", "an owl": "new"}


# ---------------------------------------------------------------------- failures


def test_failures_are_grouped(flux2max: Command, service: Service) -> None:
    """Failures are grouped by reason, with one example each; the last line is the command that retries them."""
    gateway = service()
    run = flux2max("batch", write("a [fail]", "b [moderate]", "c [fail]", "d", "e [fail]"), *SMALL)
    again = flux2max(*suggested_command(run))
    groups = [line for line in run.out.splitlines() if " failed: " in line]

    assert run.code == 1
    assert len(groups) == 2
    assert re.fullmatch(r"3 failed: the model gave up, e.g. a-fail-\w{8} \(a \[fail\]\)", groups[0])
    assert re.fullmatch(r"1 failed: Request Moderated, e.g. b-moderate-\w{8} \(b \[moderate\]\)", groups[1])
    assert run.err.splitlines()[-1] == (
        "to submit the 4 failed again: flux2max batch prompts.txt --width 64 --height 64 --retry-failed"
    )
    assert again.code == 1
    assert gateway.accepted == {"a [fail]": 2, "b [moderate]": 2, "c [fail]": 2, "d": 1, "e [fail]": 2}
    assert suggested_command(again) == suggested_command(run)


def test_exhausted_budget(flux2max: Command, service: Service) -> None:
    """An exhausted budget stops the batch; the suggested command has a budget that is enough for the rest."""
    gateway = service(max_in_flight=2)
    prompts = [f"picture {number}" for number in range(6)]
    run = flux2max("batch", write(*prompts), *SMALL, "--budget", "0.30", "--max-in-flight", "2")
    stopped, paid = states(), gateway.accepted.total()
    more = flux2max(*suggested_command(run))

    assert run.code == 1
    assert (paid, Counter(stopped.values())) == (4, {"completed": 4, "waiting": 2})
    assert "flux2max: stopped: the budget of $0.30 doesn't allow another image" in run.err
    assert run.err.splitlines()[-1] == (
        "to go on, with a budget for the other 2: "
        "flux2max batch prompts.txt --width 64 --height 64 --max-in-flight 2 --budget 0.42"
    )
    assert more.code == 0
    assert set(gateway.accepted.values()) == {1}
    assert len(pictures()) == 6


@pytest.mark.parametrize("source", ["--budget=0.07", "FLUX2MAX_BUDGET"])
def test_source_of_the_budget(
    flux2max: Command, service: Service, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    """The suggested command replaces the budget, and includes options that were set in the environment."""
    service()
    from_environment = source.startswith("FLUX")
    with monkeypatch.context() as patch:
        if from_environment:
            patch.setenv(source, "0.07")
            patch.setenv("FLUX2MAX_WIDTH", "64")
        arguments = ["--height", "64"] if from_environment else [*SMALL, source]
        run = flux2max("batch", write("a cat", "a dog"), *arguments)

    assert suggested_command(run) == (
        ["batch", "--width", "64", "prompts.txt", "--height", "64", "--budget", "0.14"]
        if from_environment
        else ["batch", "prompts.txt", *SMALL, "--budget", "0.14"]
    )
    assert flux2max(*suggested_command(run)).code == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"balance": Decimal("0.15")}, "stopped: insufficient balance (HTTP 402, code 40201"),
        ({"api_key": "another"}, "stopped: the API key is missing or wrong (HTTP 401"),
    ],
)
def test_errors_that_stop_the_batch(flux2max: Command, service: Service, options: dict[str, Any], message: str) -> None:
    """An empty balance or a wrong API key stops the batch: what is paid for is saved, and the rest stays waiting."""
    gateway = service(**options)
    run = flux2max("batch", write(*(f"picture {number}" for number in range(8))), *SMALL, "--max-in-flight", "1")
    counts = Counter(states().values())

    assert run.code == 1
    assert f"flux2max: {message}" in run.err
    assert KEY not in run.out + run.err
    assert re.match(r"to go on, (once .*|with another key): flux2max batch prompts.txt ", run.err.splitlines()[-1])
    assert counts["completed"] == gateway.accepted.total() == len(pictures())
    assert counts["waiting"] + counts["refused"] == 8 - counts["completed"]
    assert counts["waiting"] >= 5


def test_uncertain_submit(flux2max: Command, service: Service) -> None:
    """A submit whose response was lost is uncertain; only --resubmit-uncertain submits it again."""
    gateway = service()
    gateway.script("submit", Fault.RESET_AFTER)
    prompts_file = write("a cat")
    run = flux2max("batch", prompts_file, *SMALL)
    again = flux2max("batch", prompts_file, *SMALL)
    journal = flux2max("journal", "show", "flux2max-prompts")
    paid = gateway.accepted["a cat"]
    resubmitted = flux2max(*suggested_command(again))

    assert (run.code, again.code, resubmitted.code) == (1, 1, 0)
    assert again.err.startswith("1 picture: 1 uncertain (--resubmit-uncertain may pay twice)\n")
    assert "1 uncertain: " in again.out
    assert suggested_command(again)[-1] == "--resubmit-uncertain"
    assert re.search(
        r"^uncertain: \d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC a-cat-\w{8} \(a cat\)$", journal.out, re.MULTILINE
    )
    assert paid == 1
    assert states() == {"a cat": "completed"}


def test_wrong_base_url(flux2max: Command, script: ScriptedGateway) -> None:
    """A server that is not the API stops the batch at once, and the next command says what to correct."""
    script.submits = deque([answer(404, b"<html>nothing here</html>")])
    run = flux2max("batch", write("a cat", "a dog", "a fox"), "--max-in-flight", "1")

    assert run.code == 1
    assert len(script.received) == 1
    assert f"base_url '{script.url}' is wrong: no such API is there" in run.err
    assert "with the right FLUX2MAX_BASE_URL" in run.err


def test_refused_request(flux2max: Command, script: ScriptedGateway) -> None:
    """A refused request is reported and costs nothing; the next run submits it again."""
    script.submits = deque([answer(400, {"message": "no such \x1b[2Jsize 64"}), answer(200, running("t1"))])
    script.polls[0] = answer(200, completed("t1", f"{script.url}/0.jpeg"))
    script.downloads[0] = answer(200, b"\xff\xd8\xff, and nothing that can be decoded")
    prompts_file = write("a cat")
    run = flux2max("batch", prompts_file)
    refused = states()
    again = flux2max(*suggested_command(run))

    assert run.code == 1
    assert refused == {"a cat": "refused"}
    assert "1 refused: no such [2Jsize 64" in run.out
    assert again.code == 0
    assert states() == {"a cat": "completed"}
    # Without a thumbnail, the gallery shows the file itself.
    assert re.search(
        r'"thumbnail":"a-cat-\w{8}\.jpeg"', Path("flux2max-prompts/index.html").read_text(encoding="utf-8")
    )


def test_refused_request_that_was_corrected(flux2max: Command, script: ScriptedGateway) -> None:
    """A refused request whose line was changed disappears from the results."""
    script.submits[0] = answer(400, {"message": "no"})
    prompts_file = write("a kat")
    flux2max("batch", prompts_file)
    write("a cat", name=prompts_file)
    flux2max("batch", prompts_file)

    assert states() == {"a cat": "refused"}


def test_task_timeout(flux2max: Command, service: Service) -> None:
    """After its timeout, a task is still running: its ID is reported, and the next run resumes it first."""
    gateway = service(seconds=5.0)
    run = flux2max("batch", write("a cat"), *SMALL, "--task-timeout", "2")  # enough for the submit on a busy machine
    (task_id,) = gateway.tasks
    rows = results()["a cat"]
    journal = flux2max("journal", "show", "flux2max-prompts")
    more = flux2max("batch", write("a dog", "a cat"), *SMALL)

    assert run.code == 1
    assert (rows["state"], rows["task_id"]) == ("submitted", task_id)
    assert task_id in rows["error"]
    assert f"running: {task_id} " in journal.out
    assert more.err.startswith("2 pictures: 1 running, 1 to be submitted")
    assert more.code == 0
    assert set(gateway.accepted.values()) == {1}


def test_unsaved_picture(flux2max: Command, service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """A picture that couldn't be saved is reported, and the next run downloads it without paying again."""
    monkeypatch.setattr(retries, "RETRY_WINDOW", 0.1)
    gateway = service(url_lifetime=-1.0)
    prompts_file = write("a cat")
    run = flux2max("batch", prompts_file, *SMALL)
    rows = results()["a cat"]
    again = flux2max("batch", prompts_file, *SMALL)

    assert (run.code, again.code) == (1, 1)
    assert (rows["state"], rows["files"]) == ("completed", [])
    assert "expired" in rows["error"]
    assert "1 unsaved: " in run.out
    assert gateway.accepted["a cat"] == 1


def test_gallery_write_error(flux2max: Command, service: Service) -> None:
    """If the gallery can't be written, pictures are still saved; it is reported once during the run and once after it."""
    service()
    Path("flux2max-prompts/index.html").mkdir(parents=True)
    run = flux2max("batch", write("a cat"), *SMALL)
    gallery = flux2max("gallery", "flux2max-prompts")

    assert len(pictures()) == 1
    assert run.err.count("flux2max: can't write index.html: Is a directory") == 2
    assert gallery.code == 1


def test_damaged_journal(flux2max: Command, service: Service) -> None:
    """Nothing is sent if the journal is damaged."""
    gateway = service()
    Path("flux2max-prompts").mkdir()
    Path("flux2max-prompts/journal.db").write_text("not a SQLite database, and longer than its header. " * 9)
    run = flux2max("batch", write("a cat"))

    assert run.code == 1
    assert run.err.splitlines()[-1].startswith("flux2max: the journal flux2max-prompts/journal.db is damaged")
    assert not gateway.calls


def test_suggested_command_repeats_all_arguments(flux2max: Command, service: Service) -> None:
    """The suggested command has all arguments of the original one, quoted for the shell."""
    service()
    prompts_file = write("seed,key", "1,one", "2,two", name="my  prompts.csv")
    options = ("--prompt", "a 'cat'\tand\n  \"mouse\"", "--out=of  it", "--budget", "0.07", "--retry-failed")
    run = flux2max("batch", *options, *SMALL, "--", prompts_file)
    lines = run.err.partition("to go on, with a budget for the other 1: flux2max ")[2]
    again = shlex.split(lines)

    assert again == ["batch", *options[:3], *SMALL, "--budget", "0.14", "--", prompts_file]
    assert flux2max(*again).code == 0
    assert len(pictures("of  it")) == 2


def test_suggested_command_without_retry_failed(flux2max: Command, service: Service) -> None:
    """Failed requests are submitted last, and the suggested command doesn't contain --retry-failed again."""
    gateway = service(max_in_flight=1)
    prompts_file = write("a [fail]", "b", "c", "d")
    flux2max("batch", prompts_file, *SMALL, "--budget", "0.07", "--max-in-flight", "1")
    run = flux2max("batch", prompts_file, *SMALL, "--budget", "0.14", "--max-in-flight", "1", "--retry-failed")
    again = flux2max(*suggested_command(run))

    assert "1 failed, to be submitted again" in run.err
    assert "--retry-failed" not in suggested_command(run)
    assert again.code == 1
    assert gateway.accepted == {"a [fail]": 1, "b": 1, "c": 1, "d": 1}


def test_suggested_budget_is_enough(flux2max: Command, service: Service) -> None:
    """The suggested budget covers pictures of all sizes; the estimate is what pictures of the same size have cost."""
    gateway = service(max_in_flight=1)
    sizes = [{"width": 2048, "height": 2048}, *({"width": 64, "height": 64} for _ in range(5))]
    prompts_file = write(
        *(json.dumps({"prompt": f"{n}", **size}) for n, size in enumerate(sizes)), name="prompts.jsonl"
    )
    run = flux2max("batch", prompts_file, "--budget", "0.20", "--max-in-flight", "1")
    dry = flux2max("batch", prompts_file, "--dry-run")
    more = flux2max(*suggested_command(run))

    assert run.code == 1
    assert dry.err.endswith("5 to be submitted, for about $0.35\n")
    assert more.code == 0
    assert gateway.accepted.total() == 6


def test_tasks_of_removed_lines(flux2max: Command, service: Service) -> None:
    """Tasks of removed lines are resumed; if the request can't be built again, the task's ID is reported."""
    gateway = service(seconds=1.5)
    for name in ("small.png", "other.png"):
        Image.new("RGB", (64, 64)).save(name)
    lines = [
        '{"prompt": "a cat", "seed": 1}',
        '{"prompt": "a dog", "input_images": ["small.png"]}',
        '{"prompt": "a fox", "input_images": ["other.png"]}',
        '{"prompt": "an owl"}',
    ]
    prompts_file = write(*lines, name="prompts.jsonl")
    flux2max("batch", prompts_file, *SMALL, "--task-timeout", "0.3")
    ids = {task.prompt: task.id for task in gateway.tasks.values()}
    Image.new("RGB", (32, 32)).save("small.png")
    Path("other.png").unlink()
    write('{"prompt": "a lion"}', name=prompts_file)
    run = flux2max("batch", prompts_file, *SMALL)
    state_by_prompt = states()

    assert run.code == 0
    assert "3 pictures: 2 running, 1 to be submitted" in run.err
    assert "2 of them: no longer in prompts.jsonl, but already paid for" in run.err
    assert f"; to save its picture: flux2max download {ids['a dog']}" in run.err
    assert f"; to save its picture: flux2max download {ids['a fox']}" in run.err
    assert Counter(state_by_prompt.values()) == {"completed": 3, "submitted": 2}
    assert len(pictures()) == 3
    assert set(gateway.accepted.values()) == {1}


def replace_journal(folder: Path, copy: Path | None) -> None:
    for path in folder.glob("journal.db*"):
        path.unlink()
    if copy is not None:
        shutil.copy(copy, folder / "journal.db")


@pytest.mark.parametrize("options", [(), ("--yes",), ("--yes", "--retry-failed"), ("--yes", "--json")])
@pytest.mark.parametrize("damage", ["deleted", "empty", "older"])
def test_lost_journal(flux2max: Command, service: Service, damage: str, options: tuple[str, ...]) -> None:
    """What results.jsonl has as paid for and the journal lacks is named, and paid for again only with consent."""
    gateway = service()
    folder = Path("flux2max-prompts")
    copy: Path | None = None
    if damage == "older":
        flux2max("batch", write("a cat"), *SMALL)
        copy = Path(shutil.copy(folder / "journal.db", "older.db"))
    if damage == "empty":
        Path("empty.db").touch()
        copy = Path("empty.db")
    prompts_file = write("a cat", *(f"dog {number}" for number in range(4)))
    flux2max("batch", prompts_file, *SMALL)
    before = results()
    lost = 4 if damage == "older" else 5
    replace_journal(folder, copy)
    dry = flux2max("batch", prompts_file, *SMALL, *options, "--dry-run")
    runs = [flux2max("batch", prompts_file, *SMALL, *options) for _ in range(2)]
    paid, kept = dict(gateway.accepted), results()
    write("a cat", *(f"dog {number}" for number in range(4)), "a fox")
    more = flux2max("batch", prompts_file, *SMALL, *options)
    paid_with_a_fox = dict(gateway.accepted)
    consented = flux2max("batch", prompts_file, *SMALL, *options, "--resubmit-uncertain")

    for run in (dry, *runs, more):
        assert run.code == 0
        assert re.search(
            r"flux2max: \S+journal\.db was lost or replaced, or pruned: it lacks "
            rf"{lost} pictures that results\.jsonl has as paid for, so they are not submitted: (\S+, ){{3}}…; "
            r"put the right journal\.db and journal\.db-wal back, or pay for them again with --resubmit-uncertain\n",
            run.err,
        )
        assert f"{lost} paid for and not in the journal" in run.err
    assert set(paid.values()) == {1}
    assert kept == before
    assert paid_with_a_fox == {**paid, "a fox": 1}
    assert consented.code == 0
    assert "was lost" not in consented.err
    assert sum(gateway.accepted.values()) == 6 + lost
    assert set(states().values()) == {"completed"}


def journal_entry(state: str, task_id: str | None) -> JournalEntry:
    return JournalEntry(key="k", fingerprint="f", request={}, state=EntryState(state), task_id=task_id)


@pytest.mark.parametrize(
    ("row", "entry", "lost"),
    [
        *((("completed", "t1"), entry, True) for entry in (None, ("refused", None), ("failed", "t0"))),
        *((("submitted", "t1"), entry, True) for entry in (None, ("refused", None))),
        *((("uncertain", "t1"), entry, True) for entry in (None, ("refused", None), ("failed", "t0"))),
        *(((state, None), None, True) for state in ("intent", "uncertain", "failed", "of a newer version")),
        *(((state, None), None, False) for state in ("waiting", "refused")),
        # These rows are older than the entries.
        *(((state, "t1"), ("failed", "t1"), False) for state in ("submitted", "failed")),
        *(((state, None), ("failed", "t1"), False) for state in ("waiting", "refused", "intent", "uncertain")),
        *(((state, None), ("refused", None), False) for state in ("waiting", "refused", "intent", "uncertain")),
        (("failed", "t1"), ("refused", None), False),
        # The journal knows these, and nothing is submitted again without consent.
        *(
            (("completed", "t1"), entry, False)
            for entry in (("completed", "t1"), ("submitted", "t1"), ("intent", None), ("uncertain", None))
        ),
    ],
)
def test_what_is_lost_from_the_journal(
    row: tuple[str, str | None], entry: tuple[str, str | None] | None, lost: bool
) -> None:
    """A request is lost if its row shows a task, and the journal's entry would have it submitted again."""
    state, task_id = row

    assert is_lost(Row("k", "a cat", state=state, task_id=task_id), entry and journal_entry(*entry)) is lost


@pytest.mark.parametrize(
    ("state", "task_id", "reason"),
    [("submitted", "t1", "flux2max download t1 may"), ("intent", None, "flux2max download TASK_ID may")],
)
def test_lost_unfinished_request(
    flux2max: Command, service: Service, state: str, task_id: str | None, reason: str
) -> None:
    """A task without a picture that only results.jsonl knows is shown as uncertain, by all commands."""
    gateway = service()
    flux2max("batch", write("a cat"), *SMALL)
    path = Path("flux2max-prompts/results.jsonl")
    row = {**results()["a cat"], "state": state, "task_id": task_id, "files": []}
    path.write_text(json.dumps(row), encoding="utf-8")
    replace_journal(path.parent, None)
    run = flux2max("batch", "prompts.txt", *SMALL)
    rows = [results()["a cat"]]
    flux2max("gallery", "flux2max-prompts")
    rows.append(results()["a cat"])

    assert run.code == 1
    assert "so they are not submitted: a-cat-" in run.err
    assert suggested_command(run)[-1] == "--resubmit-uncertain"
    for row in rows:
        assert (row["state"], row["task_id"]) == ("uncertain", task_id)
        assert reason in row["error"]
    assert gateway.accepted == {"a cat": 1}


@pytest.mark.parametrize(("outcome", "state"), [("", "completed"), (" [fail]", "failed")])
def test_outcome_of_a_lost_request(flux2max: Command, script: ScriptedGateway, outcome: str, state: str) -> None:
    """What is paid for again has its new outcome; if it is refused, it stays what it was."""
    service_error = answer(400, {"message": "refused"})
    ended = completed("t2", f"{script.url}/0.jpeg") if not outcome else completed("t2", status="failed", output=[])
    script.submits = deque([service_error, answer(200, running("t2"))])
    script.polls[0] = answer(200, ended)
    script.downloads[0] = answer(200, jpeg())
    folder = Path("flux2max-prompts")
    folder.mkdir()
    dry = flux2max("batch", write("a cat"), "--dry-run", "--json")
    key = json.loads(dry.out)["key"]
    known = {"key": key, "prompt": "a cat", "task_id": "t1", "state": "submitted", "cost": "0.07", "seconds": 1}
    (folder / "results.jsonl").write_text(
        json.dumps({**known, "polls": 1, "files": [], "error": None, "params": {}}), encoding="utf-8"
    )
    flux2max("batch", "prompts.txt", "--resubmit-uncertain")
    refused = results()["a cat"]
    held = flux2max("batch", "prompts.txt")
    flux2max("batch", "prompts.txt", "--resubmit-uncertain")
    ended_row = results()["a cat"]

    assert (refused["state"], refused["task_id"]) == ("uncertain", "t1")
    assert "was lost or replaced" in held.err
    assert (ended_row["state"], ended_row["task_id"]) == (state, "t2")
    assert len(script.of("POST")) == 2


def test_requests_wait_after_a_wrong_api_key(flux2max: Command, service: Service) -> None:
    """Requests that were rejected because of a wrong API key are waiting, not refused."""
    service(api_key="another")
    flux2max("batch", write("a cat", "a dog"), *SMALL)

    assert states() == {"a cat": "waiting", "a dog": "waiting"}
    assert '"state":"refused"' not in Path("flux2max-prompts/index.html").read_text(encoding="utf-8")


def test_settings_are_checked_before_the_plan(flux2max: Command, service: Service) -> None:
    """Invalid settings are reported before the confirmation, and before the folder is created."""
    service()
    run = flux2max("batch", write("a cat"), "--base-url", "http://gateway.example")

    assert run.code == 2
    assert run.err.splitlines()[0].startswith("flux2max: base_url must be https")
    assert not Path("flux2max-prompts").exists()


def test_partial_files_of_killed_processes(flux2max: Command, service: Service) -> None:
    """Partial files of a killed process are removed once they are old; other files are kept."""
    service()
    Path("flux2max-prompts/thumbs").mkdir(parents=True)
    old, new = f".flux2max-{'0' * 16}.part", f".flux2max-{'1' * 16}.part"
    names = (old, f"thumbs/{old}", new, ".flux2max-key", "notes/.flux2max-0123456789abcdef.part")
    parts = [Path("flux2max-prompts", name) for name in names]
    for part in parts:
        part.parent.mkdir(exist_ok=True)
        part.touch()
        if part.name != new:
            os.utime(part, (1.0, 1.0))
    flux2max("batch", write("a cat"), *SMALL)

    assert [part.exists() for part in parts] == [False, False, True, True, True]


@pytest.mark.parametrize("out", ["x" * 300, "file/pictures"])
def test_folder_that_cannot_be_created(flux2max: Command, service: Service, out: str) -> None:
    """A folder that can't be created, or whose name is too long, is reported on one line."""
    gateway = service()
    write("nothing", name="file")
    run = flux2max("batch", write("a cat"), "--out", out)

    assert run.code == 2
    assert re.search(r"flux2max: can't (create|read) the folder '", run.err)
    assert not gateway.calls


def damage_journal(folder: Path, *prompts: str) -> None:
    """Damage the entries of some prompts."""
    with contextlib.closing(sqlite3.connect(folder / "journal.db")) as connection, connection:
        for prompt in prompts:
            name = prompt.replace(" ", "-")
            connection.execute("UPDATE entries SET request = '{' WHERE key LIKE ? || '%'", (name,))


@pytest.mark.parametrize("options", [(), ("--yes", "--retry-failed"), ("--yes", "--json")])
@pytest.mark.parametrize("with_results", [True, False])
def test_damaged_entries(flux2max: Command, service: Service, options: tuple[str, ...], with_results: bool) -> None:
    """Requests whose entries are damaged are named, and paid for again only with consent; the others go on."""
    gateway = service()
    folder = Path("flux2max-prompts")
    flux2max("batch", write("a cat", "a dog", "an owl"), *SMALL)
    damage_journal(folder, "a cat", "a dog")
    if not with_results:
        (folder / "results.jsonl").unlink()
    next(folder.glob("a-cat*.jpeg")).unlink()
    prompts_file = write("a cat", "a dog", "an owl", "a fox")
    run = flux2max("batch", prompts_file, *SMALL, *options)
    shown, paid = results(), dict(gateway.accepted)
    consented = flux2max("batch", prompts_file, *SMALL, *options, "--resubmit-uncertain")
    after = states()
    again = flux2max("batch", prompts_file, *SMALL, *options)

    assert re.search(
        r"flux2max: \S+journal\.db is damaged where it has 2 pictures, which may be paid for and are not submitted: "
        r"a-cat-\w+, a-dog-\w+; put a backup of journal\.db back, or pay for them again with --resubmit-uncertain\n",
        run.err,
    )
    assert "lost or replaced" not in run.err
    assert run.code == 1
    assert suggested_command(run)[-1] == "--resubmit-uncertain"
    assert paid == dict.fromkeys(("a cat", "a dog", "an owl", "a fox"), 1)
    assert {prompt: row["state"] for prompt, row in shown.items()} == {
        "a cat": "uncertain", "a dog": "completed" if with_results else "uncertain", "an owl": "completed",
        "a fox": "completed",
    }  # fmt: skip
    assert "the entry of 'a-cat-" in shown["a cat"]["error"]
    assert "is damaged" in shown["a cat"]["error"]
    for finished in (consented, again):
        assert finished.code == 0
        assert "is damaged" not in finished.err
    assert dict(gateway.accepted) == {**paid, "a cat": 2, "a dog": 2}
    assert set(after.values()) == {"completed"}


def test_entries_damaged_during_the_run(flux2max: Command, service: Service) -> None:
    """A request whose entry is damaged when it is looked up is an uncertain one, and stops no other."""
    service()
    flux2max("batch", write("a cat", "an owl"), *SMALL)
    keys = [row["key"] for row in results().values()]
    damaged = flux.Failed(
        task_id=None,
        request=flux.GenerationRequest("a cat", key=keys[0]),
        error=flux.JournalError("damaged", key=keys[0]),
        elapsed=0.0,
        polls=0,
    )

    assert state_after_failure(damaged) == "uncertain"
    assert is_final(damaged)


# ---------------------------------------------------------------------- journal and gallery


@pytest.mark.parametrize(
    "command", [("journal", "show"), ("journal", "prune", "--older-than", "30d"), ("gallery",)], ids=" ".join
)
def test_folder_without_journal(flux2max: Command, command: tuple[str, ...]) -> None:
    """A folder without a journal is not the output folder of a batch."""
    Path("empty").mkdir()
    run = flux2max(*command, "empty")

    assert (run.code, run.out) == (2, "")
    assert run.err == "flux2max: there is no journal.db in 'empty': it is not the output folder of a batch\n"


def test_journal(flux2max: Command, service: Service) -> None:
    """`flux2max journal show` prints counts and costs in 80 columns, or each entry as JSON."""
    service()
    flux2max("batch", write("a cat", "a dog [fail]"), *SMALL)
    run = flux2max("journal", "show", "flux2max-prompts")
    assert flux2max("journal", "show", "flux2max-prompts/journal.db") == run
    as_json = flux2max("journal", "show", "flux2max-prompts", "--json")

    assert run.code == 0
    assert re.match(r"│ +2 │ +1 │ +1 │ +0 │ +0 │ +\$0\.07 │ +\$0\.00 │", run.out.splitlines()[3])
    assert [json.loads(line)["request"]["prompt"] for line in as_json.out.splitlines()] == ["a cat", "a dog [fail]"]


@pytest.mark.parametrize("count", [1, 2])
def test_damaged_entries_are_reported(flux2max: Command, service: Service, count: int) -> None:
    """`flux2max journal show` and `gallery` go on past damaged entries, and name them; `journal` fails at its end."""
    service()
    prompts = ("a cat", "a dog", "an owl")
    flux2max("batch", write(*prompts), *SMALL)
    folder = Path("flux2max-prompts")
    damage_journal(folder, *prompts[:count])
    runs = [flux2max("journal", "show", "flux2max-prompts", *options) for options in ((), ("--json",))]
    (folder / "results.jsonl").unlink()
    gallery = flux2max("gallery", "flux2max-prompts")
    number = "an entry is" if count == 1 else "2 entries are"

    for run in runs:
        assert run.code == 1
        assert run.err.count("is damaged: JSONDecodeError") == count
        assert "the entry of 'a-cat-" in run.err
        assert run.err.endswith(f"flux2max: {number} damaged, and left out above\n")
    left = str(3 - count)
    assert re.match(rf"│ +{left} │ +{left} │ +0 │ +0 │ +0 │", runs[0].out.splitlines()[3])
    shown = [json.loads(line)["request"]["prompt"] for line in runs[1].out.splitlines()]
    assert shown == list(prompts[count:])
    assert gallery.code == 0
    assert gallery.err.count("is damaged") == count
    lines = (folder / "results.jsonl").read_text(encoding="utf-8").splitlines()
    assert Counter(json.loads(line)["state"] for line in lines) == {"completed": 3 - count, "uncertain": count}


def test_old_form_of_journal(flux2max: Command) -> None:
    """`flux2max journal DIR`, as it was once, names the command that it has become."""
    Path("pictures").mkdir()
    run = flux2max("journal", "pictures")

    assert (run.code, run.out) == (2, "")
    assert run.err.endswith("Error: 'pictures' is not a subcommand; to show a journal: flux2max journal show PATH\n")


@pytest.mark.parametrize("path", ["flux2max-prompts", "flux2max-prompts/journal.db"])
def test_journal_is_pruned(flux2max: Command, service: Service, path: str) -> None:
    """`flux2max journal prune` forgets old requests that have ended; the batch's results still show them as paid."""
    gateway = service()
    batch = ("batch", write("a cat"), *SMALL)
    flux2max(*batch)
    kept = flux2max("journal", "prune", path, "--older-than", "1h")
    counts = flux2max("journal", "show", path).out.splitlines()[3]
    pruned = flux2max("journal", "prune", path, "--older-than", "0s")
    again = flux2max(*batch)

    assert (kept.code, kept.err) == (0, "0 entries forgotten: flux2max-prompts/journal.db\n")
    assert (pruned.code, pruned.err) == (0, "1 entry forgotten: flux2max-prompts/journal.db\n")
    assert re.match(r"│ +1 │ +1 │ +0 │", counts)
    assert (again.code, gateway.accepted["a cat"]) == (0, 1)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("45s", 45), ("90m", 5400), ("12h", 43_200), ("30d", 2_592_000), (" 1.5h ", 5400), ("0d", 0)],
)
def test_parse_duration(text: str, seconds: float) -> None:
    """A duration is a number with a unit."""
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "30", "d", "-1d", "1w", "1 d", "1d2h", "1e5s", "infs", "nand", "٣d", "1D"])
def test_invalid_duration(flux2max: Command, text: str) -> None:
    """Anything else is an error that shows how durations are written."""
    Path("pictures").mkdir()
    run = flux2max("journal", "prune", "pictures", f"--older-than={text}")

    assert run == Run(2, "", f"flux2max: --older-than must be a time such as 30d, 12h, 90m or 45s, not {text!r}\n")


def test_refusals_are_counted(flux2max: Command, script: ScriptedGateway) -> None:
    """The journal's counts include refused requests."""
    script.submits[0] = answer(400, {"message": "no"})
    flux2max("batch", write("a cat"))
    run = flux2max("journal", "show", "flux2max-prompts")

    assert "refused" in run.out
    assert re.match(r"│ +1 │ +0 │ +0 │ +1 │ +0 │ +0 │ +\$0\.00 │ +\$0\.00 │", run.out.splitlines()[3])


def test_gallery_is_rebuilt(flux2max: Command, service: Service) -> None:
    """Gallery, results and thumbnails are rebuilt from the journal; waiting requests come from the results."""
    service()
    flux2max("batch", write("a cat", "a dog"), *SMALL, "--budget", "0.07")
    before = results()
    page = Path("flux2max-prompts/index.html")
    page.unlink()
    for path in Path("flux2max-prompts/thumbs").iterdir():
        path.unlink()
    run = flux2max("gallery", "flux2max-prompts")
    rebuilt = results()
    Path("flux2max-prompts/results.jsonl").write_text('not JSON\n{"key": 1}\n[]\n')
    flux2max("gallery", "flux2max-prompts")

    assert (run.code, run.out) == (0, f"{page}\n")
    assert rebuilt == before
    assert set(states().values()) == {"completed"}
    assert page.exists()
    assert len(list(Path("flux2max-prompts/thumbs").iterdir())) == 1


# ---------------------------------------------------------------------- on a terminal


def test_live_display(on_terminal: Command, service: Service) -> None:
    """The display has a bar, counts, rates, the newest warning and failures; no line is wider than the terminal."""
    gateway = service(seconds=1.0)
    gateway.script("submit", Fault.UNAVAILABLE)
    prompts = [f"picture {number} {'[fail]' if number == 3 else ''} {'of many words ' * 9}" for number in range(12)]
    run = on_terminal("batch", write(*prompts), *SMALL, "--max-in-flight", "6", "--budget", "1", "--yes")
    shown = run.out.partition("┏")[0]
    lines = visible_lines(shown)

    assert run.code == 1
    assert any(re.fullmatch(r"[━╺╸ ]+ 0 of 12 +0:0\d ?", line) for line in lines)
    assert "0 done, 0 failed, 6 in flight, 6 waiting" in lines
    assert any(
        re.fullmatch(r"\d+ a minute, 0:\d\d left, \$0\.\d\d of \$1\.00 spent, \d\.\d polls a task", line)
        for line in lines
    )
    assert any(line.startswith("submit not accepted") for line in lines)
    assert any(re.fullmatch(r"failed picture-3-fail-[a-z-]+…: the model gave up", line) for line in lines)
    assert all(len(line) <= 80 for line in lines)
    assert run.out.count("\x1b[?25l") == run.out.count("\x1b[?25h") == 1
    assert "\x1b[2J" not in run.out


def test_outcomes_as_json_on_a_terminal(on_terminal: Command, service: Service) -> None:
    """If stdout and stderr are the same terminal, each outcome is printed above the display, complete."""
    service(seconds=0.5)
    run = on_terminal("batch", write("a cat", "a dog"), *SMALL, "--json", "--yes")
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|[\r\n]", "", run.out)

    assert run.code == 0
    for name in ("a cat", "a dog"):
        assert re.search(rf'{{"key": "{name.replace(" ", "-")}-\w{{8}}", "prompt": "{name}".*?"height": 64}}}}', shown)


def with_typed_answers(monkeypatch: pytest.MonkeyPatch, on_terminal: Command, *answers: str) -> Callable[..., Run]:
    """Return a function that runs a command on a terminal and types the answers to its questions."""
    pty = pytest.importorskip("pty", reason="this platform has no pseudo terminals")

    def run(*arguments: str) -> Run:
        master, slave = pty.openpty()
        os.write(master, "".join(f"{text}\n" for text in answers).encode())
        with os.fdopen(slave, closefd=False) as keyboard, monkeypatch.context() as patch:
            patch.setattr("sys.stdin", keyboard)
            done = on_terminal(*arguments)
        os.close(master)
        os.close(slave)
        return done

    return run


@pytest.mark.parametrize(("typed", "code", "paid"), [("y", 0, 1), ("n", 1, 0), ("", 1, 0)])
def test_confirmation(
    on_terminal: Command, service: Service, monkeypatch: pytest.MonkeyPatch, typed: str, code: int, paid: int
) -> None:
    """On a terminal, the cost is printed and must be confirmed; otherwise nothing is sent."""
    gateway = service()
    run = with_typed_answers(monkeypatch, on_terminal, typed)("batch", write("a cat"), *SMALL)

    assert "1 picture: 1 to be submitted, for about $0.07" in run.out
    assert "Go on? [y/N]:" in run.out
    assert (run.code, gateway.calls["submit"]) == (code, paid)


def test_no_confirmation_if_stdin_is_the_requests_file(
    on_terminal: Command, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the requests are read from stdin, nobody can confirm there: --yes is required."""
    gateway = service()
    read_fd, write_fd = os.pipe()
    with os.fdopen(write_fd, "w") as pipe:
        pipe.write("a cat\n")
    with os.fdopen(read_fd) as source, monkeypatch.context() as patch:
        patch.setattr("sys.stdin", source)
        run = on_terminal("batch", "-", *SMALL)

    assert run.code == 2
    assert "can't ask for confirmation" in run.out
    assert not gateway.calls


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this platform has no named pipes")
def test_named_pipe_needs_an_output_folder(flux2max: Command, service: Service) -> None:
    """Shells name pipes differently each time, and requests in a new folder would be paid for again: --out is required."""
    gateway = service()
    for arguments, code in (([], 2), (["--out", "pictures"], 0)):
        os.mkfifo("pipe")
        writer = threading.Thread(target=Path("pipe").write_text, args=("a cat\n",))
        writer.start()
        run = flux2max("batch", "pipe", "--as", "txt", *SMALL, *arguments)
        writer.join()
        Path("pipe").unlink()

        assert run.code == code
    assert gateway.accepted == {"a cat": 1}


def test_standard_input_of_unknown_format(flux2max: Command, service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """Standard input that may be prompts or a table needs --as."""
    gateway = service()
    read_fd, write_fd = os.pipe()
    with os.fdopen(write_fd, "w") as pipe:
        pipe.write("prompt,style\na cat,oil\n")
    with os.fdopen(read_fd) as source, monkeypatch.context() as patch:
        patch.setattr("sys.stdin", source)
        run = flux2max("batch", "-")

    assert (run.code, run.err) == (
        2,
        "flux2max: standard input may be prompts or a table: specify the format with --as\n",
    )
    assert not gateway.calls


def test_no_connection(flux2max: Command, service: Service, free_tcp_port: int) -> None:
    """If the service can't be reached, requests are refused with the reason."""
    service()
    run = flux2max("batch", write("a cat"), "--base-url", f"http://127.0.0.1:{free_tcp_port}", "--task-timeout", "1")

    assert run.code == 1
    assert "1 refused: no connection" in run.out
    assert states() == {"a cat": "refused"}


def test_results_file_with_other_content(flux2max: Command, service: Service) -> None:
    """A batch runs whatever results.jsonl contains; rows of paid tasks that the journal lacks are kept."""
    service()
    Path("flux2max-prompts").mkdir()
    known = {"key": "old", "prompt": "an owl", "task_id": "t9", "state": "submitted", "cost": "0.07", "seconds": None}
    odd: list[dict[str, Any]] = [
        {"key": [1], "task_id": "x"},
        {**known, "polls": None, "files": [], "error": None, "params": {}},
    ]
    odd.append({**odd[1], "key": "odd", "cost": "much"})
    text = "".join(f"{json.dumps(line)}\n" for line in odd) + "[" * 100_000 + "\n"
    Path("flux2max-prompts/results.jsonl").write_text(text, encoding="utf-8")
    run = flux2max("batch", write("a cat"), *SMALL)

    assert run.code == 0
    assert results()["an owl"]["task_id"] == "t9"
    assert len(results()) == 2


@pytest.mark.parametrize(
    "fields",
    [
        {"seconds": "soon"},
        {"polls": "many"},
        {"polls": float("inf")},
        {"cost": "NaN"},
        {"cost": "sNaN"},
        {"cost": -1},
        {"files": 1},
    ],
)
def test_rows_with_other_types(flux2max: Command, service: Service, fields: dict[str, Any]) -> None:
    """A row of results.jsonl whose values have other types is ignored, and the page is written without it."""
    service()
    run = flux2max("batch", write("a cat"), *SMALL)
    path = Path("flux2max-prompts/results.jsonl")
    odd = {**results()["a cat"], "key": "odd", "prompt": "an owl"}
    path.write_text(f"{json.dumps({**odd, **fields})}\n{json.dumps({**odd, 'prompt': 'a fox'})}\n", encoding="utf-8")
    run = flux2max("gallery", "flux2max-prompts")

    assert (run.code, run.err) == (0, "")
    assert set(results()) == {"a cat", "a fox"}


HOSTILE = "\x1b[2J\r\n\x9b31m\u202egpj\u2066\x00 " + "x" * 5_000


def test_texts_of_the_service(flux2max: Command, script: ScriptedGateway) -> None:
    """Task ids and messages are shortened and escaped in files, JSON output and messages."""
    task_id = "t" + HOSTILE[:800]
    script.submits[0] = answer(200, running(task_id))
    script.polls[0] = answer(200, completed(task_id, status="failed", error={"message": HOSTILE}, output=[]))
    run = flux2max("batch", write("a cat"), *SMALL, "--json")
    generated = flux2max("generate", "a cat")
    status = flux2max("status", "t1")
    journal = flux2max("journal", "show", "flux2max-prompts", "--json")
    row = results()["a cat"]
    (folder,) = (path for path in Path().iterdir() if path.is_dir())
    texts = [(folder / name).read_text(encoding="utf-8") for name in ("results.jsonl", "index.html")]

    assert row["task_id"].startswith(r"t\x1b[2J\r\n\x9b31m\u202egpj\u2066\x00 xxx")
    assert len(row["task_id"]) == len(row["error"]) == 200
    assert r"\x1b[2J\r\n\x9b31m\u202egpj" in row["error"]
    assert {**json.loads(run.out), "cost": "0.07"} == row
    assert json.loads(journal.out)["task_id"] == row["task_id"]
    for text in (*texts[:1], run.out, run.err, generated.err, status.out, journal.out):
        assert not set(text) & set("\x1b\x9b\x00\r\u202e\u2066")
        assert "x" * 201 not in text
    assert all(len(line) < 300 for line in (generated.err + status.out).splitlines())


def test_no_confirmation_if_nothing_is_to_be_paid(
    on_terminal: Command, flux2max: Command, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch that costs nothing needs no confirmation."""
    service()
    flux2max("batch", write("a cat"), *SMALL)
    run = with_typed_answers(monkeypatch, on_terminal)("batch", "prompts.txt", *SMALL)

    assert run.code == 0
    assert "Go on?" not in run.out


# ---------------------------------------------------------------------- settings


def image_sizes(gateway: Emulator) -> Sequence[tuple[int, int]]:
    return [(task.width, task.height) for task in gateway.tasks.values()]


def test_precedence_of_settings(flux2max: Command, service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """Options override environment variables, which override `.env`, which overrides the defaults."""
    gateway = service()
    for name in ("FLUX2MAX_API_KEY", "FLUX2MAX_BASE_URL"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("FLUX2MAX_HEIGHT", "128")
    Path(".env").write_text(
        f"# ours\nFLUX2MAX_API_KEY='{KEY}'\nexport FLUX2MAX_BASE_URL={gateway.url}\n"
        "FLUX2MAX_WIDTH=192\nFLUX2MAX_HEIGHT=64\nFLUX2MAX_YES=1\nPATH=/nowhere\n",
        encoding="utf-8",
    )
    prompts_file = write("a cat")
    flux2max("batch", prompts_file)
    flux2max("batch", prompts_file, "--width", "64", "--height", "64")
    generated = flux2max("generate", "a cat", "-o", "cat.jpeg")

    assert image_sizes(gateway) == [(192, 128), (64, 64), (192, 128)]
    assert generated.code == 0
    assert os.environ["PATH"] != "/nowhere"
    assert "gateway:" not in generated.err


@pytest.mark.parametrize(
    ("dotenv", "environment", "arguments", "sent_key"),
    [
        # An address from .env counts only with the key from there.
        ("url key", "", "", "dotenv-key"),
        ("url", "key", "", None),
        ("url key", "key", "", None),
        ("url same-key", "key", "", KEY),
        ("url", "", "", None),
        ("url", "", "key-file", None),
        ("url key", "", "key-file", None),
        # Addresses from elsewhere take precedence; the user trusts them with any key.
        ("url", "url key", "", KEY),
        ("url key", "url key", "", KEY),
        ("key", "url", "", "dotenv-key"),
        ("url", "url", "key-file", KEY),
        ("url", "key", "url", KEY),
        ("url key", "", "url", "dotenv-key"),
        ("url key", "key", "url", KEY),
        # Variables of other programs in .env have no effect.
        ("proxy", "url key", "", KEY),
        ("proxy key", "url", "", "dotenv-key"),
        # Finished tasks are posted to this address.
        ("webhook", "url key", "", None),
        ("webhook key", "url", "", "dotenv-key"),
    ],
)
def test_addresses_in_dotenv(
    flux2max: Command,
    script: ScriptedGateway,
    monkeypatch: pytest.MonkeyPatch,
    dotenv: str,
    environment: str,
    arguments: str,
    sent_key: str | None,
) -> None:
    """The user's API key is never sent to an address from `.env`; nothing is sent if both are to be used."""
    url = script.url
    lines = {
        "url": f"FLUX2MAX_BASE_URL={url if 'url' not in environment + arguments else 'https://foreign.example'}",
        "key": "FLUX2MAX_API_KEY=dotenv-key",
        "same-key": f"FLUX2MAX_API_KEY={KEY}",
        "proxy": f"HTTP_PROXY=http://127.0.0.1:1\nhttp_proxy=http://127.0.0.1:1\nAIOHTTP_PROXY={url}\nFLUX2MAX_PROXY={url}",
        "webhook": "FLUX2MAX_WEBHOOK_URL=https://foreign.example/hook",
    }
    Path(".env").write_text("".join(f"{lines[word]}\n" for word in dotenv.split()), encoding="utf-8")
    Path("key").write_text(KEY, encoding="utf-8")
    for name, value in (("url", url), ("key", KEY)):
        variable = {"url": "FLUX2MAX_BASE_URL", "key": "FLUX2MAX_API_KEY"}[name]
        monkeypatch.setenv(variable, value if name in environment.split() else "")
    script.submits[0] = answer(400, {"message": "refused"})
    options = {"": [], "url": ["--base-url", url], "key-file": ["--key-file", "key"]}[arguments]
    dry = flux2max("batch", write("a cat"), *SMALL, *options, "--dry-run")
    run = flux2max("batch", "prompts.txt", *SMALL, *options)

    if sent_key is None:
        assert (dry.code, run.code, run.out, script.received) == (2, 2, "", [])
        assert run.err == dry.err
        assert re.fullmatch(
            r"flux2max: FLUX2MAX_(BASE|WEBHOOK)_URL in \.env counts only with the API key from the same file: "
            r"set FLUX2MAX_API_KEY there and nowhere else, or pass --(base|webhook)-url if .*\n",
            run.err,
        )
    else:
        assert (dry.code, run.code) == (0, 1)
        assert [call.headers["Authorization"] for call in script.received] == [f"Bearer {sent_key}"]


@pytest.mark.parametrize(
    ("line", "key", "is_refused"),
    [
        ("OUT=../elsewhere", False, True),
        ("OUT=/tmp/elsewhere", False, True),
        ("OUT=link", False, True),
        ("OUT=pictures/../../elsewhere", False, True),
        ("OUT=../elsewhere", True, False),
        ("OUT=new/folder", False, False),
        ("REPEAT=2", False, False),
    ],
)
def test_paths_in_dotenv(
    flux2max: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, *, key: bool, is_refused: bool
) -> None:
    """A path from `.env` that is not below the working folder counts only with the API key from the same file."""
    (tmp_path / "elsewhere").mkdir()
    folder = tmp_path / "folder"
    folder.mkdir()
    monkeypatch.chdir(folder)
    Path("link").symlink_to(tmp_path / "elsewhere")
    Path(".env").write_text(f"FLUX2MAX_{line}\n" + "FLUX2MAX_API_KEY=dotenv-key\n" * key, encoding="utf-8")
    monkeypatch.setenv("FLUX2MAX_API_KEY", "" if key else KEY)
    run = flux2max("batch", write("a cat"), *SMALL, "--dry-run")

    assert run.code == (2 if is_refused else 0)
    assert (f"FLUX2MAX_{line.partition('=')[0]} in .env counts only with the API key" in run.err) is is_refused
    assert list((tmp_path / "elsewhere").iterdir()) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"\xff\xfe\x00", "can't read .env: it is not UTF-8 text"), (b"not an assignment\n", "could not parse statement")],
)
def test_invalid_dotenv(flux2max: Command, content: bytes, message: str) -> None:
    """An unreadable `.env` is reported."""
    Path(".env").write_bytes(content)
    run = flux2max("journal", "show", ".")

    assert run.code == 2
    assert message in run.err


def test_dotenv_is_a_folder(flux2max: Command) -> None:
    """A folder named `.env` is ignored."""
    Path(".env").mkdir()

    assert flux2max("journal", "--help").code == 0


def test_key_file(flux2max: Command, service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """The API key in a key file overrides that of the environment."""
    gateway = service()
    monkeypatch.setenv("FLUX2MAX_API_KEY", "another")
    Path("key").write_text(f"{KEY}\n", encoding="utf-8")
    run = flux2max("batch", write("a cat"), *SMALL, "--key-file", "key")

    assert run.code == 0
    assert gateway.calls["submit"] == 1


def test_typed_api_key(on_terminal: Command, service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without an API key, the command prompts for it on the terminal, and doesn't print it."""
    service()
    monkeypatch.delenv("FLUX2MAX_API_KEY")
    with monkeypatch.context() as patch:
        # getpass opens the process's controlling terminal, which tests don't have.
        patch.setattr("getpass.getpass", lambda prompt: KEY)
        run = with_typed_answers(monkeypatch, on_terminal)("batch", write("a cat"), *SMALL, "--yes")

    assert run.code == 0
    assert KEY not in run.out
