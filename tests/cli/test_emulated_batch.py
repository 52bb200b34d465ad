"""`flux2max batch --emulator`: it needs nothing, spends nothing, and never meets the pictures that were paid for."""

import asyncio
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from support.commands import KEY, Command, Run
from support.ports import free_port

from flux2max_async import ConfigurationError, FixedSchedule, FluxSession
from flux2max_async.cli import _emulated
from flux2max_async.cli._emulated import run_emulator
from flux2max_async.cli._output_dir import OutputDir
from flux2max_async.emulator import Emulator
from flux2max_async.journal._entry import EntryState, JournalEntry

pytestmark = pytest.mark.usefixtures("empty_folder")

Service = Callable[..., Emulator]
SMALL = ("--width", "64", "--height", "64")
FOLDER = "flux2max-prompts-emulator"


@pytest.fixture
def prompts() -> str:
    Path("prompts.txt").write_text("a cat\na dog [fail]\n", encoding="utf-8")
    return "prompts.txt"


def states(folder: str = FOLDER) -> dict[str, str]:
    lines = Path(folder, "results.jsonl").read_text(encoding="utf-8").splitlines()
    return {row["prompt"]: row["state"] for row in map(json.loads, lines)}


def test_from_the_first_run_to_the_last(
    on_terminal: Command, flux2max: Command, monkeypatch: pytest.MonkeyPatch, prompts: str
) -> None:
    """It needs no key and asks nothing; later runs go on with its tasks, although their emulator has ended."""
    monkeypatch.setattr(_emulated, "_SECONDS", 60.0)  # the tasks of the first run are still running at its end
    started = on_terminal("batch", prompts, *SMALL, "--task-timeout", "2")
    first = flux2max("batch", prompts, *SMALL, "--emulator", "--task-timeout", "2", "--max-in-flight", "9")
    running = states()
    second = flux2max("batch", prompts, *SMALL, "--emulator")
    ended = states()
    (picture,) = Path(FOLDER).glob("*.jpeg")
    picture.unlink()
    Path("prompts.txt").write_text("a cat\n", encoding="utf-8")
    third = on_terminal("batch", prompts, *SMALL, "--emulator")
    shown = flux2max("journal", "show", FOLDER)
    page = flux2max("gallery", FOLDER)

    assert "no API key" in started.out
    assert (first.code, set(running.values())) == (1, {"submitted"})
    assert first.err.splitlines()[0] == (
        "2 pictures: 2 to be submitted, for about $0.14 (by the emulator: nothing is paid)"
    )
    assert first.err.splitlines()[-1] == (
        "to go on: flux2max batch prompts.txt --width 64 --height 64 --emulator --task-timeout 2 --max-in-flight 9"
    )
    assert (second.code, ended) == (1, {"a cat": "completed", "a dog [fail]": "failed"})
    assert ", nothing spent\n" in second.out
    assert "$0.07 if it were paid." in Path(FOLDER, "index.html").read_text(encoding="utf-8")
    assert third.code == 0
    assert "Go on?" not in third.out
    assert "for pictures of the service: flux2max batch prompts.txt --width 64 --height 64" in third.out
    assert picture.is_file()
    assert (shown.code, page.code) == (0, 0)


@pytest.mark.parametrize(
    ("files", "emulated", "message"),
    [
        ((), True, None),
        ((), False, None),
        (("journal-emulator.db",), True, None),
        (("journal-emulator.db", "results.jsonl"), True, None),
        (("journal.db", "results.jsonl"), False, None),
        (("results.jsonl",), False, None),
        (("journal-emulator.db",), False, "has the emulator's pictures: choose another folder with --out, or delete"),
        (("journal.db", "journal-emulator.db"), False, "has the emulator's pictures"),
        (("journal.db",), True, "is the folder of a batch without the emulator: choose another one with --out"),
        (("journal.db", "journal-emulator.db"), True, "is the folder of a batch without the emulator"),
        (("results.jsonl",), True, "is the folder of a batch without the emulator"),
    ],
)
def test_mixture(files: tuple[str, ...], emulated: bool, message: str | None) -> None:
    """A folder has either pictures that were paid for or the emulator's."""
    Path("pictures").mkdir()
    for name in files:
        Path("pictures", name).touch()
    output_dir = OutputDir(Path("pictures"), emulated=emulated)
    if message is None:
        output_dir.reject_mixture()
    else:
        with pytest.raises(ConfigurationError, match=f"^'pictures' {message}"):
            output_dir.reject_mixture()


def test_same_folder_without_the_emulator(
    flux2max: Command, service: Service, monkeypatch: pytest.MonkeyPatch, prompts: str
) -> None:
    """The command that it suggests pays for pictures in another folder; one with the same folder sends nothing."""
    monkeypatch.setattr(_emulated, "_SECONDS", 0.05)
    gateway = service()
    Path("prompts.txt").write_text("a cat\n", encoding="utf-8")
    emulated = flux2max("batch", prompts, *SMALL, "--emulator", "--out", "pictures")
    sent = dict(gateway.calls)
    refused = flux2max("batch", prompts, *SMALL, "--out", "pictures")
    refused_calls = dict(gateway.calls)
    suggested = emulated.err.splitlines()[-1].partition(": flux2max ")[2].split()
    paid = flux2max(*suggested)

    assert (emulated.code, sent) == (0, {})
    assert refused == Run(
        2,
        "",
        "flux2max: 'pictures' has the emulator's pictures: choose another folder with --out, or delete it\n",
    )
    assert refused_calls == {}
    assert suggested == ["batch", "prompts.txt", *SMALL]
    assert (paid.code, gateway.calls["submit"]) == (0, 1)
    assert states("flux2max-prompts") == {"a cat": "completed"}


def test_settings_of_the_service_have_no_effect(
    flux2max: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, prompts: str
) -> None:
    """Keys and addresses are ignored, wherever they come from; an output folder in `.env` is checked as always."""
    monkeypatch.setattr(_emulated, "_SECONDS", 0.05)
    monkeypatch.setenv("FLUX2MAX_API_KEY", KEY)
    folder = tmp_path / "folder"
    folder.mkdir()
    monkeypatch.chdir(folder)
    Path("prompts.txt").write_text("a cat\n", encoding="utf-8")
    Path(".env").write_text("FLUX2MAX_BASE_URL=https://foreign.example\nFLUX2MAX_API_KEY=other\n", encoding="utf-8")
    run = flux2max("batch", prompts, *SMALL, "--emulator", "--key-file", "nothing")
    Path(".env").write_text("FLUX2MAX_OUT=../elsewhere\n", encoding="utf-8")
    elsewhere = flux2max("batch", prompts, *SMALL, "--emulator")

    assert run.code == 0
    assert elsewhere.code == 2
    assert "FLUX2MAX_OUT in .env counts only with the API key" in elsewhere.err
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("name", ["-", "pipe"])
def test_default_folder(flux2max: Command, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Standard input has a folder of its own with the emulator, too; a file that isn't regular needs --out."""
    monkeypatch.setattr(_emulated, "_SECONDS", 0.05)
    Path("prompts.txt").write_text("a cat\n", encoding="utf-8")
    if name == "pipe":
        Path("pipe").symlink_to("/dev/null")
        run = flux2max("batch", "pipe", "--as", "txt", "--emulator")
        assert (run.code, "specify the output folder with --out" in run.err) == (2, True)
        return
    with Path("prompts.txt").open(encoding="utf-8") as source, monkeypatch.context() as patch:
        patch.setattr("sys.stdin", source)
        run = flux2max("batch", "-", *SMALL, "--emulator")

    assert run.code == 0
    assert states("flux2max-batch-emulator") == {"a cat": "completed"}


def entry(url: str) -> JournalEntry:
    """Return the entry of a completed request whose picture has a URL."""
    result = {"images": [{"url": url, "type": "image", "extra": {}}]}
    return JournalEntry(
        key="k", fingerprint="f", request={"prompt": "a cat"}, state=EntryState.COMPLETED, task_id="t1", result=result
    )


def test_port_of_earlier_runs() -> None:
    """The emulator has the port that the newest URL names, if it is free, so that pictures can be downloaded again."""
    port = free_port()
    known, unknown = entry(f"http://127.0.0.1:{port}/1.jpeg"), (entry("about:blank"), entry("http://x:y/1.jpeg"))
    with run_emulator([entry("http://127.0.0.1:1/0.jpeg"), known, *unknown], 1) as gateway:
        assert gateway.url == f"http://127.0.0.1:{port}"
        with run_emulator([known], 1) as other:
            assert other.url != gateway.url
            assert list(other.tasks) == ["t1"]


def test_no_webhooks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is posted to the webhook of a request, which may be that of a real application."""
    monkeypatch.setattr(_emulated, "_SECONDS", 0.01)

    async def generate(gateway: Emulator) -> bool:
        async with FluxSession(gateway.api_key, base_url=gateway.url, schedule=FixedSchedule(0.05)) as session:
            return (await session.generate("a cat", webhook_url="https://127.0.0.1:1/hook", width=64, height=64)).ok

    with run_emulator([], 0) as gateway:
        assert asyncio.run(generate(gateway))  # not in virtual time, which a server in another thread doesn't have
        assert len(gateway.tasks) == 1
        assert gateway.calls["webhook"] == 0
