"""The command line: what it says, saves and exits with, on a terminal and down a pipe."""

import asyncio
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from base64 import b64decode
from collections import deque
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from support.commands import KEY, Command, Run, finish, lines_of, python, start
from support.scripted import ScriptedGateway, answer, completed, running

from flux2max_async import __version__
from flux2max_async.cli._demo import _all_of
from flux2max_async.emulator import Emulator, Fault

pytestmark = pytest.mark.usefixtures("empty_folder")


# ---------------------------------------------------------------------- the command itself


@pytest.mark.parametrize(
    "command",
    [(), *((name,) for name in ("generate", "status", "fetch", "batch", "journal", "gallery", "demo", "emulate"))],
)
def test_help_fits_and_shows_an_example(flux2max: Command, command: tuple[str, ...]) -> None:
    """The help of each command fits on 80 columns and ends with an example on one line."""
    run = flux2max(*command, "--help")

    assert run.code == 0
    assert run.out.rstrip().splitlines()[-1].startswith("  Example: flux2max ")
    assert all(len(line) <= 80 for line in run.out.splitlines())


def test_version(flux2max: Command) -> None:
    """--version says the version, and nothing else."""
    assert flux2max("--version") == Run(0, f"flux2max {__version__}\n", "")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(shell: str) -> None:
    """Shells complete the names of commands."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", "from flux2max_async.cli import main; main()"],
        env={
            **os.environ,
            "_FLUX2MAX_COMPLETE": f"complete_{shell}",
            "COMP_WORDS": "flux2max ba",
            "COMP_CWORD": "1",
            "_TYPER_COMPLETE_ARGS": "flux2max ba",
            "_TYPER_COMPLETE_FISH_ACTION": "get-args",
        },
        capture_output=True,
        text=True,
        check=False,
    )

    assert "batch" in done.stdout
    assert "gallery" not in done.stdout


def test_help_is_cheap() -> None:
    """Neither rich, nor the HTTP client, nor the emulator nor Pillow is imported before a command runs."""
    run = python(
        "import sys\n"
        "sys.argv = ['flux2max', 'generate', '--help']\n"
        "from flux2max_async.cli import main\n"
        "try: main()\n"
        "finally: print(sorted({'aiohttp', 'PIL', 'asyncio', 'rich.console', 'flux2max_async.emulator'} & {*sys.modules}))"
    )

    assert run.code == 0
    assert run.out.endswith("[]\n")


@pytest.mark.parametrize(
    ("module", "arguments", "extra"),
    [
        ("typer", ["--help"], "cli"),
        ("rich", ["generate", "a cat"], "cli"),
        ("jinja2", ["batch", "prompts.txt"], "cli"),
        ("PIL", ["demo"], "emulator"),
    ],
)
def test_a_missing_extra_is_named(module: str, arguments: list[str], extra: str) -> None:
    """Without an extra that is needed, one line says how to install it."""
    run = python(
        f"import sys\nsys.argv = ['flux2max', *{arguments}]\nsys.modules[{module!r}] = None\n"
        "from flux2max_async.cli import main\nmain()"
    )

    assert run == Run(1, "", f"flux2max: {module} is missing: pip install 'flux2max_async[{extra}]'\n")


def test_a_broken_installation_is_not_a_missing_extra() -> None:
    """A module that no extra brings is missed aloud."""
    run = python(
        "import sys\nsys.argv = ['flux2max', 'generate', 'a cat']\nsys.modules['attrs'] = None\n"
        "from flux2max_async.cli import main\nmain()"
    )

    assert run.code == 1
    assert "Traceback" in run.err
    assert "pip install" not in run.err


# ---------------------------------------------------------------------- generate: what comes out


def test_a_picture_is_generated(flux2max: Command, service: Callable[..., Emulator]) -> None:
    """The path goes to stdout; the task's id, its seconds, polls and cost go to stderr; the picture is there."""
    gateway = service()
    run = flux2max("generate", "a lighthouse at dawn", "-o", "new folder/lighthouse.jpeg")
    (task,) = gateway.tasks.values()

    assert (run.code, run.out) == (0, f"{Path('new folder/lighthouse.jpeg')}\n")
    submitted, result = run.err.splitlines()
    assert submitted == f"task {task.id} submitted"
    assert re.fullmatch(r"0\.\d s, (1 poll|\d polls), \$0\.07", result)
    assert task.prompt == "a lighthouse at dawn"
    with Image.open("new folder/lighthouse.jpeg") as picture:
        assert picture.format == "JPEG"


@pytest.mark.parametrize(
    ("arguments", "name", "kind"),
    [
        ([], "flux2max-{id}.jpeg", "JPEG"),
        (["--format", "png"], "flux2max-{id}.png", "PNG"),
        (["-o", "cat.PNG"], "cat.PNG", "PNG"),
        (["-o", "cat.jpg"], "cat.jpg", "JPEG"),
        (["-o", "cat.picture"], "cat.picture", "JPEG"),
        (["-o", "cat.png", "--format", "jpeg"], "cat.png", "JPEG"),
    ],
)
def test_the_format_and_the_name(
    flux2max: Command, service: Callable[..., Emulator], arguments: list[str], name: str, kind: str
) -> None:
    """--format decides, else the file's ending, else it is jpeg; a file without a name is named after its task."""
    gateway = service()
    run = flux2max("generate", "a cat", "--width", "64", "--height", "64", *arguments)
    (task_id,) = gateway.tasks

    assert run.out == f"{name.format(id=task_id)}\n"
    with Image.open(run.out.strip()) as picture:
        assert picture.format == kind


def test_every_parameter_is_sent(flux2max: Command, script: ScriptedGateway) -> None:
    """Options become the request's parameters; an image is a URL where it looks like one, and a file elsewhere."""
    Image.new("RGB", (8, 8)).save("small.png")
    script.submits[0] = answer(400, {"message": "enough seen"})
    flux2max(
        *("generate", "a cat", "--width", "640", "--height", "480", "--seed", "7", "--safety-tolerance", "5"),
        *("--format", "png", "-i", "HTTPS://pictures.example/1.png", "--image", "small.png"),
    )
    params = script.received[0].params

    assert b64decode(params.pop("input_image_2")) == Path("small.png").read_bytes()
    assert params == {
        "prompt": "a cat",
        "width": 640,
        "height": 480,
        "seed": 7,
        "safety_tolerance": 5,
        "output_format": "png",
        "input_image": "HTTPS://pictures.example/1.png",
    }


def test_several_pictures_of_one_task(flux2max: Command, script: ScriptedGateway) -> None:
    """Each picture of a task has a file of its own; a cost that the service doesn't tell isn't told."""
    contents = [{"type": "image", "url": f"{script.url}/{number}.jpeg"} for number in range(3)]
    script.polls[0] = answer(200, completed(output=[{"content": contents}], usage=None))
    script.downloads = deque(answer(200, f"picture {number}".encode()) for number in range(3))
    run = flux2max("generate", "a cat", "-o", "cat.jpeg")

    assert (run.code, run.out) == (0, "cat.jpeg\ncat-2.jpeg\ncat-3.jpeg\n")
    assert run.err.endswith(" s, 1 poll\n")
    assert [Path(name).read_text() for name in run.out.split()] == ["picture 0", "picture 1", "picture 2"]


def test_a_task_id_can_be_anything(flux2max: Command, script: ScriptedGateway) -> None:
    """A file that is named after its task stays in this folder, whatever the id is."""
    odd = "../é x\x1b[31m"
    script.submits[0] = answer(200, running(odd))
    script.polls[0] = answer(200, completed(odd, f"{script.url}/0.jpeg"))
    script.downloads[0] = answer(200, b"picture")
    run = flux2max("generate", "a cat")

    assert run.out == "flux2max-..-é-x-31m.jpeg\n"
    assert Path(run.out.strip()).read_bytes() == b"picture"
    assert run.err.startswith("task ../é x [31m submitted\n")


def test_a_call_that_is_made_again_is_told(flux2max: Command, service: Callable[..., Emulator]) -> None:
    """What the service has trouble with is said in a line each, and the picture still comes."""
    gateway = service()
    gateway.script("submit", Fault.UNAVAILABLE)
    gateway.script("poll", Fault.GARBAGE)
    run = flux2max("generate", "a cat", "-o", "cat.jpeg")

    assert (run.code, run.out) == (0, "cat.jpeg\n")
    refused, submitted, missed, _ = run.err.splitlines()
    assert refused.startswith("flux2max: submit not accepted")
    assert submitted.startswith("task ")
    assert missed.startswith("flux2max: task ")


def test_generate_with_the_emulator(flux2max: Command) -> None:
    """--emulator needs no key and brings a real picture."""
    run = flux2max("generate", "a cat", "--emulator", "-o", "cat.png")

    assert (run.code, run.out) == (0, "cat.png\n")
    with Image.open("cat.png") as picture:
        assert (picture.format, picture.size) == ("PNG", (1024, 1024))


# ---------------------------------------------------------------------- generate: what goes wrong


@pytest.mark.parametrize(
    ("arguments", "environment", "said"),
    [
        ([" "], {}, "prompt must not be blank"),
        (["a cat", "--width", "10"], {}, "width must be at least 64"),
        (["a cat", "--safety-tolerance", "6"], {}, "safety_tolerance must be from 0"),
        (["a cat", "--task-timeout", "0"], {}, "task_timeout must be more than 0"),
        (["a cat", "-i", "nothing.png"], {}, "can't read 'nothing.png'"),
        (["a cat", "-i", "letter.txt"], {}, "'letter.txt' is not a PNG"),
        (["a cat", "-i", "http://"], {}, "'http://' is neither"),
        (["a cat", *["-i", "https://pictures.example/1.png"] * 9], {}, "at most 8"),
        (["a cat"], {"FLUX2MAX_API_KEY": ""}, "set FLUX2MAX_API_KEY"),
        (["a cat"], {"FLUX2MAX_API_KEY": f"{KEY} "}, "the API key is malformed"),
        (["a cat"], {"FLUX2MAX_BASE_URL": "http://gateway.example"}, "base_url must be https"),
    ],
)
def test_wrong_use(
    flux2max: Command,
    service: Callable[..., Emulator],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    environment: dict[str, str],
    said: str,
) -> None:
    """What can't work is told in one line, with exit code 2, before anything is sent."""
    gateway = service()
    Path("letter.txt").write_text("Dear cat", encoding="utf-8")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    run = flux2max("generate", *arguments)

    assert (run.code, run.out) == (2, "")
    assert re.fullmatch(r"flux2max: [^\n]+\n", run.err)
    assert said in run.err
    assert KEY not in run.err
    assert not gateway.calls


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["paint"],
        ["generate"],
        ["generate", "a cat", "--api-key", KEY],
        ["generate", "a cat", "--format", "gif"],
        ["generate", "a cat", "-o", "."],
        ["demo", "--count", "0"],
        ["demo", "--failing", "2"],
    ],
)
def test_usage_errors(flux2max: Command, arguments: list[str]) -> None:
    """A command line that can't be read shows how it is used, with exit code 2."""
    run = flux2max(*arguments)

    assert run.code == 2
    assert "Usage: flux2max" in run.out + run.err
    assert KEY not in run.out + run.err


@pytest.mark.parametrize(
    ("prompt", "options", "said"),
    [
        ("a cat [fail]", {}, "the model gave up"),
        ("a cat [moderate]", {}, "Request Moderated"),
        ("a cat", {"api_key": "another-key"}, "the API key is missing or wrong"),
        ("a cat", {"balance": Decimal(0)}, "insufficient balance"),
        ("a cat", {"faults": {Fault.RESET_AFTER: 1.0}}, "may exist and cost money"),
        ("a cat", {"faults": {Fault.SERVER_ERROR: 1.0}}, "may exist and cost money"),
        ("a cat", {"url_lifetime": -1.0}, "url has expired"),
    ],
)
def test_failures(
    flux2max: Command, service: Callable[..., Emulator], prompt: str, options: dict[str, Any], said: str
) -> None:
    """A picture that doesn't come is told in one last line, with exit code 1, and nothing is saved."""
    service(**options)
    run = flux2max("generate", prompt)

    assert (run.code, run.out) == (1, "")
    *before, last = run.err.splitlines()
    assert all(re.fullmatch("task [0-9a-f]+ submitted", line) for line in before)
    assert last.startswith("flux2max: ")
    assert said in last
    assert KEY not in run.err
    assert not list(Path().iterdir())


def test_a_deadline_that_passes_names_the_task(flux2max: Command, service: Callable[..., Emulator]) -> None:
    """When the task takes too long, its id is told: the work is paid for."""
    gateway = service(seconds=60.0)
    run = flux2max("generate", "a cat", "--task-timeout", "0.3")
    (task_id,) = gateway.tasks

    assert run.code == 1
    assert run.err.splitlines()[-1].startswith(f"flux2max: task {task_id} has not ended within 0.3 s")


def test_no_connection(flux2max: Command, monkeypatch: pytest.MonkeyPatch, free_tcp_port: int) -> None:
    """A service that isn't there is tried until the deadline, and each try is told."""
    monkeypatch.setenv("FLUX2MAX_API_KEY", KEY)
    monkeypatch.setenv("FLUX2MAX_BASE_URL", f"http://127.0.0.1:{free_tcp_port}")
    run = flux2max("generate", "a cat", "--task-timeout", "1")

    assert run.code == 1
    assert all(line.startswith("flux2max: ") for line in run.err.splitlines())
    assert run.err.splitlines()[-1].startswith("flux2max: no connection")


def test_a_picture_that_cannot_be_saved_names_the_task(flux2max: Command, service: Callable[..., Emulator]) -> None:
    """A picture that is paid for and can't be written is told with the task's id."""
    gateway = service()
    Path("file").touch()
    run = flux2max("generate", "a cat", "-o", "file/cat.jpeg")
    (task_id,) = gateway.tasks

    assert run.code == 1
    assert run.err.splitlines()[-1].startswith(f"flux2max: task {task_id} is completed, but not saved: can't write")


def test_what_the_service_says_stays_in_its_line(flux2max: Command, script: ScriptedGateway) -> None:
    """A message of the service can neither break the line, nor steer the terminal, nor show the key."""
    script.submits[0] = answer(400, {"message": f"no\r\nway:\x1b[2J\x9b31m {script.api_key}"})
    run = flux2max("generate", "a cat")

    assert re.fullmatch(r"flux2max: no way: \[2J 31m \*\*\*[ -~]*\n", run.err)


# ---------------------------------------------------------------------- a task by its id


def test_a_task_is_looked_at(flux2max: Command, service: Callable[..., Emulator]) -> None:
    """A task's status is told from anywhere, by its id: how far it is, what it cost, where its picture is."""
    gateway = service(seconds=3.0)
    flux2max("generate", "a cat", "--task-timeout", "0.5")
    (task_id,) = gateway.tasks
    running = flux2max("status", task_id)
    fetched = flux2max("fetch", task_id, "-o", "cat.jpeg")
    ended = flux2max("status", task_id)
    as_json = flux2max("status", task_id, "--json")

    assert re.fullmatch(r"status   in progress, \d+%\ncreated  \d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC\n", running.out)
    assert (fetched.code, fetched.out) == (0, "cat.jpeg\n")
    assert re.fullmatch(r"\d\.\d s, \d+ polls?, \$0\.07\n", fetched.err)
    with Image.open("cat.jpeg") as picture:
        assert picture.format == "JPEG"
    assert [line.split()[0] for line in ended.out.splitlines()] == ["status", "created", "cost", "url"]
    assert json.loads(as_json.out)["status"] == "completed"
    assert gateway.calls["submit"] == 1


@pytest.mark.parametrize(
    ("prompt", "said"), [("a cat [fail]", "the model gave up"), ("a cat [moderate]", "Request Moderated")]
)
def test_a_task_that_failed(flux2max: Command, service: Callable[..., Emulator], prompt: str, said: str) -> None:
    """That a task has failed is an answer to a question about it, and the end of fetching its picture."""
    gateway = service()
    flux2max("generate", prompt)
    (task_id,) = gateway.tasks
    status, fetched = flux2max("status", task_id), flux2max("fetch", task_id)

    assert status.code == 0
    assert status.out.splitlines()[-1] == f"error    {said}"
    assert (fetched.code, fetched.err) == (1, f"flux2max: {said}\n")


@pytest.mark.parametrize("command", ["status", "fetch"])
def test_a_task_that_nobody_knows(flux2max: Command, service: Callable[..., Emulator], command: str) -> None:
    """An id that the service doesn't know is told as such."""
    service()
    run = flux2max(command, "nothing")

    assert (run.code, run.out) == (1, "")
    assert "no such task (HTTP 404" in run.err


@pytest.mark.parametrize(("url", "name"), [("0.png?expires=7", "flux2max-t1.png"), ("picture", "flux2max-t1.jpeg")])
def test_a_fetched_picture_is_named_after_its_task(
    flux2max: Command, script: ScriptedGateway, url: str, name: str
) -> None:
    """Without a name, the url tells the ending, or it is jpeg; what the service leaves out isn't told."""
    script.polls[0] = answer(200, completed("t1", f"{script.url}/{url}", usage=None, created_at=None))
    script.downloads[0] = answer(200, b"picture")
    run, status = flux2max("fetch", "t1"), flux2max("status", "t1")

    assert (run.code, run.out) == (0, f"{name}\n")
    assert Path(name).read_bytes() == b"picture"
    assert [line.split()[0] for line in status.out.splitlines()] == ["status", "url"]


# ---------------------------------------------------------------------- the emulator, by hand


def test_the_emulator_by_hand(flux2max: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What the emulator prints, written into `.env`, is all that a batch needs; Ctrl-C ends it without a word."""
    process = start("emulate", "--port", "0", "--seconds", "0.1", "--balance", "0.14", "--seed", "1", cwd=tmp_path)
    assert process.stdout is not None
    Path(".env").write_text(process.stdout.readline() + process.stdout.readline(), encoding="utf-8")
    Path("prompts.txt").write_text("a cat\na dog\n", encoding="utf-8")
    run = flux2max("batch", "prompts.txt", "--width", "64", "--height", "64")
    empty = flux2max("generate", "an owl")
    process.send_signal(signal.SIGINT)

    assert run.code == 0
    assert "insufficient balance" in empty.err
    assert finish(process) == Run(0, "", "")


def test_an_emulator_that_misbehaves(tmp_path: Path) -> None:
    """Faults are given by name and share."""
    process = start("emulate", "--port", "0", "--fault", "server_error=1", cwd=tmp_path)
    assert process.stdout is not None
    url, key = (process.stdout.readline().strip().partition("=")[2] for _ in range(2))
    request = urllib.request.Request(f"{url}/model/v1/generation/task/t1", headers={"Authorization": f"Bearer {key}"})
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(request)
    caught.value.close()
    process.send_signal(signal.SIGINT)

    assert caught.value.code == 500
    assert finish(process).code == 0


@pytest.mark.parametrize("fault", ["sloth=0.1", "server_error", "server_error=2", "server_error=much", ""])
def test_faults_that_there_are_not(flux2max: Command, fault: str) -> None:
    """What is no fault, or no share, is told with those that there are."""
    run = flux2max("emulate", "--fault", fault)

    assert (run.code, run.out) == (2, "")
    assert run.err.startswith(f"flux2max: {fault!r} must look like server_error=0.1; the faults are rate_limited, ")


# ---------------------------------------------------------------------- on a terminal


def test_a_task_lives_on_a_terminal(on_terminal: Command, service: Callable[..., Emulator]) -> None:
    """On a terminal one line shows the task's status and progress, and is gone at the end."""
    gateway = service(seconds=2.0)
    gateway.script("poll", Fault.SERVER_ERROR)
    run = on_terminal("generate", "a cat", "-o", "cat.jpeg")
    lines = lines_of(run.out)

    assert run.code == 0
    assert any(re.match(r"\S in progress, \d+% 0:00:0\d", line) for line in lines)
    assert lines[-2] == "cat.jpeg"
    assert all(len(line) <= 80 for line in lines)
    # Nothing else is written into the middle of the line that lives.
    assert any(line.startswith("task ") for line in lines)
    assert any(line.startswith("flux2max: task ") for line in lines)
    # The cursor is there again.
    assert run.out.count("\x1b[?25l") == run.out.count("\x1b[?25h") == 1


def test_the_demo_lives_on_a_terminal(on_terminal: Command) -> None:
    """On a terminal the demo shows a bar and its numbers, and pictures that fail in a line each."""
    Path("pictures/02-a-caravan-of-camels-in-the-dunes.jpeg").mkdir(parents=True)
    run = on_terminal("demo", "--count", "3", "--seconds", "0.1", "--out", "pictures")
    lines = lines_of(run.out)

    assert run.code == 1
    assert any(line.startswith("━") and " 0 of 3 " in line for line in lines)
    assert any(line == "0 done, 0 failed, 3 in flight, 0 waiting" for line in lines)
    assert sum(line.startswith("failed 02-a-caravan-of-camels-in-the-dunes: can't write") for line in lines) == 1
    assert not any(line.startswith("saved ") for line in lines)
    assert lines[-2:] == ["2 of 3 pictures are saved in pictures", "flux2max: 1 of 3 pictures failed"]
    assert all(len(line) <= 80 for line in lines if not line.startswith("failed "))
    assert run.out.count("\x1b[?25l") == run.out.count("\x1b[?25h") == 1


# ---------------------------------------------------------------------- down a pipe, and Ctrl-C


def test_the_demo_down_a_pipe(flux2max: Command) -> None:
    """Down a pipe, the demo says each saved picture and the summary in plain lines, and the pictures are there."""
    run = flux2max("demo", "--count", "2", "--seconds", "0.1")
    lines = run.out.splitlines()
    files = sorted(Path("flux2max-demo").iterdir())

    assert (run.code, run.err) == (0, "")
    assert "\x1b" not in run.out
    assert [file.name for file in files] == ["01-a-lighthouse-at-dawn.jpeg", "02-a-caravan-of-camels-in-the-dunes.jpeg"]
    assert {line.split(" (")[0] for line in lines[:2]} == {f"saved {file.name}" for file in files}
    assert all(re.search(r" \(\d\.\d s, (1 poll|\d polls)\)$", line) for line in lines[:2])
    assert [name.strip() for name in lines[3].split("┃")[1:-1]] == [
        *("done", "failed", "wall seconds", "seconds per task", "polls per task", "spent")
    ]
    assert re.fullmatch(r"│ +2 │ +0 │ +\d\.\d │ +\d\.\d │ +\d\.\d │ +\$0\.14 │", lines[5])
    assert lines[-1] == "2 of 2 pictures are saved in flux2max-demo"
    for file in files:
        with Image.open(file) as picture:
            picture.load()


def test_a_demo_that_fails(flux2max: Command) -> None:
    """Pictures that fail are told in a line each; prompts that come again are numbered; the exit code is 1."""
    run = flux2max("demo", "--count", "26", "--seconds", "0.1", "--failing", "1", "--out", "pictures")
    failed = re.findall(r"^failed (\S+): the model gave up$", run.out, re.MULTILINE)

    assert (run.code, run.err) == (1, "flux2max: 26 of 26 pictures failed\n")
    assert len(set(failed)) == len(failed) == 26
    assert {"01-a-lighthouse-at-dawn", "25-a-lighthouse-at-dawn-no-2"} < set(failed)
    assert run.out.endswith("0 of 26 pictures are saved in pictures\n")


def test_a_pipe_that_nobody_reads(tmp_path: Path) -> None:
    """`flux2max demo | head` ends by itself, and says nothing of the pipe."""
    process = start("demo", "--count", "2", "--seconds", "0.1", cwd=tmp_path)
    assert process.stdout is not None
    assert process.stderr is not None
    with process:
        process.stdout.close()

        assert process.stderr.read() == ""
        assert process.wait(timeout=60) == 1
    assert len(list((tmp_path / "flux2max-demo").iterdir())) == 2


@pytest.mark.skipif(sys.platform == "win32", reason="Ctrl-C can't be sent to one process alone")
def test_ctrl_c_ends_the_demo(tmp_path: Path) -> None:
    """Ctrl-C ends the demo with code 130 and one line that says what is saved; no half-written file stays."""
    process = start("demo", "--seconds", "2", cwd=tmp_path)
    assert process.stdout is not None
    first = process.stdout.readline()
    process.send_signal(signal.SIGINT)
    run = finish(process)
    saved = 1 + run.out.count("saved ")

    assert first.startswith("saved ")
    assert run.code == 130
    assert run.err == f"flux2max: stopped: {saved} of 24 pictures are saved in flux2max-demo\n"
    assert len(list((tmp_path / "flux2max-demo").iterdir())) == saved


@pytest.mark.parametrize("moment", [0.5, None])
async def test_what_has_come_is_saved(moment: float | None) -> None:
    """Whoever is cancelled while the last pictures are being saved waits for them all the same."""
    saved: list[int] = []

    async def save() -> None:
        await asyncio.sleep(1.0)
        saved.append(1)

    saving = {asyncio.create_task(save()) for _ in range(3)}
    waiting = asyncio.ensure_future(_all_of(saving))
    if moment is not None:
        await asyncio.sleep(moment)
        waiting.cancel()
    with pytest.raises(asyncio.CancelledError) if moment else contextlib.nullcontext():
        await waiting

    assert len(saved) == 3


@pytest.mark.skipif(sys.platform == "win32", reason="Ctrl-C can't be sent to one process alone")
def test_ctrl_c_names_the_task(service: Callable[..., Emulator], tmp_path: Path) -> None:
    """Ctrl-C ends a generation with code 130, and the task that is paid for is named."""
    gateway = service(seconds=60.0)
    process = start("generate", "a cat", cwd=tmp_path)
    assert process.stderr is not None
    submitted = process.stderr.readline()
    process.send_signal(signal.SIGINT)
    run = finish(process)
    (task_id,) = gateway.tasks

    assert submitted == f"task {task_id} submitted\n"
    assert run == Run(
        130,
        "",
        f"flux2max: session closed; unfinished tasks: {task_id}\n"
        "flux2max: stopped: what is unfinished goes on; flux2max fetch TASK_ID saves it\n",
    )
