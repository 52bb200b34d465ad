"""The commands: their output, files and exit codes, on a terminal and through pipes."""

import asyncio
import contextlib
import json
import os
import re
import signal
import socket
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
from support.commands import KEY, Command, Run, finish, python, start, visible_lines
from support.responses import jpeg
from support.scripted import ScriptedGateway, answer, completed, running

from flux2max_async import __version__
from flux2max_async._downloads import retries
from flux2max_async.cli._demo import _wait_for_saves
from flux2max_async.emulator import Emulator, Fault

pytestmark = pytest.mark.usefixtures("empty_folder")


# ---------------------------------------------------------------------- the command as a whole


@pytest.mark.parametrize(
    "command",
    [
        (),
        *((name,) for name in ("generate", "status", "download", "batch", "journal", "gallery", "demo", "emulate")),
        *(("journal", name) for name in ("show", "prune")),
    ],
)
def test_help_fits_and_has_an_example(flux2max: Command, command: tuple[str, ...]) -> None:
    """The help of each command fits on 80 columns and ends with a one-line example."""
    run = flux2max(*command, "--help")

    assert run.code == 0
    assert run.out.rstrip().splitlines()[-1].startswith("  Example: flux2max ")
    assert all(len(line) <= 80 for line in run.out.splitlines())


def test_list_of_commands_on_a_narrow_terminal(flux2max: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """At 40 columns, what each command does is not cut."""
    monkeypatch.setenv("COLUMNS", "40")
    commands = flux2max("--help").out.partition("Commands:\n")[2].partition("\n\n")[0].splitlines()

    assert len(commands) == 8
    assert all(line.endswith(".") and not line.endswith("...") for line in commands)


def test_version(flux2max: Command) -> None:
    """--version prints the version and nothing else."""
    assert flux2max("--version") == Run(0, f"flux2max {__version__}\n", "")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shell_completion(shell: str) -> None:
    """Shells can complete the names of commands."""
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


def test_help_imports_little() -> None:
    """Showing help imports neither asyncio, rich, aiohttp, Pillow nor the emulator."""
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
        ("openpyxl", ["batch", "prompts.xlsx", "--emulator"], "excel"),
    ],
)
def test_missing_extra(module: str, arguments: list[str], extra: str) -> None:
    """If an optional package is missing, one line names the extra to install."""
    Path("prompts.xlsx").touch()
    run = python(
        f"import sys\nsys.argv = ['flux2max', *{arguments}]\nsys.modules[{module!r}] = None\n"
        "from flux2max_async.cli import main\nmain()"
    )

    assert run == Run(1, "", f"flux2max: {module} is missing: pip install 'flux2max_async[{extra}]'\n")


def test_missing_required_package() -> None:
    """A missing package that belongs to no extra raises its ModuleNotFoundError."""
    run = python(
        "import sys\nsys.argv = ['flux2max', 'generate', 'a cat']\nsys.modules['attrs'] = None\n"
        "from flux2max_async.cli import main\nmain()"
    )

    assert run.code == 1
    assert "Traceback" in run.err
    assert "pip install" not in run.err


# ---------------------------------------------------------------------- generate: success


def test_generate(flux2max: Command, service: Callable[..., Emulator]) -> None:
    """The picture is saved; its path goes to stdout; the task's id, duration, polls and cost go to stderr."""
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
        (["-o", "cat"], "cat", "JPEG"),
        (["-o", "cat.png", "--format", "jpeg"], "cat.png", "JPEG"),
    ],
)
def test_format_and_file_name(
    flux2max: Command, service: Callable[..., Emulator], arguments: list[str], name: str, kind: str
) -> None:
    """The format is that of --format, else of the file's suffix, else jpeg; the default file name has the task's id."""
    gateway = service()
    run = flux2max("generate", "a cat", "--width", "64", "--height", "64", *arguments)
    (task_id,) = gateway.tasks

    assert run.out == f"{name.format(id=task_id)}\n"
    with Image.open(run.out.strip()) as picture:
        assert picture.format == kind


def test_request_options(flux2max: Command, script: ScriptedGateway) -> None:
    """Options become the request's parameters; an image is sent as a URL if it has a scheme, else read from a file."""
    Image.new("RGB", (8, 8)).save("small.png")
    script.submits[0] = answer(400, {"message": "refused"})
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


def test_task_with_several_images(flux2max: Command, script: ScriptedGateway) -> None:
    """Each image of a task gets its own file; the cost is left out if the service doesn't report it."""
    contents = [{"type": "image", "url": f"{script.url}/{number}.jpeg"} for number in range(3)]
    script.polls[0] = answer(200, completed(output=[{"content": contents}], usage=None))
    script.downloads = deque(answer(200, jpeg(b"picture %d" % number)) for number in range(3))
    run = flux2max("generate", "a cat", "-o", "cat.jpeg")

    assert (run.code, run.out) == (0, "cat.jpeg\ncat-2.jpeg\ncat-3.jpeg\n")
    assert run.err.endswith(" s, 1 poll\n")
    assert [Path(name).read_bytes() for name in run.out.split()] == [
        jpeg(b"picture %d" % number) for number in range(3)
    ]


def test_unsafe_task_id(flux2max: Command, script: ScriptedGateway) -> None:
    """The default file name stays in the working folder, whatever the task's id contains."""
    task_id = "../é x\x1b[31m"
    script.submits[0] = answer(200, running(task_id))
    script.polls[0] = answer(200, completed(task_id, f"{script.url}/0.jpeg"))
    script.downloads[0] = answer(200, jpeg())
    run = flux2max("generate", "a cat")

    assert run.out == "flux2max-..-é-x-31m.jpeg\n"
    assert Path(run.out.strip()).read_bytes() == jpeg()
    assert run.err.startswith("task ../é x [31m submitted\n")


def test_long_task_id(flux2max: Command, script: ScriptedGateway) -> None:
    """A file system can store the default file name, however long the task's id is."""
    task_id = "é" * 500
    script.submits[0] = answer(200, running(task_id))
    script.polls[0] = answer(200, completed(task_id, f"{script.url}/0.jpeg"))
    script.downloads[0] = answer(200, jpeg())
    run = flux2max("generate", "a cat")

    assert (run.code, run.out) == (0, f"flux2max-{'é' * 60}.jpeg\n")
    assert run.err.startswith(f"task {'é' * 199}… submitted\n")


def test_retries_are_reported(flux2max: Command, service: Callable[..., Emulator]) -> None:
    """Each failed call that is retried is reported in a line, and the picture is saved."""
    gateway = service()
    gateway.script("submit", Fault.UNAVAILABLE)
    gateway.script("poll", Fault.GARBAGE)
    run = flux2max("generate", "a cat", "-o", "cat.jpeg")

    assert (run.code, run.out) == (0, "cat.jpeg\n")
    refused, submitted, failed_poll, _ = run.err.splitlines()
    assert refused.startswith("flux2max: submit not accepted")
    assert submitted.startswith("task ")
    assert failed_poll.startswith("flux2max: task ")


def test_generate_with_the_emulator(flux2max: Command) -> None:
    """--emulator needs no key and saves a real picture."""
    run = flux2max("generate", "a cat", "--emulator", "-o", "cat.png")

    assert (run.code, run.out) == (0, "cat.png\n")
    with Image.open("cat.png") as picture:
        assert (picture.format, picture.size) == ("PNG", (1024, 1024))


# ---------------------------------------------------------------------- generate: errors


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
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
def test_invalid_options(
    flux2max: Command,
    service: Callable[..., Emulator],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    environment: dict[str, str],
    message: str,
) -> None:
    """Invalid options and settings are reported in one line, with exit code 2, before anything is sent."""
    gateway = service()
    Path("letter.txt").write_text("Dear cat", encoding="utf-8")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    run = flux2max("generate", *arguments)

    assert (run.code, run.out) == (2, "")
    assert re.fullmatch(r"flux2max: [^\n]+\n", run.err)
    assert message in run.err
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
    """A command line that can't be parsed shows the usage, with exit code 2."""
    run = flux2max(*arguments)

    assert run.code == 2
    assert "Usage: flux2max" in run.out + run.err
    assert KEY not in run.out + run.err


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ("a cat [fail]", {}, "the model gave up"),
        ("a cat [moderate]", {}, "Request Moderated"),
        ("a cat", {"api_key": "another-key"}, "the API key is missing or wrong"),
        ("a cat", {"balance": Decimal(0)}, "insufficient balance"),
        ("a cat", {"faults": {Fault.RESET_AFTER: 1.0}}, "may exist and cost money"),
        ("a cat", {"faults": {Fault.SERVER_ERROR: 1.0}}, "may exist and cost money"),
        ("a cat", {"url_lifetime": -1.0}, "URL has expired"),
    ],
)
def test_failed_generation(
    flux2max: Command,
    service: Callable[..., Emulator],
    monkeypatch: pytest.MonkeyPatch,
    prompt: str,
    options: dict[str, Any],
    message: str,
) -> None:
    """A failure is reported in the last line, with exit code 1, and nothing is saved."""
    monkeypatch.setattr(retries, "RETRY_WINDOW", 0.1)
    service(**options)
    run = flux2max("generate", prompt)

    assert (run.code, run.out) == (1, "")
    *earlier, last = run.err.splitlines()
    assert all(re.fullmatch("task [0-9a-f]+ submitted", line) for line in earlier)
    assert last.startswith("flux2max: ")
    assert message in last
    assert KEY not in run.err
    assert not list(Path().iterdir())


def test_task_timeout(flux2max: Command, service: Callable[..., Emulator]) -> None:
    """A task that times out is paid for, so its id is reported."""
    gateway = service(seconds=60.0)
    run = flux2max("generate", "a cat", "--task-timeout", "0.3")
    (task_id,) = gateway.tasks

    assert run.code == 1
    assert run.err.splitlines()[-1].startswith(f"flux2max: task {task_id} has not ended within 0.3 s")


def test_no_connection(flux2max: Command, monkeypatch: pytest.MonkeyPatch, free_tcp_port: int) -> None:
    """An unreachable service is retried until the deadline, and each attempt is reported."""
    monkeypatch.setenv("FLUX2MAX_API_KEY", KEY)
    monkeypatch.setenv("FLUX2MAX_BASE_URL", f"http://127.0.0.1:{free_tcp_port}")
    run = flux2max("generate", "a cat", "--task-timeout", "1")

    assert run.code == 1
    assert all(line.startswith("flux2max: ") for line in run.err.splitlines())
    assert run.err.splitlines()[-1].startswith("flux2max: no connection")


def test_save_failure(flux2max: Command, service: Callable[..., Emulator]) -> None:
    """If a paid picture can't be written, the task's id is reported."""
    gateway = service()
    Path("file").touch()
    run = flux2max("generate", "a cat", "-o", "file/cat.jpeg")
    (task_id,) = gateway.tasks

    assert run.code == 1
    assert run.err.splitlines()[-1].startswith(f"flux2max: task {task_id} is completed, but not saved: can't write")


def make_output(kind: str) -> str:
    """Create something at the path of the output file, and return the path."""
    path = Path("cat.jpeg")
    target = Path("target")
    match kind.removeprefix("link to "):
        case "device":
            return "/dev/null"
        case "FIFO":
            os.mkfifo(target)
        case "socket":
            with socket.socket(socket.AF_UNIX) as server:
                server.bind(str(target))
        case "folder":
            target.mkdir()
        case "read-only file":
            target.touch()
            target.chmod(0o444)
        case "file":
            target.write_bytes(b"old")
        case "loop":
            target.symlink_to(target)
    if kind.startswith("link to "):
        path.symlink_to(target)
    else:
        target.rename(path)
    return str(path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this platform has no such files")
@pytest.mark.parametrize("command", ["generate", "download"])
@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("device", "it is not a regular file"),
        *(
            (f"{prefix}{kind}", "it is not a regular file")
            for prefix in ("", "link to ")
            for kind in ("FIFO", "socket")
        ),
        *((f"{prefix}folder", "") for prefix in ("", "link to ")),
        *((f"{prefix}read-only file", "it is read-only") for prefix in ("", "link to ")),
        ("link to loop", "Too many levels of symbolic links"),
    ],
)
def test_unsuitable_output(
    flux2max: Command, service: Callable[..., Emulator], command: str, kind: str, reason: str
) -> None:
    """Only regular files that can be written to are replaced; anything else is refused before anything is sent."""
    gateway = service()
    path = make_output(kind)
    before = Path(path).lstat()
    run = flux2max(command, "a cat", "-o", path)

    assert (run.code, run.out) == (2, "")
    if reason:
        assert run.err == f"flux2max: can't write to {path!r}: {reason}\n"
    assert not gateway.calls
    assert Path(path).lstat().st_ino == before.st_ino


@pytest.mark.parametrize("kind", ["file", "link to file", "link to nothing"])
def test_suitable_output(flux2max: Command, service: Callable[..., Emulator], kind: str) -> None:
    """An existing file is replaced with --force, and a link to a file is accepted."""
    service()
    path = make_output(kind)
    force = [] if kind == "link to nothing" else ["--force"]
    run = flux2max("generate", "a cat", "--width", "64", "--height", "64", "-o", path, *force)

    assert (run.code, run.out) == (0, f"{path}\n")
    with Image.open(path) as picture:
        assert picture.size == (64, 64)


def test_messages_of_the_service_are_sanitized(flux2max: Command, script: ScriptedGateway) -> None:
    """A message of the service can't contain line breaks, escape sequences or the API key."""
    script.submits[0] = answer(400, {"message": f"no\r\nway:\x1b[2J\x9b31m {script.api_key}"})
    run = flux2max("generate", "a cat")

    assert re.fullmatch(r"flux2max: no way: \[2J 31m \*\*\*[ -~]*\n", run.err)


# ---------------------------------------------------------------------- status and download


def test_status_and_download(flux2max: Command, service: Callable[..., Emulator]) -> None:
    """A task's id is enough to show its progress, cost and URL, and to save its picture."""
    gateway = service(seconds=3.0)
    flux2max("generate", "a cat", "--task-timeout", "0.5")
    (task_id,) = gateway.tasks
    running = flux2max("status", task_id)
    downloaded = flux2max("download", task_id, "-o", "cat.jpeg")
    ended = flux2max("status", task_id)
    as_json = flux2max("status", task_id, "--json")

    assert re.fullmatch(r"status   in progress, \d+%\ncreated  \d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC\n", running.out)
    assert (downloaded.code, downloaded.out) == (0, "cat.jpeg\n")
    assert re.fullmatch(r"\d\.\d s, \d+ polls?, already paid: \$0\.07\n", downloaded.err)
    with Image.open("cat.jpeg") as picture:
        assert picture.format == "JPEG"
    assert [line.split()[0] for line in ended.out.splitlines()] == ["status", "created", "cost", "url"]
    assert json.loads(as_json.out)["status"] == "completed"
    assert gateway.calls["submit"] == 1


@pytest.mark.parametrize(
    ("prompt", "message"), [("a cat [fail]", "the model gave up"), ("a cat [moderate]", "Request Moderated")]
)
def test_failed_task(flux2max: Command, service: Callable[..., Emulator], prompt: str, message: str) -> None:
    """`status` succeeds for a failed task and shows its error; `download` fails with the error."""
    gateway = service()
    flux2max("generate", prompt)
    (task_id,) = gateway.tasks
    status, downloaded = flux2max("status", task_id), flux2max("download", task_id)

    assert status.code == 0
    assert status.out.splitlines()[-1] == f"error    {message}"
    assert (downloaded.code, downloaded.err) == (1, f"flux2max: {message}\n")


@pytest.mark.parametrize("command", ["status", "download"])
def test_unknown_task(flux2max: Command, service: Callable[..., Emulator], command: str) -> None:
    """An id that the service doesn't know is reported as such."""
    service()
    run = flux2max(command, "nothing")

    assert (run.code, run.out) == (1, "")
    assert "no such task (HTTP 404" in run.err


@pytest.mark.parametrize("output_format", ["jpeg", "png"])
def test_inline_picture(flux2max: Command, service: Callable[..., Emulator], output_format: str) -> None:
    """A picture in the response is saved without a download, and `status` shows its length."""
    gateway = service()
    gateway.script("submit", Fault.INLINE_B64_JSON)
    generated = flux2max("generate", "a cat", "-o", "cat", "--format", output_format)
    task_id = next(iter(gateway.tasks))
    downloaded, status = flux2max("download", task_id), flux2max("status", task_id)

    assert (generated.code, downloaded.out) == (0, f"flux2max-{task_id}.{output_format}\n")
    with Image.open(downloaded.out.strip()) as picture:
        assert picture.format == output_format.upper()
    assert gateway.calls["download"] == 0
    assert re.fullmatch(r"url +\(inline, \d+ characters\)", status.out.splitlines()[-1])


def test_missing_pictures(flux2max: Command, service: Callable[..., Emulator]) -> None:
    """If moderation refused some of a task's pictures, the others are saved, and the reason is shown."""
    gateway = service()
    gateway.script("submit", Fault.PARTIAL)
    generated = flux2max("generate", "a cat", "-o", "cat.jpeg")
    status = flux2max("status", next(iter(gateway.tasks)))

    assert (generated.code, generated.out) == (0, "cat.jpeg\n")
    assert "further pictures are missing: " in generated.err.splitlines()[-1]
    assert "missing " in status.out


@pytest.mark.parametrize(("url", "name"), [("0.png?expires=7", "flux2max-t1.png"), ("picture", "flux2max-t1.jpeg")])
def test_download_file_name(flux2max: Command, script: ScriptedGateway, url: str, name: str) -> None:
    """The default file name has the task's id and the URL's suffix, else .jpeg; `status` skips missing values."""
    script.polls[0] = answer(200, completed("t1", f"{script.url}/{url}", usage=None, created_at=None))
    script.downloads[0] = answer(200, jpeg())
    run, status = flux2max("download", "t1"), flux2max("status", "t1")

    assert (run.code, run.out) == (0, f"{name}\n")
    assert Path(name).read_bytes() == jpeg()
    assert [line.split()[0] for line in status.out.splitlines()] == ["status", "url"]


# ---------------------------------------------------------------------- emulate


def test_emulate(flux2max: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The output of `emulate`, written to `.env`, is all that a batch needs; Ctrl-C ends it silently."""
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


def test_emulate_with_faults(tmp_path: Path) -> None:
    """--fault takes a name and a share."""
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
def test_invalid_faults(flux2max: Command, fault: str) -> None:
    """An unknown fault or an invalid share is reported with the names of all faults."""
    run = flux2max("emulate", "--fault", fault)

    assert (run.code, run.out) == (2, "")
    assert run.err.startswith(f"flux2max: {fault!r} must be like server_error=0.1; the faults are rate_limited, ")


# ---------------------------------------------------------------------- on a terminal


def test_generate_on_a_terminal(on_terminal: Command, service: Callable[..., Emulator]) -> None:
    """On a terminal, one line shows the task's status and progress, and is removed at the end."""
    gateway = service(seconds=2.0)
    gateway.script("poll", Fault.SERVER_ERROR)
    run = on_terminal("generate", "a cat", "-o", "cat.jpeg")
    lines = visible_lines(run.out)

    assert run.code == 0
    assert any(re.match(r"\S in progress, \d+% 0:00:0\d", line) for line in lines)
    assert lines[-2] == "cat.jpeg"
    assert all(len(line) <= 80 for line in lines)
    # Other messages are never written into the middle of the status line.
    assert any(line.startswith("task ") for line in lines)
    assert any(line.startswith("flux2max: task ") for line in lines)
    # The cursor is hidden once and shown again.
    assert run.out.count("\x1b[?25l") == run.out.count("\x1b[?25h") == 1


def test_demo_on_a_terminal(on_terminal: Command) -> None:
    """On a terminal, the demo shows a progress bar, counts, and a line for each failure."""
    Path("pictures/02-a-caravan-of-camels-in-the-dunes.jpeg").mkdir(parents=True)
    run = on_terminal("demo", "--count", "3", "--seconds", "0.1", "--out", "pictures")
    lines = visible_lines(run.out)

    assert run.code == 1
    assert any(line.startswith("━") and " 0 of 3 " in line for line in lines)
    assert any(line == "0 done, 0 failed, 3 in flight, 0 waiting" for line in lines)
    assert sum(line.startswith("failed 02-a-caravan-of-camels-in-the-dunes: can't write") for line in lines) == 1
    assert not any(line.startswith("saved ") for line in lines)
    assert lines[-4] == "2 of 3 pictures are saved in pictures"
    assert lines[-3].startswith("to view them: file:///")
    assert lines[-2:] == [
        "next: flux2max batch pictures/prompts.txt --emulator", "flux2max: 1 of 3 pictures failed"
    ]  # fmt: skip
    assert all(len(line) <= 80 for line in lines if not line.startswith(("failed ", "to view them: ")))
    assert run.out.count("\x1b[?25l") == run.out.count("\x1b[?25h") == 1


# ---------------------------------------------------------------------- pipes and Ctrl-C


def test_demo_through_a_pipe(flux2max: Command) -> None:
    """Through a pipe, the demo prints a plain line for each saved picture and the summary, and saves the pictures."""
    run = flux2max("demo", "--count", "2", "--seconds", "0.1")
    lines = run.out.splitlines()
    files = sorted(Path("flux2max-demo").glob("*.jpeg"))
    page = Path("flux2max-demo/index.html")

    assert (run.code, run.err) == (0, "")
    assert "\x1b" not in run.out
    assert [file.name for file in files] == ["01-a-lighthouse-at-dawn.jpeg", "02-a-caravan-of-camels-in-the-dunes.jpeg"]
    assert {line.split(" (")[0] for line in lines[:2]} == {f"saved {file.name}" for file in files}
    assert all(re.search(r" \(\d\.\d s, (1 poll|\d polls)\)$", line) for line in lines[:2])
    assert [name.strip() for name in lines[3].split("┃")[1:-1]] == [
        *("done", "failed", "wall seconds", "seconds per task", "polls per task", "spent")
    ]
    assert re.fullmatch(r"│ +2 │ +0 │ +\d\.\d │ +\d\.\d │ +\d\.\d │ +\$0\.14 │", lines[5])
    assert lines[7:] == [
        "2 of 2 pictures are saved in flux2max-demo",
        f"to view them: {page.resolve().as_uri()}",
        "next: flux2max batch flux2max-demo/prompts.txt --emulator",
    ]
    assert all(f'"url":"{file.name}"' in page.read_text(encoding="utf-8") for file in files)
    for file in files:
        with Image.open(file) as picture:
            picture.load()


def test_failing_demo(flux2max: Command) -> None:
    """Each failure is reported in a line; repeated prompts are numbered; the exit code is 1."""
    run = flux2max("demo", "--count", "26", "--seconds", "0.1", "--failing", "1", "--out", "pictures")
    failed = re.findall(r"^failed (\S+): the model gave up$", run.out, re.MULTILINE)

    assert (run.code, run.err) == (1, "flux2max: 26 of 26 pictures failed\n")
    assert len(set(failed)) == len(failed) == 26
    assert {"01-a-lighthouse-at-dawn", "25-a-lighthouse-at-dawn-no-2"} < set(failed)
    assert run.out.endswith("0 of 26 pictures are saved in pictures\n")


def test_broken_pipe(tmp_path: Path) -> None:
    """`flux2max demo | head` ends by itself, without a message about the broken pipe."""
    process = start("demo", "--count", "2", "--seconds", "0.1", cwd=tmp_path)
    assert process.stdout is not None
    assert process.stderr is not None
    with process:
        process.stdout.close()

        assert process.stderr.read() == ""
        assert process.wait(timeout=60) == 1
    assert len(list((tmp_path / "flux2max-demo").iterdir())) == 2


@pytest.mark.skipif(sys.platform == "win32", reason="Windows can't send Ctrl-C to a single process")
def test_ctrl_c_in_demo(tmp_path: Path) -> None:
    """Ctrl-C ends the demo with code 130 and a line with the number of saved pictures; no partial file is left."""
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


@pytest.mark.parametrize("cancel_at", [0.5, None])
async def test_wait_for_saves_survives_cancellation(cancel_at: float | None) -> None:
    """The wait for the last saves completes even if it is cancelled."""
    saved: list[int] = []

    async def save() -> None:
        await asyncio.sleep(1.0)
        saved.append(1)

    saves = {asyncio.create_task(save()) for _ in range(3)}
    waiting = asyncio.ensure_future(_wait_for_saves(saves))
    if cancel_at is not None:
        await asyncio.sleep(cancel_at)
        waiting.cancel()
    with pytest.raises(asyncio.CancelledError) if cancel_at else contextlib.nullcontext():
        await waiting

    assert len(saved) == 3


@pytest.mark.skipif(sys.platform == "win32", reason="Windows can't send Ctrl-C to a single process")
def test_ctrl_c_in_generate(service: Callable[..., Emulator], tmp_path: Path) -> None:
    """Ctrl-C ends `generate` with code 130 and reports the id of the task, which is paid for."""
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
        "flux2max: stopped: unfinished tasks continue at the service; flux2max download TASK_ID saves the picture\n",
    )
