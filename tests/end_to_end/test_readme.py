"""Run the README's examples as a reader would."""

import json
import os
import re
import shlex
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from PIL import Image
from support.ports import free_port

from flux2max_async.emulator import Emulator

ROOT = Path(__file__).parents[2]
OTHERS = {"deployment.md"}
"""Pages whose examples have tests of their own."""
PAGES = [ROOT / "README.md", *sorted(path for path in (ROOT / "docs").glob("*.md") if path.name not in OTHERS)]


def examples(path: Path) -> dict[str, str]:
    """Return the Python examples of a page by the headings that they stand under."""
    found: dict[str, str] = {}
    heading = ""
    for match in re.finditer(
        r"^```(\w*)\n(.*?)^```$|^#+ ([^\n]*)$", path.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    ):
        heading = match[3] or heading
        if match[1] == "python":
            assert heading not in found, "each example has a heading of its own"
            found[heading] = match[2]
    return found


EXAMPLES = {heading: code for path in PAGES for heading, code in examples(path).items()}
WEB_EXAMPLE = EXAMPLES["In a web backend"]
JPEG = b"\xff\xd8\xff"
TEST_EXAMPLE = EXAMPLES["Testing your own code"]
(CONSOLE_EXAMPLE,) = re.findall(r"```console\n(.*?)```", PAGES[0].read_text(encoding="utf-8"), re.DOTALL)


@pytest.fixture
def environment() -> Iterator[dict[str, str]]:
    """Provide an environment with an API key, for a service whose tasks take half a second."""
    with Emulator(seconds=0.5, spread=0.1, seed=1) as gateway:
        yield {**os.environ, "FLUX2MAX_API_KEY": gateway.api_key, "FLUX2MAX_BASE_URL": gateway.url}


def test_all_examples_are_run() -> None:
    """Every example of the README and of the documentation is run by a test below, which names its heading."""
    tested = Path(__file__).read_text(encoding="utf-8")
    needs_servers = (ROOT / "tests/machines/test_readme_hosts.py").read_text(encoding="utf-8")
    untested = [heading for heading in EXAMPLES if f'"{heading}"' not in tested]

    assert len(EXAMPLES) == 11
    assert [heading for heading in untested if f"## {heading}" not in needs_servers] == []


def test_links() -> None:
    """Each relative link leads to a file, and each anchor to a heading of it."""
    for path in [*PAGES, *(ROOT / "docs").glob("*.md"), *(ROOT / name for name in ("CONTRIBUTING.md", "SECURITY.md"))]:
        for target in re.findall(r"\]\((?!https?:)([^)]+)\)", path.read_text(encoding="utf-8")):
            name, _, anchor = target.partition("#")
            page = (path.parent / name) if name else path
            assert page.exists(), (path.name, target)
            if anchor:
                headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
                assert anchor in {heading.lower().replace(" ", "-") for heading in headings}, (path.name, target)


@pytest.mark.parametrize(
    ("script", "pictures", "output"),
    [
        pytest.param(EXAMPLES["flux2max_async"], {"lighthouse.jpeg": (1024, 768)}, "", id="one picture"),
        pytest.param(
            EXAMPLES["Many pictures"],
            {f"pictures/{animal}.jpeg": (1024, 1024) for animal in ("fox", "heron", "hedgehog")},
            "completed=3",
            id="many pictures",
        ),
        pytest.param(
            EXAMPLES["Input images"], {"sketch.png": (1024, 1024), "oak.jpeg": (1024, 1024)}, "", id="pictures in"
        ),
        pytest.param(EXAMPLES["Results as values"], {}, "True", id="values"),
        pytest.param(EXAMPLES["Following one task"], {}, "0.07 dollars", id="one task"),
        pytest.param(EXAMPLES["When it polls"], {}, "half of the tasks take up to", id="kept schedule"),
    ],
)
def test_script(
    environment: dict[str, str], tmp_path: Path, script: str, pictures: dict[str, tuple[int, int]], output: str
) -> None:
    """A script runs without output on stderr and saves the pictures it names."""
    command = [sys.executable, "-W", "error", "-c", script]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)
    sizes = {}
    for name in pictures:
        with Image.open(tmp_path / name) as picture:
            picture.load()
            sizes[name] = picture.size

    assert (result.returncode, result.stderr) == (0, "")
    assert output in result.stdout
    assert sizes == pictures


def test_faults(environment: dict[str, str], tmp_path: Path) -> None:
    """The example with faults saves all pictures, pays for each once, and logs the failed polls."""
    command = [sys.executable, "-W", "error", "-c", EXAMPLES["Faults"]]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)
    sizes = set()
    for path in (tmp_path / "rehearsal").iterdir():
        with Image.open(path) as picture:
            picture.load()
            sizes.add((path.name, picture.size))

    assert result.returncode == 0
    assert "Counter({'a fox': 1, 'a heron': 1, 'a hedgehog': 1})" in result.stdout
    assert sizes == {(f"{animal}.jpeg", (1024, 1024)) for animal in ("fox", "heron", "hedgehog")}
    assert all("poll 1 failed" in line for line in result.stderr.splitlines())


def test_resumed_batch(environment: dict[str, str], tmp_path: Path) -> None:
    """The example with a journal resumes after it was killed; a third run replays everything and pays nothing."""
    command = [sys.executable, "-W", "error", "-c", EXAMPLES["Batches that survive"]]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, cwd=tmp_path, env=environment) as first:
        while not (tmp_path / "herbarium").is_dir() or not list((tmp_path / "herbarium").glob("*.jpeg")):
            assert first.poll() is None
            time.sleep(0.01)
        first.kill()
    runs = [
        subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)
        for _ in range(2)
    ]
    pictures = list((tmp_path / "herbarium").iterdir())
    for path in pictures:
        with Image.open(path) as picture:
            picture.load()

    assert [(run.returncode, run.stderr) for run in runs] == [(0, "")] * 2
    assert len(pictures) == 12
    assert "submitted=0" in runs[1].stdout
    assert "replayed=12" in runs[1].stdout
    assert runs[1].stdout.count(" completed 0.07") == 12


def test_console(environment: dict[str, str], tmp_path: Path) -> None:
    """The commands work: a dry run that costs nothing, a batch of four pictures, and its journal."""
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    script = bin_folder / "flux2max"
    script.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m flux2max_async.cli "$@"\n')
    script.chmod(0o755)
    environment["PATH"] = os.pathsep.join([str(bin_folder), environment["PATH"]])
    commands = [line.removeprefix("$ ") for line in CONSOLE_EXAMPLE.splitlines()]
    runs = [
        subprocess.run(command, shell=True, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)
        for command in commands
    ]

    assert [run.returncode for run in runs] == [0, 0, 0, 0]
    assert "4 to be submitted, for about $0.28" in runs[1].stderr
    assert len(list((tmp_path / "pictures").glob("*.jpeg"))) == 4
    assert "$0.28" in runs[3].stdout


@contextmanager
def running_web_example(gateway: Emulator, folder: Path) -> Iterator[tuple[str, Path]]:
    """Run the FastAPI example under uvicorn; yield its URL and, for afterwards, its log."""
    (folder / "app.py").write_text(WEB_EXAMPLE, encoding="utf-8")
    port = free_port()
    command = [sys.executable, "-m", "uvicorn", "app:app", "--app-dir", str(folder), "--port", str(port)]
    environment = {
        **os.environ,
        "FLUX2MAX_API_KEY": gateway.api_key,
        "FLUX2MAX_BASE_URL": gateway.url,
        "PUBLIC_URL": f"http://127.0.0.1:{port}",
        "WEBHOOK_SECRET": "a secret",
    }
    log = folder / "log.txt"
    with log.open("wb") as output, subprocess.Popen(command, env=environment, cwd=folder, stderr=output) as server:
        try:
            yield f"http://127.0.0.1:{port}/pictures", log
        finally:
            server.terminate()
            server.wait(timeout=120)


def test_web_backend(tmp_path: Path) -> None:
    """The FastAPI example generates pictures under a real server, by webhooks alone, and answers 422 to bad prompts."""
    with (
        Emulator(seconds=0.5, spread=0.0, seed=1) as gateway,
        running_web_example(gateway, tmp_path) as (url, log),
    ):
        status, body = _post(url, b'{"prompt": "a cat"}')
        blank_status, detail = _post(url, b'{"prompt": " "}')
        moderated_status, _ = _post(url, b'{"prompt": "a cat [moderate]"}')
        form_status, _ = _post(f"{url}?prompt=a%20cat", b"prompt=a+cat", "application/x-www-form-urlencoded")

    assert status == 200
    assert body.startswith(JPEG)
    assert (blank_status, b"prompt" in detail) == (422, True)
    assert (moderated_status, form_status) == (422, 422)
    assert [delivery.status for delivery in gateway.deliveries] == [200, 200]
    text = log.read_text(encoding="utf-8")
    assert "Application shutdown complete" in text
    assert "Traceback" not in text


def test_web_backend_whose_visitors_leave(tmp_path: Path) -> None:
    """In the FastAPI example, the requests of visitors who leave while they wait for a slot are never submitted."""
    with (
        Emulator(seconds=3600.0, spread=0.0, seed=1, pictures=False) as gateway,
        running_web_example(gateway, tmp_path) as (url, log),
        ExitStack() as stack,
    ):
        _post(url, b'{"prompt": " "}')  # it has started
        for number in range(24):
            stack.enter_context(_start_post(url, f"in flight {number}"))
        _wait_until(lambda: gateway.accepted.total() == 24)
        for number in range(10):
            _start_post(url, f"leaving {number}").close()
        staying = stack.enter_context(_start_post(url, "staying"))
        for _ in range(5):
            _post(url, b'{"prompt": " "}')  # the server has seen the others leave before it responds to these
        for task in list(gateway.tasks.values()):
            task.ends = 0.0
        _wait_until(lambda: gateway.accepted["staying"] == 1)
        for task in list(gateway.tasks.values()):
            task.ends = 0.0
        status = staying.recv(12)

    assert status == b"HTTP/1.1 200"
    assert gateway.accepted == {f"in flight {number}": 1 for number in range(24)} | {"staying": 1}
    assert "Traceback" not in log.read_text(encoding="utf-8")


def _start_post(url: str, prompt: str) -> socket.socket:
    """Send a request, and return the connection on which the response will come."""
    body = json.dumps({"prompt": prompt}).encode()
    head = (
        f"POST /pictures HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    connection = socket.create_connection(("127.0.0.1", urllib.parse.urlsplit(url).port or 0), timeout=120)
    connection.sendall(head.encode() + body)
    return connection


def _wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _post(url: str, body: bytes, content_type: str = "application/json") -> tuple[int, bytes]:
    request = urllib.request.Request(url, body, {"Content-Type": content_type})
    for _ in range(1200):
        try:
            with urllib.request.urlopen(request) as response:
                return response.status, response.read()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read()
        except urllib.error.URLError:
            time.sleep(0.1)  # not started yet
    raise AssertionError("the server did not start")


def test_pytest_example(tmp_path: Path) -> None:
    """The example of a test passes."""
    (tmp_path / "test_example.py").write_text(TEST_EXAMPLE, encoding="utf-8")
    (tmp_path / "pytest.ini").write_text("[pytest]\n")  # so that no configuration of a parent folder is used
    command = [sys.executable, "-m", "pytest", "-q", "-W", "error", "-p", "no:cacheprovider", "-p", "no:asyncio"]
    command.append(str(tmp_path))
    if (
        "flux_emulator"
        not in subprocess.run(
            [sys.executable, "-m", "pytest", "--fixtures", str(tmp_path)], capture_output=True, text=True, check=False
        ).stdout
    ):  # if the package isn't installed, its plugin must be named
        command += ["-p", "flux2max_async.pytest_plugin"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)

    assert "1 passed" in result.stdout, result.stdout + result.stderr
