"""Batches from the command line: what becomes of a sheet, what is said of it, and that nothing is paid or fetched twice."""

import json
import os
import re
import shlex
import threading
from collections import Counter, deque
from collections.abc import Callable, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from support.commands import KEY, Command, Run, visible_lines
from support.scripted import ScriptedGateway, answer, completed, running

from flux2max_async.emulator import Emulator, Fault

pytestmark = pytest.mark.usefixtures("empty_folder")

Service = Callable[..., Emulator]
SMALL = ("--width", "64", "--height", "64")


def write(*lines: str, name: str = "prompts.txt") -> str:
    Path(name).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return name


def results(folder: str = "flux2max-prompts") -> dict[str, dict[str, Any]]:
    """Read what is told of each request, by its prompt."""
    lines = Path(folder, "results.jsonl").read_text(encoding="utf-8").splitlines()
    return {row["prompt"]: row for row in map(json.loads, lines)}


def states(folder: str = "flux2max-prompts") -> dict[str, str]:
    return {prompt: row["state"] for prompt, row in results(folder).items()}


def pictures(folder: str = "flux2max-prompts") -> list[Path]:
    """Give the pictures, each of which is whole."""
    found = sorted(path for path in Path(folder).iterdir() if path.suffix in {".jpeg", ".png"})
    for path in found:
        with Image.open(path) as picture:
            picture.load()
    return found


def advised(run: Run) -> list[str]:
    """Give the command that a run ends with."""
    return shlex.split(run.err.splitlines()[-1].partition(": flux2max ")[2])


# ---------------------------------------------------------------------- what comes out


def test_a_batch(flux2max: Command, service: Service) -> None:
    """A text becomes a folder with pictures, small copies, a page, results and a journal, and a word about each."""
    gateway = service()
    run = flux2max("batch", write("a cat", "a dog", "", "# nothing", "an owl"), "--width", "640", "--height", "480")
    told = results()
    (file,) = told["a cat"]["files"]

    assert run.code == 0
    assert run.err.splitlines() == [
        "3 pictures: 3 to be submitted, for about $0.21",
        f"3 of 3 pictures in flux2max-prompts; to view them: {Path('flux2max-prompts/index.html')}",
    ]
    assert [cell.strip() for cell in run.out.splitlines()[1].split("┃")[1:-1]] == ["done", "failed"]
    assert re.match(r"│ +3 │ +0 │", run.out.splitlines()[3])
    assert re.fullmatch(r"0:0\d, \d\.\d s and \d\.\d polls a task, \$0\.21 spent", run.out.splitlines()[5])
    assert list(told) == ["a cat", "a dog", "an owl"]
    assert told["a cat"] == {
        "key": Path(file).stem,
        "prompt": "a cat",
        "task_id": next(task.id for task in gateway.tasks.values() if task.prompt == "a cat"),
        "state": "completed",
        "cost": "0.07",
        "seconds": told["a cat"]["seconds"],
        "polls": told["a cat"]["polls"],
        "files": [file],
        "error": None,
        "params": {"width": 640, "height": 480},
    }
    assert 0 < told["a cat"]["seconds"] < 30
    assert told["a cat"]["polls"] >= 1
    assert len(pictures()) == 3
    assert {path.name for path in Path("flux2max-prompts").iterdir() if "journal.db-" not in path.name} == {
        *("journal.db", "results.jsonl", "index.html", "thumbs"),
        *(name for row in told.values() for name in row["files"]),
    }
    assert all(prompt in Path("flux2max-prompts/index.html").read_text(encoding="utf-8") for prompt in told)


def test_the_same_command_again(flux2max: Command, service: Service) -> None:
    """What is done is neither paid nor fetched nor made small again; a new line alone is submitted."""
    gateway = service()
    sheet = write("a cat", "a dog")
    flux2max("batch", sheet, *SMALL)
    before = {path: path.stat().st_mtime_ns for path in Path("flux2max-prompts").glob("**/*.jpeg")}
    again = flux2max("batch", sheet, *SMALL)
    calls = Counter(gateway.calls)
    write("an owl", "a dog", "a cat")
    more = flux2max("batch", sheet, *SMALL)
    after = {path: path.stat().st_mtime_ns for path in Path("flux2max-prompts").glob("**/*.jpeg")}

    assert (again.code, more.code) == (0, 0)
    assert again.err.startswith("2 pictures: 2 done already\n")
    assert more.err.startswith("3 pictures: 2 done already, 1 to be submitted, for about $0.07\n")
    assert (calls["submit"], calls["download"]) == (2, 2)
    assert set(gateway.accepted.values()) == {1}
    assert gateway.calls["download"] == 3
    assert len(before) == 4
    assert {path: after[path] for path in before} == before
    assert list(results()) == ["an owl", "a dog", "a cat"]


def test_a_picture_that_was_deleted_is_fetched_and_not_paid_again(flux2max: Command, service: Service) -> None:
    """Who removes a picture gets it again, by its task; the folder may have been moved in between."""
    gateway = service()
    sheet = write("a cat", "a dog")
    flux2max("batch", sheet, *SMALL, "--out", "one")
    Path("one", results("one")["a cat"]["files"][0]).unlink()
    Path("one").rename("two")
    run = flux2max("batch", sheet, *SMALL, "--out", "two")

    assert run.code == 0
    assert len(pictures("two")) == 2
    assert (gateway.calls["submit"], gateway.calls["download"]) == (2, 3)


def test_outcomes_as_json(flux2max: Command, service: Service) -> None:
    """With --json, standard output has a line for each outcome and nothing else; the rest goes to stderr."""
    service()
    run = flux2max("batch", write("a cat", "a dog [fail]"), *SMALL, "--json")
    told = {row["prompt"]: row for row in map(json.loads, run.out.splitlines())}

    assert run.code == 1
    assert told == results()
    assert (told["a cat"]["state"], told["a dog [fail]"]["state"]) == ("completed", "failed")
    assert "spent" in run.err


def test_standard_input(flux2max: Command, service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sheet may come from elsewhere: prompts, or objects where it begins with one."""
    gateway = service()
    for text in ("a cat\n", '{"prompt": "a dog", "width": 64, "height": 64}\n'):
        reading, writing = os.pipe()
        with os.fdopen(writing, "w") as sheet:
            sheet.write(text)
        with os.fdopen(reading) as source, monkeypatch.context() as patch:
            patch.setattr("sys.stdin", source)
            assert flux2max("batch", "-").code == 0

    assert set(gateway.accepted) == {"a cat", "a dog"}
    assert list(results("flux2max-batch")) == ["a dog", "a cat"]


def test_options_for_all_lines(flux2max: Command, script: ScriptedGateway) -> None:
    """Options hold for each line; what is secret goes to the service, and into no file."""
    script.submits[0] = answer(400, {"message": "enough seen"})
    os.environ["FLUX2MAX_WEBHOOK_SECRET"] = "nobody may see it"
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
            "webhook_secret": "nobody may see it",
            "upsampling": True,
        }
        for seed in (5, 6)
    ]
    assert b"nobody may see it" not in seen
    assert script.api_key.encode() not in seen
    assert "nobody may see it" not in run.out + run.err


# ---------------------------------------------------------------------- before anything is sent


def test_bad_lines(flux2max: Command, service: Service) -> None:
    """Each bad line is told by number, field and reason; nothing is sent unless --skip-bad says so."""
    gateway = service()
    sheet = write('{"prompt": "a cat"}', '{"promt": "a dog"}', '{"prompt": "an owl", "width": 10}', name="wishes.jsonl")
    run = flux2max("batch", sheet, *SMALL[2:])
    nothing = dict(gateway.calls), sorted(path.name for path in Path().iterdir())
    skipping = flux2max("batch", sheet, *SMALL, "--skip-bad")

    assert (run.code, run.out) == (2, "")
    assert run.err.splitlines() == [
        "wishes.jsonl:2: promt: there is no field 'promt': did you mean prompt?",
        "wishes.jsonl:3: width: width must be at least 64 pixels, or 0 or None to let the model choose, not 10",
        "flux2max: 2 lines are bad, so nothing was sent; --skip-bad skips bad lines",
    ]
    assert nothing == ({}, ["wishes.jsonl"])
    assert skipping.code == 0
    assert set(gateway.accepted) == {"a cat"}


def test_a_key_of_another_request(flux2max: Command, service: Service) -> None:
    """A key that the journal knows for something else is found before anything is sent."""
    gateway = service()
    sheet = write('{"prompt": "a cat", "key": "one"}', name="prompts.jsonl")
    flux2max("batch", sheet, *SMALL)
    write('{"prompt": "a dog", "key": "one"}', '{"prompt": "an owl", "key": "two"}', name=sheet)
    run = flux2max("batch", sheet, *SMALL)

    assert run.code == 2
    assert run.err.startswith(
        "prompts.jsonl:1: key: key 'one' belongs to another request in the journal, for 'a cat'\n"
    )
    assert gateway.calls["submit"] == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nothing.txt"], "can't read 'nothing.txt': No such file"),
        (["."], "can't read '.'"),
        (["prompts.doc"], "'prompts.doc' is not .txt, .jsonl or .csv: specify the format with --as"),
        (["empty.txt"], "empty.txt has no prompts"),
        (["prompts.txt", "--width", "10"], "width must be at least 64"),
        (["prompts.txt", "--budget", "much"], "budget must be an amount of US dollars"),
        (["prompts.txt", "--max-in-flight", "0"], "max_in_flight must be an integer of at least 1"),
        (["prompts.txt", "--extra", "x"], "extra must look like name=value"),
        (["prompts.txt", "--out", "empty.txt"], "'empty.txt' is no folder"),
        (["prompts.txt", "--key-file", "empty.txt"], "the key file 'empty.txt' is empty"),
        (["prompts.txt", "--key-file", "nothing.txt"], "can't read the key file 'nothing.txt'"),
    ],
)
def test_wrong_use(flux2max: Command, service: Service, arguments: list[str], said: str) -> None:
    """What can't work is told in one line, with exit code 2, before anything is sent."""
    gateway = service()
    for name in ("prompts.txt", "prompts.doc"):
        write("a cat", name=name)
    write("# nothing", name="empty.txt")
    Path("empty.txt").write_text(" \n" if "--key-file" in arguments else "# nothing\n", encoding="utf-8")
    run = flux2max("batch", *arguments)

    assert (run.code, run.out) == (2, "")
    assert run.err.splitlines()[-1].startswith(f"flux2max: {said}")
    assert not gateway.calls


def test_a_dry_run(flux2max: Command, service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """It shows what would be sent and what it would cost, without a key, a call or a file."""
    gateway = service()
    monkeypatch.delenv("FLUX2MAX_API_KEY")
    sheet = write("a cat", "a dog")
    run = flux2max("batch", sheet, "--dry-run", "--width", "2048", "--height", "1024", "--seed", "3")
    as_json = flux2max("batch", sheet, "--dry-run", "--json", "--extra", f"note={'x' * 200}")
    long = flux2max("batch", sheet, "--dry-run", "--extra", f"note={'x' * 200}")

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
    assert [path.name for path in Path().iterdir()] == [sheet]


def test_a_dry_run_knows_what_is_done(flux2max: Command, service: Service) -> None:
    """What is paid already isn't shown again, and what it has cost tells what the others will."""
    service()
    sheet = write("a cat", "a dog [fail]")
    flux2max("batch", sheet, "--width", "2048", "--height", "1024")
    write("a cat", "a dog [fail]", "an owl", name=sheet)
    options = ("batch", sheet, "--width", "2048", "--height", "1024", "--dry-run")
    run = flux2max(*options, "--budget", "0.15")
    retrying = flux2max(*options, "--json", "--retry-failed")
    actions = {row["params"]["prompt"]: row["fate"] for row in map(json.loads, retrying.out.splitlines())}

    assert run.err == (
        "dry run: 3 pictures: 1 done already, 1 failed earlier (--retry-failed tries again), 1 to be submitted, "
        "for about $0.10; the budget leaves $0.05, which isn't enough for all\n"
    )
    assert run.out.startswith("an-owl-")
    assert actions == {"a cat": "done", "a dog [fail]": "again", "an owl": "new"}


# ---------------------------------------------------------------------- what goes wrong


def test_failures_are_grouped(flux2max: Command, service: Service) -> None:
    """Failures are told by reason, with one example each; the last line says how to pay for them again."""
    gateway = service()
    run = flux2max("batch", write("a [fail]", "b [moderate]", "c [fail]", "d", "e [fail]"), *SMALL)
    again = flux2max(*advised(run))
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
    assert advised(again) == advised(run)


def test_a_budget_that_stops_it(flux2max: Command, service: Service) -> None:
    """A batch that its budget stops says so, and names a budget with which the same command ends it."""
    gateway = service(max_in_flight=2)
    prompts = [f"picture {number}" for number in range(6)]
    run = flux2max("batch", write(*prompts), *SMALL, "--budget", "0.30", "--max-in-flight", "2")
    stopped, paid = states(), gateway.accepted.total()
    more = flux2max(*advised(run))

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


@pytest.mark.parametrize("given", ["--budget=0.07", "FLUX2MAX_BUDGET"])
def test_a_budget_however_given(
    flux2max: Command, service: Service, monkeypatch: pytest.MonkeyPatch, given: str
) -> None:
    """Wherever the budget stands, the command to go on overrules it; what stood in the environment is written out."""
    service()
    from_environment = given.startswith("FLUX")
    with monkeypatch.context() as patch:
        if from_environment:
            patch.setenv(given, "0.07")
            patch.setenv("FLUX2MAX_WIDTH", "64")
        arguments = ["--height", "64"] if from_environment else [*SMALL, given]
        run = flux2max("batch", write("a cat", "a dog"), *arguments)

    assert advised(run) == (
        ["batch", "--width", "64", "prompts.txt", "--height", "64", "--budget", "0.14"]
        if from_environment
        else ["batch", "prompts.txt", *SMALL, "--budget", "0.14"]
    )
    assert flux2max(*advised(run)).code == 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"balance": Decimal("0.15")}, "stopped: insufficient balance (HTTP 402, code 40201"),
        ({"api_key": "another"}, "stopped: the API key is missing or wrong (HTTP 401"),
    ],
)
def test_what_dooms_all_the_rest(flux2max: Command, service: Service, options: dict[str, Any], said: str) -> None:
    """An empty account or a wrong key stops it; what was paid for is there, and the rest waits."""
    gateway = service(**options)
    run = flux2max("batch", write(*(f"picture {number}" for number in range(8))), *SMALL, "--max-in-flight", "1")
    told = Counter(states().values())

    assert run.code == 1
    assert f"flux2max: {said}" in run.err
    assert KEY not in run.out + run.err
    assert re.match(r"to go on, (once .*|with another key): flux2max batch prompts.txt ", run.err.splitlines()[-1])
    assert told["completed"] == gateway.accepted.total() == len(pictures())
    assert told["waiting"] + told["refused"] == 8 - told["completed"]
    assert told["waiting"] >= 5


def test_what_is_uncertain(flux2max: Command, service: Service) -> None:
    """A lost answer is told as such, and submitted again only where that is asked for."""
    gateway = service()
    gateway.script("submit", Fault.RESET_AFTER)
    sheet = write("a cat")
    run = flux2max("batch", sheet, *SMALL)
    again = flux2max("batch", sheet, *SMALL)
    told = flux2max("journal", "flux2max-prompts")
    paid = gateway.accepted["a cat"]
    risked = flux2max(*advised(again))

    assert (run.code, again.code, risked.code) == (1, 1, 0)
    assert again.err.startswith("1 picture: 1 uncertain (--resubmit-uncertain may pay twice)\n")
    assert "1 uncertain: " in again.out
    assert advised(again)[-1] == "--resubmit-uncertain"
    assert re.search(r"^uncertain: \d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC a-cat-\w{8} \(a cat\)$", told.out, re.MULTILINE)
    assert paid == 1
    assert states() == {"a cat": "completed"}


def test_a_request_that_is_refused(flux2max: Command, script: ScriptedGateway) -> None:
    """What the service refuses has bought nothing: it is told, and the next run submits it again."""
    script.submits = deque([answer(400, {"message": "no such \x1b[2Jsize 64"}), answer(200, running("t1"))])
    script.polls[0] = answer(200, completed("t1", f"{script.url}/0.jpeg"))
    script.downloads[0] = answer(200, b"a picture that nobody can decode")
    sheet = write("a cat")
    run = flux2max("batch", sheet)
    refused = states()
    again = flux2max(*advised(run))

    assert run.code == 1
    assert refused == {"a cat": "refused"}
    assert "1 refused: no such [2Jsize 64" in run.out
    assert again.code == 0
    assert states() == {"a cat": "completed"}
    # What can't be made small is shown as it is.
    assert re.search(r'src="a-cat-\w{8}\.jpeg"', Path("flux2max-prompts/index.html").read_text(encoding="utf-8"))


def test_a_refused_request_that_was_mended(flux2max: Command, script: ScriptedGateway) -> None:
    """What has bought nothing and stands in the sheet no more is forgotten."""
    script.submits[0] = answer(400, {"message": "no"})
    sheet = write("a kat")
    flux2max("batch", sheet)
    write("a cat", name=sheet)
    flux2max("batch", sheet)

    assert states() == {"a cat": "refused"}


def test_a_task_that_takes_too_long(flux2max: Command, service: Service) -> None:
    """A deadline is no end: the task's id is told, and the next run follows it first."""
    gateway = service(seconds=3.0)
    run = flux2max("batch", write("a cat"), *SMALL, "--task-timeout", "0.3")
    (task_id,) = gateway.tasks
    told = results()["a cat"]
    inside = flux2max("journal", "flux2max-prompts")
    more = flux2max("batch", write("a dog", "a cat"), *SMALL)

    assert run.code == 1
    assert (told["state"], told["task_id"]) == ("submitted", task_id)
    assert task_id in told["error"]
    assert f"running: {task_id} " in inside.out
    assert more.err.startswith("2 pictures: 1 running, 1 to be submitted")
    assert more.code == 0
    assert set(gateway.accepted.values()) == {1}


def test_a_picture_that_cannot_be_saved(flux2max: Command, service: Service) -> None:
    """What is paid for and not there is told, and fetched by the next run without paying again."""
    gateway = service(url_lifetime=-1.0)
    sheet = write("a cat")
    run = flux2max("batch", sheet, *SMALL)
    told = results()["a cat"]
    again = flux2max("batch", sheet, *SMALL)

    assert (run.code, again.code) == (1, 1)
    assert (told["state"], told["files"]) == ("completed", [])
    assert "expired" in told["error"]
    assert "1 unsaved: " in run.out
    assert gateway.accepted["a cat"] == 1


def test_a_page_that_cannot_be_written(flux2max: Command, service: Service) -> None:
    """Pictures come even where the page can't be written, and that is said once while it runs and once at the end."""
    service()
    Path("flux2max-prompts/index.html").mkdir(parents=True)
    run = flux2max("batch", write("a cat"), *SMALL)
    gallery = flux2max("gallery", "flux2max-prompts")

    assert len(pictures()) == 1
    assert run.err.count("flux2max: can't write index.html: Is a directory") == 2
    assert gallery.code == 1


def test_a_journal_that_is_none(flux2max: Command, service: Service) -> None:
    """Without a journal nothing is sent."""
    gateway = service()
    Path("flux2max-prompts").mkdir()
    Path("flux2max-prompts/journal.db").write_text("something else, and quite long enough to be looked at" * 9)
    run = flux2max("batch", write("a cat"))

    assert run.code == 1
    assert run.err.splitlines()[-1].startswith("flux2max: the journal flux2max-prompts/journal.db is damaged")
    assert not gateway.calls


def test_advice_is_the_command_itself(flux2max: Command, service: Service) -> None:
    """Whatever stands in the arguments stands in the command to go on with, and it works."""
    service()
    sheet = write("seed,key", "1,one", "2,two", name="my  sheet.csv")
    options = ("--prompt", "a 'cat'\tand\n  \"mouse\"", "--out=of  it", "--budget", "0.07", "--retry-failed")
    run = flux2max("batch", *options, *SMALL, "--", sheet)
    lines = run.err.partition("to go on, with a budget for the other 1: flux2max ")[2]
    again = shlex.split(lines)

    assert again == ["batch", *options[:3], *SMALL, "--budget", "0.14", "--", sheet]
    assert flux2max(*again).code == 0
    assert len(pictures("of  it")) == 2


def test_whoever_goes_on_pays_for_nothing_again(flux2max: Command, service: Service) -> None:
    """What is to be submitted again comes last, and the command to go on doesn't consent to it once more."""
    gateway = service(max_in_flight=1)
    sheet = write("a [fail]", "b", "c", "d")
    flux2max("batch", sheet, *SMALL, "--budget", "0.07", "--max-in-flight", "1")
    run = flux2max("batch", sheet, *SMALL, "--budget", "0.14", "--max-in-flight", "1", "--retry-failed")
    again = flux2max(*advised(run))

    assert "1 failed, to be submitted again" in run.err
    assert "--retry-failed" not in advised(run)
    assert again.code == 1
    assert gateway.accepted == {"a [fail]": 1, "b": 1, "c": 1, "d": 1}


def test_advice_suffices(flux2max: Command, service: Service) -> None:
    """A budget that is advised is enough, whatever sizes are asked for; what is shown is what others of a size cost."""
    gateway = service(max_in_flight=1)
    sizes = [{"width": 2048, "height": 2048}, *({"width": 64, "height": 64} for _ in range(5))]
    sheet = write(*(json.dumps({"prompt": f"{n}", **size}) for n, size in enumerate(sizes)), name="prompts.jsonl")
    run = flux2max("batch", sheet, "--budget", "0.20", "--max-in-flight", "1")
    dry = flux2max("batch", sheet, "--dry-run")
    more = flux2max(*advised(run))

    assert run.code == 1
    assert dry.err.endswith("5 to be submitted, for about $0.35\n")
    assert more.code == 0
    assert gateway.accepted.total() == 6


def test_what_left_the_sheet_is_not_lost(flux2max: Command, service: Service) -> None:
    """What is paid for is fetched though its line is gone; where that can't be asked for again, it is named."""
    gateway = service(seconds=1.5)
    for name in ("small.png", "other.png"):
        Image.new("RGB", (64, 64)).save(name)
    lines = [
        '{"prompt": "a cat", "seed": 1}',
        '{"prompt": "a dog", "input_images": ["small.png"]}',
        '{"prompt": "a fox", "input_images": ["other.png"]}',
        '{"prompt": "an owl"}',
    ]
    sheet = write(*lines, name="prompts.jsonl")
    flux2max("batch", sheet, *SMALL, "--task-timeout", "0.3")
    ids = {task.prompt: task.id for task in gateway.tasks.values()}
    Image.new("RGB", (32, 32)).save("small.png")
    Path("other.png").unlink()
    write('{"prompt": "a lion"}', name=sheet)
    run = flux2max("batch", sheet, *SMALL)
    told = states()

    assert run.code == 0
    assert "3 pictures: 2 running, 1 to be submitted" in run.err
    assert "2 of them: no longer in prompts.jsonl, but already paid for" in run.err
    assert f"; to save its picture: flux2max download {ids['a dog']}" in run.err
    assert f"; to save its picture: flux2max download {ids['a fox']}" in run.err
    assert Counter(told.values()) == {"completed": 3, "submitted": 2}
    assert len(pictures()) == 3
    assert set(gateway.accepted.values()) == {1}


def test_a_journal_that_is_gone(
    on_terminal: Command, flux2max: Command, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where only the results know what was paid, nothing is paid again without a yes."""
    gateway = service()
    sheet = write("a cat")
    flux2max("batch", sheet, *SMALL)
    for path in Path("flux2max-prompts").glob("journal.db*"):
        path.unlink()
    refused = flux2max("batch", sheet, *SMALL)
    asked = answering(monkeypatch, on_terminal, "n")("batch", sheet, *SMALL)
    paid = gateway.accepted["a cat"]
    agreed = flux2max("batch", sheet, *SMALL, "--yes")

    assert (refused.code, asked.code, agreed.code, paid) == (2, 1, 0, 1)
    assert "journal.db is missing: 1 picture in results.jsonl would be paid for again" in refused.err
    assert "can't ask for confirmation, so nothing was sent: add --yes" in refused.err


def test_a_wrong_key_is_no_fault_of_the_lines(flux2max: Command, service: Service) -> None:
    """What a wrong key has kept from being submitted waits; nothing is said to be wrong with it."""
    service(api_key="another")
    flux2max("batch", write("a cat", "a dog"), *SMALL)

    assert states() == {"a cat": "waiting", "a dog": "waiting"}
    assert 'class="refused"' not in Path("flux2max-prompts/index.html").read_text(encoding="utf-8")


def test_settings_are_checked_before_the_plan(flux2max: Command, service: Service) -> None:
    """A session that couldn't work is found before anybody is asked, and before a folder is made."""
    service()
    run = flux2max("batch", write("a cat"), "--base-url", "http://gateway.example")

    assert run.code == 2
    assert run.err.splitlines()[0].startswith("flux2max: base_url must be https")
    assert not Path("flux2max-prompts").exists()


def test_what_others_left_half_written(flux2max: Command, service: Service) -> None:
    """What a killed process has left of a page is removed, once nobody can be writing it."""
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
def test_a_folder_that_there_cannot_be(flux2max: Command, service: Service, out: str) -> None:
    """A folder that can't be made, or can't even be named, is told in a line."""
    gateway = service()
    write("nothing", name="file")
    run = flux2max("batch", write("a cat"), "--out", out)

    assert run.code == 2
    assert re.search(r"flux2max: can't (make the folder|look into) '", run.err)
    assert not gateway.calls


# ---------------------------------------------------------------------- looking inside


@pytest.mark.parametrize("command", ["journal", "gallery"])
def test_a_folder_of_no_batch(flux2max: Command, command: str) -> None:
    """A folder without a journal is no batch's."""
    Path("empty").mkdir()
    run = flux2max(command, "empty")

    assert (run.code, run.out) == (2, "")
    assert run.err == "flux2max: there is no journal.db in 'empty': it is not the output folder of a batch\n"


def test_the_journal_told(flux2max: Command, service: Service) -> None:
    """Counts and dollars in a table that fits 80 columns; each entry as JSON."""
    service()
    flux2max("batch", write("a cat", "a dog [fail]"), *SMALL)
    run = flux2max("journal", "flux2max-prompts")
    as_json = flux2max("journal", "flux2max-prompts", "--json")

    assert run.code == 0
    assert re.match(r"│ +2 │ +1 │ +1 │ +0 │ +0 │ +\$0\.07 │ +\$0\.00 │", run.out.splitlines()[3])
    assert [json.loads(line)["request"]["prompt"] for line in as_json.out.splitlines()] == ["a cat", "a dog [fail]"]


def test_refusals_are_counted(flux2max: Command, script: ScriptedGateway) -> None:
    """What was refused stands in the journal's counts."""
    script.submits[0] = answer(400, {"message": "no"})
    flux2max("batch", write("a cat"))
    run = flux2max("journal", "flux2max-prompts")

    assert "refused" in run.out
    assert re.match(r"│ +1 │ +0 │ +0 │ +1 │ +0 │ +0 │ +\$0\.00 │ +\$0\.00 │", run.out.splitlines()[3])


def test_the_gallery_made_anew(flux2max: Command, service: Service) -> None:
    """Page, results and small copies come back from the journal; what waits comes from the results."""
    service()
    flux2max("batch", write("a cat", "a dog"), *SMALL, "--budget", "0.07")
    before = results()
    page = Path("flux2max-prompts/index.html")
    page.unlink()
    for path in Path("flux2max-prompts/thumbs").iterdir():
        path.unlink()
    run = flux2max("gallery", "flux2max-prompts")
    anew = results()
    Path("flux2max-prompts/results.jsonl").write_text('what?\n{"key": 1}\n[]\n')
    flux2max("gallery", "flux2max-prompts")

    assert (run.code, run.out) == (0, f"{page}\n")
    assert anew == before
    assert set(states().values()) == {"completed"}
    assert page.exists()
    assert len(list(Path("flux2max-prompts/thumbs").iterdir())) == 1


# ---------------------------------------------------------------------- on a terminal


def test_a_batch_lives_on_a_terminal(on_terminal: Command, service: Service) -> None:
    """A bar, counts, pace and the newest failures and troubles; no line is longer than the terminal is wide."""
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
    """Outcomes and the board share a terminal: each outcome stands above the board, whole."""
    service(seconds=0.5)
    run = on_terminal("batch", write("a cat", "a dog"), *SMALL, "--json", "--yes")
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|[\r\n]", "", run.out)

    assert run.code == 0
    for name in ("a cat", "a dog"):
        assert re.search(rf'{{"key": "{name.replace(" ", "-")}-\w{{8}}", "prompt": "{name}".*?"height": 64}}}}', shown)


def answering(monkeypatch: pytest.MonkeyPatch, on_terminal: Command, *keys: str) -> Callable[..., Run]:
    """Runs a command for somebody who sits at the terminal and types."""
    pty = pytest.importorskip("pty", reason="there are no pseudo terminals here")

    def run(*arguments: str) -> Run:
        master, slave = pty.openpty()
        os.write(master, "".join(f"{key}\n" for key in keys).encode())
        with os.fdopen(slave, closefd=False) as keyboard, monkeypatch.context() as patch:
            patch.setattr("sys.stdin", keyboard)
            done = on_terminal(*arguments)
        os.close(master)
        os.close(slave)
        return done

    return run


@pytest.mark.parametrize(("key", "code", "paid"), [("y", 0, 1), ("n", 1, 0), ("", 1, 0)])
def test_money_is_asked_for(
    on_terminal: Command, service: Service, monkeypatch: pytest.MonkeyPatch, key: str, code: int, paid: int
) -> None:
    """Who sits at a terminal is told what it will cost, and asked; nothing is sent without a yes."""
    gateway = service()
    run = answering(monkeypatch, on_terminal, key)("batch", write("a cat"), *SMALL)

    assert "1 picture: 1 to be submitted, for about $0.07" in run.out
    assert "Go on? [y/N]:" in run.out
    assert (run.code, gateway.calls["submit"]) == (code, paid)


def test_a_file_on_the_keyboards_place_needs_a_yes(
    on_terminal: Command, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody sees what it will cost, and can't answer, since the file comes in where the answer would: --yes is needed."""
    gateway = service()
    reading, writing = os.pipe()
    with os.fdopen(writing, "w") as sheet:
        sheet.write("a cat\n")
    with os.fdopen(reading) as source, monkeypatch.context() as patch:
        patch.setattr("sys.stdin", source)
        run = on_terminal("batch", "-", *SMALL)

    assert run.code == 2
    assert "can't ask for confirmation" in run.out
    assert not gateway.calls


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes with names")
def test_a_pipe_has_no_name_to_call_a_folder_after(flux2max: Command, service: Service) -> None:
    """A pipe is called otherwise each time, and a folder of another name would be paid for again."""
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


def test_standard_input_in_doubt(flux2max: Command, service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """What may be a table or prompts is neither before somebody says."""
    gateway = service()
    reading, writing = os.pipe()
    with os.fdopen(writing, "w") as sheet:
        sheet.write("prompt,style\na cat,oil\n")
    with os.fdopen(reading) as source, monkeypatch.context() as patch:
        patch.setattr("sys.stdin", source)
        run = flux2max("batch", "-")

    assert (run.code, run.err) == (2, "flux2max: standard input may be prompts or a table: specify the format with --as\n")
    assert not gateway.calls


def test_no_connection(flux2max: Command, service: Service, free_tcp_port: int) -> None:
    """A service that isn't there is told with its reason, and the same command goes on."""
    service()
    run = flux2max("batch", write("a cat"), "--base-url", f"http://127.0.0.1:{free_tcp_port}", "--task-timeout", "1")

    assert run.code == 1
    assert "1 refused: no connection" in run.out
    assert states() == {"a cat": "refused"}


def test_results_that_others_have_written(flux2max: Command, service: Service) -> None:
    """Whatever stands in results.jsonl, a batch runs; what it knows of paid tasks outlives the journal."""
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


def test_what_costs_nothing_is_not_asked(
    on_terminal: Command, flux2max: Command, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where all is paid for, there is nothing to ask."""
    service()
    flux2max("batch", write("a cat"), *SMALL)
    run = answering(monkeypatch, on_terminal)("batch", "prompts.txt", *SMALL)

    assert run.code == 0
    assert "Go on?" not in run.out


# ---------------------------------------------------------------------- settings


def sent(gateway: Emulator) -> Sequence[tuple[int, int]]:
    return [(task.width, task.height) for task in gateway.tasks.values()]


def test_where_settings_come_from(flux2max: Command, service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """Options come before variables, variables before `.env`, and that before the defaults."""
    gateway = service()
    for name in ("FLUX2MAX_API_KEY", "FLUX2MAX_BASE_URL"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("FLUX2MAX_HEIGHT", "128")
    Path(".env").write_text(
        f"# ours\nFLUX2MAX_API_KEY='{KEY}'\nexport FLUX2MAX_BASE_URL={gateway.url}\n"
        "FLUX2MAX_WIDTH=192\nFLUX2MAX_HEIGHT=64\nFLUX2MAX_YES=1\nPATH=/nowhere\n",
        encoding="utf-8",
    )
    sheet = write("a cat")
    flux2max("batch", sheet)
    flux2max("batch", sheet, "--width", "64", "--height", "64")
    generated = flux2max("generate", "a cat", "-o", "cat.jpeg")

    assert sent(gateway) == [(192, 128), (64, 64), (192, 128)]
    assert generated.code == 0
    assert os.environ["PATH"] != "/nowhere"
    assert "gateway:" not in generated.err


def test_a_key_for_somebody_elses_gateway(flux2max: Command, service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a folder's `.env` says to whom the environment's key is sent, that is told."""
    gateway = service()
    monkeypatch.delenv("FLUX2MAX_BASE_URL")
    Path(".env").write_text(f"FLUX2MAX_BASE_URL={gateway.url}\n", encoding="utf-8")
    run = flux2max("status", "nothing")

    assert run.err.splitlines()[0] == f"gateway: {gateway.url} (from .env)"


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"\xff\xfe\x00", "can't read .env: it is not UTF-8 text"), (b"what is this?\n", "could not parse statement")],
)
def test_a_dotenv_that_is_none(flux2max: Command, content: bytes, said: str) -> None:
    """What can't be read in `.env` is told."""
    Path(".env").write_bytes(content)
    run = flux2max("journal", ".")

    assert run.code == 2
    assert said in run.err


def test_a_folder_called_dotenv(flux2max: Command) -> None:
    """A folder of that name is nobody's settings."""
    Path(".env").mkdir()

    assert flux2max("journal", "--help").code == 0


def test_a_key_file(flux2max: Command, service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that is named has the key, whatever the environment says."""
    gateway = service()
    monkeypatch.setenv("FLUX2MAX_API_KEY", "another")
    Path("key").write_text(f"{KEY}\n", encoding="utf-8")
    run = flux2max("batch", write("a cat"), *SMALL, "--key-file", "key")

    assert run.code == 0
    assert gateway.calls["submit"] == 1


def test_a_key_that_is_typed(on_terminal: Command, service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a key, who sits at the terminal is asked for it, and it isn't shown."""
    service()
    monkeypatch.delenv("FLUX2MAX_API_KEY")
    with monkeypatch.context() as patch:
        # The terminal that is asked is the process's own, which tests have not.
        patch.setattr("getpass.getpass", lambda prompt: KEY)
        run = answering(monkeypatch, on_terminal)("batch", write("a cat"), *SMALL, "--yes")

    assert run.code == 0
    assert KEY not in run.out
